//! [`Qcow2`]: an open image as a node of the graph.
//!
//! What changes the image as a whole runs as a task of its own: cut off in the middle it would leave its last write under
//! way while the next one begins.

use bytes::{Bytes, BytesMut};
use infill_base::{Ctx, DiscardMode, Extents, Gather, IoResult, Limits, OpenError, WriteFlags, ZeroFlags};
use infill_node::{BackingRef, BackingSlot, Bitmap, InfoValue, Node, NodeInfo, Populated, Snapshot};
use infill_storage::sync::Arc;
use infill_storage::{StorageHandle, rt};

use crate::features::{Compatible, Incompatible};
use crate::header::FORMAT;
use crate::image::{Image, OpenOptions};

/// The fact of [`NodeInfo::format_specific`] that says that another host owns the disk; not there where none does.
pub const MOVED_FACT: &str = "moved-to-another-host";

/// An open qcow2 image.
pub struct Qcow2(Arc<Image>);

impl Qcow2 {
    /// Opens the image in `storage`. Its backing file is not opened: `info().backing` says what the header names, and
    /// whoever wants it puts a node into [`Node::backing`]'s slot before any I/O.
    pub async fn open(cx: &Ctx, storage: StorageHandle, options: OpenOptions) -> Result<Qcow2, OpenError> {
        Ok(Qcow2(Image::open(cx, storage, options).await?))
    }

    fn is_read_only(&self) -> bool {
        self.0.writer.is_none()
    }
}

impl Node for Qcow2 {
    fn limits(&self) -> Limits {
        let limits = self.0.storage.limits();
        Limits {
            // Whatever the storage takes: the last bytes of a disk need not be one of its blocks.
            request_align: 1,
            preferred_bytes: self.0.geometry.cluster_bytes() as u32,
            writable: !self.is_read_only(),
            fast_zero: self.0.geometry.has_zero_clusters(),
            discard: self.0.options.discard == DiscardMode::Unmap,
            ..limits
        }
    }

    fn len(&self) -> u64 {
        self.0.size()
    }

