//! `blockdev-snapshot-sync`: an overlay that is made, opened and put on a node in one go.
//!
//! The overlay is opened as the node is that it lies on (read-only, cache), and stays until it is deleted, as if it had been
//! added by name. (QEMU lets it go with its last user, which would leave a restarted daemon without it.) Where something
//! is refused later on, the node goes again; a file that was made stays, as QEMU leaves it.

use std::path::Path;

use infill_base::align_up;
use infill_io::FileStorage;
use infill_node::BackingRef;
use infill_qmp::shape::{NewImageMode, SnapshotSync};
use infill_qmp::{BlockdevOptions, Driver, Members, QmpError};
use infill_storage::{RangeGuard, StorageHandle};
use serde_json::{Map, Value, json};

use super::control::{Control, refused};
use super::create::{NewImage, make_file};
use crate::blockdev::{FormatKind, Located, NodeFacts, locate};

/// Sizes of disks of overlays are multiples of this.
const SECTOR_BYTES: u64 = 512;

/// A format that can be an overlay, or why `name` is none.
fn overlay_format(name: &str) -> Result<FormatKind, QmpError> {
    match name {
        "qcow2" => Ok(FormatKind::Qcow2),
        "qed" => Ok(FormatKind::Qed),
        "qcow" | "vmdk" | "parallels" => {
            Err(QmpError::generic(format!("file format '{name}' is not supported yet: use qcow2 or qed")))
        }
        name if infill_qmp::is_driver(name) => {
            Err(QmpError::generic(format!("Backing file not supported for file format '{name}'")))
        }
        name => Err(QmpError::generic(format!("Unknown file format '{name}'"))),
    }
}

/// An empty image of `format` over `backing`.
pub(super) fn empty_image(format: FormatKind, size: u64, backing: Option<BackingRef>) -> NewImage {
    match format {
        FormatKind::Qed => NewImage::Qed(infill_qed::CreateOptions { size, backing, ..Default::default() }),
        // No subclusters: QEMU's defaults hold where its names are used.
        _ => NewImage::Qcow2(infill_qcow2::CreateOptions { size, backing, ..Default::default() }),
    }
}

/// The path that `name` is, and whether it is of a device.
pub(super) fn path_of(name: &str) -> Result<(String, bool), QmpError> {
    if name.is_empty() {
        return Err(QmpError::generic("Could not create '': No such file or directory"));
    }
    match locate(name).map_err(|error| refused(&error))? {
        Located::Protocol(BlockdevOptions { driver: Driver::File { filename, device, .. }, .. }) => {
            Ok((filename, device))
        }
        Located::Protocol(other) => Err(QmpError::generic(format!(
            "Protocol driver '{}' does not support creating new images: name a file, or add the node and use \
             blockdev-snapshot",
            other.driver.as_str()
        ))),
        Located::Tree(_) => Err(QmpError::generic("Unknown protocol 'json'")),
    }
}

/// What `blockdev-add` would be given for the image in the file at `path`.
pub(super) fn description(
    (path, device): &(String, bool),
    format: &str,
    node_name: Option<&str>,
    like: &NodeFacts,
) -> Map<String, Value> {
    let driver = if *device { "host_device" } else { "file" };
    let mut description = json!({
        "driver": format,
        "read-only": like.read_only,
        "cache": { "direct": like.cache_direct, "no-flush": like.cache_no_flush },
        "file": { "driver": driver, "filename": path },
    });
    if let Some(name) = node_name {
        description["node-name"] = json!(name);
    }
    match description {
        Value::Object(description) => description,
        _ => Map::new(),
    }
}

impl Control {
    /// The name of a header's backing, for an image that is to lie on the node `name`.
    pub(super) fn backing_for(&self, name: &str) -> Result<BackingRef, QmpError> {
        let node = self.blockdevs().get(name).map_err(|error| refused(&error))?;
        let info = node.info();
        let format = match self.blockdevs().facts(name) {
            Ok(facts) if facts.is_filter() => self.format_of(name),
            _ => Some(info.driver.to_owned()),
        };
        // A relative path would be relative to the new image's directory.
        let filename = match locate(&info.filename) {
            Ok(Located::Protocol(BlockdevOptions { driver: Driver::File { filename, .. }, .. })) => {
                let whole = std::path::absolute(Path::new(&filename));
                whole.ok().and_then(|whole| whole.to_str().map(str::to_owned)).unwrap_or(filename)
            }
            _ => info.filename,
        };
        Ok(BackingRef { filename, format })
    }

    /// Makes (or takes) the overlay's file and opens it, as a node that lies on nothing yet: the names of the node that it is
    /// for, and its own. `turn`: nobody else changes the graph.
    pub(super) async fn make_overlay(
        &self,
        turn: &RangeGuard,
        sync: &SnapshotSync,
    ) -> Result<(String, String), QmpError> {
        let (device, name) =
            (sync.device.clone().unwrap_or_default(), sync.node_name.clone().unwrap_or_default());
        let missing = |_| QmpError::generic(format!("Cannot find device='{device}' nor node-name='{name}'"));
        let below = self.blockdevs().get(&name).map_err(missing)?;
        self.not_busy(&name)?;
        let Some(overlay) = &sync.overlay else {
            return Err(QmpError::generic("New overlay node-name missing"));
        };
        if self.blockdevs().get(overlay).is_ok() {
            return Err(QmpError::generic("New overlay node-name already in use"));
        }
        let format = overlay_format(&sync.format)?;
        let file = path_of(&sync.file)?;
        if sync.mode == NewImageMode::AbsolutePaths {
            let size = align_up(below.len(), SECTOR_BYTES);
            let image = empty_image(format, size, Some(self.backing_for(&name)?));
            image.try_out().await.map_err(|error| QmpError::generic(error.message()))?;
            let storage = make_file(&file.0, 0)?;
            write_into(&image, storage).await?;
        }
        let like = self.blockdevs().facts(&name).map_err(|error| refused(&error))?;
        let mut described = description(&file, format.as_str(), Some(overlay.as_str()), &like);
        described.insert("backing".into(), Value::Null);
        let options = BlockdevOptions::read(Members::of_json(described.clone()))?;
        let added = self.blockdevs().add_in(turn, options).await;
        added.map_err(|error| could_not_open(&sync.file, &error))?;
        self.greet_new_nodes();
        self.keep_node(overlay, described);
        Ok((name, overlay.clone()))
    }

    /// Takes an overlay away again that [`Control::make_overlay`] has made.
    pub(super) async fn drop_overlay(&self, turn: &RangeGuard, overlay: &str) {
        self.forget_node(overlay);
        if let Err(error) = self.blockdevs().del_in(turn, overlay).await {
            tracing::warn!("after a snapshot that was not made: {error:#}");
        }
    }
}

async fn write_into(image: &NewImage, storage: FileStorage) -> Result<(), QmpError> {
    let storage = StorageHandle::new(storage);
    image.write(&storage).await.map_err(|error| QmpError::generic(error.message()))
}

/// As others word it where a file is not there.
pub(super) fn could_not_open(filename: &str, error: &anyhow::Error) -> QmpError {
    let told = refused(error).desc;
    let why = told.strip_prefix(&format!("{filename}: ")).unwrap_or(&told);
    let why = why.split(" (os error ").next().unwrap_or(why);
    match why == told {
        true => QmpError::generic(told),
        false => QmpError::generic(format!("Could not open '{filename}': {why}")),
    }
}
