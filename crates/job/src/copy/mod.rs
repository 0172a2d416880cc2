//! Copies from one node to another, which mirror, commit and backup share.
//!
//! [`Transfer`] is what a copy knows of itself: the nodes, the blocks that are still to be copied, and the lock under which
//! blocks are written to the target. The copier is the loop that keeps many pieces in flight under latency control.
//!
//! Two maps say what is left: *cold* blocks are to be copied because they lie on the source, *hot* ones because a guest
//! wrote them. A write moves its blocks from cold to hot, and hot ones are copied when nothing cold is left: so a block that
//! is written all the time is sent once at the end, not again and again.
//!
//! What never happens: old bytes that land on the target behind newer ones (a piece is read and written under one hold of
//! its range), and a dirty bit that is lost (it is cleared before the source is read, and set after the guest's write has
//! landed).

pub mod backup;
pub mod commit;
pub mod fleece;
mod given;
mod keep;
mod keeping;
mod kept_map;
pub mod mirror;
mod sample;
mod transfer;

use std::time::Duration;

use futures_util::future::{Fuse, LocalBoxFuture, join};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt, select_biased};
use infill_base::{Ctx, ErrorKind, IoError, IoResult, align_down};
use infill_node::{LatencyKind, NodeHandle};
use infill_storage::rt;
use infill_storage::sync::Arc;

use crate::control::{Control, REQUEST_BYTES_MAX, REQUEST_BYTES_MIN, Seen, TICK};
use crate::job::Job;
use crate::rate::Pace;
use crate::state::{ErrorAction, OnError, Operation};

pub use given::GivenMap;
pub use keep::KeepOld;
use keeping::Given;
pub use keeping::{KeptCopy, MapGuard};
pub use kept_map::{KeptMap, MAP_BYTES_MAX, MapOwner};
pub use sample::{Looked, Unproven, has_what_it_should};
pub use transfer::{BLOCK_BYTES, Failed, Scope, Transfer, piece_bytes};

/// Bytes in memory at a time.
const HELD_BYTES_MAX: u64 = 64 << 20;
/// A copy that does as many bytes per second shares no slow link, and its pieces are at least so large: a FLUSH waits no longer for
/// a large one than for as many small ones, which cost the processor that guests need, too.
const FAST_RATE: f64 = 200e6;
const FAST_REQUEST_BYTES: u64 = 512 << 10;
/// How many pieces fill the window of a near target: while some are read, others are written.
const NEAR_REQUESTS: u64 = 8;
/// How often progress is told.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// How often the target is synced on the way: what is dirty there others on the same disk wait for.
const SYNC_INTERVAL: Duration = Duration::from_secs(1);
/// Attempts in a row that fail before the policy decides.
const RETRIES_MAX: u32 = 3;
/// First and longest wait before the next attempt.
const RETRY_WAIT_MIN: Duration = Duration::from_millis(50);
const RETRY_WAIT_MAX: Duration = Duration::from_secs(5);
/// A copy has converged when what is left takes no longer than this, or is no more than [`CONVERGED_BYTES`].
const CONVERGED_TIME: Duration = Duration::from_millis(50);
const CONVERGED_BYTES: u64 = 64 << 10;

/// When [`Copier::run`] is to return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    /// Nothing is left, and nothing in flight.
    Empty,
    /// So little is left that a guest would hardly notice waiting for it.
    Converged,
    /// The job was asked to complete. Until then what a guest writes is copied as it comes.
    Asked,
}

/// What happens on errors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyPolicy {
    pub(crate) on_source_error: OnError,
    pub(crate) on_target_error: OnError,
    /// Bytes per second below which politeness towards guests does not take it.
    pub(crate) min_rate: u64,
}

struct Piece {
    at: u64,
    len: u64,
    sent: Duration,
    alone: bool,
    limited: bool,
}

/// What a sync of the target covers.
struct Covered {
    /// Bytes that were copied before it began.
    copied_bytes: u64,
    /// Of servers that forget: what they had not synced.
    given: Given,
    /// Whether the source was synced, too, where it was to be.
    source: bool,
}

enum Done {
    Copied(Piece, Result<(), Failed>),
    Walked(Result<bool, Failed>),
    Synced(IoResult<()>, Box<Covered>),
}

/// Wants latencies while it lives.
struct Listening(NodeHandle);

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.latency().unlisten();
    }
}

