//! A copy from or to an export goes on where it was when its daemon is killed and started again: from what the server has synced,
//! where that is still there. A mirror begins anew where the server has forgotten it, and a backup has failed.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Process, run, text, wait_for_socket, wait_until};
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 24 * MIB;
/// How fast it is copied, in bytes per second: over several syncs.
const SPEED: u64 = 4 * MIB;
/// How much of it is stable when the daemon is killed.
const STABLE_BYTES: u64 = 8 * MIB;

struct Place {
    dir: tempfile::TempDir,
    journal: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let place = Place {
            dir: tempfile::tempdir().unwrap(),
            journal: tempfile::tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm"),
        };
        let size = DISK_BYTES.to_string();
        run("qemu-img", &["create", "-q", "-f", "qcow2", &place.path("top"), &size]);
        run("qemu-io", &["-f", "qcow2", "-c", &format!("write -P 1 0 {size}"), &place.path("top")]);
        std::fs::File::create(place.path("copy")).unwrap().set_len(DISK_BYTES).unwrap();
        place
    }

    fn path(&self, name: &str) -> String {
        text(&self.dir.path().join(name)).to_owned()
    }

    /// A server of the target: of a file, or of memory.
    fn serve(&self, what: &[&str]) -> Process {
        self.serve_at("target.sock", what)
    }

    fn serve_at(&self, socket: &str, what: &[&str]) -> Process {
        let socket = self.path(socket);
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new("nbdkit");
        command.args(["-f", "-U", &socket]).args(what);
        let process = Process::start(&mut command);
        wait_for_socket(Path::new(&socket));
        process
    }

    fn start(&self) -> (Daemon, Qmp) {
        let options = ["--state", &self.path("state"), "--journal", text(self.journal.path())];
        let daemon = Daemon::start(Program::Infill, self.dir.path(), &options);
        let qmp = daemon.connect();
        (daemon, qmp)
    }

    fn add_server(&self, qmp: &mut Qmp, name: &str, socket: &str) {
        let server = json!({"type": "unix", "path": self.path(socket)});
        qmp.run("blockdev-add", json!({"driver": "nbd", "node-name": name, "export": "", "server": server}));
    }

    fn begin(&self, qmp: &mut Qmp) {
        self.add_server(qmp, "copy", "target.sock");
        let file = json!({"driver": "file", "filename": self.path("top")});
        qmp.run("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file}));
        self.export(qmp);
        let mirror =
            json!({"job-id": "j", "device": "top", "target": "copy", "sync": "full", "speed": SPEED});
        qmp.run("blockdev-mirror", mirror);
        Place::wait_until_stable(qmp);
    }

    fn export(&self, qmp: &mut Qmp) {
        qmp.run(
            "nbd-server-start",
            json!({"addr": {"type": "unix", "data": {"path": self.path("nbd.sock")}}}),
        );
        let export = json!({"type": "nbd", "id": "e", "node-name": "top", "name": "disk", "writable": true});
        qmp.run("block-export-add", export);
    }

    fn wait_until_stable(qmp: &mut Qmp) {
        let is_stable = |event: &Value| {
            event["event"] == "__INFILL_JOB_PROGRESS"
                && event["data"]["durable"].as_u64() >= Some(STABLE_BYTES)
        };
        qmp.event(is_stable);
    }

    /// The guest writes.
    fn write(&self, command: &str) {
        let disk = format!("nbd+unix:///disk?socket={}", self.path("nbd.sock"));
        run("qemu-io", &["-f", "raw", "-c", command, &disk]);
    }

    /// The job copies the rest and ends, with source and target the same. How many bytes it has written.
    fn end(&self, daemon: Daemon, mut qmp: Qmp) -> u64 {
        qmp.run("block-job-set-speed", json!({"device": "j", "speed": 0}));
        wait_until("all is copied", || {
            let jobs = qmp.run("query-block-jobs", json!({}));
            assert!(jobs[0].get("error").is_none(), "{jobs}");
            jobs[0]["ready"] == json!(true)
        });
        let written = Place::written(&mut qmp);
        qmp.run("block-job-cancel", json!({"device": "j"}));
        qmp.wait_for("BLOCK_JOB_COMPLETED");
        daemon.quit(&mut qmp);
        let target = format!("nbd+unix:///?socket={}", self.path("target.sock"));
        run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &self.path("top"), &target]);
        written
    }

    /// How many bytes were written to the target.
    fn written(qmp: &mut Qmp) -> u64 {
        let stats = qmp.run("query-blockstats", json!({"query-nodes": true}));
        let copy = stats.as_array().unwrap().iter().find(|node| node["node-name"] == "copy");
        copy.expect("the target")["stats"]["wr_bytes"].as_u64().unwrap()
    }

    /// The backup is not held any more: whatever is written from here on, it knows of. Its status.
    fn wait_until_begun(qmp: &mut Qmp) -> Value {
        let mut status = Value::Null;
        wait_until("the backup has begun", || {
            status = qmp.run("query-jobs", json!({}))[0]["status"].clone();
            status != json!("created")
        });
        status
    }

    /// The backup ends with this error, or none.
    fn end_backup(&self, qmp: &mut Qmp) -> Option<String> {
        if Place::wait_until_begun(qmp) == json!("running") {
            qmp.run("block-job-set-speed", json!({"device": "j", "speed": 0}));
        }
        let mut error = None;
        wait_until("the backup is over", || {
            let jobs = qmp.run("query-jobs", json!({}));
            error = jobs[0]["error"].as_str().map(str::to_owned);
            jobs[0]["status"] == json!("concluded")
        });
        error
    }

    fn maps(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.journal.path()).unwrap().flatten();
        let maps = entries.filter(|entry| entry.file_name().to_str().unwrap().starts_with("copy-"));
        maps.map(|entry| entry.path()).collect()
    }
}

