//! What travels with a request: who asks, and how it wants its write done.

use std::time::Duration;

use bitflags::bitflags;

/// Who asks. Ordered: a later class goes first everywhere (30-streaming, strict priority).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// A background job.
    Fill,
    /// The rest of a populate unit around a guest's miss.
    AroundMiss,
    /// Replay of a recorded working set, and other prefetches.
    Prefetch,
    /// A guest waits for it.
    Guest,
}

/// Context of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ctx {
    /// Who asks.
    pub class: Class,
    /// When the asker gives up, on the runtime's clock (time since its start); `None` waits for ever.
    pub deadline: Option<Duration>,
}

impl Ctx {
    /// A guest's request without a deadline.
    pub const GUEST: Ctx = Ctx::of(Class::Guest);
    /// A background job's request without a deadline.
    pub const FILL: Ctx = Ctx::of(Class::Fill);

    /// A request of `class` without a deadline.
    pub const fn of(class: Class) -> Ctx {
        Ctx { class, deadline: None }
    }
}

bitflags! {
    /// How a write is to be done.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct WriteFlags: u8 {
        /// The write has reached stable storage, with all metadata that finds it, before it returns.
        const FUA = 1;
        /// Compressed, where the driver can do that; plain where it cannot.
        const COMPRESSED = 2;
    }
}

bitflags! {
    /// How zeroes are to be written.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct ZeroFlags: u8 {
        /// As [`WriteFlags::FUA`].
        const FUA = 1;
        /// The space may be given back.
        const MAY_UNMAP = 2;
        /// Fail with [`crate::ErrorKind::Unsupported`] where it would not be faster than writing zeroes.
        const NO_FALLBACK = 4;
    }
}

/// What a node does with a guest's discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DiscardMode {
    /// Drop it (QEMU's default for nodes).
    #[default]
    Ignore,
    /// Give the space back.
    Unmap,
}

/// What a node does with a guest's write whose bytes are all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// It is written as it comes.
    #[default]
    Off,
    /// Its range is made zero.
    On,
    /// And the space may be given back.
    Unmap,
}

impl DetectZeroes {
    /// Its name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            DetectZeroes::Off => "off",
            DetectZeroes::On => "on",
            DetectZeroes::Unmap => "unmap",
        }
    }
}
