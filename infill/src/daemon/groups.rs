//! Jobs that complete together, after a restart: they wait for each other again, also for one that is held because its disk is
//! not there.

use std::cell::RefCell;
use std::collections::BTreeMap;

use infill_job::{Group, Job, JobStatus};

use super::control::Control;
use super::state::State;

/// The groups of jobs that a daemon before this one has started.
#[derive(Default)]
pub(super) struct Groups {
    /// By their numbers in the state.
    all: RefCell<BTreeMap<u64, Group>>,
    /// That of a job that is about to begin again, by its id.
    next: RefCell<BTreeMap<String, Group>>,
}

impl Control {
    fn group_of(&self, state: &State, id: &str) -> Option<Group> {
        let number = state.group_of(id)?;
        let mut all = self.groups.all.borrow_mut();
        let begin = || {
            let (members, failed) = state.members_of(number);
            let group = Group::of_absent(members + failed);
            (0..failed).for_each(|_| group.absent_is_over(false));
            group
        };
        Some(all.entry(number).or_insert_with(begin).clone())
    }

    /// The job `id` is about to begin again.
    pub(super) fn join_again(&self, state: &State, id: &str) {
        if let Some(group) = self.group_of(state, id) {
            self.groups.next.borrow_mut().insert(id.to_owned(), group);
        }
    }

    /// A job has begun: with those that it was together with before, if it was.
    pub(super) fn join_group(&self, job: &Job) {
        if let Some(group) = self.groups.next.borrow_mut().remove(job.id()) {
            job.join(&group);
        }
    }

    /// The job `id` has begun again (`made`), or will be tried again. One that could not go on is over, and the others with it.
    pub(super) fn has_joined_again(&self, state: &State, id: &str, made: bool) {
        let has_not_joined = self.groups.next.borrow_mut().remove(id).is_some();
        let is_over = self.jobs().get(id).is_ok_and(|job| job.status() == JobStatus::Concluded);
        if made && has_not_joined && is_over {
            self.absent_is_over(state, id);
        }
    }

    /// The job `id`, which has not begun again, does not.
    pub(super) fn absent_is_over(&self, state: &State, id: &str) {
        if let Some(group) = self.group_of(state, id) {
            group.absent_is_over(false);
        }
    }
}
