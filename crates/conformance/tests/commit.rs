//! P5: killed or cut off anywhere in a commit, the chain *as its top names it* reads what the guest may rely on; once the
//! commit is completed the base alone and the old chain read the same, later writes of the guest included.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use infill_base::{Ctx, WriteFlags, ZeroFlags};
use infill_conformance::Format;
use infill_job::copy::commit::{CommitOptions, start};
use infill_job::{JobOptions, JobStatus, Jobs};
use infill_node::{BackingRef, Edge, NodeHandle, Through};
use infill_sim::{CrashPoint, DiskOptions, Media, Rng, SimDisk, World};
use infill_storage::{StorageHandle, rt};

const SECTOR: u64 = 512;
const SIZE: u64 = 256 << 10;
const LATENCY: (Duration, Duration) = (Duration::from_micros(2), Duration::from_micros(200));

/// Names of the layers from the top down, as headers say them.
const NAMES: [&str; 3] = ["top", "mid", "base"];

/// What a sector may read as.
#[derive(Clone, Debug)]
struct Allowed {
    /// The value of the last write that was acknowledged.
    newest: u64,
    /// That of the last write that a flush covers, and all since.
    values: BTreeSet<u64>,
}

/// A moment at which it all may end.
struct Moment {
    points: Vec<CrashPoint>,
    allowed: Vec<Allowed>,
    /// The base has taken the top's place.
    completed: bool,
}

struct Watch {
    disks: Vec<SimDisk>,
    allowed: Mutex<Vec<Allowed>>,
    completed: Mutex<bool>,
    moments: Mutex<Vec<Moment>>,
    skipped: Mutex<u64>,
    every: u64,
}

impl Watch {
    fn look(&self) {
        let mut skipped = self.skipped.lock().unwrap();
        *skipped += 1;
        if !skipped.is_multiple_of(self.every) {
            return;
        }
        let moment = Moment {
            points: self.disks.iter().map(SimDisk::crash_point).collect(),
            allowed: self.allowed.lock().unwrap().clone(),
            completed: *self.completed.lock().unwrap(),
        };
        self.moments.lock().unwrap().push(moment);
    }
}

fn sector(value: u64) -> Vec<u8> {
    value.to_be_bytes().repeat(SECTOR as usize / 8)
}

/// Opens a chain as its headers name it.
async fn open(formats: &[Format], disks: &[StorageHandle], first: usize) -> NodeHandle {
    let top =
        formats[first].open(&disks[first]).await.unwrap_or_else(|error| panic!("{}: {error}", NAMES[first]));
    let mut layer = top.clone();
    while let Some(named) = layer.info().backing {
        let at = NAMES.iter().position(|name| *name == named.filename).expect("a layer of the chain");
        let below =
            formats[at].open(&disks[at]).await.unwrap_or_else(|error| panic!("{}: {error}", NAMES[at]));
        layer.backing().expect("an overlay").replace(Some(below.clone())).await;
        layer = below;
    }
    top
}

async fn check(node: &NodeHandle, allowed: &[Allowed], what: &str) {
    let len = node.len().min(SIZE);
    assert_eq!(len, SIZE, "{what}: a disk of {} bytes", node.len());
    let all =
        node.read_vec(&Ctx::GUEST, 0, SIZE as usize).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    for (nth, bytes) in all.chunks(SECTOR as usize).enumerate() {
        let value = u64::from_be_bytes(*bytes.first_chunk().unwrap());
        assert!(bytes == sector(value), "{what}: sector {nth} is torn");
        assert!(
            allowed[nth].values.contains(&value),
            "{what}: sector {nth} is {value}, allowed is {:?}",
            allowed[nth]
        );
    }
}

/// A guest that writes, zeroes and flushes, one request after the other.
async fn guest(edge: Edge, watch: Arc<Watch>, mut rng: Rng, stop: Rc<Cell<bool>>, alive: Rc<Cell<bool>>) {
    let (port, mut next) = (edge.port(), 1_000_000);
    while !stop.get() {
        if rng.below(6) == 0 {
            port.sync(&Ctx::GUEST).await.unwrap();
            for allowed in watch.allowed.lock().unwrap().iter_mut() {
                allowed.values = BTreeSet::from([allowed.newest]);
            }
            continue;
        }
        let at = rng.below(SIZE / SECTOR);
        let count = rng.range(1, 17).min(SIZE / SECTOR - at);
        let value = if rng.below(8) == 0 { 0 } else { next };
        next += 1;
        let sectors = at as usize..(at + count) as usize;
        for allowed in &mut watch.allowed.lock().unwrap()[sectors.clone()] {
            allowed.values.insert(value);
        }
        if value == 0 {
            port.write_zeroes(&Ctx::GUEST, at * SECTOR, count * SECTOR, ZeroFlags::MAY_UNMAP).await.unwrap();
        } else {
            let data = sector(value).repeat(count as usize);
            port.write(&Ctx::GUEST, at * SECTOR, data.into(), WriteFlags::empty()).await.unwrap();
        }
        for allowed in &mut watch.allowed.lock().unwrap()[sectors] {
            allowed.newest = value;
        }
        if rng.below(3) == 0 {
            rt::sleep(Duration::from_micros(rng.below(300))).await;
        }
    }
    alive.set(false);
}

