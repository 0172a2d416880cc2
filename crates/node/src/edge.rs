//! Where an export, or a filter, points: a node that can be exchanged under it while requests run.
//!
//! A change goes to the node that the edge points at *once it has counted itself in there*: whoever exchanges the node holds the
//! old one ([`NodeHandle::hold_changes`]), lets the edge point at the new one, and lets go; the changes that waited then go to the
//! new node. A read that began before sees what was true when it began; one that the old node refuses meanwhile (it
//! may be closed by then) is asked again of the new one.
//!
//! Each connection has a [`Port`] of its own, so that requests on several reactors write no line that they share.

use std::cell::{RefCell, RefMut};
use std::future::Future;
use std::ops::Deref;
use std::rc::Rc;

use bytes::BytesMut;
use infill_base::{Ctx, Extents, Gather, IoResult, Limits, WriteFlags, ZeroFlags, aligned_buffer};
use infill_storage::sync::atomic::{AtomicU64, Ordering};
use infill_storage::sync::{Arc, Mutex, lock};

use crate::handle::Entered;
use crate::{NodeHandle, NodeInfo};

/// What is told of an exchange: the old node, and the new one.
type Moved = dyn Fn(&NodeHandle, &NodeHandle) + Send + Sync;

struct Inner {
    /// Raised with each exchange.
    version: AtomicU64,
    node: Mutex<NodeHandle>,
    moved: Option<Box<Moved>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Edge").field(&*lock(&self.node)).finish()
    }
}

/// Points at a node. Cloning shares the edge.
#[derive(Clone, Debug)]
pub struct Edge(Arc<Inner>);

impl Edge {
    /// Points at `node`.
    pub fn new(node: NodeHandle) -> Edge {
        Edge(Arc::new(Inner { version: AtomicU64::new(0), node: Mutex::new(node), moved: None }))
    }

    /// Points at `node`, and calls `moved` with the old node and the new one at each exchange.
    pub fn watched(
        node: NodeHandle,
        moved: impl Fn(&NodeHandle, &NodeHandle) + Send + Sync + 'static,
    ) -> Edge {
        let moved: Option<Box<Moved>> = Some(Box::new(moved));
        Edge(Arc::new(Inner { version: AtomicU64::new(0), node: Mutex::new(node), moved }))
    }

    /// The node now.
    pub fn node(&self) -> NodeHandle {
        lock(&self.0.node).clone()
    }

    /// Points at `node` from now on. The caller holds the old one.
    pub fn point_at(&self, node: NodeHandle) {
        let mut current = lock(&self.0.node);
        if let Some(moved) = &self.0.moved {
            moved(&current, &node);
        }
        *current = node;
        self.0.version.fetch_add(1, Ordering::Release);
    }

    /// Whether both are the same edge.
    pub fn is_same(&self, other: &Edge) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// A port for one thread.
    pub fn port(&self) -> Port {
        let version = self.0.version.load(Ordering::Acquire);
        let node = self.node();
        let limits = node.limits();
        Port { edge: self.clone(), seen: RefCell::new(Seen { version, node: Rc::new(node), limits }) }
    }
}

impl From<NodeHandle> for Edge {
    fn from(node: NodeHandle) -> Edge {
        Edge::new(node)
    }
}

/// An edge as one thread uses it. It costs a load to see that nothing has changed.
#[derive(Debug)]
pub struct Port {
    edge: Edge,
    seen: RefCell<Seen>,
}

#[derive(Debug)]
struct Seen {
    version: u64,
    node: Rc<NodeHandle>,
    limits: Limits,
}

impl Port {
    /// The node now.
    pub fn node(&self) -> Rc<NodeHandle> {
        self.refreshed().node.clone()
    }

    /// Limits of the node now, without asking it.
    pub fn limits(&self) -> Limits {
        self.refreshed().limits
    }

    fn refreshed(&self) -> RefMut<'_, Seen> {
        let version = self.edge.0.version.load(Ordering::Acquire);
        let mut seen = self.seen.borrow_mut();
        if seen.version != version {
            let node = self.edge.node();
            let limits = node.limits();
            *seen = Seen { version, node: Rc::new(node), limits };
        }
        seen
    }
}

/// What gives the node of an edge.
trait Current {
    type Node: Deref<Target = NodeHandle>;
    fn current(&self) -> Self::Node;

