//! What an image has only while it is open for writing: refcounts, rounds, reserved clusters, guest ranges that are
//! being changed; and what every change needs: host clusters, L2 tables, the header.
//!
//! Who waits for whom: a guest range may wait for a table, for clusters, and so for a turn between two rounds. Rounds
//! and turns wait for I/O of their own alone. Nobody is in flight (`in_flight`) while waiting for any of these.

use std::time::Duration;

use bytes::BytesMut;
use infill_base::{Class, Ctx, ErrorKind, IoError, IoResult, ZeroFlags};
use infill_storage::rounds::{Rounds, Turn};
use infill_storage::sync::atomic::{AtomicBool, Ordering};
use infill_storage::sync::{Arc, Mutex, Weak, lock};
use infill_storage::{RangeLock, StorageHandle, rt};

use crate::entry::{L1Entry, L2Entry, L2TableRef, L2View, StandardCluster};
use crate::features::Autoclear;
use crate::geometry::{GuestCluster, HostOffset, L1Index};
use crate::header::{Header, HeaderChange};
use crate::image::Image;
use crate::metaio;
use crate::pack::Packer;
use crate::refcount::{HostRun, Refcounts};
use crate::runs::Runs;
use crate::write_back::Freed;

/// How long nobody takes of what is reserved before it is given back: between this and twice this.
const RUNS_IDLE: Duration = Duration::from_secs(5);

pub(crate) struct Writer {
    pub(crate) refcounts: Refcounts,
    pub(crate) rounds: Rounds,
    /// Guest clusters whose entries are being changed.
    pub(crate) ranges: RangeLock,
    /// L1 entries whose table is being made.
    tables: RangeLock,
    /// Runs that are being reserved, by number: whoever needs one meanwhile waits for it.
    refills: RangeLock,
    pub(crate) runs: Runs,
    /// Somebody looks now and then whether what is reserved is still needed.
    runs_watched: AtomicBool,
    /// Unmapped since the last round began.
    pub(crate) freed: Mutex<Vec<Freed>>,
    /// Held, shared, while space is given back.
    pub(crate) freeing: RangeLock,
    /// Where compressed clusters are put. Whoever holds it waits for clusters and refcounts, and for nobody who holds a range.
    pub(crate) packer: async_lock::Mutex<Packer>,
    /// Bitmaps are being stored.
    pub(crate) bitmaps: RangeLock,
    /// Held, shared, by whoever changes the map, from before it looks up a table to change; alone by a snapshot, after which
    /// the tables are other ones. Taken before any guest range.
    pub(crate) steady: RangeLock,
    /// The image no longer claims what we do not keep up.
    prepared: AtomicBool,
    poisoned: AtomicBool,
}

impl Writer {
    pub(crate) fn new(storage: StorageHandle, header: &Header) -> Writer {
        Writer {
            refcounts: Refcounts::new(storage, header),
            rounds: Rounds::new(),
            ranges: RangeLock::new(),
            tables: RangeLock::new(),
            refills: RangeLock::new(),
            runs: Runs::new(),
            runs_watched: AtomicBool::new(false),
            freed: Mutex::default(),
            freeing: RangeLock::new(),
            packer: async_lock::Mutex::default(),
            bitmaps: RangeLock::new(),
            steady: RangeLock::new(),
            prepared: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
        }
    }

    /// Nothing is written from now on: what is stable is unknown.
    pub(crate) fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
    }
}

impl Image {
    /// What writes need; refused where the image is read-only or a sync has failed.
    pub(crate) fn writer(&self) -> IoResult<&Writer> {
        let Some(writer) = &self.writer else {
            let why = "the image is open read-only";
            return Err(IoError::new(ErrorKind::NotPermitted, why).in_node(self.storage.name()));
        };
        if writer.poisoned.load(Ordering::Acquire) {
            let why = "a sync of this image failed earlier: what is stable is unknown, nothing more is written; open it \
                       again and check it";
            return Err(IoError::new(ErrorKind::Poisoned, why).in_node(self.storage.name()));
        }
        Ok(writer)
    }

    /// Syncs the storage. A failure poisons the image.
    pub(crate) async fn sync_storage(&self) -> IoResult<()> {
        let writer = self.writer()?;
        self.storage.sync(&Ctx::GUEST).await.inspect_err(|_| {
            writer.poison();
            // What is recorded may name what is not there.
            self.ledger.void();
        })
    }

