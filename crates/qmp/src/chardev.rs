//! Character devices at run time: `chardev-*`, `ringbuf-*`.

use crate::address::SocketAddress;
use crate::base64;
use crate::error::QmpError;
use crate::members::{Members, Words};

/// A device as it is to be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChardevBackend {
    /// A socket.
    Socket {
        /// Where.
        address: SocketAddress,
        /// Whether it is listened at, rather than connected to.
        server: bool,
    },
    /// Memory, of which the last bytes are kept.
    Ringbuf {
        /// How many bytes are kept.
        size: Option<i64>,
        /// Whether it was asked for by its old name.
        memory: bool,
    },
    /// Nothing.
    Null,
    /// A file.
    File {
        /// What is written goes there.
        out: String,
        /// Behind what is there, rather than in its place.
        append: bool,
    },
    /// It is known, and not opened here, for that reason.
    Refused(String),
}

/// How data are spelled in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DataFormat {
    /// As text.
    #[default]
    Utf8,
    /// In base64.
    Base64,
}

impl Words for DataFormat {
    const WORDS: &'static [(&'static str, DataFormat)] =
        &[("utf8", DataFormat::Utf8), ("base64", DataFormat::Base64)];
}

impl DataFormat {
    /// The bytes of `data`.
    pub fn decode(self, data: String) -> Result<Vec<u8>, QmpError> {
        match self {
            DataFormat::Utf8 => Ok(data.into_bytes()),
            DataFormat::Base64 => base64::decode(&data)
                .ok_or_else(|| QmpError::generic("Base64 data contains invalid characters")),
        }
    }

    /// Bytes as a string. What is no text shows as U+FFFD where text was asked for.
    pub fn encode(self, bytes: &[u8]) -> String {
        match self {
            DataFormat::Utf8 => String::from_utf8_lossy(bytes).into_owned(),
            DataFormat::Base64 => base64::encode(bytes),
        }
    }
}

/// One of these commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChardevCommand {
    /// `chardev-add`.
    Add {
        /// What it is to be called.
        id: String,
        /// What it is.
        backend: ChardevBackend,
    },
    /// `chardev-change`.
    Change {
        /// The device.
        id: String,
        /// What it is from now on.
        backend: ChardevBackend,
    },
    /// `chardev-remove`.
    Remove {
        /// The device.
        id: String,
    },
    /// `chardev-send-break`.
    SendBreak {
        /// The device.
        id: String,
    },
    /// `ringbuf-write`.
    RingbufWrite {
        /// The device.
        device: String,
        /// What is written.
        data: String,
        /// How that is spelled.
        format: DataFormat,
    },
    /// `ringbuf-read`.
    RingbufRead {
        /// The device.
        device: String,
        /// Most bytes to be read.
        size: i64,
        /// How they are to be spelled.
        format: DataFormat,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Socket,
    Ringbuf,
    Memory,
    Null,
    File,
    Stdio,
    Unbuilt(&'static str),
    /// Not in a storage daemon.
    Nowhere(&'static str),
}

macro_rules! kinds {
    ($kind:ident: $($name:literal),*) => { &[$(($name, Kind::$kind($name))),*] };
}

const STDIO: &[(&str, Kind)] = &[("stdio", Kind::Stdio)];
const UNBUILT: &[(&str, Kind)] = kinds![Unbuilt: "hub", "mux", "parallel", "pipe", "pty", "serial", "udp"];
const NOWHERE: &[(&str, Kind)] = kinds![Nowhere: "console", "msmouse", "testdev", "vc", "wctablet"];

impl Words for Kind {
    const WORDS: &'static [(&'static str, Kind)] = &[
        ("socket", Kind::Socket),
        ("ringbuf", Kind::Ringbuf),
        ("memory", Kind::Memory),
        ("null", Kind::Null),
        ("file", Kind::File),
    ];

    fn of(word: &str) -> Option<&'static Kind> {
        let known = Self::WORDS.iter().chain(STDIO).chain(UNBUILT).chain(NOWHERE);
        known.into_iter().find(|(name, _)| *name == word).map(|(_, kind)| kind)
    }
}

