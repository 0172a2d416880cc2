//! Developer tasks: `cargo xtask test [--install] [--only STEP]…` and `cargo xtask fuzz [TARGET]… [--seconds N]`.
//!
//! `test` is everything that has to pass before a change lands: tools, format, lints, documentation, licences, every
//! test (unit, property, crash, conformance, interop), and a short run of every fuzz target. It ends with one line,
//! `N passed, N failed`.
#![forbid(unsafe_code)]

mod fuzz;
mod tools;

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

const USAGE: &str = "usage: cargo xtask test [--install] [--only tools|fmt|clippy|doc|deny|tests|shuttle|fuzz]...\n\
                     \x20      cargo xtask fuzz [TARGET]... [--seconds N]";

/// How long each fuzz target runs in a test run, in seconds.
const FUZZ_SECONDS: u32 = 10;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<bool> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    std::env::set_current_dir(root).with_context(|| format!("cannot work in {root}"))?;
    match args.split_first().map(|(verb, rest)| (verb.as_str(), rest)) {
        Some(("test", options)) => test(options),
        Some(("fuzz", options)) => fuzz_targets(options).map(|()| true),
        _ => bail!("{USAGE}"),
    }
}

fn fuzz_targets(options: &[String]) -> Result<()> {
    let (mut seconds, mut only) = (FUZZ_SECONDS, Vec::new());
    let mut options = options.iter();
    while let Some(option) = options.next() {
        match option.as_str() {
            "--seconds" => {
                seconds = options.next().context(USAGE)?.parse().context("--seconds takes a number")?
            }
            target => only.push(target),
        }
    }
    fuzz::run(&only, seconds)
}

fn test(options: &[String]) -> Result<bool> {
    let (mut install, mut only) = (false, Vec::new());
    let mut options = options.iter();
    while let Some(option) = options.next() {
        match option.as_str() {
            "--install" => install = true,
            "--only" => only.push(options.next().context(USAGE)?.as_str()),
            other => bail!("unknown option {other}; {USAGE}"),
        }
    }
    let wanted = |step: &str| only.is_empty() || only.contains(&step);
    let mut score = Score::default();
    if wanted("tools") {
        tools::require(install)?;
    }
    if wanted("fmt") {
        score.step("format", &["fmt", "--all", "--check"], &[])?;
    }
    if wanted("clippy") {
        score.step(
            "lints",
            &["clippy", "--workspace", "--all-targets", "--profile", "ci", "--", "-D", "warnings"],
            &[],
        )?;
    }
    if wanted("clippy") {
        // Apart from the product, but not apart from its rules.
        let bench = ["clippy", "--manifest-path", "benches-compare/Cargo.toml", "--all-targets"];
        let deny = ["--", "-D", "warnings"];
        score.step("lints of the comparison", &[&bench[..], &deny].concat(), &[])?;
    }
    if wanted("doc") {
        let docs = ["doc", "--workspace", "--no-deps", "--profile", "ci"];
        score.step("documentation", &docs, &[("RUSTDOCFLAGS", "-D warnings")])?;
    }
    if wanted("deny") && tools::is_there("cargo-deny") {
        score.step("licences", &["deny", "--offline", "check", "licenses", "bans", "sources"], &[])?;
    }
    if wanted("tests") {
        score.tests(&["test", "--workspace", "--profile", "ci", "--no-fail-fast"])?;
    }
    if wanted("shuttle") {
        // Threads under a scheduler that tries many orders: needs another build of the lock module.
        let node = ["test", "-p", "infill-node", "--features", "shuttle", "--test", "interleavings"];
        score.tests(&[&node[..], &["--profile", "ci"]].concat())?;
    }
    if wanted("fuzz") {
        score.count("fuzz", fuzz::run(&[], FUZZ_SECONDS));
    }
    score.close();
    Ok(score.failed == 0)
}

/// How many checks and tests passed and failed.
#[derive(Default)]
struct Score {
    passed: u64,
    failed: u64,
    /// What is said again at the end: thousands of lines later nobody finds the one that failed.
    again: Vec<String>,
}

