//! State that survives: what a daemon was told to make is there again after it was killed, jobs stand where they stood,
//! and a state that cannot be used is refused and left alone.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::PathBuf;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

use common::{INFILL, Process, fails, run, text, wait_until};
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

/// Size of the disks, in bytes.
const DISK_BYTES: u64 = 8 << 20;
/// A rate at which no stream of these tests ends, in bytes per second.
const SLOW: u64 = 64 << 10;

/// A directory with a base, an overlay over it, and a state.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        let data: Vec<u8> = (0..DISK_BYTES).map(|at| (at / 4096 + at / 7 + 1) as u8).collect();
        std::fs::write(place.path("base.raw"), &data).unwrap();
        std::fs::write(place.path("aside.raw"), &data).unwrap();
        let (base, top) = (place.path("base.raw"), place.path("top.qcow2"));
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "raw", text(&top)]);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a daemon with the state, and `options` behind that.
    fn start(&self, options: &[&str]) -> (Daemon, Qmp) {
        let state = self.path("state");
        let daemon =
            Daemon::start(Program::Infill, self.dir.path(), &[&["--state", text(&state)], options].concat());
        let qmp = daemon.connect();
        (daemon, qmp)
    }

    /// What a daemon with that state says that does not start.
    fn refused(&self, options: &[&str]) -> String {
        let state = self.path("state");
        fails(INFILL, &[&["daemon", "--state", text(&state)], options].concat())
    }

    /// The overlay with its backing defined in place.
    fn overlay(&self) -> Value {
        json!({
            "driver": "qcow2", "node-name": "top",
            "file": {"driver": "file", "filename": self.path("top.qcow2")},
            "backing": {"driver": "raw", "node-name": "base",
                        "file": {"driver": "file", "filename": self.path("base.raw")}},
        })
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", text(&self.path("nbd.sock")))
    }

    /// Adds the overlay and exports it as `disk`.
    fn serve(&self, qmp: &mut Qmp) {
        qmp.run("blockdev-add", self.overlay());
        let address = json!({"type": "unix", "data": {"path": self.path("nbd.sock")}});
        qmp.run("nbd-server-start", json!({"addr": address}));
        let export = json!({"type": "nbd", "id": "e0", "node-name": "top", "name": "disk", "writable": true});
        qmp.run("block-export-add", export);
    }

    /// Copies the export, which must read as the base did.
    fn reads_as_the_base(&self) {
        let copy = self.path("copy");
        run("nbdcopy", &[&self.uri(), text(&copy)]);
        assert!(std::fs::read(&copy).unwrap() == std::fs::read(self.path("aside.raw")).unwrap());
    }
}

/// Everything that a manager can ask about.
fn seen(qmp: &mut Qmp) -> Vec<Value> {
    let mut jobs = qmp.run("query-block-jobs", json!({}));
    // How far a job is may have changed, and whether it does something at this instant.
    for job in jobs.as_array_mut().unwrap() {
        ["offset", "len", "busy", "__infill_durable"].iter().for_each(|key| drop(job[*key].take()));
    }
    let mut nodes = qmp.run("query-named-block-nodes", json!({"flat": true}));
    for node in nodes.as_array_mut().unwrap() {
        // The names of nodes without one are made up, and sizes on the disk change.
        if node["node-name"].as_str().unwrap().starts_with('#') {
            node["node-name"].take();
        }
        drop(node["image"].take());
    }
    vec![nodes, qmp.run("query-block-exports", json!({})), jobs]
}

fn event_of(qmp: &mut Qmp, name: &str, job: &str) -> Value {
    qmp.event(|event| event["event"] == name && event["data"]["device"] == job)
}

