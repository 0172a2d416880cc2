//! What every [`Storage`](infill_storage::Storage) does, as cases to be run on any of them.
//!
//! A case panics with what was expected and found. It runs on whatever runtime the storage needs: the simulated world,
//! or a reactor.

use std::future::Future;
use std::pin::pin;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{LocalBoxFuture, join_all};
use infill_base::{Ctx, ErrorKind, ExtentKind, Gather, WriteFlags, ZeroFlags, align_down, align_up, is_zero};
use infill_sim::Rng;
use infill_storage::StorageHandle;

use crate::model::SECTOR_BYTES;
use crate::payload::payload;

/// Length of the storages that cases are run on, in bytes.
pub const LEN: u64 = 256 << 10;

/// What a storage under test is like.
#[derive(Clone, Copy, Debug)]
pub struct StorageTraits {
    /// Whether its length can be changed, by a write behind the end too.
    pub grows: bool,
}

type Case = fn(StorageHandle, StorageTraits) -> LocalBoxFuture<'static, ()>;

/// Every case, by name.
pub const CASES: &[(&str, Case)] = &[
    ("ranges come back and neighbours stay", |s, t| Box::pin(ranges_come_back(s, t))),
    ("a discarded range reads as before or as zeroes", |s, t| Box::pin(discards(s, t))),
    ("extents cover the range and zero is true", |s, t| Box::pin(extents(s, t))),
    ("behind the end", |s, t| Box::pin(behind_the_end(s, t))),
    ("lengths change and what is new is zero", |s, t| Box::pin(lengths(s, t))),
    ("limits hold", |s, t| Box::pin(limits(s, t))),
    ("allocated space keeps its content", |s, t| Box::pin(allocates(s, t))),
    ("writes at once all last", |s, t| Box::pin(at_once(s, t))),
    ("a dropped write is there or not, sector by sector", |s, t| Box::pin(dropped(s, t))),
];

/// Runs every case, each on a storage of [`LEN`] zero bytes that `make` gives.
pub async fn run<F>(traits: StorageTraits, mut make: impl FnMut() -> F)
where
    F: Future<Output = StorageHandle>,
{
    for (name, case) in CASES {
        println!("case: {name}");
        let storage = make().await;
        assert_eq!(storage.len(), LEN, "a new storage has the length that was asked for");
        case(storage, traits).await;
    }
}

const CX: Ctx = Ctx::GUEST;

fn align(storage: &StorageHandle) -> u64 {
    u64::from(storage.limits().request_align)
}

/// A range inside, aligned as the storage wants it, not empty.
fn any_range(rng: &mut Rng, storage: &StorageHandle, max: u64) -> (u64, u64) {
    let align = align(storage);
    let at = align_down(rng.below(LEN), align);
    let len = align_up(rng.range(1, max), align).min(LEN - at);
    (at, len)
}

async fn get(storage: &StorageHandle, at: u64, len: u64) -> Bytes {
    storage.read_vec(&CX, at, len as usize).await.expect("reads").freeze()
}

async fn put(storage: &StorageHandle, op: u32, at: u64, len: u64) {
    let data = payload(op, at, len as usize);
    storage.write(&CX, at, data, WriteFlags::empty()).await.expect("writes");
}

/// Cuts a payload into up to three runs.
fn in_runs(rng: &mut Rng, data: &Bytes) -> Gather {
    let (one, two) = (rng.index(data.len() + 1), rng.index(data.len() + 1));
    let mut gather = Gather::new();
    gather.push(data.slice(..one.min(two)));
    gather.push(data.slice(one.min(two)..one.max(two)));
    gather.push(data.slice(one.max(two)..));
    gather
}

async fn ranges_come_back(storage: StorageHandle, _: StorageTraits) {
    let (mut rng, mut model) = (Rng::new(1), vec![0; LEN as usize]);
    for op in 1..120_u32 {
        let (at, len) = any_range(&mut rng, &storage, 20_000);
        let range = at as usize..(at + len) as usize;
        match rng.below(6) {
            0 => {
                let flags = if rng.per_mille(500) { ZeroFlags::MAY_UNMAP } else { ZeroFlags::FUA };
                storage.write_zeroes(&CX, at, len, flags).await.expect("zeroes");
                model[range].fill(0);
            }
            1 => storage.sync(&CX).await.expect("syncs"),
            2 => storage.write_back(&CX, at, len).await.expect("writes back"),
            _ => {
                let data = payload(op, at, len as usize);
                let flags = if rng.per_mille(100) { WriteFlags::FUA } else { WriteFlags::empty() };
                storage.write(&CX, at, in_runs(&mut rng, &data), flags).await.expect("writes");
                model[range].copy_from_slice(&data);
            }
        }
        let (at, len) = any_range(&mut rng, &storage, 30_000);
        assert!(
            get(&storage, at, len).await == model[at as usize..(at + len) as usize],
            "{at}+{len} after {op}"
        );
    }
    assert!(get(&storage, 0, LEN).await == model, "all of it");
}

