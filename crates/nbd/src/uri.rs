//! URIs of NBD exports: `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH`, and `nbds` in the place of `nbd`
//! for TLS.
//!
//! Source: the NBD URI specification, and RFC 3986 for what a URI is; `tls-certificates=DIR` is libnbd's. `nbd` means in
//! the clear and `nbds` means TLS, and neither is ever taken for the other: parameters of TLS without it are refused, as
//! are parameters that are not known.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::proto::STRING_BYTES_MAX;

/// The port that is meant where a URI names none.
pub const DEFAULT_PORT: u16 = 10809;
/// Longest URI that is read, in bytes.
const URI_BYTES_MAX: usize = 16 << 10;

/// Where an export is, as its URI says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdUri {
    /// How its server is reached.
    pub server: ServerAddress,
    /// The export's name; may be empty.
    pub export: String,
    /// TLS, if it is asked for.
    pub tls: Option<UriTls>,
}

/// What a URI says of TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UriTls {
    /// The directory of credentials.
    pub certificates: Option<PathBuf>,
    /// What the server's certificate must be for, where that is not the host.
    pub hostname: Option<String>,
    /// Whether the server's certificate is verified.
    pub verify_peer: bool,
}

impl Default for UriTls {
    fn default() -> UriTls {
        UriTls { certificates: None, hostname: None, verify_peer: true }
    }
}

/// How a server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerAddress {
    /// Over TCP.
    Tcp {
        /// A name, or a number (IPv6 without brackets).
        host: String,
        /// The port.
        port: u16,
    },
    /// Over a Unix socket.
    Unix(PathBuf),
}

/// What is wrong with a URI.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{uri:?} is not a usable NBD URI: {why}")]
pub struct UriError {
    uri: String,
    why: String,
}

impl NbdUri {
    /// Whether `text` means to be an NBD URI: then it is one, or wrong, but no file name.
    pub fn is_one(text: &str) -> bool {
        let Some((scheme, _)) = text.split_once(':') else { return false };
        ["nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock"]
            .iter()
            .any(|known| scheme.eq_ignore_ascii_case(known))
    }
}

impl FromStr for NbdUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<NbdUri, UriError> {
        parse(text).map_err(|why| {
            let uri = text.chars().take(200).collect();
            UriError { uri, why }
        })
    }
}

fn parse(text: &str) -> Result<NbdUri, String> {
    if text.len() > URI_BYTES_MAX {
        return Err(format!("it has {} bytes, at most {URI_BYTES_MAX} are read", text.len()));
    }
    let (scheme, rest) = text.split_once(':').ok_or("it has no scheme; write nbd://HOST/EXPORT")?;
    let (unix, secure) = match scheme.to_ascii_lowercase().as_str() {
        "nbd" => (false, false),
        "nbds" => (false, true),
        "nbd+unix" => (true, false),
        "nbds+unix" => (true, true),
        _ => {
            return Err(format!("the scheme {scheme:?} is not known; nbd, nbds, nbd+unix and nbds+unix are"));
        }
    };
    let rest = rest.strip_prefix("//").ok_or_else(|| format!("// must follow {scheme}:"))?;
    if rest.contains('#') {
        return Err("it has a fragment (#), which means nothing here; write %23 for a # in a name".into());
    }
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = decode_export(path)?;
    let Query { socket, tls } = Query::read(query.unwrap_or(""))?;
    let server = match (unix, socket) {
        (true, Some(socket)) if authority.is_empty() => ServerAddress::Unix(socket),
        (true, Some(_)) => {
            return Err(format!(
                "nbd+unix takes no host, found {authority:?}; write nbd+unix:///EXPORT?socket=PATH"
            ));
        }
        (true, None) => return Err("nbd+unix needs the parameter socket=PATH".into()),
        (false, Some(_)) => return Err("the parameter socket belongs to nbd+unix".into()),
        (false, None) => decode_authority(authority)?,
    };
    let tls = match tls {
        Some((name, _)) if !secure => {
            return Err(format!("the parameter {name} is about TLS, which {scheme} is without; write nbds"));
        }
        Some((_, tls)) => Some(tls),
        None => secure.then(UriTls::default),
    };
    Ok(NbdUri { server, export, tls })
}

