//! Raw: the guest's bytes are the storage's bytes, or a window of them. A hole is zero, so it is never an overlay.
//! A storage itself (a file, an NBD export) that stands in the graph is the same, under its protocol's name.

use bytes::BytesMut;
use infill_base::{
    Ctx, DiscardMode, ErrorKind, Extents, Gather, IoError, IoResult, Limits, OpenError, WriteFlags,
    ZeroFlags, range_end,
};
use infill_storage::StorageHandle;
use infill_storage::sync::atomic::{AtomicU64, Ordering};

use crate::{Node, NodeInfo};

/// A raw disk on a storage.
#[derive(Debug)]
pub struct RawNode {
    driver: &'static str,
    storage: StorageHandle,
    offset: u64,
    len: AtomicU64,
    /// A window has a fixed size.
    window: bool,
    /// Its size is that of the storage at any time: a format that lies there too makes it longer.
    follows: bool,
    read_only: bool,
    discard: DiscardMode,
}

impl RawNode {
    /// All bytes of `storage`.
    pub fn new(storage: StorageHandle, read_only: bool) -> RawNode {
        RawNode { follows: false, ..RawNode::protocol("raw", storage, read_only) }
    }

    /// All bytes of `storage`, under the driver name of what it is (`file`, `nbd`).
    pub fn protocol(driver: &'static str, storage: StorageHandle, read_only: bool) -> RawNode {
        let len = AtomicU64::new(storage.len());
        let read_only = read_only || !storage.limits().writable;
        let discard = DiscardMode::Unmap;
        RawNode { driver, offset: 0, len, window: false, follows: true, read_only, discard, storage }
    }

    /// `size` bytes of `storage` from byte `offset` (QEMU's raw driver with `offset` and `size`).
    pub fn window(
        storage: StorageHandle,
        offset: u64,
        size: u64,
        read_only: bool,
    ) -> Result<RawNode, OpenError> {
        if range_end(offset, size, storage.len()).is_none() {
            return Err(OpenError::Refused {
                why: format!(
                    "offset {offset} and size {size} do not lie inside {}, which has {} bytes",
                    storage.name(),
                    storage.len()
                ),
            });
        }
        Ok(RawNode { offset, window: true, len: AtomicU64::new(size), ..RawNode::new(storage, read_only) })
    }

    /// What becomes of discards (by default the space is given back).
    pub fn discarding(self, discard: DiscardMode) -> RawNode {
        RawNode { discard, ..self }
    }

    fn check(&self, at: u64, len: u64) -> IoResult<u64> {
        let size = Node::len(self);
        match range_end(at, len, size) {
            Some(_) => Ok(self.offset + at),
            None => Err(IoError::new(
                ErrorKind::InvalidInput,
                format!("behind the end of the disk ({size} bytes)"),
            )
            .at(at, len)
            .in_node(self.storage.name())),
        }
    }

    fn check_write(&self, at: u64, len: u64) -> IoResult<u64> {
        if self.read_only {
            return Err(
                IoError::new(ErrorKind::NotPermitted, "the node is read-only").in_node(self.storage.name())
            );
        }
        self.check(at, len)
    }
}

impl Node for RawNode {
    fn limits(&self) -> Limits {
        let limits = self.storage.limits();
        Limits { writable: limits.writable && !self.read_only, ..limits }
    }

    fn len(&self) -> u64 {
        if self.follows { self.storage.len() } else { self.len.load(Ordering::Acquire) }
    }

    fn info(&self) -> NodeInfo {
        NodeInfo {
            driver: self.driver,
            filename: self.storage.name(),
            backing: None,
            cluster_bytes: None,
            read_only: self.read_only,
            dirty: false,
            format_specific: Vec::new(),
        }
    }

    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        let at = self.check(at, buf.len() as u64)?;
        self.storage.read(cx, at, buf).await
    }

    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        let at = self.check_write(at, data.len() as u64)?;
        self.storage.write(cx, at, data, flags).await
    }

    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        let at = self.check_write(at, len)?;
        let flags = match self.discard {
            DiscardMode::Unmap => flags,
            DiscardMode::Ignore => flags - ZeroFlags::MAY_UNMAP,
        };
        self.storage.write_zeroes(cx, at, len, flags).await
    }

    async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        let at = self.check_write(at, len)?;
        match self.discard {
            DiscardMode::Unmap => self.storage.discard(cx, at, len).await,
            DiscardMode::Ignore => Ok(()),
        }
    }

    fn gives_space_back(&self) -> bool {
        self.discard == DiscardMode::Unmap
    }

    async fn sync(&self, cx: &Ctx) -> IoResult<()> {
        self.storage.sync(cx).await
    }

    async fn write_back(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        let at = self.check(at, len)?;
        self.storage.write_back(cx, at, len).await
    }

    async fn allocate(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        let at = self.check_write(at, len)?;
        self.storage.allocate(cx, at, len).await
    }

    async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        let host = self.check(at, len)?;
        let mut extents = self.storage.extents(cx, host, len).await?;
        for extent in &mut extents {
            extent.start -= self.offset;
        }
        Ok(extents)
    }

    async fn resize(&self, cx: &Ctx, len: u64) -> IoResult<()> {
        if self.window || self.read_only {
            let what = if self.window { "a window of fixed size" } else { "read-only" };
            return Err(IoError::new(ErrorKind::NotPermitted, format!("cannot resize: the node is {what}")));
        }
        self.storage.set_len(cx, len).await?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }
}
