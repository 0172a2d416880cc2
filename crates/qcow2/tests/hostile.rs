//! Images that somebody has made to do harm: no panic, no endless work, no unbounded memory, no access outside.
//!
//! Every case runs in a process whose memory is limited, on a storage that counts what is asked of it.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::BytesMut;
use common::{arg, content, file, metadata, run_ok, set_word, word};
use infill_base::{
    Ctx, DiscardMode, ErrorKind, Extents, Gather, IoError, IoResult, Limits, WriteFlags, ZeroFlags,
};
use infill_node::{NodeHandle, Repair};
use infill_qcow2::{Compression, CreateOptions, OpenOptions, Qcow2, check, create};
use infill_sim::{Rng, World, block_on};
use infill_storage::{MemoryStorage, Storage, StorageHandle};

const CX: Ctx = Ctx::GUEST;

/// Address space of the process that runs the cases: the counters of a check may take 512 MiB of it.
const MEMORY_KIB: u64 = 3 << 20;
/// Operations that one case may ask of its storage.
const OPERATIONS_MAX: u64 = 300_000;
/// How much longer an image may become.
const GROWTH_BYTES: u64 = 64 << 20;

/// Bytes in memory that are asked for within reason only.
struct Watched {
    inner: Arc<MemoryStorage>,
    len_max: u64,
    operations: AtomicU64,
}

impl Watched {
    fn new(image: Vec<u8>) -> Watched {
        let len_max = image.len() as u64 + GROWTH_BYTES;
        Watched { inner: Arc::new(MemoryStorage::from_bytes(image)), len_max, operations: AtomicU64::new(0) }
    }

    fn begin(&self, at: u64, len: u64) -> IoResult<()> {
        let count = self.operations.fetch_add(1, Ordering::Relaxed);
        assert!(count < OPERATIONS_MAX, "the image makes endless work");
        if at.checked_add(len).is_none_or(|end| end > self.len_max) {
            return Err(IoError::new(ErrorKind::NoSpace, "no space is left").at(at, len));
        }
        Ok(())
    }
}

impl Storage for Watched {
    fn limits(&self) -> Limits {
        Storage::limits(&*self.inner)
    }
    fn len(&self) -> u64 {
        Storage::len(&*self.inner)
    }
    fn name(&self) -> String {
        "hostile".into()
    }
    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        let end = at.checked_add(buf.len() as u64);
        assert!(
            end.is_some_and(|end| end <= self.len()),
            "a read of {} bytes at {at} lies outside",
            buf.len()
        );
        self.begin(at, 0)?;
        Storage::read(&*self.inner, cx, at, buf).await
    }
    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        self.begin(at, data.len() as u64)?;
        Storage::write(&*self.inner, cx, at, data, flags).await
    }
    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.begin(at, len)?;
        Storage::write_zeroes(&*self.inner, cx, at, len, flags).await
    }
    async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.begin(at, 0)?;
        Storage::discard(&*self.inner, cx, at, len).await
    }
    async fn allocate(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.begin(at, len)?;
        Storage::allocate(&*self.inner, cx, at, len).await
    }
    async fn sync(&self, cx: &Ctx) -> IoResult<()> {
        self.begin(0, 0)?;
        Storage::sync(&*self.inner, cx).await
    }
    async fn set_len(&self, cx: &Ctx, len: u64) -> IoResult<()> {
        self.begin(len, 0)?;
        Storage::set_len(&*self.inner, cx, len).await
    }
    async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        Storage::extents(&*self.inner, cx, at, len).await
    }
}

/// Everything that can be done to an image. Errors are fine.
fn exercise(image: &[u8], rng: &mut Rng) -> Outcome {
    let world = World::new(rng.below(u64::MAX));
    let mut outcome = Outcome::default();
    let read_only = OpenOptions { read_only: true, ..OpenOptions::default() };
    let storage = StorageHandle::new(Watched::new(image.to_vec()));
    let mut seed = rng.fork();
    world.run(async {
        if let Ok(node) = Qcow2::open(&CX, storage, read_only).await {
            outcome.opened = true;
            let node = NodeHandle::new(node);
            for (at, len) in pieces(node.len(), &mut seed) {
                outcome.failed += u64::from(node.read_vec(&CX, at, len as usize).await.is_err());
                walk(&node, at).await;
            }
        }
    });
    let options = OpenOptions { discard: DiscardMode::Unmap, ..OpenOptions::default() };
    let storage = StorageHandle::new(Watched::new(image.to_vec()));
    let mut seed = rng.fork();
    world.run(async {
        if let Ok(node) = Qcow2::open(&CX, storage, options).await {
            outcome.written = true;
            write_everywhere(NodeHandle::new(node), &mut seed).await;
        }
    });
    for repair in [Repair::Nothing, Repair::Leaks, Repair::All] {
        let storage = StorageHandle::new(Watched::new(image.to_vec()));
        if let Ok(report) = world.run(check(&CX, &storage, repair)) {
            outcome.checked = true;
            assert!(report.messages.len() <= 2000);
        }
    }
    outcome
}

