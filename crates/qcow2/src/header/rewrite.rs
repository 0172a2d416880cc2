//! Changes of the header that need more than its first sector: a backing file's name, the list of bitmaps.
//!
//! A crash leaves the old header or the new one. So what changes of bytes that the header names lies in one sector, which is
//! written last; whatever else is new goes to bytes that nothing names, and is stable before.

use bytes::Bytes;
use infill_base::{Ctx, ErrorKind, IoError, IoResult};
use infill_node::BackingRef;
use infill_storage::StorageHandle;
use zerocopy::IntoBytes;

use super::{BitmapDirectory, Extension, Header, HeaderChange, Purpose, serialize_extensions};
use crate::features::{Autoclear, Incompatible, MOVED, is_named, table_with_moved};
use crate::format::limits::{BACKING_NAME_BYTES_MAX, HEADER_BYTES_MAX};
use crate::format::{RawBitmapsExtension, RawExtension, RawFeatureName, SECTOR_BYTES, extension};
use crate::metaio;

/// Where the autoclear features stand in the first sector.
const AUTOCLEAR_AT: usize = 88;

/// How a header becomes another one, so that a crash leaves the old one or the new one.
#[derive(Clone, Debug)]
pub struct HeaderRewrite {
    /// The header afterwards.
    pub header: Header,
    /// Bytes from byte 512 on: they change only what nothing names yet.
    pub(super) tail: Vec<u8>,
    /// The sector in which something changes that the header names.
    sector: usize,
}

impl HeaderRewrite {
    /// Writes it: (1) bytes that nothing names, (2) sync, (3) one sector, (4) sync.
    pub async fn store(&self, cx: &Ctx, storage: &StorageHandle) -> IoResult<()> {
        if !self.tail.is_empty() {
            let tail = Bytes::copy_from_slice(&self.tail);
            metaio::write(cx, storage, SECTOR_BYTES as u64, tail).await?;
        }
        storage.sync(cx).await?;
        let at = self.sector * SECTOR_BYTES;
        let sector = Bytes::copy_from_slice(&self.header.area[at..at + SECTOR_BYTES]);
        metaio::write(cx, storage, at as u64, sector).await?;
        storage.sync(cx).await
    }
}

impl Header {
    /// The header that names `backing` as its backing file, and what has to be written to get there.
    ///
    /// The feature name table, which informs and no more, gives up entries where the rest would not fit else. Fails
    /// with `Unsupported` where extensions leave no room for a change that a crash cannot tear.
    pub fn with_backing(&self, backing: &BackingRef) -> Result<HeaderRewrite, IoError> {
        let name = backing.filename.as_bytes();
        if name.is_empty() || name.len() > BACKING_NAME_BYTES_MAX {
            return Err(IoError::new(
                ErrorKind::InvalidInput,
                format!(
                    "a backing file name has 1 to {BACKING_NAME_BYTES_MAX} bytes, this one {}",
                    name.len()
                ),
            ));
        }
        let extensions = self.extensions_with_format(backing.format.as_deref());
        self.rewritten(extensions, Some(name), self.autoclear)
            .ok_or_else(|| no_room("change the backing file"))?
    }

    /// The header that names `directory` as the list of the image's bitmaps, and says that it is right; or that has none.
    ///
    /// Fails with `Unsupported` as [`Header::with_backing`] does.
    pub fn with_bitmaps(&self, directory: Option<BitmapDirectory>) -> Result<HeaderRewrite, IoError> {
        let mut extensions = self.extensions.clone();
        let place = extensions.iter().position(|found| found.kind == extension::BITMAPS);
        let name = self.backing.as_ref().map(|backing| backing.name.clone());
        let Some(directory) = directory else {
            place.map(|place| extensions.remove(place));
            let autoclear = self.autoclear - Autoclear::BITMAPS;
            let rewritten = self.rewritten(extensions, name.as_deref().map(str::as_bytes), autoclear);
            // Where the extension cannot go, the bit says that it is not to be looked at.
            return rewritten.unwrap_or_else(|| {
                let header = self.changed(&[HeaderChange::Autoclear(autoclear)])?;
                Ok(HeaderRewrite { header, tail: Vec::new(), sector: 0 })
            });
        };
        let raw = RawBitmapsExtension {
            nb_bitmaps: directory.count.into(),
            reserved: 0.into(),
            directory_size: directory.len.into(),
            directory_offset: directory.at.0.into(),
        };
        if let Some(rewrite) = place.and_then(|place| self.bitmaps_in_place(place, &raw)) {
            return rewrite;
        }
        let data = raw.as_bytes().to_vec();
        match place {
            Some(place) => extensions[place].data = data,
            None => extensions.push(Extension { kind: extension::BITMAPS, data }),
        }
        self.rewritten(extensions, name.as_deref().map(str::as_bytes), self.autoclear | Autoclear::BITMAPS)
            .ok_or_else(|| no_room("store bitmaps"))?
    }

