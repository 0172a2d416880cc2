//! `blockdev-backup`.
//!
//! A backup goes on after a restart where its map ([`super::maps`]) proves that the target and what is still as it was make up
//! the disk as it was when the backup began. Where it does not, the backup has failed, and waits to be dismissed however it was
//! to be: nobody is there yet who could be told. A bitmap that it is to renew at its end says what was written since it began, in
//! all processes; where that is not known any more, it is left alone, and says more than has changed rather than less.

use std::sync::Arc;

use infill_job::copy::Unproven;
use infill_job::copy::backup::{self, BackupBitmap, BackupOptions, BackupSync, BitmapMode, Prepared};
use infill_job::{BlockJobProgress, Job, JobEvent, JobType, KeptJob, MapName};
use infill_node::{Bitmap, CompressNode, Held, NodeHandle};
use infill_qmp::QmpError;
use infill_qmp::backup::{self as words, BitmapSyncMode, BlockdevBackup};

use super::control::{Control, refused};
use super::copy::job_options;
use super::drive::Target;
use super::jobs::{Claims, event, job_refused, on_error, yield_once};
use super::maps::{Copied, Kept, NO_MAP};
use crate::blockdev::{Access, hold};

/// A backup that was refused nothing, and is to be prepared while its disk is held.
pub(super) struct Checked {
    options: BlockdevBackup,
    source: NodeHandle,
    target: NodeHandle,
    bitmap: Option<Arc<Bitmap>>,
    goes_on: bool,
    /// The node of a target that goes with the job.
    owned: Option<Target>,
    /// What is kept of it.
    kept: Option<Kept>,
    /// Its nodes, where they were taken before.
    claims: Option<Claims>,
}

/// A backup of the disk as it is now, which is to be started.
pub(super) struct Ready {
    prepared: Prepared,
    map: Option<MapName>,
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

    fn copied(&self) -> Copied<'_> {
        let renews = self.options.bitmap_mode.is_some_and(|mode| mode != BitmapSyncMode::Never);
        Copied {
            id: &self.options.job.job_id,
            kind: JobType::Backup,
            source: &self.options.device,
            target: &self.options.target,
            node: &self.source,
            is_written: true,
            all: self.options.sync != words::BackupSync::Bitmap,
            copy: &self.target,
            is_whole: false,
            renews: self.bitmap.as_ref().filter(|_| renews).map(|bitmap| bitmap.map().granularity()),
        }
    }
}

impl Control {
    /// `blockdev-backup`. Answered once the job runs.
    pub(super) async fn blockdev_backup(&self, options: BlockdevBackup) -> Result<(), QmpError> {
        if self.is_lost(&options.job.job_id) {
            return self.end_lost(&options.job.job_id, JobType::Backup, NO_MAP);
        }
        self.start_one_backup(self.check_backup(options)?).await
    }

    /// Has what is left to do of a backup that begins be kept for the next daemon.
    pub(super) async fn keep_backup(&self, checked: Checked) -> Checked {
        let kept = self.new_map(&checked.copied()).await;
        Checked { kept, ..checked }
    }

    /// Starts a backup.
    pub(super) async fn start_one_backup(&self, mut checked: Checked) -> Result<(), QmpError> {
        let (id, device) = (checked.options.job.job_id.clone(), checked.options.device.clone());
        // What follows may wait for a server: nobody takes the nodes away, or opens others in their place, meanwhile.
        checked.claims = Some(self.claim_for(&checked.options)?);
        let found = self.found_map(&checked.copied()).await;
        self.not_ending()?;
        let goes_on = match found {
            Some(Ok(kept)) => {
                checked.kept = Some(kept);
                true
            }
            Some(Err(why)) => return self.cannot_go_on(&id, JobType::Backup, &why),
            None => {
                checked = self.keep_backup(checked).await;
                false
            }
        };
        let held = hold(&device, &checked.source).await.map_err(|error| refused(&error))?;
        if goes_on && !checked.kept.as_ref().is_some_and(|(kept, _)| kept.map().is_live()) {
            drop(checked);
            return self.end_lost(&id, JobType::Backup, "its disk was written to meanwhile");
        }
        let ready = self.prepare_backup(checked, &held)?;
        drop(held);
        self.start_backup(ready)?;
        yield_once().await;
        Ok(())
    }

    /// Whether it is known already of a backup that is to go on that it cannot.
    pub(super) fn is_lost(&self, id: &str) -> bool {
        self.jobs().goes_on_as(id).is_some_and(|kept| kept.map.is_none())
    }

