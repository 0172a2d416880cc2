//! Making an empty image.
//!
//! # Layout
//! Header, refcount table, refcount blocks, L1 table, each at a cluster boundary and in this order. Nothing else, unless it is
//! preallocated: then all L2 tables follow, and a cluster for each of the disk's. With subclusters, those clusters are the
//! disk's and hold nothing yet, so that a backing shows through.
//!
//! # Order of writes
//! 1. The L1 table, the refcount table and the refcount blocks; where it is preallocated, data clusters (zeroes) and L2 tables.
//! 2. Sync.
//! 3. The header, in one write.
//! 4. Sync.
//!
//! So a storage that held no image holds none until all of it is stable. Costs: four writes and two syncs.

use bytes::Bytes;
use infill_base::{CreateError, Ctx, ErrorKind, IoError, IoResult, ZeroFlags};
use infill_node::BackingRef;
use infill_storage::StorageHandle;
use zerocopy::IntoBytes;

use crate::entry::{COPIED, refcount_set};
use crate::features::{Compatible, Compression, Incompatible, name_table};
use crate::format::limits::{
    BACKING_NAME_BYTES_MAX, CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, CLUSTER_BITS_MIN_EXTENDED, HEADER_BYTES_MAX,
    REFCOUNT_ORDER_MAX,
};
use crate::format::{MAGIC, RawHeader, SECTOR_BYTES, V2_HEADER_BYTES, V3_HEADER_BYTES, extension};
use crate::geometry::{Geometry, TABLE_ENTRY_BYTES};
use crate::header::{Extension, Header, Purpose, serialize_extensions, trim_names};
use crate::metaio;

/// The refcount table of a new image is made long enough for the whole disk, up to this many bytes: a longer one is
/// better grown when it is needed.
const REFCOUNT_TABLE_BYTES_INITIAL: u64 = 64 << 10;

/// Zeroes are written in pieces of this size, where they are.
const FULL_PIECE_BYTES: u64 = 1 << 20;

/// Longest name of a backing format, in bytes.
const BACKING_FORMAT_BYTES_MAX: usize = 64;

/// What a new image is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the disk in bytes, a multiple of 512.
    pub size: u64,
    /// The backing file as the header is to name it. It is not looked at.
    pub backing: Option<BackingRef>,
    /// Version of the format: 2 or 3 (QEMU's `compat` `0.10` and `1.1`).
    pub version: u32,
    /// Cluster size in bytes: a power of two from 512 to 2 MiB.
    pub cluster_bytes: u64,
    /// Width of a refcount in bits: a power of two from 1 to 64; 16 in version 2.
    pub refcount_bits: u32,
    /// Whether clusters have subclusters. Needs version 3 and clusters of at least 16 KiB.
    pub extended_l2: bool,
    /// How compressed clusters are to be compressed. Version 2 has only deflate.
    pub compression: Compression,
    /// Whether refcounts may be written late, under the dirty bit. Needs version 3.
    pub lazy_refcounts: bool,
    /// Which space is taken from the beginning. Over a backing only with subclusters.
    pub preallocation: Preallocation,
}

/// Which space a new image takes from the beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// That of its header and its empty tables.
    #[default]
    Off,
    /// All of its tables; data clusters have their places, in a file that may be sparse there.
    Metadata,
    /// That, and the storage has reserved the data clusters.
    Falloc,
    /// That, and zeroes were written to them.
    Full,
}

impl Default for CreateOptions {
    /// QEMU's defaults: version 3, clusters of 64 KiB, refcounts of 16 bits, no subclusters.
    fn default() -> Self {
        CreateOptions {
            size: 0,
            backing: None,
            version: 3,
            cluster_bytes: 64 << 10,
            refcount_bits: 16,
            extended_l2: false,
            compression: Compression::Deflate,
            lazy_refcounts: false,
            preallocation: Preallocation::Off,
        }
    }
}

