//! Kinds, states and verbs of jobs, and the two tables that managers rely on: which state follows which, and which verb
//! is taken in which state. They are those of QEMU's job interface.

use serde::{Deserialize, Serialize};

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobType {
    /// Writes an overlay's data down into its base.
    Commit,
    /// Fills an overlay from what lies below.
    Stream,
    /// Copies a disk to a second node while the guest writes.
    Mirror,
    /// Copies a disk as it was at one instant.
    Backup,
    /// Creates an image.
    Create,
    /// Changes an image's options.
    Amend,
}

impl JobType {
    /// Its name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            JobType::Commit => "commit",
            JobType::Stream => "stream",
            JobType::Mirror => "mirror",
            JobType::Backup => "backup",
            JobType::Create => "create",
            JobType::Amend => "amend",
        }
    }

    /// Whether `block-job-*` commands and `BLOCK_JOB_*` events know it.
    pub const fn is_block_job(self) -> bool {
        !matches!(self, JobType::Create | JobType::Amend)
    }
}

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobStatus {
    /// Exists, and has not begun.
    Created,
    /// At work.
    Running,
    /// Asked to pause, or stopped by an error, while running.
    Paused,
    /// Converged; waits to be told to complete.
    Ready,
    /// Paused while ready.
    Standby,
    /// Its work is done; others of its transaction are not.
    Waiting,
    /// Its work is done; changes to the graph are left to do (`job-finalize` where that is not automatic).
    Pending,
    /// Cancelled or failed, and cleaning up.
    Aborting,
    /// Over; waits to be dismissed where that is not automatic.
    Concluded,
    /// Gone. Seen only in the last event.
    Null,
}

impl JobStatus {
    /// All states, in the order of the interface.
    pub const ALL: [JobStatus; 10] = [
        JobStatus::Created,
        JobStatus::Running,
        JobStatus::Paused,
        JobStatus::Ready,
        JobStatus::Standby,
        JobStatus::Waiting,
        JobStatus::Pending,
        JobStatus::Aborting,
        JobStatus::Concluded,
        JobStatus::Null,
    ];

    /// Its name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            JobStatus::Created => "created",
            JobStatus::Running => "running",
            JobStatus::Paused => "paused",
            JobStatus::Ready => "ready",
            JobStatus::Standby => "standby",
            JobStatus::Waiting => "waiting",
            JobStatus::Pending => "pending",
            JobStatus::Aborting => "aborting",
            JobStatus::Concluded => "concluded",
            JobStatus::Null => "null",
        }
    }

    /// Whether `next` may follow directly.
    pub const fn may_become(self, next: JobStatus) -> bool {
        use JobStatus::{
            Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting,
        };
        match self {
            Created => matches!(next, Running | Aborting | Null),
            Running => matches!(next, Paused | Ready | Waiting | Aborting),
            Paused => matches!(next, Running),
            Ready => matches!(next, Standby | Waiting | Aborting),
            Standby => matches!(next, Ready),
            Waiting => matches!(next, Pending | Aborting),
            Pending => matches!(next, Aborting | Concluded),
            Aborting => matches!(next, Concluded),
            Concluded => matches!(next, Null),
            Null => false,
        }
    }

    /// Whether `verb` is taken in this state.
    pub const fn takes(self, verb: JobVerb) -> bool {
        use JobStatus::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
        match verb {
            JobVerb::Cancel => {
                matches!(self, Created | Running | Paused | Ready | Standby | Waiting | Pending)
            }
            JobVerb::Pause | JobVerb::Resume | JobVerb::SetSpeed | JobVerb::Change => {
                matches!(self, Created | Running | Paused | Ready | Standby)
            }
            JobVerb::Complete => matches!(self, Ready | Standby),
            JobVerb::Finalize => matches!(self, Pending),
            JobVerb::Dismiss => matches!(self, Concluded),
        }
    }
}

/// What a manager may ask of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobVerb {
    /// Give up.
    Cancel,
    /// Stop for a while.
    Pause,
    /// Go on.
    Resume,
    /// Limit its rate.
    SetSpeed,
    /// Leave *ready* and end.
    Complete,
    /// Forget it.
    Dismiss,
    /// Make the changes that it has prepared.
    Finalize,
    /// Change its options.
    Change,
}

impl JobVerb {
    /// All verbs.
    pub const ALL: [JobVerb; 8] = [
        JobVerb::Cancel,
        JobVerb::Pause,
        JobVerb::Resume,
        JobVerb::SetSpeed,
        JobVerb::Complete,
        JobVerb::Dismiss,
        JobVerb::Finalize,
        JobVerb::Change,
    ];

