//! The bytes of a qcow2 image, as they lie in the file: big-endian structures and constants, without meaning.
//!
//! Nothing here is validated; [`crate::Header`] and the entry views make validated values of it. All structures are
//! free of padding and of alignment, so any byte slice of the right length can be read as one.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First four bytes of every image: `QFI` and 0xfb.
pub(crate) const MAGIC: u32 = 0x5146_49fb;

/// Bytes that a device writes whole or not at all; a header change is one write of the first of them.
pub(crate) const SECTOR_BYTES: usize = 512;

/// Length of a version 2 header, in bytes.
pub(crate) const V2_HEADER_BYTES: usize = 72;
/// Least length of a version 3 header, in bytes.
pub(crate) const V3_HEADER_BYTES_MIN: usize = 104;
/// Length of the version 3 header that we write, with the compression type, in bytes.
pub(crate) const V3_HEADER_BYTES: usize = 112;

/// The header's fields, those of version 3 included. In a version 2 image the bytes from 72 on mean something else.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub magic: U32,
    pub version: U32,
    pub backing_file_offset: U64,
    pub backing_file_size: U32,
    pub cluster_bits: U32,
    pub size: U64,
    pub crypt_method: U32,
    pub l1_size: U32,
    pub l1_table_offset: U64,
    pub refcount_table_offset: U64,
    pub refcount_table_clusters: U32,
    pub nb_snapshots: U32,
    pub snapshots_offset: U64,
    pub incompatible_features: U64,
    pub compatible_features: U64,
    pub autoclear_features: U64,
    pub refcount_order: U32,
    pub header_length: U32,
    pub compression_type: u8,
    pub padding: [u8; 7],
}
const _: () = assert!(size_of::<RawHeader>() == V3_HEADER_BYTES);

/// What precedes the data of each header extension.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawExtension {
    pub kind: U32,
    pub len: U32,
}
const _: () = assert!(size_of::<RawExtension>() == 8);

/// Kinds of header extensions.
pub(crate) mod extension {
    /// End of the extension area.
    pub(crate) const END: u32 = 0;
    /// Name of the backing file's format.
    pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
    /// Names of feature bits.
    pub(crate) const FEATURE_NAMES: u32 = 0x6803_f857;
    /// Where the bitmap directory lies.
    pub(crate) const BITMAPS: u32 = 0x2385_2875;
    /// Where the LUKS header lies.
    pub(crate) const ENCRYPTION: u32 = 0x0537_be77;
    /// Name of the external data file.
    pub(crate) const DATA_FILE: u32 = 0x4441_5441;
}

/// One entry of the feature name table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawFeatureName {
    /// 0 incompatible, 1 compatible, 2 autoclear.
    pub kind: u8,
    pub bit: u8,
    pub name: [u8; 46],
}
const _: () = assert!(size_of::<RawFeatureName>() == 48);

/// Data of the bitmaps extension.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawBitmapsExtension {
    pub nb_bitmaps: U32,
    pub reserved: U32,
    pub directory_size: U64,
    pub directory_offset: U64,
}
const _: () = assert!(size_of::<RawBitmapsExtension>() == 24);

/// Fixed part of an entry of the bitmap directory.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawBitmapEntry {
    pub table_offset: U64,
    pub table_size: U32,
    pub flags: U32,
    pub kind: u8,
    pub granularity_bits: u8,
    pub name_size: U16,
    pub extra_data_size: U32,
}
const _: () = assert!(size_of::<RawBitmapEntry>() == 24);

/// Fixed part of an entry of the snapshot table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawSnapshot {
    pub l1_table_offset: U64,
    pub l1_size: U32,
    pub id_size: U16,
    pub name_size: U16,
    pub date_sec: U32,
    pub date_nsec: U32,
    pub vm_clock_nsec: U64,
    pub vm_state_size: U32,
    pub extra_data_size: U32,
}
const _: () = assert!(size_of::<RawSnapshot>() == 40);

/// Longest extra data of a snapshot, in bytes (QEMU's limit, too).
pub(crate) const SNAPSHOT_EXTRA_BYTES_MAX: u32 = 1024;

/// Limits on what an image may ask for. Where QEMU has the same limit, so that no image is accepted by one only.
pub mod limits {
    /// Least cluster size, as a power of two of bytes.
    pub const CLUSTER_BITS_MIN: u32 = 9;
    /// Largest cluster size, as a power of two of bytes (QEMU's limit, too).
    pub const CLUSTER_BITS_MAX: u32 = 21;
    /// Least cluster size with extended L2 entries, as a power of two of bytes.
    pub const CLUSTER_BITS_MIN_EXTENDED: u32 = 14;
    /// Largest refcount width, as a power of two of bits.
    pub const REFCOUNT_ORDER_MAX: u32 = 6;
    /// Longest name of a backing file, in bytes.
    pub const BACKING_NAME_BYTES_MAX: usize = 1023;
    /// Longest active L1 table, in bytes (QEMU's limit, too).
    pub const L1_BYTES_MAX: u64 = 32 << 20;
    /// Longest refcount table, in bytes (QEMU's limit, too).
    pub const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
    /// How much of the first cluster is read for header, extensions and name of the backing file, in bytes.
    pub const HEADER_BYTES_MAX: usize = 64 << 10;
    /// Most internal snapshots of an image (QEMU's limit, too).
    pub const SNAPSHOTS_MAX: u32 = 65536;
    /// Longest snapshot table, in bytes.
    pub const SNAPSHOT_TABLE_BYTES_MAX: u64 = 64 << 20;
    /// Most persistent bitmaps of an image (QEMU's limit, too).
    pub const BITMAPS_MAX: u32 = 65535;
    /// Longest bitmap directory, in bytes.
    pub const BITMAP_DIRECTORY_BYTES_MAX: u64 = 64 << 20;
    /// Tables of all bitmaps together, in bytes (QEMU's limit for one).
    pub const BITMAP_TABLE_BYTES_MAX: u64 = 32 << 20;
    /// Bits of all bitmaps together that are read, and of one that is stored, in bytes (QEMU's limit for one).
    pub const BITMAP_BYTES_MAX: u64 = 512 << 20;
    /// Host offsets of clusters and tables lie below this.
    pub const HOST_OFFSET_END: u64 = 1 << 56;
}
