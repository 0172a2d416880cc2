//! The life cycle of the mark *need check*, and everything else that is written to the header.

mod common;

use std::sync::{Arc, Mutex};

use common::{CX, arg, qemu, qemu_ok};
use infill_base::{ErrorKind, WriteFlags};
use infill_node::{BackingRef, MemoryOverlay, NodeHandle, Repair};
use infill_qed::{CreateOptions, NEED_CHECK_IDLE, OpenOptions, Qed, check, create};
use infill_sim::{DiskOp, Media, SimDisk, World};
use infill_storage::{StorageHandle, rt};

const SIZE: u64 = 8 << 20;

async fn made(disk: &SimDisk, backing: bool) -> StorageHandle {
    let storage = StorageHandle::new(disk.clone());
    let backing = backing.then(|| BackingRef { filename: "below".into(), format: Some("raw".into()) });
    let options = CreateOptions { size: SIZE, backing, cluster_bytes: 4096, table_clusters: 2 };
    create(&CX, &storage, &options).await.expect("creates");
    storage
}

async fn open(storage: &StorageHandle) -> NodeHandle {
    NodeHandle::new(Qed::open(&CX, storage.clone(), OpenOptions::default()).await.expect("opens"))
}

async fn write(node: &NodeHandle, at: u64) {
    node.write(&CX, at, vec![at as u8 | 1; 4096], WriteFlags::empty()).await.expect("writes");
}

fn is_marked(media: &Media) -> bool {
    media.sector(0)[16] & 2 != 0
}

#[test]
fn the_mark_is_stable_before_the_first_allocating_write_and_goes_on_close() {
    World::new(0).run(async {
        let disk = SimDisk::new(0);
        let storage = made(&disk, false).await;
        let node = open(&storage).await;
        assert!(!is_marked(&disk.media()) && !node.info().dirty);
        // Whatever is written behind the L1 table, the mark is stable by then.
        let wrong = Arc::new(Mutex::new(0));
        let seen = wrong.clone();
        disk.observe(move |point| {
            let touches = |pending: &infill_sim::Pending| {
                pending.op.sectors.iter().any(|(index, _)| *index > 0) || pending.op.set_len.is_some()
            };
            if point.pending.iter().any(touches) && !is_marked(&point.durable) {
                *seen.lock().expect("unpoisoned") += 1;
            }
        });
        write(&node, 0).await;
        assert!(is_marked(&disk.crash_point().durable) && node.info().dirty);
        node.sync(&CX).await.expect("syncs");
        write(&node, 4096).await;
        disk.stop_observing();
        assert_eq!(*wrong.lock().expect("unpoisoned"), 0);
        node.close(&CX).await.expect("closes");
        assert!(!is_marked(&disk.crash_point().durable) && !node.info().dirty);
        assert!(disk.crash_point().pending.is_empty());
    });
}

#[test]
fn the_mark_goes_when_nothing_was_allocated_for_a_while_and_comes_again() {
    World::new(0).run(async {
        let disk = SimDisk::new(0);
        let storage = made(&disk, false).await;
        let node = open(&storage).await;
        for round in 0..3 {
            write(&node, round * 8192).await;
            rt::sleep(NEED_CHECK_IDLE / 2).await;
            assert!(is_marked(&disk.media()));
            write(&node, round * 8192 + 4096).await;
            rt::sleep(NEED_CHECK_IDLE * 7 / 10).await;
            // There was an allocation since the time began.
            assert!(is_marked(&disk.media()));
            rt::sleep(NEED_CHECK_IDLE).await;
            assert!(!is_marked(&disk.crash_point().durable), "round {round}");
            // Nothing was left unsynced, though no guest has flushed.
            let storage = StorageHandle::new(SimDisk::with(disk.crash_point().durable, Default::default()));
            let report = check(&CX, &storage, Repair::Nothing).await.expect("checks");
            assert_eq!((report.allocated_clusters, report.corruptions), (2 * round + 2, 0));
            // A write in place needs no mark.
            write(&node, 0).await;
            assert!(!is_marked(&disk.media()));
        }
    });
}

