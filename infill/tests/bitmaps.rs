//! Dirty bitmaps: the same commands, and the same guest writes, given to our daemon and to qemu-storage-daemon, leave the same
//! bitmaps, and clients are told the same of them.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::path::Path;

use common::{run, text};
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

/// Size of the test's disks.
const DISK: &str = "4M";

/// A daemon with a disk in `dir/disk` under the name `d`, exported for writing, and what it has answered so far.
struct Told {
    daemon: Daemon,
    qmp: Qmp,
    uri: String,
    answers: Vec<Value>,
}

impl Told {
    fn start(program: Program, dir: &Path, format: &str) -> Told {
        let socket = dir.join("nbd.sock");
        let server = format!("addr.type=unix,addr.path={}", text(&socket));
        let daemon = Daemon::start(program, dir, &["--nbd-server", &server]);
        let mut qmp = daemon.connect();
        qmp.run("blockdev-add", node(dir, format));
        let uri = format!("nbd+unix:///w?socket={}", text(&socket));
        qmp.run("block-export-add", export("w", &[]));
        Told { daemon, qmp, uri, answers: Vec::new() }
    }

    fn ask(&mut self, command: &str, arguments: Value) {
        let answer = self.qmp.ask(command, arguments.clone());
        self.answers.push(json!({"to": command, "with": arguments, "answer": answer}));
    }

    fn bitmap(&mut self, verb: &str, name: &str) {
        self.ask(&format!("block-dirty-bitmap-{verb}"), json!({"node": "d", "name": name}));
    }

    /// What is known of the bitmaps of `d`.
    fn look(&mut self) {
        let nodes = self.qmp.run("query-named-block-nodes", json!({"flat": true}));
        let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "d").unwrap();
        let bitmaps = node["dirty-bitmaps"].clone();
        for bitmap in bitmaps.as_array().into_iter().flatten() {
            let name = bitmap["name"].as_str().unwrap();
            self.ask("x-debug-block-dirty-bitmap-sha256", json!({"node": "d", "name": name}));
        }
        self.answers.push(bitmaps);
    }

    fn guest(&mut self, commands: &[&str]) {
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        let args: Vec<&str> = ["-f", "raw"].into_iter().chain(commands).chain([self.uri.as_str()]).collect();
        run("qemu-io", &args);
    }

    /// What a client of the export is told of a bitmap.
    fn map(&mut self, export: &str, bitmap: &str) {
        let uri = self.uri.replace("/w?", &format!("/{export}?"));
        let map = run("nbdinfo", &["--json", &format!("--map=qemu:dirty-bitmap:{bitmap}"), &uri]);
        self.answers.push(serde_json::from_str(&map).unwrap());
    }

    fn quit(mut self) -> Vec<Value> {
        self.daemon.quit(&mut self.qmp);
        self.answers
    }
}

fn node(dir: &Path, format: &str) -> Value {
    json!({"driver": format, "node-name": "d", "discard": "unmap",
        "file": {"driver": "file", "filename": text(&dir.join("disk"))}})
}

fn export(name: &str, bitmaps: &[&str]) -> Value {
    json!({"type": "nbd", "id": name, "name": name, "node-name": "d", "writable": true, "bitmaps": bitmaps})
}

/// Runs `script` on both, each with a disk of `format`, and compares what they have answered.
fn same(format: &str, script: impl Fn(&mut Told)) {
    let [ours, theirs] = [Program::Infill, Program::Qemu].map(|program| {
        let dir = tempfile::tempdir().unwrap();
        run("qemu-img", &["create", "-q", "-f", format, text(&dir.path().join("disk")), DISK]);
        let mut told = Told::start(program, dir.path(), format);
        script(&mut told);
        told.quit()
    });
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs, "ours, then qemu-storage-daemon's");
    }
    assert_eq!(ours.len(), theirs.len());
}

#[test]
fn what_is_wrong_with_a_command_is_told_the_same() {
    same("raw", |told| {
        let long = "x".repeat(1024);
        for arguments in [
            json!({"node": "d", "name": "b"}),
            json!({"node": "d", "name": "b"}),
            json!({"node": "d", "name": ""}),
            json!({"node": "nope", "name": "b"}),
            json!({"node": "d", "name": long}),
            json!({"node": "d", "name": long[1..]}),
            json!({"node": "d", "name": "g", "granularity": 511}),
            json!({"node": "d", "name": "g", "granularity": 768}),
            json!({"node": "d", "name": "g", "granularity": 512, "disabled": true}),
            json!({"node": "d", "name": "h", "granularity": 1_u64 << 31}),
            json!({"node": "d", "name": "i", "granularity": 1_u64 << 32}),
            json!({"node": "d", "name": "i", "granularity": -5}),
            json!({"node": "d", "name": "i", "foo": 1}),
            json!({"node": "d"}),
            json!({"name": "i"}),
        ] {
            told.ask("block-dirty-bitmap-add", arguments);
        }
        for verb in ["remove", "clear", "enable", "disable"] {
            told.bitmap(verb, "nope");
            told.ask(&format!("block-dirty-bitmap-{verb}"), json!({"node": "nope", "name": "b"}));
        }
        told.bitmap("disable", "b");
        told.bitmap("disable", "b");
        told.bitmap("enable", "g");
        for (target, bitmaps) in [
            ("b", json!(["g", "nope"])),
            ("nope", json!(["g"])),
            ("b", json!([{"node": "nope", "name": "g"}])),
            ("b", json!([{"node": "d"}])),
            ("b", json!([7])),
            ("b", json!(7)),
            ("b", json!(["b"])),
            ("b", json!(["g", {"node": "d", "name": "h"}])),
        ] {
            told.ask("block-dirty-bitmap-merge", json!({"node": "d", "target": target, "bitmaps": bitmaps}));
        }
        told.look();
    });
}

