//! One node in the place of another under a client that writes all the time.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::io::{BufRead as _, BufReader};

use common::{Process, run, text};
use qmp::{Daemon, Program};
use serde_json::json;

/// Writes numbered blocks one after the other, each with the number of its turn, until told to end; then says how many.
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
h.flush()
print(n, flush=True)
"#;

/// What the writer has left: the last number of each block.
fn expected(turns: u64, blocks: u64) -> Vec<u8> {
    let mut last = vec![None; blocks as usize];
    for turn in 0..turns {
        last[(turn * 7 % blocks) as usize] = Some(turn);
    }
    let block = |turn: &Option<u64>| turn.map_or([0; 8], u64::to_be_bytes).repeat(512);
    last.iter().flat_map(block).collect()
}

#[test]
fn snapshots_under_a_writing_client_lose_no_write_and_tear_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| text(&dir.path().join(name)).to_owned();
    let blocks: u64 = 256;
    let size = (blocks * 4096).to_string();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path("s0"), &size]);
    for n in 1..=8 {
        let (below, name) = (path(&format!("s{}", n - 1)), path(&format!("s{n}")));
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &below, "-F", "qcow2", "-u", &name, &size]);
    }
    let mut daemon = Daemon::start(Program::Infill, dir.path(), &[]);
    let mut qmp = daemon.connect();
    let add = |n: u32| {
        json!({"driver": "qcow2", "node-name": format!("s{n}"), "backing": null, "discard": "unmap",
               "file": {"driver": "file", "filename": path(&format!("s{n}"))}})
    };
    qmp.run("blockdev-add", add(0));
    let socket = dir.path().join("nbd.sock");
    qmp.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
    qmp.run(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "s0", "writable": true, "name": "d"}),
    );
    let uri = format!("nbd+unix:///d?socket={}", text(&socket));
    let mut writer = std::process::Command::new("nbdsh");
    writer
        .args(["-c", WRITER])
        .env("URI", &uri)
        .env("END", path("end"))
        .env("PATH", format!("/usr/bin:/bin:{}", std::env::var("PATH").unwrap_or_default()))
        .stdout(std::process::Stdio::piped());
    let mut writer = Process::start(&mut writer);
    let mut told = BufReader::new(writer.0.stdout.take().unwrap()).lines();
    assert_eq!(told.next().unwrap().unwrap(), "ready");
    for n in 1..=8 {
        qmp.run("blockdev-add", add(n));
        let (below, top) = (format!("s{}", n - 1), format!("s{n}"));
        qmp.run("blockdev-snapshot", json!({"node": below, "overlay": top}));
        let exports = qmp.run("query-block-exports", json!({}));
        assert_eq!(exports[0]["node-name"], json!(top));
        // What is below now belongs to the snapshot alone.
        let again = qmp.refused("blockdev-snapshot", json!({"node": below, "overlay": top}));
        let busy = format!("Node '{below}' is busy: node is used as backing hd of '{top}'");
        assert_eq!(again["desc"], json!(busy));
        assert!(qmp.refused("blockdev-del", json!({"node-name": below}))["desc"].is_string());
        // Until the client has written to the new top too.
        common::wait_until("a write lands in the overlay", || {
            let nodes = qmp.run("query-named-block-nodes", json!({"flat": true}));
            let top = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == json!(top)).unwrap();
            top["image"]["actual-size"].as_u64().unwrap() > 256 << 10
        });
    }
    std::fs::write(path("end"), "").unwrap();
    let turns: u64 = told.next().unwrap().unwrap().parse().unwrap();
    writer.wait_for_success();
    qmp.run("quit", json!({}));
    daemon.process.wait_for_success();
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &path("s8"), &path("raw")]);
    assert!(std::fs::read(path("raw")).unwrap() == expected(turns, blocks), "after {turns} writes");
    for n in 0..=8 {
        run("qemu-img", &["check", "-q", "-f", "qcow2", &path(&format!("s{n}"))]);
    }
}
