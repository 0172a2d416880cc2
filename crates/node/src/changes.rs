//! Changes of a node's content: who sees them, and how new ones are kept out for a moment.
//!
//! Every guest-visible change (write, zeroes, discard, resize) of a node goes through here, whoever asks for it; a populate
//! does not, for it changes nothing that a guest can see.
//!
//! * **Counting and holding.** A change counts itself in on a counter of its thread, so that two reactors share no line,
//!   and looks whether the node is held. A hold first says so and then waits for the counters: one of the two sees the
//!   other (both orders are sequentially consistent). Reads are not held: what they see was true when they began.
//! * **Watching.** Dirty bitmaps, mirrors and backups are watchers. While there is none, a change pays one load.
//!
//! Hold nodes from the top down: a change of an overlay that has begun may wait for one of the node below it.

use std::any::Any;
use std::cell::Cell;
use std::sync::atomic::AtomicUsize as PlainCounter;

use event_listener::Event;
use futures_util::future::LocalBoxFuture;
use infill_base::{Ctx, Gather, IoResult};
use infill_storage::sync::atomic::{AtomicUsize, Ordering};
use infill_storage::sync::{Arc, Mutex, lock};

use crate::{NodeHandle, WeakNode};

/// Counters of one gate; threads beyond that share.
pub(crate) const SHARDS: usize = 8;

/// What is about to be done to a node, or was done.
#[derive(Clone, Debug)]
pub struct Change {
    /// First guest byte.
    pub at: u64,
    /// Length in bytes.
    pub len: u64,
    /// What is done.
    pub what: ChangeKind,
}

/// The kinds of [`Change`].
#[derive(Clone, Debug)]
pub enum ChangeKind {
    /// These bytes are written.
    Write(Gather),
    /// The range is made zero; the space may be given back if the flag says so.
    Zero {
        /// Whether the space may be given back.
        may_unmap: bool,
    },
    /// The guest does not need the range any more.
    Discard,
}

/// What a watcher keeps from before a change until after it (a range lock, for example).
pub type Kept = Option<Box<dyn Any>>;

/// Sees every change of a node's content. Called on the reactor of whoever asks for the change.
pub trait Watcher: Send + Sync + 'static {
    /// Before the change reaches the driver, which waits for this. An error refuses the change, and is told to its asker.
    fn before<'a>(&'a self, cx: &'a Ctx, change: &'a Change) -> Option<LocalBoxFuture<'a, IoResult<Kept>>> {
        let _ = (cx, change);
        None
    }

    /// The change has landed, or has failed and may have landed in part; nobody was told yet. Dirty bits are set here:
    /// set earlier, one could be taken together with the old bytes.
    fn landed(&self, at: u64, len: u64) {
        let _ = (at, len);
    }

    /// After a change that has succeeded, before its asker is told, who waits for this. An error is told to the asker.
    /// `kept` is what [`Watcher::before`] gave.
    fn after<'a>(
        &'a self,
        cx: &'a Ctx,
        change: &'a Change,
        kept: &'a mut Kept,
    ) -> Option<LocalBoxFuture<'a, IoResult<()>>> {
        let _ = (cx, change, kept);
        None
    }

    /// The node has another size now.
    fn resized(&self, len: u64) {
        let _ = len;
    }
}

/// A watcher watches while this lives, which does not keep the node.
#[must_use = "it watches only while this lives"]
pub struct Watching {
    node: WeakNode,
    id: u64,
}

impl Drop for Watching {
    fn drop(&mut self) {
        if let Some(node) = self.node.upgrade() {
            unwatch(&node, self.id);
        }
    }
}

/// New changes of the node wait while this lives, and none is in flight.
#[must_use = "the node is held only while this lives"]
#[derive(Debug)]
pub struct Held(NodeHandle);

impl Held {
    /// The node that is held.
    pub fn node(&self) -> &NodeHandle {
        &self.0
    }

    /// Has `watcher` see every change from the end of the hold on.
    pub fn watch(&self, watcher: Arc<dyn Watcher>) -> Watching {
        watch(self, watcher)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.tell_held(false);
        let changes = self.0.changes();
        if changes.holds.fetch_sub(1, Ordering::SeqCst) == 1 {
            changes.opened.notify(usize::MAX);
        }
    }
}

type Watchers = Arc<[(u64, Arc<dyn Watcher>)]>;

#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard(AtomicUsize);

