//! The seam to the runtime: spawn, sleep, now.
//!
//! A thread that runs Infill's tasks has one [`Runtime`] installed: a reactor of `infill-io`, or the simulated world of
//! `infill-sim`. No crate above this seam knows which.

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{Either, LocalBoxFuture, select};
use infill_base::{ErrorKind, IoError};

/// What a thread's runtime can do.
pub trait Runtime {
    /// Runs `task` on this thread until it is done.
    fn spawn(&self, task: LocalBoxFuture<'static, ()>);
    /// Completes after `duration`.
    fn sleep(&self, duration: Duration) -> LocalBoxFuture<'static, ()>;
    /// Time since some fixed instant of the process; never goes back.
    fn now(&self) -> Duration;
    /// Runs `work`, which computes or blocks for long, where it disturbs no reactor. The default runs it in place
    /// (a simulated world has no other thread).
    fn offload(&self, work: Box<dyn FnOnce() + Send>) -> LocalBoxFuture<'static, ()> {
        work();
        Box::pin(std::future::ready(()))
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<dyn Runtime>>> = const { RefCell::new(None) };
}

/// Restores the runtime that was installed before.
#[must_use]
pub struct Entered(Option<Rc<dyn Runtime>>);

impl Drop for Entered {
    fn drop(&mut self) {
        let previous = self.0.take();
        CURRENT.with(|current| *current.borrow_mut() = previous);
    }
}

/// Installs `runtime` on this thread until the guard goes.
pub fn enter(runtime: Rc<dyn Runtime>) -> Entered {
    Entered(CURRENT.with(|current| current.borrow_mut().replace(runtime)))
}

/// This thread's runtime.
///
/// # Panics
/// On a thread without one: a mistake of the program, not of its input.
fn current() -> Rc<dyn Runtime> {
    CURRENT
        .with(|current| current.borrow().clone())
        .expect("no runtime on this thread: call it from a reactor")
}

/// Runs `task` on this thread's runtime until it is done.
pub fn spawn(task: impl Future<Output = ()> + 'static) {
    current().spawn(Box::pin(task));
}

/// Completes after `duration`.
pub async fn sleep(duration: Duration) {
    let sleep = current().sleep(duration);
    sleep.await;
}

/// Time since some fixed instant of the process; never goes back.
pub fn now() -> Duration {
    current().now()
}

/// As [`now`] for whoever only measures: nothing ever takes time on a thread without a runtime.
pub fn clock() -> Duration {
    CURRENT.with(|current| current.borrow().as_ref().map_or(Duration::ZERO, |runtime| runtime.now()))
}

/// Work that was offloaded panicked: a mistake of the program, which its operation is told of. Whoever else is on the reactor
/// goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Panicked {
    said: String,
}

impl fmt::Display for Panicked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = &self.said;
        write!(f, "a mistake of this program: work on a helper thread panicked ({said}); please report it")
    }
}

impl std::error::Error for Panicked {}

/// Most of what a panic says that is told, in characters.
const SAID_CHARS_MAX: usize = 200;

impl Panicked {
    fn of(payload: &(dyn Any + Send)) -> Panicked {
        let said = payload.downcast_ref::<&str>().copied();
        let said = said.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        Panicked { said: said.unwrap_or("it does not say why").chars().take(SAID_CHARS_MAX).collect() }
    }
}

impl From<Panicked> for IoError {
    fn from(panicked: Panicked) -> IoError {
        IoError::new(ErrorKind::Io, panicked.to_string())
    }
}

/// Runs `work`, which computes or blocks for long, off the reactor, and gives its result. Where it panics, that is an error:
/// what it shares with others is behind locks whose content is valid at any moment ([`crate::sync::lock`]).
pub async fn offload<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Panicked> {
    let result = std::sync::Arc::new(crate::sync::Mutex::new(None));
    let slot = result.clone();
    let done = current().offload(Box::new(move || {
        let value = catch_unwind(AssertUnwindSafe(work));
        *crate::sync::lock(&slot) = Some(value.map_err(|payload| Panicked::of(payload.as_ref())));
    }));
    done.await;
    let value = crate::sync::lock(&result).take();
    value.unwrap_or_else(|| Err(Panicked { said: "it did not run".into() }))
}

/// `future`'s output, or `None` if `duration` passed first. The future is dropped then: what it had started goes on.
pub async fn timeout<T>(duration: Duration, future: impl Future<Output = T>) -> Option<T> {
    match select(pin!(future), pin!(sleep(duration))).await {
        Either::Left((output, _)) => Some(output),
        Either::Right(((), _)) => None,
    }
}

/// Runs `future` as a task of its own and waits for it: it goes on when the waiter is dropped.
pub async fn detached<T: 'static>(future: impl Future<Output = T> + 'static) -> T {
    let (sender, receiver) = oneshot::channel();
    spawn(async move { sender.send(future.await) });
    receiver.await
}

/// A single-threaded one-shot: all of it stays on one reactor.
mod oneshot {
    use std::cell::RefCell;
    use std::future::poll_fn;
    use std::rc::Rc;
    use std::task::{Poll, Waker};

    struct Slot<T> {
        value: Option<T>,
        waker: Option<Waker>,
    }

    pub struct Sender<T>(Rc<RefCell<Slot<T>>>);

    pub fn channel<T>() -> (Sender<T>, impl Future<Output = T>) {
        let slot = Rc::new(RefCell::new(Slot { value: None, waker: None }));
        let receiver = slot.clone();
        let wait = poll_fn(move |cx| {
            let mut slot = receiver.borrow_mut();
            match slot.value.take() {
                Some(value) => Poll::Ready(value),
                None => {
                    slot.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        });
        (Sender(slot), wait)
    }

    impl<T> Sender<T> {
        pub fn send(self, value: T) {
            let mut slot = self.0.borrow_mut();
            slot.value = Some(value);
            if let Some(waker) = slot.waker.take() {
                waker.wake();
            }
        }
    }
}
