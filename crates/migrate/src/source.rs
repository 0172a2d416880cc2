//! The source of a migration: has the disks, offers them, and takes them back where that is still possible.
//!
//! ```text
//! SERVING ─ PREPARED ─(drain, fence, seal)─ OFFERED ─ accepted ─ HANDED_OVER ─ complete ─ RELEASED
//!               └──────── withdraw, term + 2 ───┘                    └ back offer ─ TAKING_BACK ─ confirm ─ SERVING
//! ```
//!
//! The order of a handover: hold the guest, drain, set the fence, sync and seal, record OFFERED, offer; when it is
//! accepted record HANDED_OVER (the only irrevocable step; with a witness its swap comes first), confirm. The order of a
//! withdraw, a hand-back and a reclaim: record, close `.base`, take the fence away, open the gate.
//!
//! What never happens: a guest's request runs after OFFERED is on the disk and before a record of a higher term is; the
//! machine can be started by its image's path in between; the disk is confirmed and withdrawn. One operation is awaited
//! at a time; until it ends every other input comes back as [`Busy`], but a timeout while writes drain.

use infill_base::IoResult;

use crate::Busy;
use crate::durable::source::View;
use crate::durable::{Durable, Pending, Settled};
use crate::fault::{Fault, Planted};
use crate::gate::{Gate, SourcePhase, source_gate};
use crate::ids::{BitmapId, Round, Side, TERM_SPOKEN_MAX, Term};
use crate::message::{Body, Holder, Message, Outgoing, Standing, Swap};
use crate::record::{Plan, Record, RecordError, SourceState, State};
use crate::set::BlockSet;

/// What the source is told.
#[derive(Debug)]
pub enum SourceInput {
    /// The end of [`SourceAction::Persist`].
    Settled(Settled),
    /// The end of [`SourceAction::Drain`].
    Drained(Drain),
    /// The end of [`SourceAction::SetFence`].
    FenceSet(IoResult<()>),
    /// The end of [`SourceAction::Seal`]: for each disk, what its bitmap has as residual.
    Sealed(IoResult<Vec<BlockSet>>),
    /// The end of [`SourceAction::Thaw`].
    Thawed(IoResult<()>),
    /// A message of the peer.
    Message(Message),
    /// The peer's answer to a question that was asked after the restart.
    Peer(Standing),
    /// The peer has not answered for as long as it is waited for.
    PeerSilent,
    /// What the witness has, in answer to a swap or a question.
    Witness(Holder),
    /// New bitmaps of all disks record from now on: the warming may begin.
    Warm,
    /// The bitmaps' round was closed: for each disk, what it gave.
    NextRound(Vec<BlockSet>),
    /// Change hands now.
    Freeze,
    /// Take the offer back.
    Withdraw,
    /// End the migration; the disk stays here, or comes back if it still can.
    Abort,
    /// Take the disk back without the peer, with the loss of what it has written. The operator's word that it is dead.
    Reclaim,
    /// The freeze or the offer takes too long.
    Timeout,
    /// Say again what is not answered.
    Resend,
    /// A read or write came on a session that was open at the freeze, and waits at [`Gate::AskBack`].
    OldSession,
}

/// What the source wants done. In order.
#[derive(Debug)]
pub enum SourceAction {
    /// Write and sync the record, then give [`SourceInput::Settled`].
    Persist(Pending),
    /// Send, once; it may get lost.
    Send(Outgoing),
    /// Wait until no request of the guest is in flight.
    Drain(Drain),
    /// Make the image un-startable without us, durably. May be set already.
    SetFence,
    /// Sync the image, seal it, compute the residual.
    Seal,
    /// Close `.base` and its reads, unseal the image, take the fence away, durably. Either may not be there.
    Thaw,
    /// Tell the bitmaps that this round's set is applied.
    Applied(Round),
    /// The target has read the round: time for another, or for the freeze.
    RoundRead(Round),
    /// Drop the bitmaps.
    StopBitmaps,
    /// Ask the peer where it stands.
    AskPeer,
    /// Ask the witness for this.
    Swap(Swap),
    /// Ask the witness who owns the disks.
    AskWitness,
    /// The image may go.
    Release,
    /// Not possible now; why, and what to do.
    Refuse(&'static str),
    /// The record or the fence could not be written: the gate is closed until a restart.
    Fail(String),
}

/// Which freeze is drained for: the late end of one that was given up says nothing of the next.
#[derive(Debug)]
#[must_use = "the freeze goes on once it is drained"]
#[cfg_attr(feature = "planted-faults", derive(Clone, PartialEq, Eq, Hash))]
pub struct Drain(u32);

/// What the peer can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Exports {
    /// The live image, read-only.
    pub live: bool,
    /// The frozen one, under the epoch of this term.
    pub base: Option<Term>,
}

