//! Nodes that are inactive: both daemons answer the same, another process may use the image meanwhile, and what it has written
//! is there when the node is active again.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::collections::BTreeMap;
use std::path::Path;

use common::{output, output_once, run, text};
use qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

fn images(dir: &Path) {
    let path = |name: &str| text(&dir.join(name)).to_owned();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path("base"), "1M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 1M", &path("base")]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &path("base"), "-F", "qcow2", &path("top")]);
    run("qemu-img", &["create", "-q", "-f", "raw", &path("raw"), "1M"]);
}

fn file(name: &str) -> Value {
    json!({"driver": "file", "node-name": format!("{name}f"), "filename": format!("DIR/{name}")})
}

fn export(id: &str, node: &str, more: Value) -> Value {
    let mut export = json!({"type": "nbd", "id": id, "node-name": node, "name": id});
    export.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    export
}

/// A daemon, and what it has answered.
struct Scene {
    dir: tempfile::TempDir,
    daemon: Daemon,
    qmp: Qmp,
    told: Vec<Value>,
}

impl Scene {
    fn new(program: Program) -> Scene {
        let dir = tempfile::tempdir().unwrap();
        images(dir.path());
        Scene::over(program, dir, &[])
    }

    fn over(program: Program, dir: tempfile::TempDir, options: &[&str]) -> Scene {
        let daemon = Daemon::start(program, dir.path(), options);
        let qmp = daemon.connect();
        Scene { dir, daemon, qmp, told: Vec::new() }
    }

    fn serve(&mut self) {
        let address = json!({"type": "unix", "data": {"path": self.dir.path().join("nbd.sock")}});
        self.qmp.run("nbd-server-start", json!({"addr": address}));
    }

    /// Which nodes with a name are active.
    fn active(&mut self) -> BTreeMap<String, bool> {
        let nodes = self.qmp.run("query-named-block-nodes", json!({"flat": true}));
        let one = |node: &Value| (node["node-name"].as_str().unwrap().to_owned(), node["active"] == true);
        nodes.as_array().unwrap().iter().map(one).filter(|(name, _)| !name.starts_with('#')).collect()
    }

    fn ask(&mut self, command: &str, arguments: Value) {
        let place = text(self.dir.path());
        let arguments: Value = serde_json::from_str(&arguments.to_string().replace("DIR", place)).unwrap();
        let answer = self.qmp.ask(command, arguments.clone()).to_string().replace(place, "DIR");
        let active = self.active();
        let asked = format!("{command} {arguments}").replace(text(self.dir.path()), "DIR");
        self.told.push(json!({"asked": asked, "answer": answer, "active": active}));
    }

    fn set(&mut self, name: &str, active: bool) {
        self.ask("blockdev-set-active", json!({"node-name": name, "active": active}));
    }

    fn set_all(&mut self, active: bool) {
        self.ask("blockdev-set-active", json!({"active": active}));
    }

    fn del_export(&mut self, id: &str) {
        self.qmp.run("block-export-del", json!({"id": id}));
        self.qmp.event(|event| event["event"] == "BLOCK_EXPORT_DELETED");
    }

    /// What a client of an export meets: whether each command succeeds.
    fn io(&mut self, id: &str, commands: &[&str]) {
        let uri = format!("nbd+unix:///{id}?socket={}", text(&self.dir.path().join("nbd.sock")));
        for command in commands {
            let out = output("qemu-io", &["-f", "raw", "-c", command, &uri]);
            let told =
                format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
            let failed = told.lines().find(|line| line.contains("failed"));
            self.told.push(json!({"io": command, "failed": failed}));
        }
    }

    fn quit(mut self) -> Vec<Value> {
        self.daemon.quit(&mut self.qmp);
        self.told
    }
}

fn same(script: impl Fn(&mut Scene)) {
    let [ours, theirs] = [Program::Infill, Program::Qemu].map(|program| {
        let mut scene = Scene::new(program);
        script(&mut scene);
        scene.quit()
    });
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs, "ours, then qemu-storage-daemon's");
    }
}

