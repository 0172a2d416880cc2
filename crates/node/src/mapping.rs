//! Slices of mapping tables, cached: what tells where guest bytes lie, shared by all reactors.
//!
//! A slice is 4 KiB of a table in the file (the whole table where it is smaller), named by the table's host offset and
//! its number in the table. The cache knows nothing of what an entry means; a format gives the bytes of a slice when
//! it is missing, and writes the copies that [`SliceCache::freeze`] makes in rounds (`infill_storage::rounds`).
//!
//! * A look-up of a cached slice takes a shared lock for as long as a hash map look-up takes, and no other. An entry is
//!   an atomic word. One of two words has a sequence counter in its slice: a writer takes it from even to odd, a
//!   reader that met an odd or a changed counter looks again.
//! * A miss delays nobody but those who want the same slice; they wait for the one load (I1, I2).
//! * Whoever holds an `Arc<Slice>` keeps it cached. So do changes that no round has copied, and copies that no round
//!   has finished: reloaded in between, the old entry would come back from the disk.
//! * Bounded by bytes, but for what is held so; [`SliceCache::wants_round`] says when changes should be written.
//!
//! Two writers of one *entry* exclude each other by the guest range that they hold; the cache does not.

use std::collections::VecDeque;
use std::future::Future;
use std::mem::size_of;

use bytes::{Bytes, BytesMut};
use event_listener::Event;
use infill_base::{ErrorKind, IoError, IoResult};
use infill_storage::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use infill_storage::sync::{Arc, Mutex, RwLock, hint, lock, read, write};
use rustc_hash::FxHashMap;

/// Bytes of a slice, unless its table is smaller.
pub const SLICE_BYTES: usize = 4096;

/// Shards of the cache: look-ups of different slices mostly take different locks.
const SHARDS: usize = 16;

/// How the words of a table lie in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByteOrder {
    /// Most significant byte first (qcow2).
    Big,
    /// Least significant byte first (QED).
    Little,
}

/// What the slices of one image look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SliceLayout {
    /// Bytes of a slice: a power of two, at most those of a table.
    pub slice_bytes: usize,
    /// Words of an entry: 1 or 2.
    pub entry_words: usize,
    /// Order of a word's bytes.
    pub order: ByteOrder,
}

impl SliceLayout {
    /// Entries in one slice.
    pub fn entries(&self) -> usize {
        self.slice_bytes / (self.entry_words * size_of::<u64>())
    }
}

/// Names a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SliceKey {
    /// Host offset of its table, in bytes.
    pub table: u64,
    /// Its number in the table.
    pub index: u32,
}

/// One entry: its words. The second is 0 where entries have one.
pub type Entry = [u64; 2];

/// Part of a mapping table, in memory.
#[derive(Debug)]
pub struct Slice {
    key: SliceKey,
    words: Box<[AtomicU64]>,
    entry_words: usize,
    /// Odd while an entry of two words is being stored.
    sequence: AtomicU64,
    /// Changed since the last copy; it is then in the cache's list.
    dirty: AtomicBool,
    /// Looked up since the eviction hand last passed.
    touched: AtomicBool,
    checked: AtomicBool,
}

impl Slice {
    fn new(key: SliceKey, bytes: Option<&[u8]>, layout: &SliceLayout) -> Slice {
        let count = layout.slice_bytes / size_of::<u64>();
        let word = |nth: usize| match bytes.and_then(|bytes| bytes[nth * 8..].first_chunk()) {
            None => 0,
            Some(bytes) if layout.order == ByteOrder::Big => u64::from_be_bytes(*bytes),
            Some(bytes) => u64::from_le_bytes(*bytes),
        };
        Slice {
            key,
            words: (0..count).map(|nth| AtomicU64::new(word(nth))).collect(),
            entry_words: layout.entry_words,
            sequence: AtomicU64::new(0),
            dirty: AtomicBool::new(false),
            touched: AtomicBool::new(true),
            // There is nothing to find in zeroes.
            checked: AtomicBool::new(bytes.is_none()),
        }
    }

    /// Its name.
    pub fn key(&self) -> SliceKey {
        self.key
    }

    /// Whether the format has found that nothing is wrong with what its entries name. A slice that was loaded has yet
    /// to be looked at.
    pub fn is_checked(&self) -> bool {
        self.checked.load(Ordering::Acquire)
    }

