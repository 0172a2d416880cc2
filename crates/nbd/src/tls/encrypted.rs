//! Private keys that a password keeps (PKCS #8, RFC 5958, as `openssl` and `certtool` write them).
//!
//! What is read: PBES2 (RFC 8018) of PBKDF2 with an HMAC of SHA-1 or SHA-2, and AES in CBC mode, which is what is written since
//! long. Older ways to encrypt are refused by name: they keep nothing.
//!
//! # What never happens
//! * A length that a file claims is believed before it was compared with what is there.
//! * A key that was decrypted stays in memory longer than who made it: its copy here is overwritten.

use std::num::NonZeroU32;

use aws_lc_rs::cipher::{AES_128, AES_256, DecryptionContext, PaddedBlockDecryptingKey, UnboundCipherKey};
use aws_lc_rs::pbkdf2;
use infill_base::from_base64;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

const BEGIN: &str = "-----BEGIN ENCRYPTED PRIVATE KEY-----";
const END: &str = "-----END ENCRYPTED PRIVATE KEY-----";
/// Rounds of PBKDF2 at most: some seconds.
const ROUNDS_MAX: u64 = 10_000_000;

const SEQUENCE: u8 = 0x30;
const OBJECT: u8 = 0x06;
const OCTETS: u8 = 0x04;
const INTEGER: u8 = 0x02;

const PBES2: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x05, 0x0d];
const PBKDF2: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x05, 0x0c];
/// Of HMACs; what follows names the hash.
const HMAC: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x02];
/// Of AES; what follows names size and mode.
const AES: &[u8] = &[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x01];

/// Whether a PEM file has a key that is encrypted.
pub(super) fn is_encrypted(pem: &[u8]) -> bool {
    section(pem).is_some()
}

fn section(pem: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(pem).ok()?;
    let (_, rest) = text.split_once(BEGIN)?;
    rest.split_once(END).map(|(body, _)| body)
}

