//! `infill info`.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::args::{InfoArgs, Output};
use crate::blockdev::{Blockdevs, Image, image_info, info_text};
use crate::commands::{image, policy, run};
use crate::out::print;

/// Tells what an image is, and with `--backing-chain` what its backing files are.
pub fn main(args: InfoArgs) -> Result<ExitCode> {
    run(move || async move {
        let blockdevs = Blockdevs::new(policy(&args.image));
        // Without the chain a single image is told of even where its backing file is missing.
        let image = Image {
            alone: !args.backing_chain,
            force_share: args.force_share,
            // It is told of, and says that it moved.
            fenced: true,
            ..image(&args.filename, &args.image)
        };
        let top = blockdevs.add_image(&image).await?;
        let layers = blockdevs.chain(&top);
        match args.output {
            Output::Human => {
                let texts =
                    layers.iter().map(|layer| info_text(&blockdevs, layer)).collect::<Result<Vec<_>>>()?;
                print(&texts.join("\n"))?;
            }
            Output::Json => {
                let mut infos = layers
                    .iter()
                    .map(|layer| image_info(&blockdevs, layer, true))
                    .collect::<Result<Vec<_>>>()?;
                let value = match (args.backing_chain, infos.pop()) {
                    (false, Some(info)) => info,
                    (_, last) => Value::from(infos.into_iter().chain(last).collect::<Vec<_>>()),
                };
                print(&json_text(&value)?)?;
            }
        }
        blockdevs.close_all().await?;
        Ok(ExitCode::SUCCESS)
    })
}

/// JSON as qemu-img prints it: four spaces a level.
pub fn json_text(value: &Value) -> Result<String> {
    let mut out = Vec::new();
    let format = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, format);
    serde::Serialize::serialize(value, &mut serializer).context("writing JSON")?;
    out.push(b'\n');
    match String::from_utf8(out) {
        Ok(text) => Ok(text),
        Err(_) => bail!("JSON that is not UTF-8"),
    }
}
