//! `-s` and `-l`: a temporary image that takes what is written, and internal snapshots that are looked at.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use infill_base::Ctx;
use infill_io::{FileOptions, FileStorage};
use infill_node::NodeHandle;
use infill_qmp::{BlockdevOptions, Members};
use serde_json::{Value, json};

use crate::blockdev::Blockdevs;

/// An internal snapshot, by its id, its name or both; or by either.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SnapshotName {
    Both { id: Option<String>, name: Option<String> },
    Either(String),
}

impl SnapshotName {
    /// As `-l` takes it.
    pub(super) fn parse(text: &str) -> Result<SnapshotName> {
        if !text.starts_with("snapshot.") {
            return Ok(SnapshotName::Either(text.into()));
        }
        let (mut id, mut name) = (None, None);
        for pair in text.split(',') {
            let value = |key: &str| pair.strip_prefix(key).and_then(|rest| rest.strip_prefix('='));
            if let Some(value) = value("snapshot.id") {
                id = Some(value.to_owned());
            } else if let Some(value) = value("snapshot.name") {
                name = Some(value.to_owned());
            } else {
                bail!(
                    "Failed in parsing snapshot param `{text}': it is snapshot.id=ID,snapshot.name=NAME, or one of them"
                );
            }
        }
        Ok(SnapshotName::Both { id, name })
    }

    /// Has the disk shown as it was then.
    pub(super) async fn load(&self, disk: &NodeHandle) -> Result<()> {
        let cx = Ctx::GUEST;
        let loaded = match self {
            SnapshotName::Both { id, name } => disk.load_snapshot(&cx, id.as_deref(), name.as_deref()).await,
            SnapshotName::Either(text) => match disk.load_snapshot(&cx, Some(text), None).await {
                Ok(None) => disk.load_snapshot(&cx, None, Some(text)).await,
                other => other,
            },
        };
        match loaded {
            Ok(Some(_)) => Ok(()),
            Ok(None) => bail!("Failed to load snapshot: Can't find snapshot"),
            Err(error) => bail!("Failed to load snapshot: {error}"),
        }
    }
}

/// Where temporary images lie if nobody says where.
const TEMPORARY_DIR: &str = "/var/tmp";
/// Sizes of qcow2 disks are multiples of this.
const SECTOR_BYTES: u64 = 512;

/// A temporary image on a disk, to which what is written goes. Its file has no name any more: it is gone with the process.
pub(super) async fn temporary_over(blockdevs: &Blockdevs, disk: &str) -> Result<String> {
    let dir = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from(TEMPORARY_DIR), PathBuf::from);
    let file = dir.join(format!(
        "infill-{}-{:016x}",
        std::process::id(),
        RandomState::new().build_hasher().finish()
    ));
    let in_dir = || format!("a temporary image in {} (see TMPDIR)", dir.display());
    // For nobody else's eyes: it holds what guests write.
    let options = &mut std::fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600).open(&file).with_context(in_dir)?;
    let made = async {
        let options = infill_qcow2::CreateOptions {
            size: blockdevs.get(disk)?.len().next_multiple_of(SECTOR_BYTES),
            ..Default::default()
        };
        let storage = FileStorage::open_handle(&file, FileOptions::default())?;
        infill_qcow2::create(&Ctx::GUEST, &storage, &options).await?;
        drop(storage);
        let node = json!({
            "driver": "qcow2", "file": { "driver": "file", "filename": file }, "backing": disk,
            "discard": "unmap",
        });
        let Value::Object(node) = node else { bail!("a temporary image cannot be described") };
        blockdevs.add(BlockdevOptions::read(Members::of_json(node))?).await
    };
    let made = made.await;
    let removed = std::fs::remove_file(&file);
    let made = made.with_context(in_dir)?;
    removed?;
    Ok(made)
}
