//! The name `qemu-nbd`: the same options lead to the same server, as libnbd's tools see it; and the background.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{INFILL, Process, fails, output, run, text, wait_for_socket, wait_until};
use serde_json::Value;

const SIZE: usize = 4 << 20;

struct Place {
    dir: tempfile::TempDir,
    /// Our program, under the other's name.
    ours: PathBuf,
}

impl Place {
    /// base.raw under top.qcow2, which holds something.
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let ours = dir.path().join("qemu-nbd");
        std::os::unix::fs::symlink(INFILL, &ours).unwrap();
        let place = Place { dir, ours };
        let bytes: Vec<u8> = (0..SIZE).map(|at| (at / 512 % 251) as u8).collect();
        std::fs::write(place.path("base"), bytes).unwrap();
        let (base, top) = (place.path("base"), place.path("top"));
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "raw", text(&top)]);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 0x77 1M 64k", text(&top)]);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Serves with `program`, and gives what `ask` finds there.
    fn served<T>(&self, program: &str, args: &[&str], export: &str, ask: impl Fn(&str) -> T) -> T {
        let socket = self.path("socket");
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new(program);
        let mut process = Process::start(command.args(["-t", "-k", text(&socket)]).args(args));
        wait_for_socket(&socket);
        let found = ask(&format!("nbd+unix:///{export}?socket={}", text(&socket)));
        process.signal("TERM");
        process.wait_for_success();
        found
    }
}

fn told(uri: &str) -> Value {
    let info: Value = serde_json::from_str(&run("nbdinfo", &["--json", uri])).unwrap();
    let export = &info["exports"][0];
    let keys = [
        "export-name",
        "description",
        "export-size",
        "is_read_only",
        "can_flush",
        "can_trim",
        "can_multi_conn",
        "contexts",
    ];
    keys.iter().map(|key| ((*key).to_owned(), export[*key].clone())).collect::<serde_json::Map<_, _>>().into()
}

