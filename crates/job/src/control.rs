//! How much of a fill may be in flight: the latency control, as a state machine without I/O or clock.
//!
//! Outstanding bytes = rate × shortest round trip + what may queue at the slowest hop. Rate and round trip are
//! discovered; what may queue depends on who else is there:
//!
//! | guest misses | queued at the slowest hop |
//! |---|---|
//! | within the last 50 ms | 0.35 ms of rate, in requests of that size |
//! | within the last 2 s | 2 ms of rate |
//! | none | as much again as is on the way, and 4 ms of rate |
//!
//! Every 100 ms the p90 of guest misses is compared with the floor, the smallest sample of the last 10 s; where it is
//! over max(2 × floor, floor + 1 ms), the window halves (down to one request), else it grows. The guest's reads (their
//! p90), writes and FLUSHes (their upper quartile) do the same to the *pace* (bytes per second),
//! since they share the local disk, not the link; while a guest writes or flushes, local writes go one piece at a
//! time. A guest that is as slow under a fill that is held far back does not
//! suffer from it: then window and pace grow all the same, and it is tried again after 10 s.
//! What a fill gets while it waits for its own overlay does not count as the rate of the link: smaller requests would
//! make it slower still.
//! Neither takes the fill below `min_rate`. The round trip is measured anew every 10 s with nothing else in flight: a
//! minimum that was taken behind the fill's own queue would drift up without end.

use std::collections::VecDeque;
use std::time::Duration;

/// Largest request, in bytes.
pub(crate) const REQUEST_BYTES_MAX: u64 = 1 << 20;
/// Smallest request (but for the ends of runs), in bytes.
pub(crate) const REQUEST_BYTES_MIN: u64 = 4096;
/// Most that is asked for and not answered, in bytes.
pub(crate) const WINDOW_BYTES_MAX: u64 = 64 << 20;
/// How often latencies are looked at.
pub(crate) const TICK: Duration = Duration::from_millis(100);
/// How long a guest miss counts as *now*.
const MISS_RECENT: Duration = Duration::from_millis(50);
/// Bytes in local writes, above which nothing more is asked for: no more than a guest's FLUSH may find dirty.
pub(crate) const LINK_BYTES_MAX: u64 = 4 << 20;
/// Bytes that are written at a time while guests write or flush, and the largest request then: a FLUSH finds no more
/// than that in the disk's queue.
const BUSY_BYTES: u64 = 128 << 10;
/// Bytes that are asked of a near source, or wait for the overlay: a cache answers many requests in one go, and what guests ask for
/// meanwhile waits behind it.
const NEAR_BYTES_MAX: u64 = LINK_BYTES_MAX;
/// The same while guests write or flush, when what has come is written a piece at a time.
const NEAR_BUSY_BYTES: u64 = 8 * BUSY_BYTES;
/// A source whose round trip is no longer than this is near: its window is [`Control::near_requests`] large.
const NEAR: Duration = Duration::from_millis(1);
/// How many requests fill the window of a distant source: the more, the sooner the first of them is there.
const DISTANT_REQUESTS: u64 = 8;
/// How long a disk without misses counts as in use.
const MISS_LATELY: Duration = Duration::from_secs(2);
/// How long a floor and a round trip hold.
const FLOOR_AGE: Duration = Duration::from_secs(10);
/// Window at the start, in bytes.
const WINDOW_BYTES_START: u64 = 64 << 10;
/// A rate is measured over at least this.
const RATE_SPAN_MIN: Duration = Duration::from_millis(10);
/// Rates of which the largest counts.
const RATES_KEPT: usize = 10;
/// A fill that is held back to this part of what it could do is not what makes guests slow.
const CALM_PART: f64 = 1.0 / 8.0;
/// What is left of the pace when guests suffer, and how it comes back: below and near where they suffered.
const SLOWER: f64 = 0.7;
const FASTER: f64 = 1.25;
const FASTER_NEAR: f64 = 1.04;
/// What a tick's best rate is worth a tick later.
const RATE_KEPT: f64 = 0.9;
/// How far control may take the window down, as a part of what the link gives.
const SCALE_MIN: f64 = 1.0 / 256.0;

/// Smallest sample of the last ten seconds.
#[derive(Debug, Default)]
struct Floor(VecDeque<(Duration, Duration)>);

