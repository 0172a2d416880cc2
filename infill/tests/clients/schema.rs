//! `query-qmp-schema` says what the daemon takes and tells, and where qemu-storage-daemon has it too, it says the same.

use std::collections::{BTreeSet, HashMap};

use crate::qmp::{Daemon, Program};
use serde_json::{Value, json};

/// What both tell of mirrors alone: they as a variant's member, we as one that may be absent.
const OF_MIRRORS: &str = ".actively-synced: ";

/// What we take beside: a mirror may start from a bitmap.
const MORE: [&str; 4] = [
    "blockdev-mirror arg-type.bitmap: they have no such member",
    "blockdev-mirror arg-type.bitmap-mode: they have no such member",
    "drive-mirror arg-type.bitmap: they have no such member",
    "drive-mirror arg-type.bitmap-mode: they have no such member",
];

/// A schema by the names in it.
struct Schema(HashMap<String, Value>);

fn schema_of(program: Program) -> (Schema, BTreeSet<String>) {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(program, dir.path(), &[]);
    let mut qmp = daemon.connect();
    let schema = qmp.run("query-qmp-schema", json!({}));
    let commands = qmp.run("query-commands", json!({}));
    let name = |one: &Value| one["name"].as_str().unwrap().to_owned();
    let commands = commands.as_array().unwrap().iter().map(name).collect();
    daemon.quit(&mut qmp);
    (Schema(schema.as_array().unwrap().iter().map(|one| (name(one), one.clone())).collect()), commands)
}

fn list<'a>(of: &'a Value, key: &str) -> Vec<&'a Value> {
    of[key].as_array().into_iter().flatten().collect()
}

impl Schema {
    fn of(&self, name: &Value) -> &Value {
        &self.0[name.as_str().unwrap()]
    }

    /// The members of an object: all, where there is no tag; else those of the case that `word` chooses.
    fn members(&self, of: &Value, word: Option<&str>) -> HashMap<String, Value> {
        let cases =
            list(of, "variants").into_iter().filter(|case| word.is_some_and(|word| case["case"] == word));
        let more = cases.flat_map(|case| list(self.of(&case["type"]), "members"));
        let all = list(of, "members").into_iter().chain(more);
        all.map(|member| (member["name"].as_str().unwrap().to_owned(), member.clone())).collect()
    }
}

/// What does not agree.
struct Comparison<'a> {
    ours: &'a Schema,
    theirs: &'a Schema,
    seen: BTreeSet<(String, String)>,
    wrong: Vec<String>,
}

