//! The volatile journal: what a process has changed in memory alone, for the process that comes after it.
//!
//! A daemon dies with mappings that only its memory has. Its guest lives on, reconnects, sends FLUSH to the daemon's
//! successor, and is told that everything is stable which the dead one had acknowledged. So each change of a mapping
//! entry is recorded, **before** the entry is set, in memory that outlives the process (not the machine: what a power cut
//! takes was never promised). The successor replays the records before it serves anybody.
//!
//! * [`VolatileJournal`] is the ring of records in a [`JournalMemory`]: versioned, checked, bounded.
//! * [`Ledger`] is what a format driver keeps: it records and sets under one short lock, drops what a round has made
//!   stable, and says when there is no record of something, so that it has to be written through.
//!
//! # What never happens
//! * An entry is set, and its record comes after it, or is dropped by a round that has not copied it: recording and
//!   setting are one step under the lock, and so is taking a mark.
//! * A record is believed that was written in part, by another version, in another boot, or for another image.
//! * A writer waits here for I/O, or fails because the journal is full: what finds no room is *owed*, and whoever relies
//!   on it waits for a round before it answers.
//!
//! Costs: a lock and seven stores a change (`docs/decisions/0005-volatile-journal.md` has figures);
//! [`JOURNAL_BYTES`] of memory an image that is written to. The layout stands in `docs/formats/journal.md`.

mod ledger;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use infill_base::{ErrorKind, IoError, IoResult, OpenError};

use crate::sync::Arc;

pub use ledger::{Ended, Journaling, Ledger, Mark};

/// Records that a journal of [`JOURNAL_BYTES`] holds. When half of them are used a round is wanted: the rest is for what
/// is under way meanwhile.
pub const RECORDS_MAX: u64 = 8192;

/// Longest text that names an image, in bytes.
pub const IDENTITY_BYTES_MAX: usize = (HEADER_WORDS - IDENTITY) * WORD_BYTES;

/// Memory of one journal, in bytes.
pub const JOURNAL_BYTES: usize = journal_bytes(RECORDS_MAX);

/// Memory of a journal of `records`, in bytes.
pub const fn journal_bytes(records: u64) -> usize {
    (HEADER_WORDS + records as usize * RECORD_WORDS) * WORD_BYTES
}

const WORD_BYTES: usize = size_of::<u64>();

// The header's words.
const MAGIC: u64 = u64::from_be_bytes(*b"INFILLVJ");
const VERSION_NOW: u64 = 1;
const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 1;
const AT_BOOT: usize = 2;
const AT_CAPACITY: usize = 4;
const AT_IDENTITY_LEN: usize = 5;
/// Covers every other word of the header but those that change.
const AT_CHECK: usize = 6;
/// Number of the oldest record that is kept.
const AT_HEAD: usize = 7;
/// Number of the record that comes next.
const AT_TAIL: usize = 8;
/// Not 0: changes were made that found no room.
const AT_GAPS: usize = 9;
const IDENTITY: usize = 16;
const HEADER_WORDS: usize = 2048;

/// Words of a record: place, two of the old value, two of the new, check.
const RECORD_WORDS: usize = 6;

/// A start of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootId(pub u128);

/// One change of a mapping entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Which entry, in the format's own terms.
    pub place: u64,
    /// What it held.
    pub old: [u64; 2],
    /// What it holds from now on.
    pub new: [u64; 2],
}

/// Memory that outlives the process. One holder at a time.
pub trait JournalMemory: Send + Sync + 'static {
    /// Makes all of it there for good: a store to it cannot fail afterwards. What is new reads as zeroes.
    fn reserve(&self) -> IoResult<()>;

    /// Its words; none before [`JournalMemory::reserve`] where nothing was there.
    fn words(&self) -> &[AtomicU64];

    /// Nothing of it is wanted any more.
    fn remove(&self);

    /// A name for messages, by which a person can find and delete it.
    fn name(&self) -> String;
}

/// The journal of one image, attached to its memory. Cloning shares it.
#[derive(Clone)]
pub struct VolatileJournal(Arc<Inner>);

struct Inner {
    memory: std::sync::Arc<dyn JournalMemory>,
    identity: String,
    boot: BootId,
    found: Found,
}

/// What a process before this one has left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// In the order in which they were made.
    pub records: Vec<Record>,
    /// Some changes are missing among them: what the image holds need be neither an old nor a new value.
    pub gaps: bool,
}

