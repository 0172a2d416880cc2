//! A bad link between two places: forwards connections with a delay and a bandwidth, and with the troubles that a test
//! orders ([`RelayControl`]), for demonstrations and tests.
//!
//! Each direction is one FIFO link that all connections share: what is sent waits until the link is free, takes its
//! length / rate, and arrives a fixed delay later. Bytes are counted, so that nobody has to believe what a program says
//! it has fetched. All of it runs on the reactor that started it; the control is any thread's.
//!
//! The troubles: everything cut, with an orderly end or a reset; a direction that swallows everything until it is released
//! (the kernels of both ends go on to acknowledge, so that nobody is told of it by TCP); a bit that is flipped.
//!
//! Memory: at most [`QUEUED_BYTES_MAX`] a connection and direction; then the sender is not read from.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use event_listener::Event;
use futures_util::future::{Either, select};
use infill_base::IoResult;
use infill_storage::rt;
use infill_storage::stream::{Connector, StreamRead, StreamWrite};
use infill_storage::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use infill_storage::sync::{Arc, Mutex, lock};

use crate::{Accepted, Listener};

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

/// A way through the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From clients to the server.
    ToServer = 0,
    /// From the server to clients.
    ToClient = 1,
}

/// A running relay. Dropped, it listens no more and its connections end.
pub struct Relay {
    link: Rc<Link>,
}

/// Makes trouble on a link, from any thread.
#[derive(Clone)]
pub struct RelayControl(Arc<Control>);

struct Control {
    options: Mutex<RelayOptions>,
    bytes: Arc<RelayBytes>,
    /// Raised to end every connection that was begun under an older one.
    era: AtomicU64,
    /// The last end was a reset.
    resets: AtomicBool,
    ended: AtomicBool,
    /// By direction: nothing arrives.
    held: [AtomicBool; 2],
    /// By direction: pieces of which a bit is flipped, the next ones.
    damaged: [AtomicU64; 2],
    changed: Event,
}

struct Link {
    control: Arc<Control>,
    /// When the link is free again, on the runtime's clock: to the server, to the client.
    free_at: [Cell<Duration>; 2],
}

impl Relay {
    /// Forwards what comes in at `listener` to `server`, on this thread's reactor.
    pub fn start(listener: Listener, server: Arc<dyn Connector>, options: RelayOptions) -> Relay {
        let control = Control {
            options: Mutex::new(options),
            bytes: Arc::default(),
            era: AtomicU64::new(0),
            resets: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            held: Default::default(),
            damaged: Default::default(),
            changed: Event::new(),
        };
        let link = Rc::new(Link { control: Arc::new(control), free_at: Default::default() });
        rt::spawn(accept(listener, server, link.clone()));
        Relay { link }
    }

    /// The count of what has passed.
    pub fn bytes(&self) -> Arc<RelayBytes> {
        self.link.control.bytes.clone()
    }

    /// A handle that makes trouble.
    pub fn control(&self) -> RelayControl {
        RelayControl(self.link.control.clone())
    }

    /// Ends every connection; new ones are taken.
    pub fn cut(&self) {
        self.control().cut();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.link.control.ended.store(true, Ordering::SeqCst);
        self.cut();
    }
}

impl RelayControl {
    /// Ends every connection; new ones are taken.
    pub fn cut(&self) {
        self.0.next_era(false);
    }

    /// Ends every connection, and TCP clients are told by a reset: what was on its way to them is gone.
    pub fn reset(&self) {
        self.0.next_era(true);
    }

    /// From now on nothing arrives in this direction, not even the end of a connection.
    pub fn hold(&self, direction: Direction) {
        self.0.held[direction as usize].store(true, Ordering::SeqCst);
    }

    /// What was held arrives.
    pub fn release(&self, direction: Direction) {
        self.0.held[direction as usize].store(false, Ordering::SeqCst);
        self.0.changed.notify(usize::MAX);
    }

    /// Flips a bit of what comes next in this direction; again for each call.
    pub fn damage(&self, direction: Direction) {
        self.0.damaged[direction as usize].fetch_add(1, Ordering::SeqCst);
    }

    /// Makes another link of it, for what comes next.
    pub fn become_link(&self, options: RelayOptions) {
        *lock(&self.0.options) = options;
    }
}

impl Control {
    fn next_era(&self, resets: bool) {
        self.resets.store(resets, Ordering::SeqCst);
        self.era.fetch_add(1, Ordering::SeqCst);
        self.changed.notify(usize::MAX);
    }

