//! What commands do: the state of the daemon, on the control reactor alone.
//!
//! Commands of one monitor are carried out one after the other; those of several monitors beside each other. What must not
//! be seen half done is changed between two awaits, and the graph refuses what does not fit.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;

use event_listener::Event as Signal;
use futures_util::future::{Either, select};
use infill_io::{JournalDir, Reactor};
use infill_job::{Events, JobEvent, Jobs};
use infill_nbd::{SourceState, SourceWatch};
use infill_qmp::command::{Command, NAMES};
use infill_qmp::transaction::{Transaction, TransactionAction};
use infill_qmp::{BlockdevOptions, Members, QmpError, encode};
use infill_storage::{RangeLock, rt};
use serde_json::{Value, json};

use super::chardevs::Devices;
use super::corrupt::Corruptions;
use super::exports::Exported;
use super::groups::Groups;
use super::kept_bitmaps::KeptBitmaps;
use super::maps::Maps;
use super::migration::Migrations;
use super::monitor::Monitors;
use super::state::State;
use super::threshold::Thresholds;
use crate::blockdev::{Blockdevs, OpenPolicy};
use crate::one_line;

/// What the daemon has.
pub struct Control {
    blockdevs: Blockdevs,
    jobs: Jobs,
    job_events: Events,
    pub(super) exported: Exported,
    pub(super) reactors: Vec<Reactor>,
    monitors: Monitors,
    pub(super) thresholds: Thresholds,
    /// Images that were found corrupt.
    pub(super) corruptions: Corruptions,
    /// Character devices.
    pub(super) chardevs: RefCell<Devices>,
    /// Maps of copies that are to go on.
    pub(super) maps: Maps,
    /// Bitmaps that the next daemon is to have.
    pub(super) kept_bitmaps: KeptBitmaps,
    /// Jobs that complete together, of a daemon before this one.
    pub(super) groups: Groups,
    /// Disks that change hosts.
    pub(super) migrations: Migrations,
    /// What is kept for the next daemon, where that was asked for.
    pub(super) state: Option<State>,
    /// Events that were not sent yet, in order: what they tell is kept first.
    events: RefCell<Vec<Vec<u8>>>,
    event_came: Signal,
    sending: RangeLock,
    /// Whether nodes are to count for metrics.
    metered: Cell<bool>,
    quit: Cell<bool>,
    ended: Cell<bool>,
    signal: Signal,
}

/// `query-version`. The triple is that of the interface; the package is ours.
pub fn version() -> Value {
    json!({
        "qemu": { "major": 10, "minor": 0, "micro": 0 },
        "package": concat!("infill ", env!("CARGO_PKG_VERSION")),
    })
}

/// An error of the opener as a command's.
pub fn refused(error: &anyhow::Error) -> QmpError {
    QmpError::generic(one_line(error))
}

impl Control {
    /// Nothing yet. Clients are served on `reactors`; what is made is kept in `state`,
    /// what only memory has of images is recorded in `journal`.
    pub fn new(reactors: Vec<Reactor>, state: Option<State>, journal: Option<JournalDir>) -> Rc<Control> {
        // Where the options do not say it, a source that goes away is waited for.
        let policy = OpenPolicy { journal, ..OpenPolicy::default() };
        let jobs = Jobs::new();
        Rc::new(Control {
            blockdevs: Blockdevs::new(policy),
            job_events: jobs.subscribe(),
            jobs,
            exported: Exported::default(),
            reactors,
            monitors: Monitors::default(),
            thresholds: Thresholds::default(),
            corruptions: Corruptions::default(),
            migrations: Migrations::default(),
            chardevs: RefCell::default(),
            groups: Groups::default(),
            maps: Maps::default(),
            kept_bitmaps: KeptBitmaps::default(),
            state,
            events: RefCell::default(),
            event_came: Signal::new(),
            sending: RangeLock::new(),
            metered: Cell::new(false),
            quit: Cell::new(false),
            ended: Cell::new(false),
            signal: Signal::new(),
        })
    }

    /// The nodes.
    pub fn blockdevs(&self) -> &Blockdevs {
        &self.blockdevs
    }

    /// The jobs.
    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// The monitors.
    pub fn monitors(&self) -> &Monitors {
        &self.monitors
    }

    /// Whether everything is closed.
    pub fn has_ended(&self) -> bool {
        self.ended.get()
    }

    /// Everything is closed.
    pub async fn tell_ended(&self) {
        if let Err(error) = self.settle().await {
            tracing::error!("{}", error.desc);
        }
        self.ended.set(true);
        self.signal.notify(usize::MAX);
    }

    /// No command is taken any more.
    pub fn begin_to_end(&self) {
        self.quit.set(true);
        self.blockdevs.objects().lift_limits();
        self.signal.notify(usize::MAX);
    }

