//! The durable record: what one side knows of one migration, and all that it knows after a restart.
//!
//! One record holds all disks of a machine, and one state for all of them: they change hands together or not at all.
//! Its bytes are JSON, strict: what is unknown, missing, contradicts the rest or exceeds a limit is refused, never
//! guessed, for a record that is read wrongly lets two machines write. Whoever stores it checks that it is whole.

use std::collections::HashSet;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ids::{BitmapId, DiskId, EPOCH_MAX, Epoch, MigrationId, Side, TERM_MAX, Term};

/// Disks of one machine.
pub const DISKS_MAX: usize = 64;
/// Length of the name of a peer or witness.
pub const NAME_BYTES_MAX: usize = 1024;
/// Length of an encoded record.
pub const RECORD_BYTES_MAX: usize = 64 << 10;
/// Blocks of a disk: the map of the target takes a byte for each.
pub const BLOCKS_MAX: u64 = 1 << 28;
/// Least and largest size of a block.
pub const BLOCK_BYTES: std::ops::RangeInclusive<u32> = 512..=64 << 20;

/// The version of the encoding.
const VERSION: u32 = 1;

/// What the two sides agree on before anything else, and never change.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Plan {
    /// The migration.
    pub migration: MigrationId,
    /// All disks of the machine.
    pub disks: Vec<Disk>,
    /// The unit in which blocks are counted; a power of two.
    pub block_bytes: u32,
    /// The other side: where it is found, and whom a certificate must name.
    pub peer: String,
    /// Who else keeps the owner's name, and decides.
    pub witness: Option<String>,
    /// The target accepts no offer before it has everything: nothing is left at the source when the disks change hands.
    pub whole: bool,
    /// For how many seconds the target, having everything, keeps what it has to itself while no guest has written there:
    /// the disks can be given back until then.
    pub way_back: u32,
}

/// A disk of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Disk {
    /// Its name for life.
    pub id: DiskId,
    /// Its size.
    pub bytes: u64,
    /// Its epoch before the migration.
    pub epoch_before: Epoch,
}

/// Durable states of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceState {
    /// The disk is the source's, and the migration is over: aborted, handed back or reclaimed.
    Serving,
    /// The disk is the source's; the chain below it is pinned for the target.
    Prepared,
    /// Frozen, and offered in this term. Nobody writes.
    Offered,
    /// The disk is the target's in this term; what was frozen stays readable for it.
    HandedOver,
    /// The target's offer to give the disk back, in this term, is accepted.
    TakingBack,
    /// With a witness: being taken back by an operator's word; the witness decides whether before anything else.
    Reclaiming,
    /// The target has everything; the image may go.
    Released,
    /// The peer owns the disk in this term by an operator's word. The gate is closed for good.
    Superseded,
}

/// Durable states of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetState {
    /// The overlay exists. The term is the newest that was seen.
    Prepared,
    /// The source's offer of this term is accepted; the final residual is applied.
    Accepted,
    /// With a witness: being taken by an operator's word; the witness decides whether before anything else.
    TakingOver,
    /// The disk is the target's in this term; its data still comes.
    Owner,
    /// All data is here, and stable.
    Complete,
    /// The source has let go: an ordinary disk.
    Local,
    /// Offered back to the source in this term. Nobody writes.
    GivingBack,
    /// The disk is the source's in this term.
    GaveBack,
    /// The migration is over, and the disk never was the target's.
    Aborted,
    /// The peer owns the disk in this term by an operator's word. The gate is closed for good.
    Superseded,
}

/// The state of either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Of a source.
    Source(SourceState),
    /// Of a target.
    Target(TargetState),
}

/// What one side knows of a migration, durably.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub(crate) plan: Arc<Plan>,
    pub(crate) state: State,
    pub(crate) term: Term,
    /// Counts the records of this migration on this side.
    pub(crate) seq: u64,
    /// The term that an operator's word ended: the peer was not asked.
    pub(crate) forced_from: Option<Term>,
    /// At the target: a guest's write may have been let through in this term.
    pub(crate) let_through: bool,
    /// The last bitmaps that the source started; those under which the target's warm blocks were copied.
    pub(crate) bitmap: Option<BitmapId>,
    /// Blocks of each disk, offered or accepted in this term, that had to be made absent again.
    pub(crate) residual: Option<Vec<u64>>,
}

