//! `transaction`: several actions of one moment, all or nothing.
//!
//! # Order
//! 1. Whatever can be refused without holding anybody is refused. Overlays are made and opened.
//! 2. Changes of all nodes that are named are held, an overlay before what lies below it.
//! 3. Actions are prepared in their order. Where one fails, those before it are taken back in reverse, and nothing has
//!    changed: nobody could write meanwhile.
//! 4. What cannot be taken back is done: bitmaps go. Nodes are let go, and jobs start.

use std::collections::BTreeMap;

use infill_base::Ctx;
use infill_job::{Group, Job};
use infill_node::{BitmapUse, Held, NodeHandle};
use infill_qmp::shape::InternalSnapshot;
use infill_qmp::transaction::{Transaction, TransactionAction};
use infill_qmp::{BitmapCommand, QmpError};
use infill_storage::RangeGuard;

use super::backup::{Checked, Ready};
use super::bitmaps::Undo;
use super::control::{Control, refused};
use super::jobs::yield_once;
use super::kept_bitmaps::Begun;
use crate::blockdev::hold;

/// An action whose arguments are in order.
enum Action {
    Abort,
    Bitmap(BitmapCommand, Option<Begun>),
    Backup(Box<Checked>),
    Snapshot { node: String, overlay: String },
    InternalSnapshot(InternalSnapshot),
}

/// What takes a prepared action back.
enum Back {
    Simple(Undo),
    Snapshot { node: String, overlay: String },
    InternalSnapshot { node: NodeHandle, id: String },
}

/// What was prepared so far.
#[derive(Default)]
struct Done {
    back: Vec<Back>,
    removals: Vec<(infill_node::NodeHandle, BitmapUse)>,
    backups: Vec<Ready>,
}

/// The nodes that actions name.
fn named(actions: &[TransactionAction]) -> Vec<String> {
    let named = actions.iter().flat_map(|action| match action {
        TransactionAction::Abort => Vec::new(),
        TransactionAction::Bitmap(command) => vec![command.node()],
        TransactionAction::Backup(backup) => vec![backup.device.as_str()],
        TransactionAction::DriveBackup(drive) => vec![drive.backup.device.as_str()],
        TransactionAction::Snapshot { node, overlay } => vec![node.as_str(), overlay.as_str()],
        TransactionAction::SnapshotSync(sync) => sync.node_name.iter().map(String::as_str).collect(),
        TransactionAction::InternalSnapshot(snapshot) => vec![snapshot.device.as_str()],
    });
    named.map(ToOwned::to_owned).collect()
}

impl Control {
    /// `transaction`.
    pub(super) async fn transaction(&self, transaction: Transaction) -> Result<(), QmpError> {
        let Transaction { actions, grouped } = transaction;
        let graph = self.blockdevs().change_graph().await;
        let mut overlays = Vec::new();
        let outcome = self.carry_out_together(&graph, actions, grouped, &mut overlays).await;
        if outcome.is_err() {
            for overlay in overlays.iter().rev() {
                self.drop_overlay(&graph, overlay).await;
            }
        }
        drop(graph);
        outcome?;
        yield_once().await;
        Ok(())
    }

    /// Carries all out, or none. Nodes that were made for it are in `overlays`.
    async fn carry_out_together(
        &self,
        graph: &RangeGuard,
        actions: Vec<TransactionAction>,
        grouped: bool,
        overlays: &mut Vec<String>,
    ) -> Result<(), QmpError> {
        let mut names = named(&actions);
        let mut ready = Vec::new();
        for action in actions {
            ready.push(match action {
                TransactionAction::Abort => Action::Abort,
                TransactionAction::Bitmap(command) => {
                    let node = self.blockdevs().get(command.node());
                    let begun = match (&command, node) {
                        (BitmapCommand::Add(add), Ok(node)) if self.new_bitmap(&node, add).is_ok() => {
                            self.begin_bitmap(&node, add).await
                        }
                        _ => None,
                    };
                    Action::Bitmap(command, begun)
                }
                TransactionAction::Backup(backup) => {
                    let checked = self.check_backup(*backup)?;
                    Action::Backup(Box::new(self.keep_backup(checked).await))
                }
                TransactionAction::DriveBackup(drive) => {
                    let checked = self.check_drive_backup(*drive, Some(graph)).await?;
                    Action::Backup(Box::new(self.keep_backup(checked).await))
                }
                TransactionAction::Snapshot { node, overlay } => Action::Snapshot { node, overlay },
                TransactionAction::InternalSnapshot(snapshot) => {
                    names.extend(self.image_below(&snapshot.device));
                    Action::InternalSnapshot(snapshot)
                }
                TransactionAction::SnapshotSync(sync) => {
                    let (node, overlay) = self.make_overlay(graph, &sync).await?;
                    overlays.push(overlay.clone());
                    Action::Snapshot { node, overlay }
                }
            });
        }
        names.extend(overlays.iter().cloned());
        let names = self.nodes_to_hold(names);
        let mut held = BTreeMap::new();
        for name in names {
            let node = self.blockdevs().get(&name).map_err(|error| refused(&error))?;
            held.insert(name.clone(), hold(&name, &node).await.map_err(|error| refused(&error))?);
        }
        let mut done = Done::default();
        for action in ready {
            if let Err(error) = self.prepare_action(action, &held, &mut done).await {
                self.take_back(done).await;
                return Err(error);
            }
        }
        for (node, used) in done.removals {
            if let Err(error) = self.remove_bitmap(&node, &used).await {
                tracing::error!("{}", error.desc);
            }
        }
        drop(held);
        self.start_all(done.backups, grouped)
    }

