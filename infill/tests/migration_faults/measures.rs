//! What a migration costs on the link, counted by the relay; and a network that is silent for a minute.

use std::time::{Duration, Instant};

use infill_io::{Direction, RelayOptions};
use serde_json::json;

use crate::common::{run, wait_until};
use crate::hosts::{BLOCK_BYTES, seed};
use crate::site::{NO_COST, Site, of};

/// Blocks of the disk: 64 MiB.
const BLOCKS: u64 = 16384;
/// What may come again after a silence, with the words of NBD around it.
const TWICE_BYTES_MAX: u64 = 1 << 20;
const MIB: f64 = 1024.0 * 1024.0;

fn p99(took: &[Duration]) -> Duration {
    let mut took = took.to_vec();
    took.sort_unstable();
    took.get((took.len().max(1) - 1) * 99 / 100).copied().unwrap_or_default()
}

/// Bytes that the disk of a migration has at its target, as another program finds them in its image.
fn present(site: &Site, id: &str) -> u64 {
    let all = site.stations[1].migrations().unwrap();
    let image = of(&all, id).unwrap()["disks"][0]["filename"].clone();
    let file = json!({"driver": "file", "filename": image, "locking": "off"});
    let alone = json!({"driver": "qcow2", "file": file, "backing": null});
    let map = run("qemu-img", &["map", "-U", "--output=json", &format!("json:{alone}")]);
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
    let here = map.iter().filter(|extent| extent["data"] == true);
    here.map(|extent| extent["length"].as_u64().unwrap()).sum()
}

#[test]
#[ignore = "measures: cargo test --profile ci -p infill --test migration_faults -- --ignored --nocapture counted"]
fn bytes_on_the_link_are_counted_by_the_relay() {
    // A third of the records is zeroes, which no cluster consists of: all of it is allocated.
    // 256 MiB: what is in flight at the switch, 4 MiB at most, comes twice.
    let blocks = 4 * BLOCKS;
    let allocated = blocks * BLOCK_BYTES;
    println!("mode       travelled before it data MiB  words MiB  of what is allocated  writes/s");
    for mode in ["post-copy", "hybrid", "pre-copy"] {
        let dir = tempfile::tempdir().unwrap();
        let link = RelayOptions { delay: Duration::from_micros(200), bytes_per_second: Some(25 << 20) };
        let mut site = Site::over(dir.path(), 1, seed(), link, blocks);
        site.run(0, 0);
        let began = Instant::now();
        let id = site.begin(0, &[0], mode, false);
        wait_until("it is prepared", || site.state(1, &id) == "prepared");
        if mode == "hybrid" {
            // Of a disk that is switched when 40 % of it are there.
            let enough = allocated * 2 / 5;
            wait_until("40 % are there", || site.stations[0].data.bytes.to_client() >= enough);
        }
        if mode == "pre-copy" {
            // Nothing is left at the source: rounds go on under the guest until little is missing.
            wait_until("it is ready", || site.phase(0, &id) == "ready");
        }
        assert!(site.machines[0].halt());
        let before = site.stations[0].data.bytes.to_client();
        site.stations[0].must("__infill_migration-switch", json!({"migration": id}));
        wait_until("it has changed hands", || site.owns(1, &id));
        site.run(0, 1);
        wait_until("it is all there", || site.state(1, &id) == "local" && site.state(0, &id) == "released");
        assert!(site.machines[0].halt());
        let writes = site.machines[0].knows.lock().unwrap().took.len() as f64 / began.elapsed().as_secs_f64();
        let data = site.stations[0].data.bytes.to_client();
        let words = site.stations[1].words.bytes.to_server() + site.stations[1].words.bytes.to_client();
        println!(
            "{mode:10} {:17.0} %  {:8.1}  {:9.3}  {:20.3}  {writes:8.0}",
            100.0 * before as f64 / allocated as f64,
            data as f64 / MIB,
            words as f64 / MIB,
            data as f64 / allocated as f64,
        );
        site.work_and_judge(0, 1);
    }
}

#[test]
#[ignore = "takes minutes: cargo test --profile ci -p infill --test migration_faults -- --ignored --nocapture minute"]
fn a_minute_of_silence_fails_nothing_slows_no_write_and_is_over_within_a_second() {
    const SILENCE: Duration = Duration::from_secs(60);
    let dir = tempfile::tempdir().unwrap();
    let link = RelayOptions { delay: Duration::from_micros(200), bytes_per_second: Some(4 << 20) };
    let mut site = Site::over(dir.path(), 1, seed(), link, BLOCKS);
    let allocated = BLOCKS * BLOCK_BYTES;
    let id = site.begin(0, &[0], "post-copy", true);
    wait_until("it has changed hands", || site.owns(1, &id));
    site.machines[0].knows.lock().unwrap().writes_only = true;
    let write_for = |site: &mut Site, time: Duration| {
        site.machines[0].knows.lock().unwrap().took.clear();
        site.run(0, 1);
        std::thread::sleep(time);
        assert!(site.machines[0].halt(), "{:?}", site.machines[0].knows.lock().unwrap().violation);
        let took = site.machines[0].knows.lock().unwrap().took.clone();
        (took.len(), p99(&took))
    };
    let before = write_for(&mut site, Duration::from_secs(3));
    for way in [&site.stations[0].data, &site.stations[1].words] {
        way.control.hold(Direction::ToServer);
        way.control.hold(Direction::ToClient);
    }
    let during = write_for(&mut site, SILENCE);
    assert_eq!(site.state(1, &id), "owner");
    let missing = allocated - present(&site, &id);
    let arrived = site.stations[0].data.bytes.to_client();
    for way in [&site.stations[0].data, &site.stations[1].words] {
        way.control.release(Direction::ToServer);
        way.control.release(Direction::ToClient);
    }
    let back = Instant::now();
    wait_until("data flows again", || site.stations[0].data.bytes.to_client() > arrived + (64 << 10));
    let resumed = back.elapsed();
    site.stations[0].data.control.become_link(NO_COST);
    wait_until("it is all there", || site.state(1, &id) == "local" && site.state(0, &id) == "released");
    let data = site.stations[0].data.bytes.to_client();
    let twice = (data - arrived).saturating_sub(missing);
    println!(
        "writes p99 before {:?} ({}), in the silence {:?} ({}); data flows after {resumed:?}; {:.2} MiB of {:.2} MiB travelled, {:.2} MiB after the \
         silence, when {:.2} MiB were missing",
        before.1,
        before.0,
        during.1,
        during.0,
        data as f64 / MIB,
        allocated as f64 / MIB,
        (data - arrived) as f64 / MIB,
        missing as f64 / MIB,
    );
    assert!(twice < TWICE_BYTES_MAX, "{twice} bytes came twice");
    site.machines[0].knows.lock().unwrap().writes_only = false;
    site.work_and_judge(0, 1);
}
