//! `transaction`: several commands of which all are carried out, or none.

use crate::backup::BlockdevBackup;
use crate::bitmap::BitmapCommand;
use crate::drive::DriveBackup;
use crate::error::QmpError;
use crate::members::{Members, Words};
use crate::shape::{InternalSnapshot, SnapshotSync};

/// What one action does.
#[derive(Clone, Debug, PartialEq)]
pub enum TransactionAction {
    /// Nothing: it fails.
    Abort,
    /// On a bitmap.
    Bitmap(BitmapCommand),
    /// Starts a backup.
    Backup(Box<BlockdevBackup>),
    /// Starts a backup into a file that is made, or taken, on the way.
    DriveBackup(Box<DriveBackup>),
    /// Puts an overlay on a node.
    Snapshot {
        /// The node that is kept as it is.
        node: String,
        /// The node that takes its place.
        overlay: String,
    },
    /// Makes an overlay and puts it on a node.
    SnapshotSync(SnapshotSync),
    /// Makes a snapshot in an image.
    InternalSnapshot(InternalSnapshot),
}

/// The names of actions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Abort,
    Bitmap(&'static str),
    Backup,
    DriveBackup,
    Snapshot,
    SnapshotSync,
    InternalSnapshot,
}

impl Words for Kind {
    const WORDS: &'static [(&'static str, Kind)] = &[
        ("abort", Kind::Abort),
        ("block-dirty-bitmap-add", Kind::Bitmap("block-dirty-bitmap-add")),
        ("block-dirty-bitmap-remove", Kind::Bitmap("block-dirty-bitmap-remove")),
        ("block-dirty-bitmap-clear", Kind::Bitmap("block-dirty-bitmap-clear")),
        ("block-dirty-bitmap-enable", Kind::Bitmap("block-dirty-bitmap-enable")),
        ("block-dirty-bitmap-disable", Kind::Bitmap("block-dirty-bitmap-disable")),
        ("block-dirty-bitmap-merge", Kind::Bitmap("block-dirty-bitmap-merge")),
        ("blockdev-backup", Kind::Backup),
        ("drive-backup", Kind::DriveBackup),
        ("blockdev-snapshot", Kind::Snapshot),
        ("blockdev-snapshot-sync", Kind::SnapshotSync),
        ("blockdev-snapshot-internal-sync", Kind::InternalSnapshot),
    ];
}

/// When jobs that one transaction starts complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
enum CompletionMode {
    /// Each by itself.
    #[default]
    Individual,
    /// All together, or none.
    Grouped,
}

impl Words for CompletionMode {
    const WORDS: &'static [(&'static str, CompletionMode)] =
        &[("individual", CompletionMode::Individual), ("grouped", CompletionMode::Grouped)];
}

/// `transaction`.
#[derive(Clone, Debug, PartialEq)]
pub struct Transaction {
    /// What is done, in order.
    pub actions: Vec<TransactionAction>,
    /// Whether the jobs complete together or not at all.
    pub grouped: bool,
}

impl Transaction {
    pub(crate) fn read(mut arguments: Members) -> Result<Transaction, QmpError> {
        let items = arguments.opt_objects("actions")?.ok_or_else(|| arguments.missing("actions"))?;
        let mut grouped = false;
        if let Some(mut properties) = arguments.opt_object("properties")? {
            let mode: CompletionMode = properties.opt_word("completion-mode")?.unwrap_or_default();
            grouped = mode == CompletionMode::Grouped;
            properties.finish()?;
        }
        arguments.finish()?;
        let read: Vec<_> = items.into_iter().map(read_action).collect::<Result<_, _>>()?;
        let is_job = |action: &TransactionAction| {
            matches!(action, TransactionAction::Backup(_) | TransactionAction::DriveBackup(_))
        };
        let alone = read.iter().find(|(_, action)| !is_job(action));
        if let (true, Some((name, _))) = (grouped, alone) {
            return Err(QmpError::generic(format!(
                "Action '{name}' does not support transaction property completion-mode = grouped"
            )));
        }
        Ok(Transaction { actions: read.into_iter().map(|(_, action)| action).collect(), grouped })
    }
}

fn read_action(mut action: Members) -> Result<(&'static str, TransactionAction), QmpError> {
    let kind: Kind = action.word("type")?;
    let mut data = action.object("data")?;
    action.finish()?;
    let name = Kind::WORDS.iter().find(|(_, meaning)| *meaning == kind).map_or("", |(name, _)| name);
    let action = match kind {
        Kind::Abort => TransactionAction::Abort,
        Kind::Backup => return Ok((name, TransactionAction::Backup(Box::new(BlockdevBackup::read(data)?)))),
        Kind::DriveBackup => {
            return Ok((name, TransactionAction::DriveBackup(Box::new(DriveBackup::read(data)?))));
        }
        Kind::Snapshot => {
            TransactionAction::Snapshot { node: data.str("node")?, overlay: data.str("overlay")? }
        }
        Kind::SnapshotSync => TransactionAction::SnapshotSync(SnapshotSync::take(&mut data)?),
        Kind::InternalSnapshot => TransactionAction::InternalSnapshot(InternalSnapshot::take(&mut data)?),
        Kind::Bitmap(name) => match BitmapCommand::read(name, &mut data)? {
            Some(command) => TransactionAction::Bitmap(command),
            None => return Err(QmpError::generic(format!("'{name}' is no command on bitmaps"))),
        },
    };
    data.finish()?;
    Ok((name, action))
}
