//! Every mistake that can be planted into the QED driver is found by the crash proof, and is not seen where it is not.

use infill_conformance::crash::{Plan, run_all};
use infill_conformance::{Format, QedShape};
use infill_qed::Fault;

/// Seeds that are tried for a fault.
const SEEDS_MAX: u64 = 60;

#[track_caller]
fn is_found(fault: Fault) {
    let Format::Qed(shape) = Format::QED else { unreachable!("QED is QED") };
    let format = Format::Qed(QedShape { fault: Some(fault), ..shape });
    for seed in 1..=SEEDS_MAX {
        let plan = Plan::short(format, seed);
        if let Some(violation) = run_all([plan.clone()]).violation {
            println!("{fault:?} is found with seed {seed}: {violation}");
            let without = run_all([Plan { format: Format::QED, ..plan }]);
            assert!(without.violation.is_none(), "without it: {:?}", without.violation);
            return;
        }
    }
    panic!("{fault:?} is not found with {SEEDS_MAX} seeds");
}

macro_rules! found {
    ($($name:ident: $fault:ident,)*) => {
        $(#[test]
        fn $name() {
            is_found(Fault::$fault);
        })*

        #[test]
        fn no_fault_is_left_out() {
            let tested = [$(Fault::$fault),*];
            assert!(Fault::ALL.iter().all(|fault| tested.contains(fault)), "{:?}", Fault::ALL);
        }
    };
}

found! {
    the_live_slice_written_instead_of_its_copy: LiveSlice,
    a_slice_evicted_between_copy_and_write: EvictedCopy,
    l1_after_the_acknowledgement: LateL1,
    l2_copied_before_l1: L2CopiedFirst,
    a_payload_unsynced_before_its_entry: NoFirstSync,
    no_mark_where_nothing_is_ordered: NoNeedCheck,
    a_mark_that_is_not_stable: UnsyncedNeedCheck,
    a_mark_cleared_too_early: EarlyClean,
    a_partial_last_cluster_kept: PartialClusterKept,
    a_cluster_reused_too_early: EarlyReuse,
    the_backing_dropped_without_a_sync: UnsyncedDropBacking,
}
