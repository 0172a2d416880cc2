//! Network block devices: the protocol's messages ([`proto`]), a server, and a client that is a storage.
#![forbid(unsafe_code)]

pub mod proto;
