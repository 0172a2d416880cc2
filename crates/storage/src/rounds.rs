//! Rounds: one write-back of metadata at a time, shared by everybody who waits for one.
//!
//! * A FLUSH that arrives during round *k* is answered by round *k + 1* ([`Rounds::join`]): what was acknowledged before
//!   the call is in what that round copies. All who wait for one round share it, and all are told its failure.
//! * Between two rounds somebody may have an exclusive [`Turn`], for metadata that cannot change while copies of it are
//!   under way (a larger table, a header). Rounds and turns alternate where both are wanted, so neither starves.
//! * A round is a task of its own: it goes on when everybody who waited for it is gone.
//!
//! A round must wait for nothing that waits for a turn or a round.
//!
//! Costs: one short lock a call, one task a round.

use std::future::Future;

use event_listener::Event;
use infill_base::{ErrorKind, IoError, IoResult};

use crate::rt;
use crate::sync::{Arc, Mutex, lock};

/// The sequencer of one image. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub struct Rounds(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    /// A round or a turn is over, or somebody who waited went away.
    changed: Event,
}

#[derive(Debug, Default)]
struct State {
    /// A round runs, or somebody has the turn.
    busy: bool,
    turn_was_last: bool,
    /// The round that has not begun, and how many wait for it.
    next: Arc<Round>,
    round_waiting: usize,
    turns_waiting: usize,
}

#[derive(Debug, Default)]
struct Round(Mutex<Option<IoResult<()>>>);

/// No round runs while this lives.
#[derive(Debug)]
#[must_use]
pub struct Turn(Arc<Inner>);

impl Inner {
    /// Ends the round or turn that is under way.
    fn finish(&self, turn: bool) {
        {
            let mut state = lock(&self.state);
            state.busy = false;
            state.turn_was_last = turn;
        }
        self.changed.notify(usize::MAX);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.finish(true);
    }
}

/// A round that runs. Dropped before it has a result, the runtime has stopped it in the middle.
struct Running {
    inner: Arc<Inner>,
    round: Arc<Round>,
}

impl Drop for Running {
    fn drop(&mut self) {
        lock(&self.round.0).get_or_insert_with(|| {
            Err(IoError::new(
                ErrorKind::ShuttingDown,
                "the thread that wrote metadata stopped in the middle of it; what is stable is unknown",
            ))
        });
        self.inner.finish(false);
    }
}

/// One who waits; uncounted when it goes.
struct Waiting<'a> {
    inner: &'a Inner,
    /// `None`: waits for a turn.
    round: Option<&'a Arc<Round>>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        {
            let mut state = lock(&self.inner.state);
            match self.round {
                None => state.turns_waiting -= 1,
                // The count of a round that has begun was reset.
                Some(round) if Arc::ptr_eq(round, &state.next) => state.round_waiting -= 1,
                Some(_) => return,
            }
        }
        self.inner.changed.notify(usize::MAX);
    }
}

impl Rounds {
    /// A sequencer with nothing under way.
    pub fn new() -> Rounds {
        Rounds::default()
    }

    /// Waits for the end of a round that begins after this call, and gives its result. If nobody else begins it, it is
    /// begun here with `run`, as a task on this thread's runtime.
    pub async fn join<F>(&self, run: impl FnOnce() -> F) -> IoResult<()>
    where
        F: Future<Output = IoResult<()>> + 'static,
    {
        let inner = &*self.0;
        let round = {
            let mut state = lock(&inner.state);
            state.round_waiting += 1;
            state.next.clone()
        };
        let waiting = Waiting { inner, round: Some(&round) };
        loop {
            let changed = inner.changed.listen();
            if let Some(result) = &*lock(&round.0) {
                return result.clone();
            }
            if self.begin(&round) {
                break;
            }
            changed.await;
        }
        let running = Running { inner: self.0.clone(), round: round.clone() };
        let work = run();
        rt::spawn(async move {
            let result = work.await;
            *lock(&running.round.0) = Some(result);
        });
        drop(waiting);
        loop {
            let changed = inner.changed.listen();
            if let Some(result) = &*lock(&round.0) {
                return result.clone();
            }
            changed.await;
        }
    }

    /// Begins `round` if it is the next and nothing stands in its way.
    fn begin(&self, round: &Arc<Round>) -> bool {
        let mut state = lock(&self.0.state);
        let free = !state.busy && (state.turns_waiting == 0 || state.turn_was_last);
        if !free || !Arc::ptr_eq(round, &state.next) {
            return false;
        }
        state.busy = true;
        state.round_waiting = 0;
        state.next = Arc::default();
        true
    }

