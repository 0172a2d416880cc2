//! What is told of a node's requests at any time (`query-blockstats`): how many, of how many bytes, how long they took, how
//! many failed, and where the highest byte that was written ends. Counters only grow, and begin at nothing when a node is opened.
//!
//! Counted is what comes through the node, whoever asks: exports, jobs, nodes above. What a format reads of the storage that it
//! lies on goes past the storage's node (see [`crate::NodeHandle::on_storage`]) and is not; what it changes is.
//!
//! Each thread has counters of its own, so that reactors share no line; they take memory once the thread has a request. A
//! request costs two looks at the clock and a few additions.

use std::sync::OnceLock;
use std::time::Duration;

use infill_base::{ErrorKind, IoError};
use infill_storage::sync::atomic::{AtomicU64, Ordering};

use crate::changes::{SHARDS, shard};

/// The kinds of requests that are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// Bytes are read.
    Read,
    /// Bytes are written, or made zero.
    Write,
    /// What was written is made to last.
    Flush,
    /// Bytes are given up.
    Discard,
}

impl RequestKind {
    /// All kinds, in the order of their numbers.
    pub const ALL: [RequestKind; 4] =
        [RequestKind::Read, RequestKind::Write, RequestKind::Flush, RequestKind::Discard];
}

/// What is told of requests of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestCounts {
    /// Those that succeeded.
    pub operations: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// How long those took together, in nanoseconds.
    pub nanos: u64,
    /// Those that failed.
    pub failed: u64,
    /// Those that were refused before anything was tried: behind the end, not permitted.
    pub invalid: u64,
}

#[derive(Debug, Default)]
struct Counters {
    operations: AtomicU64,
    bytes: AtomicU64,
    nanos: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
}

#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard {
    kinds: [Counters; RequestKind::ALL.len()],
    highest: AtomicU64,
}

/// The counters of one node.
#[derive(Debug, Default)]
pub struct Stats {
    shards: [OnceLock<Box<Shard>>; SHARDS],
}

impl Stats {
    fn mine(&self) -> &Shard {
        self.shards[shard()].get_or_init(Box::default)
    }

    fn shards(&self) -> impl Iterator<Item = &Shard> {
        self.shards.iter().filter_map(|shard| shard.get().map(|shard| &**shard))
    }

    /// What was counted of that kind.
    pub fn of(&self, kind: RequestKind) -> RequestCounts {
        let mut sum = RequestCounts::default();
        for shard in self.shards() {
            let counters = &shard.kinds[kind as usize];
            sum.operations += counters.operations.load(Ordering::Relaxed);
            sum.bytes += counters.bytes.load(Ordering::Relaxed);
            sum.nanos += counters.nanos.load(Ordering::Relaxed);
            sum.failed += counters.failed.load(Ordering::Relaxed);
            sum.invalid += counters.invalid.load(Ordering::Relaxed);
        }
        sum
    }

    /// Where the highest write has ended, in bytes from the beginning; 0 where none was.
    pub fn highest_write(&self) -> u64 {
        self.shards().map(|shard| shard.highest.load(Ordering::Relaxed)).max().unwrap_or(0)
    }

    /// Counts a request of `len` bytes from `at` that has ended after `took`.
    pub(crate) fn count(
        &self,
        kind: RequestKind,
        at: u64,
        len: u64,
        took: Duration,
        failed: Option<&IoError>,
    ) {
        let shard = self.mine();
        let counters = &shard.kinds[kind as usize];
        let add = |counter: &AtomicU64, more: u64| {
            counter.fetch_add(more, Ordering::Relaxed);
        };
        match failed.map(IoError::kind) {
            None => {
                add(&counters.operations, 1);
                add(&counters.bytes, len);
                add(&counters.nanos, u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
                if kind == RequestKind::Write {
                    shard.highest.fetch_max(at.saturating_add(len), Ordering::Relaxed);
                }
            }
            // Nothing was tried.
            Some(ErrorKind::InvalidInput | ErrorKind::NotPermitted) => add(&counters.invalid, 1),
            Some(_) => {
                add(&counters.failed, 1);
                // Part of it may have been written.
                if kind == RequestKind::Write {
                    shard.highest.fetch_max(at.saturating_add(len), Ordering::Relaxed);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use infill_base::{Ctx, WriteFlags, ZeroFlags};
    use infill_sim::World;
    use infill_storage::{MemoryStorage, StorageHandle};

    use super::*;
    use crate::{NodeHandle, RawNode};

    #[test]
    fn requests_of_every_kind_are_counted_and_the_highest_write_is_told() {
        World::new(1).run(async {
            let node = NodeHandle::new(RawNode::new(StorageHandle::new(MemoryStorage::new(64 << 10)), false));
            let cx = Ctx::GUEST;
            let empty = |kind| node.stats().of(kind) == RequestCounts::default();
            assert!(RequestKind::ALL.into_iter().all(empty));
            node.write(&cx, 8192, vec![1; 512], WriteFlags::empty()).await.unwrap();
            node.write(&cx, 0, vec![1; 4096], WriteFlags::empty()).await.unwrap();
            assert_eq!(node.stats().highest_write(), 8704);
            node.write_zeroes(&cx, 16384, 1024, ZeroFlags::empty()).await.unwrap();
            assert!(node.write(&cx, 64 << 10, vec![1; 512], WriteFlags::empty()).await.is_err());
            node.read_vec(&cx, 0, 2048).await.unwrap();
            node.discard(&cx, 32768, 16384).await.unwrap();
            node.sync(&cx).await.unwrap();
            let told = |kind| {
                let counts = node.stats().of(kind);
                (counts.operations, counts.bytes, counts.failed, counts.invalid)
            };
            assert_eq!(
                RequestKind::ALL.map(told),
                [(1, 2048, 0, 0), (3, 512 + 4096 + 1024, 0, 1), (1, 0, 0, 0), (1, 16384, 0, 0)]
            );
            // Neither a discard nor a write that was refused is one.
            assert_eq!(node.stats().highest_write(), 17408);
        });
    }

    #[test]
    fn what_a_format_writes_is_counted_at_the_node_of_its_storage() {
        World::new(1).run(async {
            let storage = StorageHandle::new(MemoryStorage::new(4096));
            let file = NodeHandle::new(RawNode::protocol("file", storage.clone(), false));
            let under_format = file.on_storage(storage);
            under_format.write(&Ctx::GUEST, 8192, vec![1; 512], WriteFlags::empty()).await.unwrap();
            under_format.read_vec(&Ctx::GUEST, 0, 512).await.unwrap();
            let writes = file.stats().of(RequestKind::Write);
            assert_eq!((writes.operations, writes.bytes, file.stats().highest_write()), (1, 512, 8704));
            assert_eq!(file.stats().of(RequestKind::Read), RequestCounts::default());
        });
    }
}
