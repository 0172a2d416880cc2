//! The object-safe twin of [`Storage`], and the handle that everybody holds.

use std::sync::Arc;

use bytes::BytesMut;
use futures_util::future::LocalBoxFuture;
use infill_base::{Ctx, Extents, Gather, IoResult, Limits, WriteFlags, ZeroFlags};

use crate::Storage;

trait DynStorage: Send + Sync {
    fn limits(&self) -> Limits;
    fn len(&self) -> u64;
    fn name(&self) -> String;
    fn read<'a>(&'a self, cx: &'a Ctx, at: u64, buf: BytesMut) -> LocalBoxFuture<'a, IoResult<BytesMut>>;
    fn write<'a>(
        &'a self,
        cx: &'a Ctx,
        at: u64,
        data: Gather,
        flags: WriteFlags,
    ) -> LocalBoxFuture<'a, IoResult<()>>;
    fn write_zeroes<'a>(
        &'a self,
        cx: &'a Ctx,
        at: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> LocalBoxFuture<'a, IoResult<()>>;
    fn discard<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> LocalBoxFuture<'a, IoResult<()>>;
    fn write_back<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> LocalBoxFuture<'a, IoResult<()>>;
    fn allocate<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> LocalBoxFuture<'a, IoResult<()>>;
    fn sync<'a>(&'a self, cx: &'a Ctx) -> LocalBoxFuture<'a, IoResult<()>>;
    fn set_len<'a>(&'a self, cx: &'a Ctx, len: u64) -> LocalBoxFuture<'a, IoResult<()>>;
    fn extents<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> LocalBoxFuture<'a, IoResult<Extents>>;
}

impl<S: Storage> DynStorage for S {
    fn limits(&self) -> Limits {
        Storage::limits(self)
    }
    fn len(&self) -> u64 {
        Storage::len(self)
    }
    fn name(&self) -> String {
        Storage::name(self)
    }
    fn read<'a>(&'a self, cx: &'a Ctx, at: u64, buf: BytesMut) -> LocalBoxFuture<'a, IoResult<BytesMut>> {
        Box::pin(Storage::read(self, cx, at, buf))
    }
    fn write<'a>(
        &'a self,
        cx: &'a Ctx,
        at: u64,
        data: Gather,
        flags: WriteFlags,
    ) -> LocalBoxFuture<'a, IoResult<()>> {
        Box::pin(Storage::write(self, cx, at, data, flags))
    }
    fn write_zeroes<'a>(
        &'a self,
        cx: &'a Ctx,
        at: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> LocalBoxFuture<'a, IoResult<()>> {
        Box::pin(Storage::write_zeroes(self, cx, at, len, flags))
    }
    fn discard<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> LocalBoxFuture<'a, IoResult<()>> {
        Box::pin(Storage::discard(self, cx, at, len))
    }
    fn write_back<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> LocalBoxFuture<'a, IoResult<()>> {
        Box::pin(Storage::write_back(self, cx, at, len))
    }
    fn allocate<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> LocalBoxFuture<'a, IoResult<()>> {
        Box::pin(Storage::allocate(self, cx, at, len))
    }
    fn sync<'a>(&'a self, cx: &'a Ctx) -> LocalBoxFuture<'a, IoResult<()>> {
        Box::pin(Storage::sync(self, cx))
    }
    fn set_len<'a>(&'a self, cx: &'a Ctx, len: u64) -> LocalBoxFuture<'a, IoResult<()>> {
        Box::pin(Storage::set_len(self, cx, len))
    }
    fn extents<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> LocalBoxFuture<'a, IoResult<Extents>> {
        Box::pin(Storage::extents(self, cx, at, len))
    }
}

/// Stands before what changes a storage: sees each change, and makes it on the storage itself.
pub trait Gate: Send + Sync + 'static {
    /// See [`Storage::write`].
    fn write<'a>(
        &'a self,
        storage: &'a StorageHandle,
        cx: &'a Ctx,
        at: u64,
        data: Gather,
        flags: WriteFlags,
    ) -> LocalBoxFuture<'a, IoResult<()>>;

    /// See [`Storage::write_zeroes`].
    fn write_zeroes<'a>(
        &'a self,
        storage: &'a StorageHandle,
        cx: &'a Ctx,
        at: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> LocalBoxFuture<'a, IoResult<()>>;

    /// See [`Storage::discard`].
    fn discard<'a>(
        &'a self,
        storage: &'a StorageHandle,
        cx: &'a Ctx,
        at: u64,
        len: u64,
    ) -> LocalBoxFuture<'a, IoResult<()>>;

    /// See [`Storage::allocate`].
    fn allocate<'a>(
        &'a self,
        storage: &'a StorageHandle,
        cx: &'a Ctx,
        at: u64,
        len: u64,
    ) -> LocalBoxFuture<'a, IoResult<()>>;

    /// See [`Storage::set_len`].
    fn set_len<'a>(
        &'a self,
        storage: &'a StorageHandle,
        cx: &'a Ctx,
        len: u64,
    ) -> LocalBoxFuture<'a, IoResult<()>>;
}

