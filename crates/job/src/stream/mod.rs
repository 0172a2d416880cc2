//! The stream job: fill an overlay from below in the background, then drop what lies below.
//!
//! Owns the walk, the requests in flight and the end of the job. What never happens: a guest request that waits for
//! the fill's source (populate links by compare, [`infill_node`]); a *completed* that is not durable.
//!
//! # Order of the end (P4)
//! 1. Populates of copy-on-read that were begun on this edge are over.
//! 2. The overlay is synced.
//! 3. Its header names the new backing, or none; synced ([`infill_node::Node::set_backing_ref`]).
//! 4. The edge in the graph is swapped, which waits for local links under the old one.
//! 5. [`StreamOptions::on_swap`] is told, then the event.
//!
//! # Restart
//! *Allocated = done* is read from the image, so a job that is started again skips what is there by extents.
//!
//! # Errors
//! A lost source is waited for. Other read errors are tried again a few times; then, and for write errors at once,
//! `on-error` decides.

mod fill;

use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use infill_base::{Ctx, ErrorKind, IoError, IoResult};
use infill_node::{BackingRef, BackingSlot, NodeHandle};

use crate::error::JobError;
use crate::job::{Job, Work};
use crate::manager::{Claim, JobOptions, Jobs};
use crate::state::{JobType, OnError};

use fill::{Fill, FillPolicy};

/// Layers that are followed below an overlay when a base is looked for.
const CHAIN_LAYERS_MAX: usize = 512;

/// Default of [`StreamOptions::min_rate`].
pub const FILL_MIN_RATE: u64 = 1 << 20;

/// Where a stream ends.
#[derive(Clone, Debug, Default)]
pub enum StreamBase {
    /// Everything below is filled in; no backing stays.
    #[default]
    None,
    /// This node and what lies under it stay (`base-node`).
    Node(NodeHandle),
    /// The node with this file name and what lies under it stay (`base`).
    Filename(String),
    /// This node is the last one that is filled in (`bottom`).
    Bottom(NodeHandle),
}

/// Told once the edge was swapped, with the new backing, for whoever keeps a graph. The job completes when what it gives
/// is done, so that *completed* finds the graph as it is; it is dropped, untold, before a job that failed concludes.
pub type OnSwap = Box<dyn FnOnce(Option<NodeHandle>) -> LocalBoxFuture<'static, ()>>;

/// What a stream takes.
pub struct StreamOptions {
    /// The overlay that is filled.
    pub top: NodeHandle,
    /// Where it ends.
    pub base: StreamBase,
    /// What the overlay's header shall say instead of the base's own file name (`backing-file`).
    pub backing_file: Option<String>,
    /// Whether the header calls the format of a base without a format `raw` (`backing-mask-protocol`).
    pub backing_mask_protocol: bool,
    /// What is done about I/O errors.
    pub on_error: OnError,
    /// Bytes per second below which politeness towards guests does not take it.
    pub min_rate: u64,
    /// When it wants to be done, on the runtime's clock: raises `min_rate` to what that takes.
    pub finish_by: Option<Duration>,
    /// Told once the edge was swapped.
    pub on_swap: Option<OnSwap>,
}

impl StreamOptions {
    /// The defaults, for an overlay.
    pub fn new(top: NodeHandle) -> StreamOptions {
        StreamOptions {
            top,
            base: StreamBase::None,
            backing_file: None,
            backing_mask_protocol: false,
            on_error: OnError::default(),
            min_rate: FILL_MIN_RATE,
            finish_by: None,
            on_swap: None,
        }
    }
}

fn below(node: &NodeHandle) -> Option<NodeHandle> {
    node.backing().and_then(BackingSlot::node)
}

/// The layers from `top` down.
fn chain(top: &NodeHandle) -> impl Iterator<Item = NodeHandle> {
    std::iter::successors(Some(top.clone()), below).take(CHAIN_LAYERS_MAX)
}

