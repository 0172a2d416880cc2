//! The stream job in a world of virtual time.

mod world;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use infill_base::{Ctx, ErrorKind, WriteFlags, ZeroFlags};
use infill_job::stream::{StreamBase, StreamOptions, start};
use infill_job::{ErrorAction, IoStatus, Job, JobEvent, JobOptions, JobStatus, Jobs, OnError, Operation};
use infill_node::{BackingRef, CopyOnRead, MemoryOverlay, NodeHandle};
use infill_sim::{World, block_on};
use infill_storage::rt;
use world::{KIB, Link, MIB, Overlay, Shared, Step, content, drain, pattern, states};

const MS: Duration = Duration::from_millis(1);

struct Scene {
    link: Arc<Link>,
    overlay: Arc<Overlay>,
    top: NodeHandle,
    jobs: Jobs,
}

impl Scene {
    fn new(len: u64, unit: u64, round_trip: Duration, rate: u64) -> Scene {
        let link = Link::new(pattern(len), round_trip, rate);
        let overlay = Overlay::new(len, unit, &link.node());
        let top = NodeHandle::new(Shared(overlay.clone()));
        Scene { link, overlay, top, jobs: Jobs::new() }
    }

    fn start(&self, change: impl FnOnce(&mut JobOptions, &mut StreamOptions)) -> Job {
        let (mut job, mut stream) = (JobOptions::new("fill"), StreamOptions::new(self.top.clone()));
        change(&mut job, &mut stream);
        start(&self.jobs, job, stream).unwrap()
    }
}

#[test]
fn completion_is_told_after_sync_header_and_swap_and_in_the_order_of_the_interface() {
    block_on(async {
        let scene = Scene::new(4 * MIB, 64 * KIB, MS, 100 * MIB);
        let events = scene.jobs.subscribe();
        let (top, overlay) = (scene.top.clone(), scene.overlay.clone());
        let job = scene.start(|_, stream| {
            stream.on_swap = Some(Box::new(move |base| {
                assert!(base.is_none());
                assert!(!top.backing().unwrap().is_some(), "the edge is swapped before it is told");
                assert_eq!(overlay.log().last(), Some(&Step::Header(None)));
                Box::pin(async {})
            }));
        });
        job.wait().await.unwrap();
        let log = scene.overlay.log();
        let last_populate = log.iter().rposition(|step| matches!(step, Step::Populate(..))).unwrap();
        assert_eq!(log[last_populate + 1..], [Step::Sync, Step::Header(None)]);
        let told = drain(&events);
        assert_eq!(states(&told), ["created", "running", "waiting", "pending", "concluded", "null"]);
        let at = |what: &dyn Fn(&JobEvent) -> bool| told.iter().position(what).unwrap();
        let durable = at(&|event| matches!(event, JobEvent::Durable { .. }));
        let completed = at(&|event| match event {
            JobEvent::BlockJobCompleted { progress, error } => {
                assert_eq!((progress.offset, progress.len), (4 * MIB, 4 * MIB));
                error.is_none()
            }
            _ => false,
        });
        let concluded =
            at(&|event| matches!(event, JobEvent::StatusChange { status: JobStatus::Concluded, .. }));
        assert!(durable < completed && completed < concluded);
        assert!(scene.jobs.query().is_empty());
        assert_eq!(content(&scene.top).await, pattern(4 * MIB));
    });
}

