//! Exclusive and shared holds on ranges of a disk, granted in the order in which they were asked for.

use std::future::poll_fn;
use std::task::{Poll, Waker};

use crate::sync::{Arc, Mutex, lock};

/// Holds on ranges `[start, end)` of any unit (bytes, clusters).
///
/// Overlapping requests are granted first come, first served, so nobody starves; requests that do not overlap never
/// see each other. Memory only: the guard may live across an await, the inner lock never does.
#[derive(Clone, Debug, Default)]
pub struct RangeLock(Arc<Mutex<Queue>>);

#[derive(Debug, Default)]
struct Queue {
    next_ticket: u64,
    /// In the order of asking. Few at a time: as many as requests are in flight on one disk.
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    ticket: u64,
    start: u64,
    end: u64,
    shared: bool,
    granted: bool,
    waker: Option<Waker>,
}

impl Queue {
    /// Whether entry `index` overlaps an earlier one that excludes it.
    fn blocked(&self, index: usize) -> bool {
        let me = &self.entries[index];
        self.entries[..index]
            .iter()
            .any(|other| other.start < me.end && me.start < other.end && !(other.shared && me.shared))
    }
}

/// A hold on a range; it ends when this is dropped.
#[derive(Debug)]
pub struct RangeGuard {
    lock: RangeLock,
    ticket: u64,
}

impl RangeLock {
    /// Nothing held.
    pub fn new() -> RangeLock {
        RangeLock::default()
    }

    fn enqueue(&self, start: u64, end: u64, shared: bool) -> (RangeGuard, bool) {
        let mut queue = lock(&self.0);
        let ticket = queue.next_ticket;
        queue.next_ticket += 1;
        queue.entries.push(Entry { ticket, start, end, shared, granted: false, waker: None });
        let last = queue.entries.len() - 1;
        let granted = !queue.blocked(last);
        queue.entries[last].granted = granted;
        (RangeGuard { lock: self.clone(), ticket }, granted)
    }

    async fn acquire(&self, start: u64, end: u64, shared: bool) -> RangeGuard {
        let (guard, granted) = self.enqueue(start, end, shared);
        if granted {
            return guard;
        }
        poll_fn(|cx| {
            let mut queue = lock(&guard.lock.0);
            let entry = queue.entries.iter_mut().find(|entry| entry.ticket == guard.ticket);
            match entry {
                Some(entry) if !entry.granted => {
                    entry.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
                _ => Poll::Ready(()),
            }
        })
        .await;
        guard
    }

    /// Holds `[start, end)` alone.
    pub async fn exclusive(&self, start: u64, end: u64) -> RangeGuard {
        self.acquire(start, end, false).await
    }

    /// Holds `[start, end)` together with other shared holders.
    pub async fn shared(&self, start: u64, end: u64) -> RangeGuard {
        self.acquire(start, end, true).await
    }

    /// Holds `[start, end)` alone if nobody who asked before stands in the way.
    pub fn try_exclusive(&self, start: u64, end: u64) -> Option<RangeGuard> {
        let (guard, granted) = self.enqueue(start, end, false);
        granted.then_some(guard)
    }

    /// Waits until everything that was asked for before this call and overlaps `[start, end)` is over.
    pub async fn settle(&self, start: u64, end: u64) {
        drop(self.exclusive(start, end).await);
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let mut wake = Vec::new();
        {
            let mut queue = lock(&self.lock.0);
            let Some(at) = queue.entries.iter().position(|entry| entry.ticket == self.ticket) else { return };
            let gone = queue.entries.remove(at);
            for index in at..queue.entries.len() {
                let entry = &queue.entries[index];
                if !entry.granted && entry.start < gone.end && gone.start < entry.end && !queue.blocked(index)
                {
                    queue.entries[index].granted = true;
                    wake.extend(queue.entries[index].waker.take());
                }
            }
        }
        wake.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn overlapping_requests_are_granted_in_order() {
        let lock = RangeLock::new();
        let first = lock.try_exclusive(0, 10).unwrap();
        let mut second = Box::pin(lock.exclusive(5, 15));
        assert!(second.as_mut().now_or_never().is_none());
        // Behind the waiting second, though the first alone would let it in.
        let mut third = Box::pin(lock.exclusive(12, 13));
        assert!(third.as_mut().now_or_never().is_none());
        assert!(lock.try_exclusive(20, 30).is_some());
        drop(first);
        let second = second.now_or_never().unwrap();
        assert!(third.as_mut().now_or_never().is_none());
        drop(second);
        assert!(third.now_or_never().is_some());
    }

    #[test]
    fn shared_holders_stand_together_and_a_dropped_waiter_is_forgotten() {
        let lock = RangeLock::new();
        let one = lock.shared(0, 10).now_or_never().unwrap();
        let two = lock.shared(5, 10).now_or_never().unwrap();
        let mut writer = Box::pin(lock.exclusive(0, 1));
        assert!(writer.as_mut().now_or_never().is_none());
        drop(writer);
        drop((one, two));
        assert!(lock.try_exclusive(0, 10).is_some());
    }
}
