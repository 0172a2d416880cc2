//! One job: its state, the verbs of its manager, and what its worker needs.

use std::future::Future;

use event_listener::{Event, EventListener};
use infill_base::{ErrorKind, IoError, IoResult};
use infill_storage::rt;
use infill_storage::sync::atomic::{AtomicBool, Ordering};
use infill_storage::sync::{Arc, Mutex, MutexGuard, Weak, lock};
use serde::{Deserialize, Serialize};

use crate::copy::mirror::CopyMode;
use crate::error::JobError;
use crate::event::{BlockJobProgress, JobEvent};
use crate::forecast::Forecast;
use crate::group::Group;
use crate::kept::{KeptJob, MapName};
use crate::manager::{JobOptions, Shared};
use crate::state::{ErrorAction, IoStatus, JobStatus, JobType, JobVerb, OnError, Operation};

/// What a job does, in the two halves between which a manager may hold it (`auto-finalize`).
pub trait Work: 'static {
    /// The long half. Calls [`Job::pause_point`] whenever [`Job::should_stop`], and returns soon after that failed.
    fn run(&mut self, job: &Job) -> impl Future<Output = IoResult<()>>;

    /// The short half: changes that others see. Not cancelled any more. Returns when they are durable.
    fn prepare(&mut self, job: &Job) -> impl Future<Output = IoResult<()>> {
        let _ = job;
        async { Ok(()) }
    }

    /// It has returned, and is about to be dropped.
    fn end(&mut self, end: WorkEnd) {
        let _ = end;
    }
}

/// What becomes of a job whose worker has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkEnd {
    /// It has done what it was for.
    Succeeded,
    /// It has failed, or was cancelled.
    Failed,
    /// It goes on in a later process.
    GoesOn,
}

/// How a job that was *ready* ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// The target takes the source's place (`block-job-complete`).
    Exchange,
    /// Everything stays where it is; the target is the disk as of now (`block-job-cancel` without `force`).
    Stay,
}

/// What `query-jobs` tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobInfo {
    /// The job.
    pub id: String,
    /// What it does.
    pub kind: JobType,
    /// Its state.
    pub status: JobStatus,
    /// Progress now.
    pub current_progress: u64,
    /// Progress at the end, as far as known.
    pub total_progress: u64,
    /// Why it failed, if it did.
    pub error: Option<String>,
}

/// What `query-block-jobs` tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockJobInfo {
    /// What [`JobInfo`] tells as well, and the rate limit.
    pub progress: BlockJobProgress,
    /// Its state.
    pub status: JobStatus,
    /// Whether it may have I/O in flight.
    pub busy: bool,
    /// Whether it is paused or about to be.
    pub paused: bool,
    /// How the last I/O went.
    pub io_status: IoStatus,
    /// Whether it may be completed.
    pub ready: bool,
    /// Whether it finalizes itself.
    pub auto_finalize: bool,
    /// Whether it dismisses itself.
    pub auto_dismiss: bool,
    /// Why it failed, if it did.
    pub error: Option<String>,
    /// Bytes of the progress that are known to be on stable storage (ours: `__infill_durable`).
    pub durable: u64,
    /// Seconds until its end, if it goes on as it did; `None` while that is not known (ours: `__infill_seconds-left`).
    pub seconds_left: Option<u64>,
    /// Of a mirror: whether everything that guests were answered is on the target.
    pub actively_synced: Option<bool>,
    /// Why it does not get on now, where that is known (ours: `__infill_waiting_for`): the error that stopped it, a lost
    /// source.
    pub waiting_for: Option<String>,
}

#[derive(Debug)]
struct State {
    status: JobStatus,
    user_paused: bool,
    cancelled: bool,
    /// Stopped with the process, to go on in the next one: it brings its I/O to rest and tells nothing more.
    suspended: bool,
    /// Its worker has returned.
    over: bool,
    /// From here on it ends as it ends: cancel is taken and changes nothing.
    finalizing: bool,
    finalize_asked: bool,
    complete_asked: Option<Ending>,
    busy: bool,
    speed: u64,
    offset: u64,
    len: u64,
    durable: u64,
    forecast: Forecast,
    io_status: IoStatus,
    error: Option<String>,
    waiting_for: Option<String>,
    /// Those that it completes together with.
    group: Option<Group>,
    /// Whether its copy mode can be changed.
    has_copy_mode: bool,
    /// Its map.
    map: Option<MapName>,
}

