//! Monitors: one conversation each, on the control reactor.
//!
//! What a monitor is to be sent waits in its own [`Outbox`]. Answers wait for room there, so a client that asks without
//! reading stops itself; an event never waits: a client that does not read for so long that [`OUTBOX_BYTES_MAX`] of them
//! have gathered is cut off, and finds out where things stand by asking when it comes back.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::pin::pin;
use std::rc::{Rc, Weak};

use bytes::{Bytes, BytesMut};
use event_listener::Event;
use futures_util::future::{Either, select};
use infill_base::Gather;
use infill_io::Accepted;
use infill_qmp::{Incoming, Session, answer, encode};
use infill_storage::rt;
use infill_storage::stream::{Connection, StreamWrite};

use super::chardev::{Chardev, standard};
use super::control::{Control, version};

/// Bytes that wait for one monitor.
const OUTBOX_BYTES_MAX: usize = 1 << 20;
/// Bytes that are read from a monitor at a time.
const READ_BYTES: usize = 16 << 10;
/// Clients of one monitor's socket at a time; the next ones wait in the kernel's queue.
const CLIENTS_MAX: usize = 16;

/// What waits for one monitor.
#[derive(Default)]
struct Outbox {
    queue: RefCell<VecDeque<Bytes>>,
    bytes: Cell<usize>,
    /// Whether the client has negotiated, so that it is sent events.
    listens: Cell<bool>,
    /// The conversation is over, from either side.
    closed: Cell<bool>,
    /// The client sends nothing more: what is queued is sent, then it is over.
    finished: Cell<bool>,
    changed: Event,
}

impl Outbox {
    fn push(&self, line: Bytes) {
        self.bytes.set(self.bytes.get() + line.len());
        self.queue.borrow_mut().push_back(line);
        self.changed.notify(usize::MAX);
    }

    /// Queues an answer once there is room.
    async fn send(&self, line: Vec<u8>) {
        loop {
            let changed = self.changed.listen();
            if self.closed.get() {
                return;
            }
            if self.bytes.get() < OUTBOX_BYTES_MAX {
                return self.push(line.into());
            }
            changed.await;
        }
    }

    /// Queues an event, or cuts the client off.
    fn tell(&self, line: &Bytes) {
        if !self.listens.get() || self.closed.get() {
            return;
        }
        if self.bytes.get() + line.len() > OUTBOX_BYTES_MAX {
            tracing::warn!("a monitor that does not read its events is disconnected");
            return self.close();
        }
        self.push(line.clone());
    }

    fn close(&self) {
        self.closed.set(true);
        self.queue.borrow_mut().clear();
        self.bytes.set(0);
        self.changed.notify(usize::MAX);
    }

    /// Completes when the conversation is over.
    async fn over(&self) {
        loop {
            let changed = self.changed.listen();
            if self.closed.get() {
                return;
            }
            changed.await;
        }
    }

    /// Sends what is queued, as it comes, until the conversation is over.
    async fn run(&self, mut writer: Box<dyn StreamWrite>) {
        loop {
            let changed = self.changed.listen();
            let lines: Vec<Bytes> = self.queue.borrow_mut().drain(..).collect();
            if lines.is_empty() {
                if self.closed.get() || self.finished.get() {
                    return self.close();
                }
                changed.await;
                continue;
            }
            let mut batch = Gather::new();
            for line in lines {
                batch.push(line);
            }
            let length = batch.len();
            let sent = {
                let sending = pin!(writer.write_all(batch));
                match select(sending, pin!(self.over())).await {
                    Either::Left((sent, _)) => sent.is_ok(),
                    Either::Right(_) => false,
                }
            };
            if !sent {
                return self.close();
            }
            // Counted until it was taken: a client that does not read has its queue filled.
            self.bytes.set(self.bytes.get().saturating_sub(length));
            self.changed.notify(usize::MAX);
        }
    }
}

/// All monitors that are connected.
#[derive(Default)]
pub struct Monitors {
    outboxes: RefCell<Vec<Weak<Outbox>>>,
    /// Commands that were not answered yet.
    unanswered: Cell<usize>,
    answered: Event,
}

impl Monitors {
    fn all(&self) -> Vec<Rc<Outbox>> {
        let mut outboxes = self.outboxes.borrow_mut();
        outboxes.retain(|outbox| outbox.strong_count() > 0);
        outboxes.iter().filter_map(Weak::upgrade).collect()
    }

