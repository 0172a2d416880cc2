//! Carrying commands out so that what they make is kept, and what is kept is named by its owner.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::rc::Rc;

use infill_job::{JobStatus, JobType, KeptJob};
use infill_qmp::command::{Command, JobCommand};
use infill_qmp::transaction::Transaction;
use infill_qmp::{Members, QmpError, without_secret};
use serde_json::{Map, Value, json};

use super::record::{JobRecord, Key, Kind, Record, made_together, makes, read_command, takes};
use super::{Entry, State};
use crate::daemon::control::Control;

/// How names begin that were made up for nodes without one.
const MADE_UP: &str = "#block";

impl State {
    /// What is refused because an option of the command line and the state differ.
    fn differs(&self, record: &Record) -> QmpError {
        let given = match record.key.kind {
            Kind::Object => Value::Object(without_secret(&record.given)),
            _ => Value::Object(record.given.clone()),
        };
        QmpError::generic(format!(
            "{} is kept in {} with other options ({given}): give the same, or take it away there first ({}), or start once \
             with --forget to begin with nothing",
            record.key,
            self.dir.display(),
            record.key.kind.remover()
        ))
    }
}

/// Whether a node's name was made up.
pub(in crate::daemon) fn has_made_up_name(node: &str) -> bool {
    node.starts_with(MADE_UP)
}

/// Refuses to keep what names a node by a made-up name: it has another one after a restart.
pub(in crate::daemon) fn check_names(control: &Control, value: &Value) -> Result<(), QmpError> {
    match value {
        Value::String(name) if has_made_up_name(name) && control.blockdevs().get(name).is_ok() => {
            Err(QmpError::generic(format!(
                "node '{name}' was given no node-name, and has another one after a restart: give it one, so that what is \
                 kept with --state can name it"
            )))
        }
        Value::Object(members) => members.values().try_for_each(|value| check_names(control, value)),
        Value::Array(values) => values.iter().try_for_each(|value| check_names(control, value)),
        _ => Ok(()),
    }
}

impl Control {
    /// Carries out an option of the command line. What the state has already, with the same options, is there.
    pub async fn carry_out_option(self: &Rc<Self>, name: &str, given: Members) -> Result<(), QmpError> {
        let command = read_command(name, given.clone())?;
        if let (Some(state), Some((key, _))) = (&self.state, makes(&command))
            && let Some(at) = state.find(&key)
        {
            let entries = state.entries.borrow();
            let same = |entry: &Entry| entry.record.given().is_ok_and(|given| given == command);
            return match entries.get(&at) {
                Some(entry) if !same(entry) => Err(state.differs(&entry.record)),
                _ => Ok(()),
            };
        }
        let outcome = self.carry_out_and_keep(name, command, given).await.map(drop);
        let kept = self.settle().await;
        outcome.and(kept)
    }

