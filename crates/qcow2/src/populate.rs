//! Populate: data from below into what is still absent, linked by compare.
//!
//! *The guest's write always wins* (I3). A whole cluster that has no host cluster is written to a fresh one while nothing
//! is held; then its range is held, in memory, to compare and link: whatever a guest has linked first stays, and the
//! fresh cluster is given back. Subclusters of one cluster have one place, which they share with what others write or
//! populate beside them: its range is held for the local write of those that are still absent. Everything is linked under the generation of the edge that
//! the data came with (I3a).

use bytes::{Bytes, BytesMut};
use infill_base::{Ctx, Gather, IoResult, align_up, zero_bytes};
use infill_node::Populated;
use infill_node::mapping::Slice;
use infill_storage::rt;
use infill_storage::sync::Arc;
use smallvec::SmallVec;

use crate::entry::{L2View, StandardCluster};
use crate::geometry::{GuestCluster, GuestOffset, HostCluster};
use crate::image::Image;
use crate::refcount::HostRun;
use crate::write::{CHANGE_CLUSTERS_MAX, Plan, push_write};

/// Bytes of one piece where zeroes have to be populated as data.
const ZERO_POPULATE_BYTES: u64 = 1 << 20;

/// A cluster's share of a populate.
struct Share {
    cluster: GuestCluster,
    /// Its bytes in the cluster.
    lo: u64,
    hi: u64,
    /// They, up to the end of a (sub)cluster.
    data: Bytes,
    slice: Arc<Slice>,
    index: usize,
}

impl Image {
    /// Writes those bytes of `data` that are still absent.
    pub(crate) async fn populate(
        self: &Arc<Image>,
        cx: &Ctx,
        at: u64,
        data: Bytes,
        generation: u64,
    ) -> IoResult<Populated> {
        self.check(at, data.len() as u64)?;
        self.prepare().await?;
        let (mut done, mut next, end) = (Populated::default(), at, at + data.len() as u64);
        while next < end {
            self.relieve().await?;
            let first = self.geometry.guest_cluster(GuestOffset(next)).0;
            let to = self.geometry.guest_offset(GuestCluster(first + CHANGE_CLUSTERS_MAX)).0.min(end);
            let part = data.slice((next - at) as usize..(to - at) as usize);
            self.populate_clusters(cx, next, part, generation, &mut done).await?;
            next = to;
        }
        Ok(done)
    }

    async fn populate_clusters(
        self: &Arc<Image>,
        cx: &Ctx,
        at: u64,
        data: Bytes,
        generation: u64,
        done: &mut Populated,
    ) -> IoResult<()> {
        let steady = Arc::new(self.writer()?.steady.shared(0, 1).await);
        let (mut fresh, mut partial) = (Vec::new(), Vec::new());
        for share in self.shares(cx, at, &data, done).await? {
            let whole = share.lo == 0 && share.data.len() as u64 == self.geometry.cluster_bytes();
            match self.share_view(&share)? {
                // Neighbouring pieces of one cluster, populated at once, would each take one of their own else.
                L2View::Standard(cluster) if cluster.host.is_none() && whole => fresh.push(share),
                _ => partial.push(share),
            }
        }
        if !fresh.is_empty() {
            partial.extend(self.populate_fresh(cx, fresh, generation, done).await?);
        }
        for share in partial {
            let (image, cx, steady) = (self.clone(), *cx, steady.clone());
            // A task of its own, as any write to a place that others may write to next.
            let part = rt::detached(async move {
                let _steady = steady;
                image.populate_partial(&cx, share, generation).await
            })
            .await?;
            done.linked += part.linked;
            done.lost += part.lost;
            done.stale += part.stale;
        }
        Ok(())
    }

    /// The clusters of the range in which anything is absent; the rest is lost to whoever wrote it.
    async fn shares(
        self: &Arc<Image>,
        cx: &Ctx,
        at: u64,
        data: &Bytes,
        done: &mut Populated,
    ) -> IoResult<Vec<Share>> {
        let (mut shares, mut next, end) = (Vec::new(), at, at + data.len() as u64);
        while next < end {
            let cluster = self.geometry.guest_cluster(GuestOffset(next));
            let start = self.geometry.guest_offset(cluster).0;
            let to = (start + self.geometry.cluster_bytes()).min(end);
            // Tables and slices are there before any range is held.
            let (slice, index, old) = self.for_change(cx, cluster).await?;
            let part = data.slice((next - at) as usize..(to - at) as usize);
            let share = Share {
                cluster,
                lo: next - start,
                hi: to - start,
                data: self.whole_units_of(part),
                slice,
                index,
            };
            if self.absent(&old) & self.subclusters(share.lo, share.hi) == 0 {
                done.lost += to - next;
            } else {
                shares.push(share);
            }
            next = to;
        }
        Ok(shares)
    }

