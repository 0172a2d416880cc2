//! Dirty bitmaps that images keep: our daemon and qemu-storage-daemon answer the same, leave the same in the image, and read
//! what the other has left; they come back after a restart, and say so where they cannot.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::path::{Path, PathBuf};

use common::{run, text};
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

/// Size of the test's disks.
const DISK: &str = "4M";

/// A daemon with a qcow2 disk in `dir/disk` under the name `d`, exported for writing, and what was answered so far.
struct Scene {
    program: Program,
    dir: PathBuf,
    daemon: Option<Daemon>,
    qmp: Qmp,
    options: Vec<String>,
    answers: Vec<Value>,
}

impl Scene {
    fn start(program: Program, dir: &Path, options: &[&str]) -> Scene {
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        let daemon = start(program, dir, &options);
        let qmp = daemon.connect();
        let (dir, daemon) = (dir.to_owned(), Some(daemon));
        let mut scene = Scene { program, dir, daemon, qmp, options, answers: Vec::new() };
        scene.open(false);
        scene
    }

    fn open(&mut self, read_only: bool) {
        self.qmp.run("blockdev-add", node("d", &self.dir.join("disk"), read_only));
        if !read_only {
            self.qmp.run("block-export-add", export("w", &[]));
        }
    }

    /// Ends the daemon in order, and starts another one; with a state, that makes everything again.
    fn restart(&mut self, read_only: bool) {
        self.daemon.take().unwrap().quit(&mut self.qmp);
        self.begin();
        if self.options.is_empty() {
            self.open(read_only);
        }
    }

    fn begin(&mut self) {
        let daemon = start(self.program, &self.dir, &self.options);
        self.qmp = daemon.connect();
        self.daemon = Some(daemon);
    }

    fn ask(&mut self, command: &str, arguments: Value) {
        let answer = self.qmp.ask(command, arguments.clone());
        self.answers.push(json!({"to": command, "with": arguments, "answer": answer}));
    }

    fn add(&mut self, name: &str, rest: Value) {
        let mut arguments = json!({"node": "d", "name": name, "persistent": true});
        arguments.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        self.ask("block-dirty-bitmap-add", arguments);
    }

    fn bitmap(&mut self, verb: &str, name: &str) {
        self.ask(&format!("block-dirty-bitmap-{verb}"), json!({"node": "d", "name": name}));
    }

    fn bitmaps(&mut self) -> Value {
        let nodes = self.qmp.run("query-named-block-nodes", json!({"flat": true}));
        let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "d").unwrap();
        node["dirty-bitmaps"].clone()
    }

    /// What is known of the bitmaps of `d`.
    fn look(&mut self) {
        let bitmaps = self.bitmaps();
        for bitmap in bitmaps.as_array().into_iter().flatten() {
            let name = bitmap["name"].as_str().unwrap();
            self.ask("x-debug-block-dirty-bitmap-sha256", json!({"node": "d", "name": name}));
        }
        self.answers.push(bitmaps);
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", text(&self.dir.join("nbd.sock")))
    }

    fn guest(&self, commands: &[&str]) {
        let uri = self.uri("w");
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        let args: Vec<&str> = ["-f", "raw"].into_iter().chain(commands).chain([uri.as_str()]).collect();
        run("qemu-io", &args);
    }

    /// What a client of the export is told of a bitmap.
    fn map(&mut self, export: &str, bitmap: &str) {
        let map =
            run("nbdinfo", &["--json", &format!("--map=qemu:dirty-bitmap:{bitmap}"), &self.uri(export)]);
        self.answers.push(serde_json::from_str(&map).unwrap());
    }

    /// What qemu-img says of the image.
    fn image(&mut self) {
        self.answers.push(stored(&self.dir.join("disk")));
    }

    fn quit(mut self) -> Vec<Value> {
        self.daemon.take().unwrap().quit(&mut self.qmp);
        self.image();
        run("qemu-img", &["check", "-q", "-f", "qcow2", text(&self.dir.join("disk"))]);
        self.answers
    }
}

fn start(program: Program, dir: &Path, options: &[String]) -> Daemon {
    let server = format!("addr.type=unix,addr.path={}", text(&dir.join("nbd.sock")));
    let mut all: Vec<&str> = options.iter().map(String::as_str).collect();
    all.extend(["--nbd-server", &server]);
    Daemon::start(program, dir, &all)
}

