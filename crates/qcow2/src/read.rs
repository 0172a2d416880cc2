//! Reads: from the file where the layer has data, from below where it has nothing.
//!
//! A read of one run, the usual case, hands the caller's buffer on: no copy, no allocation of its own. Otherwise the
//! buffer is cut into its runs, all of which are under way at once.

use bytes::{Bytes, BytesMut};
use futures_util::future::{join, join_all};
use infill_base::{Ctx, Extent, ExtentKind, Extents, IoResult, push_extent};
use infill_node::Below;
use infill_storage::sync::lock;

use crate::compress;
use crate::entry::CompressedCluster;
use crate::image::Image;
use crate::lookup::{Place, Run};
use crate::metaio;

/// Runs of one request that are read at once.
const RUNS_MAX: usize = 64;
/// Extents that one look-up gives at most, and runs that it looks at.
const EXTENTS_MAX: usize = 1024;

/// A piece of a request.
struct Piece {
    /// Its first guest byte.
    at: u64,
    place: Place,
    buf: BytesMut,
}

impl Image {
    /// Fills `buf` from guest byte `at`.
    pub(crate) async fn read(&self, cx: &Ctx, at: u64, mut buf: BytesMut) -> IoResult<BytesMut> {
        let len = buf.len() as u64;
        self.check(at, len)?;
        if len == 0 {
            return Ok(buf);
        }
        loop {
            let generation = self.backing.generation();
            let flight = self.in_flight.enter();
            let run = self.run_at(cx, at, len).await?;
            if run.len < len {
                drop(flight);
                return self.read_runs(cx, at, buf).await;
            }
            if run.place != Place::Absent {
                return self.read_local(cx, at, run.place, buf).await;
            }
            drop(flight);
            match self.backing.read(cx, at, buf, generation).await? {
                Below::Filled(buf) => return Ok(buf),
                // Present by now, perhaps, and what lay below may be gone.
                Below::Changed(back) => buf = back,
            }
        }
    }

    /// Reads what this layer holds. The caller is in flight.
    async fn read_local(&self, cx: &Ctx, at: u64, place: Place, mut buf: BytesMut) -> IoResult<BytesMut> {
        match place {
            Place::Data { host, .. } => self.read_host(cx, at, host, buf).await,
            Place::Compressed(cluster) => {
                let inside = self.geometry.in_cluster(at) as usize;
                let whole = self.unpack(cx, at, cluster).await?;
                let len = buf.len();
                buf.copy_from_slice(&whole[inside..inside + len]);
                Ok(buf)
            }
            Place::Zero | Place::Absent => {
                buf.fill(0);
                Ok(buf)
            }
        }
    }

    /// Reads data at host byte `host`, whatever the storage's blocks. Only the last cluster of a file may end before its
    /// time: zeroes then.
    async fn read_host(&self, cx: &Ctx, at: u64, host: u64, mut buf: BytesMut) -> IoResult<BytesMut> {
        let (len, file_len) = (buf.len() as u64, self.storage.len());
        if host.checked_add(len).is_some_and(|end| end <= file_len) && self.is_whole_blocks(host, len) {
            return self.storage.read(cx, host, buf).await;
        }
        let last = file_len.next_multiple_of(self.geometry.cluster_bytes());
        if host.checked_add(len).is_none_or(|end| end > last) {
            let why = format!(
                "an L2 entry names data at byte {host}, behind the end of the file ({file_len} bytes)"
            );
            return Err(self.corrupt(why).at(at, len));
        }
        let bytes = metaio::read(cx, &self.storage, host, buf.len()).await?;
        buf.copy_from_slice(&bytes);
        Ok(buf)
    }

    /// The bytes of a compressed cluster.
    pub(crate) async fn unpack(&self, cx: &Ctx, at: u64, cluster: CompressedCluster) -> IoResult<Bytes> {
        if let Some((last, bytes)) = &*lock(&self.unpacked)
            && *last == cluster
        {
            return Ok(bytes.clone());
        }
        let compression = lock(&self.header).compression();
        let bytes = compress::read_cluster(cx, &self.storage, &self.geometry, compression, cluster).await;
        let bytes = bytes.map_err(|error| error.at(at, self.geometry.cluster_bytes()))?;
        *lock(&self.unpacked) = Some((cluster, bytes.clone()));
        Ok(bytes)
    }

    /// Fills `buf`, a batch of runs after the other.
    async fn read_runs(&self, cx: &Ctx, mut at: u64, mut buf: BytesMut) -> IoResult<BytesMut> {
        let mut done = BytesMut::new();
        while !buf.is_empty() {
            let generation = self.backing.generation();
            let flight = self.in_flight.enter();
            let (mut local, mut below) = (Vec::new(), Vec::new());
            let mut order = Vec::new();
            while !buf.is_empty() && order.len() < RUNS_MAX {
                let Run { len, place, .. } = self.run_at(cx, at, buf.len() as u64).await?;
                let piece = Piece { at, place, buf: buf.split_to(len as usize) };
                let side = if place == Place::Absent { &mut below } else { &mut local };
                order.push((place == Place::Absent, side.len()));
                side.push(piece);
                at += len;
            }
            let local = async {
                let read = |piece: Piece| self.read_local(cx, piece.at, piece.place, piece.buf);
                let done = join_all(local.into_iter().map(read)).await;
                // Whoever waits for a source is not in flight.
                drop(flight);
                done
            };
            let below = join_all(below.into_iter().map(|piece| self.read_below(cx, piece, generation)));
            let (mut local, mut below) = join(local, below).await;
            for (is_below, nth) in order {
                let side = if is_below { &mut below } else { &mut local };
                let piece = std::mem::replace(&mut side[nth], Ok(BytesMut::new()))?;
                // Contiguous in memory: joined without a copy.
                done.unsplit(piece);
            }
        }
        Ok(done)
    }

    async fn read_below(&self, cx: &Ctx, piece: Piece, generation: u64) -> IoResult<BytesMut> {
        match self.backing.read(cx, piece.at, piece.buf, generation).await? {
            Below::Filled(buf) => Ok(buf),
            Below::Changed(buf) => Box::pin(self.read(cx, piece.at, buf)).await,
        }
    }

    /// What this layer holds, from `at`, at most to `at + len`.
    pub(crate) async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        self.check(at, len)?;
        let (mut extents, mut next, end) = (Extents::new(), at, at + len);
        for _ in 0..EXTENTS_MAX {
            if next == end {
                break;
            }
            let run = {
                let _flight = self.in_flight.enter();
                self.run_at(cx, next, end - next).await?
            };
            let kind = match run.place {
                Place::Data { .. } | Place::Compressed(_) => ExtentKind::Data,
                Place::Zero => ExtentKind::Zero,
                Place::Absent => ExtentKind::Absent,
            };
            let host = if let Place::Data { host, .. } = run.place { Some(host) } else { None };
            let compressed = matches!(run.place, Place::Compressed(_));
            push_extent(&mut extents, Extent { host, compressed, ..Extent::new(next, run.len, kind) });
            next += run.len;
        }
        Ok(extents)
    }
}
