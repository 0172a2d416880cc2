//! Commands that make nodes and change how they lie ([`Shape`]), as far as they have no file of their own.

use std::rc::Rc;

use infill_job::copy::mirror::CopyMode;
use infill_qmp::shape::{JobChange, Shape};
use infill_qmp::transaction::{Transaction, TransactionAction};
use infill_qmp::{QmpError, copy};

use super::control::{Control, refused};
use super::jobs::job_refused;

impl Control {
    /// The commands of [`Shape`].
    pub(super) async fn shape(self: &Rc<Self>, shape: Shape) -> Result<(), QmpError> {
        match shape {
            Shape::Create(create) => self.blockdev_create(*create).await,
            Shape::SnapshotSync(sync) => {
                let actions = vec![TransactionAction::SnapshotSync(sync)];
                self.transaction(Transaction { actions, grouped: false }).await
            }
            Shape::InternalSnapshot(snapshot) => {
                let actions = vec![TransactionAction::InternalSnapshot(snapshot)];
                self.transaction(Transaction { actions, grouped: false }).await
            }
            Shape::DriveMirror(drive) => self.drive_mirror(*drive).await,
            Shape::DriveBackup(drive) => self.drive_backup(*drive).await,
            Shape::Reopen(options) => self.blockdev_reopen(options).await,
            Shape::SetActive { node_name, active } => self.set_active(node_name.as_deref(), active),
            Shape::JobChange { id, change } => self.change_job(&id, change),
        }
    }

    /// `blockdev-set-active`. Every node here is active as long as it is there.
    fn set_active(&self, name: Option<&str>, active: bool) -> Result<(), QmpError> {
        if let Some(name) = name {
            self.blockdevs().get(name).map_err(|error| refused(&error))?;
        }
        if active {
            return Ok(());
        }
        let used = |name: &str| !self.blockdevs().graph().users(name).is_empty();
        let nodes = self.blockdevs().graph().list();
        Err(QmpError::generic(match name {
            Some(name) if used(name) => "Failed to inactivate node: Operation not permitted".to_owned(),
            None if nodes.iter().any(|(name, _)| used(name)) => {
                "Failed to inactivate all nodes: Operation not permitted".to_owned()
            }
            _ => "'active': false is not supported yet: delete the node, whose image is then free for others"
                .into(),
        }))
    }

    /// `block-job-change`.
    fn change_job(&self, id: &str, change: JobChange) -> Result<(), QmpError> {
        let job = self.jobs().get_block(id).map_err(job_refused)?;
        let mode = match change {
            JobChange::Mirror(copy::CopyMode::Background) => Some(CopyMode::Background),
            JobChange::Mirror(copy::CopyMode::WriteBlocking) => Some(CopyMode::WriteBlocking),
            JobChange::Nothing(_) => None,
        };
        job.change_copy_mode(mode).map_err(job_refused)
    }
}
