//! A machine moves to another host while its guest writes: its memory by QEMU's own migration, its disk by ours.
//!
//! Two hosts in networks of their own, with 200 Mbit/s between them. The memory goes first, until QEMU stands before its
//! switch; then the disk changes hands; then the machine goes on. Whoever gives up in between has the machine where it was.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::common::{INFILL, Process, fails, run, text, wait_for_socket, wait_until};
use crate::guest::{self, Console};
use crate::net::{self, Network};
use crate::qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

/// The disk's name for life.
const DISK: &str = "3d0f8a52-61f4-4c57-9d7a-1c2b3a495867";
const DISK_MIB: u64 = 128;
/// Where a daemon takes disks, and where it offers theirs; where a machine takes another's memory.
const PEERS_PORT: u16 = 20_100;
const DATA_PORT: u16 = 20_101;
const MEMORY_PORT: u16 = 20_102;
/// How long the memory of a machine may take. A limit against hangs, not a promise.
const MEMORY_LIMIT: Duration = Duration::from_secs(240);
/// A pace at which it does not get there, in bytes a second.
const CRAWLING: u64 = 64 << 10;
/// A pace that is no limit.
const FAST: u64 = 1 << 30;
/// How long a machine is not heard of before it is gone.
const STANDS_STILL: Duration = Duration::from_secs(2);
/// Records that the guest writes between one step and the next.
const RECORDS: u64 = 8;

/// A host: its network, its daemon with its state, and what it keeps.
struct Host {
    dir: PathBuf,
    network: Network,
    daemon: Option<Daemon>,
}

impl Host {
    fn new(dir: &Path, name: &str, network: Network) -> Host {
        let dir = dir.join(name);
        std::fs::create_dir(&dir).unwrap();
        let mut host = Host { dir, network, daemon: None };
        host.start("");
        host.qmp().run(
            "nbd-server-start",
            json!({"addr": {"type": "unix", "data": {"path": host.dir.join("nbd.sock")}}}),
        );
        host
    }

    /// Starts its daemon, which ends itself at a step of a migration, if one is named.
    fn start(&mut self, ends_at: &str) {
        let (address, dir) = (self.network.address, text(&self.dir));
        let migration = format!("listen={address}:{PEERS_PORT},data={address}:{DATA_PORT},directory={dir}");
        let mut command = self.network.command(INFILL);
        command.arg("daemon");
        if !ends_at.is_empty() {
            command.env("INFILL_CRASH_AT", ends_at);
        }
        let state = format!("{dir}/state");
        let options = ["--state", &state, "--migration", &migration];
        self.daemon = Some(Daemon::start_by(Program::Infill, command, &self.dir, &options));
    }

    fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("it runs")
    }

    fn qmp(&self) -> Qmp {
        self.daemon().connect()
    }

    /// Asks its daemon, as an operator does.
    fn infill(&self, args: &[&str]) -> String {
        run(INFILL, &[args, &["--socket", text(&self.daemon().socket)]].concat())
    }

    fn migration(&self, id: &str) -> Value {
        let all = self.qmp().run("__infill_query-migrations", json!({}));
        all.as_array().unwrap().iter().find(|one| one["migration"] == *id).cloned().unwrap_or(Value::Null)
    }

    fn state(&self, id: &str) -> String {
        self.migration(id)["state"].as_str().unwrap_or("none").to_owned()
    }

    fn wait_for_state(&self, id: &str, state: &str) {
        wait_until(state, || self.state(id) == state);
    }

    fn owns(&self, id: &str) -> bool {
        self.migration(id)["owner"] == true
    }
}

/// A machine at a host.
struct Machine {
    process: Process,
    qmp: Qmp,
    console: Console,
}

impl Machine {
    /// Runs the guest on the host's disk, or, told so by `incoming`, waits for another machine's memory.
    fn start(host: &Host, name: &str, incoming: &[&str]) -> Machine {
        let (dir, console) = (&host.dir, Console(host.dir.join(format!("{name}.console"))));
        let control = dir.join(format!("{name}.sock"));
        let server = format!("server.type=unix,server.path={}", text(&dir.join("nbd.sock")));
        let drive = format!("driver=nbd,{server},export={DISK},discard=unmap");
        let command = host.network.command("qemu-system-x86_64");
        let mut command = guest::machine(command, dir, &drive, &console, &control);
        let process = Process::start(command.args(incoming));
        wait_for_socket(&control);
        let mut qmp = Qmp::connect(&control);
        if !incoming.is_empty() {
            let (host, port) = (host.network.address, MEMORY_PORT.to_string());
            let transport = json!({"transport": "socket", "type": "inet", "host": host, "port": port});
            let channel = json!({"channel-type": "main", "addr": transport});
            qmp.run("migrate-incoming", json!({"channels": [channel]}));
        }
        Machine { process, qmp, console }
    }

