//! Changing nodes that are there (`blockdev-reopen`): an image that is opened anew, an overlay that is put on another node.
//!
//! What never happens: two instances of one image of which one writes while the other is asked for anything. An instance is
//! exchanged only where guests cannot be reading through the old one while the new one writes: it becomes read-only, or
//! nobody but overlays uses it.

use anyhow::{Context, Result, anyhow, bail};
use infill_base::{Ctx, DetectZeroes, DiscardMode};
use infill_node::{NodeHandle, NodeStorage};
use infill_storage::sync::lock;
use infill_storage::{RangeGuard, StorageHandle};

use super::format::{FormatOptions, is_fenced};
use super::{Access, Blockdevs, Recipe, hold, unknown};

/// How a format node is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// No writes.
    pub read_only: bool,
    /// What a guest's discard does.
    pub discard: DiscardMode,
}

impl Blockdevs {
    /// How the node was opened, where it is a format that can be opened anew.
    pub fn opened(&self, name: &str) -> Option<Opened> {
        let entries = lock(&self.0.entries);
        let entry = entries.get(name)?;
        let Some(Recipe::Format { discard, .. }) = &entry.recipe else { return None };
        Some(Opened { read_only: entry.facts.read_only, discard: *discard })
    }

    /// Says why [`Blockdevs::open_anew`] would refuse.
    pub fn can_open_anew(&self, name: &str, wanted: Opened) -> Result<()> {
        let node = self.0.graph.get(name)?;
        let Some(before) = self.opened(name) else { bail!("Block node '{name}' cannot be opened anew") };
        if before == wanted {
            return Ok(());
        }
        if !self.is_active(name) {
            bail!("'{name}' is inactive: make it active (blockdev-set-active) before it is opened anew");
        }
        if node.backing().is_some_and(|slot| slot.copy_on_read().is_some()) {
            bail!("'{name}' keeps what is read from below: it cannot be opened anew");
        }
        self.parents(name)?;
        let users = self.0.graph.users(name);
        let writer = users.iter().find(|user| self.access_of(name, user).is_some_and(Access::writes));
        if wanted.read_only && writer.is_some() {
            bail!("Read-only block node '{name}' cannot support read-write users");
        }
        if !wanted.read_only
            && let Some(user) = users.iter().find(|user| !user.starts_with("node '"))
        {
            bail!("'{name}' cannot be opened anew for writing while {user} reads it");
        }
        Ok(())
    }

    /// Opens a format node anew, in place: those who lie on it, and its exports, go on with it. Nothing has changed where it
    /// fails. `turn`: nobody else changes the graph.
    pub async fn open_anew(&self, turn: &RangeGuard, name: &str, wanted: Opened) -> Result<()> {
        self.can_open_anew(name, wanted)?;
        let before = self.opened(name).ok_or_else(|| unknown(name))?;
        if before == wanted {
            return Ok(());
        }
        if before.read_only && !wanted.read_only {
            self.set_discard(name, wanted.discard);
            let outcome = self.make_writable_in(turn, name).await;
            if outcome.is_err() {
                self.set_discard(name, before.discard);
            }
            return outcome;
        }
        let old = self.0.graph.get(name)?;
        let held = hold(name, &old).await?;
        // All of it stable, and its journal ended: from here on the old instance only answers what was asked.
        old.close(&Ctx::GUEST).await.with_context(|| format!("closing '{name}', to open it anew"))?;
        let opened = self.instance(name, wanted).await;
        let (node, outcome) = match opened {
            Ok(node) => (node, Ok(())),
            Err(error) => {
                let again = self.instance(name, before).await;
                let again = again.with_context(|| format!("'{name}' could not be opened again as it was"))?;
                (again, Err(error))
            }
        };
        self.put_instance(name, &old, node).await?;
        drop(held);
        outcome?;
        self.note_opened(name, wanted)
    }

    /// The image of the format node `name`, whose changes are held, was opened anew as `node`: for everybody who used the `old` one.
    pub(super) async fn put_instance(&self, name: &str, old: &NodeHandle, node: NodeHandle) -> Result<()> {
        if let (Some(new), Some(old)) = (node.backing(), old.backing()) {
            new.replace(old.node()).await;
        }
        node.set_detect_zeroes(self.facts(name)?.detect_zeroes);
        node.take_bitmaps_of(old);
        self.0.graph.set_node(name, node.clone())?;
        for parent in self.parents(name)? {
            if let Some(slot) = parent.backing() {
                slot.replace(Some(node.clone())).await;
            }
        }
        Ok(())
    }

    fn set_discard(&self, name: &str, to: DiscardMode) {
        if let Some(Recipe::Format { discard, .. }) =
            lock(&self.0.entries).get_mut(name).and_then(|entry| entry.recipe.as_mut())
        {
            *discard = to;
        }
    }

