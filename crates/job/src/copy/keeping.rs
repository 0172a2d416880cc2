//! Keeping the map of a copy true while it runs ([`KeptMap`]): who sets a bit, and who may clear it.
//!
//! # Order, of a mirror or commit
//! 1. A guest's change counts as *under way* and its bits are set, then it reaches the source; it is marked to be copied, and
//!    only then under way no more.
//! 2. A piece that is taken to be copied is under way in the same step.
//! 3. A bit is cleared when the target has its block: a write of it has succeeded, which the target's own journal or the page
//!    cache keeps, nothing of the block is under way, and nothing is marked. One lock makes these one step.
//! 4. A target on a server, which may die with what it was told, has a block when a sync that began after the write has
//!    succeeded ([`KeptCopy::until_synced`]), and no later write of it waits for the next one.
//! 5. A source on a server ([`KeptCopy::from_server`]) may lose what guests have written, which the target has then: what was copied
//!    of it counts when a sync of the source that began after that has succeeded. What no guest has written since the first such
//!    sync counts at once.
//!
//! # Order, of a copy of the past
//! 1. The target has a block; a target on a server has its receipt ([`GivenMap`]); its bit is cleared; it is called old no more, and
//!    only then a guest's write to it goes on.
//! 2. Of a source on a server the map is live when a sync of the source that began after the moment has succeeded: what is old there
//!    stays as it was, whatever its server forgets.
//!
//! So a death between any two of these leaves a bit too many of a mirror, and never one of a backup whose block has changed.

use std::ops::Range;

use futures_util::future::LocalBoxFuture;
use infill_base::{Ctx, IoError, IoResult, align_down};
use infill_node::{Change, DirtyMap, Kept, Watcher, Watching};
use infill_storage::sync::atomic::{AtomicBool, Ordering};
use infill_storage::sync::{Arc, Mutex, MutexGuard, lock};

use super::given::{Hashes, Syncing};
use super::kept_map::KeptMap;
use super::{Failed, GivenMap, Transfer};
use crate::job::WorkEnd;
use crate::state::Operation;

/// The map of a copy, and what is under way.
pub(super) struct Keeping {
    pub(super) map: Arc<KeptMap>,
    under_way: Mutex<Vec<Range<u64>>>,
    /// What was written to the target since its last sync began, where that is not there to stay, or what was copied of a source
    /// since its last sync began, where that may go. Changed under the lock of what is under way.
    unsynced: Option<DirtyMap>,
    to_server: bool,
    /// Of a mirror or commit from a server: what guests have changed.
    changed: Option<DirtyMap>,
    from_server: bool,
    /// A sync of the source that began after the copy did has succeeded.
    source_synced: AtomicBool,
    /// Nobody keeps it true any more. Changed under the lock of what is under way.
    has_ended: AtomicBool,
    pub(super) given: Option<Arc<GivenMap>>,
}

/// What a sync covers.
#[derive(Debug, Default)]
pub(super) struct Given {
    ranges: Vec<Range<u64>>,
    receipts: Option<Syncing>,
}

/// A guest's change that is under way while this lives.
pub(super) struct UnderWay {
    transfer: Arc<Transfer>,
    range: Range<u64>,
    is_over: bool,
}

/// Who takes the guard of a map back.
type TakeBack = Box<dyn FnOnce(Watching)>;

/// The map of a copy, for whoever starts the copy. Dropped before the copy has ended, it says no more, for nobody keeps it true;
/// dropped before the copy has begun, its guard is given back, if somebody takes it ([`KeptCopy::given_back_to`]).
pub struct KeptCopy {
    map: Arc<KeptMap>,
    guard: Option<Watching>,
    take_back: Option<TakeBack>,
    until_synced: bool,
    from_server: bool,
    given: Option<Arc<GivenMap>>,
    since: Option<Arc<KeptMap>>,
    has_ended: bool,
}

impl std::fmt::Debug for KeptCopy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("KeptCopy").field(&self.map).finish()
    }
}

impl Drop for KeptCopy {
    fn drop(&mut self) {
        if self.has_ended {
            return;
        }
        match (self.guard.take(), self.take_back.take()) {
            (Some(guard), Some(take_back)) => take_back(guard),
            _ => self.map.remove(),
        }
    }
}

impl KeptCopy {
    /// A map that was begun for this copy.
    pub fn new(map: Arc<KeptMap>) -> KeptCopy {
        let (guard, until_synced, from_server, has_ended) = (None, false, false, false);
        KeptCopy {
            map,
            guard,
            take_back: None,
            until_synced,
            from_server,
            given: None,
            since: None,
            has_ended,
        }
    }

