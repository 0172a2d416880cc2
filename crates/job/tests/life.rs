//! The life of a job, whatever it does.

mod world;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use infill_base::{ErrorKind, IoError, IoResult};
use infill_job::{ErrorClass, Job, JobEvent, JobOptions, JobStatus, JobType, Jobs, Work};
use infill_sim::block_on;
use infill_storage::rt;
use world::{drain, states};

const MS: Duration = Duration::from_millis(1);

/// Works for a while in small steps; gets ready on the way where it is a mirror.
#[derive(Default)]
struct Steps {
    steps: u32,
    ready: bool,
    fails_in_prepare: bool,
    prepared: Rc<Cell<bool>>,
}

impl Work for Steps {
    async fn run(&mut self, job: &Job) -> IoResult<()> {
        for step in 0..self.steps {
            job.pause_point().await?;
            job.set_progress(u64::from(step), u64::from(self.steps));
            rt::sleep(MS).await;
        }
        if self.ready {
            job.become_ready();
            while !job.should_complete() {
                job.pause_point().await?;
                rt::sleep(MS).await;
            }
        }
        Ok(())
    }

    async fn prepare(&mut self, _: &Job) -> IoResult<()> {
        rt::sleep(20 * MS).await;
        self.prepared.set(true);
        if self.fails_in_prepare { Err(IoError::new(ErrorKind::Io, "cannot prepare")) } else { Ok(()) }
    }
}

fn ten_steps() -> Steps {
    Steps { steps: 10, ..Steps::default() }
}

#[test]
fn ids_are_checked_and_taken_once() {
    block_on(async {
        let jobs = Jobs::new();
        for id in ["", "0", "-a", "a b", "a/b", "ä", &"a".repeat(256), "#block1"] {
            assert!(jobs.start(JobType::Stream, JobOptions::new(id), ten_steps()).is_err(), "{id}");
        }
        jobs.start(JobType::Stream, JobOptions::new("a.B-c_9"), ten_steps()).unwrap();
        let twice = jobs.start(JobType::Mirror, JobOptions::new("a.B-c_9"), ten_steps()).unwrap_err();
        assert_eq!(twice.class, ErrorClass::GenericError);
    });
}

#[test]
fn unknown_jobs_have_the_error_class_of_their_command() {
    block_on(async {
        let jobs = Jobs::new();
        assert_eq!(jobs.get("x").unwrap_err().class, ErrorClass::GenericError);
        assert_eq!(jobs.get_block("x").unwrap_err().class, ErrorClass::DeviceNotActive);
        let create = JobOptions { auto_dismiss: false, ..JobOptions::new("create") };
        let job = jobs.start_future(JobType::Create, create, async { Ok(()) }).unwrap();
        assert_eq!(jobs.get_block("create").unwrap_err().class, ErrorClass::DeviceNotActive);
        assert!(job.block_info().is_none());
        let events = jobs.subscribe();
        job.wait().await.unwrap();
        // No block job: no BLOCK_JOB event.
        assert!(drain(&events).iter().all(|event| matches!(event, JobEvent::StatusChange { .. })));
        assert_eq!(jobs.query()[0].status, JobStatus::Concluded);
        assert_eq!((jobs.query()[0].current_progress, jobs.query()[0].total_progress), (1, 1));
    });
}

#[test]
fn a_paused_job_that_is_cancelled_is_resumed_first() {
    block_on(async {
        let jobs = Jobs::new();
        let events = jobs.subscribe();
        let job = jobs.start(JobType::Stream, JobOptions::new("a"), ten_steps()).unwrap();
        rt::sleep(3 * MS).await;
        job.pause().unwrap();
        rt::sleep(3 * MS).await;
        assert_eq!(job.status(), JobStatus::Paused);
        assert!(job.block_cancel(false).is_err(), "paused by its user, and no force");
        job.block_cancel(true).unwrap();
        assert!(job.wait().await.is_err());
        let told = drain(&events);
        let expected = ["created", "running", "paused", "running", "aborting", "concluded", "null"];
        assert_eq!(states(&told), expected);
        assert!(told.iter().any(|event| matches!(event, JobEvent::BlockJobCancelled(_))));
    });
}

