//! A storage of the tests' own: an NBD export that keeps apart what was flushed, and forgets the rest, or a part of it,
//! sector by sector.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::BytesMut;
use infill_base::{
    Ctx, ErrorKind, Extent, ExtentKind, Extents, Gather, IoError, IoResult, Limits, WriteFlags, ZeroFlags,
};
use infill_io::{Address, Listener, Reactors};
use infill_nbd::{Export, Exports, Server, ServerLimits};
use infill_node::{NodeHandle, RawNode};
use infill_storage::{Storage, StorageHandle, rt};

pub use super::common::Random;

/// Size of the storage, in bytes. It cannot grow.
pub const STORAGE_BYTES: usize = 4 << 20;
/// What a power cut tears nothing smaller than, in bytes.
const SECTOR_BYTES: usize = 512;

#[derive(Default)]
struct Medium {
    /// What a power cut leaves.
    stable: Vec<u8>,
    /// What reads see.
    volatile: Vec<u8>,
    /// Sectors in which they differ, perhaps.
    unsynced: BTreeSet<usize>,
    syncs: usize,
}

/// A disk with a volatile cache.
#[derive(Clone, Default)]
pub struct Forgetful(Arc<Mutex<Medium>>);

impl Forgetful {
    fn medium(&self) -> MutexGuard<'_, Medium> {
        self.0.lock().unwrap()
    }

    /// A new content, stable. It is filled up with zeroes.
    pub fn insert(&self, image: &[u8]) {
        let mut stable = image.to_vec();
        stable.resize(STORAGE_BYTES, 0);
        let volatile = stable.clone();
        *self.medium() = Medium { stable, volatile, ..Medium::default() };
    }

    /// What is left after the power is cut now. Of the sectors that were not flushed those survive for which `survives`
    /// says so. Also how many were at stake, and how many flushes there were.
    pub fn cut(&self, mut survives: impl FnMut() -> bool) -> (Vec<u8>, usize, usize) {
        let medium = self.medium();
        let mut left = medium.stable.clone();
        for sector in &medium.unsynced {
            let range = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
            if survives() {
                left[range.clone()].copy_from_slice(&medium.volatile[range]);
            }
        }
        (left, medium.unsynced.len(), medium.syncs)
    }

    /// How many flushes there were.
    pub fn syncs(&self) -> usize {
        self.medium().syncs
    }

    /// Its server dies with everything that was not flushed.
    pub fn forget(&self) {
        let mut medium = self.medium();
        medium.volatile = medium.stable.clone();
        medium.unsynced.clear();
    }

    fn change(&self, at: u64, len: usize, fua: bool, change: impl FnOnce(&mut [u8])) -> IoResult<()> {
        let mut medium = self.medium();
        let start = at as usize;
        let Some(target) = medium.volatile.get_mut(start..start + len) else {
            return Err(IoError::new(ErrorKind::NoSpace, "the storage has a fixed size").at(at, len as u64));
        };
        change(target);
        if fua {
            let Medium { stable, volatile, .. } = &mut *medium;
            stable[start..start + len].copy_from_slice(&volatile[start..start + len]);
        } else if len > 0 {
            medium.unsynced.extend(start / SECTOR_BYTES..=(start + len - 1) / SECTOR_BYTES);
        }
        Ok(())
    }
}

impl Storage for Forgetful {
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn len(&self) -> u64 {
        STORAGE_BYTES as u64
    }
    fn name(&self) -> String {
        "a disk that forgets".into()
    }
    async fn read(&self, _: &Ctx, at: u64, mut buf: BytesMut) -> IoResult<BytesMut> {
        let medium = self.medium();
        let start = at as usize;
        let source = medium.volatile.get(start..start + buf.len());
        let source = source.ok_or_else(|| IoError::new(ErrorKind::InvalidInput, "behind the end"))?;
        buf.copy_from_slice(source);
        Ok(buf)
    }
    async fn write(&self, _: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        let bytes = data.to_bytes();
        let fua = flags.contains(WriteFlags::FUA);
        self.change(at, bytes.len(), fua, |target| target.copy_from_slice(&bytes))
    }
    async fn write_zeroes(&self, _: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.change(at, len as usize, flags.contains(ZeroFlags::FUA), |target| target.fill(0))
    }
    async fn discard(&self, _: &Ctx, _: u64, _: u64) -> IoResult<()> {
        Ok(())
    }
    async fn sync(&self, _: &Ctx) -> IoResult<()> {
        let mut medium = self.medium();
        medium.stable = medium.volatile.clone();
        medium.unsynced.clear();
        medium.syncs += 1;
        Ok(())
    }
    async fn set_len(&self, _: &Ctx, _: u64) -> IoResult<()> {
        Err(IoError::new(ErrorKind::Unsupported, "the storage has a fixed size"))
    }
    async fn extents(&self, _: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        Ok(vec![Extent { start: at, len, kind: ExtentKind::Data, host: None, compressed: false }])
    }
}

/// Serves `disk` at `socket`.
pub fn serve(reactors: &Reactors, disk: &Forgetful, socket: &Path) {
    let (disk, address) = (disk.clone(), Address::Unix(socket.to_owned()));
    reactors.block_on(move || async move {
        let node = NodeHandle::new(RawNode::new(StorageHandle::new(disk), false));
        let exports = Exports::new();
        exports.add(Export { writable: true, ..Export::new("disk", node) }).unwrap();
        let server = Server::new(exports, ServerLimits::default());
        let listener = Listener::bind(&address).unwrap();
        rt::spawn(async move {
            loop {
                let connection = listener.accept().await.unwrap().into_connection().unwrap();
                let server = server.clone();
                // A client that was killed ends its connection with an error.
                rt::spawn(async move { drop(server.serve(connection).await) });
            }
        });
    });
}

/// A storage that loses what was not flushed loses it.
#[test]
fn the_storage_of_these_tests_forgets() {
    let disk = Forgetful::default();
    disk.insert(&[]);
    disk.change(512, 1024, false, |target| target.fill(1)).unwrap();
    assert_eq!(disk.cut(|| false).0, vec![0; STORAGE_BYTES]);
    assert_eq!(disk.cut(|| true).0[512..1536], [1; 1024]);
    disk.change(0, 512, true, |target| target.fill(2)).unwrap();
    let (left, at_stake, _) = disk.cut(|| false);
    assert_eq!((left[0], left[512], at_stake), (2, 0, 2));
}
