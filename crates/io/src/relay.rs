//! A slow link between two places: forwards connections with a delay and a bandwidth, for demonstrations and tests.
//!
//! Each direction is one FIFO link that all connections share: what is sent waits until the link is free, takes its
//! length / rate, and arrives a fixed delay later. Bytes are counted, so that nobody has to believe what a program says
//! it has fetched. All of it runs on the reactor that started it.
//!
//! Memory: at most [`QUEUED_BYTES_MAX`] a connection and direction; then the sender is not read from.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use event_listener::Event;
use futures_util::future::{Either, select};
use infill_base::IoResult;
use infill_storage::rt;
use infill_storage::stream::{Connection, Connector, StreamRead, StreamWrite};
use infill_storage::sync::atomic::{AtomicU64, Ordering};

use crate::Listener;

/// Bytes under way in one direction of one connection.
pub const QUEUED_BYTES_MAX: usize = 8 << 20;
/// What is received at once: small beside what passes in a millisecond, so that the link is shared fairly.
const PIECE_BYTES: usize = 16 << 10;

/// What kind of link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayOptions {
    /// Time from one end to the other, in each direction: half of a round trip.
    pub delay: Duration,
    /// Bytes per second in each direction; `None`: as many as come.
    pub bytes_per_second: Option<u64>,
}

/// Bytes that have passed, readable from any thread.
#[derive(Debug, Default)]
pub struct RelayBytes {
    to_server: AtomicU64,
    to_client: AtomicU64,
}

impl RelayBytes {
    /// Bytes that clients have sent to the server.
    pub fn to_server(&self) -> u64 {
        self.to_server.load(Ordering::Relaxed)
    }

    /// Bytes that the server has sent to clients.
    pub fn to_client(&self) -> u64 {
        self.to_client.load(Ordering::Relaxed)
    }
}

/// A running relay. Dropped, it listens no more and its connections end.
pub struct Relay {
    link: Rc<Link>,
}

struct Link {
    options: RelayOptions,
    bytes: Arc<RelayBytes>,
    /// When the link is free again, on the runtime's clock: to the server, to the client.
    free_at: [Cell<Duration>; 2],
    /// Raised to end every connection that was begun under an older one.
    era: Cell<u64>,
    ended: Cell<bool>,
    changed: Event,
}

#[derive(Clone, Copy)]
enum Direction {
    ToServer = 0,
    ToClient = 1,
}

impl Relay {
    /// Forwards what comes in at `listener` to `server`, on this thread's reactor.
    pub fn start(listener: Listener, server: Arc<dyn Connector>, options: RelayOptions) -> Relay {
        let link = Rc::new(Link {
            options,
            bytes: Arc::default(),
            free_at: Default::default(),
            era: Cell::new(0),
            ended: Cell::new(false),
            changed: Event::new(),
        });
        rt::spawn(accept(listener, server, link.clone()));
        Relay { link }
    }

    /// The count of what has passed.
    pub fn bytes(&self) -> Arc<RelayBytes> {
        self.link.bytes.clone()
    }

    /// Ends every connection; new ones are taken.
    pub fn cut(&self) {
        self.link.next_era();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.link.ended.set(true);
        self.link.next_era();
    }
}

impl Link {
    fn next_era(&self) {
        self.era.set(self.era.get() + 1);
        self.changed.notify(usize::MAX);
    }

    /// Waits until `era` is over.
    async fn era_over(&self, era: u64) {
        loop {
            let changed = self.changed.listen();
            if self.era.get() != era {
                return;
            }
            changed.await;
        }
    }

    /// When `len` bytes that are sent now arrive.
    fn arrival(&self, direction: Direction, len: usize) -> Duration {
        let free_at = &self.free_at[direction as usize];
        let start = free_at.get().max(rt::now());
        let takes = match self.options.bytes_per_second {
            Some(rate) => Duration::from_secs_f64(len as f64 / rate.max(1) as f64),
            None => Duration::ZERO,
        };
        free_at.set(start + takes);
        start + takes + self.options.delay
    }

    fn count(&self, direction: Direction, len: usize) {
        let counter = match direction {
            Direction::ToServer => &self.bytes.to_server,
            Direction::ToClient => &self.bytes.to_client,
        };
        counter.fetch_add(len as u64, Ordering::Relaxed);
    }
}

async fn accept(listener: Listener, server: Arc<dyn Connector>, link: Rc<Link>) {
    while !link.ended.get() {
        let era = link.era.get();
        let accepted = match select(pin!(listener.accept()), pin!(link.era_over(era))).await {
            Either::Left((Ok(accepted), _)) => accepted,
            Either::Left((Err(error), _)) => {
                tracing::warn!(%error, "the relay cannot take a connection");
                return;
            }
            Either::Right(_) => continue,
        };
        let (server, link) = (server.clone(), link.clone());
        rt::spawn(async move {
            let connections = async { IoResult::Ok((accepted.into_connection()?, server.connect().await?)) };
            match connections.await {
                Ok((client, server)) => forward(client, server, &link, era).await,
                Err(error) => tracing::warn!(%error, "the relay cannot reach the server"),
            }
        });
    }
}

/// Forwards both directions until both are over, or the era is.
async fn forward(client: Connection, server: Connection, link: &Rc<Link>, era: u64) {
    let there = one_way(client.reader, server.writer, link, Direction::ToServer);
    let back = one_way(server.reader, client.writer, link, Direction::ToClient);
    select(pin!(futures_util::future::join(there, back)), pin!(link.era_over(era))).await;
}

