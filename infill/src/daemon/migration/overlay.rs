//! The overlays of disks that come: made, opened on an export of the source, exported, and dropped again.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use infill_base::{Ctx, ExtentKind, IoResult};
use infill_job::IoStatus;
use infill_migrate::{DiskId, Gate, Plan};
use infill_node::{BackingRef, NodeHandle};
use infill_qmp::{BlockExportOptions, BlockdevOptions, Members};
use infill_storage::{StorageHandle, rt};
use serde_json::{Map, Value, json};

use super::gate::DiskGate;
use super::{Local, LocalDisk, Told, live_name, node_name, sync_directory};
use crate::blockdev::{FormatKind, Image, Located, locate};
use crate::daemon::control::Control;
use crate::daemon::create::make_file;

/// Clusters of overlays: with subclusters of 512 bytes, a guest's write of whole sectors needs nothing from the source.
const CLUSTER_BYTES: u64 = 16 << 10;
/// How often it is looked whether a job has ended.
const LOOK: Duration = Duration::from_millis(20);
/// How often it is looked how far a fill is.
const LOOK_AT_FILL: Duration = Duration::from_millis(100);
/// How long a fill that found no space is left alone.
const SPACE_AGAIN: Duration = Duration::from_secs(2);

/// Makes the overlays, on the source's live exports, and exports them: their gates let nothing in but reads of the source.
pub(super) async fn prepare_disks(
    control: &Rc<Control>,
    plan: &Plan,
    local: &Local,
    made: &mut Vec<PathBuf>,
) -> Result<()> {
    for (disk, local_disk) in plan.disks.iter().zip(&local.disks) {
        let live = control.source_uri(local.data.as_deref().unwrap_or_default(), &live_name(disk.id))?;
        let path = &local_disk.path;
        take_away_remains(control, path).await?;
        made.push(path.clone());
        let options = infill_qcow2::CreateOptions {
            size: disk.bytes,
            backing: Some(BackingRef { filename: live.clone(), format: Some("raw".into()) }),
            cluster_bytes: CLUSTER_BYTES,
            extended_l2: true,
            ..infill_qcow2::CreateOptions::default()
        };
        make_image(path, &options).await?;
        let below = open_source(control, &live, node_name('l', disk.id), None).await?;
        let found = control.blockdevs().get(&below)?.len();
        if found != disk.bytes {
            bail!("disk {} is to have {} bytes, and its export has {found}", disk.id, disk.bytes);
        }
        open_overlay(control, local_disk, Some(&below)).await?;
        export(control, disk.id, local_disk, Some(&below))?;
    }
    Ok(())
}

/// Makes the image whole under another name first: what has its own name can be opened, whenever this daemon dies.
async fn make_image(path: &Path, options: &infill_qcow2::CreateOptions) -> Result<()> {
    let part = path.with_extension("qcow2.part");
    let made = async {
        let file = part.to_str().context("the path of the directory for images is not UTF-8")?;
        let storage = StorageHandle::new(make_file(file, 0).map_err(|error| anyhow!(error.desc))?);
        infill_qcow2::create(&Ctx::GUEST, &storage, options).await?;
        drop(storage);
        std::fs::rename(&part, path).with_context(|| format!("cannot name {}", path.display()))
    };
    let made = made.await;
    if made.is_err() {
        let _gone = std::fs::remove_file(&part);
    }
    made?;
    Ok(sync_directory(path)?)
}

/// Takes away what this migration made when it began before, and the daemon died ahead of its record. Nothing is put into
/// an image before there is a record, so one that holds anything is somebody's, and stays.
async fn take_away_remains(control: &Control, path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let there_already = || format!("{} is there already: move it away", path.display());
    let file = path.to_str().context("the path of the directory for images is not UTF-8")?;
    let image = Image { format: Some(FormatKind::Qcow2), alone: true, ..Image::read_only(file) };
    let name = control.blockdevs().add_image(&image).await.with_context(there_already)?;
    let holds = holds_anything(&control.blockdevs().get(&name)?).await;
    control.blockdevs().del(&name).await?;
    if holds.with_context(there_already)? {
        bail!("{}", there_already());
    }
    std::fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))
}

