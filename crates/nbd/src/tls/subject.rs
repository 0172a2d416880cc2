//! Whom a certificate is for: its distinguished name, in the words that others who decide by it use (GnuTLS's, in which QEMU
//! has it: RFC 4514, but in the order of the certificate).
//!
//! What never happens: a name that others would write otherwise. What is not written here for certain (an attribute in a type of
//! string that it should not have, say) is no name, and who relies on one lets nobody in.

use std::fmt::Write as _;

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const INTEGER: u8 = 0x02;
const OBJECT_IDENTIFIER: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
const IA5_STRING: u8 = 0x16;
/// The version, which is the first member of a certificate that has one.
const VERSION: u8 = 0xa0;

/// Types of string that an attribute may have.
const ANY: &[u8] = &[UTF8_STRING, PRINTABLE_STRING];
const PRINTABLE: &[u8] = &[PRINTABLE_STRING];
const IA5: &[u8] = &[IA5_STRING];

/// Attributes that have a name, by their object identifiers.
const ATTRIBUTES: &[(&str, &str, &[u8])] = &[
    ("2.5.4.3", "CN", ANY),
    ("2.5.4.4", "surName", ANY),
    ("2.5.4.5", "serialNumber", PRINTABLE),
    ("2.5.4.6", "C", PRINTABLE),
    ("2.5.4.7", "L", ANY),
    ("2.5.4.8", "ST", ANY),
    ("2.5.4.9", "street", ANY),
    ("2.5.4.10", "O", ANY),
    ("2.5.4.11", "OU", ANY),
    ("2.5.4.12", "title", ANY),
    ("2.5.4.42", "givenName", ANY),
    ("0.9.2342.19200300.100.1.1", "UID", ANY),
    ("0.9.2342.19200300.100.1.25", "DC", IA5),
    ("1.2.840.113549.1.9.1", "EMAIL", IA5),
];

/// Reads values of DER one after the other.
struct Der<'a>(&'a [u8]);

/// One value.
struct Value<'a> {
    tag: u8,
    content: &'a [u8],
    /// With its tag and length.
    whole: &'a [u8],
}

impl<'a> Der<'a> {
    fn next(&mut self) -> Option<Value<'a>> {
        let (&[tag, first], rest) = self.0.split_first_chunk()?;
        let (length, header) = match first {
            ..=0x7f => (usize::from(first), 2),
            0x81..=0x84 => {
                let bytes = rest.get(..usize::from(first & 0x7f))?;
                let length = bytes.iter().fold(0_usize, |length, byte| length << 8 | usize::from(*byte));
                (length, 2 + bytes.len())
            }
            _ => return None,
        };
        let (whole, rest) = self.0.split_at_checked(header.checked_add(length)?)?;
        self.0 = rest;
        Some(Value { tag, content: &whole[header..], whole })
    }

    fn expect(&mut self, tag: u8) -> Option<Der<'a>> {
        let value = self.next()?;
        (value.tag == tag).then_some(Der(value.content))
    }
}

/// An object identifier in numbers.
fn dotted(identifier: &[u8]) -> Option<String> {
    let mut out = String::new();
    let mut arc = 0_u64;
    for byte in identifier {
        arc = arc.checked_mul(0x80)? | u64::from(byte & 0x7f);
        if byte & 0x80 != 0 {
            continue;
        }
        if out.is_empty() {
            let root = (arc / 40).min(2);
            write!(out, "{root}.{}", arc - root * 40).ok()?;
        } else {
            write!(out, ".{arc}").ok()?;
        }
        arc = 0;
    }
    (identifier.last()? & 0x80 == 0).then_some(out)
}

/// A value as RFC 4514 writes it (2.4).
fn escaped(text: &str) -> String {
    let last = text.chars().count().saturating_sub(1);
    let mut out = String::new();
    for (at, char) in text.chars().enumerate() {
        let special = match char {
            ',' | '+' | '"' | '\\' | '<' | '>' | ';' => true,
            '#' => at == 0,
            ' ' => at == 0 || at == last,
            _ => false,
        };
        if special {
            out.push('\\');
        }
        out.push(char);
    }
    out
}

fn attribute(mut members: Der<'_>) -> Option<String> {
    let identifier = dotted(members.expect(OBJECT_IDENTIFIER)?.0)?;
    let value = members.next()?;
    let Some((_, name, types)) = ATTRIBUTES.iter().find(|(known, ..)| *known == identifier) else {
        let hex = value.whole.iter().fold(String::new(), |mut hex, byte| {
            let _never = write!(hex, "{byte:02x}");
            hex
        });
        return has_no_other_name(&identifier).then(|| format!("{identifier}=#{hex}"));
    };
    let text = std::str::from_utf8(value.content).ok().filter(|_| types.contains(&value.tag))?;
    let is_clear = !text.is_empty() && (value.tag == UTF8_STRING || text.is_ascii()) && !text.contains('\0');
    is_clear.then(|| format!("{name}={}", escaped(text)))
}

