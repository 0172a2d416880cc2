//! Runs of a disk, and what is in them.

/// What a layer knows of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// This layer holds data.
    Data,
    /// This layer says: zeroes. Definite, whatever lies below.
    Zero,
    /// Nothing here: look in the backing, and where there is none, or it has ended, zeroes.
    Absent,
}

/// A run of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// What is there.
    pub kind: ExtentKind,
    /// Where in the node's file the first byte lies, for data (and preallocated zeroes) stored plainly.
    pub host: Option<u64>,
    /// Whether the data is compressed (`host` is then `None`).
    pub compressed: bool,
}

impl Extent {
    /// A run without a host offset.
    pub fn new(start: u64, len: u64, kind: ExtentKind) -> Extent {
        Extent { start, len, kind, host: None, compressed: false }
    }

    /// First byte behind the run.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// Runs in ascending order, without gaps, that cover a range from its start.
///
/// A driver may stop early (after a bounded number of look-ups); it covers at least one byte of a range that is
/// not empty, so asking again from the last end always gets on.
pub type Extents = Vec<Extent>;

/// Appends `next`, joined to the last run where both say the same and their host bytes are contiguous.
pub fn push_extent(extents: &mut Extents, next: Extent) {
    if next.len == 0 {
        return;
    }
    if let Some(last) = extents.last_mut() {
        debug_assert_eq!(last.end(), next.start, "extents leave a gap");
        let contiguous = match (last.host, next.host) {
            (None, None) => true,
            (Some(a), Some(b)) => a.checked_add(last.len) == Some(b),
            _ => false,
        };
        if last.kind == next.kind && last.compressed == next.compressed && contiguous {
            last.len += next.len;
            return;
        }
    }
    extents.push(next);
}
