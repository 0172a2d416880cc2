//! Commands about disks that change hosts: all of our own.

use crate::error::QmpError;
use crate::members::{Members, Words};

/// The phase, at its source, of a migration that is to copy all before disks change hands, and whose guests write faster.
pub const PHASE_GIVES_UP: &str = "cannot keep up";

/// How the data of disks that change hands follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum MigrationMode {
    /// Most of it before the switch, while guests write; the rest after it.
    #[default]
    Hybrid,
    /// All of it after the switch.
    PostCopy,
    /// All of it before the switch.
    PreCopy,
}

impl Words for MigrationMode {
    const WORDS: &'static [(&'static str, MigrationMode)] = &[
        ("hybrid", MigrationMode::Hybrid),
        ("post-copy", MigrationMode::PostCopy),
        ("pre-copy", MigrationMode::PreCopy),
    ];

    fn of(word: &str) -> Option<&'static MigrationMode> {
        Self::WORDS.iter().find(|(name, _)| *name == word).map(|(_, mode)| mode)
    }
}

/// `__infill_migrate`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migrate {
    /// The UUIDs of the disks of one machine, which are the names of their exports.
    pub disks: Vec<String>,
    /// Where the other daemon takes disks: `HOST:PORT`, or a socket by its whole path.
    pub to: String,
    /// How the data follows.
    pub mode: MigrationMode,
    /// The migration's own UUID, where the caller has one: the same call again is then the same migration.
    pub migration: Option<String>,
    /// Whether the disks change hands by themselves, as soon as they can.
    pub auto_switch: bool,
    /// For how many seconds the disks can come back once all data is there, unless a guest has written to them there.
    pub way_back: Option<u32>,
    /// Of a hybrid one: the disks change hands after so many seconds of copying, however much is there.
    pub warm_seconds: Option<u32>,
    /// Of a hybrid one: the disks change hands once so many bytes were copied, if not sooner.
    pub warm_bytes: Option<u64>,
    /// What the other daemon's certificate is for, where that is not the host that is dialled.
    pub tls_hostname: Option<String>,
}

/// The names in `disks`, a list of objects with one member each.
fn disks(arguments: &mut Members) -> Result<Vec<String>, QmpError> {
    let listed = arguments.opt_objects("disks")?.ok_or_else(|| arguments.missing("disks"))?;
    let name = |mut disk: Members| {
        let name = disk.str("name")?;
        disk.finish()?;
        Ok(name)
    };
    listed.into_iter().map(name).collect()
}

/// One of these commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MigrationCommand {
    /// `__infill_migrate`.
    Migrate(Migrate),
    /// `__infill_query-migrations`.
    Query,
    /// `__infill_migration-switch`: now.
    Switch(String),
    /// `__infill_migration-abort`.
    Abort(String),
    /// `__infill_migration-takeover`.
    Takeover(String),
    /// `__infill_migration-reclaim`.
    Reclaim(String),
}

impl MigrationCommand {
    /// Reads the arguments of the command called `name`; `None` if it is none of these.
    pub(crate) fn read(name: &str, arguments: &mut Members) -> Result<Option<MigrationCommand>, QmpError> {
        Ok(Some(match name {
            "__infill_migrate" => MigrationCommand::Migrate(Migrate {
                disks: disks(arguments)?,
                to: arguments.str("to")?,
                mode: arguments.opt_word("mode")?.unwrap_or_default(),
                migration: arguments.opt_str("migration")?,
                auto_switch: arguments.opt_bool("auto-switch")?.unwrap_or(true),
                way_back: arguments.opt_u32("way-back")?,
                warm_seconds: arguments.opt_u32("warm-seconds")?,
                warm_bytes: arguments.opt_u64("warm-bytes")?,
                tls_hostname: arguments.opt_str("tls-hostname")?,
            }),
            "__infill_query-migrations" => MigrationCommand::Query,
            "__infill_migration-switch" => MigrationCommand::Switch(arguments.str("migration")?),
            "__infill_migration-abort" => MigrationCommand::Abort(arguments.str("migration")?),
            "__infill_migration-takeover" => MigrationCommand::Takeover(arguments.str("migration")?),
            "__infill_migration-reclaim" => MigrationCommand::Reclaim(arguments.str("migration")?),
            _ => return Ok(None),
        }))
    }
}