#[test]
fn a_mirror_to_a_server_goes_on_after_a_kill_from_what_was_synced() {
    let place = Place::new();
    let _server = place.serve(&["file", &place.path("copy")]);
    let (daemon, mut qmp) = place.start();
    place.begin(&mut qmp);
    place.write("write -P 7 1M 64k");
    daemon.process.kill();
    assert_eq!(place.maps().len(), 1);
    let (daemon, qmp) = place.start();
    place.write("write -P 8 2M 64k");
    let written = place.end(daemon, qmp);
    println!("{written} bytes were written after the kill, {STABLE_BYTES} of {DISK_BYTES} were stable");
    assert!(written <= DISK_BYTES - STABLE_BYTES + MIB, "{written} bytes were written after the kill");
    assert_eq!(place.maps(), Vec::<PathBuf>::new(), "a job that is over leaves no map");
}

#[test]
fn a_mirror_to_a_server_that_has_forgotten_copies_everything_again() {
    let place = Place::new();
    let memory = ["memory", "24M"];
    let server = place.serve(&memory);
    let (daemon, mut qmp) = place.start();
    place.begin(&mut qmp);
    daemon.process.kill();
    server.kill();
    let _server = place.serve(&memory);
    let (daemon, qmp) = place.start();
    let written = place.end(daemon, qmp);
    assert!(written >= DISK_BYTES, "{written} bytes were written to an empty disk");
}

/// Which ends of a copy lie on servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ends {
    source: bool,
    target: bool,
}

