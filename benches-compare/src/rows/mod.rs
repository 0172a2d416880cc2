//! The workloads, numbered as in the performance chapter of the design.

mod commit;
mod link;
mod many;
mod mirror;
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
pub const ALL: [(&str, RowFn); 17] = [
    ("1", random::read_deep),
    ("2", random::read_single),
    ("3", random::allocating_writes),
    ("3s", random::allocating_writes_slow),
    ("qed", random::qed_allocating_writes),
    ("qeds", random::qed_allocating_writes_slow),
    ("4", stream::local),
    ("4s", stream::local_slow),
    ("5", stream::distant),
    ("6", link::cold_reads),
    ("6b", stream::beside_flushes),
    ("8", start::chain_of_64),
    ("9", commit::live),
    ("11", start::large_disk),
    ("mirror", mirror::under_writes),
    ("disks", many::idle_disks),
    ("qmp", many::commands),
];

/// Where the images of a row lie that are written to.
pub struct Place<'a> {
    pub number: &'static str,
    pub dir: &'a Path,
    /// What is to be said of it.
    pub note: &'static str,
}

/// What is said of a place whose syncs are slow.
const SLOW: &str = "; on a storage whose sync takes 5 ms";

/// Both, in the order in which a pair is measured: whoever goes first changes from pair to pair.
pub fn order(pair: usize) -> [Who; 2] {
    if pair.is_multiple_of(2) { [Who::Infill, Who::Qemu] } else { [Who::Qemu, Who::Infill] }
}

/// Syncs are told for so many requests,
pub const PER_REQUESTS: f64 = 1000.0;
/// and where a stream is what is measured, for so many bytes.
pub const GIB: f64 = (1_u64 << 30) as f64;

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
