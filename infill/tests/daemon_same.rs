//! The same command line and the same commands, given to our daemon and to qemu-storage-daemon, are answered the same.
//!
//! What differs by nature is left out ([`same`]).

mod common;
#[path = "common/qmp.rs"]
mod qmp;
#[path = "common/same.rs"]
mod same;

use std::path::Path;

use common::{Process, run, text, wait_for_socket};
use qmp::{Daemon, Program, Qmp};
use same::Step;
use serde_json::{Value, json};

use same::Step::{Ask, AskClass, Await, AwaitStatus, Bytes, Heal};
use same::{compare, play, same};

/// Formats whose overlays are driven.
const FORMATS: [&str; 2] = ["qcow2", "qed"];
/// Size of the test's disks.
const DISK: &str = "1M";

/// `overlay` over `base.raw`, which holds data.
fn overlay(dir: &Path, format: &str) {
    let base: Vec<u8> = (0..1 << 20).map(|at: u32| (at / 512 + at * 7) as u8).collect();
    std::fs::write(dir.join("base.raw"), base).unwrap();
    let image = dir.join("overlay");
    run("qemu-img", &["create", "-q", "-f", format, "-b", "base.raw", "-F", "raw", text(&image), DISK]);
}

fn named(format: &str, extra: Value) -> Value {
    let mut node = json!({"driver": format, "node-name": "top",
        "file": {"driver": "file", "filename": "DIR/overlay"}});
    node.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    node
}

fn raw_base() -> Step {
    Ask(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "base", "read-only": true,
            "file": {"driver": "file", "filename": "DIR/base.raw"}}),
    )
}

const UNIX: &str = "--nbd-server=addr.type=unix,addr.path=DIR/nbd.sock";

fn nothing(_: &Path) {}

#[test]
fn malformed_input_is_answered_the_same() {
    let script: Vec<Step> = [
        &b"{'execute':'query-jobs','id':[1,{'a':null}]}"[..],
        b"{\"execute\":\"nope\",\"id\":1}",
        b"{\"execute\":\"x\" \"y\"}",
        b"{\"execute\":}",
        b"{\"execute\":1,\"id\":7}",
        b"{\"exec-oob\":\"query-jobs\",\"id\":3}",
        b"{\"foo\":1}",
        b"{\"execute\":\"query-jobs\",\"foo\":2,\"id\":2}",
        b"{\"execute\":\"query-jobs\",\"arguments\":1}",
        b"{\"execute\":\"query-jobs\",\"arguments\":{\"a\":1}}",
        b"[] 1 \"abc\" {\"id\":5}",
        b"{\"execute\":\"query-jobs\"}{\"execute\":\"query-jobs\"} {\"execute\":\n\"query-jobs\"}",
        b"\x01",
        b"\xff",
        b"\xef\xbb\xbf{\"execute\":\"query-jobs\"}",
        b"{\"execute\":\"query-\xff\xfe\"}",
        b"{\"execute\":\"query-jobs\",\"id\":\"\\u00e9\xc3\xa9 \\' \\/ \\ud83d\\ude00\"}",
        b"{\"execute\":\"query-jobs\",\"id\":\"\\ud800 \"}",
        b"{\"execute\":\"query-jobs\",\"id\":01}",
        b"{\"execute\":\"query-jobs\",\"id\":nul}",
        b"{\"execute\":\"query-jobs\",\"id\":%d}",
        b"{\"execute\":\"query-jobs\",\"id\":1,\"id\":2}",
        b"{\"execute\":\"query-jobs\",}",
        b"}]",
        b"{]",
        b"[}",
        b"{1:2}",
        b"[1 2]",
        b"{\"a\nb\":1}",
        b"{\"execute\":\"qmp_capabilities\"}",
        b"{\"execute\":\"query-jobs\",\"id\":18446744073709551615}",
        b"{\"execute\":\"query-jobs\",\"id\":-9223372036854775808}",
        b"{\"execute\":\"query-jobs\",\"id\":1.5}",
    ]
    .map(Bytes)
    .into();
    same(&[], &script, nothing);
}

