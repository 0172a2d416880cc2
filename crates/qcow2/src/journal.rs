//! The volatile journal of an image: what is recorded, and how it is replayed.
//!
//! * Recorded is every change of an L2 entry, by its byte in the file, and of an L1 entry, by its number (the table may move
//!   between two rounds). L2 tables never move, and those that a snapshot shares never change.
//! * **Refcounts are not recorded**: they follow. A cluster that a replayed entry names is counted if it is not; what had
//!   fallen in memory alone leaks, as after any crash. Blocks and tables of refcounts are stable before they are used.
//! * That does not hold for compressed clusters, of which several share a host cluster that counts each: an image of which a
//!   record names one is marked dirty before anything else, so that all of it is counted anew after the replay.
//! * A replay sets entries and refcounts in the cache of an image that nobody else has yet, and ends with an ordinary round:
//!   its order of writes, and what a crash in it may leave, are those of any round.
//! * The header says that a journal belongs to the image (an autoclear bit) from before the first record until a clean
//!   close; version 2 has no such bit, and is written through.

use infill_base::{Ctx, IoResult, OpenError};
use infill_node::mapping::{Entry, Slice, SliceKey};
use infill_storage::journal::{Changed, Found, Record};
use infill_storage::sync::Arc;

use crate::entry::{COMPRESSED, L1Entry, L2Entry, L2View, StandardCluster};
#[cfg(feature = "planted-faults")]
use crate::faults::Fault;
use crate::features::{Autoclear, Incompatible};
use crate::geometry::{HostOffset, L1Index};
use crate::header::HeaderChange;
use crate::image::Image;

/// Marks the place of an L1 entry: the rest is its number. Without it, a place is a byte of the file.
const L1_PLACE: u64 = 1 << 63;

impl Image {
    /// Sets an entry of a slice, recorded.
    pub(crate) fn set_entry(self: &Arc<Image>, slice: &Arc<Slice>, index: usize, entry: L2Entry) {
        let new: Entry = [entry.word, entry.bitmap];
        let record = || {
            let layout = self.slices.layout();
            let SliceKey { table, index: nth } = slice.key();
            let at = nth as usize * layout.slice_bytes + index * self.geometry.l2_entry_bytes() as usize;
            Record { place: table + at as u64, old: slice.load(index), new }
        };
        #[cfg(feature = "planted-faults")]
        if self.fault(Fault::RecordAfterEntry) {
            let (image, late) = (self.clone(), record());
            self.slices.set(slice, index, new);
            return infill_storage::rt::spawn(async move {
                infill_storage::rt::sleep(std::time::Duration::from_micros(500)).await;
                image.ledger.change(|| late, || ());
            });
        }
        self.ledger.change(record, || self.slices.set(slice, index, new));
    }

    /// Sets an entry of the L1 table, recorded.
    pub(crate) fn set_table(&self, index: L1Index, entry: L1Entry) {
        #[cfg(feature = "planted-faults")]
        if self.fault(Fault::TableUnrecorded) {
            return self.l1.set(index, entry);
        }
        let record = || Record {
            place: L1_PLACE | u64::from(index.0),
            old: [self.l1.get(index).0, 0],
            new: [entry.0, 0],
        };
        self.ledger.change(record, || self.l1.set(index, entry));
    }

    /// Begins to record, if there is a journal; gives the autoclear bits that the header has to have.
    pub(crate) fn begin_journal(&self) -> Autoclear {
        match self.ledger.begin(self.header().version() >= 3) {
            Ok(true) => Autoclear::VOLATILE_JOURNAL,
            Ok(false) => Autoclear::empty(),
            Err(error) => {
                let image = self.storage.name();
                tracing::warn!(%error, image, "no journal can be kept: every change is written through");
                Autoclear::empty()
            }
        }
    }

    /// Everything is stable: the image speaks of no journal any more, then there is none.
    pub(crate) async fn end_journal(&self) -> IoResult<()> {
        let Some(ended) = self.ledger.end() else { return Ok(()) };
        let turn = self.writer()?.rounds.turn().await;
        let bits = self.header().autoclear();
        if bits.contains(Autoclear::VOLATILE_JOURNAL) {
            let bits = bits - Autoclear::VOLATILE_JOURNAL;
            self.change_header(&turn, &[HeaderChange::Autoclear(bits)]).await?;
        }
        ended.remove();
        Ok(())
    }

