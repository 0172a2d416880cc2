//! State that survives (`--state DIR`): what a daemon has been told to make, so that the next one makes it again.
//!
//! Owns the records in memory and their file ([`store`]). A record is a *command*: starting again is carrying the commands
//! out again, in order, so a kind of thing that is new needs one line in [`record::makes`]. What never happens: a command
//! that is answered, or an event of a job's end that is sent, before its record is on stable storage; an entry that is
//! dropped because it cannot be made at a start ([`restore`] holds it, tells why, and tries again).
//!
//! * Nodes, objects, the NBD server and exports come back as they were added, with what has changed since
//!   ([`State::set_backing`]). Monitors, character devices and the pid file are of the command line alone.
//! * A bitmap comes back on its node, with the bits of its map ([`KeptBitmap`]).
//! * A job comes back by its command and a few facts ([`infill_job::KeptJob`]); how far it is, the images tell.
//!
//! Costs one transaction (two syncs of a small file, off the reactor) for each command that changes something, and none for
//! those that ask. Decisions and their price: `docs/decisions/0007-daemon-state.md`.

mod bitmaps;
mod keep;
mod record;
mod restore;
mod store;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use event_listener::Event as Signal;
use infill_job::{JobStatus, JobType, Jobs, MapName};
use infill_storage::{RangeLock, rt};
use serde_json::{Map, Value, json};

use crate::blockdev::Blockdevs;
pub use bitmaps::KeptBitmap;
pub(super) use keep::{check_names, has_made_up_name};
use record::{Key, Kind, Record};
use store::Store;

/// One record, and whether what it tells of is there.
struct Entry {
    record: Record,
    /// Why it is not there, where it is not.
    held: Option<String>,
}

/// What a daemon keeps for the next one.
pub struct State {
    dir: PathBuf,
    store: Arc<Store>,
    /// In the order in which they were made.
    entries: RefCell<BTreeMap<u64, Entry>>,
    /// Entries that differ from their records on the disk.
    dirty: RefCell<BTreeSet<u64>>,
    /// Jobs that may have changed.
    touched: RefCell<BTreeSet<String>>,
    /// Whether the map of a job that is over may be left.
    maps_left: Cell<bool>,
    committing: RangeLock,
    /// Whoever makes or changes a held entry has its number.
    restoring: RangeLock,
    /// Entries that are being made.
    under_way: RefCell<BTreeSet<u64>>,
    /// Those of them that wait for a server.
    far: RefCell<BTreeSet<u64>>,
    /// One more waits for a server.
    gone_far: Signal,
    /// An entry was made, so that held ones may succeed.
    changed: Signal,
}

/// Entries that are being written: what was not is dirty again, also where nobody waits for it to the end.
struct Dirty<'a> {
    state: &'a State,
    entries: BTreeSet<u64>,
}

impl Drop for Dirty<'_> {
    fn drop(&mut self) {
        self.state.dirty.borrow_mut().append(&mut self.entries);
    }
}

impl State {
    /// Opens the state in `dir`. With `forget` it begins empty.
    pub fn open(dir: &Path, forget: bool) -> Result<State> {
        let (store, records) = Store::open(dir)?;
        if forget {
            let changes: Vec<_> = records.iter().map(|(at, _)| (*at, None)).collect();
            store.write(&changes)?;
        }
        let kept = records.into_iter().filter(|_| !forget);
        let entries = kept.map(|(at, record)| (at, Entry { record, held: Some(String::new()) })).collect();
        Ok(State {
            dir: dir.to_owned(),
            store: Arc::new(store),
            entries: RefCell::new(entries),
            dirty: RefCell::default(),
            touched: RefCell::default(),
            maps_left: Cell::default(),
            committing: RangeLock::new(),
            restoring: RangeLock::new(),
            under_way: RefCell::default(),
            far: RefCell::default(),
            gone_far: Signal::new(),
            changed: Signal::new(),
        })
    }

    fn find(&self, key: &Key) -> Option<u64> {
        self.entries.borrow().iter().find(|(_, entry)| entry.record.key == *key).map(|(at, _)| *at)
    }

    /// Why the entry of that name is held, if it is.
    fn held(&self, key: &Key) -> Option<String> {
        self.find(key).and_then(|at| self.entries.borrow().get(&at)?.held.clone())
    }

