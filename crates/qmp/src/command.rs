//! Commands with their arguments, typed. What is not listed in [`NAMES`] cannot be executed.

use crate::alter::Alter;
use crate::backup::BlockdevBackup;
use crate::bitmap::BitmapCommand;
use crate::blockdev::BlockdevOptions;
use crate::chardev::ChardevCommand;
use crate::copy::{BlockCommit, BlockdevMirror};
use crate::drive::{DriveBackup, DriveMirror};
use crate::error::QmpError;
use crate::experimental::Experimental;
use crate::export::{BlockExportOptions, NbdServerOptions, RemoveMode};
use crate::inspect::Inspect;
use crate::members::{Members, Words};
use crate::migration::MigrationCommand;
use crate::object::ObjectOptions;
use crate::shape::Shape;
use crate::transaction::Transaction;

/// What a manager asks of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobCommand {
    /// Give up. `force` is false only for `block-job-cancel` without it.
    Cancel {
        /// Also where the job would rather complete.
        force: bool,
    },
    /// Stop for a while.
    Pause,
    /// Go on.
    Resume,
    /// Limit its rate, in bytes per second; 0 is none.
    SetSpeed(u64),
    /// Leave *ready* and end.
    Complete,
    /// Forget it.
    Dismiss,
    /// Make the changes that it has prepared.
    Finalize,
}

/// What a job does about I/O errors, as the protocol names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnError {
    /// End with the error.
    #[default]
    Report,
    /// Leave the range out.
    Ignore,
    /// Stop where no space is left, else as `report`.
    Enospc,
    /// Stop until resumed.
    Stop,
    /// As `enospc`.
    Auto,
}

impl Words for OnError {
    const WORDS: &'static [(&'static str, OnError)] = &[
        ("report", OnError::Report),
        ("ignore", OnError::Ignore),
        ("enospc", OnError::Enospc),
        ("stop", OnError::Stop),
        ("auto", OnError::Auto),
    ];
}

/// Where a stream ends.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum StreamEnd {
    /// No backing stays.
    #[default]
    All,
    /// The node of that file name stays (`base`).
    BaseFile(String),
    /// That node stays (`base-node`).
    BaseNode(String),
    /// That node is the last one that is filled in (`bottom`).
    Bottom(String),
}

/// `block-stream`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockStream {
    /// The job's id; empty where it was not given.
    pub job_id: String,
    /// The overlay.
    pub device: String,
    /// Where it ends.
    pub end: StreamEnd,
    /// What the header shall name instead of the base.
    pub backing_file: Option<String>,
    /// Whether the header calls a base without a format `raw`.
    pub backing_mask_protocol: bool,
    /// Rate limit in bytes per second; 0 is none.
    pub speed: u64,
    /// What is done about I/O errors.
    pub on_error: OnError,
    /// Bytes per second that it gets even while guests are busy (ours: `__infill_min-rate`).
    pub min_rate: Option<u64>,
    /// When it wants to be done, in seconds since 1970 (ours: `__infill_finish-by`).
    pub finish_by: Option<u64>,
    /// Whether it makes its last changes by itself.
    pub auto_finalize: bool,
    /// Whether it is forgotten by itself.
    pub auto_dismiss: bool,
}

