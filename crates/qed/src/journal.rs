//! The volatile journal of an image: what is recorded, and how it is replayed.
//!
//! * Recorded is every change of an entry of either table, by its byte in the file: tables never move.
//! * A replay sets entries in the cache of an image that nobody else has yet, and ends with an ordinary round, ordered also
//!   where the image was marked: its repair, if it has to have one, comes after. New tables are zero in the file, so what
//!   is not recorded of them is not there.
//! * The header says that a journal belongs to the image (an autoclear bit) from before the first record until a clean close.

use std::time::Duration;

use infill_base::{Ctx, IoError, IoResult, OpenError, align_down};
use infill_node::mapping::{SLICE_BYTES, Slice, SliceCache};
use infill_storage::journal::{Found, Record};
use infill_storage::rt;
use infill_storage::sync::Arc;
use infill_storage::sync::atomic::Ordering;

use crate::entry::{Cluster, l2_table};
use crate::fault::Fault;
use crate::format::ENTRY_BYTES;
use crate::geometry::HostOffset;
use crate::header::VOLATILE_JOURNAL;
use crate::image::Image;

impl Image {
    /// Sets an entry of a slice, recorded.
    pub(crate) fn set_recorded(
        self: &Arc<Image>,
        cache: &SliceCache,
        slice: &Arc<Slice>,
        entry: usize,
        raw: u64,
    ) {
        let record = || {
            let key = slice.key();
            let at = u64::from(key.index) * SLICE_BYTES as u64 + entry as u64 * ENTRY_BYTES;
            Record { place: key.table + at, old: slice.load(entry), new: [raw, 0] }
        };
        if self.planted(Fault::RecordAfterEntry) {
            let (image, late) = (self.clone(), record());
            cache.set(slice, entry, [raw, 0]);
            return rt::spawn(async move {
                rt::sleep(Duration::from_micros(500)).await;
                image.ledger.change(|| late, || ());
            });
        }
        self.ledger.change(record, || cache.set(slice, entry, [raw, 0]));
    }

    /// Begins to record, if there is a journal; gives the autoclear bits that the header has to have.
    pub(crate) fn begin_journal(&self) -> u64 {
        match self.ledger.begin(true) {
            Ok(true) => VOLATILE_JOURNAL,
            Ok(false) => 0,
            Err(error) => {
                let image = self.storage.name();
                tracing::warn!(%error, image, "no journal can be kept: every change is written through");
                0
            }
        }
    }

    /// Everything is stable: the image speaks of no journal any more, then there is none. The caller holds the turn.
    pub(crate) async fn end_journal(&self, cx: &Ctx) -> IoResult<()> {
        let Some(ended) = self.ledger.end() else { return Ok(()) };
        let header = self.header();
        if header.autoclear() & VOLATILE_JOURNAL != 0 {
            self.store(cx, header.with_autoclear(header.autoclear() & !VOLATILE_JOURNAL)).await?;
        }
        ended.remove();
        Ok(())
    }

    /// Puts into the image what a process before has changed in its memory alone, and makes it stable.
    pub(crate) async fn replay(self: &Arc<Image>, cx: &Ctx, found: &Found) -> Result<(), OpenError> {
        let places = found.places();
        tracing::info!(
            image = self.storage.name(),
            records = found.records.len(),
            entries = places.len(),
            "replays the journal of a process that died"
        );
        self.ordered.store(true, Ordering::Release);
        let geometry = &self.layout.geometry;
        let l1 = self.layout.l1.0..self.layout.l1.0 + geometry.table_bytes();
        let tables = self.layout.header_end..self.space.end();
        for (place, changed) in &places {
            let place = *place;
            if !tables.contains(&place) || !place.is_multiple_of(ENTRY_BYTES) {
                return Err(self.foreign(place, 0));
            }
            // By its own place, not by its table's: nobody looks anything up in this image.
            let start = align_down(place, SLICE_BYTES as u64);
            let slice = self.slice(cx, &self.l2, HostOffset(start), 0).await.map_err(OpenError::Io)?;
            let entry = ((place - start) / ENTRY_BYTES) as usize;
            let now = slice.load(entry);
            let [last, _] = changed.last(now).ok_or_else(|| self.foreign(place, now[0]))?;
            let checked = if l1.contains(&place) {
                l2_table(last, &self.layout, self.space.end()).map(drop)
            } else {
                Cluster::checked(last, &self.layout, self.space.end()).map(drop)
            };
            checked.map_err(|error| OpenError::Io(IoError::from(error).in_node(self.storage.name())))?;
            if last != now[0] {
                self.l2.set(&slice, entry, [last, 0]);
            }
        }
        self.flush(cx).await.map_err(OpenError::Io)
    }

    fn foreign(&self, place: u64, now: u64) -> OpenError {
        OpenError::Refused {
            why: format!(
                "the entry at byte {place} of {} holds {now:#x}, which is neither what the journal of a process that died \
                 says it held, nor what that has put there: the image was changed by somebody else; check it, and delete \
                 the journal to use it as it is",
                self.storage.name()
            ),
        }
    }
}
