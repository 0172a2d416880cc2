//! The client against the servers that people use (nbdkit, qemu-nbd), and against our own one that forgets.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use common::{Served, pattern};
use futures_util::future::{join, join_all};
use infill_base::{Class, Ctx, ErrorKind, ExtentKind, IoResult, WriteFlags, ZeroFlags};
use infill_io::{Address, Listener, Reactors, UnixConnector};
use infill_nbd::{
    ClientOptions, Export, Exports, NbdStorage, NbdUri, OnLost, Server, ServerAddress, ServerLimits,
    SourceState,
};
use infill_node::{NodeHandle, RawNode};
use infill_sim::{DiskOptions, Media, Rng, SimDisk};
use infill_storage::sync::Arc;
use infill_storage::{Storage, StorageHandle, rt};

const MIB: usize = 1 << 20;

/// How long a server may take to listen.
const START_TIME: Duration = Duration::from_secs(30);

/// A server's process, which ends with this.
struct Peer {
    child: Child,
    socket: PathBuf,
}

impl Peer {
    /// Starts a server that listens at `socket`, and waits until it does.
    fn start(program: &str, args: &[&str], socket: &Path) -> Peer {
        let _ = std::fs::remove_file(socket);
        let child = Command::new(program).args(args).stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        let child = child.unwrap_or_else(|error| {
            panic!("{program} does not start ({error}); apt-get install qemu-utils nbdkit libnbd-bin")
        });
        let mut peer = Peer { child, socket: socket.to_owned() };
        let began = Instant::now();
        // qemu-nbd with its defaults serves one client and ends: looking must not be that client.
        while !listens(&peer.socket) {
            assert!(began.elapsed() < START_TIME, "{program} does not listen");
            assert!(peer.child.try_wait().unwrap().is_none(), "{program} {args:?} ended at once");
            std::thread::yield_now();
        }
        peer
    }

    fn nbdkit(args: &[&str], socket: &Path) -> Peer {
        let path = socket.display().to_string();
        let args: Vec<&str> = ["-f", "-U", &path].into_iter().chain(args.iter().copied()).collect();
        Peer::start("nbdkit", &args, socket)
    }

    fn qemu_nbd(args: &[&str], socket: &Path) -> Peer {
        let path = socket.display().to_string();
        let args: Vec<&str> = ["-k", &path, "-f", "raw"].into_iter().chain(args.iter().copied()).collect();
        Peer::start("qemu-nbd", &args, socket)
    }

