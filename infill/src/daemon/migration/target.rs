//! The driver of a migration's target: makes overlays, warms them, and owns the disks once its machine says so.
//!
//! An overlay lies on the source's live export while it is warmed, and on the frozen one (`UUID.eN.base`) from the switch
//! on; what is *absent* in it is the map of what is still at the source. Making blocks absent again raises the generation
//! of that edge first, so that what was fetched before cannot link afterwards. The rest is a stream over an ordinary overlay.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use infill_base::{Ctx, ErrorKind, IoError, IoResult};
use infill_migrate::{
    BlockMap, BlockSet, Body, Busy, Demotion, Disk, DiskId, Epoch, Filling, Frame, Gate, Message,
    MigrationId, Plan, Round, Side, State as RecordState, Target, TargetAction, TargetInput, TargetState,
    Term,
};
use infill_node::{COPY_ON_READ_BYTES_MAX, CopyOnRead, NodeHandle};
use infill_qmp::command::{BlockStream, OnError, StreamEnd};
use infill_storage::rt;

use super::crash::Point;
use super::fence::ImageKind;
use super::gate::{DiskGate, owned_by};
use super::link::Link;
use super::missed::OnHold;
use super::overlay::{
    Below, close_source, drop_disk, end_job, export_description, job_of, lay_on, open_source,
    overlay_description, prepare_disks, tidy_up, watch_fill,
};
use super::warm::{copy_absent, copy_blocks};
use super::{
    Drive, Driver, Inbox, Kept, Local, LocalDisk, RESEND_TIME, RESEND_TIME_DONE, Told, base_name, live_name,
    node_name,
};
use crate::daemon::control::Control;

/// Written in so many rounds, a block is left for after the switch.
const HOT_ROUNDS: u8 = 2;
/// How long something of the source's that failed is left alone.
const AGAIN: Duration = Duration::from_millis(500);
/// How long the copy of what was written last before an offer may take, while the guest waits; the source waits as long.
const COPY_TIME: Duration = Duration::from_secs(5);
/// How long at first, while guests wait for it.
const SOON: Duration = Duration::from_millis(5);

/// What goes into the driver.
pub(super) enum ToTarget {
    /// An input of the machine.
    Input(TargetInput),
    /// The peer asks where it stands.
    Ask,
    /// The overlays lie on what that task was to see to.
    Attached(Rc<Cell<bool>>),
    /// The job that fills an overlay has ended.
    JobEnded,
    /// What was written last before the offer of that term is here, too, or why not.
    Copied(Term, IoResult<()>),
}

/// Of a copy that is to be whole before the disks change hands: how far it is.
#[derive(Default)]
struct Whole {
    /// The last round was read to its end in this life of the daemon, and nothing but `residual` was made absent since.
    read: bool,
    /// For each disk, what the last demotion has made absent.
    residual: Option<Vec<BlockSet>>,
    /// The term whose residual is being copied, until it is told to stop.
    copying: Option<(Term, Rc<Cell<bool>>)>,
    /// The term whose residual is here.
    copied: Option<Term>,
}

struct TargetDisk {
    id: DiskId,
    bytes: u64,
    gate: DiskGate,
    local: LocalDisk,
    /// In how many rounds a block was written.
    hot: HashMap<u64, u8>,
}

struct TargetDriver {
    control: Rc<Control>,
    machine: Target,
    local: Local,
    disks: Vec<TargetDisk>,
    link: Rc<std::cell::RefCell<Rc<Link>>>,
    inbox: Rc<Inbox<ToTarget>>,
    told: Rc<Told>,
    deferred: VecDeque<TargetInput>,
    /// The round that is being read, until it is told to stop.
    reading: Option<Rc<Cell<bool>>>,
    /// What goes before the disks change hands, where all does.
    whole: Whole,
    /// Whether the overlays lie on what the disks' owner needs.
    attached: bool,
    /// The task that sees to it, until it is told to stop.
    attaching: Option<Rc<Cell<bool>>>,
    asked_at: Duration,
    /// Since when everything is here.
    filled_at: Option<Duration>,
}

