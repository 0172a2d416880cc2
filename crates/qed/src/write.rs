//! Guests' writes: in place where there is data, otherwise into fresh clusters that are linked when they are written.

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use infill_base::{Ctx, Gather, IoResult, align_down, align_up, is_zero};
use infill_storage::sync::Arc;

use crate::entry::Cluster;
use crate::geometry::{GuestCluster, HostOffset};
use crate::image::Image;
use crate::read::PIECES_IN_FLIGHT;
use crate::tables::{Pins, Run};

/// What of a write's first and last cluster the write does not cover.
struct Uncovered {
    /// Guest range before the data.
    head: (u64, u64),
    /// Guest range behind the data, up to the end of the disk.
    tail: (u64, u64),
}

/// What stands in the clusters' uncovered parts. `None`: zeroes.
#[derive(Default)]
struct CopyUp {
    head: Option<Bytes>,
    tail: Option<Bytes>,
}

impl Image {
    /// Writes `data` from `at`. The range lies on the disk, or behind it in the cluster that holds its end.
    pub(crate) async fn write(self: &Arc<Image>, cx: &Ctx, at: u64, data: Gather) -> IoResult<()> {
        let end = at + data.len() as u64;
        let runs = {
            let _range = self.hold_for_write(at, end).await;
            let runs = self.runs(cx, at, end).await?;
            if let [Run { what: Cluster::Data(host), .. }] = runs.as_slice() {
                return self.write_payload(cx, *host, data).await;
            }
            if runs.iter().all(|run| matches!(run.what, Cluster::Data(_))) {
                let writes = runs.iter().filter_map(|run| {
                    let Cluster::Data(host) = run.what else { return None };
                    let part = data.slice((run.at - at) as usize, (run.end - run.at) as usize);
                    Some(self.write_payload(cx, host, part))
                });
                return in_flight(writes).await;
            }
            runs
        };
        // Nothing is held any more: what the runs said is looked up again.
        let mut stretches: Vec<(u64, u64, bool)> = Vec::new();
        for run in &runs {
            let has_data = matches!(run.what, Cluster::Data(_));
            match stretches.last_mut() {
                Some((_, end, same)) if *same == has_data => *end = run.end,
                _ => stretches.push((run.at, run.end, has_data)),
            }
        }
        let writes = stretches.into_iter().map(|(from, to, has_data)| {
            let part = data.slice((from - at) as usize, (to - from) as usize);
            self.write_stretch(cx, from, part, has_data)
        });
        in_flight(writes).await
    }

    /// Holds a range for a write in place: with others, or alone where what lies around it is written back.
    async fn hold_for_write(&self, at: u64, end: u64) -> infill_storage::RangeGuard {
        let align = u64::from(self.storage.limits().request_align);
        let guest = self.layout.geometry.in_cluster(at);
        if self.writes_plainly(guest, (end - at) as usize) {
            self.ranges.shared(at, end).await
        } else {
            self.ranges.exclusive(align_down(at, align), align_up(end, align)).await
        }
    }

