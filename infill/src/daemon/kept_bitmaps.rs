//! Dirty bitmaps, kept for the next daemon (`--state DIR`).
//!
//! A record names the bitmap and a map ([`KeptMap`]), which lies beside those of copies and says at least what the bitmap says.
//! A restarted daemon adds the bitmap to its node again before anybody can write there, with what the map says. What never
//! happens: a bitmap comes back that misses a change. Where its map is not there, or not proven to be true (as of copies:
//! `docs/decisions/0012`), the bitmap comes back *inconsistent*, which can only be taken away.
//!
//! A *persistent* one is kept by its image, and by a map all the same: where the image says that what it holds is out of date,
//! because a daemon has died, the map says what the bitmap said. What an image holds and calls right is right, whatever is
//! recorded; and what was stored at an end in order is not recorded any more.
//!
//! Records follow the bitmaps that there are ([`Control::note_bitmaps`]), so that whatever adds, changes or takes one away is
//! seen. Maps say less only when what has led to that is noted: a backup that has cleared a bitmap and is not known to the next
//! daemon would else have taken changes along that nobody has.

use std::cell::{Cell, RefCell};
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use infill_base::IoError;
use infill_io::JournalDir;
use infill_job::MapName;
use infill_job::copy::{KeptMap, MapOwner};
use infill_node::{Bitmap, Held, NodeHandle};
use infill_qmp::command::Command;
use infill_qmp::transaction::{Transaction, TransactionAction};
use infill_qmp::{BitmapAdd, BitmapCommand, QmpError};
use infill_storage::journal::JournalMemory;
use infill_storage::{RangeLock, rt};
use serde_json::json;

use super::control::Control;
use super::maps::{seconds, written_until};
use super::state::{KeptBitmap, State, has_made_up_name};
use crate::blockdev::{hash, hold, identity_of};

/// The most memory that the maps of all bitmaps take, in bytes: that of a host that has other work.
const MAPS_BYTES_MAX: usize = 512 << 20;

/// A bitmap and its map.
struct One {
    bitmap: Arc<Bitmap>,
    map: Arc<KeptMap>,
    name: MapName,
}

/// The bitmaps of this daemon that the next one is to have.
pub(super) struct KeptBitmaps {
    all: RefCell<Vec<One>>,
    /// Maps of bitmaps that are gone, to be removed when that is noted.
    gone: RefCell<Vec<Arc<KeptMap>>>,
    /// Those of images for which there could be no map.
    without: RefCell<Vec<Weak<Bitmap>>>,
    /// One changes bitmaps at a time.
    pub(super) turn: RangeLock,
    /// How many transactions are half done.
    half_done: Cell<usize>,
    /// How many commands may have started jobs that are not noted.
    unnoted: Cell<usize>,
}

impl Default for KeptBitmaps {
    fn default() -> KeptBitmaps {
        KeptBitmaps {
            all: RefCell::default(),
            gone: RefCell::default(),
            without: RefCell::default(),
            turn: RangeLock::new(),
            half_done: Cell::new(0),
            unnoted: Cell::new(0),
        }
    }
}

/// A map that was begun for a bitmap that is about to be added; dropped before that, it is removed.
pub(super) struct Begun(Option<(Arc<KeptMap>, MapName)>);

impl Drop for Begun {
    fn drop(&mut self) {
        if let Some((map, _)) = self.0.take() {
            map.remove();
        }
    }
}

/// A command is being carried out while this lives, and what it has made is not noted.
pub(super) struct Unnoted {
    control: Rc<Control>,
    is_transaction: bool,
}

impl Drop for Unnoted {
    fn drop(&mut self) {
        let kept = &self.control.kept_bitmaps;
        kept.unnoted.set(kept.unnoted.get() - 1);
        kept.half_done.set(kept.half_done.get() - usize::from(self.is_transaction));
    }
}

/// What the maps are to follow to: each bitmap with the moment.
pub(super) type ToFollow = Vec<(Arc<Bitmap>, u64)>;

/// Bitmaps that a command adds to memory alone.
pub(super) fn added_to_memory(command: &Command) -> Vec<&BitmapAdd> {
    let adds: Vec<&BitmapAdd> = match command {
        Command::Bitmap(BitmapCommand::Add(add)) => vec![add],
        Command::Transaction(Transaction { actions, .. }) => {
            let add = |action| match action {
                &TransactionAction::Bitmap(BitmapCommand::Add(ref add)) => Some(add),
                _ => None,
            };
            actions.iter().filter_map(add).collect()
        }
        _ => Vec::new(),
    };
    adds.into_iter().filter(|add| !add.persistent).collect()
}

