//! The object-safe twin of [`Node`], the handle that everybody holds, and a node seen as a storage.

use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Weak};

use bytes::{Bytes, BytesMut};
use futures_util::future::LocalBoxFuture;
use infill_base::{
    Ctx, DetectZeroes, ErrorKind, Extents, Gather, IoError, IoResult, Limits, WriteFlags, ZeroFlags,
    range_end,
};
use infill_storage::{StorageHandle, rt};

use crate::bitmaps::{Bitmap, Bitmaps};
use crate::changes::{self, Change, ChangeKind, Changes, Held, InFlight, Watcher, Watching};
use crate::corruption::Corruption;
use crate::fetch::FetchTable;
use crate::gate::NodeGate;
use crate::latency::{LatencyBoard, LatencyKind};
use crate::meter::Meter;
use crate::stats::{RequestKind, Stats};
use crate::{BackingRef, BackingSlot, Node, NodeInfo, Populated, Snapshot};

type Answer<'a, T> = LocalBoxFuture<'a, IoResult<T>>;

trait DynNode: Send + Sync {
    fn limits(&self) -> Limits;
    fn len(&self) -> u64;
    fn info(&self) -> NodeInfo;
    fn backing(&self) -> Option<&BackingSlot>;
    fn filtered(&self) -> Option<NodeHandle>;
    fn held(&self, begins: bool);
    fn populate_unit(&self) -> u64;
    fn read<'a>(&'a self, cx: &'a Ctx, at: u64, buf: BytesMut) -> Answer<'a, BytesMut>;
    fn write<'a>(&'a self, cx: &'a Ctx, at: u64, data: Gather, flags: WriteFlags) -> Answer<'a, ()>;
    fn write_zeroes<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64, flags: ZeroFlags) -> Answer<'a, ()>;
    fn discard<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> Answer<'a, ()>;
    fn sync<'a>(&'a self, cx: &'a Ctx) -> Answer<'a, ()>;
    fn write_back<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> Answer<'a, ()>;
    fn allocate<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> Answer<'a, ()>;
    fn extents<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> Answer<'a, Extents>;
    fn populate<'a>(&'a self, cx: &'a Ctx, at: u64, data: Bytes, generation: u64) -> Answer<'a, Populated>;
    fn populate_zero<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64, generation: u64) -> Answer<'a, Populated>;
    fn set_backing_ref<'a>(&'a self, cx: &'a Ctx, backing: Option<BackingRef>) -> Answer<'a, ()>;
    fn set_fence<'a>(&'a self, cx: &'a Ctx, fenced: bool) -> Answer<'a, ()>;
    fn make_empty<'a>(&'a self, cx: &'a Ctx) -> Answer<'a, ()>;
    fn forget<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> Answer<'a, ()>;
    fn gives_space_back(&self) -> bool;
    fn keeps_snapshots(&self) -> bool;
    fn snapshots(&self) -> Vec<Snapshot>;
    fn create_snapshot<'a>(&'a self, cx: &'a Ctx, wanted: Snapshot) -> Answer<'a, Snapshot>;
    fn delete_snapshot<'a>(
        &'a self,
        cx: &'a Ctx,
        id: Option<&'a str>,
        name: Option<&'a str>,
    ) -> Answer<'a, Option<Snapshot>>;
    fn apply_snapshot<'a>(&'a self, cx: &'a Ctx, which: &'a str) -> Answer<'a, Option<Snapshot>>;
    fn load_snapshot<'a>(
        &'a self,
        cx: &'a Ctx,
        id: Option<&'a str>,
        name: Option<&'a str>,
    ) -> Answer<'a, Option<Snapshot>>;
    fn check_persistent(&self, node: &str, name: &str, granularity: u64) -> IoResult<()>;
    fn outdate_bitmaps<'a>(&'a self, cx: &'a Ctx) -> Answer<'a, ()>;
    fn store_bitmaps<'a>(&'a self, cx: &'a Ctx, bitmaps: Vec<Arc<Bitmap>>) -> Answer<'a, ()>;
    fn remove_stored_bitmap<'a>(&'a self, cx: &'a Ctx, name: &'a str) -> Answer<'a, ()>;
    fn resize<'a>(&'a self, cx: &'a Ctx, len: u64) -> Answer<'a, ()>;
    fn close<'a>(&'a self, cx: &'a Ctx) -> Answer<'a, ()>;
}

