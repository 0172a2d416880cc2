//! Maps of copies, which outlive the daemon ([`KeptMap`]): whose they are, where they lie, and what keeps them true while a
//! job that is to go on has not begun again.
//!
//! A map lies beside the volatile journals, on a tmpfs. The record of its job names it. What never happens: a map that missed
//! a change is used. From the moment when a restarted daemon has opened a disk, before anybody can write to it, until the
//! job of its map watches the disk itself, a guard does; where there is none the map is not used.
//!
//! Source and target lie on local files or block devices: what was written there is there after any death of the process. The
//! server of an NBD export may die with this daemon and what it was told, so that a copy from or to one begins anew.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::Arc;

use infill_io::JournalDir;
use infill_job::copy::{KeptCopy, KeptMap, MapGuard, MapOwner};
use infill_job::{JobType, MapName};
use infill_node::{NodeHandle, Watching, WeakNode};
use infill_storage::journal::JournalMemory;
use infill_storage::rt;

use super::control::Control;
use crate::blockdev::{hash, identity_of};

/// Why a job that has no map in its record cannot go on.
pub(super) const NO_MAP: &str = "there is no map of what was copied";

/// A map that is kept true until its job begins again.
struct Guarded {
    map: Arc<KeptMap>,
    node: WeakNode,
    watching: Watching,
}

/// Maps whose jobs have not begun again, by the jobs' ids.
#[derive(Default)]
pub(super) struct Maps(RefCell<BTreeMap<String, Guarded>>);

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

    /// The memory of a job's map, and whose the map in it is to be.
    fn map_memory(&self, id: &str, name: &MapName) -> Result<(Arc<dyn JournalMemory>, MapOwner), String> {
        let (dir, prefix) = self.map_prefix().ok_or("no state is kept")?;
        let file = format!("{prefix}{:016x}", hash(id.as_bytes()));
        let MapName { generation, identity, len, .. } = name.clone();
        let boot = dir.boot().map_err(|error| error.to_string())?;
        let granularity = KeptMap::granularity_for(len);
        let owner = MapOwner { generation, boot, identity, len, granularity };
        let memory = dir.memory(&file, owner.bytes()).map_err(|error| error.to_string())?;
        Ok((memory, owner))
    }

    async fn find_map(&self, id: &str, name: &MapName) -> Result<Arc<KeptMap>, String> {
        let (memory, owner) = self.map_memory(id, name)?;
        rt::offload(move || KeptMap::find(memory, owner)).await.map(Arc::new)
    }

    /// How a copy is named in its record; `None` where what is left to do of it is not kept.
    fn map_name(&self, copy: &Copied<'_>, generation: u64) -> Option<MapName> {
        self.map_prefix()?;
        let file = |name: &str| identity_of(&self.blockdevs().bottom_path(name)?).ok();
        let (source, target) = (file(copy.source)?, file(copy.target)?);
        let Copied { id, kind, .. } = copy;
        Some(MapName {
            generation,
            identity: format!("{} '{id}' from {source} to {target}", kind.as_str()),
            len: copy.node.len(),
            watched: copy.is_written.then(|| copy.source.to_owned()),
        })
    }

    /// The map of a copy that goes on, if what it says can be relied on; the error says why not.
    async fn map_that_goes_on(&self, copy: &Copied<'_>, name: MapName) -> Result<Kept, String> {
        let guarded = self.maps.0.borrow_mut().remove(copy.id);
        let is_same = |node: &WeakNode| node.upgrade().is_some_and(|node| node.is_same(copy.node));
        let node = guarded.as_ref().map(|guarded| guarded.node.clone());
        // From here on: where it is not used, it is removed.
        let kept = match guarded {
            Some(guarded) => KeptCopy::guarded(guarded.map, guarded.watching),
            None if name.watched.is_some() => return Err("its source was not watched".into()),
            None => KeptCopy::new(self.find_map(copy.id, &name).await?),
        };
        if self.map_name(copy, name.generation).as_ref() != Some(&name) {
            return Err("source or target is another one".into());
        }
        if node.is_some_and(|node| !is_same(&node)) {
            return Err("the source was opened anew".into());
        }
        match kept.map().is_live() {
            true => Ok((kept, name)),
            false => Err("its source was written to".into()),
        }
    }

    /// Where what is left to do of a copy is kept for the next daemon. Of one that goes on, where this one begins; an error says
    /// why such a one cannot.
    pub(super) async fn found_map(&self, copy: &Copied<'_>) -> Option<Result<Kept, String>> {
        let before = self.jobs().goes_on_as(copy.id)?;
        Some(match before.map {
            Some(name) => self.map_that_goes_on(copy, name).await,
            None => Err(NO_MAP.into()),
        })
    }

    /// The job of that id does not go on.
    pub(super) fn drop_map(&self, id: &str) {
        if let Some(guarded) = self.maps.0.borrow_mut().remove(id) {
            guarded.map.remove();
        }
    }

    /// A new map for a copy that begins.
    pub(super) async fn new_map(&self, copy: &Copied<'_>) -> Option<Kept> {
        self.drop_map(copy.id);
        let name = self.map_name(copy, RandomState::new().build_hasher().finish())?;
        let begun = match self.map_memory(copy.id, &name) {
            Ok((memory, owner)) => {
                let all = copy.all;
                let begun = rt::offload(move || KeptMap::begin(memory, owner, all)).await;
                begun.map_err(|error| error.to_string())
            }
            Err(why) => Err(why),
        };
        match begun {
            Ok(map) => Some((KeptCopy::new(Arc::new(map)), name)),
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
    pub(super) async fn map_of(&self, copy: Copied<'_>) -> Option<Kept> {
        match self.found_map(&copy).await {
            Some(Ok(kept)) => return Some(kept),
            Some(Err(reason)) => tracing::warn!(job = copy.id, reason, "everything is copied again"),
            None => {}
        }
        self.new_map(&copy).await
    }

    /// Has the maps of jobs that are to go on kept true from now on, where their disks are there. To be called when a node
    /// was added, before anybody can write to it.
    pub(super) async fn guard_maps(&self) {
        let Some(state) = &self.state else { return };
        for (id, kind, name) in state.held_maps() {
            let Some(watched) = &name.watched else { continue };
            let Ok(node) = self.blockdevs().get(watched) else { continue };
            let known = self.maps.0.borrow().get(&id).map(|guarded| guarded.node.clone());
            if known.is_some() {
                // Whether it is still that node is looked at when the job begins.
                continue;
            }
            match self.find_map(&id, &name).await {
                Ok(map) => {
                    let guard = Arc::new(MapGuard::new(map.clone(), kind == JobType::Backup));
                    let guarded = Guarded { map, node: node.downgrade(), watching: node.watch(guard).await };
                    self.maps.0.borrow_mut().insert(id, guarded);
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
            if name.watched.is_some() && !self.maps.0.borrow().contains_key(&id) {
                state.forget_map(&id);
            }
        }
    }

    /// Removes maps that a daemon before this one has left of jobs that are over.
    pub(super) fn forget_old_maps(&self) {
        let (Some(state), Some((dir, prefix))) = (&self.state, self.map_prefix()) else { return };
        let jobs: Vec<_> =
            state.job_names().iter().map(|id| format!("{prefix}{:016x}", hash(id.as_bytes()))).collect();
        dir.remove_unwanted(&prefix, |name| jobs.iter().any(|job| job == name));
    }
}
