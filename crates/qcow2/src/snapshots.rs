//! Internal snapshots: made, deleted and gone back to.
//!
//! A snapshot is a copy of the L1 table; every L2 table and cluster below it is counted once more, and is not written in
//! place as long as it is. What is below one L1 table is a *tree*: counting it up or down reads each of its L2 tables once.
//!
//! # What never happens
//! * Anything else changes the map meanwhile: whoever does holds `steady`, shared, and this holds it alone; guests' writes
//!   in place are held by the caller. Reads go on.
//! * A cluster falls to somebody else while a header that may be on the disk names it.
//!
//! # Order of writes
//! Refcounts and the flags *copied* of entries cannot change together. So the image is marked dirty while they differ, and
//! whoever opens it after a crash counts anew. (Version 2 has no such mark; there a crash leaves flags, and clusters that
//! count too much, to `check`.) All of it after a round, so that the file has what guests were told is there.
//!
//! * *Make*: (1) the mark *dirty*; (2) refcounts one up, flags cleared in the L2 tables; sync; (3) the copy of the L1 table,
//!   the new snapshot table, the active L1 table without flags; (4) sync; (5) the header: the snapshot table, not dirty; sync.
//! * *Delete*: (1) the new snapshot table; sync; (2) the header: it, and dirty; sync; (3) refcounts one down; sync; (4) flags
//!   of what is shared no longer; sync; (5) the header: not dirty; sync.
//! * *Go back*: (1) dirty; (2) the snapshot's tree one up; sync; (3) a copy of its L1 table; (4) sync; (5) the header: it; sync;
//!   (6) the old tree one down, and on as for *delete*.
//!
//! The old table is given back after the header that does not name it. Where something fails in the middle, nothing is lost:
//! what was counted up leaks, and the image stays marked until it is opened again.

use bytes::{Bytes, BytesMut};
use infill_base::{Ctx, ErrorKind, IoError, IoResult};
use infill_node::Snapshot;
use infill_storage::StorageHandle;
use infill_storage::rounds::Turn;
use infill_storage::sync::{Arc, Mutex, lock};

use crate::entry::{L1Entry, L2Entry, L2TableRef, L2View, StandardCluster, be64};
use crate::features::Incompatible;
use crate::format::limits::{SNAPSHOT_TABLE_BYTES_MAX, SNAPSHOTS_MAX};
use crate::geometry::{HostOffset, L1Index, TABLE_ENTRY_BYTES};
use crate::header::{Header, HeaderChange, TableRef};
use crate::image::Image;
use crate::metaio;
use crate::refcount::HostRun;
use crate::tree::Named;
use table::Listed;

mod table;

/// Longest name of a snapshot, in bytes (QEMU's limit, too).
const NAME_BYTES_MAX: usize = 255;

/// The snapshots that an image lists.
#[derive(Debug, Default)]
pub(crate) struct Snapshots(Mutex<Loaded>);

#[derive(Debug, Default)]
struct Loaded {
    list: Vec<Listed>,
    /// What is wrong with the table: nobody changes it then.
    wrong: Option<String>,
}

/// How the clusters of a tree are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Count {
    /// Once more; entries lose the flag *copied*.
    Up,
    /// Once less.
    Down,
}

impl Snapshots {
    /// Reads the table. One that is damaged harms nothing else.
    pub(crate) async fn load(cx: &Ctx, storage: &StorageHandle, header: &Header) -> Snapshots {
        let table = header.snapshots();
        if table.count == 0 {
            return Snapshots::default();
        }
        let most = SNAPSHOT_TABLE_BYTES_MAX.min(storage.len().saturating_sub(table.at.0));
        // Mostly a few entries: no more than they take is read of a long file.
        let guess = (u64::from(table.count) * 4096).min(most);
        let mut loaded = Loaded::default();
        for len in [guess, most] {
            let read = metaio::read(cx, storage, table.at.0, len as usize).await;
            let parsed =
                read.map_err(|error| error.to_string()).and_then(|bytes| table::parse(&bytes, table.count));
            match parsed {
                Ok(list) => {
                    loaded = Loaded { list, wrong: None };
                    break;
                }
                Err(wrong) => loaded.wrong = Some(wrong),
            }
        }
        if let Some(wrong) = &loaded.wrong {
            tracing::warn!(image = storage.name(), wrong, "the snapshots of an image cannot be told");
        }
        Snapshots(Mutex::new(loaded))
    }

