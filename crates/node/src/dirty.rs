//! Which blocks of a disk have changed: one bit a block, set from any thread.
//!
//! Memory grows with what is touched: bits lie in chunks that are made when a bit of theirs is first set. Setting takes no
//! lock. What never happens: a bit that is lost to a concurrent take (both are one atomic operation on its word).

use std::ops::Range;
use std::sync::OnceLock;

use infill_storage::sync::atomic::{AtomicU64, Ordering};
use infill_storage::sync::{RwLock, read, write};

use crate::Watcher;

/// Words of a chunk: 4 KiB, so 32,768 blocks.
const CHUNK_WORDS: usize = 512;
const CHUNK_BITS: u64 = CHUNK_WORDS as u64 * 64;

type Chunk = Box<[AtomicU64; CHUNK_WORDS]>;

/// The dirty blocks of a disk.
pub struct DirtyMap {
    granularity: u64,
    state: RwLock<State>,
    set: AtomicU64,
}

struct State {
    len: u64,
    chunks: Vec<OnceLock<Chunk>>,
}

impl std::fmt::Debug for DirtyMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DirtyMap({} bytes dirty, granularity {})", self.dirty_bytes(), self.granularity)
    }
}

fn chunks_for(len: u64, granularity: u64) -> usize {
    len.div_ceil(granularity).div_ceil(CHUNK_BITS) as usize
}

impl DirtyMap {
    /// Nothing dirty on a disk of `len` bytes; a bit stands for `granularity` bytes (a power of two).
    pub fn new(len: u64, granularity: u64) -> DirtyMap {
        assert!(granularity.is_power_of_two(), "a granularity is a power of two");
        let chunks = (0..chunks_for(len, granularity)).map(|_| OnceLock::new()).collect();
        DirtyMap { granularity, state: RwLock::new(State { len, chunks }), set: AtomicU64::new(0) }
    }

    /// Bytes that one bit stands for.
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// Size of the disk in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a disk is not a collection")]
    pub fn len(&self) -> u64 {
        read(&self.state).len
    }

    /// Bytes that are dirty: whole blocks, the last one too.
    pub fn dirty_bytes(&self) -> u64 {
        self.set.load(Ordering::Relaxed) * self.granularity
    }

    /// Bytes of memory that the bits take.
    pub fn memory_bytes(&self) -> u64 {
        let state = read(&self.state);
        let made = state.chunks.iter().filter(|chunk| chunk.get().is_some()).count();
        (made * CHUNK_WORDS * 8 + state.chunks.len() * size_of::<OnceLock<Chunk>>()) as u64
    }

    /// Marks every block that the range touches. What lies behind the end of the disk is ignored.
    pub fn mark(&self, at: u64, len: u64) {
        self.change(at, len, true);
    }

    /// Unmarks every block that the range touches, and gives the number of bytes that were dirty.
    pub fn clear(&self, at: u64, len: u64) -> u64 {
        self.change(at, len, false) * self.granularity
    }

    /// Sets or clears bits; how many have changed.
    fn change(&self, at: u64, len: u64, dirty: bool) -> u64 {
        let state = read(&self.state);
        let end = at.saturating_add(len).min(state.len);
        if at >= end {
            return 0;
        }
        let (mut bit, end) = (at / self.granularity, end.div_ceil(self.granularity));
        let mut changed = 0;
        while bit < end {
            let chunk = &state.chunks[(bit / CHUNK_BITS) as usize];
            let in_chunk = bit % CHUNK_BITS;
            let Some(chunk) = (if dirty { Some(chunk.get_or_init(new_chunk)) } else { chunk.get() }) else {
                bit += CHUNK_BITS - in_chunk;
                continue;
            };
            let (word, first) = ((in_chunk / 64) as usize, in_chunk % 64);
            let count = (64 - first).min(end - bit);
            let mask = if count == 64 { u64::MAX } else { ((1 << count) - 1) << first };
            let before = match dirty {
                true => mask & !chunk[word].fetch_or(mask, Ordering::AcqRel),
                false => mask & chunk[word].fetch_and(!mask, Ordering::AcqRel),
            };
            changed += u64::from(before.count_ones());
            bit += count;
        }
        if dirty {
            self.set.fetch_add(changed, Ordering::Relaxed);
        } else {
            self.set.fetch_sub(changed, Ordering::Relaxed);
        }
        changed
    }

    /// Whether the block of byte `at` is dirty.
    pub fn is_dirty(&self, at: u64) -> bool {
        self.next_dirty(at, 1).is_some_and(|run| run.contains(&at))
    }

    /// Whether no block that the range touches is dirty. Looks at these blocks alone.
    pub fn is_clean(&self, at: u64, len: u64) -> bool {
        let state = read(&self.state);
        let end = at.saturating_add(len).min(state.len);
        if at >= end {
            return true;
        }
        let (mut bit, end) = (at / self.granularity, end.div_ceil(self.granularity));
        while bit < end {
            let count = (64 - bit % 64).min(end - bit);
            match state.word(bit) {
                None => bit = (bit / CHUNK_BITS + 1) * CHUNK_BITS,
                Some(word) if word >> (bit % 64) & (u64::MAX >> (64 - count)) != 0 => return false,
                Some(_) => bit += count,
            }
        }
        true
    }

