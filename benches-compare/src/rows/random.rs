//! Rows 1, 2, 3 and QED: small random requests over NBD.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::{PER_REQUESTS, Place, SLOW, on_file, order, qcow2_data, raw_data, text};
use crate::Setup;
use crate::peers::{Daemon, Fio, Process, Who, run};
use crate::slow::Slow;
use crate::syncs::in_words;
use crate::table::{Row, Table, median};

const DISK_MIB: u64 = 1024;
const READ_SECONDS: &str = "--runtime=5";

/// IOPS, processor time of the server for each request in microseconds, and syncs for each 1,000.
struct Figure {
    iops: f64,
    cpu_us: f64,
    syncs: Option<f64>,
}

/// What fio sees of a server whose files lie in `dir`.
fn measured(setup: &Setup, dir: &Path, process: &Process, uri: &str, args: &[&str]) -> Result<Figure> {
    let before = process.cpu_seconds();
    let syncs = setup.syncs.of(dir)?;
    let fio = Fio::run(uri, args)?;
    let syncs = syncs.per(fio.ios / PER_REQUESTS)?;
    Ok(Figure { iops: fio.iops(), cpu_us: (process.cpu_seconds() - before) * 1e6 / fio.ios, syncs })
}

fn figure(figures: &[Figure]) -> (f64, String) {
    let iops = median(figures.iter().map(|figure| figure.iops).collect());
    let cpu = median(figures.iter().map(|figure| figure.cpu_us).collect());
    let syncs = in_words(figures.iter().map(|figure| figure.syncs));
    (iops, format!("{iops:.0} IOPS, {cpu:.1} µs CPU, {syncs}"))
}

fn ratio_of(ours: &[Figure], theirs: &[Figure]) -> f64 {
    median(ours.iter().zip(theirs).map(|(a, b)| a.iops / b.iops).collect())
}

/// nbdkit with its file plugin on the raw file.
fn nbdkit_file(dir: &Path, raw: &Path) -> Result<(Process, String)> {
    let socket = dir.join("nbdkit.sock");
    let _ = std::fs::remove_file(&socket);
    let mut command = Command::new("nbdkit");
    command.args(["-f", "-U", text(&socket)?, "file", text(raw)?]);
    let process = Process::start(&mut command)?;
    crate::peers::NbdClient::connect(&socket, "")?;
    Ok((process, format!("nbd+unix:///?socket={}", socket.display())))
}

fn random_reads(
    setup: &Setup,
    table: &mut Table,
    number: &'static str,
    depth: u32,
    targets: (f64, f64),
) -> Result<()> {
    let raw = raw_data(&setup.dir, "base.raw", DISK_MIB)?;
    let image = qcow2_data(&setup.dir, "base.qcow2", &raw)?;
    let depth_arg = format!("--iodepth={depth}");
    let args = ["--rw=randread", "--bs=4k", &depth_arg, "--time_based", READ_SECONDS];
    let (mut ours, mut theirs, mut kit) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..setup.pairs {
        for who in order(pair) {
            let daemon = Daemon::start(&setup.programs, who, &setup.dir, &on_file("qcow2", &image))?;
            if pair == 0 {
                run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&raw)?, &daemon.uri()])?;
            }
            let figure = measured(setup, &setup.dir, &daemon.process, &daemon.uri(), &args)?;
            if who == Who::Infill {
                ours.push(figure)
            } else {
                theirs.push(figure)
            }
            daemon.quit()?;
        }
        let (process, uri) = nbdkit_file(&setup.dir, &raw)?;
        kit.push(measured(setup, &setup.dir, &process, &uri, &args)?);
    }
    let ((_, our_text), (_, their_text), (_, kit_text)) = (figure(&ours), figure(&theirs), figure(&kit));
    let (ratio, kit_ratio) = (ratio_of(&ours, &theirs), ratio_of(&ours, &kit));
    table.push(Row {
        number,
        workload: format!("4 KiB random read, allocated qcow2, page cache warm, depth {depth}"),
        ours: our_text,
        theirs: format!("{their_text}; nbdkit file: {kit_text}"),
        ratio: format!("{ratio:.2} ×; {kit_ratio:.2} × nbdkit"),
        target: if depth == 1 { "≥ 1.6 ×" } else { "≥ 2.5 ×; ≥ 1.3 × nbdkit" },
        met: ratio >= targets.0 && kit_ratio >= targets.1,
    });
    Ok(())
}

