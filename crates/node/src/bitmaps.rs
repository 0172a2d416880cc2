//! Dirty bitmaps of a node, by name: what has changed since somebody asked to know.
//!
//! A bitmap is a [`Watcher`] that can be told to record or not, at once and from any thread; it holds no node, so that a node
//! which goes takes its bitmaps with it. It is added while its node is held: a change in flight would not be seen. What
//! never happens: a bit that is missing. A bit too many (a change that failed, one that was in flight when recording began)
//! costs a block that is copied once more.
//!
//! While somebody *uses* a bitmap (a job, an export), managers may not change it; changes of the disk go on being recorded.
//!
//! A *persistent* one is kept by its image: the driver gives it at open ([`Node::stored_bitmaps`](crate::Node)) and takes it
//! when the node is closed. While it is used, the image says that what it holds is out of date: after a crash the bitmap is
//! *inconsistent*, which nobody can take for one that says the truth.

use std::fmt;

use futures_util::future::LocalBoxFuture;
use infill_base::{Ctx, IoResult};
use infill_storage::sync::atomic::{AtomicBool, Ordering};
use infill_storage::sync::{Arc, Mutex, RwLock, lock, read, write};

use crate::keeper::Keeper;
use crate::{Change, DirtyMap, Held, Kept, KeptBits, NodeHandle, Watcher, changes};

/// Longest name of a bitmap, in bytes (QEMU's limit, and that of the qcow2 format).
pub const BITMAP_NAME_BYTES_MAX: usize = 1023;
/// Most bitmaps of one node: each is asked at every change.
pub const BITMAPS_MAX: usize = 4096;
/// Least granularity, in bytes.
pub const BITMAP_GRANULARITY_MIN: u64 = 512;
/// Bounds of the granularity that is taken where none is asked for, in bytes.
const GRANULARITY_DEFAULT: std::ops::RangeInclusive<u64> = 4096..=65536;

/// Why something cannot be done with a bitmap. The words are QEMU's.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BitmapError {
    /// There is one of this name.
    Exists(String),
    /// The name is empty.
    Unnamed,
    /// The name is too long.
    LongName(String),
    /// There are too many already.
    TooMany,
    /// No power of two, or too small.
    Granularity,
    /// There is none of this name.
    NotFound(String),
    /// A job or an export uses it.
    Busy(String),
    /// Its image is open read-only.
    ReadOnly(String),
    /// It was not stored when its image was last in use: what it says is not true.
    Inconsistent(String),
    /// They belong to disks of different sizes (destination, source).
    Sizes(u64, u64),
}

impl fmt::Display for BitmapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BitmapError::Exists(name) => write!(f, "Bitmap already exists: {name}"),
            BitmapError::Unnamed => f.write_str("Bitmap name cannot be empty"),
            BitmapError::LongName(name) => write!(f, "Bitmap name too long: {name}"),
            BitmapError::TooMany => write!(f, "a node has at most {BITMAPS_MAX} bitmaps"),
            BitmapError::Granularity => f.write_str("Granularity must be power of 2 and at least 512"),
            BitmapError::NotFound(name) => write!(f, "Dirty bitmap '{name}' not found"),
            BitmapError::Busy(name) => {
                write!(f, "Bitmap '{name}' is currently in use by another operation and cannot be used")
            }
            BitmapError::ReadOnly(name) => write!(f, "Bitmap '{name}' is readonly and cannot be modified"),
            BitmapError::Inconsistent(name) => {
                write!(f, "Bitmap '{name}' is inconsistent and cannot be used")
            }
            BitmapError::Sizes(destination, source) => write!(
                f,
                "Bitmaps are of different sizes (destination size is {destination}, source size is {source}) and can't \
                 be merged"
            ),
        }
    }
}

impl std::error::Error for BitmapError {}

/// A dirty bitmap.
#[derive(Debug)]
pub struct Bitmap {
    name: String,
    map: DirtyMap,
    recording: AtomicBool,
    persistent: AtomicBool,
    read_only: bool,
    inconsistent: bool,
    used: AtomicBool,
    /// Keeps it for the next process.
    keeper: RwLock<Option<Arc<Keeper>>>,
}

/// Somebody's use of a bitmap: nobody else may use it or change it until this goes.
#[must_use = "it is used only while this lives"]
#[derive(Debug)]
pub struct BitmapUse(Arc<Bitmap>);

impl BitmapUse {
    /// The bitmap.
    pub fn bitmap(&self) -> &Arc<Bitmap> {
        &self.0
    }
}

impl Drop for BitmapUse {
    fn drop(&mut self) {
        self.0.used.store(false, Ordering::SeqCst);
    }
}

