//! Copies into files that are made on the way, streams in the middle of a chain, and the copy mode of a mirror that runs.

mod common;
#[path = "common/qmp.rs"]
mod qmp;
#[path = "common/same.rs"]
mod same;

use std::path::Path;

use common::{run, text};
use qmp::{Daemon, Program, Qmp};
use same::Step::{self, Ask, AwaitStatus, Run};
use same::{same, same_answers};
use serde_json::{Value, json};

/// base.raw under mid.qcow2 under top.qcow2, each with something of its own, and a target.
fn images(dir: &Path) {
    let path = |name: &str| text(&dir.join(name)).to_owned();
    std::fs::write(path("base"), vec![1; 1 << 20]).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &path("base"), "-F", "raw", &path("mid")]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &path("mid"), "-F", "qcow2", &path("top")]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path("target"), "1M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 2 128k 128k", &path("mid")]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 3 192k 128k", &path("top")]);
}

/// What the top shows.
const SHOWN: [&str; 8] = [
    "-c",
    "read -P 1 0 128k",
    "-c",
    "read -P 2 128k 64k",
    "-c",
    "read -P 3 192k 128k",
    "-c",
    "read -P 1 320k 704k",
];

fn add(name: &str, driver: &str, backing: Option<&str>, dir: &str) -> Value {
    let file =
        json!({"driver": "file", "node-name": format!("{name}f"), "filename": format!("{dir}/{name}")});
    let mut node = json!({"driver": driver, "node-name": name, "file": file});
    if driver != "raw" {
        node["backing"] = json!(backing);
    }
    node
}

fn chain() -> Vec<Step> {
    vec![
        Ask("blockdev-add", add("base", "raw", None, "DIR")),
        Ask("blockdev-add", add("mid", "qcow2", Some("base"), "DIR")),
        Ask("blockdev-add", add("top", "qcow2", Some("mid"), "DIR")),
        Ask("blockdev-add", add("target", "qcow2", None, "DIR")),
    ]
}

fn with(base: Value, extra: &Value) -> Value {
    let mut base = base;
    base.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    base
}

#[test]
fn copies_into_files_are_refused_the_same() {
    let mut script = chain();
    for command in ["drive-mirror", "drive-backup"] {
        let copy = |more: Value| {
            let copy = json!({"job-id": "j", "device": "top", "target": "DIR/new", "sync": "full"});
            Ask(command, with(copy, &more))
        };
        script.extend([
            Ask(command, json!({})),
            Ask(command, json!({"job-id": "j", "device": "top", "sync": "full"})),
            copy(json!({"device": "nobody"})),
            copy(json!({"target": "DIR/missing/new"})),
            copy(json!({"format": "zz"})),
            copy(json!({"mode": "zz"})),
            copy(json!({"sync": "zz"})),
            copy(json!({"mode": "existing", "format": "qcow2"})),
            copy(json!({"zz": 1})),
        ]);
    }
    let mirror = |more: Value| {
        let copy = json!({"job-id": "j", "device": "top", "target": "target", "sync": "full"});
        Ask("blockdev-mirror", with(copy, &more))
    };
    script.extend([
        Ask(
            "drive-mirror",
            json!({"job-id": "j", "device": "top", "target": "DIR/new", "sync": "incremental"}),
        ),
        Ask(
            "drive-mirror",
            json!({"job-id": "j", "device": "top", "target": "DIR/new", "sync": "full", "node-name": "mid"}),
        ),
        mirror(json!({"replaces": "target"})),
        mirror(json!({"replaces": "mid"})),
        mirror(json!({"replaces": "midf"})),
        mirror(json!({"replaces": "nobody"})),
        mirror(json!({"filter-node-name": "1"})),
        Ask("query-jobs", json!({})),
    ]);
    same(&[], &script, images);
}

