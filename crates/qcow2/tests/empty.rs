//! An image that is emptied shows what lies below and has given all of its space back, whatever was in it; and whoever waits
//! for that waits for two syncs, whatever the size of the disk.

mod bench;

use bench::{Bench, content, io, run, text};
use infill_base::{Ctx, DiscardMode, WriteFlags};
use infill_node::{BackingRef, NodeHandle, RawNode, Snapshot};
use infill_qcow2::{CreateOptions, OpenOptions, Qcow2, create};
use infill_sim::{DiskOp, DiskOptions, Media, SimDisk, World};
use infill_storage::sync::Arc;
use infill_storage::{MemoryStorage, StorageHandle};

const CX: &Ctx = &Ctx::GUEST;
const SIZE: u64 = 4 << 20;

async fn over(node: &NodeHandle, below: Vec<u8>) {
    let base = StorageHandle::new(MemoryStorage::from_bytes(below));
    node.backing().unwrap().replace(Some(NodeHandle::new(RawNode::new(base, true)))).await;
}

async fn empty(node: &NodeHandle) {
    let _held = node.hold_changes().await;
    node.backing().unwrap().raise().await;
    node.make_empty(CX).await.unwrap();
}

#[test]
fn an_image_that_was_emptied_shows_what_lies_below_and_leaks_nothing() {
    for options in [
        "cluster_size=65536",
        "cluster_size=512",
        "cluster_size=4096,refcount_bits=8",
        "cluster_size=16384,extended_l2=on",
        "cluster_size=65536,compression_type=zstd",
        "compat=0.10,cluster_size=4096",
    ] {
        for snapshot in [false, true] {
            let bench = Bench::new();
            let below: Vec<u8> = (0..SIZE).map(|at| (at >> 9) as u8 | 1).collect();
            let base = bench.file("base.raw", &below);
            let path = bench.path("a.qcow2");
            let over_base = ["-F", "raw", "-b", text(&base)];
            let create = ["create", "-q", "-f", "qcow2", "-o", options, text(&path)];
            run("qemu-img", &[&create[..], &over_base].concat());
            io(&path, &["write -P 1 0 2M", "write -c -P 6 2M 64k", "write -P 7 3500k 5k"]);
            let before = bench.content(&path);
            World::new(1).run(async {
                let storage = Arc::new(MemoryStorage::from_bytes(std::fs::read(&path).unwrap()));
                let unmap = OpenOptions { discard: DiscardMode::Unmap, ..OpenOptions::default() };
                let image = Qcow2::open(CX, StorageHandle::from_arc(storage.clone()), unmap).await.unwrap();
                let node = NodeHandle::new(image);
                over(&node, below.clone()).await;
                if snapshot {
                    let wanted = Snapshot {
                        id: String::new(),
                        name: "s".into(),
                        vm_state_bytes: 0,
                        date_sec: 0,
                        date_nsec: 0,
                        vm_clock_nsec: 0,
                        icount: None,
                        disk_bytes: None,
                    };
                    let _held = node.hold_changes().await;
                    node.create_snapshot(CX, wanted).await.unwrap();
                }
                // Some of it stands in memory alone.
                node.write(CX, 3 << 20, vec![9; 100_000], WriteFlags::empty()).await.unwrap();
                empty(&node).await;
                let mut now = below.clone();
                assert!(content(&node, 1 << 20).await == now, "{options}");
                node.write(CX, 12_345, vec![3; 70_000], WriteFlags::empty()).await.unwrap();
                now[12_345..82_345].fill(3);
                assert!(content(&node, 1 << 20).await == now, "{options}: written to afterwards");
                node.close(CX).await.unwrap();
                std::fs::write(&path, storage.to_bytes()).unwrap();
                // A leak fails it, too.
                run("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]);
                assert!(bench.content(&path) == now, "{options}: as QEMU reads it");
                if snapshot {
                    run("qemu-img", &["snapshot", "-a", "s", text(&path)]);
                    assert!(bench.content(&path) == before, "{options}: the snapshot");
                    run("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]);
                }
            });
        }
    }
}

#[test]
fn emptying_takes_as_many_writes_and_syncs_for_a_full_disk_as_for_one_cluster() {
    // Tables of 512 KiB each, all of whose entries are in one sector of the L1 table.
    const DISK: u64 = 16 << 20;
    let mut needed = Vec::new();
    for bytes in [4096, DISK] {
        World::new(1).run(async {
            let disk = SimDisk::with(Media::new(0), DiskOptions::default());
            let storage = StorageHandle::new(disk.clone());
            let backing = Some(BackingRef { filename: "base".into(), format: Some("raw".into()) });
            let options =
                CreateOptions { size: DISK, cluster_bytes: 4096, backing, ..CreateOptions::default() };
            create(CX, &storage, &options).await.unwrap();
            let node = NodeHandle::new(Qcow2::open(CX, storage, OpenOptions::default()).await.unwrap());
            over(&node, vec![1; DISK as usize]).await;
            node.write(CX, 0, vec![2; bytes as usize], WriteFlags::empty()).await.unwrap();
            node.sync(CX).await.unwrap();
            let held = node.hold_changes().await;
            node.backing().unwrap().raise().await;
            let count = || [DiskOp::Write, DiskOp::Sync].map(|op| disk.total(op));
            let before = count();
            node.make_empty(CX).await.unwrap();
            let after = count();
            drop(held);
            needed.push([after[0] - before[0], after[1] - before[1]]);
            node.close(CX).await.unwrap();
        });
    }
    assert_eq!(needed[0], needed[1], "writes and syncs for a cluster, and for {DISK} bytes");
    assert_eq!(needed[1][1], 2, "syncs");
}
