//! Breadth first through every state of the world, exactly: no state is taken for another. The four parts of a lane and
//! the promises are kept once each (most states share them), so a state is a few numbers: 40 bytes with its way back.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::rc::Rc;

use infill_migrate::{Body, State};

use super::hosts::{Net, SourceHost, TargetHost};
use super::world::{Bounds, D, Lane, S, Spec, Step, World};

/// Three parts for each of at most two lanes, and the promises.
const PARTS: usize = 7;
type Key = [u32; PARTS];

/// Multiply and fold: these keys come from nobody who means harm.
#[derive(Default)]
pub struct Fold(u64);

impl Hasher for Fold {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }
    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }
    fn write_u64(&mut self, value: u64) {
        let product = u128::from(self.0 ^ value ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93_u128;
        self.0 = (product as u64) ^ ((product >> 64) as u64).rotate_left(17);
    }
    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

type Folded = BuildHasherDefault<Fold>;

/// Values, each once, and their numbers.
struct Pool<T> {
    numbers: HashMap<Rc<T>, u32, Folded>,
    values: Vec<Rc<T>>,
}

impl<T: Eq + Hash> Pool<T> {
    fn new() -> Pool<T> {
        Pool { numbers: HashMap::default(), values: vec![] }
    }

    fn number(&mut self, value: &Rc<T>) -> u32 {
        if let Some(number) = self.numbers.get(value) {
            return *number;
        }
        let number = self.values.len() as u32;
        self.values.push(value.clone());
        self.numbers.insert(value.clone(), number);
        number
    }
}

/// The states that were seen, with the way to each.
pub struct Explorer {
    bounds: Bounds,
    sources: Pool<SourceHost>,
    targets: Pool<TargetHost>,
    nets: Pool<Net>,
    specs: Pool<Spec>,
    keys: Vec<Key>,
    /// From which state, by which of its steps.
    ways: Vec<(u32, u16)>,
    /// Open addressing: the number of a state plus one.
    table: Vec<u32>,
}

/// What an exploration found.
pub struct Report {
    pub states: usize,
    pub steps: u64,
    /// How many steps the farthest state is away.
    pub depth: u32,
    /// Whether there was nothing left to explore.
    pub whole: bool,
    pub violation: Option<Violation>,
}

/// A promise that does not hold, and the shortest way to that.
pub struct Violation {
    pub what: String,
    pub trace: Vec<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.what)?;
        self.trace.iter().enumerate().try_for_each(|(index, line)| writeln!(f, "  {:2}. {line}", index + 1))
    }
}

impl Explorer {
    pub fn new(bounds: Bounds) -> Explorer {
        Explorer {
            bounds,
            sources: Pool::new(),
            targets: Pool::new(),
            nets: Pool::new(),
            specs: Pool::new(),
            keys: vec![],
            ways: vec![],
            table: vec![0; 1 << 16],
        }
    }

    fn key(&mut self, world: &World, near: Option<(&World, Key)>) -> Key {
        let mut key = [0; PARTS];
        for (index, lane) in world.lanes.iter().enumerate() {
            let same = near.map(|(world, key)| (&world.lanes[index], key));
            let at = index * 3;
            key[at] = match same {
                Some((near, key)) if Rc::ptr_eq(&near.s, &lane.s) => key[at],
                _ => self.sources.number(&lane.s),
            };
            key[at + 1] = match same {
                Some((near, key)) if Rc::ptr_eq(&near.d, &lane.d) => key[at + 1],
                _ => self.targets.number(&lane.d),
            };
            key[at + 2] = match same {
                Some((near, key)) if Rc::ptr_eq(&near.net, &lane.net) => key[at + 2],
                _ => self.nets.number(&lane.net),
            };
        }
        key[PARTS - 1] = match near {
            Some((near, key)) if Rc::ptr_eq(&near.spec, &world.spec) => key[PARTS - 1],
            _ => self.specs.number(&world.spec),
        };
        key
    }

