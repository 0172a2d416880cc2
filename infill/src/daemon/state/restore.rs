//! Making what the state holds again, when a daemon starts.
//!
//! Entries are made one after the other, in the order in which they were first made. One that waits for a server, or a file that may be far, goes on by itself:
//! what needs it waits with it, and everything else comes next at once (`Record::needs`). One that cannot be made now, because a
//! file or a server is not there, is *held*: its record stays, those that need it are held with it, managers are told
//! (`__infill_query-state`, `__INFILL_HELD`), and it is tried again, after [`RETRY_TIME_MIN`] and then ever later up to
//! [`RETRY_TIME_MAX`], and whenever something was added. So the daemon comes up whatever is missing.

use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{Either, select};
use infill_qmp::command::Command;
use infill_qmp::{BlockExportOptions, Driver, QmpError};
use infill_storage::{RangeGuard, rt};
use serde_json::json;

use super::record::{JobRecord, Key, Kind};
use super::{Entry, State};
use crate::daemon::control::Control;

/// How long held entries first wait until they are tried again.
const RETRY_TIME_MIN: Duration = Duration::from_millis(50);
/// How long they wait at most.
const RETRY_TIME_MAX: Duration = Duration::from_secs(15);
/// How often a daemon that ends looks whether an entry is still being made.
const UNDER_WAY_LOOK: Duration = Duration::from_millis(5);
/// How long a start waits for entries that are held, or wait for a server, before it goes on without them.
const START_PATIENCE: Duration = Duration::from_secs(2);

impl State {
    fn held_entries(&self) -> Vec<u64> {
        let held = |(at, entry): (&u64, &Entry)| entry.held.is_some().then_some(*at);
        self.entries.borrow().iter().filter_map(held).collect()
    }

    /// How many entries are held.
    pub fn held_count(&self) -> usize {
        self.held_entries().len()
    }

    /// The entry waits for a server, or a file that may be far: what does not need it does not wait for it.
    pub fn goes_far(&self, at: u64) {
        if self.under_way.borrow().contains(&at) && self.far.borrow_mut().insert(at) {
            self.gone_far.notify(usize::MAX);
        }
    }

    /// As [`State::goes_far`], of the job of that id.
    pub fn job_goes_far(&self, id: &str) {
        if let Some(at) = self.find(&Key::new(Kind::Job, id)) {
            self.goes_far(at);
        }
    }

    /// As [`State::goes_far`], of the object of that id.
    pub fn object_goes_far(&self, id: &str) {
        if let Some(at) = self.find(&Key::new(Kind::Object, id)) {
            self.goes_far(at);
        }
    }

    /// Returns when no job is about to begin again.
    pub async fn no_job_under_way(&self) {
        let is_job =
            |at: &u64| self.entries.borrow().get(at).is_some_and(|entry| entry.record.key.kind == Kind::Job);
        while self.under_way.borrow().iter().any(is_job) {
            rt::sleep(UNDER_WAY_LOOK).await;
        }
    }

    async fn until_far(&self, at: u64) {
        loop {
            let gone_far = self.gone_far.listen();
            if self.far.borrow().contains(&at) {
                return;
            }
            gone_far.await;
        }
    }

    /// Whether the entry has to wait for one of these.
    fn needs_one_of(&self, at: u64, waiting: &[Key]) -> bool {
        let entries = self.entries.borrow();
        entries.get(&at).is_some_and(|entry| waiting.iter().any(|key| entry.record.needs(key)))
    }
}

impl Control {
    /// Makes what the state holds again. Returns when everything is there, or some entries keep it waiting: those are
    /// tried again as long as the daemon lives.
    pub async fn restore(self: &Rc<Self>) {
        let Some(state) = &self.state else { return };
        self.look_at_disks(state.files());
        if state.held_entries().is_empty() {
            self.forget_old_maps();
            self.forget_old_bitmaps();
            return;
        }
        let restoring = rt::detached(self.clone().keep_restoring());
        if rt::timeout(START_PATIENCE, restoring).await.is_none() {
            let held = state.held_count();
            self.tell_waiting(state);
            tracing::warn!("{held} entries of the state are held: see __infill_query-state");
        }
        self.forget_old_maps();
        self.forget_old_bitmaps();
    }

