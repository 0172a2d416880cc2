//! The commit job: what a chain holds above a base goes down into that base, and the layers above it go.
//!
//! During all of it the chain reads the same: what is written to the base is what the layers above it show there (P5).
//!
//! # Order of the end of a commit of the active layer
//! 1. What is left is copied until little is left, and the base is synced.
//! 2. The top's changes are held; the last blocks are copied; the base is synced.
//! 3. Where layers lie between, the top's header names the base; synced. They would shadow the base as well.
//!    [`CommitOptions::on_rebase`] is told: whoever keeps a description of the chain has it follow before the next step.
//! 4. The top becomes empty in one synced step ([`infill_node::Node::make_empty`]): else whoever opened the old chain later
//!    would see it shadow what was written to the base since.
//! 5. [`CommitOptions::on_exchange`] gives the top's users the base. Changes go on there; then the event.
//!
//! # Order of the end of a commit below the active layer
//! 1. The base is synced.
//! 2. The header of the layer above the committed ones names the base; synced.
//! 3. Its edge points at the base; [`CommitOptions::on_swap`] is told, then the event.

use futures_util::future::LocalBoxFuture;
use infill_base::{Ctx, ErrorKind, IoError, IoResult};
use infill_node::{BackingRef, BackingSlot, NodeHandle, Watching};
use infill_storage::sync::Arc;

use super::mirror::{Follow, OnExchange, hold, settle};
use super::{Copier, CopyPolicy, Goal, KeptCopy, Scope, Transfer};
use crate::error::JobError;
use crate::job::{Ending, Job, Work, WorkEnd};
use crate::manager::{Claim, JobOptions, Jobs};
use crate::state::{JobType, OnError};
use crate::stream::FILL_MIN_RATE;

/// Layers that are followed below a node.
const CHAIN_LAYERS_MAX: usize = 512;

/// Told once the edge above the committed layers points at the base.
pub type OnSwap = Box<dyn FnOnce() -> LocalBoxFuture<'static, ()>>;

/// Told that the top lies on the base directly.
pub type OnRebase = Box<dyn FnOnce() -> LocalBoxFuture<'static, IoResult<()>>>;

/// What a commit takes.
pub struct CommitOptions {
    /// The uppermost layer whose data go down.
    pub top: NodeHandle,
    /// Where they go.
    pub base: NodeHandle,
    /// The layer above `top`; `None` where guests write to `top`.
    pub overlay: Option<NodeHandle>,
    /// What a header that names the base from now on shall say.
    pub backing: BackingRef,
    /// What is done about I/O errors.
    pub on_error: OnError,
    /// Bytes per second below which politeness towards guests does not take it.
    pub min_rate: u64,
    /// Where what is left to do is kept for a process after this one.
    pub kept: Option<KeptCopy>,
    /// Called when the top lies on the base directly and is not empty yet; an error ends the job there.
    pub on_rebase: Option<OnRebase>,
    /// Called when the base takes the top's place.
    pub on_exchange: Option<OnExchange>,
    /// Called when the layer above the top lies on the base.
    pub on_swap: Option<OnSwap>,
}

impl CommitOptions {
    /// The defaults.
    pub fn new(top: NodeHandle, base: NodeHandle) -> CommitOptions {
        let info = base.info();
        let backing = BackingRef { filename: info.filename, format: Some(info.driver.into()) };
        CommitOptions {
            top,
            base,
            overlay: None,
            backing,
            on_error: OnError::default(),
            min_rate: FILL_MIN_RATE,
            kept: None,
            on_rebase: None,
            on_exchange: None,
            on_swap: None,
        }
    }
}

fn below(node: &NodeHandle) -> Option<NodeHandle> {
    node.backing().and_then(BackingSlot::node)
}