/// Whether a bitmap of that node is to be in the state: what an image shows and will not change speaks for itself.
fn to_be_noted(state: &State, node: &str, bitmap: &Bitmap) -> bool {
    match bitmap.is_persistent() {
        false => true,
        true if bitmap.is_inconsistent() => state.has_bitmap(node, bitmap.name()),
        true => !bitmap.is_read_only() && !has_made_up_name(node),
    }
}

/// Refuses a persistent bitmap that the image, which shows `stored` of it, could not take at the end.
fn fits_image(kept: &KeptBitmap, node: &NodeHandle, stored: Option<&Bitmap>) -> Result<(), String> {
    match stored {
        _ if !kept.persistent => Ok(()),
        Some(stored) if stored.is_read_only() => Err("its image is open read-only".into()),
        Some(stored) if stored.map().granularity() != kept.granularity => {
            Err("its image has one of another granularity".into())
        }
        Some(_) => Ok(()),
        None => {
            node.check_persistent(&kept.node, &kept.name, kept.granularity).map_err(|error| error.to_string())
        }
    }
}

impl Control {
    /// Until the guard goes, maps say no less, for jobs may begin that are not noted; with `is_transaction`, no records follow.
    pub(super) fn begin_unnoted(self: &Rc<Self>, is_transaction: bool) -> Unnoted {
        let kept = &self.kept_bitmaps;
        kept.unnoted.set(kept.unnoted.get() + 1);
        kept.half_done.set(kept.half_done.get() + usize::from(is_transaction));
        Unnoted { control: self.clone(), is_transaction }
    }

    /// How the names of the maps of this state's bitmaps begin, where there may be maps.
    fn bitmap_prefix(&self) -> Option<(JournalDir, String)> {
        let dir = self.state.as_ref()?.directory();
        let dir = std::fs::canonicalize(&dir).unwrap_or(dir);
        let prefix = format!("bitmap-{:016x}-", hash(dir.as_os_str().as_encoded_bytes()));
        Some((self.blockdevs().journal_dir()?, prefix))
    }

    fn bitmap_memory(
        &self,
        name: &MapName,
        granularity: u64,
    ) -> Result<(Arc<dyn JournalMemory>, MapOwner), String> {
        let (dir, prefix) = self.bitmap_prefix().ok_or("there is no directory for it")?;
        let MapName { generation, identity, len, .. } = name.clone();
        let boot = dir.boot().map_err(|error| error.to_string())?;
        let granularity = KeptMap::granularity_from(len, granularity);
        let owner = MapOwner { generation, boot, identity, len, granularity };
        let memory = dir.memory(&format!("{prefix}{generation:016x}"), owner.bytes());
        Ok((memory.map_err(|error| error.to_string())?, owner))
    }

    /// How the map of a bitmap is named in its record; an error says why there is none.
    fn bitmap_name(&self, node: &str, bitmap: &str, len: u64, generation: u64) -> Result<MapName, String> {
        let path = self.blockdevs().bottom_path(node).ok_or("its disk is no local file")?;
        let file = identity_of(&path).map_err(|error| format!("{error:#}"))?;
        let identity = format!("bitmap '{bitmap}' of '{node}' in {file}");
        Ok(MapName { generation, identity, len, watched: None, since: None, given: false })
    }

    /// Begins the map of a bitmap that is about to be added to `node`. `None`: the next daemon does not have the bitmap's bits.
    pub(super) async fn begin_bitmap(&self, node: &NodeHandle, add: &BitmapAdd) -> Option<Begun> {
        self.state.as_ref().filter(|_| !(add.persistent && has_made_up_name(&add.node)))?;
        let granularity = add.granularity.map_or_else(|| node.default_bitmap_granularity(), u64::from);
        let begun = async {
            let generation = RandomState::new().build_hasher().finish();
            let name = self.bitmap_name(&add.node, &add.name, node.len(), generation)?;
            let (memory, owner) = self.bitmap_memory(&name, granularity)?;
            let others: usize = self.kept_bitmaps.all.borrow().iter().map(|one| one.map.bytes()).sum();
            if others + owner.bytes() > MAPS_BYTES_MAX {
                return Err(format!(
                    "the maps of all bitmaps would take more than {MAPS_BYTES_MAX} bytes of memory"
                ));
            }
            let map = rt::offload(move || KeptMap::begin(memory, owner, false)).await;
            let map = map.map_err(IoError::from).flatten();
            Ok::<_, String>((Arc::new(map.map_err(|error| error.to_string())?), name))
        };
        match begun.await {
            Ok(begun) => Some(Begun(Some(begun))),
            Err(reason) => {
                let (node, bitmap) = (&add.node, &add.name);
                tracing::warn!(node, bitmap, reason, "after a restart this bitmap is inconsistent");
                None
            }
        }
    }

