//! Filters: nodes that pass requests on to one node, and do something of their own to some of them.
//!
//! A filter points at its node with an [`Edge`], so that another node can take that one's place under it (a snapshot, the end
//! of a mirror or of a commit) while requests run. A [`Filter`] says what it does differently; everything else goes on as it
//! came. What never happens: a filter closes the node below it, or shows that node's edge as its own.

use std::future::Future;

use bytes::BytesMut;
use infill_base::{Ctx, Extents, Gather, IoResult, Limits, WriteFlags, ZeroFlags};

use crate::edge::Through as _;
use crate::{Edge, Node, NodeHandle, NodeInfo};

/// What a filter does. Each default passes the request on.
#[expect(clippy::len_without_is_empty, reason = "a disk is not a collection")]
pub trait Filter: Send + Sync + 'static {
    /// Its driver, as QEMU spells it.
    const DRIVER: &'static str;

    /// Where it points.
    fn below(&self) -> &Edge;

    /// See [`Node::limits`].
    fn limits(&self) -> Limits {
        self.below().node_limits()
    }

    /// See [`Node::len`].
    fn len(&self) -> u64 {
        self.below().len()
    }

    /// See [`Node::read`].
    fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> impl Future<Output = IoResult<BytesMut>> {
        self.below().read(cx, at, buf)
    }

    /// See [`Node::write`].
    fn write(
        &self,
        cx: &Ctx,
        at: u64,
        data: Gather,
        flags: WriteFlags,
    ) -> impl Future<Output = IoResult<()>> {
        self.below().write(cx, at, data, flags)
    }

    /// See [`Node::write_zeroes`].
    fn write_zeroes(
        &self,
        cx: &Ctx,
        at: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> impl Future<Output = IoResult<()>> {
        self.below().write_zeroes(cx, at, len, flags)
    }

    /// See [`Node::discard`].
    fn discard(&self, cx: &Ctx, at: u64, len: u64) -> impl Future<Output = IoResult<()>> {
        self.below().discard(cx, at, len)
    }

    /// See [`Node::sync`].
    fn sync(&self, cx: &Ctx) -> impl Future<Output = IoResult<()>> {
        self.below().sync(cx)
    }

    /// See [`Node::resize`].
    fn resize(&self, cx: &Ctx, len: u64) -> impl Future<Output = IoResult<()>> {
        async move { self.below().node().resize(cx, len).await }
    }

    /// See [`Node::held`].
    fn held(&self, begins: bool) {
        let _ = begins;
    }

    /// See [`Node::close`]. The node below is somebody else's to close.
    fn close(&self, cx: &Ctx) -> impl Future<Output = IoResult<()>> {
        let _ = cx;
        async { Ok(()) }
    }
}

impl<F: Filter> Node for F {
    fn limits(&self) -> Limits {
        Filter::limits(self)
    }

    fn len(&self) -> u64 {
        Filter::len(self)
    }

    fn info(&self) -> NodeInfo {
        NodeInfo { driver: F::DRIVER, ..self.below().info() }
    }

    fn filtered(&self) -> Option<NodeHandle> {
        Some(self.below().node())
    }

    fn held(&self, begins: bool) {
        Filter::held(self, begins);
    }

    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        Filter::read(self, cx, at, buf).await
    }

    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        Filter::write(self, cx, at, data, flags).await
    }

    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        Filter::write_zeroes(self, cx, at, len, flags).await
    }

    async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        Filter::discard(self, cx, at, len).await
    }

    async fn sync(&self, cx: &Ctx) -> IoResult<()> {
        Filter::sync(self, cx).await
    }

    async fn write_back(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.below().node().write_back(cx, at, len).await
    }

    async fn allocate(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.below().node().allocate(cx, at, len).await
    }

    async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        self.below().extents(cx, at, len).await
    }

    async fn resize(&self, cx: &Ctx, len: u64) -> IoResult<()> {
        Filter::resize(self, cx, len).await
    }

    async fn close(&self, cx: &Ctx) -> IoResult<()> {
        Filter::close(self, cx).await
    }
}
