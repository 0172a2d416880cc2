//! Disks that change hosts: two daemons, a guest that writes numbered records, and a hypervisor of this test's own that
//! stops it at one host and lets it go on where the disk is.

mod common;
#[path = "common/hosts.rs"]
mod hosts;
#[path = "common/qmp.rs"]
mod qmp;

use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use common::{INFILL, Process, fails, output, run, text, wait_until};
use hosts::{
    BLOCK_BYTES, BLOCKS, DISK, DISK_BYTES, Guest, Host, Random, SPARE_BLOCKS, SPARE_STAMP, image_is_whole,
    judge, migrate, record, run_guest, seed,
};
use infill_base::{Ctx, WriteFlags};
use infill_io::{Address, Direction, Listener, Reactors, Relay, RelayOptions, connector};
use infill_nbd::{ClientOptions, NbdStorage};
use infill_storage::Storage as _;
use serde_json::{Value, json};

/// Migrations under which daemons are killed.
const ROUNDS: usize = 6;

fn changes_hosts(mode: &str) {
    let seed = seed();
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    a.has_disk();
    let guest = Arc::new(Mutex::new(Guest::new(seed)));
    let running = run_guest(&a, &guest);
    running.wait_for_steps(200);
    let migration = migrate(&a, &b, mode, false);
    assert_eq!(migrate(&a, &b, mode, false), migration, "the same call is the same migration");
    b.wait_for("prepared");
    if mode == "hybrid" {
        wait_until("a round is read", || a.migration()["rounds"].as_u64() > Some(0));
    }
    running.wait_for_steps(200);
    // Who may not write there is told so, and may read.
    let uri = format!("nbd+unix:///{DISK}?socket={}", text(&b.dir.join("nbd.sock")));
    run("qemu-io", &["-f", "raw", "-r", "-c", "read 0 64k", &uri]);
    let refused = output("qemu-io", &["-f", "raw", "-c", "write 0 64k", &uri]);
    let told =
        String::from_utf8_lossy(&refused.stdout).into_owned() + &String::from_utf8_lossy(&refused.stderr);
    assert!(told.contains("Operation not permitted"), "{told}");
    running.stop();
    a.qmp().run("__infill_migration-switch", json!({"migration": migration}));
    wait_until("the disk has changed hands", || b.owns());
    assert!(!a.owns());
    let running = run_guest(&b, &guest);
    running.wait_for_steps(300);
    b.wait_for("local");
    a.wait_for("released");
    running.wait_for_steps(100);
    running.stop();
    judge(&b, &guest.lock().unwrap());
    image_is_whole(&b);
    // By its path nobody starts what is left at the first host.
    let left = a.dir.join("disk.qcow2");
    let told = fails("qemu-img", &["info", text(&left)]);
    assert!(told.contains("moved to another host"), "{told}");
    let mut qmp = b.qmp();
    b.daemon.unwrap().quit(&mut qmp);
}

#[test]
fn a_disk_changes_hosts_under_a_guest_and_its_data_follows() {
    changes_hosts("post-copy");
}

#[test]
fn most_of_a_disk_is_there_before_it_changes_hosts() {
    changes_hosts("hybrid");
}