impl Ends {
    /// Starts the servers, of files, and begins the job.
    fn begin(self, place: &Place, qmp: &mut Qmp, command: &str, more: Value) -> Vec<Process> {
        let size = DISK_BYTES.to_string();
        let mut servers = Vec::new();
        if self.source {
            std::fs::File::create(place.path("disk")).unwrap().set_len(DISK_BYTES).unwrap();
            run("qemu-io", &["-f", "raw", "-c", &format!("write -P 1 0 {size}"), &place.path("disk")]);
            servers.push(place.serve_at("source.sock", &["file", &place.path("disk")]));
            place.add_server(qmp, "top", "source.sock");
        } else {
            let file = json!({"driver": "file", "filename": place.path("top")});
            qmp.run("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file}));
        }
        if self.target {
            servers.push(place.serve(&["file", &place.path("copy")]));
            place.add_server(qmp, "copy", "target.sock");
        } else {
            let file = json!({"driver": "file", "node-name": "copy", "filename": place.path("copy")});
            qmp.run("blockdev-add", file);
        }
        place.export(qmp);
        let mut job = json!({"job-id": "j", "device": "top", "target": "copy", "speed": SPEED,
            "auto-dismiss": false});
        job.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        qmp.run(command, job);
        servers
    }

    /// The file that the guest's disk lies in, and its format.
    fn disk(self, place: &Place) -> [String; 2] {
        match self.source {
            true => [place.path("disk"), "raw".into()],
            false => [place.path("top"), "qcow2".into()],
        }
    }
}

const ENDS: [Ends; 3] = [
    Ends { source: true, target: false },
    Ends { source: false, target: true },
    Ends { source: true, target: true },
];

#[test]
fn a_backup_from_or_to_a_server_goes_on_after_a_kill_and_is_the_disk_as_it_was() {
    for ends in ENDS {
        let place = Place::new();
        let (daemon, mut qmp) = place.start();
        let _servers = ends.begin(&place, &mut qmp, "blockdev-backup", json!({"sync": "full"}));
        Place::wait_until_stable(&mut qmp);
        // What is at its end is on the target alone from here on, and no sync has covered it.
        place.write("write -P 7 20M 64k");
        daemon.process.kill();
        let (daemon, mut qmp) = place.start();
        // On a busy machine the disk is there before it is known that the backup can go on, and what is written then is lost to it.
        Place::wait_until_begun(&mut qmp);
        place.write("write -P 8 22M 64k");
        assert_eq!(place.end_backup(&mut qmp), None, "{ends:?}");
        let written = Place::written(&mut qmp);
        qmp.run("job-dismiss", json!({"id": "j"}));
        daemon.quit(&mut qmp);
        assert!(written <= DISK_BYTES - STABLE_BYTES + MIB, "{ends:?}: {written} bytes after the kill");
        let whole = format!("read -P 1 0 {DISK_BYTES}");
        run("qemu-io", &["-f", "raw", "-c", &whole, &place.path("copy")]);
        let [disk, format] = ends.disk(&place);
        run("qemu-io", &["-f", &format, "-c", "read -P 7 20M 64k", "-c", "read -P 8 22M 64k", &disk]);
        assert_eq!(place.maps(), Vec::<PathBuf>::new(), "a job that is over leaves no map");
    }
}

#[test]
fn a_backup_whose_server_has_forgotten_what_a_guest_has_overwritten_has_failed() {
    let ends = Ends { source: false, target: true };
    let place = Place::new();
    let (daemon, mut qmp) = place.start();
    let servers = ends.begin(&place, &mut qmp, "blockdev-backup", json!({"sync": "none"}));
    place.write("write -P 7 20M 64k");
    daemon.process.kill();
    servers.into_iter().for_each(Process::kill);
    // Its server had not synced that.
    run("qemu-io", &["-f", "raw", "-c", "write -z 20M 64k", &place.path("copy")]);
    let _server = place.serve(&["file", &place.path("copy")]);
    let (daemon, mut qmp) = place.start();
    let error = place.end_backup(&mut qmp).expect("an error");
    assert!(error.contains("the target does not have what was written to it at byte 20971520"), "{error}");
    qmp.run("job-dismiss", json!({"id": "j"}));
    daemon.quit(&mut qmp);
    assert_eq!(place.maps(), Vec::<PathBuf>::new());
}

/// What keeps the backup waiting, where something does.
fn held_reason(qmp: &mut Qmp) -> Option<String> {
    let entries = qmp.run("__infill_query-state", json!({}))["entries"].clone();
    let job = entries.as_array().unwrap().iter().find(|entry| entry["kind"] == json!("job"))?.clone();
    job["held"].as_str().map(str::to_owned)
}

#[test]
fn a_backup_whose_server_cannot_be_read_waits_for_it_over_kills() {
    let ends = Ends { source: false, target: true };
    let place = Place::new();
    let (daemon, mut qmp) = place.start();
    let servers = ends.begin(&place, &mut qmp, "blockdev-backup", json!({"sync": "full"}));
    Place::wait_until_stable(&mut qmp);
    place.write("write -P 7 20M 64k");
    daemon.process.kill();
    servers.into_iter().for_each(Process::kill);
    // It answers reads late, or not. It does not outlive a client that dies meanwhile.
    let fails = place.path("fails");
    std::fs::write(&fails, "").unwrap();
    let (copy, trigger) = (place.path("copy"), format!("error-file={fails}"));
    let slow = ["--filter=error", "--filter=delay", "file", &copy, "delay-read=3", "error-pread-rate=1"];
    let server = place.serve(&[&slow[..], &[&trigger]].concat());
    let (daemon, mut qmp) = place.start();
    let mut reason = None;
    wait_until("the backup is held", || {
        reason = held_reason(&mut qmp);
        reason.as_ref().is_some_and(|reason| reason.contains("cannot be read"))
    });
    daemon.process.kill();
    server.kill();
    std::fs::remove_file(fails).unwrap();
    let server = place.serve(&[&slow[..], &[&trigger]].concat());
    let (daemon, mut qmp) = place.start();
    // While it is looked at, which takes seconds. What is new to the daemon may need a guard.
    qmp.run("blockdev-add", json!({"driver": "null-co", "node-name": "other", "size": MIB}));
    // A guest's write is no stranger's, however long it takes.
    std::thread::sleep(std::time::Duration::from_secs(6));
    place.write("write -P 9 20M 64k");
    daemon.process.kill();
    server.kill();
    let _server = place.serve(&["file", &copy]);
    let (daemon, mut qmp) = place.start();
    assert_eq!(place.end_backup(&mut qmp), None);
    qmp.run("job-dismiss", json!({"id": "j"}));
    daemon.quit(&mut qmp);
    run("qemu-io", &["-f", "raw", "-c", &format!("read -P 1 0 {DISK_BYTES}"), &copy]);
}

#[test]
fn a_backup_whose_server_hangs_keeps_no_other_disk_waiting_and_goes_on_when_it_answers() {
    let ends = Ends { source: false, target: true };
    let place = Place::new();
    let (daemon, mut qmp) = place.start();
    let servers = ends.begin(&place, &mut qmp, "blockdev-backup", json!({"sync": "full"}));
    // All of it is recorded after the backup.
    std::fs::File::create(place.path("other")).unwrap().set_len(MIB).unwrap();
    run("qemu-io", &["-f", "raw", "-c", "write -P 5 0 1M", &place.path("other")]);
    let other = json!({"driver": "file", "node-name": "other", "filename": place.path("other")});
    qmp.run("blockdev-add", other);
    qmp.run("block-export-add", json!({"type": "nbd", "id": "o", "node-name": "other", "name": "other"}));
    Place::wait_until_stable(&mut qmp);
    place.write("write -P 7 20M 64k");
    daemon.process.kill();
    servers.into_iter().for_each(Process::kill);
    let read_other = |qmp: &mut Qmp| {
        let disk = format!("nbd+unix:///other?socket={}", place.path("nbd.sock"));
        wait_until("the other disk's export is there", || {
            qmp.run("query-block-exports", json!({})).as_array().unwrap().len() == 2
        });
        run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 5 0 1M", &disk]);
    };
    // It accepts, and says nothing: the node of the target hangs.
    let socket = place.path("target.sock");
    std::fs::remove_file(&socket).unwrap();
    let silent = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let (daemon, mut qmp) = place.start();
    read_other(&mut qmp);
    assert_eq!(held_reason(&mut qmp).as_deref(), Some("what it needs is not there yet"));
    daemon.process.kill();
    drop(silent);
    // It agrees on everything, and answers no read: the look at the target hangs.
    let copy = place.path("copy");
    let server = place.serve(&["--filter=delay", "file", &copy, "delay-read=600"]);
    let (daemon, mut qmp) = place.start();
    read_other(&mut qmp);
    assert_eq!(held_reason(&mut qmp).as_deref(), Some("its server has not answered yet"));
    // Its end is one in order, once the server has taken what was written to it, and the backup is for the next one.
    daemon.process.signal("TERM");
    server.kill();
    let answers = place.serve(&["file", &copy]);
    let mut process = daemon.process;
    process.wait_for_success();
    answers.kill();
    let server = place.serve(&["--filter=delay", "file", &copy, "delay-read=600"]);
    let (daemon, mut qmp) = place.start();
    read_other(&mut qmp);
    assert_eq!(held_reason(&mut qmp).as_deref(), Some("its server has not answered yet"));
    // Meanwhile nobody takes its nodes away, or opens others in their place.
    qmp.run("block-export-del", json!({"id": "e", "mode": "hard"}));
    qmp.wait_for("BLOCK_EXPORT_DELETED");
    for node in ["top", "copy"] {
        let error = qmp.refused("blockdev-del", json!({"node-name": node}));
        let why = format!("Node '{node}' is busy: block device is in use by block job: backup");
        assert_eq!(error["desc"], json!(why));
    }
    server.kill();
    let _server = place.serve(&["file", &copy]);
    assert_eq!(place.end_backup(&mut qmp), None);
    qmp.run("job-dismiss", json!({"id": "j"}));
    daemon.quit(&mut qmp);
    run("qemu-io", &["-f", "raw", "-c", &format!("read -P 1 0 {DISK_BYTES}"), &copy]);
    assert_eq!(place.maps(), Vec::<PathBuf>::new());
}

#[test]
fn a_backup_whose_disk_cannot_be_held_at_once_after_a_restart_goes_on_later() {
    let place = Place::new();
    let server = place.serve(&["file", &place.path("copy")]);
    let (daemon, mut qmp) = place.start();
    qmp.run("object-add", json!({"qom-type": "throttle-group", "id": "g"}));
    let file = json!({"driver": "file", "filename": place.path("top")});
    let file = json!({"driver": "throttle", "throttle-group": "g", "file": file});
    qmp.run("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file}));
    place.add_server(&mut qmp, "copy", "target.sock");
    place.export(&mut qmp);
    let backup = json!({"job-id": "j", "device": "top", "target": "copy", "sync": "full", "speed": SPEED,
        "auto-dismiss": false});
    qmp.run("blockdev-backup", backup);
    Place::wait_until_stable(&mut qmp);
    daemon.process.kill();
    server.kill();
    let copy = place.path("copy");
    let server = place.serve(&["--filter=delay", "file", &copy, "delay-read=600"]);
    let (daemon, mut qmp) = place.start();
    // A guest's second write of what was copied waits for the limits.
    let limit = |qmp: &mut Qmp, bytes: u64| {
        let limits = json!({"path": "/objects/g", "property": "limits", "value": {"bps-write": bytes}});
        qmp.run("qom-set", limits);
    };
    limit(&mut qmp, 1000);
    place.write("write -P 7 1M 64k");
    let disk = format!("nbd+unix:///disk?socket={}", place.path("nbd.sock"));
    let mut guest = Command::new("qemu-io");
    let mut guest = Process::start(guest.args(["-f", "raw", "-c", "write -P 7 2M 64k", &disk]));
    let mut number = 0;
    wait_until("the second write has begun", || {
        number += 1;
        let bitmap = json!({"node": "top", "name": format!("b{number}")});
        qmp.ask("block-dirty-bitmap-add", bitmap).get("error").is_some()
    });
    server.kill();
    let _server = place.serve(&["file", &copy]);
    wait_until("the disk cannot be held", || {
        held_reason(&mut qmp).is_some_and(|reason| reason.contains("did not end within"))
    });
    limit(&mut qmp, 0);
    guest.wait_for_success();
    // Whatever is new has it tried again at once.
    qmp.run("blockdev-add", json!({"driver": "null-co", "node-name": "other", "size": MIB}));
    assert_eq!(place.end_backup(&mut qmp), None);
    qmp.run("job-dismiss", json!({"id": "j"}));
    daemon.quit(&mut qmp);
    run("qemu-io", &["-f", "raw", "-c", &format!("read -P 1 0 {DISK_BYTES}"), &copy]);
    assert_eq!(place.maps(), Vec::<PathBuf>::new());
}

#[test]
fn an_image_on_a_server_that_answers_no_read_keeps_no_other_disk_waiting() {
    let place = Place::new();
    let _server = place.serve(&["--filter=delay", "file", &place.path("top"), "delay-read=600"]);
    let (daemon, mut qmp) = place.start();
    place.add_server(&mut qmp, "far", "target.sock");
    let mut other = daemon.connect();
    let add = json!({"driver": "qcow2", "node-name": "hangs", "file": "far"});
    qmp.send(format!("{}\n", json!({"execute": "blockdev-add", "arguments": add})).as_bytes());
    other.run("blockdev-add", json!({"driver": "null-co", "node-name": "other", "size": MIB}));
    let nodes = other.run("query-named-block-nodes", json!({"flat": true}));
    assert!(nodes.as_array().unwrap().iter().all(|node| node["node-name"] != json!("hangs")), "{nodes}");
    daemon.process.kill();
}

#[test]
fn a_mirror_from_a_server_goes_on_after_a_kill() {
    for ends in ENDS.into_iter().filter(|ends| ends.source) {
        let place = Place::new();
        let (daemon, mut qmp) = place.start();
        let _servers = ends.begin(&place, &mut qmp, "blockdev-mirror", json!({"sync": "full"}));
        Place::wait_until_stable(&mut qmp);
        place.write("write -P 7 1M 64k");
        daemon.process.kill();
        let (daemon, mut qmp) = place.start();
        place.write("write -P 8 2M 64k");
        let written = end_mirror(daemon, &mut qmp);
        assert!(written <= DISK_BYTES - STABLE_BYTES + MIB, "{ends:?}: {written} bytes after the kill");
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &place.path("disk"), &place.path("copy")]);
        assert_eq!(place.maps(), Vec::<PathBuf>::new());
    }
}

