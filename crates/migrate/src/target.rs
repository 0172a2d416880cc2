//! The target of a migration: takes the disks, and gives them back where that is still possible.
//!
//! ```text
//! PREPARED ─ offer: demote, sync ─ ACCEPTED ─ confirm ─ OWNER ─ all here, synced ─ COMPLETE ─ released ─ LOCAL
//!     └────── claim of a higher term ─┘                   └ asked back, nothing let through ─ GIVING_BACK ─ GAVE_BACK
//! ```
//!
//! What never happens: a guest runs before the record OWNER is on the disk, which only a confirm (or the witness) brings;
//! an offer is accepted that is not newer than any that was seen; an offer is accepted, or a round's set called applied,
//! before what it makes stale is absent on the disk; a write runs before the mark is on the disk that one may have; a
//! disk with that mark is given back. One operation is awaited at a time; until it ends every other input comes back as
//! [`Busy`].

use infill_base::IoResult;

use crate::Busy;
use crate::durable::target::View;
use crate::durable::{Durable, Pending, Settled};
use crate::fault::{Fault, Planted};
use crate::gate::{Gate, target_gate};
use crate::ids::{BitmapId, Round, Side, TERM_SPOKEN_MAX, Term};
use crate::map::Filled;
use crate::message::{Body, Holder, Message, Outgoing, Standing, Swap};
use crate::record::{Plan, Record, RecordError, State, TargetState};
use crate::set::BlockSet;

/// What the target is told.
#[derive(Debug)]
pub enum TargetInput {
    /// The end of [`TargetAction::Persist`].
    Settled(Settled),
    /// The end of [`TargetAction::Demote`].
    Demoted(IoResult<Demoted>),
    /// A message of the peer.
    Message(Message),
    /// The peer's answer to a question that was asked after the restart.
    Peer(Standing),
    /// The peer has not answered for as long as it is waited for.
    PeerSilent,
    /// What the witness has, in answer to a swap or a question.
    Witness(Holder),
    /// The round was read to its end.
    RoundRead(Round),
    /// Nothing is absent any more, and that is stable.
    Filled(Filled),
    /// A write or discard of the guest waits at [`Gate::RunReads`].
    GuestWrites,
    /// Drop what was prepared.
    Abort,
    /// Own the disk without the peer. The operator's word that it is dead.
    Takeover,
    /// Say again what is not answered.
    Resend,
}

/// What the target wants done. In order.
#[derive(Debug)]
pub enum TargetAction {
    /// Write and sync the record, then give [`TargetInput::Settled`].
    Persist(Pending),
    /// Make blocks absent and sync that, then give [`TargetInput::Demoted`].
    Demote(Demotion),
    /// Send, once; it may get lost.
    Send(Outgoing),
    /// Read what is absent from the source's live export, in this round.
    ReadRound(Round),
    /// The disk is the target's: tell the maps, then open the gate; fetch what is absent from `.base`.
    Own,
    /// Ask the peer where it stands.
    AskPeer,
    /// Ask the witness for this.
    Swap(Swap),
    /// Ask the witness who owns the disks.
    AskWitness,
    /// The overlay may go.
    DropOverlay,
    /// Not possible now; why, and what to do.
    Refuse(&'static str),
    /// The record or the image could not be written: the gate is closed until a restart.
    Fail(String),
}

/// Blocks to be made absent before something is answered.
#[derive(Debug)]
#[must_use = "the machine waits until it is settled"]
#[cfg_attr(feature = "planted-faults", derive(Clone, PartialEq, Eq, Hash))]
pub struct Demotion(Option<Vec<BlockSet>>);

/// They are absent, on the disk.
#[derive(Debug)]
#[cfg_attr(feature = "planted-faults", derive(Clone, PartialEq, Eq, Hash))]
pub struct Demoted(());

impl Demotion {
    /// For each disk the blocks; `None`: all of all disks.
    pub fn sets(&self) -> Option<&[BlockSet]> {
        self.0.as_deref()
    }

