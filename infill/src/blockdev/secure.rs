//! TLS of NBD nodes: from what a description says to what the client takes.

use std::sync::Arc;

use anyhow::{Result, bail};
use infill_io::Address;
use infill_nbd::{ClientTls, UriTls};
use infill_qmp::{NbdCredentials, NbdTls};

use crate::objects::Objects;
use crate::tls::Credentials;

/// What a node needs that speaks TLS.
pub struct Secured {
    /// Its credentials, which are held while it is there.
    pub held: Arc<Credentials>,
    /// What its client takes.
    pub client: ClientTls,
    /// What its URI says, so that it can be opened again.
    pub uri: UriTls,
}

/// Finds the credentials for the server at `address`.
pub fn secure(objects: &Objects, tls: &NbdTls, address: &Address) -> Result<Secured> {
    let held = match &tls.credentials {
        NbdCredentials::Object(id) => objects.tls(id)?,
        NbdCredentials::Directory { dir, verify_peer } => {
            Arc::new(Credentials::of_uri(dir.as_deref(), *verify_peer)?)
        }
    };
    let credentials = held.client_tls()?;
    let host = match address {
        Address::Tcp { host, .. } => Some(host.as_str()),
        Address::Unix(_) => None,
    };
    let name = tls.hostname.as_deref().or(host);
    if name.is_none() && held.verify_peer && matches!(tls.credentials, NbdCredentials::Object(_)) {
        bail!("No hostname for certificate validation: a Unix socket has none, so give tls-hostname");
    }
    let client = credentials.for_server(name)?;
    let uri = UriTls {
        certificates: Some(held.dir.clone()),
        hostname: tls.hostname.clone(),
        verify_peer: held.verify_peer,
    };
    Ok(Secured { held, client, uri })
}
