//! Who waits, and whose turn it is. No clock and no I/O in here: time is told, and who goes on is given back.
//!
//! Each member's requests of one direction go in their order; members that wait take turns, one request each. Reads and
//! writes do not wait for each other but through a limit that counts both.

use std::collections::VecDeque;
use std::time::Duration;

use infill_base::ThrottleLimits;

use super::bucket::{Buckets, Direction};

/// A request that waits.
#[derive(Debug)]
struct Waiter<W> {
    bytes: u64,
    who: W,
}

/// Requests of one member, in order.
#[derive(Debug)]
struct Line<W> {
    member: u64,
    waiters: VecDeque<Waiter<W>>,
}

/// A group's requests. `W` is what stands for a request.
#[derive(Debug)]
pub struct Queue<W> {
    buckets: Buckets,
    /// By direction: members that wait, the next one first.
    lines: [VecDeque<Line<W>>; 2],
}

impl<W> Default for Queue<W> {
    fn default() -> Self {
        Queue { buckets: Buckets::default(), lines: Default::default() }
    }
}

impl<W: Clone + PartialEq> Queue<W> {
    /// What holds now.
    pub fn limits(&self) -> &ThrottleLimits {
        self.buckets.limits()
    }

    /// Other limits hold from now on.
    pub fn set_limits(&mut self, limits: ThrottleLimits, now: Duration) {
        self.buckets.set_limits(limits, now);
    }

    /// A request of `bytes` comes, and is called `who`.
    pub fn push(&mut self, member: u64, direction: Direction, bytes: u64, who: W) {
        let lines = &mut self.lines[direction as usize];
        let waiter = Waiter { bytes, who };
        match lines.iter_mut().find(|line| line.member == member) {
            Some(line) => line.waiters.push_back(waiter),
            None => lines.push_back(Line { member, waiters: [waiter].into() }),
        }
    }

    /// The requests that go on now, in order.
    pub fn poll(&mut self, now: Duration) -> Vec<W> {
        let mut gone = Vec::new();
        loop {
            let before = gone.len();
            for direction in Direction::ALL {
                // One each, so that neither takes what both may have.
                if self.head(direction).is_some() && self.buckets.wait(direction, now).is_none() {
                    gone.extend(self.pop(direction, now));
                }
            }
            if gone.len() == before {
                return gone;
            }
        }
    }

    fn pop(&mut self, direction: Direction, now: Duration) -> Option<W> {
        let lines = &mut self.lines[direction as usize];
        let mut line = lines.pop_front()?;
        let waiter = line.waiters.pop_front()?;
        if !line.waiters.is_empty() {
            lines.push_back(line);
        }
        self.buckets.account(direction, waiter.bytes, now);
        Some(waiter.who)
    }

    /// Whose turn is next.
    pub fn head(&self, direction: Direction) -> Option<&W> {
        let line = self.lines[direction as usize].front()?;
        line.waiters.front().map(|waiter| &waiter.who)
    }

    /// How long the next one has to wait.
    pub fn wait(&mut self, direction: Direction, now: Duration) -> Duration {
        self.buckets.wait(direction, now).unwrap_or_default()
    }

    /// A request does not wait any more.
    pub fn withdraw(&mut self, member: u64, direction: Direction, who: &W) {
        let lines = &mut self.lines[direction as usize];
        if let Some(line) = lines.iter_mut().find(|line| line.member == member) {
            line.waiters.retain(|waiter| waiter.who != *who);
        }
        lines.retain(|line| !line.waiters.is_empty());
    }

