//! The client against bytes that nobody vouches for: an entry point for fuzzers and for tests by seed.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use bytes::BytesMut;
use futures_util::future::{LocalBoxFuture, join4};
use infill_base::{Ctx, ErrorKind, Gather, IoError, IoResult, WriteFlags};
use infill_storage::stream::{Connection, Connector, StreamRead, StreamWrite};
use infill_storage::sync::{Arc, Mutex, lock};
use infill_storage::{Storage, rt};

use super::{ClientOptions, NbdStorage, OnLost};

/// Most bytes that one connection sends.
const CONNECTION_BYTES: usize = 1 << 20;

/// A server that sends given bytes, whatever it is asked: `data`, cut into connections by its first bytes.
struct Bytes(Mutex<Vec<Vec<u8>>>);

impl Connector for Bytes {
    fn connect(&self) -> LocalBoxFuture<'_, IoResult<Connection>> {
        Box::pin(async {
            let next = lock(&self.0).pop();
            let bytes = next.ok_or_else(|| IoError::new(ErrorKind::SourceLost, "no more connections"))?;
            Ok(Connection {
                reader: Box::new(Reader(bytes.into())),
                writer: Box::new(Writer),
                peer: "the fuzzer".into(),
            })
        })
    }

    fn target(&self) -> String {
        "the fuzzer".into()
    }
}

struct Reader(bytes::Bytes);

impl StreamRead for Reader {
    fn read(&mut self, mut buf: BytesMut) -> LocalBoxFuture<'_, IoResult<BytesMut>> {
        Box::pin(async move {
            // Requests are sent before anything is received: their answers may be among the bytes.
            rt::sleep(Duration::from_micros(1)).await;
            let take = self.0.len().min(buf.capacity() - buf.len());
            buf.extend_from_slice(&self.0.split_to(take));
            Ok(buf)
        })
    }
}

struct Writer;

impl StreamWrite for Writer {
    fn write_all(&mut self, _data: Gather) -> LocalBoxFuture<'_, IoResult<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn shutdown(&mut self) -> LocalBoxFuture<'_, IoResult<()>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// Uses an export of a server that sends `data`, in a world of its own.
///
/// The first byte chooses how the export is used, the second how many connections the rest is cut into.
///
/// # Panics
/// If the client breaks its word: an answer of another length, an extent outside of what was asked, a request that is
/// neither answered nor failed within its deadline.
pub fn fuzz_client(data: &[u8]) {
    let clock = Rc::new(Clock::default());
    let _entered = rt::enter(clock.clone());
    let data = data.to_vec();
    clock.tasks.borrow_mut().push(Box::pin(async move { attack(&data).await }));
    clock.run();
}

/// Polls without the clock moving after which the client counts as turning in circles.
const POLLS_MAX: u32 = 1_000_000;

/// A runtime whose clock jumps to the next timer when nothing else is left to do.
#[derive(Default)]
struct Clock {
    now: Cell<Duration>,
    tasks: RefCell<Vec<LocalBoxFuture<'static, ()>>>,
    timers: Rc<RefCell<BTreeMap<(Duration, u64), Waker>>>,
    timer: Cell<u64>,
}

struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

impl Clock {
    /// Runs every task to its end, or until nothing can happen any more.
    fn run(&self) {
        let woken = Arc::new(Woken(AtomicBool::new(true)));
        let waker = Waker::from(woken.clone());
        let mut polls = 0;
        loop {
            while woken.0.swap(false, Ordering::AcqRel) {
                polls += 1;
                assert!(polls < POLLS_MAX, "the client turns in circles");
                let mut tasks = std::mem::take(&mut *self.tasks.borrow_mut());
                tasks.retain_mut(|task| task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
                let mut begun = self.tasks.borrow_mut();
                // A task that was begun meanwhile was not polled yet.
                woken.0.fetch_or(!begun.is_empty(), Ordering::AcqRel);
                begun.extend(tasks);
            }
            let next = self.timers.borrow_mut().pop_first();
            let Some(((due, _), timer)) = next else { break };
            self.now.set(due);
            polls = 0;
            timer.wake();
        }
        assert!(self.tasks.borrow().is_empty(), "a task is left over and waits for nothing");
    }
}

impl rt::Runtime for Clock {
    fn spawn(&self, task: LocalBoxFuture<'static, ()>) {
        self.tasks.borrow_mut().push(task);
    }

    fn sleep(&self, duration: Duration) -> LocalBoxFuture<'static, ()> {
        let number = self.timer.get();
        self.timer.set(number + 1);
        let key = (self.now.get() + duration.max(Duration::from_nanos(1)), number);
        let timer = Timer { timers: self.timers.clone(), key };
        let mut set = false;
        Box::pin(poll_fn(move |cx| {
            let mut timers = timer.timers.borrow_mut();
            if set && !timers.contains_key(&timer.key) {
                return Poll::Ready(());
            }
            set = true;
            timers.insert(timer.key, cx.waker().clone());
            Poll::Pending
        }))
    }

    fn now(&self) -> Duration {
        self.now.get()
    }
}

/// Takes its timer back when it is dropped.
struct Timer {
    timers: Rc<RefCell<BTreeMap<(Duration, u64), Waker>>>,
    key: (Duration, u64),
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.timers.borrow_mut().remove(&self.key);
    }
}

/// As [`fuzz_client`], on the runtime of the caller.
pub(super) async fn attack(data: &[u8]) {
    let [how, cut, rest @ ..] = data else { return };
    let size = (rest.len() / (1 + usize::from(cut % 4))).clamp(1, CONNECTION_BYTES);
    let connections: Vec<Vec<u8>> = rest.chunks(size).take(8).map(<[u8]>::to_vec).rev().collect();
    let options = ClientOptions {
        read_only: how & 1 != 0,
        on_lost: if how & 2 != 0 {
            OnLost::Fail
        } else {
            OnLost::Hold { limit: Some(Duration::from_secs(5)) }
        },
        unsynced_bytes_max: 1 << 16,
        ..ClientOptions::default()
    };
    let connector = Arc::new(Bytes(Mutex::new(connections)));
    let Ok(storage) = NbdStorage::connect(connector, options).await else { return };
    let limits = storage.limits();
    let align = u64::from(limits.request_align);
    let len = storage.len().min(4096.max(align)) / align * align;
    if len == 0 {
        return;
    }
    let limit = Duration::from_secs(600);
    let cx = Ctx { deadline: Some(rt::now() + limit), ..Ctx::GUEST };
    let at = storage.len() - len;
    let reads = async {
        if let Ok(read) = storage.read(&cx, at, BytesMut::zeroed(len as usize)).await {
            assert_eq!(read.len() as u64, len, "an answer of another length");
        }
    };
    let extents = async {
        if let Ok(extents) = storage.extents(&cx, 0, len).await {
            let mut next = 0;
            for extent in extents {
                assert!(extent.start == next && extent.len > 0, "extents leave a gap");
                next = extent.end();
            }
            assert!(next > 0 && next <= len, "extents outside of what was asked");
        }
    };
    let write = async {
        if storage.write(&cx, 0, vec![1; len as usize].into(), WriteFlags::empty()).await.is_ok() {
            assert!(limits.writable, "a write through a read-only storage");
        }
    };
    let sync = async {
        let _ = storage.sync(&cx).await;
    };
    let all = rt::timeout(limit * 2, join4(reads, extents, write, sync)).await;
    assert!(all.is_some(), "a request outlives its deadline");
}