/// The last layer that is filled in; `None` where that is everything.
fn bottom_of(options: &StreamOptions) -> Result<Option<NodeHandle>, JobError> {
    let top = &options.top;
    let above = |what: String, is_base: &dyn Fn(&NodeHandle) -> bool| {
        let found = chain(top).find(|layer| below(layer).is_some_and(|node| is_base(&node)));
        found.map(Some).ok_or_else(|| {
            JobError::generic(format!("{what} is not in the backing chain of {}", top.info().filename))
        })
    };
    match &options.base {
        StreamBase::None => Ok(None),
        StreamBase::Node(base) => {
            above(format!("base node {}", base.info().filename), &|node| node.is_same(base))
        }
        StreamBase::Filename(name) => above(format!("base '{name}'"), &|node| node.info().filename == *name),
        StreamBase::Bottom(bottom) => {
            let inside = chain(top).skip(1).any(|layer| layer.is_same(bottom));
            if !inside {
                let name = bottom.info().filename;
                let why = format!("bottom node {name} is not below {}", top.info().filename);
                return Err(JobError::generic(why));
            }
            Ok(below(bottom).is_some().then(|| bottom.clone()))
        }
    }
}

/// Starts a stream on this thread's reactor (`block-stream`).
pub fn start(jobs: &Jobs, job: JobOptions, mut options: StreamOptions) -> Result<Job, JobError> {
    // It is the overlay that is filled, whatever filters it.
    options.top = options.top.unfiltered();
    let bottom = bottom_of(&options)?;
    let name = options.top.info().filename;
    if !options.top.limits().writable {
        return Err(JobError::generic(format!("{name} is read-only: a stream writes into it")));
    }
    if options.backing_file.is_some() && bottom.is_none() {
        let why = "backing-file is given, but no backing stays: leave it out or give a base";
        return Err(JobError::generic(why));
    }
    let StreamOptions {
        top,
        backing_file,
        backing_mask_protocol,
        on_error,
        min_rate,
        finish_by,
        on_swap,
        ..
    } = options;
    let above_base = |layer: &NodeHandle| match &bottom {
        None => true,
        Some(bottom) => !bottom.is_same(&top) && !below(bottom).is_some_and(|base| base.is_same(layer)),
    };
    let layers = chain(&top).skip(1).take_while(above_base).collect();
    let claim = jobs.claim(&job.id, &top, layers)?;
    let policy = FillPolicy { on_error, min_rate, finish_by };
    let fill = Fill::new(top.clone(), bottom.clone(), policy);
    let stream = Stream { top, bottom, backing_file, backing_mask_protocol, on_swap, fill, _claim: claim };
    jobs.start(JobType::Stream, job, stream)
}

struct Stream {
    top: NodeHandle,
    bottom: Option<NodeHandle>,
    backing_file: Option<String>,
    backing_mask_protocol: bool,
    on_swap: Option<OnSwap>,
    fill: Fill,
    _claim: Claim,
}

impl Stream {
    /// What the header is to say of the node that stays.
    fn backing_ref(&self, base: &NodeHandle) -> BackingRef {
        let info = base.info();
        let is_format = matches!(info.driver, "raw" | "qcow2" | "qed");
        let format = if self.backing_mask_protocol && !is_format { "raw" } else { info.driver };
        let filename = self.backing_file.clone().unwrap_or(info.filename);
        BackingRef { filename, format: Some(format.into()) }
    }
}

impl Work for Stream {
    async fn run(&mut self, job: &Job) -> IoResult<()> {
        // Over nothing there is nothing to do, and no progress to tell.
        match self.top.backing().is_some_and(BackingSlot::is_some) {
            true => self.fill.run(job).await,
            false => Ok(()),
        }
    }

    async fn prepare(&mut self, job: &Job) -> IoResult<()> {
        let Some(slot) = self.top.backing().filter(|slot| slot.is_some()) else {
            return self.top.sync(&Ctx::FILL).await;
        };
        // While it waited for its manager something may have become absent again.
        self.fill.catch_up(job).await?;
        if let Some(policy) = slot.copy_on_read() {
            policy.settle().await;
        }
        self.top.sync(&Ctx::FILL).await?;
        job.tell_durable();
        let base = match &self.bottom {
            None => None,
            Some(bottom) => Some(below(bottom).ok_or_else(|| {
                IoError::new(ErrorKind::NotFound, "the base has left the chain while the stream ran")
            })?),
        };
        let header = base.as_ref().map(|base| self.backing_ref(base));
        self.top.set_backing_ref(&Ctx::FILL, header).await?;
        slot.replace(base.clone()).await;
        if let Some(on_swap) = self.on_swap.take() {
            on_swap(base).await;
        }
        Ok(())
    }
}
