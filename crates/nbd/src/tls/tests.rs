//! Both sides of TLS against each other and against those who break its rules: in memory, on a virtual clock.

use std::cell::Cell;
use std::rc::Rc;

use bytes::{BufMut, Bytes, BytesMut};
use infill_base::{Ctx, ErrorKind, Gather, IoError, OpenError, WriteFlags};
use infill_node::{MemoryOverlay, NodeHandle};
use infill_sim::{Rng, World, pipe, torn_pipe};
use infill_storage::stream::{Connector, StreamRead};
use infill_storage::{Storage, rt};

use super::*;
use crate::proto::{
    ClientFlags, Greeting, OptionError, OptionReply, OptionReplyHeader, OptionRequest, ProtocolError,
};
use crate::{ClientOptions, Export, Exports, NbdStorage, OnLost, Server, ServerLimits};

#[path = "../../tests/common/certs.rs"]
#[allow(dead_code, reason = "other tests use other parts")]
mod certs;
use certs::{Certs, bytes};

/// The credentials of one end in one of [`Certs`]' directories.
struct Files {
    ca: Vec<u8>,
    crl: Option<Vec<u8>>,
    certificate: Option<Vec<u8>>,
    key: Option<Vec<u8>>,
}

impl Files {
    fn of(certs: &Certs, dir: &str, end: &str) -> Files {
        let dir = certs.dir(dir);
        Files {
            ca: bytes(&dir, "ca-cert.pem").unwrap(),
            crl: bytes(&dir, "ca-crl.pem"),
            certificate: bytes(&dir, &format!("{end}-cert.pem")),
            key: bytes(&dir, &format!("{end}-key.pem")),
        }
    }

    fn x509(&self) -> X509<'_> {
        X509 {
            ca: &self.ca,
            crl: self.crl.as_deref(),
            certificate: self.certificate.as_deref(),
            key: self.key.as_deref(),
            password: None,
        }
    }
}

fn server_tls(certs: &Certs, dir: &str, verify_peer: bool) -> ServerTls {
    ServerTls::new(&Files::of(certs, dir, "server").x509(), verify_peer).unwrap()
}

fn client_tls(certs: &Certs, dir: &str, name: Option<&str>) -> ClientTls {
    let files = Files::of(certs, dir, "client");
    ClientCredentials::new(&files.x509(), true).unwrap().for_server(name).unwrap()
}

const DISK: u64 = 4 << 20;

fn server(tls: Option<ServerTls>) -> Server {
    let exports = Exports::new();
    let node = NodeHandle::new(MemoryOverlay::new(DISK, 4096, None));
    exports.add(Export { writable: true, ..Export::new("disk", node) }).unwrap();
    Server::over(exports, ServerLimits::default(), tls)
}

/// Connects to a server in the same world, and keeps what ended its connections.
struct Here {
    server: Server,
    seed: u64,
    ended: Arc<std::sync::Mutex<Vec<IoError>>>,
}

impl Here {
    fn new(tls: Option<ServerTls>) -> Here {
        Here { server: server(tls), seed: 1, ended: Arc::default() }
    }
}

impl Connector for Here {
    fn connect(&self) -> futures_util::future::LocalBoxFuture<'_, IoResult<Connection>> {
        Box::pin(async move {
            let (here, there) = torn_pipe(40_000, Rng::new(self.seed));
            let (server, ended) = (self.server.clone(), self.ended.clone());
            rt::spawn(async move {
                if let Err(error) = server.serve(there).await {
                    ended.lock().unwrap().push(error);
                }
            });
            Ok(here)
        })
    }

    fn target(&self) -> String {
        "here".into()
    }
}

async fn storage(here: &Arc<Here>, tls: Option<ClientTls>) -> Result<NbdStorage, OpenError> {
    let options = ClientOptions {
        export: "disk".into(),
        read_only: false,
        on_lost: OnLost::Fail,
        tls,
        ..ClientOptions::default()
    };
    NbdStorage::connect(here.clone(), options).await
}

fn in_world(test: impl AsyncFnOnce()) {
    World::new(1).run(test());
}

