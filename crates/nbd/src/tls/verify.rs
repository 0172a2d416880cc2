//! Which servers a client accepts.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};

/// How far a server's certificate is verified. That the server has its key is verified in any case.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    how: How,
    algorithms: WebPkiSupportedAlgorithms,
}

#[derive(Debug)]
enum How {
    /// Not at all (`verify-peer=off`).
    Nothing,
    /// From one of the authorities, in time, not revoked.
    Chain(Arc<WebPkiServerVerifier>),
    /// And for the name.
    ChainAndName(Arc<WebPkiServerVerifier>),
}

impl ServerVerifier {
    pub(super) fn of_nothing(provider: &CryptoProvider) -> ServerVerifier {
        ServerVerifier { how: How::Nothing, algorithms: provider.signature_verification_algorithms }
    }

    pub(super) fn of_chain(verifier: Arc<WebPkiServerVerifier>) -> ServerVerifier {
        let algorithms = super::provider().signature_verification_algorithms;
        ServerVerifier { how: How::Chain(verifier), algorithms }
    }

    pub(super) fn of_chain_and_name(verifier: Arc<WebPkiServerVerifier>) -> ServerVerifier {
        let algorithms = super::provider().signature_verification_algorithms;
        ServerVerifier { how: How::ChainAndName(verifier), algorithms }
    }

    /// Verifies a certificate without a handshake.
    pub(super) fn check(
        &self,
        own: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let nobody = ServerName::try_from("localhost").map_err(|_| Error::UnsupportedNameType)?;
        self.verify_server_cert(own, between, &nobody, &[], now).map(drop)
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = |verifier: &WebPkiServerVerifier| {
            verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
        };
        match &self.how {
            How::Nothing => Ok(ServerCertVerified::assertion()),
            How::ChainAndName(verifier) => verified(verifier),
            // The name is looked at last: all else was right then.
            How::Chain(verifier) => match verified(verifier) {
                Err(Error::InvalidCertificate(
                    CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
                )) => Ok(ServerCertVerified::assertion()),
                other => other,
            },
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
