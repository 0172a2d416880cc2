//! Sizes as people write and read them: `10G` in, `10 GiB` out, as qemu-img does both.

use std::time::Duration;

/// Units by their letter, each 1024 times the one before.
const UNITS: [char; 7] = ['b', 'k', 'm', 'g', 't', 'p', 'e'];

/// Digits behind the point that a size may have; more say nothing any more.
const FRACTION_DIGITS_MAX: usize = 9;

/// Parses a size in bytes: `512`, `64k`, `1.5G`.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let refuse =
        || format!("'{text}' is no size: a number is wanted, with k, M, G, T, P or E behind it, as in 10G");
    let text_lower = text.trim().to_ascii_lowercase();
    let (number, unit) = match text_lower.chars().last() {
        Some(last) if UNITS.contains(&last) => {
            let power = UNITS.iter().position(|unit| *unit == last).unwrap_or(0);
            (&text_lower[..text_lower.len() - 1], 1_u128 << (10 * power))
        }
        _ => (&text_lower[..], 1),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) || fraction.len() > FRACTION_DIGITS_MAX {
        return Err(refuse());
    }
    if number.ends_with('.') || (unit == 1 && !fraction.is_empty()) {
        return Err(refuse());
    }
    let too_large = || format!("'{text}' is too large: a disk has at most 8 EiB");
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let scale = 10_u128.pow(fraction.len() as u32);
    let fraction: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| refuse())? };
    let bytes = u128::from(whole) * unit + (fraction * unit + scale / 2) / scale;
    u64::try_from(bytes).ok().filter(|bytes| *bytes <= i64::MAX as u64).ok_or_else(too_large)
}

/// Parses a span of time: `90s`, `30m`, `2h`, `1d`.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    let refuse =
        || format!("'{text}' is no time: a whole number is wanted, with s, m, h or d behind it, as in 30m");
    let text = text.trim();
    let unit = match text.chars().last() {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 3600,
        Some('d') => 24 * 3600,
        _ => return Err(refuse()),
    };
    let number: u32 = text[..text.len() - 1].parse().map_err(|_| refuse())?;
    Ok(Duration::from_secs(u64::from(number) * unit))
}

/// A size in the largest unit that leaves at least one digit before the point, three digits in all: `1.5 GiB`.
pub fn human_size(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    let name = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"][unit];
    let before_point = if value < 1.0 { 0 } else { value.log10() as i32 + 1 };
    let mut number = format!("{value:.*}", (3 - before_point).max(0) as usize);
    if number.contains('.') {
        number.truncate(number.trim_end_matches('0').trim_end_matches('.').len());
    }
    format!("{number} {name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_with_their_unit() {
        for (text, seconds) in [("90s", 90), ("30m", 1800), ("2h", 7200), (" 1d ", 86_400)] {
            assert_eq!(parse_time(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "s", "90", "1.5h", "-3m", "3 weeks", "99999999999d", "\u{20ac}"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("64k", 64 << 10),
            ("64K", 64 << 10),
            ("10M", 10 << 20),
            ("1.5G", 3 << 29),
            ("0.1k", 102),
            ("4T", 4 << 40),
            ("7E", 7 << 60),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in
            ["", "k", "-1", "1x", "1.k", ".5k", "1.5", "0x10", "1 G", "8E", "99999999999999999999", "1,5G"]
        {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_written_with_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (1000, "0.977 KiB"),
            (331776, "324 KiB"),
            (10 << 20, "10 MiB"),
            (3 << 29, "1.5 GiB"),
            (1 << 40, "1 TiB"),
            (1_234_567, "1.18 MiB"),
        ] {
            assert_eq!(human_size(bytes), text);
        }
    }
}
