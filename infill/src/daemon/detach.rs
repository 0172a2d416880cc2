//! Going into the background: the process is started once more, apart from its terminal, and the first one ends when the
//! second serves, or with its exit code when it does not come that far.
//!
//! Started anew rather than forked, so that nothing is half copied. The second one tells over its standard input, which
//! is a socket then, that it serves.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

/// In the environment of the second process.
const DETACHED: &str = "INFILL_DETACHED";

/// Which of the two this is.
pub enum Detached {
    /// The first: everything is done.
    First(ExitCode),
    /// The second, which has to tell when it serves.
    Second,
}

/// The second process's duty to tell.
pub struct Ready {
    /// Whether standard error stays where it is.
    pub keep_stderr: bool,
}

/// Begins to go into the background.
pub fn detach() -> Result<Detached> {
    if std::env::var_os(DETACHED).is_some() {
        rustix::process::setsid().context("leaving the session")?;
        return Ok(Detached::Second);
    }
    let (mut told, telling) = UnixStream::pair().context("making a socket")?;
    let program = std::env::current_exe().context("finding this program")?;
    let mut arguments = std::env::args_os();
    let mut command = Command::new(program);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    command.args(arguments).env(DETACHED, "1").stdin(OwnedFd::from(telling));
    let mut second = command.spawn().context("starting the process in the background")?;
    // Its end of the socket, of which this process has a copy.
    drop(command);
    if told.read(&mut [0]).context("waiting for the process in the background")? > 0 {
        return Ok(Detached::First(ExitCode::SUCCESS));
    }
    // It has said why.
    let status = second.wait().context("waiting for the process in the background")?;
    let failed = !status.success();
    Ok(Detached::First(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }))
}

impl Ready {
    /// Tells it, and lets go of the terminal.
    pub fn tell(self) -> Result<()> {
        let socket = rustix::io::dup(rustix::stdio::stdin()).context("duplicating standard input")?;
        let null = std::fs::File::options().read(true).write(true).open("/dev/null");
        let null = null.context("opening /dev/null")?;
        rustix::stdio::dup2_stdin(&null).context("closing standard input")?;
        rustix::stdio::dup2_stdout(&null).context("closing standard output")?;
        if !self.keep_stderr {
            rustix::stdio::dup2_stderr(&null).context("closing standard error")?;
        }
        // Whoever waited may have been killed: that is nothing to this process.
        let _ = UnixStream::from(socket).write_all(b"r");
        Ok(())
    }
}
