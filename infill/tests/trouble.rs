//! What goes wrong outside: the overlay's space ends, the source vanishes, stalls or has changed.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use bytes::BytesMut;
use common::{INFILL, Process, fails, output, run, text, wait_for_socket, wait_until};
use infill_nbd::proto::{
    Chunk, ClientFlags, ExportInfo, Greeting, HandshakeFlags, Info, Mode, OptionError, OptionHeader,
    OptionReply, OptionRequest, ProtocolError, ReplyFlags, ReplyHeader, RequestHeader, TransmissionFlags,
};
use qmp::{Program, Qmp};
use serde_json::{Value, json};

const DISK_MIB: u64 = 64;
/// How often a server answers short before it behaves: more than any client would call a mishap.
const SHORT_ANSWERS: usize = 10;

/// A daemon with node `d`, exported as `d` on a socket in `dir`.
struct Daemon {
    daemon: qmp::Daemon,
    monitor: Qmp,
    uri: String,
}

impl Daemon {
    fn start(dir: &Path, blockdev: &Value) -> Daemon {
        let socket = dir.join("d.sock");
        let options = [
            "--blockdev",
            &blockdev.to_string(),
            "--nbd-server",
            &format!("addr.type=unix,addr.path={}", text(&socket)),
            "--export",
            "type=nbd,id=e,node-name=d,name=d,writable=on",
        ];
        let daemon = qmp::Daemon::start(Program::Infill, dir, &options);
        let monitor = daemon.connect();
        wait_for_socket(&socket);
        Daemon { daemon, monitor, uri: format!("nbd+unix:///d?socket={}", text(&socket)) }
    }

    fn stream(&mut self, on_error: &str) {
        let arguments = json!({"job-id": "j", "device": "d", "on-error": on_error});
        self.monitor.run("block-stream", arguments);
    }

    /// The stream's end, which must be a success.
    fn streamed(&mut self) {
        let event = self.monitor.wait_for("BLOCK_JOB_COMPLETED");
        assert!(event["data"].get("error").is_none(), "{event}");
    }

