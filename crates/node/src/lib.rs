//! The block graph: guest-visible bytes ([`Node`]), the edge to what lies below ([`BackingSlot`]), and the generic
//! library from which every format gets copy-on-read, populate, stream and extents.
//!
//! # The one rule (I3): the guest's write always wins
//! Filling an overlay is [`Node::populate`]: *write only what is still absent*. It never overwrites, so whatever
//! fills (copy-on-read, a stream) needs no further agreement with the guest:
//! * a populate fetches and writes its payload to where nothing points, then links with a compare against *absent*;
//! * it waits for a guest's write to the same range, never the reverse;
//! * it links only under the [generation](BackingSlot) of the edge that it fetched under (I3a).
//!
//! A driver overrides [`Node::populate`] with its own compare-and-link; without one it implements
//! [`generic::LocalWrite`] and calls [`generic::populate`].
#![forbid(unsafe_code)]

mod backing;
mod bitmaps;
mod blkdebug;
mod changes;
mod compress;
mod copy_on_read;
mod corruption;
mod dirty;
mod edge;
mod fetch;
mod filter;
mod gate;
pub mod generic;
mod graph;
mod handle;
mod keeper;
mod latency;
pub mod mapping;
mod memory;
mod meter;
mod preallocate;
mod raw;
mod snapshot;
mod stats;
mod storage;
mod throttle;

use std::future::Future;

use bytes::{Bytes, BytesMut};
use infill_base::{Ctx, ErrorKind, Extents, Gather, IoError, IoResult, Limits, WriteFlags, ZeroFlags};
use infill_storage::sync::Arc;

pub use backing::{BackingSlot, Below, COPY_ON_READ_BYTES_MAX, CopyOnRead, Fetched, LinkGuard};
pub use bitmaps::{
    BITMAP_GRANULARITY_MIN, BITMAP_NAME_BYTES_MAX, BITMAPS_MAX, Bitmap, BitmapError, BitmapUse,
};
pub use blkdebug::BlkdebugNode;
pub use changes::{Change, ChangeKind, Held, Kept, Watcher, Watching};
pub use compress::CompressNode;
pub use copy_on_read::CopyOnReadNode;
pub use dirty::DirtyMap;
pub use edge::{Edge, Port, Through};
pub use filter::Filter;
pub use graph::{Graph, GraphError};
pub use handle::{NodeHandle, WeakNode};
pub use keeper::KeptBits;
pub use latency::{LatencyBoard, LatencyKind};
pub use memory::MemoryOverlay;
pub use meter::{BUCKET_MICROS, CLASSES, Histogram, Meter};
pub use preallocate::PreallocateNode;
pub use raw::RawNode;
pub use snapshot::Snapshot;
pub use stats::{RequestCounts, RequestKind, Stats};
pub use storage::NodeStorage;
pub use throttle::{ThrottleGroup, ThrottleNode};

/// How a header names a backing file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingRef {
    /// The name, as it stands in the header.
    pub filename: String,
    /// The format, where the header says it.
    pub format: Option<String>,
}

/// A format's own fact for `info` (`format-specific` of `qemu-img info`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InfoValue {
    /// A flag.
    Bool(bool),
    /// A number.
    Int(u64),
    /// A word.
    Text(String),
    /// Several of a kind.
    List(Vec<InfoValue>),
    /// Facts by their names.
    Object(Vec<(&'static str, InfoValue)>),
}

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// Driver name, as QEMU spells it (`raw`, `qcow2`, `qed`, …).
    pub driver: &'static str,
    /// File name or URI of what it lies on.
    pub filename: String,
    /// Backing file as its header names it.
    pub backing: Option<BackingRef>,
    /// Cluster size in bytes, for formats that have clusters.
    pub cluster_bytes: Option<u64>,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Whether the image is marked as in need of a check or repair.
    pub dirty: bool,
    /// Facts of the format, keyed as in `qemu-img info --output=json`.
    pub format_specific: Vec<(&'static str, InfoValue)>,
}

/// Outcome of [`Node::populate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Populated {
    /// Bytes that were absent and are present now.
    pub linked: u64,
    /// Bytes that somebody else (a guest's write, another populate) had put there first.
    pub lost: u64,
    /// Bytes that were not linked because the edge's generation had changed: to be fetched again if still wanted.
    pub stale: u64,
}

