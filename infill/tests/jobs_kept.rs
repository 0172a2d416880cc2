//! Jobs that copy a disk go on where they were when the daemon that is killed is started again: under a guest that writes and
//! verifies, with nothing lost, and with hardly anything copied twice.

mod common;
#[path = "common/qmp.rs"]
mod qmp;
#[path = "common/stamped.rs"]
mod stamped;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use common::{run, text, wait_until};
use infill_io::Reactors;
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};
use stamped::{BLOCK_BYTES, BLOCKS, DISK_BYTES, Guest, Random, answered_is_kept, content, dies, seed, work};

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
    DriveMirror,
    Backup,
    DriveBackup,
}

const KINDS: [Kind; 6] = [
    Kind::Mirror("background"),
    Kind::Mirror("write-blocking"),
    Kind::Commit,
    Kind::DriveMirror,
    Kind::Backup,
    Kind::DriveBackup,
];

impl Kind {
    /// The node that is copied to.
    fn target(self) -> &'static str {
        if self == Kind::Commit { "base" } else { "copy" }
    }

    /// Whether the disk as it was is copied.
    fn is_of_the_past(self) -> bool {
        matches!(self, Kind::Backup | Kind::DriveBackup)
    }

    /// Whether the target is made on the way.
    fn makes_target(self) -> bool {
        matches!(self, Kind::DriveMirror | Kind::DriveBackup)
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
        if !kind.makes_target() {
            run("qemu-img", &["create", "-q", "-f", format, &path(kind.target()), &size]);
        }
        if kind == Kind::Commit {
            let base = path("base");
            run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", format, &path("top")]);
        } else {
            run("qemu-img", &["create", "-q", "-f", "qcow2", &path("top"), &size]);
        }
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
        if !kind.makes_target() {
            let node = json!({"driver": self.format, "node-name": target, "file": file(target)});
            qmp.run("blockdev-add", node);
        }
        let below = if kind == Kind::Commit { json!("base") } else { Value::Null };
        let top = json!({"driver": "qcow2", "node-name": "top", "file": file("top"), "backing": below});
        qmp.run("blockdev-add", top);
        qmp.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": path("nbd.sock")}}}));
        let export = json!({"type": "nbd", "id": "e", "node-name": "top", "name": "disk", "writable": true});
        qmp.run("block-export-add", export);
        let job = |more: Value| {
            let mut job =
                json!({"job-id": "j", "device": "top", "target": "copy", "sync": "full", "speed": SPEED});
            job.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            job
        };
        let made = json!({"target": path("copy"), "format": self.format});
        // Nobody may be there to hear that it is over.
        let stays = json!({"auto-dismiss": false});
        match kind {
            Kind::Mirror(mode) => qmp.run("blockdev-mirror", job(json!({"copy-mode": mode}))),
            Kind::DriveMirror => {
                let mut mirror = job(made);
                mirror["node-name"] = json!("copy");
                qmp.run("drive-mirror", mirror)
            }
            Kind::Backup => qmp.run("blockdev-backup", job(stays)),
            Kind::DriveBackup => {
                let mut backup = job(made);
                backup["auto-dismiss"] = json!(false);
                qmp.run("drive-backup", backup)
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

/// Waits until all is copied, for which it gets all the speed there is.
fn wait_copied(qmp: &mut Qmp, kind: Kind) {
    // A backup may be over.
    qmp.ask("block-job-set-speed", json!({"device": "j", "speed": 0}));
    wait_until("all is copied", || {
        let job = job(qmp).expect("it goes on");
        assert_eq!(job.get("error"), None, "{kind:?}");
        job["ready"] == json!(true) || job["status"] == json!("concluded")
    });
}

/// Ends a job that has copied all by `how`, and the daemon.
fn end(daemon: Daemon, mut qmp: Qmp, kind: Kind, how: &str) {
    if kind.is_of_the_past() {
        qmp.run("job-dismiss", json!({"id": "j"}));
    } else {
        qmp.run(how, json!({"device": "j"}));
        let completed = qmp.wait_for("BLOCK_JOB_COMPLETED");
        assert!(completed["data"].get("error").is_none(), "{completed}");
    }
    wait_until("the job is over", || job(&mut qmp).is_none());
    daemon.quit(&mut qmp);
}

/// What a copy is to hold, of a disk on which the guest has written.
fn copied(kind: Kind, guest: Guest) -> Guest {
    if kind.is_of_the_past() { Guest::new(0) } else { guest }
}

/// Marks the blocks of a raw copy that are as they are to be, so that whoever writes them is seen.
fn plant(path: &Path, guest: &Guest) -> Vec<bool> {
    let time = std::fs::metadata(path).unwrap().modified().unwrap();
    let mut copy = std::fs::read(path).unwrap();
    let mut planted = Vec::new();
    for (block, found) in copy.chunks_mut(BLOCK_BYTES as usize).enumerate() {
        let allowed = &guest.allowed[block];
        let is_there = allowed.len() == 1 && found == content(block as u64, allowed[0]);
        found[0] ^= if is_there { 0xff } else { 0 };
        planted.push(is_there);
    }
    std::fs::write(path, copy).unwrap();
    touch(path, time);
    planted
}

/// The file was written to last at that time.
fn touch(path: &Path, time: SystemTime) {
    std::fs::File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
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
    let running = KINDS.into_iter().cycle().take(2 * KINDS.len()).map(|kind| (kind, false));
    // A backup that has copied all is over.
    let ready = KINDS.into_iter().filter(|kind| !kind.is_of_the_past()).map(|kind| (kind, true));
    for (nth, (kind, is_ready)) in running.chain(ready).enumerate() {
        let place = Place::new(dir.path(), &format!("disk{nth}"), kind, "raw");
        let guest = Arc::new(Mutex::new(Guest::new(random.next())));
        let (daemon, mut qmp) = place.start();
        place.begin(&mut qmp, kind);
        if is_ready {
            wait_copied(&mut qmp, kind);
        }
        dies(&place.dir, &place.reactors, &guest, 1 + random.below(2000), daemon.process, false);
        let guest = copied(kind, Arc::into_inner(guest).unwrap().into_inner().unwrap());
        let copy = place.dir.join(kind.target());
        let planted = plant(&copy, &guest);
        assert_eq!(place.maps().len(), 1, "{kind:?}");
        let (daemon, mut qmp) = place.start();
        let offset = job(&mut qmp).expect("it goes on")["offset"].as_u64().unwrap();
        wait_copied(&mut qmp, kind);
        end(daemon, qmp, kind, "block-job-cancel");
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
                wait_copied(&mut qmp, kind);
            }
            let at = 1 + random.below(1000);
            dies(&place.dir, &place.reactors, &guest, at, daemon.process, round % 4 == 3);
            (daemon, qmp) = place.start();
        }
        wait_copied(&mut qmp, kind);
        let mut old = Some((daemon, qmp));
        work(&place.dir, &place.reactors, &guest, 200, || {
            let (daemon, qmp) = old.take().unwrap();
            end(daemon, qmp, kind, "block-job-complete");
        });
        answered_is_kept(&guest);
        let guest = copied(kind, Arc::into_inner(guest).unwrap().into_inner().unwrap());
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

/// Has a copy that is ready die under a guest, and gives what its target is to hold and which blocks are marked there.
fn die_ready(place: &Place, kind: Kind, random: &mut Random) -> (Guest, Vec<bool>) {
    let guest = Arc::new(Mutex::new(Guest::new(random.next())));
    let (daemon, mut qmp) = place.start();
    place.begin(&mut qmp, kind);
    if !kind.is_of_the_past() {
        wait_copied(&mut qmp, kind);
    }
    dies(&place.dir, &place.reactors, &guest, 200, daemon.process, false);
    let guest = copied(kind, Arc::into_inner(guest).unwrap().into_inner().unwrap());
    let planted = plant(&place.dir.join(kind.target()), &guest);
    (guest, planted)
}

#[test]
fn without_its_map_everything_is_copied_again() {
    let mut random = Random(seed() | 1);
    let dir = tempfile::tempdir().unwrap();
    for (nth, (what, damage)) in DAMAGES.into_iter().enumerate() {
        let kind = KINDS[nth % 4];
        let place = Place::new(dir.path(), &format!("disk{nth}"), kind, "raw");
        let (guest, planted) = die_ready(&place, kind, &mut random);
        place.maps().iter().for_each(|map| damage(map));
        let (daemon, mut qmp) = place.start();
        wait_copied(&mut qmp, kind);
        end(daemon, qmp, kind, "block-job-cancel");
        let again = judge(&place.dir.join(kind.target()), &guest, &planted);
        let there = planted.iter().filter(|planted| **planted).count() as u64 * BLOCK_BYTES;
        assert_eq!(again, there, "{what}: all is copied again");
    }
}

#[test]
fn what_somebody_else_has_written_meanwhile_is_copied_or_ends_a_backup() {
    let mut random = Random(seed() | 1);
    let dir = tempfile::tempdir().unwrap();
    for (nth, (kind, file)) in [
        (KINDS[0], "top"),
        (KINDS[1], "copy"),
        (Kind::Commit, "base"),
        (Kind::DriveMirror, "copy"),
        (Kind::Backup, "top"),
    ]
    .into_iter()
    .enumerate()
    {
        let place = Place::new(dir.path(), &format!("disk{nth}"), kind, "raw");
        let (guest, planted) = die_ready(&place, kind, &mut random);
        touch(&place.dir.join(file), SystemTime::now() + Duration::from_secs(60));
        if kind.is_of_the_past() {
            is_told_to_be_lost(&place, "written by somebody else");
            continue;
        }
        let (daemon, mut qmp) = place.start();
        wait_copied(&mut qmp, kind);
        end(daemon, qmp, kind, "block-job-cancel");
        let again = judge(&place.dir.join(kind.target()), &guest, &planted);
        let there = planted.iter().filter(|planted| **planted).count() as u64 * BLOCK_BYTES;
        assert_eq!(again, there, "{kind:?}: all is copied again");
    }
}

/// A backup that was lost is told, and stays told until it is dismissed.
fn is_told_to_be_lost(place: &Place, what: &str) {
    for _ in 0..2 {
        let (daemon, mut qmp) = place.start();
        wait_until("it is over", || job(&mut qmp).is_some_and(|job| job["status"] == json!("concluded")));
        let error = job(&mut qmp).unwrap()["error"].as_str().expect("an error").to_owned();
        assert!(error.contains("cannot be proven any more"), "{what}: {error}");
        daemon.process.kill();
    }
    let (daemon, mut qmp) = place.start();
    qmp.run("job-dismiss", json!({"id": "j"}));
    assert_eq!(place.maps(), Vec::<PathBuf>::new(), "{what}");
    daemon.process.kill();
    let (daemon, mut qmp) = place.start();
    assert_eq!(job(&mut qmp), None);
    daemon.quit(&mut qmp);
}

#[test]
fn a_backup_without_its_map_has_failed_and_is_no_wrong_copy() {
    let mut random = Random(seed() | 1);
    let dir = tempfile::tempdir().unwrap();
    for (nth, (what, damage)) in DAMAGES.into_iter().enumerate() {
        let kind = [Kind::Backup, Kind::DriveBackup][nth % 2];
        let place = Place::new(dir.path(), &format!("disk{nth}"), kind, "raw");
        die_ready(&place, kind, &mut random);
        place.maps().iter().for_each(|map| damage(map));
        is_told_to_be_lost(&place, what);
    }
}

/// Writes a block of its own at the export, as the guest would.
fn write_one(place: &Place, guest: &Mutex<Guest>, block: u64) {
    let mut guest = guest.lock().unwrap();
    guest.stamp += 1;
    let stamp = guest.stamp;
    guest.allowed[block as usize] = vec![stamp];
    std::fs::write(place.dir.join("block"), content(block, stamp)).unwrap();
    let uri = format!("nbd+unix:///disk?socket={}", text(&place.dir.join("nbd.sock")));
    let write = format!("write -s {} {} 4k", text(&place.dir.join("block")), block * BLOCK_BYTES);
    run("qemu-io", &["-f", "raw", "-c", &write, &uri]);
}

#[test]
fn what_is_written_while_a_target_is_missing_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    for (nth, (kind, block)) in [
        (KINDS[0], 5),
        (Kind::Commit, 5),
        (Kind::DriveMirror, 5),
        (Kind::Backup, 0),
        (Kind::Backup, BLOCKS - 5),
    ]
    .into_iter()
    .enumerate()
    {
        let place = Place::new(dir.path(), &format!("disk{nth}"), kind, "raw");
        let guest = Mutex::new(Guest::new(1));
        let (daemon, mut qmp) = place.start();
        place.begin(&mut qmp, kind);
        if kind.is_of_the_past() {
            qmp.run("job-pause", json!({"id": "j"}));
            // What it was is kept, whatever the job has copied itself.
            write_one(&place, &guest, 0);
        } else {
            wait_copied(&mut qmp, kind);
        }
        daemon.process.kill();
        let copy = place.dir.join(kind.target());
        let (mut away, now) = (place.dir.join("away"), kind == Kind::Commit);
        if now {
            // The disk lies on it: nothing is missing.
            away.clone_from(&copy);
        } else {
            std::fs::rename(&copy, &away).unwrap();
        }
        let planted = plant(&away, &copied(kind, Guest::new(1)));
        let (daemon, mut qmp) = place.start();
        write_one(&place, &guest, block);
        if !now {
            assert_eq!(job(&mut qmp).unwrap()["status"], json!("created"), "{kind:?}: it is held");
            std::fs::rename(&away, &copy).unwrap();
        }
        if kind.is_of_the_past() && block != 0 {
            // Nobody kept what it was.
            wait_until("it is over", || job(&mut qmp).is_some_and(|job| job["status"] == json!("concluded")));
            assert!(job(&mut qmp).unwrap()["error"].as_str().unwrap().contains("was written to"));
            daemon.quit(&mut qmp);
            continue;
        }
        wait_until("it begins", || job(&mut qmp).unwrap()["status"] != json!("created"));
        qmp.ask("job-resume", json!({"id": "j"}));
        wait_copied(&mut qmp, kind);
        end(daemon, qmp, kind, "block-job-cancel");
        let again = judge(&copy, &copied(kind, guest.into_inner().unwrap()), &planted);
        assert!(again < TWICE_BYTES_MAX, "{kind:?}: {again} bytes were written again");
    }
}

#[test]
fn backups_of_one_moment_go_on_and_their_bitmap_says_no_less_than_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path(), "disk", Kind::Backup, "qcow2");
    let (daemon, mut qmp) = place.start();
    place.begin(&mut qmp, Kind::Backup);
    qmp.run("job-cancel", json!({"id": "j"}));
    wait_until("it is over", || job(&mut qmp).is_some_and(|job| job["status"] == json!("concluded")));
    qmp.run("job-dismiss", json!({"id": "j"}));
    let second = place.dir.join("second");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&second), &DISK_BYTES.to_string()]);
    let node =
        json!({"driver": "qcow2", "node-name": "second", "file": {"driver": "file", "filename": second}});
    qmp.run("blockdev-add", node);
    qmp.run("block-dirty-bitmap-add", json!({"node": "top", "name": "b", "persistent": true}));
    let guest = Mutex::new(Guest::new(1));
    for block in 10..20 {
        write_one(&place, &guest, block);
    }
    let made = place.dir.join("made");
    // One of everything, and one of what was written.
    let backup = |command: &str, more: Value| {
        let mut data = json!({"device": "top", "auto-dismiss": false, "speed": 64 << 10});
        data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"type": command, "data": data})
    };
    let incremental = backup(
        "blockdev-backup",
        json!({"job-id": "inc", "target": "second", "sync": "incremental", "bitmap": "b"}),
    );
    let actions =
        [backup("drive-backup", json!({"job-id": "j", "target": made, "sync": "full"})), incremental];
    qmp.run("transaction", json!({"actions": actions}));
    let as_it_was = guest.lock().unwrap().allowed.clone();
    for block in 15..25 {
        write_one(&place, &guest, block);
    }
    daemon.process.signal("TERM");
    let mut daemon = daemon;
    daemon.process.wait_for_success();
    let (daemon, mut qmp) = place.start();
    write_one(&place, &guest, 30);
    for id in ["j", "inc"] {
        qmp.ask("block-job-set-speed", json!({"device": id, "speed": 0}));
        wait_until("the backup is over", || {
            let jobs = qmp.run("query-jobs", json!({}));
            let job = jobs.as_array().unwrap().iter().find(|job| job["id"] == json!(id)).expect("it goes on");
            assert_eq!(job.get("error"), None);
            job["status"] == json!("concluded")
        });
        qmp.run("job-dismiss", json!({"id": id}));
    }
    let named = qmp.run("query-named-block-nodes", json!({"flat": true}));
    let top = named.as_array().unwrap().iter().find(|node| node["node-name"] == json!("top")).unwrap();
    let count = top["dirty-bitmaps"][0]["count"].as_u64().unwrap();
    assert!(count >= 11 * 65536 / 16, "{count} bytes are marked: what was written since, and more");
    daemon.quit(&mut qmp);
    let mut full = Guest::new(1);
    full.allowed = as_it_was;
    let raw = place.dir.join("raw");
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&made), text(&raw)]);
    judge(&raw, &full, &vec![false; BLOCKS as usize]);
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&second), text(&raw)]);
    let increment = std::fs::read(&raw).unwrap();
    for block in 10..20 {
        full.check(block, &increment[(block * BLOCK_BYTES) as usize..][..BLOCK_BYTES as usize]);
    }
}

