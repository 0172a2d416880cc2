//! Power cuts and deaths of the process at every boundary of a write while an image is marked as moved, and back: the mark is
//! there or not, as the call that returned says where none is under way, and everything else is as it was.
//!
//! `INFILL_SEED=n` runs that seed alone; the seed of a failure is printed.

use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use infill_base::{Ctx, WriteFlags};
use infill_node::{BackingRef, NodeHandle, Repair};
use infill_qcow2::{CreateOptions, Header, OpenOptions, Purpose, Qcow2, check, create, set_fence};
use infill_sim::{CrashPoint, DiskOptions, Media, Rng, SimDisk, World};
use infill_storage::StorageHandle;

const CX: Ctx = Ctx::GUEST;
const SIZE: u64 = 1 << 20;
const NAMES_KIND: u32 = 0x6803_f857;

struct Judge {
    rng: Rng,
    seen: HashSet<u64>,
    /// What the mark has to be; `None` while it is being changed.
    expected: Option<bool>,
    marked: u64,
    clear: u64,
    failure: Option<String>,
}

async fn open(storage: &StorageHandle, options: OpenOptions) -> Result<NodeHandle, String> {
    let image = Qcow2::open(&CX, storage.clone(), options).await.map_err(|error| error.to_string())?;
    Ok(NodeHandle::new(image))
}

/// Whether a state is marked; an error tells what must not be.
fn judge(media: &Media, seed: u64) -> Result<bool, String> {
    World::new(seed).run(async {
        let storage = StorageHandle::new(SimDisk::with(media.clone(), DiskOptions::default()));
        let header = Header::read(&CX, &storage, Purpose::Check).await.map_err(|error| error.to_string())?;
        let report = check(&CX, &storage, Repair::Nothing).await.map_err(|error| error.to_string())?;
        if report.corruptions + report.check_errors > 0 {
            return Err(format!("the check finds {:?}", report.messages));
        }
        let options = OpenOptions { read_only: true, fenced: true, ..OpenOptions::default() };
        let node = open(&storage, options).await?;
        if node.info().backing.map(|backing| backing.filename) != Some("base".into()) {
            return Err("the name of the backing file is gone".into());
        }
        // Stable before anybody looked.
        let first = node.read_vec(&CX, 0, 4096).await.map_err(|error| error.to_string())?;
        if first.iter().any(|byte| *byte != 1) {
            return Err("what was stable is gone".into());
        }
        Ok(header.is_fenced())
    })
}

impl Judge {
    fn look(&mut self, point: &CrashPoint) {
        let mut states: Vec<Media> = vec![point.power_cut(|_, _| false), point.kill(&mut self.rng)];
        match point.all_power_cuts(16) {
            Some(all) => states.extend(all),
            None => states.extend((0..6).map(|_| point.random_power_cut(&mut self.rng))),
        }
        for media in states {
            // The same bytes may be right at one moment and wrong at another.
            let key = media.hash() ^ self.expected.map_or(0, |marked| 1 + u64::from(marked));
            if self.failure.is_some() || !self.seen.insert(key) {
                continue;
            }
            match judge(&media, self.rng.next_u64()) {
                Err(error) => self.failure = Some(format!("{:?}: {error}", point.boundary)),
                Ok(marked) if self.expected.is_some_and(|expected| expected != marked) => {
                    self.failure = Some(format!("{:?}: marked is {marked}", point.boundary));
                }
                Ok(true) => self.marked += 1,
                Ok(false) => self.clear += 1,
            }
        }
    }
}

/// Takes the names of features out of an image: one that was made before there was this name.
async fn unname(storage: &StorageHandle) {
    let mut first = storage.read_vec(&CX, 0, 512).await.unwrap();
    let at = first.windows(4).position(|bytes| bytes == NAMES_KIND.to_be_bytes()).unwrap();
    first[at..at + 4].copy_from_slice(&7u32.to_be_bytes());
    storage.write(&CX, 0, first.freeze(), WriteFlags::empty()).await.unwrap();
    storage.sync(&CX).await.unwrap();
}

fn life(seed: u64, cluster_bytes: u64, older: bool) -> Result<(u64, u64), String> {
    let judge = Arc::new(Mutex::new(Judge {
        rng: Rng::new(seed),
        seen: HashSet::new(),
        expected: Some(false),
        marked: 0,
        clear: 0,
        failure: None,
    }));
    let expect = {
        let judge = judge.clone();
        move |expected| judge.lock().expect("unpoisoned").expected = expected
    };
    let result: Result<(), String> = World::new(seed).run(async {
        let latency = (Duration::from_micros(1), Duration::from_micros(300));
        let disk = SimDisk::with(Media::new(0), DiskOptions { seed, latency, ..DiskOptions::default() });
        let storage = StorageHandle::new(disk.clone());
        let backing = Some(BackingRef { filename: "base".into(), format: Some("raw".into()) });
        let new = CreateOptions { size: SIZE, cluster_bytes, backing, ..CreateOptions::default() };
        create(&CX, &storage, &new).await.map_err(|error| error.to_string())?;
        if older {
            unname(&storage).await;
        }
        let node = open(&storage, OpenOptions::default()).await?;
        let said = |error: infill_base::IoError| error.to_string();
        node.write(&CX, 0, vec![1; 4096], WriteFlags::empty()).await.map_err(said)?;
        node.sync(&CX).await.map_err(said)?;
        let looking = judge.clone();
        disk.observe(move |point| looking.lock().expect("unpoisoned").look(point));
        // Writes and rounds go on beside it, as before guests are held.
        let rng = Rc::new(RefCell::new(Rng::new(seed + 1000)));
        let beside = async |node: &NodeHandle| {
            for _ in 0..6 {
                let at = 4096 + rng.borrow_mut().below(SIZE - 8192);
                node.write(&CX, at, vec![2; 4000], WriteFlags::empty()).await.map_err(said)?;
                node.sync(&CX).await.map_err(said)?;
            }
            Ok::<(), String>(())
        };
        for marked in [true, false, true] {
            expect(None);
            let mark = async {
                let done = node.set_fence(&CX, marked).await.map_err(said);
                expect(Some(marked));
                done
            };
            let (written, done) = futures_util::future::join(beside(&node), mark).await;
            written.and(done)?;
            beside(&node).await?;
        }
        node.close(&CX).await.map_err(said)?;
        for marked in [false, true] {
            expect(None);
            set_fence(&CX, &storage, marked).await.map_err(|error| error.to_string())?;
            expect(Some(marked));
        }
        disk.stop_observing();
        judge.lock().expect("unpoisoned").look(&disk.crash_point());
        Ok(())
    });
    let judge = judge.lock().expect("unpoisoned");
    match &judge.failure {
        Some(failure) => Err(failure.clone()),
        None => result.map(|()| (judge.marked, judge.clear)),
    }
}

#[test]
fn no_crash_leaves_half_a_mark_or_harms_anything_else() {
    let seeds = match std::env::var("INFILL_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => vec![seed],
        None => (1..=4).collect::<Vec<u64>>(),
    };
    let (mut marked, mut clear) = (0, 0);
    for seed in seeds {
        for (cluster_bytes, older) in [(512, false), (4096, true), (65536, false), (65536, true)] {
            match life(seed, cluster_bytes, older) {
                Ok(seen) => (marked, clear) = (marked + seen.0, clear + seen.1),
                Err(failure) => panic!("INFILL_SEED={seed} clusters of {cluster_bytes}: {failure}"),
            }
        }
    }
    // A test that sees one kind alone says nothing.
    assert!(marked > 200 && clear > 200, "{marked} {clear}");
}
