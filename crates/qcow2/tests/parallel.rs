//! What goes on at the same time, and who wins: operations held at a gate in a simulated disk.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::join_all;
use infill_base::{Ctx, DiscardMode, ErrorKind, IoResult, Limits, WriteFlags, ZeroFlags};
use infill_node::{CopyOnRead, Node as _, NodeHandle, RawNode, Repair};
use infill_qcow2::{CreateOptions, OpenOptions, Qcow2, check, create};
use infill_sim::{DiskOp, DiskOptions, Media, SimDisk, World};
use infill_storage::{StorageHandle, rt};

const CLUSTER: u64 = 64 << 10;
/// Guest bytes of one L2 table.
const TABLE: u64 = 512 << 20;
const GUEST: &Ctx = &Ctx::GUEST;

/// An overlay on a disk with gates, over another one.
struct Bed {
    world: World,
    disk: SimDisk,
    source: SimDisk,
    node: NodeHandle,
}

type Outcome<T> = Rc<RefCell<Option<IoResult<T>>>>;

impl Bed {
    fn new(extended_l2: bool) -> Bed {
        let (world, disk, source) = (World::new(1), SimDisk::new(0), SimDisk::new(16 * CLUSTER));
        let node = world.run(async {
            let storage = StorageHandle::new(disk.clone());
            let options = CreateOptions { size: 4 * TABLE, extended_l2, ..CreateOptions::default() };
            create(GUEST, &storage, &options).await.unwrap();
            let below = StorageHandle::new(source.clone());
            below.write(GUEST, 0, vec![0xbb; 16 * CLUSTER as usize], WriteFlags::empty()).await.unwrap();
            let options = OpenOptions { discard: DiscardMode::Unmap, ..OpenOptions::default() };
            let node = NodeHandle::new(Qcow2::open(GUEST, storage, options).await.unwrap());
            node.backing().unwrap().replace(Some(NodeHandle::new(RawNode::new(below, true)))).await;
            node
        });
        Bed { world, disk, source, node }
    }

    /// Begins something, and lets everything run until nothing can.
    fn begin<T: 'static, F: Future<Output = IoResult<T>> + 'static>(
        &self,
        operation: impl FnOnce(NodeHandle) -> F,
    ) -> Outcome<T> {
        let outcome = Outcome::default();
        let (operation, told) = (operation(self.node.clone()), outcome.clone());
        self.world.run(async move {
            rt::spawn(async move { *told.borrow_mut() = Some(operation.await) });
        });
        self.settle();
        outcome
    }

    fn write(&self, at: u64, len: usize, byte: u8) -> Outcome<()> {
        self.begin(
            move |node| async move { node.write(GUEST, at, vec![byte; len], WriteFlags::empty()).await },
        )
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let outcome = self.begin(move |node| async move { node.read_vec(GUEST, at, len).await });
        let read = outcome.borrow_mut().take().expect("the read waits for something").unwrap();
        read.to_vec()
    }

    /// Lets everything run until nothing can, but for what happens when an image is idle for seconds.
    fn settle(&self) {
        self.world.run(rt::sleep(Duration::from_millis(100)));
    }

    fn sync(&self) {
        let outcome = self.begin(|node| async move { node.sync(GUEST).await });
        done(&outcome);
    }
}

#[track_caller]
fn done<T>(outcome: &Outcome<T>) {
    match &*outcome.borrow() {
        Some(Ok(_)) => {}
        Some(Err(error)) => panic!("{error}"),
        None => panic!("it waits for something"),
    }
}

#[track_caller]
fn waits<T>(outcome: &Outcome<T>) {
    assert!(outcome.borrow().is_none(), "it does not wait");
}

#[test]
fn new_l2_tables_and_allocating_writes_are_in_flight_at_once() {
    let bed = Bed::new(false);
    let hold = bed.disk.hold(DiskOp::WriteZeroes);
    let first = [bed.write(0, 4096, 1), bed.write(TABLE, CLUSTER as usize, 2)];
    // Two tables are being made.
    assert_eq!(bed.disk.in_flight(DiskOp::WriteZeroes), 2);
    drop(hold);
    bed.settle();
    first.iter().for_each(done);
    let hold = bed.disk.hold(DiskOp::Write);
    let writes: Vec<_> = (1..33).map(|nth| bed.write(nth * CLUSTER, CLUSTER as usize, 3)).collect();
    assert_eq!(bed.disk.in_flight(DiskOp::Write), 32);
    writes.iter().for_each(waits);
    drop(hold);
    bed.settle();
    writes.iter().for_each(done);
    assert_eq!(bed.read(5 * CLUSTER, 10), [3; 10]);
    assert_eq!(bed.read(4090, 10), [1, 1, 1, 1, 1, 1, 0xbb, 0xbb, 0xbb, 0xbb]);
}

