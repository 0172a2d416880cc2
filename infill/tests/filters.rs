//! Filters, what nodes make of writes of zeroes, and thresholds of files below images: given to our daemon and to
//! qemu-storage-daemon, they are answered the same, and leave the same disks.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{Process, fails, run, text, wait_until};
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

/// A daemon with an NBD server in `dir`, and what it has answered so far.
struct Told {
    daemon: Daemon,
    qmp: Qmp,
    dir: PathBuf,
    answers: Vec<Value>,
}

impl Told {
    fn start(program: Program, dir: &Path, more: &[&str]) -> Told {
        let server = format!("addr.type=unix,addr.path={}", text(&dir.join("nbd.sock")));
        let options: Vec<&str> = ["--nbd-server", &server].into_iter().chain(more.iter().copied()).collect();
        let daemon = Daemon::start(program, dir, &options);
        let qmp = daemon.connect();
        Told { daemon, qmp, dir: dir.to_owned(), answers: Vec::new() }
    }

    fn path(&self, name: &str) -> String {
        text(&self.dir.join(name)).to_owned()
    }

    fn file(&self, name: &str) -> Value {
        json!({"driver": "file", "filename": self.path(name)})
    }

    fn ask(&mut self, command: &str, arguments: Value) {
        let answer = self.qmp.ask(command, arguments.clone());
        let told = json!({"to": command, "with": arguments, "answer": answer}).to_string();
        let told = told.replace(text(&self.dir), "DIR");
        self.answers.push(serde_json::from_str(&told).unwrap());
    }

    fn add(&mut self, node: Value) {
        self.qmp.run("blockdev-add", node);
    }

    fn qcow2(&mut self, name: &str, more: Value) {
        let mut node = json!({"driver": "qcow2", "node-name": name, "file": self.file(name)});
        node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.add(node);
    }

    fn export(&mut self, node: &str) {
        let export = json!({"type": "nbd", "id": node, "name": node, "node-name": node, "writable": true});
        self.qmp.run("block-export-add", export);
    }

    fn guest_args(&self, export: &str, commands: &[&str]) -> Vec<String> {
        let uri = format!("nbd+unix:///{export}?socket={}", self.path("nbd.sock"));
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        ["-f", "raw", "-t", "none"]
            .into_iter()
            .chain(commands)
            .chain([uri.as_str()])
            .map(str::to_owned)
            .collect()
    }

    fn guest(&self, export: &str, commands: &[&str]) {
        let args = self.guest_args(export, commands);
        run("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());
    }

    fn guest_fails(&self, export: &str, commands: &[&str]) -> String {
        let args = self.guest_args(export, commands);
        fails("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn quit(mut self) -> Vec<Value> {
        self.daemon.quit(&mut self.qmp);
        self.answers
    }
}

fn create(dir: &Path, name: &str) {
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&dir.join(name)), "4M"]);
}

/// Runs `script` on both, and compares what they have answered.
fn same(script: impl Fn(&mut Told)) {
    let [ours, theirs] = [Program::Infill, Program::Qemu].map(|program| {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            create(dir.path(), name);
        }
        let mut told = Told::start(program, dir.path(), &[]);
        script(&mut told);
        told.quit()
    });
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs, "ours, then qemu-storage-daemon's");
    }
    assert_eq!(ours.len(), theirs.len());
}

fn group(limits: Value) -> Value {
    json!({"qom-type": "throttle-group", "id": "g", "limits": limits})
}

