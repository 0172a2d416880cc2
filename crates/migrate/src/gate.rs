//! The gate behind the name under which a hypervisor knows its disk, as a pure function of the durable state and of
//! the few things that are only in memory. A hypervisor never sees an epoch.

use crate::record::{SourceState, TargetState};

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gate {
    /// It runs.
    Run,
    /// Reads run. A write or discard waits until the machine was told (`GuestWrites`) and the gate says [`Gate::Run`].
    RunReads,
    /// Reads and writes wait; a FLUSH waits too.
    Hold,
    /// Reads and writes wait; a FLUSH is answered, for everything acknowledged is stable.
    HoldButFlush,
    /// A read or write of a session that was open at the freeze waits, and the machine is told (`OldSession`); any other
    /// gets EPERM. A FLUSH is answered.
    AskBack,
    /// Size, flags and reads go to the source's read-only export; EPERM to writes.
    ReadSource,
    /// EPERM to reads and writes; a FLUSH is answered.
    Deny,
}

impl Gate {
    /// Whether requests of a guest run: whether a machine may be alive on this disk here.
    pub fn runs(self) -> bool {
        matches!(self, Gate::Run | Gate::RunReads)
    }
}

/// What the source is about, in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourcePhase {
    /// What the durable state says.
    Settled,
    /// Restarted, and the peer was not asked yet.
    Unasked,
    /// FREEZING: waits for writes in flight.
    Draining,
    /// FREEZING: the fence is being set.
    Fencing,
    /// FREEZING: the image is being synced and sealed.
    Sealing,
    /// FREEZING: synced and sealed, not offered yet.
    Sealed,
    /// The `.base` export is being closed and the fence taken away.
    Thawing,
    /// A higher term was met: the fence is being set.
    Yielding,
    /// A record could not be written, so it is not known which one is on the disk. Until a restart.
    Failed,
}

/// The gate of the source's hypervisor. `old_sessions`: those that were open at the freeze are.
pub fn source_gate(state: SourceState, phase: SourcePhase, old_sessions: bool) -> Gate {
    match (state, phase) {
        (SourceState::Serving | SourceState::Prepared, SourcePhase::Settled) => Gate::Run,
        (SourceState::Serving | SourceState::Prepared, SourcePhase::Sealed) => Gate::HoldButFlush,
        (SourceState::Serving | SourceState::Prepared, _) => Gate::Hold,
        (SourceState::Offered, _) => Gate::HoldButFlush,
        (SourceState::HandedOver, _) if old_sessions => Gate::AskBack,
        (SourceState::TakingBack, _) => Gate::HoldButFlush,
        (_, _) => Gate::Deny,
    }
}

/// The gate of the target's hypervisor. `sure`: no record failed to be written and, after a restart, the peer was asked
/// whether it still agrees.
pub fn target_gate(state: TargetState, let_through: bool, sure: bool) -> Gate {
    match state {
        TargetState::Prepared => Gate::ReadSource,
        TargetState::Accepted | TargetState::TakingOver => Gate::HoldButFlush,
        TargetState::Owner | TargetState::Complete | TargetState::Local if !sure => Gate::Hold,
        TargetState::Owner if !let_through => Gate::RunReads,
        TargetState::Owner | TargetState::Complete | TargetState::Local => Gate::Run,
        TargetState::GivingBack | TargetState::GaveBack | TargetState::Aborted | TargetState::Superseded => {
            Gate::Deny
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_owner_runs_requests() {
        use SourceState as S;
        use TargetState as T;
        for state in [S::Offered, S::HandedOver, S::TakingBack, S::Reclaiming, S::Released, S::Superseded] {
            for old in [false, true] {
                assert!(!source_gate(state, SourcePhase::Settled, old).runs(), "{state:?}");
            }
        }
        for phase in [SourcePhase::Unasked, SourcePhase::Draining, SourcePhase::Thawing, SourcePhase::Failed]
        {
            assert!(!source_gate(S::Prepared, phase, true).runs(), "{phase:?}");
        }
        for state in
            [T::Prepared, T::Accepted, T::TakingOver, T::GivingBack, T::GaveBack, T::Aborted, T::Superseded]
        {
            assert!(!target_gate(state, false, true).runs(), "{state:?}");
        }
        assert_eq!(target_gate(T::Owner, false, true), Gate::RunReads);
        assert_eq!(target_gate(T::Owner, true, true), Gate::Run);
        assert_eq!(target_gate(T::Owner, true, false), Gate::Hold);
        assert_eq!(source_gate(S::HandedOver, SourcePhase::Settled, true), Gate::AskBack);
    }
}
