//! A rate limit without bursts: bytes are let through at the instants at which an even flow would have brought them.

use std::time::Duration;

/// How far behind its schedule a flow may catch up: timers fire late, and that must not cost rate.
const CATCH_UP: Duration = Duration::from_millis(20);

/// A token bucket of (nearly) no depth.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    bytes_per_second: u64,
    next: Duration,
}

impl Pace {
    /// Sets the rate; 0 is no limit. A change counts from the next byte on.
    pub(crate) fn set(&mut self, now: Duration, bytes_per_second: u64) {
        if bytes_per_second != self.bytes_per_second {
            self.bytes_per_second = bytes_per_second;
            self.next = self.next.min(now);
        }
    }

    /// When the next request may go.
    pub(crate) fn ready_at(&self) -> Duration {
        if self.bytes_per_second == 0 { Duration::ZERO } else { self.next }
    }

    /// Counts a request that goes now.
    pub(crate) fn take(&mut self, now: Duration, bytes: u64) {
        if self.bytes_per_second == 0 {
            return;
        }
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.next = self.next.max(now.saturating_sub(CATCH_UP)).saturating_add(cost);
    }

    /// The largest request that keeps the flow even: a twentieth of a second's bytes.
    pub(crate) fn request_bytes(&self) -> u64 {
        if self.bytes_per_second == 0 { u64::MAX } else { self.bytes_per_second / 20 }
    }
}
