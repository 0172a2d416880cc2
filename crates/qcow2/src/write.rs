//! Guest writes, and the one way in which anything local gets into the file and into a map: [`Image::store`].
//!
//! * What is mapped and nobody shares is written in place: a look-up, a write, no lock. On a storage that takes blocks
//!   only, such writes share their clusters' guest range, and one that is not whole blocks has it alone: what lies around
//!   it is read and written back. (A block is never larger than a (sub)cluster, so nobody else's data lie in it.)
//! * Everything else holds the clusters' guest range, and only it: other clusters, tables and rounds go on. What a
//!   copy-up needs from below is fetched before the range is taken, and counts only under its generation (I3a, I4).
//! * An entry is set when the payload's write has completed, and not before.
//! * A cluster whose *copied* flag is clear, or that is compressed, is copied: its old place is given back after the
//!   round that makes the new one stable.
//!
//! Clusters that were taken for a write that is dropped in the middle are not given back: the write goes on in the
//! storage. They leak until a check.

use bytes::{Bytes, BytesMut};
use futures_util::future::{join, join_all};
use infill_base::{Class, Ctx, Gather, IoResult, WriteFlags, align_down, align_up, is_zero, zero_bytes};
use infill_node::LinkGuard;
use infill_node::mapping::Slice;
use infill_storage::rt;
use infill_storage::sync::Arc;
use smallvec::SmallVec;

use crate::entry::{L2Entry, L2View, StandardCluster, SubclusterState};
use crate::geometry::{GuestCluster, GuestOffset, HostOffset};
use crate::image::Image;
use crate::lookup::{Place, Run};
use crate::metaio;
use crate::refcount::HostRun;
use crate::write_back::Freed;

/// Parts of one request that are written at once.
const PARTS_MAX: usize = 64;
/// Clusters that change under one hold of a guest range.
pub(crate) const CHANGE_CLUSTERS_MAX: u64 = 256;

/// What of a partly covered subcluster comes from below, up to its borders.
#[derive(Default)]
struct Edges {
    head: Option<Bytes>,
    tail: Option<Bytes>,
    /// The oldest under which any of it was fetched.
    generation: u64,
}

/// One cluster's share of a local write: `[lo, hi)` in the cluster, made of head, data and tail.
pub(crate) struct Plan {
    pub(crate) cluster: GuestCluster,
    pub(crate) slice: Arc<Slice>,
    pub(crate) index: usize,
    /// What the entry says now; the caller holds the cluster's range.
    pub(crate) old: L2View,
    pub(crate) lo: u64,
    pub(crate) hi: u64,
    pub(crate) head: Option<Bytes>,
    pub(crate) data: Gather,
    pub(crate) tail: Option<Bytes>,
}

impl Plan {
    /// Its host cluster, where it may be written in place.
    fn own_host(&self) -> Option<HostOffset> {
        match self.old {
            L2View::Standard(StandardCluster { host, copied: true, .. }) => host,
            _ => None,
        }
    }

    /// Whether it moves away from a place that somebody shares, or that is compressed.
    fn is_moved(&self) -> bool {
        match self.old {
            L2View::Standard(cluster) => cluster.host.is_some() && !cluster.copied,
            L2View::Compressed(_) => true,
        }
    }

    fn payload(self, zeroed: bool) -> (u64, Gather) {
        let keep = |edge: Option<Bytes>| edge.filter(|bytes| !(zeroed && is_zero(bytes)));
        let (head_len, head) = (self.head.as_ref().map_or(0, Bytes::len) as u64, keep(self.head));
        let start = if head.is_some() { self.lo } else { self.lo + head_len };
        let mut payload = Gather::new();
        head.into_iter().for_each(|bytes| payload.push(bytes));
        payload.append(self.data);
        keep(self.tail).into_iter().for_each(|bytes| payload.push(bytes));
        (start, payload)
    }
}

/// Appends a write, to the last one where it follows it in the file.
pub(crate) fn push_write(writes: &mut SmallVec<[(u64, Gather); 2]>, at: u64, data: Gather) {
    match writes.last_mut() {
        Some((start, last)) if *start + last.len() as u64 == at => last.append(data),
        _ => writes.push((at, data)),
    }
}