fn node(name: &str, path: &Path, read_only: bool) -> Value {
    json!({"driver": "qcow2", "node-name": name, "read-only": read_only,
        "file": {"driver": "file", "filename": text(path), "read-only": read_only}})
}

fn export(name: &str, bitmaps: &[&str]) -> Value {
    json!({"type": "nbd", "id": name, "name": name, "node-name": "d", "writable": true, "bitmaps": bitmaps})
}

/// The bitmaps of an image, as qemu-img tells them.
fn stored(path: &Path) -> Value {
    let info: Value =
        serde_json::from_str(&run("qemu-img", &["info", "-U", "--output=json", text(path)])).unwrap();
    info["format-specific"]["data"]["bitmaps"].clone()
}

fn disk(dir: &Path, options: &str) {
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, text(&dir.join("disk")), DISK]);
}

/// Runs `script` on both, each with a disk of its own, and compares what they have answered.
fn same(options: &str, script: impl Fn(&mut Scene)) {
    let [ours, theirs] = [Program::Infill, Program::Qemu].map(|program| {
        let dir = tempfile::tempdir().unwrap();
        disk(dir.path(), options);
        let mut scene = Scene::start(program, dir.path(), &[]);
        script(&mut scene);
        scene.quit()
    });
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs, "ours, then qemu-storage-daemon's");
    }
    assert_eq!(ours.len(), theirs.len());
}

#[test]
fn what_is_kept_over_restarts_is_what_the_competitor_keeps() {
    for options in ["cluster_size=65536", "cluster_size=4096", "cluster_size=65536,extended_l2=on"] {
        same(options, |scene| {
            scene.add("p", json!({}));
            scene.add("fine", json!({"granularity": 512}));
            scene.add("off", json!({"disabled": true}));
            scene.ask("block-dirty-bitmap-add", json!({"node": "d", "name": "volatile"}));
            scene.guest(&["write -P 1 1000 5000", "write -z 1M 64k", "write -P 2 4193792 512"]);
            scene.look();
            scene.restart(false);
            scene.look();
            scene.bitmap("enable", "off");
            scene.bitmap("disable", "p");
            scene.guest(&["write -P 3 2M 4k"]);
            scene.add("late", json!({"granularity": 1 << 20}));
            let merge = json!({"node": "d", "target": "late", "bitmaps": ["off", "fine"]});
            scene.ask("block-dirty-bitmap-merge", merge);
            scene.bitmap("clear", "fine");
            scene.look();
            scene.restart(false);
            scene.look();
            scene.bitmap("remove", "fine");
            scene.guest(&["write -P 4 3M 4k"]);
            scene.look();
            scene.restart(true);
            scene.look();
            scene.image();
            for verb in ["remove", "clear", "enable", "disable"] {
                scene.bitmap(verb, "p");
            }
            scene.restart(false);
            scene.look();
            for name in ["p", "off", "late"] {
                scene.bitmap("remove", name);
            }
            scene.look();
        });
    }
}

#[test]
fn what_cannot_be_kept_is_refused_in_the_same_words() {
    same("compat=0.10", |scene| {
        scene.add("p", json!({}));
        scene.qmp.run("blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": 65536}));
        scene.ask("block-dirty-bitmap-add", json!({"node": "n", "name": "p", "persistent": true}));
        scene.look();
    });
    same("cluster_size=65536", |scene| {
        scene.add("p", json!({}));
        scene.add("p", json!({}));
        scene.restart(false);
        scene.add("p", json!({}));
        let actions = json!([
            {"type": "block-dirty-bitmap-add", "data": {"node": "d", "name": "q", "persistent": true}},
            {"type": "block-dirty-bitmap-clear", "data": {"node": "d", "name": "p"}},
            {"type": "abort", "data": {}},
        ]);
        scene.ask("transaction", json!({"actions": actions}));
        scene.look();
    });
}

/// A disk with bitmaps that `program` has left.
fn left_by(program: Program, dir: &Path) -> Vec<Value> {
    disk(dir, "cluster_size=4096");
    let mut scene = Scene::start(program, dir, &[]);
    scene.add("a", json!({"granularity": 512}));
    scene.add("b", json!({"granularity": 65536}));
    scene.guest(&["write -P 1 0 64k", "write -P 1 192k 4k", "write -P 1 1M 1M", "write -P 1 4193792 512"]);
    scene.quit()
}

