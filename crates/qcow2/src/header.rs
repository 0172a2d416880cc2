//! The header: parsed into a validated type, and changed one sector at a time.
//!
//! * [`Header::parse`] is the open gate for everything that the header and its extensions say: encryption, external
//!   data files, unknown incompatible features, the mark of a disk that moved away, absurd or misplaced tables. What
//!   comes out may be read from; [`Header::writable`] is the gate for writing.
//! * Header bytes that are not understood are kept: a change patches the bytes of its own fields only.
//! * A change ([`Header::changed`]) is one write of the first sector. Where more has to change (a new backing file
//!   name, another list of bitmaps), [`HeaderRewrite`] first fills bytes that nothing names, to be synced before that one write.
//!
//! Costs: one read of at most 64 KiB at open. Never writes by itself.

use bytes::Bytes;
use infill_base::{Ctx, ErrorKind, IoError, IoResult, OpenError};
use infill_node::BackingRef;
use infill_storage::StorageHandle;
use zerocopy::{FromBytes, IntoBytes};

use crate::features::{Autoclear, Compatible, Compression, Incompatible, accept_incompatible, moved};
use crate::format::limits::{
    BACKING_NAME_BYTES_MAX, HEADER_BYTES_MAX, HOST_OFFSET_END, L1_BYTES_MAX, REFCOUNT_TABLE_BYTES_MAX,
    SNAPSHOTS_MAX,
};
use crate::format::{
    MAGIC, RawBitmapsExtension, RawExtension, RawHeader, SECTOR_BYTES, V2_HEADER_BYTES, V3_HEADER_BYTES,
    V3_HEADER_BYTES_MIN, extension,
};
use crate::geometry::{Geometry, HostOffset, TABLE_ENTRY_BYTES};
use crate::metaio;

mod rewrite;

pub use rewrite::HeaderRewrite;
pub(crate) use rewrite::trim_names;

/// Name of the format in errors and in `info`.
pub(crate) const FORMAT: &str = "qcow2";

/// A header that breaks the format's rules.
pub(crate) fn malformed(what: impl Into<String>) -> OpenError {
    OpenError::Malformed { format: FORMAT, what: what.into() }
}

/// Whether the first bytes of a file are those of a qcow2 image, of whatever version.
pub fn probe(first_sector: &[u8]) -> bool {
    first_sector.len() >= 8 && first_sector[..4] == MAGIC.to_be_bytes()
}

/// A contiguous table in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct TableRef {
    /// Its first byte, at a cluster boundary.
    pub at: HostOffset,
    /// How many it has: entries of 8 bytes of an L1 table, clusters of the refcount table, snapshots.
    pub count: u32,
}

/// The name of the backing file, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
struct BackingName {
    at: usize,
    name: String,
}

/// One header extension, kept as found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Its type.
    pub kind: u32,
    /// Its data, without padding.
    pub data: Vec<u8>,
}

/// Where the persistent bitmaps are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapDirectory {
    /// First byte of the directory.
    pub at: HostOffset,
    /// Its length in bytes.
    pub len: u64,
    /// How many bitmaps it lists.
    pub count: u32,
}

/// Who reads the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The image is to be used: every table must lie where it can be read.
    Use,
    /// The same, whatever host owns the disk: an image that moved away may be looked at.
    UseMoved,
    /// The image is to be checked, whatever host owns the disk: refcounts need not be there, for they are rebuilt.
    Check,
}

/// Whether an image may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteGate {
    /// At once.
    Ready,
    /// After its refcounts were rebuilt: it is marked dirty. `check` with [`infill_node::Repair::All`] does it and clears the
    /// mark; only then is anything allocated.
    RepairFirst,
}

/// A header that passed every gate for reading.
#[derive(Clone, Debug)]
pub struct Header {
    /// The first sector, byte for byte: what changes are made to.
    sector: [u8; SECTOR_BYTES],
    /// What of the first cluster was read at open: the extensions and the name of the backing file lie in it.
    area: Vec<u8>,
    version: u32,
    geometry: Geometry,
    size: u64,
    l1: TableRef,
    refcount_table: TableRef,
    snapshots: TableRef,
    incompatible: Incompatible,
    compatible: Compatible,
    autoclear: Autoclear,
    compression: Compression,
    header_length: usize,
    backing: Option<BackingName>,
    extensions: Vec<Extension>,
}