    fn world(&self, state: usize) -> World {
        let key = self.keys[state];
        let lanes = if self.bounds.record_per_disk { self.bounds.disks } else { 1 };
        let lane = |index: usize| Lane {
            s: self.sources.values[key[index * 3] as usize].clone(),
            d: self.targets.values[key[index * 3 + 1] as usize].clone(),
            net: self.nets.values[key[index * 3 + 2] as usize].clone(),
        };
        World {
            lanes: (0..lanes).map(lane).collect(),
            spec: self.specs.values[key[PARTS - 1] as usize].clone(),
        }
    }

    fn slot(&self, key: &Key) -> usize {
        let mut hasher = Fold::default();
        key.iter().for_each(|part| hasher.write_u32(*part));
        let mask = self.table.len() - 1;
        let mut slot = hasher.finish() as usize & mask;
        while self.table[slot] != 0 && self.keys[self.table[slot] as usize - 1] != *key {
            slot = (slot + 1) & mask;
        }
        slot
    }

    fn find(&self, key: &Key) -> Option<usize> {
        (self.table[self.slot(key)] as usize).checked_sub(1)
    }

    fn add(&mut self, key: Key, way: (u32, u16)) -> bool {
        if self.find(&key).is_some() {
            return false;
        }
        if self.keys.len() * 2 > self.table.len() {
            self.table = vec![0; self.table.len() * 2];
            for number in 0..self.keys.len() {
                let slot = self.slot(&self.keys[number]);
                self.table[slot] = number as u32 + 1;
            }
        }
        let slot = self.slot(&key);
        self.keys.push(key);
        self.ways.push(way);
        self.table[slot] = self.keys.len() as u32;
        true
    }

    /// Explores until everything was seen, a promise does not hold, or there are `most` states.
    pub fn run(&mut self, most: usize) -> Report {
        let bounds = self.bounds;
        let first = World::new(&bounds);
        let key = self.key(&first, None);
        self.add(key, (0, 0));
        let mut report = Report { states: 0, steps: 0, depth: 0, whole: true, violation: None };
        let (mut next, mut level_ends, mut steps) = (0, 1, vec![]);
        while next < self.keys.len() {
            if next == level_ends {
                report.depth += 1;
                level_ends = self.keys.len();
            }
            if self.keys.len() >= most {
                report.whole = false;
                break;
            }
            let world = self.world(next);
            let key = self.keys[next];
            world.steps(&bounds, &mut steps);
            for (nth, step) in steps.iter().enumerate() {
                report.steps += 1;
                let mut after = world.clone();
                let taken = after.take(*step, &bounds);
                let after_key = self.key(&after, Some((&world, key)));
                if taken.is_ok() && after_key == key {
                    continue;
                }
                let taken = taken.and_then(|()| self.same_answer(&world, &after, *step));
                let is_new = self.add(after_key, (next as u32, nth as u16));
                let checked = taken.and_then(|()| after.check_step(&world));
                let checked = if is_new { checked.and_then(|()| after.check(&bounds)) } else { checked };
                if let Err(what) = checked {
                    let mut trace = self.trace(next);
                    trace.push(line(step, &world, &after));
                    report.violation = Some(Violation { what, trace });
                    (report.states, report.whole) = (self.keys.len(), false);
                    return report;
                }
            }
            next += 1;
        }
        report.states = self.keys.len();
        report
    }

    /// The durable states that were reached, of either side.
    pub fn reached(&self) -> HashSet<State> {
        let sources = self.sources.values.iter().filter_map(|host| host.record.as_ref());
        let targets = self.targets.values.iter().filter_map(|host| host.record.as_ref());
        sources.chain(targets).map(infill_migrate::Record::state).collect()
    }

