//! What goes wrong outside: the overlay's space ends, the source vanishes, stalls or has changed.

mod common;
#[path = "../src/monitor.rs"]
mod monitor;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{INFILL, Process, fails, run, text, wait_for_socket, wait_until};
use monitor::Monitor;
use serde_json::{Value, json};

const DISK_MIB: u64 = 64;
const EVENT_LIMIT: Duration = Duration::from_secs(60);

/// A daemon with node `d`, exported as `d` on a socket in `dir`.
struct Daemon {
    process: Process,
    monitor: Monitor,
    uri: String,
}

impl Daemon {
    fn start(dir: &Path, blockdev: &Value) -> Daemon {
        let (socket, monitor) = (dir.join("d.sock"), dir.join("monitor"));
        let mut command = Command::new(INFILL);
        command.arg("daemon").args(["--blockdev", &blockdev.to_string()]);
        command.args(["--chardev", &format!("socket,id=m,path={},server=on,wait=off", text(&monitor))]);
        command.args(["--monitor", "chardev=m"]);
        command.args(["--nbd-server", &format!("addr.type=unix,addr.path={}", text(&socket))]);
        command.args(["--export", "type=nbd,id=e,node-name=d,name=d,writable=on"]);
        let process = Process::start(&mut command);
        wait_for_socket(&monitor);
        let monitor = Monitor::connect(&monitor).unwrap();
        wait_for_socket(&socket);
        Daemon { process, monitor, uri: format!("nbd+unix:///d?socket={}", text(&socket)) }
    }

    fn stream(&mut self, on_error: &str) {
        let arguments = json!({"job-id": "j", "device": "d", "on-error": on_error});
        self.monitor.call("block-stream", arguments).unwrap();
    }

    /// The next event of that name.
    fn event(&mut self, name: &str) -> Value {
        loop {
            let event = self.monitor.event(EVENT_LIMIT).unwrap().unwrap_or_else(|| panic!("no {name}"));
            if event["event"] == name {
                return event;
            }
        }
    }

    fn io(&self, command: &str) -> String {
        run("qemu-io", &["-f", "raw", "-c", command, &self.uri])
    }

    /// A request whose answer is not waited for.
    fn begin_io(&self, command: &str) -> Process {
        Process::start(
            Command::new("qemu-io").args(["-f", "raw", "-c", command, &self.uri]).stdout(Stdio::null()),
        )
    }

    fn quit(mut self) {
        self.monitor.call("quit", json!({})).unwrap();
        self.process.wait_for_success();
    }
}

/// A raw base of which every byte is `pattern`.
fn base(dir: &Path, pattern: u8) -> PathBuf {
    let path = dir.join(format!("base-{pattern}.raw"));
    run("qemu-img", &["create", "-q", "-f", "raw", text(&path), &format!("{DISK_MIB}M")]);
    let command = format!("write -P {pattern} 0 {DISK_MIB}M");
    run("qemu-io", &["-f", "raw", "-c", &command, text(&path)]);
    path
}

fn overlay(dir: &Path) -> PathBuf {
    let path = dir.join("overlay.qcow2");
    run(INFILL, &["create", "-q", "-f", "qcow2", text(&path), &format!("{DISK_MIB}M")]);
    path
}

fn on_file(overlay: &Path, base: &Path) -> Value {
    json!({
        "driver": "qcow2", "node-name": "d", "discard": "unmap",
        "file": {"driver": "file", "filename": overlay},
        "backing": {"driver": "raw", "file": {"driver": "file", "filename": base}, "read-only": true}
    })
}

fn on_source(overlay: &Path, source: &Path) -> Value {
    json!({
        "driver": "qcow2", "node-name": "d",
        "file": {"driver": "file", "filename": overlay},
        "backing": {"driver": "nbd", "server": {"type": "unix", "path": source}, "export": "", "read-only": true}
    })
}

