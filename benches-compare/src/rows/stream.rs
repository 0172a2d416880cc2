//! Rows 4, 5 and 6b: streams, alone and beside a guest that flushes.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{GIB, PER_REQUESTS, Place, SLOW, on_file, order, qcow2_data, raw_data, text};
use crate::Setup;
use crate::peers::{Daemon, NbdClient, Process, Who, run};
use crate::slow::Slow;
use crate::syncs::in_words;
use crate::table::{Row, Table, median, percentile};

const LOCAL_MIB: u64 = 2048;
const DISTANT_MIB: u64 = 512;
/// How long the guest of row 6b is watched, quiet and beside the stream.
const WATCH: Duration = Duration::from_secs(5);

/// An empty qcow2 overlay of a qcow2 file.
fn overlay(dir: &Path, base: &Path) -> Result<PathBuf> {
    let path = dir.join("overlay.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", text(base)?, text(&path)?])?;
    Ok(path)
}

/// A stream of `bytes` that has ended.
pub struct Streamed {
    pub bytes: u64,
    /// Until the target was on stable storage.
    pub seconds: f64,
    /// Of the daemon, for each GiB.
    pub syncs: Option<f64>,
}

/// Streams `d`, which has `bytes`.
fn stream(setup: &Setup, daemon: &mut Daemon, who: Who, target: &Path, bytes: u64) -> Result<Streamed> {
    let syncs = setup.syncs.of(target.parent().context("a file lies in a folder")?)?;
    let start = Instant::now();
    daemon.qmp.stream()?;
    daemon.qmp.stream_end()?;
    if who == Who::Qemu {
        // Its event promises nothing about stable storage; ours does.
        run("sync", &["-f", text(target)?])?;
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(Streamed { bytes, seconds, syncs: syncs.per(bytes as f64 / GIB)? })
}

/// Rate and syncs in words.
pub fn in_text(runs: &[Streamed]) -> String {
    let rate = median(runs.iter().map(|run| run.bytes as f64 / 1e6 / run.seconds).collect());
    format!("{rate:.0} MB/s, {}/GiB", in_words(runs.iter().map(|run| run.syncs)))
}

/// How much longer `others` took, pair by pair.
pub fn ratio_to(runs: &[Streamed], others: impl Iterator<Item = f64>) -> f64 {
    median(runs.iter().zip(others).map(|(run, other)| other / run.seconds).collect())
}

pub fn seconds(runs: &[Streamed]) -> impl Iterator<Item = f64> {
    runs.iter().map(|run| run.seconds)
}

/// The overlay alone holds what the base holds.
fn verify(raw: &Path, overlay: &Path) -> Result<()> {
    let info: Value = serde_json::from_str(&run("qemu-img", &["info", "--output=json", text(overlay)?])?)?;
    ensure!(info.get("backing-filename").is_none(), "the overlay still has a backing file");
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", text(raw)?, text(overlay)?]).map(drop)
}

/// How long a plain copy of `raw` takes until it is on stable storage, in seconds.
pub fn raw_copy(raw: &Path, copy: &Path) -> Result<f64> {
    let _ = std::fs::remove_file(copy);
    run("sync", &[])?;
    let start = Instant::now();
    let (from, to) = (format!("if={}", raw.display()), format!("of={}", copy.display()));
    run("dd", &[&from, &to, "bs=1M", "conv=fdatasync", "status=none"])?;
    let seconds = start.elapsed().as_secs_f64();
    let _ = std::fs::remove_file(copy);
    Ok(seconds)
}

/// Row 4.
pub fn local(setup: &Setup, table: &mut Table) -> Result<()> {
    local_in(setup, table, &Place { number: "4", dir: &setup.dir, note: "" })
}

/// Row 4 where syncs are slow.
pub fn local_slow(setup: &Setup, table: &mut Table) -> Result<()> {
    let slow = Slow::new(&setup.dir)?;
    local_in(setup, table, &Place { number: "4s", dir: slow.dir(), note: SLOW })
}

fn local_in(setup: &Setup, table: &mut Table, place: &Place<'_>) -> Result<()> {
    let raw = raw_data(&setup.dir, "stream.raw", LOCAL_MIB)?;
    let base = qcow2_data(&setup.dir, "stream.qcow2", &raw)?;
    let copy = place.dir.join("copy.raw");
    let (mut ours, mut theirs, mut plain) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..setup.pairs {
        for who in order(pair) {
            let image = overlay(place.dir, &base)?;
            run("sync", &[])?;
            let mut daemon = Daemon::start(&setup.programs, who, &setup.dir, &on_file("qcow2", &image))?;
            let took = stream(setup, &mut daemon, who, &image, LOCAL_MIB << 20)?;
            daemon.quit()?;
            verify(&raw, &image)?;
            if who == Who::Infill { ours.push(took) } else { theirs.push(took) }
        }
        plain.push(raw_copy(&raw, &copy)?);
    }
    let (ratio, plain_ratio) = (ratio_to(&ours, seconds(&theirs)), ratio_to(&ours, plain.iter().copied()));
    let plain = (LOCAL_MIB << 20) as f64 / 1e6 / median(plain);
    table.push(Row {
        number: place.number,
        workload: format!(
            "block-stream, qcow2 over local full qcow2, until it is on stable storage{}",
            place.note
        ),
        ours: in_text(&ours),
        theirs: format!("{}; raw copy: {plain:.0} MB/s", in_text(&theirs)),
        ratio: format!("{ratio:.2} ×; {plain_ratio:.2} × raw copy"),
        target: "≥ 2 ×; ≥ 0.7 × raw copy",
        met: ratio >= 2.0 && plain_ratio >= 0.7,
    });
    Ok(())
}

/// Row 5.
pub fn distant(setup: &Setup, table: &mut Table) -> Result<()> {
    let raw = raw_data(&setup.dir, "distant.raw", DISTANT_MIB)?;
    let socket = setup.dir.join("distant.sock");
    let mut command = Command::new("nbdkit");
    command.args(["-f", "-U", text(&socket)?, "--filter=delay", "file", text(&raw)?, "rdelay=20ms"]);
    let _source = Process::start(&mut command)?;
    NbdClient::connect(&socket, "")?;
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let size = DISTANT_MIB << 20;
    let image = setup.dir.join("overlay.qcow2");
    let node = json!({
        "driver": "qcow2", "node-name": "d", "file": {"driver": "file", "filename": image},
        "backing": {"driver": "nbd", "server": {"type": "unix", "path": socket}, "export": ""}
    });
    let copy = setup.dir.join("copy.raw");
    let (mut ours, mut theirs, mut plain) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..setup.pairs {
        for who in order(pair) {
            // The backing is named by the daemon's command line alone.
            run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image)?, &size.to_string()])?;
            let mut daemon = Daemon::start(&setup.programs, who, &setup.dir, &node)?;
            let took = stream(setup, &mut daemon, who, &image, size)?;
            daemon.quit()?;
            verify(&raw, &image)?;
            if who == Who::Infill { ours.push(took) } else { theirs.push(took) }
        }
        let _ = std::fs::remove_file(&copy);
        let start = Instant::now();
        run("nbdcopy", &[&uri, text(&copy)?])?;
        plain.push(start.elapsed().as_secs_f64());
    }
    let _ = std::fs::remove_file(&copy);
    let (ratio, plain_ratio) = (ratio_to(&ours, seconds(&theirs)), ratio_to(&ours, plain.iter().copied()));
    let plain = size as f64 / 1e6 / median(plain);
    table.push(Row {
        number: "5",
        workload: "block-stream, source with 20 ms per read (nbdkit delay)".into(),
        ours: in_text(&ours),
        theirs: format!("{}; nbdcopy: {plain:.0} MB/s", in_text(&theirs)),
        ratio: format!("{ratio:.1} ×; {plain_ratio:.2} × nbdcopy"),
        target: "≥ 12 ×; ≥ 0.9 × nbdcopy",
        met: ratio >= 12.0 && plain_ratio >= 0.9,
    });
    Ok(())
}

