//! Which blocks are at the target, and whether they are the truth.
//!
//! | | |
//! |---|---|
//! | absent | the truth is at the source |
//! | warm | copied while the source went on writing: may be stale, never read |
//! | clean | a copy of the frozen image |
//! | written | written or discarded by the guest since |
//!
//! In the image warm, clean and written are one: allocated. What makes warm blocks clean is that the final residual was
//! applied *and* the source's confirm is stable ([`Ownership`]); so [`BlockMap::rebuild`] makes the map again after a
//! restart, out of the image's allocated blocks and the record's state.
//!
//! What never happens: a warm block is read (I3); a fetch links over what came meanwhile (I5), or links at all when
//! blocks were demoted or the disk changed hands since it was begun; a clean or written block becomes absent (I6). One
//! byte a block.

use crate::fault::{Fault, Planted};
use crate::ids::Round;
use crate::set::BlockSet;
use crate::target::Ownership;

const ABSENT: u8 = 0;
const CLEAN: u8 = 1;
const WRITTEN: u8 = 2;
/// `WARM + r` for a block of round r; [`crate::ids::ROUNDS_MAX`] leaves room.
const WARM: u8 = 3;

/// Of what round a block is that was found in the image after a restart.
const ROUND_UNKNOWN: Round = Round(0);

/// A block at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Block {
    /// The truth is at the source.
    Absent,
    /// Copied in a round of warming; may be stale.
    Warm(Round),
    /// A copy of the frozen image.
    Clean,
    /// Written or discarded by the guest since the disk changed hands.
    Written,
}

/// The blocks of one disk at the target.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BlockMap {
    blocks: Vec<u8>,
    /// Raised before anything becomes absent or changes its meaning.
    generation: u64,
    owned: bool,
    planted: Planted,
}

/// A fetch that is under way: from before it asked the source until it links or is given up.
#[derive(Debug)]
#[must_use = "a fetch links or is dropped"]
#[cfg_attr(feature = "planted-faults", derive(Clone, PartialEq, Eq, Hash))]
pub struct Fetch {
    block: u64,
    generation: u64,
}

/// What became of a fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linked {
    /// Its data is the block's.
    Yes,
    /// Something came first, or its data may be stale: it is thrown away.
    Lost,
}

/// Where a guest's read is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadFrom {
    /// Here.
    Local,
    /// At the source: its frozen image, or before the disk changed hands the live one.
    Source,
}

/// What is asked does not fit who owns the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrongOwner;

impl BlockMap {
    /// Of a new overlay.
    pub fn absent(blocks: u64) -> BlockMap {
        let blocks = vec![ABSENT; blocks as usize];
        BlockMap { blocks, generation: 0, owned: false, planted: Planted::default() }
    }

    /// Of an overlay that is opened again: these blocks are allocated in it.
    pub fn rebuild(allocated: &BlockSet, owned: Option<&Ownership>) -> BlockMap {
        let mut map = BlockMap::absent(allocated.blocks());
        map.owned = owned.is_some();
        let found = if map.owned { CLEAN } else { WARM + ROUND_UNKNOWN.0 };
        allocated.iter().for_each(|block| map.blocks[block as usize] = found);
        map
    }

    /// Makes a mistake.
    #[cfg(feature = "planted-faults")]
    pub fn plant(&mut self, fault: Option<Fault>) {
        self.planted = Planted::new(fault);
    }