    /// What came of it: `Ok` only after what was in the maps' images then was made absent and synced.
    pub fn settled(self, outcome: IoResult<()>) -> IoResult<Demoted> {
        outcome.map(|()| Demoted(()))
    }
}

/// Proof that the record on the disk says that the disk is, or was until it was given back, the target's.
#[derive(Debug)]
pub struct Ownership(());

#[cfg(test)]
impl Ownership {
    pub(crate) fn for_tests() -> Ownership {
        Ownership(())
    }
}

/// What is awaited, and what follows.
#[derive(Debug)]
#[cfg_attr(feature = "planted-faults", derive(Clone, PartialEq, Eq, Hash))]
enum Awaited {
    Record,
    /// The record that names the bitmap of what is about to be copied.
    BitmapNamed(BitmapId, Round, Demoted),
    /// The demotion that begins a round.
    Round(BitmapId, Round),
    /// The demotion of the residual.
    Residual(Term, Option<BitmapId>, Vec<u64>),
}

/// The round that is being read, or was read last.
#[derive(Debug)]
#[cfg_attr(feature = "planted-faults", derive(Clone, PartialEq, Eq, Hash))]
struct Reading {
    bitmap: BitmapId,
    round: Round,
    demoted: Demoted,
    /// To its end.
    read: bool,
}

/// The target's machine.
#[derive(Debug)]
#[cfg_attr(feature = "planted-faults", derive(Clone, PartialEq, Eq, Hash))]
pub struct Target {
    durable: Durable,
    awaited: Option<Awaited>,
    /// The round that may be read, with what it rests on.
    reading: Option<Reading>,
    /// Since the restart the peer was asked, or is known not to answer.
    asked: bool,
    failed: bool,
    /// A planted mistake: the mark that is only in memory.
    forgetful: bool,
    planted: Planted,
}

type Actions = Vec<TargetAction>;
use TargetAction::{Persist, Send};

impl Target {
    /// Begins as the source asks, once the overlays exist, durably.
    pub fn prepare(plan: Plan) -> Result<(Target, Actions), RecordError> {
        let record = Record::new(plan, State::Target(TargetState::Prepared))?;
        let mut target = Target::of(Durable::loaded(record));
        let actions = target.persist(TargetState::Prepared, Term::FIRST);
        Ok((target, actions))
    }

    /// After a restart, from the last record that was written; it must be synced by now.
    pub fn restart(record: Record) -> Result<(Target, Actions), RecordError> {
        let State::Target(state) = record.state else {
            return Err(RecordError::of_other_side(Side::Target));
        };
        let mut target = Target::of(Durable::loaded(record));
        // The source may have been declared the owner meanwhile, and what it said before may still be on its way.
        target.asked = !matches!(state, TargetState::Accepted | TargetState::Owner | TargetState::Complete);
        let actions = target.announce();
        Ok((target, actions))
    }

    fn of(durable: Durable) -> Target {
        Target {
            durable,
            awaited: None,
            reading: None,
            asked: true,
            failed: false,
            forgetful: false,
            planted: Planted::default(),
        }
    }

    /// Makes a mistake.
    #[cfg(feature = "planted-faults")]
    pub fn plant(&mut self, fault: Option<Fault>) {
        self.planted = Planted::new(fault);
        self.asked |= self.planted.is(Fault::OpensUnasked);
    }

    /// The record that is on the disk, or is about to be for the first time.
    pub fn record(&self) -> &Record {
        self.durable.record()
    }

    /// What a peer that asks after its restart is answered. `None` while that may be about to change: it asks again.
    pub fn standing(&self) -> Option<Standing> {
        let changes = self.awaited.is_some() || self.state() == TargetState::TakingOver;
        (!changes && !self.failed).then(|| self.durable.standing())
    }

    /// Whether it is restarted and waits for the peer's answer, or for its silence.
    pub fn asks_peer(&self) -> bool {
        !self.asked
    }

    /// What happens to a guest's requests now.
    pub fn gate(&self) -> Gate {
        target_gate(self.state(), self.let_through(), self.asked && !self.failed)
    }

    /// For the maps, whether the image is the truth.
    pub fn ownership(&self) -> Option<Ownership> {
        let owned = match self.state() {
            TargetState::Owner | TargetState::Complete | TargetState::Local => true,
            TargetState::GivingBack => true,
            TargetState::Prepared | TargetState::Accepted | TargetState::TakingOver => false,
            TargetState::GaveBack | TargetState::Aborted | TargetState::Superseded => false,
        };
        owned.then_some(Ownership(()))
    }