    /// The end of the disk need not be that of a (sub)cluster: what lies behind reads as zeroes.
    fn whole_units_of(&self, part: Bytes) -> Bytes {
        let len = align_up(part.len() as u64, self.geometry.subcluster_bytes()) as usize;
        if len == part.len() {
            return part;
        }
        let mut whole = BytesMut::zeroed(len);
        whole[..part.len()].copy_from_slice(&part);
        whole.freeze()
    }

    fn absent(&self, view: &L2View) -> u32 {
        match view {
            L2View::Standard(cluster) => cluster.absent(&self.geometry),
            L2View::Compressed(_) => 0,
        }
    }

    /// What the share's entry says now. Its table is ours alone, and stays.
    fn share_view(&self, share: &Share) -> IoResult<L2View> {
        let Some(table) = self.table(share.cluster)? else {
            return Ok(L2View::Standard(StandardCluster::ABSENT));
        };
        self.view(&table, &share.slice, share.index, share.cluster)
    }

    /// Bytes of the share that lie in the subclusters of `mask`.
    fn bytes_in(&self, share: &Share, mask: u32) -> u64 {
        let unit = self.geometry.subcluster_bytes();
        let bits = (0..self.geometry.subclusters()).filter(|bit| mask >> bit & 1 != 0);
        let bytes = |bit: u32| {
            let (start, end) = (u64::from(bit) * unit, u64::from(bit + 1) * unit);
            end.min(share.hi).saturating_sub(start.max(share.lo))
        };
        bits.map(bytes).sum()
    }

    /// Writes shares to fresh clusters, then links those that are still absent. Gives back the ones that got a host
    /// cluster meanwhile.
    async fn populate_fresh(
        self: &Arc<Image>,
        cx: &Ctx,
        shares: Vec<Share>,
        generation: u64,
        done: &mut Populated,
    ) -> IoResult<Vec<Share>> {
        let runs = self.take_all(cx, shares.len() as u64).await?;
        let hosts: Vec<HostRun> = runs
            .iter()
            .flat_map(|run| {
                (0..run.count).map(|nth| HostRun {
                    first: HostCluster(run.first.0 + nth),
                    count: 1,
                    zeroed: run.zeroed,
                })
            })
            .collect();
        let mut writes: SmallVec<[(u64, Gather); 2]> = SmallVec::new();
        for (share, host) in shares.iter().zip(&hosts) {
            let at = self.geometry.host_offset(host.first).0 + share.lo;
            push_write(&mut writes, at, share.data.clone().into());
        }
        if let Err(error) = self.write_payload(cx, writes, false).await {
            runs.iter().for_each(|run| self.give_back(cx, *run));
            return Err(error);
        }
        let (Some(first), Some(last)) = (shares.first(), shares.last()) else { return Ok(Vec::new()) };
        let _range = self.writer()?.ranges.exclusive(first.cluster.0, last.cluster.0 + 1).await;
        let Some(_link) = self.backing.begin_link(generation) else {
            runs.iter().for_each(|run| self.give_back(cx, *run));
            done.stale += shares.iter().map(|share| share.hi - share.lo).sum::<u64>();
            return Ok(Vec::new());
        };
        let mut again = Vec::new();
        for (share, host) in shares.into_iter().zip(hosts) {
            let wanted = self.subclusters(share.lo, share.hi);
            match self.share_view(&share)? {
                L2View::Standard(old) if old.host.is_none() => {
                    let linked = old.absent(&self.geometry) & wanted;
                    if linked == 0 {
                        self.give_back(cx, host);
                    } else {
                        let at = self.geometry.host_offset(host.first);
                        let new = StandardCluster {
                            host: Some(at),
                            copied: true,
                            allocated: linked,
                            zero: old.zero,
                        };
                        #[cfg(feature = "planted-faults")]
                        self.plant_unrecorded(&share.slice, share.index, new);
                        self.link(&share.slice, share.index, L2View::Standard(old), new);
                    }
                    let bytes = self.bytes_in(&share, linked);
                    done.linked += bytes;
                    done.lost += share.hi - share.lo - bytes;
                }
                _ => {
                    // A guest was first. What it left absent of the cluster has its place now.
                    self.give_back(cx, host);
                    again.push(share);
                }
            }
        }
        Ok(again)
    }

