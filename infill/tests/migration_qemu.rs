//! Stock QEMU at either end of a disk's move, as docs/migration.md has the recipes: a QEMU that is the source, read when it
//! is inactive (reads are all that it answers then), any NBD server that serves an image read-only, and a QEMU that is the
//! target, over an overlay of its own. Each with TLS and without.

#[path = "../../crates/nbd/tests/common/certs.rs"]
#[allow(dead_code, reason = "other tests use other parts")]
mod certs;
mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::path::Path;
use std::process::Command;

use certs::Certs;
use common::{Process, fails, run, text, wait_for_socket, wait_until};
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

const DISK_BYTES: u64 = 8 << 20;

/// An image with something in it, at the beginning and late.
fn image(dir: &Path) -> String {
    let path = text(&dir.join("source.qcow2")).to_owned();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path, &DISK_BYTES.to_string()]);
    let writes = ["-f", "qcow2", "-c", "write -P 0x5a 0 1M", "-c", "write -P 7 7M 64k", &path];
    run("qemu-io", &writes);
    path
}

fn creds(certs: &Certs, id: &str, endpoint: &str) -> Value {
    let dir = text(&certs.dir("good")).to_owned();
    json!({"qom-type": "tls-creds-x509", "id": id, "endpoint": endpoint, "dir": dir, "verify-peer": true})
}

/// Adds the node `source`: what the server at `socket` has under that name.
fn add_source(qmp: &mut Qmp, certs: Option<&Certs>, socket: &Path, name: &str) {
    let mut node = json!({"driver": "nbd", "node-name": "source", "export": name, "read-only": true});
    node["server"] = json!({"type": "unix", "path": text(socket)});
    if let Some(certs) = certs {
        qmp.run("object-add", creds(certs, "client", "client"));
        (node["tls-creds"], node["tls-hostname"]) = (json!("client"), json!("localhost"));
    }
    qmp.run("blockdev-add", node);
}

/// Has `program` take the disk at `socket` into an overlay, under a guest that writes, until it stands alone.
fn comes(program: Program, dir: &Path, certs: Option<&Certs>, socket: &Path, name: &str) {
    std::fs::create_dir(dir).unwrap();
    let overlay = dir.join("disk.qcow2");
    // Clusters as the daemon's own: a guest's write of whole sectors needs nothing of the source.
    let options = ["-o", "cluster_size=16k,extended_l2=on", text(&overlay), &DISK_BYTES.to_string()];
    run("qemu-img", &[&["create", "-q", "-f", "qcow2"][..], &options].concat());
    let daemon = Daemon::start(program, dir, &[]);
    let mut qmp = daemon.connect();
    add_source(&mut qmp, certs, socket, name);
    qmp.run("blockdev-add", json!({"driver": "file", "node-name": "file", "filename": text(&overlay)}));
    let node = json!({"driver": "qcow2", "node-name": "disk", "file": "file", "backing": "source"});
    qmp.run("blockdev-add", node);
    // What a guest reads is kept.
    let reads = json!({"driver": "copy-on-read", "node-name": "reads", "file": "disk"});
    qmp.run("blockdev-add", reads);
    let served = dir.join("nbd.sock");
    let addr = json!({"type": "unix", "data": {"path": text(&served)}});
    qmp.run("nbd-server-start", json!({"addr": addr}));
    qmp.run(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "reads", "name": "disk", "writable": true}),
    );
    let uri = format!("nbd+unix:///disk?socket={}", text(&served));
    let guest =
        |command: &str| assert!(!run("qemu-io", &["-f", "raw", "-c", command, &uri]).contains("failed"));
    guest("read -P 0x5a 512k 64k");
    guest("write -P 9 64k 512");
    qmp.run("block-stream", json!({"job-id": "fill", "device": "disk", "auto-dismiss": false}));
    guest("write -P 8 4M 64k");
    let mut last = Value::Null;
    wait_until("the rest is there", || {
        last = qmp.run("query-jobs", json!({}));
        last[0]["status"] == "concluded"
    });
    assert_eq!(last[0].get("error"), None, "{last}");
    qmp.run("job-dismiss", json!({"id": "fill"}));
    qmp.run("block-export-del", json!({"id": "e"}));
    qmp.run("nbd-server-stop", json!({}));
    daemon.quit(&mut qmp);
    let info: Value =
        serde_json::from_str(&run("qemu-img", &["info", "--output=json", text(&overlay)])).unwrap();
    assert_eq!(info.get("backing-filename"), None, "{info}");
    run("qemu-img", &["check", "-q", text(&overlay)]);
    let expected = [
        "read -P 0x5a 0 64k",
        "read -P 9 64k 512",
        "read -P 0x5a 66048 982528",
        "read -P 8 4M 64k",
        "read -P 0 2M 2M",
        "read -P 7 7M 64k",
        "read -P 0 7405568 983040",
    ];
    for command in expected {
        let said = run("qemu-io", &["-r", "-f", "qcow2", "-c", command, text(&overlay)]);
        assert!(!said.contains("failed"), "{command}: {said}");
    }
}

