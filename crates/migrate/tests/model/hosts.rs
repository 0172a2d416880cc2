//! The two hosts of the model's world: the machines under test, what a driver keeps beside them, and the disks. A disk
//! has a part that survives a power cut and one that only a process's death leaves.

use infill_base::{ErrorKind, IoError};
use infill_migrate::{
    BlockMap, BlockSet, Demotion, Drain, Fault, Fetch, Filling, Gate, Holder, Linked, Message, Pending, Plan,
    Record, Round, Source, SourceAction, SourceInput, SourcePhase, Standing, Swap, Target, TargetAction,
    TargetInput, Term, Writes, Writing, WrongOwner,
};

/// What is in a block: the number of the write that put it there.
pub type Version = u8;
/// What is in a block of an image that was thrown away.
pub const GARBAGE: Version = 0xff;

/// What a step gave to the network.
#[derive(Default)]
pub struct Said {
    pub messages: Vec<Message>,
    pub swaps: Vec<Swap>,
    /// Actions that say no; for the model nothing changes.
    pub refused: bool,
}

fn broken() -> IoError {
    IoError::new(ErrorKind::Io, "a planted error")
}

/// An operation that the source's driver was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SourceOp {
    Record(Pending),
    Fence,
    Seal,
    Thaw,
}

/// A write of the guest at the source.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GuestWrite {
    pub at: usize,
    pub ticket: Writing,
    pub landed: bool,
}

/// Where the disks come from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceHost {
    pub up: bool,
    pub machine: Option<Source>,
    pub op: Option<SourceOp>,
    pub draining: Option<Drain>,
    pub writes: Vec<Writes>,
    pub writing: Option<GuestWrite>,
    pub warming: bool,
    /// Of the image, as the process leaves it, and as the power does.
    pub now: Vec<Version>,
    pub stable: Vec<Version>,
    pub record: Option<Record>,
    pub fence: bool,
}

/// Of which disk a block is, and which one there.
pub fn place(at: usize, blocks: u64) -> (usize, u64) {
    (at / blocks as usize, at as u64 % blocks)
}

impl SourceHost {
    /// With a migration just begun.
    pub fn new(plan: &Plan, blocks: u64, fault: Option<Fault>, said: &mut Said) -> SourceHost {
        let all = plan.disks.len() * blocks as usize;
        let mut host = SourceHost {
            up: true,
            machine: None,
            op: None,
            draining: None,
            writes: vec![],
            writing: None,
            warming: false,
            now: vec![0; all],
            stable: vec![0; all],
            record: None,
            fence: false,
        };
        host.writes = host.fresh_writes(plan.disks.len(), blocks, fault);
        let (mut machine, actions) = Source::prepare(plan.clone()).expect("is a plan");
        machine.plant(fault);
        host.machine = Some(machine);
        host.act(actions, said);
        host
    }

    fn fresh_writes(&self, disks: usize, blocks: u64, fault: Option<Fault>) -> Vec<Writes> {
        let mut writes = vec![Writes::new(blocks); disks];
        writes.iter_mut().for_each(|writes| writes.plant(fault));
        writes
    }

    pub fn gate(&self) -> Gate {
        self.machine.as_ref().filter(|_| self.up).map_or(Gate::Deny, Source::gate)
    }

    pub fn phase(&self) -> Option<SourcePhase> {
        self.machine.as_ref().map(Source::phase)
    }

    pub fn idle(&self) -> bool {
        self.up && self.machine.as_ref().is_some_and(|machine| !machine.busy())
    }

    pub fn standing(&self) -> Option<Standing> {
        self.machine.as_ref().filter(|_| self.up && self.record.is_some()).and_then(Source::standing)
    }

    /// Whether a peer that asks is answered, be it that nothing is known.
    pub fn may_be_asked(&self) -> bool {
        self.up && (self.record.is_none() || self.standing().is_some())
    }

    /// What a read of the export that the target names gives.
    pub fn read(&self, at: usize, base: Option<Term>) -> Option<Version> {
        let exports = self.machine.as_ref().filter(|_| self.up)?.exports();
        let there = match base {
            None => exports.live,
            Some(_) => exports.base == base,
        };
        there.then(|| self.now[at])
    }

    pub fn give(&mut self, input: SourceInput, said: &mut Said) {
        let Some(machine) = &mut self.machine else { return };
        let actions = machine.handle(input).expect("only what it waits for is given");
        self.act(actions, said);
    }