/// The job copies the rest and is ended. How many bytes it has written.
fn end_mirror(daemon: Daemon, qmp: &mut Qmp) -> u64 {
    qmp.run("block-job-set-speed", json!({"device": "j", "speed": 0}));
    wait_until("all is copied", || {
        let jobs = qmp.run("query-jobs", json!({}));
        assert_eq!(jobs[0]["error"], Value::Null, "{jobs}");
        jobs[0]["status"] == json!("ready")
    });
    let written = Place::written(qmp);
    qmp.run("block-job-cancel", json!({"device": "j"}));
    wait_until("it is over", || qmp.run("query-jobs", json!({}))[0]["status"] == json!("concluded"));
    qmp.run("job-dismiss", json!({"id": "j"}));
    daemon.quit(qmp);
    written
}

#[test]
fn a_mirror_of_what_a_guest_writes_to_a_server_goes_on_after_a_kill_and_has_all_of_it() {
    for ends in ENDS {
        let place = Place::new();
        let (daemon, mut qmp) = place.start();
        let _servers = ends.begin(&place, &mut qmp, "blockdev-mirror", json!({"sync": "none"}));
        place.write("write -P 7 1M 64k");
        let is_copied = |event: &Value| {
            event["event"] == "__INFILL_JOB_PROGRESS" && event["data"]["durable"].as_u64() >= Some(64 << 10)
        };
        qmp.event(is_copied);
        place.write("write -P 8 2M 64k");
        daemon.process.kill();
        let (daemon, mut qmp) = place.start();
        place.write("write -P 9 3M 64k");
        let written = end_mirror(daemon, &mut qmp);
        assert!(written <= MIB, "{ends:?}: {written} bytes after the kill");
        let seen = ["read -P 0 0 1M", "read -P 7 1M 64k", "read -P 8 2M 64k", "read -P 9 3M 64k"];
        let seen: Vec<_> = seen.iter().flat_map(|command| ["-c", command]).collect();
        let copy = place.path("copy");
        run("qemu-io", &[&["-f", "raw"], &seen[..], &[copy.as_str()]].concat());
    }
}