#[test]
fn the_commands_move_a_disk_and_tell_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    a.has_disk();
    let sockets = [&a, &b].map(|host| text(&host.daemon.as_ref().unwrap().socket).to_owned());
    let to = b.address();
    let ask = |args: &[&str]| run(INFILL, &[args, &["--socket", &sockets[0]]].concat());
    let not = |args: &[&str]| fails(INFILL, &[args, &["--socket", &sockets[0]]].concat());
    assert!(not(&["whois", DISK]).contains("has never changed hosts"));
    assert!(not(&["migrate", DISK, "--to", &to, "--tls-hostname", "b"]).contains("is for TLS"));
    assert!(not(&["migrate", "disk", "--to", &to]).contains("is no UUID"));
    let migration =
        ask(&["migrate", DISK, "--to", &to, "--hold", "--way-back", "0", "--detach"]).trim().to_owned();
    assert!(ask(&["migrations"]).starts_with(&format!("{migration}\tsource\t")));
    assert!(ask(&["whois", DISK, "--peer", &sockets[1]]).contains("owner\tsource of migration"));
    assert!(not(&["reclaim", &migration]).contains("--accept-loss"));
    // It is what the machine refuses: nothing has been handed over.
    ask(&["reclaim", &migration, "--accept-loss"]);
    wait_until("it is told", || {
        a.migration()["error"].as_str().is_some_and(|why| why.contains("handed over"))
    });
    // Ready, it waits for a word; so does one that copies nothing before.
    let again = ["migrate", DISK, "--to", &to, "--hold", "--quiet", "--migration", &migration];
    ask(&again);
    assert_eq!(a.migration()["phase"], "ready");
    ask(&["abort", &migration]);
    a.wait_for("serving");
    wait_until("the target lets go of it", || b.state() == "aborted");
    let held = ["migrate", DISK, "--to", &to, "--hold", "--way-back", "0"];
    let migration = ask(&[&held[..], &["--post-copy", "--detach"]].concat()).trim().to_owned();
    ask(&[&held[..], &["--post-copy", "--quiet", "--migration", &migration]].concat());
    ask(&["switch", &migration]);
    ask(&["migrate", DISK, "--to", &to, "--wait", "--quiet", "--migration", &migration]);
    let told = ask(&["whois", DISK, "--peer", &sockets[1], "--output", "json"]);
    let told: Value = serde_json::from_str(&told).unwrap();
    let owners: Vec<_> = told.as_array().unwrap().iter().filter(|one| one["owner"] == true).collect();
    assert_eq!(owners.len(), 1, "{told}");
    assert_eq!((owners[0]["side"].as_str(), owners[0]["epoch"].as_u64()), (Some("target"), Some(1)));
    assert!(not(&["migrate", DISK, "--to", &to]).contains("is exported here"));
    assert!(not(&["abort", "6f1c2f0e-4d8a-4a63-9d0b-5a4f0f7f7c11"]).contains("no migration"));
}

#[test]
fn a_disk_goes_there_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    a.has_disk();
    let guest = Arc::new(Mutex::new(Guest::new(seed())));
    let running = run_guest(&a, &guest);
    running.wait_for_steps(100);
    running.stop();
    migrate(&a, &b, "hybrid", true);
    b.wait_for("local");
    a.wait_for("released");
    let running = run_guest(&b, &guest);
    running.wait_for_steps(100);
    running.stop();
    // A daemon that starts again serves it as one of its own.
    b.kill();
    b.start();
    wait_until("it is served again", || b.owns());
    judge(&b, &guest.lock().unwrap());
    let back = b
        .qmp()
        .run("__infill_migrate", json!({"disks": [{"name": DISK}], "to": a.address(), "mode": "post-copy"}));
    let back = back["migration"].as_str().unwrap().to_owned();
    wait_until("it is back", || a.state_of(&back) == "local");
    let running = run_guest(&a, &guest);
    running.wait_for_steps(100);
    running.stop();
    judge(&a, &guest.lock().unwrap());
    assert_eq!(
        (a.migration_of(&back)["disks"][0]["epoch"].as_u64(), a.migration_of(&back)["side"].as_str()),
        (Some(2), Some("target"))
    );
}

/// Between the writes of a guest that keeps many in flight there is no moment without any.
#[test]
fn a_migration_begins_under_a_guest_that_keeps_many_writes_in_flight() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    a.has_disk();
    let uri = format!("nbd+unix:///{DISK}?socket={}", text(&a.dir.join("nbd.sock")));
    let mut fio = Command::new("fio");
    fio.args(["--name=g", "--ioengine=nbd", "--uri", &uri, "--rw=randwrite", "--bs=4k", "--iodepth=32"]);
    fio.args(["--time_based", "--runtime=60"]).current_dir(dir.path()).stdout(Stdio::null());
    let fio = Process::start(&mut fio);
    wait_until("it writes", || {
        let stats = a.qmp().run("query-blockstats", json!({"query-nodes": true}));
        stats.as_array().unwrap().iter().any(|node| node["stats"]["wr_operations"].as_u64() > Some(2000))
    });
    migrate(&a, &b, "hybrid", false);
    wait_until("rounds are read under it", || a.migration()["rounds"].as_u64() > Some(1));
    drop(fio);
}

