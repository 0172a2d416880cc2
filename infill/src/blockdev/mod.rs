//! Nodes by name: opening, using, closing. One opener for image names and for typed `blockdev` options.
//!
//! Owns the [`Graph`] and, for each node in it, what the graph does not know: its file child, its image lock, who uses
//! it how. What never happens: a node that is half open in the graph (a failed opening closes what it had opened), a
//! file that two writers have (locks are taken before anything is read), recursion as deep as a backing chain.
//!
//! * An image *name* becomes the same options as QMP's `blockdev-add` takes, with a `file` child of its own.
//! * A backing file that only a header names is opened through the gate of [`OpenPolicy`].
//! * Nodes that a description contains, or a header names, belong to their parent and go with it; nodes that have been
//!   added by name stay until they are deleted.

mod active;
mod change;
mod disks;
mod exchange;
mod far;
mod filters;
mod fleece;
mod format;
mod hold;
mod info;
mod journal;
mod locate;
mod name;
mod open;
mod reopen;
mod secure;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use infill_base::{Ctx, DetectZeroes, DiscardMode, OpenError};
use infill_io::{FileStorage, JournalDir, patiently};
use infill_job::copy::fleece::Past;
use infill_nbd::{OnLost, SourceWatch};
use infill_node::{Edge, Graph, NodeHandle};
use infill_qmp::BlockdevOptions;
use infill_storage::sync::{Mutex, lock};
use infill_storage::{RangeGuard, RangeLock, StorageHandle, rt};

use crate::objects::Objects;
use crate::tls::Credentials;
pub use change::Opened;
pub use disks::Disks;
pub use exchange::hold;
use far::Servers;
pub use format::{FormatKind, probe_storage};
pub use hold::Access;
use hold::Holds;
pub use info::{image_info, info_text, snapshot_info, snapshots_text};
pub use journal::{hash, identity_of};
pub use locate::{Located, locate};
pub use name::resolve_backing;
pub use open::{check_detect_zeroes, uri_of};

/// Layers of one backing chain. A request that goes all the way down takes stack for each of them.
pub const CHAIN_LAYERS_MAX: usize = 256;

/// How long closing waits for copy-on-read to keep what was read. No data is lost otherwise; it stays below.
const KEEP_TIME: Duration = Duration::from_secs(5);

/// Most times that one description waits for a server: twice for each layer.
const SERVERS_MAX: usize = 2 * CHAIN_LAYERS_MAX;

/// Longest name of a node, in bytes.
pub const NODE_NAME_BYTES_MAX: usize = 31;

/// What an image name or a header may make the opener do.
#[derive(Clone, Debug)]
pub struct OpenPolicy {
    /// No format is found out from bytes that a guest may have written.
    pub untrusted: bool,
    /// The format of backing files whose name comes without one.
    pub backing_format: Option<FormatKind>,
    /// What happens to requests while an NBD source is away, where the options do not say it.
    pub on_lost: OnLost,
    /// Where changes of images are recorded that only memory has, for the daemon that comes after this one. `None`: nobody
    /// who outlives this process relies on them.
    pub journal: Option<JournalDir>,
}

impl Default for OpenPolicy {
    fn default() -> Self {
        let on_lost = OnLost::Hold { limit: None };
        OpenPolicy { untrusted: false, backing_format: None, on_lost, journal: None }
    }
}

/// What a node is, for those who list nodes.
#[derive(Clone, Debug)]
pub struct NodeFacts {
    /// Its driver, as QEMU spells it.
    pub driver: &'static str,
    /// Name of the node that it lies on.
    pub file: Option<String>,
    /// Name of the node that it puts something aside on.
    pub target: Option<String>,
    /// Name of the node that backs it.
    pub backing: Option<String>,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Whether its file is used around the page cache.
    pub cache_direct: bool,
    /// Whether its user has said that flushes may be dropped (they are not).
    pub cache_no_flush: bool,
    /// What becomes of writes of zeroes.
    pub detect_zeroes: DetectZeroes,
    /// Whether it belongs to its parent, and goes with it.
    pub implicit: bool,
    /// Whether it may be changed, and has its image locks ([`Blockdevs::inactivate`]).
    pub active: bool,
}

