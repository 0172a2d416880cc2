//! Every mistake that can be planted into the qcow2 driver is found by the crash proof, and is not seen where it is not.

#[macro_use]
mod faults;

use infill_conformance::{Format, Qcow2Shape};
use infill_qcow2::Fault;

/// Geometries in which faults are looked for, in turn: small clusters, and ones with subclusters.
const FORMATS: [Format; 3] = [Format::QCOW2_4K, Format::QCOW2_SUBCLUSTERS_16K, Format::QCOW2_512];

fn planted(fault: Fault, seed: u64) -> Format {
    let Format::Qcow2(shape) = FORMATS[seed as usize % FORMATS.len()] else { unreachable!("qcow2 all") };
    Format::Qcow2(Qcow2Shape { fault: Some(fault), ..shape })
}

found! {
    planted,
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
