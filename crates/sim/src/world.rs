//! The scheduler and the clock.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use infill_storage::rt::{self, Runtime};
use infill_storage::sync::{Mutex, lock};
use rustc_hash::FxHashMap;

use crate::Rng;

/// Polls without the clock moving after which a run counts as turning in circles.
const POLLS_PER_INSTANT_MAX: u64 = 5_000_000;

/// The future that [`World::run`] was called with.
const MAIN: u64 = 0;

/// A single-threaded executor with a virtual clock that decides everything by a seed.
///
/// Among the tasks that can run, one is chosen at random each time. When none can, the clock jumps to the next timer.
/// When there is no timer either, nothing can ever happen again: the run panics and names the seed.
pub struct World {
    inner: Rc<Inner>,
}

struct Inner {
    seed: u64,
    rng: RefCell<Rng>,
    tasks: RefCell<FxHashMap<u64, Task>>,
    next_task: Cell<u64>,
    ready: Arc<Ready>,
    timers: Rc<Timers>,
}

struct Task {
    future: LocalBoxFuture<'static, ()>,
    waker: Arc<TaskWaker>,
}

#[derive(Default)]
struct Ready(Mutex<Vec<Arc<TaskWaker>>>);

struct TaskWaker {
    id: u64,
    ready: Arc<Ready>,
    queued: AtomicBool,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            lock(&self.ready.0).push(self.clone());
        }
    }
}

#[derive(Default)]
struct Timers {
    now: Cell<Duration>,
    sequence: Cell<u64>,
    waiting: RefCell<BTreeMap<(Duration, u64), Waker>>,
}

struct Sleep {
    timers: Rc<Timers>,
    key: (Duration, u64),
}

impl Future for Sleep {
    type Output = ();
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.timers.now.get() >= self.key.0 {
            return Poll::Ready(());
        }
        self.timers.waiting.borrow_mut().insert(self.key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.timers.waiting.borrow_mut().remove(&self.key);
    }
}

impl Runtime for Inner {
    fn spawn(&self, task: LocalBoxFuture<'static, ()>) {
        let id = self.next_task.get();
        self.next_task.set(id + 1);
        let waker = self.waker(id);
        self.tasks.borrow_mut().insert(id, Task { future: task, waker: waker.clone() });
        waker.wake();
    }

    fn sleep(&self, duration: Duration) -> LocalBoxFuture<'static, ()> {
        let sequence = self.timers.sequence.get();
        self.timers.sequence.set(sequence + 1);
        let due = self.timers.now.get().saturating_add(duration);
        // A sleep of nothing still lets the others run.
        let due = due.max(self.timers.now.get() + Duration::from_nanos(1));
        Box::pin(Sleep { timers: self.timers.clone(), key: (due, sequence) })
    }

    fn now(&self) -> Duration {
        self.timers.now.get()
    }

    fn offload(&self, work: Box<dyn FnOnce() + Send>) -> LocalBoxFuture<'static, ()> {
        // The work takes a moment, as it would elsewhere: whoever offloads meets what happened in between.
        let moment = Duration::from_nanos(self.rng.borrow_mut().range(1, 50_000));
        let sleep = self.sleep(moment);
        Box::pin(async move {
            sleep.await;
            work();
        })
    }
}

impl Inner {
    fn waker(&self, id: u64) -> Arc<TaskWaker> {
        Arc::new(TaskWaker { id, ready: self.ready.clone(), queued: AtomicBool::new(false) })
    }

    /// One of those that can run, by chance.
    fn take_ready(&self) -> Option<Arc<TaskWaker>> {
        let mut ready = lock(&self.ready.0);
        if ready.is_empty() {
            return None;
        }
        let index = self.rng.borrow_mut().index(ready.len());
        Some(ready.swap_remove(index))
    }

    /// Lets the clock jump to the next timer; false where there is none.
    fn advance(&self) -> bool {
        let mut waiting = self.timers.waiting.borrow_mut();
        let Some(((due, _), _)) = waiting.first_key_value() else { return false };
        let due = *due;
        self.timers.now.set(due);
        let later = waiting.split_off(&(due + Duration::from_nanos(1), 0));
        let fired = std::mem::replace(&mut *waiting, later);
        drop(waiting);
        fired.into_values().for_each(Waker::wake);
        true
    }

    /// Polls a spawned task; the table is not borrowed meanwhile (the task may spawn).
    fn poll_task(&self, waker: &Arc<TaskWaker>) {
        let Some(mut task) = self.tasks.borrow_mut().remove(&waker.id) else { return };
        let handle = Waker::from(task.waker.clone());
        if task.future.as_mut().poll(&mut Context::from_waker(&handle)).is_pending() {
            self.tasks.borrow_mut().insert(waker.id, task);
        }
    }
}

impl World {
    /// The world that `seed` stands for, at time 0.
    pub fn new(seed: u64) -> World {
        World {
            inner: Rc::new(Inner {
                seed,
                rng: RefCell::new(Rng::new(seed)),
                tasks: RefCell::default(),
                next_task: Cell::new(MAIN + 1),
                ready: Arc::default(),
                timers: Rc::default(),
            }),
        }
    }

    /// Its seed.
    pub fn seed(&self) -> u64 {
        self.inner.seed
    }

    /// Random numbers that depend on nothing but the seed and what was drawn from the world before.
    pub fn fork_rng(&self) -> Rng {
        self.inner.rng.borrow_mut().fork()
    }

    /// Time since the world began.
    pub fn now(&self) -> Duration {
        self.inner.timers.now.get()
    }