#[test]
fn negotiation_is_the_same() {
    let exchange = |program: Program| {
        let dir = tempfile::tempdir().unwrap();
        let daemon = Daemon::start(program, dir.path(), &[]);
        let (mut qmp, mut greeting) = Qmp::greeted(&daemon.socket);
        for part in ["micro", "minor", "major"] {
            assert!(greeting["QMP"]["version"]["qemu"][part].is_number(), "{greeting}");
        }
        assert!(greeting["QMP"]["version"]["package"].is_string(), "{greeting}");
        greeting["QMP"]["version"].take();
        let mut told = vec![greeting];
        for line in [
            "{\"execute\":\"query-jobs\"}",
            "{\"exec-oob\":\"qmp_capabilities\"}",
            "{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":1}}",
            "{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[1]}}",
            "{\"execute\":\"qmp_capabilities\",\"arguments\":{\"x\":1}}",
            "{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"oob\"]},\"id\":1}",
            "{\"exec-oob\":\"query-jobs\"}",
            "{\"exec-oob\":\"nope\"}",
            "{\"execute\":\"query-jobs\"}",
        ] {
            qmp.send(line.as_bytes());
            told.push(qmp.answer());
        }
        daemon.quit(&mut qmp);
        told
    };
    assert_eq!(exchange(Program::Infill), exchange(Program::Qemu));
}

#[test]
fn nodes_and_their_refusals_are_the_same() {
    for format in FORMATS {
        let add = |options: Value| Ask("blockdev-add", options);
        let script = [
            add(json!({"driver": "null-co"})),
            add(json!({"driver": "null-co", "node-name": "n0", "size": 1048576})),
            add(json!({"driver": "null-co", "node-name": "n0"})),
            add(json!({"node-name": "n1"})),
            add(json!({})),
            add(json!({"driver": "nope", "node-name": "n1"})),
            add(json!({"driver": 7, "node-name": "n1"})),
            add(json!({"driver": "null-co", "node-name": "n1", "size": "12"})),
            add(json!({"driver": "null-co", "node-name": "n1", "foo": 12})),
            add(json!({"driver": "null-co", "node-name": "1abc"})),
            add(json!({"driver": "null-co", "node-name": "abcdefghijklmnopqrstuvwxyz012345"})),
            add(json!({"driver": "null-co", "node-name": "x", "read-only": "on"})),
            add(json!({"driver": "null-co", "node-name": "x", "cache": {"foo": true}})),
            add(json!({"driver": "raw", "node-name": "x", "file": 7})),
            add(json!({"driver": "raw", "node-name": "x", "file": "missing"})),
            add(json!({"driver": "raw", "node-name": "x", "file": {"driver": "file"}})),
            AskClass("blockdev-add", json!({"driver": "file", "node-name": "x", "filename": "/nonexist"})),
            AskClass("blockdev-add", json!({"driver": format, "node-name": "x", "file": "n0"})),
            AskClass(
                "blockdev-add",
                json!({"driver": "nbd", "node-name": "x",
                "server": {"type": "unix", "path": "DIR/nobody"}}),
            ),
            raw_base(),
            add(named(format, json!({"backing": "base"}))),
            Ask("query-named-block-nodes", json!({"flat": "x"})),
            Ask("query-block", json!({})),
            Ask("blockdev-del", json!({"node-name": "base"})),
            Ask("blockdev-del", json!({"node-name": "nobody"})),
            Ask("blockdev-del", json!({})),
            Ask("blockdev-del", json!({"node-name": "top", "z": 1})),
            Ask("blockdev-del", json!({"node-name": "top"})),
            Ask("blockdev-del", json!({"node-name": "base"})),
            Ask("blockdev-del", json!({"node-name": "n0"})),
            Ask("query-named-block-nodes", json!({})),
        ];
        same(&[], &script, |dir| overlay(dir, format));
    }
}

#[test]
fn nodes_are_told_the_same() {
    for format in FORMATS {
        let script = [
            Ask("blockdev-add", named(format, json!({}))),
            Ask("query-named-block-nodes", json!({"flat": true})),
            Ask("query-named-block-nodes", json!({})),
            Ask("blockdev-del", json!({"node-name": "top"})),
            Ask("query-named-block-nodes", json!({})),
        ];
        same(&[], &script, |dir| overlay(dir, format));
    }
}

