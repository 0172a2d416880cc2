//! Commands that make nodes, change how they lie, or ask about them: in qemu-storage-daemon's words, and judged by its tools.

mod common;
#[path = "common/qmp.rs"]
mod qmp;
#[path = "common/same.rs"]
mod same;

use std::path::Path;

use common::{run, text};
use qmp::{Daemon, Program, Qmp};
use same::Step::{self, Ask, AskClass, AwaitStatus, Run};
use same::{same, same_answers};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

fn with(base: Value, extra: &Value) -> Value {
    let mut base = base;
    base.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    base
}

fn file(name: &str) -> Value {
    json!({"driver": "file", "filename": format!("DIR/{name}")})
}

fn add(options: Value) -> Step {
    Ask("blockdev-add", options)
}

/// A job that makes an image, to its end.
fn create(options: Value) -> Vec<Step> {
    vec![
        Ask("blockdev-create", json!({"job-id": "j", "options": options})),
        AwaitStatus("concluded"),
        Ask("query-jobs", json!({})),
        Ask("query-block-jobs", json!({})),
        Ask("job-dismiss", json!({"id": "j"})),
    ]
}

fn files(dir: &Path) {
    std::fs::write(dir.join("a.img"), []).unwrap();
    for image in ["b.img", "p0"] {
        std::fs::write(dir.join(image), []).unwrap();
    }
    std::fs::write(dir.join("r.img"), vec![7; MIB as usize]).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&dir.join("q.img")), "1M"]);
}

#[test]
fn what_cannot_be_created_is_refused_the_same() {
    let refused = |options: Value| Ask("blockdev-create", json!({"job-id": "j", "options": options}));
    let mut script = vec![
        add(with(file("a.img"), &json!({"node-name": "fa"}))),
        add(with(file("r.img"), &json!({"node-name": "ro", "read-only": true}))),
        add(
            json!({"driver": "qcow2", "node-name": "q", "file": with(file("q.img"), &json!({"node-name": "qf"}))}),
        ),
        Ask("blockdev-create", json!({"job-id": "j"})),
        Ask("blockdev-create", json!({"options": {"driver": "file", "filename": "x", "size": 1}})),
        Ask(
            "blockdev-create",
            json!({"job-id": "0j", "options": {"driver": "file", "filename": "x", "size": 1}}),
        ),
        refused(json!({"driver": "file", "filename": "x"})),
        refused(json!({"driver": "null-co", "size": 1})),
        refused(json!({"driver": "nbd"})),
        refused(json!({"driver": "raw"})),
        refused(json!({"driver": "zz"})),
        refused(json!({})),
        refused(json!(7)),
        refused(json!({"driver": "qcow2"})),
        refused(json!({"driver": "qcow2", "file": 7, "size": 512})),
        refused(json!({"driver": "qcow2", "file": "fa", "size": 512, "zz": 1})),
        refused(json!({"driver": "qcow2", "file": "fa", "size": 512, "version": "v4"})),
        refused(
            json!({"driver": "qcow2", "file": "fa", "size": 512, "backing-file": "x", "backing-fmt": "zz"}),
        ),
        refused(json!({"driver": "qcow2", "file": "fa", "size": 512, "preallocation": "zz"})),
        refused(json!({"driver": "qcow2", "file": "fa", "size": 512, "compression-type": "zz"})),
    ];
    for wrong in [
        json!({"size": 1000}),
        json!({"size": -512}),
        json!({"version": "v2", "lazy-refcounts": true}),
        json!({"version": "v2", "extended-l2": true}),
        json!({"version": "v2", "refcount-bits": 8}),
        json!({"version": "v2", "compression-type": "zstd"}),
        json!({"refcount-bits": 3}),
        json!({"refcount-bits": 128}),
        json!({"refcount-bits": -1}),
        json!({"cluster-size": 1000}),
        json!({"cluster-size": 256}),
        json!({"cluster-size": 4194304}),
        json!({"cluster-size": 512, "extended-l2": true}),
        json!({"backing-fmt": "raw"}),
        json!({"backing-file": "DIR/r.img", "preallocation": "metadata"}),
        json!({"data-file-raw": true}),
        json!({"file": "ro"}),
        json!({"file": "qf"}),
        json!({"file": "nobody"}),
    ] {
        script.extend(create(with(json!({"driver": "qcow2", "file": "fa", "size": MIB}), &wrong)));
    }
    for wrong in [
        json!({"size": 1000}),
        json!({"size": 1u64 << 62}),
        json!({"cluster-size": 1000}),
        json!({"cluster-size": 134217728}),
        json!({"table-size": 3}),
        json!({"table-size": 32}),
        json!({"file": "ro"}),
        json!({"file": "qf"}),
    ] {
        script.extend(create(with(json!({"driver": "qed", "file": "fa", "size": MIB}), &wrong)));
    }
    for wrong in [
        json!({"filename": "DIR/missing/x"}),
        json!({"filename": ""}),
        json!({"filename": "DIR"}),
        json!({"size": -1}),
    ] {
        script.extend(create(with(json!({"driver": "file", "filename": "DIR/x", "size": MIB}), &wrong)));
    }
    // Nothing of it was written to.
    script.push(Run(&["cmp", "-n", "1048576", "DIR/r.img", "DIR/r.copy"]));
    script.push(Ask("blockdev-del", json!({"node-name": "q"})));
    script.push(Run(&["qemu-img", "check", "-q", "DIR/q.img"]));
    same(&[], &script, |dir| {
        files(dir);
        std::fs::copy(dir.join("r.img"), dir.join("r.copy")).unwrap();
    });
}

