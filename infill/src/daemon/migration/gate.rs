//! The gate before a disk that can change hands: what becomes of a guest's requests, at either end.
//!
//! It stands between an export that is named by a UUID and the export's node, from the export's first moment on, so that
//! nothing has to be put between them while guests ask. What a request meets is [`Gate`], which the migration's machine gives;
//! what counts in is awaited by [`DiskGate::drained`], and every write is noted in [`Writes`], as the protocol wants it:
//! dirty after it has landed and before it is answered.
//!
//! What never happens: a request that counts itself in after the gate was closed; one that is answered out of a disk that
//! the other side owns. Costs a lock, twice, for each request.

use std::pin::pin;

use bytes::BytesMut;
use event_listener::Event;
use futures_util::future::{Either, select};
use infill_base::{
    Ctx, ErrorKind, ExtentKind, Extents, Gather, IoError, IoResult, Limits, WriteFlags, ZeroFlags,
};
use infill_migrate::{BlockSet, Gate, NotDrained, Round, Writes, Writing};
use infill_node::{Edge, Node, NodeHandle, NodeInfo, Through as _};
use infill_storage::sync::{Arc, Mutex, lock};

use super::missed::HELD_READS_MAX;

/// What a gate tells the driver of its machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// A read or write of a session from before the freeze waits.
    pub old_session: bool,
    /// A guest's first write waits.
    pub guest_writes: bool,
}

struct Inner {
    gate: Gate,
    /// Where reads go at [`Gate::ReadSource`].
    source: Option<NodeHandle>,
    /// What is told at [`Gate::Deny`].
    owner: String,
    reads: u64,
    writes: Writes,
    block_bytes: u64,
    asked: Asked,
    missed: Missed,
}

/// What is known of a source that the disk is filled from.
#[derive(Default)]
struct Missed {
    /// Whether reads of what is missing are to fail once they were held for long enough.
    may_fail: bool,
    is_lost: bool,
    /// They fail now.
    failing: bool,
    /// Numbers the losses, so that what is late of one is not taken for the next one's.
    losses: u64,
}

/// The state of one gate. Cloning shares it.
#[derive(Clone)]
pub struct DiskGate(Arc<Shared>);

struct Shared {
    inner: Mutex<Inner>,
    /// The gate, or what is in flight, has changed.
    changed: Event,
    /// Somebody waits for the driver.
    asking: Event,
    /// More reads wait, or they wait in vain.
    missed: Event,
}

/// What a request is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
}

/// Where a request may go.
enum Route<T> {
    Below(T),
    Source(NodeHandle),
}

/// A read that is in flight.
struct Reading<'a>(&'a DiskGate);

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        let mut inner = lock(&self.0.0.inner);
        inner.reads -= 1;
        let last = inner.reads == 0;
        drop(inner);
        if last {
            self.0.0.changed.notify(usize::MAX);
        }
    }
}

impl DiskGate {
    /// A gate that stands as `gate` says.
    pub fn new(gate: Gate) -> DiskGate {
        DiskGate(Arc::new(Shared {
            inner: Mutex::new(Inner {
                gate,
                source: None,
                owner: String::new(),
                reads: 0,
                writes: Writes::new(0),
                block_bytes: 1,
                asked: Asked::default(),
                missed: Missed::default(),
            }),
            changed: Event::new(),
            asking: Event::new(),
            missed: Event::new(),
        }))
    }

    /// Blocks are counted in this unit from now on: a migration begins. Writes that are in flight were counted before.
    pub async fn count_in(&self, disk_bytes: u64, block_bytes: u64) {
        loop {
            let changed = self.0.changed.listen();
            {
                let mut inner = lock(&self.0.inner);
                // A write that began in another unit would be noted at the wrong place.
                if inner.writes.in_flight() == 0 {
                    inner.writes = Writes::new(disk_bytes.div_ceil(block_bytes.max(1)));
                    inner.block_bytes = block_bytes.max(1);
                    return;
                }
            }
            changed.await;
        }
    }

    /// Requests meet `gate` from now on; `owner` is told to those that are denied.
    pub fn set(&self, gate: Gate, owner: &str) {
        let mut inner = lock(&self.0.inner);
        if inner.gate != gate {
            inner.gate = gate;
            inner.asked = Asked::default();
        }
        owner.clone_into(&mut inner.owner);
        drop(inner);
        self.0.changed.notify(usize::MAX);
    }

