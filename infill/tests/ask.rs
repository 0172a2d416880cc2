//! The commands that ask a running daemon, judged by its monitor and by qemu-img.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use common::{INFILL, Process, fails, run, text, wait_until};
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

const SIZE: usize = 4 << 20;

struct Scene {
    dir: tempfile::TempDir,
    daemon: Daemon,
    qmp: Qmp,
}

impl Scene {
    /// base.raw under top.qcow2, which holds something, and an empty copy.qcow2.
    fn new() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| text(&dir.path().join(name)).to_owned();
        std::fs::write(path("base"), vec![0x11; SIZE]).unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &path("base"), "-F", "raw", &path("top")]);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 0x77 1M 64k", &path("top")]);
        run("qemu-img", &["create", "-q", "-f", "qcow2", &path("copy"), &SIZE.to_string()]);
        let daemon = Daemon::start(Program::Infill, dir.path(), &[]);
        let mut qmp = daemon.connect();
        let file = |name: &str| json!({"driver": "file", "filename": path(name)});
        for node in [
            json!({"driver": "raw", "node-name": "base", "file": file("base")}),
            json!({"driver": "qcow2", "node-name": "top", "backing": "base", "file": file("top")}),
            json!({"driver": "qcow2", "node-name": "copy", "file": file("copy")}),
        ] {
            qmp.run("blockdev-add", node);
        }
        Scene { dir, daemon, qmp }
    }

    fn asked<'a>(&'a self, args: &[&'a str]) -> Vec<&'a str> {
        [args, &["--socket", text(&self.daemon.socket)]].concat()
    }

    fn ask(&self, args: &[&str]) -> String {
        run(INFILL, &self.asked(args))
    }

    fn refused(&self, args: &[&str]) -> String {
        fails(INFILL, &self.asked(args))
    }

    /// Ends the daemon; what the disk in that file holds then.
    fn quit_and_read(mut self, name: &str, format: &str) -> Vec<u8> {
        self.daemon.quit(&mut self.qmp);
        let path = |name: &str| text(&self.dir.path().join(name)).to_owned();
        run("qemu-img", &["convert", "-f", format, "-O", "raw", &path(name), &path("out")]);
        std::fs::read(path("out")).unwrap()
    }
}

fn expected() -> Vec<u8> {
    let mut disk = vec![0x11; SIZE];
    disk[1 << 20..(1 << 20) + 65536].fill(0x77);
    disk
}

#[test]
fn a_commit_that_is_to_complete_is_over_when_the_command_is() {
    let mut scene = Scene::new();
    scene.ask(&["commit", "top", "--complete"]);
    assert_eq!(scene.qmp.run("query-jobs", json!({})), json!([]));
    assert!(scene.quit_and_read("base", "raw") == expected());
}

#[test]
fn a_mirror_stops_when_it_is_ready_and_goes_on_when_told() {
    let scene = Scene::new();
    scene.ask(&["mirror", "top", "copy"]);
    let jobs: Value = serde_json::from_str(&scene.ask(&["jobs", "--output=json"])).unwrap();
    assert_eq!((&jobs[0]["id"], &jobs[0]["status"]), (&json!("mirror-top"), &json!("ready")));
    assert!(scene.ask(&["jobs"]).starts_with("mirror-top\tmirror\tready\t"));
    scene.ask(&["complete", "mirror-top"]);
    assert_eq!(scene.ask(&["jobs"]), "");
    assert!(scene.quit_and_read("copy", "qcow2") == expected());
}

#[test]
fn a_mirror_that_is_ended_and_keeps_its_copy_leaves_the_guest_where_it_is() {
    let mut scene = Scene::new();
    scene.ask(&["mirror", "top", "copy", "--speed", "64k", "--detach"]);
    let early = scene.refused(&["cancel", "mirror-top", "--keep-copy"]);
    assert!(early.contains("only a mirror that is ready"), "{early}");
    scene.ask(&["cancel", "mirror-top"]);
    scene.ask(&["mirror", "top", "copy"]);
    scene.ask(&["cancel", "mirror-top", "--keep-copy"]);
    assert_eq!(scene.ask(&["jobs"]), "");
    let event = scene.qmp.event(|event| event["event"] == "BLOCK_JOB_COMPLETED");
    assert_eq!(event["data"]["type"], "mirror");
    assert!(scene.quit_and_read("copy", "qcow2") == expected());
}

