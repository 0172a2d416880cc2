//! What one peer, and all together, may take of a server.

use std::time::Duration;

use crate::proto::PAYLOAD_BYTES_MAX;

/// How long a client may take from its connection to GO.
pub const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// Options that a client may send before GO.
pub const OPTIONS_MAX: u32 = 64;
/// And further ones for each export that it was told of: `qemu-nbd --list` asks two of each.
pub const OPTIONS_PER_EXPORT: u32 = 4;
/// Most bytes that one LIST, or one list of contexts, answers.
pub const LIST_BYTES_MAX: usize = 4 << 20;
/// Most dirty bitmaps of one export.
pub const EXPORT_BITMAPS_MAX: usize = 64;
/// Exports of one server.
pub const EXPORTS_MAX: usize = 10_000;
/// Connections of one server, handshakes included.
pub const CONNECTIONS_MAX: usize = 1024;
/// Requests of one connection that are not answered yet.
pub const REQUESTS_IN_FLIGHT_MAX: usize = 256;
/// Bytes that the unanswered requests of one connection may hold.
pub const BYTES_IN_FLIGHT_MAX: u64 = 2 * PAYLOAD_BYTES_MAX as u64;
/// Bytes that the unanswered requests of all connections may hold, beyond [`BYTES_RESERVED`] of each.
pub const BYTES_IN_FLIGHT_TOTAL: u64 = 512 << 20;
/// Bytes of one connection that do not count in the total: a small request never waits for the large ones of others.
pub const BYTES_RESERVED: u64 = 256 << 10;
/// Payload of a refused write that is read and thrown away, so that the connection can go on. A longer one ends it.
pub const SKIPPED_BYTES_MAX: u64 = 2 * PAYLOAD_BYTES_MAX as u64;
/// How long the end of a connection waits for reads that are still out. Changes are always waited for.
pub const CLOSE_TIME: Duration = Duration::from_secs(5);

/// The limits of one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerLimits {
    /// See `HANDSHAKE_TIME`.
    pub handshake_time: Duration,
    /// See `OPTIONS_MAX`.
    pub options_max: u32,
    /// See `CONNECTIONS_MAX`.
    pub connections_max: usize,
    /// See `REQUESTS_IN_FLIGHT_MAX`.
    pub requests_in_flight_max: usize,
    /// See `BYTES_IN_FLIGHT_MAX`. One request is always let in, however large.
    pub bytes_in_flight_max: u64,
    /// See `BYTES_IN_FLIGHT_TOTAL`.
    pub bytes_in_flight_total: u64,
    /// See `CLOSE_TIME`.
    pub close_time: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        ServerLimits {
            handshake_time: HANDSHAKE_TIME,
            options_max: OPTIONS_MAX,
            connections_max: CONNECTIONS_MAX,
            requests_in_flight_max: REQUESTS_IN_FLIGHT_MAX,
            bytes_in_flight_max: BYTES_IN_FLIGHT_MAX,
            bytes_in_flight_total: BYTES_IN_FLIGHT_TOTAL,
            close_time: CLOSE_TIME,
        }
    }
}