impl Bitmap {
    /// A clean one for a disk of `len` bytes, which records.
    pub fn new(name: impl Into<String>, len: u64, granularity: u64) -> Result<Bitmap, BitmapError> {
        let name = name.into();
        if name.is_empty() {
            return Err(BitmapError::Unnamed);
        }
        if name.len() > BITMAP_NAME_BYTES_MAX {
            return Err(BitmapError::LongName(name));
        }
        if granularity < BITMAP_GRANULARITY_MIN || !granularity.is_power_of_two() {
            return Err(BitmapError::Granularity);
        }
        Ok(Bitmap {
            name,
            map: DirtyMap::new(len, granularity),
            recording: AtomicBool::new(true),
            persistent: AtomicBool::new(false),
            read_only: false,
            inconsistent: false,
            used: AtomicBool::new(false),
            keeper: RwLock::new(None),
        })
    }

    /// It was lost, in part or in whole: nobody can use it, only take it away.
    pub fn lost(self) -> Bitmap {
        Bitmap { inconsistent: true, recording: AtomicBool::new(false), ..self }
    }

    /// Is kept in `bits`, which say at least what it says, from now on. To be called while no change is in flight.
    pub fn keep_in(&self, bits: Arc<dyn KeptBits>) {
        *write(&self.keeper) = Some(Arc::new(Keeper::new(bits)));
    }

    fn keeper(&self) -> Option<Arc<Keeper>> {
        read(&self.keeper).clone()
    }

    /// Whether it is kept for the next process.
    pub fn is_kept(&self) -> bool {
        read(&self.keeper).is_some()
    }

    /// Is not kept any more, and nobody finds what was.
    pub(crate) fn keep_no_longer(&self) {
        if let Some(keeper) = write(&self.keeper).take() {
            keeper.void();
        }
    }

    /// Nothing is dirty from here on.
    pub fn clear(&self) {
        if let Some(keeper) = self.keeper() {
            keeper.shrinks();
        }
        self.map.clear(0, u64::MAX);
    }

    /// What is dirty in `other` is dirty here too.
    pub fn merge(&self, other: &DirtyMap) {
        self.map.merge(other);
        if let Some(keeper) = self.keeper() {
            keeper.mark_all(other);
        }
    }

    /// Says what `other` says.
    pub fn become_like(&self, other: &DirtyMap) {
        if let Some(keeper) = self.keeper() {
            keeper.shrinks();
        }
        self.map.become_like(other);
        if let Some(keeper) = self.keeper() {
            keeper.mark_all(other);
        }
    }

    /// Says less than what is kept of it since that moment; `None`: it does not.
    pub fn to_follow(&self) -> Option<u64> {
        self.keeper()?.to_follow()
    }

    /// What is kept of it follows, if it was not made to say less again since [`Bitmap::to_follow`] has given that moment.
    pub fn follow(&self, moment: u64) {
        if let Some(keeper) = self.keeper() {
            keeper.follow(&self.map, moment);
        }
    }

