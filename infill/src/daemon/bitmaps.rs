//! `block-dirty-bitmap-*`, and bitmaps in the list of nodes.
//!
//! Each change is made in a way that can be taken back ([`Undo`]): a transaction is several of them. Whoever adds a
//! bitmap holds its node, so that no change in flight is missed. Before a persistent one is changed its image says so
//! ([`Control::outdate`]): after a crash it is inconsistent, not what it was before.

use std::sync::Arc;

use infill_base::Ctx;
use infill_node::{Bitmap, BitmapError, BitmapUse, DirtyMap, Held, NodeHandle};
use infill_qmp::{BitmapAdd, BitmapCommand, BitmapMerge, BitmapRef, QmpError};
use serde_json::{Value, json};

use super::control::{Control, refused};
use super::kept_bitmaps::Begun;
use super::sha256::{BLOCK_BYTES, Sha256};
use crate::blockdev::hold;

/// Takes one change back.
pub type Undo = Box<dyn FnOnce()>;

fn error(error: &BitmapError) -> QmpError {
    QmpError::generic(error.to_string())
}

impl Control {
    /// A bitmap by its node and name.
    pub(super) fn bitmap(&self, node: &str, name: &str) -> Result<(NodeHandle, Arc<Bitmap>), QmpError> {
        let missing = |_| QmpError::generic(format!("Node '{node}' not found"));
        let node = self.blockdevs().get(node).map_err(missing)?;
        let bitmap = node.bitmap(name).map_err(|why| error(&why))?;
        Ok((node, bitmap))
    }

    /// `block-dirty-bitmap-*`, `x-debug-block-dirty-bitmap-sha256`.
    pub(super) async fn bitmap_command(&self, command: BitmapCommand) -> Result<Value, QmpError> {
        self.outdate(&command).await?;
        match command {
            BitmapCommand::Add(add) => {
                let node = self.node_for_bitmap(&add.node)?;
                // Refused before anybody waits for it.
                self.new_bitmap(&node, &add)?;
                let begun = self.begin_bitmap(&node, &add).await;
                let held = hold(&add.node, &node).await.map_err(|error| refused(&error))?;
                drop(self.add_bitmap(&held, &add, begun)?);
            }
            BitmapCommand::Remove(node, name) => {
                let (node, bitmap) = self.bitmap(&node, &name)?;
                let used = bitmap.use_removable().map_err(|why| error(&why))?;
                self.remove_bitmap(&node, &used).await?;
            }
            BitmapCommand::Sha256(node, name) => {
                let (_, bitmap) = self.bitmap(&node, &name)?;
                return Ok(json!({ "sha256": sha256(bitmap.map()) }));
            }
            BitmapCommand::Clear(node, name) => drop(self.clear_bitmap(&node, &name)?),
            BitmapCommand::Enable(node, name) => drop(self.record(&node, &name, true)?),
            BitmapCommand::Disable(node, name) => drop(self.record(&node, &name, false)?),
            BitmapCommand::Merge(merge) => drop(self.merge_bitmaps(&merge)?),
        }
        Ok(json!({}))
    }

    /// The node that a bitmap is to be added to.
    pub(super) fn node_for_bitmap(&self, name: &str) -> Result<NodeHandle, QmpError> {
        let node = self
            .blockdevs()
            .get(name)
            .map_err(|_| QmpError::generic(format!("Cannot find device='{name}' nor node-name='{name}'")))?;
        Ok(node)
    }

    /// A bitmap that may be added to `node`.
    pub(super) fn new_bitmap(&self, node: &NodeHandle, add: &BitmapAdd) -> Result<Arc<Bitmap>, QmpError> {
        let granularity = match add.granularity {
            Some(granularity) => u64::from(granularity),
            None => node.default_bitmap_granularity(),
        };
        let bitmap = Bitmap::new(add.name.as_str(), node.len(), granularity).map_err(|why| error(&why))?;
        node.check_new_bitmap(&add.name).map_err(|why| error(&why))?;
        if add.persistent {
            let checked = node.check_persistent(&add.node, &add.name, granularity);
            checked.map_err(|error| QmpError::generic(error.message()))?;
        }
        bitmap.set_persistent(add.persistent);
        bitmap.set_recording(!add.disabled);
        Ok(Arc::new(bitmap))
    }