/// Both ends of an encrypted connection.
async fn ends(certs: &Certs) -> (Connection, Connection) {
    let (client, server) = pipe(100_000);
    let (client_tls, server_tls) = (client_tls(certs, "good", None), server_tls(certs, "good", true));
    let (client, server) = futures_util::future::join(
        client_tls.connect(client, BytesMut::new()),
        server_tls.accept(server, BytesMut::new()),
    )
    .await;
    (client.unwrap(), server.unwrap())
}

async fn read_to_end(reader: &mut dyn StreamRead) -> (Vec<u8>, IoResult<()>) {
    let mut all = Vec::new();
    loop {
        match reader.read(BytesMut::with_capacity(10_000)).await {
            Ok(piece) if piece.is_empty() => return (all, Ok(())),
            Ok(piece) => all.extend_from_slice(&piece),
            Err(error) => return (all, Err(error)),
        }
    }
}

#[test]
fn what_is_written_while_it_is_read_comes_back_through_a_torn_connection() {
    let certs = Certs::new();
    in_world(async || {
        let here = Arc::new(Here::new(Some(server_tls(&certs, "good", true))));
        let disk = storage(&here, Some(client_tls(&certs, "good", Some("localhost")))).await.unwrap();
        let pattern = |at: u64| Bytes::from(vec![(at >> 16) as u8 ^ 0x5a; 64 << 10]);
        let places = || (0..DISK).step_by(64 << 10);
        // All writes, and then all reads, are in flight together: records of both directions cross.
        let writes = places().map(|at| disk.write(&Ctx::GUEST, at, pattern(at).into(), WriteFlags::empty()));
        futures_util::future::try_join_all(writes).await.unwrap();
        let reads = places().map(async |at| {
            let read = disk.read(&Ctx::GUEST, at, BytesMut::zeroed(64 << 10)).await.unwrap();
            assert!(read[..] == pattern(at)[..], "at {at}");
        });
        futures_util::future::join_all(reads).await;
        disk.sync(&Ctx::GUEST).await.unwrap();
        assert!(here.ended.lock().unwrap().is_empty());
    });
}

#[test]
fn an_end_without_close_notify_is_a_loss_and_with_it_an_end() {
    let certs = Certs::new();
    in_world(async || {
        let (mut client, mut server) = ends(&certs).await;
        server.writer.write_all(Gather::from(vec![7; 50_000])).await.unwrap();
        server.writer.shutdown().await.unwrap();
        let (all, end) = read_to_end(&mut *client.reader).await;
        assert!(all == [7; 50_000] && end.is_ok(), "{} bytes, {end:?}", all.len());
        // The other direction goes on until it says so itself.
        client.writer.write_all(Gather::from(vec![8; 50_000])).await.unwrap();
        drop(client);
        let (all, end) = read_to_end(&mut *server.reader).await;
        assert!(all == [8; 50_000], "{} bytes", all.len());
        let error = end.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::SourceLost);
        assert!(error.to_string().contains("the connection was lost"), "{error}");
    });
}

#[test]
fn a_byte_that_was_changed_on_its_way_ends_the_stream_with_an_error() {
    let certs = Certs::new();
    in_world(async || {
        // Between the two sits somebody who changes one byte behind the handshake.
        let ((client, from_client), (to_server, server)) = (pipe(100_000), pipe(100_000));
        let armed = Rc::new(Cell::new(false));
        let Connection { mut reader, writer: mut to_client, .. } = from_client;
        let Connection { reader: mut from_server, writer: mut forward, .. } = to_server;
        let arm = armed.clone();
        rt::spawn(async move {
            while let Ok(mut piece) = reader.read(BytesMut::with_capacity(4096)).await {
                if piece.is_empty() {
                    return;
                }
                if arm.take() {
                    let last = piece.len() - 1;
                    piece[last] ^= 1;
                }
                if forward.write_all(piece.freeze().into()).await.is_err() {
                    return;
                }
            }
        });
        rt::spawn(async move {
            while let Ok(piece) = from_server.read(BytesMut::with_capacity(4096)).await {
                if piece.is_empty() || to_client.write_all(piece.freeze().into()).await.is_err() {
                    return;
                }
            }
        });
        let (client_tls, server_tls) = (client_tls(&certs, "good", None), server_tls(&certs, "good", true));
        let (client, server) = futures_util::future::join(
            client_tls.connect(client, BytesMut::new()),
            server_tls.accept(server, BytesMut::new()),
        )
        .await;
        let (mut client, mut server) = (client.unwrap(), server.unwrap());
        armed.set(true);
        client.writer.write_all(Gather::from(vec![1; 100])).await.unwrap();
        let (all, end) = read_to_end(&mut *server.reader).await;
        assert!(all.is_empty());
        assert!(end.unwrap_err().to_string().contains("changed on its way"));
        // And the other one is told.
        server.writer.shutdown().await.unwrap();
        let (_, end) = read_to_end(&mut *client.reader).await;
        assert!(end.unwrap_err().to_string().contains("BadRecordMac"));
    });
}

