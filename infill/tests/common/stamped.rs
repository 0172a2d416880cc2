//! A guest that knows which values each of its blocks may have, for daemons that die under it.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};

use bytes::{Bytes, BytesMut};
use infill_base::{Ctx, WriteFlags};
use infill_io::{Address, Reactors, connector};
use infill_nbd::{ClientOptions, NbdStorage, OnLost};
use infill_storage::Storage;

use super::common::Process;
pub use super::common::{Random, seed};

/// Size of the disks, in bytes.
pub const DISK_BYTES: u64 = 24 << 20;
/// What the guest writes and reads at a time, in bytes.
pub const BLOCK_BYTES: u64 = 4096;
pub const BLOCKS: u64 = DISK_BYTES / BLOCK_BYTES;

/// What the source holds in a block, and what the guest writes there for the `stamp`th time (0: the source's).
pub fn content(block: u64, stamp: u64) -> Vec<u8> {
    let mut random = Random((block * 0x9e37_79b9 + stamp * 0x85eb_ca6b) | 1);
    (0..BLOCK_BYTES / 8).flat_map(|_| random.next().to_le_bytes()).collect()
}

/// What the guest knows of its disk.
pub struct Guest {
    /// For each block the values that it may have, the newest last.
    pub allowed: Vec<Vec<u64>>,
    pub stamp: u64,
    random: Random,
}

impl Guest {
    pub fn new(seed: u64) -> Guest {
        Guest { allowed: vec![vec![0]; BLOCKS as usize], stamp: 0, random: Random(seed | 1) }
    }

    pub fn check(&self, block: u64, found: &[u8]) {
        let allowed = &self.allowed[block as usize];
        let fits = allowed.iter().any(|stamp| content(block, *stamp) == found);
        assert!(fits, "block {block} is none of what it may be: {allowed:?} (newest last)");
    }

    /// A flush was acknowledged.
    fn all_is_stable(&mut self) {
        for allowed in &mut self.allowed {
            allowed.drain(..allowed.len() - 1);
        }
    }

    /// Looks at what the last death has left where it may be one of several things. From then on it is that.
    async fn look(&mut self, disk: &NbdStorage) {
        let open = |block: &u64| self.allowed[*block as usize].len() > 1;
        let open: Vec<u64> = (0..BLOCKS).filter(open).collect();
        for block in open {
            let buf = BytesMut::zeroed(BLOCK_BYTES as usize);
            let found = disk.read(&Ctx::GUEST, block * BLOCK_BYTES, buf).await.unwrap();
            self.check(block, &found);
            self.allowed[block as usize].retain(|stamp| content(block, *stamp) == found);
        }
    }

    /// Reads, writes and flushes until an error ends it. At operation `at` it says so.
    async fn work(&mut self, disk: &NbdStorage, at: u64, told: &mpsc::Sender<()>) {
        for nth in 0.. {
            if nth == at {
                told.send(()).unwrap();
            }
            let block = self.random.below(BLOCKS);
            let done = match self.random.below(8) {
                0 => disk.sync(&Ctx::GUEST).await.map(|()| self.all_is_stable()),
                1..=3 => {
                    let buf = BytesMut::zeroed(BLOCK_BYTES as usize);
                    let read = disk.read(&Ctx::GUEST, block * BLOCK_BYTES, buf).await;
                    read.map(|found| self.check(block, &found))
                }
                _ => {
                    self.stamp += 1;
                    self.allowed[block as usize].push(self.stamp);
                    let data = Bytes::from(content(block, self.stamp)).into();
                    disk.write(&Ctx::GUEST, block * BLOCK_BYTES, data, WriteFlags::empty()).await
                }
            };
            if done.is_err() {
                return;
            }
        }
    }
}

/// Has the guest work at the export `disk` of `nbd.sock` in `dir` until that ends; `died` is called at its `at`th operation.
#[expect(clippy::await_holding_lock, reason = "there is one guest, and nobody else asks for it meanwhile")]
pub fn work(dir: &Path, reactors: &Arc<Reactors>, guest: &Arc<Mutex<Guest>>, at: u64, died: impl FnOnce()) {
    let (sender, receiver) = mpsc::channel();
    let (address, reactors, guest) = (Address::Unix(dir.join("nbd.sock")), reactors.clone(), guest.clone());
    let worker = std::thread::spawn(move || {
        reactors.block_on(move || async move {
            let options = ClientOptions {
                export: "disk".into(),
                read_only: false,
                on_lost: OnLost::Fail,
                // It does not repeat what it was answered: that is the daemon's to keep.
                unsynced_bytes_max: 0,
                ..ClientOptions::default()
            };
            let disk = NbdStorage::connect(connector(&address), options).await.unwrap();
            let mut guest = guest.lock().unwrap();
            guest.look(&disk).await;
            guest.work(&disk, at, &sender).await;
        });
    });
    receiver.recv().expect("the guest works until then");
    died();
    worker.join().unwrap();
}

/// Has `server`, which serves `disk` there, end under the guest at its `at`th operation, in order or not: what was answered is kept.
pub fn dies(
    dir: &Path,
    reactors: &Arc<Reactors>,
    guest: &Arc<Mutex<Guest>>,
    at: u64,
    server: Process,
    in_order: bool,
) {
    work(dir, reactors, guest, at, || server.end(in_order));
    answered_is_kept(guest);
}

/// After the death of a process, in order or not: what was acknowledged is there. What was in flight may be.
pub fn answered_is_kept(guest: &Arc<Mutex<Guest>>) {
    let mut guest = guest.lock().unwrap();
    let newest = guest.stamp;
    for allowed in &mut guest.allowed {
        // The last write may not have been answered; then the one before is the newest that was.
        let unanswered = usize::from(allowed.last() == Some(&newest));
        let keep = (1 + unanswered).min(allowed.len());
        allowed.drain(..allowed.len() - keep);
    }
}
