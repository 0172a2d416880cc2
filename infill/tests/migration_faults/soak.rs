//! Disks go to and fro while everything fails that can: daemons end themselves before and after each step, are killed and
//! stand still, lose their power and have no space; links are silent, cut, reset, slow, and damage what the daemons say. Machines that write numbered records
//! decide whether anything was lost, and no two hosts may ever own a disk.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use infill_io::{Direction, RelayOptions};
use serde_json::{Value, json};

use crate::hosts::{Random, seed};
use crate::site::{NO_COST, Site, Station, owner, serves, state};

/// Machines of a site: the first two disks move by one record.
const MACHINES: u64 = 4;
/// Rounds until everything is made anew, for records of what is over are kept.
const ROUNDS_OF_A_SITE: usize = 10;
/// How long a round may take. A limit against hangs, not a promise.
const ROUND_LIMIT: Duration = Duration::from_secs(120);
/// Faults of a round after which it is left alone, to end.
const FAULTS_OF_A_ROUND: u64 = 24;

const SOURCE_STEPS: [&str; 19] = [
    "record prepared",
    "record offered",
    "record handed_over",
    "record released",
    "record serving",
    "record taking_back",
    "send prepare",
    "send round",
    "send offer",
    "send confirm",
    "send ask_back",
    "send back_accepted",
    "send released",
    "send claim",
    "drain",
    "fence",
    "seal",
    "thaw",
    "release",
];
const TARGET_STEPS: [&str; 18] = [
    "record prepared",
    "record accepted",
    "record owner",
    "record complete",
    "record local",
    "record giving_back",
    "record gave_back",
    "send prepared",
    "send applied",
    "send round_read",
    "send accepted",
    "send complete",
    "send back_offer",
    "send back_confirm",
    "demote",
    "own",
    "drop",
    "send back_refused",
];

/// A point at which a daemon ends itself.
fn point(random: &mut Random, source: bool) -> String {
    let steps: &[&str] = if source { &SOURCE_STEPS } else { &TARGET_STEPS };
    let step = steps[random.below(steps.len() as u64) as usize];
    let when = if random.below(2) == 0 { "before" } else { "after" };
    let side = if source { "source" } else { "target" };
    format!("{side} {step} {when}#{}", 1 + random.below(3))
}

/// Disks that move by one record.
struct Move {
    id: String,
    machines: Vec<usize>,
    /// It is to come back, and nothing is written at the target before.
    back: bool,
    aborted: bool,
    over: bool,
    /// Of the machines.
    started: bool,
}

/// What has happened so far.
#[derive(Default)]
pub struct Tally {
    faults: BTreeMap<String, u64>,
    moved: u64,
    stayed: u64,
}

impl Tally {
    fn count(&mut self, what: impl Into<String>) {
        *self.faults.entry(what.into()).or_default() += 1;
    }

    fn all(&self) -> u64 {
        self.faults.values().sum()
    }
}

struct Soak {
    site: Site,
    random: Random,
    tally: Tally,
    /// What each station was told to end itself at.
    armed: [Option<String>; 2],
    /// Faults of this round.
    faults: u64,
    /// Links that get well again, and when.
    healing: Vec<(Instant, usize)>,
    /// Stations that have space again, and when; whether the state's file system was full.
    full: Vec<(Instant, usize, bool)>,
}

impl Soak {
    fn link(&self, nth: usize) -> &crate::site::Way {
        let station = &self.site.stations[nth % 2];
        if nth < 2 { &station.words } else { &station.data }
    }

    fn fault(&mut self, what: impl Into<String>) {
        self.tally.count(what);
        self.faults += 1;
    }

    fn restart(&mut self, nth: usize, source: bool) {
        let arm = self.faults < FAULTS_OF_A_ROUND && self.random.below(4) > 0;
        self.armed[nth] = arm.then(|| point(&mut self.random, source));
        if let Some(media) = &self.site.stations[nth].media {
            // A daemon that cannot write its state does not start.
            media.state.free();
        }
        let point = self.armed[nth].clone();
        self.site.stations[nth].start(point.as_deref());
    }

