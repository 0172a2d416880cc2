//! A disk with a volatile cache, latency, faults and gates.
//!
//! * A write is *pending* from the moment it is handed over until a sync that began after its completion has
//!   returned. What a crash leaves of the pending writes is [`CrashPoint`]'s business.
//! * A sync makes durable exactly what had completed when it was called, and nothing else.
//! * An operation goes on when its future is dropped.
//! * After a failed sync everything that writes is refused ([`ErrorKind::Poisoned`]).
//!
//! With no latency it needs no runtime; with one it sleeps on the installed one.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use event_listener::Event;
use infill_base::{
    Ctx, ErrorKind, Extent, ExtentKind, Extents, Gather, IoError, IoResult, Limits, WriteFlags, ZeroFlags,
};
use infill_base::{push_extent, range_end, zero_bytes};
use infill_storage::sync::{Mutex, lock};
use infill_storage::{Storage, rt};

use crate::crash::{Boundary, CrashPoint, Pending, PendingOp, apply};
use crate::media::SECTOR_BYTES;
use crate::{Media, Rng};

/// The longest disk, in bytes, where no capacity is given.
const CAPACITY_BYTES: u64 = 4 << 30;

/// Granularity of [`Storage::extents`], in bytes.
const EXTENT_BYTES: u64 = 4096;

/// Operations that can be delayed, held, counted and made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOp {
    /// [`Storage::read`].
    Read,
    /// [`Storage::write`].
    Write,
    /// [`Storage::write_zeroes`].
    WriteZeroes,
    /// [`Storage::discard`].
    Discard,
    /// [`Storage::sync`].
    Sync,
    /// [`Storage::set_len`].
    SetLen,
    /// [`Storage::allocate`].
    Allocate,
}

const OPS: usize = 7;

/// How a disk behaves.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Name for messages.
    pub name: String,
    /// What it draws latencies and torn writes from.
    pub seed: u64,
    /// Shortest and longest time an operation takes.
    pub latency: (Duration, Duration),
    /// How long it may become, in bytes; behind that there is no space.
    pub capacity: u64,
    /// What it asks of its callers. A request that is not aligned so is refused.
    pub limits: Limits,
}

impl Default for DiskOptions {
    fn default() -> Self {
        DiskOptions {
            name: "simulated disk".into(),
            seed: 0,
            latency: (Duration::ZERO, Duration::ZERO),
            capacity: CAPACITY_BYTES,
            limits: Limits::default(),
        }
    }
}

type Observer = Box<dyn FnMut(&CrashPoint) + Send>;

struct Fault {
    op: DiskOp,
    skip: u64,
    times: u64,
    kind: ErrorKind,
}

#[derive(Default)]
struct State {
    durable: Media,
    live: Media,
    pending: Vec<Pending>,
    next_id: u64,
    clock: u64,
    poisoned: bool,
    capacity: u64,
    faults: Vec<Fault>,
    held: [u32; OPS],
    in_flight: [u64; OPS],
    in_flight_max: [u64; OPS],
    total: [u64; OPS],
}

struct Shared {
    options: DiskOptions,
    rng: Mutex<Rng>,
    state: Mutex<State>,
    released: Event,
    observer: Mutex<Option<Observer>>,
}

/// The disk. Cloning shares it.
#[derive(Clone)]
pub struct SimDisk(Arc<Shared>);

/// Holds operations of one kind that were begun, until it is dropped.
#[must_use]
pub struct Hold {
    disk: SimDisk,
    op: DiskOp,
}

impl Drop for Hold {
    fn drop(&mut self) {
        lock(&self.disk.0.state).held[self.op as usize] -= 1;
        self.disk.0.released.notify(usize::MAX);
    }
}

struct InFlight<'a>(&'a Shared, DiskOp);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).in_flight[self.1 as usize] -= 1;
    }
}

impl SimDisk {
    /// A disk of `len` zero bytes without latency.
    pub fn new(len: u64) -> SimDisk {
        SimDisk::with(Media::new(len), DiskOptions::default())
    }

