//! The mirror job: a second node that holds what the first one does, while guests write to it.
//!
//! # Order of the end (P4)
//! 1. What is left is copied until little is left, and the target is synced.
//! 2. The source's changes are held; the last blocks are copied; the target is synced.
//! 3. [`MirrorOptions::on_exchange`] gives the source's users the target (not where the job was asked to leave them).
//! 4. Changes go on, on the target; then the event.
//!
//! In *background* mode a guest's write is marked and copied later; in *write-blocking* mode the guest is answered when
//! the target has it too. The first can be changed into the second while the job runs. A target that fails then marks the blocks, and the job's policy decides: the guest's write has
//! succeeded.

use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use infill_base::{Ctx, ErrorKind, IoError, IoResult};
use infill_node::{Change, Held, Kept, NodeHandle, Watcher, Watching};
use infill_storage::sync::Arc;
use infill_storage::{RangeGuard, rt};

use super::backup::{BackupBitmap, BitmapMode};
use super::keeping::UnderWay;
use super::{Copier, CopyPolicy, Failed, Goal, KeptCopy, Scope, Transfer};
use crate::error::JobError;
use crate::job::{Ending, Job, Work, WorkEnd};
use crate::manager::{Claim, JobOptions, Jobs};
use crate::state::{JobType, OnError};
use crate::stream::FILL_MIN_RATE;

/// How long guest writes in flight are waited for before the job tries again later; new ones wait meanwhile.
const HOLD_TIME: Duration = Duration::from_secs(1);
/// How long a job that was asked to complete catches up with its guests before it holds them.
const SETTLE_TIME: Duration = Duration::from_secs(2);
/// How often that is tried.
const HOLD_ATTEMPTS_MAX: u32 = 30;
/// How long guests are left alone between two attempts.
const HOLD_PAUSE: Duration = Duration::from_secs(1);

/// What a mirror copies first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MirrorSync {
    /// Everything that the disk reads as.
    Full,
    /// What the top layer holds.
    Top,
    /// Only what is written from now on.
    Nothing,
    /// What the bitmap marks.
    Bitmap,
}

/// When a guest's write is on the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum CopyMode {
    /// Later.
    #[default]
    Background,
    /// Before the guest is answered.
    WriteBlocking,
}

/// Gives the users of the source the target, while nothing changes on the source; an error ends the job.
pub type OnExchange = Box<dyn FnOnce(&Held) -> LocalBoxFuture<'static, IoResult<()>>>;

/// What a mirror takes.
pub struct MirrorOptions {
    /// The disk.
    pub source: NodeHandle,
    /// Where it is copied to.
    pub target: NodeHandle,
    /// What is copied first.
    pub sync: MirrorSync,
    /// The bitmap, where it is one that says what is copied. After success, and unless it is to be left alone, it says what was
    /// written since source and target were the same.
    pub bitmap: Option<BackupBitmap>,
    /// When guests' writes are on the target.
    pub copy_mode: CopyMode,
    /// Whether zeroes may become holes there.
    pub unmap: bool,
    /// What is done about errors of the source.
    pub on_source_error: OnError,
    /// What is done about errors of the target.
    pub on_target_error: OnError,
    /// Bytes per second below which politeness towards guests does not take it.
    pub min_rate: u64,
    /// Where what is left to do is kept for a process after this one.
    pub kept: Option<KeptCopy>,
    /// Called when the target takes the source's place.
    pub on_exchange: Option<OnExchange>,
}

impl MirrorOptions {
    /// The defaults.
    pub fn new(source: NodeHandle, target: NodeHandle) -> MirrorOptions {
        MirrorOptions {
            source,
            target,
            sync: MirrorSync::Full,
            bitmap: None,
            copy_mode: CopyMode::Background,
            unmap: true,
            on_source_error: OnError::default(),
            on_target_error: OnError::default(),
            min_rate: FILL_MIN_RATE,
            kept: None,
            on_exchange: None,
        }
    }
}

