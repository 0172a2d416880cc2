//! How often anybody made a file stable: counted in the file system, the same for every program.
//!
//! A system call tracer does not see what goes through io_uring, and sees only the process that it follows. The kernel's
//! trace point at the entry of ext4's sync sees every fsync, fdatasync and synchronous write of a file, whoever asks and
//! by whatever way. A trace instance of our own counts those of files in one folder; it goes with its guard. Nothing
//! is read while something is measured.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::peers::run;

const TRACEFS: &str = "/sys/kernel/tracing";
const EVENT: &str = "events/ext4/ext4_sync_file_enter";

/// The counter, where the kernel lets us.
pub struct Syncs(Option<Instance>);

/// A trace instance that goes with this.
struct Instance(PathBuf);

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

impl Syncs {
    /// The counter, named after the run's folder; where there is none, it says why.
    pub fn new(dir: &Path) -> Syncs {
        match instance(dir) {
            Ok(instance) => Syncs(Some(instance)),
            Err(error) => {
                eprintln!("syncs are not counted: {error:#}");
                Syncs(None)
            }
        }
    }

    /// Counts the syncs of files that lie in `dir`, from now on, and no longer those of any other folder.
    pub fn of(&self, dir: &Path) -> Result<Count<'_>> {
        let Some(instance) = &self.0 else { return Ok(Count(None)) };
        let kind = run("stat", &["-f", "-c", "%T", &dir.display().to_string()])?;
        ensure!(kind.starts_with("ext"), "syncs are counted on ext4; {} is {}", dir.display(), kind.trim());
        let of = fs::metadata(dir)?;
        let filter = format!("dev == {} && parent == {}", kernel_device(of.dev()), of.ino());
        fs::write(instance.0.join(EVENT).join("filter"), filter).context("the kernel takes no filter")?;
        Ok(Count(Some((instance, instance.total()?))))
    }
}

fn instance(dir: &Path) -> Result<Instance> {
    let path = Path::new(TRACEFS).join("instances").join(dir.file_name().context("a run has a folder")?);
    fs::create_dir(&path).context("tracefs is needed at /sys/kernel/tracing, and root")?;
    let instance = Instance(path);
    fs::write(instance.0.join(EVENT).join("enable"), "1")
        .context("the kernel has no trace point of ext4's sync")?;
    Ok(instance)
}

impl Instance {
    /// Events so far, those that the buffer has forgotten included.
    fn total(&self) -> Result<u64> {
        let mut total = 0;
        for cpu in fs::read_dir(self.0.join("per_cpu"))? {
            let stats = fs::read_to_string(cpu?.path().join("stats"))?;
            for line in stats.lines() {
                if let Some(("entries" | "overrun" | "dropped events", count)) = line.split_once(": ") {
                    total += count.trim().parse::<u64>()?;
                }
            }
        }
        Ok(total)
    }
}

/// A count under way.
pub struct Count<'a>(Option<(&'a Instance, u64)>);

impl Count<'_> {
    /// Syncs since it began, for each of `units`; `None` where they are not counted.
    pub fn per(&self, units: f64) -> Result<Option<f64>> {
        let Some((instance, before)) = &self.0 else { return Ok(None) };
        Ok(Some((instance.total()? - before) as f64 / units))
    }
}

/// A device number as the kernel has it inside, from the one that it tells.
fn kernel_device(told: u64) -> u64 {
    let major = (told >> 8) & 0xfff | (told >> 32) & !0xfff;
    let minor = told & 0xff | (told >> 12) & 0xffff_ff00;
    major << 20 | minor
}

/// The figure in words: the median of those that were counted.
pub fn in_words(counts: impl IntoIterator<Item = Option<f64>>) -> String {
    let counts: Option<Vec<f64>> = counts.into_iter().collect();
    match counts.map(crate::table::median) {
        None => "syncs not counted".into(),
        Some(count) if count >= 10.0 || count == 0.0 => format!("{count:.0} syncs"),
        Some(count) => format!("{count:.2} syncs"),
    }
}
