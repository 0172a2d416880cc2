//! `block_resize` and `change-backing-file`.
//!
//! A disk is resized only while nobody else uses it: clients, jobs and overlays have been told its size. The new size is
//! stable when the command is answered.

use std::rc::Rc;

use infill_base::{Ctx, ErrorKind};
use infill_node::{BackingRef, NodeHandle};
use infill_qmp::QmpError;
use infill_qmp::alter::Alter;

use super::control::{Control, refused};
use crate::blockdev::{Access, Blockdevs};

/// Sizes of a qcow2 and a QED image are multiples of this.
const SECTOR_BYTES: u64 = 512;

/// Uses a node alone while it is resized.
struct Alone {
    blockdevs: Blockdevs,
    name: String,
}

impl Alone {
    const USER: &str = "a change of its size";

    fn claim(blockdevs: &Blockdevs, name: &str) -> Result<(Alone, NodeHandle), QmpError> {
        let node = blockdevs.claim(name, Alone::USER, Access::Owner).map_err(|error| refused(&error))?;
        Ok((Alone { blockdevs: blockdevs.clone(), name: name.to_owned() }, node))
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        self.blockdevs.release(&self.name, Alone::USER);
    }
}

impl Control {
    /// The commands of [`Alter`].
    pub(super) async fn alter(self: &Rc<Self>, alter: Alter) -> Result<(), QmpError> {
        match alter {
            Alter::Resize { device, node_name, size } => {
                let (device, name) = (device.unwrap_or_default(), node_name.unwrap_or_default());
                if self.blockdevs().get(&name).is_err() {
                    let why = format!("Cannot find device='{device}' nor node-name='{name}'");
                    return Err(QmpError::generic(why));
                }
                let size = u64::try_from(size)
                    .map_err(|_| QmpError::generic("Parameter 'size' expects a >0 size"))?;
                self.resize(&name, size).await
            }
            Alter::WriteThreshold { node_name, threshold } => {
                self.set_write_threshold(node_name, threshold).await
            }
            Alter::BackingFile { device, image, backing_file } => {
                self.change_backing_file(&device, &image, &backing_file).await
            }
        }
    }

    async fn resize(&self, name: &str, size: u64) -> Result<(), QmpError> {
        if !self.blockdevs().is_active(name) {
            return Err(QmpError::generic("Permission 'resize' unavailable on inactive node"));
        }
        self.check_resizable(name)?;
        let node = self.blockdevs().get(name).map_err(|error| refused(&error))?;
        // As others word it; the drivers would refuse it too.
        let driver = self.blockdevs().facts(name).map_err(|error| refused(&error))?.driver;
        match driver {
            "qcow2" if !size.is_multiple_of(SECTOR_BYTES) => {
                return Err(QmpError::generic("The new size must be a multiple of 512"));
            }
            "qed" if !size.is_multiple_of(SECTOR_BYTES) => {
                return Err(QmpError::generic("Invalid image size specified"));
            }
            "null-co" => return Err(QmpError::generic("Image format driver does not support resize")),
            "nbd" => return Err(QmpError::generic("Cannot resize NBD nodes")),
            "qed" if size < node.len() => {
                return Err(QmpError::generic("Shrinking images is currently not supported"));
            }
            _ => {}
        }
        let (_alone, node) = Alone::claim(self.blockdevs(), name)?;
        let cx = Ctx::GUEST;
        node.resize(&cx, size).await.map_err(|error| {
            QmpError::generic(match (driver, error.kind()) {
                // A read-only one was refused before: this is a window.
                ("raw", ErrorKind::NotPermitted) => "Cannot resize fixed-size raw disks".to_owned(),
                _ => error.to_string(),
            })
        })?;
        self.keep_bitmaps_of_resized(name).await;
        node.sync(&cx).await.map_err(|error| {
            QmpError::generic(format!("'{name}' has its new size, which may not be stable yet: {error}"))
        })
    }

