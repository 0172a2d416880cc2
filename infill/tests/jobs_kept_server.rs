//! A mirror to an export goes on where it was when its daemon is killed and started again: from what the server has synced,
//! where that is still there, and from the beginning where the server has forgotten it.

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
        let socket = self.path("target.sock");
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

    fn begin(&self, qmp: &mut Qmp) {
        let server = json!({"type": "unix", "path": self.path("target.sock")});
        qmp.run(
            "blockdev-add",
            json!({"driver": "nbd", "node-name": "copy", "export": "", "server": server}),
        );
        let file = json!({"driver": "file", "filename": self.path("top")});
        qmp.run("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file}));
        qmp.run(
            "nbd-server-start",
            json!({"addr": {"type": "unix", "data": {"path": self.path("nbd.sock")}}}),
        );
        let export = json!({"type": "nbd", "id": "e", "node-name": "top", "name": "disk", "writable": true});
        qmp.run("block-export-add", export);
        let mirror =
            json!({"job-id": "j", "device": "top", "target": "copy", "sync": "full", "speed": SPEED});
        qmp.run("blockdev-mirror", mirror);
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
        let stats = qmp.run("query-blockstats", json!({"query-nodes": true}));
        let copy = stats.as_array().unwrap().iter().find(|node| node["node-name"] == "copy");
        let written = copy.expect("the target")["stats"]["wr_bytes"].as_u64().unwrap();
        qmp.run("block-job-cancel", json!({"device": "j"}));
        qmp.wait_for("BLOCK_JOB_COMPLETED");
        daemon.quit(&mut qmp);
        let target = format!("nbd+unix:///?socket={}", self.path("target.sock"));
        run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &self.path("top"), &target]);
        written
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
