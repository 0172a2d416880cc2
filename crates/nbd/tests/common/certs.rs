//! Certificates of a test: made here, in directories with the names of files that QEMU uses.

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
    date_time_ymd,
};

/// A certificate authority.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// What a certificate is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    Server,
    Client,
}

/// A certificate and its key, as PEM.
pub struct Pair {
    pub certificate: String,
    pub key: String,
}

/// The serial number of clients' certificates.
const CLIENT_SERIAL: u64 = 7;

impl Authority {
    pub fn new(name: &str) -> Authority {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn pem(&self) -> String {
        self.0.as_ref().pem()
    }

    /// A certificate for `localhost` and 127.0.0.1, valid until the end of `year`.
    pub fn pair(&self, end: End, year: i32) -> Pair {
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).unwrap();
        let (name, usage, serial) = match end {
            End::Server => ("server", ExtendedKeyUsagePurpose::ServerAuth, 1),
            End::Client => ("client", ExtendedKeyUsagePurpose::ClientAuth, CLIENT_SERIAL),
        };
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![usage];
        // QEMU asks for both.
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.serial_number = Some(SerialNumber::from(serial));
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(year, 12, 31);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap().pem();
        Pair { certificate, key: key.serialize_pem() }
    }

    /// A list that revokes the certificates of clients.
    pub fn crl(&self) -> String {
        let revoked = RevokedCertParams {
            serial_number: SerialNumber::from(CLIENT_SERIAL),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(4000, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.0).unwrap().pem().unwrap()
    }
}

/// Directories of credentials.
pub struct Certs(tempfile::TempDir);

/// The last year of a certificate that has expired, and of one that has not.
const PAST: i32 = 2021;
const FUTURE: i32 = 4000;

impl Certs {
    /// * `good`: everything, of one authority;
    /// * `nobody`: a client without a certificate;
    /// * `foreign`: everything, of another authority;
    /// * `expired`: as `good`, and the certificates have expired;
    /// * `revoked`: as `good`, and the clients' certificates are revoked.
    pub fn new() -> Certs {
        let certs = Certs(tempfile::tempdir().unwrap());
        let (authority, other) = (Authority::new("test"), Authority::new("foreign"));
        for (name, authority, year) in
            [("good", &authority, FUTURE), ("foreign", &other, FUTURE), ("expired", &authority, PAST)]
        {
            let (server, client) = (authority.pair(End::Server, year), authority.pair(End::Client, year));
            certs.write(name, "ca-cert.pem", &authority.pem());
            certs.write(name, "server-cert.pem", &server.certificate);
            certs.write(name, "server-key.pem", &server.key);
            certs.write(name, "client-cert.pem", &client.certificate);
            certs.write(name, "client-key.pem", &client.key);
        }
        certs.write("nobody", "ca-cert.pem", &authority.pem());
        std::fs::create_dir_all(certs.dir("revoked")).unwrap();
        for file in std::fs::read_dir(certs.dir("good")).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), certs.dir("revoked").join(file.file_name())).unwrap();
        }
        certs.write("revoked", "ca-crl.pem", &authority.crl());
        certs
    }

    pub fn dir(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, dir: &str, name: &str, content: &str) {
        std::fs::create_dir_all(self.dir(dir)).unwrap();
        std::fs::write(self.dir(dir).join(name), content).unwrap();
    }
}

/// The bytes of a file, if it is there.
pub fn bytes(dir: &Path, name: &str) -> Option<Vec<u8>> {
    std::fs::read(dir.join(name)).ok()
}