/// Whether anything is present in an overlay.
async fn holds_anything(node: &NodeHandle) -> IoResult<bool> {
    let mut at = 0;
    while at < node.len() {
        let extents = node.extents(&Ctx::GUEST, at, node.len() - at).await?;
        if extents.iter().any(|extent| extent.kind != ExtentKind::Absent) {
            return Ok(true);
        }
        at = extents.last().map_or(node.len(), |last| last.start + last.len);
    }
    Ok(false)
}

/// Opens an export of the source, read-only; one whose size is known need not be there yet.
pub(super) async fn open_source(
    control: &Rc<Control>,
    uri: &str,
    name: String,
    bytes: Option<u64>,
) -> Result<String> {
    if let Ok(node) = control.blockdevs().get(&name) {
        if node.info().filename == uri {
            return Ok(name);
        }
        // Of an earlier migration, or another epoch.
        control.blockdevs().del(&name).await?;
    }
    let Located::Protocol(options) = locate(uri)? else { bail!("{uri}: expected an NBD URI") };
    let options = BlockdevOptions { node_name: Some(name), read_only: Some(true), ..options };
    let opened = match bytes {
        Some(bytes) => control.blockdevs().add_awaited(options, bytes).await,
        None => control.blockdevs().add(options).await,
    };
    control.watch_sources();
    opened
}

pub(super) fn overlay_description(local: &LocalDisk, below: Option<&str>) -> Map<String, Value> {
    let description = json!({
        "driver": "qcow2",
        "node-name": local.node,
        "discard": "unmap",
        "file": { "driver": "file", "filename": local.path },
        "backing": below,
    });
    match description {
        Value::Object(description) => description,
        _ => Map::new(),
    }
}

async fn open_overlay(control: &Rc<Control>, local: &LocalDisk, below: Option<&str>) -> Result<()> {
    if control.blockdevs().get(&local.node).is_ok() {
        return Ok(());
    }
    let members = Members::of_json(overlay_description(local, below));
    let options = BlockdevOptions::read(members).map_err(|error| anyhow!(error.desc))?;
    control.blockdevs().add(options).await?;
    Ok(())
}

pub(super) fn export_description(disk: DiskId, local: &LocalDisk) -> Map<String, Value> {
    let description = json!({
        "type": "nbd", "id": local.export, "node-name": local.node, "name": disk.to_string(), "writable": true,
    });
    match description {
        Value::Object(description) => description,
        _ => Map::new(),
    }
}

/// Exports the overlay under the disk's name. Its gate is there before.
fn export(control: &Rc<Control>, disk: DiskId, local: &LocalDisk, live: Option<&str>) -> Result<()> {
    let gate = control.migrations.gate(&disk.to_string()).context("a disk's name is no UUID")?;
    if let Some(live) = live {
        gate.set(Gate::ReadSource, "the source");
        gate.read_from(Some(control.blockdevs().get(live)?));
    }
    if control.export_of(&disk.to_string()).is_some() {
        return Ok(());
    }
    let members = Members::of_json(export_description(disk, local));
    let options = BlockExportOptions::read(members).map_err(|error| anyhow!(error.desc))?;
    control.block_export_add(options).map_err(|error| anyhow!(error.desc))
}

/// The job that fills the disk's overlay.
pub(super) fn job_of(disk: DiskId) -> String {
    format!("migrate-{disk}")
}

/// Tells how far the job that fills the disk's overlay is, to its end. Where there is no space for what it has fetched it
/// stands still, which is told, and goes on when there is some.
pub(super) async fn watch_fill(control: &Rc<Control>, disk: DiskId, told: &Told) {
    let full = "there is no space for the disk's data: make some, and it goes on";
    while let Ok(job) = control.jobs().get(&job_of(disk)) {
        let info = job.info();
        told.missing_bytes.set(info.total_progress.saturating_sub(info.current_progress));
        let io = job.block_info();
        if io.as_ref().is_some_and(|io| io.paused && io.io_status == IoStatus::NoSpace) {
            told.error.replace(Some(full.into()));
            rt::sleep(SPACE_AGAIN).await;
            // Somebody else may have seen to it.
            let _resumed = job.resume();
        } else if io.is_some_and(|io| io.io_status == IoStatus::Ok)
            && told.error.borrow().as_deref() == Some(full)
        {
            told.error.replace(None);
        }
        rt::sleep(LOOK_AT_FILL).await;
    }
    rt::sleep(LOOK_AT_FILL).await;
}

