//! One connection in the transmission phase: sends what the queue gives, in order of class, and hands answers out.
//!
//! Sender, receiver and watchdog are one task on one reactor. What is in flight is bounded in requests and bytes
//! ([`REQUESTS_MAX`], [`BYTES_MAX`]); guests have a reserve above it, so that nobody else fills the window up. Payload
//! is taken as it comes: no length that the server states allocates more than what has arrived (twice at most).
//! Whatever ends the session puts what was not answered back into the queue.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use event_listener::Event;
use futures_util::future::{Either, select};
use infill_base::{ErrorKind, Gather, IoError, ZeroFlags};
use infill_storage::rt;
use infill_storage::stream::{StreamRead, StreamWrite};
use infill_storage::sync::Arc;
use slab::Slab;

use super::negotiate::{Agreed, Failed, Open};
use super::reply::{Done, Progress};
use super::shared::{Key, Op, RANK_GUEST, Request, Role, Shared};
use crate::proto::{
    Chunk, ChunkKind, Command, CommandFlags, Mode, ProtocolError, ReplyFlags, ReplyHeader, RequestHeader,
    kind_of,
};

/// Most requests in flight on one connection.
const REQUESTS_MAX: usize = 256;
/// Most payload in flight on one connection, in bytes (a single larger request goes alone).
const BYTES_MAX: u64 = 32 << 20;
/// Requests that only guests and the replay may have in flight above [`REQUESTS_MAX`].
const REQUESTS_RESERVE: usize = 64;
/// Payload that only guests and the replay may have in flight above [`BYTES_MAX`], in bytes.
const BYTES_RESERVE: u64 = 8 << 20;
/// Most requests that go out in one send.
const BATCH_REQUESTS: usize = 32;
/// Payload after which a send is full, in bytes: a guest's request waits for no more than this one.
const BATCH_BYTES: u64 = 256 << 10;
/// Spare bytes of the receive buffer.
const RECEIVE_BYTES: usize = 256 << 10;
/// Longest chunk that is not content of the disk, in bytes: a million extents of the long kind (the protocol's limit).
const CHUNK_BYTES_MAX: u64 = (16 << 20) + 8;
/// Longest range whose status is asked for with 32-bit lengths, in bytes.
const STATUS_BYTES_MAX: u64 = 2 << 30;

/// Why a session is over.
#[derive(Debug)]
pub(super) enum Ended {
    /// Nobody needs it any more.
    Closed,
    /// The server cannot be used so.
    Failed(Failed),
}

impl<E: Into<Failed>> From<E> for Ended {
    fn from(error: E) -> Ended {
        Ended::Failed(error.into())
    }
}

struct Sent {
    key: Key,
    request: Request,
    progress: Progress,
}

#[derive(Default)]
struct InFlight {
    requests: Slab<Sent>,
    bytes: u64,
    /// Makes cookies differ from those of requests long answered.
    generation: u32,
    /// Since when anything is in flight.
    busy_since: Duration,
}

impl InFlight {
    fn fits(&self, key: Key, request: &Request) -> bool {
        let reserve = key.rank <= RANK_GUEST;
        let requests = REQUESTS_MAX + if reserve { REQUESTS_RESERVE } else { 0 };
        let bytes = BYTES_MAX + if reserve { BYTES_RESERVE } else { 0 };
        let payload = request.op.payload();
        self.requests.len() < requests && (self.bytes == 0 || self.bytes + payload <= bytes)
    }

    /// Where a cookie's request is, if there is one.
    fn find(&mut self, cookie: u64) -> Result<(usize, &mut Sent), ProtocolError> {
        let index = cookie as u32 as usize;
        match self.requests.get_mut(index) {
            Some(sent) if sent.progress.cookie() == cookie => Ok((index, sent)),
            _ => Err(ProtocolError::Malformed { what: "the server answers what was not asked" }),
        }
    }
}

/// A connection in the transmission phase.
pub(super) struct Session {
    shared: Arc<Shared>,
    role: Role,
    agreed: Agreed,
    in_flight: RefCell<InFlight>,
    /// When the server was heard last.
    heard: Cell<Duration>,
    /// Something is in flight again.
    busy: Event,
    served: Cell<bool>,
}

impl Drop for Session {
    fn drop(&mut self) {
        let requests = std::mem::take(&mut self.in_flight.get_mut().requests);
        self.shared.put_back(requests.into_iter().map(|(_, sent)| (sent.key, sent.request)));
    }
}

