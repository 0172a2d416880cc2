//! Reactors: one thread, one ring, its own tasks.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use compio::runtime::Runtime as Ring;
use event_listener::Event;
use futures_util::future::LocalBoxFuture;
use infill_storage::rt;
use infill_storage::sync::{Mutex, lock};

/// Most reactors that one process starts.
const MAX_REACTORS: usize = 64;
/// Stack of a reactor's thread, in bytes. A request takes some for each layer of a backing chain; what is not touched
/// costs no memory.
const STACK_BYTES: usize = 8 << 20;

/// A task on its way to a reactor: made there, because futures do not travel between threads.
type Job = Box<dyn FnOnce() -> LocalBoxFuture<'static, ()> + Send>;

#[derive(Default)]
struct Inbox {
    jobs: Mutex<Queue>,
    arrived: Event,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Job>,
    closed: bool,
}

impl Inbox {
    /// The next job, or `None` once it is closed.
    async fn next(&self) -> Option<Job> {
        loop {
            let arrived = self.arrived.listen();
            {
                let mut queue = lock(&self.jobs);
                if queue.closed {
                    return None;
                }
                if let Some(job) = queue.waiting.pop_front() {
                    return Some(job);
                }
            }
            arrived.await;
        }
    }
}

/// One reactor, from any thread.
#[derive(Clone)]
pub struct Reactor(Arc<Inbox>);

impl Reactor {
    /// Runs the future that `make` makes there, until it is done. Dropped without a trace if the reactor has ended.
    pub fn spawn<F>(&self, make: impl FnOnce() -> F + Send + 'static)
    where
        F: Future<Output = ()> + 'static,
    {
        let job: Job = Box::new(move || Box::pin(make()));
        let mut queue = lock(&self.0.jobs);
        if !queue.closed {
            queue.waiting.push_back(job);
        }
        drop(queue);
        self.0.arrived.notify(usize::MAX);
    }
}

/// The reactors of a process. They end, with all their tasks, when this is dropped.
pub struct Reactors {
    inboxes: Vec<Reactor>,
    threads: Vec<JoinHandle<()>>,
}

impl Reactors {
    /// Starts `count` reactors (at least 1, at most 64).
    pub fn start(count: usize) -> io::Result<Reactors> {
        let mut reactors = Reactors { inboxes: Vec::new(), threads: Vec::new() };
        for index in 0..count.clamp(1, MAX_REACTORS) {
            let inbox = Arc::new(Inbox::default());
            reactors.inboxes.push(Reactor(inbox.clone()));
            let (started, report) = mpsc::channel();
            let thread = std::thread::Builder::new()
                .name(format!("reactor-{index}"))
                .stack_size(STACK_BYTES)
                .spawn(move || run(&inbox, &started))?;
            reactors.threads.push(thread);
            report.recv().map_err(|_| io::Error::other("a reactor ended before it had begun"))??;
        }
        Ok(reactors)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.inboxes.len()
    }

    /// Reactor `index`, counted round.
    pub fn on(&self, index: usize) -> Reactor {
        self.inboxes[index % self.inboxes.len()].clone()
    }

    /// All of them.
    pub fn all(&self) -> Vec<Reactor> {
        self.inboxes.clone()
    }

    /// Runs the future that `make` makes on reactor 0, and waits for its output. Not to be called on a reactor.
    ///
    /// # Panics
    /// If the future panicked.
    pub fn block_on<F, T>(&self, make: impl FnOnce() -> F + Send + 'static) -> T
    where
        F: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let (sender, receiver) = mpsc::channel();
        self.on(0).spawn(move || async move {
            let _ = sender.send(make().await);
        });
        receiver.recv().expect("the task ended without its output: it panicked")
    }
}

impl Drop for Reactors {
    fn drop(&mut self) {
        for Reactor(inbox) in &self.inboxes {
            lock(&inbox.jobs).closed = true;
            inbox.arrived.notify(usize::MAX);
        }
        for thread in self.threads.drain(..) {
            // Dropped on a reactor: that one cannot wait for itself.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

/// The thread of one reactor.
fn run(inbox: &Inbox, started: &mpsc::Sender<io::Result<()>>) {
    let ring = match Ring::new() {
        Ok(ring) => ring,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let _entered = rt::enter(Rc::new(OnRing));
    let _ = started.send(Ok(()));
    ring.block_on(async {
        while let Some(job) = inbox.next().await {
            compio::runtime::spawn(job()).detach();
        }
    });
}

/// `infill_storage::rt` on a ring.
struct OnRing;

impl rt::Runtime for OnRing {
    fn spawn(&self, task: LocalBoxFuture<'static, ()>) {
        compio::runtime::spawn(task).detach();
    }

    fn sleep(&self, duration: Duration) -> LocalBoxFuture<'static, ()> {
        Box::pin(compio::time::sleep(duration))
    }

    fn now(&self) -> Duration {
        // One origin for all reactors: nodes that several of them share compare times.
        static ORIGIN: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
        ORIGIN.elapsed()
    }

    fn offload(&self, work: Box<dyn FnOnce() + Send>) -> LocalBoxFuture<'static, ()> {
        let done = compio::runtime::spawn_blocking(work);
        Box::pin(async move {
            // An error is a panic of the work, which is told to the waiter as none having come to its end.
            let _ = done.await;
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_sleeps_offloads_and_answers() {
        let reactors = Reactors::start(2).unwrap();
        let value = reactors.block_on(|| async {
            let before = rt::now();
            rt::sleep(Duration::from_millis(2)).await;
            assert!(rt::now() - before >= Duration::from_millis(2));
            rt::offload(|| 41).await.unwrap() + 1
        });
        assert_eq!(value, 42);
    }

    #[test]
    fn work_that_panics_is_an_error_and_its_reactor_lives_on() {
        let reactors = Reactors::start(1).unwrap();
        let values = reactors.block_on(|| async {
            let beside = rt::offload(|| 1);
            let failed = rt::offload(|| -> u32 { panic!("a planted mistake") }).await;
            (failed.unwrap_err().to_string(), beside.await, rt::offload(|| 2).await)
        });
        let (why, beside, after) = values;
        assert!(why.contains("a planted mistake"), "{why}");
        assert_eq!((beside, after), (Ok(1), Ok(2)));
    }

    #[test]
    fn a_job_runs_on_the_reactor_it_was_given_to() {
        let reactors = Reactors::start(2).unwrap();
        let (sender, receiver) = mpsc::channel();
        for index in 0..2 {
            let sender = sender.clone();
            reactors.on(index).spawn(move || async move {
                let _ = sender.send(std::thread::current().name().map(str::to_owned));
            });
        }
        let mut names: Vec<_> = (0..2).map(|_| receiver.recv().unwrap().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["reactor-0", "reactor-1"]);
    }

    #[test]
    fn a_task_that_never_ends_does_not_keep_the_reactors_alive() {
        let reactors = Reactors::start(1).unwrap();
        reactors.on(0).spawn(std::future::pending::<()>);
        drop(reactors);
    }
}
