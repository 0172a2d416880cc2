//! Power cuts and deaths of the process at every boundary of a write: the image opens, its check is clean, and each
//! sector shows what it held at the last flush or something that was written since.
//!
//! `INFILL_SEED=n` runs that seed alone; the seed of a failure is printed.

mod common;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use common::CX;
use futures_util::future::join_all;
use infill_base::{Class, Ctx, DiscardMode, WriteFlags, ZeroFlags};
use infill_node::{BackingRef, NodeHandle, RawNode, Repair};
use infill_qed::{CreateOptions, OpenOptions, Qed, check, create};
use infill_sim::{CrashPoint, DiskOptions, Media, Rng, SimDisk, World};
use infill_storage::{MemoryStorage, StorageHandle, rt};

const SECTOR: usize = 512;
/// Sectors that an L2 table of one cluster describes.
const TABLE: usize = 512 * 8;
/// What is looked at: where guests write, at the beginning of both tables and up to the end of the disk, and clusters
/// that only the end of a stream fills.
const WINDOWS: [(usize, usize); 3] = [(0, 29), (TABLE, SECTORS), (80, 104)];
const SECTORS: usize = TABLE + 29;
const GUESTS: usize = 3;

/// First byte of a sector: 0 for zeroes, 1 for what lies below, others for a guest's write.
type Value = u8;

#[derive(Clone, Copy, Debug)]
struct Written {
    value: Value,
    /// When it was acknowledged.
    done: Option<u64>,
}

/// What each sector may show after a crash: the oldest entry is stable.
struct Model {
    sectors: Vec<Vec<Written>>,
    clock: u64,
}

impl Model {
    fn new(value: Value) -> Model {
        Model { sectors: vec![vec![Written { value, done: Some(0) }]; SECTORS], clock: 1 }
    }

    fn begin(&mut self, at: usize, count: usize, value: Value) {
        self.sectors[at..at + count].iter_mut().for_each(|sector| sector.push(Written { value, done: None }));
    }

    fn end(&mut self, at: usize, count: usize) {
        self.clock += 1;
        for sector in &mut self.sectors[at..at + count] {
            if let Some(last) = sector.last_mut() {
                last.done = Some(self.clock);
            }
        }
    }

    /// A flush that was asked for at `since` is answered.
    fn flushed(&mut self, since: u64) {
        for sector in &mut self.sectors {
            let stable = sector.iter().rposition(|written| written.done.is_some_and(|done| done <= since));
            sector.drain(..stable.unwrap_or(0));
        }
    }

    fn allowed(&self) -> Vec<Vec<Value>> {
        self.sectors.iter().map(|sector| sector.iter().map(|written| written.value).collect()).collect()
    }
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    backing: bool,
    table_clusters: u32,
    cache_bytes: u64,
    fault: usize,
}

/// A disk on which every byte is 1.
fn below() -> NodeHandle {
    let storage = StorageHandle::new(MemoryStorage::from_bytes(vec![1; SECTORS * SECTOR]));
    NodeHandle::new(RawNode::new(storage, true))
}

fn options(shape: &Shape) -> OpenOptions {
    let mut options = OpenOptions {
        discard: DiscardMode::Unmap,
        metadata_cache_bytes: shape.cache_bytes,
        ..OpenOptions::default()
    };
    plant(&mut options, shape.fault);
    options
}

#[cfg(feature = "planted-faults")]
fn plant(options: &mut OpenOptions, fault: usize) {
    options.fault = fault.checked_sub(1).map(|nth| infill_qed::Fault::ALL[nth]);
}

#[cfg(not(feature = "planted-faults"))]
fn plant(_: &mut OpenOptions, fault: usize) {
    assert_eq!(fault, 0, "there are no planted faults in this build");
}

async fn open(storage: &StorageHandle, shape: &Shape) -> Result<NodeHandle, String> {
    let node = Qed::open(&CX, storage.clone(), options(shape)).await.map_err(|error| error.to_string())?;
    let node = NodeHandle::new(node);
    if node.info().backing.is_some() {
        node.backing().expect("an overlay").replace(Some(below())).await;
    }
    Ok(node)
}

/// What a state shows after it was opened for writing, and whether that is allowed.
fn judge(
    media: Media,
    allowed: &[Vec<Value>],
    shape: &Shape,
    detached: bool,
    rng: &mut Rng,
) -> Result<(), String> {
    World::new(rng.next_u64()).run(async {
        let storage = StorageHandle::new(SimDisk::with(media.clone(), DiskOptions::default()));
        if media.sector(0)[16] & 2 == 0 {
            let report = check(&CX, &storage, Repair::Nothing).await.map_err(|error| error.to_string())?;
            if report.corruptions + report.check_errors > 0 {
                return Err(format!("not marked, but the check finds {:?}", report.messages));
            }
        }
        let node = open(&storage, shape).await?;
        if detached && node.info().backing.is_some() {
            return Err("the backing came back".into());
        }
        compare(&node, allowed).await?;
        // It is used on: what lies about in the file must not show.
        for _ in 0..3 {
            let at = ((WINDOWS[rng.index(2)].0 + rng.index(29)) * SECTOR) as u64;
            let write = node.write(&CX, at, vec![200; SECTOR], WriteFlags::empty()).await;
            write.map_err(|error| error.to_string())?;
        }
        let allowed: Vec<_> = allowed.iter().map(|values| [values.as_slice(), &[200]].concat()).collect();
        compare(&node, &allowed).await?;
        node.close(&CX).await.map_err(|error| error.to_string())?;
        let report = check(&CX, &storage, Repair::Leaks).await.map_err(|error| error.to_string())?;
        if report.corruptions + report.check_errors > 0 {
            return Err(format!("used on, the check finds {:?}", report.messages));
        }
        Ok(())
    })
}

