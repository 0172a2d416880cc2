//! What a whole chain reads as, from what each layer says of itself.

use futures_util::future::LocalBoxFuture;
use infill_base::{Ctx, Extent, ExtentKind, Extents, IoResult, push_extent};

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
                let part = map_layer(below.clone(), cx, next, end - next, depth + 1).await?;
                next = part.last().map_or(end, |last| last.extent.end());
                out.extend(part);
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
