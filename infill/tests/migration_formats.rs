//! Images that cannot carry a fence in themselves: while their disk is elsewhere they have another name.

mod common;
#[path = "common/hosts.rs"]
mod hosts;
#[path = "common/qmp.rs"]
mod qmp;

use std::sync::{Arc, Mutex};

use common::{run, text, wait_until};
use hosts::{BLOCKS, DISK, Guest, Host, judge, migrate, record, run_guest, seed};
use serde_json::{Value, json};

/// The disk is at the host, in a file of that format, and reading all of it takes some seconds.
fn has_disk(host: &Host, format: &str) {
    let mut qmp = host.qmp();
    let limits = json!({"bps-read": 8 << 20});
    qmp.run("object-add", json!({"qom-type": "throttle-group", "id": "g", "limits": limits}));
    let (raw, image) = (host.dir.join("content"), host.dir.join("disk.img"));
    std::fs::write(&raw, (0..BLOCKS).flat_map(|block| record(block, 0)).collect::<Vec<_>>()).unwrap();
    run("qemu-img", &["convert", "-f", "raw", "-O", format, text(&raw), text(&image)]);
    std::fs::remove_file(&raw).unwrap();
    let file = json!({"driver": "file", "filename": image});
    let node = json!({"driver": format, "file": file});
    qmp.run(
        "blockdev-add",
        json!({"driver": "throttle", "node-name": "disk", "throttle-group": "g", "file": node}),
    );
    let export = json!({"type": "nbd", "id": "e", "node-name": "disk", "name": DISK, "writable": true});
    qmp.run("block-export-add", export);
}

fn moves(format: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    has_disk(&a, format);
    let guest = Arc::new(Mutex::new(Guest::new(seed())));
    let running = run_guest(&a, &guest);
    running.wait_for_steps(100);
    running.stop();
    let (image, moved) = (a.dir.join("disk.img"), a.dir.join("disk.img.moved-to-another-host"));
    // There and handed back: it has its name again.
    let migration = migrate(&a, &b, "post-copy", true);
    wait_until("the disk has changed hands", || b.owns());
    assert!(!image.exists() && moved.exists());
    assert_eq!(a.migration()["disks"][0]["filename"], text(&moved));
    a.qmp().run("__infill_migration-abort", json!({"migration": migration}));
    wait_until("it is back", || a.owns());
    assert!(image.exists() && !moved.exists());
    let running = run_guest(&a, &guest);
    running.wait_for_steps(100);
    running.stop();
    // There for good, over a death of the source, which finds it under the other name.
    let migration = migrate(&a, &b, "post-copy", true);
    wait_until("the disk has changed hands", || b.owner_of(&migration));
    a.kill();
    a.start();
    assert!(!a.owner_of(&migration) && !image.exists());
    let running = run_guest(&b, &guest);
    running.wait_for_steps(100);
    wait_until("all of it is there", || b.state_of(&migration) == "local");
    wait_until("it is let go", || a.state_of(&migration) == "released");
    running.stop();
    judge(&b, &guest.lock().unwrap());
    assert!(!image.exists() && moved.exists());
}

#[test]
fn a_raw_disk_changes_hosts_and_its_image_has_another_name() {
    moves("raw");
}

#[test]
fn a_qed_disk_changes_hosts_and_its_image_has_another_name() {
    moves("qed");
}

#[test]
fn what_has_no_fence_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    let mut qmp = a.qmp();
    let file = a.dir.join("disk.raw");
    std::fs::write(&file, vec![0; 1 << 20]).unwrap();
    std::fs::hard_link(&file, a.dir.join("other.raw")).unwrap();
    let mut refused = |node: Value, why: &str| {
        let mut node = node;
        node["node-name"] = json!("disk");
        qmp.run("blockdev-add", node);
        let export = json!({"type": "nbd", "id": "e", "node-name": "disk", "name": DISK, "writable": true});
        qmp.run("block-export-add", export);
        let told = qmp.refused("__infill_migrate", json!({"disks": [{"name": DISK}], "to": b.address()}));
        let told = told["desc"].as_str().unwrap().to_owned();
        assert!(told.contains(why), "{told}");
        qmp.run("block-export-del", json!({"id": "e"}));
        qmp.run("blockdev-del", json!({"node-name": "disk"}));
    };
    refused(
        json!({"driver": "null-co", "size": 1 << 20}),
        "is a node of the driver null-co, which cannot be fenced",
    );
    refused(json!({"driver": "file", "filename": file}), "has 2 names");
    std::fs::remove_file(a.dir.join("other.raw")).unwrap();
    let part = json!({"driver": "raw", "size": 65536, "file": {"driver": "file", "filename": file}});
    refused(part, "is a part of its file");
}