impl NodeFacts {
    /// Whether it passes everything on to the node that it lies on.
    pub fn is_filter(&self) -> bool {
        matches!(
            self.driver,
            "copy-on-read" | "copy-before-write" | "throttle" | "blkdebug" | "compress" | "preallocate"
        )
    }

    /// Whether another node can take the place of the one that it filters.
    pub fn goes_along(&self) -> bool {
        matches!(self.driver, "copy-on-read" | "throttle")
    }
}

/// What is known of a node beside the graph.
struct Entry {
    facts: NodeFacts,
    /// Of a protocol node: what formats lie on directly.
    storage: Option<StorageHandle>,
    /// Of a file: itself.
    disk: Option<Arc<FileStorage>>,
    /// Of a file: where its image lock is taken.
    file: Option<Arc<FileStorage>>,
    /// Of a file: where it lies.
    path: Option<PathBuf>,
    /// Of an NBD export: what tells when its server is lost and back, until somebody takes it.
    watch: Option<SourceWatch>,
    /// Of an NBD export over TLS: its credentials are in use.
    _credentials: Option<Arc<Credentials>>,
    /// How it was opened, where it can be opened again in another way.
    recipe: Option<Recipe>,
    /// Whether it lies on a node that others write to, and is to ([`Blockdevs::lay_beside`]).
    beside: bool,
    holds: Holds,
}

impl Entry {
    /// Of a node that lies on others.
    fn without_storage(facts: NodeFacts) -> Entry {
        Entry {
            facts,
            storage: None,
            disk: None,
            file: None,
            path: None,
            watch: None,
            _credentials: None,
            recipe: None,
            beside: false,
            holds: Holds::default(),
        }
    }
}

/// How a node was opened.
#[derive(Clone)]
enum Recipe {
    /// A file, by its description.
    File(Box<BlockdevOptions>),
    /// A format on its file child.
    Format { format: FormatKind, discard: DiscardMode, metadata_cache_bytes: Option<u64> },
}

struct Shared {
    graph: Graph,
    entries: Mutex<BTreeMap<String, Entry>>,
    policy: OpenPolicy,
    objects: Objects,
    /// Disks as they were, by the filter that keeps them.
    pasts: Mutex<BTreeMap<String, Weak<Past>>>,
    /// The files that a state names, until all that waits for them is there.
    disks: Disks,
    next: AtomicU64,
    /// One change of the graph at a time.
    turn: RangeLock,
    /// Everything was closed.
    closed: AtomicBool,
}

/// All nodes of a process. Cloning shares them.
#[derive(Clone)]
pub struct Blockdevs(Arc<Shared>);

impl Blockdevs {
    /// No nodes.
    pub fn new(policy: OpenPolicy) -> Blockdevs {
        Blockdevs(Arc::new(Shared {
            graph: Graph::new(),
            entries: Mutex::default(),
            policy,
            objects: Objects::default(),
            pasts: Mutex::default(),
            disks: Disks::default(),
            next: AtomicU64::new(0),
            turn: RangeLock::new(),
            closed: AtomicBool::new(false),
        }))
    }

    /// The objects that descriptions may name.
    pub fn objects(&self) -> &Objects {
        &self.0.objects
    }

    /// Who has written to the files of a state.
    pub fn disks(&self) -> &Disks {
        &self.0.disks
    }

    /// The nodes and their edges.
    pub fn graph(&self) -> &Graph {
        &self.0.graph
    }

    /// Opens what `options` describe, and gives the name of its top node (`blockdev-add`).
    ///
    /// Others change the graph while servers are waited for.
    pub async fn add(&self, options: BlockdevOptions) -> Result<String> {
        self.add_telling(options, &|| {}).await
    }

