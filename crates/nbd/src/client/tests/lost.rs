//! The server goes, stalls, comes back as another one.

use futures_util::FutureExt;
use futures_util::future::{join_all, select};
use infill_base::Class;
use infill_sim::{Rng, World, block_on};
use infill_storage::rt;

use super::*;
use crate::proto::Command;

const SIZE: u64 = 1 << 17;

fn read_only(on_lost: OnLost) -> ClientOptions {
    ClientOptions { on_lost, ..ClientOptions::default() }
}

#[test]
fn a_connection_cut_after_any_byte_costs_no_answer() {
    // From the first byte of the greeting to the last of the last answer.
    for cut in 1..1400 {
        let world = World::new(cut as u64);
        world.run(async {
            let config = Config { size: 4096, ..Config::default() };
            let server = Server::new(1, config);
            let options = ClientOptions { connections_max: 1, ..ClientOptions::default() };
            let storage = open(&server, options).await;
            // The first connection goes; the second is cut; the third is whole.
            server.set(|state| state.config.cuts.push(cut));
            server.kill();
            let (one, two) = (read(&storage, 100, 500).await, read(&storage, 1500, 500).await);
            let state = server.state();
            assert!(
                one.unwrap() == state.live[100..600] && two.unwrap() == state.live[1500..2000],
                "cut {cut}"
            );
            assert!(state.connections <= 3, "{} connections for one cut", state.connections);
        });
    }
}

#[test]
fn requests_are_held_while_the_server_is_away_and_go_on_within_a_second() {
    let world = World::new(1);
    world.run(async {
        let server = Server::new(1, Config::default());
        let storage = open(&server, ClientOptions::default()).await;
        let mut watch = storage.watch();
        server.set(|state| state.config.away = true);
        server.kill();
        assert!(matches!(watch.next().await, Some(SourceState::Lost(_))));
        assert!(!storage.is_connected());
        let mut held = Box::pin(read(&storage, 0, 4096));
        rt::timeout(Duration::from_secs(3600), &mut held).await.ok_or(()).unwrap_err();
        server.set(|state| state.config.away = false);
        let back = rt::now();
        assert!(held.await.unwrap() == server.state().live[..4096]);
        assert!(rt::now() - back < Duration::from_secs(1));
        assert!(matches!(watch.next().await, Some(SourceState::Connected)));
        assert!(storage.is_connected());
        assert_eq!(storage.source_changes(), 2);
        drop(storage);
        assert!(watch.next().await.is_none());
    });
}

#[test]
fn an_export_whose_server_is_not_there_yet_is_awaited() {
    let world = World::new(1);
    world.run(async {
        let server = Server::new(1, Config { away: true, size: SIZE, ..Config::default() });
        let await_it =
            |bytes| NbdStorage::await_export(Arc::new(server.clone()), ClientOptions::default(), bytes);
        let (storage, other) = (await_it(SIZE), await_it(2 * SIZE));
        let mut watch = storage.watch();
        assert!(storage.len() == SIZE && !storage.is_connected() && !storage.limits().writable);
        let mut held = Box::pin(read(&storage, 0, SIZE as usize));
        let mut zero = Box::pin(storage.extents(&Ctx::GUEST, SIZE / 4, SIZE / 4));
        let both = async { futures_util::future::join(&mut held, &mut zero).await };
        rt::timeout(Duration::from_secs(3600), both).await.ok_or(()).map(drop).unwrap_err();
        assert!(matches!(watch.next().await, Some(SourceState::Lost(_))));
        server.set(|state| state.config.away = false);
        assert!(held.await.unwrap() == server.state().live);
        // What it learned of the server counts from then on.
        assert_eq!(zero.await.unwrap()[0].kind, ExtentKind::Zero);
        assert!(matches!(watch.next().await, Some(SourceState::Connected)));
        // Where the export has another size, it is another export.
        let mut never = Box::pin(read(&other, 0, 512));
        rt::timeout(Duration::from_secs(60), &mut never).await.ok_or(()).unwrap_err();
        assert!(!other.is_connected());
    });
}

