//! Zero writes and discards: entries are changed, nothing is written.
//!
//! A cluster whose entry stops naming it is never used again; its space goes back to the storage in the round that
//! makes the change stable, and the rest is for a check to find.

use infill_base::{Ctx, ErrorKind, IoError, IoResult, ZeroFlags, whole_units, zero_bytes};
use infill_storage::sync::{Arc, lock};

use crate::entry::Cluster;
use crate::fault::Fault;
use crate::geometry::{GuestCluster, SLICE_ENTRIES};
use crate::image::Image;

impl Image {
    /// Makes a range of the disk read as zeroes; what is whole in clusters without data.
    pub(crate) async fn write_zeroes(
        self: &Arc<Image>,
        cx: &Ctx,
        at: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> IoResult<()> {
        let end = self.check_range(at, len)?;
        self.prepare(cx).await?;
        let geometry = self.layout.geometry;
        let aligned = |offset| geometry.in_cluster(offset) == 0 || offset == self.len();
        if flags.contains(ZeroFlags::NO_FALLBACK) && !(aligned(at) && aligned(end)) {
            let why = "parts of clusters can only be written, which is not faster than writing";
            return Err(IoError::new(ErrorKind::Unsupported, why).at(at, len).in_node(self.storage.name()));
        }
        let (first, last) = self.whole_clusters(at, end);
        if first >= last {
            return self.zero_parts(cx, at, end).await;
        }
        let whole = (geometry.guest_offset(first), geometry.guest_offset(last).min(end));
        self.zero_parts(cx, at, whole.0).await?;
        self.change_clusters(cx, first, last, Cluster::Zero).await?;
        self.zero_parts(cx, whole.1, end).await
    }

    /// Gives up a range of the disk: absent, where nothing lies below.
    pub(crate) async fn discard(self: &Arc<Image>, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        let end = self.check_range(at, len)?;
        self.check_writable()?;
        if !self.does_discard() || self.is_over_backing() {
            return Ok(());
        }
        self.prepare(cx).await?;
        let (first, last) = self.whole_clusters(at, end);
        self.change_clusters(cx, first, last, Cluster::Absent).await
    }

    /// First cluster that lies in the range as a whole, and first behind those. The disk's last one counts as whole.
    fn whole_clusters(&self, at: u64, end: u64) -> (GuestCluster, GuestCluster) {
        let geometry = self.layout.geometry;
        let (first, last) = whole_units(at, end, self.len(), geometry.cluster_bytes());
        (GuestCluster(geometry.clusters(first)), GuestCluster(geometry.clusters(last)))
    }

    /// Makes every cluster absent, over a backing too, and that stable. Nothing else is under way, and nothing links.
    pub(crate) async fn make_empty(self: &Arc<Image>, cx: &Ctx) -> IoResult<()> {
        self.forget(cx, 0, self.len()).await?;
        self.flush(cx).await
    }

    /// Makes the clusters of a range absent, over a backing too. Nothing links what was fetched for them before.
    pub(crate) async fn forget(self: &Arc<Image>, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        let end = self.check_range(at, len)?;
        self.check_writable()?;
        self.prepare(cx).await?;
        let (first, last) = self.whole_clusters(at, end);
        self.change_clusters_as(cx, first, last, Cluster::Absent, true).await
    }

    /// Makes parts of clusters read as zeroes: by a write, where they do not already.
    pub(crate) async fn zero_parts(self: &Arc<Image>, cx: &Ctx, at: u64, end: u64) -> IoResult<()> {
        for run in self.runs(cx, at, end).await? {
            let reads_zero = match run.what {
                Cluster::Zero => true,
                Cluster::Absent => !self.is_over_backing(),
                Cluster::Data(_) => false,
            };
            if !reads_zero {
                self.write(cx, run.at, zero_bytes((run.end - run.at) as usize).into()).await?;
            }
        }
        Ok(())
    }

    /// Makes the clusters `[first, last)` zero or absent. Those that read as zeroes because nothing lies below stay.
    pub(crate) async fn change_clusters(
        self: &Arc<Image>,
        cx: &Ctx,
        first: GuestCluster,
        last: GuestCluster,
        into: Cluster,
    ) -> IoResult<()> {
        self.change_clusters_as(cx, first, last, into, false).await
    }

    /// As [`Image::change_clusters`]; `emptied`: clusters may become absent over a backing.
    async fn change_clusters_as(
        self: &Arc<Image>,
        cx: &Ctx,
        first: GuestCluster,
        last: GuestCluster,
        into: Cluster,
        emptied: bool,
    ) -> IoResult<()> {
        let geometry = self.layout.geometry;
        let mut next = first.0;
        while next < last.0 {
            let slice_end = (next / u64::from(SLICE_ENTRIES) + 1) * u64::from(SLICE_ENTRIES);
            let end = slice_end.min(last.0);
            let run = self
                .run(
                    cx,
                    geometry.guest_offset(GuestCluster(next)),
                    geometry.guest_offset(GuestCluster(last.0)),
                )
                .await?;
            let absent_stays = into == Cluster::Absent || !self.is_over_backing();
            if run.what == into || run.what == Cluster::Absent && absent_stays {
                next = geometry.clusters(run.end).min(last.0);
                continue;
            }
            self.change_slice(cx, GuestCluster(next), end - next, into, emptied).await?;
            self.relieve(cx).await?;
            next = end;
        }
        Ok(())
    }

    /// As [`Image::change_clusters`], of clusters of one slice.
    async fn change_slice(
        self: &Arc<Image>,
        cx: &Ctx,
        first: GuestCluster,
        count: u64,
        into: Cluster,
        emptied: bool,
    ) -> IoResult<()> {
        let geometry = self.layout.geometry;
        let start = geometry.guest_offset(first);
        let _leave = self.leave(cx).await?;
        let pins = self.pin(cx, first, count).await?;
        let _range = self.ranges.exclusive(start, start + count * geometry.cluster_bytes()).await;
        // Asked again under the range: it may not become absent over a backing.
        let over_backing = self.is_over_backing() && !emptied;
        if into == Cluster::Absent && over_backing {
            return Ok(());
        }
        for nth in 0..count {
            let cluster = GuestCluster(first.0 + nth);
            match self.pinned(&pins, cluster)? {
                now if now == into => {}
                Cluster::Absent if !over_backing => {}
                Cluster::Data(host) => {
                    self.set(&pins, cluster, into);
                    if self.planted(Fault::EarlyReuse) {
                        self.space.cleaned(vec![host]);
                    } else {
                        lock(&self.freed).push(host);
                    }
                }
                Cluster::Absent | Cluster::Zero => self.set(&pins, cluster, into),
            }
        }
        Ok(())
    }
}