/// What is awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Awaited {
    Record,
    Fence,
    Seal,
    Thaw,
}

/// The warming, as the target is told of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Warming {
    bitmap: BitmapId,
    round: Round,
    dirty: Vec<BlockSet>,
    applied: bool,
}

/// How an offer is to end, as far as the witness was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Decision {
    HandOver,
    Withdraw,
}

/// The source's machine.
#[derive(Debug)]
#[cfg_attr(feature = "planted-faults", derive(Clone, PartialEq, Eq, Hash))]
pub struct Source {
    durable: Durable,
    phase: SourcePhase,
    awaited: Option<Awaited>,
    linked: bool,
    warming: Option<Warming>,
    /// The residual, to say the offer again; gone after a restart.
    offered: Option<Vec<BlockSet>>,
    /// The witness was asked for this.
    decision: Option<Decision>,
    /// Freezes that were begun.
    drains: u32,
    old_sessions: bool,
    asking_back: bool,
    ending: bool,
    /// The higher term that was met.
    yields_to: Option<Term>,
    planted: Planted,
}

type Actions = Vec<SourceAction>;
use SourceAction::{Persist, Send};

impl Source {
    /// Begins a migration of disks that are the source's, and run.
    pub fn prepare(plan: Plan) -> Result<(Source, Actions), RecordError> {
        let record = Record::new(plan, State::Source(SourceState::Serving))?;
        let mut source = Source::of(Durable::loaded(record), SourcePhase::Settled);
        let actions = source.persist(SourceState::Prepared, Term::FIRST);
        Ok((source, actions))
    }

    /// After a restart, from the last record that was written; it must be synced by now.
    pub fn restart(record: Record) -> Result<(Source, Actions), RecordError> {
        let State::Source(state) = record.state else {
            return Err(RecordError::of_other_side(Side::Source));
        };
        // What was never offered is the source's. For the rest an operator may have decided otherwise meanwhile.
        let may_open = matches!(
            state,
            SourceState::Serving | SourceState::Prepared | SourceState::Offered | SourceState::TakingBack
        );
        let ask = may_open && record.term > Term::FIRST;
        let mut source = Source::of(Durable::loaded(record), SourcePhase::Settled);
        let actions = match state {
            _ if ask => {
                source.phase = SourcePhase::Unasked;
                source.announce()
            }
            SourceState::Serving | SourceState::Prepared => source.thaw(),
            _ => source.announce(),
        };
        Ok((source, actions))
    }

    fn of(durable: Durable, phase: SourcePhase) -> Source {
        Source {
            durable,
            phase,
            awaited: None,
            linked: false,
            warming: None,
            offered: None,
            decision: None,
            drains: 0,
            old_sessions: false,
            asking_back: false,
            ending: false,
            yields_to: None,
            planted: Planted::default(),
        }
    }

    /// Makes a mistake.
    #[cfg(feature = "planted-faults")]
    pub fn plant(&mut self, fault: Option<Fault>) {
        self.planted = Planted::new(fault);
        if self.planted.is(Fault::OpensUnasked) && self.phase == SourcePhase::Unasked {
            self.phase = SourcePhase::Settled;
        }
    }

    /// The record that is on the disk.
    pub fn record(&self) -> &Record {
        self.durable.record()
    }

    /// What a peer that asks after its restart is answered. `None` while that may be about to change: it asks again.
    pub fn standing(&self) -> Option<Standing> {
        let changes = self.awaited == Some(Awaited::Record) || self.state() == SourceState::Reclaiming;
        (!changes && self.phase != SourcePhase::Failed).then(|| self.durable.standing())
    }

    /// What happens to a guest's requests now.
    pub fn gate(&self) -> Gate {
        source_gate(self.state(), self.phase, self.old_sessions)
    }

