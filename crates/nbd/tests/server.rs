//! The server against clients that break rules, stall, vanish, or want too much: over connections in memory, on a virtual
//! clock.

mod raw;

use std::time::Duration;

use bytes::{BufMut, BytesMut};
use infill_base::{Ctx, ErrorKind};
use infill_nbd::proto::{
    Chunk, Command, CommandFlags, Mode, OptionError, OptionReply, OptionRequest, StatusExtent,
};
use infill_nbd::{Export, ExportError, Exports, RemoveMode, Server, ServerLimits};
use infill_node::{CopyOnRead, MemoryOverlay, NodeHandle, RawNode};
use infill_sim::{DiskOp, Rng, SimDisk, World, torn_pipe};
use infill_storage::{StorageHandle, rt};
use raw::{Raw, connect, connect_over};

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ESHUTDOWN: u32 = 108;

const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];
const NONE: CommandFlags = CommandFlags::empty();

fn server_with(node: NodeHandle, limits: ServerLimits) -> Server {
    let exports = Exports::new();
    let export = Export { allocation_depth: true, ..Export::new("disk", node) };
    exports.add(Export { writable: true, ..export.clone() }).unwrap();
    exports.add(Export { name: "ro".into(), ..export }).unwrap();
    Server::new(exports, limits)
}

fn memory_server(len: u64) -> Server {
    server_with(NodeHandle::new(MemoryOverlay::new(len, 4096, None)), ServerLimits::default())
}

/// A server of a simulated disk, whose operations can be held and made to fail.
fn disk_server(len: u64, limits: ServerLimits) -> (SimDisk, Server) {
    let disk = SimDisk::new(len);
    let node = RawNode::new(StorageHandle::new(disk.clone()), false);
    (disk, server_with(NodeHandle::new(node), limits))
}

fn in_world(test: impl AsyncFnOnce()) {
    World::new(1).run(test());
}

#[test]
fn a_refused_request_is_answered_and_the_next_one_is_understood() {
    in_world(async || {
        const SIZE: u64 = 64 << 20;
        let server = memory_server(SIZE);
        for mode in MODES {
            let mut raw = Raw::go(&server, "disk", mode, &[]).await;
            let too_long = if mode == Mode::Simple { EINVAL } else { EOVERFLOW };
            let refused = [
                (Command::Read, NONE, SIZE - 1, 2, EINVAL),
                (Command::Read, NONE, u64::MAX, 2, EINVAL),
                (Command::Read, NONE, 0, 33 << 20, too_long),
                (Command::Read, CommandFlags::NO_HOLE, 0, 2, EINVAL),
                (Command::Read, CommandFlags::from_bits_retain(1 << 14), 0, 2, EINVAL),
                (Command::Trim, NONE, SIZE, 1, EINVAL),
                (Command::Cache, NONE, SIZE, 1, EINVAL),
                (Command::Cache, CommandFlags::DF, 0, 1, EINVAL),
                (Command::WriteZeroes, NONE, SIZE, 1, ENOSPC),
                (Command::WriteZeroes, CommandFlags::REQ_ONE, 0, 1, EINVAL),
                (Command::Flush, NONE, 1, 0, EINVAL),
                (Command::BlockStatus, NONE, 0, 512, EINVAL),
                (Command::Unknown(77), NONE, 0, 0, EINVAL),
            ];
            for (command, flags, offset, len, error) in refused {
                let found = raw.ask(command, flags, offset, len).await;
                assert_eq!(found, error, "{mode:?} {command:?} {flags:?} {offset} {len}");
            }
            // The payload of a refused write is skipped, also a large one.
            for (flags, offset, len, error) in [
                (NONE, SIZE - 1, 1000, ENOSPC),
                (CommandFlags::FAST_ZERO, 0, 1000, EINVAL),
                (NONE, 0, (32 << 20) + 1, EINVAL),
            ] {
                let cookie = raw.write(flags, offset, vec![7; len]).await;
                assert_eq!(raw.answer(cookie).await, error);
            }
            if mode == Mode::Extended {
                // A payload where none belongs.
                let (cookie, header) = raw.header(Command::Trim, CommandFlags::PAYLOAD_LEN, 0, 5);
                let mut wire = BytesMut::from(&header[..]);
                wire[5] |= CommandFlags::PAYLOAD_LEN.bits() as u8;
                wire.put_slice(b"12345");
                raw.send(wire.freeze()).await.unwrap();
                assert_eq!(raw.answer(cookie).await, EINVAL);
            }
            assert_eq!(raw.ask(Command::Read, CommandFlags::FUA, 0, 0).await, 0, "FUA goes with everything");
            let cookie = raw.request(Command::Read, NONE, 0, 512).await;
            let reply = raw.reply().await.unwrap();
            assert_eq!((reply.cookie, reply.bytes(0, 512)), (cookie, vec![0; 512]));
        }
    });
}

