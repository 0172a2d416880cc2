//! The server against arbitrary bytes, with an oracle. Made for a fuzzer; a test runs it by seed.
//!
//! The input chooses how far the handshake is done by the rules, and is then either sent as it is or read as a list of
//! small requests. The whole of it lies ready for the server, followed by the end of the stream. The oracle demands that
//! * the session ends, without a panic, and without waiting for anything (everything it needs is there),
//! * every byte that the server sends is a message of the protocol,
//! * every request that was sent whole, up to the first that ends the session, is answered exactly once,
//! * no byte of a read has a value that the disk can never have had.

use std::cell::RefCell;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Waker};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use futures_util::future::{LocalBoxFuture, pending, ready};
use infill_base::{Gather, IoResult};
use infill_node::{MemoryOverlay, NodeHandle};
use infill_storage::rt;
use infill_storage::stream::{Connection, StreamRead, StreamWrite};
use rustc_hash::FxHashMap;

use crate::proto::{
    CONTEXT_ALLOCATION, CONTEXT_DEPTH, Chunk, ClientFlags, Command, CommandFlags, Greeting, Mode,
    OptionReply, OptionReplyHeader, OptionRequest, ReplyFlags, ReplyHeader, RequestHeader,
};
use crate::{Export, Exports, Server, ServerLimits};

/// Size of the disk, and of a piece of it that becomes present on its own, in bytes.
const DISK_BYTES: u64 = 160 << 10;
const UNIT_BYTES: u64 = 4096;
/// Polls after which a session that has all its input counts as hanging.
const POLLS_MAX: usize = 100_000;
/// Most answer bytes that one input is worth.
const INPUT_BYTES_MAX: usize = 64 << 10;

/// Runs one session on `data`.
///
/// # Panics
/// If the server breaks a rule of the module's list.
pub fn fuzz_server(data: &[u8]) {
    let Some((&how, data)) = data.split_first() else { return };
    let data = &data[..data.len().min(INPUT_BYTES_MAX)];
    let mode = [Mode::Simple, Mode::Structured, Mode::Extended][usize::from(how % 3)];
    let greeted = how & 0x40 == 0;
    let mut input = BytesMut::new();
    let mut model = Model::new(mode);
    if greeted {
        model.agree(&mut input);
        match how & 0x80 {
            0 => model.requests(data, &mut input),
            _ => input.extend_from_slice(data),
        }
    } else {
        input.extend_from_slice(data);
    }
    let sent = input.clone();
    let output = serve(input, 1 + usize::from(how));
    if greeted {
        model.judge(sent, output);
    } else {
        let mut output = output;
        assert!(Greeting::decode(&mut output).expect("no greeting").is_some());
    }
}

/// What the server sends to a client that sends `input`, in pieces of at most `step` bytes, and then nothing more.
fn serve(input: BytesMut, step: usize) -> BytesMut {
    let overlay = NodeHandle::new(MemoryOverlay::new(DISK_BYTES, UNIT_BYTES, None));
    let exports = Exports::new();
    let export = Export { writable: true, allocation_depth: true, ..Export::new("", overlay) };
    exports.add(export).expect("the registry was empty");
    let server = Server::new(exports, ServerLimits::default());
    let output = Rc::new(RefCell::new(BytesMut::new()));
    let connection = Connection {
        reader: Box::new(Input { left: input, step }),
        writer: Box::new(Output(output.clone())),
        peer: "a fuzzer".into(),
    };
    let _entered = rt::enter(Rc::new(Still));
    {
        let mut session = pin!(server.serve(connection));
        let mut cx = Context::from_waker(Waker::noop());
        let ended = (0..POLLS_MAX).any(|_| session.as_mut().poll(&mut cx).is_ready());
        assert!(ended, "the session waits, though all of its input is there");
    }
    assert_eq!(server.connections(), 0);
    output.take()
}

/// A runtime whose clock stands still.
struct Still;

