//! The formats under test, in their geometries: how an image is made, opened and checked.

use infill_base::{Ctx, DiscardMode, OpenError};
use infill_node::{BackingRef, CheckReport, NodeHandle, RawNode, Repair};
use infill_sim::Media;
use infill_storage::StorageHandle;
use infill_storage::journal::Journaling;

use crate::Violation;
use crate::layout::Layout;
use crate::node_suite::Discards;

/// A qcow2 geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Qcow2Shape {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size in bytes.
    pub cluster_bytes: u64,
    /// Width of a refcount.
    pub refcount_bits: u32,
    /// Subclusters.
    pub extended_l2: bool,
    /// Refcounts may be written late, under the dirty bit.
    pub lazy_refcounts: bool,
    /// Cache of mapping slices, in bytes: small, so that slices are evicted.
    pub cache_bytes: u64,
    /// A mistake that is planted.
    pub fault: Option<infill_qcow2::Fault>,
}

/// A QED geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QedShape {
    /// Cluster size in bytes.
    pub cluster_bytes: u64,
    /// Clusters of a table.
    pub table_clusters: u32,
    /// Cache of mapping slices, in bytes: small, so that slices are evicted.
    pub cache_bytes: u64,
    /// A mistake that is planted.
    pub fault: Option<infill_qed::Fault>,
}

/// A format in one of its geometries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The storage's own bytes. Never an overlay.
    Raw,
    /// qcow2.
    Qcow2(Qcow2Shape),
    /// QED.
    Qed(QedShape),
}

const QCOW2: Qcow2Shape = Qcow2Shape {
    version: 3,
    cluster_bytes: 64 << 10,
    refcount_bits: 16,
    extended_l2: false,
    lazy_refcounts: false,
    cache_bytes: 16 << 10,
    fault: None,
};

const QED: QedShape =
    QedShape { cluster_bytes: 4 << 10, table_clusters: 2, cache_bytes: 16 << 10, fault: None };

impl Format {
    /// qcow2 as QEMU makes it by default.
    pub const QCOW2: Format = Format::Qcow2(QCOW2);
    /// qcow2 with subclusters, as our own overlays have them.
    pub const QCOW2_SUBCLUSTERS: Format = Format::Qcow2(Qcow2Shape { extended_l2: true, ..QCOW2 });
    /// qcow2 with the smallest clusters that have subclusters, of 512 bytes.
    pub const QCOW2_SUBCLUSTERS_16K: Format =
        Format::Qcow2(Qcow2Shape { extended_l2: true, cluster_bytes: 16 << 10, ..QCOW2 });
    /// qcow2 with clusters of a page.
    pub const QCOW2_4K: Format = Format::Qcow2(Qcow2Shape { cluster_bytes: 4 << 10, ..QCOW2 });
    /// qcow2 of version 2.
    pub const QCOW2_V2: Format = Format::Qcow2(Qcow2Shape { version: 2, cluster_bytes: 4 << 10, ..QCOW2 });
    /// qcow2 with the smallest clusters and the widest refcounts: every table grows soon.
    pub const QCOW2_512: Format =
        Format::Qcow2(Qcow2Shape { cluster_bytes: 512, refcount_bits: 64, cache_bytes: 4 << 10, ..QCOW2 });
    /// qcow2 whose refcounts are single bits.
    pub const QCOW2_1BIT: Format =
        Format::Qcow2(Qcow2Shape { cluster_bytes: 4 << 10, refcount_bits: 1, ..QCOW2 });
    /// qcow2 with lazy refcounts.
    pub const QCOW2_LAZY: Format =
        Format::Qcow2(Qcow2Shape { cluster_bytes: 4 << 10, lazy_refcounts: true, ..QCOW2 });
    /// QED with the smallest clusters.
    pub const QED: Format = Format::Qed(QED);
    /// QED as QEMU makes it by default.
    pub const QED_64K: Format = Format::Qed(QedShape { cluster_bytes: 64 << 10, table_clusters: 4, ..QED });

