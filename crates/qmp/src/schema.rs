//! `query-qmp-schema`: what is accepted and told, in the form of QEMU's introspection.
//!
//! Arguments are what the commands' own readers take (see `describe`), so nothing is written down twice; answers and
//! events are those that the module `told` lists. Types have numbers for names, as there: clients follow them from a
//! command or an event, and must not know them. Found out once in a process, in some tens of milliseconds.

use std::collections::HashMap;
use std::sync::OnceLock;

use serde_json::{Map, Value, json};

use crate::command::{Command, NAMES};
use crate::describe::{Either, Kind, Member, Shape, describe};
use crate::error::QmpError;
use crate::session::read_capabilities;
use crate::told::{self, EVENTS, Form};

/// What is defined.
#[derive(Default)]
struct Schema {
    commands: Vec<Value>,
    types: Vec<Value>,
    /// Names of types by what they are, so that equal ones are one.
    names: HashMap<String, String>,
}

/// The whole schema.
pub fn schema() -> Result<&'static Value, QmpError> {
    static SCHEMA: OnceLock<Result<Value, String>> = OnceLock::new();
    let found = SCHEMA.get_or_init(|| Schema::default().all());
    found.as_ref().map_err(|why| QmpError::generic(format!("the schema could not be found out: {why}")))
}

/// What of a command's answer the schema does not say.
pub fn answer_misfit(command: &str, answer: &Value) -> Option<String> {
    told::misfit(told::answer_of(command), answer)
}

/// What of an event's data the schema does not say.
pub fn event_misfit(event: &str, data: &Value) -> Option<String> {
    match EVENTS.iter().find(|(name, _)| *name == event) {
        Some((_, form)) => told::misfit(*form, data),
        None => Some("it is not in the schema".into()),
    }
}

impl Schema {
    fn all(mut self) -> Result<Value, String> {
        for name in NAMES {
            let shape = match *name {
                "qmp_capabilities" => describe(&|members| read_capabilities(members).map(drop)),
                name => describe(&|members| Command::read(name, members).map(drop)),
            };
            let arguments = self.object(&shape.map_err(|why| format!("{name}: {why}"))?)?;
            let answer = self.form(told::answer_of(name));
            let command =
                json!({ "name": name, "meta-type": "command", "arg-type": arguments, "ret-type": answer });
            self.commands.push(command);
        }
        for (name, form) in EVENTS {
            let data = self.form(*form);
            self.commands.push(json!({ "name": name, "meta-type": "event", "arg-type": data }));
        }
        self.commands.append(&mut self.types);
        Ok(Value::Array(self.commands))
    }

    /// The name of the type that is `what`, which `define` says more of if it is new.
    fn named(&mut self, what: String, define: impl FnOnce(&str) -> Value) -> String {
        if let Some(name) = self.names.get(&what) {
            return name.clone();
        }
        let name = self.names.len().to_string();
        self.types.push(define(&name));
        self.names.insert(what, name.clone());
        name
    }

    /// A type whose name says what it is.
    fn plain(&mut self, name: &str, key: &str, is: &str, meta: &str) -> String {
        if !self.names.contains_key(name) {
            self.names.insert(name.to_owned(), name.to_owned());
            self.types.push(json!({ "name": name, "meta-type": meta, key: is }));
        }
        name.to_owned()
    }

    fn builtin(&mut self, name: &str, json: &str) -> String {
        self.plain(name, "json-type", json, "builtin")
    }

    fn list(&mut self, of: &str) -> String {
        self.plain(&format!("[{of}]"), "element-type", of, "array")
    }

    fn words(&mut self, words: &[&str]) -> String {
        self.named(format!("enum {words:?}"), |name| {
            let members: Vec<_> = words.iter().map(|word| json!({ "name": word })).collect();
            json!({ "name": name, "meta-type": "enum", "members": members, "values": words })
        })
    }

    fn structure(&mut self, members: Map<String, Value>) -> String {
        self.named(format!("object {members:?}"), |name| {
            let mut object = members.clone();
            object.insert("name".into(), json!(name));
            object.insert("meta-type".into(), json!("object"));
            Value::Object(object)
        })
    }

    fn object(&mut self, shape: &Shape) -> Result<String, String> {
        let mut object = Map::new();
        object.insert("members".into(), self.members(&shape.members)?);
        if let Some(variants) = &shape.variants {
            let mut cases = Vec::new();
            for (word, members) in &variants.cases {
                let members = members.clone();
                let of = self.object(&Shape { members, variants: None })?;
                cases.push(json!({ "case": word, "type": of }));
            }
            object.insert("tag".into(), json!(variants.tag));
            object.insert("variants".into(), json!(cases));
        }
        Ok(self.structure(object))
    }

    fn members(&mut self, members: &[Member]) -> Result<Value, String> {
        let one = |member: &Member| {
            let kind = self.kind(&member.kind)?;
            Ok(of_member(&member.name, &kind, member.optional))
        };
        members.iter().map(one).collect()
    }

    fn kind(&mut self, kind: &Kind) -> Result<String, String> {
        Ok(match kind {
            Kind::Str => self.form(Form::Str),
            Kind::Int => self.form(Form::Int),
            Kind::Bool => self.form(Form::Bool),
            Kind::Any => self.form(Form::Any),
            Kind::Word(words) => self.words(words),
            Kind::Words(words) => {
                let of = self.words(words);
                self.list(&of)
            }
            Kind::Object(shape) => self.object(shape)?,
            Kind::Objects(shape) => {
                let of = self.object(shape)?;
                self.list(&of)
            }
            Kind::Either(either) => self.either(*either)?,
            Kind::Eithers(either) => {
                let of = self.either(*either)?;
                self.list(&of)
            }
        })
    }

    /// The object may hold members of this very type, so the name comes first.
    fn either(&mut self, either: Either) -> Result<String, String> {
        let what = format!("alternate {}", either.kind);
        if let Some(name) = self.names.get(&what) {
            return Ok(name.clone());
        }
        let name = self.names.len().to_string();
        self.names.insert(what, name.clone());
        let shape = describe(&either.read).map_err(|why| format!("{}: {why}", either.kind))?;
        let mut choices = vec![json!({ "type": self.object(&shape)? })];
        choices.push(json!({ "type": self.form(Form::Str) }));
        if either.null {
            choices.push(json!({ "type": self.builtin("null", "null") }));
        }
        self.types.push(json!({ "name": name, "meta-type": "alternate", "members": choices }));
        Ok(name)
    }

    fn form(&mut self, form: Form) -> String {
        match form {
            Form::Str => self.builtin("str", "string"),
            Form::Int => self.builtin("int", "int"),
            Form::Bool => self.builtin("bool", "boolean"),
            Form::Any => self.builtin("any", "value"),
            Form::Word(words) => self.words(words),
            Form::List(of) => {
                let of = self.form(*of);
                self.list(&of)
            }
            Form::Object(members) => {
                let one = |(name, form): &(&str, Form)| {
                    let kind = self.form(*form);
                    of_member(name.trim_start_matches('*'), &kind, name.starts_with('*'))
                };
                let members: Value = members.iter().map(one).collect();
                self.structure(Map::from_iter([("members".to_owned(), members)]))
            }
        }
    }
}

/// A member as the schema tells it: one that may be left out has a default, which is not told.
fn of_member(name: &str, kind: &str, optional: bool) -> Value {
    match optional {
        true => json!({ "name": name, "type": kind, "default": null }),
        false => json!({ "name": name, "type": kind }),
    }
}

#[cfg(test)]
mod tests;
