//! Every node does what a node does, alone and over every base.

use infill_conformance::Format;
use infill_conformance::node_suite::{Subject, run};
use infill_conformance::stack::{Below, Top};

#[test]
fn memory_over_every_base() {
    for unit in [512, 4096, 65536] {
        for below in [Below::Nothing, Below::Raw, Below::Shorter, Below::Longer] {
            run(Subject::new(Top::Memory(unit), below), 1..4);
        }
    }
}

#[test]
fn raw() {
    run(Subject::new(Top::Image(Format::Raw), Below::Nothing), 1..8);
}
