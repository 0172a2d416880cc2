//! Leaky buckets: what one limit lets through. No clock in here: time is told.
//!
//! Each request fills the buckets that count it, whatever its size, and all leak at their average rate. A request waits while
//! a bucket is fuller than its brim: a tenth of a second's worth, or, where bursts are allowed, a burst's worth; a second
//! level, that leaks at the rate of the burst, keeps a long burst from coming all at once.

use std::time::Duration;

use infill_base::{ThrottleKind, ThrottleLimits, ThrottleRate};

/// What a rate's brim is without bursts, in seconds.
const BRIM_SECS: f64 = 0.1;

/// Reads, or everything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The disk is read.
    Read,
    /// The disk is changed.
    Write,
}

impl Direction {
    /// Both.
    pub const ALL: [Direction; 2] = [Direction::Read, Direction::Write];

    const fn kinds(self) -> [ThrottleKind; 4] {
        use ThrottleKind::{BpsRead, BpsTotal, BpsWrite, IopsRead, IopsTotal, IopsWrite};
        match self {
            Direction::Read => [BpsTotal, IopsTotal, BpsRead, IopsRead],
            Direction::Write => [BpsTotal, IopsTotal, BpsWrite, IopsWrite],
        }
    }
}

/// How full one bucket is, in its units.
#[derive(Clone, Copy, Debug, Default)]
struct Level {
    all: f64,
    burst: f64,
}

impl Level {
    fn leak(&mut self, rate: &ThrottleRate, secs: f64) {
        self.all = (self.all - rate.average as f64 * secs).max(0.0);
        self.burst = (self.burst - rate.max as f64 * secs).max(0.0);
    }

    fn fill(&mut self, rate: &ThrottleRate, units: f64) {
        self.all += units;
        if rate.max_length > 1 {
            self.burst += units;
        }
    }

    /// How long until it is no fuller than its brim, in seconds.
    fn wait(&self, rate: &ThrottleRate) -> f64 {
        let (average, max) = (rate.average as f64, rate.max as f64);
        if rate.average == 0 {
            return 0.0;
        }
        let brim = if rate.max == 0 { average * BRIM_SECS } else { max * rate.max_length as f64 };
        if self.all > brim {
            return (self.all - brim) / average;
        }
        let brim = max * BRIM_SECS;
        if rate.max_length > 1 && self.burst > brim { (self.burst - brim) / max } else { 0.0 }
    }
}

/// The buckets of a group.
#[derive(Debug, Default)]
pub struct Buckets {
    limits: ThrottleLimits,
    levels: [Level; 6],
    /// When they have leaked last.
    then: Duration,
}

impl Buckets {
    /// What they let through.
    pub fn limits(&self) -> &ThrottleLimits {
        &self.limits
    }

    /// Other limits hold from now on; nothing has been let through yet.
    pub fn set_limits(&mut self, limits: ThrottleLimits, now: Duration) {
        *self = Buckets { limits, levels: Default::default(), then: now };
    }

    fn leak(&mut self, now: Duration) {
        let secs = now.saturating_sub(self.then).as_secs_f64();
        self.then = self.then.max(now);
        for (level, rate) in self.levels.iter_mut().zip(&self.limits.rates) {
            level.leak(rate, secs);
        }
    }

    /// How long a request has to wait; `None`: not at all.
    pub fn wait(&mut self, direction: Direction, now: Duration) -> Option<Duration> {
        self.leak(now);
        let wait = |kind: ThrottleKind| self.levels[kind as usize].wait(self.limits.rate(kind));
        let secs = direction.kinds().map(wait).into_iter().fold(0.0, f64::max);
        // Rounded up, so that whoever waits that long need not wait again.
        (secs > 0.0).then(|| {
            Duration::try_from_secs_f64(secs).unwrap_or(Duration::MAX).saturating_add(Duration::from_nanos(1))
        })
    }

