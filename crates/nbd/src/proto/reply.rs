//! Replies of the transmission phase: the simple one, and chunks of structured ones.

use bitflags::bitflags;
use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::text::{Fields, cut, lossy};
use super::{Mode, PAYLOAD_BYTES_MAX, ProtocolError, malformed};

const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// Most payload of one chunk that a client takes, in bytes: the largest data, with its offset.
pub const REPLY_BYTES_MAX: u64 = PAYLOAD_BYTES_MAX as u64 + 8;

const TYPE_NONE: u16 = 0;
const TYPE_DATA: u16 = 1;
const TYPE_HOLE: u16 = 2;
const TYPE_STATUS: u16 = 5;
const TYPE_STATUS_EXTENDED: u16 = 6;
const TYPE_ERROR: u16 = 1 << 15 | 1;
const TYPE_ERROR_OFFSET: u16 = 1 << 15 | 2;
const TYPE_IS_ERROR: u16 = 1 << 15;

bitflags! {
    /// Flags of a chunk. Unknown bits are ignored.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct ReplyFlags: u16 {
        /// The last chunk of its reply.
        const DONE = 1;
    }
}

/// What a chunk's payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkKind {
    /// Nothing: the end of a reply.
    None,
    /// An offset and data.
    Data,
    /// An offset and how many zero bytes are there.
    Hole,
    /// Extents with 32-bit lengths.
    Status,
    /// Extents with 64-bit lengths.
    StatusExtended,
    /// An error of the whole request.
    Error,
    /// An error at one place.
    ErrorOffset,
    /// One that we do not know; an error if the highest bit is set.
    Unknown(u16),
}

impl ChunkKind {
    fn from_number(number: u16) -> ChunkKind {
        match number {
            TYPE_NONE => ChunkKind::None,
            TYPE_DATA => ChunkKind::Data,
            TYPE_HOLE => ChunkKind::Hole,
            TYPE_STATUS => ChunkKind::Status,
            TYPE_STATUS_EXTENDED => ChunkKind::StatusExtended,
            TYPE_ERROR => ChunkKind::Error,
            TYPE_ERROR_OFFSET => ChunkKind::ErrorOffset,
            unknown => ChunkKind::Unknown(unknown),
        }
    }

    fn number(self) -> u16 {
        match self {
            ChunkKind::None => TYPE_NONE,
            ChunkKind::Data => TYPE_DATA,
            ChunkKind::Hole => TYPE_HOLE,
            ChunkKind::Status => TYPE_STATUS,
            ChunkKind::StatusExtended => TYPE_STATUS_EXTENDED,
            ChunkKind::Error => TYPE_ERROR,
            ChunkKind::ErrorOffset => TYPE_ERROR_OFFSET,
            ChunkKind::Unknown(number) => number,
        }
    }
}

/// Begins a reply message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// The whole reply; after a read without error its data follows.
    Simple {
        /// 0, or an error number of the protocol.
        error: u32,
        /// Which request.
        cookie: u64,
    },
    /// A chunk; its payload follows.
    Chunk {
        /// Whether it is the last.
        flags: ReplyFlags,
        /// What the payload is.
        kind: ChunkKind,
        /// Which request.
        cookie: u64,
        /// The request's offset again ([`Mode::Extended`] only, else 0).
        offset: u64,
        /// Length of the payload in bytes, at most [`REPLY_BYTES_MAX`].
        len: u64,
    },
}

