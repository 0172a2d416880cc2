//! Maps of copies, which outlive the daemon ([`KeptMap`]): whose they are, where they lie, and what keeps them true while a
//! job that is to go on has not begun again.
//!
//! A map lies beside the volatile journals, on a tmpfs. The record of its job names it. What never happens: a map that missed
//! a change is used. From the moment when a restarted daemon has opened a disk, before anybody can write to it, until the
//! job of its map watches the disk itself, a guard does; where there is none the map is not used.
//!
//! Nor is one used after somebody else has written to a file of the copy: a file that was written to after the last daemon was
//! known to live ([`Control::tick_maps`]) was, and one that was written to at all since this daemon has started
//! ([`Disks`](crate::blockdev::Disks)).
//!
//! Where source and target lie on local files or block devices, what was written there is there after any death of the process.
//! The server of an NBD export may die with this daemon and what it was told, and nobody sees who else writes to it. So a copy from
//! or to one keeps what a sync has not covered in mind ([`KeptCopy::until_synced`], [`KeptCopy::from_server`], [`GivenMap`]), and
//! what the server should have is looked at before the map is used.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::path::PathBuf;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::{Either, select};
use infill_base::{IoError, IoResult};
use infill_io::JournalDir;
use infill_job::copy::{
    GivenMap, KeptCopy, KeptMap, Looked, MapGuard, MapOwner, Unproven, has_what_it_should,
};
use infill_job::{JobStatus, JobType, MapName};
use infill_node::{NodeHandle, Watching, WeakNode};
use infill_qmp::QmpError;
use infill_storage::journal::JournalMemory;
use infill_storage::{RangeLock, rt};

use super::control::Control;
use crate::blockdev::{hash, identity_of};

/// Why a job that has no map in its record cannot go on.
pub(super) const NO_MAP: &str = "there is no map of what was copied";

/// How often it is noted that the daemon lives.
const ALIVE_INTERVAL: Duration = Duration::from_secs(1);
/// Precedes what names a target on a server, in the identity of a copy.
const TO_SERVER: &str = " to server ";
/// Precedes what names a source on a server.
const FROM_SERVER: &str = " from server ";
/// How long a server may take until it is known whether it has what it should.
const SERVER_PATIENCE: Duration = Duration::from_secs(10);
/// The same of a backup, which could not begin anew: it is tried again later.
const BACKUP_PATIENCE: Duration = Duration::from_secs(30);
/// Ends of the names of what lies beside a map.
const SINCE: &str = "-since";
const GIVEN: &str = "-given";
/// What is written to a file so long after the last such note may be the daemon's own.
const ALIVE_SLACK: Duration = Duration::from_secs(5);

pub(super) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// When files of a copy may have been written to last, in seconds since 1970, where nobody else has written to them.
pub(super) fn written_until(map: &KeptMap) -> u64 {
    map.alive() + ALIVE_SLACK.as_secs()
}

/// A map that is kept true until its job begins again. It stays so where the job does not begin although it was found that it
/// can: it is tried again then.
struct Guarded {
    parts: Parts,
    node: WeakNode,
    watching: Watching,
    until: u64,
}

/// What is kept of a copy.
#[derive(Clone)]
struct Parts {
    map: Arc<KeptMap>,
    since: Option<Arc<KeptMap>>,
    given: Option<Arc<GivenMap>>,
}

/// Where that lies, and whose it is to be.
struct Places {
    map: (Arc<dyn JournalMemory>, MapOwner),
    since: Option<(Arc<dyn JournalMemory>, MapOwner)>,
    given: Option<Arc<dyn JournalMemory>>,
}

impl Places {
    fn begin(self, all: bool) -> IoResult<Parts> {
        let (memory, owner) = self.map;
        let mut map = KeptMap::begin(memory, owner, all)?;
        let mut since = None;
        if let Some((memory, owner)) = self.since {
            since = Some(Arc::new(KeptMap::begin(memory.clone(), owner, false)?));
            map.add_beside(memory);
        }
        let mut given = None;
        if let Some(memory) = self.given {
            given = Some(Arc::new(GivenMap::begin(memory.clone(), &map)?));
            map.add_beside(memory);
        }
        Ok(Parts { map: Arc::new(map), since, given })
    }