    /// A disk that holds `media`, all of it stable.
    pub fn with(media: Media, options: DiskOptions) -> SimDisk {
        let state =
            State { durable: media.clone(), live: media, capacity: options.capacity, ..State::default() };
        SimDisk(Arc::new(Shared {
            rng: Mutex::new(Rng::new(options.seed)),
            options,
            state: Mutex::new(state),
            released: Event::new(),
            observer: Mutex::new(None),
        }))
    }

    /// The disk on which a process died at `point`: what had completed is not synced for that, and of what was in flight
    /// there is everything, nothing or a part, and it has completed.
    pub fn after_kill(point: &CrashPoint, options: DiskOptions, rng: &mut Rng) -> SimDisk {
        let disk = SimDisk::with(point.durable.clone(), options);
        {
            let mut state = lock(&disk.0.state);
            state.live = point.live.clone();
            let times = point.pending.iter().filter_map(|pending| pending.completed);
            state.clock = times.max().unwrap_or(0);
            state.next_id = point.pending.iter().map(|pending| pending.op.id).max().unwrap_or(0);
            for pending in &point.pending {
                if pending.completed.is_some() {
                    state.pending.push(pending.clone());
                    continue;
                }
                let Some(op) = survivors(&pending.op, rng) else { continue };
                apply(&mut state.live, &op);
                state.clock += 1;
                let completed = Some(state.clock);
                state.pending.push(Pending { op: Arc::new(op), completed });
            }
        }
        disk
    }

    /// What reads show now.
    pub fn media(&self) -> Media {
        lock(&self.0.state).live.clone()
    }

    /// This moment as one at which power or the process may go.
    pub fn crash_point(&self) -> CrashPoint {
        self.point(Boundary::Completed)
    }

    /// Calls `observer` at every boundary of a write or sync, in the middle of the operation.
    pub fn observe(&self, observer: impl FnMut(&CrashPoint) + Send + 'static) {
        *lock(&self.0.observer) = Some(Box::new(observer));
    }

    /// Ends the observation.
    pub fn stop_observing(&self) {
        *lock(&self.0.observer) = None;
    }

    /// Fails `times` operations of a kind with `kind`, after `skip` that succeed.
    pub fn fail(&self, op: DiskOp, skip: u64, times: u64, kind: ErrorKind) {
        lock(&self.0.state).faults.push(Fault { op, skip, times, kind });
    }

    /// Takes back what [`SimDisk::fail`] asked for.
    pub fn heal(&self) {
        lock(&self.0.state).faults.clear();
    }

    /// How long it may become from now on, in bytes.
    pub fn set_capacity(&self, capacity: u64) {
        lock(&self.0.state).capacity = capacity;
    }

    /// Lets no operation of a kind complete until the guard goes.
    pub fn hold(&self, op: DiskOp) -> Hold {
        lock(&self.0.state).held[op as usize] += 1;
        Hold { disk: self.clone(), op }
    }

    /// Operations of a kind that are in flight.
    pub fn in_flight(&self, op: DiskOp) -> u64 {
        lock(&self.0.state).in_flight[op as usize]
    }

    /// The most operations of a kind that were in flight at once.
    pub fn in_flight_max(&self, op: DiskOp) -> u64 {
        lock(&self.0.state).in_flight_max[op as usize]
    }

    /// Operations of a kind that were begun so far.
    pub fn total(&self, op: DiskOp) -> u64 {
        lock(&self.0.state).total[op as usize]
    }

    fn point(&self, boundary: Boundary) -> CrashPoint {
        let state = lock(&self.0.state);
        CrashPoint {
            boundary,
            durable: state.durable.clone(),
            live: state.live.clone(),
            pending: state.pending.clone(),
        }
    }

    fn tell(&self, boundary: Boundary) {
        let mut observer = lock(&self.0.observer);
        if let Some(observer) = &mut *observer {
            observer(&self.point(boundary));
        }
    }

