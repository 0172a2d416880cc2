//! Backups and transactions over the daemon: judged by qemu-img, and refused in qemu-storage-daemon's words.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::path::{Path, PathBuf};

use common::{run, text, wait_until};
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};
use tempfile::TempDir;

const DISK_BYTES: usize = 4 << 20;

/// A daemon, its NBD socket, and a directory for images.
struct Scene {
    dir: TempDir,
    daemon: Daemon,
    qmp: Qmp,
}

impl Scene {
    fn new(program: Program) -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let server = format!("addr.type=unix,addr.path={}", text(&dir.path().join("nbd.sock")));
        let daemon = Daemon::start(program, dir.path(), &["--nbd-server", &server]);
        let qmp = daemon.connect();
        Scene { dir, daemon, qmp }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An image with these bytes (none: an empty one), under its name as a node.
    fn add(&mut self, name: &str, format: &str, content: Option<&[u8]>) {
        let path = self.path(name);
        let size = DISK_BYTES.to_string();
        run("qemu-img", &["create", "-q", "-f", format, text(&path), &size]);
        if let Some(content) = content {
            let raw = self.path("content");
            std::fs::write(&raw, content).unwrap();
            run("qemu-img", &["convert", "-n", "-f", "raw", "-O", format, text(&raw), text(&path)]);
        }
        self.qmp.run("blockdev-add", node(name, format, &path));
    }

    /// An overlay in a file that names `below`, under its name as a node.
    /// `attached`: it lies on the node `below` already.
    fn add_overlay(&mut self, name: &str, below: &str, attached: bool) {
        let path = self.path(name);
        let backing = if attached { json!(below) } else { Value::Null };
        let (below, size) = (self.path(below), DISK_BYTES.to_string());
        run(
            "qemu-img",
            &["create", "-q", "-u", "-f", "qcow2", "-b", text(&below), "-F", "qcow2", text(&path), &size],
        );
        let mut node = node(name, "qcow2", &path);
        node["backing"] = backing;
        self.qmp.run("blockdev-add", node);
    }

    fn export(&mut self, name: &str) {
        self.qmp.run(
            "block-export-add",
            json!({"type": "nbd", "id": name, "name": name, "node-name": name, "writable": true}),
        );
    }

    fn guest(&self, export: &str, commands: &[&str]) {
        let uri = format!("nbd+unix:///{export}?socket={}", text(&self.path("nbd.sock")));
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        let args: Vec<&str> = ["-f", "raw"].into_iter().chain(commands).chain([uri.as_str()]).collect();
        run("qemu-io", &args);
    }

    fn completed(&mut self, id: &str) {
        let event = self.qmp.event(|event| {
            event["event"].as_str().is_some_and(|name| name.starts_with("BLOCK_JOB_C"))
                && event["data"]["device"] == id
        });
        assert_eq!(event["event"], "BLOCK_JOB_COMPLETED", "{event}");
        assert_eq!(event["data"].get("error"), None, "{event}");
    }

    /// What is answered, which is compared.
    fn answers(&mut self, script: &[(&str, Value)]) -> Vec<Value> {
        let ask = |(command, arguments): &(&str, Value)| {
            let answer = self.qmp.ask(command, arguments.clone());
            json!({"to": command, "with": arguments, "answer": answer})
        };
        script.iter().map(ask).collect()
    }

    fn bitmaps(&mut self, node: &str) -> Value {
        let nodes = self.qmp.run("query-named-block-nodes", json!({"flat": true}));
        let node = nodes.as_array().unwrap().iter().find(|other| other["node-name"] == node).unwrap();
        node["dirty-bitmaps"].clone()
    }

    fn quit(mut self) -> TempDir {
        self.daemon.quit(&mut self.qmp);
        self.dir
    }
}

/// What a client reads of an export, as a file.
fn saved(scene: &Scene, export: &str, file: &str) {
    let uri = format!("nbd+unix:///{export}?socket={}", text(&scene.path("nbd.sock")));
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, text(&scene.path(file))]);
}

