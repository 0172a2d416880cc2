//! TLS for both sides: X.509 credentials, and a [`Connection`](infill_storage::stream::Connection) that is encrypted.
//!
//! * [`ServerTls`] makes a server insist on TLS: before STARTTLS every option but it and ABORT is refused.
//! * [`ClientCredentials`] make a client insist on it: a server that has no TLS is refused, nothing ever goes on in the
//!   clear. [`ClientTls`] are credentials together with the name that the server's certificate must be for.
//! * TLS 1.2 and 1.3, no resumption, no tickets, no early data: every connection, also after a loss, shows its
//!   certificates again.
//!
//! No file is read here: credentials come as the content of PEM files. What a connection costs is told in [`stream`].

mod encrypted;
mod explain;
mod stream;
mod subject;
#[cfg(test)]
mod tests;
mod verify;

use std::fmt;
use std::sync::Arc;

use bytes::BytesMut;
use infill_base::{ErrorKind, IoError, IoResult};
use infill_storage::stream::Connection;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection,
};

use verify::ServerVerifier;

/// The content of the PEM files of one end.
#[derive(Clone, Copy, Default)]
pub struct X509<'a> {
    /// Certificates of the authorities that the other end's certificate must come from.
    pub ca: &'a [u8],
    /// Revoked certificates.
    pub crl: Option<&'a [u8]>,
    /// Our own certificate, with those between it and the authority.
    pub certificate: Option<&'a [u8]>,
    /// The private key of that certificate.
    pub key: Option<&'a [u8]>,
    /// What decrypts the key, where it is encrypted.
    pub password: Option<&'a [u8]>,
}

/// What is wrong with credentials: which part, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// The certificates of authorities.
    #[error("the certificates of authorities cannot be used: {0}")]
    Ca(String),
    /// The revoked certificates.
    #[error("the list of revoked certificates cannot be used: {0}")]
    Crl(String),
    /// Our own certificate.
    #[error("our certificate cannot be used: {0}")]
    Certificate(String),
    /// Our private key.
    #[error("our private key cannot be used: {0}")]
    Key(String),
    /// Certificate and key are there, but of different pairs.
    #[error("our certificate and private key do not belong together")]
    Mismatch,
    /// Our own certificate is out of date.
    #[error("our own certificate has expired")]
    Expired,
    /// Our own certificate would not be accepted by somebody with our authorities.
    #[error("our own certificate is not valid: {0}")]
    Own(String),
    /// What the server's certificate is to be for is neither a host's name nor an address.
    #[error("{0:?} is neither a host's name nor an address")]
    Name(String),
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

