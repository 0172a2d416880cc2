//! An open image: its state, who may change what when, and the life cycle of the mark *need check*.
//!
//! # Two modes of writing
//! * **Ordered**: over a backing. An entry reaches the disk only when what it names is stable (see [`crate::rounds`]),
//!   so the image is consistent at any moment, and NEED_CHECK is not set.
//! * **Marked**: without a backing. NEED_CHECK is set and synced before the first write that changes a table; then
//!   payloads and entries are written in any order with one sync, for what a crash mixes up is mended by the repair at
//!   the next open, and reads as zeroes as it did before. The mark is cleared on close, and after
//!   [`NEED_CHECK_IDLE`] without such a write, once everything is synced.
//!
//! An image that was once ordered stays so until it is closed: then no entry needs to remember under which mode it
//! was set.
//!
//! # Who waits for whom
//! * Guest ranges ([`Image::ranges`]): a write in place holds its range shared, everything that changes an entry holds
//!   the whole clusters alone.
//! * The turn ([`Image::turn`]): whoever changes entries in marked mode holds it shared, whoever changes the header
//!   holds it alone. It is taken before a range. Both are states with waiters, not locks: I/O happens while they are
//!   held, and nobody asks a backing meanwhile.
//! * Rounds wait for neither.
//!
//! Whatever changes the header or the length of the file is a task of its own: it goes on when the request that began
//! it is dropped, and nothing is begun anew before it is over.

use std::time::Duration;

use bytes::Bytes;
use infill_base::{Ctx, DiscardMode, ErrorKind, IoError, IoResult, OpenError, range_end};
use infill_node::BackingSlot;
use infill_node::mapping::{ByteOrder, SLICE_BYTES, SliceCache, SliceLayout};
use infill_storage::journal::{Journaling, Ledger};
use infill_storage::rounds::Rounds;
use infill_storage::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use infill_storage::sync::{Arc, Mutex, Weak, lock};
use infill_storage::{Permits, RangeGuard, RangeLock, StorageHandle, rt, unaligned};
use rustc_hash::FxHashMap;

use crate::check::{check_header, refuse_unrepaired};
use crate::fault::Fault;
use crate::format::limits::METADATA_CACHE_BYTES_DEFAULT;
use crate::geometry::{HostOffset, Layout};
use crate::header::{Features, Header, VOLATILE_JOURNAL};
use crate::space::{Space, Taken};

/// So long nothing must have been allocated before the mark *need check* is cleared (QEMU's time, too).
pub const NEED_CHECK_IDLE: Duration = Duration::from_secs(5);

/// Bytes that copy-ups in flight hold for one image; more wait. A larger copy-up (one large cluster) goes alone.
pub const COPY_UP_BYTES_MAX: u64 = 64 << 20;

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Nothing is written, whatever happens.
    pub read_only: bool,
    /// What a guest's discard does, where there is no backing. (Over one it is always ignored: the format cannot say
    /// *absent*, look no further.)
    pub discard: DiscardMode,
    /// Memory for cached tables, in bytes.
    pub metadata_cache_bytes: u64,
    /// What becomes of changes that only memory has when the process dies.
    pub journal: Journaling,
    /// A mistake to make, for tests of the tests.
    #[cfg(feature = "planted-faults")]
    pub fault: Option<Fault>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            read_only: false,
            discard: DiscardMode::default(),
            metadata_cache_bytes: METADATA_CACHE_BYTES_DEFAULT,
            journal: Journaling::Off,
            #[cfg(feature = "planted-faults")]
            fault: None,
        }
    }
}