#[test]
fn a_read_only_export_refuses_every_change() {
    in_world(async || {
        let server = memory_server(1 << 20);
        for mode in MODES {
            let mut raw = Raw::go(&server, "ro", mode, &[]).await;
            for command in [Command::Trim, Command::WriteZeroes] {
                assert_eq!(raw.ask(command, NONE, 0, 512).await, EPERM);
            }
            let cookie = raw.write(NONE, 0, vec![7; 512]).await;
            assert_eq!(raw.answer(cookie).await, EPERM);
            assert_eq!(raw.ask(Command::Flush, NONE, 0, 0).await, 0);
        }
    });
}

#[test]
fn what_is_written_through_is_stable_when_it_is_answered() {
    in_world(async || {
        let disk = SimDisk::new(1 << 20);
        let node = RawNode::new(StorageHandle::new(disk.clone()), false);
        let exports = Exports::new();
        let export =
            Export { writable: true, writethrough: true, ..Export::new("disk", NodeHandle::new(node)) };
        exports.add(export).unwrap();
        let server = Server::new(exports, ServerLimits::default());
        let mut raw = Raw::go(&server, "disk", Mode::Simple, &[]).await;
        let is_stable = || disk.crash_point().pending.is_empty();
        let cookie = raw.write(NONE, 0, vec![7; 8192]).await;
        assert_eq!((raw.answer(cookie).await, is_stable()), (0, true));
        for command in [Command::WriteZeroes, Command::Trim] {
            assert_eq!(raw.ask(command, NONE, 4096, 4096).await, 0);
            assert!(is_stable(), "{command:?}");
        }
    });
}

#[test]
fn a_payload_that_nobody_can_skip_and_a_wrong_magic_end_the_connection() {
    in_world(async || {
        let server = memory_server(1 << 20);
        for mode in [Mode::Simple, Mode::Extended] {
            let mut raw = Raw::go(&server, "disk", mode, &[]).await;
            let most = if mode == Mode::Extended { u64::MAX } else { u32::MAX.into() };
            raw.request(Command::Write, NONE, 0, most).await;
            assert_eq!(raw.reply().await, None);
            let mut raw = Raw::go(&server, "disk", mode, &[]).await;
            raw.send(vec![0xaa; 64]).await.unwrap();
            assert_eq!(raw.reply().await, None);
        }
    });
}

#[test]
fn errors_of_the_disk_are_answered_by_their_numbers_and_the_connection_goes_on() {
    in_world(async || {
        let (disk, server) = disk_server(1 << 20, ServerLimits::default());
        let mut raw = Raw::go(&server, "disk", Mode::Structured, &[]).await;
        for (kind, error) in [
            (ErrorKind::Io, EIO),
            (ErrorKind::SourceLost, EIO),
            (ErrorKind::NoSpace, ENOSPC),
            (ErrorKind::TooLarge, ENOSPC),
            (ErrorKind::ShuttingDown, ESHUTDOWN),
            (ErrorKind::Unsupported, EINVAL),
        ] {
            disk.fail(DiskOp::Write, 0, 1, kind);
            let cookie = raw.write(NONE, 0, vec![1; 512]).await;
            assert_eq!(raw.answer(cookie).await, error, "{kind:?}");
        }
        disk.fail(DiskOp::WriteZeroes, 0, 1, ErrorKind::Unsupported);
        assert_eq!(raw.ask(Command::WriteZeroes, CommandFlags::FAST_ZERO, 0, 512).await, 95);
        disk.fail(DiskOp::Read, 0, 1, ErrorKind::Io);
        let cookie = raw.request(Command::Read, NONE, 0, 512).await;
        let reply = raw.reply().await.unwrap();
        assert_eq!((reply.cookie, reply.error), (cookie, EIO));
        assert!(matches!(&reply.chunks[..], [Chunk::Error { message, .. }] if !message.is_empty()));
        assert_eq!(raw.ask(Command::Read, NONE, 0, 512).await, 0);
    });
}