    /// The image of the format node `name`, opened.
    pub(super) async fn instance(&self, name: &str, how: Opened) -> Result<NodeHandle> {
        let child = self.facts(name)?.file.ok_or_else(|| anyhow!("'{name}' lies on no file"))?;
        let Some(Recipe::Format { format, metadata_cache_bytes, .. }) = self.recipe(name) else {
            bail!("Block node '{name}' cannot be opened anew");
        };
        let below = self.0.graph.get(&child)?;
        let storage = match self.storage(&child) {
            Some(storage) => below.on_storage(storage),
            None => StorageHandle::new(NodeStorage::new(below)),
        };
        let journal = self.journaling_of(&child, &storage)?;
        let Opened { read_only, discard } = how;
        // Whoever had it open may read on after it has moved away.
        let fenced = is_fenced(&self.0.graph.get(name)?);
        format
            .open(storage, FormatOptions { read_only, fenced, discard, metadata_cache_bytes, journal })
            .await
    }

    /// Notes how the node is open now, for those who ask and those who want to use it or its file.
    fn note_opened(&self, name: &str, now: Opened) -> Result<()> {
        self.set_discard(name, now.discard);
        let mut entries = lock(&self.0.entries);
        let entry = entries.get_mut(name).ok_or_else(|| unknown(name))?;
        entry.facts.read_only = now.read_only;
        let Some(child) = entry.facts.file.clone() else { return Ok(()) };
        let entry = entries.get_mut(&child).ok_or_else(|| unknown(&child))?;
        let access = if now.read_only { Access::Stable } else { Access::Owner };
        entry.holds.become_(&format!("node '{name}'"), access, entry.file.as_deref())
    }

    /// Says why [`Blockdevs::put_on`] would refuse.
    pub fn can_put_on(&self, name: &str, below: Option<&str>) -> Result<()> {
        let node = self.0.graph.get(name)?;
        if node.backing().is_none() || self.facts(name)?.is_filter() {
            bail!("The node '{name}' does not support backing images");
        }
        let Some(below) = below else { return Ok(()) };
        self.0.graph.get(below).map_err(|_| anyhow!("Cannot find device='' nor node-name='{below}'"))?;
        if self.chain_with_filters(below).iter().any(|layer| layer == name) {
            bail!("Making '{below}' a backing child of '{name}' would create a cycle");
        }
        let entries = lock(&self.0.entries);
        match entries.get(below).and_then(|entry| entry.holds.writer()) {
            Some(writer) => bail!("'{name}' cannot be put on '{below}', which {writer} writes to"),
            None => Ok(()),
        }
    }

    /// Puts the overlay `name` on `below`, or on nothing; what belonged to the old edge alone stays, for
    /// [`Blockdevs::let_backing_go`]. Nothing has changed where it fails. `turn`: nobody else changes the graph.
    pub async fn put_on(&self, _turn: &RangeGuard, name: &str, below: Option<&str>) -> Result<()> {
        self.can_put_on(name, below)?;
        let before = self.facts(name)?.backing;
        if before.as_deref() == below {
            return Ok(());
        }
        let node = self.0.graph.get(name)?;
        let new = below.map(|below| self.0.graph.get(below)).transpose()?;
        let held = hold(name, &node).await?;
        if let Some(below) = below {
            self.back(name, below, Access::Stable)?;
        } else if let Some(entry) = lock(&self.0.entries).get_mut(name) {
            entry.facts.backing = None;
        }
        if let Some(slot) = node.backing() {
            slot.replace(new).await;
        }
        if let Some(old) = &before {
            self.0.graph.detach(name, old);
            self.let_go(old, &format!("node '{name}'"));
        }
        drop(held);
        Ok(())
    }

    /// Closes what was below an overlay, where it belonged to it and nobody uses it.
    pub async fn let_backing_go(&self, _turn: &RangeGuard, old: &str) -> Result<()> {
        match self.facts(old) {
            Ok(facts) if facts.implicit && self.0.graph.users(old).is_empty() => {
                self.remove(vec![old.to_owned()]).await
            }
            _ => Ok(()),
        }
    }

    /// The name of the file, where the node is one.
    pub fn is_file(&self, name: &str, filename: &str) -> bool {
        self.path(name).is_some_and(|path| path == std::path::Path::new(filename))
    }

    /// What changes nothing of how a node is opened: what becomes of writes of zeroes, and whether flushes may be dropped
    /// (they are not).
    pub fn note_settings(&self, name: &str, detect_zeroes: DetectZeroes, no_flush: bool) -> Result<()> {
        self.0.graph.get(name)?.set_detect_zeroes(detect_zeroes);
        let mut entries = lock(&self.0.entries);
        let entry = entries.get_mut(name).ok_or_else(|| unknown(name))?;
        (entry.facts.cache_no_flush, entry.facts.detect_zeroes) = (no_flush, detect_zeroes);
        Ok(())
    }
}
