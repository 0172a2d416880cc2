//! Faults that a test asks for (`blkdebug`): which requests fail, with what, and after what has happened.

/// What has happened on the node that injects faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultEvent {
    /// The node was opened.
    None,
    /// A read comes.
    ReadAio,
    /// A write of data comes.
    WriteAio,
    /// Data is about to be written.
    Pwritev,
    /// Zeroes are about to be written.
    PwritevZero,
    /// A write of either has been done.
    PwritevDone,
    /// A sync comes.
    FlushToOs,
    /// What was written is about to be synced.
    FlushToDisk,
}

/// Kinds of requests that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultyRequest {
    /// Reads.
    Read,
    /// Writes of data.
    Write,
    /// Writes of zeroes.
    WriteZeroes,
    /// Discards.
    Discard,
    /// Syncs.
    Flush,
}

/// From an event on, requests fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InjectError {
    /// When it begins. It lasts until an event lets others begin.
    pub event: FaultEvent,
    /// The state in which that counts; 0: any.
    pub state: i64,
    /// Which requests; `None`: any.
    pub request: Option<FaultyRequest>,
    /// What they are told, as Linux numbers it; 0: they do not fail.
    pub errno: i32,
    /// Only those that touch this sector (of 512 bytes).
    pub sector: Option<u64>,
    /// Only the first one.
    pub once: bool,
}

/// An event leads to another state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetState {
    /// The event.
    pub event: FaultEvent,
    /// The state in which that counts; 0: any.
    pub state: i64,
    /// The state afterwards.
    pub new_state: i64,
}
