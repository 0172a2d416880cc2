//! Bytes that say who wrote them and where: a wrong byte tells its story.
//!
//! A payload is made of big-endian words at multiples of 8 guest bytes: a tag byte, the number of the operation, the
//! number of the word on the disk. No metadata word of any format here begins with the tag, so that a sector on the
//! medium tells payload from metadata, and names the guest bytes that it belongs to.

use bytes::{Bytes, BytesMut};

use crate::model::SECTOR_BYTES;

/// First byte of every word of a payload.
pub const TAG: u8 = 0xd5;

/// Number of the operation in the words of a backing's content: the layer is added.
pub const BACKING_OP: u32 = 0xf0_0000;

const WORD_BYTES: u64 = 8;

fn word(op: u32, index: u64) -> [u8; 8] {
    let value = u64::from(TAG) << 56 | u64::from(op & 0xff_ffff) << 32 | (index & 0xffff_ffff);
    value.to_be_bytes()
}

/// `len` bytes that operation `op` writes at guest byte `at`.
pub fn payload(op: u32, at: u64, len: usize) -> Bytes {
    let mut out = BytesMut::with_capacity(len + 16);
    let first = at / WORD_BYTES;
    let skip = (at % WORD_BYTES) as usize;
    for index in first..(at + len as u64).div_ceil(WORD_BYTES) {
        out.extend_from_slice(&word(op, index));
    }
    out.freeze().slice(skip..skip + len)
}

/// Who wrote a word, and where on the disk it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// The operation.
    pub op: u32,
    /// The guest byte at which the word begins.
    pub at: u64,
}

fn told(bytes: &[u8; 8]) -> Option<Told> {
    let value = u64::from_be_bytes(*bytes);
    let tagged = bytes[0] == TAG;
    tagged.then_some(Told { op: (value >> 32) as u32 & 0xff_ffff, at: (value & 0xffff_ffff) * WORD_BYTES })
}

/// The first word of payload in `sector` that is whole, and its place in it.
pub fn find(sector: &[u8]) -> Option<(usize, Told)> {
    let (words, _) = sector.as_chunks::<8>();
    words.iter().enumerate().find_map(|(nth, bytes)| Some((nth * 8, told(bytes)?)))
}

/// What a sector on a medium is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SectorKind {
    /// Zeroes, or a shred of payload in zeroes: either.
    Unclear,
    /// Guest bytes: the sector of the disk that they belong to (its first guest byte).
    Payload(u64),
    /// Something else.
    Metadata,
}

/// What the sector of a medium is.
pub fn sector_kind(sector: &[u8]) -> SectorKind {
    match find(sector) {
        Some((place, told)) => SectorKind::Payload(told.at.saturating_sub(place as u64)),
        None if infill_base::is_zero(sector) || sector.contains(&TAG) => SectorKind::Unclear,
        None => SectorKind::Metadata,
    }
}

/// What bytes that ought to be payload are, for a message.
pub fn describe(at: u64, bytes: &[u8]) -> String {
    if infill_base::is_zero(bytes) {
        return "zeroes".into();
    }
    let skip = (at.next_multiple_of(WORD_BYTES) - at) as usize;
    match bytes.get(skip..).and_then(find) {
        Some((_, told)) if told.op >= BACKING_OP => {
            format!("backing {} of byte {:#x}", told.op - BACKING_OP, told.at / SECTOR_BYTES * SECTOR_BYTES)
        }
        Some((_, told)) => {
            format!("operation {} at byte {:#x}", told.op, told.at / SECTOR_BYTES * SECTOR_BYTES)
        }
        None => format!("foreign bytes {:02x?}", &bytes[..bytes.len().min(16)]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_tells_its_place_wherever_it_begins() {
        let whole = payload(9, 0, 4096);
        for (at, len) in [(0_usize, 4096_usize), (3, 77), (511, 2), (513, 1024)] {
            assert_eq!(payload(9, at as u64, len), whole.slice(at..at + len));
        }
        assert_eq!(sector_kind(&whole[1024..1536]), SectorKind::Payload(1024));
        assert_eq!(sector_kind(&[0; 512]), SectorKind::Unclear);
        let mut entry = [0; 512];
        entry[..8].copy_from_slice(&(0x8000_0000_0001_0000_u64).to_be_bytes());
        assert_eq!(sector_kind(&entry), SectorKind::Metadata);
        assert_eq!(describe(515, &whole[515..600]), "operation 9 at byte 0x200");
    }
}
