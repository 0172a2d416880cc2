//! The mirror job in a world of virtual time, under guests that never stop.

mod world;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use infill_base::{Ctx, ErrorKind, Extents, Gather, IoError, IoResult, Limits, WriteFlags, ZeroFlags};
use infill_job::copy::mirror::{CopyMode, MirrorOptions, MirrorSync, start};
use infill_job::{ErrorAction, Job, JobEvent, JobOptions, JobStatus, Jobs, OnError, Operation};
use infill_node::{BackingSlot, Edge, MemoryOverlay, Node, NodeHandle, NodeInfo, Populated, Through};
use infill_sim::{Rng, World, block_on};
use infill_storage::rt;
use world::{KIB, MIB, content, drain, pattern, states};

const MS: Duration = Duration::from_millis(1);
const SECTOR: u64 = 512;

/// A disk in memory of which every request takes a while of its own, before and after it lands.
struct Jittery {
    inner: MemoryOverlay,
    rng: std::sync::Mutex<Rng>,
    longest: Duration,
    written: AtomicU64,
    fails: AtomicBool,
    synced: AtomicBool,
}

struct Shared(Arc<Jittery>);

impl Jittery {
    fn new(world: &World, len: u64, backing: Option<NodeHandle>, longest: Duration) -> Arc<Jittery> {
        Arc::new(Jittery {
            inner: MemoryOverlay::new(len, 4 * KIB, backing),
            rng: std::sync::Mutex::new(world.fork_rng()),
            longest,
            written: AtomicU64::new(0),
            fails: AtomicBool::new(false),
            synced: AtomicBool::new(false),
        })
    }

    async fn wait(&self) {
        let nanos = self.rng.lock().unwrap().below(self.longest.as_nanos() as u64 + 1);
        rt::sleep(Duration::from_nanos(nanos)).await;
    }

    fn check(&self) -> IoResult<()> {
        match self.fails.load(Ordering::Relaxed) {
            true => Err(IoError::new(ErrorKind::NoSpace, "the disk is full")),
            false => Ok(()),
        }
    }
}

impl Node for Shared {
    fn limits(&self) -> Limits {
        Node::limits(&self.0.inner)
    }
    fn len(&self) -> u64 {
        Node::len(&self.0.inner)
    }
    fn info(&self) -> NodeInfo {
        self.0.inner.info()
    }
    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        self.0.wait().await;
        let read = Node::read(&self.0.inner, cx, at, buf).await;
        self.0.wait().await;
        read
    }
    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        self.0.synced.store(false, Ordering::Relaxed);
        self.0.wait().await;
        self.0.check()?;
        self.0.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        Node::write(&self.0.inner, cx, at, data, flags).await?;
        self.0.wait().await;
        Ok(())
    }
    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.0.synced.store(false, Ordering::Relaxed);
        self.0.wait().await;
        self.0.check()?;
        Node::write_zeroes(&self.0.inner, cx, at, len, flags).await
    }
    async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.0.wait().await;
        Node::discard(&self.0.inner, cx, at, len).await
    }
    async fn sync(&self, _: &Ctx) -> IoResult<()> {
        self.0.wait().await;
        self.0.synced.store(true, Ordering::Relaxed);
        Ok(())
    }
    async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        Node::extents(&self.0.inner, cx, at, len).await
    }
    fn backing(&self) -> Option<&BackingSlot> {
        Node::backing(&self.0.inner)
    }
    fn populate_unit(&self) -> u64 {
        Node::populate_unit(&self.0.inner)
    }
    async fn populate(&self, cx: &Ctx, at: u64, data: Bytes, generation: u64) -> IoResult<Populated> {
        Node::populate(&self.0.inner, cx, at, data, generation).await
    }
}

/// What guests share.
struct Guests {
    edge: Edge,
    model: RefCell<Vec<u8>>,
    stop: Cell<bool>,
    alive: Cell<usize>,
    writes: Cell<u64>,
    /// How long a guest rests at most, once in six requests.
    pause: Duration,
}

