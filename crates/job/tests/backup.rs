//! The backup job in a world of virtual time, under guests that never stop: the copy is the disk as it was at the beginning.

mod world;

use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use infill_base::{Ctx, ErrorKind, Extents, Gather, IoError, IoResult, Limits, WriteFlags, ZeroFlags};
use infill_job::copy::backup::{BackupBitmap, BackupOptions, BackupSync, BitmapMode, prepare};
use infill_job::copy::fleece::{Past, SnapshotAccessNode};
use infill_job::{Group, Job, JobOptions, JobStatus, Jobs};
use infill_node::{BackingSlot, Bitmap, MemoryOverlay, Node, NodeHandle, NodeInfo, Populated};
use infill_sim::{Rng, World};
use infill_storage::rt;
use world::{KIB, MIB, content, drain, pattern, states};

const MS: Duration = Duration::from_millis(1);
const SECTOR: u64 = 512;
const LEN: u64 = MIB + 1536;

/// A disk in memory whose requests take a while each, before and after they land.
struct Slow {
    inner: MemoryOverlay,
    rng: Mutex<Rng>,
    longest: Duration,
    control: Arc<Controls>,
}

#[derive(Default)]
struct Controls {
    fails: AtomicBool,
    hangs: AtomicBool,
    written: AtomicU64,
    synced: AtomicBool,
}

impl Slow {
    async fn wait(&self) -> IoResult<()> {
        let nanos = self.rng.lock().unwrap().below(self.longest.as_nanos() as u64 + 1);
        rt::sleep(Duration::from_nanos(nanos)).await;
        if self.control.hangs.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        match self.control.fails.load(Ordering::Relaxed) {
            true => Err(IoError::new(ErrorKind::NoSpace, "the disk is full")),
            false => Ok(()),
        }
    }
}

impl Node for Slow {
    fn limits(&self) -> Limits {
        Node::limits(&self.inner)
    }
    fn len(&self) -> u64 {
        Node::len(&self.inner)
    }
    fn info(&self) -> NodeInfo {
        self.inner.info()
    }
    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        self.wait().await?;
        let read = Node::read(&self.inner, cx, at, buf).await;
        self.wait().await?;
        read
    }
    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        self.control.synced.store(false, Ordering::Relaxed);
        self.wait().await?;
        self.control.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        Node::write(&self.inner, cx, at, data, flags).await?;
        self.wait().await
    }
    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.control.synced.store(false, Ordering::Relaxed);
        self.wait().await?;
        Node::write_zeroes(&self.inner, cx, at, len, flags).await
    }
    async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.wait().await?;
        Node::discard(&self.inner, cx, at, len).await
    }
    async fn sync(&self, _: &Ctx) -> IoResult<()> {
        self.wait().await?;
        self.control.synced.store(true, Ordering::Relaxed);
        Ok(())
    }
    async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        let extents = Node::extents(&self.inner, cx, at, len).await;
        self.wait().await?;
        extents
    }
    fn backing(&self) -> Option<&BackingSlot> {
        Node::backing(&self.inner)
    }
    fn populate_unit(&self) -> u64 {
        Node::populate_unit(&self.inner)
    }
    async fn populate(&self, cx: &Ctx, at: u64, data: Bytes, generation: u64) -> IoResult<Populated> {
        Node::populate(&self.inner, cx, at, data, generation).await
    }
}

/// A disk, guests on it, and jobs.
struct Scene<'a> {
    world: &'a World,
    disk: NodeHandle,
    jobs: Jobs,
    guests: Rc<Guests>,
}

#[derive(Default)]
struct Guests {
    writes: Cell<u64>,
    stop: Cell<bool>,
    alive: Cell<u64>,
}

async fn guest(guests: Rc<Guests>, disk: NodeHandle, mut rng: Rng) {
    let cx = Ctx::GUEST;
    while !guests.stop.get() {
        let len = [1, SECTOR, 5000, 20_000][rng.below(4) as usize];
        let at = rng.below(LEN - len + 1);
        match rng.below(6) {
            0 => disk.write_zeroes(&cx, at, len, ZeroFlags::MAY_UNMAP).await.unwrap(),
            1 => disk.discard(&cx, at, len).await.unwrap(),
            2 => rt::sleep(MS.mul_f64(rng.below(1000) as f64 / 200.0)).await,
            _ => {
                let mut data = vec![0; len as usize];
                rng.fill(&mut data);
                disk.write(&cx, at, data, WriteFlags::empty()).await.unwrap();
            }
        }
        guests.writes.set(guests.writes.get() + 1);
    }
    guests.alive.set(guests.alive.get() - 1);
}

