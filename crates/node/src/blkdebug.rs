//! The blkdebug filter: requests fail as a test asks for it.
//!
//! Rules follow events that this node sees itself. An event that lets errors begin ends those that began before; they then meet
//! every request that they are for until the next such event. A format above raises no events of its own here: what it reads
//! and writes of its metadata counts like data.

use bytes::BytesMut;
use infill_base::{
    Ctx, ErrorKind, FaultEvent, FaultyRequest, Gather, InjectError, IoError, IoResult, Limits, SetState,
    WriteFlags, ZeroFlags,
};
use infill_storage::sync::{Mutex, lock};

use crate::edge::Through as _;
use crate::{Edge, Filter, NodeHandle};

/// Length of the sectors that rules name, in bytes.
const SECTOR_BYTES: u64 = 512;
/// The state at first.
const FIRST_STATE: i64 = 1;

#[derive(Debug)]
struct Rules {
    state: i64,
    /// Each with whether it can still begin.
    errors: Vec<(InjectError, bool)>,
    states: Vec<SetState>,
    /// Which of the errors meet requests now.
    active: Vec<usize>,
}

impl Rules {
    fn raise(&mut self, event: FaultEvent) {
        let counts = |on: FaultEvent, state: i64| on == event && (state == 0 || state == self.state);
        let begin: Vec<usize> = (0..self.errors.len())
            .filter(|at| {
                let (rule, is_left) = &self.errors[*at];
                *is_left && counts(rule.event, rule.state)
            })
            .collect();
        let state = self.states.iter().rev().find(|rule| counts(rule.event, rule.state));
        self.state = state.map_or(self.state, |rule| rule.new_state);
        if !begin.is_empty() {
            self.active = begin;
        }
    }

    /// What a request is told.
    fn meet(&mut self, request: FaultyRequest, at: u64, len: u64) -> Option<i32> {
        let meets = |rule: &InjectError| {
            let touches = |sector: u64| {
                let byte = sector.saturating_mul(SECTOR_BYTES);
                byte >= at && byte - at < len
            };
            rule.request.is_none_or(|only| only == request) && rule.sector.is_none_or(touches)
        };
        let found = self.active.iter().position(|at| meets(&self.errors[*at].0))?;
        let at = self.active[found];
        let InjectError { errno, once, .. } = self.errors[at].0;
        if errno == 0 {
            return None;
        }
        if once {
            self.active.remove(found);
            self.errors[at].1 = false;
        }
        Some(errno)
    }
}

/// Passes everything on to one node, but for what its rules let fail.
#[derive(Debug)]
pub struct BlkdebugNode {
    below: Edge,
    rules: Mutex<Rules>,
    align: u32,
    max_transfer: Option<u64>,
}

impl BlkdebugNode {
    /// Over `below`.
    pub fn new(below: NodeHandle, errors: Vec<InjectError>, states: Vec<SetState>) -> BlkdebugNode {
        let errors = errors.into_iter().map(|rule| (rule, true)).collect();
        let mut rules = Rules { state: FIRST_STATE, errors, states, active: Vec::new() };
        rules.raise(FaultEvent::None);
        BlkdebugNode { below: Edge::new(below), rules: Mutex::new(rules), align: 1, max_transfer: None }
    }

    /// It wants requests in multiples of `align` bytes (a power of two), and no larger than `max_transfer`.
    pub fn wanting(self, align: u32, max_transfer: Option<u64>) -> BlkdebugNode {
        BlkdebugNode { align, max_transfer, ..self }
    }

    /// Raises what a request of that kind raises, and fails it if it is to fail.
    fn meet(&self, events: &[FaultEvent], request: FaultyRequest, at: u64, len: u64) -> IoResult<()> {
        let align = u64::from(self.align);
        if !at.is_multiple_of(align) || !len.is_multiple_of(align) {
            let why = format!("requests must be multiples of {align} bytes here");
            return Err(IoError::new(ErrorKind::InvalidInput, why).at(at, len));
        }
        let mut rules = lock(&self.rules);
        events.iter().for_each(|event| rules.raise(*event));
        match rules.meet(request, at, len) {
            None => Ok(()),
            Some(errno) => {
                let why = format!("blkdebug was asked for this error ({errno})");
                Err(IoError::new(ErrorKind::from_errno(errno), why).at(at, len))
            }
        }
    }

    fn done(&self) {
        lock(&self.rules).raise(FaultEvent::PwritevDone);
    }
}

impl Filter for BlkdebugNode {
    const DRIVER: &'static str = "blkdebug";

    fn below(&self) -> &Edge {
        &self.below
    }