    /// Puts a record in the place of the one of its name, or behind all others. What it tells of is there.
    fn keep(&self, record: Record) {
        let mut entries = self.entries.borrow_mut();
        let same = entries.iter().find(|(_, entry)| entry.record.key == record.key).map(|(at, _)| *at);
        let at = same.unwrap_or_else(|| entries.last_key_value().map_or(0, |(last, _)| last + 1));
        if record.job.is_some() {
            // It may have ended before it was noted.
            self.touched.borrow_mut().insert(record.key.name.clone());
        }
        entries.insert(at, Entry { record, held: None });
        self.dirty.borrow_mut().insert(at);
        self.changed.notify(usize::MAX);
    }

    fn forget_at(&self, at: u64) {
        self.entries.borrow_mut().remove(&at);
        self.dirty.borrow_mut().insert(at);
    }

    /// Drops the record of that name.
    fn forget(&self, key: &Key) {
        if let Some(at) = self.find(key) {
            self.forget_at(at);
        }
    }

    /// Drops all records of that kind.
    fn forget_all(&self, kind: Kind) {
        let of_kind = |(at, entry): (&u64, &Entry)| (entry.record.key.kind == kind).then_some(*at);
        let all: Vec<u64> = self.entries.borrow().iter().filter_map(of_kind).collect();
        all.into_iter().for_each(|at| self.forget_at(at));
    }

    /// Where the state lies.
    pub fn directory(&self) -> PathBuf {
        self.dir.clone()
    }

    /// The number of the group of that job, if it is to complete together with others.
    pub fn group_of(&self, id: &str) -> Option<u64> {
        let at = self.find(&Key::new(Kind::Job, id))?;
        self.entries.borrow().get(&at)?.record.job.as_ref()?.group
    }

    /// What the job of that id does, if it is kept.
    pub fn kind_of_job(&self, id: &str) -> Option<JobType> {
        let at = self.find(&Key::new(Kind::Job, id))?;
        Some(self.entries.borrow().get(&at)?.record.job.as_ref()?.kind)
    }

    /// How many jobs of a group are not over, and how many have failed or were cancelled.
    pub fn members_of(&self, group: u64) -> (usize, usize) {
        let entries = self.entries.borrow();
        let of_group = |job: &&record::JobRecord| job.group == Some(group);
        let jobs = || entries.values().filter_map(|entry| entry.record.job.as_ref()).filter(of_group);
        let failed = |job: &&record::JobRecord| job.kept.error.is_some() || job.kept.cancelled;
        (jobs().filter(|job| !job.is_over()).count(), jobs().filter(failed).count())
    }

    /// The ids of all jobs that are kept and not over.
    pub fn job_names(&self) -> Vec<String> {
        let entries = self.entries.borrow();
        let goes_on = |entry: &&Entry| entry.record.job.as_ref().is_some_and(|job| !job.is_over());
        let jobs = entries.values().filter(goes_on);
        jobs.map(|entry| entry.record.key.name.clone()).collect()
    }

    /// The maps of jobs that have not begun again and are to.
    pub fn held_maps(&self) -> Vec<(String, JobType, MapName)> {
        let entries = self.entries.borrow();
        let of = |entry: &Entry| {
            let job = entry.record.job.as_ref().filter(|_| entry.held.is_some())?;
            let map = job.kept.map.clone().filter(|_| !job.is_over())?;
            Some((entry.record.key.name.clone(), job.kind, map))
        };
        entries.values().filter_map(of).collect()
    }

    /// The map of that job says nothing any more.
    pub fn forget_map(&self, id: &str) {
        let Some(at) = self.find(&Key::new(Kind::Job, id)) else { return };
        if let Some(job) = self.entries.borrow_mut().get_mut(&at).and_then(|entry| entry.record.job.as_mut())
        {
            job.kept.map = None;
        }
        self.dirty.borrow_mut().insert(at);
    }

    /// Something has happened to the job of that id.
    pub fn touch_job(&self, id: &str) {
        self.touched.borrow_mut().insert(id.to_owned());
    }

    /// Notes where the jobs stand that have changed. One that is gone is not to come back.
    pub fn note_jobs(&self, jobs: &Jobs) {
        for id in std::mem::take(&mut *self.touched.borrow_mut()) {
            let Some(at) = self.find(&Key::new(Kind::Job, &id)) else { continue };
            let job = jobs.get(&id).ok();
            if job.as_ref().is_none_or(|job| job.status() == JobStatus::Concluded) {
                self.maps_left.set(true);
            }
            match job {
                Some(job) => self.note_job(at, &job.kept()),
                None => self.forget_at(at),
            }
        }
    }

    /// Whether a job was over since the last call, so that its map may be left.
    pub fn take_maps_left(&self) -> bool {
        self.maps_left.take()
    }

