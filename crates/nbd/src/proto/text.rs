//! Strings and numbers inside option data and chunk payloads.

use bytes::{Buf, BufMut, BytesMut};

use super::{ProtocolError, malformed};

/// Longest string that the protocol allows, in bytes.
pub const STRING_BYTES_MAX: usize = 4096;

/// Takes numbers and strings from a message that is whole, and says where it ends too early.
pub(super) struct Fields<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Fields<'a> {
    /// `what` is the complaint about a message that ends too early.
    pub(super) fn of(message: &'a [u8], what: &'static str) -> Fields<'a> {
        Fields { rest: message, what }
    }

    pub(super) fn u16(&mut self) -> Result<u16, ProtocolError> {
        self.rest.try_get_u16().map_err(|_| malformed(self.what))
    }

    pub(super) fn u32(&mut self) -> Result<u32, ProtocolError> {
        self.rest.try_get_u32().map_err(|_| malformed(self.what))
    }

    pub(super) fn u64(&mut self) -> Result<u64, ProtocolError> {
        self.rest.try_get_u64().map_err(|_| malformed(self.what))
    }

    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], ProtocolError> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(malformed(self.what))?;
        self.rest = rest;
        Ok(taken)
    }

    /// A string with its length, 32 bits, before it.
    pub(super) fn string(&mut self) -> Result<String, ProtocolError> {
        let len = self.u32()? as usize;
        string(self.bytes(len)?)
    }

    /// All that is left.
    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    pub(super) fn len(&self) -> usize {
        self.rest.len()
    }

    /// Nothing may be left.
    pub(super) fn end(&self) -> Result<(), ProtocolError> {
        if self.rest.is_empty() { Ok(()) } else { Err(malformed(self.what)) }
    }
}

/// A string that must be one (a name).
pub(super) fn string(bytes: &[u8]) -> Result<String, ProtocolError> {
    bounded(bytes.len())?;
    if bytes.contains(&0) {
        return Err(malformed("a string contains a NUL"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| malformed("a string is not UTF-8"))?;
    Ok(text.to_owned())
}

/// A string that is only shown to people: what is not UTF-8 is replaced.
pub(super) fn lossy(bytes: &[u8]) -> Result<String, ProtocolError> {
    bounded(bytes.len())?;
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

fn bounded(len: usize) -> Result<(), ProtocolError> {
    if len <= STRING_BYTES_MAX {
        return Ok(());
    }
    Err(ProtocolError::TooLong { what: "a string", limit: STRING_BYTES_MAX as u64, found: len as u64 })
}

/// As much of `text` as the protocol allows, cut between characters.
pub(super) fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(STRING_BYTES_MAX)]
}

/// Appends a string with its length, 32 bits, before it.
pub(super) fn put_string(out: &mut BytesMut, text: &str) {
    let text = cut(text);
    out.put_u32(text.len() as u32);
    out.put_slice(text.as_bytes());
}
