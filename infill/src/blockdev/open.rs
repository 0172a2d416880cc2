//! Opening nodes. What is opened is put into the graph as a whole, or closed again.
//!
//! Order: a node's file child is opened and locked before anything of it is read; a chain is opened from the top down,
//! layer by layer in a loop, and its edges are put in from the bottom up, before anybody can ask for a byte.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use futures_util::future::LocalBoxFuture;
use infill_base::{Ctx, DetectZeroes, DiscardMode, ErrorKind, OpenError};
use infill_io::{Address, FileOptions, FileStorage, Share, connector};
use infill_nbd::{ClientOptions, NbdStorage, NbdUri, OnLost, ServerAddress, UriTls};
use infill_node::{BackingRef, Edge, Filter, NodeHandle, NodeStorage, RawNode};
use infill_qmp::{
    BackingOption, BlockdevOptions, BlockdevRef, ChildRole, Driver, Locking, NbdCredentials, SocketAddress,
};
use infill_storage::journal::Journaling;
use infill_storage::sync::lock;
use infill_storage::{NullStorage, StorageHandle};

use super::active::check_below;
use super::far::{Servers, Wanted};
use super::format::{FormatKind, FormatOptions, probe_storage};
use super::hold::{Access, Holds};
use super::journal::journaling;
use super::locate::{Located, locate};
use super::name::resolve_backing;
use super::secure::{Secured, secure};
use super::{Blockdevs, CHAIN_LAYERS_MAX, Entry, Image, NODE_NAME_BYTES_MAX, NodeFacts, Recipe};

/// One file or export, however it is called: a chain in which one comes twice is a loop.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Identity {
    File { device: u64, inode: u64 },
    Export(String),
}

/// A node that is open and not in the graph yet.
struct Pending {
    name: String,
    node: NodeHandle,
    entry: Entry,
    /// Of a filter: where it points at its file child, if another node can take that one's place.
    edge: Option<Edge>,
}

/// A filter that is open.
pub(super) struct Opened {
    pub(super) driver: &'static str,
    pub(super) node: NodeHandle,
    /// The node that it passes requests on to.
    pub(super) file: String,
    /// The node that it puts something aside on.
    pub(super) target: Option<String>,
    /// Where it points at `file`, if another node can take that one's place.
    pub(super) edge: Option<Edge>,
}

impl Opened {
    /// `filter` over the node `file`, which another one may take the place of.
    pub(super) fn over<F: Filter>(file: String, filter: F) -> Opened {
        let edge = Some(filter.below().clone());
        Opened { driver: F::DRIVER, node: NodeHandle::new(filter), file, target: None, edge }
    }
}

/// One description on its way into the graph.
pub struct Opening<'a> {
    pub(super) blockdevs: &'a Blockdevs,
    /// A file before what lies on it; layers from the top down.
    pending: Vec<Pending>,
    /// Holds that were taken on nodes of the graph.
    taken: Vec<(String, String)>,
    names: HashSet<String>,
    /// What the chain that is being opened lies on so far.
    chain: Vec<(Identity, String)>,
    /// Images that moved to another host are opened too, if read-only.
    fenced: bool,
    /// Of an NBD node: it is not waited for until its server is there, for its size is known.
    awaited_bytes: Option<u64>,
    /// Servers that were waited for before; those that are missing end the opening. `None`: they are waited for here.
    servers: Option<Servers>,
}

impl<'a> Opening<'a> {
    /// Nothing open yet. `fenced`: images that moved to another host may be opened too, read-only.
    pub fn new(blockdevs: &'a Blockdevs, fenced: bool) -> Opening<'a> {
        Opening {
            blockdevs,
            fenced,
            pending: Vec::new(),
            taken: Vec::new(),
            names: HashSet::new(),
            chain: Vec::new(),
            awaited_bytes: None,
            servers: None,
        }
    }

    /// As `self`; the NBD export that is opened has so many bytes, and its server may be away.
    pub fn awaiting(self, bytes: u64) -> Opening<'a> {
        Opening { awaited_bytes: Some(bytes), ..self }
    }