impl Score {
    /// Runs one cargo command that passes or fails as a whole.
    fn step(&mut self, name: &str, args: &[&str], env: &[(&str, &str)]) -> Result<()> {
        println!("== {name}: cargo {}", args.join(" "));
        let status = Command::new(cargo())
            .args(args)
            .envs(env.iter().copied())
            .status()
            .context("cannot run cargo")?;
        if status.success() {
            self.passed += 1;
        } else {
            self.fail(format!("== {name}: FAILED"));
        }
        Ok(())
    }

    fn fail(&mut self, what: String) {
        println!("{what}");
        self.again.push(what);
        self.failed += 1;
    }

    /// The failures once more, and the line that everything ends with.
    fn close(&self) {
        for line in &self.again {
            println!("{line}");
        }
        println!("{} passed, {} failed", self.passed, self.failed);
    }

    /// Counts a check that is not a cargo command.
    fn count(&mut self, name: &str, outcome: Result<()>) {
        match outcome {
            Ok(()) => self.passed += 1,
            Err(error) => self.fail(format!("== {name}: FAILED: {error:#}")),
        }
    }

    /// Runs tests and adds up what the test programs say.
    fn tests(&mut self, args: &[&str]) -> Result<()> {
        println!("== tests: cargo {}", args.join(" "));
        let mut child =
            Command::new(cargo()).args(args).stdout(Stdio::piped()).spawn().context("cannot run cargo")?;
        let output = child.stdout.take().context("cargo's output is not piped")?;
        let (mut passed, mut failed, mut in_failures) = (0, 0, false);
        for line in BufReader::new(output).lines() {
            let line = line?;
            println!("{line}");
            // From its list of failures to its closing line a test program tells what went wrong.
            in_failures = (in_failures || line == "failures:") && !line.starts_with("test result: ");
            if in_failures {
                self.again.push(line.clone());
            }
            if let Some((good, bad)) = counts(&line) {
                passed += good;
                failed += bad;
            }
        }
        if !child.wait()?.success() && failed == 0 {
            self.again.push(format!("== a build broke, or a test program died: cargo {}", args.join(" ")));
            failed = 1;
        }
        self.passed += passed;
        self.failed += failed;
        Ok(())
    }
}

/// The counts of libtest's closing line.
fn counts(line: &str) -> Option<(u64, u64)> {
    let rest = line.strip_prefix("test result: ")?;
    let number_before = |word: &str| -> Option<u64> {
        let at = rest.find(word)?;
        rest[..at].trim_end().rsplit(' ').next()?.parse().ok()
    };
    Some((number_before("passed")?, number_before("failed;")?))
}

fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".into())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// All Rust sources under `dir`, joined.
    fn sources(dir: &Path, into: &mut String) {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() && path.file_name().is_none_or(|name| name != "target") {
                sources(&path, into);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                into.push_str(&std::fs::read_to_string(path).unwrap());
            }
        }
    }

    #[test]
    fn every_promise_names_a_test_that_there_is() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut all = String::new();
        sources(&root.join("crates"), &mut all);
        sources(&root.join("infill"), &mut all);
        let promises = std::fs::read_to_string(root.join("docs/semantics.md")).unwrap();
        let mut rows = 0;
        for line in promises.lines().filter(|line| line.starts_with("| ") && line.contains('`')) {
            let (_, names) = line.trim_end_matches(" |").rsplit_once(" | ").unwrap();
            for name in names.split(", ").map(|name| name.trim_matches('`')) {
                assert!(all.contains(&format!("fn {name}(")), "no test is called {name}: {line}");
            }
            rows += 1;
        }
        assert!(rows > 20, "the promises were not found");
    }

    #[test]
    fn counts_are_read_from_the_closing_line() {
        let line = "test result: FAILED. 12 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s";
        assert_eq!(super::counts(line), Some((12, 3)));
        assert_eq!(super::counts("running 3 tests"), None);
    }
}
