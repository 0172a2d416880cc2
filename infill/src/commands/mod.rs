//! One module for each subcommand, and what they share.

pub mod ask;
pub mod check;
pub mod create;
pub mod info;
pub mod map;
pub mod migrate;
pub mod serve;
pub mod snapshot;
pub mod stream;
pub mod top;

use std::future::Future;
use std::path::PathBuf;
use std::pin::pin;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use futures_util::future::{Either, select};
use infill_io::Reactors;
use infill_nbd::OnLost;
use infill_qmp::{BlockdevOptions, Driver};

use crate::args::ImageArgs;
use crate::blockdev::{Blockdevs, Image, OpenPolicy};

/// Runs a command's future on a reactor of its own.
pub fn run<F>(make: impl FnOnce() -> F + Send + 'static) -> Result<ExitCode>
where
    F: Future<Output = Result<ExitCode>> + 'static,
{
    let reactors = Reactors::start(1).context("starting a reactor")?;
    reactors.block_on(make)
}

/// The policy that options say. Who looks only once does not wait for a source that goes away meanwhile.
pub fn policy(args: &ImageArgs) -> OpenPolicy {
    OpenPolicy {
        untrusted: args.untrusted,
        backing_format: args.backing_format,
        on_lost: OnLost::Fail,
        journal: None,
    }
}

/// The image that options name, read-only.
pub fn image(name: &str, args: &ImageArgs) -> Image {
    Image { format: args.format, ..Image::read_only(name) }
}

/// The file that a description names, if it is one.
pub fn file_path(options: &BlockdevOptions) -> Option<PathBuf> {
    match &options.driver {
        Driver::File { filename, .. } => Some(PathBuf::from(filename)),
        _ => None,
    }
}

/// Opens an image, unless the process is asked to end before it is open: a source may take its time.
pub async fn open_unless(
    blockdevs: &Blockdevs,
    image: &Image,
    terminated: impl Future<Output = ()> + Unpin,
) -> Result<String> {
    match select(pin!(blockdevs.add_image(image)), terminated).await {
        Either::Left((opened, _)) => opened,
        Either::Right(_) => bail!("{}: interrupted while it was being opened", image.name),
    }
}