/// Row 1.
pub fn read_deep(setup: &Setup, table: &mut Table) -> Result<()> {
    random_reads(setup, table, "1", 32, (2.5, 1.3))
}

/// Row 2.
pub fn read_single(setup: &Setup, table: &mut Table) -> Result<()> {
    random_reads(setup, table, "2", 1, (1.6, 0.0))
}

/// Writes to random places of an empty image in `place`, each place once, and a flush at the end.
fn fill(setup: &Setup, place: &Place<'_>, who: Who, driver: &str, image: &Path) -> Result<Figure> {
    let args = ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--io_size=64M", "--end_fsync=1"];
    let daemon = Daemon::start(&setup.programs, who, &setup.dir, &on_file(driver, image))?;
    let figure = measured(setup, place.dir, &daemon.process, &daemon.uri(), &args)?;
    daemon.quit()?;
    let report = run("qemu-img", &["check", "-f", driver, text(image)?]);
    report.map(|_| figure)
}

/// Row 3, both halves.
pub fn allocating_writes(setup: &Setup, table: &mut Table) -> Result<()> {
    allocating_writes_in(setup, table, &Place { number: "3", dir: &setup.dir, note: "" })
}

/// Row 3 where syncs are slow.
pub fn allocating_writes_slow(setup: &Setup, table: &mut Table) -> Result<()> {
    let slow = Slow::new(&setup.dir)?;
    allocating_writes_in(setup, table, &Place { number: "3s", dir: slow.dir(), note: SLOW })
}

fn allocating_writes_in(setup: &Setup, table: &mut Table, place: &Place<'_>) -> Result<()> {
    let raw = raw_data(&setup.dir, "base.raw", DISK_MIB)?;
    let base = qcow2_data(&setup.dir, "base.qcow2", &raw)?;
    let image = place.dir.join("overlay.qcow2");
    let create = |options: &str| -> Result<()> {
        let args =
            ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", text(&base)?, "-o", options, text(&image)?];
        run("qemu-img", &args).map(drop)
    };
    let (mut whole, mut sub, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..setup.pairs {
        for who in order(pair) {
            create("extended_l2=off")?;
            let figure = fill(setup, place, who, "qcow2", &image)?;
            if who == Who::Infill { whole.push(figure) } else { theirs.push(figure) }
        }
        create("extended_l2=on")?;
        sub.push(fill(setup, place, Who::Infill, "qcow2", &image)?);
    }
    for (ours, what, target, least) in [
        (&whole, "64 KiB clusters on both sides", "≥ 1.5 ×", 1.5),
        (&sub, "ours with subclusters, the default of our overlays", "≥ 3 ×", 3.0),
    ] {
        let ratio = ratio_of(ours, &theirs);
        table.push(Row {
            number: place.number,
            workload: format!(
                "4 KiB random write, depth 32, empty overlay on a full base, final flush; {what}{}",
                place.note
            ),
            ours: figure(ours).1,
            theirs: figure(&theirs).1,
            ratio: format!("{ratio:.2} ×"),
            target,
            met: ratio >= least,
        });
    }
    Ok(())
}

/// Allocating writes in QED.
pub fn qed_allocating_writes(setup: &Setup, table: &mut Table) -> Result<()> {
    qed_allocating_writes_in(setup, table, &Place { number: "QED", dir: &setup.dir, note: "" })
}

/// Allocating writes in QED where syncs are slow.
pub fn qed_allocating_writes_slow(setup: &Setup, table: &mut Table) -> Result<()> {
    let slow = Slow::new(&setup.dir)?;
    qed_allocating_writes_in(setup, table, &Place { number: "QEDs", dir: slow.dir(), note: SLOW })
}

fn qed_allocating_writes_in(setup: &Setup, table: &mut Table, place: &Place<'_>) -> Result<()> {
    let image = place.dir.join("empty.qed");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for pair in 0..setup.pairs {
        for who in order(pair) {
            run("qemu-img", &["create", "-q", "-f", "qed", text(&image)?, "1G"])?;
            let figure = fill(setup, place, who, "qed", &image)?;
            if who == Who::Infill { ours.push(figure) } else { theirs.push(figure) }
        }
    }
    let ratio = ratio_of(&ours, &theirs);
    table.push(Row {
        number: place.number,
        workload: format!("4 KiB random write, depth 32, empty QED, final flush{}", place.note),
        ours: figure(&ours).1,
        theirs: figure(&theirs).1,
        ratio: format!("{ratio:.2} ×"),
        target: "≥ 5 ×",
        met: ratio >= 5.0,
    });
    Ok(())
}