#[test]
fn the_nbd_server_and_exports_are_the_same() {
    let start = |arguments: Value| Ask("nbd-server-start", arguments);
    let export = |arguments: Value| Ask("block-export-add", arguments);
    let unix = json!({"addr": {"type": "unix", "data": {"path": "DIR/nbd.sock"}}});
    let script = [
        Ask("nbd-server-stop", json!({})),
        start(unix.clone()),
        start(unix.clone()),
        Ask("nbd-server-stop", json!({})),
        start(json!({"addr": {"type": "unix", "path": "DIR/nbd.sock"}})),
        start(json!({"addr": {"type": "foo", "data": {}}})),
        start(json!({"addr": {"type": "unix", "data": {"path": 7}}})),
        start(json!({"addr": {"type": "inet", "data": {"host": "127.0.0.1"}}})),
        start(json!({"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": 0}}})),
        start(
            json!({"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}, "tls-creds": "x"}),
        ),
        start(
            json!({"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}, "max-connections": -1}),
        ),
        start(json!({})),
        export(json!({"type": "nbd", "id": "e0", "node-name": "n0"})),
        Ask("blockdev-add", json!({"driver": "null-co", "node-name": "n0", "size": 1048576})),
        Ask("blockdev-add", json!({"driver": "null-co", "node-name": "ro", "read-only": true})),
        export(json!({"type": "nbd", "id": "e0", "node-name": "n0"})),
        start(unix),
        export(json!({"type": "nbd", "id": "e0", "node-name": "n0"})),
        export(json!({"type": "nbd", "id": "e0", "node-name": "n0"})),
        export(json!({"type": "nbd", "id": "e1", "node-name": "n0"})),
        export(
            json!({"type": "nbd", "id": "e1", "node-name": "n0", "name": "x", "description": "d", "writable": true}),
        ),
        export(json!({"type": "nbd", "id": "e2", "node-name": "n0", "name": "y", "foo": 1})),
        export(json!({"type": "nbd", "node-name": "n0"})),
        export(json!({"type": "nbd", "id": "2e", "node-name": "n0", "name": "y"})),
        export(json!({"type": "zz", "id": "e2", "node-name": "n0"})),
        export(json!({"id": "e2", "node-name": "n0"})),
        export(json!({"type": "nbd", "id": "e2", "node-name": "ro", "writable": true})),
        export(json!({"type": "nbd", "id": "e2", "node-name": "n0", "name": "y", "iothread": "q"})),
        Ask("object-add", json!({"qom-type": "iothread", "id": "q"})),
        Ask("object-add", json!({"qom-type": "iothread", "id": "q"})),
        Ask("object-add", json!({"qom-type": "nope", "id": "r"})),
        Ask("object-add", json!({"qom-type": "iothread"})),
        export(
            json!({"type": "nbd", "id": "e2", "node-name": "n0", "name": "y", "iothread": "q", "allocation-depth": true}),
        ),
        Ask("query-block-exports", json!({})),
        Ask("blockdev-del", json!({"node-name": "n0"})),
        Ask("block-export-del", json!({"id": "nope"})),
        Ask("block-export-del", json!({"id": "e0", "mode": "x"})),
        Ask("block-export-del", json!({"id": "e0", "mode": "safe"})),
        Ask("block-export-del", json!({"id": "e1", "mode": "hard"})),
        Ask("query-block-exports", json!({})),
        Ask("nbd-server-stop", json!({})),
        Ask("query-block-exports", json!({})),
        Ask("object-del", json!({"id": "q"})),
        Ask("object-del", json!({"id": "q"})),
        Ask("blockdev-del", json!({"node-name": "n0"})),
    ];
    same(&[], &script, nothing);
}

#[test]
fn commands_about_jobs_that_are_not_there_are_refused_the_same() {
    let mut script = Vec::new();
    for (command, key) in [
        ("block-job-cancel", "device"),
        ("block-job-pause", "device"),
        ("block-job-resume", "device"),
        ("block-job-complete", "device"),
        ("block-job-dismiss", "id"),
        ("block-job-finalize", "id"),
        ("job-cancel", "id"),
        ("job-pause", "id"),
        ("job-resume", "id"),
        ("job-complete", "id"),
        ("job-dismiss", "id"),
        ("job-finalize", "id"),
    ] {
        script.extend([
            Ask(command, json!({key: "nobody"})),
            Ask(command, json!({})),
            Ask(command, json!({key: 7})),
            Ask(command, json!({key: "nobody", "more": 1})),
        ]);
    }
    script.push(Ask("block-job-set-speed", json!({"device": "nobody"})));
    script.push(Ask("block-job-set-speed", json!({"device": "nobody", "speed": 7})));
    script.push(Ask("query-jobs", json!({})));
    script.push(Ask("query-block-jobs", json!({})));
    same(&[], &script, nothing);
}

#[test]
fn a_stream_is_refused_the_same() {
    for format in FORMATS {
        let stream = |rest: Value| {
            let mut arguments = json!({"job-id": "j0", "device": "top"});
            arguments.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
            Ask("block-stream", arguments)
        };
        let script = [
            raw_base(),
            Ask("blockdev-add", json!({"driver": "null-co", "node-name": "other"})),
            Ask("blockdev-add", named(format, json!({"backing": "base"}))),
            Ask("block-stream", json!({"device": "top"})),
            Ask("block-stream", json!({"job-id": "j0"})),
            stream(json!({"device": "nobody"})),
            stream(json!({"job-id": "0j"})),
            stream(json!({"base": "x"})),
            stream(json!({"base-node": "x"})),
            stream(json!({"bottom": "x"})),
            stream(json!({"base-node": "other"})),
            stream(json!({"base-node": "top"})),
            stream(json!({"bottom": "other"})),
            stream(json!({"base": "x", "base-node": "base"})),
            stream(json!({"bottom": "x", "base-node": "base"})),
            stream(json!({"bottom": "x", "base": "base"})),
            stream(json!({"backing-file": "x"})),
            stream(json!({"on-error": "zz"})),
            stream(json!({"speed": "1"})),
            stream(json!({"filter-node-name": "1"})),
            stream(json!({"auto-finalize": 1})),
            stream(json!({"zz": 1})),
            Ask("query-jobs", json!({})),
        ];
        same(&[], &script, |dir| overlay(dir, format));
    }
}

#[test]
fn a_streams_whole_life_is_told_the_same() {
    for format in FORMATS {
        let script = [
            raw_base(),
            Ask("blockdev-add", named(format, json!({"backing": "base"}))),
            Ask("block-stream", json!({"job-id": "j0", "device": "top"})),
            Await("BLOCK_JOB_COMPLETED"),
            AwaitStatus("null"),
            Ask("query-jobs", json!({})),
            // The backing is nobody's any more.
            Ask("blockdev-del", json!({"node-name": "base"})),
            Ask("query-named-block-nodes", json!({"flat": true})),
            Ask("blockdev-del", json!({"node-name": "top"})),
        ];
        same(&[], &script, |dir| overlay(dir, format));
    }
}

#[test]
fn a_stream_that_its_manager_finalizes_and_dismisses_is_told_the_same() {
    for format in FORMATS {
        let script = [
            raw_base(),
            Ask("blockdev-add", named(format, json!({"backing": "base"}))),
            Ask(
                "block-stream",
                json!({"job-id": "j0", "device": "top", "auto-finalize": false, "auto-dismiss": false}),
            ),
            Await("BLOCK_JOB_PENDING"),
            Ask("query-jobs", json!({})),
            Ask("query-block-jobs", json!({})),
            Ask("block-stream", json!({"job-id": "j1", "device": "top"})),
            Ask("blockdev-del", json!({"node-name": "top"})),
            Ask("block-job-dismiss", json!({"id": "j0"})),
            Ask("block-job-finalize", json!({"id": "j0"})),
            AwaitStatus("concluded"),
            Ask("query-jobs", json!({})),
            Ask("job-finalize", json!({"id": "j0"})),
            Ask("job-pause", json!({"id": "j0"})),
            Ask("job-cancel", json!({"id": "j0"})),
            Ask("job-dismiss", json!({"id": "j0"})),
            Ask("job-dismiss", json!({"id": "j0"})),
            Ask("blockdev-del", json!({"node-name": "base"})),
        ];
        same(&[], &script, |dir| overlay(dir, format));
    }
}

#[test]
fn a_stream_that_is_paused_and_cancelled_is_told_the_same() {
    for format in FORMATS {
        let script = [
            raw_base(),
            Ask("blockdev-add", named(format, json!({"backing": "base"}))),
            // So slow that it does not end by itself.
            Ask("block-stream", json!({"job-id": "j0", "device": "top", "speed": 1})),
            Ask("block-job-pause", json!({"device": "j0"})),
            AwaitStatus("paused"),
            Ask("block-job-pause", json!({"device": "j0"})),
            Ask("block-job-cancel", json!({"device": "j0"})),
            Ask("block-job-complete", json!({"device": "j0"})),
            Ask("block-job-set-speed", json!({"device": "j0", "speed": -1})),
            Ask("block-job-resume", json!({"device": "j0"})),
            AwaitStatus("running"),
            Ask("job-resume", json!({"id": "j0"})),
            Ask("job-cancel", json!({"id": "j0"})),
            AwaitStatus("null"),
            Ask("query-block-jobs", json!({})),
            Ask("blockdev-del", json!({"node-name": "base"})),
            Ask("blockdev-del", json!({"node-name": "top"})),
        ];
        same_but_progress(&script, |dir| overlay(dir, format));
    }
}

/// As [`same`], but for how far a job was when it was cancelled.
fn same_but_progress(script: &[Step], prepare: impl Fn(&Path)) {
    let [ours, theirs] = [Program::Infill, Program::Qemu].map(|program| {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path());
        let (answers, mut events) = play(program, dir.path(), &[], script);
        for event in &mut events {
            if let Some(offset) = event["data"].get_mut("offset") {
                offset.take();
            }
        }
        (answers, events)
    });
    compare(ours, theirs);
}

#[test]
fn a_stream_from_a_distant_source_is_told_the_same() {
    for format in FORMATS {
        let source = |dir: &Path| dir.join("source.sock");
        let server = json!({"type": "unix", "path": "DIR/source.sock"});
        let script = [
            Ask(
                "blockdev-add",
                json!({"driver": "nbd", "node-name": "base", "server": server, "read-only": true}),
            ),
            Ask("blockdev-add", named(format, json!({"backing": "base"}))),
            Ask("block-stream", json!({"job-id": "j0", "device": "top"})),
            AwaitStatus("null"),
            Ask("blockdev-del", json!({"node-name": "base"})),
            Ask("query-named-block-nodes", json!({"flat": true})),
        ];
        let sources = std::cell::RefCell::new(Vec::new());
        same(&[], &script, |dir| {
            overlay(dir, format);
            let mut nbdkit = std::process::Command::new("nbdkit");
            nbdkit.args([
                "-f",
                "-U",
                text(&source(dir)),
                "--filter=delay",
                "pattern",
                DISK,
                "delay-read=2ms",
            ]);
            sources.borrow_mut().push(Process::start(&mut nbdkit));
            wait_for_socket(&source(dir));
        });
    }
}

#[test]
fn a_stream_that_an_error_stops_and_its_manager_resumes_is_told_the_same() {
    for format in FORMATS {
        let server = json!({"type": "unix", "path": "DIR/source.sock"});
        let script = [
            Ask(
                "blockdev-add",
                json!({"driver": "nbd", "node-name": "base", "server": server, "read-only": true}),
            ),
            Ask("blockdev-add", named(format, json!({"backing": "base"}))),
            Ask("block-stream", json!({"job-id": "j0", "device": "top", "on-error": "stop"})),
            AwaitStatus("paused"),
            Heal,
            Ask("block-job-resume", json!({"device": "j0"})),
            AwaitStatus("null"),
            Ask("blockdev-del", json!({"node-name": "base"})),
        ];
        let sources = std::cell::RefCell::new(Vec::new());
        same(&[], &script, |dir| {
            overlay(dir, format);
            let bad = dir.join("bad");
            std::fs::write(&bad, []).unwrap();
            let (socket, trigger) = (dir.join("source.sock"), format!("error-file={}", text(&bad)));
            let mut nbdkit = std::process::Command::new("nbdkit");
            nbdkit.args(["-f", "-U", text(&socket), "--filter=error", "pattern", DISK]);
            nbdkit.args(["error-pread=EIO", "error-pread-rate=1", &trigger]);
            sources.borrow_mut().push(Process::start(&mut nbdkit));
            wait_for_socket(&socket);
        });
    }
}

#[test]
fn the_same_command_line_makes_the_same_daemon() {
    for format in FORMATS {
        let node = format!("--blockdev={format},node-name=top,file.driver=file,file.filename=DIR/overlay");
        let json = r#"{"driver": "raw", "node-name": "j", "read-only": true,
            "file": {"driver": "file", "filename": "DIR/base.raw"}}"#;
        let options = [
            "--object=iothread,id=io0",
            &node,
            "--blockdev",
            json,
            UNIX,
            "--export",
            "type=nbd,id=e0,node-name=top,name=disk,writable=on",
            "--export=nbd,id=e1,node-name=j,iothread=io0",
            "--pidfile=DIR/pid",
        ];
        let script = [
            Ask("query-block-exports", json!({})),
            Ask("query-named-block-nodes", json!({"flat": true})),
            Ask("block-export-del", json!({"id": "e1"})),
            Ask("nbd-server-stop", json!({})),
        ];
        same(&options, &script, |dir| overlay(dir, format));
    }
}

