//! Warming: copying what is absent in an overlay while the source's guest goes on writing.

use std::cell::Cell;
use std::rc::Rc;

use futures_util::stream::{self, FuturesUnordered};
use futures_util::{StreamExt as _, TryStreamExt as _};
use infill_base::{Ctx, IoResult, is_zero};
use infill_migrate::BlockSet;
use infill_node::NodeHandle;
use infill_node::generic::{FillPiece, StreamCursor};

/// Bytes of one request, and how many are in flight.
const PIECE_BYTES: u64 = 256 << 10;
const PIECES: usize = 16;

/// Fills what is absent in the overlay and not `hot`, once over the disk. Ends early when told to stop.
pub(super) async fn copy_absent(
    node: &NodeHandle,
    hot: &BlockSet,
    block_bytes: u64,
    stop: &Rc<Cell<bool>>,
) -> IoResult<()> {
    // From before the first look at what is zero at the source: that may be stale once blocks were demoted.
    let Some(generation) = node.backing().map(|slot| slot.generation()) else { return Ok(()) };
    let missing = stream::try_unfold(StreamCursor::new(node, true), |mut cursor| async move {
        let piece = if stop.get() { None } else { cursor.next(&Ctx::FILL, PIECE_BYTES).await? };
        IoResult::Ok(piece.map(|piece| (piece, cursor)))
    });
    let pieces = missing.map_ok(|piece| {
        let (at, len, zero) = match piece {
            FillPiece::Copy { at, len } => (at, len, None),
            FillPiece::Zero { at, len } => (at, len, Some(generation)),
        };
        let parts = cold(hot, block_bytes, at, at + len).into_iter();
        stream::iter(parts.map(move |(from, to)| IoResult::Ok(copy_piece(node, from, to - from, zero))))
    });
    // The look for the next piece goes on beside the pieces, and they beside it: it may wait for what one of them has.
    pieces.try_flatten().try_buffer_unordered(PIECES).try_collect().await
}

/// Copies a piece; one that is zero under a generation of the edge is not asked for.
async fn copy_piece(node: &NodeHandle, at: u64, len: u64, zero: Option<u64>) -> IoResult<()> {
    let cx = Ctx::FILL;
    let Some(slot) = node.backing() else { return Ok(()) };
    let populated = match zero {
        Some(generation) => node.populate_zero(&cx, at, len, generation).await?,
        None => {
            let fetched = slot.fetch(&cx, at, len).await?;
            node.populate(&cx, at, fetched.data, fetched.generation).await?
        }
    };
    // What was demoted meanwhile is of a later round.
    tracing::trace!(at, len, ?populated, "warmed");
    Ok(())
}

/// Copies the blocks of a set out of `base`, which is frozen, where they are absent in the overlay.
pub(super) async fn copy_blocks(
    node: &NodeHandle,
    base: &NodeHandle,
    set: &BlockSet,
    block_bytes: u64,
    stop: &Rc<Cell<bool>>,
) -> IoResult<()> {
    let Some(generation) = node.backing().map(|slot| slot.generation()) else { return Ok(()) };
    let end = node.len();
    let mut pieces = set.runs().flat_map(|run| {
        let (from, to) = (run.start * block_bytes, (run.end * block_bytes).min(end));
        (from..to).step_by(PIECE_BYTES as usize).map(move |at| (at, (to - at).min(PIECE_BYTES)))
    });
    let mut flying = FuturesUnordered::new();
    loop {
        while flying.len() < PIECES && !stop.get() {
            let Some((at, len)) = pieces.next() else { break };
            flying.push(copy_block(node, base, at, len, generation));
        }
        match flying.next().await {
            Some(done) => done?,
            None => return Ok(()),
        }
    }
}

async fn copy_block(
    node: &NodeHandle,
    base: &NodeHandle,
    at: u64,
    len: u64,
    generation: u64,
) -> IoResult<()> {
    let cx = Ctx::FILL;
    let data = base.read_vec(&cx, at, len as usize).await?;
    let populated = match is_zero(&data) {
        true => node.populate_zero(&cx, at, len, generation).await?,
        false => node.populate(&cx, at, data.freeze(), generation).await?,
    };
    tracing::trace!(at, len, ?populated, "copied before the switch");
    Ok(())
}

/// The parts of a range that are in no hot block.
fn cold(hot: &BlockSet, block_bytes: u64, from: u64, to: u64) -> Vec<(u64, u64)> {
    let (mut parts, mut at) = (Vec::new(), from);
    while at < to {
        let block = at / block_bytes;
        let end = ((block + 1) * block_bytes).min(to);
        if !hot.contains(block) {
            match parts.last_mut() {
                Some((_, last)) if *last == at => *last = end,
                _ => parts.push((at, end)),
            }
        }
        at = end;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hot_blocks_are_left_out_of_a_copy() {
        let mut hot = BlockSet::empty(8);
        assert_eq!(cold(&hot, 10, 5, 42), [(5, 42)]);
        hot.insert(1);
        hot.insert(3);
        assert_eq!(cold(&hot, 10, 5, 42), [(5, 10), (20, 30), (40, 42)]);
        assert_eq!(cold(&hot, 10, 12, 18), []);
    }
}
