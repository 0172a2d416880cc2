//! Who goes first, and over which connection.

use futures_util::FutureExt;
use futures_util::future::{LocalBoxFuture, join_all};
use infill_base::Class;
use infill_sim::{World, block_on};
use infill_storage::rt;

use super::*;
use crate::proto::{Command, TransmissionFlags};

/// More than is ever in flight.
const MANY: u64 = 600;

fn request(storage: &NbdStorage, class: Class, at: u64) -> LocalBoxFuture<'static, ()> {
    let storage = storage.clone();
    let read = async move { storage.read(&Ctx::of(class), at, BytesMut::zeroed(512)).await };
    read.map(|result| drop(result.unwrap())).boxed_local()
}

#[test]
fn what_is_queued_goes_by_class_and_in_a_class_by_age() {
    for seed in 0..10 {
        World::new(seed).run(async {
            let server = Server::new(1, Config::default());
            let options = ClientOptions { connections_max: 1, ..ClientOptions::default() };
            let storage = open(&server, options).await;
            server.set(|state| state.held.push(Command::Read));
            let mut all = Vec::new();
            let mut begin = |class, place: u64| {
                let mut request = request(&storage, class, place * 512);
                assert!((&mut request).now_or_never().is_none());
                all.push(request);
            };
            (0..MANY).for_each(|place| begin(Class::Fill, place));
            let full = 256;
            server.until(|state| state.seen.len() == full).await;
            // The window is full for everybody but guests.
            for place in 0..10 {
                begin(Class::AroundMiss, 1000 + place);
                begin(Class::Prefetch, 1100 + place);
            }
            rt::sleep(Duration::from_secs(1)).await;
            assert_eq!(server.state().seen.len(), full);
            (0..100).for_each(|place| begin(Class::Guest, 1200 + place));
            server.until(|state| state.seen.len() == full + 64).await;
            rt::sleep(Duration::from_secs(1)).await;
            assert_eq!(server.state().seen.len(), full + 64, "what is in flight is bounded for guests too");
            server.set(|state| state.held.clear());
            join_all(all).await;
            let seen: Vec<u64> = server.state().seen.iter().map(|seen| seen.offset / 512).collect();
            let expected = (0..full as u64)
                .chain(1200..1300)
                .chain(1100..1110)
                .chain(1000..1010)
                .chain(full as u64..MANY);
            assert!(seen.iter().copied().eq(expected), "seed {seed}: {seen:?}");
        });
    }
}

#[test]
fn guests_have_their_own_connection_where_the_server_allows_it() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let storage = open(&server, ClientOptions::default()).await;
        server.until(|state| state.alive == 2).await;
        // Its handshake is over when the first guest's request travels on it.
        loop {
            request(&storage, Class::Guest, 0).await;
            if server.state().seen.last().unwrap().connection == 1 {
                break;
            }
        }
        server.set(|state| state.seen.clear());
        let fills = (0..20).map(|place| request(&storage, Class::Fill, place * 512));
        let guests = (0..20).map(|place| request(&storage, Class::Guest, (100 + place) * 512));
        join_all(fills.chain(guests)).await;
        for seen in &server.state().seen {
            assert_eq!(seen.connection, usize::from(seen.offset >= 51200), "{seen:?}");
        }
    });
}

#[test]
fn a_second_connection_that_is_lost_is_made_again_and_no_request_with_it() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let storage = open(&server, ClientOptions::default()).await;
        server.set(|state| state.config.cuts = vec![1000; 100]);
        for _ in 0..50 {
            assert!(read(&storage, 4096, 512).await.unwrap() == server.state().live[4096..4608]);
            rt::sleep(Duration::from_secs(7)).await;
        }
        let state = server.state();
        assert!(state.connections > 5, "{}", state.connections);
        assert!(storage.is_connected() && storage.source_changes() == 0);
        assert_eq!(state.seen.len() + 1, 50 + state.connections - 1, "each cut cost one request sent again");
    });
}

#[test]
fn no_second_connection_is_opened_where_it_is_not_allowed() {
    block_on(async {
        let flags = Config::default().flags.difference(TransmissionFlags::CAN_MULTI_CONN);
        let without = Config { flags, ..Config::default() };
        let one = ClientOptions { connections_max: 1, ..ClientOptions::default() };
        for (config, options) in [
            (without, ClientOptions::default()),
            (Config::default(), one),
            // It could read what is still to be replayed.
            (Config::default(), writable()),
        ] {
            let server = Server::new(1, config);
            let storage = open(&server, options).await;
            for _ in 0..10 {
                read(&storage, 0, 512).await.unwrap();
                rt::sleep(Duration::from_secs(10)).await;
            }
            assert_eq!(server.state().connections, 1);
        }
    });
}

#[test]
fn a_second_connection_that_is_never_answered_costs_nothing() {
    let time = |shared| {
        let world = World::new(1);
        world.run(async {
            let latency = Duration::from_millis(20);
            let server = Server::new(1, Config { shared, latency, ..Config::default() });
            let storage =
                open(&server, ClientOptions { connections_max: 1 + shared % 2, ..ClientOptions::default() })
                    .await;
            let began = rt::now();
            for _ in 0..200 {
                join_all([request(&storage, Class::Guest, 0), request(&storage, Class::Fill, 512)]).await;
            }
            let state = server.state();
            (rt::now() - began, state.connections, state.seen.len())
        })
    };
    // The same server with and without a second attempt: one connection is answered at a time.
    let (with, without) = (time(1), time(2));
    assert_eq!((with.1, without.1), (2, 1), "it is tried once");
    assert_eq!((with.2, without.2), (400, 400), "no request is sent twice");
    assert!(with.0 < without.0 * 11 / 10, "{:?} against {:?}", with.0, without.0);
}
