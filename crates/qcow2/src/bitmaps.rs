//! Persistent dirty bitmaps: loaded at open, marked as in use before the disk changes, stored at close.
//!
//! # What never happens
//! A bitmap that looks right and misses a write. Whatever a crash leaves, a bitmap of the image either says everything that
//! was written, or is marked as in use (*inconsistent*), or is gone.
//!
//! # Order of writes
//! * **Before the first change** of the disk or of a bitmap: (1) the mark *in use* of every bitmap, in the directory where it
//!   lies (each mark lies in one sector), (2) sync. Only then does anything else happen.
//! * **At close**: (1) bits, tables and a new directory, all to clusters that nothing names, (2) a round, which makes them and
//!   their refcounts stable, (3) the header, in one sector, (4) sync; then what they replace is given back. Until (3) the header
//!   names the directory whose bitmaps are marked.
//! * **Removal** of one: as at close, with a directory that lacks it.
//!
//! # Hostile images
//! A directory that cannot be read is not used: the image opens without bitmaps, and says at its first write that it has none.
//! A bitmap of which anything is wrong is inconsistent: it can be removed, and nothing else. Memory is bounded by
//! [`BITMAP_BYTES_MAX`](crate::limits::BITMAP_BYTES_MAX) for the bits of all bitmaps together.
//!
//! # Costs
//! At open: reads of the directory, the tables and the bits. At close of an image that is open for writing: all bitmaps are
//! written anew.

use bytes::Bytes;
use infill_base::{Ctx, ErrorKind, IoError, IoResult};
use infill_node::{BITMAP_NAME_BYTES_MAX, Bitmap, InfoValue};
use infill_storage::StorageHandle;
use infill_storage::sync::atomic::{AtomicBool, Ordering};
use infill_storage::sync::{Arc, Mutex, lock};

use crate::format::limits::{
    BITMAP_BYTES_MAX, BITMAP_DIRECTORY_BYTES_MAX, BITMAP_TABLE_BYTES_MAX, BITMAPS_MAX,
};
use crate::geometry::{Geometry, HostOffset, TABLE_ENTRY_BYTES};
use crate::header::{BitmapDirectory, Header, TableRef};
use crate::image::Image;
use crate::metaio;
use crate::refcount::HostRun;
use crate::write_back::Freed;
use directory::{BitmapFlags, Bits, GRANULARITY_BITS, Listed, bits_bytes};

pub(crate) mod directory;

/// A bitmap of the directory, and what belongs to it.
#[derive(Clone, Debug)]
struct Kept {
    listed: Listed,
    /// The clusters of its bits, where its table says so without doubt. What is not known is never given back.
    data: Option<Vec<HostOffset>>,
}

/// What the image keeps, as the file has it.
#[derive(Debug, Default)]
struct List {
    directory: Option<BitmapDirectory>,
    kept: Vec<Kept>,
    /// What was loaded, until the node's handle takes it.
    loaded: Vec<Bitmap>,
}

/// The bitmaps of an image.
#[derive(Debug, Default)]
pub(crate) struct Bitmaps {
    list: Mutex<List>,
    /// Whether the image may go on to say that its bitmaps are right.
    valid: AtomicBool,
}

/// What is read while bitmaps are loaded.
struct Loader<'a> {
    cx: &'a Ctx,
    storage: &'a StorageHandle,
    geometry: Geometry,
    size: u64,
    read_only: bool,
    /// Bytes of tables and of bits that may still be read.
    table_bytes: u64,
    bits_bytes: u64,
}

