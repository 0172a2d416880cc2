//! `infill serve`: one disk in the foreground, over NBD.
//!
//! It ends when its last client has gone, as qemu-nbd does (`--persistent` keeps it, a stream keeps it until it is
//! done), or when a signal asks it to. Order of the end: no new connections; what clients have in flight is answered;
//! the stream is cancelled (what it has filled stays); images are synced and closed, the top first.

use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use futures_util::future::{Either, select};
use infill_base::DiscardMode;
use infill_io::{Address, Listener, Reactor, Reactors, termination};
use infill_job::stream::{FILL_MIN_RATE, StreamOptions};
use infill_job::{IoStatus, Job, JobOptions, Jobs, OnError, stream};
use infill_nbd::{Export, Exports, OnLost, Server, ServerLimits, UriTls};
use infill_node::{COPY_ON_READ_BYTES_MAX, CopyOnRead, NodeHandle};
use infill_storage::rt;

use crate::args::{DiscardArg, OnLostArg, ServeArgs, Switch};
use crate::blockdev::{Access, Blockdevs, Image, OpenPolicy, uri_of};
use crate::commands::{image, open_unless, policy};
use crate::listen::Listening;
use crate::out::print;
use crate::progress::follow;
use crate::tls::Credentials;

/// Most threads that are started where the caller does not say how many.
const THREADS_MAX: usize = 8;
/// How often a stream that ran out of space looks whether there is some.
const TRY_AGAIN: Duration = Duration::from_secs(5);
/// Who the export is, among the users of its node.
const EXPORT_USER: &str = "the export";

/// Serves a disk until its last client has gone or a signal asks it to end.
pub fn main(args: ServeArgs) -> Result<ExitCode> {
    let threads = args.threads.map_or_else(default_threads, usize::from);
    let reactors = Reactors::start(threads).context("starting the reactors")?;
    let all = reactors.all();
    reactors.block_on(move || serve(args, all))
}

fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX)
}

/// What happens while an NBD source is away, as an option says it.
pub fn on_lost(arg: OnLostArg) -> OnLost {
    match arg {
        OnLostArg::Hold => OnLost::Hold { limit: None },
        OnLostArg::Fail => OnLost::Fail,
    }
}

async fn serve(args: ServeArgs, reactors: Vec<Reactor>) -> Result<ExitCode> {
    // From here on a signal ends it in order.
    let mut terminated = Box::pin(termination().context("waiting for signals")?);
    let policy = OpenPolicy { on_lost: on_lost(args.on_lost), ..policy(&args.open) };
    let blockdevs = Blockdevs::new(policy);
    let discard = match args.discard {
        DiscardArg::Ignore => DiscardMode::Ignore,
        DiscardArg::Unmap => DiscardMode::Unmap,
    };
    let image = Image { read_only: args.read_only, discard, ..image(&args.image, &args.open) };
    let top = open_unless(&blockdevs, &image, &mut terminated).await?;
    let result = serve_node(&args, &blockdevs, &top, reactors, terminated).await;
    blockdevs.release(&top, EXPORT_USER);
    let closed = blockdevs.close_all().await.context("closing the image");
    result?;
    closed?;
    Ok(ExitCode::SUCCESS)
}

async fn serve_node(
    args: &ServeArgs,
    blockdevs: &Blockdevs,
    top: &str,
    reactors: Vec<Reactor>,
    mut terminated: Pin<Box<dyn Future<Output = ()>>>,
) -> Result<()> {
    let access = if args.read_only { Access::Reader } else { Access::Writer };
    let node = blockdevs.claim(top, EXPORT_USER, access)?;
    if args.copy_on_read
        && let Some(slot) = node.backing()
    {
        slot.set_copy_on_read(Some(CopyOnRead::new(&node, COPY_ON_READ_BYTES_MAX)));
    }
    let exports = Exports::new();
    exports.add(Export {
        description: args.description.clone(),
        writable: !args.read_only,
        allocation_depth: true,
        ..Export::new(args.export_name.clone(), node.clone())
    })?;
    let verify_peer = args.tls_verify_peer == Switch::On;
    let tls = match &args.tls_creds {
        Some(dir) => Some(Credentials::server(dir, verify_peer, true, None)?.server_tls()?),
        None => None,
    };
    let uri_tls = tls.is_some().then(UriTls::default);
    let mut limits = ServerLimits::default();
    if args.shared > 0 {
        limits.connections_max = args.shared as usize;
    }
    let server = Server::over(exports.clone(), limits, tls);
    let address = match &args.socket {
        Some(path) => Address::Unix(path.clone()),
        None => Address::Tcp { host: args.bind.clone(), port: args.port },
    };
    let listener = Listener::bind(&address).with_context(|| format!("listening at {address}"))?;
    let listening = Listening::start(listener, server.clone(), reactors, limits.connections_max);
    let jobs = Jobs::new();
    let streaming = if args.stream { Some(start_stream(args, &jobs, blockdevs, top, &node)?) } else { None };
    if let Some(path) = &args.pid_file {
        let written = std::fs::write(path, format!("{}\n", std::process::id()));
        written.with_context(|| format!("writing the process id to {}", path.display()))?;
    }
    print(&format!("{}\n", uri_of(listening.address(), &args.export_name, uri_tls)))?;

    let ended = {
        let mut work = pin!(until_done(args, &listening, &server, streaming.as_ref()));
        match select(work.as_mut(), &mut terminated).await {
            Either::Left((result, _)) => result,
            Either::Right(((), _)) => Ok(()),
        }
    };
    shut_down_watched(&listening, &exports, &jobs).await?;
    ended
}

