//! Jobs that copy a disk go on where they were when the daemon that is killed is started again: under a guest that writes and
//! verifies, with nothing lost, and with hardly anything copied twice.

mod common;
#[path = "common/qmp.rs"]
mod qmp;
#[path = "common/stamped.rs"]
mod stamped;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use common::{run, text, wait_until};
use infill_io::Reactors;
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};
use stamped::{BLOCK_BYTES, BLOCKS, DISK_BYTES, Guest, Random, answered_is_kept, content, seed, work};

/// How often a daemon is killed, or told to end, under a guest.
const ROUNDS: usize = 12;
/// How fast jobs copy, in bytes per second, so that they live through several deaths.
const SPEED: u64 = 8 << 20;
/// Bytes that may be copied twice beside what was written meanwhile.
const TWICE_BYTES_MAX: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Mirror(&'static str),
    Commit,
}

const KINDS: [Kind; 3] = [Kind::Mirror("background"), Kind::Mirror("write-blocking"), Kind::Commit];

impl Kind {
    /// The node that is copied to.
    fn target(self) -> &'static str {
        match self {
            Kind::Mirror(_) => "copy",
            Kind::Commit => "base",
        }
    }
}

/// A disk, and where it is copied to.
struct Place {
    dir: PathBuf,
    journal: tempfile::TempDir,
    reactors: Arc<Reactors>,
    /// The format of the target.
    format: &'static str,
}

impl Place {
    fn new(dir: &Path, name: &str, kind: Kind, format: &'static str) -> Place {
        let dir = dir.join(name);
        std::fs::create_dir(&dir).unwrap();
        let path = |name: &str| text(&dir.join(name)).to_owned();
        let size = DISK_BYTES.to_string();
        let disk: Vec<u8> = (0..BLOCKS).flat_map(|block| content(block, 0)).collect();
        std::fs::write(path("first"), disk).unwrap();
        run("qemu-img", &["create", "-q", "-f", format, &path(kind.target()), &size]);
        match kind {
            Kind::Mirror(_) => run("qemu-img", &["create", "-q", "-f", "qcow2", &path("top"), &size]),
            Kind::Commit => {
                let base = path("base");
                run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", format, &path("top")])
            }
        };
        let convert = ["convert", "-n", "-f", "raw", "-O", "qcow2"];
        run("qemu-img", &[&convert[..], &[&path("first"), &path("top")]].concat());
        let journal = tempfile::tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm");
        Place { dir, journal, reactors: Arc::new(Reactors::start(1).unwrap()), format }
    }

    fn start(&self) -> (Daemon, Qmp) {
        let (state, journal) = (self.dir.join("state"), self.journal.path());
        let options = ["--state", text(&state), "--journal", text(journal)];
        let daemon = Daemon::start(Program::Infill, &self.dir, &options);
        let qmp = daemon.connect();
        (daemon, qmp)
    }

    fn begin(&self, qmp: &mut Qmp, kind: Kind) {
        let path = |name: &str| self.dir.join(name);
        let file = |name: &str| json!({"driver": "file", "filename": path(name)});
        let target = kind.target();
        qmp.run("blockdev-add", json!({"driver": self.format, "node-name": target, "file": file(target)}));
        let below = if kind == Kind::Commit { json!("base") } else { Value::Null };
        let top = json!({"driver": "qcow2", "node-name": "top", "file": file("top"), "backing": below});
        qmp.run("blockdev-add", top);
        qmp.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": path("nbd.sock")}}}));
        let export = json!({"type": "nbd", "id": "e", "node-name": "top", "name": "disk", "writable": true});
        qmp.run("block-export-add", export);
        match kind {
            Kind::Mirror(mode) => {
                let mirror = json!({"job-id": "j", "device": "top", "target": "copy", "sync": "full",
                                    "copy-mode": mode, "speed": SPEED});
                qmp.run("blockdev-mirror", mirror)
            }
            Kind::Commit => qmp.run("block-commit", json!({"job-id": "j", "device": "top", "speed": SPEED})),
        };
    }