#[test]
fn copies_into_files_are_made_the_same() {
    let mut script = chain();
    for (file, more) in [
        ("full", json!({})),
        ("raw", json!({"format": "raw"})),
        ("qed", json!({"format": "qed"})),
        ("there", json!({"mode": "existing", "format": "qcow2"})),
    ] {
        let target = json!({"target": format!("DIR/{file}"), "job-id": "b", "device": "top", "sync": "full"});
        script.extend([Ask("drive-backup", with(target, &more)), AwaitStatus("null")]);
    }
    script.extend([
        Run(&["qemu-img", "compare", "-U", "-f", "qcow2", "-F", "qcow2", "DIR/full", "DIR/top"]),
        Run(&["qemu-img", "compare", "-U", "-f", "raw", "-F", "qcow2", "DIR/raw", "DIR/top"]),
        Run(&["qemu-img", "compare", "-U", "-f", "qed", "-F", "qcow2", "DIR/qed", "DIR/top"]),
        Run(&["qemu-img", "compare", "-U", "-f", "qcow2", "-F", "qcow2", "DIR/there", "DIR/top"]),
        Ask("drive-mirror", json!({"job-id": "m", "device": "top", "target": "DIR/copy", "sync": "full"})),
        AwaitStatus("ready"),
        Ask("block-job-cancel", json!({"device": "m"})),
        AwaitStatus("null"),
        Run(&["qemu-img", "compare", "-U", "-f", "qcow2", "-F", "qcow2", "DIR/copy", "DIR/top"]),
        Run(&["qemu-img", "check", "-q", "-U", "DIR/copy"]),
    ]);
    same_answers(&script, |dir| {
        images(dir);
        run("qemu-img", &["create", "-q", "-f", "qcow2", text(&dir.join("there")), "1M"]);
    });
}

struct Scene {
    dir: tempfile::TempDir,
    daemon: Daemon,
    qmp: Qmp,
}

impl Scene {
    /// The chain by name, its top exported.
    fn new(options: &[&str]) -> Scene {
        let dir = tempfile::tempdir().unwrap();
        images(dir.path());
        let daemon = Daemon::start(Program::Infill, dir.path(), options);
        let mut qmp = daemon.connect();
        let place = text(dir.path()).to_owned();
        qmp.run("blockdev-add", add("base", "raw", None, &place));
        qmp.run("blockdev-add", add("mid", "qcow2", Some("base"), &place));
        qmp.run("blockdev-add", add("top", "qcow2", Some("mid"), &place));
        let address = json!({"type": "unix", "data": {"path": dir.path().join("nbd.sock")}});
        qmp.run("nbd-server-start", json!({"addr": address}));
        qmp.run(
            "block-export-add",
            json!({"type": "nbd", "id": "e0", "node-name": "top", "name": "disk", "writable": true}),
        );
        Scene { dir, daemon, qmp }
    }

    fn path(&self, name: &str) -> String {
        text(&self.dir.path().join(name)).to_owned()
    }

    fn io(&self, commands: &[&str]) {
        let uri = format!("nbd+unix:///disk?socket={}", self.path("nbd.sock"));
        let out = run("qemu-io", &[&["-f", "raw"], commands, &[&uri]].concat());
        assert!(!out.contains("failed"), "{out}");
    }

    fn has_node(&mut self, name: &str) -> bool {
        let nodes = self.qmp.run("query-named-block-nodes", json!({"flat": true}));
        nodes.as_array().unwrap().iter().any(|node| node["node-name"] == name)
    }
}

#[test]
fn guests_go_on_in_the_file_of_a_mirror_and_come_back_to_it_after_a_kill() {
    for (sync, writing) in [
        ("full", "background"),
        ("top", "write-blocking"),
        ("none", "background"),
        ("none", "write-blocking"),
    ] {
        let state = tempfile::tempdir().unwrap();
        let options = ["--state", text(state.path())];
        let mut scene = Scene::new(&options);
        let target = scene.path("copy");
        let mirror = json!({"job-id": "m", "device": "top", "target": target, "sync": sync, "node-name": "copy",
                            "copy-mode": writing});
        scene.qmp.run("drive-mirror", mirror);
        scene.qmp.wait_for_status("ready");
        scene.io(&["-c", "write -P 5 512k 64k"]);
        scene.qmp.run("block-job-complete", json!({"device": "m"}));
        scene.qmp.wait_for_status("null");
        scene.io(&["-c", "write -P 6 576k 64k", "-c", "flush"]);
        let Scene { dir, daemon, .. } = scene;
        daemon.process.kill();
        let daemon = Daemon::start(Program::Infill, dir.path(), &options);
        let mut qmp = daemon.connect();
        assert_eq!(qmp.run("query-block-exports", json!({}))[0]["node-name"], "copy", "{sync}");
        let mut scene = Scene { dir, daemon, qmp };
        let shown = ["-c", "read -P 3 192k 128k", "-c", "read -P 5 512k 64k", "-c", "read -P 6 576k 64k"];
        scene.io(&shown);
        scene.daemon.quit(&mut scene.qmp);
        let copy = text(&scene.dir.path().join("copy")).to_owned();
        run("qemu-img", &["check", "-q", &copy]);
        let out = run("qemu-io", &[&["-f", "qcow2"], &shown[..], &[&copy]].concat());
        assert!(!out.contains("failed"), "{sync}: {out}");
    }
}

