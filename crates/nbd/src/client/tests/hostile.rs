//! Servers that send what they must not: an error or another attempt, never a panic, a hang or the server's memory.

use std::cell::Cell;

use futures_util::future::LocalBoxFuture;
use infill_base::{IoError, OpenError};
use infill_sim::{Rng, World, block_on, pipe};
use infill_storage::rt;
use infill_storage::stream::{Connection, Connector};

use super::*;
use crate::client::fuzz::{attack, fuzz_client};
use crate::client::list_exports;
use crate::proto::*;

const LEN: u64 = 4096;

/// What a well-behaved server says to `fuzz_client`, in some mode, with answers to requests in some order.
fn script(rng: &mut Rng) -> BytesMut {
    let mut out = BytesMut::new();
    let mode = [Mode::Simple, Mode::Structured, Mode::Extended][rng.index(3)];
    Greeting { flags: HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES }.encode(&mut out);
    let refused = || OptionReply::Error { error: OptionError::Unsupported, message: "no".into() };
    let (structured, extended, context, go) = (8, 11, 10, 7);
    match mode {
        Mode::Extended => OptionReply::Ack.encode(extended, &mut out),
        _ => {
            refused().encode(extended, &mut out);
            let reply = if mode == Mode::Structured { OptionReply::Ack } else { refused() };
            reply.encode(structured, &mut out);
        }
    }
    if mode != Mode::Simple {
        OptionReply::MetaContext { id: 1, name: CONTEXT_ALLOCATION.into() }.encode(context, &mut out);
        OptionReply::Ack.encode(context, &mut out);
    }
    let info = ExportInfo { size: 2 * LEN, flags: Config::default().flags };
    OptionReply::Info(Info::Export(info)).encode(go, &mut out);
    OptionReply::Info(Info::BlockSize { min: 512, preferred: 4096, max: 65536 }).encode(go, &mut out);
    OptionReply::Ack.encode(go, &mut out);
    for _ in 0..12 {
        let index = rng.below(5);
        let cookie = (index + 1) << 32 | index;
        if mode == Mode::Simple {
            ReplyHeader::Simple { error: [0, 0, 0, 5][rng.index(4)], cookie }.encode(mode, &mut out);
            out.extend_from_slice(&vec![7; [0, LEN as usize][rng.index(2)]]);
            continue;
        }
        let at = [0, LEN][rng.index(2)];
        let chunk = match rng.below(6) {
            0 => Chunk::None,
            1 => Chunk::Data { offset: at, data: Bytes::from(vec![9; LEN as usize]) },
            2 => Chunk::Data { offset: at + 512, data: Bytes::from(vec![9; 512]) },
            3 => Chunk::Hole { offset: at, len: rng.range(1, 5000) as u32 },
            4 => Chunk::Status {
                context: 1,
                extents: vec![StatusExtent { len: rng.range(1, 9999), flags: 3 }; 2],
            },
            _ => Chunk::Error { error: 5, message: "bad".into(), offset: None },
        };
        let mut payload = BytesMut::new();
        let kind = chunk.encode(mode, &mut payload);
        if let Chunk::Data { data, .. } = &chunk {
            payload.extend_from_slice(data);
        }
        let flags = if rng.per_mille(600) { ReplyFlags::DONE } else { ReplyFlags::empty() };
        let header = ReplyHeader::Chunk { flags, kind, cookie, offset: at, len: payload.len() as u64 };
        header.encode(mode, &mut out);
        out.extend_from_slice(&payload);
    }
    out
}

/// Changes some bytes, and sometimes the order of parts.
fn spoil(rng: &mut Rng, bytes: &mut Vec<u8>) {
    for _ in 0..rng.below(6) {
        let at = rng.index(bytes.len());
        match rng.below(5) {
            0 => bytes[at] = rng.next_u64() as u8,
            1 => bytes[at] ^= 1 << rng.below(8),
            2 => drop(bytes.drain(at..(at + 1 + rng.index(30)).min(bytes.len()))),
            3 => {
                let part = bytes[at..(at + 40).min(bytes.len())].to_vec();
                bytes.splice(at..at, part);
            }
            _ => bytes.truncate(at.max(1)),
        }
    }
}

