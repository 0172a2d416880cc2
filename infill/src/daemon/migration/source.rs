//! The driver of a migration's source: freezes, fences, seals and serves what was frozen, as its machine says.
//!
//! Its gates are those of its disks' exports. What is sealed is held at the node ([`NodeHandle::hold_changes`]), below every
//! server, so that a `.base` export cannot change. The fence is in the image's header; a daemon that starts again finds its
//! nodes refused by it, and they come back when it is taken away.

use std::collections::VecDeque;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use infill_base::{Class, Ctx, DiscardMode, ErrorKind, IoError, IoResult};
use infill_io::{FileOptions, FileStorage};
use infill_migrate::{
    BlockSet, Busy, Disk, DiskId, Drain, Epoch, Frame, Gate, MigrationId, Plan, Round, Side, Source,
    SourceAction, SourceInput, SourcePhase, SourceState, State as RecordState,
};
use infill_nbd::{Export, RemoveMode};
use infill_node::{Held, NodeHandle};
use infill_qmp::migration::{Migrate, MigrationMode, PHASE_GIVES_UP};
use infill_storage::{StorageHandle, rt};
use uuid::Uuid;

use super::crash::Point;
use super::fence::{ImageKind, only_name, set_by_name};
use super::gate::{DiskGate, owned_by};
use super::link::{Link, dial};
use super::{
    Drive, Driver, Inbox, Kept, Local, LocalDisk, Peers, RESEND_TIME, RESEND_TIME_DONE, Told, address,
    base_name, hello, live_name,
};
use crate::blockdev::Image;
use crate::daemon::control::Control;

/// The longest freeze that is waited for: a guest stands still meanwhile.
const FREEZE_TIME: Duration = Duration::from_millis(250);
/// How long an offer may stand without an answer.
const OFFER_TIME: Duration = Duration::from_secs(5);
/// How long after a freeze that came to nothing another one is tried.
const FREEZE_AGAIN: Duration = Duration::from_secs(1);
/// Freezes that may come to nothing before an operator is needed.
const FREEZES_MAX: u32 = 3;
/// How often the fence is tried to be set where the image is in use, and how long after that.
const FENCE_TRIES: u32 = 100;
const FENCE_PAUSE: Duration = Duration::from_millis(20);
/// Rounds of copying before the switch.
const ROUNDS: u8 = 4;
/// Rounds of a copy that is to be whole before the switch.
const ROUNDS_WHOLE: u8 = 200;
/// How long after a round of such a copy, whose disks are held, there is another one.
const HELD_ROUND_TIME: Duration = Duration::from_secs(5);
/// So little that was written since a round began is left for after the switch, or is copied while the guest waits, in
/// bytes.
const RESIDUAL_BYTES: u64 = 1 << 20;
/// How long the target of disks that are held waits for a guest's write once it has everything, where nothing else is said,
/// in seconds: until then they can come back, for a machine may fail to start there.
const WAY_BACK_SECONDS: u32 = 300;
/// A raw disk is rounded up to this, in bytes.
const SECTOR_BYTES: u64 = 512;
/// Least size of a block, in bytes, and the most blocks of all disks: a set of them is a bit each.
const BLOCK_BYTES_MIN: u64 = 4 << 10;
const BLOCKS_MAX: u64 = 1 << 26;

/// What goes into the driver.
pub(super) enum ToSource {
    /// An input of the machine.
    Input(SourceInput),
    /// The peer asks where it stands.
    Ask,
    /// Change hands now.
    Switch,
    /// The freeze of that number takes too long.
    Late(u32),
    /// The target does not begin.
    Refused(String),
    /// One of the daemons does not take the other at all.
    NotLetIn(String),
}

struct SourceDisk {
    id: DiskId,
    gate: DiskGate,
    local: LocalDisk,
    /// The image, opened by its path because its node cannot be: its node's name.
    frozen: Option<String>,
}