impl State {
    /// Seconds until its end, while it runs.
    fn seconds_left(&self) -> Option<u64> {
        let left = self.len.saturating_sub(self.offset);
        self.forecast.seconds(left).filter(|_| self.status == JobStatus::Running)
    }
}

#[derive(Debug)]
pub(crate) struct Inner {
    options: JobOptions,
    kind: JobType,
    jobs: Weak<Shared>,
    state: Mutex<State>,
    changed: Event,
    /// Guests' writes are on the target before they are answered. A flag of its own: every write looks at it.
    write_blocking: AtomicBool,
}

/// A job. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Job(Arc<Inner>);

fn cancelled() -> IoError {
    IoError::new(ErrorKind::ShuttingDown, CANCELLED)
}

fn suspended() -> IoError {
    IoError::new(ErrorKind::ShuttingDown, "the job goes on with the next start")
}

/// What a job that was cancelled says of itself.
pub(crate) const CANCELLED: &str = "the job was cancelled";

impl Job {
    /// A job that has not begun, or goes on as `kept` says.
    pub(crate) fn new(options: JobOptions, kind: JobType, jobs: &Arc<Shared>, kept: KeptJob) -> Job {
        let state = State {
            status: if kept.concluded { JobStatus::Concluded } else { JobStatus::Created },
            user_paused: kept.paused,
            cancelled: kept.cancelled,
            suspended: false,
            over: kept.concluded,
            finalizing: false,
            finalize_asked: kept.finalize_asked,
            complete_asked: kept.ending,
            busy: false,
            speed: options.speed,
            offset: kept.offset,
            len: kept.len,
            durable: 0,
            forecast: Forecast::default(),
            io_status: kept.io_status,
            error: kept.error,
            waiting_for: kept.waiting_for,
            group: None,
            has_copy_mode: false,
            map: kept.map,
        };
        let write_blocking = AtomicBool::new(kept.write_blocking);
        let jobs = Arc::downgrade(jobs);
        Job(Arc::new(Inner {
            options,
            kind,
            jobs,
            state: Mutex::new(state),
            changed: Event::new(),
            write_blocking,
        }))
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.0.options.id
    }

    /// What it does.
    pub fn kind(&self) -> JobType {
        self.0.kind
    }

    /// Its state.
    pub fn status(&self) -> JobStatus {
        self.state().status
    }

