//! Two hosts whose disks change hands: daemons with their state, a guest that writes numbered records, and a hypervisor of
//! this test's own.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use infill_base::{Ctx, IoResult, WriteFlags};
use infill_io::{Address, Reactors, connector};
use infill_nbd::{ClientOptions, NbdStorage, OnLost};
use infill_storage::Storage as _;
use serde_json::{Value, json};

pub use super::common::{Random, seed};
use super::common::{run, text, wait_until};
use super::qmp::{Daemon, Program, Qmp};

/// The disk's name for life.
pub const DISK: &str = "6f1c2f0e-4d8a-4a63-9d0b-5a4f0f7f7c11";
pub const DISK_BYTES: u64 = 24 << 20;
pub const BLOCK_BYTES: u64 = 4096;
pub const BLOCKS: u64 = DISK_BYTES / BLOCK_BYTES;
/// The last ones, which guests leave to the test.
pub const SPARE_BLOCKS: u64 = 3;
pub const SPARE_STAMP: u64 = 1 << 30;

/// The record that is written to a block for the `stamp`th time; 0 is what was there before, a third of it zeroes.
pub fn record(block: u64, stamp: u64) -> Vec<u8> {
    if stamp == 0 && block.is_multiple_of(3) {
        return vec![0; BLOCK_BYTES as usize];
    }
    let mut random = Random((block * 0x9e37_79b9 + stamp * 0x85eb_ca6b) | 1);
    (0..BLOCK_BYTES / 8).flat_map(|_| random.next().to_le_bytes()).collect()
}

/// A host: a daemon with its state, and where others find it.
pub struct Host {
    pub dir: PathBuf,
    /// What `--migration` says beside the directory.
    pub migration: String,
    /// Where others bring disks.
    pub address: String,
    pub daemon: Option<Daemon>,
    pub journal: tempfile::TempDir,
}

impl Host {
    pub fn new(dir: &Path, name: &str) -> Host {
        Host::reached_at(dir, name, None)
    }

    /// Others find what it offers at `reach`.
    pub fn reached_at(dir: &Path, name: &str, reach: Option<PathBuf>) -> Host {
        let at = |socket: &str| text(&dir.join(name).join(socket)).to_owned();
        let reach = reach.map_or_else(String::new, |reach| format!(",reach={}", text(&reach)));
        Host::at(dir, name, &at("peers.sock"), &format!("data={}{reach}", at("data.sock")))
    }

    /// Others bring disks to `address`; the rest of what `--migration` says is given.
    pub fn at(dir: &Path, name: &str, address: &str, more: &str) -> Host {
        let dir = dir.join(name);
        std::fs::create_dir(&dir).unwrap();
        let journal = tempfile::tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm");
        let migration = format!("listen={address},{more}");
        let mut host = Host { dir, migration, address: address.to_owned(), daemon: None, journal };
        host.start();
        host.qmp().run(
            "nbd-server-start",
            json!({"addr": {"type": "unix", "data": {"path": host.dir.join("nbd.sock")}}}),
        );
        host
    }

    /// Where others bring disks.
    pub fn address(&self) -> String {
        self.address.clone()
    }

    pub fn start(&mut self) {
        let migration = format!("{},directory={}", self.migration, text(&self.dir));
        let state = text(&self.dir.join("state")).to_owned();
        let journal = text(self.journal.path()).to_owned();
        let options = ["--state", &state, "--journal", &journal, "--migration", &migration];
        self.daemon = Some(Daemon::start(Program::Infill, &self.dir, &options));
    }

    pub fn kill(&mut self) {
        self.daemon.take().expect("it runs").process.kill();
    }

    pub fn qmp(&self) -> Qmp {
        self.daemon.as_ref().expect("it runs").connect()
    }

    /// The disk is here first.
    pub fn has_disk(&self) {
        self.has_disk_over(|image| image);
    }

    /// As [`Host::has_disk`], and reading all of it takes some seconds.
    pub fn has_slow_disk(&self) {
        let limits = json!({"bps-read": 8 << 20});
        self.qmp().run("object-add", json!({"qom-type": "throttle-group", "id": "g", "limits": limits}));
        self.has_disk_over(|image| json!({"driver": "throttle", "throttle-group": "g", "file": image}));
    }

