//! Durable before said, by types.
//!
//! A [`Durable`] is a record that is known to be on the disk: it was read at a restart, or its [`Pending`] came back
//! [`Settled`] with the sync's success. Its view is a proof of its state, and the proofs are what messages are made of:
//! who has no record that says HANDED_OVER can make no `Confirm`.

use infill_base::{IoError, IoResult};

use crate::ids::{BitmapId, Round, Side, Term};
use crate::message::{Body, Holder, Message, Outgoing, Standing, Swap};
use crate::record::{Record, SourceState, State, TargetState};
use crate::set::BlockSet;

/// A record that is to be written and synced, whole and in place of the last one of this migration on this side.
#[derive(Debug)]
#[must_use = "the machine waits until it is settled"]
#[cfg_attr(feature = "planted-faults", derive(Clone, PartialEq, Eq, Hash))]
pub struct Pending {
    record: Record,
}

/// A record that was written and synced, or a failure after which nobody knows.
#[derive(Debug)]
pub struct Settled(IoResult<Record>);

impl Pending {
    pub(crate) fn new(record: Record) -> Pending {
        Pending { record }
    }

    /// What to write.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// What came of it: `Ok` only after the sync of what was written has returned.
    pub fn settled(self, outcome: IoResult<()>) -> Settled {
        Settled(outcome.map(|()| self.record))
    }
}

impl Settled {
    pub(crate) fn durable(self) -> Result<Durable, IoError> {
        self.0.map(Durable)
    }
}

/// A record that is on the disk.
#[derive(Debug)]
#[cfg_attr(feature = "planted-faults", derive(Clone, PartialEq, Eq, Hash))]
pub(crate) struct Durable(Record);

macro_rules! proofs {
    ($view:ident: $($name:ident),*) => {
        /// What the record on the disk says, each state a proof of itself.
        #[expect(dead_code, reason = "some states prove nothing that is said")]
        pub(crate) enum $view<'a> {
            $($name($name<'a>),)*
        }
        $(
            /// Proof that the record on the disk says so.
            #[derive(Clone, Copy)]
            pub(crate) struct $name<'a>(&'a Record);

            impl $name<'_> {
                #[allow(dead_code, reason = "some states prove nothing that is said")]
                fn say(self, body: Body) -> Outgoing {
                    say(self.0, body)
                }
            }
        )*
    };
}

fn say(record: &Record, body: Body) -> Outgoing {
    Outgoing(Message { migration: record.plan.migration, term: record.term, body })
}

/// Proofs of the source's states.
pub(crate) mod source {
    use super::*;

    proofs!(View: Serving, Prepared, Offered, HandedOver, TakingBack, Reclaiming, Released, Superseded);

    impl Durable {
        pub(crate) fn source(&self) -> View<'_> {
            match self.0.state {
                State::Source(SourceState::Serving) => View::Serving(Serving(&self.0)),
                State::Source(SourceState::Prepared) => View::Prepared(Prepared(&self.0)),
                State::Source(SourceState::Offered) => View::Offered(Offered(&self.0)),
                State::Source(SourceState::HandedOver) => View::HandedOver(HandedOver(&self.0)),
                State::Source(SourceState::TakingBack) => View::TakingBack(TakingBack(&self.0)),
                State::Source(SourceState::Reclaiming) => View::Reclaiming(Reclaiming(&self.0)),
                State::Source(SourceState::Released) => View::Released(Released(&self.0)),
                // A target's record in a source's machine says nothing that it could send.
                State::Source(SourceState::Superseded) | State::Target(_) => {
                    View::Superseded(Superseded(&self.0))
                }
            }
        }
    }

    impl Serving<'_> {
        pub(crate) fn claim(self) -> Outgoing {
            self.say(Body::Claim { ended: true, forced_from: self.0.forced_from })
        }
    }

    impl Prepared<'_> {
        pub(crate) fn prepare(self) -> Outgoing {
            let plan = &self.0.plan;
            self.say(Body::Prepare {
                disks: plan.disks.clone(),
                block_bytes: plan.block_bytes,
                whole: plan.whole,
                way_back: plan.way_back,
            })
        }

        pub(crate) fn round(self, bitmap: BitmapId, round: Round, dirty: Vec<BlockSet>) -> Outgoing {
            self.say(Body::Round { bitmap, round, dirty })
        }

        pub(crate) fn claim(self) -> Outgoing {
            self.say(Body::Claim { ended: false, forced_from: self.0.forced_from })
        }
    }

    impl Offered<'_> {
        pub(crate) fn offer(self, bitmap: Option<BitmapId>, residual: Vec<BlockSet>) -> Outgoing {
            self.say(Body::Offer { bitmap, residual })
        }

        fn before(self) -> Holder {
            Holder { term: Term(self.0.term.0.saturating_sub(1)), side: Side::Source }
        }

        pub(crate) fn swap_to_hand_over(self) -> Swap {
            Swap { from: self.before(), to: Holder { term: self.0.term, side: Side::Target } }
        }

        pub(crate) fn swap_to_withdraw(self) -> Swap {
            Swap { from: self.before(), to: Holder { term: self.0.term.next(), side: Side::Source } }
        }
    }

    impl HandedOver<'_> {
        pub(crate) fn confirm(self) -> Outgoing {
            self.say(Body::Confirm)
        }

        pub(crate) fn ask_back(self) -> Outgoing {
            self.say(Body::AskBack)
        }
    }

    impl TakingBack<'_> {
        pub(crate) fn accepted(self) -> Outgoing {
            self.say(Body::BackAccepted)
        }
    }

    impl Reclaiming<'_> {
        pub(crate) fn swap(self, from: Holder) -> Swap {
            Swap { from, to: Holder { term: self.0.term.forced(), side: Side::Source } }
        }
    }

    impl Released<'_> {
        pub(crate) fn released(self) -> Outgoing {
            self.say(Body::Released)
        }
    }
}