async fn until(mut done: impl FnMut() -> bool) {
    while !done() {
        rt::sleep(MS / 10).await;
    }
}

impl Scene<'_> {
    /// A disk over a base, both of which hold something.
    async fn new(world: &World) -> Scene<'_> {
        let base = NodeHandle::new(MemoryOverlay::new(LEN, 4 * KIB, None));
        base.write(&Ctx::GUEST, 0, pattern(LEN / 16 * 8), WriteFlags::empty()).await.unwrap();
        let mut rng = world.fork_rng();
        let unit = [512, 4 * KIB, 64 * KIB][rng.below(3) as usize];
        let mut scene = Scene { world, disk: base.clone(), jobs: Jobs::new(), guests: Rc::default() };
        scene.disk = scene.slow(Some(base), unit, MS / 20).0;
        scene.disk.write(&Ctx::GUEST, 7000, vec![9; 300_000], WriteFlags::empty()).await.unwrap();
        scene
    }

    fn slow(&self, backing: Option<NodeHandle>, unit: u64, longest: Duration) -> (NodeHandle, Arc<Controls>) {
        let (inner, control) = (MemoryOverlay::new(LEN, unit, backing), Arc::<Controls>::default());
        let rng = Mutex::new(self.world.fork_rng());
        (NodeHandle::new(Slow { inner, rng, longest, control: control.clone() }), control)
    }

    fn guests(&self, count: u64) {
        self.guests.alive.set(count);
        for _ in 0..count {
            rt::spawn(guest(self.guests.clone(), self.disk.clone(), self.world.fork_rng()));
        }
    }

    async fn after_writes(&self, count: u64) {
        let more = self.guests.writes.get() + count;
        until(|| self.guests.writes.get() >= more).await;
    }

    async fn stop_guests(&self) {
        self.guests.stop.set(true);
        until(|| self.guests.alive.get() == 0).await;
    }

    /// Starts a backup, and gives the disk as it is then.
    async fn start(
        &self,
        target: &NodeHandle,
        change: impl FnOnce(&mut JobOptions, &mut BackupOptions),
    ) -> (Job, Vec<u8>) {
        let mut job = JobOptions::new("b");
        let mut options = BackupOptions::new(self.disk.clone(), target.clone());
        change(&mut job, &mut options);
        let held = self.disk.hold_changes().await;
        let then = content(&self.disk).await;
        let prepared = prepare(&self.jobs, job, options, &held).unwrap();
        drop(held);
        (prepared.start(&self.jobs).unwrap(), then)
    }
}

fn with_bitmap(options: &mut BackupOptions, bitmap: &Arc<Bitmap>, mode: BitmapMode) {
    options.bitmap = Some(BackupBitmap { bitmap: bitmap.use_changeable().unwrap(), mode });
}

#[test]
fn the_copy_is_the_disk_as_it_was_whatever_guests_write() {
    let changed = Cell::new(0);
    for seed in 0..60 {
        let world = World::new(seed);
        let mut rng = world.fork_rng();
        world.run(async {
            let scene = Scene::new(&world).await;
            scene.guests(4);
            scene.after_writes(rng.below(100)).await;
            let (target, control) = scene.slow(None, 64 * KIB, MS / 4);
            // A target that held something before.
            if rng.below(2) == 0 {
                target.write(&Ctx::GUEST, 0, vec![0xee; LEN as usize], WriteFlags::empty()).await.unwrap();
            }
            let events = scene.jobs.subscribe();
            let speed = [0, 16 * MIB][rng.below(2) as usize];
            let (job, then) = scene.start(&target, |job, _| job.speed = speed).await;
            job.wait().await.unwrap();
            assert!(control.synced.load(Ordering::Relaxed), "seed {seed}: synced before it is completed");
            let copy = content(&target).await;
            let differs = copy.iter().zip(&then).position(|(copy, then)| copy != then);
            assert_eq!(differs, None, "seed {seed}");
            changed.set(changed.get() + u32::from(content(&scene.disk).await != then));
            let expected = ["created", "running", "waiting", "pending", "concluded", "null"];
            assert_eq!(states(&drain(&events)), expected);
            scene.stop_guests().await;
        });
    }
    assert!(changed.get() > 40, "guests wrote while {} of the jobs ran", changed.get());
}

