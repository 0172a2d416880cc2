//! Commands that change one thing of a node: its size, its write threshold, the name of its backing in its header.

use serde_json::Value;

use crate::error::QmpError;
use crate::members::Members;

/// What is to be changed of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Alter {
    /// `block_resize`.
    Resize {
        /// A device, of which there are none here.
        device: Option<String>,
        /// The node.
        node_name: Option<String>,
        /// Its new size, in bytes, as it came.
        size: i64,
    },
    /// `block-set-write-threshold`.
    WriteThreshold {
        /// The node.
        node_name: String,
        /// The byte behind which a write is told of; 0 is none.
        threshold: u64,
    },
    /// `change-backing-file`.
    BackingFile {
        /// The top of the chain.
        device: String,
        /// The overlay in it whose header is written.
        image: String,
        /// What the header is to name; empty is nothing.
        backing_file: String,
    },
}

impl Alter {
    /// Reads the arguments of the command called `name`; `None` if it is none of these.
    pub(crate) fn read(name: &str, arguments: &mut Members) -> Result<Option<Alter>, QmpError> {
        Ok(Some(match name {
            "block_resize" => Alter::Resize {
                device: arguments.opt_str("device")?,
                node_name: arguments.opt_str("node-name")?,
                size: arguments.int("size")?,
            },
            "block-set-write-threshold" => Alter::WriteThreshold {
                node_name: arguments.str("node-name")?,
                threshold: arguments.u64("write-threshold")?,
            },
            "change-backing-file" => Alter::BackingFile {
                device: arguments.str("device")?,
                image: arguments.str("image-node-name")?,
                backing_file: arguments.str("backing-file")?,
            },
            _ => return Ok(None),
        }))
    }
}

/// A number of 64 bits, as the protocol reads one: a negative number is its two's complement.
pub(crate) fn unsigned(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::command::Command;

    fn read(name: &str, arguments: &Value) -> Result<Command, String> {
        let members = Members::of_json(arguments.as_object().unwrap().clone());
        Command::read(name, members).map_err(|error| error.desc)
    }

    #[test]
    fn a_number_of_64_bits_is_read_to_its_last_bit_and_no_other_value_is_taken_for_one() {
        for (given, expected) in [
            (json!(0), Some(0)),
            (json!(u64::MAX), Some(u64::MAX)),
            (json!(-1), Some(u64::MAX)),
            (json!(i64::MIN), Some(1 << 63)),
            (json!(1.5), None),
            (json!("1"), None),
            (json!(true), None),
        ] {
            let read =
                read("block-set-write-threshold", &json!({"node-name": "n", "write-threshold": given}));
            match expected {
                Some(threshold) => {
                    let wanted = Alter::WriteThreshold { node_name: "n".into(), threshold };
                    assert_eq!(read, Ok(Command::Alter(wanted)));
                }
                None => assert_eq!(read, Err("Parameter 'write-threshold' expects uint64".into()), "{given}"),
            }
        }
    }
}
