//! Disks that change hosts: the two machines of `infill-migrate`, driven over the daemon's nodes, exports and state.
//!
//! * [`gate`]: what a guest's requests meet, before every export that is named by a UUID.
//! * [`link`]: what the daemons say to each other.
//! * [`source`], [`target`]: the drivers, one task for each migration and side, on the control reactor.
//!
//! A driver does what its machine says in this order: exports that the peer is no longer to read are closed, the gate
//! follows, new exports are opened, and then the actions are carried out. What never happens: a gate that opens before the
//! record that lets it is on stable storage (the machine cannot be told otherwise), or a disk that a record names and that is
//! served without its gate: gates are there, and hold, before a state's entries are made again.

mod crash;
mod fence;
mod gate;
mod kept;
mod link;
mod missed;
mod options;
mod overlay;
mod query;
mod secure;
mod source;
mod target;
mod warm;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use event_listener::Event;
use infill_base::{ErrorKind, IoResult};
use infill_io::{Accepted, Address, Listener};
use infill_migrate::{
    Busy, DiskId, Epoch, Frame, Gate, Message, MigrationId, Side, State as RecordState, WIRE_VERSION,
};
use infill_nbd::{Exports, Server, ServerLimits, UriTls};
use infill_node::Edge;
use infill_qmp::QmpError;
use infill_qmp::migration::MigrationCommand;
use infill_storage::{RangeLock, rt};
use serde_json::{Value, json};

use super::control::{Control, refused};
use crate::blockdev::uri_of;
use crate::listen::Listening;
use gate::DiskGate;
use kept::{Kept, Local, LocalDisk};
use link::Link;
use missed::OnHold;
pub use options::Options;
use options::address;
use secure::PeerTls;
use source::ToSource;
use target::ToTarget;

/// How often what is not answered is said again.
const RESEND_TIME: Duration = Duration::from_millis(500);
/// How often it is said again by a side that is done.
const RESEND_TIME_DONE: Duration = Duration::from_secs(10);
/// Migrations that are under way at a time, of both sides.
const MIGRATIONS_MAX: usize = 1024;
/// Peers that are connected at a time.
const PEERS_MAX: u64 = 256;

/// What this daemon offers other daemons.
struct Peers {
    /// Where [`Peers::exports`] are, as peers are told.
    data: String,
    directory: Option<PathBuf>,
    /// How long a side that has restarted asks its peer before it goes on without an answer.
    reconnect_time: Duration,
    exports: Exports,
    tls: Option<PeerTls>,
    on_hold: OnHold,
    hold_time: Duration,
    listener: RefCell<Option<Listener>>,
    _listening: Listening,
}

/// What goes into a driver, in order.
struct Inbox<T> {
    items: RefCell<VecDeque<T>>,
    came: Event,
}

impl<T> Inbox<T> {
    fn new() -> Rc<Inbox<T>> {
        Rc::new(Inbox { items: RefCell::default(), came: Event::new() })
    }

    fn push(&self, item: T) {
        self.items.borrow_mut().push_back(item);
        self.came.notify(usize::MAX);
    }

    /// The next item, if one comes within `patience`.
    async fn next(&self, patience: Duration) -> Option<T> {
        let came = self.came.listen();
        if let Some(item) = self.items.borrow_mut().pop_front() {
            return Some(item);
        }
        rt::timeout(patience, came).await;
        self.items.borrow_mut().pop_front()
    }
}

/// Where a driver stands, for those who ask.
#[derive(Default)]
struct Told {
    phase: RefCell<String>,
    error: RefCell<Option<String>>,
    missing_bytes: Cell<u64>,
    rounds: Cell<u8>,
}

/// What drives the machine of one side.
trait Drive {
    /// What the machine is told.
    type Input;
    /// What it wants done.
    type Action;

    /// Gives the machine an input.
    fn give(&mut self, input: Self::Input) -> std::result::Result<Vec<Self::Action>, Busy<Self::Input>>;

