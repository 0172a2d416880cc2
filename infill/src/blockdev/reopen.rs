//! Opening a node again, to write to what was opened read-only: a commit goes down into a layer that a header named.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use infill_node::{NodeHandle, RawNode};
use infill_qmp::{BlockdevOptions, Driver};
use infill_storage::journal::Journaling;
use infill_storage::sync::lock;
use infill_storage::{RangeGuard, StorageHandle};

use super::format::FormatOptions;
use super::journal::journaling;
use super::open::open_file;
use super::{Blockdevs, Recipe, unknown};

impl Blockdevs {
    /// Opens a format node on a file for writing, in place: those who lie on it, and its exports, go on with it.
    pub async fn make_writable(&self, name: &str) -> Result<()> {
        let turn = self.change_graph().await;
        self.make_writable_in(&turn, name).await
    }

    /// As [`Blockdevs::make_writable`], for whoever changes the graph already.
    pub async fn make_writable_in(&self, _turn: &RangeGuard, name: &str) -> Result<()> {
        let facts = self.facts(name)?;
        if !facts.read_only {
            return Ok(());
        }
        let cannot = || anyhow!("Block node '{name}' is read-only");
        let (Some(Recipe::Format { format, discard, metadata_cache_bytes }), Some(child)) =
            (self.recipe(name), &facts.file)
        else {
            return Err(cannot());
        };
        let Some(Recipe::File(options)) = self.recipe(child) else { return Err(cannot()) };
        if self.0.graph.users(child).len() > 1 {
            bail!("'{child}', on which '{name}' lies, has other users and is read-only");
        }
        let parents = self.parents(name)?;
        let old = self.0.graph.get(name)?;
        let (storage, file) = self.reopen_file(name, child, *options)?;
        let driver = self.facts(child)?.driver;
        let below = NodeHandle::new(RawNode::protocol(driver, storage.clone(), false));
        let journal = self.journaling_of(child, &storage);
        let opened = match journal {
            Ok(journal) => {
                let open =
                    FormatOptions { read_only: false, fenced: false, discard, metadata_cache_bytes, journal };
                let path = self.path(child).filter(|_| self.is_locked(child));
                path.iter().for_each(|path| self.0.disks.begin_own(path));
                let opened = format.open(below.on_storage(storage), open).await;
                path.iter().for_each(|path| self.0.disks.end_own(path));
                opened
            }
            Err(error) => Err(error),
        };
        let node = match opened.with_context(|| format!("opening '{name}' again, to write to it")) {
            Ok(node) => node,
            Err(error) => {
                // As it was: the old node still stands, on the old file.
                self.lock_again(child, true);
                return Err(error);
            }
        };
        if let (Some(new), Some(old)) = (node.backing(), old.backing()) {
            new.replace(old.node()).await;
        }
        {
            let mut entries = lock(&self.0.entries);
            let entry = entries.get_mut(child).ok_or_else(|| unknown(child))?;
            entry.storage = Some(StorageHandle::from_arc(file.clone()));
            entry.file = entry.file.is_some().then(|| file.clone());
            entry.disk = Some(file);
            entry.facts.read_only = false;
            entry.holds.own(&format!("node '{name}'"));
            self.0.graph.set_node(child, below)?;
            if let Some(entry) = entries.get_mut(name) {
                entry.facts.read_only = false;
            }
        }
        node.set_detect_zeroes(facts.detect_zeroes);
        node.take_bitmaps_of(&old);
        self.0.graph.set_node(name, node.clone())?;
        for parent in parents {
            if let Some(slot) = parent.backing() {
                slot.replace(Some(node.clone())).await;
            }
        }
        Ok(())
    }

    pub(super) fn journaling_of(&self, file: &str, storage: &StorageHandle) -> Result<Journaling> {
        let Some(dir) = &self.0.policy.journal else { return Ok(Journaling::Off) };
        let entries = lock(&self.0.entries);
        let entry = entries.get(file).ok_or_else(|| unknown(file))?;
        journaling(dir, entry.facts.driver, entry.path.as_deref(), storage)
    }

    pub(super) fn recipe(&self, name: &str) -> Option<Recipe> {
        lock(&self.0.entries).get(name).and_then(|entry| entry.recipe.clone())
    }

    /// The overlays of `name`; refused where something lies on it that cannot be given another node.
    pub(super) fn parents(&self, name: &str) -> Result<Vec<NodeHandle>> {
        let mut parents = Vec::new();
        for (other, node) in self.0.graph.list() {
            let facts = self.facts(&other)?;
            if facts.file.as_deref() == Some(name) && !facts.goes_along() {
                bail!(
                    "Block node '{name}' is read-only, and '{other}' lies on it: open it with read-only=off"
                );
            }
            if facts.backing.as_deref() == Some(name) {
                parents.push(node);
            }
        }
        Ok(parents)
    }

    /// Opens the file for writing and takes its image lock, which the reading one gives back.
    fn reopen_file(
        &self,
        name: &str,
        child: &str,
        options: BlockdevOptions,
    ) -> Result<(StorageHandle, Arc<infill_io::FileStorage>)> {
        let Driver::File { filename, .. } = &options.driver else {
            bail!("Block node '{name}' is read-only")
        };
        let options = BlockdevOptions { read_only: Some(false), auto_read_only: None, ..options.clone() };
        let file = Arc::new(open_file(Path::new(filename), &options)?);
        let storage = StorageHandle::from_arc(file.clone());
        if !self.is_locked(child) {
            return Ok((storage, file));
        }
        self.lock_again(child, false);
        if let Err(error) = file.lock(false) {
            self.lock_again(child, true);
            return Err(error).with_context(|| format!("'{name}' is to be written to"));
        }
        Ok((storage, file))
    }

    /// Whether the image lock of that file is taken by whoever uses it.
    fn is_locked(&self, child: &str) -> bool {
        lock(&self.0.entries).get(child).is_some_and(|entry| entry.file.is_some())
    }

    /// Takes the lock of the reading file again, or gives it back.
    fn lock_again(&self, child: &str, locked: bool) {
        let file = lock(&self.0.entries).get(child).and_then(|entry| entry.file.clone());
        let Some(file) = file else { return };
        let done = if locked {
            file.lock(true).map_err(anyhow::Error::from)
        } else {
            file.unlock().map_err(Into::into)
        };
        if let Err(error) = done {
            tracing::warn!("the image lock of '{child}': {error:#}");
        }
    }
}