impl ChardevBackend {
    fn take(arguments: &mut Members) -> Result<ChardevBackend, QmpError> {
        let mut backend = arguments.object("backend")?;
        let kind = backend.word("type")?;
        let mut data = backend.object("data")?;
        backend.finish()?;
        let read = match kind {
            Kind::Stdio => {
                return Ok(ChardevBackend::Refused(
                    "standard input and output are opened by the command line alone: --chardev stdio".into(),
                ));
            }
            Kind::Unbuilt(name) => {
                return Ok(ChardevBackend::Refused(format!(
                    "'{name}' is not supported: use socket, ringbuf, file or null"
                )));
            }
            Kind::Nowhere(name) => {
                return Ok(ChardevBackend::Refused(format!("'{name}' is not a valid char driver name")));
            }
            Kind::Socket => Self::take_socket(&mut data)?,
            Kind::Ringbuf => ChardevBackend::Ringbuf { size: data.opt_int("size")?, memory: false },
            Kind::Memory => ChardevBackend::Ringbuf { size: data.opt_int("size")?, memory: true },
            Kind::Null => ChardevBackend::Null,
            Kind::File => {
                data.refuse("in", "nothing here reads from character devices")?;
                ChardevBackend::File {
                    out: data.str("out")?,
                    append: data.opt_bool("append")?.unwrap_or(false),
                }
            }
        };
        for name in ["logfile", "logappend"] {
            data.refuse(name, "leave it out")?;
        }
        data.finish()?;
        Ok(read)
    }

    fn take_socket(data: &mut Members) -> Result<ChardevBackend, QmpError> {
        let address = SocketAddress::read_legacy(data.object("addr")?)?;
        let server = data.opt_bool("server")?.unwrap_or(true);
        let wait = data.opt_bool("wait")?;
        // Nothing is delayed anyway.
        data.opt_bool("nodelay")?;
        for name in ["tls-creds", "tls-authz", "telnet", "tn3270", "websocket", "reconnect", "reconnect-ms"] {
            data.refuse(name, "leave it out")?;
        }
        Ok(match (server, wait) {
            (false, Some(_)) => ChardevBackend::Refused(
                "'wait' option is incompatible with socket in client connect mode".into(),
            ),
            (true, Some(true)) => ChardevBackend::Refused(
                "'wait' would keep this monitor from being answered: leave it out".into(),
            ),
            _ => ChardevBackend::Socket { address, server },
        })
    }
}

impl ChardevCommand {
    /// Reads the arguments of the command called `name`; `None` if it is none of these.
    pub(crate) fn read(name: &str, arguments: &mut Members) -> Result<Option<ChardevCommand>, QmpError> {
        Ok(Some(match name {
            "chardev-add" => {
                ChardevCommand::Add { id: arguments.str("id")?, backend: ChardevBackend::take(arguments)? }
            }
            "chardev-change" => {
                ChardevCommand::Change { id: arguments.str("id")?, backend: ChardevBackend::take(arguments)? }
            }
            "chardev-remove" => ChardevCommand::Remove { id: arguments.str("id")? },
            "chardev-send-break" => ChardevCommand::SendBreak { id: arguments.str("id")? },
            "ringbuf-write" => ChardevCommand::RingbufWrite {
                device: arguments.str("device")?,
                data: arguments.str("data")?,
                format: arguments.opt_word("format")?.unwrap_or_default(),
            },
            "ringbuf-read" => ChardevCommand::RingbufRead {
                device: arguments.str("device")?,
                size: arguments.int("size")?,
                format: arguments.opt_word("format")?.unwrap_or_default(),
            },
            _ => return Ok(None),
        }))
    }
}
