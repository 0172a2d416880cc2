//! Why a command about a job is refused, in the words of QEMU's job interface.

use std::fmt;

/// Class of a refused command, as QMP knows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// Any reason that has no class of its own.
    GenericError,
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
            ErrorClass::DeviceNotActive => "DeviceNotActive",
            ErrorClass::DeviceNotFound => "DeviceNotFound",
        }
    }
}

/// A command about a job is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobError {
    /// Its class.
    pub class: ErrorClass,
    /// What was expected, what was found, what to do.
    pub message: String,
}

impl JobError {
    /// A refusal without a class of its own.
    pub fn generic(message: impl Into<String>) -> JobError {
        JobError { class: ErrorClass::GenericError, message: message.into() }
    }

    /// No block job of that name.
    pub fn not_active(id: &str) -> JobError {
        JobError { class: ErrorClass::DeviceNotActive, message: format!("Block job '{id}' not found") }
    }
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for JobError {}
