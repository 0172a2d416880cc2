//! The writes of one disk at the source: how many are in flight, and which blocks they have made dirty since the target
//! may have read them.
//!
//! The rule that everything else rests on: a bit is set *after* its write has landed, also when the write failed, and
//! *before* the write is answered. Set only earlier, the end of a round could take the bit away, the target copy the
//! old bytes, and then the write land, known to nobody. The types say so: [`Writes::begin`] gives a [`Writing`], and
//! only [`Writes::landed`] makes the [`Answer`] of it without which nothing is to be answered. Writes are counted from
//! the first one, not from the start of the bitmap: one that is in flight then lands after the target has read.
//!
//! Closing a round gives the dirty blocks away to be sent, and keeps them until the target has *applied* them: whatever
//! is not known to be applied is in the residual. A `Writing` that is lost, because its future was dropped, keeps the
//! disk from draining, so that no freeze succeeds over a write that may still land.
//!
//! Without a bitmap a write costs a counter.

use std::ops::Range;

use crate::fault::{Fault, Planted};
use crate::ids::{ROUNDS_MAX, Round};
use crate::set::BlockSet;

/// The writes of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Writes {
    blocks: u64,
    in_flight: u64,
    bitmap: Option<Bitmap>,
    planted: Planted,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Bitmap {
    /// The round that the target is told to read now.
    round: Round,
    recording: BlockSet,
    /// What was sent with `round` and is not known to be applied.
    unapplied: BlockSet,
}

/// A write that may not have landed yet.
#[derive(Debug)]
#[must_use = "a write that is never told to have landed keeps the disk from being frozen"]
#[cfg_attr(feature = "planted-faults", derive(Clone, PartialEq, Eq, Hash))]
pub struct Writing(Range<u64>);

/// The permission to answer a write.
#[derive(Debug)]
#[must_use = "the write is to be answered now"]
pub struct Answer(());

/// Writes are in flight: the residual is not known yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotDrained {
    /// How many.
    pub in_flight: u64,
}

impl Writes {
    /// Of a disk of so many blocks; nothing is recorded yet.
    pub fn new(blocks: u64) -> Writes {
        Writes { blocks, in_flight: 0, bitmap: None, planted: Planted::default() }
    }

    /// Makes a mistake.
    #[cfg(feature = "planted-faults")]
    pub fn plant(&mut self, fault: Option<Fault>) {
        self.planted = Planted::new(fault);
    }

    /// Starts a clean bitmap, of the first round. Only after that may the target read.
    pub fn start(&mut self) {
        let empty = BlockSet::empty(self.blocks);
        self.bitmap = Some(Bitmap { round: Round(1), recording: empty.clone(), unapplied: empty });
    }

    /// Drops the bitmap: the disk has changed hands, or will not.
    pub fn stop(&mut self) {
        self.bitmap = None;
    }

    /// A write of these blocks is about to begin.
    pub fn begin(&mut self, blocks: Range<u64>) -> Writing {
        if self.planted.is(Fault::DirtyBeforeLanded)
            && let Some(bitmap) = &mut self.bitmap
        {
            bitmap.recording.insert_range(blocks.clone());
        }
        self.in_flight += 1;
        Writing(blocks)
    }

    /// The write is over, by success or failure: the storage does not touch these blocks for it any more.
    pub fn landed(&mut self, writing: Writing) -> Answer {
        if !self.planted.is(Fault::DirtyBeforeLanded)
            && let Some(bitmap) = &mut self.bitmap
        {
            bitmap.recording.insert_range(writing.0);
        }
        self.in_flight = self.in_flight.saturating_sub(1);
        Answer(())
    }

    /// How many have begun and not landed.
    pub fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// Ends a round: gives what the target must demote before it reads the next one. Sets that were closed earlier and
    /// are not known to be applied are in it again. `None` without a bitmap, and when no further round is possible.
    pub fn close_round(&mut self) -> Option<BlockSet> {
        let bitmap = self.bitmap.as_mut().filter(|bitmap| bitmap.round.0 < ROUNDS_MAX)?;
        bitmap.round = Round(bitmap.round.0 + 1);
        let recorded = std::mem::replace(&mut bitmap.recording, BlockSet::empty(self.blocks));
        bitmap.unapplied.union(&recorded);
        let dirty = bitmap.unapplied.clone();
        if self.planted.is(Fault::DropsUnappliedRound) {
            bitmap.unapplied = BlockSet::empty(self.blocks);
        }
        Some(dirty)
    }