#[test]
fn throttle_groups_and_their_refusals_are_the_same() {
    same(|told| {
        for limits in [
            json!({"iops-total": -1}),
            json!({"iops-total": 10, "iops-read": 3}),
            json!({"bps-total-max": 10}),
            json!({"bps-total": 10, "bps-total-max": 5}),
            json!({"bps-total": 10, "bps-total-max-length": 5}),
            json!({"bps-total": 10, "bps-total-max-length": 0}),
            json!({"bps-total": 10, "bps-total-max-length": -1}),
            json!({"bps-total": 10, "bps-total-max": 20, "bps-total-max-length": 1_u64 << 33}),
            json!({"bps-total": 10, "bps-total-max": 1_000_000_000_000_000_u64, "bps-total-max-length": 2}),
            json!({"iops-size": 3}),
            json!({"iops-total": 10_000_000_000_000_000_u64}),
            json!({"zz": 1}),
            json!({"iops-total": "1"}),
        ] {
            told.ask("object-add", group(limits));
        }
        for (name, value) in [
            ("x-iops-total", -1),
            ("x-bps-total-max", 10),
            ("x-bps-read-max-length", 0),
            ("x-bps-read-max-length", 1_i64 << 33),
            ("x-bps-read-max-length", -1),
            ("x-iops-size", -3),
            ("x-iops-size", 3),
            ("x-zz", 3),
        ] {
            told.ask("object-add", json!({"qom-type": "throttle-group", "id": "g", name: value}));
        }
        told.ask("object-add", json!({"qom-type": "throttle-group", "id": "h", "x-iops-read": 100}));
        told.ask("object-add", group(json!({"iops-total": 10, "iops-total-max": 20, "iops-size": 4096})));
        told.ask("object-add", group(json!({})));
        let throttle = |file: &str, group: &str| json!({"driver": "throttle", "node-name": "t", "file": file, "throttle-group": group});
        told.ask("blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": 1 << 20}));
        told.ask("blockdev-add", json!({"driver": "throttle", "node-name": "t", "file": "n"}));
        told.ask("blockdev-add", json!({"driver": "throttle", "node-name": "t", "throttle-group": "g"}));
        told.ask("blockdev-add", throttle("n", "zz"));
        told.ask("blockdev-add", throttle("zz", "g"));
        told.ask("blockdev-add", throttle("n", "g"));
        told.ask("object-del", json!({"id": "g"}));
        told.ask("blockdev-del", json!({"node-name": "n"}));
        told.ask("blockdev-del", json!({"node-name": "t"}));
        for id in ["g", "g", "h"] {
            told.ask("object-del", json!({"id": id}));
        }
    });
}

/// Whether what is read there is what is expected.
fn reads(told: &Told, export: &str, command: &str) -> bool {
    let args = told.guest_args(export, &[command]);
    let output = common::output("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());
    output.status.success()
}

#[test]
fn a_guest_that_its_limit_holds_back_delays_no_snapshot_and_no_end() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        create(dir.path(), name);
    }
    let mut told = Told::start(Program::Infill, dir.path(), &[]);
    told.qmp.run("object-add", group(json!({"bps-total": 1})));
    told.qcow2("a", json!({}));
    told.qcow2("b", json!({"backing": null}));
    told.add(json!({"driver": "throttle", "node-name": "t", "file": "a", "throttle-group": "g"}));
    told.export("t");
    let writing = |told: &Told, pattern: u8| {
        // The second one would wait for a day.
        let commands = [format!("write -P {pattern} 0 64k"), format!("write -P {pattern} 64k 64k")];
        let mut command = Command::new("qemu-io");
        command.args(told.guest_args("t", &[&commands[0], &commands[1]])).stdout(Stdio::null());
        Process::start(&mut command)
    };
    told.export("a");
    let mut first = writing(&told, 7);
    wait_until("the first write lands", || reads(&told, "a", "read -P 7 0 64k"));
    assert!(first.0.try_wait().unwrap().is_none(), "nothing has held the second write back");
    // Whoever holds the node does not wait for its limit.
    told.qmp.run("blockdev-snapshot", json!({"node": "t", "overlay": "b"}));
    first.wait_for_success();
    told.guest("a", &["read -P 7 64k 64k"]);
    // Nor does the end.
    create(dir.path(), "c");
    told.qcow2("c", json!({}));
    told.qmp.run("object-add", json!({"qom-type": "throttle-group", "id": "h", "limits": {"bps-total": 1}}));
    told.add(json!({"driver": "throttle", "node-name": "u", "file": "c", "throttle-group": "h"}));
    told.export("u");
    told.export("c");
    let mut command = Command::new("qemu-io");
    command.args(told.guest_args("u", &["write -P 9 0 64k", "write -P 9 64k 64k"]));
    let mut last = Process::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
    wait_until("the first write lands", || reads(&told, "c", "read -P 9 0 64k"));
    told.quit();
    last.0.wait().unwrap();
    run("qemu-img", &["check", "-q", "-f", "qcow2", text(&dir.path().join("a"))]);
}

