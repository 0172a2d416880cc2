//! Rounds: how changed tables reach the disk, and the order of writes (20-durability, sections 3 and 4).
//!
//! On the way of a request: (a) clusters are taken and the file made long enough for them; (b) the payload is written;
//! (c) when that write has *completed*, the entry is set in the cache. Nothing else. Then, in rounds, one at a time:
//!
//! 1. **Freeze**: copy the changed L1 slices, then the changed L2 slices, so that no copy names a table that was not
//!    copied. Only copies are written.
//! 2. Write the copies of L2 tables that nothing on the disk names yet. **Sync 1**, which also covers the payloads and
//!    the length of the file.
//! 3. Write the copies of L2 tables that are named, and of the L1 table. **Sync 2.**
//!    Drop the records of what was changed before the freeze from the journal.
//! 4. Give the space of clusters back that were unmapped before the freeze.
//!
//! Clusters that were written and not linked (see [`crate::space`]) are zeroed before the first sync of a round, and
//! spare after it.
//!
//! In marked mode (see [`crate::image`]) all copies are written at once, with one sync. Where nothing was changed,
//! too, a round is one sync.

use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use infill_base::{Ctx, IoResult, ZeroFlags};
use infill_node::mapping::{FrozenSlice, SLICE_BYTES, SliceCache};
use infill_storage::journal::Mark;
use infill_storage::sync::{Arc, lock};
use infill_storage::{rt, unaligned};

use crate::fault::Fault;
use crate::geometry::{HostOffset, SLICE_ENTRIES};
use crate::image::Image;
use crate::space::{Taken, zero_range};

/// Writes of a round that are in flight at once.
const ROUND_WRITES: usize = 32;

/// Copies that lie behind each other are written together up to this, in bytes.
const ROUND_WRITE_BYTES_MAX: usize = 256 << 10;

/// The copy of a slice, and the hold that keeps the slice cached until its round is over.
struct Copy {
    table: u64,
    host: u64,
    bytes: Bytes,
    held: Option<FrozenSlice>,
}

fn copies(cache: &SliceCache) -> Vec<Copy> {
    let copy = |frozen: FrozenSlice| Copy {
        table: frozen.key().table,
        host: frozen.host(),
        bytes: frozen.bytes().clone(),
        held: Some(frozen),
    };
    cache.freeze().into_iter().map(copy).collect()
}

fn written(cache: &SliceCache, copies: Vec<Copy>, ok: bool) {
    cache.written(copies.into_iter().filter_map(|copy| copy.held).collect(), ok);
}

impl Image {
    /// One round. [`infill_storage::rounds::Rounds`] sees to it that there is one at a time.
    pub(crate) async fn round(self: &Arc<Image>, cx: &Ctx) -> IoResult<()> {
        self.check_writable()?;
        // First what was freed: the entries that said so were set before, so they are among the copies.
        let freed = std::mem::take(&mut *lock(&self.freed));
        let mark = self.ledger.mark();
        let named: Vec<u64> =
            lock(&self.new_tables).iter().filter(|(_, named)| **named).map(|(table, _)| *table).collect();
        let (l1, mut l2);
        if self.planted(Fault::L2CopiedFirst) {
            l2 = copies(&self.l2);
            rt::sleep(Duration::from_micros(200)).await;
            l1 = copies(&self.l1);
        } else {
            l1 = copies(&self.l1);
            l2 = copies(&self.l2);
        }
        if self.planted(Fault::EvictedCopy) {
            for copy in &mut l2 {
                copy.held = None;
                self.l2.forget_table(copy.table, self.layout.geometry.table_entries() / SLICE_ENTRIES);
            }
        }
        let soiled = self.zero_soiled(cx).await;
        let result = self.write_copies(cx, &l1, &l2, &named, mark).await;
        let ok = result.is_ok();
        if ok {
            self.space.cleaned(soiled);
        } else {
            soiled.into_iter().for_each(|at| self.space.give_back(Taken { at, clusters: 1 }));
        }
        written(&self.l1, l1, ok);
        written(&self.l2, l2, ok);
        let mark = if self.planted(Fault::RecordsDroppedPastMark) { self.ledger.mark() } else { mark };
        if ok {
            // Before the space is used again.
            self.ledger.stable(mark);
            self.give_back(cx, freed).await;
        } else {
            lock(&self.freed).extend(freed);
        }
        result
    }

