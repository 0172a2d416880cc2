//! TLS between daemons: each end shows a certificate, and takes no other end's than one of its own authorities.
//!
//! One directory of credentials serves both ends of both connections: the source dials for words, the target for data. A
//! daemon with credentials speaks to nobody without, and the other way round; nothing ever goes on in the clear. What a
//! peer says of credentials on this host (a URI can name a directory) is never looked at.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use bytes::BytesMut;
use infill_base::{ErrorKind, IoError, IoResult};
use infill_io::Address;
use infill_nbd::{ClientCredentials, ClientTls, NbdUri, ServerTls, UriTls};
use infill_storage::rt;
use infill_storage::stream::Connection;

use crate::tls::Credentials;

/// How long a handshake may take.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);

/// The credentials of a daemon among its peers.
pub(super) struct PeerTls {
    dir: PathBuf,
    server: ServerTls,
    client: ClientCredentials,
}

impl PeerTls {
    /// Reads them from a directory that has those of a server and those of a client.
    pub(super) fn read(dir: &Path) -> Result<PeerTls> {
        let server = Credentials::server(dir, true, true, None)?.server_tls()?;
        for file in ["client-cert.pem", "client-key.pem"] {
            let path = dir.join(file);
            if !path.exists() {
                bail!("{} is missing: between daemons both ends show a certificate", path.display());
            }
        }
        let client = Credentials::client(dir, true, true, None)?.client_tls()?;
        Ok(PeerTls { dir: dir.to_owned(), server, client })
    }

    /// For the server of data.
    pub(super) fn server(&self) -> ServerTls {
        self.server.clone()
    }

    /// For a peer at `address`, whose certificate is to be for `hostname`, or else for the host that is dialled.
    pub(super) fn for_peer(&self, address: &Address, hostname: Option<&str>) -> Result<ClientTls> {
        let host = match address {
            Address::Tcp { host, .. } => Some(host.as_str()),
            Address::Unix(_) => None,
        };
        self.client.for_server(hostname.or(host)).map_err(|error| anyhow!("{error}"))
    }

    /// The server's end of a connection for words.
    pub(super) async fn accept(&self, connection: Connection) -> IoResult<Connection> {
        in_time(self.server.accept(connection, BytesMut::new())).await
    }
}

/// The client's end of a connection for words.
pub(super) async fn connect(tls: &ClientTls, connection: Connection) -> IoResult<Connection> {
    in_time(tls.connect(connection, BytesMut::new())).await.map_err(|error| match error.kind() {
        // What has come is no TLS, and the next attempt finds no other.
        ErrorKind::Io => {
            let why = format!("{error}: its daemon has to be started with --migration …,tls-creds=DIR, too");
            IoError::new(ErrorKind::NotPermitted, why)
        }
        _ => error,
    })
}

async fn in_time(handshake: impl Future<Output = IoResult<Connection>>) -> IoResult<Connection> {
    let late = || Err(IoError::new(ErrorKind::TimedOut, "the peer does not agree on TLS in time"));
    rt::timeout(HANDSHAKE_TIME, handshake).await.unwrap_or_else(late)
}

/// The URI of an export of the peer whose exports are at `data`, with what this daemon has to say of credentials.
pub(super) fn source_uri(tls: Option<&PeerTls>, data: &str, export: &str) -> Result<String> {
    let uri: NbdUri = data.parse()?;
    let tls = match (uri.tls, tls) {
        (None, None) => None,
        (Some(told), Some(own)) => {
            Some(UriTls { certificates: Some(own.dir.clone()), hostname: told.hostname, verify_peer: true })
        }
        (None, Some(_)) => bail!(
            "the source offers its data without TLS, and this daemon takes none so: start the source's with --migration \
             …,tls-creds=DIR, too"
        ),
        (Some(_), None) => bail!(
            "the source offers its data over TLS only: start this daemon with --migration …,tls-creds=DIR, too"
        ),
    };
    Ok(NbdUri { server: uri.server, export: export.to_owned(), tls }.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_names_no_credentials_of_ours_and_tls_is_of_both_or_neither() {
        let told = |data: &str| source_uri(None, data, "x");
        assert_eq!(told("nbd://b:1").unwrap(), "nbd://b:1/x");
        let refused = told("nbds://b:1?tls-certificates=/etc").unwrap_err().to_string();
        assert!(refused.contains("over TLS only"), "{refused}");
        assert!(PeerTls::read(Path::new("/nonexistent")).is_err());
    }
}
