//! Latencies of guest requests, for the control of background jobs (30-streaming, point 4).

use std::collections::VecDeque;
use std::time::Duration;

use infill_storage::sync::atomic::{AtomicUsize, Ordering};
use infill_storage::sync::{Mutex, lock};

use crate::meter::Meter;

/// Samples kept for each kind. At more, the oldest go: a busy disk's last 100 ms are what control looks at.
pub const LATENCY_SAMPLES_MAX: usize = 1024;

/// What took time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LatencyKind {
    /// A guest read that had to ask the backing.
    Miss,
    /// Any guest read.
    Read,
    /// Any guest write.
    Write,
    /// A guest's FLUSH.
    Sync,
}

impl LatencyKind {
    /// All kinds, in the order of their numbers.
    pub const ALL: [LatencyKind; 4] =
        [LatencyKind::Miss, LatencyKind::Read, LatencyKind::Write, LatencyKind::Sync];

    /// Its name in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            LatencyKind::Miss => "miss",
            LatencyKind::Read => "read",
            LatencyKind::Write => "write",
            LatencyKind::Sync => "sync",
        }
    }
}

const KINDS: usize = LatencyKind::ALL.len();

/// A sample: when it ended, how long it took.
type Sample = (Duration, Duration);

/// The last samples of each kind. Costs one relaxed load a request while nobody listens.
#[derive(Debug, Default)]
pub struct LatencyBoard {
    listeners: AtomicUsize,
    samples: Mutex<[VecDeque<Sample>; KINDS]>,
    meter: Meter,
}

impl LatencyBoard {
    /// What is counted for metrics.
    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    fn wants_samples(&self) -> bool {
        self.listeners.load(Ordering::Relaxed) > 0
    }

    /// Whether anybody wants to know how long requests take.
    pub fn is_listening(&self) -> bool {
        self.wants_samples() || self.meter.is_on()
    }

    /// Begins to want samples; pair with [`LatencyBoard::unlisten`].
    pub fn listen(&self) {
        self.listeners.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends it; the last one to go clears the board.
    pub fn unlisten(&self) {
        if self.listeners.fetch_sub(1, Ordering::Relaxed) == 1 {
            lock(&self.samples).iter_mut().for_each(VecDeque::clear);
        }
    }

    /// Notes that something ended at `end` on the runtime's clock after `took`.
    pub fn record(&self, kind: LatencyKind, end: Duration, took: Duration) {
        self.meter.took(kind, took);
        if !self.wants_samples() {
            return;
        }
        let mut samples = lock(&self.samples);
        let samples = &mut samples[kind as usize];
        if samples.len() == LATENCY_SAMPLES_MAX {
            samples.pop_front();
        }
        samples.push_back((end, took));
    }

    /// The samples that ended after `since`, oldest first, as (end, duration).
    pub fn since(&self, kind: LatencyKind, since: Duration) -> Vec<Sample> {
        let samples = lock(&self.samples);
        let samples = &samples[kind as usize];
        let first = samples.partition_point(|(end, _)| *end <= since);
        samples.iter().skip(first).copied().collect()
    }

    /// When the last sample of `kind` ended.
    pub fn last(&self, kind: LatencyKind) -> Option<Duration> {
        lock(&self.samples)[kind as usize].back().map(|(end, _)| *end)
    }
}
