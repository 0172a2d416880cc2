//! The bytes of a QED image, as they lie in the file: little-endian structures and constants, without meaning.
//!
//! Nothing here is validated; [`crate::Header`] and [`crate::Cluster`] make validated values of it.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First four bytes of every image.
pub(crate) const MAGIC: [u8; 4] = *b"QED\0";

/// Bytes that a device writes whole or not at all. The header lies in the first of them.
pub(crate) const SECTOR_BYTES: usize = 512;

/// Length of the header's fields, in bytes.
pub(crate) const HEADER_BYTES: usize = 64;

/// Length of an entry of a table, in bytes.
pub(crate) const ENTRY_BYTES: u64 = 8;

/// The header's fields. All of them take space, whether a feature bit uses them or not.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub magic: [u8; 4],
    pub cluster_size: U32,
    pub table_size: U32,
    pub header_size: U32,
    pub features: U64,
    pub compat_features: U64,
    pub autoclear_features: U64,
    pub l1_table_offset: U64,
    pub image_size: U64,
    pub backing_filename_offset: U32,
    pub backing_filename_size: U32,
}
const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);

/// Limits on what an image may ask for.
pub mod limits {
    /// Least cluster size, in bytes (specification, *Header*).
    pub const CLUSTER_BYTES_MIN: u64 = 4096;
    /// Largest cluster size, in bytes (specification, *Header*).
    pub const CLUSTER_BYTES_MAX: u64 = 64 << 20;
    /// Cluster size where nothing else is asked for, in bytes (QEMU's, too).
    pub const CLUSTER_BYTES_DEFAULT: u64 = 64 << 10;
    /// Most clusters of a table (specification, *Header*).
    pub const TABLE_CLUSTERS_MAX: u32 = 16;
    /// Clusters of a table where nothing else is asked for (QEMU's, too).
    pub const TABLE_CLUSTERS_DEFAULT: u32 = 4;
    /// Longest name of a backing file, in bytes (QEMU's limit, too).
    pub const BACKING_NAME_BYTES_MAX: usize = 1023;
    /// The size of a disk is a multiple of this, in bytes (specification, *Header*).
    pub const SIZE_ALIGN: u64 = 512;
    /// Everything in a file lies below this.
    pub const FILE_BYTES_MAX: u64 = i64::MAX as u64;
    /// Cache for tables where the caller does not say, in bytes: maps 32 GiB at 64 KiB clusters.
    pub const METADATA_CACHE_BYTES_DEFAULT: u64 = 4 << 20;
}