    /// One fault more, perhaps.
    fn trouble(&mut self, source: usize) {
        if self.faults >= FAULTS_OF_A_ROUND {
            return;
        }
        let (nth, link) = (self.random.below(2) as usize, self.random.below(4) as usize);
        let time = Duration::from_millis(5 + self.random.below(150));
        match self.random.below(32) {
            0 => {
                self.site.stations[nth].kill();
                self.fault("killed");
                self.restart(nth, nth == source);
            }
            1 => {
                self.site.stations[nth].stand_still(time);
                self.fault("stood still");
            }
            2..4 => {
                let both = self.random.below(2) == 0;
                let one = [Direction::ToServer, Direction::ToClient][self.random.below(2) as usize];
                self.link(link).control.hold(one);
                if both {
                    self.link(link).control.hold(Direction::ToServer);
                    self.link(link).control.hold(Direction::ToClient);
                }
                self.healing.push((Instant::now() + time, link));
                self.fault(if both { "silent" } else { "silent in one direction" });
            }
            4 => {
                self.link(link).control.reset();
                self.fault("reset");
            }
            5 => {
                self.link(link).control.cut();
                self.fault("cut");
            }
            6 | 7 => {
                let direction = [Direction::ToServer, Direction::ToClient][self.random.below(2) as usize];
                // What the daemons say has a checksum; data has TLS's, where that is wanted.
                self.link(nth).control.damage(direction);
                self.fault("damaged");
            }
            8 => {
                let delay = Duration::from_millis(self.random.below(15));
                self.link(link).control.become_link(RelayOptions { delay, bytes_per_second: Some(4 << 20) });
                self.healing.push((Instant::now() + time, link));
                self.fault("slow");
            }
            9 if self.site.stations[nth].media.is_some() => {
                self.site.power_cut(nth);
                self.fault("power cut");
                self.restart(nth, nth == source);
            }
            what @ (10 | 11) => {
                let Some(media) = &self.site.stations[nth].media else { return };
                let is_state = what == 11;
                if is_state {
                    media.state.fill()
                } else {
                    media.images.fill()
                }
                self.full.push((Instant::now() + time, nth, is_state));
                self.fault(if is_state { "no space for records" } else { "no space for images" });
            }
            _ => {}
        }
    }

    /// There is space again. A daemon that could not write a record holds its disks until it is started again.
    fn make_space(&mut self, source: usize, all: bool) {
        let now = Instant::now();
        let (due, later) = self.full.drain(..).partition::<Vec<_>, _>(|(when, ..)| all || *when <= now);
        self.full = later;
        for (_, nth, is_state) in due {
            let Some(media) = &self.site.stations[nth].media else { continue };
            media.all().iter().for_each(|medium| medium.free());
            if is_state || self.random.below(2) == 0 {
                self.site.stations[nth].kill();
                self.restart(nth, nth == source);
            }
        }
    }

    fn heal(&mut self, all: bool) {
        let now = Instant::now();
        let (due, later) = self.healing.drain(..).partition::<Vec<_>, _>(|(when, _)| all || *when <= now);
        self.healing = later;
        for (_, link) in due {
            let control = &self.link(link).control;
            control.release(Direction::ToServer);
            control.release(Direction::ToClient);
            control.become_link(NO_COST);
        }
    }

    /// Daemons that have ended themselves are started again.
    fn revive(&mut self, source: usize) {
        for nth in 0..2 {
            if self.site.stations[nth].is_dead() {
                let at = self.armed[nth].take().unwrap_or_else(|| "by itself".into());
                assert_ne!(at, "by itself", "a daemon has ended by itself");
                self.fault(format!("at {}", at.split('#').next().unwrap_or_default()));
                self.restart(nth, nth == source);
            }
        }
    }