    /// As `kill -9` does.
    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Whether somebody listens at a socket file, without becoming a client.
fn listens(socket: &Path) -> bool {
    let listening = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    // The flag of a listening socket.
    listening.lines().any(|line| line.contains(" 00010000 ") && line.ends_with(&*socket.to_string_lossy()))
}

fn writable() -> ClientOptions {
    ClientOptions { read_only: false, ..ClientOptions::default() }
}

async fn open(socket: &Path, options: ClientOptions) -> NbdStorage {
    let uri: NbdUri = format!("nbd+unix:///?socket={}", socket.display()).parse().unwrap();
    let ServerAddress::Unix(path) = uri.server else { panic!("not a socket") };
    NbdStorage::connect(Arc::new(UnixConnector { path }), options).await.unwrap()
}

async fn read(storage: &NbdStorage, class: Class, at: usize, len: usize) -> IoResult<BytesMut> {
    storage.read(&Ctx::of(class), at as u64, BytesMut::zeroed(len)).await
}

/// Reads everything in pieces, many at once, in classes by turns.
async fn read_all(storage: &NbdStorage, piece: usize) -> Vec<u8> {
    let len = storage.len() as usize;
    let reads = (0..len.div_ceil(piece)).map(|index| {
        let class = [Class::Guest, Class::Fill][index % 2];
        read(storage, class, index * piece, piece.min(len - index * piece))
    });
    let parts = join_all(reads).await.into_iter().map(|part| part.unwrap());
    parts.collect::<Vec<_>>().concat()
}

fn on_a_reactor<F, T>(make: impl FnOnce() -> F + Send + 'static) -> T
where
    F: Future<Output = T> + 'static,
    T: Send + 'static,
{
    Reactors::start(1).unwrap().block_on(make)
}

#[test]
fn qemu_nbd_with_its_defaults_works_with_its_one_connection_and_with_more() {
    for shared in [&["-r"][..], &["-r", "--shared=4"]] {
        let dir = tempfile::tempdir().unwrap();
        let (disk, socket) = (dir.path().join("disk"), dir.path().join("socket"));
        let mut content = pattern(8 * MIB);
        content[MIB..3 * MIB].fill(0);
        std::fs::write(&disk, &content).unwrap();
        let punch = Command::new("fallocate").args(["-p", "-o", "1M", "-l", "2M"]).arg(&disk).status();
        assert!(punch.unwrap().success());
        let name = disk.display().to_string();
        let args: Vec<&str> = shared.iter().copied().chain([name.as_str()]).collect();
        let _peer = Peer::qemu_nbd(&args, &socket);
        on_a_reactor(move || async move {
            let storage = open(&socket, ClientOptions::default()).await;
            for _ in 0..3 {
                assert!(read_all(&storage, 50_000).await == content);
            }
            let extents = storage.extents(&Ctx::GUEST, 0, content.len() as u64).await.unwrap();
            let zero = extents.iter().find(|extent| extent.kind == ExtentKind::Zero).unwrap();
            assert_eq!((zero.start, zero.len), (MIB as u64, 2 * MIB as u64));
            assert!(storage.is_connected() && storage.source_changes() == 0);
        });
    }
}

#[test]
fn nbdkit_is_understood_in_every_dialect_it_speaks() {
    for (dialect, tells_zero) in [(None, true), (Some("--no-sr"), false), (Some("--mask-handshake=0"), false)]
    {
        let dir = tempfile::tempdir().unwrap();
        let (log, socket) = (dir.path().join("log"), dir.path().join("socket"));
        let logfile = format!("logfile={}", log.display());
        let args = dialect.into_iter().chain(["--filter=log", "memory", "4M", &logfile]);
        let peer = Peer::nbdkit(&args.collect::<Vec<_>>(), &socket);
        on_a_reactor(move || async move {
            let storage = open(&socket, writable()).await;
            let cx = Ctx::GUEST;
            let zero = storage.extents(&cx, 0, 4 * MIB as u64).await.unwrap();
            assert_eq!(zero[0].kind == ExtentKind::Zero, tells_zero);
            let content = pattern(2 * MIB);
            storage.write(&cx, 4096, content.clone().into(), WriteFlags::empty()).await.unwrap();
            storage.write_zeroes(&cx, 8192, 4096, ZeroFlags::MAY_UNMAP).await.unwrap();
            storage.discard(&cx, 65536, 65536).await.unwrap();
            storage.write(&cx, 3 * MIB as u64, vec![5; 512].into(), WriteFlags::FUA).await.unwrap();
            storage.sync(&cx).await.unwrap();
            let mut expected = vec![0; 4 * MIB];
            expected[4096..4096 + 2 * MIB].copy_from_slice(&content);
            expected[8192..12288].fill(0);
            expected[65536..131_072].fill(0);
            expected[3 * MIB..3 * MIB + 512].fill(5);
            assert!(read_all(&storage, 100_000).await == expected);
        });
        drop(peer);
        let log = std::fs::read_to_string(log).unwrap();
        for (what, wanted) in
            [("Zero", true), ("Trim", true), ("Flush", true), ("fua=1", true), ("Extents", tells_zero)]
        {
            assert_eq!(log.contains(&format!(" {what} ")), wanted, "{dialect:?}: {what}\n{log}");
        }
    }
}

#[test]
fn a_server_that_is_strict_about_request_sizes_never_has_to_refuse_one() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let strict = ["--filter=blocksize-policy", "pattern", "16M", "blocksize-error-policy=error"];
    let sizes = ["blocksize-minimum=4096", "blocksize-preferred=65536", "blocksize-maximum=131072"];
    let _peer = Peer::nbdkit(&[&strict[..], &sizes].concat(), &socket);
    on_a_reactor(move || async move {
        let storage = open(&socket, ClientOptions::default()).await;
        let limits = storage.limits();
        assert_eq!((limits.request_align, limits.preferred_bytes), (4096, 65536));
        let got = read_all(&storage, MIB).await;
        for (index, word) in got.chunks_exact(8).enumerate() {
            assert_eq!(word, (index as u64 * 8).to_be_bytes());
        }
        assert_eq!(read(&storage, Class::Guest, 512, 512).await.unwrap_err().kind(), ErrorKind::InvalidInput);
    });
}

#[test]
fn errors_of_a_server_come_through_and_end_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, trigger) = (dir.path().join("socket"), dir.path().join("trigger"));
    let file = format!("error-file={}", trigger.display());
    let _peer = Peer::nbdkit(
        &["--log=null", "--filter=error", "memory", "1M", "error=ENOSPC", "error-rate=100%", &file],
        &socket,
    );
    on_a_reactor(move || async move {
        let storage = open(&socket, writable()).await;
        std::fs::write(&trigger, "").unwrap();
        let errors = join_all((0..50).map(|index| read(&storage, Class::Guest, index * 512, 512))).await;
        assert!(errors.into_iter().all(|result| result.unwrap_err().kind() == ErrorKind::NoSpace));
        let write = storage.write(&Ctx::GUEST, 0, vec![1; 512].into(), WriteFlags::empty()).await;
        assert_eq!(write.unwrap_err().kind(), ErrorKind::NoSpace);
        std::fs::remove_file(&trigger).unwrap();
        assert!(read_all(&storage, 4096).await == vec![0; MIB]);
        assert_eq!(storage.source_changes(), 0);
    });
}