    /// Makes a change of the node that the edge points at once the change has counted itself in there.
    async fn change(&self, change: impl AsyncFnOnce(Entered<'_>) -> IoResult<()>) -> IoResult<()> {
        loop {
            let node = self.current();
            let entered = node.enter().await;
            if self.current().is_same(&node) {
                return change(entered).await;
            }
        }
    }
}

impl Current for Edge {
    type Node = Box<NodeHandle>;
    fn current(&self) -> Box<NodeHandle> {
        Box::new(self.node())
    }
}

impl Current for Port {
    type Node = Rc<NodeHandle>;
    fn current(&self) -> Rc<NodeHandle> {
        self.node()
    }
}

/// The operations of a node, through an edge.
#[expect(private_bounds, reason = "only the edge and its port are meant")]
pub trait Through: Current {
    /// Size of the disk in bytes, now.
    fn len(&self) -> u64 {
        self.current().len()
    }

    /// Whether the disk has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// See [`crate::Node::limits`].
    fn node_limits(&self) -> Limits {
        self.current().limits()
    }

    /// See [`crate::Node::info`].
    fn info(&self) -> NodeInfo {
        self.current().info()
    }

    /// Fills `buf` from guest byte `at`.
    fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> impl Future<Output = IoResult<BytesMut>> {
        async move {
            let (node, len) = (self.current(), buf.len());
            let Err(error) = (match node.read(cx, at, buf).await {
                Ok(buf) => return Ok(buf),
                failed => failed,
            }) else {
                unreachable!("success has returned")
            };
            let now = self.current();
            if now.is_same(&node) {
                return Err(error);
            }
            now.read(cx, at, aligned_buffer(len, now.limits().memory_align as usize)).await
        }
    }

    /// See [`crate::Node::write`].
    fn write(
        &self,
        cx: &Ctx,
        at: u64,
        data: Gather,
        flags: WriteFlags,
    ) -> impl Future<Output = IoResult<()>> {
        self.change(async move |entered| entered.write(cx, at, data, flags).await)
    }

    /// See [`crate::Node::write_zeroes`].
    fn write_zeroes(
        &self,
        cx: &Ctx,
        at: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> impl Future<Output = IoResult<()>> {
        self.change(async move |entered| entered.write_zeroes(cx, at, len, flags).await)
    }

    /// See [`crate::Node::discard`].
    fn discard(&self, cx: &Ctx, at: u64, len: u64) -> impl Future<Output = IoResult<()>> {
        self.change(async move |entered| entered.discard(cx, at, len).await)
    }

    /// See [`crate::Node::sync`]. Covers everything acknowledged before the call, on whichever node it was done: whoever
    /// exchanges a node has synced what the new one holds.
    fn sync(&self, cx: &Ctx) -> impl Future<Output = IoResult<()>> {
        async move {
            let node = self.current();
            match node.sync(cx).await {
                Err(error) if self.current().is_same(&node) => Err(error),
                // Acknowledged on the new node before this was called, perhaps.
                _ if !self.current().is_same(&node) => self.current().sync(cx).await,
                done => done,
            }
        }
    }

    /// See [`crate::Node::extents`].
    fn extents(&self, cx: &Ctx, at: u64, len: u64) -> impl Future<Output = IoResult<Extents>> {
        async move { self.current().extents(cx, at, len).await }
    }
}

impl Through for Edge {}
impl Through for Port {}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use infill_sim::World;
    use infill_storage::rt;

    use super::*;
    use crate::MemoryOverlay;

    fn disk() -> NodeHandle {
        NodeHandle::new(MemoryOverlay::new(64 << 10, 4096, None))
    }

    #[test]
    fn a_write_that_waited_for_the_exchange_goes_to_the_new_node_alone() {
        World::new(1).run(async {
            let (old, new, cx) = (disk(), disk(), Ctx::GUEST);
            let edge = Edge::new(old.clone());
            let port = Rc::new(edge.port());
            let held = old.hold_changes().await;
            let done = Rc::new(Cell::new(0));
            for at in [0, 4096, 8192] {
                let (port, done) = (port.clone(), done.clone());
                rt::spawn(async move {
                    match at {
                        0 => port.write(&cx, at, vec![7; 4096].into(), WriteFlags::empty()).await,
                        4096 => port.write_zeroes(&cx, at, 4096, ZeroFlags::empty()).await,
                        _ => port.discard(&cx, at, 4096).await,
                    }
                    .unwrap();
                    done.set(done.get() + 1);
                });
            }
            rt::sleep(std::time::Duration::from_secs(1)).await;
            assert_eq!(done.get(), 0);
            edge.point_at(new.clone());
            drop(held);
            rt::sleep(std::time::Duration::from_secs(1)).await;
            assert_eq!(done.get(), 3);
            assert_eq!(new.read_vec(&cx, 0, 4096).await.unwrap()[..], [7; 4096]);
            assert_eq!(old.read_vec(&cx, 0, 4096).await.unwrap()[..], [0; 4096]);
            let buf = port.read(&cx, 0, BytesMut::zeroed(512)).await.unwrap();
            assert_eq!(buf[..], [7; 512]);
        });
    }
}
