//! Commands that only ask: about what nodes have done, how they lie, character devices, and objects.

use serde_json::Value;

use crate::error::QmpError;
use crate::members::Members;

/// One of these commands. (`qom-set` does not ask; it stands with those that do.)
#[derive(Clone, Debug, PartialEq)]
pub enum Inspect {
    /// `query-blockstats`.
    BlockStats {
        /// Of nodes rather than of devices.
        nodes: bool,
    },
    /// `x-debug-query-block-graph`.
    BlockGraph,
    /// `query-chardev`.
    Chardevs,
    /// `query-chardev-backends`.
    ChardevBackends,
    /// `qom-list`.
    QomList {
        /// The object.
        path: String,
    },
    /// `qom-get`.
    QomGet {
        /// The object.
        path: String,
        /// Its property.
        property: String,
    },
    /// `qom-set`.
    QomSet {
        /// The object.
        path: String,
        /// Its property.
        property: String,
        /// What it is to be.
        value: Value,
    },
    /// `qom-list-types`.
    QomTypes {
        /// Those that implement this.
        implements: Option<String>,
        /// Abstract ones too.
        r#abstract: bool,
    },
    /// `qom-list-properties`.
    QomProperties {
        /// The type.
        typename: String,
    },
}

impl Inspect {
    /// Reads the arguments of the command called `name`; `None` if it is none of these.
    pub(crate) fn read(name: &str, arguments: &mut Members) -> Result<Option<Inspect>, QmpError> {
        Ok(Some(match name {
            "query-blockstats" => {
                Inspect::BlockStats { nodes: arguments.opt_bool("query-nodes")?.unwrap_or(false) }
            }
            "x-debug-query-block-graph" => Inspect::BlockGraph,
            "query-chardev" => Inspect::Chardevs,
            "query-chardev-backends" => Inspect::ChardevBackends,
            "qom-list" => Inspect::QomList { path: arguments.str("path")? },
            "qom-get" => {
                Inspect::QomGet { path: arguments.str("path")?, property: arguments.str("property")? }
            }
            "qom-set" => Inspect::QomSet {
                path: arguments.str("path")?,
                property: arguments.str("property")?,
                value: arguments.any("value")?,
            },
            "qom-list-types" => Inspect::QomTypes {
                implements: arguments.opt_str("implements")?,
                r#abstract: arguments.opt_bool("abstract")?.unwrap_or(false),
            },
            "qom-list-properties" => Inspect::QomProperties { typename: arguments.str("typename")? },
            _ => return Ok(None),
        }))
    }
}