/// Makes the layers, each with data of its own, all of it stable; gives what the disk reads as.
async fn make(formats: &[Format], storages: &[StorageHandle], rng: &mut Rng) -> Vec<Allowed> {
    let mut content = vec![0; (SIZE / SECTOR) as usize];
    for at in (0..NAMES.len()).rev() {
        let named = (at + 1 < NAMES.len()).then(|| BackingRef {
            filename: NAMES[at + 1].into(),
            format: Some(formats[at + 1].qemu_name().into()),
        });
        formats[at].create(&storages[at], SIZE, named).await.unwrap();
        let node = open(formats, storages, at).await;
        for _ in 0..12 {
            let first = rng.below(SIZE / SECTOR);
            let count = rng.range(1, 65).min(SIZE / SECTOR - first);
            let value = (NAMES.len() - at) as u64 * 1000 + rng.below(1000);
            let data = sector(value).repeat(count as usize);
            node.write(&Ctx::GUEST, first * SECTOR, data, WriteFlags::empty()).await.unwrap();
            content[first as usize..(first + count) as usize].fill(value);
        }
        node.close(&Ctx::GUEST).await.unwrap();
    }
    content.into_iter().map(|newest| Allowed { newest, values: BTreeSet::from([newest]) }).collect()
}

/// A commit of the active layer under a guest; gives the moments at which it may have ended.
fn commit(formats: &[Format; 3], from: usize, seed: u64) -> Vec<Moment> {
    let world = World::new(seed);
    let mut rng = world.fork_rng();
    let disk = |nth: usize| {
        let options = DiskOptions {
            name: NAMES[nth].into(),
            seed: seed + nth as u64,
            latency: LATENCY,
            ..DiskOptions::default()
        };
        let born = if formats[nth] == Format::Raw { Media::new(SIZE) } else { Media::new(0) };
        SimDisk::with(born, options)
    };
    let disks: Vec<SimDisk> = (0..NAMES.len()).map(disk).collect();
    let storages: Vec<StorageHandle> = disks.iter().cloned().map(StorageHandle::new).collect();
    world.run(async {
        let allowed = make(formats, &storages, &mut rng).await;
        let watch = Arc::new(Watch {
            disks: disks.clone(),
            allowed: Mutex::new(allowed),
            completed: Mutex::new(false),
            moments: Mutex::default(),
            skipped: Mutex::new(0),
            every: 5,
        });
        let top = open(formats, &storages, 0).await;
        let mut base = top.clone();
        for _ in 0..from {
            base = base.backing().and_then(|slot| slot.node()).unwrap();
        }
        let edge = Edge::new(top.clone());
        let (stop, alive) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(true)));
        rt::spawn(guest(edge.clone(), watch.clone(), world.fork_rng(), stop.clone(), alive.clone()));
        for disk in &disks {
            let watch = watch.clone();
            disk.observe(move |_| watch.look());
        }
        let jobs = Jobs::new();
        let (told, to, moved) = (watch.clone(), base.clone(), edge.clone());
        let options = CommitOptions {
            backing: BackingRef {
                filename: NAMES[from].into(),
                format: Some(formats[from].qemu_name().into()),
            },
            on_exchange: Some(Box::new(move |_| {
                Box::pin(async move {
                    moved.point_at(to);
                    *told.completed.lock().unwrap() = true;
                    Ok(())
                })
            })),
            ..CommitOptions::new(top.clone(), base)
        };
        let job = start(&jobs, JobOptions::new("c"), options).unwrap();
        while job.status() != JobStatus::Ready {
            rt::sleep(Duration::from_micros(100)).await;
        }
        job.complete().unwrap();
        job.wait().await.unwrap();
        // The guest goes on, on the base.
        rt::sleep(Duration::from_millis(10)).await;
        stop.set(true);
        while alive.get() {
            rt::sleep(Duration::from_micros(100)).await;
        }
        for disk in &disks {
            disk.stop_observing();
        }
        std::mem::take(&mut *watch.moments.lock().unwrap())
    })
}

/// Checks every moment; how many media states that were.
fn judge(formats: &[Format; 3], from: usize, moments: &[Moment], seed: u64) -> usize {
    let mut rng = Rng::new(seed);
    for (nth, moment) in moments.iter().enumerate() {
        let cut = nth % 3 != 0;
        let storages: Vec<StorageHandle> = moment
            .points
            .iter()
            .map(|point| if cut { point.random_power_cut(&mut rng) } else { point.kill(&mut rng) })
            .map(|media| StorageHandle::new(SimDisk::with(media, DiskOptions::default())))
            .collect();
        infill_sim::block_on(async {
            let what =
                |which: &str| format!("seed {seed}, moment {nth}, completed {}, {which}", moment.completed);
            // In place of the run, which after a kill may not have lost a byte of what was acknowledged.
            check(&open(formats, &storages, 0).await, &moment.allowed, &what("the chain")).await;
            if moment.completed {
                check(&open(formats, &storages, from).await, &moment.allowed, &what("the base alone")).await;
            }
        });
    }
    moments.len()
}

fn proof(formats: [Format; 3], from: usize, seeds: std::ops::Range<u64>) {
    let (mut states, mut after) = (0, 0);
    for seed in seeds {
        let moments = commit(&formats, from, seed);
        after += moments.iter().filter(|moment| moment.completed).count();
        states += judge(&formats, from, &moments, seed);
    }
    assert!(states > 200 && after > 20, "{states} states were looked at, {after} of them after the end");
}

#[test]
fn qcow2_down_into_raw_past_a_layer_between() {
    proof([Format::QCOW2_4K, Format::QCOW2_SUBCLUSTERS_16K, Format::Raw], 2, 0..4);
}

#[test]
fn subclusters_down_into_qcow2_directly() {
    proof([Format::QCOW2_SUBCLUSTERS_16K, Format::QCOW2_4K, Format::QCOW2], 1, 0..4);
}

#[test]
fn qed_down_into_qcow2_past_a_layer_between() {
    proof([Format::QED, Format::QCOW2_4K, Format::QCOW2_4K], 2, 0..4);
}
