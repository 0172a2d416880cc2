//! The world that the model explores: two hosts, a network that loses, repeats and reorders, a witness, operators, a
//! guest, and what must be true of all of them. One step is what cannot be cut in two.

use std::rc::Rc;

use infill_migrate::{
    Body, Disk, DiskId, Epoch, Fault, Gate, Holder, MigrationId, Plan, Side, SourceInput, SourcePhase,
    SourceState, State, TargetInput, TargetState, Term,
};

use super::hosts::{Net, Said, SourceHost, SourceOp, TargetHost, Version};

/// What is explored, and how far. Each number bounds how often something may happen on a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub name: &'static str,
    pub disks: usize,
    pub blocks: u64,
    pub witness: bool,
    /// The mistake of one record for each disk of the machine, instead of one for all.
    pub record_per_disk: bool,
    pub fault: Option<Fault>,
    /// Writes of the guest, at either side.
    pub writes: u8,
    pub source_crashes: u8,
    pub target_crashes: u8,
    /// Operations that fail without killing anybody.
    pub failures: u8,
    pub freezes: u8,
    /// Starts of bitmaps, and rounds after the first of each.
    pub warms: u8,
    pub rounds: u8,
    /// Requests of A's old sessions after the handover.
    pub old_requests: u8,
    pub aborts: u8,
    /// `takeover` and `reclaim`.
    pub forces: u8,
}

impl Bounds {
    /// Everything off.
    pub const NONE: Bounds = Bounds {
        name: "",
        disks: 1,
        blocks: 1,
        witness: false,
        record_per_disk: false,
        fault: None,
        writes: 0,
        source_crashes: 0,
        target_crashes: 0,
        failures: 0,
        freezes: 1,
        warms: 0,
        rounds: 0,
        old_requests: 0,
        aborts: 0,
        forces: 0,
    };

    /// Sets one of them by its name; `false` where there is none of it.
    pub fn set(&mut self, name: &str, value: u8) -> bool {
        let count = match name {
            "writes" => &mut self.writes,
            "source_crashes" => &mut self.source_crashes,
            "target_crashes" => &mut self.target_crashes,
            "failures" => &mut self.failures,
            "freezes" => &mut self.freezes,
            "warms" => &mut self.warms,
            "rounds" => &mut self.rounds,
            "old_requests" => &mut self.old_requests,
            "aborts" => &mut self.aborts,
            "forces" => &mut self.forces,
            "blocks" => {
                self.blocks = u64::from(value);
                return true;
            }
            "disks" => {
                self.disks = usize::from(value);
                return true;
            }
            _ => return false,
        };
        *count = value;
        true
    }

    fn lanes(&self) -> usize {
        if self.record_per_disk { self.disks } else { 1 }
    }

    fn disks_of_lane(&self) -> usize {
        if self.record_per_disk { 1 } else { self.disks }
    }

    fn plan(&self, lane: usize) -> Plan {
        let first = if self.record_per_disk { lane } else { 0 };
        let disk = |index: usize| Disk {
            id: DiskId(uuid_of(10 + index as u128)),
            bytes: self.blocks * 512,
            epoch_before: Epoch(40 + 7 * index as u64),
        };
        Plan {
            migration: MigrationId(uuid_of(1 + lane as u128)),
            disks: (first..first + self.disks_of_lane()).map(disk).collect(),
            block_bytes: 512,
            peer: "peer".into(),
            witness: self.witness.then(|| "witness".into()),
            whole: false,
            way_back: 0,
        }
    }
}

fn uuid_of(number: u128) -> uuid::Uuid {
    uuid::Uuid::from_u128(number)
}

/// What the guest was promised, and what is left of the bounds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Spec {
    /// For each block, of all lanes, the last write that landed, and the last one that a sync covered.
    pub truth: Vec<Version>,
    pub synced: Vec<Version>,
    pub left: Left,
    /// An operator has given his word that a peer is dead.
    pub forced: bool,
    /// By that word data may be lost: contents are not compared any more.
    pub lost: bool,
}

