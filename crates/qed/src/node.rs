//! The image as a node.

use bytes::{Bytes, BytesMut};
use infill_base::{
    Ctx, ErrorKind, Extents, Gather, IoError, IoResult, Limits, OpenError, WriteFlags, ZeroFlags,
};
use infill_node::{BackingRef, BackingSlot, Node, NodeInfo, Populated};
use infill_storage::StorageHandle;
use infill_storage::sync::Arc;

use crate::geometry::GuestCluster;
use crate::header::{FORMAT, Features};
use crate::image::{Image, OpenOptions};

/// An open QED image.
pub struct Qed(Arc<Image>);

impl Qed {
    /// Opens the image in `storage`. One that was not closed cleanly is repaired first, unless it is opened read-only.
    ///
    /// The backing file that the header names is not opened: [`NodeInfo::backing`] names it, and the caller puts it
    /// into [`Node::backing`] before any other use.
    pub async fn open(cx: &Ctx, storage: StorageHandle, options: OpenOptions) -> Result<Qed, OpenError> {
        Ok(Qed(Image::open(cx, storage, options).await?))
    }
}

impl Node for Qed {
    fn limits(&self) -> Limits {
        let image = &self.0;
        let storage = image.storage.limits();
        Limits {
            request_align: 1,
            preferred_bytes: image.unit() as u32,
            writable: !image.read_only,
            fast_zero: true,
            discard: image.does_discard(),
            ..storage
        }
    }

    fn len(&self) -> u64 {
        self.0.len()
    }

    fn info(&self) -> NodeInfo {
        let header = self.0.header();
        NodeInfo {
            driver: FORMAT,
            filename: self.0.storage.name(),
            backing: header.backing(),
            cluster_bytes: Some(self.0.unit()),
            read_only: self.0.read_only,
            dirty: header.features().contains(Features::NEED_CHECK),
            format_specific: Vec::new(),
        }
    }

    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        self.0.check_range(at, buf.len() as u64)?;
        if buf.is_empty() { Ok(buf) } else { self.0.read(cx, at, buf).await }
    }

    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        self.0.check_range(at, data.len() as u64)?;
        self.0.prepare(cx).await?;
        if !data.is_empty() {
            self.0.write(cx, at, data).await?;
        }
        if flags.contains(WriteFlags::FUA) {
            self.0.flush(cx).await
        } else {
            self.0.written_through(cx).await
        }
    }

    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.0.write_zeroes(cx, at, len, flags).await?;
        if flags.contains(ZeroFlags::FUA) { self.0.flush(cx).await } else { self.0.written_through(cx).await }
    }

    async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.0.discard(cx, at, len).await?;
        self.0.written_through(cx).await
    }

    async fn sync(&self, cx: &Ctx) -> IoResult<()> {
        self.0.flush(cx).await
    }

    async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        self.0.extents(cx, at, len).await
    }

    fn backing(&self) -> Option<&BackingSlot> {
        Some(&self.0.backing)
    }

    fn populate_unit(&self) -> u64 {
        self.0.unit()
    }

    async fn populate(&self, cx: &Ctx, at: u64, data: Bytes, generation: u64) -> IoResult<Populated> {
        let populated = self.0.populate(cx, at, &data, generation).await?;
        self.0.written_through(cx).await?;
        Ok(populated)
    }

    async fn populate_zero(&self, cx: &Ctx, at: u64, len: u64, generation: u64) -> IoResult<Populated> {
        let populated = self.0.populate_zero(cx, at, len, generation).await?;
        self.0.written_through(cx).await?;
        Ok(populated)
    }

    async fn set_backing_ref(&self, cx: &Ctx, backing: Option<BackingRef>) -> IoResult<()> {
        self.0.change_header(cx, move |header| header.with_backing(backing.as_ref())).await
    }

    async fn make_empty(&self, cx: &Ctx) -> IoResult<()> {
        self.0.make_empty(cx).await
    }

    async fn forget(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.0.forget(cx, at, len).await?;
        self.0.written_through(cx).await
    }

    /// Makes the disk longer. What is new reads as zeroes, also over a backing that is longer.
    async fn resize(&self, cx: &Ctx, len: u64) -> IoResult<()> {
        let image = &self.0;
        image.prepare(cx).await?;
        let _resizing = image.resizing.exclusive(0, 1).await;
        let old = image.len();
        let refused = |kind, why: String| Err(IoError::new(kind, why).in_node(image.storage.name()));
        if len < old {
            let why =
                format!("a QED image cannot be made shorter (it has {old} bytes, {len} were asked for)");
            return refused(ErrorKind::Unsupported, why);
        }
        let geometry = image.layout.geometry;
        if let Err(why) = geometry.check_size(len) {
            return refused(ErrorKind::InvalidInput, why);
        }
        if len == old {
            return Ok(());
        }
        // The part of the last cluster behind the old end may hold anything.
        let cluster_end = geometry.guest_offset(GuestCluster(geometry.clusters(old)));
        image.zero_parts(cx, old, cluster_end.min(len)).await?;
        if image.is_over_backing() {
            // Where the backing is not at hand, it may be as long as it likes.
            let below = image.backing.node().map_or(u64::MAX, |node| node.len());
            let last = geometry.clusters(len.min(below));
            let first = geometry.guest_cluster(cluster_end);
            image.change_clusters(cx, first, GuestCluster(last), crate::Cluster::Zero).await?;
        }
        image
            .change_header(cx, move |header| {
                // One that was dropped in the middle may have come to its end.
                Ok((header.with_size(len.max(header.size())), None))
            })
            .await
    }

    async fn close(&self, cx: &Ctx) -> IoResult<()> {
        self.0.close(cx).await
    }
}
