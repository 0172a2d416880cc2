//! What must be true of every state of the world: I1 to I8.

use infill_migrate::{Body, Gate, Holder, Side, SourceState, State, TargetState, Term};

use super::hosts::{SourceHost, TargetHost};
use super::world::{Bounds, Lane, World};

fn source(s: &SourceHost) -> Option<(SourceState, Term)> {
    s.record.as_ref().map(|record| match record.state() {
        State::Source(state) => (state, record.term()),
        State::Target(_) => unreachable!("a target's record at the source"),
    })
}

fn target(d: &TargetHost) -> Option<(TargetState, Term)> {
    d.record.as_ref().map(|record| match record.state() {
        State::Target(state) => (state, record.term()),
        State::Source(_) => unreachable!("a source's record at the target"),
    })
}

/// Whether the guest may run at the source, or something of it is still on its way to the image.
fn source_runs(lane: &Lane) -> bool {
    lane.s.gate().runs() || lane.s.writing.is_some()
}

/// Whether the source's disk is somebody else's, so that a machine started by the image's path would be a second one.
fn must_be_fenced(state: SourceState) -> bool {
    use SourceState as S;
    matches!(state, S::Offered | S::HandedOver | S::TakingBack | S::Reclaiming | S::Released)
}

impl World {
    /// The first promise that does not hold.
    pub fn check(&self, bounds: &Bounds) -> Result<(), String> {
        let runs_at_source = self.lanes.iter().any(source_runs);
        let runs_at_target = self.lanes.iter().any(|lane| lane.d.gate().runs());
        if runs_at_source && runs_at_target {
            return Err("I1: the machine can write at both sides".into());
        }
        let per_lane = self.spec.truth.len() / self.lanes.len();
        for (index, lane) in self.lanes.iter().enumerate() {
            self.check_owners(lane)?;
            self.check_exports(lane)?;
            self.check_contents(lane, &self.spec.truth[index * per_lane..][..per_lane])?;
            check_answers(lane, bounds)?;
        }
        Ok(())
    }

    fn check_owners(&self, lane: &Lane) -> Result<(), String> {
        let Some((state, term)) = source(&lane.s) else { return Ok(()) };
        if must_be_fenced(state) && !lane.s.fence && !self.spec.forced {
            return Err(format!("I1: {state:?} and without its fence: the image's path can be started"));
        }
        let Some((target, target_term)) = target(&lane.d) else { return Ok(()) };
        let owner = matches!(target, TargetState::Owner | TargetState::Complete | TargetState::Local);
        if owner && !self.spec.forced {
            let held = Holder { term: target_term, side: Side::Target };
            let handed =
                matches!(state, SourceState::HandedOver | SourceState::Released) && term == target_term;
            if !handed && !lane.net.held.contains(&held) {
                return Err(format!(
                    "I1: {target:?}({target_term:?}) while the source is {state:?}({term:?})"
                ));
            }
        }
        if state == SourceState::Released {
            let complete = matches!(target, TargetState::Complete | TargetState::Local);
            if !complete || lane.d.stable.iter().any(Option::is_none) {
                return Err(format!("I7: released, and the target is {target:?} with {:?}", lane.d.stable));
            }
        }
        Ok(())
    }

    fn check_exports(&self, lane: &Lane) -> Result<(), String> {
        let exports = lane.s.machine.as_ref().filter(|_| lane.s.up).map(|machine| machine.exports());
        match exports {
            Some(exports) if exports.base.is_some() && source_runs(lane) => {
                Err("I2: the frozen export is there, and its bytes can change".into())
            }
            _ => Ok(()),
        }
    }

    /// I3, and that nothing that was written is lost.
    fn check_contents(&self, lane: &Lane, truth: &[u8]) -> Result<(), String> {
        let Lane { s, d, .. } = lane;
        if self.spec.lost {
            return Ok(());
        }
        if s.gate() == Gate::Run && s.now != truth {
            return Err(format!("I3: the source reads {:?} where {truth:?} was written", s.now));
        }
        if d.gate().runs() {
            for (at, truth) in truth.iter().enumerate() {
                let read = d.now[at].unwrap_or(s.now[at]);
                if read != *truth {
                    return Err(format!(
                        "I3: the target reads {read} of block {at} where {truth} was written"
                    ));
                }
            }
        }
        Ok(())
    }

    /// I6, of a step: what was present and stable stays while the target owns.
    pub fn check_step(&self, before: &World) -> Result<(), String> {
        for (lane, was) in self.lanes.iter().zip(&before.lanes) {
            let (Some((state, term)), Some((then, old))) = (target(&lane.d), target(&was.d)) else {
                continue;
            };
            let owner =
                |state| matches!(state, TargetState::Owner | TargetState::Complete | TargetState::Local);
            if owner(state) && owner(then) && term == old {
                let gone = lane
                    .d
                    .stable
                    .iter()
                    .zip(&was.d.stable)
                    .any(|(now, then)| now.is_none() && then.is_some());
                let unread = !gone && lane.d.up && was.d.up;
                let gone = gone
                    || unread && lane.d.now.iter().zip(&was.d.now).any(|(a, b)| a.is_none() && b.is_some());
                if gone {
                    return Err("I6: a present block became absent".into());
                }
            }
            if term < old {
                return Err(format!("I1: the target's term went from {old:?} to {term:?}"));
            }
        }
        Ok(())
    }

    /// Exactly one side runs its guest, of every disk.
    pub fn is_good(&self) -> bool {
        self.lanes.iter().all(|lane| lane.s.gate().runs() != lane.d.gate().runs())
    }
}

/// I8: of everything that was ever said, nothing takes back what was said before.
fn check_answers(lane: &Lane, bounds: &Bounds) -> Result<(), String> {
    let net = &lane.net;
    let back_offered =
        |of| net.to_source.iter().any(|message| message.body == Body::BackOffer && message.term == of);
    for message in &net.to_target {
        let next = message.term.next();
        let withdrawn = net.to_target.iter().any(|other| match other.body {
            Body::Claim { forced_from: None, ended } => other.term == next && !(ended && back_offered(next)),
            _ => false,
        });
        if message.body == Body::Confirm && withdrawn {
            return Err(format!("I8: {:?} was confirmed and withdrawn", message.term));
        }
    }
    for message in &net.to_source {
        if message.body == Body::BackRefused && back_offered(message.term.next()) {
            return Err(format!("I8: to give {:?} back was refused and granted", message.term));
        }
    }
    let mut held = net.held.windows(2);
    if bounds.witness && held.any(|pair| pair[0].term >= pair[1].term) {
        return Err("the witness went back".into());
    }
    Ok(())
}
