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

/// One user.
#[derive(Debug)]
struct Hold {
    user: String,
    access: Access,
    /// Whether it has no right to anything now: it is an inactive node, or uses one.
    rests: bool,
}

/// The users of one node.
#[derive(Debug, Default)]
pub struct Holds(Vec<Hold>);

impl Holds {
    /// Adds a user of node `name`, and takes the lock of its file where it has one.
    pub fn take(&mut self, name: &str, user: &str, access: Access, file: Option<&FileStorage>) -> Result<()> {
        self.check(name, user, access)?;
        if let Some(file) = file {
            file.lock(!access.writes())?;
        }
        self.0.push(Hold { user: user.to_owned(), access, rests: false });
        Ok(())
    }

    /// Adds a user who has no right to anything until it wakes.
    pub fn take_resting(&mut self, user: &str, access: Access) {
        self.0.push(Hold { user: user.to_owned(), access, rests: true });
    }

    /// The holds of `user` rest; the last one that does not gives the lock back.
    pub fn rest(&mut self, user: &str, file: Option<&FileStorage>) {
        self.0.iter_mut().filter(|hold| hold.user == user).for_each(|hold| hold.rests = true);
        self.unlock_unused(file);
    }

    /// The holds of `user` on node `name` rest no longer. Refused where that would disturb others, of this process or another.
    pub fn wake(&mut self, name: &str, user: &str, file: Option<&FileStorage>) -> Result<()> {
        let rests = |hold: &&Hold| hold.user == user && hold.rests;
        let resting: Vec<Access> = self.0.iter().filter(rests).map(|hold| hold.access).collect();
        for access in &resting {
            self.check(name, user, *access)?;
        }
        if let (Some(file), false) = (file, resting.is_empty()) {
            file.lock(!resting.iter().any(|access| access.writes()))?;
        }
        self.0.iter_mut().filter(|hold| hold.user == user).for_each(|hold| hold.rests = false);
        Ok(())
    }

    fn awake(&self) -> impl Iterator<Item = &Hold> {
        self.0.iter().filter(|hold| !hold.rests)
    }

    fn unlock_unused(&self, file: Option<&FileStorage>) {
        if let (None, Some(file)) = (self.awake().next(), file)
            && let Err(error) = file.unlock()
        {
            tracing::warn!(%error, "an image lock could not be given back");
        }
    }

    fn check(&self, name: &str, user: &str, access: Access) -> Result<()> {
        let conflict =
            self.awake().find(|other| !(access.allows(other.access) && other.access.allows(access)));
        if let Some(Hold { user: other, access: theirs, .. }) = conflict {
            let verb = |access: &Access| if access.writes() { "writes to" } else { "relies on" };
            bail!(
                "{user} cannot use node '{name}': it {} it, but {other} {} it already",
                verb(&access),
                verb(theirs)
            );
        }
        Ok(())
    }

    /// How `user` uses it.
    pub fn of(&self, user: &str) -> Option<Access> {
        self.0.iter().find(|hold| hold.user == user).map(|hold| hold.access)
    }

    /// Somebody who writes.
    pub fn writer(&self) -> Option<&str> {
        self.awake().find(|hold| hold.access.writes()).map(|hold| hold.user.as_str())
    }

    /// `user`, who relied on nobody writing, does so no longer, or does so again. Whoever changes it sees to it that nobody is
    /// disturbed.
    pub fn rely(&mut self, user: &str, relies: bool) {
        let (from, to) = match relies {
            true => (Access::Reader, Access::Stable),
            false => (Access::Stable, Access::Reader),
        };
        for hold in self.0.iter_mut().filter(|hold| hold.user == user && hold.access == from) {
            hold.access = to;
        }
    }

    /// `user` owns it from now on: nobody else uses it.
    pub fn own(&mut self, user: &str) {
        for hold in self.0.iter_mut().filter(|hold| hold.user == user) {
            hold.access = Access::Owner;
        }
    }

    /// `user` uses it otherwise from now on, which disturbs nobody; the lock of its file follows.
    pub fn become_(&mut self, user: &str, access: Access, file: Option<&FileStorage>) -> Result<()> {
        for hold in self.0.iter_mut().filter(|hold| hold.user == user) {
            hold.access = access;
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
        if let Some(at) = self.0.iter().position(|hold| hold.user == user) {
            self.0.remove(at);
        }
        self.unlock_unused(file);
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
                    // Whoever rests disturbs nobody, and does not wake beside one who would be disturbed.
                    holds.rest("one", None);
                    holds.take("n", "two", second, None).unwrap();
                    holds.wake("n", "one", None).unwrap_err();
                    holds.give_back("two", None);
                    holds.wake("n", "one", None).unwrap();
                }
            }
        }
    }
}