#[test]
fn no_bytes_of_a_server_panic_the_client_or_keep_a_request_for_ever() {
    for seed in 0..4000 {
        let mut rng = Rng::new(seed);
        let mut data = vec![rng.next_u64() as u8, rng.next_u64() as u8];
        for _ in 0..=data[1] % 4 {
            let mut bytes = script(&mut rng).to_vec();
            spoil(&mut rng, &mut bytes);
            data.extend(bytes);
        }
        let world = World::new(seed);
        world.run(attack(&data));
        world.run_until_idle();
        assert_eq!(world.tasks_alive(), 0, "seed {seed}");
        // What a fuzzer calls has a world of its own.
        fuzz_client(&data);
    }
}

/// Says the same to everybody, then either hangs up or keeps silent.
struct Says {
    bytes: Vec<u8>,
    silent: bool,
}

impl Connector for Says {
    fn connect(&self) -> LocalBoxFuture<'_, Result<Connection, IoError>> {
        Box::pin(async {
            let (here, mut there) = pipe(1 << 26);
            there.writer.write_all(self.bytes.clone().into()).await?;
            if self.silent {
                rt::spawn(async move {
                    let _there = there;
                    rt::sleep(Duration::from_secs(3600)).await;
                });
            }
            Ok(here)
        })
    }

    fn target(&self) -> String {
        "a server that says the same to everybody".into()
    }
}

fn open_error(bytes: Vec<u8>, silent: bool) -> (OpenError, Duration) {
    let took = Cell::new(Duration::ZERO);
    let error = block_on(async {
        let error = NbdStorage::connect(Arc::new(Says { bytes, silent }), ClientOptions::default()).await;
        took.set(rt::now());
        error.map(|_| ()).unwrap_err()
    });
    (error, took.get())
}

fn greeting() -> BytesMut {
    let mut out = BytesMut::new();
    Greeting { flags: HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES }.encode(&mut out);
    out
}

#[test]
fn a_handshake_has_an_end_whatever_the_server_says() {
    // Nothing.
    let (error, took) = open_error(Vec::new(), true);
    assert!(took == Duration::from_secs(10) && error.to_string().contains("within 10s"), "{error}");
    // Informations without end.
    let mut bytes = greeting();
    (0..100).for_each(|_| OptionReply::Info(Info::Description("x".into())).encode(11, &mut bytes));
    let (error, _) = open_error(bytes.to_vec(), true);
    assert!(error.to_string().contains("without end"), "{error}");
    // A reply of 4 GiB.
    let mut bytes = greeting();
    OptionReply::Ack.encode(11, &mut bytes);
    let len = bytes.len();
    bytes[len - 4..].fill(0xff);
    let (error, _) = open_error(bytes.to_vec(), true);
    assert!(error.to_string().contains("at most"), "{error}");
    // Another protocol.
    let (error, _) = open_error(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), false);
    assert!(matches!(error, OpenError::Malformed { format: "NBD", .. }), "{error}");
    // Cut anywhere.
    let whole = script(&mut Rng::new(1));
    for len in 0..140 {
        let (error, _) = open_error(whole[..len].to_vec(), false);
        assert!(error.to_string().contains("hung up"), "{len}: {error}");
    }
}

/// Each of its replies is one that may be, and so is their number.
#[test]
fn a_server_with_more_to_tell_of_its_exports_than_memory_is_for_is_refused() {
    let list = |exports: usize, contexts: usize, name_bytes: usize| {
        let mut bytes = greeting();
        OptionReply::Ack.encode(11, &mut bytes);
        let name = "x".repeat(name_bytes);
        for _ in 0..exports {
            OptionReply::Server { name: name.clone(), description: String::new() }.encode(3, &mut bytes);
        }
        OptionReply::Ack.encode(3, &mut bytes);
        for _ in 0..exports {
            OptionReply::Ack.encode(6, &mut bytes);
            for id in 0..contexts as u32 {
                OptionReply::MetaContext { id, name: name.clone() }.encode(9, &mut bytes);
            }
            OptionReply::Ack.encode(9, &mut bytes);
        }
        OptionReply::Ack.encode(2, &mut bytes);
        let server = Says { bytes: bytes.to_vec(), silent: true };
        let listed = block_on(list_exports(&server, None, Duration::from_secs(60)));
        listed.map(|listed| listed.len()).map_err(|error| error.to_string())
    };
    assert_eq!(list(100, 20, 4096), Ok(100));
    for (exports, contexts, name_bytes) in [(6, 1000, 4096), (4095, 0, 4096), (400, 1000, 1)] {
        let why = list(exports, contexts, name_bytes).expect_err("it is refused");
        assert!(why.contains("tells more than 16777216 bytes of its exports"), "{why}");
    }
}

