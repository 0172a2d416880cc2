//! Bytes at offsets: the [`Storage`] trait, and what every layer above needs to be concurrent.
//!
//! * [`Storage`] is for those who write drivers (plain `async fn`); [`StorageHandle`] is what everybody holds.
//! * [`rt`] is the seam to the runtime: spawn, sleep, now. `infill-io` and `infill-sim` provide one each.
//! * [`unaligned`] reads and writes metadata at any alignment.
//! * [`journal`] is what a process leaves to its successor of changes that only memory has.
//! * [`RangeLock`], [`Permits`], [`rounds`] and [`sync`] are the concurrency helpers; all are safe between threads.
//!
//! # Contract
//! * A buffer belongs to the operation: dropping a future detaches the operation and never frees its buffer.
//! * A write is volatile until a later [`Storage::sync`] returns (see `docs/media.md`, which lists the assumptions).
//! * After a sync failed nothing is known; a storage answers everything that writes with
//!   [`ErrorKind::Poisoned`](infill_base::ErrorKind::Poisoned) from then on.
//! * Reads behind the end are errors, writes behind the end make the storage longer (where it can grow).
#![forbid(unsafe_code)]

mod handle;
pub mod journal;
mod memory;
mod null;
mod permits;
mod range_lock;
pub mod rounds;
pub mod rt;
pub mod stream;
pub mod sync;
pub mod unaligned;

use std::future::Future;

use bytes::BytesMut;
use infill_base::{Ctx, Extents, Gather, IoResult, Limits, WriteFlags, ZeroFlags};

pub use handle::{Gate, StorageHandle};
pub use memory::MemoryStorage;
pub use null::NullStorage;
pub use permits::{Permit, Permits};
pub use range_lock::{RangeGuard, RangeLock};

/// Bytes at offsets: a file, a block device, an NBD export, memory, a simulated disk.
///
/// Futures need not be `Send`: an operation runs on the reactor that started it. The storage itself is shared
/// between reactors.
#[expect(clippy::len_without_is_empty, reason = "a disk is not a collection")]
pub trait Storage: Send + Sync + 'static {
    /// What it wants of its callers.
    fn limits(&self) -> Limits;

    /// Length in bytes, now.
    fn len(&self) -> u64;

    /// A name for messages: a path, a URI.
    fn name(&self) -> String;

    /// Fills `buf` from byte `at`, all of it. An error if any of it lies behind the end.
    fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> impl Future<Output = IoResult<BytesMut>>;

    /// Writes `data` from byte `at`.
    fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags)
    -> impl Future<Output = IoResult<()>>;

    /// Makes `len` bytes from `at` read as zeroes.
    fn write_zeroes(
        &self,
        cx: &Ctx,
        at: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> impl Future<Output = IoResult<()>>;

    /// Gives the space of `len` bytes from `at` back; they read as old or zero afterwards.
    fn discard(&self, cx: &Ctx, at: u64, len: u64) -> impl Future<Output = IoResult<()>>;

    /// Makes sure that nothing of the range is a dirty page any more. Says nothing about stability.
    fn write_back(&self, cx: &Ctx, at: u64, len: u64) -> impl Future<Output = IoResult<()>> {
        let _ = (cx, at, len);
        async { Ok(()) }
    }

    /// Reserves space for the range, which keeps what it reads as (behind the end: zeroes, and the storage grows),
    /// so that a later write into it cannot meet `NoSpace`. `Unsupported` where it cannot promise that.
    fn allocate(&self, cx: &Ctx, at: u64, len: u64) -> impl Future<Output = IoResult<()>> {
        let _ = (cx, at, len);
        async {
            Err(infill_base::IoError::new(
                infill_base::ErrorKind::Unsupported,
                "this storage cannot reserve space",
            ))
        }
    }

    /// Everything that was written before the call is on stable storage when it returns.
    fn sync(&self, cx: &Ctx) -> impl Future<Output = IoResult<()>>;

    /// Makes it shorter or longer; what is new reads as zeroes.
    fn set_len(&self, cx: &Ctx, len: u64) -> impl Future<Output = IoResult<()>>;

    /// Data and zero runs from `at`, at most to `at + len`; never `Absent`. `Zero` is a promise about content.
    fn extents(&self, cx: &Ctx, at: u64, len: u64) -> impl Future<Output = IoResult<Extents>>;
}