impl Image {
    /// Writes `data` from guest byte `at`.
    pub(crate) async fn write(
        self: &Arc<Image>,
        cx: &Ctx,
        at: u64,
        data: Gather,
        flags: WriteFlags,
    ) -> IoResult<()> {
        self.check(at, data.len() as u64)?;
        self.prepare().await?;
        match (data.is_empty(), flags.contains(WriteFlags::COMPRESSED)) {
            (true, _) => {}
            (false, false) => self.write_data(cx, at, data).await?,
            (false, true) => self.write_packed(cx, at, data).await?,
        }
        if flags.contains(WriteFlags::FUA) { self.sync().await } else { Ok(()) }
    }

    /// Writes `data`, which is not empty.
    pub(crate) async fn write_data(self: &Arc<Image>, cx: &Ctx, at: u64, data: Gather) -> IoResult<()> {
        let left = if self.takes_any_byte() {
            self.write_in_place(cx, at, data).await?
        } else {
            self.write_blocks_in_place(cx, at, data).await?
        };
        let Some(data) = left else { return Ok(()) };
        self.relieve().await?;
        self.write_parts(cx, at, data).await
    }

    /// Writes what is mapped as one run, and nobody shares; gives anything else back.
    async fn write_in_place(&self, cx: &Ctx, at: u64, data: Gather) -> IoResult<Option<Gather>> {
        let len = data.len() as u64;
        let mut flight = self.in_flight.enter();
        let run = self.run_at(cx, at, len).await?;
        let Place::Data { host, copied: true } = run.place else { return Ok(Some(data)) };
        if run.len < len {
            return Ok(Some(data));
        }
        if !run.checked {
            self.check_run(cx, at, run.len, host).await?;
        }
        flight.writes();
        let result = self.write_host(cx, host, data).await;
        flight.finish();
        result.map(|()| None)
    }

    /// As [`Image::write_in_place`], on a storage that takes blocks only.
    async fn write_blocks_in_place(
        self: &Arc<Image>,
        cx: &Ctx,
        at: u64,
        data: Gather,
    ) -> IoResult<Option<Gather>> {
        let len = data.len() as u64;
        let first = self.geometry.guest_cluster(GuestOffset(at)).0;
        let end = self.geometry.guest_cluster(GuestOffset(at + len - 1)).0 + 1;
        let ranges = &self.writer()?.ranges;
        if self.is_whole_blocks(at, len) {
            let _range = ranges.shared(first, end).await;
            return self.write_in_place(cx, at, data).await;
        }
        let range = ranges.exclusive(first, end).await;
        // Cut off in the middle, the bytes around would land on what others write there next.
        let (image, cx) = (self.clone(), *cx);
        rt::detached(async move {
            let _held = range;
            image.write_in_place(&cx, at, data).await
        })
        .await
    }

    /// Writes to host bytes that nobody else writes to meanwhile, whatever the storage's blocks.
    async fn write_host(&self, cx: &Ctx, host: u64, data: Gather) -> IoResult<()> {
        if self.is_whole_blocks(host, data.len() as u64) {
            return self.storage.write(cx, host, data, WriteFlags::empty()).await;
        }
        metaio::write(cx, &self.storage, host, data.to_bytes()).await
    }

    /// Cuts a write into what is written in place and what changes the map, all of it at once.
    async fn write_parts(self: &Arc<Image>, cx: &Ctx, at: u64, data: Gather) -> IoResult<()> {
        let end = at + data.len() as u64;
        let mut next = at;
        while next < end {
            let mut parts = Vec::new();
            while next < end && parts.len() < PARTS_MAX {
                let (len, in_place) = self.part(cx, next, end).await?;
                let part = data.slice((next - at) as usize, len as usize);
                let start = next;
                parts.push(async move {
                    if in_place {
                        Box::pin(self.write_data(cx, start, part)).await
                    } else {
                        self.change(cx, start, part).await
                    }
                });
                next += len;
            }
            if parts.len() == 1
                && let Some(part) = parts.pop()
            {
                part.await?;
            } else {
                // All of them end, whatever one of them says.
                join_all(parts).await.into_iter().collect::<IoResult<()>>()?;
            }
        }
        Ok(())
    }

    /// How much from `next` on is of one kind, and whether it is written in place.
    async fn part(&self, cx: &Ctx, next: u64, end: u64) -> IoResult<(u64, bool)> {
        let _flight = self.in_flight.enter();
        let in_place = |run: &Run| matches!(run.place, Place::Data { copied: true, .. });
        let first = self.run_at(cx, next, end - next).await?;
        if in_place(&first) {
            return Ok((first.len, true));
        }
        let clusters = self.geometry.guest_cluster(GuestOffset(next)).0 + CHANGE_CLUSTERS_MAX;
        let most = end.min(self.geometry.guest_offset(GuestCluster(clusters)).0);
        let mut to = (next + first.len).min(most);
        while to < most {
            let run = self.run_at(cx, to, most - to).await?;
            if in_place(&run) {
                break;
            }
            to += run.len;
        }
        Ok((to - next, false))
    }