/// Guests write, zero and read at random while the fill runs, with copy-on-read; every byte is checked with a model.
fn guests_and_fill(seed: u64, unit: u64) {
    let world = World::new(seed);
    let mut rng = world.fork_rng();
    world.run(async {
        let len = 2 * MIB;
        let scene = Scene::new(len, unit, 2 * MS, 20 * MIB);
        let policy = CopyOnRead::new(&scene.top, MIB);
        scene.top.backing().unwrap().set_copy_on_read(Some(policy));
        let mut model = pattern(len);
        let job = scene.start(|job, _| job.speed = 2 * MIB);
        let mut steps = 0;
        while job.status() != JobStatus::Null {
            steps += 1;
            let at = rng.below(len - 1);
            let size = rng.range(1, (40 * KIB).min(len - at) + 1);
            let range = at as usize..(at + size) as usize;
            match rng.below(4) {
                0 => {
                    scene.top.write_zeroes(&Ctx::GUEST, at, size, ZeroFlags::empty()).await.unwrap();
                    model[range].fill(0);
                }
                1 => {
                    let mut data = vec![0; size as usize];
                    rng.fill(&mut data);
                    model[range].copy_from_slice(&data);
                    scene.top.write(&Ctx::GUEST, at, data, WriteFlags::empty()).await.unwrap();
                }
                2 => {
                    let read = scene.top.read_vec(&Ctx::GUEST, at, size as usize).await.unwrap();
                    assert_eq!(read[..], model[range], "seed {seed}, read at {at}");
                }
                _ => match rng.below(40) {
                    0 => {
                        scene.top.backing().unwrap().raise().await;
                    }
                    1 => {
                        if job.pause().is_ok() {
                            rt::sleep(3 * MS).await;
                            job.resume().unwrap();
                        }
                    }
                    _ => rt::sleep(MS).await,
                },
            }
        }
        job.wait().await.unwrap();
        assert!(!scene.top.backing().unwrap().is_some());
        assert!(content(&scene.top).await == model, "seed {seed}");
        assert!(steps > 20, "seed {seed}: the guest met the fill {steps} times");
    });
}

#[test]
fn guest_writes_win_over_the_fill() {
    for seed in 0..12 {
        guests_and_fill(seed, [512, 4 * KIB, 64 * KIB][seed as usize % 3]);
    }
}

#[test]
fn a_distant_source_is_filled_from_at_its_rate() {
    block_on(async {
        // One request at a time of 512 KiB would take 2.6 s for the round trips alone.
        let scene = Scene::new(64 * MIB, 64 * KIB, 20 * MS, 400 * MIB);
        let start = rt::now();
        scene.start(|_, _| {}).wait().await.unwrap();
        let took = rt::now() - start;
        assert!(took < 450 * MS, "{took:?} for what the link brings in 160 ms");
        assert!(scene.link.in_flight_max.load(Ordering::Relaxed) > 4);
        assert_eq!(scene.link.bytes_read.load(Ordering::Relaxed), 64 * MIB);
    });
}

#[test]
fn a_static_speed_is_kept_exactly() {
    block_on(async {
        for (speed, len) in [(MIB, 4 * MIB), (10 * MIB, 20 * MIB), (16 * KIB, 64 * KIB)] {
            let scene = Scene::new(len, 64 * KIB, MS, 1000 * MIB);
            let start = rt::now();
            scene.start(|job, _| job.speed = speed).wait().await.unwrap();
            let (took, even) = ((rt::now() - start).as_secs_f64(), len as f64 / speed as f64);
            assert!(took > even - 0.3 && took < even + 0.3, "{took} s where {even} s are even");
            assert!(took > even * 0.93, "{took} s where {even} s are even");
        }
    });
}

#[test]
fn a_speed_that_is_changed_counts_at_once() {
    block_on(async {
        let scene = Scene::new(8 * MIB, 64 * KIB, MS, 1000 * MIB);
        let job = scene.start(|job, _| job.speed = MIB);
        rt::sleep(2000 * MS).await;
        let offset = job.info().current_progress;
        assert!((MIB * 17 / 10..=MIB * 22 / 10).contains(&offset), "{offset}");
        job.set_speed(0).unwrap();
        let start = rt::now();
        job.wait().await.unwrap();
        assert!(rt::now() - start < 200 * MS);
    });
}

#[test]
fn what_reads_as_zero_below_costs_no_byte_and_stays_absent() {
    block_on(async {
        let mut bytes = vec![0; (16 * MIB) as usize];
        bytes[MIB as usize..2 * MIB as usize].fill(9);
        let link = Link::new(bytes.clone(), MS, 100 * MIB);
        let overlay = Overlay::new(16 * MIB, 64 * KIB, &link.node());
        let top = NodeHandle::new(Shared(overlay));
        let jobs = Jobs::new();
        let job = start(&jobs, JobOptions::new("a"), StreamOptions::new(top.clone())).unwrap();
        job.wait().await.unwrap();
        assert_eq!(link.bytes_read.load(Ordering::Relaxed), MIB);
        assert_eq!(job.info().current_progress, 16 * MIB);
        assert!(content(&top).await == bytes);
    });
}

