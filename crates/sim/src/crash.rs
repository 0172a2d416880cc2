//! What a crash may leave of what was written: the media model of `docs/media.md`, executed.

use std::sync::Arc;

use bytes::Bytes;

use crate::media::SECTOR_BYTES;
use crate::{Media, Rng};

/// What one write does to the medium.
#[derive(Debug)]
pub struct PendingOp {
    /// Number of the operation, ascending in the order of submission.
    pub id: u64,
    /// Sectors that it writes (index, 512 bytes).
    pub sectors: Vec<(u64, Bytes)>,
    /// Where the medium ends at least once all of them are there.
    pub end: u64,
    /// Cuts or grows the medium to this length instead; with an `end`, it reserves space, and grows alone.
    pub set_len: Option<u64>,
}

/// A write that is not on stable storage yet.
#[derive(Clone, Debug)]
pub struct Pending {
    /// What it does.
    pub op: Arc<PendingOp>,
    /// When it completed (a number that ascends); `None` while it is in flight.
    pub completed: Option<u64>,
}

/// What had just happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boundary {
    /// A write was handed over: from now on any part of it may survive.
    Submitted,
    /// A write has completed.
    Completed,
    /// A sync has completed.
    Synced,
}

/// A moment at which power or the process may go.
#[derive(Clone, Debug)]
pub struct CrashPoint {
    /// What had just happened.
    pub boundary: Boundary,
    /// What is stable for sure.
    pub durable: Media,
    /// What reads show: everything that has completed.
    pub live: Media,
    /// What may or may not survive, in the order of submission.
    pub pending: Vec<Pending>,
}

impl CrashPoint {
    /// A power cut of which `survives(op, nth sector)` decides, applied in the order of `pending`.
    pub fn power_cut(&self, mut survives: impl FnMut(&Pending, usize) -> bool) -> Media {
        let mut media = self.durable.clone();
        for pending in &self.pending {
            apply_some(&mut media, &pending.op, |nth| survives(pending, nth));
        }
        media
    }

    /// A power cut by chance. Which kind of loss is drawn first: everything or nothing, whole writes, single sectors,
    /// one write lost, one write kept, the newer before the older.
    pub fn random_power_cut(&self, rng: &mut Rng) -> Media {
        let count = self.pending.len();
        let one = if count == 0 { 0 } else { rng.index(count) };
        let mut order: Vec<usize> = (0..count).collect();
        if rng.per_mille(500) {
            for last in (1..count).rev() {
                order.swap(last, rng.index(last + 1));
            }
        }
        let kind = rng.below(8);
        let mut media = self.durable.clone();
        for index in order {
            let whole = rng.per_mille(500);
            let mostly = rng.per_mille(900);
            apply_some(&mut media, &self.pending[index].op, |_| match kind {
                0 => false,
                1 => true,
                2 | 3 => whole,
                4 => rng.per_mille(500),
                5 => index != one,
                6 => index == one,
                _ => mostly,
            });
        }
        media
    }

    /// Every state that whole writes in their order can leave, where that is at most `max`.
    pub fn all_power_cuts(&self, max: usize) -> Option<impl Iterator<Item = Media> + '_> {
        let count = u32::try_from(self.pending.len()).ok()?;
        let states = 1_usize.checked_shl(count).filter(|states| *states <= max && *states > 0)?;
        Some((0..states).map(|kept| {
            let mut media = self.durable.clone();
            for (bit, pending) in self.pending.iter().enumerate() {
                apply_some(&mut media, &pending.op, |_| kept >> bit & 1 == 1);
            }
            media
        }))
    }

    /// The process dies: what has completed is there, what is in flight is there, or not, or in part.
    pub fn kill(&self, rng: &mut Rng) -> Media {
        let mut media = self.live.clone();
        for pending in self.pending.iter().filter(|pending| pending.completed.is_none()) {
            let kind = rng.below(3);
            apply_some(&mut media, &pending.op, |_| match kind {
                0 => false,
                1 => true,
                _ => rng.per_mille(500),
            });
        }
        media
    }
}

pub(crate) fn apply(media: &mut Media, op: &PendingOp) {
    apply_some(media, op, |_| true);
}

fn apply_some(media: &mut Media, op: &PendingOp, mut survives: impl FnMut(usize) -> bool) {
    if let Some(len) = op.set_len {
        if survives(0) {
            // One that reserves may have been on its way while another one has made the medium longer.
            media.set_len(if op.end > 0 { len.max(media.len()) } else { len });
        }
        return;
    }
    for (nth, (index, data)) in op.sectors.iter().enumerate() {
        if survives(nth) {
            media.write_sector(*index, data);
            media.grow(op.end.min((index + 1) * SECTOR_BYTES));
        }
    }
}
