//! Compressed clusters, written.
//!
//! A write that asks for it has its whole clusters compressed, each by itself, where the image has nothing of them yet: what is
//! there already, what covers a part of a cluster, and what does not become shorter is written plain. (QEMU refuses to write
//! over what is there.)
//!
//! # Where they lie
//! One after the other, in a run of host clusters that the packer has taken; each begins with a sector, so that no write
//! touches a sector in which something else is, stable or on its way (QEMU packs them byte by byte, and reads both). A host
//! cluster counts each compressed cluster that touches it once, and the packer once more as long as it may put something there:
//! so that it is not given to somebody else meanwhile, whatever guests overwrite.
//!
//! # Order
//! (1) A place, counted in the cache; (2) the payload; (3) when that write has completed, the entry in the cache. Rounds do the
//! rest, as for any cluster. A crash leaves counts that are too high.
//!
//! With a journal: refcounts are not recorded, so whoever replays an entry of a compressed cluster has the image counted anew.

use bytes::Bytes;
use flate2::{Compress, FlushCompress, Status};
use futures_util::stream::{self, StreamExt};
use infill_base::{Class, Ctx, ErrorKind, Gather, IoResult, WriteFlags, align_down, align_up};
use infill_storage::rt;
use infill_storage::sync::{Arc, lock};

use crate::compress::OFFLOAD_BYTES_MIN;
use crate::entry::{CompressedCluster, L2Entry, L2View, StandardCluster};
use crate::features::Compression;
use crate::format::SECTOR_BYTES;
use crate::geometry::{GuestCluster, GuestOffset, HostCluster, HostOffset};
use crate::image::Image;
use crate::lookup::Place;
use crate::refcount::HostRun;
use crate::runs::RUN_BYTES_MAX;

/// Clusters of one request that are compressed at once.
const CLUSTERS_MAX: usize = 4;
/// The window of deflate that QEMU reads with, as a power of two of bytes.
const WINDOW_BITS: u8 = 12;
/// The level of both: what their libraries take by default.
const ZLIB_LEVEL: u32 = 6;
const ZSTD_LEVEL: i32 = 3;

/// Host bytes that compressed clusters are put into, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Packer {
    /// The next free byte, and the end of the clusters that were taken.
    next: u64,
    end: u64,
}

impl Packer {
    /// The clusters that it counts for itself.
    fn clusters(&self, cluster_bits: u32) -> HostRun {
        let first = self.next >> cluster_bits;
        HostRun { first: HostCluster(first), count: (self.end >> cluster_bits) - first, zeroed: false }
    }
}

/// `data` compressed, if that makes it shorter.
fn compress(how: Compression, data: &[u8]) -> Option<Vec<u8>> {
    let most = data.len() - 1;
    match how {
        Compression::Deflate => {
            let mut packed = Vec::with_capacity(most);
            let mut stream =
                Compress::new_with_window_bits(flate2::Compression::new(ZLIB_LEVEL), false, WINDOW_BITS);
            let status = stream.compress_vec(data, &mut packed, FlushCompress::Finish).ok()?;
            (status == Status::StreamEnd).then_some(packed)
        }
        Compression::Zstd => {
            let packed = zstd::bulk::compress(data, ZSTD_LEVEL).ok()?;
            (packed.len() <= most).then_some(packed)
        }
    }
}

impl Image {
    /// Writes `data`, which is not empty, compressed where that is possible.
    pub(crate) async fn write_packed(self: &Arc<Image>, cx: &Ctx, at: u64, data: Gather) -> IoResult<()> {
        let (end, cluster) = (at + data.len() as u64, self.geometry.cluster_bytes());
        let first = align_up(at, cluster).min(end);
        // The last cluster of the disk need not be whole.
        let last = if end == self.size() { end } else { align_down(end, cluster) }.max(first);
        let part = |from: u64, to: u64| data.slice((from - at) as usize, (to - from) as usize);
        if at < first {
            self.write_data(cx, at, part(at, first)).await?;
        }
        let starts = (first..last).step_by(cluster as usize);
        let packs =
            starts.map(|start| self.pack_cluster(cx, start, part(start, (start + cluster).min(last))));
        let results: Vec<IoResult<()>> = stream::iter(packs).buffer_unordered(CLUSTERS_MAX).collect().await;
        results.into_iter().collect::<IoResult<()>>()?;
        if last < end { self.write_data(cx, last, part(last, end)).await } else { Ok(()) }
    }