/// The network is lost after the switch, silently and then with a reset: what is at the target goes on, and the rest when it is
/// back. Nobody is told of an error.
#[test]
fn a_guest_goes_on_while_the_network_to_the_source_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let relayed = dir.path().join("relay.sock");
    let (a, b) = (Host::reached_at(dir.path(), "a", Some(relayed.clone())), Host::new(dir.path(), "b"));
    let server = connector(&Address::Unix(a.dir.join("data.sock")));
    let reactors = Reactors::start(1).unwrap();
    let relay = reactors.block_on(move || async move {
        let listener = Listener::bind(&Address::Unix(relayed)).unwrap();
        let options = RelayOptions { delay: std::time::Duration::ZERO, bytes_per_second: Some(6 << 20) };
        let relay = Relay::start(listener, server, options);
        let control = relay.control();
        // It lives as long as its reactor.
        std::mem::forget(relay);
        control
    });
    a.has_disk();
    let guest = Arc::new(Mutex::new(Guest::new(seed())));
    migrate(&a, &b, "post-copy", true);
    wait_until("the disk has changed hands", || b.owns());
    let running = run_guest(&b, &guest);
    running.wait_for_steps(50);
    relay.hold(Direction::ToServer);
    relay.hold(Direction::ToClient);
    running.stop.store(true, Ordering::SeqCst);
    // Writes of whole blocks need nothing from the source, wherever they go.
    let uri = format!("nbd+unix:///{DISK}?socket={}", text(&b.dir.join("nbd.sock")));
    for block in BLOCKS - SPARE_BLOCKS..BLOCKS {
        let at = block * BLOCK_BYTES;
        std::fs::write(dir.path().join("block"), record(block, SPARE_STAMP)).unwrap();
        let write = format!("write -s {} {at} 4k", text(&dir.path().join("block")));
        run("qemu-io", &["-f", "raw", "-c", &write, "-c", "flush", "-c", &format!("read {at} 4k"), &uri]);
    }
    assert_eq!(b.state(), "owner");
    relay.release(Direction::ToServer);
    relay.release(Direction::ToClient);
    relay.reset();
    running.thread.join().unwrap().unwrap();
    guest.lock().unwrap().newest[(BLOCKS - SPARE_BLOCKS) as usize..].fill(SPARE_STAMP);
    let running = run_guest(&b, &guest);
    running.wait_for_steps(50);
    b.wait_for("local");
    running.stop();
    judge(&b, &guest.lock().unwrap());
}

