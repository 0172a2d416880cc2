//! Network block devices: the protocol's messages ([`proto`]), a [`Server`] of nodes, and a client that is a storage
//! ([`NbdStorage`]), with the URIs of exports ([`NbdUri`]) and TLS for both sides ([`ServerTls`], [`ClientCredentials`]).
#![forbid(unsafe_code)]

mod client;
pub mod proto;
mod server;
mod tls;
mod uri;

#[cfg(any(test, feature = "fuzzing"))]
pub use client::fuzz::fuzz_client;
pub use client::{ClientOptions, ListedExport, NbdStorage, OnLost, SourceState, SourceWatch, list_exports};
#[cfg(any(test, feature = "fuzzing"))]
pub use server::fuzz::fuzz_server;
pub use server::{Export, ExportError, ExportStatus, Exports, Removal, RemoveMode, Server, ServerLimits};
pub use tls::{Admission, ClientCredentials, ClientTls, ServerTls, TlsError, X509};
pub use uri::{DEFAULT_PORT, NbdUri, ServerAddress, UriError, UriTls};
