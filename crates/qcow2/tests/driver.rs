//! The whole driver under concurrent load on a disk with latency, against a model in memory, in every geometry; what it
//! leaves is judged by its own check and by QEMU.
//!
//! Tasks hold the sectors that they touch, so the model knows every byte; they do not hold clusters, tables or the
//! image: what happens in one cluster at once is the driver's business.

mod common;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use common::{arg, assert_clean, file, run_ok};
use infill_base::{Class, Ctx, DiscardMode, ErrorKind, ExtentKind, IoResult, WriteFlags, ZeroFlags};
use infill_node::{BackingRef, NodeHandle, RawNode, Repair};
use infill_qcow2::{CreateOptions, OpenOptions, Qcow2, check, create};
use infill_sim::{DiskOp, DiskOptions, Media, Rng, SimDisk, World};
use infill_storage::{MemoryStorage, RangeLock, StorageHandle, rt};

const CX: Ctx = Ctx::GUEST;
const SECTOR: u64 = 512;
const TASKS: u64 = 6;

/// An image under load, and what it should hold.
struct Load {
    disk: SimDisk,
    node: NodeHandle,
    below: Option<Vec<u8>>,
    /// Each sector's bytes; `None`: unknown after a failed operation, until it is read.
    model: RefCell<Vec<Option<Vec<u8>>>>,
    sectors: RangeLock,
    /// How many operations failed.
    failed: Cell<u64>,
    what: String,
}

fn pattern(rng: &mut Rng, len: u64) -> Vec<u8> {
    let mut data = vec![0; len as usize];
    for sector in data.chunks_mut(SECTOR as usize) {
        let word = rng.next_u64().to_le_bytes();
        sector.iter_mut().enumerate().for_each(|(nth, byte)| *byte = word[nth % 8]);
    }
    data
}

impl Load {
    async fn new(options: &CreateOptions, below: Option<Vec<u8>>, seed: u64) -> Load {
        let latency = (Duration::from_micros(10), Duration::from_micros(300));
        let disk = SimDisk::with(Media::new(0), DiskOptions { seed, latency, ..DiskOptions::default() });
        create(&CX, &StorageHandle::new(disk.clone()), options).await.unwrap();
        let node = Load::open(&disk, below.as_ref()).await;
        let sectors = options.size / SECTOR;
        let model = (0..sectors)
            .map(|sector| {
                let mut bytes = vec![0; SECTOR as usize];
                if let Some(below) = &below {
                    let rest = below.get((sector * SECTOR) as usize..).unwrap_or_default();
                    let inside = rest.len().min(SECTOR as usize);
                    bytes[..inside].copy_from_slice(&rest[..inside]);
                }
                Some(bytes)
            })
            .collect();
        Load {
            disk,
            node,
            below,
            model: RefCell::new(model),
            sectors: RangeLock::new(),
            failed: Cell::new(0),
            what: format!("seed {seed}: {options:?}"),
        }
    }

    async fn open(disk: &SimDisk, below: Option<&Vec<u8>>) -> NodeHandle {
        let options = OpenOptions {
            discard: DiscardMode::Unmap,
            metadata_cache_bytes: 64 << 10,
            ..OpenOptions::default()
        };
        let node = Qcow2::open(&CX, StorageHandle::new(disk.clone()), options).await.unwrap();
        let node = NodeHandle::new(node);
        if let Some(below) = below {
            let base = RawNode::new(StorageHandle::new(MemoryStorage::from_bytes(below.clone())), true);
            node.backing().unwrap().replace(Some(NodeHandle::new(base))).await;
        }
        node
    }

    fn size(&self) -> u64 {
        self.model.borrow().len() as u64 * SECTOR
    }

    /// Takes note of what a range holds now, or (the operation failed) that it is unknown.
    fn set(&self, at: u64, data: Option<&[u8]>, len: u64) {
        let mut model = self.model.borrow_mut();
        for nth in 0..len / SECTOR {
            let start = (nth * SECTOR) as usize;
            model[(at / SECTOR + nth) as usize] =
                data.map(|data| data[start..start + SECTOR as usize].to_vec());
        }
    }

