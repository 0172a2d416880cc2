//! Compressed clusters that are written here: QEMU reads them and finds no fault, whatever is written over them.

mod bench;

use bench::{Bench, content, run, text};
use infill_base::{Ctx, WriteFlags, ZeroFlags};
use infill_node::{NodeHandle, Repair};
use infill_qcow2::{Compression, CreateOptions, OpenOptions, Qcow2, check, create};
use infill_sim::{Rng, World};
use infill_storage::sync::Arc;
use infill_storage::{MemoryStorage, StorageHandle};

const CX: &Ctx = &Ctx::GUEST;
/// It ends in the middle of a cluster of any size.
const SIZE: u64 = (6 << 20) + 512;

/// Bytes that compress, some of them not.
fn text_of(rng: &mut Rng) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < SIZE as usize {
        match rng.below(6) {
            0 => bytes.extend((0..rng.range(1, 9000)).map(|_| rng.below(256) as u8)),
            1 => bytes.extend(std::iter::repeat_n(rng.below(256) as u8, rng.range(1, 40_000) as usize)),
            _ => {
                for _ in 0..rng.range(1, 200) {
                    bytes.extend_from_slice(format!("word {} of a text, ", rng.below(5000)).as_bytes());
                }
            }
        }
    }
    bytes.truncate(SIZE as usize);
    bytes
}

async fn open(storage: &StorageHandle) -> NodeHandle {
    NodeHandle::new(Qcow2::open(CX, storage.clone(), OpenOptions::default()).await.unwrap())
}

fn shapes() -> Vec<CreateOptions> {
    let shape = |cluster_bytes: u64, compression: Compression| CreateOptions {
        size: SIZE,
        cluster_bytes,
        compression,
        ..CreateOptions::default()
    };
    vec![
        shape(65536, Compression::Deflate),
        shape(65536, Compression::Zstd),
        shape(512, Compression::Deflate),
        shape(4096, Compression::Zstd),
        shape(2 << 20, Compression::Deflate),
        CreateOptions { version: 2, ..shape(4096, Compression::Deflate) },
        CreateOptions { extended_l2: true, ..shape(16384, Compression::Zstd) },
        // Two bits count to three.
        CreateOptions { refcount_bits: 2, ..shape(65536, Compression::Deflate) },
        CreateOptions { refcount_bits: 1, ..shape(65536, Compression::Deflate) },
    ]
}

#[test]
fn qemu_reads_what_is_compressed_here_and_finds_no_fault() {
    for (nth, options) in shapes().into_iter().enumerate() {
        let bench = Bench::new();
        let what = format!("{options:?}");
        World::new(nth as u64).run(async {
            let mut rng = Rng::new(nth as u64);
            let bytes = Arc::new(MemoryStorage::new(0));
            let storage = StorageHandle::from_arc(bytes.clone());
            create(CX, &storage, &options).await.unwrap();
            let mut model = text_of(&mut rng);
            let node = open(&storage).await;
            // Whole requests, and some that cut clusters.
            let mut at = 0;
            while at < SIZE {
                let len = if rng.below(4) == 0 { rng.range(1, 300_000) } else { 1 << 20 }.min(SIZE - at);
                let data = model[at as usize..(at + len) as usize].to_vec();
                node.write(CX, at, data, WriteFlags::COMPRESSED).await.unwrap();
                at += len;
            }
            assert!(content(&node, 1 << 20).await == model, "{what}");
            node.close(CX).await.unwrap();
            let report = check(CX, &storage, Repair::Nothing).await.unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{what}: {:?}", report.messages);
            if options.refcount_bits > 2 && (4096..=65536).contains(&options.cluster_bytes) {
                assert!(report.compressed_clusters * 2 > report.total_clusters, "{what}: {report:?}");
                let most = if options.cluster_bytes == 65536 { SIZE * 9 / 10 } else { u64::MAX };
                assert!(storage.len() < most, "{what}: {} bytes", storage.len());
            }
            let path = bench.file("a.qcow2", &bytes.to_bytes());
            run("qemu-img", &["check", "-q", text(&path)]);
            assert!(bench.content(&path) == model, "{what}");

            // Over it: compressed again, plain, zeroes; what is there already is never written in place.
            let node = open(&storage).await;
            for round in 0..40u8 {
                let at = rng.below(SIZE - 400_000);
                let len = rng.range(1, 400_000);
                let range = at as usize..(at + len) as usize;
                match rng.below(4) {
                    0 => {
                        node.write_zeroes(CX, at, len, ZeroFlags::MAY_UNMAP).await.unwrap();
                        model[range].fill(0);
                        continue;
                    }
                    1 => {
                        node.write(CX, at, vec![round; len as usize], WriteFlags::empty()).await.unwrap();
                    }
                    _ => {
                        node.write(CX, at, vec![round; len as usize], WriteFlags::COMPRESSED).await.unwrap();
                    }
                }
                model[range].fill(round);
                if round % 8 == 0 {
                    node.sync(CX).await.unwrap();
                }
            }
            assert!(content(&node, 1 << 20).await == model, "{what}");
            node.close(CX).await.unwrap();
            let path = bench.file("a.qcow2", &bytes.to_bytes());
            run("qemu-img", &["check", "-q", text(&path)]);
            assert!(bench.content(&path) == model, "{what}");
        });
    }
}
