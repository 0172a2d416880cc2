//! Host clusters that are reserved and not yet used: a run for each reactor, so that reactors do not meet for every
//! allocation, and another for what a job fills, so that its clusters stay contiguous beside a guest's.

use std::collections::VecDeque;

use infill_storage::sync::{Mutex, lock};

use crate::geometry::{Geometry, HostCluster};
use crate::in_flight::{SHARDS, shard};
use crate::refcount::HostRun;

/// The longest run that is reserved, in bytes.
pub(crate) const RUN_BYTES_MAX: u64 = 4 << 20;
/// A run is at most this part of the image.
const RUN_PARTS_OF_IMAGE: u64 = 64;

#[derive(Debug)]
pub(crate) struct Runs {
    /// Of each shard: one for jobs, one for everybody else. The first run of each is taken from first.
    slots: [[Mutex<VecDeque<HostRun>>; 2]; SHARDS],
}

impl Runs {
    pub(crate) fn new() -> Runs {
        Runs { slots: Default::default() }
    }

    /// How many clusters are reserved at a time in a disk of `size` bytes.
    pub(crate) fn len(size: u64, geometry: &Geometry) -> u64 {
        (RUN_BYTES_MAX.min(size / RUN_PARTS_OF_IMAGE) / geometry.cluster_bytes()).max(1)
    }

    /// Which of the runs this thread takes from, by number.
    pub(crate) fn number(fill: bool) -> u64 {
        (shard() * 2 + usize::from(fill)) as u64
    }

    fn slot(&self, fill: bool) -> &Mutex<VecDeque<HostRun>> {
        &self.slots[shard()][usize::from(fill)]
    }

    /// 1 to `want` contiguous clusters of what this reactor has reserved.
    pub(crate) fn take(&self, fill: bool, want: u64) -> Option<HostRun> {
        let mut runs = lock(self.slot(fill));
        let whole = runs.iter().position(|run| run.count >= want).unwrap_or(0);
        let run = runs.get_mut(whole)?;
        let taken = HostRun { count: want.min(run.count), ..*run };
        run.first = HostCluster(run.first.0 + taken.count);
        run.count -= taken.count;
        if run.count == 0 {
            runs.remove(whole);
        }
        Some(taken)
    }

    /// Clusters that were taken and are not used after all: the next to be taken.
    pub(crate) fn put_first(&self, fill: bool, run: HostRun) {
        lock(self.slot(fill)).push_front(run);
    }

    /// Reserved clusters.
    pub(crate) fn put(&self, fill: bool, run: HostRun) {
        if run.count > 0 {
            lock(self.slot(fill)).push_back(run);
        }
    }

    /// What all reactors have reserved. Two looks that see the same have had nobody take or reserve between them.
    pub(crate) fn reserved(&self) -> Vec<HostRun> {
        self.slots.iter().flatten().flat_map(|runs| lock(runs).clone()).collect()
    }

    /// Takes everything that any reactor has reserved.
    pub(crate) fn drain(&self) -> Vec<HostRun> {
        self.slots.iter().flatten().flat_map(|runs| std::mem::take(&mut *lock(runs))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64) -> HostRun {
        HostRun { first: HostCluster(first), count, zeroed: false }
    }

    #[test]
    fn a_run_is_handed_out_in_order_and_jobs_have_their_own() {
        let runs = Runs::new();
        runs.put(false, run(10, 3));
        runs.put(false, run(20, 8));
        runs.put(true, run(50, 8));
        assert_eq!(runs.take(false, 1), Some(run(10, 1)));
        assert_eq!(runs.take(false, 4), Some(run(20, 4)));
        assert_eq!(runs.take(false, 9), Some(run(11, 2)));
        assert_eq!(runs.take(true, 2), Some(run(50, 2)));
        assert_eq!(runs.reserved(), [run(24, 4), run(52, 6)]);
        assert_eq!(runs.drain().iter().map(|run| run.count).sum::<u64>(), 4 + 6);
        assert_eq!(runs.take(false, 1), None);
    }

    #[test]
    fn a_small_image_reserves_little() {
        let geometry = Geometry::new(3, 16, 4, false).unwrap();
        assert_eq!(Runs::len(1 << 40, &geometry), 64);
        assert_eq!(Runs::len(64 << 20, &geometry), 16);
        assert_eq!(Runs::len(0, &geometry), 1);
    }
}
