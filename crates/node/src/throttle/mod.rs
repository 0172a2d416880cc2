//! The throttle filter: requests of its disks wait so that together they do no more than their group may.
//!
//! [`ThrottleGroup`] has the limits, and the requests that wait; [`ThrottleNode`] is one of its members. Reads, writes, zeroes
//! and discards wait; a sync never does. What never happens: a request is held back while somebody holds the node's changes
//! or closes it (those that wait go on then, and count); a request that was given up keeps others waiting. Limits that are
//! exchanged hold for what waits already.
//!
//! Costs a request a lock of its group, and one that waits a timer if it is the next of its direction.

mod bucket;
mod queue;

use std::time::Duration;

use bytes::BytesMut;
use event_listener::Event;
use infill_base::{Ctx, Gather, IoResult, ThrottleLimits, WriteFlags, ZeroFlags};
use infill_storage::rt;
use infill_storage::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use infill_storage::sync::{Arc, Mutex, lock};

use self::bucket::Direction;
use self::queue::Queue;
use crate::edge::Through as _;
use crate::{Edge, Filter, NodeHandle};

/// How long the next one sleeps at most before it looks again (a rate of one byte a second makes others sleep for years).
const LOOK_TIME: Duration = Duration::from_secs(60);

/// A request that waits.
#[derive(Debug, Default)]
struct Ticket {
    released: AtomicBool,
    look: Event,
}

impl Ticket {
    fn release(&self) {
        self.released.store(true, Ordering::Release);
        self.look.notify(usize::MAX);
    }
}

/// Stands for a request in the queue; the same one only if it is the same ticket.
#[derive(Clone, Debug)]
struct Who(Arc<Ticket>);

impl PartialEq for Who {
    fn eq(&self, other: &Who) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Limits that several disks share (`throttle-group`).
#[derive(Debug, Default)]
pub struct ThrottleGroup {
    queue: Mutex<Queue<Who>>,
    members: AtomicU64,
}

impl ThrottleGroup {
    /// A group without members. The limits make sense ([`ThrottleLimits::check`]).
    pub fn new(limits: ThrottleLimits) -> ThrottleGroup {
        let group = ThrottleGroup::default();
        group.set_limits(limits);
        group
    }

    /// What holds now.
    pub fn limits(&self) -> ThrottleLimits {
        *lock(&self.queue).limits()
    }

    /// Other limits hold from now on, for what waits too. The limits make sense.
    pub fn set_limits(&self, limits: ThrottleLimits) {
        let mut queue = lock(&self.queue);
        queue.set_limits(limits, rt::now());
        wake_heads(&queue, None);
    }

    /// Lets go on what may, and tells how long `me`, which goes in `direction`, should sleep if it is the next one.
    fn look(&self, me: &Who, direction: Direction) -> Option<Duration> {
        let (mut queue, now) = (lock(&self.queue), rt::now());
        for who in queue.poll(now) {
            who.0.release();
        }
        wake_heads(&queue, Some(me));
        let is_next = queue.head(direction).is_some_and(|head| head == me);
        is_next.then(|| queue.wait(direction, now).min(LOOK_TIME))
    }
}

/// Whoever is next sleeps until it is its turn: it has to know that it is.
fn wake_heads(queue: &Queue<Who>, but: Option<&Who>) {
    for head in Direction::ALL.into_iter().filter_map(|direction| queue.head(direction)) {
        if but != Some(head) {
            head.0.look.notify(usize::MAX);
        }
    }
}

/// Takes a request out of its queue if it is given up.
struct Waiting<'a> {
    node: &'a ThrottleNode,
    direction: Direction,
    who: Who,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.who.0.released.load(Ordering::Acquire) {
            return;
        }
        let mut queue = lock(&self.node.group.queue);
        queue.withdraw(self.node.member, self.direction, &self.who);
        wake_heads(&queue, None);
    }
}

/// Passes everything on to one node, no faster than its group may.
#[derive(Debug)]
pub struct ThrottleNode {
    below: Edge,
    group: Arc<ThrottleGroup>,
    member: u64,
    /// How many want nothing to wait now.
    drained: AtomicUsize,
}

impl ThrottleNode {
    /// Over `below`, as a member of `group`.
    pub fn new(below: NodeHandle, group: Arc<ThrottleGroup>) -> ThrottleNode {
        let member = group.members.fetch_add(1, Ordering::Relaxed);
        ThrottleNode { below: Edge::new(below), group, member, drained: AtomicUsize::new(0) }
    }

    /// Waits until a request of `bytes` may go on.
    async fn admit(&self, direction: Direction, bytes: u64) {
        let who = Who(Arc::default());
        {
            // Under the lock: a drain that begins meanwhile finds it in the queue, or is seen here.
            let mut queue = lock(&self.group.queue);
            queue.push(self.member, direction, bytes, who.clone());
            if self.drained.load(Ordering::SeqCst) > 0 {
                release_all(&mut queue, self.member);
                return;
            }
        }
        let waiting = Waiting { node: self, direction, who };
        let who = &waiting.who;
        loop {
            let looks = who.0.look.listen();
            let sleep = self.group.look(who, direction);
            if who.0.released.load(Ordering::Acquire) {
                return;
            }
            match sleep {
                Some(sleep) => drop(rt::timeout(sleep, looks).await),
                None => looks.await,
            }
        }
    }

    fn drain(&self) {
        self.drained.fetch_add(1, Ordering::SeqCst);
        release_all(&mut lock(&self.group.queue), self.member);
    }
}

fn release_all(queue: &mut Queue<Who>, member: u64) {
    for who in queue.drain(member, rt::now()) {
        who.0.release();
    }
    wake_heads(queue, None);
}

impl Filter for ThrottleNode {
    const DRIVER: &'static str = "throttle";

    fn below(&self) -> &Edge {
        &self.below
    }

    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        self.admit(Direction::Read, buf.len() as u64).await;
        self.below.read(cx, at, buf).await
    }

    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        self.admit(Direction::Write, data.len() as u64).await;
        self.below.write(cx, at, data, flags).await
    }

    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.admit(Direction::Write, len).await;
        self.below.write_zeroes(cx, at, len, flags).await
    }

    async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.admit(Direction::Write, len).await;
        self.below.discard(cx, at, len).await
    }

    fn held(&self, begins: bool) {
        match begins {
            true => self.drain(),
            false => drop(self.drained.fetch_sub(1, Ordering::SeqCst)),
        }
    }

    async fn close(&self, _cx: &Ctx) -> IoResult<()> {
        self.drain();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
