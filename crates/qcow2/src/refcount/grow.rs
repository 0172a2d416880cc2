//! Growth of the refcount structures, between two rounds. The order of writes stands in the parent's doc.

use bytes::Bytes;
use infill_base::{Ctx, ErrorKind, IoError, IoResult};

use super::{HostRun, Refcounts, damaged, given_away};
use crate::entry::refcount_set;
use crate::format::SECTOR_BYTES;
use crate::format::limits::{HOST_OFFSET_END, REFCOUNT_TABLE_BYTES_MAX};
use crate::geometry::{Geometry, HostCluster, HostOffset, TABLE_ENTRY_BYTES};
use crate::header::{Header, HeaderChange, TableRef};
use crate::metaio;
use crate::refcount::cache::Fixed;
use infill_storage::sync::lock;

/// What is known of the table's place.
#[derive(Debug)]
pub(super) struct Growth {
    /// The table that the header names.
    table: TableRef,
    /// A write of the header has failed: it names the old table or the new one.
    unknown: bool,
    /// Somebody makes the storage longer.
    pub(super) lengthening: bool,
}

impl Growth {
    pub(super) fn new(header: &Header) -> Growth {
        Growth { table: header.refcount_table(), unknown: false, lengthening: false }
    }
}

/// Which clusters a larger table takes: blocks, then the table, from the first cluster that the old one cannot count.
struct Larger {
    first: u64,
    blocks: u64,
    clusters: u64,
}

impl Larger {
    /// A table of at least twice the entries, or as many as are possible; `None` if that is too few.
    fn plan(geometry: &Geometry, entries: u64, index: u64) -> Option<Larger> {
        let (cluster, per_block) = (geometry.cluster_bytes(), geometry.refcounts_per_block());
        let most = REFCOUNT_TABLE_BYTES_MAX.max(cluster) / TABLE_ENTRY_BYTES;
        let mut blocks = 1;
        loop {
            let wanted = (entries * 2).max(index + blocks).min(most);
            let clusters = (wanted * TABLE_ENTRY_BYTES).div_ceil(cluster);
            let needed = (blocks + clusters).div_ceil(per_block);
            if needed > blocks {
                blocks = needed;
                continue;
            }
            let first = index.checked_mul(per_block)?;
            let end = first.checked_add(blocks + clusters)?.checked_mul(cluster)?;
            let fits = index + blocks <= clusters * cluster / TABLE_ENTRY_BYTES && index + blocks <= most;
            return (fits && end <= HOST_OFFSET_END).then_some(Larger { first, blocks, clusters });
        }
    }
}

