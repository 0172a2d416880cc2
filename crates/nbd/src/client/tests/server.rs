//! A server for tests: forgets at a kill what was not flushed, answers in any order, and misbehaves as it is told.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use event_listener::Event;
use futures_util::future::{LocalBoxFuture, select};
use infill_base::{ErrorKind, Gather, IoError, IoResult};
use infill_sim::{Rng, pipe, torn_pipe};
use infill_storage::rt;
use infill_storage::stream::{Connection, Connector, StreamRead, StreamWrite};
use infill_storage::sync::{Arc, Mutex, MutexGuard, lock};

use crate::proto::*;

/// Error number of the protocol.
pub const EIO: u32 = 5;
pub const ENOSPC: u32 = 28;
pub const ESHUTDOWN: u32 = 108;

/// What a server is like. Changes apply to connections that are made later, unless said otherwise.
#[derive(Clone, Debug)]
pub struct Config {
    pub fixed: bool,
    pub go: bool,
    pub mode: Mode,
    pub allocation: bool,
    pub size: u64,
    pub flags: TransmissionFlags,
    pub blocks: Option<(u32, u32, u32)>,
    pub description: Option<String>,
    /// Longest time that a request takes; chosen anew for each. (At once.)
    pub latency: Duration,
    /// Receives come in pieces.
    pub torn: bool,
    /// Content chunks of a read are cut into pieces, in any order.
    pub pieces: bool,
    /// Connections that are answered at the same time; others wait for ever.
    pub shared: usize,
    /// Connections are refused. (At once.)
    pub away: bool,
    /// The next connections are cut, each after so many bytes were sent on it.
    pub cuts: Vec<usize>,
}

impl Default for Config {
    fn default() -> Self {
        use TransmissionFlags as F;
        Config {
            fixed: true,
            go: true,
            mode: Mode::Extended,
            allocation: true,
            size: 1 << 20,
            flags: F::HAS_FLAGS
                | F::SEND_FLUSH
                | F::SEND_FUA
                | F::SEND_TRIM
                | F::SEND_WRITE_ZEROES
                | F::SEND_FAST_ZERO
                | F::CAN_MULTI_CONN,
            blocks: Some((1, 4096, 32 << 20)),
            description: None,
            latency: Duration::ZERO,
            torn: false,
            pieces: false,
            shared: usize::MAX,
            away: false,
            cuts: Vec::new(),
        }
    }
}

/// A request, as it was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Which connection, counted from 0.
    pub connection: usize,
    pub command: Command,
    pub offset: u64,
    pub len: u64,
    pub fua: bool,
}

#[derive(Default)]
pub struct State {
    pub config: Config,
    pub stable: Vec<u8>,
    pub live: Vec<u8>,
    pub seen: Vec<Seen>,
    /// Connections that were made.
    pub connections: usize,
    /// Connections that are there.
    pub alive: usize,
    /// Answers to these commands wait. (At once.)
    pub held: Vec<Command>,
    /// Reads are answered with a byte less than was asked for. (At once.)
    pub short: bool,
    /// The next so many requests of a command fail.
    pub failures: Vec<(Command, usize, u32)>,
    /// Raised by every kill.
    life: u64,
    /// Bytes that a kill took back.
    pub forgotten: usize,
}

/// The server. Cloning shares it.
#[derive(Clone)]
pub struct Server(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Event,
    rng: Mutex<Rng>,
}