#[test]
fn a_link_that_swallows_everything_is_not_waited_for_once_it_is_back() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let options = ClientOptions { connections_max: 1, ..ClientOptions::default() };
        let storage = open(&server, options).await;
        // Whoever connects now is never answered.
        server.set(|state| state.config.shared = 0);
        server.kill();
        let mut held = Box::pin(read(&storage, 0, 512));
        rt::timeout(Duration::from_secs(60), &mut held).await.ok_or(()).unwrap_err();
        let swallowed = server.state().connections;
        server.set(|state| {
            state.config.shared = usize::MAX;
        });
        let back = rt::now();
        held.await.unwrap();
        assert!(rt::now() - back < Duration::from_secs(1), "after {:?}", rt::now() - back);
        assert!(swallowed < 200, "{swallowed} attempts in a minute");
    });
}

#[test]
fn a_deadline_is_kept_while_requests_are_held() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let storage = open(&server, writable()).await;
        server.set(|state| state.config.away = true);
        server.kill();
        let cx = Ctx { class: Class::Guest, deadline: Some(rt::now() + Duration::from_secs(5)) };
        let error = storage.read(&cx, 0, BytesMut::zeroed(512)).await.unwrap_err();
        assert_eq!((error.kind(), rt::now()), (ErrorKind::TimedOut, cx.deadline.unwrap()));
        let error = storage.write(&cx, 0, vec![0; 512].into(), WriteFlags::empty()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        server.set(|state| state.config.away = false);
        write(&storage, 0, vec![7; 512]).await.unwrap();
        storage.sync(&Ctx::GUEST).await.unwrap();
        assert!(server.state().stable[..512] == [7; 512]);
    });
}

#[test]
fn requests_fail_at_once_where_they_are_not_to_be_held() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let storage = open(&server, read_only(OnLost::Fail)).await;
        server.set(|state| state.held.push(Command::Read));
        let mut sent = Box::pin(read(&storage, 0, 512));
        assert!((&mut sent).now_or_never().is_none());
        server.until(|state| state.seen.len() == 1).await;
        server.set(|state| state.config.away = true);
        server.kill();
        assert_eq!(sent.await.unwrap_err().kind(), ErrorKind::SourceLost);
        let before = rt::now();
        assert_eq!(read(&storage, 0, 512).await.unwrap_err().kind(), ErrorKind::SourceLost);
        assert_eq!(rt::now(), before);
        let mut watch = storage.watch();
        server.set(|state| {
            state.config.away = false;
            state.held.clear();
        });
        assert!(matches!(watch.next().await, Some(SourceState::Connected)));
        read(&storage, 0, 512).await.unwrap();
    });
}

#[test]
fn requests_are_held_for_as_long_as_was_said() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let limit = Duration::from_secs(20);
        let storage = open(&server, read_only(OnLost::Hold { limit: Some(limit) })).await;
        server.set(|state| state.config.away = true);
        server.kill();
        let lost = rt::now();
        let error = read(&storage, 0, 512).await.unwrap_err();
        assert_eq!((error.kind(), rt::now() - lost), (ErrorKind::SourceLost, limit));
        assert!(read(&storage, 0, 512).await.is_err(), "not held again before it is back");
        server.set(|state| state.config.away = false);
        storage.watch().next().await;
        read(&storage, 0, 512).await.unwrap();
    });
}

#[test]
fn a_source_that_has_changed_is_never_used() {
    block_on(async {
        for change in [
            (|config| config.size *= 2) as fn(&mut Config),
            |config| config.blocks = Some((4096, 4096, 32 << 20)),
            |config| config.description = Some("another disk".into()),
            |config| config.allocation = false,
        ] {
            let config = Config { description: Some("the disk".into()), ..Config::default() };
            let server = Server::new(1, config.clone());
            let storage = open(&server, ClientOptions::default()).await;
            server.set(|state| change(&mut state.config));
            let before = server.state().connections;
            server.kill();
            let mut held = Box::pin(read(&storage, 0, 4096));
            rt::timeout(Duration::from_secs(60), &mut held).await.ok_or(()).unwrap_err();
            assert!(server.state().seen.iter().all(|seen| seen.connection < before));
            assert!(!storage.is_connected());
            // The right one is back.
            server.set(|state| state.config = config);
            held.await.unwrap();
        }
    });
}