    /// What there is.
    pub(crate) fn told(&self) -> Vec<Snapshot> {
        lock(&self.0).list.iter().map(|listed| listed.snapshot.clone()).collect()
    }
}

/// Whether a snapshot is the one that is meant: by id and name, or by one of them.
fn is_meant(snapshot: &Snapshot, id: Option<&str>, name: Option<&str>) -> bool {
    id.is_none_or(|id| id == snapshot.id) && name.is_none_or(|name| name == snapshot.name)
}

impl Image {
    /// The list, where it is one that may be changed.
    fn listed(&self) -> IoResult<Vec<Listed>> {
        let loaded = lock(&self.snapshots.0);
        match &loaded.wrong {
            None => Ok(loaded.list.clone()),
            Some(wrong) => Err(self.corrupt(wrong)),
        }
    }

    /// Makes a snapshot of the disk as it is. The caller holds all changes; only the name and the times of `wanted` count.
    pub(crate) async fn create_snapshot(self: &Arc<Image>, wanted: Snapshot) -> IoResult<Snapshot> {
        let writer = self.prepare().await?;
        let _steady = writer.steady.exclusive(0, 1).await;
        let mut list = self.listed()?;
        if list.len() >= SNAPSHOTS_MAX as usize {
            return Err(
                self.refused(ErrorKind::TooLarge, format!("it has {SNAPSHOTS_MAX} snapshots already"))
            );
        }
        if self.geometry.refcount_max() == 1 {
            let why = "its refcounts are single bits: no cluster can be shared";
            return Err(self.refused(ErrorKind::InvalidInput, why));
        }
        self.quiesce().await?;
        let entries = self.active_entries();
        let mut name = wanted.name;
        while name.len() > NAME_BYTES_MAX {
            name.pop();
        }
        let snapshot = Snapshot {
            id: table::free_id(&list),
            name,
            vm_state_bytes: 0,
            disk_bytes: Some(self.size()),
            ..wanted
        };
        let mut taken = Taken { image: self, runs: Vec::new() };
        let l1_at = taken.take(entries.len() as u64 * TABLE_ENTRY_BYTES).await?;
        list.push(Listed::new(snapshot.clone(), TableRef { at: l1_at, count: entries.len() as u32 }));
        let table = self.write_list(&mut taken, &list).await?;
        self.mark_dirty(true, &[]).await?;
        self.count_tree(&entries, Count::Up).await?;
        self.sync().await?;
        let shared: Vec<L1Entry> = entries.iter().map(|entry| self.flagged(*entry, false)).collect();
        self.write_entries(l1_at, &shared).await?;
        self.write_entries(self.l1.table().at, &shared).await?;
        self.switch(taken, &[HeaderChange::Snapshots(table)], false).await?;
        self.adopt(&shared, &entries).await;
        self.list_is(list);
        Ok(snapshot)
    }

    /// Deletes the first snapshot that has this id, this name, or both. `None`: there is none. The caller holds all changes.
    pub(crate) async fn delete_snapshot(
        self: &Arc<Image>,
        id: Option<&str>,
        name: Option<&str>,
    ) -> IoResult<Option<Snapshot>> {
        let writer = self.prepare().await?;
        let _steady = writer.steady.exclusive(0, 1).await;
        let mut list = self.listed()?;
        let Some(place) = list.iter().position(|listed| is_meant(&listed.snapshot, id, name)) else {
            return Ok(None);
        };
        let gone = list.remove(place);
        let entries = self.entries_of(&gone).await?;
        self.quiesce().await?;
        let mut taken = Taken { image: self, runs: Vec::new() };
        let table = self.write_list(&mut taken, &list).await?;
        self.sync().await?;
        self.switch(taken, &[HeaderChange::Snapshots(table)], true).await?;
        self.list_is(list);
        self.count_tree(&entries, Count::Down).await?;
        self.give_up_table(gone.l1.at, entries.len() as u64 * TABLE_ENTRY_BYTES).await?;
        self.refresh_flags().await?;
        self.mark_dirty(false, &[]).await?;
        Ok(Some(gone.snapshot))
    }

