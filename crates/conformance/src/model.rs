//! The reference model of a disk: for every sector, which values it may show.
//!
//! Owns the history of every sector since the last flush: the flushed value, every later write, the writes in flight.
//! From it follow
//! * what a read may return while others write ([`Model::end_read`]),
//! * what the disk may hold after a crash at this moment ([`Model::check_crash`]: P1 and P2 of the durability promises),
//! * what it must hold when everything is quiet ([`Model::check_live`]).
//!
//! One rule decides all of it. A write *replaces* another if it began after the other had ended. What was replaced by a
//! completed write is not shown to a read any more; what was replaced by a *stable* one does not come back from a crash.
//! Stable is what had completed before a flush began that has been answered, and a completed FUA write.
//!
//! A discard replaces nothing by itself: old content or zeroes. As soon as a read shows which, it is that for ever.
//!
//! Values are told apart per sector of 512 bytes as a whole, which is what the media promise. So two writes of parts of
//! one sector must not run at once; [`crate::Guest`] sees to that. It never asks a disk for anything, and costs one
//! vector per sector.

use std::collections::BTreeMap;
use std::fmt;

use bytes::{Bytes, BytesMut};

use crate::payload::describe;

/// Bytes that the media write whole or not at all.
pub const SECTOR_BYTES: u64 = 512;

const SECTOR: usize = SECTOR_BYTES as usize;

/// Content of one sector.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Zero,
    Bytes(Bytes),
}

impl Value {
    fn of(bytes: Bytes) -> Value {
        if infill_base::is_zero(&bytes) { Value::Zero } else { Value::Bytes(bytes) }
    }

    /// Whether its bytes from `skip` are `found`.
    fn shows(&self, skip: usize, found: &[u8]) -> bool {
        match self {
            Value::Zero => infill_base::is_zero(found),
            Value::Bytes(bytes) => bytes[skip..skip + found.len()] == *found,
        }
    }

    /// The value with `data` put in at byte `skip`.
    fn with(&self, skip: usize, data: &[u8]) -> Value {
        let mut bytes = BytesMut::zeroed(SECTOR);
        if let Value::Bytes(old) = self {
            bytes.copy_from_slice(old);
        }
        bytes[skip..skip + data.len()].copy_from_slice(data);
        Value::of(bytes.freeze())
    }

    fn describe(&self, at: u64, skip: usize, len: usize) -> String {
        match self {
            Value::Zero => "zeroes".into(),
            Value::Bytes(bytes) => describe(at + skip as u64, &bytes[skip..skip + len]),
        }
    }
}

#[derive(Clone, Debug)]
struct Entry {
    value: Value,
    begin: u64,
    /// `None`: in flight, or nobody knows whether it ever happens.
    end: Option<u64>,
    /// It may have changed nothing (a discard, a write that failed).
    weak: bool,
    stable: bool,
}

impl Entry {
    /// Whether it, by itself, makes sure that `older` is gone.
    fn replaces(&self, older: &Entry) -> bool {
        !self.weak && self.end.is_some() && older.end.is_some_and(|end| end < self.begin)
    }
}

type Sector = Vec<Entry>;

fn is_live(sector: &Sector, entry: &Entry) -> bool {
    !sector.iter().any(|other| other.replaces(entry))
}

fn live(sector: &Sector) -> impl Iterator<Item = &Entry> {
    sector.iter().filter(|entry| is_live(sector, entry))
}

/// Forgets what a stable write has replaced.
fn prune(sector: &mut Sector) {
    if sector.len() > 1 {
        let stable: Vec<Entry> = sector.iter().filter(|entry| entry.stable && !entry.weak).cloned().collect();
        sector.retain(|entry| !stable.iter().any(|newer| newer.replaces(entry)));
    }
}

/// What a change does to a range.
#[derive(Clone, Debug)]
pub enum Change {
    /// Puts these bytes there.
    Write(Bytes),
    /// Puts as many zeroes there.
    Zero(u64),
    /// Leaves as many bytes, or makes them zero.
    Discard(u64),
}

#[expect(clippy::len_without_is_empty, reason = "an empty change is none")]
impl Change {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Change::Write(data) => data.len() as u64,
            Change::Zero(len) | Change::Discard(len) => *len,
        }
    }
}

/// How a change ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was acknowledged.
    Done,
    /// It was acknowledged as stable (FUA).
    Stable,
    /// It failed, or its future was dropped and it is over: it may have happened, in whole or in part.
    Unknown,
}