#[test]
fn the_top_layer_alone_is_copied_over_the_same_base() {
    for seed in 0..20 {
        let world = World::new(seed);
        world.run(async {
            let scene = Scene::new(&world).await;
            scene.guests(3);
            let base = scene.disk.backing().unwrap().node().unwrap();
            let (target, _) = scene.slow(Some(base), 4 * KIB, MS / 4);
            let (job, then) = scene.start(&target, |_, options| options.sync = BackupSync::Top).await;
            job.wait().await.unwrap();
            assert!(content(&target).await == then, "seed {seed}");
            scene.stop_guests().await;
        });
    }
}

#[test]
fn a_chain_of_increments_is_the_disk_at_the_last_one_though_some_of_them_fail() {
    for seed in 0..25 {
        let world = World::new(seed);
        let mut rng = world.fork_rng();
        world.run(async {
            let scene = Scene::new(&world).await;
            scene.guests(3);
            let granularity = [512, 4 * KIB, 64 * KIB][rng.below(3) as usize];
            let bitmap = Arc::new(Bitmap::new("b", LEN, granularity).unwrap());
            let (mut chain, _) = scene.slow(None, 4 * KIB, MS / 4);
            let (job, then) = {
                let held = scene.disk.hold_changes().await;
                held.add_bitmap(bitmap.clone()).unwrap();
                let then = content(&scene.disk).await;
                let options = BackupOptions::new(scene.disk.clone(), chain.clone());
                let prepared = prepare(&scene.jobs, JobOptions::new("full"), options, &held).unwrap();
                (prepared.start(&scene.jobs).unwrap(), then)
            };
            job.wait().await.unwrap();
            assert!(content(&chain).await == then, "seed {seed}: the full one");
            for round in 0..5 {
                scene.after_writes(rng.below(30)).await;
                let (mode, ends) = match rng.below(3) {
                    0 => (BitmapMode::Always, rng.below(2)),
                    _ => (BitmapMode::OnSuccess, rng.below(3)),
                };
                let (overlay, control) = scene.slow(Some(chain.clone()), 4 * KIB, MS / 4);
                let (job, then) = scene
                    .start(&overlay, |job, options| {
                        options.sync = BackupSync::Bitmap;
                        with_bitmap(options, &bitmap, mode);
                        job.speed = if ends == 1 { 2 * MIB } else { 0 };
                    })
                    .await;
                if ends == 1 {
                    rt::sleep(MS.mul_f64(rng.below(100) as f64)).await;
                    match rng.below(2) {
                        0 => control.fails.store(true, Ordering::Relaxed),
                        _ => drop(job.cancel()),
                    }
                }
                match job.wait().await {
                    Ok(()) => {
                        assert!(content(&overlay).await == then, "seed {seed}, round {round}");
                        chain = overlay;
                    }
                    // What was copied of an *always* is part of the chain: the rest is in the bitmap.
                    Err(_) if mode == BitmapMode::Always => {
                        control.fails.store(false, Ordering::Relaxed);
                        chain = overlay;
                    }
                    Err(_) => {}
                }
                assert!(!bitmap.is_used(), "seed {seed}, round {round}");
            }
            scene.stop_guests().await;
            let (last, _) = scene.slow(Some(chain), 4 * KIB, MS / 4);
            let (job, then) = scene
                .start(&last, |_, options| {
                    options.sync = BackupSync::Bitmap;
                    with_bitmap(options, &bitmap, BitmapMode::Never);
                })
                .await;
            job.wait().await.unwrap();
            assert!(content(&last).await == then, "seed {seed}");
        });
    }
}

