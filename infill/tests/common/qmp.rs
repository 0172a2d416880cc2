//! A QMP client and daemons to talk to: ours, and the real one as referee.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use super::common::{INFILL, Process, text, wait_for_socket, wait_until};

/// Which daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// The one under test.
    Infill,
    /// The referee.
    Qemu,
}

impl Program {
    /// Its command, without options.
    pub fn command(self) -> Command {
        match self {
            Program::Infill => {
                let mut command = Command::new(INFILL);
                command.arg("daemon");
                command
            }
            Program::Qemu => Command::new("qemu-storage-daemon"),
        }
    }
}

/// How long an answer or event may take. A limit against hangs, not a promise.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A client of one monitor.
pub struct Qmp {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    /// Events that came and were not looked at.
    events: VecDeque<Value>,
    /// Every event that came, in order.
    pub seen: Vec<Value>,
}

impl Qmp {
    /// Connects and reads the greeting.
    pub fn greeted(socket: &Path) -> (Qmp, Value) {
        // The competitor serves one client at a time, and turns others away: whoever looked whether it listens may not
        // be gone yet.
        let mut greeted = None;
        wait_until("the monitor greets", || {
            greeted = Qmp::try_greeted(socket);
            greeted.is_some()
        });
        greeted.expect("it has greeted")
    }

    fn try_greeted(socket: &Path) -> Option<(Qmp, Value)> {
        let stream = UnixStream::connect(socket).ok()?;
        stream.set_read_timeout(Some(ANSWER_LIMIT)).unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        let mut qmp = Qmp { stream, reader, events: VecDeque::new(), seen: Vec::new() };
        qmp.reader.fill_buf().ok()?;
        let greeting = qmp.message()?;
        Some((qmp, greeting))
    }

    /// Connects and negotiates.
    pub fn connect(socket: &Path) -> Qmp {
        // Turned away only after the greeting, too.
        let mut connected = None;
        wait_until("the monitor negotiates", || {
            let (mut qmp, _) = Qmp::greeted(socket);
            let asked = qmp.stream.write_all(b"{\"execute\": \"qmp_capabilities\"}\n");
            let mut answer = String::new();
            if asked.is_err() || qmp.reader.read_line(&mut answer).is_err() || answer.is_empty() {
                return false;
            }
            let answer: Value = serde_json::from_str(&answer).unwrap();
            assert_eq!(answer, json!({"return": {}}));
            connected = Some(qmp);
            true
        });
        connected.expect("it has negotiated")
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// What comes, as it comes.
    pub fn reader(&mut self) -> &mut impl BufRead {
        &mut self.reader
    }

    /// The connection, for whoever sends or reads beside this.
    pub fn sender(&self) -> UnixStream {
        self.stream.try_clone().unwrap()
    }

    /// The next message; `None` at the end.
    pub fn message(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.reader.read_line(&mut line).expect("a message in time");
        if line.is_empty() {
            return None;
        }
        assert!(line.ends_with("\r\n") && line.is_ascii(), "a line of ASCII: {line:?}");
        Some(serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}")))
    }

    /// The next message that is no event; events are kept.
    pub fn answer(&mut self) -> Value {
        loop {
            let message = self.message().expect("an answer before the end");
            if message.get("event").is_none() {
                return message;
            }
            self.keep(message);
        }
    }

    fn keep(&mut self, event: Value) {
        self.seen.push(event.clone());
        self.events.push_back(event);
    }

    /// Executes a command and gives the whole answer.
    pub fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments});
        self.send(format!("{request}\n").as_bytes());
        self.answer()
    }

    /// Executes a command that must succeed.
    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        let mut answer = self.ask(command, arguments.clone());
        assert!(answer.get("return").is_some(), "{command} {arguments}: {answer}");
        answer["return"].take()
    }

    /// Executes a command that must fail, and gives its error.
    pub fn refused(&mut self, command: &str, arguments: Value) -> Value {
        let mut answer = self.ask(command, arguments.clone());
        assert!(answer.get("error").is_some(), "{command} {arguments}: {answer}");
        answer["error"].take()
    }

    /// The next event that `wanted` takes; others before it are dropped.
    pub fn event(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        loop {
            while let Some(event) = self.events.pop_front() {
                if wanted(&event) {
                    return event;
                }
            }
            let message = self.message().expect("an event before the end");
            assert!(message.get("event").is_some(), "an answer to nothing: {message}");
            self.keep(message);
        }
    }

    /// Waits for the event of that name.
    pub fn wait_for(&mut self, name: &str) -> Value {
        self.event(|event| event["event"] == name)
    }

    /// Waits until a job has reached a state.
    pub fn wait_for_status(&mut self, status: &str) {
        self.event(|event| event["event"] == "JOB_STATUS_CHANGE" && event["data"]["status"] == status);
    }
}

/// A daemon with a monitor.
pub struct Daemon {
    /// Its process.
    pub process: Process,
    /// Its monitor's socket.
    pub socket: std::path::PathBuf,
}

impl Daemon {
    /// Starts it with a monitor in `dir`, and `options` behind that.
    pub fn start(program: Program, dir: &Path, options: &[&str]) -> Daemon {
        Daemon::start_by(program, program.command(), dir, options)
    }

    /// As [`Daemon::start`], by a command of the caller's.
    pub fn start_by(program: Program, mut command: Command, dir: &Path, options: &[&str]) -> Daemon {
        let socket = dir.join("monitor.sock");
        let chardev = format!("socket,id=monitor,path={},server=on,wait=off", text(&socket));
        command.args(["--chardev", &chardev, "--monitor", "chardev=monitor"]).args(options);
        let process = Process::start(&mut command);
        match program {
            Program::Infill => wait_for_socket(&socket),
            // It crashes now and then when somebody comes and goes while it starts.
            Program::Qemu => wait_until("the competitor makes its monitor", || socket.exists()),
        }
        Daemon { process, socket }
    }

    /// A client of its monitor.
    pub fn connect(&self) -> Qmp {
        Qmp::connect(&self.socket)
    }

    /// Has it end by `quit`.
    pub fn quit(mut self, qmp: &mut Qmp) {
        qmp.run("quit", json!({}));
        self.process.wait_for_success();
    }
}
