//! Images that say anything: a clear error at open or at the place, never a panic, a hang or memory without bound.
//!
//! `INFILL_SEED=n` runs that seed alone; the seed of a failure is printed.

mod common;

use bytes::BytesMut;
use common::CX;
use infill_base::{DiscardMode, ErrorKind, WriteFlags, ZeroFlags};
use infill_node::{NodeHandle, Repair};
use infill_qed::{CreateOptions, OpenOptions, Qed, check, create, probe};
use infill_sim::{DiskOptions, Media, Rng, SimDisk, World};
use infill_storage::StorageHandle;

/// Bytes of the file up to the first L2 table: header and L1 table.
const FIRST_TABLE: usize = 3 * 4096;

fn disk(bytes: &[u8]) -> (SimDisk, StorageHandle) {
    // What a hostile image may make of the file is bounded by its disk.
    let options = DiskOptions { capacity: 8 << 20, ..DiskOptions::default() };
    let disk = SimDisk::with(Media::from_bytes(bytes), options);
    (disk.clone(), StorageHandle::new(disk))
}

async fn valid() -> Vec<u8> {
    let (disk, storage) = disk(&[]);
    let options =
        CreateOptions { size: 6 << 20, cluster_bytes: 4096, table_clusters: 2, ..Default::default() };
    create(&CX, &storage, &options).await.expect("creates");
    let node = NodeHandle::new(Qed::open(&CX, storage, OpenOptions::default()).await.expect("opens"));
    for at in [0, 4096, 100_000, 5 << 20] {
        node.write(&CX, at, vec![7; 9000], WriteFlags::empty()).await.expect("writes");
    }
    node.write_zeroes(&CX, 200_000, 20_000, ZeroFlags::empty()).await.expect("zeroes");
    node.close(&CX).await.expect("closes");
    disk.media().to_bytes()
}

/// A value that is likely to matter.
fn value(rng: &mut Rng, len: usize) -> u64 {
    let near = len as u64 / 4096 * 4096;
    match rng.below(12) {
        0 => 0,
        1 => 1,
        2 => u64::MAX,
        3 => u64::MAX / 4096 * 4096,
        4 => 1 << rng.below(64),
        5 => near,
        6 => near.saturating_sub(4096),
        7 => 4096 * rng.below(40),
        8 => (1_u64 << rng.below(63)).wrapping_sub(4096),
        9 => rng.below(len as u64),
        10 => i64::MAX as u64 / 4096 * 4096,
        _ => rng.next_u64(),
    }
}

fn mutate(bytes: &mut Vec<u8>, rng: &mut Rng) {
    let fields = [(4, 4), (8, 4), (12, 4), (16, 8), (24, 8), (32, 8), (40, 8), (48, 8), (56, 4), (60, 4)];
    let (at, width) = match rng.below(6) {
        0 | 1 => fields[rng.index(fields.len())],
        2 => (4096 + 8 * rng.index(4), 8),
        3 => (FIRST_TABLE + 8 * rng.index(40), 8),
        4 => (rng.index(bytes.len() / 8) * 8, 8),
        _ => {
            let keep = rng.index(bytes.len());
            bytes.truncate(keep.max(64));
            return;
        }
    };
    let value = value(rng, bytes.len()).to_le_bytes();
    let end = (at + width).min(bytes.len());
    if at < end {
        bytes[at..end].copy_from_slice(&value[..end - at]);
    }
}

/// Does everything with an image that may be done; only errors may come of it.
async fn use_it(bytes: &[u8], rng: &mut Rng) -> Result<(), ErrorKind> {
    let (_, storage) = disk(bytes);
    let _ = check(&CX, &storage, Repair::Nothing).await;
    let (_, storage) = disk(bytes);
    let read_only = rng.per_mille(200);
    let options = OpenOptions { read_only, discard: DiscardMode::Unmap, ..OpenOptions::default() };
    let Ok(node) = Qed::open(&CX, storage.clone(), options).await else { return Err(ErrorKind::Corrupt) };
    let node = NodeHandle::new(node);
    let mut worst = Ok(());
    let mut note = |result: Result<(), infill_base::IoError>| {
        if let Err(error) = result {
            worst = Err(error.kind());
        }
    };
    for _ in 0..24 {
        let len = node.len();
        let at = match rng.below(4) {
            0 => rng.below(len),
            1 => len.saturating_sub(rng.below(20_000)),
            _ => rng.below((6 << 20).min(len)),
        };
        let size = rng.below(20_000).min(len - at);
        match rng.below(6) {
            0 | 1 => note(node.read(&CX, at, BytesMut::zeroed(size as usize)).await.map(|_| ())),
            2 => note(node.write(&CX, at, vec![1; size as usize], WriteFlags::empty()).await),
            3 => note(node.write_zeroes(&CX, at, size, ZeroFlags::MAY_UNMAP).await),
            4 => note(node.discard(&CX, at, size).await),
            _ => match node.extents(&CX, at, len - at).await {
                Ok(extents) => {
                    let end = extents.iter().fold(at, |end, extent| {
                        assert_eq!(extent.start, end);
                        extent.end()
                    });
                    assert!(end <= len && (end > at || at == len));
                }
                Err(error) => note(Err(error)),
            },
        }
    }
    note(node.sync(&CX).await);
    note(node.close(&CX).await);
    drop(node);
    let _ = check(&CX, &storage, Repair::All).await;
    worst
}

