//! A daemon whose command line is a TOML file, and what it takes of its process.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use common::{INFILL, Process, fails, run, text, wait_for_socket};
use qmp::Qmp;
use serde_json::json;

#[test]
fn a_file_starts_what_its_options_would_and_the_command_line_wins() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| text(&dir.path().join(name)).to_owned();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path("disk.qcow2"), "1M"]);
    let file = path("infill.toml");
    std::fs::write(
        &file,
        format!(
            r#"
            pidfile = "{pid}-of-the-file"
            state = "{state}"
            sandbox = "off"

            [[object]]
            qom-type = "throttle-group"
            id = "g"
            limits = {{ iops-total = 100 }}

            [[chardev]]
            backend = "socket"
            id = "m"
            path = "{monitor}"
            server = true
            wait = false

            [[monitor]]
            chardev = "m"

            [[blockdev]]
            driver = "qcow2"
            node-name = "disk"
            file = {{ driver = "file", filename = "{disk}" }}

            [[blockdev]]
            driver = "throttle"
            node-name = "slow"
            throttle-group = "g"
            file = "disk"

            [nbd-server]
            addr = {{ type = "unix", path = "{nbd}" }}

            [[export]]
            type = "nbd"
            id = "e"
            node-name = "slow"
            name = "disk"
            writable = true
            "#,
            pid = path("pid"),
            state = path("state"),
            monitor = path("m.sock"),
            disk = path("disk.qcow2"),
            nbd = path("nbd.sock"),
        ),
    )
    .unwrap();
    let mut command = std::process::Command::new(INFILL);
    command.args(["daemon", "--config", &file, "--pidfile", &path("pid")]);
    let mut daemon = Process::start(&mut command);
    wait_for_socket(&dir.path().join("m.sock"));
    let mut qmp = Qmp::connect(&dir.path().join("m.sock"));
    assert_eq!(qmp.run("query-block-exports", json!({}))[0]["id"], "e");
    assert_eq!(qmp.run("qom-get", json!({"path": "/objects/g", "property": "limits"}))["iops-total"], 100);
    let uri = format!("nbd+unix:///disk?socket={}", path("nbd.sock"));
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 0 64k", &uri]);
    let pid = std::fs::read_to_string(path("pid")).unwrap();
    assert_eq!(pid.trim(), daemon.id().to_string());
    assert!(!dir.path().join("pid-of-the-file").exists());
    qmp.run("quit", json!({}));
    daemon.wait_for_success();
    // It may be given again beside what the state holds.
    let mut command = std::process::Command::new(INFILL);
    command.args(["daemon", "--config", &file]);
    let mut daemon = Process::start(&mut command);
    wait_for_socket(&dir.path().join("m.sock"));
    let mut qmp = Qmp::connect(&dir.path().join("m.sock"));
    run("qemu-io", &["-f", "raw", "-c", "read -P 1 0 64k", &uri]);
    qmp.run("quit", json!({}));
    daemon.wait_for_success();
    std::fs::write(&file, "blockdef = 'x'").unwrap();
    let told = fails(INFILL, &["daemon", "--config", &file]);
    assert!(told.contains("'blockdef' is no option of the daemon") && told.contains(&file), "{told}");
    let told = fails(INFILL, &["daemon", "--config", &path("nowhere")]);
    assert!(told.contains("No such file"), "{told}");
}

#[test]
fn a_daemon_has_more_disks_than_files_may_be_open_at_first() {
    const DISKS: usize = 200;
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| text(&dir.path().join(name)).to_owned();
    let script = format!(
        "ulimit -Sn 100; exec {INFILL} daemon --chardev socket,id=m,path={},server=on,wait=off --monitor chardev=m",
        path("m.sock")
    );
    let mut daemon = Process::start(std::process::Command::new("sh").args(["-c", &script]));
    wait_for_socket(&dir.path().join("m.sock"));
    let mut qmp = Qmp::connect(&dir.path().join("m.sock"));
    for nth in 0..DISKS {
        let name = format!("d{nth}");
        std::fs::write(dir.path().join(&name), [0; 512]).unwrap();
        qmp.run("blockdev-add", json!({"driver": "file", "node-name": name, "filename": path(&name)}));
    }
    qmp.run("quit", json!({}));
    daemon.wait_for_success();
}
