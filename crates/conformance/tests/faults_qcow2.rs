//! Every mistake that can be planted into the qcow2 driver is found by the crash proof, and is not seen where it is not.

use infill_conformance::crash::{Plan, run_all};
use infill_conformance::{Format, Qcow2Shape};
use infill_qcow2::Fault;

/// Seeds that are tried for a fault.
const SEEDS_MAX: u64 = 60;

/// Geometries in which faults are looked for, in turn: small clusters, and ones with subclusters.
const FORMATS: [Format; 3] = [Format::QCOW2_4K, Format::QCOW2_SUBCLUSTERS_16K, Format::QCOW2_512];

#[track_caller]
fn is_found(fault: Fault) {
    for seed in 1..=SEEDS_MAX {
        let Format::Qcow2(shape) = FORMATS[seed as usize % FORMATS.len()] else { unreachable!("qcow2 all") };
        let plan = Plan::short(Format::Qcow2(Qcow2Shape { fault: Some(fault), ..shape }), seed);
        if let Some(violation) = run_all([plan.clone()]).violation {
            println!("{fault:?} is found with seed {seed}: {violation}");
            let without = run_all([Plan { format: Format::Qcow2(shape), ..plan }]);
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
    the_live_slice_written_instead_of_its_copy: LiveSliceWritten,
    l1_after_the_acknowledgement: TableAfterAck,
    a_refcount_that_falls_in_the_round_of_its_unmapping: RefcountFallsInRound,
    a_payload_unsynced_before_its_entry: PayloadUnsynced,
    a_cluster_reused_before_sync_2: ReusedBeforeSync2,
    two_writes_of_one_slice_in_flight: TwoWritesOfOneSlice,
    the_header_rewritten_as_a_whole: HeaderRewrittenWhole,
    a_slice_evicted_between_copy_and_write: SliceEvictedBeforeWrite,
    a_cluster_unmapped_after_its_copy_and_freed_by_that_round: FreedByRoundThatCopied,
    a_larger_l1_copied_from_the_cache: LargerL1FromCache,
}