#[test]
fn a_mirror_of_what_is_written_from_now_on_goes_on_or_fails() {
    let dir = tempfile::tempdir().unwrap();
    for is_lost in [false, true] {
        let kind = Kind::Mirror("background");
        let place = Place::new(dir.path(), &format!("lost-{is_lost}"), kind, "raw");
        let (daemon, mut qmp) = place.start();
        place.begin(&mut qmp, kind);
        qmp.run("job-cancel", json!({"id": "j"}));
        wait_until("it is over", || job(&mut qmp).is_none());
        let mirror = json!({"job-id": "j", "device": "top", "target": "copy", "sync": "none"});
        qmp.run("blockdev-mirror", mirror);
        wait_until("it is ready", || job(&mut qmp).unwrap()["ready"] == json!(true));
        let guest = Mutex::new(Guest::new(1));
        // Not copied before the kill.
        qmp.run("job-pause", json!({"id": "j"}));
        for block in 40..50 {
            write_one(&place, &guest, block);
        }
        daemon.process.kill();
        if is_lost {
            place.maps().iter().for_each(|map| std::fs::remove_file(map).unwrap());
            is_told_to_be_lost(&place, "a mirror");
            continue;
        }
        let (daemon, mut qmp) = place.start();
        qmp.run("job-resume", json!({"id": "j"}));
        wait_copied(&mut qmp, kind);
        end(daemon, qmp, kind, "block-job-cancel");
        let (guest, copy) = (guest.into_inner().unwrap(), std::fs::read(place.dir.join("copy")).unwrap());
        for block in 40..50 {
            guest.check(block, &copy[(block * BLOCK_BYTES) as usize..][..BLOCK_BYTES as usize]);
        }
    }
}