#[test]
fn what_is_reserved_is_given_back_when_nobody_needs_it_for_a_while() {
    let bed = Bed::new(false);
    let leaks = || {
        let media = SimDisk::with(bed.disk.media(), DiskOptions::default());
        let report =
            bed.world.run(async move { check(GUEST, &StorageHandle::new(media), Repair::Nothing).await });
        let report = report.unwrap();
        assert_eq!(report.corruptions, 0, "{report:?}");
        report.leaks
    };
    bed.world.run({
        let node = bed.node.clone();
        async move {
            for nth in 0..3_u64 {
                node.write(GUEST, nth * CLUSTER, vec![7; CLUSTER as usize], WriteFlags::empty())
                    .await
                    .unwrap();
                // A guest that writes now and then keeps what it will need.
                rt::sleep(Duration::from_secs(4)).await;
            }
            node.sync(GUEST).await.unwrap();
        }
    });
    assert!(leaks() > 50, "a run is reserved while it is taken from");
    bed.world.run(rt::sleep(Duration::from_secs(11)));
    assert_eq!(leaks(), 0, "nobody had taken of it for ten seconds");
    // What comes then reserves anew, and is given back as well.
    done(&bed.write(9 * CLUSTER, CLUSTER as usize, 8));
    bed.sync();
    bed.world.run(rt::sleep(Duration::from_secs(11)));
    assert_eq!((leaks(), bed.read(9 * CLUSTER, 2), bed.read(2 * CLUSTER, 2)), (0, vec![8; 2], vec![7; 2]));
}

#[test]
fn a_copy_up_that_waits_for_the_source_delays_neither_others_nor_its_own_cluster() {
    let bed = Bed::new(false);
    let hold = bed.source.hold(DiskOp::Read);
    let slow = bed.write(100, 100, 1);
    waits(&slow);
    let miss = bed.begin(|node| async move { node.read_vec(GUEST, 9 * CLUSTER, 512).await });
    waits(&miss);
    done(&bed.write(CLUSTER, CLUSTER as usize, 2));
    // The same cluster, as a whole: nobody holds its range while the source is asked.
    done(&bed.write(0, CLUSTER as usize, 3));
    assert_eq!(bed.read(0, 4), [3; 4]);
    bed.sync();
    drop(hold);
    bed.settle();
    done(&slow);
    done(&miss);
    // Present meanwhile: it wrote in place, and brought nothing back from below.
    assert_eq!(bed.read(99, 3), [3, 1, 1]);
    assert_eq!(bed.read(200, 2), [3, 3]);
}

#[test]
fn a_guests_write_wins_over_a_populate_whose_payload_is_under_way() {
    for extended in [false, true] {
        let bed = Bed::new(extended);
        let generation = bed.node.backing().unwrap().generation();
        done(&bed.write(8 * CLUSTER, CLUSTER as usize, 9));
        let hold = bed.disk.hold(DiskOp::Write);
        let populate = bed.begin(move |node| async move {
            node.populate(GUEST, 0, Bytes::from(vec![7; 2 * CLUSTER as usize]), generation).await
        });
        let write = bed.write(0, 4096, 1);
        // Neither waits for the other: both payloads are on their way to clusters of their own.
        assert!(bed.disk.in_flight(DiskOp::Write) >= 2);
        waits(&populate);
        waits(&write);
        drop(hold);
        bed.settle();
        done(&write);
        let populated = populate.borrow_mut().take().unwrap().unwrap();
        assert_eq!(populated.linked + populated.lost, 2 * CLUSTER);
        assert_eq!(bed.read(0, 2), [1, 1], "extended: {extended}");
        assert_eq!(bed.read(CLUSTER, 2), [7, 7]);
        // A copy-up brought the rest of the cluster from below, or the populate filled its subclusters.
        assert!([0xbb, 7].contains(&bed.read(4096, 1)[0]));
    }
}

#[test]
fn a_populate_of_an_older_generation_links_nothing() {
    let bed = Bed::new(true);
    let generation = bed.node.backing().unwrap().generation();
    let hold = bed.disk.hold(DiskOp::Write);
    let populate = bed.begin(move |node| async move {
        node.populate(GUEST, 0, Bytes::from(vec![7; CLUSTER as usize]), generation).await
    });
    waits(&populate);
    let raise = bed.begin(|node| async move { Ok(node.backing().unwrap().raise().await) });
    // Only links under the old generation are waited for, and this one has not begun.
    done(&raise);
    drop(hold);
    bed.settle();
    let populated = populate.borrow_mut().take().unwrap().unwrap();
    assert_eq!((populated.linked, populated.stale), (0, CLUSTER));
    assert_eq!(bed.read(0, 1), [0xbb]);
}

