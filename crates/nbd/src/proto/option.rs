//! Option haggling: what a client asks for, and what it is answered.

use bytes::{Buf, BufMut, BytesMut};

use super::handshake::OPTION_MAGIC;
use super::text::{Fields, cut, lossy, put_string, string};
use super::{ProtocolError, TransmissionFlags, malformed};

/// How every reply to an option begins.
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Most data of one option or option reply that is taken, in bytes. (A client that asks for sixteen contexts with
/// names of full length stays below.)
pub const OPTION_BYTES_MAX: u32 = 128 << 10;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_LIST: u32 = 3;
const OPT_STARTTLS: u32 = 5;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_LIST_META_CONTEXT: u32 = 9;
const OPT_SET_META_CONTEXT: u32 = 10;
const OPT_EXTENDED_HEADERS: u32 = 11;

const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const REP_ERROR: u32 = 1 << 31;

/// Information type: size and flags.
pub const INFO_EXPORT: u16 = 0;
/// Information type: the export's own name.
pub const INFO_NAME: u16 = 1;
/// Information type: a description for people.
pub const INFO_DESCRIPTION: u16 = 2;
/// Information type: sizes of requests.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Begins an option; its data follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// The option's number.
    pub option: u32,
    /// Length of its data in bytes, *not* bounded yet.
    pub len: u32,
}

impl OptionHeader {
    /// Takes it from the front of `buf`.
    pub fn decode(buf: &mut BytesMut) -> Result<Option<OptionHeader>, ProtocolError> {
        let mut seen = &buf[..];
        let Ok(magic) = seen.try_get_u64() else { return Ok(None) };
        if magic != OPTION_MAGIC {
            return Err(ProtocolError::Magic { what: "an option", expected: OPTION_MAGIC, found: magic });
        }
        let (Ok(option), Ok(len)) = (seen.try_get_u32(), seen.try_get_u32()) else { return Ok(None) };
        buf.advance(16);
        Ok(Some(OptionHeader { option, len }))
    }
}

/// An option, as a client sends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionRequest {
    /// Use the export; there is no error reply.
    ExportName(String),
    /// End the session.
    Abort,
    /// Name all exports.
    List,
    /// Speak TLS.
    StartTls,
    /// Tell about an export; with `go`, then use it.
    Info {
        /// Whether to use it.
        go: bool,
        /// The export.
        name: String,
        /// Types of information that are wanted ([`INFO_EXPORT`] and so on).
        wanted: Vec<u16>,
    },
    /// Structured replies.
    StructuredReply,
    /// List or choose metadata contexts.
    MetaContext {
        /// Choose (else list).
        set: bool,
        /// The export.
        export: String,
        /// Names, or what the namespace takes for a query.
        queries: Vec<String>,
    },
    /// Extended headers.
    ExtendedHeaders,
    /// One that we do not know.
    Unknown(u32),
}

impl OptionRequest {
    /// Its number.
    pub fn option(&self) -> u32 {
        match self {
            OptionRequest::ExportName(_) => OPT_EXPORT_NAME,
            OptionRequest::Abort => OPT_ABORT,
            OptionRequest::List => OPT_LIST,
            OptionRequest::StartTls => OPT_STARTTLS,
            OptionRequest::Info { go: false, .. } => OPT_INFO,
            OptionRequest::Info { go: true, .. } => OPT_GO,
            OptionRequest::StructuredReply => OPT_STRUCTURED_REPLY,
            OptionRequest::MetaContext { set: false, .. } => OPT_LIST_META_CONTEXT,
            OptionRequest::MetaContext { set: true, .. } => OPT_SET_META_CONTEXT,
            OptionRequest::ExtendedHeaders => OPT_EXTENDED_HEADERS,
            OptionRequest::Unknown(option) => *option,
        }
    }

    /// Reads the whole data of option number `option`. An error here is one of the option, not of the stream.
    pub fn decode(option: u32, data: &[u8]) -> Result<OptionRequest, ProtocolError> {
        let empty = |request| match data {
            [] => Ok(request),
            _ => Err(malformed("the option takes no data")),
        };
        match option {
            OPT_EXPORT_NAME => Ok(OptionRequest::ExportName(string(data)?)),
            // Data with it is ignored.
            OPT_ABORT => Ok(OptionRequest::Abort),
            OPT_LIST => empty(OptionRequest::List),
            OPT_STARTTLS => empty(OptionRequest::StartTls),
            OPT_STRUCTURED_REPLY => empty(OptionRequest::StructuredReply),
            OPT_EXTENDED_HEADERS => empty(OptionRequest::ExtendedHeaders),
            OPT_INFO | OPT_GO => {
                let mut fields = Fields::of(data, "the lengths of INFO or GO do not fit its data");
                let name = fields.string()?;
                let count = fields.u16()?;
                if fields.len() != 2 * usize::from(count) {
                    return Err(malformed(
                        "the number of wanted informations does not fit the option's data",
                    ));
                }
                let wanted = (0..count).map(|_| fields.u16()).collect::<Result<_, _>>()?;
                Ok(OptionRequest::Info { go: option == OPT_GO, name, wanted })
            }
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => {
                let mut fields = Fields::of(data, "the lengths of META_CONTEXT do not fit its data");
                let export = fields.string()?;
                let count = fields.u32()?;
                // Grows with what is really there: every query takes four bytes at least.
                let mut queries = Vec::new();
                for _ in 0..count {
                    queries.push(fields.string()?);
                }
                fields.end()?;
                Ok(OptionRequest::MetaContext { set: option == OPT_SET_META_CONTEXT, export, queries })
            }
            _ => Ok(OptionRequest::Unknown(option)),
        }
    }

