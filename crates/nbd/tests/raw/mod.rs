//! A client that speaks the protocol by hand over an in-memory connection, and may break its rules.

use std::collections::HashMap;

use bytes::{Bytes, BytesMut};
use infill_base::{Gather, IoResult};
use infill_nbd::Server;
use infill_nbd::proto::{
    Chunk, ClientFlags, Command, CommandFlags, Greeting, Mode, OptionReply, OptionReplyHeader, OptionRequest,
    ReplyFlags, ReplyHeader, RequestHeader,
};
use infill_sim::pipe;
use infill_storage::rt;
use infill_storage::stream::Connection;

/// Bytes that each direction of the pipe holds.
pub const PIPE_BYTES: usize = 64 << 10;

/// The whole answer to one request.
#[derive(Debug, PartialEq)]
pub struct Reply {
    pub cookie: u64,
    /// 0, or an error number.
    pub error: u32,
    /// In the order in which they came; [`Chunk::Data`] also for the data of a simple reply.
    pub chunks: Vec<Chunk>,
}

impl Reply {
    /// The bytes of a read that has succeeded, from byte `at` on.
    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        assert_eq!(self.error, 0, "{self:?}");
        let mut out = vec![0; len];
        let mut covered = 0;
        for chunk in &self.chunks {
            match chunk {
                Chunk::Data { offset, data } => {
                    let start = (offset - at) as usize;
                    out[start..start + data.len()].copy_from_slice(data);
                    covered += data.len();
                }
                Chunk::Hole { len, .. } => covered += *len as usize,
                other => panic!("{other:?} in the answer to a read"),
            }
        }
        assert_eq!(covered, len, "the chunks do not cover the read");
        out
    }
}

pub struct Raw {
    connection: Connection,
    received: BytesMut,
    pub mode: Mode,
    cookie: u64,
    /// Of simple replies: how long the data of each read is.
    lens: HashMap<u64, usize>,
    /// Chunks of replies that are not whole yet.
    parts: HashMap<u64, Vec<Chunk>>,
}

/// Starts serving one end of a pipe, and gives the other.
pub fn connect(server: &Server) -> Connection {
    connect_over(server, pipe(PIPE_BYTES))
}

/// Starts serving the second end, and gives the first.
pub fn connect_over(server: &Server, (here, there): (Connection, Connection)) -> Connection {
    let server = server.clone();
    rt::spawn(async move {
        let _ = server.serve(there).await;
    });
    here
}

impl Raw {
    /// Says hello, without an option yet.
    pub async fn hello(connection: Connection) -> IoResult<Raw> {
        let mut raw = Raw {
            connection,
            received: BytesMut::new(),
            mode: Mode::Simple,
            cookie: 0,
            lens: HashMap::new(),
            parts: HashMap::new(),
        };
        raw.take(|buf| Greeting::decode(buf).unwrap()).await.expect("no greeting");
        let mut out = BytesMut::new();
        (ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES).encode(&mut out);
        raw.send(out.freeze()).await?;
        Ok(raw)
    }

    /// Connects and chooses `export`.
    pub async fn go(server: &Server, export: &str, mode: Mode, contexts: &[&str]) -> Raw {
        Raw::go_over(connect(server), export, mode, contexts).await
    }

    pub async fn go_over(connection: Connection, export: &str, mode: Mode, contexts: &[&str]) -> Raw {
        let mut raw = Raw::hello(connection).await.unwrap();
        let agree = match mode {
            Mode::Simple => None,
            Mode::Structured => Some(OptionRequest::StructuredReply),
            Mode::Extended => Some(OptionRequest::ExtendedHeaders),
        };
        if let Some(agree) = agree {
            assert_eq!(raw.option(&agree).await, [OptionReply::Ack]);
        }
        if !contexts.is_empty() {
            let queries = contexts.iter().map(|name| name.to_string()).collect();
            raw.option(&OptionRequest::MetaContext { set: true, export: export.into(), queries }).await;
        }
        let go = OptionRequest::Info { go: true, name: export.into(), wanted: vec![] };
        assert_eq!(raw.option(&go).await.last(), Some(&OptionReply::Ack));
        raw.mode = mode;
        raw
    }

    pub async fn send(&mut self, bytes: impl Into<Bytes>) -> IoResult<()> {
        self.connection.writer.write_all(Gather::from(bytes.into())).await
    }

    /// What `decode` makes of what comes; `None` at the end of the stream.
    async fn take<T>(&mut self, mut decode: impl FnMut(&mut BytesMut) -> Option<T>) -> Option<T> {
        loop {
            if let Some(value) = decode(&mut self.received) {
                return Some(value);
            }
            self.received.reserve(64 << 10);
            let before = self.received.len();
            self.received = self.connection.reader.read(std::mem::take(&mut self.received)).await.unwrap();
            if self.received.len() == before {
                return None;
            }
        }
    }