fn source(socket: &Path, base: &Path) -> Process {
    let _ = std::fs::remove_file(socket);
    let mut command = Command::new("nbdkit");
    // A rate at which the stream is still under way when it is disturbed.
    command.args(["-f", "-r", "-U", text(socket), "--filter=rate", "file", text(base), "rate=200M"]);
    let process = Process::start(&mut command);
    wait_for_socket(socket);
    process
}

/// Every byte of the overlay alone.
fn holds_alone(overlay: &Path, base: &Path) {
    let info = run("qemu-img", &["info", "--output=json", text(overlay)]);
    assert!(!info.contains("\"backing-filename\""), "{info}");
    run("qemu-img", &["check", "-q", "-f", "qcow2", text(overlay)]);
    run("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", text(overlay), text(base)]);
}

/// A file system of a few MiB, unmounted when this goes.
struct SmallFs(PathBuf);

impl SmallFs {
    fn mount(dir: &Path, size: &str) -> SmallFs {
        let path = dir.join("small");
        std::fs::create_dir(&path).unwrap();
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", text(&path)]);
        SmallFs(path)
    }

    fn grow(&self, size: &str) {
        run("mount", &["-o", &format!("remount,size={size}"), text(&self.0)]);
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l", text(&self.0)]).status();
    }
}

#[test]
fn an_overlay_without_space_keeps_reads_refuses_writes_and_its_stream_goes_on_when_there_is_space() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path(), 0x5a);
    let small = SmallFs::mount(dir.path(), "8m");
    let overlay = overlay(&small.0);
    let mut daemon = Daemon::start(dir.path(), &on_file(&overlay, &base));
    daemon.stream("enospc");
    let event = daemon.event("BLOCK_JOB_ERROR");
    assert_eq!(event["data"]["action"], "stop", "{event}");
    wait_until("the job is paused", || {
        daemon.monitor.call("query-block-jobs", json!({})).unwrap()[0]["io-status"] == "nospace"
    });
    // The guest: reads of everything, no write to a new place, a clear reason.
    daemon.io(&format!("read -P 0x5a 0 {DISK_MIB}M"));
    let why = fails("qemu-io", &["-f", "raw", "-c", "write -P 1 60M 1M", &daemon.uri]);
    assert!(why.contains("No space left"), "{why}");
    daemon.io(&format!("read -P 0x5a 0 {DISK_MIB}M"));
    small.grow("256m");
    daemon.monitor.call("block-job-resume", json!({"device": "j"})).unwrap();
    let event = daemon.event("BLOCK_JOB_COMPLETED");
    assert!(event["data"].get("error").is_none(), "{event}");
    daemon.quit();
    holds_alone(&overlay, &base);
}

#[test]
fn a_source_that_vanishes_holds_only_the_reads_that_need_it_and_everything_goes_on_when_it_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let (base, overlay, socket) = (base(dir.path(), 0x11), overlay(dir.path()), dir.path().join("source"));
    let kit = source(&socket, &base);
    let mut daemon = Daemon::start(dir.path(), &on_source(&overlay, &socket));
    daemon.io("write -P 0x22 1M 64k");
    kit.kill();
    daemon.stream("report");
    let mut held = daemon.begin_io("read -P 0x11 32M 4k");
    // Whole clusters and present data need no source.
    daemon.io("write -P 0x33 8M 64k");
    daemon.io("read -P 0x22 1M 64k");
    daemon.io("read -P 0x33 8M 64k");
    daemon.io("flush");
    assert!(held.0.try_wait().unwrap().is_none(), "a read of absent data was answered without its source");
    let jobs = daemon.monitor.call("query-block-jobs", json!({})).unwrap();
    assert_eq!(jobs[0]["device"], "j", "the stream ended without its source: {jobs}");
    let _kit = source(&socket, &base);
    held.wait_for_success();
    let event = daemon.event("BLOCK_JOB_COMPLETED");
    assert!(event["data"].get("error").is_none(), "{event}");
    daemon.quit();
    run("qemu-io", &["-f", "raw", "-c", "write -P 0x22 1M 64k", "-c", "write -P 0x33 8M 64k", text(&base)]);
    holds_alone(&overlay, &base);
}