    /// Makes the disk what it was at the first snapshot that has this id, or else this name. `None`: there is none. The caller
    /// holds all changes, and nobody uses the disk.
    pub(crate) async fn apply_snapshot(self: &Arc<Image>, which: &str) -> IoResult<Option<Snapshot>> {
        let writer = self.prepare().await?;
        let _steady = writer.steady.exclusive(0, 1).await;
        let list = self.listed()?;
        let by_id = list.iter().find(|listed| is_meant(&listed.snapshot, Some(which), None));
        let Some(wanted) =
            by_id.or_else(|| list.iter().find(|listed| is_meant(&listed.snapshot, None, Some(which))))
        else {
            return Ok(None);
        };
        let size = wanted.snapshot.disk_bytes.filter(|size| *size > 0).unwrap_or(self.size());
        if size != self.size() {
            let why = format!(
                "the disk had {size} bytes at the snapshot and has {} now: going back to another size is not supported",
                self.size()
            );
            return Err(self.refused(ErrorKind::Unsupported, why));
        }
        let mut entries = self.entries_of(wanted).await?;
        let old_table = self.l1.table();
        let old = self.active_entries();
        if entries.len() > old.len() && entries[old.len()..].iter().any(|entry| *entry != L1Entry::EMPTY) {
            let why = "the snapshot's L1 table is longer than the disk's";
            return Err(self.refused(ErrorKind::Unsupported, why));
        }
        entries.resize(old.len(), L1Entry::EMPTY);
        self.quiesce().await?;
        let mut taken = Taken { image: self, runs: Vec::new() };
        let at = taken.take(entries.len() as u64 * TABLE_ENTRY_BYTES).await?;
        self.mark_dirty(true, &[]).await?;
        self.count_tree(&entries, Count::Up).await?;
        self.sync().await?;
        let shared: Vec<L1Entry> = entries.iter().map(|entry| self.flagged(*entry, false)).collect();
        self.write_entries(at, &shared).await?;
        let table = TableRef { at, count: entries.len() as u32 };
        self.switch(taken, &[HeaderChange::L1(table)], true).await?;
        self.l1.moved(table);
        self.adopt(&shared, &old).await;
        self.count_tree(&old, Count::Down).await?;
        self.give_up_table(old_table.at, old.len() as u64 * TABLE_ENTRY_BYTES).await?;
        self.refresh_flags().await?;
        self.mark_dirty(false, &[]).await?;
        Ok(Some(wanted.snapshot.clone()))
    }

    /// Shows the disk as it was at the first snapshot that has this id, this name, or both. `None`: there is none. Nothing of it
    /// is written, so the image is open read-only, and nobody reads yet. The disk keeps the size that it has now, as in QEMU.
    pub(crate) async fn load_snapshot(
        self: &Arc<Image>,
        id: Option<&str>,
        name: Option<&str>,
    ) -> IoResult<Option<Snapshot>> {
        if self.writer.is_some() {
            let why = "a snapshot is looked at in an image that is opened read-only";
            return Err(self.refused(ErrorKind::InvalidInput, why));
        }
        let list = self.listed()?;
        let Some(wanted) = list.iter().find(|listed| is_meant(&listed.snapshot, id, name)) else {
            return Ok(None);
        };
        let mut entries = self.entries_of(wanted).await?;
        let old = self.active_entries();
        // The disk may have grown since.
        entries.resize(entries.len().max(old.len()), L1Entry::EMPTY);
        self.l1.moved(TableRef { count: entries.len() as u32, ..wanted.l1 });
        self.adopt(&entries, &old).await;
        Ok(Some(wanted.snapshot.clone()))
    }

    fn refused(&self, kind: ErrorKind, why: impl Into<String>) -> IoError {
        IoError::new(kind, why.into()).in_node(self.storage.name())
    }

    /// The file has everything that memory has, and nothing more is on its way to it.
    async fn quiesce(self: &Arc<Image>) -> IoResult<()> {
        self.sync().await?;
        self.writer()?.freeing.settle(0, 1).await;
        // What was given back just now.
        self.sync().await
    }

    fn active_entries(&self) -> Vec<L1Entry> {
        (0..self.l1.table().count).map(|index| self.l1.get(L1Index(index))).collect()
    }

    /// The L1 table of a snapshot.
    async fn entries_of(&self, listed: &Listed) -> IoResult<Vec<L1Entry>> {
        let len = u64::from(listed.l1.count) * TABLE_ENTRY_BYTES;
        let in_file = listed
            .l1
            .at
            .0
            .checked_add(len)
            .is_some_and(|end| end <= self.storage.len().next_multiple_of(self.geometry.cluster_bytes()));
        if len > 0 && (!self.geometry.is_aligned(listed.l1.at) || !in_file) {
            let name = listed.snapshot.name.escape_debug();
            return Err(self.corrupt(format!(
                "the L1 table of snapshot '{name}' cannot lie at byte {}",
                listed.l1.at.0
            )));
        }
        let bytes = metaio::read(&Ctx::GUEST, &self.storage, listed.l1.at.0, len as usize).await?;
        Ok(bytes.chunks_exact(TABLE_ENTRY_BYTES as usize).map(|entry| L1Entry(be64(entry))).collect())
    }