/// Pieces on their way, each with the instant of its arrival.
#[derive(Default)]
struct Queue {
    pieces: RefCell<VecDeque<(Duration, Bytes)>>,
    bytes: Cell<usize>,
    /// The sender has closed.
    closed: Cell<bool>,
    changed: Event,
}

async fn one_way(
    reader: Box<dyn StreamRead>,
    writer: Box<dyn StreamWrite>,
    link: &Rc<Link>,
    direction: Direction,
) {
    let queue = Queue::default();
    futures_util::future::join(receive(reader, &queue, link, direction), deliver(writer, &queue)).await;
}

async fn receive(mut reader: Box<dyn StreamRead>, queue: &Queue, link: &Link, direction: Direction) {
    let mut buf = BytesMut::new();
    loop {
        while queue.bytes.get() >= QUEUED_BYTES_MAX && !queue.closed.get() {
            let changed = queue.changed.listen();
            if queue.bytes.get() >= QUEUED_BYTES_MAX && !queue.closed.get() {
                changed.await;
            }
        }
        buf.reserve(PIECE_BYTES);
        buf = match reader.read(buf).await {
            Ok(buf) if !buf.is_empty() && !queue.closed.get() => buf,
            _ => break,
        };
        let piece = buf.split().freeze();
        link.count(direction, piece.len());
        queue.bytes.set(queue.bytes.get() + piece.len());
        queue.pieces.borrow_mut().push_back((link.arrival(direction, piece.len()), piece));
        queue.changed.notify(usize::MAX);
    }
    queue.closed.set(true);
    queue.changed.notify(usize::MAX);
}

async fn deliver(mut writer: Box<dyn StreamWrite>, queue: &Queue) {
    loop {
        let changed = queue.changed.listen();
        let next = queue.pieces.borrow_mut().pop_front();
        let Some((arrival, piece)) = next else {
            if queue.closed.get() {
                let _ = writer.shutdown().await;
                return;
            }
            changed.await;
            continue;
        };
        let now = rt::now();
        if arrival > now {
            rt::sleep(arrival - now).await;
        }
        let len = piece.len();
        if writer.write_all(piece.into()).await.is_err() {
            queue.closed.set(true);
            queue.pieces.borrow_mut().clear();
        }
        queue.bytes.set(queue.bytes.get() - len);
        queue.changed.notify(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Address, Reactors, connector};

    fn socket(dir: &tempfile::TempDir, name: &str) -> Address {
        Address::Unix(dir.path().join(name))
    }

    /// Answers every piece with the same bytes.
    async fn echo(listener: Listener) {
        while let Ok(accepted) = listener.accept().await {
            let Connection { mut reader, mut writer, .. } = accepted.into_connection().unwrap();
            rt::spawn(async move {
                while let Ok(buf) = reader.read(BytesMut::with_capacity(4096)).await {
                    if buf.is_empty() || writer.write_all(buf.freeze().into()).await.is_err() {
                        return;
                    }
                }
            });
        }
    }

    async fn exchange(connection: &mut Connection, len: usize) -> IoResult<BytesMut> {
        connection.writer.write_all(vec![7; len].into()).await?;
        let mut got = BytesMut::with_capacity(len);
        while got.len() < len {
            let before = got.len();
            got = connection.reader.read(got).await?;
            if got.len() == before {
                break;
            }
        }
        Ok(got)
    }

    #[test]
    fn bytes_arrive_whole_not_before_their_time_and_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let (far, near) = (socket(&dir, "far"), socket(&dir, "near"));
        Reactors::start(1).unwrap().block_on(move || async move {
            rt::spawn(echo(Listener::bind(&far).unwrap()));
            let delay = Duration::from_millis(5);
            let options = RelayOptions { delay, bytes_per_second: Some(10_000_000) };
            let relay = Relay::start(Listener::bind(&near).unwrap(), connector(&far), options);
            let mut connection = connector(&near).connect().await.unwrap();
            let start = rt::now();
            let got = exchange(&mut connection, 100_000).await.unwrap();
            assert!(got.len() == 100_000 && got.iter().all(|byte| *byte == 7));
            // A lower bound: two delays, and the bytes at their rate.
            assert!(rt::now() - start >= 2 * delay + Duration::from_millis(10));
            assert_eq!((relay.bytes().to_server(), relay.bytes().to_client()), (100_000, 100_000));
        });
    }

    #[test]
    fn a_cut_ends_connections_and_takes_new_ones_and_a_drop_takes_none() {
        let dir = tempfile::tempdir().unwrap();
        let (far, near) = (socket(&dir, "far"), socket(&dir, "near"));
        Reactors::start(1).unwrap().block_on(move || async move {
            rt::spawn(echo(Listener::bind(&far).unwrap()));
            let options = RelayOptions { delay: Duration::ZERO, bytes_per_second: None };
            let relay = Relay::start(Listener::bind(&near).unwrap(), connector(&far), options);
            let mut connection = connector(&near).connect().await.unwrap();
            assert_eq!(exchange(&mut connection, 10).await.unwrap().len(), 10);
            relay.cut();
            let rest = connection.reader.read(BytesMut::with_capacity(1)).await;
            assert!(rest.is_err() || rest.unwrap().is_empty());
            let mut connection = connector(&near).connect().await.unwrap();
            assert_eq!(exchange(&mut connection, 10).await.unwrap().len(), 10);
            drop(relay);
            let rest = connection.reader.read(BytesMut::with_capacity(1)).await;
            assert!(rest.is_err() || rest.unwrap().is_empty());
            // The socket file goes with the listener.
            while connector(&near).connect().await.is_ok() {
                rt::sleep(Duration::from_millis(1)).await;
            }
        });
    }
}
