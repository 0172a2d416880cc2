//! The NBD server and its exports.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use infill_io::{Address, Listener};
use infill_nbd::{Export, ExportError, Exports, Removal, Server, ServerLimits};
use infill_node::{BitmapUse, Edge};
use infill_qmp::{BitmapRef, BlockExportOptions, NbdServerOptions, QmpError, RemoveMode, SocketAddress};
use infill_storage::rt;
use serde_json::{Value, json};

use super::chardev::{bind, inherit};
use super::control::{Control, refused};
use crate::authz::Authz;
use crate::blockdev::Access;
use crate::listen::Listening;
use crate::tls::Credentials;

/// The NBD server.
enum NbdServer {
    /// Its socket listens, and options are still carried out: nobody is answered yet.
    Waiting { listener: Listener, server: Server, most: usize },
    /// It serves.
    Serving(Listening),
}

/// One export.
struct Entry {
    /// The node, which jobs may exchange.
    edge: Edge,
    name: String,
    shutting_down: bool,
    /// Whether its node may become inactive.
    allows_inactive: bool,
    /// What clients are told of, which nobody changes meanwhile.
    _bitmaps: Vec<BitmapUse>,
}

/// All exports.
#[derive(Default)]
pub struct Exported {
    registry: Exports,
    server: RefCell<Option<NbdServer>>,
    /// The credentials of the server, which are in use while it is there.
    credentials: RefCell<Option<Arc<Credentials>>>,
    /// And what says who may come in.
    authz: RefCell<Option<Arc<Authz>>>,
    /// By id.
    entries: RefCell<BTreeMap<String, Entry>>,
    /// Whether options are all carried out.
    open: Cell<bool>,
}

fn user(id: &str) -> String {
    format!("export '{id}'")
}

impl Control {
    /// Begins to answer clients: every option was carried out.
    pub fn open_for_clients(&self) {
        self.exported.open.set(true);
        let mut slot = self.exported.server.borrow_mut();
        *slot = match slot.take() {
            Some(NbdServer::Waiting { listener, server, most }) => {
                Some(NbdServer::Serving(Listening::start(listener, server, self.reactors.clone(), most)))
            }
            other => other,
        };
    }

    /// `nbd-server-start`, `--nbd-server`.
    pub async fn nbd_server_start(&self, options: &NbdServerOptions) -> Result<(), QmpError> {
        if self.exported.server.borrow().is_some() {
            return Err(QmpError::generic("NBD server already running"));
        }
        let mut limits = ServerLimits::default();
        if let Some(seconds) = options.handshake_max_seconds.filter(|seconds| *seconds > 0) {
            // The limit of the server itself stays the upper bound.
            limits.handshake_time = limits.handshake_time.min(Duration::from_secs(seconds.into()));
        }
        if let Some(most) = options.max_connections {
            limits.connections_max = limits.connections_max.min(most as usize);
        }
        let most = limits.connections_max;
        let credentials = options.tls_creds.as_ref().map(|id| self.blockdevs().objects().tls(id)).transpose();
        let credentials = credentials.map_err(|error| refused(&error))?;
        let tls = credentials.as_ref().map(|credentials| credentials.server_tls()).transpose();
        let mut tls = tls.map_err(|error| refused(&error))?;
        let authz = options.tls_authz.as_ref().map(|id| self.blockdevs().objects().authz(id)).transpose();
        let authz = authz.map_err(|error| refused(&error))?;
        if let Some(authz) = &authz {
            if credentials.as_ref().is_some_and(|credentials| !credentials.verify_peer) {
                return Err(QmpError::generic(
                    "'tls-authz' needs credentials with verify-peer=on: else anybody can show any name",
                ));
            }
            let decides = authz.clone();
            tls = tls.map(|tls| tls.admitting(Arc::new(move |identity| decides.allows(identity))));
        }
        let listener = match &options.addr {
            SocketAddress::Inet { host, port } => {
                bind(&Address::Tcp { host: host.clone(), port: *port }).await?
            }
            SocketAddress::Unix { path } => bind(&Address::Unix(path.into())).await?,
            SocketAddress::Fd { number } => inherit(*number)?,
        };
        // Another monitor may have been quicker while the port was waited for.
        if self.exported.server.borrow().is_some() {
            return Err(QmpError::generic("NBD server already running"));
        }
        let server = Server::over(self.exported.registry.clone(), limits, tls);
        let server = if self.exported.open.get() {
            NbdServer::Serving(Listening::start(listener, server, self.reactors.clone(), most))
        } else {
            NbdServer::Waiting { listener, server, most }
        };
        *self.exported.server.borrow_mut() = Some(server);
        *self.exported.credentials.borrow_mut() = credentials;
        *self.exported.authz.borrow_mut() = authz;
        Ok(())
    }