/// The loop of one copy.
pub(crate) struct Copier {
    transfer: Arc<Transfer>,
    policy: CopyPolicy,
    in_flight: FuturesUnordered<LocalBoxFuture<'static, Done>>,
    walking: bool,
    walked: bool,
    syncing: bool,
    unsynced: bool,
    next: u64,
    sent_bytes: u64,
    copied_bytes: u64,
    control: Control,
    speed: Pace,
    pace: Pace,
    next_tick: Duration,
    last_tick: Duration,
    next_sync: Duration,
    next_progress: Duration,
    retry_at: Option<Duration>,
    failures: u32,
    lost: bool,
    stopped_by_error: bool,
    ignored: Option<IoError>,
    /// Guests are held: no limit counts.
    hurries: bool,
    _listening: Listening,
}

impl Copier {
    pub(crate) fn new(transfer: Arc<Transfer>, policy: CopyPolicy) -> Copier {
        let now = rt::now();
        transfer.source.latency().listen();
        // What is old on a server is old for good when that has synced it.
        let next_sync = if transfer.is_from_server() { now } else { now + SYNC_INTERVAL };
        Copier {
            _listening: Listening(transfer.source.clone()),
            control: Control::new(now, policy.min_rate, NEAR_REQUESTS),
            copied_bytes: transfer.copied_before(),
            transfer,
            policy,
            in_flight: FuturesUnordered::new(),
            walking: false,
            walked: false,
            syncing: false,
            unsynced: false,
            next: 0,
            sent_bytes: 0,
            speed: Pace::default(),
            pace: Pace::default(),
            next_tick: now + TICK,
            last_tick: now,
            next_sync,
            next_progress: now + PROGRESS_INTERVAL,
            retry_at: None,
            failures: 0,
            lost: false,
            stopped_by_error: false,
            ignored: None,
            hurries: false,
        }
    }

    /// Guests wait from now on: neither a speed nor politeness holds it back.
    pub(crate) fn hurry(&mut self, hurries: bool) {
        self.hurries = hurries;
    }

    /// What was left out by *ignore*, if anything was.
    pub(crate) fn take_ignored(&mut self) -> IoResult<()> {
        self.ignored.take().map_or(Ok(()), Err)
    }

    /// Copies until `goal` is reached. A cancelled job does not wait for what is in flight: it goes on by itself, and the
    /// target's content means nothing then.
    pub(crate) async fn run(&mut self, job: &Job, goal: Goal) -> IoResult<()> {
        self.run_until(job, goal, &|| None).await
    }

    /// As [`Copier::run`]; it also gives up when `failure` says that the copy has failed elsewhere, which is looked at whenever
    /// [`Transfer::marked`] has fired.
    pub(crate) async fn run_until(
        &mut self,
        job: &Job,
        goal: Goal,
        failure: &dyn Fn() -> Option<Failed>,
    ) -> IoResult<()> {
        let outcome = match self.copy(job, goal, failure).await {
            Ok(()) => self.drain(job).await,
            failed => failed,
        };
        if outcome.is_err() {
            let rest = std::mem::take(&mut self.in_flight);
            rt::spawn(async move { rest.for_each(|_| std::future::ready(())).await });
        }
        outcome
    }

    /// Waits until nothing is in flight. A piece holds its range, which a guest's write may wait for: none is left when nobody
    /// polls the loop.
    pub(crate) async fn drain(&mut self, job: &Job) -> IoResult<()> {
        let mut changed = job.listen();
        while !self.in_flight.is_empty() {
            if job.is_cancelled() {
                return job.pause_point().await;
            }
            select_biased! {
                () = (&mut changed).fuse() => changed = job.listen(),
                done = self.in_flight.select_next_some() => self.done(job, done)?,
            }
        }
        Ok(())
    }