#[test]
fn a_bitmap_that_a_backup_renews_says_after_a_kill_what_was_written_since_it_began_and_no_more() {
    let place = Place::new();
    let (daemon, mut qmp) = place.start();
    let file = json!({"driver": "file", "filename": place.path("top")});
    qmp.run("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file}));
    let file = json!({"driver": "file", "node-name": "copy", "filename": place.path("copy")});
    qmp.run("blockdev-add", file);
    place.export(&mut qmp);
    qmp.run("block-dirty-bitmap-add", json!({"node": "top", "name": "b"}));
    place.write("write -P 2 0 16M");
    let backup = json!({"job-id": "j", "device": "top", "target": "copy", "speed": SPEED,
        "auto-dismiss": false, "sync": "bitmap", "bitmap": "b", "bitmap-mode": "on-success"});
    qmp.run("blockdev-backup", backup);
    Place::wait_until_stable(&mut qmp);
    place.write("write -P 7 20M 64k");
    daemon.process.kill();
    let (daemon, mut qmp) = place.start();
    place.write("write -P 8 22M 64k");
    assert_eq!(place.end_backup(&mut qmp), None);
    place.write("write -P 9 23M 64k");
    let nodes = qmp.run("query-named-block-nodes", json!({}));
    let top = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "top").unwrap();
    assert_eq!(top["dirty-bitmaps"][0]["count"], json!(3 * 65536), "{top}");
    qmp.run("job-dismiss", json!({"id": "j"}));
    daemon.quit(&mut qmp);
    run("qemu-io", &["-f", "raw", "-c", "read -P 2 0 16M", "-c", "read -P 0 16M 8M", &place.path("copy")]);
    assert_eq!(place.maps(), Vec::<PathBuf>::new());
}
