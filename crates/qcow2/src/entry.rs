//! Views of the entries of L1 tables, L2 tables, refcount tables and refcount blocks.
//!
//! An entry is read through [`L1Entry::view`] or [`L2Entry::view`], which refuse what the format does not allow
//! instead of masking it away, and made through [`L2Entry::standard`], [`L2Entry::compressed`] and [`L1Entry::table`].
//! A standard cluster is the case of one subcluster, so that whoever uses these needs no second path for extended
//! entries. Nothing here reads or writes storage.

use std::fmt;

use infill_base::{ErrorKind, IoError};

use crate::format::limits::HOST_OFFSET_END;
use crate::geometry::{Geometry, HostOffset};

/// Set in an L1 or L2 entry whose table or cluster has a refcount of exactly one: it may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
/// Set in the L2 entry of a compressed cluster.
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// Set in a standard L2 entry that reads as zeroes.
const ZERO: u64 = 1;
/// Bits 9 to 55: the host offset of L1 entries and standard L2 entries.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an L1 entry that must be 0.
const L1_RESERVED: u64 = !(OFFSET | COPIED);
/// Bits of a standard L2 entry that must be 0, but for [`ZERO`].
const L2_RESERVED: u64 = !(OFFSET | COPIED | COMPRESSED | ZERO);
/// Bits of a refcount table entry that must be 0.
const REFCOUNT_TABLE_RESERVED: u64 = 0x1ff;

/// An entry that the format does not allow: its value, and which rule it breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryError {
    /// The entry (its first word, if it is extended).
    pub raw: u64,
    /// The rule.
    pub rule: EntryRule,
}

/// A rule that an entry breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryRule {
    /// Reserved bits must be 0.
    Reserved,
    /// Offsets are multiples of the cluster size.
    Unaligned,
    /// The flag *copied*, or allocated subclusters, need a host offset.
    NoHost,
    /// Version 2 has no zero clusters.
    ZeroInVersion2,
    /// A subcluster cannot be allocated and zero.
    AllocatedAndZero,
    /// A compressed cluster has no subclusters.
    CompressedWithSubclusters,
    /// Compressed data lies behind the file header and below the largest host offset.
    CompressedOutside,
}

impl fmt::Display for EntryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rule = match self.rule {
            EntryRule::Reserved => "has reserved bits set",
            EntryRule::Unaligned => "points to an offset that is no multiple of the cluster size",
            EntryRule::NoHost => "claims data but has no host offset",
            EntryRule::ZeroInVersion2 => "is a zero cluster, which version 2 does not have",
            EntryRule::AllocatedAndZero => "has subclusters that are both allocated and zero",
            EntryRule::CompressedWithSubclusters => "is compressed and has subcluster bits",
            EntryRule::CompressedOutside => "points to compressed data outside of the file's address space",
        };
        write!(f, "entry {:#018x} {rule}", self.raw)
    }
}

impl std::error::Error for EntryError {}

impl From<EntryError> for IoError {
    fn from(error: EntryError) -> Self {
        IoError::new(
            ErrorKind::Corrupt,
            format!("damaged qcow2 table: {error}; check the image before it is used on"),
        )
    }
}

/// Says where `offset` points, if it may point there.
fn host_offset(raw: u64, geometry: &Geometry) -> Result<Option<HostOffset>, EntryError> {
    let at = HostOffset(raw & OFFSET);
    if !geometry.is_aligned(at) {
        return Err(EntryError { raw, rule: EntryRule::Unaligned });
    }
    Ok((at.0 != 0).then_some(at))
}

/// An entry of an L1 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct L1Entry(pub u64);

/// What an L1 entry names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2TableRef {
    /// Where the L2 table lies.
    pub at: HostOffset,
    /// Whether its refcount is one, so that it may be written in place (accurate in the active L1 table only).
    pub copied: bool,
}

impl L1Entry {
    /// No L2 table: every cluster that it would describe is absent.
    pub const EMPTY: L1Entry = L1Entry(0);

    /// The entry for a table.
    pub fn table(table: L2TableRef) -> L1Entry {
        debug_assert_eq!(table.at.0 & !OFFSET, 0);
        L1Entry(table.at.0 | if table.copied { COPIED } else { 0 })
    }