/// Makes an empty image in `storage`, which is empty, or whose content is given up. Stable on return.
pub async fn create(cx: &Ctx, storage: &StorageHandle, options: &CreateOptions) -> Result<(), CreateError> {
    let geometry = options.geometry()?;
    let layout = Layout::new(&geometry, options.size, options.preallocation != Preallocation::Off);
    let area = header_area(options, &geometry, &layout)?;
    layout.reserve(cx, storage, &geometry).await?;
    layout.write(cx, storage, &geometry).await?;
    if layout.data_clusters > 0 {
        layout.preallocate(cx, storage, &geometry, options.preallocation).await?;
    }
    storage.sync(cx).await?;
    metaio::write(cx, storage, 0, Bytes::from(area)).await?;
    storage.sync(cx).await?;
    Ok(())
}

fn bad<T>(option: &'static str, why: impl Into<String>) -> Result<T, CreateError> {
    Err(CreateError::BadOption { option, why: why.into() })
}

impl CreateOptions {
    /// Checks every option but the backing file.
    fn geometry(&self) -> Result<Geometry, CreateError> {
        if !matches!(self.version, 2 | 3) {
            return bad("version", format!("{} is not possible; 2 and 3 are", self.version));
        }
        let (least, most) = (1 << CLUSTER_BITS_MIN, 1 << CLUSTER_BITS_MAX);
        if !self.cluster_bytes.is_power_of_two() || !(least..=most).contains(&self.cluster_bytes) {
            return bad(
                "cluster_size",
                format!("{} is not possible; powers of two from {least} to {most} are", self.cluster_bytes),
            );
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 1 << REFCOUNT_ORDER_MAX {
            return bad(
                "refcount_bits",
                format!("{} is not possible; powers of two from 1 to 64 are", self.refcount_bits),
            );
        }
        if self.version < 3 {
            let needs = |what: &str| format!("{what}, version 3 is needed (compat=1.1 in QEMU's words)");
            if self.refcount_bits != 16 {
                let why = format!("version 2 has refcounts of 16 bits; for {}", self.refcount_bits);
                return bad("refcount_bits", needs(&why));
            }
            if self.extended_l2 {
                return bad("extended_l2", needs("for subclusters"));
            }
            if self.compression != Compression::Deflate {
                let why = format!("version 2 has only zlib; for {}", self.compression.name());
                return bad("compression_type", needs(&why));
            }
            if self.lazy_refcounts {
                return bad("lazy_refcounts", needs("for lazy refcounts"));
            }
        }
        let cluster_bits = self.cluster_bytes.trailing_zeros();
        if self.extended_l2 && cluster_bits < CLUSTER_BITS_MIN_EXTENDED {
            return bad(
                "extended_l2",
                format!(
                    "subclusters need a cluster size of at least {} bytes, this one is {}",
                    1 << CLUSTER_BITS_MIN_EXTENDED,
                    self.cluster_bytes
                ),
            );
        }
        let order = self.refcount_bits.trailing_zeros();
        let geometry = Geometry::new(self.version, cluster_bits, order, self.extended_l2)
            .or_else(|why| bad("cluster_size", why))?;
        if !self.size.is_multiple_of(SECTOR_BYTES as u64) {
            return bad("size", format!("{} is not possible; multiples of {SECTOR_BYTES} are", self.size));
        }
        if self.preallocation != Preallocation::Off && self.backing.is_some() && !self.extended_l2 {
            return bad("preallocation", "clusters that are taken hide a backing file; subclusters do not");
        }
        let most = geometry.max_virtual_size();
        if self.size > most {
            return bad(
                "size",
                format!(
                    "{} bytes are more than the {most} that clusters of {} bytes allow; larger clusters allow more",
                    self.size, self.cluster_bytes
                ),
            );
        }
        Ok(geometry)
    }

    fn incompatible(&self) -> Incompatible {
        let mut bits = Incompatible::empty();
        bits.set(Incompatible::EXTENDED_L2, self.extended_l2);
        bits.set(Incompatible::COMPRESSION, self.compression != Compression::Deflate);
        bits
    }
}

/// Which clusters hold what; they follow each other from cluster 0, the header's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    table_clusters: u64,
    blocks: u64,
    l1_entries: u64,
    l1_clusters: u64,
    /// Where it is preallocated: L2 tables, each a cluster, and clusters of the disk.
    l2_tables: u64,
    data_clusters: u64,
}