fn node(name: &str, format: &str, path: &Path) -> Value {
    json!({"driver": format, "node-name": name, "discard": "unmap",
        "file": {"driver": "file", "filename": text(path)}})
}

fn pattern() -> Vec<u8> {
    let byte = |at: usize| ((at / 512) as u8).wrapping_mul(7) ^ (at as u8);
    // Half of it, so that there are zeroes.
    (0..DISK_BYTES).map(|at| if at / 65536 % 2 == 0 { byte(at) } else { 0 }).collect()
}

fn compare(dir: &Path, one: (&str, &str), other: (&str, &str)) {
    let (a, b) = (dir.join(one.1), dir.join(other.1));
    run("qemu-img", &["compare", "-f", one.0, "-F", other.0, text(&a), text(&b)]);
}

#[test]
fn a_backup_is_the_disk_as_it_was_though_a_client_overwrites_all_of_it_meanwhile() {
    for (source, target) in [("raw", "qcow2"), ("qcow2", "raw"), ("qed", "qcow2")] {
        let mut scene = Scene::new(Program::Infill);
        let content = pattern();
        scene.add("d", source, Some(&content));
        scene.add("t", target, None);
        scene.export("d");
        scene.qmp.run(
            "blockdev-backup",
            json!({"job-id": "j", "device": "d", "target": "t", "sync": "full", "speed": 1 << 20}),
        );
        scene.guest("d", &["write -P 0xaa 0 1M", "write -z 1M 1M", "discard 2M 1M", "write -P 0xbb 3M 1M"]);
        scene.guest("d", &["write -P 0xcc 1000 3M"]);
        scene.qmp.run("block-job-set-speed", json!({"device": "j", "speed": 0}));
        scene.completed("j");
        let dir = scene.quit();
        std::fs::write(dir.path().join("was"), &content).unwrap();
        compare(dir.path(), (target, "t"), ("raw", "was"));
        if target == "qcow2" {
            run("qemu-img", &["check", "-q", "-f", target, text(&dir.path().join("t"))]);
        }
    }
}

#[test]
fn a_full_backup_and_its_increments_are_the_disk() {
    let mut scene = Scene::new(Program::Infill);
    scene.add("d", "qcow2", Some(&pattern()));
    scene.add("full", "qcow2", None);
    scene.export("d");
    scene.qmp.run(
        "transaction",
        json!({"actions": [
            {"type": "block-dirty-bitmap-add", "data": {"node": "d", "name": "b"}},
            {"type": "blockdev-backup", "data": {"job-id": "j", "device": "d", "target": "full", "sync": "full"}}]}),
    );
    scene.completed("j");
    let mut below = "full".to_owned();
    for (n, write) in ["write -P 1 100k 300k", "write -z 0 1M", "write -P 2 3000k 1k"].into_iter().enumerate()
    {
        scene.guest("d", &[write]);
        let overlay = format!("inc{n}");
        scene.add_overlay(&overlay, &below, true);
        let backup =
            json!({"job-id": "j", "device": "d", "target": overlay, "sync": "incremental", "bitmap": "b"});
        scene.qmp.run("blockdev-backup", backup);
        scene.completed("j");
        assert_eq!(scene.bitmaps("d")[0]["count"], 0);
        below = overlay;
    }
    let dir = scene.quit();
    compare(dir.path(), ("qcow2", "d"), ("qcow2", &below));
}

