//! What the tests of this crate share: images in memory and in files, and QEMU as the referee.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use infill_base::Ctx;
use infill_qed::CreateOptions;
use infill_storage::{MemoryStorage, StorageHandle};

pub const CX: Ctx = Ctx::GUEST;

/// Runs a tool of QEMU to its end.
pub fn qemu(tool: &str, args: &[&str]) -> Output {
    Command::new(tool).args(args).output().unwrap_or_else(|error| {
        panic!("{tool} does not run ({error}); install it: apt-get install -y qemu-utils")
    })
}

/// Runs a tool of QEMU that must succeed, and gives what it prints.
pub fn qemu_ok(tool: &str, args: &[&str]) -> String {
    let output = qemu(tool, args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{tool} {args:?} ends with {}:\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// A path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().expect("the temporary directory has a name in UTF-8")
}

/// The last number behind `"key":` in the output of a tool with `--output=json` (children of a node come before its
/// own); `None` where it is not there.
pub fn json_number(json: &str, key: &str) -> Option<u64> {
    let (_, rest) = json.rsplit_once(&format!("\"{key}\": "))?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// A new image in memory.
pub fn created(options: &CreateOptions) -> (Arc<MemoryStorage>, StorageHandle) {
    let memory = Arc::new(MemoryStorage::new(0));
    let storage = StorageHandle::from_arc(memory.clone());
    infill_sim::block_on(infill_qed::create(&CX, &storage, options)).expect("creates");
    (memory, storage)
}

/// The bytes of an image file, in memory.
pub fn loaded(path: &Path) -> (Arc<MemoryStorage>, StorageHandle) {
    let bytes = std::fs::read(path).expect("the image is there");
    let memory = Arc::new(MemoryStorage::from_bytes(bytes));
    (memory.clone(), StorageHandle::from_arc(memory))
}
