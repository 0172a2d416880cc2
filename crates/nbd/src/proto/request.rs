//! Requests of the transmission phase.

use bitflags::bitflags;
use bytes::{Buf, BufMut, BytesMut};

use super::{Mode, ProtocolError};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;

bitflags! {
    /// How a command is to be done. Unknown bits are kept, so that they can be refused.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct CommandFlags: u16 {
        /// Stable before the reply.
        const FUA = 1;
        /// WRITE_ZEROES: the space stays reserved.
        const NO_HOLE = 1 << 1;
        /// READ: one content chunk.
        const DF = 1 << 2;
        /// BLOCK_STATUS: one extent.
        const REQ_ONE = 1 << 3;
        /// WRITE_ZEROES: fail rather than write.
        const FAST_ZERO = 1 << 4;
        /// Extended headers: the length is that of a payload which follows.
        const PAYLOAD_LEN = 1 << 5;
        /// READ and BLOCK_STATUS, where `infill:background` was chosen: nobody waits for it, so whatever somebody waits for
        /// goes first.
        const BACKGROUND = 1 << 15;
        const _ = !0;
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Read.
    Read,
    /// Write the payload.
    Write,
    /// End the session; no reply.
    Disconnect,
    /// Everything that was answered is to be stable.
    Flush,
    /// The range is not needed any more.
    Trim,
    /// The range will be read.
    Cache,
    /// Write zeroes.
    WriteZeroes,
    /// Tell about the range.
    BlockStatus,
    /// One that we do not know.
    Unknown(u16),
}

impl Command {
    fn from_number(number: u16) -> Command {
        match number {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            5 => Command::Cache,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            unknown => Command::Unknown(unknown),
        }
    }

    fn number(self) -> u16 {
        match self {
            Command::Read => 0,
            Command::Write => 1,
            Command::Disconnect => 2,
            Command::Flush => 3,
            Command::Trim => 4,
            Command::Cache => 5,
            Command::WriteZeroes => 6,
            Command::BlockStatus => 7,
            Command::Unknown(number) => number,
        }
    }
}

/// Begins a request; the payload of a write follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// How.
    pub flags: CommandFlags,
    /// What.
    pub command: Command,
    /// By which the reply names it.
    pub cookie: u64,
    /// First byte of the range.
    pub offset: u64,
    /// Length of the range, or of the payload. 64 bits wide only in [`Mode::Extended`].
    pub len: u64,
}

impl RequestHeader {
    /// Its length in bytes.
    pub const fn wire_len(mode: Mode) -> usize {
        match mode {
            Mode::Extended => 32,
            _ => 28,
        }
    }

    /// Takes it from the front of `buf`.
    pub fn decode(mode: Mode, buf: &mut BytesMut) -> Result<Option<RequestHeader>, ProtocolError> {
        let mut seen = &buf[..];
        let Ok(magic) = seen.try_get_u32() else { return Ok(None) };
        let expected = if mode == Mode::Extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        if magic != expected {
            let (expected, found) = (expected.into(), magic.into());
            return Err(ProtocolError::Magic { what: "a request", expected, found });
        }
        if buf.len() < Self::wire_len(mode) {
            return Ok(None);
        }
        let header = RequestHeader {
            flags: CommandFlags::from_bits_retain(seen.get_u16()),
            command: Command::from_number(seen.get_u16()),
            cookie: seen.get_u64(),
            offset: seen.get_u64(),
            len: if mode == Mode::Extended { seen.get_u64() } else { seen.get_u32().into() },
        };
        buf.advance(Self::wire_len(mode));
        Ok(Some(header))
    }

    /// Bytes of payload that follow it. Not bounded: a peer may state any number.
    pub fn payload_len(&self, mode: Mode) -> u64 {
        let stated = mode == Mode::Extended && self.flags.contains(CommandFlags::PAYLOAD_LEN);
        if stated || self.command == Command::Write { self.len } else { 0 }
    }

    /// Appends it. A length above 32 bits needs [`Mode::Extended`].
    pub fn encode(&self, mode: Mode, out: &mut BytesMut) {
        out.put_u32(if mode == Mode::Extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC });
        out.put_u16(self.flags.bits());
        out.put_u16(self.command.number());
        out.put_u64(self.cookie);
        out.put_u64(self.offset);
        if mode == Mode::Extended {
            out.put_u64(self.len);
        } else {
            debug_assert!(u32::try_from(self.len).is_ok(), "the length needs extended headers");
            out.put_u32(self.len as u32);
        }
    }
}