    fn jobs(&mut self) -> Value {
        self.monitor.run("query-block-jobs", json!({}))
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
        self.daemon.quit(&mut self.monitor);
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

/// A server that agrees on everything, and then answers every read with half of it: three times as if that were all,
/// the fourth time it hangs up behind it.
struct ShortServer {
    answers: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl ShortServer {
    fn start(socket: &Path) -> ShortServer {
        let listener = UnixListener::bind(socket).unwrap();
        let (answers, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let thread = std::thread::spawn({
            let (answers, over) = (answers.clone(), over.clone());
            move || {
                while !over.load(Ordering::Relaxed) {
                    let (stream, _) = listener.accept().unwrap();
                    // It ends as the client leaves, or as it hangs up on it.
                    let _ = answer_short(stream, &answers);
                }
            }
        });
        ShortServer { answers, over, thread }
    }

    fn answers(&self) -> usize {
        self.answers.load(Ordering::Relaxed)
    }

    /// Nobody listens any more.
    fn end(self, socket: &Path) {
        self.over.store(true, Ordering::Relaxed);
        // Wakes it.
        let _ = UnixStream::connect(socket);
        self.thread.join().unwrap();
    }
}

/// Serves one client; `None` when it has gone.
fn answer_short(mut stream: UnixStream, answers: &AtomicUsize) -> Option<()> {
    let (mut buf, mut out) = (BytesMut::new(), BytesMut::new());
    Greeting { flags: HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES }.encode(&mut out);
    say(&mut stream, &mut out)?;
    receive(&mut stream, &mut buf, ClientFlags::decode)?;
    loop {
        let header = receive(&mut stream, &mut buf, OptionHeader::decode)?;
        let len = header.len as usize;
        let data = receive(&mut stream, &mut buf, |buf| Ok((buf.len() >= len).then(|| buf.split_to(len))))?;
        let request = OptionRequest::decode(header.option, &data).ok()?;
        let (reply, agreed) = match request {
            OptionRequest::StructuredReply => (OptionReply::Ack, false),
            OptionRequest::Info { go: true, .. } => {
                let info = ExportInfo { size: DISK_MIB << 20, flags: TransmissionFlags::HAS_FLAGS };
                OptionReply::Info(Info::Export(info)).encode(header.option, &mut out);
                (OptionReply::Ack, true)
            }
            _ => (OptionReply::Error { error: OptionError::Unsupported, message: String::new() }, false),
        };
        reply.encode(header.option, &mut out);
        say(&mut stream, &mut out)?;
        if agreed {
            break;
        }
    }
    let mode = Mode::Structured;
    loop {
        let request = receive(&mut stream, &mut buf, |buf| RequestHeader::decode(mode, buf))?;
        let half = vec![0; request.len as usize / 2];
        let mut payload = BytesMut::new();
        let kind =
            Chunk::Data { offset: request.offset, data: half.clone().into() }.encode(mode, &mut payload);
        payload.extend_from_slice(&half);
        let hang_up = answers.fetch_add(1, Ordering::Relaxed) % 4 == 3;
        let told = if hang_up { request.len + 8 } else { payload.len() as u64 };
        let flags = ReplyFlags::DONE;
        let header =
            ReplyHeader::Chunk { flags, kind, cookie: request.cookie, offset: request.offset, len: told };
        header.encode(mode, &mut out);
        out.extend_from_slice(&payload);
        say(&mut stream, &mut out)?;
        if hang_up {
            return None;
        }
    }
}

fn say(stream: &mut UnixStream, out: &mut BytesMut) -> Option<()> {
    stream.write_all(&out.split()).ok()
}

/// The next message; `None` when the client has gone.
fn receive<T>(
    stream: &mut UnixStream,
    buf: &mut BytesMut,
    decode: impl Fn(&mut BytesMut) -> Result<Option<T>, ProtocolError>,
) -> Option<T> {
    loop {
        if let Some(message) = decode(buf).unwrap() {
            return Some(message);
        }
        let mut piece = [0; 4096];
        match stream.read(&mut piece) {
            Ok(0) | Err(_) => return None,
            Ok(len) => buf.extend_from_slice(&piece[..len]),
        }
    }
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
    let event = daemon.monitor.wait_for("BLOCK_JOB_ERROR");
    assert_eq!(event["data"]["action"], "stop", "{event}");
    wait_until("the job is paused", || daemon.jobs()[0]["io-status"] == "nospace");
    // The guest: reads of everything, no write to a new place, a clear reason.
    daemon.io(&format!("read -P 0x5a 0 {DISK_MIB}M"));
    let why = fails("qemu-io", &["-f", "raw", "-c", "write -P 1 60M 1M", &daemon.uri]);
    assert!(why.contains("No space left"), "{why}");
    daemon.io(&format!("read -P 0x5a 0 {DISK_MIB}M"));
    small.grow("256m");
    daemon.monitor.run("block-job-resume", json!({"device": "j"}));
    daemon.streamed();
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
    let jobs = daemon.jobs();
    assert_eq!(jobs[0]["device"], "j", "the stream ended without its source: {jobs}");
    let _kit = source(&socket, &base);
    held.wait_for_success();
    daemon.streamed();
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
    wait_until("the stream is under way", || daemon.jobs()[0]["offset"].as_u64() > Some(0));
    kit.signal("STOP");
    let mut held = daemon.begin_io("read -P 0x44 63M 4k");
    daemon.io("write -P 0x55 62M 64k");
    daemon.io("read -P 0x55 62M 64k");
    daemon.io("flush");
    // The job answers its manager while its requests are out.
    daemon.monitor.run("block-job-pause", json!({"device": "j"}));
    daemon.monitor.run("block-job-resume", json!({"device": "j"}));
    kit.signal("CONT");
    held.wait_for_success();
    daemon.streamed();
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
fn a_source_that_answers_short_again_and_again_holds_reads_until_it_behaves_and_its_stream_ends() {
    let dir = tempfile::tempdir().unwrap();
    let (base, overlay, socket) = (base(dir.path(), 0x19), overlay(dir.path()), dir.path().join("source"));
    let short = ShortServer::start(&socket);
    let mut daemon = Daemon::start(dir.path(), &on_source(&overlay, &socket));
    daemon.stream("report");
    let mut held = daemon.begin_io("read -P 0x19 32M 4k");
    daemon.io("write -P 0x29 8M 64k");
    daemon.io("read -P 0x29 8M 64k");
    wait_until("the source has answered short often", || short.answers() >= SHORT_ANSWERS);
    assert!(held.0.try_wait().unwrap().is_none(), "half an answer was taken for one, or for an error");
    let jobs = daemon.jobs();
    assert_eq!(jobs[0]["device"], "j", "the stream ended without its source: {jobs}");
    short.end(&socket);
    let _kit = source(&socket, &base);
    held.wait_for_success();
    daemon.streamed();
    daemon.quit();
    run("qemu-io", &["-f", "raw", "-c", "write -P 0x29 8M 64k", text(&base)]);
    holds_alone(&overlay, &base);
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

/// An L2 table that lies where none can: the request fails, and the manager is told once, of the node that it is about.
#[test]
fn a_manager_is_told_once_of_an_image_that_contradicts_itself() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| text(&dir.path().join(name)).to_owned();
    let (base, top) = (path("base.qcow2"), path("top.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", &base, "1M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 64k", &base]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top]);
    let mut bytes = std::fs::read(&base).unwrap();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    bytes[l1..l1 + 8].copy_from_slice(&0x2a2a_2a00_u64.to_be_bytes());
    std::fs::write(&base, &bytes).unwrap();
    let daemon = qmp::Daemon::start(Program::Infill, dir.path(), &[]);
    let mut qmp = daemon.connect();
    let file = |name: &str| json!({"driver": "file", "filename": name});
    let below = json!({"driver": "qcow2", "node-name": "below", "read-only": true, "file": file(&base)});
    qmp.run("blockdev-add", below);
    let above = json!({"driver": "qcow2", "node-name": "above", "backing": "below", "file": file(&top)});
    qmp.run("blockdev-add", above);
    let socket = path("nbd.sock");
    qmp.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
    qmp.run("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "above", "name": "disk"}));
    let uri = format!("nbd+unix:///disk?socket={socket}");
    for _ in 0..2 {
        let read = output("qemu-io", &["-r", "-f", "raw", "-c", "read 0 4k", &uri]);
        assert!(String::from_utf8_lossy(&read.stdout).contains("Input/output error"), "{read:?}");
    }
    let event = qmp.wait_for("BLOCK_IMAGE_CORRUPTED");
    let data = &event["data"];
    assert_eq!(
        (&data["node-name"], &data["device"], &data["fatal"]),
        (&json!("below"), &json!(""), &json!(false)),
        "{data}"
    );
    qmp.run("query-block", json!({}));
    let told = qmp.seen.iter().filter(|event| event["event"] == "BLOCK_IMAGE_CORRUPTED").count();
    assert_eq!(told, 1, "{:?}", qmp.seen);
}
