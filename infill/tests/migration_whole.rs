//! Disks that are at their new host, all of them, before they change hands: nothing is left at the old one.

mod common;
#[path = "common/hosts.rs"]
mod hosts;
#[path = "common/qmp.rs"]
mod qmp;

use std::sync::{Arc, Mutex};

use common::{fails, text, wait_until};
use hosts::{BLOCKS, Guest, Host, image_is_whole, judge, migrate, run_guest, seed};
use serde_json::json;

/// The source is killed as soon as the target owns the disk, and does not come back for as long as the guest is looked at.
#[test]
fn a_source_that_dies_right_after_the_switch_is_not_missed() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    a.has_slow_disk();
    let guest = Arc::new(Mutex::new(Guest::new(seed())));
    let running = run_guest(&a, &guest);
    running.wait_for_steps(100);
    migrate(&a, &b, "pre-copy", false);
    // A guest that writes all the time: there is something to copy while it stands.
    wait_until("a round is read", || a.migration()["rounds"].as_u64() > Some(1));
    running.wait_for_steps(200);
    running.stop();
    let migration = a.migration()["migration"].clone();
    a.qmp().run("__infill_migration-switch", json!({"migration": migration}));
    wait_until("the disk has changed hands", || b.owns());
    a.kill();
    judge(&b, &guest.lock().unwrap());
    let running = run_guest(&b, &guest);
    running.wait_for_steps(300);
    b.wait_for("complete");
    running.stop();
    judge(&b, &guest.lock().unwrap());
    image_is_whole(&b);
    // When it is back it lets go of what it has.
    a.start();
    b.wait_for("local");
    a.wait_for("released");
    assert!(fails("qemu-img", &["info", text(&a.dir.join("disk.qcow2"))]).contains("moved to another host"));
}

/// It goes by itself, and is tried again with another round, when the target's daemon dies on the way.
#[test]
fn a_disk_goes_whole_under_a_guest_and_over_deaths_of_the_targets_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    a.has_slow_disk();
    let guest = Arc::new(Mutex::new(Guest::new(seed())));
    let running = run_guest(&a, &guest);
    running.wait_for_steps(100);
    let migration = migrate(&a, &b, "pre-copy", false);
    wait_until("it copies", || a.migration()["rounds"].as_u64() > Some(0));
    b.kill();
    b.start();
    let copies = ["copies", "settled"].map(|phase| json!(phase));
    wait_until("it goes on", || copies.contains(&b.migration()["phase"]));
    b.kill();
    b.start();
    running.stop();
    a.qmp().run("__infill_migration-switch", json!({"migration": migration}));
    wait_until("the disk has changed hands", || b.owns());
    b.wait_for("local");
    a.wait_for("released");
    assert_eq!(b.migration()["missing-bytes"], 0);
    judge(&b, &guest.lock().unwrap());
    image_is_whole(&b);
    assert!(guest.lock().unwrap().newest.len() as u64 == BLOCKS);
}