/// All disks of a machine go together: where one of them cannot, none does.
#[test]
fn disks_of_a_machine_change_hands_together() {
    const OTHER: &str = "0c7d9f8a-52d3-4d3c-8d2f-3f1a5b6c7d8e";
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    a.has_disk();
    let image = a.dir.join("other.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "3M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 0x5a 1M 64k", text(&image)]);
    let mut qmp = a.qmp();
    let node =
        json!({"driver": "qcow2", "node-name": "other", "file": {"driver": "file", "filename": image}});
    qmp.run("blockdev-add", node);
    let export = json!({"type": "nbd", "id": "e2", "node-name": "other", "name": OTHER, "writable": true});
    qmp.run("block-export-add", export);
    let disks = json!([{"name": DISK}, {"name": OTHER}]);
    let taken = b.dir.join("taken");
    std::fs::write(&taken, vec![0; 65536]).unwrap();
    let mut at_b = b.qmp();
    let node = json!({"driver": "file", "node-name": "taken", "filename": taken});
    at_b.run("blockdev-add", node);
    at_b.run("block-export-add", json!({"type": "nbd", "id": "t", "node-name": "taken", "name": OTHER}));
    qmp.run("__infill_migrate", json!({"disks": disks, "to": b.address()}));
    a.wait_for("serving");
    let told = a.migration()["error"].as_str().unwrap_or_default().to_owned();
    assert!(told.contains("is exported here already"), "{told}");
    assert_eq!(at_b.run("query-block-exports", json!({})).as_array().unwrap().len(), 1);
    at_b.run("block-export-del", json!({"id": "t"}));
    let moved = qmp.run("__infill_migrate", json!({"disks": disks, "to": b.address()}));
    wait_until("both are there", || b.state_of(moved["migration"].as_str().unwrap()) == "local");
    judge(&b, &Guest::new(1));
    let uri = format!("nbd+unix:///{OTHER}?socket={}", text(&b.dir.join("nbd.sock")));
    run("qemu-io", &["-f", "raw", "-c", "read -P 0x5a 1M 64k", "-c", "write -P 1 0 64k", &uri]);
}

/// Kills daemons at random points of a migration, which goes on until the disk is at one of the hosts for good.
#[test]
fn whichever_daemon_dies_and_whenever_one_host_has_the_disk_and_nothing_is_lost() {
    let seed = seed();
    let mut random = Random(seed | 1);
    let dir = tempfile::tempdir().unwrap();
    let (mut moved, mut kills) = (0, 0);
    for round in 0..ROUNDS {
        let place = dir.path().join(round.to_string());
        std::fs::create_dir(&place).unwrap();
        let (mut a, mut b) = (Host::new(&place, "a"), Host::new(&place, "b"));
        a.has_disk();
        let guest = Arc::new(Mutex::new(Guest::new(random.next())));
        let running = run_guest(&a, &guest);
        running.wait_for_steps(50);
        let mode = if round % 2 == 0 { "hybrid" } else { "post-copy" };
        migrate(&a, &b, mode, false);
        running.stop();
        let migration = a.migration()["migration"].as_str().unwrap().to_owned();
        // Early and late deaths, of either, and of both.
        for _ in 0..1 + random.below(3) {
            std::thread::sleep(std::time::Duration::from_millis(random.below(120)));
            if random.below(2) == 0 {
                a.qmp().run("__infill_migration-switch", json!({"migration": migration}));
                std::thread::sleep(std::time::Duration::from_millis(random.below(60)));
            }
            let which = random.below(3);
            if which != 1 {
                a.kill();
            }
            if which != 0 {
                b.kill();
            }
            kills += 1;
            assert!(!(a.daemon.is_some() && b.daemon.is_some() && a.owns() && b.owns()));
            if a.daemon.is_none() {
                a.start();
            }
            if b.daemon.is_none() {
                b.start();
            }
            assert!(!(a.owns() && b.owns()), "{} {}", a.migration(), b.migration());
        }
        a.qmp().ask("__infill_migration-switch", json!({"migration": migration}));
        wait_until("one host has it", || a.owns() || b.owns());
        b.wait_for("local");
        a.wait_for("released");
        moved += 1;
        let running = run_guest(&b, &guest);
        running.wait_for_steps(50);
        running.stop();
        judge(&b, &guest.lock().unwrap());
        image_is_whole(&b);
        std::fs::remove_dir_all(&place).unwrap();
    }
    println!("{moved} disks moved, {kills} times a daemon or both died");
}

#[test]
fn what_cannot_move_is_refused_before_the_freeze() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    a.has_disk();
    let mut qmp = a.qmp();
    let mut refused = |arguments: Value, why: &str| {
        let error = qmp.refused("__infill_migrate", arguments.clone());
        assert_eq!(error["class"], "GenericError");
        let told = error["desc"].as_str().unwrap();
        assert!(told.contains(why), "{arguments}: {told}");
    };
    let to = b.address();
    refused(json!({"disks": [{"name": "disk"}], "to": to}), "is no UUID");
    refused(json!({"disks": [{"name": DISK.replace('6', "7")}], "to": to}), "is exported here");
    refused(json!({"disks": [], "to": to}), "expected 1 to 64 disks");
    refused(json!({"disks": [{"name": DISK}, {"name": DISK}], "to": to}), "named twice");
    refused(json!({"disks": [{"name": DISK}], "to": "nowhere"}), "give HOST:PORT");
    refused(json!({"disks": [{"name": DISK}], "to": to, "migration": "7"}), "expected a UUID");
    refused(json!({"disks": [{"name": DISK}], "to": to, "mode": "before"}), "mode");
    drop(qmp);
    // The target does not take it: it stays, and is served as before.
    let taken = b.dir.join("disk.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&taken), "24M"]);
    let mut qmp = b.qmp();
    qmp.run(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": taken}}),
    );
    let export = json!({"type": "nbd", "id": "e", "node-name": "disk", "name": DISK, "writable": true});
    qmp.run("block-export-add", export);
    let migration = migrate(&a, &b, "hybrid", true);
    a.wait_for("serving");
    let told = a.migration()["error"].as_str().unwrap_or_default().to_owned();
    assert!(told.contains("is exported here already"), "{told}");
    wait_until("it is served", || a.owns());
    let guest = Arc::new(Mutex::new(Guest::new(7)));
    let running = run_guest(&a, &guest);
    running.wait_for_steps(50);
    running.stop();
    // While it is in a migration nothing else works on it, and no other one begins.
    qmp.run("block-export-del", json!({"id": "e"}));
    let second = migrate(&a, &b, "hybrid", false);
    assert_ne!(second, migration);
    let mut qmp = a.qmp();
    for (command, arguments) in [
        ("block-stream", json!({"job-id": "j", "device": "disk"})),
        ("block-export-del", json!({"id": "e", "mode": "hard"})),
        ("block_resize", json!({"node-name": "disk", "size": 2 * DISK_BYTES})),
    ] {
        let error = qmp.refused(command, arguments);
        let told = error["desc"].as_str().unwrap();
        assert!(told.contains(&second), "{command}: {told}");
    }
    let elsewhere = json!({"disks": [{"name": DISK}], "to": "/nowhere.sock"});
    let told = qmp.refused("__infill_migrate", elsewhere)["desc"].as_str().unwrap().to_owned();
    assert!(told.contains("is in migration"), "{told}");
    wait_until("the target has made an overlay", || b.state_of(&second) == "prepared");
    qmp.run("__infill_migration-abort", json!({"migration": second}));
    wait_until("the target drops it", || b.state_of(&second) == "aborted");
    wait_until("its overlay goes", || {
        let left = std::fs::read_dir(&b.dir).unwrap();
        !left.flatten().any(|entry| entry.file_name().to_string_lossy().contains(DISK))
    });
    judge(&a, &guest.lock().unwrap());
}

/// A target that died ahead of its first record has left an image, which is in nobody's way; one that holds something is.
#[test]
fn an_image_that_an_earlier_try_left_is_made_anew_unless_it_holds_something() {
    const MIGRATION: &str = "5c9f2a10-7d1e-4b62-9c3f-1e2d3c4b5a69";
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    a.has_disk();
    let left = b.dir.join(format!("{DISK}-{}.qcow2", &MIGRATION[..8]));
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&left), &DISK_BYTES.to_string()]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 1M 4k", text(&left)]);
    let before = std::fs::read(&left).unwrap();
    let begin = json!({"disks": [{"name": DISK}], "to": b.address(), "migration": MIGRATION});
    a.qmp().run("__infill_migrate", begin);
    wait_until("it is refused", || {
        a.migration()["error"].as_str().is_some_and(|told| told.contains("is there already: move it away"))
    });
    a.wait_for("serving");
    assert_eq!(std::fs::read(&left).unwrap(), before);
    std::fs::remove_file(&left).unwrap();
    let again = MIGRATION.replace('f', "e");
    let left = b.dir.join(format!("{DISK}-{}.qcow2", &again[..8]));
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&left), &DISK_BYTES.to_string()]);
    let begin = json!({"disks": [{"name": DISK}], "to": b.address(), "migration": again});
    a.qmp().run("__infill_migrate", begin);
    wait_until("it has moved", || b.state_of(&again) == "local");
    judge(&b, &Guest::new(1));
}

