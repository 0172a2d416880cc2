//! What is agreed on, and what then travels.

use infill_base::{Extent, Gather};
use infill_sim::{World, block_on};

use super::*;
use crate::proto::{Command, Mode, TransmissionFlags};

/// Everything that a server of `config` can be asked gives what it holds.
async fn works(seed: u64, config: Config) {
    let size = config.size;
    let tells_zero = config.allocation && config.mode != Mode::Simple && config.fixed;
    let server = Server::new(seed, config);
    let storage = open(&server, writable()).await;
    let all = read(&storage, 0, size as usize).await.unwrap();
    assert!(all == server.state().live, "what was read is not what the server holds");
    let extents = storage.extents(&Ctx::GUEST, 0, size).await.unwrap();
    assert_eq!((extents[0].start, extents.last().unwrap().end()), (0, size));
    for Extent { start, len, kind, .. } in &extents {
        let zero = all[*start as usize..(start + len) as usize].iter().all(|byte| *byte == 0);
        assert_eq!(*kind == ExtentKind::Zero, zero && tells_zero, "{start} {len}");
    }
    assert_eq!(extents.iter().any(|extent| extent.kind == ExtentKind::Zero), tells_zero);

    let mut data = Gather::new();
    data.push(Bytes::from(vec![1; 1000]));
    data.push(Bytes::from(vec![2; 3096]));
    storage.write(&Ctx::GUEST, 4096, data, WriteFlags::empty()).await.unwrap();
    storage.write_zeroes(&Ctx::GUEST, 8192, 4096, ZeroFlags::MAY_UNMAP).await.unwrap();
    storage.discard(&Ctx::GUEST, 16384, 4096).await.unwrap();
    storage.sync(&Ctx::GUEST).await.unwrap();
    let state = server.state();
    assert!(state.stable == state.live);
    assert!(state.live[4096..5096] == [1; 1000] && state.live[5096..8192] == [2; 3096]);
    assert!(state.live[8192..12288] == [0; 4096] && state.live[16384..20480] == [0; 4096]);
}

#[test]
fn every_server_that_the_protocol_allows_is_understood() {
    for seed in 0..4 {
        for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
            for (allocation, go, torn) in [(true, true, false), (false, true, true), (true, false, true)] {
                let blocks = if go { Some((512, 4096, 65536)) } else { None };
                let latency = Duration::from_millis(seed % 2 * 20);
                let config = Config {
                    mode,
                    allocation,
                    go,
                    blocks,
                    torn,
                    latency,
                    pieces: seed > 1 && mode != Mode::Simple,
                    ..Config::default()
                };
                World::new(seed).run(works(seed, config));
            }
        }
        let config = Config { fixed: false, mode: Mode::Simple, ..Config::default() };
        World::new(seed).run(works(seed, config));
    }
}

#[test]
fn requests_are_split_and_aligned_as_the_server_wants() {
    block_on(async {
        let config = Config { blocks: Some((512, 4096, 10_000)), ..Config::default() };
        let server = Server::new(1, config);
        let storage = open(&server, writable()).await;
        let limits = storage.limits();
        assert_eq!((limits.request_align, limits.preferred_bytes), (512, 4096));
        read(&storage, 0, 65536).await.unwrap();
        write(&storage, 512, vec![3; 65536]).await.unwrap();
        storage.write_zeroes(&Ctx::GUEST, 0, 1 << 20, ZeroFlags::empty()).await.unwrap();
        for seen in &server.state().seen {
            assert!(seen.len <= 9728 || seen.command == Command::WriteZeroes, "{seen:?}");
            assert!(seen.offset % 512 == 0 && seen.len % 512 == 0, "{seen:?}");
        }
        for (at, len) in [(1, 512), (0, 511), (0, (1 << 20) + 512), (1 << 20, 512), (u64::MAX - 511, 512)] {
            let error = read(&storage, at, len).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        }
        let error = write(&storage, 1 << 20, vec![0; 512]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    });
}

#[test]
fn nothing_is_written_through_a_read_only_storage() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let storage = open(&server, ClientOptions::default()).await;
        assert!(!storage.limits().writable);
        assert_eq!(write(&storage, 0, vec![1]).await.unwrap_err().kind(), ErrorKind::NotPermitted);
        let zeroes = storage.write_zeroes(&Ctx::GUEST, 0, 1, ZeroFlags::empty()).await;
        assert_eq!(zeroes.unwrap_err().kind(), ErrorKind::NotPermitted);
        assert_eq!(storage.discard(&Ctx::GUEST, 0, 1).await.unwrap_err().kind(), ErrorKind::NotPermitted);
        storage.sync(&Ctx::GUEST).await.unwrap();
        assert_eq!(server.state().seen, []);
    });
}

