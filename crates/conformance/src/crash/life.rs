//! One life of a disk: guests, fills and reopenings, with the judge looking on.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{LocalBoxFuture, join_all};
use infill_base::{Class, Ctx, ErrorKind};
use infill_job::stream::StreamOptions;
use infill_job::{JobOptions, Jobs};
use infill_node::generic::{FillPiece, StreamCursor};
use infill_node::{BackingRef, COPY_ON_READ_BYTES_MAX, CopyOnRead, NodeHandle, RawNode};
use infill_sim::{DiskOp, DiskOptions, Media, Rng, SimDisk, World};
use infill_storage::sync::lock;
use infill_storage::{StorageHandle, rt};

use super::Plan;
use super::judge::{BACKING_NAME, Judge};
use crate::format::failed;
use crate::{Generator, Guest, Violation};

/// Shortest and longest time of an operation of the simulated disk.
const LATENCY: (Duration, Duration) = (Duration::from_micros(2), Duration::from_micros(300));

/// Guests write whole words of payload, so that no shred of it passes for metadata when states are counted.
const PAYLOAD_ALIGN: u64 = 8;

/// Longest pause of a guest between two operations, in microseconds.
const PAUSE_MICROS_MAX: u64 = 400;

/// Populates of a session that nobody asked for by a read.
const POPULATES: usize = 12;

/// So many of 1000 changes are dropped in the middle by the guest.
const DROPPED_PER_MILLE: u64 = 30;

/// Longest time after which a change is dropped, in microseconds.
const PATIENCE_MICROS_MAX: u64 = 500;

/// Faults of the disk in a session, where there are any.
const FAULTS: u64 = 3;

/// A stream takes part in so many of 1000 sessions.
const STREAM_PER_MILLE: u64 = 500;

/// Guests read with copy-on-read in so many of 1000 sessions.
const COPY_ON_READ_PER_MILLE: u64 = 700;

/// Lives one life in a world of its own; what still runs at its end dies with it.
pub(super) fn live(plan: &Plan, judge: &Judge, seed: u64) -> Result<(), Violation> {
    let world = World::new(seed);
    let mut rng = world.fork_rng();
    let options = DiskOptions { name: "disk".into(), seed, latency: LATENCY, ..DiskOptions::default() };
    let disk = SimDisk::with(judge.born(), options);
    let storage = (plan.storage)(StorageHandle::new(disk.clone()));
    world.run(async {
        if judge.born().is_empty() {
            let named = BackingRef { filename: BACKING_NAME.into(), format: Some("raw".into()) };
            plan.format.create(&storage, plan.size, judge.backing.as_ref().map(|_| named)).await?;
        }
        judge.watch_order(&disk.crash_point());
        let looking = judge.clone();
        disk.observe(move |point| looking.at(point));
        let looking = (judge.clone(), disk.clone());
        let mut guest = None;
        for _ in 0..plan.sessions {
            let node = open(plan, judge, &storage, &mut rng).await?;
            let looking = looking.clone();
            let told = move || looking.0.at(&looking.1.crash_point());
            let now = match guest.take() {
                None => Guest::new(node, judge.model.clone()).on_stable(told),
                Some(guest) => Guest::on_node(&guest, node),
            };
            let ended = session(plan, judge, &disk, &now, &mut rng).await;
            disk.heal();
            match ended {
                // A disk that failed may have poisoned the image: it is opened again after the crash.
                Err(Violation::Failed { .. }) if plan.faults => return Ok(()),
                other => other?,
            }
            if judge.is_over() {
                return Ok(());
            }
            guest = Some(now);
        }
        Ok(())
    })
}

