//! A guest outlives its daemon: it writes, the daemon is killed, the guest connects to the next one and sends FLUSH, and
//! then the power is cut. Everything that was acknowledged before the FLUSH is there.
//!
//! The overlay lies on a storage that forgets what was not flushed. The real daemon loses the writes, which is shown, too.

mod common;
#[path = "common/forgetful.rs"]
mod forgetful;
#[path = "common/qmp.rs"]
mod qmp;

use std::path::{Path, PathBuf};

use bytes::Bytes;
use common::{output, run, text, wait_for_socket};
use forgetful::{Forgetful, Random, serve};
use infill_base::{Ctx, WriteFlags, ZeroFlags};
use infill_io::{Address, Reactors, connector};
use infill_nbd::{ClientOptions, NbdStorage, OnLost};
use infill_storage::{Storage, StorageHandle};
use qmp::{Daemon, Program};
use serde_json::json;

/// How often the daemon is killed.
const ROUNDS: usize = 50;
/// How often the real one is.
const ROUNDS_OF_THE_REFEREE: usize = 4;
/// How often the server of the storage restarts.
const RESTARTS: usize = 8;
/// Writes of a guest in a round.
const WRITES: usize = 24;
/// Size of the disk, in bytes. Not a multiple of a cluster.
const DISK_BYTES: usize = (2 << 20) - 1536;
/// Longest write, in bytes.
const WRITE_BYTES_MAX: u64 = 40 << 10;

/// Overlays, as `qemu-img` makes them.
const OVERLAYS: [&[&str]; 4] = [
    &["-f", "qcow2"],
    &["-f", "qcow2", "-o", "extended_l2=on"],
    &["-f", "qcow2", "-o", "cluster_size=4096"],
    WRITTEN_THROUGH,
];

/// It has nowhere to say that a journal belongs to it.
const WRITTEN_THROUGH: &[&str] = &["-f", "qcow2", "-o", "compat=0.10,cluster_size=4096"];

/// What a guest changes: first byte, length, and the data, or zeroes.
struct Change {
    at: u64,
    len: u64,
    data: Option<Bytes>,
}

impl Change {
    fn apply(&self, content: &mut [u8]) {
        let target = &mut content[self.at as usize..(self.at + self.len) as usize];
        match &self.data {
            Some(data) => target.copy_from_slice(data),
            None => target.fill(0),
        }
    }
}

/// The place of a test: a base, overlays without data, a storage, a socket for guests.
struct Place {
    dir: tempfile::TempDir,
    /// On a tmpfs.
    journal: tempfile::TempDir,
    base: Vec<u8>,
    overlays: Vec<Vec<u8>>,
    disk: Forgetful,
    random: Random,
}