#[test]
fn a_mirror_of_what_is_written_from_now_on_ends_as_a_snapshot_does() {
    const URI: &str = "nbd+unix:///top?socket=DIR/nbd.sock";
    let mirror = |target: &str, more: Value| {
        let mirror = json!({"job-id": "m", "device": "top", "target": format!("DIR/{target}"), "sync": "none",
                            "node-name": "new"});
        Ask("drive-mirror", with(mirror, &more))
    };
    let mut script = chain();
    script.extend([
        Ask("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "DIR/nbd.sock"}}})),
        Ask(
            "block-export-add",
            json!({"type": "nbd", "id": "e", "node-name": "top", "name": "top", "writable": true}),
        ),
        mirror("no", json!({"format": "raw"})),
        mirror("new", json!({})),
        AwaitStatus("ready"),
        Run(&["qemu-io", "-f", "raw", "-c", "write -P 9 708k 4k", "-c", "write -z 256k 64k", URI]),
        Run(&["qemu-io", "-f", "raw", "-c", "write -P 8 900k 2k", URI]),
        Ask("block-job-complete", json!({"device": "m"})),
        AwaitStatus("null"),
        Run(&["qemu-io", "-f", "raw", "-c", "write -P 7 0 4k", "-c", "read -P 1 4k 60k", URI]),
        Run(&["qemu-io", "-f", "raw", "-c", "read -P 9 708k 4k", "-c", "read -P 1 712k 188k", URI]),
        Ask("blockdev-del", json!({"node-name": "top"})),
    ]);
    for program in [Program::Infill, Program::Qemu] {
        let dir = tempfile::tempdir().unwrap();
        images(dir.path());
        let path = |name: &str| text(&dir.path().join(name)).to_owned();
        let (answers, _) = same::play(program, dir.path(), &[], &script);
        let failed = answers.iter().filter_map(|answer| answer["answer"].get("error")?["desc"].as_str());
        let [raw, busy] = failed.collect::<Vec<_>>()[..] else { panic!("{program:?}: {answers:?}") };
        assert_eq!(raw, "Backing file not supported for file format 'raw'", "{program:?}");
        assert!(busy.starts_with("Node 'top' is busy"), "{program:?}: {busy}");
        let info: Value =
            serde_json::from_str(&run("qemu-img", &["info", "--output=json", &path("new")])).unwrap();
        assert_eq!(info["backing-filename"], path("top"), "{program:?}");
        run("qemu-img", &["check", "-q", &path("new")]);
        // The disk as it was then stays below, and above it is what was written since the mirror began.
        let kept = ["-c", "read -P 1 0 128k", "-c", "read -P 0 256k 64k", "-c", "read -P 9 708k 4k"];
        let below = run("qemu-io", &[&["-r", "-f", "qcow2"], &kept[..], &[&path("top")]].concat());
        let shown = [
            "-c",
            "read -P 7 0 4k",
            "-c",
            "read -P 1 4k 124k",
            "-c",
            "read -P 3 192k 64k",
            "-c",
            "read -P 0 256k 64k",
            "-c",
            "read -P 1 512k 196k",
            "-c",
            "read -P 9 708k 4k",
            "-c",
            "read -P 1 712k 188k",
            "-c",
            "read -P 8 900k 2k",
            "-c",
            "read -P 1 902k 122k",
        ];
        let above = run("qemu-io", &[&["-r", "-f", "qcow2"], &shown[..], &[&path("new")]].concat());
        assert!(!below.contains("failed") && !above.contains("failed"), "{program:?}: {below}{above}");
        let map: Value =
            serde_json::from_str(&run("qemu-img", &["map", "--output=json", &path("new")])).unwrap();
        let own = map.as_array().unwrap().iter().filter(|extent| extent["depth"] == 0);
        let own: u64 = own.map(|extent| extent["length"].as_u64().unwrap()).sum();
        assert_eq!(own, 4 * 65536, "{program:?}: {map}");
    }
}

#[test]
fn a_mirror_of_what_is_written_takes_an_overlay_that_is_there_and_none_of_another_disk() {
    let mut scene = Scene::new(&[]);
    let (top, mid) = (scene.path("top"), scene.path("mid"));
    let (good, bad, alone) = (scene.path("good"), scene.path("bad"), scene.path("alone"));
    run("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", &top, "-F", "qcow2", &good, "1M"]);
    run("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", &mid, "-F", "qcow2", &bad, "1M"]);
    std::fs::write(&alone, vec![0xee; 1 << 20]).unwrap();
    let mirror = |target: &str, format: &str| {
        json!({"job-id": "m", "device": "top", "target": target, "sync": "none", "node-name": "new", "mode": "existing",
            "format": format})
    };
    let refused = scene.qmp.refused("drive-mirror", mirror(&bad, "qcow2"));
    assert!(refused["desc"].as_str().unwrap().contains("not on"), "{refused}");
    common::wait_until("the node is gone", || !scene.has_node("new"));
    // A copy that somebody has made: what is written from now on goes there, and it lies on nothing.
    scene.qmp.run("drive-mirror", mirror(&alone, "raw"));
    scene.qmp.wait_for_status("ready");
    scene.io(&["-c", "write -P 5 512k 4k"]);
    scene.qmp.run("block-job-cancel", json!({"device": "m"}));
    scene.qmp.wait_for_status("null");
    let copied = std::fs::read(&alone).unwrap();
    let written = 512 << 10..516 << 10;
    assert!(
        copied.iter().enumerate().all(|(at, byte)| *byte == if written.contains(&at) { 5 } else { 0xee })
    );
    common::wait_until("the node is gone", || !scene.has_node("new"));
    scene.qmp.run("drive-mirror", mirror(&good, "qcow2"));
    scene.qmp.wait_for_status("ready");
    scene.io(&["-c", "write -P 6 576k 4k"]);
    scene.qmp.run("block-job-complete", json!({"device": "m"}));
    scene.qmp.wait_for_status("null");
    scene.io(&["-c", "write -P 7 0 4k", "-c", "read -P 6 576k 4k", "-c", "read -P 3 192k 128k"]);
    scene.daemon.quit(&mut scene.qmp);
    let out = run("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 1 0 4k", &top]);
    assert!(!out.contains("failed"), "the disk below stays as it was: {out}");
}

