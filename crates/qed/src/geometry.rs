//! Units, and the arithmetic of one image: which entries describe a guest cluster, and where clusters may lie.
//!
//! Everything here is plain arithmetic; nothing panics on numbers that passed [`Geometry::new`].

use std::ops::Range;

use infill_node::mapping::SLICE_BYTES;

use crate::format::ENTRY_BYTES;
use crate::format::limits::{
    CLUSTER_BYTES_MAX, CLUSTER_BYTES_MIN, FILE_BYTES_MAX, SIZE_ALIGN, TABLE_CLUSTERS_MAX,
};

/// A byte of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HostOffset(pub u64);

/// A cluster of the disk, counted from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestCluster(pub u64);

/// An entry of the L1 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct L1Index(pub u32);

/// An entry of an L2 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct L2Index(pub u32);

/// Entries of a slice: what of a table is in memory at once. No table is shorter.
pub(crate) const SLICE_ENTRIES: u32 = SLICE_BYTES as u32 / ENTRY_BYTES as u32;

/// Cluster size and table size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    table_clusters: u32,
}

impl Geometry {
    /// Checks the parameters; the error says what was expected and found.
    pub fn new(cluster_bytes: u64, table_clusters: u32) -> Result<Geometry, String> {
        if !cluster_bytes.is_power_of_two()
            || !(CLUSTER_BYTES_MIN..=CLUSTER_BYTES_MAX).contains(&cluster_bytes)
        {
            return Err(format!(
                "the cluster size is {cluster_bytes} bytes, must be a power of two from {CLUSTER_BYTES_MIN} to \
                 {CLUSTER_BYTES_MAX}"
            ));
        }
        if !table_clusters.is_power_of_two() || table_clusters > TABLE_CLUSTERS_MAX {
            return Err(format!(
                "the table size is {table_clusters} clusters, must be 1, 2, 4, 8 or {TABLE_CLUSTERS_MAX}"
            ));
        }
        Ok(Geometry { cluster_bits: cluster_bytes.trailing_zeros(), table_clusters })
    }

    /// Checks the size of a disk; the error says what was expected and found.
    pub fn check_size(&self, size: u64) -> Result<(), String> {
        if !size.is_multiple_of(SIZE_ALIGN) {
            return Err(format!("the size of the disk is {size} bytes, must be a multiple of {SIZE_ALIGN}"));
        }
        let most = self.max_virtual_size();
        if size > most {
            return Err(format!(
                "the size of the disk is {size} bytes, at most {most} are possible with clusters of {} bytes and \
                 tables of {} clusters",
                self.cluster_bytes(),
                self.table_clusters
            ));
        }
        Ok(())
    }

    /// Cluster size in bytes.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Clusters of a table, L1 or L2.
    pub fn table_clusters(&self) -> u32 {
        self.table_clusters
    }

    /// Size of a table, L1 or L2, in bytes.
    pub fn table_bytes(&self) -> u64 {
        u64::from(self.table_clusters) << self.cluster_bits
    }

    /// Entries of a table, L1 or L2.
    pub fn table_entries(&self) -> u32 {
        (self.table_bytes() / ENTRY_BYTES) as u32
    }

    /// Guest bytes that one L2 table describes.
    pub fn table_guest_bytes(&self) -> u64 {
        u64::from(self.table_entries()) << self.cluster_bits
    }

    /// The largest disk, in bytes.
    pub fn max_virtual_size(&self) -> u64 {
        let most = u128::from(self.table_guest_bytes()) * u128::from(self.table_entries());
        most.min(u128::from(FILE_BYTES_MAX / SIZE_ALIGN * SIZE_ALIGN)) as u64
    }

    /// Clusters of a disk of `size` bytes.
    pub fn clusters(&self, size: u64) -> u64 {
        size.div_ceil(self.cluster_bytes())
    }

    /// The cluster that holds a guest byte.
    pub fn guest_cluster(&self, at: u64) -> GuestCluster {
        GuestCluster(at >> self.cluster_bits)
    }

    /// First byte of a guest cluster.
    pub fn guest_offset(&self, cluster: GuestCluster) -> u64 {
        cluster.0 << self.cluster_bits
    }

    /// Offset of a byte, guest or host, in its cluster.
    pub fn in_cluster(&self, at: u64) -> u64 {
        at & (self.cluster_bytes() - 1)
    }