#[test]
fn a_source_that_stalls_delays_nothing_that_does_not_need_it() {
    let dir = tempfile::tempdir().unwrap();
    let (base, overlay, socket) = (base(dir.path(), 0x44), overlay(dir.path()), dir.path().join("source"));
    let kit = source(&socket, &base);
    let mut daemon = Daemon::start(dir.path(), &on_source(&overlay, &socket));
    daemon.stream("report");
    wait_until("the stream is under way", || {
        daemon.monitor.call("query-block-jobs", json!({})).unwrap()[0]["offset"].as_u64() > Some(0)
    });
    kit.signal("STOP");
    let mut held = daemon.begin_io("read -P 0x44 63M 4k");
    daemon.io("write -P 0x55 62M 64k");
    daemon.io("read -P 0x55 62M 64k");
    daemon.io("flush");
    // The job answers its manager while its requests are out.
    daemon.monitor.call("block-job-pause", json!({"device": "j"})).unwrap();
    daemon.monitor.call("block-job-resume", json!({"device": "j"})).unwrap();
    kit.signal("CONT");
    held.wait_for_success();
    daemon.event("BLOCK_JOB_COMPLETED");
    daemon.quit();
    run("qemu-io", &["-f", "raw", "-c", "write -P 0x55 62M 64k", text(&base)]);
    holds_alone(&overlay, &base);
}

#[test]
fn a_source_that_comes_back_with_another_size_is_never_read_from() {
    let dir = tempfile::tempdir().unwrap();
    let (good, overlay, socket) = (base(dir.path(), 0x66), overlay(dir.path()), dir.path().join("source"));
    let other = dir.path().join("other.raw");
    run("qemu-img", &["create", "-q", "-f", "raw", text(&other), "32M"]);
    let kit = source(&socket, &good);
    let daemon = Daemon::start(dir.path(), &on_source(&overlay, &socket));
    daemon.io("read -P 0x66 0 4k");
    kit.kill();
    let kit = source(&socket, &other);
    // Held, and never zeroes.
    let mut held = daemon.begin_io("read -P 0x66 1M 4k");
    daemon.io("write -P 0x77 2M 64k");
    daemon.io("read -P 0x77 2M 64k");
    assert!(
        held.0.try_wait().unwrap().is_none(),
        "a source of another size was read from as if it were the same"
    );
    kit.kill();
    let _kit = source(&socket, &good);
    held.wait_for_success();
    daemon.quit();
}

#[test]
fn with_the_option_to_fail_a_read_without_its_source_is_an_error_and_the_rest_works() {
    let dir = tempfile::tempdir().unwrap();
    let (base, socket, disk) = (base(dir.path(), 0x12), dir.path().join("source"), dir.path().join("disk"));
    let kit = source(&socket, &base);
    let overlay = dir.path().join("overlay.qcow2");
    let uri = format!("nbd+unix:///?socket={}", text(&socket));
    run(INFILL, &["create", "-q", "-f", "qcow2", "-b", &uri, "-F", "raw", text(&overlay)]);
    let mut command = Command::new(INFILL);
    command.args(["serve", text(&overlay), "--socket", text(&disk), "--persistent", "--on-lost", "fail"]);
    let mut serve = Process::start(&mut command);
    wait_for_socket(&disk);
    let uri = format!("nbd+unix:///?socket={}", text(&disk));
    run("qemu-io", &["-f", "raw", "-c", "read -P 0x12 0 4k", &uri]);
    kit.kill();
    fails("qemu-io", &["-f", "raw", "-c", "read -P 0x12 1M 4k", &uri]);
    run(
        "qemu-io",
        &["-f", "raw", "-c", "write -P 0x13 2M 64k", "-c", "read -P 0x13 2M 64k", "-c", "flush", &uri],
    );
    serve.signal("TERM");
    serve.wait_for_success();
}
