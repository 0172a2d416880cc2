//! `drive-mirror` and `drive-backup`: a copy into a file that is made, or taken, on the way.
//!
//! A mirror with `sync: none` writes into an overlay of the disk what guests have written since, and takes the disk's place as a
//! snapshot does: the disk is what it lies on from then on.
//!
//! The file's node goes with the job, unless it has taken the disk's place: then it stays, as one that was added by name.
//! Both come back with the daemon's state; the file is taken as it is then, and not made again ([`Control::comes_back_as`]).

use std::path::Path;
use std::rc::Rc;

use infill_io::{FileOptions, FileStorage, Share};
use infill_job::JobType;
use infill_qmp::backup::BackupSync;
use infill_qmp::command::Command;
use infill_qmp::copy::SyncMode;
use infill_qmp::drive::{DriveBackup, DriveMirror, NewTarget};
use infill_qmp::shape::{NewImageMode, Shape};
use infill_qmp::{BlockdevOptions, Members, QmpError};
use infill_storage::{RangeGuard, StorageHandle, rt};
use serde_json::{Map, Value, json};

use super::backup::Checked;
use super::control::{Control, refused};
use super::create::make_file;
use super::maps::NO_MAP;
use super::overlay::{could_not_open, description, empty_image, path_of};
use crate::blockdev::{Blockdevs, FormatKind, NodeFacts, identity_of, probe_storage, resolve_backing};

/// What the image in the file of a copy lies on, and its header names where it is made.
#[derive(Clone, Copy)]
enum Over<'a> {
    /// Nothing.
    Nothing,
    /// A node that nobody writes to.
    Layer(&'a str),
    /// The disk that is copied, from the beginning: what else its clusters hold is taken from there.
    Beside(&'a str),
    /// The disk that is copied, when the image takes its place. Until then it is copied in whole clusters.
    AtEnd(&'a str),
}

impl<'a> Over<'a> {
    /// The node.
    const fn node(self) -> Option<&'a str> {
        match self {
            Over::Nothing => None,
            Over::Layer(node) | Over::Beside(node) | Over::AtEnd(node) => Some(node),
        }
    }
}

/// A node that goes when this does, unless it is to stay.
pub(super) struct Target {
    blockdevs: Blockdevs,
    name: String,
    /// What `blockdev-add` would be given for it.
    description: Map<String, Value>,
    /// The node that it is to lie on when it takes that one's place.
    over: Option<String>,
    stays: bool,
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        self.blockdevs.leave_beside(&self.name);
        let (blockdevs, name) = (self.blockdevs.clone(), self.name.clone());
        rt::spawn(async move {
            if let Err(error) = blockdevs.del(&name).await
                && blockdevs.get(&name).is_ok()
            {
                tracing::warn!("after a copy into '{name}': {error:#}");
            }
        });
    }
}

impl Target {
    /// The node that it lies on once it has taken that one's place, where it holds only what was written since it was made.
    pub(super) fn over(&self) -> Option<&str> {
        self.over.as_deref()
    }

    /// It is about to take the place of another node: a daemon that comes after this one makes it too.
    pub(super) fn keep(&mut self, control: &Control) {
        self.stays = true;
        let mut description = self.description.clone();
        if let Some(over) = &self.over {
            description.insert("backing".into(), json!(over));
        }
        control.keep_node(&self.name, description);
    }

    /// That did not happen.
    pub(super) fn keep_no_more(&mut self, control: &Control) {
        self.stays = false;
        control.forget_node(&self.name);
    }
}

/// The format of a file that is there, where nobody says it: never `raw` by guess.
async fn format_of_file(path: &str) -> Result<FormatKind, QmpError> {
    let options = FileOptions { share: Share::Unguarded, ..FileOptions::read_only() };
    let opened = FileStorage::open(path, options).map_err(|error| could_not_open(path, &error.into()))?;
    let found = probe_storage(&StorageHandle::new(opened)).await.map_err(|error| refused(&error))?;
    found.ok_or_else(|| {
        QmpError::generic(format!(
            "the format of '{path}' is not given, and raw is not guessed: give 'format'"
        ))
    })
}

