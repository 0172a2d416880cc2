//! Streaming as a state machine over the image: where next, is there more.
//!
//! *Allocated = done* is read from the image, so a cursor has nothing to save: a new one skips what is there.

use std::collections::VecDeque;

use infill_base::{Ctx, ErrorKind, ExtentKind, IoError, IoResult, align_down, align_up};

use super::chain_extents;
use crate::NodeHandle;

/// How much of the disk is mapped at a time, in bytes.
const MAP_STRIDE_BYTES: u64 = 256 << 20;

/// A piece of work for a fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillPiece {
    /// Fetch these bytes and populate with them.
    Copy {
        /// First byte, a multiple of the populate unit.
        at: u64,
        /// Length in bytes, a multiple of the populate unit but for the end of the disk.
        len: u64,
    },
    /// These bytes read as zeroes below. Only told to a cursor that keeps something below.
    Zero {
        /// First byte, a multiple of the populate unit.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// A walk over everything that is absent in an overlay and not zero below.
#[derive(Debug)]
pub struct StreamCursor {
    node: NodeHandle,
    next: u64,
    end: u64,
    /// Whether something stays below, so that zeroes must be said above.
    tell_zeroes: bool,
    pending: VecDeque<FillPiece>,
    skipped_bytes: u64,
}

impl StreamCursor {
    /// A walk over the whole of `node`.
    pub fn new(node: &NodeHandle, tell_zeroes: bool) -> StreamCursor {
        let (node, end) = (node.clone(), node.len());
        StreamCursor { node, next: 0, end, tell_zeroes, pending: VecDeque::new(), skipped_bytes: 0 }
    }

    /// Bytes up to which everything was given out or skipped.
    pub fn position(&self) -> u64 {
        match self.pending.front() {
            Some(FillPiece::Copy { at, .. } | FillPiece::Zero { at, .. }) => *at,
            None => self.next,
        }
    }

    /// Bytes that needed no work so far: present already, or zero below.
    pub fn skipped_bytes(&self) -> u64 {
        self.skipped_bytes
    }

    /// The next piece, of at most `max` bytes (rounded up to one populate unit); `None` at the end.
    pub async fn next(&mut self, cx: &Ctx, max: u64) -> IoResult<Option<FillPiece>> {
        while self.pending.is_empty() && self.next < self.end {
            self.map_stride(cx).await?;
        }
        let Some(piece) = self.pending.pop_front() else { return Ok(None) };
        let FillPiece::Copy { at, len } = piece else { return Ok(Some(piece)) };
        let max = align_down(max, self.node.populate_unit()).max(self.node.populate_unit());
        if len > max {
            self.pending.push_front(FillPiece::Copy { at: at + max, len: len - max });
        }
        Ok(Some(FillPiece::Copy { at, len: len.min(max) }))
    }

    async fn map_stride(&mut self, cx: &Ctx) -> IoResult<()> {
        let stride = (self.end - self.next).min(MAP_STRIDE_BYTES);
        let own = self.node.extents(cx, self.next, stride).await?;
        let Some(last) = own.last() else {
            return Err(IoError::new(ErrorKind::Io, "the overlay gave no extents").at(self.next, stride));
        };
        let (from, to) = (self.next, last.end());
        let below = self.node.backing().and_then(|slot| slot.node());
        let mut work = 0;
        for extent in own.iter().filter(|extent| extent.kind == ExtentKind::Absent) {
            let inside_end = below.as_ref().map_or(0, |node| node.len()).clamp(extent.start, extent.end());
            if let Some(below) = &below
                && inside_end > extent.start
            {
                let runs = chain_extents(below, cx, extent.start, inside_end - extent.start).await?;
                work += self.plan(
                    extent.start,
                    extent.end(),
                    runs.iter().map(|run| (run.start, run.end(), run.kind)),
                );
            } else {
                work += self.plan(extent.start, extent.end(), std::iter::empty());
            }
        }
        self.skipped_bytes += (to - from) - work;
        self.next = to;
        Ok(())
    }

    /// Turns the runs below one absent run into pieces of whole units; returns how many bytes of work that is.
    fn plan(&mut self, start: u64, end: u64, below: impl Iterator<Item = (u64, u64, ExtentKind)>) -> u64 {
        let unit = self.node.populate_unit();
        let (mut planned_to, mut work) = (start, 0);
        for (from, to, _) in below.filter(|(_, _, kind)| *kind == ExtentKind::Data) {
            let from = align_down(from, unit).max(planned_to);
            let to = align_up(to, unit).min(end);
            if from >= to {
                continue;
            }
            work += self.plan_zero(planned_to, from);
            match self.pending.back_mut() {
                Some(FillPiece::Copy { at, len }) if *at + *len == from => *len += to - from,
                _ => self.pending.push_back(FillPiece::Copy { at: from, len: to - from }),
            }
            work += to - from;
            planned_to = to;
        }
        work + self.plan_zero(planned_to, end)
    }

    fn plan_zero(&mut self, start: u64, end: u64) -> u64 {
        if !self.tell_zeroes || start >= end {
            return 0;
        }
        self.pending.push_back(FillPiece::Zero { at: start, len: end - start });
        end - start
    }
}
