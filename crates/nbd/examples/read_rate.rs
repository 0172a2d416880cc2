//! How fast the client reads a distant export, beside nbdcopy in the same run.
//!
//! `cargo run --release -p infill-nbd --example read_rate [MiB [DELAY_MS]]`. The server is nbdkit's pattern plugin behind
//! its delay filter (20 ms a read), which serves 16 requests of a connection at a time. nbdcopy runs with its defaults
//! (4 connections, 64 requests of 256 KiB on each) and with one connection; the client reads with several request sizes,
//! as many in flight as it takes. Every word that it reads is checked. Prints the rates and their ratio.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use futures_util::{StreamExt, stream};
use infill_base::Ctx;
use infill_io::{Reactors, UnixConnector};
use infill_nbd::{ClientOptions, NbdStorage};
use infill_storage::Storage;
use infill_storage::sync::Arc;

const MIB: u64 = 1 << 20;
/// Bytes that the reader keeps in flight.
const WINDOW: u64 = 64 * MIB;

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn server(socket: &Path, size: &str, delay: &str) -> Server {
    let mut command = Command::new("nbdkit");
    command.args(["-f", "--filter=delay", "-U"]).arg(socket).args(["pattern", size, delay]);
    let child = command.stdin(Stdio::null()).spawn();
    let server = Server(child.expect("nbdkit does not start; apt-get install nbdkit libnbd-bin"));
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        std::thread::yield_now();
    }
    server
}

fn nbdcopy(socket: &Path, options: &[&str]) -> Duration {
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let began = Instant::now();
    let status = Command::new("nbdcopy").args(options).args([&uri, "null:"]).status();
    let status = status.expect("nbdcopy does not start; apt-get install libnbd-bin");
    assert!(status.success(), "nbdcopy failed");
    began.elapsed()
}

/// Reads everything in requests of `request` bytes.
async fn read(socket: std::path::PathBuf, request: u64) -> Duration {
    let began = Instant::now();
    let connector = Arc::new(UnixConnector { path: socket });
    let storage =
        NbdStorage::connect(connector, ClientOptions::default()).await.expect("the server is there");
    let len = storage.len();
    let starts = (0..len.div_ceil(request)).map(|index| index * request);
    stream::iter(starts)
        .map(|at| {
            let buf = BytesMut::zeroed(request.min(len - at) as usize);
            let storage = &storage;
            async move { (at, storage.read(&Ctx::FILL, at, buf).await.expect("a read fails")) }
        })
        .buffer_unordered((WINDOW / request).max(1) as usize)
        .for_each(|(at, got)| async move {
            for (index, word) in got.chunks_exact(8).enumerate() {
                assert_eq!(word, (at + index as u64 * 8).to_be_bytes(), "at byte {at}");
            }
        })
        .await;
    began.elapsed()
}

fn main() {
    let mut args = std::env::args().skip(1);
    let mut number = |default: u64| args.next().and_then(|arg| arg.parse().ok()).unwrap_or(default);
    let (size, delay) = (number(1024), number(20));
    let dir = tempfile::tempdir().expect("a temporary directory");
    let socket = dir.path().join("socket");
    let _server = server(&socket, &format!("{size}M"), &format!("rdelay={delay}ms"));
    let rate = |took: Duration| size as f64 * MIB as f64 / 1e6 / took.as_secs_f64();
    println!("{size} MiB, {delay} ms a read");
    let copy = rate(nbdcopy(&socket, &[]));
    println!("nbdcopy, 4 connections            {copy:7.0} MB/s");
    let one = rate(nbdcopy(&socket, &["--connections=1"]));
    println!("nbdcopy, 1 connection             {one:7.0} MB/s");
    let reactors = Reactors::start(1).expect("a reactor");
    for request in [64 << 10, 256 << 10, MIB, 2 * MIB] {
        let path = socket.clone();
        let ours = rate(reactors.block_on(move || read(path, request)));
        let kib = request >> 10;
        println!(
            "client, requests of {kib:5} KiB     {ours:7.0} MB/s   {:.2} of nbdcopy, {:.2} of it with 1 connection",
            ours / copy,
            ours / one
        );
    }
}
