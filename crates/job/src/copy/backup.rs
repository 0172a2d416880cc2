//! The backup job: a second node that holds what the first one did when the job began, while guests write to the first.
//!
//! What is still to be copied of the disk as it was stands in the transfer's *old* map, and that map alone decides: the loop
//! and a guest's write both copy what is in it, under the lock of the range, and take it out then. A guest's write waits until
//! the old bytes of its blocks are on the target, and then goes on; it never sees an error of the target (decision 0010).
//!
//! # Order of the end (P4)
//! 1. Everything old is copied; guests' writes no longer wait; the target is synced.
//! 2. The job waits to be finalized.
//! 3. The bitmap says what was written since the job began (where it is to); then the event.

use std::any::Any;

use infill_base::{Ctx, IoResult};
use infill_node::{BitmapUse, DirtyMap, Held, NodeHandle, Watching};
use infill_storage::sync::Arc;

use super::keep::KeepOld;
use super::mirror::hold;
use super::{BLOCK_BYTES, Copier, CopyPolicy, Goal, Scope, Transfer};
use crate::error::JobError;
use crate::job::{Job, Work};
use crate::manager::{Claim, JobOptions, Jobs};
use crate::state::{JobType, OnError};
use crate::stream::FILL_MIN_RATE;

/// What of the disk is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupSync {
    /// Everything that the disk reads as.
    Full,
    /// What the top layer holds.
    Top,
    /// Only what guests overwrite, until the job is cancelled.
    Nothing,
    /// What the bitmap marks.
    Bitmap,
}

/// What becomes of the bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapMode {
    /// After success it says what was written since the job began; it says that too, beside what it said, else.
    OnSuccess,
    /// It is left alone.
    Never,
    /// As on success; after a failure it says what was written since, and what was not copied.
    Always,
}

/// The bitmap of a backup, or of a mirror.
#[derive(Debug)]
pub struct BackupBitmap {
    /// It, which nobody else may change meanwhile.
    pub bitmap: BitmapUse,
    /// What becomes of it.
    pub mode: BitmapMode,
}

/// What a backup takes.
#[derive(Debug)]
pub struct BackupOptions {
    /// The disk.
    pub source: NodeHandle,
    /// Where it is copied to.
    pub target: NodeHandle,
    /// What is copied.
    pub sync: BackupSync,
    /// The bitmap, where there is one.
    pub bitmap: Option<BackupBitmap>,
    /// What is done about errors of the source.
    pub on_source_error: OnError,
    /// What is done about errors of the target.
    pub on_target_error: OnError,
    /// Bytes per second below which politeness towards guests does not take it.
    pub min_rate: u64,
    /// Dropped when the job is over, before that is told.
    pub keep: Option<Box<dyn Any>>,
}

impl BackupOptions {
    /// The defaults.
    pub fn new(source: NodeHandle, target: NodeHandle) -> BackupOptions {
        BackupOptions {
            source,
            target,
            sync: BackupSync::Full,
            bitmap: None,
            on_source_error: OnError::default(),
            on_target_error: OnError::default(),
            min_rate: FILL_MIN_RATE,
            keep: None,
        }
    }
}

/// A backup that is ready to be started: it copies the disk as it was when it was prepared.
pub struct Prepared {
    job: JobOptions,
    work: Backup,
}

impl Prepared {
    /// Starts it on this thread's reactor.
    pub fn start(self, jobs: &Jobs) -> Result<Job, JobError> {
        jobs.start(JobType::Backup, self.job, self.work)
    }
}