    fn era(&self) -> u64 {
        self.era.load(Ordering::SeqCst)
    }

    /// Waits until `is` is so.
    async fn until(&self, is: impl Fn(&Control) -> bool) {
        loop {
            let changed = self.changed.listen();
            if is(self) {
                return;
            }
            changed.await;
        }
    }

    /// Waits until `era` is over.
    async fn era_over(&self, era: u64) {
        self.until(|control| control.era() != era).await;
    }

    /// Waits until the direction is not held.
    async fn passable(&self, direction: Direction) {
        self.until(|control| !control.held[direction as usize].load(Ordering::SeqCst)).await;
    }

    /// Whether the piece that passes now is to be damaged.
    fn takes_damage(&self, direction: Direction) -> bool {
        let less = |left: u64| left.checked_sub(1);
        self.damaged[direction as usize].fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok()
    }

    fn count(&self, direction: Direction, len: usize) {
        let counter = match direction {
            Direction::ToServer => &self.bytes.to_server,
            Direction::ToClient => &self.bytes.to_client,
        };
        counter.fetch_add(len as u64, Ordering::Relaxed);
    }
}

impl Link {
    /// When `len` bytes that are sent now arrive.
    fn arrival(&self, direction: Direction, len: usize) -> Duration {
        let options = *lock(&self.control.options);
        let free_at = &self.free_at[direction as usize];
        let start = free_at.get().max(rt::now());
        let takes = match options.bytes_per_second {
            Some(rate) => Duration::from_secs_f64(len as f64 / rate.max(1) as f64),
            None => Duration::ZERO,
        };
        free_at.set(start + takes);
        start + takes + options.delay
    }
}

async fn accept(listener: Listener, server: Arc<dyn Connector>, link: Rc<Link>) {
    let control = link.control.clone();
    while !control.ended.load(Ordering::SeqCst) {
        let era = control.era();
        let accepted = match select(pin!(listener.accept()), pin!(control.era_over(era))).await {
            Either::Left((Ok(accepted), _)) => accepted,
            Either::Left((Err(error), _)) => {
                tracing::warn!(%error, "the relay cannot take a connection");
                return;
            }
            Either::Right(_) => continue,
        };
        let (server, link) = (server.clone(), link.clone());
        rt::spawn(async move {
            if let Err(error) = forward(accepted, server, &link, era).await {
                tracing::warn!(%error, "the relay cannot reach the server");
            }
        });
    }
}

/// Forwards both directions until both are over, or the era is.
async fn forward(accepted: Accepted, server: Arc<dyn Connector>, link: &Rc<Link>, era: u64) -> IoResult<()> {
    let resettable = accepted.resettable()?;
    let (client, server) = (accepted.into_connection()?, server.connect().await?);
    let there = one_way(client.reader, server.writer, link, Direction::ToServer);
    let back = one_way(server.reader, client.writer, link, Direction::ToClient);
    let both = futures_util::future::join(there, back);
    let mut both = pin!(both);
    let cut = matches!(select(&mut both, pin!(link.control.era_over(era))).await, Either::Right(_));
    if cut && link.control.resets.load(Ordering::SeqCst) {
        resettable.reset_when_dropped();
    }
    Ok(())
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
    futures_util::future::join(
        receive(reader, &queue, link, direction),
        deliver(writer, &queue, &link.control, direction),
    )
    .await;
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
        if link.control.takes_damage(direction) {
            let middle = buf.len() / 2;
            buf[middle] ^= 1;
        }
        let piece = buf.split().freeze();
        link.control.count(direction, piece.len());
        queue.bytes.set(queue.bytes.get() + piece.len());
        queue.pieces.borrow_mut().push_back((link.arrival(direction, piece.len()), piece));
        queue.changed.notify(usize::MAX);
    }
    queue.closed.set(true);
    queue.changed.notify(usize::MAX);
}