    /// Appends it, with its header.
    pub fn encode(&self, out: &mut BytesMut) {
        let mut data = BytesMut::new();
        match self {
            OptionRequest::ExportName(name) => data.put_slice(cut(name).as_bytes()),
            OptionRequest::Info { name, wanted, .. } => {
                put_string(&mut data, name);
                data.put_u16(wanted.len() as u16);
                wanted.iter().for_each(|info| data.put_u16(*info));
            }
            OptionRequest::MetaContext { export, queries, .. } => {
                put_string(&mut data, export);
                data.put_u32(queries.len() as u32);
                queries.iter().for_each(|query| put_string(&mut data, query));
            }
            _ => {}
        }
        out.put_u64(OPTION_MAGIC);
        out.put_u32(self.option());
        out.put_u32(data.len() as u32);
        out.put_slice(&data);
    }
}

/// Begins a reply to an option; its data follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option's number.
    pub option: u32,
    /// What the data is.
    pub kind: u32,
    /// Length of the data in bytes, at most [`OPTION_BYTES_MAX`].
    pub len: u32,
}

impl OptionReplyHeader {
    /// Takes it from the front of `buf`.
    pub fn decode(buf: &mut BytesMut) -> Result<Option<OptionReplyHeader>, ProtocolError> {
        let mut seen = &buf[..];
        let Ok(found) = seen.try_get_u64() else { return Ok(None) };
        if found != OPTION_REPLY_MAGIC {
            let (what, expected) = ("a reply to an option", OPTION_REPLY_MAGIC);
            return Err(ProtocolError::Magic { what, expected, found });
        }
        let (Ok(option), Ok(kind), Ok(len)) = (seen.try_get_u32(), seen.try_get_u32(), seen.try_get_u32())
        else {
            return Ok(None);
        };
        if len > OPTION_BYTES_MAX {
            return Err(ProtocolError::TooLong {
                what: "a reply to an option",
                limit: OPTION_BYTES_MAX.into(),
                found: len.into(),
            });
        }
        buf.advance(20);
        Ok(Some(OptionReplyHeader { option, kind, len }))
    }
}

/// Why an option was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum OptionError {
    /// The server does not know it.
    Unsupported = REP_ERROR + 1,
    /// It is forbidden here.
    Policy = REP_ERROR + 2,
    /// It is not well formed, or not valid now.
    Invalid = REP_ERROR + 3,
    /// The server's platform cannot do it.
    Platform = REP_ERROR + 4,
    /// TLS first.
    TlsRequired = REP_ERROR + 5,
    /// No such export.
    Unknown = REP_ERROR + 6,
    /// The server ends.
    Shutdown = REP_ERROR + 7,
    /// The client must ask for block sizes first.
    BlockSizeRequired = REP_ERROR + 8,
    /// Request or reply is too large.
    TooBig = REP_ERROR + 9,
    /// Extended headers are required, or chosen already.
    ExtendedHeaders = REP_ERROR + 10,
}

impl OptionError {
    const ALL: [OptionError; 10] = [
        OptionError::Unsupported,
        OptionError::Policy,
        OptionError::Invalid,
        OptionError::Platform,
        OptionError::TlsRequired,
        OptionError::Unknown,
        OptionError::Shutdown,
        OptionError::BlockSizeRequired,
        OptionError::TooBig,
        OptionError::ExtendedHeaders,
    ];
}

/// Size and flags of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes.
    pub size: u64,
    /// What it can do; flags that we do not know are kept.
    pub flags: TransmissionFlags,
}

impl ExportInfo {
    /// Bytes that follow the answer to EXPORT_NAME unless NO_ZEROES was agreed on.
    const ZEROES: usize = 124;

    /// Appends the answer to EXPORT_NAME.
    pub fn encode_bare(&self, no_zeroes: bool, out: &mut BytesMut) {
        out.put_u64(self.size);
        out.put_u16(self.flags.bits());
        if !no_zeroes {
            out.put_bytes(0, Self::ZEROES);
        }
    }

    /// Takes the answer to EXPORT_NAME from the front of `buf`.
    pub fn decode_bare(no_zeroes: bool, buf: &mut BytesMut) -> Option<ExportInfo> {
        let len = if no_zeroes { 10 } else { 10 + Self::ZEROES };
        if buf.len() < len {
            return None;
        }
        let mut seen = buf.split_to(len);
        let (size, flags) = (seen.get_u64(), seen.get_u16());
        Some(ExportInfo { size, flags: TransmissionFlags::from_bits_retain(flags) })
    }
}