    /// How many blocks the disk has.
    pub fn len(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Whether the disk has no blocks.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// What a block is; one behind the end is absent.
    pub fn get(&self, block: u64) -> Block {
        match self.blocks.get(block as usize) {
            None | Some(&ABSENT) => Block::Absent,
            Some(&CLEAN) => Block::Clean,
            Some(&WRITTEN) => Block::Written,
            Some(warm) => Block::Warm(Round(warm - WARM)),
        }
    }

    /// Whether the disk is the target's.
    pub fn is_owned(&self) -> bool {
        self.owned
    }

    /// Where a read of it is answered.
    pub fn read(&self, block: u64) -> ReadFrom {
        match self.get(block) {
            Block::Clean | Block::Written if self.owned => ReadFrom::Local,
            _ => ReadFrom::Source,
        }
    }

    /// Begins to fetch a block; none that is there is fetched.
    pub fn fetch(&self, block: u64) -> Option<Fetch> {
        let absent = self.blocks.get(block as usize) == Some(&ABSENT);
        absent.then_some(Fetch { block, generation: self.generation })
    }

    /// The block that a fetch is for.
    pub fn fetched(&self, fetch: &Fetch) -> u64 {
        fetch.block
    }

    /// The data of a fetch is here, and this is the instant in which it would become the block's. `round`: of the
    /// warming that it belongs to; it has no meaning once the disk is owned.
    pub fn link(&mut self, fetch: Fetch, round: Round) -> Linked {
        let value = if self.owned { CLEAN } else { WARM + round.0.min(crate::ids::ROUNDS_MAX) };
        let any_generation = self.planted.is(Fault::LinksAfterDemotion);
        match self.blocks.get_mut(fetch.block as usize) {
            Some(block) if *block == ABSENT && (fetch.generation == self.generation || any_generation) => {
                *block = value;
                Linked::Yes
            }
            _ => Linked::Lost,
        }
    }

    /// The guest has written or discarded the whole block.
    pub fn write(&mut self, block: u64) -> Result<(), WrongOwner> {
        if !self.owned {
            return Err(WrongOwner);
        }
        if let Some(block) = self.blocks.get_mut(block as usize) {
            *block = WRITTEN;
        }
        Ok(())
    }

    /// Makes warm blocks absent. What was fetched before does not link afterwards.
    pub fn demote(&mut self, set: &BlockSet) -> Result<(), WrongOwner> {
        self.make_absent(|block| set.contains(block))
    }

    /// Makes every warm block absent.
    pub fn demote_all(&mut self) -> Result<(), WrongOwner> {
        self.make_absent(|_| true)
    }

    fn make_absent(&mut self, which: impl Fn(u64) -> bool) -> Result<(), WrongOwner> {
        if self.owned {
            return Err(WrongOwner);
        }
        self.generation += 1;
        for (index, block) in self.blocks.iter_mut().enumerate() {
            if which(index as u64) {
                *block = ABSENT;
            }
        }
        Ok(())
    }

    /// The disk is the target's: what is warm is clean, for the final residual was applied.
    pub fn own(&mut self, _: &Ownership) {
        if self.owned {
            return;
        }
        self.generation += 1;
        self.owned = true;
        self.blocks.iter_mut().filter(|block| **block >= WARM).for_each(|block| *block = CLEAN);
    }

    /// How many blocks only the source has.
    pub fn absent_blocks(&self) -> u64 {
        self.blocks.iter().filter(|block| **block == ABSENT).count() as u64
    }
}

/// Nothing is absent, in memory. Made before the sync that makes it so on the disk: a sync that began earlier covers
/// less.
#[derive(Debug)]
#[must_use = "it counts once it is synced"]
pub struct Filling(());

/// Nothing is absent, and that is stable.
#[derive(Debug)]
pub struct Filled(());

impl Filling {
    /// If no disk of the migration has an absent block. Ranges that are zero by the source's word count as present:
    /// whoever keeps them marks them so in the maps.
    pub fn of<'a>(maps: impl IntoIterator<Item = &'a BlockMap>) -> Option<Filling> {
        maps.into_iter().all(|map| map.owned && map.absent_blocks() == 0).then_some(Filling(()))
    }

    /// What came of syncing the data and the maps of all of them, begun after this was made.
    pub fn settled(self, outcome: infill_base::IoResult<()>) -> Option<Filled> {
        outcome.ok().map(|()| Filled(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::Ownership;

    fn set(blocks: u64, of: &[u64]) -> BlockSet {
        let mut set = BlockSet::empty(blocks);
        of.iter().for_each(|block| set.insert(*block));
        set
    }

    #[test]
    fn a_fetch_that_was_begun_before_a_demotion_does_not_link() {
        let mut map = BlockMap::absent(2);
        let (early, other) = (map.fetch(0).unwrap(), map.fetch(1).unwrap());
        assert_eq!(map.link(other, Round(1)), Linked::Yes);
        map.demote(&set(2, &[0, 1])).unwrap();
        assert_eq!(map.link(early, Round(1)), Linked::Lost);
        assert_eq!((map.get(0), map.get(1)), (Block::Absent, Block::Absent));
    }

    #[test]
    fn warm_blocks_are_not_read_before_the_disk_changed_hands_nor_written() {
        let mut map = BlockMap::absent(2);
        let fetch = map.fetch(0).unwrap();
        assert_eq!(map.link(fetch, Round(7)), Linked::Yes);
        assert_eq!((map.get(0), map.read(0)), (Block::Warm(Round(7)), ReadFrom::Source));
        assert_eq!(map.write(0), Err(WrongOwner));
        map.own(&Ownership::for_tests());
        assert_eq!((map.get(0), map.read(0), map.read(1)), (Block::Clean, ReadFrom::Local, ReadFrom::Source));
    }

    #[test]
    fn fill_never_overwrites_and_what_is_present_stays() {
        let mut map = BlockMap::rebuild(&set(3, &[1]), Some(&Ownership::for_tests()));
        let (fetch, late) = (map.fetch(0).unwrap(), map.fetch(0).unwrap());
        map.write(0).unwrap();
        assert_eq!(map.link(fetch, Round(1)), Linked::Lost);
        assert_eq!(map.link(late, Round(1)), Linked::Lost);
        assert_eq!(map.demote_all(), Err(WrongOwner));
        assert_eq!((map.get(0), map.get(1), map.absent_blocks()), (Block::Written, Block::Clean, 1));
        assert!(Filling::of([&map]).is_none());
        map.write(2).unwrap();
        assert!(Filling::of([&map]).unwrap().settled(Ok(())).is_some());
    }

    #[test]
    fn a_fetch_of_warming_does_not_link_into_the_frozen_image() {
        let mut map = BlockMap::absent(1);
        let fetch = map.fetch(0).unwrap();
        map.own(&Ownership::for_tests());
        assert_eq!(map.link(fetch, Round(1)), Linked::Lost);
    }
}