async fn compare(node: &NodeHandle, allowed: &[Vec<Value>]) -> Result<(), String> {
    for (start, end) in WINDOWS {
        let buf = BytesMut::zeroed((end - start) * SECTOR);
        let found = node.read(&Ctx::FILL, (start * SECTOR) as u64, buf).await;
        let found = found.map_err(|error| error.to_string())?;
        for (index, sector) in (start..end).zip(found.chunks(SECTOR)) {
            let allowed = &allowed[index];
            if !allowed.contains(&sector[0]) || sector.iter().any(|byte| *byte != sector[0]) {
                return Err(format!("sector {index} shows {}, allowed are {allowed:?}", sector[0]));
            }
        }
    }
    Ok(())
}

struct Judge {
    shape: Shape,
    rng: Rng,
    seen: HashSet<u64>,
    states: u64,
    failure: Option<String>,
}

impl Judge {
    fn look(&mut self, point: &CrashPoint, allowed: &[Vec<Value>], detached: bool) {
        let mut states: Vec<Media> = vec![point.power_cut(|_, _| false), point.kill(&mut self.rng)];
        match point.all_power_cuts(8) {
            Some(all) => states.extend(all),
            None => states.extend((0..2).map(|_| point.random_power_cut(&mut self.rng))),
        }
        // Metadata alone: what lies in front of the data of a new image, or is as long as a slice of a table.
        states.push(
            point.power_cut(|pending, _| pending.op.sectors.len() == 8 || pending.op.set_len.is_some()),
        );
        for media in states {
            if self.failure.is_some() || !self.seen.insert(media.hash()) {
                continue;
            }
            self.states += 1;
            let judged = judge(media, allowed, &self.shape, detached, &mut self.rng);
            self.failure = judged.err().map(|error| format!("{:?}: {error}", point.boundary));
        }
    }
}

/// One life of an image; gives the number of states that were judged, or what was wrong with one.
fn life(shape: Shape, seed: u64, ops: usize) -> Result<u64, String> {
    let judge = Arc::new(Mutex::new(Judge {
        shape,
        rng: Rng::new(seed),
        seen: HashSet::new(),
        states: 0,
        failure: None,
    }));
    let model = Arc::new(Mutex::new(Model::new(u8::from(shape.backing))));
    let detached = Arc::new(Mutex::new(false));
    let world = World::new(seed);
    let result: Result<(), String> = world.run(async {
        let latency = (Duration::from_micros(1), Duration::from_micros(300));
        let disk = SimDisk::with(Media::new(0), DiskOptions { seed, latency, ..DiskOptions::default() });
        let storage = StorageHandle::new(disk.clone());
        let backing = shape.backing.then(|| BackingRef { filename: "below".into(), format: None });
        let create_options = CreateOptions {
            size: (SECTORS * SECTOR) as u64,
            backing,
            cluster_bytes: 4096,
            table_clusters: shape.table_clusters,
        };
        create(&CX, &storage, &create_options).await.map_err(|error| error.to_string())?;
        let (looking, state, gone) = (judge.clone(), model.clone(), detached.clone());
        disk.observe(move |point| {
            let allowed = state.lock().expect("unpoisoned").allowed();
            let gone = *gone.lock().expect("unpoisoned");
            looking.lock().expect("unpoisoned").look(point, &allowed, gone);
        });
        for session in 0..2 {
            let node = open(&storage, &shape).await?;
            let guests = (0..GUESTS).map(|guest| {
                guest_task(
                    node.clone(),
                    model.clone(),
                    guest,
                    Rng::new(seed * 100 + guest as u64 + session),
                    ops,
                )
            });
            let fill = fill_task(node.clone(), Rng::new(seed * 100 + 50 + session), ops);
            let (guests, fill) = futures_util::future::join(join_all(guests), fill).await;
            guests.into_iter().chain([fill]).collect::<Result<Vec<()>, String>>()?;
            if session == 1 && shape.backing {
                detach(&node, &detached).await?;
            }
            node.close(&CX).await.map_err(|error| error.to_string())?;
        }
        Ok(())
    });
    let judge = judge.lock().expect("unpoisoned");
    if let Some(failure) = &judge.failure {
        return Err(failure.clone());
    }
    result.map(|()| judge.states)
}