    /// Refuses a node whose size somebody knows. A filter passes a change on to the node below it.
    fn check_resizable(&self, name: &str) -> Result<(), QmpError> {
        let mut above: Option<String> = None;
        for layer in self.blockdevs().chain_with_filters(name) {
            self.not_busy(&layer)?;
            let facts = self.blockdevs().facts(&layer).map_err(|error| refused(&error))?;
            if facts.driver == "copy-before-write" {
                return Err(QmpError::generic(format!(
                    "Node '{layer}' keeps the disk as it was, which has one size: take it away before the disk is resized"
                )));
            }
            let own = above.map(|above| format!("node '{above}'"));
            for user in self.blockdevs().graph().users(&layer) {
                if Some(&user) != own.as_ref() {
                    return Err(self.size_is_known(&layer, &user));
                }
            }
            if !facts.is_filter() {
                break;
            }
            above = Some(layer);
        }
        Ok(())
    }

    fn size_is_known(&self, name: &str, user: &str) -> QmpError {
        if user.starts_with("export '") {
            // As others word it; a client is told the size once.
            let root = format!("an unnamed block device (uses node '{name}' as 'root' child)");
            return QmpError::generic(format!(
                "Permission conflict on node '{name}': permissions 'resize' are both required by {root} and unshared \
                 by {root}."
            ));
        }
        let overlay = user.strip_prefix("node '").and_then(|user| user.strip_suffix('\''));
        QmpError::generic(match overlay {
            Some(overlay) => match self.blockdevs().facts(overlay) {
                Ok(facts) if facts.backing.as_deref() == Some(name) => {
                    format!("Node '{name}' is busy: node is used as backing hd of '{overlay}'")
                }
                _ => format!(
                    "Node '{name}' is used by node '{overlay}', which knows its size: resize that one"
                ),
            },
            None => format!("Node {name} is in use by {user}"),
        })
    }

    /// `change-backing-file`: only what the header says; the chain that is open stays.
    async fn change_backing_file(&self, device: &str, image: &str, name: &str) -> Result<(), QmpError> {
        let missing = |device: &str, node: &str| {
            QmpError::generic(format!("Cannot find device='{device}' nor node-name='{node}'"))
        };
        self.blockdevs().get(device).map_err(|_| missing(device, device))?;
        let overlays = self.blockdevs().graph().users(device);
        if overlays.iter().any(|user| user.starts_with("node '")) {
            return Err(QmpError::generic("Need a root block node"));
        }
        let node = self.blockdevs().get(image).map_err(|_| missing("", image))?;
        let facts = self.blockdevs().facts(image).map_err(|error| refused(&error))?;
        let Some(below) = facts.backing else {
            let why = "not allowing backing file change on an image without a backing file";
            return Err(QmpError::generic(why));
        };
        self.not_busy(image)?;
        if !self.blockdevs().chain_with_filters(device).iter().any(|layer| layer == image) {
            return Err(QmpError::generic(format!("'{device}' and image file are not in the same chain")));
        }
        if facts.read_only {
            return Err(QmpError::generic(format!(
                "Block node '{image}' is read-only: its header cannot be changed; open it with read-only=off"
            )));
        }
        // The format of the node that lies there: a header that leaves it open lets a guest of a raw disk say it.
        let backing = (!name.is_empty())
            .then(|| BackingRef { filename: name.to_owned(), format: self.format_of(&below) });
        node.set_backing_ref(&Ctx::GUEST, backing)
            .await
            .map_err(|error| QmpError::generic(format!("Could not change backing file to '{name}': {error}")))
    }

    /// The format of the first layer from `name` down that is no filter. What has none is read as `raw`.
    pub(super) fn format_of(&self, name: &str) -> Option<String> {
        let layers = self.blockdevs().chain_with_filters(name);
        let facts = layers.iter().filter_map(|layer| self.blockdevs().facts(layer).ok());
        let driver = facts.filter(|facts| !facts.is_filter()).map(|facts| facts.driver).next()?;
        let format = if matches!(driver, "qcow2" | "qed") { driver } else { "raw" };
        Some(format.to_owned())
    }
}
