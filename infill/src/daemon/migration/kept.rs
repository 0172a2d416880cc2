//! What is kept of a migration: the machine's record, and what only this daemon knows.

use std::path::PathBuf;

use anyhow::{Result, bail};
use infill_migrate::{Record, SourceState, State as RecordState, TargetState};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fence::ImageKind;

/// What a side knows beside its record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Local {
    /// Nothing is copied before the switch.
    pub(super) post_copy: bool,
    /// The disks change hands by themselves.
    pub(super) auto_switch: bool,
    /// Of a target: where the source's exports are.
    pub(super) data: Option<String>,
    /// Of a source: what the target's certificate is for, where that is not the host that is dialled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) tls_hostname: Option<String>,
    /// Of a source: how long, in seconds, and how much, in bytes, is copied before the switch at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) warm_seconds: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) warm_bytes: Option<u64>,
    /// In the order of the record's.
    pub(super) disks: Vec<LocalDisk>,
}

/// A disk of a migration, here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LocalDisk {
    /// The id of its export.
    pub(super) export: String,
    /// Its node.
    pub(super) node: String,
    /// Its image.
    pub(super) path: PathBuf,
    /// Of a source: what the image is.
    #[serde(default)]
    pub(super) kind: ImageKind,
}

/// A record, and what stands beside it.
#[derive(Clone)]
pub(super) struct Kept {
    pub(super) record: Record,
    pub(super) local: Local,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeptRow {
    record: Value,
    local: Local,
}

impl Kept {
    /// Its bytes.
    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        let record = serde_json::from_slice(&self.record.encode())?;
        Ok(serde_json::to_vec(&KeptRow { record, local: self.local.clone() })?)
    }

    /// What these bytes are.
    pub(super) fn decode(bytes: &[u8]) -> Result<Kept> {
        let row: KeptRow = serde_json::from_slice(bytes)?;
        let record = Record::decode(&serde_json::to_vec(&row.record)?)?;
        if record.plan().disks.len() != row.local.disks.len() {
            bail!("it has {} disks and tells of {}", record.plan().disks.len(), row.local.disks.len());
        }
        Ok(Kept { record, local: row.local })
    }

    /// Whether another migration of its disks may begin.
    pub(super) fn is_over(&self) -> bool {
        use TargetState as T;
        match self.record.state() {
            RecordState::Source(state) => {
                matches!(state, SourceState::Serving | SourceState::Released | SourceState::Superseded)
            }
            RecordState::Target(state) => {
                matches!(state, T::Local | T::GaveBack | T::Aborted | T::Superseded)
            }
        }
    }
}