    /// Whether the machine waits for the end of an operation.
    fn is_busy(&self) -> bool;

    /// Inputs that wait for that, too.
    fn deferred(&mut self) -> &mut VecDeque<Self::Input>;

    /// Has gates and exports be as the machine says.
    async fn follow(&mut self);

    /// Carries an action out; gives its end, where that is awaited.
    async fn perform(&mut self, action: Self::Action) -> Option<Self::Input>;

    /// Gives the machine an input, and then what had to wait.
    async fn step(&mut self, input: Self::Input) {
        match self.give(input) {
            Ok(actions) => self.carry_out(actions).await,
            Err(Busy(input)) => self.deferred().push_back(input),
        }
        while !self.is_busy()
            && let Some(input) = self.deferred().pop_front()
        {
            match self.give(input) {
                Ok(actions) => self.carry_out(actions).await,
                Err(Busy(input)) => self.deferred().push_front(input),
            }
        }
    }

    /// Carries actions out, in order, and what follows from the ends of those that are awaited.
    async fn carry_out(&mut self, actions: Vec<Self::Action>) {
        let mut waiting = VecDeque::from(actions);
        self.follow().await;
        while let Some(action) = waiting.pop_front() {
            let Some(end) = self.perform(action).await else { continue };
            match self.give(end) {
                Ok(actions) => {
                    self.follow().await;
                    waiting.extend(actions);
                }
                Err(Busy(input)) => self.deferred().push_back(input),
            }
        }
        self.follow().await;
    }
}

/// A driver that runs.
#[derive(Clone)]
enum Driver {
    Source { inbox: Rc<Inbox<ToSource>>, told: Rc<Told>, link: Rc<Link> },
    Target { inbox: Rc<Inbox<ToTarget>>, told: Rc<Told>, link: Rc<RefCell<Rc<Link>>> },
}

fn key(migration: MigrationId, side: Side) -> String {
    format!("{migration} {}", side_word(side))
}

const fn side_word(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Target => "target",
    }
}

/// The word of a state, as records spell it.
fn state_word(state: RecordState) -> String {
    let word = match state {
        RecordState::Source(state) => serde_json::to_value(state),
        RecordState::Target(state) => serde_json::to_value(state),
    };
    word.ok().and_then(|word| word.as_str().map(str::to_owned)).unwrap_or_default()
}

/// All migrations of a daemon.
#[derive(Default)]
pub struct Migrations {
    peers: RefCell<Option<Rc<Peers>>>,
    /// By the name of the export.
    gates: RefCell<BTreeMap<String, DiskGate>>,
    kept: RefCell<BTreeMap<String, Kept>>,
    drivers: RefCell<BTreeMap<String, Driver>>,
    /// One migration begins at a time.
    beginning: RangeLock,
}

impl Migrations {
    fn peers(&self) -> Option<Rc<Peers>> {
        self.peers.borrow().clone()
    }

    fn reconnect_time(&self) -> Duration {
        self.peers.borrow().as_ref().map_or(options::RECONNECT_TIME, |peers| peers.reconnect_time)
    }

    fn driver(&self, migration: MigrationId, side: Side) -> Option<Driver> {
        self.drivers.borrow().get(&key(migration, side)).cloned()
    }

    /// The record that says who owns a disk now, as far as is known here: the one of the highest epoch, and of two of the same
    /// epoch the one that is not over (of two that are over, both say the same of the disk).
    fn latest(&self, disk: DiskId) -> Option<Kept> {
        let kept = self.kept.borrow();
        let rank = |kept: &&Kept| {
            let of = kept.record.plan().disks.iter().find(|other| other.id == disk);
            let epoch = of.map_or(Epoch(0), |of| kept.record.epoch(of));
            (epoch, !kept.is_over())
        };
        let names = |kept: &&Kept| kept.record.plan().disks.iter().any(|other| other.id == disk);
        kept.values().filter(names).max_by_key(rank).cloned()
    }