    /// Every machine's disk moves from station `from` to the other one. Where they are afterwards.
    fn round(&mut self, from: usize, back: bool) -> usize {
        let to = 1 - from;
        self.faults = 0;
        for nth in 0..2 {
            if self.random.below(2) == 0 {
                if self.random.below(3) == 0 && self.site.stations[nth].media.is_some() {
                    self.site.power_cut(nth);
                    self.fault("power cut");
                } else {
                    self.site.stations[nth].kill();
                    self.fault("killed");
                }
                self.restart(nth, nth == from);
            }
        }
        let groups = [vec![0, 1], vec![2], vec![3]];
        let mut moves: Vec<Move> = groups
            .into_iter()
            .map(|machines| Move {
                id: uuid::Uuid::from_u128(
                    u128::from(self.random.next()) << 64 | u128::from(self.random.next()),
                )
                .to_string(),
                machines,
                back,
                aborted: false,
                over: false,
                started: false,
            })
            .collect();
        let since = Instant::now();
        let warm = Duration::from_millis(self.random.below(250));
        let (mut asked, mut begun) = (Instant::now(), vec![false; moves.len()]);
        let mut halted = false;
        while moves.iter().any(|one| !one.over) {
            if since.elapsed() > ROUND_LIMIT {
                let told: Vec<_> = self.site.stations.iter().map(Station::migrations).collect();
                panic!("the round does not end: {told:#?}");
            }
            std::thread::sleep(Duration::from_millis(self.random.below(8)));
            self.revive(from);
            self.trouble(from);
            self.heal(self.faults >= FAULTS_OF_A_ROUND);
            self.make_space(from, self.faults >= FAULTS_OF_A_ROUND);
            for (one, begun) in moves.iter().zip(&mut begun).filter(|(_, begun)| !**begun) {
                let disks: Vec<Value> =
                    one.machines.iter().map(|nth| json!({"name": self.site.machines[*nth].name})).collect();
                let mode = if self.random.below(3) == 0 { "post-copy" } else { "hybrid" };
                let arguments = json!({
                    "disks": disks, "to": self.site.stations[to].words.address, "mode": mode, "auto-switch": false, "way-back": 0,
                    "migration": one.id,
                });
                let answer = self.site.stations[from].ask("__infill_migrate", arguments);
                *begun = answer.is_some_and(|answer| answer.get("return").is_some());
            }
            if !halted {
                for nth in 0..self.site.machines.len() {
                    if self.site.machines[nth].runs_at().is_none() {
                        let Site { reactors, stations, machines } = &mut self.site;
                        machines[nth].run(reactors, from, &stations[from]);
                    }
                }
                if since.elapsed() < warm || begun.contains(&false) {
                    continue;
                }
                // As hypervisors stop: all that is in flight has ended, and was flushed.
                halted =
                    (0..self.site.machines.len()).fold(true, |all, nth| self.site.machines[nth].halt() & all);
                continue;
            }
            self.follow(from, to, &mut moves, &mut asked);
        }
        self.heal(true);
        self.make_space(from, true);
        let ends: Vec<usize> = moves.iter().map(|one| if one.aborted { from } else { to }).collect();
        let end = ends[0];
        // For the next round all of them go on from one host: those that went another way follow it.
        for (one, at) in moves.iter().zip(&ends) {
            if *at == to {
                self.tally.moved += 1
            } else {
                self.tally.stayed += 1
            }
            self.judge(one, *at);
        }
        if ends.iter().any(|at| *at != end) { usize::MAX } else { end }
    }

    /// Sees where the disks are, and has machines run there.
    fn follow(&mut self, from: usize, to: usize, moves: &mut [Move], asked: &mut Instant) {
        // The target first: a disk only goes there, or comes back before anything was written.
        let (Some(there), Some(here)) =
            (self.site.stations[to].migrations(), self.site.stations[from].migrations())
        else {
            return;
        };
        for (nth, told) in [(from, &here), (to, &there)] {
            let held = |one: &Value| one["error"].as_str().is_some_and(|why| why.contains("until a restart"));
            if told.iter().any(held) && !self.full.iter().any(|(_, full, _)| *full == nth) {
                self.site.stations[nth].kill();
                self.restart(nth, nth == from);
                return;
            }
        }
        let again = asked.elapsed() > Duration::from_millis(300);
        if again {
            *asked = Instant::now();
        }
        for one in moves.iter_mut().filter(|one| !one.over) {
            let (at_target, at_source) = (state(&there, &one.id), state(&here, &one.id));
            let both = owner(&there, &one.id) && owner(&here, &one.id);
            assert!(!both || one.back, "two owners of {}: {at_source}, {at_target}", one.id);
            // After a restart an earlier record of the same epoch may be the one that says so.
            let served = one.machines.iter().all(|nth| serves(&here, &self.site.machines[*nth].name));
            if at_source == "serving" && served {
                // It was handed back, or the target could not begin.
                (one.aborted, one.over) = (true, true);
            } else if at_source == "released" && at_target == "local" {
                one.over = true;
            } else if at_source == "prepared" && again {
                let switch = json!({"migration": one.id});
                self.site.stations[from].ask("__infill_migration-switch", switch);
            } else if one.back && again && owner(&there, &one.id) {
                self.site.stations[from].ask("__infill_migration-abort", json!({"migration": one.id}));
            }
            let goes_on = if one.over && one.aborted { Some(from) } else { None };
            let goes_on =
                goes_on.or_else(|| (owner(&there, &one.id) && (!one.back || one.over)).then_some(to));
            if let Some(at) = goes_on {
                one.started = true;
                for nth in &one.machines {
                    let Site { reactors, stations, machines } = &mut self.site;
                    if machines[*nth].runs_at().is_none() {
                        machines[*nth].run(reactors, at, &stations[at]);
                    }
                }
            }
        }
    }

