//! `--sandbox`, `--sandbox-path`: what the daemon gives up before it does anything else.
//!
//! It is entered before there are threads, sockets or disks, so everything that the daemon ever does happens inside. What
//! it protects, and what it does not, stands in [`infill_io::sandbox`].

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use infill_io::sandbox::{self, Reach};

/// Whether the sandbox is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sandbox {
    /// As far as the kernel can.
    #[default]
    Auto,
    /// Wholly, or the daemon does not start.
    On,
    /// It is not.
    Off,
}

impl Sandbox {
    /// Reads the option's value.
    pub fn read(text: &str) -> Result<Sandbox> {
        Ok(match text {
            "auto" => Sandbox::Auto,
            "on" => Sandbox::On,
            "off" => Sandbox::Off,
            _ => bail!("--sandbox {text}: it is on, off or auto"),
        })
    }

    /// Enters it. With `paths`, nothing else is reached, and a kernel that cannot see to that is an error.
    pub fn enter(self, paths: &[PathBuf]) -> Result<()> {
        if self == Sandbox::Off {
            if !paths.is_empty() {
                bail!("--sandbox-path needs the sandbox: leave --sandbox off out");
            }
            return Ok(());
        }
        let reach = match paths {
            [] => Reach::AllButSystem,
            paths => Reach::Only(paths.to_vec()),
        };
        let entered = sandbox::enter(&reach).context("--sandbox-path")?;
        match entered.missing() {
            None => Ok(()),
            Some(missing) if self == Sandbox::On || !paths.is_empty() => {
                bail!(
                    "the sandbox cannot be entered as it was asked for: {missing}; --sandbox auto goes on without"
                )
            }
            Some(missing) => {
                tracing::warn!("the sandbox is not whole: {missing}; --sandbox off says that this is known");
                Ok(())
            }
        }
    }
}