    fn begin(&self, op: DiskOp) -> InFlight<'_> {
        let mut state = lock(&self.0.state);
        let nth = op as usize;
        state.total[nth] += 1;
        state.in_flight[nth] += 1;
        state.in_flight_max[nth] = state.in_flight_max[nth].max(state.in_flight[nth]);
        InFlight(&self.0, op)
    }

    /// The time that an operation takes, the gate, and the fault if there is one for it.
    async fn pass(&self, op: DiskOp) -> IoResult<()> {
        let (least, most) = self.0.options.latency;
        if most > Duration::ZERO {
            let spread = (most - least).as_nanos() as u64;
            let extra = lock(&self.0.rng).below(spread + 1);
            rt::sleep(least + Duration::from_nanos(extra)).await;
        }
        loop {
            let released = self.0.released.listen();
            if lock(&self.0.state).held[op as usize] == 0 {
                break;
            }
            released.await;
        }
        match self.fault(op) {
            Some(kind) => Err(IoError::new(kind, format!("injected fault of {op:?}")).in_node(self.name())),
            None => Ok(()),
        }
    }

    fn fault(&self, op: DiskOp) -> Option<ErrorKind> {
        let mut state = lock(&self.0.state);
        let fault = state.faults.iter_mut().find(|fault| fault.op == op && fault.times > 0)?;
        if fault.skip > 0 {
            fault.skip -= 1;
            return None;
        }
        fault.times -= 1;
        Some(fault.kind)
    }

    /// Runs `operation` so that it goes on when the caller's future is dropped (needs a runtime only with latency).
    async fn run<T: 'static>(&self, operation: impl Future<Output = T> + 'static) -> T {
        if self.0.options.latency.1 > Duration::ZERO {
            rt::detached(operation).await
        } else {
            operation.await
        }
    }

    fn check_align(&self, at: u64, len: u64) -> IoResult<()> {
        let align = u64::from(self.0.options.limits.request_align);
        if at.is_multiple_of(align) && len.is_multiple_of(align) {
            return Ok(());
        }
        Err(IoError::new(ErrorKind::InvalidInput, format!("not aligned to {align} bytes"))
            .at(at, len)
            .in_node(self.name()))
    }

    fn check_write(&self, at: u64, len: u64) -> IoResult<()> {
        self.check_align(at, len)?;
        let state = lock(&self.0.state);
        if !self.0.options.limits.writable {
            return Err(IoError::new(ErrorKind::NotPermitted, "the disk is read-only").at(at, len));
        }
        if state.poisoned {
            return Err(IoError::new(
                ErrorKind::Poisoned,
                "a sync failed earlier: what is stable is unknown, nothing more is written",
            ));
        }
        if range_end(at, len, state.capacity).is_none() {
            return Err(IoError::new(ErrorKind::NoSpace, "no space is left on the disk").at(at, len));
        }
        Ok(())
    }

    /// Hands an operation to the medium: any part of it may survive from now on.
    fn submit(&self, op: PendingOp) -> Arc<PendingOp> {
        let op = {
            let mut state = lock(&self.0.state);
            state.next_id += 1;
            let op = Arc::new(PendingOp { id: state.next_id, ..op });
            state.pending.push(Pending { op: op.clone(), completed: None });
            op
        };
        self.tell(Boundary::Submitted);
        op
    }

    /// The operation is over: `done` is what of it happened.
    fn complete(&self, id: u64, done: PendingOp, fua: bool) {
        {
            let mut state = lock(&self.0.state);
            state.clock += 1;
            let clock = state.clock;
            let done = Arc::new(PendingOp { id, ..done });
            apply(&mut state.live, &done);
            if fua {
                apply(&mut state.durable, &done);
                forget_older(&mut state.pending, &done);
                state.pending.retain(|pending| pending.op.id != id);
            } else if let Some(pending) = state.pending.iter_mut().find(|pending| pending.op.id == id) {
                *pending = Pending { op: done, completed: Some(clock) };
            }
        }
        self.tell(Boundary::Completed);
    }

    fn write_op(&self, at: u64, data: &[Bytes]) -> PendingOp {
        let state = lock(&self.0.state);
        let len: u64 = data.iter().map(|run| run.len() as u64).sum();
        let mut whole = BytesMut::with_capacity(len as usize + 1024);
        let (first, last) = (at / SECTOR_BYTES, (at + len).div_ceil(SECTOR_BYTES));
        whole.extend_from_slice(&state.live.sector(first)[..(at % SECTOR_BYTES) as usize]);
        data.iter().for_each(|run| whole.extend_from_slice(run));
        let tail = ((at + len) % SECTOR_BYTES) as usize;
        if tail > 0 {
            whole.extend_from_slice(&state.live.sector(last - 1)[tail..]);
        }
        let whole = whole.freeze();
        let sectors = (first..last)
            .enumerate()
            .map(|(nth, index)| (index, whole.slice(nth * SECTOR_BYTES as usize..(nth + 1) * 512)))
            .collect();
        PendingOp { id: 0, sectors, end: at + len, set_len: None }
    }

    async fn change(self, op: DiskOp, at: u64, data: Gather, fua: bool) -> IoResult<()> {
        if data.is_empty() {
            return Ok(());
        }
        self.check_write(at, data.len() as u64)?;
        let _in_flight = self.begin(op);
        let id = self.submit(self.write_op(at, data.runs())).id;
        let passed = self.pass(op).await;
        // Bytes beside the range that share a sector with it may have changed in the meantime.
        let mut done = self.write_op(at, data.runs());
        if passed.is_err() {
            // A failed write may have happened in part.
            let keep = lock(&self.0.rng).index(done.sectors.len() + 1);
            done.sectors.truncate(keep);
        }
        self.complete(id, done, fua && passed.is_ok());
        passed
    }

    async fn sync_now(self) -> IoResult<()> {
        if lock(&self.0.state).poisoned {
            return Err(IoError::new(ErrorKind::Poisoned, "a sync failed earlier").in_node(self.name()));
        }
        let _in_flight = self.begin(DiskOp::Sync);
        let began = lock(&self.0.state).clock;
        if let Err(error) = self.pass(DiskOp::Sync).await {
            lock(&self.0.state).poisoned = true;
            return Err(error);
        }
        {
            let mut state = lock(&self.0.state);
            let (mut covered, left): (Vec<_>, Vec<_>) = std::mem::take(&mut state.pending)
                .into_iter()
                .partition(|pending| pending.completed.is_some_and(|at| at <= began));
            covered.sort_by_key(|pending| pending.completed);
            for pending in covered {
                apply(&mut state.durable, &pending.op);
            }
            state.pending = left;
        }
        self.tell(Boundary::Synced);
        Ok(())
    }
}

