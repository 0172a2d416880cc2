//! TLS of the program: credentials as managers make them, servers that insist, clients that insist, and the words of both.

#[path = "../../crates/nbd/tests/common/certs.rs"]
#[allow(dead_code, reason = "other tests use other parts")]
mod certs;
mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::fs::File;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use certs::{Authority, Certs, End};
use common::{INFILL, Process, fails, run, text, wait_for_socket, wait_until};
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

const DISK: usize = 1 << 20;

/// Of `open`.
const NONBLOCK: i32 = rustix::fs::OFlags::NONBLOCK.bits() as i32;

fn creds(id: &str, dir: &Path, extra: Value) -> Value {
    let mut object = json!({"qom-type": "tls-creds-x509", "id": id, "dir": text(dir)});
    object.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    object
}

/// Directories that are wrong in one way each.
fn wrong(certs: &Certs) -> Vec<&'static str> {
    let good = |file: &str| std::fs::read_to_string(certs.dir("good").join(file)).unwrap();
    let variant = |name: &'static str, file: &str, content: Option<&str>| {
        for file in ["ca-cert.pem", "server-cert.pem", "server-key.pem"] {
            certs.write(name, file, &good(file));
        }
        match content {
            Some(content) => certs.write(name, file, content),
            None => std::fs::remove_file(certs.dir(name).join(file)).unwrap(),
        }
        name
    };
    let other = Authority::new("other");
    vec![
        variant("no-authority", "ca-cert.pem", None),
        variant("no-certificate", "server-cert.pem", None),
        variant("no-key", "server-key.pem", None),
        variant("junk-authority", "ca-cert.pem", Some("junk")),
        variant("junk-certificate", "server-cert.pem", Some("junk")),
        variant("junk-key", "server-key.pem", Some("junk")),
        variant("junk-list", "ca-crl.pem", Some("junk")),
        variant("mismatch", "server-key.pem", Some(&other.pair(End::Server, 4000).key)),
        variant("other-authority", "ca-cert.pem", Some(&other.pem())),
        "expired",
        "nowhere",
    ]
}

/// What a message says up to the reason that a library gives in its own words.
fn beginning(message: &str) -> String {
    let (path, _) = message.split_once(".pem").expect("a file is named");
    path.to_owned()
}

#[test]
fn objects_are_made_and_refused_as_by_qemu_storage_daemon() {
    let certs = Certs::new();
    let wrong = wrong(&certs);
    let good = certs.dir("good");
    let mut told = Vec::new();
    for program in [Program::Infill, Program::Qemu] {
        let dir = tempfile::tempdir().unwrap();
        let daemon = Daemon::start(program, dir.path(), &[]);
        let mut qmp = daemon.connect();
        let mut answers = Vec::new();
        for object in [
            creds("s", &good, json!({"endpoint": "server"})),
            creds("s", &good, json!({"endpoint": "server"})),
            creds("c", &good, json!({})),
            creds("n", &certs.dir("nobody"), json!({"endpoint": "client", "verify-peer": false})),
            creds("x", &good, json!({"endpoint": "neither"})),
            creds("x", &good, json!({"verify-peer": "on"})),
            creds("x", &good, json!({"unknown": 1})),
            creds("1x", &good, json!({})),
            json!({"qom-type": "tls-creds-x509", "id": "x"}),
            json!({"qom-type": "tls-creds-x509", "dir": "/x"}),
            json!({"qom-type": "tls-creds-none", "id": "x"}),
            // Expired, but nobody asks.
            creds("old", &certs.dir("expired"), json!({"endpoint": "server", "sanity-check": false})),
            json!({"qom-type": "iothread", "id": "io"}),
        ] {
            answers.push(qmp.ask("object-add", object));
        }
        let start = |creds: &str| {
            let addr = json!({"type": "unix", "data": {"path": text(&dir.path().join("nbd"))}});
            json!({"addr": addr, "tls-creds": creds})
        };
        for id in ["nothing", "c", "io", "s"] {
            answers.push(qmp.ask("nbd-server-start", start(id)));
        }
        let node = |creds: &str| {
            let server = json!({"type": "unix", "path": "/nonexistent/nbd"});
            json!({"driver": "nbd", "node-name": "n", "server": server, "tls-creds": creds})
        };
        for id in ["nothing", "s", "io"] {
            answers.push(qmp.ask("blockdev-add", node(id)));
        }
        answers.push(qmp.ask("object-del", json!({"id": "nothing"})));
        answers.push(qmp.ask("object-del", json!({"id": "c"})));
        answers.push(qmp.ask("object-del", json!({"id": "c"})));
        for name in &wrong {
            let server = creds("w", &certs.dir(name), json!({"endpoint": "server"}));
            let why = qmp.refused("object-add", server)["desc"].as_str().unwrap().to_owned();
            answers.push(json!({"to": name, "told": beginning(&why)}));
        }
        daemon.quit(&mut qmp);
        told.push(answers);
    }
    for (ours, theirs) in told[0].iter().zip(&told[1]) {
        // It says of an expired certificate no more than that.
        let expired =
            ours["to"] == "expired" && theirs["told"].as_str().unwrap().starts_with("The certificate");
        assert!(ours == theirs || expired, "ours, then qemu-storage-daemon's: {ours} {theirs}");
    }
}

