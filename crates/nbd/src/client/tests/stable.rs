//! A server that forgets at a kill what was not flushed: nothing that a sync has answered for is missing.

use std::cell::{Cell, RefCell};

use futures_util::FutureExt;
use futures_util::future::{join, join_all};
use infill_base::Class;
use infill_sim::{Rng, World, block_on};
use infill_storage::rt;

use super::*;
use crate::proto::Command;

const SIZE: u64 = 1 << 18;

#[test]
fn what_was_acknowledged_and_not_synced_is_sent_again_before_anything_else() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let storage = open(&server, writable()).await;
        write(&storage, 0, vec![1; 4096]).await.unwrap();
        storage.sync(&Ctx::GUEST).await.unwrap();
        write(&storage, 4096, vec![2; 4096]).await.unwrap();
        write(&storage, 6144, vec![3; 512]).await.unwrap();
        storage.write_zeroes(&Ctx::GUEST, 4096, 512, ZeroFlags::MAY_UNMAP).await.unwrap();
        storage.discard(&Ctx::GUEST, 16384, 512).await.unwrap();
        storage.write(&Ctx::GUEST, 5120, vec![4; 512].into(), WriteFlags::FUA).await.unwrap();
        server.set(|state| state.config.away = true);
        server.kill();
        storage.watch().next().await;
        server.set(|state| state.seen.clear());
        let requests = join(read(&storage, 4096, 4096), write(&storage, 32768, vec![5; 512]));
        let back = async {
            rt::sleep(Duration::from_secs(1)).await;
            server.set(|state| state.config.away = false);
        };
        let ((got, written), ()) = join(requests, back).await;
        written.unwrap();
        let got = got.unwrap();
        let expected = [(512, 0), (512, 2), (512, 4), (512, 2), (512, 3), (1536, 2)];
        let expected: Vec<u8> = expected.iter().flat_map(|(len, value)| vec![*value as u8; *len]).collect();
        assert!(got == expected);
        let state = server.state();
        let first_new =
            state.seen.iter().position(|seen| seen.command == Command::Read || seen.offset == 32768);
        let replayed = &state.seen[..first_new.unwrap()];
        let covered: u64 = replayed.iter().map(|seen| seen.len).sum();
        assert_eq!(covered, 4096, "all that is unsynced, but not what FUA made stable: {replayed:?}");
        assert!(replayed.iter().any(|seen| seen.offset == 16384 && seen.command == Command::WriteZeroes));
        assert!(state.seen.iter().all(|seen| seen.offset != 0 || seen.command == Command::Flush));
    });
}

#[test]
fn a_sync_in_flight_at_the_loss_answers_for_everything_before_it() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let storage = open(&server, writable()).await;
        write(&storage, 0, vec![1; 4096]).await.unwrap();
        server.set(|state| state.held.push(Command::Flush));
        let mut sync = Box::pin(storage.sync(&Ctx::GUEST));
        assert!((&mut sync).now_or_never().is_none());
        server.until(|state| state.seen.last().is_some_and(|seen| seen.command == Command::Flush)).await;
        server.kill();
        server.set(|state| {
            state.held.clear();
            state.seen.clear();
        });
        sync.await.unwrap();
        assert!(server.state().stable[..4096] == [1; 4096]);
        let seen: Vec<_> = server.state().seen.iter().map(|seen| seen.command).collect();
        assert_eq!(seen, [Command::Write, Command::Flush]);
        // Nothing is left to be sent again.
        server.set(|state| state.seen.clear());
        server.kill();
        read(&storage, 0, 512).await.unwrap();
        assert_eq!(server.count(Command::Write), 0);
    });
}

#[test]
fn a_flush_covers_no_write_that_was_acknowledged_after_it_was_sent() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let storage = open(&server, writable()).await;
        write(&storage, 0, vec![1; 512]).await.unwrap();
        server.set(|state| state.held.push(Command::Flush));
        let mut sync = Box::pin(storage.sync(&Ctx::GUEST));
        assert!((&mut sync).now_or_never().is_none());
        server.until(|state| state.seen.last().is_some_and(|seen| seen.command == Command::Flush)).await;
        write(&storage, 512, vec![2; 512]).await.unwrap();
        // A server may answer the flush without the later write: it forgets it below.
        let live = server.state().live.clone();
        server.set(|state| {
            state.live[512..1024].copy_from_slice(&state.stable.clone()[512..1024]);
            state.held.clear();
        });
        sync.await.unwrap();
        server.kill();
        assert!(read(&storage, 0, 1024).await.unwrap() == live[..1024]);
        storage.sync(&Ctx::GUEST).await.unwrap();
        assert!(server.state().stable == live);
    });
}