    /// What it names; `None`: no table.
    pub fn view(self, geometry: &Geometry) -> Result<Option<L2TableRef>, EntryError> {
        if self.0 & L1_RESERVED != 0 {
            return Err(EntryError { raw: self.0, rule: EntryRule::Reserved });
        }
        let copied = self.0 & COPIED != 0;
        match host_offset(self.0, geometry)? {
            Some(at) => Ok(Some(L2TableRef { at, copied })),
            None if copied => Err(EntryError { raw: self.0, rule: EntryRule::NoHost }),
            None => Ok(None),
        }
    }
}

/// An entry of an L2 table: one word, or two if it is extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct L2Entry {
    /// The descriptor.
    pub word: u64,
    /// The subcluster bitmap; 0 in a standard entry.
    pub bitmap: u64,
}

/// What an L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2View {
    /// An uncompressed cluster, whole or in subclusters, or none at all.
    Standard(StandardCluster),
    /// A compressed cluster.
    Compressed(CompressedCluster),
}

/// What a subcluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubclusterState {
    /// Look in the backing.
    Absent,
    /// Reads as zeroes.
    Zero,
    /// Its data lies at its place in the host cluster.
    Data,
}

/// An uncompressed cluster. With standard entries it has one subcluster, bit 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct StandardCluster {
    /// Its host cluster. Also of zero clusters, where one was preallocated.
    pub host: Option<HostOffset>,
    /// Whether the host cluster's refcount is one. Where it is not, the cluster is never written in place.
    pub copied: bool,
    /// Subclusters with data.
    pub allocated: u32,
    /// Subclusters that read as zeroes.
    pub zero: u32,
}

impl StandardCluster {
    /// Nothing here.
    pub const ABSENT: StandardCluster = StandardCluster { host: None, copied: false, allocated: 0, zero: 0 };

    /// What subcluster `index` is.
    pub fn state(&self, index: u32) -> SubclusterState {
        if self.allocated >> index & 1 != 0 {
            SubclusterState::Data
        } else if self.zero >> index & 1 != 0 {
            SubclusterState::Zero
        } else {
            SubclusterState::Absent
        }
    }

    /// Subclusters from `index` on that are of the same state as it, itself included.
    pub fn run(&self, index: u32, geometry: &Geometry) -> u32 {
        let same = match self.state(index) {
            SubclusterState::Data => self.allocated,
            SubclusterState::Zero => self.zero,
            SubclusterState::Absent => !(self.allocated | self.zero),
        };
        (same >> index).trailing_ones().min(geometry.subclusters() - index)
    }

    /// Subclusters that are absent.
    pub fn absent(&self, geometry: &Geometry) -> u32 {
        !(self.allocated | self.zero) & geometry.subcluster_mask()
    }
}

/// A compressed cluster: where its compressed bytes may lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedCluster {
    /// First compressed byte; any alignment.
    pub at: HostOffset,
    /// Bytes to the end of the last sector that holds any of it. The file may end before, in that sector.
    pub len: u32,
}

impl L2Entry {
    /// Absent.
    pub const ABSENT: L2Entry = L2Entry { word: 0, bitmap: 0 };

    /// From the bytes of a table; `bytes` is one entry long.
    ///
    /// # Panics
    /// If `bytes` is shorter.
    pub fn from_bytes(bytes: &[u8], geometry: &Geometry) -> L2Entry {
        let bitmap = if geometry.extended_l2() { be64(&bytes[8..]) } else { 0 };
        L2Entry { word: be64(bytes), bitmap }
    }

    /// To the bytes of a table; `bytes` is one entry long.
    ///
    /// # Panics
    /// If `bytes` is shorter.
    pub fn write_to(self, bytes: &mut [u8], geometry: &Geometry) {
        bytes[..8].copy_from_slice(&self.word.to_be_bytes());
        if geometry.extended_l2() {
            bytes[8..16].copy_from_slice(&self.bitmap.to_be_bytes());
        }
    }