/// A change in flight.
#[derive(Debug)]
#[must_use]
pub struct ChangeTicket {
    begin: u64,
    at: u64,
    len: u64,
}

/// A flush in flight.
#[derive(Debug)]
#[must_use]
pub struct SyncTicket(u64);

/// A read in flight.
#[derive(Debug)]
#[must_use]
pub struct ReadTicket {
    id: u64,
}

#[derive(Clone, Debug)]
struct ActiveRead {
    at: u64,
    len: u64,
    first: u64,
    /// What each sector may show, and whether it stayed quiet since the read began.
    sectors: Vec<(Vec<Value>, bool)>,
}

/// A sector shows what it must not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// First guest byte of the sector.
    pub at: u64,
    /// What it shows.
    pub found: String,
    /// What it may show.
    pub allowed: Vec<String>,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the sector at byte {:#x} shows {}, allowed: {}",
            self.at,
            self.found,
            self.allowed.join(" | ")
        )
    }
}

/// A disk in memory that knows what it may show.
#[derive(Clone, Debug)]
pub struct Model {
    sectors: Vec<Sector>,
    /// Sizes that a crash may leave, in bytes, and when the change to each was over; the last one is the size now.
    sizes: Vec<(u64, Option<u64>)>,
    clock: u64,
    /// Raised by everything that takes away from what a crash may leave.
    strictness: u64,
    reads: BTreeMap<u64, ActiveRead>,
}

impl Model {
    /// A disk of `size` bytes (a multiple of 512) that shows `content`, and zeroes behind it.
    pub fn new(size: u64, content: &Bytes) -> Model {
        assert!(size.is_multiple_of(SECTOR_BYTES), "the model's disk is made of whole sectors");
        let sectors = (0..size / SECTOR_BYTES).map(|index| {
            let at = ((index * SECTOR_BYTES) as usize).min(content.len());
            let part = content.slice(at..(at + SECTOR).min(content.len()));
            let value = if part.len() == SECTOR { Value::of(part) } else { Value::Zero.with(0, &part) };
            vec![Entry { value, begin: 0, end: Some(0), weak: false, stable: true }]
        });
        Model {
            sectors: sectors.collect(),
            sizes: vec![(size, Some(0))],
            clock: 0,
            strictness: 0,
            reads: BTreeMap::new(),
        }
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.sectors.len() as u64 * SECTOR_BYTES
    }