    /// A map that was found, and what has kept it true since.
    pub fn guarded(map: Arc<KeptMap>, guard: Watching) -> KeptCopy {
        let mut kept = KeptCopy::new(map);
        kept.guard = Some(guard);
        kept
    }

    /// A copy that does not begin gives its guard back, which keeps the map true for another attempt.
    pub fn given_back_to(mut self, take_back: impl FnOnce(Watching) + 'static) -> KeptCopy {
        self.take_back = Some(Box::new(take_back));
        self
    }

    /// What was written to the target is there to stay only when a sync has covered it. For mirrors and commits alone.
    pub fn until_synced(mut self, until_synced: bool) -> KeptCopy {
        self.until_synced = until_synced;
        self
    }

    /// What the source has is there to stay only when a sync has covered it.
    pub fn from_server(mut self, from_server: bool) -> KeptCopy {
        self.from_server = from_server;
        self
    }

    /// Whether the source may lose what no sync has covered.
    pub fn is_from_server(&self) -> bool {
        self.from_server
    }

    /// Receipts of what the target has: of a copy of the past to a server, or of one of a part of the disk.
    pub fn with_given(mut self, given: Option<Arc<GivenMap>>) -> KeptCopy {
        self.given = given;
        self
    }

    /// A map of what guests have written since a copy of the past began.
    pub fn with_since(mut self, since: Option<Arc<KeptMap>>) -> KeptCopy {
        self.since = since;
        self
    }

    /// The receipts.
    pub fn given(&self) -> Option<&Arc<GivenMap>> {
        self.given.as_ref()
    }

    /// What guests have written since it began, where that is kept.
    pub fn since(&self) -> Option<&Arc<KeptMap>> {
        self.since.as_ref()
    }

    /// The map.
    pub fn map(&self) -> &Arc<KeptMap> {
        &self.map
    }

    /// The copy itself keeps it true from here on.
    pub(super) fn take_over(&mut self) {
        self.guard = None;
    }

    /// The copy's worker has returned. `watching` are those that keep the map true.
    pub(super) fn end(&mut self, end: WorkEnd, watching: Option<Watching>) {
        self.has_ended = true;
        match end {
            // Whatever is still written before the node is closed is seen.
            WorkEnd::GoesOn => [watching, self.guard.take()].into_iter().flatten().for_each(std::mem::forget),
            WorkEnd::Succeeded | WorkEnd::Failed => self.map.remove(),
        }
    }
}

impl KeptCopy {
    /// As [`KeptCopy::end`], of a copy of the past. One that has succeeded stays true: who finds it before its end was noted ends at
    /// once. The map's owner removes it.
    pub(super) fn end_of_past(&mut self, end: WorkEnd, watching: Option<Watching>) {
        match end {
            WorkEnd::Succeeded => self.has_ended = true,
            end => self.end(end, watching),
        }
    }
}

/// Keeps a map that was found true while nobody copies: before its job begins again.
pub struct MapGuard {
    map: Arc<KeptMap>,
    /// Whether what is marked is what is still as it was.
    is_of_the_past: bool,
    since: Option<Arc<KeptMap>>,
}

/// Marks what guests write, before it may land.
pub(super) struct Since(pub(super) Arc<KeptMap>);

impl Watcher for Since {
    fn before<'a>(&'a self, _: &'a Ctx, change: &'a Change) -> Option<LocalBoxFuture<'a, IoResult<Kept>>> {
        self.0.mark(change.at, change.len);
        None
    }
}

impl MapGuard {
    /// Of a mirror or commit, or of a copy of the past.
    pub fn new(map: Arc<KeptMap>, is_of_the_past: bool) -> MapGuard {
        MapGuard { map, is_of_the_past, since: None }
    }

    /// Of a copy whose map of what was written since is kept true, too.
    pub fn with_since(self, since: Option<Arc<KeptMap>>) -> MapGuard {
        MapGuard { since, ..self }
    }
}

impl Watcher for MapGuard {
    fn before<'a>(&'a self, _: &'a Ctx, change: &'a Change) -> Option<LocalBoxFuture<'a, IoResult<Kept>>> {
        if let Some(since) = &self.since {
            since.mark(change.at, change.len);
        }
        if !self.is_of_the_past {
            self.map.mark(change.at, change.len);
        } else if self.map.has_marked(change.at, change.len) {
            // Nobody keeps what this overwrites. The moment is lost; the guest goes on.
            self.map.void();
        }
        None
    }
}