/// Starts a commit on this thread's reactor (`block-commit`).
pub fn start(jobs: &Jobs, job: JobOptions, mut options: CommitOptions) -> Result<Job, JobError> {
    let kept = options.kept.take();
    let CommitOptions { top, base, overlay, .. } = &options;
    let layers: Vec<_> = std::iter::successors(below(top), below)
        .take(CHAIN_LAYERS_MAX)
        .take_while(|layer| !layer.is_same(base))
        .collect();
    if !layers.last().map_or(below(top), below).is_some_and(|layer| layer.is_same(base)) {
        let why = format!("{} is not below {}", base.info().filename, top.info().filename);
        return Err(JobError::generic(why));
    }
    if !base.limits().writable {
        return Err(JobError::generic(format!(
            "{} is read-only: a commit writes to it",
            base.info().filename
        )));
    }
    let claim = jobs.claim(&job.id, base, std::iter::once(top.clone()).chain(layers.clone()).collect())?;
    let scope = Scope::Above(base.clone());
    let transfer = Transfer::kept(top.clone(), base.clone(), scope, true, kept.as_ref());
    let policy = CopyPolicy {
        on_source_error: options.on_error,
        on_target_error: options.on_error,
        min_rate: options.min_rate,
    };
    let work = Commit {
        copier: Copier::new(transfer.clone(), policy),
        transfer,
        is_active: overlay.is_none(),
        between: !layers.is_empty(),
        watching: None,
        kept,
        options,
        _claim: claim,
    };
    jobs.start(JobType::Commit, job, work)
}

struct Commit {
    transfer: Arc<Transfer>,
    copier: Copier,
    is_active: bool,
    /// Whether layers lie between the top and the base.
    between: bool,
    watching: Option<Watching>,
    kept: Option<KeptCopy>,
    options: CommitOptions,
    _claim: Claim,
}

impl Work for Commit {
    async fn run(&mut self, job: &Job) -> IoResult<()> {
        let (base, len) = (&self.options.base, self.transfer.len);
        if base.len() < len {
            // Before anything of it is needed: a header that names it then never names one that is too short.
            base.resize(&Ctx::FILL, len).await?;
            base.sync(&Ctx::FILL).await?;
        }
        if !self.is_active {
            // Nobody writes to what is committed.
            self.transfer.begin_keeping();
            self.kept.iter_mut().for_each(KeptCopy::take_over);
            return self.copier.run(job, Goal::Empty).await;
        }
        let watcher = Arc::new(Follow { transfer: self.transfer.clone(), marks: true, job: None });
        let held = hold(&self.options.top).await?;
        self.watching = Some(held.watch(watcher));
        self.transfer.begin_keeping();
        self.kept.iter_mut().for_each(KeptCopy::take_over);
        drop(held);
        self.copier.run(job, Goal::Converged).await?;
        job.become_ready();
        self.copier.run(job, Goal::Asked).await
    }

    async fn prepare(&mut self, job: &Job) -> IoResult<()> {
        match self.is_active {
            true => self.finish_active(job).await,
            false => self.finish_below(job).await,
        }
    }

    fn end(&mut self, end: WorkEnd) {
        if let Some(kept) = &mut self.kept {
            kept.end(end, self.watching.take());
        }
    }
}

impl Commit {
    async fn finish_active(&mut self, job: &Job) -> IoResult<()> {
        let held = settle(&mut self.copier, &self.transfer, job).await?;
        job.tell_durable();
        self.copier.take_ignored()?;
        if job.ending() != Some(Ending::Exchange) {
            // From here on changes of the top are not seen.
            self.transfer.end_keeping();
            return Ok(());
        }
        let (top, base) = (&self.options.top, &self.options.base);
        let Some(slot) = top.backing() else { return Err(no_edge(top)) };
        if self.between {
            top.set_backing_ref(&Ctx::GUEST, Some(self.options.backing.clone())).await?;
            slot.replace(Some(base.clone())).await;
            if let Some(on_rebase) = self.options.on_rebase.take() {
                on_rebase().await?;
            }
        } else {
            // What was fetched before does not link any more: the top is to be empty.
            slot.raise().await;
        }
        top.make_empty(&Ctx::GUEST).await?;
        if let Some(on_exchange) = self.options.on_exchange.take() {
            on_exchange(&held).await?;
        }
        self.transfer.end_keeping();
        self.watching = None;
        drop(held);
        Ok(())
    }

    async fn finish_below(&mut self, job: &Job) -> IoResult<()> {
        let base = &self.options.base;
        base.sync(&Ctx::FILL).await?;
        job.tell_durable();
        self.copier.take_ignored()?;
        let Some(overlay) = &self.options.overlay else { return Ok(()) };
        let Some(slot) = overlay.backing() else { return Err(no_edge(overlay)) };
        overlay.set_backing_ref(&Ctx::FILL, Some(self.options.backing.clone())).await?;
        slot.replace(Some(base.clone())).await;
        if let Some(on_swap) = self.options.on_swap.take() {
            on_swap().await;
        }
        Ok(())
    }
}

fn no_edge(node: &NodeHandle) -> IoError {
    IoError::new(ErrorKind::Unsupported, "it has no edge to a backing").in_node(node.info().filename)
}
