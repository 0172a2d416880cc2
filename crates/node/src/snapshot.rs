//! Internal snapshots, as nodes tell of them.

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
