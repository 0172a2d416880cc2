//! `serve` and `stream`: an overlay over a base that is somewhere else, used before its data has arrived.

mod common;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{INFILL, Process, fails, output, run, text, wait_for_socket, wait_until};
use serde_json::Value;

/// Size of the disks here, in bytes.
const DISK: u64 = 16 << 20;

/// Writes that a guest makes, as commands of qemu-io, and what is read there afterwards.
const GUEST_WRITES: [&str; 4] =
    ["write -P 171 1M 64k", "write -P 172 3000k 5k", "write -z 5M 1M", "write -P 173 16383k 1k"];
const GUEST_READS: [&str; 4] =
    ["read -P 171 1M 64k", "read -P 172 3000k 5k", "read -P 0 5M 1M", "read -P 173 16383k 1k"];

struct World {
    dir: tempfile::TempDir,
    /// What the disk reads as before anybody writes.
    base: PathBuf,
}

impl World {
    fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.raw");
        // Every sector differs: 8-byte offsets.
        let pattern = (0..DISK / 8).flat_map(|nth| (nth * 8).to_be_bytes()).collect::<Vec<u8>>();
        std::fs::write(&base, pattern).unwrap();
        World { dir, base }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A server of the pattern over a socket, each request late by `delay_ms`.
    fn source(&self, delay_ms: u32) -> (Process, String) {
        let socket = self.path("source");
        // One that was killed leaves its socket behind.
        let _ = std::fs::remove_file(&socket);
        let delay = format!("delay-read={delay_ms}ms");
        let mut server = Command::new("nbdkit");
        server.args([
            "-f",
            "-r",
            "-U",
            text(&socket),
            "--filter=delay",
            "pattern",
            &DISK.to_string(),
            &delay,
        ]);
        // It complains of those who only look whether it is there.
        server.stderr(Stdio::null());
        let server = Process::start(&mut server);
        wait_for_socket(&socket);
        (server, format!("nbd+unix:///?socket={}", text(&socket)))
    }

    /// A new overlay in `format`.
    fn overlay(&self, format: &str, backing: &str) -> PathBuf {
        let path = self.path(&format!("overlay.{format}"));
        run(INFILL, &["create", "-q", "-f", format, "-b", backing, "-F", "raw", text(&path)]);
        path
    }

    /// Serves an image; gives the server and its URI once it takes connections.
    fn serve(&self, image: &Path, args: &[&str]) -> (Process, String) {
        let socket = self.path("socket");
        let mut server = Command::new(INFILL);
        server.args(["serve", "-k", text(&socket)]).args(args).arg(image).stdout(Stdio::piped());
        let mut server = Process::start(&mut server);
        let mut uri = String::new();
        BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut uri).unwrap();
        assert!(!uri.is_empty(), "the server did not start");
        (server, uri.trim().to_owned())
    }

    /// The disk with [`GUEST_WRITES`] made, as a raw file.
    fn written(&self) -> PathBuf {
        let path = self.path("written.raw");
        std::fs::copy(&self.base, &path).unwrap();
        qemu_io(text(&path), &GUEST_WRITES);
        path
    }
}

/// Runs commands on a raw disk (a file or a URI); a pattern that does not match fails.
fn qemu_io(disk: &str, commands: &[&str]) {
    let mut args = vec!["-f", "raw"];
    commands.iter().for_each(|command| args.extend(["-c", *command]));
    args.push(disk);
    let output = output("qemu-io", &args);
    let told =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && !told.contains("failed"), "qemu-io {args:?}: {told}");
}

/// nbdsh with a script. Its module belongs to the system's python.
fn nbdsh_command(uri: &str, script: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("nbdsh");
    command.env("PATH", format!("/usr/bin:/bin:{path}")).args(["-u", uri, "-c", script]);
    command
}

fn nbdsh(uri: &str, script: &str) {
    Process::start(&mut nbdsh_command(uri, script)).wait_for_success();
}

/// Bytes of an image that lie in its own layer.
fn own_bytes(image: &Path) -> u64 {
    let map = run("qemu-img", &["map", "--output=json", text(image)]);
    let runs: Vec<Value> = serde_json::from_str(&map).unwrap();
    let own = runs.iter().filter(|run| run["depth"] == 0 && run["data"] == true);
    own.map(|run| run["length"].as_u64().unwrap()).sum()
}