    /// As `self`; servers are waited for by the caller, who has them in `servers` then.
    pub fn waiting_outside(self, servers: Servers) -> Opening<'a> {
        Opening { servers: Some(servers), ..self }
    }

    /// What was given to [`Opening::waiting_outside`], with what is missing.
    pub fn take_servers(&mut self) -> Servers {
        self.servers.take().unwrap_or_default()
    }

    /// Puts everything into the graph.
    pub fn commit(self) -> Result<()> {
        let mut edges = Vec::new();
        for Pending { name, node, entry, edge } in self.pending {
            edges.extend(entry.facts.backing.clone().map(|below| (name.clone(), below)));
            let children = entry.facts.file.iter().chain(&entry.facts.target).cloned().collect();
            node.set_detect_zeroes(entry.facts.detect_zeroes);
            if !entry.facts.active {
                node.set_inactive(!entry.facts.read_only);
            }
            self.blockdevs.0.graph.insert(&name, node, children)?;
            if let (Some(edge), Some(file)) = (edge, &entry.facts.file) {
                self.blockdevs.0.graph.point(&name, file, edge);
            }
            lock(&self.blockdevs.0.entries).insert(name, entry);
        }
        for (above, below) in edges {
            self.blockdevs.0.graph.attach(&above, &below)?;
        }
        Ok(())
    }

    /// Closes everything, the last opened first.
    pub async fn abandon(mut self) {
        while let Some(Pending { name, node, entry, .. }) = self.pending.pop() {
            let path = entry.facts.file.as_deref().and_then(|file| self.locked_path(file));
            self.begin_own(path.as_deref());
            if let Err(error) = node.close(&Ctx::GUEST).await {
                tracing::warn!(%error, name, "closing after a failed open");
            }
            self.end_own(path.as_deref());
            drop((node, entry));
        }
        for (child, user) in self.taken {
            if let Some(entry) = lock(&self.blockdevs.0.entries).get_mut(&child) {
                entry.holds.give_back(&user, entry.file.as_deref());
            }
        }
    }

    /// Opens a description of any kind and gives the name of its node. `implicit`: it belongs to a parent.
    pub fn open(&mut self, options: BlockdevOptions, implicit: bool) -> LocalBoxFuture<'_, Result<String>> {
        Box::pin(async move {
            check_detect_zeroes(&options)?;
            match options.driver {
                Driver::File { .. } | Driver::Null { .. } | Driver::Nbd { .. } => {
                    self.open_protocol(options, implicit).await
                }
                Driver::CopyOnRead { .. } => self.open_copy_on_read(options, implicit).await,
                Driver::Blkdebug(_) => self.open_blkdebug(options, implicit).await,
                Driver::Compress { .. } => self.open_compress(options, implicit).await,
                Driver::Preallocate { .. } => self.open_preallocate(options, implicit).await,
                Driver::Throttle { .. } => self.open_throttle(options, implicit).await,
                Driver::CopyBeforeWrite { .. } => self.open_copy_before_write(options, implicit).await,
                Driver::SnapshotAccess { .. } => self.open_snapshot_access(options, implicit).await,
                Driver::Raw { .. } | Driver::Qcow2 { .. } | Driver::Qed { .. } => {
                    self.open_chain(options, implicit).await
                }
            }
        })
    }

    /// Opens an image that a person names.
    pub async fn open_image(&mut self, image: &Image) -> Result<String> {
        if image.force_share && !image.read_only {
            bail!("an image that is shared by force can only be opened read-only");
        }
        let settings = |options: BlockdevOptions| BlockdevOptions {
            read_only: Some(image.read_only),
            force_share: Some(image.force_share),
            discard: Some(image.discard),
            ..options
        };
        let mut options = match locate(&image.name)? {
            Located::Tree(options) => {
                if let Some(format) = image.format {
                    bail!(
                        "{}: it says its driver itself, so -f {} cannot be given",
                        image.name,
                        format.as_str()
                    );
                }
                options
            }
            Located::Protocol(protocol) => {
                let protocol = BlockdevOptions { discard: Some(DiscardMode::Unmap), ..settings(protocol) };
                let file = self.open(protocol, true).await.with_context(|| could_not(&image.name))?;
                let format = match image.format {
                    Some(format) => format,
                    None => self.probe_top(image, &file).await.with_context(|| could_not(&image.name))?,
                };
                format_options(format, BlockdevRef::Name(file))
            }
        };
        if image.alone {
            set_backing(&mut options, BackingOption::None);
        }
        self.open(settings(options), false).await.with_context(|| could_not(&image.name))
    }

    /// The format of an image that a person names without one.
    async fn probe_top(&self, image: &Image, file: &str) -> Result<FormatKind> {
        if self.blockdevs.0.policy.untrusted {
            bail!(
                "its format is not given, and with --untrusted it is not guessed: say -f raw, -f qcow2 or -f qed"
            );
        }
        let storage =
            self.pending_storage(file).ok_or_else(|| anyhow!("'{file}' has no bytes to look at"))?;
        match probe_storage(&storage).await? {
            Some(format) => Ok(format),
            None if image.read_only => Ok(FormatKind::Raw),
            None => bail!(
                "its first bytes are of no known format, so it may be raw; a guest that writes to a raw disk can make \
                 it look like another format, so say -f raw if it is"
            ),
        }
    }

    /// The node of that name, in the graph or on its way there.
    pub(super) fn node(&self, name: &str) -> Option<NodeHandle> {
        let pending = self.pending.iter().find(|pending| pending.name == name);
        pending.map(|pending| pending.node.clone()).or_else(|| self.blockdevs.0.graph.get(name).ok())
    }

    /// The storage of the protocol node of that name, in the graph or on its way there.
    pub(super) fn storage_of(&self, name: &str) -> Option<StorageHandle> {
        self.pending_storage(name).or_else(|| self.blockdevs.storage(name))
    }

    fn pending_storage(&self, name: &str) -> Option<StorageHandle> {
        let pending = self.pending.iter().find(|pending| pending.name == name)?;
        pending.entry.storage.clone()
    }

    /// Takes a name for a new node.
    pub(super) fn reserve_name(&mut self, wanted: Option<&String>) -> Result<String> {
        let name = match wanted {
            None => self.blockdevs.generated_name(),
            Some(name) => {
                let well_formed = name.len() <= NODE_NAME_BYTES_MAX
                    && name.starts_with(|first: char| first.is_ascii_alphabetic())
                    && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
                if !well_formed {
                    bail!("Invalid node-name: '{}'", name.escape_debug());
                }
                name.clone()
            }
        };
        if self.blockdevs.0.graph.get(&name).is_ok() || !self.names.insert(name.clone()) {
            bail!("Duplicate nodes with node-name='{name}'");
        }
        Ok(name)
    }

    async fn open_protocol(&mut self, options: BlockdevOptions, implicit: bool) -> Result<String> {
        let name = self.reserve_name(options.node_name.as_ref())?;
        let auto_read_only = options.auto_read_only.unwrap_or(false);
        let force_share = options.force_share.unwrap_or(false);
        if force_share && !options.is_read_only() {
            bail!("force-share=on can only be used with read-only images");
        }
        let driver = options.driver.as_str();
        let (mut disk, mut file, mut path) = (None, None, None);
        let (mut watch, mut credentials) = (None, None);
        let storage = match &options.driver {
            Driver::File { filename, locking, .. } => {
                let storage = Arc::new(open_file(Path::new(filename), &options)?);
                self.meet(file_identity(Path::new(filename))?, filename)?;
                file = (*locking != Locking::Off && !force_share).then(|| storage.clone());
                path = Some(PathBuf::from(filename));
                disk = Some(storage.clone());
                StorageHandle::from_arc(storage)
            }
            Driver::Null { size, latency_ns, read_zeroes } => StorageHandle::new(NullStorage {
                len: *size,
                latency: Duration::from_nanos(*latency_ns),
                tells_zero: *read_zeroes,
            }),
            Driver::Nbd { server, export, reconnect_delay, open_timeout, tls } => {
                let address = address_of(server)?;
                self.meet(Identity::Export(format!("{address}/{export}")), &address.to_string())?;
                let secured = tls.as_ref().map(|tls| secure(&self.blockdevs.0.objects, tls, &address));
                let (mut tls, mut uri_tls) = (None, None);
                if let Some(Secured { held, client, uri }) = secured.transpose()? {
                    (credentials, tls, uri_tls) = (Some(held), Some(client), Some(uri));
                }
                let client = ClientOptions {
                    export: export.clone(),
                    name: Some(uri_of(&address, export, uri_tls)),
                    tls,
                    read_only: options.is_read_only(),
                    on_lost: match reconnect_delay {
                        None => self.blockdevs.0.policy.on_lost,
                        Some(0) => OnLost::Fail,
                        Some(secs) => OnLost::Hold { limit: Some(Duration::from_secs((*secs).into())) },
                    },
                    ..ClientOptions::default()
                };
                let wanted = Wanted {
                    address,
                    client,
                    _credentials: credentials.clone(),
                    within: Duration::from_secs(open_timeout.unwrap_or(0).into()),
                    auto_read_only,
                };
                let storage = match (self.awaited_bytes, &mut self.servers) {
                    (Some(bytes), _) => {
                        NbdStorage::await_export(connector(&wanted.address), wanted.client, bytes)
                    }
                    (None, Some(servers)) => servers.connection(wanted)?,
                    (None, None) => wanted.connect().await?,
                };
                watch = Some(storage.watch());
                StorageHandle::new(storage)
            }
            _ => bail!("'{driver}' is no protocol"),
        };
        if !options.is_read_only() && !storage.limits().writable && !auto_read_only {
            bail!("{}: it takes no writes: open it with read-only=on", storage.name());
        }
        let read_only = options.is_read_only() || !storage.limits().writable;
        let node = RawNode::protocol(driver, storage.clone(), read_only).discarding(options.discard_mode());
        let facts = facts_of(&options, driver, read_only, implicit);
        let recipe =
            matches!(options.driver, Driver::File { .. }).then(|| Recipe::File(Box::new(options.clone())));
        let holds = Holds::default();
        let entry = Entry {
            facts,
            storage: Some(storage),
            disk,
            file,
            path,
            watch,
            _credentials: credentials,
            recipe,
            beside: false,
            holds,
        };
        self.pending.push(Pending { name: name.clone(), node: NodeHandle::new(node), entry, edge: None });
        Ok(name)
    }

    /// Refuses a chain that comes back to where it was.
    fn meet(&mut self, identity: Identity, filename: &str) -> Result<()> {
        if let Some((_, above)) = self.chain.iter().find(|(other, _)| *other == identity) {
            bail!("the backing chain is a loop: {filename} is already in it, as {above}");
        }
        self.chain.push((identity, filename.to_owned()));
        Ok(())
    }

    /// A child by reference or description, held by `parent`.
    pub(super) async fn child(
        &mut self,
        child: BlockdevRef,
        role: ChildRole,
        settings: &BlockdevOptions,
        parent: &str,
        access: Access,
    ) -> Result<(String, NodeHandle)> {
        let name = match child {
            BlockdevRef::Name(name) => name,
            BlockdevRef::Definition(mut options) => {
                options.inherit(settings, role);
                self.open(*options, true).await?
            }
        };
        let role = if role == ChildRole::Backing { "backing" } else { "file" };
        let active = settings.active.unwrap_or(true);
        let node = self.hold(&name, parent, access, active, role)?;
        Ok((name, node))
    }

    /// Holds the child `name`, which is open already, for a parent that is `active`.
    fn hold(
        &mut self,
        name: &str,
        parent: &str,
        access: Access,
        active: bool,
        role: &str,
    ) -> Result<NodeHandle> {
        let take = |entry: &mut Entry, user: &str| {
            check_below(name, entry.facts.active, role, parent, active)?;
            match active {
                true => entry.holds.take(name, user, access, entry.file.as_deref()),
                false => {
                    entry.holds.take_resting(user, access);
                    Ok(())
                }
            }
        };
        let user = format!("node '{parent}'");
        if let Some(pending) = self.pending.iter_mut().find(|pending| pending.name == name) {
            if access.writes() && pending.entry.facts.read_only {
                bail!("{} is read-only", pending.node.info().filename);
            }
            take(&mut pending.entry, &user)?;
            return Ok(pending.node.clone());
        }
        let unknown = |_| anyhow!("Cannot find device='{name}' nor node-name='{name}'");
        let node = self.blockdevs.0.graph.get(name).map_err(unknown)?;
        let mut entries = lock(&self.blockdevs.0.entries);
        let entry = entries.get_mut(name).ok_or_else(|| super::unknown(name))?;
        if access.writes() && entry.facts.read_only {
            bail!("Block node '{name}' is read-only");
        }
        take(entry, &user)?;
        self.taken.push((name.to_owned(), user));
        Ok(node)
    }

    /// Adds a node that lies on others as they are.
    pub(super) fn push_filter(
        &mut self,
        settings: &BlockdevOptions,
        implicit: bool,
        name: &str,
        filter: Opened,
    ) {
        let mut facts = facts_of(settings, filter.driver, settings.is_read_only(), implicit);
        (facts.file, facts.target) = (Some(filter.file), filter.target);
        let entry = Entry::without_storage(facts);
        self.pending.push(Pending { name: name.to_owned(), node: filter.node, entry, edge: filter.edge });
    }

    /// Opens one format node over its file child, without its backing: its name, and what its options say of that.
    async fn open_layer(
        &mut self,
        options: BlockdevOptions,
        implicit: bool,
    ) -> Result<(String, BackingOption)> {
        let settings = settings_of(&options);
        let name = self.reserve_name(options.node_name.as_ref())?;
        let mut open = FormatOptions {
            read_only: options.is_read_only(),
            fenced: self.fenced,
            discard: options.discard_mode(),
            metadata_cache_bytes: cache_bytes(&options.driver),
            journal: Journaling::Off,
        };
        let (format, file, backing, window) = match options.driver {
            Driver::Raw { file, offset: 0, size: None } => (FormatKind::Raw, file, BackingOption::None, None),
            Driver::Raw { file, offset, size } => {
                (FormatKind::Raw, file, BackingOption::None, Some((offset, size)))
            }
            Driver::Qcow2 { file, backing, .. } => (FormatKind::Qcow2, file, backing, None),
            Driver::Qed { file, backing } => (FormatKind::Qed, file, backing, None),
            _ => bail!("not a format"),
        };
        // As others have it: the file of a layer below an inactive image is inactive with it, that of the image itself is not.
        let file = match file {
            BlockdevRef::Definition(mut file) if implicit && settings.active == Some(false) => {
                file.active = file.active.or(settings.active);
                BlockdevRef::Definition(file)
            }
            file => file,
        };
        let access = match (open.read_only, window) {
            (true, _) => Access::Stable,
            // Several windows of one file may be open side by side.
            (false, Some(_)) => Access::Writer,
            (false, None) => Access::Owner,
        };
        let (file, below) = self.child(file, ChildRole::ImageFile, &settings, &name, access).await?;
        // A format lies on the storage itself where there is one: no step more for a read, and a write is seen by the node.
        let storage = match self.storage_of(&file) {
            Some(storage) => below.on_storage(storage),
            None => StorageHandle::new(NodeStorage::new(below)),
        };
        if format != FormatKind::Raw {
            self.must_answer(&file)?;
        }
        let read_only = open.read_only;
        // Until it is active, nobody has the right to write to it.
        open.read_only |= settings.active == Some(false);
        if format != FormatKind::Raw {
            open.journal = self.journaling(&file, &storage)?;
        }
        let recipe = window.is_none().then_some(Recipe::Format {
            format,
            discard: open.discard,
            metadata_cache_bytes: open.metadata_cache_bytes,
        });
        let node = match window {
            None => {
                let path = self.locked_path(&file);
                self.begin_own(path.as_deref());
                let opened = format.open(storage, open).await;
                self.end_own(path.as_deref());
                opened?
            }
            Some((offset, size)) => {
                let size = size.unwrap_or(storage.len().saturating_sub(offset));
                let node = RawNode::window(storage, offset, size, open.read_only)?;
                NodeHandle::new(node.discarding(open.discard))
            }
        };
        let mut facts = facts_of(&settings, format.as_str(), read_only, implicit);
        facts.file = Some(file);
        let entry = Entry { recipe, ..Entry::without_storage(facts) };
        self.pending.push(Pending { name: name.clone(), node, entry, edge: None });
        Ok((name, backing))
    }

    /// Refuses to read what lies on a server, where servers are waited for elsewhere, until it has answered a read.
    fn must_answer(&mut self, file: &str) -> Result<()> {
        let Some(mut servers) = self.servers.take() else { return Ok(()) };
        let storage = self.far_storage(file);
        let answers = storage.map_or(Ok(()), |storage| servers.answers(&storage));
        self.servers = Some(servers);
        answers
    }

    /// The storage that a node lies on, file child by file child, if that is on a server.
    fn far_storage(&self, name: &str) -> Option<StorageHandle> {
        let facts = |name: &str| match self.pending.iter().find(|pending| pending.name == name) {
            Some(pending) => Some(pending.entry.facts.clone()),
            None => self.blockdevs.facts(name).ok(),
        };
        let mut bottom = name.to_owned();
        loop {
            let NodeFacts { driver, file, .. } = facts(&bottom)?;
            match file {
                Some(file) => bottom = file,
                None => return self.storage_of(&bottom).filter(|_| driver == "nbd"),
            }
        }
    }

    /// Where the file of a node lies, if its image lock is taken.
    fn locked_path(&self, file: &str) -> Option<PathBuf> {
        let path = |entry: &Entry| entry.path.clone().filter(|_| entry.file.is_some());
        match self.pending.iter().find(|pending| pending.name == file) {
            Some(pending) => path(&pending.entry),
            None => lock(&self.blockdevs.0.entries).get(file).and_then(path),
        }
    }

    fn begin_own(&self, path: Option<&Path>) {
        if let Some(path) = path {
            self.blockdevs.0.disks.begin_own(path);
        }
    }

    fn end_own(&self, path: Option<&Path>) {
        if let Some(path) = path {
            self.blockdevs.0.disks.end_own(path);
        }
    }

    /// What becomes of changes of an image on the node `file` that only memory has when the process dies.
    fn journaling(&self, file: &str, storage: &StorageHandle) -> Result<Journaling> {
        let Some(dir) = &self.blockdevs.0.policy.journal else { return Ok(Journaling::Off) };
        let of = |entry: &Entry| journaling(dir, entry.facts.driver, entry.path.as_deref(), storage);
        if let Some(pending) = self.pending.iter().find(|pending| pending.name == file) {
            return of(&pending.entry);
        }
        lock(&self.blockdevs.0.entries).get(file).map_or(Ok(Journaling::WriteThrough), of)
    }

    /// Opens a format node and everything below it, layer by layer.
    async fn open_chain(&mut self, options: BlockdevOptions, implicit: bool) -> Result<String> {
        let mut settings = settings_of(&options);
        let (top, mut backing) = self.open_layer(options, implicit).await?;
        let (mut above, mut layers, mut leaf) = (top.clone(), 1, false);
        loop {
            let wrong = format!("Could not open the backing file of '{}'", self.filename(&above));
            let Some((below, next_leaf)) =
                self.below(&above, backing, leaf, &settings).await.with_context(|| wrong.clone())?
            else {
                return Ok(top);
            };
            let options = match below {
                BlockdevRef::Definition(options) => *options,
                BlockdevRef::Name(name) => {
                    let under = self.blockdevs.chain(&name).len();
                    check_depth(layers + under)?;
                    self.put_below(&above, &name).await.with_context(|| wrong)?;
                    return Ok(top);
                }
            };
            layers += 1;
            check_depth(layers)?;
            if driver_format(&options.driver).is_none() {
                let name = self.open(options, true).await.with_context(|| wrong.clone())?;
                self.put_below(&above, &name).await.with_context(|| wrong)?;
                return Ok(top);
            }
            check_detect_zeroes(&options)?;
            settings = settings_of(&options);
            let (name, next) = self.open_layer(options, true).await.with_context(|| wrong.clone())?;
            self.put_below(&above, &name).await.with_context(|| wrong)?;
            (above, backing, leaf) = (name, next, next_leaf);
        }
    }

    fn filename(&self, name: &str) -> String {
        let pending = self.pending.iter().find(|pending| pending.name == name);
        pending.map_or_else(|| name.to_owned(), |pending| pending.node.info().filename)
    }

    /// What lies below the layer `above` (with settings inherited), and whether that may name no further file.
    async fn below(
        &mut self,
        above: &str,
        backing: BackingOption,
        leaf: bool,
        settings: &BlockdevOptions,
    ) -> Result<Option<(BlockdevRef, bool)>> {
        Ok(match backing {
            BackingOption::None => None,
            BackingOption::Node(BlockdevRef::Name(name)) => Some((BlockdevRef::Name(name), false)),
            BackingOption::Node(BlockdevRef::Definition(mut options)) => {
                options.inherit(settings, ChildRole::Backing);
                Some((BlockdevRef::Definition(options), false))
            }
            BackingOption::Header => {
                let info = self.pending.iter().find(|pending| pending.name == above);
                let info = info.ok_or_else(|| anyhow!("'{above}' is not open"))?.node.info();
                match info.backing {
                    None => None,
                    Some(backing) if leaf => bail!(
                        "its format was not given and was found out from its first bytes; such an image may name no \
                         further file, but it names '{}': say --backing-format {}, or write the format into the header \
                         above",
                        backing.filename,
                        info.driver
                    ),
                    Some(backing) => {
                        let (options, leaf) = self.of_header(&info.filename, &backing, settings).await?;
                        Some((BlockdevRef::Definition(Box::new(options)), leaf))
                    }
                }
            }
        })
    }

    /// Passes a backing file that only a header names through the gate, and describes it.
    async fn of_header(
        &mut self,
        overlay: &str,
        backing: &BackingRef,
        settings: &BlockdevOptions,
    ) -> Result<(BlockdevOptions, bool)> {
        let policy = &self.blockdevs.0.policy;
        let name = resolve_backing(overlay, &backing.filename)?;
        let said = backing.format.as_deref().map(FormatKind::parse).transpose()?.or(policy.backing_format);
        let (mut options, leaf) = match locate(&name)? {
            Located::Tree(_) if policy.untrusted => {
                bail!("the header describes its backing file as json:, which --untrusted does not follow")
            }
            Located::Protocol(options) if policy.untrusted && names_credentials(&options.driver) => bail!(
                "the header names the directory of credentials for '{name}', which --untrusted does not follow"
            ),
            Located::Tree(options) => {
                if said.is_some_and(|said| driver_format(&options.driver) != Some(said)) {
                    bail!("the header calls the format of '{name}' otherwise than that description does");
                }
                (options, false)
            }
            Located::Protocol(mut protocol) => {
                protocol.inherit(settings, ChildRole::Backing);
                let file = self.open(protocol, true).await?;
                if said.is_none() {
                    self.must_answer(&file)?;
                }
                let format = match said {
                    Some(format) => format,
                    None => self.probe_backing(overlay, &name, backing, &file).await?,
                };
                (format_options(format, BlockdevRef::Name(file)), said.is_none())
            }
        };
        options.inherit(settings, ChildRole::Backing);
        Ok((options, leaf))
    }

    /// The format of a backing file where nobody says it: a magic that we know decides, and raw is never guessed.
    async fn probe_backing(
        &self,
        overlay: &str,
        name: &str,
        backing: &BackingRef,
        file: &str,
    ) -> Result<FormatKind> {
        let storage =
            self.pending_storage(file).ok_or_else(|| anyhow!("'{file}' has no bytes to look at"))?;
        let untrusted = self.blockdevs.0.policy.untrusted;
        let found = if untrusted { None } else { probe_storage(&storage).await? };
        found.ok_or_else(|| {
            anyhow!(
                "its header does not say the format of {name}, and raw is not guessed: say --backing-format, or write \
                 it into the header (qemu-img rebase -u -b '{}' -F FORMAT '{overlay}')",
                backing.filename
            )
        })
    }

    /// Puts the edge from `above`, which is pending, to `below` in place.
    async fn put_below(&mut self, above: &str, below: &str) -> Result<()> {
        let active = self
            .pending
            .iter()
            .find(|pending| pending.name == above)
            .is_none_or(|above| above.entry.facts.active);
        let node = self.hold(below, above, Access::Stable, active, "backing")?;
        let pending = self.pending.iter_mut().find(|pending| pending.name == above);
        let pending = pending.ok_or_else(|| anyhow!("'{above}' is not open"))?;
        let slot = pending
            .node
            .backing()
            .ok_or_else(|| anyhow!("a {} image cannot be an overlay", pending.entry.facts.driver))?;
        slot.replace(Some(node)).await;
        pending.entry.facts.backing = Some(below.to_owned());
        Ok(())
    }
}

