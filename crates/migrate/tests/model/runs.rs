//! What is explored: bounds with a name, for the test every day and for runs that go deeper.

use infill_migrate::Fault;

use super::world::Bounds;

/// Two offers, a withdraw between them, hand-back, aborts at either side, a crash of each.
const CONTROL: Bounds = Bounds {
    name: "control",
    source_crashes: 1,
    target_crashes: 1,
    freezes: 2,
    old_requests: 1,
    aborts: 1,
    ..Bounds::NONE
};

/// One offer and the way back, with a write that may be in the way, and operations that fail.
const HAND_BACK: Bounds = Bounds { name: "hand-back", writes: 1, failures: 1, freezes: 1, ..CONTROL };

/// A witness decides.
const WITNESS: Bounds = Bounds { name: "witness", witness: true, aborts: 0, ..CONTROL };

/// Warming in two rounds, residual, streaming: nobody dies.
const DATA: Bounds = Bounds { name: "data", writes: 2, warms: 1, rounds: 1, ..Bounds::NONE };

/// Bitmaps that die with the source, and a second life of them.
const BITMAPS: Bounds = Bounds { name: "bitmaps", writes: 1, warms: 2, source_crashes: 1, ..Bounds::NONE };

/// A withdraw in the middle, and what was warmed before it.
const WITHDRAWN: Bounds = Bounds { name: "withdrawn", writes: 1, freezes: 2, warms: 1, ..Bounds::NONE };

/// Two disks of one machine in one record.
const TWO_DISKS: Bounds = Bounds {
    name: "two-disks",
    disks: 2,
    writes: 1,
    warms: 1,
    source_crashes: 1,
    old_requests: 1,
    ..Bounds::NONE
};

/// Operators who declare a peer dead that comes back later.
const FORCED: Bounds = Bounds {
    name: "forced",
    writes: 1,
    source_crashes: 1,
    target_crashes: 1,
    old_requests: 1,
    forces: 1,
    ..Bounds::NONE
};

/// The same with a witness.
const FORCED_WITNESS: Bounds = Bounds { name: "forced-witness", witness: true, writes: 0, ..FORCED };

/// All of them, each small enough to be explored whole.
pub const RUNS: [Bounds; 9] =
    [CONTROL, HAND_BACK, WITNESS, DATA, BITMAPS, WITHDRAWN, TWO_DISKS, FORCED, FORCED_WITNESS];

/// For each mistake the run in which it is found.
pub fn planted(fault: Fault) -> Bounds {
    let run = match fault {
        Fault::StartsBeforeConfirm
        | Fault::ConfirmsBeforeSync
        | Fault::FenceAfterHandover
        | Fault::ThawsBeforeRecord => CONTROL,
        Fault::ForgetsLetThrough | Fault::GrantsAfterWrite => HAND_BACK,
        Fault::TermUsedAgain | Fault::AcceptsOlderOffer => WITHDRAWN,
        Fault::LinksAfterDemotion | Fault::DirtyBeforeLanded | Fault::DropsUnappliedRound => DATA,
        Fault::KeepsForeignWarm => BITMAPS,
        Fault::WithdrawsWithoutWitness => WITNESS,
        Fault::OpensUnasked => FORCED,
    };
    Bounds { fault: Some(fault), ..run }
}

/// Two disks of one machine, each with a record of its own.
pub const TWO_RECORDS: Bounds =
    Bounds { name: "two-records", disks: 2, record_per_disk: true, freezes: 2, ..Bounds::NONE };