#[test]
fn nodes_exports_and_jobs_are_there_again_after_a_kill() {
    let place = Place::new();
    let (daemon, mut qmp) = place.start(&[]);
    qmp.run("object-add", json!({"qom-type": "iothread", "id": "t0"}));
    qmp.run("blockdev-add", json!({"driver": "null-co", "node-name": "gone", "size": 65536}));
    place.serve(&mut qmp);
    qmp.run("blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": 65536}));
    let export = json!({"type": "nbd", "id": "e1", "node-name": "n", "iothread": "t0", "description": "d"});
    qmp.run("block-export-add", export);
    qmp.run("block-export-add", json!({"type": "nbd", "id": "e2", "node-name": "gone"}));
    qmp.run("block-export-del", json!({"id": "e2"}));
    qmp.run("blockdev-del", json!({"node-name": "gone"}));
    qmp.run(
        "block-stream",
        json!({"job-id": "j0", "device": "top", "speed": SLOW * 4, "auto-dismiss": false}),
    );
    qmp.run("block-job-set-speed", json!({"device": "j0", "speed": SLOW}));
    qmp.run("job-pause", json!({"id": "j0"}));
    qmp.wait_for_status("paused");
    run("qemu-io", &["-f", "raw", "-c", "write -P 9 1M 64k", "-c", "flush", &place.uri()]);
    let before = seen(&mut qmp);
    daemon.process.kill();
    let (daemon, mut qmp) = place.start(&[]);
    assert_eq!(seen(&mut qmp), before);
    let entries = qmp.run("__infill_query-state", json!({}))["entries"].clone();
    let names: Vec<_> = entries.as_array().unwrap().iter().map(|entry| entry["name"].clone()).collect();
    assert_eq!(names, ["t0", "top", "", "e0", "n", "e1", "j0"]);
    assert!(entries.as_array().unwrap().iter().all(|entry| entry.get("held").is_none()), "{entries}");
    run("qemu-io", &["-f", "raw", "-c", "read -P 9 1M 64k", &place.uri()]);
    // It is the job that it was: it goes on, and ends.
    qmp.run("block-job-set-speed", json!({"device": "j0", "speed": 0}));
    qmp.run("job-resume", json!({"id": "j0"}));
    let completed = event_of(&mut qmp, "BLOCK_JOB_COMPLETED", "j0");
    assert!(completed["data"].get("error").is_none(), "{completed}");
    daemon.quit(&mut qmp);
}

#[test]
fn a_client_that_reconnects_goes_on_with_a_daemon_that_was_killed() {
    let place = Place::new();
    let (daemon, mut qmp) = place.start(&[]);
    place.serve(&mut qmp);
    let disk = json!({
        "driver": "nbd", "export": "disk", "reconnect-delay": 60,
        "server": {"type": "unix", "path": place.path("nbd.sock")},
    });
    let mut client = Client::start(&format!("json:{disk}"));
    client.ask("write -f -P 1 0 64k", "wrote 65536");
    daemon.process.kill();
    // Sent to nobody: it waits until somebody is there again.
    client.send("write -P 2 64k 64k");
    let (daemon, mut qmp) = place.start(&[]);
    client.wait("wrote 65536");
    client.ask("read -P 1 0 64k", "read 65536");
    client.ask("read -P 2 64k 64k", "read 65536");
    drop(client);
    daemon.quit(&mut qmp);
}

