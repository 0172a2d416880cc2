//! One of the hosts is not there.

use std::sync::{Arc, Mutex};

use serde_json::json;

use crate::common::{Process, output, run, text, wait_until};
use crate::hosts::{
    BLOCK_BYTES, BLOCKS, DISK, Guest, Host, SPARE_BLOCKS, SPARE_STAMP, judge, migrate, record, run_guest,
    seed,
};

/// Both daemons have died and only the target's is back: what it has it serves, what guests write whole it takes, and only
/// reads of what is still at the source wait for that.
#[test]
fn a_target_that_starts_without_its_source_serves_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let at = |socket: &str| text(&dir.path().join("b").join(socket)).to_owned();
    // It asks its source for a second.
    let more = format!("data={},reconnect-time=1", at("data.sock"));
    let (mut a, mut b) = (Host::new(dir.path(), "a"), Host::at(dir.path(), "b", &at("peers.sock"), &more));
    a.has_slow_disk();
    let guest = Arc::new(Mutex::new(Guest::new(seed())));
    migrate(&a, &b, "post-copy", true);
    wait_until("the disk has changed hands", || b.owns());
    let running = run_guest(&b, &guest);
    running.wait_for_steps(30);
    running.stop();
    assert_eq!(b.state(), "owner", "something is still at the source");
    a.kill();
    b.kill();
    b.start();
    wait_until("the target serves it", || b.owns());
    let uri = format!("nbd+unix:///{DISK}?socket={}", text(&b.dir.join("nbd.sock")));
    let write = |block: u64| {
        let (at, file) = (block * BLOCK_BYTES, b.dir.join("block"));
        std::fs::write(&file, record(block, SPARE_STAMP)).unwrap();
        let write = format!("write -s {} {at} 4k", text(&file));
        run("qemu-io", &["-f", "raw", "-c", &write, "-c", "flush", "-c", &format!("read {at} 4k"), &uri]);
    };
    // What was written there before is there, and more can be.
    let written: Vec<u64> =
        (0..BLOCKS).filter(|block| guest.lock().unwrap().newest[*block as usize] > 0).collect();
    for block in &written {
        run("qemu-io", &["-f", "raw", "-r", "-c", &format!("read {} 4k", block * BLOCK_BYTES), &uri]);
    }
    assert!(!written.is_empty());
    write(BLOCKS - 1);
    // The whole of it waits.
    let raw = b.dir.join("whole");
    let mut reading = std::process::Command::new("qemu-img");
    reading.args(["convert", "-f", "raw", "-O", "raw", &uri, text(&raw)]);
    let mut reading = Process::start(&mut reading);
    (BLOCKS - SPARE_BLOCKS..BLOCKS).for_each(write);
    assert!(reading.0.try_wait().unwrap().is_none(), "it needs what is at the source");
    assert_eq!(b.migration()["peer-connected"], false);
    let mut qmp = b.qmp();
    a.start();
    qmp.event(|event| event["event"] == "__INFILL_SOURCE_BACK");
    reading.wait_for_success();
    b.wait_for("local");
    let mut guest = guest.lock().unwrap();
    guest.newest[(BLOCKS - SPARE_BLOCKS) as usize..].fill(SPARE_STAMP);
    judge(&b, &guest);
}

/// Where a disk was, who comes for it is told where it is; also after a restart, when its image is fenced. And when it is back,
/// it is there again.
#[test]
fn who_wants_a_disk_where_it_was_is_told_who_owns_it() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    a.has_slow_disk();
    let migration = migrate(&a, &b, "post-copy", true);
    wait_until("the disk has changed hands", || b.owns());
    let read = |host: &Host| {
        let uri = format!("nbd+unix:///{DISK}?socket={}", text(&host.dir.join("nbd.sock")));
        let read = output("qemu-io", &["-f", "raw", "-r", "-c", "read 0 4k", &uri]);
        let told = String::from_utf8_lossy(&[read.stdout, read.stderr].concat()).into_owned();
        (read.status.success(), told)
    };
    let owner = format!("owned by {}", b.address());
    let (served, told) = read(&a);
    assert!(!served && told.contains(&owner), "{told}");
    a.qmp().run("__infill_migration-abort", json!({"migration": migration}));
    wait_until("it is back", || a.owns());
    wait_until("it is served again", || read(&a).0);
    let (served, told) = read(&b);
    assert!(!served && told.contains("owned by"), "{told}");
    let again = migrate(&a, &b, "post-copy", true);
    wait_until("it is all there", || b.state_of(&again) == "local" && a.state_of(&again) == "released");
    a.kill();
    a.start();
    wait_until("it is told again", || {
        let (served, told) = read(&a);
        assert!(!served);
        told.contains(&owner)
    });
    assert!(read(&b).0);
}