impl Header {
    /// Reads and parses the header of the image in `storage`.
    pub async fn read(cx: &Ctx, storage: &StorageHandle, purpose: Purpose) -> Result<Header, OpenError> {
        let len = storage.len();
        let first = metaio::read(cx, storage, 0, HEADER_BYTES_MAX.min(len as usize)).await?;
        Header::parse(&first, len, purpose)
    }

    /// Parses `first`, the beginning of a file of `file_len` bytes: its first 64 KiB, or all of it.
    pub fn parse(first: &[u8], file_len: u64, purpose: Purpose) -> Result<Header, OpenError> {
        let (raw, version) = raw_header(first)?;
        let header_length = header_length(&raw, version)?;
        let incompatible_bits = if version >= 3 { raw.incompatible_features.get() } else { 0 };
        let extended = incompatible_bits & Incompatible::EXTENDED_L2.bits() != 0;
        let refcount_order = if version >= 3 { raw.refcount_order.get() } else { 4 };
        let cluster_bits = raw.cluster_bits.get();
        let geometry = Geometry::new(version, cluster_bits, refcount_order, extended).map_err(malformed)?;
        if header_length as u64 > geometry.cluster_bytes() || header_length > HEADER_BYTES_MAX {
            return Err(malformed(format!(
                "header_length is {header_length}, more than a cluster or 64 KiB"
            )));
        }

        let mut area =
            first[..first.len().min(HEADER_BYTES_MAX).min(geometry.cluster_bytes() as usize)].to_vec();
        // A file that ends in its first cluster reads as zeroes behind.
        area.resize(area.len().max(SECTOR_BYTES), 0);
        let backing = backing_name(&raw, &area, header_length, &geometry)?;
        let area_end = backing.as_ref().map_or(area.len(), |backing| backing.at);
        let extensions = extensions(&area[..area_end], header_length)?;
        let find = |kind| extensions.iter().find(|extension| extension.kind == kind);

        let incompatible = accept_incompatible(incompatible_bits, find(extension::FEATURE_NAMES))?;
        if purpose == Purpose::Use && incompatible.contains(Incompatible::MOVED) {
            return Err(moved(
                "`infill whois` says who owns it: use it there, or take it back with `infill reclaim`",
            ));
        }
        gate_encryption(raw.crypt_method.get(), find(extension::ENCRYPTION).is_some())?;
        if find(extension::DATA_FILE).is_some() {
            return Err(malformed("it names an external data file, but the feature bit for one is clear"));
        }
        let compression =
            if version >= 3 && header_length >= V3_HEADER_BYTES { raw.compression_type } else { 0 };
        let compression =
            Compression::from_header(compression, incompatible.contains(Incompatible::COMPRESSION))?;
        let mut sector = [0; SECTOR_BYTES];
        sector.copy_from_slice(&area[..SECTOR_BYTES]);
        let v3 = |bits: u64| if version >= 3 { bits } else { 0 };
        let header = Header {
            sector,
            version,
            geometry,
            size: raw.size.get(),
            l1: TableRef { at: HostOffset(raw.l1_table_offset.get()), count: raw.l1_size.get() },
            refcount_table: TableRef {
                at: HostOffset(raw.refcount_table_offset.get()),
                count: raw.refcount_table_clusters.get(),
            },
            snapshots: TableRef { at: HostOffset(raw.snapshots_offset.get()), count: raw.nb_snapshots.get() },
            incompatible,
            compatible: Compatible::from_bits_retain(v3(raw.compatible_features.get())),
            autoclear: Autoclear::from_bits_retain(v3(raw.autoclear_features.get())),
            compression,
            header_length,
            backing,
            extensions,
            area,
        };
        header.gate_tables(file_len, purpose)?;
        header.gate_bitmaps()?;
        Ok(header)
    }