    /// As it was found in an image.
    pub fn stored(self, read_only: bool, inconsistent: bool) -> Bitmap {
        let recording = AtomicBool::new(!inconsistent && self.recording.load(Ordering::SeqCst));
        Bitmap { read_only, inconsistent, recording, persistent: AtomicBool::new(true), ..self }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is dirty.
    pub fn map(&self) -> &DirtyMap {
        &self.map
    }

    /// Whether changes are recorded.
    pub fn is_recording(&self) -> bool {
        self.recording.load(Ordering::SeqCst)
    }

    /// Records changes from now on, or no longer.
    pub fn set_recording(&self, recording: bool) {
        self.recording.store(recording, Ordering::SeqCst);
        if let Some(keeper) = self.keeper().filter(|_| recording) {
            keeper.mark_under_way();
        }
    }

    /// Whether its image keeps it.
    pub fn is_persistent(&self) -> bool {
        self.persistent.load(Ordering::SeqCst)
    }

    /// Whether its image is to keep it.
    pub fn set_persistent(&self, persistent: bool) {
        self.persistent.store(persistent, Ordering::SeqCst);
    }

    /// Whether its image is open read-only, and it is what stands there.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether what it says is not true.
    pub fn is_inconsistent(&self) -> bool {
        self.inconsistent
    }

    /// Whether a job or an export uses it.
    pub fn is_used(&self) -> bool {
        self.used.load(Ordering::SeqCst)
    }

    /// Whether it may be taken away: it may be inconsistent.
    pub fn check_removable(&self) -> Result<(), BitmapError> {
        if self.is_used() {
            return Err(BitmapError::Busy(self.name.clone()));
        }
        match self.read_only {
            true => Err(BitmapError::ReadOnly(self.name.clone())),
            false => Ok(()),
        }
    }

    /// Whether it may be read.
    pub fn check_readable(&self) -> Result<(), BitmapError> {
        if self.is_used() {
            return Err(BitmapError::Busy(self.name.clone()));
        }
        match self.inconsistent {
            true => Err(BitmapError::Inconsistent(self.name.clone())),
            false => Ok(()),
        }
    }

    /// Whether it may be changed.
    pub fn check_changeable(&self) -> Result<(), BitmapError> {
        self.check_removable()?;
        self.check_readable()
    }

    /// Uses it, alone, for reading.
    pub fn use_readable(self: &Arc<Self>) -> Result<BitmapUse, BitmapError> {
        self.check_readable()?;
        match self.used.swap(true, Ordering::SeqCst) {
            true => Err(BitmapError::Busy(self.name.clone())),
            false => Ok(BitmapUse(self.clone())),
        }
    }

    /// Uses it, alone, in order to take it away.
    pub fn use_removable(self: &Arc<Self>) -> Result<BitmapUse, BitmapError> {
        self.check_removable()?;
        match self.used.swap(true, Ordering::SeqCst) {
            true => Err(BitmapError::Busy(self.name.clone())),
            false => Ok(BitmapUse(self.clone())),
        }
    }

    /// Uses it, alone, for changing it.
    pub fn use_changeable(self: &Arc<Self>) -> Result<BitmapUse, BitmapError> {
        self.check_changeable()?;
        self.use_readable()
    }

    /// Whether `source` may be merged into this one, if this one may be changed.
    pub fn check_merge(&self, source: &Bitmap) -> Result<(), BitmapError> {
        source.check_readable()?;
        match (self.map.len(), source.map.len()) {
            (ours, theirs) if ours == theirs => Ok(()),
            (ours, theirs) => Err(BitmapError::Sizes(ours, theirs)),
        }
    }
}

impl Watcher for Bitmap {
    fn before<'a>(&'a self, _: &'a Ctx, change: &'a Change) -> Option<LocalBoxFuture<'a, IoResult<Kept>>> {
        let under_way = self.keeper()?.begin(change.at, change.len, || self.is_recording());
        let kept: Kept = Some(Box::new(under_way));
        Some(Box::pin(std::future::ready(Ok(kept))))
    }

    fn landed(&self, at: u64, len: u64) {
        if self.is_recording() {
            self.map.mark(at, len);
        }
    }

    fn resized(&self, len: u64) {
        self.map.resize(len);
        // What is kept is of a disk of the old size.
        self.keep_no_longer();
    }
}

/// The bitmaps of a node, the newest first, each with its number as a watcher.
#[derive(Debug, Default)]
pub(crate) struct Bitmaps(Mutex<Vec<(u64, Arc<Bitmap>)>>);

impl NodeHandle {
    /// Its bitmaps, the newest first.
    pub fn bitmaps(&self) -> Vec<Arc<Bitmap>> {
        lock(&self.bitmap_list().0).iter().map(|(_, bitmap)| bitmap.clone()).collect()
    }

    /// Shows the bitmaps of an image that was just opened, and has those record that can. Nobody has the node yet.
    pub(crate) fn show_stored(&self, stored: Vec<Bitmap>) {
        for bitmap in stored.into_iter().map(Arc::new) {
            // Numbers begin with 1: this one is nobody's.
            let mut id = 0;
            if !bitmap.read_only && !bitmap.inconsistent {
                id = changes::watch_new(self, bitmap.clone());
            }
            lock(&self.bitmap_list().0).insert(0, (id, bitmap));
        }
    }

    /// Shows a bitmap that was lost ([`Bitmap::lost`]) and sees no change.
    pub fn show_lost(&self, bitmap: Bitmap) {
        lock(&self.bitmap_list().0).insert(0, (0, Arc::new(bitmap)));
    }

    /// Takes over the bitmaps of `old` that its image does not keep: this node, which nobody has yet, is about to take its
    /// place, and nothing has changed on `old` since this one was opened.
    pub fn take_bitmaps_of(&self, old: &NodeHandle) {
        for bitmap in old.bitmaps().into_iter().rev().filter(|bitmap| !bitmap.is_persistent()) {
            old.remove_bitmap(&bitmap);
            let id = if bitmap.inconsistent { 0 } else { changes::watch_new(self, bitmap.clone()) };
            lock(&self.bitmap_list().0).insert(0, (id, bitmap));
        }
    }