/// What may still happen.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Left {
    writes: u8,
    source_crashes: u8,
    target_crashes: u8,
    failures: u8,
    freezes: u8,
    warms: u8,
    rounds: u8,
    old_requests: u8,
    aborts: u8,
    forces: u8,
}

/// A migration in it.
#[derive(Clone, Debug)]
pub struct Lane {
    pub s: Rc<SourceHost>,
    pub d: Rc<TargetHost>,
    pub net: Rc<Net>,
}

/// A state of the world.
#[derive(Clone, Debug)]
pub struct World {
    pub lanes: Vec<Lane>,
    pub spec: Rc<Spec>,
}

/// A step of the source's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum S {
    OpDone { good: bool },
    Crash { happened: bool, power: bool },
    Restart,
    Deliver(usize),
    HearsPeer,
    HearsNobody,
    HearsWitness(usize),
    Warm,
    NextRound,
    Freeze,
    Drained,
    Timeout,
    Abort,
    Reclaim,
    Resend,
    OldRequest,
    WriteBegins(usize),
    WriteLands,
    WriteAnswered,
}

/// A step of the target's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum D {
    OpDone,
    Crash { happened: bool, power: bool },
    Restart,
    Deliver(usize),
    HearsPeer,
    HearsNobody,
    HearsWitness(usize),
    RoundRead,
    FetchBegins(usize),
    FetchReads,
    FetchLinks,
    FetchFails,
    Filled,
    GuestWaits,
    GuestWrites(usize),
    Flush,
    Abort,
    Takeover,
    Resend,
}

/// Who does what, in which lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    S(usize, S),
    D(usize, D),
    /// The witness takes a swap that was sent to it.
    Swap(usize, usize),
}

impl World {
    /// A migration was just asked for.
    pub fn new(bounds: &Bounds) -> World {
        let all = bounds.disks * bounds.blocks as usize;
        let lane = |lane: usize| {
            let plan = bounds.plan(lane);
            let mut said = Said::default();
            let s = SourceHost::new(&plan, bounds.blocks, bounds.fault, &mut said);
            let d = TargetHost::new(plan.disks.len() * bounds.blocks as usize);
            let held = vec![Holder { term: Term::FIRST, side: Side::Source }];
            let net = Net { to_source: vec![], to_target: vec![], swaps: vec![], held };
            Lane { s: Rc::new(s), d: Rc::new(d), net: Rc::new(net) }
        };
        let left = Left {
            writes: bounds.writes,
            source_crashes: bounds.source_crashes,
            target_crashes: bounds.target_crashes,
            failures: bounds.failures,
            freezes: bounds.freezes,
            warms: bounds.warms,
            rounds: bounds.rounds,
            old_requests: bounds.old_requests,
            aborts: bounds.aborts,
            forces: bounds.forces,
        };
        let spec = Spec { truth: vec![0; all], synced: vec![0; all], left, forced: false, lost: false };
        World { lanes: (0..bounds.lanes()).map(lane).collect(), spec: Rc::new(spec) }
    }

    /// Everything that may happen now.
    pub fn steps(&self, bounds: &Bounds, steps: &mut Vec<Step>) {
        steps.clear();
        for lane in 0..self.lanes.len() {
            self.source_steps(lane, bounds, |step| steps.push(Step::S(lane, step)));
            self.target_steps(lane, bounds, |step| steps.push(Step::D(lane, step)));
            let net = &self.lanes[lane].net;
            let held = net.held.last();
            let takes = (0..net.swaps.len()).filter(|swap| Some(&net.swaps[*swap].from) == held);
            steps.extend(takes.map(|swap| Step::Swap(lane, swap)));
        }
    }