    pub fn has_disk_over(&self, filter: impl Fn(Value) -> Value) {
        let (raw, image) = (self.dir.join("raw"), self.dir.join("disk.qcow2"));
        std::fs::write(&raw, (0..BLOCKS).flat_map(|block| record(block, 0)).collect::<Vec<_>>()).unwrap();
        run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&image)]);
        std::fs::remove_file(&raw).unwrap();
        let mut qmp = self.qmp();
        let mut node = filter(json!({"driver": "qcow2", "file": {"driver": "file", "filename": image}}));
        node["node-name"] = json!("disk");
        qmp.run("blockdev-add", node);
        let export = json!({"type": "nbd", "id": "e", "node-name": "disk", "name": DISK, "writable": true});
        qmp.run("block-export-add", export);
    }

    /// What it knows of its one migration.
    pub fn migration(&self) -> Value {
        let all = self.qmp().run("__infill_query-migrations", json!({}));
        all.as_array().unwrap().first().cloned().unwrap_or(Value::Null)
    }

    pub fn state(&self) -> String {
        self.migration()["state"].as_str().unwrap_or("none").to_owned()
    }

    /// What it knows of that migration.
    pub fn migration_of(&self, id: &str) -> Value {
        let all = self.qmp().run("__infill_query-migrations", json!({}));
        all.as_array().unwrap().iter().find(|one| one["migration"] == *id).cloned().unwrap_or(Value::Null)
    }

    pub fn state_of(&self, id: &str) -> String {
        self.migration_of(id)["state"].as_str().unwrap_or("none").to_owned()
    }

    pub fn owner_of(&self, id: &str) -> bool {
        self.migration_of(id)["owner"] == true
    }

    /// Whether its export is offered: an image that was fenced comes back a moment later than its owner's word.
    pub fn export_is_there(&self) -> bool {
        let exports = self.qmp().run("query-block-exports", json!({}));
        exports.as_array().unwrap().iter().any(|export| export.get("__infill_held").is_none())
    }

    pub fn wait_for(&self, state: &str) {
        let mut last = Value::Null;
        let waiting = std::panic::AssertUnwindSafe(|| {
            wait_until(state, || {
                last = self.migration();
                last["state"] == state
            })
        });
        if let Err(panic) = std::panic::catch_unwind(waiting) {
            println!("{} stands at {last}", self.dir.display());
            std::panic::resume_unwind(panic);
        }
    }

    /// Whether the disk is served here.
    pub fn owns(&self) -> bool {
        self.migration()["owner"] == true
    }
}

/// What the guest knows of its disk: for each block the number of its newest record, and the one that may not have landed.
pub struct Guest {
    pub newest: Vec<u64>,
    pub unsure: Option<(u64, u64)>,
    pub stamp: u64,
    pub random: Random,
}

impl Guest {
    pub fn new(seed: u64) -> Guest {
        Guest { newest: vec![0; BLOCKS as usize], unsure: None, stamp: 0, random: Random(seed | 1) }
    }

    pub fn check(&self, block: u64, found: &[u8]) {
        let newest = self.newest[block as usize];
        let unsure = self.unsure.filter(|(other, _)| *other == block).map(|(_, stamp)| stamp);
        let fits =
            record(block, newest) == found || unsure.is_some_and(|stamp| record(block, stamp) == found);
        if !fits {
            let was = (0..=self.stamp).rev().find(|stamp| record(block, *stamp) == found);
            panic!("block {block} is not record {newest} (nor {unsure:?}) but {was:?}");
        }
    }

