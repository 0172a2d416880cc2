//! Mirror and commit under a client that writes all the time, judged by the competitor's tools.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::io::{BufRead as _, BufReader};
use std::path::Path;

use common::{Process, run, text, wait_until};
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

const BLOCKS: u64 = 2048;

/// Writes numbered blocks in an order of its own until a file appears, flushing now and then; then says how many it wrote.
const WRITER: &str = r#"
import os, struct
h.connect_uri(os.environ["URI"])
n = 0
blocks = h.get_size() // 4096
print("ready", flush=True)
while not os.path.exists(os.environ["END"]):
    for _ in range(16):
        at = (n * 7 % blocks) * 4096
        h.pwrite(struct.pack(">Q", n) * 512, at)
        n += 1
    assert struct.unpack(">Q", h.pread(8, (n - 1) * 7 % blocks * 4096))[0] == n - 1
    if n % 64 == 0: h.flush()
h.flush()
print(n, flush=True)
"#;

/// The disk after so many writes of the writer, on what it began with.
fn expected(begin: &[u8], turns: u64) -> Vec<u8> {
    let mut disk = begin.to_vec();
    for turn in turns.saturating_sub(BLOCKS)..turns {
        let at = (turn * 7 % BLOCKS * 4096) as usize;
        disk[at..at + 4096].copy_from_slice(&turn.to_be_bytes().repeat(512));
    }
    disk
}

struct Writer {
    process: Process,
    told: std::io::Lines<BufReader<std::process::ChildStdout>>,
    end: std::path::PathBuf,
}

impl Writer {
    fn start(dir: &Path, uri: &str) -> Writer {
        let end = dir.join("end");
        let mut command = std::process::Command::new("nbdsh");
        command
            .args(["-c", WRITER])
            .env("URI", uri)
            .env("END", &end)
            .env("PATH", format!("/usr/bin:/bin:{}", std::env::var("PATH").unwrap_or_default()))
            .stdout(std::process::Stdio::piped());
        let mut process = Process::start(&mut command);
        let mut told = BufReader::new(process.0.stdout.take().unwrap()).lines();
        assert_eq!(told.next().unwrap().unwrap(), "ready");
        Writer { process, told, end }
    }

    fn end(mut self) -> u64 {
        std::fs::write(&self.end, "").unwrap();
        let turns = self.told.next().unwrap().unwrap().parse().unwrap();
        self.process.wait_for_success();
        turns
    }
}

struct Scene {
    dir: tempfile::TempDir,
    daemon: Daemon,
    qmp: Qmp,
    begin: Vec<u8>,
    uri: String,
}

fn content() -> Vec<u8> {
    (0..BLOCKS * 4096).map(|at| if at / 65536 % 3 == 1 { 0 } else { (at / 4096 + at % 251) as u8 }).collect()
}

/// The options of a daemon that keeps its state.
fn kept(dir: &Path) -> Vec<String> {
    vec!["--state".into(), text(&dir.join("state")).into()]
}