impl Server {
    pub fn new(seed: u64, config: Config) -> Server {
        let mut rng = Rng::new(seed);
        let mut bytes = vec![0; config.size as usize];
        rng.fill(&mut bytes);
        // Something to be found as zero.
        let len = bytes.len();
        bytes[len / 4..len / 2].fill(0);
        let state = State { config, stable: bytes.clone(), live: bytes, ..State::default() };
        Server(Arc::new(Shared { state: Mutex::new(state), changed: Event::new(), rng: Mutex::new(rng) }))
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0.state)
    }

    /// Changes something; who waits looks again.
    pub fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.0.changed.notify(usize::MAX);
    }

    /// Ends all connections, and forgets what was not flushed.
    pub fn kill(&self) {
        self.set(|state| {
            state.life += 1;
            state.forgotten += state.live.iter().zip(&state.stable).filter(|(a, b)| a != b).count();
            state.live = state.stable.clone();
        });
    }

    /// Waits until the state is as `wanted`.
    pub async fn until(&self, wanted: impl Fn(&State) -> bool) {
        loop {
            let changed = self.0.changed.listen();
            if wanted(&self.state()) {
                return;
            }
            changed.await;
        }
    }

    pub fn count(&self, command: Command) -> usize {
        self.state().seen.iter().filter(|seen| seen.command == command).count()
    }

    fn rng(&self) -> Rng {
        lock(&self.0.rng).fork()
    }

    fn below(&self, end: u64) -> u64 {
        lock(&self.0.rng).below(end)
    }
}

impl Connector for Server {
    fn connect(&self) -> LocalBoxFuture<'_, IoResult<Connection>> {
        Box::pin(async {
            let (torn, number, life) = {
                let mut state = self.state();
                if state.config.away {
                    return Err(IoError::new(ErrorKind::SourceLost, "nobody is there"));
                }
                state.connections += 1;
                (state.config.torn, state.connections - 1, state.life)
            };
            let (here, there) = if torn { torn_pipe(1 << 20, self.rng()) } else { pipe(1 << 20) };
            let server = self.clone();
            rt::spawn(async move {
                let killed = server.clone();
                let killed = killed.until(|state| state.life != life);
                select(Box::pin(server.serve(number, life, there)), Box::pin(killed)).await;
            });
            Ok(here)
        })
    }

    fn target(&self) -> String {
        "the test's server".into()
    }
}

/// What goes out, and how much of it may.
struct Out {
    queue: RefCell<Vec<Gather>>,
    arrived: Event,
}

impl Out {
    fn push(&self, message: Gather) {
        self.queue.borrow_mut().push(message);
        self.arrived.notify(usize::MAX);
    }
}

/// Counts a connection.
struct Alive(Server);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.set(|state| state.alive -= 1);
    }
}

impl Server {
    async fn serve(self, number: usize, life: u64, connection: Connection) {
        let config = self.state().config.clone();
        self.until(|state| state.alive < config.shared).await;
        self.set(|state| state.alive += 1);
        let _alive = Alive(self.clone());
        let cut_after = self.state().config.cuts.pop();
        let Connection { mut reader, mut writer, .. } = connection;
        let out = Rc::new(Out { queue: RefCell::default(), arrived: Event::new() });
        let queue = out.clone();
        let send = async move {
            let mut left = cut_after.unwrap_or(usize::MAX);
            loop {
                let arrived = queue.arrived.listen();
                let messages = std::mem::take(&mut *queue.queue.borrow_mut());
                if messages.is_empty() {
                    arrived.await;
                    continue;
                }
                for message in messages {
                    let take = message.len().min(left);
                    left -= take;
                    if send_all(writer.as_mut(), message.slice(0, take)).await.is_err() || left == 0 {
                        return;
                    }
                }
            }
        };
        let receive = self.receive(number, life, reader.as_mut(), &out);
        select(Box::pin(send), Box::pin(receive)).await;
    }

    /// Both phases, until the client goes. `None`: it went.
    async fn receive(
        &self,
        number: usize,
        life: u64,
        reader: &mut dyn StreamRead,
        out: &Rc<Out>,
    ) -> Option<()> {
        let mut buf = BytesMut::new();
        let mode = self.handshake(reader, &mut buf, out).await?;
        loop {
            let header = next(reader, &mut buf, |buf| RequestHeader::decode(mode, buf)).await?;
            let len = header.payload_len(mode) as usize;
            while buf.len() < len {
                fill(reader, &mut buf).await?;
            }
            let payload = buf.split_to(len).freeze();
            self.set(|state| {
                state.seen.push(Seen {
                    connection: number,
                    command: header.command,
                    offset: header.offset,
                    len: header.len,
                    fua: header.flags.contains(CommandFlags::FUA),
                });
            });
            if header.command == Command::Disconnect {
                return None;
            }
            let (server, out) = (self.clone(), out.clone());
            rt::spawn(async move {
                let latency = server.state().config.latency.as_nanos() as u64;
                if latency > 0 {
                    rt::sleep(Duration::from_nanos(server.below(latency))).await;
                }
                server.until(|state| !state.held.contains(&header.command) || state.life != life).await;
                if server.state().life == life {
                    server.answer(mode, header, payload, &out);
                }
            });
        }
    }