    fn status(&mut self) -> String {
        self.qmp.run("query-status", json!({}))["status"].as_str().unwrap().to_owned()
    }

    fn wait_for_status(&mut self, status: &str) {
        let mut last = String::new();
        let waiting = std::panic::AssertUnwindSafe(|| {
            wait_until(status, || {
                last = self.status();
                last == status
            });
        });
        if let Err(panic) = std::panic::catch_unwind(waiting) {
            println!("the machine is {last}");
            std::panic::resume_unwind(panic);
        }
    }

    /// What has become of its migration.
    fn migration(&mut self) -> String {
        let told = self.qmp.run("query-migrate", json!({}));
        told["status"].as_str().unwrap_or("none").to_owned()
    }

    fn wait_for_migration(&mut self, status: &str) {
        let end = Instant::now() + MEMORY_LIMIT;
        loop {
            let now = self.migration();
            if now == status {
                return;
            }
            let told = self.qmp.run("query-migrate", json!({}));
            assert!(now != "failed" && Instant::now() < end, "{status} is waited for: {told}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Begins to send its memory to a machine that waits at `to`, up to the point where it stands.
    fn send_memory(&mut self, to: &Host, pace: u64) {
        // With a return path it has not succeeded before the other machine says so.
        let on = |name: &str| json!({"capability": name, "state": true});
        let capabilities = [on("pause-before-switchover"), on("return-path"), on("events")];
        self.qmp.run("migrate-set-capabilities", json!({"capabilities": capabilities}));
        self.qmp.run("migrate-set-parameters", json!({"max-bandwidth": pace}));
        self.qmp.run("migrate", json!({"uri": format!("tcp:{}:{MEMORY_PORT}", to.network.address)}));
    }

    fn go_on(&mut self) {
        self.qmp.run("migrate-continue", json!({"state": "pre-switchover"}));
    }

    fn cancel(&mut self) {
        self.qmp.run("migrate_cancel", json!({}));
        // It says either, by how far it was.
        wait_until("it is given up", || ["cancelled", "failed"].contains(&self.migration().as_str()));
    }

    /// Its guest is asked to end, and has; gives the number of its last record.
    fn power_off(mut self, base_sum: &str) -> u64 {
        self.qmp.run("system_powerdown", json!({}));
        let last = self.console.wait_for("GUEST-ENDS").parse().unwrap();
        assert_eq!(self.console.last("GUEST-READ").as_deref(), Some(base_sum));
        wait_until("the machine is off", || self.process.0.try_wait().unwrap().is_some());
        last
    }
}

/// Two hosts, and a machine whose guest writes at the first one.
struct Scene {
    dir: tempfile::TempDir,
    a: Host,
    b: Host,
    base_sum: String,
    /// How many machines were made ready at the second host.
    made: u32,
}

impl Scene {
    fn begin() -> (Scene, Machine) {
        let dir = tempfile::tempdir().unwrap();
        let [first, second] = net::two();
        let a = Host::new(dir.path(), "a", first);
        let b = Host::new(dir.path(), "b", second);
        let (raw, image) = (a.dir.join("raw"), a.dir.join("disk.qcow2"));
        let base_sum = guest::disk(&a.dir, &raw, DISK_MIB);
        run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&image)]);
        std::fs::remove_file(&raw).unwrap();
        let mut qmp = a.qmp();
        let file = json!({"driver": "file", "filename": image, "discard": "unmap"});
        qmp.run(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "disk", "file": file, "discard": "unmap"}),
        );
        let export = json!({"type": "nbd", "id": "e", "node-name": "disk", "name": DISK, "writable": true});
        qmp.run("block-export-add", export);
        let machine = Machine::start(&a, "guest", &[]);
        machine.console.wait_for("GUEST-IS-UP");
        machine.console.wait_for_records(RECORDS);
        (Scene { dir, a, b, base_sum, made: 0 }, machine)
    }

    /// The disk is about to move, and stays until it is told; gives the migration.
    fn hold_disk(&self, how: &[&str]) -> String {
        let to = format!("{}:{PEERS_PORT}", self.b.network.address);
        let migration = self.a.infill(&[&["migrate", DISK, "--to", &to, "--hold", "--detach"], how].concat());
        let migration = migration.trim().to_owned();
        // The same command again waits until a switch has little left to do.
        self.a.infill(&["migrate", DISK, "--to", &to, "--hold", "--quiet", "--migration", &migration]);
        migration
    }

    /// A machine at the second host that waits for the memory of the first one's.
    fn ready(&mut self) -> Machine {
        self.made += 1;
        Machine::start(&self.b, &format!("ready-{}", self.made), &["-incoming", "defer"])
    }

    /// The memory is there, and the machine stands.
    fn stands(&mut self, machine: &mut Machine) -> Machine {
        let ready = self.ready();
        self.stands_for(machine);
        ready
    }

    /// As [`Scene::stands`], for a machine that was made ready before.
    fn stands_for(&self, machine: &mut Machine) {
        machine.send_memory(&self.b, FAST);
        machine.wait_for_migration("pre-switchover");
    }

    fn switch(&self, migration: &str) {
        self.a.infill(&["switch", migration]);
        wait_until("the disk has changed hands", || self.b.owns(migration));
        assert!(!self.a.owns(migration));
    }

    /// The machine has given up, and its guest gets on where it was.
    fn goes_on_here(&self, machine: &mut Machine) {
        machine.wait_for_status("running");
        let waiting = || machine.console.wait_for_records(RECORDS);
        if let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(waiting)) {
            let told = |host: &Host| host.qmp().run("__infill_query-migrations", json!({}));
            println!(
                "the machine is {}
{}
{}",
                machine.status(),
                told(&self.a),
                told(&self.b)
            );
            std::panic::resume_unwind(panic);
        }
    }

    /// The guest's machine ends at `host`; what it has written is in `image`, all of it.
    fn ends(mut self, machine: Machine, image: &Path, journal: &str) {
        let console = machine.console.0.clone();
        let last = machine.power_off(&self.base_sum);
        let journal = journal.to_owned() + &Console(console).said();
        is_complete(&journal, last);
        for host in [&mut self.a, &mut self.b] {
            if let Some(daemon) = host.daemon.take() {
                let mut qmp = daemon.connect();
                daemon.quit(&mut qmp);
            }
        }
        run("qemu-img", &["check", "-q", text(image)]);
        let raw = self.dir.path().join("judged");
        run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(image), text(&raw)]);
        guest::judge(self.dir.path(), &raw, last);
    }
}

