//! The header: parsed into a validated type, and changed one sector at a time.
//!
//! * [`Header::parse`] is the open gate: unknown incompatible features, impossible sizes and misplaced tables are
//!   refused. Header bytes that are not understood are kept: a change patches the bytes of its own fields only.
//! * A change is one write of the first sector, which a device writes whole or not at all. A name of a backing file
//!   that does not fit there is written before, to where nothing that the old header names lies.
//!
//! Costs: one or two small reads at open. Never writes by itself.

use bitflags::bitflags;
use bytes::Bytes;
use infill_base::{Ctx, ErrorKind, IoError, IoResult, OpenError};
use infill_node::BackingRef;
use infill_storage::{StorageHandle, unaligned};
use zerocopy::FromBytes;

use crate::format::limits::{BACKING_NAME_BYTES_MAX, FILE_BYTES_MAX};
use crate::format::{HEADER_BYTES, MAGIC, RawHeader, SECTOR_BYTES};
use crate::geometry::{Geometry, HostOffset, Layout};

/// Name of the format in errors and in `info`.
pub(crate) const FORMAT: &str = "qed";

bitflags! {
    /// Features without which an image cannot be used. Unknown bits are never held in this type.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Features: u64 {
        /// It has a backing file.
        const BACKING_FILE = 1;
        /// It was not closed cleanly: it is checked and repaired before it is written.
        const NEED_CHECK = 1 << 1;
        /// The backing file is raw, whatever it looks like.
        const BACKING_FORMAT_NO_PROBE = 1 << 2;
    }
}

/// Autoclear feature: Infill's volatile journal belongs to exactly this state of the image. Far from the bits that the
/// format hands out in ascending order.
pub const VOLATILE_JOURNAL: u64 = 1 << 62;

/// A header that breaks the format's rules.
pub(crate) fn malformed(what: impl Into<String>) -> OpenError {
    OpenError::Malformed { format: FORMAT, what: what.into() }
}

/// Whether the first bytes of a file are those of a QED image.
pub fn probe(first_bytes: &[u8]) -> bool {
    first_bytes.starts_with(&MAGIC)
}

/// Where the name of the backing file stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct NamePlace {
    at: u64,
    len: usize,
}

/// A header that passed every gate.
#[derive(Clone, Debug)]
pub struct Header {
    /// The first sector, byte for byte: what changes are made to.
    sector: [u8; SECTOR_BYTES],
    layout: Layout,
    size: u64,
    features: Features,
    autoclear: u64,
    backing: Option<(NamePlace, String)>,
}

impl Header {
    /// Reads and parses the header of the image in `storage`.
    pub async fn read(cx: &Ctx, storage: &StorageHandle) -> Result<Header, OpenError> {
        let mut sector = [0; SECTOR_BYTES];
        sector.copy_from_slice(&unaligned::read(cx, storage, 0, SECTOR_BYTES).await?);
        let (mut header, place) = Header::parse(&sector, storage.len())?;
        if let Some(place) = place {
            let name = unaligned::read(cx, storage, place.at, place.len).await?;
            header.backing = Some((place, backing_name(&name)?));
        }
        Ok(header)
    }

    /// Parses the first sector of a file of `file_len` bytes; says where the backing file's name is to be read.
    fn parse(sector: &[u8; SECTOR_BYTES], file_len: u64) -> Result<(Header, Option<NamePlace>), OpenError> {
        let not_this = |found: String| OpenError::NotThisFormat { format: FORMAT, found };
        if !probe(sector) {
            return Err(not_this("the file does not begin with the bytes 51 45 44 00".into()));
        }
        if file_len < HEADER_BYTES as u64 {
            return Err(malformed(format!(
                "the file ends after {file_len} bytes, its header has {HEADER_BYTES}"
            )));
        }
        if file_len > FILE_BYTES_MAX {
            return Err(malformed(format!(
                "the file has {file_len} bytes, at most {FILE_BYTES_MAX} are possible"
            )));
        }
        let (raw, _) = RawHeader::read_from_prefix(sector.as_slice())
            .map_err(|_| malformed("the first sector holds no header"))?;
        let features = accept_features(raw.features.get())?;
        let geometry =
            Geometry::new(raw.cluster_size.get().into(), raw.table_size.get()).map_err(malformed)?;
        let size = raw.image_size.get();
        geometry.check_size(size).map_err(malformed)?;
        let layout = layout(&raw, geometry, file_len)?;
        let place = name_place(&raw, features, layout.header_end)?;
        let autoclear = raw.autoclear_features.get();
        Ok((Header { sector: *sector, layout, size, features, autoclear, backing: None }, place))
    }

