//! Answers on their way out: headers in one buffer, payload where it is, all of it one vectored write.

use bytes::{BufMut, BytesMut};
use infill_base::{ErrorKind, Gather, IoError};
use infill_storage::Permit;

use crate::proto::{Chunk, Mode, ReplyFlags, ReplyHeader, StatusExtent, errno_of};

/// Room for headers that is allocated at once, in bytes.
const HEADER_BYTES: usize = 4096;
/// The longest header of one answer: an extended chunk header and the offset of its data, in bytes.
const HEADER_BYTES_MAX: usize = 40;

/// What a request may hold of the server's memory while it is in flight.
#[derive(Debug)]
pub(super) struct Charge {
    pub bytes: u64,
    /// Its part of what all connections share; `None` while the connection is within what it may always have.
    pub _permit: Option<Permit>,
}

/// Why a request is answered with an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub errno: u32,
    pub message: String,
}

impl Failure {
    pub(super) fn new(kind: ErrorKind, message: impl Into<String>) -> Failure {
        Failure { errno: errno_of(kind), message: message.into() }
    }
}

impl From<IoError> for Failure {
    fn from(error: IoError) -> Failure {
        // ENOTSUP is kept for fast zeroes, EOVERFLOW for reads that are too long; a file that may not grow is full.
        let kind = match error.kind() {
            ErrorKind::Unsupported => ErrorKind::InvalidInput,
            ErrorKind::TooLarge => ErrorKind::NoSpace,
            kind => kind,
        };
        Failure::new(kind, error.to_string())
    }
}

/// A piece of a read: where on the disk, and its bytes or how many zeroes.
#[derive(Clone, Debug)]
pub(super) enum Piece {
    Data(u64, Gather),
    Zeroes(u64, u32),
}

/// What a request has come to.
#[derive(Debug)]
pub(super) enum Body {
    /// Done, and there is nothing to say.
    Done,
    /// What was read, in one.
    Data(Gather),
    /// What was read, in pieces that cover it in order, at least one. Not in [`Mode::Simple`].
    Pieces(Vec<Piece>),
    /// For each chosen context its number and its runs.
    Status(Vec<(u32, Vec<StatusExtent>)>),
}

/// The answer to one request.
#[derive(Debug)]
pub(super) struct Answer {
    pub cookie: u64,
    /// First byte of the request.
    pub offset: u64,
    pub result: Result<Body, Failure>,
    /// Given back when the answer was sent.
    pub charge: Charge,
}

/// Answers that are ready and not yet given to the kernel.
#[derive(Default)]
pub(super) struct Outbox {
    mode: Mode,
    headers: BytesMut,
    data: Gather,
    charges: Vec<Charge>,
}

/// One vectored write, and what is given back after it.
pub(super) struct Batch {
    pub data: Gather,
    pub charges: Vec<Charge>,
}

impl Outbox {
    pub(super) fn new(mode: Mode) -> Outbox {
        Outbox { mode, ..Outbox::default() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.charges.is_empty()
    }

    /// All that is ready.
    pub(super) fn take(&mut self) -> Batch {
        self.finish_headers();
        Batch { data: std::mem::take(&mut self.data), charges: std::mem::take(&mut self.charges) }
    }

    /// Adds an answer.
    pub(super) fn push(&mut self, answer: Answer) {
        if self.headers.capacity() - self.headers.len() < HEADER_BYTES_MAX {
            self.finish_headers();
            self.headers.reserve(HEADER_BYTES);
        }
        let (cookie, offset) = (answer.cookie, answer.offset);
        match answer.result {
            Ok(body) => self.push_body(cookie, offset, body),
            Err(Failure { errno, .. }) if self.mode == Mode::Simple => self.push_simple(cookie, errno),
            Err(Failure { errno: error, message }) => {
                self.push_chunk(cookie, offset, &Chunk::Error { error, message, offset: None }, true);
            }
        }
        self.charges.push(answer.charge);
    }

    fn push_body(&mut self, cookie: u64, offset: u64, body: Body) {
        match body {
            Body::Done if self.mode < Mode::Extended => self.push_simple(cookie, 0),
            Body::Done => self.push_chunk(cookie, offset, &Chunk::None, true),
            Body::Data(data) if self.mode == Mode::Simple => {
                self.push_simple(cookie, 0);
                self.push_payload(data);
            }
            Body::Data(data) => self.push_data(cookie, offset, offset, data, true),
            Body::Pieces(pieces) => {
                let last = pieces.len().saturating_sub(1);
                for (index, piece) in pieces.into_iter().enumerate() {
                    match piece {
                        Piece::Data(at, data) => self.push_data(cookie, offset, at, data, index == last),
                        Piece::Zeroes(at, len) => {
                            self.push_chunk(cookie, offset, &Chunk::Hole { offset: at, len }, index == last);
                        }
                    }
                }
            }
            Body::Status(contexts) => {
                let last = contexts.len().saturating_sub(1);
                for (index, (context, extents)) in contexts.into_iter().enumerate() {
                    self.push_chunk(cookie, offset, &Chunk::Status { context, extents }, index == last);
                }
            }
        }
    }

    fn push_simple(&mut self, cookie: u64, error: u32) {
        ReplyHeader::Simple { error, cookie }.encode(self.mode, &mut self.headers);
    }

    /// A chunk whose payload is small enough to be copied.
    fn push_chunk(&mut self, cookie: u64, offset: u64, chunk: &Chunk, done: bool) {
        let mut payload = BytesMut::new();
        let kind = chunk.encode(self.mode, &mut payload);
        let flags = if done { ReplyFlags::DONE } else { ReplyFlags::empty() };
        let len = payload.len() as u64;
        ReplyHeader::Chunk { flags, kind, cookie, offset, len }.encode(self.mode, &mut self.headers);
        self.headers.put_slice(&payload);
    }

    /// A chunk with data from byte `at`.
    fn push_data(&mut self, cookie: u64, offset: u64, at: u64, data: Gather, done: bool) {
        let flags = if done { ReplyFlags::DONE } else { ReplyFlags::empty() };
        if data.is_empty() {
            // A read of nothing: there is no data chunk without data.
            return self.push_chunk(cookie, offset, &Chunk::None, true);
        }
        let len = 8 + data.len() as u64;
        let kind = crate::proto::ChunkKind::Data;
        ReplyHeader::Chunk { flags, kind, cookie, offset, len }.encode(self.mode, &mut self.headers);
        self.headers.put_u64(at);
        self.push_payload(data);
    }

    fn push_payload(&mut self, data: Gather) {
        self.finish_headers();
        self.data.append(data);
    }

    /// Closes the run of headers, so that something else may follow it.
    fn finish_headers(&mut self) {
        if !self.headers.is_empty() {
            self.data.push(self.headers.split().freeze());
        }
    }
}
