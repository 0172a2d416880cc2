//! The part of the refcounts that is in memory: table, cached blocks, and the search for free clusters.
//!
//! Nothing here does I/O; all of it happens under one short lock. A search looks at whole words, and never twice at
//! what it found full.

use std::collections::BTreeSet;
use std::ops::Range;

use bytes::Bytes;
use infill_base::{ErrorKind, IoError, IoResult};
use rustc_hash::{FxHashMap, FxHashSet};

use super::{HostRun, RefcountCopy};
use crate::entry::{be64, refcount_get, refcount_set};
use crate::geometry::{Geometry, HostCluster, HostOffset, TABLE_ENTRY_BYTES};
use crate::header::Header;

/// Memory for cached refcount blocks, in bytes. Dirty blocks may exceed it until the next round.
pub(super) const CACHE_BYTES_MAX: usize = 4 << 20;
/// Blocks that are cached at least, however large they are.
const CACHE_BLOCKS_MIN: usize = 4;
/// Old blocks that are searched for free clusters before the image is made longer.
pub(super) const OLD_BLOCKS_PER_GROWTH: u32 = 4;

/// Clusters that hold metadata at places which the header names.
#[derive(Clone, Debug, Default)]
pub(super) struct Fixed(Vec<(Range<u64>, &'static str)>);

impl Fixed {
    pub(super) fn of(header: &Header) -> Fixed {
        let geometry = header.geometry();
        let place = |at: HostOffset, bytes: u64| {
            let first = at.0 >> geometry.cluster_bits();
            first..first.saturating_add(bytes.div_ceil(geometry.cluster_bytes()))
        };
        let (l1, table, snapshots) = (header.l1(), header.refcount_table(), header.snapshots());
        let table_bytes = u64::from(table.count) << geometry.cluster_bits();
        Fixed(vec![
            (0..1, "header"),
            (place(l1.at, u64::from(l1.count) * TABLE_ENTRY_BYTES), "L1 table"),
            (place(table.at, table_bytes), "refcount table"),
            // Its entries have 40 bytes at least; how many more, only reading tells.
            (place(snapshots.at, u64::from(snapshots.count) * 40), "snapshot table"),
        ])
    }

    fn at(&self, clusters: &Range<u64>) -> Option<&'static str> {
        let overlaps = |place: &Range<u64>| place.start < clusters.end && clusters.start < place.end;
        self.0.iter().find(|(place, _)| overlaps(place)).map(|(_, what)| *what)
    }
}

/// A set of sectors of one block.
#[derive(Debug)]
struct Sectors(Vec<u64>);

impl Sectors {
    fn none(count: usize) -> Sectors {
        Sectors(vec![0; count.div_ceil(64)])
    }

    fn insert(&mut self, sector: usize) {
        self.0[sector / 64] |= 1 << (sector % 64);
    }

    fn remove(&mut self, sector: usize) {
        self.0[sector / 64] &= !(1 << (sector % 64));
    }

    fn contains(&self, sector: usize) -> bool {
        self.0[sector / 64] >> (sector % 64) & 1 != 0
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }
}

/// A refcount block in memory.
#[derive(Debug)]
pub(super) struct Block {
    at: HostOffset,
    bytes: Vec<u8>,
    /// Changed since they were last copied.
    dirty: Sectors,
    /// Copied, and the round that writes the copies is not over.
    frozen: Sectors,
    /// No refcount before this one is 0.
    scan_from: u64,
    /// Whether the block's own space in the file was reserved.
    pub(super) reserved: bool,
    used: u64,
}

/// What is known of a block.
#[derive(Debug)]
pub(super) enum Slot {
    /// Somebody reads it.
    Loading,
    /// Here it is.
    Ready(Block),
}

/// Where a free run may be looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Search {
    /// What was given back, then the end of the image, then a few old blocks.
    Usual,
    /// All old blocks, from where the last search left off.
    Old,
}

/// Outcome of a search.
#[derive(Debug)]
pub(super) enum Pick {
    /// Counted as used now.
    Run(HostRun),
    /// This block has to be read first.
    Load(u64),
    /// Nothing is free here.
    Full,
}

