//! The compress filter: what is written through it is compressed by the format below, cluster by cluster.
//!
//! A write of a part of a cluster, and one that does not become smaller, is written plain, so that nothing has to be read first.

use infill_base::{Ctx, Gather, IoResult, WriteFlags};

use crate::edge::Through as _;
use crate::{Edge, Filter, NodeHandle};

/// Passes everything on, and asks for writes to be compressed.
#[derive(Debug)]
pub struct CompressNode {
    below: Edge,
}

impl CompressNode {
    /// Over `below`, a format that [can](CompressNode::is_possible).
    pub fn new(below: NodeHandle) -> CompressNode {
        CompressNode { below: Edge::new(below) }
    }

    /// Whether a node's format writes compressed data.
    pub fn is_possible(below: &NodeHandle) -> bool {
        below.unfiltered().info().driver == "qcow2"
    }
}

impl Filter for CompressNode {
    const DRIVER: &'static str = "compress";

    fn below(&self) -> &Edge {
        &self.below
    }

    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        self.below.write(cx, at, data, flags | WriteFlags::COMPRESSED).await
    }
}