    /// Whether that side of a migration is the one that says what a disk's guest meets: an earlier migration of the disk goes
    /// on to answer its peer, and has no say any more.
    fn decides(&self, disk: DiskId, migration: MigrationId, side: Side) -> bool {
        self.latest(disk)
            .is_none_or(|latest| latest.record.plan().migration == migration && latest.record.side() == side)
    }

    /// The gate of the export of that name, if it is one whose disk can change hands.
    fn gate(&self, export: &str) -> Option<DiskGate> {
        export.parse::<DiskId>().ok()?;
        let mut gates = self.gates.borrow_mut();
        Some(gates.entry(export.to_owned()).or_insert_with(|| DiskGate::new(Gate::Run)).clone())
    }

    /// What an export of that name offers of `edge`: the disk behind its gate, where the daemon takes part in migrations.
    pub fn before(&self, export: &str, edge: &Edge) -> Edge {
        let takes_part = self.peers.borrow().is_some() || !self.kept.borrow().is_empty();
        match self.gate(export).filter(|_| takes_part) {
            Some(gate) => Edge::new(gate.before(edge.clone())),
            None => edge.clone(),
        }
    }

    /// Whether a disk of that name has ever changed hosts, or was about to.
    pub fn names(&self, export: &str) -> bool {
        export.parse().is_ok_and(|disk| self.latest(disk).is_some())
    }

    /// The migration that works on `node`, for a refusal.
    pub fn on_node(&self, node: &str) -> Option<String> {
        let kept = self.kept.borrow();
        let on = |kept: &&Kept| !kept.is_over() && kept.local.disks.iter().any(|disk| disk.node == node);
        kept.values().find(on).map(|kept| kept.record.plan().migration.to_string())
    }
}

impl Control {
    /// `--migration`: listens for other daemons; they are answered from [`Control::meet_peers`] on.
    pub fn listen_for_peers(&self, options: &Options) -> Result<()> {
        if self.state.is_none() {
            bail!("--migration needs --state DIR: who owns a disk has to outlive the daemon");
        }
        let bind = |address: &Address| {
            Listener::bind(address).map_err(|error| anyhow!("--migration {address}: {}", error.message()))
        };
        let tls = options.tls.as_deref().map(PeerTls::read).transpose();
        let tls = tls.map_err(|error| anyhow!("--migration …,tls-creds: {error:#}"))?;
        let data = bind(&options.data)?;
        // Listening at port 0 finds one.
        let told_tls =
            tls.as_ref().map(|_| UriTls { hostname: options.tls_hostname.clone(), ..UriTls::default() });
        let told = uri_of(options.reach.as_ref().unwrap_or(data.address()), "", told_tls);
        let exports = Exports::default();
        let limits = ServerLimits::default();
        let most = limits.connections_max;
        let server = Server::over(exports.clone(), limits, tls.as_ref().map(PeerTls::server));
        let peers = Peers {
            data: told,
            directory: options.directory.clone(),
            reconnect_time: options.reconnect_time,
            exports,
            tls,
            on_hold: options.on_hold,
            hold_time: options.hold_time,
            listener: RefCell::new(Some(bind(&options.listen)?)),
            _listening: Listening::start(data, server, self.reactors.clone(), most),
        };
        *self.migrations.peers.borrow_mut() = Some(Rc::new(peers));
        Ok(())
    }

    /// Reads what is known of migrations. From here on no disk of theirs is served without its gate.
    pub fn load_migrations(&self) -> Result<()> {
        let Some(state) = &self.state else { return Ok(()) };
        for (key, bytes) in state.migrations()? {
            let kept = Kept::decode(&bytes).with_context(|| format!("the record of migration {key}"))?;
            for disk in &kept.record.plan().disks {
                if let Some(gate) = self.migrations.gate(&disk.id.to_string()) {
                    gate.set(Gate::Hold, "");
                }
            }
            self.migrations.kept.borrow_mut().insert(key, kept);
        }
        if !self.migrations.kept.borrow().is_empty() && self.migrations.peers().is_none() {
            bail!("the state knows of disks that have changed hosts: --migration has to be given, as before");
        }
        Ok(())
    }

