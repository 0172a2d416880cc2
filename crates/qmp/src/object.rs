//! Objects that a manager may make (`object-add`, `--object`): `authz-simple`, `authz-list`, `iothread`, `secret`, `throttle-group`
//! and `tls-creds-x509`.

use infill_base::ThrottleLimits;
use serde_json::{Map, Value};

use crate::error::QmpError;
use crate::members::{Members, Words};
use crate::{names, throttle};

/// What a secret is, where it is given itself.
const DATA: &str = "data";
/// The type of an object.
const QOM_TYPE: &str = "qom-type";

/// An object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectOptions {
    /// Its id.
    pub id: String,
    /// What it is.
    pub kind: ObjectKind,
}

/// What an object is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectKind {
    /// An I/O thread. Reactors are started with the process and shared by all exports, so this is a name that exports
    /// may give, and changes nothing else.
    IoThread,
    /// Limits that several disks share.
    ThrottleGroup(ThrottleLimits),
    /// Credentials for TLS.
    TlsCredsX509(TlsCredsX509),
    /// Something that nobody else is to know.
    Secret(SecretOptions),
    /// The one who may come in, by name.
    AuthzSimple(String),
    /// Who may come in.
    AuthzList(AuthzList),
}

/// `authz-list`: the first rule that matches decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthzList {
    /// Whether those may come in whom no rule matches.
    pub allows: bool,
    /// In order.
    pub rules: Vec<AuthzRule>,
}

/// A rule of an [`AuthzList`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthzRule {
    /// Whom it matches.
    pub matches: String,
    /// Whether they may come in.
    pub allows: bool,
    /// How it matches, where that is said.
    pub format: Option<AuthzFormat>,
}

/// How a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthzFormat {
    /// As it stands; this is so where nothing is said.
    Exact,
    /// `*` stands for anything, `?` for one character.
    Glob,
}

impl Words for AuthzFormat {
    const WORDS: &'static [(&'static str, AuthzFormat)] =
        &[("exact", AuthzFormat::Exact), ("glob", AuthzFormat::Glob)];
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AuthzPolicy {
    Deny,
    Allow,
}

impl Words for AuthzPolicy {
    const WORDS: &'static [(&'static str, AuthzPolicy)] =
        &[("deny", AuthzPolicy::Deny), ("allow", AuthzPolicy::Allow)];
}

/// Most rules of a list.
const AUTHZ_RULES_MAX: usize = 4096;

impl AuthzList {
    /// Reads what these alone take.
    fn read(mut members: Members) -> Result<AuthzList, QmpError> {
        let policy = members.opt_word("policy")?.unwrap_or(AuthzPolicy::Deny);
        let rules = members.opt_objects("rules")?.unwrap_or_default();
        members.finish()?;
        if rules.len() > AUTHZ_RULES_MAX {
            return Err(QmpError::generic(format!("'rules' has more than {AUTHZ_RULES_MAX} rules")));
        }
        let read = |mut rule: Members| {
            let matches = rule.str("match")?;
            let policy: AuthzPolicy = rule.word("policy")?;
            let format = rule.opt_word("format")?;
            rule.finish()?;
            Ok(AuthzRule { matches, allows: policy == AuthzPolicy::Allow, format })
        };
        let rules = rules.into_iter().map(read).collect::<Result<_, QmpError>>()?;
        Ok(AuthzList { allows: policy == AuthzPolicy::Allow, rules })
    }
}

/// `secret`.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretOptions {
    /// Where it stands.
    pub from: SecretFrom,
    /// Whether it is written in base64.
    pub base64: bool,
}

/// Where a secret stands.
#[derive(Clone, PartialEq, Eq)]
pub enum SecretFrom {
    /// Here.
    Data(String),
    /// In a file of that name.
    File(String),
}

/// Never tells what it is.
impl std::fmt::Debug for SecretOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SecretOptions(…)")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SecretFormat {
    Raw,
    Base64,
}

impl Words for SecretFormat {
    const WORDS: &'static [(&'static str, SecretFormat)] =
        &[("raw", SecretFormat::Raw), ("base64", SecretFormat::Base64)];
}

