//! Names that callers give to nodes, exports and jobs.

use crate::error::QmpError;

/// Longest node name, in bytes.
pub const NODE_NAME_BYTES_MAX: usize = 31;

/// Whether `text` is an identifier: a letter, then letters, digits, `-`, `.` and `_`.
pub fn is_id(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}

/// Refuses what cannot be a node's name.
pub fn check_node_name(name: &str) -> Result<(), QmpError> {
    if !is_id(name) {
        return Err(QmpError::generic(format!("Invalid node-name: '{name}'")));
    }
    if name.len() > NODE_NAME_BYTES_MAX {
        return Err(QmpError::generic("Node name too long"));
    }
    Ok(())
}
