//! The `infill` program: the command line, and one module for each subcommand. Wiring only; what it wires are the
//! crates.
//!
//! Every subcommand gives its exit code. A failure is one line on standard error that says what was expected, what was
//! found, where, and what to do; its exit code is 1, and so is that of a command line that is not understood (2 means
//! something else to those who call `check`).
#![forbid(unsafe_code)]

mod args;
mod authz;
mod blockdev;
mod commands;
mod daemon;
mod demo;
mod listen;
mod monitor;
mod object_types;
mod objects;
mod out;
mod patient;
mod progress;
mod size;
mod tls;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{CommandFactory, Parser};
use tracing_subscriber::EnvFilter;

use args::{Cli, Command};

fn main() -> ExitCode {
    let cli = match Cli::try_parse_from(as_named(std::env::args_os().collect())) {
        Ok(cli) => cli,
        Err(error) => {
            let failed = error.use_stderr();
            // Nobody is left to tell where even this cannot be printed.
            let _ = error.print();
            return if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    // The daemon has options of its own for that.
    if !matches!(cli.command, Command::Daemon { .. } | Command::QemuNbd { .. }) {
        log();
    }
    match dispatch(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("infill: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// The command line, with the command put in where the program is called by the name of what that stands in for.
fn as_named(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let name = arguments.first().and_then(|program| Path::new(program).file_name());
    for (stands_in_for, command) in [("qemu-storage-daemon", "daemon"), ("qemu-nbd", "qemu-nbd")] {
        if name == Some(stands_in_for.as_ref()) {
            arguments.insert(1, command.into());
            break;
        }
    }
    arguments
}

/// A failure with its causes in one line. A cause that the text before it has told already is left out.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let cause = cause.to_string().replace('\n', " ");
        if line.is_empty() {
            line = cause;
        } else if !line.ends_with(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}

/// Warnings go to standard error; the variable `INFILL_LOG` asks for more, as in `INFILL_LOG=debug`.
fn log() {
    let filter = EnvFilter::try_from_env("INFILL_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(filter).init();
}

fn dispatch(command: Command) -> Result<ExitCode> {
    match command {
        Command::Create(args) => commands::create::main(args),
        Command::Info(args) => commands::info::main(args),
        Command::Check(args) => commands::check::main(args),
        Command::Snapshot(args) => commands::snapshot::main(args),
        Command::Map(args) => commands::map::main(args),
        Command::Serve(args) => commands::serve::main(args),
        Command::Stream(args) => commands::stream::main(args),
        Command::Commit(args) => commands::ask::commit(args),
        Command::Mirror(args) => commands::ask::mirror(args),
        Command::Backup(args) => commands::ask::backup(args),
        Command::Jobs(args) => commands::ask::jobs(args),
        Command::Pause(args) => commands::ask::told("job-pause", &args),
        Command::Resume(args) => commands::ask::told("job-resume", &args),
        Command::Cancel(args) => commands::ask::cancel(args),
        Command::Complete(args) => commands::ask::complete(args),
        Command::Top(args) => commands::top::main(args),
        Command::Migrate(args) => commands::migrate::migrate(args),
        Command::Migrations(args) => commands::migrate::migrations(args),
        Command::Whois(args) => commands::migrate::whois(args),
        Command::Switch(args) => commands::migrate::told("__infill_migration-switch", &args),
        Command::Abort(args) => commands::migrate::told("__infill_migration-abort", &args),
        Command::Takeover(args) => commands::migrate::decided(
            "__infill_migration-takeover",
            args.peer_dead,
            "--peer-dead",
            "the source is not asked any more: if its machine runs, two machines write to one disk",
            &args.of,
        ),
        Command::Reclaim(args) => commands::migrate::decided(
            "__infill_migration-reclaim",
            args.accept_loss,
            "--accept-loss",
            "the target is not asked any more: what its machine has written is lost, and it must not run",
            &args.of,
        ),
        Command::Daemon { arguments } => daemon::main(arguments),
        Command::QemuNbd { arguments } => daemon::qemu_nbd(arguments),
        Command::Demo => {
            demo::main()?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "infill", &mut script);
            out::print(&String::from_utf8_lossy(&script))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Man { command } => {
            let mut all = Cli::command();
            all.build();
            let shown = match &command {
                None => all,
                Some(name) => match all.find_subcommand(name) {
                    Some(found) => found.clone(),
                    None => bail!("there is no command '{name}': `infill --help` lists those that there are"),
                },
            };
            let mut page = Vec::new();
            clap_mangen::Man::new(shown).render(&mut page).context("writing the manual page")?;
            out::print(&String::from_utf8_lossy(&page))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
