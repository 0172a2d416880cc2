//! Images with things in them that we do not make: snapshots, compressed clusters, bitmaps, damage; and changes of an
//! image as a whole, as QEMU sees them.

mod bench;

use std::path::Path;

use bench::{Bench, content, io, run, text};
use infill_base::{Ctx, DiscardMode, ErrorKind, WriteFlags, ZeroFlags};
use infill_node::{BackingRef, NodeHandle, RawNode};
use infill_qcow2::{OpenOptions, Qcow2};
use infill_sim::World;
use infill_storage::sync::Arc;
use infill_storage::{MemoryStorage, StorageHandle};

const GUEST: &Ctx = &Ctx::GUEST;

async fn open(path: &Path) -> (Arc<MemoryStorage>, NodeHandle) {
    let storage = Arc::new(MemoryStorage::from_bytes(std::fs::read(path).unwrap()));
    let options = OpenOptions { discard: DiscardMode::Unmap, ..OpenOptions::default() };
    let node = Qcow2::open(GUEST, StorageHandle::from_arc(storage.clone()), options).await.unwrap();
    (storage, NodeHandle::new(node))
}

async fn write(node: &NodeHandle, at: u64, len: usize, byte: u8) {
    node.write(GUEST, at, vec![byte; len], WriteFlags::empty()).await.unwrap();
}

/// Closes the node, puts the file where it was, and lets QEMU check it.
async fn close(path: &Path, storage: &MemoryStorage, node: &NodeHandle) {
    node.close(GUEST).await.unwrap();
    std::fs::write(path, storage.to_bytes()).unwrap();
    run("qemu-img", &["check", "-q", "-f", "qcow2", text(path)]);
}

#[test]
fn a_snapshot_keeps_its_content_whatever_is_written_zeroed_or_discarded() {
    for options in ["cluster_size=4096", "cluster_size=65536,extended_l2=on", "compat=0.10"] {
        let bench = Bench::new();
        let path = bench.image(
            "a.qcow2",
            options,
            "4M",
            &["write -P 1 0 3M", "write -z 1M 64k", "write -P 6 3500k 5k"],
        );
        let before = bench.content(&path);
        run("qemu-img", &["snapshot", "-c", "kept", text(&path)]);
        World::new(0).run(async {
            let (storage, node) = open(&path).await;
            let mut model = before.clone();
            write(&node, 1000, 3000, 2).await;
            model[1000..4000].fill(2);
            write(&node, 65536, 131_072, 3).await;
            model[65536..196_608].fill(3);
            node.write_zeroes(GUEST, 262_144, 100_000, ZeroFlags::MAY_UNMAP).await.unwrap();
            model[262_144..362_144].fill(0);
            node.discard(GUEST, 2 << 20, 65536).await.unwrap();
            model[2 << 20..(2 << 20) + 65536].fill(0);
            write(&node, (1 << 20) + 5, 10, 4).await;
            model[(1 << 20) + 5..(1 << 20) + 15].fill(4);
            assert!(content(&node, 1 << 20).await == model, "{options}");
            close(&path, &storage, &node).await;
            assert!(bench.content(&path) == model, "{options}");
        });
        let kept = bench.path("kept.raw");
        run("qemu-img", &["convert", "-l", "snapshot.name=kept", "-O", "raw", text(&path), text(&kept)]);
        assert!(std::fs::read(kept).unwrap() == before, "{options}: the snapshot has changed");
    }
}

#[test]
fn compressed_clusters_read_and_are_unpacked_by_what_is_written_to_them() {
    for options in ["cluster_size=4096", "compression_type=zstd", "extended_l2=on,cluster_size=32768"] {
        let bench = Bench::new();
        let plain =
            bench.image("plain.qcow2", "compat=1.1", "2M", &["write -P 7 0 1M", "write -P 8 1500k 100k"]);
        let path = bench.path("a.qcow2");
        run("qemu-img", &["convert", "-c", "-O", "qcow2", "-o", options, text(&plain), text(&path)]);
        let mut model = bench.content(&path);
        World::new(0).run(async {
            let (storage, node) = open(&path).await;
            assert!(content(&node, 10_000).await == model, "{options}");
            write(&node, 5000, 100, 1).await;
            model[5000..5100].fill(1);
            write(&node, 131_072, 65536, 2).await;
            model[131_072..196_608].fill(2);
            node.write_zeroes(GUEST, 262_144 + 1000, 65536, ZeroFlags::empty()).await.unwrap();
            model[263_144..263_144 + 65536].fill(0);
            node.discard(GUEST, 524_288, 65536).await.unwrap();
            model[524_288..589_824].fill(0);
            assert!(content(&node, 1 << 20).await == model, "{options}");
            close(&path, &storage, &node).await;
            assert!(bench.content(&path) == model, "{options}");
        });
    }
}