/// Ends everything in order. A second signal, while that waits for a source that is away, ends the process at once:
/// what is on the disk then is what a crash leaves, and clients were told nothing else.
async fn shut_down_watched(listening: &Listening, exports: &Exports, jobs: &Jobs) -> Result<()> {
    let again = termination().context("waiting for signals")?;
    rt::spawn(async move {
        again.await;
        eprintln!("infill: asked to end again: ending at once");
        std::process::exit(1);
    });
    listening.stop();
    for removal in exports.remove_all() {
        removal.gone().await;
    }
    listening.drained().await;
    jobs.shut_down().await;
    Ok(())
}

/// Completes when nothing is left to do: the stream is over, and the last client has gone.
async fn until_done(
    args: &ServeArgs,
    listening: &Listening,
    server: &Server,
    streaming: Option<&Job>,
) -> Result<()> {
    let stream = async {
        let Some(job) = streaming else { return Ok(()) };
        let outcome = match select(pin!(follow(job, false)), pin!(try_again(job))).await {
            Either::Left((outcome, _)) => outcome,
            Either::Right((never, _)) => match never {},
        };
        match &outcome {
            Ok(()) => eprintln!("infill: the stream is done: {} needs no backing file any more", args.image),
            Err(why) => eprintln!("infill: the stream has stopped: {why}; clients are still served"),
        }
        outcome
    };
    let clients = async {
        loop {
            let changed = listening.changed();
            if !args.persistent && server.chosen() > 0 && listening.connections() == 0 {
                return;
            }
            changed.await;
        }
    };
    let (outcome, ()) = futures_util::future::join(stream, clients).await;
    outcome.map_err(|why| anyhow!("the stream has stopped: {why}"))
}

/// Has a stream that ran out of space look again now and then whether there is some.
async fn try_again(job: &Job) -> Infallible {
    loop {
        rt::sleep(TRY_AGAIN).await;
        if job.block_info().is_some_and(|info| info.io_status == IoStatus::NoSpace) {
            // It may be over just now; then there is nothing to resume.
            let _over = job.resume();
        }
    }
}

fn start_stream(
    args: &ServeArgs,
    jobs: &Jobs,
    blockdevs: &Blockdevs,
    top: &str,
    node: &NodeHandle,
) -> Result<Job> {
    let options = JobOptions { speed: args.speed.unwrap_or(0), ..JobOptions::new("stream") };
    let on_swap = swapped(blockdevs, top);
    let stream = StreamOptions {
        min_rate: args.min_rate.unwrap_or(FILL_MIN_RATE),
        finish_by: args.finish_in.map(|time| rt::now() + time),
        on_error: OnError::Enospc,
        on_swap: Some(on_swap),
        ..StreamOptions::new(node.clone())
    };
    Ok(stream::start(jobs, options, stream)?)
}

/// Has the graph follow a stream's end.
pub fn swapped(blockdevs: &Blockdevs, top: &str) -> stream::OnSwap {
    let (blockdevs, top) = (blockdevs.clone(), top.to_owned());
    Box::new(move |_| {
        Box::pin(async move {
            if let Err(error) = blockdevs.backing_changed(&top).await {
                tracing::warn!("after the stream: {error:#}");
            }
        })
    })
}