    async fn copy(&mut self, job: &Job, goal: Goal, failure: &dyn Fn() -> Option<Failed>) -> IoResult<()> {
        let (mut due, mut timer) = (Duration::MAX, Fuse::<LocalBoxFuture<'static, ()>>::terminated());
        let mut changed = job.listen().fuse();
        loop {
            if job.should_stop() {
                self.pause(job).await?;
                changed = job.listen().fuse();
            }
            let marked = self.transfer.marked.listen();
            if let Some(Failed { operation, error }) = failure() {
                job.io_error(OnError::Report, operation, &error);
                return Err(error);
            }
            let now = rt::now();
            self.housekeeping(job, now);
            let wake = self.issue(job, now);
            self.show_progress(job);
            if self.has_reached(job, goal) {
                return Ok(());
            }
            if wake != due {
                (due, timer) = (wake, rt::sleep(wake.saturating_sub(now)).boxed_local().fuse());
            }
            select_biased! {
                () = changed => changed = job.listen().fuse(),
                done = self.in_flight.select_next_some() => self.done(job, done)?,
                () = marked.fuse() => {}
                () = timer => due = Duration::MAX,
            }
        }
    }

    fn has_reached(&self, job: &Job, goal: Goal) -> bool {
        if !self.walked || self.stopped_by_error || self.retry_at.is_some() {
            return goal == Goal::Asked && job.should_complete() && self.walked;
        }
        let left = self.transfer.left_bytes() + self.sent_bytes;
        match goal {
            Goal::Empty => left == 0 && !self.syncing,
            // Only what guests write may be left: a disk that is half copied has not converged, however quick the copy is.
            Goal::Converged if self.transfer.cold_bytes() > 0 => false,
            Goal::Converged => {
                let quick = (self.control.rate() * CONVERGED_TIME.as_secs_f64()) as u64;
                left <= CONVERGED_BYTES.max(self.transfer.piece).max(quick)
            }
            Goal::Asked => job.should_complete(),
        }
    }

    /// Pauses with nothing in flight, or gives up at once when cancelled.
    async fn pause(&mut self, job: &Job) -> IoResult<()> {
        self.drain(job).await?;
        job.pause_point().await?;
        (self.stopped_by_error, self.retry_at, self.failures) = (false, None, 0);
        let now = rt::now();
        self.control.restart_span(now);
        self.last_tick = now;
        Ok(())
    }

    /// Begins what may begin now; returns when to look again.
    fn issue(&mut self, job: &Job, now: Duration) -> Duration {
        let mut wake = self.next_tick;
        if let Some(at) = self.retry_at {
            if now < at {
                return wake.min(at);
            }
            self.retry_at = None;
        }
        if self.stopped_by_error {
            return wake;
        }
        let board = self.transfer.source.latency();
        let wrote = board.last(LatencyKind::Write).max(board.last(LatencyKind::Sync));
        self.control.set_last(None, wrote);
        self.start_walking();
        while !job.should_stop() && !self.transfer.waits_for_sync() {
            let (window, probe) = match self.hurries {
                true => (HELD_BYTES_MAX, false),
                false => (self.control.window(now).min(HELD_BYTES_MAX), self.control.probe_due(now)),
            };
            if self.sent_bytes > 0 && (probe || self.sent_bytes >= window) {
                break;
            }
            // What guests have written since is copied at once: politeness would let them stay ahead for ever.
            let pace = if self.walked && self.transfer.cold_bytes() == 0 {
                Duration::ZERO
            } else {
                self.pace.ready_at()
            };
            let ready = self.speed.ready_at().max(pace);
            if ready > now && !self.hurries {
                wake = wake.min(ready);
                break;
            }
            let paced = if pace > Duration::ZERO { self.pace.request_bytes() } else { u64::MAX };
            let least = if self.control.rate() >= FAST_RATE && !probe { FAST_REQUEST_BYTES } else { 0 };
            let bytes = self.control.request_bytes(now).max(least).min(self.speed.request_bytes()).min(paced);
            let bytes = match self.hurries {
                true => REQUEST_BYTES_MAX,
                false => align_down(bytes, BLOCK_BYTES),
            };
            let Some(piece) =
                self.transfer.take(&mut self.next, bytes.clamp(BLOCK_BYTES, REQUEST_BYTES_MAX), self.walked)
            else {
                break;
            };
            self.send(piece.start, piece.end - piece.start, now);
        }
        wake
    }

    fn start_walking(&mut self) {
        if self.walking || self.walked || self.transfer.cold_bytes() > HELD_BYTES_MAX {
            return;
        }
        self.walking = true;
        let transfer = self.transfer.clone();
        self.in_flight.push(Box::pin(async move { Done::Walked(transfer.walk().await) }));
    }

    fn send(&mut self, at: u64, len: u64, now: Duration) {
        let alone = self.sent_bytes == 0;
        let limited = self.pace.ready_at() > Duration::ZERO || self.speed.ready_at() > Duration::ZERO;
        self.speed.take(now, len);
        self.pace.take(now, len);
        self.sent_bytes += len;
        let (transfer, piece) = (self.transfer.clone(), Piece { at, len, sent: now, alone, limited });
        self.in_flight.push(Box::pin(async move {
            let result = transfer.copy(&Ctx::FILL, at, len).await;
            Done::Copied(piece, result)
        }));
    }

    fn done(&mut self, job: &Job, done: Done) -> IoResult<()> {
        match done {
            Done::Copied(piece, Ok(())) => {
                let now = rt::now();
                self.sent_bytes -= piece.len;
                self.copied_bytes += piece.len;
                self.control.linked(piece.len);
                self.transfer.is_copied(piece.at, piece.len, self.copied_bytes);
                self.unsynced = true;
                let took = now.saturating_sub(piece.sent);
                self.control.answered(now, piece.len, took, piece.alone, piece.limited);
                self.answers(job);
            }
            Done::Copied(piece, Err(failed)) => {
                self.sent_bytes -= piece.len;
                return self.failed(job, failed, Some(piece));
            }
            Done::Walked(result) => {
                self.walking = false;
                match result {
                    Ok(more) => self.walked = !more,
                    Err(failed) => return self.failed(job, failed, None),
                }
                self.answers(job);
            }
            Done::Synced(result, covered) => {
                self.syncing = false;
                // After a failed sync nothing is known; no policy makes that good.
                self.transfer.end_sync(covered.given, result.is_ok(), covered.source);
                result?;
                job.set_durable(covered.copied_bytes);
            }
        }
        Ok(())
    }

    fn answers(&mut self, job: &Job) {
        self.failures = 0;
        if std::mem::take(&mut self.lost) {
            job.tell_source(None);
        }
    }

    fn failed(&mut self, job: &Job, failed: Failed, piece: Option<Piece>) -> IoResult<()> {
        let Failed { operation, error } = failed;
        let again = |piece: &Option<Piece>| {
            piece.iter().for_each(|piece| self.transfer.put_back(piece.at, piece.len));
        };
        if self.stopped_by_error || self.retry_at.is_some() {
            // One of many that failed together: told once.
            again(&piece);
            return Ok(());
        }
        self.failures += 1;
        let lost = matches!(error.kind(), ErrorKind::SourceLost | ErrorKind::TimedOut);
        if lost && !self.lost {
            self.lost = true;
            job.tell_source(Some(&error));
        }
        if lost || (self.failures <= RETRIES_MAX && error.kind() == ErrorKind::Io) {
            let wait = RETRY_WAIT_MIN.saturating_mul(1 << (self.failures - 1).min(16)).min(RETRY_WAIT_MAX);
            again(&piece);
            self.retry_at = Some(rt::now() + wait);
            return Ok(());
        }
        let policy = match operation {
            Operation::Read => self.policy.on_source_error,
            Operation::Write => self.policy.on_target_error,
        };
        match (job.io_error(policy, operation, &error), &piece) {
            (ErrorAction::Stop, _) => {
                again(&piece);
                self.stopped_by_error = true;
            }
            // The piece is left out, and the job goes on. A walk that cannot see on has nowhere to go.
            (ErrorAction::Ignore, Some(_)) => {
                self.failures = 0;
                piece.iter().for_each(|piece| self.transfer.is_left_out(piece.at, piece.len));
                self.ignored.get_or_insert(error);
            }
            (ErrorAction::Report | ErrorAction::Ignore, _) => return Err(error),
        }
        Ok(())
    }

    fn show_progress(&self, job: &Job) {
        let left = self.transfer.left_bytes() + self.sent_bytes + self.transfer.unwalked_bytes();
        job.set_progress(self.copied_bytes, self.copied_bytes + left);
    }

    fn housekeeping(&mut self, job: &Job, now: Duration) {
        self.speed.set(now, job.speed());
        if now >= self.next_tick {
            self.tick(now);
        }
        // What waits for a sync of the source waits on while guests may be held: they would wait for it, too.
        let unsynced = self.unsynced || (!self.hurries && self.transfer.has_unsynced());
        let due = now >= self.next_sync || self.transfer.wants_sync();
        if due && unsynced && !self.syncing {
            self.next_sync = now + SYNC_INTERVAL;
            (self.syncing, self.unsynced) = (true, false);
            let transfer = self.transfer.clone();
            let (copied_bytes, given, held) = (self.copied_bytes, transfer.begin_sync(), self.hurries);
            self.in_flight.push(Box::pin(async move {
                let (result, source) =
                    join(transfer.target.sync(&Ctx::FILL), transfer.sync_source(held)).await;
                Done::Synced(result, Box::new(Covered { copied_bytes, given, source }))
            }));
        }
        if now >= self.next_progress {
            self.next_progress = now + PROGRESS_INTERVAL;
            job.tell_progress();
        }
    }

    fn tick(&mut self, now: Duration) {
        let (since, board) = (self.last_tick, self.transfer.source.latency());
        let took = |kind| board.since(kind, since).into_iter().map(|(_, took)| took).collect::<Vec<_>>();
        let seen = Seen {
            misses: Vec::new(),
            reads: took(LatencyKind::Read),
            writes: took(LatencyKind::Write),
            syncs: took(LatencyKind::Sync),
        };
        self.control.tick(now, seen);
        self.pace.set(now, self.control.pace());
        (self.last_tick, self.next_tick) = (now, now + TICK);
    }
}

const _: () = assert!(BLOCK_BYTES <= REQUEST_BYTES_MIN);