#[test]
fn whatever_an_image_says_only_errors_come_of_it() {
    let only = std::env::var("INFILL_SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    let whole = World::new(0).run(valid());
    assert!(probe(&whole) && !probe(b"QED") && !probe(b"QFI\xfb"));
    let (mut refused, mut failed, mut fine) = (0, 0, 0);
    for seed in only.map_or(0..1500, |seed| seed..seed + 1) {
        let mut rng = Rng::new(seed);
        let mut bytes = whole.clone();
        for _ in 0..rng.range(1, 5) {
            mutate(&mut bytes, &mut rng);
        }
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            World::new(seed).run(use_it(&bytes, &mut rng))
        }));
        match outcome.unwrap_or_else(|_| panic!("seed {seed}")) {
            Err(ErrorKind::Corrupt) => refused += 1,
            Err(_) => failed += 1,
            Ok(()) => fine += 1,
        }
    }
    assert!(only.is_some() || (refused > 100 && failed > 0 && fine > 100), "{refused} {failed} {fine}");
}

#[test]
fn a_huge_empty_image_costs_nothing_to_open_check_and_use() {
    World::new(0).run(async {
        // Tables of 1 GiB each, clusters of 64 MiB: the largest disk that there is.
        let options = DiskOptions { capacity: 1 << 40, ..DiskOptions::default() };
        let disk = SimDisk::with(Media::new(2 << 30), options);
        let mut header = vec![0; 64];
        header[..4].copy_from_slice(b"QED\0");
        header[4..8].copy_from_slice(&(64_u32 << 20).to_le_bytes());
        header[8] = 16;
        header[12] = 1;
        header[40..48].copy_from_slice(&(64_u64 << 20).to_le_bytes());
        let size = i64::MAX as u64 / 512 * 512;
        header[48..56].copy_from_slice(&size.to_le_bytes());
        let storage = StorageHandle::new(disk.clone());
        storage.write(&CX, 0, header, WriteFlags::empty()).await.expect("writes");
        let options = OpenOptions { metadata_cache_bytes: 1 << 20, ..OpenOptions::default() };
        let node = NodeHandle::new(Qed::open(&CX, storage.clone(), options).await.expect("opens"));
        assert_eq!(node.len(), size);
        for at in [0, size / 2, size - 5000] {
            assert!(infill_base::is_zero(&node.read_vec(&CX, at, 5000).await.expect("reads")));
        }
        let extents = node.extents(&CX, 0, size).await.expect("extents");
        assert!(extents[0].len > 1 << 40);
        let report = check(&CX, &storage, Repair::Nothing).await.expect("checks");
        assert_eq!((report.corruptions, report.allocated_clusters), (0, 0));
    });
}

#[test]
fn a_loop_of_tables_is_found_and_scanned_once() {
    World::new(0).run(async {
        let mut bytes = valid().await;
        // Every L1 entry names the first table, whose entries name the table itself.
        for entry in 0..1024 {
            let at = 4096 + 8 * entry;
            bytes[at..at + 8].copy_from_slice(&(FIRST_TABLE as u64).to_le_bytes());
            let at = FIRST_TABLE + 8 * entry;
            bytes[at..at + 8].copy_from_slice(&(FIRST_TABLE as u64).to_le_bytes());
        }
        let (_, storage) = disk(&bytes);
        let report = check(&CX, &storage, Repair::All).await.expect("checks");
        assert_eq!(report.corruptions, 1023 + 1024);
        assert!(report.messages.len() <= infill_node::CheckReport::MAX_MESSAGES);
    });
}