    /// Reads a range and compares it; what was unknown is known now.
    async fn verify(&self, at: u64, len: u64) -> IoResult<()> {
        let found = self.node.read_vec(&CX, at, len as usize).await?;
        let mut model = self.model.borrow_mut();
        for (nth, bytes) in found.chunks(SECTOR as usize).enumerate() {
            let sector = at as usize / SECTOR as usize + nth;
            match &mut model[sector] {
                Some(expected) => assert!(bytes == &expected[..], "{}: sector {sector} is wrong", self.what),
                unknown => *unknown = Some(bytes.to_vec()),
            }
        }
        Ok(())
    }

    fn fail<T>(&self, result: IoResult<T>) -> Option<T> {
        match result {
            Ok(done) => Some(done),
            Err(error) => {
                let expected = matches!(error.kind(), ErrorKind::Io | ErrorKind::NoSpace);
                assert!(expected, "{}: {error}", self.what);
                self.failed.set(self.failed.get() + 1);
                None
            }
        }
    }

    async fn step(&self, rng: &mut Rng) {
        let most = if rng.per_mille(100) { 1200 } else { 40 };
        let size = self.size();
        let at = rng.below(size / SECTOR) * SECTOR;
        let len = (SECTOR * (1 + rng.below(most))).min(size - at);
        let kind = rng.below(12);
        if kind >= 10 {
            self.fail(self.node.sync(&CX).await);
            return;
        }
        let _held = self.sectors.exclusive(at, at + len).await;
        match kind {
            0..=4 => {
                let data = pattern(rng, len);
                let fua = if rng.per_mille(50) { WriteFlags::FUA } else { WriteFlags::empty() };
                let done = self.fail(self.node.write(&CX, at, data.clone(), fua).await);
                self.set(at, done.map(|()| &data[..]), len);
            }
            5 => {
                let unmap = if rng.per_mille(500) { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
                let done = self.fail(self.node.write_zeroes(&CX, at, len, unmap).await);
                self.set(at, done.map(|()| vec![0; len as usize]).as_deref(), len);
            }
            6 => {
                self.fail(self.node.discard(&CX, at, len).await);
                self.discarded(at, len).await;
            }
            7 => self.populate(at, len, rng).await,
            8 => self.look(at, len).await,
            _ => drop(self.fail(self.verify(at, len).await)),
        }
    }

    /// A discarded sector reads as before or as zero.
    async fn discarded(&self, at: u64, len: u64) {
        let Some(found) = self.fail(self.node.read_vec(&CX, at, len as usize).await) else {
            return self.set(at, None, len);
        };
        let model = self.model.borrow();
        for (nth, bytes) in found.chunks(SECTOR as usize).enumerate() {
            let zero = bytes.iter().all(|byte| *byte == 0);
            let sector = at as usize / SECTOR as usize + nth;
            let same = model[sector].as_ref().is_none_or(|old| old == bytes);
            assert!(zero || same, "{}: discarded sector {sector} is neither", self.what);
        }
        drop(model);
        self.set(at, Some(&found), len);
    }

    /// Fills the units inside of a range from below: nothing changes for the guest.
    async fn populate(&self, at: u64, len: u64, rng: &mut Rng) {
        let unit = self.node.populate_unit();
        let (start, end) = (at / unit * unit, (at + len).next_multiple_of(unit).min(self.size()));
        let slot = self.node.backing().unwrap();
        let cx = Ctx::of(if rng.per_mille(500) { Class::Fill } else { Class::AroundMiss });
        let Some(fetched) = self.fail(slot.fetch(&cx, start, end - start).await) else { return };
        let done = self.node.populate(&cx, start, fetched.data, fetched.generation).await;
        if let Some(done) = self.fail(done) {
            assert_eq!(done.linked + done.lost + done.stale, end - start, "{}", self.what);
        }
    }

    /// What is told of a range agrees with what it holds.
    async fn look(&self, at: u64, len: u64) {
        let Some(extents) = self.fail(self.node.extents(&CX, at, len).await) else { return };
        let model = self.model.borrow();
        for extent in extents.iter().filter(|extent| extent.kind == ExtentKind::Zero) {
            for sector in extent.start / SECTOR..extent.end() / SECTOR {
                let zero = |bytes: &Vec<u8>| bytes.iter().all(|byte| *byte == 0);
                assert!(model[sector as usize].as_ref().is_none_or(zero), "{}: {extent:?}", self.what);
            }
        }
    }

    /// Steps of several tasks at once.
    async fn run(self: &Rc<Load>, rng: &mut Rng, steps: u64) {
        let (done, left) = (Rc::new(event_listener::Event::new()), Rc::new(Cell::new(TASKS)));
        for _ in 0..TASKS {
            let (load, mut rng) = (self.clone(), rng.fork());
            let (done, left) = (done.clone(), left.clone());
            rt::spawn(async move {
                for _ in 0..steps {
                    load.step(&mut rng).await;
                }
                left.set(left.get() - 1);
                done.notify(usize::MAX);
            });
        }
        loop {
            let listener = done.listen();
            if left.get() == 0 {
                break;
            }
            listener.await;
        }
    }

    async fn verify_all(&self) {
        for at in (0..self.size()).step_by(100 << 10) {
            self.verify(at, (100 << 10).min(self.size() - at)).await.unwrap();
        }
    }

    fn model_bytes(&self) -> Vec<u8> {
        self.model.borrow().iter().flat_map(|sector| sector.clone().unwrap()).collect()
    }

    /// Closes the image and opens it again.
    async fn reopened(self: Rc<Load>) -> Rc<Load> {
        self.node.close(&CX).await.unwrap();
        let Ok(mut load) = Rc::try_unwrap(self) else { panic!("somebody still uses it") };
        load.node = Load::open(&load.disk, load.below.as_ref()).await;
        Rc::new(load)
    }

    /// Both checks find the image clean, and QEMU reads what the model says.
    async fn judge(&self, dir: &tempfile::TempDir, leaks_allowed: bool) {
        let image = self.disk.media().to_bytes();
        let report = check(&CX, &StorageHandle::new(self.disk.clone()), Repair::Nothing).await.unwrap();
        assert_eq!(report.corruptions + report.check_errors, 0, "{}: {report:?}", self.what);
        assert!(leaks_allowed || report.leaks == 0, "{}: {report:?}", self.what);
        let path = file(dir, "image.qcow2", &image);
        if !leaks_allowed {
            assert_clean(&path, &self.what);
        }
        let model = file(dir, "model.raw", &self.model_bytes());
        run_ok("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", arg(&path), arg(&model)]);
    }
}