    /// What is exported now. Whatever is not in it any more is closed before the gate opens further.
    pub fn exports(&self) -> Exports {
        let up = !matches!(self.phase, SourcePhase::Failed | SourcePhase::Yielding);
        let frozen = matches!(
            self.state(),
            SourceState::Offered
                | SourceState::HandedOver
                | SourceState::TakingBack
                | SourceState::Reclaiming
        );
        Exports {
            live: up && self.state() == SourceState::Prepared,
            base: (up && frozen && self.phase != SourcePhase::Thawing).then(|| self.term()),
        }
    }

    /// Whether the target has said that its overlays exist.
    pub fn is_linked(&self) -> bool {
        self.linked
    }

    /// The round that the target was told to read, if any.
    pub fn round(&self) -> Option<Round> {
        self.warming.as_ref().map(|warming| warming.round)
    }

    /// What it is about.
    pub fn phase(&self) -> SourcePhase {
        self.phase
    }

    /// Whether the end of an operation is awaited.
    pub fn busy(&self) -> bool {
        self.awaited.is_some()
    }

    fn state(&self) -> SourceState {
        match self.record().state {
            State::Source(state) => state,
            State::Target(_) => SourceState::Superseded,
        }
    }

    fn term(&self) -> Term {
        self.record().term
    }

    fn witnessed(&self) -> bool {
        self.record().plan.witness.is_some()
    }

    /// Takes an input and tells what is to be done.
    pub fn handle(&mut self, input: SourceInput) -> Result<Actions, Busy<SourceInput>> {
        if self.phase == SourcePhase::Failed {
            return Ok(vec![]);
        }
        match (input, self.awaited) {
            (SourceInput::Settled(settled), Some(Awaited::Record)) => Ok(self.settled(settled)),
            (SourceInput::FenceSet(outcome), Some(Awaited::Fence)) => Ok(self.fence_set(outcome)),
            (SourceInput::Sealed(outcome), Some(Awaited::Seal)) => Ok(self.sealed(outcome)),
            (SourceInput::Thawed(outcome), Some(Awaited::Thaw)) => Ok(self.thawed(outcome)),
            (input, Some(_)) => Err(Busy(input)),
            (input, None) => Ok(self.input(input)),
        }
    }

    fn input(&mut self, input: SourceInput) -> Actions {
        match input {
            SourceInput::Drained(Drain(nth)) if self.phase == SourcePhase::Draining && nth == self.drains => {
                self.drained()
            }
            SourceInput::Message(message) => self.message(message),
            SourceInput::Peer(standing) => self.peer(standing),
            SourceInput::PeerSilent => self.asked(),
            SourceInput::Witness(holder) => self.witness(holder),
            SourceInput::Warm => self.warm(),
            SourceInput::NextRound(dirty) => self.next_round(dirty),
            SourceInput::Freeze => self.freeze(),
            SourceInput::Withdraw => self.withdraw(),
            SourceInput::Abort => self.abort(),
            SourceInput::Reclaim => self.reclaim(),
            SourceInput::Timeout => self.timeout(),
            SourceInput::Resend => self.announce(),
            SourceInput::OldSession if self.gate() == Gate::AskBack => self.ask_back(),
            // A guest that asks nothing any more, and ends of operations that nobody awaits.
            _ => vec![],
        }
    }

    // What leads to another record.

    fn persist(&mut self, state: SourceState, term: Term) -> Actions {
        let record = self.durable.successor(State::Source(state), term);
        self.write(record)
    }

    fn write(&mut self, record: Record) -> Actions {
        self.awaited = Some(Awaited::Record);
        vec![Persist(Pending::new(record))]
    }