    /// Writes one cluster.
    async fn pack_cluster(self: &Arc<Image>, cx: &Ctx, at: u64, data: Gather) -> IoResult<()> {
        let vacant = {
            let _flight = self.in_flight.enter();
            matches!(self.run_at(cx, at, 1).await?.place, Place::Absent | Place::Zero)
        };
        let packed =
            if vacant && self.geometry.refcount_max() > 1 { self.packed(data.clone()).await } else { None };
        let Some(packed) = packed else { return self.write_data(cx, at, data).await };
        self.relieve().await?;
        let Some(place) = self.place(cx, packed.len() as u64).await? else {
            return self.write_data(cx, at, data).await;
        };
        // A task of its own: what was placed is linked, or given back.
        let (image, cx) = (self.clone(), *cx);
        rt::detached(async move {
            let linked = image.store_packed(&cx, at, place, packed).await;
            if !matches!(linked, Ok(true)) {
                image.give_place_back(&cx, place).await;
            }
            match linked {
                Ok(false) => image.write_data(&cx, at, data).await,
                other => other.map(drop),
            }
        })
        .await
    }

    /// The cluster compressed, if that makes it shorter by a sector at least.
    async fn packed(&self, data: Gather) -> Option<Bytes> {
        let how = lock(&self.header).compression();
        let size = self.geometry.cluster_bytes() as usize;
        let work = move || {
            let mut whole = data.to_bytes().to_vec();
            // What lies behind the end of the disk reads as zeroes.
            whole.resize(size, 0);
            compress(how, &whole)
        };
        let packed = match size < OFFLOAD_BYTES_MIN {
            true => work(),
            // What could not be compressed is written as it is.
            false => rt::offload(work).await.unwrap_or_default(),
        };
        let saves = |packed: &Vec<u8>| align_up(packed.len() as u64, self.pack_unit()) < size as u64;
        packed.filter(saves).map(Bytes::from)
    }

    /// Writes what is compressed to its place and links it; `false`: somebody was first.
    async fn store_packed(
        self: &Arc<Image>,
        cx: &Ctx,
        at: u64,
        place: CompressedCluster,
        packed: Bytes,
    ) -> IoResult<bool> {
        let len = packed.len() as u64;
        let mut payload = packed.to_vec();
        payload.resize(align_up(len, self.pack_unit()) as usize, 0);
        self.storage.write(cx, place.at.0, Gather::from(Bytes::from(payload)), WriteFlags::empty()).await?;
        if cx.class == Class::Fill {
            self.storage.write_back(cx, place.at.0, len).await?;
        }
        let cluster = self.geometry.guest_cluster(GuestOffset(at));
        let _steady = self.writer()?.steady.shared(0, 1).await;
        let _range = self.writer()?.ranges.exclusive(cluster.0, cluster.0 + 1).await;
        let (slice, index, old) = self.for_change(cx, GuestCluster(cluster.0)).await?;
        if !matches!(old, L2View::Standard(StandardCluster { host: None, .. })) {
            return Ok(false);
        }
        let Some(entry) = L2Entry::compressed(place.at, len as u32, &self.geometry) else { return Ok(false) };
        // What lay there before may be remembered by its place.
        *lock(&self.unpacked) = None;
        self.set_entry(&slice, index, entry);
        Ok(true)
    }

    /// A place for so many bytes, which are fewer than a cluster's, counted; `None`: there is none that an entry can name.
    async fn place(self: &Arc<Image>, cx: &Ctx, len: u64) -> IoResult<Option<CompressedCluster>> {
        let (image, cx) = (self.clone(), *cx);
        // A task of its own: what is counted must not be lost with the request.
        rt::detached(async move {
            let writer = image.writer()?;
            let mut packer = writer.packer.lock().await;
            for _ in 0..2 {
                let stored = align_up(len, image.pack_unit());
                image.make_room(&cx, &mut packer, stored).await?;
                let at = HostOffset(packer.next);
                let Some(entry) = L2Entry::compressed(at, len as u32, &image.geometry) else {
                    return Ok(None);
                };
                let Ok(L2View::Compressed(place)) = entry.view(&image.geometry) else { return Ok(None) };
                if image.count_place(&cx, place).await? {
                    image.advance(&cx, &mut packer, at.0 + stored).await?;
                    return Ok(Some(place));
                }
                // A refcount takes no more: on in the next cluster.
                let next = align_down(at.0, image.geometry.cluster_bytes()) + image.geometry.cluster_bytes();
                image.advance(&cx, &mut packer, next).await?;
            }
            Ok(None)
        })
        .await
    }

