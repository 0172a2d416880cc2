//! Zeroes and discards: (sub)clusters that change what they are, without payload.
//!
//! Over a backing nothing becomes absent (I3a): a discard sets *zero*, and is ignored where version 2 has no such thing.
//! Without a backing a discard makes absent. What does not cover a (sub)cluster is written as zeroes, or ignored.

use bytes::BytesMut;
use infill_base::{
    Ctx, DiscardMode, ErrorKind, Gather, IoError, IoResult, ZeroFlags, align_up, whole_units, zero_bytes,
};
use infill_storage::sync::Arc;

use crate::entry::{L1Entry, L2View, StandardCluster};
use crate::geometry::{GuestCluster, GuestOffset, L1Index};
use crate::image::Image;
use crate::lookup::Place;
use crate::write_back::Freed;

/// Bytes of one piece where zeroes have to be written.
const ZERO_WRITE_BYTES: u64 = 1 << 20;
/// Bytes of zeroes that lie in memory for everybody.
const ZERO_RUN_BYTES: u64 = 64 << 10;

/// What (sub)clusters become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Become {
    Zero,
    Absent,
}

/// How a range is cleared.
#[derive(Clone, Copy, Debug)]
struct Clear {
    to: Become,
    /// Host clusters without data are given back.
    unmap: bool,
    /// Something lies below, so what is absent is not zero.
    backed: bool,
    /// Under which `backed` was seen.
    generation: u64,
}

