//! Disks that change hosts over TLS: both ends of both connections show a certificate, and who has none of the authority is
//! refused before anything is frozen.

#[path = "../../crates/nbd/tests/common/certs.rs"]
#[allow(dead_code, reason = "other tests use other parts")]
mod certs;
mod common;
#[path = "common/hosts.rs"]
mod hosts;
#[path = "common/qmp.rs"]
mod qmp;

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use certs::Certs;
use common::{INFILL, fails, free_port, run, text, wait_until};
use hosts::{DISK, Guest, Host, image_is_whole, judge, migrate, run_guest, seed};
use serde_json::json;

/// A host that is reached over TCP, with credentials if any are named.
fn host(dir: &Path, name: &str, certs: &Certs, credentials: Option<&str>) -> Host {
    let tls = credentials.map_or_else(String::new, |name| format!(",tls-creds={}", text(&certs.dir(name))));
    let (listen, data) = (free_port(), free_port());
    Host::at(dir, name, &format!("127.0.0.1:{listen}"), &format!("data=127.0.0.1:{data}{tls}"))
}

fn moves(mode: &str) {
    let (dir, certs) = (tempfile::tempdir().unwrap(), Certs::new());
    let a = host(dir.path(), "a", &certs, Some("good"));
    let mut b = host(dir.path(), "b", &certs, Some("good"));
    a.has_slow_disk();
    let guest = Arc::new(Mutex::new(Guest::new(seed())));
    let running = run_guest(&a, &guest);
    running.wait_for_steps(100);
    running.stop();
    migrate(&a, &b, mode, true);
    wait_until("the disk has changed hands", || b.owns());
    let running = run_guest(&b, &guest);
    running.wait_for_steps(50);
    running.stop();
    // It finds its source again, and its credentials.
    b.kill();
    b.start();
    wait_until("it is served again", || b.owns());
    let running = run_guest(&b, &guest);
    running.wait_for_steps(50);
    b.wait_for("local");
    a.wait_for("released");
    running.stop();
    judge(&b, &guest.lock().unwrap());
    image_is_whole(&b);
}

#[test]
fn a_disk_changes_hosts_over_tls_and_its_data_follows_over_tls() {
    moves("post-copy");
}

#[test]
fn a_disk_is_warmed_over_tls() {
    moves("hybrid");
}

/// Whoever the target does not take, and who does not take the target, stays where it is, unfrozen.
#[test]
fn daemons_without_the_right_certificates_move_nothing() {
    let certs = Certs::new();
    for (ours, theirs, why) in [
        (Some("foreign"), Some("good"), "none of our authorities"),
        (Some("good"), Some("foreign"), "none of our authorities"),
        (None, Some("good"), "the peer speaks TLS, and this daemon does not"),
        (Some("good"), None, "is not TLS"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let a = host(dir.path(), "a", &certs, ours);
        let b = host(dir.path(), "b", &certs, theirs);
        a.has_disk();
        let guest = Arc::new(Mutex::new(Guest::new(seed())));
        let running = run_guest(&a, &guest);
        running.wait_for_steps(50);
        migrate(&a, &b, "hybrid", true);
        a.wait_for("serving");
        let told = a.migration()["error"].as_str().unwrap_or_default().to_owned();
        assert!(told.contains(why), "{ours:?} to {theirs:?}: {told}");
        assert!(a.owns() && b.migration().is_null(), "{ours:?} to {theirs:?}");
        running.wait_for_steps(50);
        running.stop();
        judge(&a, &guest.lock().unwrap());
        // The command says so, too.
        let socket = text(&a.daemon.as_ref().unwrap().socket).to_owned();
        let to = b.address();
        let said = fails(INFILL, &["migrate", DISK, "--to", &to, "--socket", &socket]);
        assert!(said.contains("the disks stay here") && said.contains(why), "{said}");
    }
}

/// What is offered to peers is read by nobody who has no certificate, and the name of a certificate matters.
#[test]
fn data_is_for_those_with_a_certificate_and_names_are_checked() {
    let (dir, certs) = (tempfile::tempdir().unwrap(), Certs::new());
    let a = host(dir.path(), "a", &certs, Some("good"));
    let b = host(dir.path(), "b", &certs, Some("good"));
    a.has_slow_disk();
    let to = b.address();
    let refused = json!({"disks": [{"name": DISK}], "to": to, "tls-hostname": "elsewhere.example"});
    a.qmp().run("__infill_migrate", refused);
    a.wait_for("serving");
    let told = a.migration()["error"].as_str().unwrap_or_default().to_owned();
    assert!(told.contains("it is not for 'elsewhere.example'"), "{told}");
    let moved = a.qmp().run(
        "__infill_migrate",
        json!({"disks": [{"name": DISK}], "to": to, "tls-hostname": "localhost", "auto-switch": false}),
    );
    let migration = moved["migration"].as_str().unwrap().to_owned();
    wait_until("it is prepared", || b.state_of(&migration) == "prepared");
    let data = a.migration.split("data=").nth(1).unwrap().split(',').next().unwrap().to_owned();
    let live = |scheme: &str, credentials: &str| {
        let dir = certs.dir(credentials);
        match scheme {
            "nbd" => format!("nbd://{data}/{DISK}.live"),
            _ => format!("nbds://{data}/{DISK}.live?tls-certificates={}", text(&dir)),
        }
    };
    run("nbdinfo", &[&live("nbds", "good")]);
    for uri in [live("nbd", ""), live("nbds", "nobody"), live("nbds", "foreign")] {
        fails("nbdinfo", &[&uri]);
    }
    a.qmp().run("__infill_migration-abort", json!({"migration": migration}));
    wait_until("it is dropped", || b.state_of(&migration) == "aborted");
    // Both ends show a certificate, so a directory without a client's is none.
    let mut command = Command::new(INFILL);
    let state = dir.path().join("state");
    let migration = format!("listen=127.0.0.1:0,data=127.0.0.1:0,tls-creds={}", text(&certs.dir("nobody")));
    command.args(["daemon", "--state", text(&state), "--migration", &migration]);
    let said = String::from_utf8(command.output().unwrap().stderr).unwrap();
    assert!(said.contains("Unable to access credentials"), "{said}");
}
