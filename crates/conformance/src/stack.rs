//! Chains to test on: an overlay of any kind over a base of any kind, each on a simulated disk of its own.

use std::time::Duration;

use bytes::Bytes;
use infill_base::{Ctx, WriteFlags, is_zero};
use infill_node::{BackingRef, MemoryOverlay, NodeHandle, RawNode};
use infill_sim::{DiskOptions, Media, Rng, SimDisk};
use infill_storage::StorageHandle;

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
    /// A raw disk that ends before the overlay does, in the middle of a sector.
    Shorter,
    /// A raw disk that goes on where the overlay ends.
    Longer,
}

/// Shortest and longest time of an operation of the disks.
const LATENCY: (Duration, Duration) = (Duration::from_micros(2), Duration::from_micros(250));

/// What the headers call the base.
pub const BASE_NAME: &str = "base";

/// An overlay and its base.
pub struct Stack {
    top: Top,
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

/// Content of `len` bytes: payload that says that it is the backing's, with zeroes in it.
pub fn base_content(len: u64, rng: &mut Rng) -> Bytes {
    let mut content = payload(BACKING_OP, 0, len as usize).to_vec();
    for _ in 0..len / (32 << 10) {
        let at = rng.below(len);
        let end = (at + rng.below(24 << 10)).min(len);
        content[at as usize..end as usize].fill(0);
    }
    content.into()
}

impl Stack {
    /// A new overlay of `size` bytes over a new base.
    pub async fn build(top: Top, below: Below, size: u64, seed: u64) -> Result<Stack, Violation> {
        let mut rng = Rng::new(seed);
        let base_len = match below {
            Below::Nothing => 0,
            Below::Raw | Below::Image(_) => size,
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
                let raw = RawNode::new(StorageHandle::new(medium.clone()), true);
                (Some(NodeHandle::new(raw)), medium)
            }
        };
        let mut shown = content.to_vec();
        shown.resize(size as usize, 0);
        let medium = disk("overlay", seed + 1, Media::new(0));
        if let Top::Image(format) = top {
            let named = BackingRef { filename: BASE_NAME.into(), format: Some("raw".into()) };
            let named = base.as_ref().map(|_| named);
            format.create(&StorageHandle::new(medium.clone()), size, named).await?;
        }
        Ok(Stack { top, size, content: shown.into(), base, base_disk, disk: medium })
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

    /// Closes a node of this stack; an image is checked then.
    pub async fn close(&self, node: NodeHandle) -> Result<(), Violation> {
        node.close(&Ctx::GUEST).await.map_err(|error| failed("closing", &error))?;
        drop(node);
        let Top::Image(format) = self.top else { return Ok(()) };
        let report = format.check(&self.storage(), infill_node::Repair::Nothing).await;
        let report = report.map_err(|error| failed("the check", &error))?;
        if report.corruptions + report.check_errors + report.leaks > 0 {
            let words = report.messages.iter().take(4).cloned().collect::<Vec<_>>().join("; ");
            return Err(Violation::Broken(format!("closed cleanly, the check finds: {words} ({report:?})")));
        }
        Ok(())
    }
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