    /// Tasks that were spawned and are not over.
    pub fn tasks_alive(&self) -> usize {
        self.inner.tasks.borrow().len()
    }

    /// Runs `future` to its end, and spawned tasks beside it. Those that are not over stay, and go on in the next run.
    ///
    /// # Panics
    /// With the seed, if nothing can ever happen again (deadlock), or if tasks wake each other without end.
    pub fn run<T>(&self, future: impl Future<Output = T>) -> T {
        let outcome = self.drive(future);
        outcome.unwrap_or_else(|| {
            panic!(
                "deadlock in the world of seed {}: the main task and {} others wait, and no timer is set",
                self.inner.seed,
                self.tasks_alive()
            )
        })
    }

    /// Runs all spawned tasks until they are over, or wait for what no timer will bring.
    pub fn run_until_idle(&self) {
        let _never: Option<()> = self.drive(std::future::pending());
    }

    fn drive<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let inner = &self.inner;
        let _entered = rt::enter(inner.clone());
        let mut future = pin!(future);
        let main = inner.waker(MAIN);
        main.clone().wake();
        let handle = Waker::from(main.clone());
        let mut polls = 0_u64;
        let outcome = loop {
            let Some(next) = inner.take_ready() else {
                if !inner.advance() {
                    break None;
                }
                polls = 0;
                continue;
            };
            polls += 1;
            assert!(
                polls < POLLS_PER_INSTANT_MAX,
                "livelock in the world of seed {}: {polls} polls and the clock stands still",
                inner.seed
            );
            next.queued.store(false, Ordering::Release);
            if next.id != MAIN {
                inner.poll_task(&next);
            } else if Arc::ptr_eq(&next, &main)
                && let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&handle))
            {
                break Some(output);
            }
        };
        // A waker of this run's main task that fires later must not wake the next run's.
        lock(&inner.ready.0).retain(|waker| waker.id != MAIN);
        outcome
    }
}

impl Drop for World {
    /// Everything that still runs ends in the middle, as a process does that is killed.
    fn drop(&mut self) {
        let _entered = rt::enter(self.inner.clone());
        loop {
            let tasks = std::mem::take(&mut *self.inner.tasks.borrow_mut());
            if tasks.is_empty() {
                break;
            }
            drop(tasks);
        }
    }
}

/// Runs `future` in a world of its own (seed 0).
///
/// # Panics
/// As [`World::run`].
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    World::new(0).run(future)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_jumps_and_order_follows_the_clock() {
        let world = World::new(3);
        let seen = Rc::new(RefCell::new(Vec::new()));
        world.run(async {
            for seconds in [30_u64, 10, 20] {
                let seen = seen.clone();
                rt::spawn(async move {
                    rt::sleep(Duration::from_secs(seconds)).await;
                    seen.borrow_mut().push(seconds);
                });
            }
            rt::sleep(Duration::from_secs(100)).await;
        });
        assert_eq!(*seen.borrow(), [10, 20, 30]);
        assert_eq!(world.now(), Duration::from_secs(100));
        assert_eq!(world.tasks_alive(), 0);
    }

    fn order_of(seed: u64) -> Vec<u64> {
        let world = World::new(seed);
        let seen = Rc::new(RefCell::new(Vec::new()));
        world.run(async {
            let tasks = (0..8).map(|id| {
                let seen = seen.clone();
                rt::detached(async move {
                    for _ in 0..3 {
                        seen.borrow_mut().push(id);
                        rt::sleep(Duration::ZERO).await;
                    }
                })
            });
            futures_util::future::join_all(tasks).await;
        });
        seen.take()
    }

    #[test]
    fn a_seed_decides_the_order_and_other_seeds_decide_otherwise() {
        assert_eq!(order_of(1), order_of(1));
        assert!((2..20).any(|seed| order_of(seed) != order_of(1)));
    }

    #[test]
    #[should_panic(expected = "deadlock in the world of seed 42")]
    fn a_deadlock_panics_with_the_seed() {
        World::new(42).run(std::future::pending::<()>());
    }

    #[test]
    fn a_dropped_sleep_keeps_no_timer_and_a_timeout_fires() {
        let world = World::new(0);
        let late = world.run(rt::timeout(Duration::from_secs(1), std::future::pending::<()>()));
        assert_eq!(late, None);
        assert_eq!(world.now(), Duration::from_secs(1));
        let early = world.run(rt::timeout(Duration::from_secs(9), async { 5 }));
        assert_eq!(early, Some(5));
        assert!(world.inner.timers.waiting.borrow().is_empty());
    }

    #[test]
    fn what_is_alive_when_the_world_ends_is_dropped() {
        let alive = Rc::new(());
        let world = World::new(0);
        let held = alive.clone();
        world.run(async move {
            rt::spawn(async move {
                std::future::pending::<()>().await;
                drop(held);
            });
        });
        assert_eq!(Rc::strong_count(&alive), 2);
        drop(world);
        assert_eq!(Rc::strong_count(&alive), 1);
    }

    #[test]
    fn tasks_go_on_in_the_next_run_and_offloaded_work_gives_its_result() {
        let world = World::new(0);
        let done = Rc::new(Cell::new(0));
        let counter = done.clone();
        world.run(async move {
            rt::spawn(async move {
                rt::sleep(Duration::from_millis(5)).await;
                counter.set(rt::offload(|| 6 * 7).await.unwrap());
            });
        });
        assert_eq!(done.get(), 0);
        world.run_until_idle();
        assert_eq!(done.get(), 42);
    }
}