/// A guest that owns every `of`th sector: others write into the same blocks, never into its sectors.
async fn guest(guests: Rc<Guests>, mut rng: Rng, own: u64, of: u64) {
    let port = guests.edge.port();
    let sectors = port.len() / SECTOR / of;
    while !guests.stop.get() {
        let at = (rng.below(sectors) * of + own) * SECTOR;
        let range = at as usize..(at + SECTOR) as usize;
        match rng.below(6) {
            0 => {
                port.write_zeroes(&Ctx::GUEST, at, SECTOR, ZeroFlags::MAY_UNMAP).await.unwrap();
                guests.model.borrow_mut()[range].fill(0);
            }
            1 => {
                let read = port.read(&Ctx::GUEST, at, BytesMut::zeroed(SECTOR as usize)).await.unwrap();
                assert!(read[..] == guests.model.borrow()[range], "read at {at}");
            }
            2 => rt::sleep(guests.pause.mul_f64(rng.below(1000) as f64 / 1000.0)).await,
            _ => {
                let mut data = vec![0; SECTOR as usize];
                rng.fill(&mut data);
                port.write(&Ctx::GUEST, at, data.clone().into(), WriteFlags::empty()).await.unwrap();
                guests.model.borrow_mut()[range].copy_from_slice(&data);
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

struct Scene {
    source: Arc<Jittery>,
    target: Arc<Jittery>,
    source_node: NodeHandle,
    target_node: NodeHandle,
    guests: Rc<Guests>,
    jobs: Jobs,
}

impl Scene {
    /// A disk over a base, guests on it, and an empty target.
    async fn new(world: &World, len: u64, count: u64) -> Scene {
        let base = NodeHandle::new(MemoryOverlay::new(len, 4 * KIB, None));
        base.write(&Ctx::GUEST, 0, pattern(len / 2), WriteFlags::empty()).await.unwrap();
        let source = Jittery::new(world, len, Some(base), MS / 20);
        let target = Jittery::new(world, len, None, MS / 4);
        let (source_node, target_node) =
            (NodeHandle::new(Shared(source.clone())), NodeHandle::new(Shared(target.clone())));
        let mut model = pattern(len / 2);
        model.resize(len as usize, 0);
        let guests = Rc::new(Guests {
            edge: Edge::new(source_node.clone()),
            model: RefCell::new(model),
            stop: Cell::new(false),
            alive: Cell::new(count as usize),
            writes: Cell::new(0),
            pause: 20 * MS,
        });
        for own in 0..count {
            rt::spawn(guest(guests.clone(), world.fork_rng(), own, count));
        }
        Scene { source, target, source_node, target_node, guests, jobs: Jobs::new() }
    }

    fn start(&self, change: impl FnOnce(&mut JobOptions, &mut MirrorOptions)) -> Job {
        let mut job = JobOptions::new("copy");
        let mut mirror = MirrorOptions::new(self.source_node.clone(), self.target_node.clone());
        let (edge, target, synced) =
            (self.guests.edge.clone(), self.target_node.clone(), self.target.clone());
        mirror.on_exchange = Some(Box::new(move |_| {
            Box::pin(async move {
                assert!(synced.synced.load(Ordering::Relaxed), "the target is synced before it is used");
                edge.point_at(target);
                Ok(())
            })
        }));
        change(&mut job, &mut mirror);
        start(&self.jobs, job, mirror).unwrap()
    }

    async fn stop_guests(&self) {
        self.guests.stop.set(true);
        until(|| self.guests.alive.get() == 0).await;
    }
}

fn a_disk_that_moves(seed: u64, mode: CopyMode) {
    let world = World::new(seed);
    let mut rng = world.fork_rng();
    world.run(async {
        let scene = Scene::new(&world, MIB, 4).await;
        until(|| scene.guests.writes.get() > rng.below(200)).await;
        let events = scene.jobs.subscribe();
        let job = scene.start(|job, mirror| {
            mirror.copy_mode = mode;
            job.speed = [0, 16 * MIB][rng.below(2) as usize];
        });
        until(|| job.status() == JobStatus::Ready).await;
        let more = scene.guests.writes.get() + rng.below(300);
        until(|| scene.guests.writes.get() >= more).await;
        job.complete().unwrap();
        job.wait().await.unwrap();
        let more = scene.guests.writes.get() + 100;
        until(|| scene.guests.writes.get() >= more).await;
        let before = content(&scene.source_node).await;
        scene.stop_guests().await;
        assert!(content(&scene.target_node).await == *scene.guests.model.borrow(), "seed {seed}");
        assert!(content(&scene.source_node).await == before, "seed {seed}: nobody writes to the source now");
        let told = drain(&events);
        let expected = ["created", "running", "ready", "waiting", "pending", "concluded", "null"];
        assert_eq!(states(&told), expected);
    });
}

#[test]
fn a_disk_moves_under_its_guests_and_no_write_is_lost() {
    for seed in 0..20 {
        a_disk_that_moves(seed, CopyMode::Background);
    }
}

#[test]
fn a_disk_moves_with_every_write_on_both_sides() {
    for seed in 0..20 {
        a_disk_that_moves(seed, CopyMode::WriteBlocking);
    }
}

#[test]
fn guests_write_on_while_a_mirror_waits_to_be_finalized() {
    let world = World::new(11);
    world.run(async {
        let scene = Scene::new(&world, 4 * MIB, 3).await;
        let job = scene.start(|job, mirror| {
            mirror.copy_mode = CopyMode::WriteBlocking;
            job.auto_finalize = false;
        });
        until(|| job.status() == JobStatus::Ready).await;
        job.complete().unwrap();
        until(|| job.status() == JobStatus::Pending).await;
        let more = scene.guests.writes.get() + 200;
        until(|| scene.guests.writes.get() >= more).await;
        job.finalize().unwrap();
        job.wait().await.unwrap();
        scene.stop_guests().await;
        assert!(content(&scene.target_node).await == *scene.guests.model.borrow());
    });
}

#[test]
fn in_write_blocking_mode_an_answered_write_is_on_the_target() {
    let world = World::new(5);
    world.run(async {
        let scene = Scene::new(&world, MIB, 3).await;
        let job = scene.start(|_, mirror| mirror.copy_mode = CopyMode::WriteBlocking);
        until(|| job.status() == JobStatus::Ready).await;
        scene.stop_guests().await;
        assert!(content(&scene.target_node).await == *scene.guests.model.borrow());
        job.cancel().unwrap();
        job.wait().await.unwrap_err();
    });
}

#[test]
fn a_ready_mirror_that_is_cancelled_without_force_leaves_a_copy_of_that_instant() {
    for seed in 0..10 {
        let world = World::new(seed);
        world.run(async {
            let scene = Scene::new(&world, MIB, 3).await;
            let job = scene.start(|_, _| {});
            until(|| job.status() == JobStatus::Ready).await;
            scene.stop_guests().await;
            job.block_cancel(false).unwrap();
            job.wait().await.unwrap();
            assert!(content(&scene.target_node).await == *scene.guests.model.borrow());
            assert!(scene.guests.edge.node().is_same(&scene.source_node));
            assert!(scene.target.synced.load(Ordering::Relaxed));
        });
    }
}

#[test]
fn what_is_written_all_the_time_is_sent_once_at_the_end() {
    let world = World::new(1);
    world.run(async {
        // One guest that owns everything, but writes to a twentieth of it only.
        let len = 8 * MIB;
        let source = Jittery::new(&world, len, None, MS / 50);
        let target = Jittery::new(&world, len, None, MS / 4);
        let (node, copy) = (NodeHandle::new(Shared(source.clone())), NodeHandle::new(Shared(target.clone())));
        node.write(&Ctx::GUEST, 0, pattern(len), WriteFlags::empty()).await.unwrap();
        let stop = Rc::new(Cell::new(false));
        let (writer, stopped, mut rng) = (node.clone(), stop.clone(), world.fork_rng());
        rt::spawn(async move {
            while !stopped.get() {
                let at = rng.below(len / 20 / 4096) * 4096;
                writer
                    .write(&Ctx::GUEST, at, vec![rng.below(256) as u8; 4096], WriteFlags::empty())
                    .await
                    .unwrap();
                rt::sleep(MS).await;
            }
        });
        let jobs = Jobs::new();
        let options = JobOptions { speed: 4 * MIB, ..JobOptions::new("m") };
        let job = start(&jobs, options, MirrorOptions::new(node, copy)).unwrap();
        until(|| job.status() == JobStatus::Ready).await;
        stop.set(true);
        let sent = target.written.load(Ordering::Relaxed) as f64 / len as f64;
        // 2 s of writes are 8 MB: sent again and again they would double it.
        assert!((0.95..1.10).contains(&sent), "{sent} of the disk was sent");
        job.cancel().unwrap();
    });
}

#[test]
fn a_target_that_is_full_stops_the_job_and_not_the_guest() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        let world = World::new(3);
        world.run(async {
            let scene = Scene::new(&world, MIB, 2).await;
            scene.target.fails.store(true, Ordering::Relaxed);
            let events = scene.jobs.subscribe();
            let job = scene.start(|_, mirror| {
                mirror.on_target_error = OnError::Enospc;
                mirror.copy_mode = mode;
            });
            until(|| job.status() == JobStatus::Paused).await;
            let more = scene.guests.writes.get() + 50;
            until(|| scene.guests.writes.get() >= more).await;
            let stopped = drain(&events).into_iter().any(|event| {
                matches!(
                    event,
                    JobEvent::BlockJobError { operation: Operation::Write, action: ErrorAction::Stop, .. }
                )
            });
            assert!(stopped);
            scene.target.fails.store(false, Ordering::Relaxed);
            job.resume().unwrap();
            until(|| job.status() == JobStatus::Ready).await;
            job.complete().unwrap();
            job.wait().await.unwrap();
            scene.stop_guests().await;
            assert!(content(&scene.target_node).await == *scene.guests.model.borrow());
        });
    }
}

#[test]
fn nothing_is_copied_twice_and_zeroes_are_not_copied_at_all() {
    let world = World::new(9);
    world.run(async {
        let scene = Scene::new(&world, 2 * MIB, 1).await;
        scene.stop_guests().await;
        scene.source.written.store(0, Ordering::Relaxed);
        let job = scene.start(|_, mirror| mirror.sync = MirrorSync::Full);
        until(|| job.status() == JobStatus::Ready).await;
        let sent = scene.target.written.load(Ordering::Relaxed);
        assert!((MIB..MIB + 64 * KIB).contains(&sent), "{sent} bytes for {MIB} of data");
        job.cancel().unwrap();
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    block_on(async {
        let node = |len| NodeHandle::new(MemoryOverlay::new(len, 4096, None));
        let (one, jobs) = (node(MIB), Jobs::new());
        let refused = |target: NodeHandle| {
            start(&jobs, JobOptions::new("m"), MirrorOptions::new(one.clone(), target)).unwrap_err().message
        };
        assert_eq!(refused(one.clone()), "Can't mirror node into itself");
        assert_eq!(refused(node(2 * MIB)), "Source and target image have different sizes");
    });
}
