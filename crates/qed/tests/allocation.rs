//! Allocation runs in parallel: nothing but the guest clusters concerned is held.

mod common;

use std::rc::Rc;
use std::time::Duration;

use common::CX;
use futures_util::future::join_all;
use infill_base::{ErrorKind, Limits, WriteFlags};
use infill_node::{BackingRef, MemoryOverlay, NodeHandle, Repair};
use infill_qed::{CreateOptions, OpenOptions, Qed, check, create};
use infill_sim::{DiskOp, DiskOptions, Media, SimDisk, World};
use infill_storage::{Storage, StorageHandle, rt};

/// Guest bytes of an L2 table of one cluster of 4 KiB.
const TABLE_SPAN: u64 = 512 * 4096;

async fn open(disk: &SimDisk, below: Option<NodeHandle>) -> NodeHandle {
    let storage = StorageHandle::new(disk.clone());
    let backing = below.as_ref().map(|_| BackingRef { filename: "below".into(), format: None });
    let options = CreateOptions { size: 16 * TABLE_SPAN, backing, cluster_bytes: 4096, table_clusters: 1 };
    create(&CX, &storage, &options).await.expect("creates");
    let node = NodeHandle::new(Qed::open(&CX, storage, OpenOptions::default()).await.expect("opens"));
    node.backing().expect("an overlay").replace(below).await;
    node
}

/// Writes 500 bytes to each of `places` at once, and does `then` when all of them wait for something.
async fn meanwhile(node: &NodeHandle, places: impl Iterator<Item = u64>, then: impl Future<Output = ()>) {
    let writes = places.map(|at| async move {
        node.write(&CX, at, vec![2; 500], WriteFlags::empty()).await.expect("writes");
    });
    let then = async {
        // The clock moves when nobody can go on.
        rt::sleep(Duration::from_millis(1)).await;
        then.await;
    };
    futures_util::future::join(join_all(writes), then).await;
}

#[test]
fn many_allocating_writes_are_in_flight_at_once_and_so_are_new_l2_tables() {
    for has_backing in [false, true] {
        World::new(7).run(async {
            let disk = SimDisk::new(0);
            let below = has_backing.then(|| NodeHandle::new(MemoryOverlay::new(16 * TABLE_SPAN, 4096, None)));
            let node = open(&disk, below).await;
            // The first one sets the mark, and makes a table.
            node.write(&CX, 0, vec![1; 4096], WriteFlags::empty()).await.expect("writes");

            let payloads = disk.hold(DiskOp::Write);
            let places = (1..33).map(|cluster| cluster * 4096 + 100);
            meanwhile(&node, places, async {
                assert_eq!(disk.in_flight(DiskOp::Write), 32, "payloads of 32 new clusters");
                drop(payloads);
            })
            .await;

            let tables = disk.hold(DiskOp::Allocate);
            meanwhile(&node, (1..9).map(|table| table * TABLE_SPAN), async {
                assert_eq!(disk.in_flight(DiskOp::Allocate), 8, "new L2 tables");
                // Whoever needs none is not held up.
                node.write(&CX, 100 * 4096, vec![4; 500], WriteFlags::empty()).await.expect("writes");
                node.read_vec(&CX, 0, 8192).await.expect("reads");
                drop(tables);
            })
            .await;

            for table in 1..9 {
                assert_eq!(node.read_vec(&CX, table * TABLE_SPAN, 500).await.expect("reads"), vec![2; 500]);
            }
            node.close(&CX).await.expect("closes");
            let report = check(&CX, &StorageHandle::new(disk), Repair::Nothing).await.expect("checks");
            assert_eq!((report.corruptions, report.leaks, report.allocated_clusters), (0, 0, 42));
        });
    }
}

#[test]
fn one_table_is_made_once_however_many_ask_for_it() {
    for seed in 0..20 {
        World::new(seed).run(async {
            let latency = (Duration::from_micros(1), Duration::from_micros(100));
            let options = DiskOptions { seed, latency, ..DiskOptions::default() };
            let disk = SimDisk::with(Media::new(0), options);
            let node = open(&disk, None).await;
            let writes = (0..16).map(|cluster| {
                let node = node.clone();
                rt::detached(async move {
                    node.write(&CX, TABLE_SPAN + cluster * 4096, vec![1; 4096], WriteFlags::empty()).await
                })
            });
            join_all(writes).await.into_iter().for_each(|result| result.expect("writes"));
            node.close(&CX).await.expect("closes");
            // Header, L1 table, one L2 table, 16 clusters.
            let report = check(&CX, &StorageHandle::new(disk), Repair::Nothing).await.expect("checks");
            assert_eq!((report.leaks, report.image_end_offset), (0, 19 * 4096));
        });
    }
}