    /// Goes on with the migrations that were loaded.
    pub fn resume_migrations(self: &Rc<Self>) {
        let all: Vec<Kept> = self.migrations.kept.borrow().values().cloned().collect();
        for kept in all {
            let plan = kept.record.plan();
            let is_latest = plan.disks.iter().any(|disk| {
                self.migrations.latest(disk.id).is_some_and(|latest| latest.record == kept.record)
            });
            if !is_latest {
                continue;
            }
            let (migration, side) = (plan.migration, kept.record.side());
            let outcome = match side {
                Side::Source => source::restart(self, kept),
                Side::Target => target::restart(self, kept),
            };
            if let Err(error) = outcome {
                // Its gates hold.
                tracing::error!("migration {migration} ({}): {error:#}", side_word(side));
            }
        }
    }

    /// Begins to answer other daemons.
    pub fn meet_peers(self: &Rc<Self>) {
        let Some(peers) = self.migrations.peers() else { return };
        let Some(listener) = peers.listener.borrow_mut().take() else { return };
        rt::spawn(accept(self.clone(), peers, listener));
    }

    /// The URI of an export of the peer whose exports are at `data`.
    fn source_uri(&self, data: &str, export: &str) -> Result<String> {
        let peers = self.migrations.peers();
        secure::source_uri(peers.as_ref().and_then(|peers| peers.tls.as_ref()), data, export)
    }

    /// Other daemons read nothing any more: what they have in flight is answered.
    pub async fn leave_peers(&self) {
        let Some(peers) = self.migrations.peers() else { return };
        for removal in peers.exports.remove_all() {
            removal.gone().await;
        }
    }

    /// The record is on stable storage, and known here, when this returns.
    async fn keep_migration(&self, kept: Kept) -> Result<()> {
        let Some(state) = &self.state else { bail!("there is no --state to keep it in") };
        let (key, state_now) = (key(kept.record.plan().migration, kept.record.side()), kept.record.state());
        state.write_migration(key.clone(), kept.encode()?).await?;
        let before = self.migrations.kept.borrow_mut().insert(key, kept.clone());
        if before.is_none_or(|before| before.record.state() != state_now) {
            let told = json!({
                "migration": kept.record.plan().migration.to_string(),
                "side": side_word(kept.record.side()),
                "state": state_word(state_now),
                "term": kept.record.term().0,
            });
            self.tell("__INFILL_MIGRATION", told);
        }
        Ok(())
    }

    /// Disks that no other migration may name, and room for one more.
    fn check_disks_free(&self, migration: MigrationId, disks: &[DiskId]) -> Result<()> {
        let under_way = self.migrations.kept.borrow().values().filter(|kept| !kept.is_over()).count();
        if under_way >= MIGRATIONS_MAX {
            bail!("{MIGRATIONS_MAX} migrations are under way here: let some of them end");
        }
        for kept in self.migrations.kept.borrow().values() {
            let plan = kept.record.plan();
            let shared = plan.disks.iter().find(|disk| disks.contains(&disk.id));
            if let Some(disk) = shared.filter(|_| plan.migration != migration && !kept.is_over()) {
                bail!(
                    "disk {} is in migration {} already: let that end, or abort it",
                    disk.id,
                    plan.migration
                );
            }
        }
        Ok(())
    }