/// The credentials in `good`, with its key encrypted, in directories by what it is encrypted with.
fn encrypted(certs: &Certs) -> Vec<PathBuf> {
    let good = certs.dir("good");
    let ways: [(&str, &[&str]); 5] = [
        ("default", &[]),
        ("aes-128", &["-v2", "aes-128-cbc"]),
        ("sha-1", &["-v2", "aes-256-cbc", "-v2prf", "hmacWithSHA1"]),
        ("sha-512", &["-v2", "aes-256-cbc", "-v2prf", "hmacWithSHA512", "-iter", "100000"]),
        ("old", &["-v2", "des3"]),
    ];
    let dirs = ways.into_iter().map(|(name, way)| {
        for file in ["ca-cert.pem", "server-cert.pem"] {
            certs.write(name, file, &std::fs::read_to_string(good.join(file)).unwrap());
        }
        let (key, to) = (good.join("server-key.pem"), certs.dir(name).join("server-key.pem"));
        let files = ["pkcs8", "-topk8", "-in", text(&key), "-out", text(&to), "-passout", "pass:hush"];
        run("openssl", &[&files[..], way].concat());
        certs.dir(name)
    });
    dirs.collect()
}

#[test]
fn a_key_that_is_encrypted_is_decrypted_with_a_secret_as_by_qemu_storage_daemon() {
    let certs = Certs::new();
    let dirs = encrypted(&certs);
    let mut told = Vec::new();
    for program in [Program::Infill, Program::Qemu] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("password"), "hush").unwrap();
        let daemon = Daemon::start(program, dir.path(), &[]);
        let mut qmp = daemon.connect();
        let secret = |id: &str, more: Value| {
            let mut object = json!({"qom-type": "secret", "id": id});
            object.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            object
        };
        let mut answers = Vec::new();
        for object in [
            secret("plain", json!({"data": "hush"})),
            secret("coded", json!({"data": "aHVzaA==", "format": "base64"})),
            secret("file", json!({"file": text(&dir.path().join("password"))})),
            secret("wrong", json!({"data": "other"})),
            secret("plain", json!({"data": "again"})),
            secret("x", json!({})),
            secret("x", json!({"data": "a", "file": "b"})),
            secret("x", json!({"data": "!!!", "format": "base64"})),
            secret("x", json!({"data": "a", "format": "zz"})),
        ] {
            answers.push(qmp.ask("object-add", object));
        }
        let key = |id: &str, dir: &Path, secret: Option<&str>| {
            let mut object = creds(id, dir, json!({"endpoint": "server"}));
            if let Some(secret) = secret {
                object["passwordid"] = json!(secret);
            }
            object
        };
        for secret in ["plain", "coded", "file", "nothing"] {
            answers.push(qmp.ask("object-add", key(&format!("with-{secret}"), &dirs[0], Some(secret))));
        }
        for (nth, dir) in dirs[..4].iter().enumerate() {
            answers.push(qmp.ask("object-add", key(&format!("way-{nth}"), dir, Some("plain"))));
            for secret in [Some("wrong"), None] {
                let why =
                    qmp.refused("object-add", key("w", dir, secret))["desc"].as_str().unwrap().to_owned();
                let (before, _) = why.split_once("Decryption has failed").expect(&why);
                answers.push(json!(before.to_owned()));
            }
        }
        // One that is not encrypted asks for none.
        answers.push(qmp.ask("object-add", key("open", &certs.dir("good"), Some("wrong"))));
        if program == Program::Infill {
            let why = qmp.refused("object-add", key("w", &dirs[4], Some("plain")))["desc"].to_string();
            assert!(why.contains("with another cipher than AES-128 or AES-256"), "{why}");
            assert_eq!(
                qmp.refused("object-del", json!({"id": "plain"}))["desc"],
                "object 'plain' is in use, can not be deleted"
            );
        }
        for id in ["open", "wrong"] {
            qmp.run("object-del", json!({"id": id}));
        }
        daemon.quit(&mut qmp);
        told.push(answers);
    }
    assert_eq!(told[0], told[1], "ours, then qemu-storage-daemon's");
}

