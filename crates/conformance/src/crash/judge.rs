//! Builds the states that a crash may leave, and judges them.

use std::ops::AddAssign;
use std::sync::Arc;

use bytes::Bytes;
use infill_base::Ctx;
use infill_node::{NodeHandle, RawNode, Repair};
use infill_sim::{Boundary, CrashPoint, DiskOptions, JournalPages, Media, Pending, Rng, SimDisk, World};
use infill_storage::journal::Journaling;
use infill_storage::sync::{Mutex, lock};
use infill_storage::{MemoryStorage, StorageHandle};
use rustc_hash::FxHashSet;

use super::{Outlived, Plan};
use crate::format::failed;
use crate::guest::{read_all, read_pieces};
use crate::layout::Layout;
use crate::model::Model;
use crate::order::Order;
use crate::payload::{SectorKind, sector_kind};
use crate::stack::base_content;
use crate::{Format, Generator, Guest, GuestOp, Mix, Violation};

/// How much was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Boundaries.
    pub points: u64,
    /// States that were opened and judged.
    pub judged: u64,
    /// Of them, those that were used on and judged again.
    pub used_on: u64,
    /// Distinct states with unsynced metadata and an unsynced payload.
    pub counted: u64,
    /// Of the judged states, those of a process that died.
    pub kills: u64,
    /// Streams that came to their end.
    pub streams: u64,
    /// Deaths of a process whose successor answered a FLUSH and lost power.
    pub deaths: u64,
    /// Of them, those that left something to replay.
    pub replays: u64,
    /// Successors that died, or lost power, in the middle of a replay.
    pub replays_cut: u64,
    /// Successors that refused a journal because somebody else had written to the image.
    pub refusals: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.points += other.points;
        self.judged += other.judged;
        self.used_on += other.used_on;
        self.counted += other.counted;
        self.kills += other.kills;
        self.streams += other.streams;
        self.deaths += other.deaths;
        self.replays += other.replays;
        self.replays_cut += other.replays_cut;
        self.refusals += other.refusals;
    }
}

/// A state for the referee.
#[derive(Clone, Debug)]
pub struct Sample {
    /// What was on the medium.
    pub media: Media,
    /// What the disk showed, opened from it.
    pub content: Vec<u8>,
    /// The backing that its header names.
    pub backing: Option<Bytes>,
    /// Format and geometry.
    pub format: Format,
    /// How it came about.
    pub how: String,
}

/// What a judge leaves.
pub(super) struct Ended {
    pub seen: FxHashSet<u64>,
    pub tally: Tally,
    pub samples: Vec<Sample>,
    pub violation: Option<Violation>,
    pub heir: Option<(Media, Vec<u8>, bool)>,
}

pub(super) struct State {
    pub(super) rng: Rng,
    seen: FxHashSet<u64>,
    /// What was judged under these promises already.
    judged: FxHashSet<(u64, u64)>,
    pub(super) tally: Tally,
    samples: Vec<Sample>,
    pub(super) violation: Option<Violation>,
    /// A stream has said *completed*: no crash may bring the backing back (P4).
    detached: bool,
    heir: Option<(Media, Vec<u8>, bool)>,
    order: Option<Order>,
}

/// Judges every state of one life. Cloning shares it.
#[derive(Clone)]
pub(super) struct Judge {
    pub(super) plan: Plan,
    /// The format without a planted mistake.
    pub(super) sound: Format,
    pub model: Arc<Mutex<Model>>,
    pub backing: Option<Bytes>,
    backing_storage: Option<StorageHandle>,
    born: Media,
    /// The memory of the journal, where one is kept.
    pub(super) pages: Option<JournalPages>,
    state: Arc<Mutex<State>>,
}

/// Name of the backing file in the headers.
pub const BACKING_NAME: &str = "base.raw";

/// Of 1000 judged states, how many are used on.
const USED_ON_PER_MILLE: u64 = 60;

/// All combinations of whole writes are tried up to this many.
const COMBINATIONS_MAX: usize = 8;

/// Where deaths are judged, so many of 1000 boundaries are judged for a power cut, too.
const POWER_CUTS_PER_MILLE: u64 = 200;