#[test]
fn the_node_of_a_copys_file_goes_with_the_job() {
    let mut scene = Scene::new(&[]);
    let target = scene.path("copy");
    scene.qmp.run(
        "drive-mirror",
        json!({"job-id": "m", "device": "top", "target": target, "sync": "full", "node-name": "copy"}),
    );
    scene.qmp.wait_for_status("ready");
    assert!(scene.has_node("copy"));
    scene.qmp.run("block-job-cancel", json!({"device": "m", "force": true}));
    scene.qmp.wait_for_status("null");
    common::wait_until("the node is gone", || !scene.has_node("copy"));
    // Nobody has its file open.
    run("qemu-io", &["-f", "qcow2", "-c", "write 0 4k", &target]);
}

#[test]
fn a_stream_in_the_middle_of_a_chain_leaves_what_guests_see_as_it_is() {
    for end in [json!({}), json!({"base-node": "base"}), json!({"bottom": "mid"})] {
        let mut scene = Scene::new(&[]);
        let everything = end == json!({});
        scene.qmp.run("block-stream", with(json!({"job-id": "s", "device": "mid"}), &end));
        scene.qmp.wait_for_status("null");
        scene.io(&SHOWN);
        scene.io(&["-c", "write -P 9 0 64k", "-c", "flush"]);
        let base_is_free = scene.qmp.ask("blockdev-del", json!({"node-name": "base"}))["error"].is_null();
        assert_eq!(base_is_free, everything, "{end}");
        let mid = scene.path("mid");
        let info: Value =
            serde_json::from_str(&run("qemu-img", &["info", "-U", "--output=json", &mid])).unwrap();
        assert_eq!(info["backing-filename"].is_null(), everything, "{info}");
        scene.daemon.quit(&mut scene.qmp);
        let out =
            run("qemu-io", &["-f", "qcow2", "-c", "read -P 2 128k 128k", "-c", "read -P 1 0 128k", &mid]);
        assert!(!out.contains("failed"), "{out}");
    }
}

