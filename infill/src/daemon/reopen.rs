//! `blockdev-reopen`.
//!
//! # Order
//! 1. Everything that can be refused is refused before anything changes.
//! 2. Nodes are changed in their order. Where one fails all the same, those before it are changed back.
//! 3. What was below before and belongs to nobody now is closed; what is kept of the nodes follows.

use std::rc::Rc;

use infill_base::{DetectZeroes, DiscardMode};
use infill_qmp::shape::Reopened;
use infill_qmp::{BackingOption, BlockdevOptions, BlockdevRef, Driver, QmpError};
use infill_storage::RangeGuard;
use serde_json::{Map, Value};

use super::control::{Control, refused};
use crate::blockdev::{Opened, check_detect_zeroes};

/// What one node is to be, and was.
struct Change {
    name: String,
    /// How it is opened, before and after; `None` where it cannot be opened anew, and stays.
    opened: Option<(Opened, Opened)>,
    /// What it lies on, before and after; `None` where that stays.
    backing: Option<(Option<String>, Option<String>)>,
    no_flush: bool,
    detect_zeroes: DetectZeroes,
    given: Map<String, Value>,
}

fn unchangeable(option: &str) -> QmpError {
    QmpError::generic(format!("Cannot change the option '{option}'"))
}

impl Control {
    /// `blockdev-reopen`.
    pub(super) async fn blockdev_reopen(self: &Rc<Self>, nodes: Vec<Reopened>) -> Result<(), QmpError> {
        let turn = self.blockdevs().change_graph().await;
        let changes: Vec<Change> =
            nodes.into_iter().map(|node| self.plan_reopen(node)).collect::<Result<_, _>>()?;
        for (at, change) in changes.iter().enumerate() {
            if let Err(error) = self.reopen(&turn, change, true).await {
                for done in changes[..at].iter().rev() {
                    if let Err(error) = self.reopen(&turn, done, false).await {
                        tracing::error!("'{}' could not be changed back: {}", done.name, error.desc);
                    }
                }
                return Err(error);
            }
        }
        for change in changes {
            if let Some((Some(old), _)) = &change.backing
                && let Err(error) = self.blockdevs().let_backing_go(&turn, old).await
            {
                tracing::warn!("closing '{old}', on which '{}' lay: {error:#}", change.name);
            }
            let noted = self.blockdevs().note_settings(&change.name, change.detect_zeroes, change.no_flush);
            noted.map_err(|error| refused(&error))?;
            self.note_reopened(&change.name, change.given);
        }
        Ok(())
    }

    /// Refuses what cannot be.
    fn plan_reopen(&self, node: Reopened) -> Result<Change, QmpError> {
        let Reopened { options, given } = node;
        let Some(name) = options.node_name.clone() else {
            return Err(QmpError::generic("node-name not specified"));
        };
        let facts = self.blockdevs().facts(&name).map_err(|error| refused(&error))?;
        if options.driver.as_str() != facts.driver {
            return Err(unchangeable("driver"));
        }
        if options.is_direct() != facts.cache_direct {
            return Err(unchangeable("cache.direct"));
        }
        let backing = self.plan_children(&name, &options)?;
        let opened = match self.blockdevs().opened(&name) {
            Some(before) => {
                let wanted = Opened { read_only: options.is_read_only(), discard: options.discard_mode() };
                if before != wanted {
                    self.not_busy(&name)?;
                    self.not_measured(&name)?;
                }
                self.blockdevs().can_open_anew(&name, wanted).map_err(|error| refused(&error))?;
                Some((before, wanted))
            }
            None if options.read_only.is_some_and(|read_only| read_only != facts.read_only) => {
                return Err(unchangeable("read-only"));
            }
            None if options.discard_mode() != DiscardMode::default() => return Err(unchangeable("discard")),
            None => None,
        };
        if self.keeps_state() && self.is_described_in_another(&name) {
            return Err(QmpError::generic(format!(
                "'{name}' is described inside of another node: with --state, a node is changed that was added by its name"
            )));
        }
        let no_flush = options.cache_no_flush.unwrap_or(false);
        let detect_zeroes = options.detect_zeroes.unwrap_or_default();
        check_detect_zeroes(&options).map_err(|error| refused(&error))?;
        Ok(Change { name, opened, backing, no_flush, detect_zeroes, given })
    }

    /// Refuses a node with a write threshold, which would go with the instance that sees the writes.
    fn not_measured(&self, name: &str) -> Result<(), QmpError> {
        let node = self.blockdevs().get(name).map_err(|error| refused(&error))?;
        match self.thresholds.of(name, &node) {
            0 => Ok(()),
            _ => Err(QmpError::generic(format!(
                "'{name}' has a write threshold, which would be lost: set it to 0 first"
            ))),
        }
    }