/// The guest has said of each record, once and in order, that it was written.
fn is_complete(journal: &str, last: u64) {
    let numbers = journal.lines().filter_map(|line| line.split("GUEST-WROTE ").nth(1));
    let numbers: Vec<u64> = numbers.map(|number| number.trim().parse().unwrap()).collect();
    let expected: Vec<u64> = (1..=last).collect();
    assert!(numbers == expected, "the guest has written {last} records, and said of these: {numbers:?}");
}

#[test]
fn a_machine_moves_under_its_guest_and_its_disk_follows() {
    let (mut scene, mut machine) = Scene::begin();
    let migration = scene.hold_disk(&[]);
    let mut moved = scene.stands(&mut machine);
    scene.switch(&migration);
    machine.go_on();
    machine.wait_for_migration("completed");
    let journal = machine.console.said();
    moved.wait_for_status("running");
    // What it says first may have been written at the first host.
    moved.console.wait_for("GUEST-WROTE");
    moved.console.wait_for_records(RECORDS);

    // Whoever starts it where it was gets nowhere: it is stopped at its first write, and the guest sees no error.
    machine.qmp.run("cont", json!({}));
    machine.wait_for_status("io-error");
    moved.console.wait_for_records(RECORDS);
    machine.qmp.run("quit", json!({}));
    machine.process.wait_for_success();

    scene.b.wait_for_state(&migration, "local");
    scene.a.wait_for_state(&migration, "released");
    let left = scene.a.dir.join("disk.qcow2");
    let told = fails("qemu-img", &["info", text(&left)]);
    assert!(told.contains("moved to another host"), "{told}");
    let mut qmp = scene.a.qmp();
    scene.a.daemon.take().unwrap().quit(&mut qmp);
    std::fs::remove_file(&left).unwrap();
    moved.console.wait_for_records(RECORDS);
    let image = scene.b.migration(&migration)["disks"][0]["filename"].as_str().unwrap().to_owned();
    scene.ends(moved, Path::new(&image), &journal);
}

/// The machine there dies when it owns its disk, all of it, and has not run: the one that stands goes on, and its disk comes
/// back.
#[test]
fn a_machine_that_dies_before_it_runs_gives_its_disk_back() {
    let (mut scene, mut machine) = Scene::begin();
    let migration = scene.hold_disk(&["--pre-copy"]);
    let moved = scene.stands(&mut machine);
    scene.switch(&migration);
    wait_until("all data is there", || scene.b.migration(&migration)["phase"] == "waits for a guest's write");
    moved.process.kill();
    machine.go_on();
    wait_until("it has failed", || machine.migration() == "failed");
    scene.goes_on_here(&mut machine);
    assert!(scene.a.owns(&migration) && !scene.b.owns(&migration));
    scene.b.wait_for_state(&migration, "gave_back");
    let image = scene.a.dir.join("disk.qcow2");
    scene.ends(machine, &image, "");
}

