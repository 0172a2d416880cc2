//! Errors: what was expected, what was found, where, and what to do.
//!
//! One table ([`ErrorKind::errno`], and in the protocol crates their own) maps kinds outwards.

use std::error::Error as StdError;
use std::fmt;

/// What kind of failure, as far as a caller may act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The range does not lie on the disk, or is not aligned as [`crate::Limits`] asks.
    InvalidInput,
    /// No space is left in the storage.
    NoSpace,
    /// The node or storage is read-only, or the operation is not allowed now.
    NotPermitted,
    /// The image's metadata contradicts itself; nothing was guessed.
    Corrupt,
    /// Neither this storage nor its format can do that.
    Unsupported,
    /// A sync failed earlier: what is stable is unknown, so nothing more is written.
    Poisoned,
    /// The source went away, stalls past the limit, or has changed.
    SourceLost,
    /// The node is being closed.
    ShuttingDown,
    /// Somebody else holds it.
    Busy,
    /// The deadline passed.
    TimedOut,
    /// A named limit was exceeded.
    TooLarge,
    /// It is not there.
    NotFound,
    /// Any other failure of the device or the peer.
    Io,
}

impl ErrorKind {
    /// The Linux errno for it (as `qemu-io`, FUSE and the event streams show it).
    pub fn errno(self) -> i32 {
        match self {
            ErrorKind::InvalidInput => 22,
            ErrorKind::NoSpace => 28,
            ErrorKind::NotPermitted => 1,
            ErrorKind::Corrupt | ErrorKind::Io | ErrorKind::Poisoned | ErrorKind::SourceLost => 5,
            ErrorKind::Unsupported => 95,
            ErrorKind::ShuttingDown => 108,
            ErrorKind::Busy => 16,
            ErrorKind::TimedOut => 110,
            ErrorKind::TooLarge => 27,
            ErrorKind::NotFound => 2,
        }
    }

    /// The kind for a Linux errno.
    pub fn from_errno(errno: i32) -> ErrorKind {
        match errno {
            22 => ErrorKind::InvalidInput,
            28 | 122 => ErrorKind::NoSpace,
            1 | 13 | 30 => ErrorKind::NotPermitted,
            38 | 95 => ErrorKind::Unsupported,
            108 => ErrorKind::ShuttingDown,
            16 | 11 => ErrorKind::Busy,
            110 => ErrorKind::TimedOut,
            27 | 75 => ErrorKind::TooLarge,
            2 => ErrorKind::NotFound,
            _ => ErrorKind::Io,
        }
    }
}

/// A shared cause, so that one failure can be told to everybody who waited for it.
type Source = std::sync::Arc<dyn StdError + Send + Sync>;

/// An I/O operation failed.
#[derive(Clone, Debug)]
pub struct IoError(Box<IoErrorInner>);

#[derive(Clone, Debug)]
struct IoErrorInner {
    kind: ErrorKind,
    message: String,
    range: Option<(u64, u64)>,
    node: Option<String>,
    source: Option<Source>,
}

/// Result of an I/O operation.
pub type IoResult<T> = Result<T, IoError>;

impl IoError {
    /// A failure of `kind`; the message says what was expected, what was found and what to do.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> IoError {
        IoError(Box::new(IoErrorInner {
            kind,
            message: message.into(),
            range: None,
            node: None,
            source: None,
        }))
    }

    /// Adds the range, in bytes, that was asked for (the innermost one stays).
    pub fn at(mut self, start: u64, len: u64) -> IoError {
        self.0.range.get_or_insert((start, len));
        self
    }

    /// Adds the node or file where it happened (the innermost one stays).
    pub fn in_node(mut self, name: impl fmt::Display) -> IoError {
        self.0.node.get_or_insert_with(|| name.to_string());
        self
    }

    /// Adds the cause.
    pub fn caused_by(mut self, cause: impl StdError + Send + Sync + 'static) -> IoError {
        self.0.source = Some(std::sync::Arc::new(cause));
        self
    }

    /// What kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The node or file where it happened, as [`IoError::in_node`] was told.
    pub fn node(&self) -> Option<&str> {
        self.0.node.as_deref()
    }

    /// The message without place and cause.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The range that was asked for, as (start, length) in bytes.
    pub fn range(&self) -> Option<(u64, u64)> {
        self.0.range
    }
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(node) = &self.0.node {
            write!(f, "{node}: ")?;
        }
        f.write_str(&self.0.message)?;
        if let Some((start, len)) = self.0.range {
            write!(f, " (at byte {start}, {len} bytes)")?;
        }
        if let Some(source) = &self.0.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl StdError for IoError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

impl From<std::io::Error> for IoError {
    fn from(error: std::io::Error) -> Self {
        let kind = match error.raw_os_error() {
            Some(errno) => ErrorKind::from_errno(errno),
            None => match error.kind() {
                std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                std::io::ErrorKind::PermissionDenied => ErrorKind::NotPermitted,
                std::io::ErrorKind::TimedOut => ErrorKind::TimedOut,
                std::io::ErrorKind::InvalidInput => ErrorKind::InvalidInput,
                std::io::ErrorKind::StorageFull => ErrorKind::NoSpace,
                std::io::ErrorKind::Unsupported => ErrorKind::Unsupported,
                _ => ErrorKind::Io,
            },
        };
        IoError::new(kind, error.to_string())
    }
}

/// An image, file or peer could not be opened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum OpenError {
    /// It is not of the format that was asked for.
    NotThisFormat {
        /// The format.
        format: &'static str,
        /// What was expected and what was found.
        found: String,
    },
    /// It needs a feature that this program does not have; opening it all the same could damage it.
    Unsupported {
        /// The format.
        format: &'static str,
        /// Name (and number) of the feature.
        feature: String,
        /// What the user can do.
        advice: String,
    },
    /// Its metadata breaks the format's rules.
    Malformed {
        /// The format.
        format: &'static str,
        /// Field, expected and found value.
        what: String,
    },
    /// The caller asked for something that does not fit this image.
    Refused {
        /// Why, and what to do.
        why: String,
    },
    /// Another process has the image open.
    Locked {
        /// Which lock is in the way, and what to do.
        why: String,
    },
    /// Reading or writing failed.
    Io(IoError),
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OpenError::NotThisFormat { format, found } => write!(f, "not a {format} image: {found}"),
            OpenError::Unsupported { format, feature, advice } => {
                write!(f, "this {format} image needs {feature}, which is not supported; {advice}")
            }
            OpenError::Malformed { format, what } => write!(f, "damaged {format} image: {what}"),
            OpenError::Refused { why } | OpenError::Locked { why } => f.write_str(why),
            OpenError::Io(error) => error.fmt(f),
        }
    }
}

impl StdError for OpenError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            OpenError::Io(error) => Some(error),
            _ => None,
        }
    }
}

impl From<IoError> for OpenError {
    fn from(error: IoError) -> Self {
        OpenError::Io(error)
    }
}

/// An image could not be created.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum CreateError {
    /// An option's value is not possible.
    BadOption {
        /// The option.
        option: &'static str,
        /// What was given, what is possible.
        why: String,
    },
    /// Writing failed.
    Io(IoError),
}

impl fmt::Display for CreateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CreateError::BadOption { option, why } => write!(f, "option {option}: {why}"),
            CreateError::Io(error) => error.fmt(f),
        }
    }
}

impl StdError for CreateError {}

impl From<IoError> for CreateError {
    fn from(error: IoError) -> Self {
        CreateError::Io(error)
    }
}
