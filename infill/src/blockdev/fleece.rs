//! Opening `copy-before-write` and `snapshot-access`: a disk as it was, beside the disk.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use infill_base::{ErrorKind, IoError};
use infill_job::copy::fleece::{CopyBeforeWriteNode, Past, SnapshotAccessNode};
use infill_node::{DirtyMap, NodeHandle};
use infill_qmp::{BlockdevOptions, ChildRole, Driver, OnCbwError};
use infill_storage::sync::Arc;
use infill_storage::sync::lock;

use super::hold::Access;
use super::open::{Opened, Opening, settings_of};
use super::{Blockdevs, hold};

impl Opening<'_> {
    /// `copy-before-write`: from now on what guests overwrite of its disk is kept, whichever way they come.
    pub(super) async fn open_copy_before_write(
        &mut self,
        options: BlockdevOptions,
        implicit: bool,
    ) -> Result<String> {
        let settings = settings_of(&options);
        let Driver::CopyBeforeWrite { file, target, bitmap, on_error, timeout, passed } = options.driver
        else {
            bail!("not a filter");
        };
        if settings.is_read_only() {
            bail!("copy-before-write keeps what is overwritten: it cannot be read-only");
        }
        let name = self.reserve_name(settings.node_name.as_ref())?;
        let (file, below) = self.child(file, ChildRole::Filtered, &settings, &name, Access::Writer).await?;
        let (target, copy) =
            self.child(target, ChildRole::Filtered, &settings, &name, Access::Writer).await?;
        let only = bitmap.filter(|_| !passed).map(|wanted| {
            let node = wanted.node.unwrap_or_default();
            let missing = |_| anyhow!("Node '{node}' not found");
            let bitmap = self.blockdevs.get(&node).map_err(missing)?.bitmap(&wanted.name)?;
            bitmap.check_readable()?;
            Ok::<_, anyhow::Error>(bitmap)
        });
        let only = only.transpose()?;
        let held = hold(&file, &below).await?;
        let marked: Option<&DirtyMap> = only.as_ref().map(|bitmap| bitmap.map());
        let breaks_guest = on_error == OnCbwError::BreakGuestWrite;
        let limit = timeout.map(|seconds| Duration::from_secs(seconds.into()));
        let past = Past::new(&held, copy, marked, breaks_guest, limit)
            .with_context(|| format!("'{target}' cannot keep what is overwritten"))?;
        if passed {
            past.lose(IoError::new(
                ErrorKind::NotPermitted,
                "the daemon was started again since that moment",
            ));
        }
        drop(held);
        lock(&self.blockdevs.0.pasts).insert(name.clone(), Arc::downgrade(&past));
        // What is kept is of this disk: no other one takes its place.
        let filter =
            Opened { target: Some(target), edge: None, ..Opened::over(file, CopyBeforeWriteNode::new(past)) };
        self.push_filter(&settings, implicit, &name, filter);
        Ok(name)
    }

    /// `snapshot-access`: the disk as it was when the `copy-before-write` node below was opened.
    pub(super) async fn open_snapshot_access(
        &mut self,
        options: BlockdevOptions,
        implicit: bool,
    ) -> Result<String> {
        let settings = settings_of(&options);
        let Driver::SnapshotAccess { file } = options.driver else { bail!("not a snapshot") };
        let name = self.reserve_name(settings.node_name.as_ref())?;
        let (file, _) = self.child(file, ChildRole::Filtered, &settings, &name, Access::Reader).await?;
        let past = self.blockdevs.past(&file);
        let Some(past) = past else {
            bail!("'{file}' keeps no snapshot: it must be a copy-before-write node")
        };
        let node = NodeHandle::new(SnapshotAccessNode::new(past));
        let settings = BlockdevOptions { read_only: Some(true), ..settings };
        let opened = Opened { driver: "snapshot-access", node, file, target: None, edge: None };
        self.push_filter(&settings, implicit, &name, opened);
        Ok(name)
    }
}

impl Blockdevs {
    /// The disk as it was that the filter `name` keeps.
    fn past(&self, name: &str) -> Option<Arc<Past>> {
        let mut pasts = lock(&self.0.pasts);
        pasts.retain(|_, past| past.strong_count() > 0);
        pasts.get(name)?.upgrade()
    }
}
