//! Commands that change one thing of a node, and the older names of others: given to our daemon and to
//! qemu-storage-daemon, they are answered the same, and leave the same disks.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::path::Path;

use common::{run, text};
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

/// A daemon with a disk of 4 MiB in `dir/disk` under the name `d`, and what it has answered so far.
struct Told {
    daemon: Daemon,
    qmp: Qmp,
    server: String,
    dir: std::path::PathBuf,
    answers: Vec<Value>,
}

impl Told {
    fn start(program: Program, dir: &Path, format: &str) -> Told {
        let server = text(&dir.join("nbd.sock")).to_owned();
        let option = format!("addr.type=unix,addr.path={server}");
        let daemon = Daemon::start(program, dir, &["--nbd-server", &option]);
        let mut qmp = daemon.connect();
        qmp.run("blockdev-add", node(dir, "d", format, "disk"));
        Told { daemon, qmp, server, dir: dir.to_owned(), answers: Vec::new() }
    }

    fn ask(&mut self, command: &str, arguments: Value) {
        let answer = self.qmp.ask(command, arguments.clone());
        self.answers.push(json!({"to": command, "with": arguments, "answer": answer}));
    }

    /// Asks what only has to succeed.
    fn run(&mut self, command: &str, arguments: Value) {
        self.qmp.run(command, arguments);
    }

    fn resize(&mut self, node: &str, size: i64) {
        self.ask("block_resize", json!({"node-name": node, "size": size}));
    }

    fn node(&mut self, name: &str) -> Value {
        let nodes = self.qmp.run("query-named-block-nodes", json!({"flat": true}));
        nodes.as_array().unwrap().iter().find(|node| node["node-name"] == name).unwrap().clone()
    }

    /// Size and bitmaps of a node.
    fn look(&mut self, name: &str) {
        let node = self.node(name);
        self.answers.push(json!([node["image"]["virtual-size"], node["dirty-bitmaps"]]));
    }

    fn threshold(&mut self, name: &str) {
        let node = self.node(name);
        self.answers.push(node["write_threshold"].clone());
    }

    fn guest(&mut self, export: &str, commands: &[&str]) {
        let uri = format!("nbd+unix:///{export}?socket={}", self.server);
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        let args: Vec<&str> = ["-f", "raw"].into_iter().chain(commands).chain([uri.as_str()]).collect();
        run("qemu-io", &args);
    }

    /// The next event of that name.
    fn event(&mut self, name: &str) {
        let event = self.qmp.wait_for(name);
        self.answers.push(event["data"].clone());
    }

    fn quit(mut self) -> Vec<Value> {
        self.daemon.quit(&mut self.qmp);
        self.answers
    }
}

fn node(dir: &Path, name: &str, format: &str, file: &str) -> Value {
    json!({"driver": format, "node-name": name,
        "file": {"driver": "file", "filename": text(&dir.join(file))}})
}

fn export(node: &str, writable: bool) -> Value {
    json!({"type": "nbd", "id": node, "name": node, "node-name": node, "writable": writable})
}

fn create(dir: &Path, name: &str, format: &str) {
    run("qemu-img", &["create", "-q", "-f", format, text(&dir.join(name)), "4M"]);
}

/// Runs `script` on both, each with a disk of `format`, and compares what they have answered.
fn same(format: &str, script: impl Fn(&mut Told)) {
    let [ours, theirs] = [Program::Infill, Program::Qemu].map(|program| {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path(), "disk", format);
        let mut told = Told::start(program, dir.path(), format);
        script(&mut told);
        told.quit()
    });
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs, "ours, then qemu-storage-daemon's");
    }
    assert_eq!(ours.len(), theirs.len());
}

const MB: i64 = 1 << 20;

