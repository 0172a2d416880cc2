//! `infill map`: which layer of a chain holds what, and where in its file.

use std::fmt::Write as _;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use infill_base::{Ctx, ExtentKind};
use infill_node::NodeHandle;
use infill_node::generic::{MappedExtent, chain_map};

use crate::args::{MapArgs, Output};
use crate::blockdev::{Blockdevs, Image};
use crate::commands::{image, policy, run};
use crate::out::print;

/// How much of a disk is asked for in one go.
const STRIDE_BYTES: u64 = 64 << 30;

/// Text is printed whenever this much has gathered.
const PRINT_BYTES: usize = 64 << 10;

/// One run, as it is printed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    start: u64,
    len: u64,
    depth: usize,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    offset: Option<u64>,
}

impl Run {
    /// Whether `next` only goes on with it.
    fn goes_on(&self, next: &Run) -> bool {
        let offset = match (self.offset, next.offset) {
            (None, None) => true,
            (Some(mine), Some(theirs)) => mine.checked_add(self.len) == Some(theirs),
            _ => false,
        };
        let kind = |run: &Run| (run.depth, run.present, run.zero, run.data, run.compressed);
        offset && kind(self) == kind(next)
    }
}

/// Prints the map of an image's chain.
pub fn main(args: MapArgs) -> Result<ExitCode> {
    run(move || async move {
        let blockdevs = Blockdevs::new(policy(&args.image));
        let image = Image { force_share: args.force_share, ..image(&args.filename, &args.image) };
        let top = blockdevs.add_image(&image).await?;
        let layers =
            blockdevs.chain(&top).iter().map(|name| blockdevs.get(name)).collect::<Result<Vec<_>>>()?;
        let len = layers.first().map_or(0, NodeHandle::len);
        if args.start_offset > len {
            bail!(
                "--start-offset {} lies behind the end of the disk, which has {len} bytes",
                args.start_offset
            );
        }
        let end = args.max_length.map_or(len, |max| args.start_offset.saturating_add(max).min(len));
        let mut printer = Printer::new(args.output, &layers);
        walk(&layers, args.start_offset, end, &mut printer).await?;
        printer.finish()?;
        blockdevs.close_all().await?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Gives every run of `[at, end)` to the printer, joined where they go on.
async fn walk(layers: &[NodeHandle], mut at: u64, end: u64, printer: &mut Printer) -> Result<()> {
    let Some(top) = layers.first() else { return Ok(()) };
    let mut last: Option<Run> = None;
    while at < end {
        for mapped in chain_map(top, &Ctx::GUEST, at, (end - at).min(STRIDE_BYTES)).await? {
            at = mapped.extent.end();
            let run = as_run(layers, &mapped);
            match &mut last {
                Some(last) if last.goes_on(&run) => last.len += run.len,
                _ => {
                    if let Some(done) = last.replace(run) {
                        printer.add(&done)?;
                    }
                }
            }
        }
    }
    last.map_or(Ok(()), |done| printer.add(&done))
}

fn as_run(layers: &[NodeHandle], mapped: &MappedExtent) -> Run {
    let extent = &mapped.extent;
    let layer = layers.get(mapped.depth);
    let behind_its_end = layer.is_none_or(|layer| extent.start >= layer.len());
    // Behind the end of a short backing file it is the layer above that reads as zeroes.
    let depth = if behind_its_end { mapped.depth.saturating_sub(1) } else { mapped.depth };
    let is_plain =
        layer.is_some_and(|layer| matches!(layer.info().driver, "raw" | "file" | "host_device" | "nbd"));
    Run {
        start: extent.start,
        len: extent.len,
        depth,
        present: mapped.present,
        zero: extent.kind != ExtentKind::Data,
        data: extent.kind == ExtentKind::Data,
        compressed: extent.compressed,
        offset: extent.host.or((is_plain && mapped.present).then_some(extent.start)),
    }
}

struct Printer {
    output: Output,
    /// File names of the layers, for people.
    files: Vec<String>,
    text: String,
    any: bool,
}

impl Printer {
    fn new(output: Output, layers: &[NodeHandle]) -> Printer {
        let text = match output {
            Output::Human => format!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to"),
            Output::Json => "[".into(),
        };
        let files = layers.iter().map(|layer| layer.info().filename).collect();
        Printer { output, files, text, any: false }
    }

    fn add(&mut self, run: &Run) -> Result<()> {
        match self.output {
            Output::Human => self.add_line(run)?,
            Output::Json => {
                let Run { start, len, depth, present, zero, data, compressed, offset } = run;
                let comma = if self.any { ",\n" } else { "" };
                write!(
                    self.text,
                    "{comma}{{ \"start\": {start}, \"length\": {len}, \"depth\": {depth}, \"present\": {present}, \
                     \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}"
                )?;
                if let Some(offset) = offset {
                    write!(self.text, ", \"offset\": {offset}")?;
                }
                self.text.push('}');
            }
        }
        self.any = true;
        if self.text.len() >= PRINT_BYTES {
            print(&std::mem::take(&mut self.text))?;
        }
        Ok(())
    }

    /// Only data is worth a line, and only where a program could read it from the file.
    fn add_line(&mut self, run: &Run) -> Result<()> {
        if !run.data {
            return Ok(());
        }
        let offset = run.offset.with_context(|| {
            format!(
                "the data at byte {} is compressed, so it lies nowhere as it is read; --output=json tells of it",
                run.start
            )
        })?;
        let hex = |value: u64| if value == 0 { "0".into() } else { format!("{value:#x}") };
        let file = self.files.get(run.depth).map_or("", String::as_str);
        writeln!(self.text, "{:<16}{:<16}{:<16}{file}", hex(run.start), hex(run.len), hex(offset))?;
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        if self.output == Output::Json {
            self.text.push_str("]\n");
        }
        print(&self.text)
    }
}
