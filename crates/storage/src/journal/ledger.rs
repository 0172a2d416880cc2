//! What a driver keeps of its journal while an image is open.

use infill_base::{IoResult, OpenError};

use super::{Found, Record, VolatileJournal};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Mutex, lock};

/// What becomes of changes that only memory has when the process dies.
#[derive(Clone, Debug, Default)]
pub enum Journaling {
    /// They are lost: for a process that nobody outlives who relies on it.
    #[default]
    Off,
    /// There are none when something is acknowledged: each change is followed by a round.
    WriteThrough,
    /// They are recorded.
    Volatile(VolatileJournal),
}

/// The changes that a round has copied when it is over.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Mark {
    /// Records before this one.
    number: u64,
    /// Unrecorded changes up to this one.
    owed: u64,
}

#[derive(Debug)]
enum Mode {
    Off,
    /// Everything is owed.
    Through,
    /// Found, but nothing may be recorded yet.
    Attached(VolatileJournal),
    Recording(VolatileJournal),
}

#[derive(Debug)]
struct State {
    mode: Mode,
    /// The oldest record that is kept, and the next one.
    head: u64,
    tail: u64,
    /// Records that there is room for.
    capacity: u64,
}

impl State {
    fn is_filling(&self) -> bool {
        self.tail - self.head > self.capacity / 2
    }
}

/// Records changes, or counts those that were not recorded. Shared by all reactors.
#[derive(Debug)]
pub struct Ledger {
    off: bool,
    state: Mutex<State>,
    /// Half of the room is used.
    full: AtomicBool,
    /// Changes without a record, and how many of them are stable.
    owed: AtomicU64,
    paid: AtomicU64,
}

impl Ledger {
    /// A ledger that keeps what `journaling` says.
    pub fn new(journaling: Journaling) -> Ledger {
        let mode = match journaling {
            Journaling::Off => Mode::Off,
            Journaling::WriteThrough => Mode::Through,
            Journaling::Volatile(journal) => Mode::Attached(journal),
        };
        Ledger {
            off: matches!(mode, Mode::Off),
            state: Mutex::new(State { mode, head: 0, tail: 0, capacity: 0 }),
            full: AtomicBool::new(false),
            owed: AtomicU64::new(0),
            paid: AtomicU64::new(0),
        }
    }

    /// Begins to record, if there is a journal: then the image must say so before its first change. `possible`: the
    /// image can say so. After an error (and where it cannot) everything is owed.
    pub fn begin(&self, possible: bool) -> IoResult<bool> {
        let mut state = lock(&self.state);
        let journal = match &state.mode {
            Mode::Recording(_) => return Ok(true),
            Mode::Off | Mode::Through => return Ok(false),
            Mode::Attached(journal) => journal.clone(),
        };
        state.mode = Mode::Through;
        if possible {
            state.capacity = journal.begin()?;
            state.mode = Mode::Recording(journal);
        }
        Ok(possible)
    }

    /// Makes a change: records it, then sets it with `set`.
    pub fn change(&self, record: impl FnOnce() -> Record, set: impl FnOnce()) {
        if self.off {
            return set();
        }
        let mut state = lock(&self.state);
        match &state.mode {
            Mode::Recording(journal) if state.tail - state.head < state.capacity => {
                journal.put(state.tail, &record());
                state.tail += 1;
                self.full.store(state.is_filling(), Ordering::Relaxed);
            }
            mode => {
                if let Mode::Recording(journal) = mode {
                    journal.set_gaps(true);
                }
                // Before it is set: whoever sees it, sees that it is owed.
                self.owed.fetch_add(1, Ordering::Release);
            }
        }
        set();
    }

    /// To be called by a round before it copies anything.
    pub fn mark(&self) -> Mark {
        let state = lock(&self.state);
        Mark { number: state.tail, owed: self.owed.load(Ordering::Acquire) }
    }

    /// The copies of the round that took this mark are stable.
    pub fn stable(&self, mark: Mark) {
        if self.off {
            return;
        }
        let mut state = lock(&self.state);
        // It may have been emptied meanwhile.
        state.head = mark.number.max(state.head);
        if let Mode::Recording(journal) = &state.mode {
            journal.drop_before(state.head);
            if self.owed.load(Ordering::Acquire) == mark.owed {
                journal.set_gaps(false);
            }
        }
        self.full.store(state.is_filling(), Ordering::Relaxed);
        self.paid.fetch_max(mark.owed, Ordering::AcqRel);
    }

    /// Whether a change may be seen that has no record and is not stable: nothing may be acknowledged before a round.
    pub fn owes(&self) -> bool {
        self.owed.load(Ordering::Acquire) > self.paid.load(Ordering::Acquire)
    }

    /// Whether so much is recorded that a round should come before more is.
    pub fn wants_round(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// What is stable is unknown, so nothing that was recorded may be replayed: it would name what may not be there.
    pub fn void(&self) {
        let mut state = lock(&self.state);
        state.head = state.tail;
        self.full.store(false, Ordering::Relaxed);
        if let Mode::Recording(journal) = &state.mode {
            journal.drop_before(state.head);
        }
        if !self.off {
            state.mode = Mode::Through;
        }
    }

    /// Everything is stable and the image is about to be closed: from now on nothing is recorded, and everything owed.
    /// Gives the journal, if there is one; it stays as it is where something was changed meanwhile.
    pub fn end(&self) -> Option<Ended> {
        let mut state = lock(&self.state);
        if state.head != state.tail {
            return None;
        }
        let ended = match &state.mode {
            Mode::Attached(journal) | Mode::Recording(journal) => Ended(journal.clone()),
            Mode::Off | Mode::Through => return None,
        };
        state.mode = Mode::Through;
        Some(ended)
    }
}

/// A journal that is empty and not used any more. Dropped, it stays, for an image that speaks of it.
#[derive(Debug)]
#[must_use]
pub struct Ended(VolatileJournal);

impl Ended {
    /// The image does not speak of it any more.
    pub fn remove(self) {
        self.0.remove();
    }
}

impl Journaling {
    /// What [`Journaling::pending`] gave is in the image, and stable.
    pub fn replayed(&self) {
        if let Journaling::Volatile(journal) = self {
            journal.replayed();
        }
    }

    /// What a process before this one has left of an image: to be replayed before it is used. `bit`: the image says that
    /// nobody else has opened it for writing since.
    pub fn pending(&self, image: &str, read_only: bool, bit: bool) -> Result<Option<&Found>, OpenError> {
        let Journaling::Volatile(journal) = self else { return Ok(None) };
        let found = journal.found();
        if found.is_empty() {
            return Ok(None);
        }
        let holds = format!(
            "{} holds {} changes of {image} that a process had acknowledged and that are not in the image yet",
            journal.name(),
            found.records.len()
        );
        if !bit {
            let why = format!(
                "{holds}, but another program has opened the image for writing since: they no longer fit it. Delete that \
                 journal to use the image as it is, without what was written last before the process died"
            );
            return Err(OpenError::Refused { why });
        }
        if read_only {
            let why = format!("{holds}: open it for writing once, or delete the journal to go without them");
            return Err(OpenError::Refused { why });
        }
        Ok(Some(found))
    }
}