    /// Carries out a command and notes what it has made or taken away.
    pub(in crate::daemon) async fn carry_out_and_keep(
        self: &Rc<Self>,
        name: &str,
        command: Command,
        given: Members,
    ) -> Result<Value, QmpError> {
        let Some(state) = &self.state else { return self.carry_out(command).await };
        self.check_bitmap_nodes(&command)?;
        let (made, taken) = (makes(&command), takes(&command));
        let touched = match &command {
            Command::Job { id, .. } => Some(id.clone()),
            _ => None,
        };
        let key = made.as_ref().map(|(key, _)| key.clone()).or(taken.clone());
        let key = key.or(touched.as_ref().map(|id| Key::new(Kind::Job, id)));
        // Nobody is to make it while it is changed.
        let mut _turn = None;
        if let Some(key) = &key
            && state.held(key).is_some()
            && let Some(at) = state.find(key)
        {
            _turn = Some(state.restoring.exclusive(at, at + 1).await);
            if made.is_none() && state.held(key).is_some() {
                return self.change_held(state, key, &command);
            }
        }
        // Behind the turn above, as whoever restores takes them.
        let changes_bitmaps = matches!(command, Command::Bitmap(_) | Command::Transaction(_));
        let _bitmaps = match changes_bitmaps {
            true => Some(self.kept_bitmaps.turn.exclusive(0, 1).await),
            false => None,
        };
        let is_transaction = matches!(command, Command::Transaction(_));
        let grouped = matches!(&command, Command::Transaction(Transaction { grouped: true, .. }));
        let group = grouped.then(|| RandomState::new().build_hasher().finish());
        let starts_job = made.as_ref().is_some_and(|(_, job)| job.is_some());
        let _unnoted = (is_transaction || starts_job).then(|| self.begin_unnoted(is_transaction));
        let (object, strings) = given.into_parts();
        if made.is_some() {
            object.values().try_for_each(|value| check_names(self, value))?;
        }
        let together = match &command {
            Command::Transaction(_) => made_together(&object),
            _ => Vec::new(),
        };
        let mut backups = Vec::new();
        for (key, command, given) in together {
            given.values().try_for_each(|value| check_names(self, value))?;
            let read = read_command(&command, Members::of_json(given.clone()))?;
            let now = self.comes_back_as(&read, &given);
            backups.push((key, command, given, now));
        }
        let now = self.comes_back_as(&command, &object);
        let value = self.carry_out(command).await?;
        if !name.contains("query-") {
            self.keep_stored_bitmaps().await;
        }
        let kept = |id: &str| self.jobs().get(id).map(|job| job.kept()).unwrap_or_default();
        let job_of = |kind, key: &Key| JobRecord { kind, kept: kept(&key.name), done: false, group };
        if let Some((key, kind)) = made {
            let job = kind.map(|kind| job_of(kind, &key));
            state.keep(Record { command: name.into(), given: object, strings, now, job, bits: None, key });
        }
        for (key, command, given, now) in backups {
            let job = Some(job_of(JobType::Backup, &key));
            state.keep(Record { command, given, strings: false, now, job, bits: None, key });
        }
        if changes_bitmaps {
            self.note_bitmaps();
        }
        if let Some(key) = taken.filter(|key| key.kind != Kind::Bitmap) {
            state.forget(&key);
            if key.kind == Kind::Server {
                state.forget_all(Kind::Export);
            }
        }
        if let Some(id) = touched {
            state.touch_job(&id);
        }
        Ok(value)
    }

    /// A command that is about an entry that is held.
    fn change_held(&self, state: &State, key: &Key, command: &Command) -> Result<Value, QmpError> {
        match command {
            Command::Job { id, command, .. } => {
                let outcome = state.change_held_job(key, *command);
                outcome
                    .map_err(|why| QmpError::generic(why.unwrap_or_else(|| refused_verb(id, *command))))?;
                if matches!(command, JobCommand::Cancel { .. }) {
                    self.absent_is_over(state, id);
                    state.forget(key);
                    self.drop_map(id);
                    let gone = JobStatus::Null.as_str();
                    self.tell("JOB_STATUS_CHANGE", json!({ "status": gone, "id": id }));
                }
            }
            _ => {
                if key.kind == Kind::Node {
                    // Its disk may be opened by another name now, where nobody would see what is written to it.
                    self.forget_maps_without_guard();
                }
                state.forget(key);
                match key.kind {
                    Kind::Server => state.forget_all(Kind::Export),
                    Kind::Export => self.tell("BLOCK_EXPORT_DELETED", json!({ "id": key.name })),
                    _ => {}
                }
            }
        }
        Ok(json!({}))
    }

    /// Whether what commands make comes back after a restart.
    pub(in crate::daemon) fn keeps_state(&self) -> bool {
        self.state.is_some()
    }

    /// The node `to` is about to take the place of `from`, which is what the job `id` was for, if one is named. On stable storage
    /// when this returns: whatever happens then, exports come back on `to`, and the job does not begin again.
    pub(in crate::daemon) async fn note_exchange(
        &self,
        id: Option<&str>,
        from: &str,
        to: &str,
    ) -> Result<(), QmpError> {
        let Some(state) = &self.state else { return Ok(()) };
        check_names(self, &json!(to))?;
        state.exchange(id, from, to, true);
        let kept = self.settle().await;
        if kept.is_err() {
            state.exchange(id, to, from, false);
        }
        kept
    }

