//! Processes die at every boundary of a write, their guests live on, and nothing that was acknowledged is lost (P1b).
//!
//! `INFILL_SEED=n` runs that seed alone; the seed of a failure is printed.

use infill_conformance::crash::{Found, Outlived, Plan, Tally, run};
use infill_conformance::{Format, Mix};
use rustc_hash::FxHashSet;

/// Room that no run needs.
const ROOM: u64 = 4096;

/// Room that is full now and then.
const SMALL: u64 = 24;

/// Runs seeds of a format until `deaths` were judged.
fn outlives(format: Format, outlived: impl Fn(u64) -> Outlived, deaths: u64) -> Tally {
    let only: Option<u64> = std::env::var("INFILL_SEED").ok().and_then(|seed| seed.parse().ok());
    let (mut seen, mut total, mut seed) = (FxHashSet::default(), Tally::default(), only.unwrap_or(1));
    while total.deaths < deaths {
        let Found { tally, violation, .. } = run(&Plan::deadly(format, outlived(seed), seed), &mut seen);
        if let Some(violation) = violation {
            panic!("{} seed {seed}: {violation}", format.name());
        }
        total += tally;
        if only.is_some() {
            break;
        }
        seed += 1;
    }
    println!("{} seeds to {seed}: {total:?}", format.name());
    total
}

/// With a journal, every third of which is small.
fn replays(format: Format, deaths: u64) {
    let outlived = |seed: u64| Outlived::Journal(if seed.is_multiple_of(3) { SMALL } else { ROOM });
    let total = outlives(format, outlived, deaths);
    if std::env::var_os("INFILL_SEED").is_none() {
        // What the proof is worth: most deaths leave something to replay, and every kind of successor came.
        assert!(total.replays * 2 > total.deaths, "{total:?}");
        assert!(total.replays_cut > 0 && total.refusals > 0, "{total:?}");
    }
}

#[test]
fn qcow2_loses_nothing_with_its_process() {
    replays(Format::QCOW2_4K, 1000);
}

#[test]
fn qcow2_with_subclusters_loses_nothing_with_its_process() {
    replays(Format::QCOW2_SUBCLUSTERS_16K, 1000);
}

#[test]
fn qcow2_whose_tables_grow_loses_nothing_with_its_process() {
    replays(Format::QCOW2_512, 700);
}

#[test]
fn qed_loses_nothing_with_its_process() {
    replays(Format::QED, 1000);
}

#[test]
fn what_is_written_through_is_not_lost_with_its_process() {
    for format in [Format::QCOW2_SUBCLUSTERS_16K, Format::QED] {
        assert_eq!(outlives(format, |_| Outlived::WriteThrough, 400).replays, 0);
    }
}

/// Version 2 has nowhere to say that a journal belongs to the image.
#[test]
fn qcow2_of_version_2_is_written_through() {
    assert_eq!(outlives(Format::QCOW2_V2, |_| Outlived::Journal(ROOM), 400).replays, 0);
}

#[test]
fn a_death_while_space_is_reserved_does_not_make_the_file_shorter() {
    // Seeds at which the simulated disk once did: space was being reserved at two places.
    for seed in [102, 107, 115, 121, 125] {
        let plan = Plan::deadly(Format::QCOW2_4K, Outlived::Journal(ROOM), seed);
        let found = run(&plan, &mut FxHashSet::default());
        assert!(found.violation.is_none(), "seed {seed}");
    }
}

#[test]
fn qcow2_loses_nothing_that_it_compressed_with_its_process() {
    for format in [Format::QCOW2_4K, Format::QCOW2, Format::QCOW2_SUBCLUSTERS_16K] {
        for seed in 1..6 {
            let plan = Plan::deadly(format, Outlived::Journal(ROOM), seed);
            let mix = Mix { packed_per_mille: 600, ..plan.mix };
            let found = run(&Plan { mix, rules: false, ..plan }, &mut FxHashSet::default());
            assert!(found.violation.is_none(), "{} seed {seed}", format.name());
        }
    }
}