    /// I8: a message that comes once more, at once, changes nothing and is answered with nothing else.
    fn same_answer(&self, before: &World, after: &World, step: Step) -> Result<(), String> {
        let lane = match step {
            Step::S(lane, S::Deliver(_)) if after.lanes[lane].s.idle() => lane,
            Step::D(lane, D::Deliver(_))
                if after.lanes[lane].d.idle() && before.lanes[lane].d.machine.is_some() =>
            {
                lane
            }
            _ => return Ok(()),
        };
        // The list of messages may have grown in front of it; what is repeated is the message, not its place.
        let moved = match step {
            Step::S(_, S::Deliver(at)) => {
                let message = &before.lanes[lane].net.to_source[at];
                after.lanes[lane].net.to_source.binary_search(message).map(|at| Step::S(lane, S::Deliver(at)))
            }
            Step::D(_, D::Deliver(at)) => {
                let message = &before.lanes[lane].net.to_target[at];
                after.lanes[lane].net.to_target.binary_search(message).map(|at| Step::D(lane, D::Deliver(at)))
            }
            _ => return Ok(()),
        };
        let Ok(again) = moved else { return Err("a message was lost by the model itself".into()) };
        let mut twice = after.clone();
        twice.take(again, &self.bounds)?;
        let (once, twice) = (&after.lanes[lane], &twice.lanes[lane]);
        if once.s != twice.s || once.d != twice.d || once.net != twice.net {
            return Err(format!("I8: repeated at once, {step:?} is answered in another way"));
        }
        Ok(())
    }

    fn trace(&self, state: usize) -> Vec<String> {
        let mut states = vec![state];
        while states[states.len() - 1] != 0 {
            states.push(self.ways[states[states.len() - 1]].0 as usize);
        }
        states.reverse();
        let mut steps = vec![];
        let step = |pair: &[usize]| {
            let (from, to) = (self.world(pair[0]), self.world(pair[1]));
            from.steps(&self.bounds, &mut steps);
            line(&steps[self.ways[pair[1]].1 as usize], &from, &to)
        };
        states.windows(2).map(step).collect()
    }

    /// From every state that was seen: when nothing fails any more and messages flow, exactly one side comes to run its
    /// guest. Gives the first state from which it does not.
    pub fn liveness(&mut self) -> Option<Violation> {
        const UNKNOWN: u8 = 0;
        const GOOD: u8 = 1;
        const ON_THE_WAY: u8 = 2;
        let mut known = vec![UNKNOWN; self.keys.len()];
        let mut way = vec![];
        for start in 0..self.keys.len() {
            let mut at = start;
            loop {
                if known[at] == GOOD {
                    break;
                }
                let circle = known[at] == ON_THE_WAY;
                let world = self.world(at);
                if !circle && world.is_good() {
                    break;
                }
                let next = if circle { None } else { self.fair(&world, at) };
                known.resize(self.keys.len(), UNKNOWN);
                let Some(next) = next else {
                    let what = if circle { "goes round in a circle" } else { "nothing leads on" };
                    let mut trace = self.trace(start);
                    let states = way.iter().chain([&at]).copied().collect::<Vec<usize>>();
                    trace.extend(
                        states.iter().map(|state| format!("then, fair: {}", summary(&self.world(*state)))),
                    );
                    return Some(Violation { what: format!("no side ever runs the guest: {what}"), trace });
                };
                known[at] = ON_THE_WAY;
                assert!(
                    way.len() < 300,
                    "{}",
                    way.iter().map(|s| summary(&self.world(*s))).collect::<Vec<_>>().join("\n")
                );
                way.push(at);
                at = next;
            }
            way.drain(..).chain([at]).for_each(|state| known[state] = GOOD);
        }
        None
    }

    /// The state that a fair world comes to next: repairs, ends of operations and messages first, time last.
    fn fair(&mut self, world: &World, at: usize) -> Option<usize> {
        let mut steps = vec![];
        world.steps(&self.bounds, &mut steps);
        let mut ranked: Vec<_> = steps.iter().filter_map(|step| Some((rank(step, world)?, *step))).collect();
        ranked.sort_by_key(|(rank, _)| *rank);
        let key = self.keys[at];
        for (_, step) in ranked {
            let mut after = world.clone();
            after.take(step, &self.bounds).ok()?;
            let after = self.key(&after, Some((world, key)));
            if after != key {
                let nth = steps.iter().position(|other| *other == step)?;
                // In a whole exploration it is known; in one that was cut short it may be new.
                self.add(after, (at as u32, nth as u16));
                return self.find(&after);
            }
        }
        None
    }
}

