//! Objects by id: I/O threads, which are names, limits that disks share, secrets, credentials for TLS, and who may come in.
//!
//! What never happens: an object goes while somebody uses it; credentials change. A user holds them; whoever takes an object
//! away is told that it is in use. (QEMU lets the object go and its users keep it; a kept description of a node that
//! names an object would be worth nothing then.)

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use infill_base::ThrottleLimits;
use infill_node::ThrottleGroup;
use infill_qmp::throttle::limits_value;
use infill_qmp::{ObjectKind, ObjectOptions, SecretFrom, SecretOptions};
use infill_storage::sync::{Mutex, lock};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use crate::authz::Authz;
use crate::object_types::{
    AUTHZ_LIST, AUTHZ_SIMPLE, IOTHREAD, SECRET, THROTTLE_GROUP, TLS_CREDS_X509, TypeOfObject,
};
use crate::patient::{self, PIPE_PATIENCE};
use crate::tls::Credentials;

/// What an id stands for.
#[derive(Debug)]
pub enum Object {
    /// A name.
    IoThread,
    /// Limits that disks share.
    Throttle(Arc<ThrottleGroup>),
    /// Credentials for TLS.
    Tls(Arc<Credentials>),
    /// What nobody else is to know.
    Secret(Arc<Secret>),
    /// Who may come in.
    Authz(Arc<Authz>),
}

/// Longest secret, in bytes.
const SECRET_BYTES_MAX: u64 = 1 << 20;

/// Something that nobody else is to know. Neither logs nor answers tell it.
pub struct Secret {
    bytes: Zeroizing<Vec<u8>>,
    file: Option<String>,
    base64: bool,
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Secret {
    fn read(options: &SecretOptions) -> Result<Secret> {
        let (given, file) = match &options.from {
            SecretFrom::Data(data) => (Zeroizing::new(data.clone().into_bytes()), None),
            SecretFrom::File(file) => {
                let failed = |error: std::io::Error| anyhow!("Unable to read {file}: {error}");
                let mut bytes = Zeroizing::new(Vec::new());
                patient::read(Path::new(file), SECRET_BYTES_MAX, PIPE_PATIENCE, &mut bytes)
                    .map_err(failed)?;
                (bytes, Some(file.clone()))
            }
        };
        if given.len() as u64 > SECRET_BYTES_MAX {
            bail!("a secret has at most {SECRET_BYTES_MAX} bytes");
        }
        let bytes = match options.base64 {
            true => infill_base::from_base64(&given)
                .map(Zeroizing::new)
                .ok_or_else(|| anyhow!("Base64 data contains invalid characters"))?,
            false => given,
        };
        Ok(Secret { bytes, file, base64: options.base64 })
    }

    /// What it is.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Object {
    fn kind(&self) -> &'static TypeOfObject {
        match self {
            Object::IoThread => &IOTHREAD,
            Object::Throttle(_) => &THROTTLE_GROUP,
            Object::Tls(_) => &TLS_CREDS_X509,
            Object::Secret(_) => &SECRET,
            Object::Authz(authz) => match **authz {
                Authz::Simple(_) => &AUTHZ_SIMPLE,
                Authz::List(_) => &AUTHZ_LIST,
            },
        }
    }

    fn is_in_use(&self) -> bool {
        match self {
            Object::IoThread => false,
            Object::Throttle(group) => Arc::strong_count(group) > 1,
            Object::Tls(credentials) => Arc::strong_count(credentials) > 1,
            Object::Secret(secret) => Arc::strong_count(secret) > 1,
            Object::Authz(authz) => Arc::strong_count(authz) > 1,
        }
    }
}

/// All objects. Cloning shares them.
#[derive(Clone, Debug, Default)]
pub struct Objects(Arc<Mutex<BTreeMap<String, Object>>>);

impl Objects {
    /// Makes one, where nobody else is kept waiting.
    pub fn add(&self, options: &ObjectOptions) -> Result<()> {
        self.insert(&options.id, self.make(&options.kind)?)
    }

    /// Makes what is not among the others yet. Secrets and credentials read files and decrypt keys, for seconds where that
    /// was asked for: not for a reactor.
    pub fn make(&self, kind: &ObjectKind) -> Result<Object> {
        Ok(match kind {
            ObjectKind::IoThread => Object::IoThread,
            ObjectKind::ThrottleGroup(limits) => Object::Throttle(Arc::new(ThrottleGroup::new(*limits))),
            ObjectKind::TlsCredsX509(creds) => {
                let (dir, verify, check) = (Path::new(&creds.dir), creds.verify_peer, creds.sanity_check);
                let password = creds.password.as_deref().map(|id| self.secret(id)).transpose()?;
                let credentials = match creds.server {
                    true => Credentials::server(dir, verify, check, password),
                    false => Credentials::client(dir, verify, check, password),
                };
                Object::Tls(Arc::new(credentials?))
            }
            ObjectKind::Secret(options) => Object::Secret(Arc::new(Secret::read(options)?)),
            ObjectKind::AuthzSimple(identity) => Object::Authz(Arc::new(Authz::Simple(identity.clone()))),
            ObjectKind::AuthzList(list) => Object::Authz(Arc::new(Authz::List(list.clone()))),
        })
    }

