//! Fetches from one node by everybody who has it as backing: each range at most once at a time in a class (I4).
//!
//! * A request joins a flight of its own or a higher class that covers it (piece by piece).
//! * A request that meets only flights of a lower class asks for itself, for the bytes it wants; the first answer
//!   serves both, so nobody waits behind the bulk queue.
//! * A flight is joined only in the epoch it was begun in: what changes the content below raises the epoch (I3a).
//! * The leader does the I/O in its own task. When that task is dropped, a joiner takes over.

use std::pin::pin;

use bytes::{Bytes, BytesMut};
use event_listener::Event;
use futures_util::future::{Either, LocalBoxFuture, join_all, select};
use infill_base::{Class, Ctx, IoResult, align_down, align_up};
use infill_storage::sync::atomic::{AtomicU64, Ordering};
use infill_storage::sync::{Arc, Mutex, lock};

use crate::NodeHandle;

#[derive(Debug, Default)]
pub(crate) struct FetchTable {
    epoch: AtomicU64,
    flights: Mutex<Vec<Arc<Flight>>>,
}

#[derive(Debug)]
struct Flight {
    start: u64,
    end: u64,
    class: Class,
    epoch: u64,
    state: Mutex<State>,
    changed: Event,
}

#[derive(Debug)]
enum State {
    Fetching,
    Done(IoResult<Bytes>),
    /// The leader's task went away before it had an answer.
    Abandoned,
}

impl Flight {
    /// The bytes of `[start, end)`, once the flight has landed; `None` if its leader went away.
    async fn wait(&self, start: u64, end: u64) -> Option<IoResult<Bytes>> {
        loop {
            let changed = self.changed.listen();
            match &*lock(&self.state) {
                State::Fetching => {}
                State::Abandoned => return None,
                State::Done(result) => {
                    return Some(
                        result
                            .clone()
                            .map(|all| all.slice((start - self.start) as usize..(end - self.start) as usize)),
                    );
                }
            }
            changed.await;
        }
    }

    fn settle(&self, state: State) {
        {
            let mut now = lock(&self.state);
            if !matches!(*now, State::Fetching) {
                return;
            }
            *now = state;
        }
        self.changed.notify(usize::MAX);
    }
}

/// Takes the flight out of the table, however its leader ends.
struct Leading<'a> {
    table: &'a FetchTable,
    flight: Arc<Flight>,
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        lock(&self.table.flights).retain(|other| !Arc::ptr_eq(other, &self.flight));
        self.flight.settle(State::Abandoned);
    }
}

enum Piece {
    Join(Arc<Flight>, u64, u64),
    Lead(u64, u64),
}

impl FetchTable {
    /// Nothing that is in flight now is joined by whoever asks after this.
    pub(crate) fn raise(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }

    /// `len` bytes of `node` (whose table this is) from `at`. The range lies on the node.
    pub(crate) async fn fetch(&self, node: &NodeHandle, cx: &Ctx, at: u64, len: u64) -> IoResult<Bytes> {
        let limits = node.limits();
        let max = limits.max_transfer.max(u64::from(limits.request_align));
        if len <= max
            && let Some(Piece::Lead(start, end)) = self.only_piece(cx, at, at + len)
        {
            return self.lead(node, cx, start, end).await;
        }
        let mut pieces = Vec::new();
        let mut next = at;
        while next < at + len {
            let end = (at + len).min(next.saturating_add(max));
            let piece = self.piece(cx, next, end);
            let (Piece::Join(_, _, end) | Piece::Lead(_, end)) = piece;
            pieces.push(self.follow(node, cx, piece));
            next = end;
        }
        let mut whole = BytesMut::with_capacity(len as usize);
        for part in join_all(pieces).await {
            whole.extend_from_slice(&part?);
        }
        Ok(whole.freeze())
    }

    /// The range as one piece, if it can be had in one.
    fn only_piece(&self, cx: &Ctx, start: u64, end: u64) -> Option<Piece> {
        match self.piece(cx, start, end) {
            Piece::Lead(start, piece_end) if piece_end == end => Some(Piece::Lead(start, end)),
            _ => None,
        }
    }

    /// The first piece of the range: what one flight covers, or what none does.
    fn piece(&self, cx: &Ctx, start: u64, end: u64) -> Piece {
        let epoch = self.epoch.load(Ordering::Acquire);
        let mut lead_end = end;
        for flight in lock(&self.flights).iter() {
            if flight.class < cx.class
                || flight.epoch != epoch
                || flight.end <= start
                || flight.start >= lead_end
            {
                continue;
            }
            if flight.start <= start {
                return Piece::Join(flight.clone(), start, end.min(flight.end));
            }
            lead_end = flight.start;
        }
        Piece::Lead(start, lead_end)
    }

    fn follow<'a>(
        &'a self,
        node: &'a NodeHandle,
        cx: &'a Ctx,
        piece: Piece,
    ) -> LocalBoxFuture<'a, IoResult<Bytes>> {
        Box::pin(async move {
            match piece {
                Piece::Lead(start, end) => self.lead(node, cx, start, end).await,
                Piece::Join(flight, start, end) => match flight.wait(start, end).await {
                    Some(result) => result,
                    None => self.lead(node, cx, start, end).await,
                },
            }
        })
    }

    async fn lead(&self, node: &NodeHandle, cx: &Ctx, start: u64, end: u64) -> IoResult<Bytes> {
        let align = u64::from(node.limits().request_align);
        let (from, to) = (align_down(start, align), align_up(end, align));
        let flight = Arc::new(Flight {
            start: from,
            end: to,
            class: cx.class,
            epoch: self.epoch.load(Ordering::Acquire),
            state: Mutex::new(State::Fetching),
            changed: Event::new(),
        });
        lock(&self.flights).push(flight.clone());
        let leading = Leading { table: self, flight: flight.clone() };
        let own = pin!(node.read_vec(cx, from, (to - from) as usize));
        let result = match select(own, pin!(flight.wait(from, to))).await {
            Either::Left((result, _)) => result.map(BytesMut::freeze),
            // Somebody of a higher class asked for the same and was answered first.
            Either::Right((Some(result), own)) => match result {
                Ok(data) => Ok(data),
                Err(_) => own.await.map(BytesMut::freeze),
            },
            Either::Right((None, own)) => own.await.map(BytesMut::freeze),
        };
        flight.settle(State::Done(result.clone()));
        if let Ok(data) = &result {
            self.serve_lower(&flight, data);
        }
        drop(leading);
        result.map(|data| data.slice((start - from) as usize..(end - from) as usize))
    }

    /// Lands every flight that wants no more than what has just arrived.
    fn serve_lower(&self, landed: &Arc<Flight>, data: &Bytes) {
        let served: Vec<_> = lock(&self.flights)
            .iter()
            .filter(|other| {
                !Arc::ptr_eq(other, landed)
                    && other.epoch == landed.epoch
                    && other.start >= landed.start
                    && other.end <= landed.end
            })
            .cloned()
            .collect();
        for flight in served {
            let part =
                data.slice((flight.start - landed.start) as usize..(flight.end - landed.start) as usize);
            flight.settle(State::Done(Ok(part)));
        }
    }
}