    /// Sends an option; all replies to it, none if the server has closed.
    pub async fn option(&mut self, request: &OptionRequest) -> Vec<OptionReply> {
        let mut out = BytesMut::new();
        request.encode(&mut out);
        if self.send(out.freeze()).await.is_err() {
            return Vec::new();
        }
        self.option_replies().await
    }

    pub async fn option_replies(&mut self) -> Vec<OptionReply> {
        let mut replies = Vec::new();
        loop {
            let Some(header) = self.take(|buf| OptionReplyHeader::decode(buf).unwrap()).await else {
                return Vec::new();
            };
            let len = header.len as usize;
            let data = self.take(|buf| (buf.len() >= len).then(|| buf.split_to(len))).await.unwrap();
            let reply = OptionReply::decode(header.kind, &data).unwrap();
            let last = matches!(
                reply,
                OptionReply::Ack | OptionReply::Error { .. } | OptionReply::UnknownError { .. }
            );
            replies.push(reply);
            if last {
                return replies;
            }
        }
    }

    /// The bytes of a request; the payload follows by itself.
    pub fn header(&mut self, command: Command, flags: CommandFlags, offset: u64, len: u64) -> (u64, Bytes) {
        self.cookie += 1;
        let (cookie, mut out) = (self.cookie, BytesMut::new());
        let mut flags = flags;
        flags.set(CommandFlags::PAYLOAD_LEN, self.mode == Mode::Extended && command == Command::Write);
        RequestHeader { flags, command, cookie, offset, len }.encode(self.mode, &mut out);
        if command == Command::Read {
            self.lens.insert(cookie, len as usize);
        }
        (cookie, out.freeze())
    }

    /// Sends a request without payload; its cookie.
    pub async fn request(&mut self, command: Command, flags: CommandFlags, offset: u64, len: u64) -> u64 {
        let (cookie, header) = self.header(command, flags, offset, len);
        self.send(header).await.unwrap();
        cookie
    }

    pub async fn write(&mut self, flags: CommandFlags, offset: u64, data: Vec<u8>) -> u64 {
        let (cookie, header) = self.header(Command::Write, flags, offset, data.len() as u64);
        self.send(header).await.unwrap();
        self.send(data).await.unwrap();
        cookie
    }

    /// The next reply that is whole; `None` when the server has closed.
    pub async fn reply(&mut self) -> Option<Reply> {
        loop {
            let mode = self.mode;
            match self.take(|buf| ReplyHeader::decode(mode, buf).unwrap()).await? {
                ReplyHeader::Simple { error, cookie } => {
                    let len = if error == 0 && mode == Mode::Simple {
                        self.lens.remove(&cookie).unwrap_or(0)
                    } else {
                        0
                    };
                    let data =
                        self.take(|buf| (buf.len() >= len).then(|| buf.split_to(len).freeze())).await?;
                    let chunks = if len > 0 { vec![Chunk::Data { offset: 0, data }] } else { vec![] };
                    return Some(Reply { cookie, error, chunks });
                }
                ReplyHeader::Chunk { flags, kind, cookie, len, .. } => {
                    let len = len as usize;
                    let payload =
                        self.take(|buf| (buf.len() >= len).then(|| buf.split_to(len).freeze())).await?;
                    let parts = self.parts.entry(cookie).or_default();
                    parts.push(Chunk::decode(kind, payload).unwrap());
                    if flags.contains(ReplyFlags::DONE) {
                        let mut chunks = self.parts.remove(&cookie).unwrap();
                        let error = chunks.iter().find_map(|chunk| match chunk {
                            Chunk::Error { error, .. } => Some(*error),
                            _ => None,
                        });
                        chunks.retain(|chunk| *chunk != Chunk::None);
                        return Some(Reply { cookie, error: error.unwrap_or(0), chunks });
                    }
                }
            }
        }
    }

    /// Sends a request without payload and waits for the next reply, which must be its own; the error number.
    pub async fn ask(&mut self, command: Command, flags: CommandFlags, offset: u64, len: u64) -> u32 {
        let cookie = self.request(command, flags, offset, len).await;
        self.answer(cookie).await
    }

    /// Waits for the next reply, which must be to `cookie`; the error number.
    pub async fn answer(&mut self, cookie: u64) -> u32 {
        let reply = self.reply().await.expect("the server has closed");
        assert_eq!(reply.cookie, cookie);
        reply.error
    }
}