    /// Refuses tables that are too short, too long, misplaced or behind the end of the file.
    fn gate_tables(&self, file_len: u64, purpose: Purpose) -> Result<(), OpenError> {
        let geometry = &self.geometry;
        let most = geometry.max_virtual_size();
        if self.size > most {
            return Err(malformed(format!(
                "size is {} bytes, more than the {most} that its cluster size allows",
                self.size
            )));
        }
        let needed = geometry.l1_entries_for(self.size);
        if u64::from(self.l1.count) < needed {
            return Err(malformed(format!(
                "the L1 table has {} entries, {needed} are needed for {} bytes",
                self.l1.count, self.size
            )));
        }
        let l1_bytes = u64::from(self.l1.count) * TABLE_ENTRY_BYTES;
        gate_table("L1 table", self.l1.at, l1_bytes, L1_BYTES_MAX, geometry, file_len)?;
        let clusters = u64::from(self.refcount_table.count);
        let bytes = clusters << geometry.cluster_bits();
        let refcounts = gate_table(
            "refcount table",
            self.refcount_table.at,
            bytes,
            REFCOUNT_TABLE_BYTES_MAX.max(geometry.cluster_bytes()),
            geometry,
            file_len,
        );
        if purpose != Purpose::Check {
            refcounts?;
            if clusters == 0 {
                return Err(malformed("it has no refcount table; `check` with repair makes a new one"));
            }
        }
        if self.snapshots.count > SNAPSHOTS_MAX {
            return Err(malformed(format!(
                "it claims {} internal snapshots, at most {SNAPSHOTS_MAX} are possible",
                self.snapshots.count
            )));
        }
        // The table's length is known only when it was read; here: that its least length lies in the file.
        let least = u64::from(self.snapshots.count) * 40;
        gate_table("snapshot table", self.snapshots.at, least, u64::MAX, geometry, file_len)
    }

    fn gate_bitmaps(&self) -> Result<(), OpenError> {
        if self.extension(extension::BITMAPS).is_none() && self.autoclear.contains(Autoclear::BITMAPS) {
            return Err(malformed("it says that its bitmaps are consistent, but has no bitmaps extension"));
        }
        Ok(())
    }

    /// The gate for writing.
    pub fn writable(&self) -> Result<WriteGate, OpenError> {
        if self.is_fenced() {
            return Err(moved(
                "it can be read; to be written, it has to be taken back with `infill reclaim`",
            ));
        }
        if self.incompatible.contains(Incompatible::CORRUPT) {
            return Err(OpenError::Refused {
                why: "this qcow2 image is marked corrupt: it can be opened read-only, or repaired with `infill check \
                      -r all`, but not written"
                    .into(),
            });
        }
        if self.incompatible.contains(Incompatible::DIRTY) {
            return Ok(WriteGate::RepairFirst);
        }
        Ok(WriteGate::Ready)
    }

    /// 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Cluster size, entry width, refcount width.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The active L1 table.
    pub fn l1(&self) -> TableRef {
        self.l1
    }

    /// The refcount table; `count` is in clusters.
    pub fn refcount_table(&self) -> TableRef {
        self.refcount_table
    }

    /// Entries of the refcount table.
    pub fn refcount_table_entries(&self) -> u64 {
        (u64::from(self.refcount_table.count) << self.geometry.cluster_bits()) / TABLE_ENTRY_BYTES
    }

    /// The table of internal snapshots.
    pub fn snapshots(&self) -> TableRef {
        self.snapshots
    }

    /// Whether the mark of a disk that moved away is set ([`Incompatible::MOVED`]).
    pub fn is_fenced(&self) -> bool {
        self.incompatible.contains(Incompatible::MOVED)
    }

    /// Incompatible features.
    pub fn incompatible(&self) -> Incompatible {
        self.incompatible
    }

    /// Compatible features.
    pub fn compatible(&self) -> Compatible {
        self.compatible
    }

    /// Autoclear features, unknown ones included.
    pub fn autoclear(&self) -> Autoclear {
        self.autoclear
    }