#[test]
fn pause_is_prompt_though_the_source_hangs_and_nothing_is_in_flight_while_paused() {
    block_on(async {
        let scene = Scene::new(16 * MIB, 64 * KIB, 5 * MS, 10 * MIB);
        let job = scene.start(|_, _| {});
        rt::sleep(300 * MS).await;
        scene.link.hangs.store(true, Ordering::Relaxed);
        rt::sleep(500 * MS).await;
        job.pause().unwrap();
        assert!(job.pause().is_err(), "paused already");
        rt::sleep(MS).await;
        assert_eq!(job.status(), JobStatus::Paused);
        assert_eq!(scene.link.in_flight.load(Ordering::Relaxed), 0);
        scene.link.hangs.store(false, Ordering::Relaxed);
        let offset = job.info().current_progress;
        rt::sleep(1000 * MS).await;
        assert_eq!(job.info().current_progress, offset);
        job.resume().unwrap();
        assert!(job.resume().is_err(), "not paused");
        job.wait().await.unwrap();
        assert!(content(&scene.top).await == pattern(16 * MIB));
    });
}

#[test]
fn a_job_cancelled_at_any_moment_ends_at_once_and_a_new_one_finishes_the_work() {
    for step in 0..40 {
        block_on(async {
            let scene = Scene::new(2 * MIB, 64 * KIB, 3 * MS, 20 * MIB);
            let events = scene.jobs.subscribe();
            let job = scene.start(|_, _| {});
            rt::sleep(Duration::from_micros(step * 3700)).await;
            let cancelled = job.cancel().is_ok();
            let asked = rt::now();
            let outcome = job.wait().await;
            assert!(rt::now() - asked < 10 * MS, "step {step}");
            let told = drain(&events);
            let ended_cancelled = told.iter().any(|event| matches!(event, JobEvent::BlockJobCancelled(_)));
            let completed = told.iter().any(|event| matches!(event, JobEvent::BlockJobCompleted { .. }));
            assert_ne!(ended_cancelled, completed, "step {step}");
            assert_eq!(outcome.is_err(), ended_cancelled, "step {step}");
            assert!(cancelled || completed, "step {step}");
            if ended_cancelled {
                assert!(states(&told).ends_with(&["aborting", "concluded", "null"]));
                let populated = scene.overlay.log().len();
                rt::sleep(50 * MS).await;
                assert_eq!(scene.overlay.log().len(), populated, "it has stopped writing");
                assert!(scene.top.backing().unwrap().is_some());
                scene.start(|_, _| {}).wait().await.unwrap();
                assert_eq!(scene.overlay.log().last(), Some(&Step::Header(None)));
            }
            assert!(content(&scene.top).await == pattern(2 * MIB));
        });
    }
}

#[test]
fn a_job_paused_at_any_moment_goes_on() {
    for step in 0..40 {
        block_on(async {
            let scene = Scene::new(2 * MIB, 64 * KIB, 3 * MS, 20 * MIB);
            let job = scene.start(|_, _| {});
            rt::sleep(Duration::from_micros(step * 3700)).await;
            if job.pause().is_ok() {
                rt::sleep(10 * MS).await;
                let status = job.status();
                assert!(matches!(status, JobStatus::Paused | JobStatus::Null), "step {step}: {status:?}");
                let _over = job.resume();
            }
            job.wait().await.unwrap();
            assert!(content(&scene.top).await == pattern(2 * MIB));
        });
    }
}

#[test]
fn a_restart_skips_what_is_there() {
    block_on(async {
        let scene = Scene::new(4 * MIB, 64 * KIB, MS, 20 * MIB);
        let job = scene.start(|_, _| {});
        rt::sleep(100 * MS).await;
        job.cancel().unwrap();
        assert!(job.wait().await.is_err());
        let before = scene.overlay.log().len();
        assert!(before > 4);
        scene.start(|_, _| {}).wait().await.unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for step in scene.overlay.log() {
            if let Step::Populate(at, _) = step {
                assert!(seen.insert(at), "populated twice: {at}");
            }
        }
    });
}