#[test]
fn bitmaps_that_cannot_be_kept_up_stop_being_claimed_before_the_first_write() {
    let bench = Bench::new();
    let path = bench.image("a.qcow2", "compat=1.1", "1M", &[]);
    run("qemu-img", &["bitmap", "--add", text(&path), "dirty"]);
    let autoclear = |bytes: &[u8]| bytes[95] & 1;
    World::new(0).run(async {
        for damaged in [false, true] {
            if damaged {
                let mut bytes = std::fs::read(&path).unwrap();
                let entry = bytes.windows(5).rposition(|bytes| bytes == b"dirty").unwrap() - 24;
                // The length of its name.
                bytes[entry + 18..entry + 20].fill(0xff);
                std::fs::write(&path, bytes).unwrap();
            }
            let (storage, node) = open(&path).await;
            node.sync(GUEST).await.unwrap();
            assert_eq!(autoclear(&storage.to_bytes()), 1);
            write(&node, 0, 512, 1).await;
            assert_eq!(autoclear(&storage.to_bytes()), u8::from(!damaged));
            node.close(GUEST).await.unwrap();
        }
    });
}

#[test]
fn a_longer_disk_reads_as_zeroes_behind_its_old_end_over_a_longer_backing_too() {
    for options in ["cluster_size=512", "cluster_size=65536,extended_l2=on", "compat=0.10,cluster_size=4096"]
    {
        let bench = Bench::new();
        let below = vec![0xbb; 5_000_000];
        let base = bench.file("base.raw", &below);
        let all = format!("{options},backing_fmt=raw,backing_file={}", text(&base));
        let path = bench.image("a.qcow2", &all, "1000448", &["write -P 1 990000 10448"]);
        let mut model = bench.content(&path);
        World::new(0).run(async {
            let (storage, node) = open(&path).await;
            let raw = RawNode::new(StorageHandle::new(MemoryStorage::from_bytes(below.clone())), true);
            node.backing().unwrap().replace(Some(NodeHandle::new(raw))).await;
            let tables = storage.to_bytes()[40..48].to_vec();
            node.resize(GUEST, 40 << 20).await.unwrap();
            model.resize(40 << 20, 0);
            assert!(content(&node, 1 << 20).await == model, "{options}");
            if options.contains("512") {
                assert_ne!(
                    storage.to_bytes()[40..48],
                    tables[..],
                    "the L1 table did not move: nothing is tested"
                );
            }
            write(&node, 39 << 20, 5000, 3).await;
            model[39 << 20..(39 << 20) + 5000].fill(3);
            let shrink = node.resize(GUEST, 1 << 20).await.unwrap_err();
            assert_eq!(shrink.kind(), ErrorKind::Unsupported);
            close(&path, &storage, &node).await;
            assert!(bench.content(&path) == model, "{options}");
        });
    }
}

#[test]
fn another_backing_file_or_none_is_what_qemu_finds_in_the_header() {
    let bench = Bench::new();
    let base = bench.file("base.raw", &[1; 65536]);
    let options = format!("backing_fmt=raw,backing_file={}", text(&base));
    let path = bench.image("a.qcow2", &options, "64k", &["write -P 2 0 64k"]);
    World::new(0).run(async {
        let (storage, node) = open(&path).await;
        let other = BackingRef { filename: "other.qcow2".into(), format: Some("qcow2".into()) };
        node.set_backing_ref(GUEST, Some(other.clone())).await.unwrap();
        assert_eq!(node.info().backing, Some(other));
        std::fs::write(&path, storage.to_bytes()).unwrap();
        let info = run("qemu-img", &["info", "--output=json", text(&path)]);
        assert!(info.contains("\"backing-filename\": \"other.qcow2\""), "{info}");
        node.set_backing_ref(GUEST, None).await.unwrap();
        close(&path, &storage, &node).await;
        let info = run("qemu-img", &["info", "--output=json", text(&path)]);
        assert!(!info.contains("backing-filename"), "{info}");
        assert_eq!(bench.content(&path), [2; 65536]);
    });
}

