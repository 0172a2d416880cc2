//! All jobs of a process.

use std::collections::BTreeMap;
use std::future::Future;

use infill_base::IoResult;
use infill_node::NodeHandle;
use infill_storage::rt;
use infill_storage::sync::{Arc, Mutex, lock};

use crate::error::JobError;
use crate::event::{Broadcast, Events};
use crate::job::{BlockJobInfo, Job, JobInfo, Work};
use crate::kept::KeptJob;
use crate::state::JobType;

/// Jobs at a time, those that wait to be dismissed included.
pub const JOBS_MAX: usize = 4096;

/// Longest id of a job, in bytes.
pub const JOB_ID_BYTES_MAX: usize = 255;

/// What every kind of job takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobOptions {
    /// Its id: a letter, then letters, digits, `-`, `.` and `_`.
    pub id: String,
    /// Whether it makes its last changes by itself.
    pub auto_finalize: bool,
    /// Whether it is forgotten by itself when it is over.
    pub auto_dismiss: bool,
    /// Rate limit in bytes per second; 0 is none.
    pub speed: u64,
}

impl JobOptions {
    /// The defaults of the interface, for a job of that id.
    pub fn new(id: impl Into<String>) -> JobOptions {
        JobOptions { id: id.into(), auto_finalize: true, auto_dismiss: true, speed: 0 }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Shared {
    /// The newest last.
    jobs: Mutex<Vec<Job>>,
    pub(crate) events: Broadcast,
    fills: Mutex<Vec<Filling>>,
    /// How jobs that are about to be started again go on, by id.
    kept: Mutex<BTreeMap<String, KeptJob>>,
}

/// What a job fills, and the layers that it takes out of the chain.
#[derive(Debug)]
struct Filling {
    job: String,
    top: NodeHandle,
    below: Vec<NodeHandle>,
}

impl Filling {
    fn meets(&self, other: &Filling) -> bool {
        let among = |node: &NodeHandle, layers: &[NodeHandle]| layers.iter().any(|layer| layer.is_same(node));
        self.top.is_same(&other.top) || among(&self.top, &other.below) || among(&other.top, &self.below)
    }
}

/// Keeps other jobs off a part of a chain while it lives.
#[derive(Debug)]
pub(crate) struct Claim {
    jobs: Arc<Shared>,
    job: String,
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&self.jobs.fills).retain(|other| other.job != self.job);
    }
}

impl Shared {
    pub(crate) fn remove(&self, job: &Job) {
        lock(&self.jobs).retain(|other| !other.is_same(job));
    }
}

/// All jobs of a process, by id. Cloning shares them.
#[derive(Clone, Debug, Default)]
pub struct Jobs(Arc<Shared>);

impl Jobs {
    /// No jobs.
    pub fn new() -> Jobs {
        Jobs::default()
    }

    /// Everything that happens to any job from now on.
    pub fn subscribe(&self) -> Events {
        self.0.events.subscribe()
    }

    /// Starts a job on this thread's reactor. Events are told from before this returns.
    pub fn start(&self, kind: JobType, options: JobOptions, work: impl Work) -> Result<Job, JobError> {
        if !well_formed(&options.id) {
            let shown: String = options.id.escape_debug().take(JOB_ID_BYTES_MAX).collect();
            return Err(JobError::generic(format!("Invalid job ID '{shown}'")));
        }
        let kept = lock(&self.0.kept).remove(&options.id);
        let kept = kept.unwrap_or_else(|| KeptJob::of(&options));
        let options = JobOptions { speed: kept.speed, ..options };
        let job = self.insert(kind, options, kept)?;
        job.announce();
        rt::spawn(job.clone().live(work));
        Ok(job)
    }

    fn insert(&self, kind: JobType, options: JobOptions, kept: KeptJob) -> Result<Job, JobError> {
        let mut jobs = lock(&self.0.jobs);
        if jobs.iter().any(|job| job.id() == options.id) {
            return Err(JobError::generic(format!("Job ID '{}' already in use", options.id)));
        }
        if jobs.len() >= JOBS_MAX {
            let why = format!("there are {JOBS_MAX} jobs, which is the most: dismiss those that are over");
            return Err(JobError::generic(why));
        }
        let job = Job::new(options, kind, &self.0, kept);
        jobs.push(job.clone());
        Ok(job)
    }