    /// As [`Blockdevs::add`]; `far` is called before a server is waited for.
    pub async fn add_telling(&self, options: BlockdevOptions, far: &dyn Fn()) -> Result<String> {
        let mut servers = Servers::default();
        for _ in 0..=SERVERS_MAX {
            let turn = self.change_graph().await;
            if self.0.closed.load(Ordering::Relaxed) {
                bail!("everything is closed: the process is ending");
            }
            let mut opening = open::Opening::new(self, false).waiting_outside(servers);
            let result = opening.open(options.clone(), false).await;
            servers = opening.take_servers();
            let Some(missing) = servers.take_missing() else {
                return self.settle(opening, result).await;
            };
            opening.abandon().await;
            drop(turn);
            far();
            servers.wait_for(missing).await;
        }
        bail!("it lies on more than {SERVERS_MAX} servers, or on other ones each time that it is opened")
    }

    /// As [`Blockdevs::add`]; an image that another process has is tried again for a moment, during which others change the
    /// graph: that process may have been killed.
    pub async fn add_patiently(&self, options: &BlockdevOptions) -> Result<String> {
        patiently(|| self.add(options.clone()), is_locked).await
    }

    /// As [`Blockdevs::add`], for whoever changes the graph already.
    pub async fn add_in(&self, turn: &RangeGuard, options: BlockdevOptions) -> Result<String> {
        self.add_fenced(turn, options, false).await
    }

    /// As [`Blockdevs::add_in`]; with `fenced` images that moved to another host are opened too, if the options open them
    /// read-only.
    pub async fn add_fenced(
        &self,
        _turn: &RangeGuard,
        options: BlockdevOptions,
        fenced: bool,
    ) -> Result<String> {
        let mut opening = open::Opening::new(self, fenced);
        let result = opening.open(options, false).await;
        self.settle(opening, result).await
    }

    /// Opens an NBD export of so many bytes, read-only, whether its server is there or not: who reads it waits.
    pub async fn add_awaited(&self, options: BlockdevOptions, bytes: u64) -> Result<String> {
        let _turn = self.change_graph().await;
        let mut opening = open::Opening::new(self, false).awaiting(bytes);
        let result = opening.open(options, false).await;
        self.settle(opening, result).await
    }

    /// Opens an image by its name, with its whole chain unless `alone`.
    ///
    /// One that another process has is tried again for a moment, as by [`Blockdevs::add_patiently`].
    pub async fn add_image(&self, image: &Image) -> Result<String> {
        patiently(|| self.try_image(image), is_locked).await
    }

    async fn try_image(&self, image: &Image) -> Result<String> {
        let _turn = self.0.turn.exclusive(0, 1).await;
        let mut opening = open::Opening::new(self, image.fenced);
        let result = opening.open_image(image).await;
        self.settle(opening, result).await
    }

    /// Opens the bytes that a name stands for, without a format on them.
    pub async fn add_protocol(&self, name: &str, read_only: bool, force_share: bool) -> Result<String> {
        let Located::Protocol(options) = locate(name)? else {
            bail!("{name}: a file or a URI is needed here, not a description of nodes");
        };
        let _turn = self.0.turn.exclusive(0, 1).await;
        let options =
            BlockdevOptions { read_only: Some(read_only), force_share: Some(force_share), ..options };
        let mut opening = open::Opening::new(self, false);
        let result = opening.open(options, false).await;
        self.settle(opening, result.with_context(|| format!("Could not open '{name}'"))).await
    }

    async fn settle(&self, opening: open::Opening<'_>, result: Result<String>) -> Result<String> {
        match result {
            Ok(name) => {
                opening.commit()?;
                Ok(name)
            }
            Err(error) => {
                opening.abandon().await;
                Err(error)
            }
        }
    }

    /// The graph is changed by nobody else while what this gives lives.
    pub async fn change_graph(&self) -> RangeGuard {
        self.0.turn.exclusive(0, 1).await
    }

    /// The node of that name.
    pub fn get(&self, name: &str) -> Result<NodeHandle> {
        Ok(self.0.graph.get(name)?)
    }

