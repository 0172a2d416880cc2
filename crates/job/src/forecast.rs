//! When a job will have ended, if it goes on as it did.

use std::time::Duration;

/// Of a new look at the rate, so much counts; the rest is what came before.
const NEWEST_COUNTS: f64 = 0.25;

/// How fast a job gets on, from its progress now and then.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Forecast {
    /// When it was looked at last, and where it stood then.
    last: Option<(Duration, u64)>,
    /// Bytes a second, smoothed.
    rate: Option<f64>,
}

impl Forecast {
    /// Notes that it stood at `offset` at the time `now`.
    pub fn look(&mut self, now: Duration, offset: u64) {
        let Some((then, before)) = self.last else {
            self.last = Some((now, offset));
            return;
        };
        let seconds = now.saturating_sub(then).as_secs_f64();
        if seconds <= 0.0 {
            return;
        }
        let newest = offset.saturating_sub(before) as f64 / seconds;
        self.rate = Some(self.rate.map_or(newest, |rate| rate + (newest - rate) * NEWEST_COUNTS));
        self.last = Some((now, offset));
    }

    /// Begins anew: what comes is not told from what was.
    pub fn forget(&mut self) {
        *self = Forecast::default();
    }

    /// Whole seconds that `left` bytes take, rounded up; `None` where it does not get on, or is not known yet.
    pub fn seconds(&self, left: u64) -> Option<u64> {
        // Below a byte a second there is no end that means anything.
        self.rate.filter(|rate| *rate >= 1.0).map(|rate| (left as f64 / rate).ceil() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_from_the_rate_and_only_where_there_is_one() {
        let (mut forecast, second) = (Forecast::default(), Duration::from_secs(1));
        assert_eq!(forecast.seconds(100), None, "nothing is known yet");
        forecast.look(second, 1000);
        assert_eq!(forecast.seconds(100), None, "one look is no rate");
        forecast.look(2 * second, 2000);
        assert_eq!(forecast.seconds(10_001), Some(11));
        assert_eq!(forecast.seconds(0), Some(0));
        forecast.look(2 * second, 9000);
        assert_eq!(forecast.seconds(10_000), Some(10), "no time has passed");
        for later in 3..60 {
            forecast.look(later * second, 2000);
        }
        assert_eq!(forecast.seconds(10_000), None, "it stands still");
        forecast.forget();
        assert_eq!(forecast.seconds(0), None);
    }
}