#[test]
fn a_slow_request_delays_no_other() {
    in_world(async || {
        let (disk, server) = disk_server(1 << 20, ServerLimits::default());
        let mut raw = Raw::go(&server, "disk", Mode::Simple, &[]).await;
        let held = disk.hold(DiskOp::Read);
        let slow = raw.request(Command::Read, NONE, 0, 512).await;
        let slow_too = raw.request(Command::Read, NONE, 512, 512).await;
        let cookie = raw.write(NONE, 4096, vec![1; 512]).await;
        assert_eq!(raw.answer(cookie).await, 0, "a write passes reads");
        assert_eq!(raw.ask(Command::Flush, NONE, 0, 0).await, 0);
        assert_eq!(disk.in_flight(DiskOp::Read), 2, "both at once");
        drop(held);
        let mut cookies = [raw.reply().await.unwrap().cookie, raw.reply().await.unwrap().cookie];
        cookies.sort();
        assert_eq!(cookies, [slow, slow_too]);
    });
}

#[test]
fn a_client_that_takes_no_answers_holds_no_more_than_its_share_and_stops_nobody_else() {
    in_world(async || {
        let limits = ServerLimits { bytes_in_flight_max: 1 << 20, ..ServerLimits::default() };
        let (disk, server) = disk_server(1 << 20, limits);
        let mut greedy = Raw::go(&server, "disk", Mode::Simple, &[]).await;
        let mut wire = BytesMut::new();
        for _ in 0..1000 {
            wire.put_slice(&greedy.header(Command::Read, NONE, 0, 64 << 10).1);
        }
        greedy.send(wire.freeze()).await.unwrap();
        let mut other = Raw::go(&server, "disk", Mode::Simple, &[]).await;
        for _ in 0..10 {
            assert_eq!(other.ask(Command::Read, NONE, 0, 512).await, 0);
        }
        rt::sleep(Duration::from_secs(3600)).await;
        // 1 MiB in flight, and one pipe full of answers.
        let reads = disk.total(DiskOp::Read) - 10;
        assert!(reads <= 17, "{reads} reads of 64 KiB were begun for a client that takes none");
        // It still gets all of them.
        for _ in 0..1000 {
            assert_eq!(greedy.reply().await.unwrap().error, 0);
        }
    });
}

#[test]
fn requests_of_one_connection_are_bounded_in_number() {
    in_world(async || {
        let limits = ServerLimits { requests_in_flight_max: 8, ..ServerLimits::default() };
        let (disk, server) = disk_server(1 << 20, limits);
        let held = disk.hold(DiskOp::Read);
        let mut raw = Raw::go(&server, "disk", Mode::Simple, &[]).await;
        for _ in 0..100 {
            raw.request(Command::Read, NONE, 0, 1).await;
        }
        rt::sleep(Duration::from_secs(1)).await;
        assert_eq!(disk.in_flight(DiskOp::Read), 8);
        drop(held);
        for _ in 0..100 {
            assert_eq!(raw.reply().await.unwrap().error, 0);
        }
        assert!(disk.in_flight_max(DiskOp::Read) <= 8);
    });
}

#[test]
fn large_requests_share_what_all_may_hold_and_small_ones_pass_them() {
    in_world(async || {
        let limits = ServerLimits { bytes_in_flight_total: 2 << 20, ..ServerLimits::default() };
        let (disk, server) = disk_server(8 << 20, limits);
        let held = disk.hold(DiskOp::Read);
        let mut large = Vec::new();
        for _ in 0..4 {
            let mut raw = Raw::go(&server, "disk", Mode::Simple, &[]).await;
            raw.request(Command::Read, NONE, 0, (1 << 20) - 2048).await;
            large.push(raw);
        }
        rt::sleep(Duration::from_secs(1)).await;
        assert_eq!(disk.in_flight(DiskOp::Read), 2, "the other two wait");
        let mut small = Raw::go(&server, "disk", Mode::Simple, &[]).await;
        let cookie = small.write(NONE, 0, vec![1; 4096]).await;
        assert_eq!(small.answer(cookie).await, 0);
        drop(held);
        for raw in &mut large {
            assert_eq!(raw.reply().await.unwrap().error, 0);
        }
    });
}

