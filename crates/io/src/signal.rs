//! Signals that ask the process to end.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use compio::driver::op::{Interest, PollOnce};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

/// Completes when SIGTERM, SIGINT or SIGHUP asks the process to end. The signals no longer end it at once from the
/// call on (not from the first poll).
pub fn termination() -> io::Result<impl Future<Output = ()>> {
    let (reader, writer) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        pipe::register(signal, writer.try_clone()?)?;
    }
    let reader = Arc::new(reader);
    Ok(async move {
        let op = PollOnce::new(reader, Interest::Readable);
        let _ = compio::runtime::submit(op).await;
    })
}
