//! What every [`Node`](infill_node::Node) does, as cases to be run on any stack in the simulated world.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::{LocalBoxFuture, join_all};
use infill_base::{Ctx, ErrorKind, ExtentKind, Gather, IoResult, WriteFlags, ZeroFlags, is_zero};
use infill_job::stream::StreamOptions;
use infill_job::{JobOptions, Jobs};
use infill_node::{BackingRef, COPY_ON_READ_BYTES_MAX, CopyOnRead, NodeHandle};
use infill_sim::{DiskOp, Rng, World};
use infill_storage::rt;
use infill_storage::sync::{Mutex, lock};

use crate::format::failed;
use crate::guest::read_all;
use crate::payload::payload;
use crate::stack::{Below, Stack, Through, Top};
use crate::{Generator, Guest, GuestOp, Mix, Model, Violation};

/// What a discard of whole (sub)clusters leaves (10-architecture, I3a).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discards {
    /// Zeroes, whatever lies below.
    Zero,
    /// What was there.
    Nothing,
    /// Nothing here: without a backing, zeroes.
    Absent,
    /// What was there, or zeroes: the storage decides.
    Either,
}

/// What a stack under test is like.
#[derive(Clone, Copy, Debug)]
pub struct Subject {
    /// The overlay.
    pub top: Top,
    /// What lies below.
    pub below: Below,
    /// What guests go through.
    pub through: Through,
    /// Size of the disk, in bytes.
    pub size: u64,
    /// What the overlay's storage wants its requests to be multiples of, in bytes.
    pub align: u32,
}

impl Subject {
    /// A stack with a disk of a usual size, which ends in the middle of a cluster.
    pub fn new(top: Top, below: Below) -> Subject {
        let unit = match top {
            Top::Memory(unit) => unit,
            Top::Image(format) => format.unit_bytes(),
        };
        let size = (20 * unit).max(512 << 10) + 3 * 512;
        Subject { top, below, through: Through::Nothing, size, align: 1 }
    }

    fn discards(&self) -> Discards {
        match self.top {
            Top::Memory(_) if self.below == Below::Nothing => Discards::Absent,
            Top::Memory(_) => Discards::Zero,
            Top::Image(format) => format.discards(self.below != Below::Nothing),
        }
    }

    fn resizes(&self) -> bool {
        matches!(self.top, Top::Image(_))
    }
}

type Case = fn(Subject, u64) -> LocalBoxFuture<'static, Result<(), Violation>>;

/// Every case, by name.
pub const CASES: &[(&str, Case)] = &[
    ("generated operations at once, fills beside them", |s, n| Box::pin(generated(s, n))),
    ("behind the end everything is refused", |s, n| Box::pin(behind_the_end(s, n))),
    ("a discard leaves what its format says", |s, n| Box::pin(discard(s, n))),
    ("a populate never overwrites", |s, n| Box::pin(populate_loses(s, n))),
    ("a populate of an older generation does not link", |s, n| Box::pin(stale(s, n))),
    ("what is forgotten is absent, and nothing from before links", |s, n| Box::pin(forget(s, n))),
    ("what was read is kept", |s, n| Box::pin(copy_on_read(s, n))),
    ("a stream comes to its end and nothing needs the base", |s, n| Box::pin(stream(s, n))),
    ("a new size shows zeroes where it is new", |s, n| Box::pin(resize(s, n))),
    ("a new name of the backing is there after reopening", |s, n| Box::pin(rename(s, n))),
    ("a dropped write happens or not and holds nobody up", |s, n| Box::pin(dropped(s, n))),
    ("failing reads of the base fail reads alone", |s, n| Box::pin(base_fails(s, n))),
];

/// Runs every case in worlds of their own.
///
/// # Panics
/// With the case, the stack and the seed of the first violation.
pub fn run(subject: Subject, seeds: std::ops::Range<u64>) {
    for (name, case) in CASES {
        for seed in seeds.clone() {
            let result = World::new(seed).run(case(subject, seed));
            if let Err(violation) = result {
                panic!("{:?} over {:?}, seed {seed}, {name}: {violation}", subject.top, subject.below);
            }
        }
    }
}

const CX: Ctx = Ctx::GUEST;

fn broken(what: impl Into<String>) -> Violation {
    Violation::Broken(what.into())
}

fn ok<T>(when: &str, result: IoResult<T>) -> Result<T, Violation> {
    result.map_err(|error| failed(when, &error))
}

