//! Keeps a dirty bitmap in memory that outlives the process, so that the next one has it.
//!
//! What is kept says at least what the bitmap says, at the same granularity or a coarser one.
//!
//! # Order
//! 1. A change counts as *under way* and is marked in what is kept, then it reaches the disk; it is marked in the bitmap, and
//!    only then under way no more.
//! 2. What makes the bitmap say less counts itself ([`Keeper::shrinks`]) and leaves what is kept as it is. Once whatever has led
//!    to that is noted for the next process, the owner has what is kept follow ([`Keeper::follow`]): a block is cleared where
//!    the bitmap has nothing marked and nothing is under way.
//!
//! So a death between any two of these leaves a mark too many, and never one too few.

use std::fmt;
use std::ops::Range;

use infill_base::align_down;
use infill_storage::sync::{Arc, Mutex, lock};

use crate::DirtyMap;

/// Blocks that are looked at in one step while what is kept follows the bitmap: changes wait as long.
const STEP_BLOCKS: u64 = 64 << 10;

/// Bits in memory that outlives the process.
pub trait KeptBits: Send + Sync {
    /// Bytes that one bit stands for, a power of two.
    fn granularity(&self) -> u64;
    /// Sets the bit of every block that the range touches.
    fn mark(&self, at: u64, len: u64);
    /// Clears the bit of every block that the range touches.
    fn clear(&self, at: u64, len: u64);
    /// They are not kept true any more: nobody is to find them.
    fn void(&self);
}

#[derive(Default)]
struct State {
    under_way: Vec<Range<u64>>,
    /// How often the bitmap was made to say less.
    shrinks: u64,
    /// Up to which of these the kept bits have followed.
    followed: u64,
}

/// Keeps one bitmap.
pub(crate) struct Keeper {
    bits: Arc<dyn KeptBits>,
    state: Mutex<State>,
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keeper({} bytes a block)", self.bits.granularity())
    }
}

/// A change is under way while this lives.
pub(crate) struct UnderWay {
    keeper: Arc<Keeper>,
    range: Range<u64>,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut state = lock(&self.keeper.state);
        if let Some(at) = state.under_way.iter().position(|other| *other == self.range) {
            state.under_way.swap_remove(at);
        }
    }
}

impl Keeper {
    pub(crate) fn new(bits: Arc<dyn KeptBits>) -> Keeper {
        Keeper { bits, state: Mutex::default() }
    }

    /// A change begins. It is marked if the bitmap records.
    pub(crate) fn begin(self: Arc<Self>, at: u64, len: u64, records: impl FnOnce() -> bool) -> UnderWay {
        let range = at..at.saturating_add(len);
        let mut state = lock(&self.state);
        // Under the lock: whoever has it record from now on marks what is under way.
        if records() {
            self.bits.mark(at, len);
        }
        state.under_way.push(range.clone());
        drop(state);
        UnderWay { keeper: self, range }
    }

    /// The bitmap records from now on.
    pub(crate) fn mark_under_way(&self) {
        for range in &lock(&self.state).under_way {
            self.bits.mark(range.start, range.end - range.start);
        }
    }

    /// What is marked in `map` is kept.
    pub(crate) fn mark_all(&self, map: &DirtyMap) {
        let mut next = 0;
        while let Some(run) = map.next_dirty(next, u64::MAX) {
            self.bits.mark(run.start, run.end - run.start);
            next = run.end;
        }
    }

    /// The bitmap is about to say less.
    pub(crate) fn shrinks(&self) {
        lock(&self.state).shrinks += 1;
    }

    /// Which state of the bitmap the kept bits have not followed to; `None` where they have.
    pub(crate) fn to_follow(&self) -> Option<u64> {
        let state = lock(&self.state);
        (state.shrinks != state.followed).then_some(state.shrinks)
    }

    /// The kept bits follow to that state of the bitmap, if it is still that: else another time.
    pub(crate) fn follow(&self, map: &DirtyMap, shrinks: u64) {
        let (len, step) = (map.len(), self.bits.granularity().saturating_mul(STEP_BLOCKS));
        let mut at = 0;
        while at < len {
            let state = lock(&self.state);
            if state.shrinks != shrinks {
                return;
            }
            self.clear_clean(map, &state.under_way, at..at.saturating_add(step).min(len));
            at = at.saturating_add(step);
        }
        let mut state = lock(&self.state);
        if state.shrinks == shrinks {
            state.followed = shrinks;
        }
    }

    /// Clears the blocks of `range` that are clean and not under way.
    fn clear_clean(&self, map: &DirtyMap, under_way: &[Range<u64>], range: Range<u64>) {
        let unit = self.bits.granularity();
        let mut at = range.start;
        while at < range.end {
            let dirty = (!map.is_clean(at, range.end - at)).then(|| map.next_dirty(at, u64::MAX)).flatten();
            let busy = under_way.iter().filter(|other| other.end > at).cloned();
            let Some(stays) =
                busy.chain(dirty).min_by_key(|run| run.start).filter(|run| run.start < range.end)
            else {
                return self.bits.clear(at, range.end - at);
            };
            let first = align_down(stays.start, unit);
            if first > at {
                self.bits.clear(at, first - at);
            }
            at = stays.end.max(at + 1).next_multiple_of(unit);
        }
    }

    /// The kept bits are not kept true any more.
    pub(crate) fn void(&self) {
        self.bits.void();
    }
}

#[cfg(test)]
mod tests;