impl<N: Node> DynNode for N {
    fn limits(&self) -> Limits {
        Node::limits(self)
    }
    fn len(&self) -> u64 {
        Node::len(self)
    }
    fn info(&self) -> NodeInfo {
        Node::info(self)
    }
    fn backing(&self) -> Option<&BackingSlot> {
        Node::backing(self)
    }
    fn filtered(&self) -> Option<NodeHandle> {
        Node::filtered(self)
    }
    fn held(&self, begins: bool) {
        Node::held(self, begins);
    }
    fn populate_unit(&self) -> u64 {
        Node::populate_unit(self)
    }
    fn read<'a>(&'a self, cx: &'a Ctx, at: u64, buf: BytesMut) -> Answer<'a, BytesMut> {
        Box::pin(Node::read(self, cx, at, buf))
    }
    fn write<'a>(&'a self, cx: &'a Ctx, at: u64, data: Gather, flags: WriteFlags) -> Answer<'a, ()> {
        Box::pin(Node::write(self, cx, at, data, flags))
    }
    fn write_zeroes<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64, flags: ZeroFlags) -> Answer<'a, ()> {
        Box::pin(Node::write_zeroes(self, cx, at, len, flags))
    }
    fn discard<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> Answer<'a, ()> {
        Box::pin(Node::discard(self, cx, at, len))
    }
    fn sync<'a>(&'a self, cx: &'a Ctx) -> Answer<'a, ()> {
        Box::pin(Node::sync(self, cx))
    }
    fn write_back<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> Answer<'a, ()> {
        Box::pin(Node::write_back(self, cx, at, len))
    }
    fn allocate<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> Answer<'a, ()> {
        Box::pin(Node::allocate(self, cx, at, len))
    }
    fn extents<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> Answer<'a, Extents> {
        Box::pin(Node::extents(self, cx, at, len))
    }
    fn populate<'a>(&'a self, cx: &'a Ctx, at: u64, data: Bytes, generation: u64) -> Answer<'a, Populated> {
        Box::pin(Node::populate(self, cx, at, data, generation))
    }
    fn populate_zero<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64, generation: u64) -> Answer<'a, Populated> {
        Box::pin(Node::populate_zero(self, cx, at, len, generation))
    }
    fn set_backing_ref<'a>(&'a self, cx: &'a Ctx, backing: Option<BackingRef>) -> Answer<'a, ()> {
        Box::pin(Node::set_backing_ref(self, cx, backing))
    }
    fn set_fence<'a>(&'a self, cx: &'a Ctx, fenced: bool) -> Answer<'a, ()> {
        Box::pin(Node::set_fence(self, cx, fenced))
    }
    fn make_empty<'a>(&'a self, cx: &'a Ctx) -> Answer<'a, ()> {
        Box::pin(Node::make_empty(self, cx))
    }
    fn forget<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> Answer<'a, ()> {
        Box::pin(Node::forget(self, cx, at, len))
    }
    fn gives_space_back(&self) -> bool {
        Node::gives_space_back(self)
    }
    fn keeps_snapshots(&self) -> bool {
        Node::keeps_snapshots(self)
    }
    fn snapshots(&self) -> Vec<Snapshot> {
        Node::snapshots(self)
    }
    fn create_snapshot<'a>(&'a self, cx: &'a Ctx, wanted: Snapshot) -> Answer<'a, Snapshot> {
        Box::pin(Node::create_snapshot(self, cx, wanted))
    }
    fn delete_snapshot<'a>(
        &'a self,
        cx: &'a Ctx,
        id: Option<&'a str>,
        name: Option<&'a str>,
    ) -> Answer<'a, Option<Snapshot>> {
        Box::pin(Node::delete_snapshot(self, cx, id, name))
    }
    fn apply_snapshot<'a>(&'a self, cx: &'a Ctx, which: &'a str) -> Answer<'a, Option<Snapshot>> {
        Box::pin(Node::apply_snapshot(self, cx, which))
    }
    fn load_snapshot<'a>(
        &'a self,
        cx: &'a Ctx,
        id: Option<&'a str>,
        name: Option<&'a str>,
    ) -> Answer<'a, Option<Snapshot>> {
        Box::pin(Node::load_snapshot(self, cx, id, name))
    }
    fn check_persistent(&self, node: &str, name: &str, granularity: u64) -> IoResult<()> {
        Node::check_persistent(self, node, name, granularity)
    }
    fn outdate_bitmaps<'a>(&'a self, cx: &'a Ctx) -> Answer<'a, ()> {
        Box::pin(Node::outdate_bitmaps(self, cx))
    }
    fn store_bitmaps<'a>(&'a self, cx: &'a Ctx, bitmaps: Vec<Arc<Bitmap>>) -> Answer<'a, ()> {
        Box::pin(Node::store_bitmaps(self, cx, bitmaps))
    }
    fn remove_stored_bitmap<'a>(&'a self, cx: &'a Ctx, name: &'a str) -> Answer<'a, ()> {
        Box::pin(Node::remove_stored_bitmap(self, cx, name))
    }
    fn resize<'a>(&'a self, cx: &'a Ctx, len: u64) -> Answer<'a, ()> {
        Box::pin(Node::resize(self, cx, len))
    }
    fn close<'a>(&'a self, cx: &'a Ctx) -> Answer<'a, ()> {
        Box::pin(Node::close(self, cx))
    }
}