/// What is wrong with a plan or a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordError(String);

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "migration record: {}", self.0)
    }
}

impl std::error::Error for RecordError {}

impl RecordError {
    pub(crate) fn of_other_side(expected: Side) -> RecordError {
        RecordError(format!("expected one of the {expected:?}, found one of the other side"))
    }
}

fn wrong<T>(what: impl Into<String>) -> Result<T, RecordError> {
    Err(RecordError(what.into()))
}

impl Plan {
    /// Refuses what does not fit together or exceeds a limit.
    pub fn check(&self) -> Result<(), RecordError> {
        if self.disks.is_empty() || self.disks.len() > DISKS_MAX {
            return wrong(format!("expected 1 to {DISKS_MAX} disks, found {}", self.disks.len()));
        }
        if !BLOCK_BYTES.contains(&self.block_bytes) || !self.block_bytes.is_power_of_two() {
            let (least, most) = (BLOCK_BYTES.start(), BLOCK_BYTES.end());
            return wrong(format!(
                "expected a block of a power of two from {least} to {most} bytes, found {}",
                self.block_bytes
            ));
        }
        let mut seen = HashSet::new();
        for disk in &self.disks {
            if !seen.insert(disk.id) {
                return wrong(format!("disk {} is named twice", disk.id));
            }
            if self.blocks_of(disk) > BLOCKS_MAX {
                return wrong(format!(
                    "disk {} of {} bytes has more than {BLOCKS_MAX} blocks of {} bytes: take larger blocks",
                    disk.id, disk.bytes, self.block_bytes
                ));
            }
            if disk.epoch_before.0 > EPOCH_MAX {
                return wrong(format!(
                    "disk {} has epoch {}, at most {EPOCH_MAX}",
                    disk.id, disk.epoch_before.0
                ));
            }
        }
        for name in [Some(&self.peer), self.witness.as_ref()].into_iter().flatten() {
            if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains(char::is_control) {
                return wrong(format!("expected a name of 1 to {NAME_BYTES_MAX} bytes, found {name:?}"));
            }
        }
        Ok(())
    }

    /// How many blocks a disk of it has.
    pub fn blocks_of(&self, disk: &Disk) -> u64 {
        disk.bytes.div_ceil(u64::from(self.block_bytes.max(1)))
    }

    /// Whether sets of blocks are one for each disk, of its size.
    pub(crate) fn fits(&self, sets: &[crate::BlockSet]) -> bool {
        sets.len() == self.disks.len()
            && self.disks.iter().zip(sets).all(|(disk, set)| set.blocks() == self.blocks_of(disk))
    }
}

impl Hash for Record {
    /// Of the plan, which never changes, the name only.
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.plan.migration.hash(hasher);
        (self.state, self.term, self.seq, self.forced_from).hash(hasher);
        (self.let_through, self.bitmap, &self.residual).hash(hasher);
    }
}

impl Record {
    pub(crate) fn new(plan: Plan, state: State) -> Result<Record, RecordError> {
        plan.check()?;
        Ok(Record {
            plan: Arc::new(plan),
            state,
            term: Term::FIRST,
            seq: 0,
            forced_from: None,
            let_through: false,
            bitmap: None,
            residual: None,
        })
    }

    /// What was agreed.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The state.
    pub fn state(&self) -> State {
        self.state
    }

    /// The side.
    pub fn side(&self) -> Side {
        match self.state {
            State::Source(_) => Side::Source,
            State::Target(_) => Side::Target,
        }
    }

    /// The term.
    pub fn term(&self) -> Term {
        self.term
    }

    /// The epoch of a disk of it in this state.
    pub fn epoch(&self, disk: &Disk) -> Epoch {
        Epoch(disk.epoch_before.0 + self.term.0)
    }

    /// The term that an operator's word ended.
    pub fn forced_from(&self) -> Option<Term> {
        self.forced_from
    }

    /// Whether the target may have let a guest's write through.
    pub fn let_through(&self) -> bool {
        self.let_through
    }

