//! Every node does what a node does, alone and over every base.

use infill_conformance::Format;
use infill_conformance::node_suite::{Subject, run};
use infill_conformance::stack::{Below, Through, Top};

/// Everything that an overlay may lie on.
const BELOW: &[Below] = &[
    Below::Nothing,
    Below::Raw,
    Below::Image(Format::QCOW2_512),
    Below::Image(Format::QCOW2_SUBCLUSTERS_16K),
    Below::Image(Format::QED),
    Below::Nbd,
    Below::Shorter,
    Below::Longer,
];

fn over_every_base(top: Top, seeds: std::ops::Range<u64>) {
    for below in BELOW {
        run(Subject::new(top, *below), seeds.clone());
    }
}

#[test]
fn raw() {
    run(Subject::new(Top::Image(Format::Raw), Below::Nothing), 1..8);
}

#[test]
fn memory_over_every_base() {
    for unit in [512, 4096, 65536] {
        over_every_base(Top::Memory(unit), 1..3);
    }
}

#[test]
fn qed_over_every_base() {
    over_every_base(Top::Image(Format::QED), 1..4);
    over_every_base(Top::Image(Format::QED_64K), 1..3);
}

#[test]
fn qcow2_over_every_base() {
    over_every_base(Top::Image(Format::QCOW2_4K), 1..3);
    over_every_base(Top::Image(Format::QCOW2), 1..2);
    over_every_base(Top::Image(Format::QCOW2_512), 1..2);
}

#[test]
fn qcow2_with_subclusters_over_every_base() {
    over_every_base(Top::Image(Format::QCOW2_SUBCLUSTERS), 1..3);
    over_every_base(Top::Image(Format::QCOW2_SUBCLUSTERS_16K), 1..3);
}

#[test]
fn qcow2_version_2_over_every_base() {
    over_every_base(Top::Image(Format::QCOW2_V2), 1..3);
}

#[test]
fn images_take_any_bytes_on_a_storage_of_blocks() {
    for (format, align) in [
        (Format::QED, 4096),
        (Format::QED_64K, 512),
        (Format::QCOW2, 4096),
        (Format::QCOW2_V2, 512),
        (Format::QCOW2_SUBCLUSTERS, 2048),
        (Format::QCOW2_SUBCLUSTERS_16K, 512),
    ] {
        for below in [Below::Nothing, Below::Raw] {
            run(Subject { align, ..Subject::new(Top::Image(format), below) }, 1..3);
        }
    }
}

#[test]
fn what_a_filter_lets_through_is_what_its_node_does() {
    for through in [Through::CopyOnRead, Through::Throttle, Through::Blkdebug, Through::Compress] {
        let tops = [Format::QCOW2_4K, Format::QCOW2_SUBCLUSTERS_16K, Format::QED].map(Top::Image);
        for top in tops.into_iter().chain([Top::Memory(4096)]) {
            if through == Through::Compress && !matches!(top, Top::Image(Format::Qcow2(_))) {
                continue;
            }
            for below in [Below::Nothing, Below::Raw, Below::Nbd, Below::Shorter] {
                if through == Through::CopyOnRead && below == Below::Nothing {
                    continue;
                }
                run(Subject { through, ..Subject::new(top, below) }, 1..3);
            }
        }
    }
}
