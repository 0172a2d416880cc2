//! `block-set-write-threshold`: a manager is told once when a guest writes behind a byte of a node.
//!
//! The first write (or zeroes) that ends behind it disarms the threshold and is told of, on whichever reactor it comes.
//! Nobody waits for that. A threshold goes with its node, and is not kept for the next daemon, as
//! QEMU's is not: a manager sets it again. While one is set, each change of the node pays what a dirty bitmap costs.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_listener::Event as Signal;
use futures_util::future::LocalBoxFuture;
use infill_base::{Ctx, IoResult};
use infill_node::{Change, ChangeKind, Kept, NodeHandle, Watcher, Watching, WeakNode};
use infill_qmp::QmpError;
use infill_storage::rt;
use serde_json::json;

use super::control::{Control, refused};
use crate::blockdev::hold;

/// It is armed: no write has come.
const ARMED: u64 = 0;
/// It was taken away. (No write ends there: a disk has fewer bytes.)
const GONE: u64 = u64::MAX;

struct Threshold {
    at: u64,
    /// [`ARMED`], [`GONE`], or where the write ended that has passed it.
    end: AtomicU64,
    came: Signal,
}

impl Threshold {
    /// Ends it; only the first one does.
    fn end(&self, end: u64) {
        if self.end.compare_exchange(ARMED, end, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            self.came.notify(usize::MAX);
        }
    }

    async fn ended(&self) -> u64 {
        loop {
            let came = self.came.listen();
            match self.end.load(Ordering::Acquire) {
                ARMED => came.await,
                end => return end,
            }
        }
    }
}

impl Watcher for Threshold {
    fn before<'a>(&'a self, _cx: &'a Ctx, change: &'a Change) -> Option<LocalBoxFuture<'a, IoResult<Kept>>> {
        let end = change.at.saturating_add(change.len);
        if end > self.at && !matches!(change.what, ChangeKind::Discard) {
            self.end(end);
        }
        None
    }
}

/// A threshold that was set.
struct Set {
    threshold: Arc<Threshold>,
    node: WeakNode,
    _watching: Watching,
}

impl Drop for Set {
    fn drop(&mut self) {
        self.threshold.end(GONE);
    }
}

/// The thresholds, by the names of their nodes.
#[derive(Default)]
pub struct Thresholds(RefCell<BTreeMap<String, Set>>);

impl Thresholds {
    /// The threshold of a node; 0 where none is armed.
    pub fn of(&self, name: &str, node: &NodeHandle) -> u64 {
        let set = self.0.borrow();
        let Some(set) = set.get(name) else { return 0 };
        let is_armed = set.threshold.end.load(Ordering::Acquire) == ARMED;
        let is_its = set.node.upgrade().is_some_and(|its| its.is_same(node));
        if is_armed && is_its { set.threshold.at } else { 0 }
    }

    /// Takes that of a node away, and those of nodes that are gone.
    pub fn clear(&self, name: &str) {
        self.0.borrow_mut().retain(|other, set| other != name && set.node.upgrade().is_some());
    }
}

impl Control {
    /// `block-set-write-threshold`.
    pub(super) async fn set_write_threshold(self: &Rc<Self>, name: String, at: u64) -> Result<(), QmpError> {
        let missing = |_| QmpError::generic(format!("Device '{name}' not found"));
        let node = self.blockdevs().get(&name).map_err(missing)?;
        if at == 0 {
            self.thresholds.clear(&name);
            return Ok(());
        }
        let held = hold(&name, &node).await.map_err(|error| refused(&error))?;
        self.thresholds.clear(&name);
        let threshold = Arc::new(Threshold { at, end: AtomicU64::new(ARMED), came: Signal::new() });
        let watching = held.watch(threshold.clone());
        let set = Set { threshold: threshold.clone(), node: node.downgrade(), _watching: watching };
        self.thresholds.0.borrow_mut().insert(name.clone(), set);
        rt::spawn(self.clone().tell_threshold(name, threshold));
        Ok(())
    }

    /// Tells when the threshold is passed, unless it is taken away before.
    async fn tell_threshold(self: Rc<Self>, node: String, threshold: Arc<Threshold>) {
        let end = threshold.ended().await;
        if end == GONE {
            return;
        }
        {
            // It need not be asked any more, unless another one has been set meanwhile.
            let mut set = self.thresholds.0.borrow_mut();
            if set.get(&node).is_some_and(|set| Arc::ptr_eq(&set.threshold, &threshold)) {
                set.remove(&node);
            }
        }
        let data = json!({
            "node-name": node,
            "write-threshold": threshold.at,
            "amount-exceeded": end - threshold.at,
        });
        self.tell("BLOCK_WRITE_THRESHOLD", data);
    }
}