    /// Whether it is about to end.
    pub fn is_ending(&self) -> bool {
        self.quit.get()
    }

    async fn until(&self, flag: &Cell<bool>) {
        loop {
            let signal = self.signal.listen();
            if flag.get() {
                return;
            }
            signal.await;
        }
    }

    /// Completes when a monitor has said `quit`.
    pub async fn asked_to_quit(&self) {
        self.until(&self.quit).await;
    }

    /// All nodes count for metrics from now on.
    pub fn meter_nodes(&self) {
        self.metered.set(true);
        for (_, node) in self.blockdevs.graph().list() {
            node.latency().meter().start();
        }
    }

    /// Sends an event to all monitors, after those of jobs that have happened before.
    pub(super) fn tell(&self, name: &'static str, data: Value) {
        self.take_job_events();
        self.queue_event(name, data);
    }

    fn queue_event(&self, name: &'static str, data: Value) {
        let event = infill_qmp::Event::new(name, data);
        self.events.borrow_mut().push(encode(&event.message(std::time::SystemTime::now())));
        self.event_came.notify(usize::MAX);
    }

    fn queue_job_event(&self, event: JobEvent) {
        if let Some(state) = &self.state {
            state.touch_job(event.job());
        }
        let (name, data) = super::jobs::event(event);
        self.queue_event(name, data);
    }

    fn take_job_events(&self) {
        while let Some(event) = self.job_events.try_next() {
            self.queue_job_event(event);
        }
    }

    /// Keeps what has changed, then sends what was told so far: to be awaited before an answer, so that it comes after
    /// what led to it and is true after a crash.
    pub(super) async fn settle(&self) -> Result<(), QmpError> {
        let _turn = self.sending.exclusive(0, 1).await;
        self.take_job_events();
        let events = std::mem::take(&mut *self.events.borrow_mut());
        let kept = match &self.state {
            Some(state) => {
                state.note_jobs(&self.jobs);
                let bitmaps = self.begin_to_follow();
                let kept = state.commit().await;
                match &kept {
                    Ok(()) => self.follow_bitmaps(bitmaps),
                    Err(_) => self.follow_another_time(bitmaps),
                }
                if kept.is_ok() && state.take_maps_left() {
                    self.forget_old_maps();
                }
                kept
            }
            None => Ok(()),
        };
        for event in events {
            self.monitors.tell(event);
        }
        kept.map_err(|error| {
            QmpError::generic(format!("it was done, but the state could not be kept: {}", one_line(&error)))
        })
    }

    /// Sends what happens, as it happens, for ever.
    pub async fn tell_events(self: Rc<Self>) {
        loop {
            let came = self.event_came.listen();
            if self.events.borrow().is_empty() {
                match select(pin!(self.job_events.next()), came).await {
                    Either::Left((event, _)) => self.queue_job_event(event),
                    Either::Right(((), _)) => {}
                }
            }
            if let Err(error) = self.settle().await {
                tracing::error!("{}", error.desc);
            }
        }
    }

    /// Carries out the command called `name`.
    pub async fn execute(self: &Rc<Self>, name: &str, arguments: Members) -> Result<Value, QmpError> {
        let given = arguments.clone();
        let outcome = match Command::read(name, arguments) {
            Ok(_) if self.quit.get() => Err(QmpError::generic("the daemon is ending")),
            Ok(command) => self.carry_out_and_keep(name, command, given).await,
            Err(error) => Err(error),
        };
        let kept = self.settle().await;
        debug_assert_eq!(
            outcome.as_ref().ok().and_then(|answer| infill_qmp::schema::answer_misfit(name, answer)),
            None,
            "{name} answers what its schema does not say"
        );
        if name.starts_with("query-") { outcome } else { outcome.and_then(|value| kept.map(|()| value)) }
    }

