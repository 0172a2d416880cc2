use std::collections::BTreeSet;

use infill_base::{Ctx, WriteFlags};
use infill_sim::World;

use super::*;
use crate::{Bitmap, MemoryOverlay, NodeHandle};

const LEN: u64 = 1 << 20;
const UNIT: u64 = 8192;

/// Bits of blocks of [`UNIT`] bytes.
#[derive(Default)]
struct Bits(Mutex<BTreeSet<u64>>);

impl Bits {
    fn marked(&self) -> Vec<u64> {
        lock(&self.0).iter().map(|block| block * UNIT).collect()
    }
}

impl KeptBits for Bits {
    fn granularity(&self) -> u64 {
        UNIT
    }
    fn mark(&self, at: u64, len: u64) {
        lock(&self.0).extend(at / UNIT..(at + len).div_ceil(UNIT));
    }
    fn clear(&self, at: u64, len: u64) {
        lock(&self.0).retain(|block| !(at / UNIT..(at + len).div_ceil(UNIT)).contains(block));
    }
    fn void(&self) {
        lock(&self.0).clear();
    }
}

fn kept() -> (Arc<Bitmap>, Arc<Bits>) {
    let (bitmap, bits) = (Bitmap::new("b", LEN, 4096).unwrap(), Arc::new(Bits::default()));
    bitmap.keep_in(bits.clone());
    (Arc::new(bitmap), bits)
}

#[test]
fn a_kept_bitmap_follows_only_when_it_is_told_to() {
    World::new(1).run(async {
        let node = NodeHandle::new(MemoryOverlay::new(LEN, 4096, None));
        let (bitmap, bits) = kept();
        node.hold_changes().await.add_bitmap(bitmap.clone()).unwrap();
        let write = async |at| node.write(&Ctx::GUEST, at, vec![1; 512], WriteFlags::empty()).await.unwrap();
        write(4096).await;
        write(100_000).await;
        assert_eq!(bits.marked(), [0, 98304]);
        assert_eq!(bitmap.to_follow(), None);
        bitmap.clear();
        write(50_000).await;
        assert_eq!(bits.marked(), [0, 49152, 98304]);
        let moment = bitmap.to_follow().unwrap();
        // Made to say less once more: who has led to that is not noted.
        bitmap.clear();
        bitmap.follow(moment);
        assert_eq!(bits.marked(), [0, 49152, 98304]);
        write(200_000).await;
        bitmap.follow(bitmap.to_follow().unwrap());
        assert_eq!((bits.marked(), bitmap.to_follow()), (vec![196_608], None));
        bitmap.set_recording(false);
        write(0).await;
        assert_eq!(bits.marked(), [196_608]);
    });
}

#[test]
fn what_is_under_way_stays_marked_and_is_marked_when_recording_begins() {
    let bits = Arc::new(Bits::default());
    let keeper = Arc::new(Keeper::new(bits.clone()));
    let map = DirtyMap::new(LEN, 4096);
    let first = keeper.clone().begin(10_000, 10_000, || true);
    let unseen = keeper.clone().begin(100_000, 1, || false);
    assert_eq!(bits.marked(), [8192, 16384]);
    keeper.mark_under_way();
    assert_eq!(bits.marked(), [8192, 16384, 98304]);
    bits.mark(0, LEN);
    keeper.shrinks();
    map.mark(40_960, 1);
    keeper.follow(&map, keeper.to_follow().unwrap());
    assert_eq!(bits.marked(), [8192, 16384, 40_960, 98304]);
    drop((first, unseen));
    keeper.shrinks();
    keeper.follow(&map, keeper.to_follow().unwrap());
    assert_eq!(bits.marked(), [40_960]);
}
