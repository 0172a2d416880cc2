//! What a copy has given to a server, in memory that outlives the process: a *receipt* for each piece that no sync of the target
//! has covered yet, and some of those that one has, all over the disk.
//!
//! A copy of the past cannot be made again of a block that a guest has overwritten since: the target alone has it, and its server
//! may die with what it had not synced. So each piece has a receipt, with a hash of its bytes, before its bits are taken out of
//! the map, and until a sync that began after it was written has succeeded. A process that goes on looks whether all of them are
//! still there ([`GivenMap::check`]): its own death has taken nothing with it, and that of the server shows here.
//!
//! # What never happens
//! * A receipt is believed that is of another run of the job: each has a check whose seed the map has.
//! * A bit is taken out of the map before the receipt stands. One that was being written when the process died is of a piece
//!   whose bits are still set.
//! * It grows: where there is no room, who copies waits for a sync of the target; the copy itself waits much sooner, so that a process
//!   that goes on has not so much to read.
//! * A receipt whose sync was given up is forgotten: it waits for the next one ([`Syncing`]).
//!
//! Costs: [`GivenMap::BYTES`] of memory, and reading what is copied once more in the processor's cache.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use event_listener::Event;
use futures_util::stream::{self, StreamExt};
use infill_base::{Ctx, ErrorKind, IoError, IoResult};
use infill_node::NodeHandle;
use infill_storage::journal::JournalMemory;
use infill_storage::sync::{Mutex, lock};

use super::kept_map::mix;
use super::{KeptMap, Unproven};
use crate::control::REQUEST_BYTES_MAX;

/// Receipts that wait for a sync, at most.
const UNSYNCED_MAX: usize = 16 << 10;
/// Receipts of pieces that a sync has covered: one is as good as another, these find out what was lost as a whole.
const SAMPLES: usize = 64;
/// How many are looked at at once.
const AT_ONCE: usize = 16;
/// What is to be read of a server after a restart, in bytes, at which a sync does not wait for its time.
const UNSYNCED_BYTES: u64 = 64 << 20;
/// The same at which the copy waits for the sync that is under way. What guests overwrite is kept all the same.
const UNSYNCED_BYTES_MAX: u64 = 2 * UNSYNCED_BYTES;
/// What is looked at of a piece that a sync has covered, in bytes: its beginning.
const SAMPLE_BYTES: u64 = 4096;
/// At, length, hash and check.
const SLOT_WORDS: usize = 4;
const WORD_BYTES: usize = size_of::<u64>();
/// Tells the check of a receipt from those of a map's words.
const SALT: u64 = u64::from_be_bytes(*b"INFILLGV");

#[derive(Debug)]
struct Slots {
    free: Vec<usize>,
    /// Written since the last sync began.
    unsynced: Vec<usize>,
    unsynced_bytes: u64,
    /// Of those and of what a sync is under way for.
    waiting_bytes: u64,
    /// The hash of what is a sample of each later, where that is known.
    firsts: Vec<Option<u64>>,
    /// How many a sync has covered.
    covered: u64,
    random: u64,
}

/// Receipts in their memory.
pub struct GivenMap {
    memory: Arc<dyn JournalMemory>,
    seed: u64,
    slots: Mutex<Slots>,
    /// Fires when a sync has ended or was given up.
    synced: Event,
}

/// Receipts that a sync of the target which is under way covers. Dropped before that has ended, they wait for the next one.
#[derive(Debug)]
pub(super) struct Syncing {
    given: Arc<GivenMap>,
    slots: Vec<usize>,
}

impl Drop for Syncing {
    fn drop(&mut self) {
        if !self.slots.is_empty() {
            self.given.give_back(&self.slots);
        }
    }
}

impl Syncing {
    /// Whether there was nothing for it.
    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// That sync has ended.
    pub(super) fn end(mut self, succeeded: bool) {
        if succeeded {
            self.given.end_sync(&std::mem::take(&mut self.slots));
        }
    }
}

/// Hashes of what was written, and of its beginning.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hashes {
    all: u64,
    first: u64,
}