impl Control {
    fn source_facts(&self, device: &str) -> Result<NodeFacts, QmpError> {
        let missing =
            |_| QmpError::generic(format!("Cannot find device='{device}' nor node-name='{device}'"));
        let facts = self.blockdevs().facts(device).map_err(missing)?;
        self.not_busy(device)?;
        Ok(facts)
    }

    /// The format of a file that is made for a copy of `device`, where nobody says it.
    fn format_of_copy(&self, device: &str) -> FormatKind {
        match self.format_of(device).as_deref() {
            Some("qcow2") => FormatKind::Qcow2,
            Some("qed") => FormatKind::Qed,
            _ => FormatKind::Raw,
        }
    }

    /// The arguments with which a command that makes a file comes back when the file is there; `None`: as it was given.
    pub(super) fn comes_back_as(
        &self,
        command: &Command,
        given: &Map<String, Value>,
    ) -> Option<Map<String, Value>> {
        let (device, target) = match command {
            Command::Shape(Shape::DriveMirror(drive)) => (&drive.mirror.device, &drive.target),
            Command::Shape(Shape::DriveBackup(drive)) => (&drive.backup.device, &drive.target),
            _ => return None,
        };
        let mut now = given.clone();
        if target.format.is_none() && target.mode == NewImageMode::AbsolutePaths {
            now.insert("format".into(), json!(self.format_of_copy(device).as_str()));
        }
        now.insert("mode".into(), json!("existing"));
        Some(now)
    }

    /// Makes (or takes) the file of a copy of `device` and opens it on the node `over`, which the header of a new image names. A
    /// write of a part of a cluster takes the rest from there: without that it would be zero. `graph`: the caller changes the
    /// graph already.
    async fn make_target(
        &self,
        device: &str,
        target: &NewTarget,
        over: Over<'_>,
        graph: Option<&RangeGuard>,
    ) -> Result<Target, QmpError> {
        let facts = self.source_facts(device)?;
        let file = path_of(&target.file)?;
        let format = match (&target.format, target.mode) {
            (Some(name), _) => match name.as_str() {
                "raw" => FormatKind::Raw,
                "qcow2" => FormatKind::Qcow2,
                "qed" => FormatKind::Qed,
                name if infill_qmp::is_driver(name) => {
                    return Err(QmpError::generic(format!(
                        "file format '{name}' is not supported for a copy: use raw, qcow2 or qed"
                    )));
                }
                name => return Err(QmpError::generic(format!("Unknown file format '{name}'"))),
            },
            (None, NewImageMode::Existing) => format_of_file(&file.0).await?,
            (None, NewImageMode::AbsolutePaths) => self.format_of_copy(device),
        };
        let is_new = target.mode == NewImageMode::AbsolutePaths;
        // What is there already may be a copy that somebody has made.
        if over.node().is_some() && format == FormatKind::Raw && (is_new || !matches!(over, Over::AtEnd(_))) {
            return Err(QmpError::generic("Backing file not supported for file format 'raw'"));
        }
        if is_new {
            let size = self.blockdevs().get(device).map_err(|error| refused(&error))?.len();
            let backing = over.node().map(|over| self.backing_for(over)).transpose()?;
            match format {
                FormatKind::Raw => drop(make_file(&file.0, size)?),
                format => {
                    let image = empty_image(format, size, backing);
                    image.try_out().await.map_err(|error| QmpError::generic(error.message()))?;
                    let storage = StorageHandle::new(make_file(&file.0, 0)?);
                    image.write(&storage).await.map_err(|error| QmpError::generic(error.message()))?;
                }
            }
        }
        let like = NodeFacts { read_only: false, ..facts };
        let mut description = description(&file, format.as_str(), target.node_name.as_deref(), &like);
        if format != FormatKind::Raw {
            let below = match over {
                Over::Layer(layer) => json!(layer),
                Over::Nothing | Over::Beside(_) | Over::AtEnd(_) => Value::Null,
            };
            description.insert("backing".into(), below);
        }
        let options = BlockdevOptions::read(Members::of_json(description.clone()))?;
        let own;
        let graph = match graph {
            Some(graph) => graph,
            None => {
                own = self.blockdevs().change_graph().await;
                &own
            }
        };
        let added = self.blockdevs().add_in(graph, options).await;
        let name = added.map_err(|error| could_not_open(&target.file, &error))?;
        self.greet_new_nodes();
        let blockdevs = self.blockdevs().clone();
        let mut target = Target { blockdevs, name, description, over: None, stays: false };
        match over {
            Over::Beside(over) => {
                let laid = self.blockdevs().lay_beside(graph, &target.name, over).await;
                laid.map_err(|error| refused(&error))?;
            }
            Over::AtEnd(over) if is_new || self.names_as_backing(&target.name, over)? => {
                target.over = Some(over.to_owned());
            }
            Over::Nothing | Over::Layer(_) | Over::AtEnd(_) => {}
        }
        Ok(target)
    }

