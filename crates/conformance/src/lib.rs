//! The proof of the write path, and one suite for every storage and every node.
//!
//! * [`Model`] is the reference: which values every sector of a disk may show, now and after a crash.
//! * [`Guest`] drives a node with generated operations and tells the model.
//! * [`storage_suite`] and [`node_suite`] say what every storage and every node does.
//! * [`crash`] cuts the power at every boundary of a write, and kills the process there; [`order`] asserts the
//!   order of writes from the record of the disk; [`referee`] lets `qemu-img` judge a sample.
//!
//! Only tests use this crate. It never decides what is right by asking the code under test: contents come from the
//! model, structures from parsers of its own, and `qemu-img` is the referee of a sample.
#![forbid(unsafe_code)]

pub mod crash;
mod format;
mod guest;
pub mod layout;
mod model;
pub mod node_suite;
pub mod order;
pub mod payload;
pub mod referee;
pub mod stack;
pub mod storage_suite;

pub use format::{Format, Qcow2Shape, QedShape};
pub use guest::{Generator, Guest, GuestOp, Mix, Violation, read_all};
pub use model::{Change, ChangeTicket, Mismatch, Model, Outcome, ReadTicket, SECTOR_BYTES, SyncTicket};