/// Its migration is given up while its disk is where it was, whole.
#[test]
fn a_machine_whose_migration_is_cancelled_before_its_disk_has_left_goes_on() {
    let (mut scene, mut machine) = Scene::begin();
    let migration = scene.hold_disk(&[]);

    // Its memory is under way.
    let ready = scene.ready();
    machine.send_memory(&scene.b, CRAWLING);
    machine.wait_for_migration("active");
    machine.cancel();
    scene.goes_on_here(&mut machine);
    drop(ready);

    // It stands, and its disk is still the one that was held.
    let ready = scene.stands(&mut machine);
    machine.cancel();
    scene.goes_on_here(&mut machine);
    assert_eq!(scene.a.state(&migration), "prepared");
    drop(ready);

    // Its disk is offered to a host that does not answer.
    let ready = scene.stands(&mut machine);
    scene.b.daemon().process.signal("STOP");
    scene.a.infill(&["switch", &migration]);
    scene.a.wait_for_state(&migration, "offered");
    machine.cancel();
    scene.a.infill(&["abort", &migration]);
    scene.goes_on_here(&mut machine);
    assert_eq!(scene.a.state(&migration), "serving");
    scene.b.daemon().process.signal("CONT");
    drop(ready);
    scene.b.wait_for_state(&migration, "aborted");

    let image = scene.a.dir.join("disk.qcow2");
    scene.ends(machine, &image, "");
}

/// Its migration is given up once its disk has left: that comes back by itself, for nobody has written there.
#[test]
fn a_machine_whose_migration_is_cancelled_after_its_disk_has_left_has_it_back() {
    let (mut scene, mut machine) = Scene::begin();

    // The other host owns it.
    let migration = scene.hold_disk(&["--post-copy"]);
    let ready = scene.stands(&mut machine);
    scene.switch(&migration);
    machine.cancel();
    scene.goes_on_here(&mut machine);
    assert!(scene.a.owns(&migration));
    scene.b.wait_for_state(&migration, "gave_back");
    drop(ready);

    // The state of its devices is under way: it was told to go on, and the other machine does not answer.
    let migration = scene.hold_disk(&["--post-copy"]);
    let ready = scene.stands(&mut machine);
    scene.switch(&migration);
    ready.process.signal("STOP");
    std::thread::scope(|scope| {
        // QEMU answers nobody while it cannot send all of that state: the other machine is not there for ever.
        scope.spawn(|| {
            std::thread::sleep(STANDS_STILL);
            ready.process.kill();
        });
        machine.go_on();
        machine.qmp.event(|event| event["event"] == "MIGRATION" && event["data"]["status"] == "device");
        machine.cancel();
    });
    scene.goes_on_here(&mut machine);
    assert!(scene.a.owns(&migration) && !scene.b.owns(&migration));
    scene.b.wait_for_state(&migration, "gave_back");

    // All is there, the machine and its disk, and does not run yet; when it does, it gets nowhere.
    let migration = scene.hold_disk(&[]);
    let mut ready = Machine::start(&scene.b, "halted", &["-incoming", "defer", "-S"]);
    scene.stands_for(&mut machine);
    scene.switch(&migration);
    machine.go_on();
    machine.wait_for_migration("completed");
    wait_until("all data is there", || scene.b.migration(&migration)["phase"] == "waits for a guest's write");
    machine.qmp.run("cont", json!({}));
    scene.goes_on_here(&mut machine);
    ready.qmp.run("cont", json!({}));
    ready.wait_for_status("io-error");
    machine.console.wait_for_records(RECORDS);
    assert!(scene.a.owns(&migration) && !scene.b.owns(&migration));
    drop(ready);

    // The other host's daemon has died before it knew that it owns it, and is back a little later.
    let mut qmp = scene.b.qmp();
    scene.b.daemon.take().unwrap().quit(&mut qmp);
    scene.b.start("target record owner before");
    let migration = scene.hold_disk(&[]);
    let ready = scene.stands(&mut machine);
    scene.a.infill(&["switch", &migration]);
    scene.a.wait_for_state(&migration, "handed_over");
    let died = &mut scene.b.daemon.as_mut().unwrap().process;
    wait_until("the daemon has ended itself", || died.0.try_wait().unwrap().is_some());
    machine.cancel();
    scene.b.start("");
    scene.goes_on_here(&mut machine);
    assert!(scene.a.owns(&migration) && !scene.b.owns(&migration));
    drop(ready);

    let image = scene.a.dir.join("disk.qcow2");
    scene.ends(machine, &image, "");
}