#[test]
fn a_bitmap_that_no_longer_records_is_clean_afterwards_and_one_of_a_failed_job_is_as_it_was() {
    let world = World::new(3);
    world.run(async {
        let scene = Scene::new(&world).await;
        let bitmap = Arc::new(Bitmap::new("b", LEN, 4 * KIB).unwrap());
        scene.disk.hold_changes().await.add_bitmap(bitmap.clone()).unwrap();
        scene.disk.write(&Ctx::GUEST, 0, vec![1; 8192], WriteFlags::empty()).await.unwrap();
        bitmap.set_recording(false);
        let (target, control) = scene.slow(None, 4 * KIB, MS);
        control.fails.store(true, Ordering::Relaxed);
        for succeeds in [false, true] {
            control.fails.store(!succeeds, Ordering::Relaxed);
            let (job, _) = scene
                .start(&target, |_, options| {
                    options.sync = BackupSync::Bitmap;
                    with_bitmap(options, &bitmap, BitmapMode::OnSuccess);
                })
                .await;
            assert_eq!(job.wait().await.is_ok(), succeeds);
            assert_eq!(bitmap.map().dirty_bytes(), if succeeds { 0 } else { 8192 });
        }
        assert_eq!(control.written.load(Ordering::Relaxed), 8192);
    });
}

#[test]
fn a_guest_never_sees_that_the_target_is_full_and_the_job_does() {
    for seed in 0..10 {
        let world = World::new(seed);
        world.run(async {
            let scene = Scene::new(&world).await;
            scene.guests(2);
            let (target, control) = scene.slow(None, 4 * KIB, MS / 4);
            let (job, _) = scene.start(&target, |job, _| job.speed = MIB).await;
            scene.after_writes(10).await;
            control.fails.store(true, Ordering::Relaxed);
            let told = job.wait().await.unwrap_err();
            assert!(told.contains("full"), "{told}");
            scene.after_writes(50).await;
            scene.stop_guests().await;
        });
    }
}

#[test]
fn guests_that_wait_for_a_stalled_target_go_on_when_the_job_is_cancelled() {
    let world = World::new(1);
    world.run(async {
        let scene = Scene::new(&world).await;
        let (target, control) = scene.slow(None, 4 * KIB, MS);
        control.hangs.store(true, Ordering::Relaxed);
        let (job, _) = scene.start(&target, |_, _| {}).await;
        scene.guests(2);
        rt::sleep(1000 * MS).await;
        let stuck = scene.guests.writes.get();
        rt::sleep(1000 * MS).await;
        assert!(scene.guests.writes.get() <= stuck + 1, "both wait");
        job.cancel().unwrap();
        job.wait().await.unwrap_err();
        scene.after_writes(20).await;
        scene.stop_guests().await;
    });
}

#[test]
fn with_nothing_to_copy_only_what_is_overwritten_is_kept_until_the_job_is_cancelled() {
    let world = World::new(8);
    world.run(async {
        let scene = Scene::new(&world).await;
        let (target, control) = scene.slow(None, 4 * KIB, MS);
        let (job, then) = scene.start(&target, |_, options| options.sync = BackupSync::Nothing).await;
        let cx = Ctx::GUEST;
        scene.disk.write(&cx, 10_000, vec![1; 100], WriteFlags::empty()).await.unwrap();
        scene.disk.write(&cx, 10_050, vec![2; 100], WriteFlags::empty()).await.unwrap();
        rt::sleep(3000 * MS).await;
        assert_eq!(job.status(), JobStatus::Running);
        assert_eq!(control.written.load(Ordering::Relaxed), 4096);
        assert_eq!(target.read_vec(&cx, 8192, 4096).await.unwrap()[..], then[8192..12288]);
        job.cancel().unwrap();
        job.wait().await.unwrap_err();
        scene.disk.write(&cx, 50_000, vec![3; 100], WriteFlags::empty()).await.unwrap();
        assert_eq!(control.written.load(Ordering::Relaxed), 4096);
    });
}

