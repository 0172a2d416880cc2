//! The formats under test, in their geometries: how an image is made, opened and checked.

use infill_base::{Ctx, OpenError};
use infill_node::{BackingRef, CheckReport, NodeHandle, RawNode, Repair};
use infill_sim::Media;
use infill_storage::StorageHandle;

use crate::Violation;
use crate::node_suite::Discards;

/// A format in one of its geometries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The storage's own bytes. Never an overlay.
    Raw,
}

impl Format {
    /// Every format and geometry, by name, for a command line.
    pub const ALL: &[(&str, Format)] = &[("raw", Format::Raw)];

    /// The format of that name.
    pub fn parse(name: &str) -> Option<Format> {
        Format::ALL.iter().find(|(known, _)| *known == name).map(|(_, format)| *format)
    }

    /// Its name, as [`Format::parse`] takes it.
    pub fn name(&self) -> &'static str {
        Format::ALL.iter().find(|(_, known)| known == self).map_or("a geometry of its own", |(name, _)| name)
    }

    /// Its name for `qemu-img`.
    pub fn qemu_name(&self) -> &'static str {
        match self {
            Format::Raw => "raw",
        }
    }

    /// What a discard of whole clusters leaves, over a backing or over nothing.
    pub fn discards(&self, over_backing: bool) -> Discards {
        let _ = over_backing;
        match self {
            Format::Raw => Discards::Either,
        }
    }

    /// Whether its disk can be made shorter.
    pub fn shrinks(&self) -> bool {
        matches!(self, Format::Raw)
    }

    /// Whether it can have a backing.
    pub fn is_overlay(&self) -> bool {
        !matches!(self, Format::Raw)
    }

    /// Bytes of the pieces in which it allocates, so that operations meet at their boundaries.
    pub fn unit_bytes(&self) -> u64 {
        match self {
            Format::Raw => 4096,
        }
    }

    /// Whether the image says of itself that it wants a repair before it is judged (P3).
    pub fn is_marked_dirty(&self, media: &Media) -> bool {
        let _ = media;
        match self {
            Format::Raw => false,
        }
    }

    /// Makes an image of `size` bytes in an empty storage.
    pub async fn create(
        &self,
        storage: &StorageHandle,
        size: u64,
        backing: Option<BackingRef>,
    ) -> Result<(), Violation> {
        match self {
            Format::Raw => {
                assert!(backing.is_none(), "raw is never an overlay");
                let made = async {
                    storage.set_len(&Ctx::GUEST, size).await?;
                    storage.sync(&Ctx::GUEST).await
                };
                made.await.map_err(|error| failed("creating the image", &error))
            }
        }
    }

    /// Opens an image for reading and writing, with every discard done.
    pub async fn open(&self, storage: &StorageHandle) -> Result<NodeHandle, OpenError> {
        match self {
            Format::Raw => Ok(NodeHandle::new(RawNode::new(storage.clone(), false))),
        }
    }

    /// Checks an image that nobody has open.
    pub async fn check(&self, storage: &StorageHandle, repair: Repair) -> Result<CheckReport, OpenError> {
        let _ = (storage, repair);
        match self {
            Format::Raw => Ok(CheckReport::default()),
        }
    }
}

pub(crate) fn failed(when: &str, error: &dyn std::fmt::Display) -> Violation {
    Violation::Failed { when: when.into(), error: error.to_string() }
}