impl Refcounts {
    /// Makes room for more clusters at the end of the image: a new refcount block, and a larger table where that is
    /// full. In the exclusive turn between two rounds only.
    ///
    /// `Some`: the header was changed, and is stable. `None` also where there was no need, or no space; then
    /// [`Refcounts::allocate`] finds the last free clusters, or says so.
    pub async fn grow(&self, cx: &Ctx, header: &Header) -> IoResult<Option<Header>> {
        self.load_table(cx).await?;
        let (index, entries) = {
            let mut cache = lock(&self.cache);
            let Some(index) = cache.missing_entry() else { return Ok(None) };
            (index, cache.entries())
        };
        let grown = if index < entries {
            self.new_block(cx, index).await.map(|()| None)
        } else {
            match Larger::plan(&self.geometry, entries, index) {
                Some(plan) => self.new_table(cx, header, index, plan).await.map(Some),
                None => Err(IoError::new(
                    ErrorKind::NoSpace,
                    "this qcow2 image has as many clusters as its refcount table can count",
                )),
            }
        };
        match grown {
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                tracing::debug!(%error, "no refcount block could be added");
                lock(&self.cache).end_closed = true;
                Ok(None)
            }
            other => other,
        }
    }

    /// A block of which the first `used` refcounts are 1.
    fn block_bytes(&self, used: u64) -> Vec<u8> {
        let mut bytes = vec![0; self.geometry.cluster_bytes() as usize];
        (0..used).for_each(|nth| refcount_set(&mut bytes, nth, 1, &self.geometry));
        bytes
    }

    /// Refuses to write where other metadata lies, and reserves the space.
    async fn prepare(&self, cx: &Ctx, first: u64, count: u64) -> IoResult<()> {
        let clusters = first..first + count;
        if let Some(what) = lock(&self.cache).metadata(&clusters) {
            return Err(given_away(what, HostCluster(first)));
        }
        self.reserve(cx, &clusters).await
    }

    /// A block for an entry that the table has.
    async fn new_block(&self, cx: &Ctx, index: u64) -> IoResult<()> {
        let table = {
            let growth = lock(&self.growth);
            if growth.unknown {
                return Err(damaged(
                    "a write of the header has failed, so where the table lies is unknown".into(),
                ));
            }
            growth.table
        };
        let first = index.checked_mul(self.geometry.refcounts_per_block());
        let end = first.and_then(|first| (first + 1).checked_mul(self.geometry.cluster_bytes()));
        let (Some(first), Some(..=HOST_OFFSET_END)) = (first, end) else {
            return Err(IoError::new(ErrorKind::NoSpace, "no host offset of a qcow2 image is that large"));
        };
        self.prepare(cx, first, 1).await?;
        let at = HostOffset(first << self.geometry.cluster_bits());
        let bytes = self.block_bytes(1);
        metaio::write(cx, &self.storage, at.0, Bytes::copy_from_slice(&bytes)).await?;
        self.storage.sync(cx).await?;
        self.write_entry(cx, table, index, at).await?;
        self.storage.sync(cx).await?;
        lock(&self.cache).insert_new(index, at, bytes);
        Ok(())
    }

    /// Writes the sector of the table that holds an entry.
    async fn write_entry(&self, cx: &Ctx, table: TableRef, index: u64, at: HostOffset) -> IoResult<()> {
        let per_sector = SECTOR_BYTES as u64 / TABLE_ENTRY_BYTES;
        let first = index / per_sector * per_sector;
        let mut sector = Vec::with_capacity(SECTOR_BYTES);
        {
            let cache = lock(&self.cache);
            for nth in first..first + per_sector {
                let raw = if nth == index { at.0 } else { cache.entry(nth) };
                sector.extend_from_slice(&raw.to_be_bytes());
            }
        }
        metaio::write(cx, &self.storage, table.at.0 + first * TABLE_ENTRY_BYTES, Bytes::from(sector)).await
    }

    /// A larger table, with blocks that count it.
    async fn new_table(&self, cx: &Ctx, header: &Header, index: u64, plan: Larger) -> IoResult<Header> {
        let (geometry, cluster) = (self.geometry, self.geometry.cluster_bytes());
        let total = plan.blocks + plan.clusters;
        self.prepare(cx, plan.first, total).await?;

        // What is on the disk: entries reach memory only when they are stable there.
        let mut entries = lock(&self.cache).table.clone().unwrap_or_default();
        let old_entries = entries.len() as u64;
        entries.resize((plan.clusters * cluster / TABLE_ENTRY_BYTES) as usize, 0);
        let mut blocks = Vec::new();
        for nth in 0..plan.blocks {
            let at = HostOffset((plan.first + nth) * cluster);
            let counted = total.saturating_sub(nth * geometry.refcounts_per_block());
            let bytes = self.block_bytes(counted.min(geometry.refcounts_per_block()));
            metaio::write(cx, &self.storage, at.0, Bytes::copy_from_slice(&bytes)).await?;
            entries[(index + nth) as usize] = at.0;
            blocks.push((index + nth, at, bytes));
        }
        let place =
            TableRef { at: HostOffset((plan.first + plan.blocks) * cluster), count: plan.clusters as u32 };
        let bytes: Vec<u8> = entries.iter().flat_map(|raw| raw.to_be_bytes()).collect();
        metaio::write(cx, &self.storage, place.at.0, Bytes::from(bytes)).await?;
        self.storage.sync(cx).await?;

        let next = header.changed(&[HeaderChange::RefcountTable(place)])?;
        lock(&self.growth).unknown = true;
        next.store(cx, &self.storage).await?;
        self.storage.sync(cx).await?;
        let old = {
            let mut growth = lock(&self.growth);
            growth.unknown = false;
            std::mem::replace(&mut growth.table, place)
        };
        {
            let mut cache = lock(&self.cache);
            cache.table = Some(entries);
            cache.fixed = Fixed::of(&next);
            cache.raise_high(plan.first + total);
            for (index, at, bytes) in blocks {
                cache.insert_new(index, at, bytes);
            }
        }
        debug_assert_eq!(old_entries, u64::from(old.count) * cluster / TABLE_ENTRY_BYTES);
        let run =
            HostRun { first: geometry.host_cluster(old.at), count: u64::from(old.count), zeroed: false };
        if let Err(error) = self.release(cx, run).await {
            // A leak, no more.
            tracing::warn!(%error, "the clusters of the old refcount table could not be given back");
        }
        Ok(next)
    }
}

/// Whether there is a larger table than one of `entries` that counts a block for `index`.
#[cfg(test)]
pub(super) fn plan_fits(geometry: &Geometry, entries: u64, index: u64) -> bool {
    Larger::plan(geometry, entries, index).is_some()
}
