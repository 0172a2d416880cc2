//! What a process leaves behind when it is killed: its rings are taken down by the kernel a moment after its end, and until
//! then they keep its files open, with their locks, and its sockets listening. Whoever starts it anew at once must not be refused
//! for that.

use std::time::{Duration, Instant};

use infill_storage::rt;

/// How long it may take; who asks in vain for what a living process has is told so after this time. Some milliseconds on a
/// machine that has nothing else to do.
pub(crate) const TIME: Duration = Duration::from_secs(2);
/// How often it is looked.
pub(crate) const LOOK: Duration = Duration::from_millis(5);

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

/// Waits while something `is_taken`.
pub(crate) async fn wait_while(is_taken: impl Fn() -> bool) {
    let end = rt::now() + TIME;
    while is_taken() && rt::now() < end {
        rt::sleep(LOOK).await;
    }
}