/// A storage behind a gate. What changes nothing goes past it, as it is.
struct Gated {
    storage: StorageHandle,
    gate: Box<dyn Gate>,
}

impl DynStorage for Gated {
    fn limits(&self) -> Limits {
        self.storage.limits()
    }
    fn len(&self) -> u64 {
        self.storage.len()
    }
    fn name(&self) -> String {
        self.storage.name()
    }
    fn read<'a>(&'a self, cx: &'a Ctx, at: u64, buf: BytesMut) -> LocalBoxFuture<'a, IoResult<BytesMut>> {
        self.storage.0.read(cx, at, buf)
    }
    fn write<'a>(
        &'a self,
        cx: &'a Ctx,
        at: u64,
        data: Gather,
        flags: WriteFlags,
    ) -> LocalBoxFuture<'a, IoResult<()>> {
        self.gate.write(&self.storage, cx, at, data, flags)
    }
    fn write_zeroes<'a>(
        &'a self,
        cx: &'a Ctx,
        at: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> LocalBoxFuture<'a, IoResult<()>> {
        self.gate.write_zeroes(&self.storage, cx, at, len, flags)
    }
    fn discard<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> LocalBoxFuture<'a, IoResult<()>> {
        self.gate.discard(&self.storage, cx, at, len)
    }
    fn write_back<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> LocalBoxFuture<'a, IoResult<()>> {
        self.storage.0.write_back(cx, at, len)
    }
    fn allocate<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> LocalBoxFuture<'a, IoResult<()>> {
        self.gate.allocate(&self.storage, cx, at, len)
    }
    fn sync<'a>(&'a self, cx: &'a Ctx) -> LocalBoxFuture<'a, IoResult<()>> {
        self.storage.0.sync(cx)
    }
    fn set_len<'a>(&'a self, cx: &'a Ctx, len: u64) -> LocalBoxFuture<'a, IoResult<()>> {
        self.gate.set_len(&self.storage, cx, len)
    }
    fn extents<'a>(&'a self, cx: &'a Ctx, at: u64, len: u64) -> LocalBoxFuture<'a, IoResult<Extents>> {
        self.storage.0.extents(cx, at, len)
    }
}

/// A shared storage of any kind. Cloning shares it; it is closed when the last handle goes.
#[derive(Clone)]
pub struct StorageHandle(Arc<dyn DynStorage>);

impl std::fmt::Debug for StorageHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("StorageHandle").field(&self.name()).finish()
    }
}

impl StorageHandle {
    /// Shares `storage`.
    pub fn new(storage: impl Storage) -> Self {
        StorageHandle(Arc::new(storage))
    }

    /// Shares a storage that somebody else keeps a typed reference to.
    pub fn from_arc<S: Storage>(storage: Arc<S>) -> Self {
        StorageHandle(storage)
    }

    /// The same storage, whose changes go through `gate`.
    pub fn behind(self, gate: impl Gate) -> Self {
        StorageHandle(Arc::new(Gated { storage: self, gate: Box::new(gate) }))
    }

    /// Whether both are the same storage.
    pub fn is_same(&self, other: &StorageHandle) -> bool {
        std::ptr::addr_eq(Arc::as_ptr(&self.0), Arc::as_ptr(&other.0))
    }

    /// See [`Storage::limits`].
    pub fn limits(&self) -> Limits {
        self.0.limits()
    }

    /// See [`Storage::len`].
    #[expect(clippy::len_without_is_empty, reason = "a disk is not a collection")]
    pub fn len(&self) -> u64 {
        self.0.len()
    }

    /// See [`Storage::name`].
    pub fn name(&self) -> String {
        self.0.name()
    }

    /// See [`Storage::read`].
    pub async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        self.0.read(cx, at, buf).await
    }

    /// Reads `len` bytes into a new buffer that is aligned as the storage likes it.
    pub async fn read_vec(&self, cx: &Ctx, at: u64, len: usize) -> IoResult<BytesMut> {
        let buf = infill_base::aligned_buffer(len, self.limits().memory_align as usize);
        self.0.read(cx, at, buf).await
    }

    /// See [`Storage::write`].
    pub async fn write(&self, cx: &Ctx, at: u64, data: impl Into<Gather>, flags: WriteFlags) -> IoResult<()> {
        self.0.write(cx, at, data.into(), flags).await
    }

    /// See [`Storage::write_zeroes`].
    pub async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.0.write_zeroes(cx, at, len, flags).await
    }

    /// See [`Storage::discard`].
    pub async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.0.discard(cx, at, len).await
    }

    /// See [`Storage::write_back`].
    pub async fn write_back(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.0.write_back(cx, at, len).await
    }

    /// See [`Storage::allocate`].
    pub async fn allocate(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.0.allocate(cx, at, len).await
    }

    /// See [`Storage::sync`].
    pub async fn sync(&self, cx: &Ctx) -> IoResult<()> {
        self.0.sync(cx).await
    }

    /// See [`Storage::set_len`].
    pub async fn set_len(&self, cx: &Ctx, len: u64) -> IoResult<()> {
        self.0.set_len(cx, len).await
    }

    /// See [`Storage::extents`].
    pub async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        self.0.extents(cx, at, len).await
    }
}
