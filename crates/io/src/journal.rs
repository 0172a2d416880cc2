//! Where volatile journals lie: files on a tmpfs, mapped into memory.
//!
//! Such a file outlives the process and not the machine. What the page cache of any other file system holds would, too,
//! but a store to it can wait for the disk; so anything else than a tmpfs is refused, and the images are written through.
//!
//! * One holder at a time, by `flock`: the kernel lets go when a process dies.
//! * Space is allocated before anything is stored: a full tmpfs is an error then, and never a signal.
//! * A directory that others can write to, or that is somebody else's, is not used.
//!
//! Costs: nothing for an image that is not written to; `JOURNAL_BYTES` of memory from its first write to its close.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::ErrorKind as StdErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use infill_base::{ErrorKind, IoError, IoResult, OpenError};
use infill_storage::journal::{BootId, JOURNAL_BYTES, JournalMemory, Journaling, VolatileJournal};
use infill_storage::sync::{Mutex, lock};
use rustix::fs::{FallocateFlags, FlockOperation};
use rustix::mm::{MapFlags, ProtFlags};

/// The kernel's number for a tmpfs.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Names this start of the machine.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A directory of volatile journals.
#[derive(Clone, Debug)]
pub struct JournalDir {
    path: PathBuf,
}

impl JournalDir {
    /// The directory at `path`, which is made when it is needed.
    pub fn new(path: impl Into<PathBuf>) -> JournalDir {
        JournalDir { path: path.into() }
    }

    /// Where journals lie by default: `/run/infill/journal`, for others than root the same below their own directory of
    /// run-time files; where that is on no tmpfs, `/dev/shm/infill-journal-UID`.
    pub fn usual() -> JournalDir {
        let user = rustix::process::geteuid();
        let run = match std::env::var_os("XDG_RUNTIME_DIR") {
            _ if user.is_root() => PathBuf::from("/run"),
            Some(own) => PathBuf::from(own),
            None => PathBuf::from(format!("/run/user/{}", user.as_raw())),
        };
        // One level: what lies deeper in a directory that everybody may write to could be moved away by somebody else.
        let shared = JournalDir::new(format!("/dev/shm/infill-journal-{}", user.as_raw()));
        let own = JournalDir::new(run.join("infill/journal"));
        if own.check().is_err() && shared.check().is_ok() { shared } else { own }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory where it is missing, and says why no journal can lie in it.
    pub fn check(&self) -> IoResult<()> {
        let failed = |error: std::io::Error| IoError::from(error).in_node(self.path.display());
        let unfit = |why: &str| {
            Err(IoError::new(
                ErrorKind::Unsupported,
                format!("no journal can lie in {}: {why}", self.path.display()),
            ))
        };
        DirBuilder::new().recursive(true).mode(0o700).create(&self.path).map_err(failed)?;
        let meta = std::fs::symlink_metadata(&self.path).map_err(failed)?;
        if !meta.is_dir() {
            return unfit("it is no directory");
        }
        if meta.uid() != rustix::process::geteuid().as_raw() || meta.mode() & 0o022 != 0 {
            return unfit("others could write to it; it must be this user's, with mode 0700");
        }
        let kind = rustix::fs::statfs(&self.path).map_err(|error| failed(error.into()))?.f_type;
        if kind as u64 != TMPFS_MAGIC {
            return unfit("it is on no tmpfs, so that a change of a mapping could wait for a disk");
        }
        Ok(())
    }

    /// The journal of an image. `name` is its file's name, `identity` tells the image from others that have had that
    /// name. Where none can be kept, changes are written through.
    ///
    /// Fails where the journal is in use, or holds something that cannot be read.
    pub fn journaling(&self, name: &str, identity: &str) -> Result<Journaling, OpenError> {
        let boot = match self.check().and_then(|()| boot_id()) {
            Ok(boot) => boot,
            Err(error) => {
                tracing::warn!(%error, image = identity, "no journal can be kept: every change is written through");
                return Ok(Journaling::WriteThrough);
            }
        };
        let memory = JournalFile::new(self.path.join(name), JOURNAL_BYTES);
        memory.find().map_err(OpenError::Io)?;
        Ok(Journaling::Volatile(VolatileJournal::attach(Arc::new(memory), identity, boot)?))
    }

    /// This start of the machine.
    pub fn boot(&self) -> IoResult<BootId> {
        boot_id()
    }

    /// Memory of `bytes` for something else than a journal, by the name of its file. What a process before this one has left
    /// there is there if it has that length; the file is made by [`JournalMemory::reserve`].
    ///
    /// Fails where no file can lie in the directory, or another process has this one.
    pub fn memory(&self, name: &str, bytes: usize) -> IoResult<Arc<dyn JournalMemory>> {
        self.check()?;
        let memory = JournalFile::new(self.path.join(name), bytes);
        memory.find()?;
        Ok(Arc::new(memory))
    }

    /// Removes the files whose names begin with `prefix` and are not wanted, if no process has them.
    pub fn remove_unwanted(&self, prefix: &str, is_wanted: impl Fn(&str) -> bool) {
        let Ok(entries) = std::fs::read_dir(&self.path) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|name| name.starts_with(prefix) && !is_wanted(name)) else {
                continue;
            };
            let file = JournalFile::new(self.path.join(name), 0);
            if let Ok(Some(_locked)) = file.open(false)
                && let Err(error) = std::fs::remove_file(&file.path)
            {
                tracing::warn!(%error, path = %file.path.display(), "a file that is not wanted any more stays");
            }
        }
    }
}