impl Hashes {
    pub(super) fn of(bytes: &[u8]) -> Hashes {
        let first = &bytes[..bytes.len().min(SAMPLE_BYTES as usize)];
        Hashes { all: hash_of(bytes), first: hash_of(first) }
    }

    pub(super) fn of_zeroes(len: u64) -> Hashes {
        Hashes { all: hash_of_zeroes(len), first: hash_of_zeroes(len.min(SAMPLE_BYTES)) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Receipt {
    at: u64,
    len: u64,
    hash: u64,
}

/// The hash of so many zeroes.
fn hash_of_zeroes(len: u64) -> u64 {
    (0..=len / WORD_BYTES as u64).fold(len, |hash, _| mix(hash, 0))
}

impl Receipt {
    /// Whether `node` has what it is of.
    async fn is_of(&self, node: &NodeHandle) -> Result<bool, Unproven> {
        let read = node.read_vec(&Ctx::FILL, self.at, self.len as usize).await;
        let read = read.map_err(|error| Unproven::unread(&node.info().filename, &error))?;
        Ok(hash_of(&read) == self.hash)
    }
}

impl std::fmt::Debug for GivenMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GivenMap({})", self.memory.name())
    }
}

/// A hash of what was written. What reads as zero has that of as many zeroes.
fn hash_of(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<WORD_BYTES>();
    let words = words.iter().map(|word| u64::from_le_bytes(*word));
    let mut last = [0; WORD_BYTES];
    last[..rest.len()].copy_from_slice(rest);
    words.chain([u64::from_le_bytes(last)]).fold(bytes.len() as u64, mix)
}

impl GivenMap {
    /// Memory that it takes, in bytes.
    pub const BYTES: usize = (UNSYNCED_MAX + SAMPLES) * SLOT_WORDS * WORD_BYTES;

    fn of(memory: Arc<dyn JournalMemory>, map: &KeptMap) -> IoResult<GivenMap> {
        memory.reserve()?;
        if size_of_val(memory.words()) < GivenMap::BYTES {
            let why = format!("{} bytes of memory, and {} are needed", memory.words().len(), GivenMap::BYTES);
            return Err(IoError::new(ErrorKind::NoSpace, why).in_node(memory.name()));
        }
        let slots = Slots {
            free: (SAMPLES..SAMPLES + UNSYNCED_MAX).rev().collect(),
            unsynced: Vec::new(),
            unsynced_bytes: 0,
            waiting_bytes: 0,
            firsts: vec![None; SAMPLES + UNSYNCED_MAX],
            covered: 0,
            random: map.generation() | 1,
        };
        Ok(GivenMap { memory, seed: mix(map.seed(), SALT), slots: Mutex::new(slots), synced: Event::new() })
    }

    /// No receipts yet, of the copy that `map` is of. To be called before that is live.
    pub fn begin(memory: Arc<dyn JournalMemory>, map: &KeptMap) -> IoResult<GivenMap> {
        let given = GivenMap::of(memory, map)?;
        given.memory.words().iter().for_each(|word| word.store(0, Ordering::Relaxed));
        Ok(given)
    }

    /// The receipts that are there of the copy that `map` is of, which was found.
    pub fn find(memory: Arc<dyn JournalMemory>, map: &KeptMap) -> Result<GivenMap, String> {
        if size_of_val(memory.words()) < GivenMap::BYTES {
            return Err("there are no receipts of what was copied".into());
        }
        let given = GivenMap::of(memory, map).map_err(|error| error.to_string())?;
        let mut damaged = 0;
        {
            let slots = &mut *lock(&given.slots);
            slots.free.clear();
            for slot in 0..SAMPLES + UNSYNCED_MAX {
                let is_empty = given.words(slot).iter().all(|word| word.load(Ordering::Acquire) == 0);
                let receipt = given.receipt(slot);
                if receipt.is_none() && !is_empty {
                    damaged += 1;
                    given.set(slot, None);
                }
                match receipt {
                    _ if slot < SAMPLES => slots.covered += u64::from(receipt.is_some()),
                    Some(receipt) => {
                        slots.unsynced.push(slot);
                        slots.unsynced_bytes += receipt.len;
                    }
                    None => slots.free.push(slot),
                }
            }
            slots.waiting_bytes = slots.unsynced_bytes;
        }
        // One may have been in the middle of being written, or taken out: its piece is still in the map, or is stable.
        match damaged {
            0 | 1 => Ok(given),
            _ => Err(format!("{damaged} receipts of what was copied are damaged")),
        }
    }