#[test]
fn a_handshake_that_takes_too_long_is_ended_also_a_slow_drip() {
    in_world(async || {
        let server = memory_server(1 << 20);
        let mut silent = Raw::hello(connect(&server)).await.unwrap();
        let mut dripping = connect(&server);
        let drip = rt::detached(async move {
            while dripping.writer.write_all(vec![0].into()).await.is_ok() {
                rt::sleep(Duration::from_secs(3)).await;
            }
        });
        let start = rt::now();
        assert_eq!(silent.option_replies().await, []);
        drip.await;
        assert!(rt::now() - start < Duration::from_secs(20));
        assert_eq!(server.connections(), 0);
    });
}

#[test]
fn options_are_bounded_and_a_list_repeated_earns_no_more() {
    in_world(async || {
        let server = memory_server(1 << 20);
        let mut raw = Raw::hello(connect(&server)).await.unwrap();
        let mut taken = 0;
        while !raw.option(&OptionRequest::List).await.is_empty() {
            taken += 1;
            assert!(taken < 1000, "no limit");
        }
        // 64, and 4 for each of the two exports.
        assert_eq!(taken, 72);
    });
}

#[test]
fn an_option_that_is_wrong_unknown_or_too_long_is_answered_and_the_next_is_understood() {
    in_world(async || {
        let server = memory_server(1 << 20);
        let mut raw = Raw::hello(connect(&server)).await.unwrap();
        let error = |replies: Vec<OptionReply>| match replies.as_slice() {
            [OptionReply::Error { error, message }] if !message.is_empty() => *error,
            other => panic!("{other:?}"),
        };
        assert_eq!(error(raw.option(&OptionRequest::Unknown(4711)).await), OptionError::Unsupported);
        assert_eq!(error(raw.option(&OptionRequest::StartTls).await), OptionError::Policy);
        for (option, data) in [(3, vec![1]), (7, vec![0, 0, 0, 200, 1, 2]), (6, vec![0, 0, 0, 1, 0, 0, 0])] {
            raw.send(wire_option(option, &data)).await.unwrap();
            assert_eq!(error(raw.option_replies().await), OptionError::Invalid);
        }
        raw.send(wire_option(99, &vec![0; 1 << 20])).await.unwrap();
        assert_eq!(error(raw.option_replies().await), OptionError::TooBig);
        let contexts = OptionRequest::MetaContext { set: true, export: "disk".into(), queries: vec![] };
        assert_eq!(error(raw.option(&contexts).await), OptionError::Invalid, "structured replies first");
        assert_eq!(raw.option(&OptionRequest::ExtendedHeaders).await, [OptionReply::Ack]);
        assert_eq!(error(raw.option(&OptionRequest::StructuredReply).await), OptionError::ExtendedHeaders);
        let go = OptionRequest::Info { go: true, name: "nothing".into(), wanted: vec![] };
        assert_eq!(error(raw.option(&go).await), OptionError::Unknown);
        assert_eq!(raw.option(&OptionRequest::Abort).await, [OptionReply::Ack]);
        assert_eq!(raw.option(&OptionRequest::List).await, []);

        // What cannot be answered ends the session.
        let mut raw = Raw::hello(connect(&server)).await.unwrap();
        raw.send(wire_option(99, &[])[..12].to_vec()).await.unwrap();
        raw.send(vec![0xff; 4]).await.unwrap();
        assert_eq!(raw.option_replies().await, [], "an option of 4 GiB");
        let mut raw = Raw::hello(connect(&server)).await.unwrap();
        assert_eq!(raw.option(&OptionRequest::ExportName("nothing".into())).await, []);
        let mut raw = Raw::hello(connect(&server)).await.unwrap();
        raw.send(vec![7; 16]).await.unwrap();
        assert_eq!(raw.option_replies().await, [], "not an option");
    });
}

fn wire_option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut out = BytesMut::new();
    out.put_slice(b"IHAVEOPT");
    out.put_u32(option);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
    out.to_vec()
}

