//! The NBD server: exports of nodes, spoken to over any byte stream.
//!
//! # Shape
//! A connection is one task on one reactor. In it, three futures take turns whenever something has happened: *receive*
//! parses every request that has arrived and starts it, the *requests* themselves run side by side, and *send* gives
//! all answers that are ready to the kernel as one vectored write. So requests that complete together cost one wake-up
//! and one system call together, and nothing on the way takes a lock or another task's queue.
//!
//! # Payload
//! A write's payload is cut out of the receive buffer and given to the node; what a node reads goes to the socket. Neither
//! is copied in between.
//!
//! # What a client cannot do
//! Make the server wait for it (the handshake has a deadline, and a client that does not take its answers stops only its
//! own connection), hold memory beyond [`ServerLimits`], or end another's requests. What it sends against the rules is
//! answered by the protocol's error where there is one and the stream goes on, and ends the connection where there is none.
//!
//! # TLS
//! A server with credentials takes nobody without TLS, and answers nothing but that before it has begun. The handshake's
//! deadline is one for both, so that TLS costs a client no more time.
//!
//! # How a connection ends
//! Requests that change the disk are always run to their end, so that nothing of a client that is gone happens later than
//! its successor's first request would see. Reads are given up when nobody is there to receive them, or after
//! [`ServerLimits::close_time`].

mod exports;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod handshake;
mod limits;
mod outbox;
mod request;
mod session;
mod status;

use infill_base::{ErrorKind, IoError, IoResult};
use infill_storage::stream::Connection;
use infill_storage::sync::Arc;
use infill_storage::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use infill_storage::{Permits, rt};

use crate::tls::ServerTls;
pub use exports::{Export, ExportError, ExportStatus, Exports, Removal, RemoveMode};
pub use limits::ServerLimits;

/// A server. Cloning shares it.
#[derive(Clone)]
pub struct Server(Arc<Shared>);

struct Shared {
    exports: Exports,
    limits: ServerLimits,
    tls: Option<ServerTls>,
    connections: AtomicUsize,
    chosen: AtomicU64,
    /// Bytes in flight of all connections, beyond what each may always have.
    bytes: Permits,
}

/// Counts a connection.
struct Counted<'a>(&'a AtomicUsize);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Server {
    /// Offers `exports`, now and as they change, in the clear.
    pub fn new(exports: Exports, limits: ServerLimits) -> Server {
        Server::over(exports, limits, None)
    }

    /// Offers `exports`, now and as they change, to those who speak TLS; with `None` in the clear.
    pub fn over(exports: Exports, limits: ServerLimits, tls: Option<ServerTls>) -> Server {
        let bytes = Permits::new(limits.bytes_in_flight_total);
        Server(Arc::new(Shared {
            exports,
            limits,
            tls,
            connections: AtomicUsize::new(0),
            chosen: AtomicU64::new(0),
            bytes,
        }))
    }

    /// What it offers.
    pub fn exports(&self) -> &Exports {
        &self.0.exports
    }

    /// Connections that are served now, handshakes included.
    pub fn connections(&self) -> usize {
        self.0.connections.load(Ordering::Acquire)
    }

    /// Connections that have chosen an export since the server was made.
    pub fn chosen(&self) -> u64 {
        self.0.chosen.load(Ordering::Acquire)
    }

    /// Serves one connection to its end, on the calling reactor. An error tells why it ended otherwise than by the
    /// client's wish; nobody else is affected by it.
    ///
    /// The future must be polled to its end: dropped in the middle, writes of the client may be left half done.
    pub async fn serve(&self, connection: Connection) -> IoResult<()> {
        let shared = &*self.0;
        let before = shared.connections.fetch_add(1, Ordering::AcqRel);
        let _counted = Counted(&shared.connections);
        if before >= shared.limits.connections_max {
            let why =
                format!("there are {before} connections already, which is as many as this server takes");
            return Err(IoError::new(ErrorKind::Busy, why));
        }
        let peer = connection.peer.clone();
        let handshake =
            handshake::handshake(connection, &shared.exports, &shared.limits, shared.tls.as_ref());
        let agreed = match rt::timeout(shared.limits.handshake_time, handshake).await {
            Some(result) => result.map_err(|error| error.in_node(&peer))?,
            None => {
                let why = "the client did not choose an export in time";
                return Err(IoError::new(ErrorKind::TimedOut, why).in_node(&peer));
            }
        };
        let Some(agreed) = agreed else { return Ok(()) };
        shared.chosen.fetch_add(1, Ordering::AcqRel);
        let result = session::transmit(agreed, &shared.limits, &shared.bytes).await;
        result.map_err(|error| error.in_node(&peer))
    }
}