    async fn handshake(&self, reader: &mut dyn StreamRead, buf: &mut BytesMut, out: &Out) -> Option<Mode> {
        let config = self.state().config.clone();
        let info = ExportInfo { size: config.size, flags: config.flags };
        let mut flags = HandshakeFlags::NO_ZEROES;
        flags.set(HandshakeFlags::FIXED_NEWSTYLE, config.fixed);
        say(out, |bytes| Greeting { flags }.encode(bytes));
        next(reader, buf, ClientFlags::decode).await?;
        let mut mode = Mode::Simple;
        loop {
            let header = next(reader, buf, OptionHeader::decode).await?;
            while buf.len() < header.len as usize {
                fill(reader, buf).await?;
            }
            let data = buf.split_to(header.len as usize);
            let reply = |reply: OptionReply| say(out, |bytes| reply.encode(header.option, bytes));
            let unsupported =
                || OptionReply::Error { error: OptionError::Unsupported, message: String::new() };
            match OptionRequest::decode(header.option, &data).ok()? {
                OptionRequest::ExportName(_) => {
                    say(out, |bytes| info.encode_bare(true, bytes));
                    return Some(mode);
                }
                _ if !config.fixed => return None,
                OptionRequest::StructuredReply if config.mode >= Mode::Structured => {
                    mode = mode.max(Mode::Structured);
                    reply(OptionReply::Ack);
                }
                OptionRequest::ExtendedHeaders if config.mode == Mode::Extended => {
                    mode = Mode::Extended;
                    reply(OptionReply::Ack);
                }
                OptionRequest::MetaContext { set: true, queries, .. } if mode != Mode::Simple => {
                    if config.allocation {
                        reply(OptionReply::MetaContext { id: 7, name: queries.first()?.clone() });
                    }
                    reply(OptionReply::Ack);
                }
                OptionRequest::Info { go: true, .. } if config.go => {
                    reply(OptionReply::Info(Info::Export(info)));
                    if let Some((min, preferred, max)) = config.blocks {
                        reply(OptionReply::Info(Info::BlockSize { min, preferred, max }));
                    }
                    if let Some(text) = &config.description {
                        reply(OptionReply::Info(Info::Description(text.clone())));
                    }
                    reply(OptionReply::Ack);
                    return Some(mode);
                }
                _ => reply(unsupported()),
            }
        }
    }

    /// Does what a request says, and answers it.
    fn answer(&self, mode: Mode, header: RequestHeader, payload: Bytes, out: &Out) {
        let failure = {
            let mut state = self.state();
            let found =
                state.failures.iter_mut().find(|(command, left, _)| *command == header.command && *left > 0);
            found.map(|(_, left, error)| {
                *left -= 1;
                *error
            })
        };
        let range = header.offset as usize..(header.offset + header.len) as usize;
        let chunks = match failure {
            Some(error) => vec![Chunk::Error { error, message: "as it was told".into(), offset: None }],
            None => self.run(header, range, payload),
        };
        match (mode, chunks.as_slice()) {
            (Mode::Simple, [Chunk::Error { error, .. }]) => {
                say(out, |bytes| {
                    ReplyHeader::Simple { error: *error, cookie: header.cookie }.encode(mode, bytes)
                });
            }
            (Mode::Simple, chunks) => {
                let mut bytes = BytesMut::new();
                ReplyHeader::Simple { error: 0, cookie: header.cookie }.encode(mode, &mut bytes);
                for chunk in chunks {
                    if let Chunk::Data { data, .. } = chunk {
                        bytes.extend_from_slice(data);
                    }
                }
                out.push(bytes.freeze().into());
            }
            (_, chunks) => {
                for (index, chunk) in chunks.iter().enumerate() {
                    let last = index + 1 == chunks.len();
                    out.push(self.encode(mode, header, chunk, last));
                }
            }
        }
    }

