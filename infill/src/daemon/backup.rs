//! `blockdev-backup`.
//!
//! A backup does not come back with the daemon's state: the moment that it copies has passed. Stopping it is cancelling it.

use std::sync::Arc;

use infill_job::copy::backup::{self, BackupBitmap, BackupOptions, BackupSync, BitmapMode, Prepared};
use infill_job::{Job, JobType};
use infill_node::{Bitmap, Held, NodeHandle};
use infill_qmp::QmpError;
use infill_qmp::backup::{self as words, BitmapSyncMode, BlockdevBackup};

use super::control::{Control, refused};
use super::copy::job_options;
use super::drive::Target;
use super::jobs::{Claims, job_refused, on_error, yield_once};
use crate::blockdev::{Access, hold};

/// A backup that was refused nothing, and is to be prepared while its disk is held.
pub(super) struct Checked {
    options: BlockdevBackup,
    source: NodeHandle,
    bitmap: Option<Arc<Bitmap>>,
    /// The node of a target that goes with the job.
    owned: Option<Target>,
}

impl Checked {
    /// The disk's name.
    pub(super) fn device(&self) -> &str {
        &self.options.device
    }

    /// The target goes with the job.
    pub(super) fn into(self, target: Target) -> Checked {
        Checked { owned: Some(target), ..self }
    }
}

impl Control {
    /// `blockdev-backup`. Answered once the job runs.
    pub(super) async fn blockdev_backup(&self, options: BlockdevBackup) -> Result<(), QmpError> {
        self.start_one_backup(self.check_backup(options)?).await
    }

    /// Starts a backup.
    pub(super) async fn start_one_backup(&self, checked: Checked) -> Result<(), QmpError> {
        let device = checked.options.device.clone();
        let held = hold(&device, &checked.source).await.map_err(|error| refused(&error))?;
        let prepared = self.prepare_backup(checked, &held)?;
        drop(held);
        self.start_backup(prepared)?;
        yield_once().await;
        Ok(())
    }

    /// Refuses what cannot be, before guests wait for anything.
    pub(super) fn check_backup(&self, options: BlockdevBackup) -> Result<Checked, QmpError> {
        let find = |name: &str| {
            let missing =
                |_| QmpError::generic(format!("Cannot find device='{name}' nor node-name='{name}'"));
            self.blockdevs().get(name).map_err(missing)
        };
        let source = find(&options.device)?;
        find(&options.target)?;
        let bitmap = match &options.bitmap {
            None => None,
            Some(name) => {
                let missing = |_| QmpError::generic(format!("Bitmap '{name}' could not be found"));
                Some(source.bitmap(name).map_err(missing)?)
            }
        };
        options.check_bitmap()?;
        if options.device == options.target {
            return Err(QmpError::generic("Source and target cannot be the same"));
        }
        if options.compress {
            // No driver here writes compressed data.
            let why = format!("Compression is not supported for this drive {}", options.target);
            return Err(QmpError::generic(why));
        }
        if self.jobs().get(&options.job.job_id).is_ok() {
            return Err(QmpError::generic(format!("Job ID '{}' already in use", options.job.job_id)));
        }
        // A disk may have several backups at once.
        let is_backup = |user: &String| {
            let id = user.strip_prefix("job '").and_then(|rest| rest.strip_suffix('\''));
            id.is_none_or(|id| self.jobs().get(id).is_ok_and(|job| job.kind() == JobType::Backup))
        };
        if !self.blockdevs().graph().users(&options.device).iter().all(is_backup) {
            return Err(self.busy(&options.device));
        }
        self.not_busy(&options.target)?;
        Ok(Checked { options, source, bitmap, owned: None })
    }

    /// Takes hold of the disk as it is now.
    pub(super) fn prepare_backup(&self, checked: Checked, held: &Held) -> Result<Prepared, QmpError> {
        let Checked { options, source, bitmap, owned } = checked;
        let mut claims = Claims::new(self.blockdevs(), &options.job.job_id);
        claims.take(&options.device, Access::Reader)?;
        let target = claims.take(&options.target, Access::Writer)?;
        let bitmap = match (bitmap, options.bitmap_mode) {
            (Some(bitmap), Some(mode)) => {
                let mode = match mode {
                    BitmapSyncMode::OnSuccess => BitmapMode::OnSuccess,
                    BitmapSyncMode::Never => BitmapMode::Never,
                    BitmapSyncMode::Always => BitmapMode::Always,
                };
                let bitmap = match mode {
                    BitmapMode::Never => bitmap.use_readable(),
                    _ => bitmap.use_changeable(),
                };
                let bitmap = bitmap.map_err(|error| QmpError::generic(error.to_string()))?;
                Some(BackupBitmap { bitmap, mode })
            }
            _ => None,
        };
        let job = job_options(options.job);
        let backup = BackupOptions {
            sync: match options.sync {
                words::BackupSync::Top => BackupSync::Top,
                words::BackupSync::Full => BackupSync::Full,
                words::BackupSync::None => BackupSync::Nothing,
                words::BackupSync::Bitmap => BackupSync::Bitmap,
            },
            bitmap,
            on_source_error: on_error(options.on_source_error),
            on_target_error: on_error(options.on_target_error),
            keep: Some(Box::new((claims, owned))),
            ..BackupOptions::new(source, target)
        };
        backup::prepare(self.jobs(), job, backup, held).map_err(job_refused)
    }

    /// Starts a backup that was prepared.
    pub(super) fn start_backup(&self, prepared: Prepared) -> Result<Job, QmpError> {
        prepared.start(self.jobs()).map_err(job_refused)
    }
}
