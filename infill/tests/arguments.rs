//! Every command with arguments that are missing, unknown, of a wrong type or contradict each other: refused with the protocol's
//! class and a sentence that names what is wrong, and nothing has changed. Made from what `query-qmp-schema` says, so that a command
//! that is new is tried too.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::collections::HashMap;

use common::{run, text};
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

/// How deep objects within objects are tried.
const DEPTH_MAX: usize = 3;

/// What is wrong with some arguments: the arguments, and the word that the refusal has to have.
type Wrong = (Value, String);

struct Schema(HashMap<String, Value>);

fn items<'a>(of: &'a Value, key: &str) -> Vec<&'a Value> {
    of[key].as_array().into_iter().flatten().collect()
}

fn name(of: &Value) -> &str {
    of["name"].as_str().unwrap()
}

fn with(object: &Value, key: &str, value: Value) -> Value {
    let mut object = object.clone();
    object[key] = value;
    object
}

impl Schema {
    fn of(&self, kind: &Value) -> &Value {
        &self.0[kind.as_str().unwrap()]
    }

    /// Members of an object, in the case that `word` chooses.
    fn members<'a>(&'a self, kind: &'a Value, word: Option<&str>) -> Vec<&'a Value> {
        let cases = items(kind, "variants").into_iter().filter(|case| word == case["case"].as_str());
        let more = cases.flat_map(|case| items(self.of(&case["type"]), "members"));
        items(kind, "members").into_iter().chain(more).collect()
    }

    /// The words that choose what an object holds; one `None` where none does.
    fn cases<'a>(&'a self, kind: &'a Value) -> Vec<Option<&'a str>> {
        let tag = items(kind, "members").into_iter().find(|member| member["name"] == kind["tag"]);
        match tag {
            None => vec![None],
            Some(tag) => items(self.of(&tag["type"]), "values").into_iter().map(Value::as_str).collect(),
        }
    }

    /// Something that the type takes.
    fn sample(&self, kind: &Value) -> Value {
        let kind = self.of(kind);
        match (kind["meta-type"].as_str().unwrap(), kind["json-type"].as_str()) {
            ("builtin", Some("int")) => json!(1),
            ("builtin", Some("boolean")) => json!(true),
            ("builtin", _) => json!("1"),
            ("enum", _) => kind["values"][0].clone(),
            ("array", _) => json!([self.sample(&kind["element-type"])]),
            ("alternate", _) => json!("1"),
            ("object", _) => self.object(kind, self.cases(kind)[0]),
            (other, _) => panic!("what is {other}?"),
        }
    }

    /// An object with the members that it cannot do without.
    fn object(&self, kind: &Value, word: Option<&str>) -> Value {
        let needed = self.members(kind, word).into_iter().filter(|member| member.get("default").is_none());
        let mut object: Value =
            needed.map(|member| (name(member).to_owned(), self.sample(&member["type"]))).collect();
        if object.is_null() {
            object = json!({});
        }
        if let (Some(tag), Some(word)) = (kind["tag"].as_str(), word) {
            object[tag] = json!(word);
        }
        object
    }

    /// Objects of a type, each with one thing wrong.
    fn wrong_objects(&self, kind: &Value, depth: usize) -> Vec<Wrong> {
        let mut wrong = Vec::new();
        for word in self.cases(kind) {
            let right = self.object(kind, word);
            wrong.push((with(&right, "no-such-member", json!(1)), "no-such-member".to_owned()));
            for member in self.members(kind, word) {
                let name = name(member);
                if member.get("default").is_none() {
                    let mut without = right.clone();
                    without.as_object_mut().unwrap().remove(name);
                    wrong.push((without, name.to_owned()));
                }
                for (value, why) in self.wrong_values(&member["type"], depth) {
                    wrong.push((with(&right, name, value), why.unwrap_or_else(|| name.to_owned())));
                }
            }
        }
        wrong
    }

    /// Values that a type does not take, each with the word that a refusal has to have if that is not the member's name.
    fn wrong_values(&self, kind: &Value, depth: usize) -> Vec<(Value, Option<String>)> {
        let kind = self.of(kind);
        match (kind["meta-type"].as_str().unwrap(), kind["json-type"].as_str()) {
            ("builtin", Some("value")) => Vec::new(),
            ("builtin", Some("string")) => vec![(json!(7), None), (json!(null), None), (json!({}), None)],
            ("builtin", Some("int")) => vec![(json!("x"), None), (json!(1.5), None), (json!([]), None)],
            ("builtin", _) => vec![(json!("x"), None), (json!(1), None)],
            ("enum", _) => {
                vec![(json!(7), None), (json!("no-such-word"), Some("no-such-word".to_owned()))]
            }
            ("alternate", _) => vec![(json!(7), None), (json!([]), None)],
            ("array", _) => {
                let inside = self.wrong_values(&kind["element-type"], depth + 1);
                // An item has no name to be told by.
                let of_item = |why: Option<String>| why.or(Some("expected: ".to_owned()));
                let inside = inside.into_iter().map(|(value, why)| (json!([value]), of_item(why)));
                [(json!(7), None), (json!({}), None)].into_iter().chain(inside).collect()
            }
            ("object", _) if depth < DEPTH_MAX => {
                let inside = self.wrong_objects(kind, depth + 1).into_iter();
                [(json!(7), None), (json!("x"), None)]
                    .into_iter()
                    .chain(inside.map(|(value, why)| (value, Some(why))))
                    .collect()
            }
            _ => vec![(json!(7), None)],
        }
    }
}

/// What a manager can see.
fn state(qmp: &mut Qmp) -> Vec<Value> {
    ["query-named-block-nodes", "query-block-exports", "query-jobs", "query-chardev"]
        .map(|query| qmp.run(query, json!({})))
        .into()
}