/// Starts a mirror on this thread's reactor (`blockdev-mirror`).
pub fn start(jobs: &Jobs, job: JobOptions, options: MirrorOptions) -> Result<Job, JobError> {
    let MirrorOptions { source, target, sync, bitmap, copy_mode, unmap, on_exchange, kept, .. } = options;
    if source.is_same(&target) {
        return Err(JobError::generic("Can't mirror node into itself"));
    }
    if !target.limits().writable {
        return Err(JobError::generic(format!(
            "{} is read-only: a mirror writes to it",
            target.info().filename
        )));
    }
    if target.len() != source.len() {
        return Err(JobError::generic("Source and target image have different sizes"));
    }
    let goes_on = kept.as_ref().is_some_and(|kept| kept.map().is_found());
    match (sync, &bitmap) {
        (MirrorSync::Bitmap, None) if !goes_on => return Err(JobError::generic("a bitmap is needed")),
        (_, Some(BackupBitmap { mode: BitmapMode::Always, .. })) => {
            return Err(JobError::generic("a mirror that fails does not say what it has copied"));
        }
        _ => {}
    }
    let claim = jobs.claim(&job.id, &target, Vec::new())?;
    let below = source.layer_below();
    let scope = match (sync, below) {
        (MirrorSync::Nothing | MirrorSync::Bitmap, _) => Scope::Nothing,
        (MirrorSync::Top, Some(below)) => Scope::Above(below),
        (MirrorSync::Top, None) | (MirrorSync::Full, _) => Scope::Full,
    };
    let transfer = Transfer::kept(source, target, scope, unmap, kept.as_ref());
    let policy = CopyPolicy {
        on_source_error: options.on_source_error,
        on_target_error: options.on_target_error,
        min_rate: options.min_rate,
    };
    let copier = Copier::new(transfer.clone(), policy);
    let work = Mirror { transfer, copier, bitmap, watching: None, kept, on_exchange, _claim: claim };
    let job = jobs.start(JobType::Mirror, job, work)?;
    job.set_copy_mode(copy_mode);
    Ok(job)
}

struct Mirror {
    transfer: Arc<Transfer>,
    copier: Copier,
    bitmap: Option<BackupBitmap>,
    watching: Option<Watching>,
    kept: Option<KeptCopy>,
    on_exchange: Option<OnExchange>,
    _claim: Claim,
}

impl Work for Mirror {
    async fn run(&mut self, job: &Job) -> IoResult<()> {
        let (transfer, marks) = (self.transfer.clone(), !job.is_write_blocking());
        let watcher = Arc::new(Follow { transfer, marks, job: Some(job.clone()) });
        let held = hold(&self.transfer.source).await?;
        self.watching = Some(held.watch(watcher));
        // No write that the bitmap had not seen and the watcher does not see. One that goes on has it in its map.
        if let Some(used) = self.bitmap.as_ref().filter(|_| !self.transfer.goes_on()) {
            self.transfer.cold.merge(used.bitmap.bitmap().map());
        }
        self.transfer.begin_keeping();
        self.kept.iter_mut().for_each(KeptCopy::take_over);
        drop(held);
        self.copier.run(job, Goal::Converged).await?;
        job.become_ready();
        self.copier.run(job, Goal::Asked).await
    }

    async fn prepare(&mut self, job: &Job) -> IoResult<()> {
        let held = settle(&mut self.copier, &self.transfer, job).await?;
        job.tell_durable();
        if job.ending() == Some(Ending::Exchange)
            && let Some(on_exchange) = self.on_exchange.take()
        {
            on_exchange(&held).await?;
        }
        // From here on changes of the source are not seen.
        self.transfer.end_keeping();
        self.watching = None;
        let complete = self.copier.take_ignored();
        if let Some(BackupBitmap { bitmap, mode: BitmapMode::OnSuccess }) = &self.bitmap
            && complete.is_ok()
        {
            bitmap.bitmap().clear();
        }
        self.bitmap = None;
        drop(held);
        complete
    }

    fn end(&mut self, end: WorkEnd) {
        if let Some(kept) = &mut self.kept {
            kept.end(end, self.watching.take());
        }
    }
}

