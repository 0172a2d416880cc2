//! What a process leaves behind when it is killed: its rings are taken down by the kernel a moment after its end, and until
//! then they keep its files open, with their locks, and its sockets listening. Whoever starts it anew at once must not be refused
//! for that.

use std::future::Future;
use std::time::{Duration, Instant};

use infill_storage::rt;

/// How long it may take; who asks in vain for what a living process has is told so after this time. Some milliseconds on a
/// machine that has nothing else to do.
pub(crate) const TIME: Duration = Duration::from_secs(2);
/// How often it is looked, at first and at last.
pub(crate) const LOOK: Duration = Duration::from_millis(5);
const LOOK_MAX: Duration = Duration::from_millis(100);

/// Tries again while `attempt` finds it `taken`, which blocks the thread.
pub(crate) fn retry<T, E>(
    mut attempt: impl FnMut() -> Result<T, E>,
    taken: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let end = Instant::now() + TIME;
    loop {
        match attempt() {
            Err(error) if taken(&error) && Instant::now() < end => std::thread::sleep(LOOK),
            result => return result,
        }
    }
}

/// Tries again while `attempt` finds it `taken`, and holds up nobody.
pub async fn patiently<T, E, F: Future<Output = Result<T, E>>>(
    attempt: impl Fn() -> F,
    taken: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let (end, mut pause) = (rt::now() + TIME, LOOK);
    loop {
        match attempt().await {
            Err(error) if taken(&error) && rt::now() < end => rt::sleep(pause).await,
            result => return result,
        }
        pause = (pause * 2).min(LOOK_MAX);
    }
}