    /// The first dirty run that touches byte `from` or what follows, cut to `[from, ..)` rounded down to a block and to at most
    /// `max` bytes rounded up to one, and to the end of the disk.
    pub fn next_dirty(&self, from: u64, max: u64) -> Option<Range<u64>> {
        let state = read(&self.state);
        let bits = state.len.div_ceil(self.granularity);
        let limit = |first: u64| first.saturating_add(max.div_ceil(self.granularity).max(1)).min(bits);
        if from >= state.len {
            return None;
        }
        let mut bit = from / self.granularity;
        let start = loop {
            if bit >= bits {
                return None;
            }
            match state.word(bit) {
                None => bit = (bit / CHUNK_BITS + 1) * CHUNK_BITS,
                Some(word) => match word >> (bit % 64) {
                    0 => bit = (bit / 64 + 1) * 64,
                    rest => break bit + u64::from(rest.trailing_zeros()),
                },
            }
        };
        if start >= bits {
            return None;
        }
        let (mut end, most) = (start, limit(start));
        while end < most {
            let ones = match state.word(end) {
                None => 0,
                Some(word) => u64::from((word >> (end % 64)).trailing_ones()).min(64 - end % 64),
            };
            end += ones;
            if ones == 0 || !end.is_multiple_of(64) {
                break;
            }
        }
        let end = end.min(most);
        Some(start * self.granularity..(end * self.granularity).min(state.len))
    }

    /// Takes the next dirty run, as [`DirtyMap::next_dirty`] finds it: its bits are clear when it is returned, and a change that
    /// lands from now on sets them again.
    pub fn take_next(&self, from: u64, max: u64) -> Option<Range<u64>> {
        let run = self.next_dirty(from, max)?;
        self.clear(run.start, run.end - run.start);
        Some(run)
    }

    /// Marks everything that is dirty in `other`, which may have another granularity.
    pub fn merge(&self, other: &DirtyMap) {
        let mut next = 0;
        while let Some(run) = other.next_dirty(next, u64::MAX) {
            self.mark(run.start, run.end - run.start);
            next = run.end;
        }
    }

    /// A map of the same disk with the same blocks dirty, as of now.
    pub fn copied(&self) -> DirtyMap {
        let copy = DirtyMap::new(self.len(), self.granularity);
        copy.merge(self);
        copy
    }

    /// Makes every block clean that is not dirty in `other`, and dirty what is.
    pub fn become_like(&self, other: &DirtyMap) {
        self.clear(0, u64::MAX);
        self.merge(other);
    }

    /// How many bytes the bits take, eight in each, rounded up to whole words of eight bytes.
    pub fn bits_len(&self) -> u64 {
        self.len().div_ceil(self.granularity).div_ceil(64) * 8
    }

    /// Copies bits, the first one least significant, from byte `from` of them, a multiple of 8. Whether any is set. What
    /// lies behind the end is clear.
    pub fn bits(&self, from: u64, into: &mut [u8]) -> bool {
        let state = read(&self.state);
        let mut any = 0;
        for (at, bytes) in (from / 8..).zip(into.chunks_mut(8)) {
            let word = state.word(at.saturating_mul(64)).unwrap_or(0);
            bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
            any |= word;
        }
        any != 0
    }

    /// Marks what is set in `bits`, which stand as [`DirtyMap::bits`] gives them.
    pub fn mark_bits(&self, from: u64, bits: &[u8]) {
        for (at, byte) in (from..).zip(bits) {
            let mut left = *byte;
            while left != 0 {
                let first = left.trailing_zeros();
                let count = (left >> first).trailing_ones();
                let start = (at * 8 + u64::from(first)).saturating_mul(self.granularity);
                self.mark(start, u64::from(count) * self.granularity);
                left &= !((((1_u16 << count) - 1) << first) as u8);
            }
        }
    }

    /// The disk has another size now; what is new is clean.
    pub fn resize(&self, len: u64) {
        let old = read(&self.state).len;
        if len < old {
            // A block that the new end lies in stays as it is.
            let keep = len.next_multiple_of(self.granularity);
            self.change(keep, old.saturating_sub(keep), false);
        }
        let mut state = write(&self.state);
        state.len = len;
        let chunks = chunks_for(len, self.granularity);
        state.chunks.resize_with(chunks, OnceLock::new);
    }
}

impl State {
    /// The word that holds `bit`; `None` where nothing of its chunk was ever set.
    fn word(&self, bit: u64) -> Option<u64> {
        let chunk = self.chunks.get((bit / CHUNK_BITS) as usize)?.get()?;
        Some(chunk[(bit % CHUNK_BITS / 64) as usize].load(Ordering::Acquire))
    }
}

fn new_chunk() -> Chunk {
    let words: Box<[AtomicU64]> = (0..CHUNK_WORDS).map(|_| AtomicU64::new(0)).collect();
    match words.try_into() {
        Ok(chunk) => chunk,
        Err(_) => unreachable!("it has that many words"),
    }
}