#[test]
fn a_cluster_that_a_read_still_touches_is_not_given_to_anybody_else() {
    let bed = Bed::new(false);
    done(&bed.write(0, CLUSTER as usize, 1));
    bed.sync();
    let hold = bed.disk.hold(DiskOp::Read);
    let read = bed.begin(|node| async move { node.read_vec(GUEST, 0, 4096).await });
    waits(&read);
    done(&bed.begin(|node| async move { node.discard(GUEST, 0, CLUSTER).await }));
    // No FLUSH waits for the read, and what the round has unmapped is not reused before it has ended.
    bed.sync();
    bed.sync();
    for nth in 1..200 {
        done(&bed.write(nth * CLUSTER, CLUSTER as usize, 2));
    }
    drop(hold);
    bed.settle();
    let bytes = read.borrow_mut().take().unwrap().unwrap();
    assert!(bytes.iter().all(|byte| *byte == 1));
    // Now it is: the image does not grow for the next cluster.
    bed.sync();
    assert_eq!(bed.read(0, 1), [0]);
}

#[test]
fn a_flush_during_a_round_is_answered_by_the_next_and_they_share_it() {
    let bed = Bed::new(false);
    done(&bed.write(0, CLUSTER as usize, 1));
    let hold = bed.disk.hold(DiskOp::Sync);
    let first = bed.begin(|node| async move { node.sync(GUEST).await });
    done(&bed.write(CLUSTER, CLUSTER as usize, 2));
    let late: Vec<_> = (0..10).map(|_| bed.begin(|node| async move { node.sync(GUEST).await })).collect();
    let before = bed.disk.total(DiskOp::Sync);
    waits(&first);
    drop(hold);
    bed.settle();
    done(&first);
    late.iter().for_each(done);
    // The second sync of the first round, and two of the one that ten share.
    assert_eq!(bed.disk.total(DiskOp::Sync) - before, 3);
}

#[test]
fn after_a_failed_sync_nothing_more_is_written_and_reads_go_on() {
    let bed = Bed::new(false);
    done(&bed.write(0, CLUSTER as usize, 1));
    bed.disk.fail(DiskOp::Sync, 0, 1, ErrorKind::Io);
    let sync = bed.begin(|node| async move { node.sync(GUEST).await });
    assert_eq!(sync.borrow_mut().take().unwrap().unwrap_err().kind(), ErrorKind::Io);
    bed.disk.heal();
    let write = bed.write(0, 512, 2);
    assert_eq!(write.borrow_mut().take().unwrap().unwrap_err().kind(), ErrorKind::Poisoned);
    assert_eq!(bed.read(0, 2), [1, 1]);
}

#[test]
fn a_write_that_fails_in_a_round_fails_its_flushes_and_comes_again_with_the_next() {
    let bed = Bed::new(false);
    done(&bed.write(0, CLUSTER as usize, 1));
    bed.disk.fail(DiskOp::Write, 1, 1, ErrorKind::NoSpace);
    let sync = bed.begin(|node| async move { node.sync(GUEST).await });
    assert_eq!(sync.borrow_mut().take().unwrap().unwrap_err().kind(), ErrorKind::NoSpace);
    bed.sync();
    let reopened = bed.world.run(async {
        let storage = StorageHandle::new(SimDisk::with(bed.disk.media(), Default::default()));
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        NodeHandle::new(Qcow2::open(GUEST, storage, options).await.unwrap())
    });
    assert_eq!(bed.world.run(reopened.read_vec(GUEST, 0, 2)).unwrap()[..], [1, 1]);
}

#[test]
fn without_space_writes_fail_reads_go_on_and_space_that_comes_is_used() {
    let bed = Bed::new(false);
    done(&bed.write(0, CLUSTER as usize, 1));
    bed.sync();
    let policy = CopyOnRead::new(&bed.node, 1 << 20);
    bed.node.backing().unwrap().set_copy_on_read(Some(policy));
    bed.disk.set_capacity(1 << 20);
    let full: Vec<_> = (1..100).map(|nth| bed.write(nth * CLUSTER, CLUSTER as usize, 2)).collect();
    let failed = full.iter().filter(|outcome| matches!(&*outcome.borrow(), Some(Err(_)))).count();
    assert!(failed > 50);
    let kinds: Vec<_> = full
        .iter()
        .filter_map(|outcome| outcome.borrow_mut().take().unwrap().err())
        .map(|e| e.kind())
        .collect();
    assert!(kinds.iter().all(|kind| *kind == ErrorKind::NoSpace), "{kinds:?}");
    assert_eq!(bed.read(0, 1), [1]);
    assert_eq!(bed.read(15 * CLUSTER, 1).len(), 1);
    bed.sync();
    bed.disk.set_capacity(1 << 30);
    done(&bed.write(99 * CLUSTER, CLUSTER as usize, 3));
    assert_eq!(bed.read(99 * CLUSTER, 1), [3]);
    bed.sync();
}

