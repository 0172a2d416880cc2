//! Block status: what a range of the chain is, and which layer says so.

use infill_base::{Ctx, ErrorKind, ExtentKind, IoError, IoResult, align_down};
use infill_node::generic::chain_map;
use infill_node::{DirtyMap, NodeHandle};

use super::handshake::{CONTEXT_NAMES, Contexts};
use crate::proto::{STATE_DIRTY, STATE_HOLE, STATE_ZERO, StatusExtent};

/// Most runs that one context answers at once. A client asks again from the last one.
const EXTENTS_MAX: usize = 64 << 10;
/// Most pieces of the chain that are looked at for one answer, however few runs they make: others wait meanwhile.
const MAPPED_MAX: usize = 64 << 10;
/// Most clusters (or pieces of that size) of the top that are mapped by one question to the chain: this bounds the memory
/// that the answer takes before it is put together, whatever the size of the disk.
const STRIDE_UNITS: u64 = 64 << 10;
const STRIDE_BYTES_MIN: u64 = 16 << 20;
const STRIDE_BYTES_MAX: u64 = 4 << 30;

/// Bytes that a block status holds while it is put together and sent, at most.
pub(super) const STATUS_BYTES: u64 = 2 << 20;

/// Runs of one context. Neighbours differ.
#[derive(Default)]
struct Runs(Vec<StatusExtent>);

impl Runs {
    fn push(&mut self, len: u64, flags: u64) {
        match self.0.last_mut() {
            Some(last) if last.flags == flags => last.len += len,
            _ => self.0.push(StatusExtent { len, flags }),
        }
    }

    /// Keeps the first `count` runs.
    fn cut(mut self, count: usize) -> Vec<StatusExtent> {
        self.0.truncate(count);
        self.0
    }
}

/// The runs of `[at, at + len)` for each chosen context: at least one, not necessarily all. With `one`, exactly one.
pub(super) async fn block_status(
    node: &NodeHandle,
    cx: &Ctx,
    contexts: &Contexts,
    at: u64,
    len: u64,
    one: bool,
) -> IoResult<Vec<(u32, Vec<StatusExtent>)>> {
    // What all contexts together hold stays within what the request is charged for.
    let most = if one { 1 } else { EXTENTS_MAX / contexts.len().max(2) * 2 };
    let unit = node.populate_unit();
    let stride = unit.saturating_mul(STRIDE_UNITS).clamp(STRIDE_BYTES_MIN, STRIDE_BYTES_MAX);
    let (mut allocation, mut depth) = (Runs::default(), Runs::default());
    let (mut next, end, mut mapped_count) = (at, at + len, 0);
    let asked = contexts.allocation || contexts.depth;
    while asked
        && next < end
        && mapped_count < MAPPED_MAX
        && allocation.0.len() <= most
        && depth.0.len() <= most
    {
        // Strides end at round places, so that a run is not cut twice.
        let until = end.min(align_down(next, stride).saturating_add(stride));
        let mapped = chain_map(node, cx, next, until - next).await?;
        if mapped.is_empty() {
            return Err(IoError::new(ErrorKind::Io, "the node gave no extents").at(next, until - next));
        }
        mapped_count += mapped.len();
        for piece in mapped {
            let extent = piece.extent;
            if contexts.allocation {
                let zero = extent.kind != ExtentKind::Data;
                allocation.push(extent.len, if zero { STATE_HOLE | STATE_ZERO } else { 0 });
            }
            if contexts.depth {
                depth.push(extent.len, if piece.present { piece.depth as u64 + 1 } else { 0 });
            }
            next = extent.end();
        }
    }
    let chosen = [(contexts.allocation, allocation), (contexts.depth, depth)];
    let answers = CONTEXT_NAMES.into_iter().zip(chosen).filter(|(_, (wanted, _))| *wanted);
    let bitmaps =
        contexts.bitmaps.iter().map(|(id, bitmap)| (*id, dirty_runs(bitmap.map(), at, at + len, most)));
    Ok(answers
        .map(|((id, _), (_, runs))| (id, runs))
        .chain(bitmaps)
        .map(|(id, runs)| (id, runs.cut(most)))
        .collect())
}

/// What a bitmap says of a range, as far as `most` runs tell it.
fn dirty_runs(map: &DirtyMap, at: u64, end: u64, most: usize) -> Runs {
    let (mut runs, mut next) = (Runs::default(), at);
    while next < end && runs.0.len() <= most {
        let dirty = map.next_dirty(next, end - next).filter(|run| run.start < end);
        let (start, stop) = dirty.map_or((end, end), |run| (run.start.max(next), run.end.min(end)));
        if start > next {
            runs.push(start - next, 0);
        }
        if stop > start {
            runs.push(stop - start, STATE_DIRTY);
        }
        next = stop;
    }
    runs
}
