//! The model, as deep as one likes:
//! `cargo run --release -p infill-migrate --example model -- [RUN…] [BOUND=N…] [--states N] [--planted]`.
//!
//! Explores the named runs (all, when none is named) up to N states each, with a check in every state and of what a fair
//! world leads to from it. `writes=3` and the like change a bound of all runs. `--planted` looks for every planted
//! mistake instead, and prints the shortest way to each.

#[path = "../tests/model/mod.rs"]
mod model;

use std::process::ExitCode;
use std::time::Instant;

use model::explore::{Explorer, Violation};
use model::runs;
use model::world::Bounds;

const STATES: usize = 10_000_000;

fn main() -> ExitCode {
    let (mut names, mut bounds, mut most, mut planted) = (vec![], vec![], STATES, false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--states" => match arguments.next().and_then(|number| number.parse().ok()) {
                Some(number) => most = number,
                None => return usage("--states needs a number"),
            },
            "--planted" => planted = true,
            bound if bound.contains('=') => match change(bound) {
                Some(change) => bounds.push(change),
                None => return usage(bound),
            },
            name if runs::RUNS.iter().any(|run| run.name == name) => names.push(argument),
            other => return usage(other),
        }
    }
    if planted {
        return every_planted(most);
    }
    let chosen =
        runs::RUNS.into_iter().filter(|run| names.is_empty() || names.iter().any(|name| name == run.name));
    let mut good = true;
    for mut run in chosen {
        bounds.iter().for_each(|(name, value)| {
            run.set(name, *value);
        });
        good &= explore(run, most).is_none();
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// `name=number`, of a bound that there is.
fn change(text: &str) -> Option<(String, u8)> {
    let (name, value) = text.split_once('=')?;
    let value = value.parse().ok()?;
    { Bounds::NONE }.set(name, value).then(|| (name.to_owned(), value))
}

fn usage(what: &str) -> ExitCode {
    let names: Vec<_> = runs::RUNS.iter().map(|run| run.name).collect();
    eprintln!(
        "{what}: expected [RUN…] [BOUND=N…] [--states N] [--planted], with RUN of {}",
        names.join(", ")
    );
    ExitCode::from(2)
}

fn explore(bounds: Bounds, most: usize) -> Option<Violation> {
    let start = Instant::now();
    let mut explorer = Explorer::new(bounds);
    let report = explorer.run(most);
    let seconds = start.elapsed().as_secs_f64();
    let whole = if report.whole { "all of them" } else { "not all" };
    println!("{bounds:?}");
    println!(
        "{} states ({whole}), {} steps, {} deep, {seconds:.1} s",
        report.states, report.steps, report.depth
    );
    let violation = report.violation.or_else(|| explorer.liveness());
    match &violation {
        Some(violation) => println!("VIOLATION: {violation}"),
        None => println!("no violation; one owner comes from each, {:.1} s\n", start.elapsed().as_secs_f64()),
    }
    violation
}

fn every_planted(most: usize) -> ExitCode {
    let mut all = true;
    let faults = infill_migrate::Fault::ALL.map(|fault| (format!("{fault:?}"), runs::planted(fault)));
    for (name, bounds) in faults.into_iter().chain([("TwoRecords".to_owned(), runs::TWO_RECORDS)]) {
        println!("== {name}");
        all &= explore(bounds, most).is_some();
    }
    if all { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