    /// One record more, or a look at one.
    pub async fn step(&mut self, disk: &NbdStorage) -> IoResult<()> {
        let block = self.random.below(BLOCKS - SPARE_BLOCKS);
        match self.random.below(8) {
            0 => disk.sync(&Ctx::GUEST).await,
            1..=3 => {
                let buf = BytesMut::zeroed(BLOCK_BYTES as usize);
                let found = disk.read(&Ctx::GUEST, block * BLOCK_BYTES, buf).await?;
                self.check(block, &found);
                if let Some((_, stamp)) = self.unsure.filter(|(other, _)| *other == block) {
                    self.newest[block as usize] =
                        if record(block, stamp) == found { stamp } else { self.newest[block as usize] };
                    self.unsure = None;
                }
                Ok(())
            }
            _ if self.unsure.is_some_and(|(other, _)| other != block) => Ok(()),
            _ => {
                self.stamp += 1;
                self.unsure = Some((block, self.stamp));
                let data = Bytes::from(record(block, self.stamp)).into();
                disk.write(&Ctx::GUEST, block * BLOCK_BYTES, data, WriteFlags::empty()).await?;
                self.newest[block as usize] = self.stamp;
                self.unsure = None;
                Ok(())
            }
        }
    }
}

/// A guest that runs at a host until it is stopped, as a hypervisor stops it: with nothing in flight, flushed.
pub struct Running {
    pub stop: Arc<AtomicBool>,
    pub steps: Arc<std::sync::atomic::AtomicU64>,
    pub thread: std::thread::JoinHandle<IoResult<()>>,
}

pub fn run_guest(host: &Host, guest: &Arc<Mutex<Guest>>) -> Running {
    let stop = Arc::new(AtomicBool::new(false));
    let steps = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let address = Address::Unix(host.dir.join("nbd.sock"));
    let (guest, told, counted) = (guest.clone(), stop.clone(), steps.clone());
    let thread = std::thread::spawn(move || {
        Reactors::start(1).unwrap().block_on(move || async move {
            let options = ClientOptions {
                export: DISK.into(),
                read_only: false,
                on_lost: OnLost::Fail,
                unsynced_bytes_max: 0,
                ..ClientOptions::default()
            };
            let disk = NbdStorage::connect(connector(&address), options).await.expect("the disk is exported");
            while !told.load(Ordering::SeqCst) {
                step(&guest, &disk).await?;
                counted.fetch_add(1, Ordering::SeqCst);
            }
            disk.sync(&Ctx::GUEST).await
        })
    });
    Running { stop, steps, thread }
}

#[expect(clippy::await_holding_lock, reason = "there is one guest, and nobody else asks for it meanwhile")]
pub async fn step(guest: &Mutex<Guest>, disk: &NbdStorage) -> IoResult<()> {
    guest.lock().unwrap().step(disk).await
}

impl Running {
    pub fn steps(&self) -> u64 {
        self.steps.load(Ordering::SeqCst)
    }

    pub fn wait_for_steps(&self, more: u64) {
        let until = self.steps() + more;
        wait_until("the guest gets on", || self.steps() >= until || self.thread.is_finished());
    }

    pub fn stop(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap().unwrap();
    }
}

/// Everything that the guest has written is on the disk, as the host serves it.
pub fn judge(host: &Host, guest: &Guest) {
    let raw = host.dir.join("judged");
    let uri = format!("nbd+unix:///{DISK}?socket={}", text(&host.dir.join("nbd.sock")));
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, text(&raw)]);
    let disk = std::fs::read(&raw).unwrap();
    assert_eq!(disk.len() as u64, DISK_BYTES);
    for (block, found) in disk.chunks(BLOCK_BYTES as usize).enumerate() {
        guest.check(block as u64, found);
    }
    std::fs::remove_file(&raw).unwrap();
}

/// The image of the disk at its new host stands alone and is sound.
pub fn image_is_whole(host: &Host) {
    let path = host.migration()["disks"][0]["filename"].as_str().unwrap().to_owned();
    let info: Value =
        serde_json::from_str(&run("qemu-img", &["info", "-U", "--output=json", &path])).unwrap();
    assert_eq!(info.get("backing-filename"), None, "{info}");
}

pub fn migrate(from: &Host, to: &Host, mode: &str, auto_switch: bool) -> String {
    let answer = from.qmp().run(
        "__infill_migrate",
        json!({"disks": [{"name": DISK}], "to": to.address(), "mode": mode, "auto-switch": auto_switch, "way-back": 0}),
    );
    answer["migration"].as_str().unwrap().to_owned()
}
