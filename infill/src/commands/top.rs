//! `infill top`: what a running daemon's disks and jobs are doing, again and again.
//!
//! The daemon counts, and this shows what came between two looks. Drawn over itself on a terminal; else one table, or
//! one object of JSON, for each look.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::ask::connect;
use crate::args::{Output, TopArgs};
use crate::monitor::Monitor;
use crate::out;

/// Puts the cursor to the screen's beginning and clears it.
const CLEAR: &str = "\x1b[H\x1b[2J";
/// Of a thousand requests, so many took no longer than what is told.
const SLOW_PER_MILLE: u64 = 990;

/// One look.
struct Look {
    at: Instant,
    load: Value,
    jobs: Value,
}

impl Look {
    fn take(monitor: &mut Monitor) -> Result<Look> {
        let why = "the daemon does not tell what its disks do (is it older than this program?)";
        let load = monitor.call("__infill_query-load", json!({})).context(why)?;
        let jobs = monitor.call("query-block-jobs", json!({}))?;
        Ok(Look { at: Instant::now(), load, jobs })
    }
}

/// Shows it until it is interrupted, or once.
pub fn main(args: TopArgs) -> Result<ExitCode> {
    let mut monitor = connect(&args.daemon)?;
    let interval = Duration::from_secs(args.interval.into());
    let drawn = args.output == Output::Human && !args.once && std::io::stdout().is_terminal();
    let mut before = Look::take(&mut monitor)?;
    loop {
        let end = before.at + interval;
        // Events are not what is shown; waiting for them shows at once when the daemon has ended.
        while Instant::now() < end {
            monitor.event(end.saturating_duration_since(Instant::now()))?;
        }
        let now = Look::take(&mut monitor)?;
        let shown = between(&before, &now);
        let text = match args.output {
            Output::Json => format!("{shown}\n"),
            Output::Human => table(&shown),
        };
        out::print(&if drawn { format!("{CLEAR}{text}") } else { text })?;
        if args.once {
            return Ok(ExitCode::SUCCESS);
        }
        before = now;
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// What happened between two looks, in a second each.
fn between(before: &Look, now: &Look) -> Value {
    let seconds = now.at.duration_since(before.at).as_secs_f64().max(0.001);
    let bounds = &now.load["bucket-micros"];
    let node = |node: &Value| {
        let name = &node["node-name"];
        let old = items(&before.load["nodes"]).find(|old| old["node-name"] == *name).unwrap_or(&Value::Null);
        let rate = |key: &str| (number(&node[key]).saturating_sub(number(&old[key])) as f64 / seconds) as u64;
        let mut shown = json!({ "node-name": name, "exported": node["exported"] });
        for key in ["read-bytes", "written-bytes", "fill-bytes", "populated-bytes"] {
            shown[format!("{key}-per-second")] = json!(rate(key));
        }
        for latency in items(&node["latencies"]) {
            let old = items(&old["latencies"]).find(|old| old["kind"] == latency["kind"]);
            let kind = latency["kind"].as_str().unwrap_or_default();
            shown[kind] = latency_between(old.unwrap_or(&Value::Null), latency, bounds, seconds);
        }
        shown
    };
    let nodes: Vec<_> = items(&now.load["nodes"]).map(node).collect();
    json!({ "seconds": seconds, "nodes": nodes, "jobs": now.jobs })
}

fn latency_between(old: &Value, new: &Value, bounds: &Value, seconds: f64) -> Value {
    let old_counts: Vec<u64> = items(&old["counts"]).map(number).collect();
    let counts: Vec<u64> = items(&new["counts"])
        .enumerate()
        .map(|(at, count)| number(count).saturating_sub(old_counts.get(at).copied().unwrap_or(0)))
        .collect();
    let count: u64 = counts.iter().sum();
    let micros = number(&new["micros"]).saturating_sub(number(&old["micros"]));
    let mut shown = json!({ "requests-per-second": count as f64 / seconds });
    if let Some(mean) = micros.checked_div(count) {
        shown["mean-micros"] = json!(mean);
        let mut seen = 0;
        let slow = counts.iter().position(|count_here| {
            seen += count_here;
            seen * 1000 >= count * SLOW_PER_MILLE
        });
        // Behind the last bound nothing is known but that it took longer.
        let bound = slow.and_then(|at| bounds.get(at)).and_then(Value::as_u64);
        shown["p99-micros-at-most"] = json!(bound);
    }
    shown
}

fn time(micros: &Value) -> String {
    match micros.as_u64() {
        None => "-".into(),
        Some(micros) if micros < 1000 => format!("{micros} µs"),
        Some(micros) if micros < 1_000_000 => format!("{:.1} ms", micros as f64 / 1e3),
        Some(micros) => format!("{:.1} s", micros as f64 / 1e6),
    }
}

fn bytes(value: &Value) -> String {
    let bytes = number(value) as f64;
    match bytes {
        0.0 => "-".into(),
        bytes if bytes < 1024.0 * 1024.0 => format!("{:.1} KiB", bytes / 1024.0),
        bytes => format!("{:.1} MiB", bytes / (1024.0 * 1024.0)),
    }
}

/// As people read it: disks that are exported or busy, then jobs.
fn table(shown: &Value) -> String {
    let mut text = format!(
        "{:<24} {:>11} {:>11} {:>11} {:>7} {:>17} {:>7} {:>17} {:>9}\n",
        "DISK", "READ/s", "WRITTEN/s", "FILLED/s", "READS", "MEAN / 99%", "WRITES", "MEAN / 99%", "FLUSH"
    );
    for node in items(&shown["nodes"]) {
        let rates =
            ["read-bytes", "written-bytes", "populated-bytes"].map(|key| &node[format!("{key}-per-second")]);
        if node["exported"] != true && rates.iter().all(|rate| number(rate) == 0) {
            continue;
        }
        let per_second = |kind: &str| node[kind]["requests-per-second"].as_f64().unwrap_or(0.0);
        let took = |kind: &str| {
            format!("{} / {}", time(&node[kind]["mean-micros"]), time(&node[kind]["p99-micros-at-most"]))
        };
        text += &format!(
            "{:<24} {:>11} {:>11} {:>11} {:>7.0} {:>17} {:>7.0} {:>17} {:>9}\n",
            node["node-name"].as_str().unwrap_or("?"),
            bytes(rates[0]),
            bytes(rates[1]),
            bytes(rates[2]),
            per_second("read"),
            took("read"),
            per_second("write"),
            took("write"),
            time(&node["sync"]["mean-micros"]),
        );
    }
    let mut jobs = items(&shown["jobs"]).peekable();
    if jobs.peek().is_some() {
        text += &format!("\n{:<24} {:<8} {:<10} {:>5} {:>11}\n", "JOB", "TYPE", "STATUS", "DONE", "OF");
    }
    for job in jobs {
        let word = |key: &str| job[key].as_str().unwrap_or("?");
        let percent = (number(&job["offset"]) * 100).checked_div(number(&job["len"])).unwrap_or(0);
        let waiting = job["__infill_waiting_for"].as_str().or(job["error"].as_str()).unwrap_or_default();
        text += &format!(
            "{:<24} {:<8} {:<10} {percent:>4}% {:>11} {waiting}\n",
            word("device"),
            word("type"),
            word("status"),
            bytes(&job["len"]),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_what_came_between_two_looks() {
        let bounds = json!([16, 64, 256]);
        let old = json!({ "micros": 1000, "counts": [50, 0, 0, 0] });
        let new = json!({ "micros": 11_000, "counts": [148, 1, 1, 0] });
        let shown = latency_between(&old, &new, &bounds, 2.0);
        assert_eq!(
            shown,
            json!({ "requests-per-second": 50.0, "mean-micros": 100, "p99-micros-at-most": 64 })
        );
        assert_eq!(latency_between(&new, &new, &bounds, 1.0), json!({ "requests-per-second": 0.0 }));
        let slow = json!({ "micros": 11_000, "counts": [148, 1, 1, 9] });
        assert_eq!(latency_between(&new, &slow, &bounds, 1.0)["p99-micros-at-most"], Value::Null);
    }
}
