//! One monitor's conversation, without I/O: bytes in, commands and answers out.
//!
//! A session begins with the [greeting](Session::greeting) and negotiates capabilities; until then it takes nothing
//! else and is owed no events. Commands come out one by one in the order of their arrival.
//!
//! `oob` is offered, as managers of QEMU ask for it unseen: none of our commands can be executed out of band, which the
//! protocol answers with an error of its own.

use std::collections::VecDeque;

use serde_json::{Map, Value, json};

use crate::command::{self, Known};
use crate::error::{ErrorClass, QmpError};
use crate::json::Reader;
use crate::members::{Members, Words};
use crate::output::{answer, encode};

/// A command that is to be executed.
#[derive(Debug)]
pub struct Request {
    /// To be given back with the answer.
    pub id: Option<Value>,
    /// Its name; one of [`command::NAMES`].
    pub name: String,
    /// Its arguments.
    pub arguments: Members,
}

/// What comes out of a session.
#[derive(Debug)]
pub enum Incoming {
    /// To be executed, and answered before the next one is asked for.
    Request(Request),
    /// To be sent as it is.
    Answer(Vec<u8>),
}

/// One monitor's conversation.
#[derive(Debug)]
pub struct Session {
    version: Value,
    reader: Reader,
    waiting: VecDeque<Result<Value, QmpError>>,
    negotiated: bool,
    oob: bool,
}

impl Session {
    /// A new client, to be told that `version` (as `query-version` answers).
    pub fn new(version: Value) -> Session {
        let (reader, waiting) = (Reader::default(), VecDeque::new());
        Session { version, reader, waiting, negotiated: false, oob: false }
    }

    /// The first message.
    pub fn greeting(&self) -> Vec<u8> {
        encode(&json!({ "QMP": { "version": self.version, "capabilities": ["oob"] } }))
    }

    /// Whether capabilities are negotiated: only then events are sent.
    pub fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    /// Takes what the client has sent. To be called when [`Session::take`] has nothing more.
    pub fn push(&mut self, bytes: &[u8]) {
        self.waiting.extend(self.reader.push(bytes));
    }

    /// What came next.
    pub fn take(&mut self) -> Option<Incoming> {
        let mut id = None;
        let outcome = match self.waiting.pop_front()? {
            Ok(Value::Object(mut object)) => {
                id = object.shift_remove("id");
                self.command(object)
            }
            Ok(_) => Err(QmpError::generic("QMP input must be a JSON object")),
            Err(error) => Err(error),
        };
        Some(match outcome {
            Ok(Some((name, arguments))) => Incoming::Request(Request { id, name, arguments }),
            Ok(None) => Incoming::Answer(encode(&answer(Ok(json!({})), id))),
            Err(error) => Incoming::Answer(encode(&answer(Err(error), id))),
        })
    }

    /// The command of a message without its id; `None` if it was executed here.
    fn command(&mut self, object: Map<String, Value>) -> Result<Option<(String, Members)>, QmpError> {
        let (mut execute, mut out_of_band, mut arguments) = (None, false, Map::new());
        for (key, value) in object {
            match (key.as_str(), value) {
                ("execute", value) => take_name(&mut execute, "execute", "exec-oob", value)?,
                ("exec-oob", value) if self.oob => {
                    take_name(&mut execute, "exec-oob", "execute", value)?;
                    out_of_band = true;
                }
                ("arguments", Value::Object(object)) => arguments = object,
                ("arguments", _) => {
                    return Err(QmpError::generic("QMP input member 'arguments' must be an object"));
                }
                _ => return Err(QmpError::generic(format!("QMP input member '{key}' is unexpected"))),
            }
        }
        let name = execute.ok_or_else(|| QmpError::generic("QMP input lacks member 'execute'"))?;
        let arguments = Members::of_json(arguments);
        let refused = |why: String| Err(QmpError::new(ErrorClass::CommandNotFound, why));
        match (command::find(&name), self.negotiated) {
            (Known::Negotiation, false) => {
                self.negotiate(arguments)?;
                return Ok(None);
            }
            (_, false) => {
                return refused("Expecting capabilities negotiation with 'qmp_capabilities'".into());
            }
            (Known::Negotiation, true) => {
                return refused("Capabilities negotiation is already complete, command ignored".into());
            }
            (Known::No, true) => return refused(format!("The command {name} has not been found")),
            (Known::Built, true) => {}
        }
        if out_of_band {
            return Err(QmpError::generic(format!("The command {name} does not support OOB")));
        }
        Ok(Some((name, arguments)))
    }

    fn negotiate(&mut self, arguments: Members) -> Result<(), QmpError> {
        (self.oob, self.negotiated) = (read_capabilities(arguments)?.contains(&Capability::Oob), true);
        Ok(())
    }
}

