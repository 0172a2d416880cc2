//! `infill daemon`: many disks, controlled over QMP, started with qemu-storage-daemon's command line.
//!
//! Owns the order of the process's life, and the monitors. What never happens: a monitor that stalls I/O (it has a bounded
//! queue of its own, and is cut off when it does not read), a client that is served before every option was carried out,
//! an end that leaves something acknowledged and not synced.
//!
//! # Events of our own
//! `__INFILL_JOB_PROGRESS`, `__INFILL_JOB_DURABLE`, and `__INFILL_SOURCE_LOST` and `__INFILL_SOURCE_BACK`, which tell of a
//! node (`node-name`: its server has gone or is back) or of a job (`id`: it has met an error of its source, or got on).
//! `__INFILL_READS_HELD` tells of a disk that has come (`name`) and whose source is away that reads of what is only there fail
//! now (`failing`), or are answered again.
//!
//! # Order of the beginning
//! The sandbox is entered ([`sandbox`]). What a state holds is made again ([`state`]). Options are carried out one after
//! the other, as they stand. Sockets listen from their option on and are served after the last one; the pid file is written
//! just before, and the service manager (`sd_notify`) is told just after.
//!
//! # Order of the end (`quit`, SIGTERM, SIGINT, SIGHUP)
//! 1. Exports are taken away: what clients have in flight is answered.
//! 2. Jobs are cancelled, or, where their state is kept, stop without a word, to go on with the next start. What they
//!    have filled stays.
//! 3. Nodes are synced and closed, each after those that lie on it.
//! 4. Monitors are sent what is left for them, for at most [`FAREWELL_TIME`]; the pid file goes.

mod active;
mod alter;
mod backup;
mod bitmaps;
mod chardev;
mod chardevs;
mod cmdline;
mod config;
mod control;
mod copy;
mod corrupt;
mod create;
mod detach;
mod drive;
mod experimental;
mod exports;
mod groups;
mod inspect;
mod jobs;
mod kept_bitmaps;
mod load;
mod maps;
mod metrics;
mod migration;
mod monitor;
mod nodes;
mod objects;
mod overlay;
mod pidfile;
mod qemu_nbd;
mod reopen;
mod sandbox;
mod sha256;
mod shape;
mod snapshots;
mod state;
mod threshold;
mod transaction;

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use futures_util::future::{Either, select};
use infill_io::{JournalDir, Reactor, Reactors, termination};
use infill_qmp::{Members, ObjectOptions, QmpError};
use infill_storage::rt;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;
use tracing_subscriber::EnvFilter;

use crate::out::print;
use chardev::Chardevs;
use cmdline::{CommandLine, Kind, Parsed};
use control::Control;
use detach::{Detached, Ready, detach};
use pidfile::PidFile;
use state::State;

/// How long the end waits for monitors to take what is left for them.
const FAREWELL_TIME: Duration = Duration::from_secs(2);

/// Most reactors that are started; fewer where there are fewer processors.
const REACTORS_MAX: usize = 8;

/// Runs the daemon until it is asked to end. `arguments` are those behind the subcommand.
pub fn main(arguments: Vec<OsString>) -> Result<ExitCode> {
    start_with(cmdline::parse(arguments)?)
}

/// Runs a daemon for one disk, with qemu-nbd's options.
pub fn qemu_nbd(arguments: Vec<OsString>) -> Result<ExitCode> {
    start_with(qemu_nbd::parse(arguments)?)
}

