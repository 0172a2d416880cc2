//! Streaming as a state machine over the image: where next, is there more.
//!
//! *Allocated = done* is read from the image, so a cursor has nothing to save: a new one skips what is there.

use std::collections::VecDeque;

use infill_base::{Ctx, ErrorKind, ExtentKind, IoError, IoResult, align_down, align_up};

use super::chain_map;
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

/// A walk over everything that is absent in an overlay and neither zero below nor left to a base.
#[derive(Debug)]
pub struct StreamCursor {
    node: NodeHandle,
    next: u64,
    end: u64,
    /// What stays below: zeroes above it must be said, and what only it holds is left alone.
    base: Option<NodeHandle>,
    tell_zeroes: bool,
    pending: VecDeque<FillPiece>,
    skipped_bytes: u64,
}

/// What a run below an absent one asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    Copy,
    Zero,
    Nothing,
}

impl StreamCursor {
    /// A walk over the whole of `node`.
    pub fn new(node: &NodeHandle, tell_zeroes: bool) -> StreamCursor {
        let (node, end) = (node.clone(), node.len());
        StreamCursor {
            node,
            next: 0,
            end,
            base: None,
            tell_zeroes,
            pending: VecDeque::new(),
            skipped_bytes: 0,
        }
    }

    /// A walk over what lies between `node` and `base`, a node somewhere below it that stays.
    pub fn above(node: &NodeHandle, base: NodeHandle) -> StreamCursor {
        StreamCursor { base: Some(base), ..StreamCursor::new(node, true) }
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

    /// The next piece, of at most `max` bytes (rounded up to one populate unit); `None` at the end. What was written or
    /// populated since it was mapped is left out.
    pub async fn next(&mut self, cx: &Ctx, max: u64) -> IoResult<Option<FillPiece>> {
        let unit = self.node.populate_unit();
        let max = align_down(max, unit).max(unit);
        loop {
            while self.pending.is_empty() && self.next < self.end {
                self.map_stride(cx).await?;
            }
            let Some(&FillPiece::Copy { at, len }) = self.pending.front() else {
                return Ok(self.pending.pop_front());
            };
            let (len, rest) = (len.min(max), len.saturating_sub(max));
            let (skipped, missing) = self.still_absent(cx, at, len).await?;
            // Nothing is waited for from here on: dropped before, it has changed nothing.
            self.pending.pop_front();
            self.skipped_bytes += skipped;
            let left = len - skipped - missing + rest;
            if left > 0 {
                self.pending.push_front(FillPiece::Copy { at: at + skipped + missing, len: left });
            }
            if missing > 0 {
                return Ok(Some(FillPiece::Copy { at: at + skipped, len: missing }));
            }
        }
    }

    /// A piece that was given out last of those that are not worked on: it is given out again, as it is then.
    pub fn put_back(&mut self, piece: FillPiece) {
        self.pending.push_front(piece);
    }

    /// Of `[at, at + len)`: how many bytes at its beginning are not absent any more, and how many after them are; whole units.
    async fn still_absent(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<(u64, u64)> {
        let (unit, end) = (self.node.populate_unit(), at + len);
        let own = self.node.extents(cx, at, len).await?;
        let covered = own.last().map_or(at, |last| last.end().min(end));
        let mut absent = own.iter().filter(|extent| extent.kind == ExtentKind::Absent);
        let Some(first) = absent.next() else {
            // What was not looked at is looked at the next time; of a unit that is not whole nothing is known.
            let known = if covered == end { end } else { align_down(covered, unit) };
            return Ok(if known > at { (known - at, 0) } else { (0, len) });
        };
        let from = align_down(first.start, unit).max(at);
        let mut to = align_up(first.end(), unit).min(end);
        for next in absent {
            if next.start > to {
                break;
            }
            to = align_up(next.end(), unit).min(end);
        }
        Ok((from - at, to - from))
    }

    /// Maps the next stride. Dropped in the middle, it has changed nothing.
    async fn map_stride(&mut self, cx: &Ctx) -> IoResult<()> {
        let stride = (self.end - self.next).min(MAP_STRIDE_BYTES);
        let own = self.node.extents(cx, self.next, stride).await?;
        let Some(last) = own.last() else {
            return Err(IoError::new(ErrorKind::Io, "the overlay gave no extents").at(self.next, stride));
        };
        let (from, to) = (self.next, last.end());
        let below = self.node.backing().and_then(|slot| slot.node());
        let mut pieces = VecDeque::new();
        let absent: Vec<_> = own.iter().filter(|extent| extent.kind == ExtentKind::Absent).collect();
        if let (Some(first), Some(last)) = (absent.first(), absent.last()) {
            // One question for all of them: a busy guest leaves thousands of runs, and the source may be distant.
            let needs = self.needs(cx, below.as_ref(), first.start, last.end()).await?;
            for extent in absent {
                let needs = within(&needs, extent.start, extent.end());
                plan(self.node.populate_unit(), extent.start, extent.end(), &needs, &mut pieces);
            }
        }
        let work: u64 = pieces.iter().map(|piece| piece.len()).sum();
        self.pending.extend(pieces);
        self.skipped_bytes += (to - from) - work;
        self.next = to;
        Ok(())
    }

    /// What would be needed of `[start, end)` if all of it were absent, as (end, need) in ascending order up to `end`;
    /// neighbours differ.
    async fn needs(
        &self,
        cx: &Ctx,
        below: Option<&NodeHandle>,
        start: u64,
        end: u64,
    ) -> IoResult<Vec<(u64, Need)>> {
        let mut needs: Vec<(u64, Need)> = Vec::new();
        let mut push = |to: u64, need: Need| match needs.last_mut() {
            Some(last) if last.1 == need => last.0 = to,
            _ => needs.push((to, need)),
        };
        let zero = if self.tell_zeroes { Need::Zero } else { Need::Nothing };
        let inside = below.map_or(0, |node| node.len()).clamp(start, end);
        let base_depth = self.base_depth(below)?;
        let mut next = start;
        while let Some(below) = below
            && next < inside
        {
            for mapped in chain_map(below, cx, next, inside - next).await? {
                next = mapped.extent.end();
                let need = match mapped.extent.kind {
                    // The base, and what lies under it, stays; behind its end it reads as zeroes as before.
                    _ if base_depth.is_some_and(|base| mapped.depth >= base) => Need::Nothing,
                    ExtentKind::Data => Need::Copy,
                    ExtentKind::Zero | ExtentKind::Absent => zero,
                };
                push(next, need);
            }
        }
        if next < end {
            // Behind the end of the layer directly below; where that is the base itself, it stays so.
            push(end, if base_depth == Some(0) { Need::Nothing } else { zero });
        }
        Ok(needs)
    }

    /// How many layers below `below` the base lies.
    fn base_depth(&self, below: Option<&NodeHandle>) -> IoResult<Option<usize>> {
        let Some(base) = &self.base else { return Ok(None) };
        let (mut layer, mut depth) = (below.cloned(), 0);
        while let Some(node) = layer {
            if node.is_same(base) {
                return Ok(Some(depth));
            }
            layer = node.backing().and_then(|slot| slot.node());
            depth += 1;
        }
        Err(IoError::new(ErrorKind::NotFound, "the base is not in the chain any more"))
    }
}

impl FillPiece {
    /// Its length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a piece is never empty")]
    pub fn len(&self) -> u64 {
        match self {
            FillPiece::Copy { len, .. } | FillPiece::Zero { len, .. } => *len,
        }
    }
}

/// The part of `needs` that lies in `[start, end)`.
fn within(needs: &[(u64, Need)], start: u64, end: u64) -> Vec<(u64, Need)> {
    let first = needs.partition_point(|(to, _)| *to <= start);
    let last = needs.partition_point(|(to, _)| *to < end);
    needs[first..needs.len().min(last + 1)].iter().map(|(to, need)| ((*to).min(end), *need)).collect()
}

/// Turns the needs of one absent run into pieces of whole units. A unit whose bytes need different things is copied.
fn plan(unit: u64, start: u64, end: u64, needs: &[(u64, Need)], pieces: &mut VecDeque<FillPiece>) {
    let mut emit = |from: u64, to: u64, need: Need| match (need, pieces.back_mut()) {
        _ if from >= to => {}
        (Need::Nothing, _) => {}
        (Need::Copy, Some(FillPiece::Copy { at, len })) if *at + *len == from => *len += to - from,
        (Need::Zero, Some(FillPiece::Zero { at, len })) if *at + *len == from => *len += to - from,
        (Need::Copy, _) => pieces.push_back(FillPiece::Copy { at: from, len: to - from }),
        (Need::Zero, _) => pieces.push_back(FillPiece::Zero { at: from, len: to - from }),
    };
    let mut done = start;
    for &(to, need) in needs {
        if to <= done {
            continue;
        }
        let whole = if to == end { end } else { align_down(to, unit).max(done) };
        emit(done, whole, need);
        done = whole;
        if whole < to {
            done = align_up(to, unit).min(end);
            emit(whole, done, Need::Copy);
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use futures_util::FutureExt;
    use infill_base::{Extent, Extents, Gather, Limits, WriteFlags, ZeroFlags};
    use infill_storage::sync::Arc;
    use infill_storage::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::{MemoryOverlay, Node, NodeInfo};

    fn pieces(mut cursor: StreamCursor) -> Vec<FillPiece> {
        std::iter::from_fn(|| cursor.next(&Ctx::FILL, u64::MAX).now_or_never().unwrap().unwrap()).collect()
    }

    fn fill(node: &NodeHandle, at: u64, len: usize) {
        let data = vec![7; len];
        node.write(&Ctx::GUEST, at, data, WriteFlags::empty()).now_or_never().unwrap().unwrap();
    }

    /// A full disk that counts how often it is asked for extents.
    struct Distant(Arc<AtomicU64>);

    impl Node for Distant {
        fn limits(&self) -> Limits {
            Limits::default()
        }
        fn len(&self) -> u64 {
            1 << 20
        }
        fn info(&self) -> NodeInfo {
            NodeHandle::new(MemoryOverlay::new(0, 4096, None)).info()
        }
        async fn read(&self, _: &Ctx, _: u64, buf: BytesMut) -> IoResult<BytesMut> {
            Ok(buf)
        }
        async fn write(&self, _: &Ctx, _: u64, _: Gather, _: WriteFlags) -> IoResult<()> {
            Ok(())
        }
        async fn write_zeroes(&self, _: &Ctx, _: u64, _: u64, _: ZeroFlags) -> IoResult<()> {
            Ok(())
        }
        async fn discard(&self, _: &Ctx, _: u64, _: u64) -> IoResult<()> {
            Ok(())
        }
        async fn sync(&self, _: &Ctx) -> IoResult<()> {
            Ok(())
        }
        async fn extents(&self, _: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(vec![Extent::new(at, len, ExtentKind::Data)])
        }
    }

    #[test]
    fn a_distant_source_is_asked_once_for_all_the_runs_that_a_busy_guest_leaves() {
        let asked = Arc::new(AtomicU64::new(0));
        let source = NodeHandle::new(Distant(asked.clone()));
        let middle = NodeHandle::new(MemoryOverlay::new(1 << 20, 4096, Some(source)));
        let top = NodeHandle::new(MemoryOverlay::new(1 << 20, 4096, Some(middle.clone())));
        let place = |nth: u64| nth * (16 << 10);
        for nth in 0..64 {
            fill(if nth % 2 == 0 { &top } else { &middle }, place(nth), 4096);
        }
        let pieces = pieces(StreamCursor::new(&top, false));
        let copied: u64 = pieces.iter().map(FillPiece::len).sum();
        assert_eq!((pieces.len(), copied), (32, (1 << 20) - 32 * 4096));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn what_guests_wrote_since_the_walk_came_by_is_left_out() {
        let source = NodeHandle::new(Distant(Arc::default()));
        let top = NodeHandle::new(MemoryOverlay::new(1 << 20, 4096, Some(source)));
        let mut cursor = StreamCursor::new(&top, false);
        let next = |cursor: &mut StreamCursor, max: u64| {
            cursor.next(&Ctx::FILL, max).now_or_never().unwrap().unwrap()
        };
        let copy = |at: u64, len: u64| Some(FillPiece::Copy { at: at << 10, len: len << 10 });
        assert_eq!(next(&mut cursor, 64 << 10), copy(0, 64));
        fill(&top, 64 << 10, 8192);
        fill(&top, 96 << 10, 4096);
        fill(&top, 128 << 10, 128 << 10);
        assert_eq!(next(&mut cursor, 64 << 10), copy(72, 24));
        assert_eq!(next(&mut cursor, 64 << 10), copy(100, 28));
        assert_eq!(next(&mut cursor, u64::MAX), copy(256, 1024 - 256));
        assert_eq!(next(&mut cursor, u64::MAX), None);
        assert_eq!(cursor.skipped_bytes(), (8192 + 4096) + (128 << 10));

        // And since it was given out, where that was long ago.
        cursor.put_back(FillPiece::Copy { at: 256 << 10, len: 768 << 10 });
        fill(&top, 256 << 10, 256 << 10);
        assert_eq!(next(&mut cursor, u64::MAX), copy(512, 512));
        assert_eq!(next(&mut cursor, u64::MAX), None);
    }

    #[test]
    fn what_only_the_base_holds_is_left_alone_and_zeroes_over_it_are_told() {
        let base = NodeHandle::new(MemoryOverlay::new(64 << 10, 4096, None));
        fill(&base, 0, 64 << 10);
        // Shorter than the base: behind its end the chain reads zeroes, and must not show the base afterwards.
        let middle = NodeHandle::new(MemoryOverlay::new(48 << 10, 4096, Some(base.clone())));
        fill(&middle, 8192, 4096);
        let zeroes = middle.write_zeroes(&Ctx::GUEST, 16384, 4096, ZeroFlags::empty());
        zeroes.now_or_never().unwrap().unwrap();
        let top = NodeHandle::new(MemoryOverlay::new(64 << 10, 4096, Some(middle.clone())));
        assert_eq!(
            pieces(StreamCursor::above(&top, base)),
            [
                FillPiece::Copy { at: 8192, len: 4096 },
                FillPiece::Zero { at: 16384, len: 4096 },
                FillPiece::Zero { at: 48 << 10, len: 16 << 10 },
            ]
        );
        assert_eq!(pieces(StreamCursor::above(&top, middle)), []);
    }

    #[test]
    fn a_unit_that_is_partly_zero_and_partly_left_to_the_base_is_copied() {
        let base = NodeHandle::new(MemoryOverlay::new(64 << 10, 512, None));
        fill(&base, 0, 64 << 10);
        let middle = NodeHandle::new(MemoryOverlay::new(64 << 10, 512, Some(base.clone())));
        let zeroes = middle.write_zeroes(&Ctx::GUEST, 512, 4096, ZeroFlags::empty());
        zeroes.now_or_never().unwrap().unwrap();
        let top = NodeHandle::new(MemoryOverlay::new(64 << 10, 4096, Some(middle)));
        assert_eq!(pieces(StreamCursor::above(&top, base)), [FillPiece::Copy { at: 0, len: 8192 }]);
    }
}