    /// A number that changes whenever less is allowed after a crash than before: what passed [`Model::check_crash`]
    /// goes on passing while it stays.
    pub fn strictness(&self) -> u64 {
        self.strictness
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// The parts of a range: (sector, first byte in it, bytes in it, first byte in the range).
    fn parts(at: u64, len: u64) -> impl Iterator<Item = (usize, usize, usize, usize)> {
        let end = at + len;
        (at / SECTOR_BYTES..end.div_ceil(SECTOR_BYTES)).filter(move |_| len > 0).map(move |index| {
            let start = index * SECTOR_BYTES;
            let (from, to) = (start.max(at), (start + SECTOR_BYTES).min(end));
            (index as usize, (from - start) as usize, (to - from) as usize, (from - at) as usize)
        })
    }

    /// A change is asked for. From now on it may be seen.
    pub fn begin(&mut self, at: u64, change: &Change) -> ChangeTicket {
        let (begin, len) = (self.tick(), change.len());
        let weak = matches!(change, Change::Discard(_));
        for (index, skip, count, from) in Model::parts(at, len) {
            let sector = &mut self.sectors[index];
            let values: Vec<Value> = match change {
                Change::Write(data) if count == SECTOR => vec![Value::of(data.slice(from..from + count))],
                Change::Zero(_) | Change::Discard(_) if count == SECTOR => vec![Value::Zero],
                Change::Write(data) => {
                    live(sector).map(|old| old.value.with(skip, &data[from..from + count])).collect()
                }
                Change::Zero(_) | Change::Discard(_) => {
                    live(sector).map(|old| old.value.with(skip, &[0; SECTOR][..count])).collect()
                }
            };
            for value in values {
                for read in self.reads.values_mut() {
                    if let Some(seen) = (index as u64).checked_sub(read.first).map(|nth| nth as usize)
                        && let Some((allowed, quiet)) = read.sectors.get_mut(seen)
                    {
                        allowed.push(value.clone());
                        *quiet = false;
                    }
                }
                sector.push(Entry { value, begin, end: None, weak, stable: false });
            }
        }
        ChangeTicket { begin, at, len }
    }

    /// A change is over.
    pub fn end(&mut self, ticket: ChangeTicket, outcome: Outcome) {
        let end = self.tick();
        self.strictness += u64::from(outcome == Outcome::Stable);
        for (index, ..) in Model::parts(ticket.at, ticket.len) {
            let Some(sector) = self.sectors.get_mut(index) else { continue };
            for entry in sector.iter_mut().filter(|entry| entry.begin == ticket.begin) {
                entry.end = Some(end);
                entry.weak |= outcome == Outcome::Unknown;
                entry.stable |= outcome == Outcome::Stable;
            }
            if outcome == Outcome::Stable {
                prune(sector);
            }
        }
    }

    /// A flush is asked for.
    pub fn begin_sync(&mut self) -> SyncTicket {
        SyncTicket(self.tick())
    }

    /// A flush was answered: what was acknowledged before it was asked for is stable.
    pub fn end_sync(&mut self, ticket: SyncTicket) {
        self.strictness += 1;
        for sector in self.sectors.iter_mut().filter(|sector| sector.len() > 1) {
            for entry in sector.iter_mut().filter(|entry| entry.end.is_some_and(|end| end < ticket.0)) {
                entry.stable = true;
            }
            prune(sector);
        }
        let stable =
            self.sizes.iter().rposition(|(_, end)| end.is_some_and(|end| end < ticket.0)).unwrap_or(0);
        self.sizes.drain(..stable);
    }

    /// The disk is asked to become longer or shorter.
    pub fn begin_resize(&mut self, size: u64) {
        assert!(size.is_multiple_of(SECTOR_BYTES), "the model's disk is made of whole sectors");
        self.tick();
        let fresh = Entry { value: Value::Zero, begin: 0, end: Some(0), weak: false, stable: true };
        self.sectors.resize(((size / SECTOR_BYTES) as usize).max(1), vec![fresh]);
        self.sizes.push((size, None));
    }

    /// It has the size that it was asked to have last.
    pub fn end_resize(&mut self) {
        let now = self.tick();
        if let Some((_, end)) = self.sizes.last_mut() {
            *end = Some(now);
        }
    }

    /// A read is asked for.
    pub fn begin_read(&mut self, at: u64, len: u64) -> ReadTicket {
        self.clock += 1;
        let sectors = Model::parts(at, len).map(|(index, ..)| {
            let sector = &self.sectors[index];
            let quiet = sector.iter().all(|entry| entry.end.is_some());
            (live(sector).map(|entry| entry.value.clone()).collect(), quiet)
        });
        let read = ActiveRead { at, len, first: at / SECTOR_BYTES, sectors: sectors.collect() };
        self.reads.insert(self.clock, read);
        ReadTicket { id: self.clock }
    }

    /// A read was answered with `found`.
    ///
    /// A sector that was quiet all the while shows from now on what it has shown.
    pub fn end_read(&mut self, ticket: ReadTicket, found: &[u8]) -> Result<(), Mismatch> {
        let Some(read) = self.reads.remove(&ticket.id) else { return Ok(()) };
        assert_eq!(read.len, found.len() as u64, "a read is answered whole");
        let begin = ticket.id;
        for (nth, (index, skip, count, from)) in Model::parts(read.at, read.len).enumerate() {
            let (allowed, quiet) = &read.sectors[nth];
            let found = &found[from..from + count];
            let shown = |value: &&Value| value.shows(skip, found);
            if !allowed.iter().any(|value| value.shows(skip, found)) {
                return Err(mismatch(index, skip, found, allowed.iter()));
            }
            if *quiet && count == SECTOR && allowed.len() > 1 {
                let value = allowed.iter().find(shown).cloned().unwrap_or(Value::Zero);
                let end = self.tick();
                let seen = Entry { value, begin, end: Some(end), weak: false, stable: false };
                self.sectors[index].push(seen);
            }
        }
        Ok(())
    }

    /// A read failed.
    pub fn drop_read(&mut self, ticket: ReadTicket) {
        self.reads.remove(&ticket.id);
    }

    /// Whether a crash at this moment may leave a disk of `size` bytes.
    pub fn check_crash_size(&self, size: u64) -> Result<(), Mismatch> {
        if self.sizes.iter().any(|(allowed, _)| *allowed == size) {
            return Ok(());
        }
        let allowed = self.sizes.iter().map(|(size, _)| format!("{size} bytes")).collect();
        Err(Mismatch { at: size, found: format!("a disk of {size} bytes"), allowed })
    }

    /// Whether the disk of a crash at this moment may have `content` at byte `at`, whole sectors (P1, P2).
    pub fn check_crash_at(&self, at: u64, content: &[u8]) -> Result<(), Mismatch> {
        self.check(at, content, |sector| sector.iter().collect())
    }

    /// Whether the disk of a crash at this moment may have `content`, whole (P1, P2).
    pub fn check_crash(&self, content: &[u8]) -> Result<(), Mismatch> {
        self.check_crash_size(content.len() as u64)?;
        self.check_crash_at(0, content)
    }

    /// Whether the disk may show `content`, whole, now.
    pub fn check_live(&self, content: &[u8]) -> Result<(), Mismatch> {
        if content.len() as u64 != self.size() {
            let allowed = vec![format!("{} bytes", self.size())];
            return Err(Mismatch { at: 0, found: format!("a disk of {} bytes", content.len()), allowed });
        }
        self.check(0, content, |sector| live(sector).collect())
    }

    fn check<'a>(
        &'a self,
        at: u64,
        content: &[u8],
        candidates: impl Fn(&'a Sector) -> Vec<&'a Entry>,
    ) -> Result<(), Mismatch> {
        let first = (at / SECTOR_BYTES) as usize;
        let sectors = self.sectors.iter().enumerate().skip(first);
        for ((index, sector), found) in sectors.zip(content.chunks(SECTOR)) {
            let right = match sector.as_slice() {
                [only] => only.value.shows(0, found),
                _ => candidates(sector).iter().any(|entry| entry.value.shows(0, found)),
            };
            if !right {
                let allowed = candidates(sector);
                return Err(mismatch(index, 0, found, allowed.iter().map(|entry| &entry.value)));
            }
        }
        Ok(())
    }
}

fn mismatch<'a>(
    index: usize,
    skip: usize,
    found: &[u8],
    allowed: impl Iterator<Item = &'a Value>,
) -> Mismatch {
    let at = index as u64 * SECTOR_BYTES;
    let mut words: Vec<String> = allowed.map(|value| value.describe(at, skip, found.len())).collect();
    words.dedup();
    Mismatch { at, found: describe(at + skip as u64, found), allowed: words }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::payload::payload;

    fn write(model: &mut Model, op: u32, at: u64, len: u64) -> ChangeTicket {
        model.begin(at, &Change::Write(payload(op, at, len as usize)))
    }

    fn flush(model: &mut Model) {
        let ticket = model.begin_sync();
        model.end_sync(ticket);
    }

    fn content(parts: [u32; 2]) -> Vec<u8> {
        let sector = |nth: usize| match parts[nth] {
            0 => Bytes::from_static(&[0; SECTOR]),
            op => payload(op, nth as u64 * SECTOR_BYTES, SECTOR),
        };
        [sector(0), sector(1)].concat()
    }

    #[test]
    fn a_crash_shows_the_flushed_value_or_any_later_one_and_never_an_older() {
        let mut model = Model::new(1024, &Bytes::new());
        let first = write(&mut model, 1, 0, 1024);
        assert!(model.check_crash(&content([0, 1])).is_ok(), "in flight: in part");
        model.end(first, Outcome::Done);
        assert!(model.check_crash(&content([0, 0])).is_ok(), "not flushed");
        assert!(model.check_live(&content([0, 1])).is_err(), "a read sees what was acknowledged");
        flush(&mut model);
        assert!(model.check_crash(&content([0, 1])).is_err());
        let second = write(&mut model, 2, 0, 512);
        model.end(second, Outcome::Done);
        let third = write(&mut model, 3, 0, 512);
        for first in [1, 2, 3] {
            assert!(model.check_crash(&content([first, 1])).is_ok(), "{first}");
        }
        let flushing = model.begin_sync();
        model.end(third, Outcome::Done);
        model.end_sync(flushing);
        assert!(model.check_crash(&content([1, 1])).is_err(), "2 had been acknowledged before the flush");
        assert!(model.check_crash(&content([2, 1])).is_ok(), "3 had not");
    }

    #[test]
    fn fua_makes_its_own_write_stable() {
        let mut model = Model::new(1024, &Bytes::new());
        let other = write(&mut model, 1, 512, 512);
        model.end(other, Outcome::Done);
        let fua = write(&mut model, 2, 0, 512);
        model.end(fua, Outcome::Stable);
        assert!(model.check_crash(&content([2, 0])).is_ok());
        assert!(model.check_crash(&content([0, 1])).is_err());
    }

    #[test]
    fn a_read_beside_writes_shows_old_or_new_and_then_stays_with_it() {
        let mut model = Model::new(1024, &Bytes::new());
        let (one, two) = (write(&mut model, 1, 0, 512), write(&mut model, 2, 0, 512));
        let read = model.begin_read(0, 512);
        model.end(one, Outcome::Done);
        model.end(two, Outcome::Done);
        assert!(model.end_read(read, &content([1, 0])[..512]).is_ok());
        for _ in 0..2 {
            let read = model.begin_read(0, 512);
            assert!(model.end_read(read, &content([2, 0])[..512]).is_ok());
        }
        let read = model.begin_read(0, 512);
        assert!(model.end_read(read, &content([1, 0])[..512]).is_err(), "2 was seen last, and nobody wrote");
        let read = model.begin_read(0, 512);
        assert!(model.end_read(read, &content([0, 0])[..512]).is_err(), "long replaced");
    }

    #[test]
    fn a_write_that_ends_in_the_middle_of_a_read_and_is_flushed_there_may_not_be_in_it() {
        let mut model = Model::new(1024, &Bytes::new());
        let read = model.begin_read(0, 1024);
        let one = write(&mut model, 1, 0, 512);
        model.end(one, Outcome::Stable);
        let two = write(&mut model, 2, 0, 512);
        model.end(two, Outcome::Stable);
        assert!(model.end_read(read, &content([0, 0])).is_ok());
        assert!(model.check_live(&content([2, 0])).is_ok());
        assert!(model.check_live(&content([1, 0])).is_err());
    }

    #[test]
    fn a_discard_leaves_or_zeroes_and_a_look_decides() {
        let mut model = Model::new(1024, &payload(7, 0, 1024));
        let discard = model.begin(0, &Change::Discard(1024));
        model.end(discard, Outcome::Done);
        flush(&mut model);
        assert!(model.check_crash(&content([0, 7])).is_ok());
        let read = model.begin_read(0, 512);
        assert!(model.end_read(read, &[0; 512]).is_ok());
        assert!(model.check_live(&content([7, 7])).is_err());
        assert!(model.check_crash(&content([7, 7])).is_ok(), "not flushed since");
        flush(&mut model);
        assert!(model.check_crash(&content([7, 7])).is_err());
        assert!(model.check_crash(&content([0, 7])).is_ok());
    }

    #[test]
    fn a_write_of_a_part_goes_over_whatever_was_there() {
        let mut model = Model::new(1024, &payload(7, 0, 1024));
        let part = write(&mut model, 8, 100, 800);
        model.end(part, Outcome::Done);
        let mut expected = payload(7, 0, 1024).to_vec();
        expected[100..900].copy_from_slice(&payload(8, 100, 800));
        assert!(model.check_live(&expected).is_ok());
        expected[512..900].copy_from_slice(&payload(7, 512, 388));
        assert!(model.check_crash(&expected).is_ok(), "torn between sectors");
        expected[100] ^= 1;
        assert!(model.check_crash(&expected).is_err());
    }

    #[test]
    fn what_failed_may_be_there_or_not_and_a_new_size_counts_from_its_flush() {
        let mut model = Model::new(1024, &Bytes::new());
        let failed = write(&mut model, 1, 0, 512);
        model.end(failed, Outcome::Unknown);
        flush(&mut model);
        assert!(model.check_crash(&content([0, 0])).is_ok());
        assert!(model.check_crash(&content([1, 0])).is_ok());
        model.begin_resize(2048);
        flush(&mut model);
        assert!(model.check_crash(&content([0, 0])).is_ok(), "the flush began before the change was over");
        model.end_resize();
        flush(&mut model);
        assert!(model.check_crash(&content([0, 0])).is_err());
        assert!(model.check_crash(&[content([1, 0]), vec![0; 1024]].concat()).is_ok());
    }
}