    /// Writes a snapshot table to clusters of its own.
    async fn write_list(self: &Arc<Image>, taken: &mut Taken<'_>, list: &[Listed]) -> IoResult<TableRef> {
        if list.is_empty() {
            return Ok(TableRef::default());
        }
        let too_long = || self.refused(ErrorKind::TooLarge, "its table of snapshots would be too long");
        let bytes = table::serialize(list).ok_or_else(too_long)?;
        let at = taken.take(bytes.len() as u64).await?;
        metaio::write(&Ctx::GUEST, &self.storage, at.0, bytes.into()).await?;
        Ok(TableRef { at, count: list.len() as u32 })
    }

    async fn write_entries(&self, at: HostOffset, entries: &[L1Entry]) -> IoResult<()> {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
        if bytes.is_empty() {
            return Ok(());
        }
        metaio::write(&Ctx::GUEST, &self.storage, at.0, bytes.into()).await
    }

    /// Marks the image as one whose refcounts may be wrong, or as right, with other changes of the header.
    async fn mark_dirty(&self, dirty: bool, changes: &[HeaderChange]) -> IoResult<()> {
        let turn = self.writer()?.rounds.turn().await;
        self.change_marked(&turn, dirty, changes).await
    }

    async fn change_marked(&self, turn: &Turn, dirty: bool, changes: &[HeaderChange]) -> IoResult<()> {
        let header = self.header();
        let mut changes = changes.to_vec();
        if header.version() >= 3 {
            let mut bits = header.incompatible();
            bits.set(Incompatible::DIRTY, dirty);
            changes.push(HeaderChange::Incompatible(bits));
        }
        if changes.is_empty() { self.sync_storage().await } else { self.change_header(turn, &changes).await }
    }

    /// Has the header name what was taken, and gives up the snapshot table that it named.
    async fn switch(
        self: &Arc<Image>,
        mut taken: Taken<'_>,
        changes: &[HeaderChange],
        dirty: bool,
    ) -> IoResult<()> {
        let old_len = table::len(&lock(&self.snapshots.0).list);
        let old = self.header().snapshots();
        let turn = self.writer()?.rounds.turn().await;
        // From here on the file may name them.
        taken.runs.clear();
        self.change_marked(&turn, dirty, changes).await?;
        drop(turn);
        let replaced = changes.iter().any(|change| matches!(change, HeaderChange::Snapshots(_)));
        if replaced { self.give_up_table(old.at, old_len).await } else { Ok(()) }
    }

    /// Gives back the clusters of a table that no header names any more.
    async fn give_up_table(&self, at: HostOffset, bytes: u64) -> IoResult<()> {
        let count = bytes.div_ceil(self.geometry.cluster_bytes());
        if count == 0 {
            return Ok(());
        }
        let run = HostRun { first: self.geometry.host_cluster(at), count, zeroed: false };
        self.writer()?.refcounts.release(&Ctx::GUEST, run).await
    }

    fn list_is(&self, list: Vec<Listed>) {
        *lock(&self.snapshots.0) = Loaded { list, wrong: None };
    }

    /// The entry with or without the flag *copied*.
    fn flagged(&self, entry: L1Entry, copied: bool) -> L1Entry {
        match entry.view(&self.geometry) {
            Ok(Some(table)) => L1Entry::table(L2TableRef { copied, ..table }),
            Ok(None) | Err(_) => entry,
        }
    }

    /// Takes entries that the file has, and forgets what is cached of tables that changed in the file behind the cache.
    async fn adopt(&self, entries: &[L1Entry], tables: &[L1Entry]) {
        for (index, entry) in entries.iter().enumerate() {
            self.l1.adopt(L1Index(index as u32), *entry);
        }
        // Whoever had begun to read a table has it, or not, before it is forgotten.
        self.in_flight.settle().await;
        let slices = (self.geometry.cluster_bytes() / self.slices.layout().slice_bytes as u64) as u32;
        let tables =
            tables.iter().chain(entries).filter_map(|entry| entry.view(&self.geometry).ok().flatten());
        tables.for_each(|table| self.slices.forget_table(table.at.0, slices));
    }

