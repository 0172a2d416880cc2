//! Base64 (RFC 4648), read.

/// The bytes that `text` stands for, white space aside; `None` where it is no base64.
pub fn from_base64(text: &[u8]) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    if !digits.len().is_multiple_of(4) {
        return None;
    }
    let padding = digits.iter().rev().take(2).take_while(|digit| **digit == b'=').count();
    let digits = &digits[..digits.len() - padding];
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3 + 2);
    for group in digits.chunks(4) {
        let mut value = 0;
        for digit in group {
            value = value << 6 | u32::from(value_of(*digit)?);
        }
        // Bits behind the last byte are to be zero: one text for one value.
        let unused = (group.len() * 6) % 8;
        if value & ((1 << unused) - 1) != 0 {
            return None;
        }
        value >>= unused;
        let count = group.len() * 6 / 8;
        bytes.extend_from_slice(&value.to_be_bytes()[4 - count..]);
    }
    Some(bytes)
}

fn value_of(digit: u8) -> Option<u8> {
    Some(match digit {
        b'A'..=b'Z' => digit - b'A',
        b'a'..=b'z' => digit - b'a' + 26,
        b'0'..=b'9' => digit - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_of_the_standard_are_read_and_nothing_else() {
        for (text, bytes) in [
            ("", ""),
            ("Zg==", "f"),
            ("Zm8=", "fo"),
            ("Zm9v", "foo"),
            ("Zm9v\nYg==\n", "foob"),
            ("+/+/", "\u{0}"),
        ] {
            let expected = if text == "+/+/" { vec![0xfb, 0xff, 0xbf] } else { bytes.as_bytes().to_vec() };
            assert_eq!(from_base64(text.as_bytes()), Some(expected), "{text}");
        }
        for text in ["Z", "Zg", "Zg=", "Zh==", "Z===", "====", "Zg==Zg==", "Zm9!", "=Zm9"] {
            assert_eq!(from_base64(text.as_bytes()), None, "{text}");
        }
    }
}