#[test]
fn a_wrong_command_line_is_refused_with_the_same_words() {
    let dir = tempfile::tempdir().unwrap();
    let unix = UNIX.replace("DIR", text(dir.path()));
    let unix = unix.as_str();
    let null = "--blockdev=null-co,node-name=n";
    for line in [
        &["--blockdev", "null-co"][..],
        &["--blockdev", "driver=null-co,node-name"],
        &["--blockdev", "driver=null-co,node-name="],
        &["--blockdev", "null-co,node-name=a,size=1k"],
        &["--blockdev", "null-co,,node-name=a"],
        &["--blockdev", "driver=null-co,a..b=a"],
        &["--blockdev", "driver=null-co,node-name=a,cache=b,cache.direct=on"],
        &["--blockdev", "driver=null-co,node-name=a,a.0=on,a.2=on"],
        &["--blockdev", "driver=null-co,node-name=a,a.0=on,a.b=on"],
        &["--blockdev", "driver=null-co,node-name=a,cache.direct=maybe"],
        &["--blockdev", "driver=null-co,node-name=a,file.foo=maybe"],
        &["--blockdev", "null-co,help"],
        &["--blockdev", "{\"driver\":\"null-co\"}"],
        &["--blockdev", "{\"driver\":\"null-co\""],
        &["--blockdev", "{} x"],
        &["--blockdev", ""],
        &["--blockdev", "raw,node-name=r,file=nobody"],
        &["--blockdev", "raw,node-name=r,file.driver=file"],
        &["--blockdev", "nbd,node-name=r,server.type=foo"],
        &["--blockdev", "nbd,node-name=r,server=unix"],
        &["--chardev", "stdio"],
        &["--chardev", "stdio,id=a,foo=1"],
        &["--chardev", "foo,id=a"],
        &["--chardev", "socket,id=a,path=/s,server=on,wait=off,host=x"],
        &["--chardev", "socket,id=a,host=localhost"],
        &["--monitor", "a"],
        &["--monitor", "chardev=a,foo=1"],
        &["--nbd-server", "unix"],
        &["--nbd-server", "addr.type=unix"],
        &["--nbd-server", "type=unix,path=/s"],
        &["--nbd-server", "addr.type=inet,addr.host=localhost"],
        &["--nbd-server", "addr.type=unix,addr.path=/s,max-connections=z"],
        &["--nbd-server", "addr.type=unix,addr.path=/s,tls-creds=z"],
        &[unix, unix],
        &["--export", "type=nbd,id=e,node-name=n"],
        &["--export", "nbd,id=e"],
        &["--export", "foo,id=e,node-name=n"],
        &[null, "--export=nbd,id=e,node-name=n"],
        &[unix, null, "--export=nbd,id=1e,node-name=n"],
        &[unix, null, "--export=nbd,id=e,node-name=n", "--export=nbd,id=e,node-name=n"],
        &[unix, null, "--export=nbd,id=e,node-name=n", "--export=nbd,id=f,node-name=n"],
        &[unix, null, "--export=nbd,id=e,node-name=n,iothread=x"],
        &["--object", "iothread"],
        &["--object", "foo,id=t0"],
        &["--nbd-server", "addr.type=unix,addr.path=/s,max-connections=5000000000"],
        &["foo"],
    ] {
        let told = |program: Program, name: &str| {
            let output = program.command().args(line).output().unwrap();
            assert_eq!(output.status.code(), Some(1), "{line:?}");
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            text.trim_end().strip_prefix(name).unwrap_or(&text).to_owned()
        };
        // The real one repeats the option as it was written, we as it is documented.
        let ours = told(Program::Infill, "infill: ");
        let theirs = told(Program::Qemu, "qemu-storage-daemon: ");
        let theirs = theirs.replace("--export=", "--export ").replace("--nbd-server=", "--nbd-server ");
        assert_eq!(ours, theirs, "{line:?}");
    }
}