/// What `check` found and did. Counts are clusters unless they say otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Metadata that contradicts itself.
    pub corruptions: u64,
    /// Clusters that nothing uses and that count as used.
    pub leaks: u64,
    /// Errors of the check itself (unreadable metadata).
    pub check_errors: u64,
    /// Corruptions that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were given back.
    pub leaks_fixed: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Of them, those with data in this image.
    pub allocated_clusters: u64,
    /// Of those, the compressed ones.
    pub compressed_clusters: u64,
    /// Of the allocated, those that do not follow their predecessor in the file.
    pub fragmented_clusters: u64,
    /// End of the last used cluster, in bytes.
    pub image_end_offset: u64,
    /// One line a finding, at most [`CheckReport::MAX_MESSAGES`].
    pub messages: Vec<String>,
}

impl CheckReport {
    /// How many messages are kept.
    pub const MAX_MESSAGES: usize = 1000;

    /// Adds a message while there is room.
    pub fn say(&mut self, message: impl Into<String>) {
        if self.messages.len() < Self::MAX_MESSAGES {
            self.messages.push(message.into());
        }
    }
}

/// What `check` may change. Ordered: a later one includes the ones before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Repair {
    /// Look only.
    #[default]
    Nothing,
    /// Give leaked clusters back (`-r leaks`).
    Leaks,
    /// Also mend what contradicts itself (`-r all`).
    All,
}

