//! Bytes as text in base64 (RFC 4648), as the protocol's ring buffers take and give them.

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// `bytes` as text.
pub fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |at: usize| u32::from(chunk.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            text.push(match place <= chunk.len() {
                true => char::from(ALPHABET[(bits >> (18 - 6 * place) & 63) as usize]),
                false => '=',
            });
        }
    }
    text
}

/// The bytes that `text` stands for; `None` where it is no base64. Several encoded texts may stand behind each other.
pub fn decode(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for chunk in text.as_bytes().chunks(4) {
        let padded = chunk.iter().rev().take_while(|byte| **byte == b'=').count();
        if padded > 2 {
            return None;
        }
        let mut bits = 0;
        for byte in &chunk[..4 - padded] {
            let value = ALPHABET.iter().position(|other| other == byte)?;
            bits = bits << 6 | u32::try_from(value).ok()?;
        }
        bits <<= 6 * padded;
        bytes.extend_from_slice(&bits.to_be_bytes()[1..4 - padded]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_bytes_stand_for_each_other() {
        // The vectors of RFC 4648, and bytes that are no text.
        for (bytes, text) in [
            (&b""[..], ""),
            (b"f", "Zg=="),
            (b"fo", "Zm8="),
            (b"foo", "Zm9v"),
            (b"foobar", "Zm9vYmFy"),
            (&[0xff, 0x00, 0xfb], "/wD7"),
        ] {
            assert_eq!(encode(bytes), text);
            assert_eq!(decode(text).as_deref(), Some(bytes), "{text}");
        }
        assert_eq!(decode("YWI=YWI=").as_deref(), Some(&b"abab"[..]));
        for wrong in ["a", "====", "a%b!", "YW I", "=abc", "A===", "YW=I"] {
            assert_eq!(decode(wrong), None, "{wrong}");
        }
    }
}