impl Scene {
    /// base.raw under mid.qcow2 under top.qcow2, the top exported and writable.
    fn new(readonly_base: bool) -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| text(&dir.path().join(name)).to_owned();
        let begin = content();
        std::fs::write(path("base"), &begin).unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &path("base"), "-F", "raw", &path("mid")]);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &path("mid"), "-F", "qcow2", &path("top")]);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 77 1M 64k", "-c", "write -z 2M 128k", &path("mid")]);
        let mut begin = begin;
        begin[1 << 20..(1 << 20) + 65536].fill(77);
        begin[2 << 20..(2 << 20) + 131072].fill(0);
        let options = kept(dir.path());
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let daemon = Daemon::start(Program::Infill, dir.path(), if readonly_base { &[] } else { &options });
        let mut qmp = daemon.connect();
        let file = |name: &str| json!({"driver": "file", "filename": path(name)});
        if readonly_base {
            // As it is opened when the headers alone name it.
            qmp.run("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file("top")}));
        } else {
            qmp.run("blockdev-add", json!({"driver": "raw", "node-name": "base", "file": file("base")}));
            for (name, below) in [("mid", "base"), ("top", "mid")] {
                let node =
                    json!({"driver": "qcow2", "node-name": name, "backing": below, "file": file(name)});
                qmp.run("blockdev-add", node);
            }
        }
        let socket = dir.path().join("nbd.sock");
        qmp.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
        let export = json!({"type": "nbd", "id": "e", "node-name": "top", "writable": true, "name": "d"});
        qmp.run("block-export-add", export);
        let uri = format!("nbd+unix:///d?socket={}", text(&socket));
        Scene { dir, daemon, qmp, begin, uri }
    }

    fn path(&self, name: &str) -> String {
        text(&self.dir.path().join(name)).to_owned()
    }

    fn exported(&mut self) -> Value {
        self.qmp.run("query-block-exports", json!({}))[0]["node-name"].clone()
    }

    fn wait_ready(&mut self, id: &str) {
        wait_until("the job is ready", || {
            let jobs = self.qmp.run("query-block-jobs", json!({}));
            jobs.as_array()
                .unwrap()
                .iter()
                .any(|job| job["device"] == json!(id) && job["ready"] == json!(true))
        });
    }

    fn wait_gone(&mut self) {
        wait_until("the job is over", || self.qmp.run("query-jobs", json!({})) == json!([]));
        for event in &self.qmp.seen {
            assert!(
                event["event"] != json!("BLOCK_JOB_COMPLETED") || event["data"].get("error").is_none(),
                "{event}"
            );
        }
    }

    /// `kill -9`, and a daemon that finds its state.
    fn kill_and_restart(self) -> Scene {
        let Scene { dir, daemon, begin, uri, qmp } = self;
        daemon.process.kill();
        drop(qmp);
        let options = kept(dir.path());
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let daemon = Daemon::start(Program::Infill, dir.path(), &options);
        let qmp = daemon.connect();
        Scene { dir, daemon, qmp, begin, uri }
    }

    fn quit(&mut self) {
        self.qmp.run("quit", json!({}));
        self.daemon.process.wait_for_success();
    }

    fn raw_of(&self, name: &str, format: &str) -> Vec<u8> {
        let out = self.path("out.raw");
        run("qemu-img", &["convert", "-f", format, "-O", "raw", &self.path(name), &out]);
        std::fs::read(out).unwrap()
    }
}

#[test]
fn a_mirrored_disk_moves_under_its_writing_client() {
    for mode in ["background", "write-blocking"] {
        let mut scene = Scene::new(false);
        run("qemu-img", &["create", "-q", "-f", "qcow2", &scene.path("copy"), &(BLOCKS * 4096).to_string()]);
        let file = json!({"driver": "file", "filename": scene.path("copy")});
        scene.qmp.run("blockdev-add", json!({"driver": "qcow2", "node-name": "copy", "file": file}));
        let writer = Writer::start(scene.dir.path(), &scene.uri);
        let mirror =
            json!({"job-id": "m", "device": "top", "target": "copy", "sync": "full", "copy-mode": mode});
        scene.qmp.run("blockdev-mirror", mirror);
        scene.wait_ready("m");
        let busy = scene.qmp.refused("blockdev-del", json!({"node-name": "copy"}));
        assert_eq!(busy["class"], json!("GenericError"));
        scene.qmp.run("block-job-complete", json!({"device": "m"}));
        scene.wait_gone();
        assert_eq!(scene.exported(), json!("copy"));
        // Nobody uses the old disk now.
        for node in ["top", "mid", "base"] {
            scene.qmp.run("blockdev-del", json!({"node-name": node}));
        }
        let turns = writer.end();
        scene.quit();
        assert!(
            scene.raw_of("copy", "qcow2") == expected(&scene.begin, turns),
            "after {turns} writes, {mode}"
        );
        run("qemu-img", &["check", "-q", &scene.path("copy")]);
    }
}

