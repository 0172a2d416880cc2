//! The copy-on-read filter: a node under a name of its own that turns copy-on-read on for the overlay below it.

use bytes::{Bytes, BytesMut};
use infill_base::{Ctx, Extents, Gather, IoResult, Limits, WriteFlags, ZeroFlags};

use crate::{
    BackingRef, BackingSlot, COPY_ON_READ_BYTES_MAX, CopyOnRead, Node, NodeHandle, NodeInfo, Populated,
};

/// Passes everything on to an overlay, which keeps what is read through its edge while this node lives. Over a node
/// that has no backing it does nothing.
#[derive(Debug)]
pub struct CopyOnReadNode {
    below: NodeHandle,
}

impl CopyOnReadNode {
    /// Over `below`, which must be writable to keep anything.
    pub fn new(below: NodeHandle) -> CopyOnReadNode {
        if let Some(slot) = below.backing() {
            slot.set_copy_on_read(Some(CopyOnRead::new(&below, COPY_ON_READ_BYTES_MAX)));
        }
        CopyOnReadNode { below }
    }
}

impl Drop for CopyOnReadNode {
    fn drop(&mut self) {
        if let Some(slot) = self.below.backing() {
            slot.set_copy_on_read(None);
        }
    }
}

impl Node for CopyOnReadNode {
    fn limits(&self) -> Limits {
        self.below.limits()
    }

    fn len(&self) -> u64 {
        self.below.len()
    }

    fn info(&self) -> NodeInfo {
        NodeInfo { driver: "copy-on-read", ..self.below.info() }
    }

    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        self.below.read(cx, at, buf).await
    }

    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        self.below.write(cx, at, data, flags).await
    }

    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.below.write_zeroes(cx, at, len, flags).await
    }

    async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.below.discard(cx, at, len).await
    }

    async fn sync(&self, cx: &Ctx) -> IoResult<()> {
        self.below.sync(cx).await
    }

    async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        self.below.extents(cx, at, len).await
    }

    fn backing(&self) -> Option<&BackingSlot> {
        self.below.backing()
    }

    fn populate_unit(&self) -> u64 {
        self.below.populate_unit()
    }

    async fn populate(&self, cx: &Ctx, at: u64, data: Bytes, generation: u64) -> IoResult<Populated> {
        self.below.populate(cx, at, data, generation).await
    }

    async fn populate_zero(&self, cx: &Ctx, at: u64, len: u64, generation: u64) -> IoResult<Populated> {
        self.below.populate_zero(cx, at, len, generation).await
    }

    async fn set_backing_ref(&self, cx: &Ctx, backing: Option<BackingRef>) -> IoResult<()> {
        self.below.set_backing_ref(cx, backing).await
    }

    async fn make_empty(&self, cx: &Ctx) -> IoResult<()> {
        self.below.make_empty(cx).await
    }

    async fn resize(&self, cx: &Ctx, len: u64) -> IoResult<()> {
        self.below.resize(cx, len).await
    }

    /// The overlay is somebody else's to close. What is being kept goes on; see [`CopyOnRead::settle`].
    async fn close(&self, _cx: &Ctx) -> IoResult<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use infill_base::ExtentKind;
    use infill_sim::World;

    use super::*;
    use crate::MemoryOverlay;

    #[test]
    fn reads_through_the_filter_are_kept_and_the_filter_takes_its_policy_with_it() {
        World::new(1).run(async {
            let base = NodeHandle::new(MemoryOverlay::new(64 << 10, 4096, None));
            base.write(&Ctx::GUEST, 0, vec![7; 64 << 10], WriteFlags::empty()).await.unwrap();
            let overlay = NodeHandle::new(MemoryOverlay::new(64 << 10, 4096, Some(base)));
            let filter = NodeHandle::new(CopyOnReadNode::new(overlay.clone()));
            assert_eq!(filter.read_vec(&Ctx::GUEST, 4096, 512).await.unwrap()[..], [7; 512]);
            filter.backing().and_then(BackingSlot::copy_on_read).unwrap().settle().await;
            filter.close(&Ctx::GUEST).await.unwrap();
            let kinds = overlay.extents(&Ctx::GUEST, 0, 64 << 10).await.unwrap();
            assert_eq!((kinds[1].kind, kinds[1].len), (ExtentKind::Data, 4096));
            drop(filter);
            overlay.read_vec(&Ctx::GUEST, 0, 512).await.unwrap();
            assert!(overlay.backing().unwrap().copy_on_read().is_none());
        });
    }
}