    /// The entry of an uncompressed cluster. In a standard image: all of it is data, or zero, or absent.
    pub fn standard(cluster: StandardCluster, geometry: &Geometry) -> L2Entry {
        debug_assert_eq!(cluster.allocated & cluster.zero, 0);
        debug_assert!(cluster.allocated == 0 || cluster.host.is_some());
        debug_assert!(
            geometry.extended_l2() || cluster.host.is_none() || cluster.allocated | cluster.zero == 1
        );
        let mut word = cluster.host.map_or(0, |at| at.0);
        debug_assert_eq!(word & !OFFSET, 0);
        if cluster.copied && cluster.host.is_some() {
            word |= COPIED;
        }
        if geometry.extended_l2() {
            return L2Entry { word, bitmap: u64::from(cluster.zero) << 32 | u64::from(cluster.allocated) };
        }
        debug_assert!(cluster.zero == 0 || geometry.has_zero_clusters());
        L2Entry { word: word | u64::from(cluster.zero & 1), bitmap: 0 }
    }

    /// The entry of a compressed cluster of `len` compressed bytes at `at`; `None` if they cannot be described.
    pub fn compressed(at: HostOffset, len: u32, geometry: &Geometry) -> Option<L2Entry> {
        let shift = compressed_offset_bits(geometry);
        let sectors = (u64::from(len).checked_add(at.0 % 512)?).div_ceil(512).checked_sub(1)?;
        let fits = at.0 < HOST_OFFSET_END.min(1 << shift) && sectors < 1 << (62 - shift);
        fits.then_some(L2Entry { word: COMPRESSED | sectors << shift | at.0, bitmap: 0 })
    }

    /// Whether it says nothing at all (the common case of a fresh table).
    pub fn is_absent(self) -> bool {
        self.word == 0 && self.bitmap == 0
    }

    /// What it says, or which rule it breaks.
    pub fn view(self, geometry: &Geometry) -> Result<L2View, EntryError> {
        let broken = |rule| Err(EntryError { raw: self.word, rule });
        if self.word & COMPRESSED != 0 {
            // COPIED on a compressed cluster means nothing and does no harm; `check` removes it.
            if self.bitmap != 0 {
                return broken(EntryRule::CompressedWithSubclusters);
            }
            return self.compressed_view(geometry).map(L2View::Compressed);
        }
        if self.word & L2_RESERVED != 0 || (geometry.extended_l2() && self.word & ZERO != 0) {
            return broken(EntryRule::Reserved);
        }
        let host = host_offset(self.word, geometry)?;
        let copied = self.word & COPIED != 0;
        let (allocated, zero) = if geometry.extended_l2() {
            (self.bitmap as u32, (self.bitmap >> 32) as u32)
        } else {
            let zero = (self.word & ZERO) as u32;
            (if zero == 0 && host.is_some() { 1 } else { 0 }, zero)
        };
        if zero != 0 && !geometry.has_zero_clusters() {
            return broken(EntryRule::ZeroInVersion2);
        }
        if allocated & zero != 0 {
            return broken(EntryRule::AllocatedAndZero);
        }
        if host.is_none() && (allocated != 0 || copied) {
            return broken(EntryRule::NoHost);
        }
        Ok(L2View::Standard(StandardCluster { host, copied, allocated, zero }))
    }

    fn compressed_view(self, geometry: &Geometry) -> Result<CompressedCluster, EntryError> {
        let shift = compressed_offset_bits(geometry);
        let at = self.word & ((1 << shift) - 1);
        let sectors = self.word >> shift & ((1 << (62 - shift)) - 1);
        if at < geometry.cluster_bytes() || at >= HOST_OFFSET_END {
            return Err(EntryError { raw: self.word, rule: EntryRule::CompressedOutside });
        }
        let len = (sectors + 1) * 512 - at % 512;
        Ok(CompressedCluster { at: HostOffset(at), len: len as u32 })
    }
}

/// Width of the offset in a compressed descriptor.
fn compressed_offset_bits(geometry: &Geometry) -> u32 {
    62 - (geometry.cluster_bits() - 8)
}

/// Where the refcount block of a refcount table entry lies; `None`: all its refcounts are 0.
pub fn refcount_block(raw: u64, geometry: &Geometry) -> Result<Option<HostOffset>, EntryError> {
    if raw & REFCOUNT_TABLE_RESERVED != 0 {
        return Err(EntryError { raw, rule: EntryRule::Reserved });
    }
    let at = HostOffset(raw);
    if !geometry.is_aligned(at) {
        return Err(EntryError { raw, rule: EntryRule::Unaligned });
    }
    Ok((raw != 0).then_some(at))
}

