//! Crash states of every format: none breaks a promise.
//!
//! `INFILL_SEED=n` runs that seed alone; the seed of a failure is printed.

use infill_conformance::Format;
use infill_conformance::crash::{Plan, run_all};

/// The seeds of a run: one from the environment, or as many as asked for.
fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("INFILL_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => vec![seed],
        None => (1..=count).collect(),
    }
}

#[track_caller]
fn survives(what: &str, plans: Vec<Plan>) -> u64 {
    let found = run_all(plans);
    println!("{what}: {:?}", found.tally);
    if let Some(violation) = found.violation {
        panic!("{what}: {violation}");
    }
    found.tally.counted
}

#[test]
fn a_raw_disk_survives_every_crash() {
    let plans = seeds(2).into_iter().map(|seed| Plan::new(Format::Raw, seed)).collect();
    survives("raw", plans);
}
