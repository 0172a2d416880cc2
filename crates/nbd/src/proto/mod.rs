//! The NBD protocol's messages as values, in both directions. Knows bytes only: no connection, no clock, no state.
//!
//! * A `decode` takes from the front of a buffer and gives `None` while the message is not whole. What is not a message
//!   of the protocol is a [`ProtocolError`]: after it the stream has no meaning, the connection must end. Every length
//!   that a peer states is bounded before anything is allocated for it; nothing that a peer sends can panic.
//! * An `encode` appends to a buffer. Payload of reads and writes never passes through one: it stays where it is, as
//!   [`bytes::Bytes`], and follows its header.
//!
//! Source: the NBD protocol specification, and its extension EXTENDED_HEADERS. TLS and oldstyle are not spoken.

mod errno;
mod handshake;
mod option;
mod reply;
mod request;
mod text;

#[cfg(test)]
mod tests;

use std::fmt;

use infill_base::{ErrorKind, IoError};

pub use errno::{errno_of, kind_of};
pub use handshake::{ClientFlags, Greeting, HandshakeFlags, TransmissionFlags};
pub use option::{
    ExportInfo, INFO_BLOCK_SIZE, INFO_DESCRIPTION, INFO_EXPORT, INFO_NAME, Info, OPTION_BYTES_MAX,
    OptionError, OptionHeader, OptionReply, OptionReplyHeader, OptionRequest,
};
pub use reply::{Chunk, ChunkKind, REPLY_BYTES_MAX, ReplyFlags, ReplyHeader, StatusExtent};
pub use request::{Command, CommandFlags, RequestHeader};
pub use text::STRING_BYTES_MAX;

/// Largest payload of one request or reply chunk that both our sides advertise and take, in bytes.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Name of the context that tells data from holes.
pub const CONTEXT_ALLOCATION: &str = "base:allocation";
/// Name of QEMU's context that tells which layer of a chain holds a run.
pub const CONTEXT_DEPTH: &str = "qemu:allocation-depth";
/// Of ours: the client may say of a read or a block status that nobody waits for it ([`CommandFlags::BACKGROUND`]).
pub const CONTEXT_BACKGROUND: &str = "infill:background";
/// What the names of QEMU's contexts that tell what a dirty bitmap says begin with.
pub const CONTEXT_BITMAP_PREFIX: &str = "qemu:dirty-bitmap:";
/// Flag of a bitmap's context: it is dirty.
pub const STATE_DIRTY: u64 = 1;
/// Flag of [`CONTEXT_ALLOCATION`]: nothing is allocated there.
pub const STATE_HOLE: u64 = 1;
/// Flag of [`CONTEXT_ALLOCATION`]: it reads as zeroes.
pub const STATE_ZERO: u64 = 2;

/// Which headers the transmission phase has, as it was negotiated. Ordered: a later one includes the ones before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Mode {
    /// Simple replies.
    #[default]
    Simple,
    /// Structured replies.
    Structured,
    /// Extended headers: 64-bit lengths, and every reply is a chunk.
    Extended,
}

/// The peer sent what is not a message of the protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// A message does not begin as it must.
    Magic {
        /// Which message.
        what: &'static str,
        /// How it begins.
        expected: u64,
        /// How this one began.
        found: u64,
    },
    /// A length above our limit.
    TooLong {
        /// Of what.
        what: &'static str,
        /// The limit in bytes.
        limit: u64,
        /// The length that the peer stated.
        found: u64,
    },
    /// A message whose parts contradict each other.
    Malformed {
        /// Which message, and what is wrong.
        what: &'static str,
    },
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProtocolError::Magic { what, expected, found } => {
                write!(f, "{what} must begin with {expected:#x}, found {found:#x}")
            }
            ProtocolError::TooLong { what, limit, found } => {
                write!(f, "{what} has {found} bytes, at most {limit} are taken")
            }
            ProtocolError::Malformed { what } => f.write_str(what),
        }
    }
}

impl std::error::Error for ProtocolError {}

impl From<ProtocolError> for IoError {
    fn from(error: ProtocolError) -> IoError {
        IoError::new(ErrorKind::Io, "the peer broke the NBD protocol").caused_by(error)
    }
}

/// Shorthand for a message whose parts contradict each other.
fn malformed(what: &'static str) -> ProtocolError {
    ProtocolError::Malformed { what }
}
