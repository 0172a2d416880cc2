//! Commands that only ask ([`Inspect`]): what nodes have done, how they lie, character devices, objects.

use infill_node::{NodeHandle, RequestKind};
use infill_qmp::inspect::Inspect;
use infill_qmp::throttle::{limits_value, read_limits};
use infill_qmp::{ErrorClass, Members, QmpError};
use serde_json::{Map, Value, json};

use super::control::{Control, refused};
use crate::blockdev::Access;
use crate::object_types::{TYPES, TypeOfObject};

/// Kinds of character devices.
const CHARDEVS: [&str; 6] = ["file", "memory", "null", "ringbuf", "socket", "stdio"];

/// Operations that `query-blockstats` counts of each kind. There are no zones here.
const KINDS: [(&str, Option<RequestKind>); 5] = [
    ("rd", Some(RequestKind::Read)),
    ("wr", Some(RequestKind::Write)),
    ("flush", Some(RequestKind::Flush)),
    ("unmap", Some(RequestKind::Discard)),
    ("zone_append", None),
];

/// The counters of a node, in the protocol's words.
fn stats(node: &NodeHandle) -> Value {
    let mut stats = Map::new();
    for (word, kind) in KINDS {
        let counts = kind.map(|kind| node.stats().of(kind)).unwrap_or_default();
        stats.insert(format!("{word}_operations"), json!(counts.operations));
        stats.insert(format!("failed_{word}_operations"), json!(counts.failed));
        stats.insert(format!("invalid_{word}_operations"), json!(counts.invalid));
        stats.insert(format!("{word}_total_time_ns"), json!(counts.nanos));
        if word != "flush" {
            stats.insert(format!("{word}_bytes"), json!(counts.bytes));
            stats.insert(format!("{word}_merged"), json!(0));
        }
    }
    stats.insert("wr_highest_offset".into(), json!(node.stats().highest_write()));
    stats.insert("timed_stats".into(), json!([]));
    stats.insert("account_invalid".into(), json!(false));
    stats.insert("account_failed".into(), json!(false));
    Value::Object(stats)
}

/// What a user with that access needs, and what it lets others do, in the protocol's words.
const fn permissions(access: Access) -> (&'static [&'static str], &'static [&'static str]) {
    let all: &[&str] = &["resize", "write-unchanged", "write", "consistent-read"];
    let stable: &[&str] = &["write-unchanged", "consistent-read"];
    match access {
        Access::Owner => (&["resize", "write", "consistent-read"], stable),
        Access::Writer => (&["write", "consistent-read"], all),
        Access::Stable => (&["consistent-read"], stable),
        Access::Reader => (&["consistent-read"], all),
    }
}

fn no_device(path: &str) -> QmpError {
    QmpError::new(ErrorClass::DeviceNotFound, format!("Device '{path}' not found"))
}

fn property(name: &str, kind: &str) -> Value {
    json!({ "name": name, "type": kind })
}

/// An object of the tree, as far as it can be asked about.
enum Found {
    /// A place for others, with their names and types.
    Container(Vec<(String, String)>),
    /// An object that was made by `object-add`.
    Object(&'static TypeOfObject, String),
}

impl Control {
    /// The commands of [`Inspect`].
    pub(super) fn inspect(&self, inspect: Inspect) -> Result<Value, QmpError> {
        match inspect {
            Inspect::BlockStats { nodes: false } => Ok(json!([])),
            Inspect::BlockStats { nodes: true } => self.node_stats(),
            Inspect::BlockGraph => Ok(self.block_graph()),
            Inspect::Chardevs => Ok(self.query_chardev()),
            Inspect::ChardevBackends => Ok(CHARDEVS.iter().map(|name| json!({ "name": name })).collect()),
            Inspect::QomList { path } => self.qom_list(&path),
            Inspect::QomGet { path, property } => self.qom_get(&path, &property),
            Inspect::QomSet { path, property, value } => self.qom_set(&path, &property, value),
            Inspect::QomTypes { implements, r#abstract: _ } => Ok(match implements.as_deref() {
                None | Some("object" | "user-creatable") => {
                    TYPES.iter().map(|kind| json!({ "name": kind.name, "parent": kind.parent })).collect()
                }
                Some(_) => json!([]),
            }),
            Inspect::QomProperties { typename } => {
                let kind = TYPES.iter().find(|kind| kind.name == typename);
                let missing = || {
                    let why = format!("Class '{typename}' not found");
                    QmpError::new(ErrorClass::DeviceNotFound, why)
                };
                Ok(properties(kind.ok_or_else(missing)?))
            }
        }
    }

    /// `query-blockstats` of all nodes.
    fn node_stats(&self) -> Result<Value, QmpError> {
        let nodes = self.blockdevs().graph().list();
        nodes.iter().map(|(name, _)| self.stats_of(name).map_err(|error| refused(&error))).collect()
    }

    fn stats_of(&self, name: &str) -> anyhow::Result<Value> {
        // From the bottom up, so that no depth of the graph is a depth of the stack.
        let mut layers = vec![self.blockdevs().facts(name)?];
        let mut names = vec![name.to_owned()];
        while let Some(file) = layers.last().and_then(|facts| facts.file.clone()) {
            layers.push(self.blockdevs().facts(&file)?);
            names.push(file);
        }
        let mut below = None;
        for (name, facts) in names.iter().zip(&layers).rev() {
            let node = self.blockdevs().get(name)?;
            let mut told = json!({ "node-name": name, "stats": stats(&node) });
            if matches!(facts.driver, "file" | "host_device") {
                let discards = node.stats().of(RequestKind::Discard);
                told["driver-specific"] = json!({
                    "driver": facts.driver,
                    "discard-nb-ok": discards.operations,
                    "discard-nb-failed": discards.failed,
                    "discard-bytes-ok": discards.bytes,
                });
            }
            if let Some(below) = below.take() {
                told["parent"] = below;
            }
            below = Some(told);
        }
        Ok(below.unwrap_or(Value::Null))
    }

