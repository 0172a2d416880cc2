//! What a copy knows of itself, shared with those who watch the source.

use std::ops::Range;

use event_listener::Event;
use infill_base::{Ctx, ExtentKind, IoError, IoResult, WriteFlags, ZeroFlags, align_down};
use infill_node::generic::{chain_extents, chain_map};
use infill_node::{BackingSlot, CompressNode, DirtyMap, Filter as _, NodeHandle};
use infill_storage::RangeLock;
use infill_storage::sync::Arc;
use infill_storage::sync::atomic::{AtomicU64, Ordering};

use super::given::Hashes;
use super::keeping::{Keeping, KeptCopy};
use crate::control::REQUEST_BYTES_MAX;
use crate::state::Operation;

/// What one bit of a copy's maps stands for at least: the smallest thing that is copied, in bytes ([`piece_bytes`]).
pub const BLOCK_BYTES: u64 = 4096;

/// How much of the disk is mapped at a time, in bytes.
const MAP_STRIDE_BYTES: u64 = 256 << 20;

/// Layers that are followed below a node.
const CHAIN_LAYERS_MAX: usize = 512;

/// What of the source is copied at first.
#[derive(Clone, Debug)]
pub enum Scope {
    /// All of the disk as it reads.
    Full,
    /// What the chain holds above this node (commit), or the top layer alone holds (with the node below it).
    Above(NodeHandle),
    /// Nothing; only what is marked by others.
    Nothing,
}

/// One half of a copy failed.
#[derive(Clone, Debug)]
pub struct Failed {
    /// Reading the source, or writing the target.
    pub operation: Operation,
    /// Why.
    pub error: IoError,
}

fn read_failed(error: IoError) -> Failed {
    Failed { operation: Operation::Read, error }
}

fn write_failed(error: IoError) -> Failed {
    Failed { operation: Operation::Write, error }
}

/// What one bit of the maps of a copy to `target` stands for, in bytes.
///
/// A piece of a cluster has the target write all of it, and what lies below it is asked for the rest. A target that is open
/// without what it is to lie on later has zeroes there, which would hide that: of such a one whole (sub)clusters are copied.
/// Not where all of the disk is copied anyway, and not in a commit, whose layers show zeroes there, too. What is compressed is
/// compressed in whole clusters.
pub fn piece_bytes(target: &NodeHandle, scope: &Scope) -> u64 {
    let (layer, is_commit) =
        (target.unfiltered(), matches!(scope, Scope::Above(base) if base.is_same(target)));
    if target.info().driver == CompressNode::DRIVER {
        return layer.info().cluster_bytes.unwrap_or(0).next_power_of_two().max(BLOCK_BYTES);
    }
    if matches!(scope, Scope::Full) || is_commit || layer.backing().is_none_or(BackingSlot::is_some) {
        return BLOCK_BYTES;
    }
    layer.populate_unit().next_power_of_two().max(BLOCK_BYTES)
}

/// Whether what is absent on `target` reads as zero, and will once it is opened with what its header names.
fn is_absent_zero(target: &NodeHandle) -> bool {
    let layer = target.unfiltered();
    layer.backing().is_none_or(BackingSlot::is_some) || layer.info().backing.is_none()
}

/// A copy of one node to another.
pub struct Transfer {
    /// Where it is read.
    pub source: NodeHandle,
    /// Where it is written.
    pub target: NodeHandle,
    /// Bytes of the disk that are copied.
    pub len: u64,
    /// What is copied together: [`piece_bytes`].
    pub(super) piece: u64,
    /// Blocks to be copied because they lie on the source.
    pub cold: DirtyMap,
    /// Blocks to be copied because they were changed since.
    pub hot: DirtyMap,
    /// Held for a range while it is written to the target.
    pub ranges: RangeLock,
    /// Blocks whose content of the past is on the source alone, where it is the past that is copied. Taken out, under the
    /// lock of their range, when the target has it.
    old: Option<DirtyMap>,
    /// Fires when something was marked hot.
    pub marked: Event,
    /// Whether zeroes may become holes on the target.
    unmap: bool,
    scope: Scope,
    walked: AtomicU64,
    /// What a process after this one finds of it.
    pub(super) keeping: Option<Keeping>,
    /// What was written to the target by the copy alone, for those who count.
    pub written_bytes: AtomicU64,
}