    /// Every format and geometry, by name, for a command line.
    pub const ALL: &[(&str, Format)] = &[
        ("raw", Format::Raw),
        ("qcow2", Format::QCOW2),
        ("qcow2-subclusters", Format::QCOW2_SUBCLUSTERS),
        ("qcow2-subclusters-16k", Format::QCOW2_SUBCLUSTERS_16K),
        ("qcow2-4k", Format::QCOW2_4K),
        ("qcow2-v2", Format::QCOW2_V2),
        ("qcow2-512", Format::QCOW2_512),
        ("qcow2-1bit", Format::QCOW2_1BIT),
        ("qcow2-lazy", Format::QCOW2_LAZY),
        ("qed", Format::QED),
        ("qed-64k", Format::QED_64K),
    ];

    /// The format of that name.
    pub fn parse(name: &str) -> Option<Format> {
        Format::ALL.iter().find(|(known, _)| *known == name).map(|(_, format)| *format)
    }

    /// The same without a planted mistake.
    pub fn sound(&self) -> Format {
        match *self {
            Format::Raw => Format::Raw,
            Format::Qcow2(shape) => Format::Qcow2(Qcow2Shape { fault: None, ..shape }),
            Format::Qed(shape) => Format::Qed(QedShape { fault: None, ..shape }),
        }
    }

    /// Its name, as [`Format::parse`] takes it.
    pub fn name(&self) -> String {
        let plain = self.sound();
        let fault = match self {
            Format::Raw => None,
            Format::Qcow2(shape) => shape.fault.map(|fault| format!("{fault:?}")),
            Format::Qed(shape) => shape.fault.map(|fault| format!("{fault:?}")),
        };
        let name = Format::ALL.iter().find(|(_, known)| *known == plain).map_or("unnamed", |(name, _)| name);
        fault.map_or(name.to_string(), |fault| format!("{name} with {fault}"))
    }