    /// What compressed clusters begin at multiples of, in bytes.
    fn pack_unit(&self) -> u64 {
        self.block_bytes().max(SECTOR_BYTES as u64)
    }

    /// Sees to it that so many bytes follow the packer's next one.
    async fn make_room(self: &Arc<Image>, cx: &Ctx, packer: &mut Packer, len: u64) -> IoResult<()> {
        let bits = self.geometry.cluster_bits();
        while packer.end - packer.next < len {
            let want = (RUN_BYTES_MAX >> bits).min(self.size() >> bits).max(2);
            let run = self.take_clusters(cx, want).await?;
            let (start, end) = (run.first.0 << bits, (run.first.0 + run.count) << bits);
            if packer.end == start && packer.next < packer.end {
                packer.end = end;
                continue;
            }
            let left = std::mem::replace(packer, Packer { next: start, end });
            self.release_packer(cx, left).await?;
        }
        Ok(())
    }

    /// Counts a place in each host cluster that it touches; `false`: one of them takes no more, and nothing is counted.
    async fn count_place(&self, cx: &Ctx, place: CompressedCluster) -> IoResult<bool> {
        let refcounts = &self.writer()?.refcounts;
        let touched = crate::write_back::Freed::compressed(place, &self.geometry).run();
        for nth in 0..touched.count {
            let one = HostRun { first: HostCluster(touched.first.0 + nth), count: 1, zeroed: false };
            let Err(error) = refcounts.raise(cx, one).await else { continue };
            if nth > 0 {
                refcounts.release(cx, HostRun { count: nth, ..touched }).await?;
            }
            return if error.kind() == ErrorKind::TooLarge { Ok(false) } else { Err(error) };
        }
        Ok(true)
    }

    /// Goes on at `next`; clusters that lie behind it are the packer's no more.
    async fn advance(&self, cx: &Ctx, packer: &mut Packer, next: u64) -> IoResult<()> {
        let bits = self.geometry.cluster_bits();
        let first = packer.next >> bits;
        let count = (next.min(packer.end) >> bits) - first;
        packer.next = next.min(packer.end);
        if count == 0 {
            return Ok(());
        }
        let run = HostRun { first: HostCluster(first), count, zeroed: false };
        self.writer()?.refcounts.release(cx, run).await
    }

    async fn release_packer(&self, cx: &Ctx, packer: Packer) -> IoResult<()> {
        let run = packer.clusters(self.geometry.cluster_bits());
        if run.count == 0 { Ok(()) } else { self.writer()?.refcounts.release(cx, run).await }
    }

    /// Gives back what the packer has taken and not used.
    pub(crate) async fn end_packing(&self, cx: &Ctx, packer: &mut Packer) -> IoResult<u64> {
        let left = std::mem::take(packer);
        let count = left.clusters(self.geometry.cluster_bits()).count;
        self.release_packer(cx, left).await?;
        Ok(count)
    }

    /// Gives back a place that nothing names.
    async fn give_place_back(&self, cx: &Ctx, place: CompressedCluster) {
        let Ok(writer) = self.writer() else { return };
        let run = crate::write_back::Freed::compressed(place, &self.geometry).run();
        if let Err(error) = writer.refcounts.release(cx, run).await {
            tracing::warn!(%error, at = place.at.0, "a compressed cluster that is not used leaks");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_become_shorter_is_left_alone() {
        let mut state = 1u64;
        let noise: Vec<u8> = (0..4096)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 56) as u8
            })
            .collect();
        for how in [Compression::Deflate, Compression::Zstd] {
            assert!(compress(how, &noise).is_none());
            assert!(compress(how, &[7; 4096]).is_some_and(|packed| packed.len() < 100));
            assert!(compress(how, &[7; 512]).is_some());
        }
    }
}
