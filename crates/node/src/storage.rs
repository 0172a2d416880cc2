//! A node seen as bytes at offsets: what a format driver lies on when the graph puts a node (a filter, another format) there.

use bytes::BytesMut;
use infill_base::{Ctx, ExtentKind, Extents, Gather, IoResult, Limits, WriteFlags, ZeroFlags};
use infill_storage::{RangeLock, Storage};

use crate::NodeHandle;
use crate::generic::chain_extents;

/// A node as a storage, which grows with what is written behind its end.
#[derive(Debug)]
pub struct NodeStorage {
    node: NodeHandle,
    /// One change of the length at a time: two writes behind the end must not undo each other's.
    resizing: RangeLock,
}

impl NodeStorage {
    /// On `node`.
    pub fn new(node: NodeHandle) -> NodeStorage {
        NodeStorage { node, resizing: RangeLock::new() }
    }

    /// Sees to it that the node has at least `end` bytes.
    async fn reach(&self, cx: &Ctx, end: u64) -> IoResult<()> {
        if end <= self.node.len() {
            return Ok(());
        }
        let _turn = self.resizing.exclusive(0, 1).await;
        if end <= self.node.len() { Ok(()) } else { self.node.resize(cx, end).await }
    }
}

impl Storage for NodeStorage {
    fn limits(&self) -> Limits {
        self.node.limits()
    }

    fn len(&self) -> u64 {
        self.node.len()
    }

    fn name(&self) -> String {
        self.node.info().filename
    }

    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        self.node.read(cx, at, buf).await
    }

    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        self.reach(cx, at.saturating_add(data.len() as u64)).await?;
        self.node.write(cx, at, data, flags).await
    }

    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.reach(cx, at.saturating_add(len)).await?;
        self.node.write_zeroes(cx, at, len, flags).await
    }

    async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.node.discard(cx, at, len).await
    }

    async fn write_back(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.node.write_back(cx, at, len).await
    }

    async fn allocate(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.reach(cx, at.saturating_add(len)).await?;
        self.node.allocate(cx, at, len).await
    }

    async fn sync(&self, cx: &Ctx) -> IoResult<()> {
        self.node.sync(cx).await
    }

    async fn set_len(&self, cx: &Ctx, len: u64) -> IoResult<()> {
        let _turn = self.resizing.exclusive(0, 1).await;
        self.node.resize(cx, len).await
    }

    async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        let mut extents = chain_extents(&self.node, cx, at, len).await?;
        for extent in &mut extents {
            debug_assert_ne!(extent.kind, ExtentKind::Absent);
            extent.host = None;
        }
        Ok(extents)
    }
}

#[cfg(test)]
mod tests {
    use infill_base::ErrorKind;
    use infill_sim::{DiskOp, DiskOptions, Media, SimDisk, block_on};
    use infill_storage::StorageHandle;

    use super::*;
    use crate::{BlkdebugNode, MemoryOverlay, RawNode};

    #[test]
    fn space_is_reserved_through_a_filter_and_a_full_storage_is_told_before_anything_is_written() {
        block_on(async {
            let disk = SimDisk::with(Media::new(4096), DiskOptions::default());
            let raw = NodeHandle::new(RawNode::new(StorageHandle::new(disk.clone()), false));
            let filter = NodeHandle::new(BlkdebugNode::new(raw, Vec::new(), Vec::new()));
            let storage = StorageHandle::new(NodeStorage::new(filter));
            storage.allocate(&Ctx::GUEST, 2048, 8192).await.unwrap();
            assert_eq!((disk.total(DiskOp::Allocate), storage.len()), (1, 2048 + 8192));
            storage.write_back(&Ctx::GUEST, 0, 4096).await.unwrap();
            disk.set_capacity(16 << 10);
            let full = storage.allocate(&Ctx::GUEST, 0, 32 << 10).await.unwrap_err();
            assert_eq!(full.kind(), ErrorKind::NoSpace);
            // An overlay promises nothing.
            let overlay = NodeHandle::new(MemoryOverlay::new(4096, 512, None));
            let storage = StorageHandle::new(NodeStorage::new(overlay));
            let none = storage.allocate(&Ctx::GUEST, 0, 512).await.unwrap_err();
            assert_eq!(none.kind(), ErrorKind::Unsupported);
        });
    }
}
