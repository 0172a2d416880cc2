//! The disk keeps exactly what the media model says.

use std::collections::HashSet;

use futures_util::FutureExt;

use super::*;
use crate::World;

const CX: Ctx = Ctx::GUEST;

fn now<T>(future: impl Future<Output = IoResult<T>>) -> T {
    future.now_or_never().expect("has no latency").expect("succeeds")
}

fn write(disk: &SimDisk, at: u64, byte: u8, len: usize) {
    now(disk.write(&CX, at, vec![byte; len].into(), WriteFlags::empty()));
}

fn first_bytes(media: &Media, sectors: u64) -> Vec<u8> {
    (0..sectors).map(|index| media.sector(index)[0]).collect()
}

#[test]
fn an_unsynced_write_may_be_lost_torn_or_reordered_and_a_synced_one_never() {
    let disk = SimDisk::new(4096);
    write(&disk, 0, 1, 2048);
    now(disk.sync(&CX));
    write(&disk, 0, 2, 1024);
    write(&disk, 0, 3, 512);
    let point = disk.crash_point();
    let mut rng = Rng::new(1);
    let states: HashSet<_> = (0..2000).map(|_| first_bytes(&point.random_power_cut(&mut rng), 4)).collect();
    let mut expected = HashSet::new();
    for first in [1, 2, 3] {
        for second in [1, 2] {
            expected.insert(vec![first, second, 1, 1]);
        }
    }
    assert_eq!(states, expected);
    let kill = point.kill(&mut rng);
    assert_eq!(first_bytes(&kill, 4), [3, 2, 1, 1], "a completed write outlives its process");
    assert_eq!(point.all_power_cuts(4).expect("four states").count(), 4);
    assert!(point.all_power_cuts(3).is_none());
}

#[test]
fn a_sync_covers_what_had_completed_when_it_was_called_and_no_more() {
    let options = DiskOptions {
        latency: (Duration::from_micros(10), Duration::from_micros(10)),
        ..DiskOptions::default()
    };
    let disk = SimDisk::with(Media::new(4096), options);
    World::new(1).run(async {
        disk.write(&CX, 0, vec![1; 512].into(), WriteFlags::empty()).await.expect("writes");
        let held = disk.hold(DiskOp::Sync);
        let later = async {
            rt::sleep(Duration::from_micros(1)).await;
            disk.write(&CX, 512, vec![2; 512].into(), WriteFlags::empty()).await.expect("writes");
            drop(held);
        };
        let (synced, ()) = futures_util::future::join(disk.sync(&CX), later).await;
        synced.expect("syncs");
    });
    let point = disk.crash_point();
    assert_eq!(first_bytes(&point.durable, 2), [1, 0]);
    assert_eq!(first_bytes(&point.live, 2), [1, 2]);
    assert_eq!(point.pending.len(), 1);
}

#[test]
fn fua_makes_its_own_sectors_stable_alone_and_older_ones_stay_away() {
    let disk = SimDisk::new(4096);
    write(&disk, 0, 1, 1024);
    now(disk.write(&CX, 0, vec![2; 512].into(), WriteFlags::FUA));
    let point = disk.crash_point();
    let mut rng = Rng::new(3);
    let states: HashSet<_> = (0..500).map(|_| first_bytes(&point.random_power_cut(&mut rng), 2)).collect();
    assert_eq!(states, HashSet::from([vec![2, 0], vec![2, 1]]));
}

#[test]
fn a_write_goes_on_when_its_future_is_dropped() {
    let options = DiskOptions {
        latency: (Duration::from_millis(1), Duration::from_millis(2)),
        ..DiskOptions::default()
    };
    let disk = SimDisk::with(Media::new(512), options);
    let world = World::new(9);
    let late = world.run(rt::timeout(
        Duration::from_micros(1),
        disk.write(&CX, 0, vec![5; 512].into(), WriteFlags::empty()),
    ));
    assert!(late.is_none());
    world.run_until_idle();
    assert_eq!(disk.media().sector(0)[0], 5);
}

#[test]
fn after_a_failed_sync_nothing_is_written() {
    let disk = SimDisk::new(512);
    disk.fail(DiskOp::Sync, 1, 1, ErrorKind::Io);
    now(disk.sync(&CX));
    let error = disk.sync(&CX).now_or_never().expect("no latency").expect_err("fails");
    assert_eq!(error.kind(), ErrorKind::Io);
    let error = disk.write(&CX, 0, vec![1; 512].into(), WriteFlags::empty()).now_or_never();
    assert_eq!(error.expect("no latency").expect_err("refused").kind(), ErrorKind::Poisoned);
    let error = disk.sync(&CX).now_or_never().expect("no latency").expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Poisoned);
}

#[test]
fn behind_its_capacity_there_is_no_space_and_a_failed_write_is_torn() {
    let disk = SimDisk::new(512);
    disk.set_capacity(1024);
    let full = disk.write(&CX, 1000, vec![1; 100].into(), WriteFlags::empty()).now_or_never();
    assert_eq!(full.expect("no latency").expect_err("full").kind(), ErrorKind::NoSpace);
    let mut seen = HashSet::new();
    for _ in 0..50 {
        disk.fail(DiskOp::Write, 0, 1, ErrorKind::Io);
        let failed = disk.write(&CX, 0, vec![1; 1024].into(), WriteFlags::empty()).now_or_never();
        failed.expect("no latency").expect_err("injected");
        seen.insert(first_bytes(&disk.media(), 2));
        now(disk.set_len(&CX, 0));
    }
    assert!(seen.contains(&vec![1, 0]), "{seen:?}");
}

#[test]
fn every_boundary_is_observed() {
    let disk = SimDisk::new(512);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    disk.observe(move |point| lock(&log).push((point.boundary, point.pending.len())));
    write(&disk, 100, 1, 1000);
    now(disk.sync(&CX));
    let expected = [(Boundary::Submitted, 1), (Boundary::Completed, 1), (Boundary::Synced, 0)];
    assert_eq!(*lock(&seen), expected);
    assert_eq!(disk.len(), 1100);
}