    /// Before the first write: marks the bitmaps as in use, clears the bits of features that we do not keep up and sets
    /// that of the journal, stable before anything depends on it.
    pub(crate) async fn prepare(self: &Arc<Image>) -> IoResult<&Writer> {
        let writer = self.writer()?;
        if writer.prepared.load(Ordering::Acquire) {
            return Ok(writer);
        }
        let image = self.clone();
        rt::detached(async move {
            let writer = image.writer()?;
            let turn = writer.rounds.turn().await;
            if !writer.prepared.load(Ordering::Acquire) {
                let mut wanted = image.begin_journal();
                if image.bitmaps.are_valid() {
                    image.mark_bitmaps().await?;
                    wanted |= Autoclear::BITMAPS;
                }
                if image.header().autoclear() != wanted {
                    image.change_header(&turn, &[HeaderChange::Autoclear(wanted)]).await?;
                }
                writer.prepared.store(true, Ordering::Release);
            }
            Ok::<(), IoError>(())
        })
        .await?;
        Ok(writer)
    }

    /// Changes the header, between two rounds: (1) sync of what the new values name, (2) its first sector, (3) sync.
    /// To be run in a task of its own: cut off in the middle, nobody would know which header is there.
    pub(crate) async fn change_header(&self, turn: &Turn, changes: &[HeaderChange]) -> IoResult<()> {
        let next = self.header().changed(changes)?;
        self.sync_storage().await?;
        #[cfg(feature = "planted-faults")]
        if self.fault(crate::faults::Fault::HeaderRewrittenWhole) {
            metaio::write(&Ctx::GUEST, &self.storage, 0, next.rewritten_whole()).await?;
            self.sync_storage().await?;
            return self.header_is(turn, next);
        }
        let stored = next.store(&Ctx::GUEST, &self.storage).await;
        stored.inspect_err(|_| lose_header(self))?;
        self.sync_storage().await?;
        self.header_is(turn, next)
    }

    /// Takes a header that is stable for the image's.
    pub(crate) fn header_is(&self, _turn: &Turn, header: Header) -> IoResult<()> {
        self.writer()?.refcounts.header_changed(&header);
        *lock(&self.header) = header;
        Ok(())
    }

    /// Takes 1 to `want` contiguous host clusters that nothing names. Their refcounts are 1 in the cache.
    pub(crate) async fn take_clusters(self: &Arc<Image>, cx: &Ctx, want: u64) -> IoResult<HostRun> {
        let writer = self.writer()?;
        let fill = cx.class == Class::Fill;
        loop {
            if let Some(run) = writer.runs.take(fill, want) {
                return Ok(run);
            }
            let number = Runs::number(fill);
            let refill = writer.refills.exclusive(number, number + 1).await;
            if let Some(run) = writer.runs.take(fill, want) {
                return Ok(run);
            }
            let (image, cx) = (self.clone(), *cx);
            // A task of its own: it makes the file longer, and what it gets must not be lost with the request.
            rt::detached(async move {
                let reserved = image.reserve(&cx, want).await;
                drop(refill);
                reserved
            })
            .await?;
        }
    }

    /// Reserves a run of at least `want` clusters for this reactor, if there is one of that length.
    async fn reserve(self: &Arc<Image>, cx: &Ctx, want: u64) -> IoResult<()> {
        let length = want.max(Runs::len(self.size(), &self.geometry));
        let run = match self.allocate(cx, length).await {
            Err(error) if error.kind() == ErrorKind::NoSpace && self.give_runs_back(cx).await? > 0 => {
                self.allocate(cx, want).await?
            }
            other => other?,
        };
        let writer = self.writer()?;
        writer.runs.put(cx.class == Class::Fill, run);
        if !writer.runs_watched.swap(true, Ordering::AcqRel) {
            rt::spawn(give_back_when_idle(Arc::downgrade(self)));
        }
        Ok(())
    }

    /// 1 to `want` contiguous clusters that nobody had reserved. To be run in a task of its own.
    pub(crate) async fn allocate(self: &Arc<Image>, cx: &Ctx, want: u64) -> IoResult<HostRun> {
        loop {
            if let Some(run) = self.writer()?.refcounts.allocate(cx, want).await? {
                return Ok(run);
            }
            let turn = self.writer()?.rounds.turn().await;
            if let Some(header) = self.writer()?.refcounts.grow(&Ctx::GUEST, &self.header()).await? {
                self.header_is(&turn, header)?;
            }
        }
    }

    /// Clusters that were taken and are not used after all. Whatever was to be written there has ended.
    pub(crate) fn give_back(&self, cx: &Ctx, run: HostRun) {
        if let Ok(writer) = self.writer() {
            writer.runs.put_first(cx.class == Class::Fill, HostRun { zeroed: false, ..run });
        }
    }