    /// Writes what is still absent of a cluster that has its host cluster, while its range is held.
    async fn populate_partial(
        self: &Arc<Image>,
        cx: &Ctx,
        share: Share,
        generation: u64,
    ) -> IoResult<Populated> {
        let len = share.hi - share.lo;
        let unit = self.geometry.subcluster_bytes();
        let wanted = self.subclusters(share.lo, share.hi);
        let _range = self.writer()?.ranges.exclusive(share.cluster.0, share.cluster.0 + 1).await;
        let Some(_link) = self.backing.begin_link(generation) else {
            return Ok(Populated { stale: len, ..Populated::default() });
        };
        let mut linked = 0;
        loop {
            // Each look sees what the last round of this loop has stored.
            let old = self.share_view(&share)?;
            let absent = self.absent(&old) & wanted;
            if absent == 0 {
                break;
            }
            let bit = absent.trailing_zeros();
            let count = (absent >> bit).trailing_ones();
            let (lo, hi) = (u64::from(bit) * unit, u64::from(bit + count) * unit);
            let data = share.data.slice((lo - share.lo) as usize..(hi - share.lo) as usize);
            let plan = Plan {
                cluster: share.cluster,
                slice: share.slice.clone(),
                index: share.index,
                old,
                lo,
                hi,
                head: None,
                data: data.into(),
                tail: None,
            };
            self.store(cx, vec![plan]).await?;
            linked += self.bytes_in(&share, self.subclusters(lo, hi));
        }
        Ok(Populated { linked, lost: len - linked, stale: 0 })
    }

    /// Makes what is still absent of the range zero.
    pub(crate) async fn populate_zero(
        self: &Arc<Image>,
        cx: &Ctx,
        at: u64,
        len: u64,
        generation: u64,
    ) -> IoResult<Populated> {
        self.check(at, len)?;
        self.prepare().await?;
        let (mut done, mut next, end) = (Populated::default(), at, at + len);
        while next < end {
            self.relieve().await?;
            let zero_clusters = self.geometry.has_zero_clusters();
            let most =
                if zero_clusters { self.slice_end(next) } else { next.saturating_add(ZERO_POPULATE_BYTES) };
            let to = most.min(end);
            if zero_clusters {
                self.populate_zero_slice(cx, next, to, generation, &mut done).await?;
            } else {
                let part = self.populate(cx, next, zero_bytes((to - next) as usize), generation).await?;
                done.linked += part.linked;
                done.lost += part.lost;
                done.stale += part.stale;
            }
            next = to;
        }
        Ok(done)
    }

    /// Sets what is absent in `[at, end)`, which one slice describes, to zero.
    async fn populate_zero_slice(
        self: &Arc<Image>,
        cx: &Ctx,
        at: u64,
        end: u64,
        generation: u64,
        done: &mut Populated,
    ) -> IoResult<()> {
        let geometry = &self.geometry;
        let first = geometry.guest_cluster(GuestOffset(at));
        let last = geometry.guest_cluster(GuestOffset(end - 1));
        let _steady = self.writer()?.steady.shared(0, 1).await;
        let (slice, index, _) = self.for_change(cx, first).await?;
        let _range = self.writer()?.ranges.exclusive(first.0, last.0 + 1).await;
        let Some(_link) = self.backing.begin_link(generation) else {
            done.stale += end - at;
            return Ok(());
        };
        for cluster in (first.0..=last.0).map(GuestCluster) {
            let start = geometry.guest_offset(cluster).0;
            let share = Share {
                cluster,
                lo: at.max(start) - start,
                hi: end.min(start + geometry.cluster_bytes()) - start,
                data: Bytes::new(),
                slice: slice.clone(),
                index: index + (cluster.0 - first.0) as usize,
            };
            let old = self.share_view(&share)?;
            let absent = self.absent(&old) & self.subclusters(share.lo, share.hi);
            if let L2View::Standard(cluster) = old
                && absent != 0
            {
                let new = StandardCluster { zero: cluster.zero | absent, ..cluster };
                #[cfg(feature = "planted-faults")]
                self.plant_unrecorded(&share.slice, share.index, new);
                self.link(&share.slice, share.index, old, new);
            }
            let linked = self.bytes_in(&share, absent);
            done.linked += linked;
            done.lost += share.hi - share.lo - linked;
        }
        Ok(())
    }
}