#[test]
fn guest_writes_leave_the_same_bitmaps() {
    for format in ["raw", "qcow2"] {
        same(format, |told| {
            told.bitmap("add", "a");
            for (name, granularity) in [("fine", 512), ("coarse", 1 << 20)] {
                told.ask(
                    "block-dirty-bitmap-add",
                    json!({"node": "d", "name": name, "granularity": granularity}),
                );
            }
            told.guest(&[
                "write -P 1 1000 5000",
                "write -z 1M 64k",
                "discard 2M 128k",
                "write -P 2 4193792 512",
            ]);
            told.look();
            told.bitmap("disable", "a");
            told.bitmap("clear", "fine");
            told.guest(&["write -P 3 3M 4k"]);
            told.look();
            told.ask(
                "block-dirty-bitmap-merge",
                json!({"node": "d", "target": "a", "bitmaps": ["fine", "coarse"]}),
            );
            told.look();
            told.bitmap("remove", "coarse");
            told.bitmap("clear", "a");
            told.look();
        });
    }
}

#[test]
fn clients_are_told_what_a_bitmap_says_and_nobody_changes_it_meanwhile() {
    same("qcow2", |told| {
        told.bitmap("add", "a");
        told.bitmap("add", "b");
        told.guest(&["write -P 1 0 64k", "write -P 1 192k 4k", "write -P 1 1M 1M"]);
        told.bitmap("disable", "b");
        told.ask("block-export-add", export("e", &["nope"]));
        told.ask(
            "block-export-add",
            json!({"type": "nbd", "id": "r", "name": "r", "node-name": "d", "bitmaps": ["a"]}),
        );
        told.ask("block-export-add", export("twice", &["a", "a"]));
        told.ask("block-export-del", json!({"id": "twice"}));
        told.qmp.wait_for("BLOCK_EXPORT_DELETED");
        told.ask("block-export-add", export("e", &["a", "b"]));
        told.ask("block-export-add", export("f", &["a"]));
        told.map("e", "a");
        told.guest(&["write -P 1 3M 512"]);
        told.map("e", "a");
        told.map("e", "b");
        told.look();
        for verb in ["remove", "clear", "enable"] {
            told.bitmap(verb, "b");
        }
        told.ask("block-dirty-bitmap-merge", json!({"node": "d", "target": "b", "bitmaps": ["a"]}));
        told.ask("block-export-del", json!({"id": "e"}));
        told.qmp.wait_for("BLOCK_EXPORT_DELETED");
        told.bitmap("remove", "b");
        told.look();
        let listed = run("nbdinfo", &["--json", "--list", &told.uri.replace("/w?", "/?")]);
        assert!(!listed.contains("dirty-bitmap"), "{listed}");
    });
}

/// What is written to a part of a cluster of an increment must not hide the rest of what the increment lies on later.
#[test]
fn an_increment_of_blocks_smaller_than_its_clusters_is_the_disk_on_its_base() {
    for program in [Program::Infill, Program::Qemu] {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| text(&dir.path().join(name)).to_owned();
        std::fs::write(path("disk"), vec![1; 4 << 20]).unwrap();
        std::fs::write(path("full"), vec![1; 4 << 20]).unwrap();
        let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &path("full")];
        run("qemu-img", &[&create[..], &["-o", "cluster_size=2M", &path("inc")]].concat());
        let mut told = Told::start(program, dir.path(), "raw");
        let bitmap = json!({"node": "d", "name": "b", "granularity": 4096});
        told.qmp.run("block-dirty-bitmap-add", bitmap);
        told.guest(&["write -P 9 708k 4k", "write -P 9 3200k 12k"]);
        let file = json!({"driver": "file", "filename": path("inc")});
        let target = json!({"driver": "qcow2", "node-name": "t", "backing": null, "file": file});
        told.qmp.run("blockdev-add", target);
        let backup =
            json!({"job-id": "j", "device": "d", "target": "t", "sync": "incremental", "bitmap": "b"});
        told.qmp.run("blockdev-backup", backup);
        told.qmp.wait_for("BLOCK_JOB_COMPLETED");
        told.quit();
        run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &path("disk"), &path("inc")]);
    }
}
