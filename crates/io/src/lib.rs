//! The only crate that talks to the kernel: reactors, files and block devices, sockets, signals.
//!
//! * [`Reactors`]: threads, each with its own io_uring (or poll, where a kernel refuses io_uring) and its own tasks. On
//!   them `infill_storage::rt` works.
//! * [`FileStorage`]: a file or block device as a storage, locked as QEMU locks its images.
//! * [`Listener`], [`TcpConnector`], [`UnixConnector`], [`stdio`]: byte streams.
//! * [`JournalDir`]: memory that outlives the process.
//! * [`patiently`]: waits for what a killed process leaves behind for a moment.
//! * [`Relay`]: a slow or bad link in between.
//! * [`sandbox`]: what the process gives up for good.
//! * [`termination`]: waits for a signal that asks the process to end.
//!
//! A dropped operation is cancelled where the kernel can; its buffer lives until the kernel is done with it. Whoever
//! drops a *receive* may lose bytes with it: give each direction of a stream one task of its own.

mod connect;
mod file;
mod journal;
mod linger;
mod locks;
mod net;
mod reactor;
mod relay;
pub mod sandbox;
mod signal;

pub use connect::{TcpConnector, UnixConnector, connector};
pub use file::{Create, FileOptions, FileStorage};
pub use journal::JournalDir;
pub use linger::patiently;
pub use locks::Share;
pub use net::{Accepted, Address, Listener, stdio};
pub use reactor::{Reactor, Reactors};
pub use relay::{Direction, Relay, RelayBytes, RelayControl, RelayOptions};
pub use signal::termination;
