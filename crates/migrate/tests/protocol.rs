//! The model, at a size for every day. Deeper: `cargo run --release -p infill-migrate --example model -- --help`.

mod model;

use std::collections::HashSet;

use infill_migrate::{SourceState, State, TargetState};
use model::explore::Explorer;
use model::runs;
use model::world::Bounds;

/// States of a run, at most; more than any has.
const STATES_MAX: usize = 1_000_000;

/// Every durable state that there is.
fn every_state() -> HashSet<State> {
    use SourceState as S;
    use TargetState as T;
    let sources =
        [S::Serving, S::Prepared, S::Offered, S::HandedOver, S::TakingBack, S::Reclaiming, S::Released];
    let targets = [T::Prepared, T::Accepted, T::TakingOver, T::Owner, T::Complete, T::Local, T::GivingBack];
    let ends = [T::GaveBack, T::Aborted, T::Superseded];
    let sources = sources.into_iter().chain([S::Superseded]).map(State::Source);
    sources.chain(targets.into_iter().chain(ends).map(State::Target)).collect()
}

fn explore(bounds: Bounds, reached: &mut HashSet<State>) -> usize {
    let mut explorer = Explorer::new(bounds);
    let report = explorer.run(STATES_MAX);
    if let Some(violation) = report.violation {
        panic!("{}: {violation}", bounds.name);
    }
    if let Some(violation) = explorer.liveness() {
        panic!("{}: {violation}", bounds.name);
    }
    assert!(report.whole, "{} has more than {STATES_MAX} states", bounds.name);
    println!("{}: all {} states, {} steps, {} deep", bounds.name, report.states, report.steps, report.depth);
    reached.extend(explorer.reached());
    report.states
}

#[test]
fn no_order_of_messages_and_crashes_breaks_a_promise() {
    let mut reached = HashSet::new();
    let states: usize = runs::RUNS.into_iter().map(|run| explore(run, &mut reached)).sum();
    println!("{states} states");
    // What is never reached is not checked.
    assert_eq!(reached, every_state());
    assert!(states >= 1_000_000, "{states} states are too few");
}

#[test]
fn every_planted_mistake_is_found() {
    for fault in infill_migrate::Fault::ALL {
        let bounds = runs::planted(fault);
        let mut explorer = Explorer::new(bounds);
        let violation = explorer.run(STATES_MAX).violation.or_else(|| explorer.liveness());
        match violation {
            Some(violation) => println!("{fault:?} ({}): {violation}", bounds.name),
            None => panic!("{fault:?} is not found in {}", bounds.name),
        }
    }
}

#[test]
fn two_disks_of_a_machine_in_two_records_part() {
    let report = Explorer::new(runs::TWO_RECORDS).run(STATES_MAX);
    let violation = report.violation.expect("the disks part");
    println!("{violation}");
    assert!(violation.what.starts_with("I1"), "{}", violation.what);
}