    fn note_job(&self, at: u64, now: &infill_job::KeptJob) {
        let mut entries = self.entries.borrow_mut();
        let Some(job) = entries.get_mut(&at).and_then(|entry| entry.record.job.as_mut()) else { return };
        if job.kept.differs(now) {
            self.dirty.borrow_mut().insert(at);
        }
        job.kept.clone_from(now);
    }

    /// Notes how far every job is, for those who ask the next daemon before it knows better.
    pub fn note_progress(&self, jobs: &Jobs) {
        let entries = self.entries.borrow();
        let of_jobs = |(at, entry): (&u64, &Entry)| {
            (entry.record.job.is_some() && entry.held.is_none()).then(|| (*at, entry.record.key.name.clone()))
        };
        let all: Vec<(u64, String)> = entries.iter().filter_map(of_jobs).collect();
        drop(entries);
        for (at, id) in all {
            if let Ok(job) = jobs.get(&id) {
                self.note_job(at, &job.kept());
                self.dirty.borrow_mut().insert(at);
            }
        }
    }

    /// What is known of one side of a migration, on stable storage when this returns. Not beside another write: two syncs of
    /// one file take as long as one after the other.
    pub async fn write_migration(&self, key: String, bytes: Vec<u8>) -> Result<()> {
        let _turn = self.committing.exclusive(0, 1).await;
        let store = self.store.clone();
        rt::offload(move || store.write_migration(&key, &bytes)).await?
    }

    /// What is known of migrations.
    pub fn migrations(&self) -> Result<Vec<(String, Vec<u8>)>> {
        self.store.migrations()
    }

    /// Held entries are tried again now.
    pub fn try_held_again(&self) {
        self.changed.notify(usize::MAX);
    }

    /// Writes what has changed. On stable storage when it returns; after an error it is tried again with the next change.
    pub async fn commit(&self) -> Result<()> {
        let _turn = self.committing.exclusive(0, 1).await;
        let mut dirty = Dirty { state: self, entries: std::mem::take(&mut *self.dirty.borrow_mut()) };
        if dirty.entries.is_empty() {
            return Ok(());
        }
        let record = |at: &u64| {
            let entries = self.entries.borrow();
            let bytes = entries.get(at).map(|entry| serde_json::to_vec(&entry.record)).transpose()?;
            Ok((*at, bytes))
        };
        let changes = dirty.entries.iter().map(record).collect::<Result<Vec<_>>>()?;
        let store = self.store.clone();
        rt::offload(move || store.write(&changes)).await??;
        dirty.entries.clear();
        Ok(())
    }

    /// The overlay `name` lies on `backing` from now on (`None`: on nothing): its description follows, wherever it stands.
    /// To be called when the graph has changed. A layer that only a header describes needs no note: its header has changed.
    pub fn set_backing(&self, blockdevs: &Blockdevs, name: &str, backing: Option<&str>) {
        let mut entries = self.entries.borrow_mut();
        let named = |name: &str, entries: &BTreeMap<u64, Entry>| {
            entries.values().any(|entry| entry.record.key == Key::new(Kind::Node, name))
        };
        let by_name = backing.filter(|backing| named(backing, &entries)).map(str::to_owned);
        for (at, entry) in entries.iter_mut() {
            let record = &mut entry.record;
            if record.key.kind != Kind::Node || entry.held.is_some() {
                continue;
            }
            let mut now = record.now.clone().unwrap_or_else(|| record.given.clone());
            let Some(path) = path_to(blockdevs, &now, &record.key.name, name) else { continue };
            let Some(overlay) = path.iter().try_fold(&mut now, |at, key| at.get_mut(*key)?.as_object_mut())
            else {
                continue;
            };
            replace_backing(overlay, backing, by_name);
            record.now = Some(now);
            self.dirty.borrow_mut().insert(*at);
            return;
        }
    }

    /// The node `overlay`, which was added by name and without a backing, is described with `backing`.
    fn describe_backing(&self, overlay: &str, backing: Value) {
        let Some(at) = self.find(&Key::new(Kind::Node, overlay)) else { return };
        if let Some(entry) = self.entries.borrow_mut().get_mut(&at) {
            let mut now = entry.record.now.clone().unwrap_or_else(|| entry.record.given.clone());
            now.insert("backing".into(), backing);
            entry.record.now = Some(now);
        }
        self.dirty.borrow_mut().insert(at);
    }

    /// The node `name`, which was added by name, is as `given` describes it. Children that it names and that its old
    /// description made stay described there.
    fn describe_anew(&self, name: &str, given: Map<String, Value>) {
        let Some(at) = self.find(&Key::new(Kind::Node, name)) else { return };
        if let Some(entry) = self.entries.borrow_mut().get_mut(&at) {
            let old = entry.record.now.as_ref().unwrap_or(&entry.record.given);
            let mut now = merge_children(given, old);
            if entry.record.strings {
                now.values_mut().for_each(as_strings);
            }
            entry.record.now = Some(now);
        }
        self.dirty.borrow_mut().insert(at);
    }