#[test]
fn a_send_that_was_dropped_midway_is_followed_by_nothing() {
    let certs = Certs::new();
    in_world(async || {
        let (mut client, mut server) = ends(&certs).await;
        {
            // More than the pipe holds, and nobody reads.
            let send = client.writer.write_all(Gather::from(vec![9; 1 << 20]));
            assert!(rt::timeout(std::time::Duration::from_secs(1), send).await.is_none());
        }
        assert!(client.writer.write_all(Gather::from(vec![1])).await.is_err());
        client.writer.shutdown().await.unwrap();
        let (all, end) = read_to_end(&mut *server.reader).await;
        assert!(all.iter().all(|byte| *byte == 9), "something else followed");
        assert_eq!(end.unwrap_err().kind(), ErrorKind::SourceLost);
    });
}

/// What a client, and the server, say of a connection that does not come about.
fn refused(server: Option<ServerTls>, client: Option<ClientTls>) -> (String, String) {
    let said = Rc::new(Cell::new((String::new(), String::new())));
    let told = said.clone();
    in_world(async || {
        let here = Arc::new(Here::new(server));
        let error = storage(&here, client).await.expect_err("it must not come about");
        // Until the server has ended it as well.
        while here.server.connections() > 0 {
            rt::sleep(std::time::Duration::from_millis(100)).await;
        }
        let ended = here.ended.lock().unwrap().first().map(IoError::to_string).unwrap_or_default();
        told.set((error.to_string(), ended));
    });
    said.take()
}

#[test]
fn who_is_not_accepted_is_refused_with_a_sentence_on_both_sides() {
    let certs = Certs::new();
    let good = || Some(server_tls(&certs, "good", true));
    let client = |dir: &str| Some(client_tls(&certs, dir, Some("localhost")));
    let cases = [
        ("a client without TLS", good(), None, "the server wants TLS: give credentials", "hung up|closed"),
        ("a server without TLS", None, client("good"), "the server has none: this server is not", "closed"),
        (
            "no certificate",
            good(),
            client("nobody"),
            "the server wants a certificate",
            "shows no certificate",
        ),
        (
            "an unknown authority",
            good(),
            client("foreign"),
            "of the server is refused: none of our authorities (ca-cert.pem) has signed it",
            "the client refuses our certificate: it does not know the authority",
        ),
        (
            "an unknown client",
            Some(server_tls(&certs, "foreign", true)),
            Some(
                ClientCredentials::new(&Files::of(&certs, "good", "client").x509(), false)
                    .unwrap()
                    .for_server(None)
                    .unwrap(),
            ),
            "the server refuses our certificate: it does not know the authority",
            "of the client is refused: none of our authorities",
        ),
        (
            "a server that has expired",
            Some(server_tls(&certs, "expired", true)),
            client("good"),
            "of the server is refused: it has expired",
            "the client refuses our certificate: it has expired",
        ),
        (
            "a client that has expired",
            good(),
            client("expired"),
            "the server refuses our certificate: it has expired",
            "of the client is refused: it has expired",
        ),
        (
            "a client that was revoked",
            Some(server_tls(&certs, "revoked", true)),
            client("good"),
            "the server refuses our certificate: it was revoked",
            "of the client is refused: it was revoked",
        ),
        (
            "another name",
            good(),
            Some(client_tls(&certs, "good", Some("elsewhere.example"))),
            "it is not for 'elsewhere.example' but for localhost, 127.0.0.1; name",
            "the client refuses our certificate",
        ),
        (
            "another address",
            good(),
            Some(client_tls(&certs, "good", Some("192.0.2.1"))),
            "it is not for '192.0.2.1' but for",
            "the client refuses our certificate",
        ),
    ];
    for (case, server, client, by_client, by_server) in cases {
        let (told, ended) = refused(server, client);
        assert!(told.contains(by_client), "{case}: the client says: {told}");
        assert!(by_server.split('|').any(|said| ended.contains(said)), "{case}: the server says: {ended}");
    }
}