/// One element of the block graph: guest-visible bytes.
///
/// Ranges lie on the disk: `at + len <= len()`; a node answers others with `InvalidInput`. Any byte alignment is
/// taken unless [`Node::limits`] says otherwise. Futures need not be `Send`; the node is shared between reactors.
#[expect(clippy::len_without_is_empty, reason = "a disk is not a collection")]
pub trait Node: Send + Sync + 'static {
    /// What it wants of its callers.
    fn limits(&self) -> Limits;

    /// Size of the disk in bytes, now.
    fn len(&self) -> u64;

    /// What it is.
    fn info(&self) -> NodeInfo;

    /// Fills `buf` from guest byte `at`.
    fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> impl Future<Output = IoResult<BytesMut>>;

    /// Writes `data` from guest byte `at`.
    fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags)
    -> impl Future<Output = IoResult<()>>;

    /// Makes the range read as zeroes.
    fn write_zeroes(
        &self,
        cx: &Ctx,
        at: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> impl Future<Output = IoResult<()>>;

    /// The guest does not need the range any more. Over a backing it never becomes absent (I3a).
    fn discard(&self, cx: &Ctx, at: u64, len: u64) -> impl Future<Output = IoResult<()>>;

    /// Everything acknowledged before the call is on stable storage, with all metadata that finds it (P1).
    fn sync(&self, cx: &Ctx) -> impl Future<Output = IoResult<()>>;

    /// Of a node that is bytes of a storage: makes sure that nothing of the range is a dirty page any more. Says nothing
    /// about stability; elsewhere it does nothing.
    fn write_back(&self, cx: &Ctx, at: u64, len: u64) -> impl Future<Output = IoResult<()>> {
        let _ = (cx, at, len);
        async { Ok(()) }
    }

    /// Of a node that is bytes of a storage: reserves space for the range, which keeps what it reads as, so that a later
    /// write into it cannot meet `NoSpace`. `Unsupported` where it cannot promise that.
    fn allocate(&self, cx: &Ctx, at: u64, len: u64) -> impl Future<Output = IoResult<()>> {
        let _ = (cx, at, len);
        async { Err(IoError::new(ErrorKind::Unsupported, "this node cannot reserve space")) }
    }

    /// What this layer alone holds, from `at`, at most to `at + len`. May stop early, see [`Extents`].
    fn extents(&self, cx: &Ctx, at: u64, len: u64) -> impl Future<Output = IoResult<Extents>>;

    /// The edge to the backing, for a driver that can tell *absent* from *zero*. `None`: it cannot be an overlay.
    fn backing(&self) -> Option<&BackingSlot> {
        None
    }

    /// Of a filter: the node that it passes requests on to, now. A filter tells the extents of that node as they are, and is no
    /// overlay: whoever wants an overlay's edge asks [`NodeHandle::unfiltered`].
    fn filtered(&self) -> Option<NodeHandle> {
        None
    }

    /// Somebody holds the changes of this node from now on, or no more (holds are counted): whoever delays requests on purpose
    /// lets them go on meanwhile.
    fn held(&self, begins: bool) {
        let _ = begins;
    }

    /// The smallest aligned piece that can become present on its own, in bytes: a (sub)cluster.
    fn populate_unit(&self) -> u64 {
        u64::from(self.limits().preferred_bytes)
    }

    /// Writes those bytes of `data` (guest byte `at`) that are still absent, under `generation` of the edge.
    ///
    /// The range is a multiple of [`Node::populate_unit`], but for the end of the disk. Volatile until a sync.
    /// For [`Class::Fill`](infill_base::Class) the payload has been written back when it returns, so that what a fill
    /// leaves dirty, and a guest's FLUSH would have to wait for, is bounded by what the fill has in flight.
    fn populate(
        &self,
        cx: &Ctx,
        at: u64,
        data: Bytes,
        generation: u64,
    ) -> impl Future<Output = IoResult<Populated>> {
        let _ = (cx, at, data, generation);
        async { Err(unsupported(self.info().driver, "be an overlay: it cannot tell absent from zero")) }
    }

    /// Makes what is still absent of the range zero, as [`Node::populate`] would write zeroes, but without data.
    fn populate_zero(
        &self,
        cx: &Ctx,
        at: u64,
        len: u64,
        generation: u64,
    ) -> impl Future<Output = IoResult<Populated>> {
        async move { self.populate(cx, at, infill_base::zero_bytes(len as usize), generation).await }
    }

    /// Writes the name of the backing file into the header (`None`: no backing any more), with a sync before and
    /// after (P4). Does not touch the edge in the graph: see [`BackingSlot::replace`].
    fn set_backing_ref(&self, cx: &Ctx, backing: Option<BackingRef>) -> impl Future<Output = IoResult<()>> {
        let _ = (cx, backing);
        async { Err(unsupported(self.info().driver, "name a backing file")) }
    }

    /// Marks the image as one that another host owns, so that no program starts the disk from it, or takes the mark away.
    /// Stable when it returns, and may be repeated. Not a change of the disk: it may be called while changes are held, and
    /// reads go on. An image that is marked opens read-only only, and only where that is asked for.
    fn set_fence(&self, cx: &Ctx, fenced: bool) -> impl Future<Output = IoResult<()>> {
        let _ = (cx, fenced);
        async { Err(unsupported(self.info().driver, "be marked as moved to another host")) }
    }

    /// Makes everything in this layer absent, so that all shows through, and that stable. For the end of a commit: the caller
    /// has raised the edge's generation, holds all changes, and what lies below reads the same at every moment of it.
    fn make_empty(&self, cx: &Ctx) -> impl Future<Output = IoResult<()>> {
        let _ = cx;
        async { Err(unsupported(self.info().driver, "be emptied")) }
    }

    /// Makes a range absent again, so that what lies below shows through: what was copied from a source that has changed since.
    /// The handle has seen to it that the range is whole [units](Node::populate_unit) (or ends with the disk), and has begun a
    /// new generation, so that nothing is linked that was fetched before. No change of the disk for those who watch it: what the
    /// range reads as afterwards is its caller's business, and nothing of it is being written meanwhile. Volatile until a sync:
    /// after a crash each unit is there or absent.
    fn forget(&self, cx: &Ctx, at: u64, len: u64) -> impl Future<Output = IoResult<()>> {
        let _ = (cx, at, len);
        async { Err(unsupported(self.info().driver, "make a range absent again")) }
    }

    /// Whether what is discarded gives its space back (`discard: unmap`), also where a format lies on the node's storage.
    fn gives_space_back(&self) -> bool {
        true
    }

    /// Whether the image can keep snapshots of its disk in itself.
    fn keeps_snapshots(&self) -> bool {
        false
    }

    /// The snapshots that the image keeps, the oldest first.
    fn snapshots(&self) -> Vec<Snapshot> {
        Vec::new()
    }

    /// Makes a snapshot of the disk as it is, stable when this returns; of `wanted` the name and the times count. The caller
    /// holds all changes.
    fn create_snapshot(&self, cx: &Ctx, wanted: Snapshot) -> impl Future<Output = IoResult<Snapshot>> {
        let _ = (cx, wanted);
        async { Err(unsupported(self.info().driver, "keep snapshots")) }
    }

    /// Deletes the first snapshot that has this id and this name, where they are given. `None`: there is none. The caller holds
    /// all changes.
    fn delete_snapshot(
        &self,
        cx: &Ctx,
        id: Option<&str>,
        name: Option<&str>,
    ) -> impl Future<Output = IoResult<Option<Snapshot>>> {
        let _ = (cx, id, name);
        async { Err(unsupported(self.info().driver, "keep snapshots")) }
    }

    /// Makes the disk what it was at the first snapshot of this id, or else of this name. `None`: there is none. Nobody uses the
    /// disk meanwhile.
    fn apply_snapshot(&self, cx: &Ctx, which: &str) -> impl Future<Output = IoResult<Option<Snapshot>>> {
        let _ = (cx, which);
        async { Err(unsupported(self.info().driver, "keep snapshots")) }
    }

    /// Shows the disk as it was at the first snapshot of this id, this name, or both, in the size that it has now. `None`: there is
    /// none. The image is open read-only, and nobody uses the disk yet.
    fn load_snapshot(
        &self,
        cx: &Ctx,
        id: Option<&str>,
        name: Option<&str>,
    ) -> impl Future<Output = IoResult<Option<Snapshot>>> {
        let _ = (cx, id, name);
        async { Err(unsupported(self.info().driver, "show an internal snapshot")) }
    }

    /// The dirty bitmaps that the image keeps, as they were found at open. Asked once, by the handle, which shows them and
    /// has them record.
    fn stored_bitmaps(&self) -> Vec<Bitmap> {
        Vec::new()
    }

    /// Refuses a bitmap that the image could not keep, in QEMU's words (for the node called `node`).
    fn check_persistent(&self, node: &str, name: &str, granularity: u64) -> IoResult<()> {
        let _ = (name, granularity);
        let why = format!("Can't store persistent bitmaps to {node}: Operation not supported");
        Err(IoError::new(ErrorKind::Unsupported, why))
    }

    /// The image says, stable when this returns, that what it holds of its bitmaps may be out of date, until they are stored
    /// again. The driver does so by itself before a change of the disk; whoever changes a bitmap otherwise awaits this.
    fn outdate_bitmaps(&self, cx: &Ctx) -> impl Future<Output = IoResult<()>> {
        let _ = cx;
        async { Ok(()) }
    }

    /// Stores these bitmaps in the image, and says that they are up to date. Nothing changes the disk from now on until the
    /// node is closed.
    fn store_bitmaps(&self, cx: &Ctx, bitmaps: Vec<Arc<Bitmap>>) -> impl Future<Output = IoResult<()>> {
        let _ = (cx, bitmaps);
        async { Err(unsupported(self.info().driver, "keep dirty bitmaps")) }
    }

    /// Takes the bitmap of that name out of the image, if it is there.
    fn remove_stored_bitmap(&self, cx: &Ctx, name: &str) -> impl Future<Output = IoResult<()>> {
        let _ = (cx, name);
        async { Ok(()) }
    }

    /// Changes the size of the disk. What is new reads as zeroes.
    fn resize(&self, cx: &Ctx, len: u64) -> impl Future<Output = IoResult<()>> {
        let _ = (cx, len);
        async { Err(unsupported(self.info().driver, "be resized")) }
    }

    /// Syncs, gives reserved space back and marks the image as closed cleanly. Nothing is asked of it afterwards.
    fn close(&self, cx: &Ctx) -> impl Future<Output = IoResult<()>> {
        async move { if self.info().read_only { Ok(()) } else { self.sync(cx).await } }
    }
}

fn unsupported(driver: &str, what: &str) -> IoError {
    IoError::new(ErrorKind::Unsupported, format!("a {driver} node cannot {what}"))
}
