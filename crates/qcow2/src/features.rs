//! The three sets of feature bits, as three types, and the names of bits.
//!
//! *Incompatible* bits are consumed by opening: one that is not known here, or not supported, refuses the image by
//! name. *Compatible* bits may be ignored. *Autoclear* bits say that something is consistent; whoever writes without
//! keeping it so clears them first.

use bitflags::bitflags;
use infill_base::OpenError;
use zerocopy::FromBytes;

use crate::format::RawFeatureName;
use crate::header::{Extension, FORMAT, malformed};

bitflags! {
    /// Features without which an image cannot be used. Unknown bits are never held in this type.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Incompatible: u64 {
        /// Refcounts may be wrong; they are rebuilt before anything is allocated.
        const DIRTY = 1;
        /// Metadata may be wrong; the image is not written.
        const CORRUPT = 1 << 1;
        /// Clusters are compressed with something else than deflate.
        const COMPRESSION = 1 << 3;
        /// L2 entries have subclusters.
        const EXTENDED_L2 = 1 << 4;
        /// Another host owns the disk now, this copy of it is not to be started. Far from the bits that the format hands
        /// out in ascending order, and named in the feature table of every image that we create, so that other programs
        /// refuse with that name.
        const MOVED = 1 << MOVED;
    }
}

bitflags! {
    /// Features that may be ignored.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Compatible: u64 {
        /// Refcounts may be written late, under the dirty bit.
        const LAZY_REFCOUNTS = 1;
        // Other bits are kept as they are found.
        const _ = !0;
    }
}

bitflags! {
    /// What is consistent in this image.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Autoclear: u64 {
        /// The bitmaps extension and all that it names.
        const BITMAPS = 1;
        /// Infill's volatile journal belongs to exactly this state of the image.
        const VOLATILE_JOURNAL = 1 << 62;
        // Other bits are kept as they are found, until the image is written.
        const _ = !0;
    }
}

/// Incompatible bit: clusters lie in another file.
const EXTERNAL_DATA_FILE: u32 = 2;
/// The bit of [`Incompatible::MOVED`].
pub(crate) const MOVED: u32 = 62;
/// What the incompatible bit [`MOVED`] is called.
pub(crate) const MOVED_NAME: &str = "moved to another host";

/// The kinds of the feature name table, with the bits that every image of ours names. Where there is little room, the last
/// give way first.
const NAMES: [(u8, u32, &str); 7] = [
    (0, MOVED, MOVED_NAME),
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 62, "infill volatile journal"),
];

/// The feature name table of the images that we create. It fits the first sector together with the header and the
/// name of a backing format.
pub(crate) fn name_table() -> Vec<u8> {
    let mut table = Vec::with_capacity(NAMES.len() * size_of::<RawFeatureName>());
    for (kind, bit, text) in NAMES {
        table.extend_from_slice(&name_entry(kind, bit, text));
    }
    table
}

fn name_entry(kind: u8, bit: u32, text: &str) -> [u8; size_of::<RawFeatureName>()] {
    let mut entry = RawFeatureName { kind, bit: bit as u8, name: [0; 46] };
    entry.name[..text.len()].copy_from_slice(text.as_bytes());
    zerocopy::transmute!(entry)
}

/// The feature name table of an image, with the name of [`MOVED`] in it, first of all: it is the last to give way where
/// there is little room.
pub(crate) fn table_with_moved(names: &[u8]) -> Vec<u8> {
    let mut table = name_entry(0, MOVED, MOVED_NAME).to_vec();
    table.extend_from_slice(names);
    table
}

/// Whether the image's own table names an incompatible bit.
pub(crate) fn is_named(names: Option<&Extension>, bit: u32) -> bool {
    name_in_image(names, bit).is_some()
}

/// Why an image that another host owns now is not opened.
pub(crate) fn moved(advice: &str) -> OpenError {
    OpenError::Refused {
        why: format!(
            "this qcow2 image was {MOVED_NAME} (incompatible feature {MOVED}): starting it here would make two owners of \
             one disk; {advice}"
        ),
    }
}

/// The name that the image's own table gives an incompatible bit, fit to be printed.
fn name_in_image(names: Option<&Extension>, bit: u32) -> Option<String> {
    let (entries, _) = names?.data.as_chunks::<{ size_of::<RawFeatureName>() }>();
    let entry = entries
        .iter()
        .filter_map(|bytes| RawFeatureName::read_from_bytes(bytes).ok())
        .find(|entry| entry.kind == 0 && u32::from(entry.bit) == bit)?;
    let len = entry.name.iter().position(|byte| *byte == 0).unwrap_or(entry.name.len());
    let name: String =
        String::from_utf8_lossy(&entry.name[..len]).chars().filter(|c| !c.is_control()).collect();
    (!name.is_empty()).then_some(name)
}

/// Takes the incompatible bits that are supported; the first other one refuses the image by its name.
pub(crate) fn accept_incompatible(bits: u64, names: Option<&Extension>) -> Result<Incompatible, OpenError> {
    let unknown = bits & !Incompatible::all().bits();
    if unknown == 0 {
        return Ok(Incompatible::from_bits_retain(bits));
    }
    let bit = unknown.trailing_zeros();
    if bit == EXTERNAL_DATA_FILE {
        return Err(OpenError::Unsupported {
            format: FORMAT,
            feature: format!("an external data file (incompatible feature {bit})"),
            advice: "convert it to an image without one".into(),
        });
    }
    let feature = match name_in_image(names, bit) {
        Some(name) => format!("incompatible feature {bit} (\"{name}\")"),
        None => format!("incompatible feature {bit}, which it does not name"),
    };
    Err(OpenError::Unsupported {
        format: FORMAT,
        feature,
        advice: "use the program that made it, or a newer version of this one".into(),
    })
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Compression {
    /// Raw deflate (QEMU calls it zlib).
    #[default]
    Deflate,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// The name that QEMU uses.
    pub fn name(self) -> &'static str {
        match self {
            Compression::Deflate => "zlib",
            Compression::Zstd => "zstd",
        }
    }

    /// The value of the header's field.
    pub(crate) fn code(self) -> u8 {
        match self {
            Compression::Deflate => 0,
            Compression::Zstd => 1,
        }
    }

    /// From the header's field and the bit that must go with it.
    pub(crate) fn from_header(code: u8, bit: bool) -> Result<Compression, OpenError> {
        if bit != (code != 0) {
            return Err(malformed(format!(
                "compression_type is {code}, but the feature bit that goes with a value other than 0 is {}",
                if bit { "set" } else { "clear" }
            )));
        }
        match code {
            0 => Ok(Compression::Deflate),
            1 => Ok(Compression::Zstd),
            other => Err(OpenError::Unsupported {
                format: FORMAT,
                feature: format!("compression type {other}"),
                advice: "only zlib (0) and zstd (1) are known; convert it with the program that made it"
                    .into(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_name_table_leaves_room_in_the_first_sector() {
        // Header, name of a backing format of up to 8 bytes, table, end mark.
        assert!(112 + 16 + 8 + name_table().len() + 8 <= 512);
    }
}