#[test]
fn a_failed_increment_leaves_the_bitmap_as_it_was_and_the_guest_alone() {
    let mut scene = Scene::new(Program::Infill);
    scene.add("d", "raw", Some(&pattern()));
    scene.export("d");
    scene.qmp.run("block-dirty-bitmap-add", json!({"node": "d", "name": "b"}));
    scene.guest("d", &["write -P 1 0 1M"]);
    let before = scene.bitmaps("d");
    // Its file may not become longer than it is now.
    let size = DISK_BYTES.to_string();
    let target = scene.path("t");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&target), &size]);
    let file = json!({"driver": "null-co", "node-name": "full", "size": DISK_BYTES, "read-only": true});
    scene.qmp.run("blockdev-add", file);
    let refused = scene.qmp.refused(
        "blockdev-backup",
        json!({"job-id": "j", "device": "d", "target": "full", "sync": "incremental", "bitmap": "b"}),
    );
    assert!(refused["desc"].as_str().unwrap().contains("read-only"), "{refused}");
    assert_eq!(scene.bitmaps("d"), before);
    scene.qmp.run("blockdev-add", node("t", "qcow2", &target));
    scene.qmp.run(
        "blockdev-backup",
        json!({"job-id": "j", "device": "d", "target": "t", "sync": "incremental", "bitmap": "b", "speed": 1}),
    );
    assert_eq!(scene.bitmaps("d")[0]["busy"], true);
    scene.qmp.run("job-cancel", json!({"id": "j"}));
    scene.qmp.wait_for("BLOCK_JOB_CANCELLED");
    assert_eq!(scene.bitmaps("d"), before);
    scene.guest("d", &["write -P 2 0 64k"]);
    scene.quit();
}

#[test]
fn a_transaction_is_all_or_nothing() {
    let mut scene = Scene::new(Program::Infill);
    for name in ["a", "b"] {
        scene.add(name, "qcow2", Some(&pattern()));
        scene.export(name);
        scene.add_overlay(&format!("{name}1"), name, false);
    }
    let actions = |last: Value| {
        json!({"actions": [
            {"type": "block-dirty-bitmap-add", "data": {"node": "a", "name": "m"}},
            {"type": "blockdev-snapshot", "data": {"node": "a", "overlay": "a1"}},
            {"type": "blockdev-snapshot", "data": {"node": "b", "overlay": "b1"}},
            last]})
    };
    let exported = |scene: &mut Scene| -> Vec<Value> {
        let exports = scene.qmp.run("query-block-exports", json!({}));
        exports.as_array().unwrap().iter().map(|export| export["node-name"].clone()).collect()
    };
    for last in [
        json!({"type": "abort", "data": {}}),
        json!({"type": "blockdev-snapshot", "data": {"node": "a", "overlay": "b1"}}),
        json!({"type": "block-dirty-bitmap-clear", "data": {"node": "a", "name": "nope"}}),
    ] {
        scene.qmp.refused("transaction", actions(last));
        assert_eq!(scene.bitmaps("a"), Value::Null);
        assert_eq!(exported(&mut scene), ["a", "b"]);
        scene.guest("a", &["write -P 1 0 64k"]);
        scene.guest("b", &["write -P 1 0 64k"]);
    }
    let clear = json!({"type": "block-dirty-bitmap-clear", "data": {"node": "a", "name": "m"}});
    scene.qmp.run("transaction", actions(clear));
    assert_eq!(exported(&mut scene), ["a1", "b1"]);
    scene.guest("a", &["read -P 1 0 64k", "write -P 2 0 64k"]);
    scene.guest("b", &["read -P 1 0 64k", "write -P 2 0 64k"]);
    assert_eq!(scene.bitmaps("a")[0]["count"], 0);
    let dir = scene.quit();
    for name in ["a", "b"] {
        let image = dir.path().join(name);
        run("qemu-io", &["-f", "qcow2", "-r", "-c", "read -P 1 0 64k", text(&image)]);
        run("qemu-img", &["check", "-q", "-f", "qcow2", text(&dir.path().join(format!("{name}1")))]);
    }
}

