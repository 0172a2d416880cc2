//! Two hosts that may die at any moment, with a TCP relay before each of their sockets, and the machines that use their disks.
#![allow(dead_code, reason = "each kind of trouble uses a part of it")]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use infill_base::{Ctx, ErrorKind, IoError, IoResult, WriteFlags};
use infill_io::{Address, Listener, Reactors, Relay, RelayBytes, RelayControl, RelayOptions, connector};
use infill_nbd::{ClientOptions, NbdStorage, OnLost};
use infill_storage::Storage as _;
use serde_json::{Value, json};

use crate::common::{INFILL, Process, SERVER_LIMIT, run, text, wait_until};
use crate::hosts::{BLOCK_BYTES, Random, record};
use crate::medium::Media;

/// Blocks of a small disk.
pub const BLOCKS: u64 = 384;
const READ_BLOCKS: u64 = 16;

/// A relay: where it listens, what makes trouble on it, and what has passed.
pub struct Way {
    pub address: String,
    pub control: RelayControl,
    pub bytes: Arc<RelayBytes>,
}

pub const NO_COST: RelayOptions = RelayOptions { delay: Duration::ZERO, bytes_per_second: None };

/// A relay on a TCP port of its own before a socket.
pub fn way_to(reactors: &Reactors, socket: PathBuf, options: RelayOptions) -> Way {
    reactors.block_on(move || async move {
        let listener = Listener::bind(&Address::Tcp { host: "127.0.0.1".into(), port: 0 }).unwrap();
        let address = listener.address().to_string();
        let relay = Relay::start(listener, connector(&Address::Unix(socket)), options);
        let way = Way { address, control: relay.control(), bytes: relay.bytes() };
        // It lives as long as its reactor.
        std::mem::forget(relay);
        way
    })
}

/// One of the two.
pub struct Station {
    pub dir: PathBuf,
    journal: tempfile::TempDir,
    pub words: Way,
    pub data: Way,
    process: Option<Process>,
    /// Goes after the daemon.
    pub media: Option<Media>,
}