    /// `x-debug-query-block-graph`.
    fn block_graph(&self) -> Value {
        let names: Vec<String> = self.blockdevs().graph().list().into_iter().map(|(name, _)| name).collect();
        let id_of = |name: &str| names.iter().position(|other| other == name).map(|at| at + 1);
        let mut nodes: Vec<Value> = Vec::new();
        let mut edges: Vec<Value> = Vec::new();
        for name in &names {
            nodes.push(json!({ "id": id_of(name), "type": "block-driver", "name": name }));
        }
        let mut others: Vec<String> = Vec::new();
        for name in &names {
            for user in self.blockdevs().graph().users(name) {
                let (parent, edge) =
                    match user.strip_prefix("node '").and_then(|user| user.strip_suffix('\'')) {
                        Some(above) => (id_of(above), self.edge_name(above, name)),
                        None => {
                            let at = others.iter().position(|other| *other == user).unwrap_or_else(|| {
                                let job = user.strip_prefix("job '").and_then(|user| user.strip_suffix('\''));
                                let kind = if job.is_some() { "block-job" } else { "block-backend" };
                                let id = names.len() + others.len() + 1;
                                nodes
                                    .push(json!({ "id": id, "type": kind, "name": job.unwrap_or_default() }));
                                others.push(user.clone());
                                others.len() - 1
                            });
                            let edge = if user.starts_with("job '") { "main node" } else { "root" };
                            (Some(names.len() + at + 1), edge)
                        }
                    };
                let access = self.blockdevs().access_of(name, &user).unwrap_or(Access::Reader);
                let (needed, shared) = permissions(access);
                edges.push(json!({
                    "parent": parent, "child": id_of(name), "name": edge, "perm": needed, "shared-perm": shared,
                }));
            }
        }
        json!({ "nodes": nodes, "edges": edges })
    }

    fn edge_name(&self, above: &str, below: &str) -> &'static str {
        match self.blockdevs().facts(above) {
            Ok(facts) if facts.backing.as_deref() == Some(below) => "backing",
            Ok(facts) if facts.target.as_deref() == Some(below) => "target",
            _ => "file",
        }
    }

    fn find_object(&self, path: &str) -> Result<Found, QmpError> {
        let child = |kind: &str| format!("child<{kind}>");
        let objects = self.blockdevs().objects().list();
        Ok(match path {
            "/" => Found::Container(
                ["objects", "chardevs"].iter().map(|name| ((*name).to_owned(), child("container"))).collect(),
            ),
            "/objects" => {
                Found::Container(objects.into_iter().map(|(id, kind)| (id, child(kind.name))).collect())
            }
            "/chardevs" => {
                let chardevs = self.chardevs.borrow();
                let told = chardevs.iter().map(|(label, device)| (label.clone(), child(device.kind)));
                Found::Container(told.collect())
            }
            path => {
                // A part of a path that is one object's is taken for all of it.
                let id = path.strip_prefix("/objects/").unwrap_or(path);
                let found = objects.into_iter().find(|(other, _)| other == id);
                let (id, kind) = found.ok_or_else(|| no_device(path))?;
                Found::Object(kind, id)
            }
        })
    }

    fn qom_list(&self, path: &str) -> Result<Value, QmpError> {
        Ok(match self.find_object(path)? {
            Found::Object(kind, _) => properties(kind),
            Found::Container(children) => std::iter::once(property("type", "string"))
                .chain(children.iter().map(|(name, kind)| property(name, kind)))
                .collect(),
        })
    }

    /// `qom-set`: the limits of a group can be changed while they are in use, and nothing else.
    fn qom_set(&self, path: &str, name: &str, value: Value) -> Result<Value, QmpError> {
        self.qom_get(path, name)?;
        let (kind, id) = match self.find_object(path)? {
            Found::Container(_) => ("container", String::new()),
            Found::Object(kind, id) => (kind.name, id),
        };
        let Ok(group) = self.blockdevs().objects().throttle_group(&id) else {
            return Err(QmpError::generic(format!("Property '{kind}.{name}' is not writable")));
        };
        match name {
            "limits" => {
                let mut given = Map::new();
                given.insert(name.to_owned(), value);
                let given = Members::of_json(given).object(name)?;
                let limits = read_limits(&group.limits(), given)?;
                group.set_limits(limits);
                self.note_limits(&id, limits_value(&limits));
                Ok(json!({}))
            }
            "type" => Err(QmpError::generic(format!("Property '{kind}.type' is not writable"))),
            _ => Err(QmpError::generic("Property cannot be set after initialization")),
        }
    }

    fn qom_get(&self, path: &str, name: &str) -> Result<Value, QmpError> {
        let (kind, value) = match self.find_object(path)? {
            Found::Container(_) => ("container", None),
            Found::Object(kind, id) => (kind.name, self.blockdevs().objects().property(&id, name)),
        };
        let missing = || QmpError::generic(format!("Property '{kind}.{name}' not found"));
        if name == "type" { Ok(json!(kind)) } else { value.ok_or_else(missing) }
    }
}

fn properties(kind: &TypeOfObject) -> Value {
    std::iter::once(&("type", "string"))
        .chain(kind.properties)
        .map(|(name, kind)| property(name, kind))
        .collect()
}