    /// `nbd-server-stop`: all exports go, hard, and then the socket.
    pub(super) async fn nbd_server_stop(self: &Rc<Self>) -> Result<(), QmpError> {
        let server = self.exported.server.borrow_mut().take();
        let server = server.ok_or_else(|| QmpError::generic("NBD server not running"))?;
        let ids: Vec<String> = self.exported.entries.borrow().keys().rev().cloned().collect();
        let mut removals = Vec::new();
        for id in ids {
            // One that is shutting down already is told of by whoever took it away.
            if let Some(removal) = self.take_away(&id, RemoveMode::Hard)? {
                removals.push((id, removal));
            }
        }
        for (id, removal) in removals {
            removal.gone().await;
            self.export_is_gone(&id);
        }
        if let NbdServer::Serving(listening) = server {
            listening.stop();
            listening.drained().await;
        }
        *self.exported.credentials.borrow_mut() = None;
        *self.exported.authz.borrow_mut() = None;
        Ok(())
    }

    /// Completes when there has been a client, and none is left.
    pub async fn last_client_gone(&self) {
        loop {
            let changed = {
                let server = self.exported.server.borrow();
                let Some(NbdServer::Serving(listening)) = &*server else { return };
                let changed = listening.changed();
                if listening.chosen() > 0 && listening.connections() == 0 {
                    return;
                }
                changed
            };
            changed.await;
        }
    }

    /// Everything that clients use goes; what they have in flight is answered first.
    pub async fn close_exports(self: &Rc<Self>) {
        let stopped = self.nbd_server_stop().await;
        if let Err(error) = stopped {
            // There was none, and so there are no exports.
            tracing::debug!(%error, "at the end");
        }
    }

    /// `block-export-add`, `--export`.
    pub fn block_export_add(&self, options: BlockExportOptions) -> Result<(), QmpError> {
        let BlockExportOptions { id, node_name, writable, .. } = &options;
        if self.exported.entries.borrow().contains_key(id) {
            return Err(QmpError::generic(format!("Block export id '{id}' is already in use")));
        }
        let facts = self
            .blockdevs()
            .facts(node_name)
            .map_err(|_| QmpError::generic(format!("Cannot find device='' nor node-name='{node_name}'")))?;
        if *writable && facts.read_only {
            return Err(QmpError::generic("Cannot export read-only node as writable"));
        }
        if let Some(iothread) =
            options.iothread.as_ref().filter(|id| !self.blockdevs().objects().has_iothread(id))
        {
            return Err(QmpError::generic(format!("iothread \"{iothread}\" not found")));
        }
        if self.exported.server.borrow().is_none() {
            return Err(QmpError::generic("NBD server not running"));
        }
        let bitmaps = self.bitmaps_to_export(&options, facts.read_only)?;
        let name = options.export_name().to_owned();
        let access = if *writable { Access::Writer } else { Access::Reader };
        let edge =
            self.blockdevs().claim_edge(node_name, &user(id), access).map_err(|error| refused(&error))?;
        let description = options.description.clone().unwrap_or_default();
        let export = Export {
            description,
            writable: *writable,
            writethrough: options.writethrough,
            allocation_depth: options.allocation_depth,
            bitmaps: bitmaps.iter().map(|used| used.bitmap().clone()).collect(),
            ..Export::new(name.clone(), self.migrations.before(&name, &edge))
        };
        if let Err(error) = self.exported.registry.add(export) {
            self.blockdevs().release(node_name, &user(id));
            return Err(QmpError::generic(match error {
                ExportError::Duplicate(_) => format!("NBD server already has export named '{name}'"),
                other => other.to_string(),
            }));
        }
        // One that only reads loses no write; but a daemon that comes after this one would make its node active for it.
        let allows_inactive = options.allow_inactive || !(*writable || self.keeps_state());
        let entry = Entry { edge, name, shutting_down: false, allows_inactive, _bitmaps: bitmaps };
        self.exported.entries.borrow_mut().insert(options.id, entry);
        Ok(())
    }

    /// `nbd-server-add`: what cannot be written to is offered read-only, whatever was asked for.
    pub(super) fn nbd_server_add(&self, options: BlockExportOptions) -> Result<(), QmpError> {
        let device = &options.node_name;
        let missing =
            |_| QmpError::generic(format!("Cannot find device='{device}' nor node-name='{device}'"));
        let facts = self.blockdevs().facts(device).map_err(missing)?;
        let writable = options.writable && !facts.read_only;
        self.block_export_add(BlockExportOptions { writable, ..options })
    }

    /// The bitmaps that an export tells of. One without a node is looked for down the chain.
    fn bitmaps_to_export(
        &self,
        options: &BlockExportOptions,
        node_read_only: bool,
    ) -> Result<Vec<BitmapUse>, QmpError> {
        let mut used: Vec<BitmapUse> = Vec::new();
        for BitmapRef { node, name } in &options.bitmaps {
            let bitmap = match node {
                Some(node) => self.bitmap(node, name)?.1,
                None => {
                    let layers = self.blockdevs().chain_with_filters(&options.node_name);
                    let mut found =
                        layers.iter().filter_map(|layer| self.blockdevs().get(layer).ok()?.bitmap(name).ok());
                    let missing = || QmpError::generic(format!("Bitmap '{name}' is not found"));
                    found.next().ok_or_else(missing)?
                }
            };
            if used.iter().any(|earlier| Arc::ptr_eq(earlier.bitmap(), &bitmap)) {
                continue;
            }
            let use_ = bitmap.use_readable().map_err(|error| QmpError::generic(error.to_string()))?;
            if !options.writable && !node_read_only && bitmap.is_recording() {
                let why = format!("Enabled bitmap '{name}' incompatible with readonly export");
                return Err(QmpError::generic(why));
            }
            used.push(use_);
        }
        Ok(used)
    }