#[test]
fn the_active_layer_goes_down_into_its_base_under_a_writing_client() {
    let mut scene = Scene::new(false);
    let writer = Writer::start(scene.dir.path(), &scene.uri);
    scene.qmp.run("block-commit", json!({"job-id": "c", "device": "top"}));
    scene.wait_ready("c");
    scene.qmp.run("block-job-complete", json!({"device": "c"}));
    scene.wait_gone();
    assert_eq!(scene.exported(), json!("base"));
    let turns = writer.end();
    scene.quit();
    let expected = expected(&scene.begin, turns);
    assert!(std::fs::read(scene.path("base")).unwrap() == expected, "the base, after {turns} writes");
    // Whoever opens the old chain sees the same.
    assert!(scene.raw_of("top", "qcow2") == expected, "the old chain");
    run("qemu-img", &["check", "-q", &scene.path("top")]);
}

#[test]
fn a_base_that_only_a_header_names_is_opened_for_writing() {
    let mut scene = Scene::new(true);
    let writer = Writer::start(scene.dir.path(), &scene.uri);
    scene.qmp.run("block-commit", json!({"job-id": "c", "device": "top"}));
    scene.wait_ready("c");
    scene.qmp.run("block-job-complete", json!({"device": "c"}));
    scene.wait_gone();
    let turns = writer.end();
    scene.quit();
    assert!(std::fs::read(scene.path("base")).unwrap() == expected(&scene.begin, turns));
}

#[test]
fn a_layer_between_goes_down_while_a_client_writes_above() {
    let mut scene = Scene::new(false);
    let writer = Writer::start(scene.dir.path(), &scene.uri);
    let commit = json!({"job-id": "c", "device": "top", "top-node": "mid", "base-node": "base"});
    scene.qmp.run("block-commit", commit);
    scene.wait_gone();
    scene.qmp.run("blockdev-del", json!({"node-name": "mid"}));
    let turns = writer.end();
    scene.quit();
    let info: Value =
        serde_json::from_str(&run("qemu-img", &["info", "--output=json", &scene.path("top")])).unwrap();
    assert_eq!(info["backing-filename"], json!(scene.path("base")));
    assert!(scene.raw_of("base", "raw") == scene.begin, "what the middle layer held is in the base");
    assert!(scene.raw_of("top", "qcow2") == expected(&scene.begin, turns));
}

#[test]
fn a_disk_that_has_moved_is_where_it_moved_to_after_a_kill() {
    for how in ["mirror", "commit", "snapshot"] {
        let mut scene = Scene::new(false);
        run("qemu-img", &["create", "-q", "-f", "qcow2", &scene.path("copy"), &(BLOCKS * 4096).to_string()]);
        let file = json!({"driver": "file", "filename": scene.path("copy")});
        let copy = json!({"driver": "qcow2", "node-name": "copy", "file": file, "backing": null});
        scene.qmp.run("blockdev-add", copy);
        let writer = Writer::start(scene.dir.path(), &scene.uri);
        let (moved, node) = match how {
            "mirror" => {
                let mirror = json!({"job-id": "j", "device": "top", "target": "copy", "sync": "full"});
                scene.qmp.run("blockdev-mirror", mirror);
                ("copy", "copy")
            }
            "commit" => {
                scene.qmp.run("block-commit", json!({"job-id": "j", "device": "top"}));
                ("base", "base")
            }
            _ => {
                scene.qmp.run("blockdev-snapshot", json!({"node": "top", "overlay": "copy"}));
                ("copy", "copy")
            }
        };
        if how != "snapshot" {
            scene.wait_ready("j");
            scene.qmp.run("block-job-complete", json!({"device": "j"}));
            scene.wait_gone();
        }
        let turns = writer.end();
        let mut scene = scene.kill_and_restart();
        assert_eq!(scene.exported(), json!(moved), "{how}");
        assert_eq!(scene.qmp.run("query-jobs", json!({})), json!([]), "{how}: the job does not begin again");
        let out = scene.path("read");
        run("nbdcopy", &[&scene.uri, &out]);
        assert!(std::fs::read(out).unwrap() == expected(&scene.begin, turns), "{how}, after {turns} writes");
        let described = scene.qmp.run("query-named-block-nodes", json!({"flat": true}));
        assert!(described.as_array().unwrap().iter().any(|other| other["node-name"] == json!(node)));
        scene.quit();
    }
}