    fn join(&self) -> Rc<Outbox> {
        let outbox = Rc::new(Outbox::default());
        self.outboxes.borrow_mut().push(Rc::downgrade(&outbox));
        outbox
    }

    /// Sends a message to everybody who has negotiated.
    pub fn tell(&self, line: Vec<u8>) {
        let line = Bytes::from(line);
        for outbox in self.all() {
            outbox.tell(&line);
        }
    }

    /// Waits until every command is answered and everybody has taken what waits for him.
    pub async fn drained(&self) {
        loop {
            let answered = self.answered.listen();
            if self.unanswered.get() == 0 {
                break;
            }
            answered.await;
        }
        for outbox in self.all() {
            loop {
                let changed = outbox.changed.listen();
                if outbox.closed.get() || outbox.bytes.get() == 0 {
                    break;
                }
                changed.await;
            }
        }
    }
}

/// Serves a monitor's device for ever.
pub async fn serve(control: Rc<Control>, device: Chardev) {
    match device {
        Chardev::Stdio => {
            if let Some(connection) = standard() {
                talk(&control, connection).await;
            }
        }
        Chardev::Client(connection) => talk(&control, connection).await,
        Chardev::Server(listener, first) => {
            let clients = Rc::new(Clients::default());
            if let Some(first) = first {
                clients.clone().begin(&control, first);
            }
            loop {
                clients.room().await;
                match listener.accept().await {
                    Ok(accepted) => {
                        tracing::info!(peer = accepted.peer(), "a monitor");
                        clients.clone().begin(&control, accepted);
                    }
                    Err(error) => {
                        tracing::warn!(%error, "no monitor could be accepted; trying again");
                        rt::sleep(std::time::Duration::from_millis(200)).await;
                    }
                }
            }
        }
    }
}

/// Clients of one socket.
#[derive(Default)]
struct Clients {
    count: Cell<usize>,
    left: Event,
}

impl Clients {
    async fn room(&self) {
        loop {
            let left = self.left.listen();
            if self.count.get() < CLIENTS_MAX {
                return;
            }
            left.await;
        }
    }

    fn begin(self: Rc<Self>, control: &Rc<Control>, accepted: Accepted) {
        let connection = match accepted.into_connection() {
            Ok(connection) => connection,
            Err(error) => return tracing::warn!(%error, "a monitor's connection could not be used"),
        };
        self.count.set(self.count.get() + 1);
        let control = control.clone();
        rt::spawn(async move {
            talk(&control, connection).await;
            self.count.set(self.count.get() - 1);
            self.left.notify(usize::MAX);
        });
    }
}

/// One conversation, to its end.
async fn talk(control: &Rc<Control>, connection: Connection) {
    let Connection { mut reader, writer, peer } = connection;
    let outbox = control.monitors().join();
    let sending = outbox.clone();
    rt::spawn(async move { sending.run(writer).await });
    let mut session = Session::new(version());
    outbox.send(session.greeting()).await;
    loop {
        while let Some(incoming) = session.take() {
            match incoming {
                Incoming::Answer(line) => outbox.send(line).await,
                Incoming::Request(request) => {
                    let monitors = control.monitors();
                    monitors.unanswered.set(monitors.unanswered.get() + 1);
                    let outcome = control.execute(&request.name, request.arguments).await;
                    outbox.send(encode(&answer(outcome, request.id))).await;
                    monitors.unanswered.set(monitors.unanswered.get() - 1);
                    monitors.answered.notify(usize::MAX);
                }
            }
            outbox.listens.set(session.is_negotiated());
            if outbox.closed.get() || control.has_ended() {
                return;
            }
        }
        let reading = pin!(reader.read(BytesMut::with_capacity(READ_BYTES)));
        let bytes = match select(reading, pin!(outbox.over())).await {
            Either::Left((Ok(bytes), _)) if !bytes.is_empty() => bytes,
            Either::Left((Err(error), _)) => {
                tracing::debug!(%error, peer, "a monitor's connection ended");
                break;
            }
            Either::Left(_) | Either::Right(_) => break,
        };
        session.push(&bytes);
    }
    outbox.listens.set(false);
    outbox.finished.set(true);
    outbox.changed.notify(usize::MAX);
    outbox.over().await;
}