struct SourceDriver {
    control: Rc<Control>,
    peers: Rc<Peers>,
    machine: Source,
    local: Local,
    disks: Vec<SourceDisk>,
    link: Rc<Link>,
    inbox: Rc<Inbox<ToSource>>,
    told: Rc<Told>,
    deferred: VecDeque<SourceInput>,
    /// Names of exports that peers read.
    published: Vec<String>,
    /// What is sealed.
    held: Vec<Held>,
    /// The disks are to change hands.
    switch: bool,
    /// An operator wants that now, however much is there.
    now: bool,
    freezes: u32,
    /// Numbers the freezes, so that what is late of one is not taken for the next one's.
    drains: u32,
    /// What is dirty now is left for after the switch; of a copy that is whole before, for the time in which the guest waits.
    rounds_over: bool,
    /// A copy that is to be whole was behind the guest in every round: there is no other one unless an operator wants it.
    gives_up: bool,
    /// Since when it is copied in this life of the daemon, and how much was read of the disks in the background before.
    warm_since: Option<(Duration, u64)>,
    /// The last offer came to nothing, and another round comes before the next one.
    retry_round: bool,
    /// Not before then is there another round of a disk that is held.
    round_at: Duration,
    /// Not before then.
    freeze_at: Duration,
    /// Since when it is offered.
    offered_at: Option<Duration>,
    /// Since when the peer is asked.
    asked_at: Duration,
}

fn disk_ids(names: &[String]) -> Result<Vec<DiskId>> {
    let id = |name: &String| {
        name.parse::<DiskId>().map_err(|_| {
            anyhow!(
                "'{name}' is no UUID: a disk that changes hosts keeps its name for life, so export it by one (--export \
                 nbd,…,name=UUID)"
            )
        })
    };
    names.iter().map(id).collect()
}

/// `__infill_migrate`: begins, or finds the one that was begun before.
pub(super) async fn begin(control: &Rc<Control>, migrate: Migrate) -> Result<MigrationId> {
    let peers = control.migrations.peers();
    let peers = peers.context("this daemon moves no disks: it was started without --migration")?;
    let _turn = control.migrations.beginning.exclusive(0, 1).await;
    let ids = disk_ids(&migrate.disks)?;
    let migration = match &migrate.migration {
        Some(text) => text.parse::<MigrationId>().map_err(|why| anyhow!("migration: {why}"))?,
        None => MigrationId(Uuid::new_v4()),
    };
    let to = address(&migrate.to)?;
    match &peers.tls {
        // That it names a host.
        Some(tls) => drop(tls.for_peer(&to, migrate.tls_hostname.as_deref())?),
        None if migrate.tls_hostname.is_some() => bail!(
            "tls-hostname is for TLS, which this daemon does not speak to others: start it with --migration …,tls-creds=DIR"
        ),
        None => {}
    }
    let peer = to.to_string();
    if let Some(found) = found_again(control, &migrate, migration, &ids, &peer)? {
        return Ok(found);
    }
    control.check_disks_free(migration, &ids)?;
    let mut plan_disks = Vec::new();
    let mut disks = Vec::new();
    for id in &ids {
        let (disk, local) = local_disk(control, *id)?;
        plan_disks.push(disk);
        disks.push(local);
    }
    let block_bytes = block_bytes(&plan_disks);
    let whole = migrate.mode == MigrationMode::PreCopy;
    if migrate.mode != MigrationMode::Hybrid
        && (migrate.warm_seconds.is_some() || migrate.warm_bytes.is_some())
    {
        bail!(
            "warm-seconds and warm-bytes bound what a hybrid migration copies before the switch: leave them out, or mode"
        );
    }
    let way_back = migrate.way_back.unwrap_or(if migrate.auto_switch { 0 } else { WAY_BACK_SECONDS });
    let plan = Plan { migration, disks: plan_disks, block_bytes, peer, witness: None, whole, way_back };
    let local = Local {
        post_copy: migrate.mode == MigrationMode::PostCopy,
        auto_switch: migrate.auto_switch,
        data: None,
        tls_hostname: migrate.tls_hostname,
        warm_seconds: migrate.warm_seconds,
        warm_bytes: migrate.warm_bytes,
        disks,
    };
    let (machine, actions) = Source::prepare(plan)?;
    let mut driver = SourceDriver::new(control, peers, machine, local)?;
    for (disk, planned) in driver.disks.iter().zip(&driver.machine.record().plan().disks) {
        // For a moment: a guest that keeps several writes in flight leaves none in which there are none.
        disk.gate.set(Gate::Hold, "");
        let counted = disk.gate.count_in(planned.bytes, block_bytes.into());
        let counted = rt::timeout(FREEZE_TIME, counted).await;
        disk.gate.set(Gate::Run, "");
        if counted.is_none() {
            bail!("writes to disk {} did not end within {FREEZE_TIME:?}: try again", disk.id);
        }
    }
    driver.carry_out(actions).await;
    if driver.machine.phase() == SourcePhase::Failed {
        bail!("the migration's record could not be written: nothing has begun");
    }
    driver.start();
    Ok(migration)
}

