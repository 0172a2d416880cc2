//! The copy-on-read filter: a node under a name of its own that turns copy-on-read on for the overlay below it.

use std::time::Duration;

use infill_base::{Ctx, IoResult};
use infill_storage::rt;
use infill_storage::sync::{Arc, Mutex, lock};

use crate::{BackingSlot, COPY_ON_READ_BYTES_MAX, CopyOnRead, Edge, Filter, NodeHandle, WeakNode};

/// How long closing waits for what has begun to be kept. No data is lost otherwise; it stays below.
const KEEP_TIME: Duration = Duration::from_secs(5);

/// Passes everything on to an overlay, which keeps what is read through its edge while this node lives. Over a node
/// that has no backing it does nothing. The policy goes along when another overlay takes the place of this one.
#[derive(Debug)]
pub struct CopyOnReadNode {
    below: Edge,
    off: Arc<Mutex<bool>>,
}

impl CopyOnReadNode {
    /// Over `below`, which must be writable to keep anything. With `bottom`, only what that layer and those above it hold
    /// is kept.
    pub fn new(below: NodeHandle, bottom: Option<&NodeHandle>) -> CopyOnReadNode {
        let bottom = bottom.map(NodeHandle::downgrade);
        turn_on(&below, bottom.clone());
        let off = Arc::new(Mutex::new(false));
        let is_off = off.clone();
        let below = Edge::watched(below, move |old, new| {
            let is_off = lock(&is_off);
            if !*is_off {
                turn_off(old);
                turn_on(new, bottom.clone());
            }
        });
        CopyOnReadNode { below, off }
    }

    fn end(&self) {
        // The edge is locked before the flag where it moves, so the node is asked for first.
        let node = self.below.node();
        *lock(&self.off) = true;
        turn_off(&node);
        let now = self.below.node();
        if !now.is_same(&node) {
            turn_off(&now);
        }
    }
}

fn turn_on(node: &NodeHandle, bottom: Option<WeakNode>) {
    let overlay = node.unfiltered();
    if let Some(slot) = overlay.backing() {
        slot.set_copy_on_read(Some(CopyOnRead::down_to(&overlay, COPY_ON_READ_BYTES_MAX, bottom)));
    }
}

fn turn_off(node: &NodeHandle) {
    if let Some(slot) = node.unfiltered().backing() {
        slot.set_copy_on_read(None);
    }
}

impl Drop for CopyOnReadNode {
    fn drop(&mut self) {
        self.end();
    }
}

impl Filter for CopyOnReadNode {
    const DRIVER: &'static str = "copy-on-read";

    fn below(&self) -> &Edge {
        &self.below
    }

    /// What is being kept comes to its end, as far as its source lets it.
    async fn close(&self, _cx: &Ctx) -> IoResult<()> {
        let policy = self.below.node().unfiltered().backing().and_then(BackingSlot::copy_on_read);
        if let Some(policy) = policy
            && rt::timeout(KEEP_TIME, policy.settle()).await.is_none()
        {
            tracing::info!("closed before everything that was read could be kept");
        }
        self.end();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use infill_base::{ExtentKind, WriteFlags};
    use infill_sim::World;

    use super::*;
    use crate::MemoryOverlay;

    const LEN: u64 = 64 << 10;

    fn layer(below: Option<&NodeHandle>) -> NodeHandle {
        NodeHandle::new(MemoryOverlay::new(LEN, 4096, below.cloned()))
    }

    async fn kinds(node: &NodeHandle) -> Vec<(ExtentKind, u64)> {
        let extents = node.extents(&Ctx::GUEST, 0, LEN).await.unwrap();
        extents.iter().map(|extent| (extent.kind, extent.len)).collect()
    }

    async fn settled(overlay: &NodeHandle) {
        overlay.backing().and_then(BackingSlot::copy_on_read).unwrap().settle().await;
    }

    #[test]
    fn reads_through_the_filter_are_kept_and_the_filter_takes_its_policy_with_it() {
        World::new(1).run(async {
            let base = layer(None);
            base.write(&Ctx::GUEST, 0, vec![7; LEN as usize], WriteFlags::empty()).await.unwrap();
            let overlay = layer(Some(&base));
            let filter = NodeHandle::new(CopyOnReadNode::new(overlay.clone(), None));
            assert_eq!(filter.read_vec(&Ctx::GUEST, 4096, 512).await.unwrap()[..], [7; 512]);
            settled(&overlay).await;
            assert_eq!(kinds(&overlay).await[1], (ExtentKind::Data, 4096));
            // What reads through it sees the layers below it.
            assert!(filter.backing().is_none() && filter.unfiltered().is_same(&overlay));
            assert!(filter.layer_below().unwrap().is_same(&base));
            filter.close(&Ctx::GUEST).await.unwrap();
            assert!(overlay.backing().unwrap().copy_on_read().is_none());
        });
    }

    #[test]
    fn an_overlay_that_takes_the_place_of_another_keeps_what_is_read_and_the_old_one_keeps_nothing() {
        World::new(1).run(async {
            let base = layer(None);
            base.write(&Ctx::GUEST, 0, vec![7; LEN as usize], WriteFlags::empty()).await.unwrap();
            let old = layer(Some(&base));
            let filter = CopyOnReadNode::new(old.clone(), None);
            let edge = filter.below().clone();
            let filter = NodeHandle::new(filter);
            let new = layer(Some(&old));
            {
                let _held = old.hold_changes().await;
                edge.point_at(new.clone());
            }
            assert_eq!(filter.read_vec(&Ctx::GUEST, 8192, 512).await.unwrap()[..], [7; 512]);
            settled(&new).await;
            assert_eq!(kinds(&new).await[1], (ExtentKind::Data, 4096));
            assert_eq!(kinds(&old).await, [(ExtentKind::Absent, LEN)]);
            drop(filter);
            assert!(new.backing().unwrap().copy_on_read().is_none());
        });
    }

    #[test]
    fn what_lies_below_the_bottom_is_not_kept() {
        World::new(1).run(async {
            let cx = Ctx::GUEST;
            let base = layer(None);
            base.write(&cx, 0, vec![7; LEN as usize], WriteFlags::empty()).await.unwrap();
            let middle = layer(Some(&base));
            middle.write(&cx, 8192, vec![8; 4096], WriteFlags::empty()).await.unwrap();
            let overlay = layer(Some(&middle));
            let filter = NodeHandle::new(CopyOnReadNode::new(overlay.clone(), Some(&middle)));
            let read = filter.read_vec(&cx, 0, LEN as usize).await.unwrap();
            assert_eq!((read[0], read[8192], read[12288]), (7, 8, 7));
            settled(&overlay).await;
            let expected =
                [(ExtentKind::Absent, 8192), (ExtentKind::Data, 4096), (ExtentKind::Absent, LEN - 12288)];
            assert_eq!(kinds(&overlay).await, expected);
            // Nor is anything once that layer has left the chain.
            overlay.backing().unwrap().replace(Some(base)).await;
            filter.read_vec(&cx, 0, LEN as usize).await.unwrap();
            settled(&overlay).await;
            assert_eq!(kinds(&overlay).await, expected);
        });
    }
}