impl Loader<'_> {
    /// The table of a bitmap.
    async fn table(&mut self, listed: &Listed) -> Result<Vec<Bits>, String> {
        let file_len = self.storage.len();
        let (at, bytes) = listed.table_place(&self.geometry, file_len)?;
        self.table_bytes = self.table_bytes.checked_sub(bytes).ok_or("has too long a table")?;
        let read = metaio::read(self.cx, self.storage, at, bytes as usize).await;
        let read = read.map_err(|error| format!("has a table that cannot be read: {error}"))?;
        directory::parse_table(&read, &self.geometry, file_len)
    }

    /// The bitmap with its bits.
    async fn bitmap(&mut self, listed: &Listed, table: Result<&[Bits], String>) -> Result<Bitmap, String> {
        if let Some(why) = listed.unusable(&self.geometry, self.size) {
            return Err(why);
        }
        let table = table?;
        let total = bits_bytes(self.size, listed.granularity());
        self.bits_bytes = self.bits_bytes.checked_sub(total).ok_or("all bitmaps together are too large")?;
        let name = String::from_utf8(listed.name.clone()).map_err(|_| "its name is not UTF-8")?;
        let bitmap = Bitmap::new(name, self.size, listed.granularity()).map_err(|error| error.to_string())?;
        let cluster = self.geometry.cluster_bytes();
        for (nth, bits) in (0u64..).zip(table) {
            let from = nth * cluster;
            let len = cluster.min(total.saturating_sub(from));
            match bits {
                Bits::Clear => {}
                Bits::Set => {
                    let bytes = u64::from(u8::BITS) * listed.granularity();
                    bitmap.map().mark(from.saturating_mul(bytes), len.saturating_mul(bytes));
                }
                Bits::At(host) => {
                    let read = metaio::read(self.cx, self.storage, host.0, len as usize).await;
                    let read = read.map_err(|error| format!("its bits cannot be read: {error}"))?;
                    bitmap.map().mark_bits(from, &read);
                }
            }
        }
        bitmap.set_recording(listed.flags.contains(BitmapFlags::AUTO));
        Ok(bitmap.stored(self.read_only, false))
    }

    async fn list(&mut self, directory: BitmapDirectory) -> Result<List, String> {
        directory::check_place(&directory, &self.geometry, self.storage.len())?;
        let bytes = metaio::read(self.cx, self.storage, directory.at.0, directory.len as usize).await;
        let bytes = bytes.map_err(|error| format!("the directory cannot be read: {error}"))?;
        let mut list = List { directory: Some(directory), ..List::default() };
        for listed in directory::parse(&bytes, directory.count)? {
            let table = self.table(&listed).await;
            let known = table.as_ref().map(Vec::as_slice).map_err(Clone::clone);
            let bitmap = match self.bitmap(&listed, known).await {
                Ok(bitmap) => bitmap,
                Err(why) => {
                    let (image, bitmap) = (self.storage.name(), listed.shown_name());
                    tracing::warn!(image, bitmap, "the bitmap is inconsistent: {why}");
                    inconsistent(&listed, self.read_only)?
                }
            };
            list.loaded.push(bitmap);
            let hosts = |table: Vec<Bits>| table.into_iter().filter_map(Bits::host).collect();
            list.kept.push(Kept { listed, data: table.ok().map(hosts) });
        }
        Ok(list)
    }
}

impl Bits {
    fn host(self) -> Option<HostOffset> {
        match self {
            Bits::At(host) => Some(host),
            Bits::Clear | Bits::Set => None,
        }
    }
}

/// What is shown of a bitmap that cannot be used. It has no bits.
fn inconsistent(listed: &Listed, read_only: bool) -> Result<Bitmap, String> {
    let name: String = listed.shown_name();
    let end = (0..=name.len().min(BITMAP_NAME_BYTES_MAX)).rev().find(|at| name.is_char_boundary(*at));
    let bitmap = Bitmap::new(&name[..end.unwrap_or(0)], 0, listed.granularity());
    Ok(bitmap.map_err(|error| error.to_string())?.stored(read_only, true))
}

impl Bitmaps {
    /// Those that the header names.
    pub(crate) async fn load(cx: &Ctx, storage: &StorageHandle, header: &Header, read_only: bool) -> Bitmaps {
        let geometry = header.geometry();
        let mut loader = Loader {
            cx,
            storage,
            geometry,
            size: header.size(),
            read_only,
            table_bytes: BITMAP_TABLE_BYTES_MAX,
            bits_bytes: BITMAP_BYTES_MAX,
        };
        let found = match header.bitmaps() {
            Ok(None) => return Bitmaps::default(),
            Ok(Some(directory)) => loader.list(directory).await,
            Err(error) => Err(error.to_string()),
        };
        match found {
            Ok(list) => Bitmaps { list: Mutex::new(list), valid: AtomicBool::new(true) },
            Err(why) => {
                let image = storage.name();
                tracing::warn!(image, "the bitmaps are damaged, and not used: {why}");
                Bitmaps::default()
            }
        }
    }

