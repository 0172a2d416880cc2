//! Makes an empty image.
//!
//! Order of writes: (1) the L1 table, in space that is reserved where the storage can, and a name of a backing file
//! that does not fit the first sector, (2) sync, (3) the first sector, which makes it an image, (4) sync.

use infill_base::{CreateError, Ctx, IoError, ZeroFlags};
use infill_node::BackingRef;
use infill_storage::{StorageHandle, unaligned};

use crate::format::limits::{CLUSTER_BYTES_DEFAULT, TABLE_CLUSTERS_DEFAULT};
use crate::geometry::Geometry;
use crate::header::Header;
use crate::space::zero_range;

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Size of the disk in bytes, a multiple of 512.
    pub size: u64,
    /// What lies below. Of its format, the header keeps only that it is raw.
    pub backing: Option<BackingRef>,
    /// Cluster size in bytes, a power of two from 4 KiB to 64 MiB.
    pub cluster_bytes: u64,
    /// Clusters of a table, a power of two up to 16. Images with 1 are refused by QEMU (10.0.2), its own included.
    pub table_clusters: u32,
}

impl Default for CreateOptions {
    fn default() -> Self {
        CreateOptions {
            size: 0,
            backing: None,
            cluster_bytes: CLUSTER_BYTES_DEFAULT,
            table_clusters: TABLE_CLUSTERS_DEFAULT,
        }
    }
}

/// Makes an empty image in `storage`, which is empty or may be overwritten. All of it is stable on return.
pub async fn create(cx: &Ctx, storage: &StorageHandle, options: &CreateOptions) -> Result<(), CreateError> {
    let bad = |option, why| CreateError::BadOption { option, why };
    let geometry = Geometry::new(options.cluster_bytes, options.table_clusters)
        .map_err(|why| bad("cluster_size or table_size", why))?;
    geometry.check_size(options.size).map_err(|why| bad("size", why))?;
    let header = Header::new(geometry, options.size);
    let (header, name) = header
        .with_backing(options.backing.as_ref())
        .map_err(|error| bad("backing_file", error.message().to_owned()))?;

    let end = header.layout().l1_bytes().end;
    storage.set_len(cx, end).await?;
    // Without leave to unmap it: the table's space is reserved, so that a full disk never fails its write-back.
    zero_range(cx, storage, 0, end, ZeroFlags::empty()).await?;
    if let Some((at, name)) = name {
        unaligned::write(cx, storage, at, name).await?;
    }
    storage.sync(cx).await?;
    header.store(cx, storage).await?;
    storage.sync(cx).await.map_err(IoError::into)
}