/// How long nobody could write: from the last answer at the one host, whose machine stands then, to the first at the other.
#[test]
#[ignore = "measures: cargo test --release -p infill --test migration -- --ignored --nocapture handovers"]
fn a_hundred_handovers_in_a_row_under_a_thousand_writes_a_second() {
    const HANDOVERS: usize = 100;
    let dir = tempfile::tempdir().unwrap();
    let hosts = [Host::new(dir.path(), "a"), Host::new(dir.path(), "b")];
    hosts[0].has_disk();
    let mut blackouts = Vec::new();
    for nth in 0..HANDOVERS {
        let (from, to) = (&hosts[nth % 2], &hosts[(nth + 1) % 2]);
        let migration = migrate(from, to, "post-copy", false);
        wait_until("it is prepared", || to.state_of(&migration) == "prepared");
        let monitor = std::sync::Mutex::new(from.qmp());
        let switch = json!({"migration": migration});
        let [from_socket, to_socket] = [from, to].map(|host| Address::Unix(host.dir.join("nbd.sock")));
        let took = Reactors::start(1).unwrap().block_on(move || async move {
            let open = async |address: &Address| {
                let options =
                    ClientOptions { export: DISK.into(), read_only: false, ..ClientOptions::default() };
                NbdStorage::connect(connector(address), options).await.expect("the disk is exported")
            };
            let (here, there) = (open(&from_socket).await, open(&to_socket).await);
            let mut random = Random(nth as u64 + 1);
            let write = async |disk: &NbdStorage, block: u64| {
                let data = Bytes::from(record(block, 1)).into();
                disk.write(&Ctx::GUEST, block * BLOCK_BYTES, data, WriteFlags::empty()).await
            };
            for _ in 0..200 {
                write(&here, random.below(BLOCKS)).await.unwrap();
                infill_storage::rt::sleep(std::time::Duration::from_millis(1)).await;
            }
            let last = std::time::Instant::now();
            monitor.lock().unwrap().run("__infill_migration-switch", switch);
            while write(&there, random.below(BLOCKS)).await.is_err() {
                infill_storage::rt::sleep(std::time::Duration::from_micros(200)).await;
            }
            last.elapsed()
        });
        blackouts.push(took);
        wait_until("it is all there", || to.state_of(&migration) == "local");
        wait_until("it is let go", || from.state_of(&migration) == "released");
    }
    blackouts.sort_unstable();
    let at = |part: usize| blackouts[(blackouts.len() - 1) * part / 100];
    println!("{HANDOVERS} handovers: p50 {:?}, p99 {:?}, most {:?}", at(50), at(99), at(100));
}