#[test]
fn grouped_backups_complete_together_or_not_at_all() {
    let mut scene = Scene::new(Program::Infill);
    for name in ["a", "b", "ta", "tb"] {
        scene.add(name, "qcow2", Some(&pattern()));
    }
    let backups = json!({"actions": [
        {"type": "blockdev-backup", "data": {"job-id": "x", "device": "a", "target": "ta", "sync": "full", "speed": 1}},
        {"type": "blockdev-backup", "data": {"job-id": "y", "device": "b", "target": "tb", "sync": "full"}}],
        "properties": {"completion-mode": "grouped"}});
    scene.qmp.run("transaction", backups.clone());
    scene.qmp.event(|event| event["data"]["id"] == "y" && event["data"]["status"] == "waiting");
    scene.qmp.run("job-cancel", json!({"id": "x"}));
    for _ in 0..2 {
        scene.qmp.wait_for("BLOCK_JOB_CANCELLED");
    }
    scene.qmp.run("transaction", backups);
    scene.qmp.event(|event| event["data"]["id"] == "y" && event["data"]["status"] == "waiting");
    scene.qmp.run("block-job-set-speed", json!({"device": "x", "speed": 0}));
    for _ in 0..2 {
        let completed = scene.qmp.wait_for("BLOCK_JOB_COMPLETED");
        assert_eq!(completed["data"].get("error"), None);
    }
    scene.quit();
}

#[test]
fn what_is_wrong_with_a_command_is_told_as_qemu_storage_daemon_tells_it() {
    let backup = |rest: Value| {
        let mut arguments = json!({"job-id": "j", "device": "a", "target": "t", "sync": "full"});
        arguments.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        ("blockdev-backup", arguments)
    };
    let transaction = |actions: Value| ("transaction", json!({"actions": actions}));
    let add = |name: &str| json!({"type": "block-dirty-bitmap-add", "data": {"node": "a", "name": name}});
    let script = [
        backup(json!({"device": "nope"})),
        backup(json!({"target": "nope"})),
        backup(json!({"target": "a"})),
        backup(json!({"target": "small"})),
        backup(json!({"sync": "incremental"})),
        backup(json!({"sync": "bitmap"})),
        backup(json!({"bitmap": "nope"})),
        backup(json!({"sync": "incremental", "bitmap": "nope"})),
        ("block-dirty-bitmap-add", json!({"node": "a", "name": "b"})),
        backup(json!({"sync": "bitmap", "bitmap": "b"})),
        backup(json!({"bitmap": "b", "bitmap-mode": "never"})),
        backup(json!({"sync": "none", "bitmap": "b", "bitmap-mode": "always"})),
        backup(json!({"sync": "incremental", "bitmap": "b", "bitmap-mode": "always"})),
        backup(json!({"bitmap-mode": "always"})),
        backup(json!({"foo": 1})),
        backup(json!({"filter-node-name": "1"})),
        backup(json!({"job-id": "1j"})),
        backup(json!({"sync": "zz"})),
        backup(json!({"on-target-error": "zz"})),
        backup(json!({"sync": "none"})),
        backup(json!({"job-id": "k"})),
        backup(json!({"target": "u"})),
        ("blockdev-del", json!({"node-name": "t"})),
        ("block-job-complete", json!({"device": "j"})),
        ("block-job-cancel", json!({"device": "j"})),
        transaction(json!([])),
        transaction(json!([{"type": "abort", "data": {}}])),
        transaction(json!([{"type": "zz", "data": {}}])),
        transaction(json!([add("n"), {"type": "abort", "data": {}}])),
        transaction(json!([add("n"), add("n")])),
        transaction(
            json!([add("n"), {"type": "block-dirty-bitmap-remove", "data": {"node": "a", "name": "n"}}, add("n")]),
        ),
        transaction(json!([add("n"), {"type": "block-dirty-bitmap-add", "data": {"node": "a"}}])),
        transaction(json!([{"type": "abort"}])),
        transaction(json!([5])),
        transaction(json!([{"data": {}}])),
        ("transaction", json!({})),
        ("transaction", json!({"actions": [add("n")], "properties": {"completion-mode": "grouped"}})),
        ("transaction", json!({"actions": [add("n")], "properties": {"completion-mode": "zz"}})),
        transaction(
            json!([add("n"), {"type": "block-dirty-bitmap-disable", "data": {"node": "a", "name": "b"}},
            {"type": "block-dirty-bitmap-merge", "data": {"node": "a", "target": "n", "bitmaps": ["b"]}},
            {"type": "block-dirty-bitmap-remove", "data": {"node": "a", "name": "b"}}]),
        ),
    ];
    let [ours, theirs] = [Program::Infill, Program::Qemu].map(|program| {
        let mut scene = Scene::new(program);
        for name in ["a", "t", "u"] {
            scene.add(name, "qcow2", None);
        }
        let small = scene.path("small");
        run("qemu-img", &["create", "-q", "-f", "qcow2", text(&small), "1M"]);
        scene.qmp.run("blockdev-add", node("small", "qcow2", &small));
        let mut answers = scene.answers(&script);
        answers.push(scene.bitmaps("a"));
        scene.quit();
        answers
    });
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs, "ours, then qemu-storage-daemon's");
    }
    assert_eq!(ours.len(), theirs.len());
}