impl Keeping {
    /// Of a copy of the past.
    pub(super) fn of_past(kept: &KeptCopy) -> Keeping {
        Keeping {
            map: kept.map.clone(),
            under_way: Mutex::default(),
            unsynced: None,
            to_server: kept.until_synced,
            changed: None,
            from_server: kept.from_server,
            source_synced: AtomicBool::new(false),
            has_ended: AtomicBool::new(false),
            given: kept.given.clone(),
        }
    }

    /// Of a copy in pieces of so many bytes.
    pub(super) fn of(kept: &KeptCopy, piece: u64) -> Keeping {
        let map = || DirtyMap::new(kept.map.disk_bytes(), piece);
        let unsynced = (kept.until_synced || kept.from_server).then(map);
        let changed = kept.from_server.then(map);
        Keeping { unsynced, changed, ..Keeping::of_past(kept) }
    }

    fn begin(&self, range: Range<u64>) {
        let mut under_way = lock(&self.under_way);
        if let Some(changed) = &self.changed {
            changed.mark(range.start, range.end - range.start);
        }
        self.map.mark(range.start, range.end - range.start);
        under_way.push(range);
    }

    /// One change or piece of that range is under way no more.
    fn end(&self, range: &Range<u64>) -> MutexGuard<'_, Vec<Range<u64>>> {
        let mut under_way = lock(&self.under_way);
        if let Some(at) = under_way.iter().position(|other| other == range) {
            under_way.swap_remove(at);
        }
        under_way
    }

    /// A range was written to the target.
    fn written(&self, transfer: &Transfer, range: &Range<u64>) {
        let under_way = self.end(range);
        let (at, len) = (range.start, range.end - range.start);
        let may_go = self
            .changed
            .as_ref()
            .is_some_and(|changed| !self.source_synced.load(Ordering::SeqCst) || !changed.is_clean(at, len));
        match &self.unsynced {
            Some(unsynced) if self.to_server || may_go => unsynced.mark(at, len),
            _ => {
                self.clear(&under_way, transfer, range);
                self.is_there(range);
            }
        }
    }

    /// The target has a range to stay.
    fn is_there(&self, range: &Range<u64>) {
        if let Some(given) = &self.given {
            given.is_covered(range.start, range.end - range.start);
        }
    }

    /// Clears the bits of a range of which the target has all.
    fn clear(&self, under_way: &[Range<u64>], transfer: &Transfer, range: &Range<u64>) {
        let unit = self.map.granularity();
        let is_clean = |at: u64, end: u64| {
            !under_way.iter().any(|other| other.start < end && other.end > at)
                && self.unsynced.as_ref().is_none_or(|unsynced| unsynced.is_clean(at, end - at))
                && transfer.hot.is_clean(at, end - at)
                && transfer.cold.is_clean(at, end - at)
        };
        let (start, end) = (align_down(range.start, unit), range.end.next_multiple_of(unit));
        if is_clean(start, end) {
            return self.map.clear(start, end - start);
        }
        for at in (start..end).step_by(unit as usize) {
            if is_clean(at, at + unit) {
                self.map.clear(at, unit);
            }
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if let Some(keeping) = self.transfer.keeping.as_ref().filter(|_| !self.is_over) {
            drop(keeping.end(&self.range));
        }
    }
}

impl UnderWay {
    /// The target has it, too.
    pub(super) fn end_copied(mut self) {
        self.is_over = true;
        if let Some(keeping) = &self.transfer.keeping {
            keeping.written(&self.transfer, &self.range);
        }
    }
}

impl Transfer {
    /// The map is true from here on; one that was found says what is left to do. To be called when every change is seen.
    pub(super) fn begin_keeping(&self) {
        let Some(Keeping { map, .. }) = &self.keeping else { return };
        if map.is_found() {
            map.copy_into(&self.cold);
            self.walked().store(map.walked(), Ordering::Relaxed);
            return;
        }
        map.mark_all(&self.cold);
        map.set_walked(self.walked().load(Ordering::Relaxed));
        map.go_live();
    }

    /// As [`Transfer::begin_keeping`], of the past. What is old is known, and a new map that is to have `some` bits set has none
    /// yet; what was seen to be needed by a process before this one is copied, unless it is copied when it is overwritten.
    pub(super) fn begin_keeping_past(&self, some: bool, needed: bool) {
        let Some(Keeping { map, .. }) = &self.keeping else { return };
        if !map.is_found() {
            if some {
                map.mark_all(self.old());
            }
            map.set_walked(self.walked().load(Ordering::Relaxed));
            map.set_piece(self.piece);
            if !self.is_from_server() {
                map.go_live();
            }
            return;
        }
        let walked = map.walked();
        self.walked().store(walked, Ordering::Relaxed);
        let mut next = 0;
        while let Some(run) = self.old().next_dirty(next, u64::MAX).filter(|run| needed && run.start < walked)
        {
            self.cold.mark(run.start, run.end.min(walked) - run.start);
            next = run.end;
        }
    }