    /// The files of maps.
    fn maps(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.journal.path()).unwrap().flatten();
        let maps = entries.filter(|entry| entry.file_name().to_str().unwrap().starts_with("copy-"));
        maps.map(|entry| entry.path()).collect()
    }
}

fn job(qmp: &mut Qmp) -> Option<Value> {
    qmp.run("query-block-jobs", json!({})).as_array().unwrap().first().cloned()
}

fn wait_ready(qmp: &mut Qmp) {
    qmp.run("block-job-set-speed", json!({"device": "j", "speed": 0}));
    wait_until("the job is ready", || job(qmp).expect("it goes on")["ready"] == json!(true));
}

/// Ends a ready job by `how`, and the daemon.
fn end(daemon: Daemon, mut qmp: Qmp, how: &str) {
    qmp.run(how, json!({"device": "j"}));
    wait_until("the job is over", || job(&mut qmp).is_none());
    let completed = qmp.wait_for("BLOCK_JOB_COMPLETED");
    assert!(completed["data"].get("error").is_none(), "{completed}");
    daemon.quit(&mut qmp);
}

/// Marks the blocks of a raw copy that are as they are to be, so that whoever writes them is seen.
fn plant(path: &Path, guest: &Guest) -> Vec<bool> {
    let mut copy = std::fs::read(path).unwrap();
    let mut planted = Vec::new();
    for (block, found) in copy.chunks_mut(BLOCK_BYTES as usize).enumerate() {
        let allowed = &guest.allowed[block];
        let is_there = allowed.len() == 1 && found == content(block as u64, allowed[0]);
        found[0] ^= if is_there { 0xff } else { 0 };
        planted.push(is_there);
    }
    std::fs::write(path, copy).unwrap();
    planted
}

/// Checks a raw copy; gives the bytes of planted blocks that were written again.
fn judge(path: &Path, guest: &Guest, planted: &[bool]) -> u64 {
    let mut copy = std::fs::read(path).unwrap();
    let mut again = 0;
    for (block, found) in copy.chunks_mut(BLOCK_BYTES as usize).enumerate() {
        let as_planted = |found: &[u8]| found[0] ^ 0xff == content(block as u64, guest.allowed[block][0])[0];
        if planted[block] && as_planted(found) {
            found[0] ^= 0xff;
        } else if planted[block] {
            again += BLOCK_BYTES;
        }
        guest.check(block as u64, found);
    }
    again
}

#[test]
fn what_was_copied_before_a_kill_is_not_copied_again() {
    let mut random = Random(seed() | 1);
    let dir = tempfile::tempdir().unwrap();
    for (nth, kind) in KINDS.into_iter().cycle().take(9).enumerate() {
        let place = Place::new(dir.path(), &format!("disk{nth}"), kind, "raw");
        let guest = Arc::new(Mutex::new(Guest::new(random.next())));
        let (daemon, mut qmp) = place.start();
        place.begin(&mut qmp, kind);
        if nth >= 6 {
            wait_ready(&mut qmp);
        }
        let mut daemon = Some(daemon);
        work(&place.dir, &place.reactors, &guest, 1 + random.below(2000), || {
            daemon.take().unwrap().process.kill();
        });
        answered_is_kept(&guest);
        let guest = Arc::into_inner(guest).unwrap().into_inner().unwrap();
        let copy = place.dir.join(kind.target());
        let planted = plant(&copy, &guest);
        assert_eq!(place.maps().len(), 1);
        let (daemon, mut qmp) = place.start();
        let offset = job(&mut qmp).expect("it goes on")["offset"].as_u64().unwrap();
        wait_ready(&mut qmp);
        end(daemon, qmp, "block-job-cancel");
        let again = judge(&copy, &guest, &planted);
        let there = planted.iter().filter(|planted| **planted).count() as u64 * BLOCK_BYTES;
        println!("{kind:?}: {there} bytes were there, {again} were written again; it went on at {offset}");
        assert!(again < TWICE_BYTES_MAX, "{kind:?}: {again} of {there} bytes were written again");
        assert_eq!(place.maps(), Vec::<PathBuf>::new(), "a job that is over leaves no map");
    }
}

