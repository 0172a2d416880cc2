//! Serves a raw file, or a disk that does nothing, over a Unix socket until it is ended by a signal: what a benchmark of
//! the server alone needs.
//!
//! `cargo run --release -p infill-nbd --example serve_raw -- SOCKET FILE|null:BYTES`

use bytes::BytesMut;
use infill_base::{Ctx, Extent, ExtentKind, Extents, Gather, IoResult, Limits, WriteFlags, ZeroFlags};
use infill_io::{Address, FileOptions, FileStorage, Listener, Reactors, termination};
use infill_nbd::{Export, Exports, Server, ServerLimits};
use infill_node::{NodeHandle, RawNode};
use infill_storage::{Storage, StorageHandle, rt};

/// A disk that takes and gives nothing: what is left is the server.
struct Null(u64);

impl Storage for Null {
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn len(&self) -> u64 {
        self.0
    }
    fn name(&self) -> String {
        "null".into()
    }
    async fn read(&self, _cx: &Ctx, _at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        Ok(buf)
    }
    async fn write(&self, _cx: &Ctx, _at: u64, _data: Gather, _flags: WriteFlags) -> IoResult<()> {
        Ok(())
    }
    async fn write_zeroes(&self, _cx: &Ctx, _at: u64, _len: u64, _flags: ZeroFlags) -> IoResult<()> {
        Ok(())
    }
    async fn discard(&self, _cx: &Ctx, _at: u64, _len: u64) -> IoResult<()> {
        Ok(())
    }
    async fn sync(&self, _cx: &Ctx) -> IoResult<()> {
        Ok(())
    }
    async fn set_len(&self, _cx: &Ctx, _len: u64) -> IoResult<()> {
        Ok(())
    }
    async fn extents(&self, _cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        Ok(vec![Extent::new(at, len, ExtentKind::Zero)])
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [socket, disk] = args.as_slice() else {
        return Err("usage: serve_raw SOCKET FILE|null:BYTES".into());
    };
    let storage = match disk.strip_prefix("null:") {
        Some(bytes) => StorageHandle::new(Null(bytes.parse()?)),
        None => StorageHandle::new(FileStorage::open(disk, FileOptions::default())?),
    };
    let exports = Exports::new();
    let node = NodeHandle::new(RawNode::new(storage, false));
    exports.add(Export { writable: true, ..Export::new("", node) })?;
    let server = Server::new(exports, ServerLimits::default());
    let address = Address::Unix(socket.into());
    let reactors = Reactors::start(1)?;
    let served: IoResult<()> = reactors.block_on(move || async move {
        let listener = Listener::bind(&address)?;
        rt::spawn(async move {
            while let Ok(accepted) = listener.accept().await {
                let server = server.clone();
                rt::spawn(async move {
                    let served = match accepted.into_connection() {
                        Ok(connection) => server.serve(connection).await,
                        Err(error) => Err(error),
                    };
                    if let Err(error) = served {
                        eprintln!("{error}");
                    }
                });
            }
        });
        termination()?.await;
        Ok(())
    });
    Ok(served?)
}
