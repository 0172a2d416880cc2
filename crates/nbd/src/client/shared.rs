//! What the handles on all reactors and the connection tasks on one of them share: the queue, the state of the
//! source, and what is not stable yet. All under one lock, which is held for moments and never across an await.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::OnceLock;
use std::task::{Context, Poll, Waker};

use bytes::BytesMut;
use event_listener::Event;
use infill_base::{Class, ErrorKind, Extents, Gather, IoError, IoResult, ZeroFlags};
use infill_storage::RangeGuard;
use infill_storage::stream::Connector;
use infill_storage::sync::{Arc, Mutex, MutexGuard, lock};

use super::negotiate::{Agreed, Failed};
use super::unsynced::{Content, Unsynced};
use super::{ClientOptions, OnLost, SourceState};

/// Rank of what is sent before anything else: the replay of what is not stable.
pub(super) const RANK_REPLAY: u8 = 0;
/// Rank of a guest's requests.
pub(super) const RANK_GUEST: u8 = 1;

/// Place of a request in the queue: by class, then by age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) rank: u8,
    seq: u64,
}

fn rank_of(class: Class) -> u8 {
    match class {
        Class::Guest => RANK_GUEST,
        Class::Prefetch => 2,
        Class::AroundMiss => 3,
        Class::Fill => 4,
    }
}

/// What a request asks for.
#[derive(Debug)]
pub(super) enum Op {
    Read(BytesMut),
    Write {
        data: Gather,
        fua: bool,
    },
    Zeroes {
        len: u64,
        flags: ZeroFlags,
    },
    Discard {
        len: u64,
    },
    Flush {
        /// What it covers, known when it is sent.
        mark: u64,
    },
    Status {
        len: u64,
    },
}

impl Op {
    /// Length of its range in bytes.
    pub(super) fn len(&self) -> u64 {
        match self {
            Op::Read(buf) => buf.len() as u64,
            Op::Write { data, .. } => data.len() as u64,
            Op::Zeroes { len, .. } | Op::Discard { len } | Op::Status { len } => *len,
            Op::Flush { .. } => 0,
        }
    }

    /// Bytes that travel for it.
    pub(super) fn payload(&self) -> u64 {
        match self {
            Op::Read(_) | Op::Write { .. } => self.len(),
            _ => 0,
        }
    }

    /// Whether it changes the disk. It goes on when its future is dropped after it was sent.
    pub(super) fn changes(&self) -> bool {
        matches!(self, Op::Write { .. } | Op::Zeroes { .. } | Op::Discard { .. })
    }

    /// Whether it is refused once what is stable is unknown.
    fn concerns_stability(&self) -> bool {
        self.changes() || matches!(self, Op::Flush { .. })
    }
}

/// What a request is answered.
#[derive(Debug)]
pub(super) enum Answer {
    Done,
    Data(BytesMut),
    Extents(Extents),
}

/// A request, queued or sent.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) op: Op,
    pub(super) at: u64,
    /// Who waits; nobody for what the client asks on its own account.
    pub(super) slot: Option<Arc<Slot>>,
    /// Keeps overlapping changes apart until this one is answered.
    pub(super) order: Option<RangeGuard>,
    /// Bytes reserved for it among what is not stable.
    pub(super) room: u64,
}

impl Request {
    /// A request that nobody waits for.
    fn own(at: u64, op: Op) -> Request {
        Request { op, at, slot: None, order: None, room: 0 }
    }

    /// Whether whoever asked has gone, and nothing is changed by forgetting it.
    pub(super) fn forgotten(&self) -> bool {
        !self.op.changes() && self.slot.as_ref().is_some_and(|slot| Arc::strong_count(slot) == 1)
    }

    /// Tells its outcome to whoever waits.
    pub(super) fn finish(self, result: IoResult<Answer>) {
        let (at, len) = (self.at, self.op.len());
        // The next overlapping change may go before this one's asker runs.
        drop(self.order);
        if let Some(slot) = self.slot {
            slot.fill(result.map_err(|error| error.at(at, len)));
        }
    }
}

/// Where an answer is put, from another thread perhaps.
#[derive(Debug, Default)]
pub(super) struct Slot(Mutex<Filled>);

#[derive(Debug, Default)]
struct Filled {
    result: Option<IoResult<Answer>>,
    waker: Option<Waker>,
}