impl Session {
    pub(super) fn new(shared: Arc<Shared>, role: Role, agreed: Agreed) -> Session {
        Session {
            shared,
            role,
            agreed,
            in_flight: RefCell::default(),
            heard: Cell::new(rt::now()),
            busy: Event::new(),
            served: Cell::new(false),
        }
    }

    /// Whether the server has done anything for us. (To say what there is does not count: it may do no more.)
    pub(super) fn has_served(&self) -> bool {
        self.served.get()
    }

    /// Runs it to its end.
    pub(super) async fn run(&self, open: Open) -> Ended {
        let Open { mut connection, received, .. } = open;
        let send = pin!(self.send(connection.writer.as_mut()));
        let mut inbound = Inbound { session: self, reader: connection.reader.as_mut(), received };
        let receive = pin!(inbound.run());
        let watch = pin!(self.watch());
        match select(select(send, receive), watch).await {
            Either::Left((Either::Left((ended, _)) | Either::Right((ended, _)), _)) => ended,
            Either::Right((ended, _)) => ended,
        }
    }

    /// Sends what there is to send.
    async fn send(&self, writer: &mut dyn StreamWrite) -> Ended {
        loop {
            let mut batch = self.take_batch();
            if batch.is_empty() {
                let woken = self.shared.wake[self.role as usize].listen();
                if self.shared.over() {
                    self.say_goodbye(writer).await;
                    return Ended::Closed;
                }
                batch = self.take_batch();
                if batch.is_empty() {
                    woken.await;
                    continue;
                }
            }
            if let Err(error) = writer.write_all(batch).await {
                return error.into();
            }
        }
    }

    async fn say_goodbye(&self, writer: &mut dyn StreamWrite) {
        let header = RequestHeader {
            flags: CommandFlags::empty(),
            command: Command::Disconnect,
            cookie: 0,
            offset: 0,
            len: 0,
        };
        let mut out = BytesMut::new();
        header.encode(self.agreed.mode, &mut out);
        // Whether it arrives does not matter: the connection ends anyway.
        if writer.write_all(out.freeze().into()).await.is_ok() {
            let _ = writer.shutdown().await;
        }
    }

    /// What fits into the window now, for one send.
    fn take_batch(&self) -> Gather {
        let (mut out, mut headers) = (Gather::new(), BytesMut::new());
        let (mut count, mut bytes) = (0, 0);
        while count < BATCH_REQUESTS && bytes < BATCH_BYTES {
            let mut in_flight = self.in_flight.borrow_mut();
            let Some((key, request)) =
                self.shared.take(self.role, |key, request| in_flight.fits(key, request))
            else {
                break;
            };
            if in_flight.requests.is_empty() {
                in_flight.busy_since = rt::now();
                self.busy.notify(usize::MAX);
            }
            in_flight.bytes += request.op.payload();
            in_flight.generation = in_flight.generation.wrapping_add(1);
            let generation = in_flight.generation;
            let entry = in_flight.requests.vacant_entry();
            let cookie = u64::from(generation) << 32 | entry.key() as u64;
            let header = self.header(cookie, key, &request);
            header.encode(self.agreed.mode, &mut headers);
            if let Op::Write { data, .. } = &request.op {
                bytes += data.len() as u64;
                out.push(headers.split().freeze());
                out.append(data.clone());
            }
            entry.insert(Sent { key, progress: Progress::new(cookie, &request, header.len), request });
            count += 1;
        }
        out.push(headers.freeze());
        out
    }

    fn header(&self, cookie: u64, key: Key, request: &Request) -> RequestHeader {
        let mut flags = CommandFlags::empty();
        let mut len = request.op.len();
        let command = match &request.op {
            Op::Read(_) => Command::Read,
            Op::Write { fua, .. } => {
                flags.set(CommandFlags::FUA, *fua);
                // With extended headers the length of a write is that of its payload, and says so.
                flags.set(CommandFlags::PAYLOAD_LEN, self.agreed.mode == Mode::Extended);
                Command::Write
            }
            Op::Zeroes { flags: how, .. } => {
                flags.set(CommandFlags::FUA, how.contains(ZeroFlags::FUA));
                flags.set(CommandFlags::NO_HOLE, !how.contains(ZeroFlags::MAY_UNMAP));
                flags.set(CommandFlags::FAST_ZERO, how.contains(ZeroFlags::NO_FALLBACK));
                Command::WriteZeroes
            }
            Op::Discard { .. } => Command::Trim,
            Op::Flush { .. } => Command::Flush,
            Op::Status { .. } => {
                if self.agreed.mode != Mode::Extended {
                    len = len.min(STATUS_BYTES_MAX);
                }
                Command::BlockStatus
            }
        };
        let may_wait = matches!(request.op, Op::Read(_) | Op::Status { .. }) && key.rank > RANK_GUEST;
        flags.set(CommandFlags::BACKGROUND, may_wait && self.agreed.background);
        RequestHeader { flags, command, cookie, offset: request.at, len }
    }

