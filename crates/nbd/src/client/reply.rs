//! How far the answer to one request has come. Knows no connection: what a reply may contain is decided here.

use infill_base::{Extent, ExtentKind, Extents, push_extent};

use super::shared::{Answer, Op, Request};
use crate::proto::{ProtocolError, STATE_ZERO, StatusExtent};

/// Most runs, not joined, of one read's content. (A server that answers in order has one.)
const RUNS_MAX: usize = 4096;
/// Most error chunks of one reply.
const ERRORS_MAX: usize = 64;
/// Most extents of one answer that are used; the asker asks again behind them.
const EXTENTS_MAX: usize = 64 << 10;

/// How far an answer has come.
#[derive(Debug)]
pub(super) struct Progress {
    cookie: u64,
    payload: u64,
    /// Length that was asked for, in bytes.
    asked: u64,
    /// Content that has come: start and end inside the request, ascending, joined.
    covered: Vec<(u64, u64)>,
    extents: Option<Extents>,
    error: Option<(u32, String)>,
    errors: usize,
}

/// The outcome of a request.
#[derive(Debug)]
pub(super) enum Done {
    Answer(Answer),
    /// The server's error number, and what it says of it.
    Error {
        error: u32,
        message: String,
    },
}

fn malformed(what: &'static str) -> ProtocolError {
    ProtocolError::Malformed { what }
}

impl Progress {
    /// A request that is sent now, and asks for `asked` bytes.
    pub(super) fn new(cookie: u64, request: &Request, asked: u64) -> Progress {
        Progress {
            cookie,
            payload: request.op.payload(),
            asked,
            covered: Vec::new(),
            extents: None,
            error: None,
            errors: 0,
        }
    }

    pub(super) fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Bytes that travel for it.
    pub(super) fn payload(&self) -> u64 {
        self.payload
    }

    /// Content of `len` bytes at `offset` comes. Gives where in the request's buffer it belongs.
    pub(super) fn content(
        &mut self,
        at: u64,
        op: &Op,
        offset: u64,
        len: u64,
    ) -> Result<usize, ProtocolError> {
        if !matches!(op, Op::Read(_)) {
            return Err(malformed("content for a request that is not a read"));
        }
        let start = offset.checked_sub(at);
        let end = start.and_then(|start| start.checked_add(len)).filter(|end| *end <= op.len());
        let (Some(start), Some(end)) = (start, end) else {
            return Err(malformed("content that was not asked for"));
        };
        let next = self.covered.partition_point(|(_, covered_end)| *covered_end < start);
        // Everything before `next` ends before `start`; `next` may touch it.
        let mut run = (start, end);
        let mut upto = next;
        while let Some(other) = self.covered.get(upto).filter(|other| other.0 <= end) {
            if other.1.min(end) > other.0.max(start) {
                return Err(malformed("the same content twice"));
            }
            run = (run.0.min(other.0), run.1.max(other.1));
            upto += 1;
        }
        self.covered.splice(next..upto, [run]);
        if self.covered.len() > RUNS_MAX {
            return Err(malformed("content in too many pieces"));
        }
        Ok(start as usize)
    }

    /// What `base:allocation` says of the range comes.
    pub(super) fn status(&mut self, at: u64, op: &Op, runs: &[StatusExtent]) -> Result<(), ProtocolError> {
        if !matches!(op, Op::Status { .. }) {
            return Err(malformed("a block status that was not asked for"));
        }
        if self.extents.is_some() {
            return Err(malformed("the same block status twice"));
        }
        let mut extents = Extents::new();
        let mut done = 0;
        for run in runs.iter().take(EXTENTS_MAX) {
            if done == self.asked {
                break;
            }
            // The last one may reach behind what was asked for.
            let len = run.len.min(self.asked - done);
            // A hole alone says nothing about content.
            let kind = if run.flags & STATE_ZERO != 0 { ExtentKind::Zero } else { ExtentKind::Data };
            let start = at + done;
            let host = (kind == ExtentKind::Data).then_some(start);
            push_extent(&mut extents, Extent { host, ..Extent::new(start, len, kind) });
            done += len;
        }
        self.extents = Some(extents);
        Ok(())
    }