#[test]
fn the_contexts_of_another_export_or_of_a_choice_taken_back_do_not_count() {
    in_world(async || {
        let server = memory_server(1 << 20);
        let choose = |export: &str| OptionRequest::MetaContext {
            set: true,
            export: export.into(),
            queries: vec!["base:allocation".into()],
        };
        for second in ["ro", "nothing"] {
            let mut raw = Raw::hello(connect(&server)).await.unwrap();
            raw.option(&OptionRequest::StructuredReply).await;
            assert_eq!(raw.option(&choose("disk")).await.len(), 2);
            raw.option(&choose(second)).await;
            raw.option(&OptionRequest::Info { go: true, name: "disk".into(), wanted: vec![] }).await;
            raw.mode = Mode::Structured;
            assert_eq!(raw.ask(Command::BlockStatus, NONE, 0, 4096).await, EINVAL);
        }
    });
}

#[test]
fn connections_are_bounded_and_one_that_ends_makes_room() {
    in_world(async || {
        let limits = ServerLimits { connections_max: 2, ..ServerLimits::default() };
        let (_, server) = disk_server(1 << 20, limits);
        let first = Raw::go(&server, "disk", Mode::Simple, &[]).await;
        let _second = Raw::go(&server, "disk", Mode::Simple, &[]).await;
        let mut third = connect(&server);
        assert!(third.reader.read(BytesMut::with_capacity(20)).await.unwrap().is_empty());
        assert_eq!((server.connections(), server.chosen()), (2, 2));
        drop(first);
        while server.connections() == 2 {
            rt::sleep(Duration::from_millis(1)).await;
        }
        Raw::go(&server, "disk", Mode::Simple, &[]).await;
    });
}

#[test]
fn a_client_that_vanishes_leaves_its_writes_done_and_its_reads_given_up() {
    in_world(async || {
        let (disk, server) = disk_server(1 << 20, ServerLimits::default());
        let (reads, writes) = (disk.hold(DiskOp::Read), disk.hold(DiskOp::Write));
        let mut raw = Raw::go(&server, "disk", Mode::Simple, &[]).await;
        raw.request(Command::Read, NONE, 0, 512).await;
        raw.write(NONE, 0, vec![7; 512]).await;
        while disk.in_flight(DiskOp::Write) == 0 {
            rt::sleep(Duration::from_millis(1)).await;
        }
        drop(raw);
        rt::sleep(Duration::from_secs(60)).await;
        let exports = server.exports();
        let in_use = exports.remove("disk", RemoveMode::Safe).err();
        assert!(matches!(in_use, Some(ExportError::InUse { connections: 1, .. })), "its write is not over");
        drop(writes);
        while server.connections() > 0 {
            rt::sleep(Duration::from_millis(1)).await;
        }
        drop(reads);
        assert_eq!(disk.media().sector(0), [7; 512]);
        exports.remove("disk", RemoveMode::Safe).unwrap().gone().await;
    });
}

#[test]
fn a_hard_removal_finishes_what_is_in_flight_refuses_what_comes_and_tells_when_it_is_gone() {
    in_world(async || {
        let (disk, server) = disk_server(1 << 20, ServerLimits::default());
        let told = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let names = told.clone();
        let exports = server.exports();
        exports.on_gone(move |export| names.lock().unwrap().push(export.name.clone()));
        let mut raw = Raw::go(&server, "disk", Mode::Simple, &[]).await;
        let held = disk.hold(DiskOp::Read);
        let cookie = raw.request(Command::Read, NONE, 0, 512).await;
        while disk.in_flight(DiskOp::Read) == 0 {
            rt::sleep(Duration::from_millis(1)).await;
        }
        let removal = exports.remove("disk", RemoveMode::Hard).unwrap();
        assert!(exports.get("disk").is_none());
        assert_eq!(raw.ask(Command::Flush, NONE, 0, 0).await, ESHUTDOWN);
        assert!(told.lock().unwrap().is_empty());
        drop(held);
        assert_eq!(raw.answer(cookie).await, 0);
        assert_eq!(raw.reply().await, None);
        removal.gone().await;
        assert_eq!(*told.lock().unwrap(), ["disk"]);
        assert_eq!(exports.list().len(), 1);

        // A read that never comes back does not keep it.
        let _held = disk.hold(DiskOp::Read);
        let mut raw = Raw::go(&server, "ro", Mode::Simple, &[]).await;
        raw.request(Command::Read, NONE, 0, 512).await;
        let before = rt::now();
        exports.remove("ro", RemoveMode::Hard).unwrap().gone().await;
        assert!(rt::now() - before < Duration::from_secs(10));
        assert_eq!(told.lock().unwrap().len(), 2);
    });
}