#[test]
fn a_job_cancelled_before_it_began_does_not_begin() {
    block_on(async {
        let jobs = Jobs::new();
        let events = jobs.subscribe();
        let job = jobs.start(JobType::Stream, JobOptions::new("a"), ten_steps()).unwrap();
        assert_eq!(job.status(), JobStatus::Created);
        job.cancel().unwrap();
        assert!(job.wait().await.is_err());
        assert_eq!(states(&drain(&events)), ["created", "aborting", "concluded", "null"]);
    });
}

#[test]
fn a_cancel_while_the_last_changes_are_made_comes_too_late() {
    block_on(async {
        let (jobs, prepared) = (Jobs::new(), Rc::new(Cell::new(false)));
        let work = Steps { prepared: prepared.clone(), ..Steps::default() };
        let job = jobs.start(JobType::Stream, JobOptions::new("a"), work).unwrap();
        rt::sleep(10 * MS).await;
        assert_eq!((job.status(), prepared.get()), (JobStatus::Pending, false));
        job.cancel().unwrap();
        job.wait().await.unwrap();
        assert!(prepared.get());
    });
}

#[test]
fn a_cancel_of_a_pending_job_leaves_its_changes_undone() {
    block_on(async {
        let (jobs, prepared) = (Jobs::new(), Rc::new(Cell::new(false)));
        let options = JobOptions { auto_finalize: false, ..JobOptions::new("a") };
        let events = jobs.subscribe();
        let work = Steps { prepared: prepared.clone(), ..Steps::default() };
        let job = jobs.start(JobType::Stream, options, work).unwrap();
        rt::sleep(10 * MS).await;
        job.cancel().unwrap();
        assert!(job.wait().await.is_err());
        assert!(!prepared.get());
        let told = states(&drain(&events)).join(" ");
        assert_eq!(told, "created running waiting pending aborting concluded null");
    });
}

#[test]
fn a_ready_job_completes_when_it_is_cancelled_without_force() {
    block_on(async {
        for force in [false, true] {
            let jobs = Jobs::new();
            let events = jobs.subscribe();
            let work = Steps { ready: true, ..Steps::default() };
            let job = jobs.start(JobType::Mirror, JobOptions::new("a"), work).unwrap();
            assert!(job.complete().is_err(), "not ready yet");
            rt::sleep(5 * MS).await;
            assert_eq!(job.status(), JobStatus::Ready);
            job.pause().unwrap();
            rt::sleep(5 * MS).await;
            assert_eq!(job.status(), JobStatus::Standby);
            job.resume().unwrap();
            rt::sleep(5 * MS).await;
            job.block_cancel(force).unwrap();
            assert_eq!(job.wait().await.is_err(), force);
            let told = drain(&events);
            assert!(told.iter().any(|event| matches!(event, JobEvent::BlockJobReady(_))));
            let cancelled = told.iter().any(|event| matches!(event, JobEvent::BlockJobCancelled(_)));
            assert_eq!(cancelled, force);
        }
    });
}

#[test]
fn a_failure_in_the_last_half_aborts() {
    block_on(async {
        let jobs = Jobs::new();
        let options = JobOptions { auto_dismiss: false, ..JobOptions::new("a") };
        let work = Steps { fails_in_prepare: true, ..Steps::default() };
        let job = jobs.start(JobType::Stream, options, work).unwrap();
        assert_eq!(job.wait().await.unwrap_err(), "cannot prepare");
        assert_eq!(jobs.query()[0].error.as_deref(), Some("cannot prepare"));
        assert!(job.cancel().is_err() && job.pause().is_err() && job.finalize().is_err());
        job.dismiss().unwrap();
        assert!(job.dismiss().is_err());
    });
}

#[test]
fn shutting_down_ends_everything() {
    block_on(async {
        let jobs = Jobs::new();
        for nth in 0..5 {
            let work = Steps { steps: 1_000_000, ..Steps::default() };
            let options = JobOptions { auto_dismiss: nth != 2, ..JobOptions::new(format!("j{nth}")) };
            let job = jobs.start(JobType::Stream, options, work).unwrap();
            if nth == 3 {
                job.pause().unwrap();
            }
        }
        rt::sleep(5 * MS).await;
        let events = jobs.subscribe();
        jobs.shut_down().await;
        assert!(jobs.query().is_empty());
        let is_null = |event: &JobEvent| matches!(event, JobEvent::StatusChange { status, .. } if *status == JobStatus::Null);
        assert_eq!(
            drain(&events).iter().filter(|event| is_null(event)).count(),
            5,
            "the end of each is told"
        );
    });
}