async fn discards(storage: StorageHandle, _: StorageTraits) {
    put(&storage, 1, 0, LEN).await;
    let mut rng = Rng::new(2);
    for _ in 0..20 {
        let before = get(&storage, 0, LEN).await;
        let (at, len) = any_range(&mut rng, &storage, 30_000);
        match storage.discard(&CX, at, len).await {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::Unsupported => return,
            Err(error) => panic!("a discard is done or unsupported: {error}"),
        }
        let after = get(&storage, 0, LEN).await;
        for (nth, (old, new)) in before.iter().zip(&after[..]).enumerate() {
            let inside = (at..at + len).contains(&(nth as u64));
            assert!(new == old || (inside && *new == 0), "byte {nth} after a discard of {at}+{len}");
        }
    }
    put(&storage, 2, 0, LEN).await;
    assert!(get(&storage, 0, LEN).await == payload(2, 0, LEN as usize), "writable again");
}

async fn extents(storage: StorageHandle, _: StorageTraits) {
    let mut rng = Rng::new(3);
    for op in 0..6 {
        let (at, len) = any_range(&mut rng, &storage, 9000);
        put(&storage, op, at, len).await;
    }
    let (at, len) = any_range(&mut rng, &storage, 60_000);
    storage.write_zeroes(&CX, at, len, ZeroFlags::MAY_UNMAP).await.expect("zeroes");
    for _ in 0..20 {
        let (at, len) = any_range(&mut rng, &storage, LEN);
        let mut next = at;
        while next < at + len {
            let told = storage.extents(&CX, next, at + len - next).await.expect("tells extents");
            assert!(!told.is_empty(), "extents get on at {next}");
            for extent in told {
                assert_eq!(extent.start, next, "extents leave no gap");
                assert!(extent.len > 0 && extent.end() <= at + len, "{extent:?} lies in {at}+{len}");
                assert_ne!(extent.kind, ExtentKind::Absent, "a storage knows: {extent:?}");
                if extent.kind == ExtentKind::Zero {
                    assert!(is_zero(&get(&storage, extent.start, extent.len).await), "{extent:?} is zero");
                }
                next = extent.end();
            }
        }
    }
}

async fn behind_the_end(storage: StorageHandle, traits: StorageTraits) {
    put(&storage, 1, 0, LEN).await;
    let align = align(&storage);
    for (at, len) in [(LEN, align), (LEN - align, 2 * align), (align_down(u64::MAX, align) - align, align)] {
        let read = storage.read_vec(&CX, at, len as usize).await;
        assert!(read.is_err(), "a read of {at}+{len} is refused");
        if !traits.grows {
            let data = payload(2, 0, len as usize);
            let write = storage.write(&CX, at, data, WriteFlags::empty()).await;
            assert!(write.is_err(), "a write of {at}+{len} is refused");
            let zero = storage.write_zeroes(&CX, at, len, ZeroFlags::empty()).await;
            assert!(zero.is_err(), "zeroes at {at}+{len} are refused");
        }
    }
    let far = align_down(u64::MAX, align) - align;
    let write = storage.write(&CX, far, vec![1; align as usize * 2], WriteFlags::empty()).await;
    assert!(write.is_err(), "no storage is that long");
    assert_eq!(storage.len(), LEN);
    assert!(get(&storage, 0, LEN).await == payload(1, 0, LEN as usize), "nothing has changed");
    for at in [0, LEN] {
        storage.read_vec(&CX, at, 0).await.expect("reads nothing");
        storage.write(&CX, at, Gather::new(), WriteFlags::empty()).await.expect("writes nothing");
    }
    assert_eq!(storage.len(), LEN);
}

