//! What the two sides, and a witness, say to each other. Every message is keyed by the migration, its kind and the term,
//! and may be lost, late, in any order and repeated: the same one finds the same answer.
//!
//! A received [`Message`] is only read. What is sent is an [`Outgoing`], and those that depend on a record are made by
//! a proof that the record is stable (`durable`), and in no other way.

use serde::{Deserialize, Serialize};

use crate::ids::{BitmapId, MigrationId, Round, Side, Term};
use crate::record::{Disk, SourceState, State, TargetState};
use crate::set::BlockSet;

/// A message between source and target.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// The migration.
    pub migration: MigrationId,
    /// The term that it is about; of a claim, the claimed one.
    pub term: Term,
    /// The rest.
    pub body: Body,
}

pub(crate) fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// What a message says.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Body {
    /// S → D: make an overlay for these.
    Prepare {
        /// The disks, as the source knows them.
        disks: Vec<Disk>,
        /// The unit of all sets of blocks.
        block_bytes: u32,
        /// Nothing is to be left at the source when the disks change hands.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        whole: bool,
        /// How many seconds the target, having everything, waits for a guest's write before it says so: until then the
        /// disks can be given back.
        #[serde(default, skip_serializing_if = "is_zero")]
        way_back: u32,
    },
    /// D → S: the overlay exists.
    Prepared,
    /// S → D: demote these blocks, and everything that was copied under another bitmap; then read this round.
    Round {
        /// The life of the bitmaps that record from now on.
        bitmap: BitmapId,
        /// The round.
        round: Round,
        /// For each disk, what was written in the rounds before.
        #[serde(with = "crate::wire::sets")]
        dirty: Vec<BlockSet>,
    },
    /// D → S: that is done, durably.
    Applied {
        /// Of these bitmaps.
        bitmap: BitmapId,
        /// The round.
        round: Round,
    },
    /// D → S: the round is read.
    RoundRead {
        /// Of these bitmaps.
        bitmap: BitmapId,
        /// The round.
        round: Round,
    },
    /// S → D: the disks are frozen; take them in this term.
    Offer {
        /// The bitmaps of which the residual is made; blocks that were copied under others are stale.
        bitmap: Option<BitmapId>,
        /// For each disk, what was written since the last round.
        #[serde(with = "crate::wire::sets")]
        residual: Vec<BlockSet>,
    },
    /// D → S: accepted, the residual is applied, durably.
    Accepted,
    /// S → D: the disks are yours in this term.
    Confirm,
    /// Either: the disks are the sender's in this term; what is older is void.
    Claim {
        /// The migration is over.
        ended: bool,
        /// The term that an operator's word ended at the sender.
        forced_from: Option<Term>,
    },
    /// S → D: the machine goes on here after all; give the disks of this term back.
    AskBack,
    /// D → S: no, a write was let through, or everything is here already.
    BackRefused,
    /// D → S: take the disks back in this term; nothing was written.
    BackOffer,
    /// S → D: accepted, durably.
    BackAccepted,
    /// D → S: the disks are yours in this term.
    BackConfirm,
    /// D → S: everything is here, and stable.
    Complete,
    /// S → D: then the image here is let go.
    Released,
    /// D → S: the migration is over, the overlay is dropped.
    Aborted,
}

/// A message that may be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing(pub(crate) Message);

impl Outgoing {
    /// What it says.
    pub fn message(&self) -> &Message {
        &self.0
    }

    /// For the wire.
    pub fn into_message(self) -> Message {
        self.0
    }
}

/// Who owns the disks, as the witness has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Holder {
    /// In which term.
    pub term: Term,
    /// Which side.
    pub side: Side,
}

/// What the witness is asked to do: compare, and if equal swap, for all disks of the migration in one transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Swap {
    /// Only if it has this.
    pub from: Holder,
    /// It then has this.
    pub to: Holder,
}

/// Where a side stands, from its durable record: what `whois` tells, and what a restarted peer is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Standing {
    /// The state.
    pub state: State,
    /// The term.
    pub term: Term,
    /// The term that an operator's word ended.
    pub forced_from: Option<Term>,
}

impl Standing {
    /// Whether this side may let a guest write.
    pub fn owns(&self) -> bool {
        match self.state {
            State::Source(state) => matches!(state, SourceState::Serving | SourceState::Prepared),
            State::Target(state) => {
                matches!(state, TargetState::Owner | TargetState::Complete | TargetState::Local)
            }
        }
    }
}
