//! One node in the place of another, while its users run: snapshots, and the end of jobs that move a disk.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use infill_base::Ctx;
use infill_node::{Held, NodeHandle};
use infill_storage::sync::lock;
use infill_storage::{RangeGuard, rt};

use super::active::check_below;
use super::{Access, Blockdevs, unknown};

/// How long guest writes that are in flight are waited for before an exchange gives up. New ones wait meanwhile.
const HOLD_TIME: Duration = Duration::from_secs(5);

/// Holds the changes of `node`, or says why that cannot be done now.
pub async fn hold(name: &str, node: &NodeHandle) -> Result<Held> {
    rt::timeout(HOLD_TIME, node.hold_changes()).await.ok_or_else(|| {
        anyhow!(
            "guest writes to '{name}' that have begun did not end within {HOLD_TIME:?}; does one wait for a source that \
             is away? Try again when it is back"
        )
    })
}

/// The name of the node that `user` is, if it is one.
fn parent_in(user: &str) -> Option<&str> {
    user.strip_prefix("node '")?.strip_suffix('\'')
}

impl Blockdevs {
    /// Puts `to` in the place of `from` for all its users but `staying` (exports, filters): nothing has changed if it is
    /// refused. The caller holds the changes of `from`, and both read the same.
    pub fn replace(&self, from: &str, to: &str, staying: &[String]) -> Result<()> {
        let moving = self.0.graph.movable(from, staying)?;
        let filters: Vec<&str> = moving.iter().filter_map(|user| parent_in(user)).collect();
        if let Some(filter) =
            self.chain_with_filters(to).iter().find(|layer| filters.contains(&layer.as_str()))
        {
            bail!("'{to}' lies on '{filter}', which would lie on it then");
        }
        check_below(to, self.is_active(to), "file", from, self.is_active(from))?;
        let (old, new) = (self.0.graph.get(from)?.limits(), self.0.graph.get(to)?.limits());
        if new.request_align > old.request_align {
            bail!(
                "'{to}' takes requests in multiples of {} bytes, the users of '{from}' make them in multiples of {}",
                new.request_align,
                old.request_align
            );
        }
        let mut entries = lock(&self.0.entries);
        let access = |user: &String| entries.get(from).and_then(|entry| entry.holds.of(user));
        let holds: Vec<_> =
            moving.iter().map(|user| (user, access(user).unwrap_or(Access::Reader))).collect();
        let entry = entries.get_mut(to).ok_or_else(|| unknown(to))?;
        let mut taken = Ok(());
        for (at, (user, access)) in holds.iter().enumerate() {
            taken = match access.writes() && entry.facts.read_only {
                true => Err(anyhow!("Block node '{to}' is read-only, and {user} writes")),
                false => entry.holds.take(to, user, *access, entry.file.as_deref()),
            };
            if taken.is_err() {
                for (user, _) in &holds[..at] {
                    entry.holds.give_back(user, entry.file.as_deref());
                }
                break;
            }
        }
        taken?;
        if let Some(entry) = entries.get_mut(from) {
            for user in &moving {
                entry.holds.give_back(user, entry.file.as_deref());
            }
        }
        for filter in filters {
            if let Some(file) = entries.get_mut(filter).and_then(|entry| entry.facts.file.as_mut())
                && file == from
            {
                to.clone_into(file);
            }
        }
        drop(entries);
        Ok(self.0.graph.move_users(from, to, staying)?)
    }

    /// As [`Blockdevs::replace`], for a job that holds the changes of `from`.
    pub async fn exchange(&self, from: &str, to: &str, staying: &[String]) -> Result<()> {
        let _turn = self.0.turn.exclusive(0, 1).await;
        self.replace(from, to, staying)
    }

