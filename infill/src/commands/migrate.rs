//! Disks that change hosts, asked of a running daemon: begun, watched, looked at and, where one side is dead, decided.
//!
//! `infill migrate` owns nothing: interrupted, the migration goes on, and the same command again finds it.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use indicatif::ProgressBar;
use infill_qmp::migration::PHASE_GIVES_UP;
use serde_json::{Value, json};

use super::ask::connect;
use crate::args::{MigrateArgs, MigrationArgs, MigrationsArgs, Output, SocketArgs, WhoisArgs};
use crate::out;

/// How often a daemon is asked where its migration stands.
const ASK_AGAIN: Duration = Duration::from_millis(200);

fn all(daemon: &SocketArgs) -> Result<Vec<Value>> {
    let all = connect(daemon)?.call("__infill_query-migrations", json!({}))?;
    Ok(all.as_array().cloned().unwrap_or_default())
}

fn word<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("?")
}

/// `infill migrate`.
pub fn migrate(args: MigrateArgs) -> Result<ExitCode> {
    let mode = match (args.pre_copy, args.post_copy) {
        (true, _) => "pre-copy",
        (_, true) => "post-copy",
        _ => "hybrid",
    };
    let disks: Vec<Value> = args.disks.iter().map(|name| json!({ "name": name })).collect();
    let mut arguments = json!({ "disks": disks, "to": args.to, "mode": mode, "auto-switch": !args.hold });
    if let Some(name) = &args.tls_hostname {
        arguments["tls-hostname"] = json!(name);
    }
    if let Some(seconds) = args.way_back {
        arguments["way-back"] = json!(seconds);
    }
    if let Some(seconds) = args.warm_seconds {
        arguments["warm-seconds"] = json!(seconds);
    }
    if let Some(bytes) = args.warm_bytes {
        arguments["warm-bytes"] = json!(bytes);
    }
    if let Some(migration) = &args.migration {
        arguments["migration"] = json!(migration);
    }
    let mut monitor = connect(&args.daemon)?;
    let begun = monitor.call("__infill_migrate", arguments);
    let begun = begun.with_context(|| format!("the daemon does not move {}", args.disks.join(", ")))?;
    let migration = word(&begun, "migration").to_owned();
    if args.detach {
        out::print(&format!("{migration}\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let bar = if args.quiet { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
    let (mut told, mut wrong) = (String::new(), String::new());
    loop {
        let all = monitor.call("__infill_query-migrations", json!({}))?;
        let of = |one: &&Value| one["migration"] == *migration && one["side"] == "source";
        let Some(now) = all.as_array().and_then(|all| all.iter().find(of)) else {
            bail!("the daemon knows migration {migration} no more");
        };
        let state = word(now, "state");
        let line = format!(
            "{state}, {}, round {}, {} bytes written since",
            word(now, "phase").to_lowercase(),
            now["rounds"],
            now["dirty-bytes"]
        );
        bar.set_message(line);
        bar.tick();
        if state != told && !args.quiet && bar.is_hidden() {
            eprintln!("infill: migration {migration}: {state}");
        }
        state.clone_into(&mut told);
        match outcome(now, args.wait, args.hold) {
            Outcome::Done => break,
            Outcome::Failed(why) => {
                bar.finish_and_clear();
                bail!("{why}");
            }
            Outcome::UnderWay => {}
        }
        let error = now["error"].as_str().unwrap_or_default();
        if error != wrong && !error.is_empty() && !args.quiet {
            // A peer that is away comes back: it is waited for.
            bar.suspend(|| eprintln!("infill: migration {migration}: {error}"));
        }
        error.clone_into(&mut wrong);
        std::thread::sleep(ASK_AGAIN);
    }
    bar.finish_and_clear();
    if !args.quiet {
        eprintln!("infill: migration {migration} to {}: {}", args.to, meaning(&told));
    }
    Ok(ExitCode::SUCCESS)
}

/// How a migration stands for the one who waits for it.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    UnderWay,
    Done,
    Failed(String),
}

/// What is there of what was asked for, as a daemon tells of the migration.
fn outcome(now: &Value, wait: bool, hold: bool) -> Outcome {
    let error = now["error"].as_str();
    match (word(now, "state"), word(now, "phase")) {
        ("released", _) => Outcome::Done,
        ("handed_over", _) if !wait => Outcome::Done,
        ("prepared", "ready") if hold => Outcome::Done,
        // It gets on when the guest writes less, or when somebody decides.
        ("prepared", PHASE_GIVES_UP) => Outcome::Failed(format!(
            "the disks are still here, and do not get ready: {}",
            error.unwrap_or("the guest writes faster than they are copied; `infill abort` ends it")
        )),
        ("serving" | "superseded", _) => {
            Outcome::Failed(format!("the disks stay here: {}", error.unwrap_or("the migration was aborted")))
        }
        _ => Outcome::UnderWay,
    }
}

/// What a state means to the one who asked for a migration.
fn meaning(state: &str) -> &'static str {
    match state {
        "released" => "the disks are there, all of them; what is left here may be deleted",
        "handed_over" => {
            "the disks are owned there, and their data follows: leave this daemon running until then"
        }
        "prepared" => "the disks are still here; `infill switch` has them change hands",
        _ => "under way",
    }
}

/// `infill migrations`.
pub fn migrations(args: MigrationsArgs) -> Result<ExitCode> {
    let all = all(&args.daemon)?;
    if args.output == Output::Json {
        out::print(&format!("{}\n", serde_json::to_string_pretty(&all)?))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    for one in &all {
        let names = one["disks"].as_array().into_iter().flatten().map(|disk| word(disk, "name"));
        let names = names.collect::<Vec<_>>().join(",");
        let line = format!(
            "{}\t{}\t{}\t{}\t{names}\t{}",
            word(one, "migration"),
            word(one, "side"),
            word(one, "state"),
            word(one, "phase").to_lowercase(),
            word(one, "peer"),
        );
        text.push_str(&line);
        if let Some(error) = one["error"].as_str() {
            text.push_str(&format!("\t{error}"));
        }
        text.push('\n');
    }
    out::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// `infill whois`: of all daemons that are asked, from their durable records.
pub fn whois(args: WhoisArgs) -> Result<ExitCode> {
    let mut sockets = vec![args.daemon.clone()];
    sockets.extend(args.peer.iter().map(|socket| SocketArgs { socket: Some(socket.clone()) }));
    let (mut found, mut owners) = (Vec::new(), 0);
    for socket in &sockets {
        for mut one in all(socket)? {
            let Some(disk) = one["disks"]
                .as_array()
                .and_then(|disks| disks.iter().find(|disk| disk["name"] == *args.disk))
            else {
                continue;
            };
            let (epoch, bytes) = (disk["epoch"].clone(), one["missing-bytes"].clone());
            owners += usize::from(one["owner"] == true);
            let mut told = json!({ "epoch": epoch, "bytes-at-risk": bytes });
            for key in ["migration", "side", "state", "owner", "peer"] {
                told[key] = one[key].take();
            }
            found.push(told);
        }
    }
    if found.is_empty() {
        bail!("{} has never changed hosts as far as {} can tell", args.disk, daemons(sockets.len()));
    }
    found.sort_by_key(|one| std::cmp::Reverse(one["epoch"].as_u64()));
    if args.output == Output::Json {
        out::print(&format!("{}\n", serde_json::to_string_pretty(&found)?))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    for one in &found {
        let owner = if one["owner"] == true { "owner" } else { "not the owner" };
        text.push_str(&format!(
            "epoch {}\t{owner}\t{} of migration {}: {}\tpeer {}\t{} bytes still at the source\n",
            one["epoch"],
            word(one, "side"),
            word(one, "migration"),
            word(one, "state"),
            word(one, "peer"),
            one["bytes-at-risk"],
        ));
    }
    if owners == 0 {
        text.push_str(&format!("no owner among {}: ask the peers, too (--peer)\n", daemons(sockets.len())));
    }
    out::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn daemons(count: usize) -> String {
    if count == 1 { "this daemon".into() } else { format!("these {count} daemons") }
}

/// `infill switch`, `abort`, `takeover`, `reclaim`: told to the daemon, which answers at once.
pub fn told(command: &str, args: &MigrationArgs) -> Result<ExitCode> {
    let told = connect(&args.daemon)?.call(command, json!({ "migration": args.migration }));
    told.with_context(|| format!("migration {}", args.migration))?;
    Ok(ExitCode::SUCCESS)
}

/// An operator's word against a side that cannot be asked.
pub fn decided(command: &str, sure: bool, flag: &str, loses: &str, args: &MigrationArgs) -> Result<ExitCode> {
    if !sure {
        bail!("{loses}; if that is so, say {flag}");
    }
    told(command, args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_is_told_that_there_is_nothing_to_wait_for_any_more() {
        let at = |state: &str, phase: &str| json!({"state": state, "phase": phase, "error": "why"});
        let ends = |now: Value, wait, hold| match outcome(&now, wait, hold) {
            Outcome::UnderWay => None,
            Outcome::Done => Some(true),
            Outcome::Failed(why) => {
                assert!(why.ends_with("why"), "{why}");
                Some(false)
            }
        };
        for (wait, hold) in [(false, false), (false, true), (true, false)] {
            assert_eq!(ends(at("prepared", PHASE_GIVES_UP), wait, hold), Some(false));
            assert_eq!(ends(at("serving", "over"), wait, hold), Some(false));
            assert_eq!(ends(at("released", "over"), wait, hold), Some(true));
            // An error that may pass is no end.
            assert_eq!(ends(at("prepared", "waits for the target"), wait, hold), None);
            assert_eq!(ends(at("prepared", "copies"), wait, hold), None);
            assert_eq!(ends(at("prepared", "ready"), wait, hold), hold.then_some(true));
            assert_eq!(ends(at("handed_over", "Missing"), wait, hold), (!wait).then_some(true));
        }
        let Outcome::Failed(why) =
            outcome(&json!({"state": "prepared", "phase": PHASE_GIVES_UP}), false, true)
        else {
            panic!("it has an end");
        };
        assert!(why.contains("infill abort"), "{why}");
    }
}
