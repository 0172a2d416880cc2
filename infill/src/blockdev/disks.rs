//! Whether files were written to since the last daemon, by others or by this one.
//!
//! What lies in memory beside a file and outlives a daemon (maps of copies and of bitmaps) is true of the file as that daemon has
//! left it. So the files that a state names are looked at before this one opens any of them, and again before what lies in memory
//! is believed. What opening an image writes to it (a journal that is replayed, a repair) changes nothing that a guest sees and
//! happens under the image lock: it is told apart ([`Disks::begin_own`]), and makes nothing stale.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use infill_storage::sync::{Mutex, lock};

use super::identity_of;

/// A file as it was found.
#[derive(Debug)]
struct Disk {
    identity: String,
    /// When it was written to last, as far as that is accounted for.
    written: SystemTime,
    /// Whether somebody has written to it since it was found.
    is_stale: bool,
}

impl Disk {
    fn look(path: &Path) -> Option<Disk> {
        let written = std::fs::metadata(path).and_then(|meta| meta.modified()).ok()?;
        Some(Disk { identity: identity_of(path).ok()?, written, is_stale: false })
    }

    fn look_again(&mut self, path: &Path) {
        match Disk::look(path) {
            Some(now) if now.identity == self.identity && now.written == self.written => {}
            Some(now) if now.identity == self.identity => (self.written, self.is_stale) = (now.written, true),
            _ => self.is_stale = true,
        }
    }
}

/// The files of a state, by their paths.
#[derive(Debug, Default)]
pub struct Disks(Mutex<BTreeMap<PathBuf, Disk>>);

impl Disks {
    /// Looks at those of these files for the first time that there are. To be called before this daemon opens them.
    pub fn look(&self, paths: impl IntoIterator<Item = PathBuf>) {
        let mut disks = lock(&self.0);
        for path in paths {
            if !disks.contains_key(&path)
                && let Some(disk) = Disk::look(&path)
            {
                disks.insert(path, disk);
            }
        }
    }

    /// The image lock of this file is taken, and it is about to be opened: what was written until now was not written by that.
    pub(super) fn begin_own(&self, path: &Path) {
        if let Some(disk) = lock(&self.0).get_mut(path) {
            disk.look_again(path);
        }
    }

    /// The image lock is still taken, and nobody could use the image: what was written since [`Disks::begin_own`] shows no guest
    /// anything else.
    pub(super) fn end_own(&self, path: &Path) {
        if let (Some(disk), Some(now)) = (lock(&self.0).get_mut(path), Disk::look(path))
            && now.identity == disk.identity
        {
            disk.written = now.written;
        }
    }

    /// Refuses what is true of a file as it was at `until` (in seconds since 1970), where it is another one or was written to
    /// since, but for what opening it has written. `file`: its identity, or what contains it.
    pub fn check(&self, file: &str, until: u64) -> Result<(), String> {
        let mut disks = lock(&self.0);
        let mut found = disks.iter_mut().filter(|(_, disk)| file.contains(&disk.identity)).peekable();
        if found.peek().is_none() {
            return Err("when its file was written to last is not known".into());
        }
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let is_same = |(path, disk): (&PathBuf, &mut Disk)| {
            disk.look_again(path);
            !disk.is_stale && seconds(disk.written) <= until
        };
        match found.all(is_same) {
            true => Ok(()),
            false => Err("its file was written to while nobody noted what".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(secs: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(secs)
    }

    fn write(path: &Path, secs: u64) {
        std::fs::File::options().write(true).open(path).unwrap().set_modified(at(secs)).unwrap();
    }

    #[test]
    fn what_others_write_makes_stale_and_what_opening_writes_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, "disk").unwrap();
        write(&path, 100);
        let (file, disks) = (identity_of(&path).unwrap(), Disks::default());
        assert!(disks.check(&file, 100).is_err(), "not known");
        disks.look([path.clone()]);
        assert_eq!(disks.check(&format!("bitmap of {file}"), 100), Ok(()));
        assert!(disks.check(&file, 99).is_err(), "written to too late");
        disks.begin_own(&path);
        write(&path, 103);
        disks.end_own(&path);
        assert_eq!(disks.check(&file, 103), Ok(()));
        // However soon: it does not matter when.
        write(&path, 104);
        disks.begin_own(&path);
        disks.end_own(&path);
        assert!(disks.check(&file, 200).is_err(), "somebody else has written");
        let other = Disks::default();
        other.look([path.clone()]);
        std::fs::rename(&path, dir.path().join("away")).unwrap();
        assert!(other.check(&file, 200).is_err(), "it is away");
    }
}