impl X509<'_> {
    fn roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(self.ca) {
            let certificate = certificate.map_err(|error| TlsError::Ca(unreadable(&error)))?;
            roots.add(certificate).map_err(|error| TlsError::Ca(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(TlsError::Ca("there is no certificate in it".into()));
        }
        Ok(Arc::new(roots))
    }

    fn crls(&self) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
        let Some(crl) = self.crl else { return Ok(Vec::new()) };
        let lists: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(crl).collect();
        let lists = lists.map_err(|error| TlsError::Crl(unreadable(&error)))?;
        if lists.is_empty() {
            return Err(TlsError::Crl("there is no list in it".into()));
        }
        Ok(lists)
    }

    fn chain(&self) -> Result<Option<Vec<CertificateDer<'static>>>, TlsError> {
        let Some(certificate) = self.certificate else { return Ok(None) };
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificate).collect();
        let chain = chain.map_err(|error| TlsError::Certificate(unreadable(&error)))?;
        if chain.is_empty() {
            return Err(TlsError::Certificate("there is no certificate in it".into()));
        }
        Ok(Some(chain))
    }

    /// Our certificate and key; `None` where there are not both.
    fn identity(&self) -> Result<Option<Identity>, TlsError> {
        let (Some(chain), Some(key)) = (self.chain()?, self.key) else { return Ok(None) };
        let key = match (encrypted::is_encrypted(key), self.password) {
            (true, Some(password)) => encrypted::decrypted(key, password),
            (true, None) => Err(
                "Decryption has failed: it is encrypted, and no password was given (`passwordid` of credentials names a secret; \
                 `openssl pkey -in KEY` decrypts it)"
                    .into(),
            ),
            (false, _) => PrivateKeyDer::from_pem_slice(key).map_err(|error| match error {
                pem::Error::NoItemsFound => {
                    "there is no key in it that can be read (`openssl pkey -in KEY` writes one)".into()
                }
                error => unreadable(&error),
            }),
        };
        Ok(Some((chain, key.map_err(TlsError::Key)?)))
    }

    fn server_verifier(&self) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
        // A certificate of an authority that no list is of is not revoked.
        let builder = WebPkiServerVerifier::builder_with_provider(self.roots()?, provider());
        let builder = builder.with_crls(self.crls()?).allow_unknown_revocation_status();
        builder.build().map_err(|error| TlsError::Crl(error.to_string()))
    }

    fn client_verifier(&self) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let builder = WebPkiClientVerifier::builder_with_provider(self.roots()?, provider());
        let builder = builder.with_crls(self.crls()?).allow_unknown_revocation_status();
        builder.build().map_err(|error| TlsError::Crl(error.to_string()))
    }

    /// Whether somebody who has our authorities would accept our own certificate today, as a server's or a client's.
    /// Nothing to say where there is none.
    pub fn check_own(&self, server: bool) -> Result<(), TlsError> {
        let Some(chain) = self.chain()? else { return Ok(()) };
        let Some((own, between)) = chain.split_first() else { return Ok(()) };
        let now = UnixTime::now();
        let checked = match server {
            true => ServerVerifier::of_chain(self.server_verifier()?).check(own, between, now),
            false => self.client_verifier()?.verify_client_cert(own, between, now).map(drop),
        };
        checked.map_err(|error| match &error {
            rustls::Error::InvalidCertificate(
                CertificateError::Expired | CertificateError::ExpiredContext { .. },
            ) => TlsError::Expired,
            error => TlsError::Own(explain::certificate(error)),
        })
    }
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Why PEM cannot be read.
fn unreadable(error: &pem::Error) -> String {
    format!("it is not PEM: {error}")
}

/// Certificate and key do not fit each other, or one of them is of an unknown kind.
fn unusable(error: rustls::Error) -> TlsError {
    match error {
        rustls::Error::InconsistentKeys(_) => TlsError::Mismatch,
        rustls::Error::InvalidCertificate(_) => TlsError::Certificate(error.to_string()),
        error => TlsError::Key(error.to_string()),
    }
}

/// Who may come in, of those whose certificates are accepted, by their distinguished names.
pub type Admission = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// Credentials of a server. Cloning shares them.
#[derive(Clone)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    verifies: bool,
    admission: Option<Admission>,
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerTls")
    }
}

impl ServerTls {
    /// Reads them. With `verify_peer` a client needs a certificate from one of the authorities.
    pub fn new(files: &X509<'_>, verify_peer: bool) -> Result<ServerTls, TlsError> {
        let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let builder = builder.map_err(unusable)?;
        let builder = match verify_peer {
            true => builder.with_client_cert_verifier(files.client_verifier()?),
            false => {
                files.roots()?;
                builder.with_no_client_auth()
            }
        };
        let (chain, key) = files
            .identity()?
            .ok_or_else(|| TlsError::Certificate("a server needs a certificate and its key".into()))?;
        let mut config = builder.with_single_cert(chain, key).map_err(unusable)?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(ServerTls { config: Arc::new(config), verifies: verify_peer, admission: None })
    }

    /// Lets only those in of whom `admission` says so. Those whose certificates are not verified never come in then.
    pub fn admitting(self, admission: Admission) -> ServerTls {
        ServerTls { admission: Some(admission), ..self }
    }