/// The same call again.
fn found_again(
    control: &Control,
    migrate: &Migrate,
    migration: MigrationId,
    ids: &[DiskId],
    peer: &str,
) -> Result<Option<MigrationId>> {
    let kept = control.migrations.kept.borrow();
    for kept in kept.values().filter(|kept| kept.record.side() == Side::Source) {
        let plan = kept.record.plan();
        let same_disks =
            plan.disks.len() == ids.len() && plan.disks.iter().all(|disk| ids.contains(&disk.id));
        let same = same_disks && plan.peer == peer;
        if plan.migration == migration {
            if !same {
                bail!("migration {migration} is of other disks, or to another host");
            }
            return Ok(Some(migration));
        }
        if migrate.migration.is_none() && same && !kept.is_over() {
            return Ok(Some(plan.migration));
        }
    }
    Ok(None)
}

/// The disk that is exported under that name, if it can move.
fn local_disk(control: &Control, id: DiskId) -> Result<(Disk, LocalDisk)> {
    let name = id.to_string();
    let (export, node) = control
        .export_of(&name)
        .with_context(|| format!("no disk {name} is exported here: `infill whois` asks other hosts"))?;
    if let Some(latest) = control.migrations.latest(id)
        && !latest_is_here(&latest)
    {
        bail!("disk {name} is not owned here: migrate it from where it is ({})", latest.record.plan().peer);
    }
    control.not_busy(&node).map_err(|error| anyhow!(error.desc))?;
    let blockdevs = control.blockdevs();
    let image = blockdevs.unfiltered(&node);
    let facts = blockdevs.facts(&image)?;
    let bytes = blockdevs.get(&node)?.len();
    let kind = ImageKind::of_driver(facts.driver);
    let kind = kind.with_context(|| unfenced(&name, &format!("is a node of the driver {}", facts.driver)))?;
    let path = match kind {
        ImageKind::Qcow2 => facts.file.as_deref().and_then(|file| blockdevs.path(file)),
        ImageKind::Raw | ImageKind::Qed => {
            let bottom = blockdevs.bottom(&image).unwrap_or_else(|| image.clone());
            if blockdevs.facts(&bottom)?.driver != "file" {
                bail!("{}", unfenced(&name, "lies on no regular file"));
            }
            let whole = blockdevs.get(&bottom)?.len().next_multiple_of(SECTOR_BYTES);
            if kind == ImageKind::Raw && whole != bytes.next_multiple_of(SECTOR_BYTES) {
                bail!("disk {name} is a part of its file: it cannot be found again by its path alone");
            }
            blockdevs.path(&bottom).map(|path| only_name(&path)).transpose()?
        }
    };
    let path = path.with_context(|| format!("disk {name} does not lie in a file of this host"))?;
    let epoch_before = control.migrations.latest(id).map_or(Epoch(0), |latest| {
        let of = latest.record.plan().disks.iter().find(|disk| disk.id == id);
        of.map_or(Epoch(0), |disk| latest.record.epoch(disk))
    });
    Ok((Disk { id, bytes, epoch_before }, LocalDisk { export, node, path, kind }))
}

/// Why a disk that has no fence does not move.
fn unfenced(name: &str, what: &str) -> String {
    format!(
        "disk {name} {what}, which cannot be fenced: it could be started by its path after it has moved; convert it to qcow2, \
         or to a raw file"
    )
}

/// Whether the record says that its disks are served here.
fn latest_is_here(kept: &Kept) -> bool {
    use infill_migrate::TargetState as T;
    match kept.record.state() {
        RecordState::Source(state) => state == SourceState::Serving,
        RecordState::Target(state) => state == T::Local,
    }
}

