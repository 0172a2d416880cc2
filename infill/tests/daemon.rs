//! The daemon's life: monitors of every kind, clients, signals, the pid file, and input that nobody would send.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::Stdio;

use common::{Process, free_port, run, text, wait_for_socket, wait_until};
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

/// Size of the test's disks, in bytes.
const DISK_BYTES: usize = 1 << 20;

/// A raw image with data.
fn image(dir: &Path) -> String {
    let path = dir.join("disk.raw");
    let data: Vec<u8> = (0..DISK_BYTES).map(|at| (at / 512 + at) as u8).collect();
    std::fs::write(&path, data).unwrap();
    text(&path).to_owned()
}

fn node(image: &str) -> String {
    format!("raw,node-name=disk,file.driver=file,file.filename={image}")
}

#[test]
fn what_clients_of_an_export_write_is_in_the_image_when_the_daemon_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let (socket, pidfile) = (dir.path().join("nbd.sock"), dir.path().join("pid"));
    let uri = format!("nbd+unix:///disk?socket={}", text(&socket));
    let mut daemon = Daemon::start(
        Program::Infill,
        dir.path(),
        &[
            "--blockdev",
            &node(&image),
            "--nbd-server",
            &format!("addr.type=unix,addr.path={}", text(&socket)),
            "--export",
            "nbd,id=e0,node-name=disk,writable=on",
            "--pidfile",
            text(&pidfile),
        ],
    );
    assert_eq!(std::fs::read_to_string(&pidfile).unwrap(), format!("{}\n", daemon.process.id()));
    let copy = dir.path().join("copy");
    run("nbdcopy", &[&uri, text(&copy)]);
    assert_eq!(std::fs::read(&copy).unwrap(), std::fs::read(&image).unwrap());
    run("qemu-io", &["-f", "raw", "-t", "writeback", "-c", "write -P 90 64k 64k", &uri]);
    daemon.process.signal("TERM");
    daemon.process.wait_for_success();
    run("qemu-io", &["-f", "raw", "-c", "read -P 90 64k 64k", &image]);
    assert!(!pidfile.exists() && !socket.exists(), "what the daemon made is gone with it");
}

#[test]
fn a_client_that_is_connected_does_not_keep_the_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let mut daemon = Daemon::start(Program::Infill, dir.path(), &["--blockdev", &node(&image)]);
    let mut qmp = daemon.connect();
    let socket = dir.path().join("nbd.sock");
    qmp.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
    qmp.run("block-export-add", json!({"type": "nbd", "id": "e0", "node-name": "disk", "writable": true}));
    let uri = format!("nbd+unix:///disk?socket={}", text(&socket));
    let mut client = std::process::Command::new("qemu-io")
        .args(["-f", "raw", &uri])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    client.stdin.as_mut().unwrap().write_all(b"write -P 1 0 4k\n").unwrap();
    let mut told = BufReader::new(client.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("wrote 4096") {
        line.clear();
        assert!(told.read_line(&mut line).unwrap() > 0, "the client ended");
    }
    let safe = qmp.refused("block-export-del", json!({"id": "e0"}));
    assert_eq!(safe, json!({"class": "GenericError", "desc": "export 'e0' still in use"}));
    assert_eq!(qmp.run("query-block-exports", json!({}))[0]["shutting-down"], json!(false));
    qmp.run("block-export-del", json!({"id": "e0", "mode": "hard"}));
    qmp.event(|event| event["event"] == "BLOCK_EXPORT_DELETED" && event["data"]["id"] == "e0");
    qmp.run("blockdev-del", json!({"node-name": "disk"}));
    daemon.process.signal("TERM");
    daemon.process.wait_for_success();
    drop(Process(client));
}

#[test]
fn monitors_have_their_own_answers_and_the_same_events() {
    let dir = tempfile::tempdir().unwrap();
    let daemon =
        Daemon::start(Program::Infill, dir.path(), &["--blockdev", "null-co,node-name=n,size=65536"]);
    let (mut one, mut two) = (daemon.connect(), daemon.connect());
    // Not negotiated: it is told nothing.
    let (mut quiet, _) = Qmp::greeted(&daemon.socket);
    one.run("block-stream", json!({"job-id": "j", "device": "n"}));
    for qmp in [&mut one, &mut two] {
        qmp.wait_for("BLOCK_JOB_COMPLETED");
        qmp.wait_for_status("null");
        assert_eq!(qmp.run("query-jobs", json!({})), json!([]));
    }
    quiet.send(b"{\"execute\":\"qmp_capabilities\",\"id\":1}");
    assert_eq!(quiet.message(), Some(json!({"return": {}, "id": 1})));
    daemon.quit(&mut two);
    assert_eq!(one.message(), None);
}