/// The key in a PEM file, decrypted; the error says what is wrong.
pub(super) fn decrypted(pem: &[u8], password: &[u8]) -> Result<PrivateKeyDer<'static>, String> {
    let body = section(pem).ok_or("there is no encrypted key in it")?;
    let der = from_base64(body.as_bytes()).ok_or("what stands in it is no base64")?;
    let Encrypted { aes, iv, salt, rounds, hash, data } = Encrypted::parse(&der)?;
    let mut key = Zeroizing::new(vec![0; if aes == Aes::Of256 { 32 } else { 16 }]);
    pbkdf2::derive(hash, rounds, salt, password, &mut key);
    let cipher = UnboundCipherKey::new(if aes == Aes::Of256 { &AES_256 } else { &AES_128 }, &key);
    let failed = |_| "Decryption has failed: is the password right?".to_owned();
    let cipher = cipher.and_then(PaddedBlockDecryptingKey::cbc_pkcs7).map_err(failed)?;
    let mut data = Zeroizing::new(data.to_vec());
    let plain = cipher.decrypt(&mut data, DecryptionContext::Iv128(iv.into())).map_err(failed)?.to_vec();
    // A wrong password may leave something that ends as it should.
    match plain.first() {
        Some(&SEQUENCE) => Ok(PrivatePkcs8KeyDer::from(plain).into()),
        _ => Err("Decryption has failed: is the password right?".into()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Aes {
    Of128,
    Of256,
}

/// What an encrypted key says of itself.
struct Encrypted<'a> {
    aes: Aes,
    iv: [u8; 16],
    salt: &'a [u8],
    rounds: NonZeroU32,
    hash: pbkdf2::Algorithm,
    data: &'a [u8],
}

impl<'a> Encrypted<'a> {
    fn parse(der: &'a [u8]) -> Result<Encrypted<'a>, String> {
        let other = |what: &str| {
            format!(
                "it is encrypted {what}, which is not supported: `openssl pkcs8 -topk8 -v2 aes-256-cbc` encrypts it anew"
            )
        };
        let mut outer = Der(Der(der).take(SEQUENCE)?);
        let mut how = Der(outer.take(SEQUENCE)?);
        let data = outer.take(OCTETS)?;
        if how.take(OBJECT)? != PBES2 {
            return Err(other("in an old way (not PBES2)"));
        }
        let mut how = Der(how.take(SEQUENCE)?);
        let (mut derives, mut cipher) = (Der(how.take(SEQUENCE)?), Der(how.take(SEQUENCE)?));
        if derives.take(OBJECT)? != PBKDF2 {
            return Err(other("with another function than PBKDF2"));
        }
        let mut derives = Der(derives.take(SEQUENCE)?);
        let salt = derives.take(OCTETS)?;
        let rounds = number(derives.take(INTEGER)?);
        let rounds =
            rounds.filter(|rounds| *rounds <= ROUNDS_MAX).and_then(|rounds| u32::try_from(rounds).ok());
        let rounds = rounds
            .and_then(NonZeroU32::new)
            .ok_or_else(|| {
                format!(
                    "its rounds are none, or more than {ROUNDS_MAX}: `openssl pkcs8 -topk8 -iter 600000` encrypts it anew"
                )
            })?;
        // The length of the key may stand there; the cipher says it.
        let _ = derives.take(INTEGER);
        let hash = match derives.take(SEQUENCE) {
            Ok(hash) => Der(hash).take(OBJECT)?.strip_prefix(HMAC).map(<[u8]>::to_vec),
            Err(_) => Some(vec![7]),
        };
        let hash = match hash.as_deref() {
            Some([7]) => pbkdf2::PBKDF2_HMAC_SHA1,
            Some([9]) => pbkdf2::PBKDF2_HMAC_SHA256,
            Some([10]) => pbkdf2::PBKDF2_HMAC_SHA384,
            Some([11]) => pbkdf2::PBKDF2_HMAC_SHA512,
            _ => return Err(other("with another hash than SHA-1, -256, -384 or -512")),
        };
        let aes = match cipher.take(OBJECT)?.strip_prefix(AES) {
            Some([2]) => Aes::Of128,
            Some([42]) => Aes::Of256,
            _ => return Err(other("with another cipher than AES-128 or AES-256 in CBC mode")),
        };
        let iv = cipher.take(OCTETS)?.try_into().map_err(|_| WRONG)?;
        Ok(Encrypted { aes, iv, salt, rounds, hash, data })
    }
}

const WRONG: &str = "its structure is not that of an encrypted key";

/// Values in DER, one after the other.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The content of the next value, which has that tag; where it has another one, nothing is taken.
    fn take(&mut self, tag: u8) -> Result<&'a [u8], String> {
        let (first, rest) = self.0.split_first().filter(|(first, _)| **first == tag).ok_or(WRONG)?;
        debug_assert_eq!(*first, tag);
        let (short, rest) = rest.split_first().ok_or(WRONG)?;
        let (len, rest) = match *short {
            len @ 0..=0x7f => (usize::from(len), rest),
            0x81..=0x83 => {
                let (bytes, rest) = rest.split_at_checked(usize::from(short & 0x7f)).ok_or(WRONG)?;
                (bytes.iter().fold(0, |len, byte| len << 8 | usize::from(*byte)), rest)
            }
            _ => return Err(WRONG.into()),
        };
        let (content, rest) = rest.split_at_checked(len).ok_or(WRONG)?;
        self.0 = rest;
        Ok(content)
    }
}

/// A number of at most eight bytes that is not negative.
fn number(bytes: &[u8]) -> Option<u64> {
    if bytes.is_empty() || bytes.len() > 8 || bytes[0] & 0x80 != 0 {
        return None;
    }
    Some(bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bytes_make_it_panic() {
        let mut random = 7u64;
        for round in 0..20_000u64 {
            let bytes: Vec<u8> = (0..round % 64)
                .map(|_| {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    // Mostly what means something.
                    [SEQUENCE, OBJECT, OCTETS, INTEGER, 0x81, 0x83, 4, (random >> 40) as u8]
                        [(random >> 61) as usize]
                })
                .collect();
            assert!(Encrypted::parse(&bytes).is_err());
        }
        for pem in
            ["", BEGIN, &format!("{BEGIN}{END}"), &format!("{END}{BEGIN}"), &format!("{BEGIN}\nzz\n{END}")]
        {
            assert!(decrypted(pem.as_bytes(), b"").is_err());
        }
    }
}
