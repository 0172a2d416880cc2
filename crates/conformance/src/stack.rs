//! Chains to test on: an overlay of any kind over a base of any kind, each on a simulated disk of its own.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use infill_base::{Ctx, IoResult, Limits, ThrottleKind, ThrottleLimits, WriteFlags, align_down, is_zero};
use infill_nbd::{ClientOptions, Export, Exports, NbdStorage, Server, ServerLimits};
use infill_node::{
    BackingRef, BlkdebugNode, CompressNode, CopyOnReadNode, MemoryOverlay, NodeHandle, RawNode,
    ThrottleGroup, ThrottleNode,
};
use infill_sim::{DiskOptions, Media, Rng, SimDisk};
use infill_storage::stream::{Connection, Connector};
use infill_storage::sync::{Arc, Mutex, lock};
use infill_storage::{StorageHandle, rt};

use crate::format::failed;
use crate::payload::{BACKING_OP, payload};
use crate::{Format, Violation};

/// The overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Top {
    /// The reference, in memory, with units of so many bytes.
    Memory(u64),
    /// An image.
    Image(Format),
}

/// What lies below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// Nothing.
    Nothing,
    /// A raw disk of the same size.
    Raw,
    /// An image of the same size, partly absent.
    Image(Format),
    /// A raw disk of the same size, behind our NBD server and client.
    Nbd,
    /// A raw disk that ends before the overlay does, in the middle of a sector.
    Shorter,
    /// A raw disk that goes on where the overlay ends.
    Longer,
}

/// What guests go through on their way to the overlay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Through {
    /// Nothing.
    #[default]
    Nothing,
    /// A filter that keeps what is read.
    CopyOnRead,
    /// A limit that is felt.
    Throttle,
    /// A filter that could have requests fail, and has no rule that does.
    Blkdebug,
    /// A filter that has whole clusters compressed.
    Compress,
}

impl Through {
    /// Requests a second, where they are limited.
    const REQUESTS_PER_SECOND: u64 = 20_000;

    fn over(self, node: NodeHandle) -> NodeHandle {
        match self {
            Through::Nothing => node,
            Through::CopyOnRead => NodeHandle::new(CopyOnReadNode::new(node, None)),
            Through::Throttle => {
                let mut limits = ThrottleLimits::default();
                limits.rate_mut(ThrottleKind::IopsTotal).average = Self::REQUESTS_PER_SECOND;
                let group = Arc::new(ThrottleGroup::new(limits));
                NodeHandle::new(ThrottleNode::new(node, group))
            }
            Through::Blkdebug => NodeHandle::new(BlkdebugNode::new(node, Vec::new(), Vec::new())),
            Through::Compress => NodeHandle::new(CompressNode::new(node)),
        }
    }
}

/// Shortest and longest time of an operation of the disks.
const LATENCY: (Duration, Duration) = (Duration::from_micros(2), Duration::from_micros(250));

/// What the headers call the base.
pub const BASE_NAME: &str = "base";

/// An overlay and its base.
pub struct Stack {
    top: Top,
    through: Through,
    size: u64,
    /// What the disk shows before anybody writes.
    pub content: Bytes,
    /// The node below, where there is one.
    pub base: Option<NodeHandle>,
    /// The medium of the base.
    pub base_disk: SimDisk,
    /// The medium of the overlay, where it is an image.
    pub disk: SimDisk,
}

fn disk(name: &str, seed: u64, media: Media) -> SimDisk {
    let options = DiskOptions { name: name.into(), seed, latency: LATENCY, ..DiskOptions::default() };
    SimDisk::with(media, options)
}

/// Content of `len` bytes: payload that says that it is the backing's, with zeroes in it. No word is torn by them.
pub fn base_content(len: u64, rng: &mut Rng) -> Bytes {
    let mut content = payload(BACKING_OP, 0, len as usize).to_vec();
    for _ in 0..len / (32 << 10) {
        let at = align_down(rng.below(len), 8);
        let end = (at + align_down(rng.below(24 << 10), 8)).min(len);
        content[at as usize..end as usize].fill(0);
    }
    content.into()
}

impl Stack {
    /// A new overlay of `size` bytes over a new base.
    ///
    /// The overlay's disk takes requests of multiples of `align` bytes only.
    pub async fn build(top: Top, below: Below, size: u64, align: u32, seed: u64) -> Result<Stack, Violation> {
        let mut rng = Rng::new(seed);
        let base_len = match below {
            Below::Nothing => 0,
            Below::Raw | Below::Nbd | Below::Image(_) => size,
            Below::Shorter => size / 2 + 700,
            Below::Longer => size + 40_000,
        };
        let content = base_content(base_len, &mut rng);
        let (base, base_disk) = match below {
            Below::Nothing => (None, disk(BASE_NAME, seed, Media::new(0))),
            Below::Image(format) => {
                let medium = disk(BASE_NAME, seed, Media::new(0));
                (Some(base_image(format, &medium, &content).await?), medium)
            }
            _ => {
                let medium = disk(BASE_NAME, seed, Media::from_bytes(&content));
                let raw = NodeHandle::new(RawNode::new(StorageHandle::new(medium.clone()), true));
                let base = match below {
                    Below::Nbd => NodeHandle::new(RawNode::new(over_nbd(raw, false, seed).await?, true)),
                    _ => raw,
                };
                (Some(base), medium)
            }
        };
        let mut shown = content.to_vec();
        shown.resize(size as usize, 0);
        let limits = Limits { request_align: align, memory_align: align, ..Limits::default() };
        let options = DiskOptions {
            name: "overlay".into(),
            seed: seed + 1,
            latency: LATENCY,
            limits,
            ..DiskOptions::default()
        };
        let medium = SimDisk::with(Media::new(0), options);
        if let Top::Image(format) = top {
            let named = BackingRef { filename: BASE_NAME.into(), format: Some("raw".into()) };
            let named = base.as_ref().map(|_| named);
            format.create(&StorageHandle::new(medium.clone()), size, named).await?;
        }
        Ok(Stack {
            top,
            through: Through::Nothing,
            size,
            content: shown.into(),
            base,
            base_disk,
            disk: medium,
        })
    }