    /// The machines run a little where their disks are, and then everything is compared.
    fn judge(&mut self, one: &Move, at: usize) {
        let Site { reactors, stations, machines } = &mut self.site;
        for nth in &one.machines {
            let since = Instant::now();
            loop {
                if stations[at].is_dead() {
                    self.armed[at] = None;
                    stations[at].start(None);
                }
                if machines[*nth].runs_at().is_none() {
                    machines[*nth].run(reactors, at, &stations[at]);
                }
                if machines[*nth].steps() >= 10 && machines[*nth].halt() {
                    break;
                }
                let told = machines[*nth].knows.lock().unwrap().violation.clone();
                assert!(told.is_none(), "{}: {}", one.id, told.unwrap());
                assert!(since.elapsed() < ROUND_LIMIT, "{}: its machine does not get on", one.id);
                std::thread::sleep(Duration::from_millis(2));
            }
            machines[*nth].judge(reactors, &stations[at]);
            let told = machines[*nth].knows.lock().unwrap().violation.clone();
            assert!(told.is_none(), "{}: {}", one.id, told.unwrap());
        }
    }
}

/// Injects at least so many faults, if there is time.
fn soak(faults: u64, time: Duration) {
    let seed = seed();
    let (since, mut tally, mut random) = (Instant::now(), Tally::default(), Random(seed | 1));
    while tally.all() < faults && since.elapsed() < time {
        let dir = tempfile::tempdir().unwrap();
        let site = Site::on_media(dir.path(), MACHINES, random.next());
        let random_here = Random(random.next() | 1);
        let mut soak = Soak {
            site,
            random: random_here,
            tally,
            armed: [None, None],
            faults: 0,
            healing: Vec::new(),
            full: Vec::new(),
        };
        let mut at = 0;
        for _ in 0..ROUNDS_OF_A_SITE {
            let back = soak.random.below(4) == 0;
            let began = Instant::now();
            at = soak.round(at, back);
            println!("a round: {} faults, {:?}", soak.faults, began.elapsed());
            if at == usize::MAX || soak.tally.all() >= faults || since.elapsed() >= time {
                break;
            }
        }
        tally = soak.tally;
        println!(
            "{} faults, {} migrations in {:?}",
            tally.all(),
            tally.moved + tally.stayed,
            since.elapsed()
        );
    }
    for (what, times) in &tally.faults {
        println!("{times:7} {what}");
    }
    println!(
        "{} faults, {} moves that arrived and {} that did not, 0 violations, {:?}",
        tally.all(),
        tally.moved,
        tally.stayed,
        since.elapsed()
    );
    assert!(tally.all() >= faults, "not in time");
}

#[test]
fn hundreds_of_faults_lose_no_byte_and_make_no_second_owner() {
    soak(200, Duration::from_secs(600));
}

#[test]
#[ignore = "runs for hours: cargo test --profile ci -p infill --test migration_faults -- --ignored --nocapture thousands"]
fn ten_thousands_of_faults_lose_no_byte_and_make_no_second_owner() {
    let read = |name: &str, otherwise: u64| {
        std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
    };
    soak(read("SOAK_FAULTS", 10_000), Duration::from_secs(read("SOAK_SECONDS", 12 * 3600)));
}
