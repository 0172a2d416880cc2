//! The commands that ask a running daemon over its monitor: jobs are begun there, watched from here, and told what to
//! do. Whoever watches owns nothing: interrupted, the job goes on.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use infill_io::termination;
use serde_json::{Value, json};

use super::run;
use crate::args::{
    BackupArgs, CancelArgs, CommitArgs, JobArgs, JobEndArgs, JobsArgs, MirrorArgs, Output, SocketArgs,
    StartArgs, StreamArgs, WaitArgs,
};
use crate::monitor::Monitor;
use crate::out;
use crate::progress::bytes_bar;

/// How often a daemon is asked how far its job is.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// How often a job may be missing before its end is given up: the event may be behind the answer.
const MISSED_MAX: u32 = 10;

/// How a job was left.
enum End {
    Done,
    Ready,
    Cancelled,
    Failed(String),
}

pub(super) fn connect(daemon: &SocketArgs) -> Result<Monitor> {
    let socket = daemon.socket.clone().or_else(|| std::env::var_os("INFILL_SOCKET").map(PathBuf::from));
    let Some(socket) = socket else {
        bail!(
            "which daemon is asked? Say --socket PATH, the Unix socket of its QMP monitor, or set INFILL_SOCKET"
        )
    };
    Monitor::connect(&socket)
}

/// `infill stream`, of a daemon's node.
pub fn stream(args: StreamArgs) -> Result<ExitCode> {
    let node = args.node.context("which of the daemon's nodes is to be filled? Say --node NAME")?;
    let mut arguments = json!({ "device": node });
    if let Some(base) = &args.base {
        arguments["base"] = json!(base);
    }
    if let Some(rate) = args.min_rate {
        arguments["__infill_min-rate"] = json!(rate);
    }
    if let Some(time) = args.finish_in {
        let by = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")? + time;
        arguments["__infill_finish-by"] = json!(by.as_secs());
    }
    let start = StartArgs {
        daemon: SocketArgs { socket: args.socket },
        job_id: args.job_id,
        speed: args.speed,
        wait: WaitArgs { detach: args.detach, quiet: args.quiet },
    };
    begin("stream", &node, "block-stream", arguments, false, &start)
}

/// `infill commit`.
pub fn commit(args: CommitArgs) -> Result<ExitCode> {
    let mut arguments = json!({ "device": args.node });
    for (key, value) in [("base-node", &args.base), ("top-node", &args.top)] {
        if let Some(value) = value {
            arguments[key] = json!(value);
        }
    }
    begin("commit", &args.node, "block-commit", arguments, args.complete, &args.start)
}

/// `infill mirror`.
pub fn mirror(args: MirrorArgs) -> Result<ExitCode> {
    let arguments = json!({
        "device": args.node, "target": args.target, "sync": args.sync, "copy-mode": args.copy_mode,
    });
    begin("mirror", &args.node, "blockdev-mirror", arguments, args.complete, &args.start)
}

/// `infill backup`.
pub fn backup(args: BackupArgs) -> Result<ExitCode> {
    let mut arguments = json!({ "device": args.node, "target": args.target, "sync": args.sync });
    if let Some(bitmap) = &args.bitmap {
        arguments["bitmap"] = json!(bitmap);
    }
    begin("backup", &args.node, "blockdev-backup", arguments, false, &args.start)
}

fn begin(
    verb: &str,
    node: &str,
    command: &str,
    mut arguments: Value,
    complete: bool,
    start: &StartArgs,
) -> Result<ExitCode> {
    let id = start.job_id.clone().unwrap_or_else(|| format!("{verb}-{}", node.trim_start_matches('#')));
    arguments["job-id"] = json!(id);
    if let Some(speed) = start.speed {
        arguments["speed"] = json!(speed);
    }
    let mut monitor = connect(&start.daemon)?;
    monitor
        .call(command, arguments)
        .with_context(|| format!("the daemon does not begin the {verb} of '{node}'"))?;
    let quiet = start.wait.quiet;
    if start.wait.detach {
        say(quiet, &format!("the daemon's job '{id}' runs; `infill jobs` tells of it"));
        return Ok(ExitCode::SUCCESS);
    }
    match watch(&mut monitor, &id, Some(complete), quiet)? {
        End::Done => say(quiet, &format!("the {verb} of {node} is done, and all of it is on stable storage")),
        End::Ready => say(
            quiet,
            &format!(
                "the daemon's job '{id}' is ready and keeps up: `infill complete {id}` ends it, `infill cancel {id}` \
                 gives it up"
            ),
        ),
        End::Cancelled => bail!("the daemon's job '{id}' has been cancelled"),
        End::Failed(why) => bail!("the daemon's job '{id}' has failed: {why}"),
    }
    Ok(ExitCode::SUCCESS)
}