    /// Those of the nodes `names` that exist, overlays before what lies below them.
    fn nodes_to_hold(&self, mut names: Vec<String>) -> Vec<String> {
        names.retain(|name| self.blockdevs().get(name).is_ok());
        names.sort();
        names.dedup();
        names.sort_by_key(|name| std::cmp::Reverse(self.blockdevs().height(name)));
        names
    }

    async fn prepare_action(
        &self,
        action: Action,
        held: &BTreeMap<String, Held>,
        done: &mut Done,
    ) -> Result<(), QmpError> {
        match action {
            Action::Abort => Err(QmpError::generic("Transaction aborted using Abort action")),
            Action::Bitmap(command, begun) => {
                self.outdate(&command).await?;
                self.prepare_bitmap(command, begun, held, done)
            }
            Action::Backup(checked) => {
                let missing = || QmpError::generic("the disk of a backup has gone");
                let held = held.get(checked.device()).ok_or_else(missing)?;
                done.backups.push(self.prepare_backup(*checked, held)?);
                Ok(())
            }
            Action::InternalSnapshot(wanted) => {
                let (node, id) = self.create_snapshot(&wanted, held).await?;
                done.back.push(Back::InternalSnapshot { node, id });
                Ok(())
            }
            Action::Snapshot { node, overlay } => {
                self.not_busy(&node)?;
                if let Some(above) = self.overlay_on(&node) {
                    let why = format!("Node '{node}' is busy: node is used as backing hd of '{above}'");
                    return Err(QmpError::generic(why));
                }
                let (Some(below), Some(_)) = (held.get(&node), held.get(&overlay)) else {
                    let name = if held.contains_key(&node) { overlay } else { node };
                    let why = format!("Cannot find device='{name}' nor node-name='{name}'");
                    return Err(QmpError::generic(why));
                };
                self.blockdevs().can_snapshot(&node, &overlay).map_err(|error| refused(&error))?;
                // Noted before it happens: a daemon that dies in between comes back with the overlay.
                self.note_snapshot(&node, &overlay).await?;
                let snapshot = self.blockdevs().snapshot_held(&node, &overlay, below).await;
                if snapshot.is_err() {
                    self.note_no_snapshot(&node, &overlay).await;
                }
                snapshot.map_err(|error| refused(&error))?;
                done.back.push(Back::Snapshot { node, overlay });
                Ok(())
            }
        }
    }

    fn prepare_bitmap(
        &self,
        command: BitmapCommand,
        begun: Option<Begun>,
        held: &BTreeMap<String, Held>,
        done: &mut Done,
    ) -> Result<(), QmpError> {
        let undo = match &command {
            BitmapCommand::Add(add) => {
                self.node_for_bitmap(&add.node)?;
                let missing = || QmpError::generic(format!("Node '{}' not found", add.node));
                self.add_bitmap(held.get(&add.node).ok_or_else(missing)?, add, begun)?
            }
            BitmapCommand::Remove(node, name) => {
                let (node, bitmap) = self.bitmap(node, name)?;
                let used = bitmap.use_removable().map_err(|error| QmpError::generic(error.to_string()))?;
                done.removals.push((node, used));
                return Ok(());
            }
            BitmapCommand::Clear(node, name) => self.clear_bitmap(node, name)?,
            BitmapCommand::Enable(node, name) => self.record(node, name, true)?,
            BitmapCommand::Disable(node, name) => self.record(node, name, false)?,
            BitmapCommand::Merge(merge) => self.merge_bitmaps(merge)?,
            BitmapCommand::Sha256(..) => return Ok(()),
        };
        done.back.push(Back::Simple(undo));
        Ok(())
    }

    /// Takes everything back that was prepared, the last first.
    async fn take_back(&self, done: Done) {
        drop(done.backups);
        for back in done.back.into_iter().rev() {
            match back {
                Back::Simple(undo) => undo(),
                Back::InternalSnapshot { node, id } => {
                    if let Err(error) = node.delete_snapshot(&Ctx::GUEST, Some(&id), None).await {
                        tracing::error!(
                            "a snapshot of {} could not be taken back: {error}",
                            node.info().filename
                        );
                    }
                }
                Back::Snapshot { node, overlay } => {
                    if let Err(error) = self.blockdevs().take_snapshot_back(&node, &overlay).await {
                        tracing::error!("a snapshot of '{node}' could not be taken back: {error:#}");
                        continue;
                    }
                    self.note_no_snapshot(&node, &overlay).await;
                }
            }
        }
    }

    fn start_all(&self, backups: Vec<Ready>, grouped: bool) -> Result<(), QmpError> {
        let group = Group::new();
        let mut started: Vec<Job> = Vec::new();
        for prepared in backups {
            match self.start_backup(prepared) {
                Ok(job) => started.push(job),
                Err(error) => {
                    for job in started {
                        // It has not begun.
                        let _over = job.cancel();
                    }
                    return Err(error);
                }
            }
        }
        if grouped {
            started.iter().for_each(|job| job.join(&group));
        }
        Ok(())
    }
}