    /// Whether this user of a node, which is no node, lets it become inactive.
    pub(super) fn lets_be_inactive(&self, who: &str) -> bool {
        self.exported.entries.borrow().iter().any(|(id, entry)| entry.allows_inactive && user(id) == who)
    }

    /// The export of that name: its id, and its node.
    pub(super) fn export_of(&self, name: &str) -> Option<(String, String)> {
        let entries = self.exported.entries.borrow();
        let (id, entry) = entries.iter().find(|(_, entry)| entry.name == name && !entry.shutting_down)?;
        Some((id.clone(), self.blockdevs().graph().name_of(&entry.edge.node())?))
    }

    /// Clients that come from now on and want the export of that name are told why they may not have it; `None`: they may.
    pub(super) fn deny_clients(&self, name: &str, why: Option<String>) {
        self.exported.registry.deny(name, why);
    }

    /// Takes an export away, with its clients, and waits until it is gone; it may be gone already.
    pub(super) async fn end_export(&self, id: &str) -> Result<(), QmpError> {
        if !self.exported.entries.borrow().contains_key(id) {
            return Ok(());
        }
        if let Some(removal) = self.take_away(id, RemoveMode::Hard)? {
            removal.gone().await;
            self.export_is_gone(id);
        }
        Ok(())
    }

    /// `block-export-del`.
    pub(super) fn block_export_del(self: &Rc<Self>, id: &str, mode: RemoveMode) -> Result<(), QmpError> {
        if !self.exported.entries.borrow().contains_key(id) {
            return Err(QmpError::generic(format!("Export '{id}' is not found")));
        }
        let moving = self.exported.entries.borrow().get(id).and_then(|entry| {
            let node = self.blockdevs().graph().name_of(&entry.edge.node())?;
            self.migrations.on_node(&node).filter(|_| self.migrations.names(&entry.name))
        });
        if let Some(migration) = moving {
            let why = format!("Export '{id}' is in use: its disk is in migration {migration}");
            return Err(QmpError::generic(why));
        }
        let Some(removal) = self.take_away(id, mode)? else {
            return Err(QmpError::generic(format!("Export '{id}' is already shutting down")));
        };
        if removal.gone().now_or_never().is_some() {
            self.export_is_gone(id);
            return Ok(());
        }
        let (control, id) = (self.clone(), id.to_owned());
        rt::spawn(async move {
            removal.gone().await;
            control.export_is_gone(&id);
        });
        Ok(())
    }

    /// Offers the export no longer. `None`: it is shutting down already.
    fn take_away(&self, id: &str, mode: RemoveMode) -> Result<Option<Removal>, QmpError> {
        let mut entries = self.exported.entries.borrow_mut();
        let Some(entry) = entries.get_mut(id).filter(|entry| !entry.shutting_down) else { return Ok(None) };
        let mode = match mode {
            RemoveMode::Safe => infill_nbd::RemoveMode::Safe,
            RemoveMode::Hard => infill_nbd::RemoveMode::Hard,
        };
        let removal = self.exported.registry.remove(&entry.name, mode).map_err(|error| {
            QmpError::generic(match error {
                ExportError::InUse { .. } => format!("export '{id}' still in use"),
                other => other.to_string(),
            })
        })?;
        entry.shutting_down = true;
        Ok(Some(removal))
    }

    /// The last request of the export has ended.
    fn export_is_gone(&self, id: &str) {
        let Some(entry) = self.exported.entries.borrow_mut().remove(id) else { return };
        if let Some(node) = self.blockdevs().graph().name_of(&entry.edge.node()) {
            self.blockdevs().release(&node, &user(id));
        }
        self.tell("BLOCK_EXPORT_DELETED", json!({ "id": id }));
    }

    /// The names of nodes that clients have.
    pub(super) fn exported_nodes(&self) -> Vec<String> {
        let entries = self.exported.entries.borrow();
        entries.values().filter_map(|entry| self.blockdevs().graph().name_of(&entry.edge.node())).collect()
    }

    /// `query-block-exports`.
    pub(super) fn query_block_exports(&self) -> Value {
        let entries = self.exported.entries.borrow();
        let told = entries.iter().map(|(id, entry)| {
            json!({
                "node-name": self.blockdevs().graph().name_of(&entry.edge.node()),
                "shutting-down": entry.shutting_down,
                "type": "nbd",
                "id": id,
            })
        });
        told.chain(self.state.iter().flat_map(|state| state.held_exports())).collect()
    }
}