    fn act(&mut self, actions: Vec<SourceAction>, said: &mut Said) {
        for action in actions {
            match action {
                SourceAction::Persist(pending) => self.op = Some(SourceOp::Record(pending)),
                SourceAction::Send(message) => said.messages.push(message.into_message()),
                SourceAction::Drain(drain) => self.draining = Some(drain),
                SourceAction::SetFence => self.op = Some(SourceOp::Fence),
                SourceAction::Seal => self.op = Some(SourceOp::Seal),
                SourceAction::Thaw => (self.op, self.draining) = (Some(SourceOp::Thaw), None),
                SourceAction::Applied(round) => {
                    self.writes.iter_mut().for_each(|writes| writes.applied(round))
                }
                SourceAction::StopBitmaps => {
                    self.warming = false;
                    self.writes.iter_mut().for_each(Writes::stop);
                }
                SourceAction::Swap(swap) => said.swaps.push(swap),
                SourceAction::Release => self.now.fill(GARBAGE),
                SourceAction::Refuse(_) => said.refused = true,
                SourceAction::Fail(why) => panic!("{why}"),
                SourceAction::RoundRead(_) | SourceAction::AskPeer | SourceAction::AskWitness => {}
            }
        }
    }

    /// The end of the operation in flight.
    pub fn op_done(&mut self, good: bool, said: &mut Said) {
        let outcome = || if good { Ok(()) } else { Err(broken()) };
        let op = self.op.take().expect("is in flight");
        if good {
            self.op_happens(&op);
        }
        let input = match op {
            SourceOp::Record(pending) => SourceInput::Settled(pending.settled(Ok(()))),
            SourceOp::Fence => SourceInput::FenceSet(outcome()),
            SourceOp::Thaw => SourceInput::Thawed(Ok(())),
            SourceOp::Seal => {
                let residual = self.writes.iter().map(|writes| writes.residual().expect("is drained"));
                SourceInput::Sealed(outcome().map(|()| residual.collect()))
            }
        };
        self.give(input, said);
    }

    fn op_happens(&mut self, op: &SourceOp) {
        match op {
            SourceOp::Record(pending) => {
                let bytes = pending.record().encode();
                let read = Record::decode(&bytes).expect("what is written can be read");
                assert_eq!(&read, pending.record(), "what is read is what was written");
                self.record = Some(read);
            }
            SourceOp::Fence => self.fence = true,
            SourceOp::Seal => self.stable.clone_from(&self.now),
            SourceOp::Thaw => self.fence = false,
        }
    }

    /// The process dies, or the power goes; what was in flight has happened or not.
    pub fn crash(&mut self, happened: bool, power: bool, blocks: u64, fault: Option<Fault>) {
        if let Some(op) = self.op.take()
            && happened
        {
            self.op_happens(&op);
        }
        (self.up, self.machine, self.writing) = (false, None, None);
        (self.draining, self.warming) = (None, false);
        self.writes = self.fresh_writes(self.writes.len(), blocks, fault);
        if power {
            self.now.clone_from(&self.stable);
        }
    }

    pub fn restart(&mut self, plan: &Plan, fault: Option<Fault>, said: &mut Said) {
        self.up = true;
        let (mut machine, actions) = match self.record.clone() {
            Some(record) => Source::restart(record).expect("is the source's"),
            // Nothing was written yet: whoever asked, asks again.
            None => Source::prepare(plan.clone()).expect("is a plan"),
        };
        machine.plant(fault);
        self.machine = Some(machine);
        self.act(actions, said);
    }

    pub fn warm(&mut self, said: &mut Said) {
        self.warming = true;
        self.writes.iter_mut().for_each(Writes::start);
        self.give(SourceInput::Warm, said);
        // Refused: then nothing records in vain.
        if said.refused {
            self.warming = false;
            self.writes.iter_mut().for_each(Writes::stop);
        }
    }

    pub fn next_round(&mut self, said: &mut Said) {
        let dirty: Option<Vec<BlockSet>> = self.writes.iter_mut().map(Writes::close_round).collect();
        if let Some(dirty) = dirty {
            self.give(SourceInput::NextRound(dirty), said);
        }
    }

    pub fn write_begins(&mut self, at: usize, blocks: u64) {
        let (disk, block) = place(at, blocks);
        let ticket = self.writes[disk].begin(block..block + 1);
        self.writing = Some(GuestWrite { at, ticket, landed: false });
    }

    pub fn write_lands(&mut self, version: Version) {
        let writing = self.writing.as_mut().expect("is in flight");
        writing.landed = true;
        self.now[writing.at] = version;
    }

    pub fn write_is_answered(&mut self, blocks: u64) {
        let writing = self.writing.take().expect("is in flight");
        let _answer = self.writes[place(writing.at, blocks).0].landed(writing.ticket);
    }
}