    /// What was noted by [`Control::note_exchange`] did not happen.
    pub(in crate::daemon) async fn note_no_exchange(&self, id: Option<&str>, from: &str, to: &str) {
        let Some(state) = &self.state else { return };
        state.exchange(id, to, from, false);
        if let Err(error) = self.settle().await {
            tracing::error!("{}", error.desc);
        }
    }

    /// `overlay` is about to be put on `name`, for the users of `name`. As [`Control::note_exchange`]: the overlay is empty, so
    /// that both read the same.
    pub(in crate::daemon) async fn note_snapshot(&self, name: &str, overlay: &str) -> Result<(), QmpError> {
        let Some(state) = &self.state else { return Ok(()) };
        check_names(self, &json!([name, overlay]))?;
        state.describe_backing(overlay, json!(name));
        self.note_exchange(None, name, overlay).await
    }

    /// What was noted by [`Control::note_snapshot`] did not happen.
    pub(in crate::daemon) async fn note_no_snapshot(&self, name: &str, overlay: &str) {
        let Some(state) = &self.state else { return };
        state.describe_backing(overlay, Value::Null);
        self.note_no_exchange(None, name, overlay).await;
    }

    /// The node `name` has been made by another command than `blockdev-add`, which would be given `description` to make it.
    pub(in crate::daemon) fn keep_node(&self, name: &str, description: Map<String, Value>) {
        let Some(state) = &self.state else { return };
        let key = Key::new(Kind::Node, name);
        let command = "blockdev-add".into();
        state.keep(Record {
            command,
            given: description,
            strings: false,
            now: None,
            job: None,
            bits: None,
            key,
        });
    }

    /// A node that was kept by [`Control::keep_node`] is gone.
    pub(in crate::daemon) fn forget_node(&self, name: &str) {
        if let Some(state) = &self.state {
            state.forget(&Key::new(Kind::Node, name));
        }
    }

    /// A disk that has come from another host is one like others from now on: its node and its export come back as these
    /// describe them. On stable storage when this returns.
    pub(in crate::daemon) async fn keep_disk(
        &self,
        node: &str,
        node_given: Map<String, Value>,
        export: &str,
        export_given: Map<String, Value>,
    ) -> anyhow::Result<()> {
        let Some(state) = &self.state else { return Ok(()) };
        self.keep_node(node, node_given);
        let key = Key::new(Kind::Export, export);
        let command = "block-export-add".into();
        state.keep(Record {
            command,
            given: export_given,
            strings: false,
            now: None,
            job: None,
            bits: None,
            key,
        });
        state.commit().await
    }

    /// A disk has left, or does not come: its export and its node go, with what is kept of them.
    pub(in crate::daemon) async fn forget_disk(&self, export: &str, node: &str) -> anyhow::Result<()> {
        let told = |error: QmpError| anyhow::anyhow!(error.desc);
        self.end_export(export).await.map_err(told)?;
        if let Some(state) = &self.state {
            state.forget(&Key::new(Kind::Export, export));
            state.forget(&Key::new(Kind::Node, node));
        }
        if self.blockdevs().get(node).is_ok() {
            self.blockdevs().del(node).await?;
        }
        self.settle().await.map_err(told)
    }

    /// The limits of the group `id` are these from now on.
    pub(in crate::daemon) fn note_limits(&self, id: &str, limits: Value) {
        if let Some(state) = &self.state {
            state.describe_limits(id, limits);
        }
    }

    /// Whether a node comes back with the description of another one, in which it stands.
    pub(in crate::daemon) fn is_described_in_another(&self, name: &str) -> bool {
        self.state.as_ref().is_some_and(|state| state.find(&Key::new(Kind::Node, name)).is_none())
    }

    /// The node `name` is as `given` describes it from now on.
    pub(in crate::daemon) fn note_reopened(&self, name: &str, given: Map<String, Value>) {
        if let Some(state) = &self.state {
            state.describe_anew(name, given);
        }
    }

    /// Whether the node `name` is active from now on.
    pub(in crate::daemon) fn note_active(&self, name: &str, active: bool) {
        if let Some(state) = &self.state {
            state.describe_active(name, active);
        }
    }