    fn source_steps(&self, lane: usize, bounds: &Bounds, mut may: impl FnMut(S)) {
        let Lane { s, d, net } = &self.lanes[lane];
        let left = &self.spec.left;
        if !s.up {
            return may(S::Restart);
        }
        if left.source_crashes > 0 {
            // Where two ways to die are one, one of them.
            for power in [false, true].into_iter().filter(|power| !power || s.now != s.stable) {
                may(S::Crash { happened: true, power });
                if s.op.is_some() {
                    may(S::Crash { happened: false, power });
                }
            }
        }
        if let Some(writing) = &s.writing {
            may(if writing.landed { S::WriteAnswered } else { S::WriteLands });
        }
        if let Some(op) = &s.op {
            may(S::OpDone { good: true });
            if left.failures > 0 && matches!(op, SourceOp::Fence | SourceOp::Seal) {
                may(S::OpDone { good: false });
            }
            return;
        }
        let Some(machine) = s.machine.as_ref() else { return };
        (0..net.to_source.len()).for_each(|message| may(S::Deliver(message)));
        (0..net.held.len()).filter(|_| bounds.witness).for_each(|held| may(S::HearsWitness(held)));
        may(S::Resend);
        let state = machine.record().state();
        let phase = machine.phase();
        if phase == SourcePhase::Unasked {
            if d.may_be_asked() {
                may(S::HearsPeer);
            }
            if !self.spec.forced || bounds.fault == Some(Fault::OpensUnasked) {
                may(S::HearsNobody);
            }
        }
        if s.draining.is_some() && s.writing.is_none() {
            may(S::Drained);
        }
        if s.draining.is_some() || state == State::Source(SourceState::Offered) {
            may(S::Timeout);
        }
        if s.gate() == Gate::Run {
            let prepared = state == State::Source(SourceState::Prepared);
            if prepared && left.freezes > 0 {
                may(S::Freeze);
            }
            if prepared && left.warms > 0 && !s.warming {
                may(S::Warm);
            }
            if prepared && left.rounds > 0 && s.warming {
                may(S::NextRound);
            }
            if left.writes > 0 && s.writing.is_none() {
                (0..s.now.len()).for_each(|at| may(S::WriteBegins(at)));
            }
        }
        if left.aborts > 0 {
            may(S::Abort);
        }
        if left.forces > 0 && !d.up {
            may(S::Reclaim);
        }
        if left.old_requests > 0 && s.gate() == Gate::AskBack {
            may(S::OldRequest);
        }
    }

    fn target_steps(&self, lane: usize, bounds: &Bounds, mut may: impl FnMut(D)) {
        let Lane { s, d, net } = &self.lanes[lane];
        let left = &self.spec.left;
        if !d.up {
            return may(D::Restart);
        }
        if left.target_crashes > 0 && d.machine.is_some() {
            for power in [false, true].into_iter().filter(|power| !power || d.now != d.stable) {
                may(D::Crash { happened: true, power });
                if d.op.is_some() {
                    may(D::Crash { happened: false, power });
                }
            }
        }
        if let Some(fetching) = &d.fetching {
            match fetching.got {
                Some(_) => may(D::FetchLinks),
                None if s.read(fetching.at, fetching.base).is_some() => may(D::FetchReads),
                None => may(D::FetchFails),
            }
        }
        if d.op.is_some() {
            return may(D::OpDone);
        }
        let Some(machine) = d.machine.as_ref() else {
            let prepares =
                (0..net.to_target.len()).filter(|at| matches!(net.to_target[*at].body, Body::Prepare { .. }));
            prepares.for_each(|message| may(D::Deliver(message)));
            return;
        };
        (0..net.to_target.len()).for_each(|message| may(D::Deliver(message)));
        (0..net.held.len()).filter(|_| bounds.witness).for_each(|held| may(D::HearsWitness(held)));
        may(D::Resend);
        let gate = d.gate();
        let state = machine.record().state();
        if machine.asks_peer() {
            if s.may_be_asked() {
                may(D::HearsPeer);
            }
            if !self.spec.forced || bounds.fault == Some(Fault::OpensUnasked) {
                may(D::HearsNobody);
            }
        }
        if machine.reading().is_some() && d.fetching.is_none() {
            may(D::RoundRead);
        }
        if let Some((_, base)) = d.fetchable() {
            let there = |at: &usize| d.now[*at].is_none() && s.read(*at, base).is_some();
            (0..d.now.len()).filter(there).for_each(|at| may(D::FetchBegins(at)));
        }
        if gate.runs() {
            if state == State::Target(TargetState::Owner) && d.now.iter().all(Option::is_some) {
                may(D::Filled);
            }
            if gate == Gate::RunReads && left.writes > 0 {
                may(D::GuestWaits);
            }
            if gate == Gate::Run && left.writes > 0 {
                (0..d.now.len()).for_each(|at| may(D::GuestWrites(at)));
            }
            if d.now != d.stable {
                may(D::Flush);
            }
        }
        if left.aborts > 0 && state == State::Target(TargetState::Prepared) {
            may(D::Abort);
        }
        if left.forces > 0 && !s.up {
            may(D::Takeover);
        }
    }

