//! Image names: what a file name, a URI or a `json:` description says, and what a relative backing name is relative to.
//!
//! Names come from people and from image headers alike, so nothing here touches a file.

use anyhow::{Result, bail};

/// Longest name that is looked at, in bytes (a header's own limit is 1023).
pub const NAME_BYTES_MAX: usize = 64 << 10;

/// What kind of name it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name<'a> {
    /// A path in the file system.
    Path(&'a str),
    /// An NBD URI, whole.
    Nbd(&'a str),
    /// A JSON object that describes a node, without the `json:` before it.
    Json(&'a str),
}

impl<'a> Name<'a> {
    /// Sorts a name. As QEMU does, a colon before the first slash makes what stands before it a protocol.
    pub fn parse(name: &'a str) -> Result<Name<'a>> {
        if name.is_empty() {
            bail!("the file name is empty: name an image file or a URI");
        }
        if name.len() > NAME_BYTES_MAX {
            bail!("the file name has {} bytes; at most {NAME_BYTES_MAX} are taken", name.len());
        }
        let Some(protocol) = protocol_of(name) else { return Ok(Name::Path(name)) };
        match protocol {
            "json" => Ok(Name::Json(&name["json:".len()..])),
            "file" => {
                let path = &name["file:".len()..];
                Ok(Name::Path(path.strip_prefix("//").filter(|rest| rest.starts_with('/')).unwrap_or(path)))
            }
            "nbd" | "nbd+unix" | "nbds" | "nbds+unix" if name[protocol.len()..].starts_with("://") => {
                Ok(Name::Nbd(name))
            }
            _ => bail!(
                "unknown protocol '{protocol}' in '{name}': known are nbd://, nbd+unix://, nbds://, nbds+unix://, file: and json:; \
                 a file whose name has a colon is written ./{name}"
            ),
        }
    }
}

/// What stands before the first colon, where that comes before the first slash.
fn protocol_of(name: &str) -> Option<&str> {
    let colon = name.find(':')?;
    match name.find('/') {
        Some(slash) if slash < colon => None,
        _ => Some(&name[..colon]),
    }
}

/// The whole name of a backing file that the header of `overlay` calls `backing`: relative paths are relative to the
/// overlay's directory.
pub fn resolve_backing(overlay: &str, backing: &str) -> Result<String> {
    if !matches!(Name::parse(backing)?, Name::Path(path) if path == backing && !path.starts_with('/')) {
        return Ok(backing.to_owned());
    }
    match Name::parse(overlay)? {
        Name::Path(path) => {
            let directory = path.rfind('/').map_or("", |slash| &path[..=slash]);
            Ok(format!("{directory}{backing}"))
        }
        _ => bail!(
            "the backing file '{backing}' of {overlay} is a relative path, but {overlay} lies in no directory: \
             its header must name an absolute path or a URI"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_before_the_first_slash_is_a_protocol() {
        assert_eq!(Name::parse("a.qcow2").unwrap(), Name::Path("a.qcow2"));
        assert_eq!(Name::parse("./a:b").unwrap(), Name::Path("./a:b"));
        assert_eq!(Name::parse("/d/a:b").unwrap(), Name::Path("/d/a:b"));
        assert_eq!(Name::parse("file:a").unwrap(), Name::Path("a"));
        assert_eq!(Name::parse("file:///a").unwrap(), Name::Path("/a"));
        assert_eq!(Name::parse("nbd://h/x").unwrap(), Name::Nbd("nbd://h/x"));
        assert_eq!(Name::parse("nbd+unix://?socket=s").unwrap(), Name::Nbd("nbd+unix://?socket=s"));
        assert_eq!(Name::parse("json:{}").unwrap(), Name::Json("{}"));
        for unknown in ["a:b", "http://h/x", "nbd:localhost:1", "", ":x"] {
            assert!(Name::parse(unknown).is_err(), "{unknown}");
        }
    }

    #[test]
    fn relative_backing_names_are_relative_to_the_overlay() {
        for (overlay, backing, whole) in [
            ("ov.qcow2", "base.raw", "base.raw"),
            ("./ov.qcow2", "base.raw", "./base.raw"),
            ("/d/e/ov.qcow2", "../base.raw", "/d/e/../base.raw"),
            ("/d/ov.qcow2", "/base.raw", "/base.raw"),
            ("/d/ov.qcow2", "nbd://h/x", "nbd://h/x"),
            ("/d/ov.qcow2", "file:base.raw", "file:base.raw"),
            ("nbd://h/x", "/base", "/base"),
        ] {
            assert_eq!(resolve_backing(overlay, backing).unwrap(), whole, "{overlay} {backing}");
        }
        assert!(resolve_backing("nbd://h/x", "base").is_err());
        assert!(resolve_backing("/d/ov.qcow2", "http:x").is_err());
    }
}