    /// The bitmaps that the image is to keep as they are now.
    pub(crate) fn bitmaps_to_store(&self) -> Vec<Arc<Bitmap>> {
        let mut bitmaps = self.bitmaps();
        bitmaps
            .retain(|bitmap| bitmap.is_persistent() && !bitmap.is_read_only() && !bitmap.is_inconsistent());
        bitmaps
    }

    /// The bitmap of that name.
    pub fn bitmap(&self, name: &str) -> Result<Arc<Bitmap>, BitmapError> {
        let list = lock(&self.bitmap_list().0);
        let found = list.iter().find(|(_, bitmap)| bitmap.name == name);
        found.map(|(_, bitmap)| bitmap.clone()).ok_or_else(|| BitmapError::NotFound(name.into()))
    }

    /// Whether a bitmap may be added under that name.
    pub fn check_new_bitmap(&self, name: &str) -> Result<(), BitmapError> {
        let list = lock(&self.bitmap_list().0);
        if list.iter().any(|(_, other)| other.name == name) {
            return Err(BitmapError::Exists(name.into()));
        }
        if list.len() >= BITMAPS_MAX { Err(BitmapError::TooMany) } else { Ok(()) }
    }

    /// Takes a bitmap away, whatever its state.
    pub fn remove_bitmap(&self, bitmap: &Arc<Bitmap>) {
        let mut list = lock(&self.bitmap_list().0);
        if let Some(at) = list.iter().position(|(_, other)| Arc::ptr_eq(other, bitmap)) {
            let (id, _) = list.remove(at);
            drop(list);
            changes::unwatch(self, id);
        }
    }

    /// What a bit of a new bitmap stands for where nobody says it: a cluster, within bounds.
    pub fn default_bitmap_granularity(&self) -> u64 {
        let cluster = self.info().cluster_bytes.unwrap_or(*GRANULARITY_DEFAULT.end());
        cluster.clamp(*GRANULARITY_DEFAULT.start(), *GRANULARITY_DEFAULT.end())
    }
}

impl Held {
    /// Adds a bitmap, which sees every change from the end of the hold on.
    pub fn add_bitmap(&self, bitmap: Arc<Bitmap>) -> Result<(), BitmapError> {
        self.node().check_new_bitmap(&bitmap.name)?;
        let id = changes::watch_for_ever(self, bitmap.clone());
        lock(&self.node().bitmap_list().0).insert(0, (id, bitmap));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use infill_base::{Ctx, WriteFlags};
    use infill_sim::World;

    use super::*;
    use crate::MemoryOverlay;

    const LEN: u64 = 64 << 10;

    async fn write(node: &NodeHandle, at: u64) {
        node.write(&Ctx::GUEST, at, vec![1; 512], WriteFlags::empty()).await.unwrap();
    }

    #[test]
    fn a_bitmap_that_was_told_to_stop_stops_and_one_that_was_removed_goes_with_its_watcher() {
        World::new(1).run(async {
            let node = NodeHandle::new(MemoryOverlay::new(LEN, 4096, None));
            let bitmap = Arc::new(Bitmap::new("b", LEN, 4096).unwrap());
            let held = node.hold_changes().await;
            held.add_bitmap(bitmap.clone()).unwrap();
            let twice = held.add_bitmap(Arc::new(Bitmap::new("b", LEN, 512).unwrap()));
            assert_eq!(twice, Err(BitmapError::Exists("b".into())));
            drop(held);
            write(&node, 0).await;
            bitmap.set_recording(false);
            write(&node, 8192).await;
            bitmap.set_recording(true);
            write(&node, 16384).await;
            assert_eq!(bitmap.map().dirty_bytes(), 8192);
            assert!(!bitmap.map().is_dirty(8192));
            node.remove_bitmap(&bitmap);
            write(&node, 32768).await;
            assert_eq!(bitmap.map().dirty_bytes(), 8192);
            assert!(node.bitmap("b").is_err());
        });
    }

    #[test]
    fn a_bitmap_in_use_is_not_changed_by_others() {
        let bitmap = Arc::new(Bitmap::new("b", LEN, 4096).unwrap());
        let other = Bitmap::new("c", LEN, 512).unwrap();
        let used = bitmap.use_changeable().unwrap();
        let busy = Err(BitmapError::Busy("b".into()));
        assert_eq!(bitmap.check_changeable(), busy);
        assert_eq!(bitmap.check_removable(), busy);
        assert_eq!(other.check_merge(&bitmap), busy);
        assert!(bitmap.use_readable().is_err());
        drop(used);
        assert_eq!(other.check_merge(&bitmap), Ok(()));
        let shorter = Bitmap::new("d", 512, 512).unwrap();
        assert_eq!(other.check_merge(&shorter), Err(BitmapError::Sizes(LEN, 512)));
    }
}