/// Opens the image, with its backing behind a latency of its own.
async fn open(
    plan: &Plan,
    judge: &Judge,
    storage: &StorageHandle,
    rng: &mut Rng,
) -> Result<NodeHandle, Violation> {
    let opening = |error| failed("opening", &error);
    let journal = judge.journaling().map_err(opening)?;
    let node = plan.format.open_with(storage, journal).await.map_err(opening)?;
    if node.info().backing.is_some()
        && let (Some(slot), Some(content)) = (node.backing(), &judge.backing)
    {
        slot.replace(Some(slow_backing(content, rng))).await;
        if rng.per_mille(COPY_ON_READ_PER_MILLE) {
            slot.set_copy_on_read(Some(CopyOnRead::new(&node, COPY_ON_READ_BYTES_MAX)));
        }
    }
    Ok(node)
}

fn slow_backing(content: &Bytes, rng: &mut Rng) -> NodeHandle {
    let options = DiskOptions {
        name: BACKING_NAME.into(),
        seed: rng.next_u64(),
        latency: LATENCY,
        ..DiskOptions::default()
    };
    let disk = SimDisk::with(Media::from_bytes(content), options);
    NodeHandle::new(RawNode::new(StorageHandle::new(disk), true))
}

type Task = LocalBoxFuture<'static, Result<(), Violation>>;

async fn session(
    plan: &Plan,
    judge: &Judge,
    disk: &SimDisk,
    guest: &Guest,
    rng: &mut Rng,
) -> Result<(), Violation> {
    let mut tasks: Vec<Task> = Vec::new();
    let size = guest.node().len();
    let unit = plan.format.unit_bytes();
    // All guests crowd in the same places.
    let crowd = rng.fork();
    for _ in 0..plan.guests {
        let generator =
            Generator::new(crowd.clone(), plan.mix, size, unit, PAYLOAD_ALIGN).with_rng(rng.fork());
        tasks.push(Box::pin(guest_task(guest.clone(), generator, plan.ops, plan.faults)));
    }
    if plan.faults {
        plant_faults(disk, rng);
    }
    if plan.grows {
        tasks.push(Box::pin(grow_task(guest.clone(), rng.fork())));
    }
    if guest.node().backing().is_some_and(|slot| slot.is_some()) {
        tasks.push(Box::pin(populate_task(guest.node().clone(), rng.fork())));
        if rng.per_mille(STREAM_PER_MILLE) {
            let by_hand = rng.per_mille(400);
            tasks.push(Box::pin(stream_task(judge.clone(), disk.clone(), guest.node().clone(), by_hand)));
        }
    }
    let stopped = Rc::new(std::cell::Cell::new(false));
    let tasks = tasks.into_iter().map(|task| {
        let stopped = stopped.clone();
        rt::detached(async move {
            let result = task.await;
            stopped.set(stopped.get() || result.is_err());
            result
        })
    });
    for result in join_all(tasks).await {
        result?;
    }
    if judge.is_over() {
        return Ok(());
    }
    guest.compare_all().await?;
    guest.node().close(&Ctx::GUEST).await.map_err(|error| failed("closing", &error))
}

/// Makes a few operations of the disk fail on the way.
fn plant_faults(disk: &SimDisk, rng: &mut Rng) {
    for _ in 0..rng.range(1, FAULTS + 1) {
        let ops =
            [DiskOp::Write, DiskOp::Write, DiskOp::Sync, DiskOp::Allocate, DiskOp::SetLen, DiskOp::Read];
        let kind = if rng.per_mille(500) { ErrorKind::NoSpace } else { ErrorKind::Io };
        disk.fail(ops[rng.index(ops.len())], rng.below(60), rng.range(1, 4), kind);
    }
}

/// Applies operations one after another; some changes are dropped in the middle. Where the disk may fail, so may they.
async fn guest_task(
    guest: Guest,
    mut generator: Generator,
    ops: usize,
    may_fail: bool,
) -> Result<(), Violation> {
    for _ in 0..ops {
        let op = generator.next_op();
        let dropped = op.is_of_whole_sectors() && generator.below(1000) < DROPPED_PER_MILLE;
        let applied = if dropped {
            let patience = Duration::from_micros(generator.below(PATIENCE_MICROS_MAX));
            guest.apply_or_drop(op, patience).await.map(drop)
        } else {
            guest.apply(op).await
        };
        match applied {
            Err(Violation::Failed { .. }) if may_fail => {}
            other => other?,
        }
        if generator.below(3) == 0 {
            rt::sleep(Duration::from_micros(generator.below(PAUSE_MICROS_MAX))).await;
        }
    }
    Ok(())
}