impl Watcher for DirtyMap {
    fn landed(&self, at: u64, len: u64) {
        self.mark(at, len);
    }

    fn resized(&self, len: u64) {
        self.resize(len);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One step against the model.
    #[derive(Clone, Debug)]
    enum Step {
        Mark(u64, u64),
        Clear(u64, u64),
        Take(u64, u64),
        Resize(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let byte = 0..40u64 << 20;
        let size = prop_oneof![0..3000u64, 0..20u64 << 20];
        prop_oneof![
            4 => (byte.clone(), size.clone()).prop_map(|(at, len)| Step::Mark(at, len)),
            3 => (byte.clone(), size.clone()).prop_map(|(at, len)| Step::Clear(at, len)),
            3 => (byte.clone(), size).prop_map(|(at, max)| Step::Take(at, max)),
            1 => byte.prop_map(Step::Resize),
        ]
    }

    proptest! {
        #[test]
        fn it_is_a_set_of_blocks(steps in proptest::collection::vec(step(), 1..60)) {
            const BLOCK: u64 = 512;
            let mut len: u64 = 36 << 20;
            let map = DirtyMap::new(len, BLOCK);
            let mut model = vec![false; len.div_ceil(BLOCK) as usize];
            let touched = |at: u64, bytes: u64, len: u64| {
                let end = (at + bytes).min(len);
                if at >= end { 0..0 } else { (at / BLOCK) as usize..end.div_ceil(BLOCK) as usize }
            };
            for step in steps {
                match step {
                    Step::Mark(at, bytes) => {
                        map.mark(at, bytes);
                        model[touched(at, bytes, len)].fill(true);
                    }
                    Step::Clear(at, bytes) => {
                        map.clear(at, bytes);
                        model[touched(at, bytes, len)].fill(false);
                    }
                    Step::Take(from, max) => {
                        let first = (from / BLOCK) as usize;
                        let start = (first..model.len()).find(|block| model[*block]);
                        let run = map.take_next(from, max);
                        prop_assert_eq!(run.is_some(), start.is_some());
                        if let (Some(run), Some(start)) = (run, start) {
                            let most = (max.div_ceil(BLOCK).max(1) as usize).min(model.len() - start);
                            let blocks = model[start..start + most].iter().take_while(|dirty| **dirty).count();
                            prop_assert_eq!(run.start, start as u64 * BLOCK);
                            prop_assert_eq!(run.end, ((start + blocks) as u64 * BLOCK).min(len));
                            model[start..start + blocks].fill(false);
                        }
                    }
                    Step::Resize(new) => {
                        map.resize(new);
                        model.resize(new.div_ceil(BLOCK) as usize, false);
                        len = new;
                    }
                }
                let dirty = model.iter().filter(|dirty| **dirty).count() as u64;
                prop_assert_eq!(map.dirty_bytes(), dirty * BLOCK);
                let (at, bytes) = (len / 3, len / 7);
                prop_assert_eq!(map.is_clean(at, bytes), !model[touched(at, bytes, len)].contains(&true));
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_copied_out_as_bits_comes_back(
            len in 1..1_000_000u64, marks in proptest::collection::vec((0..1_000_000u64, 0..9000u64), 0..20)
        ) {
            let map = DirtyMap::new(len, 512);
            for (at, bytes) in marks {
                map.mark(at, bytes);
            }
            let mut bits = vec![0; map.bits_len() as usize];
            prop_assert_eq!(map.bits(0, &mut bits), map.dirty_bytes() > 0);
            let back = DirtyMap::new(len, 512);
            let half = bits.len() / 16 * 8;
            back.mark_bits(half as u64, &bits[half..]);
            back.mark_bits(0, &bits[..half]);
            let mut again = vec![0; bits.len()];
            back.bits(0, &mut again);
            prop_assert_eq!(&again, &bits);
            prop_assert_eq!(back.dirty_bytes(), map.dirty_bytes());
            let copy = map.copied();
            copy.bits(0, &mut again);
            prop_assert_eq!(again, bits);
        }
    }

    #[test]
    fn a_walk_ends_behind_a_last_block_that_is_not_whole() {
        let map = DirtyMap::new(1000, 512);
        map.mark(999, 1);
        assert_eq!(map.next_dirty(0, u64::MAX), Some(512..1000));
        assert_eq!(map.next_dirty(1000, u64::MAX), None);
        assert!(!map.is_dirty(0) && map.is_dirty(512));
        assert_eq!(map.copied().dirty_bytes(), 512);
    }

    #[test]
    fn memory_grows_with_what_is_touched() {
        let map = DirtyMap::new(1 << 40, 4096);
        let empty = map.memory_bytes();
        assert!(empty < 256 << 10, "{empty}");
        map.mark(1 << 39, 4096);
        assert_eq!(map.memory_bytes() - empty, 4096);
        assert_eq!(map.next_dirty(0, u64::MAX), Some(1 << 39..(1 << 39) + 4096));
    }
}