/// Smaller is earlier; `None`: no part of a fair world, for it is a failure, an operator or the guest.
fn rank(step: &Step, world: &World) -> Option<(u8, u64)> {
    let newest = |term: u64| u64::MAX - term;
    Some(match *step {
        Step::S(_, S::Restart) | Step::D(_, D::Restart) => (0, 0),
        Step::S(_, S::OpDone { good: true } | S::WriteLands | S::WriteAnswered | S::Drained) => (1, 0),
        Step::D(_, D::OpDone) => (1, 1),
        Step::S(_, S::HearsPeer) | Step::D(_, D::HearsPeer) => (2, 0),
        Step::S(lane, S::Deliver(at)) => (3, newest(world.lanes[lane].net.to_source[at].term.0)),
        // Warming never leads to an owner, and rounds of two bitmaps may be told in turns for ever.
        Step::D(lane, D::Deliver(at))
            if matches!(world.lanes[lane].net.to_target[at].body, Body::Round { .. }) =>
        {
            (9, 0)
        }
        Step::D(lane, D::Deliver(at)) => (3, newest(world.lanes[lane].net.to_target[at].term.0)),
        Step::Swap(..) => (4, 0),
        Step::S(lane, S::HearsWitness(held)) if held + 1 == world.lanes[lane].net.held.len() => (5, 0),
        Step::D(lane, D::HearsWitness(held)) if held + 1 == world.lanes[lane].net.held.len() => (5, 0),
        Step::S(_, S::Resend) | Step::D(_, D::Resend) => (6, 0),
        Step::S(_, S::HearsNobody) | Step::D(_, D::HearsNobody) => (7, 0),
        Step::S(_, S::Timeout) => (8, 0),
        _ => return None,
    })
}

fn line(step: &Step, before: &World, after: &World) -> String {
    let what = match *step {
        Step::S(lane, S::Deliver(at)) => {
            format!("S hears {}", message(&before.lanes[lane].net.to_source[at]))
        }
        Step::D(lane, D::Deliver(at)) => {
            format!("D hears {}", message(&before.lanes[lane].net.to_target[at]))
        }
        Step::S(lane, S::OpDone { good }) => {
            let op = format!("{:?}", before.lanes[lane].s.op);
            let op = op.trim_start_matches("Some(").split(['(', ')']).next().unwrap_or_default().to_owned();
            format!("S {op} {}", if good { "is done" } else { "fails" })
        }
        Step::S(_, step) => format!("S {step:?}"),
        Step::D(_, step) => format!("D {step:?}"),
        Step::Swap(lane, swap) => {
            let to = before.lanes[lane].net.swaps[swap].to;
            format!("witness now has ({}, {:?})", to.term.0, to.side)
        }
    };
    let lane = match step {
        Step::S(lane, _) | Step::D(lane, _) | Step::Swap(lane, _) if before.lanes.len() > 1 => {
            format!("[{lane}] ")
        }
        _ => String::new(),
    };
    format!("{lane}{what:44} {}", summary(after))
}

fn message(message: &infill_migrate::Message) -> String {
    let body = format!("{:?}", message.body);
    let kind = body.split([' ', '{']).next().unwrap_or_default();
    format!("{kind}({})", message.term.0)
}

fn summary(world: &World) -> String {
    let lane = |lane: &Lane| {
        let state = |record: Option<&infill_migrate::Record>| match record {
            Some(record) => format!("{:?}({})", record.state(), record.term().0),
            None => "-".into(),
        };
        let up = |up| if up { "" } else { " down" };
        let blocks =
            |values: &[Option<u8>]| values.iter().map(|v| v.map_or("·".into(), |v| v.to_string())).collect();
        let there: Vec<String> = blocks(&lane.d.now);
        format!(
            "S {}{} gate {:?}{} {:?} | D {}{} gate {:?} {}",
            state(lane.s.record.as_ref()),
            up(lane.s.up),
            lane.s.gate(),
            if lane.s.fence { " fenced" } else { "" },
            lane.s.now,
            state(lane.d.record.as_ref()),
            up(lane.d.up),
            lane.d.gate(),
            there.join(" "),
        )
    };
    let lanes: Vec<String> = world.lanes.iter().map(lane).collect();
    lanes.join(" || ")
}