#[test]
fn images_and_files_are_created_the_same() {
    let mut script = vec![add(with(file("a.img"), &json!({"node-name": "fa"})))];
    for options in [
        json!({}),
        json!({"version": "v2"}),
        json!({"cluster-size": 4096, "refcount-bits": 1}),
        json!({"cluster-size": 2097152, "refcount-bits": 64}),
        json!({"extended-l2": true, "compression-type": "zstd", "lazy-refcounts": true}),
        json!({"backing-file": "DIR/r.img", "backing-fmt": "raw"}),
        json!({"backing-file": "", "backing-fmt": "raw"}),
        json!({"size": 0}),
    ] {
        let image = json!({"driver": "qcow2", "node-name": "n", "file": "fa"});
        script.extend(create(with(json!({"driver": "qcow2", "file": "fa", "size": MIB}), &options)));
        script.push(Run(&["qemu-img", "check", "-q", "-U", "DIR/a.img"]));
        script.push(add(image));
        script.push(Ask("query-named-block-nodes", json!({"flat": true})));
        script.push(Ask("blockdev-del", json!({"node-name": "n"})));
    }
    for options in [
        json!({}),
        json!({"cluster-size": 4096, "table-size": 2}),
        json!({"backing-file": "DIR/r.img", "backing-fmt": "raw"}),
        json!({"size": 512}),
    ] {
        let image = json!({"driver": "qed", "node-name": "n", "file": "fa"});
        script.extend(create(with(json!({"driver": "qed", "file": "fa", "size": MIB}), &options)));
        script.push(add(image));
        script.push(Ask("query-named-block-nodes", json!({"flat": true})));
        script.push(Ask("blockdev-del", json!({"node-name": "n"})));
    }
    script.extend(create(json!({"driver": "qcow2", "file": file("b.img"), "size": MIB})));
    script.push(Run(&["qemu-img", "check", "-q", "DIR/b.img"]));
    for (preallocation, size) in [("off", 513), ("falloc", MIB), ("full", MIB + 1)] {
        let options = json!({"driver": "file", "filename": "DIR/new", "size": size, "preallocation": preallocation,
                             "nocow": true, "extent-size-hint": 1048576});
        script.extend(create(options));
        script.push(Run(&["stat", "-c", "%s", "DIR/new"]));
    }
    // (Theirs fails where the file is empty and all space is to be taken.)
    script.extend(create(
        json!({"driver": "qcow2", "file": file("p0"), "size": MIB, "preallocation": "metadata"}),
    ));
    script.push(Run(&["qemu-img", "check", "-q", "DIR/p0"]));
    script.push(Run(&["qemu-io", "-f", "qcow2", "-c", "read -q -P 0 0 1M", "DIR/p0"]));
    // It loses what it held.
    script.extend(create(json!({"driver": "file", "filename": "DIR/r.img", "size": 4096})));
    script.push(Run(&["od", "-An", "-c", "DIR/r.img"]));
    same(&[], &script, files);
}

