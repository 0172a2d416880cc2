//! A byte stream in memory: both ends of a connection, on one thread.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use bytes::{BufMut, BytesMut};
use futures_util::future::LocalBoxFuture;
use infill_base::{ErrorKind, Gather, IoError, IoResult};
use infill_storage::stream::{Connection, StreamRead, StreamWrite};

use crate::Rng;

/// Two ends of a connection. Each direction holds at most `capacity` bytes that were sent and not received; a sender
/// waits for room. Dropping an end closes both its directions: the other end reads what is left, then the end of the
/// stream, and can send no more.
pub fn pipe(capacity: usize) -> (Connection, Connection) {
    ends(capacity, None)
}

/// As [`pipe`], but a receive gives a random number of the bytes that are there: messages arrive in pieces.
pub fn torn_pipe(capacity: usize, rng: Rng) -> (Connection, Connection) {
    ends(capacity, Some(rng))
}

fn ends(capacity: usize, mut rng: Option<Rng>) -> (Connection, Connection) {
    assert!(capacity > 0, "a pipe that holds nothing passes nothing on");
    let mut channel = || {
        let state = State { capacity, rng: rng.as_mut().map(Rng::fork), ..State::default() };
        Rc::new(RefCell::new(state))
    };
    let (there, back) = (channel(), channel());
    let end = |reader: &Channel, writer: &Channel| Connection {
        reader: Box::new(Reader(reader.clone())),
        writer: Box::new(Writer(writer.clone())),
        peer: "the other end of a pipe".into(),
    };
    (end(&back, &there), end(&there, &back))
}

type Channel = Rc<RefCell<State>>;

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    capacity: usize,
    rng: Option<Rng>,
    reader_gone: bool,
    writer_gone: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl State {
    fn wake(&mut self) {
        self.reader.take().into_iter().chain(self.writer.take()).for_each(Waker::wake);
    }
}

struct Reader(Channel);

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.0.borrow_mut();
        state.reader_gone = true;
        state.wake();
    }
}

impl StreamRead for Reader {
    fn read(&mut self, mut buf: BytesMut) -> LocalBoxFuture<'_, IoResult<BytesMut>> {
        Box::pin(async move {
            let spare = buf.capacity() - buf.len();
            assert!(spare > 0, "nowhere to receive to");
            poll_fn(|cx| {
                let mut state = self.0.borrow_mut();
                let ready = state.bytes.len().min(spare);
                if ready == 0 {
                    if state.writer_gone {
                        return Poll::Ready(());
                    }
                    state.reader = Some(cx.waker().clone());
                    return Poll::Pending;
                }
                let take = match &mut state.rng {
                    Some(rng) => 1 + rng.index(ready),
                    None => ready,
                };
                state.bytes.drain(..take).for_each(|byte| buf.put_u8(byte));
                state.wake();
                Poll::Ready(())
            })
            .await;
            Ok(buf)
        })
    }
}

struct Writer(Channel);

impl Drop for Writer {
    fn drop(&mut self) {
        self.close();
    }
}

impl Writer {
    fn close(&self) {
        let mut state = self.0.borrow_mut();
        state.writer_gone = true;
        state.wake();
    }
}

impl StreamWrite for Writer {
    fn write_all(&mut self, data: Gather) -> LocalBoxFuture<'_, IoResult<()>> {
        Box::pin(async move {
            for run in data.runs() {
                let mut left = &run[..];
                poll_fn(|cx| {
                    let mut state = self.0.borrow_mut();
                    if state.reader_gone || state.writer_gone {
                        let why = "the other end of the pipe is closed";
                        return Poll::Ready(Err(IoError::new(ErrorKind::Io, why)));
                    }
                    let (now, later) = left.split_at(left.len().min(state.capacity - state.bytes.len()));
                    state.bytes.extend(now);
                    left = later;
                    // Nothing was sent: whoever is woken (also this sender, polled before) would only look again.
                    if !now.is_empty() {
                        state.wake();
                    }
                    if left.is_empty() {
                        return Poll::Ready(Ok(()));
                    }
                    state.writer = Some(cx.waker().clone());
                    Poll::Pending
                })
                .await?;
            }
            Ok(())
        })
    }

    fn shutdown(&mut self) -> LocalBoxFuture<'_, IoResult<()>> {
        self.close();
        Box::pin(async { Ok(()) })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use infill_storage::rt;

    use super::*;
    use crate::block_on;

    async fn read_to_end(mut connection: Connection) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let piece = connection.reader.read(BytesMut::with_capacity(7)).await.unwrap();
            if piece.is_empty() {
                return all;
            }
            all.extend_from_slice(&piece);
        }
    }

    #[test]
    fn bytes_arrive_in_order_through_a_small_pipe_whole_or_torn() {
        let sent: Vec<u8> = (0..1000_u32).map(|n| n as u8).collect();
        for (mut here, there) in [pipe(3), torn_pipe(100, Rng::new(5))] {
            let expected = sent.clone();
            block_on(async {
                let data = Gather::from(sent.clone());
                rt::spawn(async move {
                    here.writer.write_all(data).await.unwrap();
                });
                assert_eq!(read_to_end(there).await, expected);
            });
        }
    }

    #[test]
    fn a_sender_that_waits_for_room_lets_the_clock_go_on() {
        block_on(async {
            let (mut here, mut there) = pipe(10);
            let send = here.writer.write_all(Gather::from(vec![0; 11]));
            assert!(rt::timeout(Duration::from_secs(1), send).await.is_none());
            assert_eq!(there.reader.read(BytesMut::with_capacity(100)).await.unwrap().len(), 10);
        });
    }

    #[test]
    fn a_closed_end_is_told_to_both_directions() {
        block_on(async {
            let (mut here, there) = pipe(10);
            drop(there);
            assert!(here.writer.write_all(Gather::from(vec![1])).await.is_err());
            assert!(here.reader.read(BytesMut::with_capacity(1)).await.unwrap().is_empty());
            let (mut here, there) = pipe(10);
            here.writer.write_all(Gather::from(vec![1, 2])).await.unwrap();
            here.writer.shutdown().await.unwrap();
            assert_eq!(read_to_end(there).await, [1, 2], "what was sent before the end is not lost");
        });
    }
}
