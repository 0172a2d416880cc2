//! What is told of migrations to those who ask.

use std::path::PathBuf;

use infill_migrate::Gate;
use serde_json::{Value, json};

use super::gate::DiskGate;
use super::{Driver, Kept, side_word, state_word};
use crate::daemon::control::Control;

/// Where a disk's image is: one that is fenced by its name has another.
fn filename(kept: &Kept, index: usize) -> PathBuf {
    let local = &kept.local.disks[index];
    let fenced = local.kind.fenced_path(&local.path);
    if fenced.exists() { fenced } else { local.path.clone() }
}

impl Control {
    /// `__infill_query-migrations`: from records on stable storage, and what their drivers are about.
    pub(super) fn query_migrations(&self) -> Value {
        let kept = self.migrations.kept.borrow();
        kept.iter().map(|(key, kept)| self.migration_info(key, kept)).collect()
    }

    fn migration_info(&self, key: &str, kept: &Kept) -> Value {
        let (record, plan) = (&kept.record, kept.record.plan());
        let drivers = self.migrations.drivers.borrow();
        let (told, connected, trouble) = match drivers.get(key) {
            Some(Driver::Source { told, link, .. }) => (Some(told), link.is_up(), link.trouble()),
            Some(Driver::Target { told, link, .. }) => (Some(told), link.borrow().is_up(), None),
            None => (None, false, None),
        };
        let gates = plan.disks.iter().filter_map(|disk| self.migrations.gate(&disk.id.to_string()));
        let gates: Vec<DiskGate> = gates.collect();
        // An earlier migration of the disk says nothing of it any more.
        let decides = |id| self.migrations.decides(id, plan.migration, record.side());
        let driven = told.is_some() && plan.disks.first().is_some_and(|disk| decides(disk.id));
        let gate = gates.first().filter(|_| driven).map_or(Gate::Deny, DiskGate::gate);
        let disks = plan.disks.iter().enumerate().map(|(index, disk)| {
            let mut told = json!({
                "name": disk.id.to_string(),
                "epoch": record.epoch(disk).0,
                "bytes": disk.bytes,
                "filename": filename(kept, index),
            });
            if let Some(blocks) = record.residual().and_then(|residual| residual.get(index)) {
                told["residual-bytes"] = json!(blocks.saturating_mul(plan.block_bytes.into()));
            }
            told
        });
        let mut out = json!({
            "migration": plan.migration.to_string(),
            "side": side_word(record.side()),
            "state": state_word(record.state()),
            "term": record.term().0,
            "phase": told.map_or_else(|| "over".into(), |told| told.phase.borrow().clone()),
            "gate": format!("{gate:?}"),
            "owner": driven && gate.runs(),
            "peer": plan.peer,
            "peer-connected": connected,
            "rounds": told.map_or(0, |told| told.rounds.get()),
            "dirty-bytes": gates.iter().map(DiskGate::dirty_bytes).sum::<u64>(),
            "missing-bytes": told.map_or(0, |told| told.missing_bytes.get()),
            "disks": disks.collect::<Vec<_>>(),
        });
        if let Some(error) = told.and_then(|told| told.error.borrow().clone()).or(trouble) {
            out["error"] = json!(error);
        }
        out
    }
}
