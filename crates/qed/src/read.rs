//! Reads, and what this layer alone holds.

use bytes::BytesMut;
use futures_util::stream::{self, StreamExt};
use infill_base::{Ctx, Extent, ExtentKind, Extents, Gather, IoResult, WriteFlags, push_extent};
use infill_node::Below;
use infill_storage::unaligned;

use crate::entry::Cluster;
use crate::geometry::HostOffset;
use crate::image::Image;
use crate::tables::Run;

/// Pieces of one request that are in flight at once.
pub(crate) const PIECES_IN_FLIGHT: usize = 32;

/// Look-ups of one question for extents.
const EXTENT_LOOKUPS_MAX: usize = 64;

impl Image {
    pub(crate) async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        // From before the look-up: what was absent then may be somewhere else under another generation.
        let generation = self.backing.generation();
        let end = at + buf.len() as u64;
        let first = self.run(cx, at, end).await?;
        if first.end == end {
            return self.read_run(cx, first, buf, generation).await;
        }
        let mut runs = self.runs(cx, first.end, end).await?;
        runs.insert(0, first);
        let mut rest = buf;
        let pieces: Vec<_> = runs
            .into_iter()
            .map(|run| {
                let piece = rest.split_to((run.end - run.at) as usize);
                self.read_run(cx, run, piece, generation)
            })
            .collect();
        let mut pieces = stream::iter(pieces).buffered(PIECES_IN_FLIGHT);
        let mut whole = BytesMut::new();
        while let Some(piece) = pieces.next().await {
            if whole.is_empty() {
                whole = piece?;
            } else {
                // No copy where the pieces still lie behind each other.
                whole.unsplit(piece?);
            }
        }
        Ok(whole)
    }

    async fn read_run(&self, cx: &Ctx, run: Run, mut buf: BytesMut, generation: u64) -> IoResult<BytesMut> {
        match run.what {
            Cluster::Zero => {
                buf.fill(0);
                Ok(buf)
            }
            Cluster::Data(host) => self.read_payload(cx, host, buf).await,
            Cluster::Absent => match self.backing.read(cx, run.at, buf, generation).await? {
                Below::Filled(buf) => Ok(buf),
                Below::Changed(buf) => Box::pin(self.read(cx, run.at, buf)).await,
            },
        }
    }

    fn is_aligned(&self, at: u64, len: usize) -> bool {
        let align = u64::from(self.storage.limits().request_align);
        at.is_multiple_of(align) && (len as u64).is_multiple_of(align)
    }

    async fn read_payload(&self, cx: &Ctx, host: HostOffset, mut buf: BytesMut) -> IoResult<BytesMut> {
        if self.is_aligned(host.0, buf.len()) && buf.len() as u64 <= self.storage.limits().max_transfer {
            return self.storage.read(cx, host.0, buf).await;
        }
        let found = unaligned::read(cx, &self.storage, host.0, buf.len()).await?;
        buf.copy_from_slice(&found);
        Ok(buf)
    }

    /// Whether a write there goes to the storage as it is. If not, what lies around it in the same cluster is read
    /// and written back, and nobody else may write there meanwhile.
    pub(crate) fn writes_plainly(&self, at: u64, len: usize) -> bool {
        self.is_aligned(at, len)
    }

    /// Writes data into clusters that are this request's.
    pub(crate) async fn write_payload(&self, cx: &Ctx, host: HostOffset, data: Gather) -> IoResult<()> {
        if !self.is_aligned(host.0, data.len()) {
            return unaligned::write(cx, &self.storage, host.0, data.to_bytes()).await;
        }
        let most = self.storage.limits().max_transfer.max(1) as usize;
        let mut done = 0;
        while done < data.len() {
            let piece = (data.len() - done).min(most);
            let part = data.slice(done, piece);
            self.storage.write(cx, host.0 + done as u64, part, WriteFlags::empty()).await?;
            done += piece;
        }
        Ok(())
    }

    pub(crate) async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        let end = self.check_range(at, len)?;
        let (mut extents, mut next) = (Extents::new(), at);
        for _ in 0..EXTENT_LOOKUPS_MAX {
            if next >= end {
                break;
            }
            let run = self.run(cx, next, end).await?;
            let (kind, host) = match run.what {
                Cluster::Absent => (ExtentKind::Absent, None),
                Cluster::Zero => (ExtentKind::Zero, None),
                Cluster::Data(host) => (ExtentKind::Data, Some(host.0)),
            };
            push_extent(&mut extents, Extent { host, ..Extent::new(run.at, run.end - run.at, kind) });
            next = run.end;
        }
        Ok(extents)
    }
}
