//! `infill stream`: fills an overlay until it needs no backing file. At rest, the image is opened here; a running daemon
//! is asked as for every other job ([`ask`]).

use std::path::Path;
use std::pin::pin;
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use futures_util::future::{Either, select};
use infill_base::DiscardMode;
use infill_io::termination;
use infill_job::stream::{FILL_MIN_RATE, StreamBase, StreamOptions};
use infill_job::{JobOptions, Jobs, stream};
use infill_storage::rt;

use crate::args::StreamArgs;
use crate::blockdev::{Access, Blockdevs, Image, OpenPolicy};
use crate::commands::serve::{on_lost, swapped};
use crate::commands::{ask, image, open_unless, policy, run};
use crate::progress::follow;

/// Who the stream is, among the users of its node.
const STREAM_USER: &str = "the stream";

/// Streams an image at rest, or asks a daemon to.
pub fn main(args: StreamArgs) -> Result<ExitCode> {
    match args.node {
        Some(_) => ask::stream(args),
        None => run(move || at_rest(args)),
    }
}

async fn at_rest(args: StreamArgs) -> Result<ExitCode> {
    let mut terminated = Box::pin(termination().context("waiting for signals")?);
    let Some(name) = &args.image else { bail!("which image is to be filled? Name one") };
    let blockdevs = Blockdevs::new(OpenPolicy { on_lost: on_lost(args.on_lost), ..policy(&args.open) });
    let image = Image { read_only: false, discard: DiscardMode::Unmap, ..image(name, &args.open) };
    let top = open_unless(&blockdevs, &image, &mut terminated).await?;
    let jobs = Jobs::new();
    let streamed = async {
        let node = blockdevs.claim(&top, STREAM_USER, Access::Writer)?;
        let options = JobOptions { speed: args.speed.unwrap_or(0), ..JobOptions::new("stream") };
        let (base, backing_file) = base_of(&blockdevs, &top, args.base.as_deref())?;
        let stream = StreamOptions {
            base,
            backing_file,
            min_rate: args.min_rate.unwrap_or(FILL_MIN_RATE),
            finish_by: args.finish_in.map(|time| rt::now() + time),
            on_swap: Some(swapped(&blockdevs, &top)),
            ..StreamOptions::new(node)
        };
        let job = stream::start(&jobs, options, stream)?;
        let followed = pin!(follow(&job, args.quiet));
        match select(followed, &mut terminated).await {
            Either::Left((outcome, _)) => outcome.map_err(|why| anyhow!("{name}: {why}")),
            Either::Right(_) => {
                Err(anyhow!("{name}: interrupted; started again, it goes on from where it was"))
            }
        }
    }
    .await;
    jobs.shut_down().await;
    blockdevs.release(&top, STREAM_USER);
    let closed = blockdevs.close_all().await.context("closing the image");
    streamed?;
    closed?;
    if !args.quiet {
        eprintln!("infill: {name} is filled, and all of it is on stable storage");
    }
    Ok(ExitCode::SUCCESS)
}

/// The layer that is to stay, by the name that a header gives it or the whole one, and what the header above is to call
/// it then.
fn base_of(blockdevs: &Blockdevs, top: &str, name: Option<&str>) -> Result<(StreamBase, Option<String>)> {
    let Some(name) = name else { return Ok((StreamBase::None, None)) };
    let layers = blockdevs.chain(top);
    for (above, layer) in layers.iter().zip(layers.iter().skip(1)) {
        let header = blockdevs.get(above)?.info().backing.map(|backing| backing.filename);
        let node = blockdevs.get(layer)?;
        let filename = node.info().filename;
        if header.as_deref() == Some(name) || filename == name {
            let path = |name: &str| blockdevs.bottom_path(name).map(std::path::absolute).transpose();
            let called = name_in_header(&filename, path(top)?.as_deref(), path(layer)?.as_deref());
            return Ok((StreamBase::Node(node), Some(called)));
        }
    }
    bail!("'{name}' is no layer below the top; `infill info --backing-chain` lists them")
}

/// What the header of `top` calls a backing file at `path`: relative where they lie in one directory, else whole.
fn name_in_header(filename: &str, top: Option<&Path>, path: Option<&Path>) -> String {
    let Some(path) = path else { return filename.to_owned() };
    match path.file_name() {
        Some(name) if top.and_then(Path::parent) == path.parent() => name.to_string_lossy().into_owned(),
        _ => path.to_string_lossy().into_owned(),
    }
}
