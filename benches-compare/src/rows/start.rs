//! Rows 8 and 11: how soon a disk is usable, and what it costs to have it.

use anyhow::Result;
use serde_json::{Value, json};

use super::{on_file, order, raw_data, text};
use crate::Setup;
use crate::peers::{Daemon, NbdClient, Who, run};
use crate::syncs::in_words;
use crate::table::{Row, Table, median};

const CHAIN_LAYERS: usize = 64;

/// Row 8.
pub fn chain_of_64(setup: &Setup, table: &mut Table) -> Result<()> {
    let raw = raw_data(&setup.dir, "small.raw", 64)?;
    let mut below = (raw, "raw");
    for layer in 1..CHAIN_LAYERS {
        let path = setup.dir.join(format!("layer{layer}.qcow2"));
        let (base, format) = (text(&below.0)?, below.1);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", format, "-b", base, text(&path)?])?;
        below = (path, "qcow2");
    }
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for pair in 0..setup.pairs.max(7) {
        for who in order(pair) {
            let count = setup.syncs.of(&setup.dir)?;
            let daemon = Daemon::start(&setup.programs, who, &setup.dir, &on_file("qcow2", &below.0))?;
            let took = (daemon.first_reply.as_secs_f64(), count.per(1.0)?);
            if who == Who::Infill { ours.push(took) } else { theirs.push(took) }
        }
    }
    let ratio = median(ours.iter().zip(&theirs).map(|(a, b)| a.0 / b.0).collect());
    let figure = |runs: Vec<(f64, Option<f64>)>| {
        let syncs = in_words(runs.iter().map(|run| run.1));
        format!("{:.1} ms, {syncs} in all", median(runs.iter().map(|run| run.0).collect()) * 1e3)
    };
    table.push(Row {
        number: "8",
        workload: format!("start to first reply, chain of {CHAIN_LAYERS}"),
        ours: figure(ours),
        theirs: figure(theirs),
        ratio: format!("{ratio:.2} ×"),
        target: "≤ 0.6 ×",
        met: ratio <= 0.6,
    });
    Ok(())
}

/// Row 11: the disk is read all over before memory is looked at.
pub fn large_disk(setup: &Setup, table: &mut Table) -> Result<()> {
    const TIB: u64 = 1 << 40;
    const PIECES: u64 = 1024;
    let image = setup.dir.join("large.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image)?, "1T"])?;
    let blockdev: Value = json!({
        "driver": "qcow2", "node-name": "d", "file": {"driver": "file", "filename": image}
    });
    let daemon = Daemon::start(&setup.programs, Who::Qemu, &setup.dir, &blockdev)?;
    let mut client = NbdClient::connect(&daemon.socket, "d")?;
    for piece in 0..PIECES {
        client.write(piece * (TIB / PIECES), &vec![0xa5; 1 << 20])?;
    }
    client.flush()?;
    drop(client);
    daemon.quit()?;
    let mut figures = Vec::new();
    for who in [Who::Infill, Who::Qemu] {
        let count = setup.syncs.of(&setup.dir)?;
        let daemon = Daemon::start(&setup.programs, who, &setup.dir, &blockdev)?;
        let mut client = NbdClient::connect(&daemon.socket, "d")?;
        for piece in 0..PIECES {
            let data = client.read(piece * (TIB / PIECES) + (piece << 8), 4096)?;
            anyhow::ensure!(data.iter().all(|byte| *byte == 0xa5), "wrong data in piece {piece}");
        }
        let syncs = in_words([count.per(1.0)?]);
        figures.push((daemon.first_reply.as_secs_f64() * 1e3, daemon.process.peak_resident_mib()?, syncs));
        daemon.quit()?;
    }
    let (ours, theirs) = (&figures[0], &figures[1]);
    table.push(Row {
        number: "11",
        workload: "1 TiB virtual, 1 GiB data spread over it: start to first reply; most memory resident after a read of \
                   every piece"
            .into(),
        ours: format!("{:.1} ms, {:.0} MiB, {} in all", ours.0, ours.1, ours.2),
        theirs: format!("{:.1} ms, {:.0} MiB, {} in all", theirs.0, theirs.1, theirs.2),
        ratio: format!("{:.2} ×, {:.2} ×", ours.0 / theirs.0, ours.1 / theirs.1),
        target: "≤ 100 ms; ≤ 64 MiB",
        met: ours.0 <= 100.0 && ours.1 <= 64.0,
    });
    Ok(())
}
