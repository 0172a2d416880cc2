//! Jobs as the protocol tells them, and `block-stream`.

use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::LocalBoxFuture;
use infill_job::stream::{FILL_MIN_RATE, StreamBase, StreamOptions};
use infill_job::{BlockJobInfo, BlockJobProgress, JobError, JobEvent, JobInfo, JobOptions, OnError, stream};
use infill_node::NodeHandle;
use infill_qmp::command::{self, BlockStream, JobCommand, StreamEnd};
use infill_qmp::{ErrorClass, QmpError};
use infill_storage::rt;
use serde_json::{Map, Value, json};

use super::control::{Control, refused};
use super::copy::SharedBase;
use crate::blockdev::{Access, Blockdevs};

/// A job's refusal as a command's.
pub(super) fn job_refused(error: JobError) -> QmpError {
    let class = match error.class {
        infill_job::ErrorClass::GenericError => ErrorClass::GenericError,
        infill_job::ErrorClass::DeviceNotActive => ErrorClass::DeviceNotActive,
        infill_job::ErrorClass::DeviceNotFound => ErrorClass::DeviceNotFound,
    };
    QmpError::new(class, error.message)
}

fn progress_members(progress: &BlockJobProgress) -> Map<String, Value> {
    let mut out = Map::new();
    out.insert("device".into(), json!(progress.device));
    out.insert("len".into(), json!(progress.len));
    out.insert("offset".into(), json!(progress.offset));
    out.insert("speed".into(), json!(progress.speed));
    out.insert("type".into(), json!(progress.kind.as_str()));
    out
}

/// What is ours of a job's progress: how much of it is durable, how much is left, how much only the source has for
/// certain, and when it will be over.
fn put_outlook(
    out: &mut Map<String, Value>,
    prefix: &str,
    progress: &BlockJobProgress,
    durable: u64,
    seconds_left: Option<u64>,
) {
    let mut put = |key: &str, value: u64| drop(out.insert(format!("{prefix}{key}"), json!(value)));
    put("durable", durable);
    put("remaining", progress.len.saturating_sub(progress.offset));
    put("at-risk", progress.len.saturating_sub(durable));
    if let Some(seconds) = seconds_left {
        put("seconds-left", seconds);
    }
}

/// An event of a job: its name on the wire, and its data.
pub fn event(event: JobEvent) -> (&'static str, Value) {
    match event {
        JobEvent::StatusChange { id, status } => {
            ("JOB_STATUS_CHANGE", json!({ "status": status.as_str(), "id": id }))
        }
        JobEvent::BlockJobCompleted { progress, error } => {
            let mut data = progress_members(&progress);
            if let Some(error) = error {
                data.insert("error".into(), json!(error));
            }
            ("BLOCK_JOB_COMPLETED", Value::Object(data))
        }
        JobEvent::BlockJobCancelled(progress) => {
            ("BLOCK_JOB_CANCELLED", Value::Object(progress_members(&progress)))
        }
        JobEvent::BlockJobReady(progress) => ("BLOCK_JOB_READY", Value::Object(progress_members(&progress))),
        JobEvent::BlockJobPending { kind, id } => {
            ("BLOCK_JOB_PENDING", json!({ "type": kind.as_str(), "id": id }))
        }
        JobEvent::BlockJobError { device, operation, action, reason } => {
            tracing::warn!(job = device, reason, action = action.as_str(), "a job met an I/O error");
            let data =
                json!({ "device": device, "operation": operation.as_str(), "action": action.as_str() });
            ("BLOCK_JOB_ERROR", data)
        }
        JobEvent::Progress { progress, durable, seconds_left } => {
            let mut data = progress_members(&progress);
            put_outlook(&mut data, "", &progress, durable, seconds_left);
            ("__INFILL_JOB_PROGRESS", Value::Object(data))
        }
        JobEvent::Durable { id, bytes } => ("__INFILL_JOB_DURABLE", json!({ "id": id, "bytes": bytes })),
        JobEvent::SourceLost { id, reason } => {
            ("__INFILL_SOURCE_LOST", json!({ "id": id, "reason": reason }))
        }
        JobEvent::SourceBack { id } => ("__INFILL_SOURCE_BACK", json!({ "id": id })),
        other => ("__INFILL_JOB", json!({ "event": format!("{other:?}") })),
    }
}

fn job_info(info: JobInfo) -> Value {
    let mut out = json!({
        "current-progress": info.current_progress,
        "status": info.status.as_str(),
        "total-progress": info.total_progress,
        "type": info.kind.as_str(),
        "id": info.id,
    });
    if let Some(error) = info.error {
        out["error"] = json!(error);
    }
    out
}

