//! *Completed* is durable: whoever dies at that instant, process or machine, the overlay holds every byte without its
//! backing.
//!
//! Both ways to die are tried many times. The process is killed (`kill -9`) while its files are in the page cache; the
//! power is cut on a storage of this test's own, an NBD export that keeps apart what was flushed and forgets the rest, or
//! a part of it, sector by sector.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::BytesMut;
use common::{output, run, text};
use infill_base::{
    Ctx, ErrorKind, Extent, ExtentKind, Extents, Gather, IoError, IoResult, Limits, WriteFlags, ZeroFlags,
};
use infill_io::{Address, Listener, Reactors};
use infill_nbd::{Export, Exports, Server, ServerLimits};
use infill_node::{NodeHandle, RawNode};
use infill_storage::{Storage, StorageHandle, rt};
use qmp::{Daemon, Program};
use serde_json::json;

/// How often each death is tried.
const ROUNDS: usize = 50;
/// Size of the disks, in bytes. Not a multiple of a cluster.
const DISK_BYTES: usize = (2 << 20) - 1536;
/// Size of the storage that forgets, in bytes. It cannot grow, and has little to spare.
const STORAGE_BYTES: usize = 4 << 20;
/// What a power cut tears nothing smaller than, in bytes.
const SECTOR_BYTES: usize = 512;

/// Numbers that look random, the same in every run of a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// A base with data, and a hole.
fn base(seed: u64) -> Vec<u8> {
    let mut random = Random(seed | 1);
    let mut data: Vec<u8> = (0..DISK_BYTES.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).collect();
    data.truncate(DISK_BYTES);
    data[300 << 10..700 << 10].fill(0);
    data
}

/// An overlay over `base.raw`, which holds no data yet.
fn create(dir: &Path, name: &str, options: &[&str]) -> std::path::PathBuf {
    let path = dir.join(name);
    let size = DISK_BYTES.to_string();
    let base = ["-b", "base.raw", "-F", "raw", text(&path), &size];
    run("qemu-img", &[&["create", "-q"], options, &base].concat());
    path
}

/// Streams `top` and returns at the instant at which it is told as completed.
fn stream_to_the_event(daemon: &Daemon, round: usize) {
    let mut qmp = daemon.connect();
    let by_hand = round % 5 == 4;
    qmp.run("block-stream", json!({"job-id": "j0", "device": "top", "auto-finalize": !by_hand}));
    if by_hand {
        qmp.wait_for("BLOCK_JOB_PENDING");
        qmp.run("job-finalize", json!({"id": "j0"}));
    }
    let completed = qmp.wait_for("BLOCK_JOB_COMPLETED");
    assert!(completed["data"].get("error").is_none(), "{completed}");
    assert_eq!(completed["data"]["len"], completed["data"]["offset"], "{completed}");
}

/// The image stands alone, is sound, and reads as `expected`.
fn stands_alone(image: &Path, format: &str, expected: &Path, what: &str) {
    let info: serde_json::Value =
        serde_json::from_str(&run("qemu-img", &["info", "--output=json", "-f", format, text(image)]))
            .unwrap();
    assert!(info.get("backing-filename").is_none(), "{what}: {info}");
    let check = output("qemu-img", &["check", "-q", "-f", format, text(image)]);
    let told = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(matches!(check.status.code(), Some(0 | 3)), "{what}: {} {told}", check.status);
    let compared = output("qemu-img", &["compare", "-f", format, "-F", "raw", text(image), text(expected)]);
    let told = String::from_utf8_lossy(&compared.stdout).into_owned();
    assert!(compared.status.success(), "{what}: {told}");
}

