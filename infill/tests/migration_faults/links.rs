//! Hosts that reach each other over TCP, by links that are slow, that damage what is said and that are cut; and operators who
//! decide where the other host is dead.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use infill_io::{Direction, RelayControl, RelayOptions};
use serde_json::json;

use crate::common::wait_until;
use crate::hosts::seed;
use crate::site::{BLOCKS, NO_COST, Site};

/// Five milliseconds each way.
const SLOW: RelayOptions = RelayOptions { delay: Duration::from_millis(5), bytes_per_second: Some(8 << 20) };

/// Damages what passes, in both directions and again and again, while it lives.
struct Damaging {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Damaging {
    fn on(links: Vec<RelayControl>) -> Damaging {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::SeqCst) {
                for link in &links {
                    link.damage(Direction::ToServer);
                    std::thread::sleep(Duration::from_millis(700));
                    link.damage(Direction::ToClient);
                    std::thread::sleep(Duration::from_millis(700));
                }
            }
        });
        Damaging { stop, thread: Some(thread) }
    }
}

impl Drop for Damaging {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[test]
fn a_disk_changes_hands_once_as_much_was_copied_as_may_be_and_at_once_where_somebody_says_so() {
    for told in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        // All of it would take half a minute.
        let link = RelayOptions { delay: Duration::ZERO, bytes_per_second: Some(512 << 10) };
        let mut site = Site::over(dir.path(), 1, seed(), link, 4096);
        let disks = json!([{"name": site.machines[0].name}]);
        let to = site.stations[1].words.address.clone();
        let mut arguments = json!({"disks": disks, "to": to, "auto-switch": !told, "way-back": 0});
        let refused = json!({"disks": disks, "to": to, "mode": "post-copy", "warm-bytes": 4096});
        let refused = site.stations[0].ask("__infill_migrate", refused).unwrap();
        assert!(refused["error"]["desc"].as_str().unwrap().contains("warm-bytes"), "{refused}");
        if !told {
            arguments["warm-bytes"] = json!(1 << 20);
        }
        let begun = site.stations[0].must("__infill_migrate", arguments);
        let id = begun["migration"].as_str().unwrap().to_owned();
        if told {
            wait_until("it is prepared", || site.state(1, &id) == "prepared");
            site.stations[0].must("__infill_migration-switch", json!({"migration": id}));
        }
        wait_until("it has changed hands", || site.owns(1, &id));
        let missing = || {
            let all = site.stations[1].migrations().unwrap();
            crate::site::of(&all, &id).and_then(|one| one["missing-bytes"].as_u64()).unwrap_or_default()
        };
        wait_until("the rest follows", || missing() > 4 << 20);
        site.stations[0].data.control.become_link(NO_COST);
        wait_until("it is all there", || site.state(1, &id) == "local" && site.state(0, &id) == "released");
        site.work_and_judge(0, 1);
    }
}

#[test]
fn what_is_damaged_on_its_way_between_daemons_is_said_again_and_a_disk_is_handed_back_and_reclaimed() {
    let dir = tempfile::tempdir().unwrap();
    let mut site = Site::over(dir.path(), 1, seed(), SLOW, BLOCKS);
    let words: Vec<RelayControl> =
        site.stations.iter().map(|station| station.words.control.clone()).collect();
    site.work_and_judge(0, 0);
    // There, and back, with nothing written there.
    let damaging = Damaging::on(words.clone());
    let id = site.begin(0, &[0], "hybrid", true);
    wait_until("the disk has changed hands", || site.owns(1, &id) || site.state(1, &id) == "local");
    let complete = || matches!(site.state(1, &id).as_str(), "complete" | "local");
    site.stations[0].must("__infill_migration-abort", json!({"migration": id}));
    wait_until("it is back, or all of it is there", || site.owns(0, &id) || complete());
    drop(damaging);
    let at = usize::from(!site.owns(0, &id));
    if at == 1 {
        wait_until("it is all there", || site.state(1, &id) == "local" && site.state(0, &id) == "released");
    }
    site.work_and_judge(0, at);
    // And away again, to a host that dies.
    let damaging = Damaging::on(words);
    site.stations.iter().for_each(|station| station.data.control.hold(Direction::ToClient));
    site.stations.iter().for_each(|station| station.data.control.release(Direction::ToClient));
    let again = site.begin(at, &[0], "post-copy", false);
    wait_until("it is prepared", || site.state(1 - at, &again) == "prepared");
    // What is left stays where it is.
    let slow = RelayOptions { bytes_per_second: Some(32 << 10), ..SLOW };
    site.stations[at].data.control.become_link(slow);
    site.stations[at].must("__infill_migration-switch", json!({"migration": again}));
    wait_until("it has changed hands", || site.owns(1 - at, &again));
    site.stations[1 - at].kill();
    site.stations[at].must("__infill_migration-reclaim", json!({"migration": again}));
    wait_until("it is reclaimed", || site.owns(at, &again));
    site.stations[1 - at].start(None);
    wait_until("the other one knows", || site.state(1 - at, &again) == "superseded");
    drop(damaging);
    site.stations[at].data.control.become_link(NO_COST);
    site.work_and_judge(0, at);
    assert!(!site.owns(1 - at, &again));
}

/// The source dies between the target's word and its own: an operator says so, and the machine goes on at the target. The data
/// follows once the source is back, whichever of its two records it had written.
#[test]
fn a_target_takes_over_from_a_source_that_died_before_it_confirmed() {
    for point in ["source record handed_over before", "source send confirm before"] {
        let dir = tempfile::tempdir().unwrap();
        let mut site = Site::new(dir.path(), 1, seed());
        site.work_and_judge(0, 0);
        site.stations[0].kill();
        site.stations[0].start(Some(point));
        wait_until("the disk is served again", || {
            let exports = site.stations[0].must("query-block-exports", json!({}));
            exports.as_array().unwrap().iter().any(|export| export.get("__infill_held").is_none())
        });
        let id = site.begin(0, &[0], "post-copy", true);
        wait_until("the source is dead", || site.stations[0].is_dead());
        wait_until("the target has accepted", || site.state(1, &id) == "accepted");
        assert!(!site.owns(1, &id), "nobody has confirmed");
        site.stations[1].must("__infill_migration-takeover", json!({"migration": id}));
        wait_until("it is the target's", || site.owns(1, &id));
        site.run(0, 1);
        site.stations[0].start(None);
        wait_until("the source follows", || {
            let (there, here) = (site.state(1, &id), site.state(0, &id));
            there == "local" && here == "released"
        });
        assert!(!site.owns(0, &id));
        assert!(site.machines[0].halt());
        site.work_and_judge(0, 1);
    }
}
