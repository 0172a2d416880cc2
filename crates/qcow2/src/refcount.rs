//! Refcounts, and the allocation of host clusters.
//!
//! Owns the refcount table and a bounded cache of refcount blocks, read on demand. A change is made in the cache
//! alone; it reaches the storage with the copies of a round ([`Refcounts::freeze`], [`Refcounts::written`]).
//!
//! # What never happens
//! * A lock is never held over I/O: a block is read under the state *loading*, and whoever needs it waits, nobody else.
//! * Two writes of one sector are never in flight: what is frozen is not frozen again before it was written.
//! * A cluster that holds metadata which header or refcount table name is never handed out, whatever the refcounts say.
//!
//! # Order of writes
//! A round writes refcounts before what depends on them. Growing ([`Refcounts::grow`]) happens between two rounds:
//!
//! * A new block lies in the range that it describes, and counts itself. (1) The block, (2) sync, (3) the table's
//!   entry, (4) sync; then clusters of it are handed out.
//! * A larger table: (1) the blocks that count it and themselves, and the table itself, a copy of what is on the disk,
//!   (2) sync, (3) the header, (4) sync; then its old clusters are given back, in the cache.
//!
//! # Costs
//! Opening: nothing. The first use reads the table (8 bytes for each 2 GiB at clusters of 64 KiB). An allocation takes
//! one short lock and looks from where the last one ended; each block is read once, old ones a few at a time.
//! Memory: the table, and 4 MiB of blocks (more only while they are dirty).

use std::ops::Range;

use bytes::Bytes;
use event_listener::Event;
use infill_base::{Ctx, ErrorKind, IoError, IoResult, align_up};
use infill_storage::StorageHandle;
use infill_storage::sync::{Mutex, lock};

use crate::entry::{be64, refcount_block, refcount_get};
use crate::format::SECTOR_BYTES;
use crate::geometry::{Geometry, HostCluster, HostOffset, TABLE_ENTRY_BYTES};
use crate::header::{Header, TableRef};
use crate::metaio;
use cache::{CACHE_BYTES_MAX, Cache, Fixed, OLD_BLOCKS_PER_GROWTH, Pick, Search, Slot};

mod cache;
mod grow;

/// Contiguous host clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostRun {
    /// The first.
    pub first: HostCluster,
    /// How many.
    pub count: u64,
    /// Nothing was ever written there, and all of it reads as zeroes.
    pub zeroed: bool,
}

impl HostRun {
    fn clusters(&self) -> Range<u64> {
        self.first.0..self.first.0.saturating_add(self.count)
    }
}

/// A copy of changed refcounts, for a round to write.
#[derive(Clone, Debug)]
pub(crate) struct RefcountCopy {
    /// Where it belongs.
    pub at: HostOffset,
    /// Whole sectors.
    pub bytes: Bytes,
    block: u64,
    sectors: Range<usize>,
}

/// The refcounts of an image that is open for writing. Shared by all reactors.
#[derive(Debug)]
pub(crate) struct Refcounts {
    storage: StorageHandle,
    geometry: Geometry,
    table: TableRef,
    cache: Mutex<Cache>,
    /// Something was loaded, or a load failed.
    loaded: Event,
    growth: Mutex<grow::Growth>,
}

impl Refcounts {
    /// The refcounts of the image in `storage`; nothing is read yet.
    pub fn new(storage: StorageHandle, header: &Header) -> Refcounts {
        let geometry = header.geometry();
        let sector = u64::from(storage.limits().request_align).max(SECTOR_BYTES as u64);
        let sector = sector.min(geometry.cluster_bytes()) as usize;
        Refcounts {
            storage,
            geometry,
            table: header.refcount_table(),
            cache: Mutex::new(Cache::new(header, sector)),
            loaded: Event::new(),
            growth: Mutex::new(grow::Growth::new(header)),
        }
    }

    /// Takes note of where the header names tables now.
    pub fn header_changed(&self, header: &Header) {
        lock(&self.cache).fixed = Fixed::of(header);
    }