#[test]
fn who_is_accepted_by_the_rules_gets_in() {
    let certs = Certs::new();
    let unverified = |dir: &str| {
        let files = Files::of(&certs, dir, "client");
        ClientCredentials::new(&files.x509(), false).unwrap().for_server(Some("elsewhere")).unwrap()
    };
    let cases = [
        (server_tls(&certs, "good", true), client_tls(&certs, "good", Some("127.0.0.1"))),
        (server_tls(&certs, "good", true), client_tls(&certs, "good", None)),
        // verify-peer=off: of the server, then of the client.
        (server_tls(&certs, "good", false), client_tls(&certs, "nobody", Some("localhost"))),
        (server_tls(&certs, "expired", false), unverified("nobody")),
    ];
    for (server, client) in cases {
        in_world(async || {
            let here = Arc::new(Here::new(Some(server)));
            let disk = storage(&here, Some(client)).await.unwrap();
            disk.read(&Ctx::GUEST, 0, BytesMut::zeroed(512)).await.unwrap();
        });
    }
}

#[test]
fn a_client_that_connects_again_speaks_tls_again() {
    let certs = Certs::new();
    in_world(async || {
        let here = Arc::new(Here::new(Some(server_tls(&certs, "good", true))));
        let options = ClientOptions {
            export: "disk".into(),
            tls: Some(client_tls(&certs, "good", None)),
            connections_max: 1,
            ..ClientOptions::default()
        };
        let disk = NbdStorage::connect(here.clone(), options).await.unwrap();
        let mut watch = disk.watch();
        for _ in 0..2 {
            let (export, before) = ("disk", here.server.chosen());
            let node = here.server.exports().get(export).unwrap().node;
            here.server.exports().remove(export, crate::RemoveMode::Hard).unwrap().gone().await;
            here.server.exports().add(Export { writable: true, ..Export::new(export, node) }).unwrap();
            watch.next().await.unwrap();
            disk.read(&Ctx::GUEST, 0, BytesMut::zeroed(512)).await.unwrap();
            assert!(here.server.chosen() > before, "no new connection");
        }
    });
}

/// A client that speaks the handshake by hand.
struct Raw {
    connection: Connection,
    received: BytesMut,
}

impl Raw {
    async fn hello(connection: Connection) -> Raw {
        let mut raw = Raw { connection, received: BytesMut::new() };
        raw.take(Greeting::decode).await.unwrap();
        let mut out = BytesMut::new();
        (ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES).encode(&mut out);
        raw.send(out).await;
        raw
    }

    async fn send(&mut self, out: BytesMut) {
        self.connection.writer.write_all(out.freeze().into()).await.unwrap();
    }

    async fn take<T>(
        &mut self,
        decode: impl Fn(&mut BytesMut) -> Result<Option<T>, ProtocolError>,
    ) -> Option<T> {
        loop {
            if let Some(taken) = decode(&mut self.received).unwrap() {
                return Some(taken);
            }
            self.received.reserve(1000);
            let before = self.received.len();
            self.received = self.connection.reader.read(std::mem::take(&mut self.received)).await.ok()?;
            if self.received.len() == before {
                return None;
            }
        }
    }

    /// The last reply to an option; `None` if the server has ended.
    async fn option(&mut self, wire: BytesMut) -> Option<OptionReply> {
        self.send(wire).await;
        loop {
            let header = self.take(OptionReplyHeader::decode).await?;
            let len = header.len as usize;
            let data = self.take(|buf| Ok((buf.len() >= len).then(|| buf.split_to(len)))).await.unwrap();
            match OptionReply::decode(header.kind, &data).unwrap() {
                OptionReply::Info(_) | OptionReply::MetaContext { .. } => {}
                last => return Some(last),
            }
        }
    }

