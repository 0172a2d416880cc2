//! What a guest notices of a fill, in a world of virtual time: a link and a disk that serve first in, first out.

mod world;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use infill_base::{Ctx, WriteFlags};
use infill_job::copy::backup::{self, BackupOptions};
use infill_job::copy::mirror::{self, MirrorOptions};
use infill_job::stream::{StreamOptions, start};
use infill_job::{Job, JobOptions, Jobs};
use infill_node::NodeHandle;
use infill_sim::block_on;
use infill_storage::rt;
use world::{KIB, Link, MIB, Overlay, Shared};

const LINK: u64 = 25_000_000;
const TRIP: Duration = Duration::from_micros(400);
const UNIT: u64 = 64 * KIB;
const DISK: u64 = 256 * MIB;

struct Scene {
    link: Arc<Link>,
    overlay: Arc<Overlay>,
    top: NodeHandle,
    jobs: Jobs,
}

fn scene(rate: u64, trip: Duration) -> Scene {
    let link = Link::sevens(DISK, trip, rate);
    let overlay = Overlay::new(DISK, UNIT, &link.node());
    let top = NodeHandle::new(Shared(overlay.clone()));
    Scene { link, overlay, top, jobs: Jobs::new() }
}

impl Scene {
    fn fill(&self) -> Job {
        start(&self.jobs, JobOptions::new("fill"), StreamOptions::new(self.top.clone())).unwrap()
    }
}

/// Durations in ascending order.
struct Latencies(Vec<Duration>);

impl Latencies {
    fn at(&self, per_mille: usize) -> Duration {
        self.0[(self.0.len() - 1) * per_mille / 1000]
    }
}

/// Reads 4 KiB that are still absent, from the end of the disk down, for `span`, waiting `rest` between two.
async fn cold_reads(top: &NodeHandle, span: Duration, rest: Duration) -> Latencies {
    let (end, mut took, mut at) = (rt::now() + span, Vec::new(), DISK);
    while rt::now() < end {
        at -= 16 * KIB;
        let start = rt::now();
        top.read_vec(&Ctx::GUEST, at, 4096).await.unwrap();
        took.push(rt::now() - start);
        rt::sleep(rest).await;
    }
    took.sort_unstable();
    Latencies(took)
}

const SPAN: Duration = Duration::from_secs(4);

#[test]
fn a_guest_in_a_closed_loop_keeps_its_latency_and_the_link_stays_busy() {
    block_on(async {
        let quiet = cold_reads(&scene(LINK, TRIP).top, SPAN, Duration::ZERO).await;
        let scene = scene(LINK, TRIP);
        let _job = scene.fill();
        rt::sleep(Duration::from_secs(1)).await;
        let before = scene.link.bytes_read.load(Ordering::Relaxed);
        let busy = cold_reads(&scene.top, SPAN, Duration::ZERO).await;
        let bytes = scene.link.bytes_read.load(Ordering::Relaxed) - before;
        println!("quiet p50 {:?} p99 {:?} n {}", quiet.at(500), quiet.at(990), quiet.0.len());
        println!(
            "busy p50 {:?} p99 {:?} n {}, link {} %",
            busy.at(500),
            busy.at(990),
            busy.0.len(),
            bytes as f64 / SPAN.as_secs_f64() / LINK as f64 * 100.0
        );
        assert!(busy.at(500) <= 4 * quiet.at(500));
        assert!(busy.at(990) <= 4 * quiet.at(990));
        assert!(busy.0.len() * 10 >= quiet.0.len() * 3);
        assert!(bytes as f64 >= 0.8 * LINK as f64 * SPAN.as_secs_f64());
    });
}

#[test]
fn a_fill_that_begins_beside_a_busy_guest_finds_the_link_all_the_same() {
    block_on(async {
        let quiet = cold_reads(&scene(LINK, TRIP).top, SPAN, Duration::ZERO).await;
        let scene = scene(LINK, TRIP);
        let top = scene.top.clone();
        let guest = rt::detached(async move { cold_reads(&top, 2 * SPAN, Duration::ZERO).await });
        let fill = async {
            rt::sleep(SPAN).await;
            let job = scene.fill();
            rt::sleep(SPAN / 2).await;
            let before = scene.link.bytes_read.load(Ordering::Relaxed);
            rt::sleep(SPAN / 2).await;
            (job, scene.link.bytes_read.load(Ordering::Relaxed) - before)
        };
        let (busy, (_job, bytes)) = futures_util::future::join(guest, fill).await;
        println!("begun beside: p99 {:?} {bytes}", busy.at(990));
        assert!(busy.at(990) <= 4 * quiet.at(990));
        assert!(bytes as f64 >= 0.8 * LINK as f64 * SPAN.as_secs_f64() / 2.0, "{bytes}");
    });
}

