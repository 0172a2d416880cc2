//! The qcow2 image format, versions 2 and 3.
//!
//! # On-disk structures
//! [`Header`], [`Geometry`] and the entry views ([`L1Entry`], [`L2Entry`]) turn bytes into validated values: an image
//! that breaks the format's rules, or needs what is not supported, is refused with the field, the value found and what
//! to do. Every length that a file claims is bounded ([`limits`]) before anything is allocated for it.
//!
//! # The driver
//! [`Qcow2`] is an open image. Reads, and writes to what is mapped and not shared, take no lock but for a hash look-up.
//! Everything else that a guest, a copy-on-read or a job puts into the image holds the guest clusters that it changes,
//! and nothing larger: other clusters, new L2 tables and rounds of metadata go on at the same time.
//!
//! # Never
//! * A cluster whose *copied* flag is clear is written in place (a snapshot may share it): it is copied.
//! * An entry names a payload that is not stable, or a cluster whose refcount is not: see `write_back.rs` for the order
//!   of writes, which is that of `docs/media.md`.
//! * Space is reused while any operation may still touch it: see `in_flight.rs`.
//! * A range becomes absent over a backing, unless that is asked for by this name (`forget`, `make_empty`).
//! * Anything is written while an image is open read-only, or after one of its syncs has failed.
#![forbid(unsafe_code)]

mod bitmaps;
mod check;
mod compress;
mod create;
mod entry;
#[cfg(feature = "planted-faults")]
mod faults;
mod features;
mod fence;
mod format;
mod geometry;
mod header;
mod image;
mod in_flight;
mod journal;
mod l1;
mod lookup;
mod maintain;
mod node;
mod pack;
mod populate;
mod read;
mod refcount;
mod runs;
mod snapshots;
mod tree;
mod write;
mod write_back;
mod writer;
mod zero;

pub(crate) use infill_storage::unaligned as metaio;

pub use check::check;
pub use create::{CreateOptions, Preallocation, create};
pub use entry::{
    CompressedCluster, EntryError, EntryRule, L1Entry, L2Entry, L2TableRef, L2View, StandardCluster,
    SubclusterState, refcount_block, refcount_get, refcount_set,
};
#[cfg(feature = "planted-faults")]
pub use faults::Fault;
pub use features::{Autoclear, Compatible, Compression, Incompatible};
pub use fence::set_fence;
pub use format::limits;
pub use geometry::{
    Geometry, GuestCluster, GuestOffset, HostCluster, HostOffset, L1Index, L2Index, SUBCLUSTERS,
};
pub use header::{
    BitmapDirectory, Extension, Header, HeaderChange, HeaderRewrite, Purpose, TableRef, WriteGate, probe,
};
pub use image::{METADATA_CACHE_BYTES, OpenOptions};
pub use node::{MOVED_FACT, Qcow2};
