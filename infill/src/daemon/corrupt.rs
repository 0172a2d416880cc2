//! `BLOCK_IMAGE_CORRUPTED`: a manager is told once for each node whose image contradicts itself. Such an image is never marked
//! or changed by that (`fatal` is always false): the request fails, and everything else goes on.

use std::rc::Rc;
use std::sync::{Arc, Mutex};

use event_listener::Event as Signal;
use infill_storage::sync::lock;
use serde_json::json;

use super::control::Control;

/// What was found and not told yet: the node, and what is wrong.
#[derive(Default)]
struct Found {
    findings: Mutex<Vec<(String, String)>>,
    came: Signal,
}

/// What nodes find.
#[derive(Clone, Default)]
pub struct Corruptions(Arc<Found>);

impl Control {
    /// Nodes that were opened tell when they find their image corrupt.
    pub(super) fn listen_to_new_nodes(&self) {
        for (name, node) in self.blockdevs().graph().list() {
            let found = self.corruptions.0.clone();
            node.on_corruption(move |error| {
                let message = match error.range() {
                    Some((at, len)) => format!("{} (at byte {at}, {len} bytes)", error.message()),
                    None => error.message().to_owned(),
                };
                lock(&found.findings).push((name.clone(), message));
                found.came.notify(usize::MAX);
            });
        }
    }

    /// Tells what is found, as it is found, for ever.
    pub async fn tell_corruption(self: Rc<Self>) {
        let found = self.corruptions.0.clone();
        loop {
            let came = found.came.listen();
            let findings = std::mem::take(&mut *lock(&found.findings));
            if findings.is_empty() {
                came.await;
                continue;
            }
            for (node, message) in findings {
                let data = json!({ "device": "", "node-name": node, "msg": message, "fatal": false });
                self.tell("BLOCK_IMAGE_CORRUPTED", data);
            }
        }
    }
}
