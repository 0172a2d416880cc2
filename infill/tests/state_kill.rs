//! A daemon that is killed at random points, again and again, while a guest writes and a job fills its disk: nothing that
//! was answered is lost or torn, the job goes on from where it was, and it ends as if nothing had happened.
//!
//! The guest is a client of this test's own that knows which values each of its blocks may have. The source is a server of
//! this test's own that counts.

mod common;
#[path = "common/qmp.rs"]
mod qmp;
#[path = "common/stamped.rs"]
mod stamped;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::BytesMut;
use common::{output, run, text, wait_until};
use infill_base::{
    Ctx, ErrorKind, Extent, ExtentKind, Extents, Gather, IoError, IoResult, Limits, WriteFlags, ZeroFlags,
};
use infill_io::{Address, Listener, Reactors};
use infill_nbd::{Export, Exports, Server, ServerLimits};
use infill_node::{NodeHandle, RawNode};
use infill_storage::{Storage, StorageHandle, rt};
use qmp::{Daemon, Program, Qmp};
use serde_json::json;
use stamped::{BLOCK_BYTES, DISK_BYTES, Guest, Random, content, dies, seed};

/// How often a daemon is killed, or told to end, under a guest.
const ROUNDS: usize = 20;
/// How often it is killed in the soak, which takes some minutes:
/// `cargo test --profile ci -p infill --test state_kill -- --ignored --nocapture`.
const SOAK_KILLS: usize = 500;
/// How fast jobs fill, in bytes per second, so that they live through several deaths.
const SPEED: u64 = 6 << 20;
/// Bytes that may be fetched twice beside those that were in flight.
const TWICE_BYTES_MAX: u64 = 1 << 20;
/// How long the source takes for each request.
const SOURCE_LATENCY: Duration = Duration::from_millis(2);

/// The source: what is asked of it is counted.
#[derive(Clone, Default)]
struct Source(Arc<Counts>);

#[derive(Default)]
struct Counts {
    read: AtomicU64,
    in_flight: AtomicU64,
    in_flight_max: AtomicU64,
    /// Blocks of 512 bytes that were read.
    distinct: Mutex<HashSet<u64>>,
}

impl Source {
    fn read_bytes(&self) -> u64 {
        self.0.read.load(Ordering::SeqCst)
    }

    fn twice_bytes(&self) -> u64 {
        self.read_bytes() - self.0.distinct.lock().unwrap().len() as u64 * 512
    }
}

impl Storage for Source {
    fn limits(&self) -> Limits {
        Limits { writable: false, ..Limits::default() }
    }
    fn len(&self) -> u64 {
        DISK_BYTES
    }
    fn name(&self) -> String {
        "a source that counts".into()
    }
    async fn read(&self, _: &Ctx, at: u64, mut buf: BytesMut) -> IoResult<BytesMut> {
        let (len, counts) = (buf.len() as u64, &self.0);
        counts.read.fetch_add(len, Ordering::SeqCst);
        let now = counts.in_flight.fetch_add(len, Ordering::SeqCst) + len;
        counts.in_flight_max.fetch_max(now, Ordering::SeqCst);
        counts.distinct.lock().unwrap().extend(at / 512..(at + len) / 512);
        rt::sleep(SOURCE_LATENCY).await;
        let (first, last) = (at / BLOCK_BYTES, (at + len - 1) / BLOCK_BYTES);
        let blocks: Vec<u8> = (first..=last).flat_map(|block| content(block, 0)).collect();
        let from = (at - first * BLOCK_BYTES) as usize;
        buf.copy_from_slice(&blocks[from..from + len as usize]);
        counts.in_flight.fetch_sub(len, Ordering::SeqCst);
        Ok(buf)
    }
    async fn write(&self, _: &Ctx, _: u64, _: Gather, _: WriteFlags) -> IoResult<()> {
        Err(IoError::new(ErrorKind::Unsupported, "the source"))
    }
    async fn write_zeroes(&self, _: &Ctx, _: u64, _: u64, _: ZeroFlags) -> IoResult<()> {
        Err(IoError::new(ErrorKind::Unsupported, "the source"))
    }
    async fn discard(&self, _: &Ctx, _: u64, _: u64) -> IoResult<()> {
        Ok(())
    }
    async fn sync(&self, _: &Ctx) -> IoResult<()> {
        Ok(())
    }
    async fn set_len(&self, _: &Ctx, _: u64) -> IoResult<()> {
        Err(IoError::new(ErrorKind::Unsupported, "the source"))
    }
    async fn extents(&self, _: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        Ok(vec![Extent { start: at, len, kind: ExtentKind::Data, host: None, compressed: false }])
    }
}

/// A directory with a source, an overlay over it, and a state.
struct Place {
    dir: PathBuf,
    reactors: Arc<Reactors>,
    source: Source,
    /// It outlives the process in memory.
    journal: tempfile::TempDir,
}

impl Place {
    fn new(dir: &Path, name: &str) -> Place {
        let dir = dir.join(name);
        std::fs::create_dir(&dir).unwrap();
        let journal = tempfile::tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm");
        let reactors = Arc::new(Reactors::start(1).unwrap());
        let place = Place { dir, reactors, source: Source::default(), journal };
        place.serve_source();
        let size = DISK_BYTES.to_string();
        run("qemu-img", &["create", "-q", "-f", "qcow2", text(&place.dir.join("top.qcow2")), &size]);
        place
    }

