//! `infill snapshot`: the snapshots that an image keeps in itself.

use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::{Result, anyhow, bail};
use infill_base::Ctx;
use infill_node::{NodeHandle, Snapshot};

use crate::args::SnapshotArgs;
use crate::blockdev::{Blockdevs, Image, snapshots_text};
use crate::commands::{image, policy, run};
use crate::out::print;

/// Lists, makes, deletes or goes back to snapshots of an image that nobody else has open for writing.
pub fn main(args: SnapshotArgs) -> Result<ExitCode> {
    run(move || async move {
        let changes = args.create.is_some() || args.apply.is_some() || args.delete.is_some();
        let blockdevs = Blockdevs::new(policy(&args.image));
        let image = Image {
            alone: true,
            read_only: !changes,
            force_share: args.force_share,
            ..image(&args.filename, &args.image)
        };
        let top = blockdevs.add_image(&image).await?;
        let done = carry_out(&blockdevs.get(&top)?, &args).await;
        let closed = blockdevs.close_all().await;
        done?;
        closed?;
        Ok(ExitCode::SUCCESS)
    })
}

async fn carry_out(node: &NodeHandle, args: &SnapshotArgs) -> Result<()> {
    let cx = &Ctx::GUEST;
    if let Some(name) = &args.create {
        let made = node.create_snapshot(cx, of_now(name)).await;
        made.map_err(|error| anyhow!("Could not create snapshot '{name}': {error}"))?;
    } else if let Some(which) = &args.apply {
        let cannot = |why: &dyn std::fmt::Display| anyhow!("Could not apply snapshot '{which}': {why}");
        let applied = node.apply_snapshot(cx, which).await.map_err(|error| cannot(&error))?;
        applied.ok_or_else(|| cannot(&"there is none of that id or name"))?;
    } else if let Some(name) = &args.delete {
        let cannot = |why: &dyn std::fmt::Display| anyhow!("Could not delete snapshot '{name}': {why}");
        let deleted = node.delete_snapshot(cx, None, Some(name)).await.map_err(|error| cannot(&error))?;
        deleted.ok_or_else(|| cannot(&"snapshot not found"))?;
    } else if !node.keeps_snapshots() {
        bail!("an image of the format {} keeps no snapshots", node.info().driver);
    } else if !args.quiet && !node.snapshots().is_empty() {
        print(&snapshots_text(&node.snapshots()))?;
    }
    Ok(())
}

/// A snapshot of that name, made now, of no machine.
fn of_now(name: &str) -> Snapshot {
    Snapshot { icount: Some(0), ..Snapshot::made_at(name, SystemTime::now()) }
}