/// The stack, opened, with a guest that knows its content.
async fn open(subject: Subject, seed: u64) -> Result<(Stack, Guest), Violation> {
    let stack = Stack::build(subject.top, subject.below, subject.size, subject.align, seed)
        .await?
        .through(subject.through);
    let model = Arc::new(Mutex::new(Model::new(subject.size, &stack.content)));
    let guest = Guest::new(stack.open().await?, model);
    guest.compare_all().await?;
    Ok((stack, guest))
}

/// Closes, opens again where the overlay persists, and compares. Nothing has leaked.
async fn reopen(stack: &Stack, guest: Guest) -> Result<(), Violation> {
    reopen_leaky(stack, guest, false).await
}

async fn reopen_leaky(stack: &Stack, guest: Guest, may_leak: bool) -> Result<(), Violation> {
    guest.compare_all().await?;
    let mut model_node = guest.node().clone();
    let again = guest.clone();
    drop(guest);
    if stack.is_persistent() {
        stack.close(model_node, may_leak).await?;
        model_node = stack.open().await?;
    }
    again.on_node(model_node).compare_all().await
}

async fn write(guest: &Guest, at: u64, len: u64) -> Result<(), Violation> {
    guest.apply(GuestOp::Write { at, len, fua: false, packed: false }).await
}

/// Extents of the whole disk, asserted to cover it and to agree with content and base.
pub async fn extents_agree(
    stack: &Stack,
    node: &NodeHandle,
) -> Result<Vec<(u64, u64, ExtentKind)>, Violation> {
    let content = read_all(node).await?;
    let below = match node.unfiltered().backing().and_then(|slot| slot.node()) {
        Some(base) => read_all(&base).await?,
        None => Vec::new(),
    };
    let (mut out, mut next) = (Vec::new(), 0);
    while next < node.len() {
        for extent in ok("extents", node.extents(&CX, next, node.len() - next).await)? {
            if extent.start != next || extent.len == 0 || extent.end() > node.len() {
                return Err(broken(format!("an extent {extent:?} where {next} comes next")));
            }
            let shown = &content[extent.start as usize..extent.end() as usize];
            let mut under = below.get(extent.start as usize..).unwrap_or(&[]).to_vec();
            under.resize(shown.len().max(under.len()), 0);
            match extent.kind {
                ExtentKind::Zero if !is_zero(shown) => {
                    return Err(broken(format!("{extent:?} does not show zeroes")));
                }
                ExtentKind::Absent if *shown != under[..shown.len()] => {
                    return Err(broken(format!("{extent:?} does not show what lies below")));
                }
                _ => {}
            }
            if stack.is_persistent() && extent.kind != ExtentKind::Data && extent.compressed {
                return Err(broken(format!("{extent:?} is compressed and no data")));
            }
            out.push((extent.start, extent.len, extent.kind));
            next = extent.end();
        }
    }
    Ok(out)
}

/// The kind of the extent at a byte.
async fn kind_at(node: &NodeHandle, at: u64) -> Result<ExtentKind, Violation> {
    let extents = ok("extents", node.extents(&CX, at, 1).await)?;
    extents.first().map(|extent| extent.kind).ok_or_else(|| broken("no extent"))
}

async fn start_stream(node: &NodeHandle) -> Result<(), Violation> {
    let job = infill_job::stream::start(&Jobs::new(), JobOptions::new("s"), StreamOptions::new(node.clone()));
    let job = job.map_err(|error| broken(format!("the stream does not start: {error:?}")))?;
    job.wait().await.map_err(|error| failed("the stream", &error))
}

/// Populates that nobody asked for.
async fn populates(node: NodeHandle, mut rng: Rng) -> Result<(), Violation> {
    let unit = node.populate_unit();
    for _ in 0..30 {
        let at = rng.below(node.len().div_ceil(unit)) * unit;
        let len = (unit * rng.range(1, 5)).min(node.len() - at);
        let Some(slot) = node.backing().filter(|slot| slot.is_some()) else { break };
        let fetched = ok("a fetch", slot.fetch(&Ctx::FILL, at, len).await)?;
        ok("a populate", node.populate(&Ctx::FILL, at, fetched.data, fetched.generation).await)?;
    }
    Ok(())
}