#[test]
fn an_image_that_was_created_is_written_to_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| text(&dir.path().join(name)).to_owned();
    let daemon = Daemon::start(Program::Infill, dir.path(), &[]);
    let mut qmp = daemon.connect();
    for (job, options) in [
        ("one", json!({"driver": "file", "filename": path("i"), "size": 0})),
        ("two", json!({"driver": "qcow2", "file": "f", "size": 4 * MIB, "preallocation": "full"})),
        ("three", json!({"driver": "qcow2", "file": "f", "size": 4 * MIB, "cluster-size": 4096})),
    ] {
        qmp.run("blockdev-create", json!({"job-id": job, "options": options}));
        qmp.wait_for_status("concluded");
        let jobs = qmp.run("query-jobs", json!({}));
        assert_eq!(jobs[0].get("error"), None, "{jobs}");
        qmp.run("job-dismiss", json!({"id": job}));
        if job == "one" {
            qmp.run("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": path("i")}));
        }
    }
    qmp.run("blockdev-add", json!({"driver": "qcow2", "node-name": "q", "file": "f"}));
    export(&mut qmp, dir.path(), "q");
    qemu_io(dir.path(), &["-c", "write -P 9 1M 1M"]);
    qemu_io(dir.path(), &["-c", "read -P 9 1M 1M", "-c", "read -P 0 0 1M"]);
    daemon.quit(&mut qmp);
    run("qemu-img", &["check", "-q", &path("i")]);
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 9 1M 1M", &path("i")]);
}

/// Exports a node as `disk`, writable, on a server of its own.
fn export(qmp: &mut Qmp, dir: &Path, node: &str) {
    let address = json!({"type": "unix", "data": {"path": dir.join("nbd.sock")}});
    qmp.run("nbd-server-start", json!({"addr": address}));
    let export = json!({"type": "nbd", "id": "e0", "node-name": node, "name": "disk", "writable": true});
    qmp.run("block-export-add", export);
}

fn qemu_io(dir: &Path, commands: &[&str]) -> String {
    let uri = format!("nbd+unix:///disk?socket={}", text(&dir.join("nbd.sock")));
    let out = run("qemu-io", &[&["-f", "raw"], commands, &[&uri]].concat());
    assert!(!out.contains("failed"), "{out}");
    out
}