fn could_not(name: &str) -> String {
    format!("Could not open '{name}'")
}

/// Opens a file without its image locks, which are taken with the first user. Where it cannot be written to and may be
/// read-only, it is.
pub(super) fn open_file(path: &Path, options: &BlockdevOptions) -> Result<FileStorage, OpenError> {
    let read_only = options.is_read_only();
    let open = FileOptions {
        read_only,
        direct: options.is_direct(),
        share: Share::Unguarded,
        ..FileOptions::default()
    };
    match FileStorage::open(path, open) {
        Err(OpenError::Io(error))
            if options.auto_read_only == Some(true)
                && !read_only
                && error.kind() == ErrorKind::NotPermitted =>
        {
            FileStorage::open(path, FileOptions { read_only: true, ..open })
        }
        result => result,
    }
}

/// The URI of an export.
pub fn uri_of(address: &Address, export: &str, tls: Option<UriTls>) -> String {
    let server = match address {
        Address::Tcp { host, port } => ServerAddress::Tcp { host: host.clone(), port: *port },
        Address::Unix(path) => ServerAddress::Unix(path.clone()),
    };
    NbdUri { server, export: export.to_owned(), tls }.to_string()
}

/// Whether a description says itself where credentials are.
fn names_credentials(driver: &Driver) -> bool {
    let Driver::Nbd { tls: Some(tls), .. } = driver else { return false };
    matches!(tls.credentials, NbdCredentials::Directory { dir: Some(_), .. })
}