impl Slot {
    fn fill(&self, result: IoResult<Answer>) {
        let waker = {
            let mut filled = lock(&self.0);
            filled.result = Some(result);
            filled.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Waits for an answer. Dropped before: what is still queued is taken out, what was sent is answered to nobody.
pub(super) struct Ticket {
    shared: Arc<Shared>,
    slot: Arc<Slot>,
    key: Key,
    answered: bool,
}

impl Future for Ticket {
    type Output = IoResult<Answer>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<IoResult<Answer>> {
        let result = {
            let mut filled = lock(&self.slot.0);
            if filled.result.is_none() {
                filled.waker = Some(cx.waker().clone());
            }
            filled.result.take()
        };
        match result {
            Some(result) => {
                self.answered = true;
                Poll::Ready(result)
            }
            None => Poll::Pending,
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        let request = {
            let mut state = self.shared.state();
            let request = state.queue.remove(&self.key);
            if let Some(request) = &request {
                state.reserved -= request.room;
            }
            request
        };
        if request.is_some() {
            self.shared.room.notify(usize::MAX);
        }
    }
}

/// Which connection of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Takes everything that no other connection takes.
    Main,
    /// Takes what guests ask for.
    Demand,
}

pub(super) struct State {
    queue: BTreeMap<Key, Request>,
    next_seq: u64,
    pub(super) source: SourceState,
    /// Times that the source was lost or came back.
    pub(super) changes: u64,
    /// Requests fail with this while the source is lost (not held, or not any more).
    failing: Option<IoError>,
    /// What is stable is unknown: nothing more is written.
    poisoned: Option<IoError>,
    /// Writes were lost for good: nothing is answered any more.
    dead: Option<IoError>,
    /// A connection for guests is up.
    pub(super) demand: bool,
    /// Requests of the replay that are not answered yet.
    replaying: usize,
    unsynced: Unsynced,
    /// Room taken by changes that are not answered yet, in bytes.
    reserved: u64,
    /// A flush that makes room is on its way.
    flushing: bool,
    /// All handles are gone.
    pub(super) closed: bool,
}

/// What handles and connections share.
pub(super) struct Shared {
    pub(super) connector: Arc<dyn Connector>,
    pub(super) options: ClientOptions,
    pub(super) name: String,
    /// What was agreed on first; a server that offers less is another one.
    pinned: OnceLock<Agreed>,
    /// What is known of an export that has never been reached.
    expected: Agreed,
    state: Mutex<State>,
    /// Wakes the writers of the connections, by role.
    pub(super) wake: [Event; 2],
    /// The source was lost, came back, or is not needed any more.
    pub(super) changed: Event,
    /// There may be room for a write.
    pub(super) room: Event,
}

impl Shared {
    pub(super) fn new(
        connector: Arc<dyn Connector>,
        options: ClientOptions,
        name: String,
        expected: Agreed,
    ) -> Shared {
        Shared {
            connector,
            options,
            name,
            pinned: OnceLock::new(),
            expected,
            state: Mutex::new(State {
                queue: BTreeMap::new(),
                next_seq: 0,
                source: SourceState::Connected,
                changes: 0,
                failing: None,
                poisoned: None,
                dead: None,
                demand: false,
                replaying: 0,
                unsynced: Unsynced::default(),
                reserved: 0,
                flushing: false,
                closed: false,
            }),
            wake: [Event::new(), Event::new()],
            changed: Event::new(),
            room: Event::new(),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// What requests are made for: what was agreed on first, or, before that, what any server takes.
    pub(super) fn agreed(&self) -> &Agreed {
        self.pinned.get().unwrap_or(&self.expected)
    }

    /// Whether nothing was ever agreed on.
    pub(super) fn is_awaited(&self) -> bool {
        self.pinned.get().is_none()
    }

    pub(super) fn wake(&self) {
        self.wake.iter().for_each(|event| {
            event.notify(usize::MAX);
        });
    }

    /// An error of this storage.
    pub(super) fn error(&self, kind: ErrorKind, message: impl Into<String>) -> IoError {
        IoError::new(kind, message).in_node(&self.name)
    }

    /// Queues a request.
    pub(super) fn submit(
        self: &Arc<Self>,
        class: Class,
        at: u64,
        op: Op,
        order: Option<RangeGuard>,
        room: Room,
    ) -> IoResult<Ticket> {
        let slot = Arc::new(Slot::default());
        let key = {
            let mut state = self.state();
            state.admit(op.concerns_stability())?;
            let key = state.next_key(rank_of(class));
            let request = Request { op, at, slot: Some(slot.clone()), order, room: room.keep() };
            state.queue.insert(key, request);
            key
        };
        self.wake();
        Ok(Ticket { shared: self.clone(), slot, key, answered: false })
    }

    /// Waits until `cost` more bytes may be unsynced. Where they may not, a flush makes room.
    pub(super) async fn room(self: &Arc<Self>, cost: u64) -> IoResult<Room> {
        loop {
            let freed = self.room.listen();
            let flush = {
                let mut state = self.state();
                state.admit(true)?;
                let held = state.unsynced.bytes() + state.reserved;
                if held == 0 || held + cost <= self.options.unsynced_bytes_max {
                    state.reserved += cost;
                    return Ok(Room { shared: self.clone(), bytes: cost });
                }
                state.make_room()
            };
            if flush {
                self.wake();
            }
            freed.await;
        }
    }

    /// The next request for a connection, if `fits` says that it may be sent now.
    pub(super) fn take(&self, role: Role, fits: impl Fn(Key, &Request) -> bool) -> Option<(Key, Request)> {
        let mut state = self.state();
        let key = state.first(role)?;
        if !fits(key, state.queue.get(&key)?) {
            return None;
        }
        let mut request = state.queue.remove(&key)?;
        if let Op::Flush { mark } = &mut request.op {
            *mark = state.unsynced.mark();
        }
        Some((key, request))
    }

    /// A request was answered. Afterwards its asker knows.
    pub(super) fn answered(&self, key: Key, request: Request, mut result: IoResult<Answer>) {
        if key.rank == RANK_REPLAY {
            return self.replayed(result);
        }
        let mut refused = Vec::new();
        let mut makes_room = request.room > 0;
        {
            let mut state = self.state();
            state.reserved -= request.room;
            if let Op::Flush { mark } = &request.op {
                makes_room = true;
                state.flushing &= request.slot.is_some();
                match (&result, &state.poisoned) {
                    (_, Some(error)) => result = Err(error.clone()),
                    (Ok(_), None) => state.unsynced.synced(*mark),
                    (Err(error), None) => refused = state.poison(error),
                }
            } else if result.is_ok() && state.poisoned.is_none() {
                state.keep(request.at, &request.op, self.agreed());
            }
        }
        if makes_room {
            self.room.notify(usize::MAX);
        }
        let result = result.map_err(|error| error.in_node(&self.name));
        request.finish(result);
        refused.into_iter().for_each(|(request, error)| request.finish(Err(error)));
    }

    fn replayed(&self, result: IoResult<Answer>) {
        let refused = {
            let mut state = self.state();
            state.replaying -= 1;
            match result {
                Ok(_) if state.replaying > 0 => return,
                Ok(_) => Vec::new(),
                Err(error) => {
                    let error = self
                        .error(
                            ErrorKind::Poisoned,
                            "the server lost writes that it had acknowledged, and refuses them now",
                        )
                        .caused_by(error);
                    state.die(error)
                }
            }
        };
        self.wake();
        self.changed.notify(usize::MAX);
        self.room.notify(usize::MAX);
        refused.into_iter().for_each(|(request, error)| request.finish(Err(error)));
    }

    /// Puts back what was sent and not answered. What nobody waits for is forgotten.
    pub(super) fn put_back(&self, sent: impl Iterator<Item = (Key, Request)>) {
        let mut over = Vec::new();
        {
            let mut state = self.state();
            for (key, request) in sent {
                if key.rank == RANK_REPLAY || request.forgotten() {
                    over.push((request, None));
                    continue;
                }
                match state.admit(request.op.concerns_stability()) {
                    Ok(()) => {
                        state.queue.insert(key, request);
                    }
                    Err(error) => {
                        state.reserved -= request.room;
                        state.flushing &= request.slot.is_some();
                        over.push((request, Some(error)));
                    }
                }
            }
        }
        self.wake();
        for (request, error) in over {
            if let Some(error) = error {
                request.finish(Err(error));
            }
        }
    }

    /// The source is there (again): requests run, but what is not stable goes first. Whether any wait.
    pub(super) fn connected(&self) -> bool {
        let waiting = {
            let mut state = self.state();
            state.failing = None;
            state.replay();
            if !matches!(state.source, SourceState::Connected) {
                state.source = SourceState::Connected;
                // One that was waited for from the beginning, and was there, was never lost.
                state.changes += u64::from(state.changes > 0);
            }
            !state.queue.is_empty()
        };
        self.changed.notify(usize::MAX);
        self.wake();
        waiting
    }

    /// No server has been reached yet.
    pub(super) fn await_first(&self) {
        let why = self.error(ErrorKind::SourceLost, "its server has not been reached yet");
        self.state().source = SourceState::Lost(why);
    }

    /// The source is lost. Requests are held, or fail, as the options say.
    pub(super) fn lost(&self, error: &IoError) {
        let error = self.lost_error(error);
        {
            let mut state = self.state();
            state.source = SourceState::Lost(error.clone());
            state.changes += 1;
        }
        self.changed.notify(usize::MAX);
        if self.options.on_lost == OnLost::Fail {
            self.stop_holding(&error);
        }
    }

    /// A server is there, and it is no use. For those who read, a good one may come back, as after any other loss. Those
    /// who write have writes that this one will never get: they are told.
    pub(super) fn no_use(&self, error: &IoError) {
        if !self.options.read_only {
            self.stop_holding(error);
        }
    }

    /// Requests are not held any more, until the source is back.
    pub(super) fn stop_holding(&self, error: &IoError) {
        let error = self.lost_error(error);
        let refused = {
            let mut state = self.state();
            state.failing = Some(error.clone());
            state.drain(&error, |_| true)
        };
        self.room.notify(usize::MAX);
        refused.into_iter().for_each(|(request, error)| request.finish(Err(error)));
    }

    fn lost_error(&self, error: &IoError) -> IoError {
        if error.kind() == ErrorKind::SourceLost {
            return error.clone().in_node(&self.name);
        }
        self.error(ErrorKind::SourceLost, "the connection was lost").caused_by(error.clone())
    }

    /// Whether connecting again is of no use.
    pub(super) fn over(&self) -> bool {
        let state = self.state();
        state.closed || state.dead.is_some()
    }

    /// Whether a server is the one that was opened, as far as that can be told. The first one is that.
    pub(super) fn same_source(&self, agreed: &Agreed) -> Result<(), Failed> {
        self.agreed().same_source(agreed, self.options.read_only).map_err(|why| {
            let message = match self.is_awaited() {
                true => format!("the source is not what was expected: {why}; it is not used"),
                false => format!("the source has changed while it was away: {why}; it is not used"),
            };
            Failed::Refused(self.error(ErrorKind::SourceLost, message))
        })?;
        self.pinned.get_or_init(|| agreed.clone());
        Ok(())
    }
}

/// Requests to be finished with an error, once the lock is free.
type Refused = Vec<(Request, IoError)>;

impl State {
    /// Queued requests, and reserved bytes.
    #[cfg(test)]
    pub(super) fn left_over(&self) -> (usize, u64) {
        (self.queue.len(), self.reserved)
    }

    /// Bytes that are kept because they are not stable.
    #[cfg(test)]
    pub(super) fn kept(&self) -> u64 {
        self.unsynced.bytes()
    }

    fn next_key(&mut self, rank: u8) -> Key {
        let seq = self.next_seq;
        self.next_seq += 1;
        Key { rank, seq }
    }

    /// Whether a request may be queued now.
    fn admit(&self, changes: bool) -> IoResult<()> {
        if let Some(error) = self.dead.as_ref().or(self.failing.as_ref()) {
            return Err(error.clone());
        }
        match &self.poisoned {
            Some(error) if changes => Err(error.clone()),
            _ => Ok(()),
        }
    }

    /// What a connection sends next.
    fn first(&self, role: Role) -> Option<Key> {
        let first = *self.queue.first_key_value()?.0;
        match role {
            Role::Main if self.replaying > 0 => (first.rank == RANK_REPLAY).then_some(first),
            Role::Main if self.demand => {
                let below = Key { rank: RANK_GUEST + 1, seq: 0 };
                self.queue.range(below..).next().map(|(key, _)| *key)
            }
            Role::Main => Some(first),
            Role::Demand => (first.rank == RANK_GUEST).then_some(first),
        }
    }

    /// Queues a flush that makes room, unless one is on its way or could not make any.
    fn make_room(&mut self) -> bool {
        if self.flushing || self.unsynced.bytes() == 0 {
            return false;
        }
        self.flushing = true;
        let key = self.next_key(RANK_GUEST);
        self.queue.insert(key, Request::own(0, Op::Flush { mark: 0 }));
        true
    }

    /// Keeps an acknowledged change until it is stable.
    fn keep(&mut self, at: u64, op: &Op, pinned: &Agreed) {
        match op {
            Op::Write { data, fua: true } => self.unsynced.stable(at, data.len() as u64),
            Op::Write { data, fua: false } => self.unsynced.write(at, data),
            Op::Zeroes { len, flags } if flags.contains(ZeroFlags::FUA) => self.unsynced.stable(at, *len),
            Op::Zeroes { len, flags } => {
                self.unsynced.zero(at, *len, flags.contains(ZeroFlags::MAY_UNMAP));
            }
            // A discarded range reads as old or zero. Where zeroes can be sent, they are what is sent again: what was
            // read after the discard stays so. Else what was written before it stays, which is *old*.
            Op::Discard { len } if pinned.write_zeroes() => self.unsynced.zero(at, *len, true),
            Op::Discard { .. } | Op::Read(_) | Op::Flush { .. } | Op::Status { .. } => {}
        }
    }

    /// Queues everything that is not stable before everything else.
    fn replay(&mut self) {
        self.queue.retain(|key, _| key.rank != RANK_REPLAY);
        let runs: Vec<(u64, Op)> = self
            .unsynced
            .runs()
            .map(|(at, len, content)| match content {
                Content::Data(data) => (at, Op::Write { data: data.clone().into(), fua: false }),
                Content::Zero { may_unmap } => {
                    let mut flags = ZeroFlags::empty();
                    flags.set(ZeroFlags::MAY_UNMAP, *may_unmap);
                    (at, Op::Zeroes { len, flags })
                }
            })
            .collect();
        self.replaying = runs.len();
        for (at, op) in runs {
            let key = self.next_key(RANK_REPLAY);
            self.queue.insert(key, Request::own(at, op));
        }
    }

    /// A sync failed: what is stable is unknown, and stays so.
    fn poison(&mut self, error: &IoError) -> Refused {
        let error = IoError::new(ErrorKind::Poisoned, "an earlier sync failed, so what is stable is unknown")
            .caused_by(error.clone());
        self.poisoned.get_or_insert_with(|| error.clone());
        self.unsynced.clear();
        self.drain(&error, |request| request.op.concerns_stability())
    }

    /// Acknowledged writes are lost for good.
    fn die(&mut self, error: IoError) -> Refused {
        self.dead.get_or_insert_with(|| error.clone());
        self.source = SourceState::Lost(error.clone());
        self.changes += 1;
        self.replaying = 0;
        self.unsynced.clear();
        self.drain(&error, |_| true)
    }

    /// Takes out of the queue what `which` says.
    fn drain(&mut self, error: &IoError, which: impl Fn(&Request) -> bool) -> Refused {
        let mut refused = Vec::new();
        let keys: Vec<Key> =
            self.queue.iter().filter(|(_, request)| which(request)).map(|(key, _)| *key).collect();
        for key in keys {
            let Some(request) = self.queue.remove(&key) else { continue };
            self.reserved -= request.room;
            if matches!(request.op, Op::Flush { .. }) && request.slot.is_none() {
                self.flushing = false;
            }
            refused.push((request, error.clone()));
        }
        refused
    }
}

/// Room for unsynced bytes, given back unless a request keeps it.
pub(super) struct Room {
    shared: Arc<Shared>,
    bytes: u64,
}

impl Room {
    /// No room.
    pub(super) fn none(shared: &Arc<Shared>) -> Room {
        Room { shared: shared.clone(), bytes: 0 }
    }

    /// The request that keeps it gives it back.
    fn keep(mut self) -> u64 {
        std::mem::take(&mut self.bytes)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.shared.state().reserved -= self.bytes;
            self.shared.room.notify(usize::MAX);
        }
    }
}
