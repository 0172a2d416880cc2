//! A guest with a file system under load, while its disk is snapshotted, committed twice and mirrored under it.

use std::path::Path;
use std::process::Command;

use crate::common::{INFILL, Process, run, text, wait_until};
use crate::guest::{self, Console};
use crate::qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

/// Records that the guest writes between one change and the next.
const RECORDS: u64 = 8;

fn power_on(dir: &Path, socket: &Path, console: &Console) -> Process {
    let drive = format!("driver=nbd,server.type=unix,server.path={},export=disk,discard=unmap", text(socket));
    let command = Command::new("qemu-system-x86_64");
    let control = dir.join("guest.sock");
    Process::start(&mut guest::machine(command, dir, &drive, console, &control))
}

struct Scene<'a> {
    dir: &'a Path,
    qmp: Qmp,
    console: &'a Console,
}

impl Scene<'_> {
    /// A node over an image file of its own, with nothing below it yet.
    fn image(&mut self, name: &str, format: &str, mib: u64) {
        let path = self.dir.join(name);
        run(INFILL, &["create", "-q", "-f", format, text(&path), &format!("{mib}M")]);
        let file = json!({"driver": "file", "filename": path, "discard": "unmap"});
        let mut node = json!({"driver": format, "node-name": name, "file": file, "discard": "unmap"});
        if format != "raw" {
            node["backing"] = Value::Null;
        }
        self.qmp.run("blockdev-add", node);
    }

    fn exported(&mut self) -> Value {
        self.qmp.run("query-block-exports", json!({}))[0]["node-name"].clone()
    }

    /// Runs a job to its end under the guest, which writes on before, meanwhile and after.
    fn job(&mut self, command: &str, mut arguments: Value, leads_to: &str) {
        arguments["job-id"] = json!("j");
        self.qmp.run(command, arguments);
        let ended = loop {
            let event = self.qmp.event(|event| {
                ["BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED"].contains(&event["event"].as_str().unwrap())
            });
            if event["event"] == "BLOCK_JOB_COMPLETED" {
                break event;
            }
            self.console.wait_for_records(RECORDS);
            self.qmp.run("job-complete", json!({"id": "j"}));
        };
        assert!(ended["data"].get("error").is_none(), "{command}: {ended}");
        assert_eq!(self.exported(), leads_to, "after {command}");
        self.console.wait_for_records(RECORDS);
    }
}

#[test]
fn a_guest_writes_on_while_its_disk_is_snapshotted_committed_and_mirrored() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mib = 96;
    let base_sum = guest::disk(dir, &dir.join("base"), mib);
    let daemon = Daemon::start(Program::Infill, dir, &[]);
    let console = Console(dir.join("console"));
    let mut scene = Scene { dir, qmp: daemon.connect(), console: &console };
    let file = json!({"driver": "file", "filename": dir.join("base"), "discard": "unmap"});
    let base = json!({"driver": "raw", "node-name": "base", "file": file, "discard": "unmap"});
    scene.qmp.run("blockdev-add", base);
    let socket = dir.join("nbd.sock");
    scene.qmp.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "base", "writable": true, "name": "disk"});
    scene.qmp.run("block-export-add", export);
    let mut machine = power_on(dir, &socket, &console);
    console.wait_for("GUEST-IS-UP");
    console.wait_for_records(RECORDS);

    for (below, name, format) in [("base", "first", "qcow2"), ("first", "second", "qed")] {
        scene.image(name, format, mib);
        scene.qmp.run("blockdev-snapshot", json!({"node": below, "overlay": name}));
        assert_eq!(scene.exported(), name);
        console.wait_for_records(RECORDS);
    }
    scene.job(
        "block-commit",
        json!({"device": "second", "top-node": "first", "base-node": "base"}),
        "second",
    );
    // It has nothing to say any more, and would see the base change.
    scene.qmp.run("blockdev-del", json!({"node-name": "first"}));
    scene.job("block-commit", json!({"device": "second"}), "base");
    scene.qmp.run("blockdev-del", json!({"node-name": "second"}));
    scene.image("target", "qcow2", mib);
    scene.job("blockdev-mirror", json!({"device": "base", "target": "target", "sync": "full"}), "target");

    Qmp::connect(&dir.join("guest.sock")).run("system_powerdown", json!({}));
    let last = console.wait_for("GUEST-ENDS").parse().unwrap();
    assert_eq!(console.last("GUEST-READ"), Some(base_sum));
    wait_until("the machine is off", || machine.0.try_wait().unwrap().is_some());
    daemon.quit(&mut scene.qmp);
    let (target, raw) = (dir.join("target"), dir.join("judged"));
    run("qemu-img", &["check", "-q", text(&target)]);
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&target), text(&raw)]);
    guest::judge(dir, &raw, last);
}
