//! The bitmap directory and the bitmaps' tables: from bytes to validated values, and back.

use bitflags::bitflags;
use zerocopy::{FromBytes, IntoBytes};

use crate::entry::be64;
use crate::format::RawBitmapEntry;
use crate::format::limits::{
    BITMAP_BYTES_MAX, BITMAP_DIRECTORY_BYTES_MAX, BITMAP_TABLE_BYTES_MAX, BITMAPS_MAX,
};
use crate::geometry::{Geometry, HostOffset, TABLE_ENTRY_BYTES};
use crate::header::{BitmapDirectory, TableRef};

/// The kind of a dirty bitmap: the only one.
const DIRTY_TRACKING: u8 = 1;
/// Bits that a granularity may have (QEMU's limits, too).
pub(crate) const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Bits of a table's entry that must be 0.
const ENTRY_RESERVED: u64 = 0xff00_0000_0000_01fe;

bitflags! {
    /// What the directory says of a bitmap.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub(crate) struct BitmapFlags: u32 {
        /// It was not stored when it was last in use.
        const IN_USE = 1;
        /// It records from the first change on.
        const AUTO = 1 << 1;
        /// Extra data that is not understood does not matter.
        const EXTRA_COMPATIBLE = 1 << 2;
        // Unknown ones are kept, and make the bitmap unusable.
        const _ = !0;
    }
}

impl BitmapFlags {
    const KNOWN: BitmapFlags =
        BitmapFlags::IN_USE.union(BitmapFlags::AUTO).union(BitmapFlags::EXTRA_COMPATIBLE);
}

/// One bitmap, as the directory lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    /// Its table; `count` is in entries.
    pub(crate) table: TableRef,
    pub(crate) flags: BitmapFlags,
    pub(crate) kind: u8,
    pub(crate) granularity_bits: u8,
    pub(crate) extra: Vec<u8>,
    pub(crate) name: Vec<u8>,
}

impl Listed {
    /// One that is new.
    pub(crate) fn new(name: &str, granularity: u64) -> Listed {
        Listed {
            table: TableRef::default(),
            flags: BitmapFlags::empty(),
            kind: DIRTY_TRACKING,
            granularity_bits: granularity.trailing_zeros() as u8,
            extra: Vec::new(),
            name: name.as_bytes().to_vec(),
        }
    }

    /// Its name, as it is shown.
    pub(crate) fn shown_name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// Its granularity in bytes, forced into the bounds of those that can be used.
    pub(crate) fn granularity(&self) -> u64 {
        1 << self.granularity_bits.clamp(*GRANULARITY_BITS.start(), *GRANULARITY_BITS.end())
    }

    /// Where its table lies, with its length in bytes, if it may lie there.
    pub(crate) fn table_place(&self, geometry: &Geometry, file_len: u64) -> Result<(u64, u64), String> {
        let bytes = u64::from(self.table.count) * TABLE_ENTRY_BYTES;
        let fits = bytes <= BITMAP_TABLE_BYTES_MAX
            && geometry.is_aligned(self.table.at)
            && in_file(geometry, self.table.at, bytes.max(1), file_len);
        match fits {
            true => Ok((self.table.at.0, bytes)),
            false => Err("names a table that cannot lie there".into()),
        }
    }