#[test]
fn a_stream_of_a_daemons_node_is_asked_for_like_any_other_job() {
    let mut scene = Scene::new();
    scene.ask(&["stream", "--node", "top", "--speed", "64k", "--detach"]);
    assert_eq!(scene.qmp.run("query-jobs", json!({}))[0]["id"], "stream-top");
    scene.ask(&["cancel", "stream-top"]);
    scene.ask(&["stream", "--node", "top", "--job-id", "s"]);
    assert_eq!(scene.qmp.run("query-jobs", json!({})), json!([]));
    assert!(scene.refused(&["stream", "--node", "nobody"]).contains("nobody"));
    assert!(fails(INFILL, &["stream"]).contains("IMAGE"));
    assert!(scene.quit_and_read("top", "qcow2") == expected());
}

#[test]
fn a_stream_has_a_floor_and_a_time_to_be_done_by_and_tells_what_is_left() {
    let mut scene = Scene::new();
    let outlook = ["--min-rate", "1M", "--finish-in", "2h"];
    scene.ask(&[&["stream", "--node", "top", "--speed", "64k", "--detach"][..], &outlook].concat());
    let mut job = Value::Null;
    wait_until("its end is foreseen", || {
        job = scene.qmp.run("query-block-jobs", json!({}))[0].clone();
        job["__infill_seconds-left"].is_u64()
    });
    let number = |key: &str| job[key].as_u64().unwrap_or_else(|| panic!("{key}: {job}"));
    assert_eq!(number("__infill_remaining"), number("len") - number("offset"), "{job}");
    assert_eq!(number("__infill_at-risk"), number("len") - number("__infill_durable"), "{job}");
    let progress = scene.qmp.wait_for("__INFILL_JOB_PROGRESS");
    let told = |key: &str| progress["data"][key].as_u64().unwrap_or_else(|| panic!("{key}: {progress}"));
    assert_eq!(told("remaining"), told("len") - told("offset"), "{progress}");
    assert_eq!(told("at-risk"), told("len") - told("durable"), "{progress}");
    scene.ask(&["cancel", "stream-top"]);
    for (key, value) in [("__infill_min-rate", json!(-1)), ("__infill_finish-by", json!("soon"))] {
        let error = scene.qmp.refused("block-stream", json!({"job-id": "s", "device": "top", key: value}));
        assert!(error["desc"].as_str().is_some_and(|why| why.contains(key)), "{error}");
    }
    assert!(scene.refused(&["stream", "--node", "top", "--finish-in", "soon"]).contains("as in 30m"));
    scene.ask(&[&["stream", "--node", "top"][..], &outlook].concat());
    assert!(scene.quit_and_read("top", "qcow2") == expected());
}