fn boot_id() -> IoResult<BootId> {
    let text = std::fs::read_to_string(BOOT_ID).map_err(|error| IoError::from(error).in_node(BOOT_ID))?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    match u128::from_str_radix(&digits, 16) {
        Ok(id) if digits.len() == 32 => Ok(BootId(id)),
        _ => {
            let why = format!("{text:?} is not the id of a boot, which has 32 digits");
            Err(IoError::new(ErrorKind::Io, why).in_node(BOOT_ID))
        }
    }
}

/// A mapped file.
struct Map {
    /// Holds the lock.
    _file: File,
    inode: (u64, u64),
    start: NonNull<AtomicU64>,
    bytes: usize,
}

// SAFETY: `start` is the beginning of a shared mapping that nobody but this value unmaps. It is used for atomics alone,
// which any thread may use.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped with this length in `Map::new`, and no reference to it outlives `self`.
        let result = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert!(result.is_ok());
    }
}

impl Map {
    /// Maps the first `bytes` of a file that is locked; all of its space is allocated before.
    fn new(file: File, bytes: usize) -> IoResult<Map> {
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes as u64)
            .map_err(std::io::Error::from)?;
        let meta = file.metadata()?;
        // SAFETY: a new mapping at a place that the kernel chooses overlaps nothing. The file is as long as the mapping
        // (fallocate), and it is cut by nobody who keeps to the lock, in a directory that only this user can write to.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        };
        let start = NonNull::new(start.map_err(std::io::Error::from)?.cast::<AtomicU64>());
        let start = start.ok_or_else(|| IoError::new(ErrorKind::Io, "a journal was mapped at address 0"))?;
        Ok(Map { inode: (meta.dev(), meta.ino()), _file: file, start, bytes })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has this length, is aligned to a page, and lives as long as `self`. Any bytes are a valid
        // AtomicU64, and everybody who has the file mapped uses atomics.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes / size_of::<AtomicU64>()) }
    }
}

/// The file of one journal. It is there from its first use to its removal.
struct JournalFile {
    path: PathBuf,
    bytes: usize,
    map: OnceLock<Map>,
    opening: Mutex<()>,
}

impl JournalFile {
    fn new(path: PathBuf, bytes: usize) -> JournalFile {
        JournalFile { path, bytes, map: OnceLock::new(), opening: Mutex::new(()) }
    }

    /// Maps the file if it is there.
    fn find(&self) -> IoResult<()> {
        if let Some(file) = self.open(false)?
            && file.metadata()?.len() >= self.bytes as u64
        {
            let map = Map::new(file, self.bytes).map_err(|error| error.in_node(self.path.display()))?;
            self.map.get_or_init(|| map);
        }
        Ok(())
    }

    /// Opens and locks the file; `None` where it is not there, and is not to be made.
    fn open(&self, create: bool) -> IoResult<Option<File>> {
        let failed = |error: std::io::Error| IoError::from(error).in_node(self.path.display());
        loop {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(create).mode(0o600).custom_flags(libc::O_NOFOLLOW);
            let file = match options.open(&self.path) {
                Err(error) if error.kind() == StdErrorKind::NotFound && !create => return Ok(None),
                other => other.map_err(failed)?,
            };
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    let why = "another process uses the journal of this image, so it has the image open for writing";
                    return Err(IoError::new(ErrorKind::Busy, why).in_node(self.path.display()));
                }
                other => other.map_err(|error| failed(error.into()))?,
            }
            // Whoever had it may have removed it before we got the lock.
            let own = file.metadata().map_err(failed)?;
            let named = std::fs::symlink_metadata(&self.path);
            if named.is_ok_and(|named| (named.dev(), named.ino()) == (own.dev(), own.ino())) {
                return Ok(Some(file));
            }
        }
    }
}

impl JournalMemory for JournalFile {
    fn reserve(&self) -> IoResult<()> {
        let _alone = lock(&self.opening);
        if self.map.get().is_some() {
            return Ok(());
        }
        let Some(file) = self.open(true)? else { return Ok(()) };
        match Map::new(file, self.bytes) {
            Ok(map) => {
                self.map.get_or_init(|| map);
                Ok(())
            }
            Err(error) => {
                // It holds nothing, and whatever of its space there is was not enough.
                let _ = std::fs::remove_file(&self.path);
                Err(error.in_node(self.path.display()))
            }
        }
    }

    fn words(&self) -> &[AtomicU64] {
        self.map.get().map_or(&[], Map::words)
    }

    fn remove(&self) {
        let Some(map) = self.map.get() else { return };
        let named = std::fs::symlink_metadata(&self.path);
        if named.is_ok_and(|named| (named.dev(), named.ino()) == map.inode)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            // Empty, it does no harm.
            tracing::warn!(%error, path = %self.path.display(), "a journal that is not wanted any more stays");
        }
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

#[cfg(test)]
mod tests;
