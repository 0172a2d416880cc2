//! Image files of the qed format.
#![no_main]

use infill_base::{Ctx, OpenError};
use infill_fuzz::{Format, judge};
use infill_node::{CheckReport, Repair};
use infill_qed::{OpenOptions, Qed};
use infill_storage::StorageHandle;

struct Target;

impl Format for Target {
    type Node = Qed;

    async fn open(storage: StorageHandle, read_only: bool) -> Result<Qed, OpenError> {
        Qed::open(&Ctx::GUEST, storage, OpenOptions { read_only, ..OpenOptions::default() }).await
    }

    async fn check(storage: &StorageHandle, repair: Repair) -> Result<CheckReport, OpenError> {
        infill_qed::check(&Ctx::GUEST, storage, repair).await
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| judge::<Target>(data));
