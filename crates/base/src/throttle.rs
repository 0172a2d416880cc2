//! How much a group of disks may do in a second, as QEMU's managers say it.

/// What one limit counts. The order is that of [`ThrottleLimits::rates`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThrottleKind {
    /// Bytes of all requests.
    BpsTotal,
    /// Bytes of reads.
    BpsRead,
    /// Bytes of writes.
    BpsWrite,
    /// All requests.
    IopsTotal,
    /// Reads.
    IopsRead,
    /// Writes.
    IopsWrite,
}

impl ThrottleKind {
    /// All kinds.
    pub const ALL: [ThrottleKind; 6] = [
        ThrottleKind::BpsTotal,
        ThrottleKind::BpsRead,
        ThrottleKind::BpsWrite,
        ThrottleKind::IopsTotal,
        ThrottleKind::IopsRead,
        ThrottleKind::IopsWrite,
    ];

    /// Its name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            ThrottleKind::BpsTotal => "bps-total",
            ThrottleKind::BpsRead => "bps-read",
            ThrottleKind::BpsWrite => "bps-write",
            ThrottleKind::IopsTotal => "iops-total",
            ThrottleKind::IopsRead => "iops-read",
            ThrottleKind::IopsWrite => "iops-write",
        }
    }
}

/// One limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThrottleRate {
    /// Units a second in the long run; 0 is without a limit.
    pub average: u64,
    /// Units a second during a burst; 0 is without bursts (but for a tenth of a second's worth).
    pub max: u64,
    /// How long a burst may last, in seconds.
    pub max_length: u64,
}

impl Default for ThrottleRate {
    fn default() -> Self {
        ThrottleRate { average: 0, max: 0, max_length: 1 }
    }
}

/// All limits of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ThrottleLimits {
    /// One of each [`ThrottleKind`].
    pub rates: [ThrottleRate; 6],
    /// A request of more bytes counts as several; 0: as one, whatever its size.
    pub iops_size: u64,
}

impl ThrottleLimits {
    /// Largest rate, in units a second.
    pub const VALUE_MAX: u64 = 1_000_000_000_000_000;

    /// The limit of that kind.
    pub const fn rate(&self, kind: ThrottleKind) -> &ThrottleRate {
        &self.rates[kind as usize]
    }

    /// The limit of that kind, to be changed.
    pub const fn rate_mut(&mut self, kind: ThrottleKind) -> &mut ThrottleRate {
        &mut self.rates[kind as usize]
    }

    /// Whether they make sense together; QEMU's words where they do not.
    pub fn check(&self) -> Result<(), String> {
        let set = |kind: ThrottleKind| self.rate(kind).average > 0;
        let bursts = |kind: ThrottleKind| self.rate(kind).max > 0;
        use ThrottleKind::{BpsRead, BpsTotal, BpsWrite, IopsRead, IopsTotal, IopsWrite};
        for (total, read, write) in [(BpsTotal, BpsRead, BpsWrite), (IopsTotal, IopsRead, IopsWrite)] {
            if set(total) && (set(read) || set(write)) || bursts(total) && (bursts(read) || bursts(write)) {
                return Err(
                    "bps/iops/max total values and read/write values cannot be used at the same time".into(),
                );
            }
        }
        if self.iops_size > 0 && !set(IopsTotal) && !set(IopsRead) && !set(IopsWrite) {
            return Err("iops size requires an iops value to be set".into());
        }
        self.rates.iter().try_for_each(ThrottleRate::check)
    }
}

impl ThrottleRate {
    fn check(&self) -> Result<(), String> {
        let ThrottleRate { average, max, max_length } = *self;
        let most = ThrottleLimits::VALUE_MAX;
        Err(if average > most || max > most {
            format!("bps/iops/max values must be within [0, {most}]")
        } else if max_length == 0 {
            "the burst length cannot be 0".to_owned()
        } else if max_length > 1 && max == 0 {
            "burst length set without burst rate".to_owned()
        } else if max > 0 && max_length > most / max {
            "burst length too high for this burst rate".to_owned()
        } else if max > 0 && average == 0 {
            "bps_max/iops_max require corresponding bps/iops values".to_owned()
        } else if max > 0 && max < average {
            "bps_max/iops_max cannot be lower than bps/iops".to_owned()
        } else {
            return Ok(());
        })
    }
}