#[test]
fn an_export_that_makes_no_sense_is_refused() {
    let open = |size, blocks: Option<(u32, u32, u32)>| {
        let mut bytes = greeting();
        OptionReply::Ack.encode(11, &mut bytes);
        OptionReply::Ack.encode(10, &mut bytes);
        let info = ExportInfo { size, flags: TransmissionFlags::HAS_FLAGS };
        OptionReply::Info(Info::Export(info)).encode(7, &mut bytes);
        if let Some((min, preferred, max)) = blocks {
            OptionReply::Info(Info::BlockSize { min, preferred, max }).encode(7, &mut bytes);
        }
        OptionReply::Ack.encode(7, &mut bytes);
        open_error(bytes.to_vec(), true).0.to_string()
    };
    assert!(open(1 << 63, None).contains("2^63"));
    assert!(open(1 << 20, Some((3, 4096, 65536))).contains("power of two"));
    assert!(open(1 << 20, Some((0, 4096, 65536))).contains("power of two"));
    assert!(open(1 << 20, Some((1 << 17, 1 << 17, 1 << 20))).contains("64 KiB"));
    assert!(open(1 << 20, Some((4096, 4096, 512))).contains("below the smallest"));
    assert!(open(1000, Some((512, 4096, 65536))).contains("not a multiple"));
}

/// What a server says that agrees on everything and then answers what was not asked.
fn spoiled() -> Vec<u8> {
    let mut spoiled = greeting();
    OptionReply::Ack.encode(11, &mut spoiled);
    OptionReply::Ack.encode(10, &mut spoiled);
    let info = ExportInfo { size: LEN, flags: Config::default().flags };
    OptionReply::Info(Info::Export(info)).encode(7, &mut spoiled);
    OptionReply::Ack.encode(7, &mut spoiled);
    let header =
        ReplyHeader::Chunk { flags: ReplyFlags::DONE, kind: ChunkKind::None, cookie: 99, offset: 0, len: 0 };
    header.encode(Mode::Extended, &mut spoiled);
    spoiled.to_vec()
}

#[test]
fn a_server_that_breaks_the_protocol_again_and_again_fails_writers_and_those_who_do_not_want_to_wait() {
    for (read_only, on_lost) in [(true, OnLost::Fail), (false, OnLost::Hold { limit: None })] {
        block_on(async {
            let connector = Says { bytes: spoiled(), silent: true };
            let options = ClientOptions { read_only, on_lost, ..ClientOptions::default() };
            let storage = NbdStorage::connect(Arc::new(connector), options).await.unwrap();
            let error = read(&storage, 0, 512).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::SourceLost);
            assert!(error.to_string().contains("broke the NBD protocol"), "{error}");
        });
    }
}

#[test]
fn reads_are_held_while_a_server_breaks_the_protocol_again_and_again_until_it_behaves() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let storage = open(&server, ClientOptions { connections_max: 1, ..ClientOptions::default() }).await;
        server.set(|state| state.short = true);
        let mut held = Box::pin(read(&storage, 0, 4096));
        rt::timeout(Duration::from_secs(3600), &mut held).await.ok_or(()).unwrap_err();
        let tried = server.state().connections;
        assert!((3600..=7300).contains(&tried), "{tried} connections in an hour");
        server.set(|state| state.short = false);
        let good = rt::now();
        assert!(held.await.unwrap() == server.state().live[..4096]);
        assert!(rt::now() - good < Duration::from_secs(1));
        assert!(storage.is_connected());
    });
}

#[test]
fn a_server_that_is_there_and_no_use_does_not_lengthen_the_hold() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let limit = Duration::from_secs(20);
        let options =
            ClientOptions { on_lost: OnLost::Hold { limit: Some(limit) }, ..ClientOptions::default() };
        let storage = open(&server, options).await;
        read(&storage, 0, 512).await.unwrap();
        // Away, and back, while somebody waits and while nobody does.
        for _ in 0..2 {
            server.kill();
            read(&storage, 0, 512).await.unwrap();
            rt::sleep(limit).await;
            server.kill();
            rt::sleep(limit).await;
        }
        server.set(|state| state.short = true);
        let broke = rt::now();
        let error = read(&storage, 0, 4096).await.unwrap_err();
        assert_eq!((error.kind(), rt::now() - broke), (ErrorKind::SourceLost, limit));
        server.set(|state| state.short = false);
        storage.watch().next().await;
        read(&storage, 0, 4096).await.unwrap();
    });
}