    /// The header that says, or does not say, that another host owns the disk: one bit. An image that does not name it yet
    /// gets its name too, where there is room.
    ///
    /// Fails with `Unsupported` where the version has no such bits.
    pub fn with_fence(&self, fenced: bool) -> Result<HeaderRewrite, IoError> {
        if self.version < 3 {
            return Err(IoError::new(
                ErrorKind::Unsupported,
                "a qcow2 image of version 2 has no feature bits, so nothing can keep other programs from starting it; \
                 convert it to version 3",
            ));
        }
        let mut bits = self.incompatible;
        bits.set(Incompatible::MOVED, fenced);
        let header = self.changed(&[HeaderChange::Incompatible(bits)])?;
        let named = if fenced { header.naming_fence() } else { None };
        Ok(named.unwrap_or(HeaderRewrite { header, tail: Vec::new(), sector: 0 }))
    }

    /// The header with the name of the fence in its table, if it is not there and there is room.
    fn naming_fence(&self) -> Option<HeaderRewrite> {
        let mut extensions = self.extensions.clone();
        let place = extensions.iter().position(|found| found.kind == extension::FEATURE_NAMES);
        if is_named(place.map(|place| &extensions[place]), MOVED) {
            return None;
        }
        match place {
            Some(place) => extensions[place].data = table_with_moved(&extensions[place].data),
            None => {
                extensions.push(Extension { kind: extension::FEATURE_NAMES, data: table_with_moved(&[]) })
            }
        }
        let name = self.backing.as_ref().map(|backing| backing.name.as_bytes());
        let rewrite = self.rewritten(extensions, name, self.autoclear)?.ok()?;
        let names = rewrite.header.extension(extension::FEATURE_NAMES);
        is_named(names, MOVED).then_some(rewrite)
    }

    /// Another list in the extension that is there, where one sector holds all of its data and the bit is set.
    fn bitmaps_in_place(
        &self,
        place: usize,
        raw: &RawBitmapsExtension,
    ) -> Option<Result<HeaderRewrite, IoError>> {
        let raw = raw.as_bytes();
        let before: usize = self.extensions[..place].iter().map(extension_bytes).sum();
        let at = self.header_length + before + size_of::<RawExtension>();
        let sector = at / SECTOR_BYTES;
        let fits = self.extensions[place].data.len() == raw.len()
            && (at + raw.len() - 1) / SECTOR_BYTES == sector
            && (sector + 1) * SECTOR_BYTES <= self.area.len()
            && self.autoclear.contains(Autoclear::BITMAPS);
        fits.then(|| {
            let mut area = self.area.clone();
            area[at..at + raw.len()].copy_from_slice(raw);
            Ok(HeaderRewrite { header: parsed(&area)?, tail: Vec::new(), sector })
        })
    }

