//! Control connections between daemons: lines of JSON ([`Frame`]) in both directions over one stream, which the source opens
//! and opens again when it is lost.
//!
//! What is said while there is no connection is lost, as anything may be: the machines say it again. A peer that does not
//! read, or talks nonsense, loses its connection and nothing else.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use event_listener::Event;
use futures_util::future::{Either, select};
use infill_base::{ErrorKind, Gather, IoError, IoResult};
use infill_io::{Address, connector};
use infill_migrate::{FRAME_BYTES_MAX, Frame, WIRE_VERSION};
use infill_nbd::ClientTls;
use infill_storage::rt;
use infill_storage::stream::{Connection, StreamRead, StreamWrite};

use super::secure;

/// What may wait to be sent, in bytes; more is lost.
const QUEUE_BYTES_MAX: usize = 2 * FRAME_BYTES_MAX;
/// How much is read at a time, in bytes.
const READ_BYTES: usize = 64 << 10;
/// What a record of TLS begins with that a line does not: an alert, or a greeting.
const TLS_RECORDS: [u8; 2] = [21, 22];
/// How long the peer may take to say who it is.
const HELLO_TIME: Duration = Duration::from_secs(10);
/// How long the source waits before it connects again, at first and at most.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// One end of a control connection, whether it is up or not.
#[derive(Default)]
pub(super) struct Link {
    queue: RefCell<VecDeque<Bytes>>,
    bytes: Cell<usize>,
    up: Cell<bool>,
    closed: Cell<bool>,
    changed: Event,
    /// What is said first over every connection.
    first: RefCell<Option<Frame>>,
    /// Where the peer's exports are, as it says.
    data: RefCell<Option<String>>,
    /// Why there is no connection.
    trouble: RefCell<Option<String>>,
}

impl Link {
    /// Sends a frame, if somebody is there.
    pub(super) fn say(&self, frame: &Frame) {
        if !self.up.get() {
            return;
        }
        let line = Bytes::from(frame.encode());
        if self.bytes.get() + line.len() > QUEUE_BYTES_MAX {
            tracing::warn!("the peer of a migration does not read what it is told");
            return;
        }
        self.bytes.set(self.bytes.get() + line.len());
        self.queue.borrow_mut().push_back(line);
        self.changed.notify(usize::MAX);
    }

    /// Whether the peer is there.
    pub(super) fn is_up(&self) -> bool {
        self.up.get()
    }

    /// Why the peer is not there, where that is known.
    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.borrow().clone().filter(|_| !self.is_up())
    }

    /// Where the peer's exports are.
    pub(super) fn data(&self) -> Option<String> {
        self.data.borrow().clone()
    }

    /// Says this first over every connection.
    pub(super) fn begin_with(&self, frame: Frame) {
        self.first.replace(Some(frame));
    }

    /// Ends it for good.
    pub(super) fn close(&self) {
        self.closed.set(true);
        self.changed.notify(usize::MAX);
    }

    async fn until_closed(&self) {
        loop {
            let changed = self.changed.listen();
            if self.closed.get() {
                return;
            }
            changed.await;
        }
    }

    async fn send(&self, writer: &mut dyn StreamWrite) -> IoResult<()> {
        loop {
            let changed = self.changed.listen();
            let line = self.queue.borrow_mut().pop_front();
            let Some(line) = line else {
                changed.await;
                continue;
            };
            self.bytes.set(self.bytes.get().saturating_sub(line.len()));
            let mut data = Gather::new();
            data.push(line);
            writer.write_all(data).await?;
        }
    }

    /// Talks over one connection to its end, which is always an error's or the peer's wish.
    pub(super) async fn talk(
        &self,
        connection: Connection,
        hello: Frame,
        mut heard: impl FnMut(Frame),
    ) -> IoResult<()> {
        let Connection { reader, mut writer, .. } = connection;
        let mut lines = Lines { reader, buf: BytesMut::new(), searched: 0 };
        let greeting = async {
            let mut data = Gather::new();
            data.push(Bytes::from(hello.encode()));
            writer.write_all(data).await?;
            lines.next().await
        };
        let late = || Err(IoError::new(ErrorKind::TimedOut, "the peer does not say who it is"));
        match rt::timeout(HELLO_TIME, greeting).await.unwrap_or_else(late)? {
            Some(Frame::Hello { version: WIRE_VERSION, data }) => *self.data.borrow_mut() = data,
            Some(Frame::Hello { version, .. }) => {
                let why = format!(
                    "the peer speaks version {version} of the migration's protocol, this daemon {WIRE_VERSION}: bring both to \
                     the same release"
                );
                return Err(IoError::new(ErrorKind::Unsupported, why));
            }
            Some(_) => return Err(IoError::new(ErrorKind::InvalidInput, "the peer does not greet")),
            None => {
                return Err(IoError::new(
                    ErrorKind::SourceLost,
                    "the peer hangs up before it says who it is",
                ));
            }
        }
        self.queue.borrow_mut().clear();
        self.bytes.set(0);
        self.up.set(true);
        if let Some(first) = &*self.first.borrow() {
            self.say(first);
        }
        let receiving = async {
            while let Some(frame) = lines.next().await? {
                heard(frame);
            }
            Ok(())
        };
        let ended = {
            let both = pin!(async {
                match select(pin!(receiving), pin!(self.send(&mut *writer))).await {
                    Either::Left((ended, _)) | Either::Right((ended, _)) => ended,
                }
            });
            match select(both, pin!(self.until_closed())).await {
                Either::Left((ended, _)) => ended,
                Either::Right(_) => Ok(()),
            }
        };
        self.up.set(false);
        ended
    }
}