    /// Nobody keeps the map true any more.
    pub(super) fn end_keeping(&self) {
        if let Some(keeping) = &self.keeping {
            let _alone = lock(&keeping.under_way);
            keeping.has_ended.store(true, Ordering::SeqCst);
            keeping.map.void();
        }
    }

    /// Whether the source's server may lose what it has not synced, and a later process is to know.
    pub(super) fn is_from_server(&self) -> bool {
        self.keeping.as_ref().is_some_and(|keeping| keeping.from_server)
    }

    /// Whether it goes on where a process before this one was.
    pub(super) fn goes_on(&self) -> bool {
        self.keeping.as_ref().is_some_and(|keeping| keeping.map.is_found())
    }

    /// What processes before this one have copied, in bytes.
    pub(super) fn copied_before(&self) -> u64 {
        self.keeping.as_ref().filter(|_| self.goes_on()).map_or(0, |keeping| keeping.map.copied())
    }

    /// A guest's change is about to reach the source.
    pub(super) fn enter(self: &Arc<Transfer>, at: u64, len: u64) -> Option<UnderWay> {
        let keeping = self.keeping.as_ref()?;
        let (at, end) = self.whole(at, len);
        let range = at..end.max(at);
        keeping.begin(range.clone());
        Some(UnderWay { transfer: self.clone(), range, is_over: false })
    }

    /// The next piece to copy ([`Transfer::next_piece`]).
    pub(super) fn take(&self, next: &mut u64, max: u64, walked: bool) -> Option<Range<u64>> {
        let Some(keeping) = &self.keeping else { return self.next_piece(next, max, walked) };
        let mut under_way = lock(&keeping.under_way);
        let piece = self.next_piece(next, max, walked)?;
        under_way.push(piece.clone());
        Some(piece)
    }

    /// A piece that was taken is on the target; so many bytes were copied in all.
    pub(super) fn is_copied(&self, at: u64, len: u64, copied_bytes: u64) {
        let Some(keeping) = &self.keeping else { return };
        keeping.map.set_copied(copied_bytes);
        match self.is_of_the_past() {
            // What is old says it.
            true => drop(keeping.end(&(at..at + len))),
            false => keeping.written(self, &(at..at + len)),
        }
    }

    /// Whether something waits for a sync.
    pub(super) fn has_unsynced(&self) -> bool {
        let Some(keeping) = &self.keeping else { return false };
        keeping.unsynced.as_ref().is_some_and(|unsynced| unsynced.dirty_bytes() > 0)
            || keeping.given.as_ref().is_some_and(|given| given.has_unsynced())
            || (keeping.from_server && !keeping.source_synced.load(Ordering::SeqCst))
    }

    /// Whether so much waits that a sync should begin now.
    pub(super) fn wants_sync(&self) -> bool {
        let given = self.keeping.as_ref().and_then(|keeping| keeping.given.as_ref());
        given.is_some_and(|given| given.wants_sync())
    }

    /// Whether so much waits for a sync that is under way that the copy is to wait, too.
    pub(super) fn waits_for_sync(&self) -> bool {
        let given = self.keeping.as_ref().and_then(|keeping| keeping.given.as_ref());
        given.is_some_and(|given| given.is_full())
    }

    /// What a sync of the target, and of the source where it may lose something, that begins now covers.
    pub(super) fn begin_sync(&self) -> Given {
        let Some(keeping) = &self.keeping else { return Given::default() };
        let receipts = keeping.given.as_ref().map(|given| given.begin_sync());
        let Some(unsynced) = &keeping.unsynced else { return Given { receipts, ..Given::default() } };
        let _alone = lock(&keeping.under_way);
        Given { ranges: std::iter::from_fn(|| unsynced.take_next(0, u64::MAX)).collect(), receipts }
    }

    /// Syncs the source, where something relies on that, unless guests are `held`, who would wait for it. Whether what relies on it can.
    pub(super) async fn sync_source(&self, held: bool) -> bool {
        let needed = |keeping: &Keeping| {
            keeping.from_server
                && (keeping.changed.is_some() || !keeping.source_synced.load(Ordering::SeqCst))
        };
        // A sync of it that fails is its guests' matter.
        match self.keeping.as_ref().is_some_and(needed) {
            true => !held && self.source.sync(&Ctx::FILL).await.is_ok(),
            false => true,
        }
    }