    /// Takes a step, and tells what is wrong with it, if something is.
    pub fn take(&mut self, step: Step, bounds: &Bounds) -> Result<(), String> {
        match step {
            Step::S(lane, step) => self.take_source(lane, step, bounds),
            Step::D(lane, step) => self.take_target(lane, step, bounds),
            Step::Swap(lane, swap) => {
                let net = Rc::make_mut(&mut self.lanes[lane].net);
                net.held.push(net.swaps[swap].to);
                Ok(())
            }
        }
    }

    fn say(&mut self, lane: usize, said: Said, by_source: bool) {
        let net = &mut self.lanes[lane].net;
        if net.adds(&said, by_source) {
            Rc::make_mut(net).add(said, by_source);
        }
    }

    /// Where the blocks of a lane begin among all blocks.
    fn base(lane: usize, bounds: &Bounds) -> usize {
        lane * bounds.disks_of_lane() * bounds.blocks as usize
    }

    fn next_version(&mut self, at: usize) -> Version {
        let spec = Rc::make_mut(&mut self.spec);
        spec.truth[at] += 1;
        spec.truth[at]
    }

    fn take_source(&mut self, lane: usize, step: S, bounds: &Bounds) -> Result<(), String> {
        let base = Self::base(lane, bounds);
        let (fault, blocks) = (bounds.fault, bounds.blocks);
        let mut said = Said::default();
        let net = self.lanes[lane].net.clone();
        let peer = self.lanes[lane].d.standing();
        self.spend_source(step);
        let version = match step {
            S::WriteLands => self.lanes[lane].s.writing.as_ref().map(|writing| writing.at),
            _ => None,
        };
        let version = version.map(|at| self.next_version(base + at));
        let s = Rc::make_mut(&mut self.lanes[lane].s);
        match step {
            S::OpDone { good } => s.op_done(good, &mut said),
            S::Crash { happened, power } => s.crash(happened, power, blocks, fault),
            S::Restart => s.restart(&bounds.plan(lane), fault, &mut said),
            S::Deliver(message) => s.give(SourceInput::Message(net.to_source[message].clone()), &mut said),
            S::HearsPeer => match peer {
                Some(standing) => s.give(SourceInput::Peer(standing), &mut said),
                None => s.give(SourceInput::PeerSilent, &mut said),
            },
            S::HearsNobody => s.give(SourceInput::PeerSilent, &mut said),
            S::HearsWitness(held) => s.give(SourceInput::Witness(net.held[held]), &mut said),
            S::Warm => s.warm(&mut said),
            S::NextRound => s.next_round(&mut said),
            S::Freeze => s.give(SourceInput::Freeze, &mut said),
            S::Drained => {
                if let Some(drain) = s.draining.take() {
                    s.give(SourceInput::Drained(drain), &mut said);
                }
            }
            S::Timeout => s.give(SourceInput::Timeout, &mut said),
            S::Abort => s.give(SourceInput::Abort, &mut said),
            S::Reclaim => s.give(SourceInput::Reclaim, &mut said),
            S::Resend => s.give(SourceInput::Resend, &mut said),
            S::OldRequest => s.give(SourceInput::OldSession, &mut said),
            S::WriteBegins(at) => s.write_begins(at, blocks),
            S::WriteLands => s.write_lands(version.unwrap_or_default()),
            S::WriteAnswered => s.write_is_answered(blocks),
        }
        self.after_source(lane, step, base)?;
        self.say(lane, said, true);
        Ok(())
    }

