//! Bitmaps that QEMU has stored are read here, those that are stored here are QEMU's, and what is wrong with one harms
//! nothing else.

mod bench;

use bench::{Bench, io, run, text};
use infill_base::{Ctx, WriteFlags};
use infill_node::{Bitmap, NodeHandle, Repair};
use infill_qcow2::{OpenOptions, Qcow2, check};
use infill_sim::{Rng, World};
use infill_storage::sync::Arc;
use infill_storage::{MemoryStorage, StorageHandle};
use serde_json::{Value, json};

const CX: Ctx = Ctx::GUEST;
const SIZE: u64 = (5 << 20) - 512;

async fn open_bytes(bytes: Vec<u8>, read_only: bool) -> (Arc<MemoryStorage>, NodeHandle) {
    let storage = Arc::new(MemoryStorage::from_bytes(bytes));
    let options = OpenOptions { read_only, ..OpenOptions::default() };
    let image = Qcow2::open(&CX, StorageHandle::from_arc(storage.clone()), options).await.unwrap();
    (storage, NodeHandle::new(image))
}

async fn add(node: &NodeHandle, name: &str, granularity: u64) -> Arc<Bitmap> {
    node.check_persistent("n", name, granularity).unwrap();
    let bitmap = Arc::new(Bitmap::new(name, node.len(), granularity).unwrap());
    bitmap.set_persistent(true);
    node.hold_changes().await.add_bitmap(bitmap.clone()).unwrap();
    bitmap
}

async fn write(node: &NodeHandle, at: u64, len: usize) {
    node.write(&CX, at, vec![9; len], WriteFlags::empty()).await.unwrap();
}

fn runs(bitmap: &Bitmap) -> Vec<std::ops::Range<u64>> {
    let map = bitmap.map();
    std::iter::successors(map.next_dirty(0, u64::MAX), |run| map.next_dirty(run.end, u64::MAX)).collect()
}

fn bitmap_tool(path: &std::path::Path, args: &[&str]) {
    let args: Vec<&str> = ["bitmap"].into_iter().chain(args.iter().copied()).collect();
    let (options, name) = args.split_at(args.len() - 1);
    run("qemu-img", &[options, &[text(path)], name].concat());
}

/// What qemu-img tells of an image's bitmaps.
fn told(path: &std::path::Path) -> Value {
    let info: Value = serde_json::from_str(&run("qemu-img", &["info", "--output=json", text(path)])).unwrap();
    info["format-specific"]["data"]["bitmaps"].clone()
}

/// An image of QEMU's with a bitmap that records and one that does not, after a write.
fn of_qemu(bench: &Bench, options: &str) -> std::path::PathBuf {
    let path = bench.image("a.qcow2", options, &SIZE.to_string(), &["write -P 1 0 1M"]);
    bitmap_tool(&path, &["--add", "-g", "4096", "b"]);
    bitmap_tool(&path, &["--add", "-g", "65536", "--disable", "off"]);
    io(&path, &["write -P 2 8k 4k", "write -P 3 1M 200k", "write -P 4 5242000 300"]);
    path
}

const DIRTY: [std::ops::Range<u64>; 3] = [8192..12288, 1 << 20..(1 << 20) + (200 << 10), 5238784..SIZE];