/// What a client may ask for before anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capability {
    /// Commands may be sent ahead of others.
    Oob,
}

impl Words for Capability {
    const WORDS: &'static [(&'static str, Capability)] = &[("oob", Capability::Oob)];
}

/// Reads the arguments of `qmp_capabilities`.
pub(crate) fn read_capabilities(mut arguments: Members) -> Result<Vec<Capability>, QmpError> {
    let enable = arguments.opt_words("enable")?.unwrap_or_default();
    arguments.finish()?;
    Ok(enable)
}

fn take_name(name: &mut Option<String>, key: &str, other: &str, value: Value) -> Result<(), QmpError> {
    let Value::String(text) = value else {
        return Err(QmpError::generic(format!("QMP input member '{key}' must be a string")));
    };
    if name.replace(text).is_some() {
        return Err(QmpError::generic(format!("QMP input member '{key}' clashes with '{other}'")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(session: &mut Session, text: &str) -> Vec<Value> {
        session.push(text.as_bytes());
        std::iter::from_fn(|| session.take())
            .map(|incoming| match incoming {
                Incoming::Answer(line) => serde_json::from_slice(&line).unwrap(),
                Incoming::Request(request) => json!({ "run": request.name, "id": request.id }),
            })
            .collect()
    }

    fn error(class: &str, desc: &str) -> Value {
        json!({ "error": { "class": class, "desc": desc } })
    }

    #[test]
    fn nothing_is_executed_before_negotiation_and_nothing_negotiated_twice() {
        let mut session = Session::new(json!("v"));
        assert_eq!(
            serde_json::from_slice::<Value>(&session.greeting()).unwrap(),
            json!({"QMP": {"version": "v", "capabilities": ["oob"]}})
        );
        let first = error("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'");
        assert_eq!(told(&mut session, "{'execute':'query-jobs'}{'execute':'nope'}"), [first.clone(), first]);
        let wrong = ["[1]", "['x']", "1"].map(|enable| {
            told(&mut session, &format!("{{'execute':'qmp_capabilities','arguments':{{'enable':{enable}}}}}"))
        });
        assert!(wrong.iter().all(|answers| answers[0].get("error").is_some()), "{wrong:?}");
        assert!(!session.is_negotiated());
        assert_eq!(
            told(&mut session, "{'execute':'qmp_capabilities','id':7}"),
            [json!({"return": {}, "id": 7})]
        );
        assert!(session.is_negotiated());
        let again = error("CommandNotFound", "Capabilities negotiation is already complete, command ignored");
        assert_eq!(told(&mut session, "{'execute':'qmp_capabilities'}"), [again]);
    }

    /// Each row as qemu-storage-daemon 10.0.2 answers it.
    #[test]
    fn a_message_that_is_no_command_is_refused_with_the_words_that_clients_know() {
        let mut session = Session::new(json!("v"));
        told(&mut session, "{'execute':'qmp_capabilities','arguments':{'enable':['oob']}}");
        for (text, class, desc) in [
            ("[]", "GenericError", "QMP input must be a JSON object"),
            ("{'execute':1}", "GenericError", "QMP input member 'execute' must be a string"),
            ("{'foo':1}", "GenericError", "QMP input member 'foo' is unexpected"),
            ("{}", "GenericError", "QMP input lacks member 'execute'"),
            (
                "{'execute':'quit','arguments':1}",
                "GenericError",
                "QMP input member 'arguments' must be an object",
            ),
            ("{'execute':'nope'}", "CommandNotFound", "The command nope has not been found"),
            ("{'exec-oob':'nope'}", "CommandNotFound", "The command nope has not been found"),
            ("{'exec-oob':'query-jobs'}", "GenericError", "The command query-jobs does not support OOB"),
        ] {
            assert_eq!(told(&mut session, text), [error(class, desc)], "{text}");
        }
        let both = told(&mut session, "{'execute':'quit','exec-oob':'quit'}");
        assert!(both[0]["error"]["desc"].as_str().unwrap().contains("clashes with"));
        let id = json!([1, {"a": null}]);
        assert_eq!(told(&mut session, "{'id':[1,{'a':null}]}")[0]["id"], id);
        assert_eq!(
            told(&mut session, "{'execute':'query-jobs','id':[1,{'a':null}]}")[0],
            json!({"run": "query-jobs", "id": id})
        );
    }

    #[test]
    fn out_of_band_is_refused_where_it_was_not_asked_for() {
        let mut session = Session::new(json!("v"));
        told(&mut session, "{'execute':'qmp_capabilities'}");
        let refused = error("GenericError", "QMP input member 'exec-oob' is unexpected");
        assert_eq!(told(&mut session, "{'exec-oob':'query-jobs'}"), [refused]);
    }
}