#[test]
fn a_distant_server_with_few_threads_is_shared() {
    block_on(async {
        let (trip, span) = (Duration::from_millis(20), Duration::from_millis(800));
        let distant = || {
            let scene = scene(1000 * MIB, trip);
            *scene.link.threads.lock().unwrap() = vec![Duration::ZERO; 16];
            scene
        };
        let quiet = cold_reads(&distant().top, span, Duration::ZERO).await;
        let scene = distant();
        let top = scene.top.clone();
        let guest = rt::detached(async move { cold_reads(&top, span, Duration::ZERO).await });
        let job = scene.fill();
        let busy = guest.await;
        let filled = job.info().current_progress;
        println!(
            "16 threads: quiet p50 {:?}; p50 {:?} p99 {:?}, {} MiB in {span:?}",
            quiet.at(500),
            busy.at(500),
            busy.at(990),
            filled / MIB
        );
        assert!(busy.at(500) <= 2 * quiet.at(500));
        assert!(busy.at(990) <= 4 * quiet.at(990));
        assert!(filled >= 30 * MIB, "{} MiB in {span:?}", filled / MIB);
    });
}

#[test]
fn a_guest_that_reads_ten_times_a_second_does_not_pay_for_a_full_queue() {
    block_on(async {
        let rest = Duration::from_millis(100);
        let quiet = cold_reads(&scene(LINK, TRIP).top, SPAN, rest).await;
        let scene = scene(LINK, TRIP);
        let _job = scene.fill();
        cold_reads(&scene.top, Duration::from_secs(1), rest).await;
        let before = scene.link.bytes_read.load(Ordering::Relaxed);
        let busy = cold_reads(&scene.top, SPAN, rest).await;
        let bytes = scene.link.bytes_read.load(Ordering::Relaxed) - before;
        println!("quiet p99 {:?}, busy p99 {:?}, {bytes}", quiet.at(990), busy.at(990));
        assert!(busy.at(990) <= quiet.at(990) + Duration::from_millis(3));
        assert!(bytes as f64 >= 0.8 * LINK as f64 * SPAN.as_secs_f64(), "{bytes}");
    });
}

/// Writes 4 KiB and flushes, in a closed loop, to the end of the disk.
async fn flushed_writes(top: &NodeHandle, span: Duration) -> Latencies {
    let (end, mut took, mut at) = (rt::now() + span, Vec::new(), DISK);
    while rt::now() < end {
        at -= UNIT;
        let start = rt::now();
        top.write(&Ctx::GUEST, at, vec![1; UNIT as usize], WriteFlags::empty()).await.unwrap();
        top.sync(&Ctx::GUEST).await.unwrap();
        took.push(rt::now() - start);
        rt::sleep(Duration::from_millis(1)).await;
        if at < DISK / 2 {
            at = DISK;
        }
    }
    took.sort_unstable();
    Latencies(took)
}

#[test]
fn a_guest_that_flushes_is_not_held_up_by_the_fill_on_a_slow_disk() {
    block_on(async {
        let slow_disk = || {
            let scene = scene(1000 * MIB, TRIP);
            scene.overlay.disk.lock().unwrap().bytes_per_second = 100 * MIB;
            scene
        };
        let quiet = flushed_writes(&slow_disk().top, SPAN).await;
        let scene = slow_disk();
        let job = scene.fill();
        flushed_writes(&scene.top, Duration::from_secs(1)).await;
        let before = job.info().current_progress;
        let busy = flushed_writes(&scene.top, SPAN).await;
        let rate = (job.info().current_progress - before) as f64 / SPAN.as_secs_f64() / MIB as f64;
        println!(
            "quiet p50 {:?} p99 {:?}, busy p50 {:?} p99 {:?}, fill {rate} MiB/s",
            quiet.at(500),
            quiet.at(990),
            busy.at(500),
            busy.at(990)
        );
        assert!(busy.at(500) <= 2 * quiet.at(500));
        assert!(busy.at(990) <= 3 * quiet.at(990));
        assert!(rate > 0.9, "not below the floor");
    });
}

