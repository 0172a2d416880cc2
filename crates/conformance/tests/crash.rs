//! Crash states of every format: none breaks a promise.
//!
//! `INFILL_SEED=n` runs that seed alone; the seed of a failure is printed.

use std::sync::Mutex;

use infill_conformance::crash::{Found, Plan, creation, run};
use infill_conformance::{Format, Mix, referee};
use rustc_hash::FxHashSet;

/// Every how many states `qemu-img` judges one.
const SAMPLE_EVERY: u64 = 300;

/// Runs seeds of a format until `states` distinct states counted; gives how many did.
fn survives(format: Format, states: u64) -> u64 {
    let only: Option<u64> = std::env::var("INFILL_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut seed = only.unwrap_or(1);
    let (mut seen, mut counted) = (FxHashSet::default(), 0);
    loop {
        // A disk that fails has a turn now and then.
        let faults = seed.is_multiple_of(3);
        let grows = !faults && seed.is_multiple_of(2);
        let plan = Plan { sample_every: SAMPLE_EVERY, faults, grows, ..Plan::short(format, seed) };
        let Found { tally, samples, violation } = run(&plan, &mut seen);
        println!("{} seed {seed}: {tally:?}, {} judged by qemu-img", format.name(), samples.len());
        let judged = samples.iter().try_for_each(referee::judge);
        if let Some(violation) = violation.or(judged.err()) {
            panic!("{} seed {seed}: {violation}", format.name());
        }
        counted += tally.counted;
        if only.is_some() || counted >= states {
            return counted;
        }
        seed += 1;
    }
}

/// Runs every format, on both cores; gives how many states counted.
fn all_survive(formats: &[(Format, u64)]) -> u64 {
    let (queue, counted) = (Mutex::new(formats.iter()), Mutex::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().expect("nobody panicked").next();
                    let Some((format, states)) = next else { break };
                    let more = survives(*format, *states);
                    *counted.lock().expect("nobody panicked") += more;
                }
            });
        }
    });
    counted.into_inner().expect("nobody panicked")
}

#[test]
fn qcow2_survives_every_crash_at_ten_thousand_states_and_more() {
    let counted = all_survive(&[
        (Format::QCOW2_4K, 2500),
        (Format::QCOW2_SUBCLUSTERS_16K, 2000),
        (Format::QCOW2_512, 1500),
        (Format::QCOW2_SUBCLUSTERS, 1500),
        (Format::QCOW2_V2, 1000),
        (Format::QCOW2, 1000),
        (Format::QCOW2_1BIT, 500),
        (Format::QCOW2_LAZY, 500),
    ]);
    assert!(counted >= 10_000 || std::env::var_os("INFILL_SEED").is_some(), "{counted} states");
}

#[test]
fn qed_survives_every_crash() {
    all_survive(&[(Format::QED, 2500), (Format::QED_64K, 500)]);
}

#[test]
fn a_raw_disk_survives_every_crash_and_none_of_its_states_count() {
    let mut seen = FxHashSet::default();
    let found = run(&Plan::new(Format::Raw, 1), &mut seen);
    assert!(found.violation.is_none(), "{:?}", found.violation);
    assert_eq!(found.tally.counted, 0, "a raw disk has no metadata");
    assert!(found.tally.judged > 40);
}

#[test]
fn an_image_that_is_being_made_is_none_or_whole() {
    for (_, format) in Format::ALL.iter().filter(|(_, format)| *format != Format::Raw) {
        for old in [Vec::new(), vec![0xaa; 300_000]] {
            let states = creation(*format, 3 << 20, &old.into(), 5);
            let states = states.unwrap_or_else(|violation| panic!("{}: {violation}", format.name()));
            assert!(states > 10, "{}: {states} states", format.name());
        }
    }
}

#[test]
fn qcow2_that_compresses_survives_every_crash() {
    let mut judged = 0;
    for format in [Format::QCOW2_4K, Format::QCOW2, Format::QCOW2_SUBCLUSTERS_16K, Format::QCOW2_V2] {
        for seed in 1..3 {
            let plan = Plan { sample_every: 150, faults: seed % 3 == 0, ..Plan::short(format, seed) };
            let mix = Mix { packed_per_mille: 600, ..plan.mix };
            // What is compressed is no payload that the order of writes could be told from.
            let found = run(&Plan { mix, rules: false, ..plan }, &mut FxHashSet::default());
            judged += found.samples.len();
            let referee = found.samples.iter().try_for_each(referee::judge);
            if let Some(violation) = found.violation.or(referee.err()) {
                panic!("{} seed {seed}: {violation}", format.name());
            }
        }
    }
    assert!(judged > 50, "{judged} states were shown to QEMU");
}
