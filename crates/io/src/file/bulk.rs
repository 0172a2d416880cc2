//! Large pieces that a job writes go around the page cache.
//!
//! A job writes a disk's worth of data that nobody is about to read. Through the page cache each page of it costs memory that
//! has to be taken from somebody (the kernel reclaims while it copies: the same write has taken between 0.3 and 2 s of
//! processor time a GiB), throws out what guests read, and is dirty when a guest's FLUSH comes. So whole pages in pieces of
//! [`BULK_BYTES_MIN`] or more are written through a second descriptor of the same file, opened for direct I/O when the first
//! of them comes. Where the file system does not do that, they go through the cache as anything else.
//!
//! # Why both may be used at once
//! A page is written by one side at a time: a range that a job writes is nobody else's (formats write to clusters that nothing
//! names, or hold the guest range; raw targets are written under the copy's range lock), and it is whole pages. The kernel
//! writes dirty pages of the range back before a direct write, and drops what is cached of it afterwards, so that whoever reads
//! sees what was written. It drops whole folios, though, and cannot drop one that holds a neighbour's page which becomes dirty
//! while the direct write is under way. Only readahead makes folios that reach beyond what was asked for, so there is none any
//! more on the first descriptor once there is the second (guests read ahead by themselves).
//!
//! QEMU's locks are of the first descriptor; closing another one gives none of them back.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use infill_base::{Class, Ctx, ErrorKind, Gather, IoResult, aligned_buffer};
use infill_storage::Storage as _;
use rustix::fs::{Advice, Mode, OFlags};

use super::{FileStorage, direct_align};

/// The smallest piece that goes around the cache, in bytes: a small one waits for the disk longer than for memory.
pub(super) const BULK_BYTES_MIN: u64 = 64 << 10;

/// The second descriptor.
#[derive(Default)]
pub(super) struct Bulk {
    /// With the block size of direct I/O. `None`: there is none to be had.
    open: OnceLock<Option<(Arc<OwnedFd>, u64)>>,
    /// The file system takes the flag, and not the writes.
    refused: AtomicBool,
}

impl Bulk {
    /// Whether pieces go around the cache, as far as is known.
    pub(super) fn is_open(&self) -> bool {
        !self.refused.load(Ordering::Relaxed) && matches!(self.open.get(), Some(Some(_)))
    }
}

impl FileStorage {
    /// Whether the range is a piece that should go around the cache.
    pub(super) fn is_bulk(&self, cx: &Ctx, at: u64, len: u64) -> bool {
        let page = rustix::param::page_size() as u64;
        cx.class == Class::Fill
            && len >= BULK_BYTES_MIN
            && at.is_multiple_of(page)
            && len.is_multiple_of(page)
    }

    async fn bulk_fd(&self) -> Option<(Arc<OwnedFd>, u64)> {
        if self.bulk.refused.load(Ordering::Relaxed) {
            return None;
        }
        if let Some(open) = self.bulk.open.get() {
            return open.clone();
        }
        let device = self.device;
        let opened = self.blocking(move |file| {
            // The file that is open, whatever has its name by now.
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
            let fd = rustix::fs::open(path, flags, Mode::empty())?;
            rustix::fs::fadvise(file, 0, None, Advice::Random)?;
            let align = direct_align(&fd, device);
            Ok((Arc::new(fd), u64::from(align)))
        });
        let page = rustix::param::page_size() as u64;
        let opened = opened.await.ok().filter(|(_, align)| page.is_multiple_of(*align));
        // Whoever was first: both are of the same file.
        self.bulk.open.get_or_init(|| opened).clone()
    }

    /// Writes a piece of a job around the page cache; false where that cannot be done, and nothing is known of the range.
    pub(super) async fn write_bulk(&self, at: u64, data: &Gather) -> IoResult<bool> {
        let Some((fd, align)) = self.bulk_fd().await else { return Ok(false) };
        let fits = |len: usize, at: usize| (len as u64 | at as u64).is_multiple_of(align);
        let data = match data.runs().iter().all(|run| fits(run.len(), run.as_ptr() as usize)) {
            true => data.clone(),
            false => aligned(data, align),
        };
        match self.write_to(&fd, at, data).await {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {
                tracing::debug!(%error, file = self.name(), "no direct writes: jobs write through the page cache");
                self.bulk.refused.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

/// The same bytes in memory that direct I/O takes.
fn aligned(data: &Gather, align: u64) -> Gather {
    let (mut whole, mut next) = (aligned_buffer(data.len(), align as usize), 0);
    for run in data.runs() {
        whole[next..next + run.len()].copy_from_slice(run);
        next += run.len();
    }
    whole.freeze().into()
}
