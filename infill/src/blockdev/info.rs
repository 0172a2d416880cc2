//! What `info` and `query-named-block-nodes` tell of a node, with QEMU's keys.

use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::Result;
use infill_node::{InfoValue, NodeInfo, Snapshot};
use serde_json::{Map, Value, json};

use super::name::resolve_backing;
use super::{Blockdevs, CHAIN_LAYERS_MAX};
use crate::size::human_size;

/// Unit of lengths, in bytes, and of `st_blocks`.
const SECTOR_BYTES: u64 = 512;

/// Nanoseconds of a second.
const SECOND_NSEC: u64 = 1_000_000_000;

/// Space that a file takes in its file system, in bytes.
pub fn actual_bytes(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|meta| meta.blocks() * SECTOR_BYTES)
}

/// The path to the node of that name that lies at the bottom, file child by file child (the node itself first).
pub fn files(blockdevs: &Blockdevs, name: &str) -> Vec<String> {
    let file = |name: &String| blockdevs.facts(name).ok().and_then(|facts| facts.file);
    std::iter::successors(Some(name.to_owned()), file).take(CHAIN_LAYERS_MAX).collect()
}

/// What is told of one node, without its children.
struct Told {
    info: NodeInfo,
    snapshots: Vec<Snapshot>,
    len: u64,
    actual: Option<u64>,
    /// Whether something at the bottom says what `dirty-flag` says (a network has nothing to say).
    local: bool,
}

fn told(blockdevs: &Blockdevs, name: &str) -> Result<Told> {
    let node = blockdevs.get(name)?;
    let path = blockdevs.bottom_path(name);
    let info = node.info();
    // QEMU counts files in whole sectors.
    let len = if info.driver == "file" { node.len().next_multiple_of(SECTOR_BYTES) } else { node.len() };
    Ok(Told {
        local: path.is_some(),
        snapshots: node.snapshots(),
        len,
        actual: path.as_deref().and_then(actual_bytes),
        info,
    })
}

/// QEMU's `ImageInfo` of a node. With `children`, its file children too, as `qemu-img info` tells them.
pub fn image_info(blockdevs: &Blockdevs, name: &str, children: bool) -> Result<Value> {
    // From the bottom up, so that no depth of the graph is a depth of the stack.
    let mut below: Option<Value> = None;
    for name in files(blockdevs, name).iter().rev() {
        let child = below.take().map(|info| json!({"name": "file", "info": info}));
        let children = children.then(|| Value::from(child.into_iter().collect::<Vec<_>>()));
        below = Some(one_info(&told(blockdevs, name)?, children));
    }
    Ok(below.unwrap_or(Value::Null))
}

fn one_info(told: &Told, children: Option<Value>) -> Value {
    let info = &told.info;
    let mut out = Map::new();
    if let Some(children) = children {
        out.insert("children".into(), children);
    }
    if let Some(format) = info.backing.as_ref().and_then(|backing| backing.format.as_ref()) {
        out.insert("backing-filename-format".into(), json!(format));
    }
    if !told.snapshots.is_empty() {
        out.insert("snapshots".into(), told.snapshots.iter().map(snapshot_info).collect());
    }
    out.insert("virtual-size".into(), json!(told.len));
    out.insert("filename".into(), json!(info.filename));
    if let Some(cluster) = info.cluster_bytes {
        out.insert("cluster-size".into(), json!(cluster));
    }
    out.insert("format".into(), json!(info.driver));
    if let Some(actual) = told.actual {
        out.insert("actual-size".into(), json!(actual));
    }
    if !info.format_specific.is_empty() {
        let data: Map<String, Value> =
            info.format_specific.iter().map(|(key, value)| ((*key).to_owned(), to_json(value))).collect();
        out.insert("format-specific".into(), json!({"type": info.driver, "data": data}));
    } else if matches!(info.driver, "file" | "host_device") {
        out.insert("format-specific".into(), json!({"type": info.driver, "data": {}}));
    }
    if let Some(backing) = &info.backing {
        if let Ok(whole) = resolve_backing(&info.filename, &backing.filename) {
            out.insert("full-backing-filename".into(), json!(whole));
        }
        out.insert("backing-filename".into(), json!(backing.filename));
    }
    if told.local {
        out.insert("dirty-flag".into(), json!(info.dirty));
    }
    Value::Object(out)
}

/// QEMU's `SnapshotInfo`.
pub fn snapshot_info(snapshot: &Snapshot) -> Value {
    let mut out = Map::new();
    if let Some(icount) = snapshot.icount {
        out.insert("icount".into(), json!(icount));
    }
    out.insert("vm-clock-nsec".into(), json!(snapshot.vm_clock_nsec % SECOND_NSEC));
    out.insert("name".into(), json!(snapshot.name));
    out.insert("date-sec".into(), json!(snapshot.date_sec));
    out.insert("date-nsec".into(), json!(snapshot.date_nsec));
    out.insert("vm-clock-sec".into(), json!(snapshot.vm_clock_nsec / SECOND_NSEC));
    out.insert("id".into(), json!(snapshot.id));
    out.insert("vm-state-size".into(), json!(snapshot.vm_state_bytes));
    Value::Object(out)
}

