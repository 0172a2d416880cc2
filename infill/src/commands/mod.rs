//! One module for each subcommand, and what they share.

pub mod check;
pub mod create;
pub mod info;
pub mod map;
pub mod serve;
pub mod stream;

use std::future::Future;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use infill_io::Reactors;
use infill_nbd::OnLost;
use infill_qmp::{BlockdevOptions, Driver};

use crate::args::{Format, ImageArgs};
use crate::blockdev::{FormatKind, Image, OpenPolicy};

/// Runs a command's future on a reactor of its own.
pub fn run<F>(make: impl FnOnce() -> F + Send + 'static) -> Result<ExitCode>
where
    F: Future<Output = Result<ExitCode>> + 'static,
{
    let reactors = Reactors::start(1).context("starting a reactor")?;
    reactors.block_on(make)
}

/// The format that an option says.
pub fn format_kind(format: Format) -> FormatKind {
    match format {
        Format::Raw => FormatKind::Raw,
        Format::Qcow2 => FormatKind::Qcow2,
        Format::Qed => FormatKind::Qed,
    }
}

/// The policy that options say. Who looks only once does not wait for a source that goes away meanwhile.
pub fn policy(args: &ImageArgs) -> OpenPolicy {
    OpenPolicy {
        untrusted: args.untrusted,
        backing_format: args.backing_format.map(format_kind),
        on_lost: OnLost::Fail,
    }
}

/// The image that options name, read-only.
pub fn image(name: &str, args: &ImageArgs) -> Image {
    Image { format: args.format.map(format_kind), ..Image::read_only(name) }
}

/// The file that a description names, if it is one.
pub fn file_path(options: &BlockdevOptions) -> Option<PathBuf> {
    match &options.driver {
        Driver::File { filename, .. } => Some(PathBuf::from(filename)),
        _ => None,
    }
}
