//! Units of an overlay that are made absent again, under guests and fills beside them: killed or cut off anywhere, each unit is
//! there with what was in it, or absent; what a flush covers stays so; and the check finds nothing wrong.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use infill_base::{Ctx, WriteFlags};
use infill_conformance::crash::{BACKING_NAME, Sample};
use infill_conformance::payload::payload;
use infill_conformance::{Format, SECTOR_BYTES, referee};
use infill_node::{BackingRef, NodeHandle, RawNode, Repair};
use infill_sim::{CrashPoint, DiskOptions, Media, Rng, SimDisk, World};
use infill_storage::{MemoryStorage, StorageHandle, rt};

const CX: &Ctx = &Ctx::GUEST;
const UNITS: u64 = 48;
const LATENCY: (Duration, Duration) = (Duration::from_micros(2), Duration::from_micros(200));
/// Number of the operation whose payload the base shows.
const BASE: u32 = 1;
/// States that are looked at at each boundary.
const STATES: usize = 4;
/// Every how many states one is shown to QEMU.
const SAMPLE_EVERY: u64 = 400;

/// Whose payload a unit shows now, and may show after a crash: operations, and how many of this unit's there were before.
#[derive(Clone, Debug)]
struct Unit {
    now: usize,
    /// Dropped from the front of `may`.
    dropped: usize,
    may: Vec<u32>,
}

struct Judge {
    format: Format,
    base: Bytes,
    rng: Rng,
    units: Vec<Unit>,
    states: u64,
    samples: Vec<Sample>,
    failure: Option<String>,
}

impl Judge {
    /// From now on a crash may show the payload of `op` in the unit.
    fn may(&mut self, unit: u64, op: u32) {
        self.units[unit as usize].may.push(op);
    }

    fn look(&mut self, point: &CrashPoint) {
        for nth in 0..STATES {
            if self.failure.is_some() {
                return;
            }
            let media = match nth {
                0 => point.kill(&mut self.rng),
                1 => point.power_cut(|_, _| false),
                _ => point.random_power_cut(&mut self.rng),
            };
            self.states += 1;
            self.failure = self.judge(media).err().map(|error| format!("{:?}: {error}", point.boundary));
        }
    }

    fn judge(&mut self, media: Media) -> Result<(), String> {
        let storage = StorageHandle::new(SimDisk::with(media.clone(), DiskOptions::default()));
        let (format, base) = (self.format, self.base.clone());
        let content = infill_sim::block_on(async {
            let node = open(format, &storage, &base).await?;
            let content = node.read_vec(CX, 0, base.len()).await.map_err(|error| error.to_string())?;
            drop(node);
            let report = format.check(&storage, Repair::Nothing).await.map_err(|error| error.to_string())?;
            match report.corruptions + report.check_errors {
                0 => Ok(content.freeze()),
                _ => Err(format!("the check finds {:?}", report.messages)),
            }
        })?;
        let unit = format.unit_bytes();
        for (nth, allowed) in self.units.iter().enumerate() {
            let at = nth as u64 * unit;
            // A write in place may tear between sectors.
            for at in (at..at + unit).step_by(SECTOR_BYTES as usize) {
                let shown = &content[at as usize..(at + SECTOR_BYTES) as usize];
                if !allowed.may.iter().any(|op| *shown == payload(*op, at, SECTOR_BYTES as usize)) {
                    return Err(format!("byte {at} of unit {nth} shows none of {:?}", allowed.may));
                }
            }
        }
        if self.states.is_multiple_of(SAMPLE_EVERY) {
            let how = format!("state {}", self.states);
            self.samples.push(Sample { how, format, media, content: content.to_vec(), backing: Some(base) });
        }
        Ok(())
    }
}

async fn open(format: Format, storage: &StorageHandle, base: &Bytes) -> Result<NodeHandle, String> {
    let node = format.open(storage).await.map_err(|error| error.to_string())?;
    let below = StorageHandle::new(MemoryStorage::from_bytes(base.to_vec()));
    let slot = node.backing().ok_or("no overlay")?;
    slot.replace(Some(NodeHandle::new(RawNode::new(below, true)))).await;
    Ok(node)
}

/// What one task does to its units, so that nobody writes what another one forgets.
struct Actor {
    node: NodeHandle,
    judge: Arc<Mutex<Judge>>,
    unit: u64,
    units: std::ops::Range<u64>,
    rng: Rng,
    next_op: u32,
}

impl Actor {
    fn with<T>(&self, change: impl FnOnce(&mut Judge) -> T) -> T {
        change(&mut self.judge.lock().expect("unpoisoned"))
    }

    /// A few units of its own.
    fn some(&mut self) -> std::ops::Range<u64> {
        let first = self.rng.range(self.units.start, self.units.end);
        first..(first + self.rng.range(1, 6)).min(self.units.end)
    }

    /// A change after which these units show the payload of `op`.
    async fn change(
        &self,
        units: std::ops::Range<u64>,
        op: u32,
        run: impl Future<Output = infill_base::IoResult<()>>,
    ) -> Result<(), String> {
        self.with(|judge| units.clone().for_each(|unit| judge.may(unit, op)));
        run.await.map_err(|error| error.to_string())?;
        self.with(|judge| {
            for unit in units {
                let unit = &mut judge.units[unit as usize];
                unit.now = unit.dropped + unit.may.len() - 1;
            }
        });
        Ok(())
    }

