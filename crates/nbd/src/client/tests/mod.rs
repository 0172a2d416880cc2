//! The client against a server of the test's own, in a simulated world.

mod hostile;
mod lost;
mod priority;
mod server;
mod stable;
mod wire;

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use infill_base::{Ctx, ErrorKind, ExtentKind, IoResult, WriteFlags, ZeroFlags};
use infill_storage::Storage;
use infill_storage::sync::Arc;

use super::{ClientOptions, NbdStorage, OnLost, SourceState};
use server::{Config, Server};

async fn open(server: &Server, options: ClientOptions) -> NbdStorage {
    NbdStorage::connect(Arc::new(server.clone()), options).await.unwrap()
}

fn writable() -> ClientOptions {
    ClientOptions { read_only: false, ..ClientOptions::default() }
}

async fn read(storage: &NbdStorage, at: u64, len: usize) -> IoResult<BytesMut> {
    storage.read(&Ctx::GUEST, at, BytesMut::zeroed(len)).await
}

async fn write(storage: &NbdStorage, at: u64, data: Vec<u8>) -> IoResult<()> {
    storage.write(&Ctx::GUEST, at, data.into(), WriteFlags::empty()).await
}
