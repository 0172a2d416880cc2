//! What several tests share: images in memory, and QEMU's tools to judge them.
#![allow(dead_code, reason = "each test uses some of it")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use infill_storage::{MemoryStorage, StorageHandle};
use serde_json::Value;

/// A storage in memory, with a second reference to look at its bytes.
pub fn memory(bytes: Vec<u8>) -> (Arc<MemoryStorage>, StorageHandle) {
    let storage = Arc::new(MemoryStorage::from_bytes(bytes));
    (storage.clone(), StorageHandle::from_arc(storage))
}

/// Runs a tool, which must be there.
pub fn run(tool: &str, args: &[&str]) -> Output {
    Command::new(tool).args(args).output().unwrap_or_else(|error| {
        panic!("{tool} cannot be run ({error}); install it: apt-get install -t bookworm-backports qemu-utils")
    })
}

/// Runs a tool that must succeed; gives what it printed.
pub fn run_ok(tool: &str, args: &[&str]) -> String {
    let output = run(tool, args);
    assert!(
        output.status.success(),
        "{tool} {args:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What a tool prints as JSON; the exit status may be anything.
pub fn run_json(tool: &str, args: &[&str]) -> Value {
    let output = run(tool, args);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!(
            "{tool} {args:?} printed no JSON ({error}): {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    })
}

/// Writes `bytes` to a file of this name in `dir`.
pub fn file(dir: &tempfile::TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// A path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// `qemu-img check` of a file, as JSON.
pub fn qemu_check(path: &Path) -> Value {
    run_json("qemu-img", &["check", "-f", "qcow2", "--output=json", arg(path)])
}

/// Asserts that QEMU finds nothing wrong with a file: neither corruption nor leak.
pub fn assert_clean(path: &Path, what: &str) {
    let report = qemu_check(path);
    for key in ["corruptions", "leaks", "check-errors"] {
        let found = report.get(key).and_then(Value::as_u64).unwrap_or(0);
        assert_eq!(found, 0, "{what}: qemu-img check: {report}");
    }
}