impl std::fmt::Debug for Transfer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Transfer({:?} to {:?}: {:?}, {:?})", self.source, self.target, self.cold, self.hot)
    }
}

impl Transfer {
    /// Nothing is copied yet.
    pub fn new(source: NodeHandle, target: NodeHandle, scope: Scope, unmap: bool) -> Arc<Transfer> {
        Transfer::kept(source, target, scope, unmap, None)
    }

    /// As [`Transfer::new`]; what is left to do is in a map, too, from [`Transfer::begin_keeping`] on.
    pub(super) fn kept(
        source: NodeHandle,
        target: NodeHandle,
        scope: Scope,
        unmap: bool,
        kept: Option<&KeptCopy>,
    ) -> Arc<Transfer> {
        let keeping = kept.map(|kept| Keeping::of(kept, piece_bytes(&target, &scope)));
        Arc::new(Transfer::of(source, target, scope, unmap, None, keeping))
    }

    /// A copy of the source as it is now, whatever is written there later: `old` is what is to be copied of it, at
    /// [`piece_bytes`].
    pub fn of_the_past(source: NodeHandle, target: NodeHandle, scope: Scope, old: DirtyMap) -> Arc<Transfer> {
        Transfer::of_the_kept_past(source, target, scope, old, None)
    }

    /// As [`Transfer::of_the_past`]; what is old is in a map, too, from [`Transfer::begin_keeping`] on.
    pub(super) fn of_the_kept_past(
        source: NodeHandle,
        target: NodeHandle,
        scope: Scope,
        old: DirtyMap,
        kept: Option<&KeptCopy>,
    ) -> Arc<Transfer> {
        // Zeroes given up on a target whose header names a backing that is not attached would show that one later.
        let unmap = match target.unfiltered().backing() {
            Some(slot) if !slot.is_some() => target.info().backing.is_none(),
            _ => true,
        };
        Arc::new(Transfer::of(source, target, scope, unmap, Some(old), kept.map(Keeping::of_past)))
    }

    fn of(
        source: NodeHandle,
        target: NodeHandle,
        scope: Scope,
        unmap: bool,
        old: Option<DirtyMap>,
        keeping: Option<Keeping>,
    ) -> Transfer {
        let (len, piece) = (source.len(), piece_bytes(&target, &scope));
        let walked = AtomicU64::new(if matches!(scope, Scope::Nothing) { len } else { 0 });
        Transfer {
            old,
            cold: DirtyMap::new(len, piece),
            hot: DirtyMap::new(len, piece),
            ranges: RangeLock::new(),
            marked: Event::new(),
            source,
            target,
            len,
            piece,
            unmap,
            scope,
            walked,
            keeping,
            written_bytes: AtomicU64::new(0),
        }
    }

    /// Whether it is the source as it was that is copied.
    pub(super) fn is_of_the_past(&self) -> bool {
        self.old.is_some()
    }

    /// What is old, of a copy of the past.
    pub fn old(&self) -> &DirtyMap {
        self.old.as_ref().unwrap_or(&self.cold)
    }

    /// Whether something of the range is old.
    pub fn has_old(&self, at: u64, end: u64) -> bool {
        !self.old().is_clean(at, end.saturating_sub(at))
    }

    pub(super) fn walked(&self) -> &AtomicU64 {
        &self.walked
    }

    /// Somebody has changed the range: it is copied at the end.
    pub fn mark(&self, at: u64, len: u64) {
        // In this order: between the two it is in both, never in none.
        self.hot.mark(at, len);
        self.cold.clear(at, len);
        self.marked.notify(usize::MAX);
    }

    pub(crate) fn left_bytes(&self) -> u64 {
        self.cold.dirty_bytes() + self.hot.dirty_bytes()
    }

    pub(crate) fn cold_bytes(&self) -> u64 {
        self.cold.dirty_bytes()
    }

    pub(crate) fn unwalked_bytes(&self) -> u64 {
        self.len - self.walked.load(Ordering::Relaxed).min(self.len)
    }