#[test]
fn nothing_is_lost_when_a_daemon_dies_again_and_again_under_a_copy() {
    let mut random = Random(seed() | 1);
    let dir = tempfile::tempdir().unwrap();
    for kind in KINDS {
        let place = Place::new(dir.path(), &format!("{kind:?}"), kind, "qcow2");
        let guest = Arc::new(Mutex::new(Guest::new(random.next())));
        let (mut daemon, mut qmp) = place.start();
        place.begin(&mut qmp, kind);
        for round in 0..ROUNDS {
            if round == ROUNDS / 2 {
                wait_ready(&mut qmp);
            }
            let in_order = round % 4 == 3;
            let mut old = Some(daemon);
            work(&place.dir, &place.reactors, &guest, 1 + random.below(1000), || {
                let mut daemon = old.take().unwrap();
                if in_order {
                    daemon.process.signal("TERM");
                    daemon.process.wait_for_success();
                } else {
                    daemon.process.kill();
                }
            });
            answered_is_kept(&guest);
            (daemon, qmp) = place.start();
        }
        wait_ready(&mut qmp);
        let mut old = Some((daemon, qmp));
        work(&place.dir, &place.reactors, &guest, 200, || {
            let (daemon, qmp) = old.take().unwrap();
            end(daemon, qmp, "block-job-complete");
        });
        answered_is_kept(&guest);
        let guest = Arc::into_inner(guest).unwrap().into_inner().unwrap();
        let (copy, raw) = (place.dir.join(kind.target()), place.dir.join("raw"));
        run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&copy), text(&raw)]);
        judge(&raw, &guest, &vec![false; BLOCKS as usize]);
    }
}

/// What becomes of a map file.
type Damage = fn(&Path);

const DAMAGES: [(&str, Damage); 4] = [
    ("deleted", |path| std::fs::remove_file(path).unwrap()),
    ("cut off", |path| {
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(4104).unwrap();
    }),
    ("overwritten in the middle", |path| {
        let mut map = std::fs::read(path).unwrap();
        // A word that says that nothing is left, and its check does not fit.
        map[4096 + 32..4096 + 40].fill(0);
        std::fs::write(path, map).unwrap();
    }),
    ("of another start of the machine", |path| {
        let mut map = std::fs::read(path).unwrap();
        map[16] ^= 1;
        std::fs::write(path, map).unwrap();
    }),
];

#[test]
fn without_its_map_everything_is_copied_again() {
    let mut random = Random(seed() | 1);
    let dir = tempfile::tempdir().unwrap();
    for (nth, (what, damage)) in DAMAGES.into_iter().enumerate() {
        let kind = KINDS[nth % 3];
        let place = Place::new(dir.path(), &format!("disk{nth}"), kind, "raw");
        let guest = Arc::new(Mutex::new(Guest::new(random.next())));
        let (daemon, mut qmp) = place.start();
        place.begin(&mut qmp, kind);
        wait_ready(&mut qmp);
        let mut daemon = Some(daemon);
        work(&place.dir, &place.reactors, &guest, 200, || daemon.take().unwrap().process.kill());
        answered_is_kept(&guest);
        let guest = Arc::into_inner(guest).unwrap().into_inner().unwrap();
        let copy = place.dir.join(kind.target());
        let planted = plant(&copy, &guest);
        place.maps().iter().for_each(|map| damage(map));
        let (daemon, mut qmp) = place.start();
        wait_ready(&mut qmp);
        end(daemon, qmp, "block-job-cancel");
        let again = judge(&copy, &guest, &planted);
        let there = planted.iter().filter(|planted| **planted).count() as u64 * BLOCK_BYTES;
        assert_eq!(again, there, "{what}: all is copied again");
    }
}