impl Station {
    pub fn new(reactors: &Reactors, dir: PathBuf, options: RelayOptions, on_media: bool) -> Station {
        std::fs::create_dir(&dir).unwrap();
        let media = if on_media { Media::mount(&dir) } else { None };
        let journal = tempfile::tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm");
        let words = way_to(reactors, dir.join("peers.sock"), options);
        let data = way_to(reactors, dir.join("data.sock"), options);
        let mut station = Station { dir, journal, words, data, process: None, media };
        station.start(None);
        let path = station.dir.join("nbd.sock");
        station.must("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": path}}}));
        station
    }

    /// Starts its daemon; at `point` it ends itself, which may be before anybody can ask it.
    pub fn start(&mut self, point: Option<&str>) {
        let path = |name: &str| text(&self.dir.join(name)).to_owned();
        let monitor = path("monitor.sock");
        let migration = format!(
            "listen={},data={},reach={},directory={},reconnect-time=5",
            path("peers.sock"),
            path("data.sock"),
            self.data.address,
            text(&self.dir)
        );
        let mut command = Command::new(INFILL);
        command.args(["daemon", "--chardev"]);
        command.arg(format!("socket,id=monitor,path={monitor},server=on,wait=off"));
        command.args(["--monitor", "chardev=monitor", "--state", &path("state")]);
        command.args(["--journal", text(self.journal.path()), "--migration", &migration]);
        let log = std::env::var("SOAK_LOG").unwrap_or_else(|_| "off".into());
        command.env("INFILL_LOG", log).stdout(Stdio::null());
        if let Some(point) = point {
            command.env("INFILL_CRASH_AT", point);
        }
        let mut process = Process::start(&mut command);
        wait_until("the daemon is there, or has ended itself", || {
            UnixStream::connect(&monitor).is_ok() || process.0.try_wait().unwrap().is_some()
        });
        self.process = Some(process);
    }

    pub fn is_dead(&mut self) -> bool {
        self.process.as_mut().is_none_or(|process| process.0.try_wait().unwrap().is_some())
    }

    pub fn kill(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill();
        }
    }

    /// The power is cut, and back: its daemon is dead, and what was not synced is gone.
    fn power_cut(&mut self) {
        self.kill();
        for entry in std::fs::read_dir(self.journal.path()).unwrap().flatten() {
            std::fs::remove_file(entry.path()).unwrap();
        }
        self.media.iter().for_each(Media::lose_power);
    }

    /// It stands still for a while.
    pub fn stand_still(&mut self, time: Duration) {
        if let Some(process) = &self.process {
            let id = process.id().to_string();
            // It may have ended itself meanwhile.
            let _ = Command::new("kill").args(["-STOP", &id]).stderr(Stdio::null()).status();
            std::thread::sleep(time);
            let _ = Command::new("kill").args(["-CONT", &id]).stderr(Stdio::null()).status();
        }
    }

    /// Asks its monitor; nothing comes of it if the daemon ends meanwhile.
    pub fn ask(&self, command: &str, arguments: Value) -> Option<Value> {
        let mut stream = UnixStream::connect(self.dir.join("monitor.sock")).ok()?;
        stream.set_read_timeout(Some(SERVER_LIMIT)).unwrap();
        let request = json!({"execute": command, "arguments": arguments, "id": 7});
        stream.write_all(format!("{{\"execute\": \"qmp_capabilities\"}}\n{request}\n").as_bytes()).ok()?;
        for line in BufReader::new(stream).lines() {
            let answer: Value = serde_json::from_str(&line.ok()?).ok()?;
            if answer["id"] == 7 {
                return Some(answer);
            }
        }
        None
    }

    pub fn must(&self, command: &str, arguments: Value) -> Value {
        // A monitor serves one client at a time, and turns others away.
        let mut answer = Value::Null;
        wait_until("the monitor answers", || {
            answer = self.ask(command, arguments.clone()).unwrap_or_default();
            !answer.is_null()
        });
        assert!(answer.get("return").is_some(), "{command}: {answer}");
        answer["return"].take()
    }

    /// What it knows of migrations, by their ids.
    pub fn migrations(&self) -> Option<Vec<Value>> {
        self.ask("__infill_query-migrations", json!({}))?["return"].as_array().cloned()
    }

    /// Makes a disk, and exports it.
    pub fn make_disk(&self, machine: &Machine) {
        let (raw, image) = (self.dir.join("raw"), self.dir.join(format!("{}.qcow2", machine.name)));
        let blocks = (0..machine.blocks()).flat_map(|block| machine.content(block, 0));
        std::fs::write(&raw, blocks.collect::<Vec<_>>()).unwrap();
        run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&image)]);
        let node = format!("n{}", machine.nth);
        let description =
            json!({"driver": "qcow2", "node-name": node, "file": {"driver": "file", "filename": image}});
        self.must("blockdev-add", description);
        let export =
            json!({"type": "nbd", "id": node, "node-name": node, "name": machine.name, "writable": true});
        self.must("block-export-add", export);
        self.media.iter().flat_map(Media::all).for_each(|medium| medium.settle());
    }
}

/// What a machine knows of its disk.
#[derive(Clone)]
pub struct Knows {
    /// For each block the number of its newest record.
    newest: Vec<u64>,
    /// The one that may not have landed.
    unsure: Option<(u64, u64)>,
    /// Of each block that was written since the last flush, the records one of which a power cut leaves.
    unsynced: BTreeMap<u64, Vec<u64>>,
    /// Blocks that a power cut has left with one of these records.
    left: BTreeMap<u64, Vec<u64>>,
    stamp: u64,
    random: u64,
    /// It reads nothing.
    pub writes_only: bool,
    /// How long each write took.
    pub took: Vec<Duration>,
    /// What was wrong.
    pub violation: Option<String>,
}

/// A machine with its disk.
pub struct Machine {
    nth: u64,
    pub name: String,
    pub knows: Arc<Mutex<Knows>>,
    running: Option<Running>,
    /// Where it ran last.
    last_at: usize,
}

struct Running {
    at: usize,
    stop: Arc<AtomicBool>,
    steps: Arc<AtomicU64>,
    thread: JoinHandle<IoResult<()>>,
}

