//! Commands that make nodes and change how they lie: `blockdev-create`, `blockdev-snapshot-sync`,
//! `blockdev-snapshot-internal-sync`, `blockdev-reopen`, `blockdev-set-active`, `block-job-change`; `drive-mirror` and `drive-backup` make what they copy to.

use serde_json::{Map, Value};

use crate::blockdev::BlockdevOptions;
use crate::copy::CopyMode;
use crate::create::BlockdevCreate;
use crate::drive::{DriveBackup, DriveMirror};
use crate::error::QmpError;
use crate::members::{Members, Words};

/// Where the file of a new overlay comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum NewImageMode {
    /// It is there.
    Existing,
    /// It is made, and names what it lies on by a whole path.
    #[default]
    AbsolutePaths,
}

impl Words for NewImageMode {
    const WORDS: &'static [(&'static str, NewImageMode)] =
        &[("existing", NewImageMode::Existing), ("absolute-paths", NewImageMode::AbsolutePaths)];
}

/// `blockdev-snapshot-sync`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotSync {
    /// A device, of which there are none here.
    pub device: Option<String>,
    /// The node that is kept as it is.
    pub node_name: Option<String>,
    /// The overlay's file.
    pub file: String,
    /// The overlay's name.
    pub overlay: Option<String>,
    /// The overlay's format.
    pub format: String,
    /// Where its file comes from.
    pub mode: NewImageMode,
}

impl SnapshotSync {
    pub(crate) fn take(arguments: &mut Members) -> Result<SnapshotSync, QmpError> {
        Ok(SnapshotSync {
            device: arguments.opt_str("device")?,
            node_name: arguments.opt_str("node-name")?,
            file: arguments.str("snapshot-file")?,
            overlay: arguments.opt_str("snapshot-node-name")?,
            format: arguments.opt_str("format")?.unwrap_or_else(|| "qcow2".into()),
            mode: arguments.opt_word("mode")?.unwrap_or_default(),
        })
    }
}

/// `blockdev-snapshot-internal-sync`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InternalSnapshot {
    /// The node whose image keeps it.
    pub device: String,
    /// Its name.
    pub name: String,
}

impl InternalSnapshot {
    pub(crate) fn take(arguments: &mut Members) -> Result<InternalSnapshot, QmpError> {
        Ok(InternalSnapshot { device: arguments.str("device")?, name: arguments.str("name")? })
    }
}

/// What a node is to be like.
#[derive(Clone, Debug, PartialEq)]
pub struct Reopened {
    /// Its description.
    pub options: BlockdevOptions,
    /// That, as it came.
    pub given: Map<String, Value>,
}

/// What is to become of a job that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobChange {
    /// The copy mode of a mirror.
    Mirror(CopyMode),
    /// A type of job of which nothing can be changed.
    Nothing(&'static str),
}

/// Types of jobs, as the protocol names them.
#[derive(Clone, Copy, Debug)]
struct JobWord(&'static str);

macro_rules! job_words {
    ($($name:literal),* $(,)?) => { &[$(($name, JobWord($name))),*] };
}

impl Words for JobWord {
    const WORDS: &'static [(&'static str, JobWord)] = job_words![
        "commit",
        "stream",
        "mirror",
        "backup",
        "create",
        "amend",
        "snapshot-load",
        "snapshot-save",
        "snapshot-delete",
    ];
}

/// One of these commands.
#[derive(Clone, Debug, PartialEq)]
pub enum Shape {
    /// `blockdev-create`.
    Create(Box<BlockdevCreate>),
    /// `blockdev-snapshot-sync`.
    SnapshotSync(SnapshotSync),
    /// `blockdev-snapshot-internal-sync`.
    InternalSnapshot(InternalSnapshot),
    /// `drive-mirror`.
    DriveMirror(Box<DriveMirror>),
    /// `drive-backup`.
    DriveBackup(Box<DriveBackup>),
    /// `blockdev-reopen`: what each of these nodes is to be like.
    Reopen(Vec<Reopened>),
    /// `blockdev-set-active`.
    SetActive {
        /// The node; all of them where it is not given.
        node_name: Option<String>,
        /// Whether it may be used.
        active: bool,
    },
    /// `block-job-change`.
    JobChange {
        /// The job.
        id: String,
        /// What becomes of it.
        change: JobChange,
    },
}

impl Shape {
    /// Reads the arguments of the command called `name`; `None` if it is none of these.
    pub(crate) fn read(name: &str, arguments: &mut Members) -> Result<Option<Shape>, QmpError> {
        Ok(Some(match name {
            "blockdev-create" => Shape::Create(Box::new(BlockdevCreate::take(arguments)?)),
            "blockdev-snapshot-sync" => Shape::SnapshotSync(SnapshotSync::take(arguments)?),
            "blockdev-snapshot-internal-sync" => Shape::InternalSnapshot(InternalSnapshot::take(arguments)?),
            "blockdev-reopen" => {
                let options =
                    arguments.opt_objects("options")?.ok_or_else(|| arguments.missing("options"))?;
                let read = |members: Members| {
                    let (given, _) = members.clone().into_parts();
                    Ok(Reopened { options: BlockdevOptions::read(members)?, given })
                };
                Shape::Reopen(options.into_iter().map(read).collect::<Result<_, _>>()?)
            }
            "blockdev-set-active" => Shape::SetActive {
                node_name: arguments.opt_str("node-name")?,
                active: arguments.bool("active")?,
            },
            "block-job-change" => {
                let id = arguments.str("id")?;
                let change = match arguments.word::<JobWord>("type")?.0 {
                    "mirror" => JobChange::Mirror(arguments.word("copy-mode")?),
                    other => JobChange::Nothing(other),
                };
                Shape::JobChange { id, change }
            }
            _ => return Ok(None),
        }))
    }
}