impl rt::Runtime for Still {
    fn spawn(&self, _task: LocalBoxFuture<'static, ()>) {
        unreachable!("a session needs no other tasks");
    }
    fn sleep(&self, _duration: Duration) -> LocalBoxFuture<'static, ()> {
        Box::pin(pending())
    }
    fn now(&self) -> Duration {
        Duration::ZERO
    }
}

struct Input {
    left: BytesMut,
    step: usize,
}

impl StreamRead for Input {
    fn read(&mut self, mut buf: BytesMut) -> LocalBoxFuture<'_, IoResult<BytesMut>> {
        let room = buf.capacity() - buf.len();
        assert!(room > 0, "the server receives into nothing");
        let piece = self.left.split_to(self.left.len().min(room).min(self.step));
        buf.extend_from_slice(&piece);
        Box::pin(ready(Ok(buf)))
    }
}

struct Output(Rc<RefCell<BytesMut>>);

impl StreamWrite for Output {
    fn write_all(&mut self, data: Gather) -> LocalBoxFuture<'_, IoResult<()>> {
        data.runs().iter().for_each(|run| self.0.borrow_mut().extend_from_slice(run));
        Box::pin(ready(Ok(())))
    }
    fn shutdown(&mut self) -> LocalBoxFuture<'_, IoResult<()>> {
        Box::pin(ready(Ok(())))
    }
}

/// What the server may answer.
struct Model {
    mode: Mode,
    /// Bytes of the handshake that the model itself has sent, and the options in it.
    agreed_bytes: usize,
    options: usize,
    /// For each byte of the disk, the values that it may have had, as a set of 256 bits; all have had 0.
    values: Vec<[u64; 4]>,
}

impl Model {
    fn new(mode: Mode) -> Model {
        Model { mode, agreed_bytes: 0, options: 0, values: vec![[1, 0, 0, 0]; DISK_BYTES as usize] }
    }

    /// A handshake by the rules.
    fn agree(&mut self, input: &mut BytesMut) {
        (ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES).encode(input);
        let mut options = Vec::new();
        match self.mode {
            Mode::Simple => {}
            Mode::Structured => options.push(OptionRequest::StructuredReply),
            Mode::Extended => options.push(OptionRequest::ExtendedHeaders),
        }
        if self.mode > Mode::Simple {
            let queries = vec![CONTEXT_ALLOCATION.to_owned(), CONTEXT_DEPTH.to_owned()];
            options.push(OptionRequest::MetaContext { set: true, export: String::new(), queries });
        }
        options.push(OptionRequest::Info { go: true, name: String::new(), wanted: vec![] });
        options.iter().for_each(|option| option.encode(input));
        self.options = options.len();
        self.agreed_bytes = input.len();
    }

    /// Reads `data` as requests: eight bytes each.
    fn requests(&self, mut data: &[u8], input: &mut BytesMut) {
        let mut cookie = 0;
        while data.len() >= 8 {
            let (command, flags, at) = (data.get_u8(), data.get_u8(), data.get_u16());
            let (fill, shift, len) = (data.get_u8(), data.get_u8(), data.get_u16());
            let command = match command % 16 {
                0..4 => Command::Read,
                4..8 => Command::Write,
                8 => Command::Flush,
                9 => Command::Trim,
                10 => Command::Cache,
                11..13 => Command::WriteZeroes,
                13..15 => Command::BlockStatus,
                _ => Command::Unknown(command.into()),
            };
            // Mostly none, so that requests are done; any of them sometimes.
            let flags = if flags & 3 == 3 { u16::from(flags >> 2) } else { 0 };
            let (offset, len) = match command {
                Command::Flush => (0, 0),
                _ => (u64::from(at) * 3, u64::from(len) * if shift == 0 { 1000 } else { 1 }),
            };
            let len = if command == Command::Write { len % 5000 } else { len };
            cookie += 1;
            let flags = CommandFlags::from_bits_retain(flags) - CommandFlags::PAYLOAD_LEN;
            RequestHeader { flags, command, cookie, offset, len }.encode(self.mode, input);
            if command == Command::Write {
                input.resize(input.len() + len as usize, fill);
            }
        }
    }