    /// Ends when requests are out and the server says nothing for too long.
    async fn watch(&self) -> Ended {
        let Some(stall) = self.shared.options.stall else { return std::future::pending().await };
        loop {
            let busy = self.busy.listen();
            let since = {
                let in_flight = self.in_flight.borrow();
                let since = in_flight.busy_since.max(self.heard.get());
                (!in_flight.requests.is_empty()).then_some(since)
            };
            let Some(since) = since else {
                busy.await;
                continue;
            };
            let silent = rt::now().saturating_sub(since);
            if silent >= stall {
                let count = self.in_flight.borrow().requests.len();
                let why = format!("{count} requests are out, and the server says nothing for {stall:?}");
                return IoError::new(ErrorKind::SourceLost, why).into();
            }
            rt::sleep(stall - silent).await;
        }
    }

    /// A request's last message came.
    fn complete(&self, index: usize) -> Result<(), Ended> {
        let (sent, result) = {
            let mut in_flight = self.in_flight.borrow_mut();
            let sent = &mut in_flight.requests[index];
            let result = match sent.progress.end(&mut sent.request.op)? {
                Done::Answer(answer) => Ok(answer),
                Done::Error { error, .. } if kind_of(error) == ErrorKind::ShuttingDown => {
                    // Not the request's failure: the server goes away, and the request waits for the next one.
                    let why = "the server is shutting down";
                    return Err(Ended::from(IoError::new(ErrorKind::SourceLost, why)));
                }
                Done::Error { error, message } => Err(self.server_error(error, &message)),
            };
            let sent = in_flight.requests.remove(index);
            in_flight.bytes -= sent.progress.payload();
            (sent, result)
        };
        if !matches!(sent.request.op, Op::Status { .. }) {
            self.served.set(true);
        }
        self.shared.answered(sent.key, sent.request, result);
        self.shared.wake[self.role as usize].notify(usize::MAX);
        Ok(())
    }

    fn server_error(&self, error: u32, message: &str) -> IoError {
        let kind = kind_of(error);
        let text = match message {
            "" => format!("the server answered with error {error} ({kind:?})"),
            message => format!("the server answered with error {error} ({kind:?}): {message}"),
        };
        IoError::new(kind, text)
    }
}

/// The receiving half.
struct Inbound<'a> {
    session: &'a Session,
    reader: &'a mut dyn StreamRead,
    received: BytesMut,
}

