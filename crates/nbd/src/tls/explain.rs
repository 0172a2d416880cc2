//! What TLS's failures mean for a person, on either side.

use infill_base::{ErrorKind, IoError};
use rustls::{AlertDescription, CertificateError, Error};

/// A failure of TLS with a `peer` ("server" or "client").
pub(super) fn failure(error: &Error, peer: &str) -> IoError {
    let (kind, why) = match error {
        Error::InvalidCertificate(_) => (
            ErrorKind::NotPermitted,
            format!("the certificate of the {peer} is refused: {}", certificate(error)),
        ),
        Error::NoCertificatesPresented => {
            let why = "it shows no certificate, and verify-peer=on asks for one";
            (ErrorKind::NotPermitted, format!("the {peer} is refused: {why}"))
        }
        Error::AlertReceived(alert) => alerted(*alert, peer),
        Error::PeerIncompatible(why) => (
            ErrorKind::Unsupported,
            format!(
                "no version or cipher of TLS is known to both sides (1.2 and 1.3 are known here): {why:?}"
            ),
        ),
        Error::InvalidMessage(why) => (
            ErrorKind::Io,
            format!("what the {peer} has sent is not TLS, or was changed on its way ({why:?})"),
        ),
        Error::DecryptError => {
            (ErrorKind::Io, format!("what the {peer} has sent was changed on its way: it does not decrypt"))
        }
        error => (ErrorKind::Io, format!("TLS with the {peer} has failed: {error}")),
    };
    IoError::new(kind, why)
}

/// What an alert says.
fn alerted(alert: AlertDescription, peer: &str) -> (ErrorKind, String) {
    let refused = |why: &str| (ErrorKind::NotPermitted, format!("the {peer} refuses our certificate: {why}"));
    match alert {
        AlertDescription::CertificateRequired => (
            ErrorKind::NotPermitted,
            format!(
                "the {peer} wants a certificate, and ours has none or none that it knows the authority of"
            ),
        ),
        AlertDescription::UnknownCA => refused("it does not know the authority that has signed it"),
        AlertDescription::CertificateExpired => refused("it has expired"),
        AlertDescription::CertificateRevoked => refused("it was revoked"),
        AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::UnsupportedCertificate => refused(&format!("{alert:?}")),
        AlertDescription::AccessDenied => {
            (ErrorKind::NotPermitted, format!("the {peer} does not let us in (AccessDenied)"))
        }
        AlertDescription::ProtocolVersion => {
            (ErrorKind::Unsupported, format!("the {peer} knows neither TLS 1.2 nor 1.3"))
        }
        AlertDescription::HandshakeFailure => (
            ErrorKind::NotPermitted,
            format!(
                "the {peer} does not agree: it wants a certificate that we do not have, or other ciphers"
            ),
        ),
        alert => (ErrorKind::Io, format!("the {peer} has ended TLS with the alert {alert:?}")),
    }
}

/// Why a certificate is not valid.
pub(super) fn certificate(error: &Error) -> String {
    let Error::InvalidCertificate(why) = error else { return error.to_string() };
    match why {
        // The signature of another authority of the same name is a bad one.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "none of our authorities (ca-cert.pem) has signed it".into()
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "it has expired".into(),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "it is not valid yet; is the clock right?".into()
        }
        CertificateError::Revoked => "it was revoked".into(),
        CertificateError::NotValidForNameContext { expected, presented } => {
            // They come as DnsName("name") and IpAddress(address).
            let name = |name: &String| match name.split_once('(') {
                Some((_, name)) => name.trim_end_matches(')').trim_matches('"').to_owned(),
                None => name.clone(),
            };
            let presented = match presented.as_slice() {
                [] => "nobody (it has no subjectAltName)".into(),
                names => names.iter().map(name).collect::<Vec<_>>().join(", "),
            };
            format!(
                "it is not for '{}' but for {presented}; name the one that is meant with tls-hostname",
                expected.to_str()
            )
        }
        CertificateError::NotValidForName => "it is not for this server's name".into(),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "it is not meant for this end of a connection (its extendedKeyUsage)".into()
        }
        other => format!("{other}"),
    }
}
