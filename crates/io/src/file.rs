//! A file or block device as a storage.
//!
//! It takes requests at any byte. With `direct` it goes around the page cache: what is not aligned is read, changed and
//! written under a lock on its blocks, and the file's length becomes a multiple of the block size.
//!
//! Large pieces that a job writes go around the page cache in any case ([`bulk`]).
//!
//! A read costs one ring operation. Zeroing, discarding, extents and growing are system calls on a helper thread
//! (about 15 µs more), because the ring has no operation for them here.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use compio::buf::{BufResult, IntoInner, IoBuf};
use compio::driver::op::{ReadAt, Sync, WriteVectoredAt};
use infill_base::{
    Ctx, ErrorKind, Extent, ExtentKind, Extents, Gather, IoError, IoResult, Limits, MAX_TRANSFER_BYTES,
    OpenError, WriteFlags, ZeroFlags, align_down, align_up, aligned_buffer, push_extent, range_end,
    zero_bytes,
};
use infill_storage::{RangeLock, Storage, StorageHandle, rt};
use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::locks::{self, Share};
use bulk::Bulk;

mod bulk;

/// Most runs that one write hands to the kernel (its own limit is 1024).
const MAX_RUNS: usize = 1024;
/// Most runs that one look for extents gives.
const MAX_EXTENTS: usize = 4096;
/// Zeroes are written in pieces of this size where the kernel cannot zero a range.
const ZERO_PIECE: u64 = 1 << 20;
/// Block size of direct I/O where the file system does not tell.
const DIRECT_ALIGN: u32 = 4096;

/// Whether opening may make the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Create {
    /// It must be there.
    #[default]
    No,
    /// It must not be there; it becomes this long, in bytes.
    New(u64),
    /// It may be there, and is emptied under the writer's lock; it becomes this long, in bytes.
    Truncate(u64),
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileOptions {
    /// No writes.
    pub read_only: bool,
    /// Around the page cache (QEMU's `cache.direct=on`).
    pub direct: bool,
    /// What else may happen to it.
    pub share: Share,
    /// Whether it may be made.
    pub create: Create,
}

impl FileOptions {
    /// For reading.
    pub fn read_only() -> FileOptions {
        FileOptions { read_only: true, ..FileOptions::default() }
    }

    /// Makes a file that must not be there.
    pub fn create_new(len: u64) -> FileOptions {
        FileOptions { create: Create::New(len), ..FileOptions::default() }
    }
}

/// A file or block device.
pub struct FileStorage {
    fd: Arc<OwnedFd>,
    path: PathBuf,
    len: AtomicU64,
    read_only: bool,
    device: bool,
    /// Block size of direct I/O; 1 through the page cache.
    align: u64,
    /// Blocks that a direct write changes.
    blocks: RangeLock,
    poisoned: AtomicBool,
    /// For large pieces of jobs.
    bulk: Bulk,
    /// The file system has said that it cannot do it.
    no_zero: AtomicBool,
    no_punch: AtomicBool,
}

