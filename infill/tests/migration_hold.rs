//! Reads of what is still at a source that is away: held for as long as their host was told, and then failed, where a
//! hypervisor stops its machine at that and asks again.

mod common;
#[path = "common/hosts.rs"]
mod hosts;
#[path = "common/qmp.rs"]
mod qmp;

use std::sync::{Arc, Mutex};

use common::{output, run, text, wait_until};
use hosts::{
    BLOCK_BYTES, BLOCKS, DISK, Guest, Host, SPARE_BLOCKS, SPARE_STAMP, judge, migrate, record, seed,
};

#[test]
fn reads_of_what_is_missing_fail_where_a_machine_is_stopped_by_that_and_are_answered_when_the_source_is_back()
{
    let dir = tempfile::tempdir().unwrap();
    let mut a = Host::new(dir.path(), "a");
    let at = |socket: &str| text(&dir.path().join("b").join(socket)).to_owned();
    let more = format!("data={},on-hold=stop,hold-time=1", at("data.sock"));
    let b = Host::at(dir.path(), "b", &at("peers.sock"), &more);
    a.has_slow_disk();
    let guest = Arc::new(Mutex::new(Guest::new(seed())));
    let mut events = b.qmp();
    migrate(&a, &b, "post-copy", true);
    wait_until("the disk has changed hands", || b.owns());
    a.kill();
    let uri = format!("nbd+unix:///{DISK}?socket={}", text(&b.dir.join("nbd.sock")));
    let said = |command: &str| {
        let done = output("qemu-io", &["-f", "raw", "-c", command, &uri]);
        String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr)
    };
    // The last block comes last.
    let missing = format!("read {} 4k", (BLOCKS - 1) * BLOCK_BYTES);
    assert!(said(&missing).contains("Input/output error"));
    let told = events.wait_for("__INFILL_READS_HELD");
    assert_eq!((&told["data"]["failing"], &told["data"]["on-hold"]), (&true.into(), &"stop".into()));
    assert!(said(&missing).contains("Input/output error"));
    // Writes need nothing of it, nor do reads of what was written.
    for block in BLOCKS - SPARE_BLOCKS..BLOCKS - 1 {
        let at = block * BLOCK_BYTES;
        std::fs::write(dir.path().join("block"), record(block, SPARE_STAMP)).unwrap();
        let write = format!("write -s {} {at} 4k", text(&dir.path().join("block")));
        run("qemu-io", &["-f", "raw", "-c", &write, "-c", "flush", "-c", &format!("read {at} 4k"), &uri]);
    }
    assert_eq!(b.state(), "owner");
    a.start();
    wait_until("it is read again", || !said(&missing).contains("error"));
    let told = events.wait_for("__INFILL_READS_HELD");
    assert_eq!(told["data"]["failing"], false);
    b.wait_for("local");
    a.wait_for("released");
    guest.lock().unwrap().newest[(BLOCKS - SPARE_BLOCKS) as usize..BLOCKS as usize - 1].fill(SPARE_STAMP);
    judge(&b, &guest.lock().unwrap());
}
