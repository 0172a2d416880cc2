//! The fence: the mark of an image whose disk another host owns now.
//!
//! It outlives every daemon: a manager that starts the old machine on the image's path, after a reboot, is refused by
//! whatever program it starts, with the name that the image's feature table gives the bit. One bit of the header's first
//! sector, which a device writes whole or not at all: a crash leaves it set or clear, and everything else as it was.
//!
//! On an open image it is [`infill_node::Node::set_fence`]; here it is for one that nobody has open.

use infill_base::{Ctx, OpenError};
use infill_storage::StorageHandle;

use crate::header::{Header, Purpose};

/// Marks the image in `storage`, which nobody has open for writing, as one that another host owns, or takes the mark away.
/// Stable when it returns; may be repeated.
///
/// Refused where it is no qcow2 image of version 3, or has a feature that is not known. Nothing else of it is looked at or
/// changed.
pub async fn set_fence(cx: &Ctx, storage: &StorageHandle, fenced: bool) -> Result<(), OpenError> {
    let header = Header::read(cx, storage, Purpose::Check).await?;
    if header.is_fenced() == fenced {
        // Whoever wrote it may have died before its sync.
        return Ok(storage.sync(cx).await?);
    }
    Ok(header.with_fence(fenced)?.store(cx, storage).await?)
}
