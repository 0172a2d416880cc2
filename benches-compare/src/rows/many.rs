//! Rows *disks* and *qmp*: what a disk costs that nobody uses, and how fast a monitor answers.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{on_file, order, text};
use crate::Setup;
use crate::peers::{Daemon, NbdClient, Who, run};
use crate::syncs::in_words;
use crate::table::{Row, Table, median};

const DISKS: u64 = 1000;
const COMMANDS: u64 = 20_000;

/// Row *disks*: so many nodes on files of their own, each exported.
pub fn idle_disks(setup: &Setup, table: &mut Table) -> Result<()> {
    let disks = DISKS / setup.part;
    let template = setup.dir.join("idle.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&template)?, "1G"])?;
    for nth in 0..disks {
        std::fs::copy(&template, setup.dir.join(format!("idle{nth}.qcow2")))?;
    }
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for pair in 0..setup.pairs {
        for who in order(pair) {
            // Each disk is a file that is open: as many as may be.
            let by = ["sh", "-c", "ulimit -n $(ulimit -Hn); exec \"$@\"", "sh"];
            let mut daemon =
                Daemon::start_by(&setup.programs, who, &setup.dir, &on_file("qcow2", &template), &by)?;
            let (before, start) = (daemon.process.resident_mib()?, Instant::now());
            let count = setup.syncs.of(&setup.dir)?;
            for nth in 0..disks {
                let name = format!("n{nth}");
                let mut node = on_file("qcow2", &setup.dir.join(format!("idle{nth}.qcow2")));
                node["node-name"] = json!(name);
                daemon.qmp.call("blockdev-add", node)?;
                daemon.qmp.call(
                    "block-export-add",
                    json!({"type": "nbd", "id": name, "node-name": name, "name": name, "writable": true}),
                )?;
            }
            let (seconds, syncs) = (start.elapsed().as_secs_f64(), count.per(disks as f64)?);
            let kib = (daemon.process.resident_mib()? - before) * 1024.0 / disks as f64;
            let mut client = NbdClient::connect(&daemon.socket, &format!("n{}", disks - 1))?;
            ensure!(client.read(0, 512)? == [0; 512], "{who:?}: the last disk is not empty");
            drop(client);
            daemon.quit()?;
            let figures = (kib, seconds * 1e3 / disks as f64, syncs);
            if who == Who::Infill { ours.push(figures) } else { theirs.push(figures) }
        }
    }
    let of = |runs: &[(f64, f64, Option<f64>)]| {
        let kib = median(runs.iter().map(|run| run.0).collect());
        let ms = median(runs.iter().map(|run| run.1).collect());
        (kib, format!("{kib:.0} KiB and {ms:.2} ms a disk, {} each", in_words(runs.iter().map(|run| run.2))))
    };
    let ((our_kib, our_text), (their_kib, their_text)) = (of(&ours), of(&theirs));
    table.push(Row {
        number: "disks",
        workload: format!(
            "{disks} nodes on qcow2 files and {disks} exports in one daemon: memory and time for each"
        ),
        ours: our_text,
        theirs: their_text,
        ratio: format!("{:.2} ×", our_kib / their_kib),
        target: "≤ 1 ×",
        met: our_kib <= their_kib,
    });
    Ok(())
}

/// Row *qmp*: one client that asks, waits for the answer, and asks again.
pub fn commands(setup: &Setup, table: &mut Table) -> Result<()> {
    let image = setup.dir.join("asked.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image)?, "1G"])?;
    let asked = ["query-jobs", "query-block-exports", "query-named-block-nodes", "query-block-jobs"];
    let commands = COMMANDS / setup.part;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for pair in 0..setup.pairs {
        for who in order(pair) {
            let mut daemon = Daemon::start(&setup.programs, who, &setup.dir, &on_file("qcow2", &image))?;
            let (cpu, start) = (daemon.process.cpu_seconds(), Instant::now());
            for nth in 0..commands {
                let answer = daemon.qmp.call(asked[nth as usize % asked.len()], json!({}))?;
                ensure!(matches!(answer, Value::Array(_)), "{who:?} answers {answer}");
            }
            let rate = commands as f64 / start.elapsed().as_secs_f64();
            let micros = (daemon.process.cpu_seconds() - cpu) * 1e6 / commands as f64;
            daemon.quit().context("it ends")?;
            if who == Who::Infill { ours.push((rate, micros)) } else { theirs.push((rate, micros)) }
        }
    }
    let of = |runs: &[(f64, f64)]| {
        let rate = median(runs.iter().map(|run| run.0).collect());
        let micros = median(runs.iter().map(|run| run.1).collect());
        (rate, format!("{rate:.0} commands/s, {micros:.0} µs CPU"))
    };
    let ((our_rate, our_text), (their_rate, their_text)) = (of(&ours), of(&theirs));
    table.push(Row {
        number: "qmp",
        workload: "QMP commands that ask, one after the other on one monitor".into(),
        ours: our_text,
        theirs: their_text,
        ratio: format!("{:.2} ×", our_rate / their_rate),
        target: "≥ 10,000/s",
        met: our_rate >= 10_000.0,
    });
    Ok(())
}