/// A daemon that has one of everything.
fn daemon(dir: &std::path::Path) -> (Daemon, Qmp) {
    let path = |name: &str| text(&dir.join(name)).to_owned();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path("q.img"), "1M"]);
    run("qemu-img", &["create", "-q", "-f", "raw", &path("t.img"), "1M"]);
    let daemon = Daemon::start(Program::Infill, dir, &[]);
    let mut qmp = daemon.connect();
    let node = |driver: &str, name: &str| {
        json!({"driver": driver, "node-name": name,
            "file": {"driver": "file", "node-name": format!("{name}f"), "filename": path(&format!("{name}.img"))}})
    };
    qmp.run("blockdev-add", node("qcow2", "q"));
    qmp.run("blockdev-add", node("raw", "t"));
    qmp.run("block-dirty-bitmap-add", json!({"node": "q", "name": "b"}));
    qmp.run("object-add", json!({"qom-type": "throttle-group", "id": "g"}));
    qmp.run("chardev-add", json!({"id": "r", "backend": {"type": "ringbuf", "data": {}}}));
    qmp.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": path("n.sock")}}}));
    qmp.run("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "q", "name": "q"}));
    qmp.run("blockdev-mirror", json!({"job-id": "j", "device": "q", "target": "t", "sync": "full"}));
    qmp.wait_for("BLOCK_JOB_READY");
    (daemon, qmp)
}

#[test]
fn arguments_that_are_missing_unknown_or_of_a_wrong_type_are_refused_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (daemon, mut qmp) = daemon(dir.path());
    let told = qmp.run("query-qmp-schema", json!({}));
    let told = told.as_array().unwrap();
    let schema = Schema(told.iter().map(|one| (name(one).to_owned(), one.clone())).collect());
    let before = state(&mut qmp);
    let (mut tried, mut failed) = (0, Vec::new());
    // Capabilities are negotiated once.
    let commands =
        told.iter().filter(|one| one["meta-type"] == "command" && one["name"] != "qmp_capabilities");
    for command in commands {
        let name = name(command);
        for (arguments, why) in schema.wrong_objects(schema.of(&command["arg-type"]), 0) {
            tried += 1;
            let answer = qmp.ask(name, arguments.clone());
            let (class, desc) = (&answer["error"]["class"], answer["error"]["desc"].as_str().unwrap_or(""));
            if class != "GenericError" || !desc.contains(&why) {
                failed.push(format!("{name} {arguments}: without '{why}': {answer}"));
            }
        }
        assert_eq!(state(&mut qmp), before, "{name} has changed something");
    }
    assert!(failed.is_empty(), "{} of {tried}:\n{}", failed.len(), failed.join("\n"));
    assert!(tried > 1000, "only {tried} were tried");
    daemon.quit(&mut qmp);
}

#[test]
fn arguments_that_contradict_each_other_are_refused_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (daemon, mut qmp) = daemon(dir.path());
    let before = state(&mut qmp);
    for (command, arguments) in [
        ("block-stream", json!({"job-id": "k", "device": "q", "base": "x", "base-node": "t"})),
        ("block-stream", json!({"job-id": "k", "device": "q", "bottom": "x", "base-node": "t"})),
        ("block-commit", json!({"job-id": "k", "device": "q", "top": "x", "top-node": "q"})),
        ("block-commit", json!({"job-id": "k", "device": "q", "base": "x", "base-node": "q"})),
        ("blockdev-mirror", json!({"job-id": "k", "device": "q", "target": "q", "sync": "full"})),
        (
            "blockdev-mirror",
            json!({"job-id": "k", "device": "q", "target": "t", "sync": "full", "bitmap": "b"}),
        ),
        ("blockdev-backup", json!({"job-id": "k", "device": "q", "target": "q", "sync": "full"})),
        ("blockdev-backup", json!({"job-id": "k", "device": "q", "target": "t", "sync": "bitmap"})),
        (
            "blockdev-backup",
            json!({"job-id": "k", "device": "q", "target": "t", "sync": "full", "bitmap-mode": "never"}),
        ),
        ("block_resize", json!({"device": "q", "node-name": "q", "size": 4096})),
        ("x-blockdev-change", json!({"parent": "q", "child": "file", "node": "t"})),
        ("blockdev-add", json!({"driver": "null-co", "node-name": "q"})),
        ("blockdev-add", json!({"driver": "qcow2", "node-name": "q2", "file": "qf"})),
        (
            "object-add",
            json!({"qom-type": "throttle-group", "id": "g", "limits": {"iops-total": 1, "iops-read": 1}}),
        ),
        ("object-add", json!({"qom-type": "throttle-group", "id": "g"})),
        ("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "x"}}})),
        ("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "q", "name": "q3"})),
        ("block-export-add", json!({"type": "nbd", "id": "e2", "node-name": "q", "name": "q"})),
        ("block-dirty-bitmap-add", json!({"node": "q", "name": "b"})),
        ("block-dirty-bitmap-add", json!({"node": "q", "name": "b2", "granularity": 1000})),
        ("chardev-add", json!({"id": "r", "backend": {"type": "null", "data": {}}})),
        (
            "transaction",
            json!({"actions": [
            {"type": "block-dirty-bitmap-add", "data": {"node": "q", "name": "b9"}},
            {"type": "block-dirty-bitmap-add", "data": {"node": "q", "name": "b9"}}]}),
        ),
    ] {
        let error = qmp.refused(command, arguments.clone());
        assert_eq!(error["class"], "GenericError", "{command} {arguments}: {error}");
        assert!(error["desc"].as_str().unwrap().len() > 10, "{error}");
        assert_eq!(state(&mut qmp), before, "{command} {arguments}");
    }
    daemon.quit(&mut qmp);
}
