//! L1 and L2 tables: what they reference, and what in them is wrong.
//!
//! A table that several entries name is read once and counts as often as it is named, so that the work is bounded by
//! the size of the file, whatever the entries say.
//!
//! Damage may make anything look like a table. So nothing in an L2 table is mended before all references were counted:
//! a cluster that something else uses too, and that does not look like a table, is not one, and the L1 entry that
//! names it goes.

use bytes::{Bytes, BytesMut};
use infill_base::{IoResult, OpenError};
use infill_node::Repair;
use rustc_hash::FxHashMap;

use super::Pass;
use crate::entry::{EntryRule, L1Entry, L2Entry, L2View, StandardCluster, be64};
use crate::geometry::{HostOffset, TABLE_ENTRY_BYTES};
use crate::header::{TableRef, malformed};
use crate::metaio;

/// How much of an L1 table is read at once, in bytes.
const L1_PIECE_BYTES: u64 = 1 << 20;

/// So many wrong entries are no accident.
const L1_WRONG_MAX: u64 = 8;

/// Most L2 tables of an image: as many as the longest L1 table names.
const L2_TABLES_MAX: usize = 4 << 20;

/// Reserved bits of an L1 entry, and of a standard L2 entry.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
const ZERO: u64 = 1;
const COPIED: u64 = 1 << 63;

/// Most L2 tables in which something is wrong that are remembered.
const DAMAGED_TABLES_MAX: usize = 1 << 20;

/// How often an L2 table is named.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Named {
    /// By the active L1 table.
    pub active: u64,
    /// By any.
    pub all: u64,
}

/// Every L2 table that was found.
pub(super) type Tables = FxHashMap<u64, Named>;

/// An L2 table in which something is wrong.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Damaged {
    at: u64,
    /// Entries that are wrong.
    wrong: u64,
    /// Entries that say anything at all.
    used: u64,
}

/// What an entry that breaks a rule is mended to.
struct Mended {
    entry: L2Entry,
    /// Whether guest data is lost by that (it was already).
    lost: bool,
}

