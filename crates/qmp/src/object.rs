//! Objects that a manager may make (`object-add`, `--object`). Only `iothread` is built.

use crate::error::QmpError;
use crate::members::{Members, Words};
use crate::names;

/// An I/O thread. Reactors are started with the process and shared by all exports, so this is a name that exports may
/// give, and changes nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectOptions {
    /// Its id.
    pub id: String,
}

/// A type of object that QEMU knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind(&'static str);

macro_rules! kinds {
    ($($name:literal),* $(,)?) => { &[$(($name, Kind($name))),*] };
}

impl Words for Kind {
    const WORDS: &'static [(&'static str, Kind)] = kinds![
        "iothread",
        "authz-list",
        "authz-list-file",
        "authz-pam",
        "authz-simple",
        "main-loop",
        "secret",
        "secret_keyring",
        "throttle-group",
        "tls-creds-anon",
        "tls-creds-psk",
        "tls-creds-x509",
        "tls-cipher-suites",
    ];
}

impl ObjectOptions {
    /// Reads all of `members`.
    pub fn read(mut members: Members) -> Result<ObjectOptions, QmpError> {
        let kind: Kind = members.word("qom-type")?;
        let id = members.str("id")?;
        if kind.0 != "iothread" {
            return Err(QmpError::generic(format!(
                "objects of type '{}' are not supported yet: only iothread is",
                kind.0
            )));
        }
        // They tune polling and pools that reactors do not have.
        for number in
            ["poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch", "thread-pool-min", "thread-pool-max"]
        {
            members.opt_unsigned(number)?;
        }
        members.finish()?;
        if !names::is_id(&id) {
            return Err(QmpError::generic("Parameter 'id' expects an identifier"));
        }
        Ok(ObjectOptions { id })
    }
}
