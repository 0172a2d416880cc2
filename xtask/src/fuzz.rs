//! Fuzzing: builds the targets of `fuzz/` with coverage instrumentation, gives each its seeds, and runs it for a while.
//!
//! Stable Rust does it all; a run without a finding proves little by itself, which is why each target has an oracle.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// (name, longest input in bytes).
const TARGETS: &[(&str, u32)] =
    &[("qcow2", 400 << 10), ("qed", 400 << 10), ("nbd_server", 16 << 10), ("nbd_client", 16 << 10)];

/// What the coverage runtime wants of the compiler.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                     -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares \
                     -Clink-dead-code -Ccodegen-units=1";

/// The machine that is built for: named, so that build scripts are not instrumented.
const TRIPLE: &str = concat!(env!("XTASK_TARGET"));

/// Runs every target (or those in `only`) for `seconds`.
pub fn run(only: &[&str], seconds: u32) -> Result<()> {
    if let Some(unknown) = only.iter().find(|name| TARGETS.iter().all(|(known, _)| known != *name)) {
        let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
        bail!("no fuzz target {unknown}: there are {}", names.join(", "));
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = target_folder(&root);
    let built = Command::new(crate::cargo())
        .args(["build", "--release", "--target", TRIPLE, "--manifest-path"])
        .arg(root.join("fuzz/Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        .env("RUSTFLAGS", FLAGS)
        .status()
        .context("cannot run cargo")?;
    if !built.success() {
        bail!("the fuzz targets do not build");
    }
    for (name, longest) in TARGETS.iter().filter(|(name, _)| only.is_empty() || only.contains(name)) {
        let corpus = target.join("corpus").join(name);
        std::fs::create_dir_all(&corpus)?;
        seed(name, &corpus, &root)?;
        println!("== fuzz {name}: {seconds} s");
        let mut fuzzer = Command::new(target.join(TRIPLE).join("release").join(name));
        fuzzer.arg(&corpus).arg(format!("-max_total_time={seconds}")).arg(format!("-max_len={longest}"));
        fuzzer.args(["-timeout=20", "-rss_limit_mb=1024", "-print_final_stats=1", "-verbosity=0"]);
        fuzzer.arg(format!("-artifact_prefix={}/", target.display()));
        let dictionary = root.join("fuzz/dictionaries").join(format!("{name}.dict"));
        if dictionary.exists() {
            fuzzer.arg(format!("-dict={}", dictionary.display()));
        }
        // Its hundreds of lines matter to nobody but whoever looks into a finding.
        let log = target.join(format!("{name}.log"));
        let told = std::fs::File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        fuzzer.stdout(told.try_clone()?).stderr(told);
        let status = fuzzer.status().with_context(|| format!("cannot run the fuzz target {name}"))?;
        let told = String::from_utf8_lossy(&std::fs::read(&log)?).into_owned();
        if !status.success() {
            println!("{told}");
            bail!("fuzz target {name} has found something: the input lies in {}", target.display());
        }
        for line in told.lines().filter(|line| line.starts_with("stat::number_of_executed_units")) {
            println!("{line}");
        }
    }
    Ok(())
}

fn target_folder(root: &Path) -> PathBuf {
    let shared = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    shared.unwrap_or_else(|| root.join("target")).join("fuzz")
}

/// Without something that is nearly right to begin with, no fuzzer gets past a magic number.
fn seed(name: &str, corpus: &Path, root: &Path) -> Result<()> {
    let shipped = root.join("fuzz/seeds").join(name);
    if shipped.is_dir() {
        for entry in std::fs::read_dir(shipped)? {
            let path = entry?.path();
            if let Some(file) = path.file_name() {
                std::fs::copy(&path, corpus.join(file))?;
            }
        }
    }
    let images: &[(&str, &str)] = match name {
        "qcow2" => &[
            ("v3", "cluster_size=4k"),
            ("v2", "compat=0.10,cluster_size=4k"),
            ("extended", "extended_l2=on,cluster_size=16k"),
            ("narrow", "refcount_bits=1,cluster_size=512"),
            ("wide", "refcount_bits=64,cluster_size=4k"),
        ],
        "qed" => &[("small", "cluster_size=4k,table_size=2"), ("wide", "cluster_size=4k,table_size=4")],
        _ => &[],
    };
    for (file, options) in images {
        let path = corpus.join(format!("{file}.img"));
        let path = path.to_str().context("the target folder's name is not UTF-8")?;
        tool("qemu-img", &["create", "-q", "-f", name, "-o", options, path, "256k"])?;
        let commands =
            ["-c", "write -P 1 0 5k", "-c", "write -P 2 100k 20k", "-c", "write -z 40k 4k", "-c", "flush"];
        tool("qemu-io", &[&["-f", name][..], &commands, &[path]].concat())?;
    }
    Ok(())
}

fn tool(program: &str, args: &[&str]) -> Result<()> {
    let output = Command::new(program).args(args).output().with_context(|| {
        format!("cannot run {program}: `cargo xtask test --install` installs what the tests need")
    })?;
    if !output.status.success() {
        bail!("{program} {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