fn exported() -> Vec<Step> {
    vec![
        add(
            json!({"driver": "qcow2", "node-name": "q", "file": with(file("q.img"), &json!({"node-name": "qf"}))}),
        ),
        Ask("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "DIR/n.sock"}}})),
        Ask("block-export-add", json!({"type": "nbd", "id": "e0", "node-name": "q", "writable": true})),
    ]
}

const SYNC: &str = "blockdev-snapshot-sync";

#[test]
fn snapshots_into_new_files_are_made_and_refused_the_same() {
    let sync = |node: &str, file: &str, overlay: &str, more: Value| {
        let base =
            json!({"node-name": node, "snapshot-file": format!("DIR/{file}"), "snapshot-node-name": overlay});
        Ask(SYNC, with(base, &more))
    };
    let exports = || Ask("query-block-exports", json!({}));
    let mut script = exported();
    script.extend([
        sync("q", "s1.img", "s1", json!({})),
        exports(),
        Run(&["qemu-img", "check", "-q", "-U", "DIR/s1.img"]),
        sync("s1", "s2.img", "s1", json!({})),
        Ask(SYNC, json!({"node-name": "s1", "snapshot-file": "DIR/s2.img"})),
        Ask(SYNC, json!({"device": "s1", "snapshot-file": "DIR/s2.img", "snapshot-node-name": "s2"})),
        Ask(SYNC, json!({"snapshot-file": "DIR/s2.img", "snapshot-node-name": "s2"})),
        Ask(SYNC, json!({"node-name": "s1", "snapshot-node-name": "s2"})),
        sync("s1", "s2.img", "s2", json!({"device": "x", "node-name": "nobody"})),
        sync("s1", "s2.img", "s2", json!({"format": "raw"})),
        sync("s1", "s2.img", "s2", json!({"format": "zz"})),
        sync("s1", "s2.img", "s2", json!({"format": "file"})),
        sync("s1", "s2.img", "s2", json!({"mode": "zz"})),
        sync("s1", "s2.img", "s2", json!({"mode": "existing"})),
        sync("s1", "missing/s2.img", "s2", json!({})),
        sync("s1", "", "s2", json!({"snapshot-file": ""})),
        sync("s1", "s3.img", "1s2", json!({})),
        AskClass(SYNC, json!({"node-name": "s1", "snapshot-file": "DIR/q.img", "snapshot-node-name": "s2"})),
        sync("q", "s3.img", "s3", json!({})),
        exports(),
        sync("s1", "big.img", "s2", json!({"mode": "existing"})),
        exports(),
        sync("s2", "e.qed", "s3", json!({"format": "qed"})),
        exports(),
        Ask("blockdev-del", json!({"node-name": "s3"})),
        Ask("blockdev-del", json!({"node-name": "q"})),
    ]);
    let action = |node: &str, name: &str| {
        json!({"type": SYNC, "data": {"node-name": node, "snapshot-file": format!("DIR/{name}"),
                                      "snapshot-node-name": name}})
    };
    let together = |actions: Value| Ask("transaction", json!({"actions": actions}));
    script.extend([
        together(json!([action("s3", "t1"), {"type": "abort", "data": {}}])),
        exports(),
        together(json!([action("s3", "t1"), action("s3", "t2")])),
        exports(),
        together(json!([action("s3", "t1"), action("nobody", "t2")])),
        together(json!([action("s3", "t1"), action("t1", "t2")])),
        exports(),
    ]);
    same(&[], &script, |dir| {
        files(dir);
        run("qemu-img", &["create", "-q", "-f", "qcow2", text(&dir.join("big.img")), "1M"]);
    });
}

#[test]
fn a_snapshot_into_a_new_file_keeps_what_was_and_comes_back_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    files(dir.path());
    let path = |name: &str| text(&dir.path().join(name)).to_owned();
    let state = path("state");
    let start = || Daemon::start(Program::Infill, dir.path(), &["--state", &state]);
    let daemon = start();
    let mut qmp = daemon.connect();
    let image =
        json!({"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": path("q.img")}});
    qmp.run("blockdev-add", image);
    export(&mut qmp, dir.path(), "q");
    qemu_io(dir.path(), &["-c", "write -P 1 0 128k", "-c", "flush"]);
    let sync = json!({"node-name": "q", "snapshot-file": path("s.img"), "snapshot-node-name": "s"});
    qmp.run(SYNC, sync);
    qemu_io(dir.path(), &["-c", "write -P 2 64k 64k", "-c", "flush"]);
    daemon.process.kill();
    let daemon = start();
    let mut qmp = daemon.connect();
    let exports = qmp.run("query-block-exports", json!({}));
    assert_eq!(exports[0]["node-name"], "s", "{exports}");
    qemu_io(dir.path(), &["-c", "read -P 1 0 64k", "-c", "read -P 2 64k 64k"]);
    // A snapshot that is taken back leaves nothing that comes back.
    let action = json!({"type": SYNC, "data": {"node-name": "s", "snapshot-file": path("t.img"),
                                               "snapshot-node-name": "t"}});
    qmp.refused("transaction", json!({"actions": [action, {"type": "abort", "data": {}}]}));
    daemon.process.kill();
    let daemon = start();
    let mut qmp = daemon.connect();
    let nodes = qmp.run("query-named-block-nodes", json!({"flat": true}));
    assert!(nodes.as_array().unwrap().iter().all(|node| node["node-name"] != "t"), "{nodes}");
    qemu_io(dir.path(), &["-c", "read -P 1 0 64k", "-c", "read -P 2 64k 64k"]);
    daemon.quit(&mut qmp);
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 1 0 128k", &path("q.img")]);
    let out = run("qemu-img", &["info", "--output=json", &path("s.img")]);
    let info: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(info["backing-filename"], json!(path("q.img")));
    assert_eq!(info["format-specific"]["data"]["extended-l2"], json!(false));
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 1 0 64k", "-c", "read -P 2 64k 64k", &path("s.img")]);
}