/// Takes hold of the disk as it is now (`blockdev-backup`). The caller holds its changes, and those of others whose
/// backups are to be of the same moment; from the end of the hold on, guests' writes wait for their blocks to be kept.
pub fn prepare(
    jobs: &Jobs,
    job: JobOptions,
    options: BackupOptions,
    held: &Held,
) -> Result<Prepared, JobError> {
    let BackupOptions { source, target, sync, bitmap, .. } = options;
    debug_assert!(held.node().is_same(&source), "the source is held");
    if source.is_same(&target) {
        return Err(JobError::generic("Source and target cannot be the same"));
    }
    if !target.limits().writable {
        let name = target.info().filename;
        return Err(JobError::generic(format!("{name} is read-only: a backup writes to it")));
    }
    if target.len() != source.len() {
        return Err(JobError::generic("Source and target image have different sizes"));
    }
    let claim = jobs.claim(&job.id, &target, Vec::new())?;
    let below = source.layer_below();
    let scope = match (sync, below) {
        (BackupSync::Nothing | BackupSync::Bitmap, _) => Scope::Nothing,
        (BackupSync::Top, Some(below)) => Scope::Above(below),
        (BackupSync::Top, None) | (BackupSync::Full, _) => Scope::Full,
    };
    let old = DirtyMap::new(source.len(), BLOCK_BYTES);
    match (sync, &bitmap) {
        (BackupSync::Bitmap, Some(bitmap)) => old.merge(bitmap.bitmap.bitmap().map()),
        (BackupSync::Bitmap, None) => return Err(JobError::generic("a bitmap is needed")),
        _ => old.mark(0, source.len()),
    }
    let transfer = Transfer::of_the_past(source.clone(), target, scope, old);
    if sync == BackupSync::Bitmap {
        transfer.cold.merge(transfer.old());
    }
    let policy = CopyPolicy {
        on_source_error: options.on_source_error,
        on_target_error: options.on_target_error,
        min_rate: options.min_rate,
    };
    let bitmap = bitmap.map(|used| {
        let granularity = used.bitmap.bitmap().map().granularity();
        let since = Arc::new(DirtyMap::new(source.len(), granularity));
        Followed { _watching: held.watch(since.clone()), since, used }
    });
    let keep = Arc::new(KeepOld::new(transfer.clone(), false, None));
    let work = Backup {
        endless: sync == BackupSync::Nothing,
        watching: Some(held.watch(keep.clone())),
        copier: Copier::new(transfer.clone(), policy),
        transfer,
        keep,
        bitmap,
        _kept: options.keep,
        _claim: claim,
    };
    Ok(Prepared { job, work })
}

/// A bitmap, and what was written since the job began.
struct Followed {
    used: BackupBitmap,
    since: Arc<DirtyMap>,
    _watching: Watching,
}

struct Backup {
    transfer: Arc<Transfer>,
    copier: Copier,
    keep: Arc<KeepOld>,
    watching: Option<Watching>,
    bitmap: Option<Followed>,
    /// Runs until it is cancelled.
    endless: bool,
    _kept: Option<Box<dyn Any>>,
    _claim: Claim,
}

impl Backup {
    async fn copy(&mut self, job: &Job) -> IoResult<()> {
        let goal = if self.endless { Goal::Asked } else { Goal::Empty };
        let keep = self.keep.clone();
        let copied = self.copier.run_until(job, goal, &|| keep.failure()).await;
        // From here on nobody waits for it.
        self.keep.end();
        self.watching = None;
        copied?;
        self.copier.take_ignored()?;
        self.transfer.target.sync(&Ctx::FILL).await?;
        job.tell_durable();
        Ok(())
    }

    /// The bitmap says what was written since the job began, and what is `left` to be copied of what it was.
    async fn renew_bitmap(&mut self, left: Option<&DirtyMap>) -> IoResult<()> {
        let Some(followed) = &self.bitmap else { return Ok(()) };
        // No write that one of them has seen and the other has not.
        let held = hold(&self.transfer.source).await?;
        let bitmap = followed.used.bitmap.bitmap();
        let new = DirtyMap::new(bitmap.map().len(), bitmap.map().granularity());
        left.into_iter().for_each(|left| new.merge(left));
        if bitmap.is_recording() {
            new.merge(&followed.since);
        }
        bitmap.map().become_like(&new);
        drop(held);
        Ok(())
    }

    fn mode(&self) -> Option<BitmapMode> {
        self.bitmap.as_ref().map(|followed| followed.used.mode)
    }
}

impl Work for Backup {
    async fn run(&mut self, job: &Job) -> IoResult<()> {
        let copied = self.copy(job).await;
        // What was copied so far counts only if it is stable.
        if copied.is_err()
            && self.mode() == Some(BitmapMode::Always)
            && self.transfer.target.sync(&Ctx::FILL).await.is_ok()
        {
            let transfer = self.transfer.clone();
            self.renew_bitmap(Some(transfer.old())).await?;
        }
        copied
    }

    async fn prepare(&mut self, _: &Job) -> IoResult<()> {
        if matches!(self.mode(), Some(BitmapMode::OnSuccess | BitmapMode::Always)) {
            self.renew_bitmap(None).await?;
        }
        self.bitmap = None;
        Ok(())
    }
}

impl Drop for Backup {
    fn drop(&mut self) {
        self.keep.end();
    }
}