    /// A request of `bytes` has gone through.
    pub fn account(&mut self, direction: Direction, bytes: u64, now: Duration) {
        self.leak(now);
        let requests = match self.limits.iops_size {
            size if size > 0 && bytes > size => bytes as f64 / size as f64,
            _ => 1.0,
        };
        for kind in direction.kinds() {
            use ThrottleKind::{BpsRead, BpsTotal, BpsWrite};
            let units = if matches!(kind, BpsTotal | BpsRead | BpsWrite) { bytes as f64 } else { requests };
            self.levels[kind as usize].fill(self.limits.rate(kind), units);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: ThrottleKind, average: u64, max: u64, max_length: u64) -> Buckets {
        let mut limits = ThrottleLimits::default();
        *limits.rate_mut(kind) = ThrottleRate { average, max, max_length };
        limits.check().unwrap();
        let mut buckets = Buckets::default();
        buckets.set_limits(limits, Duration::ZERO);
        buckets
    }

    /// How many requests of `bytes` go through until `secs`, each as soon as it may.
    fn through(buckets: &mut Buckets, direction: Direction, bytes: u64, secs: u64) -> u64 {
        let (mut now, mut count) = (Duration::ZERO, 0);
        loop {
            match buckets.wait(direction, now) {
                Some(wait) => now += wait,
                None => {
                    buckets.account(direction, bytes, now);
                    count += 1;
                }
            }
            if now >= Duration::from_secs(secs) {
                return count;
            }
        }
    }

    #[test]
    fn the_average_holds_in_the_long_run_and_a_burst_is_what_was_allowed() {
        let run = |kind, average, max, length, bytes| {
            through(&mut of(kind, average, max, length), Direction::Write, bytes, 100)
        };
        let within = |count: u64, expected: u64| {
            assert!(count.abs_diff(expected) <= expected / 100 + 2, "{count}, not {expected}");
        };
        within(run(ThrottleKind::IopsTotal, 50, 0, 1, 4096), 100 * 50 + 5);
        within(run(ThrottleKind::IopsWrite, 50, 500, 1, 4096), 100 * 50 + 500);
        within(run(ThrottleKind::IopsWrite, 50, 500, 10, 4096), 100 * 50 + 5000);
        within(run(ThrottleKind::BpsWrite, 1 << 20, 0, 1, 4096), 100 * 256 + 25);
        within(run(ThrottleKind::BpsTotal, 1 << 20, 0, 1, 64 << 10), 100 * 16 + 2);
    }

    #[test]
    fn a_long_burst_goes_at_its_rate_and_not_at_once() {
        let mut buckets = of(ThrottleKind::IopsTotal, 10, 100, 10);
        let first = through(&mut buckets, Direction::Read, 512, 1);
        assert!((100..=112).contains(&first), "{first}");
    }

    #[test]
    fn reads_and_writes_share_a_total_and_nothing_else() {
        let mut total = of(ThrottleKind::IopsTotal, 10, 0, 1);
        let mut reads = of(ThrottleKind::IopsRead, 10, 0, 1);
        for buckets in [&mut total, &mut reads] {
            for _ in 0..5 {
                buckets.account(Direction::Read, 512, Duration::ZERO);
            }
            // Four more than the brim, at ten a second.
            let wait = buckets.wait(Direction::Read, Duration::ZERO).unwrap();
            assert_eq!(wait.as_millis(), 400);
        }
        assert!(total.wait(Direction::Write, Duration::ZERO).is_some());
        assert!(reads.wait(Direction::Write, Duration::ZERO).is_none());
    }

    #[test]
    fn a_large_request_counts_as_several_where_that_is_asked_for() {
        let mut buckets = of(ThrottleKind::IopsTotal, 10, 0, 1);
        let limits = ThrottleLimits { iops_size: 4096, ..*buckets.limits() };
        buckets.set_limits(limits, Duration::ZERO);
        buckets.account(Direction::Write, 6 * 4096, Duration::ZERO);
        assert_eq!(buckets.wait(Direction::Write, Duration::ZERO).unwrap().as_millis(), 500);
    }

    #[test]
    fn a_clock_that_stands_still_or_limits_of_the_largest_size_break_nothing() {
        let mut buckets = of(ThrottleKind::BpsTotal, ThrottleLimits::VALUE_MAX, 0, 1);
        buckets.account(Direction::Read, u64::MAX, Duration::MAX);
        assert!(buckets.wait(Direction::Read, Duration::ZERO).is_some());
        let mut one = of(ThrottleKind::BpsTotal, 1, 0, 1);
        one.account(Direction::Read, u64::MAX, Duration::ZERO);
        assert!(one.wait(Direction::Read, Duration::ZERO).unwrap() > Duration::from_secs(1 << 40));
    }
}
