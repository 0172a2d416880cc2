//! Check and repair of an image that nobody has open.
//!
//! References to every cluster are counted, from the header, the active L1 table, the snapshots', all L2 tables, the
//! bitmaps and the refcount structures themselves, and compared with the refcounts. Counts and statistics are those of
//! `qemu-img check`.
//!
//! # What is mended
//! * `Leaks`: refcounts that are too high, if no metadata is damaged.
//! * `All`: also refcounts that are too low, entries that break the format's rules or point behind the end of the
//!   file, and the flag *copied*. What can be kept is kept; an entry whose data is gone becomes zero, never what lies
//!   below (which it had hidden). Where the refcount structures themselves are damaged, new ones are written to
//!   where nothing is used.
//! * Not: snapshots whose own entry is damaged. Nothing is given back then, for what they use is unknown.
//!
//! # Order of writes
//! 1. Autoclear bits of what a repair does not keep (sync).
//! 2. Entries that are wrong (sync), until a walk finds none.
//! 3. Refcounts, in place or as a new structure (sync; then the header, sync).
//! 4. The flags *copied* (sync).
//! 5. After another look has found nothing: the marks *dirty* and *corrupt* go (sync).
//!
//! # Costs
//! Every table is read twice, and again after a repair. Memory: a byte for each cluster of the file that is near
//! something referenced, 512 MiB at most; beyond that the check is refused.

use bytes::BytesMut;
use infill_base::{Ctx, IoResult, OpenError};
use infill_node::{CheckReport, Repair};
use infill_storage::StorageHandle;
use rustc_hash::FxHashSet;

use crate::features::{Autoclear, Incompatible, MOVED_NAME, moved};
use crate::geometry::{Geometry, HostOffset, TABLE_ENTRY_BYTES};
use crate::header::{Header, HeaderChange, Purpose};
use crate::metaio;
use counts::Counts;
use walk::{Damaged, Tables};

mod counts;
mod directories;
mod refcounts;
mod walk;

/// Most walks of one repair: each mends what the one before has uncovered.
const WALKS_MAX: usize = 8;

/// Checks the image in `storage`, which nobody has open, and mends what `repair` allows.
///
/// Counts of corruptions and leaks are of those that are left; those that were mended are counted apart.
pub async fn check(cx: &Ctx, storage: &StorageHandle, repair: Repair) -> Result<CheckReport, OpenError> {
    let mut header = Header::read(cx, storage, Purpose::Check).await?;
    if repair == Repair::Nothing {
        let mut report = look(cx, storage, &mut header, repair, &FxHashSet::default()).await?.report;
        if header.is_fenced() {
            report.say(format!(
                "note: this image was {MOVED_NAME}; `infill whois` says who owns the disk, `infill reclaim` takes it back"
            ));
        }
        return Ok(report);
    }
    if header.is_fenced() {
        return Err(moved("it is repaired where it is now, or here after `infill reclaim`"));
    }
    if !storage.limits().writable {
        return Err(OpenError::Refused {
            why: format!("{} is read-only: it can be checked, but not repaired", storage.name()),
        });
    }
    clear_autoclear(cx, storage, &mut header).await?;
    let (mut fixed, mut junk) = (CheckReport::default(), FxHashSet::default());
    let mut last = None;
    for _ in 0..WALKS_MAX {
        let mut found = look(cx, storage, &mut header, repair, &junk).await?;
        fixed.corruptions_fixed += found.report.corruptions_fixed;
        fixed.leaks_fixed += found.report.leaks_fixed;
        std::mem::take(&mut found.report.messages).into_iter().for_each(|message| fixed.say(message));
        if !found.mended {
            last = Some(found.report);
            break;
        }
        junk.extend(found.junk);
        storage.sync(cx).await?;
    }
    let mut last = match last {
        Some(last) => last,
        None => look(cx, storage, &mut header, Repair::Nothing, &FxHashSet::default()).await?.report,
    };
    let marks = Incompatible::DIRTY | Incompatible::CORRUPT;
    let right = last.corruptions == 0 && last.check_errors == 0;
    if repair == Repair::All && right && header.incompatible().intersects(marks) {
        header = header.changed(&[HeaderChange::Incompatible(header.incompatible() - marks)])?;
        header.store(cx, storage).await?;
        storage.sync(cx).await?;
        fixed.say("the image is not marked dirty or corrupt any more");
    }
    last.messages = std::mem::take(&mut fixed.messages);
    Ok(CheckReport { corruptions_fixed: fixed.corruptions_fixed, leaks_fixed: fixed.leaks_fixed, ..last })
}

/// A repair keeps bitmaps as they are; nothing is known of the other features.
async fn clear_autoclear(cx: &Ctx, storage: &StorageHandle, header: &mut Header) -> Result<(), OpenError> {
    let kept = header.autoclear() & Autoclear::BITMAPS;
    if kept != header.autoclear() {
        *header = header.changed(&[HeaderChange::Autoclear(kept)])?;
        header.store(cx, storage).await?;
        storage.sync(cx).await?;
    }
    Ok(())
}

/// What one walk found and did.
struct Looked {
    report: CheckReport,
    /// Something was written: look again.
    mended: bool,
    /// What L1 entries name, and is no L2 table.
    junk: Vec<u64>,
}