#[test]
fn a_filter_goes_along_when_its_disk_gets_an_overlay() {
    same(|told| {
        told.qmp.run("object-add", group(json!({})));
        told.qcow2("a", json!({}));
        told.qcow2("b", json!({"backing": null}));
        told.add(json!({"driver": "throttle", "node-name": "t", "file": "a", "throttle-group": "g"}));
        told.export("t");
        told.guest("t", &["write -P 1 0 1M"]);
        told.ask("blockdev-snapshot", json!({"node": "a", "overlay": "b"}));
        told.guest("t", &["read -P 1 0 1M", "write -P 2 512k 1M"]);
        told.ask("blockdev-del", json!({"node-name": "b"}));
        told.ask("blockdev-del", json!({"node-name": "a"}));
        told.qmp.run("block-export-del", json!({"id": "t"}));
        told.qmp.wait_for("BLOCK_EXPORT_DELETED");
        told.ask("blockdev-del", json!({"node-name": "t"}));
        told.ask("blockdev-del", json!({"node-name": "b"}));
        told.ask("blockdev-del", json!({"node-name": "a"}));
        for (name, read) in [("a", "read -P 1 512k 512k"), ("b", "read -P 2 512k 1M")] {
            run("qemu-io", &["-f", "qcow2", "-c", read, &told.path(name)]);
        }
    });
}

#[test]
fn a_daemon_that_was_killed_has_its_filter_on_the_overlay() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        create(dir.path(), name);
    }
    let state = text(&dir.path().join("state")).to_owned();
    let options = ["--state", state.as_str()];
    let mut told = Told::start(Program::Infill, dir.path(), &options);
    told.qmp.run("object-add", group(json!({"iops-total": 1_000_000})));
    told.qcow2("a", json!({}));
    told.add(json!({"driver": "throttle", "node-name": "t", "file": "a", "throttle-group": "g"}));
    told.export("t");
    told.qcow2("b", json!({"backing": null}));
    told.qmp.run("blockdev-snapshot", json!({"node": "a", "overlay": "b"}));
    told.daemon.process.kill();
    std::fs::remove_file(dir.path().join("monitor.sock")).unwrap();
    let told = Told::start(Program::Infill, dir.path(), &options);
    told.guest("t", &["write -P 3 0 64k"]);
    told.quit();
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 0 0 64k", text(&dir.path().join("a"))]);
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 3 0 64k", text(&dir.path().join("b"))]);
}

