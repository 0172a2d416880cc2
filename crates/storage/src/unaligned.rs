//! Reads and writes of an image's metadata at any byte alignment and length, over a storage that may want more.
//!
//! What lies behind the end of the file reads as zeroes, as image formats want it: their last cluster need not be
//! whole. Larger ranges than the storage takes at once go in pieces, one after another.

use bytes::{Bytes, BytesMut};
use infill_base::{Ctx, IoResult, WriteFlags, align_down, align_up, aligned_buffer};

use crate::StorageHandle;

/// Reads `len` bytes from byte `at`; behind the end of the file: zeroes.
pub async fn read(cx: &Ctx, storage: &StorageHandle, at: u64, len: usize) -> IoResult<BytesMut> {
    let limits = storage.limits();
    let align = u64::from(limits.request_align.max(1));
    let file_len = storage.len();
    let start = align_down(at, align);
    let end = align_up(at.saturating_add(len as u64), align);
    // An aligned storage has an aligned length; a tail of less than that can only be read where any byte will do.
    let readable = end.min(if align > 1 { align_down(file_len, align) } else { file_len });
    let mut out = BytesMut::zeroed(len);
    let mut from = start;
    while from < readable {
        let piece = (readable - from).min(align_down(limits.max_transfer.max(align), align));
        let buf = aligned_buffer(piece as usize, limits.memory_align as usize);
        let buf = storage.read(cx, from, buf).await?;
        let (first, last) = (from.max(at), (from + piece).min(at.saturating_add(len as u64)));
        if first < last {
            out[(first - at) as usize..(last - at) as usize]
                .copy_from_slice(&buf[(first - from) as usize..(last - from) as usize]);
        }
        from += piece;
    }
    Ok(out)
}

/// Writes `bytes` from byte `at`. Where the storage wants larger pieces, what lies around is written back unchanged:
/// nobody else may write there at the same time.
pub async fn write(cx: &Ctx, storage: &StorageHandle, at: u64, bytes: Bytes) -> IoResult<()> {
    let limits = storage.limits();
    let align = u64::from(limits.request_align.max(1));
    let (mut from, mut bytes) = (at, bytes);
    if !from.is_multiple_of(align) || !(bytes.len() as u64).is_multiple_of(align) {
        let start = align_down(at, align);
        let end = align_up(at + bytes.len() as u64, align);
        let mut around = read(cx, storage, start, (end - start) as usize).await?;
        let skip = (at - start) as usize;
        around[skip..skip + bytes.len()].copy_from_slice(&bytes);
        (from, bytes) = (start, around.freeze());
    }
    let most = align_down(limits.max_transfer.max(align), align) as usize;
    while !bytes.is_empty() {
        let piece = bytes.split_to(bytes.len().min(most));
        let len = piece.len() as u64;
        storage.write(cx, from, piece, WriteFlags::empty()).await?;
        from += len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use infill_base::{Extents, Gather, Limits, ZeroFlags};

    use super::*;
    use crate::{MemoryStorage, Storage};

    /// A storage that takes whole sectors only, at most two at once.
    struct Sectors(MemoryStorage);

    impl Storage for Sectors {
        fn limits(&self) -> Limits {
            Limits { request_align: 512, max_transfer: 1024, ..Limits::default() }
        }
        fn len(&self) -> u64 {
            self.0.len()
        }
        fn name(&self) -> String {
            self.0.name()
        }
        async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
            assert!(at.is_multiple_of(512) && buf.len().is_multiple_of(512) && buf.len() <= 1024);
            self.0.read(cx, at, buf).await
        }
        async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
            assert!(at.is_multiple_of(512) && data.len().is_multiple_of(512) && data.len() <= 1024);
            self.0.write(cx, at, data, flags).await
        }
        async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
            self.0.write_zeroes(cx, at, len, flags).await
        }
        async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
            self.0.discard(cx, at, len).await
        }
        async fn sync(&self, cx: &Ctx) -> IoResult<()> {
            self.0.sync(cx).await
        }
        async fn set_len(&self, cx: &Ctx, len: u64) -> IoResult<()> {
            self.0.set_len(cx, len).await
        }
        async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
            self.0.extents(cx, at, len).await
        }
    }

    #[test]
    fn a_write_across_sectors_keeps_what_lies_around_and_behind_the_end_are_zeroes() {
        let memory = std::sync::Arc::new(Sectors(MemoryStorage::from_bytes(vec![7; 4096])));
        let storage = StorageHandle::from_arc(memory.clone());
        let data = Bytes::from(vec![1; 2000]);
        write(&Ctx::GUEST, &storage, 700, data).now_or_never().expect("memory").expect("writes");
        let mut expected = vec![7; 4096];
        expected[700..2700].fill(1);
        assert_eq!(memory.0.to_bytes(), expected);
        let read = read(&Ctx::GUEST, &storage, 650, 4000).now_or_never().expect("memory").expect("reads");
        assert_eq!(read[..3446], expected[650..]);
        assert!(infill_base::is_zero(&read[3446..]));
    }
}