#[test]
fn a_full_disk_stops_the_job_with_the_reason_and_resume_continues() {
    block_on(async {
        let scene = Scene::new(4 * MIB, 64 * KIB, MS, 50 * MIB);
        scene.overlay.space.store(10, Ordering::Relaxed);
        let events = scene.jobs.subscribe();
        let job = scene.start(|_, stream| stream.on_error = OnError::Enospc);
        rt::sleep(1000 * MS).await;
        assert_eq!(job.status(), JobStatus::Paused);
        let info = job.block_info().unwrap();
        assert_eq!((info.io_status, info.paused, info.busy), (IoStatus::NoSpace, true, false));
        assert!(info.waiting_for.unwrap().contains("the disk is full"));
        let errors: Vec<_> = drain(&events)
            .into_iter()
            .filter_map(|event| match event {
                JobEvent::BlockJobError { operation, action, .. } => Some((operation, action)),
                _ => None,
            })
            .collect();
        assert_eq!(errors, [(Operation::Write, ErrorAction::Stop)], "told once");
        // A guest still reads everything.
        let read = scene.top.read_vec(&Ctx::GUEST, 3 * MIB, 4096).await.unwrap();
        assert_eq!(read[..], pattern(4 * MIB)[3 * MIB as usize..][..4096]);
        scene.overlay.space.store(u64::MAX, Ordering::Relaxed);
        job.resume().unwrap();
        job.wait().await.unwrap();
        assert_eq!(job.block_info().unwrap().io_status, IoStatus::Ok);
        assert!(content(&scene.top).await == pattern(4 * MIB));
    });
}

#[test]
fn by_default_an_error_ends_the_job_and_the_backing_stays() {
    block_on(async {
        for operation in [Operation::Read, Operation::Write] {
            let scene = Scene::new(4 * MIB, 64 * KIB, MS, 50 * MIB);
            if operation == Operation::Write {
                scene.overlay.space.store(10, Ordering::Relaxed);
            } else {
                scene.link.errors.lock().unwrap().extend([ErrorKind::Io; 400]);
            }
            let events = scene.jobs.subscribe();
            let job = scene.start(|_, _| {});
            assert!(job.wait().await.is_err());
            let told = drain(&events);
            let reported = told.iter().any(|event| {
                matches!(event, JobEvent::BlockJobError { operation: told, action: ErrorAction::Report, .. }
                    if *told == operation)
            });
            assert!(reported);
            let error = |event: &JobEvent| match event {
                JobEvent::BlockJobCompleted { progress, error } => {
                    assert!(progress.offset < progress.len);
                    error.clone()
                }
                _ => None,
            };
            assert!(told.iter().find_map(error).is_some());
            assert!(scene.top.backing().unwrap().is_some());
            assert!(!scene.overlay.log().iter().any(|step| matches!(step, Step::Header(_))));
        }
    });
}

#[test]
fn a_few_failing_reads_are_tried_again() {
    block_on(async {
        let scene = Scene::new(4 * MIB, 64 * KIB, MS, 50 * MIB);
        scene.link.errors.lock().unwrap().extend([ErrorKind::Io; 2]);
        scene.start(|_, _| {}).wait().await.unwrap();
        assert!(content(&scene.top).await == pattern(4 * MIB));
    });
}

#[test]
fn ignored_errors_leave_a_range_out_and_the_job_ends_with_an_error() {
    block_on(async {
        let scene = Scene::new(4 * MIB, 64 * KIB, MS, 50 * MIB);
        scene.link.errors.lock().unwrap().push_back(ErrorKind::Corrupt);
        let events = scene.jobs.subscribe();
        let job = scene.start(|_, stream| stream.on_error = OnError::Ignore);
        assert!(job.wait().await.unwrap_err().contains("a planted error"));
        let ignored =
            |event: &JobEvent| matches!(event, JobEvent::BlockJobError { action: ErrorAction::Ignore, .. });
        assert!(drain(&events).iter().any(ignored));
        assert!(scene.top.backing().unwrap().is_some());
        assert!(scene.overlay.log().len() > 3, "it went on");
        assert!(content(&scene.top).await == pattern(4 * MIB));
    });
}

#[test]
fn a_lost_source_is_waited_for() {
    block_on(async {
        let scene = Scene::new(4 * MIB, 64 * KIB, MS, 20 * MIB);
        let events = scene.jobs.subscribe();
        let job = scene.start(|_, _| {});
        rt::sleep(50 * MS).await;
        scene.link.lost.store(true, Ordering::Relaxed);
        rt::sleep(Duration::from_secs(60)).await;
        assert_eq!(job.status(), JobStatus::Running);
        assert!(job.block_info().unwrap().waiting_for.is_some());
        scene.link.lost.store(false, Ordering::Relaxed);
        job.wait().await.unwrap();
        let told = drain(&events);
        assert_eq!(told.iter().filter(|event| matches!(event, JobEvent::SourceLost { .. })).count(), 1);
        assert_eq!(told.iter().filter(|event| matches!(event, JobEvent::SourceBack { .. })).count(), 1);
        assert!(content(&scene.top).await == pattern(4 * MIB));
    });
}

