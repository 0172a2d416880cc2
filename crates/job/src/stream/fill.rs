//! The fill: many small requests in flight, under control, from one task.
//!
//! A *run* is what the walk found, a *block* is what is linked at once (whole units), a *request* is what is asked for
//! at once; a block larger than a request is gathered first. Requests are dropped when the job pauses or is cancelled
//! (their bytes are asked for again), local writes are always waited for: so both are prompt, also when the source hangs.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::{Fuse, LocalBoxFuture};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt, select_biased};
use infill_base::{Ctx, ErrorKind, IoError, IoResult, align_down, align_up};
use infill_node::generic::{FillPiece, StreamCursor};
use infill_node::{Fetched, LatencyKind, NodeHandle, Populated};
use infill_storage::rt;

use crate::control::{Control, LINK_BYTES_MAX, REQUEST_BYTES_MAX, REQUEST_BYTES_MIN, Seen, TICK};
use crate::job::Job;
use crate::rate::Pace;
use crate::state::{ErrorAction, OnError, Operation};

/// Bytes that the fill holds in memory: asked for, being gathered and being written.
const HELD_BYTES_MAX: u64 = 64 << 20;
/// Bytes of a run of zeroes that are linked at once.
const ZERO_BYTES_MAX: u64 = 16 << 20;
/// How many requests fill the window of a near source. What they bring is written while the next ones are under way.
const NEAR_REQUESTS: u64 = 2;
/// Bytes that are looked at before they are asked for: what guests wrote or fetched since the walk came by is not asked for.
const LOOK_BYTES: u64 = 1 << 20;
/// Runs that were looked at and are not asked for yet. So many that a distant source has said what comes next when they end.
const RUNS_AHEAD: usize = 16;
/// How long a look holds. A source that is away, or slow, leaves guests time to write what was looked at.
const LOOK_AGE: Duration = Duration::from_secs(1);
/// How often the fill's metadata have a round of their own.
const SYNC_INTERVAL: Duration = Duration::from_secs(1);
/// How often progress is told.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Reads that fail in a row, before `on-error` decides.
const READ_RETRIES_MAX: u32 = 3;
/// First and longest wait before a source is asked again.
const RETRY_WAIT_MIN: Duration = Duration::from_millis(50);
const RETRY_WAIT_MAX: Duration = Duration::from_secs(5);

/// How a fill behaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct FillPolicy {
    pub(super) on_error: OnError,
    pub(super) min_rate: u64,
    pub(super) finish_by: Option<Duration>,
}

/// What the walk found, and when it looked.
struct Run {
    piece: FillPiece,
    looked: Duration,
}

/// Whole units that are linked at once.
struct Block {
    at: u64,
    len: u64,
    /// What has come, by its offset.
    parts: BTreeMap<u64, Bytes>,
    arrived: u64,
    /// Of all parts; a block whose parts differ is fetched again.
    generation: Option<u64>,
    mixed: bool,
}

/// One request of a block.
#[derive(Clone, Copy)]
struct Request {
    block: u64,
    at: u64,
    len: u64,
}

/// What came from below.
enum Remote {
    Mapped(u64, IoResult<Option<FillPiece>>),
    Fetched { request: Request, sent: Duration, alone: bool, limited: bool, result: IoResult<Fetched> },
}

/// What was done to the overlay.
enum Local {
    Linked { at: u64, len: u64, zero: bool, result: IoResult<Populated> },
    Synced { bytes: u64, result: IoResult<()> },
}

/// Wants latencies while it lives.
struct Listening(NodeHandle);

impl Listening {
    fn new(node: &NodeHandle) -> Listening {
        node.latency().listen();
        Listening(node.clone())
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.latency().unlisten();
    }
}

/// The fill of one overlay.
pub(super) struct Fill {
    top: NodeHandle,
    bottom: Option<NodeHandle>,
    policy: FillPolicy,
    /// The generation under which everything was found present; `None` before that.
    done_under: Option<u64>,
    jitter: u64,
}

