//! Bytes in memory.

use bytes::BytesMut;
use infill_base::{
    Ctx, ErrorKind, Extent, ExtentKind, Extents, Gather, IoError, IoResult, Limits, WriteFlags, ZeroFlags,
};
use infill_base::{is_zero, push_extent, range_end};

use crate::Storage;
use crate::sync::{Mutex, lock};

/// Granularity of [`Storage::extents`], in bytes.
const EXTENT_BYTES: usize = 4096;

/// A storage whose bytes lie in memory: for tests, and for small disks that need not last.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    bytes: Mutex<Vec<u8>>,
}

impl MemoryStorage {
    /// `len` zero bytes.
    pub fn new(len: usize) -> MemoryStorage {
        MemoryStorage { bytes: Mutex::new(vec![0; len]) }
    }

    /// The given bytes.
    pub fn from_bytes(bytes: Vec<u8>) -> MemoryStorage {
        MemoryStorage { bytes: Mutex::new(bytes) }
    }

    /// A copy of all bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        lock(&self.bytes).clone()
    }
}

fn outside(at: u64, len: u64, size: usize) -> IoError {
    IoError::new(
        ErrorKind::InvalidInput,
        format!("the range ends behind the storage, which has {size} bytes"),
    )
    .at(at, len)
}

impl Storage for MemoryStorage {
    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn len(&self) -> u64 {
        lock(&self.bytes).len() as u64
    }

    fn name(&self) -> String {
        "memory".into()
    }

    async fn read(&self, _cx: &Ctx, at: u64, mut buf: BytesMut) -> IoResult<BytesMut> {
        let bytes = lock(&self.bytes);
        let end = range_end(at, buf.len() as u64, bytes.len() as u64);
        let end = end.ok_or_else(|| outside(at, buf.len() as u64, bytes.len()))?;
        buf.copy_from_slice(&bytes[at as usize..end as usize]);
        Ok(buf)
    }

    async fn write(&self, _cx: &Ctx, at: u64, data: Gather, _flags: WriteFlags) -> IoResult<()> {
        let mut bytes = lock(&self.bytes);
        let end = grow(&mut bytes, at, data.len() as u64)?;
        let mut at = at as usize;
        for run in data.runs() {
            bytes[at..at + run.len()].copy_from_slice(run);
            at += run.len();
        }
        debug_assert_eq!(at, end);
        Ok(())
    }

    async fn write_zeroes(&self, _cx: &Ctx, at: u64, len: u64, _flags: ZeroFlags) -> IoResult<()> {
        let mut bytes = lock(&self.bytes);
        let end = grow(&mut bytes, at, len)?;
        bytes[at as usize..end].fill(0);
        Ok(())
    }

    async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        let size = self.len();
        let end = at.saturating_add(len).min(size);
        self.write_zeroes(cx, at.min(end), end - at.min(end), ZeroFlags::MAY_UNMAP).await
    }

    async fn allocate(&self, _cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        grow(&mut lock(&self.bytes), at, len).map(|_| ())
    }

    async fn sync(&self, _cx: &Ctx) -> IoResult<()> {
        Ok(())
    }

    async fn set_len(&self, _cx: &Ctx, len: u64) -> IoResult<()> {
        let len =
            usize::try_from(len).map_err(|_| IoError::new(ErrorKind::TooLarge, "larger than memory"))?;
        lock(&self.bytes).resize(len, 0);
        Ok(())
    }

    async fn extents(&self, _cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        let bytes = lock(&self.bytes);
        let end =
            range_end(at, len, bytes.len() as u64).ok_or_else(|| outside(at, len, bytes.len()))? as usize;
        let (mut extents, mut at) = (Extents::new(), at as usize);
        while at < end {
            let next = ((at / EXTENT_BYTES + 1) * EXTENT_BYTES).min(end);
            let kind = if is_zero(&bytes[at..next]) { ExtentKind::Zero } else { ExtentKind::Data };
            let host = (kind == ExtentKind::Data).then_some(at as u64);
            push_extent(&mut extents, Extent { host, ..Extent::new(at as u64, (next - at) as u64, kind) });
            at = next;
        }
        Ok(extents)
    }
}

/// Makes `bytes` reach the end of the range, which it returns.
fn grow(bytes: &mut Vec<u8>, at: u64, len: u64) -> IoResult<usize> {
    let end = at.checked_add(len).and_then(|end| usize::try_from(end).ok());
    let end = end.ok_or_else(|| IoError::new(ErrorKind::TooLarge, "larger than memory").at(at, len))?;
    if end > bytes.len() {
        bytes.resize(end, 0);
    }
    Ok(end)
}
