//! A disk changes hands, then its data follows: the protocol between the two owners, and what it is made of.
//!
//! [`Source`] and [`Target`] are the two ends of one migration of all disks of one machine. They do no I/O and know no
//! clock: inputs go in (messages, ends of operations, timers, an operator's words, what a guest does), actions come out,
//! and what holds at any instant is a pure function of them: the [`Gate`] before the guest, the [`Exports`] for the peer.
//! A driver carries the actions out; the model in `tests/model` explores every order in which it can.
//!
//! What never happens, whatever is lost, late or killed: two sides that run a guest; a message that depends on a record
//! which is not on the disk (it cannot be made: see `durable`); a stale block that is read ([`Writes`], [`BlockMap`]).
//! The states, and which test checks which promise, are in `docs/migration.md`.
//!
//! Cost: a machine is a few hundred bytes, the map of a disk a byte and its dirty bitmap a bit for each block.
#![forbid(unsafe_code)]

mod durable;
mod fault;
mod gate;
mod ids;
mod map;
mod message;
mod record;
mod set;
mod source;
mod target;
mod wire;
mod writes;

pub use durable::{Pending, Settled};
#[cfg(feature = "planted-faults")]
pub use fault::Fault;
pub use gate::{Gate, SourcePhase, source_gate, target_gate};
pub use ids::{
    BitmapId, DiskId, EPOCH_MAX, Epoch, FORCED_TERMS, MigrationId, ROUNDS_MAX, Round, Side, TERM_MAX,
    TERM_SPOKEN_MAX, Term,
};
pub use map::{Block, BlockMap, Fetch, Filled, Filling, Linked, ReadFrom, WrongOwner};
pub use message::{Body, Holder, Message, Outgoing, Standing, Swap};
pub use record::{
    BLOCK_BYTES, BLOCKS_MAX, DISKS_MAX, Disk, NAME_BYTES_MAX, Plan, RECORD_BYTES_MAX, Record, RecordError,
    SourceState, State, TargetState,
};
pub use set::BlockSet;
pub use source::{Drain, Exports, Source, SourceAction, SourceInput};
pub use target::{Demoted, Demotion, Ownership, Target, TargetAction, TargetInput};
pub use wire::{FRAME_BYTES_MAX, Frame, SETS_BLOCKS_MAX, WIRE_VERSION, WireError};
pub use writes::{Answer, NotDrained, Writes, Writing};

/// The machine waits for the end of an operation: the input comes back, to be given again after it.
#[derive(Debug)]
pub struct Busy<I>(pub I);