/// A command.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// `query-version`.
    QueryVersion,
    /// `query-commands`.
    QueryCommands,
    /// `query-qmp-schema`.
    QueryQmpSchema,
    /// `quit`.
    Quit,
    /// `blockdev-add`.
    BlockdevAdd(Box<BlockdevOptions>),
    /// `blockdev-del`.
    BlockdevDel {
        /// The node.
        node_name: String,
    },
    /// `blockdev-snapshot`.
    BlockdevSnapshot {
        /// The node that is kept as it is.
        node: String,
        /// The node that takes its place.
        overlay: String,
    },
    /// `blockdev-snapshot-delete-internal-sync`.
    DeleteSnapshot {
        /// The node whose image keeps it.
        device: String,
        /// Its id.
        id: Option<String>,
        /// Its name.
        name: Option<String>,
    },
    /// `blockdev-backup`.
    BlockdevBackup(Box<BlockdevBackup>),
    /// `transaction`.
    Transaction(Transaction),
    /// `block-dirty-bitmap-*`, `x-debug-block-dirty-bitmap-sha256`.
    Bitmap(BitmapCommand),
    /// `block_resize`, `block-set-write-threshold`, `change-backing-file`.
    Alter(Alter),
    /// Commands that make nodes and change how they lie.
    Shape(Shape),
    /// Commands that only ask.
    Inspect(Inspect),
    /// `chardev-*`, `ringbuf-*`.
    Chardev(ChardevCommand),
    /// `x-blockdev-*`.
    Experimental(Experimental),
    /// `query-named-block-nodes`.
    QueryNamedBlockNodes {
        /// Without the nodes below each.
        flat: bool,
    },
    /// `query-block`.
    QueryBlock,
    /// `nbd-server-start`.
    NbdServerStart(NbdServerOptions),
    /// `nbd-server-stop`.
    NbdServerStop,
    /// `block-export-add`.
    BlockExportAdd(BlockExportOptions),
    /// `nbd-server-add`.
    NbdServerAdd(BlockExportOptions),
    /// `block-export-del`, `nbd-server-remove`.
    BlockExportDel {
        /// The export.
        id: String,
        /// How.
        mode: RemoveMode,
    },
    /// `query-block-exports`.
    QueryBlockExports,
    /// `block-stream`.
    BlockStream(BlockStream),
    /// `blockdev-mirror`.
    BlockdevMirror(BlockdevMirror),
    /// `block-commit`.
    BlockCommit(BlockCommit),
    /// `job-*` and `block-job-*`.
    Job {
        /// The job.
        id: String,
        /// What is asked.
        command: JobCommand,
        /// Whether only block jobs are meant (`block-job-*`).
        block: bool,
    },
    /// `query-jobs`.
    QueryJobs,
    /// `query-block-jobs`.
    QueryBlockJobs,
    /// `object-add`.
    ObjectAdd(ObjectOptions),
    /// `object-del`.
    ObjectDel {
        /// The object.
        id: String,
    },
    /// `__infill_query-state`.
    QueryState,
    /// `__infill_query-load`.
    QueryLoad,
    /// Disks that change hosts.
    Migration(MigrationCommand),
}

/// Commands that are built, `qmp_capabilities` among them.
pub const NAMES: &[&str] = &[
    "qmp_capabilities",
    "query-version",
    "query-commands",
    "query-qmp-schema",
    "quit",
    "blockdev-add",
    "blockdev-del",
    "blockdev-snapshot",
    "blockdev-backup",
    "transaction",
    "block-dirty-bitmap-add",
    "block-dirty-bitmap-clear",
    "block-dirty-bitmap-disable",
    "block-dirty-bitmap-enable",
    "block-dirty-bitmap-merge",
    "block-dirty-bitmap-remove",
    "x-debug-block-dirty-bitmap-sha256",
    "block_resize",
    "block-set-write-threshold",
    "change-backing-file",
    "query-named-block-nodes",
    "query-block",
    "nbd-server-start",
    "nbd-server-stop",
    "nbd-server-add",
    "nbd-server-remove",
    "block-export-add",
    "block-export-del",
    "query-block-exports",
    "block-stream",
    "block-commit",
    "blockdev-mirror",
    "block-job-cancel",
    "block-job-pause",
    "block-job-resume",
    "block-job-set-speed",
    "block-job-complete",
    "block-job-dismiss",
    "block-job-finalize",
    "job-cancel",
    "job-pause",
    "job-resume",
    "job-complete",
    "job-dismiss",
    "job-finalize",
    "query-jobs",
    "query-block-jobs",
    "object-add",
    "object-del",
    "block-job-change",
    "blockdev-create",
    "blockdev-reopen",
    "blockdev-set-active",
    "blockdev-snapshot-delete-internal-sync",
    "blockdev-snapshot-internal-sync",
    "blockdev-snapshot-sync",
    "drive-backup",
    "drive-mirror",
    "qom-get",
    "qom-list",
    "qom-list-properties",
    "qom-list-types",
    "qom-set",
    "query-blockstats",
    "query-chardev",
    "query-chardev-backends",
    "x-debug-query-block-graph",
    "chardev-add",
    "chardev-change",
    "chardev-remove",
    "chardev-send-break",
    "ringbuf-read",
    "ringbuf-write",
    "x-blockdev-amend",
    "x-blockdev-change",
    "x-blockdev-set-iothread",
    "__infill_query-state",
    "__infill_query-load",
    "__infill_migrate",
    "__infill_query-migrations",
    "__infill_migration-switch",
    "__infill_migration-abort",
    "__infill_migration-takeover",
    "__infill_migration-reclaim",
];

