//! The first bytes of a connection, and the flags of handshake and transmission.

use bitflags::bitflags;
use bytes::{Buf, BufMut, BytesMut};

use super::{ProtocolError, malformed};

/// `NBDMAGIC`: how every server begins.
const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: how a newstyle server goes on, and how every option begins.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// How an oldstyle server goes on.
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;

bitflags! {
    /// What a server offers for the handshake.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct HandshakeFlags: u16 {
        /// It speaks the fixed newstyle handshake.
        const FIXED_NEWSTYLE = 1;
        /// It can leave out 124 zero bytes.
        const NO_ZEROES = 2;
    }

    /// What a client takes of it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct ClientFlags: u32 {
        /// It speaks the fixed newstyle handshake.
        const FIXED_NEWSTYLE = 1;
        /// The 124 zero bytes are left out.
        const NO_ZEROES = 2;
    }

    /// What an export can do.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct TransmissionFlags: u16 {
        /// Always set.
        const HAS_FLAGS = 1;
        /// Writes are refused.
        const READ_ONLY = 1 << 1;
        /// FLUSH.
        const SEND_FLUSH = 1 << 2;
        /// The flag FUA.
        const SEND_FUA = 1 << 3;
        /// A disk that turns.
        const ROTATIONAL = 1 << 4;
        /// TRIM.
        const SEND_TRIM = 1 << 5;
        /// WRITE_ZEROES, with the flag NO_HOLE.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// The flag DF.
        const SEND_DF = 1 << 7;
        /// A flush on one connection covers what was answered on all.
        const CAN_MULTI_CONN = 1 << 8;
        /// RESIZE (nobody has it).
        const SEND_RESIZE = 1 << 9;
        /// CACHE.
        const SEND_CACHE = 1 << 10;
        /// The flag FAST_ZERO.
        const SEND_FAST_ZERO = 1 << 11;
        /// BLOCK_STATUS takes a payload that chooses contexts.
        const BLOCK_STATUS_PAYLOAD = 1 << 12;
    }
}

/// How a server begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// What it offers; flags that we do not know are kept.
    pub flags: HandshakeFlags,
}

impl Greeting {
    const LEN: usize = 18;

    /// Appends it.
    pub fn encode(&self, out: &mut BytesMut) {
        out.put_u64(INIT_MAGIC);
        out.put_u64(OPTION_MAGIC);
        out.put_u16(self.flags.bits());
    }

    /// Takes it from the front of `buf`. An oldstyle server is told apart, as an error.
    pub fn decode(buf: &mut BytesMut) -> Result<Option<Greeting>, ProtocolError> {
        let mut seen = &buf[..];
        let Ok(init) = seen.try_get_u64() else { return Ok(None) };
        if init != INIT_MAGIC {
            return Err(ProtocolError::Magic { what: "a server", expected: INIT_MAGIC, found: init });
        }
        let Ok(style) = seen.try_get_u64() else { return Ok(None) };
        if style == OLDSTYLE_MAGIC {
            return Err(malformed("the server speaks the oldstyle handshake, which is not supported"));
        }
        if style != OPTION_MAGIC {
            return Err(ProtocolError::Magic { what: "a handshake", expected: OPTION_MAGIC, found: style });
        }
        let Ok(flags) = seen.try_get_u16() else { return Ok(None) };
        buf.advance(Self::LEN);
        Ok(Some(Greeting { flags: HandshakeFlags::from_bits_retain(flags) }))
    }
}

impl ClientFlags {
    /// Appends them.
    pub fn encode(&self, out: &mut BytesMut) {
        out.put_u32(self.bits());
    }

    /// Takes them from the front of `buf`. A flag that we did not offer is an error, as the protocol demands.
    pub fn decode(buf: &mut BytesMut) -> Result<Option<ClientFlags>, ProtocolError> {
        let Ok(bits) = buf.try_get_u32() else { return Ok(None) };
        ClientFlags::from_bits(bits)
            .map(Some)
            .ok_or(malformed("the client sets a handshake flag that was not offered"))
    }
}
