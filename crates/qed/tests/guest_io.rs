//! What guests see: generated operations against a model, over every kind of backing, in several geometries; and
//! QEMU reading what is written here, and the reverse.

mod common;

use bytes::BytesMut;
use common::{CX, arg, created, loaded, qemu_ok};
use futures_util::future::join_all;
use infill_base::{Class, Ctx, DiscardMode, ErrorKind, ExtentKind, WriteFlags, ZeroFlags};
use infill_node::{BackingRef, CopyOnRead, MemoryOverlay, NodeHandle, RawNode, Repair};
use infill_qed::{CreateOptions, OpenOptions, Qed, check, create};
use infill_sim::{DiskOptions, Media, Rng, SimDisk, World, block_on};
use infill_storage::{MemoryStorage, StorageHandle};
use std::time::Duration;

async fn open(storage: &StorageHandle) -> NodeHandle {
    let options = OpenOptions { discard: DiscardMode::Unmap, ..OpenOptions::default() };
    NodeHandle::new(Qed::open(&CX, storage.clone(), options).await.expect("opens"))
}

async fn read(node: &NodeHandle, at: u64, len: usize) -> Vec<u8> {
    node.read(&CX, at, BytesMut::zeroed(len)).await.expect("reads").to_vec()
}

fn backing_ref() -> Option<BackingRef> {
    Some(BackingRef { filename: "below".into(), format: Some("raw".into()) })
}

/// A raw disk of `len` random bytes.
fn base(len: usize, rng: &mut Rng) -> (Vec<u8>, NodeHandle) {
    let mut bytes = vec![0; len];
    rng.fill(&mut bytes);
    // Runs of zeroes, too.
    for _ in 0..len / 20_000 {
        let at = rng.index(len);
        let end = (at + rng.index(12_000)).min(len);
        bytes[at..end].fill(0);
    }
    let storage = StorageHandle::new(MemoryStorage::from_bytes(bytes.clone()));
    (bytes, NodeHandle::new(RawNode::new(storage, true)))
}