impl Fill {
    pub(super) fn new(top: NodeHandle, bottom: Option<NodeHandle>, policy: FillPolicy) -> Fill {
        Fill { top, bottom, policy, done_under: None, jitter: 0x9e37_79b9_7f4a_7c15 }
    }

    /// Fills everything.
    pub(super) async fn run(&mut self, job: &Job) -> IoResult<()> {
        job.set_progress(0, self.top.len());
        self.catch_up(job).await?;
        job.set_progress(self.top.len(), self.top.len());
        Ok(())
    }

    /// Walks over the overlay until one walk found everything under one generation (I3a).
    pub(super) async fn catch_up(&mut self, job: &Job) -> IoResult<()> {
        loop {
            let Some(slot) = self.top.backing() else { return Ok(()) };
            let Some(source) = slot.node() else { return Ok(()) };
            let generation = slot.generation();
            if self.done_under == Some(generation) {
                return Ok(());
            }
            let cursor = match self.bottom.as_ref().map(super::below) {
                None => StreamCursor::new(&self.top, false),
                Some(Some(base)) => StreamCursor::above(&self.top, base),
                // Nothing is left under the last layer, so nothing shows through: zeroes need no telling.
                Some(None) => StreamCursor::new(&self.top, false),
            };
            Pass::new(self, job, source, cursor).run().await?;
            self.done_under = Some(generation);
        }
    }

    /// Between a half and the whole of `wait`, by chance: clients of one source shall not come back in step.
    fn jittered(&mut self, wait: Duration) -> Duration {
        self.jitter ^= self.jitter << 13;
        self.jitter ^= self.jitter >> 7;
        self.jitter ^= self.jitter << 17;
        wait / 2 + wait.mul_f64((self.jitter >> 40) as f64 / (1 << 24) as f64 / 2.0)
    }
}

/// One walk over the overlay.
struct Pass<'a> {
    fill: &'a mut Fill,
    job: &'a Job,
    source: NodeHandle,
    cursor: Rc<RefCell<Option<StreamCursor>>>,
    mapping: bool,
    mapped_all: bool,
    runs: VecDeque<Run>,
    blocks: BTreeMap<u64, Block>,
    next_block: u64,
    /// Of the newest block: what was not asked for yet.
    rest: Option<Request>,
    /// To be asked for again, the oldest first.
    again: VecDeque<Request>,
    /// Whole blocks, and the generation they are of, until local writes have room: what comes from a fast source must
    /// not all be written at once, for a guest's FLUSH would have to wait for it.
    to_link: VecDeque<(Block, u64)>,
    to_link_bytes: u64,
    remote: FuturesUnordered<LocalBoxFuture<'static, Remote>>,
    local: FuturesUnordered<LocalBoxFuture<'static, Local>>,
    /// Requests that were sent and not answered.
    sent: BTreeMap<(u64, u64), Request>,
    sent_bytes: u64,
    held_bytes: u64,
    link_bytes: u64,
    syncing: bool,
    unsynced: bool,
    next_sync: Duration,
    next_tick: Duration,
    next_progress: Duration,
    last_tick: Duration,
    control: Control,
    speed: Pace,
    pace: Pace,
    skipped_bytes: u64,
    linked_bytes: u64,
    failures: u32,
    source_lost: bool,
    retry_at: Option<Duration>,
    stopped_by_error: bool,
    ignored: Option<IoError>,
    _listening: [Listening; 2],
}