#[test]
fn a_distant_server_is_asked_for_many_things_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let _peer = Peer::nbdkit(&["--filter=delay", "pattern", "4M", "rdelay=20ms"], &socket);
    on_a_reactor(move || async move {
        let storage = open(&socket, ClientOptions::default()).await;
        let got = read_all(&storage, 32 << 10).await;
        assert!(
            got.chunks_exact(8).enumerate().all(|(index, word)| word == (index as u64 * 8).to_be_bytes())
        );
    });
}

#[test]
fn requests_of_all_reactors_travel_over_one_client() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let _peer = Peer::nbdkit(&["memory", "16M"], &socket);
    let reactors = Reactors::start(3).unwrap();
    let storage = reactors.block_on(move || async move { open(&socket, writable()).await });
    let (sender, results) = std::sync::mpsc::channel();
    for reactor in 0..3 {
        let (storage, sender) = (storage.clone(), sender.clone());
        reactors.on(reactor).spawn(move || async move {
            let part = 4 * MIB;
            let content: Vec<u8> = pattern(part).iter().map(|byte| byte ^ reactor as u8).collect();
            for (index, piece) in content.chunks(10_000).enumerate() {
                let at = (reactor * part + index * 10_000) as u64;
                storage.write(&Ctx::GUEST, at, piece.to_vec().into(), WriteFlags::empty()).await.unwrap();
            }
            storage.sync(&Ctx::GUEST).await.unwrap();
            let back = read(&storage, Class::Guest, reactor * part, part).await.unwrap();
            sender.send(back == content).unwrap();
        });
    }
    assert!((0..3).all(|_| results.recv_timeout(Duration::from_secs(60)).unwrap()));
}

#[test]
fn a_server_killed_and_started_again_in_the_middle_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, disk) = (dir.path().join("socket"), dir.path().join("disk"));
    std::fs::write(&disk, vec![0; 8 * MIB]).unwrap();
    let start = {
        let (socket, disk) = (socket.clone(), disk.display().to_string());
        move || {
            Peer::nbdkit(&["--filter=delay", "file", &disk, "delay-write=10ms", "delay-read=10ms"], &socket)
        }
    };
    let mut peer = start();
    let reactors = Reactors::start(1).unwrap();
    let storage = reactors.block_on(move || async move { open(&socket, writable()).await });
    let content = pattern(8 * MIB);
    let (sender, done) = std::sync::mpsc::channel();
    let (writer, expected) = (storage.clone(), content.clone());
    reactors.on(0).spawn(move || async move {
        let pieces: Vec<(usize, Vec<u8>)> =
            expected.chunks(16 << 10).map(<[u8]>::to_vec).enumerate().collect();
        for batch in pieces.chunks(16) {
            let writes = batch.iter().map(|(index, piece)| {
                let at = (index * (16 << 10)) as u64;
                writer.write(&Ctx::GUEST, at, piece.clone().into(), WriteFlags::empty())
            });
            join_all(writes).await.into_iter().for_each(|result| result.unwrap());
        }
        writer.sync(&Ctx::GUEST).await.unwrap();
        let got = read_all(&writer, 64 << 10).await;
        sender.send(got == expected).unwrap();
    });
    // Kills as often as the work takes (32 batches of 10 ms at least, so it takes longer than until the first); each time the
    // server lives until it has done something.
    let mut kills = 0;
    let good = loop {
        match done.recv_timeout(Duration::from_millis(80)) {
            Ok(good) => break good,
            Err(_) if kills < 20 => {
                peer.kill();
                peer = start();
                kills += 1;
            }
            Err(_) => break done.recv_timeout(Duration::from_secs(60)).unwrap(),
        }
    };
    assert!(good, "the content differs after {kills} kills");
    assert!(kills > 0 && storage.source_changes() > 0, "it was over before a server was killed");
    drop(peer);
    assert!(std::fs::read(&disk).unwrap() == content);
}