    fn serve_source(&self) {
        let (source, address) = (self.source.clone(), Address::Unix(self.dir.join("source.sock")));
        self.reactors.block_on(move || async move {
            let node = NodeHandle::new(RawNode::new(StorageHandle::new(source), true));
            let exports = Exports::new();
            exports.add(Export::new("source", node)).unwrap();
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

    fn start(&self) -> (Daemon, Qmp) {
        let (state, journal) = (self.dir.join("state"), self.journal.path());
        let options = ["--state", text(&state), "--journal", text(journal)];
        let daemon = Daemon::start(Program::Infill, &self.dir, &options);
        let qmp = daemon.connect();
        (daemon, qmp)
    }

    /// Adds the overlay, exports it as `disk` and begins to fill it.
    fn begin(&self, qmp: &mut Qmp, speed: u64) {
        let path = |name: &str| self.dir.join(name);
        qmp.run(
            "blockdev-add",
            json!({
                "driver": "qcow2", "node-name": "top",
                "file": {"driver": "file", "filename": path("top.qcow2")},
                "backing": {"driver": "nbd", "node-name": "source", "export": "source",
                            "server": {"type": "unix", "path": path("source.sock")}},
            }),
        );
        qmp.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": path("nbd.sock")}}}));
        let export = json!({"type": "nbd", "id": "e", "node-name": "top", "name": "disk", "writable": true});
        qmp.run("block-export-add", export);
        qmp.run("block-stream", json!({"job-id": "j", "device": "top", "speed": speed}));
    }

    fn is_done(&self, qmp: &mut Qmp) -> bool {
        qmp.run("query-jobs", json!({})) == json!([])
    }

    /// Ends the daemon; then the overlay stands alone, is sound and reads as the guest knows it.
    fn ends_well(self, daemon: Daemon, mut qmp: Qmp, guest: &Guest) {
        // It may be done already.
        qmp.ask("block-job-set-speed", json!({"device": "j", "speed": 0}));
        wait_until("the job is done", || self.is_done(&mut qmp));
        daemon.quit(&mut qmp);
        let top = self.dir.join("top.qcow2");
        // A kill may leak clusters, and nothing else.
        let check = output("qemu-img", &["check", "-q", "-f", "qcow2", text(&top)]);
        let told = String::from_utf8_lossy(&check.stdout);
        assert!(matches!(check.status.code(), Some(0 | 3)), "{} {told}", check.status);
        let raw = self.dir.join("raw");
        run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&top), text(&raw)]);
        let disk = std::fs::read(&raw).unwrap();
        for (block, found) in disk.chunks(BLOCK_BYTES as usize).enumerate() {
            guest.check(block as u64, found);
        }
        std::fs::remove_dir_all(&self.dir).unwrap();
    }
}

#[test]
fn nothing_is_lost_and_the_job_goes_on_when_a_daemon_dies_at_random_points_under_a_guest() {
    dies_under_a_guest(ROUNDS, |round| round % 4 == 0);
}

#[test]
#[ignore = "it takes some minutes"]
fn nothing_is_lost_when_a_daemon_is_killed_five_hundred_times_under_a_guest() {
    dies_under_a_guest(SOAK_KILLS, |_| false);
}

/// A daemon dies `rounds` times, in order where that says so, else by `kill -9`.
fn dies_under_a_guest(rounds: usize, in_order: impl Fn(usize) -> bool) {
    let seed = seed();
    let mut random = Random(seed | 1);
    let dir = tempfile::tempdir().unwrap();
    let mut disks = 0;
    let mut round = 0;
    while round < rounds {
        disks += 1;
        let place = Place::new(dir.path(), &format!("disk{disks}"));
        let guest = Arc::new(Mutex::new(Guest::new(random.next())));
        let (mut daemon, mut qmp) = place.start();
        place.begin(&mut qmp, SPEED);
        while round < rounds && !place.is_done(&mut qmp) {
            round += 1;
            let at = 1 + random.below(300);
            dies(&place.dir, &place.reactors, &guest, at, daemon.process, in_order(round));
            (daemon, qmp) = place.start();
        }
        let guest = Arc::into_inner(guest).unwrap().into_inner().unwrap();
        place.ends_well(daemon, qmp, &guest);
    }
    println!("{rounds} deaths, {disks} disks");
}

#[test]
fn a_job_that_is_killed_fetches_no_more_twice_than_what_was_in_flight_and_a_little() {
    let seed = seed();
    let mut random = Random(seed | 1);
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path(), "disk");
    let (mut daemon, mut qmp) = place.start();
    // At a speed at which what has come is kept at once: what is asked for and not kept is what the source sees in flight.
    place.begin(&mut qmp, 2 * SPEED);
    let mut kills = 0;
    let mut allowed = 0;
    while !place.is_done(&mut qmp) {
        let until = place.source.read_bytes() + random.below(DISK_BYTES / 6);
        wait_until("the job gets on", || place.source.read_bytes() >= until || place.is_done(&mut qmp));
        daemon.process.kill();
        kills += 1;
        allowed += place.source.0.in_flight_max.swap(0, Ordering::SeqCst) + TWICE_BYTES_MAX;
        let twice = place.source.twice_bytes();
        assert!(twice <= allowed, "{twice} bytes were fetched twice after {kills} kills; {allowed} may be");
        (daemon, qmp) = place.start();
    }
    println!("{} bytes were fetched twice after {kills} kills; {allowed} may be", place.source.twice_bytes());
    assert!(kills > 1, "{kills}");
    daemon.quit(&mut qmp);
}