    /// What is known of the node.
    pub fn facts(&self, name: &str) -> Result<NodeFacts> {
        let entries = lock(&self.0.entries);
        entries.get(name).map(|entry| entry.facts.clone()).ok_or_else(|| unknown(name))
    }

    /// Where volatile journals lie, if they are kept.
    pub fn journal_dir(&self) -> Option<JournalDir> {
        self.0.policy.journal.clone()
    }

    /// Where the file of a protocol node lies.
    pub fn path(&self, name: &str) -> Option<PathBuf> {
        lock(&self.0.entries).get(name).and_then(|entry| entry.path.clone())
    }

    /// What the node lies on, file child by file child.
    pub fn bottom(&self, name: &str) -> Option<String> {
        info::files(self, name).pop()
    }

    /// Where the file that it lies on lies.
    pub fn bottom_path(&self, name: &str) -> Option<PathBuf> {
        self.bottom(name).and_then(|bottom| self.path(&bottom))
    }

    /// The storage of a protocol node.
    pub fn storage(&self, name: &str) -> Option<StorageHandle> {
        lock(&self.0.entries).get(name).and_then(|entry| entry.storage.clone())
    }

    /// What tells of the servers of NBD nodes that were opened since the last call, each with its node's name.
    pub fn take_source_watches(&self) -> Vec<(String, SourceWatch)> {
        let mut entries = lock(&self.0.entries);
        let taken = entries.iter_mut().map(|(name, entry)| Some((name.clone(), entry.watch.take()?)));
        taken.flatten().collect()
    }

    /// Names of the layers from `name` down.
    pub fn chain(&self, name: &str) -> Vec<String> {
        let entries = lock(&self.0.entries);
        let below = |name: &String| entries.get(name).and_then(|entry| entry.facts.backing.clone());
        std::iter::successors(Some(name.to_owned()), below).take(CHAIN_LAYERS_MAX + 1).collect()
    }

    /// How many nodes lie below each other from `name` down, at most.
    pub fn height(&self, name: &str) -> usize {
        let entries = lock(&self.0.entries);
        let (mut level, mut height) = (vec![name.to_owned()], 0);
        while !level.is_empty() {
            height += 1;
            let facts = level.iter().filter_map(|name| entries.get(name)).map(|entry| &entry.facts);
            let below =
                facts.flat_map(|facts| [&facts.file, &facts.target, &facts.backing].into_iter().flatten());
            level = below.collect::<std::collections::BTreeSet<_>>().into_iter().cloned().collect();
        }
        height
    }

    /// The node itself, or the first one below it that is no filter.
    pub fn unfiltered(&self, name: &str) -> String {
        let entries = lock(&self.0.entries);
        let below = |name: &String| {
            let facts = entries.get(name).map(|entry| &entry.facts).filter(|facts| facts.is_filter())?;
            facts.file.clone()
        };
        std::iter::successors(Some(name.to_owned()), below).last().unwrap_or_default()
    }

    /// Names of the layers from `name` down, filters between them too.
    pub fn chain_with_filters(&self, name: &str) -> Vec<String> {
        let entries = lock(&self.0.entries);
        let below = |name: &String| {
            let facts = &entries.get(name)?.facts;
            if facts.is_filter() { facts.file.clone() } else { facts.backing.clone() }
        };
        std::iter::successors(Some(name.to_owned()), below).take(CHAIN_LAYERS_MAX + 1).collect()
    }

    /// Notes a user of the node (for messages: `export 'e0'`), who reads it, or also writes. Refused where that would
    /// disturb another user.
    pub fn claim(&self, name: &str, user: &str, access: Access) -> Result<NodeHandle> {
        self.hold(name, user, access)?;
        Ok(self.0.graph.claim(name, user)?)
    }

    /// As [`Blockdevs::claim`], for a user who goes along when another node takes the place of this one
    /// ([`Blockdevs::replace`]).
    pub fn claim_edge(&self, name: &str, user: &str, access: Access) -> Result<Edge> {
        self.hold(name, user, access)?;
        Ok(self.0.graph.claim_edge(name, user)?)
    }

