//! What the tables say: look-ups, slices that are held for a change, new L2 tables.
//!
//! Both tables are used slice by slice (4 KiB each), so memory does not depend on their length. What an entry names is
//! checked whenever it is used: an image may say anything.

use infill_base::{Ctx, ErrorKind, IoResult};
use infill_node::mapping::{SLICE_BYTES, Slice, SliceCache, SliceKey};
use infill_storage::sync::{Arc, lock};
use infill_storage::unaligned;
use smallvec::SmallVec;

use crate::entry::{Cluster, EntryError, l2_table};
use crate::fault::Fault;
use crate::geometry::{GuestCluster, HostOffset, L1Index, L2Index, SLICE_ENTRIES};
use crate::image::Image;

/// Guest bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// First guest byte.
    pub at: u64,
    /// First guest byte behind it.
    pub end: u64,
    /// What it is; of data, where the byte at `at` lies.
    pub what: Cluster,
}

/// Slices that are held while their entries change: they stay cached.
pub(crate) struct Pins(SmallVec<[Pin; 2]>);

struct Pin {
    slice: Arc<Slice>,
    /// Guest cluster of the slice's first entry.
    first: u64,
}

impl Pins {
    fn at(&self, cluster: GuestCluster) -> (&Arc<Slice>, usize) {
        let behind = self.0.partition_point(|pin| pin.first <= cluster.0);
        let pin = &self.0[behind - 1];
        (&pin.slice, (cluster.0 - pin.first) as usize)
    }
}

fn place(index: u32) -> (u32, usize) {
    (index / SLICE_ENTRIES, (index % SLICE_ENTRIES) as usize)
}

impl Image {
    pub(crate) async fn slice(
        &self,
        cx: &Ctx,
        cache: &SliceCache,
        table: HostOffset,
        index: u32,
    ) -> IoResult<Arc<Slice>> {
        let key = SliceKey { table: table.0, index };
        let at = table.0 + u64::from(index) * SLICE_BYTES as u64;
        cache.get(key, || unaligned::read(cx, &self.storage, at, SLICE_BYTES)).await
    }

    /// The L2 table that describes what the L1 entry stands for.
    async fn l2_table(&self, cx: &Ctx, l1: L1Index) -> IoResult<Option<HostOffset>> {
        let (slice, entry) = place(l1.0);
        let slice = self.slice(cx, &self.l1, self.layout.l1, slice).await?;
        let raw = slice.load(entry)[0];
        l2_table(raw, &self.layout, self.space.end()).map_err(|error| self.corrupt(error))
    }

    fn corrupt(&self, error: EntryError) -> infill_base::IoError {
        infill_base::IoError::from(error).in_node(self.storage.name())
    }

    /// What an entry says, if it may say that.
    fn view(&self, slice: &Slice, entry: usize) -> IoResult<Cluster> {
        let raw = slice.load(entry)[0];
        Cluster::checked(raw, &self.layout, self.space.end()).map_err(|error| self.corrupt(error))
    }

    /// The longest run from `at`, at most to `end`, that one slice (or an L1 entry without a table) tells.
    pub(crate) async fn run(&self, cx: &Ctx, at: u64, end: u64) -> IoResult<Run> {
        let geometry = &self.layout.geometry;
        let cluster = geometry.guest_cluster(at);
        let (l1, l2) = geometry.indices(cluster);
        let Some(table) = self.l2_table(cx, l1).await? else {
            let table_end = geometry.guest_offset(geometry.cluster_at(l1, L2Index(0)));
            let table_end = table_end.saturating_add(geometry.table_guest_bytes());
            return Ok(Run { at, end: end.min(table_end), what: Cluster::Absent });
        };
        let (slice, entry) = place(l2.0);
        let slice = self.slice(cx, &self.l2, table, slice).await?;
        let mut what = self.view(&slice, entry)?;
        if let Cluster::Data(host) = &mut what {
            host.0 += geometry.in_cluster(at);
        }
        let mut next = geometry.guest_offset(cluster) + geometry.cluster_bytes();
        for entry in entry + 1..SLICE_ENTRIES as usize {
            let expected = match what {
                Cluster::Data(host) => Cluster::Data(HostOffset(host.0 + (next - at))),
                other => other,
            };
            // An entry that may not be is told when it is asked for.
            if next >= end || !self.view(&slice, entry).is_ok_and(|found| found == expected) {
                break;
            }
            next += geometry.cluster_bytes();
        }
        Ok(Run { at, end: next.min(end), what })
    }

