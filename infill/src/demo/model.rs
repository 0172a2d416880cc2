//! What the demonstration's disk may hold: every sector is told by its place and version, so that a lost, torn or foreign
//! one is seen as what it is.

use std::collections::HashMap;

/// What is read and written at once.
pub const BLOCK_BYTES: usize = 4096;
/// What is written whole or not at all.
pub const SECTOR_BYTES: usize = 512;
/// Sectors of a block.
pub const SECTORS: usize = BLOCK_BYTES / SECTOR_BYTES;
/// The base's data lies in groups of this size…
const GROUP_BYTES: u64 = 1 << 20;
/// …three of eight; the others are holes.
const GROUPS_OF_DATA: u64 = 3;
const GROUPS: u64 = 8;

/// Bytes of data in a base of `disk` bytes (a multiple of eight groups).
pub fn base_data_bytes(disk: u64) -> u64 {
    disk / GROUPS * GROUPS_OF_DATA
}

/// Whether the base holds data there.
pub fn base_has_data(block: u64) -> bool {
    block * BLOCK_BYTES as u64 / GROUP_BYTES % GROUPS < GROUPS_OF_DATA
}

/// A well-mixed number of its input.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The content of a sector in its `version`; version 0 is the base's.
fn fill_sector(out: &mut [u8], block: u64, sector: usize, version: u32) {
    if version == 0 && !base_has_data(block) {
        out.fill(0);
        return;
    }
    let place = mix(block * SECTORS as u64 + sector as u64 + 1);
    for (index, word) in out.chunks_exact_mut(8).enumerate() {
        let value = if index == 0 {
            // Readable back: which version it is.
            place ^ u64::from(version)
        } else {
            mix(place.wrapping_add(u64::from(version) << 32).wrapping_add(index as u64))
        };
        word.copy_from_slice(&value.to_be_bytes());
    }
}

/// A block whose sectors have these versions.
pub fn block_bytes(block: u64, versions: &[u32; SECTORS]) -> Vec<u8> {
    let mut out = vec![0; BLOCK_BYTES];
    for (sector, (bytes, version)) in out.chunks_exact_mut(SECTOR_BYTES).zip(versions).enumerate() {
        fill_sector(bytes, block, sector, *version);
    }
    out
}

/// The version of a sector; `None`: it holds what nobody has written there.
fn version_of(bytes: &[u8], block: u64, sector: usize) -> Option<u32> {
    let mut expected = [0; SECTOR_BYTES];
    let place = mix(block * SECTORS as u64 + sector as u64 + 1);
    let first = bytes.first_chunk::<8>().map(|word| u64::from_be_bytes(*word))?;
    let candidates = [u32::try_from(first ^ place).ok(), Some(0)];
    candidates.into_iter().flatten().find(|version| {
        fill_sector(&mut expected, block, sector, *version);
        bytes == expected
    })
}

/// A block that was written.
#[derive(Clone, Copy, Debug, Default)]
struct Written {
    /// What its sectors hold.
    now: [u32; SECTORS],
    /// The last version that was handed over.
    issued: u32,
    /// The last version that a FLUSH has covered.
    flushed: u32,
}

/// What one client has written, and what of it must be there.
#[derive(Debug, Default)]
pub struct Model {
    blocks: HashMap<u64, Written>,
    /// Acknowledged, and not flushed.
    unflushed: Vec<(u64, u32)>,
}

/// What a look after a crash has found.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verdict {
    /// Blocks that were looked at.
    pub blocks: u64,
    /// Sectors that hold less than what was flushed.
    pub lost: u64,
    /// Sectors with a value that nobody wrote there.
    pub third_values: u64,
    /// Blocks where a write that was never flushed survived.
    pub unflushed_kept: u64,
}

impl Verdict {
    /// Whether every sector holds what it may hold.
    pub fn is_good(&self) -> bool {
        self.lost + self.third_values == 0
    }
}