    /// What is about to change a persistent bitmap waits until its image says that the one in it is out of date.
    pub(super) async fn outdate(&self, command: &BitmapCommand) -> Result<(), QmpError> {
        let (node, name) = match command {
            BitmapCommand::Clear(node, name)
            | BitmapCommand::Enable(node, name)
            | BitmapCommand::Disable(node, name) => (node, name),
            BitmapCommand::Merge(merge) => (&merge.node, &merge.target),
            BitmapCommand::Add(_) | BitmapCommand::Remove(..) | BitmapCommand::Sha256(..) => return Ok(()),
        };
        // What is wrong with the command is told by whoever carries it out.
        let Ok((node, bitmap)) = self.bitmap(node, name) else { return Ok(()) };
        if !bitmap.is_persistent() || bitmap.is_read_only() || bitmap.check_readable().is_err() {
            return Ok(());
        }
        let outdated = node.outdate_bitmaps(&Ctx::GUEST).await;
        outdated.map_err(|error| QmpError::generic(error.to_string()))
    }

    /// Takes a bitmap away, out of its image too.
    pub(super) async fn remove_bitmap(&self, node: &NodeHandle, used: &BitmapUse) -> Result<(), QmpError> {
        let bitmap = used.bitmap();
        if bitmap.is_persistent() {
            let removed = node.remove_stored_bitmap(&Ctx::GUEST, bitmap.name()).await;
            removed.map_err(|why| {
                QmpError::generic(format!(
                    "Failed to remove persistent dirty bitmap '{}' from node '{}': {why}",
                    bitmap.name(),
                    node.info().filename
                ))
            })?;
        }
        node.remove_bitmap(bitmap);
        Ok(())
    }

    /// Makes a bitmap clean.
    pub(super) fn clear_bitmap(&self, node: &str, name: &str) -> Result<Undo, QmpError> {
        let (_, bitmap) = self.bitmap(node, name)?;
        bitmap.check_changeable().map_err(|why| error(&why))?;
        let before = bitmap.map().copied();
        bitmap.clear();
        Ok(Box::new(move || bitmap.merge(&before)))
    }

    /// Has a bitmap record, or no longer.
    pub(super) fn record(&self, node: &str, name: &str, recording: bool) -> Result<Undo, QmpError> {
        let (_, bitmap) = self.bitmap(node, name)?;
        bitmap.check_readable().map_err(|why| error(&why))?;
        let before = bitmap.is_recording();
        bitmap.set_recording(recording);
        Ok(Box::new(move || bitmap.set_recording(before)))
    }

    /// Merges bitmaps into one, or changes nothing.
    pub(super) fn merge_bitmaps(&self, merge: &BitmapMerge) -> Result<Undo, QmpError> {
        let (_, target) = self.bitmap(&merge.node, &merge.target)?;
        target.check_changeable().map_err(|why| error(&why))?;
        let mut sources = Vec::new();
        for BitmapRef { node, name } in &merge.bitmaps {
            let (_, source) = self.bitmap(node.as_ref().unwrap_or(&merge.node), name)?;
            target.check_merge(&source).map_err(|why| error(&why))?;
            sources.push(source);
        }
        let before = target.map().copied();
        for source in sources.iter().filter(|source| !Arc::ptr_eq(source, &target)) {
            target.merge(source.map());
        }
        Ok(Box::new(move || target.become_like(&before)))
    }

    /// Adds a bitmap to the node that is held, with its map for the next daemon.
    pub(super) fn add_bitmap(
        &self,
        held: &Held,
        add: &BitmapAdd,
        begun: Option<Begun>,
    ) -> Result<Undo, QmpError> {
        let bitmap = self.new_bitmap(held.node(), add)?;
        if let Some(begun) = begun {
            self.keep_bitmap(&bitmap, begun);
        }
        held.add_bitmap(bitmap.clone()).map_err(|why| error(&why))?;
        let node = held.node().clone();
        Ok(Box::new(move || node.remove_bitmap(&bitmap)))
    }
}

/// `dirty-bitmaps` of a node; `None` where it has none.
pub fn told(node: &NodeHandle) -> Option<Value> {
    let bitmaps = node.bitmaps();
    let one = |bitmap: &Arc<Bitmap>| {
        let mut told = json!({
            "name": bitmap.name(),
            "recording": bitmap.is_recording(),
            "persistent": bitmap.is_persistent(),
            "busy": bitmap.is_used(),
            "granularity": bitmap.map().granularity(),
            "count": bitmap.map().dirty_bytes(),
        });
        if bitmap.is_inconsistent() {
            told["inconsistent"] = json!(true);
        }
        told
    };
    (!bitmaps.is_empty()).then(|| bitmaps.iter().map(one).collect())
}

/// The checksum of a bitmap's bits.
fn sha256(map: &DirtyMap) -> String {
    let (mut sum, len) = (Sha256::new(), map.bits_len().max(8));
    let (mut at, mut block) = (0, [0; BLOCK_BYTES]);
    while len - at >= BLOCK_BYTES as u64 {
        map.bits(at, &mut block);
        sum.block(&block);
        at += BLOCK_BYTES as u64;
    }
    let rest = &mut block[..(len - at) as usize];
    map.bits(at, rest);
    sum.finish(rest)
}
