//! Crash states without end: `soak --states N --seed S --format F`.
//!
//! Runs the crash proof from one seed upwards until so many distinct states were counted, tells how far it is, and stops
//! at the first violation with the seed that repeats it. `--format all` takes the formats in turn.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use infill_conformance::crash::{Found, Plan, Tally, run};
use infill_conformance::{Format, referee};
use rustc_hash::FxHashSet;

const USAGE: &str = "usage: soak [--states N] [--seed S] [--format NAME|all] [--sample EVERY]";

struct Options {
    states: u64,
    seed: u64,
    formats: Vec<Format>,
    sample_every: u64,
}

fn options() -> Result<Options, String> {
    let all = || Format::ALL.iter().map(|(_, format)| *format).filter(|format| *format != Format::Raw);
    let mut options = Options { states: 1_000_000, seed: 1, formats: all().collect(), sample_every: 2000 };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        let number = || value.parse().map_err(|_| format!("{word} needs a number, not {value:?}"));
        match word.as_str() {
            "--states" => options.states = number()?,
            "--seed" => options.seed = number()?,
            "--sample" => options.sample_every = number()?,
            "--format" if value == "all" => {}
            "--format" => {
                let known = Format::ALL.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
                let format = Format::parse(&value);
                options.formats = vec![format.ok_or(format!("no format {value:?}; there are {known}"))?];
            }
            _ => return Err(format!("{word} is not an option")),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(why) => {
            eprintln!("{why}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let mut seen = vec![FxHashSet::default(); options.formats.len()];
    let mut total = Tally::default();
    let mut seed = options.seed;
    while total.counted < options.states {
        for (format, seen) in options.formats.iter().zip(&mut seen) {
            let plan = Plan { sample_every: options.sample_every, ..Plan::varied(*format, seed) };
            let Found { tally, samples, violation } = run(&plan, seen);
            total += tally;
            let judged = samples.iter().try_for_each(referee::judge);
            if let Some(violation) = violation.or(judged.err()) {
                eprintln!("{} seed {seed}: {violation}", format.name());
                eprintln!("again: soak --states 1 --seed {seed} --format {}", format.name());
                return ExitCode::FAILURE;
            }
        }
        if seed < options.seed + 20 || seed.is_multiple_of(20) {
            println!("seed {seed}: {total:?}");
        }
        seed += 1;
    }
    println!("seeds {}..{seed}: {total:?}, no violation", options.seed);
    ExitCode::SUCCESS
}
