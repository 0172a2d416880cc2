//! Scripts of commands that are given to our daemon and to qemu-storage-daemon, and the comparison of what both say.
//!
//! What differs by nature is left out of the comparison: times, versions, generated names, the space that files take,
//! and members and events of our own (`__infill_…`).
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::path::Path;

use serde_json::{Value, json};

use super::common::{run, text};
use super::qmp::{Daemon, Program, Qmp};

/// One step of a script.
pub enum Step {
    /// A command; the answers are compared.
    Ask(&'static str, Value),
    /// A command; only success or the error's class is compared.
    AskClass(&'static str, Value),
    /// Waits for an event of that name.
    Await(&'static str),
    /// Waits for a job's state.
    AwaitStatus(&'static str),
    /// What made the source fail is gone.
    Heal,
    /// Runs a program in the directory of the test, which must succeed.
    Run(&'static [&'static str]),
    /// Bytes as they are, then `query-block` with an id of its own; all messages up to its answer are compared.
    Bytes(&'static [u8]),
}

use Step::{Ask, AskClass, Await, AwaitStatus, Bytes, Heal, Run};

/// Leaves out what differs by nature.
pub fn comparable(value: Value, dir: &Path) -> Value {
    match value {
        Value::String(string) if string.starts_with("#block") => json!("#block"),
        Value::String(string) => json!(string.replace(text(dir), "DIR")),
        Value::Array(items) => {
            let mut items: Vec<Value> = items.into_iter().map(|item| comparable(item, dir)).collect();
            let key = |item: &Value| {
                ["node-name", "id", "file", "drv", "name", "label"].map(|key| item[key].to_string())
            };
            items.sort_by_key(key);
            Value::Array(items)
        }
        Value::Object(mut members) => {
            // A file grows as its format likes.
            if members.get("format").is_some_and(|format| format == "file") {
                members.remove("virtual-size");
            }
            let kept = members.into_iter().filter(|(key, _)| {
                !key.starts_with("__infill")
                    && !matches!(
                        key.as_str(),
                        "timestamp"
                            | "actual-size"
                            | "date-sec"
                            | "date-nsec"
                            | "vm-clock-sec"
                            | "vm-clock-nsec"
                    )
            });
            Value::Object(kept.map(|(key, value)| (key, comparable(value, dir))).collect())
        }
        other => other,
    }
}

/// What one program says to a script: the answers, and the events of QEMU's names, each in order.
pub fn play(program: Program, dir: &Path, options: &[String], script: &[Step]) -> (Vec<Value>, Vec<Value>) {
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let daemon = Daemon::start(program, dir, &options);
    let mut qmp = daemon.connect();
    let in_dir = |arguments: &Value| -> Value {
        serde_json::from_str(&arguments.to_string().replace("DIR", text(dir))).unwrap()
    };
    let mut answers = Vec::new();
    for step in script {
        match step {
            Ask(command, arguments) => {
                let answer = comparable(qmp.ask(command, in_dir(arguments)), dir);
                answers.push(json!({"to": command, "with": arguments, "answer": answer}));
            }
            AskClass(command, arguments) => {
                let answer = qmp.ask(command, in_dir(arguments));
                let class = answer["error"]["class"].clone();
                answers.push(json!({"to": command, "with": arguments, "class": class}));
            }
            Await(name) => drop(qmp.wait_for(name)),
            AwaitStatus(status) => qmp.wait_for_status(status),
            Heal => std::fs::remove_file(dir.join("bad")).unwrap(),
            Run(command) => {
                let arguments: Vec<String> =
                    command[1..].iter().map(|word| word.replace("DIR", text(dir))).collect();
                let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
                answers.push(
                    json!({"ran": command, "out": run(command[0], &arguments).replace(text(dir), "DIR")}),
                );
            }
            Bytes(bytes) => answers.push(exchange(&mut qmp, bytes)),
        }
    }
    daemon.quit(&mut qmp);
    let events = qmp.seen.iter().filter(|event| !event["event"].as_str().unwrap().starts_with("__INFILL"));
    (answers, events.map(|event| comparable(event.clone(), dir)).collect())
}

fn exchange(qmp: &mut Qmp, bytes: &[u8]) -> Value {
    qmp.send(bytes);
    qmp.send(b"\n{\"execute\": \"query-block\", \"id\": \"the end\"}\n");
    let mut told = Vec::new();
    loop {
        let answer = qmp.answer();
        if answer["id"] == "the end" {
            return json!({"to": String::from_utf8_lossy(bytes), "told": told});
        }
        told.push(answer);
    }
}

/// Plays a script to both, in directories that `prepare` fills.
pub fn same(options: &[&str], script: &[Step], prepare: impl Fn(&Path)) {
    let [ours, theirs] = [Program::Infill, Program::Qemu].map(|program| {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path());
        let options: Vec<String> =
            options.iter().map(|option| option.replace("DIR", text(dir.path()))).collect();
        play(program, dir.path(), &options, script)
    });
    compare(ours, theirs);
}

/// As [`same`], where when jobs pause and how far they are between differs from run to run: answers only.
pub fn same_answers(script: &[Step], prepare: impl Fn(&Path)) {
    let [ours, theirs] = [Program::Infill, Program::Qemu].map(|program| {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path());
        (play(program, dir.path(), &[], script).0, Vec::new())
    });
    compare(ours, theirs);
}

pub fn compare(ours: (Vec<Value>, Vec<Value>), theirs: (Vec<Value>, Vec<Value>)) {
    for (ours, theirs) in ours.0.iter().zip(&theirs.0) {
        assert_eq!(ours, theirs, "ours, then qemu-storage-daemon's: {ours} {theirs}");
    }
    assert_eq!(ours.1, theirs.1, "events: ours, then qemu-storage-daemon's");
}