#[test]
fn a_disk_that_was_resized_is_seen_so_by_guests_bitmaps_and_other_programs() {
    for format in ["raw", "qcow2", "qed"] {
        same(format, |told| {
            let grown = 9 * MB + 512;
            told.run("block-dirty-bitmap-add", json!({"node": "d", "name": "b"}));
            told.run("block-export-add", export("d", true));
            told.guest("d", &["write -P 7 3M 1M"]);
            told.run("block-export-del", json!({"id": "d"}));
            told.qmp.wait_for("BLOCK_EXPORT_DELETED");
            for size in [8 * MB, grown, grown] {
                told.resize("d", size);
                told.look("d");
            }
            told.run("block-export-add", export("d", true));
            told.guest("d", &["read -P 7 3M 1M", "read -P 0 4M 5243392", "write -P 8 9437184 512"]);
            told.look("d");
            let info = run("qemu-img", &["info", "-U", "--output=json", text(&told.dir.join("disk"))]);
            let info: Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["virtual-size"], json!(grown), "{info}");
        });
    }
}

#[test]
fn a_raw_disk_is_made_shorter_and_what_comes_back_reads_as_zeroes() {
    same("raw", |told| {
        told.run("block-export-add", export("d", true));
        told.guest("d", &["write -P 7 0 4M"]);
        told.run("block-export-del", json!({"id": "d"}));
        told.qmp.wait_for("BLOCK_EXPORT_DELETED");
        told.resize("d", MB);
        told.look("d");
        told.resize("d", 4 * MB);
        told.run("block-export-add", export("d", true));
        told.guest("d", &["read -P 7 0 1M", "read -P 0 1M 3M"]);
    });
}

#[test]
fn what_is_wrong_with_a_size_is_told_the_same() {
    for (format, sizes) in
        [("qcow2", &[8 * MB + 100, -1][..]), ("qed", &[8 * MB + 100, MB, -1, i64::MIN]), ("raw", &[-1])]
    {
        same(format, |told| {
            for size in sizes {
                told.resize("d", *size);
                told.look("d");
            }
        });
    }
    same("raw", |told| {
        for arguments in [
            json!({"size": 5}),
            json!({"node-name": "d"}),
            json!({"node-name": "d", "size": "x"}),
            json!({"node-name": "d", "size": 5, "foo": 1}),
            json!({"node-name": "nope", "size": 5}),
            json!({"device": "d", "size": 5}),
            json!({"device": "nope", "node-name": "nope", "size": 5}),
            json!({"device": "nope", "node-name": "d", "size": 8 * MB}),
        ] {
            told.ask("block_resize", arguments);
        }
        told.look("d");
        create(&told.dir, "window", "raw");
        let window = json!({"driver": "raw", "node-name": "w", "size": MB,
            "file": {"driver": "file", "filename": text(&told.dir.join("window"))}});
        told.run("blockdev-add", window);
        told.resize("w", 2 * MB);
        told.run("blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": MB}));
        told.resize("n", 2 * MB);
    });
}

#[test]
fn a_disk_whose_size_somebody_knows_keeps_it() {
    same("raw", |told| {
        for writable in [true, false] {
            told.run("block-export-add", export("d", writable));
            told.resize("d", 8 * MB);
            told.run("block-export-del", json!({"id": "d"}));
            told.qmp.wait_for("BLOCK_EXPORT_DELETED");
        }
        create(&told.dir, "top", "qcow2");
        let mut top = node(&told.dir, "o", "qcow2", "top");
        top["backing"] = json!("d");
        told.run("blockdev-add", top);
        told.resize("d", 8 * MB);
        told.run("block-stream", json!({"job-id": "j", "device": "o", "speed": 1}));
        told.resize("o", 8 * MB);
        told.look("o");
        told.look("d");
        told.run("job-cancel", json!({"id": "j"}));
        told.qmp.wait_for_status("null");
        told.resize("o", 8 * MB);
        told.look("o");
    });
}

#[test]
fn a_qcow2_disk_is_not_cut_and_a_read_only_one_not_changed() {
    let dir = tempfile::tempdir().unwrap();
    create(dir.path(), "disk", "qcow2");
    let mut told = Told::start(Program::Infill, dir.path(), "qcow2");
    let error = told.qmp.refused("block_resize", json!({"node-name": "d", "size": MB}));
    assert!(error["desc"].as_str().unwrap().contains("cannot be made shorter"), "{error}");
    create(dir.path(), "ro", "qcow2");
    let mut read_only = node(dir.path(), "r", "qcow2", "ro");
    read_only["read-only"] = json!(true);
    told.run("blockdev-add", read_only);
    let error = told.qmp.refused("block_resize", json!({"node-name": "r", "size": 8 * MB}));
    assert!(error["desc"].as_str().unwrap().contains("read-only"), "{error}");
    for name in ["d", "r"] {
        assert_eq!(told.node(name)["image"]["virtual-size"], json!(4 * MB));
    }
    // A refusal has left nothing behind: it is used by nobody.
    told.run("blockdev-del", json!({"node-name": "r"}));
    told.quit();
}