    /// Where reads go while the disk is the source's.
    pub fn read_from(&self, source: Option<NodeHandle>) {
        lock(&self.0.inner).source = source;
        self.0.changed.notify(usize::MAX);
    }

    /// What it stands at.
    pub fn gate(&self) -> Gate {
        lock(&self.0.inner).gate
    }

    /// Waits until nothing is in flight. Only a gate that holds gets there for sure.
    pub async fn drained(&self) {
        loop {
            let changed = self.0.changed.listen();
            {
                let inner = lock(&self.0.inner);
                if inner.reads == 0 && inner.writes.in_flight() == 0 {
                    return;
                }
            }
            changed.await;
        }
    }

    /// What waits for the driver; fires [`DiskGate::asking`] when it changes.
    pub fn asked(&self) -> Asked {
        lock(&self.0.inner).asked
    }

    /// Fires when something waits for the driver.
    pub fn asking(&self) -> event_listener::EventListener {
        self.0.asking.listen()
    }

    /// Starts a clean bitmap.
    pub fn start_bitmap(&self) {
        lock(&self.0.inner).writes.start();
    }

    /// Drops the bitmap.
    pub fn stop_bitmap(&self) {
        lock(&self.0.inner).writes.stop();
    }

    /// See [`Writes::close_round`].
    pub fn close_round(&self) -> Option<BlockSet> {
        lock(&self.0.inner).writes.close_round()
    }

    /// See [`Writes::applied`].
    pub fn applied(&self, round: Round) {
        lock(&self.0.inner).writes.applied(round);
    }

    /// See [`Writes::residual`].
    pub fn residual(&self) -> Result<BlockSet, NotDrained> {
        lock(&self.0.inner).writes.residual()
    }

    /// Bytes that a round which is closed now would give.
    pub fn dirty_bytes(&self) -> u64 {
        let inner = lock(&self.0.inner);
        inner.writes.dirty_blocks() * inner.block_bytes
    }

    /// Whether reads of what is missing are to fail some time after the source was lost.
    pub fn let_misses_fail(&self, may_fail: bool) {
        lock(&self.0.inner).missed.may_fail = may_fail;
    }

    /// The source is lost: the number of this loss, if it was not known.
    pub fn source_is_lost(&self) -> Option<u64> {
        let mut inner = lock(&self.0.inner);
        if std::mem::replace(&mut inner.missed.is_lost, true) {
            return None;
        }
        inner.missed.losses += 1;
        Some(inner.missed.losses)
    }

    /// The source is back; whether reads of what is missing have failed.
    pub fn source_is_back(&self) -> bool {
        let mut inner = lock(&self.0.inner);
        inner.missed.is_lost = false;
        std::mem::take(&mut inner.missed.failing)
    }

    /// Fires when so many reads wait during that loss that a hypervisor may have none left, or when it is over.
    pub async fn too_many_held(&self, loss: u64) {
        loop {
            let missed = self.0.missed.listen();
            {
                let inner = lock(&self.0.inner);
                let over = !inner.missed.is_lost || inner.missed.losses != loss;
                if over || inner.reads >= HELD_READS_MAX {
                    return;
                }
            }
            missed.await;
        }
    }

    /// Reads of what is missing fail from now on, if that loss still lasts. Whether it does.
    pub fn give_up(&self, loss: u64) -> bool {
        {
            let mut inner = lock(&self.0.inner);
            let missed = &mut inner.missed;
            if !missed.may_fail || !missed.is_lost || missed.losses != loss {
                return false;
            }
            missed.failing = true;
        }
        self.0.missed.notify(usize::MAX);
        true
    }

    /// Reads, unless that waits in vain for what is at a source.
    async fn read_below(&self, below: &Edge, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        let len = buf.len() as u64;
        let mut reading = pin!(below.read(cx, at, buf));
        loop {
            let missed = self.0.missed.listen();
            if lock(&self.0.inner).missed.failing && is_missing(below, cx, at, len).await? {
                let why =
                    "the source is away, and what is read is only there: it is answered when that is back";
                return Err(IoError::new(ErrorKind::Io, why));
            }
            match select(reading, missed).await {
                Either::Left((read, _)) => return read,
                Either::Right((_, waiting)) => reading = waiting,
            }
        }
    }