/// A disk of 40 MiB/s, and another one on the same device.
fn on_one_device() -> (Scene, NodeHandle) {
    let scene = scene(1000 * MIB, TRIP);
    scene.overlay.disk.lock().unwrap().bytes_per_second = 40 * MIB;
    let target = NodeHandle::new(Shared(scene.overlay.beside(DISK)));
    (scene, target)
}

/// What a guest that flushes meets beside a copy of its disk, which goes on at least at its floor: at most so many times what it
/// meets alone.
async fn beside_a_copy(what: &str, times: u32, begin: impl Fn(&Scene, NodeHandle) -> Job) {
    let quiet = flushed_writes(&on_one_device().0.top, SPAN).await;
    let (scene, target) = on_one_device();
    let job = begin(&scene, target);
    flushed_writes(&scene.top, Duration::from_secs(1)).await;
    let before = job.info().current_progress;
    let busy = flushed_writes(&scene.top, SPAN).await;
    let rate = (job.info().current_progress - before) as f64 / SPAN.as_secs_f64() / MIB as f64;
    println!(
        "{what}: quiet p50 {:?} p99 {:?}, busy p50 {:?} p99 {:?}, {rate} MiB/s",
        quiet.at(500),
        quiet.at(990),
        busy.at(500),
        busy.at(990)
    );
    assert!(busy.at(500) <= times * quiet.at(500), "{what}: {:?}", busy.at(500));
    assert!(busy.at(990) <= 3 * times * quiet.at(990), "{what}: {:?}", busy.at(990));
    assert!(rate > 0.9, "{what}: below the floor");
}

#[test]
fn a_guest_that_flushes_is_not_held_up_by_a_copy_on_its_slow_disk() {
    block_on(async {
        beside_a_copy("mirror", 2, |scene, target| {
            let mirror = MirrorOptions::new(scene.top.clone(), target);
            mirror::start(&scene.jobs, JobOptions::new("copy"), mirror).unwrap()
        })
        .await;
        // What is overwritten is copied first, on the same device.
        beside_a_copy("backup", 3, |scene, target| {
            let held = block_on(scene.top.hold_changes());
            let backup = BackupOptions::new(scene.top.clone(), target);
            let prepared = backup::prepare(&scene.jobs, JobOptions::new("copy"), backup, &held).unwrap();
            prepared.start(&scene.jobs).unwrap()
        })
        .await;
    });
}

#[test]
fn a_busy_guest_does_not_starve_the_fill_below_its_floor() {
    block_on(async {
        let scene = scene(1000 * MIB, TRIP);
        scene.overlay.disk.lock().unwrap().bytes_per_second = 40 * MIB;
        let mut options = StreamOptions::new(scene.top.clone());
        options.min_rate = 10 * MIB;
        let job = start(&scene.jobs, JobOptions::new("fill"), options).unwrap();
        flushed_writes(&scene.top, Duration::from_secs(1)).await;
        let before = job.info().current_progress;
        flushed_writes(&scene.top, SPAN).await;
        let rate = (job.info().current_progress - before) as f64 / SPAN.as_secs_f64() / MIB as f64;
        assert!(rate > 9.0, "{rate} MiB/s");
    });
}

#[test]
fn a_deadline_overrides_politeness() {
    block_on(async {
        let scene = scene(1000 * MIB, TRIP);
        scene.overlay.disk.lock().unwrap().bytes_per_second = 100 * MIB;
        let mut options = StreamOptions::new(scene.top.clone());
        options.finish_by = Some(Duration::from_secs(8));
        let job = start(&scene.jobs, JobOptions::new("fill"), options).unwrap();
        flushed_writes(&scene.top, Duration::from_secs(9)).await;
        let progress = job.info();
        assert_eq!(progress.current_progress, progress.total_progress);
    });
}

/// What a guest has written while a slow source answered is not asked for, although it was looked at before.
#[test]
fn what_a_guest_writes_before_a_slow_source_comes_to_it_is_not_fetched() {
    block_on(async {
        let scene = scene(2 * MIB, TRIP);
        let job = scene.fill();
        rt::sleep(Duration::from_secs(3)).await;
        let before = scene.link.bytes_read.load(Ordering::Relaxed);
        for at in (0..DISK).step_by(MIB as usize) {
            scene.top.write(&Ctx::GUEST, at, vec![1; MIB as usize], WriteFlags::empty()).await.unwrap();
        }
        job.wait().await.unwrap();
        let fetched = scene.link.bytes_read.load(Ordering::Relaxed) - before;
        println!("{before} bytes before the guest has written all, {fetched} after");
        assert!(before > 4 * MIB && fetched <= 4 * MIB, "{fetched}");
    });
}