/// The unit in which blocks of these disks are counted.
fn block_bytes(disks: &[Disk]) -> u32 {
    let mut bytes = BLOCK_BYTES_MIN;
    while disks.iter().map(|disk| disk.bytes.div_ceil(bytes)).sum::<u64>() > BLOCKS_MAX {
        bytes *= 2;
    }
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// Goes on with a migration that an earlier daemon began.
pub(super) fn restart(control: &Rc<Control>, kept: Kept) -> Result<()> {
    let peers = control.migrations.peers().context("--migration is not given")?;
    let (machine, actions) = Source::restart(kept.record)?;
    let mut driver = SourceDriver::new(control, peers, machine, kept.local)?;
    let plan = driver.machine.record().plan().clone();
    let handle = driver.handle();
    let key = super::key(plan.migration, Side::Source);
    control.migrations.drivers.borrow_mut().insert(key, handle);
    rt::spawn(async move {
        for (disk, planned) in driver.disks.iter().zip(&plan.disks) {
            disk.gate.count_in(planned.bytes, plan.block_bytes.into()).await;
        }
        driver.carry_out(actions).await;
        driver.run().await;
    });
    Ok(())
}

impl SourceDriver {
    fn new(control: &Rc<Control>, peers: Rc<Peers>, machine: Source, local: Local) -> Result<SourceDriver> {
        let plan = machine.record().plan();
        let disks = plan.disks.iter().zip(&local.disks).map(|(disk, local)| {
            let gate = control.migrations.gate(&disk.id.to_string());
            let gate = gate.context("a disk's name is no UUID")?;
            Ok(SourceDisk { id: disk.id, gate, local: local.clone(), frozen: None })
        });
        let disks = disks.collect::<Result<Vec<_>>>()?;
        Ok(SourceDriver {
            control: control.clone(),
            peers,
            switch: local.auto_switch,
            now: false,
            local,
            disks,
            machine,
            link: Rc::new(Link::default()),
            inbox: Inbox::new(),
            told: Rc::default(),
            deferred: VecDeque::new(),
            published: Vec::new(),
            held: Vec::new(),
            freezes: 0,
            drains: 0,
            rounds_over: false,
            gives_up: false,
            warm_since: None,
            retry_round: false,
            round_at: Duration::ZERO,
            freeze_at: Duration::ZERO,
            offered_at: None,
            asked_at: rt::now(),
        })
    }

    fn handle(&self) -> Driver {
        Driver::Source { inbox: self.inbox.clone(), told: self.told.clone(), link: self.link.clone() }
    }

    fn migration(&self) -> MigrationId {
        self.machine.record().plan().migration
    }

    fn state(&self) -> SourceState {
        match self.machine.record().state() {
            RecordState::Source(state) => state,
            RecordState::Target(_) => SourceState::Superseded,
        }
    }

    fn start(self) {
        let key = super::key(self.migration(), Side::Source);
        self.control.migrations.drivers.borrow_mut().insert(key, self.handle());
        rt::spawn(self.run());
    }

    /// Drives the machine for as long as the daemon lives: a peer that comes late is still answered.
    async fn run(mut self) {
        let peer = match address(&self.machine.record().plan().peer) {
            Ok(peer) => peer,
            Err(error) => return tracing::error!("migration {}: {error:#}", self.migration()),
        };
        {
            let tls = self.peers.tls.as_ref();
            let tls = match tls.map(|tls| tls.for_peer(&peer, self.local.tls_hostname.as_deref())).transpose()
            {
                Ok(tls) => tls,
                Err(error) => return tracing::error!("migration {}: {error:#}", self.migration()),
            };
            let (control, link, inbox) = (self.control.clone(), self.link.clone(), self.inbox.clone());
            let heard = move |frame| control.hear(&link, frame);
            let refused = move |why| inbox.push(ToSource::NotLetIn(why));
            let hello = hello(Some(self.peers.data.clone()));
            // A target that has restarted knows no way to its source until that speaks, and may wait for its turn.
            self.link.begin_with(Frame::Ask(self.migration()));
            rt::spawn(dial(self.link.clone(), peer, tls, hello, heard, refused));
        }
        for disk in &self.disks {
            rt::spawn(watch_gate(disk.gate.clone(), self.inbox.clone()));
        }
        let mut said_at = rt::now();
        loop {
            let done = matches!(
                self.state(),
                SourceState::Serving | SourceState::Released | SourceState::Superseded
            ) && self.machine.phase() == SourcePhase::Settled;
            let patience = if done { RESEND_TIME_DONE } else { RESEND_TIME };
            // Whatever comes in between: what is asked often is no reason to say nothing.
            let now = rt::now();
            let item = match said_at + patience {
                due if due > now => self.inbox.next(due - now).await,
                _ => None,
            };
            if item.is_none() {
                said_at = rt::now();
            }
            if self.control.is_ending() {
                // What is kept goes on with the next daemon; nothing is to change under it now.
                return self.link.close();
            }
            match item {
                Some(item) => self.take(item).await,
                None => self.step(SourceInput::Resend).await,
            }
            self.follow_policy().await;
        }
    }

    async fn take(&mut self, item: ToSource) {
        match item {
            ToSource::Input(input) => self.step(input).await,
            ToSource::Ask => {
                if let Some(standing) = self.machine.standing() {
                    self.link.say(&Frame::Standing { migration: self.migration(), standing });
                }
            }
            ToSource::Switch => {
                // Not before the pause after a freeze that came to nothing is over: a target that has restarted needs the
                // running disk for a moment before it can take it, and who asks again and again must not keep it from that.
                (self.switch, self.freezes) = (true, 0);
                // Now: what is not there yet follows.
                self.now = !self.is_whole();
                self.local.auto_switch = true;
            }
            ToSource::Late(nth) if nth == self.drains && self.machine.phase() == SourcePhase::Draining => {
                self.tell_error("the guest's requests did not end in time for the freeze: it goes on");
                self.step(SourceInput::Timeout).await;
            }
            ToSource::Late(_) => {}
            ToSource::Refused(why) => {
                self.tell_error(&format!("the target does not take the disks: {why}"));
                self.switch = false;
                self.step(SourceInput::Abort).await;
            }
            // Nothing is at the target yet, and nobody there will say so.
            ToSource::NotLetIn(why) if self.state() == SourceState::Prepared && !self.machine.is_linked() => {
                self.tell_error(&format!("the target cannot be spoken to: {why}"));
                self.switch = false;
                self.step(SourceInput::Abort).await;
            }
            ToSource::NotLetIn(_) => {}
        }
    }

    fn tell_error(&self, why: &str) {
        if self.told.error.replace(Some(why.to_owned())).as_deref() != Some(why) {
            tracing::warn!("migration {}: {why}", self.migration());
        }
    }

    /// The disk's node, or, of a frozen one, its image where the node cannot be opened because it is fenced.
    async fn readable(&mut self, index: usize, live: bool) -> Result<NodeHandle> {
        let disk = &mut self.disks[index];
        if let Ok(node) = self.control.blockdevs().get(&disk.local.node) {
            return Ok(node);
        }
        if live {
            bail!("the node '{}' is not there yet", disk.local.node);
        }
        if disk.frozen.is_none() {
            let LocalDisk { path, kind, .. } = &disk.local;
            let path = kind.fenced_path(path);
            let image = Image {
                format: Some(kind.format()),
                discard: DiscardMode::Ignore,
                fenced: *kind == ImageKind::Qcow2,
                ..Image::read_only(path.to_str().context("its path is not UTF-8")?)
            };
            disk.frozen = Some(self.control.blockdevs().add_image(&image).await?);
        }
        self.control.blockdevs().get(disk.frozen.as_deref().unwrap_or_default())
    }

    /// Waits, beside everything else, until the guest's requests are over.
    fn drain(&mut self, drain: Drain) {
        self.drains += 1;
        let nth = self.drains;
        let gates: Vec<DiskGate> = self.disks.iter().map(|disk| disk.gate.clone()).collect();
        let inbox = self.inbox.clone();
        rt::spawn(async move {
            let all = async {
                for gate in &gates {
                    gate.drained().await;
                }
            };
            match rt::timeout(FREEZE_TIME, all).await {
                Some(()) => inbox.push(ToSource::Input(SourceInput::Drained(drain))),
                None => inbox.push(ToSource::Late(nth)),
            }
        });
    }

    async fn set_fences(&self, fenced: bool) -> IoResult<()> {
        for disk in &self.disks {
            let mut tries = 0;
            while let Err(error) = self.set_fence(disk, fenced).await {
                tries += 1;
                if tries > FENCE_TRIES {
                    return Err(error);
                }
                // Somebody is opening the image, perhaps as the node that is not there yet.
                rt::sleep(FENCE_PAUSE).await;
            }
        }
        Ok(())
    }

    async fn set_fence(&self, disk: &SourceDisk, fenced: bool) -> IoResult<()> {
        if disk.local.kind != ImageKind::Qcow2 {
            return Ok(set_by_name(&disk.local.path, fenced)?);
        }
        let image = self.control.blockdevs().unfiltered(&disk.local.node);
        match self.control.blockdevs().get(&image) {
            Ok(node) => node.set_fence(&Ctx::GUEST, fenced).await,
            Err(_) => set_fence_of_file(&disk.local.path, fenced).await,
        }
    }

    /// Nothing changes the images from here on, everything in them is stable, and what the target may have stale is known.
    async fn seal(&mut self) -> IoResult<Vec<BlockSet>> {
        let mut residual = Vec::new();
        for disk in &self.disks {
            let gone = |error: anyhow::Error| IoError::new(ErrorKind::NotFound, format!("{error:#}"));
            let node = self.control.blockdevs().get(&disk.local.node).map_err(gone)?;
            let late = || IoError::new(ErrorKind::TimedOut, "something else writes to the disk");
            let held = rt::timeout(FREEZE_TIME, node.hold_changes()).await.ok_or_else(late)?;
            self.held.push(held);
            node.sync(&Ctx::GUEST).await?;
            let busy = |_| IoError::new(ErrorKind::Busy, "a write of the guest is in flight");
            residual.push(disk.gate.residual().map_err(busy)?);
        }
        Ok(residual)
    }

    /// Undoes freeze, seal and fence. The exports of what was frozen are closed by now.
    async fn thaw(&mut self) -> IoResult<()> {
        self.held.clear();
        for disk in &mut self.disks {
            if let Some(frozen) = disk.frozen.take() {
                let closed = self.control.blockdevs().del(&frozen).await;
                closed.map_err(|error| IoError::new(ErrorKind::Busy, format!("{error:#}")))?;
            }
        }
        self.set_fences(false).await?;
        if let Some(state) = &self.control.state {
            // Nodes that the fence has kept out.
            state.try_held_again();
        }
        Ok(())
    }

    /// The disk is the target's for good. The image stays where it is, fenced, for its owner to delete.
    async fn release(&mut self) {
        for index in 0..self.disks.len() {
            let LocalDisk { export, node, .. } = self.disks[index].local.clone();
            if let Err(error) = self.control.forget_disk(&export, &node).await {
                tracing::warn!("migration {}: {error:#}", self.migration());
            }
        }
    }

    /// The target has read a round: another one, or the switch.
    fn after_round(&mut self, round: Round) -> Option<SourceInput> {
        if self.rounds_over {
            // It is said again for as long as it may not have been heard.
            return None;
        }
        let most = if self.is_whole() { ROUNDS_WHOLE } else { ROUNDS };
        if self.dirty_bytes() <= RESIDUAL_BYTES {
            self.rounds_over = true;
            return None;
        }
        if round.0 >= most {
            self.rounds_over = !self.is_whole();
            self.gives_up = self.is_whole();
            if self.gives_up {
                self.tell_error(&format!(
                    "after {most} rounds the guest still writes more than can be copied while it waits: abort this, and \
                     migrate with mode hybrid"
                ));
            }
            return None;
        }
        self.round_at = rt::now() + HELD_ROUND_TIME;
        self.another_round()
    }

    /// What was written since the last round is what the next one is of.
    fn another_round(&self) -> Option<SourceInput> {
        let sets: Option<Vec<BlockSet>> = self.disks.iter().map(|disk| disk.gate.close_round()).collect();
        sets.map(SourceInput::NextRound)
    }

    /// Whether the target is to have everything before the disks change hands.
    fn is_whole(&self) -> bool {
        self.machine.record().plan().whole
    }

    fn dirty_bytes(&self) -> u64 {
        self.disks.iter().map(|disk| disk.gate.dirty_bytes()).sum()
    }

    /// Whether a copy that is to be whole has become too much less than that since its last round: its disks are held, or
    /// an offer came to nothing.
    fn wants_another_round(&self) -> bool {
        let round = self.machine.round().map_or(0, |round| round.0);
        let due = self.switch || rt::now() >= self.round_at;
        self.is_whole()
            && self.rounds_over
            && due
            && round < ROUNDS_WHOLE
            && self.dirty_bytes() > RESIDUAL_BYTES
    }

    /// What comes next where the machine waits for a decision.
    async fn follow_policy(&mut self) {
        let now = rt::now();
        if self.machine.phase() == SourcePhase::Unasked && now - self.asked_at > self.peers.reconnect_time {
            return self.step(SourceInput::PeerSilent).await;
        }
        if self.offered_at.is_some_and(|since| now - since > OFFER_TIME) {
            self.tell_error("the target did not answer the offer in time: the disk stays here");
            self.freeze_at = now + FREEZE_AGAIN;
            // It may have been started again, and not know any more what it has: a round tells.
            self.retry_round = self.is_whole();
            return self.step(SourceInput::Timeout).await;
        }
        let ready = self.state() == SourceState::Prepared
            && self.machine.phase() == SourcePhase::Settled
            && self.machine.is_linked()
            && !self.machine.busy();
        if !ready || !self.published_live() {
            return;
        }
        if !self.local.post_copy && self.machine.round().is_none() {
            (self.rounds_over, self.gives_up) = (false, false);
            self.disks.iter().for_each(|disk| disk.gate.start_bitmap());
            self.count_warming();
            return self.step(SourceInput::Warm).await;
        }
        if self.retry_round || self.wants_another_round() {
            if let Some(next) = self.another_round() {
                (self.rounds_over, self.gives_up, self.retry_round) = (false, false, false);
                self.round_at = now + HELD_ROUND_TIME;
                self.step(next).await;
            }
            return;
        }
        if self.switch && (self.now || self.has_warmed()) && now >= self.freeze_at {
            if self.freezes >= FREEZES_MAX {
                self.switch = false;
                return self.tell_error("the disk could not be frozen: `infill switch` tries it again");
            }
            (self.freezes, self.freeze_at) = (self.freezes + 1, now + FREEZE_AGAIN);
            self.step(SourceInput::Freeze).await;
        }
    }

    /// From here on it is counted what the target reads.
    fn count_warming(&mut self) {
        for disk in &self.disks {
            if let Ok(node) = self.control.blockdevs().get(&disk.local.node) {
                node.latency().meter().start();
            }
        }
        self.warm_since = Some((rt::now(), self.background_bytes()));
    }

    /// Bytes that clients have read of the disks for nobody who waits, since it is counted.
    fn background_bytes(&self) -> u64 {
        let nodes = self.disks.iter().filter_map(|disk| self.control.blockdevs().get(&disk.local.node).ok());
        nodes.map(|node| node.latency().meter().read_bytes(Class::Prefetch)).sum()
    }

    /// Whether enough was copied for the switch: everything but what is written right now, or as much as may be.
    fn has_warmed(&self) -> bool {
        self.local.post_copy || self.rounds_over || self.is_budget_spent()
    }

    fn is_budget_spent(&self) -> bool {
        let Some((since, before)) = self.warm_since else { return false };
        let Local { warm_seconds, warm_bytes, .. } = self.local;
        warm_seconds.is_some_and(|seconds| rt::now() - since >= Duration::from_secs(seconds.into()))
            || warm_bytes.is_some_and(|bytes| self.background_bytes().saturating_sub(before) >= bytes)
    }

    /// What it is about, for people.
    fn phase(&self) -> String {
        let phase = self.machine.phase();
        if self.state() != SourceState::Prepared || phase != SourcePhase::Settled {
            return format!("{phase:?}");
        }
        match (self.machine.is_linked(), self.has_warmed()) {
            (false, _) => "waits for the target".into(),
            (true, false) if self.gives_up => PHASE_GIVES_UP.into(),
            (true, false) => "copies".into(),
            (true, true) => "ready".into(),
        }
    }

    fn published_live(&self) -> bool {
        self.disks.iter().all(|disk| self.published.contains(&live_name(disk.id)))
    }
}

impl Drive for SourceDriver {
    type Input = SourceInput;
    type Action = SourceAction;

    fn give(&mut self, input: SourceInput) -> std::result::Result<Vec<SourceAction>, Busy<SourceInput>> {
        self.machine.handle(input)
    }

    fn is_busy(&self) -> bool {
        self.machine.busy()
    }

    fn deferred(&mut self) -> &mut VecDeque<SourceInput> {
        &mut self.deferred
    }

    /// Closes what is not to be read any more, sets the gates, and opens what is to be read.
    async fn follow(&mut self) {
        let exports = self.machine.exports();
        let plan = self.machine.record().plan().clone();
        let mut wanted = Vec::new();
        for (index, disk) in plan.disks.iter().enumerate() {
            if exports.live {
                wanted.push((live_name(disk.id), index));
            }
            if let Some(term) = exports.base {
                wanted.push((base_name(disk.id, Epoch(disk.epoch_before.0 + term.0)), index));
            }
        }
        let gone: Vec<String> = self
            .published
            .iter()
            .filter(|name| !wanted.iter().any(|(other, _)| other == *name))
            .cloned()
            .collect();
        for name in gone {
            if let Ok(removal) = self.peers.exports.remove(&name, RemoveMode::Hard) {
                removal.gone().await;
            }
            self.published.retain(|other| *other != name);
        }
        let gate = self.machine.gate();
        let is_away = matches!(
            self.state(),
            SourceState::HandedOver
                | SourceState::Released
                | SourceState::Superseded
                | SourceState::Reclaiming
        );
        let decided =
            |disk: &&SourceDisk| self.control.migrations.decides(disk.id, plan.migration, Side::Source);
        for disk in self.disks.iter().filter(decided) {
            disk.gate.set(gate, &plan.peer);
            self.control.deny_clients(&disk.id.to_string(), is_away.then(|| owned_by(&plan.peer)));
        }
        for (name, index) in wanted {
            if self.published.contains(&name) {
                continue;
            }
            match self.readable(index, exports.live).await {
                Ok(node) => match self.peers.exports.add(Export::new(name.clone(), node)) {
                    Ok(()) => self.published.push(name),
                    Err(error) => self.tell_error(&error.to_string()),
                },
                // It is tried again with the next step.
                Err(error) => tracing::debug!("{name} cannot be offered yet: {error:#}"),
            }
        }
        *self.told.phase.borrow_mut() = self.phase();
        self.told.rounds.set(self.machine.round().map_or(0, |round| round.0));
        self.offered_at = match self.state() {
            // While the peer is asked, it may have taken what was offered over: that is no offer that can be late.
            SourceState::Offered if self.machine.phase() != SourcePhase::Unasked => {
                self.offered_at.or_else(|| Some(rt::now()))
            }
            _ => None,
        };
    }

    async fn perform(&mut self, action: SourceAction) -> Option<SourceInput> {
        let point = Point::of_source(&action);
        point.before();
        let end = self.execute(action).await;
        point.after();
        end
    }
}

impl SourceDriver {
    /// What the machine wants done; its end, where it is awaited.
    async fn execute(&mut self, action: SourceAction) -> Option<SourceInput> {
        match action {
            SourceAction::Persist(pending) => {
                let kept = Kept { record: pending.record().clone(), local: self.local.clone() };
                let outcome = self.control.keep_migration(kept).await;
                let outcome = outcome.map_err(|error| IoError::new(ErrorKind::Io, format!("{error:#}")));
                return Some(SourceInput::Settled(pending.settled(outcome)));
            }
            SourceAction::Send(message) => self.link.say(&Frame::Message(message.into_message())),
            SourceAction::Drain(drain) => self.drain(drain),
            SourceAction::SetFence => return Some(SourceInput::FenceSet(self.set_fences(true).await)),
            SourceAction::Seal => return Some(SourceInput::Sealed(self.seal().await)),
            SourceAction::Thaw => return Some(SourceInput::Thawed(self.thaw().await)),
            SourceAction::Applied(round) => self.disks.iter().for_each(|disk| disk.gate.applied(round)),
            SourceAction::RoundRead(round) => return self.after_round(round),
            SourceAction::StopBitmaps => self.disks.iter().for_each(|disk| disk.gate.stop_bitmap()),
            SourceAction::AskPeer => self.link.say(&Frame::Ask(self.migration())),
            // There is no witness: it is never asked for.
            SourceAction::Swap(_) | SourceAction::AskWitness => {}
            SourceAction::Release => self.release().await,
            SourceAction::Refuse(why) => self.tell_error(why),
            SourceAction::Fail(why) => self.tell_error(&format!("{why}; the disk is held until a restart")),
        }
        None
    }
}

/// Tells the driver of requests that wait at a gate.
async fn watch_gate(gate: DiskGate, inbox: Rc<Inbox<ToSource>>) {
    while Rc::strong_count(&inbox) > 1 {
        let asking = gate.asking();
        if gate.asked().old_session {
            inbox.push(ToSource::Input(SourceInput::OldSession));
        }
        rt::timeout(RESEND_TIME_DONE, asking).await;
    }
}

async fn set_fence_of_file(path: &Path, fenced: bool) -> IoResult<()> {
    let refused =
        |error: infill_base::OpenError| IoError::new(ErrorKind::Io, format!("{}: {error}", path.display()));
    let storage = FileStorage::open(path, FileOptions::default()).map_err(refused)?;
    infill_qcow2::set_fence(&Ctx::GUEST, &StorageHandle::new(storage), fenced).await.map_err(refused)
}
