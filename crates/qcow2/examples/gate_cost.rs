//! What it costs a guest's write that the file below its image sees it, too: 4 KiB writes in place, with and without the gate.
//!
//! `cargo run --release -p infill-qcow2 --example gate_cost`. One thread, an image in memory, no I/O and no protocol: what is left
//! is what each layer costs the processor. Both ways take turns, and the best of many rounds counts, so that a busy machine
//! shows less. See `docs/decisions/0011`.

use std::time::{Duration, Instant};

use bytes::Bytes;
use infill_base::{Ctx, WriteFlags};
use infill_node::{NodeHandle, RawNode};
use infill_qcow2::{CreateOptions, OpenOptions, Qcow2, create};
use infill_sim::World;
use infill_storage::{MemoryStorage, StorageHandle};

const CX: &Ctx = &Ctx::GUEST;
const DISK: u64 = 16 << 20;
const BLOCK: u64 = 4096;
const WRITES: u64 = 20_000;
const ROUNDS: usize = 60;

/// An image all of which is mapped, on a file whose node sees its writes or not.
async fn image(gated: bool) -> NodeHandle {
    let file = StorageHandle::new(MemoryStorage::new(0));
    let options = CreateOptions { size: DISK, ..CreateOptions::default() };
    create(CX, &file, &options).await.expect("an image is made");
    let below = NodeHandle::new(RawNode::new(file.clone(), false));
    let file = if gated { below.on_storage(file) } else { file };
    let image = Qcow2::open(CX, file, OpenOptions::default()).await.expect("it opens");
    let node = NodeHandle::new(image);
    node.write(CX, 0, vec![1; DISK as usize], WriteFlags::empty()).await.expect("it is written");
    node
}

async fn round(node: &NodeHandle, data: &Bytes) -> Duration {
    let start = Instant::now();
    for nth in 0..WRITES {
        let at = nth.wrapping_mul(0x9e37_79b9) % (DISK / BLOCK) * BLOCK;
        node.write(CX, at, data.clone(), WriteFlags::empty()).await.expect("a write");
    }
    start.elapsed()
}

fn main() {
    World::new(1).run(async {
        let (with, without) = (image(true).await, image(false).await);
        let data = Bytes::from(vec![7; BLOCK as usize]);
        let mut best = [Duration::MAX; 2];
        for _ in 0..ROUNDS {
            for (best, node) in best.iter_mut().zip([&with, &without]) {
                *best = round(node, &data).await.min(*best);
            }
        }
        let [with, without] = best.map(|best| best.as_secs_f64() * 1e9 / WRITES as f64);
        println!(
            "{with:.0} ns a write with the gate, {without:.0} ns without: {:.0} ns, {:.2} x",
            with - without,
            with / without
        );
    });
}
