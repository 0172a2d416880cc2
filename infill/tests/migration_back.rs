//! Disks that come back from the host that they went to: handed back while nothing was written there, or reclaimed because
//! that host is dead.

mod common;
#[path = "common/hosts.rs"]
mod hosts;
#[path = "common/qmp.rs"]
mod qmp;

use std::sync::{Arc, Mutex};

use common::{run, text, wait_until};
use hosts::{DISK, Guest, Host, judge, migrate, run_guest, seed};
use serde_json::{Value, json};

/// A machine that cannot start at the target goes on at the source, if it has written nothing there.
#[test]
fn a_disk_is_handed_back_unless_it_was_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    a.has_slow_disk();
    let guest = Arc::new(Mutex::new(Guest::new(seed())));
    let running = run_guest(&a, &guest);
    running.wait_for_steps(100);
    running.stop();
    let migration = migrate(&a, &b, "post-copy", true);
    wait_until("the disk has changed hands", || b.owns());
    let uri = format!("nbd+unix:///{DISK}?socket={}", text(&b.dir.join("nbd.sock")));
    run("qemu-io", &["-f", "raw", "-r", "-c", "read 1M 64k", &uri]);
    a.qmp().run("__infill_migration-abort", json!({"migration": migration}));
    wait_until("it is back", || a.owns());
    b.wait_for("gave_back");
    assert!(!b.owns());
    let running = run_guest(&a, &guest);
    running.wait_for_steps(100);
    running.stop();
    judge(&a, &guest.lock().unwrap());
    assert_eq!(a.migration()["disks"][0]["epoch"], 2);
    run("qemu-img", &["check", "-q", "-U", text(&a.dir.join("disk.qcow2"))]);
    // Once it was written to at the target it is not given back.
    let again = migrate(&a, &b, "post-copy", true);
    wait_until("it has changed hands again", || b.owner_of(&again));
    let running = run_guest(&b, &guest);
    running.wait_for_steps(20);
    a.qmp().run("__infill_migration-abort", json!({"migration": again}));
    wait_until("it is all there", || b.state_of(&again) == "local");
    running.stop();
    judge(&b, &guest.lock().unwrap());
    assert!(!a.owner_of(&again));
}

/// All of it is there, which a machine that fails to start there must not be too late for.
#[test]
fn a_disk_whose_data_is_all_there_comes_back_until_a_guest_writes_there_or_a_while_has_passed() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    a.has_disk();
    let begin = |from: &Host, to: &Host, mode: &str, arguments: Value| {
        let mut all = json!({"disks": [{"name": DISK}], "to": to.address(), "mode": mode});
        all.as_object_mut().unwrap().extend(arguments.as_object().unwrap().clone());
        let begun = from.qmp().run("__infill_migrate", all);
        begun["migration"].as_str().unwrap().to_owned()
    };
    let is_all_there = |id: &str| {
        wait_until("all of it is there", || b.migration_of(id)["phase"] == "waits for a guest's write");
        assert_eq!((b.state_of(id).as_str(), b.owner_of(id)), ("owner", true));
    };
    let guest = Arc::new(Mutex::new(Guest::new(seed())));
    // Disks that are held are those of a machine, whose memory moves meanwhile.
    let held = begin(&a, &b, "pre-copy", json!({"auto-switch": false}));
    wait_until("it is prepared", || b.state_of(&held) == "prepared");
    a.qmp().run("__infill_migration-switch", json!({"migration": held}));
    is_all_there(&held);
    a.qmp().run("__infill_migration-abort", json!({"migration": held}));
    wait_until("it is back", || a.owns());
    let running = run_guest(&a, &guest);
    running.wait_for_steps(100);
    running.stop();
    wait_until("the target lets go of it", || b.state_of(&held) == "gave_back");

    let written = begin(&a, &b, "hybrid", json!({"way-back": 600}));
    is_all_there(&written);
    let running = run_guest(&b, &guest);
    wait_until("it is the target's for good", || b.state_of(&written) == "local");
    running.stop();
    wait_until("it is let go", || a.state_of(&written) == "released");
    assert_eq!((a.owner_of(&held), b.owner_of(&held), b.owner_of(&written)), (false, false, true));

    let unwritten = begin(&b, &a, "post-copy", json!({"way-back": 1}));
    wait_until("nobody has written for a while", || a.state_of(&unwritten) == "local");
    judge(&a, &guest.lock().unwrap());
}

/// The target is lost: its operator says so, and what was written there is given up. When it comes back it serves nothing.
#[test]
fn a_disk_is_reclaimed_from_a_target_that_is_dead() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    a.has_slow_disk();
    let guest = Arc::new(Mutex::new(Guest::new(seed())));
    let running = run_guest(&a, &guest);
    running.wait_for_steps(100);
    running.stop();
    let migration = migrate(&a, &b, "post-copy", true);
    wait_until("the disk has changed hands", || b.owns());
    b.kill();
    assert_eq!((a.state().as_str(), a.owns()), ("handed_over", false));
    // Also over a restart, after which the fence keeps the node away.
    a.kill();
    a.start();
    assert!(!a.owns() && !a.export_is_there());
    a.qmp().run("__infill_migration-reclaim", json!({"migration": migration}));
    wait_until("it is served again", || a.owns() && a.export_is_there());
    let running = run_guest(&a, &guest);
    running.wait_for_steps(100);
    running.stop();
    b.start();
    b.wait_for("superseded");
    assert!(a.owns() && !b.owns());
    judge(&a, &guest.lock().unwrap());
}