#[test]
fn a_secret_is_told_to_nobody_and_is_there_again_after_a_restart() {
    let certs = Certs::new();
    let dirs = encrypted(&certs);
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let options = ["--state", text(&state)];
    let daemon = Daemon::start(Program::Infill, dir.path(), &options);
    let mut qmp = daemon.connect();
    qmp.run("object-add", json!({"qom-type": "secret", "id": "s", "data": "hush"}));
    let tls = creds("t", &dirs[0], json!({"endpoint": "server", "passwordid": "s"}));
    qmp.run("object-add", tls);
    for property in ["data", "iv"] {
        qmp.refused("qom-get", json!({"path": "/objects/s", "property": property}));
    }
    assert_eq!(qmp.run("qom-get", json!({"path": "/objects/s", "property": "format"})), "raw");
    assert!(!qmp.run("__infill_query-state", json!({})).to_string().contains("hush"));
    daemon.process.kill();
    let daemon = Daemon::start(Program::Infill, dir.path(), &options);
    let mut qmp = daemon.connect();
    let why = qmp.refused("object-del", json!({"id": "s"}));
    assert_eq!(why["desc"], "object 's' is in use, can not be deleted");
    qmp.run("object-del", json!({"id": "t"}));
    qmp.run("object-del", json!({"id": "s"}));
    daemon.quit(&mut qmp);
}

/// What it reads may be on a server that is away, and a key may have millions of rounds: nobody else waits for either.
#[test]
fn a_secret_that_takes_long_to_read_keeps_nobody_else_waiting() {
    let certs = Certs::new();
    let dirs = encrypted(&certs);
    let dir = tempfile::tempdir().unwrap();
    let (pipe, other) = (dir.path().join("pipe"), dir.path().join("other.sock"));
    run("mkfifo", &[text(&pipe)]);
    let chardev = format!("socket,id=other,path={},server=on,wait=off", text(&other));
    let options = ["--chardev", &chardev, "--monitor", "chardev=other"];
    let daemon = Daemon::start(Program::Infill, dir.path(), &options);
    let mut qmp = daemon.connect();
    let file = text(&pipe).to_owned();
    let adding = std::thread::spawn(move || {
        qmp.run("object-add", json!({"qom-type": "secret", "id": "s", "file": file}));
        qmp
    });
    // That succeeds as soon as somebody reads, who then waits for what comes.
    let mut writing = None;
    wait_until("the secret is read", || {
        let opened = File::options().write(true).custom_flags(NONBLOCK).open(&pipe);
        writing = opened.ok();
        writing.is_some()
    });
    let mut qmp = Qmp::connect(&other);
    qmp.run("blockdev-add", json!({"driver": "null-co", "node-name": "n"}));
    writing.take().unwrap().write_all(b"hush").unwrap();
    let mut first = adding.join().unwrap();
    let tls = creds("t", &dirs[0], json!({"endpoint": "server", "passwordid": "s"}));
    first.run("object-add", tls);
    daemon.quit(&mut qmp);
}