    /// The target has demoted, durably, what began `round`.
    pub fn applied(&mut self, round: Round) {
        if let Some(bitmap) = self.bitmap.as_mut().filter(|bitmap| bitmap.round == round) {
            bitmap.unapplied = BlockSet::empty(self.blocks);
        }
    }

    /// How many blocks a round that is closed now would give; 0 without a bitmap.
    pub fn dirty_blocks(&self) -> u64 {
        self.bitmap.as_ref().map_or(0, |bitmap| {
            let mut dirty = bitmap.recording.clone();
            dirty.union(&bitmap.unapplied);
            dirty.count()
        })
    }

    /// What the target may hold stale, once no write is in flight; empty without a bitmap, under which nothing was
    /// copied. The bitmap keeps it, and goes on recording: after a withdraw it is still true.
    pub fn residual(&self) -> Result<BlockSet, NotDrained> {
        if self.in_flight > 0 {
            return Err(NotDrained { in_flight: self.in_flight });
        }
        let Some(bitmap) = &self.bitmap else {
            return Ok(BlockSet::empty(self.blocks));
        };
        let mut residual = bitmap.recording.clone();
        residual.union(&bitmap.unapplied);
        Ok(residual)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(set: &BlockSet) -> Vec<u64> {
        set.iter().collect()
    }

    fn recording() -> Writes {
        let mut writes = Writes::new(8);
        writes.start();
        writes
    }

    #[test]
    fn a_write_that_lands_in_the_next_round_is_dirty_in_the_next_round() {
        let mut writes = recording();
        let writing = writes.begin(2..4);
        assert!(writes.close_round().unwrap().is_empty());
        writes.applied(Round(2));
        assert_eq!(writes.residual(), Err(NotDrained { in_flight: 1 }));
        let _answer = writes.landed(writing);
        assert_eq!(blocks(&writes.close_round().unwrap()), [2, 3]);
    }

    #[test]
    fn a_write_that_is_in_flight_when_the_bitmap_starts_is_dirty() {
        let mut writes = Writes::new(8);
        let writing = writes.begin(3..4);
        writes.start();
        let _answer = writes.landed(writing);
        assert_eq!(blocks(&writes.residual().unwrap()), [3]);
    }

    #[test]
    fn what_is_not_applied_is_sent_again_and_is_residual() {
        let mut writes = recording();
        let writing = writes.begin(1..2);
        let _answer = writes.landed(writing);
        assert_eq!(blocks(&writes.close_round().unwrap()), [1]);
        let writing = writes.begin(5..6);
        let _answer = writes.landed(writing);
        assert_eq!(blocks(&writes.residual().unwrap()), [1, 5]);
        assert_eq!(blocks(&writes.close_round().unwrap()), [1, 5]);
        // A late word about the round before does not take away what this one brought.
        writes.applied(Round(2));
        assert_eq!(blocks(&writes.residual().unwrap()), [1, 5]);
        writes.applied(Round(3));
        assert!(writes.residual().unwrap().is_empty());
    }

    #[test]
    fn a_write_that_is_forgotten_keeps_the_disk_from_being_frozen() {
        let mut writes = Writes::new(8);
        drop(writes.begin(0..1));
        assert_eq!(writes.residual(), Err(NotDrained { in_flight: 1 }));
        assert_eq!(writes.in_flight(), 1);
    }

    #[test]
    fn rounds_end_at_their_limit() {
        let mut writes = recording();
        let rounds = std::iter::from_fn(|| writes.close_round()).count();
        assert_eq!(rounds, usize::from(ROUNDS_MAX) - 1);
        writes.stop();
        assert!(writes.close_round().is_none());
    }
}
