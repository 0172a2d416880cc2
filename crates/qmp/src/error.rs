//! A refused command, as the protocol tells it.

use std::fmt;

/// Class of a refused command. Clients may act on it; the description is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// Any reason that has no class of its own.
    GenericError,
    /// No such command, or not in this mode.
    CommandNotFound,
    /// No block job of that name is active.
    DeviceNotActive,
    /// No such disk.
    DeviceNotFound,
}

impl ErrorClass {
    /// Its name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            ErrorClass::GenericError => "GenericError",
            ErrorClass::CommandNotFound => "CommandNotFound",
            ErrorClass::DeviceNotActive => "DeviceNotActive",
            ErrorClass::DeviceNotFound => "DeviceNotFound",
        }
    }
}

/// Why a command, an option or a message is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QmpError {
    /// Its class.
    pub class: ErrorClass,
    /// What was expected, what was found, what to do.
    pub desc: String,
}

impl QmpError {
    /// A refusal of that class.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> QmpError {
        QmpError { class, desc: desc.into() }
    }

    /// A refusal without a class of its own.
    pub fn generic(desc: impl Into<String>) -> QmpError {
        QmpError::new(ErrorClass::GenericError, desc)
    }
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl std::error::Error for QmpError {}
