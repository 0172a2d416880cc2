//! The transmission phase of one connection: receive, run, send.
//!
//! All three are futures of one task, polled in this order whenever something has happened: what was parsed is started in
//! the same turn, what has completed is sent in the same turn.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::future::LocalBoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use infill_base::{ErrorKind, IoError, IoResult};
use infill_storage::stream::{StreamRead, StreamWrite};
use infill_storage::{Permits, rt};

use super::exports::Attached;
use super::handshake::Agreed;
use super::limits::{BYTES_RESERVED, SKIPPED_BYTES_MAX, ServerLimits};
use super::outbox::{Answer, Charge, Failure, Outbox};
use super::request::{Request, Target, changes, cost};
use crate::proto::{Command, RequestHeader};

/// Room for requests that is received into at once, in bytes.
const RECEIVE_BYTES: usize = 64 << 10;
/// A receive is not begun with less room than this, in bytes.
const RECEIVE_BYTES_MIN: usize = 4 << 10;

/// What the three futures share. Only one of them is polled at a time.
struct Session<'a> {
    target: Target,
    limits: &'a ServerLimits,
    total: &'a Permits,
    outbox: RefCell<Outbox>,
    requests: Cell<usize>,
    bytes: Cell<u64>,
    /// New requests are refused.
    closing: Cell<bool>,
    /// Something has changed that a future which was polled before may wait for.
    again: Cell<bool>,
}

/// How receiving has ended.
enum End {
    /// The client has said, or shown, that nothing more comes. It may still want its answers.
    Finished,
    /// There is nobody, or nobody who keeps to the protocol.
    Broken(IoError),
}

/// Serves an agreed connection to its end.
pub(super) async fn transmit(agreed: Agreed, limits: &ServerLimits, total: &Permits) -> IoResult<()> {
    let Agreed { export, info, mode, contexts, mut reader, mut writer, received } = agreed;
    let node = export.export().node.port();
    let session = Session {
        target: Target {
            size: info.size,
            writable: export.export().writable,
            writethrough: export.export().writethrough,
            mode,
            contexts,
            request_align: node.limits().request_align.max(1).into(),
            node,
        },
        limits,
        total,
        outbox: RefCell::new(Outbox::new(mode)),
        requests: Cell::new(0),
        bytes: Cell::new(0),
        closing: Cell::new(false),
        again: Cell::new(false),
    };
    let result = session.run(&export, &mut *reader, &mut *writer, received).await;
    let _ = writer.shutdown().await;
    // Only now: a removal of the export waits for the last request.
    drop(export);
    result
}

