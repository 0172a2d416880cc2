//! Who uses a node, and how: what two users may do at once, and the image locks that follow from it.

use anyhow::{Result, bail};
use infill_io::FileStorage;

/// What a user does with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads, whatever others write (a read-only export).
    Reader,
    /// Reads, and relies on nobody writing (the file of an image that is open read-only, a backing).
    Stable,
    /// Writes, beside others that write (an export).
    Writer,
    /// Writes, and relies on nobody else writing (the file of an image).
    Owner,
}

impl Access {
    /// Whether it writes.
    pub const fn writes(self) -> bool {
        matches!(self, Access::Writer | Access::Owner)
    }

    const fn allows(self, other: Access) -> bool {
        match self {
            Access::Reader | Access::Writer => true,
            Access::Stable | Access::Owner => !other.writes(),
        }
    }
}

/// The users of one node.
#[derive(Debug, Default)]
pub struct Holds(Vec<(String, Access)>);

impl Holds {
    /// Adds a user of node `name`, and takes the lock of its file where it has one.
    pub fn take(&mut self, name: &str, user: &str, access: Access, file: Option<&FileStorage>) -> Result<()> {
        let conflict = self.0.iter().find(|(_, other)| !(access.allows(*other) && other.allows(access)));
        if let Some((other, theirs)) = conflict {
            let verb = |access: &Access| if access.writes() { "writes to" } else { "relies on" };
            bail!(
                "{user} cannot use node '{name}': it {} it, but {other} {} it already",
                verb(&access),
                verb(theirs)
            );
        }
        if let Some(file) = file {
            file.lock(!access.writes())?;
        }
        self.0.push((user.to_owned(), access));
        Ok(())
    }

    /// How `user` uses it.
    pub fn of(&self, user: &str) -> Option<Access> {
        self.0.iter().find(|(other, _)| other == user).map(|(_, access)| *access)
    }

    /// Somebody who writes.
    pub fn writer(&self) -> Option<&str> {
        self.0.iter().find(|(_, access)| access.writes()).map(|(user, _)| user.as_str())
    }

    /// `user`, who relied on nobody writing, does so no longer, or does so again. Whoever changes it sees to it that nobody is
    /// disturbed.
    pub fn rely(&mut self, user: &str, relies: bool) {
        let (from, to) = match relies {
            true => (Access::Reader, Access::Stable),
            false => (Access::Stable, Access::Reader),
        };
        for (_, access) in self.0.iter_mut().filter(|(other, access)| other == user && *access == from) {
            *access = to;
        }
    }

    /// `user` owns it from now on: nobody else uses it.
    pub fn own(&mut self, user: &str) {
        for (_, access) in self.0.iter_mut().filter(|(other, _)| other == user) {
            *access = Access::Owner;
        }
    }

    /// `user` uses it otherwise from now on, which disturbs nobody; the lock of its file follows.
    pub fn become_(&mut self, user: &str, access: Access, file: Option<&FileStorage>) -> Result<()> {
        for (_, held) in self.0.iter_mut().filter(|(other, _)| other == user) {
            *held = access;
        }
        if let Some(file) = file {
            // A writer's locks are more than a reader's: they are given back first.
            file.unlock()?;
            file.lock(self.writer().is_none())?;
        }
        Ok(())
    }

    /// Takes one hold of `user` back; the last one gives the lock back.
    pub fn give_back(&mut self, user: &str, file: Option<&FileStorage>) {
        if let Some(at) = self.0.iter().position(|(other, _)| other == user) {
            self.0.remove(at);
        }
        if let (true, Some(file)) = (self.0.is_empty(), file)
            && let Err(error) = file.unlock()
        {
            tracing::warn!(%error, "an image lock could not be given back");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_writes_below_one_who_relies_on_it() {
        use Access::{Owner, Reader, Stable, Writer};
        for (first, second, both) in [
            (Reader, Writer, true),
            (Reader, Owner, true),
            (Stable, Stable, true),
            (Stable, Writer, false),
            (Stable, Owner, false),
            (Writer, Writer, true),
            (Writer, Owner, false),
            (Owner, Owner, false),
        ] {
            for (first, second) in [(first, second), (second, first)] {
                let mut holds = Holds::default();
                holds.take("n", "one", first, None).unwrap();
                assert_eq!(holds.take("n", "two", second, None).is_ok(), both, "{first:?} {second:?}");
                if !both {
                    holds.give_back("one", None);
                    holds.take("n", "two", second, None).unwrap();
                }
            }
        }
    }
}
