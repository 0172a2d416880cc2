//! Mistakes that can be planted, to prove that the tests of durability find them. Never made without the feature
//! `planted-faults`.

/// A mistake in the order of writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The live slice is written instead of its copy: it may name payloads that sync 1 does not cover.
    LiveSlice,
    /// L2 slices are evicted between copy and write: reloaded, the disk's old entries come back.
    EvictedCopy,
    /// L1 entries are written by the round after the one that answers.
    LateL1,
    /// L2 slices are copied before L1 slices: an L1 copy may name a table that was not copied.
    L2CopiedFirst,
    /// No sync between payloads and the entries that name them.
    NoFirstSync,
    /// No mark *need check* where entries are not ordered behind payloads.
    NoNeedCheck,
    /// The mark *need check* is set, but not stable before the first allocating write.
    UnsyncedNeedCheck,
    /// The mark *need check* is cleared before what it covers was synced.
    EarlyClean,
    /// A partial last cluster is kept and handed out with what is in it.
    PartialClusterKept,
    /// A cluster is used again before what unmapped it is stable.
    EarlyReuse,
    /// The backing file's name is dropped without a sync before.
    UnsyncedDropBacking,
    /// An entry is set before its record is in the journal.
    RecordAfterEntry,
    /// Records are dropped after the first sync of a round.
    RecordsDroppedAtSync1,
    /// Records are dropped that came after the round has copied.
    RecordsDroppedPastMark,
    /// What is populated has no record.
    PopulateUnrecorded,
    /// A table that is made has no record.
    TableUnrecorded,
    /// The journal is replayed without asking whether somebody else has written to the image.
    ReplayedUnasked,
    /// What was not recorded is acknowledged without a round.
    OwedUnpaid,
}

#[cfg(feature = "planted-faults")]
impl Fault {
    /// Those of the journal, which a crash alone does not show: a process has to die before.
    pub const OF_JOURNAL: [Fault; 7] = [
        Fault::RecordAfterEntry,
        Fault::RecordsDroppedAtSync1,
        Fault::RecordsDroppedPastMark,
        Fault::PopulateUnrecorded,
        Fault::TableUnrecorded,
        Fault::ReplayedUnasked,
        Fault::OwedUnpaid,
    ];

    /// All others.
    pub const ALL: [Fault; 11] = [
        Fault::LiveSlice,
        Fault::EvictedCopy,
        Fault::LateL1,
        Fault::L2CopiedFirst,
        Fault::NoFirstSync,
        Fault::NoNeedCheck,
        Fault::UnsyncedNeedCheck,
        Fault::EarlyClean,
        Fault::PartialClusterKept,
        Fault::EarlyReuse,
        Fault::UnsyncedDropBacking,
    ];
}