    /// `at` rounded down to the beginning of a cluster.
    pub fn align_down(&self, at: u64) -> u64 {
        at - self.in_cluster(at)
    }

    /// The L1 and L2 entries of a guest cluster of the disk.
    pub fn indices(&self, cluster: GuestCluster) -> (L1Index, L2Index) {
        let entries = u64::from(self.table_entries());
        (L1Index((cluster.0 / entries) as u32), L2Index((cluster.0 % entries) as u32))
    }

    /// The guest cluster of an L1 and an L2 entry.
    pub fn cluster_at(&self, l1: L1Index, l2: L2Index) -> GuestCluster {
        GuestCluster(u64::from(l1.0) * u64::from(self.table_entries()) + u64::from(l2.0))
    }
}

/// Where an image's parts lie that never move: the header, and behind it the L1 table somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Cluster and table size.
    pub geometry: Geometry,
    /// First byte behind the header's clusters.
    pub header_end: u64,
    /// The L1 table.
    pub l1: HostOffset,
}

impl Layout {
    /// The L1 table's bytes in the file.
    pub fn l1_bytes(&self) -> Range<u64> {
        self.l1.0..self.l1.0 + self.geometry.table_bytes()
    }

    /// Whether `clusters` clusters from `at` are aligned and lie behind the header and before `file_end`.
    pub fn is_inside(&self, at: HostOffset, clusters: u32, file_end: u64) -> bool {
        let end = at.0.checked_add(u64::from(clusters) << self.geometry.cluster_bits);
        self.geometry.in_cluster(at.0) == 0
            && at.0 >= self.header_end
            && end.is_some_and(|end| end <= file_end)
    }

    /// Whether `clusters` clusters from `at`, which [`Layout::is_inside`], touch the L1 table.
    pub fn touches_l1(&self, at: HostOffset, clusters: u32) -> bool {
        let l1 = self.l1_bytes();
        at.0 < l1.end && l1.start < at.0 + (u64::from(clusters) << self.geometry.cluster_bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_outside_the_format_are_refused() {
        for (cluster, table) in
            [(2048, 4), (128 << 20, 4), (65537, 4), (0, 4), (65536, 0), (65536, 3), (65536, 32)]
        {
            assert!(Geometry::new(cluster, table).is_err(), "{cluster} {table}");
        }
        let geometry = Geometry::new(4096, 1).unwrap();
        assert_eq!(geometry.max_virtual_size(), 512 * 512 * 4096);
        assert!(geometry.check_size(geometry.max_virtual_size()).is_ok());
        assert!(geometry.check_size(geometry.max_virtual_size() + 512).is_err());
        assert!(geometry.check_size(511).is_err());
    }

    #[test]
    fn indices_and_their_inverse_agree_for_every_geometry() {
        for bits in 12..=26 {
            for table in [1, 2, 4, 8, 16] {
                let geometry = Geometry::new(1 << bits, table).unwrap();
                assert_eq!(geometry.table_entries() % SLICE_ENTRIES, 0);
                for at in [0, 1, geometry.table_guest_bytes() - 1, geometry.max_virtual_size() - 1] {
                    let cluster = geometry.guest_cluster(at);
                    let (l1, l2) = geometry.indices(cluster);
                    assert!(l1.0 < geometry.table_entries() && l2.0 < geometry.table_entries());
                    assert_eq!(geometry.cluster_at(l1, l2), cluster);
                    assert_eq!(
                        geometry.guest_offset(cluster) + geometry.in_cluster(at),
                        at,
                        "{bits} {table}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_overlaps_the_header_or_ends_behind_the_file_is_outside() {
        let geometry = Geometry::new(4096, 2).unwrap();
        let layout = Layout { geometry, header_end: 8192, l1: HostOffset(16384) };
        let inside = |at, clusters| layout.is_inside(HostOffset(at), clusters, 40960);
        assert!(inside(8192, 1) && inside(36864, 1) && inside(32768, 2));
        assert!(!inside(4096, 1) && !inside(36864, 2) && !inside(40960, 1) && !inside(8193, 1));
        assert!(!inside(u64::MAX - 4095, 2));
        let touches = |at, clusters| layout.touches_l1(HostOffset(at), clusters);
        assert!(touches(16384, 1) && touches(20480, 1) && touches(12288, 2));
        assert!(!touches(12288, 1) && !touches(24576, 2));
    }
}