#[test]
fn a_write_behind_a_threshold_is_told_of_once() {
    same("qcow2", |told| {
        told.run("block-export-add", export("d", true));
        let set = |told: &mut Told, at: i64| {
            told.ask("block-set-write-threshold", json!({"node-name": "d", "write-threshold": at}));
            told.threshold("d");
        };
        set(told, 64 << 10);
        told.guest("d", &["write 0 64k", "discard 1M 64k", "read 2M 64k"]);
        told.threshold("d");
        told.guest("d", &["write 512 64k", "write 1M 64k"]);
        told.event("BLOCK_WRITE_THRESHOLD");
        told.threshold("d");
        set(told, 128 << 10);
        set(told, 192 << 10);
        told.guest("d", &["write -z 1M 64k"]);
        told.event("BLOCK_WRITE_THRESHOLD");
        set(told, 64 << 10);
        set(told, 0);
        told.guest("d", &["write 1M 64k"]);
        set(told, -1);
        told.guest("d", &["write 1M 64k"]);
        for arguments in [
            json!({"node-name": "d"}),
            json!({"write-threshold": 1}),
            json!({"node-name": "nope", "write-threshold": 1}),
            json!({"node-name": "d", "write-threshold": 1, "foo": 1}),
            json!({"node-name": "d", "write-threshold": "1"}),
        ] {
            told.ask("block-set-write-threshold", arguments);
        }
        told.ask("block-export-del", json!({"id": "d"}));
        let told_of = told.qmp.seen.iter().filter(|event| event["event"] == "BLOCK_WRITE_THRESHOLD").count();
        told.answers.push(json!(told_of));
        told.qmp.wait_for("BLOCK_EXPORT_DELETED");
        // A node of the same name has none.
        told.ask("blockdev-del", json!({"node-name": "d"}));
        told.run("blockdev-add", node(&told.dir, "d", "qcow2", "disk"));
        told.threshold("d");
    });
}

#[test]
fn a_header_names_another_backing_and_what_is_open_stays() {
    let format = "qcow2";
    same("raw", |told| {
        create(&told.dir, "top", format);
        create(&told.dir, "other", format);
        told.run("blockdev-add", node(&told.dir, "x", format, "other"));
        let mut top = node(&told.dir, "o", format, "top");
        top["backing"] = json!("d");
        told.run("blockdev-add", top);
        told.run("block-export-add", export("o", true));
        let ask = |told: &mut Told, device: &str, image: &str, name: &str| {
            let arguments = json!({"device": device, "image-node-name": image, "backing-file": name});
            told.ask("change-backing-file", arguments);
        };
        let names = |told: &mut Told, name: Value| {
            let info = run("qemu-img", &["info", "-U", "--output=json", text(&told.dir.join("top"))]);
            let info: Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["backing-filename"], name, "{info}");
        };
        ask(told, "o", "o", "disk");
        names(told, json!("disk"));
        told.guest("o", &["write -P 5 0 64k", "read -P 0 1M 64k"]);
        ask(told, "o", "o", "");
        names(told, Value::Null);
        ask(told, "o", "o", "disk");
        ask(told, "nope", "o", "y");
        ask(told, "o", "nope", "y");
        ask(told, "o", "d", "y");
        ask(told, "x", "x", "y");
        ask(told, "x", "o", "y");
        ask(told, "d", "o", "y");
        told.ask("change-backing-file", json!({"device": "o", "image-node-name": "o"}));
        told.ask("change-backing-file", json!({"device": "o", "backing-file": "y"}));
        told.ask("change-backing-file", json!({"image-node-name": "o", "backing-file": "y"}));
        names(told, json!("disk"));
        told.guest("o", &["read -P 5 0 64k", "read -P 0 1M 64k"]);
    });
}

