//! A source behind a link, and an overlay that keeps a log and can be full.
#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use infill_base::{
    Ctx, ErrorKind, Extent, ExtentKind, Extents, Gather, IoError, IoResult, Limits, WriteFlags, ZeroFlags,
};
use infill_job::{Events, JobEvent};
use infill_node::{BackingRef, BackingSlot, MemoryOverlay, Node, NodeHandle, NodeInfo, Populated, RawNode};
use infill_storage::{MemoryStorage, Storage, StorageHandle, rt};

pub const KIB: u64 = 1024;
pub const MIB: u64 = 1 << 20;

/// Bytes that tell their own place.
pub fn pattern(len: u64) -> Vec<u8> {
    (0..len / 8).flat_map(|word| (word * 8 + 1).to_be_bytes()).collect()
}

enum Content {
    Memory(MemoryStorage),
    Sevens(u64),
}

/// A storage behind a link of a round trip and a rate, first in, first out.
pub struct Link {
    bytes: Content,
    round_trip: Duration,
    bytes_per_second: u64,
    free_at: Mutex<Duration>,
    /// When each thread of the server is free; each holds a request for the round trip. Empty: any number of threads.
    pub threads: Mutex<Vec<Duration>>,
    /// Errors for the next reads.
    pub errors: Mutex<VecDeque<ErrorKind>>,
    pub lost: AtomicBool,
    pub hangs: AtomicBool,
    pub reads: AtomicU64,
    pub bytes_read: AtomicU64,
    pub fill_bytes: AtomicU64,
    pub in_flight: AtomicU64,
    pub in_flight_max: AtomicU64,
}

impl Link {
    pub fn new(bytes: Vec<u8>, round_trip: Duration, bytes_per_second: u64) -> Arc<Link> {
        Link::of(Content::Memory(MemoryStorage::from_bytes(bytes)), round_trip, bytes_per_second)
    }

    /// A source of any size that costs no memory: every byte is 7.
    pub fn sevens(len: u64, round_trip: Duration, bytes_per_second: u64) -> Arc<Link> {
        Link::of(Content::Sevens(len), round_trip, bytes_per_second)
    }

    fn of(bytes: Content, round_trip: Duration, bytes_per_second: u64) -> Arc<Link> {
        Arc::new(Link {
            bytes,
            round_trip,
            bytes_per_second,
            free_at: Mutex::default(),
            threads: Mutex::default(),
            errors: Mutex::default(),
            lost: AtomicBool::new(false),
            hangs: AtomicBool::new(false),
            reads: AtomicU64::new(0),
            bytes_read: AtomicU64::new(0),
            fill_bytes: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            in_flight_max: AtomicU64::new(0),
        })
    }

    pub fn node(self: &Arc<Link>) -> NodeHandle {
        NodeHandle::new(RawNode::new(StorageHandle::from_arc(self.clone()), true))
    }
}

struct InFlight<'a>(&'a AtomicU64);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Storage for Link {
    fn limits(&self) -> Limits {
        Limits { writable: false, ..Limits::default() }
    }
    fn len(&self) -> u64 {
        match &self.bytes {
            Content::Memory(bytes) => Storage::len(bytes),
            Content::Sevens(len) => *len,
        }
    }
    fn name(&self) -> String {
        "link".into()
    }
    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        let now = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        self.in_flight_max.fetch_max(now, Ordering::Relaxed);
        let _in_flight = InFlight(&self.in_flight);
        let arrives = {
            let mut free_at = self.free_at.lock().unwrap();
            let takes = Duration::from_nanos(buf.len() as u64 * 1_000_000_000 / self.bytes_per_second);
            let mut threads = self.threads.lock().unwrap();
            match threads.iter_mut().min() {
                Some(thread) => {
                    *thread = (*thread).max(rt::now()) + self.round_trip;
                    *free_at = (*free_at).max(*thread) + takes;
                    *free_at
                }
                None => {
                    *free_at = (*free_at).max(rt::now()) + takes;
                    *free_at + self.round_trip
                }
            }
        };
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.bytes_read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        if cx.class == infill_base::Class::Fill {
            self.fill_bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        }
        rt::sleep(arrives.saturating_sub(rt::now())).await;
        if self.hangs.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        if self.lost.load(Ordering::Relaxed) {
            return Err(IoError::new(ErrorKind::SourceLost, "the server went away"));
        }
        if let Some(kind) = self.errors.lock().unwrap().pop_front() {
            return Err(IoError::new(kind, "a planted error"));
        }
        match &self.bytes {
            Content::Memory(bytes) => Storage::read(bytes, cx, at, buf).await,
            Content::Sevens(_) => Ok({
                let mut buf = buf;
                buf.fill(7);
                buf
            }),
        }
    }
    async fn write(&self, _: &Ctx, _: u64, _: Gather, _: WriteFlags) -> IoResult<()> {
        Err(IoError::new(ErrorKind::NotPermitted, "read-only"))
    }
    async fn write_zeroes(&self, _: &Ctx, _: u64, _: u64, _: ZeroFlags) -> IoResult<()> {
        Err(IoError::new(ErrorKind::NotPermitted, "read-only"))
    }
    async fn discard(&self, _: &Ctx, _: u64, _: u64) -> IoResult<()> {
        Err(IoError::new(ErrorKind::NotPermitted, "read-only"))
    }
    async fn sync(&self, _: &Ctx) -> IoResult<()> {
        Ok(())
    }
    async fn set_len(&self, _: &Ctx, _: u64) -> IoResult<()> {
        Err(IoError::new(ErrorKind::NotPermitted, "read-only"))
    }
    async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        rt::sleep(self.round_trip).await;
        match &self.bytes {
            Content::Memory(bytes) => Storage::extents(bytes, cx, at, len).await,
            Content::Sevens(_) => Ok(vec![Extent::new(at, len, ExtentKind::Data)]),
        }
    }
}