impl Inbound<'_> {
    async fn run(&mut self) -> Ended {
        loop {
            if let Err(ended) = self.message().await {
                return ended;
            }
        }
    }

    /// Receives one message.
    async fn message(&mut self) -> Result<(), Ended> {
        let mode = self.session.agreed.mode;
        let header = loop {
            if let Some(header) = ReplyHeader::decode(mode, &mut self.received)? {
                break header;
            }
            self.receive().await?;
        };
        match header {
            ReplyHeader::Simple { error, cookie } => self.simple(error, cookie).await,
            ReplyHeader::Chunk { flags, kind, cookie, offset, len } => {
                {
                    let mut in_flight = self.session.in_flight.borrow_mut();
                    let (_, sent) = in_flight.find(cookie)?;
                    if mode == Mode::Extended && offset != sent.request.at {
                        return Err(malformed("a reply names another offset than its request"));
                    }
                }
                self.chunk(kind, cookie, len).await?;
                if flags.contains(ReplyFlags::DONE) {
                    let index = self.session.in_flight.borrow_mut().find(cookie)?.0;
                    self.session.complete(index)?;
                } else if kind == ChunkKind::None {
                    return Err(malformed("an empty chunk that is not the last"));
                }
                Ok(())
            }
        }
    }

    async fn simple(&mut self, error: u32, cookie: u64) -> Result<(), Ended> {
        let data = {
            let mut in_flight = self.session.in_flight.borrow_mut();
            let (_, sent) = in_flight.find(cookie)?;
            match &sent.request.op {
                // An error may come so as well: too many servers do it.
                _ if error != 0 => {
                    sent.progress.error(error, String::new())?;
                    None
                }
                Op::Read(_) | Op::Status { .. } if self.session.agreed.mode != Mode::Simple => {
                    return Err(malformed("a simple reply to what has a payload, beside structured ones"));
                }
                Op::Read(buf) => Some((sent.request.at, buf.len() as u64)),
                _ => None,
            }
        };
        if let Some((at, len)) = data {
            self.content(cookie, at, len).await?;
        }
        let index = self.session.in_flight.borrow_mut().find(cookie)?.0;
        self.session.complete(index)
    }

    /// Takes the payload of a chunk.
    async fn chunk(&mut self, kind: ChunkKind, cookie: u64, len: u64) -> Result<(), Ended> {
        if kind == ChunkKind::Data {
            if len < 9 {
                return Err(malformed("a data chunk without data"));
            }
            while self.received.len() < 8 {
                self.receive().await?;
            }
            let at = self.received.get_u64();
            return self.content(cookie, at, len - 8).await;
        }
        if len > CHUNK_BYTES_MAX {
            let (what, limit) = ("a chunk without data", CHUNK_BYTES_MAX);
            return Err(ProtocolError::TooLong { what, limit, found: len }.into());
        }
        let payload = self.payload(len as usize).await?;
        let chunk = Chunk::decode(kind, payload)?;
        let mut in_flight = self.session.in_flight.borrow_mut();
        let (_, sent) = in_flight.find(cookie)?;
        let request = &mut sent.request;
        match chunk {
            Chunk::None => {}
            Chunk::Hole { offset, len } => {
                let start = sent.progress.content(request.at, &request.op, offset, len.into())?;
                if let Op::Read(buf) = &mut request.op {
                    buf[start..start + len as usize].fill(0);
                }
            }
            Chunk::Status { context, extents } => {
                if self.session.agreed.allocation != Some(context) {
                    return Err(malformed("a block status of a context that was not chosen"));
                }
                sent.progress.status(request.at, &request.op, &extents)?;
            }
            Chunk::Error { error, message, .. } => sent.progress.error(error, message)?,
            Chunk::Data { .. } | Chunk::Unknown(_) => {
                return Err(malformed("a chunk of a kind that is not known"));
            }
        }
        Ok(())
    }

    /// Takes `len` bytes of the disk's content at `at` into the request's buffer, as they come.
    async fn content(&mut self, cookie: u64, at: u64, len: u64) -> Result<(), Ended> {
        let (index, mut to, end) = {
            let mut in_flight = self.session.in_flight.borrow_mut();
            let (index, sent) = in_flight.find(cookie)?;
            let start = sent.progress.content(sent.request.at, &sent.request.op, at, len)?;
            (index, start, start + len as usize)
        };
        while to < end {
            if self.received.is_empty() {
                self.receive().await?;
            }
            let take = self.received.len().min(end - to);
            let mut in_flight = self.session.in_flight.borrow_mut();
            // Only this half takes requests out, so it is still there.
            if let Op::Read(buf) = &mut in_flight.requests[index].request.op {
                buf[to..to + take].copy_from_slice(&self.received[..take]);
            }
            self.received.advance(take);
            to += take;
        }
        Ok(())
    }

    async fn payload(&mut self, len: usize) -> Result<Bytes, Ended> {
        while self.received.len() < len {
            self.receive().await?;
        }
        Ok(self.received.split_to(len).freeze())
    }

    async fn receive(&mut self) -> Result<(), Ended> {
        let mut buf = std::mem::take(&mut self.received);
        buf.reserve(RECEIVE_BYTES);
        let before = buf.len();
        self.received = self.reader.read(buf).await?;
        if self.received.len() == before {
            return Err(IoError::new(ErrorKind::SourceLost, "the server hung up").into());
        }
        self.session.heard.set(rt::now());
        Ok(())
    }
}

fn malformed(what: &'static str) -> Ended {
    ProtocolError::Malformed { what }.into()
}