/// One walk through everything.
async fn look(
    cx: &Ctx,
    storage: &StorageHandle,
    header: &mut Header,
    repair: Repair,
    junk: &FxHashSet<u64>,
) -> Result<Looked, OpenError> {
    let geometry = header.geometry();
    let total_clusters = header.size().div_ceil(geometry.cluster_bytes());
    let mut pass = Pass {
        cx,
        storage,
        geometry,
        header,
        repair,
        junk,
        file_len: storage.len(),
        counts: Counts::default(),
        report: CheckReport { total_clusters, ..CheckReport::default() },
        damaged: Vec::new(),
        junk_found: Vec::new(),
        blind: false,
        drop_bitmaps: false,
        mended: false,
        lowered: false,
    };
    pass.run().await?;
    Ok(Looked { report: pass.report, mended: pass.mended, junk: pass.junk_found })
}

/// One walk.
struct Pass<'a> {
    cx: &'a Ctx,
    storage: &'a StorageHandle,
    geometry: Geometry,
    header: &'a mut Header,
    repair: Repair,
    /// Clusters that are no L2 tables, whatever L1 entries say.
    junk: &'a FxHashSet<u64>,
    file_len: u64,
    counts: Counts,
    report: CheckReport,
    /// L2 tables in which something is wrong.
    damaged: Vec<Damaged>,
    junk_found: Vec<u64>,
    /// Not everything that is referenced is known.
    blind: bool,
    drop_bitmaps: bool,
    mended: bool,
    /// Refcounts that were too high were lowered.
    lowered: bool,
}

impl Pass<'_> {
    async fn run(&mut self) -> Result<(), OpenError> {
        let mut tables = Tables::default();
        self.counts.add(0..1, 1)?;
        let l1 = self.header.l1();
        self.count_bytes(l1.at, u64::from(l1.count) * TABLE_ENTRY_BYTES, 1)?;
        self.walk_l1(l1, true, &mut tables).await?;
        self.walk_snapshots(&mut tables).await?;
        self.walk_l2(&tables).await?;
        self.walk_bitmaps().await?;
        let structures = self.count_structures().await?;
        self.mend_l2(&tables).await?;
        if self.drop_bitmaps {
            let left = self.header.autoclear() - Autoclear::BITMAPS;
            self.change_header(&[HeaderChange::Autoclear(left)]).await?;
        }
        if !self.junk_found.is_empty() {
            self.mended = true;
        }
        if self.mended {
            // What was counted is not what is there any more.
            return Ok(());
        }
        self.compare(&structures).await?;
        if self.mended {
            self.storage.sync(self.cx).await?;
        }
        self.walk_copied(&tables).await
    }

    /// Whether all of a range lies in the file, whose last cluster need not be whole.
    fn in_file(&self, at: HostOffset, bytes: u64) -> bool {
        let end = self.file_len.checked_next_multiple_of(self.geometry.cluster_bytes()).unwrap_or(u64::MAX);
        at.0.checked_add(bytes).is_some_and(|range_end| range_end <= end)
    }

    fn file_clusters(&self) -> u64 {
        self.file_len.div_ceil(self.geometry.cluster_bytes())
    }

    /// Whether header or L1 table lie in a cluster.
    fn is_fixed(&self, cluster: u64) -> bool {
        let l1 = self.header.l1();
        let first = self.geometry.host_cluster(l1.at).0;
        let clusters = (u64::from(l1.count) * TABLE_ENTRY_BYTES).div_ceil(self.geometry.cluster_bytes());
        cluster == 0 || (first..first + clusters).contains(&cluster)
    }

    /// Counts the clusters of a table that lies at a cluster boundary, in the file.
    fn count_bytes(&mut self, at: HostOffset, bytes: u64, times: u64) -> IoResult<()> {
        if bytes == 0 {
            return Ok(());
        }
        let first = self.geometry.host_cluster(at).0;
        let last = self.geometry.host_cluster(HostOffset(at.0 + bytes - 1)).0;
        self.counts.add(first..last + 1, times)
    }

    /// Reads metadata; where that fails, it is told and counted as an error of the check.
    async fn read(&mut self, at: u64, len: usize, what: &str) -> Option<BytesMut> {
        match metaio::read(self.cx, self.storage, at, len).await {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                self.report.check_errors += 1;
                self.report.say(format!("{what} at byte {at} cannot be read: {error}"));
                None
            }
        }
    }

    /// Reports a corruption; whether the caller mends it.
    fn corruption(&mut self, what: String) -> bool {
        if self.repair < Repair::All {
            self.corruption_left(what);
            return false;
        }
        self.report.corruptions_fixed += 1;
        self.report.say(format!("{what}; mended"));
        self.mended = true;
        true
    }

    /// Reports a corruption that is not mended.
    fn corruption_left(&mut self, what: String) {
        self.report.corruptions += 1;
        self.report.say(what);
    }

    async fn change_header(&mut self, changes: &[HeaderChange]) -> Result<(), OpenError> {
        self.storage.sync(self.cx).await?;
        let next = self.header.changed(changes)?;
        next.store(self.cx, self.storage).await?;
        self.storage.sync(self.cx).await?;
        *self.header = next;
        Ok(())
    }
}
