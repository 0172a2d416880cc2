//! What of a job outlives its process.
//!
//! A job goes on by being started again by the same command: what is done is read from the images or from its map, so only
//! what its manager has said since, how it ended, and whose map is its own, is kept here.

use serde::{Deserialize, Serialize};

use crate::job::Ending;
use crate::manager::JobOptions;
use crate::state::IoStatus;

/// Tells the map of a copy from all others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapName {
    /// The run of the job.
    pub generation: u64,
    /// Job, source and target.
    pub identity: String,
    /// Size of the disk, in bytes.
    pub len: u64,
    /// The node whose changes keep it true, where anybody changes one.
    pub watched: Option<String>,
    /// Bytes that one bit of a map of what guests have written since stands for, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
    /// Whether there are receipts of what the target has.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub given: bool,
}

/// What of a job outlives its process, beside the command that started it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptJob {
    /// Whether it was paused, by its manager or by an error.
    pub paused: bool,
    /// Whether it was cancelled.
    pub cancelled: bool,
    /// Whether it was told to make its last changes.
    pub finalize_asked: bool,
    /// How it was told to end once it is *ready*, if it was.
    pub ending: Option<Ending>,
    /// Whether it is over, and only waits to be dismissed.
    pub concluded: bool,
    /// Whether it finalizes itself.
    pub auto_finalize: bool,
    /// Whether it dismisses itself.
    pub auto_dismiss: bool,
    /// Its rate limit now, in bytes per second; 0 is none.
    pub speed: u64,
    /// Where it stood, in bytes.
    pub offset: u64,
    /// Where it ends, in bytes.
    pub len: u64,
    /// How its last I/O went.
    pub io_status: IoStatus,
    /// Why it failed, if it did.
    pub error: Option<String>,
    /// Whether it was changed to have guests' writes on its target before they are answered.
    #[serde(default)]
    pub write_blocking: bool,
    /// Why it did not get on.
    pub waiting_for: Option<String>,
    /// Where what is left to do is kept, of a copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<MapName>,
}

impl KeptJob {
    /// Of a job that has not begun.
    pub fn of(options: &JobOptions) -> KeptJob {
        KeptJob {
            auto_finalize: options.auto_finalize,
            auto_dismiss: options.auto_dismiss,
            speed: options.speed,
            ..KeptJob::default()
        }
    }

    /// Whether anything but how far it is, which is read from the images, differs.
    pub fn differs(&self, other: &KeptJob) -> bool {
        let still = |kept: &KeptJob| KeptJob { offset: 0, len: 0, ..kept.clone() };
        still(self) != still(other)
    }

    /// What it is once it is over because it was cancelled.
    pub fn into_cancelled(self) -> KeptJob {
        KeptJob { concluded: true, error: Some(crate::job::CANCELLED.into()), ..self }
    }
}