#[test]
fn what_one_has_left_the_other_reads_bit_for_bit_and_tells_its_clients() {
    for program in [Program::Qemu, Program::Infill] {
        let dir = tempfile::tempdir().unwrap();
        left_by(program, dir.path());
        let [ours, theirs] = [Program::Infill, Program::Qemu].map(|reader| {
            let mut scene = Scene::start(reader, dir.path(), &[]);
            scene.restart(true);
            scene.look();
            let told =
                json!({"type": "nbd", "id": "r", "name": "r", "node-name": "d", "bitmaps": ["a", "b"]});
            scene.ask("block-export-add", told);
            scene.map("r", "a");
            scene.map("r", "b");
            scene.quit()
        });
        assert_eq!(ours, theirs, "ours, then qemu-storage-daemon's, of what {program:?} left");
    }
}

#[test]
fn a_kill_leaves_bitmaps_that_nobody_takes_for_right_and_that_can_be_removed() {
    let dir = tempfile::tempdir().unwrap();
    disk(dir.path(), "cluster_size=65536");
    let state = dir.path().join("state");
    let journal = dir.path().join("journal");
    std::fs::create_dir(&journal).unwrap();
    let mut scene =
        Scene::start(Program::Infill, dir.path(), &["--state", text(&state), "--journal", text(&journal)]);
    scene.add("p", json!({}));
    scene.guest(&["write -P 1 0 64k"]);
    scene.restart(false);
    assert_eq!(scene.bitmaps()[0]["count"], 65536, "{}", scene.bitmaps());
    scene.qmp.run("block-export-add", export("b", &["p"]));
    scene.guest(&["write -P 2 1M 64k"]);
    scene.daemon.take().unwrap().process.kill();
    assert_eq!(stored(&scene.dir.join("disk"))[0]["flags"], json!(["in-use", "auto"]));
    // Else the next daemon knows what it said.
    for entry in std::fs::read_dir(&journal).unwrap().flatten() {
        if entry.file_name().to_str().unwrap().starts_with("bitmap-") {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
    scene.begin();
    let bitmaps = scene.bitmaps();
    assert_eq!(
        (&bitmaps[0]["inconsistent"], &bitmaps[0]["recording"]),
        (&json!(true), &json!(false)),
        "{bitmaps}"
    );
    // The export is there, without it.
    run("nbdinfo", &["--size", &scene.uri("b")]);
    for verb in ["clear", "enable", "disable"] {
        let refused =
            scene.qmp.refused(&format!("block-dirty-bitmap-{verb}"), json!({"node": "d", "name": "p"}));
        assert_eq!(refused["desc"], "Bitmap 'p' is inconsistent and cannot be used");
    }
    scene.qmp.refused("block-export-add", export("e", &["p"]));
    scene.guest(&["read -P 1 0 64k", "read -P 2 1M 64k"]);
    scene.qmp.run("block-dirty-bitmap-remove", json!({"node": "d", "name": "p"}));
    assert_eq!(scene.bitmaps(), Value::Null);
    let told = scene.quit();
    assert_eq!(told.last().unwrap(), &Value::Null);
}

#[test]
fn a_chain_of_incremental_backups_goes_on_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    disk(dir.path(), "cluster_size=65536");
    let path = |name: &str| dir.path().join(name);
    let mut scene = Scene::start(Program::Infill, dir.path(), &[]);
    scene.guest(&["write -P 1 0 4M"]);
    scene.add("b", json!({}));
    let mut below: Option<PathBuf> = None;
    for (nth, guest) in ["write -P 2 0 64k", "write -P 3 1M 200k", "write -z 2M 64k"].into_iter().enumerate()
    {
        let name = format!("backup{nth}");
        let mut create = vec!["create", "-q", "-f", "qcow2"];
        let below_text = below.as_deref().map(text).unwrap_or_default().to_owned();
        if below.is_some() {
            create.extend(["-b", &below_text, "-F", "qcow2"]);
        }
        let target = path(&name);
        create.extend([text(&target), DISK]);
        run("qemu-img", &create);
        // Without what lies below: only what the backup writes is in it.
        let mut layer = node(&name, &target, false);
        layer["backing"] = Value::Null;
        scene.qmp.run("blockdev-add", layer);
        let sync = if nth == 0 { "full" } else { "incremental" };
        let mut backup = json!({"job-id": "j", "device": "d", "target": name, "sync": sync});
        if nth > 0 {
            backup["bitmap"] = json!("b");
        }
        scene.qmp.run("blockdev-backup", backup);
        let done = scene.qmp.wait_for("BLOCK_JOB_COMPLETED");
        assert_eq!(done["data"].get("error"), None, "{done}");
        scene.qmp.run("blockdev-del", json!({"node-name": name}));
        below = Some(target.clone());
        if nth == 0 {
            // The full one has all of this.
            scene.qmp.run("block-dirty-bitmap-clear", json!({"node": "d", "name": "b"}));
        }
        let content = path("content");
        run("qemu-img", &["convert", "-O", "raw", text(&target), text(&content)]);
        let told = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&content), &scene.uri("w")]);
        assert!(told.contains("identical"), "{told}");
        scene.guest(&[guest]);
        scene.restart(false);
        assert!(scene.bitmaps()[0]["count"].as_u64().unwrap() <= 320 << 10, "{}", scene.bitmaps());
    }
    scene.quit();
}

