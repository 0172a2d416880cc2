//! What keeps an image that has left from being started by its path, whether this daemon runs or not.
//!
//! A qcow2 image says so itself, in its header. An image of another format cannot, so it gets another name. What has
//! neither (a device) does not move.

use std::io::{Error, ErrorKind, Result as StdResult};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::sync_directory;
use crate::blockdev::FormatKind;

/// What stands behind the name of an image that has moved.
const MOVED: &str = ".moved-to-another-host";

/// The format of an image that moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ImageKind {
    /// Its header carries the fence.
    #[default]
    Qcow2,
    /// Its name does.
    Raw,
    /// As of a raw one.
    Qed,
}

impl ImageKind {
    /// What a node of that driver lies on.
    pub(super) fn of_driver(driver: &str) -> Option<ImageKind> {
        Some(match driver {
            "qcow2" => ImageKind::Qcow2,
            "raw" | "file" => ImageKind::Raw,
            "qed" => ImageKind::Qed,
            _ => return None,
        })
    }

    /// As images are opened.
    pub(super) const fn format(self) -> FormatKind {
        match self {
            ImageKind::Qcow2 => FormatKind::Qcow2,
            ImageKind::Raw => FormatKind::Raw,
            ImageKind::Qed => FormatKind::Qed,
        }
    }

    /// Where the image is while it is fenced.
    pub(super) fn fenced_path(self, path: &Path) -> PathBuf {
        match self {
            ImageKind::Qcow2 => path.to_owned(),
            ImageKind::Raw | ImageKind::Qed => moved_path(path),
        }
    }
}

fn moved_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(MOVED);
    name.into()
}

/// The one name of an image that is to be fenced by its name.
pub(super) fn only_name(path: &Path) -> Result<PathBuf> {
    let path = std::fs::canonicalize(path).with_context(|| path.display().to_string())?;
    let names = std::fs::metadata(&path).with_context(|| path.display().to_string())?.nlink();
    if names != 1 {
        bail!(
            "{} has {names} names (hard links), so that another name would not keep it from being started: leave it one, or \
             convert it to qcow2",
            path.display()
        );
    }
    if moved_path(&path).exists() {
        bail!("{} is there already: move it away", moved_path(&path).display());
    }
    Ok(path)
}

/// Gives an image the name of one that has moved, or its own again, durably. It may have it already.
pub(super) fn set_by_name(path: &Path, fenced: bool) -> StdResult<()> {
    let moved = moved_path(path);
    let (from, to) = if fenced { (path, moved.as_path()) } else { (moved.as_path(), path) };
    match (from.try_exists()?, to.try_exists()?) {
        (false, true) => {}
        (true, false) => std::fs::rename(from, to)?,
        (true, true) => {
            let why =
                format!("there are both {} and {}: move one of them away", from.display(), to.display());
            return Err(Error::new(ErrorKind::AlreadyExists, why));
        }
        (false, false) => {
            let why = format!("there is neither {} nor {}", from.display(), to.display());
            return Err(Error::new(ErrorKind::NotFound, why));
        }
    }
    sync_directory(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_changed_once_and_never_over_another_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        std::fs::write(&path, "x").unwrap();
        assert_eq!(only_name(&path).unwrap(), path.canonicalize().unwrap());
        for fenced in [true, true, false, false] {
            set_by_name(&path, fenced).unwrap();
            assert_eq!((path.exists(), moved_path(&path).exists()), (!fenced, fenced));
        }
        std::fs::write(moved_path(&path), "y").unwrap();
        assert!(set_by_name(&path, true).unwrap_err().to_string().contains("there are both"));
        assert!(only_name(&path).unwrap_err().to_string().contains("is there already"));
        assert_eq!(std::fs::read(&path).unwrap(), b"x");
        std::fs::remove_file(moved_path(&path)).unwrap();
        std::fs::hard_link(&path, dir.path().join("other")).unwrap();
        assert!(only_name(&path).unwrap_err().to_string().contains("2 names"));
        std::fs::remove_file(&path).unwrap();
        assert!(set_by_name(&path, true).unwrap_err().to_string().contains("neither"));
    }
}