    /// The round of warming that may be read now.
    pub fn reading(&self) -> Option<Round> {
        let may = self.state() == TargetState::Prepared && !self.failed && self.awaited.is_none();
        self.reading.as_ref().filter(|_| may).map(|reading| reading.round)
    }

    /// Whether the end of an operation is awaited.
    pub fn busy(&self) -> bool {
        self.awaited.is_some()
    }

    fn state(&self) -> TargetState {
        match self.record().state {
            State::Target(state) => state,
            State::Source(_) => TargetState::Superseded,
        }
    }

    fn term(&self) -> Term {
        self.record().term
    }

    fn witnessed(&self) -> bool {
        self.record().plan.witness.is_some()
    }

    fn let_through(&self) -> bool {
        self.record().let_through || self.forgetful
    }

    /// Takes an input and tells what is to be done.
    pub fn handle(&mut self, input: TargetInput) -> Result<Actions, Busy<TargetInput>> {
        if self.failed {
            return Ok(vec![]);
        }
        match (input, self.awaited.take()) {
            (TargetInput::Settled(settled), Some(Awaited::Record)) => Ok(self.settled(settled)),
            (TargetInput::Settled(settled), Some(Awaited::BitmapNamed(bitmap, round, demoted))) => {
                Ok(self.bitmap_named(settled, bitmap, round, demoted))
            }
            (TargetInput::Demoted(Ok(demoted)), Some(Awaited::Round(bitmap, round))) => {
                Ok(self.round_demoted(bitmap, round, demoted))
            }
            (TargetInput::Demoted(Ok(_)), Some(Awaited::Residual(term, bitmap, residual))) => {
                Ok(self.residual_demoted(term, bitmap, residual))
            }
            (TargetInput::Demoted(Err(error)), Some(Awaited::Round(..) | Awaited::Residual(..))) => {
                Ok(self.fail(format!("stale blocks cannot be made absent: {error}")))
            }
            (input, Some(awaited)) => {
                self.awaited = Some(awaited);
                Err(Busy(input))
            }
            (input, None) => Ok(self.input(input)),
        }
    }

    fn input(&mut self, input: TargetInput) -> Actions {
        match input {
            TargetInput::Message(message) => self.message(message),
            TargetInput::Peer(standing) => self.peer(standing),
            TargetInput::PeerSilent => {
                self.asked = true;
                vec![]
            }
            TargetInput::Witness(holder) => self.witness(holder),
            TargetInput::RoundRead(round) => self.round_read(round),
            TargetInput::Filled(_) if self.state() == TargetState::Owner && self.asked => {
                self.persist(TargetState::Complete, self.term())
            }
            TargetInput::GuestWrites if self.gate() == Gate::RunReads => self.let_write_through(),
            TargetInput::Abort => self.abort(),
            TargetInput::Takeover => self.takeover(),
            TargetInput::Resend => self.announce(),
            // Ends of operations that nobody awaits, and what came too late.
            _ => vec![],
        }
    }

    // What leads to another record.

    fn persist(&mut self, state: TargetState, term: Term) -> Actions {
        let mut record = self.durable.successor(State::Target(state), term);
        record.let_through &=
            matches!(state, TargetState::Owner | TargetState::Complete | TargetState::Local);
        self.write(record)
    }

    fn write(&mut self, record: Record) -> Actions {
        self.awaited = Some(Awaited::Record);
        vec![Persist(Pending::new(record))]
    }

    fn fail(&mut self, why: String) -> Actions {
        self.failed = true;
        vec![TargetAction::Fail(why)]
    }

    /// The record of it is on the disk, if it could be written.
    fn written(&mut self, settled: Settled) -> Result<(), Actions> {
        match settled.durable() {
            Ok(durable) => self.durable = durable,
            Err(error) => return Err(self.fail(format!("the migration's record cannot be written: {error}"))),
        }
        Ok(())
    }