    /// The bitmap, which nobody has or whose node is held, is kept in this map.
    pub(super) fn keep_bitmap(&self, bitmap: &Arc<Bitmap>, mut begun: Begun) {
        if begun.0.as_ref().is_none_or(|(map, name)| {
            // The disk has another size by now.
            name.len != bitmap.map().len() || map.granularity() < bitmap.map().granularity()
        }) {
            return;
        }
        let Some((map, name)) = begun.0.take() else { return };
        map.set_alive(seconds(SystemTime::now()));
        map.mark_all(bitmap.map());
        bitmap.keep_in(map.clone());
        map.go_live();
        let kept = &self.kept_bitmaps;
        let mut all = kept.all.borrow_mut();
        // Of a disk of another size.
        let old = all.extract_if(.., |one| Arc::ptr_eq(&one.bitmap, bitmap)).map(|one| one.map);
        kept.gone.borrow_mut().extend(old);
        all.push(One { bitmap: bitmap.clone(), map, name });
    }

    /// Has bitmaps be kept that were before the node was resized, with those below it.
    pub(super) async fn keep_bitmaps_of_resized(&self, node: &str) {
        for layer in self.blockdevs().chain_with_filters(node) {
            self.keep_bitmaps_anew(&layer).await;
        }
    }

    async fn keep_bitmaps_anew(&self, node: &str) {
        let Ok(handle) = self.blockdevs().get(node) else { return };
        for bitmap in handle.bitmaps() {
            self.keep_bitmap_anew(node, &handle, &bitmap).await;
        }
    }

    async fn keep_bitmap_anew(&self, node: &str, handle: &NodeHandle, bitmap: &Arc<Bitmap>) {
        if bitmap.is_read_only() || bitmap.is_inconsistent() || bitmap.is_kept() {
            return;
        }
        let add = BitmapAdd {
            node: node.to_owned(),
            name: bitmap.name().to_owned(),
            granularity: u32::try_from(bitmap.map().granularity()).ok(),
            persistent: bitmap.is_persistent(),
            disabled: false,
        };
        let Some(begun) = self.begin_bitmap(handle, &add).await else { return };
        if let Ok(_held) = hold(node, handle).await {
            self.keep_bitmap(bitmap, begun);
        }
    }

    /// Has those be kept that images have brought along since the last call. To be called when nodes were opened, before anybody
    /// writes to them if that can be.
    pub(super) async fn keep_stored_bitmaps(&self) {
        if self.state.is_none() || self.is_ending() {
            return;
        }
        for (node, handle) in self.blockdevs().graph().list() {
            if has_made_up_name(&node) {
                continue;
            }
            for bitmap in handle.bitmaps().into_iter().filter(|bitmap| bitmap.is_persistent()) {
                if bitmap.is_kept() || self.is_without(&bitmap) {
                    continue;
                }
                self.keep_bitmap_anew(&node, &handle, &bitmap).await;
                if !bitmap.is_kept() {
                    self.kept_bitmaps.without.borrow_mut().push(Arc::downgrade(&bitmap));
                }
            }
        }
    }

    fn is_without(&self, bitmap: &Arc<Bitmap>) -> bool {
        let mut without = self.kept_bitmaps.without.borrow_mut();
        without.retain(|one| one.strong_count() > 0);
        without.iter().any(|one| std::ptr::eq(one.as_ptr(), Arc::as_ptr(bitmap)))
    }

    /// All nodes are closed, in order: what their images hold is right, and nothing is to be said of it.
    pub(super) fn forget_stored_bitmaps(&self) {
        let Some(state) = &self.state else { return };
        state.forget_stored_bitmaps();
        let mut all = self.kept_bitmaps.all.borrow_mut();
        let stored = all.extract_if(.., |one| one.bitmap.is_persistent()).map(|one| one.map);
        self.kept_bitmaps.gone.borrow_mut().extend(stored);
    }

