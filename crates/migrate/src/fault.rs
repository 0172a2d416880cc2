//! Mistakes that can be planted, to prove that the model finds them. Never made without the feature `planted-faults`.

/// A mistake in the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(
    not(feature = "planted-faults"),
    expect(dead_code, reason = "some are asked for by their feature only")
)]
pub enum Fault {
    /// The target runs the guest once it has accepted, before the source's confirm.
    StartsBeforeConfirm,
    /// The source confirms before its record of the handover is stable.
    ConfirmsBeforeSync,
    /// A withdrawn term is offered again.
    TermUsedAgain,
    /// The target accepts an offer that is not newer than what it has seen.
    AcceptsOlderOffer,
    /// A fetch that was begun before its block was demoted still links.
    LinksAfterDemotion,
    /// A dirty bit is set before its write has landed, and not after.
    DirtyBeforeLanded,
    /// The fence is set after the record of the handover, not before the offer.
    FenceAfterHandover,
    /// The target keeps only in memory that it has let a write through.
    ForgetsLetThrough,
    /// With a witness, the source withdraws without asking it.
    WithdrawsWithoutWitness,
    /// Blocks that were copied under an older bitmap stay warm under a new one.
    KeepsForeignWarm,
    /// A set of dirty blocks is dropped as soon as it was sent.
    DropsUnappliedRound,
    /// The fence is taken away before the record that gives the disk back is stable.
    ThawsBeforeRecord,
    /// A restarted owner opens its gate without asking its peer.
    OpensUnasked,
    /// The target grants a hand-back although it has let a write through.
    GrantsAfterWrite,
}

#[cfg(feature = "planted-faults")]
impl Fault {
    /// All of them.
    pub const ALL: [Fault; 14] = [
        Fault::StartsBeforeConfirm,
        Fault::ConfirmsBeforeSync,
        Fault::TermUsedAgain,
        Fault::AcceptsOlderOffer,
        Fault::LinksAfterDemotion,
        Fault::DirtyBeforeLanded,
        Fault::FenceAfterHandover,
        Fault::ForgetsLetThrough,
        Fault::WithdrawsWithoutWitness,
        Fault::KeepsForeignWarm,
        Fault::DropsUnappliedRound,
        Fault::ThawsBeforeRecord,
        Fault::OpensUnasked,
        Fault::GrantsAfterWrite,
    ];
}

/// What is planted: nothing, in a build without the feature.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Planted(#[cfg(feature = "planted-faults")] Option<Fault>);

impl Planted {
    #[cfg(feature = "planted-faults")]
    pub(crate) fn new(fault: Option<Fault>) -> Planted {
        Planted(fault)
    }

    #[cfg(feature = "planted-faults")]
    pub(crate) fn is(self, fault: Fault) -> bool {
        self.0 == Some(fault)
    }

    /// Never: there are no planted mistakes in this build.
    #[cfg(not(feature = "planted-faults"))]
    pub(crate) fn is(self, _: Fault) -> bool {
        false
    }
}
