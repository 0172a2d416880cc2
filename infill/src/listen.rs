//! Takes NBD connections and gives each to a reactor, where it stays.
//!
//! A new connection goes to the reactor that has the fewest. What never happens: more connections than the caller allows
//! (the next ones wait in the kernel's queue), an accept loop that ends because descriptors ran out (it waits and goes
//! on), a connection that is dropped in the middle of a request (see [`Listening::drained`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use event_listener::{Event, EventListener};
use futures_util::future::{Either, select};
use infill_base::ErrorKind;
use infill_io::{Accepted, Address, Listener, Reactor};
use infill_nbd::Server;
use infill_storage::{Permit, Permits, rt};

/// How long the loop rests when the system has nothing to accept a connection with.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// A socket at which an NBD server listens. Dropped, it takes no more connections; those that it has go on.
pub struct Listening(Arc<Shared>);

struct Shared {
    address: Address,
    server: Server,
    reactors: Vec<(Reactor, AtomicUsize)>,
    slots: Permits,
    stopping: AtomicBool,
    /// Connections that are being served; the loop itself counts as one.
    alive: AtomicUsize,
    changed: Event,
}

/// Counts a connection on its reactor until it is dropped.
struct Counted {
    shared: Arc<Shared>,
    reactor: usize,
    _slot: Permit,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.shared.reactors[self.reactor].1.fetch_sub(1, Ordering::AcqRel);
        self.shared.end_one();
    }
}

impl Shared {
    fn end_one(&self) {
        self.alive.fetch_sub(1, Ordering::AcqRel);
        self.changed.notify(usize::MAX);
    }
}

impl Listening {
    /// Takes connections at `listener`, at most `most` at a time, and has `server` serve them on `reactors`. The loop
    /// runs on the calling reactor.
    pub fn start(listener: Listener, server: Server, reactors: Vec<Reactor>, most: usize) -> Listening {
        let shared = Arc::new(Shared {
            address: listener.address().clone(),
            server,
            reactors: reactors.into_iter().map(|reactor| (reactor, AtomicUsize::new(0))).collect(),
            slots: Permits::new(most as u64),
            stopping: AtomicBool::new(false),
            alive: AtomicUsize::new(1),
            changed: Event::new(),
        });
        let this = shared.clone();
        rt::spawn(async move {
            accept(&this, &listener).await;
            drop(listener);
            this.end_one();
        });
        Listening(shared)
    }

    /// Where it listens.
    pub fn address(&self) -> &Address {
        &self.0.address
    }

    /// Connections that are being served now.
    pub fn connections(&self) -> usize {
        self.0.reactors.iter().map(|(_, count)| count.load(Ordering::Acquire)).sum()
    }

    /// Connections that have chosen an export so far.
    pub fn chosen(&self) -> u64 {
        self.0.server.chosen()
    }

    /// Takes no more connections.
    pub fn stop(&self) {
        self.0.stopping.store(true, Ordering::Release);
        self.0.changed.notify(usize::MAX);
    }

    /// Fires when a connection ends.
    pub fn changed(&self) -> EventListener {
        self.0.changed.listen()
    }

    /// Waits, once it was told to stop, until its socket is closed and its last connection has ended.
    pub async fn drained(&self) {
        loop {
            let changed = self.0.changed.listen();
            if self.0.alive.load(Ordering::Acquire) == 0 {
                return;
            }
            changed.await;
        }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Runs `future`, unless the loop is told to stop before it is done.
async fn unless_stopped<T>(shared: &Shared, future: impl Future<Output = T>) -> Option<T> {
    let mut future = std::pin::pin!(future);
    loop {
        let changed = shared.changed.listen();
        if shared.stopping.load(Ordering::Acquire) {
            return None;
        }
        match select(future.as_mut(), changed).await {
            Either::Left((output, _)) => return Some(output),
            Either::Right(_) => {}
        }
    }
}

async fn accept(shared: &Arc<Shared>, listener: &Listener) {
    while let Some(slot) = unless_stopped(shared, shared.slots.take(1)).await {
        match unless_stopped(shared, listener.accept()).await {
            None => return,
            Some(Ok(accepted)) => hand_over(shared, accepted, slot),
            Some(Err(error)) => {
                tracing::warn!(%error, "no connection could be accepted; trying again");
                drop(slot);
                if unless_stopped(shared, rt::sleep(ACCEPT_PAUSE)).await.is_none() {
                    return;
                }
            }
        }
    }
}

/// Gives a connection to the reactor with the fewest.
fn hand_over(shared: &Arc<Shared>, accepted: Accepted, slot: Permit) {
    let fewest =
        shared.reactors.iter().enumerate().min_by_key(|(_, (_, count))| count.load(Ordering::Acquire));
    let Some((index, (reactor, count))) = fewest else { return };
    count.fetch_add(1, Ordering::AcqRel);
    shared.alive.fetch_add(1, Ordering::AcqRel);
    let counted = Counted { shared: shared.clone(), reactor: index, _slot: slot };
    reactor.spawn(move || async move {
        let peer = accepted.peer().to_owned();
        let result = match accepted.into_connection() {
            Ok(connection) => counted.shared.server.serve(connection).await,
            Err(error) => Err(error),
        };
        match result {
            Ok(()) => {}
            // Somebody may wonder why.
            Err(error) if error.kind() == ErrorKind::NotPermitted => {
                tracing::warn!(%error, peer, "a client was not let in");
            }
            Err(error) => tracing::info!(%error, peer, "a connection ended"),
        }
        drop(counted);
    });
}
