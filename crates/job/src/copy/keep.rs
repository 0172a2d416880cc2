//! Old bytes are kept before guests overwrite them: what a backup and a fleecing filter share.

use std::time::Duration;

use futures_util::future::{Either, LocalBoxFuture, select};
use infill_base::{Ctx, ErrorKind, IoError, IoResult, align_down};
use infill_node::{Change, Kept, Watcher};
use infill_storage::rt;
use infill_storage::sync::atomic::{AtomicBool, Ordering};
use infill_storage::sync::{Arc, Mutex, lock};

use super::{Failed, Transfer};
use crate::state::Operation;

/// Watches the source of a [`Transfer`] of the past: a change waits until what it overwrites is on the target.
///
/// A guest never sees an error of the target unless that was asked for: where the old bytes cannot be kept the disk as it was
/// is lost ([`KeepOld::failure`]), and the guest goes on.
#[derive(Debug)]
pub struct KeepOld {
    transfer: Arc<Transfer>,
    on: AtomicBool,
    failure: Mutex<Option<Failed>>,
    /// Whether a guest's write fails where the old bytes cannot be kept, and the disk as it was stays.
    breaks_guest: bool,
    /// How long a guest waits at most for the old bytes to be kept.
    limit: Option<Duration>,
}

impl KeepOld {
    /// Keeps what `transfer` still calls old.
    pub fn new(transfer: Arc<Transfer>, breaks_guest: bool, limit: Option<Duration>) -> KeepOld {
        KeepOld { transfer, on: AtomicBool::new(true), failure: Mutex::default(), breaks_guest, limit }
    }

    /// Nobody wants the old bytes any more: guests that wait go on.
    pub fn end(&self) {
        self.on.store(false, Ordering::SeqCst);
        self.transfer.marked.notify(usize::MAX);
    }

    /// The disk as it was is lost.
    pub fn lose(&self, failed: Failed) {
        lock(&self.failure).get_or_insert(failed);
        // Before a guest goes on: no later process is to take what the target has for the disk as it was.
        self.transfer.end_keeping();
        self.end();
    }

    /// Why the disk as it was is lost, if it is.
    pub fn failure(&self) -> Option<Failed> {
        lock(&self.failure).clone()
    }

    fn is_on(&self) -> bool {
        self.on.load(Ordering::SeqCst)
    }

    async fn ended(&self) {
        loop {
            let changed = self.transfer.marked.listen();
            if !self.is_on() {
                return;
            }
            changed.await;
        }
    }

    async fn copy(&self, cx: &Ctx, at: u64, len: u64) -> Result<(), Failed> {
        let copying = self.transfer.copy(cx, at, len);
        let Some(limit) = self.limit else { return copying.await };
        rt::timeout(limit, copying).await.unwrap_or_else(|| {
            let why = format!("it took longer than {limit:?} to keep what a write would overwrite");
            let error = IoError::new(ErrorKind::TimedOut, why).at(at, len);
            Err(Failed { operation: Operation::Write, error })
        })
    }

    /// Copies what is old of a range.
    async fn keep(&self, cx: &Ctx, at: u64, end: u64) -> IoResult<Kept> {
        let copying = std::pin::pin!(self.copy(cx, at, end - at));
        let ended = std::pin::pin!(self.ended());
        match select(copying, ended).await {
            Either::Left((Err(failed), _)) if self.breaks_guest => Err(told(failed)),
            Either::Left((Err(failed), _)) => {
                self.lose(failed);
                Ok(None)
            }
            Either::Left((Ok(()), _)) | Either::Right(_) => Ok(None),
        }
    }
}

/// What a guest is told whose write was refused.
fn told(failed: Failed) -> IoError {
    let Failed { error, .. } = failed;
    IoError::new(error.kind(), "what the write would overwrite could not be kept").caused_by(error)
}

impl Watcher for KeepOld {
    fn before<'a>(&'a self, cx: &'a Ctx, change: &'a Change) -> Option<LocalBoxFuture<'a, IoResult<Kept>>> {
        let unit = self.transfer.unit();
        let at = align_down(change.at, unit);
        let end = change.at.saturating_add(change.len).min(self.transfer.len);
        let end = end.next_multiple_of(unit).min(self.transfer.len);
        // What is not old is on the target already: a block is taken out only when it is.
        if !self.is_on() || at >= end || !self.transfer.has_old(at, end) {
            return None;
        }
        Some(Box::pin(self.keep(cx, at, end)))
    }
}