/// What of an operation in flight happens although its process dies; `None`: nothing.
fn survivors(op: &PendingOp, rng: &mut Rng) -> Option<PendingOp> {
    let kind = rng.below(3);
    let keep = (0..op.sectors.len()).map(|_| kind == 1 || rng.per_mille(500)).collect::<Vec<_>>();
    if kind == 0 {
        return None;
    }
    let sectors = op.sectors.iter().zip(keep).filter(|(_, keep)| *keep).map(|(sector, _)| sector.clone());
    let sectors: Vec<(u64, Bytes)> = sectors.collect();
    // A part ends where its last sector does.
    let end = match op.set_len {
        Some(_) => op.end,
        None => sectors.last().map_or(0, |(index, _)| op.end.min((index + 1) * SECTOR_BYTES)),
    };
    (op.set_len.is_some() || !sectors.is_empty()).then_some(PendingOp {
        id: op.id,
        sectors,
        end,
        set_len: op.set_len,
    })
}

/// Sectors that a durable write replaced do not come back from older pending ones.
fn forget_older(pending: &mut [Pending], newer: &PendingOp) {
    for older in pending.iter_mut().filter(|older| older.completed.is_some() && older.op.set_len.is_none()) {
        let replaced = |index: &u64| newer.sectors.iter().any(|(other, _)| other == index);
        if older.op.sectors.iter().any(|(index, _)| replaced(index)) {
            let sectors = older.op.sectors.iter().filter(|(index, _)| !replaced(index)).cloned().collect();
            let op = &older.op;
            older.op = Arc::new(PendingOp { id: op.id, sectors, end: op.end, set_len: None });
        }
    }
}

impl Storage for SimDisk {
    fn limits(&self) -> Limits {
        self.0.options.limits
    }

    fn len(&self) -> u64 {
        lock(&self.0.state).live.len()
    }