    fn settled(&mut self, settled: Settled) -> Actions {
        self.awaited = None;
        let (before, bitmap) = (self.state(), self.record().bitmap);
        match settled.durable() {
            Ok(durable) => self.durable = durable,
            Err(error) => return self.fail(format!("the migration's record cannot be written: {error}")),
        }
        self.decision = None;
        match self.durable.source() {
            View::Serving(proof) => {
                let claim = Send(proof.claim());
                self.ending = false;
                self.asking_back = false;
                self.warming = None;
                let rest = match (before, self.phase) {
                    (SourceState::Prepared, _) => vec![],
                    (_, SourcePhase::Unasked) => self.announce(),
                    _ => self.thaw(),
                };
                [claim, SourceAction::StopBitmaps].into_iter().chain(rest).collect()
            }
            View::Prepared(proof) if before == SourceState::Offered => {
                let claim = Send(proof.claim());
                self.offered = None;
                // Withdrawn by the witness before the peer was asked: the gate still waits for that.
                let rest = if self.phase == SourcePhase::Unasked { self.announce() } else { self.thaw() };
                std::iter::once(claim).chain(rest).collect()
            }
            View::Offered(_) => {
                self.phase = SourcePhase::Settled;
                self.announce()
            }
            View::HandedOver(_) => {
                (self.phase, self.offered, self.warming) = (SourcePhase::Settled, None, None);
                let late = self.planted.is(Fault::FenceAfterHandover).then(|| self.set_fence());
                let stop = [SourceAction::StopBitmaps];
                stop.into_iter().chain(self.announce()).chain(late.into_iter().flatten()).collect()
            }
            View::Released(_) => std::iter::once(SourceAction::Release).chain(self.announce()).collect(),
            View::Superseded(_) => {
                (self.phase, self.yields_to, self.warming) = (SourcePhase::Settled, None, None);
                vec![SourceAction::StopBitmaps]
            }
            View::Prepared(_) | View::TakingBack(_) | View::Reclaiming(_) => match self.record().bitmap {
                Some(new) if bitmap != Some(new) => self.bitmaps_named(new),
                _ => self.announce(),
            },
        }
    }

    fn fail(&mut self, why: String) -> Actions {
        self.phase = SourcePhase::Failed;
        vec![SourceAction::Fail(why)]
    }

    // PREPARED: warming, freezing.

    fn warm(&mut self) -> Actions {
        let ready =
            self.state() == SourceState::Prepared && self.phase == SourcePhase::Settled && self.linked;
        if !ready || self.warming.is_some() {
            return vec![SourceAction::Refuse(
                "the disk is not linked, or is warming already: look at its state",
            )];
        }
        let mut record = self.durable.successor(State::Source(SourceState::Prepared), self.term());
        record.bitmap = Some(BitmapId(record.seq));
        self.write(record)
    }

    /// The record that names them is on the disk.
    fn bitmaps_named(&mut self, bitmap: BitmapId) -> Actions {
        let plan = &self.record().plan;
        let dirty = plan.disks.iter().map(|disk| BlockSet::empty(plan.blocks_of(disk))).collect();
        self.warming = Some(Warming { bitmap, round: Round(1), dirty, applied: false });
        self.announce()
    }

    fn next_round(&mut self, dirty: Vec<BlockSet>) -> Actions {
        let fits = self.record().plan.fits(&dirty);
        match &mut self.warming {
            Some(warming) if fits && warming.round.0 < crate::ids::ROUNDS_MAX => {
                (warming.round, warming.dirty) = (Round(warming.round.0 + 1), dirty);
                warming.applied = false;
                self.announce()
            }
            _ => vec![SourceAction::Refuse("no further round of warming is possible: change hands")],
        }
    }

    fn freeze(&mut self) -> Actions {
        let ready =
            self.state() == SourceState::Prepared && self.phase == SourcePhase::Settled && self.linked;
        if !ready || self.ending || self.term().0 > TERM_SPOKEN_MAX {
            return vec![SourceAction::Refuse(
                "the disk cannot be frozen now: look at its state, and wait for the link",
            )];
        }
        (self.phase, self.old_sessions) = (SourcePhase::Draining, true);
        self.drains = self.drains.wrapping_add(1);
        vec![SourceAction::Drain(Drain(self.drains))]
    }

    fn drained(&mut self) -> Actions {
        if self.planted.is(Fault::FenceAfterHandover) {
            return self.seal();
        }
        self.phase = SourcePhase::Fencing;
        self.set_fence()
    }

    fn set_fence(&mut self) -> Actions {
        self.awaited = Some(Awaited::Fence);
        vec![SourceAction::SetFence]
    }

    fn fence_set(&mut self, outcome: IoResult<()>) -> Actions {
        self.awaited = None;
        match (outcome, self.phase, self.yields_to) {
            (Err(error), SourcePhase::Yielding, _) => self.fail(format!("the fence cannot be set: {error}")),
            (Ok(()), SourcePhase::Yielding, Some(term)) => self.persist(SourceState::Superseded, term),
            (Ok(()), SourcePhase::Fencing, _) => self.seal(),
            (Err(_), SourcePhase::Fencing, _) => self.thaw(),
            _ => vec![],
        }
    }

    fn seal(&mut self) -> Actions {
        (self.phase, self.awaited) = (SourcePhase::Sealing, Some(Awaited::Seal));
        vec![SourceAction::Seal]
    }

