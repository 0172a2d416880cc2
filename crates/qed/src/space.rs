//! Host clusters: taken by moving the end of the file on.
//!
//! * [`Space::reserve`] is one atomic addition, so any number of allocations are in flight at once. [`Space::grow`]
//!   then waits until the file reaches that far; one caller at a time makes it longer, by more than it needs, for all.
//! * The file never gets shorter while it is used, and always has a length of whole clusters.
//! * What is taken reads as zeroes, stably: so a crash shows zeroes or what was written, whatever is stable first.
//! * A cluster that was taken and not linked (a populate that came too late, a write that failed) is *soiled*. The next
//!   round zeroes it; after its sync it is *spare*, and taken before the file gets longer. No look-up ever gave its
//!   place away, so nobody still reads it.

use std::collections::BTreeSet;

use infill_base::{Ctx, ErrorKind, IoError, IoResult, ZeroFlags, align_up};
use infill_storage::sync::atomic::{AtomicU64, Ordering};
use infill_storage::sync::{Mutex, lock};
use infill_storage::{RangeLock, StorageHandle};

use crate::format::limits::FILE_BYTES_MAX;
use crate::geometry::{Geometry, HostOffset};

/// How much longer than needed the file is made at most, in bytes. What is not used is cut off on close.
const GROW_BYTES_MAX: u64 = 4 << 20;

/// The part of the disk's size by which the file is made longer than needed, at most.
const GROW_PART: u64 = 64;

/// Soiled and spare clusters that are remembered, each; more are leaked until a check.
const SPARE_MAX: usize = 1024;

/// Clusters that were taken for one purpose, contiguous.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taken {
    /// First byte.
    pub at: HostOffset,
    /// How many clusters.
    pub clusters: u64,
}

#[derive(Debug)]
pub(crate) struct Space {
    geometry: Geometry,
    /// First byte that is not taken.
    next: AtomicU64,
    /// How long the file is known to be.
    len: AtomicU64,
    /// How much longer than needed the file is made.
    extra: u64,
    growing: RangeLock,
    soiled: Mutex<Vec<HostOffset>>,
    spare: Mutex<BTreeSet<HostOffset>>,
}

impl Space {
    /// Of a file of `file_len` bytes, all of whose whole clusters are taken, for a disk of `size` bytes.
    pub(crate) fn new(geometry: Geometry, file_len: u64, size: u64) -> Space {
        let end = geometry.align_down(file_len);
        Space {
            geometry,
            next: AtomicU64::new(end),
            len: AtomicU64::new(end),
            extra: align_up((size / GROW_PART).min(GROW_BYTES_MAX), geometry.cluster_bytes()),
            growing: RangeLock::new(),
            soiled: Mutex::default(),
            spare: Mutex::default(),
        }
    }

    /// First byte that is not taken: nothing that an entry names lies behind it.
    pub(crate) fn end(&self) -> u64 {
        self.next.load(Ordering::Acquire)
    }

    /// Takes clusters. The file may have to [grow](Space::grow) before they are written.
    pub(crate) fn reserve(&self, clusters: u64) -> IoResult<Taken> {
        if clusters == 1
            && let Some(at) = lock(&self.spare).pop_first()
        {
            return Ok(Taken { at, clusters });
        }
        let bytes = clusters.saturating_mul(self.geometry.cluster_bytes());
        let longer = |end: u64| end.checked_add(bytes).filter(|end| *end <= FILE_BYTES_MAX);
        match self.next.fetch_update(Ordering::AcqRel, Ordering::Acquire, longer) {
            Ok(at) => Ok(Taken { at: HostOffset(at), clusters }),
            Err(end) => Err(IoError::new(
                ErrorKind::NoSpace,
                format!("the image file has {end} bytes and cannot have more than {FILE_BYTES_MAX}"),
            )),
        }
    }