/// A qemu-io that takes commands: one at a time, for it overlooks a second one that has come with the first.
struct Client {
    _process: Process,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Client {
    fn start(disk: &str) -> Client {
        let mut command = Command::new("qemu-io");
        // Answers are to be seen as they come.
        command.args(["-t", "writeback", disk]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("qemu-io runs: `cargo xtask test --install` installs it");
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Client { _process: Process(child), input, output }
    }

    fn send(&mut self, command: &str) {
        writeln!(self.input, "{command}").unwrap();
    }

    fn wait(&mut self, answer: &str) {
        let mut line = String::new();
        while !line.contains(answer) {
            line.clear();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the client ended");
            assert!(!line.contains("failed"), "{line}");
        }
    }

    fn ask(&mut self, command: &str, answer: &str) {
        self.send(command);
        self.wait(answer);
    }
}

#[test]
fn the_same_command_line_starts_again_and_another_one_is_refused() {
    let place = Place::new();
    let node = place.overlay().to_string();
    let server = format!("addr.type=unix,addr.path={}", text(&place.path("nbd.sock")));
    let options = [
        "--blockdev",
        &node,
        "--object",
        "iothread,id=t",
        "--nbd-server",
        &server,
        "--export",
        "nbd,id=e0,node-name=top,name=disk,writable=on",
    ];
    let (daemon, mut qmp) = place.start(&options);
    let before = seen(&mut qmp);
    daemon.process.kill();
    let (daemon, mut qmp) = place.start(&options);
    assert_eq!(seen(&mut qmp), before);
    place.reads_as_the_base();
    // What the command line does not name is there all the same, and the same thing may be said in other words.
    daemon.process.kill();
    let (daemon, mut qmp) = place.start(&[
        "--export",
        r#"{"type": "nbd", "id": "e0", "node-name": "top", "name": "disk", "writable": true}"#,
    ]);
    assert_eq!(seen(&mut qmp), before);
    daemon.quit(&mut qmp);
    for (option, text, named) in [
        ("--export", "nbd,id=e0,node-name=top,name=disk", "export 'e0'"),
        ("--blockdev", "null-co,node-name=top", "node 'top'"),
        ("--nbd-server", "addr.type=unix,addr.path=/nowhere/else", "the NBD server"),
    ] {
        let why = place.refused(&[option, text]);
        let told = [named, "is kept in", "with other options", "--forget"];
        assert!(told.iter().all(|part| why.contains(part)), "{why}");
    }
    let (daemon, mut qmp) = place.start(&["--forget"]);
    assert_eq!(seen(&mut qmp), [json!([]), json!([]), json!([])]);
    daemon.quit(&mut qmp);
    let (daemon, mut qmp) = place.start(&[]);
    assert_eq!(qmp.run("__infill_query-state", json!({}))["entries"], json!([]));
    daemon.quit(&mut qmp);
}

#[test]
fn a_second_daemon_on_the_same_state_is_refused() {
    let place = Place::new();
    let (daemon, mut qmp) = place.start(&[]);
    let why = place.refused(&[]);
    let process = format!("process {}", daemon.process.id());
    assert!(why.contains("in use by another daemon") && why.contains(&process), "{why}");
    qmp.run("blockdev-add", json!({"driver": "null-co", "node-name": "n"}));
    daemon.process.kill();
    let (daemon, mut qmp) = place.start(&[]);
    daemon.quit(&mut qmp);
}

#[test]
fn a_state_that_is_damaged_or_of_another_version_is_refused_and_left_as_it_is() {
    let place = Place::new();
    let (daemon, mut qmp) = place.start(&[]);
    place.serve(&mut qmp);
    daemon.quit(&mut qmp);
    let file = place.path("state").join("state.redb");
    let sound = std::fs::read(&file).unwrap();
    let mut torn = sound.clone();
    torn.iter_mut().skip(64).step_by(97).for_each(|byte| *byte ^= 0x55);
    for (damaged, told) in
        [(torn, "is damaged"), (sound[..sound.len() / 2].to_vec(), "is damaged"), (vec![], "is empty")]
    {
        std::fs::write(&file, &damaged).unwrap();
        // Not even by being told to forget it: it may be of use to somebody.
        for options in [&[][..], &["--forget"]] {
            let why = place.refused(options);
            assert!(why.contains(told) && why.contains("left in place"), "{why}");
            assert_eq!(std::fs::metadata(&file).unwrap().len(), damaged.len() as u64);
        }
    }
    std::fs::write(&file, &sound).unwrap();
    {
        let database = redb::Database::open(&file).unwrap();
        let meta: redb::TableDefinition<&str, u64> = redb::TableDefinition::new("meta");
        let transaction = database.begin_write().unwrap();
        transaction.open_table(meta).unwrap().insert("schema", 99).unwrap();
        transaction.commit().unwrap();
    }
    let why = place.refused(&[]);
    assert!(why.contains("has schema 99") && why.contains("knows schema 4"), "{why}");
    std::fs::write(&file, &sound).unwrap();
    let (daemon, mut qmp) = place.start(&[]);
    place.reads_as_the_base();
    daemon.quit(&mut qmp);
}

#[test]
fn a_daemon_comes_up_without_a_file_and_goes_on_when_it_is_back() {
    let place = Place::new();
    let (daemon, mut qmp) = place.start(&[]);
    place.serve(&mut qmp);
    qmp.run("block-stream", json!({"job-id": "j0", "device": "top", "speed": SLOW}));
    daemon.process.kill();
    std::fs::rename(place.path("base.raw"), place.path("away")).unwrap();
    let (daemon, mut qmp) = place.start(&[]);
    let entries = qmp.run("__infill_query-state", json!({}))["entries"].clone();
    let held = |name: &str| {
        let entry = entries.as_array().unwrap().iter().find(|entry| entry["name"] == name);
        entry.unwrap().get("held").map(|why| why.as_str().unwrap().to_owned())
    };
    assert!(held("top").unwrap().contains("base.raw"), "{entries}");
    assert!(held("").is_none(), "the NBD server needs no node: {entries}");
    let told = held("e0").unwrap();
    assert!(told.contains("node-name='top'"), "{told}");
    let exports = qmp.run("query-block-exports", json!({}));
    assert!(exports[0]["id"] == "e0" && exports[0]["__infill_held"] == json!(told), "{exports}");
    let jobs = qmp.run("query-block-jobs", json!({}));
    assert!(jobs[0]["device"] == "j0" && jobs[0]["status"] == "created", "{jobs}");
    // Managers may say what they like of a job that has not begun.
    qmp.run("block-job-pause", json!({"device": "j0"}));
    qmp.refused("job-dismiss", json!({"id": "j0"}));
    fails("nbdinfo", &["--size", &place.uri()]);
    std::fs::rename(place.path("away"), place.path("base.raw")).unwrap();
    qmp.event(|event| event["event"] == "__INFILL_RESTORED" && event["data"]["name"] == "e0");
    qmp.wait_for_status("paused");
    place.reads_as_the_base();
    assert_eq!(qmp.run("query-block-jobs", json!({}))[0]["speed"], json!(SLOW));
    daemon.quit(&mut qmp);
}

#[test]
fn what_is_held_can_be_taken_away_or_made_otherwise() {
    let place = Place::new();
    let (daemon, mut qmp) = place.start(&[]);
    place.serve(&mut qmp);
    qmp.run("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "base", "read-only": true}));
    qmp.run("block-stream", json!({"job-id": "j0", "device": "top", "speed": SLOW}));
    daemon.process.kill();
    std::fs::rename(place.path("base.raw"), place.path("away")).unwrap();
    let (daemon, mut qmp) = place.start(&[]);
    qmp.run("job-cancel", json!({"id": "j0"}));
    qmp.run("blockdev-del", json!({"node-name": "r"}));
    assert_eq!(qmp.run("query-jobs", json!({})), json!([]));
    // The manager knows where the base has gone to.
    let mut node = place.overlay();
    node["backing"]["file"]["filename"] = json!(place.path("away"));
    qmp.run("blockdev-add", node);
    qmp.event(|event| event["event"] == "__INFILL_RESTORED" && event["data"]["name"] == "e0");
    daemon.process.kill();
    let (daemon, mut qmp) = place.start(&[]);
    place.reads_as_the_base();
    let entries = qmp.run("__infill_query-state", json!({}))["entries"].clone();
    let names: Vec<_> = entries.as_array().unwrap().iter().map(|entry| entry["name"].clone()).collect();
    assert_eq!(names, ["top", "", "e0"]);
    daemon.quit(&mut qmp);
}

#[test]
fn after_completed_the_job_and_the_backing_are_gone_for_good() {
    let place = Place::new();
    let (daemon, mut qmp) = place.start(&[]);
    place.serve(&mut qmp);
    qmp.run("block-stream", json!({"job-id": "j0", "device": "top"}));
    let completed = event_of(&mut qmp, "BLOCK_JOB_COMPLETED", "j0");
    assert!(completed["data"].get("error").is_none(), "{completed}");
    daemon.process.kill();
    // Whoever was told so may delete the source.
    std::fs::remove_file(place.path("base.raw")).unwrap();
    let (daemon, mut qmp) = place.start(&[]);
    assert_eq!(qmp.run("query-jobs", json!({})), json!([]));
    place.reads_as_the_base();
    daemon.quit(&mut qmp);
}

#[test]
fn a_stream_into_the_middle_leaves_the_base_that_was_described_in_place() {
    let place = Place::new();
    let (top, middle) = (place.path("top.qcow2"), place.path("middle.qcow2"));
    std::fs::rename(&top, &middle).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", text(&middle), "-F", "qcow2", text(&top)]);
    let mut node = place.overlay();
    let base = node["backing"].take();
    node["backing"] = json!({"driver": "qcow2", "node-name": "middle", "backing": base,
                             "file": {"driver": "file", "filename": middle}});
    let (daemon, mut qmp) = place.start(&[]);
    // Under a filter, whose child it is.
    let filter = json!({"driver": "copy-on-read", "node-name": "filter", "file": node});
    qmp.run("blockdev-add", filter);
    qmp.run("block-stream", json!({"job-id": "j0", "device": "top", "base-node": "base"}));
    event_of(&mut qmp, "BLOCK_JOB_COMPLETED", "j0");
    daemon.process.kill();
    std::fs::remove_file(&middle).unwrap();
    let (daemon, mut qmp) = place.start(&[]);
    let nodes = qmp.run("query-named-block-nodes", json!({"flat": true}));
    let names: Vec<_> =
        nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap()).collect();
    assert!(["filter", "top", "base"].iter().all(|name| names.contains(name)), "{names:?}");
    assert!(!names.contains(&"middle"), "{names:?}");
    daemon.quit(&mut qmp);
}

#[test]
fn a_job_that_is_over_is_dismissed_once_and_one_that_was_cancelled_stays_away() {
    let place = Place::new();
    let (daemon, mut qmp) = place.start(&[]);
    place.serve(&mut qmp);
    qmp.run("blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": 65536}));
    qmp.run("block-stream", json!({"job-id": "done", "device": "n", "auto-dismiss": false}));
    qmp.wait_for_status("concluded");
    qmp.run("block-stream", json!({"job-id": "j0", "device": "top", "speed": SLOW}));
    qmp.run("job-cancel", json!({"id": "j0"}));
    daemon.process.kill();
    let (daemon, mut qmp) = place.start(&[]);
    let jobs = qmp.run("query-jobs", json!({}));
    assert!(jobs[0]["id"] == "done" && jobs[0]["status"] == "concluded", "{jobs}");
    assert_eq!(jobs.as_array().unwrap().len(), 1, "{jobs}");
    qmp.run("block-stream", json!({"job-id": "j1", "device": "top", "speed": SLOW, "auto-dismiss": false}));
    qmp.run("block-job-cancel", json!({"device": "j1"}));
    qmp.run("job-dismiss", json!({"id": "done"}));
    daemon.process.kill();
    let (daemon, mut qmp) = place.start(&[]);
    let jobs = qmp.run("query-jobs", json!({}));
    assert!(jobs[0]["id"] == "j1" && jobs[0]["error"] == "the job was cancelled", "{jobs}");
    assert_eq!(jobs.as_array().unwrap().len(), 1, "{jobs}");
    qmp.run("job-dismiss", json!({"id": "j1"}));
    daemon.quit(&mut qmp);
}