    /// Writes data of which some is not yet mapped, or not ours alone.
    async fn change(self: &Arc<Image>, cx: &Ctx, at: u64, data: Gather) -> IoResult<()> {
        let end = at + data.len() as u64;
        let first = self.geometry.guest_cluster(GuestOffset(at)).0;
        let last = self.geometry.guest_cluster(GuestOffset(end - 1)).0;
        loop {
            let edges = self.fetch_edges(cx, at, end).await?;
            let steady = self.writer()?.steady.shared(0, 1).await;
            let range = self.writer()?.ranges.exclusive(first, last + 1).await;
            // What was absent may be present by now, and the reverse: look again.
            let Some((plans, link)) = self.plan(cx, at, &data, &edges).await? else { continue };
            if plans.iter().all(|plan| plan.own_host().is_none()) {
                return self.store(cx, plans).await;
            }
            // Into places that others may write to next, and more than the guest's own bytes: cut off in the middle,
            // it would land behind their back. So it is a task of its own that holds the range to its end.
            let (image, cx) = (self.clone(), *cx);
            return rt::detached(async move {
                let _held = (steady, range, link);
                image.store(&cx, plans).await
            })
            .await;
        }
    }

    /// Fetches what a copy-up of `[at, end)` needs from below. Nothing is held meanwhile.
    async fn fetch_edges(&self, cx: &Ctx, at: u64, end: u64) -> IoResult<Edges> {
        let unit = self.geometry.subcluster_bytes();
        let (start, stop) = (align_down(at, unit), align_up(end, unit));
        if start == at && stop == end {
            return Ok(Edges::default());
        }
        let generation = self.backing.generation();
        let (head_absent, tail_absent) = {
            let _flight = self.in_flight.enter();
            let head = start < at && self.run_at(cx, at, 1).await?.place == Place::Absent;
            (head, end < stop && self.run_at(cx, end - 1, 1).await?.place == Place::Absent)
        };
        let head =
            async { if head_absent { self.fetch_edge(cx, start, at).await.map(Some) } else { Ok(None) } };
        let tail =
            async { if tail_absent { self.fetch_edge(cx, end, stop).await.map(Some) } else { Ok(None) } };
        let (head, tail) = join(head, tail).await;
        let mut edges = Edges { generation, ..Edges::default() };
        let mut take = |edge: Option<(Bytes, u64)>| {
            edge.map(|(bytes, generation)| {
                edges.generation = edges.generation.min(generation);
                bytes
            })
        };
        let (head, tail) = (take(head?), take(tail?));
        Ok(Edges { head, tail, ..edges })
    }

    /// Bytes from below; zeroes behind the end of the disk, whatever lies there below.
    async fn fetch_edge(&self, cx: &Ctx, from: u64, to: u64) -> IoResult<(Bytes, u64)> {
        let inside = self.size().clamp(from, to) - from;
        let fetched = self.backing.fetch(cx, from, inside).await?;
        if inside == to - from {
            return Ok((fetched.data, fetched.generation));
        }
        let mut whole = BytesMut::zeroed((to - from) as usize);
        whole[..inside as usize].copy_from_slice(&fetched.data);
        Ok((whole.freeze(), fetched.generation))
    }