    /// Whether the image may go on to say that its bitmaps are right.
    pub(crate) fn are_valid(&self) -> bool {
        self.valid.load(Ordering::Acquire)
    }

    /// What was loaded, once.
    pub(crate) fn take_loaded(&self) -> Vec<Bitmap> {
        std::mem::take(&mut lock(&self.list).loaded)
    }

    /// What `info` tells of them; `None` where there are none.
    pub(crate) fn told(&self) -> Option<InfoValue> {
        let list = lock(&self.list);
        let one = |kept: &Kept| {
            let flags = [(BitmapFlags::IN_USE, "in-use"), (BitmapFlags::AUTO, "auto")];
            let flags = flags.into_iter().filter(|(flag, _)| kept.listed.flags.contains(*flag));
            InfoValue::Object(vec![
                ("flags", InfoValue::List(flags.map(|(_, text)| InfoValue::Text(text.into())).collect())),
                ("name", InfoValue::Text(kept.listed.shown_name())),
                ("granularity", InfoValue::Int(kept.listed.granularity())),
            ])
        };
        (!list.kept.is_empty()).then(|| InfoValue::List(list.kept.iter().map(one).collect()))
    }
}

impl Image {
    /// Before the image is written: gives the bitmaps up if they lie where something else does, or if no change of the header
    /// could ever name others.
    pub(crate) async fn check_bitmaps(&self, cx: &Ctx) -> IoResult<()> {
        let Some(directory) = lock(&self.bitmaps.list).directory else { return Ok(()) };
        let run = self.clusters_of(directory.at, directory.len);
        let writer = self.writer()?;
        let mut why =
            writer.refcounts.metadata_at(cx, run).await?.map(|what| format!("the {what} lies there, too"));
        if writer.refcounts.has_l2_table(run) {
            why = Some("an L2 table lies there, too".into());
        }
        for cluster in run.first.0..run.first.0 + run.count {
            let count = writer.refcounts.refcount(cx, crate::geometry::HostCluster(cluster)).await?;
            if count != 1 {
                why = Some(format!("the refcount of its cluster {cluster} is {count}, must be 1"));
            }
        }
        if let Err(error) = self.header().with_bitmaps(Some(directory)) {
            why = Some(error.to_string());
        }
        if let Some(why) = why {
            let image = self.storage.name();
            tracing::warn!(image, "the bitmaps are not used, their directory cannot be changed: {why}");
            *lock(&self.bitmaps.list) = List::default();
            self.bitmaps.valid.store(false, Ordering::Release);
        }
        Ok(())
    }

    fn clusters_of(&self, at: HostOffset, bytes: u64) -> HostRun {
        let first = self.geometry.host_cluster(at);
        HostRun { first, count: bytes.div_ceil(self.geometry.cluster_bytes()), zeroed: false }
    }

    /// Marks every bitmap as in use, where the directory lies, stable when this returns. Between two rounds.
    pub(crate) async fn mark_bitmaps(&self) -> IoResult<()> {
        let (directory, bytes, marked) = {
            let list = lock(&self.bitmaps.list);
            let Some(directory) = list.directory else { return Ok(()) };
            let mut marked: Vec<Listed> = list.kept.iter().map(|kept| kept.listed.clone()).collect();
            marked.iter_mut().for_each(|listed| listed.flags |= BitmapFlags::IN_USE);
            if marked.iter().zip(&list.kept).all(|(marked, kept)| marked.flags == kept.listed.flags) {
                return Ok(());
            }
            (directory, directory::serialize(&marked), marked)
        };
        metaio::write(&Ctx::GUEST, &self.storage, directory.at.0, bytes.into()).await?;
        #[cfg(feature = "planted-faults")]
        let unsynced = self.fault(crate::faults::Fault::BitmapsMarkUnsynced);
        #[cfg(not(feature = "planted-faults"))]
        let unsynced = false;
        if !unsynced {
            self.sync_storage().await?;
        }
        for (kept, marked) in lock(&self.bitmaps.list).kept.iter_mut().zip(marked) {
            kept.listed = marked;
        }
        Ok(())
    }

