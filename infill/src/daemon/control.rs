//! What commands do: the state of the daemon, on the control reactor alone.
//!
//! Commands of one monitor are carried out one after the other; those of several monitors beside each other. What must not
//! be seen half done is changed between two awaits, and the graph refuses what does not fit.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use event_listener::Event as Signal;
use infill_io::Reactor;
use infill_job::{Events, Jobs};
use infill_nbd::{OnLost, SourceState, SourceWatch};
use infill_qmp::command::{Command, NAMES};
use infill_qmp::{BlockdevOptions, Members, ObjectOptions, QmpError, encode};
use infill_storage::rt;
use serde_json::{Value, json};

use super::exports::Exported;
use super::monitor::Monitors;
use crate::blockdev::{Blockdevs, OpenPolicy};
use crate::one_line;

/// What the daemon has.
pub struct Control {
    blockdevs: Blockdevs,
    jobs: Jobs,
    job_events: Events,
    pub(super) exported: Exported,
    objects: RefCell<BTreeSet<String>>,
    pub(super) reactors: Vec<Reactor>,
    monitors: Monitors,
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
    /// Nothing yet. Clients are served on `reactors`.
    pub fn new(reactors: Vec<Reactor>) -> Rc<Control> {
        // Where the options do not say it, a source that goes away is waited for.
        let policy = OpenPolicy { on_lost: OnLost::Hold { limit: None }, ..OpenPolicy::default() };
        let jobs = Jobs::new();
        Rc::new(Control {
            blockdevs: Blockdevs::new(policy),
            job_events: jobs.subscribe(),
            jobs,
            exported: Exported::default(),
            objects: RefCell::default(),
            reactors,
            monitors: Monitors::default(),
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
    pub fn tell_ended(&self) {
        self.tell_waiting_events();
        self.ended.set(true);
        self.signal.notify(usize::MAX);
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

    /// Sends an event to all monitors, after those of jobs that have happened before.
    pub(super) fn tell(&self, name: &'static str, data: Value) {
        self.tell_waiting_events();
        self.tell_now(name, data);
    }

    fn tell_now(&self, name: &'static str, data: Value) {
        let event = infill_qmp::Event::new(name, data);
        self.monitors.tell(encode(&event.message(std::time::SystemTime::now())));
    }

    /// Sends what jobs have told so far: to be called before an answer, so that it comes after what led to it.
    pub(super) fn tell_waiting_events(&self) {
        while let Some(event) = self.job_events.try_next() {
            let (name, data) = super::jobs::event(event);
            self.tell_now(name, data);
        }
    }

    /// Sends what jobs tell, as they tell it, for ever.
    pub async fn tell_job_events(self: Rc<Self>) {
        loop {
            let (name, data) = super::jobs::event(self.job_events.next().await);
            self.tell_now(name, data);
        }
    }

    /// Carries out the command called `name`.
    pub async fn execute(self: &Rc<Self>, name: &str, arguments: Members) -> Result<Value, QmpError> {
        let outcome = match Command::read(name, arguments) {
            Ok(command) => self.carry_out(command).await,
            Err(error) => Err(error),
        };
        self.tell_waiting_events();
        outcome
    }

    async fn carry_out(self: &Rc<Self>, command: Command) -> Result<Value, QmpError> {
        if self.quit.get() {
            return Err(QmpError::generic("the daemon is ending"));
        }
        match command {
            Command::QueryVersion => return Ok(version()),
            Command::QueryCommands => {
                return Ok(NAMES.iter().map(|name| json!({ "name": name })).collect());
            }
            Command::QueryNamedBlockNodes { flat } => return self.query_named_block_nodes(flat),
            // Nodes are not attached to devices here.
            Command::QueryBlock => return Ok(json!([])),
            Command::QueryBlockExports => return Ok(self.query_block_exports()),
            Command::QueryJobs => return Ok(self.query_jobs()),
            Command::QueryBlockJobs => return Ok(self.query_block_jobs()),
            Command::BlockdevAdd(options) => self.blockdev_add(*options).await?,
            Command::BlockdevDel { node_name } => self.blockdev_del(&node_name).await?,
            Command::BlockdevSnapshot { node, overlay } => {
                self.blockdevs.snapshot(&node, &overlay).await.map_err(|error| refused(&error))?;
            }
            Command::NbdServerStart(options) => self.nbd_server_start(&options)?,
            Command::NbdServerStop => self.nbd_server_stop().await?,
            Command::BlockExportAdd(options) => self.block_export_add(options)?,
            Command::BlockExportDel { id, mode } => self.block_export_del(&id, mode)?,
            Command::BlockStream(stream) => self.block_stream(stream).await?,
            Command::Job { id, command, block } => self.job_command(&id, command, block).await?,
            Command::ObjectAdd(options) => self.object_add(options)?,
            Command::ObjectDel { id } => self.object_del(&id)?,
            Command::Quit => {
                self.quit.set(true);
                self.signal.notify(usize::MAX);
                self.until(&self.ended).await;
            }
        }
        Ok(json!({}))
    }

    /// `blockdev-add`, `--blockdev`.
    pub async fn blockdev_add(self: &Rc<Self>, options: BlockdevOptions) -> Result<(), QmpError> {
        if options.node_name.is_none() {
            return Err(QmpError::generic("'node-name' must be specified for the root node"));
        }
        let added = self.blockdevs.add(options).await.map(drop).map_err(|error| refused(&error));
        for (node, watch) in self.blockdevs.take_source_watches() {
            rt::spawn(self.clone().tell_source(node, watch));
        }
        added
    }

    /// Tells when the server of an NBD node is lost and when it is back, until the node is closed.
    async fn tell_source(self: Rc<Self>, node: String, mut watch: SourceWatch) {
        while let Some(state) = watch.next().await {
            match state {
                SourceState::Connected => self.tell("__INFILL_SOURCE_BACK", json!({ "node-name": node })),
                SourceState::Lost(error) => {
                    let reason = error.to_string();
                    self.tell("__INFILL_SOURCE_LOST", json!({ "node-name": node, "reason": reason }));
                }
            }
        }
    }

    /// `object-add`, `--object`.
    pub fn object_add(&self, options: ObjectOptions) -> Result<(), QmpError> {
        let ObjectOptions { id } = options;
        match self.objects.borrow_mut().insert(id.clone()) {
            true => Ok(()),
            false => Err(QmpError::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            ))),
        }
    }

    fn object_del(&self, id: &str) -> Result<(), QmpError> {
        match self.objects.borrow_mut().remove(id) {
            true => Ok(()),
            false => Err(QmpError::generic(format!("object '{id}' not found"))),
        }
    }

    /// Whether an object of that id exists.
    pub(super) fn has_object(&self, id: &str) -> bool {
        self.objects.borrow().contains(id)
    }
}
