//! Commands that make nodes and change how they lie ([`Shape`]), as far as they have no file of their own.

use std::rc::Rc;

use infill_job::copy::mirror::CopyMode;
use infill_qmp::shape::{JobChange, Shape};
use infill_qmp::transaction::{Transaction, TransactionAction};
use infill_qmp::{QmpError, copy};

use super::control::Control;
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
            Shape::SetActive { node_name, active } => self.set_active(node_name.as_deref(), active).await,
            Shape::JobChange { id, change } => self.change_job(&id, change),
        }
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