#[test]
fn a_job_that_waits_for_its_manager_waits_again_and_one_that_was_told_goes_on() {
    let place = Place::new();
    let (daemon, mut qmp) = place.start(&[]);
    place.serve(&mut qmp);
    qmp.run("block-stream", json!({"job-id": "j0", "device": "top", "auto-finalize": false}));
    qmp.wait_for("BLOCK_JOB_PENDING");
    daemon.process.kill();
    let (daemon, mut qmp) = place.start(&[]);
    wait_until("the job waits", || qmp.run("query-jobs", json!({}))[0]["status"] == "pending");
    qmp.run("job-finalize", json!({"id": "j0"}));
    daemon.process.kill();
    let (daemon, mut qmp) = place.start(&[]);
    wait_until("the job ends", || qmp.run("query-jobs", json!({})) == json!([]));
    place.reads_as_the_base();
    daemon.quit(&mut qmp);
}

#[test]
fn an_end_in_order_keeps_jobs_without_a_word_of_cancel() {
    let place = Place::new();
    for by_quit in [false, true] {
        let (mut daemon, mut qmp) = place.start(&[]);
        if !by_quit {
            place.serve(&mut qmp);
            qmp.run("block-stream", json!({"job-id": "j0", "device": "top", "speed": SLOW}));
        }
        assert_eq!(qmp.run("query-jobs", json!({}))[0]["status"], "running");
        if by_quit {
            qmp.run("quit", json!({}));
        } else {
            daemon.process.signal("TERM");
        }
        while let Some(message) = qmp.message() {
            let name = message["event"].as_str().unwrap_or_default();
            assert!(!name.starts_with("BLOCK_JOB_") && name != "JOB_STATUS_CHANGE", "{message}");
        }
        daemon.process.wait_for_success();
    }
    let (daemon, mut qmp) = place.start(&[]);
    qmp.run("block-job-set-speed", json!({"device": "j0", "speed": 0}));
    event_of(&mut qmp, "BLOCK_JOB_COMPLETED", "j0");
    place.reads_as_the_base();
    daemon.quit(&mut qmp);
}

