//! The crash proof: generated operations on the real format code, and a crash at every boundary of a write.
//!
//! A run is a few *lives* of one disk. In each, guests write, zero, discard, flush and read at once, copy-on-read and
//! populates fill the overlay, a stream may come to its end, the image is closed and opened again; all of it under the
//! deterministic scheduler on a simulated disk. At every boundary of a write or sync, and whenever a flush was
//! answered, media states that the media model allows are built: targeted ones (the metadata without the payload, the
//! newest write alone, …), all combinations of whole writes where these are few, others by chance, and the death of the
//! process. Each is opened by the real driver for reading and writing, compared with the model (P1, P2, P4), checked
//! (P3), and some are used on, checked again and kept for `qemu-img`. A later life begins with such a state.
//!
//! With [`Plan::outlived`] the death of the process is judged, too: at every boundary a
//! successor replays the journal, answers a FLUSH, and loses power; all that was acknowledged before has to be there. Some
//! successors die in the middle of it, some find that somebody else has written to the image.
//!
//! A state *counts* if its content was not seen before, and it was taken while at least one metadata write and one
//! payload were not synced.
//!
//! Everything follows from [`Plan::seed`]: a run is repeated by it.

mod creation;
mod death;
mod judge;
mod life;

use std::panic::{AssertUnwindSafe, catch_unwind};

use infill_sim::{Media, Rng};
use infill_storage::StorageHandle;
use rustc_hash::FxHashSet;

use crate::{Format, Mix, Violation};

pub use creation::creation;
pub use judge::{BACKING_NAME, Sample, Tally};

/// What a process does for the guest that outlives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outlived {
    /// It records, with room for so many records.
    Journal(u64),
    /// It writes through.
    WriteThrough,
}

/// What a run does.
#[derive(Clone)]
pub struct Plan {
    /// Format and geometry.
    pub format: Format,
    /// Everything by chance follows from it.
    pub seed: u64,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Length of the backing in bytes (shorter or longer than the disk as it may be); `None` for no backing.
    pub backing: Option<u64>,
    /// How often the disk is opened after a crash and used on, the first time included.
    pub lives: usize,
    /// How often in a life the image is opened.
    pub sessions: usize,
    /// Guests at once, in a session.
    pub guests: usize,
    /// Operations of each guest in a session.
    pub ops: usize,
    /// What the guests do.
    pub mix: Mix,
    /// Whether the disk grows on the way.
    pub grows: bool,
    /// Whether operations of the disk fail now and then.
    pub faults: bool,
    /// Media states that are looked at at each boundary (a few more where they are targeted).
    pub states_per_point: usize,
    /// Every how many states one is kept for the referee; 0 is never.
    pub sample_every: u64,
    /// Whether the order of writes is asserted too; without it only what the states show counts.
    pub rules: bool,
    /// Whether deaths of the process are judged, whose guest lives on and has its FLUSH answered by the next process; and
    /// what it does for that.
    pub outlived: Option<Outlived>,
    /// What lies between the format and the disk: a way to plant faults below the format.
    pub storage: fn(StorageHandle) -> StorageHandle,
}

impl Plan {
    /// The usual run of a format.
    pub fn new(format: Format, seed: u64) -> Plan {
        let size = format.crash_size();
        Plan {
            format,
            seed,
            size,
            backing: format.is_overlay().then_some(size),
            lives: 3,
            sessions: 2,
            guests: 4,
            ops: 12,
            mix: Mix::GUEST,
            grows: false,
            faults: false,
            states_per_point: 4,
            sample_every: 0,
            rules: true,
            outlived: None,
            storage: |storage| storage,
        }
    }

    /// A run whose every number follows from the seed.
    pub fn varied(format: Format, seed: u64) -> Plan {
        let plan = Plan::new(format, seed);
        let rng = &mut Rng::new(seed ^ 0x5eed);
        let backing = match rng.below(5) {
            0 => None,
            1 => Some(plan.size / 2 + 704),
            2 => Some(plan.size + 40_000),
            _ => Some(plan.size),
        };
        let mix = Mix {
            read: rng.range(5, 40),
            write: rng.range(20, 80),
            zero: rng.below(25),
            discard: rng.below(25),
            sync: rng.range(2, 20),
            fua_per_mille: rng.below(200),
            packed_per_mille: 0,
        };
        let faults = rng.per_mille(250);
        Plan {
            faults,
            backing: backing.filter(|_| format.is_overlay()),
            lives: rng.range(1, 5) as usize,
            sessions: rng.range(1, 4) as usize,
            guests: rng.range(1, 8) as usize,
            ops: rng.range(4, 24) as usize,
            mix,
            grows: !faults && format.is_overlay() && rng.per_mille(250),
            ..plan
        }
    }
}

impl Plan {
    /// A short run of a process that a guest outlives.
    pub fn deadly(format: Format, outlived: Outlived, seed: u64) -> Plan {
        Plan { outlived: Some(outlived), ..Plan::short(format, seed) }
    }

    /// A short run in which every kind of operation has its turn and the disk itself is well: to look for a planted
    /// mistake.
    pub fn short(format: Format, seed: u64) -> Plan {
        Plan {
            lives: 1,
            sessions: 2,
            guests: 5,
            ops: 14,
            states_per_point: 2,
            faults: false,
            grows: seed.is_multiple_of(2),
            mix: Mix { zero: 14, discard: 12, sync: 14, ..Mix::GUEST },
            ..Plan::varied(format, seed)
        }
    }
}

/// What a run found.
#[derive(Debug, Default)]
pub struct Found {
    /// How much was looked at.
    pub tally: Tally,
    /// States for the referee.
    pub samples: Vec<Sample>,
    /// The first promise that was broken.
    pub violation: Option<Violation>,
}

/// Runs `plan`. `seen` are the states that were counted by runs before; they are not counted again.
pub fn run(plan: &Plan, seen: &mut FxHashSet<u64>) -> Found {
    let mut found = Found::default();
    let mut rng = Rng::new(plan.seed);
    let mut heir: Option<(Media, Vec<u8>, bool)> = None;
    for life in 0..plan.lives {
        let judge = judge::Judge::new(plan, rng.fork(), std::mem::take(seen), heir.take());
        let lived = catch_unwind(AssertUnwindSafe(|| life::live(plan, &judge, rng.next_u64())));
        let ended = judge.close();
        *seen = ended.seen;
        found.tally += ended.tally;
        found.samples.extend(ended.samples);
        let lived = lived.unwrap_or_else(|panic| Err(Violation::Broken(words(&panic))));
        found.violation = ended.violation.or(lived.err());
        if let Some(violation) = &found.violation {
            print_seed(plan, life, violation);
            break;
        }
        heir = ended.heir;
    }
    found
}

/// Runs `plans` one after another until one finds a violation.
pub fn run_all(plans: impl IntoIterator<Item = Plan>) -> Found {
    let (mut seen, mut all) = (FxHashSet::default(), Found::default());
    for plan in plans {
        let found = run(&plan, &mut seen);
        all.tally += found.tally;
        all.samples.extend(found.samples);
        all.violation = found.violation;
        if all.violation.is_some() {
            break;
        }
    }
    all
}

fn print_seed(plan: &Plan, life: usize, violation: &Violation) {
    eprintln!("{} seed {} life {life}: {violation}", plan.format.name(), plan.seed);
}

fn words(panic: &Box<dyn std::any::Any + Send>) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panic: {}", text.unwrap_or("without words"))
}