/// A message of a migration that is not known here: the first one is `Prepare`.
pub(super) async fn prepare(control: &Rc<Control>, link: &Rc<Link>, message: Message) {
    let migration = message.migration;
    let _turn = control.migrations.beginning.exclusive(0, 1).await;
    if let Some(Driver::Target { inbox, .. }) = control.migrations.driver(migration, Side::Target) {
        return inbox.push(ToTarget::Input(TargetInput::Message(message)));
    }
    let Body::Prepare { disks, block_bytes, whole, way_back } = message.body else {
        return tracing::debug!("a message of migration {migration}, which is not known here");
    };
    let data = link.data();
    let peer = data.clone().unwrap_or_default();
    let plan = Plan { migration, disks, block_bytes, peer, witness: None, whole, way_back };
    if let Err(error) = begin(control, link, plan, data).await {
        tracing::warn!("migration {migration} is refused: {error:#}");
        link.say(&Frame::Refused { migration, why: format!("{error:#}") });
    }
}

async fn begin(control: &Rc<Control>, link: &Rc<Link>, plan: Plan, data: Option<String>) -> Result<()> {
    plan.check()?;
    let peers = control.migrations.peers().context("this daemon takes no disks")?;
    let directory = peers.directory.clone().context(
        "this daemon takes no disks: it was started without a directory for their images (--migration …,directory=DIR)",
    )?;
    let data = data.context("the source does not say where its exports are")?;
    let ids: Vec<DiskId> = plan.disks.iter().map(|disk| disk.id).collect();
    control.check_disks_free(plan.migration, &ids)?;
    let mut disks = Vec::new();
    for disk in &plan.disks {
        let name = disk.id.to_string();
        if let Some((export, _)) = control.export_of(&name) {
            bail!("a disk {name} is exported here already (export '{export}')");
        }
        if let Some(latest) = control.migrations.latest(disk.id) {
            let of = latest.record.plan().disks.iter().find(|other| other.id == disk.id);
            let seen = of.map_or(Epoch(0), |of| latest.record.epoch(of));
            if seen > disk.epoch_before {
                bail!(
                    "disk {name} comes in epoch {}, and was seen here in epoch {}: the source is not its owner",
                    disk.epoch_before.0,
                    seen.0
                );
            }
        }
        let short = &plan.migration.to_string()[..8];
        let path = directory.join(format!("{name}-{short}.qcow2"));
        disks.push(LocalDisk {
            export: format!("disk-{name}"),
            node: node_name('d', disk.id),
            path,
            kind: ImageKind::Qcow2,
        });
    }
    let local = Local {
        post_copy: false,
        auto_switch: false,
        data: Some(data),
        tls_hostname: None,
        warm_seconds: None,
        warm_bytes: None,
        disks,
    };
    let mut made = Vec::new();
    let begun = prepare_disks(control, &plan, &local, &mut made).await;
    let begun = match begun {
        Ok(()) => Target::prepare(plan.clone()).map_err(anyhow::Error::new),
        Err(error) => Err(error),
    };
    let (machine, actions) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            for (disk, local) in
                plan.disks.iter().zip(&local.disks).filter(|(_, local)| made.contains(&local.path))
            {
                drop_disk(control, disk.id, local).await;
            }
            return Err(error);
        }
    };
    let mut driver = TargetDriver::new(control, link.clone(), machine, local)?;
    driver.attached = true;
    driver.enter();
    driver.carry_out(actions).await;
    rt::spawn(driver.run());
    Ok(())
}

/// Goes on with a migration that an earlier daemon was in.
pub(super) fn restart(control: &Rc<Control>, kept: Kept) -> Result<()> {
    let (machine, actions) = Target::restart(kept.record)?;
    let mut driver = TargetDriver::new(control, Rc::default(), machine, kept.local)?;
    driver.enter();
    rt::spawn(async move {
        driver.carry_out(actions).await;
        driver.attach();
        driver.run().await;
    });
    Ok(())
}

impl TargetDriver {
    fn new(control: &Rc<Control>, link: Rc<Link>, machine: Target, local: Local) -> Result<TargetDriver> {
        let plan = machine.record().plan();
        let disks = plan.disks.iter().zip(&local.disks).map(|(disk, local)| {
            let gate = control.migrations.gate(&disk.id.to_string());
            let gate = gate.context("a disk's name is no UUID")?;
            Ok(TargetDisk { id: disk.id, bytes: disk.bytes, gate, local: local.clone(), hot: HashMap::new() })
        });
        let disks = disks.collect::<Result<Vec<_>>>()?;
        Ok(TargetDriver {
            control: control.clone(),
            machine,
            local,
            disks,
            link: Rc::new(std::cell::RefCell::new(link)),
            inbox: Inbox::new(),
            told: Rc::default(),
            deferred: VecDeque::new(),
            reading: None,
            whole: Whole::default(),
            attached: false,
            attaching: None,
            asked_at: rt::now(),
            filled_at: None,
        })
    }