impl<'a> Pass<'a> {
    fn new(fill: &'a mut Fill, job: &'a Job, source: NodeHandle, cursor: StreamCursor) -> Pass<'a> {
        let now = rt::now();
        let listening = [Listening::new(&fill.top), Listening::new(&source)];
        Pass {
            control: Control::new(now, fill.policy.min_rate, NEAR_REQUESTS),
            fill,
            job,
            source,
            cursor: Rc::new(RefCell::new(Some(cursor))),
            mapping: false,
            mapped_all: false,
            runs: VecDeque::new(),
            blocks: BTreeMap::new(),
            next_block: 0,
            rest: None,
            again: VecDeque::new(),
            to_link: VecDeque::new(),
            to_link_bytes: 0,
            remote: FuturesUnordered::new(),
            local: FuturesUnordered::new(),
            sent: BTreeMap::new(),
            sent_bytes: 0,
            held_bytes: 0,
            link_bytes: 0,
            syncing: false,
            unsynced: false,
            next_sync: now + SYNC_INTERVAL,
            next_tick: now + TICK,
            next_progress: now + PROGRESS_INTERVAL,
            last_tick: now,
            speed: Pace::default(),
            pace: Pace::default(),
            skipped_bytes: 0,
            linked_bytes: 0,
            failures: 0,
            source_lost: false,
            retry_at: None,
            stopped_by_error: false,
            ignored: None,
            _listening: listening,
        }
    }

    async fn run(mut self) -> IoResult<()> {
        let outcome = self.fill_all().await;
        // Local writes are never left behind: a cancelled job has stopped writing when it says so.
        self.recall();
        while let Some(done) = self.local.next().await {
            if let (Ok(()), Err(error)) = (&outcome, self.local_result(done)) {
                return Err(error);
            }
        }
        outcome?;
        self.ignored.map_or(Ok(()), Err)
    }

    async fn fill_all(&mut self) -> IoResult<()> {
        let (mut due, mut timer) = (Duration::MAX, Fuse::<LocalBoxFuture<'static, ()>>::terminated());
        let mut changed = self.job.listen().fuse();
        loop {
            if self.job.should_stop() {
                self.rest_and_pause().await?;
                changed = self.job.listen().fuse();
                continue;
            }
            let now = rt::now();
            self.housekeeping(now);
            self.start_links(now);
            let wake = self.issue(now);
            if self.is_done() {
                return Ok(());
            }
            if wake != due {
                (due, timer) = (wake, rt::sleep(wake.saturating_sub(now)).boxed_local().fuse());
            }
            select_biased! {
                () = changed => changed = self.job.listen().fuse(),
                done = self.local.select_next_some() => self.local_result(done)?,
                done = self.remote.select_next_some() => self.remote_result(done)?,
                () = timer => due = Duration::MAX,
            }
        }
    }

    fn is_done(&self) -> bool {
        self.mapped_all
            && self.runs.is_empty()
            && self.rest.is_none()
            && self.again.is_empty()
            && self.blocks.is_empty()
            && self.to_link.is_empty()
            && self.remote.is_empty()
            && self.local.is_empty()
    }

    /// Drops what was sent and not answered; it is asked for again.
    fn recall(&mut self) {
        self.remote.clear();
        self.mapping = false;
        self.sent_bytes = 0;
        for (_, request) in std::mem::take(&mut self.sent) {
            self.again.push_back(request);
        }
    }

    async fn rest_and_pause(&mut self) -> IoResult<()> {
        self.recall();
        while let Some(done) = self.local.next().await {
            self.local_result(done)?;
        }
        self.job.pause_point().await?;
        (self.stopped_by_error, self.retry_at, self.failures) = (false, None, 0);
        let now = rt::now();
        self.control.restart_span(now);
        self.last_tick = now;
        Ok(())
    }

    // ---- what is asked for ----

    /// Sends what may go now; returns when to look again.
    fn issue(&mut self, now: Duration) -> Duration {
        let mut wake = self.next_tick;
        if let Some(at) = self.retry_at {
            if now < at {
                return wake.min(at);
            }
            self.retry_at = None;
        }
        let board = self.fill.top.latency();
        let wrote = board.last(LatencyKind::Write).max(board.last(LatencyKind::Sync));
        self.control.set_last(self.source.latency().last(LatencyKind::Miss), wrote);
        self.look_again(now);
        while !self.job.should_stop() {
            self.start_mapping();
            let window = self.control.window(now);
            let probe = self.control.probe_due(now);
            if self.sent_bytes > 0 && (probe || self.sent_bytes >= window) {
                break;
            }
            // A block that was begun is always finished, or its memory would never come back.
            let fresh = self.again.is_empty() && self.rest.is_none();
            let behind = self.link_bytes >= LINK_BYTES_MAX || self.to_link_bytes >= window;
            if behind || (fresh && self.held_bytes >= HELD_BYTES_MAX) {
                self.control.is_behind();
                break;
            }
            let ready = self.speed.ready_at().max(self.pace.ready_at());
            if ready > now {
                wake = wake.min(ready);
                break;
            }
            let bytes = self.control.request_bytes(now).min(self.speed.request_bytes());
            let bytes =
                align_down(bytes.min(self.pace.request_bytes()), REQUEST_BYTES_MIN).max(REQUEST_BYTES_MIN);
            let Some(request) = self.next_request(bytes) else { break };
            self.send(request, now);
        }
        wake
    }

    /// What was looked at long ago goes back to the walk.
    fn look_again(&mut self, now: Duration) {
        // Of a source that is known to be away it is asked when that is back: a look says nothing of it.
        if self.source_lost || self.runs.front().is_none_or(|run| run.looked + LOOK_AGE >= now) {
            return;
        }
        // While a look is under way the walk is not here: it is tried again when that has ended.
        if let Some(cursor) = self.cursor.borrow_mut().as_mut() {
            self.runs.drain(..).rev().for_each(|run| cursor.put_back(run.piece));
            self.mapped_all = false;
        }
    }

    fn start_mapping(&mut self) {
        if self.mapping || self.mapped_all || self.runs.len() >= RUNS_AHEAD {
            return;
        }
        self.mapping = true;
        let cursor = self.cursor.clone();
        self.remote.push(Box::pin(async move {
            // Comes back also when this future is dropped in the middle: the walk has not moved then.
            let mut walk = Lent::take(&cursor);
            let result = match walk.cursor.as_mut() {
                Some(cursor) => cursor.next(&Ctx::FILL, LOOK_BYTES).await,
                None => Err(IoError::new(ErrorKind::Busy, "the walk is in use")),
            };
            let skipped = walk.cursor.as_ref().map_or(0, StreamCursor::skipped_bytes);
            Remote::Mapped(skipped, result)
        }));
    }

    /// The next request, of about `bytes`.
    fn next_request(&mut self, bytes: u64) -> Option<Request> {
        while let Some(mut request) = self.again.pop_front() {
            if !self.blocks.contains_key(&request.block) {
                continue;
            }
            if request.len > bytes {
                let rest = Request { at: request.at + bytes, len: request.len - bytes, ..request };
                self.again.push_front(rest);
                request.len = bytes;
            }
            return Some(request);
        }
        if self.rest.is_none() {
            self.rest = self.next_block(bytes);
        }
        let rest = self.rest.as_mut()?;
        let request = Request { len: rest.len.min(bytes), ..*rest };
        rest.at += request.len;
        rest.len -= request.len;
        if rest.len == 0 {
            self.rest = None;
        }
        Some(request)
    }

    /// Cuts a block of about `bytes` off the first run, and links runs of zeroes on the way.
    fn next_block(&mut self, bytes: u64) -> Option<Request> {
        loop {
            let unit = self.fill.top.populate_unit();
            match &mut self.runs.front_mut()?.piece {
                FillPiece::Copy { at, len } => {
                    let size = align_down(bytes.min(REQUEST_BYTES_MAX), unit).max(unit).min(*len);
                    let start = *at;
                    (*at, *len) = (*at + size, *len - size);
                    if *len == 0 {
                        self.runs.pop_front();
                    }
                    return Some(self.new_block(start, size));
                }
                FillPiece::Zero { at, len } => {
                    if self.link_bytes >= ZERO_BYTES_MAX {
                        return None;
                    }
                    let size = align_up(ZERO_BYTES_MAX, unit).min(*len);
                    let start = *at;
                    (*at, *len) = (*at + size, *len - size);
                    if *len == 0 {
                        self.runs.pop_front();
                    }
                    self.link_zero(start, size);
                }
            }
        }
    }

    fn new_block(&mut self, at: u64, len: u64) -> Request {
        let id = self.next_block;
        self.next_block += 1;
        self.held_bytes += len;
        let block = Block { at, len, parts: BTreeMap::new(), arrived: 0, generation: None, mixed: false };
        self.blocks.insert(id, block);
        Request { block: id, at, len }
    }

    fn send(&mut self, request: Request, now: Duration) {
        let alone = self.sent_bytes == 0;
        let limited = self.pace.ready_at() > Duration::ZERO || self.speed.ready_at() > Duration::ZERO;
        self.speed.take(now, request.len);
        self.pace.take(now, request.len);
        self.sent_bytes += request.len;
        self.sent.insert((request.block, request.at), request);
        let top = self.fill.top.clone();
        self.remote.push(Box::pin(async move {
            let result = match top.backing() {
                Some(slot) => slot.fetch(&Ctx::FILL, request.at, request.len).await,
                None => Err(IoError::new(ErrorKind::NotFound, "the overlay has no edge to a backing")),
            };
            Remote::Fetched { request, sent: now, alone, limited, result }
        }));
    }

    // ---- what came ----

    fn remote_result(&mut self, done: Remote) -> IoResult<()> {
        match done {
            Remote::Mapped(skipped, result) => {
                self.mapping = false;
                self.skipped_bytes = skipped;
                match result {
                    Ok(Some(piece)) => self.runs.push_back(Run { piece, looked: rt::now() }),
                    Ok(None) => self.mapped_all = true,
                    Err(error) => return self.read_failed(error, None),
                }
                self.source_answers();
                self.show_progress();
            }
            Remote::Fetched { request, sent, alone, limited, result } => {
                self.sent.remove(&(request.block, request.at));
                self.sent_bytes -= request.len;
                match result {
                    Ok(fetched) => {
                        let now = rt::now();
                        self.control.answered(now, request.len, now.saturating_sub(sent), alone, limited);
                        self.source_answers();
                        self.arrived(request, fetched);
                    }
                    Err(error) => return self.read_failed(error, Some(request)),
                }
            }
        }
        Ok(())
    }

    fn arrived(&mut self, request: Request, fetched: Fetched) {
        let Some(block) = self.blocks.get_mut(&request.block) else { return };
        block.mixed |= *block.generation.get_or_insert(fetched.generation) != fetched.generation;
        block.arrived += request.len;
        block.parts.insert(request.at, fetched.data);
        if block.arrived < block.len {
            return;
        }
        let Some(block) = self.blocks.remove(&request.block) else { return };
        match block.generation {
            Some(generation) if !block.mixed => {
                self.to_link_bytes += block.len;
                self.to_link.push_back((block, generation));
            }
            _ => {
                self.held_bytes -= block.len;
                self.fetch_again(block.at, block.len);
            }
        }
    }

    /// Links what has come, as far as local writes have room; one block always may.
    fn start_links(&mut self, now: Duration) {
        let max = self.control.link_bytes_max(now);
        while let Some((block, generation)) = self.to_link.pop_front() {
            if self.link_bytes > 0 && self.link_bytes + block.len > max {
                self.to_link.push_front((block, generation));
                break;
            }
            self.held_bytes -= block.len;
            self.to_link_bytes -= block.len;
            self.link(block, generation);
        }
    }

    fn fetch_again(&mut self, at: u64, len: u64) {
        let request = self.new_block(at, len);
        self.again.push_back(request);
    }

    fn link(&mut self, block: Block, generation: u64) {
        let Block { at, len, mut parts, .. } = block;
        let data = match parts.pop_first() {
            Some((_, only)) if parts.is_empty() => only,
            Some((_, first)) => {
                let mut whole = BytesMut::with_capacity(len as usize);
                whole.extend_from_slice(&first);
                parts.values().for_each(|part| whole.extend_from_slice(part));
                whole.freeze()
            }
            None => return,
        };
        debug_assert_eq!(data.len() as u64, len);
        self.link_bytes += len;
        let top = self.fill.top.clone();
        self.local.push(Box::pin(async move {
            let result = top.populate(&Ctx::FILL, at, data, generation).await;
            Local::Linked { at, len, zero: false, result }
        }));
    }

    /// Makes a run zero. What the walk said holds under any generation: below it, content does not change.
    fn link_zero(&mut self, at: u64, len: u64) {
        self.link_bytes += len;
        let top = self.fill.top.clone();
        self.local.push(Box::pin(async move {
            let generation = top.backing().map_or(0, |slot| slot.generation());
            let result = top.populate_zero(&Ctx::FILL, at, len, generation).await;
            Local::Linked { at, len, zero: true, result }
        }));
    }

    fn local_result(&mut self, done: Local) -> IoResult<()> {
        match done {
            Local::Linked { at, len, zero, result } => {
                self.link_bytes -= len;
                self.control.linked(if zero { 0 } else { len });
                match result {
                    // Whoever changed what lies below raised the generation: fetch under the new one.
                    Ok(populated) if populated.stale > 0 => self.fetch_again(at, len),
                    Ok(_) => {
                        self.unsynced = true;
                        self.linked_bytes += len;
                        self.show_progress();
                    }
                    Err(error) => {
                        if self.stopped_by_error {
                            self.undo(at, len, zero);
                            return Ok(());
                        }
                        match self.job.io_error(self.fill.policy.on_error, Operation::Write, &error) {
                            ErrorAction::Report => return Err(error),
                            ErrorAction::Ignore => {
                                self.linked_bytes += len;
                                self.ignored.get_or_insert(error);
                            }
                            ErrorAction::Stop => {
                                self.stopped_by_error = true;
                                self.undo(at, len, zero);
                            }
                        }
                    }
                }
            }
            Local::Synced { bytes, result } => {
                self.syncing = false;
                match result {
                    Ok(()) => self.job.set_durable(bytes),
                    // The metadata found no space; nothing was promised yet.
                    Err(error) if error.kind() == ErrorKind::NoSpace => {
                        self.unsynced = true;
                        let policy = self.fill.policy.on_error;
                        if !self.stopped_by_error
                            && self.job.io_error(policy, Operation::Write, &error) != ErrorAction::Stop
                        {
                            return Err(error);
                        }
                        self.stopped_by_error = true;
                    }
                    // After any other failed sync nothing is known; no policy makes that good.
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn undo(&mut self, at: u64, len: u64, zero: bool) {
        if zero {
            self.runs.push_front(Run { piece: FillPiece::Zero { at, len }, looked: rt::now() });
        } else {
            self.fetch_again(at, len);
        }
    }

    // ---- errors of the source ----

    fn source_answers(&mut self) {
        self.failures = 0;
        if self.source_lost {
            self.source_lost = false;
            self.job.tell_source(None);
        }
    }

    fn read_failed(&mut self, error: IoError, request: Option<Request>) -> IoResult<()> {
        let lost = matches!(error.kind(), ErrorKind::SourceLost | ErrorKind::TimedOut);
        if self.stopped_by_error || self.retry_at.is_some() {
            // One of many that failed together: told once.
            self.again.extend(request);
            return Ok(());
        }
        self.failures += 1;
        if lost && !self.source_lost {
            self.source_lost = true;
            self.job.tell_source(Some(&error));
        }
        if lost || (self.failures <= READ_RETRIES_MAX && error.kind() == ErrorKind::Io) {
            let wait = RETRY_WAIT_MIN.saturating_mul(1 << (self.failures - 1).min(16)).min(RETRY_WAIT_MAX);
            self.retry_at = Some(rt::now() + self.fill.jittered(wait));
            self.again.extend(request);
            return Ok(());
        }
        match (self.job.io_error(self.fill.policy.on_error, Operation::Read, &error), request) {
            (ErrorAction::Stop, request) => {
                self.stopped_by_error = true;
                self.again.extend(request);
                Ok(())
            }
            // The block is left out, and the job goes on. A walk that cannot see on has nowhere to go.
            (ErrorAction::Ignore, Some(request)) => {
                self.leave_out(request.block);
                self.ignored.get_or_insert(error);
                Ok(())
            }
            (ErrorAction::Report | ErrorAction::Ignore, _) => Err(error),
        }
    }

    fn leave_out(&mut self, block: u64) {
        self.failures = 0;
        if self.rest.is_some_and(|rest| rest.block == block) {
            self.rest = None;
        }
        if let Some(block) = self.blocks.remove(&block) {
            self.held_bytes -= block.len;
            self.linked_bytes += block.len;
        }
    }

    // ---- housekeeping ----

    fn show_progress(&self) {
        self.job.set_progress(self.skipped_bytes + self.linked_bytes, self.fill.top.len());
    }

    fn housekeeping(&mut self, now: Duration) {
        self.speed.set(now, self.job.speed());
        if now >= self.next_tick {
            self.tick(now);
        }
        if now >= self.next_sync && self.unsynced && !self.syncing {
            self.next_sync = now + SYNC_INTERVAL;
            (self.syncing, self.unsynced) = (true, false);
            let (top, bytes) = (self.fill.top.clone(), self.skipped_bytes + self.linked_bytes);
            self.local
                .push(Box::pin(async move { Local::Synced { bytes, result: top.sync(&Ctx::FILL).await } }));
        }
        if now >= self.next_progress {
            self.next_progress = now + PROGRESS_INTERVAL;
            self.job.tell_progress();
        }
    }

    fn tick(&mut self, now: Duration) {
        let since = self.last_tick;
        let took = |node: &NodeHandle, kind| {
            node.latency().since(kind, since).into_iter().map(|(_, took)| took).collect::<Vec<_>>()
        };
        let seen = Seen {
            misses: took(&self.source, LatencyKind::Miss),
            reads: took(&self.fill.top, LatencyKind::Read),
            writes: took(&self.fill.top, LatencyKind::Write),
            syncs: took(&self.fill.top, LatencyKind::Sync),
        };
        self.control.set_min_rate(self.min_rate(now));
        self.control.tick(now, seen);
        self.pace.set(now, self.control.pace());
        (self.last_tick, self.next_tick) = (now, now + TICK);
    }

    /// The floor under politeness, raised to what `finish_by` takes.
    fn min_rate(&self, now: Duration) -> u64 {
        let Some(by) = self.fill.policy.finish_by else { return self.fill.policy.min_rate };
        let left = self.fill.top.len().saturating_sub(self.skipped_bytes + self.linked_bytes);
        let needed = left as f64 / by.saturating_sub(now).as_secs_f64().max(TICK.as_secs_f64());
        self.fill.policy.min_rate.max(needed as u64)
    }
}

/// The walk, lent to a mapping future; goes back when that ends, however it ends.
struct Lent {
    home: Rc<RefCell<Option<StreamCursor>>>,
    cursor: Option<StreamCursor>,
}

impl Lent {
    fn take(home: &Rc<RefCell<Option<StreamCursor>>>) -> Lent {
        let cursor = home.borrow_mut().take();
        Lent { home: home.clone(), cursor }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        *self.home.borrow_mut() = self.cursor.take();
    }
}
