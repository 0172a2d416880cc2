//! Nodes that are inactive: everything of them is written and stable, nobody changes them, and their image locks are free, so that
//! another process may take the image over (`blockdev-set-active`, `active: false`).
//!
//! # Order
//! * **Inactive**: a node before those below it. New changes are held; an image that is open for writing is closed (bitmaps stored,
//!   everything synced, its journal ended) and opened again for reading; from then on the node refuses changes, its hold on the
//!   nodes below rests, and with the last hold that does not the image lock of a file is free.
//! * **Active**: a node after those below it. Holds wake, which takes the image locks; then the image is opened anew, with
//!   everything that it says now, as it was open before.
//!
//! A read that is under way while an image becomes active ends on what was open before: whoever has it become active has not let its
//! guest run yet.
//!
//! What never happens: an active node on an inactive one; a change of a node whose image lock is not taken.

use anyhow::{Context, Result, anyhow, bail};
use infill_base::Ctx;
use infill_node::NodeHandle;
use infill_storage::RangeGuard;
use infill_storage::sync::lock;

use super::{Blockdevs, Opened, Recipe, hold, unknown};

/// Why what QEMU calls *permission* is missing.
const NOT_PERMITTED: &str = "Operation not permitted";

/// The node that `user` is, if it is one.
fn node_in(user: &str) -> Option<&str> {
    user.strip_prefix("node '")?.strip_suffix('\'')
}

/// Refuses what lies on an inactive node and is active itself.
pub(super) fn check_below(
    child: &str,
    child_active: bool,
    role: &str,
    parent: &str,
    active: bool,
) -> Result<()> {
    match active && !child_active {
        true => bail!("Inactive '{child}' can't be a {role} child of active '{parent}'"),
        false => Ok(()),
    }
}

impl Blockdevs {
    /// Whether the node is active.
    pub fn is_active(&self, name: &str) -> bool {
        self.facts(name).is_ok_and(|facts| facts.active)
    }

    /// Whether somebody who is active lies on the node, or a job uses it.
    fn has_active_parent(&self, name: &str) -> bool {
        let active = |user: &String| match node_in(user) {
            Some(parent) => self.is_active(parent),
            None => user.starts_with("job '"),
        };
        self.0.graph.users(name).iter().any(active)
    }

    fn below(&self, name: &str) -> Vec<String> {
        self.0.graph.children(name)
    }

    /// Makes `name` inactive, and those below it on which nothing active lies. `allows`: whether a user that is no node lets the
    /// node that it uses become inactive. Where it fails, what was made inactive is active again. `turn`: nobody else changes
    /// the graph.
    pub async fn inactivate(
        &self,
        turn: &RangeGuard,
        name: &str,
        allows: &dyn Fn(&str) -> bool,
    ) -> Result<()> {
        self.0.graph.get(name)?;
        if self.has_active_parent(name) {
            bail!("Node has active parent node");
        }
        let mut next = vec![name.to_owned()];
        while let Some(name_of_next) = next.pop() {
            if !self.is_active(&name_of_next) || self.has_active_parent(&name_of_next) {
                continue;
            }
            if let Err(error) = self.inactivate_one(&name_of_next, allows).await {
                if let Err(error) = self.activate(turn, name).await {
                    tracing::error!("'{name}' could not be made active again: {error:#}");
                }
                return Err(error);
            }
            next.extend(self.below(&name_of_next));
        }
        Ok(())
    }

    /// Makes all nodes inactive, or none.
    pub async fn inactivate_all(&self, turn: &RangeGuard, allows: &dyn Fn(&str) -> bool) -> Result<()> {
        for (name, _) in self.0.graph.list() {
            let has_parent = self.0.graph.users(&name).iter().any(|user| node_in(user).is_some());
            if has_parent || !self.is_active(&name) {
                continue;
            }
            if let Err(error) = self.inactivate(turn, &name, allows).await {
                if let Err(error) = self.activate_all(turn).await {
                    tracing::error!("not all nodes could be made active again: {error:#}");
                }
                return Err(error);
            }
        }
        Ok(())
    }

