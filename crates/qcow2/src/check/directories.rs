//! The tables of snapshots and bitmaps, and what they name.

use infill_base::OpenError;
use rustc_hash::FxHashMap;
use zerocopy::FromBytes;

use super::Pass;
use super::walk::Tables;
use crate::bitmaps::directory::{self, Bits};
use crate::format::limits::{BITMAP_TABLE_BYTES_MAX, L1_BYTES_MAX, SNAPSHOT_TABLE_BYTES_MAX};
use crate::format::{RawSnapshot, SNAPSHOT_EXTRA_BYTES_MAX};
use crate::geometry::{HostOffset, TABLE_ENTRY_BYTES};
use crate::header::{BitmapDirectory, TableRef};

/// L1 tables of all snapshots together that are read, in bytes.
const SNAPSHOT_L1_BYTES_MAX: u64 = 4 << 30;

impl Pass<'_> {
    /// Counts the snapshot table and the snapshots' L1 tables, and collects their L2 tables.
    pub(super) async fn walk_snapshots(&mut self, tables: &mut Tables) -> Result<(), OpenError> {
        let table = self.header.snapshots();
        let mut l1_tables: FxHashMap<(u64, u32), u64> = FxHashMap::default();
        let (mut at, mut l1_bytes) = (table.at.0, 0);
        for nth in 0..table.count {
            let Some(found) = self.snapshot(nth, at, table.at.0).await else {
                self.blind = true;
                return Ok(());
            };
            let (l1, next) = found;
            at = next;
            let bytes = u64::from(l1.count) * TABLE_ENTRY_BYTES;
            l1_bytes += bytes;
            let fits = self.geometry.is_aligned(l1.at)
                && bytes <= L1_BYTES_MAX
                && l1_bytes <= SNAPSHOT_L1_BYTES_MAX
                && self.in_file(l1.at, bytes.max(1));
            if !fits {
                self.corruption_left(format!(
                    "the L1 table of snapshot {nth} at byte {} ({} entries) cannot lie there; delete the snapshot",
                    l1.at.0, l1.count
                ));
                self.blind = true;
                continue;
            }
            *l1_tables.entry((l1.at.0, l1.count)).or_default() += 1;
        }
        if at > table.at.0 {
            self.count_bytes(table.at, at - table.at.0, 1)?;
        }
        let mut l1_tables: Vec<_> = l1_tables.into_iter().collect();
        l1_tables.sort_unstable();
        for ((at, count), times) in l1_tables {
            let l1 = TableRef { at: HostOffset(at), count };
            self.count_bytes(l1.at, u64::from(count) * TABLE_ENTRY_BYTES, times)?;
            let mut found = Tables::default();
            self.walk_l1(l1, false, &mut found).await?;
            for (table, named) in found {
                tables.entry(table).or_default().all += named.all * times;
            }
        }
        Ok(())
    }

    /// The L1 table of the snapshot whose entry lies at `at`, and where the next entry lies.
    async fn snapshot(&mut self, nth: u32, at: u64, start: u64) -> Option<(TableRef, u64)> {
        let bytes = self.read(at, size_of::<RawSnapshot>(), "snapshot table").await?;
        let raw = RawSnapshot::read_from_bytes(&bytes).ok()?;
        let extra = raw.extra_data_size.get();
        let len = size_of::<RawSnapshot>() as u64
            + u64::from(extra)
            + u64::from(raw.id_size.get())
            + u64::from(raw.name_size.get());
        let next = at.checked_add(len)?.checked_next_multiple_of(8)?;
        if extra > SNAPSHOT_EXTRA_BYTES_MAX
            || next - start > SNAPSHOT_TABLE_BYTES_MAX
            || !self.in_file(HostOffset(at), len)
        {
            self.corruption_left(format!(
                "entry {nth} of the snapshot table is damaged; what snapshots use is unknown, and is not given back"
            ));
            return None;
        }
        Some((TableRef { at: HostOffset(raw.l1_table_offset.get()), count: raw.l1_size.get() }, next))
    }

    /// Counts the bitmap directory, the bitmaps' tables and their data, where the image says that they are right.
    pub(super) async fn walk_bitmaps(&mut self) -> Result<(), OpenError> {
        let directory = match self.header.bitmaps() {
            Ok(Some(directory)) => directory,
            Ok(None) => return Ok(()),
            Err(error) => {
                self.bitmaps_wrong(error.to_string());
                return Ok(());
            }
        };
        let places = match self.bitmap_places(directory).await {
            Ok(places) => places,
            Err(wrong) => {
                self.bitmaps_wrong(wrong);
                return Ok(());
            }
        };
        for (at, bytes) in places {
            self.count_bytes(at, bytes, 1)?;
        }
        Ok(())
    }

    /// Bitmaps that are not right are given up: they only say what a backup may leave out.
    fn bitmaps_wrong(&mut self, wrong: String) {
        if self.corruption(format!("the bitmaps are damaged and given up: {wrong}")) {
            self.drop_bitmaps = true;
        }
    }

    /// Everything that the directory takes and names, in bytes of the file.
    async fn bitmap_places(&mut self, directory: BitmapDirectory) -> Result<Vec<(HostOffset, u64)>, String> {
        directory::check_place(&directory, &self.geometry, self.file_len)?;
        let unread = || "the directory cannot be read".to_owned();
        let bytes =
            self.read(directory.at.0, directory.len as usize, "bitmap directory").await.ok_or_else(unread)?;
        let mut places = vec![(directory.at, directory.len)];
        let mut table_bytes = 0;
        for (nth, listed) in directory::parse(&bytes, directory.count)?.iter().enumerate() {
            let wrong = |what: String| format!("entry {nth} of the directory {what}");
            let (at, len) = listed.table_place(&self.geometry, self.file_len).map_err(wrong)?;
            table_bytes += len;
            if table_bytes > BITMAP_TABLE_BYTES_MAX {
                return Err(wrong("has too long a table".into()));
            }
            places.push((HostOffset(at), len));
            let table = self.read(at, len as usize, "bitmap table").await;
            let table = table.ok_or_else(|| wrong("names a table that cannot be read".into()))?;
            for bits in directory::parse_table(&table, &self.geometry, self.file_len).map_err(wrong)? {
                if let Bits::At(host) = bits {
                    places.push((host, self.geometry.cluster_bytes()));
                }
            }
        }
        Ok(places)
    }
}
