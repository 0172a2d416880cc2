//! Every mistake that can be planted into what the drivers make of the journal is found by the deaths of a process. That it
//! is not seen where it is not, is what `death.rs` tells of the same runs.

use infill_conformance::crash::{Outlived, Plan, run_all};
use infill_conformance::{Format, Qcow2Shape, QedShape};

/// Seeds that are tried for a fault.
const SEEDS_MAX: u64 = 12;

/// Room for records that no run needs.
const ROOM: u64 = 4096;

#[track_caller]
fn is_found(name: &str, with: Format) {
    // What finds no room is owed, and nothing else.
    let outlived = if name == "OwedUnpaid" { Outlived::WriteThrough } else { Outlived::Journal(ROOM) };
    let plans = (1..=SEEDS_MAX).map(|seed| Plan::deadly(with, outlived, seed));
    let violation =
        run_all(plans).violation.unwrap_or_else(|| panic!("{name} is not found with {SEEDS_MAX} seeds"));
    println!("{name} is found: {violation}");
}

#[test]
fn every_mistake_of_qcow2_with_its_journal() {
    for fault in infill_qcow2::Fault::OF_JOURNAL {
        let Format::Qcow2(shape) = Format::QCOW2_4K else { unreachable!("qcow2") };
        let shape = Qcow2Shape { fault: Some(fault), ..shape };
        is_found(&format!("{fault:?}"), Format::Qcow2(shape));
    }
}

#[test]
fn every_mistake_of_qed_with_its_journal() {
    for fault in infill_qed::Fault::OF_JOURNAL {
        let Format::Qed(shape) = Format::QED else { unreachable!("QED") };
        let shape = QedShape { fault: Some(fault), ..shape };
        is_found(&format!("{fault:?}"), Format::Qed(shape));
    }
}