#[test]
fn a_table_that_loads_slowly_delays_nobody_who_needs_another() {
    World::new(1).run(async {
        let disk = SimDisk::new(0);
        let node = open(&disk, None).await;
        for table in [0, 1] {
            node.write(&CX, table * TABLE_SPAN, vec![5; 4096], WriteFlags::empty()).await.expect("writes");
        }
        node.close(&CX).await.expect("closes");
        let storage = StorageHandle::new(disk.clone());
        let node = NodeHandle::new(Qed::open(&CX, storage, OpenOptions::default()).await.expect("opens"));
        node.read_vec(&CX, 0, 512).await.expect("reads");
        let loads = disk.hold(DiskOp::Read);
        meanwhile(&node, std::iter::once(TABLE_SPAN), async {
            assert_eq!(disk.in_flight(DiskOp::Read), 1);
            // The other table is in memory: a write into it needs no read.
            node.write(&CX, 4096, vec![6; 4096], WriteFlags::empty()).await.expect("writes");
            assert_eq!(disk.in_flight(DiskOp::Read), 1);
            drop(loads);
        })
        .await;
    });
}

#[test]
fn two_writes_of_one_new_cluster_take_one_cluster() {
    for seed in 0..20 {
        World::new(seed).run(async {
            let latency = (Duration::from_micros(1), Duration::from_micros(100));
            let options = DiskOptions { seed, latency, ..DiskOptions::default() };
            let disk = SimDisk::with(Media::new(0), options);
            let below = NodeHandle::new(MemoryOverlay::new(16 * TABLE_SPAN, 4096, None));
            below.write(&CX, 0, vec![9; 4096], WriteFlags::empty()).await.expect("writes");
            let node = open(&disk, Some(below)).await;
            let writes = (0..8).map(|part: u64| {
                let node = node.clone();
                rt::detached(async move {
                    node.write(&CX, part * 500, vec![part as u8; 100], WriteFlags::empty()).await
                })
            });
            join_all(writes).await.into_iter().for_each(|result| result.expect("writes"));
            let mut expected = vec![9; 4096];
            (0..8).for_each(|part| expected[part * 500..part * 500 + 100].fill(part as u8));
            assert_eq!(node.read_vec(&CX, 0, 4096).await.expect("reads"), expected);
            node.close(&CX).await.expect("closes");
            let report = check(&CX, &StorageHandle::new(disk), Repair::Nothing).await.expect("checks");
            assert_eq!((report.allocated_clusters, report.corruptions), (1, 0));
        });
    }
}

#[test]
fn a_full_disk_fails_the_write_that_met_it_and_nothing_else() {
    for has_backing in [false, true] {
        World::new(3).run(async {
            let disk = SimDisk::new(0);
            let below = has_backing.then(|| NodeHandle::new(MemoryOverlay::new(16 * TABLE_SPAN, 4096, None)));
            let node = open(&disk, below).await;
            node.write(&CX, 0, vec![1; 4096], WriteFlags::empty()).await.expect("writes");
            disk.set_capacity(24 * 4096);
            let full = disk.clone();
            let mut written = 1;
            let error = loop {
                match node.write(&CX, written * 4096, vec![1; 4096], WriteFlags::empty()).await {
                    Ok(()) => written += 1,
                    Err(error) => break error,
                }
            };
            assert_eq!(error.kind(), ErrorKind::NoSpace);
            // Header, L1, L2, and clusters up to the last byte.
            assert_eq!(written, 21);
            for _ in 0..100 {
                let error = node.write(&CX, 50 * 4096, vec![1; 512], WriteFlags::empty()).await;
                assert_eq!(error.expect_err("full").kind(), ErrorKind::NoSpace);
            }
            node.write(&CX, 4096, vec![2; 100], WriteFlags::empty()).await.expect("in place");
            node.sync(&CX).await.expect("what was acknowledged needs no space");
            full.set_capacity(1 << 30);
            // What the failed writes took is clean again after this.
            node.sync(&CX).await.expect("syncs");
            node.write(&CX, 50 * 4096, vec![3; 4096], WriteFlags::empty()).await.expect("writes again");
            node.close(&CX).await.expect("closes");
            let report = check(&CX, &StorageHandle::new(disk), Repair::Nothing).await.expect("checks");
            assert_eq!((report.corruptions, report.leaks, report.allocated_clusters), (0, 0, 22));
        });
    }
}