    async fn ask(&mut self, request: OptionRequest) -> Option<OptionReply> {
        let mut out = BytesMut::new();
        request.encode(&mut out);
        self.option(out).await
    }
}

fn wire_option(option: u32, data: &[u8]) -> BytesMut {
    let mut out = BytesMut::new();
    out.put_slice(b"IHAVEOPT");
    out.put_u32(option);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
    out
}

#[test]
fn before_tls_every_option_is_refused_and_nothing_of_it_is_kept() {
    let certs = Certs::new();
    in_world(async || {
        let here = Here::new(Some(server_tls(&certs, "good", true)));
        let connect = async || Raw::hello(here.connect().await.unwrap()).await;
        let mut raw = connect().await;
        let go = OptionRequest::Info { go: true, name: "disk".into(), wanted: vec![] };
        let info = OptionRequest::Info { go: false, name: "disk".into(), wanted: vec![] };
        let context = OptionRequest::MetaContext { set: true, export: "disk".into(), queries: vec![] };
        let requests = [
            OptionRequest::List,
            go.clone(),
            info,
            OptionRequest::StructuredReply,
            OptionRequest::ExtendedHeaders,
            context,
            OptionRequest::Unknown(77),
        ];
        let required = |reply: Option<OptionReply>| {
            matches!(reply, Some(OptionReply::Error { error: OptionError::TlsRequired, .. }))
        };
        for request in requests {
            assert!(required(raw.ask(request.clone()).await), "{request:?}");
        }
        assert!(required(raw.option(wire_option(7, b"zz")).await), "an option that is wrong");
        assert!(required(raw.option(wire_option(3, &vec![0; 200 << 10])).await), "one that is too long");
        // STARTTLS takes no data; without, it is answered, and then all goes on in TLS.
        let invalid = raw.option(wire_option(5, b"x")).await;
        assert!(required(invalid), "STARTTLS with data");
        assert_eq!(raw.ask(OptionRequest::StartTls).await, Some(OptionReply::Ack));
        let Raw { connection, received } = raw;
        let connection = client_tls(&certs, "good", None).connect(connection, received).await.unwrap();
        let mut raw = Raw { connection, received: BytesMut::new() };
        let again = raw.ask(OptionRequest::StartTls).await;
        assert!(matches!(again, Some(OptionReply::Error { error: OptionError::Invalid, .. })), "{again:?}");
        // Not agreed on before, though it was asked for.
        assert_eq!(raw.ask(OptionRequest::StructuredReply).await, Some(OptionReply::Ack));
        assert_eq!(raw.ask(go).await, Some(OptionReply::Ack));

        assert_eq!(connect().await.ask(OptionRequest::Abort).await, Some(OptionReply::Ack));
        let mut raw = connect().await;
        let mut out = BytesMut::new();
        OptionRequest::ExportName("disk".into()).encode(&mut out);
        raw.send(out).await;
        assert_eq!(raw.take(|buf| Ok((!buf.is_empty()).then_some(()))).await, None, "it has an answer");
    });
}

#[test]
fn options_in_the_clear_behind_starttls_are_no_options() {
    let certs = Certs::new();
    in_world(async || {
        let here = Here::new(Some(server_tls(&certs, "good", false)));
        let mut raw = Raw::hello(here.connect().await.unwrap()).await;
        let mut out = BytesMut::new();
        OptionRequest::StartTls.encode(&mut out);
        OptionRequest::List.encode(&mut out);
        assert_eq!(raw.option(out).await, Some(OptionReply::Ack));
        // What comes then is an alert, and the end.
        let (mut said, end) = read_to_end(&mut *raw.connection.reader).await;
        said.splice(0..0, raw.received.iter().copied());
        assert!(end.is_ok() && said[0] == 21 && said.len() == 7, "{said:?} {end:?}");
        drop(raw);
        while here.server.connections() > 0 {
            rt::sleep(std::time::Duration::from_millis(10)).await;
        }
        let ended = here.ended.lock().unwrap()[0].to_string();
        assert!(ended.contains("is not TLS"), "{ended}");
    });
}

