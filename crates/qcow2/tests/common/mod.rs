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

/// The big-endian word at a byte of an image.
pub fn word(image: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(image[at..at + 8].try_into().unwrap())
}

/// Sets the big-endian word at a byte of an image.
pub fn set_word(image: &mut [u8], at: usize, value: u64) {
    image[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// Where the metadata of a valid image lies, but for its header: (what, first byte, length).
pub fn metadata(image: &[u8]) -> Vec<(&'static str, usize, usize)> {
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    let cluster = 1usize << u32::from_be_bytes(image[20..24].try_into().unwrap());
    let l1_entries = u32::from_be_bytes(image[36..40].try_into().unwrap()) as usize;
    let (l1, table) = (word(image, 40) as usize, word(image, 48) as usize);
    let table_len = u32::from_be_bytes(image[56..60].try_into().unwrap()) as usize * cluster;
    let mut found = vec![("L1 table", l1, l1_entries * 8), ("refcount table", table, table_len.min(512))];
    for nth in 0..l1_entries {
        let l2 = (word(image, l1 + nth * 8) & OFFSET) as usize;
        if l2 != 0 {
            found.push(("L2 table", l2, cluster));
        }
    }
    for nth in 0..table_len / 8 {
        let block = word(image, table + nth * 8) as usize;
        if block != 0 {
            found.push(("refcount block", block, cluster));
        }
    }
    found
}

/// Content that tells every sector from every other.
pub fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    for sector in 0..len.div_ceil(512) as u64 {
        let mut state = (sector + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed;
        for _ in 0..64 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            bytes.extend_from_slice(&(state ^ state >> 29).to_le_bytes());
        }
    }
    bytes.truncate(len);
    bytes
}