/// Whether others have no name for it either: what organisations have made for themselves.
fn has_no_other_name(identifier: &str) -> bool {
    let known =
        ["2.5.4.", "0.9.2342.19200300.100.1.", "1.2.840.113549.1.9.", "1.3.6.1.5.5.7.", "1.3.6.1.4.1.311."];
    !known.iter().any(|tree| identifier.starts_with(tree))
}

fn name(certificate: &[u8]) -> Option<String> {
    let mut certificate = Der(certificate).expect(SEQUENCE)?.expect(SEQUENCE)?;
    let mut first = certificate.next()?;
    if first.tag == VERSION {
        first = certificate.next()?;
    }
    if first.tag != INTEGER {
        return None;
    }
    // The algorithm, the issuer, and how long it is valid.
    for _ in 0..3 {
        certificate.expect(SEQUENCE)?;
    }
    let mut subject = certificate.expect(SEQUENCE)?;
    let mut out = Vec::new();
    while !subject.0.is_empty() {
        let (mut together, mut parts) = (subject.expect(SET)?, Vec::new());
        while !together.0.is_empty() {
            parts.push(attribute(together.expect(SEQUENCE)?)?);
        }
        out.push(parts.join("+"));
    }
    (!out.is_empty()).then(|| out.join(","))
}

/// The distinguished name of the one whom a certificate is for; `None` where it has none, or not one that is written for certain.
pub(super) fn distinguished_name(certificate: &[u8]) -> Option<String> {
    name(certificate)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = match content.len() {
            short @ 0..0x80 => vec![short as u8],
            long => vec![0x82, (long >> 8) as u8, long as u8],
        };
        [&[tag][..], &length, content].concat()
    }

    /// A certificate, as far as it is read, of attributes each in a set of its own.
    fn certificate(attributes: &[(&[u8], u8, &[u8])]) -> Vec<u8> {
        let one = |(identifier, tag, content): &(&[u8], u8, &[u8])| {
            let pair = [value(OBJECT_IDENTIFIER, identifier), value(*tag, content)].concat();
            value(SET, &value(SEQUENCE, &pair))
        };
        let subject = value(SEQUENCE, &attributes.iter().flat_map(one).collect::<Vec<_>>());
        let nothing = value(SEQUENCE, &[]);
        let version = value(VERSION, &value(INTEGER, &[2]));
        let inner =
            [version, value(INTEGER, &[1]), nothing.clone(), nothing.clone(), nothing, subject].concat();
        value(SEQUENCE, &value(SEQUENCE, &inner))
    }

    const CN: &[u8] = &[0x55, 4, 3];
    const C: &[u8] = &[0x55, 4, 6];

    #[test]
    fn names_are_written_as_rfc_4514_has_it_in_the_order_of_the_certificate() {
        for (text, written) in [
            ("a,b;c<d>e\"f=g h", "a\\,b\\;c\\<d\\>e\\\"f=g h"),
            ("#x#", "\\#x#"),
            (" two  ", "\\ two \\ "),
            (" ", "\\ "),
            ("  ", "\\ \\ "),
            ("back\\slash", "back\\\\slash"),
            ("plus+x", "plus\\+x"),
            ("Jürgen €", "Jürgen €"),
        ] {
            let attributes = [(C, PRINTABLE_STRING, &b"GB"[..]), (CN, UTF8_STRING, text.as_bytes())];
            assert_eq!(distinguished_name(&certificate(&attributes)), Some(format!("C=GB,CN={written}")));
        }
        let own = [(&[0x53, 4][..], UTF8_STRING, &b"foo"[..])];
        assert_eq!(distinguished_name(&certificate(&own)).as_deref(), Some("2.3.4=#0c03666f6f"));
        let long = [(CN, UTF8_STRING, &[b'a'; 300][..])];
        assert_eq!(distinguished_name(&certificate(&long)), Some(format!("CN={}", "a".repeat(300))));
    }

    #[test]
    fn what_is_not_written_for_certain_is_no_name() {
        let latin: &[u8] = &[0xfc];
        for attribute in [
            (CN, 0x14, latin),
            (CN, UTF8_STRING, latin),
            (CN, UTF8_STRING, &b""[..]),
            (CN, UTF8_STRING, &b"a\0b"[..]),
            (CN, IA5_STRING, &b"a"[..]),
            (C, UTF8_STRING, &b"GB"[..]),
            (&[0x55, 4, 99], UTF8_STRING, &b"a"[..]),
        ] {
            assert_eq!(distinguished_name(&certificate(&[attribute])), None, "{attribute:?}");
        }
        assert_eq!(distinguished_name(&certificate(&[])), None);
        // Cut off anywhere, or any byte changed: never a panic.
        let whole = certificate(&[(CN, UTF8_STRING, &[b'a'; 300][..])]);
        for end in 0..whole.len() {
            assert_eq!(distinguished_name(&whole[..end]), None);
        }
        for at in 0..whole.len() {
            for with in [0, 0x7f, 0x80, 0x84, 0xff] {
                let mut changed = whole.clone();
                changed[at] = with;
                let _any = distinguished_name(&changed);
            }
        }
    }
}