fn decode_export(path: &str) -> Result<String, String> {
    let export = String::from_utf8(decode(path)?).map_err(|_| "the export's name is not UTF-8")?;
    if export.len() > STRING_BYTES_MAX {
        return Err(format!("the export's name has {} bytes, at most {STRING_BYTES_MAX} are", export.len()));
    }
    if export.contains('\0') {
        return Err("the export's name contains a NUL".into());
    }
    Ok(export)
}

/// What stands behind the question mark.
#[derive(Default)]
struct Query {
    socket: Option<PathBuf>,
    /// With the name of the first parameter that is about it.
    tls: Option<(String, UriTls)>,
}

impl Query {
    fn read(query: &str) -> Result<Query, String> {
        let mut read = Query::default();
        let mut seen: Vec<&str> = Vec::new();
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            if seen.contains(&key) {
                return Err(format!("the parameter {key} is there twice"));
            }
            read.take(key, decode(value)?)?;
            seen.push(key);
        }
        Ok(read)
    }

    fn take(&mut self, key: &str, value: Vec<u8>) -> Result<(), String> {
        if key == "socket" {
            if value.contains(&0) {
                return Err("sockets without a file (a name that begins with NUL) are not supported".into());
            }
            self.socket = Some(path(key, value)?);
            return Ok(());
        }
        let tls = match key.starts_with("tls-") {
            true => &mut self.tls.get_or_insert_with(|| (key.to_owned(), UriTls::default())).1,
            false => return Err(format!("the parameter {key:?} is not known")),
        };
        let text = String::from_utf8_lossy(&value);
        match key {
            "tls-certificates" => tls.certificates = Some(path(key, value)?),
            "tls-hostname" if !text.is_empty() => tls.hostname = Some(text.into_owned()),
            "tls-verify-peer" => {
                tls.verify_peer = match &*text {
                    "1" | "true" | "yes" | "on" => true,
                    "0" | "false" | "no" | "off" => false,
                    _ => return Err(format!("the parameter {key} is 0 or 1, found {text:?}")),
                };
            }
            "tls-type" if text == "x509" => {}
            "tls-type" => return Err(format!("TLS of the type {text:?} is not supported; x509 is")),
            "tls-psk-file" | "tls-username" => {
                return Err(format!("the parameter {key} is about pre-shared keys, which are not supported"));
            }
            _ => return Err(format!("the parameter {key}={text} is not known")),
        }
        Ok(())
    }
}

fn path(key: &str, value: Vec<u8>) -> Result<PathBuf, String> {
    match value.is_empty() {
        true => Err(format!("the parameter {key} names no file")),
        false => Ok(PathBuf::from(OsString::from_vec(value))),
    }
}

fn decode_authority(authority: &str) -> Result<ServerAddress, String> {
    if authority.contains('@') {
        return Err(
            "it names a user, which only TLS with pre-shared keys could use, and that is not supported"
                .into(),
        );
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or("the ] after the host is missing")?;
            host.parse::<std::net::Ipv6Addr>().map_err(|_| format!("{host:?} is not an IPv6 address"))?;
            let port = match port {
                "" => "",
                _ => port.strip_prefix(':').ok_or_else(|| format!("a port must follow ], found {port:?}"))?,
            };
            (host.to_owned(), port)
        }
        None => {
            let (host, port) = authority.split_once(':').unwrap_or((authority, ""));
            let host = String::from_utf8(decode(host)?).map_err(|_| "the host's name is not UTF-8")?;
            (host, port)
        }
    };
    if host.is_empty() {
        return Err("it names no host; write nbd://HOST/EXPORT, or nbd+unix:///EXPORT?socket=PATH".into());
    }
    let port = match port {
        "" => DEFAULT_PORT,
        _ => port.parse().ok().filter(|port| *port != 0).ok_or_else(|| format!("{port:?} is not a port"))?,
    };
    Ok(ServerAddress::Tcp { host, port })
}

