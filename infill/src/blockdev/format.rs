//! Formats of image files: which there are, how they are told apart, opened, created and checked.

use anyhow::{Context, Result, bail};
use bytes::BytesMut;
use clap::ValueEnum;
use infill_base::{Ctx, DiscardMode};
use infill_node::{CheckReport, NodeHandle, RawNode, Repair};
use infill_storage::StorageHandle;
use infill_storage::journal::Journaling;

/// First bytes of an image that are looked at to find its format out.
const PROBE_BYTES: u64 = 512;

/// A format of image files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatKind {
    /// The disk's bytes, as they are.
    Raw,
    /// QEMU's copy-on-write format, version 2 and 3.
    Qcow2,
    /// QEMU's enhanced disk format.
    Qed,
}

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// No writes.
    pub read_only: bool,
    /// An image that moved to another host is opened all the same, if it is opened read-only.
    pub fenced: bool,
    /// What a guest's discard does.
    pub discard: DiscardMode,
    /// Bytes of metadata that are kept in memory; `None` is the format's own choice.
    pub metadata_cache_bytes: Option<u64>,
    /// What becomes of changes that only memory has when the process dies.
    pub journal: Journaling,
}

impl FormatKind {
    /// Its name, as QEMU spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            FormatKind::Raw => "raw",
            FormatKind::Qcow2 => "qcow2",
            FormatKind::Qed => "qed",
        }
    }

    /// The format that a header or a person names. A protocol's name, which QEMU writes into some headers, is raw.
    pub fn parse(name: &str) -> Result<FormatKind> {
        Ok(match name {
            "raw" | "file" | "host_device" | "nbd" => FormatKind::Raw,
            "qcow2" => FormatKind::Qcow2,
            "qed" => FormatKind::Qed,
            _ => bail!("the format '{}' is not known: raw, qcow2 and qed are", name.escape_debug()),
        })
    }

    /// Opens what lies in `storage`, without its backing.
    pub async fn open(self, storage: StorageHandle, options: FormatOptions) -> Result<NodeHandle> {
        let cx = Ctx::GUEST;
        let FormatOptions { read_only, fenced, discard, metadata_cache_bytes, journal } = options;
        Ok(match self {
            FormatKind::Raw => NodeHandle::new(RawNode::new(storage, read_only).discarding(discard)),
            FormatKind::Qcow2 => {
                let mut options =
                    infill_qcow2::OpenOptions { read_only, fenced, discard, journal, ..Default::default() };
                options.metadata_cache_bytes = metadata_cache_bytes.unwrap_or(options.metadata_cache_bytes);
                NodeHandle::new(infill_qcow2::Qcow2::open(&cx, storage, options).await?)
            }
            FormatKind::Qed => {
                let mut options =
                    infill_qed::OpenOptions { read_only, discard, journal, ..Default::default() };
                options.metadata_cache_bytes = metadata_cache_bytes.unwrap_or(options.metadata_cache_bytes);
                NodeHandle::new(infill_qed::Qed::open(&cx, storage, options).await?)
            }
        })
    }

    /// Checks an image that nobody has open; `None` where the format has nothing to check.
    pub async fn check(self, storage: &StorageHandle, repair: Repair) -> Result<Option<CheckReport>> {
        let cx = Ctx::GUEST;
        Ok(match self {
            FormatKind::Raw => None,
            FormatKind::Qcow2 => Some(infill_qcow2::check(&cx, storage, repair).await?),
            FormatKind::Qed => Some(infill_qed::check(&cx, storage, repair).await?),
        })
    }
}

/// Whether the node's image is marked as one that moved to another host.
pub fn is_fenced(node: &NodeHandle) -> bool {
    node.info().format_specific.iter().any(|(fact, _)| *fact == infill_qcow2::MOVED_FACT)
}

/// The format whose magic stands at the beginning of `storage`; `None` where there is none that we know.
pub async fn probe_storage(storage: &StorageHandle) -> Result<Option<FormatKind>> {
    let len = storage.len().min(PROBE_BYTES) as usize;
    let first: BytesMut = storage
        .read_vec(&Ctx::GUEST, 0, len)
        .await
        .with_context(|| format!("reading the first bytes of {}", storage.name()))?;
    Ok(if infill_qcow2::probe(&first) {
        Some(FormatKind::Qcow2)
    } else if infill_qed::probe(&first) {
        Some(FormatKind::Qed)
    } else {
        None
    })
}
