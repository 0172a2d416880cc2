//! Internal snapshots: those that are made here are QEMU's, and the reverse; what guests write meanwhile is in neither too much
//! nor too little of them.

mod bench;

use std::path::{Path, PathBuf};

use bench::{Bench, content, io, run, text};
use infill_base::{Ctx, DiscardMode, ErrorKind, WriteFlags, ZeroFlags};
use infill_node::{NodeHandle, Repair, Snapshot};
use infill_qcow2::{CreateOptions, OpenOptions, Qcow2, check, create};
use infill_sim::{Rng, World};
use infill_storage::sync::Arc;
use infill_storage::{MemoryStorage, StorageHandle, rt};

const CX: &Ctx = &Ctx::GUEST;
const SIZE: u64 = (4 << 20) - 512;

const SHAPES: [&str; 6] = [
    "cluster_size=65536",
    "cluster_size=512",
    "cluster_size=4096,refcount_bits=8",
    "cluster_size=16384,extended_l2=on",
    "cluster_size=65536,lazy_refcounts=on,compression_type=zstd",
    "compat=0.10,cluster_size=4096",
];

async fn open_bytes(bytes: Vec<u8>) -> (Arc<MemoryStorage>, NodeHandle) {
    let storage = Arc::new(MemoryStorage::from_bytes(bytes));
    let options = OpenOptions { discard: DiscardMode::Unmap, ..OpenOptions::default() };
    let image = Qcow2::open(CX, StorageHandle::from_arc(storage.clone()), options).await.unwrap();
    (storage, NodeHandle::new(image))
}

fn wanted(name: &str) -> Snapshot {
    Snapshot {
        id: String::new(),
        name: name.into(),
        vm_state_bytes: 0,
        date_sec: 1_700_000_000,
        date_nsec: 5000,
        vm_clock_nsec: 77,
        icount: None,
        disk_bytes: None,
    }
}

async fn snap(node: &NodeHandle, name: &str) -> Snapshot {
    let _held = node.hold_changes().await;
    node.create_snapshot(CX, wanted(name)).await.unwrap()
}

async fn remove(node: &NodeHandle, name: &str) {
    let _held = node.hold_changes().await;
    let gone = node.delete_snapshot(CX, None, Some(name)).await.unwrap();
    assert_eq!(gone.map(|gone| gone.name).as_deref(), Some(name));
}

fn names(node: &NodeHandle) -> Vec<String> {
    node.snapshots().into_iter().map(|snapshot| snapshot.name).collect()
}

/// What QEMU reads of a snapshot.
fn content_of(bench: &Bench, image: &Path, name: &str) -> Vec<u8> {
    let raw = bench.path("snapshot.raw");
    let which = format!("snapshot.name={name}");
    run("qemu-img", &["convert", "-l", &which, "-O", "raw", text(image), text(&raw)]);
    std::fs::read(raw).unwrap()
}

fn put(path: &Path, storage: &MemoryStorage) {
    std::fs::write(path, storage.to_bytes()).unwrap();
    run("qemu-img", &["check", "-q", "-f", "qcow2", text(path)]);
}

/// An image of QEMU's with data, zeroes and compressed clusters.
fn image(bench: &Bench, options: &str) -> PathBuf {
    let commands = ["write -P 1 0 2M", "write -z 1M 128k", "write -c -P 6 2M 64k", "write -P 7 3500k 5k"];
    bench.image("a.qcow2", options, &SIZE.to_string(), &commands)
}

async fn scribble(node: &NodeHandle, model: &mut [u8], rng: &mut Rng, byte: u8) {
    for _ in 0..12 {
        let at = rng.below(SIZE - 200_000);
        let len = rng.range(1, 150_000);
        let range = at as usize..(at + len) as usize;
        match rng.below(5) {
            0 => {
                node.write_zeroes(CX, at, len, ZeroFlags::MAY_UNMAP).await.unwrap();
                model[range].fill(0);
            }
            _ => {
                node.write(CX, at, vec![byte; len as usize], WriteFlags::empty()).await.unwrap();
                model[range].fill(byte);
            }
        }
    }
}

