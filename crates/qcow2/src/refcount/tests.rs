use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::FutureExt;
use infill_base::WriteFlags;
use infill_sim::{Boundary, CrashPoint, DiskOp, DiskOptions, Media, Rng, SimDisk, World, block_on};
use infill_storage::rt;

use super::*;
use crate::header::Purpose;
use crate::{CreateOptions, create};

const CX: Ctx = Ctx::GUEST;

fn disk(options: &CreateOptions) -> SimDisk {
    let disk = SimDisk::new(0);
    block_on(create(&CX, &StorageHandle::new(disk.clone()), options)).unwrap();
    disk
}

fn header(storage: &StorageHandle) -> Header {
    block_on(Header::read(&CX, storage, Purpose::Use)).unwrap()
}

fn small(refcount_bits: u32) -> CreateOptions {
    CreateOptions { size: 64 << 10, cluster_bytes: 512, refcount_bits, ..CreateOptions::default() }
}

/// Allocates, growing where that is needed.
async fn allocate(refcounts: &Refcounts, header: &mut Header, want: u64) -> IoResult<HostRun> {
    loop {
        if let Some(run) = refcounts.allocate(&CX, want).await? {
            return Ok(run);
        }
        if let Some(next) = refcounts.grow(&CX, header).await? {
            *header = next;
        }
    }
}

/// What a round does with refcounts.
async fn round(refcounts: &Refcounts, storage: &StorageHandle) {
    let copies = refcounts.freeze();
    for copy in &copies {
        metaio::write(&CX, storage, copy.at.0, copy.bytes.clone()).await.unwrap();
    }
    storage.sync(&CX).await.unwrap();
    refcounts.written(copies, true);
}

#[test]
fn random_allocations_and_releases_never_double_and_all_reach_the_disk() {
    for (seed, bits) in [1, 2, 4, 8, 16, 32, 64].into_iter().enumerate() {
        let disk = disk(&small(bits));
        let storage = StorageHandle::new(disk.clone());
        let mut header = header(&storage);
        let refcounts = Refcounts::new(storage.clone(), &header);
        let mut rng = Rng::new(seed as u64);
        let mut held: BTreeMap<u64, u64> = BTreeMap::new();
        block_on(async {
            for _ in 0..1500 {
                match rng.below(10) {
                    0..6 => {
                        let want = 1 + rng.below(40);
                        let run = allocate(&refcounts, &mut header, want).await.unwrap();
                        assert!((1..=want).contains(&run.count));
                        for cluster in run.clusters() {
                            assert_eq!(held.insert(cluster, 1), None, "cluster {cluster} was given twice");
                        }
                    }
                    6..9 if !held.is_empty() => {
                        let nth = rng.index(held.len());
                        let first = *held.keys().nth(nth).unwrap();
                        let count = (1..=8).take_while(|nth| held.contains_key(&(first + nth - 1))).count();
                        let run = HostRun { first: HostCluster(first), count: count as u64, zeroed: false };
                        refcounts.release(&CX, run).await.unwrap();
                        held.retain(|cluster, _| !run.clusters().contains(cluster));
                    }
                    _ => round(&refcounts, &storage).await,
                }
            }
            round(&refcounts, &storage).await;
            assert!(!refcounts.is_dirty());

            let header = Header::read(&CX, &storage, Purpose::Use).await.unwrap();
            let fresh = Refcounts::new(storage.clone(), &header);
            let metadata = metadata(&fresh, &header).await;
            for cluster in 0..storage.len() / 512 + 600 {
                let expected = u64::from(held.contains_key(&cluster) || metadata.contains(&cluster));
                let found = fresh.refcount(&CX, HostCluster(cluster)).await.unwrap();
                assert_eq!(found, expected, "{bits} bits, cluster {cluster}");
            }
        });
    }
}

/// Every cluster that header and refcount table name.
async fn metadata(refcounts: &Refcounts, header: &Header) -> Vec<u64> {
    let end = refcounts.storage.len() / header.geometry().cluster_bytes();
    let mut found = Vec::new();
    for cluster in 0..end {
        let run = HostRun { first: HostCluster(cluster), count: 1, zeroed: false };
        if refcounts.metadata_at(&CX, run).await.unwrap().is_some() {
            found.push(cluster);
        }
    }
    found
}