    /// Refuses a bitmap that could not be stored.
    pub(crate) fn check_persistent(&self, node: &str, name: &str, granularity: u64) -> IoResult<()> {
        let refused = |why: String| {
            let why = format!("Can't make bitmap '{name}' persistent in '{node}': {why}");
            Err(IoError::new(ErrorKind::Unsupported, why))
        };
        let header = self.header();
        if header.version() < 3 {
            return refused("Cannot store dirty bitmaps in qcow2 v2 files".into());
        }
        if self.writer.is_none() {
            return refused("the image is open read-only".into());
        }
        let most = 1u64 << GRANULARITY_BITS.end();
        if granularity > most {
            return refused(format!("Granularity exceeds maximum ({most} bytes)"));
        }
        if bits_bytes(self.size(), granularity).next_multiple_of(self.geometry.cluster_bytes())
            > BITMAP_BYTES_MAX
        {
            return refused("Too much space will be occupied by the bitmap. Use larger granularity".into());
        }
        if self.size() == 0 {
            return refused("the disk has no bytes".into());
        }
        let list = lock(&self.bitmaps.list);
        if list.kept.len() >= BITMAPS_MAX as usize {
            return refused("Maximum number of persistent bitmaps is already reached".into());
        }
        let probe = BitmapDirectory { at: HostOffset(0), len: 0, count: 1 };
        match header.with_bitmaps(Some(probe)) {
            Ok(_) => Ok(()),
            Err(error) => refused(error.to_string()),
        }
    }

    /// Stores `bitmaps` and says that they are right. The disk does not change until the image is closed.
    pub(crate) async fn store_bitmaps(self: &Arc<Image>, bitmaps: Vec<Arc<Bitmap>>) -> IoResult<()> {
        let writer = self.prepare().await?;
        let _alone = writer.bitmaps.exclusive(0, 1).await;
        let mut next: Vec<Kept> = lock(&self.bitmaps.list).kept.clone();
        let mut replaced = Vec::new();
        let mut made = Made { image: self, runs: Vec::new() };
        for bitmap in bitmaps {
            let name = bitmap.name().as_bytes();
            let place = next.iter().position(|kept| kept.listed.name == name);
            let mut listed = match place {
                Some(place) => next[place].listed.clone(),
                None => Listed::new(bitmap.name(), bitmap.map().granularity()),
            };
            listed.flags.set(BitmapFlags::AUTO, bitmap.is_recording());
            listed.flags.remove(BitmapFlags::IN_USE);
            let kept = made.write_bitmap(&bitmap, listed).await?;
            match place {
                Some(place) => replaced.push(std::mem::replace(&mut next[place], kept)),
                None => next.push(kept),
            }
        }
        self.list_bitmaps(made, next, replaced).await
    }

    /// Takes a bitmap out of the image.
    pub(crate) async fn remove_bitmap(self: &Arc<Image>, name: &str) -> IoResult<()> {
        let is_named = |kept: &Kept| kept.listed.shown_name() == name;
        if !lock(&self.bitmaps.list).kept.iter().any(is_named) {
            return Ok(());
        }
        let writer = self.prepare().await?;
        let _alone = writer.bitmaps.exclusive(0, 1).await;
        let mut next: Vec<Kept> = lock(&self.bitmaps.list).kept.clone();
        let Some(place) = next.iter().position(is_named) else { return Ok(()) };
        let removed = next.remove(place);
        self.list_bitmaps(Made { image: self, runs: Vec::new() }, next, vec![removed]).await
    }