    /// Gives back what reactors have reserved; how many clusters that was.
    pub(crate) async fn give_runs_back(&self, cx: &Ctx) -> IoResult<u64> {
        let writer = self.writer()?;
        // Unless it is taking some itself just now.
        let mut clusters = match writer.packer.try_lock() {
            Some(mut packer) => self.end_packing(cx, &mut packer).await?,
            None => 0,
        };
        for run in writer.runs.drain() {
            writer.refcounts.release(cx, run).await?;
            clusters += run.count;
        }
        Ok(clusters)
    }

    /// The L2 table of a guest cluster, fit to be changed: made where there is none, copied where a snapshot shares
    /// it. The new table is whole in the file, though not yet stable, before the L1 entry names it.
    pub(crate) async fn table_for_change(
        self: &Arc<Image>,
        cx: &Ctx,
        cluster: GuestCluster,
    ) -> IoResult<L2TableRef> {
        if let Some(table) = self.table(cluster)?.filter(|table| table.copied) {
            return Ok(table);
        }
        let (l1_index, l2_index) = self.geometry.indices(cluster);
        let nth = u64::from(l1_index.0);
        let writer = self.writer()?;
        // Other tables are made meanwhile.
        let _making = writer.tables.exclusive(nth, nth + 1).await;
        let old = self.table(cluster)?;
        if let Some(table) = old.filter(|table| table.copied) {
            return Ok(table);
        }
        let run = self.take_clusters(cx, 1).await?;
        let at = self.geometry.host_offset(run.first);
        let bytes = self.geometry.cluster_bytes();
        let made = match old {
            None => self.storage.write_zeroes(cx, at.0, bytes, ZeroFlags::empty()).await,
            Some(old) => self.copy_table(cx, old.at, at).await,
        };
        if let Err(error) = made {
            self.give_back(cx, run);
            return Err(error);
        }
        if old.is_none() {
            // The slice that is wanted first need not be read.
            self.slices.insert_zeroed(self.slice_key(at, l2_index).0);
        }
        let table = L2TableRef { at, copied: true };
        writer.refcounts.note_l2_tables(std::iter::once(at));
        self.set_table(L1Index(l1_index.0), L1Entry::table(table));
        if let Some(old) = old {
            self.unmapped(Freed::table(self.geometry.host_cluster(old.at)));
        }
        Ok(table)
    }

    /// Copies a table that somebody shares. Nothing of it has changed in the cache: shared tables never do.
    async fn copy_table(&self, cx: &Ctx, from: HostOffset, to: HostOffset) -> IoResult<()> {
        let mut bytes =
            metaio::read(cx, &self.storage, from.0, self.geometry.cluster_bytes() as usize).await?;
        for entry in bytes.chunks_exact_mut(self.geometry.l2_entry_bytes() as usize) {
            let view = L2Entry::from_bytes(entry, &self.geometry).view(&self.geometry);
            // What a shared table names is shared: never written in place, whatever the flag said.
            if let Ok(L2View::Standard(cluster @ StandardCluster { copied: true, .. })) = view {
                let shared = StandardCluster { copied: false, ..cluster };
                L2Entry::standard(shared, &self.geometry).write_to(entry, &self.geometry);
            }
        }
        metaio::write(cx, &self.storage, to.0, BytesMut::freeze(bytes)).await
    }

    /// Whether a mistake was planted in this image.
    #[cfg(feature = "planted-faults")]
    pub(crate) fn fault(&self, fault: crate::faults::Fault) -> bool {
        self.options.fault == Some(fault)
    }
}

/// A header write that failed: the file has the old one or the new one.
fn lose_header(image: &Image) {
    if let Some(writer) = &image.writer {
        writer.poison();
    }
}

/// Gives back what is reserved once nobody has taken of it for a while. Ends then, and when the image is gone.
async fn give_back_when_idle(image: Weak<Image>) {
    let mut seen = None;
    loop {
        rt::sleep(RUNS_IDLE).await;
        let Some(image) = image.upgrade() else { return };
        let Ok(writer) = image.writer() else { return };
        let now = writer.runs.reserved();
        if now.is_empty() || seen.as_ref() == Some(&now) {
            // First: whoever reserves from now on is watched anew.
            writer.runs_watched.store(false, Ordering::Release);
            // Nothing is written to an image that another host owns.
            if now.is_empty() || image.header().is_fenced() {
                return;
            }
            // Whoever closes the image waits for this, and makes it stable with everything else.
            let freeing = writer.freeing.shared(0, 1).await;
            let given = image.give_runs_back(&Ctx::FILL).await;
            drop(freeing);
            // Where either fails, the next guest's flush tells; until then nothing but space is lost.
            if given.is_ok_and(|clusters| clusters > 0) && writer.refcounts.is_dirty() {
                let _failed = image.sync().await;
            }
            return;
        }
        seen = Some(now);
    }
}
