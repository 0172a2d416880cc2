//! What is written reads back as a model says, here and in QEMU, which finds nothing wrong with the image.

mod bench;

use bench::{Bench, content, run, text};
use bytes::Bytes;
use infill_base::{Ctx, DiscardMode, WriteFlags, ZeroFlags};
use infill_node::{NodeHandle, RawNode};
use infill_qcow2::{OpenOptions, Qcow2};
use infill_sim::{Rng, World};
use infill_storage::sync::Arc;
use infill_storage::{MemoryStorage, StorageHandle};

const OPTIONS: [&str; 7] = [
    "compat=1.1,cluster_size=512,refcount_bits=64",
    "compat=0.10,cluster_size=4096",
    "compat=1.1,cluster_size=4096,refcount_bits=1",
    "compat=1.1,cluster_size=16384,extended_l2=on",
    "compat=1.1,cluster_size=65536,extended_l2=on",
    "compat=1.1,cluster_size=65536",
    "compat=1.1,cluster_size=2097152",
];
/// Not a multiple of any cluster.
const SIZE: u64 = 5_242_880 - 512;

/// An image in memory under test, what lies below it, and what it should hold.
struct Disk {
    storage: Arc<MemoryStorage>,
    node: NodeHandle,
    below: Option<Vec<u8>>,
    model: Vec<u8>,
    options: &'static str,
}

fn writable() -> OpenOptions {
    OpenOptions { discard: DiscardMode::Unmap, ..OpenOptions::default() }
}

async fn open_bytes(bytes: Vec<u8>, below: Option<&Vec<u8>>) -> (Arc<MemoryStorage>, NodeHandle) {
    let storage = Arc::new(MemoryStorage::from_bytes(bytes));
    let node = Qcow2::open(&Ctx::GUEST, StorageHandle::from_arc(storage.clone()), writable()).await.unwrap();
    let node = NodeHandle::new(node);
    if let Some(below) = below {
        let base = RawNode::new(StorageHandle::new(MemoryStorage::from_bytes(below.clone())), true);
        node.backing().unwrap().replace(Some(NodeHandle::new(base))).await;
    }
    (storage, node)
}

impl Disk {
    async fn new(bench: &Bench, options: &'static str, below: Option<Vec<u8>>, commands: &[&str]) -> Disk {
        let mut all = options.to_string();
        if let Some(below) = &below {
            let base = bench.file("base.raw", below);
            all += &format!(",backing_fmt=raw,backing_file={}", text(&base));
        }
        let path = bench.image("a.qcow2", &all, &SIZE.to_string(), commands);
        let model = bench.content(&path);
        let (storage, node) = open_bytes(std::fs::read(path).unwrap(), below.as_ref()).await;
        Disk { storage, node, below, model, options }
    }

    fn unit(&self) -> u64 {
        self.node.populate_unit()
    }

    /// What a discard makes zero of the range.
    fn discarded(&self, at: u64, end: u64) -> std::ops::Range<usize> {
        if self.options.contains("0.10") && self.below.is_some() {
            return 0..0;
        }
        let first = at.next_multiple_of(self.unit());
        let last = if end == SIZE { end } else { end / self.unit() * self.unit() };
        first.min(last) as usize..last as usize
    }

