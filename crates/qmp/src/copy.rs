//! `blockdev-mirror` and `block-commit`.

use crate::backup::BitmapSyncMode;
use crate::command::OnError;
use crate::error::QmpError;
use crate::members::{Members, Words};

/// Smallest and largest granularity of a mirror's dirty bits, in bytes.
const GRANULARITY_MIN: u32 = 512;
const GRANULARITY_MAX: u32 = 64 << 20;

/// What is copied of a disk at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncMode {
    /// What the top layer holds.
    Top,
    /// All of it.
    Full,
    /// Nothing.
    None,
    /// What a bitmap marks, and the bitmap is kept up.
    Incremental,
    /// What a bitmap marks.
    Bitmap,
}

impl Words for SyncMode {
    const WORDS: &'static [(&'static str, SyncMode)] = &[
        ("top", SyncMode::Top),
        ("full", SyncMode::Full),
        ("none", SyncMode::None),
        ("incremental", SyncMode::Incremental),
        ("bitmap", SyncMode::Bitmap),
    ];
}

/// When a guest's write is on a mirror's target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum CopyMode {
    /// Later.
    #[default]
    Background,
    /// Before the guest is answered.
    WriteBlocking,
}

impl Words for CopyMode {
    const WORDS: &'static [(&'static str, CopyMode)] =
        &[("background", CopyMode::Background), ("write-blocking", CopyMode::WriteBlocking)];
}

/// What every job of this kind takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobMembers {
    /// The job's id; empty where it was not given.
    pub job_id: String,
    /// Rate limit in bytes per second; 0 is none.
    pub speed: u64,
    /// Whether it makes its last changes by itself.
    pub auto_finalize: bool,
    /// Whether it is forgotten by itself.
    pub auto_dismiss: bool,
    /// What the node that QEMU puts into the graph for the job would be called. None is put there.
    filter_node_name: Option<String>,
}

impl JobMembers {
    /// Takes them.
    pub fn take(arguments: &mut Members) -> Result<JobMembers, QmpError> {
        let job = JobMembers::take_unnamed(arguments)?;
        Ok(JobMembers { filter_node_name: arguments.opt_str("filter-node-name")?, ..job })
    }

    /// Takes them where no node can be named.
    fn take_unnamed(arguments: &mut Members) -> Result<JobMembers, QmpError> {
        Ok(JobMembers {
            job_id: arguments.opt_str("job-id")?.unwrap_or_default(),
            speed: arguments.opt_unsigned("speed")?.unwrap_or(0),
            auto_finalize: arguments.opt_bool("auto-finalize")?.unwrap_or(true),
            auto_dismiss: arguments.opt_bool("auto-dismiss")?.unwrap_or(true),
            filter_node_name: None,
        })
    }

    /// Refuses a `filter-node-name` that no node could have. To be called when all members were taken, so that what is wrong
    /// with those is told first.
    pub fn check(&self) -> Result<(), QmpError> {
        self.filter_node_name.as_deref().map_or(Ok(()), crate::names::check_node_name)
    }
}

/// `blockdev-mirror`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockdevMirror {
    /// What every job takes.
    pub job: JobMembers,
    /// The disk.
    pub device: String,
    /// Where it is copied to.
    pub target: String,
    /// The node whose place the target takes at the end; the disk itself where it is not given.
    pub replaces: Option<String>,
    /// What is copied at first.
    pub sync: SyncMode,
    /// The bitmap, an extension to the protocol: QEMU's mirror does not start from one.
    pub bitmap: Option<String>,
    /// What becomes of it, where that was given.
    pub bitmap_mode: Option<BitmapSyncMode>,
    /// What is done about errors of the disk.
    pub on_source_error: OnError,
    /// What is done about errors of the target.
    pub on_target_error: OnError,
    /// When guests' writes are on the target.
    pub copy_mode: CopyMode,
    /// Whether zeroes may become holes on the target.
    pub unmap: bool,
}

