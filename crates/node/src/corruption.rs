//! Who is told that an image contradicts itself: once for each node, when a request first meets it.

use std::sync::OnceLock;

use infill_base::IoError;
use infill_storage::sync::atomic::{AtomicBool, Ordering};

/// What is called, on whichever reactor the request came.
type Listener = dyn Fn(&IoError) + Send + Sync;

/// The listener of one node.
#[derive(Default)]
pub(crate) struct Corruption {
    listener: OnceLock<Box<Listener>>,
    told: AtomicBool,
}

impl Corruption {
    /// Has `listener` told; the first one stays.
    pub(crate) fn listen(&self, listener: impl Fn(&IoError) + Send + Sync + 'static) {
        let _first = self.listener.set(Box::new(listener));
    }

    /// A request has failed with it.
    pub(crate) fn tell(&self, error: &IoError) {
        if let Some(listener) = self.listener.get()
            && !self.told.swap(true, Ordering::Relaxed)
        {
            listener(error);
        }
    }
}