fn file_identity(path: &Path) -> Result<Identity> {
    let meta = std::fs::metadata(path).with_context(|| path.display().to_string())?;
    Ok(Identity::File { device: meta.dev(), inode: meta.ino() })
}

fn address_of(server: &SocketAddress) -> Result<Address> {
    Ok(match server {
        SocketAddress::Inet { host, port } => Address::Tcp { host: host.clone(), port: *port },
        SocketAddress::Unix { path } => Address::Unix(PathBuf::from(path)),
        SocketAddress::Fd { .. } => {
            bail!("an NBD source cannot be a passed socket, for it could not be reconnected")
        }
    })
}

/// What children may inherit of a description, without its driver.
pub(super) fn settings_of(options: &BlockdevOptions) -> BlockdevOptions {
    let driver = Driver::Null { size: 0, latency_ns: 0, read_zeroes: false };
    BlockdevOptions {
        node_name: options.node_name.clone(),
        discard: options.discard,
        cache_direct: options.cache_direct,
        cache_no_flush: options.cache_no_flush,
        read_only: options.read_only,
        auto_read_only: options.auto_read_only,
        force_share: options.force_share,
        detect_zeroes: options.detect_zeroes,
        active: options.active,
        driver,
    }
}

fn facts_of(options: &BlockdevOptions, driver: &'static str, read_only: bool, implicit: bool) -> NodeFacts {
    NodeFacts {
        driver,
        file: None,
        target: None,
        backing: None,
        read_only,
        cache_direct: options.is_direct(),
        cache_no_flush: options.cache_no_flush.unwrap_or(false),
        detect_zeroes: options.detect_zeroes.unwrap_or_default(),
        implicit,
        active: options.active.unwrap_or(true),
    }
}

