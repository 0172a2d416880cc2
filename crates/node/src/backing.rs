//! The edge from an overlay to what lies below: every read of absent bytes goes through here.
//!
//! One place holds the whole serialisation of copy-on-read and streaming against everything else:
//! * **Generation** (I3a). Whoever changes what lies below, or makes a range absent again, raises the generation and
//!   waits for local links under the old one ([`BackingSlot::raise`], [`BackingSlot::replace`]), never for a fetch.
//!   A fetch carries the generation from before it began ([`Fetched::generation`]); a populate or copy-up links only
//!   while it holds a [`LinkGuard`] of that generation.
//! * **Copy-on-read** (I5): the guest is answered as soon as its bytes are there; the rest of the populate unit and
//!   the local write follow in a task of their own, are dropped when memory is short, and their failure never fails
//!   the read.

use bytes::{Bytes, BytesMut};
use event_listener::Event;
use infill_base::{Class, Ctx, IoResult, align_down, align_up};
use infill_storage::sync::atomic::{AtomicU64, Ordering};
use infill_storage::sync::{Arc, Mutex, lock};
use infill_storage::{Permits, RangeLock, rt};

use crate::generic::chain_map;
use crate::latency::LatencyKind;
use crate::{NodeHandle, WeakNode};

/// Bytes of copy-on-read populates in flight for one overlay; at the bound, populates are dropped.
pub const COPY_ON_READ_BYTES_MAX: u64 = 32 << 20;

/// Layers that are looked through for the last one whose bytes are kept.
const LAYERS_MAX: usize = 1 << 10;

/// Keeps what guests read in the overlay. Shared by all reactors.
#[derive(Clone)]
pub struct CopyOnRead(Arc<CopyOnReadInner>);

struct CopyOnReadInner {
    overlay: WeakNode,
    /// The last layer whose bytes are kept, where not all are.
    bottom: Option<WeakNode>,
    permits: Permits,
    /// Units that a populate is under way for: the second miss in a unit need not fetch the rest again.
    busy: RangeLock,
    populated_bytes: AtomicU64,
    dropped: AtomicU64,
}

impl CopyOnRead {
    /// Populates `overlay`, with at most `bytes_max` bytes in flight.
    pub fn new(overlay: &NodeHandle, bytes_max: u64) -> CopyOnRead {
        CopyOnRead::down_to(overlay, bytes_max, None)
    }

    /// As [`CopyOnRead::new`], of what the layers down to `bottom` hold.
    pub(crate) fn down_to(overlay: &NodeHandle, bytes_max: u64, bottom: Option<WeakNode>) -> CopyOnRead {
        CopyOnRead(Arc::new(CopyOnReadInner {
            overlay: overlay.downgrade(),
            bottom,
            permits: Permits::new(bytes_max),
            busy: RangeLock::new(),
            populated_bytes: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        }))
    }

    /// Bytes that were linked so far.
    pub fn populated_bytes(&self) -> u64 {
        self.0.populated_bytes.load(Ordering::Relaxed)
    }

    /// Populates that were dropped or failed so far. No data is lost by that; it stays below.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    /// Waits until every populate that was begun before is over.
    pub async fn settle(&self) {
        self.0.busy.settle(0, u64::MAX).await;
    }