    fn find(self) -> Result<Parts, String> {
        let (memory, owner) = self.map;
        let mut map = KeptMap::find(memory, owner)?;
        let mut since = None;
        if let Some((memory, owner)) = self.since {
            // Whoever needs it asks for it.
            since = KeptMap::find(memory.clone(), owner).ok().map(Arc::new);
            map.add_beside(memory);
        }
        let mut given = None;
        if let Some(memory) = self.given {
            given = Some(Arc::new(GivenMap::find(memory.clone(), &map)?));
            map.add_beside(memory);
        }
        Ok(Parts { map: Arc::new(map), since, given })
    }
}

/// Maps of copies, by their jobs' ids.
#[derive(Default)]
pub(super) struct Maps {
    /// Those whose jobs have not begun again, also while it is looked at whether they can.
    guarded: Rc<RefCell<BTreeMap<String, Guarded>>>,
    /// Those whose jobs run, or are about to.
    running: RefCell<BTreeMap<String, Arc<KeptMap>>>,
    /// One looks for maps at a time: who has found one has it locked.
    looking: RangeLock,
}

impl Maps {
    /// Whether the map of that job is kept true.
    fn has(&self, id: &str) -> bool {
        self.guarded.borrow().contains_key(id) || self.running.borrow().contains_key(id)
    }
}

/// A copy that is about to begin.
pub(super) struct Copied<'a> {
    pub(super) id: &'a str,
    pub(super) kind: JobType,
    /// The names of its nodes.
    pub(super) source: &'a str,
    pub(super) target: &'a str,
    /// The source.
    pub(super) node: &'a NodeHandle,
    /// Whether anybody writes to the source meanwhile.
    pub(super) is_written: bool,
    /// Whether all of it is left to do at first.
    pub(super) all: bool,
    /// The target.
    pub(super) copy: &'a NodeHandle,
    /// Whether what is copied is all of the disk, so that the target reads as the source does where the map has nothing marked.
    pub(super) is_whole: bool,
    /// The granularity of the bitmap that a backup is to renew, in bytes.
    pub(super) renews: Option<u64>,
}

/// A map for a copy, and its name for the record.
pub(super) type Kept = (KeptCopy, MapName);

impl Control {
    /// How the names of the maps of this state begin, where there may be maps.
    fn map_prefix(&self) -> Option<(JournalDir, String)> {
        let dir = self.state.as_ref()?.directory();
        let dir = std::fs::canonicalize(&dir).unwrap_or(dir);
        let prefix = format!("copy-{:016x}-", hash(dir.as_os_str().as_encoded_bytes()));
        Some((self.blockdevs().journal_dir()?, prefix))
    }

    /// The memory of a job's map and of what lies beside it, and whose they are to be.
    fn map_places(&self, id: &str, name: &MapName) -> Result<Places, String> {
        let (dir, prefix) = self.map_prefix().ok_or("no state is kept")?;
        let file = format!("{prefix}{:016x}", hash(id.as_bytes()));
        let boot = dir.boot().map_err(|error| error.to_string())?;
        let memory = |end: &str, bytes: usize| {
            dir.memory(&format!("{file}{end}"), bytes).map_err(|error| error.to_string())
        };
        let map = |end: &str, granularity: u64| {
            let MapName { generation, identity, len, .. } = name.clone();
            let owner = MapOwner { generation, boot, identity: format!("{identity}{end}"), len, granularity };
            memory(end, owner.bytes()).map(|memory| (memory, owner))
        };
        Ok(Places {
            map: map("", KeptMap::granularity_for(name.len))?,
            since: name.since.map(|granularity| map(SINCE, granularity)).transpose()?,
            given: name.given.then(|| memory(GIVEN, GivenMap::BYTES)).transpose()?,
        })
    }

    async fn find_map(&self, id: &str, name: &MapName) -> Result<Parts, String> {
        let places = self.map_places(id, name)?;
        rt::offload(move || places.find()).await.map_err(|panicked| panicked.to_string())?
    }

    /// Refuses a map where the file of this node of its copy is another one than when the last daemon had ended, at `until`.
    fn check_file_of(&self, node: &str, until: u64) -> Result<(), String> {
        let path = self.blockdevs().bottom_path(node).ok_or("its disks are no local files")?;
        let file = identity_of(&path).map_err(|error| format!("{error:#}"))?;
        self.blockdevs().disks().check(&file, until)
    }