#[test]
fn a_client_reads_the_disk_as_it_was_while_another_overwrites_it() {
    let mut scene = Scene::new(Program::Infill);
    let content = pattern();
    scene.add("d", "qcow2", Some(&content));
    scene.add("old", "qcow2", None);
    scene.export("d");
    scene.qmp.run(
        "blockdev-add",
        json!({"driver": "copy-before-write", "node-name": "cbw", "file": "d", "target": "old",
            "on-cbw-error": "break-snapshot", "cbw-timeout": 30}),
    );
    scene.qmp.run("blockdev-add", json!({"driver": "snapshot-access", "node-name": "was", "file": "cbw"}));
    scene.qmp.run("block-export-add", json!({"type": "nbd", "id": "was", "name": "was", "node-name": "was"}));
    scene.guest("d", &["write -P 0xaa 0 1M", "write -z 1M 512k", "discard 2M 1M", "write -P 0xbb 3001k 7k"]);
    saved(&scene, "was", "first");
    scene.guest("d", &["write -P 0xcc 0 4M"]);
    saved(&scene, "was", "second");
    assert!(scene.qmp.refused("blockdev-del", json!({"node-name": "cbw"}))["desc"].is_string());
    scene.qmp.run("block-export-del", json!({"id": "was"}));
    scene.qmp.wait_for("BLOCK_EXPORT_DELETED");
    for name in ["was", "cbw", "old"] {
        scene.qmp.run("blockdev-del", json!({"node-name": name}));
    }
    scene.guest("d", &["read -P 0xcc 0 4M", "write -P 0xdd 0 64k"]);
    let dir = scene.quit();
    for name in ["first", "second"] {
        assert!(std::fs::read(dir.path().join(name)).unwrap() == content, "{name}");
    }
}

#[test]
fn of_a_disk_as_it_was_only_what_a_bitmap_marks_is_read() {
    let mut scene = Scene::new(Program::Infill);
    scene.add("d", "raw", Some(&pattern()));
    scene.add("old", "qcow2", None);
    scene.export("d");
    scene.qmp.run("block-dirty-bitmap-add", json!({"node": "d", "name": "b"}));
    scene.guest("d", &["write -P 1 64k 64k"]);
    scene.qmp.run(
        "blockdev-add",
        json!({"driver": "copy-before-write", "node-name": "cbw", "file": "d", "target": "old",
            "bitmap": {"node": "d", "name": "b"}}),
    );
    scene.qmp.run("blockdev-add", json!({"driver": "snapshot-access", "node-name": "was", "file": "cbw"}));
    scene.qmp.run("block-export-add", json!({"type": "nbd", "id": "was", "name": "was", "node-name": "was"}));
    scene.guest("d", &["write -P 2 0 1M"]);
    let uri = format!("nbd+unix:///was?socket={}", text(&scene.path("nbd.sock")));
    run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 1 64k 64k", &uri]);
    common::fails("qemu-io", &["-r", "-f", "raw", "-c", "read 0 64k", &uri]);
    common::fails("qemu-io", &["-r", "-f", "raw", "-c", "read 120k 64k", &uri]);
    scene.quit();
}

