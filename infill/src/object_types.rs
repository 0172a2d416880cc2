//! The types that objects can have, as `qom-list-types` and `qom-list-properties` tell them.

/// A type of object.
#[derive(Debug)]
pub struct TypeOfObject {
    /// Its name.
    pub name: &'static str,
    /// What it is a kind of.
    pub parent: &'static str,
    /// Its properties and their types, beside `type`.
    pub properties: &'static [(&'static str, &'static str)],
}

impl TypeOfObject {
    /// Whether it has a property of that name.
    pub fn has(&self, name: &str) -> bool {
        self.properties.iter().any(|(property, _)| *property == name)
    }
}

/// I/O threads.
pub const IOTHREAD: TypeOfObject = TypeOfObject {
    name: "iothread",
    parent: "event-loop-base",
    properties: &[
        ("thread-pool-min", "int"),
        ("aio-max-batch", "int"),
        ("thread-pool-max", "int"),
        ("poll-max-ns", "int"),
        ("poll-grow", "int"),
        ("poll-shrink", "int"),
    ],
};

/// Limits that disks share.
pub const THROTTLE_GROUP: TypeOfObject = TypeOfObject {
    name: "throttle-group",
    parent: "object",
    properties: &[
        ("x-bps-write-max-length", "int"),
        ("x-iops-total-max-length", "int"),
        ("x-iops-size", "int"),
        ("limits", "ThrottleLimits"),
        ("x-bps-total", "int"),
        ("x-iops-read-max-length", "int"),
        ("x-bps-write", "int"),
        ("x-iops-write-max-length", "int"),
        ("x-bps-read-max", "int"),
        ("x-iops-read-max", "int"),
        ("x-bps-total-max", "int"),
        ("x-bps-read-max-length", "int"),
        ("x-iops-read", "int"),
        ("x-bps-read", "int"),
        ("x-bps-write-max", "int"),
        ("x-iops-total-max", "int"),
        ("x-iops-total", "int"),
        ("x-iops-write", "int"),
        ("x-bps-total-max-length", "int"),
        ("x-iops-write-max", "int"),
    ],
};

/// Something that nobody else is to know.
pub const SECRET: TypeOfObject = TypeOfObject {
    name: "secret",
    parent: "secret_common",
    properties: &[
        ("iv", "string"),
        ("keyid", "string"),
        ("format", "QCryptoSecretFormat"),
        ("file", "string"),
        ("data", "string"),
    ],
};

/// Credentials for TLS.
pub const TLS_CREDS_X509: TypeOfObject = TypeOfObject {
    name: "tls-creds-x509",
    parent: "tls-creds",
    properties: &[("endpoint", "QCryptoTLSCredsEndpoint"), ("dir", "string"), ("verify-peer", "bool")],
};

/// The one who may come in.
pub const AUTHZ_SIMPLE: TypeOfObject =
    TypeOfObject { name: "authz-simple", parent: "authz", properties: &[("identity", "string")] };

/// Who may come in.
pub const AUTHZ_LIST: TypeOfObject = TypeOfObject {
    name: "authz-list",
    parent: "authz",
    properties: &[("policy", "QAuthZListPolicy"), ("rules", "QAuthZListRule")],
};

/// All types that can be made.
pub const TYPES: &[&TypeOfObject] =
    &[&AUTHZ_SIMPLE, &AUTHZ_LIST, &IOTHREAD, &SECRET, &THROTTLE_GROUP, &TLS_CREDS_X509];
