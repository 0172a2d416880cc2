//! Credentials for TLS, from directories with the file names that QEMU and libnbd use.
//!
//! | file | server | client |
//! |---|---|---|
//! | `ca-cert.pem`: authorities that the other end's certificate must come from | needed | needed |
//! | `ca-crl.pem`: revoked certificates | optional | optional |
//! | `server-cert.pem`, `server-key.pem` | needed | |
//! | `client-cert.pem`, `client-key.pem`, both or it has none to show | | optional |
//!
//! Files are read once, when the credentials are made; a key that is encrypted needs a secret. Messages are QEMU's where it has the same.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use infill_nbd::{ClientCredentials, ServerTls, TlsError, X509};

use crate::objects::Secret;
use crate::patient::{self, PIPE_PATIENCE};

/// Longest file of credentials, in bytes: ten times what a system's whole list of authorities takes.
const PEM_BYTES_MAX: u64 = 4 << 20;

/// Where a user's credentials are if nobody says where, relative to the home directory.
const USUAL_DIRS: [&str; 2] = [".pki/libnbd", ".config/pki/libnbd"];
/// And a machine's.
const USUAL_DIR: &str = "/etc/pki/libnbd";

/// Credentials of one end.
#[derive(Debug)]
pub struct Credentials {
    /// Where they come from.
    pub dir: PathBuf,
    /// Whether the other end's certificate is verified.
    pub verify_peer: bool,
    end: End,
    /// What their key was decrypted with: it cannot go before them.
    _password: Option<Arc<Secret>>,
}

/// Which end of a connection.
#[derive(Debug)]
enum End {
    Server(ServerTls),
    Client(ClientCredentials),
}

/// The files of a directory.
struct Files {
    dir: PathBuf,
    end: &'static str,
    ca: Vec<u8>,
    crl: Option<Vec<u8>>,
    certificate: Option<Vec<u8>>,
    key: Option<Vec<u8>>,
    password: Option<Arc<Secret>>,
}

impl Files {
    fn read(
        dir: &Path,
        end: &'static str,
        identity_needed: bool,
        password: Option<Arc<Secret>>,
    ) -> Result<Files> {
        let needed = |name: &str| {
            read(&dir.join(name))?.ok_or_else(|| no_access(&dir.join(name), "No such file or directory"))
        };
        let identity = |name: String| match identity_needed {
            true => needed(&name).map(Some),
            false => read(&dir.join(name)),
        };
        Ok(Files {
            dir: dir.to_owned(),
            end,
            ca: needed("ca-cert.pem")?,
            crl: read(&dir.join("ca-crl.pem"))?,
            certificate: identity(format!("{end}-cert.pem"))?,
            key: identity(format!("{end}-key.pem"))?,
            password,
        })
    }

    fn x509(&self) -> X509<'_> {
        X509 {
            ca: &self.ca,
            crl: self.crl.as_deref(),
            certificate: self.certificate.as_deref(),
            key: self.key.as_deref(),
            password: self.password.as_ref().map(|password| password.bytes()),
        }
    }

    /// Says what is wrong, and in which file.
    fn told(&self, error: &TlsError) -> anyhow::Error {
        let file = |name: &str| self.dir.join(name).display().to_string();
        let (ca, end) = (file("ca-cert.pem"), self.end);
        let (certificate, key) = (file(&format!("{end}-cert.pem")), file(&format!("{end}-key.pem")));
        match error {
            TlsError::Ca(why) => anyhow!("Unable to import CA certificate list {ca}: {why}"),
            TlsError::Crl(why) => anyhow!("Cannot load CRL '{}': {why}", file("ca-crl.pem")),
            TlsError::Certificate(why) => anyhow!("Unable to import {end} certificate {certificate}: {why}"),
            TlsError::Key(why) => anyhow!("Cannot load certificate '{certificate}' & key '{key}': {why}"),
            TlsError::Mismatch => anyhow!(
                "Cannot load certificate '{certificate}' & key '{key}': The certificate and the given key do not match."
            ),
            TlsError::Expired => anyhow!("The {end} certificate {certificate} has expired"),
            TlsError::Own(why) => {
                anyhow!("Our own certificate {certificate} failed validation against {ca}: {why}")
            }
            TlsError::Name(_) => anyhow!("{error}"),
        }
    }
}