impl Floor {
    fn note(&mut self, now: Duration, sample: Duration) {
        while self.0.back().is_some_and(|(_, other)| *other >= sample) {
            self.0.pop_back();
        }
        self.0.push_back((now, sample));
        // The last one stays even when it is old: better an old floor than none.
        while self.0.len() > 1 && self.0[0].0 + FLOOR_AGE < now {
            self.0.pop_front();
        }
    }

    fn get(&self) -> Option<Duration> {
        self.0.front().map(|(_, sample)| *sample)
    }
}

/// A moving average, and when it was last moved.
#[derive(Debug, Default)]
struct Usual(Option<(Duration, Duration)>);

impl Usual {
    fn note(&mut self, now: Duration, sample: Duration) {
        let before = self.get(now);
        self.0 = Some((now, before.map_or(sample, |before| (before * 3 + sample) / 4)));
    }

    fn get(&self, now: Duration) -> Option<Duration> {
        self.0.filter(|(at, _)| *at + FLOOR_AGE >= now).map(|(_, average)| average)
    }
}

/// Which of a tick's samples is compared with the floor, in percent of them. Of reads: a cache answers most of them, and those
/// that it does not answer are the ones that wait for the fill.
const TAIL: usize = 90;
/// Of writes and FLUSHes: a fill makes most of them slower, a busy machine makes some of them much slower.
const QUARTILE: usize = 75;

/// One kind of guest request: its floor, and what the fill has to do with it.
///
/// Latencies above the floor need not be the fill's doing: the machine may be busy, requests large, a copy-up distant.
/// So what it meets under a fill that is held far back is compared with what it meets under one that is not. Where holding
/// it back has not helped, it is let go again; after a while it is tried anew.
#[derive(Debug, Default)]
struct Watch {
    floor: Floor,
    /// What it met while the fill was held far back, and while it was not.
    calm: Usual,
    loud: Usual,
}

/// What a guest meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meets {
    /// What it would meet without the fill.
    Usual,
    /// It is slow, and so it is whatever the fill does.
    SlowAnyway,
    /// Worse than without.
    Suffers,
}

impl Watch {
    /// Takes the samples of one tick, in which the fill was held far back (`calm`) or not; `None` if there are none.
    fn look(&mut self, now: Duration, samples: &mut [Duration], calm: bool, percent: usize) -> Option<Meets> {
        samples.sort_unstable();
        self.floor.note(now, *samples.first()?);
        let felt = samples[(samples.len() - 1) * percent / 100];
        let side = if calm { &mut self.calm } else { &mut self.loud };
        side.note(now, felt);
        let floor = self.floor.get()?;
        if felt <= (2 * floor).max(floor + Duration::from_millis(1)) {
            return Some(Meets::Usual);
        }
        let anyway = match (self.calm.get(now), self.loud.get(now)) {
            (Some(usual), _) if !calm => felt <= usual + usual / 2,
            (Some(usual), Some(loud)) => loud <= usual + usual / 2,
            // Held back for long: let it show again whether it is the fill.
            (Some(_), None) => true,
            (None, _) => false,
        };
        Some(if anyway { Meets::SlowAnyway } else { Meets::Suffers })
    }
}

/// What guests met since the last tick.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) misses: Vec<Duration>,
    pub(crate) reads: Vec<Duration>,
    pub(crate) writes: Vec<Duration>,
    pub(crate) syncs: Vec<Duration>,
}

/// The control of one fill.
#[derive(Debug)]
pub(crate) struct Control {
    /// Bytes per second below which politeness does not take the fill.
    min_rate: u64,
    /// How many requests fill the window of a near source: few large ones cost less than many small ones.
    near_requests: u64,
    round_trip: Floor,
    probed_at: Option<Duration>,
    rates: VecDeque<f64>,
    span_start: Duration,
    span_bytes: u64,
    span_limited: bool,
    /// What came had to wait for room in the overlay: the link could have given more.
    span_behind: bool,
    /// Grows with every answer while nothing is known of the link; `None` once the rate stopped growing.
    start_window: Option<u64>,
    flat_spans: u32,
    last_miss: Option<Duration>,
    last_write: Option<Duration>,
    /// The part of the window that control leaves to the fill.
    window_scale: f64,
    /// Bytes per second that control leaves to the fill; `None` is no limit.
    pace: Option<f64>,
    /// The most that was linked in a tick, as bytes per second, of late.
    best_rate: f64,
    /// The pace at which guests suffered last: near it, the pace grows slowly.
    too_fast: f64,
    misses: Watch,
    reads: Watch,
    writes: Watch,
    syncs: Watch,
    /// When guests were looked at last, and what was linked since: a shorter span may have been an unlucky one.
    ticked_at: Duration,
    tick_bytes: u64,
}

