//! Check and repair of an image that nobody has open (specification, *Consistency checking*).
//!
//! * Every cluster is named at most once; what is named lies in the file, aligned, and not where header or L1 table
//!   lie. Entries that name something else are *corruptions*; repair makes them absent, which after a crash loses
//!   nothing that was flushed. A cluster that is named twice cannot be repaired.
//! * What nothing names is *leaked*. Repair cuts leaked clusters off the end of the file; of those between used ones
//!   it gives the space back to the storage, but the file keeps the holes.
//! * Nothing is written before all was read, but for entries that are repaired. The mark *need check* goes last, after
//!   a sync, and only where no corruption is left.
//!
//! Costs: one read of every table, but for its holes, and 16 to 32 bytes of memory for up to 64 neighbouring clusters
//! that are named: about four times what the tables' entries take in the file at worst.

use std::collections::VecDeque;

use bytes::BytesMut;
use infill_base::{Ctx, Extent, ExtentKind, IoResult, OpenError, align_down, align_up};
use infill_node::{CheckReport, Repair};
use infill_storage::{StorageHandle, unaligned};
use rustc_hash::FxHashMap;

use crate::entry::{Cluster, l2_table};
use crate::format::ENTRY_BYTES;
use crate::geometry::{HostOffset, Layout};
use crate::header::{Features, Header};

/// How much of a table is read at once, in bytes.
const CHUNK_BYTES: u64 = 64 << 10;

/// Unit in which holes of a table are skipped, in bytes.
const HOLE_BYTES: u64 = 4096;

/// Checks the image in `storage`, which nobody has open, and mends what `repair` allows.
///
/// Counts of corruptions and leaks are of those that are left; those that were mended are counted apart.
pub async fn check(cx: &Ctx, storage: &StorageHandle, repair: Repair) -> Result<CheckReport, OpenError> {
    let header = Header::read(cx, storage).await?;
    if repair > Repair::Nothing && !storage.limits().writable {
        return Err(OpenError::Refused {
            why: format!("{} is read-only: it can be checked, but not repaired", storage.name()),
        });
    }
    check_header(cx, storage, &header, repair).await
}

/// As [`check`], of an image whose header was read.
pub(crate) async fn check_header(
    cx: &Ctx,
    storage: &StorageHandle,
    header: &Header,
    repair: Repair,
) -> Result<CheckReport, OpenError> {
    let mut header = header.clone();
    if repair > Repair::Nothing && header.autoclear() != 0 {
        header = header.with_autoclear(0);
        header.store(cx, storage).await?;
        storage.sync(cx).await?;
    }
    let layout = header.layout();
    let file_end = layout.geometry.align_down(storage.len());
    let mut check = Check {
        cx,
        storage,
        layout,
        file_end,
        repair,
        used: UsedClusters::default(),
        last_data: None,
        report: CheckReport {
            total_clusters: layout.geometry.clusters(header.size()),
            ..CheckReport::default()
        },
    };
    check.use_table(layout.l1);
    check.l1_table().await;
    check.leaks().await?;
    let report = check.report;
    if repair > Repair::Nothing && report.corruptions == 0 && report.check_errors == 0 {
        storage.sync(cx).await?;
        if header.features().contains(Features::NEED_CHECK) {
            header.with_need_check(false).store(cx, storage).await?;
            storage.sync(cx).await?;
        }
    }
    Ok(report)
}

struct Check<'a> {
    cx: &'a Ctx,
    storage: &'a StorageHandle,
    layout: Layout,
    /// End of the last whole cluster of the file.
    file_end: u64,
    repair: Repair,
    used: UsedClusters,
    /// Data cluster that the L2 table named last.
    last_data: Option<HostOffset>,
    report: CheckReport,
}

