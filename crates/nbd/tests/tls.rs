//! TLS with the peers that people use: libnbd's tools, QEMU's tools, nbdkit, OpenSSL's client.

#[path = "common/certs.rs"]
#[allow(dead_code, reason = "other tests use other parts")]
mod certs;
mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use certs::{Certs, bytes};
use common::{Served, output, pattern, run};
use infill_base::{Ctx, OpenError, WriteFlags};
use infill_io::{Reactors, UnixConnector};
use infill_nbd::{ClientCredentials, ClientOptions, Export, Exports, NbdStorage, OnLost, ServerTls, X509};
use infill_node::{MemoryOverlay, NodeHandle};
use infill_storage::Storage;

const MIB: usize = 1 << 20;
/// How long a peer may take for anything.
const PEER_TIME: Duration = Duration::from_secs(30);

fn x509<R>(dir: &Path, end: &str, with: impl FnOnce(X509<'_>) -> R) -> R {
    let ca = bytes(dir, "ca-cert.pem").unwrap();
    let (certificate, key) = (bytes(dir, &format!("{end}-cert.pem")), bytes(dir, &format!("{end}-key.pem")));
    with(X509 {
        ca: &ca,
        crl: None,
        certificate: certificate.as_deref(),
        key: key.as_deref(),
        password: None,
    })
}

/// Our server, of a disk in memory.
fn served(certs: &Certs, dir: &str, verify_peer: bool) -> Served {
    let exports = Exports::new();
    let node = NodeHandle::new(MemoryOverlay::new(16 << 20, 64 << 10, None));
    exports.add(Export { writable: true, ..Export::new("disk", node) }).unwrap();
    let tls = x509(&certs.dir(dir), "server", |files| ServerTls::new(&files, verify_peer)).unwrap();
    Served::over(exports, Some(tls))
}

fn uri(served: &Served, certs: &Certs, dir: &str) -> String {
    let (socket, dir) = (served.socket().display(), certs.dir(dir));
    format!("nbds+unix:///disk?socket={socket}&tls-certificates={}&tls-hostname=localhost", dir.display())
}

/// Runs one of QEMU's tools on the disk with the credentials in `dir`.
fn qemu_options(served: &Served, certs: &Certs, dir: &str) -> [String; 2] {
    let dir = certs.dir(dir);
    [
        format!("tls-creds-x509,id=t,endpoint=client,dir={}", dir.display()),
        format!(
            "driver=nbd,server.type=unix,server.path={},export=disk,tls-creds=t,tls-hostname=localhost",
            served.socket().display()
        ),
    ]
}

#[test]
fn libnbd_copies_there_and_back_over_several_encrypted_connections() {
    let certs = Certs::new();
    let served = served(&certs, "good", true);
    let uri = uri(&served, &certs, "good");
    let info = run("nbdinfo", &["--json", &uri]);
    assert!(info.contains("\"TLS\": true"), "{info}");
    assert!(info.contains("\"export-size\": 16777216"), "{info}");
    let (source, back) = (served.path("source"), served.path("back"));
    let content = pattern(16 * MIB);
    std::fs::write(&source, &content).unwrap();
    run("nbdcopy", &["--flush", source.to_str().unwrap(), &uri]);
    run("nbdcopy", &["--connections=4", &uri, back.to_str().unwrap()]);
    assert!(std::fs::read(&back).unwrap() == content, "the copy differs");
}

#[test]
fn qemu_reads_and_writes_with_its_own_credentials() {
    let certs = Certs::new();
    let served = served(&certs, "good", true);
    let [object, image] = qemu_options(&served, &certs, "good");
    let commands =
        ["write -P 0x5a 1M 3M", "flush", "read -P 0x5a 1M 3M", "write -z 2M 64k", "read -P 0 2M 64k"];
    let args = ["--object", &object, "--image-opts", &image];
    let args: Vec<&str> =
        args.into_iter().chain(commands.iter().flat_map(|command| ["-c", command])).collect();
    let said = run("qemu-io", &args);
    assert!(!said.contains("failed") && !said.contains("error"), "{said}");
    let copy = served.path("copy");
    let args = ["convert", "--object", &object, "--image-opts", &image, "-O", "raw", copy.to_str().unwrap()];
    run("qemu-img", &args);
    assert_eq!(std::fs::read(copy).unwrap()[MIB], 0x5a);
}

#[test]
fn clients_that_are_not_to_come_in_are_refused_by_our_server() {
    let certs = Certs::new();
    let served = served(&certs, "good", true);
    let refused = |program: &str, args: &[&str]| {
        let said = output(program, args);
        assert!(!said.status.success(), "{program} {args:?} came in");
        String::from_utf8_lossy(&said.stderr).into_owned()
    };
    // In the clear.
    refused("nbdinfo", &[&served.uri("disk")]);
    let said = refused("qemu-img", &["info", "-f", "raw", &served.uri("disk")]);
    assert!(said.contains("TLS"), "{said}");
    // Without a certificate, with one of another authority, with one that has expired.
    for dir in ["nobody", "foreign", "expired"] {
        // What we say arrives (GnuTLS calls it an alert), or they refuse us before we could refuse them.
        let why = |said: &str| said.contains("alert") || said.contains("ertificate");
        let said = refused("nbdinfo", &[&uri(&served, &certs, dir)]);
        assert!(why(&said), "{dir}: {said}");
        let [object, image] = qemu_options(&served, &certs, dir);
        let said = refused("qemu-img", &["info", "--object", &object, "--image-opts", &image]);
        assert!(why(&said), "{dir}: {said}");
    }
    // And who is, is not disturbed by them.
    run("nbdinfo", &[&uri(&served, &certs, "good")]);
}

#[test]
fn a_server_without_verify_peer_takes_clients_without_certificates() {
    let certs = Certs::new();
    let served = served(&certs, "good", false);
    run("nbdinfo", &[&uri(&served, &certs, "nobody")]);
}

/// A server's process, which ends with this.
struct Peer {
    child: Child,
    socket: PathBuf,
}

impl Peer {
    fn start(program: &str, args: &[&str], socket: &Path) -> Peer {
        let child = Command::new(program).args(args).stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        let child = child.unwrap_or_else(|error| {
            panic!("{program} does not start ({error}); apt-get install qemu-utils nbdkit libnbd-bin")
        });
        let mut peer = Peer { child, socket: socket.to_owned() };
        let began = Instant::now();
        while UnixStream::connect(&peer.socket).is_err() {
            assert!(began.elapsed() < PEER_TIME, "{program} does not listen");
            assert!(peer.child.try_wait().unwrap().is_none(), "{program} {args:?} ended at once");
            std::thread::yield_now();
        }
        peer
    }

    /// nbdkit, which insists on TLS where `dir` is given.
    fn nbdkit(certs: &Certs, dir: Option<&str>, verify_peer: bool, socket: &Path) -> Peer {
        let mut args = vec!["-f".to_owned(), "-U".to_owned(), socket.display().to_string()];
        if let Some(dir) = dir {
            args.push("--tls=require".into());
            args.push(format!("--tls-certificates={}", certs.dir(dir).display()));
        }
        if verify_peer {
            args.push("--tls-verify-peer".into());
        }
        args.extend(["memory".into(), "16M".into()]);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        Peer::start("nbdkit", &args, socket)
    }

    fn qemu_nbd(certs: &Certs, dir: &str, disk: &Path, socket: &Path) -> Peer {
        let object = format!("tls-creds-x509,id=t,endpoint=server,dir={}", certs.dir(dir).display());
        let (socket_arg, disk) = (socket.display().to_string(), disk.display().to_string());
        let args =
            ["-t", "-e", "10", "-f", "raw", "-k", &socket_arg, "--object", &object, "--tls-creds", "t"];
        let args: Vec<&str> = args.into_iter().chain([disk.as_str()]).collect();
        Peer::start("qemu-nbd", &args, socket)
    }

    /// Opens its export with the credentials in `dir`; what the opening says, and `use_it` of the storage.
    fn open(
        &self,
        certs: &Certs,
        dir: Option<&str>,
        name: Option<&str>,
        use_it: impl AsyncFnOnce(NbdStorage) + Send + 'static,
    ) -> Result<(), String> {
        let tls = dir.map(|dir| {
            let credentials =
                x509(&certs.dir(dir), "client", |files| ClientCredentials::new(&files, true)).unwrap();
            credentials.for_server(name).unwrap()
        });
        let path = self.socket.clone();
        let opened: Result<(), OpenError> = Reactors::start(1).unwrap().block_on(move || async move {
            let options =
                ClientOptions { read_only: false, on_lost: OnLost::Fail, tls, ..ClientOptions::default() };
            let storage = NbdStorage::connect(Arc::new(UnixConnector { path }), options).await?;
            use_it(storage).await;
            Ok(())
        });
        opened.map_err(|error| error.to_string())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn write_and_read(storage: NbdStorage) {
    let content = pattern(3 * MIB);
    storage.write(&Ctx::GUEST, 4096, content.clone().into(), WriteFlags::empty()).await.unwrap();
    storage.sync(&Ctx::GUEST).await.unwrap();
    let read = storage.read(&Ctx::GUEST, 4096, BytesMut::zeroed(3 * MIB)).await.unwrap();
    assert!(read[..] == content[..]);
}

#[test]
fn our_client_works_with_nbdkit_and_qemu_nbd_that_insist_on_tls() {
    let (certs, dir) = (Certs::new(), tempfile::tempdir().unwrap());
    let nbdkit = Peer::nbdkit(&certs, Some("good"), true, &dir.path().join("nbdkit"));
    nbdkit.open(&certs, Some("good"), Some("localhost"), write_and_read).unwrap();
    let disk = dir.path().join("disk");
    std::fs::write(&disk, vec![0; 16 * MIB]).unwrap();
    let qemu = Peer::qemu_nbd(&certs, "good", &disk, &dir.path().join("qemu"));
    qemu.open(&certs, Some("good"), None, write_and_read).unwrap();
}

#[test]
fn our_client_refuses_and_is_refused_with_a_sentence() {
    let (certs, dir) = (Certs::new(), tempfile::tempdir().unwrap());
    let disk = dir.path().join("disk");
    std::fs::write(&disk, vec![0; 16 * MIB]).unwrap();
    let nbdkit = Peer::nbdkit(&certs, Some("good"), true, &dir.path().join("nbdkit"));
    let expired = Peer::nbdkit(&certs, Some("expired"), false, &dir.path().join("expired"));
    let plain = Peer::nbdkit(&certs, None, false, &dir.path().join("plain"));
    let qemu = Peer::qemu_nbd(&certs, "good", &disk, &dir.path().join("qemu"));
    for (peer, credentials, name, why) in [
        (&nbdkit, None, None, "the server wants TLS: give credentials"),
        (&qemu, None, None, "the server wants TLS: give credentials"),
        (&plain, Some("good"), None, "TLS is asked for (tls-creds, or an nbds URI), and the server has none"),
        (&nbdkit, Some("foreign"), None, "none of our authorities (ca-cert.pem) has signed it"),
        (&qemu, Some("foreign"), None, "none of our authorities (ca-cert.pem) has signed it"),
        (&nbdkit, Some("good"), Some("elsewhere"), "it is not for 'elsewhere' but for"),
        (&expired, Some("good"), None, "it has expired"),
        (&nbdkit, Some("nobody"), None, "certificate"),
        (&qemu, Some("nobody"), None, "certificate"),
        (&qemu, Some("expired"), None, "certificate"),
    ] {
        let said = peer.open(&certs, credentials, name, async |_| ()).expect_err("it comes about");
        assert!(said.contains(why), "{credentials:?}: {said}");
    }
}

/// The path to a proxy that says STARTTLS to our server, and passes everything on from there: what is behind it speaks
/// plain TLS.
fn starttls_proxy(served: &Served) -> PathBuf {
    let (path, server) = (served.path("proxy"), served.socket().to_owned());
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, mut server) = (client.unwrap(), UnixStream::connect(&server).unwrap());
            let mut greeting = [0; 18];
            server.read_exact(&mut greeting).unwrap();
            server.write_all(&[0, 0, 0, 3]).unwrap();
            server.write_all(b"IHAVEOPT\0\0\0\x05\0\0\0\0").unwrap();
            let mut ack = [0; 20];
            server.read_exact(&mut ack).unwrap();
            assert_eq!(ack[12..16], [0, 0, 0, 1], "STARTTLS is refused");
            let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(std::net::Shutdown::Write);
            });
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut server, &mut client);
                let _ = client.shutdown(std::net::Shutdown::Write);
            });
        }
    });
    path
}