    fn name(&self) -> String {
        self.0.options.name.clone()
    }

    async fn read(&self, _cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        self.check_align(at, buf.len() as u64)?;
        let disk = self.clone();
        self.run(async move {
            let (mut buf, _in_flight) = (buf, disk.begin(DiskOp::Read));
            disk.pass(DiskOp::Read).await?;
            let state = lock(&disk.0.state);
            if range_end(at, buf.len() as u64, state.live.len()).is_none() {
                let why = format!("the range ends behind the disk, which has {} bytes", state.live.len());
                return Err(IoError::new(ErrorKind::InvalidInput, why)
                    .at(at, buf.len() as u64)
                    .in_node(&disk.0.options.name));
            }
            state.live.read(at, &mut buf);
            Ok(buf)
        })
        .await
    }

    async fn write(&self, _cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        let fua = flags.contains(WriteFlags::FUA);
        self.run(self.clone().change(DiskOp::Write, at, data, fua)).await
    }

    async fn write_zeroes(&self, _cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.check_write(at, len)?;
        let fua = flags.contains(ZeroFlags::FUA);
        let data = zero_bytes(len as usize).into();
        self.run(self.clone().change(DiskOp::WriteZeroes, at, data, fua)).await
    }

    async fn discard(&self, _cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        // Whole sectors inside the disk become zero or stay, by chance.
        let end = at.saturating_add(len).min(self.len()) / SECTOR_BYTES * SECTOR_BYTES;
        let start = at.next_multiple_of(SECTOR_BYTES);
        let keep = self.0.options.seed != 0 && lock(&self.0.rng).per_mille(300);
        if start >= end || keep {
            return self.check_write(at, 0);
        }
        let data = zero_bytes((end - start) as usize).into();
        self.run(self.clone().change(DiskOp::Discard, start, data, false)).await
    }

    async fn allocate(&self, _cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.check_write(at, len)?;
        let disk = self.clone();
        self.run(async move {
            let _in_flight = disk.begin(DiskOp::Allocate);
            let end = at + len;
            let grows = end > disk.len();
            let op = || PendingOp { id: 0, sectors: Vec::new(), end, set_len: Some(end) };
            let id = grows.then(|| disk.submit(op()).id);
            let passed = disk.pass(DiskOp::Allocate).await;
            if let Some(id) = id {
                // Somebody else may have made it longer still.
                let len = if passed.is_ok() { end.max(disk.len()) } else { disk.len() };
                disk.complete(id, PendingOp { set_len: Some(len), ..op() }, false);
            }
            passed
        })
        .await
    }

    async fn sync(&self, _cx: &Ctx) -> IoResult<()> {
        self.run(self.clone().sync_now()).await
    }

    async fn set_len(&self, _cx: &Ctx, len: u64) -> IoResult<()> {
        self.check_write(len, 0)?;
        let disk = self.clone();
        self.run(async move {
            let _in_flight = disk.begin(DiskOp::SetLen);
            let op = |len| PendingOp { id: 0, sectors: Vec::new(), end: 0, set_len: Some(len) };
            let id = disk.submit(op(len)).id;
            let passed = disk.pass(DiskOp::SetLen).await;
            let done = if passed.is_ok() { len } else { disk.len() };
            disk.complete(id, op(done), false);
            passed
        })
        .await
    }

    async fn extents(&self, _cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        let state = lock(&self.0.state);
        let Some(end) = range_end(at, len, state.live.len()) else {
            return Err(IoError::new(ErrorKind::InvalidInput, "behind the end of the disk").at(at, len));
        };
        let (mut extents, mut next) = (Extents::new(), at);
        while next < end {
            let until = ((next / EXTENT_BYTES + 1) * EXTENT_BYTES).min(end);
            let zero = state.live.is_zero(next, until - next);
            let kind = if zero { ExtentKind::Zero } else { ExtentKind::Data };
            let host = (!zero).then_some(next);
            push_extent(&mut extents, Extent { host, ..Extent::new(next, until - next, kind) });
            next = until;
        }
        Ok(extents)
    }
}

#[cfg(test)]
mod tests;