async fn generated(subject: Subject, seed: u64) -> Result<(), Violation> {
    let (stack, guest) = open(subject, seed).await?;
    let mut rng = Rng::new(seed);
    let node = guest.node().unfiltered();
    let slot = node.backing().filter(|slot| slot.is_some());
    if let Some(slot) = slot {
        slot.set_copy_on_read(Some(CopyOnRead::new(&node, COPY_ON_READ_BYTES_MAX)));
    }
    let unit = node.populate_unit();
    let crowd = rng.fork();
    let align = u64::from(node.limits().request_align);
    let mut tasks: Vec<LocalBoxFuture<'static, Result<(), Violation>>> = Vec::new();
    for _ in 0..4 {
        let mut generator =
            Generator::new(crowd.clone(), Mix::GUEST, subject.size, unit, align).with_rng(rng.fork());
        let guest = guest.clone();
        tasks.push(Box::pin(async move {
            for _ in 0..25 {
                guest.apply(generator.next_op()).await?;
                rt::sleep(Duration::from_micros(generator.below(300))).await;
            }
            Ok(())
        }));
    }
    if slot.is_some() {
        tasks.push(Box::pin(populates(node.clone(), rng.fork())));
        if rng.per_mille(700) {
            let node = node.clone();
            tasks.push(Box::pin(async move { start_stream(&node).await }));
        }
    }
    for result in join_all(tasks.into_iter().map(rt::detached)).await {
        result?;
    }
    extents_agree(&stack, &node).await?;
    drop(node);
    reopen(&stack, guest).await
}

async fn behind_the_end(subject: Subject, seed: u64) -> Result<(), Violation> {
    let (stack, guest) = open(subject, seed).await?;
    let (node, size) = (guest.node(), subject.size);
    for (at, len) in [(size, 1), (size - 1, 2), (size + 4096, 512), (u64::MAX - 10, 8), (u64::MAX, 1)] {
        let data = Gather::from(vec![1; len as usize]);
        let results = [
            ("read", node.read(&CX, at, BytesMut::zeroed(len as usize)).await.map(|_| ())),
            ("write", node.write(&CX, at, data, WriteFlags::empty()).await),
            ("zero", node.write_zeroes(&CX, at, len, ZeroFlags::empty()).await),
            ("discard", node.discard(&CX, at, len).await),
            ("extents", node.extents(&CX, at, len).await.map(|_| ())),
        ];
        for (what, result) in results {
            match result {
                Err(error) if error.kind() == ErrorKind::InvalidInput => {}
                other => return Err(broken(format!("{what} of {at}+{len}: {other:?}, not InvalidInput"))),
            }
        }
    }
    for at in [0, 77, size] {
        ok("an empty read", node.read(&CX, at, BytesMut::new()).await)?;
        ok("an empty write", node.write(&CX, at, Gather::new(), WriteFlags::empty()).await)?;
        ok("no zeroes", node.write_zeroes(&CX, at, 0, ZeroFlags::empty()).await)?;
        ok("an empty discard", node.discard(&CX, at, 0).await)?;
    }
    reopen(&stack, guest).await
}

async fn discard(subject: Subject, seed: u64) -> Result<(), Violation> {
    let (stack, guest) = open(subject, seed).await?;
    let node = guest.node().clone();
    let cluster = node.info().cluster_bytes.unwrap_or(node.populate_unit());
    let at = 2 * cluster;
    for (prepared, from) in [(true, at), (false, at + 4 * cluster)] {
        if prepared {
            write(&guest, from, cluster).await?;
        }
        let before = kind_at(&node, from).await?;
        // More than whole clusters: the rest is ignored.
        guest.apply(GuestOp::Discard { at: from - 3, len: cluster + 6 }).await?;
        let after = kind_at(&node, from).await?;
        let expected = match subject.discards() {
            Discards::Zero => ExtentKind::Zero,
            Discards::Nothing => before,
            Discards::Absent => ExtentKind::Absent,
            Discards::Either => after,
        };
        if after != expected {
            return Err(broken(format!("a discard of {before:?} leaves {after:?}, not {expected:?}")));
        }
        guest.apply(GuestOp::Read { at: from - 3, len: cluster + 6 }).await?;
        if matches!(subject.discards(), Discards::Zero | Discards::Absent) {
            let found = ok("a read", node.read_vec(&CX, from, cluster as usize).await)?;
            if !is_zero(&found) {
                return Err(broken("what was discarded does not read as zeroes"));
            }
        }
    }
    // A guest never makes a range absent over a backing, by zeroes neither (I3a).
    guest.apply(GuestOp::Zero { at, len: 3 * cluster, may_unmap: true, fua: false }).await?;
    if subject.below != Below::Nothing && kind_at(&node, at).await? == ExtentKind::Absent {
        return Err(broken("zeroes over a backing left an absent range"));
    }
    extents_agree(&stack, &node).await?;
    drop(node);
    reopen(&stack, guest).await
}

