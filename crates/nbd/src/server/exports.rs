//! The exports of a server, and who uses them.
//!
//! An export that is removed cannot be opened any more at once; it is *gone* when its last connection has ended, and
//! with it its last request. Only then the hook is told, and the node is given up.

use std::collections::BTreeMap;
use std::fmt;

use event_listener::{Event, EventListener};
use infill_base::{align_down, align_up};
use infill_node::{Bitmap, Edge, Through};
use infill_storage::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use infill_storage::sync::{Arc, Mutex, lock};

use super::limits::{EXPORT_BITMAPS_MAX, EXPORTS_MAX, ServerLimits};
use crate::proto::{
    CONTEXT_BITMAP_PREFIX, ExportInfo, Info, Mode, PAYLOAD_BYTES_MAX, STRING_BYTES_MAX, TransmissionFlags,
};

/// Largest minimum block size that the protocol allows, in bytes.
const BLOCK_BYTES_MIN_MAX: u32 = 64 << 10;
/// Smallest preferred block size that we advertise, in bytes.
const BLOCK_BYTES_PREFERRED_MIN: u32 = 4096;

/// A node that is offered to clients.
#[derive(Clone, Debug)]
pub struct Export {
    /// By which clients choose it; may be empty.
    pub name: String,
    /// For people; empty where there is none.
    pub description: String,
    /// What is offered: whoever has the edge may put another node there, which is then served to the clients that are
    /// connected too.
    pub node: Edge,
    /// Whether clients may write. The node must be writable too.
    pub writable: bool,
    /// Whether every write is on stable storage before it is answered, as if each had FUA.
    pub writethrough: bool,
    /// Whether the context `qemu:allocation-depth` is offered.
    pub allocation_depth: bool,
    /// Dirty bitmaps, each offered as a context `qemu:dirty-bitmap:NAME`.
    pub bitmaps: Vec<Arc<Bitmap>>,
}

impl Export {
    /// A read-only export without a description.
    pub fn new(name: impl Into<String>, node: impl Into<Edge>) -> Export {
        Export {
            name: name.into(),
            description: String::new(),
            node: node.into(),
            writable: false,
            writethrough: false,
            allocation_depth: false,
            bitmaps: Vec::new(),
        }
    }
}

/// Why an export could not be added or removed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExportError {
    /// There is one of this name.
    Duplicate(String),
    /// There is none of this name.
    NotFound(String),
    /// Clients are connected, and it was to be removed only without.
    InUse {
        /// Its name.
        name: String,
        /// How many.
        connections: usize,
    },
    /// The name, the description or the node does not fit.
    Refused(String),
}

impl fmt::Display for ExportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExportError::Duplicate(name) => write!(f, "there is an NBD export named '{name}' already"),
            ExportError::NotFound(name) => write!(f, "there is no NBD export named '{name}'"),
            ExportError::InUse { name, connections } => {
                write!(
                    f,
                    "the NBD export '{name}' is in use by {connections} connections; remove it with mode hard"
                )
            }
            ExportError::Refused(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for ExportError {}

/// How an export is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemoveMode {
    /// Only if no client is connected.
    Safe,
    /// Clients are disconnected: what they have in flight is finished, further requests fail with ESHUTDOWN.
    Hard,
}

/// What [`Exports::list`] tells of an export.
#[derive(Clone, Debug)]
pub struct ExportStatus {
    /// The export.
    pub export: Export,
    /// Connections that use it.
    pub connections: usize,
}

/// Told of each export once it is gone, on the thread where its last connection ended.
type GoneHook = Box<dyn Fn(&Export) + Send + Sync>;

/// The registry. Cloning shares it.
#[derive(Clone, Default)]
pub struct Exports(Arc<Registry>);

#[derive(Default)]
struct Registry {
    entries: Mutex<BTreeMap<String, Arc<Entry>>>,
    hook: Mutex<Option<Arc<GoneHook>>>,
    /// Names that new connections may not choose, each with why, whether there is such an export or not.
    denied: Mutex<BTreeMap<String, String>>,
}

