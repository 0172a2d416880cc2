//! `blockdev-create`, and the new images that other commands make on their way.
//!
//! What never happens: a file that is emptied before everything about the new image is known to be possible; a node that
//! is written to while somebody relies on it. A file is emptied under its writer's lock, as QEMU does it.

use std::path::Path;
use std::rc::Rc;

use infill_base::{Ctx, ErrorKind, IoError, IoResult, OpenError, WriteFlags, zero_bytes};
use infill_io::{Create, FileOptions, FileStorage};
use infill_job::{JobOptions, JobType};
use infill_node::{BackingRef, NodeStorage};
use infill_qcow2::Compression;
use infill_qmp::create::{
    BlockdevCreate, CreateBacking, CreateOptions, CreateQcow2, CreateQed, Preallocation,
};
use infill_qmp::{BlockdevRef, QmpError};
use infill_storage::StorageHandle;

use super::control::{Control, refused};
use super::jobs::{Claims, job_refused, yield_once};
use crate::blockdev::Access;

/// Sizes of qcow2 disks are multiples of this.
const SECTOR_BYTES: u64 = 512;
/// `preallocation=full` is written in pieces of this size.
const FULL_PIECE_BYTES: u64 = 4 << 20;
/// Cluster sizes of qcow2, in bytes, and the smallest one that can have subclusters.
const QCOW2_CLUSTER_BYTES: std::ops::RangeInclusive<u64> = 512..=2 << 20;
const QCOW2_CLUSTER_BYTES_MIN_EXTENDED: u64 = 16 << 10;
/// Cluster sizes of QED, in bytes, and its table sizes, in clusters.
const QED_CLUSTER_BYTES: std::ops::RangeInclusive<u64> = 4096..=64 << 20;
const QED_TABLE_CLUSTERS: std::ops::RangeInclusive<i64> = 1..=16;
/// Entries of QED's tables have this size, in bytes.
const QED_ENTRY_BYTES: u64 = 8;

/// A format, and everything about a new image of it.
#[derive(Clone, Debug)]
pub(super) enum NewImage {
    Qcow2(infill_qcow2::CreateOptions),
    Qed(infill_qed::CreateOptions),
}

impl NewImage {
    /// Makes it. Stable on return.
    pub(super) async fn write(&self, storage: &StorageHandle) -> IoResult<()> {
        let cx = Ctx::GUEST;
        let made = match self {
            NewImage::Qcow2(options) => infill_qcow2::create(&cx, storage, options).await,
            NewImage::Qed(options) => infill_qed::create(&cx, storage, options).await,
        };
        made.map_err(|error| IoError::new(ErrorKind::InvalidInput, error.to_string()))
    }

    /// Refuses on a device that forgets what would be refused on the real one.
    pub(super) async fn try_out(&self) -> IoResult<()> {
        let device = infill_storage::NullStorage {
            len: i64::MAX as u64,
            latency: std::time::Duration::ZERO,
            tells_zero: true,
        };
        self.write(&StorageHandle::new(device)).await
    }
}

fn bad<T>(why: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(why))
}

/// A backing that a header is to name.
fn backing_ref(backing: &CreateBacking) -> Option<BackingRef> {
    let filename = backing.file.clone().filter(|name| !name.is_empty())?;
    Some(BackingRef { filename, format: backing.format.map(str::to_owned) })
}