    fn migration(&self) -> MigrationId {
        self.machine.record().plan().migration
    }

    fn state(&self) -> TargetState {
        match self.machine.record().state() {
            RecordState::Target(state) => state,
            RecordState::Source(_) => TargetState::Superseded,
        }
    }

    /// From here on messages reach it.
    fn enter(&self) {
        let key = super::key(self.migration(), Side::Target);
        let handle =
            Driver::Target { inbox: self.inbox.clone(), told: self.told.clone(), link: self.link.clone() };
        self.control.migrations.drivers.borrow_mut().insert(key, handle);
    }

    async fn run(mut self) {
        for disk in &self.disks {
            rt::spawn(watch_gate(disk.gate.clone(), self.inbox.clone()));
        }
        let mut said_at = rt::now();
        loop {
            let done = matches!(
                self.state(),
                TargetState::Local | TargetState::Aborted | TargetState::GaveBack | TargetState::Superseded
            );
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
                self.stop_reading();
                return self.link.borrow().close();
            }
            match item {
                Some(ToTarget::Copied(term, outcome)) => self.copied(term, outcome).await,
                // It is said again.
                Some(ToTarget::Input(TargetInput::Message(message))) if self.is_early(&message) => {}
                Some(ToTarget::Input(input)) => {
                    match &input {
                        TargetInput::Message(Message { term, body: Body::Offer { .. }, .. }) => {
                            self.expect_base(*term);
                        }
                        TargetInput::RoundRead(_) => (self.reading, self.whole.read) = (None, true),
                        _ => {}
                    }
                    self.step(input).await
                }
                Some(ToTarget::Ask) => {
                    if let Some(standing) = self.machine.standing() {
                        self.say(&Frame::Standing { migration: self.migration(), standing });
                    }
                }
                Some(ToTarget::Attached(task)) => {
                    if self.attaching.take_if(|now| Rc::ptr_eq(now, &task)).is_some() {
                        self.attached = true;
                        self.follow().await;
                        self.fill().await;
                    }
                }
                Some(ToTarget::JobEnded) => self.fill().await,
                None => {
                    self.step(TargetInput::Resend).await;
                    // What was there already when the peer was still being asked was not heard of by the machine.
                    self.fill().await;
                }
            }
            if matches!(self.state(), TargetState::GivingBack | TargetState::Superseded) {
                // What lies there is the source's to change.
                for disk in &self.disks {
                    end_job(&self.control, disk.id).await;
                }
            }
            if self.machine.asks_peer()
                && rt::now() - self.asked_at > self.control.migrations.reconnect_time()
            {
                self.step(TargetInput::PeerSilent).await;
            }
        }
    }

    /// Whether a message wants blocks demoted of overlays that are not open yet.
    fn is_early(&self, message: &Message) -> bool {
        !self.attached && matches!(message.body, Body::Round { .. } | Body::Offer { .. })
    }

    fn say(&self, frame: &Frame) {
        self.link.borrow().say(frame);
    }

    fn tell_error(&self, why: &str) {
        tracing::warn!("migration {}: {why}", self.migration());
        self.told.error.replace(Some(why.to_owned()));
    }

    fn stop_reading(&mut self) {
        if let Some(reading) = self.reading.take() {
            reading.set(true);
        }
    }

    /// Keeps a record. A disk that is an ordinary one from then on is kept as one before that.
    async fn keep(&self, record: infill_migrate::Record) -> Result<()> {
        if record.state() == RecordState::Target(TargetState::Local) {
            for disk in &self.disks {
                self.control
                    .keep_disk(
                        &disk.local.node,
                        overlay_description(&disk.local, None),
                        &disk.local.export,
                        export_description(disk.id, &disk.local),
                    )
                    .await?;
            }
        }
        self.control.keep_migration(Kept { record, local: self.local.clone() }).await
    }

    /// Makes stale blocks absent, durably.
    async fn demote(&mut self, demotion: &Demotion) -> IoResult<()> {
        self.stop_reading();
        self.stop_copying();
        let sets = demotion.sets().map(<[BlockSet]>::to_vec);
        self.whole.read &= sets.is_some();
        (self.whole.residual, self.whole.copied) = (sets, None);
        let block_bytes = u64::from(self.machine.record().plan().block_bytes);
        for (index, disk) in self.disks.iter_mut().enumerate() {
            let gone = |error: anyhow::Error| IoError::new(ErrorKind::NotFound, format!("{error:#}"));
            let node = self.control.blockdevs().get(&disk.local.node).map_err(gone)?;
            if let Some(slot) = node.backing() {
                slot.raise().await;
            }
            match demotion.sets().and_then(|sets| sets.get(index)) {
                Some(set) => {
                    for run in set.runs() {
                        let (from, to) = (run.start * block_bytes, (run.end * block_bytes).min(disk.bytes));
                        node.forget(&Ctx::GUEST, from, to.saturating_sub(from)).await?;
                    }
                    for block in set.iter() {
                        let rounds = disk.hot.entry(block).or_insert(0);
                        *rounds = rounds.saturating_add(1);
                    }
                }
                None => {
                    disk.hot.clear();
                    node.forget(&Ctx::GUEST, 0, disk.bytes).await?;
                }
            }
            node.sync(&Ctx::GUEST).await?;
        }
        Ok(())
    }

    /// Copies what is absent, beside everything else, but for what is written again and again.
    fn read_round(&mut self, round: Round) {
        self.stop_reading();
        let stop = Rc::new(Cell::new(false));
        self.reading = Some(stop.clone());
        self.whole.read = false;
        let whole = self.machine.record().plan().whole;
        let block_bytes = u64::from(self.machine.record().plan().block_bytes);
        let mut disks = Vec::new();
        for disk in &self.disks {
            let mut hot = BlockSet::empty(disk.bytes.div_ceil(block_bytes));
            disk.hot
                .iter()
                .filter(|(_, rounds)| **rounds >= HOT_ROUNDS && !whole)
                .for_each(|(block, _)| hot.insert(*block));
            disks.push((disk.local.node.clone(), hot));
        }
        let (control, inbox) = (self.control.clone(), self.inbox.clone());
        rt::spawn(async move {
            for (name, hot) in disks {
                while !stop.get() {
                    let Ok(node) = control.blockdevs().get(&name) else {
                        // After a restart the overlays are opened beside this.
                        rt::sleep(AGAIN).await;
                        continue;
                    };
                    match copy_absent(&node, &hot, block_bytes, &stop).await {
                        Ok(()) => break,
                        Err(error) => {
                            tracing::info!(%error, "the warming of a disk is interrupted");
                            rt::sleep(AGAIN).await;
                        }
                    }
                }
            }
            if !stop.get() {
                inbox.push(ToTarget::Input(TargetInput::RoundRead(round)));
            }
        });
    }

    fn stop_copying(&mut self) {
        if let Some((_, stop)) = self.whole.copying.take() {
            stop.set(true);
        }
    }

    /// Whether an offer may be answered with *accepted*: where everything is to be here before, what was written last is
    /// copied first, from what the source has frozen. Until then it is as if the answer were lost, and a source that
    /// waits too long goes on by itself.
    fn may_accept(&mut self, term: Term) -> bool {
        if !self.machine.record().plan().whole || self.whole.copied == Some(term) {
            return true;
        }
        if self.whole.copying.as_ref().is_some_and(|(of, _)| *of == term) {
            return false;
        }
        let (Some(residual), true) = (self.whole.residual.clone(), self.whole.read) else {
            self.tell_error(
                "it is not known what is missing here: the disks change hands after another round",
            );
            return false;
        };
        self.stop_copying();
        let stop = Rc::new(Cell::new(false));
        self.whole.copying = Some((term, stop.clone()));
        let record = self.machine.record().clone();
        let block_bytes = u64::from(record.plan().block_bytes);
        let disks: Vec<(DiskId, String, Epoch, BlockSet)> = self
            .disks
            .iter()
            .zip(&record.plan().disks)
            .zip(residual)
            .map(|((disk, planned), set)| (disk.id, disk.local.node.clone(), record.epoch(planned), set))
            .collect();
        let (control, inbox) = (self.control.clone(), self.inbox.clone());
        let data = self.local.data.clone().unwrap_or_default();
        rt::spawn(async move {
            let copying = async {
                for (id, name, epoch, set) in disks {
                    let gone = |error: anyhow::Error| IoError::new(ErrorKind::NotFound, format!("{error:#}"));
                    let uri = control.source_uri(&data, &base_name(id, epoch)).map_err(gone)?;
                    let below = open_source(&control, &uri, node_name('b', id), None).await.map_err(gone)?;
                    let base = control.blockdevs().get(&below).map_err(gone)?;
                    let overlay = control.blockdevs().get(&name).map_err(gone)?;
                    copy_blocks(&overlay, &base, &set, block_bytes, &stop).await?;
                    overlay.sync(&Ctx::GUEST).await?;
                }
                Ok(())
            };
            let late = || Err(IoError::new(ErrorKind::TimedOut, "it takes too long"));
            let outcome = rt::timeout(COPY_TIME, copying).await.unwrap_or_else(late);
            if !stop.get() {
                inbox.push(ToTarget::Copied(term, outcome));
            }
        });
        false
    }

    /// The end of what [`TargetDriver::may_accept`] has begun.
    async fn copied(&mut self, term: Term, outcome: IoResult<()>) {
        if self.whole.copying.take_if(|(of, _)| *of == term).is_none() {
            return;
        }
        match outcome {
            Ok(()) => {
                self.whole.copied = Some(term);
                self.step(TargetInput::Resend).await;
            }
            // The next time that it would be said, it is tried again.
            Err(error) => self.tell_error(&format!("what was written last does not come over: {error}")),
        }
    }

    /// Connects to what is offered beside everything else, so that it is there when the disks change hands.
    fn expect_base(&self, term: Term) {
        if self.machine.record().plan().whole {
            // That is read before, and opened for it.
            return;
        }
        let Some(data) = self.local.data.clone() else { return };
        for disk in &self.machine.record().plan().disks {
            let (control, data, id, bytes) = (self.control.clone(), data.clone(), disk.id, disk.bytes);
            let epoch = Epoch(disk.epoch_before.0.saturating_add(term.0));
            rt::spawn(async move {
                let opened = match control.source_uri(&data, &base_name(id, epoch)) {
                    Ok(uri) => open_source(&control, &uri, node_name('b', id), Some(bytes)).await.map(drop),
                    Err(error) => Err(error),
                };
                // It is tried again when it is needed.
                if let Err(error) = opened {
                    tracing::debug!("disk {id}: {error:#}");
                }
            });
        }
    }

    /// Has the overlays lie on what the source has frozen; until then the gates hold.
    fn attach(&mut self) {
        let state = self.state();
        let owns = matches!(state, TargetState::Owner | TargetState::Complete);
        if self.attaching.is_some()
            || self.attached
            || !(owns || matches!(state, TargetState::Prepared | TargetState::Accepted))
        {
            return;
        }
        let stop = Rc::new(Cell::new(false));
        self.attaching = Some(stop.clone());
        let data = self.local.data.clone().unwrap_or_default();
        let record = self.machine.record().clone();
        let disks: Vec<(Disk, LocalDisk, DiskGate)> = self
            .disks
            .iter()
            .zip(&record.plan().disks)
            .map(|(disk, planned)| (planned.clone(), disk.local.clone(), disk.gate.clone()))
            .collect();
        let (control, inbox, told) = (self.control.clone(), self.inbox.clone(), self.told.clone());
        rt::spawn(async move {
            for (disk, local, gate) in disks {
                let id = disk.id;
                let export = if owns { base_name(id, record.epoch(&disk)) } else { live_name(id) };
                let below = Below { data: &data, export: &export, is_base: owns, bytes: disk.bytes };
                let mut pause = SOON;
                while let Err(error) = lay_on(&control, id, &local, &gate, &below).await {
                    if stop.get() {
                        return;
                    }
                    let why = format!("the source's export {export}: {error:#}");
                    if told.error.replace(Some(why.clone())).as_ref() != Some(&why) {
                        tracing::warn!("disk {id}: {why}");
                    }
                    rt::sleep(pause).await;
                    pause = (2 * pause).min(AGAIN);
                }
            }
            told.error.replace(None);
            inbox.push(ToTarget::Attached(stop));
        });
    }

    /// What is missing comes by a stream of each overlay; when none is missing any more, the machine is told.
    async fn fill(&mut self) {
        if self.state() != TargetState::Owner
            || !self.attached
            || self.machine.asks_peer()
            || self.machine.busy()
        {
            return;
        }
        let mut overlays = Vec::new();
        let mut missing = false;
        for disk in &self.disks {
            let Ok(node) = self.control.blockdevs().get(&disk.local.node) else { return };
            if node.backing().is_some_and(|slot| slot.is_some()) {
                missing = true;
                self.stream(disk, &node).await;
            }
            overlays.push((node, disk.bytes));
        }
        if missing {
            return;
        }
        self.told.missing_bytes.set(0);
        for disk in &self.disks {
            if let Err(error) = close_source(&self.control, disk.id).await {
                tracing::warn!("migration {}: {error:#}", self.migration());
            }
        }
        if self.keeps_way_back() {
            return;
        }
        let Some(ownership) = self.machine.ownership() else { return };
        // Nothing lies below the overlays any more, by their own headers: no block is at the source.
        let block_bytes = u64::from(self.machine.record().plan().block_bytes);
        let maps: Vec<BlockMap> = overlays
            .iter()
            .map(|(_, bytes)| {
                let mut all = BlockSet::empty(bytes.div_ceil(block_bytes));
                all.insert_range(0..all.blocks());
                BlockMap::rebuild(&all, Some(&ownership))
            })
            .collect();
        let Some(filling) = Filling::of(&maps) else { return };
        let mut synced = Ok(());
        for (node, _) in &overlays {
            synced = synced.and(node.sync(&Ctx::GUEST).await);
        }
        if let Some(filled) = filling.settled(synced) {
            self.step(TargetInput::Filled(filled)).await;
        }
    }

    /// Whether the source is not told yet that everything is here: a machine that fails to start has its disks back only
    /// until then, so a guest's first write is waited for, for a while.
    fn keeps_way_back(&mut self) -> bool {
        let since = *self.filled_at.get_or_insert_with(rt::now);
        let record = self.machine.record();
        let patience = Duration::from_secs(record.plan().way_back.into());
        !record.let_through() && rt::now() - since < patience
    }

    /// Begins to fill an overlay, if nobody does.
    async fn stream(&self, disk: &TargetDisk, node: &NodeHandle) {
        let job_id = job_of(disk.id);
        if self.control.jobs().get(&job_id).is_ok() {
            return;
        }
        let record = self.machine.record();
        let planned = record.plan().disks.iter().find(|planned| planned.id == disk.id);
        if let (Some(planned), Some(data)) = (planned, &self.local.data) {
            let export = base_name(disk.id, record.epoch(planned));
            if let Err(error) = tidy_up(&self.control, data, disk.id, &disk.local, &export).await {
                tracing::warn!("disk {}: {error:#}", disk.id);
            }
        }
        if let Some(slot) = node.backing() {
            slot.set_copy_on_read(Some(CopyOnRead::new(node, COPY_ON_READ_BYTES_MAX)));
        }
        let begun = self
            .control
            .begin_stream(BlockStream {
                job_id,
                device: disk.local.node.clone(),
                end: StreamEnd::All,
                backing_file: None,
                backing_mask_protocol: false,
                speed: 0,
                on_error: OnError::Stop,
                min_rate: None,
                finish_by: None,
                auto_finalize: true,
                auto_dismiss: true,
            })
            .await;
        if let Err(error) = begun {
            let why = format!("the disk's data does not follow: {}", error.desc);
            if self.told.error.borrow().as_ref() != Some(&why) {
                self.tell_error(&why);
            }
        }
        let (control, inbox, told) = (self.control.clone(), self.inbox.clone(), self.told.clone());
        let id = disk.id;
        rt::spawn(async move {
            watch_fill(&control, id, &told).await;
            inbox.push(ToTarget::JobEnded);
        });
    }
}