    async fn step(&mut self, rng: &mut Rng) {
        let cx = &Ctx::GUEST;
        let long = rng.per_mille(200);
        let len = if long { rng.range(1, 1 << 20) } else { rng.range(1, 20_000) };
        let at = rng.below(SIZE);
        let (at, len) =
            if rng.per_mille(500) { (at / 4096 * 4096, len.next_multiple_of(4096)) } else { (at, len) };
        let len = len.min(SIZE - at);
        let range = at as usize..(at + len) as usize;
        match rng.below(9) {
            0..=3 => {
                let data = vec![rng.range(1, 255) as u8; len as usize];
                self.model[range].copy_from_slice(&data);
                let flags = if rng.per_mille(100) { WriteFlags::FUA } else { WriteFlags::empty() };
                self.node.write(cx, at, data, flags).await.unwrap();
            }
            4 => {
                let flags = if rng.per_mille(500) { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
                self.node.write_zeroes(cx, at, len, flags).await.unwrap();
                self.model[range].fill(0);
            }
            5 => {
                self.node.discard(cx, at, len).await.unwrap();
                let range = self.discarded(at, at + len);
                self.model[range].fill(0);
            }
            6 | 7 => self.populate(rng, at, len).await,
            _ => self.node.sync(cx).await.unwrap(),
        }
    }

    /// Fills a range from below; the model does not change.
    async fn populate(&mut self, rng: &mut Rng, at: u64, len: u64) {
        let Some(below) = &self.below else { return };
        let (start, end) =
            (at / self.unit() * self.unit(), (at + len).next_multiple_of(self.unit()).min(SIZE));
        let slot = self.node.backing().unwrap();
        let generation = slot.generation();
        let mut data = vec![0; (end - start) as usize];
        for (byte, below) in data.iter_mut().zip(below.iter().skip(start as usize)) {
            *byte = *below;
        }
        let cx = if rng.per_mille(500) { Ctx::FILL } else { Ctx::GUEST };
        let stale = rng.per_mille(100);
        let generation = if stale { generation - 1 } else { generation };
        let done = if data.iter().all(|byte| *byte == 0) {
            self.node.populate_zero(&cx, start, end - start, generation).await.unwrap()
        } else {
            self.node.populate(&cx, start, Bytes::from(data), generation).await.unwrap()
        };
        assert_eq!(done.linked + done.lost + done.stale, end - start, "{}", self.options);
        assert!(!stale || done.linked == 0);
    }

    async fn assert_reads(&self) {
        let found = content(&self.node, 1 << 20).await;
        let wrong = found.iter().zip(&self.model).position(|(found, expected)| found != expected);
        assert_eq!(wrong, None, "{}: first wrong byte", self.options);
    }

    /// What QEMU says of the file as it is now.
    fn assert_file(&self, bench: &Bench) {
        let path = bench.file("b.qcow2", &self.storage.to_bytes());
        run("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]);
        assert!(bench.content(&path) == self.model, "{}: QEMU reads something else", self.options);
    }
}

fn below() -> Vec<u8> {
    // Data, a hole, and an end before the overlay's.
    let mut below: Vec<u8> = (0..4_000_100_u32).map(|at| (at / 512 % 251) as u8 + 1).collect();
    below[1 << 20..3 << 20].fill(0);
    below
}

#[test]
fn generated_operations_leave_what_the_model_says_and_qemu_finds_no_fault() {
    for (nth, options) in OPTIONS.into_iter().enumerate() {
        for backed in [false, true] {
            let bench = Bench::new();
            let world = World::new(nth as u64);
            let mut rng = world.fork_rng();
            world.run(async {
                let fill = ["write -P 9 100k 300k", "write -z 1M 100k", "write -P 8 2M 64k"];
                let mut disk = Disk::new(&bench, options, backed.then(below), &fill).await;
                for round in 0..3 {
                    for _ in 0..25 {
                        disk.step(&mut rng).await;
                    }
                    disk.assert_reads().await;
                    if round == 1 {
                        // Another program opens it, and sees the same.
                        disk.node.close(&Ctx::GUEST).await.unwrap();
                        disk.assert_file(&bench);
                        (disk.storage, disk.node) =
                            open_bytes(disk.storage.to_bytes(), disk.below.as_ref()).await;
                    }
                }
                disk.node.close(&Ctx::GUEST).await.unwrap();
                disk.assert_file(&bench);
            });
        }
    }
}

#[test]
fn an_image_marked_dirty_is_repaired_before_it_is_written() {
    let bench = Bench::new();
    let path = bench.image("a.qcow2", "lazy_refcounts=on", "1M", &["write -P 3 0 128k"]);
    let mut bytes = std::fs::read(path).unwrap();
    // The mark.
    bytes[79] |= 1;
    let world = World::new(0);
    world.run(async {
        let (storage, node) = open_bytes(bytes, None).await;
        assert!(!node.info().dirty);
        node.write(&Ctx::GUEST, 200_000, vec![5; 100], WriteFlags::empty()).await.unwrap();
        node.close(&Ctx::GUEST).await.unwrap();
        let path = bench.file("b.qcow2", &storage.to_bytes());
        run("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]);
    });
}