    /// After a job has changed what lies below `overlay`.
    pub(in crate::daemon) fn note_backing(&self, overlay: &str) {
        if let (Some(state), Ok(facts)) = (&self.state, self.blockdevs().facts(overlay)) {
            state.set_backing(self.blockdevs(), overlay, facts.backing.as_deref());
        }
    }
}

fn refused_verb(id: &str, command: JobCommand) -> String {
    let verb = match command {
        JobCommand::Complete => "complete",
        JobCommand::Dismiss => "dismiss",
        _ => "finalize",
    };
    format!("Job '{id}' in state '{}' cannot accept command verb '{verb}'", JobStatus::Created.as_str())
}

impl State {
    /// Notes what a manager says of a job that has not begun. `Err(None)`: such a job does not take it.
    fn change_held_job(&self, key: &Key, command: JobCommand) -> Result<(), Option<String>> {
        let at = self.find(key).ok_or(None)?;
        let mut entries = self.entries.borrow_mut();
        let job = entries.get_mut(&at).and_then(|entry| entry.record.job.as_mut()).ok_or(None)?;
        let kept = &mut job.kept;
        match command {
            _ if kept.concluded => return Err(None),
            JobCommand::Cancel { .. } => {}
            JobCommand::Pause if kept.paused => return Err(Some("Job is already paused".into())),
            JobCommand::Pause => kept.paused = true,
            JobCommand::Resume if !kept.paused => {
                return Err(Some("Can't resume a job that was not paused".into()));
            }
            JobCommand::Resume => kept.paused = false,
            JobCommand::SetSpeed(speed) => kept.speed = speed,
            JobCommand::Complete | JobCommand::Dismiss | JobCommand::Finalize => return Err(None),
        }
        self.dirty.borrow_mut().insert(at);
        Ok(())
    }

    fn all_held<T>(&self, told: impl Fn(&Record, &str) -> Option<T>) -> Vec<T> {
        let entries = self.entries.borrow();
        let held = |entry: &Entry| entry.held.as_deref().and_then(|why| told(&entry.record, why));
        entries.values().filter_map(held).collect()
    }

    /// Jobs that have not begun again, as `query-jobs` tells them (`block`: as `query-block-jobs` does).
    pub fn held_jobs(&self, block: bool) -> Vec<Value> {
        self.all_held(|record, why| {
            let JobRecord { kind, kept, .. } = record.job.as_ref()?;
            let KeptJob { offset, len, .. } = kept;
            if block && !kind.is_block_job() {
                return None;
            }
            let mut out = Map::new();
            let mut put = |key: &str, value: Value| drop(out.insert(key.into(), value));
            put("status", json!(JobStatus::Created.as_str()));
            put("type", json!(kind.as_str()));
            if block {
                put("device", json!(record.key.name));
                put("len", json!(len));
                put("offset", json!(offset));
                put("speed", json!(kept.speed));
                put("auto-finalize", json!(kept.auto_finalize));
                put("auto-dismiss", json!(kept.auto_dismiss));
                put("busy", json!(false));
                put("paused", json!(kept.paused));
                put("ready", json!(false));
                put("io-status", json!(kept.io_status.as_str()));
                put("__infill_durable", json!(0));
                put("__infill_remaining", json!(len.saturating_sub(*offset)));
                put("__infill_at-risk", json!(len));
                put("__infill_waiting_for", json!(why));
            } else {
                put("current-progress", json!(offset));
                put("total-progress", json!(len));
                put("id", json!(record.key.name));
            }
            Some(Value::Object(out))
        })
    }

    /// Exports that are not offered again yet, as `query-block-exports` tells them.
    pub fn held_exports(&self) -> Vec<Value> {
        self.all_held(|record, why| {
            let is_export = record.key.kind == Kind::Export;
            is_export.then(|| {
                json!({
                    "node-name": record.given.get("node-name"),
                    "shutting-down": false,
                    "type": "nbd",
                    "id": record.key.name,
                    "__infill_held": why,
                })
            })
        })
    }
}