impl Found {
    /// Whether there is nothing to replay.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// What each entry may hold, and what it has to hold after the replay, by place.
    pub fn places(&self) -> BTreeMap<u64, Changed> {
        let mut places: BTreeMap<u64, Changed> = BTreeMap::new();
        for Record { place, old, new } in &self.records {
            let changed = places.entry(*place).or_insert_with(|| Changed { values: Vec::new(), last: *new });
            // An old value is a new one of a record that is here no more, of a change that left a gap, or the first.
            changed.values.extend([*old, *new]);
            changed.last = *new;
        }
        if self.gaps {
            places.values_mut().for_each(|changed| changed.values.clear());
        }
        places
    }
}

/// What became of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// What it held on the way; empty: anything.
    values: Vec<[u64; 2]>,
    last: [u64; 2],
}

impl Changed {
    /// What the entry has to hold. `None`: what it holds `now` was never recorded of it.
    pub fn last(&self, now: [u64; 2]) -> Option<[u64; 2]> {
        (self.values.is_empty() || self.values.contains(&now)).then_some(self.last)
    }
}

impl fmt::Debug for VolatileJournal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("VolatileJournal").field(&self.0.memory.name()).finish()
    }
}

impl VolatileJournal {
    /// Looks at what the memory holds. Records of another boot, or of another image that had this one's place, are
    /// forgotten; of this one they are [`VolatileJournal::found`]. Nothing is written yet.
    ///
    /// Refused where records of this boot and image are there that cannot be read.
    pub fn attach(
        memory: std::sync::Arc<dyn JournalMemory>,
        identity: &str,
        boot: BootId,
    ) -> Result<VolatileJournal, OpenError> {
        if identity.len() > IDENTITY_BYTES_MAX {
            let why = format!(
                "the image's name has {} bytes, a journal can be kept for names of up to {IDENTITY_BYTES_MAX}",
                identity.len()
            );
            return Err(OpenError::Refused { why });
        }
        let found = read(memory.words(), identity, boot).map_err(|what| OpenError::Refused {
            why: format!(
                "the journal {} {what}; it holds changes of this image that a process which died had acknowledged: delete \
                 it if they may be lost",
                memory.name()
            ),
        })?;
        Ok(VolatileJournal(Arc::new(Inner { memory, identity: identity.to_owned(), boot, found })))
    }

    /// What a process before this one has left.
    pub fn found(&self) -> &Found {
        &self.0.found
    }

    /// A name for messages.
    pub fn name(&self) -> String {
        self.0.memory.name()
    }

    /// What was found is in the image now, and stable.
    pub fn replayed(&self) {
        let words = self.0.memory.words();
        if !self.0.found.is_empty() {
            store(words, AT_HEAD, load(words, AT_TAIL));
        }
    }

    /// Makes an empty journal (what was found is forgotten, for it was replayed or is not wanted); gives how many records
    /// it holds.
    fn begin(&self) -> IoResult<u64> {
        let inner = &*self.0;
        inner.memory.reserve()?;
        let words = inner.memory.words();
        let capacity = capacity(words);
        if capacity == 0 {
            let why = format!("{} bytes of memory hold no journal", size_of_val(words));
            return Err(IoError::new(ErrorKind::NoSpace, why).in_node(inner.memory.name()));
        }
        // Void first: cut off in the middle, it holds nothing.
        store(words, AT_MAGIC, 0);
        (AT_HEAD..IDENTITY).for_each(|at| store(words, at, 0));
        let text = inner.identity.as_bytes().chunks(WORD_BYTES);
        for (at, chunk) in text.enumerate() {
            let mut word = [0; WORD_BYTES];
            word[..chunk.len()].copy_from_slice(chunk);
            store(words, IDENTITY + at, u64::from_be_bytes(word));
        }
        store(words, AT_VERSION, VERSION_NOW);
        store(words, AT_BOOT, (inner.boot.0 >> 64) as u64);
        store(words, AT_BOOT + 1, inner.boot.0 as u64);
        store(words, AT_CAPACITY, capacity);
        store(words, AT_IDENTITY_LEN, inner.identity.len() as u64);
        store(words, AT_CHECK, header_check(words));
        store(words, AT_MAGIC, MAGIC);
        Ok(capacity)
    }