    /// A copy that must not begin anew cannot go on, now or at all.
    pub(super) fn cannot_go_on(&self, id: &str, kind: JobType, why: &Unproven) -> Result<(), QmpError> {
        match why {
            Unproven::Never(why) => self.end_lost(id, kind, why),
            Unproven::NotNow(why) => Err(QmpError::generic(format!(
                "it is not known whether the copy can go on ({why}): it is looked at again"
            ))),
        }
    }

    /// A copy that was to go on cannot, and must not begin anew: it is shown as failed.
    pub(super) fn end_lost(&self, id: &str, kind: JobType, why: &str) -> Result<(), QmpError> {
        let what = match kind {
            JobType::Backup => "what the disk was when the backup began",
            _ => "what was written since the copy began",
        };
        let error = format!(
            "{what} cannot be proven any more after a restart ({why}): the target is no copy of it, begin a new one"
        );
        tracing::error!(job = id, "{error}");
        let kept = self.jobs().goes_on_as(id).unwrap_or_default();
        let (len, offset, speed) = (kept.len, kept.offset, kept.speed);
        // Whoever comes back is to see it.
        self.drop_map(id);
        let kept = KeptJob { auto_dismiss: false, error: Some(error.clone()), map: None, ..kept };
        self.jobs().show_concluded(id, kind, kept).map_err(job_refused)?;
        let progress = BlockJobProgress { kind, device: id.to_owned(), len, offset, speed };
        let (name, data) = event(JobEvent::BlockJobCompleted { progress, error: Some(error) });
        self.tell(name, data);
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
        let target = find(&options.target)?;
        let goes_on = self.jobs().goes_on_as(&options.job.job_id).is_some();
        let bitmap = match &options.bitmap {
            None => None,
            // What it said stands in the map.
            Some(name) if goes_on => source.bitmap(name).ok(),
            Some(name) => {
                let missing = |_| QmpError::generic(format!("Bitmap '{name}' could not be found"));
                Some(source.bitmap(name).map_err(missing)?)
            }
        };
        options.check_bitmap()?;
        if options.device == options.target {
            return Err(QmpError::generic("Source and target cannot be the same"));
        }
        if options.compress && !CompressNode::is_possible(&target) {
            let why = format!("Compression is not supported for this drive {}", options.target);
            return Err(QmpError::generic(why));
        }
        if self.jobs().get(&options.job.job_id).is_ok() {
            return Err(QmpError::generic(format!("Job ID '{}' already in use", options.job.job_id)));
        }
        // A disk may have several backups at once.
        let is_backup = |user: &String| {
            let id = user.strip_prefix("job '").and_then(|rest| rest.strip_suffix('\''));
            id.is_none_or(|id| self.kind_of_job(id) == Some(JobType::Backup))
        };
        if !self.blockdevs().graph().users(&options.device).iter().all(is_backup) {
            return Err(self.busy(&options.device));
        }
        self.not_busy(&options.target)?;
        Ok(Checked { options, source, target, bitmap, goes_on, owned: None, kept: None, claims: None })
    }

    /// Takes its nodes, which must not have been checked longer than a moment ago.
    fn claim_for(&self, options: &BlockdevBackup) -> Result<Claims, QmpError> {
        let mut claims = Claims::new(self.blockdevs(), &options.job.job_id);
        claims.take(&options.device, Access::Reader)?;
        claims.take(&options.target, Access::Writer)?;
        Ok(claims)
    }

    /// Takes hold of the disk as it is now.
    pub(super) fn prepare_backup(&self, checked: Checked, held: &Held) -> Result<Ready, QmpError> {
        let Checked { options, source, mut target, bitmap, goes_on, owned, kept, claims } = checked;
        let (kept, map) = kept.unzip();
        let claims = match claims {
            Some(claims) => claims,
            None => self.claim_for(&options)?,
        };
        if options.compress {
            target = NodeHandle::new(CompressNode::new(target));
        }
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
                match bitmap {
                    Ok(bitmap) => Some(BackupBitmap { bitmap, mode }),
                    // A kill has left it inconsistent: it is not renewed.
                    Err(_) if goes_on => None,
                    Err(error) => return Err(QmpError::generic(error.to_string())),
                }
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
            kept,
            keep: Some(Box::new((claims, owned))),
            ..BackupOptions::new(source, target)
        };
        let prepared = backup::prepare(self.jobs(), job, backup, held).map_err(job_refused)?;
        Ok(Ready { prepared, map })
    }

    /// Starts a backup that was prepared.
    pub(super) fn start_backup(&self, ready: Ready) -> Result<Job, QmpError> {
        let job = ready.prepared.start(self.jobs()).map_err(job_refused)?;
        job.set_map(ready.map);
        self.join_group(&job);
        Ok(job)
    }
}