#[test]
fn a_commit_finds_its_layers_by_the_names_in_headers() {
    let dir = tempfile::tempdir().unwrap();
    images(dir.path());
    let path = |name: &str| text(&dir.path().join(name)).to_owned();
    for (image, below, format) in [("mid", "base", "raw"), ("top", "mid", "qcow2")] {
        run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", below, "-F", format, &path(image)]);
    }
    let daemon = Daemon::start(Program::Infill, dir.path(), &[]);
    let mut qmp = daemon.connect();
    let top =
        json!({"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": path("top")}});
    qmp.run("blockdev-add", top);
    // As the headers call them, relative to their directory.
    qmp.run(
        "block-commit",
        json!({"job-id": "c", "device": "top", "top": "mid", "base": "base", "backing-file": "base"}),
    );
    qmp.wait_for_status("null");
    daemon.quit(&mut qmp);
    let out = run("qemu-io", &[&["-f", "qcow2"], &SHOWN[..], &[&path("top")]].concat());
    assert!(!out.contains("failed"), "{out}");
    let info: Value =
        serde_json::from_str(&run("qemu-img", &["info", "--output=json", &path("top")])).unwrap();
    assert_eq!(info["backing-filename"], "base");
}

#[test]
fn a_mirror_that_is_changed_to_write_blocking_loses_no_write() {
    let mut scene = Scene::new(&[]);
    let target = scene.path("copy");
    let mirror =
        json!({"job-id": "m", "device": "top", "target": target, "sync": "full", "node-name": "copy"});
    scene.qmp.run("drive-mirror", mirror);
    scene.io(&["-c", "write -P 5 0 64k", "-c", "write -P 6 320k 64k"]);
    let change = json!({"id": "m", "type": "mirror", "copy-mode": "write-blocking"});
    scene.qmp.run("block-job-change", change);
    for at in 0..16 {
        scene.io(&["-c", &format!("write -P {} {}k 64k", 10 + at, at * 64)]);
    }
    scene.qmp.wait_for_status("ready");
    let jobs = scene.qmp.run("query-block-jobs", json!({}));
    assert_eq!(jobs[0]["actively-synced"], json!(true), "{jobs}");
    scene.io(&["-c", "write -P 77 960k 64k"]);
    scene.qmp.run("block-job-cancel", json!({"device": "m"}));
    scene.qmp.wait_for_status("null");
    scene.daemon.quit(&mut scene.qmp);
    let copy = text(&scene.dir.path().join("copy")).to_owned();
    let mut checks: Vec<String> = (0..15).map(|at| format!("read -P {} {}k 64k", 10 + at, at * 64)).collect();
    checks.push("read -P 77 960k 64k".into());
    for check in checks {
        let out = run("qemu-io", &["-f", "qcow2", "-c", &check, &copy]);
        assert!(!out.contains("failed"), "{check}: {out}");
    }
}