#[test]
fn an_export_comes_back_without_a_bitmap_that_was_in_memory() {
    let place = Place::new();
    let (daemon, mut qmp) = place.start(&[]);
    place.serve(&mut qmp);
    qmp.run("block-dirty-bitmap-add", json!({"node": "top", "name": "b0"}));
    let export = json!({"type": "nbd", "id": "e1", "node-name": "top", "name": "b", "bitmaps": ["b0"]});
    qmp.run("block-dirty-bitmap-disable", json!({"node": "top", "name": "b0"}));
    qmp.run("block-export-add", export);
    daemon.process.kill();
    let (daemon, mut qmp) = place.start(&[]);
    let entries = qmp.run("__infill_query-state", json!({}))["entries"].clone();
    assert!(entries.as_array().unwrap().iter().all(|entry| entry.get("held").is_none()), "{entries}");
    run("nbdinfo", &["--size", &format!("nbd+unix:///b?socket={}", text(&place.path("nbd.sock")))]);
    daemon.quit(&mut qmp);
}

#[test]
fn a_name_that_was_made_up_is_not_kept() {
    let place = Place::new();
    let (daemon, mut qmp) = place.start(&[]);
    qmp.run("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": {"driver": "null-co"}}));
    let nodes = qmp.run("query-named-block-nodes", json!({"flat": true}));
    let mut names = nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap());
    let made_up = names.find(|name| name.starts_with('#')).unwrap();
    let why = qmp.refused("blockdev-add", json!({"driver": "raw", "node-name": "s", "file": made_up}));
    assert!(why["desc"].as_str().unwrap().contains("has another one after a restart"), "{why}");
    daemon.quit(&mut qmp);
}