#[test]
fn what_nodes_make_of_zeroes_is_the_same() {
    same(|told| {
        let node = |more: Value| {
            let mut node = json!({"driver": "qcow2", "node-name": "a", "file": told.file("a")});
            node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            node
        };
        let refused = [
            node(json!({"detect-zeroes": "unmap"})),
            node(json!({"detect-zeroes": "unmap", "discard": "ignore"})),
            node(json!({"detect-zeroes": "zz"})),
        ];
        for node in refused {
            told.ask("blockdev-add", node);
        }
        for mode in ["off", "on", "unmap"] {
            create(&told.dir, "a");
            told.qcow2("a", json!({"detect-zeroes": mode, "discard": "unmap"}));
            told.export("a");
            let writes =
                ["write -P 1 0 1M", "write -P 0 256k 256k", "write -P 0 2M 64k", "write -P 0 3M 512"];
            told.guest("a", &writes);
            told.qmp.run("block-export-del", json!({"id": "a"}));
            told.qmp.wait_for("BLOCK_EXPORT_DELETED");
            let nodes = told.qmp.run("query-named-block-nodes", json!({"flat": true}));
            let modes = nodes.as_array().unwrap().iter().map(|node| (&node["drv"], &node["detect_zeroes"]));
            let mut modes: Vec<_> = modes.map(|(drv, mode)| json!([drv, mode])).collect();
            modes.sort_by_key(Value::to_string);
            told.answers.push(json!(modes));
            told.qmp.run("blockdev-del", json!({"node-name": "a"}));
            let map = run("qemu-img", &["map", "--output=json", "-f", "qcow2", &told.path("a")]);
            let map: Value = serde_json::from_str(&map).unwrap();
            // Zeroes where nothing was need no entry in an image without a backing file.
            let mut runs: Vec<(bool, u64)> = Vec::new();
            for run in map.as_array().unwrap() {
                let (data, len) = (run["data"].as_bool().unwrap(), run["length"].as_u64().unwrap());
                match runs.last_mut().filter(|last| last.0 == data) {
                    Some(last) => last.1 += len,
                    None => runs.push((data, len)),
                }
            }
            told.answers.push(json!([mode, runs]));
        }
    });
}

#[test]
fn zeroes_that_a_format_writes_are_seen_by_the_file_below_it() {
    let dir = tempfile::tempdir().unwrap();
    run("truncate", &["-s", "4M", text(&dir.path().join("r"))]);
    let mut told = Told::start(Program::Infill, dir.path(), &[]);
    let mut file = told.file("r");
    file["detect-zeroes"] = json!("on");
    told.add(json!({"driver": "raw", "node-name": "d", "file": file}));
    told.export("d");
    told.guest("d", &["write -P 0 0 2M", "write -P 5 1M 64k", "read -P 0 0 1M", "read -P 5 1M 64k"]);
    let blocks = run("stat", &["-c", "%b", &told.path("r")]);
    assert!(blocks.trim().parse::<u64>().unwrap() * 512 <= 4 << 20, "{blocks}");
    told.quit();
}

#[test]
fn a_threshold_of_the_file_below_an_image_is_told_of_once() {
    same(|told| {
        let mut file = told.file("a");
        file["node-name"] = json!("f");
        told.add(json!({"driver": "qcow2", "node-name": "d", "file": file}));
        told.export("d");
        let threshold = |told: &mut Told| {
            let nodes = told.qmp.run("query-named-block-nodes", json!({"flat": true}));
            let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "f").unwrap();
            told.answers.push(node["write_threshold"].clone());
        };
        told.guest("d", &["write -P 1 0 64k"]);
        told.ask("block-set-write-threshold", json!({"node-name": "f", "write-threshold": 2 << 20}));
        threshold(told);
        told.guest("d", &["write -P 1 0 512k"]);
        threshold(told);
        told.guest("d", &["write -P 2 512k 3M", "write -P 3 0 64k"]);
        let event = told.qmp.wait_for("BLOCK_WRITE_THRESHOLD");
        told.answers.push(json!([event["data"]["node-name"], event["data"]["write-threshold"]]));
        threshold(told);
        told.qmp.run("block-export-del", json!({"id": "d"}));
        told.qmp.wait_for("BLOCK_EXPORT_DELETED");
        told.answers
            .push(json!(told.qmp.seen.iter().filter(|e| e["event"] == "BLOCK_WRITE_THRESHOLD").count()));
        told.qmp.run("blockdev-del", json!({"node-name": "d"}));
        run("qemu-img", &["check", "-q", "-f", "qcow2", &told.path("a")]);
    });
}