#[test]
fn bitmaps_of_qemu_are_read_bit_for_bit_and_given_back_with_what_was_written_here() {
    for options in [
        "cluster_size=65536",
        "cluster_size=512",
        "cluster_size=4096,extended_l2=off,refcount_bits=1",
        "cluster_size=2097152",
        "cluster_size=16384,extended_l2=on,lazy_refcounts=on",
        "cluster_size=65536,backing_fmt=raw,backing_file=base.raw",
    ] {
        let bench = Bench::new();
        bench.file("base.raw", &[7; 4096]);
        let options = options.replace("base.raw", text(&bench.path("base.raw")));
        let path = of_qemu(&bench, &options);
        World::new(1).run(async {
            let before = std::fs::read(&path).unwrap();
            let (storage, node) = open_bytes(before.clone(), true).await;
            let b = node.bitmap("b").unwrap();
            assert_eq!(runs(&b), DIRTY, "{options}");
            assert!(b.is_recording() && b.is_persistent() && b.is_read_only() && !b.is_inconsistent());
            let off = node.bitmap("off").unwrap();
            assert!(runs(&off).is_empty() && !off.is_recording());
            node.close(&CX).await.unwrap();
            assert!(storage.to_bytes() == before, "{options}: read-only, the file changed");

            let (storage, node) = open_bytes(before, false).await;
            write(&node, 3 << 20, 5000).await;
            add(&node, "ours", 512).await;
            write(&node, 4 << 20, 512).await;
            node.close(&CX).await.unwrap();
            let path = bench.file("b.qcow2", &storage.to_bytes());
            run("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]);
            assert_eq!(
                told(&path),
                json!([
                    {"flags": ["auto"], "name": "b", "granularity": 4096},
                    {"flags": [], "name": "off", "granularity": 65536},
                    {"flags": ["auto"], "name": "ours", "granularity": 512},
                ]),
                "{options}"
            );
            // QEMU goes on with them, and what it leaves is read here again.
            io(&path, &["write -P 5 2M 4k"]);
            run("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]);
            let (_, node) = open_bytes(std::fs::read(&path).unwrap(), true).await;
            let mut dirty = DIRTY.to_vec();
            dirty.insert(2, 2 << 20..(2 << 20) + 4096);
            dirty.insert(3, 3 << 20..(3 << 20) + 8192);
            dirty.insert(4, 4 << 20..(4 << 20) + 4096);
            assert_eq!(runs(&node.bitmap("b").unwrap()), dirty, "{options}");
            let ours = [2 << 20..(2 << 20) + 4096, 4 << 20..(4 << 20) + 512];
            assert_eq!(runs(&node.bitmap("ours").unwrap()), ours, "{options}");
            assert!(runs(&node.bitmap("off").unwrap()).is_empty());
        });
    }
}

#[test]
fn the_first_bitmap_of_an_image_and_the_removal_of_the_last_leave_it_clean() {
    for options in
        ["cluster_size=512", "cluster_size=65536", "cluster_size=65536,extended_l2=on,compression_type=zstd"]
    {
        let bench = Bench::new();
        let path = bench.image("a.qcow2", options, &SIZE.to_string(), &[]);
        World::new(1).run(async {
            let (storage, node) = open_bytes(std::fs::read(&path).unwrap(), false).await;
            add(&node, "b", 65536).await;
            write(&node, 0, 512).await;
            node.close(&CX).await.unwrap();
            let bytes = storage.to_bytes();
            run("qemu-img", &["check", "-q", text(&bench.file("b.qcow2", &bytes))]);

            let (storage, node) = open_bytes(bytes, false).await;
            assert_eq!(runs(&node.bitmap("b").unwrap()).first(), Some(&(0..65536)));
            node.remove_stored_bitmap(&CX, "b").await.unwrap();
            let b = node.bitmap("b").unwrap();
            node.remove_bitmap(&b);
            node.close(&CX).await.unwrap();
            let path = bench.file("b.qcow2", &storage.to_bytes());
            run("qemu-img", &["check", "-q", text(&path)]);
            assert_eq!(told(&path), Value::Null, "{options}");
        });
    }
}

#[test]
fn a_bitmap_that_was_not_stored_is_inconsistent_here_and_in_qemu_and_can_be_removed() {
    let bench = Bench::new();
    let path = of_qemu(&bench, "cluster_size=65536");
    World::new(1).run(async {
        let (storage, node) = open_bytes(std::fs::read(&path).unwrap(), false).await;
        write(&node, 0, 512).await;
        node.sync(&CX).await.unwrap();
        // The process dies.
        let bytes = storage.to_bytes();
        let path = bench.file("b.qcow2", &bytes);
        assert_eq!(told(&path)[0]["flags"], json!(["in-use", "auto"]));
        let (storage, node) = open_bytes(bytes, false).await;
        let b = node.bitmap("b").unwrap();
        assert!(b.is_inconsistent() && !b.is_recording());
        assert!(b.use_readable().is_err() && b.check_changeable().is_err());
        node.remove_stored_bitmap(&CX, "b").await.unwrap();
        node.remove_bitmap(&b);
        node.close(&CX).await.unwrap();
        let path = bench.file("b.qcow2", &storage.to_bytes());
        // The other one stays, as unusable as it was.
        assert_eq!(told(&path), json!([{"flags": ["in-use"], "name": "off", "granularity": 65536}]));
    });
}

#[test]
fn a_disk_that_grows_has_bitmaps_of_its_new_size() {
    let bench = Bench::new();
    let path = of_qemu(&bench, "cluster_size=4096");
    World::new(1).run(async {
        let (storage, node) = open_bytes(std::fs::read(&path).unwrap(), false).await;
        node.resize(&CX, 64 << 20).await.unwrap();
        write(&node, 60 << 20, 512).await;
        node.close(&CX).await.unwrap();
        let path = bench.file("b.qcow2", &storage.to_bytes());
        run("qemu-img", &["check", "-q", text(&path)]);
        io(&path, &["write -P 5 2M 4k"]);
        let (_, node) = open_bytes(std::fs::read(&path).unwrap(), true).await;
        let found = runs(&node.bitmap("b").unwrap());
        assert_eq!(found.last().unwrap(), &(60 << 20..(60 << 20) + 4096));
        assert!(found.contains(&(2 << 20..(2 << 20) + 4096)));
    });
}

#[test]
fn what_a_bitmap_cannot_be_is_refused_in_qemus_words() {
    let bench = Bench::new();
    let old = bench.image("old.qcow2", "compat=0.10", &SIZE.to_string(), &[]);
    let new = bench.image("new.qcow2", "cluster_size=65536", &SIZE.to_string(), &[]);
    World::new(1).run(async {
        let (_, node) = open_bytes(std::fs::read(&old).unwrap(), false).await;
        let why = node.check_persistent("d", "x", 4096).unwrap_err();
        let said = "Can't make bitmap 'x' persistent in 'd': Cannot store dirty bitmaps in qcow2 v2 files";
        assert_eq!(why.message(), said);
        let (_, node) = open_bytes(std::fs::read(&new).unwrap(), false).await;
        assert!(node.check_persistent("d", "x", 1 << 31).is_ok());
        assert!(node.check_persistent("d", "x", 1 << 32).is_err());
        node.resize(&CX, 8 << 40).await.unwrap();
        let why = node.check_persistent("d", "x", 512).unwrap_err();
        assert!(why.message().contains("Use larger granularity"), "{why}");
    });
}

/// Where the bitmaps extension, the directory and the first table lie.
fn places(bytes: &[u8]) -> [std::ops::Range<usize>; 3] {
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let extension = bytes.windows(8).position(|bytes| bytes == b"\x23\x85\x28\x75\0\0\0\x18").unwrap();
    let (len, directory) = (word(extension + 16), word(extension + 24));
    let table = word(directory);
    [extension..extension + 32, directory..directory + len, table..table + 64]
}

#[test]
fn damaged_bitmaps_harm_neither_the_disk_nor_the_program() {
    let bench = Bench::new();
    let path = of_qemu(&bench, "cluster_size=4096");
    let good = std::fs::read(&path).unwrap();
    let places = places(&good);
    let mut rng = Rng::new(5);
    let (mut gone, mut inconsistent) = (0, 0);
    for nth in 0..600 {
        let mut bytes = good.clone();
        let place = places[nth % 3].clone();
        for _ in 0..rng.range(1, 4) {
            let at = place.start + rng.index(place.len());
            bytes[at] = [0, 0xff, 1, 0x80, rng.next_u64() as u8][rng.index(5)];
        }
        World::new(nth as u64).run(async {
            let storage = Arc::new(MemoryStorage::from_bytes(bytes));
            let handle = StorageHandle::from_arc(storage.clone());
            let opened = Qcow2::open(&CX, handle.clone(), OpenOptions::default()).await;
            let Ok(image) = opened else {
                // Extensions are part of the header, which may be refused as a whole.
                assert_eq!(nth % 3, 0);
                return;
            };
            let node = NodeHandle::new(image);
            gone += usize::from(node.bitmaps().is_empty());
            inconsistent += node.bitmaps().iter().filter(|bitmap| bitmap.is_inconsistent()).count();
            assert_eq!(node.read_vec(&CX, 8192, 512).await.unwrap()[..], [2; 512]);
            write(&node, 3 << 20, 5000).await;
            let closed = node.close(&CX).await;
            let report = check(&CX, &handle, Repair::Nothing).await.unwrap();
            let (_, again) = open_bytes(storage.to_bytes(), true).await;
            assert_eq!(again.read_vec(&CX, 3 << 20, 5000).await.unwrap()[..], [9; 5000]);
            for bitmap in again.bitmaps() {
                let misses = bitmap.is_recording() && !bitmap.map().is_dirty(3 << 20);
                assert!(!misses, "{nth}: {closed:?}: '{}' misses a write: {report:?}", bitmap.name());
            }
        });
    }
    assert!(gone > 20 && inconsistent > 20, "{gone} {inconsistent}");
}
