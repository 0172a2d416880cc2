//! The disk as it was, to be read while guests write to it (fleecing): the filter `copy-before-write`, and `snapshot-access`
//! over it.
//!
//! Old bytes are copied to a second node before guests overwrite them; what was not overwritten is read from the disk
//! itself. A read holds its range, shared, against such a copy: so it sees either side whole.

use std::time::Duration;

use bytes::BytesMut;
use infill_base::{
    Ctx, ErrorKind, Extents, Gather, IoError, IoResult, Limits, WriteFlags, ZeroFlags, align_down,
    push_extent,
};
use infill_node::generic::chain_extents;
use infill_node::{DirtyMap, Edge, Filter, Held, Node, NodeHandle, NodeInfo, Watching};
use infill_storage::sync::Arc;

use super::keep::KeepOld;
use super::{BLOCK_BYTES, Failed, Scope, Transfer, piece_bytes};
use crate::state::Operation;

/// A disk as it was at one moment.
pub struct Past {
    transfer: Arc<Transfer>,
    keep: Arc<KeepOld>,
    /// What of it may be read; all where there is none.
    seen: Option<DirtyMap>,
    _watching: Watching,
}

impl Past {
    /// The disk as it is now, which the caller holds. Old bytes go to `target`; with `only`, those alone that it marks.
    /// Where they cannot be kept, or not within `limit`, the guest's write fails (`breaks_guest`) or the past is lost.
    pub fn new(
        held: &Held,
        target: NodeHandle,
        only: Option<&DirtyMap>,
        breaks_guest: bool,
        limit: Option<Duration>,
    ) -> IoResult<Arc<Past>> {
        let source = held.node().clone();
        if target.len() < source.len() || !target.limits().writable {
            let why = "the target must be writable, and not shorter than the disk";
            return Err(IoError::new(ErrorKind::InvalidInput, why).in_node(target.info().filename));
        }
        let old = DirtyMap::new(source.len(), piece_bytes(&target, &Scope::Nothing));
        match only {
            Some(only) => old.merge(only),
            None => old.mark(0, source.len()),
        }
        let transfer = Transfer::of_the_past(source, target, Scope::Nothing, old);
        let keep = Arc::new(KeepOld::new(transfer.clone(), breaks_guest, limit));
        let watching = held.watch(keep.clone());
        Ok(Arc::new(Past { transfer, keep, seen: only.map(DirtyMap::copied), _watching: watching }))
    }

    /// The moment has passed: nothing is kept, and nothing of it can be read.
    pub fn lose(&self, error: IoError) {
        self.keep.lose(Failed { operation: Operation::Read, error });
    }

    /// Refuses a range that cannot be read: nobody has kept it, or not all of it.
    fn check(&self, at: u64, len: u64) -> IoResult<()> {
        if let Some(failed) = self.keep.failure() {
            let why = "the disk as it was is lost: its old bytes could not be kept";
            return Err(IoError::new(ErrorKind::NotPermitted, why).caused_by(failed.error));
        }
        let end = at.checked_add(len).filter(|end| *end <= self.transfer.len);
        let Some(end) = end else {
            return Err(IoError::new(ErrorKind::InvalidInput, "behind the end of the disk").at(at, len));
        };
        let Some(seen) = &self.seen else { return Ok(()) };
        let mut next = at;
        while next < end {
            match seen.next_dirty(next, end - next) {
                Some(run) if run.start <= next => next = run.end,
                _ => {
                    let why = "the bitmap of this snapshot leaves that out";
                    return Err(IoError::new(ErrorKind::NotPermitted, why).at(at, len));
                }
            }
        }
        Ok(())
    }

    /// The parts of a range, and where each is read. The range is held.
    fn parts(&self, at: u64, end: u64) -> Vec<(u64, u64, &NodeHandle)> {
        let (transfer, mut parts, mut next) = (&*self.transfer, Vec::new(), at);
        while next < end {
            let old = transfer.old().next_dirty(next, end - next).filter(|run| run.start < end);
            let (start, stop) = old.map_or((end, end), |run| (run.start.max(next), run.end.min(end)));
            if start > next {
                parts.push((next, start, &transfer.target));
            }
            if stop > start {
                parts.push((start, stop, &transfer.source));
            }
            next = stop;
        }
        parts
    }