    fn settled(&mut self, settled: Settled) -> Actions {
        let before = self.state();
        if let Err(failed) = self.written(settled) {
            return failed;
        }
        if self.state() != TargetState::Prepared {
            self.reading = None;
        }
        match self.state() {
            TargetState::Owner if before != TargetState::Owner => {
                self.asked = true;
                std::iter::once(TargetAction::Own).chain(self.announce()).collect()
            }
            TargetState::Accepted if self.planted.is(Fault::StartsBeforeConfirm) => {
                self.persist(TargetState::Owner, self.term())
            }
            TargetState::Local => {
                // Who has let go of everything does not disagree.
                self.asked = true;
                vec![]
            }
            TargetState::GaveBack | TargetState::Aborted => {
                std::iter::once(TargetAction::DropOverlay).chain(self.announce()).collect()
            }
            _ => self.announce(),
        }
    }

    // PREPARED: rounds of warming, and an offer.

    fn round(&mut self, bitmap: BitmapId, round: Round, dirty: Vec<BlockSet>) -> Actions {
        if !self.record().plan.fits(&dirty) {
            return vec![TargetAction::Refuse("the sets of blocks are not of these disks")];
        }
        match (&self.reading, self.durable.target()) {
            (Some(reading), View::Prepared(proof)) if (reading.bitmap, reading.round) == (bitmap, round) => {
                // Whoever asks again may have heard of neither.
                let read = reading.read.then(|| Send(proof.round_read(bitmap, round)));
                return std::iter::once(Send(proof.applied(&reading.demoted, bitmap, round)))
                    .chain(read)
                    .collect();
            }
            // One that is behind: its set is in a later one, or applied.
            (Some(reading), _) if reading.bitmap == bitmap && reading.round > round => return vec![],
            _ if self.record().bitmap > Some(bitmap) => return vec![],
            _ => {}
        }
        self.reading = None;
        let known = self.record().bitmap == Some(bitmap) || self.planted.is(Fault::KeepsForeignWarm);
        self.awaited = Some(Awaited::Round(bitmap, round));
        vec![TargetAction::Demote(Demotion(known.then_some(dirty)))]
    }

    fn round_demoted(&mut self, bitmap: BitmapId, round: Round, demoted: Demoted) -> Actions {
        if self.record().bitmap == Some(bitmap) {
            return self.begin_round(bitmap, round, demoted);
        }
        // Before the first block is copied under it, for a restart finds blocks and must know of which bitmap.
        let mut record = self.durable.successor(State::Target(TargetState::Prepared), self.term());
        record.bitmap = Some(bitmap);
        let actions = self.write(record);
        self.awaited = Some(Awaited::BitmapNamed(bitmap, round, demoted));
        actions
    }

    fn bitmap_named(
        &mut self,
        settled: Settled,
        bitmap: BitmapId,
        round: Round,
        demoted: Demoted,
    ) -> Actions {
        match self.written(settled) {
            Ok(()) => self.begin_round(bitmap, round, demoted),
            Err(failed) => failed,
        }
    }

    fn begin_round(&mut self, bitmap: BitmapId, round: Round, demoted: Demoted) -> Actions {
        let View::Prepared(proof) = self.durable.target() else {
            return vec![];
        };
        let applied = Send(proof.applied(&demoted, bitmap, round));
        self.reading = Some(Reading { bitmap, round, demoted, read: false });
        vec![applied, TargetAction::ReadRound(round)]
    }

    fn round_read(&mut self, round: Round) -> Actions {
        match (self.durable.target(), &mut self.reading) {
            (View::Prepared(proof), Some(reading)) if reading.round == round => {
                reading.read = true;
                vec![Send(proof.round_read(reading.bitmap, round))]
            }
            _ => vec![],
        }
    }

    fn offer(&mut self, term: Term, bitmap: Option<BitmapId>, residual: Vec<BlockSet>) -> Actions {
        if !self.record().plan.fits(&residual) {
            return vec![TargetAction::Refuse("the sets of blocks are not of these disks")];
        }
        self.reading = None;
        let counts = residual.iter().map(BlockSet::count).collect();
        let known = bitmap.is_some() && self.record().bitmap == bitmap;
        self.awaited = Some(Awaited::Residual(term, bitmap, counts));
        vec![TargetAction::Demote(Demotion(known.then_some(residual)))]
    }

    fn residual_demoted(&mut self, term: Term, bitmap: Option<BitmapId>, residual: Vec<u64>) -> Actions {
        let mut record = self.durable.successor(State::Target(TargetState::Accepted), term);
        record.residual = Some(residual);
        record.bitmap = bitmap.or(record.bitmap);
        self.write(record)
    }