/// Latencies, in milliseconds, of 4 KiB writes each followed by a flush, until told to stop or for [`WATCH`].
fn write_and_flush(socket: &Path, disk: u64, stop: Option<&AtomicBool>) -> Result<Vec<f64>> {
    let mut client = NbdClient::connect(socket, "d")?;
    let (mut samples, mut place, data) = (Vec::new(), 0x9e37_79b9_u64, vec![0x5a; 4096]);
    let start = Instant::now();
    while stop.map_or(start.elapsed() < WATCH, |stop| !stop.load(Ordering::Relaxed)) {
        // A full-period generator: every place of the disk, in an order without a pattern.
        place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = (place >> 20) % (disk / 4096) * 4096;
        let begin = Instant::now();
        client.write(at, &data)?;
        client.flush()?;
        samples.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    Ok(samples)
}

/// What the guest felt, and how fast the stream was.
struct Beside {
    quiet: Vec<f64>,
    busy: Vec<f64>,
    rate: f64,
    /// For each 1,000 of the guest's writes, each with its flush: quiet, and beside the stream.
    syncs: [Option<f64>; 2],
}

fn beside(setup: &Setup, who: Who, base: &Path) -> Result<Beside> {
    let size = LOCAL_MIB << 20;
    let image = overlay(&setup.dir, base)?;
    run("sync", &[])?;
    let mut daemon = Daemon::start(&setup.programs, who, &setup.dir, &on_file("qcow2", &image))?;
    let count = setup.syncs.of(&setup.dir)?;
    let quiet = write_and_flush(&daemon.socket, size, None)?;
    let quiet_syncs = count.per(quiet.len() as f64 / PER_REQUESTS)?;
    let count = setup.syncs.of(&setup.dir)?;
    let stop = Arc::new(AtomicBool::new(false));
    let guest = std::thread::spawn({
        let (stop, socket) = (stop.clone(), daemon.socket.clone());
        move || write_and_flush(&socket, size, Some(&stop))
    });
    let start = Instant::now();
    daemon.qmp.stream()?;
    let ended = daemon.qmp.stream_end();
    let rate = size as f64 / 1e6 / start.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    let busy = guest.join().map_err(|_| anyhow::anyhow!("the guest's thread panicked"))??;
    ended?;
    let busy_syncs = count.per(busy.len() as f64 / PER_REQUESTS)?;
    daemon.quit()?;
    Ok(Beside { quiet, busy, rate, syncs: [quiet_syncs, busy_syncs] })
}

/// Row 6b.
pub fn beside_flushes(setup: &Setup, table: &mut Table) -> Result<()> {
    let raw = raw_data(&setup.dir, "stream.raw", LOCAL_MIB)?;
    let base = qcow2_data(&setup.dir, "stream.qcow2", &raw)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for pair in 0..setup.pairs {
        for who in order(pair) {
            let figure = beside(setup, who, &base).with_context(|| format!("{who:?}"))?;
            if who == Who::Infill { ours.push(figure) } else { theirs.push(figure) }
        }
    }
    let times = |runs: &[Beside], percent: f64| {
        let ratio = |run: &Beside| percentile(&run.busy, percent) / percentile(&run.quiet, percent);
        median(runs.iter().map(ratio).collect())
    };
    let figure = |runs: &[Beside]| {
        let rate = median(runs.iter().map(|run| run.rate).collect());
        let quiet = median(runs.iter().map(|run| percentile(&run.quiet, 50.0)).collect());
        let (p50, p99) = (times(runs, 50.0), times(runs, 99.0));
        let [alone, beside] = [0, 1].map(|part| in_words(runs.iter().map(|run| run.syncs[part])));
        let text = format!(
            "quiet p50 {quiet:.2} ms, {alone}; beside: p50 × {p50:.1}, p99 × {p99:.1}, {beside}; stream {rate:.0} MB/s"
        );
        (p50, p99, text)
    };
    let ratio = median(ours.iter().zip(&theirs).map(|(a, b)| a.rate / b.rate).collect());
    let ((p50, p99, our_text), (_, _, their_text)) = (figure(&ours), figure(&theirs));
    table.push(Row {
        number: "6b",
        workload: "4 KiB random write + flush, depth 1, beside an unthrottled local stream".into(),
        ours: our_text,
        theirs: their_text,
        ratio: format!("stream {ratio:.2} ×"),
        target: "p50 ≤ 1.5 ×, p99 ≤ 3 × quiet; stream ≥ 1.5 ×",
        met: p50 <= 1.5 && p99 <= 3.0 && ratio >= 1.5,
    });
    Ok(())
}
