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
//!
//! # Order, of a copy of the past
//! 1. The target has a block; its bit is cleared; it is called old no more, and only then a guest's write to it goes on.
//!
//! So a death between any two of these leaves a bit too many of a mirror, and never one of a backup whose block has changed.

use std::ops::Range;

use futures_util::future::LocalBoxFuture;
use infill_base::{Ctx, IoResult, align_down};
use infill_node::{Change, DirtyMap, Kept, Watcher, Watching};
use infill_storage::sync::atomic::Ordering;
use infill_storage::sync::{Arc, Mutex, MutexGuard, lock};

use super::Transfer;
use super::kept_map::KeptMap;
use crate::job::WorkEnd;

/// The map of a copy, and what is under way.
pub(super) struct Keeping {
    pub(super) map: Arc<KeptMap>,
    under_way: Mutex<Vec<Range<u64>>>,
    /// What was written to the target since its last sync began, where that is not there to stay. Changed under the lock of
    /// what is under way.
    unsynced: Option<DirtyMap>,
}

/// A guest's change that is under way while this lives.
pub(super) struct UnderWay {
    transfer: Arc<Transfer>,
    range: Range<u64>,
    is_over: bool,
}

/// The map of a copy, for whoever starts the copy. Dropped before the copy has ended, it says no more: nobody keeps it true.
pub struct KeptCopy {
    map: Arc<KeptMap>,
    guard: Option<Watching>,
    until_synced: bool,
    has_ended: bool,
}

impl std::fmt::Debug for KeptCopy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("KeptCopy").field(&self.map).finish()
    }
}

impl Drop for KeptCopy {
    fn drop(&mut self) {
        if !self.has_ended {
            self.map.remove();
        }
    }
}

impl KeptCopy {
    /// A map that was begun for this copy.
    pub fn new(map: Arc<KeptMap>) -> KeptCopy {
        KeptCopy { map, guard: None, until_synced: false, has_ended: false }
    }

    /// A map that was found, and what has kept it true since.
    pub fn guarded(map: Arc<KeptMap>, guard: Watching) -> KeptCopy {
        KeptCopy { map, guard: Some(guard), until_synced: false, has_ended: false }
    }

    /// What was written to the target is there to stay only when a sync has covered it. For mirrors and commits alone.
    pub fn until_synced(mut self, until_synced: bool) -> KeptCopy {
        self.until_synced = until_synced;
        self
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
}

impl MapGuard {
    /// Of a mirror or commit, or of a copy of the past.
    pub fn new(map: Arc<KeptMap>, is_of_the_past: bool) -> MapGuard {
        MapGuard { map, is_of_the_past }
    }
}

impl Watcher for MapGuard {
    fn before<'a>(&'a self, _: &'a Ctx, change: &'a Change) -> Option<LocalBoxFuture<'a, IoResult<Kept>>> {
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
    pub(super) fn new(map: Arc<KeptMap>) -> Keeping {
        Keeping { map, under_way: Mutex::default(), unsynced: None }
    }

    /// Of a copy in pieces of so many bytes.
    pub(super) fn of(kept: &KeptCopy, piece: u64) -> Keeping {
        let unsynced = kept.until_synced.then(|| DirtyMap::new(kept.map.disk_bytes(), piece));
        Keeping { unsynced, ..Keeping::new(kept.map.clone()) }
    }

    fn begin(&self, range: Range<u64>) {
        let mut under_way = lock(&self.under_way);
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
        match &self.unsynced {
            Some(unsynced) => unsynced.mark(range.start, range.end - range.start),
            None => self.clear(&under_way, transfer, range),
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
            map.go_live();
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
            keeping.map.void();
        }
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

    /// Whether something waits for a sync of the target.
    pub(super) fn has_unsynced(&self) -> bool {
        let unsynced = self.keeping.as_ref().and_then(|keeping| keeping.unsynced.as_ref());
        unsynced.is_some_and(|unsynced| unsynced.dirty_bytes() > 0)
    }

    /// What a sync of the target that begins now covers.
    pub(super) fn begin_sync(&self) -> Vec<Range<u64>> {
        let Some(keeping) = &self.keeping else { return Vec::new() };
        let Some(unsynced) = &keeping.unsynced else { return Vec::new() };
        let _alone = lock(&keeping.under_way);
        std::iter::from_fn(|| unsynced.take_next(0, u64::MAX)).collect()
    }

    /// That sync has succeeded.
    pub(super) fn end_sync(&self, covered: &[Range<u64>]) {
        let Some(keeping) = &self.keeping else { return };
        for range in covered {
            // Guests do not wait for all of it.
            let under_way = lock(&keeping.under_way);
            keeping.clear(&under_way, self, range);
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
