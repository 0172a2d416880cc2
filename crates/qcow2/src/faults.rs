//! Mistakes in the order of writes, one for each that a crash test must be able to find (feature `planted-faults`).
//!
//! Without the feature no image has one, and the branches are not there.

/// A mistake that an image makes on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// A round writes slices as they are by then, not as they were copied.
    LiveSliceWritten,
    /// A round answers before its L1 sectors are written.
    TableAfterAck,
    /// Refcounts of unmapped clusters fall in the round that unmaps them.
    RefcountFallsInRound,
    /// A round writes entries without syncing the payload that they name.
    PayloadUnsynced,
    /// A cluster may be reused as soon as it is unmapped.
    ReusedBeforeSync2,
    /// A second write of a slice is in flight beside the round's.
    TwoWritesOfOneSlice,
    /// A header change rewrites the header and its extensions as a whole.
    HeaderRewrittenWhole,
    /// A slice leaves the cache between its copy and the write of it.
    SliceEvictedBeforeWrite,
    /// A cluster that is unmapped after its slice was copied is freed by that round.
    FreedByRoundThatCopied,
    /// A larger L1 table is written from the cache, not from what is on the disk.
    LargerL1FromCache,
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
    /// The disk changes before the marks of its bitmaps are stable.
    BitmapsMarkUnsynced,
    /// The header says that bitmaps are right before their refcounts are stable.
    BitmapsListedFirst,
}

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

    /// Those of bitmaps, which an image without any does not show.
    pub const OF_BITMAPS: [Fault; 2] = [Fault::BitmapsMarkUnsynced, Fault::BitmapsListedFirst];

    /// All others.
    pub const ALL: [Fault; 10] = [
        Fault::LiveSliceWritten,
        Fault::TableAfterAck,
        Fault::RefcountFallsInRound,
        Fault::PayloadUnsynced,
        Fault::ReusedBeforeSync2,
        Fault::TwoWritesOfOneSlice,
        Fault::HeaderRewrittenWhole,
        Fault::SliceEvictedBeforeWrite,
        Fault::FreedByRoundThatCopied,
        Fault::LargerL1FromCache,
    ];
}