    fn spend_source(&mut self, step: S) {
        let spec = &mut self.spec;
        match step {
            S::Crash { .. } => Rc::make_mut(spec).left.source_crashes -= 1,
            S::OpDone { good: false } => Rc::make_mut(spec).left.failures -= 1,
            S::Freeze => Rc::make_mut(spec).left.freezes -= 1,
            S::Warm => Rc::make_mut(spec).left.warms -= 1,
            S::NextRound => Rc::make_mut(spec).left.rounds -= 1,
            S::Abort => Rc::make_mut(spec).left.aborts -= 1,
            S::Reclaim => {
                let spec = Rc::make_mut(spec);
                spec.left.forces -= 1;
                spec.forced = true;
            }
            S::OldRequest => Rc::make_mut(spec).left.old_requests -= 1,
            S::WriteBegins(_) => Rc::make_mut(spec).left.writes -= 1,
            _ => {}
        }
    }

    /// What the guest was promised changes with a sync, and with what a crash took.
    fn after_source(&mut self, lane: usize, step: S, base: usize) -> Result<(), String> {
        let s = &self.lanes[lane].s;
        let source_owns = s.record.as_ref().is_none_or(owns);
        let end = base + s.now.len();
        match step {
            // Where the seal's sync has happened.
            S::OpDone { .. } if source_owns && s.stable == self.spec.truth[base..end] => {
                let spec = Rc::make_mut(&mut self.spec);
                spec.synced[base..end].clone_from_slice(&s.stable);
            }
            // What was only acknowledged, or in flight, may be gone; what was synced may not.
            S::Crash { .. } if source_owns && !self.spec.lost => {
                let spec = Rc::make_mut(&mut self.spec);
                for (at, value) in s.now.iter().enumerate() {
                    let (synced, truth) = (spec.synced[base + at], spec.truth[base + at]);
                    if !(synced..=truth).contains(value) {
                        return Err(format!(
                            "I4: block {at} had version {synced} synced and now has {value}"
                        ));
                    }
                    spec.truth[base + at] = *value;
                }
            }
            S::Reclaim => Rc::make_mut(&mut self.spec).lost = true,
            _ => {}
        }
        Ok(())
    }

