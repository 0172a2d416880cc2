//! The backup job: a second node that holds what the first one did when the job began, while guests write to the first.
//!
//! What is still to be copied of the disk as it was stands in the transfer's *old* map, and that map alone decides: the loop
//! and a guest's write both copy what is in it, under the lock of the range, and take it out then. A guest's write waits until
//! the old bytes of its blocks are on the target, and then goes on; it never sees an error of the target (decision 0010).
//!
//! A backup that goes on after a restart finds what is old in its map ([`super::KeptMap`]): what is old there is as it was on the
//! source, for the bit of a block is cleared before a guest's write to it goes on.
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
use super::keeping::Since;
use super::mirror::hold;
use super::{Copier, CopyPolicy, Goal, KeptCopy, Scope, Transfer, piece_bytes};
use crate::error::JobError;
use crate::job::{Job, Work, WorkEnd};
use crate::manager::{Claim, JobOptions, Jobs};
use crate::state::{JobType, OnError};
use crate::stream::FILL_MIN_RATE;

/// Why a backup cannot go on.
const PASSED: &str = "the disk was written to while nobody kept what it was";

/// Why a backup cannot go on.
const OTHER_TARGET: &str = "the target is opened in another way than it was: begin the backup anew";

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
    /// Where what is old is kept for a process after this one. Its bits are all set, or none where a bitmap says what is copied.
    pub kept: Option<KeptCopy>,
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
            kept: None,
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
    let BackupOptions { source, target, sync, bitmap, kept, .. } = options;
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
    let piece = piece_bytes(&target, &scope);
    let old = DirtyMap::new(source.len(), piece);
    let map = kept.as_ref().map(|kept| kept.map().clone());
    let goes_on = map.as_ref().filter(|map| map.is_found());
    match (goes_on, sync, &bitmap) {
        (Some(map), ..) if !map.is_live() => return Err(JobError::generic(PASSED)),
        (Some(map), ..) if map.piece() != piece => return Err(JobError::generic(OTHER_TARGET)),
        (Some(map), ..) => map.copy_whole_into(&old),
        (None, BackupSync::Bitmap, Some(bitmap)) => old.merge(bitmap.bitmap.bitmap().map()),
        (None, BackupSync::Bitmap, None) => return Err(JobError::generic("a bitmap is needed")),
        (None, ..) => old.mark(0, source.len()),
    }
    let goes_on = goes_on.is_some();
    let transfer = Transfer::of_the_kept_past(source.clone(), target, scope, old, kept.as_ref());
    if sync == BackupSync::Bitmap && !goes_on {
        transfer.cold.merge(transfer.old());
    }
    let policy = CopyPolicy {
        on_source_error: options.on_source_error,
        on_target_error: options.on_target_error,
        min_rate: options.min_rate,
    };
    let kept_since = kept.as_ref().and_then(|kept| kept.since().cloned());
    let watching_since = kept_since.as_ref().map(|since| {
        if !goes_on {
            since.go_live();
        }
        held.watch(Arc::new(Since(since.clone())))
    });
    // Where it is not known what was written before, the bitmap is left alone: it says too much, and never too little.
    let bitmap = bitmap.filter(|_| !goes_on || kept_since.is_some()).map(|used| {
        let granularity = used.bitmap.bitmap().map().granularity();
        let since = Arc::new(DirtyMap::new(source.len(), granularity));
        kept_since.iter().filter(|_| goes_on).for_each(|before| before.copy_into(&since));
        Followed { _watching: held.watch(since.clone()), since, used }
    });
    let keep = Arc::new(KeepOld::new(transfer.clone(), false, None));
    let watching = Some(held.watch(keep.clone()));
    transfer.begin_keeping_past(sync == BackupSync::Bitmap, sync != BackupSync::Nothing);
    let mut kept = kept;
    kept.iter_mut().for_each(KeptCopy::take_over);
    let work = Backup {
        endless: sync == BackupSync::Nothing,
        watching,
        kept,
        copier: Copier::new(transfer.clone(), policy),
        transfer,
        keep,
        bitmap,
        watching_since,
        goes_on: false,
        _claims: options.keep,
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
    kept: Option<KeptCopy>,
    bitmap: Option<Followed>,
    /// Has what guests write noted for a later process.
    watching_since: Option<Watching>,
    /// Runs until it is cancelled.
    endless: bool,
    /// A later process goes on with it.
    goes_on: bool,
    _claims: Option<Box<dyn Any>>,
    _claim: Claim,
}

impl Backup {
    async fn copy(&mut self, job: &Job) -> IoResult<()> {
        let goal = if self.endless { Goal::Asked } else { Goal::Empty };
        let keep = self.keep.clone();
        let copied = self.copier.run_until(job, goal, &|| keep.failure()).await;
        if copied.is_err() && job.goes_on_later() {
            // Old bytes are kept as long as anybody can write.
            return copied;
        }
        let copied = copied.and_then(|()| self.copier.take_ignored());
        if copied.is_err() || self.endless {
            self.transfer.end_keeping();
        }
        // From here on nobody waits for it.
        self.keep.end();
        self.watching = None;
        copied?;
        self.transfer.target.sync(&Ctx::FILL).await?;
        job.tell_durable();
        Ok(())
    }

    /// The bitmap says what was written since the job began, and what is `left` to be copied of what it was.
    async fn renew_bitmap(&mut self, left: Option<&DirtyMap>) -> IoResult<()> {
        let Some(followed) = &self.bitmap else { return Ok(()) };
        // No write that one of them has seen and the other has not.
        let held = hold(&self.transfer.source).await?;
        // From here on the bitmap sees what is written, and this does not: no later process is to renew it again.
        self.kept.iter().filter_map(KeptCopy::since).for_each(|since| since.void());
        let bitmap = followed.used.bitmap.bitmap();
        let new = DirtyMap::new(bitmap.map().len(), bitmap.map().granularity());
        left.into_iter().for_each(|left| new.merge(left));
        if bitmap.is_recording() {
            new.merge(&followed.since);
        }
        bitmap.become_like(&new);
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

    fn end(&mut self, end: WorkEnd) {
        self.goes_on = end == WorkEnd::GoesOn;
        if let Some(kept) = &mut self.kept {
            kept.end_of_past(end, self.watching.take());
        }
        if self.goes_on {
            std::mem::forget(self.watching_since.take());
        }
    }
}

impl Drop for Backup {
    fn drop(&mut self) {
        if !self.goes_on {
            self.keep.end();
        }
    }
}
