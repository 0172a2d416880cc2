//! Standard output.

use std::io::{ErrorKind, Write};

use anyhow::{Context, Result};

/// Prints `text`. A reader that has gone (`| head`) is no error: nobody is left who wants more.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result.context("writing to standard output"),
    }
}
