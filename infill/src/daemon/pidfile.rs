//! The file that names the process, locked while it lives, gone when it ends.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use rustix::fs::{FlockOperation, fcntl_lock};

/// A pid file. Removed when this is dropped.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    _locked: File,
}

impl PidFile {
    /// Writes it. Refused where another process holds it.
    pub fn write(path: &Path) -> Result<PidFile> {
        let named = || format!("cannot create PID file: Could not create '{}'", path.display());
        // Not truncated before it is locked: it may be another's.
        let mut file =
            File::options().create(true).truncate(false).write(true).open(path).with_context(named)?;
        fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            anyhow!("cannot create PID file: {} is held by another process ({error})", path.display())
        })?;
        file.set_len(0).with_context(named)?;
        writeln!(file, "{}", std::process::id()).with_context(named)?;
        Ok(PidFile { path: path.to_owned(), _locked: file })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Best effort: a file that is left behind is not locked, and the next daemon takes it over.
        let _ = std::fs::remove_file(&self.path);
    }
}
