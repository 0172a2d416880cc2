//! Records of dirty bitmaps.

use infill_job::MapName;
use serde_json::{Map, Value, json};

use super::record::{Key, Kind, Record, bitmap_key};
use super::{Entry, State};

/// A bitmap that is kept, but for its bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptBitmap {
    /// Its node.
    pub node: String,
    /// Its name.
    pub name: String,
    /// Bytes that a bit stands for.
    pub granularity: u64,
    /// Whether its image keeps it, too.
    pub persistent: bool,
    /// Whether it does not record.
    pub disabled: bool,
    /// Where its bits are; `None` where they are lost.
    pub bits: Option<MapName>,
}

impl KeptBitmap {
    fn key(&self) -> Key {
        bitmap_key(&self.node, &self.name)
    }

    fn record(self) -> Record {
        let key = self.key();
        let mut given = Map::new();
        let mut put = |key: &str, value: Value| drop(given.insert(key.into(), value));
        put("node", json!(self.node));
        put("name", json!(self.name));
        put("granularity", json!(self.granularity));
        put("disabled", json!(self.disabled));
        if self.persistent {
            put("persistent", json!(true));
        }
        let command = "block-dirty-bitmap-add".into();
        Record { key, command, given, strings: false, now: None, job: None, bits: self.bits }
    }

    /// What a record tells; `None` where it is not of a bitmap.
    fn of(record: &Record) -> Option<KeptBitmap> {
        if record.key.kind != Kind::Bitmap {
            return None;
        }
        let text = |key: &str| Some(record.given.get(key)?.as_str()?.to_owned());
        Some(KeptBitmap {
            node: text("node")?,
            name: text("name")?,
            granularity: record.given.get("granularity")?.as_u64()?,
            persistent: record.given.get("persistent").is_some_and(|persistent| persistent == true),
            disabled: record.given.get("disabled")?.as_bool()?,
            bits: record.bits.clone(),
        })
    }
}

impl State {
    /// These are the bitmaps that there are; those that wait for their nodes stay.
    pub fn keep_bitmaps(&self, bitmaps: Vec<KeptBitmap>) {
        let keys: Vec<Key> = bitmaps.iter().map(KeptBitmap::key).collect();
        let is_gone = |(at, entry): (&u64, &Entry)| {
            let Entry { record, held } = entry;
            let is_gone = record.key.kind == Kind::Bitmap && held.is_none() && !keys.contains(&record.key);
            is_gone.then_some(*at)
        };
        let gone: Vec<u64> = self.entries.borrow().iter().filter_map(is_gone).collect();
        gone.into_iter().for_each(|at| self.forget_at(at));
        for bitmap in bitmaps {
            let record = bitmap.record();
            let same = |entry: &Entry| entry.held.is_none() && entry.record == record;
            let is_kept =
                self.find(&record.key).is_some_and(|at| self.entries.borrow().get(&at).is_some_and(same));
            if !is_kept {
                self.keep(record);
            }
        }
    }

    /// Whether there is a record of that bitmap.
    pub fn has_bitmap(&self, node: &str, name: &str) -> bool {
        self.find(&bitmap_key(node, name)).is_some()
    }

    /// Their images hold the persistent bitmaps whose bits are kept: those that wait for their nodes stay.
    pub fn forget_stored_bitmaps(&self) {
        let is_stored = |(at, entry): (&u64, &Entry)| {
            let kept = KeptBitmap::of(&entry.record).filter(|_| entry.held.is_none())?;
            (kept.persistent && kept.bits.is_some()).then_some(*at)
        };
        let stored: Vec<u64> = self.entries.borrow().iter().filter_map(is_stored).collect();
        stored.into_iter().for_each(|at| self.forget_at(at));
    }

    /// Bitmaps that are not there again.
    pub fn held_bitmaps(&self) -> Vec<(u64, KeptBitmap)> {
        let entries = self.entries.borrow();
        let held = entries.iter().filter(|(_, entry)| entry.held.is_some());
        held.filter_map(|(at, entry)| Some((*at, KeptBitmap::of(&entry.record)?))).collect()
    }

    /// The files that records name.
    pub fn files(&self) -> Vec<String> {
        self.entries.borrow().values().flat_map(|entry| entry.record.files()).collect()
    }

    /// The maps of all bitmaps.
    pub fn bitmap_maps(&self) -> Vec<MapName> {
        let entries = self.entries.borrow();
        entries.values().filter_map(|entry| entry.record.bits.clone()).collect()
    }

    /// The bitmaps of jobs that are not over, each with its node.
    pub fn bitmaps_in_jobs(&self) -> Vec<(String, String)> {
        let used = |entry: &Entry| {
            let record = &entry.record;
            record.job.as_ref().filter(|job| !job.kept.concluded && !job.done)?;
            let text = |key: &str| Some(record.given.get(key)?.as_str()?.to_owned());
            Some((text("device")?, text("bitmap")?))
        };
        self.entries.borrow().values().filter_map(used).collect()
    }
}
