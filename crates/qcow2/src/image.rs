//! An open image: its parts, and how it is opened.

use bytes::Bytes;
use infill_base::{Ctx, DiscardMode, ErrorKind, IoError, IoResult, OpenError, range_end};
use infill_node::mapping::{ByteOrder, SLICE_BYTES, SliceCache, SliceLayout};
use infill_node::{BackingSlot, Repair};
use infill_storage::StorageHandle;
use infill_storage::journal::{Journaling, Ledger};
use infill_storage::sync::atomic::{AtomicU64, Ordering};
use infill_storage::sync::{Arc, Mutex, lock};

use crate::bitmaps::Bitmaps;
use crate::check::check;
use crate::entry::{CompressedCluster, L1Entry, be64};
use crate::features::Autoclear;
use crate::geometry::{Geometry, TABLE_ENTRY_BYTES};
use crate::header::{Header, Purpose, WriteGate};
use crate::in_flight::InFlight;
use crate::l1::L1;
use crate::metaio;
use crate::snapshots::Snapshots;
use crate::writer::Writer;

/// Bytes of L2 slices that are cached by default: the map of 256 GiB at clusters of 64 KiB (QEMU's limit, too).
pub const METADATA_CACHE_BYTES: u64 = 32 << 20;

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Nothing is written, the header's marks included.
    pub read_only: bool,
    /// An image that moved to another host is opened all the same, if it is opened read-only.
    pub fenced: bool,
    /// What a guest's discard does.
    pub discard: DiscardMode,
    /// Bytes of L2 slices that are cached.
    pub metadata_cache_bytes: u64,
    /// What becomes of changes that only memory has when the process dies.
    pub journal: Journaling,
    /// A mistake to make, for a test that has to find it.
    #[cfg(feature = "planted-faults")]
    pub fault: Option<crate::faults::Fault>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            read_only: false,
            fenced: false,
            discard: DiscardMode::default(),
            metadata_cache_bytes: METADATA_CACHE_BYTES,
            journal: Journaling::Off,
            #[cfg(feature = "planted-faults")]
            fault: None,
        }
    }
}

/// What all reactors share of an image.
pub(crate) struct Image {
    pub(crate) storage: StorageHandle,
    /// The storage takes multiples of this only, in bytes: at most a subcluster.
    block_bytes: u64,
    pub(crate) geometry: Geometry,
    pub(crate) options: OpenOptions,
    /// As it stands in the file, or is just being written.
    pub(crate) header: Mutex<Header>,
    pub(crate) size: AtomicU64,
    pub(crate) l1: L1,
    pub(crate) slices: SliceCache,
    /// Every change of `l1` and `slices` goes through it.
    pub(crate) ledger: Ledger,
    pub(crate) backing: BackingSlot,
    pub(crate) in_flight: InFlight,
    pub(crate) bitmaps: Bitmaps,
    pub(crate) snapshots: Snapshots,
    /// `None`: open read-only.
    pub(crate) writer: Option<Writer>,
    /// The compressed cluster that was unpacked last: neighbours are mostly read one after another. Forgotten when another one
    /// may take its place, which nobody reads any more by then.
    pub(crate) unpacked: Mutex<Option<(CompressedCluster, Bytes)>>,
}

impl Image {
    /// Opens the image in `storage`. Nothing is written before every check has passed.
    pub(crate) async fn open(
        cx: &Ctx,
        storage: StorageHandle,
        mut options: OpenOptions,
    ) -> Result<Arc<Image>, OpenError> {
        let read_only = options.read_only || !storage.limits().writable;
        let purpose = if options.fenced && read_only { Purpose::UseMoved } else { Purpose::Use };
        let mut header = Header::read(cx, &storage, purpose).await?;
        let geometry = header.geometry();
        let align = storage.limits().request_align;
        if u64::from(align) > geometry.subcluster_bytes() {
            return Err(OpenError::Refused {
                why: format!(
                    "{} wants requests of at least {align} bytes, but a (sub)cluster of this image has {}: writes of \
                     neighbours would overwrite each other; put it on a storage of smaller blocks",
                    storage.name(),
                    geometry.subcluster_bytes()
                ),
            });
        }
        let journal = std::mem::take(&mut options.journal);
        let bit = header.autoclear().contains(Autoclear::VOLATILE_JOURNAL);
        #[cfg(feature = "planted-faults")]
        let bit = bit || options.fault == Some(crate::faults::Fault::ReplayedUnasked);
        if let Some(found) = journal.pending(&storage.name(), read_only, bit)? {
            // Before any repair: that would take what only the journal names for leaked.
            let image = Image::build(cx, &storage, header.clone(), &options, Journaling::Off).await?;
            Arc::new(image).replay(found).await?;
            journal.replayed();
            // It may want to be counted anew.
            header = Header::read(cx, &storage, purpose).await?;
        }
        let journal = if read_only { Journaling::Off } else { journal };
        if !read_only && header.writable()? == WriteGate::RepairFirst {
            header = repaired(cx, &storage).await?;
        }
        options.read_only = read_only;
        let bitmaps = Bitmaps::load(cx, &storage, &header, read_only).await;
        let image = Image::build(cx, &storage, header, &options, journal).await?;
        let snapshots = Snapshots::load(cx, &storage, &image.header()).await;
        let image = Image { bitmaps, snapshots, ..image };
        if !read_only {
            image.check_bitmaps(cx).await?;
        }
        Ok(Arc::new(image))
    }