impl Control {
    pub(crate) fn new(now: Duration, min_rate: u64, near_requests: u64) -> Control {
        Control {
            min_rate,
            near_requests,
            round_trip: Floor::default(),
            probed_at: None,
            rates: VecDeque::new(),
            span_start: now,
            span_bytes: 0,
            span_limited: false,
            span_behind: false,
            start_window: Some(WINDOW_BYTES_START),
            flat_spans: 0,
            last_miss: None,
            last_write: None,
            window_scale: 1.0,
            pace: None,
            best_rate: 0.0,
            too_fast: f64::MAX,
            misses: Watch::default(),
            reads: Watch::default(),
            writes: Watch::default(),
            syncs: Watch::default(),
            ticked_at: now,
            tick_bytes: 0,
        }
    }

    /// Sets the floor under politeness.
    pub(crate) fn set_min_rate(&mut self, bytes_per_second: u64) {
        self.min_rate = bytes_per_second;
    }

    /// When a guest last missed, and when it last wrote or flushed.
    pub(crate) fn set_last(&mut self, miss: Option<Duration>, write: Option<Duration>) {
        (self.last_miss, self.last_write) = (miss, write);
    }

    fn writes_now(&self, now: Duration) -> bool {
        self.last_write.is_some_and(|at| at + MISS_RECENT >= now)
    }

    /// How many bytes may be in local writes at a time; the rest of what has come waits. One block may always be.
    pub(crate) fn link_bytes_max(&self, now: Duration) -> u64 {
        if self.writes_now(now) { BUSY_BYTES } else { u64::MAX }
    }

    fn missed_within(&self, now: Duration, span: Duration) -> bool {
        self.last_miss.is_some_and(|at| at + span >= now)
    }