#[test]
fn a_monitor_that_does_not_read_its_events_is_cut_off_and_stalls_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let daemon =
        Daemon::start(Program::Infill, dir.path(), &["--blockdev", "null-co,node-name=n,size=65536"]);
    let (mut deaf, mut busy) = (daemon.connect(), daemon.connect());
    // Far more events than the kernel and the daemon keep for one that does not read.
    for _ in 0..4000 {
        busy.run("block-stream", json!({"job-id": "j", "device": "n"}));
        busy.wait_for_status("null");
    }
    let mut told = 0;
    let mut line = Vec::new();
    while let Some(message) = read_line(&mut deaf, &mut line) {
        assert!(message.get("event").is_some(), "{message}");
        told += 1;
    }
    assert!(told > 0 && told < busy.seen.len(), "{told} of {}", busy.seen.len());
    daemon.quit(&mut busy);
}

/// The next whole message; `None` at the end, in the middle of a line or not.
fn read_line(qmp: &mut Qmp, line: &mut Vec<u8>) -> Option<Value> {
    line.clear();
    let _end_or_reset = qmp.reader().read_until(b'\n', line);
    if line.ends_with(b"\n") { Some(serde_json::from_slice(line).unwrap()) } else { None }
}

#[test]
fn a_monitor_that_asks_without_reading_stops_itself_alone() {
    const QUESTIONS: usize = 3000;
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(Program::Infill, dir.path(), &[]);
    let (mut eager, mut other) = (daemon.connect(), daemon.connect());
    let mut sender = eager.sender();
    let asking = std::thread::spawn(move || {
        for nth in 0..QUESTIONS {
            let question = format!("{{\"execute\":\"query-commands\",\"id\":{nth}}}\n");
            sender.write_all(question.as_bytes()).unwrap();
        }
    });
    for _ in 0..100 {
        other.run("query-jobs", json!({}));
    }
    for nth in 0..QUESTIONS {
        assert_eq!(eager.answer()["id"], json!(nth));
    }
    asking.join().unwrap();
    daemon.quit(&mut other);
}

#[test]
fn noise_ends_no_monitor_and_no_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(Program::Infill, dir.path(), &[]);
    let mut random = 0x9e3779b97f4a7c15_u64;
    for round in 0..20 {
        let mut noisy = daemon.connect();
        let mut reader = noisy.sender();
        let drain = std::thread::spawn(move || {
            let mut sink = Vec::new();
            let _end_or_reset = reader.read_to_end(&mut sink);
        });
        let alphabet = b"{}[]:,\"'\\ \n0123456789.eE+-truefalsn\x00\x01\xff\xc3\xa9execute";
        let noise: Vec<u8> = (0..20_000)
            .map(|_| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                if round % 2 == 0 { random as u8 } else { alphabet[random as usize % alphabet.len()] }
            })
            .collect();
        noisy.send(&noise);
        noisy.sender().shutdown(std::net::Shutdown::Write).unwrap();
        drain.join().unwrap();
    }
    let mut qmp = daemon.connect();
    assert_eq!(qmp.run("query-block", json!({})), json!([]));
    daemon.quit(&mut qmp);
}

#[test]
fn a_monitor_on_standard_input_and_output_may_end_before_the_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let pidfile = dir.path().join("pid");
    let mut command = Program::Infill.command();
    command.args(["--chardev", "stdio,id=m", "--monitor", "m", "--pidfile", text(&pidfile)]);
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut process = Process(child);
    let mut input = process.0.stdin.take().unwrap();
    let mut output = BufReader::new(process.0.stdout.take().unwrap());
    let mut message = || {
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        serde_json::from_str::<Value>(&line).unwrap()
    };
    assert!(message().get("QMP").is_some());
    input.write_all(b"{'execute':'qmp_capabilities'}{'execute':'query-jobs'").unwrap();
    assert_eq!(message(), json!({"return": {}}));
    input.write_all(b",'id':2}").unwrap();
    assert_eq!(message(), json!({"return": [], "id": 2}));
    drop(input);
    assert!(pidfile.exists());
    assert!(process.0.try_wait().unwrap().is_none(), "it has ended with its monitor");
    process.signal("TERM");
    process.wait_for_success();
}