fn block_job_info(info: BlockJobInfo) -> Value {
    let mut out = progress_members(&info.progress);
    for (key, value) in [
        ("auto-finalize", info.auto_finalize),
        ("auto-dismiss", info.auto_dismiss),
        ("busy", info.busy),
        ("paused", info.paused),
        ("ready", info.ready),
    ] {
        out.insert(key.into(), json!(value));
    }
    out.insert("io-status".into(), json!(info.io_status.as_str()));
    out.insert("status".into(), json!(info.status.as_str()));
    put_outlook(&mut out, "__infill_", &info.progress, info.durable, info.seconds_left);
    if let Some(synced) = info.actively_synced {
        out.insert("actively-synced".into(), json!(synced));
    }
    for (key, value) in [("error", info.error), ("__infill_waiting_for", info.waiting_for)] {
        if let Some(value) = value {
            out.insert(key.into(), json!(value));
        }
    }
    Value::Object(out)
}

/// A time of the calendar, in seconds since 1970, on the runtime's clock. One that has passed is now.
fn finish_by(seconds: u64) -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    rt::now().saturating_add(Duration::from_secs(seconds).saturating_sub(now))
}

/// The nodes that a stream works on, which nobody may take away: given back when this goes.
pub(super) struct Claims {
    blockdevs: Blockdevs,
    user: String,
    nodes: Vec<String>,
}

impl Claims {
    /// Nothing yet, for the job `id`.
    pub(super) fn new(blockdevs: &Blockdevs, id: &str) -> Claims {
        Claims { blockdevs: blockdevs.clone(), user: format!("job '{id}'"), nodes: Vec::new() }
    }

    pub(super) fn take(&mut self, name: &str, access: Access) -> Result<NodeHandle, QmpError> {
        let node = self.blockdevs.claim(name, &self.user, access).map_err(|error| refused(&error))?;
        self.nodes.push(name.to_owned());
        Ok(node)
    }

    /// Gives everything back but the first node that was taken.
    fn keep_top(&mut self) {
        for name in self.nodes.drain(1.min(self.nodes.len())..) {
            self.blockdevs.release(&name, &self.user);
        }
    }
}

impl Drop for Claims {
    fn drop(&mut self) {
        for name in &self.nodes {
            self.blockdevs.release(name, &self.user);
        }
    }
}

impl Control {
    /// `query-jobs`.
    pub(super) fn query_jobs(&self) -> Value {
        let held = self.state.iter().flat_map(|state| state.held_jobs(false));
        self.jobs().query().into_iter().map(job_info).chain(held).collect()
    }

    /// `query-block-jobs`.
    pub(super) fn query_block_jobs(&self) -> Value {
        let held = self.state.iter().flat_map(|state| state.held_jobs(true));
        self.jobs().query_block().into_iter().map(block_job_info).chain(held).collect()
    }

    /// `job-*`, `block-job-*`.
    pub(super) async fn job_command(
        &self,
        id: &str,
        command: JobCommand,
        block: bool,
    ) -> Result<(), QmpError> {
        let job = if block { self.jobs().get_block(id) } else { self.jobs().get(id) };
        let job = job.map_err(job_refused)?;
        let outcome = match command {
            JobCommand::Cancel { force } if block => job.block_cancel(force),
            JobCommand::Cancel { .. } => job.cancel(),
            JobCommand::Pause => job.pause(),
            JobCommand::Resume => job.resume(),
            JobCommand::SetSpeed(speed) => job.set_speed(speed),
            JobCommand::Complete => job.complete(),
            JobCommand::Dismiss => job.dismiss(),
            JobCommand::Finalize => job.finalize(),
        };
        outcome.map_err(job_refused)?;
        // What it does at once it has done before the answer.
        yield_once().await;
        Ok(())
    }

    /// `block-stream`. Answered once the job runs.
    pub(super) async fn block_stream(self: &Rc<Self>, options: BlockStream) -> Result<(), QmpError> {
        self.not_moving(&options.device)?;
        self.begin_stream(options).await
    }

