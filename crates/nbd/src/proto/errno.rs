//! The one table between kinds of errors and the protocol's error numbers.

use infill_base::ErrorKind;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const ENOMEM: u32 = 12;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;
const ESHUTDOWN: u32 = 108;

/// The error number for a kind.
///
/// `Unsupported` becomes ENOTSUP, which only a fast zero may answer: whoever answers another command maps it to
/// `InvalidInput` first.
pub fn errno_of(kind: ErrorKind) -> u32 {
    match kind {
        ErrorKind::NotPermitted => EPERM,
        ErrorKind::InvalidInput => EINVAL,
        ErrorKind::NoSpace => ENOSPC,
        ErrorKind::TooLarge => EOVERFLOW,
        ErrorKind::Unsupported => ENOTSUP,
        ErrorKind::ShuttingDown => ESHUTDOWN,
        _ => EIO,
    }
}

/// The kind for an error number. An unknown number counts as EINVAL, as the protocol says.
pub fn kind_of(errno: u32) -> ErrorKind {
    match errno {
        EPERM => ErrorKind::NotPermitted,
        EIO | ENOMEM => ErrorKind::Io,
        ENOSPC => ErrorKind::NoSpace,
        EOVERFLOW => ErrorKind::TooLarge,
        ENOTSUP => ErrorKind::Unsupported,
        ESHUTDOWN => ErrorKind::ShuttingDown,
        _ => ErrorKind::InvalidInput,
    }
}