    /// Why the bitmap cannot be used on a disk of `size` bytes, if it cannot.
    pub(crate) fn unusable(&self, geometry: &Geometry, size: u64) -> Option<String> {
        if self.flags.contains(BitmapFlags::IN_USE) {
            return Some("it was not stored when it was last in use".into());
        }
        if self.kind != DIRTY_TRACKING {
            return Some(format!("its kind is {}, only {DIRTY_TRACKING} is known", self.kind));
        }
        if !BitmapFlags::KNOWN.contains(self.flags) {
            return Some(format!("its flags are {:#x}, of which not all are known", self.flags.bits()));
        }
        if !self.extra.is_empty() && !self.flags.contains(BitmapFlags::EXTRA_COMPATIBLE) {
            return Some("it has extra data that is not known".into());
        }
        if !GRANULARITY_BITS.contains(&self.granularity_bits) {
            return Some(format!(
                "its granularity is 2^{}, must be 2^{} to 2^{}",
                self.granularity_bits,
                GRANULARITY_BITS.start(),
                GRANULARITY_BITS.end()
            ));
        }
        let bits = bits_bytes(size, self.granularity());
        if bits > BITMAP_BYTES_MAX {
            return Some(format!("it has {bits} bytes, at most {BITMAP_BYTES_MAX} are read"));
        }
        let (found, needed) = (u64::from(self.table.count), bits.div_ceil(geometry.cluster_bytes()));
        (found != needed).then(|| format!("its table has {found} entries, {needed} are needed"))
    }
}

/// Bytes of the bits of a disk of `size` bytes, in whole words of eight.
pub(crate) fn bits_bytes(size: u64, granularity: u64) -> u64 {
    size.div_ceil(granularity).div_ceil(64) * 8
}

/// Whether all of a range lies in the file, whose last cluster need not be whole.
pub(crate) fn in_file(geometry: &Geometry, at: HostOffset, bytes: u64, file_len: u64) -> bool {
    let end = file_len.checked_next_multiple_of(geometry.cluster_bytes()).unwrap_or(u64::MAX);
    at.0 < file_len && at.0.checked_add(bytes).is_some_and(|range_end| range_end <= end)
}

/// The bitmaps in the bytes of a directory, in their order. An error tells what is wrong with it.
pub(crate) fn parse(bytes: &[u8], count: u32) -> Result<Vec<Listed>, String> {
    let (mut listed, mut at): (Vec<Listed>, usize) = (Vec::new(), 0);
    for nth in 0..count {
        let leaves = || format!("entry {nth} of the directory leaves it");
        let fixed = at.checked_add(size_of::<RawBitmapEntry>()).ok_or_else(leaves)?;
        let raw = bytes.get(at..fixed).and_then(|raw| RawBitmapEntry::read_from_bytes(raw).ok());
        let raw = raw.ok_or_else(leaves)?;
        let extra_end = fixed.checked_add(raw.extra_data_size.get() as usize).ok_or_else(leaves)?;
        let name_end = extra_end.checked_add(raw.name_size.get().into()).ok_or_else(leaves)?;
        let extra = bytes.get(fixed..extra_end).ok_or_else(leaves)?.to_vec();
        let name = bytes.get(extra_end..name_end).ok_or_else(leaves)?.to_vec();
        if name.is_empty() {
            return Err(format!("entry {nth} of the directory has no name"));
        }
        at = name_end.next_multiple_of(8);
        listed.push(Listed {
            table: TableRef { at: HostOffset(raw.table_offset.get()), count: raw.table_size.get() },
            flags: BitmapFlags::from_bits_retain(raw.flags.get()),
            kind: raw.kind,
            granularity_bits: raw.granularity_bits,
            extra,
            name,
        });
    }
    let mut names: Vec<&[u8]> = listed.iter().map(|listed| listed.name.as_slice()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("the name '{}' appears twice", String::from_utf8_lossy(pair[0]))),
        None => Ok(listed),
    }
}