fn content(nth: u64, block: u64, stamp: u64) -> Vec<u8> {
    record(block + nth * 100_000, stamp)
}

impl Machine {
    pub fn new(nth: u64, seed: u64, blocks: u64) -> Machine {
        let knows = Knows {
            newest: vec![0; blocks as usize],
            unsure: None,
            unsynced: BTreeMap::new(),
            left: BTreeMap::new(),
            stamp: 0,
            random: seed | 1,
            writes_only: false,
            took: Vec::new(),
            violation: None,
        };
        let name = format!("6f1c2f0e-4d8a-4a63-9d0b-5a4f0f7f{:04x}", 0x7000 + nth);
        Machine { nth, name, knows: Arc::new(Mutex::new(knows)), running: None, last_at: 0 }
    }

    pub fn blocks(&self) -> u64 {
        self.knows.lock().unwrap().newest.len() as u64
    }

    fn content(&self, block: u64, stamp: u64) -> Vec<u8> {
        content(self.nth, block, stamp)
    }

    /// Where it runs. One that has lost its host's daemon runs nowhere.
    pub fn runs_at(&mut self) -> Option<usize> {
        if self.running.as_ref().is_some_and(|running| running.thread.is_finished()) {
            self.halt();
        }
        self.running.as_ref().map(|running| running.at)
    }

    /// Steps since it was started.
    pub fn steps(&self) -> u64 {
        self.running.as_ref().map_or(u64::MAX, |running| running.steps.load(Ordering::SeqCst))
    }

    pub fn run(&mut self, reactors: &Arc<Reactors>, at: usize, station: &Station) {
        let (stop, steps) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (told, counted, knows) = (stop.clone(), steps.clone(), self.knows.clone());
        let (nth, name, reactors) = (self.nth, self.name.clone(), reactors.clone());
        let address = Address::Unix(station.dir.join("nbd.sock"));
        let thread = std::thread::spawn(move || {
            reactors.block_on(move || async move {
                let mut mine = knows.lock().unwrap().clone();
                let ended = work(&address, nth, name, &mut mine, &told, &counted).await;
                if let Err(error) = &ended
                    && !matches!(error.kind(), ErrorKind::SourceLost | ErrorKind::NoSpace)
                {
                    mine.violation.get_or_insert(format!("the guest was told: {error}"));
                }
                *knows.lock().unwrap() = mine;
                ended
            })
        });
        self.running = Some(Running { at, stop, steps, thread });
        self.last_at = at;
    }

    /// Stops it as a hypervisor does: with nothing in flight, flushed. Whether that was so.
    pub fn halt(&mut self) -> bool {
        let Some(running) = self.running.take() else { return true };
        running.stop.store(true, Ordering::SeqCst);
        running.thread.join().unwrap().is_ok()
    }

    /// Compares the whole disk with what may be on it.
    pub fn judge(&self, reactors: &Arc<Reactors>, station: &Station) {
        let (nth, name, knows) = (self.nth, self.name.clone(), self.knows.clone());
        let address = Address::Unix(station.dir.join("nbd.sock"));
        reactors.block_on(move || async move {
            let mut mine = knows.lock().unwrap().clone();
            let disk = connect(&address, &name).await.expect("the disk is exported");
            for at in (0..mine.newest.len() as u64).step_by(READ_BLOCKS as usize) {
                let buf = BytesMut::zeroed((READ_BLOCKS * BLOCK_BYTES) as usize);
                let found = disk.read(&Ctx::GUEST, at * BLOCK_BYTES, buf).await.expect("the disk is read");
                for (block, found) in (at..).zip(found.chunks(BLOCK_BYTES as usize)) {
                    mine.look(nth, block, found);
                }
            }
            *knows.lock().unwrap() = mine;
        });
    }
}

impl Knows {
    /// The power of its host was cut, and its daemon is dead.
    fn lose(&mut self) {
        self.unsure = None;
        self.left.append(&mut self.unsynced);
    }

