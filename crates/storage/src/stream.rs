//! The seam to byte streams: what a protocol speaks over. `infill-io` gives sockets and pipes, `infill-sim` a simulated network.

use bytes::BytesMut;
use futures_util::future::LocalBoxFuture;
use infill_base::{Gather, IoResult};

/// The receiving half of a byte stream.
pub trait StreamRead {
    /// Appends at least one byte to `buf`, at most as many as its spare capacity holds (which must not be 0).
    /// A buffer that comes back unchanged: the peer has closed.
    fn read(&mut self, buf: BytesMut) -> LocalBoxFuture<'_, IoResult<BytesMut>>;
}

/// The sending half of a byte stream.
pub trait StreamWrite {
    /// Sends all of `data`, in one system call where the kernel takes it.
    fn write_all(&mut self, data: Gather) -> LocalBoxFuture<'_, IoResult<()>>;

    /// Says that nothing more comes.
    fn shutdown(&mut self) -> LocalBoxFuture<'_, IoResult<()>>;
}

/// Both halves of a connection, and who is at the other end (for messages).
pub struct Connection {
    /// What comes in.
    pub reader: Box<dyn StreamRead>,
    /// What goes out.
    pub writer: Box<dyn StreamWrite>,
    /// The other end, as a person would name it.
    pub peer: String,
}

/// Makes connections to one place, again and again (a client reconnects). Shared between reactors; the connection
/// that it makes stays on the reactor that asked.
pub trait Connector: Send + Sync {
    /// A new connection.
    fn connect(&self) -> LocalBoxFuture<'_, IoResult<Connection>>;

    /// Where to, as a person would name it.
    fn target(&self) -> String;
}
