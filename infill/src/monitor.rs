//! A client of a running daemon's monitor, for commands that ask and wait: blocking, one connection.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long the daemon may take to answer a command.
const ANSWER_TIME: Duration = Duration::from_secs(60);
/// Events that are kept while nobody asks for them; the oldest go first.
const EVENTS_KEPT_MAX: usize = 4096;

/// A connection that has negotiated.
pub struct Monitor {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    /// The beginning of a line whose rest has not come yet.
    partial: Vec<u8>,
    events: VecDeque<Value>,
}

impl Monitor {
    /// Connects to the monitor's socket file.
    pub fn connect(path: &Path) -> Result<Monitor> {
        let stream = UnixStream::connect(path).with_context(|| {
            format!(
                "no daemon's monitor at {}: is it running, with a --chardev socket there?",
                path.display()
            )
        })?;
        let reader = BufReader::new(stream.try_clone()?);
        let mut monitor = Monitor { reader, writer: stream, partial: Vec::new(), events: VecDeque::new() };
        let greeting =
            monitor.message(Instant::now() + ANSWER_TIME)?.context("the monitor does not greet")?;
        if greeting.get("QMP").is_none() {
            bail!("{} is not a QMP monitor: it says {greeting}", path.display());
        }
        monitor.call("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Runs a command and gives what it returns. Events that come in between are kept.
    pub fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.writer, "{line}").context("the daemon has closed its monitor")?;
        let end = Instant::now() + ANSWER_TIME;
        loop {
            let Some(mut message) = self.message(end)? else {
                bail!("the daemon has not answered {command} for {} s", ANSWER_TIME.as_secs());
            };
            if let Some(error) = message.get("error") {
                bail!("{}", error["desc"].as_str().unwrap_or("the daemon refuses without a reason"));
            }
            match message.get_mut("return") {
                Some(value) => return Ok(value.take()),
                None => self.keep(message),
            }
        }
    }

    /// The next event, if one comes within `patience`.
    pub fn event(&mut self, patience: Duration) -> Result<Option<Value>> {
        match self.events.pop_front() {
            Some(event) => Ok(Some(event)),
            None => self.message(Instant::now() + patience),
        }
    }

    fn keep(&mut self, event: Value) {
        if self.events.len() == EVENTS_KEPT_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// The next message, if it is whole before `end`.
    fn message(&mut self, end: Instant) -> Result<Option<Value>> {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            // A time limit of nothing would mean none.
            self.reader.get_ref().set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            match self.reader.read_until(b'\n', &mut self.partial) {
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let line = std::mem::take(&mut self.partial);
                    let message = serde_json::from_slice(&line);
                    return message.context("the monitor says something that is not JSON").map(Some);
                }
                Ok(_) => bail!("the daemon has closed its monitor: it has ended"),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Ok(None);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("the daemon's monitor cannot be read"),
            }
        }
    }
}