    fn encode(&self, mode: Mode, header: RequestHeader, chunk: &Chunk, last: bool) -> Gather {
        let mut payload = BytesMut::new();
        let kind = chunk.encode(mode, &mut payload);
        if let Chunk::Data { data, .. } = chunk {
            payload.extend_from_slice(data);
        }
        let mut message = BytesMut::new();
        let flags = if last { ReplyFlags::DONE } else { ReplyFlags::empty() };
        ReplyHeader::Chunk {
            flags,
            kind,
            cookie: header.cookie,
            offset: header.offset,
            len: payload.len() as u64,
        }
        .encode(mode, &mut message);
        message.extend_from_slice(&payload);
        message.freeze().into()
    }

    fn run(&self, header: RequestHeader, range: Range<usize>, payload: Bytes) -> Vec<Chunk> {
        let mut state = self.state();
        let done = vec![Chunk::None];
        match header.command {
            Command::Read => {
                if state.config.pieces {
                    let bytes = Bytes::copy_from_slice(&state.live[range.clone()]);
                    drop(state);
                    return self.pieces(header.offset, &bytes);
                }
                let len = range.len() - usize::from(state.short);
                let data = Bytes::copy_from_slice(&state.live[range][..len]);
                return vec![Chunk::Data { offset: header.offset, data }];
            }
            Command::Write => state.live[range.clone()].copy_from_slice(&payload),
            Command::WriteZeroes | Command::Trim => state.live[range.clone()].fill(0),
            Command::Flush => state.stable = state.live.clone(),
            Command::BlockStatus => {
                let zero = |byte: usize| state.live[byte] == 0;
                let mut extents: Vec<StatusExtent> = Vec::new();
                for byte in range {
                    let flags = if zero(byte) { STATE_ZERO | STATE_HOLE } else { 0 };
                    match extents.last_mut() {
                        Some(last) if last.flags == flags => last.len += 1,
                        _ => extents.push(StatusExtent { len: 1, flags }),
                    }
                }
                let status = Chunk::Status { context: 7, extents };
                return vec![status, Chunk::None];
            }
            _ => {}
        }
        if header.flags.contains(CommandFlags::FUA) {
            let live = state.live[range.clone()].to_vec();
            state.stable[range].copy_from_slice(&live);
        }
        done
    }

    /// Content in pieces, in any order; what is zero as holes.
    fn pieces(&self, offset: u64, bytes: &Bytes) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let take = (1 + self.below(5000) as usize).min(bytes.len() - at);
            let data = bytes.slice(at..at + take);
            let offset = offset + at as u64;
            chunks.push(match data.iter().all(|byte| *byte == 0) {
                true => Chunk::Hole { offset, len: take as u32 },
                false => Chunk::Data { offset, data },
            });
            at += take;
        }
        for index in (1..chunks.len()).rev() {
            chunks.swap(index, self.below(index as u64 + 1) as usize);
        }
        chunks
    }
}

async fn send_all(writer: &mut dyn StreamWrite, message: Gather) -> IoResult<()> {
    writer.write_all(message).await
}

fn say(out: &Out, encode: impl FnOnce(&mut BytesMut)) {
    let mut bytes = BytesMut::new();
    encode(&mut bytes);
    out.push(bytes.freeze().into());
}

/// `None`: the client went.
async fn fill(reader: &mut dyn StreamRead, buf: &mut BytesMut) -> Option<()> {
    buf.reserve(64 << 10);
    let before = buf.len();
    *buf = reader.read(std::mem::take(buf)).await.ok()?;
    (buf.len() > before).then_some(())
}

async fn next<T>(
    reader: &mut dyn StreamRead,
    buf: &mut BytesMut,
    decode: impl Fn(&mut BytesMut) -> Result<Option<T>, ProtocolError>,
) -> Option<T> {
    loop {
        if let Some(message) = decode(buf).unwrap() {
            return Some(message);
        }
        fill(reader, buf).await?;
    }
}