    /// The server says that the request failed. The first error counts.
    pub(super) fn error(&mut self, error: u32, message: String) -> Result<(), ProtocolError> {
        self.errors += 1;
        if self.errors > ERRORS_MAX {
            return Err(malformed("a reply with errors without end"));
        }
        self.error.get_or_insert((error, message));
        Ok(())
    }

    /// The last message came.
    pub(super) fn end(&mut self, op: &mut Op) -> Result<Done, ProtocolError> {
        if let Some((error, message)) = self.error.take() {
            return Ok(Done::Error { error, message });
        }
        let answer = match op {
            Op::Read(buf) => {
                if self.covered != [(0, buf.len() as u64)] {
                    return Err(malformed("a read was answered without all of its content"));
                }
                Answer::Data(std::mem::take(buf))
            }
            Op::Status { .. } => match self.extents.take() {
                Some(extents) => Answer::Extents(extents),
                None => return Err(malformed("a block status was answered without one")),
            },
            Op::Write { .. } | Op::Zeroes { .. } | Op::Discard { .. } | Op::Flush { .. } => Answer::Done,
        };
        Ok(Done::Answer(answer))
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;

    use super::*;

    fn progress(op: Op) -> (Progress, Op) {
        let request = Request { op, at: 1000, slot: None, order: None, room: 0 };
        (Progress::new(1, &request, request.op.len()), request.op)
    }

    #[test]
    fn content_may_come_in_any_order_but_once_and_whole() {
        let (mut progress, mut op) = progress(Op::Read(BytesMut::zeroed(100)));
        for (offset, len) in [(1090, 10), (1000, 10), (1050, 40)] {
            assert_eq!(progress.content(1000, &op, offset, len).unwrap(), offset as usize - 1000);
        }
        for (offset, len) in
            [(1009, 1), (1000, 11), (1089, 2), (1040, 60), (999, 1), (1099, 2), (u64::MAX, 2)]
        {
            assert!(progress.content(1000, &op, offset, len).is_err(), "{offset} {len}");
        }
        assert!(progress.end(&mut op).is_err(), "40 bytes are missing");
        progress.content(1000, &op, 1010, 40).unwrap();
        assert!(matches!(progress.end(&mut op), Ok(Done::Answer(Answer::Data(data))) if data.len() == 100));
    }

    #[test]
    fn only_zero_counts_as_zero_and_the_last_extent_is_cut() {
        let (mut progress, mut op) = progress(Op::Status { len: 100 });
        let runs = [(10, 1), (20, 3), (30, 2), (u64::MAX, 0), (5, 0)];
        let runs: Vec<_> = runs.into_iter().map(|(len, flags)| StatusExtent { len, flags }).collect();
        progress.status(1000, &op, &runs).unwrap();
        assert!(progress.status(1000, &op, &runs).is_err());
        let Ok(Done::Answer(Answer::Extents(extents))) = progress.end(&mut op) else { panic!() };
        let seen: Vec<_> = extents.iter().map(|extent| (extent.start, extent.len, extent.kind)).collect();
        use ExtentKind::{Data, Zero};
        assert_eq!(seen, [(1000, 10, Data), (1010, 50, Zero), (1060, 40, Data)]);
    }

    #[test]
    fn an_answer_that_does_not_fit_its_request_is_an_error() {
        let (mut progress, mut op) = progress(Op::Flush { mark: 0 });
        assert!(progress.content(1000, &op, 1000, 1).is_err());
        assert!(progress.status(1000, &op, &[]).is_err());
        for _ in 0..ERRORS_MAX {
            progress.error(5, String::new()).unwrap();
        }
        assert!(progress.error(5, String::new()).is_err());
        assert!(matches!(progress.end(&mut op), Ok(Done::Error { error: 5, .. })));
    }
}