#[test]
fn nodes_become_inactive_and_active_as_the_competitors_do() {
    same(|scene| {
        scene.serve();
        scene.ask(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "base", "file": file("base"), "read-only": true}),
        );
        let top = json!({"driver": "qcow2", "node-name": "top", "file": file("top"), "backing": "base"});
        scene.ask("blockdev-add", top);
        scene.ask("blockdev-set-active", json!({}));
        scene.ask("blockdev-set-active", json!({"active": 1}));
        scene.set("nope", false);
        scene.set("base", false);
        scene.set("topf", false);
        scene.set("top", false);
        scene.set("top", false);
        scene.set("topf", true);
        scene.set("topf", false);
        scene.set("top", true);
        scene.ask("block-export-add", export("e", "top", json!({"writable": true})));
        scene.set("top", false);
        scene.set_all(false);
        scene.del_export("e");
        scene.set_all(false);
        scene.ask("block-export-add", export("e", "top", json!({"writable": true})));
        scene.del_export("e");
        scene.set_all(false);
        scene.ask("block-export-add", export("e2", "top", json!({"writable": false})));
        scene.del_export("e2");
        scene.set_all(false);
        scene.ask("block-export-add", export("e", "top", json!({"writable": true, "allow-inactive": true})));
        let all = ["read -P 1 0 4k", "write -P 5 0 4k", "discard 0 64k", "write -z 0 64k"];
        scene.io("e", &all);
        scene.set("top", true);
        scene.io("e", &["write -P 5 0 4k"]);
        scene.set("top", false);
        scene.io("e", &["read -P 5 0 4k", "write -P 6 0 4k"]);
        scene.ask("query-block-exports", json!({}));
        scene.ask("block_resize", json!({"node-name": "top", "size": 2 << 20}));
        scene.ask("block-dirty-bitmap-add", json!({"node": "top", "name": "b"}));
        scene.set_all(true);
        scene.io("e", &["read -P 5 0 4k", "write -P 6 0 4k", "read -P 6 0 4k"]);
        scene.del_export("e");
        scene.set("top", false);
        scene.ask("blockdev-del", json!({"node-name": "top"}));
        scene.set_all(true);
    });
}

#[test]
fn inactive_nodes_are_added_and_lie_below_inactive_ones_alone() {
    same(|scene| {
        scene.serve();
        scene.ask("object-add", json!({"qom-type": "throttle-group", "id": "g"}));
        let top = |more: Value| {
            let mut top =
                json!({"driver": "qcow2", "node-name": "top", "file": file("top"), "active": false});
            top.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            top
        };
        scene.ask("blockdev-add", top(json!({})));
        scene.ask("blockdev-del", json!({"node-name": "top"}));
        let base = json!({"driver": "qcow2", "node-name": "base", "file": file("base")});
        scene.ask("blockdev-add", top(json!({"backing": base})));
        let throttle = json!({"driver": "throttle", "node-name": "t", "file": "top", "throttle-group": "g"});
        scene.ask("blockdev-add", throttle.clone());
        let mut inactive = throttle;
        inactive["active"] = json!(false);
        scene.ask("blockdev-add", inactive);
        scene.ask("block-export-add", export("e", "t", json!({"writable": true, "allow-inactive": true})));
        scene.io("e", &["read -P 1 0 4k", "write 0 4k"]);
        scene.set("top", true);
        scene.io("e", &["write 0 4k"]);
        scene.set("t", true);
        scene.io("e", &["write -P 3 0 4k"]);
        scene.set("top", false);
        scene.set("t", false);
        scene.io("e", &["read -P 3 0 4k", "write 0 4k"]);
        scene.set_all(true);
        scene.ask(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "n", "size": 1 << 20, "active": false}),
        );
        scene.ask("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": file("raw")}));
        scene.ask("block-export-add", export("f", "rawf", json!({"allow-inactive": true})));
        scene.set("r", false);
        scene.io("f", &["read -P 0 0 4k"]);
        scene.set("rawf", true);
        scene.set_all(false);
    });
}