#[test]
fn after_a_restart_the_guest_has_its_disk_a_backup_goes_on_and_a_filters_disk_as_it_was_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let server = format!("addr.type=unix,addr.path={}", text(&dir.path().join("nbd.sock")));
    let start = |options: &[&str]| {
        let daemon =
            Daemon::start(Program::Infill, dir.path(), &[&["--state", text(&state)], options].concat());
        let qmp = daemon.connect();
        (daemon, qmp)
    };
    let (daemon, mut qmp) = start(&["--nbd-server", &server]);
    for name in ["d", "old", "t"] {
        let path = dir.path().join(name);
        run("qemu-img", &["create", "-q", "-f", "qcow2", text(&path), &DISK_BYTES.to_string()]);
        qmp.run("blockdev-add", node(name, "qcow2", &path));
    }
    qmp.run(
        "blockdev-add",
        json!({"driver": "copy-before-write", "node-name": "cbw", "file": "d", "target": "old"}),
    );
    qmp.run("blockdev-add", json!({"driver": "snapshot-access", "node-name": "was", "file": "cbw"}));
    qmp.run("block-dirty-bitmap-add", json!({"node": "d", "name": "b"}));
    let mut export = json!({"type": "nbd", "id": "d", "name": "d", "node-name": "cbw", "writable": true, "bitmaps": ["b"]});
    qmp.run("block-export-add", export.clone());
    (export["id"], export["name"], export["node-name"]) = (json!("was"), json!("was"), json!("was"));
    (export["writable"], export["bitmaps"]) = (json!(false), json!([]));
    qmp.run("block-export-add", export);
    let uri = |export: &str| format!("nbd+unix:///{export}?socket={}", text(&dir.path().join("nbd.sock")));
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 0 64k", "-c", "flush", &uri("d")]);
    run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 0 64k", &uri("was")]);
    qmp.run("blockdev-backup", json!({"job-id": "j", "device": "d", "target": "t", "sync": "none"}));
    daemon.process.kill();
    std::fs::remove_file(dir.path().join("monitor.sock")).unwrap();
    let (daemon, mut qmp) = start(&[]);
    run("qemu-io", &["-f", "raw", "-c", "read -P 1 0 64k", "-c", "write -P 2 0 64k", &uri("d")]);
    common::fails("qemu-io", &["-r", "-f", "raw", "-c", "read 0 64k", &uri("was")]);
    assert_eq!(qmp.run("query-jobs", json!({}))[0]["status"], json!("running"));
    qmp.run("job-cancel", json!({"id": "j"}));
    wait_until("the backup is over", || qmp.run("query-jobs", json!({})) == json!([]));
    daemon.quit(&mut qmp);
    // What the guest has overwritten since was kept.
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 1 0 64k", text(&dir.path().join("t"))]);
}

