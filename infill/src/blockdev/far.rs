//! Servers that a description needs. They are waited for while others change the graph.
//!
//! An opening that meets an export without a connection, or an image on a server that has answered no read yet, ends there: what
//! it had opened is closed, the graph is given back, the server is waited for, and the description is opened again, with what
//! has come of it. So a server that hangs keeps nobody waiting but who needs it. Costs one opening more for each server.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use bytes::BytesMut;
use infill_base::{Ctx, ErrorKind, OpenError};
use infill_io::{Address, connector};
use infill_nbd::{ClientOptions, NbdStorage};
use infill_storage::{StorageHandle, rt};

use crate::tls::Credentials;

/// How long to wait between two attempts to reach an NBD server that is not there yet (`open-timeout`).
const NBD_OPEN_PAUSE: Duration = Duration::from_millis(200);
/// How long a server may take to answer the first read of an image.
const FIRST_READ_TIME: Duration = Duration::from_secs(10);
/// How much is read of it, in bytes, unless the server takes only more.
const FIRST_READ_BYTES: u32 = 512;

/// A connection that a description wants.
pub(super) struct Wanted {
    pub(super) address: Address,
    pub(super) client: ClientOptions,
    /// In use as long as this waits. The name says which they are: those of a directory are read anew for each opening.
    pub(super) _credentials: Option<Arc<Credentials>>,
    /// How long it is tried to reach the server.
    pub(super) within: Duration,
    pub(super) auto_read_only: bool,
}

impl Wanted {
    fn is_same(&self, other: &Wanted) -> bool {
        let how = |wanted: &Wanted| {
            let ClientOptions { name, read_only, on_lost, .. } = &wanted.client;
            (name.clone(), *read_only, *on_lost, wanted.auto_read_only)
        };
        how(self) == how(other)
    }

    /// Connects; tries again for as long as `within`. Where the export cannot be written to and may be read-only, it is.
    pub(super) async fn connect(&self) -> Result<NbdStorage, OpenError> {
        let (begin, mut options) = (rt::now(), self.client.clone());
        loop {
            match NbdStorage::connect(connector(&self.address), options.clone()).await {
                Err(OpenError::Refused { .. }) if self.auto_read_only && !options.read_only => {
                    options.read_only = true
                }
                Err(OpenError::Io(error))
                    if error.kind() == ErrorKind::SourceLost && rt::now() - begin < self.within =>
                {
                    rt::sleep(NBD_OPEN_PAUSE).await;
                }
                result => return result,
            }
        }
    }
}

/// What an opening cannot go on without.
pub(super) enum Missing {
    /// A connection.
    Connection(Box<Wanted>),
    /// The answer to a read.
    Answer(StorageHandle),
}

/// Servers that were waited for.
#[derive(Default)]
pub struct Servers {
    connections: Vec<(Wanted, Result<NbdStorage>)>,
    /// By the names of their storages.
    answers: Vec<(String, Result<()>)>,
    missing: Option<Missing>,
}

impl Servers {
    /// The connection that is wanted, or why there is none.
    pub(super) fn connection(&mut self, wanted: Wanted) -> Result<NbdStorage> {
        known(&mut self.connections, |other| other.is_same(&wanted)).unwrap_or_else(|| {
            let name = wanted.client.name.clone().unwrap_or_default();
            self.missing = Some(Missing::Connection(Box::new(wanted)));
            bail!("{name}: there is no connection to it yet")
        })
    }

    /// Refuses a storage whose server has answered no read.
    pub(super) fn answers(&mut self, storage: &StorageHandle) -> Result<()> {
        let name = storage.name();
        known(&mut self.answers, |other| *other == name).unwrap_or_else(|| {
            self.missing = Some(Missing::Answer(storage.clone()));
            bail!("{name}: it has answered no read yet")
        })
    }

    /// What the last opening could not go on without.
    pub(super) fn take_missing(&mut self) -> Option<Missing> {
        self.missing.take()
    }

    /// Waits for it, or for what keeps it away.
    pub(super) async fn wait_for(&mut self, missing: Missing) {
        match missing {
            Missing::Connection(wanted) => {
                let connected = wanted.connect().await.map_err(anyhow::Error::from);
                self.connections.push((*wanted, connected));
            }
            Missing::Answer(storage) => self.answers.push((storage.name(), first_read(&storage).await)),
        }
    }
}

/// What is known of the one that `is` takes. An error is told once.
fn known<K, T: Clone>(all: &mut Vec<(K, Result<T>)>, is: impl Fn(&K) -> bool) -> Option<Result<T>> {
    let at = all.iter().position(|(key, _)| is(key))?;
    Some(match &all[at].1 {
        Ok(value) => Ok(value.clone()),
        Err(_) => all.remove(at).1,
    })
}

/// Whether a server answers reads. What is wrong with the answer tells whoever reads there next.
async fn first_read(storage: &StorageHandle) -> Result<()> {
    let bytes = storage.limits().request_align.max(FIRST_READ_BYTES);
    if storage.len() < bytes.into() {
        return Ok(());
    }
    let read = storage.read(&Ctx::GUEST, 0, BytesMut::zeroed(bytes as usize));
    match rt::timeout(FIRST_READ_TIME, read).await {
        Some(_) => Ok(()),
        None => Err(anyhow!("{}: its server has not answered a read in {FIRST_READ_TIME:?}", storage.name())),
    }
}