    /// Keeps `data`, which a guest has just read at `at`.
    fn keep(&self, at: u64, data: Bytes, generation: u64) {
        let Some(overlay) = self.0.overlay.upgrade() else { return };
        let unit = overlay.populate_unit();
        let (start, end) = (align_down(at, unit), align_up(at + data.len() as u64, unit).min(overlay.len()));
        let permit = self.0.permits.try_take(end - start);
        let busy = self.0.busy.try_exclusive(start, end);
        let (Some(permit), Some(busy)) = (permit, busy) else {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let this = self.clone();
        rt::spawn(async move {
            let populated = match &this.0.bottom {
                None => populate_around(&overlay, at, data, start, end, generation).await,
                Some(bottom) => populate_above(&overlay, bottom, at, data, generation).await,
            };
            match populated {
                Ok(linked) => this.0.populated_bytes.fetch_add(linked, Ordering::Relaxed),
                Err(error) => {
                    tracing::debug!(%error, at = start, "copy-on-read dropped");
                    this.0.dropped.fetch_add(1, Ordering::Relaxed)
                }
            };
            drop((busy, permit));
        });
    }
}

/// Populates the units of `data` (at `at`) of which a layer down to `bottom` holds anything.
async fn populate_above(
    overlay: &NodeHandle,
    bottom: &WeakNode,
    at: u64,
    data: Bytes,
    generation: u64,
) -> IoResult<u64> {
    let (unit, data_end) = (overlay.populate_unit(), at + data.len() as u64);
    let layers = std::iter::successors(overlay.layer_below(), NodeHandle::layer_below);
    let Some(depth) =
        bottom.upgrade().and_then(|bottom| layers.take(LAYERS_MAX).position(|layer| layer.is_same(&bottom)))
    else {
        // It has left the chain: nothing that is below is meant.
        return Ok(0);
    };
    let (mut next, mut linked) = (align_down(at, unit), 0);
    let end = align_up(data_end, unit).min(overlay.len());
    while next < end {
        // The first layer below the overlay has the depth 1.
        let map = chain_map(overlay, &Ctx::of(Class::AroundMiss), next, end - next).await?;
        let mapped_to = map.last().map_or(end, |last| last.extent.end());
        for mapped in map.iter().filter(|mapped| mapped.present && (1..=depth + 1).contains(&mapped.depth)) {
            let start = align_down(mapped.extent.start, unit).max(next);
            let stop = align_up(mapped.extent.end(), unit).min(end);
            if start >= stop {
                continue;
            }
            let (from, to) = (start.max(at), stop.min(data_end));
            let part = data.slice((from - at) as usize..(to - at) as usize);
            linked += populate_around(overlay, from, part, start, stop, generation).await?;
            next = stop;
        }
        next = next.max(mapped_to);
    }
    Ok(linked)
}

/// Fetches what is missing of `[start, end)` around `data`, and populates the whole.
async fn populate_around(
    overlay: &NodeHandle,
    at: u64,
    data: Bytes,
    start: u64,
    end: u64,
    generation: u64,
) -> IoResult<u64> {
    let cx = Ctx::of(Class::AroundMiss);
    let data_end = at + data.len() as u64;
    let whole = if start == at && end == data_end {
        data
    } else {
        let Some(slot) = overlay.backing() else { return Ok(0) };
        let mut whole = BytesMut::with_capacity((end - start) as usize);
        if start < at {
            let head = slot.fetch(&cx, start, at - start).await?;
            if head.generation != generation {
                return Ok(0);
            }
            whole.extend_from_slice(&head.data);
        }
        whole.extend_from_slice(&data);
        if data_end < end {
            let tail = slot.fetch(&cx, data_end, end - data_end).await?;
            if tail.generation != generation {
                return Ok(0);
            }
            whole.extend_from_slice(&tail.data);
        }
        whole.freeze()
    };
    Ok(overlay.populate(&cx, start, whole, generation).await?.linked)
}

/// Bytes from below, and the generation of the edge under which they were asked for.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// As many bytes as were asked for; zeroes behind the end of the backing.
    pub data: Bytes,
    /// To be given to [`BackingSlot::begin_link`] or [`crate::Node::populate`].
    pub generation: u64,
}

#[derive(Debug, Default)]
struct Links {
    open: AtomicU64,
    closed: Event,
}

/// Held from the last look at *absent* until the local write is linked: a change of generation waits for it.
#[derive(Debug)]
pub struct LinkGuard(Arc<Links>);

impl Drop for LinkGuard {
    fn drop(&mut self) {
        if self.0.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.closed.notify(usize::MAX);
        }
    }
}

struct State {
    node: Option<NodeHandle>,
    links: Arc<Links>,
    copy_on_read: Option<CopyOnRead>,
}

/// Outcome of [`BackingSlot::read`].
#[derive(Debug)]
#[must_use]
pub enum Below {
    /// The buffer holds what lies below.
    Filled(BytesMut),
    /// The edge has changed since the generation was taken: what was absent may be present now, and what lay below may
    /// be gone. Look the range up again. The buffer's content means nothing.
    Changed(BytesMut),
}

/// An overlay's edge to its backing. Empty where there is none (any more): absent then reads as zeroes.
///
/// A look-up that finds *absent* is worth something only under the generation that was taken **before** it: a stream may
/// populate the range and drop the backing in between, and asking below would then give zeroes. So a driver reads
/// [`BackingSlot::generation`], looks up, and gives that generation to [`BackingSlot::read`], which tells it to look
/// again where the edge has changed.
pub struct BackingSlot {
    /// Changed only under the lock; read without it.
    generation: AtomicU64,
    state: Mutex<State>,
}

impl BackingSlot {
    /// An edge to `node`, or an empty one.
    pub fn new(node: Option<NodeHandle>) -> BackingSlot {
        let state = State { node, links: Arc::default(), copy_on_read: None };
        BackingSlot { generation: AtomicU64::new(1), state: Mutex::new(state) }
    }