#[test]
fn a_server_that_says_nothing_is_left_and_one_that_is_only_slow_is_not() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let stall = Duration::from_secs(10);
        let options = ClientOptions { stall: Some(stall), connections_max: 1, ..ClientOptions::default() };
        let storage = open(&server, options).await;
        rt::sleep(Duration::from_secs(100)).await;
        assert_eq!(server.state().connections, 1, "an idle server need not say anything");
        server.set(|state| state.held.push(Command::Read));
        let mut sent = Box::pin(read(&storage, 0, 512));
        assert!((&mut sent).now_or_never().is_none());
        // It answers others meanwhile: it lives.
        for _ in 0..10 {
            rt::sleep(stall / 2).await;
            storage.extents(&Ctx::GUEST, 0, 512).await.unwrap();
        }
        assert_eq!(server.state().connections, 1);
        let silent = rt::now();
        server.until(|state| state.connections == 2).await;
        assert_eq!(rt::now() - silent, stall);
        server.set(|state| state.held.clear());
        sent.await.unwrap();
    });
}

#[test]
fn a_server_that_shuts_down_fails_nothing() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let storage = open(&server, ClientOptions::default()).await;
        server.set(|state| state.failures.push((Command::Read, 1, server::ESHUTDOWN)));
        read(&storage, 0, 512).await.unwrap();
        assert!(server.state().connections >= 2);
    });
}

#[test]
fn dropped_requests_leave_nothing_behind() {
    for seed in 0..60 {
        let world = World::new(seed);
        let mut rng = Rng::new(seed);
        let server =
            Server::new(seed, Config { size: SIZE, latency: Duration::from_millis(5), ..Config::default() });
        let storage = world.run(open(&server, writable()));
        world.run(async {
            for _ in 0..4 {
                let requests = (0..40).map(|_| {
                    let (at, patience) = (rng.below(SIZE - 8192), Duration::from_micros(rng.below(6000)));
                    let class = [Class::Guest, Class::Fill][rng.index(2)];
                    let (storage, what) = (storage.clone(), rng.below(4));
                    async move {
                        let cx = Ctx::of(class);
                        let request = async {
                            match what {
                                0 => drop(storage.read(&cx, at, BytesMut::zeroed(8192)).await),
                                1 => drop(
                                    storage.write(&cx, at, vec![1; 8192].into(), WriteFlags::empty()).await,
                                ),
                                2 => drop(storage.extents(&cx, at, 8192).await),
                                _ => drop(storage.sync(&cx).await),
                            }
                        };
                        rt::timeout(patience, request).await;
                    }
                });
                let requests: Vec<_> = requests.collect();
                let kill = async {
                    rt::sleep(Duration::from_millis(2)).await;
                    server.kill();
                };
                select(Box::pin(join_all(requests)), Box::pin(kill)).await;
            }
            storage.sync(&Ctx::GUEST).await.unwrap();
            read(&storage, 0, SIZE as usize).await.unwrap();
            // What was dropped after it was sent may still be on its way.
            rt::sleep(Duration::from_secs(1)).await;
        });
        let state = storage.0.shared.state();
        assert_eq!(state.left_over(), (0, 0), "seed {seed}: queued requests, reserved bytes");
    }
}

#[test]
fn a_request_that_was_dropped_before_it_was_sent_never_reaches_the_server() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let storage = open(&server, writable()).await;
        server.set(|state| state.config.away = true);
        server.kill();
        storage.watch().next().await;
        for request in [
            write(&storage, 0, vec![1; 512]).boxed_local(),
            async { read(&storage, 512, 512).await.map(|_| ()) }.boxed_local(),
        ] {
            assert!(rt::timeout(Duration::from_secs(1), request).await.is_none());
        }
        server.set(|state| state.config.away = false);
        read(&storage, 1024, 512).await.unwrap();
        let seen: Vec<_> = server.state().seen.iter().map(|seen| (seen.command, seen.offset)).collect();
        assert_eq!(seen, [(Command::Read, 1024)]);
    });
}