/// Everything in memory.
#[derive(Debug)]
pub(super) struct Cache {
    geometry: Geometry,
    /// What is copied and written as one, in bytes.
    sector_bytes: usize,
    /// The refcount table as it is on the disk.
    pub(super) table: Option<Vec<u64>>,
    pub(super) table_loading: bool,
    /// Clusters of the blocks that the table names.
    places: FxHashSet<u64>,
    pub(super) fixed: Fixed,
    /// Clusters of the L2 tables that the active L1 table names, as far as somebody has told.
    pub(super) l2_tables: FxHashSet<u64>,
    blocks: FxHashMap<u64, Slot>,
    dirty: BTreeSet<u64>,
    /// Blocks in which something was given back.
    opened: BTreeSet<u64>,
    /// Blocks that were full when they left the cache.
    full: FxHashSet<u64>,
    /// Where the search at the end of the image goes on.
    next: u64,
    /// Where the search of old blocks goes on, and where it ends.
    old: Range<u64>,
    /// Every cluster that was handed out or written to lies below.
    high: u64,
    /// No block can be made at the end of the image: no space.
    pub(super) end_closed: bool,
    clock: u64,
}

impl Cache {
    pub(super) fn new(header: &Header, sector_bytes: usize) -> Cache {
        Cache {
            geometry: header.geometry(),
            sector_bytes,
            table: None,
            table_loading: false,
            places: FxHashSet::default(),
            fixed: Fixed::of(header),
            l2_tables: FxHashSet::default(),
            blocks: FxHashMap::default(),
            dirty: BTreeSet::new(),
            opened: BTreeSet::new(),
            full: FxHashSet::default(),
            next: 0,
            old: 0..0,
            high: 0,
            end_closed: false,
            clock: 0,
        }
    }

    fn table(&self) -> &[u64] {
        self.table.as_deref().unwrap_or_default()
    }

    /// Takes the table as it was read. New clusters come from its last block on, or from the file's end if that lies
    /// before.
    pub(super) fn set_table(&mut self, table: Vec<u64>, file_len: u64) {
        let per_block = self.geometry.refcounts_per_block();
        let end = file_len.div_ceil(self.geometry.cluster_bytes());
        let last = table.iter().rposition(|raw| *raw != 0).unwrap_or(0) as u64;
        self.next = last.min(end / per_block) * per_block;
        self.old = 0..self.next / per_block;
        self.high = end;
        self.places = table.iter().filter(|raw| **raw != 0).map(|raw| self.cluster_of(*raw)).collect();
        self.table = Some(table);
    }

    fn cluster_of(&self, raw: u64) -> u64 {
        raw >> self.geometry.cluster_bits()
    }

    /// Length of the table in entries.
    pub(super) fn entries(&self) -> u64 {
        self.table().len() as u64
    }

    /// The table's entry, 0 behind its end.
    pub(super) fn entry(&self, index: u64) -> u64 {
        usize::try_from(index).ok().and_then(|index| self.table().get(index)).copied().unwrap_or(0)
    }

    /// Whether another entry names the same block.
    pub(super) fn is_shared(&self, index: u64) -> bool {
        let raw = self.entry(index);
        self.table().iter().enumerate().any(|(other, found)| *found == raw && other as u64 != index)
    }