/// What is asked for of a qcow2 image, in the protocol's words where it is refused.
fn qcow2(options: &CreateQcow2) -> Result<NewImage, QmpError> {
    let defaults = infill_qcow2::CreateOptions::default();
    let cluster_bytes = options.cluster_bytes.unwrap_or(defaults.cluster_bytes);
    let refcount_bits = options.refcount_bits.unwrap_or(defaults.refcount_bits.into());
    let newer = "supported with compatibility level 1.1 and above (use version=v3 or greater)";
    if !options.size.is_multiple_of(SECTOR_BYTES) {
        return bad(format!("Image size must be a multiple of {SECTOR_BYTES} bytes"));
    }
    if options.size > i64::MAX as u64 {
        return bad("Could not resize image: Image size cannot be negative");
    }
    if options.version < 3 && options.extended_l2 {
        return bad(format!("Extended L2 entries are only {newer}"));
    }
    if !cluster_bytes.is_power_of_two() || !QCOW2_CLUSTER_BYTES.contains(&cluster_bytes) {
        return bad("Cluster size must be a power of two between 512 and 2048k");
    }
    if options.extended_l2 && cluster_bytes < QCOW2_CLUSTER_BYTES_MIN_EXTENDED {
        return bad(format!(
            "Extended L2 entries are only supported with cluster sizes of at least {QCOW2_CLUSTER_BYTES_MIN_EXTENDED} bytes"
        ));
    }
    let preallocates = options.preallocation != Preallocation::Off;
    if preallocates && options.backing.file.is_some() && !options.extended_l2 {
        return bad("Backing file and preallocation can only be used at the same time if extended_l2 is on");
    }
    if options.backing.format.is_some() && options.backing.file.is_none() {
        return bad("Backing format cannot be used without backing file");
    }
    if options.version < 3 && options.lazy_refcounts {
        return bad(format!("Lazy refcounts only {newer}"));
    }
    let bits = u32::try_from(refcount_bits).unwrap_or(0);
    if !bits.is_power_of_two() || bits > 64 {
        return bad("Refcount width must be a power of two and may not exceed 64 bits");
    }
    if options.version < 3 && bits != 16 {
        return bad(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
        );
    }
    if options.data_file_raw {
        return bad("data-file-raw requires data-file");
    }
    if options.version < 3 && options.zstd {
        return bad(format!("Non-zlib compression type is only {newer}"));
    }
    Ok(NewImage::Qcow2(infill_qcow2::CreateOptions {
        size: options.size,
        backing: backing_ref(&options.backing),
        version: options.version,
        cluster_bytes,
        refcount_bits: bits,
        extended_l2: options.extended_l2,
        compression: if options.zstd { Compression::Zstd } else { Compression::Deflate },
        lazy_refcounts: options.lazy_refcounts,
        preallocation: match options.preallocation {
            Preallocation::Off => infill_qcow2::Preallocation::Off,
            Preallocation::Metadata => infill_qcow2::Preallocation::Metadata,
            Preallocation::Falloc => infill_qcow2::Preallocation::Falloc,
            Preallocation::Full => infill_qcow2::Preallocation::Full,
        },
    }))
}

/// What is asked for of a QED image, in the protocol's words where it is refused.
fn qed(options: &CreateQed) -> Result<NewImage, QmpError> {
    let defaults = infill_qed::CreateOptions::default();
    let cluster_bytes = options.cluster_bytes.unwrap_or(defaults.cluster_bytes);
    let table_clusters = options.table_clusters.unwrap_or(defaults.table_clusters.into());
    if !cluster_bytes.is_power_of_two() || !QED_CLUSTER_BYTES.contains(&cluster_bytes) {
        let (least, most) = QED_CLUSTER_BYTES.into_inner();
        return bad(format!("QED cluster size must be within range [{least}, {most}] and power of 2"));
    }
    let tables = u32::try_from(table_clusters).unwrap_or(0);
    if !tables.is_power_of_two() || !QED_TABLE_CLUSTERS.contains(&table_clusters) {
        let (least, most) = QED_TABLE_CLUSTERS.into_inner();
        return bad(format!("QED table size must be within range [{least}, {most}] and power of 2"));
    }
    let entries = cluster_bytes * u64::from(tables) / QED_ENTRY_BYTES;
    let most = entries.saturating_mul(entries).saturating_mul(cluster_bytes);
    if !options.size.is_multiple_of(SECTOR_BYTES) || options.size > most {
        return bad(format!(
            "QED image size must be a non-zero multiple of cluster size and less than {most} bytes"
        ));
    }
    Ok(NewImage::Qed(infill_qed::CreateOptions {
        size: options.size,
        backing: backing_ref(&options.backing),
        cluster_bytes,
        table_clusters: tables,
    }))
}

/// Makes the file at `path`, or empties it under its writer's lock. Its name is stable on return, its content is not.
pub(super) fn make_file(path: &str, len: u64) -> Result<FileStorage, QmpError> {
    let failed = |error: &str| {
        let why = error.strip_prefix(&format!("{path}: ")).unwrap_or(error);
        let why = why.split(" (os error ").next().unwrap_or(why);
        QmpError::generic(format!("Could not create '{path}': {why}"))
    };
    let options = FileOptions { create: Create::Truncate(len), ..FileOptions::default() };
    let storage = FileStorage::open(path, options).map_err(|error| match error {
        OpenError::Io(error) => failed(&error.to_string()),
        other => QmpError::generic(other.to_string()),
    })?;
    let parent = Path::new(path).parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = std::fs::File::open(parent.unwrap_or(Path::new(".")));
    directory
        .and_then(|directory| directory.sync_all())
        .map_err(|error| failed(&format!("syncing its directory: {error}")))?;
    Ok(storage)
}

