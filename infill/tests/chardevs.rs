//! Character devices at run time, ring buffers, and the experimental commands: in qemu-storage-daemon's words.

mod common;
#[path = "common/qmp.rs"]
mod qmp;
#[path = "common/same.rs"]
mod same;

use std::path::Path;

use common::{run, text};
use qmp::{Daemon, Program};
use same::Step::{self, Ask, AskClass};
use same::{same, same_answers};
use serde_json::{Value, json};

fn add(id: &str, kind: &str, data: Value) -> Step {
    Ask("chardev-add", json!({"id": id, "backend": {"type": kind, "data": data}}))
}

fn change(id: &str, kind: &str, data: Value) -> Step {
    Ask("chardev-change", json!({"id": id, "backend": {"type": kind, "data": data}}))
}

fn write(device: &str, data: &str, format: &str) -> Step {
    Ask("ringbuf-write", json!({"device": device, "data": data, "format": format}))
}

fn read(device: &str, size: i64, format: &str) -> Step {
    Ask("ringbuf-read", json!({"device": device, "size": size, "format": format}))
}

fn unix(name: &str) -> Value {
    json!({"type": "unix", "data": {"path": format!("DIR/{name}")}})
}

#[test]
fn devices_come_and_go_the_same() {
    let list = || Ask("query-chardev", json!({}));
    let script = [
        list(),
        add("r", "ringbuf", json!({})),
        add("r", "ringbuf", json!({})),
        add("r2", "ringbuf", json!({"size": 100})),
        add("r2", "ringbuf", json!({"size": -16})),
        add("r2", "ringbuf", json!({"size": 16})),
        add("old", "memory", json!({})),
        add("n", "null", json!({})),
        add("n2", "null", json!({"x": 1})),
        add("n2", "zz", json!({})),
        add("n2", "vc", json!({})),
        Ask("chardev-add", json!({"id": "x", "backend": {"type": "null"}})),
        Ask("chardev-add", json!({"id": "x", "backend": 7})),
        Ask("chardev-add", json!({"id": "x"})),
        Ask("chardev-add", json!({"backend": {"type": "null", "data": {}}})),
        add("f", "file", json!({"out": "DIR/out"})),
        add("f2", "file", json!({"out": "DIR/nowhere/out"})),
        add("f2", "file", json!({})),
        add("s", "socket", json!({"addr": unix("s.sock")})),
        add("s2", "socket", json!({"addr": unix("none.sock"), "server": false})),
        add("s2", "socket", json!({"addr": unix("none.sock"), "server": false, "wait": false})),
        list(),
        Ask("qom-list", json!({"path": "/chardevs"})),
        Ask("chardev-send-break", json!({"id": "r"})),
        Ask("chardev-send-break", json!({"id": "zz"})),
        change("r", "null", json!({})),
        change("zz", "null", json!({})),
        change("monitor", "null", json!({})),
        change("s", "socket", json!({"addr": unix("s.sock")})),
        list(),
        Ask("chardev-remove", json!({"id": "monitor"})),
        Ask("chardev-remove", json!({"id": "zz"})),
        Ask("chardev-remove", json!({"id": "r"})),
        Ask("chardev-remove", json!({"id": "s"})),
        list(),
        add("s", "socket", json!({"addr": unix("s.sock")})),
    ];
    same(&["--chardev", "ringbuf,id=q,size=64", "--chardev", "file,id=ff,path=DIR/out2"], &script, |_| {});
}

#[test]
fn a_ring_buffer_gives_what_it_was_given_the_same() {
    let mut script = vec![add("r", "ringbuf", json!({})), add("small", "ringbuf", json!({"size": 16}))];
    script.extend([
        write("r", "hello", "utf8"),
        read("r", 3, "utf8"),
        read("r", 100, "utf8"),
        read("r", 100, "utf8"),
        write("small", "0123456789abcdefXYZ", "utf8"),
        read("small", 100, "utf8"),
        write("r", "aGk=", "base64"),
        read("r", 100, "base64"),
        write("r", "a%b!", "base64"),
        write("r", "/0Fi", "base64"),
        read("r", 100, "base64"),
        write("r", "/w==", "base64"),
        read("r", 100, "utf8"),
        write("r", "", "utf8"),
        read("r", 0, "utf8"),
        read("r", -1, "utf8"),
        read("r", 1 << 40, "utf8"),
        read("monitor", 1, "utf8"),
        read("zz", 1, "utf8"),
        write("monitor", "1", "utf8"),
        write("zz", "1", "utf8"),
        write("r", "1", "zz"),
        Ask("ringbuf-write", json!({"device": "r"})),
        Ask("ringbuf-read", json!({"device": "r"})),
        Ask("ringbuf-read", json!({"device": "r", "size": "1"})),
    ]);
    same(&[], &script, |_| {});
}