/// Every cluster size, and each with another refcount width; subclusters where they can be.
fn geometries() -> Vec<CreateOptions> {
    let mut all = Vec::new();
    for (nth, bits) in (9..=21).enumerate() {
        let size = (2 << 20) + 512 * 7;
        let plain = CreateOptions { cluster_bytes: 1 << bits, size, ..CreateOptions::default() };
        all.push(CreateOptions { refcount_bits: 1 << (nth % 7), ..plain.clone() });
        if bits >= 14 {
            all.push(CreateOptions { extended_l2: true, ..plain });
        } else {
            all.push(CreateOptions { version: 2, ..plain });
        }
    }
    all
}

/// Shorter than the disks over it.
fn below(rng: &mut Rng) -> Vec<u8> {
    let mut below = pattern(rng, (3 << 19) + 1024);
    below[300 << 10..500 << 10].fill(0);
    below
}

fn seeds(default: u64) -> u64 {
    std::env::var("SEEDS").map_or(default, |seeds| seeds.parse().unwrap())
}

#[test]
fn concurrent_operations_leave_what_the_model_says_in_every_geometry() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 0..seeds(1) {
        for (nth, options) in geometries().into_iter().enumerate() {
            let world = World::new(seed * 1000 + nth as u64);
            let mut rng = world.fork_rng();
            let overlay = (nth as u64 + seed).is_multiple_of(2);
            let base = overlay.then(|| below(&mut rng));
            let mut options = options;
            if let Some(base) = &base {
                file(&dir, "base.raw", base);
                options.backing =
                    Some(BackingRef { filename: "base.raw".into(), format: Some("raw".into()) });
            }
            world.run(async {
                let mut load = Rc::new(Load::new(&options, base, seed).await);
                for _ in 0..2 {
                    load.run(&mut rng, 40).await;
                    load.verify_all().await;
                    load = load.reopened().await;
                    load.judge(&dir, false).await;
                }
                load.verify_all().await;
                assert_eq!(load.failed.get(), 0, "{}", load.what);
            });
        }
    }
}

