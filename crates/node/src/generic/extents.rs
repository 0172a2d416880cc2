//! What a whole chain reads as, from what each layer says of itself.

use futures_util::future::LocalBoxFuture;
use infill_base::{Ctx, ErrorKind, Extent, ExtentKind, Extents, IoError, IoResult, push_extent};

use crate::NodeHandle;

/// A run, and the layer of the chain that decides what it reads as.
#[derive(Clone, Debug)]
pub struct MappedExtent {
    /// The run; `Absent` only where no layer says anything (it reads as zeroes).
    pub extent: Extent,
    /// How many layers below the node that was asked (0: itself).
    pub depth: usize,
    /// Whether any layer holds it: false where it is absent all the way down.
    pub present: bool,
}

impl MappedExtent {
    /// The part that lies in `[start, end)`, which it meets.
    fn within(&self, start: u64, end: u64) -> MappedExtent {
        let (from, to) = (self.extent.start.max(start), self.extent.end().min(end));
        let host = self.extent.host.map(|host| host + (from - self.extent.start));
        MappedExtent { extent: Extent { start: from, len: to - from, host, ..self.extent }, ..*self }
    }
}

/// The runs of `[at, at + len)` with the layer that decides each. May stop early as [`Extents`] says.
pub async fn chain_map(node: &NodeHandle, cx: &Ctx, at: u64, len: u64) -> IoResult<Vec<MappedExtent>> {
    map_layer(node.clone(), *cx, at, len, 0).await
}

fn map_layer(
    node: NodeHandle,
    cx: Ctx,
    at: u64,
    len: u64,
    depth: usize,
) -> LocalBoxFuture<'static, IoResult<Vec<MappedExtent>>> {
    Box::pin(async move {
        let node = node.unfiltered();
        let mut out = Vec::new();
        // What a layer calls absent counts only while the edge stays as it was before the question.
        let (below, extents) = loop {
            let Some(slot) = node.backing() else { break (None, node.extents(&cx, at, len).await?) };
            let (generation, below) = (slot.generation(), slot.node());
            let extents = node.extents(&cx, at, len).await?;
            if slot.generation() == generation {
                break (below, extents);
            }
        };
        let to = extents.last().map_or(at, Extent::end);
        let mut known = Vec::new();
        for extent in extents {
            let below = match &below {
                Some(below) if extent.kind == ExtentKind::Absent => below,
                _ => {
                    let present = extent.kind != ExtentKind::Absent;
                    out.push(MappedExtent { extent, depth, present });
                    continue;
                }
            };
            let end = extent.end().min(below.len()).max(extent.start);
            let mut next = extent.start;
            while next < end {
                if known.last().is_none_or(|last: &MappedExtent| last.extent.end() <= next) {
                    // All that is left, not this run alone: one answer of a distant layer serves many runs.
                    let left = to.min(below.len()).max(end) - next;
                    known = map_layer(below.clone(), cx, next, left, depth + 1).await?;
                    if known.last().is_none_or(|last| last.extent.end() <= next) {
                        let why = "a layer of the chain gave no extents";
                        return Err(IoError::new(ErrorKind::Io, why).at(next, left));
                    }
                }
                let first = known.partition_point(|mapped| mapped.extent.end() <= next);
                for mapped in known[first..].iter().take_while(|mapped| mapped.extent.start < end) {
                    out.push(mapped.within(next, end));
                    next = mapped.extent.end().min(end);
                }
            }
            if next < extent.end() {
                // Behind the end of the layer below: zeroes that nobody holds.
                let rest = Extent::new(next, extent.end() - next, ExtentKind::Absent);
                out.push(MappedExtent { extent: rest, depth: depth + 1, present: false });
            }
        }
        Ok(out)
    })
}

/// Data and zero runs of `[at, at + len)` as the chain reads; never `Absent`. Covers the whole range.
pub async fn chain_extents(node: &NodeHandle, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
    let (mut out, mut next, end) = (Extents::new(), at, at + len);
    while next < end {
        for mapped in chain_map(node, cx, next, end - next).await? {
            let mut extent = mapped.extent;
            if extent.kind == ExtentKind::Absent {
                extent.kind = ExtentKind::Zero;
            }
            if mapped.depth > 0 || extent.kind == ExtentKind::Zero {
                extent.host = None;
            }
            extent.compressed = false;
            next = extent.end();
            push_extent(&mut out, extent);
        }
    }
    Ok(out)
}