struct Cell<D: ?Sized> {
    /// One single-flight table for everybody who has this node as backing (I4).
    fetches: FetchTable,
    latency: LatencyBoard,
    stats: Stats,
    changes: Changes,
    bitmaps: Bitmaps,
    corruption: Corruption,
    detect_zeroes: AtomicU8,
    inactive: AtomicBool,
    /// It is open read-only as long as it is inactive, and writable after that.
    rests_writable: AtomicBool,
    driver: D,
}

/// A shared node of any driver. Cloning shares it.
#[derive(Clone)]
pub struct NodeHandle(Arc<Cell<dyn DynNode>>);

/// A reference that does not keep the node.
#[derive(Clone)]
pub struct WeakNode(Weak<Cell<dyn DynNode>>);

impl WeakNode {
    /// The node, while somebody holds it.
    pub fn upgrade(&self) -> Option<NodeHandle> {
        self.0.upgrade().map(NodeHandle)
    }
}

impl std::fmt::Debug for NodeHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let info = self.info();
        write!(f, "NodeHandle({} {})", info.driver, info.filename)
    }
}

impl NodeHandle {
    /// Shares `node`. The bitmaps that its image keeps record from here on.
    pub fn new(node: impl Node) -> NodeHandle {
        let stored = node.stored_bitmaps();
        let handle = NodeHandle(Arc::new(Cell {
            fetches: FetchTable::default(),
            latency: LatencyBoard::default(),
            stats: Stats::default(),
            changes: Changes::default(),
            bitmaps: Bitmaps::default(),
            corruption: Corruption::default(),
            detect_zeroes: AtomicU8::new(0),
            inactive: AtomicBool::new(false),
            rests_writable: AtomicBool::new(false),
            driver: node,
        }));
        handle.show_stored(stored);
        handle
    }

    /// A reference that does not keep it.
    pub fn downgrade(&self) -> WeakNode {
        WeakNode(Arc::downgrade(&self.0))
    }

    /// Whether both are the same node.
    pub fn is_same(&self, other: &NodeHandle) -> bool {
        std::ptr::addr_eq(Arc::as_ptr(&self.0), Arc::as_ptr(&other.0))
    }

    pub(crate) fn fetches(&self) -> &FetchTable {
        &self.0.fetches
    }

    /// Where latencies of this node's guest requests are noted while a job listens.
    pub fn latency(&self) -> &LatencyBoard {
        &self.0.latency
    }

    /// What is counted of its requests.
    pub fn stats(&self) -> &Stats {
        &self.0.stats
    }

    fn meter(&self) -> &Meter {
        self.0.latency.meter()
    }

    /// See [`Node::limits`]. An inactive node tells what it takes when it is active.
    pub fn limits(&self) -> Limits {
        let limits = self.0.driver.limits();
        Limits { writable: limits.writable || self.0.rests_writable.load(Ordering::Relaxed), ..limits }
    }

