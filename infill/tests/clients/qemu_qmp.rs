//! QEMU's own client library, which is written from the protocol's text and not from our code.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::common::{run, text};
use crate::qmp::{Daemon, Program};

/// The library, as the package index of its language names it.
const LIBRARY: &str = "qemu.qmp==0.0.6";
const SESSION: &str = include_str!("session.py");
const SIZE: usize = 2 << 20;

/// Where the library lies; fetched once, and kept between runs.
fn library() -> PathBuf {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (path, partial) =
        (cache.join(LIBRARY), cache.join(format!("{LIBRARY}.partial-{}", std::process::id())));
    if !path.exists() {
        let options = ["--quiet", "--disable-pip-version-check", "--root-user-action=ignore", "--no-deps"];
        run("pip3", &[&["install"][..], &options, &["--target", text(&partial), LIBRARY]].concat());
        std::fs::rename(&partial, &path).unwrap();
    }
    path
}

#[test]
fn qemus_client_library_drives_a_stream_from_the_greeting_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (dir.path().join("base"), dir.path().join("top"));
    std::fs::write(&base, vec![0x5a; SIZE]).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "raw", text(&top)]);
    let mut daemon = Daemon::start(Program::Infill, dir.path(), &[]);
    let environment = [
        format!("PYTHONPATH={}", text(&library())),
        format!("SOCKET={}", text(&daemon.socket)),
        format!("DIR={}", text(dir.path())),
    ];
    let script = dir.path().join("session.py");
    std::fs::write(&script, SESSION).unwrap();
    let environment: Vec<&str> = environment.iter().map(String::as_str).collect();
    let told = run("env", &[&environment[..], &["timeout", "60", "python3", text(&script)]].concat());
    daemon.process.wait_for_success();
    let told: Value = serde_json::from_str(&told).unwrap();
    assert!(told["greeting"].as_str().unwrap().starts_with("infill "), "{told}");
    assert_eq!(told["refused"], json!(["CommandNotFound", "GenericError"]));
    let states = ["created", "running", "waiting", "pending", "concluded", "null"];
    assert_eq!(told["states"], json!(states));
    assert_eq!(
        told["completed"],
        json!({"device": "j", "len": SIZE, "offset": SIZE, "speed": 0, "type": "stream"})
    );
    assert_eq!((&told["jobs"][0]["status"], &told["jobs"][0]["id"]), (&json!("concluded"), &json!("j")));
    let info = run("qemu-img", &["info", "--output=json", text(&top)]);
    assert!(!info.contains("backing-filename"), "{info}");
}
