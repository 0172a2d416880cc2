//! Every mistake that can be planted into the QED driver is found by the crash proof, and is not seen where it is not.

#[macro_use]
mod faults;

use infill_conformance::{Format, QedShape};
use infill_qed::Fault;

fn planted(fault: Fault, _seed: u64) -> Format {
    let Format::Qed(shape) = Format::QED else { unreachable!("QED is QED") };
    Format::Qed(QedShape { fault: Some(fault), ..shape })
}

found! {
    planted,
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