async fn create_file(filename: &str, size: u64, preallocation: Preallocation) -> Result<(), QmpError> {
    if preallocation == Preallocation::Metadata {
        return bad("Unsupported preallocation mode: metadata");
    }
    if size > i64::MAX as u64 {
        return bad("Could not resize file: Invalid argument");
    }
    let cx = Ctx::GUEST;
    let storage = StorageHandle::new(make_file(filename, 0)?);
    let filled = async {
        match preallocation {
            Preallocation::Falloc => storage.allocate(&cx, 0, size).await?,
            Preallocation::Full => {
                let mut at = 0;
                while at < size {
                    let piece = (size - at).min(FULL_PIECE_BYTES);
                    storage.write(&cx, at, zero_bytes(piece as usize), WriteFlags::empty()).await?;
                    at += piece;
                }
            }
            Preallocation::Off | Preallocation::Metadata => match storage.set_len(&cx, size).await {
                // A block device has the length that it has.
                Err(error) if error.kind() == ErrorKind::Unsupported && storage.len() >= size => {}
                result => result?,
            },
        }
        storage.sync(&cx).await
    };
    filled.await.map_err(|error| QmpError::generic(format!("Could not resize file: {error}")))
}

impl Control {
    /// `blockdev-create`. Answered once the job runs, which its manager dismisses.
    pub(super) async fn blockdev_create(self: &Rc<Self>, create: BlockdevCreate) -> Result<(), QmpError> {
        let options = JobOptions { auto_dismiss: false, ..JobOptions::new(create.job_id.clone()) };
        let control = self.clone();
        let work = async move {
            let made = control.create(create).await;
            made.map_err(|error| IoError::new(ErrorKind::Io, error.desc))
        };
        self.jobs().start_future(JobType::Create, options, work).map_err(job_refused)?;
        yield_once().await;
        Ok(())
    }

    async fn create(self: Rc<Self>, create: BlockdevCreate) -> Result<(), QmpError> {
        let (file, wanted) = match create.options {
            CreateOptions::File { filename, size, preallocation } => {
                return create_file(&filename, size, preallocation).await;
            }
            CreateOptions::Qcow2(options) => (options.file.clone(), qcow2(&options)),
            CreateOptions::Qed(options) => (options.file.clone(), qed(&options)),
        };
        match file {
            BlockdevRef::Name(name) => self.create_in(&create.job_id, &name, wanted).await,
            BlockdevRef::Definition(options) => {
                // A node of its own, for as long as that takes.
                let added = self.blockdevs().add(*options).await.map_err(|error| refused(&error))?;
                let made = self.create_in(&create.job_id, &added, wanted).await;
                let closed = self.blockdevs().del(&added).await.map_err(|error| refused(&error));
                made.and(closed)
            }
        }
    }

    /// Makes an image in the node `name`, which nobody else uses meanwhile.
    async fn create_in(
        &self,
        job_id: &str,
        name: &str,
        wanted: Result<NewImage, QmpError>,
    ) -> Result<(), QmpError> {
        if self.blockdevs().get(name).is_err() {
            return bad(format!("Cannot find device='{name}' nor node-name='{name}'"));
        }
        let facts = self.blockdevs().facts(name).map_err(|error| refused(&error))?;
        if facts.read_only {
            return bad("Block node is read-only");
        }
        let users = self.blockdevs().graph().users(name);
        if let Some(above) = users.iter().find_map(|user| user.strip_prefix("node '")?.strip_suffix('\''))
            && self.blockdevs().facts(above).is_ok_and(|facts| facts.file.as_deref() == Some(name))
        {
            return bad(format!(
                "Permission conflict on node '{name}': permissions 'write, resize' are both required by an unnamed block \
                 device (uses node '{name}' as 'root' child) and unshared by node '{above}' (uses node '{name}' as 'file' \
                 child)."
            ));
        }
        let mut claims = Claims::new(self.blockdevs(), job_id);
        let node = claims.take(name, Access::Owner)?;
        let storage = match self.blockdevs().storage(name) {
            Some(storage) => node.on_storage(storage),
            None => StorageHandle::new(NodeStorage::new(node)),
        };
        wanted?.write(&storage).await.map_err(|error| QmpError::generic(error.message()))
    }
}