#[test]
fn an_idle_client_is_told_at_once_that_its_export_goes() {
    in_world(async || {
        let server = memory_server(1 << 20);
        let mut raw = Raw::go(&server, "disk", Mode::Simple, &[]).await;
        assert_eq!(raw.ask(Command::Flush, NONE, 0, 0).await, 0);
        let before = rt::now();
        let removals = server.exports().remove_all();
        assert_eq!((removals.len(), raw.reply().await), (2, None));
        assert!(rt::now() - before < Duration::from_millis(1));
    });
}

#[test]
fn the_registry_refuses_duplicates_and_what_no_client_could_use() {
    let node = NodeHandle::new(MemoryOverlay::new(1 << 20, 4096, None));
    let exports = Exports::new();
    exports.add(Export::new("b", node.clone())).unwrap();
    exports.add(Export::new("a", node.clone())).unwrap();
    assert_eq!(exports.add(Export::new("b", node.clone())), Err(ExportError::Duplicate("b".into())));
    assert!(matches!(exports.add(Export::new("n".repeat(4097), node.clone())), Err(ExportError::Refused(_))));
    let sealed = RawNode::new(StorageHandle::new(SimDisk::new(512)), true);
    let writable = Export { writable: true, ..Export::new("c", NodeHandle::new(sealed)) };
    assert!(matches!(exports.add(writable), Err(ExportError::Refused(_))));
    assert_eq!(exports.remove("x", RemoveMode::Safe).err(), Some(ExportError::NotFound("x".into())));
    let names: Vec<String> = exports.list().into_iter().map(|status| status.export.name).collect();
    assert_eq!(names, ["a", "b"]);
}

#[test]
fn block_status_of_a_large_disk_comes_in_64_bits_and_in_bounded_answers() {
    in_world(async || {
        const GIB: u64 = 1 << 30;
        let node = NodeHandle::new(MemoryOverlay::new(20 * GIB, 1 << 20, None));
        node.write(&Ctx::GUEST, 6 * GIB, vec![1; 1 << 20], Default::default()).await.unwrap();
        let server = server_with(node, ServerLimits::default());
        let contexts = ["base:allocation", "qemu:allocation-depth"];
        let mut raw = Raw::go(&server, "disk", Mode::Extended, &contexts).await;
        let cookie = raw.request(Command::BlockStatus, NONE, 0, 20 * GIB).await;
        let reply = raw.reply().await.unwrap();
        let (hole, data) = (|len| StatusExtent { len, flags: 3 }, StatusExtent { len: 1 << 20, flags: 0 });
        let expected = vec![hole(6 * GIB), data, hole(14 * GIB - (1 << 20))];
        let depths: Vec<u64> = match &reply.chunks[1] {
            Chunk::Status { context: 1, extents } => extents.iter().map(|extent| extent.flags).collect(),
            other => panic!("{other:?}"),
        };
        assert_eq!((reply.cookie, depths), (cookie, vec![0, 1, 0]));
        assert_eq!(reply.chunks[0], Chunk::Status { context: 0, extents: expected });

        // Every other cluster is data: more runs than one answer takes.
        let node = NodeHandle::new(MemoryOverlay::new(512 << 20, 512, None));
        for at in (0..100 << 20).step_by(1024) {
            node.write(&Ctx::GUEST, at, vec![1; 512], Default::default()).await.unwrap();
        }
        let server = server_with(node, ServerLimits::default());
        let mut raw = Raw::go(&server, "disk", Mode::Extended, &["base:allocation"]).await;
        raw.request(Command::BlockStatus, NONE, 0, 512 << 20).await;
        let reply = raw.reply().await.unwrap();
        let Chunk::Status { extents, .. } = &reply.chunks[0] else { panic!("{reply:?}") };
        assert_eq!(extents.len(), 64 << 10);
    });
}