    /// Its name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            JobVerb::Cancel => "cancel",
            JobVerb::Pause => "pause",
            JobVerb::Resume => "resume",
            JobVerb::SetSpeed => "set-speed",
            JobVerb::Complete => "complete",
            JobVerb::Dismiss => "dismiss",
            JobVerb::Finalize => "finalize",
            JobVerb::Change => "change",
        }
    }
}

/// How the last I/O of a block job went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IoStatus {
    /// Well.
    #[default]
    Ok,
    /// It failed, and the job stopped.
    Failed,
    /// No space was left, and the job stopped.
    NoSpace,
}

impl IoStatus {
    /// Its name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            IoStatus::Ok => "ok",
            IoStatus::Failed => "failed",
            IoStatus::NoSpace => "nospace",
        }
    }
}

/// What a job is to do about an I/O error (`on-error`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum OnError {
    /// End with the error.
    #[default]
    Report,
    /// Say so in an event, leave the range out, go on, and end with the error.
    Ignore,
    /// Stop where no space is left, else as [`OnError::Report`].
    Enospc,
    /// Stop until resumed, then try again.
    Stop,
    /// As [`OnError::Enospc`].
    Auto,
}

impl OnError {
    /// The policy of that name on the wire.
    pub fn parse(name: &str) -> Option<OnError> {
        Some(match name {
            "report" => OnError::Report,
            "ignore" => OnError::Ignore,
            "enospc" => OnError::Enospc,
            "stop" => OnError::Stop,
            "auto" => OnError::Auto,
            _ => return None,
        })
    }

    /// What is done about an error, by this policy.
    pub fn action(self, no_space: bool) -> ErrorAction {
        match self {
            OnError::Report => ErrorAction::Report,
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto if no_space => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto => ErrorAction::Report,
        }
    }
}

/// What was done about an I/O error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorAction {
    /// Left out.
    Ignore,
    /// The job ends with it.
    Report,
    /// The job stopped.
    Stop,
}

impl ErrorAction {
    /// Its name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            ErrorAction::Ignore => "ignore",
            ErrorAction::Report => "report",
            ErrorAction::Stop => "stop",
        }
    }
}

/// Which half of a copy failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// The source.
    Read,
    /// The target.
    Write,
}

impl Operation {
    /// Its name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One row for each verb, one column for each state in the order of [`JobStatus::ALL`].
    #[test]
    fn a_verb_is_taken_in_exactly_the_states_of_the_interface() {
        let table = [
            (JobVerb::Cancel, "1111111000"),
            (JobVerb::Pause, "1111100000"),
            (JobVerb::Resume, "1111100000"),
            (JobVerb::SetSpeed, "1111100000"),
            (JobVerb::Complete, "0001100000"),
            (JobVerb::Dismiss, "0000000010"),
            (JobVerb::Finalize, "0000001000"),
            (JobVerb::Change, "1111100000"),
        ];
        assert_eq!(table.len(), JobVerb::ALL.len());
        for (verb, row) in table {
            for (state, taken) in JobStatus::ALL.into_iter().zip(row.chars()) {
                assert_eq!(state.takes(verb), taken == '1', "{verb:?} in {state:?}");
            }
        }
    }

    #[test]
    fn a_state_is_followed_by_exactly_the_states_of_the_interface() {
        //               CRPYSWDXEN
        let table = [
            (JobStatus::Created, "0100000101"),
            (JobStatus::Running, "0011010100"),
            (JobStatus::Paused, "0100000000"),
            (JobStatus::Ready, "0000110100"),
            (JobStatus::Standby, "0001000000"),
            (JobStatus::Waiting, "0000001100"),
            (JobStatus::Pending, "0000000110"),
            (JobStatus::Aborting, "0000000010"),
            (JobStatus::Concluded, "0000000001"),
            (JobStatus::Null, "0000000000"),
        ];
        for (state, row) in table {
            for (next, may) in JobStatus::ALL.into_iter().zip(row.chars()) {
                assert_eq!(state.may_become(next), may == '1', "{state:?} to {next:?}");
            }
        }
    }

    #[test]
    fn no_space_stops_only_where_the_policy_says_so() {
        for (policy, no_space, other) in [
            (OnError::Report, ErrorAction::Report, ErrorAction::Report),
            (OnError::Ignore, ErrorAction::Ignore, ErrorAction::Ignore),
            (OnError::Stop, ErrorAction::Stop, ErrorAction::Stop),
            (OnError::Enospc, ErrorAction::Stop, ErrorAction::Report),
            (OnError::Auto, ErrorAction::Stop, ErrorAction::Report),
        ] {
            assert_eq!((policy.action(true), policy.action(false)), (no_space, other), "{policy:?}");
        }
    }
}