/// A node's part in all that.
pub(crate) struct Changes {
    in_flight: [Shard; SHARDS],
    holds: AtomicUsize,
    opened: Event,
    left: Event,
    watched: AtomicUsize,
    watchers: Mutex<Watchers>,
}

impl Default for Changes {
    fn default() -> Changes {
        Changes {
            in_flight: Default::default(),
            holds: AtomicUsize::new(0),
            opened: Event::new(),
            left: Event::new(),
            watched: AtomicUsize::new(0),
            watchers: Mutex::new(Arc::new([])),
        }
    }
}

/// A change that has counted itself in.
pub(crate) struct InFlight<'a> {
    changes: &'a Changes,
    shard: usize,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.changes.leave(self.shard);
    }
}

impl Changes {
    /// Counts a change in, once nobody holds the node.
    pub(crate) async fn enter(&self) -> InFlight<'_> {
        let shard = shard();
        loop {
            self.in_flight[shard].0.fetch_add(1, Ordering::SeqCst);
            let entered = InFlight { changes: self, shard };
            if self.holds.load(Ordering::SeqCst) == 0 {
                return entered;
            }
            drop(entered);
            let opened = self.opened.listen();
            if self.holds.load(Ordering::SeqCst) > 0 {
                opened.await;
            }
        }
    }

    fn leave(&self, shard: usize) {
        self.in_flight[shard].0.fetch_sub(1, Ordering::SeqCst);
        if self.holds.load(Ordering::SeqCst) > 0 {
            self.left.notify(usize::MAX);
        }
    }

    /// Changes that have counted themselves in.
    fn count(&self) -> usize {
        self.in_flight.iter().map(|shard| shard.0.load(Ordering::SeqCst)).sum()
    }

    /// Who watches, if anybody does.
    pub(crate) fn watchers(&self) -> Option<Watchers> {
        (self.watched.load(Ordering::Acquire) > 0).then(|| lock(&self.watchers).clone())
    }
}

/// Holds `node` (see [`NodeHandle::hold_changes`]).
pub(crate) async fn hold(node: &NodeHandle) -> Held {
    let changes = node.changes();
    changes.holds.fetch_add(1, Ordering::SeqCst);
    node.tell_held(true);
    // From here on: dropped while it waits, it opens the node again.
    let held = Held(node.clone());
    loop {
        let left = changes.left.listen();
        if changes.count() == 0 {
            return held;
        }
        left.await;
    }
}

/// Adds a watcher to `held`'s node, which sees every change that is not in it yet.
fn watch(held: &Held, watcher: Arc<dyn Watcher>) -> Watching {
    Watching { node: held.0.downgrade(), id: watch_for_ever(held, watcher) }
}

/// Takes a watcher away.
pub(crate) fn unwatch(node: &NodeHandle, id: u64) {
    let changes = node.changes();
    let mut list = lock(&changes.watchers);
    let kept = list.iter().filter(|(other, _)| *other != id).cloned().collect();
    *list = kept;
    changes.watched.store(list.len(), Ordering::SeqCst);
}

/// Adds a watcher that stays until it is taken away by its number, or its node goes.
pub(crate) fn watch_for_ever(held: &Held, watcher: Arc<dyn Watcher>) -> u64 {
    watch_new(&held.0, watcher)
}

/// Adds a watcher to a node that nobody changes, because it is held or nobody has it yet.
pub(crate) fn watch_new(node: &NodeHandle, watcher: Arc<dyn Watcher>) -> u64 {
    static NEXT: PlainCounter = PlainCounter::new(1);
    let id = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed) as u64;
    let changes = node.changes();
    let mut list = lock(&changes.watchers);
    let more = list.iter().cloned().chain([(id, watcher)]).collect();
    *list = more;
    changes.watched.store(list.len(), Ordering::SeqCst);
    id
}

/// The counter of this thread.
pub(crate) fn shard() -> usize {
    static NEXT: PlainCounter = PlainCounter::new(0);
    thread_local! {
        static MINE: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    MINE.with(|mine| {
        if mine.get() == usize::MAX {
            mine.set(NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % SHARDS);
        }
        mine.get()
    })
}

/// Runs `change`, which `perform` does, past the watchers.
pub(crate) async fn watched(
    watchers: Watchers,
    cx: &Ctx,
    change: Change,
    perform: LocalBoxFuture<'_, IoResult<()>>,
) -> IoResult<()> {
    let mut kept: Vec<Kept> = Vec::new();
    for (_, watcher) in watchers.iter() {
        kept.push(match watcher.before(cx, &change) {
            Some(before) => before.await?,
            None => None,
        });
    }
    // Told also when this is dropped in the middle.
    let landed = Landed { watchers: &watchers, at: change.at, len: change.len };
    let result = perform.await;
    drop(landed);
    result?;
    for ((_, watcher), kept) in watchers.iter().zip(&mut kept) {
        if let Some(after) = watcher.after(cx, &change, kept) {
            after.await?;
        }
    }
    Ok(())
}

struct Landed<'a> {
    watchers: &'a Watchers,
    at: u64,
    len: u64,
}

