//! Nodes by name, who uses whom, and what may therefore not be taken away.

use std::collections::BTreeMap;
use std::fmt;

use infill_storage::sync::{Arc, Mutex, lock};

use crate::{Edge, NodeHandle};

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
    users: Vec<User>,
}

#[derive(Debug)]
struct User {
    /// For messages, and to find it again.
    who: String,
    /// Where it points at the node, if it can be made to point elsewhere.
    edge: Option<Edge>,
}

impl User {
    fn fixed(who: impl Into<String>) -> User {
        User { who: who.into(), edge: None }
    }
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
                entry.users.push(User::fixed(format!("node '{name}'")));
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

    /// The name of a node.
    pub fn name_of(&self, node: &NodeHandle) -> Option<String> {
        let entries = lock(&self.0);
        entries.iter().find(|(_, entry)| entry.node.is_same(node)).map(|(name, _)| name.clone())
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
        entry.users.push(User::fixed(user));
        Ok(entry.node.clone())
    }

    /// Notes `user` as a user of the node who can be given another one ([`Graph::move_users`]).
    pub fn claim_edge(&self, name: &str, user: &str) -> Result<Edge, GraphError> {
        let mut entries = lock(&self.0);
        let entry = entries.get_mut(name).ok_or_else(|| GraphError::Unknown(name.into()))?;
        let edge = Edge::new(entry.node.clone());
        entry.users.push(User { who: user.into(), edge: Some(edge.clone()) });
        Ok(edge)
    }

    /// The node `parent` points at its child with `edge`: it can be given another one ([`Graph::move_users`]).
    pub fn point(&self, parent: &str, child: &str, edge: Edge) {
        let who = format!("node '{parent}'");
        if let Some(entry) = lock(&self.0).get_mut(child)
            && let Some(user) = entry.users.iter_mut().find(|user| user.who == who && user.edge.is_none())
        {
            user.edge = Some(edge);
        }
    }

    /// The users of `name` that [`Graph::move_users`] would move. Refused where one is neither among `staying` nor able to.
    pub fn movable(&self, name: &str, staying: &[String]) -> Result<Vec<String>, GraphError> {
        let entries = lock(&self.0);
        let entry = entries.get(name).ok_or_else(|| GraphError::Unknown(name.into()))?;
        let going = || entry.users.iter().filter(|user| !staying.contains(&user.who));
        let fixed: Vec<_> = going().filter(|user| user.edge.is_none()).map(|user| user.who.clone()).collect();
        match fixed.is_empty() {
            true => Ok(going().map(|user| user.who.clone()).collect()),
            false => Err(GraphError::InUse(name.into(), fixed)),
        }
    }

    /// Gives the users of `from`, all but `staying`, the node `to` instead. Who exchanges them holds `from`
    /// ([`NodeHandle::hold_changes`]) meanwhile, and both read the same.
    pub fn move_users(&self, from: &str, to: &str, staying: &[String]) -> Result<(), GraphError> {
        self.movable(from, staying)?;
        let mut entries = lock(&self.0);
        let node = match entries.get(to) {
            Some(entry) => entry.node.clone(),
            None => return Err(GraphError::Unknown(to.into())),
        };
        let Some(entry) = entries.get_mut(from) else { return Err(GraphError::Unknown(from.into())) };
        let (stay, go): (Vec<_>, Vec<_>) =
            entry.users.drain(..).partition(|user| staying.contains(&user.who) || user.edge.is_none());
        entry.users = stay;
        for user in &go {
            if let Some(edge) = &user.edge {
                edge.point_at(node.clone());
            }
        }
        for user in &go {
            let parent = user.who.strip_prefix("node '").and_then(|who| who.strip_suffix('\''));
            let children = parent.and_then(|parent| entries.get_mut(parent)).map(|entry| &mut entry.children);
            for child in children.into_iter().flatten().filter(|child| *child == from) {
                to.clone_into(child);
            }
        }
        if let Some(entry) = entries.get_mut(to) {
            entry.users.extend(go);
        }
        Ok(())
    }

    /// Takes one claim of `user` back.
    pub fn release(&self, name: &str, user: &str) {
        if let Some(entry) = lock(&self.0).get_mut(name)
            && let Some(at) = entry.users.iter().position(|other| other.who == user)
        {
            entry.users.remove(at);
        }
    }

    /// Who uses the node.
    pub fn users(&self, name: &str) -> Vec<String> {
        let entries = lock(&self.0);
        let users = entries.get(name).map(|entry| entry.users.iter().map(|user| user.who.clone()).collect());
        users.unwrap_or_default()
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
            entry.users.push(User::fixed(format!("node '{parent}'")));
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

    /// `node` stands under `name` from now on: the same bytes, opened anew. Users with an edge point at it; those who lie on it
    /// are the caller's.
    pub fn set_node(&self, name: &str, node: NodeHandle) -> Result<(), GraphError> {
        let mut entries = lock(&self.0);
        let entry = entries.get_mut(name).ok_or_else(|| GraphError::Unknown(name.into()))?;
        for edge in entry.users.iter().filter_map(|user| user.edge.as_ref()) {
            edge.point_at(node.clone());
        }
        entry.node = node;
        Ok(())
    }

    /// Takes a node that nobody uses out of the graph. Its children lose a user.
    pub fn remove(&self, name: &str) -> Result<NodeHandle, GraphError> {
        let mut entries = lock(&self.0);
        let entry = entries.get(name).ok_or_else(|| GraphError::Unknown(name.into()))?;
        if !entry.users.is_empty() {
            let users = entry.users.iter().map(|user| user.who.clone()).collect();
            return Err(GraphError::InUse(name.into(), users));
        }
        let Some(entry) = entries.remove(name) else { return Err(GraphError::Unknown(name.into())) };
        drop(entries);
        for child in &entry.children {
            self.release(child, &format!("node '{name}'"));
        }
        Ok(entry.node)
    }
}
