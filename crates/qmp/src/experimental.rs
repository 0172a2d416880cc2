//! `x-blockdev-amend`, `x-blockdev-change`, `x-blockdev-set-iothread`.

use serde_json::Value;

use crate::blockdev::is_driver;
use crate::error::QmpError;
use crate::members::{Members, Words};

/// One of these commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Experimental {
    /// `x-blockdev-amend`.
    Amend {
        /// The job's id.
        job_id: String,
        /// The node.
        node_name: String,
        /// The driver that the options are of.
        driver: String,
    },
    /// `x-blockdev-change`.
    Change {
        /// The node above.
        parent: String,
        /// The child that is to go.
        child: Option<String>,
        /// The node that is to become a child.
        node: Option<String>,
    },
    /// `x-blockdev-set-iothread`.
    SetIothread {
        /// The node.
        node_name: String,
        /// The thread's id; `null` is the main one.
        iothread: Value,
        /// Whatever uses the node.
        force: bool,
    },
}

#[derive(Clone, Copy, Debug)]
enum Amendable {
    Qcow2,
    /// Of nothing else can anything be amended.
    Other,
}

impl Words for Amendable {
    const WORDS: &'static [(&'static str, Amendable)] = &[("qcow2", Amendable::Qcow2)];

    fn of(word: &str) -> Option<&'static Amendable> {
        match word {
            "qcow2" => Some(&Amendable::Qcow2),
            word => is_driver(word).then_some(&Amendable::Other),
        }
    }
}

impl Experimental {
    /// Reads the arguments of the command called `name`; `None` if it is none of these.
    pub(crate) fn read(name: &str, arguments: &mut Members) -> Result<Option<Experimental>, QmpError> {
        Ok(Some(match name {
            "x-blockdev-amend" => {
                let job_id = arguments.str("job-id")?;
                let node_name = arguments.str("node-name")?;
                let mut options = arguments.object("options")?;
                // Nothing that is amended here could lose data.
                arguments.opt_bool("force")?;
                let (given, _) = options.clone().into_parts();
                let driver = given.get("driver").and_then(Value::as_str).unwrap_or_default().to_owned();
                match options.word("driver")? {
                    Amendable::Qcow2 => {
                        options.refuse("encrypt", "images are not encrypted here")?;
                        options.finish()?;
                    }
                    Amendable::Other => {}
                }
                Experimental::Amend { job_id, node_name, driver }
            }
            "x-blockdev-change" => Experimental::Change {
                parent: arguments.str("parent")?,
                child: arguments.opt_str("child")?,
                node: arguments.opt_str("node")?,
            },
            "x-blockdev-set-iothread" => {
                let node_name = arguments.str("node-name")?;
                let iothread = arguments.any("iothread")?;
                let force = arguments.opt_bool("force")?.unwrap_or(false);
                Experimental::SetIothread { node_name, iothread, force }
            }
            _ => return Ok(None),
        }))
    }
}