    fn limits(&self) -> Limits {
        let limits = self.below.node_limits();
        Limits {
            request_align: limits.request_align.max(self.align),
            max_transfer: self.max_transfer.map_or(limits.max_transfer, |most| most.min(limits.max_transfer)),
            ..limits
        }
    }

    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        self.meet(&[FaultEvent::ReadAio], FaultyRequest::Read, at, buf.len() as u64)?;
        self.below.read(cx, at, buf).await
    }

    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        let events = [FaultEvent::WriteAio, FaultEvent::Pwritev];
        self.meet(&events, FaultyRequest::Write, at, data.len() as u64)?;
        self.below.write(cx, at, data, flags).await?;
        self.done();
        Ok(())
    }

    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.meet(&[FaultEvent::PwritevZero], FaultyRequest::WriteZeroes, at, len)?;
        self.below.write_zeroes(cx, at, len, flags).await?;
        self.done();
        Ok(())
    }

    async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.meet(&[], FaultyRequest::Discard, at, len)?;
        self.below.discard(cx, at, len).await
    }

    async fn sync(&self, cx: &Ctx) -> IoResult<()> {
        self.meet(&[FaultEvent::FlushToOs, FaultEvent::FlushToDisk], FaultyRequest::Flush, 0, 0)?;
        self.below.sync(cx).await
    }
}

#[cfg(test)]
mod tests {
    use infill_sim::World;

    use super::*;
    use crate::MemoryOverlay;

    const ANY: InjectError =
        InjectError { event: FaultEvent::None, state: 0, request: None, errno: 5, sector: None, once: false };

    fn node(errors: Vec<InjectError>, states: Vec<SetState>) -> NodeHandle {
        let disk = NodeHandle::new(MemoryOverlay::new(64 << 10, 4096, None));
        NodeHandle::new(BlkdebugNode::new(disk, errors, states))
    }

    async fn read(node: &NodeHandle, at: u64) -> Result<(), ErrorKind> {
        node.read_vec(&Ctx::GUEST, at, 512).await.map(drop).map_err(|error| error.kind())
    }

    async fn write(node: &NodeHandle, at: u64) -> Result<(), ErrorKind> {
        let written = node.write(&Ctx::GUEST, at, vec![1; 512], WriteFlags::empty()).await;
        written.map_err(|error| error.kind())
    }

    #[test]
    fn only_what_a_rule_names_fails_and_what_fails_changes_nothing() {
        World::new(1).run(async {
            let rule = InjectError { request: Some(FaultyRequest::Write), sector: Some(3), errno: 28, ..ANY };
            let node = node(vec![rule], Vec::new());
            assert_eq!(write(&node, 1536).await, Err(ErrorKind::NoSpace));
            assert_eq!(write(&node, 1024).await, Ok(()));
            assert_eq!(read(&node, 1536).await, Ok(()));
            assert_eq!(node.read_vec(&Ctx::GUEST, 1536, 512).await.unwrap()[..], [0; 512]);
            assert!(node.sync(&Ctx::GUEST).await.is_ok());
        });
    }

    #[test]
    fn once_is_once_and_an_error_lasts_until_another_event_lets_errors_begin() {
        World::new(1).run(async {
            let once = node(vec![InjectError { once: true, ..ANY }], Vec::new());
            assert_eq!(read(&once, 0).await, Err(ErrorKind::Io));
            assert_eq!(read(&once, 0).await, Ok(()));
            let on_sync = InjectError { event: FaultEvent::FlushToDisk, ..ANY };
            let node = node(vec![on_sync], Vec::new());
            assert_eq!(read(&node, 0).await, Ok(()));
            assert!(node.sync(&Ctx::GUEST).await.is_err());
            assert_eq!(read(&node, 0).await, Err(ErrorKind::Io));
        });
    }

    #[test]
    fn a_rule_of_another_state_waits_for_it() {
        World::new(1).run(async {
            let rule = InjectError { event: FaultEvent::ReadAio, state: 2, ..ANY };
            let next = SetState { event: FaultEvent::Pwritev, state: 1, new_state: 2 };
            let node = node(vec![rule], vec![next]);
            assert_eq!(read(&node, 0).await, Ok(()));
            assert_eq!(write(&node, 0).await, Ok(()));
            assert_eq!(read(&node, 0).await, Err(ErrorKind::Io));
        });
    }

    #[test]
    fn what_it_wants_is_told_and_held_to() {
        World::new(1).run(async {
            let disk = NodeHandle::new(MemoryOverlay::new(64 << 10, 4096, None));
            let node =
                NodeHandle::new(BlkdebugNode::new(disk, Vec::new(), Vec::new()).wanting(4096, Some(8192)));
            assert_eq!((node.limits().request_align, node.limits().max_transfer), (4096, 8192));
            assert_eq!(read(&node, 512).await, Err(ErrorKind::InvalidInput));
        });
    }
}