    fn take_target(&mut self, lane: usize, step: D, bounds: &Bounds) -> Result<(), String> {
        let base = Self::base(lane, bounds);
        let (fault, blocks, disks) = (bounds.fault, bounds.blocks, bounds.disks_of_lane());
        let mut said = Said::default();
        let net = self.lanes[lane].net.clone();
        let source = self.lanes[lane].s.clone();
        let peer = source.standing();
        self.spend_target(step);
        let version = match step {
            D::GuestWrites(at) => self.next_version(base + at),
            _ => 0,
        };
        let d = Rc::make_mut(&mut self.lanes[lane].d);
        let mut overwritten = None;
        match step {
            D::OpDone => d.op_done(blocks, &mut said),
            D::Crash { happened, power } => d.crash(happened, power),
            D::Restart => d.restart(disks, blocks, fault, &mut said),
            D::Deliver(_) if d.machine.is_none() => d.prepare(&bounds.plan(lane), blocks, fault, &mut said),
            D::Deliver(message) => {
                d.give(TargetInput::Message(net.to_target[message].clone()), blocks, &mut said)
            }
            D::HearsPeer => match peer {
                Some(standing) => d.give(TargetInput::Peer(standing), blocks, &mut said),
                None => d.give(TargetInput::PeerSilent, blocks, &mut said),
            },
            D::HearsNobody => d.give(TargetInput::PeerSilent, blocks, &mut said),
            D::HearsWitness(held) => d.give(TargetInput::Witness(net.held[held]), blocks, &mut said),
            D::RoundRead => {
                if let Some(round) = d.machine.as_ref().and_then(|machine| machine.reading()) {
                    d.give(TargetInput::RoundRead(round), blocks, &mut said);
                }
            }
            D::FetchBegins(at) => d.fetch_begins(at, blocks),
            D::FetchReads => {
                if let Some(fetching) = &mut d.fetching {
                    fetching.got = source.read(fetching.at, fetching.base);
                }
            }
            D::FetchLinks => overwritten = d.fetch_links(blocks),
            D::FetchFails => d.fetching = None,
            D::Filled => d.fill(blocks, &mut said),
            D::GuestWaits => d.give(TargetInput::GuestWrites, blocks, &mut said),
            D::GuestWrites(at) => d.guest_writes(at, version, blocks),
            D::Flush => d.sync(),
            D::Abort => d.give(TargetInput::Abort, blocks, &mut said),
            D::Takeover => d.give(TargetInput::Takeover, blocks, &mut said),
            D::Resend => d.give(TargetInput::Resend, blocks, &mut said),
        }
        self.after_target(lane, step, base)?;
        self.say(lane, said, false);
        match overwritten {
            Some(version) => Err(format!("I5: a fetch overwrote version {version}")),
            None => Ok(()),
        }
    }

    fn spend_target(&mut self, step: D) {
        let spec = &mut self.spec;
        match step {
            D::Crash { .. } => Rc::make_mut(spec).left.target_crashes -= 1,
            D::GuestWrites(_) => Rc::make_mut(spec).left.writes -= 1,
            D::Abort => Rc::make_mut(spec).left.aborts -= 1,
            D::Takeover => {
                let spec = Rc::make_mut(spec);
                spec.left.forces -= 1;
                spec.forced = true;
            }
            _ => {}
        }
    }

    fn after_target(&mut self, lane: usize, step: D, base: usize) -> Result<(), String> {
        let Lane { s, d, .. } = &self.lanes[lane];
        let owner = d.record.as_ref().is_some_and(owns);
        match step {
            D::Flush | D::Filled => {
                let spec = Rc::make_mut(&mut self.spec);
                (0..d.now.len()).for_each(|at| spec.synced[base + at] = spec.truth[base + at]);
            }
            // What was only acknowledged may be gone, what was synced may not.
            D::Crash { .. } if owner && !self.spec.lost => {
                let spec = Rc::make_mut(&mut self.spec);
                for (at, value) in d.now.iter().enumerate() {
                    let value = value.unwrap_or(s.now[at]);
                    let (synced, truth) = (spec.synced[base + at], spec.truth[base + at]);
                    if !(synced..=truth).contains(&value) {
                        return Err(format!(
                            "I4: block {at} had version {synced} synced and now has {value}"
                        ));
                    }
                    spec.truth[base + at] = value;
                }
            }
            // A peer that is declared dead may have withdrawn, and gone on.
            D::Takeover => {
                let same = s.record.as_ref().zip(d.record.as_ref()).is_some_and(|(s, d)| {
                    use SourceState as S;
                    let frozen = [S::Offered, S::HandedOver, S::TakingBack, S::Reclaiming];
                    let frozen = frozen.map(State::Source).contains(&s.state());
                    frozen && (s.term() == d.term() || s.term().next() == d.term())
                });
                if !same {
                    Rc::make_mut(&mut self.spec).lost = true;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Whether a durable record says that its side owns the disks.
fn owns(record: &infill_migrate::Record) -> bool {
    match record.state() {
        State::Source(state) => matches!(state, SourceState::Serving | SourceState::Prepared),
        State::Target(state) => {
            matches!(state, TargetState::Owner | TargetState::Complete | TargetState::Local)
        }
    }
}