    /// What is in memory of an image whose header has passed.
    async fn build(
        cx: &Ctx,
        storage: &StorageHandle,
        header: Header,
        options: &OpenOptions,
        journal: Journaling,
    ) -> Result<Image, OpenError> {
        let (geometry, align) = (header.geometry(), storage.limits().request_align);
        let table = header.l1();
        let len = u64::from(table.count) * TABLE_ENTRY_BYTES;
        let bytes = metaio::read(cx, storage, table.at.0, len as usize).await?;
        let layout = SliceLayout {
            slice_bytes: SLICE_BYTES.max(align as usize).min(geometry.cluster_bytes() as usize),
            entry_words: (geometry.l2_entry_bytes() / TABLE_ENTRY_BYTES) as usize,
            order: ByteOrder::Big,
        };
        let l1 = L1::new(table, &bytes, align);
        let writer = (!options.read_only).then(|| Writer::new(storage.clone(), &header));
        if let Some(writer) = &writer {
            let tables = bytes.chunks_exact(TABLE_ENTRY_BYTES as usize).map(|entry| L1Entry(be64(entry)));
            let tables = tables.filter_map(|entry| entry.view(&geometry).ok().flatten());
            writer.refcounts.note_l2_tables(tables.map(|table| table.at));
        }
        Ok(Image {
            block_bytes: u64::from(align.max(1)),
            geometry,
            size: AtomicU64::new(header.size()),
            l1,
            slices: SliceCache::new(layout, options.metadata_cache_bytes),
            ledger: Ledger::new(journal),
            backing: BackingSlot::new(None),
            in_flight: InFlight::default(),
            bitmaps: Bitmaps::default(),
            snapshots: Snapshots::default(),
            writer,
            unpacked: Mutex::new(None),
            header: Mutex::new(header),
            options: options.clone(),
            storage: storage.clone(),
        })
    }

    /// Size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Whether the storage takes any byte.
    pub(crate) fn takes_any_byte(&self) -> bool {
        self.block_bytes == 1
    }

    /// The storage takes multiples of this only, in bytes.
    pub(crate) fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Whether a range of a cluster, given by its start in guest or host, is whole blocks of the storage.
    pub(crate) fn is_whole_blocks(&self, at: u64, len: u64) -> bool {
        (at | len) & (self.block_bytes - 1) == 0
    }

    /// A copy of the header.
    pub(crate) fn header(&self) -> Header {
        lock(&self.header).clone()
    }

    /// Whether absent clusters may read as something else than zeroes: here, or for whoever opens the image with the
    /// backing that it names.
    pub(crate) fn is_over_backing(&self) -> bool {
        self.backing.is_some() || lock(&self.header).backing().is_some()
    }

    /// Refuses a range that does not lie on the disk.
    pub(crate) fn check(&self, at: u64, len: u64) -> IoResult<()> {
        let size = self.size();
        if range_end(at, len, size).is_some() {
            return Ok(());
        }
        let why = format!("the range ends behind the end of the disk ({size} bytes)");
        Err(IoError::new(ErrorKind::InvalidInput, why).at(at, len).in_node(self.storage.name()))
    }
}

/// The header of an image that is marked dirty, after it was repaired.
async fn repaired(cx: &Ctx, storage: &StorageHandle) -> Result<Header, OpenError> {
    let report = check(cx, storage, Repair::All).await?;
    let header = Header::read(cx, storage, Purpose::Use).await?;
    if header.writable()? == WriteGate::Ready {
        return Ok(header);
    }
    Err(OpenError::Refused {
        why: format!(
            "{} is marked dirty, and its repair left {} corruptions and {} errors; look at it with `infill check`, or open \
             it read-only",
            storage.name(),
            report.corruptions,
            report.check_errors
        ),
    })
}