#[test]
fn a_header_that_cannot_be_written_fails_the_job_and_keeps_the_backing() {
    block_on(async {
        let scene = Scene::new(MIB, 64 * KIB, MS, 100 * MIB);
        scene.overlay.header_fails.store(true, Ordering::Relaxed);
        let events = scene.jobs.subscribe();
        assert!(scene.start(|_, _| {}).wait().await.is_err());
        assert!(states(&drain(&events)).ends_with(&["pending", "aborting", "concluded", "null"]));
        assert!(scene.top.backing().unwrap().is_some());
    });
}

#[test]
fn without_auto_finalize_nothing_is_changed_before_the_manager_says_so() {
    block_on(async {
        let scene = Scene::new(MIB, 64 * KIB, MS, 100 * MIB);
        let events = scene.jobs.subscribe();
        let job = scene.start(|job, _| (job.auto_finalize, job.auto_dismiss) = (false, false));
        rt::sleep(1000 * MS).await;
        assert_eq!(job.status(), JobStatus::Pending);
        assert!(drain(&events).iter().any(|event| matches!(event, JobEvent::BlockJobPending { .. })));
        assert!(scene.top.backing().unwrap().is_some());
        assert!(job.dismiss().is_err() && job.pause().is_err());
        // A range becomes absent below again meanwhile: the job looks again before it drops the backing.
        scene.top.backing().unwrap().raise().await;
        job.finalize().unwrap();
        job.wait().await.unwrap();
        assert_eq!(job.status(), JobStatus::Concluded);
        assert!(!scene.top.backing().unwrap().is_some());
        assert_eq!(scene.jobs.query().len(), 1);
        job.dismiss().unwrap();
        assert!(scene.jobs.query().is_empty());
        assert_eq!(states(&drain(&events)), ["concluded", "null"]);
    });
}

#[test]
fn a_stream_to_a_base_fills_only_what_lies_above_it_and_names_it() {
    block_on(async {
        let len = 2 * MIB;
        let link = Link::new(pattern(len), MS, 100 * MIB);
        let base = link.node();
        let middle = NodeHandle::new(MemoryOverlay::new(MIB, 64 * KIB, Some(base.clone())));
        middle.write(&Ctx::GUEST, 128 * KIB, vec![5; 64 << 10], WriteFlags::empty()).await.unwrap();
        middle.write_zeroes(&Ctx::GUEST, 512 * KIB, 64 * KIB, ZeroFlags::empty()).await.unwrap();
        let overlay = Overlay::new(len, 64 * KIB, &middle);
        let top = NodeHandle::new(Shared(overlay.clone()));
        let before = content(&top).await;
        let read = link.bytes_read.load(Ordering::Relaxed);
        let jobs = Jobs::new();
        let mut options = StreamOptions::new(top.clone());
        options.base = StreamBase::Filename("link".into());
        start(&jobs, JobOptions::new("a"), options).unwrap().wait().await.unwrap();
        assert_eq!(link.bytes_read.load(Ordering::Relaxed), read, "the base was not read");
        assert!(top.backing().unwrap().node().unwrap().is_same(&base));
        let header = BackingRef { filename: "link".into(), format: Some("raw".into()) };
        assert_eq!(overlay.log().last(), Some(&Step::Header(Some(header))));
        assert!(
            content(&top).await == before,
            "zeroes above the base, and behind the middle's end, stay zeroes"
        );
    });
}

#[test]
fn a_base_that_is_not_in_the_chain_is_refused() {
    block_on(async {
        let scene = Scene::new(MIB, 64 * KIB, MS, MIB);
        let stranger = NodeHandle::new(MemoryOverlay::new(MIB, 4096, None));
        for base in [
            StreamBase::Node(stranger.clone()),
            StreamBase::Bottom(stranger),
            StreamBase::Filename("x".into()),
        ] {
            let options = StreamOptions { base, ..StreamOptions::new(scene.top.clone()) };
            assert!(start(&scene.jobs, JobOptions::new("a"), options).is_err());
        }
        assert!(scene.jobs.query().is_empty());
    });
}

