//! Reads and writes of metadata at any byte alignment, over a storage that may want more.
//!
//! What lies behind the end of the file reads as zeroes, as the format wants it: the last cluster of an image need not
//! be whole.

use bytes::{Bytes, BytesMut};
use infill_base::{Ctx, IoResult, WriteFlags, align_down, align_up, aligned_buffer};
use infill_storage::StorageHandle;

/// Reads `len` bytes from byte `at`; behind the end of the file: zeroes.
pub(crate) async fn read(cx: &Ctx, storage: &StorageHandle, at: u64, len: usize) -> IoResult<BytesMut> {
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
pub(crate) async fn write(cx: &Ctx, storage: &StorageHandle, at: u64, bytes: Bytes) -> IoResult<()> {
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