#[test]
fn an_image_that_is_dropped_leaves_no_task_behind() {
    let world = World::new(0);
    let disk = SimDisk::new(0);
    world.run(async {
        let storage = made(&disk, false).await;
        write(&open(&storage).await, 0).await;
    });
    world.run_until_idle();
    assert!(is_marked(&disk.media()), "nobody closed it");
    assert_eq!(world.tasks_alive(), 0);
}

#[test]
fn a_flush_is_one_sync_with_the_mark_and_two_over_a_backing_which_needs_none() {
    World::new(0).run(async {
        for has_backing in [false, true] {
            let disk = SimDisk::new(0);
            let storage = made(&disk, has_backing).await;
            let node = open(&storage).await;
            let below = has_backing.then(|| NodeHandle::new(MemoryOverlay::new(SIZE, 4096, None)));
            node.backing().expect("an overlay").replace(below).await;
            write(&node, 0).await;
            assert_eq!(is_marked(&disk.media()), !has_backing);
            let syncs = disk.total(DiskOp::Sync);
            node.sync(&CX).await.expect("syncs");
            assert_eq!(disk.total(DiskOp::Sync) - syncs, 1 + u64::from(has_backing));
            // Nothing was allocated since.
            write(&node, 0).await;
            node.sync(&CX).await.expect("syncs");
            assert_eq!(disk.total(DiskOp::Sync) - syncs, 2 + u64::from(has_backing));
            // So it stays when the backing is gone: entries of before may not be stable yet.
            if has_backing {
                node.set_backing_ref(&CX, None).await.expect("drops");
                node.backing().expect("an overlay").replace(None).await;
                write(&node, 4096).await;
                assert!(!is_marked(&disk.media()));
            }
        }
    });
}

#[test]
fn a_marked_image_is_repaired_when_it_is_opened_for_writing_only() {
    World::new(0).run(async {
        let disk = SimDisk::new(0);
        let storage = made(&disk, false).await;
        let node = open(&storage).await;
        for cluster in 0..8 {
            write(&node, cluster * 4096).await;
        }
        node.sync(&CX).await.expect("syncs");
        drop(node);
        let mut bytes = disk.media().to_bytes();
        // The file lost its end, and a partial cluster is left.
        let layout_end = 4096 + 8192 + 8192;
        bytes.truncate(layout_end + 5 * 4096 + 100);
        let disk = SimDisk::with(Media::from_bytes(&bytes), Default::default());
        let storage = StorageHandle::new(disk.clone());

        let read_only = OpenOptions { read_only: true, ..OpenOptions::default() };
        let node = Qed::open(&CX, storage.clone(), read_only).await.expect("opens");
        let node = NodeHandle::new(node);
        assert!(node.info().dirty);
        assert_eq!(node.read_vec(&CX, 0, 4096).await.expect("reads"), vec![1; 4096]);
        let lost = node.read_vec(&CX, 5 * 4096, 4096).await.expect_err("outside of the file");
        assert_eq!(lost.kind(), ErrorKind::Corrupt);
        let refused = node.write(&CX, 0, vec![1; 10], WriteFlags::empty()).await.expect_err("read-only");
        assert_eq!(refused.kind(), ErrorKind::NotPermitted);
        node.sync(&CX).await.expect("there is nothing to sync");
        node.close(&CX).await.expect("closes");
        assert_eq!(disk.media().to_bytes(), bytes, "nothing was written");

        let node = open(&storage).await;
        assert!(!is_marked(&disk.crash_point().durable));
        assert_eq!(node.read_vec(&CX, 4 * 4096, 8192).await.expect("reads")[4095..4097], [1, 0]);
        write(&node, 5 * 4096).await;
        node.close(&CX).await.expect("closes");
        let report = check(&CX, &storage, Repair::Nothing).await.expect("checks");
        assert_eq!((report.allocated_clusters, report.leaks, report.corruptions), (6, 0, 0));
    });
}

