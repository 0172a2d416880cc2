//! From an image name to a description.

use std::os::unix::fs::FileTypeExt;

use anyhow::{Result, bail};
use infill_nbd::{NbdUri, ServerAddress};
use infill_qmp::{BlockdevOptions, Driver, Locking, NbdCredentials, NbdTls, SocketAddress};

use super::name::Name;

/// What a name turned out to be.
#[derive(Clone, Debug)]
pub enum Located {
    /// Bytes somewhere: a format is still to be put on them.
    Protocol(BlockdevOptions),
    /// A whole description (`json:`).
    Tree(BlockdevOptions),
}

/// Finds out what `name` names. Looks at a path only to see whether it is a device.
pub fn locate(name: &str) -> Result<Located> {
    Ok(match Name::parse(name)? {
        Name::Path(path) => Located::Protocol(BlockdevOptions::new(Driver::File {
            filename: path.to_owned(),
            device: std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device()),
            locking: Locking::Auto,
        })),
        Name::Nbd(uri) => {
            let uri: NbdUri = uri.parse()?;
            let server = match uri.server {
                ServerAddress::Tcp { host, port } => SocketAddress::Inet { host, port },
                ServerAddress::Unix(path) => SocketAddress::Unix { path: path.display().to_string() },
            };
            let tls = uri.tls.map(|tls| NbdTls {
                credentials: NbdCredentials::Directory {
                    dir: tls.certificates,
                    verify_peer: tls.verify_peer,
                },
                hostname: tls.hostname,
            });
            Located::Protocol(BlockdevOptions::new(Driver::Nbd {
                server,
                export: uri.export,
                reconnect_delay: None,
                open_timeout: None,
                tls,
            }))
        }
        Name::Json(text) => {
            if !text.starts_with('{') {
                bail!("json: is followed by an object, as in json:{{\"driver\":…}}");
            }
            let options = BlockdevOptions::of_argument(text)?;
            match options.driver {
                Driver::File { .. } | Driver::Null { .. } | Driver::Nbd { .. } => Located::Protocol(options),
                _ => Located::Tree(options),
            }
        }
    })
}
