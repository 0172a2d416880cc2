//! The bytes of a simulated medium: cheap to copy, and with a hash that tells states apart.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use rustc_hash::FxHasher;

/// Bytes that a medium writes whole or not at all.
pub const SECTOR_BYTES: u64 = 512;

/// Bytes that copies of a medium share.
const PAGE_BYTES: u64 = 4096;

type Page = [u8; PAGE_BYTES as usize];

/// The content of a medium. A copy shares every page that is not changed afterwards.
#[derive(Clone, Debug, Default)]
pub struct Media {
    pages: Vec<Option<Arc<Page>>>,
    len: u64,
    /// Exclusive or of the hashes of all sectors that are not zero.
    hash: u64,
}

impl Media {
    /// `len` zero bytes.
    pub fn new(len: u64) -> Media {
        Media { len, ..Media::default() }
    }

    /// The given bytes.
    pub fn from_bytes(bytes: &[u8]) -> Media {
        let mut media = Media::new(bytes.len() as u64);
        media.write(0, bytes);
        media
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Equal for equal content and length, and different for others (but for chance, one in 2^64).
    pub fn hash(&self) -> u64 {
        self.hash ^ self.len.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// Fills `out` from byte `at`; zeroes where nothing was written.
    pub fn read(&self, at: u64, out: &mut [u8]) {
        let mut done = 0;
        while done < out.len() {
            let from = at + done as u64;
            let inside = (from % PAGE_BYTES) as usize;
            let take = (PAGE_BYTES as usize - inside).min(out.len() - done);
            let part = &mut out[done..done + take];
            match self.pages.get((from / PAGE_BYTES) as usize) {
                Some(Some(page)) => part.copy_from_slice(&page[inside..inside + take]),
                _ => part.fill(0),
            }
            done += take;
        }
    }

    /// One sector, zeroes where nothing was written.
    pub fn sector(&self, index: u64) -> [u8; SECTOR_BYTES as usize] {
        let mut out = [0; SECTOR_BYTES as usize];
        self.read(index * SECTOR_BYTES, &mut out);
        out
    }

    /// Writes a whole sector. The length stays: see [`Media::grow`].
    pub fn write_sector(&mut self, index: u64, data: &[u8]) {
        let at = index * SECTOR_BYTES;
        let (page, inside) = ((at / PAGE_BYTES) as usize, (at % PAGE_BYTES) as usize);
        let old = self.sector(index);
        if old == *data {
            return;
        }
        self.hash ^= sector_hash(index, &old) ^ sector_hash(index, data);
        if self.pages.len() <= page {
            self.pages.resize(page + 1, None);
        }
        let page = self.pages[page].get_or_insert_with(|| Arc::new([0; PAGE_BYTES as usize]));
        Arc::make_mut(page)[inside..inside + SECTOR_BYTES as usize].copy_from_slice(data);
    }

    /// Makes it at least `len` bytes long.
    pub fn grow(&mut self, len: u64) {
        self.len = self.len.max(len);
    }

    /// Writes bytes anywhere, and grows to hold them.
    pub fn write(&mut self, at: u64, data: &[u8]) {
        let (mut done, end) = (0, at + data.len() as u64);
        while done < data.len() {
            let from = at + done as u64;
            let inside = (from % SECTOR_BYTES) as usize;
            let take = (SECTOR_BYTES as usize - inside).min(data.len() - done);
            let mut sector = self.sector(from / SECTOR_BYTES);
            sector[inside..inside + take].copy_from_slice(&data[done..done + take]);
            self.write_sector(from / SECTOR_BYTES, &sector);
            done += take;
        }
        self.grow(end);
    }

    /// Makes it shorter or longer; what is new reads as zeroes.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            let whole = len.next_multiple_of(SECTOR_BYTES);
            if whole > len {
                let keep = (len % SECTOR_BYTES) as usize;
                let mut sector = self.sector(len / SECTOR_BYTES);
                sector[keep..].fill(0);
                self.write_sector(len / SECTOR_BYTES, &sector);
            }
            let last = (self.pages.len() as u64 * PAGE_BYTES).min(self.len.next_multiple_of(SECTOR_BYTES));
            for index in whole / SECTOR_BYTES..last / SECTOR_BYTES {
                self.write_sector(index, &[0; SECTOR_BYTES as usize]);
            }
            self.pages.truncate(len.div_ceil(PAGE_BYTES) as usize);
        }
        self.len = len;
    }

    /// Whether the range was never written, or with zeroes only.
    pub fn is_zero(&self, at: u64, len: u64) -> bool {
        let mut next = at;
        while next < at + len {
            let end = ((next / PAGE_BYTES + 1) * PAGE_BYTES).min(at + len);
            if let Some(Some(page)) = self.pages.get((next / PAGE_BYTES) as usize) {
                let inside = (next % PAGE_BYTES) as usize;
                if !infill_base::is_zero(&page[inside..inside + (end - next) as usize]) {
                    return false;
                }
            }
            next = end;
        }
        true
    }

    /// All bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![0; self.len as usize];
        self.read(0, &mut out);
        out
    }
}

/// 0 for a sector of zeroes, so that what was never written counts for nothing.
fn sector_hash(index: u64, data: &[u8]) -> u64 {
    if infill_base::is_zero(data) {
        return 0;
    }
    let mut hasher = FxHasher::default();
    index.hash(&mut hasher);
    data.hash(&mut hasher);
    // FxHash alone is weak in its low bits; the exclusive or of many needs them all.
    let mut bits = hasher.finish();
    bits = (bits ^ (bits >> 32)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits ^ (bits >> 29)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_and_the_hash_depends_on_content_alone() {
        let mut one = Media::new(10_000);
        one.write(300, &[1; 5000]);
        one.write(300, &[2; 5000]);
        let mut two = Media::from_bytes(&one.to_bytes());
        assert_eq!(one.hash(), two.hash());
        two.write(9999, &[1]);
        assert_ne!(one.hash(), two.hash());
        two.write(9999, &[0]);
        assert_eq!(one.hash(), two.hash());
        two.set_len(9_999);
        assert_ne!(one.hash(), two.hash());
    }

    #[test]
    fn what_was_cut_off_reads_as_zeroes_when_it_grows_again() {
        let mut media = Media::from_bytes(&[7; 9000]);
        media.set_len(1000);
        media.set_len(9000);
        let mut expected = vec![0; 9000];
        expected[..1000].fill(7);
        assert_eq!(media.to_bytes(), expected);
        assert_eq!(media.hash(), Media::from_bytes(&expected).hash());
        assert!(media.is_zero(1000, 8000) && !media.is_zero(999, 2));
    }

    #[test]
    fn a_copy_does_not_see_later_writes() {
        let mut media = Media::from_bytes(&[7; 9000]);
        let copy = media.clone();
        media.write(0, &[8; 9000]);
        assert_eq!(copy.to_bytes(), vec![7; 9000]);
    }
}