#[test]
fn a_flush_that_the_server_fails_poisons_the_storage() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let storage = open(&server, writable()).await;
        write(&storage, 0, vec![1; 512]).await.unwrap();
        server.set(|state| state.failures.push((Command::Flush, 1, server::EIO)));
        assert_eq!(storage.sync(&Ctx::GUEST).await.unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(storage.sync(&Ctx::GUEST).await.unwrap_err().kind(), ErrorKind::Poisoned);
        assert_eq!(write(&storage, 0, vec![1; 512]).await.unwrap_err().kind(), ErrorKind::Poisoned);
        read(&storage, 0, 512).await.unwrap();
        assert_eq!(server.count(Command::Flush), 1);
    });
}

#[test]
fn lost_writes_that_the_server_refuses_to_take_again_are_never_hidden() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let storage = open(&server, writable()).await;
        write(&storage, 0, vec![1; 512]).await.unwrap();
        server.set(|state| state.failures.push((Command::Write, 1, server::ENOSPC)));
        server.kill();
        assert_eq!(storage.sync(&Ctx::GUEST).await.unwrap_err().kind(), ErrorKind::Poisoned);
        // A read would show what was there before the write.
        assert_eq!(read(&storage, 0, 512).await.unwrap_err().kind(), ErrorKind::Poisoned);
        assert_eq!(storage.sync(&Ctx::GUEST).await.unwrap_err().kind(), ErrorKind::Poisoned);
    });
}

#[test]
fn a_sync_that_fails_because_the_server_is_away_loses_nothing() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let storage = open(&server, ClientOptions { on_lost: OnLost::Fail, ..writable() }).await;
        write(&storage, 0, vec![1; 512]).await.unwrap();
        server.set(|state| state.config.away = true);
        server.kill();
        storage.watch().next().await;
        assert_eq!(storage.sync(&Ctx::GUEST).await.unwrap_err().kind(), ErrorKind::SourceLost);
        server.set(|state| state.config.away = false);
        storage.watch().next().await;
        storage.sync(&Ctx::GUEST).await.unwrap();
        assert!(server.state().stable[..512] == [1; 512]);
    });
}

#[test]
fn a_server_that_comes_back_read_only_is_not_the_same() {
    block_on(async {
        let server = Server::new(1, Config::default());
        let storage = open(&server, writable()).await;
        write(&storage, 0, vec![1; 512]).await.unwrap();
        server.set(|state| state.config.flags |= crate::proto::TransmissionFlags::READ_ONLY);
        server.kill();
        assert_eq!(storage.sync(&Ctx::GUEST).await.unwrap_err().kind(), ErrorKind::SourceLost);
        server.set(|state| state.config.flags = Config::default().flags);
        storage.watch().next().await;
        storage.sync(&Ctx::GUEST).await.unwrap();
        assert!(server.state().stable[..512] == [1; 512]);
    });
}

#[test]
fn what_is_kept_is_bounded_and_the_client_syncs_at_the_bound() {
    for seed in 0..20 {
        World::new(seed).run(async {
            const BOUND: u64 = 64 << 10;
            let server = Server::new(
                seed,
                Config { size: SIZE, latency: Duration::from_millis(1), ..Config::default() },
            );
            let storage = open(&server, ClientOptions { unsynced_bytes_max: BOUND, ..writable() }).await;
            let most = Cell::new(0);
            let writes = (0..200).map(|index| {
                let (storage, most) = (&storage, &most);
                async move {
                    let at = index * 8192 % SIZE;
                    match index % 5 {
                        0 => storage.write_zeroes(&Ctx::GUEST, at, 4096, ZeroFlags::empty()).await.unwrap(),
                        // More than the bound, alone.
                        1 if index % 100 == 1 => {
                            write(storage, at % (SIZE / 2), vec![2; 100_000]).await.unwrap()
                        }
                        _ => write(storage, at, vec![1; 4096]).await.unwrap(),
                    }
                    most.set(most.get().max(storage.0.shared.state().kept()));
                }
            });
            join_all(writes).await;
            assert!(most.get() > BOUND / 2 && most.get() < 110_000, "seed {seed}: {}", most.get());
            assert!(server.count(Command::Flush) > 3);
            storage.sync(&Ctx::GUEST).await.unwrap();
            assert_eq!(storage.0.shared.state().kept(), 0);
        });
    }
}

