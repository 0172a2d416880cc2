//! *Completed* is durable: whoever dies at that instant, process or machine, the overlay holds every byte without its
//! backing.
//!
//! Both ways to die are tried many times. The process is killed (`kill -9`) while its files are in the page cache; the
//! power is cut on a storage of this test's own, an NBD export that keeps apart what was flushed and forgets the rest, or
//! a part of it, sector by sector.

mod common;
#[path = "common/forgetful.rs"]
mod forgetful;
#[path = "common/qmp.rs"]
mod qmp;

use std::path::Path;

use common::{output, run, text};
use forgetful::{Forgetful, Random, serve};
use infill_io::Reactors;
use qmp::{Daemon, Program};
use serde_json::json;

/// How often each death is tried.
const ROUNDS: usize = 50;
/// Size of the disks, in bytes. Not a multiple of a cluster.
const DISK_BYTES: usize = (2 << 20) - 1536;

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