fn start_with(parsed: Parsed) -> Result<ExitCode> {
    match parsed {
        Parsed::Print(text) => {
            print(&text)?;
            Ok(ExitCode::SUCCESS)
        }
        Parsed::Run(mut command_line) => {
            log_to_stderr(command_line.log_json);
            let ready = match command_line.daemonize.then(detach).transpose()? {
                Some(Detached::First(code)) => return Ok(code),
                Some(Detached::Second) => Some(Ready { keep_stderr: command_line.keep_stderr }),
                None => None,
            };
            let journal = journal_dir(&command_line);
            if let Some(journal) = journal.as_ref().filter(|_| !command_line.sandbox_paths.is_empty())
                && journal.check().is_ok()
            {
                command_line.sandbox_paths.push(journal.path().to_owned());
            }
            open_many_files();
            // Before there are threads: those that are made later are bound as this one is.
            command_line.sandbox.enter(&command_line.sandbox_paths)?;
            let count = std::thread::available_parallelism().map_or(1, usize::from).min(REACTORS_MAX);
            let reactors = Reactors::start(count).context("starting the reactors")?;
            let all = reactors.all();
            reactors.block_on(move || run(*command_line, ready, journal, all))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Each disk is a file that is open, each client a socket: as many as the system lets this process have.
fn open_many_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of open files stays at {:?}", limit.current);
    }
}

/// Where volatile journals are kept. Whoever comes back with its state has guests who rely on it.
fn journal_dir(command_line: &CommandLine) -> Option<JournalDir> {
    match &command_line.journal {
        Some(dir) => Some(JournalDir::new(dir)),
        None => command_line.state.is_some().then(JournalDir::usual),
    }
}

/// Warnings go to standard error; `RUST_LOG` (or `INFILL_LOG`) asks for more or less.
fn log_to_stderr(json: bool) {
    let asked = EnvFilter::try_from_default_env().or_else(|_| EnvFilter::try_from_env("INFILL_LOG"));
    let filter = asked.unwrap_or_else(|_| EnvFilter::new("warn"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // It fails where somebody logs already, and then that is where it goes.
    let _already = match json {
        true => log.json().try_init(),
        false => log.with_ansi(std::io::stderr().is_terminal()).try_init(),
    };
}

async fn run(
    command_line: CommandLine,
    ready: Option<Ready>,
    journal: Option<JournalDir>,
    reactors: Vec<Reactor>,
) -> Result<()> {
    // From here on a signal ends it in order.
    let mut terminated = Box::pin(termination().context("waiting for signals")?);
    let state = command_line.state.as_deref().map(|dir| State::open(dir, command_line.forget)).transpose()?;
    let control = Control::new(reactors, state, journal);
    if control.state.is_some() {
        rt::spawn(control.clone().keep_ticking());
    }
    let metrics = command_line.metrics.as_deref().map(metrics::listen).transpose()?;
    if metrics.is_some() {
        control.meter_nodes();
    }
    let mut chardevs = Chardevs::default();
    if let Some(options) = &command_line.migration {
        control.listen_for_peers(options)?;
    }
    control.load_migrations()?;
    let started = {
        let starting = std::pin::pin!(start(&control, &mut chardevs, &command_line));
        match select(starting, &mut terminated).await {
            Either::Left((started, _)) => started.map(Some),
            Either::Right(((), _)) => Ok(None),
        }
    };
    let _pidfile = match started {
        Ok(Some(pidfile)) => {
            serve(&control, chardevs);
            if let Some(listener) = metrics {
                rt::spawn(metrics::serve(control.clone(), listener));
            }
            notify(&[NotifyState::Ready]);
            let told = ready.map(Ready::tell).transpose();
            if let Err(error) = told {
                tracing::warn!("in the background: {error:#}");
            }
            let asked = std::pin::pin!(control.asked_to_quit());
            match command_line.one.as_ref().filter(|one| !one.persistent) {
                Some(_) => {
                    let unused = std::pin::pin!(control.last_client_gone());
                    select(select(asked, terminated), unused).await;
                }
                None => drop(select(asked, terminated).await),
            }
            pidfile
        }
        Ok(None) => None,
        Err(error) => {
            // What was opened is closed in order; the reason is what is told.
            let _closed = end(&control).await;
            return Err(error);
        }
    };
    end(&control).await
}

/// Carries the options out, and writes the pid file.
async fn start(
    control: &Rc<Control>,
    chardevs: &mut Chardevs,
    command_line: &CommandLine,
) -> Result<Option<PidFile>> {
    control.resume_migrations();
    control.restore().await;
    for option in &command_line.options {
        let outcome = carry_out(control, chardevs, option.kind, &option.text).await;
        outcome.map_err(|error| anyhow!("{}: {}", option.told(), error.desc))?;
    }
    if let Some(one) = &command_line.one {
        qemu_nbd::serve(control, one).await?;
    }
    command_line.pidfile.as_deref().map(PidFile::write).transpose()
}

async fn carry_out(
    control: &Rc<Control>,
    chardevs: &mut Chardevs,
    kind: Kind,
    text: &str,
) -> Result<(), QmpError> {
    match kind {
        Kind::Chardev => chardevs.add(text).await,
        Kind::Monitor => chardevs.monitor(Members::of_argument(text, Some("chardev"))?),
        Kind::Blockdev => option(control, "blockdev-add", text, Some("driver")).await,
        Kind::NbdServer => option(control, "--nbd-server", text, None).await,
        Kind::Export => option(control, "block-export-add", text, Some("type")).await,
        Kind::Object => control.carry_out_option("object-add", ObjectOptions::members(text)?).await,
    }
}

/// An option that does what a command does.
async fn option(
    control: &Rc<Control>,
    command: &str,
    text: &str,
    implied: Option<&str>,
) -> Result<(), QmpError> {
    control.carry_out_option(command, Members::of_argument(text, implied)?).await
}

/// Begins to serve clients and monitors.
fn serve(control: &Rc<Control>, chardevs: Chardevs) {
    control.open_for_clients();
    control.meet_peers();
    rt::spawn(control.clone().tell_events());
    rt::spawn(control.clone().tell_corruption());
    let (devices, monitors) = chardevs.into_parts();
    *control.chardevs.borrow_mut() = devices;
    for monitor in monitors {
        rt::spawn(monitor::serve(control.clone(), monitor));
    }
}

/// Tells the service manager, where there is one.
fn notify(what: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(what) {
        tracing::warn!(%error, "the service manager could not be told");
    }
}

/// Ends everything in order. A second signal, while that waits for a source that is away, ends the process at once: what
/// is on the disk then is what a crash leaves, and nobody was told otherwise.
async fn end(control: &Rc<Control>) -> Result<()> {
    let again = termination().context("waiting for signals")?;
    rt::spawn(async move {
        again.await;
        eprintln!("infill: asked to end again: ending at once");
        std::process::exit(1);
    });
    notify(&[NotifyState::Stopping]);
    control.begin_to_end();
    control.leave_peers().await;
    control.close_exports().await;
    match &control.state {
        None => control.jobs().shut_down().await,
        Some(state) => {
            // Those that are about to begin again give their nodes back.
            rt::timeout(FAREWELL_TIME, state.no_job_under_way()).await;
            control.jobs().suspend().await;
            state.note_progress(control.jobs());
        }
    }
    let closed = control.blockdevs().close_all().await.context("closing the nodes");
    control.tick_maps();
    if closed.is_ok() {
        control.forget_stored_bitmaps();
    }
    control.tell_ended().await;
    if rt::timeout(FAREWELL_TIME, control.monitors().drained()).await.is_none() {
        tracing::warn!("a monitor did not take what was left for it");
    }
    closed
}
