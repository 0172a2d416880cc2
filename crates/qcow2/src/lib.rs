//! The qcow2 image format, versions 2 and 3.
//!
//! # On-disk structures
//! [`Header`], [`Geometry`] and the entry views ([`L1Entry`], [`L2Entry`]) turn bytes into validated values: an image
//! that breaks the format's rules, or needs what is not supported, is refused with the field, the value found and what
//! to do. Every length that a file claims is bounded ([`limits`]) before anything is allocated for it.
#![forbid(unsafe_code)]

mod check;
#[cfg_attr(not(test), expect(dead_code, reason = "for the driver"))]
mod compress;
mod create;
mod entry;
mod features;
mod format;
mod geometry;
mod header;
mod image;
#[allow(dead_code, reason = "writes come next")]
mod in_flight;
#[allow(dead_code, reason = "writes come next")]
mod l1;
#[allow(dead_code, reason = "writes come next")]
mod lookup;
mod node;
mod read;
#[expect(dead_code, reason = "for the driver")]
mod refcount;

pub(crate) use infill_storage::unaligned as metaio;

pub use check::check;
pub use create::{CreateOptions, create};
pub use entry::{
    CompressedCluster, EntryError, EntryRule, L1Entry, L2Entry, L2TableRef, L2View, StandardCluster,
    SubclusterState, refcount_block, refcount_get, refcount_set,
};
pub use features::{Autoclear, Compatible, Compression, Incompatible};
pub use format::limits;
pub use geometry::{
    Geometry, GuestCluster, GuestOffset, HostCluster, HostOffset, L1Index, L2Index, SUBCLUSTERS,
};
pub use header::{
    BackingRewrite, BitmapDirectory, Extension, Header, HeaderChange, Purpose, TableRef, WriteGate, probe,
};
pub use image::{METADATA_CACHE_BYTES, OpenOptions};
pub use node::Qcow2;
