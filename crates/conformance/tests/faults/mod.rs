//! What the tests of planted faults share: a test for each fault, and one that none is left out.

use infill_conformance::Format;
use infill_conformance::crash::{Plan, run_all};

/// Seeds that are tried for a fault.
const SEEDS_MAX: u64 = 60;

/// Asserts that the crash proof finds what is wrong with the formats that `planted` gives for seeds, and finds nothing
/// where it is not planted.
#[track_caller]
pub fn is_found(planted: impl Fn(u64) -> Format) {
    for seed in 1..=SEEDS_MAX {
        let plan = Plan::short(planted(seed), seed);
        let (format, sound) = (plan.format, plan.format.sound());
        if let Some(violation) = run_all([plan.clone()]).violation {
            println!("{} is found with seed {seed}: {violation}", format.name());
            let without = run_all([Plan { format: sound, ..plan }]);
            assert!(without.violation.is_none(), "without it: {:?}", without.violation);
            return;
        }
    }
    panic!("{} is not found with {SEEDS_MAX} seeds", planted(1).name());
}

/// A test for each fault of the `Fault` in scope, by `planted(fault, seed)`, which gives a format with it.
macro_rules! found {
    ($planted:ident, $($name:ident: $fault:ident,)*) => {
        $(#[test]
        fn $name() {
            faults::is_found(|seed| $planted(Fault::$fault, seed));
        })*

        #[test]
        fn no_fault_is_left_out() {
            let tested = [$(Fault::$fault),*];
            assert!(Fault::ALL.iter().all(|fault| tested.contains(fault)), "{:?}", Fault::ALL);
        }
    };
}