impl Layout {
    fn new(geometry: &Geometry, size: u64, preallocated: bool) -> Layout {
        let cluster = geometry.cluster_bytes();
        let l1_entries = geometry.l1_entries_for(size);
        let l1_clusters = (l1_entries * TABLE_ENTRY_BYTES).div_ceil(cluster);
        let per_block = geometry.refcounts_per_block();
        // Entries for the whole disk, as far as that is not too long a table.
        let wanted = (size.div_ceil(cluster) + l1_clusters).div_ceil(per_block) * TABLE_ENTRY_BYTES;
        let wanted_clusters = wanted.min(REFCOUNT_TABLE_BYTES_INITIAL).div_ceil(cluster).max(1);
        let data_clusters = if preallocated { size.div_ceil(cluster) } else { 0 };
        let l2_tables = data_clusters.div_ceil(u64::from(geometry.l2_entries()));
        let table_clusters = wanted_clusters;
        let mut layout =
            Layout { table_clusters, blocks: 1, l1_entries, l1_clusters, l2_tables, data_clusters };
        // Blocks count themselves and the table, so one more can ask for another.
        loop {
            let blocks = layout.clusters().div_ceil(per_block);
            let table_clusters = (blocks * TABLE_ENTRY_BYTES).div_ceil(cluster).max(layout.table_clusters);
            if (blocks, table_clusters) == (layout.blocks, layout.table_clusters) {
                return layout;
            }
            layout = Layout { blocks, table_clusters, ..layout };
        }
    }

    fn clusters(&self) -> u64 {
        self.first_data() + self.data_clusters
    }

    fn first_l2(&self) -> u64 {
        self.first_l1() + self.l1_clusters
    }

    fn first_data(&self) -> u64 {
        self.first_l2() + self.l2_tables
    }

    fn first_block(&self) -> u64 {
        1 + self.table_clusters
    }

    fn first_l1(&self) -> u64 {
        self.first_block() + self.blocks
    }

    /// Makes the storage long enough, if it is not.
    async fn reserve(&self, cx: &Ctx, storage: &StorageHandle, geometry: &Geometry) -> IoResult<()> {
        let end = self.clusters() * geometry.cluster_bytes();
        let len = storage.len();
        if len >= end {
            return Ok(());
        }
        storage.set_len(cx, end).await.map_err(|error| match error.kind() {
            ErrorKind::Unsupported => IoError::new(
                ErrorKind::NoSpace,
                format!("the storage has {len} bytes and cannot grow; an empty image takes {end}"),
            )
            .in_node(storage.name()),
            _ => error,
        })
    }

    /// Writes everything but the header.
    async fn write(&self, cx: &Ctx, storage: &StorageHandle, geometry: &Geometry) -> IoResult<()> {
        let cluster = geometry.cluster_bytes();
        write_zeroes(cx, storage, self.first_l1() * cluster, self.l1_clusters * cluster).await?;

        let mut table = vec![0; (self.table_clusters * cluster) as usize];
        for nth in 0..self.blocks {
            let entry = ((self.first_block() + nth) * cluster).to_be_bytes();
            table[(nth * TABLE_ENTRY_BYTES) as usize..][..8].copy_from_slice(&entry);
        }
        metaio::write(cx, storage, cluster, Bytes::from(table)).await?;

        let per_block = geometry.refcounts_per_block();
        for nth in 0..self.blocks {
            let mut block = vec![0; cluster as usize];
            let counted = (self.clusters() - nth * per_block).min(per_block);
            (0..counted).for_each(|index| refcount_set(&mut block, index, 1, geometry));
            let at = (self.first_block() + nth) * cluster;
            metaio::write(cx, storage, at, Bytes::from(block)).await?;
        }
        Ok(())
    }
}