/// Everything that managers see of a job: its states in order, and no word more.
fn suspended_in(
    options: JobOptions,
    before: impl FnOnce(&Job) + 'static,
    at: Duration,
) -> (infill_job::KeptJob, Vec<JobEvent>) {
    block_on(async move {
        let jobs = Jobs::new();
        let job = jobs.start(JobType::Stream, options, ten_steps()).unwrap();
        before(&job);
        rt::sleep(at).await;
        let events = jobs.subscribe();
        jobs.suspend().await;
        (job.kept(), drain(&events))
    })
}

#[test]
fn a_job_that_is_suspended_says_nothing_and_is_neither_cancelled_nor_over() {
    for (paused, at) in [(false, Duration::ZERO), (false, 3 * MS), (true, 3 * MS)] {
        let pause = move |job: &Job| {
            if paused {
                job.pause().unwrap();
            }
        };
        let (kept, told) = suspended_in(JobOptions::new("j"), pause, at);
        assert!(told.is_empty(), "{told:?}");
        assert_eq!((kept.cancelled, kept.concluded, kept.paused, kept.error), (false, false, paused, None));
    }
    // It waits for its manager to finalize it.
    let by_hand = JobOptions { auto_finalize: false, ..JobOptions::new("j") };
    let (kept, told) = suspended_in(by_hand, |_| {}, 15 * MS);
    assert!(told.is_empty() && !kept.concluded && !kept.finalize_asked, "{told:?}");
}

#[test]
fn a_job_that_makes_its_last_changes_is_not_suspended_but_ends() {
    let options = JobOptions { auto_dismiss: false, ..JobOptions::new("j") };
    let (kept, told) = suspended_in(options, |_| {}, 15 * MS);
    assert_eq!((kept.concluded, kept.error), (true, None));
    assert!(told.iter().any(|event| matches!(event, JobEvent::BlockJobCompleted { .. })), "{told:?}");
}

#[test]
fn a_job_goes_on_as_its_manager_had_left_it() {
    block_on(async {
        let jobs = Jobs::new();
        let options = JobOptions { auto_finalize: false, ..JobOptions::new("j") };
        let kept = infill_job::KeptJob {
            paused: true,
            finalize_asked: true,
            speed: 7,
            offset: 3,
            len: 10,
            ..infill_job::KeptJob::of(&options)
        };
        jobs.go_on_as("j", Some(kept.clone()));
        let job = jobs.start(JobType::Stream, options.clone(), ten_steps()).unwrap();
        rt::sleep(50 * MS).await;
        assert_eq!(job.status(), JobStatus::Paused);
        assert_eq!(job.kept(), kept);
        job.resume().unwrap();
        // It was told to finalize before, and is not told again.
        job.wait().await.unwrap();
        // Once: another job of that id begins as any other.
        let again = jobs.start(JobType::Stream, options, ten_steps()).unwrap();
        assert_eq!((again.speed(), again.kept().paused), (0, false));
    });
}

#[test]
fn a_job_of_an_earlier_process_that_is_over_is_shown_until_it_is_dismissed() {
    block_on(async {
        let jobs = Jobs::new();
        let events = jobs.subscribe();
        let options = JobOptions { auto_dismiss: false, ..JobOptions::new("j") };
        let kept = infill_job::KeptJob { offset: 5, len: 10, ..infill_job::KeptJob::of(&options) };
        let job = jobs.show_concluded("j", JobType::Stream, kept.into_cancelled()).unwrap();
        assert!(drain(&events).is_empty());
        let info = job.info();
        assert_eq!((info.status, info.current_progress, info.total_progress), (JobStatus::Concluded, 5, 10));
        assert_eq!(job.wait().await, Err("the job was cancelled".into()));
        assert!(job.cancel().is_err() && job.pause().is_err());
        jobs.suspend().await;
        job.dismiss().unwrap();
        assert!(jobs.list().is_empty());
    });
}
