//! Rounds: how what changed in memory reaches the file, and how space comes back.
//!
//! # Order of writes
//! On a request's path: (1) clusters of a reserved run, whose refcounts were raised in the cache; (2) the payload;
//! (3) when that write has completed, the L2 entry in the cache. A round then
//!
//! 1. takes the list of what was unmapped, then copies the changed L1 sectors, then the changed slices, then the changed
//!    refcount sectors: so no copy names what is not copied, and whatever the list holds is unmapped in the copies;
//! 2. writes the refcount copies, and syncs: this covers every payload that a copy names, and every new L2 table;
//! 3. writes the copies of slices and L1 sectors, and syncs. Now the FLUSHes are answered, and the records of what was
//!    changed before step 1 are dropped from the journal;
//! 4. afterwards, when all operations that may still touch what was unmapped are over, punches it and lowers its
//!    refcounts in the cache: they reach the file with the next round. A crash leaks, and never doubles.
//!
//! Only copies are written, and every copied slice stays in the cache until the second sync. Where a write fails, all that
//! was copied counts as changed again, and the FLUSHes fail; where a sync fails, the image is poisoned.
//!
//! Costs: two syncs for any number of changes; one where no mapping changed.

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use infill_base::{Ctx, DiscardMode, Gather, IoResult, WriteFlags};
use infill_node::mapping::FrozenSlice;
use infill_storage::journal::Mark;
use infill_storage::rt;
use infill_storage::sync::{Arc, lock};

use crate::entry::CompressedCluster;
#[cfg(feature = "planted-faults")]
use crate::faults::Fault;
use crate::geometry::{Geometry, HostCluster, HostOffset};
use crate::image::Image;
use crate::l1::L1Copy;
use crate::refcount::{HostRun, RefcountCopy};
use crate::writer::Writer;

/// Writes of a round that are in flight at once.
const WRITES_MAX: usize = 64;
/// Bytes of neighbouring copies that are written as one.
const WRITE_BYTES_MAX: usize = 1 << 20;

/// Host clusters that no entry in the cache names any more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Freed {
    run: HostRun,
    /// An L2 table: slices of it may be cached.
    table: bool,
    /// With what it names.
    tree: bool,
    /// The guest gave it up: its space goes back to the file system.
    punch: bool,
}

impl Freed {
    /// Its clusters.
    pub(crate) fn run(&self) -> HostRun {
        self.run
    }

    /// A cluster of data.
    pub(crate) fn data(cluster: HostCluster, punch: bool) -> Freed {
        Freed { run: HostRun { first: cluster, count: 1, zeroed: false }, table: false, tree: false, punch }
    }

    /// An L2 table.
    pub(crate) fn table(cluster: HostCluster) -> Freed {
        Freed { table: true, ..Freed::data(cluster, false) }
    }

    /// An L2 table, and all that it names. Nobody changes it any more.
    pub(crate) fn tree(cluster: HostCluster) -> Freed {
        Freed { tree: true, ..Freed::table(cluster) }
    }

    /// A longer table of the header's.
    pub(crate) fn clusters(first: HostCluster, count: u64) -> Freed {
        Freed { run: HostRun { first, count, zeroed: false }, table: false, tree: false, punch: false }
    }

    /// A compressed cluster: each host cluster that it touches counts it once.
    pub(crate) fn compressed(cluster: CompressedCluster, geometry: &Geometry) -> Freed {
        let first = geometry.host_cluster(cluster.at);
        let last =
            cluster.at.0.saturating_add(u64::from(cluster.len).saturating_sub(1)) >> geometry.cluster_bits();
        Freed::clusters(first, last - first.0 + 1)
    }
}

/// What a round has copied.
struct Copies {
    /// The records of these changes.
    #[cfg_attr(not(feature = "planted-faults"), expect(dead_code, reason = "the round has it"))]
    mark: Mark,
    l1: Vec<L1Copy>,
    slices: Vec<FrozenSlice>,
    refcounts: Vec<RefcountCopy>,
}

impl Image {
    /// Everything acknowledged before the call is stable when it returns.
    pub(crate) async fn sync(self: &Arc<Image>) -> IoResult<()> {
        let image = self.clone();
        self.writer()?.rounds.join(|| image.round()).await
    }

    /// Writes back when so much has changed that it should be, before more does.
    pub(crate) async fn relieve(self: &Arc<Image>) -> IoResult<()> {
        let wanted = self.slices.wants_round() || self.ledger.wants_round();
        if wanted || self.writer()?.refcounts.wants_round() { self.sync().await } else { Ok(()) }
    }