#[test]
fn snapshots_that_are_made_here_are_read_listed_applied_and_deleted_by_qemu() {
    for options in SHAPES {
        let bench = Bench::new();
        let path = image(&bench, options);
        let first = bench.content(&path);
        World::new(1).run(async {
            let mut rng = Rng::new(7);
            let (storage, node) = open_bytes(std::fs::read(&path).unwrap()).await;
            let made = snap(&node, "first").await;
            assert_eq!((made.id.as_str(), made.disk_bytes), ("1", Some(SIZE)), "{options}");
            let mut second = first.clone();
            scribble(&node, &mut second, &mut rng, 9).await;
            snap(&node, "second").await;
            let mut now = second.clone();
            scribble(&node, &mut now, &mut rng, 10).await;
            assert_eq!(names(&node), ["first", "second"]);
            assert!(content(&node, 1 << 20).await == now, "{options}");
            node.close(CX).await.unwrap();
            put(&path, &storage);
            assert!(bench.content(&path) == now, "{options}");
            assert!(content_of(&bench, &path, "first") == first, "{options}: the first snapshot");
            assert!(content_of(&bench, &path, "second") == second, "{options}: the second snapshot");
            let list = run("qemu-img", &["snapshot", "-l", text(&path)]);
            assert!(list.contains("first") && list.contains("second"), "{list}");

            // QEMU goes back to one, deletes it, and writes on.
            run("qemu-img", &["snapshot", "-a", "first", text(&path)]);
            assert!(bench.content(&path) == first, "{options}");
            run("qemu-img", &["snapshot", "-d", "first", text(&path)]);
            run("qemu-img", &["check", "-q", text(&path)]);
            io(&path, &["write -P 3 0 4k"]);
            assert!(content_of(&bench, &path, "second") == second, "{options}");
            let (_, node) = open_bytes(std::fs::read(&path).unwrap()).await;
            assert_eq!(names(&node), ["second"]);
        });
    }
}

#[test]
fn snapshots_of_qemu_are_deleted_and_gone_back_to_here_and_the_rest_of_the_image_stays() {
    for options in SHAPES {
        let bench = Bench::new();
        let path = image(&bench, options);
        let first = bench.content(&path);
        run("qemu-img", &["snapshot", "-c", "first", text(&path)]);
        io(&path, &["write -P 20 100k 300k", "write -z 2M 256k"]);
        let second = bench.content(&path);
        run("qemu-img", &["snapshot", "-c", "second", text(&path)]);
        io(&path, &["write -P 21 200k 1M"]);
        World::new(2).run(async {
            let mut rng = Rng::new(3);
            let (storage, node) = open_bytes(std::fs::read(&path).unwrap()).await;
            let mut now = content(&node, 1 << 20).await;
            // Look-ups before and after: nothing stays cached that is another's by then.
            scribble(&node, &mut now, &mut rng, 30).await;
            remove(&node, "first").await;
            scribble(&node, &mut now, &mut rng, 31).await;
            assert!(content(&node, 1 << 20).await == now, "{options}");
            node.sync(CX).await.unwrap();
            assert_eq!(names(&node), ["second"]);
            snap(&node, "third").await;
            let third = now.clone();
            scribble(&node, &mut now, &mut rng, 32).await;
            node.close(CX).await.unwrap();
            put(&path, &storage);
            assert!(content_of(&bench, &path, "second") == second, "{options}");
            assert!(content_of(&bench, &path, "third") == third, "{options}");

            let (storage, node) = open_bytes(std::fs::read(&path).unwrap()).await;
            assert!(node.apply_snapshot(CX, "nobody").await.unwrap().is_none());
            let applied = node.apply_snapshot(CX, "second").await.unwrap().unwrap();
            assert_eq!(applied.name, "second");
            let mut now = second.clone();
            assert!(content(&node, 1 << 20).await == now, "{options}");
            scribble(&node, &mut now, &mut rng, 33).await;
            remove(&node, "second").await;
            remove(&node, "third").await;
            scribble(&node, &mut now, &mut rng, 34).await;
            assert!(content(&node, 1 << 20).await == now, "{options}");
            node.close(CX).await.unwrap();
            put(&path, &storage);
            assert!(bench.content(&path) == now, "{options}");
        });
        drop(first);
    }
}

/// The table of such a snapshot has fewer entries than that of the disk.
#[test]
fn a_snapshot_of_before_the_disk_grew_is_looked_at_and_its_rest_is_zeroes() {
    let bench = Bench::new();
    let path = image(&bench, "cluster_size=512");
    let first = bench.content(&path);
    run("qemu-img", &["snapshot", "-c", "first", text(&path)]);
    run("qemu-img", &["resize", "-q", "-f", "qcow2", text(&path), "16M"]);
    io(&path, &["write -P 4 0 1M", "write -P 5 8M 1M"]);
    World::new(3).run(async {
        let storage = Arc::new(MemoryStorage::from_bytes(std::fs::read(&path).unwrap()));
        let image = Qcow2::open(CX, StorageHandle::from_arc(storage), bench::read_only()).await.unwrap();
        let node = NodeHandle::new(image);
        node.load_snapshot(CX, None, Some("first")).await.unwrap().unwrap();
        let mut then = first;
        then.resize(16 << 20, 0);
        assert!(content(&node, 1 << 20).await == then);
    });
}

