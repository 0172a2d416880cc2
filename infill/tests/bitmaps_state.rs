//! Dirty bitmaps, in memory and persistent ones, come back when a daemon that is killed is started again: with every write that
//! was answered, with nothing that was cleared, and as lost where that cannot be proven.

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
use stamped::{BLOCK_BYTES, BLOCKS, DISK_BYTES, Guest, Random, answered_is_kept, content, seed, work};

/// How often a daemon is killed, or told to end, under a guest.
const ROUNDS: u64 = 12;

/// A qcow2 disk whose node `top` is exported under the name `disk`.
struct Place {
    dir: tempfile::TempDir,
    journal: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| text(&dir.path().join(name)).to_owned();
        let disk: Vec<u8> = (0..BLOCKS).flat_map(|block| content(block, 0)).collect();
        std::fs::write(path("first"), disk).unwrap();
        run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &path("first"), &path("top")]);
        let journal = tempfile::tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm");
        Place { dir, journal }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(&self) -> (Daemon, Qmp) {
        let state = self.path("state");
        let options = ["--state", text(&state), "--journal", text(self.journal.path())];
        let daemon = Daemon::start(Program::Infill, self.dir.path(), &options);
        let qmp = daemon.connect();
        (daemon, qmp)
    }

    /// Adds the disk, its export and after that the bitmap `b`.
    fn begin(&self, qmp: &mut Qmp) {
        self.begin_with(qmp, false);
    }

    fn begin_with(&self, qmp: &mut Qmp, persistent: bool) {
        let file = json!({"driver": "file", "filename": self.path("top")});
        let top = json!({"driver": "qcow2", "node-name": "top", "file": file, "discard": "unmap"});
        qmp.run("blockdev-add", top);
        let server = json!({"addr": {"type": "unix", "data": {"path": self.path("nbd.sock")}}});
        qmp.run("nbd-server-start", server);
        let export = json!({"type": "nbd", "id": "e", "node-name": "top", "name": "disk", "writable": true});
        qmp.run("block-export-add", export);
        let mut bitmap = json!({"node": "top", "name": "b", "granularity": BLOCK_BYTES});
        if persistent {
            bitmap["persistent"] = json!(true);
        }
        qmp.run("block-dirty-bitmap-add", bitmap);
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", text(&self.path("nbd.sock")))
    }

    fn write(&self, blocks: &[u64]) {
        let commands: Vec<String> =
            blocks.iter().map(|block| format!("write -P 7 {} 4k", block * BLOCK_BYTES)).collect();
        let uri = self.uri("disk");
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        run("qemu-io", &["-f", "raw"].into_iter().chain(commands).chain([uri.as_str()]).collect::<Vec<_>>());
    }

    /// Discards a cluster, which only the daemon's memory and its journal know: nobody has flushed it. Its client stays.
    fn discard_unflushed(&self, qmp: &mut Qmp, node: &str) -> common::Process {
        let count = |qmp: &mut Qmp| {
            let bitmaps = bitmaps_of(qmp, node);
            bitmaps.iter().map(|bitmap| bitmap["count"].as_u64().unwrap()).max()
        };
        let before = count(qmp);
        let uri = self.uri("disk");
        let args = ["-f", "raw", "-c", "discard 1M 64k", "-c", "sleep 1000000", &uri];
        let client = common::Process::start(std::process::Command::new("qemu-io").args(args));
        wait_until("it is discarded", || count(qmp) != before);
        client
    }

    /// What is on the disk.
    fn content(&self) -> Vec<u8> {
        let raw = self.path("now");
        run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &self.uri("disk"), text(&raw)]);
        std::fs::read(raw).unwrap()
    }

    /// Which blocks the bitmap `name` has marked, as a client of an export sees it.
    fn dirty(&self, qmp: &mut Qmp, name: &str) -> Vec<bool> {
        // One that records cannot be read of a disk that nobody may write.
        let export = json!({"type": "nbd", "id": "m", "node-name": "top", "name": "map", "writable": true,
            "bitmaps": [name]});
        qmp.run("block-export-add", export);
        let map = run("nbdinfo", &["--json", &format!("--map=qemu:dirty-bitmap:{name}"), &self.uri("map")]);
        qmp.run("block-export-del", json!({"id": "m", "mode": "hard"}));
        qmp.event(|event| event["event"] == "BLOCK_EXPORT_DELETED");
        let extents: Value = serde_json::from_str(&map).unwrap();
        // Twice that of a disk that was resized.
        let mut dirty = vec![false; 2 * BLOCKS as usize];
        for extent in extents.as_array().unwrap() {
            let number = |key: &str| extent[key].as_u64().unwrap();
            let (at, len) = (number("offset"), number("length"));
            let blocks = at / BLOCK_BYTES..(at + len).div_ceil(BLOCK_BYTES);
            dirty[blocks.start as usize..blocks.end as usize].fill(number("type") & 1 == 1);
        }
        dirty
    }

    fn marked(&self, qmp: &mut Qmp, name: &str) -> Vec<u64> {
        let dirty = self.dirty(qmp, name);
        (0..2 * BLOCKS).filter(|block| dirty[*block as usize]).collect()
    }

    /// The files of maps of bitmaps.
    fn maps(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.journal.path()).unwrap().flatten();
        let maps = entries.filter(|entry| entry.file_name().to_str().unwrap().starts_with("bitmap-"));
        maps.map(|entry| entry.path()).collect()
    }
}