#[test]
fn a_run_is_called_zeroed_only_where_nothing_was_ever_written() {
    let disk = disk(&small(16));
    let storage = StorageHandle::new(disk.clone());
    let mut header = header(&storage);
    let refcounts = Refcounts::new(storage.clone(), &header);
    let mut rng = Rng::new(5);
    block_on(async {
        let (mut held, mut zeroed) = (Vec::new(), 0);
        for _ in 0..400 {
            let run = allocate(&refcounts, &mut header, 1 + rng.below(20)).await.unwrap();
            for cluster in run.clusters() {
                let at = cluster * 512;
                let bytes = metaio::read(&CX, &storage, at, 512).await.unwrap();
                assert!(!run.zeroed || bytes.iter().all(|byte| *byte == 0), "cluster {cluster}");
                storage.write(&CX, at, vec![1; 512], WriteFlags::empty()).await.unwrap();
            }
            zeroed += u64::from(run.zeroed);
            held.push(run);
            if rng.per_mille(400) {
                let run = held.swap_remove(rng.index(held.len()));
                refcounts.release(&CX, run).await.unwrap();
            }
        }
        assert!(zeroed > 50, "only {zeroed} of 400 runs");
    });
}

#[test]
fn a_failed_write_is_written_again_and_a_sector_is_never_in_flight_twice() {
    let disk = disk(&small(16));
    let storage = StorageHandle::new(disk.clone());
    let mut header = header(&storage);
    let refcounts = Refcounts::new(storage.clone(), &header);
    block_on(async {
        let run = allocate(&refcounts, &mut header, 4).await.unwrap();
        let first = refcounts.freeze();
        assert_eq!(first.len(), 1);
        let other = allocate(&refcounts, &mut header, 4).await.unwrap();
        assert!(refcounts.freeze().is_empty(), "the sector is still in flight");
        assert!(refcounts.is_dirty());
        refcounts.written(first, false);
        let again = refcounts.freeze();
        assert_eq!(again.len(), 1);
        for cluster in run.clusters().chain(other.clusters()) {
            assert_eq!(refcount_get(&again[0].bytes, cluster, &header.geometry()), 1);
        }
        refcounts.written(again, true);
        assert!(!refcounts.is_dirty());
    });
}

/// The refcount table and header at a crash point are those from before or from after a growth, never in between.
fn growth_is_whole(point: &CrashPoint, seed: u64) {
    for state in 0..3 {
        let media = point.random_power_cut(&mut Rng::new(seed * 3 + state));
        let storage = StorageHandle::new(SimDisk::with(media, DiskOptions::default()));
        let header = header(&storage);
        let geometry = header.geometry();
        block_on(async {
            let refcounts = Refcounts::new(storage.clone(), &header);
            refcounts.load_table(&CX).await.unwrap();
            let entries = lock(&refcounts.cache).entries();
            for index in (0..entries).filter(|index| lock(&refcounts.cache).entry(*index) != 0) {
                // Fails where an entry names a block that does not count itself.
                refcounts.load_block(&CX, index).await.unwrap();
            }
            let table = header.refcount_table();
            for nth in 0..u64::from(table.count) {
                let cluster = HostCluster(geometry.host_cluster(table.at).0 + nth);
                assert_eq!(refcounts.refcount(&CX, cluster).await.unwrap(), 1, "the table counts as free");
            }
        });
    }
}

#[test]
fn growth_of_blocks_and_table_is_whole_at_every_crash_point() {
    use std::sync::atomic::{AtomicU64, Ordering};
    let disk = disk(&small(16));
    let storage = StorageHandle::new(disk.clone());
    let mut header = header(&storage);
    let before = header.refcount_table();
    let refcounts = Refcounts::new(storage.clone(), &header);
    let states = std::sync::Arc::new(AtomicU64::new(0));
    let seen = states.clone();
    disk.observe(move |point| growth_is_whole(point, seen.fetch_add(1, Ordering::Relaxed)));
    block_on(async {
        for nth in 0..1200 {
            allocate(&refcounts, &mut header, 64).await.unwrap();
            if nth % 10 == 0 {
                round(&refcounts, &storage).await;
            }
        }
    });
    disk.stop_observing();
    assert!(header.refcount_table().count > before.count, "the table did not grow");
    assert!(states.load(Ordering::Relaxed) > 1000);
}

#[test]
fn a_block_is_stable_before_the_table_names_it() {
    let disk = disk(&small(16));
    let storage = StorageHandle::new(disk.clone());
    let mut header = header(&storage);
    let refcounts = Refcounts::new(storage.clone(), &header);
    let log = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = log.clone();
    block_on(async {
        while refcounts.allocate(&CX, 512).await.unwrap().is_some() {}
        disk.observe(move |point| match point.boundary {
            Boundary::Synced => seen.lock().unwrap().push("sync"),
            Boundary::Completed => seen.lock().unwrap().push("write"),
            Boundary::Submitted => {}
        });
        assert!(refcounts.grow(&CX, &header).await.unwrap().is_none());
        disk.stop_observing();
        assert_eq!(
            *log.lock().unwrap(),
            ["write", "write", "sync", "write", "sync"],
            "reserve, block, entry"
        );
        allocate(&refcounts, &mut header, 1).await.unwrap();
    });
}

