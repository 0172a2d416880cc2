//! Objects by id: I/O threads, which are names, and credentials for TLS.
//!
//! What never happens: credentials that change or go while somebody uses them. A user holds them; whoever takes an object
//! away is told that it is in use. (QEMU lets the object go and its users keep it; a kept description of a node that
//! names an object would be worth nothing then.)

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use infill_qmp::{ObjectKind, ObjectOptions};
use infill_storage::sync::{Mutex, lock};

use crate::tls::Credentials;

#[derive(Debug)]
enum Object {
    IoThread,
    Tls(Arc<Credentials>),
}

/// All objects. Cloning shares them.
#[derive(Clone, Debug, Default)]
pub struct Objects(Arc<Mutex<BTreeMap<String, Object>>>);

impl Objects {
    /// Makes one (`object-add`).
    pub fn add(&self, options: &ObjectOptions) -> Result<()> {
        let ObjectOptions { id, kind } = options;
        let duplicate = || anyhow!("attempt to add duplicate property '{id}' to object (type 'container')");
        let object = match kind {
            ObjectKind::IoThread => Object::IoThread,
            ObjectKind::TlsCredsX509(creds) => {
                let (dir, verify, check) = (Path::new(&creds.dir), creds.verify_peer, creds.sanity_check);
                let credentials = match creds.server {
                    true => Credentials::server(dir, verify, check),
                    false => Credentials::client(dir, verify, check),
                };
                Object::Tls(Arc::new(credentials?))
            }
        };
        let mut objects = lock(&self.0);
        if objects.contains_key(id) {
            return Err(duplicate());
        }
        objects.insert(id.clone(), object);
        Ok(())
    }

    /// Takes one away (`object-del`).
    pub fn del(&self, id: &str) -> Result<()> {
        let mut objects = lock(&self.0);
        match objects.get(id) {
            None => bail!("object '{id}' not found"),
            Some(Object::Tls(credentials)) if Arc::strong_count(credentials) > 1 => {
                bail!("object '{id}' is in use, can not be deleted")
            }
            Some(_) => objects.remove(id),
        };
        Ok(())
    }

    /// Whether there is an I/O thread of that id.
    pub fn has_iothread(&self, id: &str) -> bool {
        matches!(lock(&self.0).get(id), Some(Object::IoThread))
    }

    /// The credentials of that id, which are in use as long as they are held.
    pub fn tls(&self, id: &str) -> Result<Arc<Credentials>> {
        match lock(&self.0).get(id) {
            None => bail!("No TLS credentials with id '{id}'"),
            Some(Object::IoThread) => bail!("Object with id '{id}' is not TLS credentials"),
            Some(Object::Tls(credentials)) => Ok(credentials.clone()),
        }
    }
}