/// `infill jobs`.
pub fn jobs(args: JobsArgs) -> Result<ExitCode> {
    let mut monitor = connect(&args.daemon)?;
    let jobs = monitor.call("query-jobs", json!({}))?;
    if args.output == Output::Json {
        out::print(&format!("{}\n", serde_json::to_string_pretty(&jobs)?))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    for job in jobs.as_array().into_iter().flatten() {
        let word = |key: &str| job[key].as_str().unwrap_or("?");
        let number = |key: &str| job[key].as_u64().unwrap_or(0);
        let line = format!(
            "{}\t{}\t{}\t{}/{} bytes",
            word("id"),
            word("type"),
            word("status"),
            number("current-progress"),
            number("total-progress"),
        );
        text.push_str(&line);
        if let Some(error) = job["error"].as_str() {
            text.push_str(&format!("\t{error}"));
        }
        text.push('\n');
    }
    out::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn tell(monitor: &mut Monitor, command: &str, id: &str) -> Result<()> {
    let told = monitor.call(command, json!({ "id": id }));
    told.with_context(|| format!("the daemon refuses {command} for '{id}' (`infill jobs` lists its jobs)"))?;
    Ok(())
}

/// A command that is done when it is answered: `infill pause`, `infill resume`.
pub fn told(command: &str, args: &JobArgs) -> Result<ExitCode> {
    tell(&mut connect(&args.daemon)?, command, &args.id)?;
    Ok(ExitCode::SUCCESS)
}

/// `infill cancel`.
pub fn cancel(args: CancelArgs) -> Result<ExitCode> {
    if args.keep_copy {
        return keep_copy(&args.end);
    }
    let args = args.end;
    match end("job-cancel", &args)? {
        // What fails when it is told to give up has given up.
        Some(End::Failed(why)) => say(args.wait.quiet, &format!("'{}' ended with: {why}", args.job.id)),
        Some(End::Done) => bail!("the daemon's job '{}' was done before it could be cancelled", args.job.id),
        _ => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// `infill cancel --keep-copy`: what the protocol calls cancelling a block job without force, once it is ready.
fn keep_copy(args: &JobEndArgs) -> Result<ExitCode> {
    let (id, quiet) = (&args.job.id, args.wait.quiet);
    let mut monitor = connect(&args.job.daemon)?;
    let jobs = monitor.call("query-jobs", json!({}))?;
    let job = jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == **id));
    let Some(job) = job else { bail!("the daemon has no job '{id}' (`infill jobs` lists its jobs)") };
    if job["type"] != "mirror" || !matches!(job["status"].as_str(), Some("ready" | "standby")) {
        bail!(
            "'{id}' is a {} that is {}: only a mirror that is ready has a copy to keep",
            job["type"].as_str().unwrap_or("job"),
            job["status"].as_str().unwrap_or("not there"),
        );
    }
    monitor.call("block-job-cancel", json!({ "device": id }))?;
    if args.wait.detach {
        return Ok(ExitCode::SUCCESS);
    }
    match watch(&mut monitor, id, None, quiet)? {
        End::Failed(why) => bail!("the daemon's job '{id}' has failed: {why}"),
        End::Cancelled => bail!("the daemon's job '{id}' was cancelled: its target is no copy"),
        End::Done | End::Ready => say(quiet, &format!("'{id}' has ended: its target is a copy of the disk")),
    }
    Ok(ExitCode::SUCCESS)
}

/// `infill complete`.
pub fn complete(args: JobEndArgs) -> Result<ExitCode> {
    match end("job-complete", &args)? {
        Some(End::Failed(why)) => bail!("the daemon's job '{}' has failed: {why}", args.job.id),
        Some(End::Cancelled) => bail!("the daemon's job '{}' has been cancelled", args.job.id),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn end(command: &str, args: &JobEndArgs) -> Result<Option<End>> {
    let mut monitor = connect(&args.job.daemon)?;
    tell(&mut monitor, command, &args.job.id)?;
    match args.wait.detach {
        true => Ok(None),
        false => watch(&mut monitor, &args.job.id, None, args.wait.quiet).map(Some),
    }
}

fn say(quiet: bool, text: &str) {
    if !quiet {
        eprintln!("infill: {text}");
    }
}

/// Follows a job to its end. At READY it stops or has it completed, as `at_ready` says; `None` waits on.
fn watch(monitor: &mut Monitor, id: &str, at_ready: Option<bool>, quiet: bool) -> Result<End> {
    leave_on_signal(id);
    let bar = if quiet { ProgressBar::hidden() } else { bytes_bar(id) };
    let mut missed = 0;
    loop {
        if let Some(event) = monitor.event(ASK_AGAIN)? {
            let data = &event["data"];
            if data["device"] != id {
                continue;
            }
            let left = match (event["event"].as_str().unwrap_or_default(), at_ready) {
                ("BLOCK_JOB_COMPLETED", _) => match data["error"].as_str() {
                    Some(why) => End::Failed(why.to_owned()),
                    None => End::Done,
                },
                ("BLOCK_JOB_CANCELLED", _) => End::Cancelled,
                ("BLOCK_JOB_READY", Some(false)) => End::Ready,
                ("BLOCK_JOB_READY", Some(true)) => {
                    tell(monitor, "job-complete", id)?;
                    continue;
                }
                _ => continue,
            };
            bar.finish_and_clear();
            return Ok(left);
        }
        let jobs = monitor.call("query-jobs", json!({}))?;
        match jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == id)) {
            Some(job) => {
                bar.set_length(job["total-progress"].as_u64().unwrap_or(0));
                bar.set_position(job["current-progress"].as_u64().unwrap_or(0));
            }
            None => missed += 1,
        }
        if missed > MISSED_MAX {
            bail!("the daemon knows no job '{id}' any more, and has not said how it ended");
        }
    }
}

/// From here on a signal ends this process with a word about the job, which goes on.
fn leave_on_signal(id: &str) {
    let id = id.to_owned();
    std::thread::spawn(move || {
        run(move || async move {
            termination().context("waiting for signals")?.await;
            eprintln!("infill: interrupted; the daemon's job '{id}' goes on (`infill cancel {id}` ends it)");
            std::process::exit(1)
        })
    });
}