#[test]
fn a_slow_block_delays_nobody_who_does_not_need_it() {
    let disk = disk(&small(16));
    let storage = StorageHandle::new(disk.clone());
    let mut header_now = header(&storage);
    let refcounts = Refcounts::new(storage.clone(), &header_now);
    block_on(async {
        for _ in 0..40 {
            allocate(&refcounts, &mut header_now, 64).await.unwrap();
        }
        round(&refcounts, &storage).await;
    });
    let refcounts = Refcounts::new(storage.clone(), &header_now);
    block_on(async {
        allocate(&refcounts, &mut header_now, 1).await.unwrap();
        let hold = disk.hold(DiskOp::Read);
        let old = HostRun { first: HostCluster(8 * 256 - 5), count: 1, zeroed: false };
        let mut slow = Box::pin(refcounts.refcount(&CX, old.first));
        assert!(slow.as_mut().now_or_never().is_none(), "the block is here already");
        let run = refcounts.allocate(&CX, 1).now_or_never();
        assert!(run.is_some_and(|run| run.unwrap().is_some()));
        // Given up in the middle: the next one reads again.
        drop(slow);
        drop(hold);
        assert_eq!(refcounts.refcount(&CX, old.first).await.unwrap(), 1);
    });
}

#[test]
fn reactors_that_allocate_at_once_get_different_clusters() {
    let options =
        DiskOptions { latency: (Duration::ZERO, Duration::from_micros(50)), ..DiskOptions::default() };
    let first = disk(&small(16)).media();
    for seed in 0..20 {
        let world = World::new(seed);
        let storage = StorageHandle::new(SimDisk::with(first.clone(), options.clone()));
        let header = world.run(Header::read(&CX, &storage, Purpose::Use)).unwrap();
        let refcounts = std::rc::Rc::new(Refcounts::new(storage.clone(), &header));
        let header = std::rc::Rc::new(std::cell::RefCell::new(header));
        // The turn between two rounds.
        let turn = std::rc::Rc::new(async_lock::Mutex::new(()));
        let runs = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
        world.run(async {
            for _ in 0..8 {
                let (refcounts, runs) = (refcounts.clone(), runs.clone());
                let (header, turn) = (header.clone(), turn.clone());
                rt::spawn(async move {
                    for _ in 0..40 {
                        let run = loop {
                            if let Some(run) = refcounts.allocate(&CX, 7).await.unwrap() {
                                break run;
                            }
                            let _turn = turn.lock().await;
                            let now = header.borrow().clone();
                            if let Some(next) = refcounts.grow(&CX, &now).await.unwrap() {
                                *header.borrow_mut() = next;
                            }
                        };
                        runs.borrow_mut().push(run);
                    }
                });
            }
            rt::sleep(Duration::from_secs(100)).await;
        });
        let mut clusters: Vec<u64> = runs.borrow().iter().flat_map(HostRun::clusters).collect();
        assert_eq!(runs.borrow().len(), 320);
        let count = clusters.len();
        clusters.sort_unstable();
        clusters.dedup();
        assert_eq!(clusters.len(), count, "seed {seed}: a cluster was given twice");
    }
}

#[test]
fn no_space_is_said_only_after_holes_were_used_and_forgotten_once_there_is_some() {
    let disk = disk(&small(16));
    let storage = StorageHandle::new(disk.clone());
    let mut header = header(&storage);
    let refcounts = Refcounts::new(storage.clone(), &header);
    block_on(async {
        let mut held = Vec::new();
        for _ in 0..30 {
            held.push(allocate(&refcounts, &mut header, 64).await.unwrap());
        }
        disk.set_capacity(storage.len());
        while let Ok(run) = allocate(&refcounts, &mut header, 1).await {
            held.push(run);
        }
        let freed = held.remove(7);
        refcounts.release(&CX, freed).await.unwrap();
        let again = allocate(&refcounts, &mut header, 64).await.unwrap();
        assert!(freed.clusters().contains(&again.first.0));
        let full = loop {
            match allocate(&refcounts, &mut header, 64).await {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), ErrorKind::NoSpace);
        disk.set_capacity(1 << 30);
        assert!(allocate(&refcounts, &mut header, 64).await.is_ok());
    });
}