/// Where the active L1 table lies, its first L2 table, and what the first entry of that names.
fn tables(bytes: &[u8]) -> (usize, usize, usize) {
    let word = |at: usize| u64::from_be_bytes(*bytes[at..].first_chunk().unwrap()) & 0x00ff_ffff_ffff_fe00;
    let l1 = word(40) as usize;
    let l2 = word(l1) as usize;
    (l1, l2, word(l2) as usize)
}

#[test]
fn an_entry_that_names_metadata_or_nothing_is_an_error_at_its_place_and_never_a_write() {
    let bench = Bench::new();
    let path = bench.image("a.qcow2", "compat=1.1", "1M", &["write -P 1 0 64k", "write -P 2 64k 64k"]);
    let good = std::fs::read(&path).unwrap();
    let (l1, l2, _) = tables(&good);
    let refcounts = u64::from_be_bytes(*good[48..].first_chunk().unwrap());
    let behind = (good.len() as u64).next_multiple_of(65536) + (1 << 20);
    for (target, readable) in [(refcounts, true), (l1 as u64, true), (l2 as u64, true), (behind, false)] {
        let mut bytes = good.clone();
        bytes[l2..l2 + 8].copy_from_slice(&(target | 1 << 63).to_be_bytes());
        std::fs::write(&path, &bytes).unwrap();
        World::new(0).run(async {
            let (storage, node) = open(&path).await;
            assert_eq!(node.read_vec(GUEST, 0, 512).await.is_ok(), readable);
            let outcome = node.write(GUEST, 0, vec![9; 65536], WriteFlags::empty()).await;
            if readable {
                assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Corrupt);
                assert!(storage.to_bytes() == bytes, "something was written");
            }
            assert_eq!(node.read_vec(GUEST, 65536, 2).await.unwrap()[..], [2, 2]);
        });
    }
    let mut bytes = good.clone();
    bytes[l1..l1 + 8].copy_from_slice(&(refcounts | 1 << 63).to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    World::new(0).run(async {
        let (storage, node) = open(&path).await;
        let outcome = node.write(GUEST, 0, vec![9; 65536], WriteFlags::empty()).await;
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Corrupt);
        node.sync(GUEST).await.unwrap();
        assert!(storage.to_bytes() == bytes, "something was written");
    });
}

#[test]
fn what_a_discard_gives_back_is_used_again() {
    let bench = Bench::new();
    let path = bench.image("a.qcow2", "cluster_size=4096", "64M", &[]);
    World::new(0).run(async {
        let (storage, node) = open(&path).await;
        let mut len = 0;
        for round in 0..8 {
            write(&node, 0, 4 << 20, round).await;
            node.sync(GUEST).await.unwrap();
            node.discard(GUEST, 0, 4 << 20).await.unwrap();
            node.sync(GUEST).await.unwrap();
            infill_storage::rt::sleep(std::time::Duration::from_nanos(1)).await;
            if round == 2 {
                len = storage.to_bytes().len();
            }
        }
        assert!(storage.to_bytes().len() <= len + (8 << 20), "the file grows without end");
        close(&path, &storage, &node).await;
    });
    io(&path, &["read -P 0 0 4M"]);
}

#[test]
fn a_part_of_a_compressed_cluster_is_forgotten_and_the_rest_of_it_stays() {
    let bench = Bench::new();
    let below = bench.image("below.qcow2", "compat=1.1", "1M", &["write -P 5 0 1M"]);
    let path = bench.path("a.qcow2");
    let backed = format!("extended_l2=on,cluster_size=32768,backing_file={},backing_fmt=qcow2", text(&below));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &backed, text(&path)]);
    io(&path, &["write -c -P 7 64k 32k", "write -c -P 8 128k 32k"]);
    let mut model = bench.content(&path);
    World::new(0).run(async {
        let (storage, node) = open(&path).await;
        let base = bench::open(&below, bench::read_only()).await;
        node.backing().unwrap().replace(Some(base)).await;
        node.forget(GUEST, 65536 + 3072, 2048).await.unwrap();
        node.forget(GUEST, 131_072, 32768).await.unwrap();
        model[65536 + 3072..65536 + 5120].fill(5);
        model[131_072..131_072 + 32768].fill(5);
        assert!(content(&node, 65536).await == model);
        close(&path, &storage, &node).await;
        assert!(bench.content(&path) == model);
    });
}