#[test]
fn nodes_are_changed_and_refused_the_same() {
    let reopen = |more: Value| {
        let node = json!({"driver": "qcow2", "node-name": "q", "backing": "r", "file": "qf"});
        Ask("blockdev-reopen", json!({"options": [with(node, &more)]}))
    };
    let list = |nodes: Value| Ask("blockdev-reopen", json!({"options": nodes}));
    let nodes = || Ask("query-named-block-nodes", json!({"flat": true}));
    let raw = |name: &str, image: &str| {
        add(json!({"driver": "raw", "node-name": name,
                   "file": with(file(image), &json!({"node-name": format!("{name}f")}))}))
    };
    let script = [
        raw("r", "r.img"),
        raw("r2", "r2.img"),
        add(json!({"driver": "null-co", "node-name": "n"})),
        add(json!({"driver": "qcow2", "node-name": "q", "backing": "r",
                   "file": with(file("q.img"), &json!({"node-name": "qf"}))})),
        reopen(json!({})),
        Ask("blockdev-reopen", json!({})),
        Ask("blockdev-reopen", json!({"options": 7})),
        list(json!([{"driver": "qcow2", "node-name": "q", "file": "qf"}])),
        list(json!([{"driver": "qcow2", "node-name": "q", "backing": "r"}])),
        list(json!([{"driver": "qcow2", "backing": "r", "file": "qf"}])),
        reopen(json!({"node-name": "nobody"})),
        reopen(json!({"driver": "qed"})),
        reopen(json!({"file": file("q.img")})),
        reopen(json!({"backing": "nobody"})),
        reopen(json!({"backing": "q"})),
        reopen(json!({"backing": {"driver": "null-co"}})),
        reopen(json!({"zz": 1})),
        list(json!([{"driver": "null-co", "node-name": "n"}])),
        list(json!([{"driver": "null-co", "node-name": "n", "size": 512}])),
        list(json!([{"driver": "raw", "node-name": "r", "file": "rf"}])),
        // All or nothing.
        list(json!([{"driver": "qcow2", "node-name": "q", "backing": "r2", "file": "qf"},
                    {"driver": "qcow2", "node-name": "nobody", "backing": "r", "file": "qf"}])),
        Ask("blockdev-del", json!({"node-name": "r"})),
        reopen(json!({"backing": "r2"})),
        Ask("blockdev-del", json!({"node-name": "r2"})),
        reopen(json!({"backing": null})),
        reopen(json!({"backing": "r"})),
        reopen(json!({"discard": "unmap"})),
        Ask("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "DIR/n.sock"}}})),
        Ask("block-export-add", json!({"type": "nbd", "id": "e0", "node-name": "q", "writable": true})),
        reopen(json!({"read-only": true, "discard": "unmap"})),
        reopen(json!({"backing": "r2", "discard": "unmap"})),
        reopen(json!({"backing": null, "discard": "unmap"})),
        Ask("blockdev-del", json!({"node-name": "r2"})),
        Ask("block-export-del", json!({"id": "e0", "mode": "hard"})),
        nodes(),
    ];
    same(&[], &script, |dir| {
        files(dir);
        std::fs::write(dir.join("r2.img"), vec![8; MIB as usize]).unwrap();
    });
}

#[test]
fn a_node_becomes_read_only_and_writable_again_and_its_guests_see_what_lies_below() {
    let dir = tempfile::tempdir().unwrap();
    files(dir.path());
    let path = |name: &str| text(&dir.path().join(name)).to_owned();
    std::fs::write(path("r2.img"), vec![8; MIB as usize]).unwrap();
    let state = path("state");
    let start = || Daemon::start(Program::Infill, dir.path(), &["--state", &state]);
    let daemon = start();
    let mut qmp = daemon.connect();
    for name in ["r", "r2"] {
        let file = json!({"driver": "file", "filename": path(&format!("{name}.img"))});
        qmp.run("blockdev-add", json!({"driver": "raw", "node-name": name, "read-only": true, "file": file}));
    }
    let image = |more: Value| {
        let node = json!({"driver": "qcow2", "node-name": "q", "backing": "r",
                          "file": {"driver": "file", "filename": path("q.img")}});
        with(node, &more)
    };
    let reopen = |more: Value| json!({"options": [image(more)]});
    qmp.run("blockdev-add", image(json!({})));
    export(&mut qmp, dir.path(), "q");
    qemu_io(dir.path(), &["-c", "write -P 3 0 64k", "-c", "read -P 7 64k 64k"]);
    qmp.run("blockdev-reopen", reopen(json!({"backing": "r2"})));
    qemu_io(dir.path(), &["-c", "read -P 3 0 64k", "-c", "read -P 8 64k 64k"]);
    let why = qmp.refused("blockdev-reopen", reopen(json!({"backing": "r2", "read-only": true})));
    assert_eq!(why["desc"], "Read-only block node 'q' cannot support read-write users");
    qmp.run("block-export-del", json!({"id": "e0", "mode": "hard"}));
    qmp.wait_for("BLOCK_EXPORT_DELETED");
    qmp.run("blockdev-reopen", reopen(json!({"backing": "r2", "read-only": true})));
    // Others may read it now.
    run("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 3 0 64k", &path("q.img")]);
    let export = json!({"type": "nbd", "id": "e1", "node-name": "q", "name": "disk", "writable": true});
    qmp.refused("block-export-add", export.clone());
    daemon.process.kill();
    // It comes back as it was changed.
    let daemon = start();
    let mut qmp = daemon.connect();
    qmp.refused("block-export-add", export.clone());
    qmp.run("blockdev-reopen", reopen(json!({"backing": "r2"})));
    qmp.run("block-export-add", export);
    qemu_io(dir.path(), &["-c", "write -P 4 128k 64k", "-c", "read -P 3 0 64k", "-c", "read -P 8 64k 64k"]);
    daemon.quit(&mut qmp);
    run("qemu-img", &["check", "-q", &path("q.img")]);
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 4 128k 64k", "-c", "read -P 3 0 64k", &path("q.img")]);
}