    /// How compressed clusters are compressed.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// The header extensions, in order.
    pub fn extensions(&self) -> &[Extension] {
        &self.extensions
    }

    /// The backing file as the header names it.
    pub fn backing(&self) -> Option<BackingRef> {
        let name = self.backing.as_ref()?;
        let format = self.extension(extension::BACKING_FORMAT);
        let format = format.map(|extension| String::from_utf8_lossy(&extension.data).into_owned());
        Some(BackingRef { filename: name.name.clone(), format: format.filter(|format| !format.is_empty()) })
    }

    /// Where the persistent bitmaps are listed, where the image says that they are consistent.
    pub fn bitmaps(&self) -> Result<Option<BitmapDirectory>, OpenError> {
        let Some(found) = self.extension(extension::BITMAPS) else { return Ok(None) };
        if !self.autoclear.contains(Autoclear::BITMAPS) {
            return Ok(None);
        }
        let raw = RawBitmapsExtension::read_from_bytes(&found.data).map_err(|_| {
            malformed(format!("its bitmaps extension has {} bytes, 24 are needed", found.data.len()))
        })?;
        Ok(Some(BitmapDirectory {
            at: HostOffset(raw.directory_offset.get()),
            len: raw.directory_size.get(),
            count: raw.nb_bitmaps.get(),
        }))
    }

    fn extension(&self, kind: u32) -> Option<&Extension> {
        self.extensions.iter().find(|extension| extension.kind == kind)
    }

    /// The first sector as it stands in the file: what a change is written as, in one write.
    pub fn sector(&self) -> &[u8; SECTOR_BYTES] {
        &self.sector
    }