    /// It is about to write a record.
    fn begin(&mut self, block: u64, stamp: u64) {
        let before = self.left.remove(&block).unwrap_or_else(|| vec![self.newest[block as usize]]);
        self.unsynced.entry(block).or_insert(before).push(stamp);
        self.unsure = Some((block, stamp));
    }

    fn look(&mut self, nth: u64, block: u64, found: &[u8]) {
        if let Some(left) = self.left.remove(&block)
            && let Some(stamp) = left.iter().find(|stamp| content(nth, block, **stamp) == found)
        {
            self.newest[block as usize] = *stamp;
        }
        let newest = self.newest[block as usize];
        if let Some((_, stamp)) = self.unsure.take_if(|(other, _)| *other == block)
            && content(nth, block, stamp) == found
        {
            self.newest[block as usize] = stamp;
        } else if content(nth, block, newest) != found {
            let was = (0..=self.stamp).rev().find(|stamp| content(nth, block, *stamp) == found);
            let why = format!("disk {nth}, block {block}: found record {was:?}, expected {newest}");
            self.violation.get_or_insert(why);
        }
    }
}

async fn connect(address: &Address, name: &str) -> IoResult<NbdStorage> {
    let options = ClientOptions {
        export: name.into(),
        read_only: false,
        on_lost: OnLost::Fail,
        unsynced_bytes_max: 0,
        connections_max: 1,
        ..ClientOptions::default()
    };
    let opened = NbdStorage::connect(connector(address), options).await;
    opened.map_err(|error| IoError::new(ErrorKind::SourceLost, error.to_string()))
}

/// Writes, reads and flushes until it is told to stop, or its host's daemon has ended.
async fn work(
    address: &Address,
    nth: u64,
    name: String,
    knows: &mut Knows,
    stop: &AtomicBool,
    steps: &AtomicU64,
) -> IoResult<()> {
    let since = Instant::now();
    // A fenced image comes back a moment later than the word that it may.
    let disk = loop {
        match connect(address, &name).await {
            Ok(disk) => break disk,
            Err(_) if stop.load(Ordering::SeqCst) => return Ok(()),
            Err(error) if since.elapsed() > SERVER_LIMIT / 2 => return Err(error),
            Err(_) => infill_storage::rt::sleep(Duration::from_millis(5)).await,
        }
    };
    let read = async |knows: &mut Knows, block: u64| {
        let buf = BytesMut::zeroed(BLOCK_BYTES as usize);
        let found = disk.read(&Ctx::GUEST, block * BLOCK_BYTES, buf).await?;
        knows.look(nth, block, &found);
        IoResult::Ok(())
    };
    if let Some((block, _)) = knows.unsure {
        read(knows, block).await?;
    }
    while !stop.load(Ordering::SeqCst) && knows.violation.is_none() {
        let mut random = Random(knows.random);
        let (block, what) = (random.below(knows.newest.len() as u64), random.below(8));
        knows.random = random.0;
        match what {
            0 => {
                disk.sync(&Ctx::GUEST).await?;
                knows.unsynced.clear();
            }
            1..=3 if !knows.writes_only => read(knows, block).await?,
            _ => {
                knows.stamp += 1;
                knows.begin(block, knows.stamp);
                let (data, began) = (Bytes::from(content(nth, block, knows.stamp)).into(), Instant::now());
                disk.write(&Ctx::GUEST, block * BLOCK_BYTES, data, WriteFlags::empty()).await?;
                knows.took.push(began.elapsed());
                knows.newest[block as usize] = knows.stamp;
                knows.unsure = None;
            }
        }
        steps.fetch_add(1, Ordering::SeqCst);
        infill_storage::rt::sleep(Duration::from_micros(300)).await;
    }
    disk.sync(&Ctx::GUEST).await?;
    knows.unsynced.clear();
    Ok(())
}

/// Both of them.
pub struct Site {
    pub reactors: Arc<Reactors>,
    pub stations: [Station; 2],
    pub machines: Vec<Machine>,
}

impl Site {
    pub fn new(dir: &Path, machines: u64, seed: u64) -> Site {
        Site::over(dir, machines, seed, NO_COST, BLOCKS)
    }