    /// How a copy is named in its record; `None` where what is left to do of it is not kept.
    fn map_name(&self, copy: &Copied<'_>, generation: u64) -> Option<MapName> {
        self.map_prefix()?;
        let file = |name: &str| identity_of(&self.blockdevs().bottom_path(name)?).ok();
        let (from, to) = (self.server_of(copy.source), self.server_of(copy.target));
        let source = match &from {
            Some(server) => format!("{FROM_SERVER}{server}"),
            None => format!(" from {}", file(copy.source)?),
        };
        let target = match &to {
            Some(server) => format!("{TO_SERVER}{server}"),
            None => format!(" to {}", file(copy.target)?),
        };
        let Copied { id, kind, .. } = copy;
        let (len, is_backup) = (copy.node.len(), *kind == JobType::Backup);
        let from_server = (is_backup && from.is_some()).then(|| KeptMap::granularity_for(len));
        let renewed = copy.renews.map(|least| KeptMap::granularity_from(len, least));
        Some(MapName {
            generation,
            identity: format!("{} '{id}'{source}{target}", kind.as_str()),
            len,
            watched: copy.is_written.then(|| copy.source.to_owned()),
            since: [renewed, from_server].into_iter().flatten().min(),
            given: (from.is_some() || to.is_some()) && (is_backup || !copy.is_whole),
        })
    }

    /// What is kept of a copy, for its job.
    fn kept_of(&self, copy: &Copied<'_>, parts: Parts, guarded: Option<Guarded>) -> KeptCopy {
        let Parts { map, since, given } = parts;
        let kept = match guarded {
            Some(Guarded { parts, node, watching, until }) => {
                let (all, id) = (self.maps.guarded.clone(), copy.id.to_owned());
                KeptCopy::guarded(map, watching).given_back_to(move |watching| {
                    all.borrow_mut().insert(id, Guarded { parts, node, watching, until });
                })
            }
            None => KeptCopy::new(map),
        };
        kept.until_synced(self.server_of(copy.target).is_some())
            .from_server(self.server_of(copy.source).is_some())
            .with_since(since)
            .with_given(given)
    }

    /// Names the export that a node lies on.
    fn server_of(&self, node: &str) -> Option<String> {
        let bottom = self.blockdevs().get(&self.blockdevs().bottom(node)?).ok()?;
        let info = bottom.info();
        (info.driver == "nbd").then(|| format!("{} of {} bytes", info.filename, bottom.len()))
    }

    /// Refuses a map whose target is not as it was left, or whose source, where that lies on a server.
    async fn check_target(&self, copy: &Copied<'_>, parts: &Parts, until: u64) -> Result<(), Unproven> {
        let servers = [copy.source, copy.target].map(|name| self.server_of(name).is_some());
        if !servers[1] {
            self.check_file_of(copy.target, until)?;
        }
        let is_backup = copy.kind == JobType::Backup;
        if servers == [false, false] {
            return Ok(());
        }
        if let Some(state) = &self.state {
            state.job_goes_far(copy.id);
        }
        let patience = if is_backup { BACKUP_PATIENCE } else { SERVER_PATIENCE };
        let looked = Looked {
            map: &parts.map,
            since: parts.since.as_deref(),
            given: parts.given.as_deref(),
            is_of_the_past: is_backup,
            from_server: servers[0],
        };
        let looking = rt::timeout(patience, has_what_it_should(looked, copy.node, copy.copy));
        // Who ends the daemon does not wait for a server, and nothing is known of the copy then.
        match select(pin!(looking), pin!(self.asked_to_quit())).await {
            Either::Left((looked, _)) => looked.unwrap_or_else(|| {
                let why = format!("its server has not answered all that was asked in {patience:?}");
                Err(Unproven::NotNow(why))
            }),
            Either::Right(((), _)) => Err(Unproven::NotNow("the daemon is ending".into())),
        }
    }

    /// Refuses a map that cannot be relied on. `guarded` is the node whose guard keeps it true.
    async fn check_map(
        &self,
        copy: &Copied<'_>,
        name: &MapName,
        parts: &Parts,
        until: u64,
        guarded: Option<WeakNode>,
    ) -> Result<(), Unproven> {
        if guarded.is_none() && self.server_of(copy.source).is_none() {
            self.check_file_of(copy.source, until)?;
        }
        // The bitmap may be gone: its map of what was written since is not.
        let now = self.map_name(copy, name.generation);
        if now.map(|now| MapName { since: name.since, ..now }).as_ref() != Some(name) {
            return Err("source or target is another one".into());
        }
        let is_same = |node: &WeakNode| node.upgrade().is_some_and(|node| node.is_same(copy.node));
        if guarded.is_some_and(|node| !is_same(&node)) {
            return Err("the source was opened anew".into());
        }
        self.check_target(copy, parts, until).await?;
        match parts.map.is_live() {
            true => Ok(()),
            false => Err("its source was written to".into()),
        }
    }

