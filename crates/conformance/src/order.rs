//! Asserts the order of writes from the record of the disk (20-durability §3 and §4), operation by operation.
//!
//! Where the crash states ask what the disk shows, this asks why it may: at the moment at which a write is handed to the
//! medium, and may therefore be the only one that survives,
//! 1. the medium with this write alone does not contradict itself: no cluster is named twice, none that is named counts
//!    as free (so refcounts rise before and fall after the names, each with a sync in between);
//! 2. what a metadata write names anew is stable there already: payload, and L2 tables, since they were handed out;
//! 3. payload goes to a cluster only if nothing stable names it for another place of the disk (no reuse before sync 2);
//! 4. no sector of metadata has two writes in flight;
//! 5. the header's first sector is written alone: one write of 512 bytes.
//!
//! An image that says that it wants a repair is excused from 1 and 2.

use std::collections::BTreeMap;

use infill_sim::{Boundary, CrashPoint, Media, Pending, SECTOR_BYTES};

use crate::Format;
use crate::layout::{Layout, Name};
use crate::payload::{SectorKind, sector_kind};

/// Since when a cluster that nothing stable names holds something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Handed {
    /// Its first write has this number and is not stable.
    Written(u64),
    /// Its first write is stable.
    Stable,
}

/// Watches one disk.
#[derive(Debug)]
pub struct Order {
    format: Format,
    durable_hash: u64,
    durable: Layout,
    handed: BTreeMap<u64, Handed>,
}

impl Order {
    /// A watch on a disk with an image of `format`; `None` for a format that promises no order.
    pub fn new(format: Format, durable: &Media) -> Option<Order> {
        let layout = Layout::parse(format, durable)?.ok()?;
        Some(Order { format, durable_hash: durable.hash(), durable: layout, handed: BTreeMap::new() })
    }

    /// Looks at what has just happened; the error says which rule was broken.
    pub fn observe(&mut self, point: &CrashPoint) -> Result<(), String> {
        self.follow(point)?;
        if point.boundary != Boundary::Submitted {
            return Ok(());
        }
        let Some(newest) = point.pending.iter().max_by_key(|pending| pending.op.id) else { return Ok(()) };
        self.submitted(point, newest)
    }

    /// Brings the picture of what is stable up to date.
    fn follow(&mut self, point: &CrashPoint) -> Result<(), String> {
        // Not only where the medium has changed: zeroes over zeroes become stable, too.
        let is_pending = |id: u64| point.pending.iter().any(|pending| pending.op.id == id);
        for handed in self.handed.values_mut() {
            if let Handed::Written(id) = handed
                && !is_pending(*id)
            {
                *handed = Handed::Stable;
            }
        }
        if point.durable.hash() == self.durable_hash {
            return Ok(());
        }
        self.durable_hash = point.durable.hash();
        self.durable = self.parse(&point.durable)?;
        if let Some(what) = self.durable.contradiction() {
            return Err(format!("what is stable contradicts itself: {what}"));
        }
        let durable = &self.durable;
        self.handed.retain(|cluster, _| durable.name_of(*cluster).is_none());
        Ok(())
    }

    fn parse(&self, media: &Media) -> Result<Layout, String> {
        Layout::parse(self.format, media).unwrap_or_else(|| Err("the format has no structure".into()))
    }

    fn submitted(&mut self, point: &CrashPoint, newest: &Pending) -> Result<(), String> {
        let cluster_sectors = self.durable.cluster_bytes / SECTOR_BYTES;
        let sectors = &newest.op.sectors;
        self.header_alone(newest)?;
        self.no_reuse(newest)?;
        let mut touches_metadata = false;
        for (index, _) in sectors {
            let cluster = index / cluster_sectors;
            match self.durable.name_of(cluster) {
                Some(Name::Data(_)) => {}
                Some(_) => touches_metadata = true,
                None => {
                    self.handed.entry(cluster).or_insert(Handed::Written(newest.op.id));
                }
            }
        }
        if touches_metadata {
            one_in_flight(point, newest)?;
            self.names_what_is_stable(point, newest)?;
        }
        Ok(())
    }

    fn header_alone(&self, newest: &Pending) -> Result<(), String> {
        let sectors = &newest.op.sectors;
        if sectors.iter().any(|(index, _)| *index == 0) && sectors.len() > 1 {
            return Err(format!(
                "the header is rewritten as a whole: one write of {} sectors",
                sectors.len()
            ));
        }
        Ok(())
    }

    fn no_reuse(&self, newest: &Pending) -> Result<(), String> {
        let cluster_bytes = self.durable.cluster_bytes;
        for (index, sector) in &newest.op.sectors {
            let SectorKind::Payload(guest) = sector_kind(sector) else { continue };
            let cluster = index * SECTOR_BYTES / cluster_bytes;
            let guest_cluster = guest / cluster_bytes * cluster_bytes;
            match self.durable.name_of(cluster) {
                None => {}
                Some(Name::Data(named)) if named == guest_cluster => {}
                Some(other) => {
                    return Err(format!(
                        "host cluster {cluster:#x} gets payload of guest byte {guest:#x}, what is stable names it as \
                         {other:?}"
                    ));
                }
            }
        }
        Ok(())
    }

    fn names_what_is_stable(&self, point: &CrashPoint, newest: &Pending) -> Result<(), String> {
        let mut alone = point.durable.clone();
        for (index, sector) in &newest.op.sectors {
            alone.write_sector(*index, sector);
            alone.grow((index + 1) * SECTOR_BYTES);
        }
        let after = self.parse(&alone)?;
        if after.dirty || self.durable.dirty {
            return Ok(());
        }
        if let Some(what) = after.contradiction() {
            return Err(format!("this metadata write alone would leave: {what}"));
        }
        for (cluster, names) in &after.named {
            if self.durable.named.contains_key(cluster) {
                continue;
            }
            if let Some(Handed::Written(_)) = self.handed.get(cluster) {
                return Err(format!(
                    "a metadata write names host cluster {cluster:#x} as {names:?}, whose content is not stable"
                ));
            }
        }
        Ok(())
    }
}

fn one_in_flight(point: &CrashPoint, newest: &Pending) -> Result<(), String> {
    for other in point.pending.iter().filter(|other| other.completed.is_none() && other.op.id != newest.op.id)
    {
        let shared =
            newest.op.sectors.iter().find(|(index, _)| other.op.sectors.iter().any(|(at, _)| at == index));
        if let Some((index, _)) = shared {
            return Err(format!("two writes of metadata sector {index:#x} are in flight"));
        }
    }
    Ok(())
}