async fn populate_loses(subject: Subject, seed: u64) -> Result<(), Violation> {
    let (stack, guest) = open(subject, seed).await?;
    let node = guest.node().unfiltered();
    let Some(slot) = node.backing().filter(|slot| slot.is_some()) else { return Ok(()) };
    let unit = node.populate_unit();
    let len = (8 * unit).min(subject.size / unit * unit);
    // Fetched before the guest writes, linked after: data, zeroes and a discard are there first.
    let fetched = ok("a fetch", slot.fetch(&Ctx::FILL, 0, len).await)?;
    write(&guest, 0, unit).await?;
    guest.apply(GuestOp::Zero { at: 2 * unit, len: unit, may_unmap: true, fua: false }).await?;
    write(&guest, 4 * unit + 5, 11).await?;
    let done = ok("a populate", node.populate(&Ctx::FILL, 0, fetched.data, fetched.generation).await)?;
    if done.linked + done.lost + done.stale != len
        || done.stale != 0
        || done.lost < 2 * unit
        || done.linked == 0
    {
        return Err(broken(format!("{len} bytes, at least {} of them present: {done:?}", 2 * unit)));
    }
    guest.compare_all().await?;
    // Again: everything is there.
    let fetched = ok("a fetch", slot.fetch(&Ctx::FILL, 0, len).await)?;
    let again = ok("a populate", node.populate(&Ctx::FILL, 0, fetched.data, fetched.generation).await)?;
    if again.linked != 0 || again.lost != len {
        return Err(broken(format!("all of {len} bytes are present: {again:?}")));
    }
    // The end of the disk, which need not be a whole unit.
    let last = (subject.size - 1) / unit * unit;
    let fetched = ok("a fetch", slot.fetch(&Ctx::FILL, last, subject.size - last).await)?;
    ok("a populate", node.populate(&Ctx::FILL, last, fetched.data, fetched.generation).await)?;
    if kind_at(&node, subject.size - 1).await? == ExtentKind::Absent {
        return Err(broken("the end of the disk was populated and is absent"));
    }
    let zeroed = node.populate_zero(&Ctx::FILL, 0, len, slot.generation()).await;
    if ok("populating zeroes", zeroed)?.linked != 0 {
        return Err(broken("zeroes were populated over data"));
    }
    extents_agree(&stack, &node).await?;
    drop(node);
    reopen(&stack, guest).await
}

async fn stale(subject: Subject, seed: u64) -> Result<(), Violation> {
    let (stack, guest) = open(subject, seed).await?;
    let node = guest.node().unfiltered();
    let Some(slot) = node.backing().filter(|slot| slot.is_some()) else { return Ok(()) };
    let unit = node.populate_unit();
    let fetched = ok("a fetch", slot.fetch(&Ctx::FILL, 0, 4 * unit).await)?;
    slot.raise().await;
    let wrong = Bytes::from(vec![0x55; 4 * unit as usize]);
    let done = ok("a populate", node.populate(&Ctx::FILL, 0, wrong.clone(), fetched.generation).await)?;
    if done.stale != 4 * unit || done.linked + done.lost != 0 {
        return Err(broken(format!("all of it is stale: {done:?}")));
    }
    let zeroed = ok("zeroes", node.populate_zero(&Ctx::FILL, 0, 4 * unit, fetched.generation).await)?;
    if zeroed.linked != 0 {
        return Err(broken(format!("stale zeroes were linked: {zeroed:?}")));
    }
    if kind_at(&node, 0).await? != ExtentKind::Absent {
        return Err(broken("a stale populate left something"));
    }
    // A change of generation in the middle of populates: each links wholly under the old one, or not at all.
    let generation = slot.generation();
    let racing = (0..4).map(|nth| {
        let (node, fetched) = (node.clone(), payload(crate::payload::BACKING_OP, nth * unit, unit as usize));
        rt::detached(async move { node.populate(&Ctx::FILL, nth * unit, fetched, generation).await })
    });
    let raised = async {
        rt::sleep(Duration::from_micros(Rng::new(seed).below(200))).await;
        slot.raise().await;
        let mut kinds = Vec::new();
        for nth in 0..4 {
            kinds.push(kind_at(&node, nth * unit).await?);
        }
        Ok::<_, Violation>(kinds)
    };
    let (populated, kinds) = futures_util::future::join(join_all(racing), raised).await;
    for (done, kind) in populated.into_iter().zip(kinds?) {
        let done = ok("a populate", done)?;
        if (done.linked > 0) != (kind != ExtentKind::Absent) {
            return Err(broken(format!("after the raise: {kind:?}, and the populate tells of {done:?}")));
        }
    }
    // Copy-ups fetch again under the new generation.
    write(&guest, 6 * unit + 1, 3).await?;
    let range = 6 * unit..7 * unit;
    let shown = ok("a read", node.read_vec(&CX, range.start, unit as usize).await)?;
    if shown[4..] != stack.content[range.start as usize + 4..range.end as usize] {
        return Err(broken("a copy-up lost what lies below"));
    }
    Ok(())
}