    /// The header after `changes`, all of them in the first sector. Written is [`Header::sector`] of the result, in
    /// one write; only when that has succeeded does the result take this one's place.
    ///
    /// What a new value points to must be stable before, which is the caller's order of writes. Fails with
    /// `InvalidInput` where the format has no place for a change.
    pub fn changed(&self, changes: &[HeaderChange]) -> Result<Header, IoError> {
        let mut next = self.clone();
        let refused =
            |what: &str| Err(IoError::new(ErrorKind::InvalidInput, format!("qcow2 header: {what}")));
        for change in changes {
            if self.version < 3
                && matches!(change, HeaderChange::Incompatible(_) | HeaderChange::Autoclear(_))
            {
                return refused("version 2 has no feature bits");
            }
            match *change {
                HeaderChange::Incompatible(bits) => {
                    let fixed = Incompatible::COMPRESSION | Incompatible::EXTENDED_L2;
                    if bits & fixed != self.incompatible & fixed {
                        return refused("how an image is laid out cannot be changed by a bit");
                    }
                    next.incompatible = bits;
                    next.put(72, &bits.bits().to_be_bytes());
                }
                HeaderChange::Autoclear(bits) => {
                    next.autoclear = bits;
                    next.put(88, &bits.bits().to_be_bytes());
                }
                HeaderChange::Size(size) => {
                    next.size = size;
                    next.put(24, &size.to_be_bytes());
                }
                HeaderChange::L1(table) => {
                    next.l1 = table;
                    next.put(36, &table.count.to_be_bytes());
                    next.put(40, &table.at.0.to_be_bytes());
                }
                HeaderChange::RefcountTable(table) => {
                    next.refcount_table = table;
                    next.put(48, &table.at.0.to_be_bytes());
                    next.put(56, &table.count.to_be_bytes());
                }
                HeaderChange::Snapshots(table) => {
                    next.snapshots = table;
                    next.put(60, &table.count.to_be_bytes());
                    next.put(64, &table.at.0.to_be_bytes());
                }
                HeaderChange::DropBacking => {
                    // Bytes 8 to 19 and nothing else: a header may span sectors, and rewritten as a whole it can tear.
                    next.backing = None;
                    next.put(8, &[0; 12]);
                }
            }
        }
        // The same rules as at open, so that no change makes an image that does not open again; where this one does not
        // open for use, the rules that it was opened under.
        let usable = self.gate_tables(u64::MAX, Purpose::Use).is_ok();
        let purpose = if usable { Purpose::Use } else { Purpose::Check };
        match next.gate_tables(u64::MAX, purpose).and_then(|()| next.gate_bitmaps()) {
            Ok(()) => Ok(next),
            Err(error) => refused(&format!("the change was refused, it would make a {error}")),
        }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.sector[at..at + bytes.len()].copy_from_slice(bytes);
        self.area[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Header, extensions without the backing format, and nothing else: what a program would write that does not mind
    /// that more than one sector can tear.
    #[cfg(feature = "planted-faults")]
    pub(crate) fn rewritten_whole(&self) -> Bytes {
        let mut area = self.area.clone();
        let extensions = match self.backing {
            Some(_) => self.extensions.clone(),
            None => self.extensions_with_format(None),
        };
        let bytes = serialize_extensions(&extensions);
        let name = self.backing.as_ref().map_or(area.len(), |backing| backing.at);
        let end = (self.header_length + bytes.len()).min(name);
        area[self.header_length..end].copy_from_slice(&bytes[..end - self.header_length]);
        area[end..name].fill(0);
        area.into()
    }

    /// Writes the first sector, in one write. The caller has synced what it points to, and syncs afterwards.
    pub async fn store(&self, cx: &Ctx, storage: &StorageHandle) -> IoResult<()> {
        metaio::write(cx, storage, 0, Bytes::copy_from_slice(&self.sector)).await
    }
}

/// One change of the header that its first sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderChange {
    /// Incompatible features: the dirty and the corrupt bit, and the mark of a disk that moved away.
    Incompatible(Incompatible),
    /// Autoclear features.
    Autoclear(Autoclear),
    /// Size of the disk in bytes.
    Size(u64),
    /// Place and length of the L1 table.
    L1(TableRef),
    /// Place and length of the refcount table.
    RefcountTable(TableRef),
    /// Place and length of the snapshot table.
    Snapshots(TableRef),
    /// No backing file any more.
    DropBacking,
}

/// The extensions and the end mark.
pub(crate) fn serialize_extensions(extensions: &[Extension]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for found in extensions {
        let raw = RawExtension { kind: found.kind.into(), len: (found.data.len() as u32).into() };
        bytes.extend_from_slice(raw.as_bytes());
        bytes.extend_from_slice(&found.data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes.extend_from_slice(&[0; 8]);
    bytes
}

/// The fields, and the version. Of version 2, those from byte 72 on are not to be used.
fn raw_header(first: &[u8]) -> Result<(RawHeader, u32), OpenError> {
    let not_this = |found: String| OpenError::NotThisFormat { format: FORMAT, found };
    if !probe(first) {
        return Err(not_this("the file does not begin with the bytes 51 46 49 fb".into()));
    }
    let mut bytes = [0; V3_HEADER_BYTES];
    let len = first.len().min(V3_HEADER_BYTES);
    bytes[..len].copy_from_slice(&first[..len]);
    let raw: RawHeader = zerocopy::transmute!(bytes);
    let version = raw.version.get();
    let needed = match version {
        2 => V2_HEADER_BYTES,
        3 => V3_HEADER_BYTES_MIN,
        1 => return Err(not_this("version 1 (qcow) is another format; convert it with qemu-img".into())),
        other => {
            return Err(OpenError::Unsupported {
                format: FORMAT,
                feature: format!("format version {other}"),
                advice: "versions 2 and 3 are known".into(),
            });
        }
    };
    if first.len() < needed {
        return Err(malformed(format!(
            "the file ends after {} bytes, its header has at least {needed}",
            first.len()
        )));
    }
    Ok((raw, version))
}

fn header_length(raw: &RawHeader, version: u32) -> Result<usize, OpenError> {
    if version < 3 {
        return Ok(V2_HEADER_BYTES);
    }
    let len = raw.header_length.get() as usize;
    if len < V3_HEADER_BYTES_MIN || !len.is_multiple_of(8) {
        return Err(malformed(format!(
            "header_length is {len}, must be a multiple of 8 and at least {V3_HEADER_BYTES_MIN}"
        )));
    }
    Ok(len)
}

fn backing_name(
    raw: &RawHeader,
    area: &[u8],
    header_length: usize,
    geometry: &Geometry,
) -> Result<Option<BackingName>, OpenError> {
    let (at, len) = (raw.backing_file_offset.get(), raw.backing_file_size.get() as usize);
    if at == 0 {
        return Ok(None);
    }
    if len == 0 || len > BACKING_NAME_BYTES_MAX {
        return Err(malformed(format!(
            "the backing file name has {len} bytes, must have 1 to {BACKING_NAME_BYTES_MAX}"
        )));
    }
    let end = at.checked_add(len as u64).filter(|end| *end <= area.len() as u64);
    if at < header_length as u64 || end.is_none() {
        return Err(malformed(format!(
            "the backing file name at byte {at} ({len} bytes) is outside of the header's cluster of {} bytes",
            geometry.cluster_bytes()
        )));
    }
    let at = at as usize;
    let name = str::from_utf8(&area[at..at + len])
        .map_err(|_| malformed("the backing file name is not UTF-8; rebase the image onto a name that is"))?;
    if name.contains('\0') {
        return Err(malformed("the backing file name has a zero byte in it"));
    }
    Ok(Some(BackingName { at, name: name.into() }))
}

/// The extensions from byte `at` of `area` to the end mark, or to the end of the area.
fn extensions(area: &[u8], mut at: usize) -> Result<Vec<Extension>, OpenError> {
    let mut found: Vec<Extension> = Vec::new();
    while let Some(raw) = area.get(at..at + size_of::<RawExtension>()) {
        let Ok(raw) = RawExtension::read_from_bytes(raw) else { break };
        let (kind, len) = (raw.kind.get(), raw.len.get() as usize);
        if kind == extension::END {
            break;
        }
        at += size_of::<RawExtension>();
        let data = at.checked_add(len).and_then(|end| area.get(at..end)).ok_or_else(|| {
            malformed(format!(
                "header extension {kind:#010x} at byte {at} claims {len} bytes and leaves the header's area"
            ))
        })?;
        if found.iter().any(|earlier| earlier.kind == kind) {
            return Err(malformed(format!("header extension {kind:#010x} appears twice")));
        }
        found.push(Extension { kind, data: data.to_vec() });
        at += len.next_multiple_of(8);
    }
    Ok(found)
}

fn gate_encryption(method: u32, has_header: bool) -> Result<(), OpenError> {
    let name = match method {
        0 if has_header => return Err(malformed("it has an encryption header, but crypt_method is 0")),
        0 => return Ok(()),
        1 => "AES encryption",
        2 => "LUKS encryption",
        other => return Err(malformed(format!("crypt_method is {other}, must be 0, 1 or 2"))),
    };
    Err(OpenError::Unsupported {
        format: FORMAT,
        feature: name.into(),
        advice: "convert it to an image without encryption".into(),
    })
}

/// Refuses a table that lies where it cannot be. An empty one may lie anywhere.
fn gate_table(
    what: &str,
    at: HostOffset,
    bytes: u64,
    bytes_max: u64,
    geometry: &Geometry,
    file_len: u64,
) -> Result<(), OpenError> {
    if bytes == 0 {
        return Ok(());
    }
    if bytes > bytes_max {
        return Err(malformed(format!("the {what} has {bytes} bytes, at most {bytes_max} are possible")));
    }
    if !geometry.is_aligned(at) || at.0 == 0 {
        return Err(malformed(format!(
            "the {what} lies at byte {}, must be a multiple of the cluster size {} and not 0",
            at.0,
            geometry.cluster_bytes()
        )));
    }
    // The last cluster of a file need not be whole: what is missing reads as zeroes.
    let file_end = file_len.checked_next_multiple_of(geometry.cluster_bytes()).unwrap_or(u64::MAX);
    let end = at.0.checked_add(bytes).filter(|end| *end <= file_end && *end <= HOST_OFFSET_END);
    if end.is_none() || at.0 >= file_len {
        return Err(malformed(format!(
            "the {what} at byte {} ({bytes} bytes) ends behind the file, which has {file_len} bytes",
            at.0
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