    pub(super) async fn carry_out(self: &Rc<Self>, command: Command) -> Result<Value, QmpError> {
        match command {
            Command::QueryVersion => return Ok(version()),
            Command::QueryCommands => {
                return Ok(NAMES.iter().map(|name| json!({ "name": name })).collect());
            }
            Command::QueryQmpSchema => return infill_qmp::schema::schema().cloned(),
            Command::QueryNamedBlockNodes { flat } => return self.query_named_block_nodes(flat),
            // Nodes are not attached to devices here.
            Command::QueryBlock => return Ok(json!([])),
            Command::DeleteSnapshot { device, id, name } => {
                return self.delete_snapshot(&device, id.as_deref(), name.as_deref()).await;
            }
            Command::BlockdevBackup(backup) => self.blockdev_backup(*backup).await?,
            Command::Transaction(transaction) => self.transaction(transaction).await?,
            Command::Bitmap(command) => return self.bitmap_command(command).await,
            Command::Alter(alter) => self.alter(alter).await?,
            Command::Shape(shape) => self.shape(shape).await?,
            Command::Inspect(inspect) => return self.inspect(inspect),
            Command::Chardev(command) => return self.chardev_command(command).await,
            Command::Experimental(command) => self.experimental(command).await?,
            Command::QueryBlockExports => return Ok(self.query_block_exports()),
            Command::QueryJobs => return Ok(self.query_jobs()),
            Command::QueryBlockJobs => return Ok(self.query_block_jobs()),
            Command::QueryState => return self.query_state(),
            Command::QueryLoad => return Ok(self.query_load()),
            Command::Migration(command) => return self.migration_command(command).await,
            Command::BlockdevAdd(options) => self.blockdev_add(*options).await?,
            Command::BlockdevDel { node_name } => self.blockdev_del(&node_name).await?,
            Command::BlockdevMirror(mirror) => self.blockdev_mirror(mirror).await?,
            Command::BlockCommit(commit) => self.block_commit(commit).await?,
            Command::BlockdevSnapshot { node, overlay } => {
                let actions = vec![TransactionAction::Snapshot { node, overlay }];
                self.transaction(Transaction { actions, grouped: false }).await?;
            }
            Command::NbdServerStart(options) => self.nbd_server_start(&options).await?,
            Command::NbdServerStop => self.nbd_server_stop().await?,
            Command::BlockExportAdd(options) => {
                self.activate_for_export(&options).await?;
                self.block_export_add(options)?;
            }
            Command::NbdServerAdd(options) => {
                self.activate_for_export(&options).await?;
                self.nbd_server_add(options)?;
            }
            Command::BlockExportDel { id, mode } => self.block_export_del(&id, mode)?,
            Command::BlockStream(stream) => self.block_stream(stream).await?,
            Command::Job { id, command, block } => self.job_command(&id, command, block).await?,
            Command::ObjectAdd(options) => self.object_add(options).await?,
            Command::ObjectDel { id } => self.object_del(&id)?,
            Command::Quit => {
                self.begin_to_end();
                self.until(&self.ended).await;
            }
        }
        Ok(json!({}))
    }

    /// `__infill_query-state`.
    fn query_state(&self) -> Result<Value, QmpError> {
        let state = self
            .state
            .as_ref()
            .ok_or_else(|| QmpError::generic("nothing is kept: the daemon was started without --state"))?;
        Ok(state.query())
    }

    /// `blockdev-add`, `--blockdev`.
    pub async fn blockdev_add(self: &Rc<Self>, options: BlockdevOptions) -> Result<(), QmpError> {
        if options.node_name.is_none() {
            return Err(QmpError::generic("'node-name' must be specified for the root node"));
        }
        let added = self.blockdevs.add_patiently(&options).await;
        self.has_added(added).await
    }

    /// A node that the state holds: it is tried again anyway. `far` is called before a server is waited for.
    pub(super) async fn blockdev_add_again(
        self: &Rc<Self>,
        options: BlockdevOptions,
        far: &dyn Fn(),
    ) -> Result<(), QmpError> {
        let added = self.blockdevs.add_telling(options, far).await;
        self.has_added(added).await
    }

    async fn has_added(self: &Rc<Self>, added: anyhow::Result<String>) -> Result<(), QmpError> {
        let added = added.map(drop).map_err(|error| refused(&error));
        if added.is_ok() {
            self.restore_bitmaps().await;
            self.keep_stored_bitmaps().await;
        }
        self.greet_new_nodes();
        self.watch_sources();
        if added.is_ok() {
            self.guard_maps().await;
        }
        added
    }

    /// Nodes that were opened tell what is wrong with them, and count for metrics where that is asked for.
    pub(super) fn greet_new_nodes(&self) {
        self.listen_to_new_nodes();
        if self.metered.get() {
            self.meter_nodes();
        }
    }

    /// Has it told of the servers of new NBD nodes when they are lost.
    pub(super) fn watch_sources(self: &Rc<Self>) {
        for (node, watch) in self.blockdevs.take_source_watches() {
            rt::spawn(self.clone().tell_source(node, watch));
        }
    }

    /// Tells when the server of an NBD node is lost and when it is back, until the node is closed.
    async fn tell_source(self: Rc<Self>, node: String, mut watch: SourceWatch) {
        while let Some(state) = watch.next().await {
            self.source_changed(&node, matches!(state, SourceState::Lost(_)));
            match state {
                SourceState::Connected => self.tell("__INFILL_SOURCE_BACK", json!({ "node-name": node })),
                SourceState::Lost(error) => {
                    let reason = error.to_string();
                    self.tell("__INFILL_SOURCE_LOST", json!({ "node-name": node, "reason": reason }));
                }
            }
        }
    }
}