/// What is known of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// It is executed.
    Built,
    /// It negotiates capabilities, which the session does itself.
    Negotiation,
    /// Nobody has it.
    No,
}

pub(crate) fn find(name: &str) -> Known {
    match name {
        "qmp_capabilities" => Known::Negotiation,
        _ if NAMES.contains(&name) => Known::Built,
        _ => Known::No,
    }
}

impl Command {
    /// Reads the arguments of the command called `name`, all of them.
    pub fn read(name: &str, mut arguments: Members) -> Result<Command, QmpError> {
        let command = match name {
            // These read all that there is.
            "blockdev-add" => {
                return Ok(Command::BlockdevAdd(Box::new(BlockdevOptions::read(arguments)?)));
            }
            "nbd-server-start" => {
                return Ok(Command::NbdServerStart(NbdServerOptions::read_legacy(arguments)?));
            }
            "block-export-add" => {
                return Ok(Command::BlockExportAdd(BlockExportOptions::read(arguments)?));
            }
            "nbd-server-add" => {
                return BlockExportOptions::read_server_add(arguments).map(Command::NbdServerAdd);
            }
            "object-add" => return Ok(Command::ObjectAdd(ObjectOptions::read(arguments)?)),
            "block-stream" => return BlockStream::read(arguments).map(Command::BlockStream),
            "blockdev-backup" => {
                return Ok(Command::BlockdevBackup(Box::new(BlockdevBackup::read(arguments)?)));
            }
            "transaction" => return Transaction::read(arguments).map(Command::Transaction),
            "drive-mirror" => {
                return Ok(Command::Shape(Shape::DriveMirror(Box::new(DriveMirror::read(arguments)?))));
            }
            "drive-backup" => {
                return Ok(Command::Shape(Shape::DriveBackup(Box::new(DriveBackup::read(arguments)?))));
            }
            "blockdev-mirror" => return BlockdevMirror::read(arguments).map(Command::BlockdevMirror),
            "block-commit" => return BlockCommit::read(arguments).map(Command::BlockCommit),
            "query-version" => Command::QueryVersion,
            "query-commands" => Command::QueryCommands,
            "query-qmp-schema" => Command::QueryQmpSchema,
            "quit" => Command::Quit,
            "query-block" => Command::QueryBlock,
            "query-block-exports" => Command::QueryBlockExports,
            "query-jobs" => Command::QueryJobs,
            "query-block-jobs" => Command::QueryBlockJobs,
            "__infill_query-state" => Command::QueryState,
            "__infill_query-load" => Command::QueryLoad,
            "nbd-server-stop" => Command::NbdServerStop,
            "blockdev-del" => Command::BlockdevDel { node_name: arguments.str("node-name")? },
            "blockdev-snapshot" => {
                Command::BlockdevSnapshot { node: arguments.str("node")?, overlay: arguments.str("overlay")? }
            }
            "blockdev-snapshot-delete-internal-sync" => Command::DeleteSnapshot {
                device: arguments.str("device")?,
                id: arguments.opt_str("id")?,
                name: arguments.opt_str("name")?,
            },
            "query-named-block-nodes" => {
                Command::QueryNamedBlockNodes { flat: arguments.opt_bool("flat")?.unwrap_or(false) }
            }
            "block-export-del" => Command::BlockExportDel {
                id: arguments.str("id")?,
                mode: arguments.opt_word("mode")?.unwrap_or_default(),
            },
            "nbd-server-remove" => Command::BlockExportDel {
                id: arguments.str("name")?,
                mode: arguments.opt_word("mode")?.unwrap_or_default(),
            },
            "object-del" => Command::ObjectDel { id: arguments.str("id")? },
            _ => match BitmapCommand::read(name, &mut arguments)? {
                Some(command) => Command::Bitmap(command),
                None => match Alter::read(name, &mut arguments)? {
                    Some(alter) => Command::Alter(alter),
                    None => read_rest(name, &mut arguments)?,
                },
            },
        };
        arguments.finish()?;
        Ok(command)
    }
}

