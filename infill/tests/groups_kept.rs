//! Backups that complete together wait for each other after a restart too, and none completes without the others.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::path::PathBuf;

use common::{run, text, wait_until};
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

/// Bytes of the disk. Its backups take the longer the slower they are.
const DISK_BYTES: u64 = 4 << 20;
/// Bytes per second of the slow one: it is not over before it is let go.
const SLOW: u64 = 4096;

struct Place {
    dir: tempfile::TempDir,
    journal: tempfile::TempDir,
}

impl Place {
    /// Two backups of one disk, of one moment, that complete together: `quick` and `slow`.
    fn begin() -> (Place, Daemon, Qmp) {
        let dir = tempfile::tempdir().unwrap();
        let journal = tempfile::tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm");
        let place = Place { dir, journal };
        std::fs::write(place.path("disk"), vec![7; DISK_BYTES as usize]).unwrap();
        for copy in ["quick", "slow"] {
            std::fs::write(place.path(copy), vec![0; DISK_BYTES as usize]).unwrap();
        }
        let (daemon, mut qmp) = place.start();
        for name in ["disk", "quick", "slow"] {
            let file = json!({"driver": "file", "filename": place.path(name)});
            qmp.run("blockdev-add", json!({"driver": "raw", "node-name": name, "file": file}));
        }
        let backup = |id: &str, speed: u64| {
            json!({"type": "blockdev-backup", "data": {"job-id": id, "device": "disk", "target": id, "sync": "full",
                "speed": speed, "auto-dismiss": false}})
        };
        let actions = [backup("quick", 0), backup("slow", SLOW)];
        let together = json!({"completion-mode": "grouped"});
        qmp.run("transaction", json!({"actions": actions, "properties": together}));
        (place, daemon, qmp)
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
}

fn job(qmp: &mut Qmp, id: &str) -> Value {
    let jobs = qmp.run("query-jobs", json!({}));
    jobs.as_array().unwrap().iter().find(|job| job["id"] == id).cloned().unwrap_or_default()
}

fn wait_for(qmp: &mut Qmp, id: &str, status: &str) {
    wait_until(&format!("{id} is {status}"), || job(qmp, id)["status"] == status);
}

#[test]
fn backups_of_a_group_wait_for_each_other_after_a_restart() {
    for in_order in [false, true] {
        let (place, mut daemon, mut qmp) = Place::begin();
        for _ in 0..2 {
            wait_for(&mut qmp, "quick", "waiting");
            daemon.process.end(in_order);
            (daemon, qmp) = place.start();
        }
        wait_for(&mut qmp, "quick", "waiting");
        assert_eq!(job(&mut qmp, "slow")["status"], "running");
        qmp.run("block-job-set-speed", json!({"device": "slow", "speed": 0}));
        for id in ["quick", "slow"] {
            wait_for(&mut qmp, id, "concluded");
            assert_eq!(job(&mut qmp, id).get("error"), None, "{id}");
            run("cmp", &[text(&place.path("disk")), text(&place.path(id))]);
        }
        daemon.quit(&mut qmp);
    }
}

#[test]
fn a_backup_that_is_cancelled_after_a_restart_takes_its_group_along() {
    let (place, daemon, mut qmp) = Place::begin();
    wait_for(&mut qmp, "quick", "waiting");
    daemon.process.kill();
    let (daemon, mut qmp) = place.start();
    wait_for(&mut qmp, "quick", "waiting");
    qmp.run("job-cancel", json!({"id": "slow"}));
    for id in ["quick", "slow"] {
        wait_for(&mut qmp, id, "concluded");
        assert!(job(&mut qmp, id)["error"].is_string(), "{id}");
    }
    daemon.quit(&mut qmp);
}

#[test]
fn a_backup_waits_for_one_of_its_group_whose_disk_is_missing_and_ends_with_it() {
    for comes_back in [true, false] {
        let (place, daemon, mut qmp) = Place::begin();
        wait_for(&mut qmp, "quick", "waiting");
        daemon.process.kill();
        let away = place.path("away");
        std::fs::rename(place.path("slow"), &away).unwrap();
        let (daemon, mut qmp) = place.start();
        wait_for(&mut qmp, "quick", "waiting");
        assert_eq!(job(&mut qmp, "slow")["status"], "created", "it is held");
        if comes_back {
            std::fs::rename(&away, place.path("slow")).unwrap();
            wait_for(&mut qmp, "slow", "running");
            qmp.run("block-job-set-speed", json!({"device": "slow", "speed": 0}));
            wait_for(&mut qmp, "slow", "concluded");
        } else {
            qmp.run("job-cancel", json!({"id": "slow"}));
        }
        wait_for(&mut qmp, "quick", "concluded");
        assert_eq!(job(&mut qmp, "quick").get("error").is_none(), comes_back);
        daemon.quit(&mut qmp);
    }
}