    /// The same with what guests go through.
    pub fn through(mut self, through: Through) -> Stack {
        self.through = through;
        self
    }

    /// Whether the overlay outlives its node.
    pub fn is_persistent(&self) -> bool {
        matches!(self.top, Top::Image(_))
    }

    /// The image's storage.
    pub fn storage(&self) -> StorageHandle {
        StorageHandle::new(self.disk.clone())
    }

    /// Opens the overlay, over the base where its header names it.
    pub async fn open(&self) -> Result<NodeHandle, Violation> {
        Ok(self.through.over(self.open_overlay().await?))
    }

    async fn open_overlay(&self) -> Result<NodeHandle, Violation> {
        match self.top {
            Top::Memory(unit) => Ok(NodeHandle::new(MemoryOverlay::new(self.size, unit, self.base.clone()))),
            Top::Image(format) => {
                let node = format.open(&self.storage()).await.map_err(|error| failed("opening", &error))?;
                if node.info().backing.is_some()
                    && let Some(slot) = node.backing()
                {
                    slot.replace(self.base.clone()).await;
                }
                Ok(node)
            }
        }
    }

    /// Closes a node of this stack; an image is checked then. Requests that were dropped in the middle may have left
    /// clusters that nothing names.
    pub async fn close(&self, node: NodeHandle, may_leak: bool) -> Result<(), Violation> {
        // A filter leaves what it filters open.
        node.unfiltered().close(&Ctx::GUEST).await.map_err(|error| failed("closing", &error))?;
        drop(node);
        let Top::Image(format) = self.top else { return Ok(()) };
        let report = format.check(&self.storage(), infill_node::Repair::Nothing).await;
        let report = report.map_err(|error| failed("the check", &error))?;
        let leaks = if format.is_tight() && !may_leak { report.leaks } else { 0 };
        if report.corruptions + report.check_errors + leaks > 0 {
            let words = report.messages.iter().take(4).cloned().collect::<Vec<_>>().join("; ");
            return Err(Violation::Broken(format!("closed cleanly, the check finds: {words} ({report:?})")));
        }
        Ok(())
    }
}

/// Bytes that a pipe of a connection holds.
const PIPE_BYTES: usize = 64 << 10;

/// Connects to a server in memory.
struct InMemory {
    server: Server,
    rng: Mutex<Rng>,
}

impl Connector for InMemory {
    fn connect(&self) -> LocalBoxFuture<'_, IoResult<Connection>> {
        Box::pin(async {
            let (here, there) = infill_sim::torn_pipe(PIPE_BYTES, lock(&self.rng).fork());
            let server = self.server.clone();
            // However it ends: the client tells.
            rt::spawn(async move { drop(server.serve(there).await) });
            Ok(here)
        })
    }

    fn target(&self) -> String {
        "memory".into()
    }
}

/// `node`, served by our NBD server and seen through our client, over a pipe that tears messages. Needs a runtime.
pub async fn over_nbd(node: NodeHandle, writable: bool, seed: u64) -> Result<StorageHandle, Violation> {
    let exports = Exports::new();
    let added = exports.add(Export { writable, ..Export::new(BASE_NAME, node) });
    added.map_err(|error| Violation::Broken(format!("the export is refused: {error:?}")))?;
    let server = Server::new(exports, ServerLimits::default());
    let options =
        ClientOptions { export: BASE_NAME.into(), read_only: !writable, ..ClientOptions::default() };
    let connector = Arc::new(InMemory { server, rng: Mutex::new(Rng::new(seed)) });
    let client = NbdStorage::connect(connector, options).await;
    Ok(StorageHandle::new(client.map_err(|error| failed("connecting", &error))?))
}

/// An image with `content`; what is zero there stays absent.
async fn base_image(format: Format, medium: &SimDisk, content: &Bytes) -> Result<NodeHandle, Violation> {
    const PIECE: usize = 6 << 10;
    let storage = StorageHandle::new(medium.clone());
    format.create(&storage, content.len() as u64, None).await?;
    let open = || async { format.open(&storage).await.map_err(|error| failed("opening the base", &error)) };
    let node = open().await?;
    for at in (0..content.len()).step_by(PIECE) {
        let piece = content.slice(at..(at + PIECE).min(content.len()));
        if !is_zero(&piece) {
            let written = node.write(&Ctx::GUEST, at as u64, piece, WriteFlags::empty()).await;
            written.map_err(|error| failed("filling the base", &error))?;
        }
    }
    node.close(&Ctx::GUEST).await.map_err(|error| failed("closing the base", &error))?;
    drop(node);
    open().await
}