#[test]
fn faults_that_a_test_asks_for_come_as_they_come_of_the_others() {
    same(|told| {
        run("truncate", &["-s", "4M", &told.path("r")]);
        let blkdebug = |told: &Told, more: Value| {
            let mut image = json!({"driver": "blkdebug", "image": told.file("r")});
            image.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!({"driver": "raw", "node-name": "d", "file": image})
        };
        for refused in [
            json!({"align": 3}),
            json!({"align": -1}),
            json!({"align": 4096, "max-transfer": 1000}),
            json!({"inject-error": [{"event": "zz"}]}),
            json!({"inject-error": [{"event": "none", "iotype": "zz"}]}),
            json!({"inject-error": [{}]}),
            json!({"set-state": [{"event": "none"}]}),
        ] {
            let node = blkdebug(told, refused);
            told.ask("blockdev-add", node);
        }
        let rules = json!({
            "inject-error": [
                {"event": "write_aio", "iotype": "write", "errno": 28, "sector": 2048, "once": true},
                {"event": "read_aio", "iotype": "read", "state": 2, "errno": 5},
            ],
            "set-state": [{"event": "pwritev_zero", "state": 1, "new_state": 2}],
        });
        let node = blkdebug(told, rules);
        told.add(node);
        told.export("d");
        for (commands, works) in [
            (&["read 0 64k", "write -P 1 0 64k"][..], true),
            (&["write -P 1 1M 64k"][..], false),
            (&["write -P 1 1M 64k", "read -P 1 1M 64k"][..], true),
        ] {
            match works {
                true => told.guest("d", commands),
                false => assert!(told.guest_fails("d", commands).contains("No space left on device")),
            }
        }
        told.guest_fails("d", &["write -z 3M 64k", "read 0 64k"]);
        told.guest("d", &["write -P 1 2M 64k"]);
    });
}

#[test]
fn an_image_over_one_that_wants_large_pieces_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    create(dir.path(), "a");
    let mut told = Told::start(Program::Infill, dir.path(), &[]);
    let image = json!({"driver": "blkdebug", "image": told.file("a"), "align": 4096, "max-transfer": 65536});
    told.add(json!({"driver": "qcow2", "node-name": "d", "file": image}));
    told.export("d");
    told.guest(
        "d",
        &["write -P 1 512 1M", "write -P 2 1536 3584", "read -P 1 512 1k", "read -P 2 1536 3584"],
    );
    told.quit();
    run("qemu-img", &["check", "-q", "-f", "qcow2", text(&dir.path().join("a"))]);
    run(
        "qemu-io",
        &["-f", "qcow2", "-c", "read -P 1 5120 1000k", "-c", "read -P 0 0 512", text(&dir.path().join("a"))],
    );
}

#[test]
fn a_file_that_grows_ahead_is_given_back_what_nobody_wrote() {
    same(|told| {
        for (align, size) in [(3, 0), (512, -3)] {
            let node = json!({"driver": "preallocate", "node-name": "p", "file": told.file("a"),
                              "prealloc-align": align, "prealloc-size": size});
            told.ask("blockdev-add", node);
        }
        let file = json!({"driver": "preallocate", "node-name": "p", "file": told.file("a"),
                          "prealloc-size": 32 << 20});
        told.add(json!({"driver": "qcow2", "node-name": "d", "file": file}));
        told.export("d");
        told.guest("d", &["write -P 1 0 1M"]);
        let len = |told: &Told| std::fs::metadata(told.dir.join("a")).unwrap().len();
        assert!(len(told) >= 32 << 20, "{}", len(told));
        told.guest("d", &["write -P 1 1M 2M", "read -P 1 0 3M"]);
        told.qmp.run("block-export-del", json!({"id": "d"}));
        told.qmp.wait_for("BLOCK_EXPORT_DELETED");
        told.qmp.run("blockdev-del", json!({"node-name": "d"}));
        assert!(len(told) < 8 << 20, "{}", len(told));
        run("qemu-img", &["check", "-q", "-f", "qcow2", &told.path("a")]);
        run("qemu-io", &["-f", "qcow2", "-c", "read -P 1 0 3M", &told.path("a")]);
    });
}