/// Proofs of the target's states.
pub(crate) mod target {
    use super::*;
    use crate::target::Demoted;

    proofs!(View: Prepared, Accepted, TakingOver, Owner, Complete, Local, GivingBack, GaveBack, Aborted, Superseded);

    impl Durable {
        pub(crate) fn target(&self) -> View<'_> {
            match self.0.state {
                State::Target(TargetState::Prepared) => View::Prepared(Prepared(&self.0)),
                State::Target(TargetState::Accepted) => View::Accepted(Accepted(&self.0)),
                State::Target(TargetState::TakingOver) => View::TakingOver(TakingOver(&self.0)),
                State::Target(TargetState::Owner) => View::Owner(Owner(&self.0)),
                State::Target(TargetState::Complete) => View::Complete(Complete(&self.0)),
                State::Target(TargetState::Local) => View::Local(Local(&self.0)),
                State::Target(TargetState::GivingBack) => View::GivingBack(GivingBack(&self.0)),
                State::Target(TargetState::GaveBack) => View::GaveBack(GaveBack(&self.0)),
                State::Target(TargetState::Aborted) => View::Aborted(Aborted(&self.0)),
                State::Target(TargetState::Superseded) | State::Source(_) => {
                    View::Superseded(Superseded(&self.0))
                }
            }
        }
    }

    fn claim(record: &Record) -> Outgoing {
        say(record, Body::Claim { ended: false, forced_from: record.forced_from })
    }

    impl Prepared<'_> {
        pub(crate) fn prepared(self) -> Outgoing {
            self.say(Body::Prepared)
        }

        /// Depends on the demotion's sync beside the record's.
        pub(crate) fn applied(self, _: &Demoted, bitmap: BitmapId, round: Round) -> Outgoing {
            self.say(Body::Applied { bitmap, round })
        }

        pub(crate) fn round_read(self, bitmap: BitmapId, round: Round) -> Outgoing {
            self.say(Body::RoundRead { bitmap, round })
        }
    }

    impl Accepted<'_> {
        pub(crate) fn accepted(self) -> Outgoing {
            self.say(Body::Accepted)
        }
    }

    impl TakingOver<'_> {
        pub(crate) fn swap(self, from: Holder) -> Swap {
            Swap { from, to: Holder { term: self.0.term.forced(), side: Side::Target } }
        }
    }

    impl Owner<'_> {
        pub(crate) fn claim(self) -> Outgoing {
            claim(self.0)
        }

        /// Only of an owner that has let a write through, so that it never grants later what it has refused.
        pub(crate) fn refuse_back(self) -> Option<Outgoing> {
            self.0.let_through.then(|| self.say(Body::BackRefused))
        }
    }

    impl Complete<'_> {
        pub(crate) fn claim(self) -> Outgoing {
            claim(self.0)
        }

        pub(crate) fn complete(self) -> Outgoing {
            self.say(Body::Complete)
        }

        pub(crate) fn refuse_back(self) -> Outgoing {
            self.say(Body::BackRefused)
        }
    }

    impl Local<'_> {
        pub(crate) fn claim(self) -> Outgoing {
            claim(self.0)
        }

        pub(crate) fn refuse_back(self) -> Outgoing {
            self.say(Body::BackRefused)
        }
    }

    impl GivingBack<'_> {
        pub(crate) fn offer(self) -> Outgoing {
            self.say(Body::BackOffer)
        }

        pub(crate) fn swap(self) -> Swap {
            let before = Term(self.0.term.0.saturating_sub(1));
            Swap {
                from: Holder { term: before, side: Side::Target },
                to: Holder { term: self.0.term, side: Side::Source },
            }
        }
    }

    impl GaveBack<'_> {
        pub(crate) fn confirm(self) -> Outgoing {
            self.say(Body::BackConfirm)
        }
    }

    impl Aborted<'_> {
        pub(crate) fn aborted(self) -> Outgoing {
            self.say(Body::Aborted)
        }
    }
}

impl Durable {
    /// A record that was read at a restart and is known to be synced, or one that changes nothing that holds without
    /// it.
    pub(crate) fn loaded(record: Record) -> Durable {
        Durable(record)
    }

    /// Says so without knowing it: for planted mistakes.
    #[cfg(feature = "planted-faults")]
    pub(crate) fn forged(record: &Record) -> Durable {
        Durable(record.clone())
    }

    pub(crate) fn record(&self) -> &Record {
        &self.0
    }

    pub(crate) fn standing(&self) -> Standing {
        Standing { state: self.0.state, term: self.0.term, forced_from: self.0.forced_from }
    }

    /// The record that follows, to be changed and written.
    pub(crate) fn successor(&self, state: State, term: Term) -> Record {
        let mut record = self.0.clone();
        record.seq += 1;
        if term != record.term {
            record.forced_from = None;
            record.residual = None;
        }
        (record.state, record.term) = (state, term);
        record
    }
}
