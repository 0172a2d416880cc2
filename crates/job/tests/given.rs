//! What waits for a sync of a backup's target has a bound: a later process has to read all of it.

mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use infill_base::{Ctx, Extents, Gather, IoResult, Limits, WriteFlags, ZeroFlags};
use infill_job::copy::backup::{self, BackupOptions};
use infill_job::copy::{GivenMap, KeptCopy, KeptMap, MapOwner};
use infill_job::{JobOptions, JobStatus, Jobs};
use infill_node::{NodeHandle, RawNode};
use infill_sim::World;
use infill_storage::journal::{BootId, JournalMemory};
use infill_storage::{Storage, StorageHandle, rt};
use world::{Link, MIB};

const LEN: u64 = 320 * MIB;
/// What may wait for a sync.
const UNSYNCED: u64 = 128 * MIB;
/// What may be on its way when that is reached.
const IN_FLIGHT: u64 = 64 * MIB;

/// A target that takes everything at once, and whose syncs hang.
#[derive(Default)]
struct Sink {
    written: AtomicU64,
    hangs: AtomicBool,
    syncs: AtomicU64,
}

struct Shared(Arc<Sink>);

impl Storage for Shared {
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn len(&self) -> u64 {
        LEN
    }
    fn name(&self) -> String {
        "sink".into()
    }
    async fn read(&self, _: &Ctx, _: u64, buf: BytesMut) -> IoResult<BytesMut> {
        Ok(buf)
    }
    async fn write(&self, _: &Ctx, _: u64, data: Gather, _: WriteFlags) -> IoResult<()> {
        self.0.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(())
    }
    async fn write_zeroes(&self, _: &Ctx, _: u64, _: u64, _: ZeroFlags) -> IoResult<()> {
        panic!("the source has no zeroes")
    }
    async fn discard(&self, _: &Ctx, _: u64, _: u64) -> IoResult<()> {
        Ok(())
    }
    async fn sync(&self, _: &Ctx) -> IoResult<()> {
        self.0.syncs.fetch_add(1, Ordering::Relaxed);
        while self.0.hangs.load(Ordering::Relaxed) {
            rt::sleep(Duration::from_secs(1)).await;
        }
        Ok(())
    }
    async fn set_len(&self, _: &Ctx, _: u64) -> IoResult<()> {
        Ok(())
    }
    async fn extents(&self, _: &Ctx, _: u64, _: u64) -> IoResult<Extents> {
        Ok(Extents::new())
    }
}

struct Pages(Vec<AtomicU64>);

impl Pages {
    fn of(bytes: usize) -> Arc<Pages> {
        Arc::new(Pages((0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect()))
    }
}

impl JournalMemory for Pages {
    fn reserve(&self) -> IoResult<()> {
        Ok(())
    }
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
    fn remove(&self) {}
    fn name(&self) -> String {
        "pages".into()
    }
}

fn kept() -> KeptCopy {
    let granularity = KeptMap::granularity_for(LEN);
    let owner = MapOwner { generation: 1, boot: BootId(1), identity: "job".into(), len: LEN, granularity };
    let map = KeptMap::begin(Pages::of(owner.bytes()), owner, true).unwrap();
    let given = GivenMap::begin(Pages::of(GivenMap::BYTES), &map).unwrap();
    KeptCopy::new(Arc::new(map)).until_synced(true).with_given(Some(Arc::new(given)))
}

#[test]
fn a_backup_waits_where_what_no_sync_has_covered_is_all_that_a_later_process_is_to_read() {
    let world = World::new(1);
    let sink = Arc::new(Sink { hangs: AtomicBool::new(true), ..Sink::default() });
    let done = world.run(async {
        let source = Link::sevens(LEN, Duration::from_micros(100), 4 << 30).node();
        let target = NodeHandle::new(RawNode::new(StorageHandle::new(Shared(sink.clone())), false));
        let jobs = Jobs::new();
        let held = source.hold_changes().await;
        let options = JobOptions { auto_dismiss: false, ..JobOptions::new("copy") };
        let backup = BackupOptions { kept: Some(kept()), ..BackupOptions::new(source.clone(), target) };
        let prepared = backup::prepare(&jobs, options, backup, &held).unwrap();
        drop(held);
        let job = prepared.start(&jobs).unwrap();
        let written = || sink.written.load(Ordering::Relaxed);
        // It takes some more as long as there is room.
        let mut before = u64::MAX;
        while before != written() {
            before = written();
            rt::sleep(Duration::from_secs(20)).await;
        }
        assert!(sink.syncs.load(Ordering::Relaxed) > 0, "a sync is under way");
        assert!((UNSYNCED..=UNSYNCED + IN_FLIGHT).contains(&before), "{} MiB", before / MIB);
        assert_eq!(job.status(), JobStatus::Running);
        sink.hangs.store(false, Ordering::Relaxed);
        let outcome = job.wait().await;
        (outcome, written())
    });
    assert!(done.0.is_ok(), "{:?}", done.0);
    assert_eq!(done.1, LEN);
}