#[test]
fn qemu_repairs_what_was_not_closed_and_an_unrepairable_image_is_refused_for_writing() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("image.qed");
    let disk = SimDisk::new(0);
    World::new(0).run(async {
        let node = open(&made(&disk, false).await).await;
        for cluster in 0..8 {
            write(&node, cluster * 4096).await;
        }
        node.sync(&CX).await.expect("syncs");
    });
    std::fs::write(&path, disk.media().to_bytes()).expect("writes");
    let report = qemu_ok("qemu-img", &["info", "-f", "qed", arg(&path)]);
    assert!(!report.is_empty());
    let repaired = qemu("qemu-img", &["check", "-f", "qed", "-r", "all", arg(&path)]);
    assert!(matches!(repaired.status.code(), Some(0 | 3)), "{repaired:?}");
    assert_eq!(std::fs::read(&path).expect("is there")[16] & 2, 0, "QEMU cleared the mark");

    // Two entries that name one cluster.
    let mut bytes = disk.media().to_bytes();
    let table = 4096 + 8192;
    let entry = bytes[table..table + 8].to_vec();
    bytes[table + 8..table + 16].copy_from_slice(&entry);
    let storage = StorageHandle::new(SimDisk::with(Media::from_bytes(&bytes), Default::default()));
    World::new(0).run(async {
        let refused = Qed::open(&CX, storage.clone(), OpenOptions::default()).await.map(|_| ());
        let refused = refused.expect_err("cannot be repaired").to_string();
        assert!(refused.contains("named twice") && refused.contains("read-only"), "{refused}");
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        Qed::open(&CX, storage, options).await.expect("opens read-only");
    });
}

#[test]
fn unknown_autoclear_bits_go_before_the_first_write_and_stay_while_only_read() {
    World::new(0).run(async {
        let disk = SimDisk::new(0);
        let storage = made(&disk, true).await;
        let autoclear = |media: &Media| media.sector(0)[32..40].to_vec();
        let mut bytes = disk.media().to_bytes();
        bytes[33] = 0x80;
        // An allocated cluster, so that a write in place is the first.
        for first_write in ["in place", "allocating", "zeroes"] {
            let disk = SimDisk::with(Media::from_bytes(&bytes), Default::default());
            let storage = StorageHandle::new(disk.clone());
            let node = open(&storage).await;
            node.read_vec(&CX, 0, 4096).await.expect("reads");
            node.close(&CX).await.expect("closes");
            assert_eq!(autoclear(&disk.media())[1], 0x80);
            let node = open(&storage).await;
            match first_write {
                "zeroes" => node.write_zeroes(&CX, 0, 4096, Default::default()).await.expect("zeroes"),
                _ => write(&node, 0).await,
            }
            assert_eq!(autoclear(&disk.crash_point().durable), [0; 8], "{first_write}");
        }
        drop(storage);
    });
}

#[test]
fn what_lies_in_a_part_of_a_cluster_at_the_end_never_shows() {
    World::new(0).run(async {
        for has_backing in [false, true] {
            let disk = SimDisk::new(0);
            let storage = made(&disk, has_backing).await;
            let mut bytes = disk.media().to_bytes();
            bytes.extend([0xee; 3000]);
            drop(storage);
            let disk = SimDisk::with(Media::from_bytes(&bytes), Default::default());
            let storage = StorageHandle::new(disk.clone());
            let node = open(&storage).await;
            // Whichever cluster it would be: a table, or data.
            for at in [0, 4096 * 3, 4 << 20] {
                node.write(&CX, at + 100, vec![1; 10], WriteFlags::empty()).await.expect("writes");
                let found = node.read_vec(&CX, at, 4096).await.expect("reads");
                assert!(found.iter().all(|byte| *byte != 0xee));
            }
            // Stable, so that no crash brings it back.
            assert!(disk.crash_point().durable.to_bytes().iter().all(|byte| *byte != 0xee));
        }
    });
}