impl OpenOptions {
    /// Whether a mistake is planted.
    #[cfg(feature = "planted-faults")]
    fn planted(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    /// Never: there are no planted mistakes in this build.
    #[cfg(not(feature = "planted-faults"))]
    fn planted(&self, _: Fault) -> bool {
        false
    }
}

/// The shared state of an open image.
pub(crate) struct Image {
    pub storage: StorageHandle,
    pub layout: Layout,
    pub read_only: bool,
    options: OpenOptions,
    /// As it stands in the file. Changed under the turn.
    header: Mutex<Header>,
    /// Size of the disk in bytes.
    len: AtomicU64,
    pub backing: BackingSlot,
    pub space: Space,
    pub l1: SliceCache,
    pub l2: SliceCache,
    /// Every change of `l1` and `l2` goes through it.
    pub ledger: Ledger,
    pub rounds: Rounds,
    /// Guest bytes.
    pub ranges: RangeLock,
    /// L1 entries whose table is being made.
    pub making: RangeLock,
    /// Resizes, one after another.
    pub resizing: RangeLock,
    pub copy_ups: Permits,
    /// L2 tables that no L1 entry on the disk names yet; true once one in the cache does.
    pub new_tables: Mutex<FxHashMap<u64, bool>>,
    /// Clusters that entries in the cache do not name any more, but entries on the disk may.
    pub freed: Mutex<Vec<HostOffset>>,
    turn: RangeLock,
    /// The header has the autoclear features that we keep true, and the file has whole clusters.
    prepared: AtomicBool,
    pub ordered: AtomicBool,
    /// NEED_CHECK is set and stable.
    marked: AtomicBool,
    /// Counts what took leave to change entries in marked mode.
    activity: AtomicU64,
    poisoned: AtomicBool,
}

/// Leave to change entries; the mark is not cleared while it lives.
pub(crate) struct Leave(#[expect(dead_code, reason = "held for its drop")] Option<RangeGuard>);

impl Image {
    pub(crate) async fn open(
        cx: &Ctx,
        storage: StorageHandle,
        mut options: OpenOptions,
    ) -> Result<Arc<Image>, OpenError> {
        let limits = storage.limits();
        if limits.request_align as usize > SLICE_BYTES {
            return Err(OpenError::Refused {
                why: format!(
                    "{} wants requests of {} bytes at least, a QED image at most {SLICE_BYTES}",
                    storage.name(),
                    limits.request_align
                ),
            });
        }
        let mut header = Header::read(cx, &storage).await?;
        let read_only = options.read_only || !limits.writable;
        options.read_only = read_only;
        let journal = std::mem::take(&mut options.journal);
        let bit = header.autoclear() & VOLATILE_JOURNAL != 0 || options.planted(Fault::ReplayedUnasked);
        if let Some(found) = journal.pending(&storage.name(), read_only, bit)? {
            // Before any repair: that would take what only the journal names for leaked.
            let image = Image::build(storage.clone(), header.clone(), &options, Journaling::Off);
            image.replay(cx, found).await?;
            journal.replayed();
        }
        let journal = if read_only { Journaling::Off } else { journal };
        if !read_only && header.features().contains(Features::NEED_CHECK) {
            let report = check_header(cx, &storage, &header, infill_node::Repair::All).await?;
            refuse_unrepaired(&report)?;
            tracing::info!(image = storage.name(), ?report, "was not closed cleanly and is repaired");
            header = Header::read(cx, &storage).await?;
        }
        Ok(Image::build(storage, header, &options, journal))
    }

    /// What is in memory of an image whose header has passed.
    fn build(
        storage: StorageHandle,
        header: Header,
        options: &OpenOptions,
        journal: Journaling,
    ) -> Arc<Image> {
        let layout = header.layout();
        let slices = SliceLayout { slice_bytes: SLICE_BYTES, entry_words: 1, order: ByteOrder::Little };
        // One L1 slice stands for 512 L2 tables: an eighth for them is plenty.
        let l1_bytes = (options.metadata_cache_bytes / 8).min(layout.geometry.table_bytes());
        Arc::new(Image {
            layout,
            read_only: options.read_only,
            len: AtomicU64::new(header.size()),
            backing: BackingSlot::new(None),
            space: Space::new(layout.geometry, storage.len(), header.size()),
            l1: SliceCache::new(slices, l1_bytes),
            l2: SliceCache::new(slices, options.metadata_cache_bytes - l1_bytes),
            ledger: Ledger::new(journal),
            rounds: Rounds::new(),
            ranges: RangeLock::new(),
            making: RangeLock::new(),
            resizing: RangeLock::new(),
            copy_ups: Permits::new(COPY_UP_BYTES_MAX),
            new_tables: Mutex::default(),
            freed: Mutex::default(),
            turn: RangeLock::new(),
            prepared: AtomicBool::new(false),
            ordered: AtomicBool::new(header.backing().is_some()),
            marked: AtomicBool::new(false),
            activity: AtomicU64::new(0),
            poisoned: AtomicBool::new(false),
            header: Mutex::new(header),
            options: options.clone(),
            storage,
        })
    }

    /// Whether a mistake is planted.
    pub(crate) fn planted(&self, fault: Fault) -> bool {
        self.options.planted(fault)
    }

    /// The header as it stands in the file.
    pub(crate) fn header(&self) -> Header {
        lock(&self.header).clone()
    }

    /// Size of the disk in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Whether discards are done.
    pub(crate) fn does_discard(&self) -> bool {
        self.options.discard == DiscardMode::Unmap
    }

    /// Whether absent clusters may read as something else than zeroes: here, or for whoever opens the image with the
    /// backing that it names.
    pub(crate) fn is_over_backing(&self) -> bool {
        self.backing.is_some() || lock(&self.header).backing().is_some()
    }

    /// The end of a guest range.
    pub(crate) fn check_range(&self, at: u64, len: u64) -> IoResult<u64> {
        let size = self.len();
        range_end(at, len, size).ok_or_else(|| {
            IoError::new(ErrorKind::InvalidInput, format!("behind the end of the disk ({size} bytes)"))
                .at(at, len)
                .in_node(self.storage.name())
        })
    }

    /// Refuses a change where nothing may be changed.
    pub(crate) fn check_writable(&self) -> IoResult<()> {
        let refused = |kind, why: &str| Err(IoError::new(kind, why.to_owned()).in_node(self.storage.name()));
        if self.read_only {
            return refused(ErrorKind::NotPermitted, "the image was opened read-only");
        }
        if self.poisoned.load(Ordering::Acquire) {
            let why = "a sync failed earlier: what is stable is unknown, so nothing more is written; check the image";
            return refused(ErrorKind::Poisoned, why);
        }
        Ok(())
    }

    /// Syncs the storage. A failure is never retried.
    pub(crate) async fn sync_storage(&self, cx: &Ctx) -> IoResult<()> {
        let result = self.storage.sync(cx).await;
        if result.is_err() {
            self.poisoned.store(true, Ordering::Release);
            // What is recorded may name what is not there.
            self.ledger.void();
        }
        result
    }

    /// Everything acknowledged before the call is stable when it returns.
    pub(crate) async fn flush(self: &Arc<Image>, cx: &Ctx) -> IoResult<()> {
        if self.read_only {
            return Ok(());
        }
        let (image, cx) = (self.clone(), *cx);
        self.rounds.join(move || async move { image.round(&cx).await }).await
    }

    /// Writes changed tables before there are too many of them. To be called with nothing held.
    pub(crate) async fn relieve(self: &Arc<Image>, cx: &Ctx) -> IoResult<()> {
        let wanted = self.l2.wants_round() || self.l1.wants_round() || self.ledger.wants_round();
        if wanted { self.flush(cx).await } else { Ok(()) }
    }

    /// To be called before anything is acknowledged: what can be seen and has no record is stable afterwards.
    pub(crate) async fn written_through(self: &Arc<Image>, cx: &Ctx) -> IoResult<()> {
        let owes = self.ledger.owes() && !self.planted(Fault::OwedUnpaid);
        if owes { self.flush(cx).await } else { Ok(()) }
    }

    /// Whether entries are ordered behind what they name.
    pub(crate) fn is_ordered(&self) -> bool {
        if self.ordered.load(Ordering::Acquire) {
            return true;
        }
        let now = self.backing.is_some();
        if now {
            self.ordered.store(true, Ordering::Release);
        }
        now
    }

    /// Runs a change of header or length to its end, whether or not somebody waits for it.
    async fn to_its_end<F>(self: &Arc<Image>, change: impl FnOnce(Arc<Image>) -> F) -> IoResult<()>
    where
        F: Future<Output = IoResult<()>> + 'static,
    {
        rt::detached(change(self.clone())).await
    }

    /// To be called before anything is written to the image.
    pub(crate) async fn prepare(self: &Arc<Image>, cx: &Ctx) -> IoResult<()> {
        self.check_writable()?;
        if self.prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        let cx = *cx;
        self.to_its_end(|image| async move {
            let _turn = image.turn.exclusive(0, 1).await;
            if image.prepared.load(Ordering::Acquire) {
                return Ok(());
            }
            // What lies in a part of a cluster belongs to a write that was lost. Longer again, it must be zero.
            let partial = image.layout.geometry.in_cluster(image.storage.len()) != 0;
            if partial && !image.planted(Fault::PartialClusterKept) {
                image.storage.set_len(&cx, image.space.end()).await?;
            }
            let bits = image.begin_journal();
            if partial || image.header().autoclear() != bits {
                image.store(&cx, image.header().with_autoclear(bits)).await?;
            }
            image.prepared.store(true, Ordering::Release);
            Ok(())
        })
        .await
    }

    /// Puts `header` in place of the present one, and syncs. The caller holds the turn.
    pub(crate) async fn store(&self, cx: &Ctx, header: Header) -> IoResult<()> {
        header.store(cx, &self.storage).await?;
        self.sync_storage(cx).await?;
        *lock(&self.header) = header;
        Ok(())
    }

    /// Leave to change entries: in marked mode, NEED_CHECK is set and stable.
    pub(crate) async fn leave(self: &Arc<Image>, cx: &Ctx) -> IoResult<Leave> {
        loop {
            if self.is_ordered() {
                return Ok(Leave(None));
            }
            let shared = self.turn.shared(0, 1).await;
            if self.marked.load(Ordering::Acquire) {
                self.activity.fetch_add(1, Ordering::Relaxed);
                return Ok(Leave(Some(shared)));
            }
            drop(shared);
            let cx = *cx;
            self.to_its_end(|image| async move {
                let _turn = image.turn.exclusive(0, 1).await;
                if image.marked.load(Ordering::Acquire) { Ok(()) } else { image.mark(&cx).await }
            })
            .await?;
        }
    }

    /// Sets NEED_CHECK. The caller holds the turn.
    async fn mark(self: &Arc<Image>, cx: &Ctx) -> IoResult<()> {
        let header = self.header().with_need_check(true);
        if self.planted(Fault::UnsyncedNeedCheck) {
            header.store(cx, &self.storage).await?;
            *lock(&self.header) = header;
        } else if !self.planted(Fault::NoNeedCheck) {
            self.store(cx, header).await?;
        }
        self.marked.store(true, Ordering::Release);
        rt::spawn(unmark_when_idle(Arc::downgrade(self), *cx));
        Ok(())
    }

    /// Clears NEED_CHECK, if it is set, after everything is synced. The caller holds the turn.
    async fn unmark(self: &Arc<Image>, cx: &Ctx) -> IoResult<()> {
        let header = self.header();
        if header.features().contains(Features::NEED_CHECK) {
            if self.planted(Fault::EarlyClean) {
                header.with_need_check(false).store(cx, &self.storage).await?;
            }
            self.flush(cx).await?;
            self.store(cx, header.with_need_check(false)).await?;
        }
        self.marked.store(false, Ordering::Release);
        Ok(())
    }

    /// Takes clusters, contiguous and zero, and makes the file hold them.
    pub(crate) async fn take(self: &Arc<Image>, cx: &Ctx, clusters: u64) -> IoResult<Taken> {
        let taken = self.space.reserve(clusters)?;
        self.grow(cx, taken).await?;
        Ok(taken)
    }

    /// Makes the file hold what was taken.
    pub(crate) async fn grow(self: &Arc<Image>, cx: &Ctx, taken: Taken) -> IoResult<()> {
        if self.space.has_grown(taken) {
            return Ok(());
        }
        let cx = *cx;
        self.to_its_end(|image| async move { image.space.grow(&cx, &image.storage, taken).await }).await
    }

    /// Changes the header by `change`, which may ask for bytes to be stable before; all of it between two syncs.
    pub(crate) async fn change_header<C>(self: &Arc<Image>, cx: &Ctx, change: C) -> IoResult<()>
    where
        C: FnOnce(&Header) -> IoResult<(Header, Option<(u64, Bytes)>)> + 'static,
    {
        self.prepare(cx).await?;
        let cx = *cx;
        self.to_its_end(|image| async move {
            let _turn = image.turn.exclusive(0, 1).await;
            let (header, before) = change(&image.header())?;
            if let Some((at, bytes)) = before {
                unaligned::write(&cx, &image.storage, at, bytes).await?;
            }
            if !(image.planted(Fault::UnsyncedDropBacking) && header.backing().is_none()) {
                image.flush(&cx).await?;
            }
            if header.backing().is_some() {
                image.ordered.store(true, Ordering::Release);
            }
            let size = header.size();
            image.store(&cx, header).await?;
            image.len.store(size, Ordering::Release);
            Ok(())
        })
        .await
    }

    /// Makes everything stable, cuts off what is not used and clears the mark.
    pub(crate) async fn close(self: &Arc<Image>, cx: &Ctx) -> IoResult<()> {
        if self.read_only {
            return Ok(());
        }
        if !self.planted(Fault::EarlyClean) {
            self.flush(cx).await?;
        }
        let cx = *cx;
        self.to_its_end(|image| async move {
            let _turn = image.turn.exclusive(0, 1).await;
            image.space.trim(&cx, &image.storage).await?;
            image.unmark(&cx).await?;
            image.sync_storage(&cx).await?;
            image.end_journal(&cx).await
        })
        .await
    }
}

/// Clears NEED_CHECK once nothing was allocated for a while. Ends then, and when the image is gone.
async fn unmark_when_idle(image: Weak<Image>, cx: Ctx) {
    let activity = |image: &Image| image.activity.load(Ordering::Relaxed);
    let Some(mut seen) = image.upgrade().map(|image| activity(&image)) else { return };
    loop {
        rt::sleep(NEED_CHECK_IDLE).await;
        let Some(image) = image.upgrade() else { return };
        let now = activity(&image);
        // Somebody may be about to allocate although nobody has: then it is not idle.
        if now == seen
            && let Some(_turn) = image.turn.try_exclusive(0, 1)
        {
            let clean = !image.marked.load(Ordering::Acquire) || image.unmark(&cx).await.is_ok();
            if clean || image.check_writable().is_err() {
                return;
            }
        }
        seen = now;
    }
}