    /// Whether the image of the node `image`, which is open without its backing, is one over the node `below`. One that names
    /// another file is refused: what guests would see of that is not what the disk holds.
    fn names_as_backing(&self, image: &str, below: &str) -> Result<bool, QmpError> {
        let info = self.blockdevs().get(image).map_err(|error| refused(&error))?.info();
        let Some(named) = info.backing else { return Ok(false) };
        let named = resolve_backing(&info.filename, &named.filename).map_err(|error| refused(&error))?;
        let wanted = self.backing_for(below)?.filename;
        let identity = |path: &str| identity_of(Path::new(path)).ok();
        if named == wanted || identity(&named).is_some_and(|named| Some(named) == identity(&wanted)) {
            return Ok(true);
        }
        Err(QmpError::generic(format!(
            "'{}' lies on '{named}', not on '{wanted}', of which only what is written from now on would be copied: give an \
             image over that, or add both and use blockdev-mirror",
            info.filename
        )))
    }

    /// `drive-mirror`. Answered once the job runs.
    pub(super) async fn drive_mirror(self: &Rc<Self>, drive: DriveMirror) -> Result<(), QmpError> {
        let DriveMirror { mut mirror, target } = drive;
        let device = mirror.device.clone();
        let facts = self.source_facts(&device)?;
        let over = match mirror.sync {
            SyncMode::Full => Over::Nothing,
            SyncMode::Top => facts.backing.as_deref().map_or(Over::Nothing, Over::Layer),
            SyncMode::None => Over::AtEnd(&device),
            SyncMode::Incremental => return Err(QmpError::generic("Sync mode 'incremental' not supported")),
            SyncMode::Bitmap => return Err(QmpError::generic("Sync mode 'bitmap' not supported")),
        };
        if self.keeps_state() && target.node_name.is_none() {
            return Err(QmpError::generic(
                "with --state, the target of a mirror needs a name for what is kept: give node-name",
            ));
        }
        let target = self.make_target(&device, &target, over, None).await?;
        mirror.target.clone_from(&target.name);
        self.start_mirror(mirror, Some(target)).await
    }

    /// `drive-backup`. Answered once the job runs.
    pub(super) async fn drive_backup(self: &Rc<Self>, drive: DriveBackup) -> Result<(), QmpError> {
        let id = &drive.backup.job.job_id;
        if self.is_lost(id) {
            return self.end_lost(id, JobType::Backup, NO_MAP);
        }
        let checked = self.check_drive_backup(drive, None).await?;
        self.start_one_backup(checked).await
    }

    /// Makes what a backup goes to, and refuses what cannot be before guests wait for anything. With `sync: none` the file is
    /// an overlay of the disk itself, which keeps what the disk held before it was overwritten. What else its clusters hold is
    /// the disk as it is, of which everything that will be overwritten is written there first.
    pub(super) async fn check_drive_backup(
        &self,
        drive: DriveBackup,
        graph: Option<&RangeGuard>,
    ) -> Result<Checked, QmpError> {
        let DriveBackup { mut backup, target } = drive;
        let facts = self.source_facts(&backup.device)?;
        let over = match backup.sync {
            BackupSync::Top => facts.backing.as_deref().map_or(Over::Nothing, Over::Layer),
            BackupSync::None => Over::Beside(&backup.device),
            BackupSync::Full | BackupSync::Bitmap => Over::Nothing,
        };
        let target = self.make_target(&backup.device, &target, over, graph).await?;
        backup.target.clone_from(&target.name);
        Ok(self.check_backup(backup)?.into(target))
    }
}