#[test]
fn a_pause_while_all_memory_is_in_unfinished_blocks_does_not_end_in_a_deadlock() {
    for step in 1..12 {
        block_on(async {
            let link = Link::sevens(128 * MIB, 60 * MS, 1000 * MIB);
            let overlay = Overlay::new(128 * MIB, 64 * MIB, &link.node());
            let top = NodeHandle::new(Shared(overlay));
            let jobs = Jobs::new();
            let job = start(&jobs, JobOptions::new("a"), StreamOptions::new(top)).unwrap();
            rt::sleep(20 * step * MS).await;
            if job.pause().is_ok() {
                rt::sleep(MS).await;
                let _over = job.resume();
            }
            rt::timeout(Duration::from_secs(60), job.wait()).await.expect("it goes on").unwrap();
        });
    }
}

#[test]
fn streams_that_would_meet_are_refused_and_others_are_not() {
    block_on(async {
        let link = Link::new(pattern(MIB), 50 * MS, 100 * MIB);
        let base = link.node();
        let over = |below: &NodeHandle| NodeHandle::new(Shared(Overlay::new(MIB, 64 * KIB, below)));
        let middle = over(&base);
        let (top, sister) = (over(&middle), over(&middle));
        let jobs = Jobs::new();
        let stream = |id: &str, top: &NodeHandle, base: StreamBase| {
            let options = StreamOptions { base, ..StreamOptions::new(top.clone()) };
            start(&jobs, JobOptions::new(id), options)
        };
        let first = stream("a", &top, StreamBase::None).unwrap();
        assert!(stream("b", &top, StreamBase::None).is_err(), "the same overlay");
        assert!(stream("b", &middle, StreamBase::None).is_err(), "below the first");
        let second = stream("b", &sister, StreamBase::Node(middle.clone())).unwrap();
        first.wait().await.unwrap();
        second.wait().await.unwrap();
        let third = stream("c", &middle, StreamBase::None).unwrap();
        assert!(stream("d", &sister, StreamBase::None).is_err(), "above the third");
        let fourth = stream("d", &sister, StreamBase::Node(middle.clone())).unwrap();
        third.wait().await.unwrap();
        fourth.wait().await.unwrap();
        assert!(content(&sister).await == pattern(MIB));
    });
}

#[test]
fn a_failed_sync_ends_the_job_and_one_without_space_stops_it() {
    block_on(async {
        for kind in [ErrorKind::Io, ErrorKind::NoSpace] {
            let scene = Scene::new(8 * MIB, 64 * KIB, MS, 2 * MIB);
            *scene.overlay.sync_fails.lock().unwrap() = Some(kind);
            let job = scene.start(|_, stream| stream.on_error = OnError::Stop);
            rt::sleep(2000 * MS).await;
            assert!(scene.top.backing().unwrap().is_some());
            if kind == ErrorKind::Io {
                assert!(job.wait().await.unwrap_err().contains("the sync failed"));
                continue;
            }
            assert_eq!(job.status(), JobStatus::Paused);
            *scene.overlay.sync_fails.lock().unwrap() = None;
            job.resume().unwrap();
            job.wait().await.unwrap();
        }
    });
}

#[test]
fn progress_is_told_once_a_second_and_what_is_durable_follows() {
    block_on(async {
        let scene = Scene::new(16 * MIB, 64 * KIB, MS, 2 * MIB);
        let events = scene.jobs.subscribe();
        scene.start(|_, _| {}).wait().await.unwrap();
        let told: Vec<_> = drain(&events)
            .into_iter()
            .filter_map(|event| match event {
                JobEvent::Progress { progress, durable, seconds_left } => {
                    Some((progress.offset, durable, seconds_left))
                }
                _ => None,
            })
            .collect();
        assert!((6..=9).contains(&told.len()), "{told:?}");
        assert!(told.is_sorted());
        assert!(
            told.iter().all(|(offset, durable, _)| durable <= offset && offset - durable < 5 * MIB),
            "{told:?}"
        );
        assert!(told.last().unwrap().1 > 0);
        // At a rate that does not change the end is foreseen to the second.
        let (offset, _, left) = told[told.len() - 2];
        let left = left.expect("it is known by then");
        assert!(left.abs_diff((16 * MIB - offset).div_ceil(2 * MIB)) <= 1, "{told:?}");
    });
}
