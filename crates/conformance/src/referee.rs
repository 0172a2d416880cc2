//! `qemu-img` as the referee of a sample of states: checks the image, and compares what it shows.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use crate::crash::Sample;
use crate::{Format, Violation};

/// What to install where `qemu-img` is missing.
const INSTALL: &str = "qemu-img is needed to judge images: apt-get install qemu-utils";

/// `qemu-img check` says by its exit code: leaks, and nothing worse.
const LEAKS: i32 = 3;

fn qemu_img(directory: &Path, arguments: &[&str]) -> Output {
    Command::new("qemu-img")
        .args(arguments)
        .current_dir(directory)
        .output()
        .unwrap_or_else(|error| panic!("{INSTALL} ({error})"))
}

fn words(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&text).chars().take(600).collect()
}

/// Judges one state: no corruption (leaks are allowed), and the content that our driver has shown. An image that says
/// that it wants a repair is judged after that repair, on a copy.
pub fn judge(sample: &Sample) -> Result<(), Violation> {
    let directory = tempfile::tempdir().map_err(|error| crate::format::failed("a directory", &error))?;
    let path = directory.path();
    let put = |name: &str, bytes: &[u8]| {
        fs::write(path.join(name), bytes).map_err(|error| crate::format::failed("writing a state", &error))
    };
    put("image", &sample.media.to_bytes())?;
    put("content", &sample.content)?;
    if let Some(backing) = &sample.backing {
        put(crate::crash::BACKING_NAME, backing)?;
    }
    let format = sample.format.qemu_name();
    if sample.format.is_marked_dirty(&sample.media) {
        qemu_img(path, &["check", "-q", "-r", "all", "-f", format, "image"]);
    }
    if sample.format != Format::Raw {
        let check = qemu_img(path, &["check", "-f", format, "image"]);
        if !matches!(check.status.code(), Some(0 | LEAKS)) {
            let what = format!("{}: qemu-img check says: {}", sample.how, words(&check));
            return Err(Violation::Broken(what));
        }
    }
    let compare = qemu_img(path, &["compare", "-f", format, "-F", "raw", "image", "content"]);
    if compare.status.code() != Some(0) {
        let what = format!("{}: qemu-img compare says: {}", sample.how, words(&compare));
        return Err(Violation::Broken(what));
    }
    Ok(())
}
