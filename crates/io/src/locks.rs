//! Image locks that QEMU understands: open-file-description locks on single bytes.
//!
//! For each permission that a user of an image needs, and for each that it does not let others have, QEMU holds a shared
//! lock on one byte; whoever wants the contrary sees the byte locked. Held alike here, so that QEMU and Infill never
//! write to an image that the other has open. The bytes lie at fixed offsets of the file and need not exist.

use std::os::fd::{AsRawFd, BorrowedFd};

use infill_base::OpenError;

/// First byte of the permissions that are used.
const USED: u64 = 100;
/// First byte of the permissions that others must not have.
const UNSHARED: u64 = 200;

/// Reads see what was written.
const CONSISTENT_READ: u64 = 0;
/// Writes anything.
const WRITE: u64 = 1;
/// Changes the length.
const RESIZE: u64 = 3;
/// What nobody lets others do.
const NOT_SHARED: &[u64] = &[WRITE, RESIZE];

/// What else may happen to a file while it is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Share {
    /// A reader lets others read, a writer is the only writer (QEMU's default).
    #[default]
    Guarded,
    /// Anything: no locks are taken or looked at (QEMU's `locking=off`, `force-share=on`).
    Unguarded,
}

fn name(permission: u64) -> &'static str {
    match permission {
        CONSISTENT_READ => "consistent read",
        WRITE => "write",
        _ => "resize",
    }
}

/// Takes the locks of a reader or a writer of the file `fd`; they last as long as the open file.
pub(crate) fn take(fd: BorrowedFd<'_>, read_only: bool, path: &str) -> Result<(), OpenError> {
    // First everything of one's own, then the look at others: two that come at once may both be refused, never
    // both let in.
    for byte in
        used(read_only).iter().map(|bit| USED + bit).chain(NOT_SHARED.iter().map(|bit| UNSHARED + bit))
    {
        match lock_call(fd, libc::F_OFD_SETLK, libc::F_RDLCK, byte) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()), // no locks on this file system
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Err(refused(path, read_only, byte));
            }
            Err(error) => return Err(OpenError::Io(infill_base::IoError::from(error).in_node(path))),
        }
    }
    match conflict(fd, read_only) {
        Ok(None) => Ok(()),
        Ok(Some(byte)) => Err(refused(path, read_only, byte)),
        Err(error) => Err(OpenError::Io(infill_base::IoError::from(error).in_node(path))),
    }
}

/// A lock of somebody else that is in the way of a reader or a writer of the file `fd`.
fn conflict(fd: BorrowedFd<'_>, read_only: bool) -> std::io::Result<Option<u64>> {
    let unshared = used(read_only).iter().map(|bit| UNSHARED + bit);
    for byte in unshared.chain(NOT_SHARED.iter().map(|bit| USED + bit)) {
        if lock_call(fd, libc::F_OFD_GETLK, libc::F_WRLCK, byte)? {
            return Ok(Some(byte));
        }
    }
    Ok(None)
}

/// Permissions that a reader or a writer uses.
const fn used(read_only: bool) -> &'static [u64] {
    if read_only { &[CONSISTENT_READ] } else { &[CONSISTENT_READ, WRITE, RESIZE] }
}

/// Gives the locks of the file `fd` back.
pub(crate) fn release(fd: BorrowedFd<'_>, path: &str) -> Result<(), OpenError> {
    let bits = [CONSISTENT_READ, WRITE, RESIZE];
    for byte in bits.iter().flat_map(|bit| [USED + bit, UNSHARED + bit]) {
        match lock_call(fd, libc::F_OFD_SETLK, libc::F_UNLCK, byte) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {} // no locks on this file system
            Err(error) => return Err(OpenError::Io(infill_base::IoError::from(error).in_node(path))),
        }
    }
    Ok(())
}

/// In QEMU's words, which scripts look for, and ours. The lock `byte` is in the way.
fn refused(path: &str, read_only: bool, byte: u64) -> OpenError {
    let mode = if read_only { "reading" } else { "writing" };
    let shared = if byte < UNSHARED { "shared " } else { "" };
    let permission = name(byte % 100);
    OpenError::Locked {
        why: format!(
            "{path}: cannot open it for {mode}: Failed to get {shared}\"{permission}\" lock: another process has the \
             image open; end that process, or share the image on purpose"
        ),
    }
}

/// One fcntl call on one byte; for F_OFD_GETLK, whether somebody else holds it.
fn lock_call(fd: BorrowedFd<'_>, command: i32, kind: i32, byte: u64) -> std::io::Result<bool> {
    // SAFETY: flock is plain data, for which all zeroes is a valid value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = byte as libc::off_t;
    lock.l_len = 1;
    // SAFETY: the descriptor is open for the call, and `lock` outlives it.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, &mut lock) };
    if result < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}