async fn forget(subject: Subject, seed: u64) -> Result<(), Violation> {
    if subject.through == Through::CopyOnRead {
        // Whoever looks whether it is absent would bring it back.
        return Ok(());
    }
    let (stack, guest) = open(subject, seed).await?;
    let node = guest.node().unfiltered();
    let unit = node.populate_unit();
    let Some(slot) = node.backing() else {
        return match node.forget(&CX, 0, unit).await {
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
            other => Err(broken(format!("a node that is no overlay forgets: {other:?}"))),
        };
    };
    let size = subject.size;
    for (at, len) in [(1, unit), (0, unit - 1), (unit, size), (size + unit, unit), (u64::MAX - 511, unit)] {
        match node.forget(&CX, at, len).await {
            Err(error) if error.kind() == ErrorKind::InvalidInput => {}
            other => return Err(broken(format!("forgetting {len} bytes at {at}: {other:?}"))),
        }
    }
    // What the guest wrote stays; what was populated goes, and comes again from below.
    let populate = |at: u64, count: u64| {
        let node = node.clone();
        async move {
            let Some(slot) = node.backing().filter(|slot| slot.is_some()) else { return Ok(()) };
            let fetched = ok("a fetch", slot.fetch(&Ctx::FILL, at, count * unit).await)?;
            let done = node.populate(&Ctx::FILL, at, fetched.data, fetched.generation).await;
            ok("a populate", done).map(drop)
        }
    };
    populate(0, 8).await?;
    write(&guest, 8 * unit, 2 * unit).await?;
    let fetched = ok("a fetch", slot.fetch(&Ctx::FILL, 2 * unit, 3 * unit).await)?;
    let beside = async {
        populate(11 * unit, 4).await?;
        guest.apply(GuestOp::Read { at: 0, len: 16 * unit }).await?;
        write(&guest, 9 * unit + 3, 7).await
    };
    let (forgotten, beside) = futures_util::future::join(node.forget(&CX, 2 * unit, 3 * unit), beside).await;
    ok("forgetting", forgotten)?;
    beside?;
    for nth in [2, 3, 4] {
        if kind_at(&node, nth * unit).await? != ExtentKind::Absent {
            return Err(broken(format!("unit {nth} was forgotten and is there")));
        }
    }
    let populated = if slot.is_some() { &[1, 5, 8, 9][..] } else { &[8, 9][..] };
    for nth in populated {
        if kind_at(&node, nth * unit).await? == ExtentKind::Absent {
            return Err(broken(format!("unit {nth} was forgotten beside another")));
        }
    }
    let late = node.populate(&Ctx::FILL, 2 * unit, fetched.data, fetched.generation).await;
    let late = ok("a late populate", late)?;
    if late.stale != 3 * unit || kind_at(&node, 2 * unit).await? != ExtentKind::Absent {
        return Err(broken(format!("what was fetched before is linked: {late:?}")));
    }
    extents_agree(&stack, &node).await?;
    populate(3 * unit, 1).await?;
    guest.compare_all().await?;
    ok("a flush", node.sync(&CX).await)?;
    // What was written, and the end of the disk, which need not be a whole unit.
    write(&guest, size - 700, 700).await?;
    let last = (size - 1) / unit * unit;
    ok("forgetting", node.forget(&CX, 8 * unit, unit).await)?;
    ok("forgetting", node.forget(&CX, last, size - last).await)?;
    let mut opened = node.clone();
    drop(guest);
    for closed in [false, true] {
        if closed && stack.is_persistent() {
            stack.close(opened, false).await?;
            opened = stack.open().await?;
        }
        for (at, end) in [(8 * unit, 9 * unit), (last, size)] {
            let shown = ok("a read", opened.read_vec(&CX, at, (end - at) as usize).await)?;
            if shown[..] != stack.content[at as usize..end as usize] {
                return Err(broken("what was forgotten does not show what lies below"));
            }
            if kind_at(&opened, at).await? != ExtentKind::Absent {
                return Err(broken("what was forgotten is not absent"));
            }
        }
    }
    Ok(())
}