/// No corruption; leaks only in QED, where a populate that loses against a guest's write leaves one.
fn check(image: &Path) {
    let leaks_allowed = image.extension().is_some_and(|format| format == "qed");
    for program in ["qemu-img", INFILL] {
        let code = output(program, &["check", "-q", text(image)]).status.code();
        assert!(code == Some(0) || (leaks_allowed && code == Some(3)), "{program} check {image:?}: {code:?}");
    }
}

fn same_disk(one: &Path, format: &str, other: &Path) {
    run("qemu-img", &["compare", "-q", "-f", format, "-F", "raw", text(one), text(other)]);
}

#[test]
fn what_a_guest_wrote_is_there_when_the_server_has_ended() {
    for format in ["qcow2", "qed"] {
        let world = World::new();
        let (_source, backing) = world.source(0);
        let overlay = world.overlay(format, &backing);
        let (mut server, uri) = world.serve(&overlay, &[]);
        qemu_io(&uri, &[&GUEST_WRITES[..], &GUEST_READS[..]].concat());
        // Its last client has gone.
        server.wait_for_success();
        assert!(!world.path("socket").exists());
        check(&overlay);
        same_disk(&overlay, format, &world.written());
    }
}

#[test]
fn a_list_is_no_client_and_a_persistent_server_ends_by_signal() {
    let world = World::new();
    let overlay = world.overlay("qed", text(&world.base));
    let (mut server, uri) = world.serve(&overlay, &["-x", "a disk", "-D", "described"]);
    let list = run("nbdinfo", &["--list", &uri]);
    assert!(list.contains("export=\"a disk\"") && list.contains("described"), "{list}");
    run("nbdinfo", &["--size", &uri]);
    server.wait_for_success();

    let (mut server, uri) = world.serve(&overlay, &["-t"]);
    for _ in 0..2 {
        qemu_io(&uri, &["write -P 7 0 64k"]);
    }
    server.signal("TERM");
    server.wait_for_success();
    check(&overlay);
    let (mut server, uri) = world.serve(&overlay, &["-t"]);
    qemu_io(&uri, &["read -P 7 0 64k"]);
    server.signal("INT");
    server.wait_for_success();
}

#[test]
fn a_read_only_export_refuses_writes_and_a_port_is_told() {
    let world = World::new();
    let mut server = Command::new(INFILL);
    server.args(["serve", "-t", "-r", "-p", "0", text(&world.base)]).stdout(Stdio::piped());
    let mut server = Process::start(&mut server);
    let mut uri = String::new();
    BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut uri).unwrap();
    let uri = uri.trim();
    assert!(uri.starts_with("nbd://127.0.0.1:") && !uri.contains(":0/"), "{uri}");
    let why = output("qemu-io", &["-f", "raw", "-c", "write 0 512", uri]);
    assert!(!why.status.success(), "a read-only export was opened for writing");
    run("nbdcopy", &[uri, text(&world.path("copy"))]);
    server.signal("TERM");
    server.wait_for_success();
    run("cmp", &[text(&world.base), text(&world.path("copy"))]);
}

#[test]
fn copy_on_read_keeps_what_was_read_and_nothing_else() {
    for format in ["qcow2", "qed"] {
        let world = World::new();
        let (source, backing) = world.source(20);
        let overlay = world.overlay(format, &backing);
        let (mut server, uri) = world.serve(&overlay, &["--copy-on-read"]);
        nbdsh(&uri, "for at in (0, 1 << 20, 4 << 20): h.pread(65536, at)");
        server.wait_for_success();
        assert_eq!(own_bytes(&overlay), 3 << 16, "{format}");
        // What is there needs no source.
        drop(source);
        let (mut server, uri) = world.serve_without_source(&overlay);
        let script = "for at in (0, 1 << 20, 4 << 20):\n for o in range(at, at + 65536, 4096):\n  \
                      assert h.pread(8, o) == o.to_bytes(8, 'big')";
        nbdsh(&uri, script);
        server.wait_for_success();
        check_alone(&overlay, format);
    }
}