impl BlockdevMirror {
    pub(crate) fn read(mut arguments: Members) -> Result<BlockdevMirror, QmpError> {
        let job = JobMembers::take(&mut arguments)?;
        BlockdevMirror::read_rest(job, arguments)
    }

    /// As [`BlockdevMirror::read`], for `drive-mirror`.
    pub(crate) fn read_drive(mut arguments: Members) -> Result<BlockdevMirror, QmpError> {
        let job = JobMembers::take_unnamed(&mut arguments)?;
        BlockdevMirror::read_rest(job, arguments)
    }

    fn read_rest(job: JobMembers, mut arguments: Members) -> Result<BlockdevMirror, QmpError> {
        let mirror = BlockdevMirror {
            job,
            device: arguments.str("device")?,
            target: arguments.str("target")?,
            replaces: arguments.opt_str("replaces")?,
            sync: arguments.word("sync")?,
            bitmap: arguments.opt_str("bitmap")?,
            bitmap_mode: arguments.opt_word("bitmap-mode")?,
            on_source_error: arguments.opt_word("on-source-error")?.unwrap_or_default(),
            on_target_error: arguments.opt_word("on-target-error")?.unwrap_or_default(),
            copy_mode: arguments.opt_word("copy-mode")?.unwrap_or_default(),
            unmap: true,
        };
        // Dirty bits stand for 4 KiB whatever is asked for: finer is not needed, and coarser would send more.
        if let Some(granularity) = arguments.opt_u32("granularity")? {
            if !(GRANULARITY_MIN..=GRANULARITY_MAX).contains(&granularity) {
                let why = "Parameter 'granularity' expects a value in range [512B, 64MB]";
                return Err(QmpError::generic(why));
            }
            if !granularity.is_power_of_two() {
                return Err(QmpError::generic("Parameter 'granularity' expects a power of 2"));
            }
        }
        // Buffers are bounded by the loop itself.
        if arguments.opt_int("buf-size")?.is_some_and(|size| size < 0) {
            return Err(QmpError::generic("Invalid parameter 'buf-size'"));
        }
        arguments.finish()?;
        mirror.job.check()?;
        Ok(mirror)
    }

    /// How it uses its bitmap, if it does; refused where bitmap, mode and `sync` do not go together.
    pub fn bitmap_use(&self) -> Result<Option<(&str, BitmapSyncMode)>, QmpError> {
        let refused = |why: &str| Err(QmpError::generic(why));
        let Some(bitmap) = &self.bitmap else {
            return match (self.bitmap_mode, self.sync) {
                (Some(_), _) => refused("Cannot specify bitmap sync mode without a bitmap"),
                (None, SyncMode::Incremental) => refused("Sync mode 'incremental' not supported"),
                (None, SyncMode::Bitmap) => refused("Sync mode 'bitmap' not supported"),
                _ => Ok(None),
            };
        };
        match (self.sync, self.bitmap_mode) {
            (SyncMode::Incremental, None | Some(BitmapSyncMode::OnSuccess)) => {
                Ok(Some((bitmap, BitmapSyncMode::OnSuccess)))
            }
            (SyncMode::Incremental, Some(_)) => {
                refused("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'")
            }
            (SyncMode::Bitmap, None) => refused("Bitmap sync mode must be given when providing a bitmap"),
            (SyncMode::Bitmap, Some(BitmapSyncMode::Always)) => {
                refused("a mirror has no bitmap sync mode 'always': use 'on-success' or 'never'")
            }
            (SyncMode::Bitmap, Some(mode)) => Ok(Some((bitmap, mode))),
            _ => refused("a mirror takes a bitmap with sync mode 'incremental' or 'bitmap' alone"),
        }
    }
}

/// A layer of a chain, as `block-commit` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layer {
    /// By its node name.
    Node(String),
    /// By the name of its file.
    File(String),
}

/// `block-commit`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockCommit {
    /// What every job takes.
    pub job: JobMembers,
    /// The disk.
    pub device: String,
    /// Where the data go; the lowest layer where it is not given.
    pub base: Option<Layer>,
    /// The uppermost layer whose data go there; the disk itself where it is not given.
    pub top: Option<Layer>,
    /// What the header of the layer above `top` shall say instead of the base's own name.
    pub backing_file: Option<String>,
    /// Whether that header calls a base without a format `raw`.
    pub backing_mask_protocol: bool,
    /// What is done about I/O errors.
    pub on_error: OnError,
}