impl ReplyHeader {
    /// Takes it from the front of `buf`.
    pub fn decode(mode: Mode, buf: &mut BytesMut) -> Result<Option<ReplyHeader>, ProtocolError> {
        let mut seen = &buf[..];
        let Ok(magic) = seen.try_get_u32() else { return Ok(None) };
        let (len, header) = match (magic, mode) {
            (SIMPLE_REPLY_MAGIC, Mode::Simple | Mode::Structured) => {
                let (Ok(error), Ok(cookie)) = (seen.try_get_u32(), seen.try_get_u64()) else {
                    return Ok(None);
                };
                (16, ReplyHeader::Simple { error, cookie })
            }
            (CHUNK_MAGIC, Mode::Structured) if buf.len() >= 20 => (20, chunk_header(seen, false)),
            (EXTENDED_CHUNK_MAGIC, Mode::Extended) if buf.len() >= 32 => (32, chunk_header(seen, true)),
            (CHUNK_MAGIC, Mode::Structured) | (EXTENDED_CHUNK_MAGIC, Mode::Extended) => return Ok(None),
            _ => {
                let expected = match mode {
                    Mode::Simple => SIMPLE_REPLY_MAGIC,
                    Mode::Structured => CHUNK_MAGIC,
                    Mode::Extended => EXTENDED_CHUNK_MAGIC,
                };
                let (expected, found) = (expected.into(), magic.into());
                return Err(ProtocolError::Magic { what: "a reply", expected, found });
            }
        };
        if let ReplyHeader::Chunk { len: found, .. } = header
            && found > REPLY_BYTES_MAX
        {
            return Err(ProtocolError::TooLong { what: "a reply chunk", limit: REPLY_BYTES_MAX, found });
        }
        buf.advance(len);
        Ok(Some(header))
    }

    /// Appends it. `mode` says which kind of chunk header.
    pub fn encode(&self, mode: Mode, out: &mut BytesMut) {
        match *self {
            ReplyHeader::Simple { error, cookie } => {
                out.put_u32(SIMPLE_REPLY_MAGIC);
                out.put_u32(error);
                out.put_u64(cookie);
            }
            ReplyHeader::Chunk { flags, kind, cookie, offset, len } => {
                let extended = mode == Mode::Extended;
                out.put_u32(if extended { EXTENDED_CHUNK_MAGIC } else { CHUNK_MAGIC });
                out.put_u16(flags.bits());
                out.put_u16(kind.number());
                out.put_u64(cookie);
                if extended {
                    out.put_u64(offset);
                    out.put_u64(len);
                } else {
                    out.put_u32(len as u32);
                }
            }
        }
    }
}

/// The rest of a chunk header that is whole.
fn chunk_header(mut seen: &[u8], extended: bool) -> ReplyHeader {
    ReplyHeader::Chunk {
        flags: ReplyFlags::from_bits_truncate(seen.get_u16()),
        kind: ChunkKind::from_number(seen.get_u16()),
        cookie: seen.get_u64(),
        offset: if extended { seen.get_u64() } else { 0 },
        len: if extended { seen.get_u64() } else { seen.get_u32().into() },
    }
}

/// A run of the disk in a block status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Length in bytes, never 0.
    pub len: u64,
    /// What the context says of it.
    pub flags: u64,
}

/// The payload of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// The end of a reply.
    None,
    /// Bytes of the disk.
    Data {
        /// Where.
        offset: u64,
        /// The bytes, at least one.
        data: Bytes,
    },
    /// Zero bytes of the disk.
    Hole {
        /// Where.
        offset: u64,
        /// How many, never 0.
        len: u32,
    },
    /// What a context says.
    Status {
        /// Which context.
        context: u32,
        /// Runs from the request's offset on, at least one.
        extents: Vec<StatusExtent>,
    },
    /// The request failed.
    Error {
        /// Error number of the protocol, never 0.
        error: u32,
        /// For people; may be empty.
        message: String,
        /// Where, if that is known.
        offset: Option<u64>,
    },
    /// Not an error, and not known.
    Unknown(u16),
}