    /// The best rate seen lately, in bytes per second.
    pub(crate) fn rate(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    /// Whether the round trip is to be measured: what is in flight drains, one small request goes alone.
    pub(crate) fn probe_due(&self, now: Duration) -> bool {
        self.probed_at.is_none_or(|at| at + FLOOR_AGE < now)
    }

    /// The size of the next request, in bytes.
    pub(crate) fn request_bytes(&self, now: Duration) -> u64 {
        if self.probe_due(now) {
            return REQUEST_BYTES_MIN;
        }
        let bytes = if self.missed_within(now, MISS_RECENT) {
            // On a long way a few requests shall fill it: the server may have few threads.
            (self.rate() * 0.000_35).max(self.window(now) as f64 / 8.0)
        } else {
            self.window(now) as f64
                / (if self.is_near() { self.near_requests } else { DISTANT_REQUESTS }) as f64
        };
        let max = if self.writes_now(now) { BUSY_BYTES } else { REQUEST_BYTES_MAX };
        let bytes = (bytes as u64).clamp(REQUEST_BYTES_MIN, max);
        1 << bytes.ilog2()
    }

    /// How many bytes may be asked for and not answered. One request may always be.
    pub(crate) fn window(&self, now: Duration) -> u64 {
        let (rate, trip) = (self.rate(), self.round_trip.get().unwrap_or_default().as_secs_f64());
        let window = if self.missed_within(now, MISS_RECENT) {
            rate * (trip + 0.000_35) * self.window_scale
        } else if self.missed_within(now, MISS_LATELY) {
            rate * (trip + 0.002) * self.window_scale
        } else {
            rate * (2.0 * trip + 0.004) * self.window_scale
        };
        let max = match self.is_near() {
            true if self.writes_now(now) => NEAR_BUSY_BYTES,
            true => NEAR_BYTES_MAX,
            false => WINDOW_BYTES_MAX,
        };
        (window as u64).max(self.start_window.unwrap_or(0)).clamp(REQUEST_BYTES_MIN, max)
    }

    fn is_near(&self) -> bool {
        self.round_trip.get().is_some_and(|trip| trip <= NEAR)
    }

    /// The rate that the local disk's guests leave to the fill, in bytes per second; 0 is no limit.
    pub(crate) fn pace(&self) -> u64 {
        self.pace.map_or(0, |pace| (pace as u64).max(self.min_rate).max(REQUEST_BYTES_MIN))
    }

    /// `bytes` came after `took`; `alone`: nothing else was in flight. `limited`: something else than the link limits.
    pub(crate) fn answered(&mut self, now: Duration, bytes: u64, took: Duration, alone: bool, limited: bool) {
        if alone && (bytes <= REQUEST_BYTES_MIN || self.probed_at.is_none()) {
            self.round_trip.note(now, took);
            self.probed_at = Some(now);
        }
        self.grow_at_start(now, bytes, took);
        self.span_bytes += bytes;
        self.span_limited |= limited || self.missed_within(now, MISS_RECENT);
        let span = now.saturating_sub(self.span_start);
        if span >= RATE_SPAN_MIN.max(self.round_trip.get().unwrap_or_default()) {
            self.end_span(now, span);
        }
    }

    /// `bytes` are in the overlay.
    pub(crate) fn linked(&mut self, bytes: u64) {
        self.tick_bytes += bytes;
    }

    /// Doubles the window each round trip, until answers take longer: then a queue has begun to build.
    fn grow_at_start(&mut self, now: Duration, bytes: u64, took: Duration) {
        let Some(window) = &mut self.start_window else { return };
        *window = window.saturating_add(bytes).min(WINDOW_BYTES_MAX);
        let Some(trip) = self.round_trip.get() else { return };
        if took > trip + trip / 4 + Duration::from_millis(1) && self.missed_within(now, MISS_LATELY) {
            self.start_window = None;
        }
    }

    fn end_span(&mut self, now: Duration, span: Duration) {
        let rate = self.span_bytes as f64 / span.as_secs_f64();
        let best = self.rate();
        // What the link gives is not seen while something else holds the fill back.
        if !(self.span_limited || self.span_behind) || rate > best {
            if self.rates.len() == RATES_KEPT {
                self.rates.pop_front();
            }
            self.rates.push_back(rate);
        }
        if !self.span_limited && self.start_window.is_some() {
            self.flat_spans = if rate > best * 1.25 { 0 } else { self.flat_spans + 1 };
            if self.flat_spans >= 3 {
                self.start_window = None;
            }
        }
        self.restart_span(now);
    }

    /// Measures the rate anew from here (after a pause, or when nothing was in flight).
    pub(crate) fn restart_span(&mut self, now: Duration) {
        (self.span_start, self.span_bytes, self.span_limited, self.span_behind) = (now, 0, false, false);
    }

    /// Nothing is asked for because what has come waits for the overlay.
    pub(crate) fn is_behind(&mut self) {
        self.span_behind = true;
    }

    /// Every [`TICK`]: what guests met since the last one.
    pub(crate) fn tick(&mut self, now: Duration, mut seen: Seen) {
        let had_misses = !seen.misses.is_empty();
        let took = now.saturating_sub(self.ticked_at).max(RATE_SPAN_MIN);
        let rate = std::mem::take(&mut self.tick_bytes) as f64 / took.as_secs_f64();
        self.ticked_at = now;
        let polite = rate > self.min_rate as f64;
        match self.misses.look(now, &mut seen.misses, self.window_scale <= CALM_PART, TAIL) {
            Some(Meets::Suffers) if polite => {
                self.start_window = None;
                self.window_scale = (self.window_scale / 2.0).max(SCALE_MIN);
            }
            Some(_) => self.window_scale = (self.window_scale * 1.25).min(1.0),
            None if !self.missed_within(now, MISS_RECENT) => {
                self.window_scale = (self.window_scale * 2.0).min(1.0);
            }
            None => {}
        }
        self.best_rate = rate.max(self.best_rate * RATE_KEPT);
        let calm = rate <= self.best_rate * CALM_PART;
        let local = [
            self.syncs.look(now, &mut seen.syncs, calm, QUARTILE),
            self.writes.look(now, &mut seen.writes, calm, QUARTILE),
            // A read that missed has been looked at above.
            if had_misses { None } else { self.reads.look(now, &mut seen.reads, calm, TAIL) },
        ];
        if local.contains(&Some(Meets::SlowAnyway)) {
            // It was not the fill that made them slow.
            self.too_fast = f64::MAX;
        }
        if local.contains(&Some(Meets::Suffers)) {
            if polite {
                let now = self.pace.unwrap_or(f64::MAX).min(rate);
                (self.pace, self.too_fast) = (Some(now * SLOWER), now);
            }
        } else if let Some(pace) = self.pace {
            let grow = match (local.iter().any(Option::is_some), pace < self.too_fast * 0.8) {
                (false, _) => 2.0,
                (true, true) => FASTER,
                (true, false) => FASTER_NEAR,
            };
            let pace = (pace * grow).max(self.min_rate as f64);
            self.pace = (pace < self.rate()).then_some(pace);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A control that has found a link of 25 MB/s with a round trip of 1 ms.
    fn settled() -> (Control, Duration) {
        let mut control = Control::new(Duration::ZERO, 0, 2);
        let mut now = MS;
        control.answered(now, 4096, MS, true, false);
        for _ in 0..2000 {
            now += MS;
            control.answered(now, 25_000, MS, false, false);
        }
        (control, now)
    }

    /// A tick in which the fill did what 25 MB/s allow.
    fn tick(control: &mut Control, now: Duration, seen: Seen) {
        control.linked(25_000_000 / 100);
        control.tick(now, seen);
    }

    /// Bytes per second that a fill on a link of 25 MB/s does under its pace.
    fn allowed(control: &Control) -> u64 {
        if control.pace() == 0 { 25_000_000 } else { control.pace().min(25_000_000) }
    }

    fn misses(took: Duration) -> Seen {
        Seen { misses: vec![took; 10], ..Seen::default() }
    }

    #[test]
    fn the_queue_at_the_slowest_hop_is_small_while_guests_miss() {
        let (mut control, now) = settled();
        assert!(control.window(now) >= 100_000, "nobody there: {}", control.window(now));
        control.set_last(Some(now), None);
        // 25 MB/s × (1 ms + 0.35 ms).
        assert!((30_000..36_000).contains(&control.window(now)), "{}", control.window(now));
        assert_eq!(control.request_bytes(now), 8192);
        control.set_last(Some(now - 60 * MS), None);
        assert!((70_000..80_000).contains(&control.window(now)), "{}", control.window(now));
    }

    #[test]
    fn slow_misses_halve_the_window_to_one_request_and_good_ones_give_it_back() {
        let (mut control, mut now) = settled();
        control.set_last(Some(now), None);
        let full = control.window(now);
        tick(&mut control, now, misses(MS));
        assert_eq!(control.window(now), full);
        tick(&mut control, now, misses(3 * MS));
        assert!(control.window(now) <= full / 2 + 1);
        // The less the fill does, the better: down to one request.
        for _ in 0..20 {
            let part = control.window_scale;
            tick(&mut control, now, misses(2 * MS + MS / 2 + (100 * MS).mul_f64(part)));
        }
        assert_eq!(control.window(now), REQUEST_BYTES_MIN);
        for _ in 0..40 {
            now += TICK;
            control.set_last(Some(now), None);
            tick(&mut control, now, misses(MS));
        }
        assert_eq!(control.window(now), full);
    }

    #[test]
    fn a_guest_that_is_slow_whatever_the_fill_does_does_not_hold_it_back() {
        let (mut control, mut now) = settled();
        let (mut link, mut disk) = (0, 0);
        for tick in 0..200 {
            now += TICK;
            control.set_last(Some(now), None);
            // A floor of 1 ms, and a tenth of the requests far above it.
            let samples = || (0..10).map(|nth| if nth == 9 { MS } else { 20 * MS }).collect::<Vec<_>>();
            control.tick(now, Seen { misses: samples(), syncs: samples(), ..Seen::default() });
            let may = allowed(&control);
            for _ in 0..100 {
                control.answered(now, may / 1000, MS, false, true);
                control.linked(may / 1000);
            }
            if tick >= 100 {
                link += u64::from(control.window_scale > CALM_PART);
                disk += u64::from(control.pace() == 0 || control.pace() > 5_000_000);
            }
        }
        assert!(link > 80 && disk > 80, "of 100 ticks the link was used in {link}, the disk in {disk}");
    }

    #[test]
    fn politeness_ends_at_the_floor() {
        let (mut control, now) = settled();
        control.set_min_rate(30_000_000);
        control.set_last(Some(now), None);
        let full = control.window(now);
        tick(&mut control, now, misses(MS));
        tick(&mut control, now, misses(50 * MS));
        assert_eq!(control.window(now), full, "the fill is below its floor already");
        control.set_min_rate(1_000_000);
        let (mut now, mut lowest) = (now, u64::MAX);
        for _ in 0..50 {
            // The fill does what it may.
            let may = allowed(&control);
            for _ in 0..20 {
                now += MS;
                control.answered(now, may / 1000, MS, false, true);
                control.linked(may / 1000);
            }
            let slow = 3 * MS + (MS * 4).mul_f64(control.pace.map_or(25.0, |pace| pace / 1e6));
            control.tick(now, Seen { syncs: vec![MS, slow, slow], ..Seen::default() });
            lowest = lowest.min(allowed(&control));
        }
        assert_eq!(lowest, 1_000_000);
    }

    #[test]
    fn a_slow_flush_lowers_the_pace_and_a_quiet_disk_lifts_it() {
        let (mut control, now) = settled();
        assert_eq!(control.pace(), 0);
        tick(&mut control, now, Seen { syncs: vec![MS / 10], ..Seen::default() });
        assert_eq!(control.pace(), 0);
        tick(&mut control, now, Seen { syncs: vec![20 * MS], ..Seen::default() });
        assert!((17_000_000..18_000_000).contains(&control.pace()), "{}", control.pace());
        tick(&mut control, now, Seen::default());
        assert_eq!(control.pace(), 0);
    }

    #[test]
    fn a_fill_that_waits_for_its_overlay_does_not_take_that_for_the_links_rate() {
        let mut control = Control::new(Duration::ZERO, 0, 2);
        let (mut now, trip) = (MS, MS / 10);
        control.answered(now, 4096, trip, true, false);
        let mut answers = |control: &mut Control, bytes_per_ms: u64, behind: bool| {
            for _ in 0..2000 {
                now += MS;
                if behind {
                    control.is_behind();
                }
                control.answered(now, bytes_per_ms, trip, false, false);
            }
            now
        };
        // 1 GB/s with a window of 4.2 MB, then an overlay that takes a twentieth of it.
        let now = answers(&mut control, 1_000_000, false);
        assert_eq!(control.request_bytes(now), REQUEST_BYTES_MAX);
        let now = answers(&mut control, 50_000, true);
        assert_eq!(control.request_bytes(now), REQUEST_BYTES_MAX);
        // A cache gives ever so much at once, and a guest's requests would wait behind it.
        assert_eq!(control.window(now), NEAR_BYTES_MAX);
        control.set_last(None, Some(now));
        assert_eq!((control.window(now), control.request_bytes(now)), (NEAR_BUSY_BYTES, BUSY_BYTES));
        // The link itself has become slow.
        let now = answers(&mut control, 50_000, false);
        assert_eq!(control.request_bytes(now), 64 << 10);
    }

    #[test]
    fn a_busy_machine_that_delays_some_flushes_does_not_hold_a_fill_back() {
        let (mut control, mut now) = settled();
        for _ in 0..100 {
            now += TICK;
            let delayed: Vec<_> = (0..20).map(|nth| if nth % 5 == 0 { 20 * MS } else { MS / 2 }).collect();
            tick(&mut control, now, Seen { syncs: delayed.clone(), writes: delayed, ..Seen::default() });
            assert_eq!(control.pace(), 0);
        }
        // All of them are slower: that is the fill.
        tick(&mut control, now + TICK, Seen { syncs: vec![20 * MS; 20], ..Seen::default() });
        assert!(control.pace() > 0);
    }

    #[test]
    fn the_floor_is_the_smallest_sample_and_ages() {
        let mut floor = Floor::default();
        floor.note(Duration::ZERO, MS);
        floor.note(5000 * MS, 3 * MS);
        assert_eq!(floor.get(), Some(MS));
        floor.note(11_000 * MS, 4 * MS);
        assert_eq!(floor.get(), Some(3 * MS));
    }

    #[test]
    fn the_round_trip_is_measured_again_before_it_is_too_old() {
        let (control, now) = settled();
        assert!(!control.probe_due(now));
        assert!(control.probe_due(now + FLOOR_AGE));
        assert_eq!(control.request_bytes(now + FLOOR_AGE), REQUEST_BYTES_MIN);
    }
}
