//! Refcounts on the disk against the references that were counted, and a new structure where the old one is damaged.

use bytes::Bytes;
use infill_base::{IoError, IoResult, OpenError};
use infill_node::{CheckReport, Repair};
use rustc_hash::FxHashMap;

use super::Pass;
use crate::entry::{be64, refcount_block, refcount_get, refcount_set};
use crate::format::limits::{HOST_OFFSET_END, REFCOUNT_TABLE_BYTES_MAX};
use crate::geometry::{HostOffset, TABLE_ENTRY_BYTES};
use crate::header::{HeaderChange, TableRef};
use crate::metaio;

/// The refcount table and the blocks that it names, as far as they can be used.
#[derive(Default)]
pub(super) struct Structures {
    /// Blocks that can be read, by the number of their entry, ascending.
    blocks: Vec<(u64, HostOffset)>,
    /// How often table and blocks take a cluster.
    taken: FxHashMap<u64, u64>,
    /// What is wrong with them: only a new structure mends it.
    wrong: Vec<String>,
    /// How much is.
    wrong_count: u64,
}

impl Structures {
    fn is_wrong(&mut self, what: String) {
        self.wrong_count += 1;
        if self.wrong.len() < CheckReport::MAX_MESSAGES {
            self.wrong.push(what);
        }
    }

    fn has(&self, index: u64) -> bool {
        self.blocks.binary_search_by_key(&index, |(index, _)| *index).is_ok()
    }
}

/// What is done about refcounts that are wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fix {
    Nothing,
    /// Those that are too high are lowered.
    Lower,
    /// Those that are too low are raised: what is known to be incomplete frees nothing.
    Raise,
    /// Both.
    Both,
    /// All of them are right in the new structure.
    Rebuilt,
}

impl Fix {
    fn mends(self, too_high: bool) -> bool {
        match self {
            Fix::Nothing => false,
            Fix::Lower => too_high,
            Fix::Raise => !too_high,
            Fix::Both | Fix::Rebuilt => true,
        }
    }
}