/// Ends the job that fills the disk's overlay, if it runs.
pub(super) async fn end_job(control: &Rc<Control>, disk: DiskId) {
    while let Ok(job) = control.jobs().get(&job_of(disk)) {
        // It may be about to end by itself.
        let _ended = job.cancel();
        rt::sleep(LOOK).await;
    }
}

/// Closes what was opened of the source, which nothing lies on any more.
pub(super) async fn close_source(control: &Rc<Control>, disk: DiskId) -> Result<()> {
    for prefix in ['l', 'b'] {
        let name = node_name(prefix, disk);
        if control.blockdevs().get(&name).is_ok() {
            control.blockdevs().del(&name).await?;
        }
    }
    Ok(())
}

/// Takes away what was prepared for a disk that does not come.
pub(super) async fn drop_disk(control: &Rc<Control>, disk: DiskId, local: &LocalDisk) {
    let gone = async {
        end_job(control, disk).await;
        control.forget_disk(&local.export, &local.node).await?;
        close_source(control, disk).await?;
        match std::fs::remove_file(&local.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => anyhow::Ok(()),
        }
    };
    if let Err(error) = gone.await {
        tracing::warn!("disk {disk}, which does not come: {error:#}");
    }
    if let Some(gate) = control.migrations.gate(&disk.to_string()) {
        gate.read_from(None);
    }
}

/// An export of the source's that an overlay lies on.
pub(super) struct Below<'a> {
    /// Where the source's exports are.
    pub(super) data: &'a str,
    pub(super) export: &'a str,
    /// Whether it is the frozen one.
    pub(super) is_base: bool,
    /// The disk's size.
    pub(super) bytes: u64,
}

/// Opens the overlay, on that export of the source where anything is still missing, and serves it. A frozen one may be
/// away: what is there and what guests write needs nothing of it.
pub(super) async fn lay_on(
    control: &Rc<Control>,
    id: DiskId,
    local: &LocalDisk,
    gate: &DiskGate,
    below: &Below<'_>,
) -> Result<()> {
    let Below { data, export: export_name, is_base, bytes } = *below;
    let uri = control.source_uri(data, export_name)?;
    if is_base && control.blockdevs().get(&local.node).is_err() {
        // For writing, which takes in what the last daemon's journal has of it; until it is exported nobody reads it.
        open_overlay(control, local, None).await?;
    }
    if is_base && control.blockdevs().get(&local.node)?.info().backing.is_none() {
        return export(control, id, local, None);
    }
    let name = node_name(if is_base { 'b' } else { 'l' }, id);
    let below = open_source(control, &uri, name, is_base.then_some(bytes)).await?;
    open_overlay(control, local, Some(&below)).await?;
    if !is_base {
        return export(control, id, local, Some(&below));
    }
    let before = control.blockdevs().facts(&local.node)?.backing;
    if before.as_deref() != Some(below.as_str()) {
        let turn = control.blockdevs().change_graph().await;
        control.blockdevs().put_on(&turn, &local.node, Some(&below)).await?;
    }
    export(control, id, local, None)?;
    gate.read_from(None);
    Ok(())
}

/// What can wait until guests run: the header of an overlay that lies on `export` says so, for whoever looks at it by its
/// path, and the live export is given up.
pub(super) async fn tidy_up(
    control: &Rc<Control>,
    data: &str,
    disk: DiskId,
    local: &LocalDisk,
    export: &str,
) -> Result<()> {
    let filename = control.source_uri(data, export)?;
    let node = control.blockdevs().get(&local.node)?;
    if node.info().backing.is_some_and(|named| named.filename != filename) {
        node.set_backing_ref(&Ctx::GUEST, Some(BackingRef { filename, format: Some("raw".into()) })).await?;
    }
    let live = node_name('l', disk);
    if control.blockdevs().get(&live).is_ok() {
        control.blockdevs().del(&live).await?;
    }
    Ok(())
}