    /// A new image's header, with its L1 table directly behind its one cluster, and no backing file yet.
    pub(crate) fn new(geometry: Geometry, size: u64) -> Header {
        let layout = Layout {
            geometry,
            header_end: geometry.cluster_bytes(),
            l1: HostOffset(geometry.cluster_bytes()),
        };
        let mut header = Header {
            sector: [0; SECTOR_BYTES],
            layout,
            size,
            features: Features::empty(),
            autoclear: 0,
            backing: None,
        };
        header.put(0, &MAGIC);
        header.put(4, &(geometry.cluster_bytes() as u32).to_le_bytes());
        header.put(8, &geometry.table_clusters().to_le_bytes());
        header.put(12, &1_u32.to_le_bytes());
        header.put(40, &layout.l1.0.to_le_bytes());
        header.put(48, &size.to_le_bytes());
        header
    }

    /// Where the image's fixed parts lie.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Its features.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Feature bits that whoever writes clears first, but for those that it keeps true.
    pub fn autoclear(&self) -> u64 {
        self.autoclear
    }

    /// The backing file as the header names it. Its format is told where it must not be probed.
    pub fn backing(&self) -> Option<BackingRef> {
        let raw = self.features.contains(Features::BACKING_FORMAT_NO_PROBE);
        let (_, name) = self.backing.as_ref()?;
        Some(BackingRef { filename: name.clone(), format: raw.then(|| "raw".into()) })
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.sector[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put_features(&mut self, features: Features) {
        self.features = features;
        self.put(16, &features.bits().to_le_bytes());
    }

    /// The header with the mark *need check* set or cleared.
    pub(crate) fn with_need_check(&self, set: bool) -> Header {
        let mut next = self.clone();
        let mut features = self.features;
        features.set(Features::NEED_CHECK, set);
        next.put_features(features);
        next
    }

    /// The header with these autoclear features and no others.
    pub(crate) fn with_autoclear(&self, bits: u64) -> Header {
        let mut next = self.clone();
        next.autoclear = bits;
        next.put(32, &bits.to_le_bytes());
        next
    }

    /// The header of a disk of another size, which [`Geometry::check_size`] accepts.
    pub(crate) fn with_size(&self, size: u64) -> Header {
        let mut next = self.clone();
        next.size = size;
        next.put(48, &size.to_le_bytes());
        next
    }

    /// The header that names `backing`, and bytes that have to be stable at their place in the file before it is
    /// written.
    pub(crate) fn with_backing(
        &self,
        backing: Option<&BackingRef>,
    ) -> Result<(Header, Option<(u64, Bytes)>), IoError> {
        let mut next = self.clone();
        let mut features = self.features - Features::BACKING_FILE - Features::BACKING_FORMAT_NO_PROBE;
        let Some(backing) = backing else {
            next.backing = None;
            next.put_features(features);
            next.put(56, &[0; 8]);
            return Ok((next, None));
        };
        let name = backing.filename.as_bytes();
        if name.is_empty() || name.len() > BACKING_NAME_BYTES_MAX || name.contains(&0) {
            let why = format!(
                "a backing file name has 1 to {BACKING_NAME_BYTES_MAX} bytes and no zero byte, this one has {} bytes",
                name.len()
            );
            return Err(IoError::new(ErrorKind::InvalidInput, why));
        }
        let place = NamePlace { at: self.free_place(name.len())?, len: name.len() };
        let before = if place.at < SECTOR_BYTES as u64 {
            next.put(place.at as usize, name);
            None
        } else {
            let mut sectors = name.to_vec();
            sectors.resize(name.len().next_multiple_of(SECTOR_BYTES), 0);
            Some((place.at, sectors.into()))
        };
        features |= Features::BACKING_FILE;
        features.set(Features::BACKING_FORMAT_NO_PROBE, backing.format.as_deref() == Some("raw"));
        next.put_features(features);
        next.put(56, &(place.at as u32).to_le_bytes());
        next.put(60, &(place.len as u32).to_le_bytes());
        next.backing = Some((place, backing.filename.clone()));
        Ok((next, before))
    }

    /// Where a name of `len` bytes can be written without touching what the header names now: behind the fields in
    /// the first sector, with which it is written whole, or in other sectors than the old name.
    fn free_place(&self, len: usize) -> Result<u64, IoError> {
        if HEADER_BYTES + len <= SECTOR_BYTES {
            return Ok(HEADER_BYTES as u64);
        }
        let sector = SECTOR_BYTES as u64;
        let needed = (len as u64).next_multiple_of(sector);
        let mut candidates = vec![sector];
        if let Some((old, _)) = &self.backing {
            candidates.push((old.at + old.len as u64).next_multiple_of(sector).max(sector));
        }
        let free = candidates.into_iter().find(|at| {
            let end = at + needed;
            let apart = |(old, _): &(NamePlace, String)| end <= old.at || old.at + old.len as u64 <= *at;
            end <= self.layout.header_end && self.backing.as_ref().is_none_or(apart)
        });
        free.ok_or_else(|| {
            let why = "the header has no room for another backing file name; make the name shorter";
            IoError::new(ErrorKind::Unsupported, why)
        })
    }

    /// Writes the first sector, in one write. The caller has synced what it relies on, and syncs afterwards.
    pub(crate) async fn store(&self, cx: &Ctx, storage: &StorageHandle) -> IoResult<()> {
        unaligned::write(cx, storage, 0, Bytes::copy_from_slice(&self.sector)).await
    }
}

/// The features, all of which are known.
fn accept_features(bits: u64) -> Result<Features, OpenError> {
    Features::from_bits(bits).ok_or_else(|| {
        let unknown: Vec<String> = (0..64)
            .filter(|bit| (bits & !Features::all().bits()) >> bit & 1 == 1)
            .map(|bit| bit.to_string())
            .collect();
        OpenError::Unsupported {
            format: FORMAT,
            feature: format!("incompatible feature bit {}", unknown.join(", ")),
            advice: "open it with the program that made it".into(),
        }
    })
}

/// Where the fixed parts lie, if they lie where they may.
fn layout(raw: &RawHeader, geometry: Geometry, file_len: u64) -> Result<Layout, OpenError> {
    let clusters = u64::from(raw.header_size.get());
    // The bound keeps every offset in the header a number of 32 bits, as QEMU does.
    let header_end = clusters.checked_mul(geometry.cluster_bytes()).filter(|end| *end <= u32::MAX.into());
    let header_end = header_end.filter(|end| *end > 0).ok_or_else(|| {
        malformed(format!("the header has {clusters} clusters, must have at least 1 and less than 4 GiB"))
    })?;
    let layout = Layout { geometry, header_end, l1: HostOffset(raw.l1_table_offset.get()) };
    if !layout.is_inside(layout.l1, geometry.table_clusters(), geometry.align_down(file_len)) {
        return Err(malformed(format!(
            "the L1 table lies at byte {}, must be a multiple of the cluster size {}, behind the header of \
             {header_end} bytes, and end before the file's end at {file_len}",
            layout.l1.0,
            geometry.cluster_bytes()
        )));
    }
    Ok(layout)
}

/// Where the name of the backing file stands, if there is one.
fn name_place(raw: &RawHeader, features: Features, header_end: u64) -> Result<Option<NamePlace>, OpenError> {
    if !features.contains(Features::BACKING_FILE) {
        return Ok(None);
    }
    let (at, len) = (raw.backing_filename_offset.get(), raw.backing_filename_size.get());
    if len == 0 || len as usize > BACKING_NAME_BYTES_MAX {
        return Err(malformed(format!(
            "the backing file name has {len} bytes, must have 1 to {BACKING_NAME_BYTES_MAX}"
        )));
    }
    if (at as usize) < HEADER_BYTES || u64::from(at) + u64::from(len) > header_end {
        return Err(malformed(format!(
            "the backing file name at byte {at} ({len} bytes) is not between the header's fields and its end at byte \
             {header_end}"
        )));
    }
    Ok(Some(NamePlace { at: at.into(), len: len as usize }))
}

fn backing_name(bytes: &[u8]) -> Result<String, OpenError> {
    let name = str::from_utf8(bytes)
        .map_err(|_| malformed("the backing file name is not UTF-8; rebase the image onto a name that is"))?;
    if name.contains('\0') {
        return Err(malformed("the backing file name has a zero byte in it"));
    }
    Ok(name.into())
}

#[cfg(test)]
mod tests;
