//! The two machines where the model does not go: peers that talk nonsense, disks that fail, inputs at the wrong time.

use infill_base::{ErrorKind, IoError};
use infill_migrate::{
    BlockSet, Body, Disk, DiskId, Drain, Epoch, Gate, Message, MigrationId, Plan, Record, Round, Source,
    SourceAction, SourceInput, SourcePhase, SourceState, State, TERM_MAX, Target, TargetAction, TargetInput,
    TargetState, Term,
};

const BLOCKS: u64 = 4;

fn plan() -> Plan {
    let disk = |number, epoch| Disk {
        id: DiskId(uuid::Uuid::from_u128(number)),
        bytes: BLOCKS * 512,
        epoch_before: Epoch(epoch),
    };
    Plan {
        migration: MigrationId(uuid::Uuid::from_u128(1)),
        disks: vec![disk(2, 42), disk(3, 0)],
        block_bytes: 512,
        peer: "peer".into(),
        witness: None,
        whole: false,
        way_back: 0,
    }
}

fn message(term: u64, body: Body) -> Message {
    Message { migration: plan().migration, term: Term(term), body }
}

fn sets(blocks: u64) -> Vec<BlockSet> {
    vec![BlockSet::empty(blocks); 2]
}

fn broken() -> IoError {
    IoError::new(ErrorKind::Io, "a broken disk")
}

/// What a driver does whose disks work, and what it was to send.
fn source_gives(source: &mut Source, input: SourceInput) -> Vec<Message> {
    let mut actions = source.handle(input).expect("is not busy");
    let mut said = vec![];
    while !actions.is_empty() {
        let mut next = vec![];
        for action in actions {
            let input = match action {
                SourceAction::Persist(pending) => SourceInput::Settled(pending.settled(Ok(()))),
                SourceAction::Drain(drain) => SourceInput::Drained(drain),
                SourceAction::SetFence => SourceInput::FenceSet(Ok(())),
                SourceAction::Seal => SourceInput::Sealed(Ok(sets(BLOCKS))),
                SourceAction::Thaw => SourceInput::Thawed(Ok(())),
                SourceAction::Send(message) => {
                    said.push(message.into_message());
                    continue;
                }
                _ => continue,
            };
            next.extend(source.handle(input).expect("is awaited"));
        }
        actions = next;
    }
    said
}

fn target_gives(target: &mut Target, input: TargetInput) -> Vec<Message> {
    let mut actions = target.handle(input).expect("is not busy");
    let mut said = vec![];
    while !actions.is_empty() {
        let mut next = vec![];
        for action in actions {
            let input = match action {
                TargetAction::Persist(pending) => TargetInput::Settled(pending.settled(Ok(()))),
                TargetAction::Demote(demotion) => TargetInput::Demoted(demotion.settled(Ok(()))),
                TargetAction::Send(message) => {
                    said.push(message.into_message());
                    continue;
                }
                _ => continue,
            };
            next.extend(target.handle(input).expect("is awaited"));
        }
        actions = next;
    }
    said
}

fn source() -> Source {
    let (mut source, actions) = Source::prepare(plan()).unwrap();
    let [SourceAction::Persist(pending)] = <[_; 1]>::try_from(actions).unwrap() else {
        panic!("a record first")
    };
    source_gives(&mut source, SourceInput::Settled(pending.settled(Ok(()))));
    source_gives(&mut source, SourceInput::Message(message(0, Body::Prepared)));
    source
}

fn target() -> Target {
    let (mut target, actions) = Target::prepare(plan()).unwrap();
    let [TargetAction::Persist(pending)] = <[_; 1]>::try_from(actions).unwrap() else {
        panic!("a record first")
    };
    target_gives(&mut target, TargetInput::Settled(pending.settled(Ok(()))));
    target
}

fn kinds(messages: &[Message]) -> Vec<(u64, &Body)> {
    messages.iter().map(|message| (message.term.0, &message.body)).collect()
}

#[test]
fn all_disks_change_hands_by_one_record_and_every_call_may_come_twice() {
    let (mut source, mut target) = (source(), target());
    let offer = source_gives(&mut source, SourceInput::Freeze);
    assert!(matches!(kinds(&offer)[..], [(1, Body::Offer { .. })]));
    let accepted = target_gives(&mut target, TargetInput::Message(offer[0].clone()));
    let again = target_gives(&mut target, TargetInput::Message(offer[0].clone()));
    assert!(matches!(kinds(&accepted)[..], [(1, Body::Accepted)]) && accepted == again);
    let confirm = source_gives(&mut source, SourceInput::Message(accepted[0].clone()));
    let again = source_gives(&mut source, SourceInput::Message(accepted[0].clone()));
    assert!(matches!(kinds(&confirm)[..], [(1, Body::Confirm)]) && confirm == again);
    target_gives(&mut target, TargetInput::Message(confirm[0].clone()));
    assert_eq!((source.gate(), target.gate()), (Gate::AskBack, Gate::RunReads));
    let epochs =
        |record: &Record| record.plan().disks.iter().map(|disk| record.epoch(disk).0).collect::<Vec<_>>();
    assert_eq!((epochs(source.record()), epochs(target.record())), (vec![43, 1], vec![43, 1]));
}

