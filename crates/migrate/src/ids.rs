//! Names and numbers of a migration, each a type of its own.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The largest epoch before a migration: a term that is added to it then never overflows.
pub const EPOCH_MAX: u64 = 1 << 62;
/// The largest term of a record.
pub const TERM_MAX: u64 = 1 << 56;
/// How far an operator's word (`takeover`, `reclaim`) raises the term: beyond anything that the peer, who was not
/// asked, can have reached by handing over in the ordinary way.
pub const FORCED_TERMS: u64 = 1 << 32;
/// The largest term from which a side still goes on, and that a message may carry: a step and an operator's word then
/// stay below [`TERM_MAX`].
pub const TERM_SPOKEN_MAX: u64 = TERM_MAX - 4 * FORCED_TERMS;
/// Rounds of warming; more do not help where these did not.
pub const ROUNDS_MAX: u8 = 250;

macro_rules! uuid_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(pub Uuid);

        impl TryFrom<String> for $name {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.to_string()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = String;

            /// Only the one spelling that [`fmt::Display`] gives: a name is compared as text by other tools too.
            fn from_str(text: &str) -> Result<Self, String> {
                let uuid = Uuid::try_parse(text).ok().filter(|uuid| uuid.hyphenated().to_string() == text);
                uuid.map($name).ok_or_else(|| format!("expected a UUID in lower case with hyphens, found {text:?}"))
            }
        }
    };
}

uuid_newtype! {
    /// A migration: the key under which each of its calls may be repeated.
    MigrationId
}
uuid_newtype! {
    /// A disk, for life and whoever owns it.
    DiskId
}

/// How often a disk has changed hands, or was about to: a writer holds exactly one. Durable on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Epoch(pub u64);

/// How often the disks of one migration have changed hands, or were about to, since it began. All of them do it
/// together, so one number serves them all: a disk's epoch is the one that it had before, plus the term.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Term(pub u64);

impl Term {
    /// Before anything was offered.
    pub const FIRST: Term = Term(0);

    /// The next one.
    pub fn next(self) -> Term {
        Term(self.0 + 1)
    }

    /// The one that an operator's word begins.
    pub fn forced(self) -> Term {
        Term(self.0 + FORCED_TERMS)
    }
}

/// The life of the dirty bitmaps at the source: a later one, and what was copied under an earlier one may be stale. It is
/// the number of the source's record that named it, so that a target tells later from earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BitmapId(pub u64);

/// A round of warming, from 1, within one [`BitmapId`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Round(pub u8);

/// An end of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// Where the disks come from.
    Source,
    /// Where they go.
    Target,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_in_another_spelling_is_refused() {
        let text = "6f1c2f0e-4d8a-4a63-9d0b-5a4f0f7f7c11";
        assert_eq!(text.parse::<DiskId>().unwrap().to_string(), text);
        for wrong in
            ["", "6F1C2F0E-4D8A-4A63-9D0B-5A4F0F7F7C11", "6f1c2f0e4d8a4a639d0b5a4f0f7f7c11", "{6f1c}"]
        {
            assert!(wrong.parse::<DiskId>().is_err(), "{wrong}");
        }
    }
}
