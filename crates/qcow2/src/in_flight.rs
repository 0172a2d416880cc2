//! Which operations may still touch host clusters that they looked up: what has to end before space is reused (I7).
//!
//! An operation enters **before** it looks a mapping up and leaves when its I/O on the file is over. A settle waits
//! for everybody who had entered before it was called; whoever enters later sees the mapping as it is by then.
//! Nobody is inside while waiting for a source, an allocation, a round or a guest range.
//!
//! An operation that is dropped in the middle goes on in the storage. A read does no harm there. A write could land in
//! space that was given to somebody else, so after a write was cut off nothing is reused any more until the image is
//! opened anew ([`InFlight::is_cut`]): space leaks, and a check gives it back.
//!
//! Costs: two atomic additions an operation, on a counter of its thread's shard.

use std::cell::Cell;

use event_listener::Event;
use infill_storage::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Counters that threads share: more than machines have busy reactors, mostly.
pub(crate) const SHARDS: usize = 16;

#[derive(Debug, Default)]
#[repr(align(64))]
struct Counter(AtomicU64);

#[derive(Debug, Default)]
pub(crate) struct InFlight {
    /// Who enters counts under the lowest bit.
    phase: AtomicU64,
    counts: [[Counter; SHARDS]; 2],
    settling: AtomicBool,
    left: Event,
    /// One settle at a time: a phase begins only when nobody is left of the one before the last.
    turn: async_lock::Mutex<()>,
    cut: AtomicBool,
}

/// One operation inside.
#[derive(Debug)]
#[must_use]
pub(crate) struct Flight<'a> {
    owner: &'a InFlight,
    phase: usize,
    shard: usize,
    writes: bool,
}

/// The shard of this thread.
pub(crate) fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static MINE: Cell<Option<usize>> = const { Cell::new(None) });
    MINE.with(|mine| {
        mine.get().unwrap_or_else(|| {
            let shard = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
            mine.set(Some(shard));
            shard
        })
    })
}

impl InFlight {
    /// Enters. To be called before the look-up.
    pub(crate) fn enter(&self) -> Flight<'_> {
        let shard = shard();
        loop {
            let phase = self.phase.load(Ordering::SeqCst);
            let flight = Flight { owner: self, phase: (phase & 1) as usize, shard, writes: false };
            self.counts[flight.phase][shard].0.fetch_add(1, Ordering::SeqCst);
            // A settle that counted before we were in has gone on to the next phase.
            if self.phase.load(Ordering::SeqCst) == phase {
                return flight;
            }
        }
    }

    /// Waits for everybody who is inside now.
    pub(crate) async fn settle(&self) {
        let _turn = self.turn.lock().await;
        let phase = (self.phase.fetch_add(1, Ordering::SeqCst) & 1) as usize;
        self.settling.store(true, Ordering::SeqCst);
        loop {
            let left = self.left.listen();
            if self.counts[phase].iter().all(|count| count.0.load(Ordering::SeqCst) == 0) {
                break;
            }
            left.await;
        }
        self.settling.store(false, Ordering::SeqCst);
    }

    /// Whether a write was dropped before it ended: nothing is reused then.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }
}

impl Flight<'_> {
    /// From here on the operation writes to what it looked up, until [`Flight::finish`].
    pub(crate) fn writes(&mut self) {
        self.writes = true;
    }

    /// The writes are over, whether they succeeded or not.
    pub(crate) fn finish(mut self) {
        self.writes = false;
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        if self.writes {
            self.owner.cut.store(true, Ordering::Release);
        }
        self.owner.counts[self.phase][self.shard].0.fetch_sub(1, Ordering::SeqCst);
        if self.owner.settling.load(Ordering::SeqCst) {
            self.owner.left.notify(usize::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn a_settle_waits_for_who_was_inside_and_not_for_who_came_later() {
        let in_flight = InFlight::default();
        let early = in_flight.enter();
        let mut settle = Box::pin(in_flight.settle());
        assert!(settle.as_mut().now_or_never().is_none());
        let late = in_flight.enter();
        drop(early);
        assert!(settle.now_or_never().is_some());
        let mut second = Box::pin(in_flight.settle());
        assert!(second.as_mut().now_or_never().is_none());
        drop(late);
        assert!(second.now_or_never().is_some());
    }

    #[test]
    fn a_write_that_is_dropped_in_the_middle_ends_the_reuse_of_space() {
        let in_flight = InFlight::default();
        let mut whole = in_flight.enter();
        whole.writes();
        whole.finish();
        drop(in_flight.enter());
        assert!(!in_flight.is_cut());
        let mut cut = in_flight.enter();
        cut.writes();
        drop(cut);
        assert!(in_flight.is_cut());
    }
}