impl Layout {
    /// Gives the disk's clusters their places: zeroes there first, whatever the storage held, and then the tables that name them.
    async fn preallocate(
        &self,
        cx: &Ctx,
        storage: &StorageHandle,
        geometry: &Geometry,
        how: Preallocation,
    ) -> IoResult<()> {
        let cluster = geometry.cluster_bytes();
        let (at, len) = (self.first_data() * cluster, self.data_clusters * cluster);
        if how == Preallocation::Full {
            let mut done = 0;
            while done < len {
                let piece = (len - done).min(FULL_PIECE_BYTES);
                metaio::write(cx, storage, at + done, infill_base::zero_bytes(piece as usize)).await?;
                done += piece;
            }
        } else {
            write_zeroes(cx, storage, at, len).await?;
        }
        if how == Preallocation::Falloc {
            storage.allocate(cx, at, len).await?;
        }
        let per_table = u64::from(geometry.l2_entries());
        let entry_len = geometry.l2_entry_bytes() as usize;
        for table in 0..self.l2_tables {
            let first = table * per_table;
            let mut bytes = vec![0; cluster as usize];
            let clusters = first..self.data_clusters.min(first + per_table);
            for (entry, nth) in bytes.chunks_exact_mut(entry_len).zip(clusters) {
                // Behind it, with subclusters, zeroes: none of them holds anything yet.
                entry[..8].copy_from_slice(&owned((self.first_data() + nth) * cluster));
            }
            metaio::write(cx, storage, (self.first_l2() + table) * cluster, Bytes::from(bytes)).await?;
        }
        let tables = (0..self.l2_tables).flat_map(|nth| owned((self.first_l2() + nth) * cluster));
        let mut l1: Vec<u8> = tables.collect();
        l1.resize((self.l1_clusters * cluster) as usize, 0);
        metaio::write(cx, storage, self.first_l1() * cluster, Bytes::from(l1)).await
    }
}

/// An entry that names a cluster which nobody else uses.
fn owned(at: u64) -> [u8; 8] {
    (at | COPIED).to_be_bytes()
}

/// Zeroes `len` bytes from `at`, both multiples of the cluster size.
async fn write_zeroes(cx: &Ctx, storage: &StorageHandle, at: u64, len: u64) -> IoResult<()> {
    let limits = storage.limits();
    let align = u64::from(limits.request_align.max(1));
    if !at.is_multiple_of(align) || !len.is_multiple_of(align) {
        // Clusters smaller than the storage's blocks: little, and around it lies what is written by this function.
        return metaio::write(cx, storage, at, Bytes::from(vec![0; len as usize])).await;
    }
    let most = infill_base::align_down(limits.max_transfer.max(align), align);
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(most);
        storage.write_zeroes(cx, at + done, piece, ZeroFlags::MAY_UNMAP).await?;
        done += piece;
    }
    Ok(())
}

/// The header, its extensions and the backing file's name: the beginning of the first cluster, which is zero behind.
fn header_area(
    options: &CreateOptions,
    geometry: &Geometry,
    layout: &Layout,
) -> Result<Vec<u8>, CreateError> {
    let v3 = options.version >= 3;
    let header_len = if v3 { V3_HEADER_BYTES } else { V2_HEADER_BYTES };
    let area_len = (geometry.cluster_bytes() as usize).min(HEADER_BYTES_MAX);
    let name = options.backing.as_ref().map_or("", |backing| &backing.filename);
    if let Some(backing) = &options.backing {
        check_backing(backing)?;
    }

    let mut extensions = Vec::new();
    if let Some(format) = options.backing.as_ref().and_then(|backing| backing.format.as_ref()) {
        extensions.push(Extension { kind: extension::BACKING_FORMAT, data: format.as_bytes().to_vec() });
    }
    if v3 {
        extensions.push(Extension { kind: extension::FEATURE_NAMES, data: name_table() });
        // The names inform and no more: they give way to the backing file's.
        trim_names(&mut extensions, area_len.saturating_sub(header_len + name.len()));
    }
    let tail = serialize_extensions(&extensions);
    let name_at = header_len + tail.len();
    if name_at + name.len() > area_len {
        return bad(
            "backing_file",
            format!(
                "the name has {} bytes, there is room for {} in a cluster of {} bytes; larger clusters have more",
                name.len(),
                area_len.saturating_sub(name_at),
                geometry.cluster_bytes()
            ),
        );
    }
    let raw = raw_header(options, geometry, layout, if name.is_empty() { 0 } else { name_at });
    let mut area = vec![0; area_len];
    area[..header_len].copy_from_slice(&raw.as_bytes()[..header_len]);
    area[header_len..name_at].copy_from_slice(&tail);
    area[name_at..name_at + name.len()].copy_from_slice(name.as_bytes());
    // The gate of opening, so that what cannot be opened is not made.
    let end = layout.clusters() * geometry.cluster_bytes();
    if let Err(error) = Header::parse(&area, end, Purpose::Use) {
        return bad("size", format!("these options would make an image that does not open: {error}"));
    }
    Ok(area)
}

