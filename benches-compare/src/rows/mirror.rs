//! Row *mirror*: a disk is copied over a link of 200 Mbit/s while its guest writes 1,000 blocks a second.
//!
//! What has to go over the link are the disk's bytes, and those that the guest writes until the copy is ready. A copy that sends more
//! than a guest's write for each of them may never be ready: then it is given up.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::json;

use super::link::{LINK_BITS, Link};
use super::{on_file, order, raw_data, text};
use crate::Setup;
use crate::peers::{Daemon, NbdClient, Process, Who, patiently, run};
use crate::syncs::in_words;
use crate::table::{Row, Table, median};

const DISK_MIB: u64 = 1024;
const BLOCK: u64 = 4096;
const WRITES_PER_SECOND: f64 = 1000.0;
/// A copy that is not ready after so many times the time that its disk takes alone will not be.
const GIVE_UP: f64 = 4.0;

/// A guest that writes until it is told to stop.
struct Guest {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<Result<()>>>,
}

impl Guest {
    /// Writes blocks out of the first `blocks` from block `first` on, at random.
    fn begin(socket: &Path, first: u64, blocks: u64) -> Result<Guest> {
        let mut client = NbdClient::connect(socket, "d")?;
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (told, count) = (stop.clone(), written.clone());
        let thread = std::thread::spawn(move || {
            let (start, mut random, mut nth) = (Instant::now(), 0x9e37_79b9_7f4a_7c15_u64, 0_u64);
            while !told.load(Ordering::Relaxed) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let data: Vec<u8> = random.to_be_bytes().repeat(BLOCK as usize / 8);
                client.write((first + random % blocks) * BLOCK, &data)?;
                nth += 1;
                count.store(nth, Ordering::Relaxed);
                let due = Duration::from_secs_f64(nth as f64 / WRITES_PER_SECOND);
                std::thread::sleep(due.saturating_sub(start.elapsed()));
            }
            Ok(())
        });
        Ok(Guest { stop, written, thread: Some(thread) })
    }

    fn bytes(&self) -> u64 {
        self.written.load(Ordering::Relaxed) * BLOCK
    }

    fn end(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("it ends once")?;
        thread.join().map_err(|_| anyhow!("the guest's thread has panicked"))?
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

struct Figures {
    ready: bool,
    /// Until it was ready, or given up, over the time that what had to go takes on the link.
    time: f64,
    /// What went over the link, over what had to go.
    bytes: f64,
    /// Guests' writes a second.
    writes: f64,
    syncs: Option<f64>,
}

fn measure(setup: &Setup, who: Who, link: &Link, raw: &Path, share: f64) -> Result<Figures> {
    let size = (DISK_MIB / setup.part) << 20;
    let disk = setup.dir.join("mirror.raw");
    run("cp", &[text(raw)?, text(&disk)?])?;
    run("sync", &[])?;
    let mut command = Command::new("ip");
    command.args([
        "netns",
        "exec",
        &link.names[0],
        "nbdkit",
        "-f",
        "-p",
        "10809",
        "memory",
        &size.to_string(),
    ]);
    let _target = Process::start(&mut command)?;
    let by = ["ip", "netns", "exec", &link.names[2]];
    let mut daemon = Daemon::start_by(&setup.programs, who, &setup.dir, &on_file("raw", &disk), &by)?;
    let target = json!({
        "driver": "nbd", "node-name": "t", "export": "",
        "server": {"type": "inet", "host": "10.99.1.2", "port": "10809"}
    });
    patiently(|| daemon.qmp.call("blockdev-add", target.clone()))?;
    let blocks = (size / BLOCK) as f64;
    let guest = Guest::begin(
        &daemon.socket,
        (blocks / 2.0) as u64 * u64::from(share < 1.0),
        (blocks * share) as u64,
    )?;
    let count = setup.syncs.of(&setup.dir)?;
    let (before, start) = (link.bytes_to_source()?, Instant::now());
    daemon
        .qmp
        .call("blockdev-mirror", json!({"job-id": "j", "device": "d", "target": "t", "sync": "full"}))?;
    let limit = Duration::from_secs_f64(size as f64 * 8.0 / LINK_BITS * GIVE_UP);
    let ready = daemon.qmp.wait_within("BLOCK_JOB_READY", limit)?.is_some();
    let (seconds, sent, wrote) =
        (start.elapsed().as_secs_f64(), link.bytes_to_source()? - before, guest.bytes() as f64);
    let syncs = count.per(1.0)?;
    guest.end()?;
    daemon.qmp.call("block-job-cancel", json!({"device": "j", "force": !ready}))?;
    daemon.qmp.wait(if ready { "BLOCK_JOB_COMPLETED" } else { "BLOCK_JOB_CANCELLED" })?;
    daemon.quit()?;
    if ready {
        let compare = ["qemu-img", "compare", "-f", "raw", "-F", "raw", text(&disk)?, "nbd://10.99.1.2"];
        let same = run(by[0], &[&by[1..], &compare].concat());
        ensure!(same.is_ok(), "the copy is not the disk: {same:?}");
    }
    let due = size as f64 + wrote;
    Ok(Figures {
        ready,
        time: seconds / (due * 8.0 / LINK_BITS),
        bytes: sent / due,
        writes: wrote / BLOCK as f64 / seconds,
        syncs,
    })
}

/// Row *mirror*.
pub fn under_writes(setup: &Setup, table: &mut Table) -> Result<()> {
    let link = Link::new().context("network namespaces with tbf are needed: run as root")?;
    let raw = raw_data(&setup.dir, "mirror-source.raw", DISK_MIB / setup.part)?;
    for (share, what, target, bytes_max) in [
        (1.0, "all of the disk", "ready in ≤ 1.15 × bytes/link, ≤ 1.12 × the bytes", 1.12),
        (0.05, "5 % of the disk", "ready in ≤ 1.15 × bytes/link, ≤ 1.03 × the bytes", 1.03),
    ] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for pair in 0..setup.pairs {
            for who in order(pair) {
                let figures = measure(setup, who, &link, &raw, share).with_context(|| format!("{who:?}"))?;
                if who == Who::Infill { ours.push(figures) } else { theirs.push(figures) }
            }
        }
        let of = |runs: &[Figures], f: &dyn Fn(&Figures) -> f64| median(runs.iter().map(f).collect());
        let figure = |runs: &[Figures]| {
            let (time, bytes) = (of(runs, &|f| f.time), of(runs, &|f| f.bytes));
            let ready = runs.iter().all(|run| run.ready);
            let (writes, syncs) = (of(runs, &|f| f.writes), in_words(runs.iter().map(|run| run.syncs)));
            let when =
                if ready { format!("ready in {time:.2} ×") } else { format!("not ready in {time:.1} ×") };
            let text =
                format!("{when} bytes/link, {bytes:.2} × the bytes, {writes:.0} writes/s, {syncs} in all");
            (ready && bytes <= bytes_max && time <= 1.15, text)
        };
        let ((met, our_text), (_, their_text)) = (figure(&ours), figure(&theirs));
        table.push(Row {
            number: "mirror",
            workload: format!(
                "mirror of {} MiB over a 200 Mbit/s link, guest writes 4 KiB at random into {what}, 1,000 a second",
                DISK_MIB / setup.part
            ),
            ours: our_text,
            theirs: their_text,
            ratio: "against what had to go".into(),
            target,
            met,
        });
    }
    Ok(())
}