    /// Refuses other children than there are, but for a backing, which may be another one.
    #[expect(clippy::type_complexity, reason = "what it lies on before and after, if that changes")]
    fn plan_children(
        &self,
        name: &str,
        options: &BlockdevOptions,
    ) -> Result<Option<(Option<String>, Option<String>)>, QmpError> {
        let facts = self.blockdevs().facts(name).map_err(|error| refused(&error))?;
        let same = |child: &BlockdevRef, now: Option<&String>, option: &str| {
            let found = match child {
                BlockdevRef::Name(child) => {
                    let missing =
                        |_| QmpError::generic(format!("Cannot find device='' nor node-name='{child}'"));
                    self.blockdevs().get(child).map_err(missing)?;
                    Some(child) == now
                }
                BlockdevRef::Definition(definition) => now.is_some_and(|now| self.is_that(now, definition)),
            };
            if found { Ok(()) } else { Err(unchangeable(option)) }
        };
        let file = |child: &BlockdevRef| same(child, facts.file.as_ref(), "file");
        let backing = match &options.driver {
            Driver::File { filename, .. } if self.blockdevs().is_file(name, filename) => return Ok(None),
            Driver::File { .. } => return Err(unchangeable("filename")),
            Driver::Null { size, .. } => {
                let now = self.blockdevs().get(name).map_err(|error| refused(&error))?.len();
                return if now == *size { Ok(None) } else { Err(unchangeable("size")) };
            }
            Driver::Raw { file: child, offset: 0, size: None } => {
                file(child)?;
                return Ok(None);
            }
            Driver::Raw { .. } => return Err(unchangeable("offset")),
            Driver::Qcow2 { file: child, backing, .. } | Driver::Qed { file: child, backing } => {
                file(child)?;
                backing
            }
            Driver::CopyOnRead { file: child, .. } => {
                file(child)?;
                return Ok(None);
            }
            // Addresses, and moments that have passed.
            _ => {
                let driver = options.driver.as_str();
                return Err(QmpError::generic(format!(
                    "'{name}' is of driver '{driver}', which cannot be opened anew: delete it and add it again"
                )));
            }
        };
        let wanted = match backing {
            BackingOption::Header => {
                let node = self.blockdevs().get(name).map_err(|error| refused(&error))?;
                if facts.backing.is_some() || node.info().backing.is_some() {
                    return Err(QmpError::generic(format!("backing is missing for '{name}'")));
                }
                None
            }
            BackingOption::None => None,
            BackingOption::Node(BlockdevRef::Name(below)) => Some(below.clone()),
            BackingOption::Node(child) => {
                same(child, facts.backing.as_ref(), "backing.driver")?;
                facts.backing.clone()
            }
        };
        if wanted == facts.backing {
            return Ok(None);
        }
        self.not_busy(name)?;
        let possible = self.blockdevs().can_put_on(name, wanted.as_deref());
        possible.map_err(|error| refused(&error))?;
        Ok(Some((facts.backing, wanted)))
    }

    /// Whether a description in place is one of the node that is there.
    fn is_that(&self, name: &str, definition: &BlockdevOptions) -> bool {
        let Ok(facts) = self.blockdevs().facts(name) else { return false };
        facts.driver == definition.driver.as_str()
            && definition.node_name.as_ref().is_none_or(|own| own == name)
            && match &definition.driver {
                Driver::File { filename, .. } => self.blockdevs().is_file(name, filename),
                Driver::Raw { file, offset: 0, size: None }
                | Driver::Qcow2 { file, .. }
                | Driver::Qed { file, .. } => match file {
                    BlockdevRef::Name(file) => facts.file.as_ref() == Some(file),
                    BlockdevRef::Definition(file_definition) => {
                        facts.file.is_some_and(|file| self.is_that(&file, file_definition))
                    }
                },
                _ => false,
            }
    }

    /// Makes the change, or takes it back.
    async fn reopen(&self, turn: &RangeGuard, change: &Change, forward: bool) -> Result<(), QmpError> {
        let name = &change.name;
        let side = |(before, after): (Opened, Opened)| if forward { after } else { before };
        if let Some((before, after)) = &change.backing {
            let below = if forward { after } else { before };
            let put = self.blockdevs().put_on(turn, name, below.as_deref()).await;
            put.map_err(|error| refused(&error))?;
        }
        if let Some(opened) = change.opened {
            let outcome = self.blockdevs().open_anew(turn, name, side(opened)).await;
            if let Err(error) = outcome {
                if let (true, Some((before, _))) = (forward, &change.backing)
                    && let Err(error) = self.blockdevs().put_on(turn, name, before.as_deref()).await
                {
                    tracing::error!("'{name}' could not be put back on what it lay on: {error:#}");
                }
                return Err(refused(&error));
            }
        }
        Ok(())
    }
}
