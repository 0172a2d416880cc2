//! Nodes by name, who uses whom, and what may therefore not be taken away.

use std::collections::BTreeMap;
use std::fmt;

use infill_storage::sync::{Arc, Mutex, lock};

use crate::NodeHandle;

/// The graph refuses a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GraphError {
    /// The name is taken.
    Duplicate(String),
    /// No node of that name.
    Unknown(String),
    /// It has users: who they are.
    InUse(String, Vec<String>),
}

impl fmt::Display for GraphError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GraphError::Duplicate(name) => write!(f, "Duplicate nodes with node-name='{name}'"),
            GraphError::Unknown(name) => write!(f, "Failed to find node with node-name='{name}'"),
            GraphError::InUse(name, users) => {
                write!(f, "Node '{name}' is busy: it is in use by {}", users.join(", "))
            }
        }
    }
}

impl std::error::Error for GraphError {}

#[derive(Debug)]
struct Entry {
    node: NodeHandle,
    children: Vec<String>,
    users: Vec<String>,
}

/// Named nodes. Cloning shares the graph.
#[derive(Clone, Debug, Default)]
pub struct Graph(Arc<Mutex<BTreeMap<String, Entry>>>);

impl Graph {
    /// An empty graph.
    pub fn new() -> Graph {
        Graph::default()
    }

    /// Adds a node under `name`; each of `children` is the name of a node in the graph that it keeps in use.
    pub fn insert(&self, name: &str, node: NodeHandle, children: Vec<String>) -> Result<(), GraphError> {
        let mut entries = lock(&self.0);
        if entries.contains_key(name) {
            return Err(GraphError::Duplicate(name.into()));
        }
        if let Some(missing) = children.iter().find(|child| !entries.contains_key(*child)) {
            return Err(GraphError::Unknown(missing.clone()));
        }
        for child in &children {
            if let Some(entry) = entries.get_mut(child) {
                entry.users.push(format!("node '{name}'"));
            }
        }
        entries.insert(name.into(), Entry { node, children, users: Vec::new() });
        Ok(())
    }

    /// The node of that name.
    pub fn get(&self, name: &str) -> Result<NodeHandle, GraphError> {
        let entries = lock(&self.0);
        entries.get(name).map(|entry| entry.node.clone()).ok_or_else(|| GraphError::Unknown(name.into()))
    }

    /// All nodes in the order of their names.
    pub fn list(&self) -> Vec<(String, NodeHandle)> {
        lock(&self.0).iter().map(|(name, entry)| (name.clone(), entry.node.clone())).collect()
    }

    /// Names of the children of `name`.
    pub fn children(&self, name: &str) -> Vec<String> {
        lock(&self.0).get(name).map(|entry| entry.children.clone()).unwrap_or_default()
    }

    /// Notes `user` (for messages: `export 'e0'`, `job 'j0'`) as a user of the node.
    pub fn claim(&self, name: &str, user: &str) -> Result<NodeHandle, GraphError> {
        let mut entries = lock(&self.0);
        let entry = entries.get_mut(name).ok_or_else(|| GraphError::Unknown(name.into()))?;
        entry.users.push(user.into());
        Ok(entry.node.clone())
    }

    /// Takes one claim of `user` back.
    pub fn release(&self, name: &str, user: &str) {
        if let Some(entry) = lock(&self.0).get_mut(name)
            && let Some(at) = entry.users.iter().position(|other| other == user)
        {
            entry.users.remove(at);
        }
    }

    /// Who uses the node.
    pub fn users(&self, name: &str) -> Vec<String> {
        lock(&self.0).get(name).map(|entry| entry.users.clone()).unwrap_or_default()
    }

    /// There is an edge from `parent` to `child` from now on (a stream has put another backing there).
    pub fn attach(&self, parent: &str, child: &str) -> Result<(), GraphError> {
        let mut entries = lock(&self.0);
        for name in [parent, child] {
            if !entries.contains_key(name) {
                return Err(GraphError::Unknown(name.into()));
            }
        }
        if let Some(entry) = entries.get_mut(parent) {
            entry.children.push(child.into());
        }
        if let Some(entry) = entries.get_mut(child) {
            entry.users.push(format!("node '{parent}'"));
        }
        Ok(())
    }

    /// The edge from `parent` to `child` is gone (a stream has dropped the backing).
    pub fn detach(&self, parent: &str, child: &str) {
        let mut entries = lock(&self.0);
        if let Some(entry) = entries.get_mut(parent)
            && let Some(at) = entry.children.iter().position(|other| other == child)
        {
            entry.children.remove(at);
        }
        drop(entries);
        self.release(child, &format!("node '{parent}'"));
    }

    /// Takes a node that nobody uses out of the graph. Its children lose a user.
    pub fn remove(&self, name: &str) -> Result<NodeHandle, GraphError> {
        let mut entries = lock(&self.0);
        let entry = entries.get(name).ok_or_else(|| GraphError::Unknown(name.into()))?;
        if !entry.users.is_empty() {
            return Err(GraphError::InUse(name.into(), entry.users.clone()));
        }
        let Some(entry) = entries.remove(name) else { return Err(GraphError::Unknown(name.into())) };
        drop(entries);
        for child in &entry.children {
            self.release(child, &format!("node '{name}'"));
        }
        Ok(entry.node)
    }
}