#[test]
fn errors_of_a_secret_tell_its_id_and_not_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (state, file) = (dir.path().join("state"), dir.path().join("infill.toml"));
    let text_of_file = "[[object]]\nqom-type = 'secret'\nid = 's'\ndata = 'hush'\n";
    std::fs::write(&file, format!("{text_of_file}format = 'base64'\n{text_of_file}")).unwrap();
    let twice = ["--object", "secret,id=s,data=hush"];
    let fails_with = |arguments: &[&str], named: &str| {
        let told = fails(INFILL, arguments);
        assert!(told.contains(named) && !told.contains("hush") && !told.contains("aHVz"), "{told}");
    };
    let daemon = ["daemon", "--chardev", "null,id=c"];
    let fails_alone =
        |arguments: &[&str]| fails_with(&[&daemon, arguments].concat(), "--object secret,id=s: ");
    fails_alone(&[&twice[..], &twice].concat());
    fails_alone(&["--object", "secret,id=s,data=!hush,format=base64"]);
    fails_alone(&["--object", r#"{"qom-type": "secret", "id": "s", "data": "hush", "file": "f"}"#]);
    fails_alone(&["--config", text(&file)]);
    fails_with(&[&daemon[..], &["--object", "secret,id=s,data=a,hush"]].concat(), "a comma in a value");
    fails_with(&[&daemon[..], &["secret,id=s,data=hush"]].concat(), "secret,id=…: Unexpected argument");
    fails_with(&["qemu-nbd", "a", "secret,id=s,data=hush"], "unexpected argument 'secret,id=…'");
    let disk = dir.path().join("disk.raw");
    std::fs::write(&disk, [0; 512]).unwrap();
    let socket = dir.path().join("nbd.sock");
    let one = [&["qemu-nbd", "-f", "raw", "-k", text(&socket)], &twice[..], &twice, &[text(&disk)]].concat();
    fails_with(&one, "--object secret,id=s: ");
    // The state has another one: neither of the two is told.
    let options = ["--state", text(&state), "--object", "secret,id=s,data=aHVzaA==,format=base64"];
    let running = Daemon::start(Program::Infill, dir.path(), &options);
    let mut qmp = running.connect();
    running.quit(&mut qmp);
    fails_alone(&["--state", text(&state), "--object", "secret,id=s,data=hush"]);
}

/// A daemon that serves a disk over TLS with the credentials in `server`; what is on the disk is a file's content.
fn tls_daemon(certs: &Certs, dir: &Path, options: &[&str]) -> Daemon {
    let disk = dir.join("disk.raw");
    std::fs::write(&disk, vec![0x5a; DISK]).unwrap();
    let object = format!("tls-creds-x509,id=s,endpoint=server,dir={}", text(&certs.dir("good")));
    let file = format!("file,node-name=disk,filename={}", text(&disk));
    let server = format!("addr.type=unix,addr.path={},tls-creds=s", text(&dir.join("nbd.sock")));
    let fixed = ["--object", &object, "--blockdev", &file, "--nbd-server", &server];
    let export = ["--export", "nbd,id=e,node-name=disk,writable=on"];
    let options: Vec<&str> = fixed.into_iter().chain(export).chain(options.iter().copied()).collect();
    let daemon = Daemon::start(Program::Infill, dir, &options);
    // The monitor is there before it.
    wait_until("the NBD server is there", || dir.join("nbd.sock").exists());
    daemon
}

#[test]
fn exports_behind_tls_are_listed_in_the_same_words() {
    let certs = Certs::new();
    let dir = tempfile::tempdir().unwrap();
    let _daemon = tls_daemon(&certs, dir.path(), &[]);
    let (socket, good) = (dir.path().join("nbd.sock"), certs.dir("good"));
    let object = format!("tls-creds-x509,id=c,endpoint=client,dir={}", text(&good));
    let list = ["-L", "-k", text(&socket), "--object", &object, "--tls-creds", "c", "--tls-hostname"];
    let here = [&list[..], &["localhost"]].concat();
    let ours = run(INFILL, &[&["qemu-nbd"], &here[..]].concat());
    assert!(ours.contains(" export: 'disk'"), "{ours}");
    assert_eq!(ours, run("qemu-nbd", &here));
    let why = fails(INFILL, &[&["qemu-nbd"], &list[..], &["elsewhere"]].concat());
    assert!(why.contains("it is not for 'elsewhere'"), "{why}");
    let why = fails(INFILL, &["qemu-nbd", "-L", "-k", text(&socket)]);
    assert!(why.contains("the server wants TLS"), "{why}");
}

fn nbds(dir: &Path, certs: &Certs, credentials: &str) -> String {
    let (socket, credentials) = (dir.join("nbd.sock"), certs.dir(credentials));
    let hostname = "tls-hostname=localhost";
    format!("nbds+unix:///disk?socket={}&tls-certificates={}&{hostname}", text(&socket), text(&credentials))
}

#[test]
fn a_daemon_serves_over_tls_and_a_daemon_reads_over_it_and_credentials_in_use_stay() {
    let certs = Certs::new();
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let source = tls_daemon(&certs, there.path(), &[]);
    let daemon = Daemon::start(Program::Infill, here.path(), &[]);
    let mut qmp = daemon.connect();
    let server = json!({"type": "unix", "path": text(&there.path().join("nbd.sock"))});
    let node = |name: &str, extra: Value| {
        let mut node = json!({"driver": "nbd", "node-name": name, "server": server, "export": "disk"});
        node.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        node
    };
    qmp.run("object-add", creds("c", &certs.dir("good"), json!({"endpoint": "client"})));
    qmp.run("object-add", creds("f", &certs.dir("foreign"), json!({"endpoint": "client"})));
    qmp.run("object-add", creds("n", &certs.dir("nobody"), json!({"endpoint": "client"})));
    for (extra, why) in [
        (json!({}), "the server wants TLS: give credentials"),
        (json!({"tls-creds": "c"}), "No hostname for certificate validation"),
        (
            json!({"tls-creds": "c", "tls-hostname": "elsewhere"}),
            "it is not for 'elsewhere' but for localhost",
        ),
        (json!({"tls-creds": "f", "tls-hostname": "localhost"}), "none of our authorities"),
        (json!({"tls-creds": "n", "tls-hostname": "localhost"}), "the server wants a certificate"),
        (json!({"tls-hostname": "localhost"}), "'tls-hostname' is for TLS"),
    ] {
        let desc = qmp.refused("blockdev-add", node("r", extra))["desc"].to_string();
        assert!(desc.contains(why), "{desc}");
    }
    // What was refused holds nothing.
    qmp.run("object-del", json!({"id": "f"}));
    qmp.run("blockdev-add", node("remote", json!({"tls-creds": "c", "tls-hostname": "localhost"})));
    let why = qmp.refused("object-del", json!({"id": "c"}));
    assert_eq!(why["desc"], "object 'c' is in use, can not be deleted");
    // It is read through both, and served in the clear to us.
    let plain = here.path().join("plain.sock");
    qmp.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": text(&plain)}}}));
    qmp.run("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "remote", "writable": true}));
    let uri = format!("nbd+unix:///remote?socket={}", text(&plain));
    let guest = ["-f", "raw", "-c", "read -P 90 0 1M", "-c", "write -P 91 64k 4k", "-c", "flush", &uri];
    assert!(!run("qemu-io", &guest).contains("failed"));
    assert_eq!(std::fs::read(there.path().join("disk.raw")).unwrap()[64 << 10], 91);
    // The name that is told can be opened again.
    let nodes = qmp.run("query-named-block-nodes", json!({"flat": true}));
    let file = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "remote").unwrap();
    let said = run(INFILL, &["info", file["file"].as_str().unwrap()]);
    assert!(said.contains("1 MiB"), "{said}");
    qmp.run("block-export-del", json!({"id": "e", "mode": "hard"}));
    qmp.run("blockdev-del", json!({"node-name": "remote"}));
    qmp.run("object-del", json!({"id": "c"}));
    daemon.quit(&mut qmp);

    let mut qmp = source.connect();
    let why = qmp.refused("object-del", json!({"id": "s"}));
    assert_eq!(why["desc"], "object 's' is in use, can not be deleted");
    qmp.run("nbd-server-stop", json!({}));
    qmp.run("object-del", json!({"id": "s"}));
    source.quit(&mut qmp);
}

#[test]
fn a_server_with_tls_comes_back_with_it_after_a_kill() {
    let certs = Certs::new();
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    // As a manager makes it once, over a monitor.
    let daemon = Daemon::start(Program::Infill, dir.path(), &["--state", text(&state)]);
    let mut qmp = daemon.connect();
    std::fs::write(dir.path().join("disk.raw"), vec![0x5a; DISK]).unwrap();
    qmp.run("object-add", creds("s", &certs.dir("good"), json!({"endpoint": "server"})));
    let file = text(&dir.path().join("disk.raw")).to_owned();
    qmp.run("blockdev-add", json!({"driver": "file", "node-name": "disk", "filename": file}));
    let addr = json!({"type": "unix", "data": {"path": text(&dir.path().join("nbd.sock"))}});
    qmp.run("nbd-server-start", json!({"addr": addr, "tls-creds": "s"}));
    qmp.run("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "disk"}));
    daemon.process.kill();
    let daemon = Daemon::start(Program::Infill, dir.path(), &["--state", text(&state)]);
    let mut qmp = daemon.connect();
    run("nbdinfo", &[&nbds(dir.path(), &certs, "good")]);
    fails("nbdinfo", &[&nbds(dir.path(), &certs, "nobody")]);
    let plain = format!("nbd+unix:///disk?socket={}", text(&dir.path().join("nbd.sock")));
    assert!(fails(INFILL, &["info", &plain]).contains("the server wants TLS"));
    daemon.quit(&mut qmp);
}

#[test]
fn our_clients_and_those_that_people_use_are_served_and_refused_by_the_daemon() {
    let certs = Certs::new();
    let dir = tempfile::tempdir().unwrap();
    let daemon = tls_daemon(&certs, dir.path(), &[]);
    let good = nbds(dir.path(), &certs, "good");
    for (program, args) in [(INFILL, ["info", &good]), ("nbdinfo", ["--json", &good])] {
        run(program, &args);
    }
    let map = run(INFILL, &["map", "--output=json", "-f", "raw", &good]);
    assert!(map.contains("\"length\": 1048576"), "{map}");
    let plain = format!("nbd+unix:///disk?socket={}", text(&dir.path().join("nbd.sock")));
    assert!(fails(INFILL, &["info", &plain]).contains("the server wants TLS"));
    assert!(fails("qemu-img", &["info", &plain]).contains("TLS"));
    for credentials in ["foreign", "expired", "nobody"] {
        let said = fails(INFILL, &["info", &nbds(dir.path(), &certs, credentials)]);
        assert!(said.contains("certificate"), "{said}");
    }
    assert!(
        fails(INFILL, &["info", "nbds://localhost:1/x?tls-certificates=/nonexistent"])
            .contains("Unable to access credentials /nonexistent/ca-cert.pem: No such file or directory")
    );
    let nowhere =
        Command::new(INFILL).args(["info", "nbds://localhost:1/x"]).env("HOME", dir.path()).output();
    let said = String::from_utf8(nowhere.unwrap().stderr).unwrap();
    assert!(said.contains("there are no credentials for TLS: name their directory"), "{said}");
    let mut qmp = daemon.connect();
    daemon.quit(&mut qmp);
}

#[test]
fn an_overlay_over_a_source_behind_tls_is_filled_and_names_it_in_its_header() {
    let certs = Certs::new();
    let dir = tempfile::tempdir().unwrap();
    let daemon = tls_daemon(&certs, dir.path(), &[]);
    let (overlay, uri) = (dir.path().join("overlay.qcow2"), nbds(dir.path(), &certs, "good"));
    run(INFILL, &["create", "-q", "-b", &uri, "-F", "raw", text(&overlay)]);
    let said = run(INFILL, &["info", text(&overlay)]);
    assert!(said.contains(&uri), "{said}");
    // A header that sends us to some directory of credentials is not followed for strangers.
    let said = fails(INFILL, &["map", "--untrusted", "-f", "qcow2", text(&overlay)]);
    assert!(said.contains("names the directory of credentials"), "{said}");
    run(INFILL, &["stream", "-q", text(&overlay)]);
    let mut qmp = daemon.connect();
    daemon.quit(&mut qmp);
    let guest = ["-r", "-f", "qcow2", "-c", "read -P 90 0 1M", text(&overlay)];
    assert!(!run("qemu-io", &guest).contains("failed"));
}

#[test]
fn serve_insists_on_tls_and_prints_where_it_is_found() {
    let certs = Certs::new();
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    std::fs::write(&disk, vec![7; DISK]).unwrap();
    let serve = |socket: &Path, options: &[&str]| {
        let mut command = Command::new(INFILL);
        command.args(["serve", "-t", "-r", "-f", "raw", "-x", "disk", "-k", text(socket)]);
        let process = Process::start(command.arg("--tls-creds").args(options).arg(text(&disk)));
        wait_for_socket(socket);
        process
    };
    let socket: PathBuf = dir.path().join("nbd.sock");
    let mut strict = serve(&socket, &[text(&certs.dir("good"))]);
    run("nbdinfo", &[&nbds(dir.path(), &certs, "good")]);
    fails("nbdinfo", &[&nbds(dir.path(), &certs, "nobody")]);
    let plain = format!("nbd+unix:///disk?socket={}", text(&socket));
    fails("nbdinfo", &[&plain]);
    strict.signal("TERM");
    strict.wait_for_success();
    let mut open = serve(&socket, &[text(&certs.dir("good")), "--tls-verify-peer", "off"]);
    run("nbdinfo", &[&nbds(dir.path(), &certs, "nobody")]);
    fails("nbdinfo", &[&plain]);
    open.signal("TERM");
    open.wait_for_success();
    // Over TCP the host's name, or address, is what the certificate must be for.
    let mut command = Command::new(INFILL);
    command.args(["serve", "-t", "-r", "-f", "raw", "-x", "disk", "-p", "0", "--tls-creds"]);
    command.arg(certs.dir("good")).arg(&disk).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut tcp = Process(command.spawn().unwrap());
    let mut printed = String::new();
    BufReader::new(tcp.0.stdout.take().unwrap()).read_line(&mut printed).unwrap();
    assert!(printed.starts_with("nbds://127.0.0.1:"), "{printed}");
    let credentials = format!("?tls-certificates={}", text(&certs.dir("good")));
    for host in ["127.0.0.1", "localhost"] {
        let uri = printed.trim().replace("127.0.0.1", host) + &credentials;
        run(INFILL, &["info", "-f", "raw", &uri]);
        run("nbdinfo", &[&uri]);
    }
    let elsewhere = printed.trim().to_owned() + &credentials + "&tls-hostname=elsewhere";
    assert!(fails(INFILL, &["info", "-f", "raw", &elsewhere]).contains("it is not for 'elsewhere'"));
    tcp.signal("TERM");
    tcp.wait_for_success();
    let said = fails(INFILL, &["serve", "-f", "raw", "--tls-creds", "/nonexistent", text(&disk)]);
    assert!(said.contains("Unable to access credentials /nonexistent/ca-cert.pem"), "{said}");
}