    /// That sync has ended: of the target, and of the source.
    pub(super) fn end_sync(&self, covered: Given, target: bool, source: bool) {
        let Some(keeping) = &self.keeping else { return };
        if let Some(receipts) = covered.receipts {
            receipts.end(target);
        }
        if source && keeping.from_server && !keeping.source_synced.swap(true, Ordering::SeqCst) {
            let _alone = lock(&keeping.under_way);
            // One that was found is live, or was made void.
            let begins = self.is_of_the_past() && !keeping.map.is_found();
            if begins && !keeping.has_ended.load(Ordering::SeqCst) {
                keeping.map.go_live();
            }
        }
        for range in covered.ranges {
            // Guests do not wait for all of it.
            let under_way = lock(&keeping.under_way);
            match &keeping.unsynced {
                Some(unsynced) if !(target && source) => unsynced.mark(range.start, range.end - range.start),
                _ => {
                    keeping.clear(&under_way, self, &range);
                    keeping.is_there(&range);
                }
            }
        }
    }

    /// Whether what is written has receipts.
    pub(super) fn has_receipts(&self) -> bool {
        self.is_of_the_past() && self.keeping.as_ref().is_some_and(|keeping| keeping.given.is_some())
    }

    /// Of the past: the target has a piece, of which a later process is to know whether it still has it.
    pub(super) async fn note_given(&self, at: u64, len: u64, hashes: Hashes) -> Result<(), Failed> {
        let Some(given) = self.keeping.as_ref().and_then(|keeping| keeping.given.as_ref()) else {
            return Ok(());
        };
        loop {
            let others = given.synced().listen();
            if given.note(at, len, hashes) {
                return Ok(());
            }
            let receipts = given.begin_sync();
            if receipts.is_empty() {
                // All that there are have their syncs under way: they end, or are given up.
                drop(receipts);
                others.await;
                continue;
            }
            // Nobody else may be there to do it: a paused job keeps old bytes, too.
            let synced = self.target.sync(&Ctx::FILL).await;
            receipts.end(synced.is_ok());
            synced.map_err(|error: IoError| Failed { operation: Operation::Write, error })?;
        }
    }

    /// A piece that was taken could not be copied, and is to be taken again.
    pub(super) fn put_back(&self, at: u64, len: u64) {
        self.hot.mark(at, len);
        self.is_left_out(at, len);
    }

    /// A piece that was taken could not be copied, and is left as it is.
    pub(super) fn is_left_out(&self, at: u64, len: u64) {
        if let Some(keeping) = &self.keeping {
            drop(keeping.end(&(at..at + len)));
        }
    }

    /// The range is to be copied because it lies on the source.
    pub(super) fn mark_cold(&self, at: u64, len: u64) {
        // In this order: a bit that is cleared between the two is set again.
        let (at, end) = self.whole(at, len);
        self.cold.mark(at, end.saturating_sub(at));
        if let Some(keeping) = &self.keeping {
            keeping.map.mark(at, end.saturating_sub(at));
        }
    }

    /// The disk was looked through up to there.
    pub(super) fn set_walked(&self, end: u64) {
        self.walked().store(end, Ordering::Relaxed);
        if let Some(keeping) = &self.keeping {
            keeping.map.set_walked(end);
        }
    }

    /// Bytes that are kept together, of a copy of the past: where one of them may be written to, all are on the target.
    pub(super) fn unit(&self) -> u64 {
        self.keeping.as_ref().map_or(self.piece, |keeping| keeping.map.granularity().max(self.piece))
    }

    /// Start and end of the pieces that a range touches, on the disk.
    pub(super) fn whole(&self, at: u64, len: u64) -> (u64, u64) {
        let end = at.saturating_add(len).min(self.len).next_multiple_of(self.piece);
        (align_down(at, self.piece), end.min(self.len))
    }

    /// Of the past: the target has the range, or need not have it. It is old no more.
    pub(super) fn is_kept(&self, at: u64, len: u64) {
        let Some(keeping) = &self.keeping else {
            self.old().clear(at, len);
            return;
        };
        // One at a time: else of two that share a bit neither would clear it.
        let _alone = lock(&keeping.under_way);
        let (unit, end) = (keeping.map.granularity(), at + len);
        let is_new = |at: u64, end: u64| self.old().is_clean(at, end.saturating_sub(at));
        let first = align_down(at, unit);
        let start = if is_new(first, at) { first } else { first + unit };
        let last = end.next_multiple_of(unit);
        let stop = if is_new(end, last) { last } else { last - unit };
        keeping.map.clear(start, stop.saturating_sub(start));
        self.old().clear(at, len);
    }
}