/// Keeps a connection to `address`, by TLS where that is given, while the link is not closed. What the peer says is
/// `heard`; that one of the two does not take the other at all is said to `refused`, each time.
pub(super) async fn dial(
    link: Rc<Link>,
    address: Address,
    tls: Option<ClientTls>,
    hello: Frame,
    heard: impl Fn(Frame) + Clone,
    refused: impl Fn(String),
) {
    let connector = connector(&address);
    let mut pause = PAUSE_MIN;
    let mut told = String::new();
    while !link.closed.get() {
        let began = rt::now();
        let ended = async {
            let connection = connector.connect().await?;
            let connection = match &tls {
                Some(tls) => secure::connect(tls, connection).await?,
                None => connection,
            };
            link.talk(connection, hello.clone(), heard.clone()).await
        };
        if let Err(error) = ended.await {
            let why = format!("{address}: {error}");
            link.trouble.replace(Some(why.clone()));
            if told != why {
                tracing::warn!("the migration's peer {why}");
                told.clone_from(&why);
            }
            if matches!(error.kind(), ErrorKind::NotPermitted | ErrorKind::Unsupported) {
                refused(why);
            }
        }
        pause = if rt::now() - began > PAUSE_MAX { PAUSE_MIN } else { (pause * 2).min(PAUSE_MAX) };
        rt::timeout(pause, link.until_closed()).await;
    }
}

/// The lines that come in.
struct Lines {
    reader: Box<dyn StreamRead>,
    buf: BytesMut,
    /// Bytes of `buf` without an end of a line.
    searched: usize,
}

impl Lines {
    /// The next frame; `None` when the peer has closed.
    async fn next(&mut self) -> IoResult<Option<Frame>> {
        loop {
            if self.buf.first().is_some_and(|first| TLS_RECORDS.contains(first)) {
                let why = "the peer speaks TLS, and this daemon does not: start it with --migration …,tls-creds=DIR, too";
                return Err(IoError::new(ErrorKind::NotPermitted, why));
            }
            if let Some(end) = self.buf[self.searched..].iter().position(|byte| *byte == b'\n') {
                let line = self.buf.split_to(self.searched + end + 1);
                self.searched = 0;
                let frame = Frame::decode(&line);
                return frame
                    .map(Some)
                    .map_err(|error| IoError::new(ErrorKind::InvalidInput, error.to_string()));
            }
            self.searched = self.buf.len();
            if self.buf.len() > FRAME_BYTES_MAX {
                let why = format!("the peer says more than {FRAME_BYTES_MAX} bytes in one line");
                return Err(IoError::new(ErrorKind::TooLarge, why));
            }
            self.buf.reserve(READ_BYTES);
            let before = self.buf.len();
            self.buf = self.reader.read(std::mem::take(&mut self.buf)).await?;
            if self.buf.len() == before {
                return Ok(None);
            }
        }
    }
}
