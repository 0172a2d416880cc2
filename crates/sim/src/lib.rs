//! A deterministic world to test in: a scheduler with a virtual clock, a disk with a crash model, a network.
//!
//! Everything that happens by chance (which task runs, how long an operation takes, what a power cut leaves) is
//! decided by a seed, so that a failure is repeated by its seed. For tests only.
#![forbid(unsafe_code)]

mod crash;
mod disk;
mod journal;
mod media;
mod pipe;
mod rng;
mod world;

pub use crash::{Boundary, CrashPoint, Pending, PendingOp};
pub use disk::{DiskOp, DiskOptions, Hold, SimDisk};
pub use journal::JournalPages;
pub use media::{Media, SECTOR_BYTES};
pub use pipe::{pipe, torn_pipe};
pub use rng::Rng;
pub use world::{World, block_on};