    /// All requests of a member go on, whatever the limits. They count.
    pub fn drain(&mut self, member: u64, now: Duration) -> Vec<W> {
        let mut gone = Vec::new();
        for direction in Direction::ALL {
            let lines = &mut self.lines[direction as usize];
            let Some(at) = lines.iter().position(|line| line.member == member) else { continue };
            for waiter in lines.remove(at).into_iter().flat_map(|line| line.waiters) {
                self.buckets.account(direction, waiter.bytes, now);
                gone.push(waiter.who);
            }
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use infill_base::ThrottleKind;

    use super::*;

    fn queue(kind: ThrottleKind, average: u64) -> Queue<(u64, u32)> {
        let mut limits = ThrottleLimits::default();
        limits.rate_mut(kind).average = average;
        let mut queue = Queue::default();
        queue.set_limits(limits, Duration::ZERO);
        queue
    }

    /// Lets requests go on until `secs`; each that goes is told to `gone`, which may add others.
    fn run(
        queue: &mut Queue<(u64, u32)>,
        secs: u64,
        mut gone: impl FnMut(&mut Queue<(u64, u32)>, (u64, u32)),
    ) {
        let mut now = Duration::ZERO;
        while now < Duration::from_secs(secs) {
            for who in queue.poll(now) {
                gone(queue, who);
            }
            let waits = Direction::ALL.map(|direction| queue.wait(direction, now));
            now += waits.into_iter().max().unwrap().max(Duration::from_micros(1));
        }
    }

    #[test]
    fn a_member_with_many_requests_takes_nothing_from_one_with_few() {
        let mut queue = queue(ThrottleKind::IopsTotal, 100);
        for number in 0..64 {
            queue.push(1, Direction::Read, 4096, (1, number));
        }
        queue.push(2, Direction::Read, 4096, (2, 0));
        let mut counts = [0_u32; 3];
        run(&mut queue, 10, |queue, (member, number)| {
            counts[member as usize] += 1;
            queue.push(member, Direction::Read, 4096, (member, number));
        });
        let (many, few) = (counts[1], counts[2]);
        assert!((990..=1020).contains(&(many + few)) && many.abs_diff(few) <= 20, "{many} {few}");
    }

    #[test]
    fn a_members_requests_keep_their_order() {
        let mut queue = queue(ThrottleKind::IopsRead, 10);
        for number in 0..20 {
            queue.push(u64::from(number % 3), Direction::Read, 512, (u64::from(number % 3), number));
        }
        let mut last = [None; 3];
        run(&mut queue, 3, |_, (member, number)| {
            assert!(last[member as usize] < Some(number));
            last[member as usize] = Some(number);
        });
        assert_eq!(last, [Some(18), Some(19), Some(17)]);
    }

    #[test]
    fn writes_do_not_wait_behind_reads_whose_limit_is_reached() {
        let mut queue = queue(ThrottleKind::IopsRead, 1);
        for number in 0..5 {
            queue.push(1, Direction::Read, 512, (1, number));
        }
        queue.push(1, Direction::Write, 512, (1, 9));
        let gone = queue.poll(Duration::ZERO);
        assert!(gone.contains(&(1, 9)) && gone.len() == 2, "{gone:?}");
    }

    #[test]
    fn one_who_gives_up_is_not_waited_for_and_one_who_is_drained_goes_on() {
        let mut queue = queue(ThrottleKind::IopsTotal, 1);
        for number in 0..4 {
            queue.push(1, Direction::Write, 512, (1, number));
        }
        queue.push(2, Direction::Write, 512, (2, 0));
        assert_eq!(queue.poll(Duration::ZERO), [(1, 0)]);
        queue.withdraw(2, Direction::Write, &(2, 0));
        assert_eq!(queue.head(Direction::Write), Some(&(1, 1)));
        queue.withdraw(1, Direction::Write, &(1, 1));
        assert_eq!(queue.drain(1, Duration::ZERO), [(1, 2), (1, 3)]);
        assert_eq!(queue.head(Direction::Write), None);
        // What was drained counts.
        queue.push(2, Direction::Write, 512, (2, 1));
        assert!(queue.poll(Duration::from_secs(1)).is_empty());
        assert_eq!(queue.poll(Duration::from_secs(3)), [(2, 1)]);
    }

    #[test]
    fn other_limits_hold_at_once() {
        let mut queue = queue(ThrottleKind::IopsTotal, 1);
        for number in 0..4 {
            queue.push(1, Direction::Write, 512, (1, number));
        }
        assert_eq!(queue.poll(Duration::ZERO).len(), 1);
        queue.set_limits(ThrottleLimits::default(), Duration::ZERO);
        assert_eq!(queue.poll(Duration::ZERO).len(), 3);
    }
}