    /// A stretch of a write that is, or was a moment ago, all data or none.
    fn write_stretch<'a>(
        self: &'a Arc<Image>,
        cx: &'a Ctx,
        at: u64,
        data: Gather,
        has_data: bool,
    ) -> LocalBoxFuture<'a, IoResult<()>> {
        Box::pin(async move {
            if !has_data && self.write_fresh(cx, at, &data).await? {
                return Ok(());
            }
            self.write(cx, at, data).await
        })
    }

    /// Writes into clusters without data. False if any of them has data now: nothing was written then.
    async fn write_fresh(self: &Arc<Image>, cx: &Ctx, at: u64, data: &Gather) -> IoResult<bool> {
        let geometry = self.layout.geometry;
        let end = at + data.len() as u64;
        let (first, last) = (geometry.guest_cluster(at), geometry.guest_cluster(end - 1));
        let count = last.0 - first.0 + 1;
        let start = geometry.guest_offset(first);
        let whole_end = geometry.guest_offset(last) + geometry.cluster_bytes();
        let uncovered = Uncovered { head: (start, at), tail: (end, whole_end.min(self.len()).max(end)) };
        let needed = (at - start) + (uncovered.tail.1 - end);
        let _memory = self.copy_ups.take(if self.backing.is_some() { needed } else { 0 }).await;
        loop {
            // What is missing is fetched before the range is taken, and nothing is held meanwhile (I4).
            let generation = self.backing.generation();
            let before = (self.run(cx, start, start + 1).await?.what, self.last_state(cx, last).await?);
            let Some(copy_up) = self.copy_up(cx, &uncovered, before, generation).await? else { continue };
            {
                let _leave = self.leave(cx).await?;
                let pins = self.pin(cx, first, count).await?;
                let _range = self.ranges.exclusive(start, whole_end).await;
                if !self.none_has_data(&pins, first, count)? {
                    return Ok(false);
                }
                if (self.pinned(&pins, first)?, self.pinned(&pins, last)?) != before {
                    continue;
                }
                let Some(_link) = self.backing.begin_link(generation) else { continue };
                self.write_and_link(cx, &pins, (first, count), at - start, copy_up, data).await?;
            }
            self.relieve(cx).await?;
            return Ok(true);
        }
    }

    async fn last_state(&self, cx: &Ctx, last: GuestCluster) -> IoResult<Cluster> {
        let at = self.layout.geometry.guest_offset(last);
        Ok(self.run(cx, at, at + 1).await?.what)
    }

    fn none_has_data(&self, pins: &Pins, first: GuestCluster, count: u64) -> IoResult<bool> {
        for nth in 0..count {
            if let Cluster::Data(_) = self.pinned(pins, GuestCluster(first.0 + nth))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What lies below the uncovered parts of absent clusters; `None` if the edge changed meanwhile.
    async fn copy_up(
        &self,
        cx: &Ctx,
        uncovered: &Uncovered,
        states: (Cluster, Cluster),
        generation: u64,
    ) -> IoResult<Option<CopyUp>> {
        if !self.backing.is_some() {
            return Ok(Some(CopyUp::default()));
        }
        let fetch = async |(from, to): (u64, u64), state: Cluster| {
            if from == to || state != Cluster::Absent {
                return IoResult::Ok(Some(None));
            }
            let fetched = self.backing.fetch(cx, from, to - from).await?;
            let data = (!is_zero(&fetched.data)).then_some(fetched.data);
            Ok((fetched.generation == generation).then_some(data))
        };
        let (head, tail) =
            futures_util::try_join!(fetch(uncovered.head, states.0), fetch(uncovered.tail, states.1))?;
        Ok(head.zip(tail).map(|(head, tail)| CopyUp { head, tail }))
    }

    /// Writes the payload to clusters that nothing names, then sets their entries.
    async fn write_and_link(
        self: &Arc<Image>,
        cx: &Ctx,
        pins: &Pins,
        (first, count): (GuestCluster, u64),
        skip: u64,
        copy_up: CopyUp,
        data: &Gather,
    ) -> IoResult<()> {
        let bytes = self.layout.geometry.cluster_bytes();
        let taken = self.take(cx, count).await?;
        let mut payload = Gather::new();
        let mut at = taken.at.0;
        match copy_up.head {
            Some(head) => payload.push(head),
            // What was taken is zero.
            None => at += skip,
        }
        payload.append(data.clone());
        payload.append(copy_up.tail.map(Gather::from).unwrap_or_default());
        if let Err(error) = self.write_payload(cx, HostOffset(at), payload).await {
            self.space.give_back(taken);
            return Err(error);
        }
        for nth in 0..count {
            self.set(pins, GuestCluster(first.0 + nth), Cluster::Data(HostOffset(taken.at.0 + nth * bytes)));
        }
        Ok(())
    }
}

/// Runs writes, several at once, and ends with the first error once those in flight are over.
pub(crate) async fn in_flight<'a, F>(writes: impl Iterator<Item = F>) -> IoResult<()>
where
    F: Future<Output = IoResult<()>> + 'a,
{
    let writes: Vec<F> = writes.collect();
    stream::iter(writes).buffer_unordered(PIECES_IN_FLIGHT).try_collect().await
}
