//! URIs of NBD exports: `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH`.
//!
//! Source: the NBD URI specification, and RFC 3986 for what a URI is. What asks for TLS is refused, never weakened;
//! parameters that are not known are refused by name.

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
    let unix = match scheme.to_ascii_lowercase().as_str() {
        "nbd" => false,
        "nbd+unix" => true,
        "nbds" | "nbds+unix" => {
            return Err(format!(
                "{scheme} means TLS, which is not supported; use nbd:// or nbd+unix:// on a network you trust"
            ));
        }
        _ => return Err(format!("the scheme {scheme:?} is not known; nbd and nbd+unix are")),
    };
    let rest = rest.strip_prefix("//").ok_or_else(|| format!("// must follow {scheme}:"))?;
    if rest.contains('#') {
        return Err("it has a fragment (#), which means nothing here; write %23 for a # in a name".into());
    }
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = decode_export(path)?;
    let socket = query_socket(query.unwrap_or(""))?;
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
    Ok(NbdUri { server, export })
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

fn query_socket(query: &str) -> Result<Option<PathBuf>, String> {
    let mut socket = None;
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        if key != "socket" {
            return Err(match key.starts_with("tls-") {
                true => format!("the parameter {key} is about TLS, which is not supported"),
                false => format!("the parameter {key:?} is not known"),
            });
        }
        let value = decode(value)?;
        if value.is_empty() {
            return Err("the parameter socket names no file".into());
        }
        if value.contains(&0) {
            return Err("sockets without a file (a name that begins with NUL) are not supported".into());
        }
        if socket.replace(PathBuf::from(OsString::from_vec(value))).is_some() {
            return Err("the parameter socket is there twice".into());
        }
    }
    Ok(socket)
}

fn decode_authority(authority: &str) -> Result<ServerAddress, String> {
    if authority.contains('@') {
        return Err("it names a user, which only TLS could use".into());
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
        match &self.server {
            ServerAddress::Tcp { host, port } => {
                f.write_str("nbd://")?;
                match host.contains(':') {
                    true => write!(f, "[{host}]")?,
                    false => encode(f, host.as_bytes(), b"")?,
                }
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
            }
            ServerAddress::Unix(_) => f.write_str("nbd+unix://")?,
        }
        f.write_str("/")?;
        encode(f, self.export.as_bytes(), b"/:@!$&'()*+,;=")?;
        if let ServerAddress::Unix(path) = &self.server {
            f.write_str("?socket=")?;
            encode(f, Path::as_os_str(path).as_bytes(), b"/:@!$'()*,;")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16, export: &str) -> NbdUri {
        NbdUri { server: ServerAddress::Tcp { host: host.into(), port }, export: export.into() }
    }

    fn unix(path: &str, export: &str) -> NbdUri {
        NbdUri { server: ServerAddress::Unix(path.into()), export: export.into() }
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
        ] {
            assert_eq!(uri.to_string().parse::<NbdUri>().unwrap(), uri, "{uri}");
        }
    }

    #[test]
    fn what_is_wrong_is_refused_with_its_reason() {
        for (text, reason) in [
            ("nbds://host/x", "TLS"),
            ("nbds+unix:///x?socket=s", "TLS"),
            ("nbd+vsock://1/x", "not known"),
            ("nbd:host", "// must follow"),
            ("nbd+unix:///x", "socket=PATH"),
            ("nbd+unix:///x?socket=", "names no file"),
            ("nbd+unix:///x?socket=a&socket=b", "twice"),
            ("nbd+unix:///x?socket=%00abstract", "without a file"),
            ("nbd+unix://host/x?socket=s", "takes no host"),
            ("nbd://host/x?socket=s", "belongs to nbd+unix"),
            ("nbd://host/x?tls-type=psk", "TLS"),
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