impl Image {
    /// Makes `[at, at + len)` read as zeroes.
    pub(crate) async fn write_zeroes(
        self: &Arc<Image>,
        cx: &Ctx,
        at: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> IoResult<()> {
        self.check(at, len)?;
        self.prepare().await?;
        self.zero(cx, at, len, self.size(), flags).await?;
        if flags.contains(ZeroFlags::FUA) { self.sync().await } else { Ok(()) }
    }

    /// As [`Image::write_zeroes`], on a disk of `size` bytes.
    pub(crate) async fn zero(
        self: &Arc<Image>,
        cx: &Ctx,
        at: u64,
        len: u64,
        size: u64,
        flags: ZeroFlags,
    ) -> IoResult<()> {
        let end = at + len;
        let (first, last) = whole_units(at, end, size, self.geometry.subcluster_bytes());
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        let fast = first < last && (self.geometry.has_zero_clusters() || !self.is_over_backing());
        if !fast {
            if flags.contains(ZeroFlags::NO_FALLBACK) {
                let why = "zeroes cannot be set here without writing them";
                return Err(IoError::new(ErrorKind::Unsupported, why).at(at, len));
            }
            return self.write_zero_bytes(cx, at, end).await;
        }
        self.write_zero_bytes(cx, at, first).await?;
        self.clear(cx, first, last, |backed| {
            let absent = !self.geometry.has_zero_clusters();
            (!(absent && backed))
                .then_some((if absent { Become::Absent } else { Become::Zero }, unmap || absent))
        })
        .await?;
        self.write_zero_bytes(cx, last, end).await
    }

    /// The guest does not need `[at, at + len)` any more.
    pub(crate) async fn discard(self: &Arc<Image>, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.check(at, len)?;
        self.writer()?;
        if self.options.discard == DiscardMode::Ignore {
            return Ok(());
        }
        let (first, last) = whole_units(at, at + len, self.size(), self.geometry.subcluster_bytes());
        if first >= last {
            return Ok(());
        }
        self.prepare().await?;
        let zero = self.geometry.has_zero_clusters();
        // What remains is compressed in part: it stays.
        let discard = |backed| match backed {
            false => Some((Become::Absent, true)),
            true => zero.then_some((Become::Zero, true)),
        };
        self.clear_runs(cx, first, last, discard).await.map(drop)
    }

    /// Makes everything absent, over a backing too, and that stable. Nothing else changes meanwhile, and nothing links.
    ///
    /// The L1 table is emptied, which takes two syncs whatever the size of the disk; what it named is counted down afterwards,
    /// when nobody waits for it. Cut off in the middle, some tables are absent and others are not: whoever empties an overlay
    /// sees to it that both read the same. What was not counted down by then leaks until a check.
    pub(crate) async fn make_empty(self: &Arc<Image>) -> IoResult<()> {
        let writer = self.prepare().await?;
        {
            // Whoever has looked up a table to change is done with it.
            let _steady = writer.steady.exclusive(0, 1).await;
            for index in (0..self.l1.table().count).map(L1Index) {
                let entry = self.l1.get(index);
                if entry == L1Entry::EMPTY {
                    continue;
                }
                self.relieve().await?;
                let table = entry.view(&self.geometry);
                let table = table.map_err(|error| IoError::from(error).in_node(self.storage.name()))?;
                self.set_table(index, L1Entry::EMPTY);
                if let Some(table) = table {
                    self.unmapped(Freed::tree(self.geometry.host_cluster(table.at)));
                }
            }
        }
        self.sync().await
    }

    /// Makes whole (sub)clusters absent, over a backing too. Nothing of them is written meanwhile, and nothing links that was
    /// fetched for them before.
    pub(crate) async fn forget(self: &Arc<Image>, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.check(at, len)?;
        self.prepare().await?;
        let end = align_up(at + len, self.geometry.subcluster_bytes());
        let absent = |_| Some((Become::Absent, true));
        for (from, to) in self.clear_runs(cx, at, end, absent).await? {
            // A part of a compressed cluster: written as it is, it is compressed no more.
            let bytes = BytesMut::zeroed((to.min(self.size()) - from) as usize);
            let bytes = self.read(cx, from, bytes).await?.freeze();
            self.write_data(cx, from, bytes.into()).await?;
            self.clear_runs(cx, from, to, absent).await?;
        }
        Ok(())
    }

    /// Clears, and writes zeroes where that cannot be done by an entry.
    async fn clear(
        self: &Arc<Image>,
        cx: &Ctx,
        first: u64,
        last: u64,
        how: impl Fn(bool) -> Option<(Become, bool)>,
    ) -> IoResult<()> {
        for (at, end) in self.clear_runs(cx, first, last, how).await? {
            self.write_zero_bytes(cx, at, end).await?;
        }
        Ok(())
    }

    /// Clears whole units, as `how` says for whether something lies below. Gives what an entry cannot say.
    async fn clear_runs(
        self: &Arc<Image>,
        cx: &Ctx,
        first: u64,
        last: u64,
        how: impl Fn(bool) -> Option<(Become, bool)>,
    ) -> IoResult<Vec<(u64, u64)>> {
        let (mut left, mut next) = (Vec::new(), first);
        while next < last {
            self.relieve().await?;
            let generation = self.backing.generation();
            let backed = self.is_over_backing();
            let Some((to, unmap)) = how(backed) else {
                left.push((next, last));
                break;
            };
            let clear = Clear { to, unmap, backed, generation };
            let end = self.slice_end(next).min(last);
            let cluster = self.geometry.guest_cluster(GuestOffset(next));
            if (!backed || to == Become::Absent) && self.table(cluster)?.is_none() {
                // All of it is absent, and reads as zeroes or is to be so.
                next = self.table_end(next).min(last);
                continue;
            }
            if self.clear_slice(cx, next, end, clear, &mut left).await? {
                next = end;
            }
        }
        Ok(left)
    }

    /// End of the guest bytes that the table, or the slice, of byte `at` describes.
    fn table_end(&self, at: u64) -> u64 {
        let bytes = self.geometry.l2_table_guest_bytes();
        (at / bytes + 1).saturating_mul(bytes)
    }

    pub(crate) fn slice_end(&self, at: u64) -> u64 {
        let bytes = (self.slices.layout().entries() as u64) << self.geometry.cluster_bits();
        (at / bytes + 1).saturating_mul(bytes)
    }

    /// Clears `[at, end)`, which one slice describes. False: the edge below has changed, nothing was done.
    async fn clear_slice(
        self: &Arc<Image>,
        cx: &Ctx,
        at: u64,
        end: u64,
        clear: Clear,
        left: &mut Vec<(u64, u64)>,
    ) -> IoResult<bool> {
        let geometry = &self.geometry;
        let first = geometry.guest_cluster(GuestOffset(at));
        let last = geometry.guest_cluster(GuestOffset(end - 1));
        let _steady = self.writer()?.steady.shared(0, 1).await;
        // The table and its slice before the range: what is held then is memory.
        let (slice, index, _) = self.for_change(cx, first).await?;
        let _range = self.writer()?.ranges.exclusive(first.0, last.0 + 1).await;
        let Some(_link) = self.backing.begin_link(clear.generation) else { return Ok(false) };
        let Some(table) = self.table(first)? else { return Ok(false) };
        for cluster in first.0..=last.0 {
            let index = index + (cluster - first.0) as usize;
            let old = self.view(&table, &slice, index, GuestCluster(cluster))?;
            let start = geometry.guest_offset(GuestCluster(cluster)).0;
            let (lo, hi) = (at.max(start) - start, end.min(start + geometry.cluster_bytes()) - start);
            let mask = self.subclusters(lo, hi);
            match cleared(&old, mask, geometry.subcluster_mask(), clear) {
                Some(new) => self.link(&slice, index, old, new),
                None => left.push((start + lo, start + hi)),
            }
        }
        Ok(true)
    }

    /// Writes zeroes as data, but where they are already.
    async fn write_zero_bytes(self: &Arc<Image>, cx: &Ctx, at: u64, end: u64) -> IoResult<()> {
        let mut next = at;
        while next < end {
            let (len, there) = {
                let _flight = self.in_flight.enter();
                let run = self.run_at(cx, next, end - next).await?;
                let there = match run.place {
                    Place::Zero => true,
                    Place::Absent => !self.is_over_backing(),
                    Place::Data { .. } | Place::Compressed(_) => false,
                };
                (if there { run.len } else { run.len.min(ZERO_WRITE_BYTES) }, there)
            };
            if !there {
                let mut zeroes = Gather::new();
                let mut missing = len;
                while missing > 0 {
                    let piece = missing.min(ZERO_RUN_BYTES);
                    zeroes.push(zero_bytes(piece as usize));
                    missing -= piece;
                }
                self.write_data(cx, next, zeroes).await?;
            }
            next += len;
        }
        Ok(())
    }
}

/// The entry after the subclusters in `mask` of `all` are cleared; `None`: no entry says that.
fn cleared(old: &L2View, mask: u32, all: u32, clear: Clear) -> Option<StandardCluster> {
    let old = match old {
        L2View::Standard(old) => *old,
        // Gone as a whole.
        L2View::Compressed(_) if mask == all => StandardCluster::ABSENT,
        L2View::Compressed(_) => return None,
    };
    let allocated = old.allocated & !mask;
    let zero = match clear.to {
        Become::Absent => old.zero & !mask,
        Become::Zero if clear.backed => old.zero | mask,
        // Where nothing lies below, what is absent is zero already.
        Become::Zero => old.zero | mask & old.allocated,
    };
    let keeps_host = allocated != 0 || (zero != 0 && !clear.unmap && old.copied);
    let host = old.host.filter(|_| keeps_host);
    Some(StandardCluster { host, copied: old.copied && host.is_some(), allocated, zero })
}
