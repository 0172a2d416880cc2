//! `blockdev-del` and `query-named-block-nodes`.

use infill_job::JobType;
use infill_qmp::QmpError;
use serde_json::{Map, Value, json};

use super::control::{Control, refused};
use crate::blockdev::{NodeFacts, image_info};

impl Control {
    /// `blockdev-del`.
    pub(super) async fn blockdev_del(&self, name: &str) -> Result<(), QmpError> {
        let facts = self.blockdevs().facts(name).map_err(|error| refused(&error))?;
        let users = self.blockdevs().graph().users(name);
        let is_used = |kind: &str| users.iter().any(|user| user.starts_with(kind));
        if is_used("job '") {
            return Err(self.busy(name));
        }
        if facts.implicit {
            return Err(QmpError::generic(format!("Node {name} is not owned by the monitor")));
        }
        if let Some(overlay) = self.overlay_on(name) {
            let why = format!("Node '{name}' is busy: node is used as backing hd of '{overlay}'");
            return Err(QmpError::generic(why));
        }
        if is_used("node '") {
            return Err(QmpError::generic(format!("Block device {name} is in use")));
        }
        if !users.is_empty() {
            return Err(QmpError::generic(format!("Node {name} is in use")));
        }
        self.blockdevs().del(name).await.map_err(|error| refused(&error))?;
        self.thresholds.clear(name);
        Ok(())
    }

    /// A node that lies on `name`.
    pub(super) fn overlay_on(&self, name: &str) -> Option<String> {
        let nodes = self.blockdevs().graph().list().into_iter().map(|(overlay, _)| overlay);
        let lies_on = |facts: NodeFacts| facts.backing.as_deref() == Some(name);
        nodes.into_iter().find(|overlay| self.blockdevs().facts(overlay).is_ok_and(lies_on))
    }

    /// The refusal of a node that a job works on.
    pub(super) fn busy(&self, name: &str) -> QmpError {
        let users = self.blockdevs().graph().users(name);
        let id = users.iter().find_map(|user| user.strip_prefix("job '")?.strip_suffix('\''));
        let kind = id.and_then(|id| self.kind_of_job(id));
        let kind = kind.map_or("stream", |kind| kind.as_str());
        QmpError::generic(format!("Node '{name}' is busy: block device is in use by block job: {kind}"))
    }

    /// What the job of that id is, which may be about to begin again.
    pub(super) fn kind_of_job(&self, id: &str) -> Option<JobType> {
        match self.jobs().get(id) {
            Ok(job) => Some(job.kind()),
            Err(_) => self.state.as_ref()?.kind_of_job(id),
        }
    }

    /// Refuses a node that a job works on, or whose disk changes hosts.
    pub(super) fn not_busy(&self, name: &str) -> Result<(), QmpError> {
        self.not_moving(name)?;
        self.not_in_job(name)
    }

    /// Refuses a node whose disk changes hosts.
    pub(super) fn not_moving(&self, name: &str) -> Result<(), QmpError> {
        match self.migrations.on_node(name) {
            Some(migration) => {
                let why = format!("Node '{name}' is busy: its disk is in migration {migration}");
                Err(QmpError::generic(why))
            }
            None => Ok(()),
        }
    }

    /// Refuses a node that a job works on.
    pub(super) fn not_in_job(&self, name: &str) -> Result<(), QmpError> {
        let users = self.blockdevs().graph().users(name);
        match users.iter().any(|user| user.starts_with("job '")) {
            true => Err(self.busy(name)),
            false => Ok(()),
        }
    }

    /// `query-named-block-nodes`.
    pub(super) fn query_named_block_nodes(&self, flat: bool) -> Result<Value, QmpError> {
        let names = self.blockdevs().graph().list().into_iter().map(|(name, _)| name);
        names.map(|name| self.named_block_node(&name, flat).map_err(|error| refused(&error))).collect()
    }

    fn named_block_node(&self, name: &str, flat: bool) -> anyhow::Result<Value> {
        let blockdevs = self.blockdevs();
        let facts = blockdevs.facts(name)?;
        let chain = blockdevs.chain(name);
        // From the bottom up, so that no length of the chain is a depth of the stack.
        let mut image = Value::Null;
        let layers = if flat { &chain[..1] } else { &chain[..] };
        for layer in layers.iter().rev() {
            let mut info = image_info(blockdevs, layer, false)?;
            if !image.is_null() {
                info["backing-image"] = image;
            }
            image = info;
        }
        let mut out = Map::new();
        out.insert("node-name".into(), json!(name));
        out.insert("drv".into(), json!(facts.driver));
        out.insert("file".into(), image["filename"].clone());
        if let Some(below) = &facts.backing {
            out.insert("backing_file".into(), json!(blockdevs.get(below)?.info().filename));
        }
        out.insert("backing_file_depth".into(), json!(layers.len() - 1));
        out.insert("ro".into(), json!(facts.read_only));
        out.insert("active".into(), json!(facts.active));
        out.insert("encrypted".into(), json!(false));
        out.insert("detect_zeroes".into(), json!(facts.detect_zeroes.as_str()));
        let cache =
            json!({ "writeback": true, "direct": facts.cache_direct, "no-flush": facts.cache_no_flush });
        out.insert("cache".into(), cache);
        for limit in ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"] {
            out.insert(limit.into(), json!(0));
        }
        let threshold = self.thresholds.of(name, &blockdevs.get(name)?);
        // The protocol sets it without a sign and tells it with one.
        out.insert("write_threshold".into(), json!(threshold.cast_signed()));
        if let Some(bitmaps) = super::bitmaps::told(&blockdevs.get(name)?) {
            out.insert("dirty-bitmaps".into(), bitmaps);
        }
        out.insert("image".into(), image);
        Ok(Value::Object(out))
    }
}