/// One guest: whatever it does, it reads what it wrote last.
async fn run_ops(node: &NodeHandle, model: &mut Vec<u8>, rng: &mut Rng, ops: usize, unit: u64) {
    let has_backing = node.backing().is_some_and(|slot| slot.is_some());
    for _ in 0..ops {
        let size = model.len() as u64;
        let mut at = rng.below(size);
        let mut len = rng.range(1, 4 * unit);
        if rng.per_mille(400) {
            (at, len) = (at / unit * unit, len.next_multiple_of(unit));
        }
        let len = len.min(size - at) as usize;
        let range = at as usize..at as usize + len;
        match rng.below(12) {
            0..=4 => {
                let mut data = vec![0; len];
                rng.fill(&mut data);
                let fua = if rng.per_mille(100) { WriteFlags::FUA } else { WriteFlags::empty() };
                node.write(&CX, at, data.clone(), fua).await.expect("writes");
                model[range].copy_from_slice(&data);
            }
            5 => {
                let flags = if rng.per_mille(500) { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
                node.write_zeroes(&CX, at, len as u64, flags).await.expect("zeroes");
                model[range].fill(0);
            }
            6 => {
                node.discard(&CX, at, len as u64).await.expect("discards");
                if !has_backing {
                    // Whole clusters read as zeroes, what is left of others stays.
                    let end = if at + len as u64 == size { size } else { (at + len as u64) / unit * unit };
                    let start = at.next_multiple_of(unit);
                    if start < end {
                        model[start as usize..end as usize].fill(0);
                    }
                }
            }
            7 => {
                let from = at / unit * unit;
                let len = (rng.range(1, 6) * unit).min(size - from);
                let cx = Ctx::of(if rng.per_mille(500) { Class::Fill } else { Class::AroundMiss });
                let slot = node.backing().expect("an overlay");
                let fetched = slot.fetch(&cx, from, len).await.expect("fetches");
                let done =
                    node.populate(&cx, from, fetched.data, fetched.generation).await.expect("populates");
                assert_eq!(done.linked + done.lost, len);
            }
            8 => node.sync(&CX).await.expect("syncs"),
            _ => assert!(read(node, at, len).await == model[range], "{len} bytes at {at}"),
        }
    }
    assert!(read(node, 0, model.len()).await == *model, "the whole disk");
    // What it says of its extents agrees with what it reads as.
    let mut next = 0;
    while next < model.len() as u64 {
        for extent in node.extents(&CX, next, model.len() as u64 - next).await.expect("extents") {
            assert_eq!(extent.start, next);
            next = extent.end();
            if extent.kind == ExtentKind::Zero {
                assert!(infill_base::is_zero(&model[extent.start as usize..next as usize]));
            }
        }
    }
}

#[test]
fn a_guest_reads_what_it_wrote_whatever_lies_below_and_after_every_reopening() {
    for (seed, (cluster_bytes, table_clusters)) in
        [(4096, 1), (4096, 2), (65536, 4), (16384, 16), (1 << 20, 1)].into_iter().enumerate()
    {
        for below in ["nothing", "raw", "shorter", "longer", "memory", "qed"] {
            let mut rng = Rng::new(seed as u64 * 100 + below.len() as u64);
            // Two L2 tables at least, with 4 KiB clusters, and a last cluster that the disk does not fill.
            let size = 2 * 512 * 4096 + 8 * 512 + cluster_bytes as usize;
            World::new(seed as u64).run(async {
                let base_len = match below {
                    "shorter" => size / 2 - 512,
                    "longer" => size + 70_000,
                    _ => size,
                };
                let (content, raw) = base(base_len, &mut rng);
                let lower = match below {
                    "nothing" => None,
                    "memory" => Some(NodeHandle::new(MemoryOverlay::new(size as u64, 512, Some(raw)))),
                    "qed" => {
                        let options =
                            CreateOptions { size: size as u64, backing: backing_ref(), ..Default::default() };
                        let (_, storage) = made(&options).await;
                        let middle = open(&storage).await;
                        middle.backing().expect("an overlay").replace(Some(raw)).await;
                        Some(middle)
                    }
                    _ => Some(raw),
                };
                let mut model = vec![0; size];
                if lower.is_some() {
                    let len = content.len().min(size);
                    model[..len].copy_from_slice(&content[..len]);
                }
                let backing = lower.as_ref().and_then(|_| backing_ref());
                let options = CreateOptions { size: size as u64, backing, cluster_bytes, table_clusters };
                let (_, storage) = made(&options).await;
                for _ in 0..3 {
                    let node = open(&storage).await;
                    node.backing().expect("an overlay").replace(lower.clone()).await;
                    run_ops(&node, &mut model, &mut rng, 60, cluster_bytes).await;
                    node.close(&CX).await.expect("closes");
                    let report = check(&CX, &storage, Repair::Nothing).await.expect("checks");
                    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{report:?}");
                    assert_eq!(storage.len() % cluster_bytes, 0);
                }
            });
        }
    }
}

async fn made(options: &CreateOptions) -> (std::sync::Arc<MemoryStorage>, StorageHandle) {
    let memory = std::sync::Arc::new(MemoryStorage::new(0));
    let storage = StorageHandle::from_arc(memory.clone());
    create(&CX, &storage, options).await.expect("creates");
    (memory, storage)
}

/// A disk on which every operation takes a while.
fn slow_disk(seed: u64) -> SimDisk {
    let latency = (Duration::from_micros(1), Duration::from_micros(200));
    SimDisk::with(Media::new(0), DiskOptions { seed, latency, ..DiskOptions::default() })
}

#[test]
fn guests_that_write_at_once_beside_fills_and_copy_on_read_each_see_their_own() {
    const GUESTS: usize = 6;
    for seed in 0..12 {
        let world = World::new(seed);
        let mut rng = Rng::new(seed);
        world.run(async {
            let storage = StorageHandle::new(slow_disk(seed));
            let size = 1_500_000 / 512 * 512;
            let (content, lower) = base(size, &mut rng);
            let options = CreateOptions {
                size: size as u64,
                backing: backing_ref(),
                cluster_bytes: 4096,
                table_clusters: 1,
            };
            create(&CX, &storage, &options).await.expect("creates");
            let node = open(&storage).await;
            let slot = node.backing().expect("an overlay");
            slot.replace(Some(lower)).await;
            slot.set_copy_on_read(Some(CopyOnRead::new(&node, 1 << 20)));
            // Each guest has every sixth 1000 bytes: clusters are shared by all, bytes by none.
            let guests = (0..GUESTS).map(|guest| {
                let (node, mut rng, content) =
                    (node.clone(), Rng::new(seed * 10 + guest as u64), content.clone());
                async move {
                    let mut mine: Vec<(usize, Vec<u8>)> = Vec::new();
                    for _ in 0..40 {
                        let at = (rng.index(size / 1000 / GUESTS) * GUESTS + guest) * 1000;
                        let now = read(&node, at as u64, 1000).await;
                        let last = mine.iter().rev().find(|(place, _)| *place == at);
                        assert!(now == last.map_or(&content[at..at + 1000], |(_, data)| data), "byte {at}");
                        let mut data = vec![0; 1000];
                        if rng.per_mille(200) {
                            node.write_zeroes(&CX, at as u64, 1000, ZeroFlags::empty())
                                .await
                                .expect("zeroes");
                        } else {
                            rng.fill(&mut data);
                            node.write(&CX, at as u64, data.clone(), WriteFlags::empty())
                                .await
                                .expect("writes");
                        }
                        mine.push((at, data));
                    }
                    mine
                }
            });
            let fills = (0..4).map(|nth| {
                let (node, mut rng) = (node.clone(), Rng::new(seed * 10 + 9 + nth));
                async move {
                    for _ in 0..60 {
                        let at = rng.below(size as u64 / 4096) * 4096;
                        let len = (rng.range(1, 9) * 4096).min(size as u64 - at);
                        let slot = node.backing().expect("an overlay");
                        let got = slot.fetch(&Ctx::FILL, at, len).await.expect("fetches");
                        node.populate(&Ctx::FILL, at, got.data, got.generation).await.expect("populates");
                    }
                }
            });
            let (written, _) = futures_util::future::join(join_all(guests), join_all(fills)).await;
            let mut model = content.clone();
            for (at, data) in written.into_iter().flatten() {
                model[at..at + 1000].copy_from_slice(&data);
            }
            assert!(read(&node, 0, size).await == model, "seed {seed}");
            node.close(&CX).await.expect("closes");
            let report = check(&CX, &storage, Repair::Nothing).await.expect("checks");
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{report:?}");
        });
    }
}

#[test]
fn qemu_reads_what_is_written_here_and_the_reverse() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (image, raw, below) = (dir.path().join("i.qed"), dir.path().join("i.raw"), dir.path().join("below"));
    let size = 3 << 20;
    for (seed, (cluster_bytes, table_clusters)) in
        [(4096, 2), (65536, 4), (1 << 20, 8)].into_iter().enumerate()
    {
        for has_backing in [false, true] {
            let mut rng = Rng::new(seed as u64);
            let (content, lower) = base(2 << 20, &mut rng);
            std::fs::write(&below, &content).expect("writes");
            let mut model = vec![0; size];
            if has_backing {
                model[..content.len()].copy_from_slice(&content);
            }
            let backing =
                has_backing.then(|| BackingRef { filename: arg(&below).into(), format: Some("raw".into()) });
            let options = CreateOptions { size: size as u64, backing, cluster_bytes, table_clusters };
            let (mut memory, mut storage) = created(&options);
            for round in 0..3 {
                World::new(round).run(async {
                    let node = open(&storage).await;
                    if has_backing {
                        node.backing().expect("an overlay").replace(Some(lower.clone())).await;
                    }
                    assert!(read(&node, 0, size).await == model, "what QEMU wrote");
                    run_ops(&node, &mut model, &mut rng, 30, cluster_bytes).await;
                    node.close(&CX).await.expect("closes");
                });
                std::fs::write(&image, memory.to_bytes()).expect("writes");
                std::fs::write(&raw, &model).expect("writes");
                let report = block_on(check(&CX, &storage, Repair::Nothing)).expect("checks");
                // Discards leave holes in the file, which QEMU, too, calls leaks.
                let output = common::qemu("qemu-img", &["check", "-f", "qed", arg(&image)]);
                let clean = if report.leaks > 0 { 3 } else { 0 };
                assert_eq!(output.status.code(), Some(clean), "{output:?}");
                qemu_ok("qemu-img", &["compare", "-f", "qed", "-F", "raw", arg(&image), arg(&raw)]);

                let mut args = vec!["-f".to_owned(), "qed".to_owned()];
                for _ in 0..10 {
                    let at = rng.index(size) / 512 * 512;
                    let len = (rng.index(3 * cluster_bytes as usize) / 512 * 512 + 512).min(size - at);
                    let byte = rng.below(3) as u8;
                    let how = if byte == 0 { "-z".into() } else { format!("-P {byte}") };
                    args.extend(["-c".into(), format!("write {how} {at} {len}")]);
                    model[at..at + len].fill(byte);
                }
                args.push(arg(&image).into());
                qemu_ok("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());
                (memory, storage) = loaded(&image);
            }
        }
    }
}

#[test]
fn zeroes_over_a_backing_are_entries_and_partial_ones_are_refused_where_they_must_be_fast() {
    let mut rng = Rng::new(1);
    World::new(1).run(async {
        let (_, lower) = base(1 << 20, &mut rng);
        let options =
            CreateOptions { size: 1 << 20, backing: backing_ref(), cluster_bytes: 4096, table_clusters: 1 };
        let (_, storage) = made(&options).await;
        let node = open(&storage).await;
        node.backing().expect("an overlay").replace(Some(lower)).await;
        let before = storage.len();
        node.write_zeroes(&CX, 4096, 8192, ZeroFlags::NO_FALLBACK).await.expect("whole clusters");
        let error = node.write_zeroes(&CX, 4096, 100, ZeroFlags::NO_FALLBACK).await.expect_err("a part");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let kinds: Vec<_> = node.extents(&CX, 0, 16384).await.expect("extents");
        let kinds: Vec<_> = kinds.iter().map(|extent| (extent.kind, extent.len)).collect();
        assert_eq!(kinds, [(ExtentKind::Absent, 4096), (ExtentKind::Zero, 8192), (ExtentKind::Absent, 4096)]);
        // A trim over a backing is ignored: absent would show what lies below.
        node.discard(&CX, 4096, 4096).await.expect("ignored");
        assert_eq!(node.extents(&CX, 4096, 4096).await.expect("extents")[0].kind, ExtentKind::Zero);
        node.close(&CX).await.expect("closes");
        // One L2 table, no data.
        assert_eq!(storage.len(), before + 4096);
    });
}

#[test]
fn a_disk_grows_and_shows_zeroes_even_where_the_backing_is_longer() {
    let mut rng = Rng::new(3);
    for has_backing in [false, true] {
        World::new(2).run(async {
            let (content, lower) = base(300_000, &mut rng);
            let size = 100_352;
            let backing = if has_backing { backing_ref() } else { None };
            let options = CreateOptions { size, backing, cluster_bytes: 4096, table_clusters: 1 };
            let (_, storage) = made(&options).await;
            let node = open(&storage).await;
            let mut model = vec![0; size as usize];
            if has_backing {
                node.backing().expect("an overlay").replace(Some(lower.clone())).await;
                model.copy_from_slice(&content[..size as usize]);
            }
            for longer in [size + 512, 200_192, 250_880, 400_384] {
                node.resize(&CX, longer).await.expect("grows");
                model.resize(longer as usize, 0);
                assert!(read(&node, 0, model.len()).await == model, "{longer} bytes");
            }
            let error = node.resize(&CX, size).await.expect_err("shrinks");
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(node.resize(&CX, u64::MAX / 2).await.is_err());
            node.close(&CX).await.expect("closes");
            let node = open(&storage).await;
            node.backing().expect("an overlay").replace(has_backing.then_some(lower)).await;
            assert!(read(&node, 0, model.len()).await == model, "opened again");
        });
    }
}

#[test]
fn a_stale_populate_links_nothing_and_a_late_one_loses() {
    World::new(0).run(async {
        let mut rng = Rng::new(0);
        let (_, lower) = base(65536, &mut rng);
        let options =
            CreateOptions { size: 65536, backing: backing_ref(), cluster_bytes: 4096, table_clusters: 1 };
        let (_, storage) = made(&options).await;
        let node = open(&storage).await;
        let slot = node.backing().expect("an overlay");
        slot.replace(Some(lower)).await;
        let fetched = slot.fetch(&CX, 0, 8192).await.expect("fetches");
        slot.raise().await;
        let stale = node.populate(&CX, 0, fetched.data.clone(), fetched.generation).await.expect("is told");
        assert_eq!((stale.linked, stale.stale), (0, 8192));
        node.write(&CX, 100, vec![1; 10], WriteFlags::empty()).await.expect("writes");
        let late = node.populate(&CX, 0, fetched.data.clone(), slot.generation()).await.expect("is told");
        assert_eq!((late.linked, late.lost), (4096, 4096));
        assert_eq!(read(&node, 100, 10).await, [1; 10]);
        assert_eq!(read(&node, 4096, 4096).await, fetched.data[4096..]);
        // Zeroes take no space.
        let before = storage.len();
        let zero = node.populate_zero(&CX, 8192, 65536 - 8192, slot.generation()).await.expect("populates");
        assert_eq!(zero.linked, 65536 - 8192);
        assert_eq!(storage.len(), before);
        assert!(infill_base::is_zero(&read(&node, 8192, 65536 - 8192).await));
    });
}