    /// Notes that nothing is wrong with what its entries name.
    pub fn set_checked(&self) {
        self.checked.store(true, Ordering::Release);
    }

    /// Entry `index` of the slice, as it was at one moment.
    ///
    /// # Panics
    /// If the slice has no such entry.
    pub fn load(&self, index: usize) -> Entry {
        if self.entry_words == 1 {
            return [self.words[index].load(Ordering::Acquire), 0];
        }
        loop {
            let before = self.sequence.load(Ordering::Acquire);
            let entry = [
                self.words[2 * index].load(Ordering::Acquire),
                self.words[2 * index + 1].load(Ordering::Acquire),
            ];
            // Acquire loads stay before this one.
            if before.is_multiple_of(2) && self.sequence.load(Ordering::Relaxed) == before {
                return entry;
            }
            hint::spin_loop();
        }
    }

    fn store(&self, index: usize, entry: Entry) {
        if self.entry_words == 1 {
            self.words[index].store(entry[0], Ordering::Release);
            return;
        }
        let even = loop {
            let now = self.sequence.load(Ordering::Relaxed);
            let taken = now.is_multiple_of(2)
                && self
                    .sequence
                    .compare_exchange_weak(now, now + 1, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok();
            if taken {
                break now;
            }
            hint::spin_loop();
        };
        // Release stores stay behind the odd counter: who sees one of them sees it.
        self.words[2 * index].store(entry[0], Ordering::Release);
        self.words[2 * index + 1].store(entry[1], Ordering::Release);
        self.sequence.store(even + 2, Ordering::Release);
    }

    /// Its bytes as they lie in the file. Each entry is one of some moment; entries need not be of the same.
    fn to_bytes(&self, order: ByteOrder) -> Bytes {
        let mut out = BytesMut::with_capacity(self.words.len() * size_of::<u64>());
        for index in 0..self.words.len() / self.entry_words {
            for word in &self.load(index)[..self.entry_words] {
                match order {
                    ByteOrder::Big => out.extend_from_slice(&word.to_be_bytes()),
                    ByteOrder::Little => out.extend_from_slice(&word.to_le_bytes()),
                }
            }
        }
        out.freeze()
    }
}

/// The copy of a changed slice, to be written. The slice stays cached while this lives; give it to
/// [`SliceCache::written`].
#[derive(Debug)]
#[must_use]
pub struct FrozenSlice {
    slice: Arc<Slice>,
    bytes: Bytes,
}

impl FrozenSlice {
    /// Which slice.
    pub fn key(&self) -> SliceKey {
        self.slice.key
    }

    /// Where it belongs in the file.
    pub fn host(&self) -> u64 {
        self.slice.key.table + u64::from(self.slice.key.index) * self.bytes.len() as u64
    }

    /// What is to be written there.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The slice as it is now: what must **not** be written.
    pub fn slice(&self) -> &Arc<Slice> {
        &self.slice
    }
}

#[derive(Debug)]
enum Slot {
    Loading(Arc<Load>),
    Ready(Arc<Slice>),
}

#[derive(Debug, Default)]
struct Load {
    state: Mutex<LoadState>,
    changed: Event,
}

#[derive(Debug, Default)]
enum LoadState {
    #[default]
    Loading,
    Done(IoResult<Arc<Slice>>),
    /// Whoever loaded went away: somebody else takes over.
    Abandoned,
}

impl Load {
    async fn wait(&self) -> Option<IoResult<Arc<Slice>>> {
        loop {
            let changed = self.changed.listen();
            match &*lock(&self.state) {
                LoadState::Loading => {}
                LoadState::Done(result) => return Some(result.clone()),
                LoadState::Abandoned => return None,
            }
            changed.await;
        }
    }
}

#[derive(Debug, Default)]
struct Shard {
    slots: FxHashMap<SliceKey, Slot>,
    /// The order in which slices are looked at for eviction. May name what is gone.
    ring: VecDeque<SliceKey>,
    ready: usize,
}

/// The cache of one image.
#[derive(Debug)]
pub struct SliceCache {
    layout: SliceLayout,
    shards: Box<[RwLock<Shard>]>,
    shard_slices_max: usize,
    /// Changed and not copied. Each once.
    dirty: Mutex<Vec<Arc<Slice>>>,
    dirty_count: AtomicUsize,
    dirty_max: usize,
}

/// Takes the mark *loading* away, however the load ends.
struct Loading<'a> {
    cache: &'a SliceCache,
    key: SliceKey,
    load: Arc<Load>,
}

