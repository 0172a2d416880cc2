//! The QED image format.
#![forbid(unsafe_code)]
#![expect(dead_code, reason = "the driver, which uses the rest, comes next")]

mod check;
mod create;
mod entry;
mod format;
mod geometry;
mod header;

pub use check::check;
pub use create::{CreateOptions, create};
pub use entry::{Cluster, EntryError};
pub use format::limits;
pub use geometry::{Geometry, GuestCluster, HostOffset, L1Index, L2Index, Layout};
pub use header::{Features, Header, probe};
