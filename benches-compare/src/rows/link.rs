//! Row 6: a guest's cold reads over a slow link that a stream uses at the same time.
//!
//! Three network namespaces in a line, with a token bucket of 200 Mbit/s in the middle one: source, router, host.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;

use super::{PER_REQUESTS, order, text};
use crate::Setup;
use crate::peers::{Daemon, NbdClient, Process, Who, run};
use crate::slow;
use crate::syncs::in_words;
use crate::table::{Row, Table, median, percentile};

pub const LINK_BITS: f64 = 200e6;
/// Where `ip netns` keeps the names of namespaces.
const NAMES: &str = "/run/netns";
const DISK: u64 = 256 << 30;
const WATCH: Duration = Duration::from_secs(8);
/// Where the guest reads: far ahead of the stream.
const READ_FROM: u64 = 16 << 30;
const READ_APART: u64 = 1 << 20;

/// Namespaces that go with this.
pub struct Link {
    /// Source, router and host.
    pub names: [String; 3],
}

impl Link {
    pub fn new() -> Result<Link> {
        if slow::has_namespaces() {
            // A folder of our own for their names: killed at any moment, the run leaves none behind for the next one to stumble on.
            std::fs::create_dir_all(NAMES)?;
            run("mount", &["-t", "tmpfs", "none", NAMES])?;
        }
        let id = std::process::id();
        let link = Link { names: ["source", "router", "host"].map(|role| format!("infill-{role}-{id}")) };
        for name in &link.names {
            run("ip", &["netns", "add", name])?;
            run("ip", &["-n", name, "link", "set", "lo", "up"])?;
        }
        let [source, router, host] = &link.names;
        link.wire(source, router, "s", "10.99.1")?;
        link.wire(host, router, "h", "10.99.2")?;
        run("ip", &["netns", "exec", router, "sysctl", "-qw", "net.ipv4.ip_forward=1"])?;
        for device in ["rs", "rh"] {
            let limit = ["rate", "200mbit", "burst", "16kb", "limit", "4mb"];
            run("tc", &[&["-n", router, "qdisc", "add", "dev", device, "root", "tbf"][..], &limit].concat())?;
        }
        Ok(link)
    }

    fn wire(&self, end: &str, router: &str, letter: &str, net: &str) -> Result<()> {
        let (near, far) = (format!("e{letter}"), format!("r{letter}"));
        run("ip", &["-n", end, "link", "add", &near, "type", "veth", "peer", "name", &far, "netns", router])?;
        run("ip", &["-n", end, "addr", "add", &format!("{net}.2/24"), "dev", &near])?;
        run("ip", &["-n", router, "addr", "add", &format!("{net}.1/24"), "dev", &far])?;
        run("ip", &["-n", end, "link", "set", &near, "up"])?;
        run("ip", &["-n", router, "link", "set", &far, "up"])?;
        run("ip", &["-n", end, "route", "add", "default", "via", &format!("{net}.1")]).map(drop)
    }

    /// Bytes that have come over the link towards the host.
    fn bytes(&self) -> Result<f64> {
        self.sent_by("rh")
    }

    /// Bytes that have come over the link towards the source.
    pub fn bytes_to_source(&self) -> Result<f64> {
        self.sent_by("rs")
    }

    fn sent_by(&self, device: &str) -> Result<f64> {
        let path = format!("/sys/class/net/{device}/statistics/tx_bytes");
        Ok(run("ip", &["netns", "exec", &self.names[1], "cat", &path])?.trim().parse()?)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = run("ip", &["netns", "del", name]);
        }
    }
}

/// Latencies in milliseconds of cold reads from `at` on, in a closed loop or `per_second` of them; and the next place.
fn reads(socket: &Path, at: &mut u64, per_second: Option<f64>) -> Result<Vec<f64>> {
    let mut client = NbdClient::connect(socket, "d")?;
    let (start, mut samples) = (Instant::now(), Vec::new());
    while start.elapsed() < WATCH {
        let begin = Instant::now();
        let data = client.read(*at, 4096)?;
        samples.push(begin.elapsed().as_secs_f64() * 1e3);
        let expected = (0..512).flat_map(|word| (*at + word * 8).to_be_bytes());
        anyhow::ensure!(data.iter().copied().eq(expected), "wrong data at {at}");
        *at += READ_APART;
        if let Some(rate) = per_second {
            std::thread::sleep(Duration::from_secs_f64(1.0 / rate).saturating_sub(begin.elapsed()));
        }
    }
    Ok(samples)
}

struct Figures {
    quiet: Vec<f64>,
    busy: Vec<f64>,
    /// Of the link, in the busy time.
    used: f64,
    /// For each 1,000 reads, in the busy time.
    syncs: Option<f64>,
    /// The same with few reads a second.
    slow_syncs: Option<f64>,
    slow_quiet: Vec<f64>,
    slow_busy: Vec<f64>,
}