    /// The node below.
    pub fn node(&self) -> Option<NodeHandle> {
        lock(&self.state).node.clone()
    }

    /// Whether something lies below.
    pub fn is_some(&self) -> bool {
        lock(&self.state).node.is_some()
    }

    /// The generation now.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Turns copy-on-read on or off.
    pub fn set_copy_on_read(&self, policy: Option<CopyOnRead>) {
        lock(&self.state).copy_on_read = policy;
    }

    /// The copy-on-read policy, while it is on.
    pub fn copy_on_read(&self) -> Option<CopyOnRead> {
        lock(&self.state).copy_on_read.clone()
    }

    /// Leave to link under `generation`; `None` if it is over (fetch again).
    pub fn begin_link(&self, generation: u64) -> Option<LinkGuard> {
        let state = lock(&self.state);
        if self.generation() != generation {
            return None;
        }
        state.links.open.fetch_add(1, Ordering::AcqRel);
        Some(LinkGuard(state.links.clone()))
    }

    /// Begins a new generation, and waits for links (local writes only) under the old one.
    pub async fn raise(&self) -> u64 {
        let node = self.node();
        self.begin_generation(node).await
    }

    /// Puts `node` below from now on, as a new generation.
    pub async fn replace(&self, node: Option<NodeHandle>) {
        self.begin_generation(node).await;
    }

    async fn begin_generation(&self, node: Option<NodeHandle>) -> u64 {
        let (links, generation) = {
            let mut state = lock(&self.state);
            if let Some(old) = &state.node {
                old.fetches().raise();
            }
            state.node = node;
            let generation = self.generation.fetch_add(1, Ordering::AcqRel) + 1;
            (std::mem::take(&mut state.links), generation)
        };
        loop {
            let closed = links.closed.listen();
            if links.open.load(Ordering::Acquire) == 0 {
                return generation;
            }
            closed.await;
        }
    }

    /// A guest's read of bytes that a look-up under `generation` found absent: fills `buf` from guest byte `at`, then
    /// lets copy-on-read keep them. Zeroes behind the end of the backing, and where there is none.
    pub async fn read(&self, cx: &Ctx, at: u64, mut buf: BytesMut, generation: u64) -> IoResult<Below> {
        let (node, now, copy_on_read) = {
            let state = lock(&self.state);
            (state.node.clone(), self.generation(), state.copy_on_read.clone())
        };
        if now != generation {
            return Ok(Below::Changed(buf));
        }
        let Some(node) = node else {
            buf.fill(0);
            return Ok(Below::Filled(buf));
        };
        let start = (cx.class == Class::Guest && node.latency().is_listening()).then(rt::now);
        let fetched = fetch_from(&node, cx, at, buf.len() as u64).await;
        if self.generation() != generation {
            return Ok(Below::Changed(buf));
        }
        let (data, inside) = fetched?;
        if let Some(start) = start {
            let end = rt::now();
            node.latency().record(LatencyKind::Miss, end, end.saturating_sub(start));
        }
        buf[..inside].copy_from_slice(&data);
        buf[inside..].fill(0);
        if let Some(policy) = copy_on_read
            && cx.class >= Class::Prefetch
            && inside > 0
        {
            policy.keep(at, data, generation);
        }
        Ok(Below::Filled(buf))
    }

    /// Bytes from below for a populate or a copy-up: nothing is kept, and nothing may be held while it waits.
    pub async fn fetch(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Fetched> {
        let (node, generation) = {
            let state = lock(&self.state);
            (state.node.clone(), self.generation())
        };
        let Some(node) = node else {
            return Ok(Fetched { data: infill_base::zero_bytes(len as usize), generation });
        };
        let (data, inside) = fetch_from(&node, cx, at, len).await?;
        if inside as u64 == len {
            return Ok(Fetched { data, generation });
        }
        let mut whole = BytesMut::zeroed(len as usize);
        whole[..inside].copy_from_slice(&data);
        Ok(Fetched { data: whole.freeze(), generation })
    }
}

/// The bytes of the range that lie on `node`, and how many that are.
async fn fetch_from(node: &NodeHandle, cx: &Ctx, at: u64, len: u64) -> IoResult<(Bytes, usize)> {
    let inside = node.len().saturating_sub(at).min(len);
    if inside == 0 {
        return Ok((Bytes::new(), 0));
    }
    let data = node.fetches().fetch(node, cx, at, inside).await?;
    Ok((data, inside as usize))
}