#[test]
fn holes_before_the_end_are_found_when_nothing_else_is_left() {
    let disk = disk(&small(16));
    let storage = StorageHandle::new(disk.clone());
    let mut header_now = header(&storage);
    let refcounts = Refcounts::new(storage.clone(), &header_now);
    block_on(async {
        let mut held = Vec::new();
        for _ in 0..40 {
            held.push(allocate(&refcounts, &mut header_now, 64).await.unwrap());
        }
        refcounts.release(&CX, held[3]).await.unwrap();
        round(&refcounts, &storage).await;
        disk.set_capacity(storage.len());
        // As if opened again: nothing is remembered.
        let refcounts = Refcounts::new(storage.clone(), &header_now);
        let mut found = 0;
        while let Ok(run) = allocate(&refcounts, &mut header_now, 64).await {
            found += run.clusters().filter(|cluster| held[3].clusters().contains(cluster)).count() as u64;
        }
        assert_eq!(found, held[3].count);
    });
}

#[test]
fn the_format_ends_before_its_table_gets_too_long() {
    let geometry = Geometry::new(3, 9, 6, false).unwrap();
    let entries = (8 << 20) / 8;
    assert!(grow::plan_fits(&geometry, entries / 2, entries / 2));
    assert!(!grow::plan_fits(&geometry, entries, entries));
}

#[test]
fn the_cache_is_bounded() {
    let clusters = CACHE_BYTES_MAX as u64 / 512 * 2;
    let options =
        CreateOptions { size: 64 << 20, cluster_bytes: 512, refcount_bits: 64, ..CreateOptions::default() };
    let disk = disk(&options);
    let storage = StorageHandle::new(disk.clone());
    let mut header = header(&storage);
    let refcounts = Refcounts::new(storage.clone(), &header);
    block_on(async {
        for nth in 0..clusters {
            allocate(&refcounts, &mut header, 64).await.unwrap();
            if nth % 500 == 0 {
                assert!(!refcounts.wants_round());
                round(&refcounts, &storage).await;
            }
        }
        let cached = lock(&refcounts.cache).cached_bytes();
        assert!(cached <= CACHE_BYTES_MAX + 500 * 512, "{cached} bytes");
        assert!(cached >= CACHE_BYTES_MAX / 2, "{cached} bytes: the bound was never met");
    });
}

/// Overwrites bytes of an image.
fn damage(disk: &SimDisk, at: u64, bytes: &[u8]) {
    let storage = StorageHandle::new(disk.clone());
    block_on(storage.write(&CX, at, bytes.to_vec(), WriteFlags::empty())).unwrap();
}

#[test]
fn damaged_refcounts_are_told_and_never_give_metadata_away() {
    // Cluster 0 header, 1 refcount table, 2 its block, 3 L1 table (64 KiB clusters).
    let table = 65536;
    let block = 2 * 65536;
    let corruptions: [(u64, Vec<u8>, &str); 7] = [
        (block, vec![0; 2], "header"),
        (block + 2, vec![0; 2], "refcount table"),
        (block + 4, vec![0; 2], "counts itself as free"),
        (block + 6, vec![0; 2], "L1 table"),
        (table, 0x20200u64.to_be_bytes().to_vec(), "multiple of the cluster size"),
        (table, (1u64 << 40).to_be_bytes().to_vec(), "behind the end of the file"),
        (table, 0x30000u64.to_be_bytes().to_vec(), "L1 table"),
    ];
    for (at, bytes, words) in corruptions {
        let disk = disk(&CreateOptions { size: 1 << 30, ..CreateOptions::default() });
        damage(&disk, at, &bytes);
        let before = disk.media();
        let storage = StorageHandle::new(disk.clone());
        let header = header(&storage);
        let refcounts = Refcounts::new(storage.clone(), &header);
        let error = block_on(refcounts.allocate(&CX, 8)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(words), "{error}");
        assert!(same_bytes(&before, &disk.media(), 4 * 65536), "{words}: something was written");
    }
}

fn same_bytes(one: &Media, other: &Media, len: usize) -> bool {
    let bytes = |media: &Media| {
        let mut bytes = vec![0; len];
        media.read(0, &mut bytes);
        bytes
    };
    bytes(one) == bytes(other)
}

#[test]
fn releasing_what_is_free_is_told_and_changes_nothing() {
    let disk = disk(&small(16));
    let storage = StorageHandle::new(disk.clone());
    let mut header = header(&storage);
    let refcounts = Refcounts::new(storage.clone(), &header);
    block_on(async {
        let run = allocate(&refcounts, &mut header, 2).await.unwrap();
        let longer = HostRun { count: 3, ..run };
        let error = refcounts.release(&CX, longer).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert_eq!(refcounts.refcount(&CX, run.first).await.unwrap(), 1);
        let outside = HostRun { first: HostCluster(1 << 40), count: 1, zeroed: false };
        assert_eq!(refcounts.release(&CX, outside).await.unwrap_err().kind(), ErrorKind::Corrupt);
    });
}