impl SecretOptions {
    /// Reads what these alone take.
    fn read(mut members: Members) -> Result<SecretOptions, QmpError> {
        let format = members.opt_word("format")?.unwrap_or(SecretFormat::Raw);
        let (data, file) = (members.opt_str(DATA)?, members.opt_str("file")?);
        for name in ["keyid", "iv"] {
            members.refuse(name, "give the secret in a file that only this program can read")?;
        }
        members.finish()?;
        let from = match (data, file) {
            (Some(data), None) => SecretFrom::Data(data),
            (None, Some(file)) => SecretFrom::File(file),
            (Some(_), Some(_)) => {
                return Err(QmpError::generic("'file' and 'data' are mutually exclusive"));
            }
            (None, None) => return Err(QmpError::generic("Either 'file' or 'data' must be provided")),
        };
        Ok(SecretOptions { from, base64: format == SecretFormat::Base64 })
    }
}

/// `tls-creds-x509`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsCredsX509 {
    /// Whether they are for a server (else for a client).
    pub server: bool,
    /// The directory with the files of the protocol's names (`ca-cert.pem` and so on).
    pub dir: String,
    /// Whether the other end's certificate is verified.
    pub verify_peer: bool,
    /// Whether our own certificate is verified before it is used.
    pub sanity_check: bool,
    /// The secret that decrypts our private key.
    pub password: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Endpoint {
    Client,
    Server,
}

impl Words for Endpoint {
    const WORDS: &'static [(&'static str, Endpoint)] =
        &[("client", Endpoint::Client), ("server", Endpoint::Server)];
}

impl TlsCredsX509 {
    /// Reads what these alone take.
    fn read(mut members: Members) -> Result<TlsCredsX509, QmpError> {
        let verify_peer = members.opt_bool("verify-peer")?.unwrap_or(true);
        let dir = members.opt_str("dir")?;
        let endpoint = members.opt_word("endpoint")?.unwrap_or(Endpoint::Client);
        let priority = members.opt_str("priority")?;
        let sanity_check = members.opt_bool("sanity-check")?.unwrap_or(true);
        let password = members.opt_str("passwordid")?;
        members.finish()?;
        let dir = dir.ok_or_else(|| QmpError::generic("Missing 'dir' property value"))?;
        if priority.is_some_and(|priority| priority != "NORMAL") {
            return Err(QmpError::generic(
                "'priority' is in the language of another library and is not supported: leave it out; TLS 1.2 and 1.3 \
                 with ciphers that are not broken are what is agreed on",
            ));
        }
        Ok(TlsCredsX509 { server: endpoint == Endpoint::Server, dir, verify_peer, sanity_check, password })
    }
}

/// A type of object that QEMU knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind(&'static str);

macro_rules! kinds {
    ($($name:literal),* $(,)?) => { &[$(($name, Kind($name))),*] };
}

impl Words for Kind {
    const WORDS: &'static [(&'static str, Kind)] =
        kinds!["authz-list", "authz-simple", "iothread", "secret", "throttle-group", "tls-creds-x509"];

    fn of(word: &str) -> Option<&'static Kind> {
        Self::WORDS.iter().chain(UNBUILT).find(|(name, _)| *name == word).map(|(_, kind)| kind)
    }
}

/// Types that QEMU knows and that are not built.
const UNBUILT: &[(&str, Kind)] = kinds![
    "authz-list-file",
    "authz-pam",
    "main-loop",
    "secret_keyring",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-cipher-suites",
];

/// The members of an object as an error or a log may tell them: without what a secret is.
pub fn without_secret(members: &Map<String, Value>) -> Map<String, Value> {
    let mut told = members.clone();
    if let Some(data) = told.get_mut(DATA) {
        *data = Value::from("…");
    }
    told
}

impl ObjectOptions {
    /// The members of an object as an option describes it. Where it cannot be read and may hold a secret, the error quotes
    /// nothing of it: what follows a comma that was not doubled would be a part of that secret.
    pub fn members(text: &str) -> Result<Members, QmpError> {
        Members::of_argument(text, Some(QOM_TYPE)).map_err(|error| match text.contains(DATA) {
            true => QmpError::generic(
                "it is neither JSON nor keys with values (a comma in a value is written twice); no more of it is told, \
                 as it may hold a secret",
            ),
            false => error,
        })
    }

    /// An argument that has no place, as errors tell of it: nothing of what may be a description of a secret.
    pub fn told_stray(argument: &str) -> String {
        match argument.find(['=', '{']) {
            Some(at) if argument.contains(DATA) => format!("{}…", &argument[..=at]),
            _ => argument.to_owned(),
        }
    }