    /// As [`Blockdevs::exchange`], where `to`, which lies on nothing, holds only what was written since it was made, and lies on
    /// `from` from then on.
    pub async fn exchange_over(&self, from: &str, to: &str, staying: &[String]) -> Result<()> {
        let _turn = self.0.turn.exclusive(0, 1).await;
        let (node, top) = (self.0.graph.get(from)?, self.0.graph.get(to)?);
        let Some(slot) = top.backing() else { bail!("'{to}' is no overlay") };
        // What was acknowledged so far is asked to be stable later, of the overlay.
        if !node.info().read_only {
            node.sync(&Ctx::GUEST).await.with_context(|| format!("syncing '{from}'"))?;
        }
        slot.replace(Some(node)).await;
        if let Err(error) = self.replace(from, to, staying) {
            slot.replace(None).await;
            return Err(error);
        }
        self.back(to, from, Access::Stable)
    }

    /// Lets somebody write to `base` although `overlay` lies on it (a commit writes there only what the layers above show
    /// anyway), or ends that.
    pub fn share_base(&self, overlay: &str, base: &str, shared: bool) {
        if let Some(entry) = lock(&self.0.entries).get_mut(base) {
            entry.holds.rely(&format!("node '{overlay}'"), !shared);
        }
    }

    /// Overlays of `name` that nobody uses rely on nothing: it may be written to below them. (After a commit of the active layer
    /// the old layers stay, and stand on the disk that guests write to.)
    pub(super) fn release_unused(&self, name: &str) {
        let overlays = self.overlays_of(name);
        for overlay in overlays.iter().filter(|overlay| !self.is_in_use(overlay)) {
            self.share_base(overlay, name, true);
        }
    }

    /// `name` is to be used: the layers below it must not change from now on. Refused where somebody writes to one.
    pub(super) fn rely_again(&self, name: &str) -> Result<()> {
        let chain = self.chain(name);
        for pair in chain.windows(2) {
            let user = format!("node '{}'", pair[0]);
            let mut entries = lock(&self.0.entries);
            if entries.get(&pair[0]).is_some_and(|overlay| overlay.beside) {
                continue;
            }
            let entry = entries.get_mut(&pair[1]).ok_or_else(|| unknown(&pair[1]))?;
            if entry.holds.of(&user) != Some(Access::Reader) {
                continue;
            }
            if let Some(writer) = entry.holds.writer() {
                // A job that writes to a layer is a commit: what it writes there the layers above show anyway.
                if writer.starts_with("job '") {
                    continue;
                }
                bail!("'{name}' cannot be used: {writer} writes to '{}', which lies below it", pair[1]);
            }
            entry.holds.rely(&user, true);
        }
        Ok(())
    }

    fn overlays_of(&self, name: &str) -> Vec<String> {
        let entries = lock(&self.0.entries);
        let lies_on = |entry: &super::Entry| entry.facts.backing.as_deref() == Some(name);
        entries.iter().filter(|(_, entry)| lies_on(entry)).map(|(overlay, _)| overlay.clone()).collect()
    }

    /// Whether anybody but overlays that are not in use uses the node.
    fn is_in_use(&self, name: &str) -> bool {
        let overlays = self.overlays_of(name);
        let of_overlays: Vec<String> = overlays.iter().map(|overlay| format!("node '{overlay}'")).collect();
        self.0.graph.users(name).iter().any(|user| !of_overlays.contains(user))
            || overlays.iter().any(|overlay| self.is_in_use(overlay))
    }

    /// Refuses what [`Blockdevs::snapshot_held`] would.
    pub fn can_snapshot(&self, name: &str, overlay: &str) -> Result<()> {
        let find = |name: &str| {
            self.0.graph.get(name).map_err(|_| anyhow!("Cannot find device='{name}' nor node-name='{name}'"))
        };
        find(name)?;
        let top = find(overlay)?;
        if !self.0.graph.users(overlay).is_empty() {
            bail!("The overlay is already in use");
        }
        let facts = self.facts(overlay)?;
        if facts.backing.is_some() {
            bail!("The overlay already has a backing image");
        }
        if top.backing().is_none() {
            bail!("The overlay does not support backing images");
        }
        check_below(name, self.is_active(name), "backing", overlay, facts.active)?;
        if self.chain(name).iter().any(|layer| layer == overlay) {
            bail!("Making '{overlay}' an overlay of '{name}' would create a cycle");
        }
        Ok(())
    }