    /// The header with these extensions, this name of a backing file and these autoclear features; `None` where there is no
    /// room.
    fn rewritten(
        &self,
        mut extensions: Vec<Extension>,
        name: Option<&[u8]>,
        autoclear: Autoclear,
    ) -> Option<Result<HeaderRewrite, IoError>> {
        let area = self.area_with(&extensions, name).or_else(|| {
            trim_names(&mut extensions, SECTOR_BYTES.checked_sub(self.header_length)?);
            self.area_with(&extensions, name)
        });
        let mut area = area?;
        if self.version >= 3 {
            area[AUTOCLEAR_AT..AUTOCLEAR_AT + 8].copy_from_slice(&autoclear.bits().to_be_bytes());
        }
        let rewritten = |header| HeaderRewrite { header, tail: area[SECTOR_BYTES..].to_vec(), sector: 0 };
        Some(parsed(&area).map(rewritten))
    }

    /// The extensions with another backing format, which keeps its place or comes first.
    pub(super) fn extensions_with_format(&self, format: Option<&str>) -> Vec<Extension> {
        let mut extensions = self.extensions.clone();
        let place = extensions.iter().position(|found| found.kind == extension::BACKING_FORMAT);
        match (place, format) {
            (Some(place), Some(format)) => extensions[place].data = format.as_bytes().to_vec(),
            (Some(place), None) => drop(extensions.remove(place)),
            (None, Some(format)) => {
                let data = format.as_bytes().to_vec();
                extensions.insert(0, Extension { kind: extension::BACKING_FORMAT, data });
            }
            (None, None) => {}
        }
        extensions
    }

    /// The header's area with these extensions and this name, if all that changes behind the first sector is what
    /// the header, as it stands, does not name.
    fn area_with(&self, extensions: &[Extension], name: Option<&[u8]>) -> Option<Vec<u8>> {
        let bytes = serialize_extensions(extensions);
        let (start, end) = (self.header_length, self.header_length + bytes.len());
        let old_end = start + serialize_extensions(&self.extensions).len();
        let old_name = self.backing.as_ref().map_or(0..0, |old| old.at..old.at + old.name.len());
        let mut area = self.area.clone();
        area.resize((self.geometry.cluster_bytes() as usize).min(HEADER_BYTES_MAX), 0);
        let named = |at: &usize| *at < old_end || old_name.contains(at);
        let tears = |at: usize| at >= SECTOR_BYTES && named(&at) && area[at] != bytes[at - start];
        if end > area.len() || (start..end).any(tears) {
            return None;
        }
        let Some(name) = name else {
            area[start..end].copy_from_slice(&bytes);
            return Some(area);
        };
        let same = self.backing.as_ref().is_some_and(|old| old.name.as_bytes() == name);
        let at = if same && end <= old_name.start {
            old_name.start
        } else {
            let free = end.max(old_end).next_multiple_of(8);
            [free, free.max(old_name.end.next_multiple_of(8))].into_iter().find(|at| {
                let end = at + name.len();
                end <= area.len() && (end <= old_name.start || *at >= old_name.end)
            })?
        };
        area[start..end].copy_from_slice(&bytes);
        area[at..at + name.len()].copy_from_slice(name);
        area[8..16].copy_from_slice(&(at as u64).to_be_bytes());
        area[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        Some(area)
    }
}

/// Bytes that an extension takes.
fn extension_bytes(found: &Extension) -> usize {
    size_of::<RawExtension>() + found.data.len().next_multiple_of(8)
}

fn parsed(area: &[u8]) -> Result<Header, IoError> {
    Header::parse(area, u64::MAX, Purpose::UseMoved)
        .map_err(|error| IoError::new(ErrorKind::InvalidInput, error.to_string()))
}

fn no_room(to: &str) -> IoError {
    IoError::new(
        ErrorKind::Unsupported,
        format!(
            "the extensions in this qcow2 header leave no room to {to} in a way that a crash cannot tear; convert the \
             image"
        ),
    )
}

/// Takes entries from the end of the feature name table until the extensions fit `room` bytes, or none is left.
pub(crate) fn trim_names(extensions: &mut [Extension], room: usize) -> Option<()> {
    let excess = serialize_extensions(extensions).len().checked_sub(room)?;
    let names = extensions.iter_mut().find(|found| found.kind == extension::FEATURE_NAMES)?;
    let entry = size_of::<RawFeatureName>();
    names.data.truncate(names.data.len().saturating_sub(excess.next_multiple_of(entry)) / entry * entry);
    Some(())
}