    fn admit(&self, shown: Option<&[CertificateDer<'_>]>) -> IoResult<()> {
        let Some(admission) = &self.admission else { return Ok(()) };
        let denied = |why: String| Err(IoError::new(ErrorKind::NotPermitted, why));
        let shown = shown.filter(|_| self.verifies).and_then(<[_]>::first);
        match shown.map(|own| subject::distinguished_name(own)) {
            None => denied("the client is refused: it shows no certificate that tells who it is".into()),
            Some(None) => denied(
                "the client is refused: its certificate has no distinguished name that can be written for certain (plain \
                 attributes as UTF8String or PrintableString can)"
                    .into(),
            ),
            Some(Some(name)) if !admission(&name) => {
                denied(format!("the client is refused: TLS x509 authz check for {} is denied", printable(&name)))
            }
            Some(Some(_)) => Ok(()),
        }
    }

    /// The server's side of the handshake, over a connection on which TLS was agreed (by STARTTLS, or because nothing else is
    /// ever spoken there). `received` is what has come behind that. How long it may take is the caller's to say.
    pub async fn accept(&self, connection: Connection, received: BytesMut) -> IoResult<Connection> {
        let tls =
            ServerConnection::new(self.config.clone()).map_err(|error| explain::failure(&error, "client"))?;
        stream::handshake(tls.into(), connection, received, "client", |tls| {
            self.admit(tls.peer_certificates())
        })
        .await
    }
}

/// A name as logs may have it.
fn printable(name: &str) -> String {
    name.chars().map(|char| if char.is_control() { char::REPLACEMENT_CHARACTER } else { char }).collect()
}

/// Credentials of a client, for any server. Cloning shares them.
#[derive(Clone)]
pub struct ClientCredentials {
    config: Arc<ClientConfig>,
    /// `None`: servers are not verified.
    verifier: Option<Arc<WebPkiServerVerifier>>,
}

impl fmt::Debug for ClientCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientCredentials")
    }
}

impl ClientCredentials {
    /// Reads them. With `verify_peer` a server needs a certificate from one of the authorities. Our own is shown to
    /// servers that ask for it, where certificate and key are both there.
    pub fn new(files: &X509<'_>, verify_peer: bool) -> Result<ClientCredentials, TlsError> {
        let verifier = files.server_verifier()?;
        let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let builder = builder.map_err(unusable)?.dangerous();
        // Which name it must be for is told later, for each server.
        let builder =
            builder.with_custom_certificate_verifier(Arc::new(ServerVerifier::of_chain(verifier.clone())));
        let mut config = match files.identity()? {
            Some((chain, key)) => builder.with_client_auth_cert(chain, key).map_err(unusable)?,
            None => builder.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        Ok(ClientCredentials { config: Arc::new(config), verifier: verify_peer.then_some(verifier) })
    }

    /// For the server called `name` (a host's name or an address), which its certificate must say. `None` (a Unix
    /// socket): any server with a certificate from one of the authorities.
    pub fn for_server(&self, name: Option<&str>) -> Result<ClientTls, TlsError> {
        let mut config = ClientConfig::clone(&self.config);
        let verifier = match (&self.verifier, name) {
            (None, _) => ServerVerifier::of_nothing(&provider()),
            (Some(verifier), None) => ServerVerifier::of_chain(verifier.clone()),
            (Some(verifier), Some(_)) => ServerVerifier::of_chain_and_name(verifier.clone()),
        };
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        config.enable_sni = name.is_some();
        // Where there is none, this one is neither sent nor looked at.
        let name = name.unwrap_or("localhost");
        let name = ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name(name.to_owned()))?;
        Ok(ClientTls { config: Arc::new(config), name })
    }
}

/// Credentials for one server. Cloning shares them.
#[derive(Clone)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientTls")
    }
}

impl ClientTls {
    /// The client's side of the handshake, over a connection on which TLS was agreed (by STARTTLS, or because nothing else is
    /// ever spoken there). `received` is what has come behind that. How long it may take is the caller's to say.
    pub async fn connect(&self, connection: Connection, received: BytesMut) -> IoResult<Connection> {
        let tls = ClientConnection::new(self.config.clone(), self.name.clone());
        let tls = tls.map_err(|error| explain::failure(&error, "server"))?;
        stream::handshake(tls.into(), connection, received, "server", |_| Ok(())).await
    }
}
