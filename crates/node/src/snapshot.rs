//! Internal snapshots, as nodes tell of them.

use std::time::{SystemTime, UNIX_EPOCH};

/// A snapshot that an image keeps of its disk, in itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// What it is called by the image: unique in it.
    pub id: String,
    /// What it is called by people: need not be unique.
    pub name: String,
    /// Bytes of the state of a machine that is kept with it.
    pub vm_state_bytes: u64,
    /// When it was made: seconds since 1970.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// The machine's clock then, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// The machine's count of instructions then, where it is known.
    pub icount: Option<u64>,
    /// Size of the disk then, in bytes, where it is known.
    pub disk_bytes: Option<u64>,
}

impl Snapshot {
    /// One of that name, made at `time`, of a disk without a machine; its image gives it an id.
    pub fn made_at(name: &str, time: SystemTime) -> Snapshot {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Snapshot {
            id: String::new(),
            name: name.to_owned(),
            vm_state_bytes: 0,
            date_sec: since.as_secs() as u32,
            date_nsec: since.subsec_nanos(),
            vm_clock_nsec: 0,
            icount: None,
            disk_bytes: None,
        }
    }
}