    // OWNER: the mark, and the way back.

    fn let_write_through(&mut self) -> Actions {
        if self.planted.is(Fault::ForgetsLetThrough) {
            self.forgetful = true;
            return vec![];
        }
        let mut record = self.durable.successor(self.record().state, self.term());
        record.let_through = true;
        self.write(record)
    }

    fn asked_back(&mut self, term: Term) -> Actions {
        let (mine, next) = (self.term(), self.term().next());
        match self.durable.target() {
            View::Owner(proof) if term == mine => {
                if self.let_through() && !self.planted.is(Fault::GrantsAfterWrite) {
                    return proof.refuse_back().map(Send).into_iter().collect();
                }
                self.persist(TargetState::GivingBack, next)
            }
            View::Complete(proof) if term == mine => vec![Send(proof.refuse_back())],
            View::Local(proof) if term == mine => vec![Send(proof.refuse_back())],
            View::GivingBack(proof) if term.next() == mine => vec![Send(proof.offer())],
            View::GaveBack(proof) if term.next() == mine => vec![Send(proof.confirm())],
            // Taken over in a later term: whoever asks for an earlier one is told so.
            View::Owner(proof) if term < mine => vec![Send(proof.claim())],
            View::Complete(proof) if term < mine => vec![Send(proof.claim())],
            _ => vec![],
        }
    }

    fn back_accepted(&mut self, term: Term) -> Actions {
        match self.durable.target() {
            View::GivingBack(proof) if term == self.term() => match self.witnessed() {
                true => vec![TargetAction::Swap(proof.swap())],
                false => self.persist(TargetState::GaveBack, term),
            },
            View::GaveBack(proof) if term == self.term() => vec![Send(proof.confirm())],
            _ => vec![],
        }
    }

    fn abort(&mut self) -> Actions {
        match self.state() {
            TargetState::Prepared => self.persist(TargetState::Aborted, self.term()),
            TargetState::Aborted => self.announce(),
            _ => vec![TargetAction::Refuse(
                "an offer was accepted: abort at the source, or take over if it is dead",
            )],
        }
    }

    fn takeover(&mut self) -> Actions {
        // Called again.
        if self.state() == TargetState::TakingOver || self.record().forced_from.is_some() {
            return self.announce();
        }
        let possible = matches!(self.state(), TargetState::Accepted | TargetState::GivingBack);
        if !possible || self.term().0 > TERM_SPOKEN_MAX {
            return vec![TargetAction::Refuse(
                "nothing was accepted, or it is owned already: look at its state",
            )];
        }
        // Durable before the witness is asked: it may do it long after, and until then nothing else may end this state.
        if self.witnessed() {
            return self.persist(TargetState::TakingOver, self.term());
        }
        self.force()
    }

    fn force(&mut self) -> Actions {
        let (from, term) = (self.term(), self.term().forced());
        let mut record = self.durable.successor(State::Target(TargetState::Owner), term);
        record.forced_from = Some(from);
        self.write(record)
    }

    /// The source owns the disk in a term, by withdrawing, by our giving it back or by an operator's word.
    fn source_owns(&mut self, term: Term, ended: bool) -> Actions {
        let mine = self.term();
        match self.state() {
            TargetState::Prepared if ended && term >= mine => self.persist(TargetState::Aborted, term),
            TargetState::Accepted if ended && term > mine => self.persist(TargetState::Aborted, term),
            TargetState::Accepted if term > mine => self.persist(TargetState::Prepared, term),
            TargetState::Owner | TargetState::Complete if term >= mine => {
                self.persist(TargetState::Superseded, term)
            }
            TargetState::GivingBack if term >= mine => self.persist(TargetState::GaveBack, term),
            _ => vec![],
        }
    }

    // Inputs from others.