    /// See [`Node::len`].
    #[expect(clippy::len_without_is_empty, reason = "a disk is not a collection")]
    pub fn len(&self) -> u64 {
        self.0.driver.len()
    }

    /// See [`Node::info`].
    pub fn info(&self) -> NodeInfo {
        self.0.driver.info()
    }

    /// See [`Node::backing`].
    pub fn backing(&self) -> Option<&BackingSlot> {
        self.0.driver.backing()
    }

    /// See [`Node::filtered`].
    pub fn filtered(&self) -> Option<NodeHandle> {
        self.0.driver.filtered()
    }

    /// The node itself, or the first one below it that is no filter.
    pub fn unfiltered(&self) -> NodeHandle {
        let mut node = self.clone();
        while let Some(below) = node.filtered() {
            node = below;
        }
        node
    }

    /// The next layer of the chain: what backs this node, or the one that it filters.
    pub fn layer_below(&self) -> Option<NodeHandle> {
        self.unfiltered().backing().and_then(BackingSlot::node).map(|below| below.unfiltered())
    }

    pub(crate) fn tell_held(&self, begins: bool) {
        self.0.driver.held(begins);
    }

    /// It takes changes again.
    pub fn set_active(&self) {
        self.0.rests_writable.store(false, Ordering::Relaxed);
        self.0.inactive.store(false, Ordering::Release);
    }

    /// It takes no changes, which are refused with `NotPermitted`, until it is active; then it takes some if it is `writable`. To be
    /// called while it is held, or before anybody has it.
    pub fn set_inactive(&self, writable: bool) {
        self.0.rests_writable.store(writable, Ordering::Relaxed);
        self.0.inactive.store(true, Ordering::Release);
    }

    fn check_active(&self) -> IoResult<()> {
        match self.0.inactive.load(Ordering::Acquire) {
            false => Ok(()),
            true => {
                let why = "the node is inactive: make it active (blockdev-set-active) before it is changed";
                Err(IoError::new(ErrorKind::NotPermitted, why).in_node(self.info().filename))
            }
        }
    }

    /// What becomes of writes of zeroes from now on.
    pub fn set_detect_zeroes(&self, mode: DetectZeroes) {
        self.0.detect_zeroes.store(mode as u8, Ordering::Relaxed);
    }

    /// What becomes of writes of zeroes.
    pub fn detect_zeroes(&self) -> DetectZeroes {
        match self.0.detect_zeroes.load(Ordering::Relaxed) {
            0 => DetectZeroes::Off,
            1 => DetectZeroes::On,
            _ => DetectZeroes::Unmap,
        }
    }

    /// How the payload of a write is written as zeroes, where it is zero and that is to be seen.
    pub(crate) fn as_zeroes(&self, data: &Gather, flags: WriteFlags) -> Option<ZeroFlags> {
        let mode = self.detect_zeroes();
        if mode == DetectZeroes::Off || data.is_empty() || !data.is_zero() {
            return None;
        }
        let mut zero = ZeroFlags::empty();
        zero.set(ZeroFlags::FUA, flags.contains(WriteFlags::FUA));
        zero.set(ZeroFlags::MAY_UNMAP, mode == DetectZeroes::Unmap);
        Some(zero)
    }

    /// `storage`, on which this node lies, for a format that lies on it too: its changes are this node's.
    pub fn on_storage(&self, storage: StorageHandle) -> StorageHandle {
        storage.behind(NodeGate(self.clone()))
    }

    /// See [`Node::populate_unit`].
    pub fn populate_unit(&self) -> u64 {
        self.0.driver.populate_unit()
    }

