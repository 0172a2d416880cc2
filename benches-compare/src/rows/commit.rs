//! Row 9: a full top layer goes down into its base while it could be used.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::stream::{Streamed, in_text, ratio_to, raw_copy, seconds};
use super::{GIB, on_file, order, qcow2_data, raw_data, text};
use crate::Setup;
use crate::peers::{Daemon, Who, run};
use crate::table::{Row, Table, median};

const TOP_MIB: u64 = 2048;

/// Commits `d` into what it lies on, to the end.
fn commit(setup: &Setup, daemon: &mut Daemon, who: Who, base: &Path, bytes: u64) -> Result<Streamed> {
    let syncs = setup.syncs.of(base.parent().context("a file lies in a folder")?)?;
    let start = std::time::Instant::now();
    daemon.qmp.call("block-commit", json!({"job-id": "j", "device": "d"}))?;
    daemon.qmp.wait("BLOCK_JOB_READY")?;
    daemon.qmp.call("block-job-complete", json!({"device": "j"}))?;
    daemon.qmp.stream_end()?;
    if who == Who::Qemu {
        // Its event promises nothing about stable storage; ours does.
        run("sync", &["-f", text(base)?])?;
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(Streamed { bytes, seconds, syncs: syncs.per(bytes as f64 / GIB)? })
}

/// Row 9.
pub fn live(setup: &Setup, table: &mut Table) -> Result<()> {
    let mib = TOP_MIB / setup.part;
    let raw = raw_data(&setup.dir, "commit.raw", mib)?;
    let full = qcow2_data(&setup.dir, "commit-full.qcow2", &raw)?;
    let (base, top) = (setup.dir.join("commit-base.qcow2"), setup.dir.join("commit-top.qcow2"));
    let (mut ours, mut theirs, mut plain) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..setup.pairs {
        for who in order(pair) {
            run("qemu-img", &["create", "-q", "-f", "qcow2", text(&base)?, &format!("{mib}M")])?;
            run("cp", &[text(&full)?, text(&top)?])?;
            run("qemu-img", &["rebase", "-q", "-u", "-F", "qcow2", "-b", text(&base)?, text(&top)?])?;
            run("sync", &[])?;
            let mut daemon = Daemon::start(&setup.programs, who, &setup.dir, &on_file("qcow2", &top))?;
            let took = commit(setup, &mut daemon, who, &base, mib << 20)?;
            daemon.quit()?;
            let same = run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", text(&raw)?, text(&base)?]);
            ensure!(same.is_ok(), "{who:?}: the base does not hold what the top held");
            if who == Who::Infill { ours.push(took) } else { theirs.push(took) }
        }
        plain.push(raw_copy(&raw, &setup.dir.join("copy.raw"))?);
    }
    let (ratio, plain_ratio) = (ratio_to(&ours, seconds(&theirs)), ratio_to(&ours, plain.iter().copied()));
    let plain = (mib << 20) as f64 / 1e6 / median(plain);
    table.push(Row {
        number: "9",
        workload: "live commit of a full top layer, qcow2 into an empty qcow2, until it is on stable storage"
            .into(),
        ours: in_text(&ours),
        theirs: format!("{}; raw copy: {plain:.0} MB/s", in_text(&theirs)),
        ratio: format!("{ratio:.2} ×; {plain_ratio:.2} × raw copy"),
        target: "≥ 1.5 ×; ≥ 0.7 × raw copy",
        met: ratio >= 1.5 && plain_ratio >= 0.7,
    });
    Ok(())
}