async fn lengths(storage: StorageHandle, traits: StorageTraits) {
    put(&storage, 1, 0, LEN).await;
    if !traits.grows {
        let error = storage.set_len(&CX, 2 * LEN).await.expect_err("its length is fixed");
        assert!(matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::NotPermitted), "{error}");
        return;
    }
    let half = LEN / 2 + 4096;
    storage.set_len(&CX, half).await.expect("shrinks");
    assert_eq!(storage.len(), half);
    assert!(storage.read_vec(&CX, half, 4096).await.is_err());
    storage.set_len(&CX, LEN).await.expect("grows");
    assert!(get(&storage, 0, half).await == payload(1, 0, half as usize), "what was kept");
    assert!(is_zero(&get(&storage, half, LEN - half).await), "what is new is zero");
    put(&storage, 2, LEN + 8192, 4096).await;
    assert_eq!(storage.len(), LEN + 12288, "a write behind the end makes it longer");
    assert!(is_zero(&get(&storage, LEN, 8192).await), "the gap is zero");
    assert!(get(&storage, LEN + 8192, 4096).await == payload(2, LEN + 8192, 4096));
    storage.write_zeroes(&CX, LEN + 12288, 4096, ZeroFlags::empty()).await.expect("zeroes");
    assert_eq!(storage.len(), LEN + 16384, "so do zeroes");
}

async fn limits(storage: StorageHandle, traits: StorageTraits) {
    let limits = storage.limits();
    assert!(limits.request_align.is_power_of_two() && limits.memory_align.is_power_of_two(), "{limits:?}");
    assert!(limits.max_transfer <= infill_base::MAX_TRANSFER_BYTES, "{limits:?}");
    assert!(limits.max_transfer >= SECTOR_BYTES && limits.preferred_bytes > 0, "{limits:?}");
    if limits.request_align > 1 {
        let read = storage.read_vec(&CX, 1, limits.request_align as usize).await;
        assert_eq!(read.expect_err("not aligned").kind(), ErrorKind::InvalidInput);
        let write = storage.write(&CX, 0, vec![1; 1], WriteFlags::empty()).await;
        assert_eq!(write.expect_err("not aligned").kind(), ErrorKind::InvalidInput);
        assert!(is_zero(&get(&storage, 0, LEN).await), "nothing was written");
    }
    if traits.grows {
        let len = align_down(limits.max_transfer, u64::from(limits.request_align)).min(4 << 20);
        put(&storage, 1, 0, len).await;
        assert!(get(&storage, 0, len).await == payload(1, 0, len as usize), "the largest request");
    }
    assert!(!storage.name().is_empty());
}

async fn allocates(storage: StorageHandle, traits: StorageTraits) {
    put(&storage, 1, 0, LEN).await;
    let beyond = if traits.grows { 8192 } else { 0 };
    match storage.allocate(&CX, LEN - 8192, 8192 + beyond).await {
        Err(error) => assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}"),
        Ok(()) => {
            assert_eq!(storage.len(), LEN + beyond);
            assert!(get(&storage, 0, LEN).await == payload(1, 0, LEN as usize), "content is kept");
            assert!(is_zero(&get(&storage, LEN, beyond).await), "what is new is zero");
        }
    }
}

async fn at_once(storage: StorageHandle, _: StorageTraits) {
    let unit = 4096.max(align(&storage));
    let apart = (0..LEN / unit).map(|nth| put(&storage, nth as u32 + 1, nth * unit, unit));
    join_all(apart).await;
    for nth in 0..LEN / unit {
        let found = get(&storage, nth * unit, unit).await;
        assert!(found == payload(nth as u32 + 1, nth * unit, unit as usize), "piece {nth}");
    }
    let same = (0..8).map(|op| put(&storage, 1000 + op, 0, 4 * unit));
    join_all(same).await;
    let found = get(&storage, 0, 4 * unit).await;
    for (nth, sector) in found.chunks(SECTOR_BYTES as usize).enumerate() {
        let at = nth as u64 * SECTOR_BYTES;
        let one = (0..8).any(|op| payload(1000 + op, at, sector.len()) == *sector);
        assert!(one, "sector {nth} is one of the writes, whole");
    }
}

async fn dropped(storage: StorageHandle, _: StorageTraits) {
    put(&storage, 1, 0, LEN).await;
    for round in 0..8_u64 {
        let (at, data) = (round * 8192, payload(2, round * 8192, 8192));
        let mut write = pin!(storage.write(&CX, at, data, WriteFlags::empty()));
        // Asked for, and dropped in the middle where it does not end at once.
        let _ = write.as_mut().now_or_never();
    }
    put(&storage, 3, 128 << 10, 8192).await;
    storage.sync(&CX).await.expect("syncs");
    let found = get(&storage, 0, 64 << 10).await;
    for (nth, sector) in found.chunks(SECTOR_BYTES as usize).enumerate() {
        let at = nth as u64 * SECTOR_BYTES;
        let whole = [1, 2].iter().any(|op| payload(*op, at, sector.len()) == *sector);
        assert!(whole, "sector {nth} is old or new");
    }
    assert!(get(&storage, 128 << 10, 8192).await == payload(3, 128 << 10, 8192), "others go on");
}