fn bitmaps(qmp: &mut Qmp) -> Vec<Value> {
    bitmaps_of(qmp, "top")
}

fn bitmaps_of(qmp: &mut Qmp, name: &str) -> Vec<Value> {
    let nodes = qmp.run("query-named-block-nodes", json!({"flat": true}));
    let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == name).unwrap();
    node["dirty-bitmaps"].as_array().cloned().unwrap_or_default()
}

fn command(verb: &str, name: &str, qmp: &mut Qmp) {
    qmp.run(&format!("block-dirty-bitmap-{verb}"), json!({"node": "top", "name": name}));
}

fn end(daemon: Daemon, in_order: bool) {
    daemon.process.end(in_order);
}

#[test]
fn a_bitmap_of_a_killed_daemon_has_every_write_of_its_guest() {
    has_every_write(false);
}

#[test]
fn a_persistent_bitmap_of_a_killed_daemon_has_every_write_of_its_guest() {
    has_every_write(true);
}

fn has_every_write(persistent: bool) {
    let mut random = Random(seed() | 1);
    let place = Place::new();
    let reactors = Arc::new(Reactors::start(1).unwrap());
    let guest = Arc::new(Mutex::new(Guest::new(random.next())));
    let (mut daemon, mut qmp) = place.start();
    place.begin_with(&mut qmp, persistent);
    let mut before = place.content();
    assert_eq!(before.len() as u64, DISK_BYTES);
    for round in 0..ROUNDS {
        if round % 3 == 1 {
            command("clear", "b", &mut qmp);
            before = place.content();
        }
        let old = Mutex::new(Some(daemon));
        work(place.dir.path(), &reactors, &guest, 1 + random.below(600), || {
            end(old.lock().unwrap().take().unwrap(), round % 4 == 3);
        });
        answered_is_kept(&guest);
        (daemon, qmp) = place.start();
        let (now, dirty) = (place.content(), place.dirty(&mut qmp, "b"));
        let at =
            |disk: &[u8], block: usize| disk[block * BLOCK_BYTES as usize..][..BLOCK_BYTES as usize].to_vec();
        let missing: Vec<usize> = (0..BLOCKS as usize)
            .filter(|block| at(&now, *block) != at(&before, *block) && !dirty[*block])
            .collect();
        assert_eq!(missing, [0; 0], "round {round}: changed, and not marked");
        println!("round {round}: {} blocks are marked", dirty.iter().filter(|dirty| **dirty).count());
    }
    daemon.quit(&mut qmp);
}