#[test]
fn a_file_that_ignores_discards_keeps_its_space_under_an_image_that_gives_it_back() {
    use std::os::unix::fs::MetadataExt as _;

    for (discard, kept) in
        [(json!({}), true), (json!({"discard": "ignore"}), true), (json!({"discard": "unmap"}), false)]
    {
        same(|told| {
            let mut file = json!({"driver": "file", "node-name": "f", "filename": told.path("a")});
            file.as_object_mut().unwrap().extend(discard.as_object().unwrap().clone());
            told.add(file);
            told.add(json!({"driver": "qcow2", "node-name": "d", "file": "f", "discard": "unmap"}));
            told.export("d");
            told.guest("d", &["write -P 1 0 2M", "flush", "discard 0 2M", "flush", "read -P 0 0 2M"]);
            told.qmp.run("block-export-del", json!({"id": "d"}));
            told.qmp.wait_for("BLOCK_EXPORT_DELETED");
            told.qmp.run("blockdev-del", json!({"node-name": "d"}));
            let bytes = std::fs::metadata(told.dir.join("a")).unwrap().blocks() * 512;
            assert_eq!(bytes >= 2 << 20, kept, "{discard}: {bytes} bytes");
            run("qemu-img", &["check", "-q", "-f", "qcow2", &told.path("a")]);
        });
    }
}

#[test]
fn copy_on_read_keeps_what_lies_above_its_bottom_alone() {
    same(|told| {
        let (bottom, middle, top) = (told.path("a"), told.path("m"), told.path("t"));
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 4M", &bottom]);
        for (below, above) in [(&bottom, &middle), (&middle, &top)] {
            run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", above]);
        }
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 2 1M 1M", &middle]);
        let middle = json!({"driver": "qcow2", "node-name": "m", "file": told.file("m")});
        told.add(json!({"driver": "qcow2", "node-name": "t", "file": told.file("t"), "backing": middle}));
        let filter =
            |bottom: &str| json!({"driver": "copy-on-read", "node-name": "c", "file": "t", "bottom": bottom});
        told.ask("blockdev-add", filter("zz"));
        told.ask("blockdev-add", filter("m"));
        told.export("c");
        told.guest("c", &["read -P 1 0 1M", "read -P 2 1M 1M", "read -P 1 2M 2M"]);
        told.qmp.run("block-export-del", json!({"id": "c"}));
        told.qmp.wait_for("BLOCK_EXPORT_DELETED");
        told.ask("blockdev-del", json!({"node-name": "c"}));
        told.ask("blockdev-del", json!({"node-name": "t"}));
        let map = run("qemu-img", &["map", "--output=json", "-f", "qcow2", &top]);
        let map: Value = serde_json::from_str(&map).unwrap();
        let runs =
            map.as_array().unwrap().iter().map(|run| json!([run["start"], run["length"], run["depth"]]));
        told.answers.push(runs.collect());
    });
}

#[test]
fn limits_that_qom_set_has_changed_come_back_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let start = || {
        let daemon = Daemon::start(Program::Infill, dir.path(), &["--state", text(&state)]);
        let qmp = daemon.connect();
        (daemon, qmp)
    };
    let (daemon, mut qmp) = start();
    let group = |id: &str| json!({"qom-type": "throttle-group", "id": id, "limits": {"iops-total": 100}});
    qmp.run("object-add", group("g"));
    qmp.run("object-add", group("as-it-was"));
    let limits = |qmp: &mut Qmp, id: &str| {
        qmp.run("qom-get", json!({"path": format!("/objects/{id}"), "property": "limits"}))
    };
    let before = limits(&mut qmp, "as-it-was");
    let given = json!({"iops-total": 7, "bps-write": 1 << 20, "bps-write-max": 2 << 20});
    qmp.run("qom-set", json!({"path": "/objects/g", "property": "limits", "value": given}));
    let changed = limits(&mut qmp, "g");
    assert_eq!((&changed["iops-total"], &changed["bps-write-max"]), (&json!(7), &json!(2 << 20)));
    daemon.process.kill();
    let (daemon, mut qmp) = start();
    assert_eq!((limits(&mut qmp, "g"), limits(&mut qmp, "as-it-was")), (changed, before));
    daemon.quit(&mut qmp);
}