#[derive(Clone, Copy, Debug, Default)]
struct Outcome {
    opened: bool,
    written: bool,
    checked: bool,
    failed: u64,
}

/// Ranges all over a disk: its beginning, its end, and some between.
fn pieces(size: u64, rng: &mut Rng) -> Vec<(u64, u64)> {
    let mut pieces = vec![(0, size.min(1 << 20)), (size.saturating_sub(1 << 16), size.min(1 << 16))];
    for _ in 0..12 {
        let at = rng.below(size.max(1));
        pieces.push((at, (1 + rng.below(300_000)).min(size - at.min(size))));
    }
    pieces
}

/// Extents get on, and end.
async fn walk(node: &NodeHandle, from: u64) {
    let mut at = from;
    for _ in 0..64 {
        let left = node.len() - at.min(node.len());
        if left == 0 {
            break;
        }
        let Ok(extents) = node.extents(&CX, at, left).await else { break };
        let end = extents.last().map_or(at, |last| last.end());
        assert!(end > at && end <= node.len(), "extents from {at} end at {end}");
        at = end;
    }
}

async fn write_everywhere(node: NodeHandle, rng: &mut Rng) {
    for (at, len) in pieces(node.len(), rng) {
        let result = match rng.below(4) {
            0 => node.write_zeroes(&CX, at, len, ZeroFlags::MAY_UNMAP).await,
            1 => node.discard(&CX, at, len).await,
            _ => node.write(&CX, at, vec![0x5a; len as usize], WriteFlags::empty()).await,
        };
        if result.is_ok() && rng.per_mille(200) {
            let _ = node.sync(&CX).await;
        }
    }
    let _ = node.sync(&CX).await;
    let _ = node.close(&CX).await;
}

/// Sound images to start from.
fn images() -> Vec<(String, Vec<u8>)> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let mut images = Vec::new();
    for options in [
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=64k",
        "cluster_size=16k,extended_l2=on",
        "compat=0.10,cluster_size=4k",
        "cluster_size=1k,refcount_bits=1",
        "cluster_size=2M",
    ] {
        run_ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, arg(&path), "4M"]);
        let writes = [
            "-c",
            "write -P 1 0 300k",
            "-c",
            "write -P 2 1M 4k",
            "-c",
            "write -z 2M 128k",
            "-c",
            "write -P 3 3M 1M",
        ];
        run_ok("qemu-io", &[&["-f", "qcow2"][..], &writes, &[arg(&path)]].concat());
        if !options.contains("bits=1") && !options.contains("2M") {
            run_ok("qemu-img", &["snapshot", "-c", "one", arg(&path)]);
            run_ok("qemu-io", &["-f", "qcow2", "-c", "write -P 9 64k 200k", arg(&path)]);
        }
        images.push((options.to_owned(), std::fs::read(&path).unwrap()));
    }
    let mut source = content(1 << 20, 5);
    source[..600 << 10].iter_mut().enumerate().for_each(|(nth, byte)| *byte = (nth / 100) as u8);
    let source = file(&dir, "source.raw", &source);
    for kind in ["zlib", "zstd"] {
        let options = format!("cluster_size=4k,compression_type={kind}");
        run_ok(
            "qemu-img",
            &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, arg(&source), arg(&path)],
        );
        images.push((options, std::fs::read(&path).unwrap()));
    }
    for (cluster_bytes, extended_l2, size) in
        [(512, false, 1 << 30), (65536, true, 1 << 40), (2 << 20, false, 1 << 50)]
    {
        let memory = Arc::new(MemoryStorage::from_bytes(Vec::new()));
        let options = CreateOptions {
            size,
            cluster_bytes,
            extended_l2,
            compression: Compression::Zstd,
            ..CreateOptions::default()
        };
        block_on(create(&CX, &StorageHandle::from_arc(memory.clone()), &options)).unwrap();
        images.push((format!("{options:?}"), memory.to_bytes()));
    }
    images
}