#[test]
fn bitmaps_come_back_as_they_were_after_a_kill_and_after_an_end_in_order() {
    for in_order in [false, true] {
        let place = Place::new();
        let (mut daemon, mut qmp) = place.start();
        place.begin(&mut qmp);
        place.write(&[1, 2]);
        command("clear", "b", &mut qmp);
        let add = |name: &str, rest: Value| {
            let mut data = json!({"node": "top", "name": name});
            data.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
            json!({"type": "block-dirty-bitmap-add", "data": data})
        };
        let actions = [
            add("stopped", json!({"granularity": 4096})),
            add("never", json!({"disabled": true})),
            add("wide", json!({"granularity": 1 << 20})),
        ];
        qmp.run("transaction", json!({"actions": actions}));
        let aborted = json!([add("undone", json!({})), {"type": "abort", "data": {}}]);
        qmp.refused("transaction", json!({"actions": aborted}));
        command("add", "removed", &mut qmp);
        place.write(&[5, 600]);
        command("disable", "stopped", &mut qmp);
        command("remove", "removed", &mut qmp);
        place.write(&[9]);
        let before = bitmaps(&mut qmp);
        for _ in 0..2 {
            end(daemon, in_order);
            (daemon, qmp) = place.start();
            assert_eq!(bitmaps(&mut qmp), before);
            assert_eq!(place.marked(&mut qmp, "b"), [5, 9, 600]);
            assert_eq!(place.marked(&mut qmp, "stopped"), [5, 600]);
            assert_eq!(place.marked(&mut qmp, "never"), [0; 0]);
            assert_eq!(place.maps().len(), 4, "one of each");
        }
        place.write(&[11]);
        assert_eq!(place.marked(&mut qmp, "b"), [5, 9, 11, 600]);
        assert_eq!(place.marked(&mut qmp, "stopped"), [5, 600]);
        qmp.run("block-dirty-bitmap-merge", json!({"node": "top", "target": "never", "bitmaps": ["b"]}));
        let merged = place.marked(&mut qmp, "never");
        command("enable", "stopped", &mut qmp);
        place.write(&[13]);
        end(daemon, in_order);
        (daemon, qmp) = place.start();
        assert_eq!(place.marked(&mut qmp, "never"), merged);
        assert_eq!(place.marked(&mut qmp, "stopped"), [5, 13, 600]);
        // A node that goes takes its bitmaps along.
        qmp.run("block-export-del", json!({"id": "e"}));
        qmp.event(|event| event["event"] == "BLOCK_EXPORT_DELETED");
        qmp.run("blockdev-del", json!({"node-name": "top"}));
        assert_eq!(place.maps(), Vec::<PathBuf>::new());
        daemon.quit(&mut qmp);
    }
}

#[test]
fn a_bitmap_that_a_backup_has_cleared_is_cleared_for_the_next_daemon() {
    let place = Place::new();
    let (mut daemon, mut qmp) = place.start();
    place.begin(&mut qmp);
    place.write(&[3, 4]);
    let copy = place.path("copy");
    std::fs::copy(place.path("first"), &copy).unwrap();
    let file = json!({"driver": "file", "filename": copy});
    qmp.run("blockdev-add", json!({"driver": "raw", "node-name": "copy", "file": file}));
    end(daemon, false);
    (daemon, qmp) = place.start();
    let backup =
        json!({"job-id": "j", "device": "top", "target": "copy", "sync": "incremental", "bitmap": "b"});
    qmp.run("blockdev-backup", backup);
    qmp.wait_for("BLOCK_JOB_COMPLETED");
    place.write(&[8]);
    end(daemon, false);
    (daemon, qmp) = place.start();
    assert_eq!(place.marked(&mut qmp, "b"), [8]);
    let (mut now, copied) = (place.content(), std::fs::read(&copy).unwrap());
    let block = (8 * BLOCK_BYTES) as usize..(9 * BLOCK_BYTES) as usize;
    now[block.clone()].copy_from_slice(&copied[block]);
    assert!(now == copied, "the increment is the disk but for what was written since");
    daemon.quit(&mut qmp);
}

#[test]
fn a_bitmap_misses_nothing_that_is_written_while_its_node_is_not_there() {
    for (missing, written) in [(false, false), (true, false), (true, true)] {
        let place = Place::new();
        let base = place.path("base");
        run("qemu-img", &["create", "-q", "-f", "raw", text(&base), "1M"]);
        let (mut daemon, mut qmp) = place.start();
        // As libvirt does: storage and format are nodes of their own.
        let file = |name: &str, path: &Path| json!({"driver": "file", "node-name": name, "filename": path});
        qmp.run("blockdev-add", file("lower", &base));
        qmp.run("blockdev-add", file("storage", &place.path("top")));
        let top = json!({"driver": "qcow2", "node-name": "top", "file": "storage", "backing": "lower",
            "discard": "unmap"});
        qmp.run("blockdev-add", top);
        let server = json!({"addr": {"type": "unix", "data": {"path": place.path("nbd.sock")}}});
        qmp.run("nbd-server-start", server);
        let export = json!({"type": "nbd", "id": "e", "node-name": "top", "name": "disk", "writable": true});
        qmp.run("block-export-add", export);
        command("add", "b", &mut qmp);
        place.write(&[8]);
        let client = place.discard_unflushed(&mut qmp, "top");
        end(daemon, false);
        drop(client);
        let away = place.path("away");
        if missing {
            std::fs::rename(&base, &away).unwrap();
        }
        // Opening the disk writes to it, also where it fails because what lies below is missing.
        (daemon, qmp) = place.start();
        if written {
            // The disk by another name, where nobody sees what is written.
            let other = json!({"driver": "qcow2", "node-name": "other", "file": "storage", "backing": null});
            qmp.run("blockdev-add", other);
            let export =
                json!({"type": "nbd", "id": "o", "node-name": "other", "name": "other", "writable": true});
            qmp.run("block-export-add", export);
            run("qemu-io", &["-f", "raw", "-c", "write -P 9 1M 64k", &place.uri("other")]);
            qmp.run("block-export-del", json!({"id": "o"}));
            qmp.event(|event| event["event"] == "BLOCK_EXPORT_DELETED");
            qmp.run("blockdev-del", json!({"node-name": "other"}));
        }
        if missing {
            std::fs::rename(&away, &base).unwrap();
        }
        wait_until("the disk and its bitmap are there", || {
            let nodes = qmp.run("query-named-block-nodes", json!({"flat": true}));
            let disk = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "top").cloned();
            disk.is_some_and(|disk| disk["dirty-bitmaps"].is_array())
        });
        let [bitmap] = &bitmaps(&mut qmp)[..] else { panic!("it is gone") };
        assert_eq!(bitmap.get("inconsistent"), written.then_some(&json!(true)));
        if !written {
            assert_eq!(place.marked(&mut qmp, "b"), Vec::from_iter((0..16).chain(256..272)));
        }
        daemon.quit(&mut qmp);
    }
}

