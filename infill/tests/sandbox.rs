//! The daemon in its sandbox does its whole work, and cannot do what it never needs.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::path::Path;

use common::{INFILL, fails, output, run, text};
use qmp::{Daemon, Program};
use serde_json::json;

/// What every thread of a process says of itself.
fn all_threads_say(daemon: &Daemon, lines: &[&str]) {
    let tasks = format!("/proc/{}/task", daemon.process.id());
    let mut threads = 0;
    for task in std::fs::read_dir(tasks).unwrap() {
        // One may end while it is looked at.
        let Ok(status) = std::fs::read_to_string(task.unwrap().path().join("status")) else { continue };
        threads += 1;
        for line in lines {
            assert!(status.lines().any(|other| other == *line), "{line} in {status}");
        }
    }
    assert!(threads > 1, "it has threads");
}

/// An overlay over a base, served, read, written and filled.
fn works(daemon: &Daemon, dir: &Path) {
    std::fs::write(dir.join("base.raw"), vec![0x5a; 4 << 20]).unwrap();
    let overlay = dir.join("overlay");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", text(&overlay)]);
    let mut qmp = daemon.connect();
    let file = json!({"driver": "file", "filename": text(&overlay)});
    qmp.run("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file, "discard": "unmap"}));
    let socket = dir.join("nbd.sock");
    qmp.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": text(&socket)}}}));
    qmp.run("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "top", "writable": true}));
    let uri = format!("nbd+unix:///top?socket={}", text(&socket));
    let guest = ["-f", "raw", "-d", "unmap"];
    let commands = ["read -P 90 0 4M", "write -P 91 1M 64k", "discard 2M 64k", "write -z 3M 64k", "flush"];
    let guest: Vec<&str> =
        guest.into_iter().chain(commands.iter().flat_map(|command| ["-c", command])).chain([&*uri]).collect();
    let said = run("qemu-io", &guest);
    assert!(!said.contains("failed"), "{said}");
    qmp.run("block-stream", json!({"job-id": "j", "device": "top"}));
    qmp.wait_for("BLOCK_JOB_COMPLETED");
    qmp.run("block-export-del", json!({"id": "e", "mode": "hard"}));
    qmp.run("blockdev-del", json!({"node-name": "top"}));
    qmp.run("nbd-server-stop", json!({}));
    run("qemu-img", &["check", "-q", text(&overlay)]);
    std::fs::remove_file(overlay).unwrap();
}

#[test]
fn a_daemon_works_in_its_sandbox_with_all_its_threads() {
    let dir = tempfile::tempdir().unwrap();
    let pidfile = dir.path().join("pid");
    let daemon = Daemon::start(
        Program::Infill,
        dir.path(),
        &["--sandbox", "on", "--pidfile", text(&pidfile), "--object", "iothread,id=i"],
    );
    works(&daemon, dir.path());
    // Also those that were started for the work.
    all_threads_say(&daemon, &["Seccomp:\t2", "NoNewPrivs:\t1"]);
    let mut qmp = daemon.connect();
    // The system can be read, and not written.
    let system = json!({"driver": "file", "filename": "/etc/passwd"});
    let why = qmp.refused("blockdev-add", json!({"driver": "raw", "node-name": "p", "file": system}));
    assert!(why["desc"].as_str().unwrap().contains("ermission"), "{why}");
    qmp.run("blockdev-add", json!({"driver": "raw", "node-name": "p", "read-only": true, "file": system}));
    daemon.quit(&mut qmp);
}

#[test]
fn the_sandbox_is_there_without_being_asked_for_and_goes_only_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(Program::Infill, dir.path(), &[]);
    all_threads_say(&daemon, &["Seccomp:\t2", "NoNewPrivs:\t1"]);
    let mut qmp = daemon.connect();
    daemon.quit(&mut qmp);
    let daemon = Daemon::start(Program::Infill, dir.path(), &["--sandbox=off"]);
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let seccomp = own.lines().find(|line| line.starts_with("Seccomp:")).unwrap();
    all_threads_say(&daemon, &[seccomp]);
    let mut qmp = daemon.connect();
    daemon.quit(&mut qmp);
}

#[test]
fn with_paths_nothing_else_is_reached() {
    let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(outside.path().join("disk"), vec![0; 1 << 20]).unwrap();
    let daemon = Daemon::start(Program::Infill, inside.path(), &["--sandbox-path", text(inside.path())]);
    works(&daemon, inside.path());
    let mut qmp = daemon.connect();
    let file = json!({"driver": "file", "filename": text(&outside.path().join("disk"))});
    let node = json!({"driver": "raw", "node-name": "o", "read-only": true, "file": file});
    let why = qmp.refused("blockdev-add", node);
    assert!(why["desc"].as_str().unwrap().contains("ermission"), "{why}");
    daemon.quit(&mut qmp);
    let said = fails(INFILL, &["daemon", "--sandbox-path", "/nonexistent/dir"]);
    assert!(said.contains("/nonexistent/dir"), "{said}");
    let said = fails(INFILL, &["daemon", "--sandbox=off", "--sandbox-path", text(inside.path())]);
    assert!(said.contains("--sandbox-path needs the sandbox"), "{said}");
    assert!(!output(INFILL, &["daemon", "--sandbox", "maybe"]).status.success());
}