/// Our own server of a disk that forgets, on reactors of its own: they are the process that dies.
struct Forgetful {
    reactors: Option<Reactors>,
    disk: SimDisk,
    socket: PathBuf,
    rng: Rng,
}

impl Forgetful {
    fn start(socket: &Path, seed: u64, len: usize) -> Forgetful {
        let disk = SimDisk::with(Media::new(len as u64), DiskOptions::default());
        let mut server = Forgetful { reactors: None, disk, socket: socket.to_owned(), rng: Rng::new(seed) };
        server.serve();
        server
    }

    fn serve(&mut self) {
        let reactors = Reactors::start(1).unwrap();
        let (disk, address) = (self.disk.clone(), Address::Unix(self.socket.clone()));
        reactors.block_on(move || async move {
            let node = NodeHandle::new(RawNode::new(StorageHandle::new(disk), false));
            let exports = Exports::new();
            exports.add(Export { writable: true, ..Export::new("", node) }).unwrap();
            let server = Server::new(exports, ServerLimits::default());
            let listener = Listener::bind(&address).unwrap();
            rt::spawn(async move {
                while let Ok(client) = listener.accept().await {
                    let (server, connection) = (server.clone(), client.into_connection().unwrap());
                    rt::spawn(async move { drop(server.serve(connection).await) });
                }
            });
        });
        self.reactors = Some(reactors);
    }

    /// The server's machine loses power, and starts again.
    fn power_cut(&mut self) {
        self.reactors = None;
        let media = self.disk.crash_point().random_power_cut(&mut self.rng);
        self.disk = SimDisk::with(media, DiskOptions::default());
        self.serve();
    }
}

#[test]
fn nothing_that_a_sync_answered_for_is_missing_after_a_servers_power_cuts() {
    const PARTS: usize = 4;
    const PART: usize = MIB;
    for seed in 0..4 {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let mut server = Forgetful::start(&socket, seed, PARTS * PART);
        let reactors = Reactors::start(2).unwrap();
        let storage = reactors.block_on(move || async move { open(&socket, writable()).await });
        let (sender, done) = std::sync::mpsc::channel();
        for part in 0..PARTS {
            let (storage, sender) = (storage.clone(), sender.clone());
            reactors.on(part).spawn(move || async move {
                let mut rng = Rng::new(seed << 8 | part as u64);
                let mut model = vec![0_u8; PART];
                let cx = Ctx::GUEST;
                for step in 0..600_u32 {
                    let at = rng.index(PART / 512) * 512;
                    let len = (1 + rng.index(40)) * 512;
                    let len = len.min(PART - at);
                    let (range, disk) = (at..at + len, (part * PART + at) as u64);
                    match rng.below(8) {
                        0..4 => {
                            let data = vec![step as u8 | 1; len];
                            storage.write(&cx, disk, data.clone().into(), WriteFlags::empty()).await.unwrap();
                            model[range].copy_from_slice(&data);
                        }
                        4 => {
                            storage.write_zeroes(&cx, disk, len as u64, ZeroFlags::MAY_UNMAP).await.unwrap();
                            model[range].fill(0);
                        }
                        5 => storage.sync(&cx).await.unwrap(),
                        _ => {
                            let got = read(&storage, Class::Guest, part * PART + at, len).await.unwrap();
                            assert!(got == model[range], "seed {seed}: a read went back in time");
                        }
                    }
                }
                storage.sync(&cx).await.unwrap();
                sender.send((part, model)).unwrap();
            });
        }
        let mut models = vec![Vec::new(); PARTS];
        let (mut missing, mut cuts) = (PARTS, 0);
        while missing > 0 {
            match done.recv_timeout(Duration::from_millis(if cuts < 30 { 15 } else { 60_000 })) {
                Ok((part, model)) => {
                    models[part] = model;
                    missing -= 1;
                }
                Err(error) => {
                    assert!(cuts < 30, "{error}: the writers do not come to an end");
                    server.power_cut();
                    cuts += 1;
                }
            }
        }
        assert!(cuts > 0 && storage.source_changes() > 0);
        // Whatever was not flushed goes now.
        server.power_cut();
        let mut stable = vec![0; PARTS * PART];
        server.disk.media().read(0, &mut stable);
        assert!(stable == models.concat(), "seed {seed}: something is missing after {cuts} power cuts");
    }
}

