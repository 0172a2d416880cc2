//! Every storage does what a storage does.

use std::time::Duration;

use infill_base::Limits;
use infill_conformance::stack::over_nbd;
use infill_conformance::storage_suite::{LEN, StorageTraits, run};
use infill_io::{FileOptions, FileStorage, Reactors};
use infill_node::{MemoryOverlay, NodeHandle, NodeStorage, RawNode};
use infill_sim::{DiskOptions, Media, SimDisk, World};
use infill_storage::{MemoryStorage, StorageHandle};

const GROWS: StorageTraits = StorageTraits { grows: true };
const FIXED: StorageTraits = StorageTraits { grows: false };

fn in_world(traits: StorageTraits, make: impl Fn() -> StorageHandle) {
    for seed in 1..4 {
        World::new(seed).run(run(traits, || async { make() }));
    }
}

#[test]
fn memory() {
    in_world(GROWS, || StorageHandle::new(MemoryStorage::new(LEN as usize)));
}

#[test]
fn a_simulated_disk() {
    in_world(GROWS, || StorageHandle::new(SimDisk::new(LEN)));
}

#[test]
fn a_simulated_disk_that_takes_time_and_wants_blocks() {
    let latency = (Duration::from_micros(1), Duration::from_micros(90));
    for request_align in [1, 512, 4096] {
        let limits = Limits { request_align, memory_align: request_align, ..Limits::default() };
        let options = DiskOptions { latency, limits, seed: 9, ..DiskOptions::default() };
        in_world(GROWS, || StorageHandle::new(SimDisk::with(Media::new(LEN), options.clone())));
    }
}

#[test]
fn a_file_through_the_page_cache_and_around_it() {
    for direct in [false, true] {
        let directory = tempfile::tempdir().expect("a directory for files");
        let path = directory.path().to_owned();
        let reactors = Reactors::start(1).expect("a reactor");
        reactors.block_on(move || async move {
            let mut count = 0;
            run(GROWS, || {
                count += 1;
                let path = path.join(format!("disk{count}"));
                let options = FileOptions { direct, ..FileOptions::create_new(LEN) };
                async move { StorageHandle::new(FileStorage::open(path, options).expect("a new file")) }
            })
            .await;
        });
    }
}

#[test]
fn an_nbd_export_through_our_server_and_client() {
    for seed in 1..4 {
        World::new(seed).run(run(FIXED, || async move {
            let disk = SimDisk::with(Media::new(LEN), DiskOptions { seed, ..DiskOptions::default() });
            let node = NodeHandle::new(RawNode::new(StorageHandle::new(disk), false));
            over_nbd(node, true, seed).await.expect("connects")
        }));
    }
}

#[test]
fn a_raw_node_seen_as_a_storage() {
    in_world(GROWS, || {
        let raw = RawNode::new(StorageHandle::new(SimDisk::new(LEN)), false);
        StorageHandle::new(NodeStorage::new(NodeHandle::new(raw)))
    });
}

#[test]
fn an_overlay_in_memory_seen_as_a_storage() {
    in_world(FIXED, || {
        let base = NodeHandle::new(MemoryOverlay::new(LEN, 4096, None));
        let overlay = MemoryOverlay::new(LEN, 8192, Some(base));
        StorageHandle::new(NodeStorage::new(NodeHandle::new(overlay)))
    });
}