impl Pass<'_> {
    /// Goes through an L1 table, and collects the L2 tables that it names.
    pub(super) async fn walk_l1(
        &mut self,
        l1: TableRef,
        active: bool,
        tables: &mut Tables,
    ) -> Result<(), OpenError> {
        let bytes = u64::from(l1.count) * TABLE_ENTRY_BYTES;
        let mut done = 0;
        while done < bytes {
            let piece = (bytes - done).min(L1_PIECE_BYTES);
            let at = l1.at.0 + done;
            let Some(mut data) = self.read(at, piece as usize, "L1 table").await else { return Ok(()) };
            self.gate_l1(&data, l1)?;
            let mut changed = false;
            for nth in 0..(piece / TABLE_ENTRY_BYTES) as usize {
                let field = &mut data[nth * 8..nth * 8 + 8];
                let raw = be64(field);
                if raw == 0 {
                    continue;
                }
                let index = done / TABLE_ENTRY_BYTES + nth as u64;
                let entry = self.l1_entry(raw, index);
                if entry.0 != raw {
                    field.copy_from_slice(&entry.0.to_be_bytes());
                    changed = true;
                }
                let Ok(Some(table)) = entry.view(&self.geometry) else { continue };
                if !self.in_file(table.at, self.geometry.cluster_bytes()) {
                    continue;
                }
                if tables.len() >= L2_TABLES_MAX && !tables.contains_key(&table.at.0) {
                    return Err(malformed(format!("it has more than {L2_TABLES_MAX} L2 tables")));
                }
                let named = tables.entry(table.at.0).or_default();
                named.active += u64::from(active);
                named.all += 1;
            }
            if changed {
                self.mend_bytes(at, data.freeze()).await?;
            }
            done += piece;
        }
        Ok(())
    }

    /// Refuses to mend what looks like anything but an L1 table.
    fn gate_l1(&self, data: &[u8], l1: TableRef) -> Result<(), OpenError> {
        let used = data.chunks_exact(8).map(be64).filter(|raw| *raw != 0);
        let (mut count, mut wrong) = (0, 0);
        for raw in used {
            count += 1;
            wrong += u64::from(L1Entry(raw).view(&self.geometry).is_err());
        }
        if self.repair < Repair::All || wrong < L1_WRONG_MAX || wrong * 2 < count {
            return Ok(());
        }
        Err(OpenError::Refused {
            why: format!(
                "what this qcow2 image calls an L1 table (at byte {}) looks like none: {wrong} of {count} entries are \
                 wrong. Its place in the header may be damaged; nothing of it is mended",
                l1.at.0
            ),
        })
    }

    /// An L1 entry, mended if it has to be and may be.
    fn l1_entry(&mut self, raw: u64, index: u64) -> L1Entry {
        let cluster = self.geometry.cluster_bytes();
        let wrong = match L1Entry(raw).view(&self.geometry) {
            Ok(Some(table)) if !self.in_file(table.at, cluster) => {
                "points behind the end of the file".to_owned()
            }
            Ok(Some(table)) if self.junk.contains(&table.at.0) => {
                "points to what is used otherwise and is no L2 table".to_owned()
            }
            Ok(_) => return L1Entry(raw),
            Err(error) => error.to_string(),
        };
        let clean = L1Entry(raw & !L1_RESERVED);
        let usable = match clean.view(&self.geometry) {
            Ok(Some(table)) => self.in_file(table.at, cluster) && !self.junk.contains(&table.at.0),
            Ok(None) | Err(_) => false,
        };
        let (entry, loss) =
            if usable { (clean, "") } else { (L1Entry::EMPTY, "; what it described is lost") };
        if self.corruption(format!("L1 entry {index} ({raw:#018x}) {wrong}{loss}")) {
            entry
        } else {
            L1Entry(raw)
        }
    }

    /// Goes through all L2 tables, counts them and what they reference, and notes those in which something is wrong.
    pub(super) async fn walk_l2(&mut self, tables: &Tables) -> Result<(), OpenError> {
        let mut places: Vec<u64> = tables.keys().copied().collect();
        places.sort_unstable();
        for at in places {
            let named = tables[&at];
            let first = at >> self.geometry.cluster_bits();
            self.counts.add(first..first + 1, named.all)?;
            let size = self.geometry.cluster_bytes() as usize;
            let Some(data) = self.read(at, size, "L2 table").await else { continue };
            let mut found = Damaged { at, ..Damaged::default() };
            let mut next = None;
            for nth in 0..self.geometry.l2_entries() {
                let place = nth as usize * self.geometry.l2_entry_bytes() as usize;
                let entry = L2Entry::from_bytes(&data[place..], &self.geometry);
                if entry.is_absent() {
                    continue;
                }
                found.used += 1;
                found.wrong += u64::from(self.judge(entry).is_some());
                self.count_entry(entry, named, &mut next)?;
            }
            if found.wrong > 0 {
                if self.damaged.len() >= DAMAGED_TABLES_MAX {
                    return Err(malformed(format!(
                        "more than {DAMAGED_TABLES_MAX} of its L2 tables are damaged"
                    )));
                }
                self.damaged.push(found);
            }
        }
        Ok(())
    }

    /// Mends the tables in which something is wrong, or finds that they are none. All references were counted.
    pub(super) async fn mend_l2(&mut self, tables: &Tables) -> Result<(), OpenError> {
        for found in std::mem::take(&mut self.damaged) {
            let cluster = found.at >> self.geometry.cluster_bits();
            let shared = self.counts.get(cluster) > tables.get(&found.at).map_or(0, |named| named.all);
            if self.repair == Repair::All
                && shared
                && (found.wrong * 8 > found.used || self.is_fixed(cluster))
            {
                self.junk_found.push(found.at);
                continue;
            }
            let size = self.geometry.cluster_bytes() as usize;
            let Some(mut data) = self.read(found.at, size, "L2 table").await else { continue };
            let mut changed = false;
            for nth in 0..self.geometry.l2_entries() {
                let place = nth as usize * self.geometry.l2_entry_bytes() as usize;
                let entry = L2Entry::from_bytes(&data[place..], &self.geometry);
                let Some((mended, wrong)) = self.judge(entry) else { continue };
                let loss = if mended.lost { "; its data is lost" } else { "" };
                if self.corruption(format!("L2 table at byte {}, entry {nth}: {wrong}{loss}", found.at)) {
                    mended.entry.write_to(&mut data[place..], &self.geometry);
                    changed = true;
                }
            }
            if changed {
                self.mend_bytes(found.at, data.freeze()).await?;
            }
        }
        Ok(())
    }

    /// Counts what an entry references, if it is one that may.
    fn count_entry(&mut self, entry: L2Entry, named: Named, next: &mut Option<u64>) -> IoResult<()> {
        let geometry = self.geometry;
        match entry.view(&geometry) {
            Ok(L2View::Standard(StandardCluster { host: Some(host), .. })) => {
                self.report.allocated_clusters += named.active;
                if next.is_some_and(|next| next != host.0) {
                    self.report.fragmented_clusters += named.active;
                }
                *next = Some(host.0 + geometry.cluster_bytes());
                if self.in_file(host, geometry.cluster_bytes()) {
                    let cluster = geometry.host_cluster(host).0;
                    self.counts.add(cluster..cluster + 1, named.all)?;
                }
            }
            Ok(L2View::Compressed(found)) => {
                self.report.allocated_clusters += named.active;
                self.report.compressed_clusters += named.active;
                self.report.fragmented_clusters += named.active;
                if self.in_file(found.at, u64::from(found.len)) {
                    let last = HostOffset(found.at.0 + u64::from(found.len) - 1);
                    let clusters = geometry.host_cluster(found.at).0..geometry.host_cluster(last).0 + 1;
                    self.counts.add(clusters, named.all)?;
                }
            }
            Ok(L2View::Standard(_)) | Err(_) => {}
        }
        Ok(())
    }

    /// What is wrong with an entry, and what it is mended to; `None`: nothing.
    fn judge(&self, entry: L2Entry) -> Option<(Mended, String)> {
        let lost = || Mended { entry: self.lost(entry), lost: true };
        let behind = || format!("entry {:#018x} points behind the end of the file", entry.word);
        match entry.view(&self.geometry) {
            Err(error) => Some((self.mend(entry, error.rule), error.to_string())),
            Ok(L2View::Compressed(found)) if !self.in_file(found.at, u64::from(found.len)) => {
                Some((lost(), behind()))
            }
            Ok(L2View::Compressed(_)) if entry.word & COPIED != 0 => {
                let entry = L2Entry { word: entry.word & !COPIED, ..entry };
                Some((Mended { entry, lost: false }, "a compressed cluster is marked as not shared".into()))
            }
            Ok(L2View::Standard(StandardCluster { host: Some(host), .. }))
                if !self.in_file(host, self.geometry.cluster_bytes()) =>
            {
                Some((lost(), behind()))
            }
            Ok(_) => None,
        }
    }

    /// What keeps most of an entry that breaks a rule.
    fn mend(&self, entry: L2Entry, rule: EntryRule) -> Mended {
        let geometry = self.geometry;
        let keep = match rule {
            EntryRule::Reserved | EntryRule::ZeroInVersion2 => {
                let zero_bit = if geometry.extended_l2() || !geometry.has_zero_clusters() { ZERO } else { 0 };
                L2Entry { word: entry.word & !(L2_RESERVED | zero_bit), ..entry }
            }
            // Where both are said the data is kept.
            EntryRule::AllocatedAndZero => {
                let zero = (entry.bitmap >> 32) & !(entry.bitmap & 0xffff_ffff);
                L2Entry { bitmap: zero << 32 | entry.bitmap & 0xffff_ffff, ..entry }
            }
            EntryRule::CompressedWithSubclusters => L2Entry { bitmap: 0, ..entry },
            EntryRule::Unaligned | EntryRule::NoHost | EntryRule::CompressedOutside => {
                return Mended { entry: self.lost(entry), lost: true };
            }
        };
        match keep.view(&geometry) {
            // It breaks another rule, too.
            Err(error) if error.rule != rule => self.mend(keep, error.rule),
            Err(_) => Mended { entry: self.lost(entry), lost: true },
            Ok(_) => match self.judge(keep) {
                Some((mended, _)) => mended,
                None => Mended { entry: keep, lost: false },
            },
        }
    }

    /// The entry of a cluster whose data is gone: zero where it had data, never what lies below, which it had hidden.
    /// Version 2 cannot say zero.
    fn lost(&self, entry: L2Entry) -> L2Entry {
        if !self.geometry.has_zero_clusters() {
            return L2Entry::ABSENT;
        }
        let (allocated, zero) = (entry.bitmap as u32, (entry.bitmap >> 32) as u32);
        let compressed = entry.word & 1 << 62 != 0;
        let zero = if !self.geometry.extended_l2() {
            1
        } else if compressed {
            u32::MAX
        } else {
            zero | allocated
        };
        L2Entry::standard(StandardCluster { zero, ..StandardCluster::ABSENT }, &self.geometry)
    }

    /// Compares the flag that says *not shared* with the refcounts: of the active tables, where it has to be right.
    pub(super) async fn walk_copied(&mut self, tables: &Tables) -> Result<(), OpenError> {
        let l1 = self.header.l1();
        let bytes = u64::from(l1.count) * TABLE_ENTRY_BYTES;
        let mut done = 0;
        while done < bytes {
            let piece = (bytes - done).min(L1_PIECE_BYTES);
            let at = l1.at.0 + done;
            let Some(mut data) = self.read(at, piece as usize, "L1 table").await else { return Ok(()) };
            let mut changed = false;
            for field in data.chunks_exact_mut(8) {
                let raw = be64(field);
                let Ok(Some(table)) = L1Entry(raw).view(&self.geometry) else { continue };
                if let Some(right) = self.right_flag(raw, table.at, "L1 entry") {
                    field.copy_from_slice(&right.to_be_bytes());
                    changed = true;
                }
            }
            if changed {
                self.mend_bytes(at, data.freeze()).await?;
            }
            done += piece;
        }
        let mut places: Vec<u64> =
            tables.iter().filter(|(_, named)| named.active > 0).map(|(at, _)| *at).collect();
        places.sort_unstable();
        for at in places {
            let size = self.geometry.cluster_bytes() as usize;
            let Some(data) = self.read(at, size, "L2 table").await else { continue };
            if let Some(data) = self.copied_table(data) {
                self.mend_bytes(at, data).await?;
            }
        }
        Ok(())
    }

    /// The table with right flags, if any was wrong and may be mended.
    fn copied_table(&mut self, mut data: BytesMut) -> Option<Bytes> {
        let mut changed = false;
        for field in data.chunks_exact_mut(self.geometry.l2_entry_bytes() as usize) {
            let entry = L2Entry::from_bytes(field, &self.geometry);
            if entry.is_absent() {
                continue;
            }
            let Ok(L2View::Standard(StandardCluster { host: Some(host), .. })) = entry.view(&self.geometry)
            else {
                continue;
            };
            if let Some(word) = self.right_flag(entry.word, host, "L2 entry") {
                L2Entry { word, ..entry }.write_to(field, &self.geometry);
                changed = true;
            }
        }
        changed.then(|| data.freeze())
    }

    /// The entry's word with the right flag, if it is wrong and may be mended.
    fn right_flag(&mut self, word: u64, host: HostOffset, what: &str) -> Option<u64> {
        let cluster = self.geometry.host_cluster(host).0;
        let (single, copied) = (self.counts.is_one(cluster), word & COPIED != 0);
        if single == copied {
            return None;
        }
        let says = if copied { "not shared" } else { "shared" };
        let wrong = format!(
            "{what} {word:#018x} says {says}, but the refcount is {}1",
            if single { "" } else { "not " }
        );
        if self.lowered && single && self.report.corruptions == 0 {
            // The refcount has just become 1.
            self.mended = true;
            return Some(word ^ COPIED);
        }
        self.corruption(wrong).then_some(word ^ COPIED)
    }

    /// Writes a mended table back.
    pub(super) async fn mend_bytes(&mut self, at: u64, bytes: Bytes) -> IoResult<()> {
        metaio::write(self.cx, self.storage, at, bytes).await
    }
}
