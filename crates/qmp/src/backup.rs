//! `blockdev-backup`.

use crate::command::OnError;
use crate::copy::JobMembers;
use crate::error::QmpError;
use crate::members::{Members, Words};

/// What is copied of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupSync {
    /// What the top layer holds.
    Top,
    /// All of it.
    Full,
    /// Only what is overwritten.
    None,
    /// What a bitmap marks.
    Bitmap,
}

/// What the protocol calls that; `incremental` is a bitmap that is kept up after success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SyncWord {
    Is(BackupSync),
    Incremental,
}

impl Words for SyncWord {
    const WORDS: &'static [(&'static str, SyncWord)] = &[
        ("top", SyncWord::Is(BackupSync::Top)),
        ("full", SyncWord::Is(BackupSync::Full)),
        ("none", SyncWord::Is(BackupSync::None)),
        ("incremental", SyncWord::Incremental),
        ("bitmap", SyncWord::Is(BackupSync::Bitmap)),
    ];
}

/// What becomes of the bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapSyncMode {
    /// It is kept up after success.
    OnSuccess,
    /// It is left alone.
    Never,
    /// It is kept up, whatever happens.
    Always,
}

impl Words for BitmapSyncMode {
    const WORDS: &'static [(&'static str, BitmapSyncMode)] = &[
        ("on-success", BitmapSyncMode::OnSuccess),
        ("never", BitmapSyncMode::Never),
        ("always", BitmapSyncMode::Always),
    ];
}

/// `blockdev-backup`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockdevBackup {
    /// What every job takes.
    pub job: JobMembers,
    /// The disk.
    pub device: String,
    /// Where it is copied to.
    pub target: String,
    /// What is copied.
    pub sync: BackupSync,
    /// `sync` as it was given.
    pub sync_word: &'static str,
    /// The bitmap.
    pub bitmap: Option<String>,
    /// What becomes of it, where that was given or follows from `sync`.
    pub bitmap_mode: Option<BitmapSyncMode>,
    /// Whether the copy is to be compressed.
    pub compress: bool,
    /// What is done about errors of the disk.
    pub on_source_error: OnError,
    /// What is done about errors of the target.
    pub on_target_error: OnError,
}

impl BlockdevBackup {
    pub(crate) fn read(mut arguments: Members) -> Result<BlockdevBackup, QmpError> {
        let job = JobMembers::take(&mut arguments)?;
        let device = arguments.str("device")?;
        let word: SyncWord = arguments.word("sync")?;
        let bitmap = arguments.opt_str("bitmap")?;
        let given: Option<BitmapSyncMode> = arguments.opt_word("bitmap-mode")?;
        let compress = arguments.opt_bool("compress")?.unwrap_or(false);
        let on_source_error = arguments.opt_word("on-source-error")?.unwrap_or_default();
        let on_target_error = arguments.opt_word("on-target-error")?.unwrap_or_default();
        let discard_source = arguments.opt_bool("discard-source")?.unwrap_or(false);
        // How many requests are in flight follows from what guests and both disks bear.
        arguments.ignore("x-perf");
        let target = arguments.str("target")?;
        arguments.finish()?;
        job.check().map_err(|error| QmpError::generic(format!("Could not create node: {error}")))?;
        if discard_source {
            return Err(QmpError::generic("'discard-source' is not supported: leave it out"));
        }
        let sync_word =
            SyncWord::WORDS.iter().find(|(_, meaning)| *meaning == word).map_or("", |(text, _)| text);
        if matches!(word, SyncWord::Incremental | SyncWord::Is(BackupSync::Bitmap)) && bitmap.is_none() {
            let why = format!("must provide a valid bitmap name for '{sync_word}' sync mode");
            return Err(QmpError::generic(why));
        }
        let (sync, bitmap_mode) = match (word, given) {
            (SyncWord::Is(sync), given) => (sync, given),
            (SyncWord::Incremental, None | Some(BitmapSyncMode::OnSuccess)) => {
                (BackupSync::Bitmap, Some(BitmapSyncMode::OnSuccess))
            }
            (SyncWord::Incremental, Some(_)) => {
                return Err(QmpError::generic(
                    "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
                ));
            }
        };
        Ok(BlockdevBackup {
            job,
            device,
            target,
            sync,
            sync_word,
            bitmap,
            bitmap_mode,
            compress,
            on_source_error,
            on_target_error,
        })
    }

    /// What is wrong with how bitmap, mode and `sync` go together, once the bitmap was found.
    pub fn check_bitmap(&self) -> Result<(), QmpError> {
        let refused = |why: String| Err(QmpError::generic(why));
        let Some(_) = &self.bitmap else {
            return match self.bitmap_mode {
                Some(_) => refused("Cannot specify bitmap sync mode without a bitmap".into()),
                None => Ok(()),
            };
        };
        match (self.bitmap_mode, self.sync) {
            (None, _) => refused("Bitmap sync mode must be given when providing a bitmap".into()),
            (_, BackupSync::None) => {
                refused("sync mode 'none' does not produce meaningful bitmap outputs".into())
            }
            (Some(BitmapSyncMode::Never), BackupSync::Full | BackupSync::Top) => refused(format!(
                "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{}'",
                self.sync_word
            )),
            _ => Ok(()),
        }
    }
}
