//! The image's geometry: cluster size, entry sizes, and which table entry describes which byte.
//!
//! Owns the newtypes of the two address spaces. Pure arithmetic on validated parameters: nothing here can overflow
//! for offsets of an image that [`crate::Header`] has accepted.

use crate::format::limits::{
    CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, CLUSTER_BITS_MIN_EXTENDED, L1_BYTES_MAX, REFCOUNT_ORDER_MAX,
};

/// A byte of the guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GuestOffset(pub u64);

/// A byte of the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HostOffset(pub u64);

/// A cluster of the guest's disk, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GuestCluster(pub u64);

/// A cluster of the image file, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HostCluster(pub u64);

/// An entry of the L1 table: one L2 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct L1Index(pub u32);

/// An entry of an L2 table: one guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct L2Index(pub u32);

/// Bytes of one entry of an L1, refcount or bitmap table.
pub(crate) const TABLE_ENTRY_BYTES: u64 = 8;

/// Subclusters of a cluster with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;

/// Cluster size, entry width and refcount width of an image. A standard image is one with one subcluster per cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    refcount_order: u32,
    extended: bool,
    /// Version 2 has no zero clusters.
    zero_clusters: bool,
}

impl Geometry {
    /// Checks the parameters; the error says what was expected and found.
    pub fn new(
        version: u32,
        cluster_bits: u32,
        refcount_order: u32,
        extended: bool,
    ) -> Result<Geometry, String> {
        if !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&cluster_bits) {
            return Err(format!(
                "cluster_bits is {cluster_bits}, must be {CLUSTER_BITS_MIN} to {CLUSTER_BITS_MAX}"
            ));
        }
        if extended && cluster_bits < CLUSTER_BITS_MIN_EXTENDED {
            return Err(format!(
                "cluster_bits is {cluster_bits}, must be at least {CLUSTER_BITS_MIN_EXTENDED} with extended L2 entries"
            ));
        }
        if refcount_order > REFCOUNT_ORDER_MAX {
            return Err(format!("refcount_order is {refcount_order}, must be at most {REFCOUNT_ORDER_MAX}"));
        }
        if version < 3 && (extended || refcount_order != 4) {
            return Err("version 2 has neither extended L2 entries nor another refcount width than 16".into());
        }
        Ok(Geometry { cluster_bits, refcount_order, extended, zero_clusters: version >= 3 })
    }

    /// Cluster size as a power of two.
    pub fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    /// Cluster size in bytes.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether L2 entries are extended (16 bytes, with subclusters).
    pub fn extended_l2(&self) -> bool {
        self.extended
    }

    /// Whether entries can say *zero* (version 3).
    pub fn has_zero_clusters(&self) -> bool {
        self.zero_clusters
    }

    /// Subclusters of a cluster: 32, or 1 with standard entries.
    pub fn subclusters(&self) -> u32 {
        if self.extended { SUBCLUSTERS } else { 1 }
    }

    /// One bit for each subcluster of a cluster.
    pub fn subcluster_mask(&self) -> u32 {
        if self.extended { u32::MAX } else { 1 }
    }

    /// Size of a subcluster, in bytes: what becomes present on its own.
    pub fn subcluster_bytes(&self) -> u64 {
        self.cluster_bytes() / u64::from(self.subclusters())
    }

    /// Size of an L2 entry, in bytes: 8 or 16.
    pub fn l2_entry_bytes(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u32 {
        (self.cluster_bytes() / self.l2_entry_bytes()) as u32
    }

    /// Guest bytes that one L2 table describes.
    pub fn l2_table_guest_bytes(&self) -> u64 {
        u64::from(self.l2_entries()) << self.cluster_bits
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_table_guest_bytes())
    }

    /// The largest disk that an L1 table of the allowed length describes, in bytes.
    pub fn max_virtual_size(&self) -> u64 {
        let tables = L1_BYTES_MAX / TABLE_ENTRY_BYTES;
        tables.saturating_mul(self.l2_table_guest_bytes()).min(1 << 63)
    }

    /// The cluster that holds a guest byte.
    pub fn guest_cluster(&self, at: GuestOffset) -> GuestCluster {
        GuestCluster(at.0 >> self.cluster_bits)
    }

    /// First byte of a guest cluster.
    pub fn guest_offset(&self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset(cluster.0 << self.cluster_bits)
    }

    /// The cluster that holds a byte of the file.
    pub fn host_cluster(&self, at: HostOffset) -> HostCluster {
        HostCluster(at.0 >> self.cluster_bits)
    }

    /// First byte of a host cluster.
    pub fn host_offset(&self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// Offset of a byte, guest or host, in its cluster.
    pub fn in_cluster(&self, at: u64) -> u64 {
        at & (self.cluster_bytes() - 1)
    }

    /// Whether an offset is a multiple of the cluster size.
    pub fn is_aligned(&self, at: HostOffset) -> bool {
        self.in_cluster(at.0) == 0
    }

    /// The L1 and L2 entries of a guest cluster of the disk.
    pub fn indices(&self, cluster: GuestCluster) -> (L1Index, L2Index) {
        let entries = u64::from(self.l2_entries());
        (L1Index((cluster.0 / entries) as u32), L2Index((cluster.0 % entries) as u32))
    }

    /// The guest cluster of an L1 and an L2 entry.
    pub fn cluster_at(&self, l1: L1Index, l2: L2Index) -> GuestCluster {
        GuestCluster(u64::from(l1.0) * u64::from(self.l2_entries()) + u64::from(l2.0))
    }

    /// The subcluster that holds a guest byte.
    pub fn subcluster(&self, at: GuestOffset) -> u32 {
        (self.in_cluster(at.0) / self.subcluster_bytes()) as u32
    }

    /// Refcount width as a power of two of bits.
    pub fn refcount_order(&self) -> u32 {
        self.refcount_order
    }

    /// Refcount width in bits.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// The largest refcount.
    pub fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Refcounts in one refcount block (a cluster).
    pub fn refcounts_per_block(&self) -> u64 {
        (self.cluster_bytes() * 8) >> self.refcount_order
    }

    /// The refcount table entry and the entry in its block that count a host cluster.
    pub fn refcount_indices(&self, cluster: HostCluster) -> (u64, u64) {
        (cluster.0 / self.refcounts_per_block(), cluster.0 % self.refcounts_per_block())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_outside_the_format_are_refused() {
        for (version, bits, order, extended) in
            [(3, 8, 4, false), (3, 22, 4, false), (3, 13, 4, true), (3, 16, 7, false), (2, 16, 3, false)]
        {
            assert!(Geometry::new(version, bits, order, extended).is_err(), "{version} {bits} {order}");
        }
    }

    #[test]
    fn indices_and_their_inverse_agree_for_every_geometry() {
        for bits in CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX {
            for extended in [false, true] {
                let Ok(geometry) = Geometry::new(3, bits, 4, extended) else { continue };
                for at in [0, 1, geometry.l2_table_guest_bytes() - 1, geometry.max_virtual_size() - 1] {
                    let cluster = geometry.guest_cluster(GuestOffset(at));
                    let (l1, l2) = geometry.indices(cluster);
                    assert_eq!(geometry.cluster_at(l1, l2), cluster);
                    assert!(u64::from(l1.0) < geometry.l1_entries_for(at + 1));
                    assert_eq!(
                        geometry.guest_offset(cluster).0 + geometry.in_cluster(at),
                        at,
                        "{bits} {extended}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_block_of_refcounts_fills_one_cluster() {
        for order in 0..=REFCOUNT_ORDER_MAX {
            let geometry = Geometry::new(3, 16, order, true).unwrap();
            assert_eq!(geometry.refcounts_per_block() * u64::from(geometry.refcount_bits()), 65536 * 8);
            let last = HostCluster(geometry.refcounts_per_block());
            assert_eq!(geometry.refcount_indices(last), (1, 0));
        }
        assert_eq!(Geometry::new(3, 16, 6, false).unwrap().refcount_max(), u64::MAX);
        assert_eq!(Geometry::new(3, 16, 0, false).unwrap().refcount_max(), 1);
    }
}