#[test]
fn a_backing_name_of_any_length_is_changed_so_that_a_crash_leaves_the_old_or_the_new() {
    World::new(0).run(async {
        let disk = SimDisk::new(0);
        let storage = made(&disk, true).await;
        let name = |len: usize, fill: &str| {
            Some(BackingRef { filename: fill.repeat(len), format: Some("raw".into()) })
        };
        let names =
            [name(10, "a"), name(1000, "b"), name(1023, "c"), name(500, "d"), None, name(3, "e"), None];
        let mut before = Some(BackingRef { filename: "below".into(), format: Some("raw".into()) });
        for after in names {
            let node = open(&storage).await;
            let states = Arc::new(Mutex::new(Vec::new()));
            let seen = states.clone();
            disk.observe(move |point| {
                let mut seen = seen.lock().expect("unpoisoned");
                seen.extend(point.all_power_cuts(64).expect("few writes"));
                // Torn in any way that sectors allow.
                for kept in 0..16 {
                    seen.push(point.power_cut(|_, sector| kept >> (sector % 4) & 1 == 1));
                }
            });
            node.set_backing_ref(&CX, after.clone()).await.expect("changes");
            disk.stop_observing();
            assert_eq!(node.info().backing, after);
            let states = std::mem::take(&mut *states.lock().expect("unpoisoned"));
            for media in states {
                let storage = StorageHandle::new(SimDisk::with(media, Default::default()));
                let found = open(&storage).await.info().backing;
                assert!(found == before || found == after, "{found:?}");
            }
            assert!(disk.crash_point().pending.is_empty(), "stable on return");
            before = after;
        }
        let node = open(&storage).await;
        assert!(node.set_backing_ref(&CX, name(1024, "f")).await.is_err());
    });
}

#[test]
fn after_a_failed_sync_nothing_is_written_any_more() {
    World::new(0).run(async {
        let disk = SimDisk::new(0);
        let storage = made(&disk, true).await;
        let node = open(&storage).await;
        write(&node, 0).await;
        disk.fail(DiskOp::Sync, 0, 1, ErrorKind::Io);
        assert_eq!(node.sync(&CX).await.expect_err("is told").kind(), ErrorKind::Io);
        disk.heal();
        for _ in 0..2 {
            assert_eq!(node.sync(&CX).await.expect_err("never retried").kind(), ErrorKind::Poisoned);
            let refused = node.write(&CX, 0, vec![1; 512], WriteFlags::empty()).await;
            assert_eq!(refused.expect_err("refused").kind(), ErrorKind::Poisoned);
        }
        assert_eq!(node.read_vec(&CX, 0, 4096).await.expect("reads go on"), vec![1; 4096]);
        assert!(node.close(&CX).await.is_err());
    });
}

#[test]
fn a_round_that_could_not_write_is_done_again_by_the_next_flush() {
    World::new(0).run(async {
        for has_backing in [false, true] {
            let disk = SimDisk::new(0);
            let storage = made(&disk, has_backing).await;
            let node = open(&storage).await;
            write(&node, 0).await;
            for nth in 0..3 {
                disk.fail(DiskOp::Write, nth, 1, ErrorKind::Io);
                let flushed = node.sync(&CX).await;
                disk.heal();
                if let Err(error) = flushed {
                    assert_eq!(error.kind(), ErrorKind::Io);
                }
            }
            node.sync(&CX).await.expect("syncs");
            let storage = StorageHandle::new(SimDisk::with(disk.crash_point().durable, Default::default()));
            let found = open(&storage).await.read_vec(&CX, 0, 4096).await.expect("reads");
            assert_eq!(found, vec![1; 4096], "backing {has_backing}");
        }
    });
}