/// What an overlay was asked to do to itself, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Populate(u64, u64),
    Sync,
    Header(Option<BackingRef>),
}

/// An overlay in memory that keeps a log, takes time, and can be full.
pub struct Overlay {
    inner: MemoryOverlay,
    pub log: Mutex<Vec<Step>>,
    /// Populates that are let through before the space ends.
    pub space: AtomicU64,
    pub header_fails: AtomicBool,
    pub sync_fails: Mutex<Option<ErrorKind>>,
    pub write_time: Duration,
    /// The local disk: bytes per second, first in, first out; every write and populate passes it.
    pub disk: Arc<Mutex<Disk>>,
}

/// A disk's queue.
pub struct Disk {
    pub bytes_per_second: u64,
    pub free_at: Duration,
}

impl Overlay {
    async fn on_disk(&self, bytes: u64) {
        let done = {
            let mut disk = self.disk.lock().unwrap();
            let takes = Duration::from_nanos(bytes * 1_000_000_000 / disk.bytes_per_second);
            disk.free_at = disk.free_at.max(rt::now()) + takes;
            disk.free_at
        };
        rt::sleep(done.saturating_sub(rt::now()) + self.write_time).await;
    }

    pub fn new(len: u64, unit: u64, backing: &NodeHandle) -> Arc<Overlay> {
        Arc::new(Overlay::of(MemoryOverlay::new(len, unit, Some(backing.clone()))))
    }

    /// A disk of its own, that lies where this one does.
    pub fn beside(&self, len: u64) -> Arc<Overlay> {
        let other = Overlay::of(MemoryOverlay::new(len, 4 * KIB, None));
        Arc::new(Overlay { disk: self.disk.clone(), ..other })
    }

    fn of(inner: MemoryOverlay) -> Overlay {
        Overlay {
            inner,
            log: Mutex::default(),
            space: AtomicU64::new(u64::MAX),
            header_fails: AtomicBool::new(false),
            sync_fails: Mutex::default(),
            write_time: Duration::from_micros(50),
            disk: Arc::new(Mutex::new(Disk { bytes_per_second: 1 << 40, free_at: Duration::ZERO })),
        }
    }

    pub fn log(&self) -> Vec<Step> {
        self.log.lock().unwrap().clone()
    }
}

/// [`Overlay`] as a node.
pub struct Shared(pub Arc<Overlay>);

impl Node for Shared {
    fn limits(&self) -> Limits {
        Node::limits(&self.0.inner)
    }
    fn len(&self) -> u64 {
        Node::len(&self.0.inner)
    }
    fn info(&self) -> NodeInfo {
        NodeInfo { filename: "overlay".into(), ..self.0.inner.info() }
    }
    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        Node::read(&self.0.inner, cx, at, buf).await
    }
    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        self.0.on_disk(data.len() as u64).await;
        Node::write(&self.0.inner, cx, at, data, flags).await
    }
    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        Node::write_zeroes(&self.0.inner, cx, at, len, flags).await
    }
    async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        Node::discard(&self.0.inner, cx, at, len).await
    }
    async fn sync(&self, _: &Ctx) -> IoResult<()> {
        self.0.on_disk(4096).await;
        if let Some(kind) = *self.0.sync_fails.lock().unwrap() {
            return Err(IoError::new(kind, "the sync failed"));
        }
        self.0.log.lock().unwrap().push(Step::Sync);
        Ok(())
    }
    async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        Node::extents(&self.0.inner, cx, at, len).await
    }
    fn backing(&self) -> Option<&BackingSlot> {
        Node::backing(&self.0.inner)
    }
    fn populate_unit(&self) -> u64 {
        Node::populate_unit(&self.0.inner)
    }
    async fn populate(&self, cx: &Ctx, at: u64, data: Bytes, generation: u64) -> IoResult<Populated> {
        self.0.on_disk(data.len() as u64).await;
        let space = self.0.space.load(Ordering::Relaxed);
        if space == 0 {
            return Err(IoError::new(ErrorKind::NoSpace, "the disk is full"));
        }
        self.0.space.store(space - 1, Ordering::Relaxed);
        self.0.log.lock().unwrap().push(Step::Populate(at, data.len() as u64));
        Node::populate(&self.0.inner, cx, at, data, generation).await
    }
    async fn set_backing_ref(&self, _: &Ctx, backing: Option<BackingRef>) -> IoResult<()> {
        rt::sleep(Duration::from_millis(1)).await;
        if self.0.header_fails.load(Ordering::Relaxed) {
            return Err(IoError::new(ErrorKind::Io, "the header cannot be written"));
        }
        self.0.log.lock().unwrap().push(Step::Header(backing));
        Ok(())
    }
}

/// Everything that has been told so far.
pub fn drain(events: &Events) -> Vec<JobEvent> {
    std::iter::from_fn(|| events.try_next()).collect()
}

/// The names of the states that were told.
pub fn states(events: &[JobEvent]) -> Vec<&'static str> {
    let status = |event: &JobEvent| match event {
        JobEvent::StatusChange { status, .. } => Some(status.as_str()),
        _ => None,
    };
    events.iter().filter_map(status).collect()
}

/// All bytes of a node.
pub async fn content(node: &NodeHandle) -> Vec<u8> {
    node.read_vec(&Ctx::of(infill_base::Class::Fill), 0, node.len() as usize).await.unwrap().to_vec()
}
