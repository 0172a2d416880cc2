//! `blockdev-backup`.

use crate::command::OnError;
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
    /// The job's id; empty where it was not given.
    pub job_id: String,
    /// The disk.
    pub device: String,
    /// Where it is copied to.
    pub target: String,
    /// What is copied.
    pub sync: BackupSync,
    /// `sync` as it was given.
    pub sync_word: &'static str,
    /// Rate limit in bytes per second; 0 is none.
    pub speed: u64,
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
    /// Whether it makes its last changes by itself.
    pub auto_finalize: bool,
    /// Whether it is forgotten by itself.
    pub auto_dismiss: bool,
}

impl BlockdevBackup {
    pub(crate) fn read(mut arguments: Members) -> Result<BlockdevBackup, QmpError> {
        let job_id = arguments.opt_str("job-id")?.unwrap_or_default();
        let device = arguments.str("device")?;
        let word: SyncWord = arguments.word("sync")?;
        let speed = arguments.opt_unsigned("speed")?.unwrap_or(0);
        let bitmap = arguments.opt_str("bitmap")?;
        let given: Option<BitmapSyncMode> = arguments.opt_word("bitmap-mode")?;
        let compress = arguments.opt_bool("compress")?.unwrap_or(false);
        let on_source_error = arguments.opt_word("on-source-error")?.unwrap_or_default();
        let on_target_error = arguments.opt_word("on-target-error")?.unwrap_or_default();
        let auto_finalize = arguments.opt_bool("auto-finalize")?.unwrap_or(true);
        let auto_dismiss = arguments.opt_bool("auto-dismiss")?.unwrap_or(true);
        // No filter node is put into the graph, so there is none to be named: accepted where it could be one.
        if let Some(name) = arguments.opt_str("filter-node-name")? {
            crate::names::check_node_name(&name)
                .map_err(|error| QmpError::generic(format!("Could not create node: {error}")))?;
        }
        let discard_source = arguments.opt_bool("discard-source")?.unwrap_or(false);
        // How many requests are in flight follows from what guests and both disks bear.
        arguments.ignore("x-perf");
        let target = arguments.str("target")?;
        arguments.finish()?;
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
            job_id,
            device,
            target,
            sync,
            sync_word,
            speed,
            bitmap,
            bitmap_mode,
            compress,
            on_source_error,
            on_target_error,
            auto_finalize,
            auto_dismiss,
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