    /// Takes clusters back that nothing names and no operation touches any more.
    pub(crate) fn give_back(&self, taken: Taken) {
        let mut soiled = lock(&self.soiled);
        let room = SPARE_MAX.saturating_sub(soiled.len()) as u64;
        let bytes = self.geometry.cluster_bytes();
        soiled.extend((0..taken.clusters.min(room)).map(|nth| HostOffset(taken.at.0 + nth * bytes)));
    }

    /// What has to be zeroed, stably, before it is [spare](Space::cleaned).
    pub(crate) fn soiled(&self) -> Vec<HostOffset> {
        std::mem::take(&mut *lock(&self.soiled))
    }

    /// These clusters read as zeroes, stably.
    pub(crate) fn cleaned(&self, clusters: Vec<HostOffset>) {
        let mut spare = lock(&self.spare);
        let room = SPARE_MAX.saturating_sub(spare.len());
        spare.extend(clusters.into_iter().take(room));
    }

    /// Whether the file holds what was taken.
    pub(crate) fn has_grown(&self, taken: Taken) -> bool {
        taken.at.0 + taken.clusters * self.geometry.cluster_bytes() <= self.len.load(Ordering::Acquire)
    }

    /// Waits until the file holds what was taken. On failure it is taken back. Not to be dropped in the middle: a
    /// change of the length that comes late would cut off what others wrote.
    pub(crate) async fn grow(&self, cx: &Ctx, storage: &StorageHandle, taken: Taken) -> IoResult<()> {
        let _growing = self.growing.exclusive(0, 1).await;
        if self.has_grown(taken) {
            return Ok(());
        }
        let end = taken.at.0 + taken.clusters * self.geometry.cluster_bytes();
        // Others have taken more in the meantime: one growth serves them, too.
        let wanted = end.max(self.end()).saturating_add(self.extra).min(FILE_BYTES_MAX);
        let mut result = storage.set_len(cx, self.geometry.align_down(wanted)).await.map(|()| wanted);
        if result.is_err() {
            // Perhaps there is room for what is needed now.
            result = storage.set_len(cx, end).await.map(|()| end);
        }
        match result {
            Ok(len) => {
                self.len.store(self.geometry.align_down(len), Ordering::Release);
                Ok(())
            }
            Err(error) => {
                let last = self.next.compare_exchange(end, taken.at.0, Ordering::AcqRel, Ordering::Acquire);
                if last.is_err() {
                    self.give_back(taken);
                }
                Err(error)
            }
        }
    }

    /// Cuts off what nobody uses.
    pub(crate) async fn trim(&self, cx: &Ctx, storage: &StorageHandle) -> IoResult<()> {
        let _growing = self.growing.exclusive(0, 1).await;
        while let Some(last) = self.spare_end() {
            let end = last.0 + self.geometry.cluster_bytes();
            if self.next.compare_exchange(end, last.0, Ordering::AcqRel, Ordering::Acquire).is_err() {
                break;
            }
        }
        let end = self.end();
        if end < self.len.load(Ordering::Acquire) {
            storage.set_len(cx, end).await?;
            self.len.store(end, Ordering::Release);
        }
        Ok(())
    }

    /// Takes the last spare cluster, if it lies at the end.
    fn spare_end(&self) -> Option<HostOffset> {
        let mut spare = lock(&self.spare);
        let last = *spare.last()?;
        (last.0 + self.geometry.cluster_bytes() == self.end()).then(|| spare.pop_last()).flatten()
    }
}

/// Zeroes a range of the file, in pieces that the storage takes.
pub(crate) async fn zero_range(
    cx: &Ctx,
    storage: &StorageHandle,
    mut at: u64,
    end: u64,
    flags: ZeroFlags,
) -> IoResult<()> {
    while at < end {
        let piece = (end - at).min(storage.limits().max_transfer);
        storage.write_zeroes(cx, at, piece, flags).await?;
        at += piece;
    }
    Ok(())
}