/// The refcount at `index` of a block.
///
/// # Panics
/// If `block` is too short.
pub fn refcount_get(block: &[u8], index: u64, geometry: &Geometry) -> u64 {
    let index = index as usize;
    match geometry.refcount_order() {
        order @ 0..=2 => {
            let per_byte = 8 >> order;
            let shift = (index % per_byte) << order;
            u64::from(block[index / per_byte] >> shift) & geometry.refcount_max()
        }
        order => {
            let bytes = 1 << (order - 3);
            let field = &block[index * bytes..(index + 1) * bytes];
            field.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
        }
    }
}

/// Sets the refcount at `index` of a block.
///
/// # Panics
/// If `block` is too short, or `value` above [`Geometry::refcount_max`].
pub fn refcount_set(block: &mut [u8], index: u64, value: u64, geometry: &Geometry) {
    assert!(value <= geometry.refcount_max(), "refcount {value} does not fit");
    let index = index as usize;
    match geometry.refcount_order() {
        order @ 0..=2 => {
            let per_byte = 8 >> order;
            let shift = (index % per_byte) << order;
            let mask = (geometry.refcount_max() as u8) << shift;
            let byte = &mut block[index / per_byte];
            *byte = *byte & !mask | (value as u8) << shift;
        }
        order => {
            let bytes = 1 << (order - 3);
            block[index * bytes..(index + 1) * bytes].copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
        }
    }
}