#[test]
fn a_snapshot_under_writing_guests_has_what_was_answered_before_and_nothing_that_came_after() {
    for cluster_bytes in [512, 4096, 65536] {
        for seed in 1..4 {
            World::new(seed).run(async {
                let storage = Arc::new(MemoryStorage::new(0));
                let handle = StorageHandle::from_arc(storage.clone());
                let new = CreateOptions { size: 1 << 20, cluster_bytes, ..CreateOptions::default() };
                create(CX, &handle, &new).await.unwrap();
                let node =
                    NodeHandle::new(Qcow2::open(CX, handle.clone(), OpenOptions::default()).await.unwrap());
                // Each guest writes ascending numbers to a part of its own.
                let guests = (0..4u64).map(|nth| {
                    let node = node.clone();
                    let mut rng = Rng::new(seed * 10 + nth);
                    rt::detached(async move {
                        for round in 1..40u8 {
                            let at = nth * (256 << 10) + rng.below(60) * 4096;
                            node.write(CX, at, vec![round; 8192], WriteFlags::empty()).await.unwrap();
                            rt::sleep(std::time::Duration::from_micros(rng.below(50))).await;
                        }
                    })
                });
                let snapping = async {
                    let mut seen = Vec::new();
                    for nth in 0..4 {
                        rt::sleep(std::time::Duration::from_micros(300)).await;
                        let held = node.hold_changes().await;
                        let now = content(&node, 1 << 20).await;
                        node.create_snapshot(CX, wanted(&format!("s{nth}"))).await.unwrap();
                        drop(held);
                        seen.push(now);
                        if nth == 2 {
                            remove(&node, "s1").await;
                        }
                    }
                    seen
                };
                let (_, seen) =
                    futures_util::future::join(futures_util::future::join_all(guests), snapping).await;
                let now = content(&node, 1 << 20).await;
                node.close(CX).await.unwrap();
                let report = check(CX, &handle, Repair::Nothing).await.unwrap();
                assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.messages);
                for nth in [0, 2, 3] {
                    let (_, copy) = open_bytes(storage.to_bytes()).await;
                    copy.apply_snapshot(CX, &format!("s{nth}")).await.unwrap().unwrap();
                    assert!(
                        content(&copy, 1 << 20).await == seen[nth],
                        "clusters of {cluster_bytes}, seed {seed}, {nth}"
                    );
                }
                let (_, copy) = open_bytes(storage.to_bytes()).await;
                assert!(content(&copy, 1 << 20).await == now);
            });
        }
    }
}

#[test]
fn what_cannot_be_snapped_says_so_and_stays_as_it_is() {
    let bench = Bench::new();
    let path = bench.image("a.qcow2", "refcount_bits=1", "1M", &["write -P 1 0 64k"]);
    World::new(4).run(async {
        let before = std::fs::read(&path).unwrap();
        let (_, node) = open_bytes(before).await;
        let refused = node.create_snapshot(CX, wanted("x")).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput);
        assert!(node.delete_snapshot(CX, Some("1"), None).await.unwrap().is_none());
        // Three times is what two bits take.
        let path = bench.image("b.qcow2", "refcount_bits=2", "1M", &["write -P 1 0 64k"]);
        let (storage, node) = open_bytes(std::fs::read(&path).unwrap()).await;
        snap(&node, "one").await;
        snap(&node, "two").await;
        let refused = node.create_snapshot(CX, wanted("three")).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::TooLarge);
        assert_eq!(names(&node), ["one", "two"]);
        node.write(CX, 0, vec![2; 4096], WriteFlags::empty()).await.unwrap();
        node.close(CX).await.unwrap();
        drop(node);
        // It is marked, and opens all the same.
        let (storage, node) = open_bytes(storage.to_bytes()).await;
        assert_eq!(node.read_vec(CX, 4096, 1).await.unwrap()[0], 1);
        node.close(CX).await.unwrap();
        put(&path, &storage);
        assert_eq!(content_of(&bench, &path, "two")[0], 1);
    });
}

#[test]
fn a_damaged_table_of_snapshots_is_told_of_and_harms_nothing_else() {
    let bench = Bench::new();
    let path = image(&bench, "cluster_size=65536");
    run("qemu-img", &["snapshot", "-c", "kept", text(&path)]);
    let before = bench.content(&path);
    World::new(5).run(async {
        let mut bytes = std::fs::read(&path).unwrap();
        let at = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
        bytes[at + 36..at + 40].fill(0xff);
        let (storage, node) = open_bytes(bytes).await;
        assert!(node.snapshots().is_empty());
        assert!(content(&node, 1 << 20).await == before);
        for error in [
            node.create_snapshot(CX, wanted("x")).await.unwrap_err(),
            node.delete_snapshot(CX, None, Some("kept")).await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
        node.write(CX, 0, vec![5; 100], WriteFlags::empty()).await.unwrap();
        node.close(CX).await.unwrap();
        drop(storage);
    });
}