async fn guest_task(
    node: NodeHandle,
    model: Arc<Mutex<Model>>,
    guest: usize,
    mut rng: Rng,
    ops: usize,
) -> Result<(), String> {
    for nth in 0..ops {
        if rng.per_mille(300) {
            rt::sleep(Duration::from_micros(rng.below(400))).await;
        }
        if rng.per_mille(150) {
            let since = model.lock().expect("unpoisoned").clock;
            node.sync(&CX).await.map_err(|error| error.to_string())?;
            model.lock().expect("unpoisoned").flushed(since);
            continue;
        }
        // Each guest has its own clusters, in both tables.
        let near = WINDOWS[rng.index(2)].0;
        let cluster = (rng.index(8) * GUESTS + guest) * 8 % 24;
        let at = (near + cluster + rng.index(8)).min(SECTORS - 1);
        let at = if rng.per_mille(400) { at / 8 * 8 } else { at };
        let whole = at.is_multiple_of(8) && rng.per_mille(700);
        let count = if whole { 8 } else { rng.range(1, 4) as usize };
        let count = count.min(8 - at % 8).min(SECTORS - at);
        let range = ((at * SECTOR) as u64, (count * SECTOR) as u64);
        let value = if rng.per_mille(250) { 0 } else { 10 + (nth % 60 * GUESTS + guest) as u8 };
        model.lock().expect("unpoisoned").begin(at, count, value);
        let done = match value {
            0 if rng.per_mille(300) && node.backing().is_some_and(|slot| !slot.is_some()) && whole => {
                node.discard(&CX, range.0, range.1).await
            }
            0 => node.write_zeroes(&CX, range.0, range.1, ZeroFlags::MAY_UNMAP).await,
            value => {
                let fua = if rng.per_mille(50) { WriteFlags::FUA } else { WriteFlags::empty() };
                node.write(&CX, range.0, vec![value; range.1 as usize], fua).await
            }
        };
        done.map_err(|error| error.to_string())?;
        model.lock().expect("unpoisoned").end(at, count);
    }
    Ok(())
}

async fn fill_task(node: NodeHandle, mut rng: Rng, ops: usize) -> Result<(), String> {
    let Some(slot) = node.backing().filter(|slot| slot.is_some()) else { return Ok(()) };
    for _ in 0..ops {
        rt::sleep(Duration::from_micros(rng.below(300))).await;
        let cluster = if rng.per_mille(500) { rng.below(4) } else { 512 + rng.below(4) };
        let (at, size) = (cluster * 4096, (SECTORS * SECTOR) as u64);
        let len = (rng.range(1, 3) * 4096).min(size - at);
        let cx = Ctx::of(if rng.per_mille(500) { Class::Fill } else { Class::AroundMiss });
        let fetched = slot.fetch(&cx, at, len).await.map_err(|error| error.to_string())?;
        let populated = node.populate(&cx, at, fetched.data, fetched.generation).await;
        populated.map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Fills what is looked at and drops the backing, as a stream does (P4).
async fn detach(node: &NodeHandle, detached: &Arc<Mutex<bool>>) -> Result<(), String> {
    let slot = node.backing().expect("an overlay");
    for (start, end) in WINDOWS {
        let data = Bytes::from(vec![1; (end - start).next_multiple_of(8).min(SECTORS - start) * SECTOR]);
        let populated = node.populate(&Ctx::FILL, (start * SECTOR) as u64, data, slot.generation()).await;
        populated.map_err(|error| error.to_string())?;
    }
    node.set_backing_ref(&CX, None).await.map_err(|error| error.to_string())?;
    slot.replace(None).await;
    *detached.lock().expect("unpoisoned") = true;
    Ok(())
}

fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("INFILL_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => vec![seed],
        None => (1..=count).collect(),
    }
}

fn shapes(fault: usize) -> [Shape; 3] {
    [
        Shape { backing: true, table_clusters: 1, cache_bytes: 1 << 20, fault },
        Shape { backing: false, table_clusters: 2, cache_bytes: 1 << 20, fault },
        // Hardly a slice fits: everything is evicted all the time.
        Shape { backing: true, table_clusters: 2, cache_bytes: 0, fault },
    ]
}

#[test]
fn no_crash_shows_a_third_value_or_breaks_an_image() {
    let mut states = 0;
    for seed in seeds(4) {
        for shape in shapes(0) {
            match life(shape, seed, 12) {
                Ok(judged) => states += judged,
                Err(failure) => panic!("INFILL_SEED={seed} {shape:?}: {failure}"),
            }
        }
    }
    assert!(states > 1000, "{states} states are too few to say anything");
}

/// Each mistake that can be made in the order of writes is seen by the test above.
#[cfg(feature = "planted-faults")]
#[test]
fn every_planted_fault_is_found() {
    let mut missed = Vec::new();
    for (nth, fault) in infill_qed::Fault::ALL.into_iter().enumerate() {
        let found = seeds(20)
            .into_iter()
            .find_map(|seed| shapes(nth + 1).into_iter().find_map(|shape| life(shape, seed, 12).err()));
        println!("{fault:?}: {found:?}");
        missed.extend(found.is_none().then_some(fault));
    }
    assert!(missed.is_empty(), "not found: {missed:?}");
}