impl Drop for Landed<'_> {
    fn drop(&mut self) {
        for (_, watcher) in self.watchers.iter() {
            watcher.landed(self.at, self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;
    use std::time::Duration;

    use infill_base::{WriteFlags, ZeroFlags};
    use infill_sim::World;
    use infill_storage::rt;

    use super::*;
    use crate::{DirtyMap, MemoryOverlay};

    const LEN: u64 = 64 << 10;

    fn disk() -> NodeHandle {
        NodeHandle::new(MemoryOverlay::new(LEN, 4096, None))
    }

    #[test]
    fn a_hold_waits_for_what_is_in_flight_and_keeps_out_what_comes() {
        World::new(1).run(async {
            let node = disk();
            let cell = node.clone();
            let begun = cell.changes().enter().await;
            assert!(rt::timeout(Duration::from_secs(1), node.hold_changes()).await.is_none());
            // The hold that gave up has opened the node again.
            node.write(&Ctx::GUEST, 0, vec![1; 512], WriteFlags::empty()).await.unwrap();
            drop(begun);
            let held = node.hold_changes().await;
            let done = Rc::new(Cell::new(false));
            let (late, flag) = (node.clone(), done.clone());
            rt::spawn(async move {
                late.write(&Ctx::GUEST, 0, vec![2; 512], WriteFlags::empty()).await.unwrap();
                flag.set(true);
            });
            rt::sleep(Duration::from_secs(1)).await;
            assert!(!done.get());
            assert_eq!(node.read_vec(&Ctx::GUEST, 0, 512).await.unwrap()[..], [1; 512]);
            drop(held);
            rt::sleep(Duration::from_secs(1)).await;
            assert!(done.get());
        });
    }

    #[test]
    fn a_bitmap_sees_every_kind_of_change_and_none_after_it_has_gone() {
        World::new(1).run(async {
            let (node, cx) = (disk(), Ctx::GUEST);
            let map = Arc::new(DirtyMap::new(LEN, 4096));
            let watching = node.watch(map.clone()).await;
            node.write(&cx, 1, vec![1; 512], WriteFlags::empty()).await.unwrap();
            node.write_zeroes(&cx, 8192, 4096, ZeroFlags::empty()).await.unwrap();
            node.discard(&cx, 20 << 10, 1).await.unwrap();
            assert!(node.write(&cx, LEN, vec![1; 512], WriteFlags::empty()).await.is_err());
            let dirty: Vec<_> =
                std::iter::successors(map.next_dirty(0, u64::MAX), |run| map.next_dirty(run.end, u64::MAX))
                    .collect();
            assert_eq!(dirty, [0..4096, 8192..12288, 20480..24576]);
            drop(watching);
            node.write(&cx, 40960, vec![1; 512], WriteFlags::empty()).await.unwrap();
            assert_eq!(map.dirty_bytes(), 3 * 4096);
        });
    }

    struct Refuses;

    impl Watcher for Refuses {
        fn before<'a>(&'a self, _: &'a Ctx, _: &'a Change) -> Option<LocalBoxFuture<'a, IoResult<Kept>>> {
            Some(Box::pin(async {
                Err(infill_base::IoError::new(infill_base::ErrorKind::NoSpace, "no room for the old bytes"))
            }))
        }
    }

    #[test]
    fn what_a_watcher_refuses_does_not_happen() {
        World::new(1).run(async {
            let (node, cx) = (disk(), Ctx::GUEST);
            let _watching = node.watch(Arc::new(Refuses)).await;
            let refused = node.write(&cx, 0, vec![1; 512], WriteFlags::empty()).await.unwrap_err();
            assert_eq!(refused.kind(), infill_base::ErrorKind::NoSpace);
            assert_eq!(node.read_vec(&cx, 0, 512).await.unwrap()[..], [0; 512]);
        });
    }
}
