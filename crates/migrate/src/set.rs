//! A set of blocks of one disk: what a dirty bitmap holds, a message carries and a demotion takes. One bit a block.

use std::fmt;
use std::ops::Range;

/// Blocks of one disk.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockSet {
    blocks: u64,
    /// Bits above `blocks` are zero, so that equal sets are equal values.
    words: Vec<u64>,
}

impl BlockSet {
    /// None of `blocks` blocks.
    pub fn empty(blocks: u64) -> BlockSet {
        BlockSet { blocks, words: vec![0; blocks.div_ceil(64) as usize] }
    }

    /// Of how many blocks it is a set.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Puts one in; one that the disk does not have is left out.
    pub fn insert(&mut self, block: u64) {
        if block < self.blocks {
            self.words[(block / 64) as usize] |= 1 << (block % 64);
        }
    }

    /// Puts those of a range in that the disk has.
    pub fn insert_range(&mut self, range: Range<u64>) {
        let (mut at, end) = (range.start, range.end.min(self.blocks));
        while at < end {
            let stop = ((at / 64 + 1) * 64).min(end);
            let ones = u64::MAX >> (64 - (stop - at));
            self.words[(at / 64) as usize] |= ones << (at % 64);
            at = stop;
        }
    }

    /// Whether it is in.
    pub fn contains(&self, block: u64) -> bool {
        block < self.blocks && self.words[(block / 64) as usize] & (1 << (block % 64)) != 0
    }

    /// How many are in.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether none is in.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Puts all of another set of the same disk in.
    pub fn union(&mut self, other: &BlockSet) {
        debug_assert_eq!(self.blocks, other.blocks, "sets of one disk");
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word |= other;
        }
    }

    /// The runs of those that are in, ascending and apart.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = self.find(next, true)?;
            let end = self.find(start, false).unwrap_or(self.blocks);
            next = end;
            Some(start..end)
        })
    }

    /// The first block from `from` on that is in (or is not).
    fn find(&self, from: u64, is_in: bool) -> Option<u64> {
        let mut at = from;
        while at < self.blocks {
            let word = self.words[(at / 64) as usize];
            let word = if is_in { word } else { !word } >> (at % 64);
            if word != 0 {
                let found = at + u64::from(word.trailing_zeros());
                return (found < self.blocks).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// Those that are in, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().enumerate().flat_map(|(index, word)| {
            let first = index as u64 * 64;
            (0..64).filter(move |bit| word & (1 << bit) != 0).map(move |bit| first + bit)
        })
    }
}

impl fmt::Debug for BlockSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_the_disk_does_not_have_are_never_in() {
        let mut set = BlockSet::empty(65);
        set.insert_range(63..1000);
        set.insert(65);
        set.insert(u64::MAX);
        assert_eq!(set.iter().collect::<Vec<_>>(), [63, 64]);
        assert_eq!((set.count(), set.contains(65), set.contains(64)), (2, false, true));
        let mut other = BlockSet::empty(65);
        other.insert(0);
        other.union(&set);
        assert_eq!(other.iter().collect::<Vec<_>>(), [0, 63, 64]);
        assert!(!other.is_empty() && BlockSet::empty(0).is_empty());
    }

    #[test]
    fn runs_are_what_was_put_in() {
        let cases: [&[(u64, u64)]; 5] =
            [&[], &[(0, 1)], &[(0, 200)], &[(3, 64), (65, 130), (199, 200)], &[(63, 65), (127, 128)]];
        for ranges in cases {
            let (mut set, mut one_by_one) = (BlockSet::empty(200), BlockSet::empty(200));
            for (start, end) in ranges {
                set.insert_range(*start..*end);
                (*start..*end).for_each(|block| one_by_one.insert(block));
            }
            assert_eq!(set, one_by_one);
            assert_eq!(set.runs().map(|run| (run.start, run.end)).collect::<Vec<_>>(), ranges);
        }
    }
}
