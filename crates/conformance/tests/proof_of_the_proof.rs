//! The crash proof sees faults that lie below the format: a storage that lies.

use bytes::BytesMut;
use infill_base::{Ctx, Extents, Gather, IoResult, Limits, WriteFlags, ZeroFlags};
use infill_conformance::Format;
use infill_conformance::crash::{Plan, run_all};
use infill_storage::{Storage, StorageHandle};

/// What the storage lies about.
#[derive(Clone, Copy, PartialEq)]
enum Lie {
    /// A sync says that it is done, and is not.
    Sync,
    /// A FUA write is an ordinary one.
    Fua,
    /// Every eighth byte range is not written.
    Write,
}

struct Liar(StorageHandle, Lie);

impl Storage for Liar {
    fn limits(&self) -> Limits {
        self.0.limits()
    }
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn name(&self) -> String {
        self.0.name()
    }
    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        self.0.read(cx, at, buf).await
    }
    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        if self.1 == Lie::Write && (at >> 12) % 8 == 3 {
            return Ok(());
        }
        let flags = if self.1 == Lie::Fua { WriteFlags::empty() } else { flags };
        self.0.write(cx, at, data, flags).await
    }
    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.0.write_zeroes(cx, at, len, flags).await
    }
    async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.0.discard(cx, at, len).await
    }
    async fn sync(&self, cx: &Ctx) -> IoResult<()> {
        if self.1 == Lie::Sync { Ok(()) } else { self.0.sync(cx).await }
    }
    async fn set_len(&self, cx: &Ctx, len: u64) -> IoResult<()> {
        self.0.set_len(cx, len).await
    }
    async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        self.0.extents(cx, at, len).await
    }
}

#[track_caller]
fn is_found(storage: fn(StorageHandle) -> StorageHandle) {
    let plans = (1..=4).map(|seed| Plan { storage, ..Plan::new(Format::Raw, seed) });
    let violation = run_all(plans).violation.expect("the lie is found");
    println!("{violation}");
}

#[test]
fn a_sync_that_does_nothing_is_found() {
    is_found(|storage| StorageHandle::new(Liar(storage, Lie::Sync)));
}

#[test]
fn a_fua_write_that_is_not_stable_is_found() {
    is_found(|storage| StorageHandle::new(Liar(storage, Lie::Fua)));
}

#[test]
fn a_lost_write_is_found() {
    is_found(|storage| StorageHandle::new(Liar(storage, Lie::Write)));
}