    /// Where a bitmap's bits are kept, if they are.
    fn bits_of(&self, bitmap: &Arc<Bitmap>) -> Option<MapName> {
        let all = self.kept_bitmaps.all.borrow();
        let one = all.iter().find(|one| Arc::ptr_eq(&one.bitmap, bitmap));
        one.filter(|_| bitmap.is_kept()).map(|one| one.name.clone())
    }

    /// Has the records say which bitmaps there are.
    pub(super) fn note_bitmaps(&self) {
        let Some(state) = &self.state else { return };
        if self.is_ending() {
            return;
        }
        let (mut records, mut bitmaps) = (Vec::new(), Vec::new());
        for (node, handle) in self.blockdevs().graph().list() {
            // The oldest first.
            for bitmap in
                handle.bitmaps().into_iter().rev().filter(|bitmap| to_be_noted(state, &node, bitmap))
            {
                records.push(KeptBitmap {
                    node: node.clone(),
                    name: bitmap.name().to_owned(),
                    granularity: bitmap.map().granularity(),
                    persistent: bitmap.is_persistent(),
                    disabled: !bitmap.is_recording(),
                    bits: self.bits_of(&bitmap),
                });
                bitmaps.push(bitmap);
            }
        }
        state.keep_bitmaps(records);
        let is_there =
            |one: &One| one.bitmap.is_kept() && bitmaps.iter().any(|bitmap| Arc::ptr_eq(bitmap, &one.bitmap));
        let gone =
            self.kept_bitmaps.all.borrow_mut().extract_if(.., |one| !is_there(one)).collect::<Vec<_>>();
        self.kept_bitmaps.gone.borrow_mut().extend(gone.into_iter().map(|one| one.map));
    }

    /// Has records follow, and says what the maps are to follow to once the state is written.
    pub(super) fn begin_to_follow(&self) -> (ToFollow, Vec<Arc<KeptMap>>) {
        let kept = &self.kept_bitmaps;
        let Some(state) = &self.state else { return Default::default() };
        if kept.half_done.get() == 0 {
            self.note_bitmaps();
        }
        if kept.unnoted.get() > 0 {
            return Default::default();
        }
        let moment = |one: &One| {
            let moment = one.bitmap.to_follow().filter(|_| !one.bitmap.is_used())?;
            Some((one.bitmap.clone(), moment))
        };
        let jobs = state.bitmaps_in_jobs();
        let nodes = self.blockdevs().graph().list();
        let in_job = |bitmap: &Arc<Bitmap>| {
            jobs.iter().any(|(node, name)| {
                name == bitmap.name()
                    && nodes.iter().any(|(other, handle)| {
                        other == node && handle.bitmap(name).is_ok_and(|found| Arc::ptr_eq(&found, bitmap))
                    })
            })
        };
        let mut to_follow: ToFollow = kept.all.borrow().iter().filter_map(moment).collect();
        to_follow.retain(|(bitmap, _)| !in_job(bitmap));
        (to_follow, kept.gone.take())
    }

    /// The state is written.
    pub(super) fn follow_bitmaps(&self, (to_follow, gone): (ToFollow, Vec<Arc<KeptMap>>)) {
        to_follow.into_iter().for_each(|(bitmap, moment)| bitmap.follow(moment));
        gone.into_iter().for_each(|map| map.remove());
    }

    /// The state could not be written.
    pub(super) fn follow_another_time(&self, (_, gone): (ToFollow, Vec<Arc<KeptMap>>)) {
        self.kept_bitmaps.gone.borrow_mut().extend(gone);
    }

    /// Adds bitmaps of the state to nodes that are there. To be called when a node was added, before anybody can write to it.
    pub(super) async fn restore_bitmaps(&self) {
        let Some(state) = &self.state else { return };
        let mut held = Vec::new();
        for (at, kept) in state.held_bitmaps() {
            if let Ok(node) = self.blockdevs().get(&kept.node) {
                let node_held = hold(&kept.node, &node).await;
                held.push((at, kept, node, node_held));
            }
        }
        let _turn = match held.is_empty() {
            true => return,
            false => self.kept_bitmaps.turn.exclusive(0, 1).await,
        };
        for (at, kept, node, node_held) in &held {
            if state.held_bitmaps().iter().any(|(other, _)| other == at) {
                let outcome = self.restore_bitmap(kept, node, node_held.as_ref().ok()).await;
                self.note_outcome(state, *at, outcome);
            }
        }
        // Before the nodes are let go: a record of a bitmap that was lost names no map any more.
        self.note_bitmaps();
        if let Err(error) = self.settle().await {
            tracing::error!("{}", error.desc);
        }
    }