    fn message(&mut self, message: Message) -> Actions {
        let (mine, term) = (self.term(), message.term);
        if message.migration != self.record().plan.migration
            || term.0 > TERM_SPOKEN_MAX + 2 * crate::FORCED_TERMS
        {
            return vec![TargetAction::Refuse("another migration, or a term that is not possible")];
        }
        match (message.body, self.state()) {
            (Body::Prepare { disks, block_bytes, whole, way_back }, _) => {
                let plan = &self.record().plan;
                let same = plan.disks == disks && plan.block_bytes == block_bytes;
                self.prepare_again(same && plan.whole == whole && plan.way_back == way_back)
            }
            (Body::Round { bitmap, round, dirty }, TargetState::Prepared) => self.round(bitmap, round, dirty),
            (Body::Offer { bitmap, residual }, TargetState::Prepared | TargetState::Accepted)
                if term > mine || (term != mine && self.planted.is(Fault::AcceptsOlderOffer)) =>
            {
                self.offer(term, bitmap, residual)
            }
            (Body::Offer { .. } | Body::Confirm, TargetState::Aborted) => self.announce(),
            (Body::Offer { .. }, TargetState::Accepted) if term == mine => self.announce(),
            (Body::Confirm, TargetState::Accepted) if term == mine && self.asked => {
                self.persist(TargetState::Owner, mine)
            }
            (Body::Claim { ended, .. }, _) => self.source_owns(term, ended),
            (Body::AskBack, _) => self.asked_back(term),
            (Body::BackAccepted, _) => self.back_accepted(term),
            (Body::Released, TargetState::Complete) if term == mine => self.persist(TargetState::Local, mine),
            _ => vec![],
        }
    }

    fn prepare_again(&mut self, same: bool) -> Actions {
        if !same {
            return vec![TargetAction::Refuse(
                "the disks are not those that this migration was prepared for",
            )];
        }
        match self.durable.target() {
            View::Owner(proof) => vec![Send(proof.claim())],
            View::Local(proof) => vec![Send(proof.claim())],
            _ => self.announce(),
        }
    }

    fn peer(&mut self, standing: Standing) -> Actions {
        if matches!(standing.state, State::Source(_)) && standing.owns() {
            let ended = standing.state == State::Source(crate::SourceState::Serving);
            let actions = self.source_owns(standing.term, ended);
            if !actions.is_empty() {
                return actions;
            }
        }
        self.asked = true;
        vec![]
    }

    fn witness(&mut self, has: Holder) -> Actions {
        let (mine, by_source) = (self.term(), has.side == Side::Source);
        let own = Holder { term: mine, side: Side::Target };
        if let View::TakingOver(proof) = self.durable.target() {
            let to = Holder { term: mine.forced(), side: Side::Target };
            return match has.term < to.term {
                _ if has == to => self.force(),
                true => vec![TargetAction::Swap(proof.swap(has))],
                // The peer was quicker.
                false if by_source => self.persist(TargetState::Superseded, has.term),
                false => vec![],
            };
        }
        match self.state() {
            _ if !self.witnessed() => vec![],
            TargetState::Accepted if has == own && self.asked => self.persist(TargetState::Owner, mine),
            TargetState::GivingBack if by_source && has.term == mine => {
                self.persist(TargetState::GaveBack, mine)
            }
            _ if by_source && has.term >= mine => self.source_owns(has.term, false),
            _ => vec![],
        }
    }

    /// What is said until it is answered.
    fn announce(&self) -> Actions {
        let ask_peer = (!self.asked).then_some(TargetAction::AskPeer);
        let ask = self.witnessed().then_some(TargetAction::AskWitness);
        let said = match self.durable.target() {
            View::Prepared(proof) => vec![Send(proof.prepared())],
            View::Accepted(proof) => std::iter::once(Send(proof.accepted())).chain(ask).collect(),
            View::TakingOver(_) => ask.into_iter().collect(),
            View::Owner(proof) => {
                self.record().forced_from.map(|_| Send(proof.claim())).into_iter().collect()
            }
            View::Complete(proof) => {
                let claim = self.record().forced_from.map(|_| Send(proof.claim()));
                claim.into_iter().chain([Send(proof.complete())]).collect()
            }
            View::Local(_) | View::Superseded(_) => vec![],
            View::GivingBack(proof) => std::iter::once(Send(proof.offer())).chain(ask).collect(),
            View::GaveBack(proof) => vec![Send(proof.confirm())],
            View::Aborted(proof) => vec![Send(proof.aborted())],
        };
        ask_peer.into_iter().chain::<Actions>(said).collect()
    }
}