    /// What the header names at a cluster.
    pub(super) fn fixed_at(&self, cluster: u64) -> Option<&'static str> {
        self.fixed.at(&(cluster..cluster + 1))
    }

    /// The metadata that clusters hold, as far as header and refcount table tell.
    pub(super) fn metadata(&self, clusters: &Range<u64>) -> Option<&'static str> {
        let block = || hits(&self.places, clusters).then_some("refcount block");
        self.fixed.at(clusters).or_else(block)
    }

    /// Whether clusters hold L2 tables.
    pub(super) fn has_l2_table(&self, clusters: &Range<u64>) -> bool {
        hits(&self.l2_tables, clusters)
    }

    pub(super) fn slot(&self, index: u64) -> Option<&Slot> {
        self.blocks.get(&index)
    }

    pub(super) fn begin_load(&mut self, index: u64) {
        self.blocks.insert(index, Slot::Loading);
    }

    /// Forgets a load that did not end well.
    pub(super) fn abandon_load(&mut self, index: u64) {
        if let Some(Slot::Loading) = self.blocks.get(&index) {
            self.blocks.remove(&index);
        }
    }

    /// Takes a block as it is on the disk.
    pub(super) fn insert(&mut self, index: u64, at: HostOffset, bytes: Vec<u8>, reserved: bool) {
        self.clock += 1;
        let sectors = bytes.len() / self.sector_bytes;
        let scan_from = if self.full.remove(&index) { self.geometry.refcounts_per_block() } else { 0 };
        let block = Block {
            at,
            bytes,
            dirty: Sectors::none(sectors),
            frozen: Sectors::none(sectors),
            scan_from,
            reserved,
            used: self.clock,
        };
        self.blocks.insert(index, Slot::Ready(block));
        self.evict(index);
    }

    /// Takes a block, and its entry, that were just made.
    pub(super) fn insert_new(&mut self, index: u64, at: HostOffset, bytes: Vec<u8>) {
        if let Some(entry) = self.table.as_mut().and_then(|table| table.get_mut(index as usize)) {
            *entry = at.0;
        }
        let cluster = self.cluster_of(at.0);
        self.places.insert(cluster);
        self.raise_high(cluster + 1);
        self.insert(index, at, bytes, true);
    }

    pub(super) fn raise_high(&mut self, end: u64) {
        self.high = self.high.max(end);
    }

    /// Lets blocks go that nobody has used for long, until some room is left.
    fn evict(&mut self, keep: u64) {
        let most = (CACHE_BYTES_MAX >> self.geometry.cluster_bits()).max(CACHE_BLOCKS_MIN);
        if self.blocks.len() <= most {
            return;
        }
        let mut clean: Vec<(u64, u64)> = self
            .blocks
            .iter()
            .filter_map(|(index, slot)| match slot {
                Slot::Ready(block) if block.dirty.is_empty() && block.frozen.is_empty() => {
                    Some((block.used, *index))
                }
                _ => None,
            })
            .filter(|(_, index)| *index != keep)
            .collect();
        clean.sort_unstable();
        let excess = self.blocks.len() - (most - most / 8);
        for (_, index) in clean.into_iter().take(excess) {
            if let Some(Slot::Ready(block)) = self.blocks.remove(&index)
                && block.scan_from >= self.geometry.refcounts_per_block()
            {
                self.full.insert(index);
            }
        }
    }

    /// The block, if it is here.
    pub(super) fn ready(&mut self, index: u64) -> Option<&mut Block> {
        self.clock += 1;
        let clock = self.clock;
        match self.blocks.get_mut(&index) {
            Some(Slot::Ready(block)) => {
                block.used = clock;
                Some(block)
            }
            _ => None,
        }
    }

    /// A refcount of a block that is here.
    pub(super) fn get(&mut self, cluster: u64) -> Option<u64> {
        let geometry = self.geometry;
        let (index, in_block) = geometry.refcount_indices(HostCluster(cluster));
        self.ready(index).map(|block| refcount_get(&block.bytes, in_block, &geometry))
    }

    /// Raises a refcount of 0 to 1. False: its block is not here.
    pub(super) fn count_named(&mut self, cluster: u64) -> bool {
        let Some(now) = self.get(cluster) else { return false };
        if now == 0 {
            let (index, in_block) = self.geometry.refcount_indices(HostCluster(cluster));
            self.set(index, in_block..in_block + 1, |_| 1);
        }
        true
    }

    /// Sets refcounts of a block that is here.
    fn set(&mut self, index: u64, in_block: Range<u64>, value: impl Fn(u64) -> u64) {
        let (geometry, sector_bits) = (self.geometry, self.sector_bytes as u64 * 8);
        let Some(Slot::Ready(block)) = self.blocks.get_mut(&index) else { return };
        for nth in in_block {
            let old = refcount_get(&block.bytes, nth, &geometry);
            refcount_set(&mut block.bytes, nth, value(old), &geometry);
            block.dirty.insert(((nth << geometry.refcount_order()) / sector_bits) as usize);
        }
        self.dirty.insert(index);
    }

    /// Lowers the refcount of each of the clusters, all of one block, by one. `None`: the block is not here.
    pub(super) fn lower(&mut self, clusters: &Range<u64>) -> Option<IoResult<()>> {
        let geometry = self.geometry;
        let (index, first) = geometry.refcount_indices(HostCluster(clusters.start));
        let range = first..first + (clusters.end - clusters.start);
        let block = self.ready(index)?;
        let free = range.clone().find(|nth| refcount_get(&block.bytes, *nth, &geometry) == 0);
        if let Some(nth) = free {
            let cluster = clusters.start + (nth - first);
            return Some(Err(IoError::new(
                ErrorKind::Corrupt,
                format!(
                    "damaged qcow2 refcounts: cluster {cluster} is in use and counts as free; check the image before \
                     it is used on"
                ),
            )));
        }
        let gone = range.clone().find(|nth| refcount_get(&block.bytes, *nth, &geometry) == 1);
        if let Some(nth) = gone {
            block.scan_from = block.scan_from.min(nth);
            self.opened.insert(index);
        }
        for cluster in clusters.clone() {
            if self.l2_tables.contains(&cluster) && self.get(cluster) == Some(1) {
                self.l2_tables.remove(&cluster);
            }
        }
        self.set(index, range, |old| old - 1);
        Some(Ok(()))
    }

    /// Raises the refcount of each of the clusters, all of one block and in use, by one. `None`: the block is not here.
    pub(super) fn raise(&mut self, clusters: &Range<u64>) -> Option<IoResult<()>> {
        let geometry = self.geometry;
        let (index, first) = geometry.refcount_indices(HostCluster(clusters.start));
        let range = first..first + (clusters.end - clusters.start);
        let block = self.ready(index)?;
        for nth in range.clone() {
            let now = refcount_get(&block.bytes, nth, &geometry);
            let cluster = clusters.start + (nth - first);
            if now == geometry.refcount_max() {
                let why = format!("cluster {cluster} is used {now} times, and its refcount takes no more");
                return Some(Err(IoError::new(ErrorKind::TooLarge, why)));
            }
            if now == 0 {
                return Some(Err(super::damaged(format!("cluster {cluster} is in use and counts as free"))));
            }
        }
        self.set(index, range, |old| old + 1);
        Some(Ok(()))
    }

    /// Looks for a free run, and counts it as used.
    pub(super) fn pick(&mut self, want: u64, search: Search, budget: &mut u32, file_len: u64) -> Pick {
        let per_block = self.geometry.refcounts_per_block();
        if search == Search::Usual {
            while let Some(index) = self.opened.first().copied() {
                match self.pick_in(index, 0, want, file_len) {
                    Pick::Full => drop(self.opened.remove(&index)),
                    other => return other,
                }
            }
            while self.entry(self.next / per_block) != 0 {
                let (index, from) = (self.next / per_block, self.next % per_block);
                match self.pick_in(index, from, want, file_len) {
                    Pick::Full => self.next = (index + 1) * per_block,
                    Pick::Run(run) => {
                        self.next = run.first.0 + run.count;
                        return Pick::Run(run);
                    }
                    load => return load,
                }
            }
        }
        while self.old.start < self.old.end && (search == Search::Old || self.end_closed || *budget > 0) {
            let index = self.old.start;
            if self.entry(index) != 0 {
                match self.pick_in(index, 0, want, file_len) {
                    Pick::Full => {}
                    other => return other,
                }
                *budget = budget.saturating_sub(1);
            }
            self.old.start += 1;
        }
        Pick::Full
    }

    /// Looks in one block.
    fn pick_in(&mut self, index: u64, from: u64, want: u64, file_len: u64) -> Pick {
        if self.full.contains(&index) {
            return Pick::Full;
        }
        let geometry = self.geometry;
        let per_block = geometry.refcounts_per_block();
        let Some(block) = self.ready(index) else { return Pick::Load(index) };
        let start = from.max(block.scan_from);
        let found = first_free(&block.bytes, start, &geometry);
        if start == block.scan_from {
            block.scan_from = found.unwrap_or(per_block);
        }
        let Some(first) = found else { return Pick::Full };
        let most = per_block.min(first.saturating_add(want.max(1)));
        let end =
            (first + 1..most).find(|nth| refcount_get(&block.bytes, *nth, &geometry) != 0).unwrap_or(most);
        if first == block.scan_from {
            block.scan_from = end;
        }
        self.set(index, first..end, |_| 1);
        let base = index * per_block;
        let run = base + first..base + end;
        let zeroed = run.start >= self.high && run.start << geometry.cluster_bits() >= file_len;
        self.raise_high(run.end);
        Pick::Run(HostRun { first: HostCluster(run.start), count: end - first, zeroed })
    }

    /// The table entry for which a new block is to be made, where the end of the image is full.
    pub(super) fn missing_entry(&mut self) -> Option<u64> {
        let index = self.next / self.geometry.refcounts_per_block();
        (self.entry(index) == 0).then_some(index)
    }

    /// Copies everything dirty; adjacent sectors become one copy.
    pub(super) fn freeze(&mut self) -> Vec<RefcountCopy> {
        let (mut copies, bytes_each) = (Vec::new(), self.sector_bytes);
        for index in std::mem::take(&mut self.dirty) {
            let Some(Slot::Ready(block)) = self.blocks.get_mut(&index) else { continue };
            let (mut sector, count) = (0, block.bytes.len() / bytes_each);
            while sector < count {
                let start = sector;
                while sector < count && block.dirty.contains(sector) && !block.frozen.contains(sector) {
                    block.dirty.remove(sector);
                    block.frozen.insert(sector);
                    sector += 1;
                }
                if start == sector {
                    sector += 1;
                    continue;
                }
                let bytes = Bytes::copy_from_slice(&block.bytes[start * bytes_each..sector * bytes_each]);
                let at = HostOffset(block.at.0 + (start * bytes_each) as u64);
                copies.push(RefcountCopy { at, bytes, block: index, sectors: start..sector });
            }
            if !block.dirty.is_empty() {
                self.dirty.insert(index);
            }
        }
        copies
    }

    /// The copies were written, or not.
    pub(super) fn written(&mut self, copies: &[RefcountCopy], ok: bool) {
        for copy in copies {
            let Some(Slot::Ready(block)) = self.blocks.get_mut(&copy.block) else { continue };
            for sector in copy.sectors.clone() {
                block.frozen.remove(sector);
                if !ok {
                    block.dirty.insert(sector);
                }
            }
            if !ok {
                self.dirty.insert(copy.block);
            }
        }
    }

    /// How many blocks are dirty, in bytes.
    pub(super) fn dirty_bytes(&self) -> usize {
        self.dirty.len() << self.geometry.cluster_bits()
    }

    /// How many blocks are cached, in bytes.
    #[cfg(test)]
    pub(super) fn cached_bytes(&self) -> usize {
        self.blocks.len() << self.geometry.cluster_bits()
    }
}

