//! The schema as a client sees it, against the readers that it speaks of.

use std::collections::{BTreeSet, HashMap};

use super::*;
use crate::members::Members;

/// Deeper than any object in arguments.
const DEPTH_MAX: usize = 6;

struct Types<'a>(HashMap<&'a str, &'a Value>);

fn types(schema: &Value) -> Types<'_> {
    let all = schema.as_array().unwrap();
    Types(all.iter().map(|one| (one["name"].as_str().unwrap(), one)).collect())
}

impl Types<'_> {
    fn of(&self, name: &Value) -> &Value {
        self.0[name.as_str().unwrap()]
    }

    /// Values of that type: at least one of every case of it and of what is in it.
    fn samples(&self, name: &Value, text: &str, depth: usize) -> Vec<Value> {
        let of = self.of(name);
        match of["meta-type"].as_str().unwrap() {
            "builtin" => vec![match of["json-type"].as_str().unwrap() {
                "string" => json!(text),
                "int" => json!(1),
                "boolean" => json!(text == "a"),
                _ => json!({}),
            }],
            "enum" => vec![of["values"][0].clone()],
            "alternate" => vec![json!(text)],
            "array" => {
                let items = self.samples(&of["element-type"], text, depth);
                items.into_iter().map(|item| json!([item])).collect()
            }
            _ => self.objects(of, text, depth),
        }
    }

    fn objects(&self, of: &Value, text: &str, depth: usize) -> Vec<Value> {
        assert!(depth < DEPTH_MAX, "{of} has no end");
        let own: Vec<_> = of["members"].as_array().unwrap().iter().collect();
        let Some(tag) = of["tag"].as_str() else { return self.with(&json!({}), &own, text, depth) };
        let cases = of["variants"].as_array().unwrap();
        let one = |case: &Value| {
            let start = json!({ tag: case["case"] });
            let more = self.of(&case["type"])["members"].as_array().unwrap();
            let members: Vec<_> =
                own.iter().copied().filter(|member| member["name"] != *tag).chain(more).collect();
            self.with(&start, &members, text, depth)
        };
        cases.iter().flat_map(one).collect()
    }

    /// `start` and what cannot be left out; that with each of the other members; and with each value of each.
    fn with(&self, start: &Value, members: &[&Value], text: &str, depth: usize) -> Vec<Value> {
        let values: Vec<_> =
            members.iter().map(|member| (*member, self.samples(&member["type"], text, depth + 1))).collect();
        let mut least = start.clone();
        for (member, samples) in values.iter().filter(|(member, _)| member.get("default").is_none()) {
            least[member["name"].as_str().unwrap()] = samples[0].clone();
        }
        let mut all = vec![least.clone()];
        for (member, samples) in &values {
            let skip = usize::from(member.get("default").is_none());
            for sample in samples.iter().skip(skip) {
                let mut more = least.clone();
                more[member["name"].as_str().unwrap()] = sample.clone();
                all.push(more);
            }
        }
        all
    }
}

fn refusal(name: &str, arguments: &Value) -> Option<String> {
    let members = Members::of_json(arguments.as_object().unwrap().clone());
    let outcome = match name {
        "qmp_capabilities" => read_capabilities(members).map(drop),
        name => Command::read(name, members).map(drop),
    };
    outcome.err().map(|error| error.desc)
}

/// Every object in `value`: where it is, and how the names of its members begin.
fn objects(value: &Value, pointer: &str, path: &str, found: &mut Vec<(String, String)>) {
    match value {
        Value::Object(object) => {
            found.push((pointer.to_owned(), path.to_owned()));
            for (key, inner) in object {
                let dot = if inner.is_object() { "." } else { "" };
                objects(inner, &format!("{pointer}/{key}"), &format!("{path}{key}{dot}"), found);
            }
        }
        Value::Array(items) => {
            for (at, item) in items.iter().enumerate() {
                objects(item, &format!("{pointer}/{at}"), &format!("{path}[{at}]."), found);
            }
        }
        _ => {}
    }
}

/// What strings and switches hold: some strings are numbers and some are names, and not everything can be on.
const TEXTS: [&str; 2] = ["a", "1"];

#[test]
fn every_command_is_in_the_schema_and_every_type_is_defined_once_and_used() {
    let schema = schema().unwrap();
    let all = schema.as_array().unwrap();
    let names = |meta: &str| -> Vec<_> {
        all.iter().filter(|one| one["meta-type"] == meta).map(|one| one["name"].as_str().unwrap()).collect()
    };
    assert_eq!(names("command"), NAMES);
    let known: BTreeSet<_> = all.iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(known.len(), all.len(), "a name is defined twice");
    let mut used = BTreeSet::new();
    for one in all {
        for key in ["arg-type", "ret-type", "element-type"] {
            used.extend(one[key].as_str());
        }
        for key in ["members", "variants"] {
            used.extend(one[key].as_array().into_iter().flatten().filter_map(|part| part["type"].as_str()));
        }
    }
    let entries: BTreeSet<_> = names("command").into_iter().chain(names("event")).collect();
    assert_eq!(used, known.difference(&entries).copied().collect());
}