    async fn keep_restoring(self: Rc<Self>) {
        let Some(state) = &self.state else { return };
        let mut wait = RETRY_TIME_MIN;
        loop {
            let changed = state.changed.listen();
            let mut made = false;
            // What was made may be what others need.
            while self.restore_once(state).await {
                made = true;
            }
            if state.held_entries().is_empty() || self.is_ending() {
                return;
            }
            wait = if made { RETRY_TIME_MIN } else { (wait * 2).min(RETRY_TIME_MAX) };
            rt::timeout(wait, changed).await;
        }
    }

    /// Tries every held entry. Whether one was made.
    async fn restore_once(self: &Rc<Self>, state: &State) -> bool {
        let (mut made, mut waiting) = (false, Vec::new());
        for at in state.held_entries() {
            if self.is_ending() {
                return false;
            }
            match self.try_entry(state, at, &waiting).await {
                Some(is_made) => made |= is_made,
                None => waiting.extend(state.entries.borrow().get(&at).map(|entry| entry.record.key.clone())),
            }
        }
        if let Err(error) = self.settle().await {
            tracing::error!("{}", error.desc);
        }
        made
    }

    /// Tries an entry. Whether it was made; `None`: it waits, for a server or for one of `waiting`.
    async fn try_entry(self: &Rc<Self>, state: &State, at: u64, waiting: &[Key]) -> Option<bool> {
        if state.needs_one_of(at, waiting) {
            return None;
        }
        // Else somebody makes or changes it.
        let turn = state.restoring.try_exclusive(at, at + 1)?;
        state.under_way.borrow_mut().insert(at);
        let made = rt::detached(self.clone().make_entry(at, turn));
        match select(pin!(made), pin!(state.until_far(at))).await {
            Either::Left((made, _)) => Some(made),
            Either::Right(((), _)) => None,
        }
    }

    /// Makes an entry, if that can be. Whether it was made.
    async fn make_entry(self: Rc<Self>, at: u64, turn: RangeGuard) -> bool {
        let Some(state) = &self.state else { return false };
        let outcome = self.restore_entry(state, at).await;
        let made = self.note_outcome(state, at, outcome);
        state.under_way.borrow_mut().remove(&at);
        drop(turn);
        if state.far.borrow_mut().remove(&at) {
            if let Err(error) = self.settle().await {
                tracing::error!("{}", error.desc);
            }
            if made {
                state.changed.notify(usize::MAX);
            }
        }
        made
    }

    /// Says of entries of which nothing else is known that they wait.
    fn tell_waiting(&self, state: &State) {
        for at in state.held_entries() {
            let kind = match state.entries.borrow().get(&at) {
                Some(entry) if entry.held.as_deref() == Some("") => entry.record.key.kind,
                _ => continue,
            };
            let why = match state.far.borrow().contains(&at) {
                true if kind == Kind::Object => "its file could not be read yet",
                true => "its server has not answered yet",
                false => "what it needs is not there yet",
            };
            self.note_outcome(state, at, Err(QmpError::generic(why)));
        }
    }