    fn sealed(&mut self, outcome: IoResult<Vec<BlockSet>>) -> Actions {
        self.awaited = None;
        match outcome {
            Ok(residual) if self.record().plan.fits(&residual) => {
                self.phase = SourcePhase::Sealed;
                let next = self.term().next();
                let mut record = self.durable.successor(State::Source(SourceState::Offered), next);
                record.residual = Some(residual.iter().map(BlockSet::count).collect());
                self.offered = Some(residual);
                self.write(record)
            }
            _ => self.thaw(),
        }
    }

    fn thaw(&mut self) -> Actions {
        (self.phase, self.awaited) = (SourcePhase::Thawing, Some(Awaited::Thaw));
        vec![SourceAction::Thaw]
    }

    fn thawed(&mut self, outcome: IoResult<()>) -> Actions {
        self.awaited = None;
        if let Err(error) = outcome {
            return self.fail(format!("the fence cannot be taken away: {error}"));
        }
        self.phase = SourcePhase::Settled;
        if self.planted.is(Fault::ThawsBeforeRecord) && self.state() == SourceState::Offered {
            return self.persist(SourceState::Prepared, self.term().next());
        }
        self.old_sessions = false;
        if self.state() == SourceState::Prepared && self.ending {
            return self.persist(SourceState::Serving, self.term());
        }
        self.announce()
    }

    fn timeout(&mut self) -> Actions {
        match (self.phase, self.state()) {
            (SourcePhase::Draining, _) => self.thaw(),
            (SourcePhase::Settled, SourceState::Offered) => self.withdraw(),
            _ => vec![],
        }
    }

    // OFFERED: one of two ends.

    fn withdraw(&mut self) -> Actions {
        let View::Offered(proof) = self.durable.source() else {
            return vec![SourceAction::Refuse(
                "nothing is offered, or it is handed over: abort asks for it back",
            )];
        };
        if self.phase == SourcePhase::Unasked {
            return vec![SourceAction::Refuse("the peer is asked first: wait")];
        }
        if self.witnessed() && !self.planted.is(Fault::WithdrawsWithoutWitness) {
            let swap = proof.swap_to_withdraw();
            self.decision = Some(Decision::Withdraw);
            return vec![SourceAction::Swap(swap)];
        }
        if self.planted.is(Fault::ThawsBeforeRecord) {
            return self.thaw();
        }
        if self.planted.is(Fault::TermUsedAgain) {
            return self.persist(SourceState::Prepared, Term(self.term().0 - 1));
        }
        self.persist(SourceState::Prepared, self.term().next())
    }

    fn accepted(&mut self) -> Actions {
        let View::Offered(proof) = self.durable.source() else {
            return vec![];
        };
        if self.witnessed() {
            if self.decision == Some(Decision::Withdraw) {
                return vec![];
            }
            let swap = proof.swap_to_hand_over();
            self.decision = Some(Decision::HandOver);
            return vec![SourceAction::Swap(swap)];
        }
        let actions = self.persist(SourceState::HandedOver, self.term());
        #[cfg(feature = "planted-faults")]
        if self.planted.is(Fault::ConfirmsBeforeSync)
            && let Some(Persist(pending)) = actions.first()
            && let View::HandedOver(proof) = Durable::forged(pending.record()).source()
        {
            let confirm = Send(proof.confirm());
            return actions.into_iter().chain([confirm]).collect();
        }
        actions
    }

    // HANDED_OVER: asked back, taken back, released.

    fn ask_back(&mut self) -> Actions {
        self.asking_back = true;
        match self.durable.source() {
            View::HandedOver(proof) => vec![Send(proof.ask_back())],
            _ => vec![],
        }
    }

    fn abort(&mut self) -> Actions {
        match (self.state(), self.phase) {
            (SourceState::Prepared, SourcePhase::Settled) => self.persist(SourceState::Serving, self.term()),
            (SourceState::Prepared, SourcePhase::Draining) => {
                self.ending = true;
                self.thaw()
            }
            (SourceState::Prepared, _) => {
                self.ending = true;
                vec![]
            }
            (SourceState::Offered, _) => {
                self.ending = self.phase != SourcePhase::Unasked;
                self.withdraw()
            }
            (SourceState::HandedOver, _) => self.ask_back(),
            (SourceState::TakingBack | SourceState::Reclaiming | SourceState::Serving, _) => self.announce(),
            (SourceState::Released | SourceState::Superseded, _) => {
                vec![SourceAction::Refuse("the disk is the peer's for good: migrate it from there")]
            }
        }
    }