#[test]
fn a_mirror_that_starts_from_a_bitmap_copies_what_it_marks_and_ends_with_it_clean() {
    let dir = tempfile::tempdir().unwrap();
    disk(dir.path(), "cluster_size=65536");
    let mut scene = Scene::start(Program::Infill, dir.path(), &[]);
    scene.guest(&["write -P 1 0 4M"]);
    let copy = dir.path().join("copy");
    let target =
        json!({"driver": "raw", "node-name": "t", "file": {"driver": "file", "filename": text(&copy)}});
    // What was copied before: all of the disk, and a mark of the test's own.
    let mut before = vec![1; 4 << 20];
    before[3 << 20..(3 << 20) + 4096].fill(0xee);
    std::fs::write(&copy, &before).unwrap();
    scene.qmp.run("blockdev-add", target);
    for (sync, mode, left) in
        [("bitmap", Some("never"), 5 * 65536), ("incremental", None, 0), ("bitmap", Some("on-success"), 0)]
    {
        scene.add("b", json!({}));
        scene.guest(&["write -P 2 64k 64k", "write -P 3 2097000 70000"]);
        let mut mirror = json!({"job-id": "m", "device": "d", "target": "t", "sync": sync, "bitmap": "b"});
        if let Some(mode) = mode {
            mirror["bitmap-mode"] = json!(mode);
        }
        scene.qmp.run("blockdev-mirror", mirror);
        let ready = scene.qmp.wait_for("BLOCK_JOB_READY");
        assert!(ready["data"]["len"].as_u64().unwrap() <= 512 << 10, "{ready}");
        let busy = scene.qmp.refused("block-dirty-bitmap-remove", json!({"node": "d", "name": "b"}));
        assert!(busy["desc"].as_str().unwrap().contains("in use"), "{busy}");
        scene.guest(&["write -P 4 3584k 4k"]);
        // Without taking the disk's place.
        scene.qmp.run("block-job-cancel", json!({"device": "m"}));
        scene.qmp.wait_for("BLOCK_JOB_COMPLETED");
        scene.qmp.wait_for_status("null");
        let found = std::fs::read(&copy).unwrap();
        let mut expected = before.clone();
        expected[64 << 10..128 << 10].fill(2);
        expected[2097000..2097000 + 70000].fill(3);
        expected[3584 << 10..3588 << 10].fill(4);
        assert!(found == expected, "{sync}: what is not marked was copied, or what is marked was not");
        let after = scene.bitmaps()[0]["count"].as_u64().unwrap();
        assert_eq!(after, left, "{sync}");
        scene.bitmap("remove", "b");
    }
    let refused = scene.qmp.refused(
        "blockdev-mirror",
        json!({"job-id": "m", "device": "d", "target": "t", "sync": "incremental", "bitmap": "nope"}),
    );
    assert_eq!(refused["desc"], "Bitmap 'nope' could not be found");
    scene.quit();
}
