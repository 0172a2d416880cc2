//! The workloads, numbered as in the performance chapter of the design.

mod link;
mod random;
mod start;
mod stream;

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};

use crate::Setup;
use crate::peers::{Who, run};
use crate::table::Table;

type RowFn = fn(&Setup, &mut Table) -> Result<()>;

/// All rows, in the order in which they run.
pub const ALL: [(&str, RowFn); 10] = [
    ("1", random::read_deep),
    ("2", random::read_single),
    ("3", random::allocating_writes),
    ("qed", random::qed_allocating_writes),
    ("4", stream::local),
    ("5", stream::distant),
    ("6", link::cold_reads),
    ("6b", stream::beside_flushes),
    ("8", start::chain_of_64),
    ("11", start::large_disk),
];

/// Both, in the order in which a pair is measured: whoever goes first changes from pair to pair.
pub fn order(pair: usize) -> [Who; 2] {
    if pair.is_multiple_of(2) { [Who::Infill, Who::Qemu] } else { [Who::Qemu, Who::Infill] }
}

/// A raw file full of data that no file system can shrink.
pub fn raw_data(dir: &Path, name: &str, mib: u64) -> Result<PathBuf> {
    let path = dir.join(name);
    if !path.exists() {
        let from = "if=/dev/urandom".to_owned();
        let to = format!("of={}", path.display());
        run("dd", &[&from, &to, "bs=1M", &format!("count={mib}"), "status=none", "conv=fdatasync"])?;
    }
    Ok(path)
}

/// A qcow2 file with the same content, made by qemu-img.
pub fn qcow2_data(dir: &Path, name: &str, raw: &Path) -> Result<PathBuf> {
    let path = dir.join(name);
    if !path.exists() {
        run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(raw)?, text(&path)?])?;
        run("sync", &[text(&path)?])?;
    }
    Ok(path)
}

pub fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| anyhow::anyhow!("{} is not UTF-8", path.display()))
}

/// A node `d` of `driver` on a file.
pub fn on_file(driver: &str, path: &Path) -> Value {
    json!({"driver": driver, "node-name": "d", "file": {"driver": "file", "filename": path}})
}
