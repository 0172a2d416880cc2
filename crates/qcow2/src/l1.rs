//! The active L1 table, all of it in memory: which L2 table describes a guest range.
//!
//! Entries are atomics, read without a lock. Changes are noted by sector, and copied in rounds.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use bytes::{Bytes, BytesMut};
use infill_storage::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use infill_storage::sync::{Mutex, lock};

use crate::entry::{L1Entry, be64};
use crate::format::SECTOR_BYTES;
use crate::format::limits::L1_BYTES_MAX;
use crate::geometry::{HostOffset, L1Index, TABLE_ENTRY_BYTES};
use crate::header::TableRef;

/// Entries that memory is taken for at a time.
const CHUNK_ENTRIES: usize = 8192;
/// Chunks of the longest table.
const CHUNKS_MAX: usize = (L1_BYTES_MAX / TABLE_ENTRY_BYTES) as usize / CHUNK_ENTRIES;

type Chunk = Box<[AtomicU64]>;

#[derive(Debug)]
pub(crate) struct L1 {
    chunks: Box<[OnceLock<Chunk>]>,
    at: AtomicU64,
    count: AtomicU32,
    /// What is written as one piece, in bytes: a sector, or what the storage takes at least.
    piece_bytes: u64,
    /// Pieces that changed since the last copy.
    dirty: Mutex<BTreeSet<u64>>,
}

/// The copy of a piece that changed.
#[derive(Debug)]
pub(crate) struct L1Copy {
    piece: u64,
    /// Where it belongs in the file.
    pub(crate) at: u64,
    pub(crate) bytes: Bytes,
}

fn new_chunk() -> Chunk {
    (0..CHUNK_ENTRIES).map(|_| AtomicU64::new(0)).collect()
}

impl L1 {
    /// From the bytes of the table.
    pub(crate) fn new(table: TableRef, bytes: &[u8], request_align: u32) -> L1 {
        let l1 = L1 {
            chunks: (0..CHUNKS_MAX).map(|_| OnceLock::new()).collect(),
            at: AtomicU64::new(table.at.0),
            count: AtomicU32::new(table.count),
            piece_bytes: u64::from(request_align).max(SECTOR_BYTES as u64),
            dirty: Mutex::default(),
        };
        for (index, entry) in bytes.chunks_exact(TABLE_ENTRY_BYTES as usize).enumerate() {
            l1.slot(index as u32).store(be64(entry), Ordering::Relaxed);
        }
        l1
    }

    fn slot(&self, index: u32) -> &AtomicU64 {
        let chunk = self.chunks[index as usize / CHUNK_ENTRIES].get_or_init(new_chunk);
        &chunk[index as usize % CHUNK_ENTRIES]
    }

    /// Place and length of the table.
    pub(crate) fn table(&self) -> TableRef {
        TableRef {
            at: HostOffset(self.at.load(Ordering::Acquire)),
            count: self.count.load(Ordering::Acquire),
        }
    }

    /// An entry; behind the end of the table: none.
    pub(crate) fn get(&self, index: L1Index) -> L1Entry {
        let chunk = self.chunks.get(index.0 as usize / CHUNK_ENTRIES).and_then(OnceLock::get);
        let word = chunk.map_or(0, |chunk| chunk[index.0 as usize % CHUNK_ENTRIES].load(Ordering::Acquire));
        L1Entry(word)
    }

    /// Sets an entry of the table. Whoever does so excludes others who would set the same.
    pub(crate) fn set(&self, index: L1Index, entry: L1Entry) {
        debug_assert!(index.0 < self.table().count);
        self.slot(index.0).store(entry.0, Ordering::Release);
        lock(&self.dirty).insert(u64::from(index.0) * TABLE_ENTRY_BYTES / self.piece_bytes);
    }

    /// Takes an entry that the file has by now.
    pub(crate) fn adopt(&self, index: L1Index, entry: L1Entry) {
        self.slot(index.0).store(entry.0, Ordering::Release);
    }

    /// Copies of all pieces that changed; what changes from now on is for the next freeze.
    pub(crate) fn freeze(&self) -> Vec<L1Copy> {
        let pieces = std::mem::take(&mut *lock(&self.dirty));
        pieces.into_iter().map(|piece| self.copy(piece)).collect()
    }

    fn copy(&self, piece: u64) -> L1Copy {
        let first = piece * self.piece_bytes / TABLE_ENTRY_BYTES;
        let mut bytes = BytesMut::with_capacity(self.piece_bytes as usize);
        for index in first..first + self.piece_bytes / TABLE_ENTRY_BYTES {
            bytes.extend_from_slice(&self.get(L1Index(index as u32)).0.to_be_bytes());
        }
        L1Copy { piece, at: self.table().at.0 + piece * self.piece_bytes, bytes: bytes.freeze() }
    }

    /// The round of these copies is over. Where it failed, they count as changed again.
    pub(crate) fn written(&self, copies: Vec<L1Copy>, ok: bool) {
        if !ok {
            lock(&self.dirty).extend(copies.iter().map(|copy| copy.piece));
        }
    }

    /// The table lies elsewhere now, and is longer. Between two rounds only.
    pub(crate) fn moved(&self, table: TableRef) {
        debug_assert!(table.count >= self.table().count);
        self.at.store(table.at.0, Ordering::Release);
        self.count.store(table.count, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_holds_its_sector_and_a_failed_one_comes_again() {
        let table = TableRef { at: HostOffset(0x10000), count: 200 };
        let mut bytes = vec![0; 1600];
        bytes[519] = 5;
        let l1 = L1::new(table, &bytes, 1);
        l1.set(L1Index(64), L1Entry(9));
        let copies = l1.freeze();
        assert_eq!((copies.len(), copies[0].at), (1, 0x10200));
        assert_eq!((copies[0].bytes[7], copies[0].bytes[15]), (9, 0));
        assert!(l1.freeze().is_empty());
        l1.written(copies, false);
        l1.moved(TableRef { at: HostOffset(0x50000), count: 9000 });
        l1.set(L1Index(8999), L1Entry(1));
        let places: Vec<u64> = l1.freeze().iter().map(|copy| copy.at).collect();
        assert_eq!(places, [0x50200, 0x50000 + 8999 * 8 / 512 * 512]);
        assert_eq!(l1.get(L1Index(u32::MAX)), L1Entry(0));
    }
}