    /// The node `name`, if it was added by name, is active or not.
    fn describe_active(&self, name: &str, active: bool) {
        let Some(at) = self.find(&Key::new(Kind::Node, name)) else { return };
        if let Some(entry) = self.entries.borrow_mut().get_mut(&at) {
            let mut now = entry.record.now.clone().unwrap_or_else(|| entry.record.given.clone());
            let mut active = json!(active);
            if entry.record.strings {
                as_strings(&mut active);
            }
            now.insert("active".into(), active);
            entry.record.now = Some(now);
        }
        self.dirty.borrow_mut().insert(at);
    }

    /// The group `id` has these limits, all of them.
    fn describe_limits(&self, id: &str, mut limits: Value) {
        let Some(at) = self.find(&Key::new(Kind::Object, id)) else { return };
        if let Some(entry) = self.entries.borrow_mut().get_mut(&at) {
            if entry.record.strings {
                as_strings(&mut limits);
            }
            let mut now = entry.record.given.clone();
            now.retain(|key, _| !key.starts_with("x-"));
            now.insert("limits".into(), limits);
            entry.record.now = Some(now);
        }
        self.dirty.borrow_mut().insert(at);
    }

    /// The node `new` takes the place of `old` for all who use it by name or have it described in place: what is kept of them
    /// names `new`. What the job `id` was for has happened (`done`), or has not.
    fn exchange(&self, id: Option<&str>, old: &str, new: &str, done: bool) {
        let mut dirty = self.dirty.borrow_mut();
        for (at, Entry { record, held }) in self.entries.borrow_mut().iter_mut() {
            if held.is_some() {
                continue;
            }
            if let Some(job) = record.job.as_mut().filter(|_| id == Some(record.key.name.as_str())) {
                job.done = done;
                dirty.insert(*at);
            }
            let mut now = record.now.clone().unwrap_or_else(|| record.given.clone());
            let changed = match record.key.kind {
                Kind::Export => rename(now.get_mut("node-name"), old, new),
                // Its own description stays its own.
                Kind::Node if record.key.name != new => exchange_children(&mut now, old, new),
                _ => false,
            };
            if changed {
                record.now = Some(now);
                dirty.insert(*at);
            }
        }
    }

    /// `__infill_query-state`.
    pub fn query(&self) -> Value {
        let told = |entry: &Entry| {
            let record = &entry.record;
            let mut out = json!({
                "kind": record.key.kind.as_str(),
                "name": record.key.name,
                "command": record.command,
            });
            if let Some(reason) = &entry.held {
                out["held"] = json!(reason);
            }
            out
        };
        let entries: Vec<Value> = self.entries.borrow().values().map(told).collect();
        json!({ "directory": self.dir, "entries": entries })
    }
}

/// A description whose children are those that `old` describes, where it only names them.
fn merge_children(mut given: Map<String, Value>, old: &Map<String, Value>) -> Map<String, Value> {
    for key in ["file", "backing"] {
        if let (Some(name @ Value::String(_)), Some(Value::Object(described))) =
            (given.get(key), old.get(key))
            && described.get("node-name") == Some(name)
        {
            given.insert(key.to_owned(), Value::Object(described.clone()));
        }
    }
    given
}

/// Writes scalars as dotted keys do.
fn as_strings(value: &mut Value) {
    match value {
        Value::Object(members) => members.values_mut().for_each(as_strings),
        Value::Array(items) => items.iter_mut().for_each(as_strings),
        Value::Bool(on) => *value = Value::String(if *on { "on" } else { "off" }.to_owned()),
        Value::Number(number) => *value = Value::String(number.to_string()),
        // No node at all.
        Value::Null => *value = Value::String(String::new()),
        Value::String(_) => {}
    }
}

/// Where the description of the node `wanted` stands in that of the node `name`.
fn path_to(
    blockdevs: &Blockdevs,
    description: &Map<String, Value>,
    name: &str,
    wanted: &str,
) -> Option<Vec<&'static str>> {
    if name == wanted {
        return Some(Vec::new());
    }
    let facts = blockdevs.facts(name).ok()?;
    let children = [("file", facts.file), ("backing", facts.backing)];
    children.into_iter().find_map(|(key, child)| {
        let inner = description.get(key)?.as_object()?;
        let mut path = path_to(blockdevs, inner, &child?, wanted)?;
        path.insert(0, key);
        Some(path)
    })
}