    /// `blockdev-snapshot`: puts `overlay`, which has no backing yet, on `name`, for all users of `name`. The caller holds it,
    /// and changes the graph alone.
    pub async fn snapshot_held(&self, name: &str, overlay: &str, held: &Held) -> Result<()> {
        self.can_snapshot(name, overlay)?;
        let (node, top) = (held.node(), self.0.graph.get(overlay)?);
        let Some(slot) = top.backing() else { bail!("The overlay does not support backing images") };
        // What was acknowledged so far is asked to be stable later, of the overlay.
        if !node.info().read_only {
            node.sync(&Ctx::GUEST).await.with_context(|| format!("syncing '{name}'"))?;
        }
        slot.replace(Some(node.clone())).await;
        if let Err(error) = self.replace(name, overlay, &[]) {
            slot.replace(None).await;
            return Err(error);
        }
        self.back(overlay, name, Access::Stable)
    }

    /// Takes [`Blockdevs::snapshot_held`] back. The caller has held both nodes since, so that nothing was written.
    pub async fn take_snapshot_back(&self, name: &str, overlay: &str) -> Result<()> {
        let top = self.0.graph.get(overlay)?;
        let Some(slot) = top.backing() else { bail!("'{overlay}' is no overlay") };
        let user = format!("node '{overlay}'");
        // First: users that write may not come back to a node that somebody relies on.
        self.0.graph.detach(overlay, name);
        {
            let mut entries = lock(&self.0.entries);
            if let Some(entry) = entries.get_mut(name) {
                entry.holds.give_back(&user, entry.file.as_deref());
            }
            if let Some(entry) = entries.get_mut(overlay) {
                entry.facts.backing = None;
            }
        }
        self.replace(overlay, name, &[])?;
        slot.replace(None).await;
        Ok(())
    }

    /// Puts `overlay`, which lies on nothing yet and shows nothing to anybody, on `below`, which others may write to meanwhile: what
    /// it takes from there it takes at that moment. The caller changes the graph alone.
    pub async fn lay_beside(&self, _turn: &RangeGuard, overlay: &str, below: &str) -> Result<()> {
        let (top, node) = (self.0.graph.get(overlay)?, self.0.graph.get(below)?);
        let Some(slot) = top.backing() else { bail!("'{overlay}' is no overlay") };
        slot.replace(Some(node)).await;
        let noted = self.back(overlay, below, Access::Reader);
        if noted.is_err() {
            slot.replace(None).await;
        } else if let Some(entry) = lock(&self.0.entries).get_mut(overlay) {
            entry.beside = true;
        }
        noted
    }

    /// Whoever used `overlay`, which lies beside others, uses it no more: the node below is free of it, before it is closed.
    pub fn leave_beside(&self, overlay: &str) {
        let below = {
            let mut entries = lock(&self.0.entries);
            let beside = entries.get_mut(overlay).filter(|entry| entry.beside);
            let Some(below) = beside.and_then(|entry| entry.facts.backing.take()) else { return };
            if let Some(entry) = entries.get_mut(&below) {
                entry.holds.give_back(&format!("node '{overlay}'"), entry.file.as_deref());
            }
            below
        };
        self.0.graph.detach(overlay, &below);
    }

    /// Notes in the graph that `overlay` lies on `below` from now on, and whether it relies on nobody writing there.
    pub(super) fn back(&self, overlay: &str, below: &str, access: Access) -> Result<()> {
        self.0.graph.attach(overlay, below)?;
        let mut entries = lock(&self.0.entries);
        let entry = entries.get_mut(below).ok_or_else(|| unknown(below))?;
        entry.holds.take(below, &format!("node '{overlay}'"), access, entry.file.as_deref())?;
        let entry = entries.get_mut(overlay).ok_or_else(|| unknown(overlay))?;
        entry.facts.backing = Some(below.to_owned());
        Ok(())
    }
}