    /// Writes record number `number`; there is room for it.
    fn put(&self, number: u64, record: &Record) {
        let words = self.0.memory.words();
        let slot = slot(number, capacity(words));
        let Record { place, old, new } = *record;
        let values = [place, old[0], old[1], new[0], new[1]];
        let check = check(number, values);
        for (at, value) in values.into_iter().chain([check]).enumerate() {
            words[slot + at].store(value, Ordering::Relaxed);
        }
        // From here on it counts.
        store(words, AT_TAIL, number + 1);
    }

    /// Forgets the records before number `head`.
    fn drop_before(&self, head: u64) {
        store(self.0.memory.words(), AT_HEAD, head);
    }

    fn set_gaps(&self, gaps: bool) {
        store(self.0.memory.words(), AT_GAPS, u64::from(gaps));
    }

    fn remove(&self) {
        self.0.memory.remove();
    }
}

fn store(words: &[AtomicU64], at: usize, value: u64) {
    words[at].store(value, Ordering::Release);
}

fn load(words: &[AtomicU64], at: usize) -> u64 {
    words[at].load(Ordering::Acquire)
}

fn capacity(words: &[AtomicU64]) -> u64 {
    (words.len().saturating_sub(HEADER_WORDS) / RECORD_WORDS) as u64
}

/// Where record number `number` lies. There is room for one at least.
fn slot(number: u64, capacity: u64) -> usize {
    HEADER_WORDS + (number % capacity) as usize * RECORD_WORDS
}

/// Tells a record that is whole from one that is not, or is another.
fn check(seed: u64, words: impl IntoIterator<Item = u64>) -> u64 {
    words.into_iter().fold(seed ^ MAGIC, |mixed, word| {
        let mixed = (mixed ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed ^ mixed >> 32
    })
}

fn header_check(words: &[AtomicU64]) -> u64 {
    let text = (load(words, AT_IDENTITY_LEN) as usize).div_ceil(WORD_BYTES).min(HEADER_WORDS - IDENTITY);
    let fixed = (AT_VERSION..AT_CHECK).chain(IDENTITY..IDENTITY + text);
    check(0, fixed.map(|at| load(words, at)))
}

fn identity_is(words: &[AtomicU64], identity: &str) -> bool {
    let text = identity.as_bytes();
    load(words, AT_IDENTITY_LEN) == text.len() as u64
        && text
            .chunks(WORD_BYTES)
            .enumerate()
            .all(|(at, chunk)| load(words, IDENTITY + at).to_be_bytes()[..chunk.len()] == *chunk)
}

/// What is left in the memory for this image; the error says what is wrong with it.
fn read(words: &[AtomicU64], identity: &str, boot: BootId) -> Result<Found, String> {
    if words.len() < HEADER_WORDS || load(words, AT_MAGIC) != MAGIC {
        return Ok(Found::default());
    }
    let then = u128::from(load(words, AT_BOOT)) << 64 | u128::from(load(words, AT_BOOT + 1));
    if then != boot.0 {
        // Whatever wrote it, the machine was started anew since.
        return Ok(Found::default());
    }
    let version = load(words, AT_VERSION);
    if version != VERSION_NOW {
        return Err(format!("has version {version}, this program reads {VERSION_NOW}"));
    }
    if load(words, AT_CHECK) != header_check(words) {
        return Err("has a damaged header".into());
    }
    if !identity_is(words, identity) {
        return Ok(Found::default());
    }
    let (head, tail, capacity) = (load(words, AT_HEAD), load(words, AT_TAIL), capacity(words));
    let claimed = load(words, AT_CAPACITY);
    let fits = tail.checked_sub(head).is_some_and(|count| count <= capacity);
    if !fits || claimed != capacity || capacity == 0 {
        return Err(format!(
            "claims records {head} to {tail} of {claimed} in a ring of {capacity}, which cannot be"
        ));
    }
    let records = (head..tail).map(|number| {
        let at = |nth: usize| words[slot(number, capacity) + nth].load(Ordering::Relaxed);
        let values = [at(0), at(1), at(2), at(3), at(4)];
        let [place, old0, old1, new0, new1] = values;
        (at(5) == check(number, values))
            .then_some(Record { place, old: [old0, old1], new: [new0, new1] })
            .ok_or_else(|| format!("has a damaged record, number {number}"))
    });
    Ok(Found { records: records.collect::<Result<_, _>>()?, gaps: load(words, AT_GAPS) != 0 })
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