#[test]
fn a_server_that_cannot_promise_stability_is_not_written_to() {
    block_on(async {
        for (remove, add) in [
            (TransmissionFlags::SEND_FLUSH, TransmissionFlags::empty()),
            (TransmissionFlags::empty(), TransmissionFlags::READ_ONLY),
        ] {
            let flags = Config::default().flags.difference(remove) | add;
            let server = Server::new(1, Config { flags, ..Config::default() });
            let refused = NbdStorage::connect(Arc::new(server.clone()), writable()).await;
            assert!(matches!(refused, Err(infill_base::OpenError::Refused { .. })));
            open(&server, ClientOptions::default()).await;
        }
    });
}

#[test]
fn what_a_server_lacks_is_done_without() {
    block_on(async {
        use TransmissionFlags as F;
        let flags = F::HAS_FLAGS | F::SEND_FLUSH;
        let server = Server::new(1, Config { flags, ..Config::default() });
        let storage = open(&server, writable()).await;
        assert!(!storage.limits().fast_zero && !storage.limits().discard);
        storage.write(&Ctx::GUEST, 0, vec![9; 512].into(), WriteFlags::FUA).await.unwrap();
        assert!(server.state().stable[..512] == [9; 512], "FUA without the flag is a flush");
        let fast = storage.write_zeroes(&Ctx::GUEST, 0, 512, ZeroFlags::NO_FALLBACK).await;
        assert_eq!(fast.unwrap_err().kind(), ErrorKind::Unsupported);
        storage.write_zeroes(&Ctx::GUEST, 100, 10_000, ZeroFlags::FUA).await.unwrap();
        assert!(server.state().stable[100..10_100] == [0; 10_000]);
        storage.discard(&Ctx::GUEST, 0, 512).await.unwrap();
        let state = server.state();
        assert!(state.live[..100] == [9; 100]);
        assert!(
            state
                .seen
                .iter()
                .all(|seen| matches!(seen.command, Command::Write | Command::Flush) && !seen.fua)
        );
    });
}

#[test]
fn zeroes_that_are_too_many_for_the_server_go_in_smaller_parts() {
    block_on(async {
        let server = Server::new(1, Config { blocks: Some((512, 4096, 65536)), ..Config::default() });
        let storage = open(&server, writable()).await;
        server.set(|state| state.failures.push((Command::WriteZeroes, 1, 75)));
        storage.write_zeroes(&Ctx::GUEST, 0, 1 << 20, ZeroFlags::empty()).await.unwrap();
        assert_eq!(server.count(Command::WriteZeroes), 1 + 16);
        assert!(server.state().live.iter().all(|byte| *byte == 0));
    });
}

#[test]
fn an_error_of_the_server_fails_its_request_and_no_other() {
    block_on(async {
        for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
            let server = Server::new(1, Config { mode, ..Config::default() });
            let storage = open(&server, writable()).await;
            server.set(|state| {
                state.failures = vec![
                    (Command::Read, 1, server::EIO),
                    (Command::Write, 1, server::ENOSPC),
                    (Command::BlockStatus, 1, 22),
                ];
            });
            let error = read(&storage, 512, 512).await.unwrap_err();
            assert_eq!((error.kind(), error.range()), (ErrorKind::Io, Some((512, 512))));
            assert_eq!(write(&storage, 0, vec![1]).await.unwrap_err().kind(), ErrorKind::NoSpace);
            let extents = storage.extents(&Ctx::GUEST, 0, 1 << 20).await.unwrap();
            assert!(mode == Mode::Simple || extents.len() == 1 && extents[0].kind == ExtentKind::Data);
            read(&storage, 512, 512).await.unwrap();
            write(&storage, 0, vec![1]).await.unwrap();
            assert_eq!(server.state().connections, 1);
        }
    });
}

#[test]
fn an_export_that_is_not_there_is_an_error_at_once() {
    block_on(async {
        let server = Server::new(1, Config { away: true, ..Config::default() });
        let error = NbdStorage::connect(Arc::new(server.clone()), writable()).await.unwrap_err();
        assert!(error.to_string().contains("nobody is there"), "{error}");
        server.set(|state| state.config = Config { shared: 0, ..Config::default() });
        let error = NbdStorage::connect(Arc::new(server.clone()), writable()).await.unwrap_err();
        assert!(error.to_string().contains("within 10s"), "{error}");
    });
}

#[test]
fn a_closed_storage_says_goodbye_and_leaves_no_task() {
    let world = World::new(1);
    world.run(async {
        let server = Server::new(1, Config::default());
        let storage = open(&server, ClientOptions::default()).await;
        read(&storage, 0, 10).await.unwrap();
        server.until(|state| state.alive == 2).await;
        drop(storage);
        server.until(|state| state.alive == 0).await;
        assert!(server.count(Command::Disconnect) >= 1);
    });
    world.run_until_idle();
    assert_eq!(world.tasks_alive(), 0);
}
