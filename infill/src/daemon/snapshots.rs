//! Internal snapshots: `blockdev-snapshot-internal-sync` (an action of a transaction too) and
//! `blockdev-snapshot-delete-internal-sync`.
//!
//! The image below a filter is meant where a filter is named, and its changes are held while a snapshot is made or deleted:
//! as long as it takes to read and write the tables of the disk.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use infill_base::Ctx;
use infill_node::{Held, NodeHandle, Snapshot};
use infill_qmp::QmpError;
use infill_qmp::shape::InternalSnapshot;
use serde_json::Value;

use super::control::{Control, refused};
use crate::blockdev::{hold, snapshot_info};

/// How an argument that was not given is told.
const NOT_GIVEN: &str = "null";

impl Control {
    /// The node of that name, where it may be asked about snapshots, and the name of the image below it.
    fn snapshot_node(&self, device: &str) -> Result<(NodeHandle, String), QmpError> {
        let missing =
            |_| QmpError::generic(format!("Cannot find device='{device}' nor node-name='{device}'"));
        self.blockdevs().get(device).map_err(missing)?;
        let users = self.blockdevs().graph().users(device);
        if users.iter().any(|user| user.starts_with("node '")) {
            return Err(QmpError::generic("Need a root block node"));
        }
        self.not_busy(device)?;
        let name = self.blockdevs().unfiltered(device);
        self.not_busy(&name)?;
        Ok((self.blockdevs().get(&name).map_err(|error| refused(&error))?, name))
    }

    /// The image below the node of that name, if there is one.
    pub(super) fn image_below(&self, device: &str) -> Option<String> {
        self.blockdevs().get(device).ok().map(|_| self.blockdevs().unfiltered(device))
    }

    /// Makes a snapshot; its image, and its id. The image is among those that are `held`.
    pub(super) async fn create_snapshot(
        &self,
        wanted: &InternalSnapshot,
        held: &BTreeMap<String, Held>,
    ) -> Result<(NodeHandle, String), QmpError> {
        let InternalSnapshot { device, name } = wanted;
        let (node, below) = self.snapshot_node(device)?;
        if node.info().read_only {
            return Err(QmpError::generic(format!("Device '{device}' is read only")));
        }
        if !node.keeps_snapshots() {
            let format = node.info().driver;
            return Err(QmpError::generic(format!(
                "Block format '{format}' used by device '{device}' does not support internal snapshots"
            )));
        }
        if name.is_empty() {
            return Err(QmpError::generic("Name is empty"));
        }
        if node.snapshots().iter().any(|snapshot| snapshot.name == *name) {
            return Err(QmpError::generic(format!(
                "Snapshot with name '{name}' already exists on device '{device}'"
            )));
        }
        if !held.contains_key(&below) {
            return Err(QmpError::generic(format!("'{below}' has changed places: try again")));
        }
        let made = node.create_snapshot(&Ctx::GUEST, of_now(name)).await;
        let made = made.map_err(|error| {
            let why = error.message();
            QmpError::generic(format!("Failed to create snapshot '{name}' on device '{device}': {why}"))
        })?;
        Ok((node, made.id))
    }

    /// `blockdev-snapshot-delete-internal-sync`.
    pub(super) async fn delete_snapshot(
        &self,
        device: &str,
        id: Option<&str>,
        name: Option<&str>,
    ) -> Result<Value, QmpError> {
        let _turn = self.blockdevs().change_graph().await;
        let (node, below) = self.snapshot_node(device)?;
        if id.is_none() && name.is_none() {
            return Err(QmpError::generic("Name or id must be provided"));
        }
        if !node.keeps_snapshots() {
            return Err(QmpError::generic("Failed to get a snapshot list: Operation not supported"));
        }
        let _held = hold(&below, &node).await.map_err(|error| refused(&error))?;
        let deleted = node.delete_snapshot(&Ctx::GUEST, id, name).await;
        let deleted = deleted.map_err(|error| {
            let which = name.or(id).unwrap_or_default();
            let why = error.message();
            QmpError::generic(format!("Failed to delete snapshot '{which}' on device '{device}': {why}"))
        })?;
        deleted.as_ref().map(snapshot_info).ok_or_else(|| {
            let (id, name) = (id.unwrap_or(NOT_GIVEN), name.unwrap_or(NOT_GIVEN));
            QmpError::generic(format!(
                "Snapshot with id '{id}' and name '{name}' does not exist on device '{device}'"
            ))
        })
    }
}

/// A snapshot of that name, made now. There is no machine here whose clock it could tell: it tells the host's, as QEMU's
/// daemon does.
fn of_now(name: &str) -> Snapshot {
    let now = SystemTime::now();
    let vm_clock_nsec = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    Snapshot { vm_clock_nsec, ..Snapshot::made_at(name, now) }
}