    /// The next piece to copy, of at most `max` bytes, from `next` on: cold ones first, hot ones when no cold one is to
    /// come (`walked`).
    pub(super) fn next_piece(&self, next: &mut u64, max: u64, walked: bool) -> Option<Range<u64>> {
        let around = |map: &DirtyMap| map.take_next(*next, max).or_else(|| map.take_next(0, max));
        let piece = around(&self.cold).or_else(|| if walked { around(&self.hot) } else { None })?;
        *next = piece.end;
        Some(piece)
    }

    /// Looks at the next part of the disk, and marks what is to be copied. `false` at the end.
    ///
    /// What reads as zero on both is nothing to do. Dropped in the middle, it has changed nothing.
    pub(crate) async fn walk(&self) -> Result<bool, Failed> {
        let at = self.walked.load(Ordering::Relaxed);
        if at >= self.len {
            return Ok(false);
        }
        let stride = MAP_STRIDE_BYTES.min(self.len - at);
        let runs = self.runs(at, stride).await.map_err(read_failed)?;
        let seen = runs.last().map_or(at, |(run, _)| run.end);
        if seen <= at {
            let why = IoError::new(infill_base::ErrorKind::Io, "the source gave no extents").at(at, stride);
            return Err(read_failed(why));
        }
        let zero = self.target_zeroes(at, seen).await.map_err(write_failed)?;
        let mut needed = Vec::new();
        for (run, what) in runs {
            match what {
                What::Data => needed.push(run),
                What::Zero => needed.extend(without(&run, &zero)),
                What::Nothing => {}
            }
        }
        let end = match &self.old {
            None => {
                needed.iter().for_each(|run| self.mark_cold(run.start, run.end - run.start));
                seen
            }
            Some(old) => self.note_old(old, at, seen, &needed),
        };
        self.set_walked(end);
        Ok(end < self.len)
    }

    /// Of the past, in `[at, seen)`: what is `needed` is to be copied where it is still old, and the rest need not be
    /// kept. Where a piece is still old nobody has written to it, so that what was seen of it is how it was. Gives how
    /// far that went, in whole pieces.
    fn note_old(&self, old: &DirtyMap, at: u64, seen: u64, needed: &[Range<u64>]) -> u64 {
        let mut end = if seen < self.len { align_down(seen, self.piece) } else { self.len };
        let piece = at..(at + self.piece).min(self.len);
        let mut needed = needed.to_vec();
        if end <= at {
            // Not even a piece was seen: it is copied, whatever it is.
            end = piece.end;
            needed = vec![piece];
        }
        let mut next = at;
        for run in &needed {
            let start = align_down(run.start, self.piece).max(next);
            let stop = run.end.next_multiple_of(self.piece).min(end);
            if start >= stop {
                continue;
            }
            self.is_kept(next, start - next);
            next = start;
            while let Some(part) = old.next_dirty(next, stop - next).filter(|part| part.start < stop) {
                self.cold.mark(part.start, part.end.min(stop) - part.start);
                next = part.end.min(stop);
            }
            next = stop;
        }
        self.is_kept(next, end - next);
        end
    }

    /// What the source has from `at` on.
    async fn runs(&self, at: u64, len: u64) -> IoResult<Vec<(Range<u64>, What)>> {
        let depth = match &self.scope {
            Scope::Nothing => return Ok(vec![(at..at + len, What::Nothing)]),
            Scope::Full => usize::MAX,
            Scope::Above(base) => depth_of(&self.source, base)?,
        };
        let mapped = chain_map(&self.source, &Ctx::FILL, at, len).await?;
        let what = |mapped: &infill_node::generic::MappedExtent| match mapped.extent.kind {
            _ if mapped.depth >= depth => What::Nothing,
            ExtentKind::Data => What::Data,
            // Absent: behind the end of a layer above the base, or where nothing lies below.
            ExtentKind::Zero | ExtentKind::Absent => What::Zero,
        };
        Ok(mapped.iter().map(|run| (run.extent.start..run.extent.end(), what(run))).collect())
    }

