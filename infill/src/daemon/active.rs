//! `blockdev-set-active`.
//!
//! What is active comes back active and what is not does not ([`Control::note_active`]): another process may have the image by then.

use std::collections::BTreeMap;

use infill_qmp::{BlockExportOptions, QmpError};

use super::control::{Control, refused};
use crate::one_line;

impl Control {
    /// `blockdev-set-active`.
    pub(super) async fn set_active(&self, name: Option<&str>, active: bool) -> Result<(), QmpError> {
        let turn = self.blockdevs().change_graph().await;
        if let Some(name) = name {
            self.blockdevs().get(name).map_err(|error| refused(&error))?;
        }
        let before = self.which_are_active();
        let allows = |user: &str| self.lets_be_inactive(user);
        let outcome = match (active, name) {
            (true, Some(name)) => self.blockdevs().activate(&turn, name).await,
            (true, None) => self.blockdevs().activate_all(&turn).await,
            (false, Some(name)) => self.blockdevs().inactivate(&turn, name, &allows).await,
            (false, None) => self.blockdevs().inactivate_all(&turn, &allows).await,
        };
        self.note_changes_of_active(&before);
        self.greet_new_nodes();
        outcome.map_err(|error| {
            let why = one_line(&error);
            QmpError::generic(match (active, name) {
                (false, Some(_)) if why != "Node has active parent node" => {
                    format!("Failed to inactivate node: {why}")
                }
                (false, None) => format!("Failed to inactivate all nodes: {why}"),
                _ => why,
            })
        })
    }

    /// An export that does not let its node be inactive is about to be added.
    pub(super) async fn activate_for_export(&self, options: &BlockExportOptions) -> Result<(), QmpError> {
        let name = &options.node_name;
        if options.allow_inactive || self.blockdevs().facts(name).is_ok_and(|facts| facts.active) {
            return Ok(());
        }
        let turn = self.blockdevs().change_graph().await;
        if self.blockdevs().get(name).is_err() {
            // Whoever adds the export says so.
            return Ok(());
        }
        let before = self.which_are_active();
        let outcome = self.blockdevs().activate(&turn, name).await;
        self.note_changes_of_active(&before);
        self.greet_new_nodes();
        outcome.map_err(|error| refused(&error))
    }

    fn which_are_active(&self) -> BTreeMap<String, bool> {
        let nodes = self.blockdevs().graph().list().into_iter();
        nodes.map(|(name, _)| (name.clone(), self.blockdevs().is_active(&name))).collect()
    }

    fn note_changes_of_active(&self, before: &BTreeMap<String, bool>) {
        for (name, active) in self.which_are_active() {
            if before.get(&name) != Some(&active) {
                self.note_active(&name, active);
            }
        }
    }
}