    async fn write_copies(
        &self,
        cx: &Ctx,
        l1: &[Copy],
        l2: &[Copy],
        named: &[u64],
        mark: Mark,
    ) -> IoResult<()> {
        // Asked after the freeze: whoever set an entry over a backing has said so before.
        if !self.is_ordered() {
            self.write_all(cx, l1.iter().chain(l2)).await?;
            lock(&self.new_tables).retain(|table, _| !named.contains(table));
            return self.sync_storage(cx).await;
        }
        let (new, old): (Vec<_>, Vec<_>) = {
            let new_tables = lock(&self.new_tables);
            l2.iter().partition(|copy| new_tables.contains_key(&copy.table))
        };
        self.write_all(cx, new).await?;
        if !self.planted(Fault::NoFirstSync) {
            self.sync_storage(cx).await?;
        }
        if self.planted(Fault::RecordsDroppedAtSync1) {
            self.ledger.stable(mark);
        }
        if old.is_empty() && l1.is_empty() {
            return Ok(());
        }
        // From here on the disk may name these tables, whatever becomes of the round.
        lock(&self.new_tables).retain(|table, _| !named.contains(table));
        if self.planted(Fault::LateL1) {
            self.write_all(cx, old).await?;
            self.sync_storage(cx).await?;
            return self.write_all(cx, l1).await;
        }
        self.write_all(cx, old.into_iter().chain(l1)).await?;
        self.sync_storage(cx).await
    }

    /// Writes copies, those that lie behind each other together. They ascend in the file, table by table.
    async fn write_all(&self, cx: &Ctx, copies: impl IntoIterator<Item = &Copy>) -> IoResult<()> {
        let mut writes: Vec<(u64, Vec<u8>)> = Vec::new();
        for copy in copies {
            let live = copy.held.as_ref().filter(|_| self.planted(Fault::LiveSlice)).map(live);
            let bytes = live.as_deref().unwrap_or(&copy.bytes);
            match writes.last_mut() {
                Some((at, run))
                    if *at + run.len() as u64 == copy.host && run.len() < ROUND_WRITE_BYTES_MAX =>
                {
                    run.extend_from_slice(bytes);
                }
                _ => writes.push((copy.host, bytes.to_vec())),
            }
        }
        stream::iter(writes)
            .map(|(at, bytes)| unaligned::write(cx, &self.storage, at, bytes.into()))
            .buffer_unordered(ROUND_WRITES)
            .try_collect::<()>()
            .await
    }

    /// Zeroes clusters that were written and not linked, and gives those of which that succeeded. The others are left
    /// to a later round.
    async fn zero_soiled(&self, cx: &Ctx) -> Vec<HostOffset> {
        let (mut soiled, mut zeroed) = (self.space.soiled(), Vec::new());
        while let Some(at) = soiled.pop() {
            let end = at.0 + self.layout.geometry.cluster_bytes();
            if let Err(error) = zero_range(cx, &self.storage, at.0, end, ZeroFlags::MAY_UNMAP).await {
                tracing::debug!(%error, at = at.0, "an unused cluster cannot be zeroed now");
                soiled.push(at);
                break;
            }
            zeroed.push(at);
        }
        soiled.into_iter().for_each(|at| self.space.give_back(Taken { at, clusters: 1 }));
        zeroed
    }

    /// Gives the space of clusters back that nothing names any more, not on the disk either. Guests' writes to them
    /// are over: they held their range when the entry was changed. Failures are told to nobody: the space is leaked.
    async fn give_back(&self, cx: &Ctx, mut freed: Vec<HostOffset>) {
        if !self.storage.limits().discard {
            return;
        }
        freed.sort_unstable();
        let bytes = self.layout.geometry.cluster_bytes();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for at in freed {
            match runs.last_mut() {
                Some((start, len)) if *start + *len == at.0 => *len += bytes,
                _ => runs.push((at.0, bytes)),
            }
        }
        for (at, len) in runs {
            if let Err(error) = self.storage.discard(cx, at, len).await {
                tracing::debug!(%error, at, len, "space of unused clusters stays allocated");
            }
        }
    }
}

/// The planted mistake: the slice as it is now.
fn live(frozen: &FrozenSlice) -> Vec<u8> {
    (0..SLICE_BYTES / 8).flat_map(|entry| frozen.slice().load(entry)[0].to_le_bytes()).collect()
}