    fn reclaim(&mut self) -> Actions {
        // Called again.
        let reclaimed = self.state() == SourceState::Serving && self.record().forced_from.is_some();
        if self.state() == SourceState::Reclaiming || reclaimed {
            return self.announce();
        }
        let possible = matches!(self.state(), SourceState::HandedOver | SourceState::TakingBack);
        if !possible || self.term().0 > TERM_SPOKEN_MAX {
            return vec![SourceAction::Refuse(
                "only a disk that is handed over, and not complete there, is reclaimed",
            )];
        }
        // Durable before the witness is asked: it may do it long after, and until then nothing else may end this state.
        if self.witnessed() {
            return self.persist(SourceState::Reclaiming, self.term());
        }
        self.force()
    }

    fn force(&mut self) -> Actions {
        let (from, term) = (self.term(), self.term().forced());
        let mut record = self.durable.successor(State::Source(SourceState::Serving), term);
        record.forced_from = Some(from);
        self.write(record)
    }

    /// The peer owns the disk in a term, by an operator's word if it says what that ended, or by the witness's.
    fn yield_to(&mut self, term: Term, forced_from: Option<Term>) -> Actions {
        let mine = self.term();
        match self.state() {
            // What was frozen for that term is what the peer has accepted: it stays readable for it.
            SourceState::Offered if term == mine || (term > mine && forced_from == Some(mine)) => {
                self.persist(SourceState::HandedOver, term)
            }
            SourceState::HandedOver | SourceState::TakingBack | SourceState::Reclaiming if term > mine => {
                self.persist(SourceState::HandedOver, term)
            }
            SourceState::Serving | SourceState::Prepared | SourceState::Offered if term > mine => {
                (self.phase, self.yields_to) = (SourcePhase::Yielding, Some(term));
                self.set_fence()
            }
            _ => vec![],
        }
    }

    // Inputs from others.

    fn message(&mut self, message: Message) -> Actions {
        let (mine, term) = (self.term(), message.term);
        if message.migration != self.record().plan.migration
            || term.0 > TERM_SPOKEN_MAX + 2 * crate::FORCED_TERMS
        {
            return vec![SourceAction::Refuse("another migration, or a term that is not possible")];
        }
        match (message.body, self.durable.source()) {
            (Body::Claim { forced_from, .. }, _) => self.yield_to(term, forced_from),
            (Body::Prepared, View::Prepared(_)) => self.linked(),
            (Body::Applied { bitmap, round }, View::Prepared(_)) => self.applied(bitmap, round),
            (Body::RoundRead { bitmap, round }, View::Prepared(_)) if self.is_reading(bitmap, round) => {
                vec![SourceAction::RoundRead(round)]
            }
            (Body::Accepted, View::Offered(_)) if term == mine => self.accepted(),
            (Body::Accepted, View::HandedOver(proof)) if term == mine => vec![Send(proof.confirm())],
            (Body::Accepted, View::Prepared(proof)) if term < mine => vec![Send(proof.claim())],
            (Body::BackOffer, View::HandedOver(_)) if term > mine => {
                self.persist(SourceState::TakingBack, term)
            }
            (Body::BackOffer, View::TakingBack(proof)) if term == mine => vec![Send(proof.accepted())],
            (Body::BackConfirm, View::TakingBack(_)) if term == mine => {
                self.persist(SourceState::Serving, term)
            }
            (Body::BackRefused, View::HandedOver(_)) if term == mine => {
                (self.asking_back, self.old_sessions) = (false, false);
                vec![]
            }
            (Body::Complete, View::HandedOver(_)) if term == mine => {
                self.persist(SourceState::Released, term)
            }
            (Body::Complete, View::Released(proof)) if term == mine => vec![Send(proof.released())],
            (Body::Aborted, View::Prepared(_)) => self.abort(),
            (Body::Aborted, View::Offered(_)) if term < mine => self.abort(),
            // Whoever speaks of the past, or does not know the end yet, is told.
            (Body::Prepared | Body::Accepted | Body::BackOffer | Body::Complete, View::Serving(proof)) => {
                vec![Send(proof.claim())]
            }
            _ => vec![],
        }
    }