async fn copy_on_read(subject: Subject, seed: u64) -> Result<(), Violation> {
    let (stack, guest) = open(subject, seed).await?;
    let node = guest.node().unfiltered();
    let Some(slot) = node.backing().filter(|slot| slot.is_some()) else { return Ok(()) };
    let policy = CopyOnRead::new(&node, COPY_ON_READ_BYTES_MAX);
    slot.set_copy_on_read(Some(policy.clone()));
    let unit = node.populate_unit();
    for (at, len) in [(0, 1), (2 * unit + 7, 100), (4 * unit, 3 * unit)] {
        guest.apply(GuestOp::Read { at, len }).await?;
        policy.settle().await;
        for byte in [at, at + len - 1] {
            if kind_at(&node, byte).await? == ExtentKind::Absent {
                return Err(broken(format!("byte {byte} was read and is not kept")));
            }
        }
    }
    if policy.populated_bytes() == 0 {
        return Err(broken("nothing was populated"));
    }
    stack.base_disk.fail(DiskOp::Read, 0, u64::MAX, ErrorKind::Io);
    guest.apply(GuestOp::Read { at: 4 * unit, len: 3 * unit }).await?;
    stack.base_disk.heal();
    // No space: reads succeed all the same (I5).
    stack.disk.fail(DiskOp::Write, 0, u64::MAX, ErrorKind::NoSpace);
    guest.apply(GuestOp::Read { at: 10 * unit, len: unit }).await?;
    policy.settle().await;
    stack.disk.heal();
    slot.set_copy_on_read(None);
    extents_agree(&stack, &node).await?;
    drop(node);
    reopen(&stack, guest).await
}

async fn stream(subject: Subject, seed: u64) -> Result<(), Violation> {
    let (stack, guest) = open(subject, seed).await?;
    let node = guest.node().unfiltered();
    if node.backing().is_none_or(|slot| !slot.is_some()) {
        return Ok(());
    }
    let before = stack.base_disk.media().hash();
    write(&guest, 1000, 70_000).await?;
    start_stream(&node).await?;
    if node.backing().is_some_and(|slot| slot.is_some()) {
        return Err(broken("the stream is over, the edge is still there"));
    }
    if stack.base_disk.media().hash() != before {
        return Err(broken("the stream changed the base"));
    }
    stack.base_disk.fail(DiskOp::Read, 0, u64::MAX, ErrorKind::SourceLost);
    guest.compare_all().await?;
    write(&guest, 333, 9).await?;
    drop(node);
    reopen(&stack, guest).await?;
    if stack.is_persistent() && stack.open().await?.info().backing.is_some() {
        return Err(broken("the header names a backing after the stream"));
    }
    Ok(())
}

async fn resize(subject: Subject, seed: u64) -> Result<(), Violation> {
    if !subject.resizes() {
        return Ok(());
    }
    let (stack, guest) = open(subject, seed).await?;
    let node = guest.node().clone();
    write(&guest, subject.size - 5000, 5000).await?;
    let mut rng = Rng::new(seed);
    let mut size = subject.size;
    for _ in 0..4 {
        let can_shrink = matches!(subject.top, Top::Image(format) if format.shrinks());
        let next = if can_shrink && rng.per_mille(400) {
            rng.range(size / 4, size) / 512 * 512
        } else {
            size + rng.range(1, 800) * 512
        };
        lock(guest.model()).begin_resize(next);
        ok("resizing", node.resize(&CX, next).await)?;
        lock(guest.model()).end_resize();
        if node.len() != next {
            return Err(broken(format!("resized to {next}, it has {}", node.len())));
        }
        guest.compare_all().await?;
        write(&guest, next - 700, 700).await?;
        size = next;
    }
    match node.resize(&CX, u64::MAX - 511).await {
        Err(_) => {}
        Ok(()) => return Err(broken("a disk of 2^64 bytes was taken")),
    }
    extents_agree(&stack, &node).await?;
    drop(node);
    reopen(&stack, guest).await
}