impl Drive for TargetDriver {
    type Input = TargetInput;
    type Action = TargetAction;

    fn give(&mut self, input: TargetInput) -> std::result::Result<Vec<TargetAction>, Busy<TargetInput>> {
        self.machine.handle(input)
    }

    fn is_busy(&self) -> bool {
        self.machine.busy()
    }

    fn deferred(&mut self) -> &mut VecDeque<TargetInput> {
        &mut self.deferred
    }

    /// The gates follow the machine; what it owns is served once the overlays lie on what was frozen.
    async fn follow(&mut self) {
        let mut gate = self.machine.gate();
        // A disk that is an ordinary one again is made by the daemon's state.
        if gate.runs() && !self.attached && self.state() != TargetState::Local {
            gate = Gate::Hold;
        }
        let (owner, migration) = (self.machine.record().plan().peer.clone(), self.migration());
        let decided = |disk: &&TargetDisk| self.control.migrations.decides(disk.id, migration, Side::Target);
        let peers = self.control.migrations.peers();
        let may_fail =
            self.state() == TargetState::Owner && peers.is_some_and(|peers| peers.on_hold != OnHold::Hold);
        let is_away =
            matches!(self.state(), TargetState::GivingBack | TargetState::GaveBack | TargetState::Superseded);
        for disk in self.disks.iter().filter(decided) {
            disk.gate.let_misses_fail(may_fail);
            disk.gate.set(gate, &owner);
            self.control.deny_clients(&disk.id.to_string(), is_away.then(|| owned_by(&owner)));
        }
        if self.machine.reading().is_none() {
            self.stop_reading();
        }
        let phase = match (self.attached, self.machine.asks_peer(), self.reading.is_some()) {
            (_, true, _) => "asks its peer",
            (false, ..) => "waits for the source's export",
            (_, _, true) => "copies",
            _ if self.state() == TargetState::Owner && self.filled_at.is_some() => {
                "waits for a guest's write"
            }
            _ => "settled",
        };
        phase.clone_into(&mut self.told.phase.borrow_mut());
        self.told.rounds.set(self.machine.reading().map_or(self.told.rounds.get(), |round| round.0));
    }