#[test]
fn monitors_and_exports_are_reached_over_tcp() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let (monitor_port, nbd_port) = (free_port(), free_port());
    let daemon = Daemon::start(
        Program::Infill,
        dir.path(),
        &[
            "--chardev",
            &format!("socket,id=tcp,host=127.0.0.1,port={monitor_port},server,nowait"),
            "--monitor",
            "chardev=tcp,mode=control",
            "--blockdev",
            &node(&image),
            "--nbd-server",
            &format!("addr.type=inet,addr.host=127.0.0.1,addr.port={nbd_port},max-connections=4"),
            "--export",
            "nbd,id=e,node-name=disk,name=it is here",
        ],
    );
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", monitor_port)).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("{\"QMP\": {"));
    stream.write_all(b"{'execute':'qmp_capabilities'}").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "{\"return\": {}}");
    let copy = dir.path().join("copy");
    run("nbdcopy", &[&format!("nbd://127.0.0.1:{nbd_port}/it%20is%20here"), text(&copy)]);
    assert_eq!(std::fs::read(&copy).unwrap(), std::fs::read(&image).unwrap());
    daemon.quit(&mut Qmp::connect(&dir.path().join("monitor.sock")));
}

#[test]
fn a_socket_that_waits_holds_the_start_until_its_client_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, pidfile) = (dir.path().join("m.sock"), dir.path().join("pid"));
    let mut command = Program::Infill.command();
    let chardev = format!("socket,id=m,path={},server=on", text(&socket));
    command.args(["--chardev", &chardev, "--monitor", "m", "--pidfile", text(&pidfile)]);
    let mut process = Process::start(&mut command);
    wait_until("the socket is there", || socket.exists());
    assert!(!pidfile.exists(), "it has not waited");
    let mut qmp = Qmp::connect(&socket);
    assert!(pidfile.exists());
    qmp.run("quit", json!({}));
    process.wait_for_success();
}

#[test]
fn one_pid_file_is_one_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let pidfile = dir.path().join("pid");
    let daemon = Daemon::start(Program::Infill, dir.path(), &["--pidfile", text(&pidfile)]);
    let mut qmp = daemon.connect();
    let second = Program::Infill.command().args(["--pidfile", text(&pidfile)]).output().unwrap();
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("cannot create PID file"));
    assert_eq!(std::fs::read_to_string(&pidfile).unwrap(), format!("{}\n", daemon.process.id()));
    daemon.quit(&mut qmp);
    assert!(!pidfile.exists());
}

#[test]
fn quit_cancels_jobs_and_tells_their_end_before_it_answers() {
    let dir = tempfile::tempdir().unwrap();
    let base = image(dir.path());
    let overlay = dir.path().join("overlay");
    run("qemu-img", &["create", "-q", "-f", "qed", "-b", &base, "-F", "raw", text(&overlay)]);
    let top = format!("qed,node-name=top,file.driver=file,file.filename={}", text(&overlay));
    let daemon = Daemon::start(Program::Infill, dir.path(), &["--blockdev", &top]);
    let mut qmp = daemon.connect();
    qmp.run("block-stream", json!({"job-id": "j", "device": "top", "speed": 1}));
    daemon.quit(&mut qmp);
    let names: Vec<_> = qmp.seen.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert!(names.contains(&"BLOCK_JOB_CANCELLED"), "{names:?}");
    run("qemu-img", &["compare", "-f", "qed", "-F", "raw", text(&overlay), &base]);
}

/// Serves a pattern, slowly.
fn source(socket: &Path) -> Process {
    let mut nbdkit = std::process::Command::new("nbdkit");
    nbdkit.args(["-f", "-U", text(socket), "--filter=delay", "pattern", "4M", "delay-read=5ms"]);
    let process = Process::start(&mut nbdkit);
    wait_for_socket(socket);
    process
}