#[test]
fn the_same_options_lead_to_the_same_disk() {
    let place = Place::new();
    let (top, base) = (place.path("top"), place.path("base"));
    let (top, base) = (text(&top), text(&base));
    let node = format!("driver=raw,offset=1M,size=64k,file.driver=file,file.filename={base}");
    let node_json =
        format!(r#"json:{{"driver": "qcow2", "file": {{"driver": "file", "filename": "{top}"}}}}"#);
    let bytes = |uri: &str| {
        let copy = place.path("copy");
        run("nbdcopy", &[uri, text(&copy)]);
        common::sha256(&copy)
    };
    for (args, export) in [
        (&["-f", "qcow2", top][..], ""),
        (&["-r", "-fqcow2", "-x", "name", "-D", "a disk", top], "name"),
        (&["--read-only", "--format=raw", "--export-name=n", "-e", "3", base], "n"),
        (&["-f", "qcow2", "-r", "-o", "1048576", top], ""),
        (&["-rf", "qcow2", "-A", "--discard=unmap", "--cache=none", top], ""),
        (&["-f", "qcow2", "--cache", "unsafe", "--aio", "threads", "--discard", "on", top], ""),
        (&["-n", top], ""),
        (&["--cache=writethrough", top], ""),
        (&["--cache=directsync", "-f", "qcow2", top], ""),
        (&["-s", top], ""),
        (&["-r", "-s", "-f", "raw", base], ""),
        (&["--discard=unmap", "--detect-zeroes=unmap", top], ""),
        (&["--image-opts", &node], ""),
        (&["-r", &node_json], ""),
    ] {
        let ask = |uri: &str| (told(uri), bytes(uri));
        let ours = place.served(text(&place.ours), args, export, ask);
        assert_eq!(ours, place.served("qemu-nbd", args, export, ask), "{args:?}");
    }
    // Whoever knows no format finds the same one.
    assert_eq!(
        place.served(text(&place.ours), &["-r", top], "", told),
        place.served("qemu-nbd", &["-r", top], "", told)
    );
}

#[test]
fn it_ends_with_its_last_client_unless_it_is_to_persist() {
    let place = Place::new();
    let (socket, top) = (place.path("socket"), place.path("top"));
    let uri = format!("nbd+unix:///?socket={}", text(&socket));
    let mut command = Command::new(INFILL);
    let mut process =
        Process::start(command.args(["qemu-nbd", "-f", "qcow2", "-k", text(&socket), text(&top)]));
    wait_for_socket(&socket);
    // Who only looks is no client.
    assert!(process.0.try_wait().unwrap().is_none());
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 0 64k", &uri]);
    process.wait_for_success();
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 1 0 64k", text(&top)]);
    run("qemu-img", &["check", "-q", text(&top)]);
}

/// Ends a process of the background by its pid file.
struct Background(PathBuf);

impl Background {
    fn pid(&self) -> String {
        std::fs::read_to_string(&self.0).unwrap().trim().to_owned()
    }

    fn end(&self) {
        let pid = self.pid();
        run("kill", &[&pid]);
        wait_until("the background process ends", || !Path::new(&format!("/proc/{pid}")).exists());
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Ok(pid) = std::fs::read_to_string(&self.0) {
            let _ = Command::new("kill").args(["-9", pid.trim()]).stderr(Stdio::null()).status();
        }
    }
}

#[test]
fn who_goes_into_the_background_serves_when_the_command_is_over() {
    let place = Place::new();
    let (socket, top, pid) = (place.path("socket"), place.path("top"), place.path("pid"));
    let uri = format!("nbd+unix:///?socket={}", text(&socket));
    let background = Background(pid.clone());
    let args = ["--fork", "-t", "-f", "qcow2", "--pid-file", text(&pid), "-k", text(&socket), text(&top)];
    run(text(&place.ours), &args);
    run("qemu-io", &["-f", "raw", "-c", "write -P 2 0 64k", &uri]);
    // Nothing of the terminal that it was started from is kept.
    let open = run("ls", &["-l", &format!("/proc/{}/fd", background.pid())]);
    let standard =
        open.lines().filter(|line| [" 0 ->", " 1 ->", " 2 ->"].iter().any(|number| line.contains(number)));
    assert!(
        standard.clone().count() == 3 && standard.clone().all(|line| line.ends_with("/dev/null")),
        "{open}"
    );
    background.end();
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 2 0 64k", text(&top)]);

    let monitor = place.path("monitor");
    let chardev = format!("socket,id=m,path={},server=on,wait=off", text(&monitor));
    let daemon = ["daemon", "--daemonize", "--pidfile", text(&pid), "--chardev", &chardev, "--monitor", "m"];
    run(INFILL, &daemon);
    let jobs = ["jobs", "--socket", text(&monitor)];
    assert_eq!(run(INFILL, &jobs), "");
    background.end();
    fails(INFILL, &jobs);
}

#[test]
fn a_start_in_the_background_that_fails_says_why_and_leaves_nothing() {
    let place = Place::new();
    let (socket, pid, none) = (place.path("socket"), place.path("pid"), place.path("none"));
    let args = ["--fork", "-f", "raw", "--pid-file", text(&pid), "-k", text(&socket), text(&none)];
    let why = fails(text(&place.ours), &args);
    assert!(why.contains(text(&none)), "{why}");
    let failed = output(INFILL, &["daemon", "--daemonize", "--blockdev", "driver=nonsense"]);
    assert_eq!(failed.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&failed.stderr).contains("nonsense"));
    assert!(!socket.exists() && !pid.exists());
    let why = fails(INFILL, &["daemon", "--daemonize", "--chardev", "stdio,id=c"]);
    assert!(why.contains("stdio"), "{why}");
}

#[test]
fn an_internal_snapshot_is_served_as_the_disk_was_then() {
    let place = Place::new();
    let image = place.path("image");
    let image = text(&image);
    run("qemu-img", &["create", "-q", "-f", "qcow2", image, "8M"]);
    for (pattern, name) in ["1", "2", "3"].into_iter().zip(["first", "second", "1"]) {
        let write = format!("write -P {pattern} {pattern}M 64k");
        run("qemu-io", &["-f", "qcow2", "-c", &write, "-c", &format!("write -P {pattern} 0 64k"), image]);
        run("qemu-img", &["snapshot", "-c", name, image]);
        // The disk has another size then, and is shown with the one that it has now.
        run("qemu-img", &["resize", "-q", "-f", "qcow2", image, "+1M"]);
    }
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 9 0 11M", image]);
    let before = common::sha256(Path::new(image));
    for which in ["1", "second", "3", "snapshot.id=2", "snapshot.name=1", "snapshot.id=1,snapshot.name=first"]
    {
        let ask = |uri: &str| {
            let copy = place.path("copy");
            run("nbdcopy", &[uri, text(&copy)]);
            (told(uri), common::sha256(&copy))
        };
        let args = ["-l", which, image];
        let ours = place.served(text(&place.ours), &args, "", ask);
        assert_eq!(ours, place.served("qemu-nbd", &args, "", ask), "{which}");
    }
    assert_eq!(common::sha256(Path::new(image)), before);
}