    /// Reads what the client has sent as the protocol means it. Gives the requests that must be answered, by cookie.
    fn expected(&mut self, mut sent: BytesMut) -> Vec<RequestHeader> {
        sent.advance(self.agreed_bytes);
        let mut requests = Vec::new();
        while let Ok(Some(header)) = RequestHeader::decode(self.mode, &mut sent) {
            let payload = header.payload_len(self.mode);
            if header.command == Command::Disconnect || payload > sent.len() as u64 {
                break;
            }
            let payload = sent.split_to(payload as usize);
            if header.command == Command::Write {
                for (at, byte) in payload.iter().enumerate() {
                    let place = header.offset.saturating_add(at as u64);
                    if let Some(values) = self.values.get_mut(place as usize) {
                        values[usize::from(byte >> 6)] |= 1 << (byte & 63);
                    }
                }
            }
            requests.push(header);
        }
        requests
    }

    fn judge(&mut self, sent: BytesMut, mut output: BytesMut) {
        assert!(Greeting::decode(&mut output).expect("no greeting").is_some());
        for _ in 0..self.options {
            while self.option_reply(&mut output) != OptionReply::Ack {}
        }
        let ended_well = Self::ends_between_requests(self.mode, &sent[self.agreed_bytes..]);
        let mut waiting: FxHashMap<u64, Vec<RequestHeader>> = FxHashMap::default();
        for request in self.expected(sent) {
            waiting.entry(request.cookie).or_default().push(request);
        }
        if self.mode == Mode::Simple && waiting.values().any(|requests| requests.len() > 1) {
            // Which request a simple reply answers is told by the cookie alone, so this client cannot know.
            return;
        }
        while !output.is_empty() {
            self.reply(&mut output, &mut waiting);
        }
        waiting.retain(|_, requests| !requests.is_empty());
        // After a stream that ends within a message, or is no stream, the server owes nothing.
        assert!(!ended_well || waiting.is_empty(), "never answered: {waiting:?}");
    }

    /// Whether the client has ended its session by the rules.
    fn ends_between_requests(mode: Mode, sent: &[u8]) -> bool {
        let mut left = BytesMut::from(sent);
        loop {
            match RequestHeader::decode(mode, &mut left) {
                Ok(Some(header)) if header.command == Command::Disconnect => return true,
                Ok(Some(header)) => {
                    let payload = header.payload_len(mode);
                    if payload > left.len() as u64 {
                        return false;
                    }
                    left.advance(payload as usize);
                }
                Ok(None) => return left.is_empty(),
                Err(_) => return false,
            }
        }
    }

    fn option_reply(&self, output: &mut BytesMut) -> OptionReply {
        let header = OptionReplyHeader::decode(output).expect("not a reply to an option");
        let header = header.expect("the replies end early");
        let data = output.split_to(header.len as usize);
        OptionReply::decode(header.kind, &data).expect("a reply that cannot be read")
    }

    /// Takes one reply message, and strikes the request off with its last one.
    fn reply(&self, output: &mut BytesMut, waiting: &mut FxHashMap<u64, Vec<RequestHeader>>) {
        let header =
            ReplyHeader::decode(self.mode, output).expect("not a reply").expect("a reply is cut off");
        let (ReplyHeader::Simple { cookie, .. } | ReplyHeader::Chunk { cookie, .. }) = header;
        let requests = waiting.get_mut(&cookie).filter(|requests| !requests.is_empty());
        let requests = requests.expect("an answer that nobody asked for");
        match header {
            ReplyHeader::Simple { error: 0, .. } if self.mode == Mode::Simple => {
                let request = requests.remove(0);
                if request.command == Command::Read {
                    assert!(request.len <= output.len() as u64, "the data of a read is cut off");
                    let data = output.split_to(request.len as usize);
                    self.check_data(request.offset, &data);
                }
            }
            ReplyHeader::Simple { .. } => {
                let allowed =
                    |request: &RequestHeader| request.command != Command::Read || self.mode == Mode::Simple;
                let answered = requests.iter().position(allowed);
                requests.remove(answered.expect("a read is answered by a simple reply"));
            }
            ReplyHeader::Chunk { flags, kind, offset, len, .. } => {
                let payload = output.split_to(len as usize).freeze();
                let chunk = Chunk::decode(kind, payload).expect("a chunk that cannot be read");
                self.check_chunk(&chunk, requests, offset);
                if flags.contains(ReplyFlags::DONE) {
                    requests.remove(0);
                }
            }
        }
    }