#[test]
fn a_storage_that_wants_whole_blocks_gets_whole_blocks() {
    for seed in 0..6 {
        World::new(seed).run(async {
            let limits = Limits { request_align: 4096, memory_align: 4096, ..Limits::default() };
            let latency = (Duration::from_micros(1), Duration::from_micros(100));
            let options = DiskOptions { seed, limits, latency, ..DiskOptions::default() };
            let disk = SimDisk::with(Media::new(0), options);
            let node = open(&disk, None).await;
            let node = Rc::new(node);
            let writes =
                (0..64_u64).map(|part| {
                    let node = node.clone();
                    async move {
                        node.write(&CX, part * 300, vec![part as u8 + 1; 300], WriteFlags::empty()).await
                    }
                });
            join_all(writes).await.into_iter().for_each(|result| result.expect("writes"));
            // Again, in place: what lies around each is kept.
            let writes =
                (0..64_u64).map(|part| {
                    let node = node.clone();
                    async move {
                        node.write(&CX, part * 300 + 7, vec![part as u8 + 1; 20], WriteFlags::empty()).await
                    }
                });
            join_all(writes).await.into_iter().for_each(|result| result.expect("writes"));
            let found = node.read_vec(&CX, 5, 64 * 300 - 5).await.expect("reads");
            let expected: Vec<u8> = (5..64 * 300).map(|at| (at / 300) as u8 + 1).collect();
            assert_eq!(found, expected);
            node.close(&CX).await.expect("closes");
        });
    }
    // Larger blocks than slices of tables: two rounds could write one.
    let limits = Limits { request_align: 8192, ..Limits::default() };
    let disk = SimDisk::with(Media::new(0), DiskOptions { limits, ..DiskOptions::default() });
    World::new(0).run(async {
        let storage = StorageHandle::new(disk);
        create(&CX, &storage, &CreateOptions { size: 1 << 20, ..Default::default() }).await.expect("creates");
        let refused = Qed::open(&CX, storage, OpenOptions::default()).await.map(|_| ());
        assert!(refused.expect_err("refused").to_string().contains("8192"));
    });
}

#[test]
fn requests_that_are_dropped_in_the_middle_never_cut_the_file_or_tear_the_header() {
    for seed in 0..60 {
        let mut rng = infill_sim::Rng::new(seed);
        World::new(seed).run(async {
            let latency = (Duration::from_micros(1), Duration::from_micros(300));
            let options = DiskOptions { seed, latency, ..DiskOptions::default() };
            let disk = SimDisk::with(Media::new(0), options);
            let node = open(&disk, None).await;
            // A partial cluster at the end, so that the first write cuts it off.
            disk.set_len(&CX, disk.len() + 1000).await.expect("grows");
            drop(node);
            let storage = StorageHandle::new(disk.clone());
            let node = Qed::open(&CX, storage.clone(), OpenOptions::default()).await.expect("opens");
            let node = NodeHandle::new(node);
            let mut acknowledged = Vec::new();
            for nth in 1..40_u64 {
                // No place twice: what a dropped write had begun may be over at any time.
                let at = nth * 4096 + TABLE_SPAN * rng.below(3);
                let patience = Duration::from_micros(rng.below(900));
                match rng.below(12) {
                    0 => drop(rt::timeout(patience, node.set_backing_ref(&CX, None)).await),
                    1 => drop(rt::timeout(patience, node.resize(&CX, node.len() + 512)).await),
                    2 => drop(rt::timeout(patience, node.sync(&CX)).await),
                    _ => {
                        let write = node.write(&CX, at, vec![nth as u8; 4096], WriteFlags::empty());
                        if let Some(answer) = rt::timeout(patience, write).await {
                            answer.expect("writes");
                            acknowledged.push((at, nth as u8));
                        }
                    }
                }
            }
            for (at, value) in &acknowledged {
                let found = node.read_vec(&CX, *at, 4096).await.expect("reads");
                assert!(found == vec![*value; 4096], "seed {seed}, byte {at}");
            }
            node.close(&CX).await.expect("closes");
            drop(node);
            let report = check(&CX, &storage, Repair::Nothing).await.expect("checks");
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "seed {seed}");
            let node = Qed::open(&CX, storage, OpenOptions::default()).await.expect("opens");
            let node = NodeHandle::new(node);
            for (at, value) in &acknowledged {
                let found = node.read_vec(&CX, *at, 4096).await.expect("reads");
                assert!(found == vec![*value; 4096], "seed {seed}, byte {at}");
            }
        });
    }
}
