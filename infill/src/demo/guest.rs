//! The demonstration's guest: reads and writes at random places, flushes now and then, and verifies every byte.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::BytesMut;
use futures_util::future::join_all;
use infill_base::{Ctx, WriteFlags};
use infill_io::{Address, Reactors, connector};
use infill_nbd::{ClientOptions, NbdStorage, OnLost};
use infill_storage::{StorageHandle, rt};

use super::model::{BLOCK_BYTES, Model, Verdict};

/// Requests in flight: one a client.
const CLIENTS: u64 = 4;
/// Of 100 requests, this many are writes.
const WRITES_PERCENT: u64 = 35;
/// Requests of a client between two FLUSHes.
const REQUESTS_PER_FLUSH: u64 = 24;
/// What is verified at once.
const VERIFY_BYTES: usize = 1 << 20;

/// Latencies, in the order in which they were measured.
#[derive(Debug, Default)]
pub struct Latencies {
    pub reads: Vec<Duration>,
    pub writes: Vec<Duration>,
    pub flushes: Vec<Duration>,
}

impl Latencies {
    /// Appends what was measured later.
    pub fn add(&mut self, mut other: Latencies) {
        self.reads.append(&mut other.reads);
        self.writes.append(&mut other.writes);
        self.flushes.append(&mut other.flushes);
    }
}

/// What the guest knows of its disk. Each client has every [`CLIENTS`]th block to itself.
#[derive(Debug)]
pub struct Guest {
    clients: Vec<Client>,
    disk_bytes: u64,
}

#[derive(Debug)]
struct Client {
    model: Model,
    random: u64,
}

impl Guest {
    /// A guest that has written nothing yet to a disk of `disk_bytes`.
    pub fn new(disk_bytes: u64) -> Guest {
        let client = |index| Client { model: Model::default(), random: 0x9e37_79b9_7f4a_7c15 ^ (index + 1) };
        Guest { clients: (0..CLIENTS).map(client).collect(), disk_bytes }
    }

    /// The model of the client that owns a block.
    fn model(&mut self, block: u64) -> &mut Model {
        &mut self.clients[(block % CLIENTS) as usize].model
    }
}

impl Client {
    /// A number below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % end
    }
}

/// A disk as the guest sees it; it fails instead of waiting when its server dies.
pub async fn connect(socket: &Address, export: &str) -> Result<StorageHandle> {
    let options = ClientOptions {
        export: export.into(),
        read_only: false,
        on_lost: OnLost::Fail,
        ..ClientOptions::default()
    };
    let storage = NbdStorage::connect(connector(socket), options).await;
    Ok(StorageHandle::new(storage.with_context(|| format!("connecting to {socket}"))?))
}

/// A guest at work.
pub struct Load {
    stop: Arc<AtomicBool>,
    done: mpsc::Receiver<Result<(Guest, Latencies)>>,
}

impl Load {
    /// Begins to read and write.
    pub fn start(reactors: &Reactors, socket: &Address, export: &'static str, guest: Guest) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, done) = mpsc::channel();
        let (socket, stopped) = (socket.clone(), stop.clone());
        reactors.on(0).spawn(move || async move {
            let result = match connect(&socket, export).await {
                Ok(disk) => work(disk, guest, &stopped).await,
                Err(error) => Err(error),
            };
            let _ = sender.send(result);
        });
        Load { stop, done }
    }

    /// Ends it after the requests in flight, or takes what it had when its disk went away.
    pub fn end(self) -> Result<(Guest, Latencies)> {
        self.stop.store(true, Ordering::Relaxed);
        self.done.recv().map_err(|_| anyhow!("the guest ended without a word"))?
    }
}

async fn work(disk: StorageHandle, guest: Guest, stop: &AtomicBool) -> Result<(Guest, Latencies)> {
    let blocks = guest.disk_bytes / BLOCK_BYTES as u64;
    let clients = guest.clients.into_iter().enumerate();
    let ends =
        join_all(clients.map(|(index, client)| run_client(&disk, client, index as u64, blocks, stop))).await;
    let (mut clients, mut latencies) = (Vec::new(), Latencies::default());
    for end in ends {
        let (client, measured) = end?;
        clients.push(client);
        latencies.add(measured);
    }
    Ok((Guest { clients, disk_bytes: guest.disk_bytes }, latencies))
}

/// Works until it is told to stop or the disk goes away; only wrong data is an error.
async fn run_client(
    disk: &StorageHandle,
    mut client: Client,
    index: u64,
    blocks: u64,
    stop: &AtomicBool,
) -> Result<(Client, Latencies)> {
    let mut latencies = Latencies::default();
    for request in 1_u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let block = client.below(blocks / CLIENTS) * CLIENTS + index;
        let (at, start) = (block * BLOCK_BYTES as u64, rt::now());
        if client.below(100) < WRITES_PERCENT {
            let (version, data) = client.model.next_write(block);
            if disk.write(&Ctx::GUEST, at, data, WriteFlags::empty()).await.is_err() {
                break;
            }
            client.model.acknowledged(block, version);
            latencies.writes.push(rt::now() - start);
        } else {
            let Ok(data) = disk.read(&Ctx::GUEST, at, BytesMut::zeroed(BLOCK_BYTES)).await else { break };
            latencies.reads.push(rt::now() - start);
            if data != client.model.expected(block) {
                bail!("the guest read wrong data at byte {at}");
            }
        }
        if request % REQUESTS_PER_FLUSH == 0 {
            let (covered, start) = (client.model.flush_begins(), rt::now());
            if disk.sync(&Ctx::GUEST).await.is_err() {
                break;
            }
            client.model.flush_ended(covered);
            latencies.flushes.push(rt::now() - start);
        }
    }
    Ok((client, latencies))
}

/// Looks at every block that was written, after the daemon has died.
pub fn after_crash(
    reactors: &Reactors,
    socket: &Address,
    export: &'static str,
    mut guest: Guest,
) -> Result<(Guest, Verdict)> {
    let socket = socket.clone();
    reactors.block_on(move || async move {
        let disk = connect(&socket, export).await?;
        let mut verdict = Verdict::default();
        for client in &mut guest.clients {
            client.model.crashed();
            for block in client.model.written() {
                let buf = BytesMut::zeroed(BLOCK_BYTES);
                let data = disk.read(&Ctx::GUEST, block * BLOCK_BYTES as u64, buf).await?;
                client.model.settle(block, &data, &mut verdict);
            }
        }
        Ok((guest, verdict))
    })
}

/// Reads the whole disk; the number of bytes that were as they must be. An error if any is not.
pub fn verify_all(
    reactors: &Reactors,
    socket: &Address,
    export: &'static str,
    mut guest: Guest,
    progress: impl Fn(u64) + Send + 'static,
) -> Result<u64> {
    let socket = socket.clone();
    reactors.block_on(move || async move {
        let disk = connect(&socket, export).await?;
        let mut at = 0;
        while at < guest.disk_bytes {
            let len = VERIFY_BYTES.min((guest.disk_bytes - at) as usize);
            let data = disk.read(&Ctx::GUEST, at, BytesMut::zeroed(len)).await?;
            for (index, bytes) in data.chunks_exact(BLOCK_BYTES).enumerate() {
                let block = at / BLOCK_BYTES as u64 + index as u64;
                if bytes != guest.model(block).expected(block) {
                    bail!("wrong data at byte {}", block * BLOCK_BYTES as u64);
                }
            }
            at += len as u64;
            progress(at);
        }
        Ok(at)
    })
}