    /// Adds what was made.
    pub fn insert(&self, id: &str, object: Object) -> Result<()> {
        let mut objects = lock(&self.0);
        if objects.contains_key(id) {
            bail!("attempt to add duplicate property '{id}' to object (type 'container')");
        }
        objects.insert(id.to_owned(), object);
        Ok(())
    }

    /// Takes one away (`object-del`).
    pub fn del(&self, id: &str) -> Result<()> {
        let mut objects = lock(&self.0);
        match objects.get(id) {
            None => bail!("object '{id}' not found"),
            Some(object) if object.is_in_use() => bail!("object '{id}' is in use, can not be deleted"),
            Some(_) => objects.remove(id),
        };
        Ok(())
    }

    /// All objects: their ids and types.
    pub fn list(&self) -> Vec<(String, &'static TypeOfObject)> {
        lock(&self.0).iter().map(|(id, object)| (id.clone(), object.kind())).collect()
    }

    /// A property of an object, if it has one of that name that is known.
    pub fn property(&self, id: &str, name: &str) -> Option<Value> {
        match (lock(&self.0).get(id)?, name) {
            // Reactors do not poll, and have no pools of threads to be sized.
            (Object::IoThread, name) => IOTHREAD.has(name).then(|| json!(0)),
            (Object::Throttle(group), "limits") => Some(limits_value(&group.limits())),
            (Object::Throttle(group), name) => {
                limits_value(&group.limits()).get(name.strip_prefix("x-")?).cloned()
            }
            (Object::Tls(credentials), "endpoint") => Some(json!(credentials.endpoint())),
            (Object::Tls(credentials), "dir") => Some(json!(credentials.dir)),
            (Object::Tls(credentials), "verify-peer") => Some(json!(credentials.verify_peer)),
            (Object::Tls(_), _) => None,
            (Object::Secret(secret), "format") => Some(json!(if secret.base64 { "base64" } else { "raw" })),
            (Object::Secret(secret), "file") => Some(json!(secret.file.as_deref().unwrap_or_default())),
            (Object::Secret(_), _) => None,
            (Object::Authz(authz), name) => authz.property(name),
        }
    }

    /// Whether there is an I/O thread of that id.
    pub fn has_iothread(&self, id: &str) -> bool {
        matches!(lock(&self.0).get(id), Some(Object::IoThread))
    }

    /// The secret of that id, which is in use as long as it is held.
    fn secret(&self, id: &str) -> Result<Arc<Secret>> {
        match lock(&self.0).get(id) {
            Some(Object::Secret(secret)) => Ok(secret.clone()),
            Some(_) => bail!("Object with id '{id}' is not a secret"),
            None => bail!("No secret with id '{id}'"),
        }
    }

    /// The credentials of that id, which are in use as long as they are held.
    pub fn tls(&self, id: &str) -> Result<Arc<Credentials>> {
        match lock(&self.0).get(id) {
            None => bail!("No TLS credentials with id '{id}'"),
            Some(Object::Tls(credentials)) => Ok(credentials.clone()),
            Some(_) => bail!("Object with id '{id}' is not TLS credentials"),
        }
    }

    /// What says who may come in, of that id, which is in use as long as it is held.
    pub fn authz(&self, id: &str) -> Result<Arc<Authz>> {
        match lock(&self.0).get(id) {
            Some(Object::Authz(authz)) => Ok(authz.clone()),
            _ => bail!("Cannot find QAuthZ object ID {id}"),
        }
    }

    /// The limits of that id, which are in use as long as they are held.
    pub fn throttle_group(&self, id: &str) -> Result<Arc<ThrottleGroup>> {
        match lock(&self.0).get(id) {
            Some(Object::Throttle(group)) => Ok(group.clone()),
            _ => bail!("Throttle group '{id}' does not exist"),
        }
    }

    /// Nothing is limited any more: what waits goes on. For the end, which no limit is to delay.
    pub fn lift_limits(&self) {
        for object in lock(&self.0).values() {
            if let Object::Throttle(group) = object {
                group.set_limits(ThrottleLimits::default());
            }
        }
    }
}