/// The bytes of a directory.
pub(crate) fn serialize(listed: &[Listed]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for one in listed {
        let raw = RawBitmapEntry {
            table_offset: one.table.at.0.into(),
            table_size: one.table.count.into(),
            flags: one.flags.bits().into(),
            kind: one.kind,
            granularity_bits: one.granularity_bits,
            name_size: (one.name.len() as u16).into(),
            extra_data_size: (one.extra.len() as u32).into(),
        };
        bytes.extend_from_slice(raw.as_bytes());
        bytes.extend_from_slice(&one.extra);
        bytes.extend_from_slice(&one.name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}

/// Whether a directory may lie where the header says.
pub(crate) fn check_place(
    directory: &BitmapDirectory,
    geometry: &Geometry,
    file_len: u64,
) -> Result<(), String> {
    let fits = directory.len <= BITMAP_DIRECTORY_BYTES_MAX
        && (1..=BITMAPS_MAX).contains(&directory.count)
        && geometry.is_aligned(directory.at)
        && in_file(geometry, directory.at, directory.len.max(1), file_len);
    match fits {
        true => Ok(()),
        false => Err(format!(
            "the directory at byte {} ({} bytes, {} bitmaps) cannot be so",
            directory.at.0, directory.len, directory.count
        )),
    }
}

/// What an entry of a bitmap's table stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bits {
    /// All are clear.
    Clear,
    /// All are set.
    Set,
    /// They stand in this cluster.
    At(HostOffset),
}

/// The entries of a table.
pub(crate) fn parse_table(bytes: &[u8], geometry: &Geometry, file_len: u64) -> Result<Vec<Bits>, String> {
    let one = |entry: &[u8]| {
        let raw = be64(entry);
        let host = HostOffset(raw & !1);
        match raw {
            0 => Ok(Bits::Clear),
            1 => Ok(Bits::Set),
            _ if raw & (ENTRY_RESERVED | 1) == 0
                && geometry.is_aligned(host)
                && in_file(geometry, host, geometry.cluster_bytes(), file_len) =>
            {
                Ok(Bits::At(host))
            }
            _ => Err("has data that cannot lie there".to_owned()),
        }
    };
    bytes.chunks_exact(TABLE_ENTRY_BYTES as usize).map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(name: &str, flags: BitmapFlags) -> Listed {
        let table = TableRef { at: HostOffset(0x50000), count: 1 };
        Listed { table, flags, extra: vec![7; 3], ..Listed::new(name, 4096) }
    }

    #[test]
    fn a_directory_comes_back_and_every_cut_of_it_is_refused() {
        let all = [listed("a", BitmapFlags::AUTO), listed("a longer name", BitmapFlags::IN_USE)];
        let bytes = serialize(&all);
        assert_eq!(parse(&bytes, 2).unwrap(), all);
        let last_name_ends = bytes.len() - bytes.iter().rev().take_while(|byte| **byte == 0).count();
        for cut in 0..last_name_ends {
            assert!(parse(&bytes[..cut], 2).is_err(), "{cut}");
        }
        assert!(parse(&bytes, 3).is_err());
        assert!(parse(&serialize(&[all[0].clone(), all[0].clone()]), 2).unwrap_err().contains("twice"));
    }

    #[test]
    fn what_cannot_be_used_says_why() {
        let geometry = Geometry::new(3, 16, 4, false).unwrap();
        let good = Listed { extra: Vec::new(), ..listed("a", BitmapFlags::AUTO) };
        assert_eq!(good.unusable(&geometry, 1 << 20), None);
        let extra_is_fine = Listed { extra: vec![1], flags: BitmapFlags::EXTRA_COMPATIBLE, ..good.clone() };
        assert_eq!(extra_is_fine.unusable(&geometry, 1 << 20), None);
        for bad in [
            Listed { flags: BitmapFlags::IN_USE, ..good.clone() },
            Listed { flags: BitmapFlags::from_bits_retain(8), ..good.clone() },
            Listed { kind: 2, ..good.clone() },
            Listed { extra: vec![1], ..good.clone() },
            Listed { granularity_bits: 63, ..good.clone() },
            Listed { granularity_bits: 0, ..good.clone() },
            Listed { table: TableRef { count: 2, ..good.table }, ..good.clone() },
        ] {
            assert!(bad.unusable(&geometry, 1 << 20).is_some(), "{bad:?}");
        }
        // More bits than are read, although the table would be long enough.
        assert!(good.unusable(&geometry, 1 << 60).is_some());
    }
}
