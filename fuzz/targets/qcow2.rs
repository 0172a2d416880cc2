//! Image files of the qcow2 format.
#![no_main]

use infill_base::{Ctx, OpenError};
use infill_fuzz::{Format, judge};
use infill_node::{CheckReport, Repair};
use infill_qcow2::{OpenOptions, Qcow2};
use infill_storage::StorageHandle;

struct Target;

impl Format for Target {
    type Node = Qcow2;

    async fn open(storage: StorageHandle, read_only: bool) -> Result<Qcow2, OpenError> {
        Qcow2::open(&Ctx::GUEST, storage, OpenOptions { read_only, ..OpenOptions::default() }).await
    }

    async fn check(storage: &StorageHandle, repair: Repair) -> Result<CheckReport, OpenError> {
        infill_qcow2::check(&Ctx::GUEST, storage, repair).await
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| judge::<Target>(data));