    async fn restore_entry(self: &Rc<Self>, state: &State, at: u64) -> Result<(), QmpError> {
        let record = match state.entries.borrow().get(&at) {
            Some(Entry { record, held: Some(_) }) => record.clone(),
            // Somebody has taken it away or made it meanwhile.
            _ => return Ok(()),
        };
        // They may not have been there when the daemon started.
        self.look_at_disks(record.files());
        let id = &record.key.name;
        if record.key.kind == Kind::Bitmap {
            self.restore_bitmaps().await;
            let is_held = state.entries.borrow().get(&at).is_some_and(|entry| entry.held.is_some());
            return match is_held {
                true => Err(QmpError::generic("its node is not there, or has a bitmap of its name")),
                false => Ok(()),
            };
        }
        if let Some(job @ JobRecord { kind, kept, done, .. }) = &record.job {
            if job.is_over() {
                if kept.auto_dismiss {
                    state.forget_at(at);
                    return Ok(());
                }
                let kept = match kept.concluded || *done {
                    true => infill_job::KeptJob { concluded: true, ..kept.clone() },
                    false => kept.clone().into_cancelled(),
                };
                let shown = self.jobs().show_concluded(id, *kind, kept);
                return shown.map(drop).map_err(|error| QmpError::generic(error.message));
            }
            self.jobs().go_on_as(id, Some(kept.clone()));
            self.join_again(state, id);
        }
        let outcome = match record.now() {
            Ok(mut command) => {
                match &mut command {
                    Command::BlockExportAdd(export) | Command::NbdServerAdd(export) => {
                        self.leave_out_bitmaps(export)
                    }
                    Command::BlockdevAdd(node) => {
                        // The moment that it kept has passed; another one must not take its place.
                        if let Driver::CopyBeforeWrite { passed, .. } = &mut node.driver {
                            *passed = true;
                        }
                    }
                    _ => {}
                }
                match command {
                    Command::BlockdevAdd(node) => {
                        self.blockdev_add_again(*node, &|| state.goes_far(at)).await
                    }
                    command => self.carry_out(command).await.map(drop),
                }
            }
            Err(error) => Err(error),
        };
        if record.job.is_some() {
            self.jobs().go_on_as(id, None);
            self.has_joined_again(state, id, outcome.is_ok());
            if outcome.is_ok() {
                // It may have ended at once.
                state.touch_job(id);
            }
        }
        outcome
    }

    /// An export comes back without the bitmaps that went with the last daemon, or that it could not store: clients then ask
    /// for everything.
    fn leave_out_bitmaps(&self, export: &mut BlockExportOptions) {
        let node_name = &export.node_name;
        export.bitmaps.retain(|wanted| {
            let layers = match &wanted.node {
                Some(node) => vec![node.clone()],
                None => self.blockdevs().chain_with_filters(node_name),
            };
            let has = |layer: &String| {
                self.blockdevs()
                    .get(layer)
                    .is_ok_and(|node| node.bitmap(&wanted.name).is_ok_and(|bitmap| !bitmap.is_inconsistent()))
            };
            let found = layers.iter().any(has);
            if !found {
                tracing::warn!(
                    export = export.id,
                    bitmap = wanted.name,
                    "exported without a bitmap that is gone or inconsistent"
                );
            }
            found
        });
    }

    /// Notes how an attempt has ended, and tells it where that is news. Whether the entry was made.
    pub(in crate::daemon) fn note_outcome(
        &self,
        state: &State,
        at: u64,
        outcome: Result<(), QmpError>,
    ) -> bool {
        let mut entries = state.entries.borrow_mut();
        let Some(entry) = entries.get_mut(&at) else { return true };
        let (kind, name) = (entry.record.key.kind.as_str(), entry.record.key.name.clone());
        let before = std::mem::replace(&mut entry.held, outcome.err().map(|error| error.desc));
        let now = entry.held.clone();
        drop(entries);
        match (before, now) {
            (before, Some(reason)) if before.as_ref() != Some(&reason) => {
                tracing::warn!(kind, name, reason, "an entry of the state is held");
                self.tell("__INFILL_HELD", json!({ "kind": kind, "name": name, "reason": reason }));
                false
            }
            (Some(before), None) => {
                // One that was there at the first attempt is no news.
                if !before.is_empty() {
                    tracing::info!(kind, name, "an entry of the state is there again");
                    self.tell("__INFILL_RESTORED", json!({ "kind": kind, "name": name }));
                }
                true
            }
            _ => false,
        }
    }
}