#[test]
fn what_a_drive_backup_keeps_aside_is_the_disk_as_it_was() {
    let mut script = chain();
    script.extend([
        Ask("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "DIR/nbd.sock"}}})),
        Ask(
            "block-export-add",
            json!({"type": "nbd", "id": "e", "node-name": "top", "name": "top", "writable": true}),
        ),
        Ask(
            "drive-backup",
            json!({"job-id": "j", "device": "base", "target": "DIR/no", "sync": "none", "format": "raw"}),
        ),
        Ask("drive-backup", json!({"job-id": "j", "device": "top", "target": "DIR/aside", "sync": "none"})),
        Ask("query-block-jobs", json!({})),
        Run(&[
            "qemu-io",
            "-f",
            "raw",
            "-c",
            "write -P 9 64k 256k",
            "-c",
            "write -P 9 708k 4k",
            "-c",
            "write -P 9 1000k 8k",
            "-c",
            "write -P 9 1004k 8k",
            "-c",
            "write -z 512k 64k",
            "nbd+unix:///top?socket=DIR/nbd.sock",
        ]),
        Ask("block-job-cancel", json!({"device": "j"})),
        AwaitStatus("null"),
        Ask("block-export-del", json!({"id": "e"})),
        Step::Await("BLOCK_EXPORT_DELETED"),
        Ask("blockdev-del", json!({"node-name": "top"})),
        Run(&["qemu-img", "map", "-U", "--output=json", "-f", "raw", "DIR/base"]),
    ]);
    let mut shown = vec!["qemu-io", "-r", "-U", "-f", "qcow2"];
    shown.extend(SHOWN);
    shown.push("DIR/aside");
    for program in [Program::Infill, Program::Qemu] {
        let dir = tempfile::tempdir().unwrap();
        images(dir.path());
        let (answers, _) = same::play(program, dir.path(), &[], &script);
        let failed = |answer: &&Value| answer["answer"].get("error").is_some();
        let failed: Vec<&Value> = answers.iter().filter(failed).collect();
        assert_eq!(failed.len(), 1, "{program:?}: {failed:?}");
        let args: Vec<String> = shown[1..].iter().map(|word| word.replace("DIR", text(dir.path()))).collect();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        run(shown[0], &args);
    }
}

#[test]
fn drive_backups_in_a_transaction_are_of_one_moment_or_not_at_all() {
    let backup = |id: &str, device: &str, more: Value| {
        let base = json!({"job-id": id, "device": device, "target": format!("DIR/{id}"), "sync": "full"});
        json!({"type": "drive-backup", "data": with(base, &more)})
    };
    let transaction = |actions: Value, mode: &str| {
        Ask("transaction", json!({"actions": actions, "properties": {"completion-mode": mode}}))
    };
    let mut script = chain();
    script.extend([
        transaction(
            json!([
                backup("k", "top", json!({"auto-dismiss": false})),
                backup("k2", "base", json!({"format": "raw", "auto-dismiss": false})),
            ]),
            "grouped",
        ),
        AwaitStatus("concluded"),
        AwaitStatus("concluded"),
        Ask("query-jobs", json!({})),
        Ask("job-dismiss", json!({"id": "k"})),
        Ask("job-dismiss", json!({"id": "k2"})),
        transaction(json!([backup("k3", "top", json!({})), {"type": "abort", "data": {}}]), "individual"),
        Ask("query-jobs", json!({})),
        transaction(json!([backup("k3", "top", json!({})), backup("k4", "nobody", json!({}))]), "grouped"),
        Ask("query-jobs", json!({})),
        Ask("query-block-jobs", json!({})),
    ]);
    let [ours, theirs] = [Program::Infill, Program::Qemu].map(|program| {
        let dir = tempfile::tempdir().unwrap();
        images(dir.path());
        let (answers, _) = same::play(program, dir.path(), &[], &script);
        for (copy, disk) in [("k", "top"), ("k2", "base")] {
            run("qemu-img", &["compare", text(&dir.path().join(copy)), text(&dir.path().join(disk))]);
        }
        (answers, Vec::new())
    });
    same::compare(ours, theirs);
}

/// What a layer holds may be less than a cluster of the copy: the rest is what lies below.
#[test]
fn a_drive_backup_of_pieces_smaller_than_a_cluster_shows_what_lies_around_them() {
    let dir = tempfile::tempdir().unwrap();
    images(dir.path());
    let path = |name: &str| text(&dir.path().join(name)).to_owned();
    let options = ["create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "-F", "qcow2", "-b", &path("mid")];
    run("qemu-img", &[&options[..], &[&path("pieces")]].concat());
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 4 8k 2k", "-c", "write -P 4 402k 6k", &path("pieces")]);
    let daemon = Daemon::start(Program::Infill, dir.path(), &[]);
    let mut qmp = daemon.connect();
    for (name, driver, backing) in
        [("base", "raw", None), ("mid", "qcow2", Some("base")), ("pieces", "qcow2", Some("mid"))]
    {
        qmp.run("blockdev-add", add(name, driver, backing, text(dir.path())));
    }
    for (id, sync) in [("b", "top"), ("m", "top")] {
        let command = if id == "b" { "drive-backup" } else { "drive-mirror" };
        qmp.run(command, json!({"job-id": id, "device": "pieces", "target": path(id), "sync": sync}));
        if id == "m" {
            qmp.wait_for("BLOCK_JOB_READY");
            qmp.run("block-job-cancel", json!({"device": "m"}));
        }
        qmp.wait_for("BLOCK_JOB_COMPLETED");
    }
    daemon.quit(&mut qmp);
    for copy in ["b", "m"] {
        run("qemu-img", &["compare", "-f", "qcow2", "-F", "qcow2", &path("pieces"), &path(copy)]);
    }
}