    async fn hold(&self, at: u64, end: u64) -> infill_storage::RangeGuard {
        let (start, end) = (align_down(at, BLOCK_BYTES), end.next_multiple_of(BLOCK_BYTES));
        self.transfer.ranges.shared(start, end).await
    }

    async fn read(&self, cx: &Ctx, at: u64, mut buf: BytesMut) -> IoResult<BytesMut> {
        let end = at + buf.len() as u64;
        self.check(at, buf.len() as u64)?;
        let _range = self.hold(at, end).await;
        for (start, stop, node) in self.parts(at, end) {
            let data = node.read_vec(cx, start, (stop - start) as usize).await?;
            buf[(start - at) as usize..(stop - at) as usize].copy_from_slice(&data);
        }
        // It may have been lost meanwhile.
        self.check(at, buf.len() as u64)?;
        Ok(buf)
    }

    async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        self.check(at, len)?;
        let _range = self.hold(at, at + len).await;
        let mut all = Extents::new();
        for (start, stop, node) in self.parts(at, at + len) {
            for mut extent in chain_extents(node, cx, start, stop - start).await? {
                extent.host = None;
                push_extent(&mut all, extent);
            }
        }
        Ok(all)
    }
}

/// Passes everything on to a disk, and keeps how the disk was when this was opened.
pub struct CopyBeforeWriteNode {
    below: Edge,
    past: Arc<Past>,
}

impl CopyBeforeWriteNode {
    /// Over the disk of `past`.
    pub fn new(past: Arc<Past>) -> CopyBeforeWriteNode {
        CopyBeforeWriteNode { below: Edge::new(past.transfer.source.clone()), past }
    }
}

impl Drop for CopyBeforeWriteNode {
    fn drop(&mut self) {
        self.past.keep.end();
    }
}

impl Filter for CopyBeforeWriteNode {
    const DRIVER: &'static str = "copy-before-write";

    /// Nobody else has this edge: what is kept is of this one disk.
    fn below(&self) -> &Edge {
        &self.below
    }

    async fn close(&self, _: &Ctx) -> IoResult<()> {
        self.past.keep.end();
        Ok(())
    }
}

/// Shows the disk as it was.
pub struct SnapshotAccessNode(Arc<Past>);

impl SnapshotAccessNode {
    /// Of the moment that `past` keeps.
    pub fn new(past: Arc<Past>) -> SnapshotAccessNode {
        SnapshotAccessNode(past)
    }
}

fn read_only() -> IoError {
    IoError::new(ErrorKind::NotPermitted, "a disk as it was is read-only")
}

impl Node for SnapshotAccessNode {
    fn limits(&self) -> Limits {
        let (source, target) = (self.0.transfer.source.limits(), self.0.transfer.target.limits());
        Limits {
            writable: false,
            request_align: source.request_align.max(target.request_align),
            memory_align: source.memory_align.max(target.memory_align),
            ..source
        }
    }
    fn len(&self) -> u64 {
        self.0.transfer.len
    }
    fn info(&self) -> NodeInfo {
        NodeInfo {
            driver: "snapshot-access",
            read_only: true,
            backing: None,
            format_specific: Vec::new(),
            ..self.0.transfer.source.info()
        }
    }
    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        self.0.read(cx, at, buf).await
    }
    async fn write(&self, _: &Ctx, _: u64, _: Gather, _: WriteFlags) -> IoResult<()> {
        Err(read_only())
    }
    async fn write_zeroes(&self, _: &Ctx, _: u64, _: u64, _: ZeroFlags) -> IoResult<()> {
        Err(read_only())
    }
    async fn discard(&self, _: &Ctx, _: u64, _: u64) -> IoResult<()> {
        Err(read_only())
    }
    async fn sync(&self, _: &Ctx) -> IoResult<()> {
        Ok(())
    }
    async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        self.0.extents(cx, at, len).await
    }
    async fn close(&self, _: &Ctx) -> IoResult<()> {
        Ok(())
    }
}