#[test]
fn a_disk_as_it_was_reads_the_same_for_ever() {
    for seed in 0..20 {
        let world = World::new(seed);
        let mut rng = world.fork_rng();
        world.run(async {
            let scene = Scene::new(&world).await;
            scene.guests(4);
            scene.after_writes(rng.below(50)).await;
            let (target, control) = scene.slow(None, 64 * KIB, MS / 4);
            let held = scene.disk.hold_changes().await;
            let then = content(&scene.disk).await;
            let past = Past::new(&held, target, None, false, Some(10_000 * MS)).unwrap();
            drop(held);
            let snapshot = NodeHandle::new(SnapshotAccessNode::new(past));
            for _ in 0..30 {
                let len = 1 + rng.below(100_000);
                let at = rng.below(LEN - len);
                let read = snapshot.read_vec(&Ctx::GUEST, at, len as usize).await.unwrap();
                assert!(
                    read[..] == then[at as usize..(at + len) as usize],
                    "seed {seed}, {len} bytes at {at}"
                );
            }
            assert!(content(&snapshot).await == then, "seed {seed}");
            // Without room for old bytes it is lost rather than wrong, and guests go on.
            control.fails.store(true, Ordering::Relaxed);
            let mut lost = false;
            for _ in 0..200 {
                scene.after_writes(5).await;
                match snapshot.read_vec(&Ctx::GUEST, 0, LEN as usize / 2).await {
                    Ok(read) => assert!(!lost && read[..] == then[..LEN as usize / 2], "seed {seed}"),
                    Err(_) => lost = true,
                }
            }
            scene.stop_guests().await;
        });
    }
}

#[test]
fn a_job_of_a_group_waits_for_one_that_has_not_begun_again() {
    for (is_over, succeeded) in [(false, true), (true, true), (true, false)] {
        let world = World::new(4);
        world.run(async {
            let scene = Scene::new(&world).await;
            let group = Group::of_absent(2);
            let held = scene.disk.hold_changes().await;
            let [first, second] = ["a", "b"].map(|id| {
                let (target, _) = scene.slow(None, 4 * KIB, MS / 100);
                let options = BackupOptions::new(scene.disk.clone(), target);
                prepare(&scene.jobs, JobOptions::new(id), options, &held).unwrap()
            });
            drop(held);
            let first = first.start(&scene.jobs).unwrap();
            first.join(&group);
            until(|| first.status() == JobStatus::Waiting).await;
            rt::sleep(5000 * MS).await;
            assert_eq!(first.status(), JobStatus::Waiting, "the other one is not there");
            if is_over {
                drop(second);
                group.absent_is_over(succeeded);
            } else {
                second.start(&scene.jobs).unwrap().join(&group);
            }
            let told = if succeeded { Ok(()) } else { Err("the job was cancelled".into()) };
            assert_eq!(first.wait().await, told);
        });
    }
}

#[test]
fn jobs_of_a_group_complete_together_and_one_that_fails_takes_the_others_along() {
    for fails in [false, true] {
        let world = World::new(4);
        world.run(async {
            let scene = Scene::new(&world).await;
            let (quick, _) = scene.slow(None, 4 * KIB, MS / 100);
            let (slow, control) = scene.slow(None, 4 * KIB, MS);
            let group = Group::new();
            let held = scene.disk.hold_changes().await;
            let prepared = [(&quick, "q", 0), (&slow, "s", 1)].map(|(target, id, speed)| {
                let options = BackupOptions::new(scene.disk.clone(), target.clone());
                let job = JobOptions { speed, ..JobOptions::new(id) };
                prepare(&scene.jobs, job, options, &held).unwrap()
            });
            drop(held);
            let events = scene.jobs.subscribe();
            let jobs = prepared.map(|prepared| prepared.start(&scene.jobs).unwrap());
            jobs.iter().for_each(|job| job.join(&group));
            until(|| jobs[0].status() == JobStatus::Waiting).await;
            rt::sleep(5000 * MS).await;
            assert_eq!(jobs[0].status(), JobStatus::Waiting);
            control.fails.store(fails, Ordering::Relaxed);
            jobs[1].set_speed(0).unwrap();
            let [quick, slow] = [jobs[0].wait().await, jobs[1].wait().await];
            match fails {
                false => assert_eq!((quick, slow), (Ok(()), Ok(()))),
                true => {
                    assert_eq!(quick, Err("the job was cancelled".into()));
                    assert!(slow.unwrap_err().contains("full"));
                }
            }
            // Nobody had made its last changes before both had come so far.
            let told = states(&drain(&events));
            let last_waiting = told.iter().rposition(|state| *state == "waiting");
            let first_pending = told.iter().position(|state| *state == "pending");
            assert!(first_pending.is_none_or(|first| last_waiting < Some(first)), "{told:?}");
        });
    }
}