    /// Notes that an entry in the cache no longer names this. To be called after the entry was set.
    pub(crate) fn unmapped(self: &Arc<Image>, freed: Freed) {
        let Some(writer) = &self.writer else { return };
        #[cfg(feature = "planted-faults")]
        if self.fault(Fault::ReusedBeforeSync2) {
            let image = self.clone();
            return rt::spawn(async move { image.lower(&[freed]).await });
        }
        lock(&writer.freed).push(freed);
    }

    async fn round(self: Arc<Image>) -> IoResult<()> {
        let writer = self.writer()?;
        let mut freed = std::mem::take(&mut *lock(&writer.freed));
        let mark = self.ledger.mark();
        let l1 = self.l1.freeze();
        let slices = self.slices.freeze();
        #[cfg(feature = "planted-faults")]
        self.plant_before_writes(writer, &mut freed, &slices).await;
        let mut copies = Copies { mark, l1, slices, refcounts: writer.refcounts.freeze() };
        let result = self.write_copies(&mut copies).await;
        let ok = result.is_ok();
        self.l1.written(copies.l1, ok);
        self.slices.written(copies.slices, ok);
        writer.refcounts.written(copies.refcounts, ok);
        #[cfg(feature = "planted-faults")]
        if self.fault(Fault::FreedByRoundThatCopied) {
            freed.append(&mut lock(&writer.freed));
        }
        #[cfg(feature = "planted-faults")]
        let mark = if self.fault(Fault::RecordsDroppedPastMark) { self.ledger.mark() } else { mark };
        if ok {
            // Before the space is used again.
            self.ledger.stable(mark);
            self.clone().free(writer, freed).await;
        } else {
            lock(&writer.freed).append(&mut freed);
        }
        result
    }

    /// Steps 2 and 3.
    async fn write_copies(self: &Arc<Image>, copies: &mut Copies) -> IoResult<()> {
        let refcounts = copies.refcounts.iter().map(|copy| (copy.at.0, copy.bytes.clone()));
        self.write_all(refcounts.collect()).await?;
        if copies.l1.is_empty() && copies.slices.is_empty() {
            return self.sync_storage().await;
        }
        #[cfg(feature = "planted-faults")]
        if self.plant_in_writes(copies).await? {
            return Ok(());
        }
        self.sync_storage().await?;
        #[cfg(feature = "planted-faults")]
        if self.fault(Fault::RecordsDroppedAtSync1) {
            self.ledger.stable(copies.mark);
        }
        let slices = copies.slices.iter().map(|slice| (slice.host(), slice.bytes().clone()));
        let l1 = copies.l1.iter().map(|copy| (copy.at, copy.bytes.clone()));
        self.write_all(slices.chain(l1).collect()).await?;
        self.sync_storage().await
    }

    /// Writes pieces, neighbours joined, many at once. The first failure is told when all have ended.
    async fn write_all(&self, mut pieces: Vec<(u64, Bytes)>) -> IoResult<()> {
        pieces.sort_unstable_by_key(|(at, _)| *at);
        let mut writes: Vec<(u64, Gather)> = Vec::new();
        for (at, bytes) in pieces {
            match writes.last_mut() {
                Some((start, data))
                    if *start + data.len() as u64 == at && data.len() + bytes.len() <= WRITE_BYTES_MAX =>
                {
                    data.push(bytes);
                }
                _ => writes.push((at, bytes.into())),
            }
        }
        let write =
            |(at, data)| async move { self.storage.write(&Ctx::GUEST, at, data, WriteFlags::empty()).await };
        let results: Vec<IoResult<()>> =
            stream::iter(writes.into_iter().map(write)).buffer_unordered(WRITES_MAX).collect().await;
        results.into_iter().collect()
    }

    /// Step 4, as a task of its own: no FLUSH waits for it.
    async fn free(self: Arc<Image>, writer: &Writer, freed: Vec<Freed>) {
        if freed.is_empty() {
            return;
        }
        // Before the round ends, so that whoever waits for its result can wait for this, too.
        let freeing = writer.freeing.shared(0, 1).await;
        rt::spawn(async move {
            self.in_flight.settle().await;
            // Writes that were cut off may still land there: it leaks until a check.
            if !self.in_flight.is_cut() {
                self.lower(&freed).await;
            }
            drop(freeing);
        });
    }