/// The big-endian word at the start of `bytes`.
pub(crate) fn be64(bytes: &[u8]) -> u64 {
    bytes[..8].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn geometry(cluster_bits: u32, extended: bool) -> Geometry {
        Geometry::new(3, cluster_bits, 4, extended).unwrap()
    }

    fn rule(word: u64, bitmap: u64, geometry: &Geometry) -> Option<EntryRule> {
        L2Entry { word, bitmap }.view(geometry).err().map(|error| error.rule)
    }

    proptest! {
        #[test]
        fn a_standard_entry_comes_back_as_it_was_put_in(
            bits in 14u32..=21, extended: bool, host in 1u64..1 << 35, copied: bool, allocated: u32, zero: u32,
        ) {
            let geometry = geometry(bits, extended);
            let mask = geometry.subcluster_mask();
            let allocated = allocated & mask;
            let zero = zero & mask & !allocated;
            let host = (allocated != 0 || (extended && copied)).then_some(HostOffset(host << bits));
            let cluster = StandardCluster { host, copied: copied && host.is_some(), allocated, zero };
            prop_assert_eq!(L2Entry::standard(cluster, &geometry).view(&geometry), Ok(L2View::Standard(cluster)));
            let mut bytes = [0; 16];
            let entry = L2Entry::standard(cluster, &geometry);
            entry.write_to(&mut bytes, &geometry);
            prop_assert_eq!(L2Entry::from_bytes(&bytes, &geometry), entry);
        }

        #[test]
        fn a_compressed_entry_covers_the_bytes_that_were_put_in(
            bits in 9u32..=21, at in 1u64 << 21..1 << 49, len in 1u32..1 << 21,
        ) {
            let geometry = geometry(bits, false);
            let len = len.min(1 << bits);
            if let Some(entry) = L2Entry::compressed(HostOffset(at), len, &geometry) {
                let Ok(L2View::Compressed(found)) = entry.view(&geometry) else { panic!("{entry:?}") };
                prop_assert_eq!(found.at.0, at);
                prop_assert!(found.len >= len && found.len < len + 512);
            } else {
                // The last sector of a cluster's worth can be one more than the count's width.
                prop_assert!(at % 512 + u64::from(len) > 1 << bits);
            }
        }

        #[test]
        fn no_value_makes_a_view_panic(word: u64, bitmap: u64, bits in 9u32..=21, extended: bool, v3: bool) {
            let version = if v3 { 3 } else { 2 };
            if let Ok(geometry) = Geometry::new(version, bits, 4, extended) {
                let _ = L1Entry(word).view(&geometry);
                let _ = refcount_block(word, &geometry);
                if let Ok(L2View::Compressed(found)) = (L2Entry { word, bitmap }).view(&geometry) {
                    prop_assert!(u64::from(found.len) <= 2 * geometry.cluster_bytes());
                }
            }
        }

        #[test]
        fn a_refcount_leaves_its_neighbours_alone(order in 0u32..=6, index in 0u64..64, value: u64) {
            let geometry = Geometry::new(3, 9, order, false).unwrap();
            let value = value & geometry.refcount_max();
            for fill in [0u8, 0xff] {
                let mut block = vec![fill; 512];
                let other = refcount_get(&block, 0, &geometry);
                refcount_set(&mut block, index, value, &geometry);
                for at in 0..geometry.refcounts_per_block() {
                    let expected = if at == index { value } else { other };
                    prop_assert_eq!(refcount_get(&block, at, &geometry), expected);
                }
            }
        }
    }

    #[test]
    fn hostile_l2_entries_are_refused_by_rule() {
        let (plain, extended) = (geometry(16, false), geometry(16, true));
        let v2 = Geometry::new(2, 16, 4, false).unwrap();
        assert_eq!(rule(0x2, 0, &plain), Some(EntryRule::Reserved));
        assert_eq!(rule(1 << 56 | 0x10000, 0, &plain), Some(EntryRule::Reserved));
        assert_eq!(rule(1 | 0x10000, 0, &extended), Some(EntryRule::Reserved));
        assert_eq!(rule(0x10200, 0, &plain), Some(EntryRule::Unaligned));
        assert_eq!(rule(COPIED, 0, &plain), Some(EntryRule::NoHost));
        assert_eq!(rule(0, 1, &extended), Some(EntryRule::NoHost));
        assert_eq!(rule(1, 0, &v2), Some(EntryRule::ZeroInVersion2));
        assert_eq!(rule(0x10000, 1 << 32 | 1, &extended), Some(EntryRule::AllocatedAndZero));
        assert_eq!(rule(COMPRESSED | 0x20000, 1, &extended), Some(EntryRule::CompressedWithSubclusters));
        assert_eq!(rule(COMPRESSED | 0x200, 0, &plain), Some(EntryRule::CompressedOutside));
        let small = geometry(9, false);
        assert_eq!(rule(COMPRESSED | 1 << 57, 0, &small), Some(EntryRule::CompressedOutside));
    }

    #[test]
    fn hostile_l1_and_refcount_table_entries_are_refused_by_rule() {
        let geometry = geometry(16, false);
        let l1 = |raw| L1Entry(raw).view(&geometry).map_err(|error| error.rule);
        assert_eq!(l1(0x10001), Err(EntryRule::Reserved));
        assert_eq!(l1(1 << 60 | 0x10000), Err(EntryRule::Reserved));
        assert_eq!(l1(0x10200), Err(EntryRule::Unaligned));
        assert_eq!(l1(COPIED), Err(EntryRule::NoHost));
        assert_eq!(l1(0), Ok(None));
        let table = L2TableRef { at: HostOffset(0x10000), copied: true };
        assert_eq!(l1(L1Entry::table(table).0), Ok(Some(table)));
        assert_eq!(refcount_block(0x10100, &geometry).map_err(|error| error.rule), Err(EntryRule::Reserved));
        assert_eq!(refcount_block(0x10200, &geometry).map_err(|error| error.rule), Err(EntryRule::Unaligned));
    }

    #[test]
    fn runs_of_subclusters_end_with_the_cluster() {
        let geometry = geometry(16, true);
        let cluster = StandardCluster { allocated: 0b0110, zero: 0b1000, ..StandardCluster::ABSENT };
        let runs: Vec<u32> = [0, 1, 2, 3, 4].map(|index| cluster.run(index, &geometry)).to_vec();
        assert_eq!(runs, [1, 2, 1, 1, 28]);
        let whole = StandardCluster { allocated: u32::MAX, ..cluster };
        assert_eq!(whole.run(0, &geometry), 32);
        assert_eq!(StandardCluster::ABSENT.run(0, &Geometry::new(3, 16, 4, false).unwrap()), 1);
        assert_eq!(cluster.absent(&geometry), !0b1110);
    }
}