/// What qemu-img says of the bitmaps of the image.
fn stored(place: &Place) -> Value {
    let path = place.path("top");
    let info: Value =
        serde_json::from_str(&run("qemu-img", &["info", "-U", "--output=json", text(&path)])).unwrap();
    info["format-specific"]["data"]["bitmaps"].clone()
}

#[test]
fn a_persistent_bitmap_comes_back_exactly_and_its_image_is_right_again_after_an_end_in_order() {
    let place = Place::new();
    let (mut daemon, mut qmp) = place.start();
    place.begin_with(&mut qmp, true);
    place.write(&[1, 2]);
    command("clear", "b", &mut qmp);
    place.write(&[5, 600]);
    // Its image does not know it yet.
    assert_eq!(stored(&place), Value::Null);
    end(daemon, false);
    (daemon, qmp) = place.start();
    assert_eq!(place.marked(&mut qmp, "b"), [5, 600]);
    assert_eq!(bitmaps(&mut qmp)[0]["persistent"], json!(true));
    place.write(&[9]);
    end(daemon, true);
    assert_eq!(stored(&place)[0]["flags"], json!(["auto"]));
    assert_eq!(place.maps(), Vec::<PathBuf>::new(), "the image has it");
    (daemon, qmp) = place.start();
    assert_eq!(place.marked(&mut qmp, "b"), [5, 9, 600]);
    for round in 0..3 {
        place.write(&[20 + round]);
        end(daemon, false);
        assert_eq!(stored(&place)[0]["flags"], json!(["in-use", "auto"]));
        (daemon, qmp) = place.start();
        let marked = [5, 9].into_iter().chain(20..=20 + round).chain([600]);
        assert_eq!(place.marked(&mut qmp, "b"), Vec::from_iter(marked));
    }
    // A node that is opened anew has its bitmaps from its image.
    let file = json!({"driver": "file", "filename": place.path("top")});
    let node = json!({"driver": "qcow2", "node-name": "top", "file": file, "discard": "ignore"});
    qmp.run("block-export-del", json!({"id": "e"}));
    qmp.event(|event| event["event"] == "BLOCK_EXPORT_DELETED");
    qmp.run("blockdev-reopen", json!({"options": [node]}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "top", "name": "disk", "writable": true});
    qmp.run("block-export-add", export);
    command("disable", "b", &mut qmp);
    place.write(&[30]);
    command("enable", "b", &mut qmp);
    place.write(&[31]);
    end(daemon, false);
    (daemon, qmp) = place.start();
    assert_eq!(place.marked(&mut qmp, "b"), [5, 9, 20, 21, 22, 31, 600]);
    end(daemon, true);
    run("qemu-img", &["check", "-q", "-f", "qcow2", text(&place.path("top"))]);
    // What is done to it by others, between two ends in order, is what it is.
    run("qemu-img", &["bitmap", "--remove", text(&place.path("top")), "b"]);
    (daemon, qmp) = place.start();
    assert_eq!(bitmaps(&mut qmp), [Value::Null; 0]);
    daemon.quit(&mut qmp);
}

