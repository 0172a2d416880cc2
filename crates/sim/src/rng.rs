//! Small seeded random numbers: the same seed gives the same run on every machine and in every version.

/// A generator of random numbers (SplitMix64). Not for secrets.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator that `seed` stands for.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// A generator of its own for a part of the run, so that what one part draws does not shift the others.
    pub fn fork(&mut self) -> Rng {
        Rng(self.next_u64())
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number below `end`; 0 where `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(end)) >> 64) as u64
    }

    /// A number of `[start, end)`.
    ///
    /// # Panics
    /// If the range is empty.
    pub fn range(&mut self, start: u64, end: u64) -> u64 {
        assert!(start < end, "nothing to choose from");
        start + self.below(end - start)
    }

    /// An index into something of `len` elements.
    pub fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// True in `of` cases of 1000.
    pub fn per_mille(&mut self, of: u64) -> bool {
        self.below(1000) < of
    }

    /// Random bytes.
    pub fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            chunk.copy_from_slice(&self.next_u64().to_le_bytes()[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_numbers() {
        let (mut one, mut two) = (Rng::new(7), Rng::new(7));
        let drawn: Vec<u64> = (0..100).map(|_| one.next_u64()).collect();
        assert!(drawn.iter().all(|value| *value == two.next_u64()));
        assert_ne!(drawn[0], Rng::new(8).next_u64());
    }

    #[test]
    fn every_value_of_a_range_is_drawn_and_no_other() {
        let mut rng = Rng::new(1);
        let mut seen = [0; 10];
        (0..1000).for_each(|_| seen[rng.range(0, 10) as usize] += 1);
        assert!(seen.iter().all(|count| *count > 50), "{seen:?}");
    }
}