    fn hold(&self, name: &str, user: &str, access: Access) -> Result<()> {
        self.0.graph.get(name)?;
        self.rely_again(name)?;
        if access.writes() {
            self.release_unused(name);
        }
        let mut entries = lock(&self.0.entries);
        let entry = entries.get_mut(name).ok_or_else(|| unknown(name))?;
        if access.writes() && entry.facts.read_only {
            bail!("Block node '{name}' is read-only");
        }
        match entry.facts.active {
            true => entry.holds.take(name, user, access, entry.file.as_deref()),
            // One that does not let it be so has made it active before.
            false if user.starts_with("export '") => {
                entry.holds.take_resting(user, access);
                Ok(())
            }
            false if access.writes() => bail!("Permission 'write' unavailable on inactive node"),
            false => bail!("Inactive '{name}' can't be used by {user}, which is active"),
        }
    }

    /// How `user` uses the node.
    pub fn access_of(&self, name: &str, user: &str) -> Option<Access> {
        lock(&self.0.entries).get(name).and_then(|entry| entry.holds.of(user))
    }

    /// Takes one claim of `user` back.
    pub fn release(&self, name: &str, user: &str) {
        self.0.graph.release(name, user);
        if let Some(entry) = lock(&self.0.entries).get_mut(name) {
            entry.holds.give_back(user, entry.file.as_deref());
        }
    }

    /// Closes a node that was added by name and that nobody uses (`blockdev-del`), and what belongs to it.
    pub async fn del(&self, name: &str) -> Result<()> {
        let turn = self.change_graph().await;
        self.del_in(&turn, name).await
    }

    /// As [`Blockdevs::del`], for whoever changes the graph already.
    pub async fn del_in(&self, _turn: &RangeGuard, name: &str) -> Result<()> {
        self.0.graph.get(name)?;
        if self.facts(name)?.implicit {
            bail!("Node '{name}' belongs to the node above it: delete that one");
        }
        let users = self.0.graph.users(name);
        if !users.is_empty() {
            bail!("Node '{name}' is busy: it is in use by {}", users.join(", "));
        }
        self.remove(vec![name.to_owned()]).await
    }

