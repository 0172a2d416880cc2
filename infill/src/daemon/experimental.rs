//! `x-blockdev-amend`, `x-blockdev-change`, `x-blockdev-set-iothread`: what qemu-storage-daemon's users know of them.
//!
//! QEMU amends the keys of encrypted images, changes the children of quorums, and has threads that nodes belong to. There are no
//! such images and nodes here, and requests run where they come in: what asks for nothing is done, the rest is refused in
//! its words.

use infill_job::{JobOptions, JobType};
use infill_qmp::QmpError;
use infill_qmp::experimental::Experimental;
use serde_json::Value;

use super::control::{Control, refused};
use super::jobs::{Claims, job_refused, yield_once};
use crate::blockdev::Access;

fn no(why: impl Into<String>) -> Result<(), QmpError> {
    Err(QmpError::generic(why))
}

impl Control {
    /// The commands of [`Experimental`].
    pub(super) async fn experimental(&self, command: Experimental) -> Result<(), QmpError> {
        match command {
            Experimental::Amend { job_id, node_name, driver } => {
                self.amend(job_id, &node_name, &driver).await
            }
            Experimental::Change { parent, child, node } => {
                self.change_children(&parent, child.as_deref(), node.as_deref())
            }
            Experimental::SetIothread { node_name, iothread, force } => {
                self.set_iothread(&node_name, &iothread, force)
            }
        }
    }

    /// `x-blockdev-amend`. Answered once the job runs, which its manager dismisses.
    async fn amend(&self, job_id: String, name: &str, driver: &str) -> Result<(), QmpError> {
        let missing = |_| QmpError::generic(format!("Cannot find device='' nor node-name='{name}'"));
        let facts = self.blockdevs().facts(name).map_err(missing)?;
        if facts.driver != driver {
            return no("x-blockdev-amend doesn't support changing the block driver");
        }
        if driver != "qcow2" {
            return no("Driver does not support x-blockdev-amend");
        }
        self.not_busy(name)?;
        let mut claims = Claims::new(self.blockdevs(), &job_id);
        claims.take(name, Access::Reader)?;
        let options = JobOptions { auto_dismiss: false, ..JobOptions::new(job_id) };
        let work = async move {
            // The image has all that it was asked to have.
            drop(claims);
            Ok(())
        };
        self.jobs().start_future(JobType::Amend, options, work).map_err(job_refused)?;
        yield_once().await;
        Ok(())
    }

    /// `x-blockdev-change`.
    fn change_children(&self, parent: &str, child: Option<&str>, node: Option<&str>) -> Result<(), QmpError> {
        let missing =
            |_| QmpError::generic(format!("Cannot find device='{parent}' nor node-name='{parent}'"));
        let facts = self.blockdevs().facts(parent).map_err(missing)?;
        match (child, node) {
            (None, None) => no("Either child or node must be specified"),
            (Some(_), Some(_)) => no("The parameters child and node are in conflict"),
            (None, Some(node)) if self.blockdevs().get(node).is_err() => {
                no(format!("Node '{node}' not found"))
            }
            (None, Some(_)) => no(format!("The node {parent} does not support adding a child")),
            (Some(child), None) => {
                let has = match child {
                    "file" => facts.file.is_some(),
                    "backing" => facts.backing.is_some(),
                    "target" => facts.target.is_some(),
                    _ => false,
                };
                match has {
                    true => no(format!("The node {parent} does not support removing a child")),
                    false => no(format!("Node '{parent}' does not have child '{child}'")),
                }
            }
        }
    }

    /// `x-blockdev-set-iothread`: I/O threads are names here, so that nothing has to move.
    fn set_iothread(&self, name: &str, iothread: &Value, force: bool) -> Result<(), QmpError> {
        if !matches!(iothread, Value::String(_) | Value::Null) {
            return no("Invalid parameter type for 'iothread', expected: StrOrNull");
        }
        self.blockdevs().get(name).map_err(|error| refused(&error))?;
        let users = self.blockdevs().graph().users(name);
        if !force && users.iter().any(|user| !user.starts_with("node '")) {
            return no(format!(
                "Node {name} is associated with a BlockBackend and could be in use (use force=true to override this \
                 check)"
            ));
        }
        match iothread.as_str() {
            Some(id) if !self.blockdevs().objects().has_iothread(id) => {
                no(format!("Cannot find iothread {id}"))
            }
            _ => Ok(()),
        }
    }
}