/// Many writers, each in a part of its own and now and then in a common one; the server is killed again and again.
/// Whatever a read shows, and whatever a sync has answered for, is the newest that was acknowledged.
async fn lives_through_kills(server: &Server, storage: &NbdStorage, rng: &RefCell<Rng>) {
    const WRITERS: u64 = 8;
    const PART: u64 = SIZE / WRITERS;
    let over = Cell::new(false);
    let writer = |number: u64| {
        let mut rng = rng.borrow_mut().fork();
        async move {
            let mut model =
                server.state().live[(number * PART) as usize..((number + 1) * PART) as usize].to_vec();
            for step in 0..40_u64 {
                let at = rng.below(PART);
                let len = rng.range(1, (PART - at).min(20_000) + 1);
                let (range, disk) = (at as usize..(at + len) as usize, number * PART + at);
                let cx = Ctx::of([Class::Guest, Class::Prefetch, Class::Fill][rng.index(3)]);
                let fua = rng.per_mille(100);
                match rng.below(9) {
                    0..4 => {
                        let value = 1 + (step % 250) as u8;
                        let flags = if fua { WriteFlags::FUA } else { WriteFlags::empty() };
                        storage.write(&cx, disk, vec![value; len as usize].into(), flags).await.unwrap();
                        model[range].fill(value);
                    }
                    4 => {
                        let flags = if fua { ZeroFlags::FUA } else { ZeroFlags::MAY_UNMAP };
                        storage.write_zeroes(&cx, disk, len, flags).await.unwrap();
                        model[range].fill(0);
                    }
                    5 => {
                        // This server's discarded ranges read as zeroes.
                        storage.discard(&cx, disk, len).await.unwrap();
                        model[range].fill(0);
                    }
                    6 => {
                        storage.sync(&cx).await.unwrap();
                        let stable = &server.state().stable[(number * PART) as usize..][..PART as usize];
                        assert!(stable == model, "writer {number}: a sync was answered without its writes");
                    }
                    _ => {
                        let got = storage.read(&cx, disk, BytesMut::zeroed(len as usize)).await.unwrap();
                        assert!(got == model[range], "writer {number} step {step}: a read went back in time");
                    }
                }
            }
            model
        }
    };
    let kills = async {
        let mut rng = rng.borrow_mut().fork();
        while !over.get() {
            rt::sleep(Duration::from_micros(rng.range(1, 12_000))).await;
            let away = rng.per_mille(300);
            server.set(|state| state.config.away = away);
            server.kill();
            if away {
                rt::sleep(Duration::from_millis(rng.below(100))).await;
                server.set(|state| state.config.away = false);
            }
            // Now and then a server lives long enough for something to be done.
            rt::sleep(Duration::from_millis(rng.below(30))).await;
        }
    };
    let work = async {
        let models = join_all((0..WRITERS).map(writer)).await;
        storage.sync(&Ctx::GUEST).await.unwrap();
        over.set(true);
        models.concat()
    };
    let (model, ()) = join(work, kills).await;
    server.kill();
    assert!(server.state().stable == model, "something is missing after a sync");
    let all = read(storage, 0, SIZE as usize).await.unwrap();
    assert!(all == model);
}

#[test]
fn nothing_acknowledged_is_lost_by_a_server_that_forgets() {
    let mut forgotten = 0;
    for seed in 0..60 {
        let world = World::new(seed);
        let config = Config {
            size: SIZE,
            latency: Duration::from_millis(seed % 4),
            torn: seed % 3 == 0,
            ..Config::default()
        };
        let server = Server::new(seed, config);
        // Sometimes so little may be unsynced that the client syncs all the time.
        let unsynced_bytes_max = [32 << 20, 32 << 20, 50_000][seed as usize % 3];
        world.run(async {
            let storage = open(&server, ClientOptions { unsynced_bytes_max, ..writable() }).await;
            let rng = RefCell::new(world.fork_rng());
            lives_through_kills(&server, &storage, &rng).await;
            let state = storage.0.shared.state();
            assert_eq!(state.left_over(), (0, 0), "seed {seed}");
        });
        forgotten += server.state().forgotten;
    }
    assert!(forgotten > 1 << 20, "the kills took only {forgotten} bytes: this proves little");
}

#[test]
fn overlapping_writes_keep_their_order_whatever_the_server_does() {
    for seed in 0..40 {
        World::new(seed).run(async {
            let latency = Duration::from_millis(3);
            let server = Server::new(seed, Config { size: SIZE, latency, ..Config::default() });
            let storage = open(&server, writable()).await;
            // All are asked for at once; the server answers what it has in any order.
            let mut writes = Vec::new();
            let mut expected = vec![0; 10_000];
            for value in 1..=50_u8 {
                let at = usize::from(value) * 83 % 5000;
                expected[at..at + 5000].fill(value);
                let mut write = Box::pin(write(&storage, at as u64, vec![value; 5000]));
                assert!((&mut write).now_or_never().is_none());
                writes.push(write);
            }
            let kill = async {
                for _ in 0..5 {
                    rt::sleep(Duration::from_millis(10)).await;
                    server.kill();
                }
            };
            let (written, ()) = join(join_all(writes), kill).await;
            written.into_iter().for_each(|result| result.unwrap());
            let got = read(&storage, 0, 10_000).await.unwrap();
            assert!(got[83..9150] == expected[83..9150], "seed {seed}");
        });
    }
}