/// A target that is opened without the backing that its header names holds whole clusters: what is copied of one may be less,
/// and zeroes in the rest of it would hide what it lies on later. Zeroes of the disk are zeroes there, too.
#[test]
fn a_target_that_is_open_without_its_backing_is_the_disk_on_it() {
    let jobs = [
        ("blockdev-backup", "top", None),
        ("blockdev-backup", "none", None),
        ("blockdev-mirror", "top", Some("background")),
        ("blockdev-mirror", "full", Some("background")),
        ("blockdev-mirror", "none", Some("background")),
        ("blockdev-mirror", "none", Some("write-blocking")),
        ("blockdev-mirror", "incremental", Some("background")),
    ];
    for program in [Program::Infill, Program::Qemu] {
        for (command, sync, copy_mode) in jobs {
            // A write-blocking mirror writes the piece alone there, and none takes a bitmap.
            let is_ours = copy_mode == Some("write-blocking") || sync == "incremental";
            if program == Program::Qemu && is_ours {
                continue;
            }
            copy_without_backing(program, command, sync, copy_mode);
        }
    }
}

fn copy_without_backing(program: Program, command: &str, sync: &str, copy_mode: Option<&str>) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| text(&dir.path().join(name)).to_owned();
    std::fs::write(path("base"), vec![1; 4 << 20]).unwrap();
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &path("base"), "-o"];
    run("qemu-img", &[&create[..], &["cluster_size=4k", &path("disk")]].concat());
    run("qemu-img", &[&create[..], &["cluster_size=64k", &path("copy")]].concat());
    let begin = ["-c", "write -P 9 708k 4k", "-c", "write -z 2M 64k", "-c", "write -z 3M 8k"];
    run("qemu-io", &[&["-f", "qcow2"], &begin[..], &[&path("disk")]].concat());
    std::fs::copy(path("disk"), path("was")).unwrap();
    let socket = dir.path().join("nbd.sock");
    let server = format!("addr.type=unix,addr.path={}", text(&socket));
    let daemon = Daemon::start(program, dir.path(), &["--nbd-server", &server]);
    let mut qmp = daemon.connect();
    let file = |name: &str| json!({"driver": "file", "filename": path(name), "discard": "unmap"});
    qmp.run("blockdev-add", json!({"driver": "qcow2", "node-name": "d", "file": file("disk")}));
    qmp.run(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "t", "backing": null, "file": file("copy")}),
    );
    qmp.run(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "d", "name": "d", "writable": true}),
    );
    let pieces = ["write -P 7 712k 4k", "write -P 7 2056k 4k", "write -z 3076k 4k", "write -z -u 3200k 64k"];
    let uri = format!("nbd+unix:///d?socket={}", text(&socket));
    let pieces: Vec<&str> = pieces.iter().flat_map(|piece| ["-c", piece]).collect();
    let guest = || run("qemu-io", &[&["-f", "raw"], &pieces[..], &[&uri]].concat());
    let mut job = json!({"job-id": "j", "device": "d", "target": "t", "sync": sync});
    if let Some(mode) = copy_mode {
        job["copy-mode"] = json!(mode);
    }
    if sync == "incremental" {
        let bitmap = json!({"node": "d", "name": "b", "granularity": 4096});
        qmp.run("block-dirty-bitmap-add", bitmap);
        job["bitmap"] = json!("b");
        guest();
    }
    qmp.run(command, job);
    if copy_mode.is_some() {
        qmp.wait_for("BLOCK_JOB_READY");
    }
    guest();
    match (copy_mode, sync) {
        (None, "top") => drop(qmp.wait_for("BLOCK_JOB_COMPLETED")),
        (None, _) => {
            qmp.run("block-job-cancel", json!({"device": "j"}));
            qmp.wait_for("BLOCK_JOB_CANCELLED");
        }
        (Some(_), _) => {
            qmp.run("block-job-cancel", json!({"device": "j"}));
            qmp.wait_for("BLOCK_JOB_COMPLETED");
        }
    }
    daemon.quit(&mut qmp);
    let now = if copy_mode.is_some() { "disk" } else { "was" };
    eprintln!("{program:?}: {command}, {sync}, {copy_mode:?}");
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "qcow2", &path(now), &path("copy")]);
}