    fn check_chunk(&self, chunk: &Chunk, requests: &[RequestHeader], offset: u64) {
        let of = |test: &dyn Fn(&RequestHeader) -> bool| requests.iter().any(test);
        if self.mode == Mode::Extended {
            assert!(of(&|request| request.offset == offset), "not the offset of the request");
        }
        let inside = |at: u64, len: u64| {
            of(&|request| {
                request.command == Command::Read
                    && at >= request.offset
                    && at + len <= request.offset.saturating_add(request.len)
            })
        };
        match chunk {
            Chunk::Data { offset, data } => {
                assert!(inside(*offset, data.len() as u64), "data outside the read");
                self.check_data(*offset, data);
            }
            Chunk::Hole { offset, len } => {
                assert!(inside(*offset, u64::from(*len)), "a hole outside the read")
            }
            Chunk::Status { context, extents } => {
                assert!(*context < 2, "a context that was not chosen");
                let total: u64 = extents.iter().map(|extent| extent.len).sum();
                assert!(of(&|request| request.command == Command::BlockStatus
                    && total <= request.len
                    && (!request.flags.contains(CommandFlags::REQ_ONE) || extents.len() == 1)));
            }
            Chunk::None | Chunk::Error { .. } => {}
            Chunk::Unknown(kind) => panic!("a chunk of unknown type {kind}"),
        }
    }

    fn check_data(&self, offset: u64, data: &[u8]) {
        for (at, byte) in data.iter().enumerate() {
            let values = &self.values[offset as usize + at];
            let possible = values[usize::from(byte >> 6)] & 1 << (byte & 63) != 0;
            assert!(possible, "byte {} reads as {byte}, which was never written", offset as usize + at);
        }
    }
}

#[cfg(test)]
mod tests {
    use infill_sim::Rng;

    use super::*;

    fn runs(seeds: std::ops::Range<u64>, make: impl Fn(&mut Rng) -> Vec<u8>) {
        for seed in seeds {
            let data = make(&mut Rng::new(seed));
            let result = std::panic::catch_unwind(|| fuzz_server(&data));
            assert!(result.is_ok(), "seed {seed}");
        }
    }

    #[test]
    fn generated_requests_are_answered_once_and_with_what_was_written() {
        runs(0..500, |rng| {
            let mut data = vec![0; 1 + 8 * rng.below(60) as usize];
            rng.fill(&mut data);
            data[0] &= 0x3f;
            data
        });
    }

    #[test]
    fn arbitrary_bytes_end_the_session_by_the_protocol() {
        runs(0..500, |rng| {
            let mut data = vec![0; rng.range(1, 400) as usize];
            rng.fill(&mut data);
            data
        });
    }

    #[test]
    fn requests_with_a_few_bytes_changed_are_still_judged() {
        runs(0..500, |rng| {
            // A well-formed stream, sent as it is, with some of its bytes replaced.
            let how = rng.below(3) as u8;
            let mode = [Mode::Simple, Mode::Structured, Mode::Extended][usize::from(how)];
            let mut requests = vec![0; 8 * rng.range(1, 20) as usize];
            rng.fill(&mut requests);
            let mut wire = BytesMut::new();
            Model::new(mode).requests(&requests, &mut wire);
            for _ in 0..rng.range(1, 6) {
                let at = rng.index(wire.len());
                wire[at] = rng.next_u64() as u8;
            }
            let mut data = vec![how | 0x80];
            // `how` picks the mode by its rest: keep it.
            data[0] = (0x80_u8..=0xbf).find(|byte| byte % 3 == how).unwrap_or(0x80);
            data.extend_from_slice(&wire);
            data
        });
    }
}