#[test]
fn the_service_manager_is_told_of_the_beginning_and_the_end() {
    let place = Place::new();
    let socket = place.path("notify");
    let told = std::os::unix::net::UnixDatagram::bind(&socket).unwrap();
    told.set_read_timeout(Some(common::SERVER_LIMIT)).unwrap();
    let state = place.path("state");
    let mut command = Command::new(INFILL);
    command.args(["daemon", "--state", text(&state)]).env("NOTIFY_SOCKET", &socket);
    let mut daemon = Process::start(&mut command);
    let mut message = [0; 256];
    let mut next = || {
        let len = told.recv(&mut message).expect("a message in time");
        String::from_utf8_lossy(&message[..len]).into_owned()
    };
    assert_eq!(next(), "READY=1\n");
    daemon.signal("TERM");
    assert_eq!(next(), "STOPPING=1\n");
    daemon.wait_for_success();
}

/// A socket that a service manager passes (`LISTEN_FDS`: the first is descriptor 3) outlives the daemon, and so do the
/// clients that wait at it.
#[test]
fn a_client_waits_at_a_passed_socket_for_the_next_daemon() {
    let place = Place::new();
    let state = place.path("state");
    let socket = place.path("nbd.sock");
    let starter = "\
import os, socket, subprocess, sys\n\
listener = socket.socket(socket.AF_UNIX); listener.bind(sys.argv[1]); listener.listen()\n\
os.dup2(listener.fileno(), 3); os.set_inheritable(3, True)\n\
command = sys.argv[2:]\n\
first = subprocess.Popen(command, close_fds=False, stdin=subprocess.DEVNULL)\n\
print(first.pid, flush=True)\n\
first.wait()\n\
second = subprocess.Popen(command, close_fds=False, stdin=subprocess.DEVNULL)\n\
print(second.pid, flush=True)\n\
second.wait()\n";
    let export = "nbd,id=e,node-name=top,name=disk";
    let node = place.overlay().to_string();
    let mut command = Command::new("python3");
    command.args(["-c", starter, text(&socket), INFILL, "daemon", "--state", text(&state)]);
    command.args(["--nbd-server", "addr.type=fd,addr.str=3", "--blockdev", &node, "--export", export]);
    command.stdout(Stdio::piped());
    let mut starter = Process::start(&mut command);
    let mut told = BufReader::new(starter.0.stdout.take().unwrap());
    let mut line = String::new();
    told.read_line(&mut line).unwrap();
    place.reads_as_the_base();
    run("kill", &["-9", line.trim()]);
    // Whoever comes now is in the socket's queue.
    place.reads_as_the_base();
    line.clear();
    told.read_line(&mut line).unwrap();
    run("kill", &["-TERM", line.trim()]);
    starter.wait_for_success();
    let mut rest = String::new();
    told.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "");
}