    /// As [`Site::new`], on file systems that can be full and lose their power, where one may mount.
    pub fn on_media(dir: &Path, machines: u64, seed: u64) -> Site {
        Site::of(dir, machines, seed, NO_COST, BLOCKS, true)
    }

    /// As [`Site::new`], over such links.
    pub fn over(dir: &Path, machines: u64, seed: u64, options: RelayOptions, blocks: u64) -> Site {
        Site::of(dir, machines, seed, options, blocks, false)
    }

    fn of(dir: &Path, machines: u64, seed: u64, options: RelayOptions, blocks: u64, on_media: bool) -> Site {
        let reactors = Arc::new(Reactors::start(1).unwrap());
        let stations = ["a", "b"].map(|name| Station::new(&reactors, dir.join(name), options, on_media));
        let machines: Vec<Machine> =
            (0..machines).map(|nth| Machine::new(nth, seed + 2 * nth, blocks)).collect();
        machines.iter().for_each(|machine| stations[0].make_disk(machine));
        Site { reactors, stations, machines }
    }

    /// The power of a station is cut, and back. Its daemon is dead.
    pub fn power_cut(&mut self, nth: usize) {
        self.stations[nth].kill();
        for machine in self.machines.iter_mut().filter(|machine| machine.last_at == nth) {
            // It has lost its host's daemon.
            machine.halt();
            machine.knows.lock().unwrap().lose();
        }
        self.stations[nth].power_cut();
    }
}

/// Of several migrations, the one with that id.
pub fn of<'a>(all: &'a [Value], id: &str) -> Option<&'a Value> {
    all.iter().find(|one| one["migration"] == *id)
}

pub fn state(all: &[Value], id: &str) -> String {
    of(all, id).and_then(|one| one["state"].as_str()).unwrap_or("none").to_owned()
}

pub fn owner(all: &[Value], id: &str) -> bool {
    of(all, id).is_some_and(|one| one["owner"] == true)
}

/// Whether a disk is owned there, whichever migration says so.
pub fn serves(all: &[Value], disk: &str) -> bool {
    let names =
        |one: &Value| one["disks"].as_array().is_some_and(|of| of.iter().any(|of| of["name"] == *disk));
    all.iter().any(|one| one["owner"] == true && names(one))
}

impl Site {
    /// Has the disks of machines move from station `from`; gives the migration's id.
    pub fn begin(&self, from: usize, machines: &[usize], mode: &str, auto_switch: bool) -> String {
        let disks: Vec<Value> =
            machines.iter().map(|nth| json!({"name": self.machines[*nth].name})).collect();
        let to = &self.stations[1 - from].words.address;
        let arguments =
            json!({"disks": disks, "to": to, "mode": mode, "auto-switch": auto_switch, "way-back": 0});
        let begun = self.stations[from].must("__infill_migrate", arguments);
        begun["migration"].as_str().unwrap().to_owned()
    }

    pub fn state(&self, at: usize, id: &str) -> String {
        self.stations[at].migrations().map_or_else(String::new, |all| state(&all, id))
    }

    pub fn phase(&self, at: usize, id: &str) -> String {
        let all = self.stations[at].migrations().unwrap_or_default();
        of(&all, id).and_then(|one| one["phase"].as_str()).unwrap_or_default().to_owned()
    }

    pub fn owns(&self, at: usize, id: &str) -> bool {
        self.stations[at].migrations().is_some_and(|all| owner(&all, id))
    }

    pub fn run(&mut self, machine: usize, at: usize) {
        self.machines[machine].run(&self.reactors, at, &self.stations[at]);
    }

    /// Runs a machine for some steps, stops it, and compares its disk with what it knows.
    pub fn work_and_judge(&mut self, machine: usize, at: usize) {
        self.run(machine, at);
        wait_until("the machine gets on", || {
            self.machines[machine].steps() >= 50 || self.machines[machine].runs_at().is_none()
        });
        let halted = self.machines[machine].halt();
        self.machines[machine].judge(&self.reactors, &self.stations[at]);
        let told = self.machines[machine].knows.lock().unwrap().violation.clone();
        assert!(halted && told.is_none(), "{told:?}");
    }
}