    /// A frame of a peer.
    fn hear(self: &Rc<Self>, link: &Rc<Link>, frame: Frame) {
        match frame {
            Frame::Message(message) => self.hear_message(link, message),
            Frame::Ask(migration) => {
                for side in [Side::Source, Side::Target] {
                    match self.migrations.driver(migration, side) {
                        Some(Driver::Source { inbox, .. }) => inbox.push(ToSource::Ask),
                        // The answer goes where the question came from: one who has restarted says nothing else first.
                        Some(Driver::Target { inbox, link: current, .. }) => {
                            current.replace(link.clone());
                            inbox.push(ToTarget::Ask);
                        }
                        None => {}
                    }
                }
            }
            Frame::Standing { migration, standing } => match standing.state {
                RecordState::Target(_) => {
                    if let Some(Driver::Source { inbox, .. }) =
                        self.migrations.driver(migration, Side::Source)
                    {
                        inbox.push(ToSource::Input(infill_migrate::SourceInput::Peer(standing)));
                    }
                }
                RecordState::Source(_) => {
                    if let Some(Driver::Target { inbox, .. }) =
                        self.migrations.driver(migration, Side::Target)
                    {
                        inbox.push(ToTarget::Input(infill_migrate::TargetInput::Peer(standing)));
                    }
                }
            },
            Frame::Refused { migration, why } => {
                if let Some(Driver::Source { inbox, .. }) = self.migrations.driver(migration, Side::Source) {
                    inbox.push(ToSource::Refused(why));
                }
            }
            Frame::Hello { .. } => {}
        }
    }

    /// A machine's message, from the side that the kind of connection says: a source dials, a target is dialled.
    fn hear_message(self: &Rc<Self>, link: &Rc<Link>, message: Message) {
        let migration = message.migration;
        // The one who hears it over a link of its own is the source.
        if let Some(Driver::Source { inbox, link: own, .. }) = self.migrations.driver(migration, Side::Source)
            && Rc::ptr_eq(&own, link)
        {
            return inbox.push(ToSource::Input(infill_migrate::SourceInput::Message(message)));
        }
        match self.migrations.driver(migration, Side::Target) {
            Some(Driver::Target { inbox, link: current, .. }) => {
                current.replace(link.clone());
                inbox.push(ToTarget::Input(infill_migrate::TargetInput::Message(message)));
            }
            _ => {
                let (control, link) = (self.clone(), link.clone());
                rt::spawn(async move { target::prepare(&control, &link, message).await });
            }
        }
    }

    /// Commands about disks that change hosts.
    pub(super) async fn migration_command(
        self: &Rc<Self>,
        command: MigrationCommand,
    ) -> Result<Value, QmpError> {
        let told = |error: anyhow::Error| refused(&error);
        match command {
            MigrationCommand::Migrate(migrate) => {
                let migration = source::begin(self, migrate).await.map_err(told)?;
                return Ok(json!({ "migration": migration.to_string() }));
            }
            MigrationCommand::Query => return Ok(self.query_migrations()),
            MigrationCommand::Switch(id) => self.tell_source_driver(&id, ToSource::Switch).map_err(told)?,
            MigrationCommand::Reclaim(id) => {
                tracing::warn!("migration {id}: an operator reclaims its disks");
                self.tell_source_driver(&id, ToSource::Input(infill_migrate::SourceInput::Reclaim))
                    .map_err(told)?;
            }
            MigrationCommand::Takeover(id) => {
                tracing::warn!("migration {id}: an operator takes its disks over");
                self.tell_target_driver(&id, ToTarget::Input(infill_migrate::TargetInput::Takeover))
                    .map_err(told)?;
            }
            MigrationCommand::Abort(id) => {
                let at_source =
                    self.tell_source_driver(&id, ToSource::Input(infill_migrate::SourceInput::Abort));
                if at_source.is_err() {
                    self.tell_target_driver(&id, ToTarget::Input(infill_migrate::TargetInput::Abort))
                        .map_err(told)?;
                }
            }
        }
        Ok(json!({}))
    }

    fn tell_source_driver(&self, id: &str, what: ToSource) -> Result<()> {
        let migration = id.parse::<MigrationId>().map_err(|why| anyhow!("migration: {why}"))?;
        match self.migrations.driver(migration, Side::Source) {
            Some(Driver::Source { inbox, told, .. }) => {
                told.error.replace(None);
                inbox.push(what);
                Ok(())
            }
            _ => bail!("no migration {id} leaves this daemon: `infill migrations` lists them"),
        }
    }