struct Entry {
    export: Export,
    registry: Arc<Registry>,
    /// Attached connections. Raised only under the lock of the map, so that a removal sees them all.
    ///
    /// This and `closing` are written by one side and then read by the other, in both directions: that needs one
    /// order of all (SeqCst), or a last connection and a removal could each believe that the other tells.
    connections: AtomicUsize,
    closing: AtomicBool,
    told: AtomicBool,
    changed: Event,
}

impl Exports {
    /// No exports.
    pub fn new() -> Exports {
        Exports::default()
    }

    /// Has `hook` told of each export that is gone (`BLOCK_EXPORT_DELETED`). It must not call back.
    pub fn on_gone(&self, hook: impl Fn(&Export) + Send + Sync + 'static) {
        *lock(&self.0.hook) = Some(Arc::new(Box::new(hook)));
    }

    /// Offers `export` from now on.
    pub fn add(&self, export: Export) -> Result<(), ExportError> {
        check(&export)?;
        let mut entries = lock(&self.0.entries);
        if entries.contains_key(&export.name) {
            return Err(ExportError::Duplicate(export.name));
        }
        if entries.len() >= EXPORTS_MAX {
            return Err(ExportError::Refused(format!("at most {EXPORTS_MAX} exports are offered at once")));
        }
        let name = export.name.clone();
        let entry = Entry {
            export,
            registry: self.0.clone(),
            connections: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
            told: AtomicBool::new(false),
            changed: Event::new(),
        };
        entries.insert(name, Arc::new(entry));
        Ok(())
    }

    /// Stops offering an export. It is gone when the [`Removal`] says so, which need not be waited for.
    pub fn remove(&self, name: &str, mode: RemoveMode) -> Result<Removal, ExportError> {
        let entry = {
            let mut entries = lock(&self.0.entries);
            let entry = entries.get(name).ok_or_else(|| ExportError::NotFound(name.to_owned()))?;
            let connections = entry.connections.load(Ordering::SeqCst);
            if mode == RemoveMode::Safe && connections > 0 {
                return Err(ExportError::InUse { name: name.to_owned(), connections });
            }
            let entry = entry.clone();
            entries.remove(name);
            entry
        };
        entry.closing.store(true, Ordering::SeqCst);
        entry.changed.notify(usize::MAX);
        entry.tell_if_gone();
        Ok(Removal(entry))
    }

    /// Connections that choose this name from now on are told `why` they may not, whether there is such an export or not;
    /// those that it has stay. `None`: they may.
    pub fn deny(&self, name: &str, why: Option<String>) {
        let mut denied = lock(&self.0.denied);
        match why {
            Some(why) => drop(denied.insert(name.to_owned(), why)),
            None => drop(denied.remove(name)),
        }
    }

    /// Why new connections may not choose this name.
    pub(super) fn denied(&self, name: &str) -> Option<String> {
        lock(&self.0.denied).get(name).cloned()
    }

    /// Stops offering all of them, hard.
    pub fn remove_all(&self) -> Vec<Removal> {
        let names: Vec<String> = lock(&self.0.entries).keys().cloned().collect();
        names.iter().filter_map(|name| self.remove(name, RemoveMode::Hard).ok()).collect()
    }

    /// The export of this name.
    pub fn get(&self, name: &str) -> Option<Export> {
        lock(&self.0.entries).get(name).map(|entry| entry.export.clone())
    }

    /// All of them, in the order of their names.
    pub fn list(&self) -> Vec<ExportStatus> {
        let status = |entry: &Arc<Entry>| ExportStatus {
            export: entry.export.clone(),
            connections: entry.connections.load(Ordering::SeqCst),
        };
        lock(&self.0.entries).values().map(status).collect()
    }

    /// Counts a connection in, which the export stays for until it is dropped.
    pub(super) fn attach(&self, name: &str) -> Option<Attached> {
        let entries = lock(&self.0.entries);
        let entry = entries.get(name).filter(|_| self.denied(name).is_none())?;
        entry.connections.fetch_add(1, Ordering::SeqCst);
        Some(Attached(entry.clone()))
    }
}

/// An export that is being removed.
#[must_use = "it is gone only when its last request has ended"]
pub struct Removal(Arc<Entry>);

