//! Whether a target has what the map of its copy says that it has: looked at where nothing else tells.
//!
//! When a file was written to last can be seen; what the server of an export has done since the last process is seen by
//! nobody. A server that has lost its memory, another disk behind the same name or one that was put back to an older state
//! differs from the source nearly everywhere. So some blocks all over the disk are compared. This finds a mistake; it is no
//! proof that nobody has written a single block.

use futures_util::stream::{self, StreamExt};
use infill_base::{Ctx, IoError, align_down};
use infill_node::{DirtyMap, NodeHandle};

use super::{BLOCK_BYTES, GivenMap, KeptMap};

/// Blocks that are compared.
const SAMPLES: u64 = 64;
/// How many of them at once.
const AT_ONCE: usize = 16;

/// What is kept of a copy, to be looked at.
#[derive(Clone, Copy, Debug)]
pub struct Looked<'a> {
    /// Its map.
    pub map: &'a KeptMap,
    /// What guests have written since it began, where that is kept.
    pub since: Option<&'a KeptMap>,
    /// Its receipts, where there are any.
    pub given: Option<&'a GivenMap>,
    /// Whether it is of a copy of the past.
    pub is_of_the_past: bool,
    /// Whether its source may lose what no sync has covered.
    pub from_server: bool,
}

/// Why a map is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unproven {
    /// What it says is not so.
    Never(String),
    /// It could not be looked at: nothing speaks against it.
    NotNow(String),
}

impl<T: Into<String>> From<T> for Unproven {
    fn from(why: T) -> Unproven {
        Unproven::Never(why.into())
    }
}

impl Unproven {
    /// A disk could not be read.
    pub(super) fn unread(what: &str, error: &IoError) -> Unproven {
        Unproven::NotNow(format!("{what} cannot be read: {error}"))
    }
}

impl std::fmt::Display for Unproven {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Unproven::Never(why) | Unproven::NotNow(why)) = self;
        f.write_str(why)
    }
}

/// Compares blocks that the target has with the source: those that the map of a mirror of all the disk or of a commit says, or of
/// a mirror of a part those that there are receipts of. Of a backup it is its receipts that are looked at. What is kept is kept
/// true meanwhile. The error says what is wrong.
pub async fn has_what_it_should(
    kept: Looked<'_>,
    source: &NodeHandle,
    target: &NodeHandle,
) -> Result<(), Unproven> {
    let map = kept.map;
    if kept.is_of_the_past {
        let given = kept.given.ok_or("there are no receipts of what was copied")?;
        let has_left = map.walked() < map.disk_bytes() || map.has_marked(0, map.disk_bytes());
        let source = match (kept.from_server && has_left, kept.since) {
            (true, Some(since)) => Some((source, since)),
            (true, None) => return Err("it is not known what was written since it began".into()),
            (false, _) => None,
        };
        return given.check(target, source).await;
    }
    let compare = |at: u64| async move {
        let len = BLOCK_BYTES.min(source.len().saturating_sub(at)) as usize;
        let there = target.read_vec(&Ctx::FILL, at, len).await;
        let there = there.map_err(|error| Unproven::unread("the target", &error))?;
        let wanted = source.read_vec(&Ctx::FILL, at, len).await;
        let wanted = wanted.map_err(|error| Unproven::unread("the source", &error))?;
        // Written to meanwhile: it is marked by then.
        if there == wanted || map.has_marked(at, len as u64) {
            return Ok(());
        }
        Err(format!("the target does not have what was written to it at byte {at}").into())
    };
    let results: Vec<_> =
        stream::iter(kept.given.map_or_else(|| picked(map), |given| given.places()).into_iter().map(compare))
            .buffered(AT_ONCE)
            .collect()
            .await;
    results.into_iter().collect()
}

/// Blocks all over what the target has.
fn picked(map: &KeptMap) -> Vec<u64> {
    let (unit, end) = (map.granularity(), align_down(map.walked(), map.granularity()));
    let marked = DirtyMap::new(map.disk_bytes(), unit);
    map.copy_into(&marked);
    let (mut there, mut next) = (Vec::new(), 0);
    while next < end {
        let run = marked.next_dirty(next, u64::MAX).unwrap_or(end..end);
        if next < run.start {
            there.push(next..run.start.min(end));
        }
        next = run.end.max(next + unit);
    }
    let units: u64 = there.iter().map(|run| (run.end - run.start) / unit).sum();
    let count = units.min(SAMPLES);
    let mut random = map.generation() | 1;
    let nth_unit = |mut nth: u64| {
        there.iter().find_map(|run| {
            let units = (run.end - run.start) / unit;
            let found = (nth < units).then(|| run.start + nth * unit);
            nth = nth.saturating_sub(units);
            found
        })
    };
    (0..count)
        .filter_map(|nth| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let (first, last) = (nth * units / count, (nth + 1) * units / count);
            nth_unit(first + random % (last - first))
        })
        .collect()
}
