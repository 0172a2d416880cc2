//! Network block devices: the protocol's messages ([`proto`]), a [`Server`] of nodes, and a client that is a storage.
#![forbid(unsafe_code)]

pub mod proto;
mod server;

pub use server::{Export, ExportError, ExportStatus, Exports, Removal, RemoveMode, Server, ServerLimits};
