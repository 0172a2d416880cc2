//! Populate: compare-and-link (I3). The payload goes to clusters that nothing names, without any hold; the guest range
//! is held for the compare alone, which is memory only. A guest's write that linked first wins.

use bytes::Bytes;
use infill_base::{Class, Ctx, ErrorKind, Gather, IoError, IoResult, is_zero};
use infill_node::Populated;
use infill_storage::sync::Arc;

use crate::entry::Cluster;
use crate::fault::Fault;
use crate::geometry::{GuestCluster, HostOffset};
use crate::image::Image;
use crate::space::Taken;
use crate::tables::Run;

/// Clusters that are linked together.
struct Group {
    first: GuestCluster,
    count: u64,
    /// Guest bytes of them, up to the end of what is populated.
    bytes: u64,
}

impl Image {
    pub(crate) async fn populate(
        self: &Arc<Image>,
        cx: &Ctx,
        at: u64,
        data: &Bytes,
        generation: u64,
    ) -> IoResult<Populated> {
        let end = self.check_populate(at, data.len() as u64)?;
        self.prepare(cx).await?;
        let mut done = Populated::default();
        for run in self.runs(cx, at, end).await? {
            if run.what != Cluster::Absent {
                done.lost += run.end - run.at;
                continue;
            }
            let mut next = run.at;
            while next < run.end {
                let (group, zero) = self
                    .group(&run, next, |from, to| is_zero(&data[(from - at) as usize..(to - at) as usize]));
                let part = data.slice((next - at) as usize..(next - at + group.bytes) as usize);
                next += group.bytes;
                let linked = if zero {
                    self.link(cx, &group, None, generation).await?
                } else {
                    self.write_and_link_absent(cx, &group, part, generation).await?
                };
                add(&mut done, linked);
            }
        }
        self.relieve(cx).await?;
        Ok(done)
    }

    pub(crate) async fn populate_zero(
        self: &Arc<Image>,
        cx: &Ctx,
        at: u64,
        len: u64,
        generation: u64,
    ) -> IoResult<Populated> {
        let end = self.check_populate(at, len)?;
        self.prepare(cx).await?;
        let (mut done, mut next) = (Populated::default(), at);
        while next < end {
            let run = self.run(cx, next, end).await?;
            if run.what == Cluster::Absent {
                // A slice's worth at once: an absent run may be a whole table long.
                let until = run.end.min(next + (infill_node::mapping::SLICE_BYTES as u64 / 8) * self.unit());
                let run = Run { end: until, ..run };
                let (group, _) = self.group(&run, next, |_, _| true);
                add(&mut done, self.link(cx, &group, None, generation).await?);
                next += group.bytes;
            } else {
                done.lost += run.end - run.at;
                next = run.end;
            }
        }
        self.relieve(cx).await?;
        Ok(done)
    }

    /// The end of a range that begins with a cluster. If it ends in one, that is where the disk ends, or ended until
    /// a moment ago: then the cluster has become present before the disk became longer.
    fn check_populate(&self, at: u64, len: u64) -> IoResult<u64> {
        if !at.is_multiple_of(self.unit()) {
            let why = "only whole clusters can be populated";
            return Err(IoError::new(ErrorKind::InvalidInput, why).at(at, len).in_node(self.storage.name()));
        }
        self.check_range(at, len)
    }

    /// What becomes present on its own, in bytes.
    pub(crate) fn unit(&self) -> u64 {
        self.layout.geometry.cluster_bytes()
    }

    /// The clusters from guest byte `from` of an absent run that are all zero, or all not, and whether they are zero.
    fn group(&self, run: &Run, from: u64, zero: impl Fn(u64, u64) -> bool) -> (Group, bool) {
        let end_of = |start: u64| (start + self.unit()).min(run.end);
        let kind = zero(from, end_of(from));
        let mut end = end_of(from);
        while end < run.end && zero(end, end_of(end)) == kind {
            end = end_of(end);
        }
        let first = self.layout.geometry.guest_cluster(from);
        (Group { first, count: (end - from).div_ceil(self.unit()), bytes: end - from }, kind)
    }

    async fn write_and_link_absent(
        self: &Arc<Image>,
        cx: &Ctx,
        group: &Group,
        data: Bytes,
        generation: u64,
    ) -> IoResult<Populated> {
        let taken = self.take(cx, group.count).await?;
        let len = data.len() as u64;
        let written = async {
            self.write_payload(cx, taken.at, Gather::from(data)).await?;
            if cx.class == Class::Fill {
                self.storage.write_back(cx, taken.at.0, len).await?;
            }
            Ok(())
        };
        if let Err(error) = written.await {
            self.space.give_back(taken);
            return Err(error);
        }
        self.link(cx, group, Some(taken), generation).await
    }

    /// Links clusters of a group that are still absent, to what was written for them or as zero.
    async fn link(
        self: &Arc<Image>,
        cx: &Ctx,
        group: &Group,
        taken: Option<Taken>,
        generation: u64,
    ) -> IoResult<Populated> {
        let geometry = self.layout.geometry;
        let _leave = self.leave(cx).await?;
        let pins = self.pin(cx, group.first, group.count).await?;
        let start = geometry.guest_offset(group.first);
        let _range = self.ranges.exclusive(start, start + group.count * self.unit()).await;
        let own = |nth: u64| {
            taken.map(|taken| Taken { at: HostOffset(taken.at.0 + nth * self.unit()), clusters: 1 })
        };
        let Some(_link) = self.backing.begin_link(generation) else {
            (0..group.count).filter_map(own).for_each(|own| self.space.give_back(own));
            return Ok(Populated { stale: group.bytes, ..Populated::default() });
        };
        let mut done = Populated::default();
        for nth in 0..group.count {
            let cluster = GuestCluster(group.first.0 + nth);
            let bytes = self.unit().min(group.bytes - nth * self.unit());
            if self.pinned(&pins, cluster)? == Cluster::Absent {
                let what = own(nth).map_or(Cluster::Zero, |own| Cluster::Data(own.at));
                if self.planted(Fault::PopulateUnrecorded) {
                    self.set_unrecorded(&pins, cluster, what);
                }
                self.set(&pins, cluster, what);
                done.linked += bytes;
            } else {
                own(nth).into_iter().for_each(|own| self.space.give_back(own));
                done.lost += bytes;
            }
        }
        Ok(done)
    }
}

fn add(sum: &mut Populated, more: Populated) {
    sum.linked += more.linked;
    sum.lost += more.lost;
    sum.stale += more.stale;
}
