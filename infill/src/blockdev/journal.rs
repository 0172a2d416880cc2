//! Which journal belongs to an image: its identity, and the name of the journal's file.
//!
//! A file is told by device, inode and time of birth (an inode is used again, a name says nothing); a block device by its
//! number; an NBD export by its URI. What lies on anything else is written through.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result};
use infill_io::JournalDir;
use infill_storage::StorageHandle;
use infill_storage::journal::Journaling;

/// What becomes of changes of an image in `storage`, of the node with that driver and file, that only memory has when the
/// process dies.
pub fn journaling(
    dir: &JournalDir,
    driver: &str,
    path: Option<&Path>,
    storage: &StorageHandle,
) -> Result<Journaling> {
    let (name, identity) = match (driver, path) {
        (_, Some(path)) => {
            let meta = std::fs::metadata(path).with_context(|| path.display().to_string())?;
            of_file(&meta)
        }
        ("nbd", None) => {
            let uri = storage.name();
            (format!("nbd-{:016x}", hash(uri.as_bytes())), uri)
        }
        _ => return Ok(Journaling::WriteThrough),
    };
    Ok(dir.journaling(&name, &identity)?)
}

/// What tells the file or block device at `path` from others.
pub fn identity_of(path: &Path) -> Result<String> {
    let meta = std::fs::metadata(path).with_context(|| path.display().to_string())?;
    Ok(of_file(&meta).1)
}

fn of_file(meta: &Metadata) -> (String, String) {
    if meta.file_type().is_block_device() {
        let name = format!("device-{:x}", meta.rdev());
        return (name.clone(), name);
    }
    let name = format!("file-{:x}-{:x}", meta.dev(), meta.ino());
    let born = meta.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok());
    let identity = format!("{name} born {}", born.map_or(0, |born| born.as_nanos()));
    (name, identity)
}

/// FNV-1a: the same in every version of the program. A name that two share is no harm: the journal has the whole.
pub fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