    fn words(&self, slot: usize) -> &[std::sync::atomic::AtomicU64] {
        &self.memory.words()[slot * SLOT_WORDS..][..SLOT_WORDS]
    }

    fn check_of(&self, slot: usize, receipt: &Receipt) -> u64 {
        [slot as u64, receipt.at, receipt.len, receipt.hash].into_iter().fold(self.seed, mix) | 1
    }

    fn receipt(&self, slot: usize) -> Option<Receipt> {
        let [at, len, hash, check] =
            [0, 1, 2, 3].map(|nth: usize| self.words(slot)[nth].load(Ordering::Acquire));
        let receipt = Receipt { at, len, hash };
        (check == self.check_of(slot, &receipt) && len <= REQUEST_BYTES_MAX).then_some(receipt)
    }

    fn set(&self, slot: usize, receipt: Option<Receipt>) {
        let words = self.words(slot);
        // Void until all of it stands: whoever writes does so under the lock.
        words[SLOT_WORDS - 1].store(0, Ordering::Release);
        let Receipt { at, len, hash } = receipt.unwrap_or(Receipt { at: 0, len: 0, hash: 0 });
        for (word, value) in words.iter().zip([at, len, hash]) {
            word.store(value, Ordering::Release);
        }
        if let Some(receipt) = receipt {
            words[SLOT_WORDS - 1].store(self.check_of(slot, &receipt), Ordering::Release);
        }
    }

    /// The target has a piece of at most [`REQUEST_BYTES_MAX`]. `false` where there is no room until a sync of it has ended.
    pub(super) fn note(&self, at: u64, len: u64, hashes: Hashes) -> bool {
        let slots = &mut *lock(&self.slots);
        let Some(slot) = slots.free.pop() else { return false };
        self.set(slot, Some(Receipt { at, len, hash: hashes.all }));
        slots.firsts[slot] = Some(hashes.first);
        slots.unsynced.push(slot);
        slots.unsynced_bytes += len;
        slots.waiting_bytes += len;
        true
    }

    /// Whether so much waits for a sync that it should begin now.
    pub(super) fn wants_sync(&self) -> bool {
        let slots = lock(&self.slots);
        slots.unsynced_bytes >= UNSYNCED_BYTES || slots.unsynced.len() >= UNSYNCED_MAX / 2
    }

    /// Whether so much waits for syncs that the copy is to wait for them, too.
    pub(super) fn is_full(&self) -> bool {
        lock(&self.slots).waiting_bytes >= UNSYNCED_BYTES_MAX
    }

    /// Fires when a sync has ended or was given up.
    pub(super) fn synced(&self) -> &Event {
        &self.synced
    }

    pub(super) fn has_unsynced(&self) -> bool {
        !lock(&self.slots).unsynced.is_empty()
    }

    /// What a sync of the target that begins now covers.
    pub(super) fn begin_sync(self: &Arc<GivenMap>) -> Syncing {
        let slots = &mut *lock(&self.slots);
        slots.unsynced_bytes = 0;
        Syncing { given: self.clone(), slots: std::mem::take(&mut slots.unsynced) }
    }

    /// A sync has covered those.
    fn end_sync(&self, covered: &[usize]) {
        self.cover(&mut lock(&self.slots), covered);
        self.synced.notify(usize::MAX);
    }