impl World {
    /// Serves an overlay whose source is away: another one is put in its place, which has nothing.
    fn serve_without_source(&self, overlay: &Path) -> (Process, String) {
        let socket = self.path("source");
        let _ = std::fs::remove_file(&socket);
        let mut zeroes = Command::new("nbdkit");
        zeroes.args(["-f", "-r", "-U", text(&socket), "memory", &DISK.to_string()]).stderr(Stdio::null());
        let zeroes = Process::start(&mut zeroes);
        wait_for_socket(&socket);
        let served = self.serve(overlay, &[]);
        // It goes as well: the server does not need it for what is kept.
        drop(zeroes);
        served
    }
}

fn check_alone(image: &Path, format: &str) {
    // The backing file cannot be opened; the image's own structure can be checked all the same.
    let file = format!(r#"{{"driver":"file","filename":"{}"}}"#, text(image));
    let alone = format!(r#"json:{{"driver":"{format}","file":{file},"backing":null}}"#);
    run("qemu-img", &["check", "-q", &alone]);
}

/// Reads that a source with the log filter was asked for, as (first byte, length).
fn reads_of(log: &Path) -> Vec<(u64, u64)> {
    let log = std::fs::read_to_string(log).unwrap();
    let number = |line: &str, name: &str| {
        let at = line.find(name).unwrap() + name.len();
        u64::from_str_radix(line[at..].split(' ').next().unwrap(), 16).unwrap()
    };
    let reads = log.lines().filter(|line| line.contains(" Read id="));
    reads.map(|line| (number(line, "offset=0x"), number(line, "count=0x"))).collect()
}

/// Our overlays have subclusters of 2 KiB.
#[test]
fn a_write_fetches_the_rest_of_its_subclusters_and_no_more() {
    let world = World::new();
    let (socket, log) = (world.path("logged"), world.path("log"));
    let mut source = Command::new("nbdkit");
    let logfile = format!("logfile={}", text(&log));
    source.args(["-f", "-r", "-U", text(&socket), "--filter=log", "pattern", &DISK.to_string(), &logfile]);
    let _source = Process::start(source.stderr(Stdio::null()));
    wait_for_socket(&socket);
    let overlay = world.overlay("qcow2", &format!("nbd+unix:///?socket={}", text(&socket)));
    let (_server, uri) = world.serve(&overlay, &["--persistent"]);
    let before = reads_of(&log);
    qemu_io(&uri, &["write -P 1 1M 4k", "write -P 2 3M 64k", "write -z 5M 2k", "flush"]);
    assert_eq!(reads_of(&log), before);
    qemu_io(&uri, &["write -P 3 7M 512", "flush"]);
    let fetched = reads_of(&log).split_off(before.len());
    assert!(fetched.iter().all(|(at, len)| *at >= 7 << 20 && at + len <= (7 << 20) + 2048), "{fetched:?}");
    assert_eq!(fetched.iter().map(|(_, len)| len).sum::<u64>(), 1536, "{fetched:?}");
}

#[test]
fn a_stream_under_load_ends_with_an_image_that_needs_nobody() {
    for format in ["qcow2", "qed"] {
        let world = World::new();
        let (source, backing) = world.source(5);
        let overlay = world.overlay(format, &backing);
        let (mut server, uri) = world.serve(&overlay, &["--stream", "--copy-on-read"]);
        qemu_io(&uri, &[&GUEST_WRITES[..], &GUEST_READS[..]].concat());
        server.wait_for_success();
        drop(source);
        let info: Value =
            serde_json::from_str(&run("qemu-img", &["info", "--output=json", text(&overlay)])).unwrap();
        assert_eq!(info.get("backing-filename"), None, "{format}");
        check(&overlay);
        same_disk(&overlay, format, &world.written());
    }
}

#[test]
fn a_server_that_is_killed_in_a_stream_loses_nothing_that_was_flushed_and_goes_on() {
    for format in ["qcow2", "qed"] {
        let world = World::new();
        let (_source, backing) = world.source(5);
        let overlay = world.overlay(format, &backing);
        let (server, uri) = world.serve(&overlay, &["--stream", "--speed", "4M"]);
        qemu_io(&uri, &[&GUEST_WRITES[..], &["flush"]].concat());
        server.kill();
        // A crash may leak, and does no other harm.
        let checked = output("qemu-img", &["check", "-q", text(&overlay)]);
        assert!(matches!(checked.status.code(), Some(0 | 3)), "{format}: {checked:?}");
        run(INFILL, &["check", "-q", "-r", "leaks", text(&overlay)]);
        let (mut server, uri) = world.serve(&overlay, &["--stream"]);
        qemu_io(&uri, &GUEST_READS);
        server.wait_for_success();
        check(&overlay);
        same_disk(&overlay, format, &world.written());
    }
}

#[test]
fn a_stream_at_rest_fills_down_to_a_base_and_then_everything() {
    let world = World::new();
    let (_source, backing) = world.source(1);
    let middle = world.overlay("qcow2", &backing);
    let top = world.path("top.qcow2");
    run(INFILL, &["create", "-q", "-b", text(&middle), "-F", "qcow2", text(&top)]);
    qemu_io_format(&middle, "qcow2", &["write -P 1 2M 64k"]);
    run(INFILL, &["stream", "-q", "-b", &backing, text(&top)]);
    let info: Value = serde_json::from_str(&run("qemu-img", &["info", "--output=json", text(&top)])).unwrap();
    assert_eq!(info["backing-filename"], Value::from(backing.clone()));
    assert_eq!(own_bytes(&top), 1 << 16);
    let why = fails(INFILL, &["stream", "-q", "-b", "nobody", text(&top)]);
    assert!(why.contains("'nobody'"), "{why}");
    let done = output(INFILL, &["stream", text(&top)]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(String::from_utf8_lossy(&done.stderr).contains("stable"));
    assert_eq!(own_bytes(&top), DISK);
    check(&top);
    let info = run("qemu-img", &["info", text(&top)]);
    assert!(!info.contains("backing file"), "{info}");
}

#[test]
fn a_base_that_stays_is_named_so_that_the_image_finds_it_from_anywhere() {
    let world = World::new();
    for (name, called) in
        [("one", "base.raw".to_owned()), ("elsewhere", text(&world.path("one/base.raw")).to_owned())]
    {
        let one = world.path("one");
        let (dir, top) = (world.path(name), world.path(name).join("top.qcow2"));
        for new in [&one, &dir] {
            std::fs::create_dir_all(new).unwrap();
        }
        std::fs::copy(&world.base, one.join("base.raw")).unwrap();
        run(INFILL, &["create", "-q", "-b", "base.raw", "-F", "raw", text(&one.join("middle.qcow2"))]);
        let middle = one.join("middle.qcow2");
        run(INFILL, &["create", "-q", "-b", text(&middle), "-F", "qcow2", text(&top)]);
        // By a relative path, from another directory than the image's.
        let mut stream = Command::new(INFILL);
        stream.current_dir(world.dir.path()).args(["stream", "-q", "-b", "base.raw"]);
        Process::start(stream.arg(format!("{name}/top.qcow2"))).wait_for_success();
        let info: Value =
            serde_json::from_str(&run("qemu-img", &["info", "--output=json", text(&top)])).unwrap();
        assert_eq!(info["backing-filename"], Value::from(called));
        same_disk(&top, "qcow2", &world.base);
    }
}

#[test]
fn the_map_of_an_overlay_over_a_network_says_what_qemu_img_says() {
    let world = World::new();
    let (_source, backing) = world.source(0);
    let overlay = world.overlay("qcow2", &backing);
    qemu_io_format(&overlay, "qcow2", &["write -P 1 2M 64k", "write -z 4M 64k", "write -P 2 5M 2k"]);
    for image in [text(&overlay), &backing] {
        let map = |program: &str| -> Value {
            serde_json::from_str(&run(program, &["map", "--output=json", image])).unwrap()
        };
        assert_eq!(map(INFILL), map("qemu-img"), "{image}");
    }
    let info: Value =
        serde_json::from_str(&run(INFILL, &["info", "--backing-chain", "--output=json", text(&overlay)]))
            .unwrap();
    assert_eq!(info[1]["filename"], Value::from(backing), "a name that can be opened again");
}

fn qemu_io_format(image: &Path, format: &str, commands: &[&str]) {
    let mut args = vec!["-f", format];
    commands.iter().for_each(|command| args.extend(["-c", *command]));
    args.push(text(image));
    run("qemu-io", &args);
}

#[test]
fn a_daemon_is_asked_to_stream_and_watched_until_it_is_done() {
    let world = World::new();
    let overlay = world.overlay("qcow2", text(&world.base));
    let monitor = world.path("monitor");
    let mut daemon = Command::new(INFILL);
    daemon.arg("daemon").args([
        "--blockdev",
        &format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={}", text(&overlay)),
        "--chardev",
        &format!("socket,id=m,path={},server=on,wait=off", text(&monitor)),
        "--monitor",
        "chardev=m",
    ]);
    let mut daemon = Process::start(&mut daemon);
    wait_for_socket(&monitor);
    let ask = |node: &str| output(INFILL, &["stream", "--monitor", text(&monitor), "--node", node]);
    let unknown = ask("nobody");
    assert_eq!(unknown.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("nobody"));
    let done = ask("disk");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(String::from_utf8_lossy(&done.stderr).contains("stable"));
    daemon.signal("TERM");
    daemon.wait_for_success();
    assert_eq!(own_bytes(&overlay), DISK);
    check(&overlay);
    same_disk(&overlay, "qcow2", &world.base);
    let why = fails(INFILL, &["stream", "--monitor", text(&monitor), "--node", "disk"]);
    assert!(why.contains("no daemon's monitor"), "{why}");
}

#[test]
fn an_interrupted_stream_at_rest_ends_in_order_and_goes_on_later() {
    let world = World::new();
    let (_source, backing) = world.source(5);
    let overlay = world.overlay("qed", &backing);
    let mut stream = Command::new(INFILL);
    stream.args(["stream", "--speed", "2M", text(&overlay)]).stderr(Stdio::null());
    let mut stream = Process::start(&mut stream);
    wait_until("something is filled", || std::fs::metadata(&overlay).unwrap().len() > 1 << 20);
    stream.signal("INT");
    let status = stream.0.wait().unwrap();
    assert_eq!(status.code(), Some(1));
    check(&overlay);
    assert!(own_bytes(&overlay) < DISK);
    run(INFILL, &["stream", "-q", text(&overlay)]);
    same_disk(&overlay, "qed", &world.base);
}

#[test]
fn reads_that_need_a_lost_source_are_held_or_fail_and_everything_else_goes_on() {
    let world = World::new();
    let (source, backing) = world.source(0);
    let overlay = world.overlay("qed", &backing);
    let (mut server, uri) = world.serve(&overlay, &["-t", "--on-lost", "fail"]);
    qemu_io(&uri, &["write -P 9 1M 64k"]);
    source.kill();
    let failed = output("qemu-io", &["-f", "raw", "-c", "read 8M 64k", &uri]);
    let told =
        format!("{}{}", String::from_utf8_lossy(&failed.stdout), String::from_utf8_lossy(&failed.stderr));
    assert!(told.contains("read failed"), "{told}");
    qemu_io(&uri, &["read -P 9 1M 64k", "write -P 8 2M 64k", "flush"]);
    server.signal("TERM");
    server.wait_for_success();

    // Held: the read is answered when the source is back.
    let (source, _) = world.source(0);
    let (mut server, uri) = world.serve(&overlay, &["-t"]);
    qemu_io(&uri, &["read -P 8 2M 64k"]);
    source.kill();
    let mut reader = Command::new("qemu-io");
    reader.args(["-r", "-f", "raw", "-c", "read -v 8M 512", &uri]).stdout(Stdio::piped());
    let mut reader = Process::start(&mut reader);
    qemu_io(&uri, &["read -P 8 2M 64k", "write -P 7 3M 64k", "flush"]);
    assert!(reader.0.try_wait().unwrap().is_none(), "a read of nothing was answered");
    let _source = world.source(0);
    reader.wait_for_success();
    server.signal("TERM");
    server.wait_for_success();
    check(&overlay);
}

#[test]
fn as_many_clients_as_are_allowed_are_served_and_the_next_one_waits() {
    let world = World::new();
    let (mut server, uri) = world.serve(&world.base, &["-r", "-t", "-e", "2"]);
    let hold = |what: &str| {
        let ready = world.path(what);
        let script =
            format!("import time; h.pread(512, 0); open('{}', 'w').close(); time.sleep(600)", text(&ready));
        (Process::start(&mut nbdsh_command(&uri, &script)), ready)
    };
    let (one, one_ready) = hold("one");
    let (two, two_ready) = hold("two");
    wait_until("two clients are served", || one_ready.exists() && two_ready.exists());
    let (three, three_ready) = hold("three");
    one.kill();
    wait_until("the third one is served", || three_ready.exists());
    drop((two, three));
    server.signal("TERM");
    server.wait_for_success();
}