    /// Where the target reads as zero already, and will on what its header names.
    async fn target_zeroes(&self, at: u64, end: u64) -> IoResult<Vec<Range<u64>>> {
        let end = end.min(self.target.len());
        if at >= end {
            return Ok(Vec::new());
        }
        let mapped = chain_map(&self.target, &Ctx::FILL, at, end - at).await?;
        let absent_is_zero = is_absent_zero(&self.target);
        let zero = mapped.iter().map(|run| &run.extent).filter(|extent| match extent.kind {
            ExtentKind::Zero => true,
            ExtentKind::Absent => absent_is_zero,
            ExtentKind::Data => false,
        });
        Ok(zero.map(|extent| extent.start..extent.end()).collect())
    }

    /// Copies the range as it reads now (of the past: what is old of it), with nobody else writing it to the target
    /// meanwhile.
    pub async fn copy(&self, cx: &Ctx, at: u64, len: u64) -> Result<(), Failed> {
        let _range = self.ranges.exclusive(at, at + len).await;
        let Some(old) = &self.old else { return self.copy_held(cx, at, len).await };
        let (mut next, end) = (at, at + len);
        while let Some(run) = old.next_dirty(next, end - next).filter(|run| run.start < end) {
            let (start, stop) = (run.start.max(next), run.end.min(end));
            self.copy_held(cx, start, stop - start).await?;
            self.is_kept(start, stop - start);
            next = stop;
        }
        Ok(())
    }

    /// As [`Transfer::copy`], for a caller who holds the range.
    pub async fn copy_held(&self, cx: &Ctx, at: u64, len: u64) -> Result<(), Failed> {
        let extents = chain_extents(&self.source, cx, at, len).await.map_err(read_failed)?;
        for extent in extents {
            if extent.kind == ExtentKind::Zero {
                let flags = if self.unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
                let zeroed = self.target.write_zeroes(cx, extent.start, extent.len, flags).await;
                zeroed.map_err(write_failed)?;
                let mut next = extent.start;
                while self.has_receipts() && next < extent.end() {
                    let bytes = REQUEST_BYTES_MAX.min(extent.end() - next);
                    self.note_given(next, bytes, Hashes::of_zeroes(bytes)).await?;
                    next += bytes;
                }
                continue;
            }
            // A piece may be a cluster of many MiB.
            let (mut next, end) = (extent.start, extent.end());
            while next < end {
                let bytes = REQUEST_BYTES_MAX.min(end - next);
                let data = self.source.read_vec(cx, next, bytes as usize).await.map_err(read_failed)?;
                let hashes = self.has_receipts().then(|| Hashes::of(&data));
                let written = self.target.write(cx, next, data.freeze(), WriteFlags::empty()).await;
                written.map_err(write_failed)?;
                if let Some(hashes) = hashes {
                    self.note_given(next, bytes, hashes).await?;
                }
                self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
                next += bytes;
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Data,
    Zero,
    Nothing,
}

/// How many layers `base` lies below `top`.
fn depth_of(top: &NodeHandle, base: &NodeHandle) -> IoResult<usize> {
    let layers = std::iter::successors(Some(top.unfiltered()), NodeHandle::layer_below);
    layers.take(CHAIN_LAYERS_MAX).position(|layer| layer.is_same(&base.unfiltered())).ok_or_else(|| {
        let why = format!("{} is not in the chain of {} any more", base.info().filename, top.info().filename);
        IoError::new(infill_base::ErrorKind::NotFound, why)
    })
}

/// The parts of `run` that lie in none of `holes`, which are in order.
fn without(run: &Range<u64>, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let (mut parts, mut next) = (Vec::new(), run.start);
    for hole in holes.iter().filter(|hole| hole.end > run.start && hole.start < run.end) {
        if hole.start > next {
            parts.push(next..hole.start);
        }
        next = next.max(hole.end);
    }
    if next < run.end {
        parts.push(next..run.end);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_zero_on_both_is_left_out() {
        assert_eq!(without(&(10..50), &[0..12, 20..30, 45..60]), [12..20, 30..45]);
        assert_eq!(without(&(10..50), &[0..10, 50..60]).first(), Some(&(10..50)));
        assert!(without(&(10..50), &[0..30, 30..100]).is_empty());
    }
}