/// Damages metadata by chance: words of tables, bytes of the header, the file's length.
fn damage(image: &mut Vec<u8>, places: &[(&'static str, usize, usize)], rng: &mut Rng) {
    for _ in 0..1 + rng.below(5) {
        let (_, start, len) = places[rng.index(places.len())];
        let at = start + rng.index((len / 8).min(1024)) * 8;
        let old = word(image, at);
        let any = word(image, places[rng.index(places.len())].1);
        let end = image.len() as u64;
        match rng.below(12) {
            0 => image[rng.index(112)] = rng.below(256) as u8,
            1 => {
                let place = 4 + rng.index(26) * 4;
                image[place..place + 4].copy_from_slice(&(rng.below(1 << 33) as u32).to_be_bytes());
            }
            2 => set_word(image, [8, 24, 40, 48, 64][rng.index(5)], rng.below(end / 256) * 512),
            3 => image.truncate((512 + rng.index(image.len())).max(places_end(places)).min(image.len())),
            4 => image.resize(image.len() + rng.index(3000), 0xff),
            5 => set_word(image, at, rng.below(u64::MAX)),
            6 => set_word(image, at, old ^ (1 << rng.below(64))),
            7 => set_word(image, at, (rng.below(end / 512 + 4) * 512) | (1 << 63)),
            8 => set_word(image, at, any),
            9 => set_word(image, at, (1 << 62) | rng.below(1 << 62)),
            // Tables that name each other, or themselves.
            10 => set_word(image, at, start as u64 | (1 << 63)),
            _ => set_word(image, at, u64::MAX >> rng.below(64)),
        }
    }
}

/// Damage is done in front of this.
fn places_end(places: &[(&'static str, usize, usize)]) -> usize {
    places.iter().map(|(_, start, len)| start + len.min(&8192)).max().unwrap_or(0)
}

/// Runs this test again in a process with bounded memory; `true` there.
fn is_bounded(name: &str) -> bool {
    if std::env::var_os("INFILL_BOUNDED").is_some() {
        return true;
    }
    let exe = std::env::current_exe().unwrap();
    let script = format!("ulimit -v {MEMORY_KIB}; exec \"$0\" --exact {name} --nocapture");
    let output = std::process::Command::new("sh")
        .args(["-c", &script, exe.to_str().unwrap()])
        .env("INFILL_BOUNDED", "1")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    false
}

#[test]
fn damage_by_chance_costs_no_panic_no_memory_and_no_endless_work() {
    if !is_bounded("damage_by_chance_costs_no_panic_no_memory_and_no_endless_work") {
        return;
    }
    let seeds = std::env::var("SEEDS").map_or(25, |seeds| seeds.parse().unwrap());
    let mut sum = [0u64; 5];
    for (nth, (_, image)) in images().into_iter().enumerate() {
        let places = metadata(&image);
        for seed in 0..seeds {
            let mut rng = Rng::new(nth as u64 * 1_000_000 + seed);
            let mut bad = image.clone();
            damage(&mut bad, &places, &mut rng);
            let outcome = exercise(&bad, &mut rng);
            let counts = [
                1,
                u64::from(outcome.opened),
                u64::from(outcome.written),
                u64::from(outcome.checked),
                u64::from(outcome.failed > 0),
            ];
            sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        }
    }
    let [cases, opened, written, checked, failed] = sum;
    assert!(
        opened * 2 > cases && checked * 2 > cases && failed * 20 > cases && written * 3 > cases,
        "{sum:?}"
    );
}

/// An image with two L2 tables' worth of data, a snapshot, and where its tables lie.
struct Victim {
    image: Vec<u8>,
    l1: usize,
    l2: usize,
    table: usize,
    block: usize,
    snapshots: usize,
}

const CLUSTER: usize = 4096;
const COPIED: u64 = 1 << 63;

fn victim() -> Victim {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("victim.qcow2");
    run_ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", arg(&path), "8M"]);
    run_ok("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 1M", arg(&path)]);
    run_ok("qemu-img", &["snapshot", "-c", "one", arg(&path)]);
    run_ok("qemu-io", &["-f", "qcow2", "-c", "write -P 2 0 1M", arg(&path)]);
    let image = std::fs::read(&path).unwrap();
    let (l1, table) = (word(&image, 40) as usize, word(&image, 48) as usize);
    let (block, snapshots) = (word(&image, table) as usize, word(&image, 64) as usize);
    let l2 = (word(&image, l1) & !COPIED) as usize;
    Victim { image, l1, l2, table, block, snapshots }
}

/// Writes all of the disk's first MiB, a cluster at a time; how many of the writes were refused as damage.
fn write_all(image: Vec<u8>) -> (u64, Vec<u8>) {
    let memory = Arc::new(MemoryStorage::from_bytes(image));
    let storage = StorageHandle::from_arc(memory.clone());
    let refused = block_on(async {
        let node = NodeHandle::new(Qcow2::open(&CX, storage, OpenOptions::default()).await.unwrap());
        let mut refused = 0;
        for nth in 0..256 {
            let data = vec![0x77; CLUSTER];
            match node.write(&CX, nth * CLUSTER as u64, data, WriteFlags::empty()).await {
                Ok(()) => {}
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                    refused += 1;
                }
            }
        }
        let _ = node.sync(&CX).await;
        let _ = node.close(&CX).await;
        refused
    });
    (refused, memory.to_bytes())
}

#[test]
fn a_guest_cannot_write_over_metadata_through_a_damaged_entry() {
    let sound = victim();
    assert_eq!(write_all(sound.image.clone()).0, 0);
    let targets = [
        ("L1 table", sound.l1, 8),
        ("L2 table", sound.l2, 0),
        ("refcount table", sound.table, CLUSTER),
        ("refcount block", sound.block, 0),
        ("snapshot table", sound.snapshots, 40),
    ];
    for (what, target, same) in targets {
        let mut image = sound.image.clone();
        set_word(&mut image, sound.l2 + 5 * 8, target as u64 | COPIED);
        let (refused, after) = write_all(image.clone());
        assert_eq!(refused, 1, "{what}");
        assert!(
            !after[target..target + CLUSTER].windows(16).any(|bytes| bytes == [0x77; 16]),
            "{what} was written"
        );
        assert!(after[target..target + same] == image[target..target + same], "{what}");
        assert_eq!(after[..512], image[..512], "header, {what}");
    }
}

#[test]
fn a_guest_cannot_give_metadata_back_through_a_damaged_entry() {
    let sound = victim();
    let targets = [
        ("L1 table", sound.l1, 8),
        ("L2 table", sound.l2, 4 * 8),
        ("refcount table", sound.table, CLUSTER),
        ("refcount block", sound.block, 8),
        ("snapshot table", sound.snapshots, 40),
    ];
    for (what, target, same) in targets {
        for (flag, kind) in [(COPIED, 0), (COPIED, 1), (COPIED, 2), (0, 0), (0, 1), (0, 2), (0, 3)] {
            let mut image = sound.image.clone();
            set_word(&mut image, sound.l2 + 5 * 8, target as u64 | flag);
            let memory = Arc::new(MemoryStorage::from_bytes(image.clone()));
            let storage = StorageHandle::from_arc(memory.clone());
            block_on(async {
                let options = OpenOptions { discard: DiscardMode::Unmap, ..OpenOptions::default() };
                let node = NodeHandle::new(Qcow2::open(&CX, storage, options).await.unwrap());
                let (at, len) = (5 * CLUSTER as u64, CLUSTER as u64);
                let _ = match kind {
                    0 => node.discard(&CX, at, len).await,
                    1 => node.write_zeroes(&CX, at, len, ZeroFlags::MAY_UNMAP).await,
                    2 => node.write_zeroes(&CX, at, len, ZeroFlags::empty()).await,
                    _ => node.write(&CX, at, vec![0x77; CLUSTER], WriteFlags::empty()).await,
                };
                let _ = node.sync(&CX).await;
                // Whatever was given back is used again.
                for nth in 0..300 {
                    let data = vec![0x55; CLUSTER];
                    let _ = node.write(&CX, (1 << 20) + nth * len, data, WriteFlags::empty()).await;
                }
                let _ = node.close(&CX).await;
            });
            let after = memory.to_bytes();
            assert_eq!(
                after[target..target + same],
                image[target..target + same],
                "{what}, {kind}, {flag:#x}"
            );
        }
    }
}

#[test]
fn a_damaged_l1_entry_makes_no_table_of_other_metadata() {
    let sound = victim();
    for (what, target) in [
        ("header", 0),
        ("L1 table", sound.l1),
        ("refcount table", sound.table),
        ("refcount block", sound.block),
        ("snapshot table", sound.snapshots),
    ] {
        let mut image = sound.image.clone();
        set_word(&mut image, sound.l1, target as u64 | COPIED);
        let before = image[target..target + CLUSTER].to_vec();
        let (refused, after) = write_all(image);
        assert!(refused > 0, "{what}: nothing was refused");
        if what != "refcount block" {
            assert!(after[target..target + CLUSTER] == before, "{what} was changed");
        }
    }
}

#[test]
fn a_truncated_image_is_told_at_every_length() {
    let sound = victim();
    let mut rng = Rng::new(7);
    for len in (0..sound.image.len()).step_by(777) {
        let mut image = sound.image.clone();
        image.truncate(len);
        let outcome = exercise(&image, &mut rng);
        assert!(
            len >= 4 * CLUSTER || !outcome.opened || outcome.failed > 0,
            "{len} bytes read as if all were there"
        );
    }
}