#[test]
fn another_process_has_the_image_while_its_node_is_inactive_and_what_it_wrote_is_there_afterwards() {
    for program in [Program::Infill, Program::Qemu] {
        let mut scene = Scene::new(program);
        let top = text(&scene.dir.path().join("top")).to_owned();
        scene.serve();
        scene.ask("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file("top")}));
        scene.ask("block-export-add", export("e", "top", json!({"writable": true, "allow-inactive": true})));
        scene.ask("block-dirty-bitmap-add", json!({"node": "top", "name": "p", "persistent": true}));
        scene.io("e", &["write -P 5 64k 64k", "write -P 6 960k 4k"]);
        scene.set("top", false);
        // All of it is in the image, with its bitmap, and its lock is free.
        let written = [
            "-c",
            "read -P 5 64k 64k",
            "-c",
            "read -P 6 960k 4k",
            "-c",
            "write -P 7 128k 200k",
            "-c",
            "discard 64k 64k",
        ];
        run("qemu-io", &[&["-f", "qcow2"], &written[..], &[&top]].concat());
        run("qemu-img", &["check", "-q", &top]);
        let info: Value = serde_json::from_str(&run("qemu-img", &["info", "--output=json", &top])).unwrap();
        let bitmap = &info["format-specific"]["data"]["bitmaps"][0];
        assert_eq!((&bitmap["name"], &bitmap["flags"]), (&json!("p"), &json!(["auto"])), "{program:?}");
        scene.set("top", true);
        scene.io(
            "e",
            &["read -P 7 128k 200k", "read -P 0 64k 64k", "write -P 8 64k 64k", "read -P 8 64k 64k"],
        );
        let refused = output_once("qemu-io", &["-f", "qcow2", "-c", "write 0 4k", &top]);
        assert!(!refused.status.success(), "{program:?}: the lock is taken again");
        let failed: Vec<&Value> = scene.told.iter().filter(|told| told["failed"].is_string()).collect();
        assert!(failed.is_empty(), "{program:?}: {failed:?}");
        scene.daemon.quit(&mut scene.qmp);
        run("qemu-img", &["check", "-q", &top]);
    }
}

#[test]
fn a_node_whose_image_somebody_else_has_does_not_become_active() {
    let mut scene = Scene::new(Program::Infill);
    scene.serve();
    scene.ask("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file("top")}));
    scene.ask("block-export-add", export("e", "top", json!({"writable": true, "allow-inactive": true})));
    scene.set("top", false);
    let other = tempfile::tempdir().unwrap();
    let socket = other.path().join("nbd.sock");
    let second = Daemon::start(
        Program::Qemu,
        other.path(),
        &["--nbd-server", &format!("addr.type=unix,addr.path={}", text(&socket))],
    );
    let mut theirs = second.connect();
    let top = scene.dir.path().join("top");
    theirs.run(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "o", "file": {"driver": "file", "filename": top}}),
    );
    theirs.run("block-export-add", export("o", "o", json!({"writable": true})));
    let refused = scene.qmp.refused("blockdev-set-active", json!({"node-name": "top", "active": true}));
    assert!(refused["desc"].as_str().unwrap().contains("lock"), "{refused}");
    assert!(!scene.active()["top"]);
    run(
        "qemu-io",
        &["-f", "raw", "-c", "write -P 9 0 64k", &format!("nbd+unix:///o?socket={}", text(&socket))],
    );
    second.quit(&mut theirs);
    scene.set("top", true);
    assert!(scene.active()["top"]);
    scene.io("e", &["read -P 9 0 64k", "write -P 8 64k 64k"]);
    assert!(scene.told.iter().all(|told| !told["failed"].is_string()), "{:?}", scene.told);
    scene.quit();
}

#[test]
fn an_inactive_node_is_inactive_after_a_kill_too() {
    let dir = tempfile::tempdir().unwrap();
    images(dir.path());
    let state = dir.path().join("state");
    let options = ["--state", text(&state)];
    let mut scene = Scene::over(Program::Infill, dir, &options);
    scene.serve();
    let base = json!({"driver": "qcow2", "node-name": "base", "file": file("base"), "read-only": true});
    scene.ask("blockdev-add", base);
    scene.ask(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "top", "file": file("top"), "backing": "base"}),
    );
    scene.ask("block-export-add", export("e", "top", json!({"writable": true, "allow-inactive": true})));
    scene.io("e", &["write -P 5 64k 64k"]);
    scene.set("top", false);
    let before = scene.active();
    let Scene { dir, daemon, .. } = scene;
    daemon.process.kill();
    let top = text(&dir.path().join("top")).to_owned();
    let mut scene = Scene::over(Program::Infill, dir, &options);
    assert_eq!(scene.active()["top"], before["top"]);
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 5 64k 64k", "-c", "write -P 6 0 64k", &top]);
    scene.set("top", true);
    scene.io("e", &["read -P 6 0 64k", "write -P 7 0 64k"]);
    assert!(scene.told.iter().all(|told| !told["failed"].is_string()), "{:?}", scene.told);
    scene.quit();
}
