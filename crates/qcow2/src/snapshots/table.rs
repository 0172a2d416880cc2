//! The table of internal snapshots: its bytes, and what they say.
//!
//! Entries that are there are kept byte for byte. Nothing that a table claims is believed before it was bounded.

use infill_node::Snapshot;
use zerocopy::{FromBytes, IntoBytes};

use crate::format::limits::{L1_BYTES_MAX, SNAPSHOT_TABLE_BYTES_MAX};
use crate::format::{RawSnapshot, SNAPSHOT_EXTRA_BYTES_MAX};
use crate::geometry::{HostOffset, TABLE_ENTRY_BYTES};
use crate::header::TableRef;

/// Bytes of extra data that we write: size of the machine's state, size of the disk, count of instructions.
const EXTRA_BYTES: usize = 24;
/// An icount of this is none.
const NO_ICOUNT: u64 = u64::MAX;

/// One snapshot of the table.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    pub(crate) snapshot: Snapshot,
    /// Its L1 table.
    pub(crate) l1: TableRef,
    /// The entry, padded.
    bytes: Vec<u8>,
}

impl Listed {
    /// The entry of a new snapshot.
    pub(crate) fn new(snapshot: Snapshot, l1: TableRef) -> Listed {
        let raw = RawSnapshot {
            l1_table_offset: l1.at.0.into(),
            l1_size: l1.count.into(),
            id_size: (snapshot.id.len() as u16).into(),
            name_size: (snapshot.name.len() as u16).into(),
            date_sec: snapshot.date_sec.into(),
            date_nsec: snapshot.date_nsec.into(),
            vm_clock_nsec: snapshot.vm_clock_nsec.into(),
            vm_state_size: 0.into(),
            extra_data_size: (EXTRA_BYTES as u32).into(),
        };
        let mut bytes = raw.as_bytes().to_vec();
        bytes.extend(snapshot.vm_state_bytes.to_be_bytes());
        bytes.extend(snapshot.disk_bytes.unwrap_or(0).to_be_bytes());
        bytes.extend(snapshot.icount.unwrap_or(NO_ICOUNT).to_be_bytes());
        bytes.extend(snapshot.id.as_bytes());
        bytes.extend(snapshot.name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        Listed { snapshot, l1, bytes }
    }

    /// From the start of `bytes`; an error says what is wrong.
    fn parse(bytes: &[u8]) -> Result<Listed, String> {
        let (raw, rest) = RawSnapshot::read_from_prefix(bytes).map_err(|_| "ends too early".to_owned())?;
        let extra_len = raw.extra_data_size.get();
        if extra_len > SNAPSHOT_EXTRA_BYTES_MAX {
            return Err(format!(
                "has {extra_len} bytes of extra data, at most {SNAPSHOT_EXTRA_BYTES_MAX} are known"
            ));
        }
        let (extra_len, id_len, name_len) =
            (extra_len as usize, usize::from(raw.id_size.get()), usize::from(raw.name_size.get()));
        let len = size_of::<RawSnapshot>() + extra_len + id_len + name_len;
        let (Some(extra), Some(names)) =
            (rest.get(..extra_len), rest.get(extra_len..extra_len + id_len + name_len))
        else {
            return Err("ends too early".into());
        };
        let word = |nth: usize| {
            let bytes = extra.get(nth * 8..nth * 8 + 8)?;
            Some(bytes.iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte)))
        };
        if u64::from(raw.l1_size.get()) * TABLE_ENTRY_BYTES > L1_BYTES_MAX {
            return Err(format!("has an L1 table of {} entries, which is too long", raw.l1_size.get()));
        }
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let snapshot = Snapshot {
            id: text(&names[..id_len]),
            name: text(&names[id_len..]),
            vm_state_bytes: word(0).unwrap_or(u64::from(raw.vm_state_size.get())),
            date_sec: raw.date_sec.get(),
            date_nsec: raw.date_nsec.get(),
            vm_clock_nsec: raw.vm_clock_nsec.get(),
            icount: word(2).filter(|icount| *icount != NO_ICOUNT),
            disk_bytes: word(1),
        };
        let l1 = TableRef { at: HostOffset(raw.l1_table_offset.get()), count: raw.l1_size.get() };
        let mut bytes = bytes[..len].to_vec();
        bytes.resize(len.next_multiple_of(8), 0);
        Ok(Listed { snapshot, l1, bytes })
    }
}

/// The entries of a table, from bytes that begin with it and may go on behind it.
pub(crate) fn parse(bytes: &[u8], count: u32) -> Result<Vec<Listed>, String> {
    let (mut list, mut at) = (Vec::new(), 0);
    for nth in 0..count {
        let rest = bytes.get(at..).unwrap_or(&[]);
        let listed =
            Listed::parse(rest).map_err(|what| format!("entry {nth} of its snapshot table {what}"))?;
        at += listed.bytes.len();
        list.push(listed);
    }
    Ok(list)
}

/// The bytes of a table of these entries; `None`: it would be too long.
pub(crate) fn serialize(list: &[Listed]) -> Option<Vec<u8>> {
    let bytes: Vec<u8> = list.iter().flat_map(|listed| listed.bytes.iter().copied()).collect();
    (bytes.len() as u64 <= SNAPSHOT_TABLE_BYTES_MAX).then_some(bytes)
}

/// How many bytes these entries take.
pub(crate) fn len(list: &[Listed]) -> u64 {
    list.iter().map(|listed| listed.bytes.len() as u64).sum()
}

/// An id that no snapshot has: the next number, as QEMU counts.
pub(crate) fn free_id(list: &[Listed]) -> String {
    let numbers = list.iter().filter_map(|listed| listed.snapshot.id.parse::<u32>().ok());
    (u64::from(numbers.max().unwrap_or(0)) + 1).to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn snapshot(id: &str, name: &str) -> Snapshot {
        Snapshot {
            id: id.into(),
            name: name.into(),
            vm_state_bytes: 5 << 32,
            date_sec: 7,
            date_nsec: 8000,
            vm_clock_nsec: 1 << 40,
            icount: None,
            disk_bytes: Some(1 << 30),
        }
    }

    #[test]
    fn a_table_comes_back_as_it_was_put_in() {
        let l1 = TableRef { at: HostOffset(0x50000), count: 3 };
        let list = vec![Listed::new(snapshot("1", "first"), l1), Listed::new(snapshot("12", ""), l1)];
        let bytes = serialize(&list).unwrap();
        assert_eq!(bytes.len() as u64, len(&list));
        let found = parse(&[&bytes[..], &[0xff; 40]].concat(), 2).unwrap();
        for (one, other) in list.iter().zip(&found) {
            assert_eq!((&one.snapshot, one.l1, &one.bytes), (&other.snapshot, other.l1, &other.bytes));
        }
        assert_eq!(free_id(&found), "13");
        assert_eq!(free_id(&[]), "1");
        assert!(parse(&bytes[..bytes.len() - 9], 2).unwrap_err().contains("entry 1"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), count in 0u32..5) {
            let _ = parse(&bytes, count);
        }
    }
}
