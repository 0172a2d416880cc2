//! Populate for drivers without a compare-and-link of their own.

use std::future::Future;

use bytes::Bytes;
use infill_base::{Ctx, ExtentKind, IoResult};
use infill_storage::RangeLock;

use crate::{Node, Populated};

/// What a driver gives for [`populate`].
pub trait LocalWrite: Node {
    /// The lock that every guest write, discard and resize of the driver holds for its range, in guest bytes.
    fn ranges(&self) -> &RangeLock;

    /// Writes whole units that are absent; the caller holds their range and asked [`Node::extents`] under it.
    fn write_absent(&self, cx: &Ctx, at: u64, data: Bytes) -> impl Future<Output = IoResult<()>>;
}

/// Writes those units of `data` that are still absent: waits for guest writes of the range, then holds it for the
/// look and the local write alone.
pub async fn populate<N: LocalWrite>(
    node: &N,
    cx: &Ctx,
    at: u64,
    data: Bytes,
    generation: u64,
) -> IoResult<Populated> {
    let (len, mut done) = (data.len() as u64, Populated::default());
    let _range = node.ranges().exclusive(at, at + len).await;
    let link = node.backing().and_then(|slot| slot.begin_link(generation));
    let Some(_link) = link else {
        done.stale = len;
        return Ok(done);
    };
    let mut next = at;
    while next < at + len {
        for extent in node.extents(cx, next, at + len - next).await? {
            if extent.kind == ExtentKind::Absent {
                let part = data.slice((extent.start - at) as usize..(extent.end() - at) as usize);
                node.write_absent(cx, extent.start, part).await?;
                done.linked += extent.len;
            } else {
                done.lost += extent.len;
            }
            next = extent.end();
        }
    }
    Ok(done)
}