/// An operation that the target's driver was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TargetOp {
    Record(Pending),
    Demote(Demotion),
}

/// A fetch of the target.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Fetching {
    pub at: usize,
    pub fetch: Fetch,
    pub round: Round,
    pub base: Option<Term>,
    pub got: Option<Version>,
}

/// Where the disks go.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TargetHost {
    pub up: bool,
    pub machine: Option<Target>,
    pub op: Option<TargetOp>,
    pub maps: Vec<BlockMap>,
    pub fetching: Option<Fetching>,
    /// Of the overlay: absent, or what is in it.
    pub now: Vec<Option<Version>>,
    pub stable: Vec<Option<Version>>,
    pub record: Option<Record>,
}

impl TargetHost {
    pub fn new(all: usize) -> TargetHost {
        TargetHost {
            up: true,
            machine: None,
            op: None,
            maps: vec![],
            fetching: None,
            now: vec![None; all],
            stable: vec![None; all],
            record: None,
        }
    }

    pub fn gate(&self) -> Gate {
        self.machine.as_ref().filter(|_| self.up).map_or(Gate::Deny, Target::gate)
    }

    pub fn idle(&self) -> bool {
        self.up && self.machine.as_ref().is_some_and(|machine| !machine.busy())
    }

    pub fn standing(&self) -> Option<Standing> {
        self.machine.as_ref().filter(|_| self.up && self.record.is_some()).and_then(Target::standing)
    }

    /// Whether a peer that asks is answered, be it that nothing is known.
    pub fn may_be_asked(&self) -> bool {
        self.up && (self.record.is_none() || self.standing().is_some())
    }

    pub fn prepare(&mut self, plan: &Plan, blocks: u64, fault: Option<Fault>, said: &mut Said) {
        let (mut machine, actions) = Target::prepare(plan.clone()).expect("is a plan");
        machine.plant(fault);
        self.rebuild(&machine, plan.disks.len(), blocks, fault);
        self.machine = Some(machine);
        self.act(actions, blocks, said);
    }

    fn rebuild(&mut self, machine: &Target, disks: usize, blocks: u64, fault: Option<Fault>) {
        let map = |disk: usize| {
            let mut set = BlockSet::empty(blocks);
            (0..blocks)
                .filter(|block| self.now[disk * blocks as usize + *block as usize].is_some())
                .for_each(|block| {
                    set.insert(block);
                });
            let mut map = BlockMap::rebuild(&set, machine.ownership().as_ref());
            map.plant(fault);
            map
        };
        self.maps = (0..disks).map(map).collect();
    }

    pub fn give(&mut self, input: TargetInput, blocks: u64, said: &mut Said) {
        let Some(machine) = &mut self.machine else { return };
        let actions = machine.handle(input).expect("only what it waits for is given");
        self.act(actions, blocks, said);
    }

    fn act(&mut self, actions: Vec<TargetAction>, blocks: u64, said: &mut Said) {
        for action in actions {
            match action {
                TargetAction::Persist(pending) => self.op = Some(TargetOp::Record(pending)),
                TargetAction::Demote(demotion) => {
                    self.demote(&demotion).expect("the disk is not owned yet");
                    self.forget_absent(blocks);
                    self.op = Some(TargetOp::Demote(demotion));
                }
                TargetAction::Send(message) => said.messages.push(message.into_message()),
                TargetAction::Own => {
                    let owned = self.machine.as_ref().and_then(Target::ownership).expect("is owned");
                    self.maps.iter_mut().for_each(|map| map.own(&owned));
                }
                TargetAction::Swap(swap) => said.swaps.push(swap),
                TargetAction::DropOverlay => {
                    (self.now, self.stable) = (vec![None; self.now.len()], vec![None; self.now.len()]);
                    self.maps.clear();
                    self.fetching = None;
                }
                TargetAction::Refuse(_) => said.refused = true,
                TargetAction::Fail(why) => panic!("{why}"),
                TargetAction::ReadRound(_) | TargetAction::AskPeer | TargetAction::AskWitness => {}
            }
        }
    }

    fn demote(&mut self, demotion: &Demotion) -> Result<(), WrongOwner> {
        match demotion.sets() {
            Some(sets) => self.maps.iter_mut().zip(sets).try_for_each(|(map, set)| map.demote(set)),
            None => self.maps.iter_mut().try_for_each(BlockMap::demote_all),
        }
    }

    /// What the maps call absent is not in the overlay.
    fn forget_absent(&mut self, blocks: u64) {
        for (at, value) in self.now.iter_mut().enumerate() {
            let (disk, block) = place(at, blocks);
            if self.maps[disk].get(block) == infill_migrate::Block::Absent {
                *value = None;
            }
        }
    }

