//! Side-by-side measurements: every figure is a ratio to the competitor's in the same run on the same machine.
//!
//! `cargo run --release --manifest-path benches-compare/Cargo.toml -- [--rows 1,2,…] [--pairs N] [--markdown FILE]`, as
//! root for row 6 (it makes network namespaces), for the rows on a storage with slow syncs (it mounts one), and to have
//! syncs counted. The product is built first: `cargo build --release`. `README.md` says what the rows and columns are.
#![forbid(unsafe_code)]

mod peers;
mod rows;
mod slow;
mod syncs;
mod table;

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use peers::{Programs, run};
use syncs::Syncs;
use table::Table;

const USAGE: &str = "usage: infill-benches-compare [--rows 1,2,3,3s,4,4s,5,6,6b,8,9,11,qed,qeds,mirror,disks,qmp] [--pairs N] \
                     [--part N] [--infill PROGRAM] [--dir FOLDER] [--markdown FILE]";

/// What the user asked for.
pub struct Setup {
    pub programs: Programs,
    /// Where images are made.
    pub dir: PathBuf,
    /// How often each pair is measured; the median counts.
    pub pairs: usize,
    /// Rows that can be smaller are, so many times: to try them out.
    pub part: u64,
    pub syncs: Syncs,
}

fn main() -> Result<()> {
    slow::enter_namespaces();
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut infill = root.join("target/release/infill");
    let (mut rows, mut pairs, mut part, mut dir, mut markdown) = (None, 3, 1, std::env::temp_dir(), None);
    let mut args = std::env::args().skip(1);
    while let Some(option) = args.next() {
        let value = args.next().context(USAGE)?;
        match option.as_str() {
            "--rows" => rows = Some(value.split(',').map(str::to_owned).collect::<Vec<_>>()),
            "--pairs" => pairs = value.parse().context("--pairs takes a number")?,
            "--part" => part = value.parse().context("--part takes a number")?,
            "--infill" => infill = value.into(),
            "--dir" => dir = value.into(),
            "--markdown" => markdown = Some(PathBuf::from(value)),
            _ => bail!("{USAGE}"),
        }
    }
    ensure!(pairs > 0, "--pairs must be at least 1");
    ensure!((1..=100).contains(&part), "--part must be from 1 to 100");
    ensure!(infill.exists(), "{} is not there: run `cargo build --release` first", infill.display());
    let temporary = tempfile::Builder::new().prefix("infill-bench").tempdir_in(dir)?;
    let programs = Programs { infill };
    let dir = temporary.path().to_owned();
    let setup = Setup { programs, syncs: Syncs::new(&dir), dir, pairs, part };
    let mut table = Table::default();
    for (name, row) in rows::ALL {
        if rows.as_ref().is_none_or(|wanted| wanted.iter().any(|other| other == name)) {
            eprintln!("== row {name}");
            if let Err(error) = row(&setup, &mut table) {
                eprintln!("row {name}: {error:#}");
                table.failed(name, &error);
            }
        }
    }
    let text = format!("{}\n{table}", versions(&setup));
    println!("{text}");
    if let Some(path) = markdown {
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The line that says what was compared.
fn versions(setup: &Setup) -> String {
    let first = |program: &str, args: &[&str]| {
        let text = run(program, args).unwrap_or_else(|_| "not there".into());
        text.lines().next().unwrap_or_default().to_owned()
    };
    let infill = first(&setup.programs.infill.display().to_string(), &["--version"]);
    let versions = [
        infill,
        first("qemu-storage-daemon", &["--version"]),
        first("nbdkit", &["--version"]),
        first("nbdcopy", &["--version"]),
        first("fio", &["--version"]),
        format!("Linux {}", first("uname", &["-r"])),
        format!("{} processors", first("nproc", &[])),
    ];
    let note = "Syncs are fsyncs, fdatasyncs and synchronous writes of the image files, whoever asks for them: for each 1,000 \
                requests, or for each GiB where a stream is what is measured.";
    format!("Versions: {}. Median of {} pairs.\n\n{note}\n", versions.join(", "), setup.pairs)
}