    /// The gate before `below`.
    pub fn before(&self, below: Edge) -> NodeHandle {
        NodeHandle::new(Gated { gate: self.clone(), below })
    }

    fn ask(&self, inner: &mut Inner, kind: Kind) {
        let before = inner.asked;
        match inner.gate {
            Gate::AskBack => inner.asked.old_session = true,
            Gate::RunReads if kind == Kind::Write => inner.asked.guest_writes = true,
            _ => {}
        }
        if inner.asked != before {
            self.0.asking.notify(usize::MAX);
        }
    }

    /// Lets a request through when the gate does. `begin` counts it in.
    async fn pass<T>(&self, kind: Kind, begin: impl Fn(&mut Inner) -> T) -> IoResult<Route<T>> {
        let mut changed = None;
        loop {
            {
                let mut inner = lock(&self.0.inner);
                match (inner.gate, kind) {
                    (Gate::Run, _) | (Gate::RunReads, Kind::Read) => {
                        return Ok(Route::Below(begin(&mut inner)));
                    }
                    (Gate::ReadSource, Kind::Read) => {
                        if let Some(source) = &inner.source {
                            return Ok(Route::Source(source.clone()));
                        }
                    }
                    (Gate::ReadSource | Gate::Deny, _) => return Err(not_here(&inner.owner)),
                    (Gate::RunReads | Gate::Hold | Gate::HoldButFlush | Gate::AskBack, _) => {}
                }
                // The second look is under a listener, so that no change is missed.
                if changed.is_some() {
                    self.ask(&mut inner, kind);
                }
            }
            match changed.take() {
                Some(changed) => {
                    let changed: event_listener::EventListener = changed;
                    changed.await;
                }
                None => changed = Some(self.0.changed.listen()),
            }
        }
    }

    async fn change(&self, at: u64, len: u64, perform: impl Future<Output = IoResult<()>>) -> IoResult<()> {
        let begin = |inner: &mut Inner| {
            let block = inner.block_bytes;
            inner.writes.begin(at / block..at.saturating_add(len).div_ceil(block))
        };
        let Route::Below(writing) = self.pass(Kind::Write, begin).await? else {
            return Err(not_here("the source"));
        };
        let done = perform.await;
        self.landed(writing);
        done
    }

    fn landed(&self, writing: Writing) {
        let mut inner = lock(&self.0.inner);
        let _answer = inner.writes.landed(writing);
        let last = inner.writes.in_flight() == 0;
        drop(inner);
        if last {
            self.0.changed.notify(usize::MAX);
        }
    }
}

/// Whether a part of a range is not in the disk itself.
async fn is_missing(below: &Edge, cx: &Ctx, at: u64, len: u64) -> IoResult<bool> {
    let end = at.saturating_add(len).min(below.len());
    let mut at = at;
    while at < end {
        let extents = below.extents(cx, at, end - at).await?;
        let next = extents.last().map_or(end, |last| last.start + last.len);
        if extents.iter().any(|extent| extent.kind == ExtentKind::Absent) {
            return Ok(true);
        }
        at = next.max(at + 1);
    }
    Ok(false)
}

fn not_here(owner: &str) -> IoError {
    IoError::new(ErrorKind::NotPermitted, owned_by(owner))
}

/// What is told to who wants a disk where it is not.
pub(super) fn owned_by(owner: &str) -> String {
    let owner = if owner.is_empty() { "another host" } else { owner };
    format!("the disk is owned by {owner}: use it there (`infill whois` tells where it is)")
}

/// A gate and what lies behind it.
struct Gated {
    gate: DiskGate,
    below: Edge,
}

impl Node for Gated {
    fn limits(&self) -> Limits {
        self.below.node_limits()
    }

    fn len(&self) -> u64 {
        self.below.len()
    }

    fn info(&self) -> NodeInfo {
        self.below.info()
    }