    /// All runs of `[at, end)`.
    pub(crate) async fn runs(&self, cx: &Ctx, at: u64, end: u64) -> IoResult<SmallVec<[Run; 4]>> {
        let (mut runs, mut next) = (SmallVec::new(), at);
        while next < end {
            let run = self.run(cx, next, end).await?;
            next = run.end;
            runs.push(run);
        }
        Ok(runs)
    }

    /// Holds the slices of `count` clusters from `first`, for a change of their entries. Makes L2 tables that are
    /// missing: the caller has leave to allocate.
    pub(crate) async fn pin(self: &Arc<Image>, cx: &Ctx, first: GuestCluster, count: u64) -> IoResult<Pins> {
        let geometry = &self.layout.geometry;
        let (mut pins, mut next) = (SmallVec::new(), first.0);
        while next < first.0 + count {
            let (l1, l2) = geometry.indices(GuestCluster(next));
            let (slice, entry) = place(l2.0);
            let table = match self.l2_table(cx, l1).await? {
                Some(table) => table,
                None => self.make_table(cx, l1, slice).await?,
            };
            let slice = self.slice(cx, &self.l2, table, slice).await?;
            let first = next - entry as u64;
            next = first + u64::from(SLICE_ENTRIES);
            pins.push(Pin { slice, first });
        }
        Ok(Pins(pins))
    }

    /// What a held entry says.
    pub(crate) fn pinned(&self, pins: &Pins, cluster: GuestCluster) -> IoResult<Cluster> {
        let (slice, entry) = pins.at(cluster);
        self.view(slice, entry)
    }

    /// Sets a held entry. The caller holds the cluster's guest range alone, and what is named is completely written.
    pub(crate) fn set(self: &Arc<Image>, pins: &Pins, cluster: GuestCluster, what: Cluster) {
        let (slice, entry) = pins.at(cluster);
        self.set_recorded(&self.l2, slice, entry, what.raw());
    }

    /// The planted mistake: an entry is set behind the journal's back.
    pub(crate) fn set_unrecorded(&self, pins: &Pins, cluster: GuestCluster, what: Cluster) {
        let (slice, entry) = pins.at(cluster);
        self.l2.set(slice, entry, [what.raw(), 0]);
    }

    /// Makes a new L2 table: any number of them at once, each once.
    async fn make_table(self: &Arc<Image>, cx: &Ctx, l1: L1Index, first_slice: u32) -> IoResult<HostOffset> {
        let _making = self.making.exclusive(l1.0.into(), u64::from(l1.0) + 1).await;
        if let Some(table) = self.l2_table(cx, l1).await? {
            return Ok(table);
        }
        let geometry = &self.layout.geometry;
        let taken = self.take(cx, geometry.table_clusters().into()).await?;
        // So that its write-back, after writes were acknowledged, cannot meet a full disk.
        match self.storage.allocate(cx, taken.at.0, geometry.table_bytes()).await {
            Err(error) if error.kind() != ErrorKind::Unsupported => {
                self.space.give_back(taken);
                return Err(error);
            }
            _ => {}
        }
        // Zero in the file: what is not set in it needs no write.
        self.l2.insert_zeroed(SliceKey { table: taken.at.0, index: first_slice });
        lock(&self.new_tables).insert(taken.at.0, false);
        let (slice, entry) = place(l1.0);
        let slice = self.slice(cx, &self.l1, self.layout.l1, slice).await?;
        if self.planted(Fault::TableUnrecorded) {
            self.l1.set(&slice, entry, [taken.at.0, 0]);
        }
        self.set_recorded(&self.l1, &slice, entry, taken.at.0);
        lock(&self.new_tables).insert(taken.at.0, true);
        Ok(taken.at)
    }
}