impl Model {
    /// The next content of a block; it counts as handed over from now on.
    pub fn next_write(&mut self, block: u64) -> (u32, Vec<u8>) {
        let written = self.blocks.entry(block).or_default();
        written.issued += 1;
        (written.issued, block_bytes(block, &[written.issued; SECTORS]))
    }

    /// The write of `version` was acknowledged.
    pub fn acknowledged(&mut self, block: u64, version: u32) {
        if let Some(written) = self.blocks.get_mut(&block) {
            written.now = [version; SECTORS];
        }
        self.unflushed.push((block, version));
    }

    /// What a FLUSH that begins now will cover.
    pub fn flush_begins(&mut self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.unflushed)
    }

    /// That FLUSH was acknowledged.
    pub fn flush_ended(&mut self, covered: Vec<(u64, u32)>) {
        for (block, version) in covered {
            if let Some(written) = self.blocks.get_mut(&block) {
                written.flushed = written.flushed.max(version);
            }
        }
    }

    /// What a block must read as while nothing has crashed.
    pub fn expected(&self, block: u64) -> Vec<u8> {
        block_bytes(block, &self.blocks.get(&block).copied().unwrap_or_default().now)
    }

    /// Blocks that were written.
    pub fn written(&self) -> Vec<u64> {
        self.blocks.keys().copied().collect()
    }

    /// Judges what a block holds after a crash; from now on that is what it must hold.
    pub fn settle(&mut self, block: u64, bytes: &[u8], verdict: &mut Verdict) {
        let Some(written) = self.blocks.get_mut(&block) else { return };
        verdict.blocks += 1;
        let mut newest = 0;
        for (sector, bytes) in bytes.chunks_exact(SECTOR_BYTES).enumerate() {
            match version_of(bytes, block, sector) {
                Some(version) if version > written.issued => verdict.third_values += 1,
                Some(version) => {
                    verdict.lost += u64::from(version < written.flushed);
                    written.now[sector] = version;
                    newest = newest.max(version);
                }
                None => verdict.third_values += 1,
            }
        }
        verdict.unflushed_kept += u64::from(newest > written.flushed);
    }

    /// Forgets what was under way when the daemon died.
    pub fn crashed(&mut self) {
        self.unflushed.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_a_torn_and_a_foreign_sector_are_told_apart() {
        let mut model = Model::default();
        for _ in 0..2 {
            let (version, _) = model.next_write(7);
            model.acknowledged(7, version);
        }
        let covered = model.flush_begins();
        model.flush_ended(covered);
        model.next_write(7);
        let judge = |versions: [u32; SECTORS], spoil: bool| {
            let (mut verdict, mut bytes) = (Verdict::default(), block_bytes(7, &versions));
            if spoil {
                bytes[SECTOR_BYTES * 3 + 100] ^= 1;
            }
            let mut model = Model { blocks: model.blocks.clone(), unflushed: Vec::new() };
            model.settle(7, &bytes, &mut verdict);
            verdict
        };
        let torn = judge([2, 3, 2, 3, 3, 2, 2, 2], false);
        assert!(torn.is_good() && torn.unflushed_kept == 1);
        assert_eq!(judge([2, 2, 2, 1, 2, 2, 2, 2], false).lost, 1);
        assert_eq!(judge([2; SECTORS], true).third_values, 1);
        assert_eq!(judge([4; SECTORS], false).third_values, SECTORS as u64);
    }

    #[test]
    fn what_was_acknowledged_after_a_flush_began_is_not_covered_by_it() {
        let mut model = Model::default();
        let (first, _) = model.next_write(0);
        model.acknowledged(0, first);
        let covered = model.flush_begins();
        let (second, _) = model.next_write(0);
        model.acknowledged(0, second);
        model.flush_ended(covered);
        let mut verdict = Verdict::default();
        model.settle(0, &block_bytes(0, &[first; SECTORS]), &mut verdict);
        assert!(verdict.is_good());
    }
}