    /// Waits until no round runs, and keeps any from beginning until the turn is dropped.
    pub async fn turn(&self) -> Turn {
        let inner = &*self.0;
        lock(&inner.state).turns_waiting += 1;
        let _waiting = Waiting { inner, round: None };
        loop {
            let changed = inner.changed.listen();
            {
                let mut state = lock(&inner.state);
                if !state.busy && (state.round_waiting == 0 || !state.turn_was_last) {
                    state.busy = true;
                    return Turn(self.0.clone());
                }
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::future::poll_fn;
    use std::rc::Rc;
    use std::task::{Poll, Waker};

    use futures_util::FutureExt;
    use futures_util::future::{LocalBoxFuture, join_all};

    use super::*;

    /// Runs spawned tasks when it is told to.
    #[derive(Clone, Default)]
    struct Manual(Rc<RefCell<Vec<LocalBoxFuture<'static, ()>>>>);

    impl rt::Runtime for Manual {
        fn spawn(&self, task: LocalBoxFuture<'static, ()>) {
            self.0.borrow_mut().push(task);
        }
        fn sleep(&self, _: std::time::Duration) -> LocalBoxFuture<'static, ()> {
            unreachable!("rounds do not sleep")
        }
        fn now(&self) -> std::time::Duration {
            std::time::Duration::ZERO
        }
    }

    impl Manual {
        fn poll(&self) {
            let tasks = std::mem::take(&mut *self.0.borrow_mut());
            let mut cx = std::task::Context::from_waker(Waker::noop());
            for mut task in tasks {
                if task.as_mut().poll(&mut cx).is_pending() {
                    self.0.borrow_mut().push(task);
                }
            }
        }
    }

    /// A round that ends when it is told how.
    #[derive(Clone, Default)]
    struct Gate(Rc<RefCell<Option<IoResult<()>>>>);

    impl Gate {
        fn wait(&self) -> impl Future<Output = IoResult<()>> + 'static {
            let gate = self.0.clone();
            poll_fn(move |_| gate.borrow_mut().take().map_or(Poll::Pending, Poll::Ready))
        }
    }

    #[test]
    fn a_flush_that_arrives_during_a_round_is_answered_by_the_next_and_all_share_it() {
        let (manual, rounds, gate) = (Manual::default(), Rounds::new(), Gate::default());
        let _entered = rt::enter(Rc::new(manual.clone()));
        let begun = RefCell::new(0);
        let join = || {
            rounds.join(|| {
                *begun.borrow_mut() += 1;
                gate.wait()
            })
        };
        let mut first = Box::pin(join());
        assert!(first.as_mut().now_or_never().is_none());
        let mut late = Box::pin(join_all((0..3).map(|_| join())));
        assert!(late.as_mut().now_or_never().is_none());
        *gate.0.borrow_mut() = Some(Ok(()));
        manual.poll();
        assert!(first.now_or_never().unwrap().is_ok());
        assert!(late.as_mut().now_or_never().is_none());
        *gate.0.borrow_mut() = Some(Err(IoError::new(ErrorKind::NoSpace, "full")));
        manual.poll();
        let results = late.now_or_never().unwrap();
        assert!(results.iter().all(|result| result.as_ref().is_err_and(|e| e.kind() == ErrorKind::NoSpace)));
        assert_eq!(*begun.borrow(), 2);
    }

    #[test]
    fn a_round_goes_on_when_who_began_it_is_gone_and_a_stopped_one_is_told() {
        let (manual, rounds, gate) = (Manual::default(), Rounds::new(), Gate::default());
        let _entered = rt::enter(Rc::new(manual.clone()));
        let mut first = Box::pin(rounds.join(|| gate.wait()));
        assert!(first.as_mut().now_or_never().is_none());
        drop(first);
        let mut turn = Box::pin(rounds.turn());
        assert!(turn.as_mut().now_or_never().is_none());
        *gate.0.borrow_mut() = Some(Ok(()));
        manual.poll();
        drop(turn.now_or_never().unwrap());
        let mut second = Box::pin(rounds.join(|| gate.wait()));
        assert!(second.as_mut().now_or_never().is_none());
        manual.0.borrow_mut().clear();
        assert_eq!(second.now_or_never().unwrap().unwrap_err().kind(), ErrorKind::ShuttingDown);
    }

    #[test]
    fn turns_and_rounds_alternate_and_a_waiter_that_went_away_blocks_nobody() {
        let (manual, rounds, gate) = (Manual::default(), Rounds::new(), Gate::default());
        let _entered = rt::enter(Rc::new(manual.clone()));
        let turn = rounds.turn().now_or_never().unwrap();
        let mut round = Box::pin(rounds.join(|| gate.wait()));
        let mut second_turn = Box::pin(rounds.turn());
        assert!(round.as_mut().now_or_never().is_none());
        assert!(second_turn.as_mut().now_or_never().is_none());
        drop(turn);
        // The round's turn: it was a turn before.
        assert!(second_turn.as_mut().now_or_never().is_none());
        drop(round);
        assert!(second_turn.now_or_never().is_some());
    }
}