    /// Rate limit in bytes per second; 0 is none.
    pub fn speed(&self) -> u64 {
        self.state().speed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0.state)
    }

    fn emit(&self, event: &JobEvent) {
        if let Some(jobs) = self.0.jobs.upgrade() {
            jobs.events.send(event);
        }
    }

    /// Goes to `next` and says so, under the lock, so that events are told in the order of the states.
    fn become_(&self, state: &mut State, next: JobStatus) {
        debug_assert!(state.status.may_become(next), "{:?} to {next:?}", state.status);
        state.status = next;
        self.emit(&JobEvent::StatusChange { id: self.id().into(), status: next });
        self.0.changed.notify(usize::MAX);
    }

    fn go(&self, next: JobStatus) {
        self.become_(&mut self.state(), next);
    }

    pub(crate) fn announce(&self) {
        self.emit(&JobEvent::StatusChange { id: self.id().into(), status: JobStatus::Created });
    }

    fn take_verb(&self, state: &State, verb: JobVerb) -> Result<(), JobError> {
        if state.status.takes(verb) {
            return Ok(());
        }
        Err(JobError::generic(format!(
            "Job '{}' in state '{}' cannot accept command verb '{}'",
            self.id(),
            state.status.as_str(),
            verb.as_str()
        )))
    }

    /// `job-pause`, `block-job-pause`.
    pub fn pause(&self) -> Result<(), JobError> {
        let mut state = self.state();
        self.take_verb(&state, JobVerb::Pause)?;
        if state.user_paused {
            return Err(JobError::generic("Job is already paused"));
        }
        state.user_paused = true;
        self.0.changed.notify(usize::MAX);
        Ok(())
    }

    /// `job-resume`, `block-job-resume`. A job that an error stopped tries again.
    pub fn resume(&self) -> Result<(), JobError> {
        let mut state = self.state();
        self.take_verb(&state, JobVerb::Resume)?;
        if !state.user_paused {
            return Err(JobError::generic("Can't resume a job that was not paused"));
        }
        self.unpause(&mut state);
        Ok(())
    }

    fn unpause(&self, state: &mut State) {
        state.user_paused = false;
        state.io_status = IoStatus::Ok;
        state.waiting_for = None;
        self.0.changed.notify(usize::MAX);
    }

    /// `job-cancel`, and `block-job-cancel` with `force`.
    pub fn cancel(&self) -> Result<(), JobError> {
        let mut state = self.state();
        self.take_verb(&state, JobVerb::Cancel)?;
        if !state.finalizing {
            state.cancelled = true;
            // A paused job is resumed before it aborts.
            self.unpause(&mut state);
        }
        Ok(())
    }

    /// `block-job-cancel`. Without `force` a job that its user has paused refuses, and a ready one completes.
    pub fn block_cancel(&self, force: bool) -> Result<(), JobError> {
        let state = self.state();
        if !force && state.user_paused && state.status.takes(JobVerb::Cancel) {
            let why = format!("The block job for device '{}' is currently paused", self.id());
            return Err(JobError::generic(why));
        }
        if !force && state.status == JobStatus::Ready {
            drop(state);
            return self.end(Ending::Stay);
        }
        drop(state);
        self.cancel()
    }

    /// `job-complete`, `block-job-complete`.
    pub fn complete(&self) -> Result<(), JobError> {
        self.end(Ending::Exchange)
    }

    fn end(&self, ending: Ending) -> Result<(), JobError> {
        let mut state = self.state();
        self.take_verb(&state, JobVerb::Complete)?;
        state.complete_asked.get_or_insert(ending);
        self.0.changed.notify(usize::MAX);
        Ok(())
    }

    /// `job-finalize`, `block-job-finalize`.
    pub fn finalize(&self) -> Result<(), JobError> {
        let mut state = self.state();
        self.take_verb(&state, JobVerb::Finalize)?;
        state.finalize_asked = true;
        self.0.changed.notify(usize::MAX);
        Ok(())
    }

    /// `job-dismiss`, `block-job-dismiss`.
    pub fn dismiss(&self) -> Result<(), JobError> {
        let mut state = self.state();
        self.take_verb(&state, JobVerb::Dismiss)?;
        self.become_(&mut state, JobStatus::Null);
        drop(state);
        self.forget();
        Ok(())
    }

    /// `block-job-set-speed`: bytes per second, 0 for no limit.
    pub fn set_speed(&self, speed: u64) -> Result<(), JobError> {
        let mut state = self.state();
        self.take_verb(&state, JobVerb::SetSpeed)?;
        state.speed = speed;
        self.0.changed.notify(usize::MAX);
        Ok(())
    }

    /// `block-job-change`: the copy mode of a mirror is to be another one; `None` changes nothing.
    pub fn change_copy_mode(&self, mode: Option<CopyMode>) -> Result<(), JobError> {
        let state = self.state();
        self.take_verb(&state, JobVerb::Change)?;
        if !state.has_copy_mode {
            return Err(JobError::generic("Job type does not support change"));
        }
        match (mode, self.is_write_blocking()) {
            (Some(CopyMode::Background), true) => {
                Err(JobError::generic("Change to copy mode 'background' is not implemented"))
            }
            (Some(CopyMode::WriteBlocking), false) => {
                self.0.write_blocking.store(true, Ordering::Release);
                self.0.changed.notify(usize::MAX);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// It is a mirror that begins with that copy mode, unless it goes on with the other one.
    pub(crate) fn set_copy_mode(&self, mode: CopyMode) {
        self.state().has_copy_mode = true;
        self.0.write_blocking.fetch_or(mode == CopyMode::WriteBlocking, Ordering::AcqRel);
    }

    /// What is left to do is in that map from now on.
    pub fn set_map(&self, map: Option<MapName>) {
        self.state().map = map;
    }

    /// Whether guests' writes are on its target before they are answered.
    pub fn is_write_blocking(&self) -> bool {
        self.0.write_blocking.load(Ordering::Acquire)
    }

    fn forget(&self) {
        if let Some(jobs) = self.0.jobs.upgrade() {
            jobs.remove(self);
        }
    }

    pub(crate) fn is_same(&self, other: &Job) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// What `query-jobs` tells of it.
    pub fn info(&self) -> JobInfo {
        let state = self.state();
        JobInfo {
            id: self.id().into(),
            kind: self.0.kind,
            status: state.status,
            current_progress: state.offset,
            total_progress: state.len,
            error: state.error.clone(),
        }
    }

    /// What `query-block-jobs` tells of it; `None` for what is no block job.
    pub fn block_info(&self) -> Option<BlockJobInfo> {
        let state = self.state();
        self.0.kind.is_block_job().then(|| BlockJobInfo {
            progress: self.progress_of(&state),
            status: state.status,
            busy: state.busy,
            paused: state.user_paused,
            io_status: state.io_status,
            ready: matches!(state.status, JobStatus::Ready | JobStatus::Standby),
            auto_finalize: self.0.options.auto_finalize,
            auto_dismiss: self.0.options.auto_dismiss,
            error: state.error.clone(),
            durable: state.durable,
            seconds_left: state.seconds_left(),
            actively_synced: state.has_copy_mode.then(|| {
                self.is_write_blocking() && matches!(state.status, JobStatus::Ready | JobStatus::Standby)
            }),
            waiting_for: state.waiting_for.clone(),
        })
    }

    /// What a later process needs to go on with it, or to show it.
    pub fn kept(&self) -> KeptJob {
        let state = self.state();
        KeptJob {
            paused: state.user_paused,
            cancelled: state.cancelled,
            finalize_asked: state.finalize_asked,
            ending: state.complete_asked,
            concluded: state.status == JobStatus::Concluded,
            auto_finalize: self.0.options.auto_finalize,
            auto_dismiss: self.0.options.auto_dismiss,
            speed: state.speed,
            offset: state.offset,
            len: state.len,
            io_status: state.io_status,
            error: state.error.clone(),
            waiting_for: state.waiting_for.clone(),
            write_blocking: self.is_write_blocking(),
            map: state.map.clone(),
        }
    }

    /// Has it stop where a later process can go on, without a word to anybody; one that makes its last changes ends as
    /// it ends. Completes when its worker has returned.
    pub(crate) async fn suspend(&self) {
        loop {
            let changed = self.0.changed.listen();
            {
                let mut state = self.state();
                if state.over {
                    return;
                }
                if !state.suspended {
                    state.suspended = true;
                    self.0.changed.notify(usize::MAX);
                }
            }
            changed.await;
        }
    }

    fn progress_of(&self, state: &State) -> BlockJobProgress {
        BlockJobProgress {
            kind: self.0.kind,
            device: self.id().into(),
            len: state.len,
            offset: state.offset,
            speed: state.speed,
        }
    }

    /// Completes together with the others of `group`, or not at all. To be called before it has had its first turn.
    pub fn join(&self, group: &Group) {
        group.join(self);
        self.state().group = Some(group.clone());
    }

    /// Waits until it is over (concluded, or gone). `Err` with the reason if it failed or was cancelled.
    pub async fn wait(&self) -> Result<(), String> {
        loop {
            let changed = self.0.changed.listen();
            {
                let state = self.state();
                if matches!(state.status, JobStatus::Concluded | JobStatus::Null) {
                    return state.error.clone().map_or(Ok(()), Err);
                }
            }
            changed.await;
        }
    }

    // ---- for workers ----

    /// Whether the worker is to bring its I/O to rest and call [`Job::pause_point`].
    pub fn should_stop(&self) -> bool {
        let state = self.state();
        !state.finalizing && (state.cancelled || state.suspended || state.user_paused)
    }

    /// Fires at the next change of anything that a manager can change.
    pub fn listen(&self) -> EventListener {
        self.0.changed.listen()
    }

    /// Stays paused as long as that is asked. `Err` when cancelled. Called with no I/O in flight.
    pub async fn pause_point(&self) -> IoResult<()> {
        loop {
            let changed = self.0.changed.listen();
            {
                let mut state = self.state();
                if state.finalizing {
                    return Ok(());
                }
                if state.suspended {
                    return Err(suspended());
                }
                let wants = state.user_paused && !state.cancelled;
                match state.status {
                    JobStatus::Running if wants => {
                        state.busy = false;
                        self.become_(&mut state, JobStatus::Paused);
                    }
                    JobStatus::Ready if wants => {
                        state.busy = false;
                        self.become_(&mut state, JobStatus::Standby);
                    }
                    JobStatus::Paused if !wants => {
                        state.forecast.forget();
                        self.become_(&mut state, JobStatus::Running);
                    }
                    JobStatus::Standby if !wants => self.become_(&mut state, JobStatus::Ready),
                    _ => {}
                }
                if !wants {
                    state.busy = !state.cancelled;
                    return if state.cancelled { Err(cancelled()) } else { Ok(()) };
                }
            }
            changed.await;
        }
    }

    /// Sets progress. What was reached is never taken back.
    pub fn set_progress(&self, offset: u64, len: u64) {
        let mut state = self.state();
        state.len = len;
        state.offset = state.offset.max(offset.min(len));
    }

    /// Notes how much of the progress is on stable storage.
    pub fn set_durable(&self, bytes: u64) {
        let mut state = self.state();
        state.durable = state.durable.max(bytes.min(state.offset));
    }

    /// Tells progress.
    pub fn tell_progress(&self) {
        let mut state = self.state();
        let offset = state.offset;
        state.forecast.look(rt::now(), offset);
        self.emit(&JobEvent::Progress {
            progress: self.progress_of(&state),
            durable: state.durable,
            seconds_left: state.seconds_left(),
        });
    }

    /// Tells that all of the progress is on stable storage.
    pub fn tell_durable(&self) {
        let mut state = self.state();
        state.durable = state.offset;
        self.emit(&JobEvent::Durable { id: self.id().into(), bytes: state.durable });
    }

    /// Tells that the source is lost (with a reason) or back.
    pub fn tell_source(&self, lost: Option<&IoError>) {
        let id = self.id().to_string();
        self.state().waiting_for = lost.map(ToString::to_string);
        self.emit(&match lost {
            Some(error) => JobEvent::SourceLost { id, reason: error.to_string() },
            None => JobEvent::SourceBack { id },
        });
    }

    /// Decides by `policy` about an I/O error, and tells it. [`ErrorAction::Stop`] has asked the job to pause.
    pub fn io_error(&self, policy: OnError, operation: Operation, error: &IoError) -> ErrorAction {
        let no_space = error.kind() == ErrorKind::NoSpace;
        let action = policy.action(no_space);
        let mut state = self.state();
        if action == ErrorAction::Stop {
            state.user_paused = true;
            state.io_status = if no_space { IoStatus::NoSpace } else { IoStatus::Failed };
            state.waiting_for = Some(error.to_string());
        }
        let (device, reason) = (self.id().to_string(), error.to_string());
        self.emit(&JobEvent::BlockJobError { device, operation, action, reason });
        self.0.changed.notify(usize::MAX);
        action
    }

    /// For a job that converges and then runs on (mirror): goes to *ready*, and waits there until it is to complete.
    /// Workers that do something meanwhile use [`Job::should_complete`].
    pub fn become_ready(&self) {
        let mut state = self.state();
        if state.status == JobStatus::Running {
            self.become_(&mut state, JobStatus::Ready);
            self.emit(&JobEvent::BlockJobReady(self.progress_of(&state)));
        }
    }

    /// Whether a ready job was asked to end.
    pub fn should_complete(&self) -> bool {
        self.ending().is_some()
    }

    /// How a ready job was asked to end.
    pub fn ending(&self) -> Option<Ending> {
        self.state().complete_asked
    }

    /// Whether it is to stop for good in this process, cancelled or not, while it still can be.
    pub fn is_cancelled(&self) -> bool {
        let state = self.state();
        (state.cancelled || state.suspended) && !state.finalizing
    }

    // ---- life ----

    /// Runs `work` through the whole life of the job.
    pub(crate) async fn live(self, mut work: impl Work) {
        let outcome = self.work(&mut work).await;
        work.end(match &outcome {
            Ok(()) => WorkEnd::Succeeded,
            Err(_) if self.goes_on_later() => WorkEnd::GoesOn,
            Err(_) => WorkEnd::Failed,
        });
        drop(work);
        self.conclude(outcome);
    }

    async fn work(&self, work: &mut impl Work) -> IoResult<()> {
        // A job that is cancelled before it began does not begin.
        if self.state().cancelled {
            return Err(cancelled());
        }
        if self.state().suspended {
            return Err(suspended());
        }
        self.go(JobStatus::Running);
        self.pause_point().await?;
        work.run(self).await?;
        self.pause_point().await?;
        {
            let mut state = self.state();
            state.busy = false;
            self.become_(&mut state, JobStatus::Waiting);
        }
        let group = self.state().group.clone();
        if let Some(group) = group {
            group.wait(self, || self.check_goes_on()).await?;
        }
        self.go(JobStatus::Pending);
        self.wait_for_finalize().await?;
        work.prepare(self).await
    }

    /// Whether a worker that returns an error does so because a later process goes on with the job.
    pub(crate) fn goes_on_later(&self) -> bool {
        let state = self.state();
        state.suspended && !state.finalizing && !state.cancelled
    }

    /// Whether nobody has asked it to stop for good.
    fn check_goes_on(&self) -> IoResult<()> {
        let state = self.state();
        match (state.cancelled, state.suspended) {
            (true, _) => Err(cancelled()),
            (_, true) => Err(suspended()),
            _ => Ok(()),
        }
    }

    async fn wait_for_finalize(&self) -> IoResult<()> {
        if !self.0.options.auto_finalize && self.0.kind.is_block_job() {
            self.emit(&JobEvent::BlockJobPending { kind: self.0.kind, id: self.id().into() });
        }
        loop {
            let changed = self.0.changed.listen();
            {
                let mut state = self.state();
                if state.cancelled {
                    return Err(cancelled());
                }
                if state.suspended {
                    return Err(suspended());
                }
                if self.0.options.auto_finalize || state.finalize_asked {
                    state.finalizing = true;
                    state.busy = true;
                    return Ok(());
                }
            }
            changed.await;
        }
    }

    fn conclude(&self, outcome: IoResult<()>) {
        let goes_on = outcome.is_err() && self.goes_on_later();
        // Those that a later process goes on with are together again there.
        let group = self.state().group.take().filter(|_| !goes_on);
        if let Some(group) = group {
            group.left(self, outcome.is_ok());
        }
        let mut state = self.state();
        state.busy = false;
        state.over = true;
        if state.suspended && !state.finalizing && outcome.is_err() {
            self.0.changed.notify(usize::MAX);
            return;
        }
        if let Err(error) = &outcome {
            // A job that failed while paused, or was cancelled there, leaves that state first.
            match state.status {
                JobStatus::Paused => self.become_(&mut state, JobStatus::Running),
                JobStatus::Standby => self.become_(&mut state, JobStatus::Ready),
                _ => {}
            }
            state.error = Some(if state.cancelled { CANCELLED.into() } else { error.to_string() });
            self.become_(&mut state, JobStatus::Aborting);
        }
        state.waiting_for = None;
        if self.0.kind.is_block_job() {
            let progress = self.progress_of(&state);
            self.emit(&if state.cancelled && outcome.is_err() {
                JobEvent::BlockJobCancelled(progress)
            } else {
                JobEvent::BlockJobCompleted { progress, error: state.error.clone() }
            });
        }
        self.become_(&mut state, JobStatus::Concluded);
        if self.0.options.auto_dismiss {
            self.become_(&mut state, JobStatus::Null);
            drop(state);
            self.forget();
        }
    }
}