impl Place {
    fn new(seed: u64) -> Place {
        let dir = tempfile::tempdir().unwrap();
        let mut random = Random(seed);
        let mut base: Vec<u8> =
            (0..DISK_BYTES.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).collect();
        base.truncate(DISK_BYTES);
        base[300 << 10..700 << 10].fill(0);
        std::fs::write(dir.path().join("base.raw"), &base).unwrap();
        let overlays = OVERLAYS.iter().enumerate().map(|(nth, options)| {
            let path = dir.path().join(format!("overlay{nth}"));
            let size = DISK_BYTES.to_string();
            let base = ["-b", "base.raw", "-F", "raw", text(&path), &size];
            run("qemu-img", &[&["create", "-q"], *options, &base].concat());
            std::fs::read(path).unwrap()
        });
        let overlays = overlays.collect();
        let journal = tempfile::tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm");
        Place { dir, journal, base, overlays, disk: Forgetful::default(), random }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A new overlay in the storage. Nobody has opened it, and no journal of the one before belongs to it.
    fn new_overlay(&self, round: usize) {
        self.disk.insert(&self.overlays[round % self.overlays.len()]);
        let _ = std::fs::remove_dir_all(self.path("state"));
        for file in std::fs::read_dir(self.journal.path()).unwrap() {
            std::fs::remove_file(file.unwrap().path()).unwrap();
        }
    }

    /// Serves the storage until it is dropped.
    fn serve(&self) -> Reactors {
        let socket = self.path("disk.sock");
        let _ = std::fs::remove_file(&socket);
        let reactors = Reactors::start(1).unwrap();
        serve(&reactors, &self.disk, &socket);
        reactors
    }

    /// Options of a daemon that serves the overlay.
    fn options(&self) -> Vec<String> {
        let disk = format!(
            "file.driver=nbd,file.server.type=unix,file.server.path={}",
            text(&self.path("disk.sock"))
        );
        let base = format!(
            "backing.driver=raw,backing.file.driver=file,backing.file.filename={}",
            text(&self.path("base.raw"))
        );
        [
            "--blockdev".into(),
            format!(
                "qcow2,node-name=top,discard=unmap,{disk},file.export=disk,file.reconnect-delay=600,{base}"
            ),
            "--nbd-server".into(),
            format!("addr.type=unix,addr.path={}", text(&self.path("guest.sock"))),
            "--export".into(),
            "nbd,id=guest,node-name=top,name=top,writable=on".into(),
        ]
        .into()
    }

    fn start(&self, program: Program, again: bool) -> Daemon {
        let mut options = self.options();
        if program == Program::Infill {
            if again {
                // Its state has them.
                options.clear();
            }
            let state = self.path("state");
            let state = ["--state", text(&state), "--journal", text(self.journal.path())];
            options.splice(0..0, state.map(String::from));
        }
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let _ = std::fs::remove_file(self.path("monitor.sock"));
        let daemon = Daemon::start(program, self.dir.path(), &options);
        wait_for_socket(&self.path("guest.sock"));
        daemon
    }

    /// What a guest changes on its disk, one after the other.
    fn changes(&mut self) -> Vec<Change> {
        (0..WRITES)
            .map(|_| {
                let len = self.random.next() % WRITE_BYTES_MAX + 1;
                let at = self.random.next() % (DISK_BYTES as u64 - len);
                let data = vec![(self.random.next() % 255 + 1) as u8; len as usize];
                let data = (!self.random.next().is_multiple_of(5)).then(|| Bytes::from(data));
                Change { at, len, data }
            })
            .collect()
    }

    /// Whether what a power cut leaves now is anything else than what the guest knows.
    fn differs(&mut self, expected: &[u8], torn: bool) -> bool {
        let random = &mut self.random;
        let (left, ..) = self.disk.cut(|| torn && random.next().is_multiple_of(2));
        let (image, raw) = (self.path("left.qcow2"), self.path("expected.raw"));
        std::fs::write(&image, left).unwrap();
        std::fs::write(&raw, expected).unwrap();
        let check = output("qemu-img", &["check", "-q", "-f", "qcow2", text(&image)]);
        assert!(matches!(check.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&check.stdout));
        let compared = ["compare", "-f", "qcow2", "-F", "raw", text(&image), text(&raw)];
        let compared = output("qemu-img", &compared);
        match compared.status.code() {
            Some(0) => false,
            Some(1) => true,
            _ => panic!("{}", String::from_utf8_lossy(&compared.stderr)),
        }
    }

    /// A guest writes, its daemon is killed, the guest flushes at the next one, power is cut. True: something is missing.
    fn round(&mut self, reactors: &Reactors, program: Program, round: usize) -> bool {
        self.new_overlay(round);
        let daemon = self.start(program, false);
        if round % 3 == 1 {
            // Populates beside it: the guest writes in place into what they have linked.
            daemon
                .connect()
                .run("block-stream", json!({"job-id": "fill", "device": "top", "speed": 1 << 20}));
        }
        let mut expected = self.base.clone();
        let changes = self.changes();
        changes.iter().for_each(|change| change.apply(&mut expected));
        let socket = self.path("guest.sock");
        let guest = write(reactors, &socket, changes);
        if program == Program::Infill {
            let journals = std::fs::read_dir(self.journal.path()).unwrap().count();
            assert_eq!(journals, usize::from(OVERLAYS[round % OVERLAYS.len()] != WRITTEN_THROUGH));
        }
        daemon.process.kill();
        drop(guest);
        let daemon = self.start(program, true);
        let before = self.disk.syncs();
        flush(reactors, &socket);
        assert!(self.disk.syncs() > before, "a FLUSH reaches the storage");
        let differs = self.differs(&expected, round % 2 == 1);
        daemon.process.kill();
        differs
    }
}

async fn connect(socket: PathBuf) -> NbdStorage {
    let options = ClientOptions {
        export: "top".into(),
        read_only: false,
        on_lost: OnLost::Fail,
        ..ClientOptions::default()
    };
    NbdStorage::connect(connector(&Address::Unix(socket)), options).await.unwrap()
}

/// Everything is acknowledged when it returns, and nothing flushed.
fn write(reactors: &Reactors, socket: &Path, changes: Vec<Change>) -> StorageHandle {
    let socket = socket.to_owned();
    reactors.block_on(move || async move {
        let guest = connect(socket).await;
        for Change { at, len, data } in changes {
            match data {
                Some(data) => guest.write(&Ctx::GUEST, at, data.into(), WriteFlags::empty()).await.unwrap(),
                None => guest.write_zeroes(&Ctx::GUEST, at, len, ZeroFlags::MAY_UNMAP).await.unwrap(),
            }
        }
        StorageHandle::new(guest)
    })
}

fn flush(reactors: &Reactors, socket: &Path) {
    let socket = socket.to_owned();
    reactors.block_on(move || async move { connect(socket).await.sync(&Ctx::GUEST).await.unwrap() });
}

#[test]
fn a_flush_at_the_daemon_s_successor_covers_what_the_dead_one_had_acknowledged() {
    let mut place = Place::new(0x0f1);
    place.disk.insert(&[]);
    let (_server, reactors) = (place.serve(), Reactors::start(1).unwrap());
    for round in 0..ROUNDS {
        assert!(
            !place.round(&reactors, Program::Infill, round),
            "round {round}: acknowledged writes are missing"
        );
    }
}

/// Shows that there is something to lose, and that this test would see it.
#[test]
fn the_real_daemon_loses_them() {
    let mut place = Place::new(0x0f2);
    place.disk.insert(&[]);
    let (_server, reactors) = (place.serve(), Reactors::start(1).unwrap());
    let lost = (0..ROUNDS_OF_THE_REFEREE).filter(|round| place.round(&reactors, Program::Qemu, 3 * round));
    let lost = lost.count();
    println!(
        "qemu-storage-daemon loses acknowledged and flushed writes in {lost} of {ROUNDS_OF_THE_REFEREE} rounds"
    );
    assert!(lost > 0, "the real daemon has learnt to keep them, or this test does not see it");
}

/// The server of the storage dies with all that was not flushed; the daemon lives on, and sends it again.
#[test]
fn a_storage_whose_server_restarts_loses_nothing() {
    let mut place = Place::new(0x0f3);
    let guests = Reactors::start(1).unwrap();
    for round in 0..RESTARTS {
        place.new_overlay(round);
        let server = place.serve();
        let daemon = place.start(Program::Infill, false);
        let mut expected = place.base.clone();
        let (first, second) = (place.changes(), place.changes());
        first.iter().chain(&second).for_each(|change| change.apply(&mut expected));
        let guest = place.path("guest.sock");
        drop(write(&guests, &guest, first));
        drop(server);
        place.disk.forget();
        let server = place.serve();
        drop(write(&guests, &guest, second));
        flush(&guests, &guest);
        assert!(!place.differs(&expected, round % 2 == 1), "round {round}: acknowledged writes are missing");
        daemon.process.kill();
        drop(server);
    }
}