    async fn act(&mut self) -> Result<(), String> {
        let units = self.some();
        let (at, len) = (units.start * self.unit, (units.end - units.start) * self.unit);
        match self.rng.below(8) {
            0..=2 => {
                self.next_op += 1;
                let op = self.next_op;
                let data = payload(op, at, len as usize);
                self.change(units, op, self.node.write(CX, at, data, WriteFlags::empty())).await
            }
            3 | 4 => {
                let slot = self.node.backing().ok_or("no overlay")?;
                let fetched = slot.fetch(CX, at, len).await.map_err(|error| error.to_string())?;
                rt::sleep(Duration::from_micros(self.rng.below(300))).await;
                let done = self.node.populate(CX, at, fetched.data, fetched.generation).await;
                done.map(drop).map_err(|error| error.to_string())
            }
            _ => self.change(units, BASE, self.node.forget(CX, at, len)).await,
        }
    }
}

async fn flush(node: &NodeHandle, judge: &Arc<Mutex<Judge>>) -> Result<(), String> {
    let covered: Vec<usize> = judge.lock().expect("unpoisoned").units.iter().map(|unit| unit.now).collect();
    node.sync(CX).await.map_err(|error| error.to_string())?;
    for (unit, covered) in judge.lock().expect("unpoisoned").units.iter_mut().zip(covered) {
        let stale = covered.saturating_sub(unit.dropped);
        unit.may.drain(..stale);
        unit.dropped += stale;
    }
    Ok(())
}

fn life(format: Format, seed: u64) -> (u64, Vec<Sample>) {
    let unit = format.unit_bytes();
    let base = payload(BASE, 0, (UNITS * unit) as usize);
    let judge = Arc::new(Mutex::new(Judge {
        format,
        base: base.clone(),
        rng: Rng::new(seed),
        units: vec![Unit { now: 0, dropped: 0, may: vec![BASE] }; UNITS as usize],
        states: 0,
        samples: Vec::new(),
        failure: None,
    }));
    let result: Result<(), String> = World::new(seed).run(async {
        let disk =
            SimDisk::with(Media::new(0), DiskOptions { seed, latency: LATENCY, ..DiskOptions::default() });
        let storage = StorageHandle::new(disk.clone());
        let named = BackingRef { filename: BACKING_NAME.into(), format: Some("raw".into()) };
        let made = format.create(&storage, UNITS * unit, Some(named)).await;
        made.map_err(|error| error.to_string())?;
        let node = open(format, &storage, &base).await?;
        let looking = judge.clone();
        disk.observe(move |point| looking.lock().expect("unpoisoned").look(point));
        let actors = (0..4u64).map(|nth| {
            let mut actor = Actor {
                node: node.clone(),
                judge: judge.clone(),
                unit,
                units: nth * UNITS / 4..(nth + 1) * UNITS / 4,
                rng: Rng::new(seed * 10 + nth),
                next_op: 1000 * (nth as u32 + 1),
            };
            rt::detached(async move {
                for _ in 0..14 {
                    actor.act().await?;
                    if actor.rng.per_mille(250) {
                        flush(&actor.node, &actor.judge).await?;
                    }
                }
                Ok::<(), String>(())
            })
        });
        futures_util::future::join_all(actors).await.into_iter().collect::<Result<(), String>>()?;
        node.close(CX).await.map_err(|error| error.to_string())?;
        disk.stop_observing();
        drop(node);
        let report = format.check(&storage, Repair::Nothing).await.map_err(|error| error.to_string())?;
        if format.is_tight() && report.leaks > 0 {
            return Err(format!("closed, it leaks: {:?}", report.messages));
        }
        let mut judge = judge.lock().expect("unpoisoned");
        judge.units.iter_mut().for_each(|unit| drop(unit.may.drain(..unit.may.len() - 1)));
        judge.judge(disk.media())
    });
    let mut judge = judge.lock().expect("unpoisoned");
    let failure = judge.failure.take().or(result.err());
    assert!(failure.is_none(), "{} seed {seed}: {}", format.name(), failure.unwrap_or_default());
    (judge.states, std::mem::take(&mut judge.samples))
}

#[test]
fn a_unit_that_is_forgotten_is_there_or_absent_after_any_crash() {
    let (mut states, mut samples) = (0, Vec::new());
    for format in [
        Format::QCOW2_4K,
        Format::QCOW2_SUBCLUSTERS,
        Format::QCOW2_SUBCLUSTERS_16K,
        Format::QCOW2_512,
        Format::QCOW2_V2,
        Format::QED,
    ] {
        for seed in 1..4 {
            let (looked, kept) = life(format, seed);
            states += looked;
            samples.extend(kept);
        }
    }
    assert!(states > 5000 && samples.len() > 10, "{states} states, {} for QEMU", samples.len());
    for sample in &samples {
        referee::judge(sample).unwrap_or_else(|violation| panic!("{violation}"));
    }
}