    async fn perform(&mut self, action: TargetAction) -> Option<TargetInput> {
        let point = Point::of_target(&action);
        point.before();
        let end = self.execute(action).await;
        point.after();
        end
    }
}

impl TargetDriver {
    /// What the machine wants done; its end, where it is awaited.
    async fn execute(&mut self, action: TargetAction) -> Option<TargetInput> {
        match action {
            TargetAction::Persist(pending) => {
                let record = pending.record().clone();
                let outcome = self.keep(record).await;
                let outcome = outcome.map_err(|error| IoError::new(ErrorKind::Io, format!("{error:#}")));
                return Some(TargetInput::Settled(pending.settled(outcome)));
            }
            TargetAction::Demote(demotion) => {
                let outcome = self.demote(&demotion).await;
                return Some(TargetInput::Demoted(demotion.settled(outcome)));
            }
            TargetAction::Send(message) => {
                let message = message.into_message();
                if message.body != Body::Accepted || self.may_accept(message.term) {
                    self.say(&Frame::Message(message));
                }
            }
            TargetAction::ReadRound(round) => self.read_round(round),
            TargetAction::Own => {
                self.attached = false;
                // It may wait for a live export, which there is none of any more.
                if let Some(attaching) = self.attaching.take() {
                    attaching.set(true);
                }
                self.follow().await;
                self.attach();
            }
            TargetAction::AskPeer => self.say(&Frame::Ask(self.migration())),
            // There is no witness: it is never asked for.
            TargetAction::Swap(_) | TargetAction::AskWitness => {}
            TargetAction::DropOverlay => {
                for disk in &self.disks {
                    drop_disk(&self.control, disk.id, &disk.local).await;
                }
            }
            TargetAction::Refuse(why) => self.tell_error(why),
            TargetAction::Fail(why) => self.tell_error(&format!("{why}; the disk is held until a restart")),
        }
        None
    }
}

/// Tells the driver of a first write that waits at a gate.
async fn watch_gate(gate: DiskGate, inbox: Rc<Inbox<ToTarget>>) {
    while Rc::strong_count(&inbox) > 1 {
        let asking = gate.asking();
        if gate.asked().guest_writes {
            inbox.push(ToTarget::Input(TargetInput::GuestWrites));
        }
        rt::timeout(RESEND_TIME_DONE, asking).await;
    }
}