    fn tell_target_driver(&self, id: &str, what: ToTarget) -> Result<()> {
        let migration = id.parse::<MigrationId>().map_err(|why| anyhow!("migration: {why}"))?;
        match self.migrations.driver(migration, Side::Target) {
            Some(Driver::Target { inbox, told, .. }) => {
                told.error.replace(None);
                inbox.push(what);
                Ok(())
            }
            _ => bail!("no migration {id} comes to this daemon: `infill migrations` lists them"),
        }
    }
}

async fn accept(control: Rc<Control>, peers: Rc<Peers>, listener: Listener) {
    let slots = infill_storage::Permits::new(PEERS_MAX);
    loop {
        let slot = slots.take(1).await;
        let accepted = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "no peer could be accepted; trying again");
                rt::sleep(RESEND_TIME).await;
                continue;
            }
        };
        let (control, peers) = (control.clone(), peers.clone());
        rt::spawn(async move {
            match meet(&control, &peers, accepted).await {
                Ok(()) => {}
                // Somebody may wonder why.
                Err(error) if error.kind() == ErrorKind::NotPermitted => {
                    tracing::warn!(%error, "a migration's peer was not let in");
                }
                Err(error) => tracing::info!(%error, "a peer's connection ended"),
            }
            drop(slot);
        });
    }
}

/// Talks to a peer that has come, to the connection's end.
async fn meet(control: &Rc<Control>, peers: &Peers, accepted: Accepted) -> IoResult<()> {
    let mut connection = accepted.into_connection()?;
    if let Some(tls) = &peers.tls {
        connection = tls.accept(connection).await?;
    }
    let link = Rc::new(Link::default());
    link.talk(connection, hello(Some(peers.data.clone())), |frame| control.hear(&link, frame)).await
}

fn hello(data: Option<String>) -> Frame {
    Frame::Hello { version: WIRE_VERSION, data }
}

/// The name of the live image's export.
fn live_name(disk: DiskId) -> String {
    format!("{disk}.live")
}

/// The name of the frozen image's export in an epoch: a stale daemon finds none of that name.
fn base_name(disk: DiskId, epoch: Epoch) -> String {
    format!("{disk}.e{}.base", epoch.0)
}

/// A node's name out of a disk's: names of nodes are shorter than a UUID as it is written, so it is written with more digits.
fn node_name(prefix: char, disk: DiskId) -> String {
    const DIGITS: &[u8; 32] = b"0123456789abcdefghijklmnopqrstuv";
    let bits = disk.0.as_u128();
    let digits = (0..26).rev().map(|nth| char::from(DIGITS[(bits >> (5 * nth) & 31) as usize]));
    format!("{prefix}-{}", digits.collect::<String>())
}

fn sync_directory(path: &Path) -> std::io::Result<()> {
    match path.parent() {
        Some(parent) => std::fs::File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_exports_hold_the_epoch_and_fit_into_uris() {
        let disk: DiskId = "6f1c2f0e-4d8a-4a63-9d0b-5a4f0f7f7c11".parse().unwrap();
        let uri =
            secure::source_uri(None, "nbd+unix:///?socket=/run/d.sock", &base_name(disk, Epoch(43))).unwrap();
        assert_eq!(uri, format!("nbd+unix:///{disk}.e43.base?socket=/run/d.sock"));
        let uri = secure::source_uri(None, "nbd://b:1", &live_name(disk)).unwrap();
        assert_eq!(uri, format!("nbd://b:1/{disk}.live"));
        let name = node_name('d', disk);
        assert_eq!(name, "d-3f3gngsjca99hpq2qq9s7nuv0h");
        assert!(name.len() <= crate::blockdev::NODE_NAME_BYTES_MAX);
        // Names that differ in their last digit are names of two nodes.
        assert_ne!(node_name('d', DiskId(uuid::Uuid::from_u128(disk.0.as_u128() ^ 1))), name);
    }
}
