//! What is kept of one thing, and which commands make and take away what is kept.

use infill_job::{JobType, KeptJob, MapName};
use infill_qmp::command::Command;
use infill_qmp::shape::Shape;
use infill_qmp::{BitmapCommand, Members, NbdServerOptions, QmpError};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// What kind of thing is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// An object.
    Object,
    /// A node.
    Node,
    /// The NBD server.
    Server,
    /// An export.
    Export,
    /// A job.
    Job,
    /// A dirty bitmap.
    Bitmap,
}

impl Kind {
    /// Its name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Object => "object",
            Kind::Node => "node",
            Kind::Server => "server",
            Kind::Export => "export",
            Kind::Job => "job",
            Kind::Bitmap => "bitmap",
        }
    }

    /// What takes one away.
    pub const fn remover(self) -> &'static str {
        match self {
            Kind::Object => "object-del",
            Kind::Node => "blockdev-del",
            Kind::Server => "nbd-server-stop",
            Kind::Export => "block-export-del",
            Kind::Job => "job-cancel",
            Kind::Bitmap => "block-dirty-bitmap-remove",
        }
    }
}

/// The name of a kept thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// Its kind.
    pub kind: Kind,
    /// Its name among those of its kind; empty for the NBD server.
    pub name: String,
}

impl Key {
    /// Of that kind and name.
    pub fn new(kind: Kind, name: &str) -> Key {
        Key { kind, name: name.to_owned() }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind {
            Kind::Server => f.write_str("the NBD server"),
            kind => write!(f, "{} '{}'", kind.as_str(), self.name),
        }
    }
}

/// A job's part of a record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobRecord {
    /// What it does.
    #[serde(rename = "type")]
    pub kind: JobType,
    /// Where it stands.
    pub kept: KeptJob,
    /// What it was for has happened (its target has taken the place of its source): whatever else is known of it, it must
    /// not begin again, or it would copy the old disk over the new one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub done: bool,
    /// Which jobs complete together with it: those of the same number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<u64>,
}

impl JobRecord {
    /// Whether it is not to begin again.
    pub fn is_over(&self) -> bool {
        self.kept.cancelled || self.kept.concluded || self.done
    }
}

/// A kept thing: the command that makes it again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What it is.
    pub key: Key,
    /// The command, or [`SERVER_OPTION`].
    pub command: String,
    /// The command's arguments, as they were given.
    pub given: Map<String, Value>,
    /// Whether scalars are strings because they were given in dotted keys.
    pub strings: bool,
    /// The arguments that make it as it is now, where it has changed since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub now: Option<Map<String, Value>>,
    /// Of a job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<JobRecord>,
    /// Of a bitmap: where its bits are. A bitmap without them was lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<MapName>,
}

impl Record {
    /// The command that was given.
    pub fn given(&self) -> Result<Command, QmpError> {
        read_command(&self.command, Members::of_parts(self.given.clone(), self.strings))
    }

    /// Whether it can be made only when that is there.
    pub fn needs(&self, key: &Key) -> bool {
        match key.kind {
            Kind::Server => self.key.kind == Kind::Export,
            Kind::Node | Kind::Object => names(self.now.as_ref().unwrap_or(&self.given), &key.name),
            Kind::Export | Kind::Job | Kind::Bitmap => false,
        }
    }

    /// The files that it names: by `filename` wherever that stands, and by `target`, which may be the name of a node.
    pub fn files(&self) -> Vec<String> {
        fn collect(members: &Map<String, Value>, files: &mut Vec<String>) {
            for (key, value) in members {
                match value {
                    Value::String(name) if key.ends_with("filename") || key == "target" => {
                        files.push(name.clone());
                    }
                    Value::Object(inner) => collect(inner, files),
                    _ => {}
                }
            }
        }
        let mut files = Vec::new();
        collect(self.now.as_ref().unwrap_or(&self.given), &mut files);
        files
    }

    /// The command that makes it as it is now.
    pub fn now(&self) -> Result<Command, QmpError> {
        let members = self.now.as_ref().unwrap_or(&self.given);
        read_command(&self.command, Members::of_parts(members.clone(), self.strings))
    }
}

/// Members that name nothing that is kept, or what the record itself is of.
const OWN_NAMES: [&str; 8] =
    ["id", "name", "job-id", "node-name", "export", "filename", "description", "path"];

/// Whether arguments name the node or object `wanted`.
fn names(given: &Map<String, Value>, wanted: &str) -> bool {
    let is_node_of_export = |key: &str| key == "node-name" && !given.contains_key("driver");
    given.iter().any(|(key, value)| {
        (is_node_of_export(key) || !OWN_NAMES.contains(&key.as_str())) && names_in(value, wanted)
    })
}

fn names_in(value: &Value, wanted: &str) -> bool {
    match value {
        Value::String(name) => name == wanted,
        Value::Array(values) => values.iter().any(|value| names_in(value, wanted)),
        Value::Object(members) => names(members, wanted),
        _ => false,
    }
}

/// How records name the option `--nbd-server`: its address is written otherwise than that of `nbd-server-start`.
pub const SERVER_OPTION: &str = "--nbd-server";