#[test]
fn what_the_schema_says_is_what_the_readers_take_member_by_member() {
    let schema = schema().unwrap();
    let types = types(schema);
    let mut tried = 0;
    for name in NAMES {
        let samples = TEXTS.map(|text| types.samples(&types.0[name]["arg-type"], text, 0));
        let mut accepted = 0;
        for pair in samples[0].iter().zip(&samples[1]) {
            let told = [pair.0, pair.1].map(|arguments| (arguments, refusal(name, arguments)));
            // Everything that it lists is taken, and with the type that it says; values may still be refused.
            let strange = |why: &str| {
                ["is missing", "is unexpected", "Invalid parameter type", "does not accept"]
                    .iter()
                    .any(|word| why.contains(word))
            };
            assert!(told.iter().any(|(_, why)| !why.as_deref().is_some_and(strange)), "{name}: {told:?}");
            if let Some((arguments, _)) = told.into_iter().find(|(_, why)| why.is_none()) {
                accepted += 1;
                tried += spoilt(name, arguments);
            }
        }
        assert!(accepted > 0, "{name}: nothing that the schema allows is accepted");
    }
    assert!(tried > 1000, "only {tried} changes were tried");
}

/// Members that are taken whatever they are.
const ANYTHING: [&str; 4] = ["iothread", "overlap-check", "x-perf", "value"];

/// Adds an unknown member to every object, and gives every member another type: all is refused, by name.
fn spoilt(name: &str, arguments: &Value) -> usize {
    let (mut found, mut tried) = (Vec::new(), 0);
    objects(arguments, "", "", &mut found);
    for (pointer, path) in found {
        if ANYTHING.iter().any(|any| path.ends_with(&format!("{any}."))) {
            continue;
        }
        let mut changed = |key: &str, value: Value, why: &str| {
            let mut spoilt = arguments.clone();
            spoilt.pointer_mut(&pointer).unwrap()[key] = value;
            let told = refusal(name, &spoilt).unwrap_or_default();
            // The protocol's words for a number of 64 bits are others, and for what is a name or an object.
            let is = told.starts_with(why)
                || told == format!("Parameter '{path}{key}' expects uint64")
                || told.starts_with(&format!("Invalid parameter type for '{key}', expected: BlockdevRef"));
            assert!(is, "{name}: {spoilt}: {told:?} is not {why:?}");
            tried += 1;
        };
        changed("zz", json!(1), &format!("Parameter '{path}zz' is unexpected"));
        for (key, value) in arguments.pointer(&pointer).unwrap().as_object().unwrap() {
            if !ANYTHING.contains(&key.as_str()) {
                let wrong = if value.is_array() { json!(5) } else { json!([[]]) };
                changed(key, wrong, &format!("Invalid parameter type for '{path}{key}', expected: "));
            }
        }
    }
    tried
}

#[test]
fn what_the_schema_calls_mandatory_is_missed_and_nothing_else() {
    let schema = schema().unwrap();
    let types = types(schema);
    for name in NAMES {
        let of = types.of(&types.0[name]["arg-type"]);
        let optional: BTreeSet<_> = of["members"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|member| member.get("default").is_some())
            .map(|member| member["name"].as_str().unwrap())
            .collect();
        let least = &types.objects(of, "a", 0)[0];
        for key in least.as_object().unwrap().keys() {
            let mut without = least.clone();
            without.as_object_mut().unwrap().remove(key);
            assert_eq!(refusal(name, &without), Some(format!("Parameter '{key}' is missing")), "{name}");
        }
        assert!(least.as_object().unwrap().keys().all(|key| !optional.contains(key.as_str())));
    }
}

#[test]
fn an_answer_or_event_that_the_schema_does_not_say_is_told_of() {
    assert_eq!(answer_misfit("blockdev-add", &json!({})), None);
    for (command, answer) in [
        ("blockdev-add", json!({ "zz": 1 })),
        ("query-commands", json!([{ "name": 1 }])),
        ("query-jobs", json!([{ "id": "a" }])),
        ("query-version", json!([])),
    ] {
        assert!(answer_misfit(command, &answer).is_some(), "{command} {answer}");
    }
    assert!(event_misfit("ZZ", &json!({})).is_some());
    assert!(event_misfit("BLOCK_EXPORT_DELETED", &json!({ "id": "a", "zz": 1 })).is_some());
    assert_eq!(event_misfit("__INFILL_SOURCE_BACK", &json!({ "id": "a" })), None);
}