#[test]
fn top_tells_what_disks_and_jobs_do_between_two_looks() {
    let mut scene = Scene::new();
    let socket = scene.dir.path().join("nbd.sock");
    scene.qmp.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
    scene
        .qmp
        .run("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "top", "writable": true}));
    scene.ask(&["backup", "top", "copy", "--speed", "64k", "--detach", "--job-id", "b"]);
    // The first look begins the count.
    scene.ask(&["top", "--once", "--output=json"]);
    let mut top = std::process::Command::new(INFILL);
    top.args(scene.asked(&["top", "--output=json"])).stdout(std::process::Stdio::piped());
    let mut top = Process::start(&mut top);
    let uri = format!("nbd+unix:///top?socket={}", text(&socket));
    let lines = std::io::BufRead::lines(std::io::BufReader::new(top.0.stdout.take().unwrap()));
    let mut looks = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    // Written until a look has seen it.
    let busy = loop {
        run("qemu-io", &["-f", "raw", "-c", "write -P 1 0 1M", &uri]);
        let look = looks.next().unwrap();
        let node = look["nodes"].as_array().unwrap().iter().find(|node| node["node-name"] == "top").cloned();
        let node = node.unwrap();
        if node["written-bytes-per-second"].as_u64().unwrap() > 0 {
            assert_eq!(look["jobs"][0]["device"], "b");
            break node;
        }
    };
    assert_eq!(busy["exported"], true);
    assert!(busy["write"]["requests-per-second"].as_f64().unwrap() > 0.0, "{busy}");
    assert!(busy["write"]["mean-micros"].as_u64().unwrap() > 0, "{busy}");
    let table = scene.ask(&["top", "--once"]);
    assert!(table.starts_with("DISK") && table.contains("\ntop ") && table.contains("\nb "), "{table}");
    assert!(!table.contains('\u{1b}'), "no control codes where there is no terminal");
    scene.ask(&["cancel", "b"]);
}

#[test]
fn a_backup_holds_the_disk_when_the_command_is_over() {
    let scene = Scene::new();
    scene.ask(&["backup", "top", "copy"]);
    assert!(scene.quit_and_read("copy", "qcow2") == expected());
}

#[test]
fn a_job_is_left_running_paused_resumed_and_cancelled() {
    let mut scene = Scene::new();
    scene.ask(&["backup", "top", "copy", "--speed", "64k", "--detach", "--job-id", "b"]);
    scene.ask(&["pause", "b"]);
    let status = |qmp: &mut Qmp| qmp.run("query-jobs", json!({}))[0]["status"].clone();
    wait_until("the job is paused", || status(&mut scene.qmp) == "paused");
    scene.ask(&["resume", "b"]);
    wait_until("the job goes on", || status(&mut scene.qmp) == "running");
    scene.ask(&["cancel", "b"]);
    assert_eq!(scene.qmp.run("query-jobs", json!({})), json!([]));
}

#[test]
fn who_interrupts_a_command_leaves_its_job_running() {
    let mut scene = Scene::new();
    let mut command = std::process::Command::new(INFILL);
    let args = scene.asked(&["backup", "top", "copy", "--speed", "64k", "--job-id", "b"]);
    let mut process = Process::start(command.args(args));
    wait_until("the job runs", || scene.qmp.run("query-jobs", json!({}))[0]["id"] == "b");
    process.signal("INT");
    assert!(!process.0.wait().unwrap().success());
    assert_eq!(scene.qmp.run("query-jobs", json!({}))[0]["id"], "b");
    scene.ask(&["cancel", "b"]);
}

#[test]
fn what_the_daemon_refuses_is_told_with_its_reason() {
    let scene = Scene::new();
    assert!(scene.refused(&["mirror", "top", "nowhere"]).contains("nowhere"));
    assert!(scene.refused(&["commit", "nowhere"]).contains("nowhere"));
    assert!(scene.refused(&["cancel", "nothing"]).contains("infill jobs"));
    assert!(scene.refused(&["backup", "top", "copy", "--sync", "half"]).contains("half"));
    assert!(fails("env", &["-u", "INFILL_SOCKET", INFILL, "jobs"]).contains("--socket PATH"));
    run("env", &[&format!("INFILL_SOCKET={}", text(&scene.daemon.socket)), INFILL, "jobs"]);
}

#[test]
fn the_name_it_is_called_by_makes_it_a_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().join("qemu-storage-daemon");
    std::os::unix::fs::symlink(INFILL, &name).unwrap();
    let help = run(INFILL, &["daemon", "--help"]);
    assert!(help.contains("--chardev"));
    assert_eq!(run(text(&name), &["--help"]), help);
    assert_eq!(run(INFILL, &["qemu-storage-daemon", "--help"]), help);
}