#[test]
fn internal_snapshots_are_made_and_deleted_the_same() {
    let take = |device: &str, name: &str| json!({"device": device, "name": name});
    let action = |name: &str| json!({"type": "blockdev-snapshot-internal-sync", "data": take("top", name)});
    const TAKE: &str = "blockdev-snapshot-internal-sync";
    const DELETE: &str = "blockdev-snapshot-delete-internal-sync";
    let node = |name: &str, driver: &str, more: Value| {
        let mut node = json!({"driver": driver, "node-name": name});
        node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        Ask("blockdev-add", node)
    };
    let script = vec![
        Ask("blockdev-add", named("qcow2", json!({"node-name": "top"}))),
        node("below", "null-co", json!({})),
        node("raw", "raw", json!({"file": "below"})),
        node("fixed", "raw", json!({"read-only": true, "file": {"driver": "null-co"}})),
        Ask(TAKE, take("top", "one")),
        Ask(TAKE, take("top", "one")),
        Ask(TAKE, take("top", "")),
        Ask(TAKE, take("raw", "x")),
        Ask(TAKE, take("fixed", "x")),
        Ask(TAKE, take("below", "x")),
        Ask(TAKE, take("nobody", "x")),
        Ask(TAKE, json!({"device": "top"})),
        Ask(TAKE, take("top", "two")),
        Ask("query-named-block-nodes", json!({"flat": true})),
        Ask(DELETE, json!({"device": "top"})),
        Ask(DELETE, take("top", "none")),
        Ask(DELETE, json!({"device": "top", "id": "9"})),
        Ask(DELETE, json!({"device": "top", "id": "1", "name": "two"})),
        Ask(DELETE, take("nobody", "one")),
        Ask(DELETE, take("below", "one")),
        Ask(DELETE, take("raw", "one")),
        Ask("transaction", json!({"actions": [action("three"), action("one")]})),
        Ask("transaction", json!({"actions": [action("three"), {"type": "abort", "data": {}}]})),
        Ask("transaction", json!({"actions": [action("three"), action("four")]})),
        Ask(DELETE, take("top", "one")),
        Ask(DELETE, json!({"device": "top", "id": "2"})),
        Ask("query-named-block-nodes", json!({"flat": true})),
        Ask("blockdev-del", json!({"node-name": "top"})),
        Step::Run(&["qemu-img", "check", "-q", "DIR/overlay"]),
        Ask("blockdev-add", named("qcow2", json!({"node-name": "top"}))),
        Ask("query-named-block-nodes", json!({"flat": true})),
    ];
    same(&[], &script, |dir| overlay(dir, "qcow2"));
}