    fn cover(&self, slots: &mut Slots, covered: &[usize]) {
        for slot in covered {
            if let Some(receipt) = self.receipt(*slot) {
                slots.waiting_bytes = slots.waiting_bytes.saturating_sub(receipt.len);
                let Receipt { at, len, .. } = receipt;
                let first = slots.firsts[*slot].take();
                let first = first.map(|hash| Receipt { at, len: len.min(SAMPLE_BYTES), hash });
                self.sample(slots, first.unwrap_or(receipt));
            }
            self.set(*slot, None);
            slots.free.push(*slot);
        }
    }

    /// No sync has covered those, and none will that has begun.
    fn give_back(&self, slots: &[usize]) {
        {
            let waiting = &mut *lock(&self.slots);
            waiting.unsynced.extend_from_slice(slots);
            let bytes = slots.iter().filter_map(|slot| self.receipt(*slot)).map(|receipt| receipt.len);
            waiting.unsynced_bytes += bytes.sum::<u64>();
        }
        self.synced.notify(usize::MAX);
    }

    /// A sync has covered that range of a copy whose target changes: where one may look.
    pub(super) fn is_covered(&self, at: u64, len: u64) {
        let slots = &mut *lock(&self.slots);
        self.sample(slots, Receipt { at, len: len.min(SAMPLE_BYTES), hash: 0 });
    }

    /// Keeps it among the samples, each of all that there were as likely as any other.
    fn sample(&self, slots: &mut Slots, receipt: Receipt) {
        slots.random ^= slots.random << 13;
        slots.random ^= slots.random >> 7;
        slots.random ^= slots.random << 17;
        slots.covered += 1;
        let slot = match slots.covered {
            few if few <= SAMPLES as u64 => few as usize - 1,
            many => (slots.random % many) as usize,
        };
        if slot < SAMPLES {
            self.set(slot, Some(receipt));
        }
    }

    /// Where one may look, of a copy whose target changes.
    pub(super) fn places(&self) -> Vec<u64> {
        (0..SAMPLES).filter_map(|slot| self.receipt(slot)).map(|receipt| receipt.at).collect()
    }