impl FileStorage {
    /// Opens (or makes) the file at `path`, with QEMU's image locks.
    pub fn open(path: impl AsRef<Path>, options: FileOptions) -> Result<FileStorage, OpenError> {
        let path = path.as_ref();
        let failed =
            |error: Errno| OpenError::Io(IoError::from(std::io::Error::from(error)).in_node(path.display()));
        // Without NONBLOCK, opening a FIFO would wait for its other end.
        let mut flags = OFlags::CLOEXEC
            | OFlags::NONBLOCK
            | if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        if options.direct {
            flags |= OFlags::DIRECT;
        }
        match options.create {
            Create::No => {}
            Create::New(_) => flags |= OFlags::CREATE | OFlags::EXCL,
            Create::Truncate(_) => flags |= OFlags::CREATE,
        }
        let fd = rustix::fs::open(path, flags, Mode::from_raw_mode(0o644)).map_err(failed)?;
        let stat = rustix::fs::fstat(&fd).map_err(failed)?;
        let device = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            other => {
                return Err(OpenError::Refused {
                    why: format!("{}: a file or block device is needed, this is a {other:?}", path.display()),
                });
            }
        };
        // The ring would not wait for the disk otherwise.
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(failed)?;
        rustix::fs::fcntl_setfl(&fd, flags - OFlags::NONBLOCK).map_err(failed)?;
        if options.share == Share::Guarded {
            locks::take(fd.as_fd(), options.read_only, &path.display().to_string())?;
        }
        if let (Create::New(len) | Create::Truncate(len), false) = (options.create, device) {
            rustix::fs::ftruncate(&fd, 0).and_then(|()| rustix::fs::ftruncate(&fd, len)).map_err(failed)?;
        }
        let len = rustix::fs::seek(&fd, SeekFrom::End(0)).map_err(failed)?;
        let align = if options.direct { direct_align(&fd, device) } else { 1 };
        Ok(FileStorage {
            fd: Arc::new(fd),
            path: path.to_owned(),
            len: AtomicU64::new(len),
            read_only: options.read_only,
            device,
            align: u64::from(align),
            blocks: RangeLock::new(),
            poisoned: AtomicBool::new(false),
            bulk: Bulk::default(),
            no_zero: AtomicBool::new(false),
            no_punch: AtomicBool::new(false),
        })
    }

    /// As [`FileStorage::open`], for sharing at once.
    pub fn open_handle(path: impl AsRef<Path>, options: FileOptions) -> Result<StorageHandle, OpenError> {
        FileStorage::open(path, options).map(StorageHandle::new)
    }

    /// Looks how long the file is: another process may have changed that while nobody here used it.
    pub fn look_at_len(&self) -> Result<(), OpenError> {
        let len =
            rustix::fs::seek(&self.fd, SeekFrom::End(0)).map_err(|error| self.named(error.into(), 0, 0))?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    /// Takes the image locks of a reader or a writer, where it was opened without them: for a file that is opened
    /// before it is known who uses it. They last until [`FileStorage::unlock`].
    pub fn lock(&self, read_only: bool) -> Result<(), OpenError> {
        locks::take(self.fd.as_fd(), read_only, &self.name())
    }

    /// Gives all image locks back.
    pub fn unlock(&self) -> Result<(), OpenError> {
        locks::release(self.fd.as_fd(), &self.name())
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn may_write(&self) -> IoResult<()> {
        if self.read_only {
            return Err(
                IoError::new(ErrorKind::NotPermitted, "the file was opened read-only").in_node(self.name())
            );
        }
        if self.poisoned.load(Ordering::Acquire) {
            return Err(IoError::new(
                ErrorKind::Poisoned,
                "a sync failed earlier, so what is on the disk is unknown; close and check the image",
            )
            .in_node(self.name()));
        }
        Ok(())
    }

    fn named(&self, error: std::io::Error, at: u64, len: u64) -> IoError {
        IoError::from(error).at(at, len).in_node(self.name())
    }

    /// The end of a range that lies inside, or (where the file can grow) anywhere.
    fn end_for_write(&self, at: u64, len: u64) -> IoResult<u64> {
        let limit = if self.device { Storage::len(self) } else { i64::MAX as u64 };
        range_end(at, len, limit).ok_or_else(|| {
            let why =
                if self.device { "the range ends behind the device" } else { "no file can be that long" };
            IoError::new(if self.device { ErrorKind::InvalidInput } else { ErrorKind::TooLarge }, why)
                .at(at, len)
                .in_node(self.name())
        })
    }

    /// Runs a blocking call on the file on a helper thread.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&OwnedFd) -> Result<T, Errno> + Send + 'static,
    ) -> Result<T, Errno> {
        let fd = self.fd.clone();
        rt::offload(move || work(&fd)).await.unwrap_or(Err(Errno::IO))
    }

    /// Fills `buf` from byte `at`; every byte must be in the file. Aligned if `direct`.
    async fn read_plain(&self, at: u64, mut buf: BytesMut) -> IoResult<BytesMut> {
        let (len, mut done) = (buf.len(), 0);
        while done < len {
            let op = ReadAt::new(self.fd.clone(), at + done as u64, buf.slice(done..len));
            let BufResult(result, slice) = compio::runtime::submit(op).await.into_inner();
            buf = slice.into_inner();
            match result {
                Ok(0) => {
                    // Behind the end of the last block of a direct read there may be less than asked for.
                    let need = Storage::len(self).saturating_sub(at).min(len as u64);
                    if self.align > 1 && done as u64 >= need {
                        return Ok(buf);
                    }
                    return Err(IoError::new(
                        ErrorKind::Io,
                        "the file has become shorter than it was when opened",
                    )
                    .at(at, len as u64)
                    .in_node(self.name()));
                }
                Ok(n) => done += n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.named(error, at, len as u64)),
            }
        }
        Ok(buf)
    }

    /// Writes all of `data`. Aligned if `direct`.
    async fn write_plain(&self, at: u64, data: Gather) -> IoResult<()> {
        self.write_to(&self.fd, at, data).await
    }

    /// Writes all of `data` through `fd`, which is open on this file.
    async fn write_to(&self, fd: &Arc<OwnedFd>, at: u64, data: Gather) -> IoResult<()> {
        let total = data.len();
        let (mut at, mut left) = (at, data);
        while !left.is_empty() {
            let runs = if left.runs().len() > MAX_RUNS {
                Gather::from(left.to_bytes()).into_runs()
            } else {
                left.clone().into_runs()
            };
            let op = WriteVectoredAt::new(fd.clone(), at, runs);
            let BufResult(result, _) = compio::runtime::submit(op).await;
            match result {
                Ok(0) => {
                    return Err(IoError::new(ErrorKind::Io, "the device took nothing").at(at, total as u64));
                }
                Ok(n) => {
                    at += n as u64;
                    left = left.slice(n, left.len() - n);
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.named(error, at, left.len() as u64)),
            }
        }
        self.len.fetch_max(at, Ordering::AcqRel);
        Ok(())
    }

    /// A direct write of any range: what is not whole blocks is read and changed.
    async fn write_direct(&self, at: u64, data: Gather) -> IoResult<()> {
        let len = data.len() as u64;
        let (start, end) = (align_down(at, self.align), align_up(at + len, self.align));
        let _blocks = self.blocks.exclusive(start, end).await;
        let whole = start == at && end == at + len;
        if whole && data.runs().iter().all(|run| self.fits(run)) {
            return self.write_plain(at, data).await;
        }
        let mut block = aligned_buffer((end - start) as usize, self.align as usize);
        let size = Storage::len(self);
        for edge in [start, end - self.align] {
            let covered = edge >= at && edge + self.align <= at + len;
            if !covered && edge < size {
                let old = aligned_buffer(self.align as usize, self.align as usize);
                let old = self.read_plain(edge, old).await?;
                let place = (edge - start) as usize;
                block[place..place + old.len()].copy_from_slice(&old);
            }
        }
        let mut place = (at - start) as usize;
        for run in data.runs() {
            block[place..place + run.len()].copy_from_slice(run);
            place += run.len();
        }
        self.write_plain(start, Gather::from(block.freeze())).await
    }

    fn fits(&self, run: &Bytes) -> bool {
        (run.as_ptr() as u64).is_multiple_of(self.align) && (run.len() as u64).is_multiple_of(self.align)
    }

    /// Zeroes a range with writes.
    async fn write_zero_pieces(&self, at: u64, len: u64) -> IoResult<()> {
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(ZERO_PIECE);
            let data = Gather::from(zero_bytes(piece as usize));
            if self.align > 1 {
                self.write_direct(at + done, data).await?;
            } else {
                self.write_plain(at + done, data).await?;
            }
            done += piece;
        }
        Ok(())
    }

    /// Has the kernel zero a range that lies inside the file; `false` where it cannot.
    async fn kernel_zero(&self, at: u64, len: u64, unmap: bool) -> IoResult<bool> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let ways = [
            (unmap, punch, &self.no_punch),
            (true, zero, &self.no_zero),
            (!self.device, punch, &self.no_punch),
        ];
        for (wanted, flags, cannot) in ways {
            if !wanted || cannot.load(Ordering::Relaxed) {
                continue;
            }
            match self.blocking(move |fd| rustix::fs::fallocate(fd, flags, at, len)).await {
                Ok(()) => return Ok(true),
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => cannot.store(true, Ordering::Relaxed),
                // Of a block device: not aligned to its blocks.
                Err(Errno::INVAL) if self.device => return Ok(false),
                Err(error) => return Err(self.named(error.into(), at, len)),
            }
        }
        Ok(false)
    }
}