    /// The map of a copy that goes on, if what it says can be relied on; the error says why not. Where that is not known yet, its
    /// guard keeps it true on; else it is removed where it is not used.
    async fn map_that_goes_on(&self, copy: &Copied<'_>, name: MapName) -> Result<Kept, Unproven> {
        let turn = self.maps.looking.exclusive(0, 1).await;
        let of = |guarded: &Guarded| (guarded.parts.clone(), guarded.until, Some(guarded.node.clone()));
        let guarded = self.maps.guarded.borrow().get(copy.id).map(of);
        let (parts, until, node) = match guarded {
            // Guests may have written to its source since: they were seen.
            Some(guarded) => guarded,
            None if name.watched.is_some() => return Err("its source was not watched".into()),
            None => {
                let parts = self.find_map(copy.id, &name).await?;
                let until = written_until(&parts.map);
                self.maps.running.borrow_mut().insert(copy.id.to_owned(), parts.map.clone());
                (parts, until, None)
            }
        };
        drop(turn);
        let is_guarded = node.is_some();
        let checked = self.check_map(copy, &name, &parts, until, node).await;
        let checked = match checked {
            Err(why @ Unproven::NotNow(_)) if is_guarded || self.is_ending() => return Err(why),
            checked => checked,
        };
        let guarded = self.maps.guarded.borrow_mut().remove(copy.id);
        let checked = match checked {
            Ok(()) if is_guarded && guarded.is_none() => Err("it was given up meanwhile".into()),
            checked => checked,
        };
        if let Err(why) = checked {
            self.maps.running.borrow_mut().remove(copy.id);
            parts.map.remove();
            return Err(why);
        }
        self.maps.running.borrow_mut().insert(copy.id.to_owned(), parts.map.clone());
        Ok((self.kept_of(copy, parts, guarded), name))
    }

    /// Where what is left to do of a copy is kept for the next daemon. Of one that goes on, where this one begins; an error says
    /// why such a one cannot.
    pub(super) async fn found_map(&self, copy: &Copied<'_>) -> Option<Result<Kept, Unproven>> {
        let before = self.jobs().goes_on_as(copy.id)?;
        Some(match before.map {
            Some(name) => self.map_that_goes_on(copy, name).await,
            None => Err(NO_MAP.into()),
        })
    }

    /// The job of that id does not go on.
    pub(super) fn drop_map(&self, id: &str) {
        if let Some(guarded) = self.maps.guarded.borrow_mut().remove(id) {
            guarded.parts.map.remove();
        }
    }

    /// A new map for a copy that begins.
    pub(super) async fn new_map(&self, copy: &Copied<'_>) -> Option<Kept> {
        self.drop_map(copy.id);
        let name = self.map_name(copy, RandomState::new().build_hasher().finish())?;
        let begun = match self.map_places(copy.id, &name) {
            Ok(places) => {
                let all = copy.all;
                let begun = rt::offload(move || places.begin(all)).await;
                begun.map_err(IoError::from).flatten().map_err(|error| error.to_string())
            }
            Err(why) => Err(why),
        };
        match begun {
            Ok(parts) => {
                parts.map.set_alive(seconds(SystemTime::now()));
                self.maps.running.borrow_mut().insert(copy.id.to_owned(), parts.map.clone());
                Some((self.kept_of(copy, parts, None), name))
            }
            Err(reason) => {
                tracing::warn!(
                    job = copy.id,
                    reason,
                    "after a restart this copy begins anew: no map is kept of it"
                );
                None
            }
        }
    }

    /// The map of a mirror or commit: where it can go on, the one that was kept.
    pub(super) async fn map_of(&self, copy: Copied<'_>) -> Result<Option<Kept>, QmpError> {
        let found = self.found_map(&copy).await;
        self.not_ending()?;
        match found {
            Some(Ok(kept)) => return Ok(Some(kept)),
            Some(Err(reason)) => tracing::warn!(job = copy.id, %reason, "everything is copied again"),
            None => {}
        }
        Ok(self.new_map(&copy).await)
    }