    /// What is to be written for each cluster, and the leave to link it. `None`: something is absent that the edges do
    /// not have, or the edge below has changed. The caller holds the range.
    async fn plan(
        self: &Arc<Image>,
        cx: &Ctx,
        at: u64,
        data: &Gather,
        edges: &Edges,
    ) -> IoResult<Option<(Vec<Plan>, Option<LinkGuard>)>> {
        let (end, mut next) = (at + data.len() as u64, at);
        let unit = self.geometry.subcluster_bytes();
        let (mut plans, mut from_below) = (Vec::new(), false);
        while next < end {
            let cluster = self.geometry.guest_cluster(GuestOffset(next));
            let start = self.geometry.guest_offset(cluster).0;
            let to = (start + self.geometry.cluster_bytes()).min(end);
            let (slice, index, old) = self.for_change(cx, cluster).await?;
            let (mut lo, mut hi) = (next - start, to - start);
            let state = |byte: u64| match &old {
                L2View::Standard(cluster) => cluster.state((byte / unit) as u32),
                L2View::Compressed(_) => SubclusterState::Data,
            };
            // Data beside what is written stays where it is, or is copied with its cluster.
            let edge = |fetched: &Option<Bytes>, byte: u64, len: u64| match state(byte) {
                _ if len == 0 => Some((None, false)),
                SubclusterState::Data => Some((None, false)),
                SubclusterState::Zero => Some((Some(zero_bytes(len as usize)), false)),
                SubclusterState::Absent => fetched.clone().map(|bytes| (Some(bytes), true)),
            };
            let head_edge = edge(&edges.head, lo, lo % unit);
            let tail_edge = edge(&edges.tail, hi - 1, align_up(hi, unit) - hi);
            let (Some((head, below)), Some((tail, also_below))) = (head_edge, tail_edge) else {
                return Ok(None);
            };
            lo -= head.as_ref().map_or(0, Bytes::len) as u64;
            hi += tail.as_ref().map_or(0, Bytes::len) as u64;
            from_below |= below | also_below;
            let data = data.slice((next - at) as usize, (to - next) as usize);
            plans.push(Plan { cluster, slice, index, old, lo, hi, head, data, tail });
            next = to;
        }
        let link = if from_below { self.backing.begin_link(edges.generation) } else { None };
        Ok((link.is_some() || !from_below).then_some((plans, link)))
    }

    /// The entry of a cluster that is to be changed: its slice stays cached while it is held.
    pub(crate) async fn for_change(
        self: &Arc<Image>,
        cx: &Ctx,
        cluster: GuestCluster,
    ) -> IoResult<(Arc<Slice>, usize, L2View)> {
        let table = self.table_for_change(cx, cluster).await?;
        let (_, l2_index) = self.geometry.indices(cluster);
        let (key, index) = self.slice_key(table.at, l2_index);
        let slice = self.slice(cx, key).await?;
        let view = self.view(&table, &slice, index, cluster)?;
        Ok((slice, index, view))
    }

    /// Writes the payloads, then sets the entries. The caller holds the range of every cluster.
    pub(crate) async fn store(self: &Arc<Image>, cx: &Ctx, plans: Vec<Plan>) -> IoResult<()> {
        for plan in &plans {
            if let Some(host) = plan.own_host()
                && !plan.slice.is_checked()
            {
                self.check_host(cx, host.0, self.geometry.cluster_bytes()).await?;
            }
        }
        let needed = plans.iter().filter(|plan| plan.own_host().is_none()).count() as u64;
        let runs = self.take_all(cx, needed).await?;
        let stored = self.write_plans(cx, plans, &runs).await;
        if stored.is_err() {
            runs.iter().for_each(|run| self.give_back(cx, *run));
        }
        stored
    }

    /// Takes `count` host clusters, in as few runs as there are.
    pub(crate) async fn take_all(
        self: &Arc<Image>,
        cx: &Ctx,
        count: u64,
    ) -> IoResult<SmallVec<[HostRun; 2]>> {
        let (mut runs, mut left) = (SmallVec::<[HostRun; 2]>::new(), count);
        while left > 0 {
            match self.take_clusters(cx, left).await {
                Ok(run) => {
                    left -= run.count;
                    runs.push(run);
                }
                Err(error) => {
                    runs.iter().for_each(|run| self.give_back(cx, *run));
                    return Err(error);
                }
            }
        }
        Ok(runs)
    }

    async fn write_plans(self: &Arc<Image>, cx: &Ctx, plans: Vec<Plan>, runs: &[HostRun]) -> IoResult<()> {
        let mut fresh = runs.iter().flat_map(|run| {
            (run.first.0..run.first.0 + run.count)
                .map(|cluster| (cluster << self.geometry.cluster_bits(), run.zeroed))
        });
        let mut writes = SmallVec::new();
        let mut links = Vec::with_capacity(plans.len());
        let mut in_place = false;
        for mut plan in plans {
            let own = plan.own_host();
            in_place |= own.is_some();
            let Some((host, zeroed)) = own.map(|host| (host.0, false)).or_else(|| fresh.next()) else {
                return Err(self.corrupt("fewer clusters were taken than are needed"));
            };
            let moved = plan.is_moved();
            let entry = self.entry_after(&plan, host);
            let link = (plan.slice.clone(), plan.index, plan.old, entry);
            if moved {
                plan = self.whole_cluster(cx, plan).await?;
            }
            links.push(link);
            let (start, payload) = plan.payload(zeroed);
            push_write(&mut writes, host + start, payload);
        }
        self.write_payload(cx, writes, in_place).await?;
        for (slice, index, old, entry) in links {
            self.link(&slice, index, old, entry);
        }
        Ok(())
    }