impl Removal {
    /// Waits until its last connection, and with it its last request, has ended.
    pub async fn gone(&self) {
        loop {
            let changed = self.0.changed.listen();
            if self.0.connections.load(Ordering::SeqCst) == 0 {
                return;
            }
            changed.await;
        }
    }
}

/// A connection's use of an export.
pub(super) struct Attached(Arc<Entry>);

impl Attached {
    pub(super) fn export(&self) -> &Export {
        &self.0.export
    }

    pub(super) fn is_closing(&self) -> bool {
        self.0.closing.load(Ordering::SeqCst)
    }

    /// Fires when the export begins to close, or another of its connections ends.
    pub(super) fn changed(&self) -> EventListener {
        self.0.changed.listen()
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if self.0.connections.fetch_sub(1, Ordering::SeqCst) == 1 && self.is_closing() {
            self.0.changed.notify(usize::MAX);
            self.0.tell_if_gone();
        }
    }
}

impl Entry {
    fn tell_if_gone(&self) {
        let gone = self.closing.load(Ordering::SeqCst) && self.connections.load(Ordering::SeqCst) == 0;
        if gone && !self.told.swap(true, Ordering::SeqCst) {
            let hook = lock(&self.registry.hook).clone();
            if let Some(hook) = hook {
                hook(&self.export);
            }
        }
    }
}

fn check(export: &Export) -> Result<(), ExportError> {
    let refused = |why: String| Err(ExportError::Refused(why));
    for (what, text) in [("name", &export.name), ("description", &export.description)] {
        if text.len() > STRING_BYTES_MAX || text.contains('\0') {
            return refused(format!(
                "the {what} of an NBD export has at most {STRING_BYTES_MAX} bytes and no NUL"
            ));
        }
    }
    if export.bitmaps.len() > EXPORT_BITMAPS_MAX {
        return refused(format!("at most {EXPORT_BITMAPS_MAX} bitmaps of one NBD export are offered"));
    }
    for bitmap in &export.bitmaps {
        if CONTEXT_BITMAP_PREFIX.len() + bitmap.name().len() > STRING_BYTES_MAX
            || bitmap.name().contains('\0')
        {
            return refused(format!("the name of the bitmap '{}' cannot be told over NBD", bitmap.name()));
        }
    }
    let limits = export.node.node_limits();
    if export.writable && !limits.writable {
        return refused(format!("the export '{}' is to be writable, but its node is read-only", export.name));
    }
    if limits.request_align > BLOCK_BYTES_MIN_MAX {
        return refused(format!(
            "the node wants requests in multiples of {} bytes, NBD knows at most {BLOCK_BYTES_MIN_MAX}",
            limits.request_align
        ));
    }
    Ok(())
}

impl Export {
    /// Size and flags as a client of `mode` is told. Where the server takes one connection only, nobody is to open more and
    /// wait for them.
    pub(super) fn info(&self, mode: Mode, server: &ServerLimits) -> ExportInfo {
        let limits = self.node.node_limits();
        let mut flags = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_CACHE;
        flags.set(TransmissionFlags::READ_ONLY, !self.writable);
        flags.set(
            TransmissionFlags::SEND_TRIM
                | TransmissionFlags::SEND_WRITE_ZEROES
                | TransmissionFlags::SEND_FAST_ZERO,
            self.writable,
        );
        flags.set(TransmissionFlags::SEND_DF, mode >= Mode::Structured);
        flags.set(TransmissionFlags::CAN_MULTI_CONN, limits.multi_conn && server.connections_max > 1);
        ExportInfo { size: align_down(self.node.len(), limits.request_align.max(1).into()), flags }
    }

    /// Sizes of requests.
    pub(super) fn block_sizes(&self) -> Info {
        let limits = self.node.node_limits();
        let preferred = limits.preferred_bytes.clamp(BLOCK_BYTES_PREFERRED_MIN, PAYLOAD_BYTES_MAX);
        let preferred = align_up(preferred.into(), limits.request_align.max(1).into()) as u32;
        Info::BlockSize {
            min: limits.request_align.max(1),
            preferred: preferred.checked_next_power_of_two().unwrap_or(PAYLOAD_BYTES_MAX),
            max: PAYLOAD_BYTES_MAX,
        }
    }
}
