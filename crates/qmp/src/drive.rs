//! `drive-mirror` and `drive-backup`: a copy into a file that is made, or taken, on the way.

use crate::backup::BlockdevBackup;
use crate::copy::BlockdevMirror;
use crate::error::QmpError;
use crate::members::Members;
use crate::shape::NewImageMode;

/// The file that a copy goes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTarget {
    /// Its name.
    pub file: String,
    /// Its format; that of the disk, or what it is found to be, where it is not given.
    pub format: Option<String>,
    /// Whether it is made.
    pub mode: NewImageMode,
    /// The name of its node.
    pub node_name: Option<String>,
}

/// `drive-mirror`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriveMirror {
    /// The mirror, whose target has no name yet.
    pub mirror: BlockdevMirror,
    /// Its target.
    pub target: NewTarget,
}

/// `drive-backup`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriveBackup {
    /// The backup, whose target has no name yet.
    pub backup: BlockdevBackup,
    /// Its target.
    pub target: NewTarget,
}

impl NewTarget {
    fn take(arguments: &mut Members) -> Result<NewTarget, QmpError> {
        Ok(NewTarget {
            file: String::new(),
            format: arguments.opt_str("format")?,
            mode: arguments.opt_word("mode")?.unwrap_or_default(),
            node_name: None,
        })
    }
}

impl DriveMirror {
    pub(crate) fn read(mut arguments: Members) -> Result<DriveMirror, QmpError> {
        let mut target = NewTarget::take(&mut arguments)?;
        target.node_name = arguments.opt_str("node-name")?;
        let unmap = arguments.opt_bool("unmap")?.unwrap_or(true);
        let mut mirror = BlockdevMirror::read_drive(arguments)?;
        mirror.unmap = unmap;
        target.file = std::mem::take(&mut mirror.target);
        Ok(DriveMirror { mirror, target })
    }
}

impl DriveBackup {
    pub(crate) fn read(mut arguments: Members) -> Result<DriveBackup, QmpError> {
        let mut target = NewTarget::take(&mut arguments)?;
        let mut backup = BlockdevBackup::read(arguments)?;
        target.file = std::mem::take(&mut backup.target);
        Ok(DriveBackup { backup, target })
    }
}
