//! Changes of the image as a whole: its backing file's name, its size, and its end. Each is run in a task of its own.

use infill_base::{Ctx, ErrorKind, IoError, IoResult, ZeroFlags, align_up};
use infill_node::BackingRef;
use infill_storage::rounds::Turn;
use infill_storage::sync::Arc;
use infill_storage::sync::atomic::Ordering;

use crate::geometry::TABLE_ENTRY_BYTES;
use crate::header::{HeaderChange, HeaderRewrite, TableRef};
use crate::image::Image;
use crate::metaio;
use crate::refcount::HostRun;
use crate::write_back::Freed;

/// Runs that are looked at for one that holds a larger L1 table whole.
const L1_RUNS_MAX: usize = 16;

impl Image {
    /// Names another backing file, or none: (1) a round, so that all data and mappings are stable, (2) the header, (3)
    /// sync (P4).
    pub(crate) async fn set_backing_ref(self: &Arc<Image>, backing: Option<BackingRef>) -> IoResult<()> {
        self.prepare().await?;
        self.sync().await?;
        let turn = self.writer()?.rounds.turn().await;
        let Some(backing) = backing else {
            return self.change_header(&turn, &[HeaderChange::DropBacking]).await;
        };
        let rewrite = self.header().with_backing(&backing)?;
        self.rewrite_header(&turn, rewrite).await
    }

    /// Marks the image as one that another host owns, or takes the mark away: stable when it returns, once more where it
    /// was so before. No change of the disk, so no mark of another kind (journal, bitmaps) is touched.
    pub(crate) async fn set_fence(self: &Arc<Image>, fenced: bool) -> IoResult<()> {
        let turn = self.writer()?.rounds.turn().await;
        let header = self.header();
        if header.is_fenced() == fenced {
            return self.sync_storage().await;
        }
        let rewrite = header.with_fence(fenced)?;
        self.rewrite_header(&turn, rewrite).await
    }

    /// Stores a header that needs more than one sector, between two rounds.
    pub(crate) async fn rewrite_header(&self, turn: &Turn, rewrite: HeaderRewrite) -> IoResult<()> {
        let writer = self.writer()?;
        // Where it fails, the file has the old one or the new one.
        let stored = rewrite.store(&Ctx::GUEST, &self.storage).await;
        stored.inspect_err(|_| writer.poison())?;
        self.header_is(turn, rewrite.header)
    }

    /// Makes the disk longer; what is new reads as zeroes, whatever lies there below.
    pub(crate) async fn resize(self: &Arc<Image>, cx: &Ctx, size: u64) -> IoResult<()> {
        self.prepare().await?;
        let old = self.size();
        if size < old {
            let why = format!(
                "a qcow2 image cannot be made shorter here: it has {old} bytes, {size} were asked for"
            );
            return Err(IoError::new(ErrorKind::Unsupported, why).in_node(self.storage.name()));
        }
        if size == old {
            return Ok(());
        }
        let most = self.geometry.max_virtual_size();
        if size > most {
            let why = format!(
                "with clusters of {} bytes a disk has at most {most} bytes",
                self.geometry.cluster_bytes()
            );
            return Err(IoError::new(ErrorKind::InvalidInput, why).in_node(self.storage.name()));
        }
        let needed = self.geometry.l1_entries_for(size);
        if needed > u64::from(self.l1.table().count) {
            self.grow_l1(cx, needed).await?;
        }
        // Behind the old end: bytes that the last cluster had left over, and what a longer backing would show.
        let below = self.backing.node().map_or(0, |node| node.len());
        let dirty_end = align_up(old, self.geometry.cluster_bytes()).max(below).min(size);
        if old < dirty_end {
            self.zero(cx, old, dirty_end - old, size, ZeroFlags::empty()).await?;
            self.sync().await?;
        }
        let turn = self.writer()?.rounds.turn().await;
        self.change_header(&turn, &[HeaderChange::Size(size)]).await?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// A larger L1 table: (1) a round, so that the refcounts of its clusters are stable, (2) a copy of what is **on the
    /// disk**: the cache may name what is not stable yet, (3) sync, (4) the header, (5) sync. Rounds write what differs.
    async fn grow_l1(self: &Arc<Image>, cx: &Ctx, entries: u64) -> IoResult<()> {
        let clusters = (entries * TABLE_ENTRY_BYTES).div_ceil(self.geometry.cluster_bytes());
        let run = self.contiguous(cx, clusters).await?;
        self.sync().await?;
        let turn = self.writer()?.rounds.turn().await;
        let moved = self.move_l1(&turn, run, entries as u32).await;
        if moved.is_err() && self.writer().is_ok() {
            // Not named by any header: the image would be poisoned else.
            self.give_back(cx, run);
        }
        moved
    }

    async fn move_l1(self: &Arc<Image>, turn: &Turn, run: HostRun, count: u32) -> IoResult<()> {
        let cx = &Ctx::GUEST;
        let old = self.l1.table();
        let len = u64::from(old.count) * TABLE_ENTRY_BYTES;
        let mut bytes = metaio::read(cx, &self.storage, old.at.0, len as usize).await?;
        #[cfg(feature = "planted-faults")]
        if self.fault(crate::faults::Fault::LargerL1FromCache) {
            // Long enough for guests to make tables, which no round can write meanwhile.
            infill_storage::rt::sleep(std::time::Duration::from_millis(20)).await;
            for (index, entry) in bytes.chunks_exact_mut(TABLE_ENTRY_BYTES as usize).enumerate() {
                entry.copy_from_slice(&self.l1.get(crate::L1Index(index as u32)).0.to_be_bytes());
            }
        }
        bytes.resize((run.count << self.geometry.cluster_bits()) as usize, 0);
        let table = TableRef { at: self.geometry.host_offset(run.first), count };
        metaio::write(cx, &self.storage, table.at.0, bytes.freeze()).await?;
        self.change_header(turn, &[HeaderChange::L1(table)]).await?;
        self.l1.moved(table);
        let old_clusters = len.div_ceil(self.geometry.cluster_bytes());
        if old_clusters > 0 {
            self.unmapped(Freed::clusters(self.geometry.host_cluster(old.at), old_clusters));
        }
        Ok(())
    }

    /// Takes exactly `count` contiguous clusters.
    pub(crate) async fn contiguous(self: &Arc<Image>, cx: &Ctx, count: u64) -> IoResult<HostRun> {
        let (mut short, mut found) = (Vec::new(), None);
        while found.is_none() && short.len() < L1_RUNS_MAX {
            let run = self.allocate(cx, count).await?;
            if run.count == count { found = Some(run) } else { short.push(run) }
        }
        for run in short {
            self.give_back(cx, run);
        }
        found.ok_or_else(|| {
            let why = format!("no {count} contiguous clusters are free");
            IoError::new(ErrorKind::NoSpace, why).in_node(self.storage.name())
        })
    }

    /// Everything stable, and what was reserved given back.
    pub(crate) async fn close(self: &Arc<Image>, cx: &Ctx) -> IoResult<()> {
        let Ok(writer) = self.writer() else {
            // Read-only, or poisoned: there is nothing that could be made stable.
            return self.writer.as_ref().map_or(Ok(()), |_| self.writer().map(drop));
        };
        self.give_runs_back(cx).await?;
        self.sync().await?;
        // What the round has unmapped falls in the cache afterwards, and is for a second one.
        writer.freeing.settle(0, 1).await;
        if writer.refcounts.is_dirty() {
            self.sync().await?;
        }
        self.end_journal().await
    }
}