async fn rename(subject: Subject, seed: u64) -> Result<(), Violation> {
    let (stack, guest) = open(subject, seed).await?;
    // The header's cluster has no room for a second name where it is a sector.
    let has_room = matches!(subject.top, Top::Image(format) if format.cluster_bytes() > 512);
    if !has_room || subject.below == Below::Nothing {
        return Ok(());
    }
    write(&guest, 3, 70_000).await?;
    let longer = BackingRef { filename: "a longer name of the same base".into(), format: Some("raw".into()) };
    for named in [longer.clone(), BackingRef { filename: "b".into(), ..longer }] {
        ok("renaming", guest.node().unfiltered().set_backing_ref(&CX, Some(named.clone())).await)?;
        if guest.node().unfiltered().info().backing.as_ref() != Some(&named) {
            return Err(broken(format!(
                "named {named:?}, it tells {:?}",
                guest.node().unfiltered().info().backing
            )));
        }
        // Stable when it returns (P4): the medium alone says so.
        let Top::Image(format) = subject.top else { return Ok(()) };
        let durable = infill_sim::SimDisk::with(stack.disk.crash_point().durable, Default::default());
        let copy = format.open(&infill_storage::StorageHandle::new(durable)).await;
        let copy = copy.map_err(|error| failed("opening what is stable", &error))?;
        if copy.info().backing.as_ref() != Some(&named) {
            return Err(broken(format!("stable is {:?}", copy.info().backing)));
        }
    }
    reopen(&stack, guest).await
}

async fn dropped(subject: Subject, seed: u64) -> Result<(), Violation> {
    let (stack, guest) = open(subject, seed).await?;
    let mut rng = Rng::new(seed);
    let unit = guest.node().unfiltered().populate_unit();
    let mut generator = Generator::new(rng.fork(), Mix::GUEST, subject.size, unit, 512);
    for _ in 0..6 {
        let mut tickets = Vec::new();
        for _ in 0..5 {
            let patience = Duration::from_micros(rng.below(600));
            tickets.extend(guest.apply_or_drop(generator.next_op(), patience).await?);
        }
        // Others go on meanwhile.
        guest.apply(generator.next_op()).await?;
        guest.apply(GuestOp::Sync).await?;
        rt::sleep(Duration::from_secs(1)).await;
        tickets.into_iter().for_each(|ticket| guest.settled(ticket));
        guest.compare_all().await?;
    }
    extents_agree(&stack, guest.node()).await?;
    reopen_leaky(&stack, guest, true).await
}

async fn base_fails(subject: Subject, seed: u64) -> Result<(), Violation> {
    let (stack, guest) = open(subject, seed).await?;
    let unit = guest.node().unfiltered().populate_unit();
    if subject.below == Below::Nothing {
        return Ok(());
    }
    write(&guest, 0, unit).await?;
    let node = Rc::new(guest.node().clone());
    // Read once, so that an image below has its own metadata at hand.
    stack.base_disk.fail(DiskOp::Read, 0, u64::MAX, ErrorKind::Io);
    guest.apply(GuestOp::Read { at: 0, len: unit }).await?;
    guest.apply(GuestOp::Write { at: 4 * unit, len: unit, fua: true, packed: false }).await?;
    let data_at = stack.content.iter().enumerate().skip(8 * unit as usize).find(|(_, byte)| **byte != 0);
    if let Some((at, _)) = data_at {
        let error = match node.read_vec(&CX, at as u64, 1).await {
            Err(error) => error,
            Ok(_) => return Err(broken("a read of a failing base succeeded")),
        };
        if error.kind() != ErrorKind::Io {
            return Err(broken(format!("the base's error comes as {:?}: {error}", error.kind())));
        }
    }
    stack.base_disk.heal();
    drop(node);
    reopen(&stack, guest).await
}

/// The format of a stack's overlay, for messages of tests.
pub fn top_name(top: Top) -> String {
    match top {
        Top::Memory(unit) => format!("memory in units of {unit}"),
        Top::Image(format) => format.name(),
    }
}
