//! What an entry of an L2 or L1 table says. Read through a view that refuses what the format does not allow, instead of
//! masking it away. Whether what it names lies in the file is [`Layout`]'s business.

use std::fmt;

use infill_base::{ErrorKind, IoError};

use crate::geometry::{Geometry, HostOffset, Layout};

/// Raw value of the entry of a cluster that reads as zeroes.
const ZERO: u64 = 1;

/// What an L2 entry says of its guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Look in the backing.
    Absent,
    /// Reads as zeroes.
    Zero,
    /// Its data lies here.
    Data(HostOffset),
}

/// An entry that the format does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryError {
    /// Its low bits, which are reserved, are not zero: it is no multiple of the cluster size.
    Unaligned(u64),
    /// What it names overlaps the header or the L1 table, or ends behind the file.
    Misplaced(u64),
}

impl fmt::Display for EntryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EntryError::Unaligned(raw) => {
                write!(f, "entry {raw:#018x} is neither 0 nor 1 nor a multiple of the cluster size")
            }
            EntryError::Misplaced(raw) => {
                write!(
                    f,
                    "entry {raw:#018x} points into the header or the L1 table, or behind the end of the file"
                )
            }
        }
    }
}

impl std::error::Error for EntryError {}

impl From<EntryError> for IoError {
    fn from(error: EntryError) -> Self {
        IoError::new(
            ErrorKind::Corrupt,
            format!("damaged QED table: {error}; check the image before it is used on"),
        )
    }
}

impl Cluster {
    /// What the entry says, if the format allows it.
    pub fn view(raw: u64, geometry: &Geometry) -> Result<Cluster, EntryError> {
        match raw {
            0 => Ok(Cluster::Absent),
            ZERO => Ok(Cluster::Zero),
            raw if geometry.in_cluster(raw) == 0 => Ok(Cluster::Data(HostOffset(raw))),
            raw => Err(EntryError::Unaligned(raw)),
        }
    }

    /// As [`Cluster::view`], for use: data lies in the file of `file_end` bytes, where data may lie.
    pub fn checked(raw: u64, layout: &Layout, file_end: u64) -> Result<Cluster, EntryError> {
        let cluster = Cluster::view(raw, &layout.geometry)?;
        match cluster {
            Cluster::Data(at) if !layout.is_inside(at, 1, file_end) || layout.touches_l1(at, 1) => {
                Err(EntryError::Misplaced(raw))
            }
            _ => Ok(cluster),
        }
    }

    /// The entry that says it.
    pub fn raw(self) -> u64 {
        match self {
            Cluster::Absent => 0,
            Cluster::Zero => ZERO,
            Cluster::Data(at) => at.0,
        }
    }
}

/// The L2 table that an L1 entry names, if the format allows it and the table lies in the file.
pub(crate) fn l2_table(raw: u64, layout: &Layout, file_end: u64) -> Result<Option<HostOffset>, EntryError> {
    let (at, clusters) = (HostOffset(raw), layout.geometry.table_clusters());
    if raw == 0 {
        return Ok(None);
    }
    if layout.geometry.in_cluster(raw) != 0 {
        return Err(EntryError::Unaligned(raw));
    }
    if !layout.is_inside(at, clusters, file_end) || layout.touches_l1(at, clusters) {
        return Err(EntryError::Misplaced(raw));
    }
    Ok(Some(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout { geometry: Geometry::new(4096, 2).unwrap(), header_end: 4096, l1: HostOffset(4096) }
    }

    #[test]
    fn every_view_comes_back_from_its_entry() {
        for cluster in [Cluster::Absent, Cluster::Zero, Cluster::Data(HostOffset(1 << 40))] {
            assert_eq!(Cluster::view(cluster.raw(), &layout().geometry), Ok(cluster));
        }
    }

    #[test]
    fn entries_with_reserved_bits_or_outside_of_the_file_are_refused() {
        for raw in [2, 4095, 4097, 12288 + 512] {
            assert_eq!(Cluster::checked(raw, &layout(), 1 << 20), Err(EntryError::Unaligned(raw)));
            assert_eq!(l2_table(raw, &layout(), 1 << 20), Err(EntryError::Unaligned(raw)));
        }
        // An L1 entry cannot say zero.
        assert_eq!(l2_table(1, &layout(), 1 << 20), Err(EntryError::Unaligned(1)));
        for raw in [4096, 8192, 1 << 20, !4095] {
            assert_eq!(Cluster::checked(raw, &layout(), 1 << 20), Err(EntryError::Misplaced(raw)));
            assert_eq!(l2_table(raw, &layout(), 1 << 20), Err(EntryError::Misplaced(raw)));
        }
        // A table that ends one cluster behind the file.
        assert_eq!(l2_table(16384, &layout(), 20480), Err(EntryError::Misplaced(16384)));
        assert_eq!(l2_table(12288, &layout(), 20480), Ok(Some(HostOffset(12288))));
    }
}
