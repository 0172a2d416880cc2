//! What the targets share: an image of any format, judged by an oracle.
#![forbid(unsafe_code)]

use std::sync::Arc;

use infill_base::{Ctx, OpenError, WriteFlags};
use infill_node::{CheckReport, Node, Repair};
use infill_storage::{MemoryStorage, StorageHandle};

/// Longest input that is looked at, in bytes.
pub const INPUT_BYTES_MAX: usize = 1 << 20;
/// Larger disks are read here and there, not everywhere.
const READ_BYTES_MAX: u64 = 4 << 20;
const PIECE_BYTES: u64 = 64 << 10;

/// What a format gives to be judged.
pub trait Format {
    type Node: Node;
    fn open(storage: StorageHandle, read_only: bool) -> impl Future<Output = Result<Self::Node, OpenError>>;
    fn check(storage: &StorageHandle, repair: Repair) -> impl Future<Output = Result<CheckReport, OpenError>>;
}

/// Reads what it can of a disk: (offset, bytes) for each piece that was readable.
async fn content(node: &impl Node) -> Vec<(u64, Vec<u8>)> {
    let (size, mut pieces) = (node.len(), Vec::new());
    let step = (size / (READ_BYTES_MAX / PIECE_BYTES)).max(PIECE_BYTES);
    let mut at = 0;
    while at < size {
        let buf = bytes::BytesMut::zeroed(PIECE_BYTES.min(size - at) as usize);
        if let Ok(data) = node.read(&Ctx::GUEST, at, buf).await {
            pieces.push((at, data.to_vec()));
        }
        let _ = node.extents(&Ctx::GUEST, at, PIECE_BYTES.min(size - at)).await;
        at = at.saturating_add(step);
    }
    pieces
}

/// Opens, reads, checks, repairs and writes the image in `data`. The oracle:
/// * nothing panics, and reading changes no byte of the file;
/// * an image that a repair says it has mended opens, and checks clean;
/// * what was written to an image without findings reads back, here and after a reopen, and leaves it without corruptions.
pub fn judge<F: Format>(data: &[u8]) {
    if data.len() > INPUT_BYTES_MAX {
        return;
    }
    infill_sim::block_on(async {
        let file = Arc::new(MemoryStorage::from_bytes(data.to_vec()));
        let storage = StorageHandle::from_arc(file.clone());
        if let Ok(node) = F::open(storage.clone(), true).await {
            content(&node).await;
        }
        let clean = F::check(&storage, Repair::Nothing).await;
        assert!(file.to_bytes() == data, "reading has changed the file");
        if clean.as_ref().is_ok_and(|report| report.corruptions + report.check_errors == 0) {
            write_and_look_again::<F>(data).await;
        }
        let Ok(report) = F::check(&storage, Repair::All).await else { return };
        if report.corruptions + report.check_errors == 0 {
            let again = F::check(&storage, Repair::Nothing).await;
            let again = again.unwrap_or_else(|error| panic!("a repaired image cannot be checked: {error}"));
            assert_eq!(again.corruptions, 0, "a repaired image is damaged: {:?}", again.messages);
        }
    });
}

async fn write_and_look_again<F: Format>(data: &[u8]) {
    let file = Arc::new(MemoryStorage::from_bytes(data.to_vec()));
    let storage = StorageHandle::from_arc(file);
    let Ok(node) = F::open(storage.clone(), false).await else { return };
    let (size, mark) = (node.len(), [0xab_u8; 700]);
    let places = [0, size / 2, size.saturating_sub(mark.len() as u64)];
    let mut written = Vec::new();
    for at in places {
        let payload = mark[..(mark.len() as u64).min(size - at) as usize].to_vec();
        let len = payload.len();
        if node.write(&Ctx::GUEST, at, payload.into(), WriteFlags::empty()).await.is_ok() {
            written.push((at, len));
        }
    }
    if node.sync(&Ctx::GUEST).await.is_err() || node.close(&Ctx::GUEST).await.is_err() {
        return;
    }
    drop(node);
    let node = F::open(storage.clone(), true).await.expect("an image that was closed cleanly opens");
    for (at, len) in written {
        let read = node.read(&Ctx::GUEST, at, bytes::BytesMut::zeroed(len)).await.expect("what was written reads");
        assert!(read[..] == mark[..len], "what was written at {at} reads back as something else");
    }
    let report = F::check(&storage, Repair::Nothing).await.expect("an image that was closed cleanly is checked");
    assert_eq!(report.corruptions, 0, "writing has damaged the image: {:?}", report.messages);
}