impl BlockCommit {
    pub(crate) fn read(mut arguments: Members) -> Result<BlockCommit, QmpError> {
        let job = JobMembers::take(&mut arguments)?;
        let device = arguments.str("device")?;
        let mut layer = |node: &str, file: &str| match (arguments.opt_str(node)?, arguments.opt_str(file)?) {
            (Some(_), Some(_)) => {
                Err(QmpError::generic(format!("'{node}' and '{file}' are mutually exclusive")))
            }
            (Some(name), None) => Ok(Some(Layer::Node(name))),
            (None, name) => Ok(name.map(Layer::File)),
        };
        let base = layer("base-node", "base")?;
        let top = layer("top-node", "top")?;
        let commit = BlockCommit {
            job,
            device,
            base,
            top,
            backing_file: arguments.opt_str("backing-file")?,
            backing_mask_protocol: arguments.opt_bool("backing-mask-protocol")?.unwrap_or(false),
            on_error: arguments.opt_word("on-error")?.unwrap_or_default(),
        };
        arguments.finish()?;
        commit.job.check()?;
        Ok(commit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_takes_a_bitmap_as_a_backup_does() {
        let read = |rest: &str| {
            let text = format!(r#"{{"device": "d", "target": "t", {rest}}}"#);
            let mirror = BlockdevMirror::read(Members::of_argument(&text, None).unwrap()).unwrap();
            let used = mirror.bitmap_use().map(|used| used.map(|(name, mode)| (name.to_owned(), mode)));
            used.map_err(|error| error.desc)
        };
        let is = |mode| Ok(Some(("b".to_owned(), mode)));
        assert_eq!(read(r#""sync": "full""#), Ok(None));
        assert_eq!(read(r#""sync": "incremental", "bitmap": "b""#), is(BitmapSyncMode::OnSuccess));
        assert_eq!(
            read(r#""sync": "bitmap", "bitmap": "b", "bitmap-mode": "never""#),
            is(BitmapSyncMode::Never)
        );
        for refused in [
            r#""sync": "incremental""#,
            r#""sync": "bitmap", "bitmap": "b""#,
            r#""sync": "bitmap", "bitmap": "b", "bitmap-mode": "always""#,
            r#""sync": "incremental", "bitmap": "b", "bitmap-mode": "never""#,
            r#""sync": "full", "bitmap": "b", "bitmap-mode": "on-success""#,
            r#""sync": "full", "bitmap-mode": "on-success""#,
        ] {
            assert!(read(refused).is_err(), "{refused}");
        }
    }

    #[test]
    fn a_layer_is_named_once() {
        let read = |text: &str| {
            BlockCommit::read(Members::of_argument(text, None).unwrap()).map_err(|error| error.desc)
        };
        assert_eq!(
            read(r#"{"device": "d", "base": "a", "base-node": "b"}"#),
            Err("'base-node' and 'base' are mutually exclusive".into())
        );
        let commit = read(r#"{"device": "d", "top": "t", "base-node": "b"}"#).unwrap();
        assert_eq!((commit.top, commit.base), (Some(Layer::File("t".into())), Some(Layer::Node("b".into()))));
    }

    #[test]
    fn a_granularity_is_a_power_of_two_in_range() {
        for (granularity, why) in [
            (256, Some("Parameter 'granularity' expects a value in range [512B, 64MB]")),
            (513, Some("Parameter 'granularity' expects a power of 2")),
            (65536, None),
        ] {
            let text =
                format!(r#"{{"device": "d", "target": "t", "sync": "full", "granularity": {granularity}}}"#);
            let read = BlockdevMirror::read(Members::of_argument(&text, None).unwrap());
            assert_eq!(read.err().map(|error| error.desc).as_deref(), why);
        }
    }
}