#[test]
fn after_a_restart_exports_are_on_the_overlays_that_a_transaction_put_there() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let server = format!("addr.type=unix,addr.path={}", text(&dir.path().join("nbd.sock")));
    let start = |options: &[&str]| {
        let daemon =
            Daemon::start(Program::Infill, dir.path(), &[&["--state", text(&state)], options].concat());
        let qmp = daemon.connect();
        (daemon, qmp)
    };
    let (daemon, mut qmp) = start(&["--nbd-server", &server]);
    let size = DISK_BYTES.to_string();
    for name in ["a", "b"] {
        let (below, over) = (dir.path().join(name), dir.path().join(format!("{name}1")));
        run("qemu-img", &["create", "-q", "-f", "qcow2", text(&below), &size]);
        run(
            "qemu-img",
            &["create", "-q", "-u", "-f", "qcow2", "-b", text(&below), "-F", "qcow2", text(&over), &size],
        );
        qmp.run("blockdev-add", node(name, "qcow2", &below));
        let mut overlay = node(&format!("{name}1"), "qcow2", &over);
        overlay["backing"] = Value::Null;
        qmp.run("blockdev-add", overlay);
        qmp.run(
            "block-export-add",
            json!({"type": "nbd", "id": name, "name": name, "node-name": name, "writable": true}),
        );
    }
    let uri = |export: &str| format!("nbd+unix:///{export}?socket={}", text(&dir.path().join("nbd.sock")));
    let guest = |export: &str, command: &str| run("qemu-io", &["-f", "raw", "-c", command, &uri(export)]);
    guest("a", "write -P 1 0 64k");
    let snapshots = json!({"actions": [
        {"type": "blockdev-snapshot", "data": {"node": "a", "overlay": "a1"}},
        {"type": "blockdev-snapshot", "data": {"node": "b", "overlay": "b1"}}]});
    qmp.run("transaction", snapshots);
    guest("a", "write -P 2 64k 64k");
    guest("b", "write -P 3 0 64k");
    daemon.process.kill();
    std::fs::remove_file(dir.path().join("monitor.sock")).unwrap();
    let (daemon, mut qmp) = start(&[]);
    let exports = qmp.run("query-block-exports", json!({}));
    let on: Vec<&Value> = exports.as_array().unwrap().iter().map(|export| &export["node-name"]).collect();
    assert_eq!(on, ["a1", "b1"]);
    guest("a", "read -P 1 0 64k");
    guest("a", "read -P 2 64k 64k");
    guest("b", "read -P 3 0 64k");
    daemon.quit(&mut qmp);
}

/// Compressed clusters in an image, as the referee counts them.
fn compressed(path: &Path) -> u64 {
    let check: Value =
        serde_json::from_str(&run("qemu-img", &["check", "--output=json", text(path)])).unwrap();
    assert_eq!((&check["check-errors"], check.get("corruptions")), (&json!(0), None), "{check}");
    check["compressed-clusters"].as_u64().unwrap_or(0)
}

#[test]
fn a_backup_is_compressed_if_asked_and_so_is_what_goes_through_the_filter() {
    let mut scene = Scene::new(Program::Infill);
    scene.add("disk", "qcow2", Some(&pattern()));
    scene.add("target", "qcow2", None);
    scene.add("plain", "raw", None);
    scene.add("filtered", "qcow2", None);
    let refused = scene.qmp.refused(
        "blockdev-backup",
        json!({"job-id": "j", "device": "disk", "target": "plain", "sync": "full", "compress": true}),
    );
    assert_eq!(refused["desc"], "Compression is not supported for this drive plain");
    let refused =
        scene.qmp.refused("blockdev-add", json!({"driver": "compress", "node-name": "c", "file": "plain"}));
    assert!(refused["desc"].as_str().unwrap().contains("no qcow2 image"), "{refused}");
    scene.qmp.run(
        "blockdev-backup",
        json!({"job-id": "j", "device": "disk", "target": "target", "sync": "full", "compress": true}),
    );
    scene.qmp.wait_for("BLOCK_JOB_COMPLETED");
    scene.qmp.run("blockdev-add", json!({"driver": "compress", "node-name": "c", "file": "filtered"}));
    scene.qmp.run(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "c", "name": "c", "writable": true}),
    );
    let uri = format!("nbd+unix:///c?socket={}", text(&scene.path("nbd.sock")));
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 128k", "-c", "write -P 8 1M 4k", "-c", "flush", &uri]);
    scene.qmp.run("block-export-del", json!({"id": "e"}));
    let dir = scene.quit();
    compare(dir.path(), ("qcow2", "disk"), ("qcow2", "target"));
    let whole = (DISK_BYTES / 65536 / 2) as u64;
    assert_eq!(compressed(&dir.path().join("target")), whole);
    // A part of a cluster is written plain.
    assert_eq!(compressed(&dir.path().join("filtered")), 2);
    run(
        "qemu-io",
        &[
            "-r",
            "-f",
            "qcow2",
            "-c",
            "read -P 7 0 128k",
            "-c",
            "read -P 8 1M 4k",
            text(&dir.path().join("filtered")),
        ],
    );
}