    /// Has the header name a directory of `next`, and gives back what was `replaced`.
    async fn list_bitmaps(
        self: &Arc<Image>,
        mut made: Made<'_>,
        next: Vec<Kept>,
        replaced: Vec<Kept>,
    ) -> IoResult<()> {
        let listed: Vec<Listed> = next.iter().map(|kept| kept.listed.clone()).collect();
        let directory = match listed.is_empty() {
            true => None,
            false => Some(made.write_directory(&listed).await?),
        };
        // Their refcounts too.
        #[cfg(feature = "planted-faults")]
        let unsynced = self.fault(crate::faults::Fault::BitmapsListedFirst);
        #[cfg(not(feature = "planted-faults"))]
        let unsynced = false;
        if !unsynced {
            self.sync().await?;
        }
        let writer = self.writer()?;
        let turn = writer.rounds.turn().await;
        let rewrite = self.header().with_bitmaps(directory)?;
        // From here on the file may name them.
        made.runs.clear();
        self.rewrite_header(&turn, rewrite).await?;
        let old = {
            let mut list = lock(&self.bitmaps.list);
            list.kept = next;
            std::mem::replace(&mut list.directory, directory)
        };
        self.bitmaps.valid.store(directory.is_some(), Ordering::Release);
        if let Some(old) = old {
            self.give_up(old.at, old.len);
        }
        for Kept { listed, data } in replaced {
            // Where the table was not understood, what it takes leaks until a check.
            let Some(data) = data else { continue };
            self.give_up(listed.table.at, u64::from(listed.table.count) * TABLE_ENTRY_BYTES);
            data.into_iter().for_each(|host| self.give_up(host, 1));
        }
        Ok(())
    }

    fn give_up(self: &Arc<Image>, at: HostOffset, bytes: u64) {
        let run = self.clusters_of(at, bytes);
        if run.count > 0 {
            self.unmapped(Freed::clusters(run.first, run.count));
        }
    }
}

/// Clusters that were written and that the header does not name yet: given back if it never will.
struct Made<'a> {
    image: &'a Arc<Image>,
    runs: Vec<HostRun>,
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        for run in self.runs.drain(..) {
            self.image.give_back(&Ctx::GUEST, run);
        }
    }
}

impl Made<'_> {
    /// Contiguous clusters for `bytes` bytes, filled with them.
    async fn write(&mut self, mut bytes: Vec<u8>) -> IoResult<HostOffset> {
        let cluster = self.image.geometry.cluster_bytes();
        bytes.resize(bytes.len().next_multiple_of(cluster as usize), 0);
        let run = self.image.contiguous(&Ctx::GUEST, bytes.len() as u64 / cluster).await?;
        self.runs.push(run);
        let at = self.image.geometry.host_offset(run.first);
        metaio::write(&Ctx::GUEST, &self.image.storage, at.0, Bytes::from(bytes)).await?;
        Ok(at)
    }

    /// Writes the bits and the table of a bitmap.
    async fn write_bitmap(&mut self, bitmap: &Bitmap, listed: Listed) -> IoResult<Kept> {
        let map = bitmap.map();
        let (cluster, total) = (self.image.geometry.cluster_bytes(), map.bits_len());
        if total == 0 || total.next_multiple_of(cluster) > BITMAP_BYTES_MAX {
            let why = format!("the bitmap '{}' has {total} bytes, which cannot be stored", bitmap.name());
            return Err(IoError::new(ErrorKind::Unsupported, why).in_node(self.image.storage.name()));
        }
        let (mut table, mut data) = (Vec::new(), Vec::new());
        for from in (0..total).step_by(cluster as usize) {
            let mut bits = vec![0; cluster.min(total - from) as usize];
            let mut entry = 0;
            if map.bits(from, &mut bits) {
                let at = self.write(bits).await?;
                data.push(at);
                entry = at.0;
            }
            table.extend_from_slice(&u64::to_be_bytes(entry));
        }
        let count = (table.len() as u64 / TABLE_ENTRY_BYTES) as u32;
        let at = self.write(table).await?;
        Ok(Kept { listed: Listed { table: TableRef { at, count }, ..listed }, data: Some(data) })
    }

    async fn write_directory(&mut self, listed: &[Listed]) -> IoResult<BitmapDirectory> {
        let bytes = directory::serialize(listed);
        let len = bytes.len() as u64;
        if len > BITMAP_DIRECTORY_BYTES_MAX {
            let why = "the names of the bitmaps are too long to be stored: remove some";
            return Err(IoError::new(ErrorKind::Unsupported, why).in_node(self.image.storage.name()));
        }
        Ok(BitmapDirectory { at: self.write(bytes).await?, len, count: listed.len() as u32 })
    }
}
