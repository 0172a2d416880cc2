//! What the tests of the program share: processes that end with their guard, and waits with a limit.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// How long a server may take until its socket is there, and until it has ended. A limit against hangs, not a promise.
pub const SERVER_LIMIT: Duration = Duration::from_secs(60);
/// How often a wait looks.
const LOOK: Duration = Duration::from_millis(10);

/// The program under test.
pub const INFILL: &str = env!("CARGO_BIN_EXE_infill");

/// A process that is killed when this goes.
pub struct Process(pub Child);

impl Process {
    /// Starts it without standard input.
    pub fn start(command: &mut Command) -> Process {
        let child = command.stdin(Stdio::null()).spawn();
        Process(child.unwrap_or_else(|error| panic!("{}: {error}", hint(&format!("{command:?}")))))
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Sends a signal (`TERM`, `STOP`, …).
    pub fn signal(&self, name: &str) {
        run("kill", &[&format!("-{name}"), &self.id().to_string()]);
    }

    /// `kill -9`, and gone.
    pub fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    /// Ends it in order, which must be a success, or by `kill -9`.
    pub fn end(mut self, in_order: bool) {
        if in_order {
            self.signal("TERM");
            self.wait_for_success();
        } else {
            self.kill();
        }
    }

    /// Waits for its end, which must be a success.
    pub fn wait_for_success(&mut self) {
        let mut ended = None;
        wait_until("the process ends", || {
            ended = self.0.try_wait().unwrap();
            ended.is_some()
        });
        let status = ended.unwrap();
        assert!(status.success(), "it ended with {status}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn hint(program: &str) -> String {
    format!("cannot run {program}: `cargo xtask test --install` installs what the tests need")
}

/// Runs a command to its end.
///
/// A killed daemon's image stays locked until the kernel has taken its ring down, a little after the process is gone: QEMU's
/// tools, which refuse a locked image before they do anything, are run again.
pub fn output(program: &str, args: &[&str]) -> Output {
    let end = Instant::now() + SERVER_LIMIT;
    loop {
        let output = output_once(program, args);
        if !program.starts_with("qemu-") || !says_locked(&output) || Instant::now() >= end {
            return output;
        }
        std::thread::sleep(LOOK);
    }
}

/// Runs a command to its end once: an image that is locked is what the test wants to see.
pub fn output_once(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    output.unwrap_or_else(|error| panic!("{}: {error}", hint(program)))
}

fn says_locked(output: &Output) -> bool {
    let said = String::from_utf8_lossy(&output.stderr);
    !output.status.success() && said.contains("Failed to get") && said.contains("lock")
}

/// Runs a command, which must succeed, and gives what it printed.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = output(program, args);
    let (text, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {}\n{text}\n{error}", output.status);
    text.into_owned()
}

/// Runs a command, which must fail, and gives what it said.
pub fn fails(program: &str, args: &[&str]) -> String {
    let output = output(program, args);
    assert!(!output.status.success(), "{program} {args:?} succeeds");
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Waits for a condition of another process, with a limit.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + SERVER_LIMIT;
    while !condition() {
        assert!(Instant::now() < end, "not in time: {what}");
        std::thread::sleep(LOOK);
    }
}

/// Waits until somebody listens at a socket file.
pub fn wait_for_socket(path: &Path) {
    wait_until(&format!("a server at {}", path.display()), || UnixStream::connect(path).is_ok());
}

/// A TCP port that nobody listens at, and that the kernel gives to no connection by itself.
///
/// Of those that it does give (from 32768 on) one can be a client's of another test before the daemon has it.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    const FIRST: u16 = 20_000;
    const PORTS: u16 = 12_000;
    // Test programs that run side by side begin at different places.
    let start = (std::process::id() as u16 % PORTS) / 16 * 16;
    loop {
        let at = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % PORTS;
        if std::net::TcpListener::bind(("127.0.0.1", FIRST + at)).is_ok() {
            return FIRST + at;
        }
    }
}

/// Numbers that look random, the same in every run of a seed.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// A seed that is told, so that a failure can be repeated with `INFILL_SEED`.
pub fn seed() -> u64 {
    let given = std::env::var("INFILL_SEED").ok().map(|seed| seed.parse().expect("a number"));
    let seed = given.unwrap_or_else(|| u64::from(std::process::id()) * 2_654_435_761 + 1);
    println!("INFILL_SEED={seed}");
    seed
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a test's path is UTF-8")
}

/// The checksum of a file.
pub fn sha256(path: &Path) -> String {
    run("sha256sum", &[text(path)]).split(' ').next().unwrap_or_default().to_owned()
}