fn read_rest(name: &str, arguments: &mut Members) -> Result<Command, QmpError> {
    if let Some(shape) = Shape::read(name, arguments)? {
        return Ok(Command::Shape(shape));
    }
    if let Some(command) = ChardevCommand::read(name, arguments)? {
        return Ok(Command::Chardev(command));
    }
    if let Some(command) = Experimental::read(name, arguments)? {
        return Ok(Command::Experimental(command));
    }
    if let Some(command) = MigrationCommand::read(name, arguments)? {
        return Ok(Command::Migration(command));
    }
    match Inspect::read(name, arguments)? {
        Some(inspect) => Ok(Command::Inspect(inspect)),
        None => read_job(name, arguments),
    }
}

/// `job-*`, `block-job-*`.
fn read_job(name: &str, arguments: &mut Members) -> Result<Command, QmpError> {
    let (verb, block) = match name.strip_prefix("block-job-") {
        Some(verb) => (verb, true),
        None => (name.strip_prefix("job-").unwrap_or(name), false),
    };
    let key = if block && !matches!(verb, "dismiss" | "finalize") { "device" } else { "id" };
    let id = arguments.str(key)?;
    let command = match (verb, block) {
        ("cancel", true) => JobCommand::Cancel { force: arguments.opt_bool("force")?.unwrap_or(false) },
        ("cancel", false) => JobCommand::Cancel { force: true },
        ("pause", _) => JobCommand::Pause,
        ("resume", _) => JobCommand::Resume,
        ("complete", _) => JobCommand::Complete,
        ("dismiss", _) => JobCommand::Dismiss,
        ("finalize", _) => JobCommand::Finalize,
        ("set-speed", true) => {
            let speed = arguments.opt_unsigned("speed")?.ok_or_else(|| arguments.missing("speed"))?;
            JobCommand::SetSpeed(speed)
        }
        _ => {
            let why = format!("The command {name} has not been found");
            return Err(QmpError::new(crate::error::ErrorClass::CommandNotFound, why));
        }
    };
    Ok(Command::Job { id, command, block })
}

