//! What jobs tell, as values: whoever speaks a protocol turns them into its events.

use std::collections::VecDeque;

use event_listener::Event;
use infill_storage::sync::{Arc, Mutex, Weak, lock};

use crate::state::{ErrorAction, JobStatus, JobType, Operation};

/// Events kept for a subscriber that does not take them. At more the oldest goes, and is counted.
pub const EVENTS_KEPT_MAX: usize = 16 << 10;

/// Where a block job stands (the data that several `BLOCK_JOB_*` events share).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockJobProgress {
    /// What the job does.
    pub kind: JobType,
    /// The job's id.
    pub device: String,
    /// Progress at the end, in bytes.
    pub len: u64,
    /// Progress now, in bytes.
    pub offset: u64,
    /// Rate limit in bytes per second; 0 is none.
    pub speed: u64,
}

/// What happened to a job.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum JobEvent {
    /// `JOB_STATUS_CHANGE`.
    StatusChange {
        /// The job.
        id: String,
        /// Its state from now on.
        status: JobStatus,
    },
    /// `BLOCK_JOB_COMPLETED`. Without an error it is durable (P4).
    BlockJobCompleted {
        /// Where it stood.
        progress: BlockJobProgress,
        /// Why it failed, if it did.
        error: Option<String>,
    },
    /// `BLOCK_JOB_CANCELLED`.
    BlockJobCancelled(BlockJobProgress),
    /// `BLOCK_JOB_READY`.
    BlockJobReady(BlockJobProgress),
    /// `BLOCK_JOB_PENDING`.
    BlockJobPending {
        /// What the job does.
        kind: JobType,
        /// The job.
        id: String,
    },
    /// `BLOCK_JOB_ERROR`.
    BlockJobError {
        /// The job.
        device: String,
        /// What failed.
        operation: Operation,
        /// What was done about it.
        action: ErrorAction,
        /// Why, for logs (the protocol's event has no room for it).
        reason: String,
    },
    /// `__INFILL_JOB_PROGRESS`, at most one a second.
    Progress {
        /// Where it stands.
        progress: BlockJobProgress,
        /// Of that, bytes known to be on stable storage.
        durable: u64,
        /// Seconds until its end, if it goes on as it did; `None` while that is not known.
        seconds_left: Option<u64>,
    },
    /// `__INFILL_JOB_DURABLE`: everything the job has written is on stable storage.
    Durable {
        /// The job.
        id: String,
        /// How many bytes that is, in the unit of its progress.
        bytes: u64,
    },
    /// `__INFILL_SOURCE_LOST`: the job waits for its source.
    SourceLost {
        /// The job.
        id: String,
        /// Why.
        reason: String,
    },
    /// `__INFILL_SOURCE_BACK`: it goes on.
    SourceBack {
        /// The job.
        id: String,
    },
}

impl JobEvent {
    /// The id of the job.
    pub fn job(&self) -> &str {
        match self {
            JobEvent::BlockJobCompleted { progress, .. }
            | JobEvent::BlockJobCancelled(progress)
            | JobEvent::BlockJobReady(progress)
            | JobEvent::Progress { progress, .. } => &progress.device,
            JobEvent::BlockJobError { device, .. } => device,
            JobEvent::StatusChange { id, .. }
            | JobEvent::BlockJobPending { id, .. }
            | JobEvent::Durable { id, .. }
            | JobEvent::SourceLost { id, .. }
            | JobEvent::SourceBack { id } => id,
        }
    }
}

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<JobEvent>,
    lost: u64,
}

#[derive(Debug, Default)]
struct Inbox {
    queue: Mutex<Queue>,
    arrived: Event,
}

/// A subscriber's events, in the order in which they happened. Ends when it is dropped.
#[derive(Debug)]
pub struct Events(Arc<Inbox>);

impl Events {
    /// The next event, if one is there.
    pub fn try_next(&self) -> Option<JobEvent> {
        lock(&self.0.queue).events.pop_front()
    }

    /// The next event, waiting for it.
    pub async fn next(&self) -> JobEvent {
        loop {
            let arrived = self.0.arrived.listen();
            if let Some(event) = self.try_next() {
                return event;
            }
            arrived.await;
        }
    }

    /// How many events were dropped because they were not taken ([`EVENTS_KEPT_MAX`]).
    pub fn lost(&self) -> u64 {
        lock(&self.0.queue).lost
    }
}

/// Gives every event to every subscriber.
#[derive(Debug, Default)]
pub(crate) struct Broadcast(Mutex<Vec<Weak<Inbox>>>);

impl Broadcast {
    pub(crate) fn subscribe(&self) -> Events {
        let inbox = Arc::new(Inbox::default());
        let mut inboxes = lock(&self.0);
        inboxes.retain(|other| other.strong_count() > 0);
        inboxes.push(Arc::downgrade(&inbox));
        Events(inbox)
    }

    pub(crate) fn send(&self, event: &JobEvent) {
        for inbox in lock(&self.0).iter().filter_map(Weak::upgrade) {
            {
                let mut queue = lock(&inbox.queue);
                if queue.events.len() == EVENTS_KEPT_MAX {
                    queue.events.pop_front();
                    queue.lost += 1;
                }
                queue.events.push_back(event.clone());
            }
            inbox.arrived.notify(usize::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subscriber_that_sleeps_costs_bounded_memory_and_learns_what_it_lost() {
        let broadcast = Broadcast::default();
        let events = broadcast.subscribe();
        for nth in 0..EVENTS_KEPT_MAX + 3 {
            broadcast.send(&JobEvent::SourceBack { id: nth.to_string() });
        }
        assert_eq!(events.lost(), 3);
        assert_eq!(events.try_next(), Some(JobEvent::SourceBack { id: "3".into() }));
        assert_eq!(std::iter::from_fn(|| events.try_next()).count(), EVENTS_KEPT_MAX - 1);
    }
}