#[test]
fn a_handshake_that_stops_midway_is_ended_by_its_deadline() {
    let certs = Certs::new();
    in_world(async || {
        let here = Here::new(Some(server_tls(&certs, "good", true)));
        let mut raw = Raw::hello(here.connect().await.unwrap()).await;
        assert_eq!(raw.ask(OptionRequest::StartTls).await, Some(OptionReply::Ack));
        // The beginning of a record, and then nothing.
        raw.send(BytesMut::from(&[22, 3, 1, 1, 0][..])).await;
        while here.server.connections() > 0 {
            rt::sleep(std::time::Duration::from_millis(100)).await;
        }
        assert_eq!(here.ended.lock().unwrap()[0].kind(), ErrorKind::TimedOut);
    });
}

#[test]
fn hostile_bytes_behind_starttls_end_the_session_and_leave_the_server_whole() {
    let certs = Certs::new();
    in_world(async || {
        let here = Here::new(Some(server_tls(&certs, "good", true)));
        let mut rng = Rng::new(3);
        for _ in 0..200 {
            let mut raw = Raw::hello(here.connect().await.unwrap()).await;
            assert_eq!(raw.ask(OptionRequest::StartTls).await, Some(OptionReply::Ack));
            let mut bytes: Vec<u8> = (0..rng.index(300)).map(|_| rng.index(256) as u8).collect();
            // Half of them begin as a handshake does.
            if rng.index(2) == 0 {
                let begin = [22, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3];
                bytes.splice(0..0, begin);
            }
            let _gone = raw.connection.writer.write_all(Gather::from(bytes)).await;
        }
        while here.server.connections() > 0 {
            rt::sleep(std::time::Duration::from_millis(100)).await;
        }
        let here = Arc::new(here);
        storage(&here, Some(client_tls(&certs, "good", None))).await.unwrap();
    });
}

#[test]
fn credentials_that_cannot_be_used_say_which_part() {
    let certs = Certs::new();
    let (good, foreign) = (Files::of(&certs, "good", "server"), Files::of(&certs, "foreign", "server"));
    let (own, junk) = (good.x509(), Some(&b"junk"[..]));
    let of = |files: X509<'_>| ServerTls::new(&files, true).unwrap_err();
    assert!(matches!(of(X509 { ca: b"", ..own }), TlsError::Ca(_)));
    assert!(matches!(of(X509 { ca: b"-----BEGIN CERTIFICATE-----\nzz\n", ..own }), TlsError::Ca(_)));
    assert!(matches!(of(X509 { crl: junk, ..own }), TlsError::Crl(_)));
    assert!(matches!(of(X509 { certificate: junk, ..own }), TlsError::Certificate(_)));
    assert!(matches!(of(X509 { certificate: None, ..own }), TlsError::Certificate(_)));
    assert!(matches!(of(X509 { key: junk, ..own }), TlsError::Key(_)));
    assert_eq!(of(X509 { key: foreign.key.as_deref(), ..own }), TlsError::Mismatch);
    let encrypted = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAo=\n-----END ENCRYPTED PRIVATE KEY-----\n";
    let error = of(X509 { key: Some(encrypted.as_bytes()), ..own });
    assert!(error.to_string().contains("openssl pkey"), "{error}");
    let error = of(X509 { key: Some(encrypted.as_bytes()), password: Some(b"hush"), ..own });
    assert!(error.to_string().contains("its structure is not that of an encrypted key"), "{error}");

    assert_eq!(own.check_own(true), Ok(()));
    assert!(matches!(own.check_own(false), Err(TlsError::Own(_))), "a server's certificate for a client");
    assert!(matches!(X509 { ca: &foreign.ca, ..own }.check_own(true), Err(TlsError::Own(_))));
    let expired = Files::of(&certs, "expired", "server");
    assert_eq!(expired.x509().check_own(true), Err(TlsError::Expired));
    let client = Files::of(&certs, "good", "client");
    assert_eq!(client.x509().check_own(false), Ok(()));
    let credentials = ClientCredentials::new(&client.x509(), true).unwrap();
    assert!(matches!(credentials.for_server(Some("a b")), Err(TlsError::Name(_))));
}