#[test]
fn that_a_round_was_read_is_said_again_to_a_source_that_did_not_hear_it() {
    let (mut source, mut target) = (source(), target());
    let round = source_gives(&mut source, SourceInput::Warm);
    target_gives(&mut target, TargetInput::Message(round[0].clone()));
    let lost = target_gives(&mut target, TargetInput::RoundRead(Round(1)));
    assert!(matches!(lost[0].body, Body::RoundRead { .. }));
    let prepared = target_gives(&mut target, TargetInput::Resend);
    let again = source_gives(&mut source, SourceInput::Message(prepared[0].clone()));
    let told = target_gives(&mut target, TargetInput::Message(again[0].clone()));
    assert!(told.contains(&lost[0]), "{told:?}");
}

#[test]
fn a_record_that_cannot_be_written_closes_the_gate_and_says_nothing() {
    let mut source = source();
    let mut actions = source.handle(SourceInput::Abort).unwrap();
    let Some(SourceAction::Persist(pending)) = actions.pop() else { panic!("a record first") };
    let failed = source.handle(SourceInput::Settled(pending.settled(Err(broken())))).unwrap();
    assert!(matches!(&failed[..], [SourceAction::Fail(why)] if why.contains("a broken disk")));
    assert_eq!(source.gate(), Gate::Hold);
    assert!(source.standing().is_none() && !source.exports().live);
    assert!(source.handle(SourceInput::Resend).unwrap().is_empty());

    let mut target = target();
    let mut actions = target.handle(TargetInput::Message(message(1, offer(BLOCKS)))).unwrap();
    let Some(TargetAction::Demote(demotion)) = actions.pop() else { panic!("what is stale goes first") };
    let failed = target.handle(TargetInput::Demoted(demotion.settled(Err(broken())))).unwrap();
    assert!(matches!(&failed[..], [TargetAction::Fail(why)] if why.contains("a broken disk")));
    assert!(target.handle(TargetInput::Message(message(1, Body::Confirm))).unwrap().is_empty());
    assert!(!target.gate().runs() && target.standing().is_none());
}

fn offer(blocks: u64) -> Body {
    Body::Offer { bitmap: None, residual: sets(blocks) }
}

fn freeze(source: &mut Source) -> Drain {
    match source.handle(SourceInput::Freeze).unwrap().pop() {
        Some(SourceAction::Drain(drain)) => drain,
        other => panic!("drains first, not {other:?}"),
    }
}

#[test]
fn a_freeze_that_cannot_set_its_fence_lets_the_guest_go_on() {
    let mut source = source();
    let drain = freeze(&mut source);
    assert_eq!((source.gate(), source.phase()), (Gate::Hold, SourcePhase::Draining));
    source.handle(SourceInput::Drained(drain)).unwrap();
    let thaw = source.handle(SourceInput::FenceSet(Err(broken()))).unwrap();
    assert!(matches!(thaw[..], [SourceAction::Thaw]) && source.gate() == Gate::Hold);
    source.handle(SourceInput::Thawed(Ok(()))).unwrap();
    assert_eq!((source.gate(), source.record().term()), (Gate::Run, Term(0)));
}

#[test]
fn a_guest_that_does_not_drain_in_time_goes_on() {
    let mut source = source();
    let late = freeze(&mut source);
    assert!(matches!(source.handle(SourceInput::Timeout).unwrap()[..], [SourceAction::Thaw]));
    source.handle(SourceInput::Thawed(Ok(()))).unwrap();
    assert_eq!(source.gate(), Gate::Run);
    // The drain that nobody waits for any more is none of the next freeze.
    let drain = freeze(&mut source);
    assert!(source.handle(SourceInput::Drained(late)).unwrap().is_empty());
    assert_eq!(source.phase(), SourcePhase::Draining);
    assert!(matches!(source.handle(SourceInput::Drained(drain)).unwrap()[..], [SourceAction::SetFence]));
}

#[test]
fn an_input_that_comes_while_a_record_is_written_comes_back() {
    let mut source = source();
    source.handle(SourceInput::Abort).unwrap();
    let back = source.handle(SourceInput::Message(message(0, Body::Prepared))).unwrap_err();
    assert!(matches!(back.0, SourceInput::Message(_)));
    let mut target = target();
    target.handle(TargetInput::Abort).unwrap();
    assert!(matches!(target.handle(TargetInput::Resend).unwrap_err().0, TargetInput::Resend));
    // The end of an operation of another kind is no end of this one.
    assert!(source.handle(SourceInput::Thawed(Ok(()))).is_err());
}

