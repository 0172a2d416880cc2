//! Memory that outlives a simulated process.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use infill_base::{IoResult, OpenError};
use infill_storage::journal::{BootId, JournalMemory, Journaling, VolatileJournal, journal_bytes};

/// What images in it are called.
const IDENTITY: &str = "simulated disk";

/// The memory of one image's journal. Cloning shares it.
#[derive(Clone, Debug)]
pub struct JournalPages(Arc<Vec<AtomicU64>>);

impl JournalPages {
    /// Of a journal with room for so many records.
    pub fn new(records: u64) -> JournalPages {
        JournalPages(Arc::new((0..journal_bytes(records) / 8).map(|_| AtomicU64::new(0)).collect()))
    }

    /// What a successor finds if the process dies now.
    pub fn copy(&self) -> JournalPages {
        let words = self.0.iter().map(|word| AtomicU64::new(word.load(Ordering::Acquire)));
        JournalPages(Arc::new(words.collect()))
    }

    /// The journal in it.
    pub fn journal(&self) -> Result<VolatileJournal, OpenError> {
        VolatileJournal::attach(Arc::new(self.clone()), IDENTITY, BootId(1))
    }

    /// As an option for opening an image.
    pub fn journaling(&self) -> Result<Journaling, OpenError> {
        self.journal().map(Journaling::Volatile)
    }
}

impl JournalMemory for JournalPages {
    fn reserve(&self) -> IoResult<()> {
        Ok(())
    }

    fn words(&self) -> &[AtomicU64] {
        &self.0
    }

    fn remove(&self) {
        self.0.iter().for_each(|word| word.store(0, Ordering::Release));
    }

    fn name(&self) -> String {
        "simulated memory".into()
    }
}