/// Operations on a state that is used on.
const OPS_AFTER_CRASH: usize = 8;

impl Judge {
    /// A judge of a life that begins with the medium and content of a crash, or with an empty medium; the flag says
    /// that the backing was dropped before.
    pub(super) fn new(
        plan: &Plan,
        mut rng: Rng,
        seen: FxHashSet<u64>,
        born: Option<(Media, Vec<u8>, bool)>,
    ) -> Judge {
        let backing = plan.backing.map(|len| base_content(len, &mut Rng::new(plan.seed)));
        let (media, model, detached) = match born {
            Some((media, content, detached)) => {
                (media, Model::new(content.len() as u64, &content.into()), detached)
            }
            None => {
                let content = backing.clone().unwrap_or_default();
                (Media::new(0), Model::new(plan.size, &content), false)
            }
        };
        let backing_storage =
            backing.as_ref().map(|content| StorageHandle::new(MemoryStorage::from_bytes(content.to_vec())));
        let state = State {
            rng: rng.fork(),
            seen,
            judged: FxHashSet::default(),
            tally: Tally::default(),
            samples: Vec::new(),
            violation: None,
            detached,
            heir: None,
            order: None,
        };
        let sound = plan.format.sound();
        Judge {
            pages: plan.outlived.map(|outlived| match outlived {
                Outlived::Journal(records) => JournalPages::new(records),
                Outlived::WriteThrough => JournalPages::new(0),
            }),
            sound,
            plan: plan.clone(),
            model: Arc::new(Mutex::new(model)),
            backing,
            backing_storage,
            born: media,
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// The medium that the life begins with.
    pub(super) fn born(&self) -> Media {
        self.born.clone()
    }

    pub(super) fn close(&self) -> Ended {
        let mut state = lock(&self.state);
        Ended {
            seen: std::mem::take(&mut state.seen),
            tally: state.tally,
            samples: std::mem::take(&mut state.samples),
            violation: state.violation.take(),
            heir: state.heir.take(),
        }
    }

    /// Whether a promise was broken already: nothing more is to be learnt.
    pub(super) fn is_over(&self) -> bool {
        lock(&self.state).violation.is_some()
    }

    /// From now on the order of writes is asserted, on an image that is stable.
    pub(super) fn watch_order(&self, point: &CrashPoint) {
        if self.plan.rules {
            lock(&self.state).order = Order::new(self.plan.format, &point.durable);
        }
    }

    /// A stream has said *completed*.
    pub(super) fn completed(&self) {
        let mut state = lock(&self.state);
        state.detached = true;
        state.tally.streams += 1;
    }

    /// Judges what a crash at `point` may leave.
    pub(super) fn at(&self, point: &CrashPoint) {
        let mut state = lock(&self.state);
        if state.violation.is_some() {
            return;
        }
        state.tally.points += 1;
        if let Some(order) = &mut state.order
            && let Err(what) = order.observe(point)
        {
            state.violation = Some(Violation::Broken(format!("order of writes: {what}")));
            return;
        }
        if self.pages.is_some() {
            self.death(&mut state, point);
            if state.violation.is_some() || !state.rng.per_mille(POWER_CUTS_PER_MILLE) {
                return;
            }
        }
        let counts = is_busy(point);
        let candidates = candidates(&mut state.rng, &self.plan, point, counts);
        for (how, media) in candidates {
            self.judge(&mut state, point, how, media, counts);
            if state.violation.is_some() {
                return;
            }
        }
    }

    fn judge(&self, state: &mut State, point: &CrashPoint, how: &'static str, media: Media, counts: bool) {
        let strictness = lock(&self.model).strictness() * 2 + u64::from(state.detached);
        if !state.judged.insert((media.hash(), strictness)) {
            return;
        }
        state.tally.judged += 1;
        state.tally.kills += u64::from(how == KILL);
        if counts && state.seen.insert(media.hash()) {
            state.tally.counted += 1;
        }
        let use_on = state.rng.per_mille(USED_ON_PER_MILLE);
        state.tally.used_on += u64::from(use_on);
        let seed = state.rng.next_u64();
        let every = self.plan.sample_every;
        let is_sample = every > 0 && state.tally.judged.is_multiple_of(every);
        let is_heir = state.heir.is_none() || state.rng.per_mille(20);
        let then = Then { use_on, tell_content: is_sample || is_heir };
        match self.reopen(media.clone(), state.detached, then, seed) {
            Err(violation) => {
                let how = format!(
                    "after {:?}, crash: {how}, {} writes not synced",
                    point.boundary,
                    point.pending.len()
                );
                state.violation = Some(match violation {
                    Violation::Content { when, mismatch } => {
                        Violation::Content { when: format!("{how}: {when}"), mismatch }
                    }
                    Violation::Failed { when, error } => {
                        Violation::Failed { when: format!("{how}: {when}"), error }
                    }
                    Violation::Broken(what) => Violation::Broken(format!("{how}: {what}")),
                });
            }
            Ok((content, backed)) => {
                if is_sample {
                    state.samples.push(Sample {
                        media: media.clone(),
                        content: content.clone(),
                        backing: self.backing.clone().filter(|_| backed),
                        format: self.plan.format,
                        how: how.into(),
                    });
                }
                if is_heir {
                    state.heir = Some((media, content, state.detached));
                }
            }
        }
    }

    /// A node on the backing, of its own: nobody joins another world's fetches.
    fn backing_node(&self) -> Option<NodeHandle> {
        let storage = self.backing_storage.clone()?;
        Some(NodeHandle::new(RawNode::new(storage, true)))
    }

    /// Opens an image with its backing.
    pub(super) async fn open(
        &self,
        format: Format,
        storage: &StorageHandle,
        journal: Journaling,
    ) -> Result<(NodeHandle, bool), Violation> {
        let node = format.open_with(storage, journal).await.map_err(|error| failed("opening", &error))?;
        let backed = node.info().backing.is_some();
        if backed {
            let Some(slot) = node.backing() else {
                return Err(Violation::Broken("the header names a backing, the node has no edge".into()));
            };
            slot.replace(self.backing_node()).await;
        }
        Ok((node, backed))
    }

    /// Opens what a crash has left, as it is, and compares; gives the content where it is wanted, and whether the
    /// backing is named.
    fn reopen(
        &self,
        media: Media,
        detached: bool,
        then: Then,
        seed: u64,
    ) -> Result<(Vec<u8>, bool), Violation> {
        let options = DiskOptions { name: "after the crash".into(), seed, ..DiskOptions::default() };
        let disk = SimDisk::with(media, options);
        let storage = StorageHandle::new(disk.clone());
        World::new(seed).run(async {
            if let Some(layout) = Layout::parse(self.sound, &disk.media())
                && let Some(what) = layout.map_err(Violation::Broken)?.contradiction()
            {
                return Err(Violation::Broken(format!("the metadata contradicts itself: {what}")));
            }
            if !self.sound.is_marked_dirty(&disk.media()) {
                self.check(&storage, "the check before opening").await?;
            }
            // What is only looked at is opened without the planted mistake; what is used on goes on with it.
            let format = if then.use_on { self.plan.format } else { self.sound };
            let (node, backed) = self.open(format, &storage, Journaling::Off).await?;
            if detached && backed {
                return Err(Violation::Broken(
                    "the stream had completed, the header names the backing".into(),
                ));
            }
            let wrong = |mismatch| Violation::Content { when: "opened again".into(), mismatch };
            lock(&self.model).check_crash_size(node.len()).map_err(wrong)?;
            let see = |at, piece: &[u8]| lock(&self.model).check_crash_at(at, piece).map_err(wrong);
            read_pieces(&node, see).await?;
            let wants_content = then.use_on || then.tell_content;
            let content = if wants_content { read_all(&node).await? } else { Vec::new() };
            if then.use_on {
                self.use_on(&storage, node, &content, seed).await?;
            }
            Ok((content, backed))
        })
    }

    pub(super) async fn check(&self, storage: &StorageHandle, when: &str) -> Result<(), Violation> {
        let report = self.sound.check(storage, Repair::Nothing).await;
        let report = report.map_err(|error| failed(when, &error))?;
        if report.corruptions + report.check_errors > 0 {
            let words = report.messages.iter().take(4).cloned().collect::<Vec<_>>().join("; ");
            return Err(Violation::Broken(format!("{when} finds corruption: {words}")));
        }
        Ok(())
    }

    /// A disk that survived a crash goes on: writes, closes, gives leaks back, and shows the same.
    pub(super) async fn use_on(
        &self,
        storage: &StorageHandle,
        node: NodeHandle,
        content: &[u8],
        seed: u64,
    ) -> Result<(), Violation> {
        let size = content.len() as u64;
        let model = Arc::new(Mutex::new(Model::new(size, &Bytes::copy_from_slice(content))));
        let guest = Guest::new(node, model);
        let unit = self.sound.unit_bytes();
        let mut generator = Generator::new(Rng::new(seed), Mix::GUEST, size, unit, 1);
        for _ in 0..OPS_AFTER_CRASH {
            guest.apply(generator.next_op()).await?;
        }
        guest.apply(GuestOp::Sync).await?;
        let closed = guest.node().close(&Ctx::GUEST).await;
        closed.map_err(|error| failed("closing after a crash", &error))?;
        self.check(storage, "the check after going on").await?;
        let repaired = self.sound.check(storage, Repair::Leaks).await;
        let repaired = repaired.map_err(|error| failed("giving leaks back", &error))?;
        let again = self.sound.check(storage, Repair::Nothing).await;
        let again = again.map_err(|error| failed("the check after giving leaks back", &error))?;
        let leaks = if self.sound.is_tight() { 0 } else { repaired.leaks };
        if again.leaks != leaks || again.corruptions > 0 {
            let words = again.messages.iter().take(4).cloned().collect::<Vec<_>>().join("; ");
            return Err(Violation::Broken(format!("after giving leaks back the check finds: {words}")));
        }
        let (node, _) = self.open(self.sound, storage, Journaling::Off).await?;
        guest.on_node(node).compare_all().await
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Metadata,
    Payload,
    /// Zeroes, or a change of the length: nobody can tell.
    Other,
}

fn role(pending: &Pending) -> Role {
    let mut role = Role::Other;
    for (_, sector) in &pending.op.sectors {
        match sector_kind(sector) {
            SectorKind::Unclear => {}
            SectorKind::Payload(_) => return Role::Payload,
            SectorKind::Metadata => role = Role::Metadata,
        }
    }
    role
}

/// Whether a state counts: metadata and a payload are not synced.
fn is_busy(point: &CrashPoint) -> bool {
    let has = |wanted| point.pending.iter().any(|pending| role(pending) == wanted);
    has(Role::Metadata) && has(Role::Payload)
}

/// What is done with a state that passed.
#[derive(Clone, Copy, Debug)]
struct Then {
    use_on: bool,
    tell_content: bool,
}

const KILL: &str = "the process died";

/// States that a crash at `point` may leave.
fn candidates(rng: &mut Rng, plan: &Plan, point: &CrashPoint, busy: bool) -> Vec<(&'static str, Media)> {
    let mut states = vec![("nothing that was not synced is there", point.durable.clone())];
    if point.pending.is_empty() {
        return states;
    }
    let newest = point.pending.iter().map(|pending| pending.op.id).max();
    if point.boundary == Boundary::Submitted {
        states.push(("the newest write alone", point.power_cut(|pending, _| Some(pending.op.id) == newest)));
    }
    if busy {
        states.push(("metadata alone", point.power_cut(|pending, _| role(pending) == Role::Metadata)));
        states.push(("all but payload", point.power_cut(|pending, _| role(pending) != Role::Payload)));
        states.push(("all but metadata", point.power_cut(|pending, _| role(pending) != Role::Metadata)));
    }
    states.push((KILL, point.kill(rng)));
    match point.all_power_cuts(COMBINATIONS_MAX) {
        Some(all) => states.extend(all.map(|media| ("whole writes", media))),
        None => {
            let wanted = if busy { plan.states_per_point } else { plan.states_per_point.div_ceil(3) };
            states.extend((0..wanted).map(|_| ("by chance", point.random_power_cut(rng))));
        }
    }
    states
}