#[test]
fn a_discard_over_a_backing_makes_a_pending_copy_up_lose() {
    let bed = Bed::new(true);
    let hold = bed.source.hold(DiskOp::Read);
    let slow = bed.write(10, 10, 1);
    waits(&slow);
    let zero =
        bed.begin(|node| async move { node.write_zeroes(GUEST, 0, CLUSTER, ZeroFlags::MAY_UNMAP).await });
    done(&zero);
    drop(hold);
    bed.settle();
    done(&slow);
    assert_eq!(bed.read(8, 14), [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]);
}

#[test]
fn pieces_of_one_cluster_that_are_populated_at_once_share_its_host_cluster() {
    let bed = Bed::new(true);
    let generation = bed.node.backing().unwrap().generation();
    // The table, and the run that clusters come from.
    done(&bed.write(8 * CLUSTER, CLUSTER as usize, 9));
    let hold = bed.disk.hold(DiskOp::Write);
    let pieces: Vec<_> = (0..64)
        .map(|nth| {
            bed.begin(move |node| async move {
                node.populate(GUEST, nth * 2048, Bytes::from(vec![7; 2048]), generation).await
            })
        })
        .collect();
    drop(hold);
    bed.settle();
    pieces.iter().for_each(done);
    assert_eq!(bed.read(0, 2 * CLUSTER as usize), vec![7; 2 * CLUSTER as usize]);
    let extents = bed.world.run(bed.node.extents(GUEST, 0, 2 * CLUSTER)).unwrap();
    let hosts: Vec<u64> = extents.iter().filter_map(|extent| extent.host).collect();
    let next = bed.world.run(bed.node.extents(GUEST, 8 * CLUSTER, 512)).unwrap()[0].host.unwrap();
    // Nothing was skipped: they follow the cluster that was taken before.
    assert!(hosts.iter().all(|host| *host <= next + 2 * CLUSTER), "{hosts:?} after {next}");
}

#[test]
fn writes_beside_each_other_in_one_block_of_the_storage_keep_each_other() {
    const BLOCK: usize = 4096;
    const PART: usize = 300;
    const DISK: usize = 5 * BLOCK + 1024;
    for seed in 0..12 {
        World::new(seed).run(async {
            let limits =
                Limits { request_align: BLOCK as u32, memory_align: BLOCK as u32, ..Limits::default() };
            let latency = (Duration::from_micros(1), Duration::from_micros(100));
            let options = DiskOptions { seed, limits, latency, ..DiskOptions::default() };
            let storage = StorageHandle::new(SimDisk::with(Media::new(0), options));
            let options = CreateOptions {
                size: DISK as u64,
                extended_l2: seed % 2 == 0,
                cluster_bytes: 128 << 10,
                ..CreateOptions::default()
            };
            create(GUEST, &storage, &options).await.unwrap();
            let node = Qcow2::open(GUEST, storage, OpenOptions::default()).await.unwrap();
            node.write(GUEST, 0, vec![0xee; DISK].into(), WriteFlags::empty()).await.unwrap();
            // Every second part, and one whole block, all at once.
            let whole = 2 * BLOCK..3 * BLOCK;
            let parts = (0..DISK).step_by(2 * PART);
            let parts = parts
                .map(|at| at..(at + PART).min(DISK))
                .filter(|part| part.end <= whole.start || part.start >= whole.end);
            let writes: Vec<_> = parts.chain([whole.clone()]).collect();
            let begun = writes.iter().enumerate().map(|(nth, range)| {
                let data = vec![nth as u8 + 1; range.len()].into();
                node.write(GUEST, range.start as u64, data, WriteFlags::empty())
            });
            join_all(begun).await.into_iter().collect::<IoResult<()>>().unwrap();
            let mut expected = vec![0xee; DISK];
            for (nth, range) in writes.iter().enumerate() {
                expected[range.clone()].fill(nth as u8 + 1);
            }
            let found = node.read(GUEST, 0, BytesMut::zeroed(DISK)).await.unwrap();
            assert!(found == expected, "seed {seed}");
            node.close(GUEST).await.unwrap();
        });
    }
}
