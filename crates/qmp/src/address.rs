//! Socket addresses, in the two spellings of the protocol (flat, and with a `data` object inside).

use crate::error::QmpError;
use crate::members::{Members, Words};

/// Where to listen, or to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketAddress {
    /// TCP.
    Inet {
        /// Host name or number; empty listens everywhere.
        host: String,
        /// Port number.
        port: u16,
    },
    /// A Unix socket.
    Unix {
        /// The socket file.
        path: String,
    },
    /// A socket that this process was started with.
    Fd {
        /// Its number.
        number: i32,
    },
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Inet,
    Unix,
    Vsock,
    Fd,
}

impl Words for Kind {
    const WORDS: &'static [(&'static str, Kind)] =
        &[("inet", Kind::Inet), ("unix", Kind::Unix), ("fd", Kind::Fd)];

    fn of(word: &str) -> Option<&'static Kind> {
        let known = Self::WORDS.iter().chain(&[("vsock", Kind::Vsock)]);
        known.into_iter().find(|(name, _)| *name == word).map(|(_, kind)| kind)
    }
}

impl SocketAddress {
    /// Reads the flat spelling, all of `members`.
    pub fn read(mut members: Members) -> Result<SocketAddress, QmpError> {
        let kind = members.word("type")?;
        Self::read_kind(kind, members)
    }

    /// Reads the spelling with `type` and `data`, all of `members`.
    pub fn read_legacy(mut members: Members) -> Result<SocketAddress, QmpError> {
        let kind = members.word("type")?;
        let data = members.object("data")?;
        let address = Self::read_kind(kind, data)?;
        members.finish()?;
        Ok(address)
    }

    fn read_kind(kind: Kind, mut members: Members) -> Result<SocketAddress, QmpError> {
        match kind {
            Kind::Inet => Self::read_inet(members),
            Kind::Unix => {
                let path = members.str("path")?;
                members.opt_bool("tight")?;
                let nameless = members.opt_bool("abstract")? == Some(true);
                members.finish()?;
                if nameless {
                    return Err(QmpError::generic(
                        "abstract Unix sockets are not supported: give a path in the file system",
                    ));
                }
                Ok(SocketAddress::Unix { path })
            }
            Kind::Vsock => Err(QmpError::generic("vsock addresses are not supported: use inet or unix")),
            Kind::Fd => {
                let text = members.str("str")?;
                members.finish()?;
                let number = text.parse().ok().filter(|number| *number >= 0);
                let number = number.ok_or_else(|| {
                    QmpError::generic(format!("File descriptor '{text}' is not a number that can be open"))
                })?;
                Ok(SocketAddress::Fd { number })
            }
        }
    }

    fn read_inet(mut members: Members) -> Result<SocketAddress, QmpError> {
        let host = members.str("host")?;
        let port = members.str("port")?;
        for name in ["to", "mptcp", "ipv4", "ipv6"] {
            members.refuse(name, "leave it out")?;
        }
        // Hosts may be numbers in any case, and connections are always kept alive.
        members.opt_bool("numeric")?;
        members.opt_bool("keep-alive")?;
        members.finish()?;
        let number = port.parse().map_err(|_| {
            QmpError::generic(format!(
                "address resolution failed for {host}:{port}: a port is a number from 0 to 65535"
            ))
        })?;
        Ok(SocketAddress::Inet { host, port: number })
    }
}