    /// See [`Node::read`].
    pub async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        let len = buf.len() as u64;
        let request = Request { kind: RequestKind::Read, latency: Some(LatencyKind::Read), at, len };
        let buf = self.timed(cx, request, self.0.driver.read(cx, at, buf)).await?;
        self.meter().has_read(cx.class, len);
        Ok(buf)
    }

    /// Reads `len` bytes into a new buffer.
    pub async fn read_vec(&self, cx: &Ctx, at: u64, len: usize) -> IoResult<BytesMut> {
        let buf = infill_base::aligned_buffer(len, self.limits().memory_align as usize);
        self.read(cx, at, buf).await
    }

    /// See [`Node::write`].
    pub async fn write(&self, cx: &Ctx, at: u64, data: impl Into<Gather>, flags: WriteFlags) -> IoResult<()> {
        self.enter().await.write(cx, at, data.into(), flags).await
    }

    /// See [`Node::write_zeroes`].
    pub async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.enter().await.write_zeroes(cx, at, len, flags).await
    }

    /// See [`Node::discard`].
    pub async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.enter().await.discard(cx, at, len).await
    }

    /// Counts a change in, once nobody holds the node.
    pub(crate) async fn enter(&self) -> Entered<'_> {
        Entered { node: self, _in_flight: self.0.changes.enter().await }
    }

    pub(crate) fn changes(&self) -> &Changes {
        &self.0.changes
    }

    pub(crate) fn bitmap_list(&self) -> &Bitmaps {
        &self.0.bitmaps
    }

    /// Keeps new changes (writes, zeroes, discards, resizes) out and waits until none is in flight. They wait until the
    /// [`Held`] is dropped. Reads and populates go on. A change may wait for a source that is away, so
    /// callers wait with a limit; giving up opens the node again.
    pub async fn hold_changes(&self) -> Held {
        changes::hold(self).await
    }

    /// Has `watcher` see every change that is not done when this returns. Holds changes for a moment, as
    /// [`NodeHandle::hold_changes`] does.
    pub async fn watch(&self, watcher: Arc<dyn Watcher>) -> Watching {
        self.hold_changes().await.watch(watcher)
    }

    /// Has `listener` told, once, when a request finds that this node's image contradicts itself (not one that lies below).
    pub fn on_corruption(&self, listener: impl Fn(&IoError) + Send + Sync + 'static) {
        self.0.corruption.listen(listener);
    }

    /// See [`Node::sync`].
    pub async fn sync(&self, cx: &Ctx) -> IoResult<()> {
        let request = Request { kind: RequestKind::Flush, latency: Some(LatencyKind::Sync), at: 0, len: 0 };
        self.timed(cx, request, self.0.driver.sync(cx)).await
    }

    /// See [`Node::write_back`].
    pub async fn write_back(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.0.driver.write_back(cx, at, len).await
    }

    /// See [`Node::allocate`].
    pub async fn allocate(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.0.driver.allocate(cx, at, len).await
    }

    /// See [`Node::extents`].
    pub async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        self.0.driver.extents(cx, at, len).await
    }

    /// See [`Node::populate`].
    pub async fn populate(&self, cx: &Ctx, at: u64, data: Bytes, generation: u64) -> IoResult<Populated> {
        let done = self.0.driver.populate(cx, at, data, generation).await?;
        self.meter().has_populated(done.linked);
        Ok(done)
    }

    /// See [`Node::populate_zero`].
    pub async fn populate_zero(&self, cx: &Ctx, at: u64, len: u64, generation: u64) -> IoResult<Populated> {
        self.0.driver.populate_zero(cx, at, len, generation).await
    }

    /// See [`Node::set_backing_ref`].
    pub async fn set_backing_ref(&self, cx: &Ctx, backing: Option<BackingRef>) -> IoResult<()> {
        self.0.driver.set_backing_ref(cx, backing).await
    }

    /// See [`Node::set_fence`].
    pub async fn set_fence(&self, cx: &Ctx, fenced: bool) -> IoResult<()> {
        self.0.driver.set_fence(cx, fenced).await
    }

    /// See [`Node::make_empty`].
    pub async fn make_empty(&self, cx: &Ctx) -> IoResult<()> {
        self.0.driver.make_empty(cx).await
    }

    /// See [`Node::forget`]. Begins a new generation of the edge, and so waits for local links, never for a fetch. A range that
    /// is not whole units is refused with `InvalidInput`.
    pub async fn forget(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        let Some(slot) = self.backing() else { return self.0.driver.forget(cx, at, len).await };
        let (unit, size) = (self.populate_unit(), self.len());
        let whole = |end: u64| at.is_multiple_of(unit) && (end.is_multiple_of(unit) || end == size);
        if range_end(at, len, size).is_none_or(|end| !whole(end)) {
            let why =
                format!("only whole units of {unit} bytes of the disk ({size} bytes) can be made absent");
            let error = IoError::new(ErrorKind::InvalidInput, why).at(at, len);
            return Err(error.in_node(self.info().filename));
        }
        slot.raise().await;
        self.0.driver.forget(cx, at, len).await
    }

    /// See [`Node::gives_space_back`].
    pub fn gives_space_back(&self) -> bool {
        self.0.driver.gives_space_back()
    }

    /// See [`Node::keeps_snapshots`].
    pub fn keeps_snapshots(&self) -> bool {
        self.0.driver.keeps_snapshots()
    }

    /// See [`Node::snapshots`].
    pub fn snapshots(&self) -> Vec<Snapshot> {
        self.0.driver.snapshots()
    }

    /// See [`Node::create_snapshot`].
    pub async fn create_snapshot(&self, cx: &Ctx, wanted: Snapshot) -> IoResult<Snapshot> {
        self.0.driver.create_snapshot(cx, wanted).await
    }

    /// See [`Node::delete_snapshot`].
    pub async fn delete_snapshot(
        &self,
        cx: &Ctx,
        id: Option<&str>,
        name: Option<&str>,
    ) -> IoResult<Option<Snapshot>> {
        self.0.driver.delete_snapshot(cx, id, name).await
    }

    /// See [`Node::apply_snapshot`].
    pub async fn apply_snapshot(&self, cx: &Ctx, which: &str) -> IoResult<Option<Snapshot>> {
        self.0.driver.apply_snapshot(cx, which).await
    }

    /// See [`Node::load_snapshot`].
    pub async fn load_snapshot(
        &self,
        cx: &Ctx,
        id: Option<&str>,
        name: Option<&str>,
    ) -> IoResult<Option<Snapshot>> {
        self.0.driver.load_snapshot(cx, id, name).await
    }

    /// See [`Node::resize`].
    pub async fn resize(&self, cx: &Ctx, len: u64) -> IoResult<()> {
        let _in_flight = self.0.changes.enter().await;
        self.check_active()?;
        self.0.driver.resize(cx, len).await?;
        self.tell_len(len);
        Ok(())
    }

    fn tell_len(&self, len: u64) {
        for (_, watcher) in self.0.changes.watchers().iter().flat_map(|list| list.iter()) {
            watcher.resized(len);
        }
    }

    /// See [`Node::check_persistent`].
    pub fn check_persistent(&self, node: &str, name: &str, granularity: u64) -> IoResult<()> {
        self.0.driver.check_persistent(node, name, granularity)
    }

    /// See [`Node::outdate_bitmaps`].
    pub async fn outdate_bitmaps(&self, cx: &Ctx) -> IoResult<()> {
        self.0.driver.outdate_bitmaps(cx).await
    }

    /// See [`Node::remove_stored_bitmap`].
    pub async fn remove_stored_bitmap(&self, cx: &Ctx, name: &str) -> IoResult<()> {
        self.0.driver.remove_stored_bitmap(cx, name).await
    }

    /// See [`Node::close`]. Bitmaps that are to be kept are stored first. Where that fails the image is closed all the same,
    /// and says that they are not up to date.
    pub async fn close(&self, cx: &Ctx) -> IoResult<()> {
        let kept = self.bitmaps_to_store();
        let stored = match kept.is_empty() {
            true => Ok(()),
            false => self.0.driver.store_bitmaps(cx, kept.clone()).await,
        };
        if stored.is_ok() {
            // Whoever opens the image next has them from there, and changes that this node does not see.
            kept.iter().for_each(|bitmap| bitmap.keep_no_longer());
        }
        let closed = self.0.driver.close(cx).await;
        stored.and(closed)
    }

    /// Waits for `answer`, counts the request, and notes how long a guest's took if somebody wants to know.
    async fn timed<T>(
        &self,
        cx: &Ctx,
        request: Request,
        answer: impl Future<Output = IoResult<T>>,
    ) -> IoResult<T> {
        let begin = rt::clock();
        let result = answer.await;
        let end = rt::clock();
        let took = end.saturating_sub(begin);
        self.0.stats.count(request.kind, request.at, request.len, took, result.as_ref().err());
        if let Err(error) = &result
            && error.kind() == ErrorKind::Corrupt
            && error.node() == Some(self.info().filename.as_str())
        {
            self.0.corruption.tell(error);
        }
        if let Some(kind) = request.latency
            && cx.class == infill_base::Class::Guest
            && self.0.latency.is_listening()
        {
            self.0.latency.record(kind, end, took);
        }
        result
    }
}