impl Loading<'_> {
    fn settle(&self, state: LoadState) {
        {
            let mut shard = write(self.cache.shard(self.key));
            let mine = matches!(shard.slots.get(&self.key), Some(Slot::Loading(load)) if Arc::ptr_eq(load, &self.load));
            if mine {
                shard.slots.remove(&self.key);
                if let LoadState::Done(Ok(slice)) = &state {
                    self.cache.insert(&mut shard, slice.clone());
                }
            }
            let mut now = lock(&self.load.state);
            if !matches!(*now, LoadState::Loading) {
                return;
            }
            *now = state;
        }
        self.load.changed.notify(usize::MAX);
    }
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        self.settle(LoadState::Abandoned);
    }
}

impl SliceCache {
    /// An empty cache of about `bytes_max` bytes of slices, of one a shard at least.
    ///
    /// # Panics
    /// If the layout is not possible: a mistake of the program.
    pub fn new(layout: SliceLayout, bytes_max: u64) -> SliceCache {
        assert!(matches!(layout.entry_words, 1 | 2), "an entry has one or two words");
        assert!(
            layout.slice_bytes.is_power_of_two()
                && layout.slice_bytes >= layout.entry_words * size_of::<u64>(),
            "a slice is a power of two and holds an entry"
        );
        let slices = usize::try_from(bytes_max).unwrap_or(usize::MAX) / layout.slice_bytes;
        SliceCache {
            layout,
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            shard_slices_max: (slices / SHARDS).max(1),
            dirty: Mutex::default(),
            dirty_count: AtomicUsize::new(0),
            dirty_max: (slices / 2).max(1),
        }
    }

    /// What its slices look like.
    pub fn layout(&self) -> SliceLayout {
        self.layout
    }

    fn shard(&self, key: SliceKey) -> &RwLock<Shard> {
        // Tables lie at multiples of a cluster: the low bits say nothing.
        let mixed = (key.table >> 9).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        &self.shards[(mixed as usize).wrapping_add(key.index as usize) % SHARDS]
    }

    /// The slice, if it is cached and loaded.
    pub fn cached(&self, key: SliceKey) -> Option<Arc<Slice>> {
        let shard = read(self.shard(key));
        let Some(Slot::Ready(slice)) = shard.slots.get(&key) else { return None };
        if !slice.touched.load(Ordering::Relaxed) {
            slice.touched.store(true, Ordering::Relaxed);
        }
        Some(slice.clone())
    }

    /// The slice; where it is missing, `load` gives its bytes. Everybody who misses it meanwhile waits for the one
    /// load, and is told its failure.
    pub async fn get<F>(&self, key: SliceKey, load: impl FnOnce() -> F) -> IoResult<Arc<Slice>>
    where
        F: Future<Output = IoResult<BytesMut>>,
    {
        let loading = loop {
            if let Some(slice) = self.cached(key) {
                return Ok(slice);
            }
            let theirs = {
                let mut shard = write(self.shard(key));
                match shard.slots.get(&key) {
                    Some(Slot::Ready(slice)) => return Ok(slice.clone()),
                    Some(Slot::Loading(load)) => load.clone(),
                    None => {
                        let load = Arc::new(Load::default());
                        shard.slots.insert(key, Slot::Loading(load.clone()));
                        break Loading { cache: self, key, load };
                    }
                }
            };
            if let Some(result) = theirs.wait().await {
                return result;
            }
        };
        let result = load().await.and_then(|bytes| {
            if bytes.len() != self.layout.slice_bytes {
                let why = format!(
                    "{} bytes of a table came, {} belong to a slice",
                    bytes.len(),
                    self.layout.slice_bytes
                );
                return Err(IoError::new(ErrorKind::Io, why));
            }
            Ok(Arc::new(Slice::new(key, Some(&bytes), &self.layout)))
        });
        loading.settle(LoadState::Done(result.clone()));
        result
    }

