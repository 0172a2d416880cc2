//! The preallocate filter: a file below a format grows ahead of what is written, so that its file system is asked for space
//! rarely and in large pieces.
//!
//! Whoever lies on it sees the file end where what was written ends. The rest is given back when it is closed; after a crash
//! the file stays longer, which formats do not mind. Where no space can be reserved the file grows as it would without.

use infill_base::{Ctx, ErrorKind, IoResult};
use infill_storage::sync::atomic::{AtomicU64, Ordering};
use infill_storage::{RangeLock, StorageHandle};

use crate::edge::Through as _;
use crate::{Edge, Filter, NodeHandle};

/// Passes everything on to a file, and lets it grow ahead.
#[derive(Debug)]
pub struct PreallocateNode {
    below: Edge,
    /// Of the node below: where space is reserved.
    storage: StorageHandle,
    /// Where the file ends for whoever lies on it.
    end: AtomicU64,
    align: u64,
    size: u64,
    resizing: RangeLock,
}

impl PreallocateNode {
    /// Over the node `below` on `storage`. It grows `size` bytes ahead, to a multiple of `align`.
    pub fn new(below: NodeHandle, storage: StorageHandle, align: u64, size: u64) -> PreallocateNode {
        let end = AtomicU64::new(storage.len());
        PreallocateNode { below: Edge::new(below), storage, end, align, size, resizing: RangeLock::new() }
    }

    /// Reserves space for what comes up to `len`, and behind it.
    async fn reserve(&self, cx: &Ctx, len: u64) -> IoResult<()> {
        let now = self.below.len();
        if len <= now {
            return Ok(());
        }
        let ahead = len.saturating_add(self.size);
        let to = ahead.checked_next_multiple_of(self.align).unwrap_or(len);
        match self.storage.allocate(cx, now, to - now).await {
            Ok(()) => Ok(()),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::Unsupported | ErrorKind::NoSpace | ErrorKind::TooLarge
                ) =>
            {
                // Part of it may be there.
                if self.below.len() < len { self.below.node().resize(cx, len).await } else { Ok(()) }
            }
            Err(error) => Err(error),
        }
    }
}

impl Filter for PreallocateNode {
    const DRIVER: &'static str = "preallocate";

    fn below(&self) -> &Edge {
        &self.below
    }

    fn len(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    async fn resize(&self, cx: &Ctx, len: u64) -> IoResult<()> {
        let _turn = self.resizing.exclusive(0, 1).await;
        if len >= self.end.load(Ordering::Acquire) {
            self.reserve(cx, len).await?;
        } else {
            // What is cut off must read as zeroes when it comes back.
            self.below.node().resize(cx, len).await?;
        }
        self.end.store(len, Ordering::Release);
        Ok(())
    }

    async fn close(&self, cx: &Ctx) -> IoResult<()> {
        let _turn = self.resizing.exclusive(0, 1).await;
        let end = self.end.load(Ordering::Acquire);
        if self.below.node_limits().writable && self.below.len() > end {
            self.below.node().resize(cx, end).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use infill_base::WriteFlags;
    use infill_sim::World;
    use infill_storage::MemoryStorage;

    use super::*;
    use crate::{NodeStorage, RawNode};

    #[test]
    fn what_is_written_ends_where_it_was_written_and_the_rest_is_given_back() {
        World::new(1).run(async {
            let cx = Ctx::GUEST;
            let storage = StorageHandle::new(MemoryStorage::new(1000));
            let file = NodeHandle::new(RawNode::protocol("file", storage.clone(), false));
            let node = NodeHandle::new(PreallocateNode::new(file, storage.clone(), 4096, 64 << 10));
            let format = StorageHandle::new(NodeStorage::new(node.clone()));
            assert_eq!(format.len(), 1000);
            for at in [1000, 5000, 3000] {
                format.write(&cx, at, vec![7; 512], WriteFlags::empty()).await.unwrap();
            }
            assert_eq!(format.len(), 5512);
            let read = format.read_vec(&cx, 900, 4612).await.unwrap();
            assert!(read[..100].iter().all(|byte| *byte == 0) && read[100] == 7 && read[4611] == 7);
            format.set_len(&cx, 5200).await.unwrap();
            format.set_len(&cx, 6000).await.unwrap();
            let read = format.read_vec(&cx, 5000, 1000).await.unwrap();
            assert!(read[..200].iter().all(|byte| *byte == 7) && read[200..].iter().all(|byte| *byte == 0));
            node.close(&cx).await.unwrap();
            assert_eq!(storage.len(), 6000);
        });
    }
}