fn check_backing(backing: &BackingRef) -> Result<(), CreateError> {
    let name = &backing.filename;
    if name.is_empty() || name.len() > BACKING_NAME_BYTES_MAX || name.contains('\0') {
        return bad(
            "backing_file",
            format!(
                "a name of 1 to {BACKING_NAME_BYTES_MAX} bytes without zero bytes is possible, this one has {}",
                name.len()
            ),
        );
    }
    let format = backing.format.as_deref().unwrap_or("raw");
    if format.is_empty() || format.len() > BACKING_FORMAT_BYTES_MAX || format.contains('\0') {
        return bad(
            "backing_fmt",
            format!(
                "the name of a format of 1 to {BACKING_FORMAT_BYTES_MAX} bytes is possible (raw, qcow2, …), this one \
                 has {}",
                format.len()
            ),
        );
    }
    Ok(())
}

fn raw_header(options: &CreateOptions, geometry: &Geometry, layout: &Layout, name_at: usize) -> RawHeader {
    let cluster = geometry.cluster_bytes();
    let compatible = if options.lazy_refcounts { Compatible::LAZY_REFCOUNTS } else { Compatible::empty() };
    let name_len = options.backing.as_ref().map_or(0, |backing| backing.filename.len());
    RawHeader {
        magic: MAGIC.into(),
        version: options.version.into(),
        backing_file_offset: (name_at as u64).into(),
        backing_file_size: (name_len as u32).into(),
        cluster_bits: geometry.cluster_bits().into(),
        size: options.size.into(),
        crypt_method: 0.into(),
        l1_size: (layout.l1_entries as u32).into(),
        l1_table_offset: (if layout.l1_clusters == 0 { 0 } else { layout.first_l1() * cluster }).into(),
        refcount_table_offset: cluster.into(),
        refcount_table_clusters: (layout.table_clusters as u32).into(),
        nb_snapshots: 0.into(),
        snapshots_offset: 0.into(),
        incompatible_features: options.incompatible().bits().into(),
        compatible_features: compatible.bits().into(),
        autoclear_features: 0.into(),
        refcount_order: geometry.refcount_order().into(),
        header_length: (V3_HEADER_BYTES as u32).into(),
        compression_type: options.compression.code(),
        padding: [0; 7],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metadata_cluster_is_counted_at_every_size() {
        for bits in CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX {
            for order in 0..=REFCOUNT_ORDER_MAX {
                let geometry = Geometry::new(3, bits, order, false).unwrap();
                for size in [0, 512, 1 << 20, 100 << 30, geometry.max_virtual_size()] {
                    let size = size.min(geometry.max_virtual_size());
                    let layout = Layout::new(&geometry, size, size <= 1 << 20);
                    assert!(layout.blocks * geometry.refcounts_per_block() >= layout.clusters());
                    assert!(layout.table_clusters << bits >= layout.blocks * TABLE_ENTRY_BYTES);
                    assert!((layout.blocks - 1) * geometry.refcounts_per_block() < layout.clusters());
                }
            }
        }
    }
}