/// Block size of direct I/O on an open file.
fn direct_align(fd: &OwnedFd, device: bool) -> u32 {
    if device {
        return rustix::fs::ioctl_blksszget(fd).unwrap_or(DIRECT_ALIGN).max(512);
    }
    /// STATX_DIOALIGN, which asks for the alignment of direct I/O.
    const DIO_ALIGN: u32 = 0x2000;
    let flags = rustix::fs::StatxFlags::from_bits_retain(DIO_ALIGN);
    match rustix::fs::statx(fd, "", rustix::fs::AtFlags::EMPTY_PATH, flags) {
        Ok(stat) if stat.stx_mask & DIO_ALIGN != 0 && stat.stx_dio_offset_align.is_power_of_two() => {
            stat.stx_dio_offset_align.max(stat.stx_dio_mem_align).max(512)
        }
        _ => DIRECT_ALIGN,
    }
}

impl Storage for FileStorage {
    fn limits(&self) -> Limits {
        Limits {
            request_align: 1,
            memory_align: self.align as u32,
            preferred_bytes: DIRECT_ALIGN,
            max_transfer: MAX_TRANSFER_BYTES,
            writable: !self.read_only,
            fast_zero: !(self.no_zero.load(Ordering::Relaxed) && self.no_punch.load(Ordering::Relaxed)),
            discard: !self.no_punch.load(Ordering::Relaxed),
            multi_conn: true,
        }
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    async fn read(&self, _cx: &Ctx, at: u64, mut buf: BytesMut) -> IoResult<BytesMut> {
        let len = buf.len() as u64;
        if range_end(at, len, Storage::len(self)).is_none() {
            let why = format!("the range ends behind the file, which has {} bytes", Storage::len(self));
            return Err(IoError::new(ErrorKind::InvalidInput, why).at(at, len).in_node(self.name()));
        }
        let aligned = [at, len, buf.as_ptr() as u64].iter().all(|n| n.is_multiple_of(self.align));
        if len == 0 || aligned {
            return self.read_plain(at, buf).await;
        }
        let (start, end) = (align_down(at, self.align), align_up(at + len, self.align));
        let block = aligned_buffer((end - start) as usize, self.align as usize);
        let block = self.read_plain(start, block).await?;
        let place = (at - start) as usize;
        buf.copy_from_slice(&block[place..place + len as usize]);
        Ok(buf)
    }

    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        self.may_write()?;
        self.end_for_write(at, data.len() as u64)?;
        if data.is_empty() {
            return Ok(());
        }
        if self.align > 1 {
            self.write_direct(at, data).await?;
        } else if !(self.is_bulk(cx, at, data.len() as u64) && self.write_bulk(at, &data).await?) {
            self.write_plain(at, data).await?;
        }
        if flags.contains(WriteFlags::FUA) { self.sync(cx).await } else { Ok(()) }
    }

    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.may_write()?;
        let end = self.end_for_write(at, len)?;
        if len == 0 {
            return Ok(());
        }
        // Growing makes zeroes; only what lies inside needs any.
        let size = Storage::len(self);
        let inside = end.min(size).saturating_sub(at);
        // A direct write of the same block must not bring its old bytes back.
        let start = align_down(at, self.align);
        let blocks = self.blocks.exclusive(start, align_up(end, self.align)).await;
        let done = inside == 0 || self.kernel_zero(at, inside, flags.contains(ZeroFlags::MAY_UNMAP)).await?;
        drop(blocks);
        if !done {
            if flags.contains(ZeroFlags::NO_FALLBACK) {
                return Err(IoError::new(ErrorKind::Unsupported, "zeroing would not be faster than writing")
                    .at(at, len)
                    .in_node(self.name()));
            }
            self.write_zero_pieces(at, inside).await?;
        }
        if end > size {
            // Reserved where it may not be unmapped, as written zeroes would be.
            let reserve = !flags.contains(ZeroFlags::MAY_UNMAP);
            let from = at.max(size);
            let reserved = reserve
                && match self
                    .blocking(move |fd| rustix::fs::fallocate(fd, FallocateFlags::empty(), from, end - from))
                    .await
                {
                    Ok(()) => true,
                    Err(Errno::OPNOTSUPP | Errno::NOSYS) => false,
                    Err(error) => return Err(self.named(error.into(), at, len)),
                };
            if !reserved {
                self.grow(end).await?;
            }
            self.len.fetch_max(end, Ordering::AcqRel);
        }
        if flags.contains(ZeroFlags::FUA) { self.sync(cx).await } else { Ok(()) }
    }

    async fn discard(&self, _cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.may_write()?;
        let end = at.saturating_add(len).min(Storage::len(self));
        let (start, end) = if self.device {
            (align_up(at, u64::from(DIRECT_ALIGN)), align_down(end, u64::from(DIRECT_ALIGN)))
        } else {
            (at, end)
        };
        if start >= end || self.no_punch.load(Ordering::Relaxed) {
            return Ok(());
        }
        let from = align_down(start, self.align);
        let _blocks = self.blocks.exclusive(from, align_up(end, self.align)).await;
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match self.blocking(move |fd| rustix::fs::fallocate(fd, punch, start, end - start)).await {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => {
                self.no_punch.store(true, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => Err(self.named(error.into(), at, len)),
        }
    }

    async fn write_back(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        if self.align > 1 || (self.is_bulk(cx, at, len) && self.bulk.is_open()) {
            return Ok(());
        }
        self.blocking(move |fd| {
            let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
                | libc::SYNC_FILE_RANGE_WRITE
                | libc::SYNC_FILE_RANGE_WAIT_AFTER;
            // SAFETY: the descriptor is open for the call, which takes no memory.
            let result = unsafe { libc::sync_file_range(fd.as_raw_fd(), at as i64, len as i64, flags) };
            if result == 0 {
                Ok(())
            } else {
                Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
            }
        })
        .await
        .map_err(|error| {
            // The kernel forgets such an error once told: a later sync would not see it.
            self.poisoned.store(true, Ordering::Release);
            self.named(error.into(), at, len)
        })
    }

    async fn allocate(&self, _cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.may_write()?;
        let end = self.end_for_write(at, len)?;
        let result =
            self.blocking(move |fd| rustix::fs::fallocate(fd, FallocateFlags::empty(), at, len)).await;
        match result {
            Ok(()) => {
                self.len.fetch_max(end, Ordering::AcqRel);
                Ok(())
            }
            Err(error) => Err(self.named(error.into(), at, len)),
        }
    }

    async fn sync(&self, _cx: &Ctx) -> IoResult<()> {
        if self.read_only {
            return Ok(());
        }
        self.may_write()?;
        let BufResult(result, _) = compio::runtime::submit(Sync::new(self.fd.clone(), true)).await;
        result.map(|_| ()).map_err(|error| {
            self.poisoned.store(true, Ordering::Release);
            IoError::from(error).in_node(self.name())
        })
    }

    async fn set_len(&self, _cx: &Ctx, len: u64) -> IoResult<()> {
        self.may_write()?;
        if self.device {
            return Err(IoError::new(
                ErrorKind::Unsupported,
                "a block device's length cannot be changed from here",
            )
            .in_node(self.name()));
        }
        self.blocking(move |fd| rustix::fs::ftruncate(fd, len))
            .await
            .map_err(|error| self.named(error.into(), 0, len))?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    async fn extents(&self, _cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        let size = Storage::len(self);
        let end = range_end(at, len, size).ok_or_else(|| {
            IoError::new(
                ErrorKind::InvalidInput,
                format!("the range ends behind the file, which has {size} bytes"),
            )
            .at(at, len)
            .in_node(self.name())
        })?;
        let device = self.device;
        self.blocking(move |fd| if device { Ok(data_run(at, end)) } else { holes(fd, at, end) })
            .await
            .map_err(|error| self.named(error.into(), at, len))
    }
}

impl FileStorage {
    /// Makes the file at least `end` bytes long, and never shorter.
    async fn grow(&self, end: u64) -> IoResult<()> {
        self.blocking(move |fd| {
            // Writing one zero byte at the end cannot shorten a file that another write has made longer meanwhile,
            // which a truncation could; the byte lies behind everything that was there.
            let size = rustix::fs::fstat(fd)?.st_size as u64;
            if size < end { rustix::io::pwrite(fd, &[0], end - 1).map(|_| ()) } else { Ok(()) }
        })
        .await
        .map_err(|error| self.named(error.into(), end, 0))
    }
}

fn data_run(at: u64, end: u64) -> Extents {
    let mut extents = Extents::new();
    push_extent(&mut extents, Extent { host: Some(at), ..Extent::new(at, end - at, ExtentKind::Data) });
    extents
}

/// Data and holes from `at`, up to [`MAX_EXTENTS`] of them.
fn holes(fd: &OwnedFd, at: u64, end: u64) -> Result<Extents, Errno> {
    let (mut extents, mut at) = (Extents::new(), at);
    while at < end && extents.len() < MAX_EXTENTS {
        let data = match rustix::fs::seek(fd, SeekFrom::Data(at)) {
            Ok(data) => data.min(end),
            Err(Errno::NXIO) => end,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                push_extent(
                    &mut extents,
                    Extent { host: Some(at), ..Extent::new(at, end - at, ExtentKind::Data) },
                );
                break;
            }
            Err(error) => return Err(error),
        };
        push_extent(&mut extents, Extent::new(at, data - at, ExtentKind::Zero));
        if data == end {
            break;
        }
        let hole = rustix::fs::seek(fd, SeekFrom::Hole(data)).unwrap_or(end).clamp(data + 1, end);
        push_extent(
            &mut extents,
            Extent { host: Some(data), ..Extent::new(data, hole - data, ExtentKind::Data) },
        );
        at = hole;
    }
    Ok(extents)
}

#[cfg(test)]
mod tests;