    fn linked(&mut self) -> Actions {
        self.linked = true;
        // A target that says so again has restarted, and does not know what to read.
        match &mut self.warming {
            Some(warming) => warming.applied = false,
            None => return vec![],
        }
        self.announce()
    }

    fn is_reading(&self, bitmap: BitmapId, round: Round) -> bool {
        self.warming.as_ref().is_some_and(|warming| (warming.bitmap, warming.round) == (bitmap, round))
    }

    fn applied(&mut self, bitmap: BitmapId, round: Round) -> Actions {
        if !self.is_reading(bitmap, round) {
            return vec![];
        }
        self.warming.iter_mut().for_each(|warming| warming.applied = true);
        vec![SourceAction::Applied(round)]
    }

    fn peer(&mut self, standing: Standing) -> Actions {
        if matches!(standing.state, State::Target(_)) && standing.owns() {
            let actions = self.yield_to(standing.term, standing.forced_from);
            if !actions.is_empty() {
                return actions;
            }
        }
        self.asked()
    }

    fn asked(&mut self) -> Actions {
        match (self.phase, self.state()) {
            (SourcePhase::Unasked, SourceState::Serving | SourceState::Prepared) => self.thaw(),
            (SourcePhase::Unasked, _) => {
                self.phase = SourcePhase::Settled;
                vec![]
            }
            _ => vec![],
        }
    }

    fn witness(&mut self, has: Holder) -> Actions {
        let (mine, by_source) = (self.term(), has.side == Side::Source);
        if let View::Reclaiming(proof) = self.durable.source() {
            let to = Holder { term: mine.forced(), side: Side::Source };
            return match has.term < to.term {
                _ if has == to => self.force(),
                true => vec![SourceAction::Swap(proof.swap(has))],
                // The peer was quicker.
                false if !by_source => self.persist(SourceState::HandedOver, has.term),
                false => vec![],
            };
        }
        match self.state() {
            _ if !self.witnessed() => vec![],
            SourceState::Offered if by_source && has.term == mine.next() => {
                self.persist(SourceState::Prepared, has.term)
            }
            SourceState::TakingBack if by_source && has.term == mine => {
                self.persist(SourceState::Serving, mine)
            }
            _ if !by_source && has.term >= mine => self.yield_to(has.term, None),
            _ => vec![],
        }
    }

    /// What is said until it is answered.
    fn announce(&self) -> Actions {
        match self.durable.source() {
            View::Serving(_) | View::Prepared(_) if self.phase == SourcePhase::Unasked => {
                vec![SourceAction::AskPeer]
            }
            View::Serving(proof) => vec![Send(proof.claim())],
            View::Prepared(proof) if !self.linked => vec![Send(proof.prepare())],
            View::Prepared(proof) => match &self.warming {
                Some(Warming { bitmap, round, dirty, applied: false }) => {
                    vec![Send(proof.round(*bitmap, *round, dirty.clone()))]
                }
                _ => vec![],
            },
            View::Offered(proof) => {
                let bitmap = self.warming.as_ref().map(|warming| warming.bitmap);
                let offer = self.offered.as_ref().map(|residual| Send(proof.offer(bitmap, residual.clone())));
                let ask = (self.phase == SourcePhase::Unasked).then_some(SourceAction::AskPeer);
                let again = match self.decision {
                    Some(Decision::HandOver) => Some(SourceAction::Swap(proof.swap_to_hand_over())),
                    Some(Decision::Withdraw) => Some(SourceAction::Swap(proof.swap_to_withdraw())),
                    _ => self.witnessed().then_some(SourceAction::AskWitness),
                };
                offer.into_iter().chain(ask).chain(again).collect()
            }
            View::HandedOver(proof) => {
                let ask = self.asking_back.then(|| Send(proof.ask_back()));
                std::iter::once(Send(proof.confirm())).chain(ask).collect()
            }
            View::TakingBack(proof) => {
                let ask = (self.phase == SourcePhase::Unasked).then_some(SourceAction::AskPeer);
                let witness = self.witnessed().then_some(SourceAction::AskWitness);
                std::iter::once(Send(proof.accepted())).chain(ask).chain(witness).collect()
            }
            View::Reclaiming(_) => vec![SourceAction::AskWitness],
            View::Released(proof) => vec![Send(proof.released())],
            View::Superseded(_) => vec![],
        }
    }
}