impl Session<'_> {
    async fn run(
        &self,
        export: &Attached,
        reader: &mut dyn StreamRead,
        writer: &mut dyn StreamWrite,
        received: BytesMut,
    ) -> IoResult<()> {
        let (reads, writes) = (RefCell::new(FuturesUnordered::new()), RefCell::new(FuturesUnordered::new()));
        let start = |request: Request| {
            let set = if changes(request.header.command) { &writes } else { &reads };
            set.borrow_mut().push(self.target.run(request));
        };
        let mut receive = pin!(self.receive(reader, received, start));
        let mut send = pin!(self.send(writer));
        let mut closed = pin!(self.closed(export));
        let mut deadline: Option<LocalBoxFuture<'static, ()>> = None;
        let mut end: Option<End> = None;
        let mut sending = true;
        poll_fn(|cx| {
            loop {
                if !self.closing.get() && closed.as_mut().poll(cx).is_ready() {
                    self.closing.set(true);
                }
                if end.is_none()
                    && let Poll::Ready(how) = receive.as_mut().poll(cx)
                {
                    end = Some(how);
                }
                self.collect(&writes, cx);
                self.collect(&reads, cx);
                if sending && let Poll::Ready(error) = send.as_mut().poll(cx) {
                    sending = false;
                    end.get_or_insert(End::Broken(error));
                }
                if deadline.is_none() && (end.is_some() || self.closing.get()) {
                    deadline = Some(Box::pin(rt::sleep(self.limits.close_time)));
                }
                let late = |deadline: &mut LocalBoxFuture<'_, ()>| deadline.as_mut().poll(cx).is_ready();
                sending &= !matches!(end, Some(End::Broken(_)));
                if !sending || deadline.as_mut().is_some_and(late) {
                    // Nobody receives what is read now, or has waited long enough.
                    reads.borrow_mut().clear();
                    sending = false;
                }
                let over = (end.is_some() || self.closing.get()) && self.requests.get() == 0;
                if over || (!sending && writes.borrow().is_empty()) {
                    return Poll::Ready(());
                }
                if !self.again.take() {
                    return Poll::Pending;
                }
            }
        })
        .await;
        match end {
            Some(End::Broken(error)) => Err(error),
            _ => Ok(()),
        }
    }

    /// Puts the answers of all requests that have completed into the outbox.
    fn collect<F: Future<Output = Answer>>(&self, set: &RefCell<FuturesUnordered<F>>, cx: &mut Context<'_>) {
        let mut set = set.borrow_mut();
        if set.is_empty() {
            return;
        }
        while let Poll::Ready(Some(answer)) = set.poll_next_unpin(cx) {
            self.outbox.borrow_mut().push(answer);
        }
    }

    /// Completes when the export begins to close.
    async fn closed(&self, export: &Attached) {
        loop {
            let changed = export.changed();
            if export.is_closing() {
                return;
            }
            changed.await;
        }
    }

    /// Sends what is in the outbox, again and again; completes only by an error.
    async fn send(&self, writer: &mut dyn StreamWrite) -> IoError {
        loop {
            // No waker: whoever fills the outbox does so in the same turn, before this is polled.
            poll_fn(|_| if self.outbox.borrow().is_empty() { Poll::Pending } else { Poll::Ready(()) }).await;
            let batch = self.outbox.borrow_mut().take();
            if let Err(error) = writer.write_all(batch.data).await {
                return error;
            }
            self.requests.set(self.requests.get() - batch.charges.len());
            let bytes: u64 = batch.charges.iter().map(|charge| charge.bytes).sum();
            self.bytes.set(self.bytes.get() - bytes);
            self.again.set(true);
        }
    }

    /// Takes requests from the stream and starts them, until there are no more.
    async fn receive(&self, reader: &mut dyn StreamRead, received: BytesMut, start: impl Fn(Request)) -> End {
        let mut stream = Stream { reader, received };
        loop {
            match self.receive_one(&mut stream, &start).await {
                Ok(true) => {}
                Ok(false) => return End::Finished,
                Err(error) => return End::Broken(error),
            }
        }
    }

    /// One request; `false` at the end of the session.
    async fn receive_one(&self, stream: &mut Stream<'_>, start: &impl Fn(Request)) -> IoResult<bool> {
        let mode = self.target.mode;
        let header = loop {
            if let Some(header) = RequestHeader::decode(mode, &mut stream.received)? {
                break header;
            }
            if !stream.receive(RECEIVE_BYTES).await? {
                return match stream.received.is_empty() {
                    true => Ok(false),
                    false => Err(ended_within()),
                };
            }
        };
        if header.command == Command::Disconnect {
            return Ok(false);
        }
        let checked = match self.closing.get() {
            true => Err(Failure::new(ErrorKind::ShuttingDown, "this export is being removed")),
            false => self.target.check(&header),
        };
        let payload_len = header.payload_len(mode);
        match checked {
            Ok(()) => {
                let charge = self.admit(cost(&header)).await;
                let payload = stream.payload(payload_len as usize).await?;
                start(Request { header, payload, charge });
            }
            Err(failure) => {
                stream.skip(payload_len).await?;
                let charge = self.admit(0).await;
                let RequestHeader { cookie, offset, .. } = header;
                self.outbox.borrow_mut().push(Answer { cookie, offset, result: Err(failure), charge });
            }
        }
        Ok(true)
    }

    /// Lets a request in when there is room for it: first in this connection, then among all.
    async fn admit(&self, bytes: u64) -> Charge {
        poll_fn(|_| {
            // No waker: room is made by `send`, which has all be polled again.
            let first = self.requests.get() == 0;
            let room = self.requests.get() < self.limits.requests_in_flight_max
                && self.bytes.get() + bytes <= self.limits.bytes_in_flight_max;
            if first || room { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        self.requests.set(self.requests.get() + 1);
        self.bytes.set(self.bytes.get() + bytes);
        let reserved = self.bytes.get() <= BYTES_RESERVED;
        let permit = if reserved { None } else { Some(self.total.take(bytes).await) };
        Charge { bytes, _permit: permit }
    }
}

/// What comes in.
struct Stream<'a> {
    reader: &'a mut dyn StreamRead,
    received: BytesMut,
}

impl Stream<'_> {
    /// Receives something more, into at least `RECEIVE_BYTES_MIN` of room; `room` is made where there is less. `false`
    /// when the client has closed.
    async fn receive(&mut self, room: usize) -> IoResult<bool> {
        let mut buf = std::mem::take(&mut self.received);
        if buf.capacity() - buf.len() < room.min(RECEIVE_BYTES_MIN) {
            buf.reserve(room);
        }
        let before = buf.len();
        self.received = self.reader.read(buf).await?;
        Ok(self.received.len() > before)
    }

    /// The next `len` bytes, which were let in. They stay where they were received.
    async fn payload(&mut self, len: usize) -> IoResult<Bytes> {
        if len == 0 {
            return Ok(Bytes::new());
        }
        if self.received.len() < len {
            // A place for all of it, so that only what is here already moves.
            self.received.reserve(len - self.received.len());
        }
        while self.received.len() < len {
            if !self.receive(1).await? {
                return Err(ended_within());
            }
        }
        Ok(self.received.split_to(len).freeze())
    }

    /// Throws away the payload of a request that is refused.
    async fn skip(&mut self, len: u64) -> IoResult<()> {
        if len > SKIPPED_BYTES_MAX {
            let why = format!("the client announced a payload of {len} bytes");
            return Err(IoError::new(ErrorKind::TooLarge, why));
        }
        let mut left = len as usize;
        loop {
            let skip = left.min(self.received.len());
            self.received.advance(skip);
            left -= skip;
            if left == 0 {
                return Ok(());
            }
            if !self.receive(RECEIVE_BYTES).await? {
                return Err(ended_within());
            }
        }
    }
}

fn ended_within() -> IoError {
    IoError::new(ErrorKind::Io, "the client closed the connection within a request")
}