#[test]
fn a_stream_waits_for_a_source_that_went_away_and_both_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, overlay) = (dir.path().join("source.sock"), dir.path().join("overlay"));
    let first = source(&socket);
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&overlay), "4M"]);
    let daemon = Daemon::start(
        Program::Infill,
        dir.path(),
        &[
            "--blockdev",
            &format!("nbd,node-name=base,read-only=on,server.type=unix,server.path={}", text(&socket)),
            "--blockdev",
            &format!("qcow2,node-name=top,file.driver=file,file.filename={},backing=base", text(&overlay)),
        ],
    );
    let mut qmp = daemon.connect();
    qmp.run("block-stream", json!({"job-id": "j", "device": "top", "speed": 65536}));
    first.kill();
    let lost =
        qmp.event(|event| event["event"] == "__INFILL_SOURCE_LOST" && event["data"]["node-name"] == "base");
    assert!(lost["data"]["reason"].is_string(), "{lost}");
    assert_eq!(qmp.run("query-jobs", json!({}))[0]["status"], "running");
    std::fs::remove_file(&socket).unwrap();
    let _second = source(&socket);
    qmp.event(|event| event["event"] == "__INFILL_SOURCE_BACK" && event["data"]["node-name"] == "base");
    qmp.run("block-job-set-speed", json!({"device": "j", "speed": 0}));
    let completed = qmp.wait_for("BLOCK_JOB_COMPLETED");
    assert!(completed["data"].get("error").is_none(), "{completed}");
    daemon.quit(&mut qmp);
    let uri = format!("nbd+unix:///?socket={}", text(&socket));
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&overlay), &uri]);
}

#[test]
fn a_daemon_whose_source_is_away_can_be_ended() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, overlay) = (dir.path().join("source.sock"), dir.path().join("overlay"));
    let source = source(&socket);
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&overlay), "4M"]);
    let daemon = Daemon::start(
        Program::Infill,
        dir.path(),
        &[
            "--blockdev",
            &format!("nbd,node-name=base,read-only=on,server.type=unix,server.path={}", text(&socket)),
            "--blockdev",
            &format!("qcow2,node-name=top,file.driver=file,file.filename={},backing=base", text(&overlay)),
        ],
    );
    let mut qmp = daemon.connect();
    qmp.run("block-stream", json!({"job-id": "j", "device": "top", "speed": 65536}));
    source.kill();
    qmp.wait_for("__INFILL_SOURCE_LOST");
    daemon.quit(&mut qmp);
    qmp.wait_for("BLOCK_JOB_CANCELLED");
}

#[test]
fn sockets_that_its_manager_has_opened_are_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let (monitor, nbd) = (dir.path().join("m.sock"), dir.path().join("nbd.sock"));
    // Python passes descriptors without a line of unsafe code here.
    let script = "import os, socket, sys\n\
        fds = []\n\
        for path in sys.argv[1:3]:\n\
        \x20   listener = socket.socket(socket.AF_UNIX)\n\
        \x20   listener.bind(path)\n\
        \x20   listener.listen()\n\
        \x20   os.set_inheritable(listener.fileno(), True)\n\
        \x20   fds.append(listener)\n\
        monitor, nbd = (listener.fileno() for listener in fds)\n\
        os.execv(sys.argv[3], [sys.argv[3], 'daemon',\n\
        \x20   '--chardev', f'socket,fd={monitor},server=on,wait=off,id=m', '--monitor', 'm',\n\
        \x20   '--nbd-server', f'addr.type=fd,addr.str={nbd}'] + sys.argv[4:])\n";
    let mut command = std::process::Command::new("python3");
    command.args(["-c", script, text(&monitor), text(&nbd), common::INFILL]);
    command.args(["--blockdev", &node(&image), "--export", "nbd,id=e,node-name=disk"]);
    let mut process = Process::start(&mut command);
    wait_for_socket(&monitor);
    let mut qmp = Qmp::connect(&monitor);
    let copy = dir.path().join("copy");
    run("nbdcopy", &[&format!("nbd+unix:///disk?socket={}", text(&nbd)), text(&copy)]);
    assert_eq!(std::fs::read(&copy).unwrap(), std::fs::read(&image).unwrap());
    qmp.run("quit", json!({}));
    process.wait_for_success();
}

#[test]
fn version_and_help_are_printed_and_nothing_is_started() {
    for option in ["--version", "--help", "-V", "-h"] {
        let output = Program::Infill.command().args([option, "--blockdev", "nonsense"]).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{option}");
        assert!(!output.stdout.is_empty());
    }
}