    /// Of a copy of the past: whether `target` has all that it was given and no sync has covered, and the samples; and whether
    /// `source`, where it is to be looked at, has the samples, too, where nothing is marked in `since`. The error says what is wrong.
    pub async fn check(
        &self,
        target: &NodeHandle,
        source: Option<(&NodeHandle, &KeptMap)>,
    ) -> Result<(), Unproven> {
        let receipts = (0..SAMPLES + UNSYNCED_MAX).filter_map(|slot| Some((slot, self.receipt(slot)?)));
        let check = |(slot, receipt): (usize, Receipt)| async move {
            let Receipt { at, len, .. } = receipt;
            if !receipt.is_of(target).await? {
                let why = format!("the target does not have what was written to it at byte {at}");
                return Err(Unproven::Never(why));
            }
            let Some((source, since)) = source.filter(|_| slot < SAMPLES) else { return Ok(()) };
            // Written to meanwhile: it is marked by then.
            if since.has_marked(at, len) || receipt.is_of(source).await? || since.has_marked(at, len) {
                return Ok(());
            }
            Err(Unproven::Never(format!("the source is not as it was when it was copied, at byte {at}")))
        };
        let mut checks = stream::iter(receipts.map(check)).buffered(AT_ONCE);
        while let Some(result) = checks.next().await {
            result?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use infill_sim::JournalPages;

    use super::*;
    use crate::copy::MapOwner;

    fn map() -> KeptMap {
        let owner = MapOwner {
            generation: 3,
            boot: infill_storage::journal::BootId(1),
            identity: "job".into(),
            len: 1 << 20,
            granularity: 4096,
        };
        KeptMap::begin(Arc::new(JournalPages::new(0)), owner, false).unwrap()
    }

    const HASHES: Hashes = Hashes { all: 1, first: 2 };

    fn memory() -> JournalPages {
        JournalPages::new(GivenMap::BYTES as u64 / 32)
    }

    #[test]
    fn a_receipt_waits_for_the_sync_that_began_after_it_and_is_a_sample_then() {
        let (pages, map) = (memory(), map());
        let given = Arc::new(GivenMap::begin(Arc::new(pages.clone()), &map).unwrap());
        assert!(given.note(0, 4096, HASHES));
        let covered = given.begin_sync();
        assert!(given.note(4096, 4096, HASHES) && given.has_unsynced());
        covered.end(true);
        let found = Arc::new(GivenMap::find(Arc::new(pages.copy()), &map).unwrap());
        assert_eq!((found.places(), found.begin_sync().slots.len()), (vec![0], 1));
        // A sync that fails, or that nobody waits for, covers nothing.
        given.begin_sync().end(false);
        drop(given.begin_sync());
        assert!(given.has_unsynced() && !given.begin_sync().is_empty());
    }

    #[test]
    fn a_copy_waits_where_much_waits_for_a_sync_and_samples_are_small() {
        let (pages, map) = (memory(), map());
        let given = Arc::new(GivenMap::begin(Arc::new(pages), &map).unwrap());
        let mut syncs = Vec::new();
        for nth in 0..UNSYNCED_BYTES_MAX / REQUEST_BYTES_MAX {
            assert!(!given.is_full());
            assert!(given.note(nth * REQUEST_BYTES_MAX, REQUEST_BYTES_MAX, HASHES));
            if given.wants_sync() {
                syncs.push(given.begin_sync());
            }
        }
        assert!(given.is_full() && !given.wants_sync(), "all of it is under way");
        drop(syncs.pop());
        assert!(given.is_full() && given.wants_sync(), "what was given up waits again");
        syncs.drain(..).for_each(|sync| sync.end(true));
        assert!(!given.is_full());
        given.begin_sync().end(true);
        assert_eq!(lock(&given.slots).waiting_bytes, 0);
        let samples = (0..SAMPLES).filter_map(|slot| given.receipt(slot));
        let is_small = |sample: Receipt| sample.len == SAMPLE_BYTES && sample.hash == HASHES.first;
        assert!(samples.map(is_small).eq(std::iter::repeat_n(true, SAMPLES)));
    }

    #[test]
    fn zeroes_hash_as_zeroes_and_nothing_else_does() {
        for len in [0, 1, 8, 512, 4097] {
            let mut bytes = vec![0; len];
            assert_eq!(hash_of(&bytes), hash_of_zeroes(len as u64));
            if let Some(byte) = bytes.last_mut() {
                *byte = 1;
                assert_ne!(hash_of(&bytes), hash_of_zeroes(len as u64));
            }
        }
    }

    #[test]
    fn there_is_no_room_without_end_and_samples_are_of_all() {
        let (pages, map) = (memory(), map());
        let given = Arc::new(GivenMap::begin(Arc::new(pages), &map).unwrap());
        for round in 0..4 {
            for nth in 0..UNSYNCED_MAX as u64 {
                assert!(given.note(round * UNSYNCED_MAX as u64 + nth, 1, HASHES));
            }
            assert!(!given.note(0, 1, HASHES), "it is full");
            given.begin_sync().end(true);
        }
        let places = given.places();
        let late = places.iter().filter(|at| **at >= 2 * UNSYNCED_MAX as u64).count();
        assert!(places.len() == SAMPLES && (8..=56).contains(&late), "{late} of {} late", places.len());
    }

    #[test]
    fn receipts_of_another_run_or_that_are_damaged_are_refused() {
        let (pages, map) = (memory(), map());
        let given = GivenMap::begin(Arc::new(pages.clone()), &map).unwrap();
        (0..4).for_each(|nth| assert!(given.note(nth, 1, HASHES)));
        let first = SAMPLES * SLOT_WORDS;
        let damage = |slot: usize| pages.words()[first + slot * SLOT_WORDS].fetch_xor(8, Ordering::Relaxed);
        // One may be torn, in each life.
        for left in [3, 2] {
            damage(left);
            let found = Arc::new(GivenMap::find(Arc::new(pages.clone()), &map).unwrap());
            assert_eq!(found.begin_sync().slots.len(), left);
        }
        for slot in 0..2 {
            damage(slot);
        }
        assert!(GivenMap::find(Arc::new(pages), &map).is_err());
    }
}