    pub fn op_done(&mut self, blocks: u64, said: &mut Said) {
        let op = self.op.take().expect("is in flight");
        self.op_happens(&op);
        let input = match op {
            TargetOp::Record(pending) => TargetInput::Settled(pending.settled(Ok(()))),
            TargetOp::Demote(demotion) => TargetInput::Demoted(demotion.settled(Ok(()))),
        };
        self.give(input, blocks, said);
    }

    fn op_happens(&mut self, op: &TargetOp) {
        match op {
            TargetOp::Record(pending) => {
                let bytes = pending.record().encode();
                let read = Record::decode(&bytes).expect("what is written can be read");
                assert_eq!(&read, pending.record(), "what is read is what was written");
                self.record = Some(read);
            }
            TargetOp::Demote(_) => self.stable.clone_from(&self.now),
        }
    }

    pub fn crash(&mut self, happened: bool, power: bool) {
        if let Some(op) = self.op.take()
            && happened
        {
            self.op_happens(&op);
        }
        (self.up, self.machine, self.fetching) = (false, None, None);
        self.maps.clear();
        if power {
            self.now.clone_from(&self.stable);
        }
    }

    pub fn restart(&mut self, disks: usize, blocks: u64, fault: Option<Fault>, said: &mut Said) {
        self.up = true;
        let Some(record) = self.record.clone() else { return };
        let (mut machine, actions) = Target::restart(record).expect("is the target's");
        machine.plant(fault);
        self.rebuild(&machine, disks, blocks, fault);
        self.machine = Some(machine);
        self.act(actions, blocks, said);
    }

    /// What may be fetched now, and from which export.
    pub fn fetchable(&self) -> Option<(Round, Option<Term>)> {
        let machine = self.machine.as_ref().filter(|_| self.up && self.fetching.is_none())?;
        match machine.reading() {
            Some(round) => Some((round, None)),
            None if machine.gate().runs() => Some((Round(0), Some(machine.record().term()))),
            None => None,
        }
    }

    pub fn fetch_begins(&mut self, at: usize, blocks: u64) {
        let (disk, block) = place(at, blocks);
        if let (Some((round, base)), Some(fetch)) = (self.fetchable(), self.maps[disk].fetch(block)) {
            self.fetching = Some(Fetching { at, fetch, round, base, got: None });
        }
    }

    /// Returns what was overwritten, if something was.
    pub fn fetch_links(&mut self, blocks: u64) -> Option<Version> {
        let Fetching { at, fetch, round, got, .. } = self.fetching.take().expect("is in flight");
        match self.maps[place(at, blocks).0].link(fetch, round) {
            Linked::Yes => std::mem::replace(&mut self.now[at], got),
            Linked::Lost => None,
        }
    }

    pub fn guest_writes(&mut self, at: usize, version: Version, blocks: u64) {
        let (disk, block) = place(at, blocks);
        self.maps[disk].write(block).expect("the disk is owned");
        self.now[at] = Some(version);
    }

    pub fn sync(&mut self) {
        self.stable.clone_from(&self.now);
    }

    /// Everything is here: the whole of it is synced and told.
    pub fn fill(&mut self, blocks: u64, said: &mut Said) {
        let Some(filling) = Filling::of(&self.maps) else { return };
        self.sync();
        if let Some(filled) = filling.settled(Ok(())) {
            self.give(TargetInput::Filled(filled), blocks, said);
        }
    }
}

/// All that was ever said and may arrive, any number of times and in any order; and the witness.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Net {
    pub to_source: Vec<Message>,
    pub to_target: Vec<Message>,
    pub swaps: Vec<Swap>,
    /// What the witness ever had, and has (the last).
    pub held: Vec<Holder>,
}

impl Net {
    pub fn adds(&self, said: &Said, by_source: bool) -> bool {
        let list = if by_source { &self.to_target } else { &self.to_source };
        said.messages.iter().any(|message| list.binary_search(message).is_err())
            || said.swaps.iter().any(|swap| self.swaps.binary_search(swap).is_err())
    }

    pub fn add(&mut self, said: Said, by_source: bool) {
        let list = if by_source { &mut self.to_target } else { &mut self.to_source };
        for message in said.messages {
            if let Err(at) = list.binary_search(&message) {
                list.insert(at, message);
            }
        }
        for swap in said.swaps {
            if let Err(at) = self.swaps.binary_search(&swap) {
                self.swaps.insert(at, swap);
            }
        }
    }
}
