//! What is counted of a node while somebody wants to know: latencies in buckets, and bytes. Counters only grow.
//!
//! Costs one relaxed load a request while it is off, and a few relaxed additions while it is on.

use std::time::Duration;

use infill_base::Class;
use infill_storage::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::latency::LatencyKind;

/// Upper bounds of the buckets of a histogram, in microseconds: powers of four. What took longer is in the last one.
pub const BUCKET_MICROS: [u64; 12] =
    [16, 64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20];

/// All classes of requests, in the order of their numbers.
pub const CLASSES: [Class; 4] = [Class::Fill, Class::AroundMiss, Class::Prefetch, Class::Guest];

/// How long requests of one kind took.
#[derive(Debug, Default)]
struct Buckets {
    counts: [AtomicU64; BUCKET_MICROS.len() + 1],
    micros: AtomicU64,
}

/// A copy of a histogram.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// Requests in each bucket of [`BUCKET_MICROS`], and then those that took longer.
    pub counts: [u64; BUCKET_MICROS.len() + 1],
    /// All that they took, in microseconds.
    pub micros: u64,
}

/// The counters of one node.
#[derive(Debug, Default)]
pub struct Meter {
    on: AtomicBool,
    latencies: [Buckets; LatencyKind::ALL.len()],
    read: [AtomicU64; CLASSES.len()],
    written: AtomicU64,
    populated: AtomicU64,
}

impl Meter {
    /// Begins to count.
    pub fn start(&self) {
        self.on.store(true, Ordering::Relaxed);
    }

    /// Whether it counts.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    fn add(&self, counter: &AtomicU64, bytes: u64) {
        if self.is_on() {
            counter.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    pub(crate) fn took(&self, kind: LatencyKind, took: Duration) {
        if !self.is_on() {
            return;
        }
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = BUCKET_MICROS.partition_point(|bound| *bound < micros);
        let buckets = &self.latencies[kind as usize];
        buckets.counts[bucket].fetch_add(1, Ordering::Relaxed);
        buckets.micros.fetch_add(micros, Ordering::Relaxed);
    }

    pub(crate) fn has_read(&self, class: Class, bytes: u64) {
        self.add(&self.read[class as usize], bytes);
    }

    pub(crate) fn has_written(&self, bytes: u64) {
        self.add(&self.written, bytes);
    }

    pub(crate) fn has_populated(&self, bytes: u64) {
        self.add(&self.populated, bytes);
    }

    /// How long guests' requests of that kind took.
    pub fn latency(&self, kind: LatencyKind) -> Histogram {
        let buckets = &self.latencies[kind as usize];
        let counts = std::array::from_fn(|at| buckets.counts[at].load(Ordering::Relaxed));
        Histogram { counts, micros: buckets.micros.load(Ordering::Relaxed) }
    }

    /// Bytes that were read in that class.
    pub fn read_bytes(&self, class: Class) -> u64 {
        self.read[class as usize].load(Ordering::Relaxed)
    }

    /// Bytes that were written, zeroes included.
    pub fn written_bytes(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Bytes that copy-on-read and jobs have put into it from below.
    pub fn populated_bytes(&self) -> u64 {
        self.populated.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_meter_that_is_off_counts_nothing_and_one_that_is_on_counts_into_the_right_bucket() {
        let meter = Meter::default();
        meter.took(LatencyKind::Read, Duration::from_micros(5));
        meter.has_read(Class::Guest, 5);
        assert_eq!((meter.latency(LatencyKind::Read), meter.read_bytes(Class::Guest)), Default::default());
        meter.start();
        for micros in [0, 16, 17, 64 << 20, (64 << 20) + 1] {
            meter.took(LatencyKind::Sync, Duration::from_micros(micros));
        }
        let mut expected = Histogram { micros: 33 + (128 << 20) + 1, ..Histogram::default() };
        (expected.counts[0], expected.counts[1], expected.counts[11], expected.counts[12]) = (2, 1, 1, 1);
        assert_eq!(meter.latency(LatencyKind::Sync), expected);
        CLASSES.iter().for_each(|class| meter.has_read(*class, 1 + *class as u64));
        assert_eq!(CLASSES.map(|class| meter.read_bytes(class)), [1, 2, 3, 4]);
    }
}