    /// Its name for `qemu-img`.
    pub fn qemu_name(&self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2(_) => "qcow2",
            Format::Qed(_) => "qed",
        }
    }

    /// Whether it can have a backing.
    pub fn is_overlay(&self) -> bool {
        !matches!(self, Format::Raw)
    }

    /// Cluster size in bytes; a page for what has none.
    pub fn cluster_bytes(&self) -> u64 {
        match self {
            Format::Raw => 4096,
            Format::Qcow2(shape) => shape.cluster_bytes,
            Format::Qed(shape) => shape.cluster_bytes,
        }
    }

    /// Bytes of the pieces in which it allocates, so that operations meet at their boundaries.
    pub fn unit_bytes(&self) -> u64 {
        match self {
            Format::Qcow2(shape) if shape.extended_l2 => shape.cluster_bytes / 32,
            _ => self.cluster_bytes(),
        }
    }

    /// Size of a disk for crash states: as small as it may be with a few L2 tables or clusters.
    pub fn crash_size(&self) -> u64 {
        match self {
            Format::Raw => 1 << 20,
            _ if self.cluster_bytes() >= 16 << 10 => 40 * self.cluster_bytes().min(48 << 10) + 512,
            // Two L2 tables.
            Format::Qcow2(shape) if shape.cluster_bytes == 4 << 10 => (2120 << 10) + 512,
            // Many, or one.
            _ => (768 << 10) + 512,
        }
    }

    /// What a discard of whole clusters leaves, over a backing or over nothing.
    pub fn discards(&self, over_backing: bool) -> Discards {
        match self {
            Format::Raw => Discards::Either,
            _ if !over_backing => Discards::Absent,
            Format::Qcow2(shape) if shape.version >= 3 => Discards::Zero,
            Format::Qcow2(_) | Format::Qed(_) => Discards::Nothing,
        }
    }

    /// Whether its disk can be made shorter.
    pub fn shrinks(&self) -> bool {
        matches!(self, Format::Raw)
    }

    /// Whether nothing leaks while nothing crashes, once it was closed, and `check` gives every leak back. (QED has no
    /// list of free clusters: what lies between used ones stays in the file, as a hole.)
    pub fn is_tight(&self) -> bool {
        matches!(self, Format::Qcow2(_))
    }

    /// Whether the image says of itself that it wants a repair before it is judged (P3).
    pub fn is_marked_dirty(&self, media: &Media) -> bool {
        matches!(Layout::parse(*self, media), Some(Ok(layout)) if layout.dirty)
    }

    /// Makes an image of `size` bytes in an empty storage.
    pub async fn create(
        &self,
        storage: &StorageHandle,
        size: u64,
        backing: Option<BackingRef>,
    ) -> Result<(), Violation> {
        let cx = Ctx::GUEST;
        let made = match self {
            Format::Raw => {
                assert!(backing.is_none(), "raw is never an overlay");
                let made = async {
                    storage.set_len(&cx, size).await?;
                    storage.sync(&cx).await
                };
                return made.await.map_err(|error| failed("creating the image", &error));
            }
            Format::Qcow2(shape) => {
                let options = infill_qcow2::CreateOptions {
                    size,
                    backing,
                    version: shape.version,
                    cluster_bytes: shape.cluster_bytes,
                    refcount_bits: shape.refcount_bits,
                    extended_l2: shape.extended_l2,
                    lazy_refcounts: shape.lazy_refcounts,
                    ..Default::default()
                };
                infill_qcow2::create(&cx, storage, &options).await
            }
            Format::Qed(shape) => {
                let (cluster_bytes, table_clusters) = (shape.cluster_bytes, shape.table_clusters);
                let options = infill_qed::CreateOptions { size, backing, cluster_bytes, table_clusters };
                infill_qed::create(&cx, storage, &options).await
            }
        };
        made.map_err(|error| failed("creating the image", &error))
    }

    /// Opens an image for reading and writing, with every discard done.
    pub async fn open(&self, storage: &StorageHandle) -> Result<NodeHandle, OpenError> {
        self.open_with(storage, Journaling::Off).await
    }

    /// As [`Format::open`], with a journal.
    pub async fn open_with(
        &self,
        storage: &StorageHandle,
        journal: Journaling,
    ) -> Result<NodeHandle, OpenError> {
        let (cx, storage) = (Ctx::GUEST, storage.clone());
        match self {
            Format::Raw => Ok(NodeHandle::new(RawNode::new(storage, false))),
            Format::Qcow2(shape) => {
                let options = infill_qcow2::OpenOptions {
                    discard: DiscardMode::Unmap,
                    metadata_cache_bytes: shape.cache_bytes,
                    journal,
                    fault: shape.fault,
                    ..Default::default()
                };
                infill_qcow2::Qcow2::open(&cx, storage, options).await.map(NodeHandle::new)
            }
            Format::Qed(shape) => {
                let options = infill_qed::OpenOptions {
                    discard: DiscardMode::Unmap,
                    metadata_cache_bytes: shape.cache_bytes,
                    journal,
                    fault: shape.fault,
                    ..Default::default()
                };
                infill_qed::Qed::open(&cx, storage, options).await.map(NodeHandle::new)
            }
        }
    }

    /// Checks an image that nobody has open.
    pub async fn check(&self, storage: &StorageHandle, repair: Repair) -> Result<CheckReport, OpenError> {
        match self {
            Format::Raw => Ok(CheckReport::default()),
            Format::Qcow2(_) => infill_qcow2::check(&Ctx::GUEST, storage, repair).await,
            Format::Qed(_) => infill_qed::check(&Ctx::GUEST, storage, repair).await,
        }
    }
}

pub(crate) fn failed(when: &str, error: &dyn std::fmt::Display) -> Violation {
    Violation::Failed { when: when.into(), error: error.to_string() }
}
