//! An encrypted byte stream over another one.
//!
//! TLS itself is sans-I/O (`rustls`): the halves of the stream carry its records. Both halves are futures of one reactor,
//! work beside each other, and share the TLS state for the time of a computation, never across an await.
//!
//! * What never happens: an end of the stream without the other side's close_notify that is taken for its end (it is an
//!   error: somebody may have cut it), a byte in the clear after the handshake has begun, a record that is begun and
//!   followed by something else (after a send that was dropped midway nothing is sent any more).
//! * What it costs: a connection holds at most [`RECEIVE_BYTES`] that were received and not decrypted, a record or
//!   handshake message of at most 64 KiB, 16 KiB that were decrypted and not read, [`SEND_BYTES`] on their way out (twice
//!   while records are made of them), and some KiB of state. Measured, 50 clients of one server: 16 KiB a connection more
//!   than in the clear while it is idle, 190 KiB more once it has sent 4 MiB at a time. A payload byte is copied three
//!   times on its way in and once on its way out; a handshake computes on its reactor, for longer the longer
//!   the keys are.
//! * Its time is the caller's, except for the last words ([`LAST_WORDS_TIME`]): an alert or close_notify is sent to those
//!   who read, and nobody else is waited for.

use std::cell::RefCell;
use std::io::{self, BufRead, IoSlice, Write};
use std::rc::Rc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use futures_util::future::LocalBoxFuture;
use infill_base::{ErrorKind, Gather, IoError, IoResult};
use infill_storage::rt;
use infill_storage::stream::{Connection, StreamRead, StreamWrite};
use rustls::Connection as Tls;
use smallvec::SmallVec;

use super::explain::failure;

/// Room for records that are received at once, in bytes: four of the longest ones.
const RECEIVE_BYTES: usize = 64 << 10;
/// Plaintext that is encrypted for one send, in bytes.
const SEND_BYTES: usize = 128 << 10;
/// How long an alert or close_notify may take, and how long a peer that was refused may take to hear why.
const LAST_WORDS_TIME: Duration = Duration::from_secs(1);
/// What a peer that was refused may still send until it has heard why, in bytes.
const LAST_WORDS_BYTES: usize = 256 << 10;

/// Agrees on TLS over `connection`, on which `received` has come already. `peer` is who is at the other end, whom `admit` may
/// refuse by what it has shown.
pub(super) async fn handshake(
    mut tls: Tls,
    connection: Connection,
    received: BytesMut,
    peer: &'static str,
    admit: impl FnOnce(&Tls) -> IoResult<()>,
) -> IoResult<Connection> {
    tls.set_buffer_limit(Some(SEND_BYTES));
    let Connection { reader: raw_reader, writer: raw_writer, peer: name } = connection;
    let tls = Rc::new(RefCell::new(tls));
    let mut writer = Writer { tls: tls.clone(), raw: raw_writer, out: BytesMut::new(), broken: false };
    let mut reader = Reader { tls: tls.clone(), raw: raw_reader, wire: received, peer };
    loop {
        writer.flush().await?;
        if !tls.borrow().is_handshaking() {
            break;
        }
        if reader.wire.is_empty() && !reader.receive().await? {
            let why = format!("the {peer} hung up during the TLS handshake");
            return Err(IoError::new(ErrorKind::SourceLost, why));
        }
        if let Err(error) = reader.feed() {
            refuse(reader, writer).await;
            return Err(error);
        }
    }
    let admitted = admit(&tls.borrow());
    if let Err(error) = admitted {
        tls.borrow_mut().send_close_notify();
        refuse(reader, writer).await;
        return Err(error);
    }
    Ok(Connection { reader: Box::new(reader), writer: Box::new(writer), peer: name })
}

/// Says why (the alert that waits), and lets the peer hear it: a socket that is closed over unread data would take it back.
async fn refuse(mut reader: Reader, mut writer: Writer) {
    let last_words = async {
        if writer.flush().await.is_err() || writer.raw.shutdown().await.is_err() {
            return;
        }
        let mut heard = 0;
        while heard < LAST_WORDS_BYTES {
            reader.wire.clear();
            match reader.receive().await {
                Ok(true) => heard += reader.wire.len(),
                Ok(false) | Err(_) => return,
            }
        }
    };
    rt::timeout(LAST_WORDS_TIME, last_words).await;
}

/// The receiving half.
struct Reader {
    tls: Rc<RefCell<Tls>>,
    raw: Box<dyn StreamRead>,
    /// What was received and not given to TLS yet.
    wire: BytesMut,
    peer: &'static str,
}