    fn filtered(&self) -> Option<NodeHandle> {
        Some(self.below.node())
    }

    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        let begin = |inner: &mut Inner| {
            inner.reads += 1;
            (inner.missed.may_fail, inner.missed.is_lost)
        };
        match self.gate.pass(Kind::Read, begin).await? {
            Route::Below((false, _)) => {
                let _reading = Reading(&self.gate);
                self.below.read(cx, at, buf).await
            }
            Route::Below((true, is_lost)) => {
                let _reading = Reading(&self.gate);
                if is_lost {
                    self.gate.0.missed.notify(usize::MAX);
                }
                self.gate.read_below(&self.below, cx, at, buf).await
            }
            Route::Source(source) => source.read(cx, at, buf).await,
        }
    }

    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        let len = data.len() as u64;
        self.gate.change(at, len, self.below.write(cx, at, data, flags)).await
    }

    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.gate.change(at, len, self.below.write_zeroes(cx, at, len, flags)).await
    }

    async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.gate.change(at, len, self.below.discard(cx, at, len)).await
    }

    /// Everything acknowledged is stable by the time a gate answers without asking below.
    async fn sync(&self, cx: &Ctx) -> IoResult<()> {
        loop {
            let changed = self.gate.0.changed.listen();
            match self.gate.gate() {
                Gate::Run | Gate::RunReads => return self.below.sync(cx).await,
                Gate::Hold => {}
                Gate::HoldButFlush | Gate::AskBack | Gate::ReadSource | Gate::Deny => return Ok(()),
            }
            changed.await;
        }
    }

    async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        let route = self.gate.pass(Kind::Read, |inner| inner.reads += 1).await?;
        match route {
            Route::Below(()) => {
                let _reading = Reading(&self.gate);
                self.below.extents(cx, at, len).await
            }
            Route::Source(source) => source.extents(cx, at, len).await,
        }
    }

    /// The node behind it is somebody else's to close.
    async fn close(&self, cx: &Ctx) -> IoResult<()> {
        let _ = cx;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;
    use std::time::Duration;

    use infill_node::MemoryOverlay;
    use infill_sim::World;
    use infill_storage::rt;

    use super::*;

    const BLOCK: u64 = 4096;

    fn disk() -> (DiskGate, NodeHandle, NodeHandle) {
        let below = NodeHandle::new(MemoryOverlay::new(64 << 10, 4096, None));
        let gate = DiskGate::new(Gate::Run);
        let node = gate.before(Edge::new(below.clone()));
        (gate, node, below)
    }

    async fn write(node: &NodeHandle, at: u64, byte: u8) -> IoResult<()> {
        node.write(&Ctx::GUEST, at, vec![byte; BLOCK as usize], WriteFlags::empty()).await
    }

    #[test]
    fn a_held_gate_lets_nothing_through_and_lets_go_in_one() {
        World::new(1).run(async {
            let (gate, node, below) = disk();
            gate.count_in(64 << 10, BLOCK).await;
            gate.start_bitmap();
            write(&node, 0, 1).await.unwrap();
            assert_eq!(gate.dirty_bytes(), BLOCK);
            gate.set(Gate::Hold, "");
            let done = Rc::new(Cell::new(0));
            for at in [BLOCK, 2 * BLOCK] {
                let (node, done) = (node.clone(), done.clone());
                rt::spawn(async move {
                    write(&node, at, 7).await.unwrap();
                    let read = node.read_vec(&Ctx::GUEST, at, 1).await.unwrap();
                    assert_eq!(read[0], 7);
                    done.set(done.get() + 1);
                });
            }
            rt::sleep(Duration::from_secs(1)).await;
            gate.drained().await;
            assert_eq!((done.get(), gate.residual().unwrap().count()), (0, 1));
            assert_eq!(below.read_vec(&Ctx::GUEST, BLOCK, 1).await.unwrap()[0], 0);
            gate.set(Gate::HoldButFlush, "");
            node.sync(&Ctx::GUEST).await.unwrap();
            assert_eq!(done.get(), 0);
            gate.set(Gate::Run, "");
            rt::sleep(Duration::from_secs(1)).await;
            assert_eq!((done.get(), gate.residual().unwrap().count()), (2, 3));
        });
    }

    #[test]
    fn who_waits_is_told_to_the_driver_and_who_is_denied_is_told_the_owner() {
        World::new(1).run(async {
            let (gate, node, _) = disk();
            gate.set(Gate::RunReads, "");
            node.read_vec(&Ctx::GUEST, 0, 512).await.unwrap();
            assert_eq!(gate.asked(), Asked::default());
            let asking = gate.asking();
            let writer = node.clone();
            rt::spawn(async move { write(&writer, 0, 1).await.unwrap() });
            asking.await;
            assert_eq!(gate.asked(), Asked { old_session: false, guest_writes: true });
            gate.set(Gate::Run, "");
            assert_eq!(gate.asked(), Asked::default());
            // It has its turn before the disk leaves.
            rt::sleep(Duration::from_secs(1)).await;
            gate.set(Gate::AskBack, "");
            let asking = gate.asking();
            let reader = node.clone();
            rt::spawn(async move {
                let refused = reader.read_vec(&Ctx::GUEST, 0, 512).await.unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::NotPermitted);
                assert!(refused.to_string().contains("owned by b.example"), "{refused}");
            });
            asking.await;
            assert!(gate.asked().old_session);
            node.sync(&Ctx::GUEST).await.unwrap();
            gate.set(Gate::Deny, "b.example");
            rt::sleep(Duration::from_secs(1)).await;
            assert_eq!(write(&node, 0, 1).await.unwrap_err().kind(), ErrorKind::NotPermitted);
        });
    }

    #[test]
    fn reads_of_what_is_missing_fail_once_that_is_given_up_and_no_others() {
        World::new(1).run(async {
            let source = NodeHandle::new(MemoryOverlay::new(64 << 10, 4096, None));
            let away = DiskGate::new(Gate::Run);
            let below = away.before(Edge::new(source));
            let overlay = NodeHandle::new(MemoryOverlay::new(64 << 10, 4096, Some(below)));
            let gate = DiskGate::new(Gate::Run);
            let node = gate.before(Edge::new(overlay));
            gate.let_misses_fail(true);
            write(&node, BLOCK, 3).await.unwrap();
            away.set(Gate::Hold, "");
            let read = |at: u64, len: usize| {
                let node = node.clone();
                async move { node.read_vec(&Ctx::GUEST, at, len).await }
            };
            let (failed, answered) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
            let held = |at| {
                let (reading, failed, answered) = (read(at, 512), failed.clone(), answered.clone());
                rt::spawn(async move {
                    match reading.await {
                        Ok(_) => answered.set(answered.get() + 1),
                        Err(error) => {
                            assert_eq!(error.kind(), ErrorKind::Io);
                            failed.set(failed.get() + 1);
                        }
                    }
                });
            };
            held(0);
            rt::sleep(Duration::from_secs(1)).await;
            let earlier = gate.source_is_lost().unwrap();
            assert_eq!(gate.source_is_lost(), None);
            assert!(!gate.source_is_back() && !gate.give_up(earlier));
            let loss = gate.source_is_lost().unwrap();
            assert!(!gate.give_up(earlier) && failed.get() == 0);
            // As many as a hypervisor has open are too many.
            rt::timeout(Duration::from_secs(1), gate.too_many_held(loss)).await.ok_or(()).unwrap_err();
            (1..HELD_READS_MAX).for_each(|_| held(3 * BLOCK));
            gate.too_many_held(loss).await;
            assert_eq!((failed.get(), answered.get()), (0, 0));
            assert!(gate.give_up(loss));
            rt::sleep(Duration::from_secs(1)).await;
            assert_eq!((failed.get(), answered.get()), (HELD_READS_MAX, 0));
            // What is here is read, and written.
            assert_eq!(read(BLOCK, 512).await.unwrap()[0], 3);
            assert!(read(BLOCK, 2 * BLOCK as usize).await.is_err());
            write(&node, 2 * BLOCK, 4).await.unwrap();
            assert_eq!(read(BLOCK, 2 * BLOCK as usize).await.unwrap()[BLOCK as usize], 4);
            away.set(Gate::Run, "");
            assert!(gate.source_is_back() && !gate.source_is_back());
            assert_eq!(read(0, 512).await.unwrap()[0], 0);
        });
    }

    #[test]
    fn a_disk_that_is_the_sources_is_read_there_and_not_written() {
        World::new(1).run(async {
            let (gate, node, _) = disk();
            let source = NodeHandle::new(MemoryOverlay::new(64 << 10, 4096, None));
            write(&source, 0, 9).await.unwrap();
            gate.set(Gate::ReadSource, "a.example");
            gate.read_from(Some(source));
            assert_eq!(node.read_vec(&Ctx::GUEST, 0, 512).await.unwrap()[0], 9);
            assert_eq!(write(&node, 0, 1).await.unwrap_err().kind(), ErrorKind::NotPermitted);
        });
    }
}