#[test]
fn nonsense_from_a_peer_changes_nothing() {
    let mut target = target();
    let record = target.record().clone();
    let mut foreign = message(1, offer(BLOCKS));
    foreign.migration = MigrationId(uuid::Uuid::from_u128(99));
    let mut disks = plan().disks;
    disks[0].bytes += 1;
    let wrong_size = Body::Prepare { disks, block_bytes: 512, whole: false, way_back: 0 };
    for message in [
        foreign,
        message(u64::MAX, offer(BLOCKS)),
        message(TERM_MAX, offer(BLOCKS)),
        message(1, offer(BLOCKS + 1)),
        message(1, Body::Offer { bitmap: None, residual: vec![] }),
        message(0, wrong_size),
    ] {
        let actions = target.handle(TargetInput::Message(message.clone())).unwrap();
        assert!(matches!(actions[..], [TargetAction::Refuse(_)]), "{message:?}: {actions:?}");
    }
    for body in
        [Body::Confirm, Body::AskBack, Body::BackAccepted, Body::Released, Body::Accepted, Body::Complete]
    {
        assert!(target.handle(TargetInput::Message(message(1, body))).unwrap().is_empty());
    }
    assert_eq!(target.record(), &record);

    let mut source = source();
    let record = source.record().clone();
    let bodies = [Body::Accepted, Body::BackOffer, Body::BackConfirm, Body::BackRefused, Body::Complete];
    for body in bodies.into_iter().chain([Body::Confirm, Body::Released, Body::AskBack]) {
        assert!(source.handle(SourceInput::Message(message(1, body))).unwrap().is_empty());
    }
    let claim = Body::Claim { ended: false, forced_from: None };
    let refused = source.handle(SourceInput::Message(message(u64::MAX, claim))).unwrap();
    assert!(matches!(refused[..], [SourceAction::Refuse(_)]));
    assert!(source.handle(SourceInput::NextRound(sets(BLOCKS + 1))).unwrap().len() == 1);
    assert_eq!((source.record(), source.gate()), (&record, Gate::Run));
}

fn owner(let_through: bool) -> Target {
    let mut target = target();
    target_gives(&mut target, TargetInput::Message(message(1, offer(BLOCKS))));
    target_gives(&mut target, TargetInput::Message(message(1, Body::Confirm)));
    if let_through {
        target_gives(&mut target, TargetInput::GuestWrites);
    }
    target
}

#[test]
fn a_restarted_owner_holds_until_its_peer_has_answered_or_is_silent() {
    for let_through in [false, true] {
        let record = Record::decode(&owner(let_through).record().encode()).unwrap();
        let (mut target, actions) = Target::restart(record).unwrap();
        assert!(actions.iter().any(|action| matches!(action, TargetAction::AskPeer)));
        assert!(target.asks_peer() && target.gate() == Gate::Hold);
        target.handle(TargetInput::PeerSilent).unwrap();
        assert_eq!(target.gate(), if let_through { Gate::Run } else { Gate::RunReads });
    }
}

#[test]
fn a_disk_is_given_back_only_if_no_write_was_let_through_also_after_a_restart() {
    for let_through in [false, true] {
        let record = Record::decode(&owner(let_through).record().encode()).unwrap();
        let (mut target, _) = Target::restart(record).unwrap();
        let said = target_gives(&mut target, TargetInput::Message(message(1, Body::AskBack)));
        match let_through {
            true => assert!(matches!(kinds(&said)[..], [(1, Body::BackRefused)])),
            false => assert!(matches!(kinds(&said)[..], [(2, Body::BackOffer)])),
        }
        let state = if let_through { TargetState::Owner } else { TargetState::GivingBack };
        assert_eq!(target.record().state(), State::Target(state));
        let again = target_gives(&mut target, TargetInput::Message(message(1, Body::AskBack)));
        assert_eq!(said, again);
    }
}

#[test]
fn a_record_of_the_other_side_makes_no_machine() {
    assert!(Source::restart(target().record().clone()).is_err());
    assert!(Target::restart(source().record().clone()).is_err());
}

#[test]
fn what_is_handed_over_is_neither_withdrawn_nor_frozen_again() {
    let mut source = source();
    source_gives(&mut source, SourceInput::Freeze);
    source_gives(&mut source, SourceInput::Message(message(1, Body::Accepted)));
    for input in [SourceInput::Withdraw, SourceInput::Freeze, SourceInput::Warm] {
        assert!(matches!(source.handle(input).unwrap()[..], [SourceAction::Refuse(_)]));
    }
    assert!(source.handle(SourceInput::Timeout).unwrap().is_empty());
    assert_eq!(source.record().state(), State::Source(SourceState::HandedOver));
    assert_eq!(source.exports().base, Some(Term(1)));
    // Abort is the request to have it back.
    let said = source_gives(&mut source, SourceInput::Abort);
    assert!(matches!(kinds(&said)[..], [(1, Body::AskBack)]));
}