#[test]
fn old_versions_are_refused_and_new_ones_taken_as_openssl_sees_it() {
    let certs = Certs::new();
    let served = served(&certs, "good", true);
    let proxy = starttls_proxy(&served).display().to_string();
    let dir = certs.dir("good");
    let file = |name: &str| dir.join(name).display().to_string();
    let (ca, cert, key) = (file("ca-cert.pem"), file("client-cert.pem"), file("client-key.pem"));
    let client = |version: &[&str]| {
        let fixed = ["s_client", "-unix", &proxy, "-CAfile", &ca, "-cert", &cert, "-key", &key, "-brief"];
        let args: Vec<&str> = fixed.into_iter().chain(version.iter().copied()).collect();
        let out = output("openssl", &args);
        format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
    };
    for (version, name) in [("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")] {
        let said = client(&[version]);
        assert!(said.contains(&format!("Protocol version: {name}")), "{said}");
        assert!(said.contains("Verification: OK"), "{said}");
    }
    for version in ["-tls1", "-tls1_1"] {
        let said = client(&[version, "-cipher", "ALL:@SECLEVEL=0"]);
        assert!(said.contains("alert") && !said.contains("Protocol version"), "{version}: {said}");
    }
    // A client that goes away in the middle of its handshake.
    let mut half = UnixStream::connect(served.path("proxy")).unwrap();
    half.write_all(&[22, 3, 1, 0, 100, 1, 0]).unwrap();
    drop(half);
    run("nbdinfo", &[&uri(&served, &certs, "good")]);
}