#[test]
fn a_daemon_killed_right_after_completed_has_lost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let formats: [(&str, &[&str]); 4] = [
        ("qcow2", &["-f", "qcow2"]),
        ("qcow2", &["-f", "qcow2", "-o", "extended_l2=on"]),
        ("qcow2", &["-f", "qcow2", "-o", "compat=0.10,cluster_size=4096"]),
        ("qed", &["-f", "qed"]),
    ];
    let (live, aside) = (dir.join("base.raw"), dir.join("aside.raw"));
    std::fs::write(&aside, base(7)).unwrap();
    std::fs::copy(&aside, &live).unwrap();
    let templates: Vec<_> = formats
        .iter()
        .enumerate()
        .map(|(nth, (_, options))| create(dir, &format!("template{nth}"), options))
        .collect();
    let image = dir.join("overlay");
    for round in 0..ROUNDS {
        let (format, options) = formats[round % formats.len()];
        std::fs::copy(&aside, &live).unwrap();
        std::fs::copy(&templates[round % formats.len()], &image).unwrap();
        let node = format!("{format},node-name=top,file.driver=file,file.filename={}", text(&image));
        let daemon = Daemon::start(Program::Infill, dir, &["--blockdev", &node]);
        stream_to_the_event(&daemon, round);
        daemon.process.kill();
        std::fs::remove_file(&live).unwrap();
        stands_alone(&image, format, &aside, &format!("round {round}, {options:?}"));
    }
}

#[derive(Default)]
struct Medium {
    /// What a power cut leaves.
    stable: Vec<u8>,
    /// What reads see.
    volatile: Vec<u8>,
    /// Sectors in which they differ, perhaps.
    unsynced: BTreeSet<usize>,
    syncs: usize,
}

/// A disk with a volatile cache.
#[derive(Clone, Default)]
struct Forgetful(Arc<Mutex<Medium>>);

impl Forgetful {
    fn medium(&self) -> MutexGuard<'_, Medium> {
        self.0.lock().unwrap()
    }

    fn insert(&self, image: &[u8]) {
        let mut stable = image.to_vec();
        stable.resize(STORAGE_BYTES, 0);
        let volatile = stable.clone();
        *self.medium() = Medium { stable, volatile, ..Medium::default() };
    }

    /// What is left after the power is cut now. Of the sectors that were not flushed those survive for which `survives`
    /// says so. Also how many were at stake, and how many flushes there were.
    fn cut(&self, mut survives: impl FnMut() -> bool) -> (Vec<u8>, usize, usize) {
        let medium = self.medium();
        let mut left = medium.stable.clone();
        for sector in &medium.unsynced {
            let range = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
            if survives() {
                left[range.clone()].copy_from_slice(&medium.volatile[range]);
            }
        }
        (left, medium.unsynced.len(), medium.syncs)
    }

    fn change(&self, at: u64, len: usize, fua: bool, change: impl FnOnce(&mut [u8])) -> IoResult<()> {
        let mut medium = self.medium();
        let start = at as usize;
        let Some(target) = medium.volatile.get_mut(start..start + len) else {
            return Err(IoError::new(ErrorKind::NoSpace, "the storage has a fixed size").at(at, len as u64));
        };
        change(target);
        if fua {
            let Medium { stable, volatile, .. } = &mut *medium;
            stable[start..start + len].copy_from_slice(&volatile[start..start + len]);
        } else if len > 0 {
            medium.unsynced.extend(start / SECTOR_BYTES..=(start + len - 1) / SECTOR_BYTES);
        }
        Ok(())
    }
}

impl Storage for Forgetful {
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn len(&self) -> u64 {
        STORAGE_BYTES as u64
    }
    fn name(&self) -> String {
        "a disk that forgets".into()
    }
    async fn read(&self, _: &Ctx, at: u64, mut buf: BytesMut) -> IoResult<BytesMut> {
        let medium = self.medium();
        let start = at as usize;
        let source = medium.volatile.get(start..start + buf.len());
        let source = source.ok_or_else(|| IoError::new(ErrorKind::InvalidInput, "behind the end"))?;
        buf.copy_from_slice(source);
        Ok(buf)
    }
    async fn write(&self, _: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        let bytes = data.to_bytes();
        let fua = flags.contains(WriteFlags::FUA);
        self.change(at, bytes.len(), fua, |target| target.copy_from_slice(&bytes))
    }
    async fn write_zeroes(&self, _: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.change(at, len as usize, flags.contains(ZeroFlags::FUA), |target| target.fill(0))
    }
    async fn discard(&self, _: &Ctx, _: u64, _: u64) -> IoResult<()> {
        Ok(())
    }
    async fn sync(&self, _: &Ctx) -> IoResult<()> {
        let mut medium = self.medium();
        medium.stable = medium.volatile.clone();
        medium.unsynced.clear();
        medium.syncs += 1;
        Ok(())
    }
    async fn set_len(&self, _: &Ctx, _: u64) -> IoResult<()> {
        Err(IoError::new(ErrorKind::Unsupported, "the storage has a fixed size"))
    }
    async fn extents(&self, _: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        Ok(vec![Extent { start: at, len, kind: ExtentKind::Data, host: None, compressed: false }])
    }
}

