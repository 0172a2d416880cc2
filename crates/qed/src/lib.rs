//! The QED image format: create, open, read, write, populate, zero, discard, grow, check and repair.
//!
//! # Structure
//! A file of clusters: header, one L1 table, L2 tables, data. [`Header`], [`Geometry`] and [`Cluster`] turn bytes into
//! validated values; an image that breaks the format's rules is refused with the field, the value found and what to
//! do. Clusters have no refcounts: a new one is taken by moving the end of the file on.
//!
//! # Concurrency
//! Allocation holds the guest clusters concerned and nothing else: any number of clusters, cached slices and L2 tables
//! are allocated at once. No lock is held across I/O; a guest's write never waits for a source because of a fill.
//!
//! # Durability
//! The module `rounds` has the order of writes, `image` the life cycle of the mark *need check*. Over a backing an
//! image is consistent at any moment; without one it is repaired at the next open after a crash.
//!
//! # What it costs
//! Opening reads the header (and all tables, where the image was not closed cleanly). A look-up costs two hash look-ups
//! and two atomic loads; a miss reads 4 KiB of a table. Memory is bounded by [`OpenOptions::metadata_cache_bytes`] and
//! [`COPY_UP_BYTES_MAX`]. Clusters that are replaced by zeroes or discarded leave holes in the file that only a copy
//! of the image gets rid of.
#![forbid(unsafe_code)]

mod check;
mod create;
mod entry;
mod fault;
mod format;
mod geometry;
mod header;
mod image;
mod journal;
mod node;
mod populate;
mod read;
mod rounds;
mod space;
mod tables;
mod write;
mod zero;

pub use check::check;
pub use create::{CreateOptions, create};
pub use entry::{Cluster, EntryError};
#[cfg(feature = "planted-faults")]
pub use fault::Fault;
pub use format::limits;
pub use geometry::{Geometry, GuestCluster, HostOffset, L1Index, L2Index, Layout};
pub use header::{Features, Header, VOLATILE_JOURNAL, probe};
pub use image::{COPY_UP_BYTES_MAX, NEED_CHECK_IDLE, OpenOptions};
pub use node::Qed;
