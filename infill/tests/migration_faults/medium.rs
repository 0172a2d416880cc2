//! The file systems of a host: small ones of their own, which can be full, and which lose at a power cut what was not synced.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FallocateFlags, fallocate, statvfs};

use crate::common::{run, text, wait_until};

/// Ends an ext4 file system as a power cut does: its journal is not written, and nothing else is any more.
const SHUT_DOWN: &str = "import fcntl, os, struct, sys\n\
    fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";

/// A file system in a file, mounted until this goes.
pub struct Medium {
    file: PathBuf,
    at: PathBuf,
}

impl Medium {
    /// A new one of so many bytes, at a directory; nothing where one may not mount.
    pub fn mount(file: PathBuf, at: PathBuf, bytes: u64) -> Option<Medium> {
        std::fs::File::create(&file).unwrap().set_len(bytes).unwrap();
        run("mkfs.ext4", &["-q", "-F", "-m", "0", text(&file)]);
        let medium = Medium { file, at };
        medium.try_mount().then_some(medium)
    }

    fn try_mount(&self) -> bool {
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop", text(&self.file), text(&self.at)]);
        mount.stderr(Stdio::null()).status().unwrap().success()
    }

    fn ballast(&self) -> PathBuf {
        self.at.join("ballast")
    }

    /// There is no space any more.
    pub fn fill(&self) {
        let ballast = std::fs::File::create(self.ballast());
        let Ok(ballast) = ballast else { return };
        let free = statvfs(&self.at).unwrap();
        let mut piece = free.f_bavail * free.f_frsize;
        let mut from = 0;
        while piece >= 4096 {
            match fallocate(&ballast, FallocateFlags::empty(), from, piece) {
                Ok(()) => from += piece,
                Err(_) => piece /= 2,
            }
        }
    }

    /// There is space again.
    pub fn free(&self) {
        let _ = std::fs::remove_file(self.ballast());
    }

    /// Everything there is on stable storage.
    pub fn settle(&self) {
        run("sync", &["-f", text(&self.at)]);
    }

    /// The power is cut. Nobody has a file open.
    fn cut(&self) {
        run("python3", &["-c", SHUT_DOWN, text(&self.at)]);
        wait_until("nothing of the file system is in use", || {
            Command::new("umount").arg(&self.at).stderr(Stdio::null()).status().unwrap().success()
        });
    }

    /// It comes back.
    fn come_back(&self) {
        assert!(self.try_mount(), "{} is not mounted any more", self.at.display());
        self.free();
    }
}

impl Drop for Medium {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l", text(&self.at)]).stderr(Stdio::null()).status();
    }
}

/// Those of a host.
pub struct Media {
    pub images: Medium,
    pub state: Medium,
    _files: tempfile::TempDir,
}

impl Media {
    /// At `dir`, and at the state's directory in it.
    pub fn mount(dir: &Path) -> Option<Media> {
        let files = tempfile::tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm");
        let images = Medium::mount(files.path().join("images"), dir.to_owned(), 96 << 20)?;
        let state = dir.join("state");
        std::fs::create_dir(&state).unwrap();
        images.settle();
        let state = Medium::mount(files.path().join("state"), state, 32 << 20)?;
        Some(Media { images, state, _files: files })
    }

    pub fn all(&self) -> [&Medium; 2] {
        [&self.images, &self.state]
    }

    /// The power is cut, and comes back. Nobody has a file open.
    pub fn lose_power(&self) {
        // The one lies in the other.
        self.state.cut();
        self.images.cut();
        self.all().iter().for_each(|medium| medium.come_back());
    }
}

#[test]
fn a_power_cut_takes_what_was_not_synced_and_a_full_file_system_has_no_space() {
    let (dir, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
    let medium = Medium::mount(files.path().join("file"), dir.path().to_owned(), 16 << 20);
    let Some(medium) = medium else { return println!("nothing can be mounted here") };
    let write = |name: &str| std::fs::write(dir.path().join(name), vec![7; 100_000]);
    write("kept").unwrap();
    medium.settle();
    write("lost").unwrap();
    medium.cut();
    medium.come_back();
    assert_eq!(std::fs::read(dir.path().join("kept")).unwrap(), vec![7; 100_000]);
    assert!(!dir.path().join("lost").exists());
    medium.fill();
    assert_eq!(write("more").unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    medium.free();
    write("more").unwrap();
}