/// Holds the changes of `node`; tried again for a while where guest writes that have begun do not end.
pub(super) async fn hold(node: &NodeHandle) -> IoResult<Held> {
    for _ in 0..HOLD_ATTEMPTS_MAX {
        if let Some(held) = rt::timeout(HOLD_TIME, node.hold_changes()).await {
            return Ok(held);
        }
        rt::sleep(HOLD_PAUSE).await;
    }
    let why = "guest writes that have begun do not end; does one wait for a source that is away?";
    Err(IoError::new(ErrorKind::Busy, why).in_node(node.info().filename))
}

/// Copies the rest. When this returns, source and target are the same, on stable storage, and nothing changes.
pub(super) async fn settle(copier: &mut Copier, transfer: &Transfer, job: &Job) -> IoResult<Held> {
    // What can be done before guests are held is done before; a guest that stays ahead is held all the same.
    copier.hurry(true);
    if let Some(outcome) = rt::timeout(SETTLE_TIME, copier.run(job, Goal::Converged)).await {
        outcome?;
    }
    copier.drain(job).await?;
    transfer.target.sync(&Ctx::FILL).await?;
    if let Some(outcome) = rt::timeout(SETTLE_TIME, copier.run(job, Goal::Converged)).await {
        outcome?;
    }
    copier.drain(job).await?;
    let held = hold(&transfer.source).await?;
    let outcome = copier.run(job, Goal::Empty).await;
    copier.hurry(false);
    outcome?;
    transfer.target.sync(&Ctx::FILL).await?;
    Ok(held)
}

/// Sees what guests write to the source.
pub(super) struct Follow {
    pub(super) transfer: Arc<Transfer>,
    /// Whether every change is marked. One that began before the copy mode was changed is copied later, so a job whose mode
    /// can change marks all.
    pub(super) marks: bool,
    /// The job, whose copy mode counts; `None` never has guests wait.
    pub(super) job: Option<Job>,
}

/// From before a guest's write until the target has it too.
struct Open {
    transfer: Arc<Transfer>,
    at: u64,
    len: u64,
    done: bool,
    /// Given up behind the mark.
    under_way: Option<UnderWay>,
    _range: RangeGuard,
}

impl Drop for Open {
    fn drop(&mut self) {
        if !self.done {
            self.transfer.mark(self.at, self.len);
        }
    }
}

impl Watcher for Follow {
    fn before<'a>(&'a self, _: &'a Ctx, change: &'a Change) -> Option<LocalBoxFuture<'a, IoResult<Kept>>> {
        let blocking = self.job.as_ref().is_some_and(Job::is_write_blocking);
        if !blocking {
            let under_way = self.transfer.enter(change.at, change.len)?;
            let kept: Kept = Some(Box::new(under_way));
            return Some(Box::pin(std::future::ready(Ok(kept))));
        }
        Some(Box::pin(async move {
            let transfer = self.transfer.clone();
            let (at, end) = transfer.whole(change.at, change.len);
            let len = end.saturating_sub(at);
            let range = transfer.ranges.exclusive(at, at + len).await;
            let under_way = transfer.enter(at, len);
            let open = Open { transfer, at, len, done: false, under_way, _range: range };
            let open: Kept = Some(Box::new(open));
            Ok(open)
        }))
    }

    fn landed(&self, at: u64, len: u64) {
        if self.marks {
            self.transfer.mark(at, len);
        }
    }

    fn after<'a>(
        &'a self,
        cx: &'a Ctx,
        _: &'a Change,
        kept: &'a mut Kept,
    ) -> Option<LocalBoxFuture<'a, IoResult<()>>> {
        let open = kept.as_mut()?.downcast_mut::<Open>()?;
        Some(Box::pin(async move {
            // Before it is read: a change that does not wait for this one marks what it has written meanwhile.
            open.transfer.cold.clear(open.at, open.len);
            open.transfer.hot.clear(open.at, open.len);
            let copied: Result<(), Failed> = open.transfer.copy_held(cx, open.at, open.len).await;
            open.done = copied.is_ok();
            if let Some(under_way) = open.under_way.take_if(|_| open.done) {
                under_way.end_copied();
            }
            // The guest's own write has succeeded. What the target lacks is marked, and the loop meets the error.
            Ok(())
        }))
    }
}