    /// Closes and removes `names`, none of which has users, and then the children that belonged to them alone.
    async fn remove(&self, mut names: Vec<String>) -> Result<()> {
        let mut failed: Option<anyhow::Error> = None;
        while let Some(name) = names.pop() {
            let node = self.0.graph.get(&name)?;
            self.end_copy_on_read(&name, &node).await?;
            // Closed even where that fails: nothing could be done with it any more.
            if let Err(error) = node.close(&Ctx::GUEST).await {
                failed.get_or_insert(anyhow!(error).context(format!("closing '{name}'")));
            }
            let children = self.0.graph.children(&name);
            self.0.graph.remove(&name)?;
            lock(&self.0.entries).remove(&name);
            let user = format!("node '{name}'");
            for child in children {
                let Some(implicit) = self.let_go(&child, &user) else { continue };
                if implicit && self.0.graph.users(&child).is_empty() {
                    names.push(child);
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Lets what copy-on-read has begun to keep come to its end, and puts the edge away: what still waits for a source
    /// then is not linked any more.
    async fn end_copy_on_read(&self, name: &str, node: &NodeHandle) -> Result<()> {
        let Some(slot) = node.backing() else { return Ok(()) };
        if let Some(policy) = slot.copy_on_read()
            && rt::timeout(KEEP_TIME, policy.settle()).await.is_none()
        {
            tracing::info!(name, "closed before everything that was read could be kept");
        }
        // A filter shows the edge of the node below it, which may go on.
        if self.facts(name)?.backing.is_some() {
            slot.set_copy_on_read(None);
            slot.replace(None).await;
        }
        Ok(())
    }

    /// `user` is gone: gives its hold on `child` back. Whether the child belongs to its parents.
    fn let_go(&self, child: &str, user: &str) -> Option<bool> {
        let mut entries = lock(&self.0.entries);
        let entry = entries.get_mut(child)?;
        entry.holds.give_back(user, entry.file.as_deref());
        Some(entry.facts.implicit)
    }

    /// After a job has put another node (or none) below `top`: the graph follows, and layers that belonged to the old
    /// edge alone are closed.
    pub async fn backing_changed(&self, top: &str) -> Result<()> {
        self.follow_backing(top, Access::Stable).await
    }

    /// As [`Blockdevs::backing_changed`], after a commit of the active layer: `top` is empty and lies on the base that guests
    /// write to now.
    pub async fn committed(&self, top: &str) -> Result<()> {
        self.follow_backing(top, Access::Reader).await
    }

    async fn follow_backing(&self, top: &str, access: Access) -> Result<()> {
        let _turn = self.0.turn.exclusive(0, 1).await;
        let mut top = top.to_owned();
        top = self.unfiltered(&top);
        let top = top.as_str();
        let node = self.0.graph.get(top)?;
        let below = node.backing().and_then(|slot| slot.node());
        let new = below.and_then(|below| {
            self.0.graph.list().into_iter().find(|(_, other)| other.is_same(&below)).map(|(name, _)| name)
        });
        let old = {
            let mut entries = lock(&self.0.entries);
            let entry = entries.get_mut(top).ok_or_else(|| unknown(top))?;
            if entry.facts.backing == new {
                return Ok(());
            }
            entry.facts.backing.take()
        };
        let user = format!("node '{top}'");
        if let Some(new) = &new {
            self.back(top, new, access)?;
        }
        let Some(old) = old else { return Ok(()) };
        self.0.graph.detach(top, &old);
        match self.let_go(&old, &user) {
            Some(true) if self.0.graph.users(&old).is_empty() => {
                self.remove(vec![old]).await.context("closing what lay below")
            }
            _ => Ok(()),
        }
    }

    /// Closes everything, each node after those that lie on it. Goes on after errors and gives the first one.
    pub async fn close_all(&self) -> Result<()> {
        let _turn = self.0.turn.exclusive(0, 1).await;
        self.0.closed.store(true, Ordering::Relaxed);
        let mut failed = None;
        loop {
            let nodes = self.0.graph.list();
            let free = nodes.iter().find(|(name, _)| self.0.graph.users(name).is_empty());
            let Some((name, _)) = free else {
                if let Some((name, _)) = nodes.first() {
                    let users = self.0.graph.users(name).join(", ");
                    failed.get_or_insert(anyhow!("'{name}' could not be closed: it is in use by {users}"));
                }
                return failed.map_or(Ok(()), Err);
            };
            if let Err(error) = self.remove(vec![name.clone()]).await {
                failed.get_or_insert(error);
            }
        }
    }

    /// A fresh name for a node that nobody has named.
    fn generated_name(&self) -> String {
        format!("#block{:03}", self.0.next.fetch_add(1, Ordering::Relaxed))
    }
}

/// Whether an image could not be opened because another process has it open.
fn is_locked(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| matches!(cause.downcast_ref(), Some(OpenError::Locked { .. })))
}

fn unknown(name: &str) -> anyhow::Error {
    anyhow!("Failed to find node with node-name='{name}'")
}

/// An image that a person names, and how it is to be opened.
#[derive(Clone, Debug)]
pub struct Image {
    /// A file name, a URI, or `json:{…}`.
    pub name: String,
    /// Its format; `None` finds it out.
    pub format: Option<FormatKind>,
    /// No writes.
    pub read_only: bool,
    /// Without its backing chain.
    pub alone: bool,
    /// Although others may write to it (only read-only).
    pub force_share: bool,
    /// Although it moved to another host (only read-only).
    pub fenced: bool,
    /// What a guest's discard does.
    pub discard: DiscardMode,
}

impl Image {
    /// For reading.
    pub fn read_only(name: &str) -> Image {
        Image {
            name: name.into(),
            format: None,
            read_only: true,
            alone: false,
            force_share: false,
            fenced: false,
            discard: DiscardMode::Ignore,
        }
    }
}