/// One fact about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Info {
    /// Size and flags.
    Export(ExportInfo),
    /// Its own name.
    Name(String),
    /// For people.
    Description(String),
    /// Sizes of requests, in bytes.
    BlockSize {
        /// Offsets and lengths are multiples of it.
        min: u32,
        /// Best multiples of it.
        preferred: u32,
        /// Largest payload.
        max: u32,
    },
    /// One that we do not know.
    Unknown(u16),
}

impl Info {
    fn decode(data: &[u8]) -> Result<Info, ProtocolError> {
        let mut fields = Fields::of(data, "an information has the wrong length");
        let info = match fields.u16()? {
            INFO_EXPORT => {
                let (size, flags) = (fields.u64()?, fields.u16()?);
                Info::Export(ExportInfo { size, flags: TransmissionFlags::from_bits_retain(flags) })
            }
            INFO_NAME => Info::Name(string(fields.rest())?),
            INFO_DESCRIPTION => Info::Description(lossy(fields.rest())?),
            INFO_BLOCK_SIZE => {
                let (min, preferred, max) = (fields.u32()?, fields.u32()?, fields.u32()?);
                Info::BlockSize { min, preferred, max }
            }
            unknown => {
                fields.rest();
                Info::Unknown(unknown)
            }
        };
        fields.end()?;
        Ok(info)
    }

    fn encode(&self, data: &mut BytesMut) {
        match self {
            Info::Export(info) => {
                data.put_u16(INFO_EXPORT);
                info.encode_bare(true, data);
            }
            Info::Name(name) => {
                data.put_u16(INFO_NAME);
                data.put_slice(cut(name).as_bytes());
            }
            Info::Description(text) => {
                data.put_u16(INFO_DESCRIPTION);
                data.put_slice(cut(text).as_bytes());
            }
            Info::BlockSize { min, preferred, max } => {
                data.put_u16(INFO_BLOCK_SIZE);
                [min, preferred, max].into_iter().for_each(|size| data.put_u32(*size));
            }
            Info::Unknown(unknown) => data.put_u16(*unknown),
        }
    }
}

/// A reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionReply {
    /// Done; the last one.
    Ack,
    /// An export.
    Server {
        /// Its name.
        name: String,
        /// For people; empty where there is none.
        description: String,
    },
    /// A fact about the export.
    Info(Info),
    /// A metadata context.
    MetaContext {
        /// By which replies name it.
        id: u32,
        /// Its name.
        name: String,
    },
    /// Refused; the last one.
    Error {
        /// Why.
        error: OptionError,
        /// For people; may be empty.
        message: String,
    },
    /// Refused for a reason that we do not know; the last one.
    UnknownError {
        /// The reply type.
        kind: u32,
        /// For people; may be empty.
        message: String,
    },
    /// One that we do not know, and not the last.
    Unknown(u32),
}

impl OptionReply {
    /// Reads the whole data of a reply.
    pub fn decode(kind: u32, data: &[u8]) -> Result<OptionReply, ProtocolError> {
        let mut fields = Fields::of(data, "a reply to an option has the wrong length");
        let reply = match kind {
            REP_ACK => OptionReply::Ack,
            REP_SERVER => {
                let name = fields.string()?;
                OptionReply::Server { name, description: lossy(fields.rest())? }
            }
            REP_INFO => OptionReply::Info(Info::decode(fields.rest())?),
            REP_META_CONTEXT => {
                let id = fields.u32()?;
                OptionReply::MetaContext { id, name: string(fields.rest())? }
            }
            _ if kind & REP_ERROR != 0 => {
                let message = lossy(fields.rest())?;
                match OptionError::ALL.into_iter().find(|error| *error as u32 == kind) {
                    Some(error) => OptionReply::Error { error, message },
                    None => OptionReply::UnknownError { kind, message },
                }
            }
            _ => {
                fields.rest();
                OptionReply::Unknown(kind)
            }
        };
        fields.end()?;
        Ok(reply)
    }

    /// Appends it as a reply to option number `option`, with its header.
    pub fn encode(&self, option: u32, out: &mut BytesMut) {
        let mut data = BytesMut::new();
        let kind = match self {
            OptionReply::Ack => REP_ACK,
            OptionReply::Server { name, description } => {
                put_string(&mut data, name);
                data.put_slice(cut(description).as_bytes());
                REP_SERVER
            }
            OptionReply::Info(info) => {
                info.encode(&mut data);
                REP_INFO
            }
            OptionReply::MetaContext { id, name } => {
                data.put_u32(*id);
                data.put_slice(cut(name).as_bytes());
                REP_META_CONTEXT
            }
            OptionReply::Error { error, message } => {
                data.put_slice(cut(message).as_bytes());
                *error as u32
            }
            OptionReply::UnknownError { kind, message } => {
                data.put_slice(cut(message).as_bytes());
                *kind
            }
            OptionReply::Unknown(kind) => *kind,
        };
        out.put_u64(OPTION_REPLY_MAGIC);
        out.put_u32(option);
        out.put_u32(kind);
        out.put_u32(data.len() as u32);
        out.put_slice(&data);
    }
}