/// A request as it is counted.
#[derive(Clone, Copy)]
pub(crate) struct Request {
    kind: RequestKind,
    /// What its latency is noted as.
    latency: Option<LatencyKind>,
    at: u64,
    len: u64,
}

impl Request {
    fn write(at: u64, len: u64) -> Request {
        Request { kind: RequestKind::Write, latency: Some(LatencyKind::Write), at, len }
    }

    fn of(change: &Change) -> Request {
        let (at, len) = (change.at, change.len);
        match change.what {
            ChangeKind::Write(_) | ChangeKind::Zero { .. } => {
                Request { kind: RequestKind::Write, latency: None, at, len }
            }
            ChangeKind::Discard => Request { kind: RequestKind::Discard, latency: None, at, len },
        }
    }
}

/// A change that has counted itself in at its node.
pub(crate) struct Entered<'a> {
    node: &'a NodeHandle,
    _in_flight: InFlight<'a>,
}

impl Entered<'_> {
    pub(crate) async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        if let Some(flags) = self.node.as_zeroes(&data, flags) {
            return self.write_zeroes(cx, at, data.len() as u64, flags).await;
        }
        self.node.check_active()?;
        let (cell, len) = (&*self.node.0, data.len() as u64);
        let done = match cell.changes.watchers() {
            None => {
                self.node.timed(cx, Request::write(at, len), cell.driver.write(cx, at, data, flags)).await
            }
            Some(watchers) => {
                let change = Change { at, len, what: ChangeKind::Write(data.clone()) };
                let perform = changes::watched(watchers, cx, change, cell.driver.write(cx, at, data, flags));
                self.node.timed(cx, Request::write(at, len), perform).await
            }
        };
        self.written(done, len)
    }

    pub(crate) async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.node.check_active()?;
        let cell = &*self.node.0;
        let perform = cell.driver.write_zeroes(cx, at, len, flags);
        let done = match cell.changes.watchers() {
            None => self.node.timed(cx, Request::write(at, len), perform).await,
            Some(watchers) => {
                let what = ChangeKind::Zero { may_unmap: flags.contains(ZeroFlags::MAY_UNMAP) };
                let perform = changes::watched(watchers, cx, Change { at, len, what }, perform);
                self.node.timed(cx, Request::write(at, len), perform).await
            }
        };
        self.written(done, len)
    }

    fn written(&self, done: IoResult<()>, len: u64) -> IoResult<()> {
        if done.is_ok() {
            self.node.meter().has_written(len);
        }
        done
    }

    pub(crate) async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.node.check_active()?;
        let cell = &*self.node.0;
        let perform = cell.driver.discard(cx, at, len);
        let change = Change { at, len, what: ChangeKind::Discard };
        let request = Request::of(&change);
        let Some(watchers) = cell.changes.watchers() else {
            return self.node.timed(cx, request, perform).await;
        };
        self.node.timed(cx, request, changes::watched(watchers, cx, change, perform)).await
    }

    /// Makes a change that may end behind the node, which has `len` bytes, and makes it longer then.
    pub(crate) async fn beyond(
        &self,
        cx: &Ctx,
        len: u64,
        change: Change,
        perform: impl Future<Output = IoResult<()>>,
    ) -> IoResult<()> {
        let request = Request::of(&change);
        let Some(watchers) = self.node.0.changes.watchers() else {
            return self.node.timed(cx, request, perform).await;
        };
        let end = change.at.saturating_add(change.len);
        if end > len {
            // Before, so that there is room for what is noted of the change.
            self.tell_len(end);
        }
        self.node.timed(cx, request, changes::watched(watchers, cx, change, Box::pin(perform))).await
    }

    pub(crate) fn tell_len(&self, len: u64) {
        self.node.tell_len(len);
    }
}
