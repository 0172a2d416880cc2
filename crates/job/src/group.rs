//! Jobs that complete together or not at all (`completion-mode: grouped`).

use event_listener::Event;
use futures_util::future::select;
use infill_base::IoResult;
use infill_storage::sync::{Arc, Mutex, lock};

use crate::job::Job;

/// Some jobs, of which none goes on to its last changes before all have done the rest. When one fails or is cancelled, the
/// others are cancelled. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub struct Group(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    members: Mutex<Members>,
    changed: Event,
}

#[derive(Debug, Default)]
struct Members {
    /// Those that are not over.
    jobs: Vec<Job>,
    waiting: usize,
    /// How many have not begun again after a restart.
    absent: usize,
    /// One has failed or was cancelled.
    failed: bool,
    /// All have waited at once.
    released: bool,
}

impl Group {
    /// Nobody yet. All are to join in the turn of the reactor in which they are started.
    pub fn new() -> Group {
        Group::default()
    }

    /// Of so many that were together in a process before this one: they join as they begin again, and are waited for until then.
    pub fn of_absent(members: usize) -> Group {
        let group = Group::default();
        lock(&group.0.members).absent = members;
        group
    }

    /// One of those that were together before does not begin again: it is over, and has `succeeded` or not.
    pub fn absent_is_over(&self, succeeded: bool) {
        let mut members = lock(&self.0.members);
        members.absent = members.absent.saturating_sub(1);
        members.failed |= !succeeded;
        let others = if succeeded { Vec::new() } else { members.jobs.clone() };
        drop(members);
        self.0.changed.notify(usize::MAX);
        for other in others {
            let _over = other.cancel();
        }
    }

    pub(crate) fn join(&self, job: &Job) {
        let mut members = lock(&self.0.members);
        members.absent = members.absent.saturating_sub(1);
        members.jobs.push(job.clone());
        let failed = members.failed;
        drop(members);
        if failed {
            let _over = job.cancel();
        }
    }

    /// Waits for the others; a member that is cancelled meanwhile finds that out by `give_up`.
    pub(crate) async fn wait(&self, job: &Job, give_up: impl Fn() -> IoResult<()>) -> IoResult<()> {
        lock(&self.0.members).waiting += 1;
        loop {
            let (changed, own) = (self.0.changed.listen(), job.listen());
            give_up()?;
            {
                let mut members = lock(&self.0.members);
                if members.released || (members.absent == 0 && members.waiting == members.jobs.len()) {
                    members.released = true;
                    drop(members);
                    self.0.changed.notify(usize::MAX);
                    return Ok(());
                }
            }
            select(changed, own).await;
        }
    }

    /// A member is over; where it has not succeeded, the others are cancelled.
    pub(crate) fn left(&self, job: &Job, succeeded: bool) {
        let mut members = lock(&self.0.members);
        members.jobs.retain(|other| !other.is_same(job));
        members.failed |= !succeeded;
        let others = if succeeded { Vec::new() } else { members.jobs.clone() };
        drop(members);
        for other in others {
            // One that is over by itself refuses, and that is well.
            let _over = other.cancel();
        }
    }
}