impl Check<'_> {
    /// Looks at the L1 table and at every L2 table that it names.
    async fn l1_table(&mut self) {
        let mut scan = TableScan::new(self.layout.l1, &self.layout);
        while let Some((at, mut bytes)) = self.next_chunk(&mut scan, "the L1 table").await {
            let mut mended = false;
            for (nth, raw) in entries(&bytes) {
                match l2_table(raw, &self.layout, self.file_end) {
                    Ok(None) => {}
                    Ok(Some(table)) if self.use_table(table) => self.l2_table(table).await,
                    Ok(Some(table)) => {
                        self.report.corruptions += 1;
                        self.report.say(format!("the L2 table at byte {} is named twice", table.0));
                    }
                    Err(error) => {
                        mended |= self.mend(&mut bytes, nth, format!("L1 table, {error}"));
                    }
                }
            }
            if mended {
                self.write_back(at, bytes).await;
            }
        }
    }

    async fn l2_table(&mut self, table: HostOffset) {
        self.last_data = None;
        let mut scan = TableScan::new(table, &self.layout);
        while let Some((at, mut bytes)) = self.next_chunk(&mut scan, "an L2 table").await {
            let mut mended = false;
            for (nth, raw) in entries(&bytes) {
                match Cluster::checked(raw, &self.layout, self.file_end) {
                    Ok(Cluster::Data(host)) => self.use_data(host),
                    Ok(Cluster::Absent | Cluster::Zero) => {}
                    Err(error) => {
                        let place = format!("L2 table at byte {}, {error}", table.0);
                        mended |= self.mend(&mut bytes, nth, place);
                    }
                }
            }
            if mended {
                self.write_back(at, bytes).await;
            }
        }
    }

    /// The next chunk that holds something; what cannot be read is told and left out.
    async fn next_chunk(&mut self, scan: &mut TableScan, what: &str) -> Option<(u64, BytesMut)> {
        loop {
            match scan.next(self.cx, self.storage).await? {
                Ok(chunk) => return Some(chunk),
                Err(error) => {
                    self.report.check_errors += 1;
                    self.report.say(format!("{what} cannot be read: {error}"));
                }
            }
        }
    }

    fn use_data(&mut self, host: HostOffset) {
        let cluster_bytes = self.layout.geometry.cluster_bytes();
        self.report.allocated_clusters += 1;
        if self.last_data.is_some_and(|last| last.0 + cluster_bytes != host.0) {
            self.report.fragmented_clusters += 1;
        }
        self.last_data = Some(host);
        if !self.used.insert(host.0 / cluster_bytes) {
            self.report.corruptions += 1;
            self.report.say(format!("the cluster at byte {} is named twice", host.0));
        }
    }

    /// False if any of the table's clusters is in use already; then none is marked by this.
    fn use_table(&mut self, table: HostOffset) -> bool {
        let first = table.0 / self.layout.geometry.cluster_bytes();
        let clusters = first..first + u64::from(self.layout.geometry.table_clusters());
        let free = clusters.clone().all(|cluster| !self.used.contains(cluster));
        if free {
            clusters.for_each(|cluster| {
                self.used.insert(cluster);
            });
        }
        free
    }

    /// Makes a wrong entry absent where that is allowed; says whether it did.
    fn mend(&mut self, bytes: &mut BytesMut, nth: usize, what: String) -> bool {
        let mend = self.repair == Repair::All;
        if mend {
            bytes[nth * ENTRY_BYTES as usize..][..ENTRY_BYTES as usize].fill(0);
            self.report.corruptions_fixed += 1;
        } else {
            self.report.corruptions += 1;
        }
        self.report.say(what);
        mend
    }

    async fn write_back(&mut self, at: u64, bytes: BytesMut) {
        if let Err(error) = unaligned::write(self.cx, self.storage, at, bytes.freeze()).await {
            self.report.check_errors += 1;
            self.report.say(format!("a mended table could not be written: {error}"));
        }
    }

    /// Counts what nothing names, and gives it back where that is allowed and safe.
    async fn leaks(&mut self) -> IoResult<()> {
        let cluster_bytes = self.layout.geometry.cluster_bytes();
        let header_clusters = self.layout.header_end / cluster_bytes;
        let file_clusters = self.file_end / cluster_bytes;
        let used_end = self.used.end().max(header_clusters);
        self.report.image_end_offset = used_end * cluster_bytes;
        // Used clusters lie behind the header: they passed the check of their place.
        self.report.leaks = file_clusters - header_clusters - self.used.count;
        if self.repair < Repair::Leaks || self.report.corruptions > 0 || self.report.check_errors > 0 {
            return Ok(());
        }
        let behind = file_clusters - used_end;
        if self.storage.len() > self.report.image_end_offset {
            self.storage.set_len(self.cx, self.report.image_end_offset).await?;
            self.report.leaks -= behind;
            self.report.leaks_fixed = behind;
        }
        if self.report.leaks > 0 && self.storage.limits().discard {
            let mut next = header_clusters;
            for (first, count) in self.used.runs() {
                if first > next {
                    self.storage
                        .discard(self.cx, next * cluster_bytes, (first - next) * cluster_bytes)
                        .await?;
                }
                next = first + count;
            }
            self.report.say(format!(
                "{} leaked clusters lie between used ones: their space was given back, the file keeps the holes",
                self.report.leaks
            ));
        }
        Ok(())
    }
}

/// The entries that are not 0, with their number.
fn entries(bytes: &[u8]) -> Vec<(usize, u64)> {
    let word =
        |(nth, bytes): (usize, &[u8])| bytes.first_chunk().map(|word| (nth, u64::from_le_bytes(*word)));
    bytes
        .chunks_exact(ENTRY_BYTES as usize)
        .enumerate()
        .filter_map(word)
        .filter(|(_, raw)| *raw != 0)
        .collect()
}