    fn info(&self) -> NodeInfo {
        let header = self.0.header();
        NodeInfo {
            driver: FORMAT,
            filename: self.0.storage.name(),
            backing: header.backing(),
            cluster_bytes: Some(self.0.geometry.cluster_bytes()),
            read_only: self.is_read_only(),
            dirty: header.incompatible().contains(Incompatible::DIRTY),
            format_specific: format_specific(&header, self.0.bitmaps.told()),
        }
    }

    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        self.0.read(cx, at, buf).await
    }

    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        self.0.write(cx, at, data, flags).await?;
        self.0.written_through().await
    }

    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.0.write_zeroes(cx, at, len, flags).await?;
        self.0.written_through().await
    }

    async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.0.discard(cx, at, len).await?;
        self.0.written_through().await
    }

    async fn sync(&self, _cx: &Ctx) -> IoResult<()> {
        if self.0.writer.is_none() {
            return Ok(());
        }
        self.0.sync().await
    }

    async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        self.0.extents(cx, at, len).await
    }

    fn backing(&self) -> Option<&BackingSlot> {
        Some(&self.0.backing)
    }

    fn populate_unit(&self) -> u64 {
        self.0.geometry.subcluster_bytes()
    }

    async fn populate(&self, cx: &Ctx, at: u64, data: Bytes, generation: u64) -> IoResult<Populated> {
        let populated = self.0.populate(cx, at, data, generation).await?;
        self.0.written_through().await?;
        Ok(populated)
    }

    async fn populate_zero(&self, cx: &Ctx, at: u64, len: u64, generation: u64) -> IoResult<Populated> {
        let populated = self.0.populate_zero(cx, at, len, generation).await?;
        self.0.written_through().await?;
        Ok(populated)
    }

    async fn set_backing_ref(&self, _cx: &Ctx, backing: Option<BackingRef>) -> IoResult<()> {
        let image = self.0.clone();
        rt::detached(async move { image.set_backing_ref(backing).await }).await
    }

    async fn set_fence(&self, _cx: &Ctx, fenced: bool) -> IoResult<()> {
        let image = self.0.clone();
        rt::detached(async move { image.set_fence(fenced).await }).await
    }

    async fn make_empty(&self, _: &Ctx) -> IoResult<()> {
        let image = self.0.clone();
        rt::detached(async move { image.make_empty().await }).await
    }

    async fn forget(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.0.forget(cx, at, len).await?;
        self.0.written_through().await
    }

    fn keeps_snapshots(&self) -> bool {
        true
    }

    fn snapshots(&self) -> Vec<Snapshot> {
        self.0.snapshots.told()
    }

    async fn create_snapshot(&self, _cx: &Ctx, wanted: Snapshot) -> IoResult<Snapshot> {
        let image = self.0.clone();
        rt::detached(async move { image.create_snapshot(wanted).await }).await
    }

    async fn delete_snapshot(
        &self,
        _cx: &Ctx,
        id: Option<&str>,
        name: Option<&str>,
    ) -> IoResult<Option<Snapshot>> {
        let (image, id, name) = (self.0.clone(), id.map(str::to_owned), name.map(str::to_owned));
        rt::detached(async move { image.delete_snapshot(id.as_deref(), name.as_deref()).await }).await
    }

    async fn apply_snapshot(&self, _cx: &Ctx, which: &str) -> IoResult<Option<Snapshot>> {
        let (image, which) = (self.0.clone(), which.to_owned());
        rt::detached(async move { image.apply_snapshot(&which).await }).await
    }

    async fn load_snapshot(
        &self,
        _cx: &Ctx,
        id: Option<&str>,
        name: Option<&str>,
    ) -> IoResult<Option<Snapshot>> {
        let (image, id, name) = (self.0.clone(), id.map(str::to_owned), name.map(str::to_owned));
        rt::detached(async move { image.load_snapshot(id.as_deref(), name.as_deref()).await }).await
    }

    fn stored_bitmaps(&self) -> Vec<Bitmap> {
        self.0.bitmaps.take_loaded()
    }

    fn check_persistent(&self, node: &str, name: &str, granularity: u64) -> IoResult<()> {
        self.0.check_persistent(node, name, granularity)
    }

    async fn outdate_bitmaps(&self, _cx: &Ctx) -> IoResult<()> {
        self.0.prepare().await.map(drop)
    }

    async fn store_bitmaps(&self, _cx: &Ctx, bitmaps: Vec<Arc<Bitmap>>) -> IoResult<()> {
        let image = self.0.clone();
        rt::detached(async move { image.store_bitmaps(bitmaps).await }).await
    }

    async fn remove_stored_bitmap(&self, _cx: &Ctx, name: &str) -> IoResult<()> {
        let (image, name) = (self.0.clone(), name.to_owned());
        rt::detached(async move { image.remove_bitmap(&name).await }).await
    }

    async fn resize(&self, cx: &Ctx, len: u64) -> IoResult<()> {
        let (image, cx) = (self.0.clone(), *cx);
        rt::detached(async move { image.resize(&cx, len).await }).await
    }

    async fn close(&self, cx: &Ctx) -> IoResult<()> {
        let (image, cx) = (self.0.clone(), *cx);
        rt::detached(async move { image.close(&cx).await }).await
    }
}

/// The format's facts, with QEMU's names and in its order.
fn format_specific(header: &crate::Header, bitmaps: Option<InfoValue>) -> Vec<(&'static str, InfoValue)> {
    let refcount_bits = InfoValue::Int(u64::from(header.geometry().refcount_bits()));
    let compression = InfoValue::Text(header.compression().name().into());
    if header.version() < 3 {
        return vec![
            ("compat", InfoValue::Text("0.10".into())),
            ("compression-type", compression),
            ("refcount-bits", refcount_bits),
        ];
    }
    let mut facts = vec![
        ("compat", InfoValue::Text("1.1".into())),
        ("compression-type", compression),
        ("lazy-refcounts", InfoValue::Bool(header.compatible().contains(Compatible::LAZY_REFCOUNTS))),
    ];
    facts.extend(bitmaps.map(|bitmaps| ("bitmaps", bitmaps)));
    facts.extend([
        ("refcount-bits", refcount_bits),
        ("corrupt", InfoValue::Bool(header.incompatible().contains(Incompatible::CORRUPT))),
        ("extended-l2", InfoValue::Bool(header.geometry().extended_l2())),
    ]);
    // Ours alone, so it is not told of images that QEMU can tell of.
    facts.extend(header.is_fenced().then_some((MOVED_FACT, InfoValue::Bool(true))));
    facts
}
