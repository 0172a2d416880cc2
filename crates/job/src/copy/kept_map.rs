//! What a copy has left to do, in memory that outlives the process: so the next process goes on where this one was.
//!
//! One bit for each block of [`KeptMap::granularity`] bytes, and how far the disk was looked through. What a bit says is its
//! owner's: of a mirror or a commit *the target may lack this* (set before a guest's write may land, cleared when the target
//! has the block), of a backup *the block is still as it was on the source alone* (cleared when the target has it, and before
//! a guest's write may land).
//!
//! # What never happens
//! * A bit is believed that is of another job, start of the machine, disk, version or run of the job: the header says whose
//!   it is, under a check, and each word of bits has a check of its own, so that it changes as a whole or not at all.
//! * A map that was not brought up to date is found: it is *live* only between [`KeptMap::go_live`] and [`KeptMap::void`].
//! * One that was void goes live again: what it missed stays missed.
//! * A change waits for I/O: it is one atomic operation on a word of memory.
//!
//! Costs: two bits of memory a block, at most [`MAP_BYTES_MAX`]: on larger disks the blocks are larger. The layout stands in
//! `docs/formats/kept-map.md`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use infill_base::{ErrorKind, IoError, IoResult, align_down};
use infill_node::{DirtyMap, KeptBits};
use infill_storage::journal::{BootId, JournalMemory};

use super::BLOCK_BYTES;

/// The most memory that one map takes, in bytes.
pub const MAP_BYTES_MAX: usize = 32 << 20;

const WORD_BYTES: usize = size_of::<u64>();

const MAGIC: u64 = u64::from_be_bytes(*b"INFILLCM");
const VERSION: u64 = 1;
// The header's words.
const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 1;
/// Covers the words before it but the first: version, boot, generation, length, granularity, identity.
const AT_CHECK: usize = 8;
/// How far the disk was looked through, in blocks. Checked as words of bits are.
const AT_WALKED: usize = 9;
/// Bytes that were copied so far, to be shown.
const AT_COPIED: usize = 10;
/// When the process was known to live, in seconds since 1970. Checked as words of bits are.
const AT_ALIVE: usize = 11;
/// Bytes of the pieces in which a copy of the past takes bits out. Checked as words of bits are.
const AT_PIECE: usize = 12;
const HEADER_WORDS: usize = 512;

/// Bits in a word; its other half is their check.
const WORD_BITS: u64 = 32;
const BITS_MASK: u64 = (1 << WORD_BITS) - 1;

/// Whose map it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapOwner {
    /// Names one run of a job, which its record names too.
    pub generation: u64,
    /// This start of the machine.
    pub boot: BootId,
    /// Names job, source and target.
    pub identity: String,
    /// Size of the disk, in bytes.
    pub len: u64,
    /// Bytes that one bit stands for, a power of two: [`KeptMap::granularity_for`] that size, or another one.
    pub granularity: u64,
}

impl MapOwner {
    /// Memory for its map, in bytes.
    pub fn bytes(&self) -> usize {
        (HEADER_WORDS + words_for(self.len, self.granularity) as usize) * WORD_BYTES
    }
}

/// A map in its memory.
pub struct KeptMap {
    memory: Arc<dyn JournalMemory>,
    owner: MapOwner,
    seed: u64,
    /// Found, and not begun.
    found: bool,
    /// Was made void, for good.
    was_voided: AtomicBool,
    /// What lies beside it and goes with it.
    beside: Vec<Arc<dyn JournalMemory>>,
}

impl std::fmt::Debug for KeptMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeptMap({}, {} bytes a block)", self.memory.name(), self.owner.granularity)
    }
}