    /// Refuses a copy once the daemon is asked to end: what is kept of it is for the next one.
    pub(super) fn not_ending(&self) -> Result<(), QmpError> {
        match self.is_ending() {
            true => Err(QmpError::generic("the daemon is ending: the copy goes on in the next one")),
            false => Ok(()),
        }
    }

    /// Has the maps of jobs that are to go on kept true from now on, where their disks are there. To be called when a node
    /// was added, before anybody can write to it.
    pub(super) async fn guard_maps(&self) {
        let Some(state) = &self.state else { return };
        let _turn = self.maps.looking.exclusive(0, 1).await;
        for (id, kind, name) in state.held_maps() {
            let Some(watched) = &name.watched else { continue };
            let Ok(node) = self.blockdevs().get(watched) else { continue };
            if self.maps.has(&id) {
                // Whether it is still that node is looked at when the job begins.
                continue;
            }
            let found = self.find_map(&id, &name).await;
            let found = found.and_then(|parts| {
                let until = written_until(&parts.map);
                // What a server has is looked at when the job begins.
                match self.server_of(watched) {
                    Some(_) => Ok((parts, until)),
                    None => self.check_file_of(watched, until).map(|()| (parts, until)),
                }
            });
            match found {
                Ok((parts, until)) => {
                    let guard = MapGuard::new(parts.map.clone(), kind == JobType::Backup);
                    let guard = guard.with_since(parts.since.clone());
                    let watching = node.watch(Arc::new(guard)).await;
                    let guarded = Guarded { parts, node: node.downgrade(), watching, until };
                    self.maps.guarded.borrow_mut().insert(id, guarded);
                }
                Err(reason) => {
                    tracing::warn!(job = id, reason, "what was copied is not known any more");
                    state.forget_map(&id);
                    // A daemon that comes after this one finds a map that has missed changes, else.
                    if let Err(error) = self.settle().await {
                        tracing::error!("{}", error.desc);
                    }
                }
            }
        }
    }

    /// Maps whose disks are not there say nothing any more.
    pub(super) fn forget_maps_without_guard(&self) {
        let Some(state) = &self.state else { return };
        for (id, _, name) in state.held_maps() {
            if name.watched.is_some() && !self.maps.has(&id) {
                state.forget_map(&id);
            }
        }
    }

    /// Looks when files of the state were written to last, if a map of theirs may wait for its job or its bitmap. To be called
    /// before this daemon opens them.
    pub(super) fn look_at_disks(&self, files: Vec<String>) {
        let Some(state) = &self.state else { return };
        if !state.held_bitmaps().is_empty() || !state.held_maps().is_empty() {
            self.blockdevs().disks().look(files.into_iter().map(PathBuf::from));
        }
    }

    /// Notes in all maps that this daemon lives. What it does to their files it does before the last such note, or soon after.
    pub(super) fn tick_maps(&self) {
        let now = seconds(SystemTime::now());
        self.maps.running.borrow().values().for_each(|map| map.set_alive(now));
        self.maps.guarded.borrow().values().for_each(|guarded| guarded.parts.map.set_alive(now));
        self.tick_bitmaps(now);
    }

    /// Does that as long as the daemon lives.
    pub(super) async fn keep_ticking(self: Rc<Self>) {
        while !self.has_ended() {
            rt::sleep(ALIVE_INTERVAL).await;
            self.tick_maps();
        }
    }

    /// Removes maps that a daemon before this one has left of jobs that are over.
    pub(super) fn forget_old_maps(&self) {
        let (Some(state), Some((dir, prefix))) = (&self.state, self.map_prefix()) else { return };
        // Who is about to begin a job has its map, too.
        let runs = |id: &str, map: &Arc<KeptMap>| match self.jobs().get(id) {
            Ok(job) => job.status() != JobStatus::Concluded,
            Err(_) => Arc::strong_count(map) > 1,
        };
        self.maps.running.borrow_mut().retain(|id, map| runs(id, map));
        let jobs: Vec<_> =
            state.job_names().iter().map(|id| format!("{prefix}{:016x}", hash(id.as_bytes()))).collect();
        dir.remove_unwanted(&prefix, |name| {
            let map = [SINCE, GIVEN].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            jobs.iter().any(|job| job == map)
        });
    }
}