    /// Takes 1 to `want` contiguous free clusters: their refcounts are 1 in the cache, and their space in the file is
    /// reserved where the storage can do that. `None`: call [`Refcounts::grow`] between two rounds, then ask again.
    ///
    /// Fails with `NoSpace` where neither format nor storage has any, with `Corrupt` where damaged refcounts would give
    /// metadata away.
    pub async fn allocate(&self, cx: &Ctx, want: u64) -> IoResult<Option<HostRun>> {
        let mut refused = None;
        for (want, search) in [(want, Search::Usual), (1, Search::Usual), (want, Search::Old)] {
            let Some(run) = self.take(cx, want, search).await? else {
                if search == Search::Usual && refused.is_none() && !self.end_is_closed() {
                    return Ok(None);
                }
                continue;
            };
            // Also where the caller goes away in the middle.
            let mut taken = OnDrop::new(|| drop(lock(&self.cache).lower(&run.clusters())));
            match self.reserve(cx, &run.clusters()).await {
                Ok(()) => {
                    taken.disarm();
                    return Ok(Some(run));
                }
                Err(error) if error.kind() != ErrorKind::NoSpace => return Err(error),
                Err(error) => refused = Some(error),
            }
        }
        // The next one looks at the end again: space may have come.
        lock(&self.cache).end_closed = false;
        Err(refused.unwrap_or_else(|| {
            IoError::new(ErrorKind::NoSpace, "no cluster of this qcow2 image is free, and it cannot grow")
                .in_node(self.storage.name())
        }))
    }

    fn end_is_closed(&self) -> bool {
        lock(&self.cache).end_closed
    }

    /// Finds a run and counts it as used.
    async fn take(&self, cx: &Ctx, want: u64, search: Search) -> IoResult<Option<HostRun>> {
        self.load_table(cx).await?;
        let mut budget = OLD_BLOCKS_PER_GROWTH;
        loop {
            let file_len = self.storage.len();
            let index = {
                let mut cache = lock(&self.cache);
                match cache.pick(want, search, &mut budget, file_len) {
                    Pick::Run(run) => {
                        let clusters = run.clusters();
                        let table = || cache.has_l2_table(&clusters).then_some("L2 table");
                        return match cache.metadata(&clusters).or_else(table) {
                            None => Ok(Some(run)),
                            // They stay counted, so that the next one gets others.
                            Some(what) => Err(given_away(what, run.first)),
                        };
                    }
                    Pick::Full => return Ok(None),
                    Pick::Load(index) => index,
                }
            };
            self.load_block(cx, index).await?;
            self.reserve_block(cx, index).await?;
        }
    }