#[test]
fn what_nodes_have_done_is_told_the_same() {
    let mut script = vec![add(json!({"driver": "null-co", "node-name": "n"}))];
    script.extend(exported());
    for (command, arguments) in [
        ("query-blockstats", json!({})),
        ("query-blockstats", json!({"query-nodes": true})),
        ("query-blockstats", json!({"query-nodes": 7})),
        ("x-debug-query-block-graph", json!({"x": 1})),
        ("query-block", json!({})),
        ("query-chardev", json!({"x": 1})),
        ("query-chardev", json!({})),
        ("blockdev-set-active", json!({"node-name": "q", "active": true})),
        ("blockdev-set-active", json!({"active": true})),
        ("blockdev-set-active", json!({"active": false})),
        ("blockdev-set-active", json!({"node-name": "q", "active": false})),
        ("blockdev-set-active", json!({"node-name": "q"})),
        ("blockdev-set-active", json!({"node-name": "nobody", "active": false})),
        ("blockdev-set-active", json!({"node-name": "q", "active": 7})),
    ] {
        script.push(Ask(command, arguments));
    }
    same(&[], &script, files);
}

#[test]
fn the_graph_is_told_with_the_same_nodes_and_edges() {
    let graph = |program: Program| {
        let dir = tempfile::tempdir().unwrap();
        files(dir.path());
        let path = |name: &str| text(&dir.path().join(name)).to_owned();
        let daemon = Daemon::start(program, dir.path(), &[]);
        let mut qmp = daemon.connect();
        let file = |name: &str| json!({"driver": "file", "node-name": format!("{name}f"), "filename": path(&format!("{name}.img"))});
        qmp.run(
            "blockdev-add",
            json!({"driver": "raw", "node-name": "r", "read-only": true, "file": file("r")}),
        );
        qmp.run(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "q", "backing": "r", "file": file("q")}),
        );
        export(&mut qmp, dir.path(), "q");
        let graph = qmp.run("x-debug-query-block-graph", json!({}));
        daemon.quit(&mut qmp);
        let nodes = graph["nodes"].as_array().unwrap();
        let name_of = |id: &Value| {
            let node = nodes.iter().find(|node| node["id"] == *id).unwrap();
            format!("{} {}", node["type"], node["name"])
        };
        let mut edges: Vec<String> = graph["edges"]
            .as_array()
            .unwrap()
            .iter()
            .map(|edge| {
                let writes = edge["perm"].as_array().unwrap().contains(&json!("write"));
                let (parent, child) = (name_of(&edge["parent"]), name_of(&edge["child"]));
                format!("{parent} {} {child} writes {writes}", edge["name"])
            })
            .collect();
        edges.sort();
        let mut names: Vec<String> = nodes.iter().map(|node| name_of(&node["id"])).collect();
        names.sort();
        (names, edges)
    };
    assert_eq!(graph(Program::Infill), graph(Program::Qemu));
}