/// The content of a file; `None` where there is no such file.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let mut content = Vec::new();
    match patient::read(path, PEM_BYTES_MAX, PIPE_PATIENCE, &mut content) {
        Ok(()) if content.len() as u64 > PEM_BYTES_MAX => {
            bail!(
                "{}: it has more than {PEM_BYTES_MAX} bytes, which no list of certificates has",
                path.display()
            )
        }
        Ok(()) => Ok(Some(content)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(no_access(path, &error.to_string())),
    }
}

fn no_access(path: &Path, why: &str) -> anyhow::Error {
    anyhow!("Unable to access credentials {}: {why}", path.display())
}

impl Credentials {
    /// Which end they are for, as the protocol names it.
    pub const fn endpoint(&self) -> &'static str {
        match self.end {
            End::Server(_) => "server",
            End::Client(_) => "client",
        }
    }

    /// Those of a server. With `verify_peer` clients need a certificate; with `sanity_check` ours is verified first.
    pub fn server(
        dir: &Path,
        verify_peer: bool,
        sanity_check: bool,
        password: Option<Arc<Secret>>,
    ) -> Result<Credentials> {
        let files = Files::read(dir, "server", true, password.clone())?;
        let told = |error: TlsError| files.told(&error);
        let tls = ServerTls::new(&files.x509(), verify_peer).map_err(told)?;
        if sanity_check {
            files.x509().check_own(true).map_err(told)?;
        }
        Ok(Credentials { dir: dir.to_owned(), verify_peer, end: End::Server(tls), _password: password })
    }

    /// Those of a client. With `verify_peer` servers are verified; with `sanity_check` our own certificate is verified
    /// first.
    pub fn client(
        dir: &Path,
        verify_peer: bool,
        sanity_check: bool,
        password: Option<Arc<Secret>>,
    ) -> Result<Credentials> {
        let files = Files::read(dir, "client", false, password.clone())?;
        let told = |error: TlsError| files.told(&error);
        let tls = ClientCredentials::new(&files.x509(), verify_peer).map_err(told)?;
        if sanity_check {
            files.x509().check_own(false).map_err(told)?;
        }
        Ok(Credentials { dir: dir.to_owned(), verify_peer, end: End::Client(tls), _password: password })
    }

    /// What a server takes.
    pub fn server_tls(&self) -> Result<ServerTls> {
        match &self.end {
            End::Server(tls) => Ok(tls.clone()),
            End::Client(_) => bail!("Expected TLS credentials for a server endpoint"),
        }
    }

    /// What a client takes.
    pub fn client_tls(&self) -> Result<ClientCredentials> {
        match &self.end {
            End::Client(tls) => Ok(tls.clone()),
            End::Server(_) => bail!("Expected TLS credentials for a client endpoint"),
        }
    }

    /// Those of a client as a URI asks for them.
    pub fn of_uri(dir: Option<&Path>, verify_peer: bool) -> Result<Credentials> {
        match dir {
            Some(dir) => Credentials::client(dir, verify_peer, true, None),
            None => Credentials::client(&usual_dir()?, verify_peer, true, None),
        }
    }
}

/// Where this user's credentials are.
fn usual_dir() -> Result<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let dirs = home.iter().flat_map(|home| USUAL_DIRS.map(|dir| home.join(dir)));
    let dirs: Vec<PathBuf> = dirs.chain([USUAL_DIR.into()]).collect();
    let found = dirs.iter().find(|dir| dir.join("ca-cert.pem").exists());
    found.cloned().ok_or_else(|| {
        anyhow!(
            "there are no credentials for TLS: name their directory, as in nbds://HOST/EXPORT?tls-certificates=DIR \
             (looked for ca-cert.pem in {})",
            dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", ")
        )
    })
}