/// How records name a bitmap.
pub fn bitmap_key(node: &str, name: &str) -> Key {
    // No node has such a name.
    Key { kind: Kind::Bitmap, name: format!("{node}/{name}") }
}

/// The commands whose jobs a transaction may start.
const BACKUPS: [&str; 2] = ["blockdev-backup", "drive-backup"];

/// The command of that name, or of that option.
pub fn read_command(name: &str, arguments: Members) -> Result<Command, QmpError> {
    match name {
        SERVER_OPTION => NbdServerOptions::read(arguments).map(Command::NbdServerStart),
        name => Command::read(name, arguments),
    }
}

/// What `command` makes that is to come back, and the type of a job. **A command whose result is to outlive the daemon
/// has its line here**; nothing else is needed, its arguments are kept as they came.
pub fn makes(command: &Command) -> Option<(Key, Option<JobType>)> {
    let (kind, name, job) = match command {
        Command::ObjectAdd(object) => (Kind::Object, object.id.as_str(), None),
        Command::BlockdevAdd(node) => (Kind::Node, node.node_name.as_deref()?, None),
        Command::NbdServerStart(_) => (Kind::Server, "", None),
        Command::BlockExportAdd(export) | Command::NbdServerAdd(export) => {
            (Kind::Export, export.id.as_str(), None)
        }
        Command::BlockStream(stream) => (Kind::Job, stream.job_id.as_str(), Some(JobType::Stream)),
        Command::BlockCommit(commit) => (Kind::Job, commit.job.job_id.as_str(), Some(JobType::Commit)),
        Command::BlockdevMirror(mirror) => (Kind::Job, mirror.job.job_id.as_str(), Some(JobType::Mirror)),
        Command::BlockdevBackup(backup) => (Kind::Job, backup.job.job_id.as_str(), Some(JobType::Backup)),
        Command::Shape(Shape::DriveMirror(drive)) => {
            (Kind::Job, drive.mirror.job.job_id.as_str(), Some(JobType::Mirror))
        }
        Command::Shape(Shape::DriveBackup(drive)) => {
            (Kind::Job, drive.backup.job.job_id.as_str(), Some(JobType::Backup))
        }
        _ => return None,
    };
    Some((Key::new(kind, name), job))
}

/// The commands, with their arguments, that make alone what the transaction of these arguments makes and is to come back.
pub fn made_together(given: &Map<String, Value>) -> Vec<(Key, String, Map<String, Value>)> {
    let backup = |action: &Value| {
        let (name, data) = (action.get("type")?.as_str()?, action.get("data")?.as_object()?);
        let id = data.get("job-id")?.as_str()?;
        BACKUPS.contains(&name).then(|| (Key::new(Kind::Job, id), name.to_owned(), data.clone()))
    };
    let actions = given.get("actions").and_then(Value::as_array);
    actions.into_iter().flatten().filter_map(backup).collect()
}

/// What `command` takes away. (Jobs go by themselves, and with the NBD server its exports go.)
pub fn takes(command: &Command) -> Option<Key> {
    let (kind, name) = match command {
        Command::ObjectDel { id } => (Kind::Object, id.as_str()),
        Command::BlockdevDel { node_name } => (Kind::Node, node_name.as_str()),
        Command::NbdServerStop => (Kind::Server, ""),
        Command::BlockExportDel { id, .. } => (Kind::Export, id.as_str()),
        Command::Bitmap(BitmapCommand::Remove(node, name)) => return Some(bitmap_key(node, name)),
        _ => return None,
    };
    Some(Key::new(kind, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_makes_the_command_that_was_given_in_either_spelling() {
        for (text, strings) in [
            (r#"{"driver": "null-co", "node-name": "n", "size": 65536}"#, false),
            ("null-co,node-name=n,size=65536", true),
        ] {
            let members = Members::of_argument(text, Some("driver")).unwrap();
            let command = read_command("blockdev-add", members.clone()).unwrap();
            let (key, job) = makes(&command).unwrap();
            assert_eq!((key.to_string(), job), ("node 'n'".into(), None));
            let (given, is_strings) = members.into_parts();
            assert_eq!(is_strings, strings);
            let record = Record {
                key,
                command: "blockdev-add".into(),
                given,
                strings,
                now: None,
                job: None,
                bits: None,
            };
            let bytes = serde_json::to_vec(&record).unwrap();
            let again: Record = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(again, record);
            assert_eq!((again.given().unwrap(), again.now().unwrap()), (command.clone(), command));
        }
    }

    #[test]
    fn a_description_as_deep_as_a_monitor_takes_is_read_again() {
        let mut text = String::from(r#"{"driver": "null-co"}"#);
        let mut deep = None;
        while let Ok(members) = Members::of_argument(&text, None) {
            deep = Some(members);
            text = format!(r#"{{"driver": "raw", "file": {text}}}"#);
        }
        let (given, strings) = deep.unwrap().into_parts();
        let key = Key::new(Kind::Node, "n");
        let record =
            Record { key, command: "blockdev-add".into(), given, strings, now: None, job: None, bits: None };
        let bytes = serde_json::to_vec(&record).unwrap();
        assert_eq!(serde_json::from_slice::<Record>(&bytes).unwrap(), record);
    }
}