/// QEMU 10 and newer: the machine's migration has ended there, its nodes are inactive, and an export that allows for that
/// answers reads.
fn leaves_qemu(tls: bool) {
    let (dir, certs) = (tempfile::tempdir().unwrap(), Certs::new());
    let certs = tls.then_some(&certs);
    let path = image(dir.path());
    let there = dir.path().join("there");
    std::fs::create_dir(&there).unwrap();
    let daemon = Daemon::start(Program::Qemu, &there, &[]);
    let mut qmp = daemon.connect();
    qmp.run("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": path}));
    qmp.run("blockdev-add", json!({"driver": "qcow2", "node-name": "disk", "file": "f"}));
    let socket = there.join("nbd.sock");
    let addr = json!({"type": "unix", "data": {"path": text(&socket)}});
    let mut start = json!({"addr": addr});
    if let Some(certs) = certs {
        qmp.run("object-add", creds(certs, "server", "server"));
        start["tls-creds"] = json!("server");
    }
    qmp.run("nbd-server-start", start);
    qmp.run(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "disk", "name": "base", "allow-inactive": true}),
    );
    // What QEMU does by itself at the end of a machine's migration.
    qmp.run("blockdev-set-active", json!({"active": false}));
    // It holds no lock any more: nobody is to start the machine there by the path.
    let aside = dir.path().join("moved");
    std::fs::rename(&path, &aside).unwrap();
    comes(Program::Infill, &dir.path().join("here"), certs, &socket, "base");
    qmp.run("block-export-del", json!({"id": "e"}));
    daemon.quit(&mut qmp);
}

#[test]
fn a_disk_leaves_a_qemu_that_is_inactive() {
    leaves_qemu(false);
}

#[test]
fn a_disk_leaves_a_qemu_that_is_inactive_over_tls() {
    leaves_qemu(true);
}

/// Any server: there is no handover, so the machine stands still from before until it runs at the target.
#[test]
fn a_disk_leaves_a_server_that_only_reads_with_tls_and_without() {
    let (dir, certs) = (tempfile::tempdir().unwrap(), Certs::new());
    let path = image(dir.path());
    for certs in [None, Some(&certs)] {
        let socket = dir.path().join(if certs.is_some() { "tls.sock" } else { "plain.sock" });
        let mut server = Command::new("qemu-nbd");
        server.args(["-r", "-t", "-f", "qcow2", "-x", "base", "-k", text(&socket)]);
        if let Some(certs) = certs {
            let object = format!(
                "tls-creds-x509,id=s,endpoint=server,verify-peer=on,dir={}",
                text(&certs.dir("good"))
            );
            server.args(["--object", &object, "--tls-creds", "s"]);
        }
        let server = Process::start(server.arg(&path));
        wait_for_socket(&socket);
        let here = dir.path().join(if certs.is_some() { "here-tls" } else { "here" });
        comes(Program::Infill, &here, certs, &socket, "base");
        server.kill();
    }
}

/// The other way: the target is a QEMU with an overlay of its own.
#[test]
fn a_disk_goes_to_a_qemu_with_tls_and_without() {
    let (dir, certs) = (tempfile::tempdir().unwrap(), Certs::new());
    let path = image(dir.path());
    for certs in [None, Some(&certs)] {
        let there = dir.path().join(if certs.is_some() { "there-tls" } else { "there" });
        std::fs::create_dir(&there).unwrap();
        let daemon = Daemon::start(Program::Infill, &there, &[]);
        let mut qmp = daemon.connect();
        let file = json!({"driver": "file", "filename": path});
        qmp.run("blockdev-add", json!({"driver": "qcow2", "node-name": "disk", "file": file}));
        let socket = there.join("nbd.sock");
        let addr = json!({"type": "unix", "data": {"path": text(&socket)}});
        let mut start = json!({"addr": addr});
        if let Some(certs) = certs {
            qmp.run("object-add", creds(certs, "server", "server"));
            start["tls-creds"] = json!("server");
        }
        qmp.run("nbd-server-start", start);
        let export = |id: &str, name: &str, writable: bool| json!({"type": "nbd", "id": id, "node-name": "disk", "name": name, "writable": writable});
        qmp.run("block-export-add", export("guest", "disk", true));
        // The machine stands. Nobody writes there any more: what is exported from here on does not change.
        qmp.run("block-export-del", json!({"id": "guest"}));
        qmp.run("block-export-add", export("base", "base", false));
        let here = dir.path().join(if certs.is_some() { "here-tls" } else { "here" });
        comes(Program::Qemu, &here, certs, &socket, "base");
        if certs.is_some() {
            let plain = format!("nbd+unix:///base?socket={}", text(&socket));
            assert!(fails("qemu-img", &["info", &plain]).contains("TLS"));
        }
        qmp.run("block-export-del", json!({"id": "base"}));
        daemon.quit(&mut qmp);
    }
}