#[test]
fn a_raw_backing_is_named_as_raw_so_that_its_guest_cannot_say_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    create(dir.path(), "disk", "raw");
    create(dir.path(), "top", "qcow2");
    let mut told = Told::start(Program::Infill, dir.path(), "raw");
    let mut top = node(dir.path(), "o", "qcow2", "top");
    top["backing"] = json!("d");
    told.run("blockdev-add", top);
    let long = "x".repeat(1024);
    for (name, works) in [("disk", true), (long.as_str(), false)] {
        let arguments = json!({"device": "o", "image-node-name": "o", "backing-file": name});
        let answer = told.qmp.ask("change-backing-file", arguments);
        assert_eq!(answer.get("return").is_some(), works, "{answer}");
    }
    told.quit();
    let info = run("qemu-img", &["info", "--output=json", text(&dir.path().join("top"))]);
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(
        (&info["backing-filename"], &info["backing-filename-format"]),
        (&json!("disk"), &json!("raw"))
    );
    run("qemu-img", &["check", "-q", text(&dir.path().join("top"))]);
}

#[test]
fn the_older_names_of_exports_are_answered_the_same() {
    same("raw", |told| {
        create(&told.dir, "ro", "raw");
        let mut read_only = node(&told.dir, "r", "raw", "ro");
        read_only["read-only"] = json!(true);
        told.run("blockdev-add", read_only);
        told.run("block-dirty-bitmap-add", json!({"node": "d", "name": "b"}));
        for arguments in [
            json!({"device": "r", "writable": true}),
            json!({"device": "d", "writable": true, "bitmap": "nope"}),
            json!({"device": "d", "name": "e", "writable": true, "bitmap": "b", "description": "x"}),
            json!({"device": "d", "name": "e"}),
            json!({"device": "nope"}),
            json!({"device": "d", "name": "f", "foo": 1}),
            json!({"device": "d", "name": "not an id"}),
            json!({"name": "f"}),
        ] {
            told.ask("nbd-server-add", arguments);
            told.ask("query-block-exports", json!({}));
        }
        told.guest("e", &["write -P 9 0 64k"]);
        for arguments in [
            json!({"name": "nope"}),
            json!({"name": "e", "mode": "x"}),
            json!({"name": "e", "foo": 1}),
            json!({}),
            json!({"name": "e", "mode": "hard"}),
        ] {
            told.ask("nbd-server-remove", arguments);
        }
        told.event("BLOCK_EXPORT_DELETED");
        told.ask("query-block-exports", json!({}));
        told.ask("nbd-server-stop", json!({}));
        told.ask("nbd-server-add", json!({"device": "d"}));
        told.ask("nbd-server-remove", json!({"name": "d"}));
    });
}

#[test]
fn an_export_of_the_older_name_is_there_after_a_restart_and_one_that_was_taken_away_is_not() {
    let dir = tempfile::tempdir().unwrap();
    create(dir.path(), "disk", "raw");
    let state = dir.path().join("state");
    let socket = dir.path().join("nbd.sock");
    let address = json!({"type": "unix", "data": {"path": text(&socket)}});
    let options = ["--state", text(&state)];
    let daemon = Daemon::start(Program::Infill, dir.path(), &options);
    let mut qmp = daemon.connect();
    qmp.run("blockdev-add", node(dir.path(), "d", "raw", "disk"));
    qmp.run("nbd-server-start", json!({"addr": address}));
    qmp.run("nbd-server-add", json!({"device": "d", "name": "kept"}));
    qmp.run("nbd-server-add", json!({"device": "d", "name": "gone"}));
    qmp.run("nbd-server-remove", json!({"name": "gone"}));
    let before = qmp.run("query-block-exports", json!({}));
    daemon.quit(&mut qmp);
    let daemon = Daemon::start(Program::Infill, dir.path(), &options);
    let mut qmp = daemon.connect();
    assert_eq!(qmp.run("query-block-exports", json!({})), before);
    assert_eq!(before.as_array().map(Vec::len), Some(1));
    run("nbdinfo", &["--size", &format!("nbd+unix:///kept?socket={}", text(&socket))]);
    daemon.quit(&mut qmp);
}