    /// Blocks that had to be made absent at the switch, of each disk; for [`Standing`](crate::Standing)'s reader.
    pub fn residual(&self) -> Option<&[u64]> {
        self.residual.as_deref()
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let (role, state) = match self.state {
            State::Source(state) => (Role::Source, serde_json::to_value(state)),
            State::Target(state) => (Role::Target, serde_json::to_value(state)),
        };
        let disks = self.plan.disks.iter().enumerate().map(|(index, disk)| WireDisk {
            uuid: disk.id.to_string(),
            epoch: self.epoch(disk).0,
            bytes: disk.bytes,
            residual: self.residual.as_ref().and_then(|residual| residual.get(index).copied()),
        });
        let wire = WireRecord {
            version: VERSION,
            migration: self.plan.migration.to_string(),
            role,
            state: state.unwrap_or_default(),
            term: self.term.0,
            seq: self.seq,
            peer: self.plan.peer.clone(),
            witness: self.plan.witness.clone(),
            whole: self.plan.whole,
            way_back: self.plan.way_back,
            block_bytes: self.plan.block_bytes,
            disks: disks.collect(),
            forced_from: self.forced_from.map(|term| term.0),
            let_through: self.let_through,
            bitmap: self.bitmap.map(|bitmap| bitmap.0),
        };
        serde_json::to_vec(&wire).unwrap_or_default()
    }

    /// The record of these bytes.
    pub fn decode(bytes: &[u8]) -> Result<Record, RecordError> {
        if bytes.len() > RECORD_BYTES_MAX {
            return wrong(format!("expected at most {RECORD_BYTES_MAX} bytes, found {}", bytes.len()));
        }
        let refuse = |error: serde_json::Error| RecordError(format!("not understood: {error}"));
        // The version first: a newer one may hold anything.
        let Versioned { version } = serde_json::from_slice(bytes).map_err(refuse)?;
        if version != VERSION {
            return wrong(format!(
                "expected version {VERSION}, found {version}: written by another release, which must end the migration"
            ));
        }
        let wire: WireRecord = serde_json::from_slice(bytes).map_err(refuse)?;
        let state = match wire.role {
            Role::Source => State::Source(serde_json::from_value(wire.state.clone()).map_err(refuse)?),
            Role::Target => State::Target(serde_json::from_value(wire.state.clone()).map_err(refuse)?),
        };
        let record = wire.record(state)?;
        record.check()?;
        Ok(record)
    }