/// A server of ours puts what nobody waits for behind everything else that its node is asked for.
#[test]
fn a_server_of_ours_knows_what_nobody_waits_for() {
    let node = NodeHandle::new(RawNode::new(StorageHandle::new(SimDisk::new(MIB as u64)), false));
    node.latency().meter().start();
    let exports = Exports::new();
    exports.add(Export { writable: true, ..Export::new("", node.clone()) }).unwrap();
    let served = Served::new(exports);
    let socket = served.socket().to_owned();
    on_a_reactor(move || async move {
        let storage = open(&socket, writable()).await;
        for (class, len) in [(Class::Guest, 512), (Class::AroundMiss, 1024), (Class::Fill, 4096)] {
            read(&storage, class, 0, len).await.unwrap();
        }
        let write = storage.write(&Ctx::FILL, 0, vec![1; 512].into(), WriteFlags::FUA);
        write.await.unwrap();
        storage.extents(&Ctx::FILL, 0, MIB as u64).await.unwrap();
    });
    // As a prefetch: a copy-on-read node keeps it.
    let read = [Class::Guest, Class::Prefetch, Class::AroundMiss, Class::Fill];
    assert_eq!(read.map(|class| node.latency().meter().read_bytes(class)), [512, 1024 + 4096, 0, 0]);
    assert_eq!(node.latency().meter().written_bytes(), 512);
}

#[test]
fn the_loss_of_a_server_and_its_return_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let mut peer = Peer::nbdkit(&["pattern", "1M"], &socket);
    let reactors = Reactors::start(1).unwrap();
    let path = socket.clone();
    let (held, storage) = reactors.block_on(move || async move {
        (open(&path, ClientOptions::default()).await, {
            let options = ClientOptions { on_lost: OnLost::Fail, ..ClientOptions::default() };
            open(&path, options).await
        })
    });
    let (sender, told) = std::sync::mpsc::channel();
    let watched = storage.clone();
    let mut watch = storage.watch();
    reactors.on(0).spawn(move || async move {
        while let Some(state) = watch.next().await {
            let connected = matches!(state, SourceState::Connected);
            let read = read(&watched, Class::Guest, 0, 512).await.map(|_| ());
            sender.send((connected, read)).unwrap();
        }
    });
    let next = || told.recv_timeout(Duration::from_secs(60)).unwrap();
    peer.kill();
    let (connected, result) = next();
    assert!(!connected && result.unwrap_err().kind() == ErrorKind::SourceLost);
    let waiting = held.clone();
    let (sender, answered) = std::sync::mpsc::channel();
    reactors.on(0).spawn(move || async move {
        let reads = join(read(&waiting, Class::Guest, 0, 512), read(&waiting, Class::Fill, 512, 512)).await;
        sender.send(reads).unwrap();
    });
    assert!(answered.recv_timeout(Duration::from_millis(100)).is_err());
    let _peer = Peer::nbdkit(&["pattern", "1M"], &socket);
    let (one, two) = answered.recv_timeout(Duration::from_secs(60)).unwrap();
    assert_eq!(
        (one.unwrap()[8..16].to_vec(), two.unwrap()[..8].to_vec()),
        (8_u64.to_be_bytes().into(), 512_u64.to_be_bytes().into())
    );
    assert!(next().0);
    assert!(held.is_connected());
}