    /// As [`Control::block_stream`], also of a disk that has come from another host.
    pub(super) async fn begin_stream(self: &Rc<Self>, options: BlockStream) -> Result<(), QmpError> {
        let device = &options.device;
        if self.blockdevs().get(device).is_err() {
            return Err(QmpError::generic(format!("Cannot find device='{device}' nor node-name='{device}'")));
        }
        let chain = self.blockdevs().chain(&self.blockdevs().unfiltered(device));
        let kept = self.kept_layer(&chain, &options.end)?;
        let filled = &chain[..kept.unwrap_or(chain.len())];
        for layer in filled {
            self.not_in_job(layer)?;
        }
        if options.backing_file.is_some() && kept.is_none() {
            return Err(QmpError::generic("backing file specified, but streaming the entire chain"));
        }
        // What lies over it may be read meanwhile, for what is written below shows there already.
        let shared = self.overlay_on(device).map(|above| SharedBase::new(self.blockdevs(), &above, device));
        if shared.is_some() {
            // A layer that only a header named was opened for reading.
            self.blockdevs().make_writable(device).await.map_err(|error| refused(&error))?;
        }
        let mut claims = Claims::new(self.blockdevs(), &options.job_id);
        let top = claims.take(device, Access::Writer)?;
        for layer in filled.iter().skip(1) {
            claims.take(layer, Access::Reader)?;
        }
        let base = match kept {
            Some(kept) => StreamBase::Node(claims.take(&chain[kept], Access::Reader)?),
            None => StreamBase::None,
        };
        let job = JobOptions {
            auto_finalize: options.auto_finalize,
            auto_dismiss: options.auto_dismiss,
            speed: options.speed,
            ..JobOptions::new(options.job_id)
        };
        let control = self.clone();
        let stream = StreamOptions {
            base,
            backing_file: options.backing_file,
            backing_mask_protocol: options.backing_mask_protocol,
            on_error: on_error(options.on_error),
            min_rate: options.min_rate.unwrap_or(FILL_MIN_RATE),
            finish_by: options.finish_by.map(finish_by),
            on_swap: Some(Box::new(move |_| {
                Box::pin(async move {
                    let _shared = shared;
                    follow_swap(control, claims).await;
                })
            })),
            ..StreamOptions::new(top)
        };
        stream::start(self.jobs(), job, stream).map_err(job_refused)?;
        // Its task has its first turn before the answer, as QEMU's has: it is told as running.
        yield_once().await;
        Ok(())
    }

    /// Which layer below the top of a chain has that file name, of its own or in the header above it.
    pub(super) fn backing_of_file(&self, chain: &[String], name: &str) -> Option<usize> {
        let named = |pair: &[String]| {
            let above = self.blockdevs().get(&pair[0]).ok();
            let header = above.and_then(|above| above.info().backing).map(|backing| backing.filename);
            let own = self.blockdevs().get(&pair[1]).ok().map(|below| below.info().filename);
            header.as_deref() == Some(name) || own.as_deref() == Some(name)
        };
        chain.windows(2).position(named).map(|at| at + 1)
    }

    /// Which layer of the chain stays as backing.
    fn kept_layer(&self, chain: &[String], end: &StreamEnd) -> Result<Option<usize>, QmpError> {
        let known = |name: &String| match self.blockdevs().get(name) {
            Ok(_) => Ok(()),
            Err(_) => Err(QmpError::generic(format!("Cannot find device='' nor node-name='{name}'"))),
        };
        let top = &chain[0];
        match end {
            StreamEnd::All => Ok(None),
            StreamEnd::BaseNode(name) => {
                known(name)?;
                let at = chain.iter().skip(1).position(|layer| layer == name);
                let why = || QmpError::generic(format!("Node '{name}' is not a backing image of '{top}'"));
                at.map(|at| Some(at + 1)).ok_or_else(why)
            }
            StreamEnd::Bottom(name) => {
                known(name)?;
                let at = chain.iter().position(|layer| layer == name).ok_or_else(|| {
                    QmpError::generic(format!("Node '{name}' is not in a chain starting from '{top}'"))
                })?;
                Ok((at + 1 < chain.len()).then_some(at + 1))
            }
            StreamEnd::BaseFile(name) => {
                let at = self.backing_of_file(chain, name);
                let why = || QmpError::generic(format!("Can't find '{name}' in the backing chain"));
                at.map(Some).ok_or_else(why)
            }
        }
    }
}

/// The edge is swapped: the graph and what is kept of it follow, and then the top is free for others.
fn follow_swap(control: Rc<Control>, mut claims: Claims) -> LocalBoxFuture<'static, ()> {
    Box::pin(async move {
        claims.keep_top();
        let Some(top) = claims.nodes.first() else { return };
        if let Err(error) = claims.blockdevs.backing_changed(top).await {
            tracing::warn!("after a stream: {error:#}");
        }
        control.note_backing(&control.blockdevs().unfiltered(top));
    })
}

pub(super) const fn on_error(policy: command::OnError) -> OnError {
    match policy {
        command::OnError::Report => OnError::Report,
        command::OnError::Ignore => OnError::Ignore,
        command::OnError::Enospc => OnError::Enospc,
        command::OnError::Stop => OnError::Stop,
        command::OnError::Auto => OnError::Auto,
    }
}

/// Lets every other task of this reactor that is ready have its turn.
pub(super) async fn yield_once() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