fn measure(setup: &Setup, who: Who, link: &Link, image: &PathBuf) -> Result<Figures> {
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(image)?, &DISK.to_string()])?;
    let blockdev = json!({
        "driver": "qcow2", "node-name": "d", "file": {"driver": "file", "filename": image},
        "backing": {
            "driver": "nbd", "export": "",
            "server": {"type": "inet", "host": "10.99.1.2", "port": "10809"}
        }
    });
    let by = ["ip", "netns", "exec", &link.names[2]];
    let mut daemon = Daemon::start_by(&setup.programs, who, &setup.dir, &blockdev, &by)?;
    let mut at = READ_FROM;
    let quiet = reads(&daemon.socket, &mut at, None)?;
    let slow_quiet = reads(&daemon.socket, &mut at, Some(10.0))?;
    daemon.qmp.stream()?;
    let count = setup.syncs.of(&setup.dir)?;
    let slow_busy = reads(&daemon.socket, &mut at, Some(10.0))?;
    let slow_syncs = count.per(slow_busy.len() as f64 / PER_REQUESTS)?;
    // The last read's shadow is over before the closed loop begins.
    std::thread::sleep(Duration::from_millis(200));
    let count = setup.syncs.of(&setup.dir)?;
    let (before, start) = (link.bytes()?, Instant::now());
    let busy = reads(&daemon.socket, &mut at, None)?;
    let used = (link.bytes()? - before) * 8.0 / start.elapsed().as_secs_f64() / LINK_BITS;
    let syncs = count.per(busy.len() as f64 / PER_REQUESTS)?;
    Ok(Figures { quiet, busy, used, syncs, slow_syncs, slow_quiet, slow_busy })
}

/// Row 6.
pub fn cold_reads(setup: &Setup, table: &mut Table) -> Result<()> {
    let link = Link::new().context("network namespaces with tbf are needed: run as root")?;
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &link.names[0], "nbdkit", "-f", "-p", "10809", "pattern", "256G"]);
    let _source = Process::start(&mut command)?;
    let image = setup.dir.join("link.qcow2");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for pair in 0..setup.pairs {
        for who in order(pair) {
            let figures = measure(setup, who, &link, &image).with_context(|| format!("{who:?}"))?;
            if who == Who::Infill { ours.push(figures) } else { theirs.push(figures) }
        }
    }
    let of = |runs: &[Figures], f: &dyn Fn(&Figures) -> f64| median(runs.iter().map(f).collect());
    let closed = |runs: &[Figures]| {
        let p50 = of(runs, &|f| percentile(&f.busy, 50.0) / percentile(&f.quiet, 50.0));
        let p99 = of(runs, &|f| percentile(&f.busy, 99.0) / percentile(&f.quiet, 99.0));
        let iops = of(runs, &|f| f.busy.len() as f64 / f.quiet.len() as f64 * 100.0);
        let used = of(runs, &|f| f.used * 100.0);
        let syncs = in_words(runs.iter().map(|run| run.syncs));
        let text = format!("p50 × {p50:.1}, p99 × {p99:.1}, IOPS {iops:.0} %, link {used:.0} %, {syncs}");
        (p50 <= 4.0 && p99 <= 4.0 && iops >= 30.0 && used >= 80.0, text)
    };
    let ((met, our_text), (_, their_text)) = (closed(&ours), closed(&theirs));
    table.push(Row {
        number: "6",
        workload: "cold 4 KiB reads, depth 1, closed loop, beside a stream on a 200 Mbit/s link".into(),
        ours: our_text,
        theirs: their_text,
        ratio: "against its own quiet run".into(),
        target: "p50 ≤ 4 ×, p99 ≤ 4 ×, IOPS ≥ 30 %, link ≥ 80 %",
        met,
    });
    let slower =
        |runs: &[Figures]| of(runs, &|f| percentile(&f.slow_busy, 99.0) - percentile(&f.slow_quiet, 99.0));
    let slow_syncs = |runs: &[Figures]| in_words(runs.iter().map(|run| run.slow_syncs));
    let (our_slower, their_slower) = (slower(&ours), slower(&theirs));
    table.push(Row {
        number: "6",
        workload: "the same with 10 reads a second: p99 against the quiet run".into(),
        ours: format!("{our_slower:+.1} ms, {}", slow_syncs(&ours)),
        theirs: format!("{their_slower:+.1} ms, {}", slow_syncs(&theirs)),
        ratio: "–".into(),
        target: "≤ + 3 ms",
        met: our_slower <= 3.0,
    });
    Ok(())
}