/// Whether any of the clusters is in the set.
fn hits(set: &FxHashSet<u64>, clusters: &Range<u64>) -> bool {
    if clusters.end - clusters.start <= set.len() as u64 {
        clusters.clone().any(|cluster| set.contains(&cluster))
    } else {
        set.iter().any(|cluster| clusters.contains(cluster))
    }
}

/// The first refcount of 0 at or behind `from`.
fn first_free(block: &[u8], from: u64, geometry: &Geometry) -> Option<u64> {
    let (order, total) = (geometry.refcount_order(), geometry.refcounts_per_block());
    let per_word = 64u64 >> order;
    // One bit at the lowest, one at the highest place of each refcount in a word.
    let low = if order == 6 { 1 } else { u64::MAX / ((1u64 << (1 << order)) - 1) };
    let high = low << ((1u32 << order) - 1);
    let mut at = from;
    while at < total {
        if at.is_multiple_of(per_word) {
            let word = be64(&block[(at / per_word * 8) as usize..]);
            let has_zero = word.wrapping_sub(low) & !word & high != 0;
            if !has_zero {
                at += per_word;
                continue;
            }
        }
        if refcount_get(block, at, geometry) == 0 {
            return Some(at);
        }
        at += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_first_free_refcount_is_found_in_every_width(
            order in 0u32..=6, used in proptest::collection::vec(any::<u64>(), 64), holes in proptest::collection::vec(0u64..4096, 0..4), from in 0u64..4096,
        ) {
            let geometry = Geometry::new(3, 9, order, false).unwrap();
            let total = geometry.refcounts_per_block();
            let mut block = vec![0; 512];
            for nth in 0..total {
                let value = (used[(nth % 64) as usize] & geometry.refcount_max()).max(1);
                refcount_set(&mut block, nth, value, &geometry);
            }
            holes.iter().for_each(|nth| refcount_set(&mut block, nth % total, 0, &geometry));
            let from = from % total;
            let expected = (from..total).find(|nth| refcount_get(&block, *nth, &geometry) == 0);
            prop_assert_eq!(first_free(&block, from, &geometry), expected);
        }
    }
}