    /// Punches and lowers refcounts. A failure leaks.
    async fn lower(self: &Arc<Image>, freed: &[Freed]) {
        let Ok(writer) = self.writer() else { return };
        let cx = &Ctx::GUEST;
        for Freed { run, table, tree, punch } in freed.iter().copied() {
            let at = self.geometry.host_offset(run.first).0;
            if table {
                let slices = self.geometry.cluster_bytes() / self.slices.layout().slice_bytes as u64;
                self.slices.forget_table(at, slices as u32);
            }
            // What only a damaged entry can have named: it leaks at most, and is never given away.
            let bytes = run.count << self.geometry.cluster_bits();
            let checked =
                if table { self.check_table(cx, at).await } else { self.check_host(cx, at, bytes).await };
            if let Err(error) = checked {
                tracing::warn!(%error, at, "clusters are not given back");
                continue;
            }
            if tree {
                if let Err(error) = self.lower_tree(HostOffset(at)).await {
                    tracing::warn!(%error, at, "what a table names is not given back");
                    continue;
                }
                // Not waited for: a round that frees something itself waits until nobody settles, and who settles waits for this.
                // A failure is told to whoever syncs next.
                let image = self.clone();
                rt::spawn(async move {
                    let _ = image.relieve().await;
                });
            }
            if punch
                && self.options.discard == DiscardMode::Unmap
                && writer.refcounts.refcount(cx, run.first).await.is_ok_and(|count| count == 1)
                && let Err(error) = self.storage.discard(cx, at, self.geometry.cluster_bytes()).await
            {
                tracing::debug!(%error, at, "the space of a cluster could not be given to the file system");
            }
            if let Err(error) = writer.refcounts.release(cx, run).await {
                tracing::warn!(%error, at, "clusters leak: their refcounts could not be lowered");
            }
        }
    }
}

#[cfg(feature = "planted-faults")]
impl Image {
    async fn plant_before_writes(
        self: &Arc<Image>,
        writer: &Writer,
        freed: &mut Vec<Freed>,
        slices: &[FrozenSlice],
    ) {
        if self.fault(Fault::SliceEvictedBeforeWrite) {
            let count = self.geometry.cluster_bytes() / self.slices.layout().slice_bytes as u64;
            slices.iter().for_each(|slice| self.slices.forget_table(slice.key().table, count as u32));
        }
        if self.fault(Fault::RefcountFallsInRound) {
            self.lower(&std::mem::take(freed)).await;
        }
        let _ = writer;
    }

    /// Whether the round is over already.
    async fn plant_in_writes(self: &Arc<Image>, copies: &mut Copies) -> IoResult<bool> {
        let frozen: Vec<(u64, Bytes)> =
            copies.slices.iter().map(|slice| (slice.host(), slice.bytes().clone())).collect();
        if self.fault(Fault::TwoWritesOfOneSlice) {
            self.sync_storage().await?;
            let (image, second) = (self.clone(), frozen);
            rt::spawn(async move { drop(image.write_all(second).await) });
            return Ok(false);
        }
        let l1: Vec<(u64, Bytes)> = copies.l1.iter().map(|copy| (copy.at, copy.bytes.clone())).collect();
        let slices = if self.fault(Fault::LiveSliceWritten) {
            self.sync_storage().await?;
            copies.slices.iter().map(|frozen| (frozen.host(), self.live_bytes(frozen))).collect()
        } else if self.fault(Fault::TableAfterAck) {
            self.sync_storage().await?;
            let image = self.clone();
            let late = l1.clone();
            self.write_all(frozen).await?;
            self.sync_storage().await?;
            rt::spawn(async move { drop(image.write_all(late).await) });
            return Ok(true);
        } else if self.fault(Fault::PayloadUnsynced) {
            frozen
        } else {
            return Ok(false);
        };
        self.write_all(slices.into_iter().chain(l1).collect()).await?;
        self.sync_storage().await?;
        Ok(true)
    }

    fn live_bytes(&self, frozen: &FrozenSlice) -> Bytes {
        let mut bytes = frozen.bytes().to_vec();
        let entry_bytes = self.geometry.l2_entry_bytes() as usize;
        for (index, entry) in bytes.chunks_exact_mut(entry_bytes).enumerate() {
            self.entry(frozen.slice(), index).write_to(entry, &self.geometry);
        }
        bytes.into()
    }
}