/// Reads a table piece by piece, and leaves out what the storage says is zero: a table may be long and empty.
struct TableScan {
    next: u64,
    end: u64,
    known: VecDeque<Extent>,
}

impl TableScan {
    fn new(table: HostOffset, layout: &Layout) -> TableScan {
        let end = table.0 + layout.geometry.table_bytes();
        TableScan { next: table.0, end, known: VecDeque::new() }
    }

    /// The next piece and where it lies; an error is of one piece, the scan goes on behind it.
    async fn next(&mut self, cx: &Ctx, storage: &StorageHandle) -> Option<IoResult<(u64, BytesMut)>> {
        while self.next < self.end {
            let Some(extent) = self.known.pop_front() else {
                let left = self.end - self.next;
                // Without a map all of it is read.
                let known = storage.extents(cx, self.next, left).await.unwrap_or_default();
                self.known = known.into();
                if self.known.is_empty() {
                    self.known.push_back(Extent::new(self.next, left, ExtentKind::Data));
                }
                continue;
            };
            let whole = align_down(extent.end(), HOLE_BYTES);
            if extent.kind == ExtentKind::Zero {
                self.next = self.next.max(whole);
                if extent.end() <= self.next {
                    continue;
                }
            }
            if extent.end() <= self.next {
                continue;
            }
            let at = self.next;
            let end = align_up(extent.end(), HOLE_BYTES).min(at + CHUNK_BYTES).min(self.end);
            self.next = end;
            if end < extent.end() {
                self.known.push_front(extent);
            }
            let read = unaligned::read(cx, storage, at, (end - at) as usize).await;
            return Some(read.map(|bytes| (at, bytes)));
        }
        None
    }
}

/// Which clusters are in use: a bit each, 64 neighbours in a word, and no word where none is.
#[derive(Default)]
struct UsedClusters {
    words: FxHashMap<u64, u64>,
    count: u64,
}

impl UsedClusters {
    fn contains(&self, cluster: u64) -> bool {
        self.words.get(&(cluster / 64)).is_some_and(|word| word >> (cluster % 64) & 1 == 1)
    }

    /// False if it was there.
    fn insert(&mut self, cluster: u64) -> bool {
        let word = self.words.entry(cluster / 64).or_default();
        let bit = 1 << (cluster % 64);
        let fresh = *word & bit == 0;
        *word |= bit;
        self.count += u64::from(fresh);
        fresh
    }

    /// First cluster behind all that are used.
    fn end(&self) -> u64 {
        let last = self.words.iter().max_by_key(|(index, _)| **index);
        last.map_or(0, |(index, word)| (index + 1) * 64 - u64::from(word.leading_zeros()))
    }

    /// Runs of used clusters in ascending order, as (first, count). Neighbouring runs may touch.
    fn runs(&self) -> impl Iterator<Item = (u64, u64)> + use<'_> {
        let mut indices: Vec<u64> = self.words.keys().copied().collect();
        indices.sort_unstable();
        indices.into_iter().flat_map(|index| {
            let mut word = self.words.get(&index).copied().unwrap_or_default();
            std::iter::from_fn(move || {
                let first = word.trailing_zeros();
                let count = word.checked_shr(first)?.trailing_ones();
                word &= !(u64::MAX >> (64 - count) << first);
                Some((index * 64 + u64::from(first), u64::from(count)))
            })
        })
    }
}

/// What keeps an image from being written although it says that it needs a check.
pub(crate) fn refuse_unrepaired(report: &CheckReport) -> Result<(), OpenError> {
    if report.corruptions == 0 && report.check_errors == 0 {
        return Ok(());
    }
    let first = report.messages.first().map(String::as_str).unwrap_or("no message");
    Err(OpenError::Refused {
        why: format!(
            "this QED image was not closed cleanly and cannot be repaired: {} corruptions, {} errors, the first: \
             {first}; open it read-only and copy what is readable",
            report.corruptions, report.check_errors
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_used_clusters_cross_words_and_count_once() {
        let mut used = UsedClusters::default();
        for cluster in [70, 0, 3, 4, 63, 64, 65, 1000, 3, 127, 128] {
            used.insert(cluster);
        }
        assert_eq!(used.count, 10);
        assert!(!used.insert(63) && used.contains(128) && !used.contains(129));
        assert_eq!(used.end(), 1001);
        let runs: Vec<_> = used.runs().collect();
        assert_eq!(runs, [(0, 1), (3, 2), (63, 1), (64, 2), (70, 1), (127, 1), (128, 1), (1000, 1)]);
        let mut full = UsedClusters::default();
        (64..128).for_each(|cluster| assert!(full.insert(cluster)));
        assert_eq!(full.runs().collect::<Vec<_>>(), [(64, 64)]);
    }
}
