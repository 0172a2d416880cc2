//! What `query-blockstats` counts of nodes, and where the highest byte lies that was written: managers grow block devices by it.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::path::Path;

use common::{run, text};
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

fn serve(qmp: &mut Qmp, dir: &Path, node: &str) -> String {
    let socket = dir.join(format!("{node}.sock"));
    qmp.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": text(&socket)}}}));
    qmp.run(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": node, "name": "disk", "writable": true}),
    );
    format!("nbd+unix:///disk?socket={}", text(&socket))
}

fn io(uri: &str, commands: &[&str]) {
    let mut args = vec!["-f", "raw", "-d", "unmap", uri];
    for command in commands {
        args.extend(["-c", command]);
    }
    run("qemu-io", &args);
}

fn told(qmp: &mut Qmp, node: &str) -> Value {
    let all = qmp.run("query-blockstats", json!({"query-nodes": true}));
    all.as_array()
        .unwrap()
        .iter()
        .find(|told| told["node-name"] == node)
        .expect("the node is told of")
        .clone()
}

fn images(dir: &Path) {
    std::fs::write(dir.join("r.img"), vec![7; 4 << 20]).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&dir.join("q.img")), "64M"]);
}

fn add(qmp: &mut Qmp, dir: &Path, format: &str, name: &str) {
    let filename = dir.join(format!("{name}.img"));
    qmp.run(
        "blockdev-add",
        json!({"driver": format, "node-name": name, "discard": "unmap",
            "file": {"driver": "file", "node-name": format!("{name}f"), "filename": text(&filename)}}),
    );
}

/// The members, and where the highest write ended, of the node and of the file below it.
#[test]
fn the_highest_write_and_what_is_told_are_the_referees() {
    let ask = |program: Program| {
        let dir = tempfile::tempdir().unwrap();
        images(dir.path());
        let daemon = Daemon::start(program, dir.path(), &[]);
        let mut qmp = daemon.connect();
        add(&mut qmp, dir.path(), "raw", "r");
        let uri = serve(&mut qmp, dir.path(), "r");
        let mut highest = Vec::new();
        for commands in [
            &["read 2M 4k"][..],
            &["write -P 1 1M 8k"],
            &["write -P 1 0 4k", "flush"],
            &["write -z 2M 64k", "discard 3M 64k"],
        ] {
            io(&uri, commands);
            let told = [told(&mut qmp, "r"), told(&mut qmp, "rf")];
            assert_eq!(told[0]["parent"]["stats"], told[1]["stats"]);
            highest.push(told.map(|told| told["stats"]["wr_highest_offset"].as_u64().unwrap()));
        }
        let told = told(&mut qmp, "r");
        let members = |value: &Value| {
            value.as_object().unwrap().keys().cloned().collect::<std::collections::BTreeSet<String>>()
        };
        let members = [members(&told), members(&told["stats"]), members(&told["parent"])];
        let discards = told["parent"]["driver-specific"].clone();
        daemon.quit(&mut qmp);
        (highest, members, discards)
    };
    let ours = ask(Program::Infill);
    assert_eq!(ours, ask(Program::Qemu));
    let mib = 1 << 20;
    assert_eq!(ours.0, [[0; 2], [mib + 8192; 2], [mib + 8192; 2], [2 * mib + 65536; 2]]);
}

#[test]
fn requests_are_counted_at_the_node_that_they_reach() {
    let dir = tempfile::tempdir().unwrap();
    images(dir.path());
    let daemon = Daemon::start(Program::Infill, dir.path(), &[]);
    let mut qmp = daemon.connect();
    add(&mut qmp, dir.path(), "qcow2", "q");
    let uri = serve(&mut qmp, dir.path(), "q");
    let before = told(&mut qmp, "q")["stats"].clone();
    io(&uri, &["write -P 1 8M 64k", "write -P 1 0 4k", "read 8M 64k", "discard 16M 1M", "flush"]);
    let stats = told(&mut qmp, "q")["stats"].clone();
    let more = |name: &str| stats[name].as_u64().unwrap() - before[name].as_u64().unwrap();
    assert_eq!((more("wr_operations"), more("wr_bytes")), (2, 65536 + 4096));
    assert_eq!((more("unmap_operations"), more("unmap_bytes")), (1, 1 << 20));
    assert!(more("rd_operations") >= 1 && more("rd_bytes") >= 65536, "{stats}");
    assert!(more("flush_operations") >= 1, "{stats}");
    for kind in ["rd", "wr", "flush"] {
        assert!(more(&format!("{kind}_total_time_ns")) > 0, "{kind}: {stats}");
    }
    for kind in ["rd", "wr", "flush", "unmap"] {
        assert_eq!(stats[format!("failed_{kind}_operations")], 0, "{kind}: {stats}");
    }
    assert_eq!(stats["wr_highest_offset"], (8 << 20) + 65536);
    // What the image has written of its file ends where the file does, whose size is what a device would have to have.
    let file = told(&mut qmp, "qf")["stats"].clone();
    let highest = file["wr_highest_offset"].as_u64().unwrap();
    let size = std::fs::metadata(dir.path().join("q.img")).unwrap().len();
    assert!(highest > 4 * 65536 && highest <= size, "{highest} of {size}");
    assert!(file["wr_bytes"].as_u64().unwrap() >= 65536 + 4096, "{file}");
    daemon.quit(&mut qmp);
}
