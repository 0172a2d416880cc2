//! Background jobs: their life cycle ([`Jobs`], [`Job`]), the job that fills an overlay ([`stream`]),
//! and the jobs that copy a disk ([`copy`]).
//!
//! The life cycle is QEMU's: states, verbs, events and error classes are values here, and whoever speaks a protocol
//! turns them into words. What never happens: a state that does not follow from the one before, an event out of order,
//! a job that is *completed* and not durable. A job's future runs on the reactor that started it; the handles are
//! shared between threads. A job costs one task and a few hundred bytes beside its own buffers.
#![forbid(unsafe_code)]

mod control;
pub mod copy;
mod error;
mod event;
mod forecast;
mod group;
mod job;
mod kept;
mod manager;
mod rate;
mod state;
pub mod stream;

pub use error::{ErrorClass, JobError};
pub use event::{BlockJobProgress, EVENTS_KEPT_MAX, Events, JobEvent};
pub use group::Group;
pub use job::{BlockJobInfo, Ending, Job, JobInfo, Work, WorkEnd};
pub use kept::{KeptJob, MapName};
pub use manager::{JOB_ID_BYTES_MAX, JOBS_MAX, JobOptions, Jobs};
pub use state::{ErrorAction, IoStatus, JobStatus, JobType, JobVerb, OnError, Operation};