    /// Counts everything below these entries once more, or once less, in the cache.
    async fn count_tree(self: &Arc<Image>, entries: &[L1Entry], count: Count) -> IoResult<()> {
        for entry in entries {
            let table = entry
                .view(&self.geometry)
                .map_err(|error| IoError::from(error).in_node(self.storage.name()))?;
            let Some(table) = table else { continue };
            let mut bytes = self.read_table(table.at).await?;
            let (mut runs, mut changed) = (Named::default(), false);
            for field in bytes.chunks_exact_mut(self.geometry.l2_entry_bytes() as usize) {
                let entry = L2Entry::from_bytes(field, &self.geometry);
                if entry.is_absent() {
                    continue;
                }
                let view = entry
                    .view(&self.geometry)
                    .map_err(|error| IoError::from(error).in_node(self.storage.name()))?;
                runs.add(&view, &self.geometry);
                if let (Count::Up, L2View::Standard(cluster @ StandardCluster { copied: true, .. })) =
                    (count, view)
                {
                    let shared = StandardCluster { copied: false, ..cluster };
                    L2Entry::standard(shared, &self.geometry).write_to(field, &self.geometry);
                    changed = true;
                }
            }
            runs.push(self.geometry.host_cluster(table.at).0, 1);
            let refcounts = &self.writer()?.refcounts;
            for run in runs.runs() {
                match count {
                    Count::Up => refcounts.raise(&Ctx::GUEST, run).await?,
                    Count::Down => refcounts.release(&Ctx::GUEST, run).await?,
                }
            }
            if changed {
                metaio::write(&Ctx::GUEST, &self.storage, table.at.0, bytes.freeze()).await?;
            }
            if refcounts.wants_round() {
                self.sync().await?;
            }
        }
        Ok(())
    }

    /// Gives the flag *copied* to whatever of the active tables is named once, in file and memory.
    async fn refresh_flags(self: &Arc<Image>) -> IoResult<()> {
        self.sync().await?;
        let (cx, refcounts) = (&Ctx::GUEST, &self.writer()?.refcounts);
        let old = self.active_entries();
        let mut entries = old.clone();
        for entry in &mut entries {
            let Ok(Some(table)) = entry.view(&self.geometry) else { continue };
            let single = refcounts.refcount(cx, self.geometry.host_cluster(table.at)).await? == 1;
            *entry = self.flagged(*entry, single);
            if !single {
                continue;
            }
            let bytes = self.read_table(table.at).await?;
            if let Some(bytes) = self.flagged_table(bytes).await? {
                metaio::write(cx, &self.storage, table.at.0, bytes).await?;
            }
        }
        self.write_entries(self.l1.table().at, &entries).await?;
        let tables = entries.iter().filter_map(|entry| entry.view(&self.geometry).ok().flatten());
        refcounts.note_l2_tables(tables.map(|table| table.at));
        self.adopt(&entries, &old).await;
        Ok(())
    }

    /// The table with right flags, if any was wrong.
    async fn flagged_table(&self, mut bytes: BytesMut) -> IoResult<Option<Bytes>> {
        let refcounts = &self.writer()?.refcounts;
        let mut changed = false;
        for field in bytes.chunks_exact_mut(self.geometry.l2_entry_bytes() as usize) {
            let entry = L2Entry::from_bytes(field, &self.geometry);
            if entry.is_absent() {
                continue;
            }
            let Ok(L2View::Standard(cluster @ StandardCluster { host: Some(host), .. })) =
                entry.view(&self.geometry)
            else {
                continue;
            };
            let copied = refcounts.refcount(&Ctx::GUEST, self.geometry.host_cluster(host)).await? == 1;
            if copied != cluster.copied {
                L2Entry::standard(StandardCluster { copied, ..cluster }, &self.geometry)
                    .write_to(field, &self.geometry);
                changed = true;
            }
        }
        Ok(changed.then(|| bytes.freeze()))
    }
}

/// Clusters that no header names yet: given back where it does not come to that.
struct Taken<'a> {
    image: &'a Arc<Image>,
    runs: Vec<HostRun>,
}

impl Taken<'_> {
    /// Contiguous clusters of so many bytes; none for none.
    async fn take(&mut self, bytes: u64) -> IoResult<HostOffset> {
        let count = bytes.div_ceil(self.image.geometry.cluster_bytes());
        if count == 0 {
            return Ok(HostOffset(0));
        }
        let run = self.image.contiguous(&Ctx::GUEST, count).await?;
        self.runs.push(run);
        Ok(self.image.geometry.host_offset(run.first))
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.runs.drain(..).for_each(|run| self.image.give_back(&Ctx::GUEST, run));
    }
}
