//! Commands on dirty bitmaps.

use crate::error::QmpError;
use crate::members::{Alternate, Members, Object};

/// A bitmap, of the node that the command is about or of another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapRef {
    /// Its node; `None` is the one that the command names.
    pub node: Option<String>,
    /// Its name.
    pub name: String,
}

/// `block-dirty-bitmap-add`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapAdd {
    /// The node.
    pub node: String,
    /// The name of the bitmap.
    pub name: String,
    /// Bytes that a bit stands for; `None` is the node's default.
    pub granularity: Option<u32>,
    /// Whether the image keeps it.
    pub persistent: bool,
    /// Whether it is not to record.
    pub disabled: bool,
}

/// `block-dirty-bitmap-merge`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapMerge {
    /// The node.
    pub node: String,
    /// The bitmap that is changed.
    pub target: String,
    /// What is merged into it.
    pub bitmaps: Vec<BitmapRef>,
}

/// What is asked of bitmaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BitmapCommand {
    /// `block-dirty-bitmap-add`.
    Add(BitmapAdd),
    /// `block-dirty-bitmap-remove`: node and name.
    Remove(String, String),
    /// `block-dirty-bitmap-clear`: node and name.
    Clear(String, String),
    /// `block-dirty-bitmap-enable`: node and name.
    Enable(String, String),
    /// `block-dirty-bitmap-disable`: node and name.
    Disable(String, String),
    /// `block-dirty-bitmap-merge`.
    Merge(BitmapMerge),
    /// `x-debug-block-dirty-bitmap-sha256`: node and name.
    Sha256(String, String),
}

impl Object for BitmapRef {
    fn read(mut members: Members) -> Result<BitmapRef, QmpError> {
        let found = BitmapRef { node: Some(members.str("node")?), name: members.str("name")? };
        members.finish()?;
        Ok(found)
    }
}

/// A list of bitmaps.
pub(crate) fn bitmap_refs(arguments: &mut Members, member: &str) -> Result<Option<Vec<BitmapRef>>, QmpError> {
    let items = arguments.opt_alternates::<BitmapRef>(member, "BlockDirtyBitmapOrStr")?;
    let Some(items) = items else { return Ok(None) };
    let one = |item| match item {
        Alternate::Object(found) => Ok(found),
        Alternate::Name(name) => Ok(BitmapRef { node: None, name }),
        Alternate::Null => Err(arguments.missing(member)),
    };
    items.into_iter().map(one).collect::<Result<_, _>>().map(Some)
}

impl BitmapCommand {
    /// The node that it names.
    pub fn node(&self) -> &str {
        match self {
            BitmapCommand::Add(add) => &add.node,
            BitmapCommand::Merge(merge) => &merge.node,
            BitmapCommand::Remove(node, _)
            | BitmapCommand::Clear(node, _)
            | BitmapCommand::Enable(node, _)
            | BitmapCommand::Disable(node, _)
            | BitmapCommand::Sha256(node, _) => node,
        }
    }

    /// Reads the arguments of the command called `name`; `None` if it is none on bitmaps.
    pub(crate) fn read(name: &str, arguments: &mut Members) -> Result<Option<BitmapCommand>, QmpError> {
        let mut both = || Ok::<_, QmpError>((arguments.str("node")?, arguments.str("name")?));
        Ok(Some(match name {
            "block-dirty-bitmap-add" => {
                let (node, name) = both()?;
                BitmapCommand::Add(BitmapAdd {
                    node,
                    name,
                    granularity: arguments.opt_u32("granularity")?,
                    persistent: arguments.opt_bool("persistent")?.unwrap_or(false),
                    disabled: arguments.opt_bool("disabled")?.unwrap_or(false),
                })
            }
            "block-dirty-bitmap-merge" => {
                let (node, target) = (arguments.str("node")?, arguments.str("target")?);
                let bitmaps =
                    bitmap_refs(arguments, "bitmaps")?.ok_or_else(|| arguments.missing("bitmaps"))?;
                BitmapCommand::Merge(BitmapMerge { node, target, bitmaps })
            }
            "block-dirty-bitmap-remove" => both().map(|(node, name)| BitmapCommand::Remove(node, name))?,
            "block-dirty-bitmap-clear" => both().map(|(node, name)| BitmapCommand::Clear(node, name))?,
            "block-dirty-bitmap-enable" => both().map(|(node, name)| BitmapCommand::Enable(node, name))?,
            "block-dirty-bitmap-disable" => both().map(|(node, name)| BitmapCommand::Disable(node, name))?,
            "x-debug-block-dirty-bitmap-sha256" => {
                both().map(|(node, name)| BitmapCommand::Sha256(node, name))?
            }
            _ => return Ok(None),
        }))
    }
}