    /// An object as errors tell of the option that describes it: its type and its id, as far as they can be read.
    pub fn told(text: &str) -> String {
        let Ok(members) = Members::of_argument(text, Some(QOM_TYPE)) else { return "…".into() };
        let (object, _) = members.into_parts();
        let word = |name: &str| object.get(name).and_then(Value::as_str);
        let id = word("id").map(|id| format!("id={id}"));
        [word(QOM_TYPE).map(str::to_owned), id].into_iter().flatten().collect::<Vec<_>>().join(",")
    }

    /// Reads all of `members`.
    pub fn read(mut members: Members) -> Result<ObjectOptions, QmpError> {
        let kind: Kind = members.word(QOM_TYPE)?;
        let id = members.str("id")?;
        let kind = match kind.0 {
            "iothread" => {
                // They tune polling and pools that reactors do not have.
                for number in [
                    "poll-max-ns",
                    "poll-grow",
                    "poll-shrink",
                    "aio-max-batch",
                    "thread-pool-min",
                    "thread-pool-max",
                ] {
                    members.opt_unsigned(number)?;
                }
                members.finish()?;
                ObjectKind::IoThread
            }
            "authz-simple" => {
                let identity = members.str("identity")?;
                members.finish()?;
                ObjectKind::AuthzSimple(identity)
            }
            "authz-list" => ObjectKind::AuthzList(AuthzList::read(members)?),
            "authz-list-file" | "authz-pam" => {
                return Err(QmpError::generic(format!(
                    "objects of type '{}' are not supported: use authz-list, with the rules in 'rules'",
                    kind.0
                )));
            }
            "secret" => ObjectKind::Secret(SecretOptions::read(members)?),
            "tls-creds-x509" => ObjectKind::TlsCredsX509(TlsCredsX509::read(members)?),
            "throttle-group" => {
                let limits = throttle::read_group(&mut members)?;
                members.finish()?;
                ObjectKind::ThrottleGroup(limits?)
            }
            "tls-creds-psk" => {
                return Err(QmpError::generic(
                    "objects of type 'tls-creds-psk' are not supported: the TLS library has no pre-shared keys; use \
                     tls-creds-x509",
                ));
            }
            "tls-creds-anon" => {
                return Err(QmpError::generic(
                    "objects of type 'tls-creds-anon' are not supported: without certificates nobody knows whom it \
                     speaks with; use tls-creds-x509",
                ));
            }
            other => {
                return Err(QmpError::generic(format!(
                    "objects of type '{other}' are not supported yet: only authz-list, authz-simple, iothread, secret, throttle-group and \
                     tls-creds-x509 are"
                )));
            }
        };
        if !names::is_id(&id) {
            return Err(QmpError::generic("Parameter 'id' expects an identifier"));
        }
        Ok(ObjectOptions { id, kind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<ObjectOptions, String> {
        ObjectOptions::read(Members::of_argument(text, Some("qom-type")).unwrap()).map_err(|error| error.desc)
    }

    #[test]
    fn credentials_have_the_defaults_that_managers_know() {
        let expected = TlsCredsX509 {
            server: false,
            dir: "/d".into(),
            verify_peer: true,
            sanity_check: true,
            password: None,
        };
        let kind = ObjectKind::TlsCredsX509(expected);
        assert_eq!(read("tls-creds-x509,id=a,dir=/d"), Ok(ObjectOptions { id: "a".into(), kind }));
        let ObjectKind::TlsCredsX509(read) = read(
            "tls-creds-x509,id=a,dir=/d,endpoint=server,verify-peer=off,sanity-check=no,priority=NORMAL",
        )
        .unwrap()
        .kind
        else {
            panic!()
        };
        assert!(read.server && !read.verify_peer && !read.sanity_check);
    }

    #[test]
    fn lists_of_who_may_come_in_are_read_as_managers_write_them() {
        let kind = ObjectKind::AuthzSimple("CN=a,O=b".into());
        let read_kind = |text: &str| read(text).map(|object| object.kind);
        assert_eq!(read_kind("authz-simple,id=a,identity=CN=a,,O=b"), Ok(kind));
        let rule = |matches: &str, allows, format| AuthzRule { matches: matches.into(), allows, format };
        let rules = vec![rule("CN=*", false, Some(AuthzFormat::Glob)), rule("b", true, None)];
        let list = ObjectKind::AuthzList(AuthzList { allows: true, rules });
        for text in [
            "authz-list,id=a,policy=allow,rules.0.match=CN=*,rules.0.policy=deny,rules.0.format=glob,\
             rules.1.match=b,rules.1.policy=allow",
            r#"{"qom-type": "authz-list", "id": "a", "policy": "allow", "rules": [
                {"match": "CN=*", "policy": "deny", "format": "glob"}, {"match": "b", "policy": "allow"}]}"#,
        ] {
            assert_eq!(read_kind(text), Ok(list.clone()));
        }
        let none = AuthzList { allows: false, rules: Vec::new() };
        assert_eq!(read_kind("authz-list,id=a"), Ok(ObjectKind::AuthzList(none)));
        for (text, why) in [
            ("authz-simple,id=a", "Parameter 'identity' is missing"),
            ("authz-list,id=a,rules.0.match=b", "Parameter 'rules[0].policy' is missing"),
            ("authz-list,id=a,policy=zz", "Parameter 'policy' does not accept value 'zz'"),
        ] {
            assert_eq!(read_kind(text), Err(why.into()), "{text}");
        }
    }

    #[test]
    fn a_secret_stands_in_one_place_and_is_not_told() {
        let ObjectOptions { kind, .. } = read("secret,id=s,data=hush").unwrap();
        assert_eq!(format!("{kind:?}"), "Secret(SecretOptions(…))");
        let from = SecretFrom::File("/f".into());
        let kind = ObjectKind::Secret(SecretOptions { from, base64: true });
        assert_eq!(read("secret,id=s,file=/f,format=base64"), Ok(ObjectOptions { id: "s".into(), kind }));
        for (text, why) in [
            ("secret,id=s", "Either 'file' or 'data' must be provided"),
            ("secret,id=s,data=a,file=b", "'file' and 'data' are mutually exclusive"),
            ("secret,id=s,data=a,format=zz", "Parameter 'format' does not accept value 'zz'"),
        ] {
            assert_eq!(read(text), Err(why.into()), "{text}");
        }
        assert!(read("secret,id=s,data=a,keyid=b").unwrap_err().contains("'keyid' is not supported"));
    }

    #[test]
    fn what_is_told_of_an_option_has_no_secret_of_it() {
        for (text, told) in [
            ("secret,id=s,data=hush", "secret,id=s"),
            (r#"{"qom-type": "secret", "id": "s", "data": "hush"}"#, "secret,id=s"),
            ("data=hush,id=s", "id=s"),
            ("secret,id=s,data=a,hush", "…"),
            (r#"{"data": "hush""#, "…"),
            ("iothread,id=t", "iothread,id=t"),
        ] {
            assert_eq!(ObjectOptions::told(text), told);
            let why = ObjectOptions::members(text).map_or_else(|error| error.desc, |_| String::new());
            assert!(!why.contains("hush"), "{why}");
        }
        let why = ObjectOptions::members("tls-creds-x509,id=a,dir").unwrap_err().desc;
        assert_eq!(why, "Expected '=' after parameter 'dir'");
        let (given, _) = ObjectOptions::members("secret,id=s,data=hush").unwrap().into_parts();
        let told = Value::Object(without_secret(&given));
        assert_eq!(told, serde_json::json!({"qom-type": "secret", "id": "s", "data": "…"}));
    }

    #[test]
    fn what_would_weaken_tls_or_is_not_built_is_refused_by_name() {
        for (text, why) in [
            ("tls-creds-x509,id=a", "Missing 'dir' property value"),
            ("tls-creds-x509,dir=/d", "Parameter 'id' is missing"),
            ("tls-creds-x509,id=a,dir=/d,endpoint=zz", "Parameter 'endpoint' does not accept value 'zz'"),
            ("tls-creds-x509,id=a,dir=/d,verify-peer=zz", "Parameter 'verify-peer' expects 'on' or 'off'"),
            ("tls-creds-x509,id=a,dir=/d,foo=1", "Parameter 'foo' is unexpected"),
            ("tls-creds-x509,id=1a,dir=/d", "Parameter 'id' expects an identifier"),
        ] {
            assert_eq!(read(text), Err(why.into()), "{text}");
        }
        for (text, why) in [
            ("tls-creds-x509,id=a,dir=/d,priority=SECURE256", "'priority' is"),
            ("tls-creds-psk,id=a,dir=/d", "'tls-creds-psk' are not supported"),
            ("tls-creds-anon,id=a", "'tls-creds-anon' are not supported"),
            ("authz-pam,id=a,service=x", "'authz-pam' are not supported"),
            ("authz-list-file,id=a,filename=x", "'authz-list-file' are not supported"),
        ] {
            assert!(read(text).unwrap_err().contains(why), "{text}");
        }
    }
}