    async fn inactivate_one(&self, name: &str, allows: &dyn Fn(&str) -> bool) -> Result<()> {
        let users = self.0.graph.users(name);
        if users.iter().any(|user| node_in(user).is_none() && !allows(user)) {
            bail!(NOT_PERMITTED);
        }
        let node = self.0.graph.get(name)?;
        let held = hold(name, &node).await?;
        match self.opened(name).filter(|opened| !opened.read_only) {
            Some(opened) => {
                self.can_exchange(name, &node)?;
                node.close(&Ctx::GUEST).await.with_context(|| format!("closing '{name}'"))?;
                let resting = match self.instance(name, Opened { read_only: true, ..opened }).await {
                    Ok(resting) => resting,
                    Err(error) => {
                        let again = self.instance(name, opened).await;
                        let again = again.with_context(|| format!("'{name}' could not be opened again"))?;
                        self.put_instance(name, &node, again).await?;
                        return Err(error);
                    }
                };
                resting.set_inactive(true);
                self.put_instance(name, &node, resting).await?;
            }
            None => {
                node.sync(&Ctx::GUEST).await.with_context(|| format!("syncing '{name}'"))?;
                node.set_inactive(node.limits().writable);
            }
        }
        drop(held);
        self.rest(name, &self.below(name));
        let mut entries = lock(&self.0.entries);
        let entry = entries.get_mut(name).ok_or_else(|| unknown(name))?;
        entry.facts.active = false;
        for user in users.iter().filter(|user| node_in(user).is_none()) {
            entry.holds.rest(user, entry.file.as_deref());
        }
        Ok(())
    }

    /// The holds of `name` on these rest.
    fn rest(&self, name: &str, below: &[String]) {
        let mut entries = lock(&self.0.entries);
        for child in below {
            if let Some(entry) = entries.get_mut(child) {
                entry.holds.rest(&format!("node '{name}'"), entry.file.as_deref());
            }
        }
    }

    /// Makes `name` active, after those below it. `turn`: nobody else changes the graph.
    pub async fn activate(&self, _turn: &RangeGuard, name: &str) -> Result<()> {
        self.0.graph.get(name)?;
        let (mut next, mut all) = (vec![name.to_owned()], Vec::new());
        while let Some(name) = next.pop() {
            if !self.is_active(&name) && !all.contains(&name) {
                next.extend(self.below(&name));
                all.push(name);
            }
        }
        all.sort_by_cached_key(|name| self.height(name));
        for name in all {
            self.activate_one(&name).await?;
        }
        Ok(())
    }

    /// Makes all nodes active.
    pub async fn activate_all(&self, turn: &RangeGuard) -> Result<()> {
        for (name, _) in self.0.graph.list() {
            self.activate(turn, &name).await?;
        }
        Ok(())
    }

    async fn activate_one(&self, name: &str) -> Result<()> {
        let node = self.0.graph.get(name)?;
        let below = self.below(name);
        for (at, child) in below.iter().enumerate() {
            let woken = {
                let mut entries = lock(&self.0.entries);
                let entry = entries.get_mut(child).ok_or_else(|| unknown(child))?;
                let woken = entry.holds.wake(child, &format!("node '{name}'"), entry.file.as_deref());
                // Others may have made it longer.
                woken.and_then(|()| entry.disk.as_ref().map_or(Ok(()), |disk| Ok(disk.look_at_len()?)))
            };
            if let Err(error) = woken {
                self.rest(name, &below[..=at]);
                return Err(error);
            }
        }
        let outcome = self.wake(name, &node).await;
        if outcome.is_err() {
            self.rest(name, &below);
        }
        outcome
    }

    /// What `name` lies on is awake.
    async fn wake(&self, name: &str, node: &NodeHandle) -> Result<()> {
        let held = hold(name, node).await?;
        let users = self.0.graph.users(name);
        {
            let mut entries = lock(&self.0.entries);
            let entry = entries.get_mut(name).ok_or_else(|| unknown(name))?;
            for (at, user) in users.iter().enumerate().filter(|(_, user)| node_in(user).is_none()) {
                if let Err(error) = entry.holds.wake(name, user, entry.file.as_deref()) {
                    let woken = users[..at].iter().filter(|user| node_in(user).is_none());
                    woken.for_each(|user| entry.holds.rest(user, entry.file.as_deref()));
                    return Err(error);
                }
            }
            if let Some(disk) = &entry.disk {
                disk.look_at_len()?;
            }
        }
        match self.opened(name) {
            Some(opened) => {
                self.can_exchange(name, node)?;
                let awake = self.instance(name, opened).await?;
                self.put_instance(name, node, awake).await?;
            }
            None => node.set_active(),
        }
        if let Some(entry) = lock(&self.0.entries).get_mut(name) {
            entry.facts.active = true;
        }
        drop(held);
        Ok(())
    }

    /// Refuses an image that cannot be opened anew under those who use it.
    fn can_exchange(&self, name: &str, node: &NodeHandle) -> Result<()> {
        if node.backing().is_some_and(|slot| slot.copy_on_read().is_some()) {
            bail!("'{name}' keeps what is read from below: delete the copy-on-read filter first");
        }
        let child = self.facts(name)?.file.ok_or_else(|| anyhow!("'{name}' lies on no file"))?;
        if !matches!(self.recipe(name), Some(Recipe::Format { .. })) {
            bail!("'{name}' lies on a part of '{child}', and cannot be opened anew");
        }
        let parents = self.parents(name).map(drop);
        parents.map_err(|_| {
            anyhow!("'{name}' lies under a filter that holds it fast, and cannot be opened anew")
        })
    }
}