    /// The job of that id, when it is started next, goes on as `kept` says, whatever starts it. `None` takes that back.
    pub fn go_on_as(&self, id: &str, kept: Option<KeptJob>) {
        let mut all = lock(&self.0.kept);
        match kept {
            Some(kept) => all.insert(id.into(), kept),
            None => all.remove(id),
        };
    }

    /// How the job of that id goes on when it is started next, where that was said ([`Jobs::go_on_as`]).
    pub fn goes_on_as(&self, id: &str) -> Option<KeptJob> {
        lock(&self.0.kept).get(id).cloned()
    }

    /// Shows a job of an earlier process that is over and waits to be dismissed. Nothing is told.
    pub fn show_concluded(&self, id: &str, kind: JobType, kept: KeptJob) -> Result<Job, JobError> {
        let options = JobOptions {
            id: id.into(),
            auto_finalize: kept.auto_finalize,
            auto_dismiss: kept.auto_dismiss,
            speed: kept.speed,
        };
        self.insert(kind, options, KeptJob { concluded: true, ..kept })
    }

    /// Keeps other fills off `top` and the layers `below` it that are to go.
    pub(crate) fn claim(
        &self,
        job: &str,
        top: &NodeHandle,
        below: Vec<NodeHandle>,
    ) -> Result<Claim, JobError> {
        let filling = Filling { job: job.into(), top: top.clone(), below };
        let mut fills = lock(&self.0.fills);
        if let Some(other) = fills.iter().find(|other| other.job == job || other.meets(&filling)) {
            return Err(JobError::generic(format!(
                "{} is busy: job '{}' works on this chain; wait for it or cancel it",
                top.info().filename,
                other.job
            )));
        }
        fills.push(filling);
        Ok(Claim { jobs: self.0.clone(), job: job.into() })
    }

    /// Starts a job that is one future (`blockdev-create`).
    pub fn start_future(
        &self,
        kind: JobType,
        options: JobOptions,
        future: impl Future<Output = IoResult<()>> + 'static,
    ) -> Result<Job, JobError> {
        struct Once(std::pin::Pin<Box<dyn Future<Output = IoResult<()>>>>);
        impl Work for Once {
            async fn run(&mut self, job: &Job) -> IoResult<()> {
                job.set_progress(0, 1);
                let outcome = (&mut self.0).await;
                job.set_progress(1, 1);
                outcome
            }
        }
        self.start(kind, options, Once(Box::pin(future)))
    }

    /// The job of that id, for the `job-*` commands.
    pub fn get(&self, id: &str) -> Result<Job, JobError> {
        self.find(id).ok_or_else(|| JobError::generic("Job not found"))
    }

    /// The block job of that id, for the `block-job-*` commands.
    pub fn get_block(&self, id: &str) -> Result<Job, JobError> {
        let job = self.find(id).filter(|job| job.kind().is_block_job());
        job.ok_or_else(|| JobError::not_active(id))
    }

    fn find(&self, id: &str) -> Option<Job> {
        lock(&self.0.jobs).iter().find(|job| job.id() == id).cloned()
    }

    /// All jobs, the newest first.
    pub fn list(&self) -> Vec<Job> {
        lock(&self.0.jobs).iter().rev().cloned().collect()
    }

    /// `query-jobs`.
    pub fn query(&self) -> Vec<JobInfo> {
        self.list().iter().map(Job::info).collect()
    }

    /// `query-block-jobs`.
    pub fn query_block(&self) -> Vec<BlockJobInfo> {
        self.list().iter().filter_map(Job::block_info).collect()
    }

    /// Cancels everything and waits until it is over (`quit`). What cannot be cancelled any more ends as it ends. What
    /// its manager would have to dismiss is dismissed.
    pub async fn shut_down(&self) {
        for job in self.list() {
            // One that is over already refuses, and that is well.
            let _over = job.cancel();
            let _outcome = job.wait().await;
            // One that dismisses itself is gone.
            let _gone = job.dismiss();
        }
    }

    /// Has everything stop so that a later process goes on with it ([`Job::kept`]), and waits until it has. What makes its
    /// last changes already ends as it ends.
    pub async fn suspend(&self) {
        for job in self.list() {
            if job.kind() == JobType::Backup && job.kept().map.is_none() {
                // The moment that it copies does not outlive the process.
                let _over = job.cancel();
                let _outcome = job.wait().await;
                continue;
            }
            job.suspend().await;
        }
    }
}

fn well_formed(id: &str) -> bool {
    id.len() <= JOB_ID_BYTES_MAX
        && id.starts_with(|first: char| first.is_ascii_alphabetic())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}