    /// Puts a slice of zeroes there, in place of whatever the cache held for it: part of a table that is new, and
    /// zero in the file.
    pub fn insert_zeroed(&self, key: SliceKey) -> Arc<Slice> {
        let slice = Arc::new(Slice::new(key, None, &self.layout));
        let mut shard = write(self.shard(key));
        forget(&mut shard, key);
        self.insert(&mut shard, slice.clone());
        slice
    }

    /// Drops the first `slices` slices of a table whose space is given back. Nobody may look anything up in it any
    /// more, and no change of it may be wanted.
    pub fn forget_table(&self, table: u64, slices: u32) {
        for index in 0..slices {
            let key = SliceKey { table, index };
            forget(&mut write(self.shard(key)), key);
        }
    }

    fn insert(&self, shard: &mut Shard, slice: Arc<Slice>) {
        let key = slice.key;
        shard.slots.insert(key, Slot::Ready(slice));
        shard.ring.push_back(key);
        shard.ready += 1;
        // Each is looked at twice at most: once to take its mark, once to go.
        let mut looks = 2 * shard.ring.len();
        while shard.ready > self.shard_slices_max && looks > 0 {
            looks -= 1;
            let Some(key) = shard.ring.pop_front() else { break };
            match shard.slots.get_mut(&key) {
                Some(Slot::Ready(slice)) => {
                    // Only the cache holds it: so it is neither changed, nor being copied, nor about to be changed,
                    // and nobody can take it while the shard is locked.
                    let idle = Arc::get_mut(slice).is_some_and(|slice| {
                        let touched = std::mem::take(slice.touched.get_mut());
                        !touched && !*slice.dirty.get_mut()
                    });
                    if idle {
                        shard.slots.remove(&key);
                        shard.ready -= 1;
                    } else {
                        shard.ring.push_back(key);
                    }
                }
                Some(Slot::Loading(_)) | None => {}
            }
        }
    }

    /// Sets an entry, and marks the slice as changed. The caller holds the guest range of the entry alone.
    ///
    /// # Panics
    /// If the slice has no such entry.
    pub fn set(&self, slice: &Arc<Slice>, index: usize, entry: Entry) {
        slice.store(index, entry);
        self.mark(slice);
    }

    fn mark(&self, slice: &Arc<Slice>) {
        // Always a swap: only so the freeze that clears the mark before us sees what was stored before it.
        if !slice.dirty.swap(true, Ordering::AcqRel) {
            let mut dirty = lock(&self.dirty);
            dirty.push(slice.clone());
            self.dirty_count.store(dirty.len(), Ordering::Relaxed);
        }
    }

    /// Copies every changed slice; what changes from now on is for the next freeze. One round at a time.
    pub fn freeze(&self) -> Vec<FrozenSlice> {
        let slices = {
            let mut dirty = lock(&self.dirty);
            self.dirty_count.store(0, Ordering::Relaxed);
            std::mem::take(&mut *dirty)
        };
        let mut frozen: Vec<FrozenSlice> = slices
            .into_iter()
            .map(|slice| {
                // The mark first: a change that the copy misses sets it again.
                slice.dirty.swap(false, Ordering::AcqRel);
                FrozenSlice { bytes: slice.to_bytes(self.layout.order), slice }
            })
            .collect();
        frozen.sort_unstable_by_key(FrozenSlice::host);
        frozen
    }

    /// The round of these copies is over. Where it failed, the slices count as changed again.
    pub fn written(&self, frozen: Vec<FrozenSlice>, ok: bool) {
        if !ok {
            frozen.iter().for_each(|frozen| self.mark(&frozen.slice));
        }
    }

    /// Whether anything changed that no round has copied.
    pub fn is_dirty(&self) -> bool {
        !lock(&self.dirty).is_empty()
    }

    /// Whether so much is changed that a round should write it before more is.
    pub fn wants_round(&self) -> bool {
        self.dirty_count.load(Ordering::Relaxed) > self.dirty_max
    }

    /// Bytes of slices that are cached.
    pub fn used_bytes(&self) -> u64 {
        let slices: usize = self.shards.iter().map(|shard| read(shard).ready).sum();
        (slices * self.layout.slice_bytes) as u64
    }
}

/// Takes a loaded slice out. One that loads is left to its loader.
fn forget(shard: &mut Shard, key: SliceKey) {
    if let Some(Slot::Ready(_)) = shard.slots.get(&key) {
        shard.slots.remove(&key);
        shard.ready -= 1;
        shard.ring.retain(|other| *other != key);
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