#[test]
fn a_cache_request_populates_the_overlay_that_keeps_what_is_read() {
    in_world(async || {
        let base = NodeHandle::new(MemoryOverlay::new(4 << 20, 4096, None));
        base.write(&Ctx::GUEST, 0, vec![7; 4 << 20], Default::default()).await.unwrap();
        let top = NodeHandle::new(MemoryOverlay::new(4 << 20, 4096, Some(base)));
        let keeps = CopyOnRead::new(&top, 64 << 20);
        top.backing().unwrap().set_copy_on_read(Some(keeps.clone()));
        let server = server_with(top.clone(), ServerLimits::default());
        let mut raw = Raw::go(&server, "disk", Mode::Simple, &[]).await;
        assert_eq!(raw.ask(Command::Cache, NONE, 1 << 20, 2 << 20).await, 0);
        keeps.settle().await;
        let found = top.extents(&Ctx::GUEST, 0, 4 << 20).await.unwrap();
        let runs: Vec<_> = found.iter().map(|extent| (extent.len, extent.kind)).collect();
        use infill_base::ExtentKind::{Absent, Data};
        assert_eq!(runs, [(1 << 20, Absent), (2 << 20, Data), (1 << 20, Absent)]);
    });
}

#[test]
fn data_comes_back_as_written_through_a_torn_connection_in_every_mode() {
    for seed in 0..12 {
        let world = World::new(seed);
        let mut rng = world.fork_rng();
        world.run(async {
            const SIZE: u64 = 3 << 20;
            let server = memory_server(SIZE);
            let mode = MODES[seed as usize % 3];
            let ends = torn_pipe(100 << 10, rng.fork());
            let mut raw = Raw::go_over(connect_over(&server, ends), "disk", mode, &[]).await;
            let mut model = vec![0; SIZE as usize];
            for _ in 0..60 {
                let at = rng.below(SIZE - 1);
                let len = rng.range(1, (SIZE - at).min(400 << 10) + 1);
                let range = at as usize..(at + len) as usize;
                match rng.below(4) {
                    0 => {
                        assert_eq!(raw.ask(Command::WriteZeroes, NONE, at, len).await, 0);
                        model[range].fill(0);
                    }
                    1 => {
                        let cookie = raw.request(Command::Read, NONE, at, len).await;
                        let reply = raw.reply().await.unwrap();
                        let base = if mode == Mode::Simple { 0 } else { at };
                        assert_eq!(reply.cookie, cookie);
                        assert!(reply.bytes(base, len as usize) == model[range], "seed {seed}: read at {at}");
                    }
                    _ => {
                        let mut data = vec![0; len as usize];
                        rng.fill(&mut data);
                        model[range].copy_from_slice(&data);
                        let cookie = raw.write(NONE, at, data).await;
                        assert_eq!(raw.answer(cookie).await, 0);
                    }
                }
            }
        });
    }
}

#[test]
fn hostile_bytes_end_every_session_and_leave_the_server_whole() {
    for seed in 0..400 {
        let world = World::new(seed);
        let mut rng: Rng = world.fork_rng();
        world.run(async {
            let server = memory_server(1 << 20);
            let mode = MODES[seed as usize % 3];
            let mut raw = match seed % 4 {
                0 => Raw::hello(connect(&server)).await.unwrap(),
                _ => Raw::go(&server, "disk", mode, &["base:allocation"]).await,
            };
            for _ in 0..rng.range(1, 20) {
                let mut bytes = vec![0; rng.range(1, 100) as usize];
                rng.fill(&mut bytes);
                if rng.per_mille(700) {
                    // Begins as a request does, so that what follows is looked at.
                    let (_, header) = raw.header(Command::Read, NONE, rng.next_u64(), rng.below(1 << 32));
                    let mut header = header.to_vec();
                    let broken = 4 + rng.index(header.len() - 4);
                    header[broken] = bytes[0];
                    bytes.splice(0..0, header);
                }
                if raw.send(bytes).await.is_err() {
                    break;
                }
            }
            drop(raw);
            // Nothing of it stays, and others are served.
            while server.connections() > 0 {
                rt::sleep(Duration::from_secs(1)).await;
            }
            let mut raw = Raw::go(&server, "disk", mode, &[]).await;
            assert_eq!(raw.ask(Command::Flush, NONE, 0, 0).await, 0);
        });
    }
}
