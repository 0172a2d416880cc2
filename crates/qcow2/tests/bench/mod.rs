//! QEMU's tools as referees, and images in memory.
#![allow(dead_code, reason = "each test file uses some")]

use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::BytesMut;
use infill_base::Ctx;
use infill_node::NodeHandle;
use infill_qcow2::{OpenOptions, Qcow2};
use infill_storage::{MemoryStorage, StorageHandle};
use tempfile::TempDir;

/// Runs a tool and gives what it printed.
///
/// # Panics
/// If it is missing or fails.
pub fn run(tool: &str, args: &[&str]) -> String {
    let output = Command::new(tool).args(args).output();
    let output = output.unwrap_or_else(|error| panic!("{tool}: {error}; apt-get install qemu-utils"));
    assert!(
        output.status.success(),
        "{tool} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A directory of files that goes with the test.
pub struct Bench(TempDir);

impl Bench {
    pub fn new() -> Bench {
        Bench(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// An image made by `qemu-img create -f qcow2 -o options` and filled by the commands of `qemu-io`.
    pub fn image(&self, name: &str, options: &str, size: &str, commands: &[&str]) -> PathBuf {
        let path = self.path(name);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, text(&path), size]);
        io(&path, commands);
        path
    }

    /// What QEMU reads from an image, backing files included.
    pub fn content(&self, image: &Path) -> Vec<u8> {
        let raw = self.path("content.raw");
        run("qemu-img", &["convert", "-U", "-O", "raw", text(image), text(&raw)]);
        std::fs::read(raw).unwrap()
    }

    /// Writes `bytes` to a file.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Commands of `qemu-io` on an image.
pub fn io(path: &Path, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2", "-d", "unmap"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    if !commands.is_empty() {
        args.push(text(path));
        run("qemu-io", &args);
    }
}

/// The image in a file, opened in memory.
pub async fn open(path: &Path, options: OpenOptions) -> NodeHandle {
    let storage = StorageHandle::new(MemoryStorage::from_bytes(std::fs::read(path).unwrap()));
    NodeHandle::new(Qcow2::open(&Ctx::GUEST, storage, options).await.unwrap())
}

pub fn read_only() -> OpenOptions {
    OpenOptions { read_only: true, ..OpenOptions::default() }
}

pub async fn read(node: &NodeHandle, at: u64, len: usize) -> BytesMut {
    node.read_vec(&Ctx::GUEST, at, len).await.unwrap()
}

/// All bytes of a node, in pieces of `step` bytes.
pub async fn content(node: &NodeHandle, step: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while (all.len() as u64) < node.len() {
        let len = step.min((node.len() - all.len() as u64) as usize);
        all.extend_from_slice(&read(node, all.len() as u64, len).await);
    }
    all
}