impl Chunk {
    /// Reads a whole payload. Data is shared with it, not copied.
    pub fn decode(kind: ChunkKind, payload: Bytes) -> Result<Chunk, ProtocolError> {
        let mut fields = Fields::of(&payload, "a reply chunk has the wrong length");
        let chunk = match kind {
            ChunkKind::None => Chunk::None,
            ChunkKind::Data => {
                let offset = fields.u64()?;
                if fields.rest().is_empty() {
                    return Err(malformed("a data chunk without data"));
                }
                return Ok(Chunk::Data { offset, data: payload.slice(8..) });
            }
            ChunkKind::Hole => {
                let (offset, len) = (fields.u64()?, fields.u32()?);
                if len == 0 {
                    return Err(malformed("a hole of no bytes"));
                }
                Chunk::Hole { offset, len }
            }
            ChunkKind::Status => decode_status(&mut fields, false)?,
            ChunkKind::StatusExtended => decode_status(&mut fields, true)?,
            ChunkKind::Error => decode_error(&mut fields, false)?,
            ChunkKind::ErrorOffset => decode_error(&mut fields, true)?,
            ChunkKind::Unknown(kind) if kind & TYPE_IS_ERROR != 0 => {
                let error = decode_error(&mut fields, false)?;
                fields.rest();
                error
            }
            ChunkKind::Unknown(kind) => {
                fields.rest();
                Chunk::Unknown(kind)
            }
        };
        fields.end()?;
        Ok(chunk)
    }

    /// Appends the payload, and gives its kind. [`Chunk::Data`] appends its offset only: the data follows by itself.
    pub fn encode(&self, mode: Mode, out: &mut BytesMut) -> ChunkKind {
        match self {
            Chunk::None => ChunkKind::None,
            Chunk::Data { offset, .. } => {
                out.put_u64(*offset);
                ChunkKind::Data
            }
            Chunk::Hole { offset, len } => {
                out.put_u64(*offset);
                out.put_u32(*len);
                ChunkKind::Hole
            }
            Chunk::Status { context, extents } if mode == Mode::Extended => {
                out.put_u32(*context);
                out.put_u32(extents.len() as u32);
                for extent in extents {
                    out.put_u64(extent.len);
                    out.put_u64(extent.flags);
                }
                ChunkKind::StatusExtended
            }
            Chunk::Status { context, extents } => {
                out.put_u32(*context);
                for extent in extents {
                    debug_assert!(u32::try_from(extent.len).is_ok(), "the length needs extended headers");
                    out.put_u32(extent.len as u32);
                    out.put_u32(extent.flags as u32);
                }
                ChunkKind::Status
            }
            Chunk::Error { error, message, offset } => {
                let message = cut(message);
                out.put_u32(*error);
                out.put_u16(message.len() as u16);
                out.put_slice(message.as_bytes());
                match offset {
                    Some(offset) => {
                        out.put_u64(*offset);
                        ChunkKind::ErrorOffset
                    }
                    None => ChunkKind::Error,
                }
            }
            Chunk::Unknown(kind) => ChunkKind::Unknown(*kind),
        }
    }
}

/// A list of extents: its length is known from the payload, so it is bounded by [`REPLY_BYTES_MAX`].
fn decode_status(fields: &mut Fields<'_>, extended: bool) -> Result<Chunk, ProtocolError> {
    let context = fields.u32()?;
    let stated = if extended { Some(fields.u32()? as usize) } else { None };
    let size = if extended { 16 } else { 8 };
    let count = fields.len() / size;
    if count == 0 || !fields.len().is_multiple_of(size) || stated.is_some_and(|stated| stated != count) {
        return Err(malformed("the number of extents does not fit the length of the chunk"));
    }
    let mut extents = Vec::with_capacity(count);
    for _ in 0..count {
        let (len, flags) = match extended {
            true => (fields.u64()?, fields.u64()?),
            false => (fields.u32()?.into(), fields.u32()?.into()),
        };
        if len == 0 {
            return Err(malformed("an extent of no bytes"));
        }
        extents.push(StatusExtent { len, flags });
    }
    Ok(Chunk::Status { context, extents })
}

fn decode_error(fields: &mut Fields<'_>, with_offset: bool) -> Result<Chunk, ProtocolError> {
    let (error, len) = (fields.u32()?, fields.u16()?);
    if error == 0 {
        return Err(malformed("an error chunk without an error"));
    }
    let message = lossy(fields.bytes(len.into())?)?;
    let offset = if with_offset { Some(fields.u64()?) } else { None };
    Ok(Chunk::Error { error, message, offset })
}