    fn check(&self) -> Result<(), RecordError> {
        self.plan.check()?;
        if self.term.0 > TERM_MAX || self.forced_from.is_some_and(|from| from >= self.term) {
            return wrong(format!(
                "term {} (forced from {:?}) is not possible",
                self.term.0, self.forced_from
            ));
        }
        if self.let_through && self.side() == Side::Source {
            return wrong("a source that lets the target's writes through is not possible");
        }
        let owns = matches!(
            self.state,
            State::Target(TargetState::Owner | TargetState::Complete | TargetState::Local)
        );
        if self.let_through && !owns && self.state != State::Target(TargetState::Superseded) {
            return wrong(format!("a target that has let a write through cannot be {:?}", self.state));
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Role {
    Source,
    Target,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireRecord {
    version: u32,
    migration: String,
    role: Role,
    state: serde_json::Value,
    term: u64,
    seq: u64,
    peer: String,
    #[serde(deserialize_with = "present")]
    witness: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    whole: bool,
    #[serde(default, skip_serializing_if = "crate::message::is_zero")]
    way_back: u32,
    block_bytes: u32,
    disks: Vec<WireDisk>,
    #[serde(deserialize_with = "present")]
    forced_from: Option<u64>,
    let_through: bool,
    #[serde(deserialize_with = "present")]
    bitmap: Option<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireDisk {
    uuid: String,
    epoch: u64,
    bytes: u64,
    #[serde(deserialize_with = "present")]
    residual: Option<u64>,
}

/// A value or `null`, but not nothing: a field that is missing is a record that is not whole.
fn present<'de, D: serde::Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<T>, D::Error> {
    Option::deserialize(from)
}

impl WireRecord {
    fn record(self, state: State) -> Result<Record, RecordError> {
        let mut disks = Vec::new();
        let mut residual = Vec::new();
        for disk in &self.disks {
            let before = disk.epoch.checked_sub(self.term);
            let Some(epoch_before) = before.map(Epoch) else {
                return wrong(format!("disk {} has epoch {} in term {}", disk.uuid, disk.epoch, self.term));
            };
            disks.push(Disk { id: disk.uuid.parse().map_err(RecordError)?, bytes: disk.bytes, epoch_before });
            residual.extend(disk.residual);
        }
        if !residual.is_empty() && residual.len() != disks.len() {
            return wrong("some disks have a residual and some have none");
        }
        let plan = Plan {
            migration: self.migration.parse().map_err(RecordError)?,
            disks,
            block_bytes: self.block_bytes,
            peer: self.peer,
            witness: self.witness,
            whole: self.whole,
            way_back: self.way_back,
        };
        Ok(Record {
            plan: Arc::new(plan),
            state,
            term: Term(self.term),
            seq: self.seq,
            forced_from: self.forced_from.map(Term),
            let_through: self.let_through,
            bitmap: self.bitmap.map(BitmapId),
            residual: (!residual.is_empty()).then_some(residual),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plan() -> Plan {
        let disk = |n: u128, epoch| Disk {
            id: DiskId(uuid::Uuid::from_u128(n)),
            bytes: 10_000_000,
            epoch_before: Epoch(epoch),
        };
        Plan {
            migration: MigrationId(uuid::Uuid::from_u128(1)),
            disks: vec![disk(2, 42), disk(3, 7)],
            block_bytes: 65536,
            peer: "b.example:10809".into(),
            witness: None,
            whole: true,
            way_back: 300,
        }
    }

    fn owner() -> Record {
        let mut record = Record::new(plan(), State::Target(TargetState::Owner)).unwrap();
        (record.term, record.seq, record.let_through) = (Term(1), 9, true);
        (record.bitmap, record.residual) = (Some(BitmapId(77)), Some(vec![3, 0]));
        record
    }

    #[test]
    fn a_record_comes_back_as_it_was_with_the_epoch_of_each_disk() {
        let bytes = owner().encode();
        assert_eq!(Record::decode(&bytes).unwrap(), owner());
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.contains(r#""epoch":43"#) && text.contains(r#""epoch":8"#), "{text}");
        let source = Record::new(plan(), State::Source(SourceState::Prepared)).unwrap();
        assert_eq!(Record::decode(&source.encode()).unwrap(), source);
    }

    #[test]
    fn what_is_unknown_missing_or_contradictory_in_a_record_is_refused() {
        let text = String::from_utf8(owner().encode()).unwrap();
        for (from, to) in [
            (r#""version":1"#, r#""version":2"#),
            (r#""version":1"#, r#""version":1,"more":0"#),
            (r#""seq":9,"#, ""),
            (r#""witness":null,"#, ""),
            (r#""whole":true"#, r#""whole":1"#),
            (r#""way_back":300"#, r#""way_back":-1"#),
            (r#""role":"target""#, r#""role":"source""#),
            (r#""state":"owner""#, r#""state":"owned""#),
            (r#""state":"owner""#, r#""state":"prepared""#),
            (r#""state":"owner""#, r#""state":"giving_back""#),
            (r#""term":1"#, r#""term":9"#),
            (r#""term":1"#, r#""term":-1"#),
            (r#""forced_from":null"#, r#""forced_from":1"#),
            (r#""epoch":43"#, r#""epoch":18446744073709551615"#),
            (r#""residual":3"#, r#""residual":null"#),
            (r#""block_bytes":65536"#, r#""block_bytes":65537"#),
            (r#""bytes":10000000"#, r#""bytes":18446744073709551615"#),
            ("00000000-0000-0000-0000-000000000003", "00000000-0000-0000-0000-000000000002"),
            ("b.example:10809", ""),
        ] {
            let changed = text.replacen(from, to, 1);
            assert_ne!(changed, text, "{from}");
            assert!(Record::decode(changed.as_bytes()).is_err(), "{from} → {to}");
        }
        assert!(Record::decode(&text.as_bytes()[..text.len() - 1]).is_err());
        assert!(Record::decode(&vec![b' '; RECORD_BYTES_MAX + 1]).is_err());
        assert!(Record::decode(format!("{text}{text}").as_bytes()).is_err());
    }

    #[test]
    fn a_machine_without_disks_is_no_plan() {
        let mut plan = plan();
        plan.disks.clear();
        assert!(plan.check().is_err());
    }

    proptest! {
        #[test]
        fn bytes_from_anywhere_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), at in 0usize..600) {
            let _ = Record::decode(&bytes);
            let mut text = owner().encode();
            let at = at % text.len();
            text.splice(at..at, bytes.into_iter().take(3));
            let _ = Record::decode(&text);
        }
    }
}