/// Puts the name `new` where `old` is named, or described.
fn rename(slot: Option<&mut Value>, old: &str, new: &str) -> bool {
    let Some(slot) = slot else { return false };
    let is_old = slot.as_str() == Some(old) || slot.get("node-name").and_then(Value::as_str) == Some(old);
    if is_old {
        *slot = Value::String(new.to_owned());
    }
    is_old
}

/// Exchanges the child `old`, wherever it stands in a description.
fn exchange_children(description: &mut Map<String, Value>, old: &str, new: &str) -> bool {
    ["file", "backing"].iter().any(|key| {
        rename(description.get_mut(*key), old, new)
            || description
                .get_mut(*key)
                .and_then(Value::as_object_mut)
                .is_some_and(|inner| exchange_children(inner, old, new))
    })
}

/// Changes what the description of an overlay says of its backing, which is `backing` now.
fn replace_backing(overlay: &mut Map<String, Value>, backing: Option<&str>, by_name: Option<String>) {
    let Some(old) = overlay.remove("backing") else {
        // Its header says it, and says the new one now.
        return;
    };
    let new = match (backing, by_name) {
        (None, _) => Some(Value::Null),
        (Some(_), Some(name)) => Some(Value::String(name)),
        // It was described inside of the old one, or its header, which names it now, has to say it.
        (Some(name), None) => described_in(old, name),
    };
    overlay.extend(new.map(|new| ("backing".to_owned(), new)));
}

/// The description of the node `name` among the layers that `old` describes.
fn described_in(old: Value, name: &str) -> Option<Value> {
    let mut layer = old;
    loop {
        let Value::Object(mut description) = layer else { return None };
        if description.get("node-name").and_then(Value::as_str) == Some(name) {
            return Some(Value::Object(description));
        }
        layer = description.remove("backing")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replaced(overlay: Value, backing: Option<&str>, by_name: bool) -> Value {
        let Value::Object(mut overlay) = overlay else { panic!() };
        replace_backing(&mut overlay, backing, backing.filter(|_| by_name).map(str::to_owned));
        Value::Object(overlay)
    }

    #[test]
    fn a_node_that_took_anothers_place_is_named_by_its_users() {
        let used_by = |file: Value| json!({"driver": "copy-on-read", "node-name": "f", "file": file});
        for old in [json!("old"), json!({"driver": "qcow2", "node-name": "old"})] {
            let Value::Object(mut user) = used_by(used_by(old)) else { panic!() };
            assert!(exchange_children(&mut user, "old", "new"));
            assert_eq!(Value::Object(user.clone()), used_by(used_by(json!("new"))));
            assert!(!exchange_children(&mut user, "old", "new"));
        }
    }

    #[test]
    fn a_new_description_keeps_the_children_that_the_old_one_has_made() {
        let object = |value: Value| match value {
            Value::Object(object) => object,
            _ => panic!(),
        };
        let file = json!({"driver": "file", "node-name": "f", "filename": "x"});
        let old = object(json!({"driver": "qcow2", "node-name": "q", "file": file, "backing": "b"}));
        let given =
            json!({"driver": "qcow2", "node-name": "q", "file": "f", "backing": null, "read-only": true});
        let mut now = merge_children(object(given), &old);
        assert_eq!((&now["file"], &now["backing"], &now["read-only"]), (&file, &Value::Null, &json!(true)));
        now.values_mut().for_each(as_strings);
        assert_eq!((&now["backing"], &now["read-only"]), (&json!(""), &json!("on")));
    }

    #[test]
    fn a_description_follows_its_overlay_to_its_new_backing() {
        let base = json!({"driver": "raw", "node-name": "base"});
        let middle = json!({"driver": "qcow2", "node-name": "middle", "backing": base});
        let top = json!({"driver": "qcow2", "backing": middle});
        let nothing = json!({"driver": "qcow2", "backing": null});
        assert_eq!(replaced(top.clone(), None, false), nothing);
        assert_eq!(replaced(json!({"driver": "qcow2", "backing": "m"}), None, false), nothing);
        let on_base = json!({"driver": "qcow2", "backing": base});
        assert_eq!(replaced(top.clone(), Some("base"), false), on_base);
        let by_name = json!({"driver": "qcow2", "backing": "other"});
        assert_eq!(replaced(top.clone(), Some("other"), true), by_name);
        // One that nobody has named: the header names it.
        assert_eq!(replaced(top, Some("#block001"), false), json!({"driver": "qcow2"}));
        let by_header = json!({"driver": "qcow2"});
        assert_eq!(replaced(by_header.clone(), None, false), by_header);
    }
}
