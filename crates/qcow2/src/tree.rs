//! What lies below an entry of the L1 table: an L2 table, and the clusters that it names.

use bytes::BytesMut;
use infill_base::{Ctx, DiscardMode, IoError, IoResult};
use infill_storage::sync::Arc;

use crate::entry::{L2Entry, L2View, StandardCluster};
use crate::geometry::{Geometry, HostCluster, HostOffset};
use crate::image::Image;
use crate::metaio;
use crate::refcount::HostRun;
use crate::write_back::Freed;

/// Runs of host clusters that entries name, neighbours joined. One that is named twice is there twice.
#[derive(Debug, Default)]
pub(crate) struct Named(Vec<(u64, u64)>);

impl Named {
    /// So many clusters from `first` on.
    pub(crate) fn push(&mut self, first: u64, count: u64) {
        match self.0.last_mut() {
            Some((start, length)) if *start + *length == first => *length += count,
            _ => self.0.push((first, count)),
        }
    }

    /// What an entry names.
    pub(crate) fn add(&mut self, view: &L2View, geometry: &Geometry) {
        match view {
            L2View::Standard(StandardCluster { host: Some(host), .. }) => {
                self.push(geometry.host_cluster(*host).0, 1);
            }
            L2View::Standard(_) => {}
            L2View::Compressed(found) => {
                let run = Freed::compressed(*found, geometry).run();
                self.push(run.first.0, run.count);
            }
        }
    }

    /// The runs.
    pub(crate) fn runs(&self) -> impl Iterator<Item = HostRun> + use<> {
        let run = |(first, count)| HostRun { first: HostCluster(first), count, zeroed: false };
        self.0.clone().into_iter().map(run)
    }
}

impl Image {
    /// An L2 table, as the file has it.
    pub(crate) async fn read_table(&self, at: HostOffset) -> IoResult<BytesMut> {
        if at.0 >= self.storage.len() {
            let why = format!("an L1 entry names an L2 table at byte {}, behind the end of the file", at.0);
            return Err(self.corrupt(why));
        }
        self.check_table(&Ctx::GUEST, at.0).await?;
        metaio::read(&Ctx::GUEST, &self.storage, at.0, self.geometry.cluster_bytes() as usize).await
    }

    /// Gives back what an L2 table names that no entry in memory or file names any more, and that nobody uses: the file has
    /// the table as it was last. What cannot be read, or counts as free, leaks.
    pub(crate) async fn lower_tree(self: &Arc<Image>, table: HostOffset) -> IoResult<()> {
        let (bytes, mut named) = (self.read_table(table).await?, Named::default());
        for field in bytes.chunks_exact(self.geometry.l2_entry_bytes() as usize) {
            let entry = L2Entry::from_bytes(field, &self.geometry);
            if !entry.is_absent() {
                let view = entry.view(&self.geometry);
                named.add(
                    &view.map_err(|error| IoError::from(error).in_node(self.storage.name()))?,
                    &self.geometry,
                );
            }
        }
        for run in named.runs() {
            let at = self.geometry.host_offset(run.first).0;
            if let Err(error) = self.lower_run(at, run).await {
                tracing::warn!(%error, at, "clusters are not given back");
            }
        }
        Ok(())
    }

    async fn lower_run(&self, at: u64, run: HostRun) -> IoResult<()> {
        let refcounts = &self.writer()?.refcounts;
        self.check_host(&Ctx::GUEST, at, run.count << self.geometry.cluster_bits()).await?;
        if self.options.discard == DiscardMode::Unmap {
            let mut single = Named::default();
            for cluster in run.first.0..run.first.0 + run.count {
                if refcounts.refcount(&Ctx::GUEST, HostCluster(cluster)).await? == 1 {
                    single.push(cluster, 1);
                }
            }
            for hole in single.runs() {
                let (at, len) =
                    (self.geometry.host_offset(hole.first).0, hole.count << self.geometry.cluster_bits());
                if let Err(error) = self.storage.discard(&Ctx::GUEST, at, len).await {
                    tracing::debug!(%error, at, "the space of clusters could not be given to the file system");
                }
            }
        }
        refcounts.release(&Ctx::GUEST, run).await
    }
}