/// The list of snapshots for people, as `qemu-img snapshot -l` prints it. Dates are in UTC.
pub fn snapshots_text(snapshots: &[Snapshot]) -> String {
    let mut out = String::from("Snapshot list:\n");
    let line = |columns: [&str; 6]| {
        let [id, tag, size, date, clock, icount] = columns;
        format!("{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}\n")
    };
    out += &line(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]);
    for snapshot in snapshots {
        let clock = snapshot.vm_clock_nsec / SECOND_NSEC;
        let clock = format!(
            "{:04}:{:02}:{:02}.{:03}",
            clock / 3600,
            clock / 60 % 60,
            clock % 60,
            snapshot.vm_clock_nsec % SECOND_NSEC / 1_000_000
        );
        let icount = snapshot.icount.map_or_else(|| "--".into(), |icount| icount.to_string());
        let size = human_size(snapshot.vm_state_bytes);
        out += &line([
            &snapshot.id,
            &snapshot.name,
            &size,
            &date_text(u64::from(snapshot.date_sec)),
            &clock,
            &icount,
        ]);
    }
    out
}

/// A second since 1970 as a date and a time.
fn date_text(seconds: u64) -> String {
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    // Years that begin in March, so that the day that comes and goes is the last one: of 400 years from the year 0 on.
    let day = days + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day_of_month = day - (153 * month + 2) / 5 + 1;
    let (month, later) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = era * 400 + year + later;
    format!(
        "{year:04}-{month:02}-{day_of_month:02} {:02}:{:02}:{:02}",
        time / 3600,
        time / 60 % 60,
        time % 60
    )
}

fn to_json(value: &InfoValue) -> Value {
    match value {
        InfoValue::Bool(value) => json!(value),
        InfoValue::Int(value) => json!(value),
        InfoValue::Text(value) => json!(value),
        InfoValue::List(values) => values.iter().map(to_json).collect(),
        InfoValue::Object(facts) => {
            let facts = facts.iter().map(|(key, value)| ((*key).to_owned(), to_json(value)));
            Value::Object(facts.collect())
        }
    }
}

/// Writes a fact for people, `depth` levels in. As deep as the facts are, which a driver has made.
fn write_fact(out: &mut String, depth: usize, key: &str, value: &InfoValue) -> std::fmt::Result {
    let indent = " ".repeat(4 * depth);
    match value {
        InfoValue::Bool(value) => writeln!(out, "{indent}{key}: {value}"),
        InfoValue::Int(value) => writeln!(out, "{indent}{key}: {value}"),
        InfoValue::Text(value) => writeln!(out, "{indent}{key}: {value}"),
        InfoValue::List(values) => {
            writeln!(out, "{indent}{key}:")?;
            let one = |(nth, value)| write_fact(out, depth + 1, &format!("[{nth}]"), value);
            values.iter().enumerate().try_for_each(one)
        }
        InfoValue::Object(facts) => {
            writeln!(out, "{indent}{key}:")?;
            let one =
                |(key, value): &(&str, InfoValue)| write_fact(out, depth + 1, &key.replace('-', " "), value);
            facts.iter().try_for_each(one)
        }
    }
}

fn bytes_both(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", human_size(bytes))
}

fn actual_text(actual: Option<u64>) -> String {
    actual.map_or_else(|| "unavailable".into(), human_size)
}

/// The same for people, as `qemu-img info` prints it.
pub fn info_text(blockdevs: &Blockdevs, name: &str) -> Result<String> {
    let Told { info, snapshots, len, actual, .. } = told(blockdevs, name)?;
    let mut out = String::new();
    writeln!(out, "image: {}", info.filename)?;
    writeln!(out, "file format: {}", info.driver)?;
    writeln!(out, "virtual size: {}", bytes_both(len))?;
    writeln!(out, "disk size: {}", actual_text(actual))?;
    if let Some(cluster) = info.cluster_bytes {
        writeln!(out, "cluster_size: {cluster}")?;
    }
    if info.dirty {
        writeln!(out, "cleanly shut down: no")?;
    }
    if let Some(backing) = &info.backing {
        write!(out, "backing file: {}", backing.filename)?;
        match resolve_backing(&info.filename, &backing.filename) {
            Ok(whole) if whole != backing.filename => writeln!(out, " (actual path: {whole})")?,
            _ => writeln!(out)?,
        }
        if let Some(format) = &backing.format {
            writeln!(out, "backing file format: {format}")?;
        }
    }
    if !snapshots.is_empty() {
        out += &snapshots_text(&snapshots);
    }
    if !info.format_specific.is_empty() {
        writeln!(out, "Format specific information:")?;
        for (key, value) in &info.format_specific {
            write_fact(&mut out, 1, &key.replace('-', " "), value)?;
        }
    }
    let mut path = String::new();
    for child in files(blockdevs, name).iter().skip(1) {
        let Told { info, len, actual, .. } = told(blockdevs, child)?;
        path.push_str("/file");
        writeln!(out, "Child node '{path}':")?;
        writeln!(out, "    filename: {}", info.filename)?;
        writeln!(out, "    protocol type: {}", info.driver)?;
        writeln!(out, "    file length: {}", bytes_both(len))?;
        writeln!(out, "    disk size: {}", actual_text(actual))?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::date_text;

    #[test]
    fn seconds_become_dates_over_leap_years() {
        for (seconds, date) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_399, "2000-02-28 23:59:59"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_078_099_200, "2004-03-01 00:00:00"),
            (1_796_051_835, "2026-11-30 15:17:15"),
            (4_107_542_400, "2100-03-01 00:00:00"),
            (u64::from(u32::MAX), "2106-02-07 06:28:15"),
        ] {
            assert_eq!(date_text(seconds), date);
        }
    }
}