pub(super) fn mix(seed: u64, word: u64) -> u64 {
    let mixed = (seed ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ mixed >> 32
}

fn words_for(len: u64, granularity: u64) -> u64 {
    len.div_ceil(granularity).div_ceil(WORD_BITS)
}

impl KeptMap {
    /// Bytes that one bit stands for, of a disk of `len` bytes.
    pub fn granularity_for(len: u64) -> u64 {
        KeptMap::granularity_from(len, BLOCK_BYTES)
    }

    /// The same where smaller blocks than [`BLOCK_BYTES`] are of use: `least`, a power of two, or more on large disks.
    pub fn granularity_from(len: u64, least: u64) -> u64 {
        let most = (MAP_BYTES_MAX / WORD_BYTES - HEADER_WORDS) as u64;
        let mut granularity = least;
        while words_for(len, granularity) > most {
            granularity *= 2;
        }
        granularity
    }

    fn of(memory: Arc<dyn JournalMemory>, owner: MapOwner, found: bool) -> KeptMap {
        let was_voided = AtomicBool::new(false);
        let mut map = KeptMap { memory, owner, seed: 0, found, was_voided, beside: Vec::new() };
        map.seed = map.header().into_iter().fold(MAGIC, mix);
        map
    }

    /// What stands in the header, from the version on.
    fn header(&self) -> [u64; AT_CHECK - AT_VERSION] {
        let MapOwner { generation, boot, identity, len, granularity } = &self.owner;
        let identity = identity.bytes().fold(0, |hash, byte| mix(hash, u64::from(byte)));
        [VERSION, (boot.0 >> 64) as u64, boot.0 as u64, *generation, *len, *granularity, identity]
    }

    /// Makes a map in `memory`, whatever is there, with no bit set, or `all`. Nobody finds it before it is live.
    ///
    /// Touches all of the memory: milliseconds for a large disk.
    pub fn begin(memory: Arc<dyn JournalMemory>, owner: MapOwner, all: bool) -> IoResult<KeptMap> {
        memory.reserve()?;
        let needed = owner.bytes();
        if size_of_val(memory.words()) < needed {
            let why = format!("{} bytes of memory, and a map needs {needed}", size_of_val(memory.words()));
            return Err(IoError::new(ErrorKind::NoSpace, why).in_node(memory.name()));
        }
        let map = KeptMap::of(memory, owner, false);
        let words = map.memory.words();
        words[AT_MAGIC].store(0, Ordering::Release);
        for (at, word) in (AT_VERSION..).zip(map.header().into_iter().chain([map.seed])) {
            words[at].store(word, Ordering::Relaxed);
        }
        words[AT_WALKED].store(map.checked(AT_WALKED, 0), Ordering::Relaxed);
        words[AT_COPIED].store(0, Ordering::Relaxed);
        words[AT_ALIVE].store(map.checked(AT_ALIVE, 0), Ordering::Relaxed);
        words[AT_PIECE].store(map.checked(AT_PIECE, 0), Ordering::Relaxed);
        let bits = if all { BITS_MASK } else { 0 };
        for (at, word) in words.iter().enumerate().take(needed / WORD_BYTES).skip(HEADER_WORDS) {
            word.store(map.checked(at, bits), Ordering::Relaxed);
        }
        Ok(map)
    }

    /// The map that is in `memory`; the error says why there is none for `owner`. Looks at all of the memory.
    pub fn find(memory: Arc<dyn JournalMemory>, owner: MapOwner) -> Result<KeptMap, String> {
        let map = KeptMap::of(memory, owner, true);
        let words = map.memory.words();
        let needed = map.owner.bytes() / WORD_BYTES;
        if words.len() < needed {
            return Err("there is no map of it, or a part of one".into());
        }
        if words[AT_MAGIC].load(Ordering::Acquire) != MAGIC {
            return Err("there is no map of it that is valid".into());
        }
        let header = map.header().into_iter().chain([map.seed]);
        if !(AT_VERSION..).zip(header).all(|(at, word)| words[at].load(Ordering::Acquire) == word) {
            return Err("the map that is there is of another job, run, disk or version".into());
        }
        let damaged = |at: &usize| map.bits_at(*at).is_none();
        if let Some(at) = [AT_WALKED, AT_ALIVE].into_iter().chain(HEADER_WORDS..needed).find(damaged) {
            return Err(format!("its map is damaged, in word {at}"));
        }
        Ok(map)
    }

    /// Whether it was left by a process before this one.
    pub fn is_found(&self) -> bool {
        self.found
    }

    /// Bytes that one bit stands for.
    pub fn granularity(&self) -> u64 {
        self.owner.granularity
    }

    /// Size of the disk, in bytes.
    pub fn disk_bytes(&self) -> u64 {
        self.owner.len
    }

    /// Memory that it takes, in bytes.
    pub fn bytes(&self) -> usize {
        self.owner.bytes()
    }

    /// Names the run of the job.
    pub fn generation(&self) -> u64 {
        self.owner.generation
    }

    /// It is up to date from now on, unless it was void before: the next process finds it.
    pub fn go_live(&self) {
        if self.was_voided.load(Ordering::SeqCst) {
            return;
        }
        self.memory.words()[AT_MAGIC].store(MAGIC, Ordering::SeqCst);
        if self.was_voided.load(Ordering::SeqCst) {
            self.void();
        }
    }

    /// It is not kept up to date any more: nobody finds it.
    pub fn void(&self) {
        self.was_voided.store(true, Ordering::SeqCst);
        self.memory.words()[AT_MAGIC].store(0, Ordering::SeqCst);
    }

    /// Whether the next process would find it.
    pub fn is_live(&self) -> bool {
        self.memory.words()[AT_MAGIC].load(Ordering::Acquire) == MAGIC
    }

    /// It is not wanted any more.
    pub fn remove(&self) {
        self.void();
        self.memory.remove();
        self.beside.iter().for_each(|memory| memory.remove());
    }

    /// What lies in `memory` goes with it.
    pub fn add_beside(&mut self, memory: Arc<dyn JournalMemory>) {
        self.beside.push(memory);
    }

    /// What its checks begin with: it is of this copy alone.
    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    fn checked(&self, at: usize, bits: u64) -> u64 {
        let check = mix(mix(self.seed, at as u64), bits);
        check & !BITS_MASK | bits
    }

    /// The bits of a word; `None` where it is damaged.
    fn bits_at(&self, at: usize) -> Option<u64> {
        let word = self.memory.words()[at].load(Ordering::Acquire);
        let bits = word & BITS_MASK;
        (word == self.checked(at, bits)).then_some(bits)
    }

    fn change(&self, at: usize, mask: u64, set: bool) {
        let word = &self.memory.words()[at];
        let mut now = word.load(Ordering::Acquire);
        loop {
            let bits = now & BITS_MASK;
            if now != self.checked(at, bits) {
                // Somebody else writes here: what it says is worth nothing.
                self.void();
                return;
            }
            let next = if set { bits | mask } else { bits & !mask };
            if next == bits {
                return;
            }
            let next = self.checked(at, next);
            match word.compare_exchange_weak(now, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                Err(other) => now = other,
            }
        }
    }

    fn change_range(&self, at: u64, len: u64, set: bool) {
        let end = at.saturating_add(len).min(self.owner.len);
        if at >= end {
            return;
        }
        let (mut bit, end) = (at / self.owner.granularity, end.div_ceil(self.owner.granularity));
        while bit < end {
            let first = bit % WORD_BITS;
            let count = (WORD_BITS - first).min(end - bit);
            self.change(HEADER_WORDS + (bit / WORD_BITS) as usize, ((1 << count) - 1) << first, set);
            bit += count;
        }
    }

    /// Sets the bit of every block that the range touches.
    pub fn mark(&self, at: u64, len: u64) {
        self.change_range(at, len, true);
    }

    /// Sets the bits of all that is marked in `map`.
    pub fn mark_all(&self, map: &DirtyMap) {
        let mut next = 0;
        while let Some(run) = map.next_dirty(next, u64::MAX) {
            self.mark(run.start, run.end - run.start);
            next = run.end;
        }
    }

    /// Clears the bit of every block that the range touches.
    pub fn clear(&self, at: u64, len: u64) {
        self.change_range(at, len, false);
    }

    /// Whether a block that the range touches is marked.
    pub fn has_marked(&self, at: u64, len: u64) -> bool {
        let end = at.saturating_add(len).min(self.owner.len);
        if at >= end {
            return false;
        }
        let mut blocks = at / self.owner.granularity..end.div_ceil(self.owner.granularity);
        blocks.any(|bit| {
            let bits = self.bits_at(HEADER_WORDS + (bit / WORD_BITS) as usize);
            bits.is_none_or(|bits| bits >> (bit % WORD_BITS) & 1 == 1)
        })
    }

    /// Marks in `map` what is marked here.
    pub fn copy_into(&self, map: &DirtyMap) {
        for nth in 0..words_for(self.owner.len, self.owner.granularity) {
            let mut left = self.bits_at(HEADER_WORDS + nth as usize).unwrap_or(BITS_MASK);
            while left != 0 {
                let first = u64::from(left.trailing_zeros());
                let count = u64::from((left >> first).trailing_ones());
                map.mark((nth * WORD_BITS + first) * self.owner.granularity, count * self.owner.granularity);
                left &= !(((1 << count) - 1) << first);
            }
        }
    }

    /// Marks in `map` the pieces of which all is marked here: bits of one are taken out when the target has all of it, and a death
    /// in the middle of that leaves some.
    pub fn copy_whole_into(&self, map: &DirtyMap) {
        let piece = map.granularity();
        if piece <= self.owner.granularity {
            return self.copy_into(map);
        }
        let marked = DirtyMap::new(self.owner.len, self.owner.granularity);
        self.copy_into(&marked);
        let mut next = 0;
        while let Some(run) = marked.next_dirty(next, u64::MAX) {
            let start = run.start.next_multiple_of(piece);
            let end = if run.end < self.owner.len { align_down(run.end, piece) } else { run.end };
            map.mark(start, end.saturating_sub(start));
            next = run.end;
        }
    }

    /// In pieces of how many bytes bits of a copy of the past are taken out.
    pub fn piece(&self) -> u64 {
        self.bits_at(AT_PIECE).unwrap_or(0).max(BLOCK_BYTES)
    }

    /// Notes what [`KeptMap::piece`] gives.
    pub fn set_piece(&self, bytes: u64) {
        let word = self.checked(AT_PIECE, bytes.min(BITS_MASK));
        self.memory.words()[AT_PIECE].store(word, Ordering::Release);
    }

    /// How far the disk was looked through, in bytes: what lies behind may be left to do, marked or not.
    pub fn walked(&self) -> u64 {
        let blocks = self.bits_at(AT_WALKED).unwrap_or(0);
        (blocks * self.owner.granularity).min(self.owner.len)
    }

    /// Notes how far the disk was looked through: what lies before is marked where it is left to do.
    pub fn set_walked(&self, bytes: u64) {
        let blocks = if bytes >= self.owner.len {
            bytes.div_ceil(self.owner.granularity)
        } else {
            bytes / self.owner.granularity
        };
        let word = self.checked(AT_WALKED, blocks & BITS_MASK);
        self.memory.words()[AT_WALKED].store(word, Ordering::Release);
    }

    /// When the last process that had it was known to live, in seconds since 1970.
    pub fn alive(&self) -> u64 {
        self.bits_at(AT_ALIVE).unwrap_or(0)
    }

    /// The process lives at that time.
    pub fn set_alive(&self, seconds: u64) {
        let word = self.checked(AT_ALIVE, seconds.min(BITS_MASK));
        self.memory.words()[AT_ALIVE].store(word, Ordering::Release);
    }

    /// Bytes that were copied so far, in all processes. Worth showing, no more.
    pub fn copied(&self) -> u64 {
        self.memory.words()[AT_COPIED].load(Ordering::Relaxed).min(self.owner.len.saturating_mul(1024))
    }

    /// Notes what [`KeptMap::copied`] shows.
    pub fn set_copied(&self, bytes: u64) {
        self.memory.words()[AT_COPIED].store(bytes, Ordering::Relaxed);
    }
}

/// Of a dirty bitmap, a bit says *the bitmap may have the block marked*.
impl KeptBits for KeptMap {
    fn granularity(&self) -> u64 {
        KeptMap::granularity(self)
    }

    fn mark(&self, at: u64, len: u64) {
        KeptMap::mark(self, at, len);
    }

    fn clear(&self, at: u64, len: u64) {
        KeptMap::clear(self, at, len);
    }

    fn void(&self) {
        KeptMap::void(self);
    }
}

#[cfg(test)]
mod tests;