#[test]
fn what_is_not_opened_at_run_time_is_refused_by_name_and_a_failed_change_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(Program::Infill, dir.path(), &[]);
    let mut qmp = daemon.connect();
    let backend = |kind: &str, data: Value| json!({"id": "x", "backend": {"type": kind, "data": data}});
    for (kind, data, why) in [
        ("stdio", json!({}), "command line alone"),
        ("pty", json!({}), "'pty' is not supported"),
        ("udp", json!({"remote": unix("u")}), "'udp' is not supported"),
        ("ringbuf", json!({"size": 1u64 << 40}), "at most"),
        ("socket", json!({"addr": unix("s"), "tls-creds": "t"}), "tls-creds"),
        ("socket", json!({"addr": unix("s"), "wait": true}), "'wait'"),
    ] {
        let error = qmp.refused("chardev-add", backend(kind, data));
        assert_eq!(error["class"], "GenericError");
        assert!(error["desc"].as_str().unwrap().contains(why), "{error}");
    }
    qmp.run("chardev-add", backend("ringbuf", json!({})));
    qmp.run("ringbuf-write", json!({"device": "x", "data": "kept"}));
    qmp.refused("chardev-change", backend("file", json!({"out": "/nowhere/at/all"})));
    assert_eq!(qmp.run("ringbuf-read", json!({"device": "x", "size": 10})), json!("kept"));
    // There is an end of them.
    let mut last = None;
    for nth in 0..300 {
        let id = format!("n{nth}");
        let answer = qmp.ask("chardev-add", json!({"id": id, "backend": {"type": "null", "data": {}}}));
        last = Some(answer);
    }
    assert!(last.unwrap()["error"]["desc"].as_str().unwrap().contains("which is the most"));
    daemon.quit(&mut qmp);
}

fn images(dir: &Path) {
    std::fs::write(dir.join("r.img"), vec![7; 1 << 20]).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&dir.join("q.img")), "1M"]);
    run("qemu-img", &["create", "-q", "-f", "qed", text(&dir.join("d.img")), "1M"]);
}

fn disks() -> Vec<Step> {
    let disk = |format: &str, name: &str| {
        let file =
            json!({"driver": "file", "node-name": format!("{name}f"), "filename": format!("DIR/{name}.img")});
        Ask("blockdev-add", json!({"driver": format, "node-name": name, "file": file}))
    };
    vec![disk("raw", "r"), disk("qcow2", "q"), disk("qed", "d")]
}

#[test]
fn an_amend_that_asks_for_nothing_is_a_job_and_everything_else_is_refused_the_same() {
    let mut script = disks();
    let amend = |node: &str, options: Value| {
        Ask("x-blockdev-amend", json!({"job-id": "j", "node-name": node, "options": options}))
    };
    for node in ["r", "d", "rf", "zz"] {
        for driver in ["qcow2", "raw", "qed", "file"] {
            if (node, driver) != ("zz", "file") {
                script.push(amend(node, json!({"driver": driver})));
            }
        }
    }
    script.extend([
        amend("q", json!({"driver": "raw"})),
        amend("q", json!({"driver": "zz"})),
        amend("q", json!({"driver": "qcow2", "size": 7})),
        amend("q", json!({})),
        amend("q", json!(7)),
        Ask("x-blockdev-amend", json!({"job-id": "j", "node-name": "q"})),
        amend("q", json!({"driver": "qcow2"})),
        Step::AwaitStatus("concluded"),
        Ask("query-jobs", json!({})),
        Ask("query-block-jobs", json!({})),
        amend("q", json!({"driver": "qcow2"})),
        Ask("job-dismiss", json!({"id": "j"})),
    ]);
    same(&[], &script, images);
}

#[test]
fn children_and_threads_are_changed_the_same() {
    let mut script = disks();
    let children = |arguments: Value| Ask("x-blockdev-change", arguments);
    let thread = |arguments: Value| Ask("x-blockdev-set-iothread", arguments);
    script.extend([
        children(json!({"parent": "q", "node": "r"})),
        children(json!({"parent": "q", "node": "zz"})),
        children(json!({"parent": "q", "child": "file"})),
        children(json!({"parent": "q", "child": "zz"})),
        children(json!({"parent": "q"})),
        children(json!({"parent": "zz"})),
        children(json!({"parent": "q", "child": "file", "node": "r"})),
        children(json!({"child": "file", "node": "r"})),
        Ask("object-add", json!({"qom-type": "iothread", "id": "io0"})),
        thread(json!({"node-name": "r", "iothread": "io0"})),
        thread(json!({"node-name": "r", "iothread": null})),
        thread(json!({"node-name": "r", "iothread": "zz"})),
        thread(json!({"node-name": "zz", "iothread": "zz"})),
        thread(json!({"node-name": "r", "iothread": 7})),
        thread(json!({"node-name": "r"})),
        Ask("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "DIR/n.sock"}}})),
        Ask(
            "block-export-add",
            json!({"type": "nbd", "id": "e", "node-name": "r", "name": "r", "writable": true}),
        ),
        thread(json!({"node-name": "r", "iothread": "io0"})),
        thread(json!({"node-name": "r", "iothread": null})),
        thread(json!({"node-name": "rf", "iothread": "io0"})),
        thread(json!({"node-name": "r", "iothread": null, "force": true})),
        // Of options that only one of both knows.
        AskClass("x-blockdev-set-iothread", json!({"node-name": "r", "iothread": "io0", "x": 1})),
    ]);
    same_answers(&script, images);
}