#[test]
fn opening_an_image_makes_no_bitmap_of_a_filter_over_it_inconsistent() {
    let place = Place::new();
    let (mut daemon, mut qmp) = place.start();
    place.begin(&mut qmp);
    let filter = json!({"driver": "copy-on-read", "node-name": "filter", "file": "top"});
    qmp.run("block-export-del", json!({"id": "e"}));
    qmp.event(|event| event["event"] == "BLOCK_EXPORT_DELETED");
    qmp.run("blockdev-add", filter);
    let export = json!({"type": "nbd", "id": "e", "node-name": "filter", "name": "disk", "writable": true});
    qmp.run("block-export-add", export);
    qmp.run("block-dirty-bitmap-add", json!({"node": "filter", "name": "f"}));
    let client = place.discard_unflushed(&mut qmp, "filter");
    let written = || std::fs::metadata(place.path("top")).unwrap().modified().unwrap();
    end(daemon, false);
    drop(client);
    let before = written();
    (daemon, qmp) = place.start();
    assert_ne!(written(), before, "opening has replayed the journal");
    let bitmap = &bitmaps_of(&mut qmp, "filter")[0];
    assert_eq!((bitmap.get("inconsistent"), &bitmap["count"]), (None, &json!(65536)), "{bitmap}");
    daemon.quit(&mut qmp);
}

#[test]
fn a_bitmap_of_a_disk_that_was_resized_comes_back() {
    let place = Place::new();
    let (mut daemon, mut qmp) = place.start();
    place.begin(&mut qmp);
    place.write(&[3]);
    qmp.run("block-export-del", json!({"id": "e"}));
    qmp.event(|event| event["event"] == "BLOCK_EXPORT_DELETED");
    qmp.run("block_resize", json!({"node-name": "top", "size": 2 * DISK_BYTES}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "top", "name": "disk", "writable": true});
    qmp.run("block-export-add", export);
    place.write(&[5]);
    end(daemon, false);
    (daemon, qmp) = place.start();
    assert_eq!(place.marked(&mut qmp, "b"), [3, 5]);
    daemon.quit(&mut qmp);
}

/// What becomes of a map file, or of the disk.
type Damage = fn(&Place, &Path);

const DAMAGES: [(&str, Damage); 5] = [
    ("deleted", |_, map| std::fs::remove_file(map).unwrap()),
    ("cut off", |_, map| std::fs::OpenOptions::new().write(true).open(map).unwrap().set_len(4104).unwrap()),
    ("overwritten in the middle", |_, map| {
        let mut bits = std::fs::read(map).unwrap();
        bits[4096 + 8..4096 + 16].fill(0);
        std::fs::write(map, bits).unwrap();
    }),
    ("of another start of the machine", |_, map| {
        let mut bits = std::fs::read(map).unwrap();
        bits[16] ^= 1;
        std::fs::write(map, bits).unwrap();
    }),
    ("of a disk that somebody has written to since", |place, _| {
        let file = std::fs::File::options().write(true).open(place.path("top")).unwrap();
        file.set_modified(SystemTime::now() + Duration::from_secs(60)).unwrap();
    }),
];

#[test]
fn a_bitmap_without_a_map_that_proves_it_is_inconsistent_and_can_only_be_removed() {
    for ((what, damage), persistent) in DAMAGES.into_iter().flat_map(|one| [(one, false), (one, true)]) {
        let place = Place::new();
        let (mut daemon, mut qmp) = place.start();
        place.begin_with(&mut qmp, persistent);
        place.write(&[3]);
        end(daemon, false);
        let [map] = &place.maps()[..] else { panic!("one map") };
        damage(&place, map);
        for _ in 0..2 {
            (daemon, qmp) = place.start();
            let [bitmap] = &bitmaps(&mut qmp)[..] else { panic!("{what}: it is gone") };
            assert_eq!(
                (&bitmap["inconsistent"], &bitmap["recording"]),
                (&json!(true), &json!(false)),
                "{what}"
            );
            let refused = qmp.refused("block-dirty-bitmap-clear", json!({"node": "top", "name": "b"}));
            assert_eq!(refused["desc"], "Bitmap 'b' is inconsistent and cannot be used");
            place.write(&[5]);
            end(daemon, false);
        }
        (daemon, qmp) = place.start();
        assert_eq!(bitmaps(&mut qmp)[0]["persistent"], json!(persistent));
        command("remove", "b", &mut qmp);
        command("add", "b", &mut qmp);
        end(daemon, false);
        (daemon, qmp) = place.start();
        assert_eq!(place.marked(&mut qmp, "b"), [0; 0], "{what}");
        daemon.quit(&mut qmp);
    }
}