    /// Reserves the space of clusters in the file. `NoSpace` where there is none, or the storage cannot grow.
    async fn reserve(&self, cx: &Ctx, clusters: &Range<u64>) -> IoResult<()> {
        let at = clusters.start << self.geometry.cluster_bits();
        let end = clusters.end << self.geometry.cluster_bits();
        let no_space = |error: IoError| {
            IoError::new(ErrorKind::NoSpace, "the storage of this qcow2 image cannot become longer")
                .at(at, end - at)
                .in_node(self.storage.name())
                .caused_by(error)
        };
        match self.storage.allocate(cx, at, end - at).await {
            Ok(()) => Ok(()),
            Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::TooLarge) => {
                Err(no_space(error))
            }
            Err(error) if error.kind() != ErrorKind::Unsupported => Err(error),
            Err(_) => self.lengthen(cx, end).await.map_err(|error| match error.kind() {
                ErrorKind::Unsupported | ErrorKind::InvalidInput | ErrorKind::TooLarge => no_space(error),
                _ => error,
            }),
        }
    }

    /// Reserves the space of a block that is here, once: writing it back must not meet a full file system.
    async fn reserve_block(&self, cx: &Ctx, index: u64) -> IoResult<()> {
        let at = {
            let mut cache = lock(&self.cache);
            let at = cache.entry(index);
            match cache.ready(index) {
                Some(block) if !block.reserved => at,
                _ => return Ok(()),
            }
        };
        let cluster = at >> self.geometry.cluster_bits();
        self.reserve(cx, &(cluster..cluster + 1)).await?;
        if let Some(block) = lock(&self.cache).ready(index) {
            block.reserved = true;
        }
        Ok(())
    }

    /// Lowers the refcount of every cluster of the run by one, in the cache. The caller sees to it that nothing on the
    /// disk names them any more. Fails with `Corrupt` at the first that counts as free already.
    pub async fn release(&self, cx: &Ctx, run: HostRun) -> IoResult<()> {
        self.change(cx, run, false).await
    }

    /// Raises the refcount of every cluster of the run by one, in the cache. Fails with `Corrupt` at one that counts as free,
    /// with `TooLarge` at one that cannot be counted higher; those of the blocks before have been raised then.
    pub async fn raise(&self, cx: &Ctx, run: HostRun) -> IoResult<()> {
        self.change(cx, run, true).await
    }

    /// Raises or lowers the refcounts of the run, block by block. What is raised has its block reserved once it is loaded.
    async fn change(&self, cx: &Ctx, run: HostRun, raises: bool) -> IoResult<()> {
        self.load_table(cx).await?;
        let per_block = self.geometry.refcounts_per_block();
        let (mut at, end) = (run.first.0, run.clusters().end);
        while at < end {
            let index = at / per_block;
            let piece = at..end.min((index + 1) * per_block);
            self.need_block(index, HostCluster(at))?;
            let changed = {
                let mut cache = lock(&self.cache);
                if raises { cache.raise(&piece) } else { cache.lower(&piece) }
            };
            match changed {
                Some(done) => done?,
                None => {
                    self.load_block(cx, index).await?;
                    if raises {
                        self.reserve_block(cx, index).await?;
                    }
                    continue;
                }
            }
            at = piece.end;
        }
        Ok(())
    }

    /// The refcount of a cluster, as the cache has it.
    pub async fn refcount(&self, cx: &Ctx, cluster: HostCluster) -> IoResult<u64> {
        self.load_table(cx).await?;
        let (index, _) = self.geometry.refcount_indices(cluster);
        loop {
            {
                let mut cache = lock(&self.cache);
                if cache.entry(index) == 0 {
                    return Ok(0);
                }
                if let Some(refcount) = cache.get(cluster.0) {
                    return Ok(refcount);
                }
            }
            self.load_block(cx, index).await?;
        }
    }

    /// Makes sure that a cluster which an entry names is counted: 0 becomes 1, in the cache.
    pub async fn count_named(&self, cx: &Ctx, cluster: HostCluster) -> IoResult<()> {
        if self.refcount(cx, cluster).await? > 0 {
            return Ok(());
        }
        let (index, _) = self.geometry.refcount_indices(cluster);
        self.need_block(index, cluster)?;
        loop {
            if lock(&self.cache).count_named(cluster.0) {
                return Ok(());
            }
            self.load_block(cx, index).await?;
        }
    }

    /// Which metadata lies in the run, as far as header and refcount table tell: what a damaged entry must not make
    /// anybody overwrite.
    pub async fn metadata_at(&self, cx: &Ctx, run: HostRun) -> IoResult<Option<&'static str>> {
        self.load_table(cx).await?;
        Ok(lock(&self.cache).metadata(&run.clusters()))
    }

    /// Takes note of L2 tables that the active L1 table names. They are forgotten when they are given back.
    pub fn note_l2_tables(&self, tables: impl Iterator<Item = HostOffset>) {
        let bits = self.geometry.cluster_bits();
        lock(&self.cache).l2_tables.extend(tables.map(|at| at.0 >> bits));
    }

    /// Whether an L2 table lies in the run.
    pub fn has_l2_table(&self, run: HostRun) -> bool {
        lock(&self.cache).has_l2_table(&run.clusters())
    }

    /// Copies of all changed sectors, to be written by the round that calls it.
    pub fn freeze(&self) -> Vec<RefcountCopy> {
        lock(&self.cache).freeze()
    }

    /// The round is over: the copies are stable, or (`ok` is false) have to be written again.
    pub fn written(&self, copies: Vec<RefcountCopy>, ok: bool) {
        lock(&self.cache).written(&copies, ok);
    }

    /// Whether a round has anything to write.
    pub fn is_dirty(&self) -> bool {
        lock(&self.cache).dirty_bytes() > 0
    }

    /// Whether so much is dirty that a round should come soon.
    pub fn wants_round(&self) -> bool {
        lock(&self.cache).dirty_bytes() > CACHE_BYTES_MAX / 2
    }

    fn need_block(&self, index: u64, cluster: HostCluster) -> IoResult<()> {
        if lock(&self.cache).entry(index) != 0 {
            return Ok(());
        }
        Err(damaged(format!("cluster {} is in use, but no refcount block describes it", cluster.0)))
    }

    /// Reads the refcount table, if nobody has yet.
    async fn load_table(&self, cx: &Ctx) -> IoResult<()> {
        loop {
            let listener = {
                let mut cache = lock(&self.cache);
                if cache.table.is_some() {
                    return Ok(());
                }
                if !cache.table_loading {
                    cache.table_loading = true;
                    None
                } else {
                    Some(self.loaded.listen())
                }
            };
            let Some(listener) = listener else { break };
            listener.await;
        }
        let _ended = OnDrop::new(|| {
            lock(&self.cache).table_loading = false;
            self.loaded.notify(usize::MAX);
        });
        // The header's gate has bounded its length.
        let len = (self.table.count as usize) << self.geometry.cluster_bits();
        let bytes = metaio::read(cx, &self.storage, self.table.at.0, len).await?;
        let table = bytes.chunks_exact(TABLE_ENTRY_BYTES as usize).map(be64).collect();
        lock(&self.cache).set_table(table, self.storage.len());
        Ok(())
    }

    /// Reads a block, if it is not here; waits for whoever reads it already.
    async fn load_block(&self, cx: &Ctx, index: u64) -> IoResult<()> {
        let raw = loop {
            let listener = {
                let mut cache = lock(&self.cache);
                match cache.slot(index) {
                    Some(Slot::Ready(_)) => return Ok(()),
                    Some(Slot::Loading) => self.loaded.listen(),
                    None => {
                        cache.begin_load(index);
                        break cache.entry(index);
                    }
                }
            };
            listener.await;
        };
        let _ended = OnDrop::new(|| {
            lock(&self.cache).abandon_load(index);
            self.loaded.notify(usize::MAX);
        });
        let at = self.block_place(index, raw)?;
        let bytes = metaio::read(cx, &self.storage, at.0, self.geometry.cluster_bytes() as usize).await?;
        let own = self.geometry.host_cluster(at);
        let (own_index, in_block) = self.geometry.refcount_indices(own);
        if own_index == index && refcount_get(&bytes, in_block, &self.geometry) == 0 {
            return Err(damaged(format!("the refcount block at byte {} counts itself as free", at.0)));
        }
        lock(&self.cache).insert(index, at, bytes.to_vec(), false);
        Ok(())
    }

    /// Where the block of an entry lies, if it may lie there.
    fn block_place(&self, index: u64, raw: u64) -> IoResult<HostOffset> {
        let wrong = |what: String| damaged(format!("refcount table entry {index} {what}"));
        let at = refcount_block(raw, &self.geometry).map_err(|error| wrong(format!("is wrong: {error}")))?;
        let at = at.ok_or_else(|| wrong("names no block".into()))?;
        if at.0 >= self.storage.len() {
            return Err(wrong(format!("points to byte {}, behind the end of the file", at.0)));
        }
        let cluster = self.geometry.host_cluster(at).0;
        let cache = lock(&self.cache);
        if let Some(what) = cache.fixed_at(cluster) {
            return Err(wrong(format!("points to the {what}")));
        }
        if cache.is_shared(index) {
            return Err(wrong("points to the block of another entry".into()));
        }
        Ok(at)
    }

    /// Makes the storage at least `end` bytes long. Called by one at a time: it could make it shorter else.
    async fn lengthen(&self, cx: &Ctx, end: u64) -> IoResult<()> {
        loop {
            let listener = {
                let mut growth = lock(&self.growth);
                if self.storage.len() >= end {
                    return Ok(());
                }
                if !growth.lengthening {
                    growth.lengthening = true;
                    None
                } else {
                    Some(self.loaded.listen())
                }
            };
            let Some(listener) = listener else { break };
            listener.await;
        }
        let _ended = OnDrop::new(|| {
            lock(&self.growth).lengthening = false;
            self.loaded.notify(usize::MAX);
        });
        self.storage.set_len(cx, align_up(end, self.geometry.cluster_bytes())).await
    }
}

/// Runs at the end of an operation, also where its future is dropped in the middle.
struct OnDrop<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> OnDrop<F> {
    fn new(run: F) -> OnDrop<F> {
        OnDrop(Some(run))
    }

    fn disarm(&mut self) {
        self.0 = None;
    }
}

impl<F: FnOnce()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        if let Some(run) = self.0.take() {
            run();
        }
    }
}

fn damaged(what: String) -> IoError {
    IoError::new(
        ErrorKind::Corrupt,
        format!("damaged qcow2 refcounts: {what}; check the image before it is used on"),
    )
}

fn given_away(what: &str, cluster: HostCluster) -> IoError {
    damaged(format!("clusters from {} on count as free, but the image's {what} lies there", cluster.0))
}

#[cfg(test)]
mod tests;