impl Pass<'_> {
    /// Counts the clusters of the refcount structures, and finds out which of them can be used.
    pub(super) async fn count_structures(&mut self) -> Result<Structures, OpenError> {
        let mut found = Structures::default();
        let table = self.header.refcount_table();
        let bytes = u64::from(table.count) << self.geometry.cluster_bits();
        let most = REFCOUNT_TABLE_BYTES_MAX.max(self.geometry.cluster_bytes());
        if bytes == 0
            || bytes > most
            || table.at.0 == 0
            || !self.geometry.is_aligned(table.at)
            || !self.in_file(table.at, bytes)
        {
            found.is_wrong(format!(
                "the refcount table at byte {} ({bytes} bytes) cannot lie there",
                table.at.0
            ));
            return Ok(found);
        }
        let first = self.geometry.host_cluster(table.at).0;
        for cluster in first..first + u64::from(table.count) {
            self.take(&mut found, cluster, "the refcount table")?;
        }
        let Some(data) = self.read(table.at.0, bytes as usize, "refcount table").await else {
            return Ok(found);
        };
        for (index, raw) in data.chunks_exact(TABLE_ENTRY_BYTES as usize).map(be64).enumerate() {
            match refcount_block(raw, &self.geometry) {
                Ok(None) => {}
                Ok(Some(at)) if self.in_file(at, self.geometry.cluster_bytes()) => {
                    let cluster = self.geometry.host_cluster(at).0;
                    self.take(&mut found, cluster, &format!("refcount block {index}"))?;
                    found.blocks.push((index as u64, at));
                }
                Ok(Some(at)) => found.is_wrong(format!(
                    "refcount table entry {index} points to byte {}, behind the end of the file",
                    at.0
                )),
                Err(error) => found.is_wrong(format!("refcount table entry {index}: {error}")),
            }
        }
        Ok(found)
    }

    fn take(&mut self, found: &mut Structures, cluster: u64, what: &str) -> IoResult<()> {
        if self.counts.get(cluster) > 0 {
            found.is_wrong(format!("{what} lies in cluster {cluster}, which something else uses"));
        }
        *found.taken.entry(cluster).or_default() += 1;
        self.counts.add(cluster..cluster + 1, 1)
    }

    /// Compares refcounts with references, and mends what may be mended.
    pub(super) async fn compare(&mut self, structures: &Structures) -> Result<(), OpenError> {
        let rebuild = structures.wrong_count > 0 || self.has_uncounted(structures);
        // Only where enough is known is anything given back.
        let known = !self.blind && self.report.check_errors == 0;
        let fix = match self.repair {
            _ if self.report.check_errors > 0 => Fix::Nothing,
            Repair::Nothing => Fix::Nothing,
            Repair::Leaks if !known || self.report.corruptions + structures.wrong_count > 0 => {
                self.report.say("nothing is given back while metadata is damaged: repair all of it first");
                Fix::Nothing
            }
            Repair::Leaks => Fix::Lower,
            Repair::All if !known => Fix::Raise,
            Repair::All if rebuild => Fix::Rebuilt,
            Repair::All => Fix::Both,
        };
        self.lowered = fix == Fix::Lower;
        if fix == Fix::Rebuilt {
            self.report.corruptions_fixed += structures.wrong_count;
        } else {
            self.report.corruptions += structures.wrong_count;
        }
        structures.wrong.iter().for_each(|wrong| self.report.say(wrong));
        let mut used_end = 0;
        for (index, at) in &structures.blocks {
            self.compare_block(*index, *at, structures, fix, &mut used_end).await?;
        }
        self.compare_uncounted(structures, fix);
        used_end = used_end.max(self.counts.end().min(self.file_clusters()));
        self.report.image_end_offset = used_end << self.geometry.cluster_bits();
        if fix == Fix::Rebuilt {
            self.rebuild(structures).await?;
            self.mended = true;
        }
        Ok(())
    }

    /// Whether a cluster is referenced that no block describes.
    fn has_uncounted(&self, structures: &Structures) -> bool {
        let per_block = self.geometry.refcounts_per_block();
        self.counts.in_range(0..self.counts.end()).any(|(cluster, _)| !structures.has(cluster / per_block))
    }

    /// How often a cluster is referenced, and will be when `fix` is done.
    fn references(&self, cluster: u64, structures: &Structures, fix: Fix) -> u64 {
        let all = self.counts.get(cluster);
        match fix {
            Fix::Rebuilt => all - structures.taken.get(&cluster).copied().unwrap_or(0).min(all),
            _ => all,
        }
    }

    async fn compare_block(
        &mut self,
        index: u64,
        at: HostOffset,
        structures: &Structures,
        fix: Fix,
        used_end: &mut u64,
    ) -> Result<(), OpenError> {
        let size = self.geometry.cluster_bytes() as usize;
        let Some(mut block) = self.read(at.0, size, "refcount block").await else { return Ok(()) };
        let per_block = self.geometry.refcounts_per_block();
        let mut changed = false;
        for nth in 0..per_block {
            let cluster = index * per_block + nth;
            let disk = refcount_get(&block, nth, &self.geometry);
            let references = self.references(cluster, structures, fix);
            if disk == 0 && references == 0 {
                continue;
            }
            if cluster < self.file_clusters() {
                *used_end = cluster + 1;
            }
            let right = self.settle(cluster, disk, references, fix);
            if right != disk {
                refcount_set(&mut block, nth, right, &self.geometry);
                changed = true;
            }
        }
        if changed && fix != Fix::Rebuilt {
            metaio::write(self.cx, self.storage, at.0, block.freeze()).await?;
            self.mended = true;
        }
        Ok(())
    }

    /// Reports a refcount that is wrong; what it will be.
    fn settle(&mut self, cluster: u64, disk: u64, references: u64, fix: Fix) -> u64 {
        let right = references.min(self.geometry.refcount_max());
        if right < references {
            self.corruption_left(format!(
                "cluster {cluster} has {references} references, more than a refcount of {} bits counts; convert the \
                 image",
                self.geometry.refcount_bits()
            ));
        }
        let result = if disk == right || !fix.mends(disk > right) { disk } else { right };
        if disk != right {
            let fixed = result == right;
            if disk > right {
                self.report.leaks += u64::from(!fixed);
                self.report.leaks_fixed += u64::from(fixed);
            } else {
                self.report.corruptions += u64::from(!fixed);
                self.report.corruptions_fixed += u64::from(fixed);
            }
            let kind = if disk > right { "leaked cluster" } else { "cluster" };
            let done = if fixed { "; mended" } else { "" };
            self.report.say(format!("{kind} {cluster}: refcount {disk}, references {references}{done}"));
        }
        if result == 1 {
            self.counts.note_one(cluster);
        }
        result
    }

    /// Referenced clusters that no block describes.
    fn compare_uncounted(&mut self, structures: &Structures, fix: Fix) {
        let per_block = self.geometry.refcounts_per_block();
        // What no block describes cannot be raised in place.
        let fix = if fix == Fix::Rebuilt { fix } else { Fix::Nothing };
        for chunk in self.counts.chunks() {
            let missing: Vec<u64> = self
                .counts
                .in_range(chunk)
                .map(|(cluster, _)| cluster)
                .filter(|cluster| !structures.has(cluster / per_block))
                .collect();
            for cluster in missing {
                let references = self.references(cluster, structures, fix);
                if references > 0 {
                    self.settle(cluster, 0, references, fix);
                }
            }
        }
    }

    /// Writes a new structure behind everything that is used: (1) blocks and table, (2) sync, (3) the header, (4) sync.
    async fn rebuild(&mut self, structures: &Structures) -> Result<(), OpenError> {
        let (geometry, per_block) = (self.geometry, self.geometry.refcounts_per_block());
        let start = self.counts.end();
        let mut used: Vec<u64> = Vec::new();
        for (cluster, _) in self.counts.in_range(0..start) {
            let counted = self.references(cluster, structures, Fix::Rebuilt) > 0;
            if counted && used.last() != Some(&(cluster / per_block)) {
                used.push(cluster / per_block);
            }
        }
        // The new structure counts itself.
        let (mut blocks, mut table_clusters) = (used.clone(), 1);
        loop {
            let end = start + blocks.len() as u64 + table_clusters;
            let mut next = used.clone();
            next.extend((start / per_block..=(end - 1) / per_block).filter(|index| !used.contains(index)));
            next.sort_unstable();
            let entries = next.last().map_or(1, |last| last + 1);
            let clusters = (entries * TABLE_ENTRY_BYTES).div_ceil(geometry.cluster_bytes());
            if next.len() == blocks.len() && clusters <= table_clusters {
                blocks = next;
                break;
            }
            (blocks, table_clusters) = (next, clusters.max(table_clusters));
        }
        let table = start + blocks.len() as u64;
        let new = start..table + table_clusters;
        let bytes = table_clusters << geometry.cluster_bits();
        if bytes > REFCOUNT_TABLE_BYTES_MAX.max(geometry.cluster_bytes())
            || new.end > HOST_OFFSET_END >> geometry.cluster_bits()
        {
            return Err(OpenError::Refused {
                why: "the refcounts of this qcow2 image cannot be rebuilt: it is too long for a refcount table; convert \
                      it"
                    .into(),
            });
        }
        self.lengthen(new.end << geometry.cluster_bits()).await?;

        let mut entries = vec![0u8; bytes as usize];
        for (nth, index) in blocks.iter().enumerate() {
            let mut block = vec![0u8; geometry.cluster_bytes() as usize];
            let range = index * per_block..(index + 1) * per_block;
            for (cluster, _) in self.counts.in_range(range.clone()) {
                let references = self.references(cluster, structures, Fix::Rebuilt);
                let value = references.min(geometry.refcount_max());
                refcount_set(&mut block, cluster - range.start, value, &geometry);
            }
            for cluster in new.start.max(range.start)..new.end.min(range.end) {
                refcount_set(&mut block, cluster - range.start, 1, &geometry);
            }
            let at = (start + nth as u64) << geometry.cluster_bits();
            metaio::write(self.cx, self.storage, at, Bytes::from(block)).await?;
            let place = (index * TABLE_ENTRY_BYTES) as usize;
            entries[place..place + 8].copy_from_slice(&at.to_be_bytes());
        }
        let at = HostOffset(table << geometry.cluster_bits());
        metaio::write(self.cx, self.storage, at.0, Bytes::from(entries)).await?;
        self.storage.sync(self.cx).await?;
        let place = TableRef { at, count: table_clusters as u32 };
        self.change_header(&[HeaderChange::RefcountTable(place)]).await?;
        self.report.say("the refcounts were rebuilt");
        Ok(())
    }

    /// Makes the storage at least `end` bytes long.
    async fn lengthen(&self, end: u64) -> IoResult<()> {
        let len = self.storage.len();
        if len >= end {
            return Ok(());
        }
        self.storage.set_len(self.cx, end).await.map_err(|error| {
            IoError::new(error.kind(), format!("no room for new refcounts: {end} bytes are needed"))
                .in_node(self.storage.name())
                .caused_by(error)
        })
    }
}