#[test]
fn failing_writes_lose_what_they_wrote_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 0..seeds(6) {
        for (nth, options) in
            geometries().into_iter().enumerate().filter(|(nth, _)| nth % 4 == seed as usize % 4)
        {
            let world = World::new(seed * 1000 + nth as u64);
            let mut rng = world.fork_rng();
            world.run(async {
                let mut load = Rc::new(Load::new(&options, None, seed).await);
                load.run(&mut rng, 10).await;
                let ops =
                    [DiskOp::Write, DiskOp::Read, DiskOp::Allocate, DiskOp::WriteZeroes, DiskOp::Discard];
                for op in ops {
                    load.disk.fail(op, rng.below(30), 1 + rng.below(4), ErrorKind::Io);
                }
                load.run(&mut rng, 25).await;
                load.disk.heal();
                load.node.sync(&CX).await.unwrap();
                load.verify_all().await;
                load.run(&mut rng, 10).await;
                load.verify_all().await;
                load = load.reopened().await;
                load.verify_all().await;
                load.judge(&dir, true).await;
            });
        }
    }
}

#[test]
fn a_full_disk_refuses_writes_reads_on_and_goes_on_once_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 0..seeds(6) {
        for (nth, options) in
            geometries().into_iter().enumerate().filter(|(nth, _)| nth % 4 == seed as usize % 4)
        {
            let world = World::new(seed * 1000 + nth as u64);
            let mut rng = world.fork_rng();
            world.run(async {
                let mut load = Rc::new(Load::new(&options, None, seed).await);
                load.run(&mut rng, 8).await;
                load.disk.set_capacity(StorageHandle::new(load.disk.clone()).len() + rng.below(100_000));
                load.run(&mut rng, 40).await;
                load.node.sync(&CX).await.unwrap_or_else(|error| panic!("{}: {error}", load.what));
                load.verify_all().await;
                load.disk.set_capacity(1 << 30);
                load.run(&mut rng, 10).await;
                load.verify_all().await;
                load = load.reopened().await;
                load.verify_all().await;
                load.judge(&dir, true).await;
            });
        }
    }
}

#[test]
fn after_a_failed_sync_nothing_more_is_written() {
    let world = World::new(1);
    world.run(async {
        let options = CreateOptions { size: 1 << 20, ..CreateOptions::default() };
        let load = Load::new(&options, None, 1).await;
        load.node.write(&CX, 0, vec![1; 4096], WriteFlags::empty()).await.unwrap();
        load.disk.fail(DiskOp::Sync, 0, 1, ErrorKind::Io);
        assert!(load.node.sync(&CX).await.is_err());
        load.disk.heal();
        assert!(load.node.sync(&CX).await.is_err(), "a failed sync was forgotten");
        let again = load.node.write(&CX, 1 << 19, vec![1; 4096], WriteFlags::empty()).await;
        assert_eq!(again.unwrap_err().kind(), ErrorKind::Poisoned);
        assert_eq!(load.node.read_vec(&CX, 0, 4096).await.unwrap()[0], 1);
    });
}