/// Serves `disk` at `socket`.
fn serve(reactors: &Reactors, disk: &Forgetful, socket: &Path) {
    let (disk, address) = (disk.clone(), Address::Unix(socket.to_owned()));
    reactors.block_on(move || async move {
        let node = NodeHandle::new(RawNode::new(StorageHandle::new(disk), false));
        let exports = Exports::new();
        exports.add(Export { writable: true, ..Export::new("disk", node) }).unwrap();
        let server = Server::new(exports, ServerLimits::default());
        let listener = Listener::bind(&address).unwrap();
        rt::spawn(async move {
            loop {
                let connection = listener.accept().await.unwrap().into_connection().unwrap();
                let server = server.clone();
                // A client that was killed ends its connection with an error.
                rt::spawn(async move { drop(server.serve(connection).await) });
            }
        });
    });
}

#[test]
fn a_power_cut_right_after_completed_has_lost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (live, aside, left) = (dir.join("base.raw"), dir.join("aside.raw"), dir.join("left.qcow2"));
    std::fs::write(&aside, base(11)).unwrap();
    std::fs::copy(&aside, &live).unwrap();
    let variants: [&[&str]; 3] = [
        &["-f", "qcow2"],
        &["-f", "qcow2", "-o", "extended_l2=on"],
        &["-f", "qcow2", "-o", "compat=0.10,cluster_size=4096"],
    ];
    let templates: Vec<_> = variants
        .iter()
        .enumerate()
        .map(|(nth, options)| std::fs::read(create(dir, &format!("template{nth}"), options)).unwrap())
        .collect();
    let disk = Forgetful::default();
    disk.insert(&[]);
    let socket = dir.join("disk.sock");
    let reactors = Reactors::start(1).unwrap();
    serve(&reactors, &disk, &socket);
    let node = format!(
        "qcow2,node-name=top,file.driver=nbd,file.server.type=unix,file.server.path={},file.export=disk,\
         backing.driver=raw,backing.file.driver=file,backing.file.filename={}",
        text(&socket),
        text(&live)
    );
    let mut random = Random(0x5eed);
    for round in 0..ROUNDS {
        disk.insert(&templates[round % variants.len()]);
        let daemon = Daemon::start(Program::Infill, dir, &["--blockdev", &node]);
        stream_to_the_event(&daemon, round);
        // Nothing of what was not flushed survives, or all of it, or a part.
        let (after, at_stake, syncs) = match round % 3 {
            0 => disk.cut(|| false),
            1 => disk.cut(|| random.next().is_multiple_of(2)),
            _ => disk.cut(|| true),
        };
        daemon.process.kill();
        assert!(
            syncs >= 3,
            "round {round}: data, mappings and header cannot be stable after {syncs} flushes"
        );
        std::fs::write(&left, after).unwrap();
        let what =
            format!("round {round}, {:?}, {at_stake} sectors at stake", variants[round % variants.len()]);
        stands_alone(&left, "qcow2", &aside, &what);
    }
}

/// The proof of the two above: a storage that loses what was not flushed loses it.
#[test]
fn the_storage_of_this_test_forgets() {
    let disk = Forgetful::default();
    disk.insert(&[]);
    disk.change(512, 1024, false, |target| target.fill(1)).unwrap();
    assert_eq!(disk.cut(|| false).0, vec![0; STORAGE_BYTES]);
    assert_eq!(disk.cut(|| true).0[512..1536], [1; 1024]);
    disk.change(0, 512, true, |target| target.fill(2)).unwrap();
    let (left, at_stake, _) = disk.cut(|| false);
    assert_eq!((left[0], left[512], at_stake), (2, 0, 2));
}