    async fn restore_bitmap(
        &self,
        kept: &KeptBitmap,
        node: &NodeHandle,
        held: Option<&Held>,
    ) -> Result<(), QmpError> {
        let error = |error: infill_node::BitmapError| QmpError::generic(error.to_string());
        let stored = node.bitmap(&kept.name).ok().filter(|stored| kept.persistent && stored.is_persistent());
        if stored.as_ref().is_some_and(|stored| !stored.is_inconsistent()) {
            return Ok(());
        }
        if stored.is_none() {
            node.check_new_bitmap(&kept.name).map_err(error)?;
        }
        let bitmap = Bitmap::new(kept.name.as_str(), node.len(), kept.granularity).map_err(error)?;
        bitmap.set_persistent(kept.persistent);
        let found = match (held, &kept.bits) {
            (None, _) => Err("its node could not be held".into()),
            (_, None) => Err("its bits were not kept".into()),
            (Some(held), Some(name)) => match fits_image(kept, node, stored.as_deref()) {
                Ok(()) => self.found_bits(kept, name, node).await.map(|map| (held, map, name)),
                Err(reason) => Err(reason),
            },
        };
        match found {
            Ok((held, map, name)) => {
                if let Some(stored) = &stored {
                    node.remove_bitmap(stored);
                }
                map.copy_into(bitmap.map());
                bitmap.set_recording(!kept.disabled);
                let bitmap = Arc::new(bitmap);
                bitmap.keep_in(map.clone());
                held.add_bitmap(bitmap.clone()).map_err(error)?;
                self.kept_bitmaps.all.borrow_mut().push(One { bitmap, map, name: name.clone() });
            }
            Err(reason) => {
                let (node_name, bitmap_name) = (&kept.node, &kept.name);
                tracing::warn!(
                    node = node_name,
                    bitmap = bitmap_name,
                    reason,
                    "a bitmap has come back inconsistent: begin with a full backup"
                );
                if stored.is_none() {
                    node.show_lost(bitmap.lost());
                }
            }
        }
        Ok(())
    }

    /// The map of a bitmap, if it says at least what has changed; the error says why not.
    async fn found_bits(
        &self,
        kept: &KeptBitmap,
        name: &MapName,
        node: &NodeHandle,
    ) -> Result<Arc<KeptMap>, String> {
        if self.bitmap_name(&kept.node, &kept.name, node.len(), name.generation)? != *name {
            return Err("its disk is another one, or has another size".into());
        }
        let (memory, owner) = self.bitmap_memory(name, kept.granularity)?;
        let map = Arc::new(
            rt::offload(move || KeptMap::find(memory, owner))
                .await
                .map_err(|panicked| panicked.to_string())??,
        );
        let until = written_until(&map);
        let checked = self.blockdevs().disks().check(&name.identity, until);
        if checked.is_err() {
            map.remove();
        }
        checked.map(|()| map)
    }

    /// Notes in all maps of bitmaps that this daemon lives.
    pub(super) fn tick_bitmaps(&self, now: u64) {
        self.kept_bitmaps.all.borrow().iter().for_each(|one| one.map.set_alive(now));
    }

    /// Removes maps that a daemon before this one has left of bitmaps that are gone.
    pub(super) fn forget_old_bitmaps(&self) {
        let (Some(state), Some((dir, prefix))) = (&self.state, self.bitmap_prefix()) else { return };
        let wanted: Vec<String> =
            state.bitmap_maps().into_iter().map(|name| format!("{prefix}{:016x}", name.generation)).collect();
        dir.remove_unwanted(&prefix, |name| wanted.iter().any(|wanted| wanted == name));
    }

    /// Refuses to keep a bitmap of a node that has another name after a restart.
    pub(super) fn check_bitmap_nodes(&self, command: &Command) -> Result<(), QmpError> {
        let mut adds = added_to_memory(command).into_iter();
        adds.try_for_each(|add| super::state::check_names(self, &json!(add.node)))
    }
}