    /// To be called before anything is acknowledged: what can be seen and has no record is stable afterwards.
    pub(crate) async fn written_through(self: &Arc<Image>) -> IoResult<()> {
        #[cfg(feature = "planted-faults")]
        if self.fault(Fault::OwedUnpaid) {
            return Ok(());
        }
        if self.ledger.owes() { self.sync().await } else { Ok(()) }
    }

    /// Puts into the image what a process before has changed in its memory alone, and makes it stable.
    pub(crate) async fn replay(self: &Arc<Image>, found: &Found) -> Result<(), OpenError> {
        let places = found.places();
        tracing::info!(
            image = self.storage.name(),
            records = found.records.len(),
            entries = places.len(),
            "replays the journal of a process that died"
        );
        if found.records.iter().any(|record| record.place & L1_PLACE == 0 && record.new[0] & COMPRESSED != 0)
        {
            let dirty = self.header().incompatible() | Incompatible::DIRTY;
            let turn = self.writer().map_err(OpenError::Io)?.rounds.turn().await;
            let marked = self.change_header(&turn, &[HeaderChange::Incompatible(dirty)]).await;
            marked.map_err(OpenError::Io)?;
        }
        for (place, changed) in &places {
            if place & L1_PLACE == 0 {
                self.replay_entry(*place, changed).await?;
            } else {
                self.replay_table(place & !L1_PLACE, changed).await?;
            }
        }
        self.sync().await.map_err(OpenError::Io)
    }

    async fn replay_entry(self: &Arc<Image>, place: u64, changed: &Changed) -> Result<(), OpenError> {
        let cx = &Ctx::GUEST;
        let in_table = self.geometry.in_cluster(place);
        let slice_bytes = self.slices.layout().slice_bytes as u64;
        let key = SliceKey { table: place - in_table, index: (in_table / slice_bytes) as u32 };
        let index = (in_table % slice_bytes / self.geometry.l2_entry_bytes()) as usize;
        let slice = self.slice(cx, key).await.map_err(OpenError::Io)?;
        let now = slice.load(index);
        let last = changed.last(now).ok_or_else(|| self.foreign("L2 entry at byte", place, now))?;
        let entry = L2Entry { word: last[0], bitmap: last[1] };
        let view = entry.view(&self.geometry).map_err(|error| OpenError::Io(error.into()))?;
        if let L2View::Standard(StandardCluster { host: Some(host), .. }) = view {
            self.count_named(host).await?;
        }
        if last != now {
            self.slices.set(&slice, index, last);
        }
        Ok(())
    }

    async fn replay_table(&self, number: u64, changed: &Changed) -> Result<(), OpenError> {
        let index = L1Index(u32::try_from(number).unwrap_or(u32::MAX));
        let now = [self.l1.get(index).0, 0];
        let last = changed.last(now).filter(|_| index.0 < self.l1.table().count);
        let entry = L1Entry(last.ok_or_else(|| self.foreign("L1 entry", number, now))?[0]);
        let view = entry.view(&self.geometry).map_err(|error| OpenError::Io(error.into()))?;
        if let Some(table) = view {
            self.count_named(table.at).await?;
        }
        if entry.0 != now[0] {
            self.l1.set(index, entry);
        }
        Ok(())
    }

    async fn count_named(&self, at: HostOffset) -> Result<(), OpenError> {
        let counted =
            async { self.writer()?.refcounts.count_named(&Ctx::GUEST, self.geometry.host_cluster(at)).await };
        counted.await.map_err(OpenError::Io)
    }

    fn foreign(&self, what: &str, number: u64, now: Entry) -> OpenError {
        OpenError::Refused {
            why: format!(
                "{what} {number} of {} holds {:#x} {:#x}, which is neither what the journal of a process that died says it \
                 held, nor what that has put there: the image was changed by somebody else; check it, and delete the \
                 journal to use it as it is",
                self.storage.name(),
                now[0],
                now[1]
            ),
        }
    }

    /// The planted mistake: an entry is set behind the journal's back.
    #[cfg(feature = "planted-faults")]
    pub(crate) fn plant_unrecorded(&self, slice: &Arc<Slice>, index: usize, new: StandardCluster) {
        if self.fault(Fault::PopulateUnrecorded) {
            let entry = L2Entry::standard(new, &self.geometry);
            self.slices.set(slice, index, [entry.word, entry.bitmap]);
        }
    }
}