impl Reader {
    /// Receives something; `false` when the peer has closed the stream below.
    async fn receive(&mut self) -> IoResult<bool> {
        let mut wire = std::mem::take(&mut self.wire);
        wire.reserve(RECEIVE_BYTES);
        let before = wire.len();
        self.wire = self.raw.read(wire).await?;
        Ok(self.wire.len() > before)
    }

    /// Gives TLS some of what was received, and has it decrypted.
    fn feed(&mut self) -> IoResult<()> {
        let mut tls = self.tls.borrow_mut();
        let mut input = &self.wire[..];
        let taken = tls.read_tls(&mut input)?;
        self.wire.advance(taken);
        tls.process_new_packets().map_err(|error| failure(&error, self.peer))?;
        Ok(())
    }

    /// Moves decrypted bytes into the room of `buf`. `false`: the peer has said that nothing more comes.
    fn decrypted(&self, buf: &mut BytesMut) -> IoResult<bool> {
        let mut tls = self.tls.borrow_mut();
        loop {
            let room = buf.capacity() - buf.len();
            let mut reader = tls.reader();
            let chunk = match reader.fill_buf() {
                Ok([]) => return Ok(false),
                Ok(chunk) => chunk,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error.into()),
            };
            let take = chunk.len().min(room);
            buf.extend_from_slice(&chunk[..take]);
            reader.consume(take);
            if take == room {
                return Ok(true);
            }
        }
    }
}

impl StreamRead for Reader {
    fn read(&mut self, buf: BytesMut) -> LocalBoxFuture<'_, IoResult<BytesMut>> {
        Box::pin(async move {
            let mut buf = buf;
            debug_assert!(buf.capacity() > buf.len(), "nowhere to receive to");
            let before = buf.len();
            loop {
                let more = self.decrypted(&mut buf)?;
                let full = buf.len() == buf.capacity();
                if !more || full || (buf.len() > before && self.wire.is_empty()) {
                    return Ok(buf);
                }
                if self.wire.is_empty() && !self.receive().await? {
                    let why = format!(
                        "the connection was lost: the {} has not said that its TLS stream ends here",
                        self.peer
                    );
                    return Err(IoError::new(ErrorKind::SourceLost, why));
                }
                self.feed()?;
            }
        })
    }
}

/// The sending half.
struct Writer {
    tls: Rc<RefCell<Tls>>,
    raw: Box<dyn StreamWrite>,
    /// Reused for every send.
    out: BytesMut,
    /// A send was dropped midway or has failed: the stream below may end within a record.
    broken: bool,
}

/// Collects records.
struct Collect<'a>(&'a mut BytesMut);

impl Write for Collect<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Writer {
    /// Sends the records that wait.
    async fn flush(&mut self) -> IoResult<()> {
        if self.broken {
            return Err(IoError::new(ErrorKind::Io, "an earlier send was not finished"));
        }
        {
            let mut tls = self.tls.borrow_mut();
            while tls.wants_write() {
                tls.write_tls(&mut Collect(&mut self.out))?;
            }
        }
        if self.out.is_empty() {
            return Ok(());
        }
        self.broken = true;
        self.raw.write_all(Gather::from(self.out.split().freeze())).await?;
        self.broken = false;
        Ok(())
    }
}

impl StreamWrite for Writer {
    fn write_all(&mut self, data: Gather) -> LocalBoxFuture<'_, IoResult<()>> {
        Box::pin(async move {
            let mut left = data;
            while !left.is_empty() {
                let taken = {
                    let slices: SmallVec<[IoSlice<'_>; 8]> =
                        left.runs().iter().map(|run| IoSlice::new(run)).collect();
                    self.tls.borrow_mut().writer().write_vectored(&slices)?
                };
                if taken == 0 {
                    // TLS 1.2 cannot change its keys: after some hundred GiB they are used up, and this connection is over.
                    let why = "the keys of this TLS connection are used up: a new one is needed";
                    return Err(IoError::new(ErrorKind::SourceLost, why));
                }
                left = left.slice(taken, left.len() - taken);
                self.flush().await?;
            }
            Ok(())
        })
    }

    fn shutdown(&mut self) -> LocalBoxFuture<'_, IoResult<()>> {
        Box::pin(async move {
            if !self.broken {
                self.tls.borrow_mut().send_close_notify();
                // Whoever does not read it does not need it.
                rt::timeout(LAST_WORDS_TIME, self.flush()).await;
            }
            self.raw.shutdown().await
        })
    }
}