#[test]
fn objects_are_told_the_same() {
    let io = "/objects/io0";
    let mut script = vec![Ask("object-add", json!({"qom-type": "iothread", "id": "io0"}))];
    for (command, arguments) in [
        ("qom-list", json!({"path": "/objects"})),
        ("qom-list", json!({"path": io})),
        ("qom-list", json!({"path": "io0"})),
        ("qom-list", json!({"path": "/nobody"})),
        ("qom-list", json!({"path": "nobody"})),
        ("qom-list", json!({})),
        ("qom-get", json!({"path": io, "property": "type"})),
        ("qom-get", json!({"path": io, "property": "nothing"})),
        ("qom-get", json!({"path": io})),
        ("qom-get", json!({"path": "/nobody", "property": "type"})),
        ("qom-set", json!({"path": io, "property": "type", "value": "x"})),
        ("qom-set", json!({"path": io, "property": "nothing", "value": "x"})),
        ("qom-set", json!({"path": io, "property": "nothing"})),
        ("qom-set", json!({"path": "/nobody", "property": "type", "value": 1})),
        ("qom-list-properties", json!({"typename": "iothread"})),
        ("qom-list-properties", json!({"typename": "nothing"})),
        ("qom-list-properties", json!({})),
        ("qom-list-types", json!({"implements": "nothing"})),
        ("qom-list-types", json!({"implements": 7})),
    ] {
        script.push(Ask(command, arguments));
    }
    same(&[], &script, files);
}

#[test]
fn the_types_of_objects_are_a_part_of_theirs() {
    let types = |program: Program| -> Vec<Value> {
        let dir = tempfile::tempdir().unwrap();
        let daemon = Daemon::start(program, dir.path(), &[]);
        let mut qmp = daemon.connect();
        let types = qmp.run("qom-list-types", json!({"implements": "user-creatable"}));
        daemon.quit(&mut qmp);
        types.as_array().unwrap().clone()
    };
    let (ours, theirs) = (types(Program::Infill), types(Program::Qemu));
    assert!(!ours.is_empty());
    assert!(ours.iter().all(|kind| theirs.contains(kind)), "{ours:?}");
}

#[test]
fn a_mirror_is_changed_the_same() {
    let change = |rest: Value| Ask("block-job-change", with(json!({"id": "m"}), &rest));
    let mut script = vec![change(json!({"type": "mirror", "copy-mode": "write-blocking"}))];
    for (name, image) in [("q", "q.img"), ("t", "t.img")] {
        script.push(add(json!({"driver": "qcow2", "node-name": name, "file": file(image)})));
    }
    script.extend([
        Ask(
            "blockdev-mirror",
            json!({"job-id": "m", "device": "q", "target": "t", "sync": "full", "auto-dismiss": false}),
        ),
        AwaitStatus("ready"),
        change(json!({})),
        change(json!({"type": "mirror"})),
        change(json!({"type": "zz"})),
        change(json!({"type": "mirror", "copy-mode": "zz"})),
        change(json!({"type": "mirror", "copy-mode": "background"})),
        change(json!({"type": "mirror", "copy-mode": "write-blocking"})),
        change(json!({"type": "mirror", "copy-mode": "write-blocking"})),
        change(json!({"type": "mirror", "copy-mode": "background"})),
        Ask("block-job-cancel", json!({"device": "m"})),
        AwaitStatus("concluded"),
        change(json!({"type": "mirror", "copy-mode": "write-blocking"})),
        Ask("job-dismiss", json!({"id": "m"})),
    ]);
    same_answers(&script, |dir| {
        files(dir);
        run("qemu-img", &["create", "-q", "-f", "qcow2", text(&dir.join("t.img")), "1M"]);
        // What one holds to be zero the other copies.
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 1M", text(&dir.join("q.img"))]);
    });
}