async fn deliver(mut writer: Box<dyn StreamWrite>, queue: &Queue, control: &Control, direction: Direction) {
    loop {
        let changed = queue.changed.listen();
        let next = queue.pieces.borrow_mut().pop_front();
        let Some((arrival, piece)) = next else {
            if queue.closed.get() {
                control.passable(direction).await;
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
        control.passable(direction).await;
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
    use infill_storage::stream::Connection;

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

    /// A link that costs nothing, and the server behind it.
    const NO_COST: RelayOptions = RelayOptions { delay: Duration::ZERO, bytes_per_second: None };

    #[test]
    fn a_direction_that_is_held_swallows_everything_until_it_is_released() {
        let dir = tempfile::tempdir().unwrap();
        let (far, near) = (socket(&dir, "far"), socket(&dir, "near"));
        Reactors::start(1).unwrap().block_on(move || async move {
            rt::spawn(echo(Listener::bind(&far).unwrap()));
            let relay = Relay::start(Listener::bind(&near).unwrap(), connector(&far), NO_COST);
            let mut connection = connector(&near).connect().await.unwrap();
            assert_eq!(exchange(&mut connection, 10).await.unwrap().len(), 10);
            let control = relay.control();
            control.hold(Direction::ToClient);
            let answer = exchange(&mut connection, 10);
            let mut answer = pin!(answer);
            // The other direction goes on: the server has answered, and the answer is on its way for ever.
            while relay.bytes().to_client() < 20 {
                assert!(rt::timeout(Duration::from_millis(1), &mut answer).await.is_none());
            }
            assert_eq!(relay.bytes().to_server(), 20);
            assert!(rt::timeout(Duration::from_millis(1), &mut answer).await.is_none());
            control.release(Direction::ToClient);
            assert_eq!(answer.await.unwrap().len(), 10);
        });
    }

    #[test]
    fn damage_flips_one_bit_in_one_direction() {
        let dir = tempfile::tempdir().unwrap();
        let (far, near) = (socket(&dir, "far"), socket(&dir, "near"));
        Reactors::start(1).unwrap().block_on(move || async move {
            rt::spawn(echo(Listener::bind(&far).unwrap()));
            let relay = Relay::start(Listener::bind(&near).unwrap(), connector(&far), NO_COST);
            let mut connection = connector(&near).connect().await.unwrap();
            relay.control().damage(Direction::ToClient);
            let got = exchange(&mut connection, 100).await.unwrap();
            assert_eq!((got.len(), got.iter().filter(|byte| **byte != 7).count()), (100, 1));
            let got = exchange(&mut connection, 100).await.unwrap();
            assert!(got.iter().all(|byte| *byte == 7));
        });
    }

    #[test]
    fn a_reset_is_told_to_clients_as_one_and_a_cut_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let far = socket(&dir, "far");
        Reactors::start(1).unwrap().block_on(move || async move {
            rt::spawn(echo(Listener::bind(&far).unwrap()));
            let any = Address::Tcp { host: "127.0.0.1".into(), port: 0 };
            let listener = Listener::bind(&any).unwrap();
            let near = listener.address().clone();
            let relay = Relay::start(listener, connector(&far), NO_COST);
            for resets in [false, true] {
                let mut connection = connector(&near).connect().await.unwrap();
                assert_eq!(exchange(&mut connection, 10).await.unwrap().len(), 10);
                match resets {
                    true => relay.control().reset(),
                    false => relay.control().cut(),
                }
                let rest = connection.reader.read(BytesMut::with_capacity(1)).await;
                assert_eq!(rest.is_err(), resets);
            }
        });
    }

    #[test]
    fn a_link_that_becomes_slow_is_slow_from_then_on() {
        let dir = tempfile::tempdir().unwrap();
        let (far, near) = (socket(&dir, "far"), socket(&dir, "near"));
        Reactors::start(1).unwrap().block_on(move || async move {
            rt::spawn(echo(Listener::bind(&far).unwrap()));
            let relay = Relay::start(Listener::bind(&near).unwrap(), connector(&far), NO_COST);
            let mut connection = connector(&near).connect().await.unwrap();
            assert_eq!(exchange(&mut connection, 10).await.unwrap().len(), 10);
            let delay = Duration::from_millis(5);
            relay.control().become_link(RelayOptions { delay, bytes_per_second: Some(1_000_000) });
            let start = rt::now();
            assert_eq!(exchange(&mut connection, 10_000).await.unwrap().len(), 10_000);
            assert!(rt::now() - start >= 2 * delay + Duration::from_millis(10));
        });
    }

    #[test]
    fn a_cut_ends_connections_and_takes_new_ones_and_a_drop_takes_none() {
        let dir = tempfile::tempdir().unwrap();
        let (far, near) = (socket(&dir, "far"), socket(&dir, "near"));
        Reactors::start(1).unwrap().block_on(move || async move {
            rt::spawn(echo(Listener::bind(&far).unwrap()));
            let relay = Relay::start(Listener::bind(&near).unwrap(), connector(&far), NO_COST);
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