/// Bytes of metadata that a description lets a format keep in memory, where it says so.
fn cache_bytes(driver: &Driver) -> Option<u64> {
    let Driver::Qcow2 { options, .. } = driver else { return None };
    options.cache_bytes.or(options.l2_cache_bytes)
}

/// Refuses what gives space back although nothing may.
pub fn check_detect_zeroes(options: &BlockdevOptions) -> Result<()> {
    if options.detect_zeroes == Some(DetectZeroes::Unmap) && options.discard_mode() != DiscardMode::Unmap {
        bail!("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap");
    }
    Ok(())
}

fn check_depth(layers: usize) -> Result<()> {
    if layers > CHAIN_LAYERS_MAX {
        bail!(
            "the backing chain has more than {CHAIN_LAYERS_MAX} layers, which is the most; shorten it by a stream or a \
             commit of its lower layers"
        );
    }
    Ok(())
}

/// Describes an image of `format` over `file`, with the backing that its header names.
fn format_options(format: FormatKind, file: BlockdevRef) -> BlockdevOptions {
    let backing = BackingOption::Header;
    BlockdevOptions::new(match format {
        FormatKind::Raw => Driver::Raw { file, offset: 0, size: None },
        FormatKind::Qcow2 => Driver::Qcow2 { file, backing, options: Default::default() },
        FormatKind::Qed => Driver::Qed { file, backing },
    })
}

fn set_backing(options: &mut BlockdevOptions, to: BackingOption) {
    if let Driver::Qcow2 { backing, .. } | Driver::Qed { backing, .. } = &mut options.driver {
        *backing = to;
    }
}

fn driver_format(driver: &Driver) -> Option<FormatKind> {
    match driver {
        Driver::Raw { .. } => Some(FormatKind::Raw),
        Driver::Qcow2 { .. } => Some(FormatKind::Qcow2),
        Driver::Qed { .. } => Some(FormatKind::Qed),
        _ => None,
    }
}