impl Comparison<'_> {
    fn types(&mut self, path: &str, ours: &Value, theirs: &Value) {
        let names = |value: &Value| value.as_str().unwrap().to_owned();
        if !self.seen.insert((names(ours), names(theirs))) {
            return;
        }
        let (ours, theirs) = (self.ours.of(ours), self.theirs.of(theirs));
        // Of this we promise no form.
        if ours["json-type"] == "value" {
            return;
        }
        if (&ours["meta-type"], &ours["json-type"]) != (&theirs["meta-type"], &theirs["json-type"]) {
            return self.wrong.push(format!("{path}: {ours} and {theirs}"));
        }
        match ours["meta-type"].as_str().unwrap() {
            "enum" => {
                let known: BTreeSet<_> = list(theirs, "values").into_iter().map(Value::to_string).collect();
                let unknown =
                    list(ours, "values").into_iter().find(|word| !known.contains(&word.to_string()));
                self.wrong.extend(unknown.map(|word| format!("{path}: they have no {word}")));
            }
            "array" => self.types(&format!("{path}[]"), &ours["element-type"], &theirs["element-type"]),
            "alternate" => self.alternates(path, ours, theirs),
            "object" => self.objects(path, ours, theirs),
            _ => {}
        }
    }

    fn alternates(&mut self, path: &str, ours: &Value, theirs: &Value) {
        let by_kind = |schema: &Schema, of: &Value| -> HashMap<String, Value> {
            let kind = |choice: &&Value| {
                let of = schema.of(&choice["type"]);
                of["json-type"].as_str().unwrap_or("object").to_owned()
            };
            list(of, "members").into_iter().map(|choice| (kind(&choice), choice["type"].clone())).collect()
        };
        let (ours, theirs) = (by_kind(self.ours, ours), by_kind(self.theirs, theirs));
        for (kind, of) in &ours {
            match theirs.get(kind) {
                Some(other) => self.types(&format!("{path}({kind})"), of, other),
                None => self.wrong.push(format!("{path}: they take no {kind}")),
            }
        }
        self.wrong.extend(
            theirs.keys().filter(|kind| !ours.contains_key(*kind)).map(|kind| format!("{path}: no {kind}")),
        );
    }

    fn objects(&mut self, path: &str, ours: &Value, theirs: &Value) {
        let Some(tag) = theirs["tag"].as_str() else {
            if ours.get("tag").is_some() {
                self.wrong.push(format!("{path}: they have no variants"));
            }
            let (ours, theirs) = (self.ours.members(ours, None), self.theirs.members(theirs, None));
            return self.members(path, &ours, &theirs);
        };
        let words =
            self.ours.members(ours, None).get(tag).map(|member| self.ours.of(&member["type"]).clone());
        let Some(words) = words else { return self.wrong.push(format!("{path}: no {tag}")) };
        for word in list(&words, "values") {
            let word = word.as_str().unwrap();
            let (ours, theirs) =
                (self.ours.members(ours, Some(word)), self.theirs.members(theirs, Some(word)));
            self.members(&format!("{path}<{word}>"), &ours, &theirs);
        }
    }

    fn members(&mut self, path: &str, ours: &HashMap<String, Value>, theirs: &HashMap<String, Value>) {
        for (name, member) in ours.iter().filter(|(name, _)| !name.starts_with("__infill_")) {
            let path = format!("{path}.{name}");
            let Some(other) = theirs.get(name) else {
                self.wrong.push(format!("{path}: they have no such member"));
                continue;
            };
            if member.get("default").is_some() != other.get("default").is_some() {
                self.wrong.push(format!("{path}: one can be left out: {member}, {other}"));
            }
            self.types(&path, &member["type"], &other["type"]);
        }
        let needed = theirs.iter().filter(|(_, member)| member.get("default").is_none());
        let absent = needed.filter(|(name, _)| !ours.contains_key(*name));
        self.wrong.extend(absent.map(|(name, _)| format!("{path}: no {name}")));
    }
}

#[test]
fn what_we_take_and_tell_is_what_qemu_storage_daemon_takes_and_tells() {
    let (ours, our_commands) = schema_of(Program::Infill);
    let (theirs, _) = schema_of(Program::Qemu);
    let in_schema: BTreeSet<_> = ours
        .0
        .values()
        .filter(|one| one["meta-type"] == "command")
        .map(|one| one["name"].as_str().unwrap())
        .collect();
    assert_eq!(in_schema, our_commands.iter().map(String::as_str).collect());
    let mut comparison =
        Comparison { ours: &ours, theirs: &theirs, seen: BTreeSet::new(), wrong: Vec::new() };
    let mut compared = 0;
    for (name, one) in &ours.0 {
        let Some(other) = theirs.0.get(name) else { continue };
        if !["command", "event"].contains(&one["meta-type"].as_str().unwrap()) {
            continue;
        }
        compared += 1;
        for key in ["arg-type", "ret-type"].into_iter().filter(|key| one.get(*key).is_some()) {
            comparison.types(&format!("{name} {key}"), &one[key], &other[key]);
        }
    }
    assert!(compared > 40, "only {compared} names are in both");
    comparison.wrong.retain(|wrong| !wrong.contains(OF_MIRRORS) && !MORE.contains(&wrong.as_str()));
    assert!(comparison.wrong.is_empty(), "{:#?}", comparison.wrong);
}