#[test]
fn an_end_in_order_stores_persistent_bitmaps_with_every_write_while_jobs_run() {
    let mut random = Random(seed() | 1);
    let dir = tempfile::tempdir().unwrap();
    for (nth, kind) in [KINDS[0], Kind::Backup].into_iter().enumerate() {
        let place = Place::new(dir.path(), &format!("disk{nth}"), kind, "qcow2");
        let guest = Arc::new(Mutex::new(Guest::new(random.next())));
        let (daemon, mut qmp) = place.start();
        place.begin(&mut qmp, kind);
        let bitmap = json!({"node": "top", "name": "b", "persistent": true, "granularity": BLOCK_BYTES});
        qmp.run("block-dirty-bitmap-add", bitmap);
        let mut daemon = Some(daemon);
        for round in 0..2 {
            let ending = daemon.take();
            dies(&place.dir, &place.reactors, &guest, 100 + random.below(500), ending.unwrap().process, true);
            let info = run("qemu-img", &["info", "--output=json", text(&place.dir.join("top"))]);
            let info: Value = serde_json::from_str(&info).unwrap();
            let stored = json!([{"name": "b", "flags": ["auto"], "granularity": BLOCK_BYTES}]);
            assert_eq!(info["format-specific"]["data"]["bitmaps"], stored, "{kind:?}, end {round}");
            let (next, mut qmp) = place.start();
            daemon = Some(next);
            assert!(job(&mut qmp).is_some(), "{kind:?}: it goes on");
            let told = json!({"type": "nbd", "id": "told", "node-name": "top", "name": "told", "writable": true, "bitmaps": ["b"]});
            qmp.run("block-export-add", told);
            let uri = format!("nbd+unix:///told?socket={}", text(&place.dir.join("nbd.sock")));
            let map = run("nbdinfo", &["--json", "--map=qemu:dirty-bitmap:b", &uri]);
            let map: Vec<Value> = serde_json::from_str(&map).unwrap();
            let dirty = |at: u64| {
                map.iter().any(|run| {
                    let (start, len) = (run["offset"].as_u64().unwrap(), run["length"].as_u64().unwrap());
                    run["type"] == json!(1) && (start..start + len).contains(&at)
                })
            };
            let guest = guest.lock().unwrap();
            let written: Vec<u64> =
                (0..BLOCKS).filter(|block| guest.allowed[*block as usize][0] != 0).collect();
            assert!(!written.is_empty());
            for block in written {
                assert!(dirty(block * BLOCK_BYTES), "{kind:?}, end {round}: block {block} was written");
            }
            qmp.run("block-export-del", json!({"id": "told"}));
        }
    }
}