impl BlockStream {
    fn read(mut arguments: Members) -> Result<BlockStream, QmpError> {
        let job_id = arguments.opt_str("job-id")?.unwrap_or_default();
        let device = arguments.str("device")?;
        let base = arguments.opt_str("base")?;
        let base_node = arguments.opt_str("base-node")?;
        let backing_file = arguments.opt_str("backing-file")?;
        let backing_mask_protocol = arguments.opt_bool("backing-mask-protocol")?.unwrap_or(false);
        let bottom = arguments.opt_str("bottom")?;
        let speed = arguments.opt_unsigned("speed")?.unwrap_or(0);
        let on_error = arguments.opt_word("on-error")?.unwrap_or_default();
        let min_rate = arguments.opt_unsigned("__infill_min-rate")?;
        let finish_by = arguments.opt_unsigned("__infill_finish-by")?;
        // The job puts no filter node into the graph, so there is none to be named: accepted where it could be one.
        if let Some(name) = arguments.opt_str("filter-node-name")? {
            crate::names::check_node_name(&name)
                .map_err(|error| QmpError::generic(format!("Could not create node: {error}")))?;
        }
        let auto_finalize = arguments.opt_bool("auto-finalize")?.unwrap_or(true);
        let auto_dismiss = arguments.opt_bool("auto-dismiss")?.unwrap_or(true);
        arguments.finish()?;
        let twice = |one: &str, other: &str| {
            Err(QmpError::generic(format!("'{one}' and '{other}' cannot be specified at the same time")))
        };
        let end = match (base, base_node, bottom) {
            (Some(_), Some(_), _) => return twice("base", "base-node"),
            (Some(_), None, Some(_)) => return twice("base", "bottom"),
            (None, Some(_), Some(_)) => return twice("bottom", "base-node"),
            (Some(file), None, None) => StreamEnd::BaseFile(file),
            (None, Some(node), None) => StreamEnd::BaseNode(node),
            (None, None, Some(node)) => StreamEnd::Bottom(node),
            (None, None, None) => StreamEnd::All,
        };
        Ok(BlockStream {
            job_id,
            device,
            end,
            backing_file,
            backing_mask_protocol,
            speed,
            on_error,
            min_rate,
            finish_by,
            auto_finalize,
            auto_dismiss,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, arguments: &str) -> Result<Command, String> {
        let arguments = Members::of_argument(arguments, None).unwrap();
        Command::read(name, arguments).map_err(|error| error.desc)
    }

    #[test]
    fn every_command_of_qemu_storage_daemon_is_built() {
        let own = NAMES.iter().filter(|name| name.starts_with("__infill_")).count();
        assert_eq!(NAMES.len() - own, 76);
        for name in NAMES.iter().filter(|name| **name != "qmp_capabilities") {
            assert_eq!(find(name), Known::Built);
            if let Err(why) = read(name, "{}") {
                assert!(why.starts_with("Parameter '") && why.ends_with("is missing"), "{name}: {why}");
            }
            let why = read(name, r#"{"node-name": "n", "id": "i", "device": "d", "speed": 1, "zz": 1}"#);
            assert!(why.is_err(), "{name} takes whatever it is given");
        }
    }

    #[test]
    fn a_job_is_named_as_each_command_names_it() {
        for (name, key, block, command) in [
            ("block-job-cancel", "device", true, JobCommand::Cancel { force: false }),
            ("job-cancel", "id", false, JobCommand::Cancel { force: true }),
            ("block-job-pause", "device", true, JobCommand::Pause),
            ("block-job-dismiss", "id", true, JobCommand::Dismiss),
            ("block-job-finalize", "id", true, JobCommand::Finalize),
            ("job-complete", "id", false, JobCommand::Complete),
        ] {
            let expected = Command::Job { id: "j".into(), command, block };
            assert_eq!(read(name, &format!(r#"{{"{key}": "j"}}"#)), Ok(expected), "{name}");
        }
        let speed = Command::Job { id: "j".into(), command: JobCommand::SetSpeed(7), block: true };
        assert_eq!(read("block-job-set-speed", r#"{"device": "j", "speed": 7}"#), Ok(speed));
        assert_eq!(
            read("block-job-set-speed", r#"{"device": "j", "speed": -7}"#),
            Err("Parameter 'speed' expects a non-negative value".into())
        );
        assert_eq!(
            read("block-job-set-speed", r#"{"device": "j"}"#),
            Err("Parameter 'speed' is missing".into())
        );
    }

    #[test]
    fn a_stream_ends_in_one_place() {
        let stream = |rest: &str| read("block-stream", &format!(r#"{{"job-id": "j", "device": "d"{rest}}}"#));
        let Ok(Command::BlockStream(plain)) = stream("") else { panic!() };
        assert_eq!((plain.end, plain.auto_finalize, plain.auto_dismiss), (StreamEnd::All, true, true));
        assert_eq!((plain.min_rate, plain.finish_by), (None, None));
        let own = r#", "__infill_min-rate": 4096, "__infill_finish-by": 1900000000"#;
        let Ok(Command::BlockStream(own)) = stream(own) else { panic!() };
        assert_eq!((own.min_rate, own.finish_by), (Some(4096), Some(1_900_000_000)));
        for (rest, why) in [
            (
                r#", "base": "x", "base-node": "f""#,
                "'base' and 'base-node' cannot be specified at the same time",
            ),
            (r#", "base": "x", "bottom": "f""#, "'base' and 'bottom' cannot be specified at the same time"),
            (
                r#", "bottom": "x", "base-node": "f""#,
                "'bottom' and 'base-node' cannot be specified at the same time",
            ),
            (r#", "on-error": "zz""#, "Parameter 'on-error' does not accept value 'zz'"),
            (r#", "speed": "1""#, "Invalid parameter type for 'speed', expected: integer"),
            (r#", "speed": -1"#, "Parameter 'speed' expects a non-negative value"),
            (r#", "__infill_min-rate": -1"#, "Parameter '__infill_min-rate' expects a non-negative value"),
            (r#", "filter-node-name": "1""#, "Could not create node: Invalid node-name: '1'"),
        ] {
            assert_eq!(stream(rest), Err(why.into()), "{rest}");
        }
    }
}