#[test]
fn what_a_server_exports_is_told_in_the_same_words() {
    let place = Place::new();
    let (top, socket) = (place.path("top"), place.path("socket"));
    let list = ["-L", "-k", text(&socket)];
    let same = |_: &str| {
        let [ours, theirs] = [text(&place.ours), "qemu-nbd"].map(|program| run(program, &list));
        assert!(ours.starts_with("exports available: 1\n"), "{ours}");
        assert_eq!(ours, theirs, "ours, then qemu-nbd's");
    };
    let args = ["-f", "qcow2", "-x", "name", "-D", "a disk", "-A", "-e", "3", text(&top)];
    for server in ["qemu-nbd", text(&place.ours)] {
        place.served(server, &args, "name", same);
        place.served(server, &["-r", "-f", "qcow2", text(&top)], "", same);
    }
    // One that speaks less.
    let _ = std::fs::remove_file(&socket);
    let _server = Process::start(Command::new("nbdkit").args(["-f", "-U", text(&socket), "memory", "1M"]));
    wait_for_socket(&socket);
    same("");
}

#[test]
fn what_is_written_to_a_temporary_image_is_gone_at_the_end() {
    let place = Place::new();
    let temporary = place.path("temporary");
    std::fs::create_dir(&temporary).unwrap();
    let top = place.path("top");
    let before = common::sha256(&top);
    let socket = place.path("socket");
    let mut command = Command::new(&place.ours);
    command.env("TMPDIR", &temporary).args(["-t", "-s", "-k", text(&socket), text(&top)]);
    let mut process = Process::start(&mut command);
    wait_for_socket(&socket);
    let uri = format!("nbd+unix:///?socket={}", text(&socket));
    run("qemu-io", &["-f", "raw", "-c", "write -P 5 0 2M", &uri]);
    run("qemu-io", &["-f", "raw", "-c", "read -P 5 0 2M", "-c", "flush", &uri]);
    assert_eq!(std::fs::read_dir(&temporary).unwrap().count(), 0, "it has no name");
    process.signal("TERM");
    process.wait_for_success();
    assert_eq!(common::sha256(&top), before);
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    let place = Place::new();
    let top = place.path("top");
    for (args, why) in [
        (&["-c", "/dev/nbd0", text(&top)][..], "-c/--connect is not supported"),
        (&["-d", "/dev/nbd0"], "-d/--disconnect is not supported"),
        (&["-L", text(&top)], "List mode is incompatible with a file name"),
        (&["-L", "-x", "name"], "List mode is incompatible with per-device settings"),
        (&["-L"], "Failed to list the exports of"),
        (&["--tls-hostname", "a", text(&top)], "TLS hostname is only supported in list mode"),
        (&["-l", "snap", text(&top)], "Failed to load snapshot: Can't find snapshot"),
        (&["-l", "snapshot.id=7", text(&top)], "Failed to load snapshot: Can't find snapshot"),
        (&["-l", "snapshot.bad=7", text(&top)], "Failed in parsing snapshot param `snapshot.bad=7'"),
        (&["-l", "snap", "-f", "raw", text(&top)], "Failed to load snapshot"),
        (&["--tls-authz", "a", text(&top)], "--tls-authz is not permitted without --tls-creds"),
        (&["--cache=none", text(&place.path("base"))], "say -f raw"),
        (&["--cache=none", "nbd://localhost/x"], "--image-opts"),
        (&["--cache=some", "-f", "qcow2", text(&top)], "--cache=some"),
        (&["-f", "qcow2", "--tls-creds", "nobody", text(&top)], "nobody"),
        (&["-f", "qcow2", "-B", "no-bitmap", text(&top)], "no-bitmap"),
        (&["--zz", text(&top)], "--zz"),
        (&[], "FILENAME"),
    ] {
        let socket = place.path("refused");
        let told = fails(text(&place.ours), &[args, &["-k", text(&socket)]].concat());
        assert!(told.contains(why), "{args:?}: {told}");
    }
    assert!(run(text(&place.ours), &["--help"]).contains("--export-name"));
    assert!(run(text(&place.ours), &["--version"]).starts_with("qemu-nbd "));
}