    /// Writes payload. For a job's, nothing of it stays a dirty page, which a guest's FLUSH would have to wait for.
    pub(crate) async fn write_payload(
        &self,
        cx: &Ctx,
        writes: SmallVec<[(u64, Gather); 2]>,
        in_place: bool,
    ) -> IoResult<()> {
        let write = |(at, data): (u64, Gather)| async move {
            let len = data.len() as u64;
            self.write_host(cx, at, data).await?;
            if cx.class == Class::Fill { self.storage.write_back(cx, at, len).await } else { Ok(()) }
        };
        let mut flight = self.in_flight.enter();
        if in_place {
            flight.writes();
        }
        let mut writes = writes;
        let result = match (writes.len(), writes.pop()) {
            (1, Some(one)) => write(one).await,
            (_, last) => join_all(writes.into_iter().chain(last).map(write)).await.into_iter().collect(),
        };
        flight.finish();
        result
    }

    /// The entry once the plan's payload is at `host`.
    fn entry_after(&self, plan: &Plan, host: u64) -> StandardCluster {
        let touched = self.subclusters(plan.lo, plan.hi);
        let (allocated, zero) = match plan.old {
            L2View::Standard(old) => (old.allocated | touched, old.zero & !touched),
            L2View::Compressed(_) => (self.geometry.subcluster_mask(), 0),
        };
        StandardCluster { host: Some(HostOffset(host)), copied: true, allocated, zero }
    }

    /// A bit for each subcluster of which `[lo, hi)` of a cluster has any byte.
    pub(crate) fn subclusters(&self, lo: u64, hi: u64) -> u32 {
        let unit = self.geometry.subcluster_bytes();
        let (first, end) = (lo / unit, hi.div_ceil(unit));
        (((1_u64 << end) - 1) & !((1_u64 << first) - 1)) as u32
    }

    /// Sets an entry, and notes what it no longer names.
    pub(crate) fn link(
        self: &Arc<Image>,
        slice: &Arc<Slice>,
        index: usize,
        old: L2View,
        new: StandardCluster,
    ) {
        let entry = L2Entry::standard(new, &self.geometry);
        if self.entry(slice, index) == entry {
            return;
        }
        self.set_entry(slice, index, entry);
        match old {
            L2View::Compressed(cluster) => self.unmapped(Freed::compressed(cluster, &self.geometry)),
            L2View::Standard(StandardCluster { host: Some(host), .. }) if new.host != Some(host) => {
                self.unmapped(Freed::data(self.geometry.host_cluster(host), new.host.is_none()));
            }
            L2View::Standard(_) => {}
        }
    }

    /// The plan for the whole of a cluster that moves: its old data under what is written.
    async fn whole_cluster(&self, cx: &Ctx, plan: Plan) -> IoResult<Plan> {
        let bytes = self.geometry.cluster_bytes();
        let at = self.geometry.guest_offset(plan.cluster).0;
        let mut whole = match plan.old {
            _ if plan.lo == 0 && plan.hi == bytes => return Ok(plan),
            L2View::Compressed(cluster) => BytesMut::from(&self.unpack(cx, at, cluster).await?[..]),
            L2View::Standard(StandardCluster { host: Some(host), allocated, .. }) if allocated != 0 => {
                if host.0 >= self.storage.len() {
                    let why =
                        format!("an L2 entry names data at byte {}, behind the end of the file", host.0);
                    return Err(self.corrupt(why).at(at, bytes));
                }
                metaio::read(cx, &self.storage, host.0, bytes as usize).await?
            }
            L2View::Standard(_) => BytesMut::zeroed(bytes as usize),
        };
        let mut next = plan.lo as usize;
        let runs = plan.head.iter().chain(plan.data.runs()).chain(&plan.tail);
        for run in runs {
            whole[next..next + run.len()].copy_from_slice(run);
            next += run.len();
        }
        Ok(Plan { lo: 0, hi: bytes, head: None, data: whole.freeze().into(), tail: None, ..plan })
    }
}
