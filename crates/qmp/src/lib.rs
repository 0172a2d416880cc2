//! QMP without I/O: what managers say, read strictly and typed, and what they are answered.
//!
//! * [`keyval`], [`Members`]: dotted keys and JSON objects, taken member by member.
//! * [`BlockdevOptions`], [`BlockExportOptions`], [`NbdServerOptions`]: typed options of the command line and the protocol.
//! * [`command`]: commands and their arguments.
//! * [`Session`]: one monitor's conversation; [`Event`], [`answer`] and [`encode`] make what it is sent.
//! * [`json`]: the protocol's JSON, read as a stream.
//!
//! Names, defaults, error classes and wording are those of qemu-storage-daemon 10. What never happens: an unknown
//! member ignored, a value of a wrong type guessed, memory that a client can make grow without a named limit.
#![forbid(unsafe_code)]

mod address;
pub mod alter;
pub mod backup;
mod base64;
mod bitmap;
mod blockdev;
pub mod chardev;
pub mod command;
pub mod copy;
pub mod create;
mod describe;
pub mod drive;
mod error;
pub mod experimental;
mod export;
mod filters;
pub mod inspect;
pub mod json;
pub mod keyval;
mod members;
pub mod migration;
pub mod names;
mod object;
mod output;
pub mod schema;
mod session;
pub mod shape;
pub mod throttle;
mod told;
pub mod transaction;

pub use address::SocketAddress;
pub use bitmap::{BitmapAdd, BitmapCommand, BitmapMerge, BitmapRef};
pub use blockdev::{
    BackingOption, BlockdevOptions, BlockdevRef, ChildRole, Driver, Locking, NbdCredentials, NbdTls,
    OnCbwError, Qcow2Options, is_driver,
};
pub use error::{ErrorClass, QmpError};
pub use export::{
    BlockExportOptions, NBD_CONNECTIONS_DEFAULT, NBD_STRING_BYTES_MAX, NbdServerOptions, RemoveMode,
};
pub use filters::BlkdebugOptions;
pub use members::{Alternate, Members, Object, Words};
pub use object::{
    AuthzFormat, AuthzList, AuthzRule, ObjectKind, ObjectOptions, SecretFrom, SecretOptions, TlsCredsX509,
    without_secret,
};
pub use output::{Event, answer, encode};
pub use session::{Incoming, Request, Session};