#[test]
fn qemu_and_we_take_turns_on_one_image_with_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("turns.qcow2");
    for (nth, options) in geometries().into_iter().enumerate().filter(|(nth, _)| nth % 3 == 1) {
        let snapshots = options.refcount_bits > 2;
        let world = World::new(nth as u64);
        let mut rng = world.fork_rng();
        world.run(async {
            let mut load = Rc::new(Load::new(&options, None, nth as u64).await);
            let mut taken: Option<Vec<u8>> = None;
            for turn in 0..3u64 {
                load.run(&mut rng, 15).await;
                load.node.close(&CX).await.unwrap();
                std::fs::write(&path, load.disk.media().to_bytes()).unwrap();
                if snapshots && turn == 0 {
                    run_ok("qemu-img", &["snapshot", "-c", "one", arg(&path)]);
                    taken = Some(load.model_bytes());
                }
                // QEMU writes a pattern over two megabytes' boundary, and zeroes.
                let (at, byte) = (rng.below(3000) * SECTOR, 1 + turn as u8);
                let write = format!("write -P {byte} {at} 64k");
                let zero = format!("write -z {} 32k", (1 << 20) + turn * 100 * 1024);
                run_ok("qemu-io", &["-f", "qcow2", "-c", &write, "-c", &zero, arg(&path)]);
                load.set(at, Some(&vec![byte; 64 << 10]), 64 << 10);
                load.set((1 << 20) + turn * 100 * 1024, Some(&vec![0; 32 << 10]), 32 << 10);
                assert_clean(&path, &load.what);
                let Ok(mut next) = Rc::try_unwrap(load) else { panic!("somebody still uses it") };
                let media = Media::from_bytes(&std::fs::read(&path).unwrap());
                next.disk = SimDisk::with(media, DiskOptions::default());
                next.node = Load::open(&next.disk, None).await;
                load = Rc::new(next);
                load.verify_all().await;
            }
            load.run(&mut rng, 15).await;
            load.verify_all().await;
            load = load.reopened().await;
            load.judge(&dir, false).await;
            if let Some(taken) = taken {
                let (image, raw) = (dir.path().join("image.qcow2"), dir.path().join("snapshot.raw"));
                let args = ["convert", "-f", "qcow2", "-l", "one", "-O", "raw", arg(&image), arg(&raw)];
                run_ok("qemu-img", &args);
                assert!(std::fs::read(raw).unwrap() == taken, "{}: the snapshot has changed", load.what);
            }
        });
    }
}

#[test]
fn zeroes_of_an_image_that_is_open_without_the_backing_that_it_names_stay_zero_with_it() {
    World::new(1).run(async {
        let storage = StorageHandle::new(MemoryStorage::new(0));
        let named = BackingRef { filename: "base".into(), format: Some("raw".into()) };
        let cx = Ctx::GUEST;
        for version in [2, 3] {
            storage.set_len(&cx, 0).await.unwrap();
            let backing = Some(named.clone());
            let options =
                CreateOptions { size: 1 << 20, version, backing, extended_l2: false, ..Default::default() };
            create(&cx, &storage, &options).await.unwrap();
            let open = || OpenOptions { discard: DiscardMode::Unmap, ..Default::default() };
            let alone = NodeHandle::new(Qcow2::open(&cx, storage.clone(), open()).await.unwrap());
            alone.write_zeroes(&cx, 0, 128 << 10, ZeroFlags::MAY_UNMAP).await.unwrap();
            alone.write(&cx, 256 << 10, vec![1; 64 << 10], WriteFlags::empty()).await.unwrap();
            alone.discard(&cx, 256 << 10, 64 << 10).await.unwrap();
            alone.close(&cx).await.unwrap();
            let over = NodeHandle::new(Qcow2::open(&cx, storage.clone(), open()).await.unwrap());
            let base = MemoryStorage::from_bytes(vec![7; 1 << 20]);
            let base = NodeHandle::new(RawNode::new(StorageHandle::new(base), true));
            over.backing().unwrap().replace(Some(base)).await;
            let zeroed = over.read_vec(&cx, 0, 128 << 10).await.unwrap();
            assert!(zeroed.iter().all(|byte| *byte == 0), "version {version}");
            let discarded = over.read_vec(&cx, 256 << 10, 64 << 10).await.unwrap();
            assert!(
                discarded.iter().all(|byte| *byte != 7),
                "version {version}: what the guest gave up is not the base's"
            );
            over.close(&cx).await.unwrap();
        }
    });
}