/// Replaces %XX by the byte it stands for.
fn decode(text: &str) -> Result<Vec<u8>, String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
        match (digit(bytes.next()), digit(bytes.next())) {
            (Some(high), Some(low)) => out.push((high * 16 + low) as u8),
            _ => return Err("two hexadecimal digits must follow %; write %25 for a %".into()),
        }
    }
    Ok(out)
}

/// Writes `bytes`, with %XX for what is neither unreserved in a URI nor in `also`.
fn encode(f: &mut fmt::Formatter<'_>, bytes: &[u8], also: &[u8]) -> fmt::Result {
    for byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(byte) || also.contains(byte) {
            write!(f, "{}", char::from(*byte))?;
        } else {
            write!(f, "%{byte:02X}")?;
        }
    }
    Ok(())
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secure = if self.tls.is_some() { "s" } else { "" };
        match &self.server {
            ServerAddress::Tcp { host, port } => {
                write!(f, "nbd{secure}://")?;
                match host.contains(':') {
                    true => write!(f, "[{host}]")?,
                    false => encode(f, host.as_bytes(), b"")?,
                }
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
            }
            ServerAddress::Unix(_) => write!(f, "nbd{secure}+unix://")?,
        }
        f.write_str("/")?;
        encode(f, self.export.as_bytes(), b"/:@!$&'()*+,;=")?;
        let mut mark = "?";
        let mut parameter = |key: &str, value: &[u8]| {
            write!(f, "{}{key}=", std::mem::replace(&mut mark, "&"))?;
            encode(f, value, b"/:@!$'()*,;")
        };
        if let ServerAddress::Unix(path) = &self.server {
            parameter("socket", Path::as_os_str(path).as_bytes())?;
        }
        if let Some(tls) = &self.tls {
            if let Some(path) = &tls.certificates {
                parameter("tls-certificates", Path::as_os_str(path).as_bytes())?;
            }
            if let Some(hostname) = &tls.hostname {
                parameter("tls-hostname", hostname.as_bytes())?;
            }
            if !tls.verify_peer {
                parameter("tls-verify-peer", b"0")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16, export: &str) -> NbdUri {
        NbdUri { server: ServerAddress::Tcp { host: host.into(), port }, export: export.into(), tls: None }
    }

    fn unix(path: &str, export: &str) -> NbdUri {
        NbdUri { server: ServerAddress::Unix(path.into()), export: export.into(), tls: None }
    }

    fn secure(uri: NbdUri, tls: UriTls) -> NbdUri {
        NbdUri { tls: Some(tls), ..uri }
    }

    #[test]
    fn the_specifications_examples_are_read_as_it_says() {
        for (text, uri) in [
            ("nbd://example.com:10809/export", tcp("example.com", 10809, "export")),
            ("nbd+unix:///export?socket=nbd.sock", unix("nbd.sock", "export")),
            ("nbd://example.com/disk", tcp("example.com", 10809, "disk")),
            ("nbd+unix:///disk?socket=sock", unix("sock", "disk")),
            ("nbd://example.com/", tcp("example.com", 10809, "")),
            ("nbd://example.com", tcp("example.com", 10809, "")),
            ("nbd://example.com//disk", tcp("example.com", 10809, "/disk")),
            ("nbd://example.com/hello%20world", tcp("example.com", 10809, "hello world")),
            ("NBD://[::1]:99/a/b", tcp("::1", 99, "a/b")),
            ("nbd+unix://?socket=/tmp/s", unix("/tmp/s", "")),
            ("nbd+unix:///?socket=/tmp/a%20b", unix("/tmp/a b", "")),
            ("nbds://h/x", secure(tcp("h", 10809, "x"), UriTls::default())),
            ("nbds+unix:///x?socket=s&tls-type=x509", secure(unix("s", "x"), UriTls::default())),
            (
                "nbds+unix:///x?tls-certificates=/d%20e&socket=s&tls-hostname=a.b&tls-verify-peer=0",
                secure(
                    unix("s", "x"),
                    UriTls {
                        certificates: Some("/d e".into()),
                        hostname: Some("a.b".into()),
                        verify_peer: false,
                    },
                ),
            ),
        ] {
            assert_eq!(text.parse::<NbdUri>().unwrap(), uri, "{text}");
        }
    }

    #[test]
    fn what_is_printed_is_read_back() {
        for uri in [
            tcp("::1", 10809, "a b?c#d%e/ü"),
            tcp("host", 1, ""),
            unix("/tmp/with space & ?#+=%/sock", "//x"),
            secure(tcp("host", 1, ""), UriTls::default()),
            secure(
                unix("/s", "x"),
                UriTls {
                    certificates: Some("/a&b=c".into()),
                    hostname: Some("::1".into()),
                    verify_peer: false,
                },
            ),
        ] {
            assert_eq!(uri.to_string().parse::<NbdUri>().unwrap(), uri, "{uri}");
        }
    }

    #[test]
    fn what_is_wrong_is_refused_with_its_reason() {
        for (text, reason) in [
            ("nbds://host/x?tls-type=psk", "\"psk\" is not supported"),
            ("nbds://host/x?tls-type=anon", "\"anon\" is not supported"),
            ("nbds://host/x?tls-psk-file=f", "pre-shared keys"),
            ("nbds://host/x?tls-verify-peer=2", "0 or 1"),
            ("nbds://host/x?tls-hostname=", "not known"),
            ("nbds://host/x?tls-foo=1", "not known"),
            ("nbds://host/x?tls-certificates=", "names no file"),
            ("nbds://host/x?tls-certificates=a&tls-certificates=b", "twice"),
            ("nbds+unix:///x", "socket=PATH"),
            ("nbd://host/x?tls-hostname=h", "which nbd is without"),
            ("nbd+vsock://1/x", "not known"),
            ("nbd:host", "// must follow"),
            ("nbd+unix:///x", "socket=PATH"),
            ("nbd+unix:///x?socket=", "names no file"),
            ("nbd+unix:///x?socket=a&socket=b", "twice"),
            ("nbd+unix:///x?socket=%00abstract", "without a file"),
            ("nbd+unix://host/x?socket=s", "takes no host"),
            ("nbd://host/x?socket=s", "belongs to nbd+unix"),
            ("nbd://host/x?speed=1", "not known"),
            ("nbd://user@host/x", "user"),
            ("nbd:///x", "no host"),
            ("nbd://host:0/x", "not a port"),
            ("nbd://host:65536/x", "not a port"),
            ("nbd://[::1/x", "]"),
            ("nbd://[nonsense]/x", "IPv6"),
            ("nbd://host/%4", "hexadecimal"),
            ("nbd://host/%zz", "hexadecimal"),
            ("nbd://host/%00", "NUL"),
            ("nbd://host/%ff", "UTF-8"),
            ("nbd://host/x#y", "fragment"),
        ] {
            let error = text.parse::<NbdUri>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
        assert!(format!("nbd://host/{}", "x".repeat(4097)).parse::<NbdUri>().is_err());
        assert!("x".repeat(1 << 20).parse::<NbdUri>().is_err());
    }

    #[test]
    fn a_file_name_is_not_taken_for_a_uri() {
        assert!(NbdUri::is_one("nbd://x") && NbdUri::is_one("nbds://x") && NbdUri::is_one("NBD+UNIX:///"));
        assert!(!NbdUri::is_one("nbd") && !NbdUri::is_one("./nbd:x") && !NbdUri::is_one("http://nbd"));
    }
}