async fn grow_task(guest: Guest, mut rng: Rng) -> Result<(), Violation> {
    rt::sleep(Duration::from_micros(rng.below(4 * PAUSE_MICROS_MAX))).await;
    let size = guest.node().len();
    let longer = size + rng.range(1, 2 * size / 512) * 512;
    lock(guest.model()).begin_resize(longer);
    guest.node().resize(&Ctx::GUEST, longer).await.map_err(|error| failed("growing", &error))?;
    lock(guest.model()).end_resize();
    Ok(())
}

async fn populate_task(node: NodeHandle, mut rng: Rng) -> Result<(), Violation> {
    let unit = node.populate_unit();
    for _ in 0..POPULATES {
        rt::sleep(Duration::from_micros(rng.below(PAUSE_MICROS_MAX))).await;
        let at = rng.below(node.len().div_ceil(unit)) * unit;
        let len = (unit * rng.range(1, 6)).min(node.len() - at);
        let cx = Ctx::of(if rng.per_mille(500) { Class::Fill } else { Class::AroundMiss });
        let Some(slot) = node.backing().filter(|slot| slot.is_some()) else { return Ok(()) };
        let fetched = slot.fetch(&cx, at, len).await.map_err(|error| failed("a fetch", &error))?;
        let populated = node.populate(&cx, at, fetched.data, fetched.generation).await;
        let populated = populated.map_err(|error| failed("a populate", &error))?;
        if populated.linked + populated.lost + populated.stale != len {
            return Err(Violation::Broken(format!("a populate of {len} bytes tells of {populated:?}")));
        }
    }
    Ok(())
}

/// Streams to the end: from *completed* on, nothing needs the backing (P4).
async fn stream_task(judge: Judge, disk: SimDisk, node: NodeHandle, by_hand: bool) -> Result<(), Violation> {
    if by_hand {
        stream_by_hand(&node).await?;
    } else {
        let job =
            infill_job::stream::start(&Jobs::new(), JobOptions::new("stream"), StreamOptions::new(node));
        let job = job.map_err(|error| Violation::Broken(format!("the stream does not start: {error:?}")))?;
        job.wait().await.map_err(|error| failed("the stream", &error))?;
    }
    judge.completed();
    judge.at(&disk.crash_point());
    Ok(())
}

/// A stream that leaves every sync to the node: naming no backing any more has a sync before and after by itself.
async fn stream_by_hand(node: &NodeHandle) -> Result<(), Violation> {
    const PIECE_BYTES: u64 = 128 << 10;
    let cx = Ctx::FILL;
    let Some(slot) = node.backing() else { return Ok(()) };
    // Until a walk finds nothing: what was stale is met again.
    let mut found = true;
    while found {
        found = false;
        let mut cursor = StreamCursor::new(node, false);
        while let Some(piece) =
            cursor.next(&cx, PIECE_BYTES).await.map_err(|error| failed("the walk of a stream", &error))?
        {
            found = true;
            let FillPiece::Copy { at, len } = piece else { continue };
            let fetched = slot.fetch(&cx, at, len).await.map_err(|error| failed("a fetch", &error))?;
            let populated = node.populate(&cx, at, fetched.data, fetched.generation).await;
            populated.map_err(|error| failed("a populate", &error))?;
        }
    }
    if let Some(policy) = slot.copy_on_read() {
        policy.settle().await;
    }
    node.set_backing_ref(&cx, None).await.map_err(|error| failed("naming no backing", &error))?;
    slot.replace(None).await;
    Ok(())
}
