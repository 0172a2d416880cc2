//! `blockdev-mirror` and `block-commit`: jobs that copy a disk, and what they do to the graph at their end.

use std::rc::Rc;

use infill_base::{ErrorKind, IoError, IoResult};
use infill_job::copy::backup::{BackupBitmap, BitmapMode};
use infill_job::copy::commit::{self, CommitOptions};
use infill_job::copy::mirror::{self, CopyMode, MirrorOptions, MirrorSync};
use infill_job::{JobOptions, JobType};
use infill_node::BackingRef;
use infill_qmp::backup::BitmapSyncMode;
use infill_qmp::copy::{BlockCommit, BlockdevMirror, JobMembers, Layer, SyncMode};
use infill_qmp::{ErrorClass, QmpError, copy};

use super::control::{Control, refused};
use super::drive::Target;
use super::jobs::{Claims, job_refused, on_error, yield_once};
use super::maps::Copied;
use crate::blockdev::{Access, Blockdevs};
use crate::one_line;

pub(super) fn job_options(job: JobMembers) -> JobOptions {
    JobOptions {
        auto_finalize: job.auto_finalize,
        auto_dismiss: job.auto_dismiss,
        speed: job.speed,
        ..JobOptions::new(job.job_id)
    }
}

/// A change of the graph failed, as a job's error.
fn as_io(error: &anyhow::Error) -> IoError {
    IoError::new(ErrorKind::Busy, one_line(error))
}

/// While a commit writes to it: nobody who lies on the base relies on it, for what is written there is what they show.
pub(super) struct SharedBase {
    blockdevs: Blockdevs,
    overlay: String,
    base: String,
    stays: bool,
}

impl SharedBase {
    pub(super) fn new(blockdevs: &Blockdevs, overlay: &str, base: &str) -> SharedBase {
        blockdevs.share_base(overlay, base, true);
        let (blockdevs, overlay, base) = (blockdevs.clone(), overlay.to_owned(), base.to_owned());
        SharedBase { blockdevs, overlay, base, stays: false }
    }
}

impl Drop for SharedBase {
    fn drop(&mut self) {
        if !self.stays {
            self.blockdevs.share_base(&self.overlay, &self.base, false);
        }
    }
}

impl Control {
    /// `blockdev-mirror`. Answered once the job runs.
    pub(super) async fn blockdev_mirror(self: &Rc<Self>, options: BlockdevMirror) -> Result<(), QmpError> {
        self.start_mirror(options, None).await
    }

    /// Starts a mirror, with whose end `owned` goes unless it has taken the disk's place.
    pub(super) async fn start_mirror(
        self: &Rc<Self>,
        options: BlockdevMirror,
        mut owned: Option<Target>,
    ) -> Result<(), QmpError> {
        let BlockdevMirror { device, target, .. } = &options;
        for name in [device, target] {
            if self.blockdevs().get(name).is_err() {
                return Err(QmpError::generic(format!("Cannot find device='{name}' nor node-name='{name}'")));
            }
        }
        let sync = match options.sync {
            SyncMode::Full => MirrorSync::Full,
            SyncMode::Top => MirrorSync::Top,
            SyncMode::None => MirrorSync::Nothing,
            SyncMode::Incremental | SyncMode::Bitmap => MirrorSync::Bitmap,
        };
        let bitmap = options.bitmap_use()?;
        if device == target {
            return Err(QmpError::generic("Can't mirror node into itself"));
        }
        match &options.replaces {
            Some(name) if self.blockdevs().get(name).is_err() => {
                return Err(QmpError::generic(format!("Failed to find node with node-name='{name}'")));
            }
            Some(name) if name != device => return Err(self.cannot_replace(device, name)),
            _ => {}
        }
        self.not_busy(device)?;
        self.not_busy(target)?;
        let bitmap = bitmap.map(|(name, mode)| self.bitmap_of_mirror(device, name, mode)).transpose();
        let mut claims = Claims::new(self.blockdevs(), &options.job.job_id);
        let source = claims.take(device, Access::Reader)?;
        let copy = claims.take(target, Access::Writer)?;
        let (control, from, to) = (self.clone(), device.clone(), target.clone());
        let id = options.job.job_id.clone();
        let copied = Copied {
            id: &options.job.job_id,
            kind: JobType::Mirror,
            source: device,
            target,
            node: &source,
            is_written: true,
            all: false,
            copy: &copy,
            is_whole: sync == MirrorSync::Full,
            renews: None,
        };
        let found = self.found_map(&copied).await;
        self.not_ending()?;
        let (kept, bitmap) = match (found, bitmap) {
            // What the bitmap said stands in the map. One that is gone, or that a kill has left inconsistent, is not cleared.
            (Some(Ok(kept)), bitmap) => (Some(kept), bitmap.unwrap_or_default()),
            (Some(Err(why)), bitmap) if bitmap.is_err() || sync == MirrorSync::Nothing => {
                return self.cannot_go_on(&id, JobType::Mirror, &why);
            }
            (found, bitmap) => {
                if let Some(Err(reason)) = found {
                    tracing::warn!(job = id, %reason, "everything is copied again");
                }
                let bitmap = bitmap?;
                (self.new_map(&copied).await, bitmap)
            }
        };
        let (kept, map) = kept.unzip();
        let mirror = MirrorOptions {
            kept,
            sync,
            bitmap,
            copy_mode: match options.copy_mode {
                copy::CopyMode::Background => CopyMode::Background,
                copy::CopyMode::WriteBlocking => CopyMode::WriteBlocking,
            },
            unmap: options.unmap,
            on_source_error: on_error(options.on_source_error),
            on_target_error: on_error(options.on_target_error),
            on_exchange: Some(Box::new(move |_| {
                Box::pin(async move {
                    // Given back when the job is over, however it ends.
                    let _claims = claims;
                    if let Some(owned) = &mut owned {
                        owned.keep(&control);
                    }
                    let over = owned.as_ref().is_some_and(|owned| owned.over() == Some(&*from));
                    let exchanged = match over {
                        true => control.exchange_over(&id, &from, &to).await,
                        false => control.exchange(&id, &from, &to).await,
                    };
                    if let (Err(_), Some(owned)) = (&exchanged, &mut owned) {
                        owned.keep_no_more(&control);
                    }
                    exchanged
                })
            })),
            ..MirrorOptions::new(source, copy)
        };
        let job = mirror::start(self.jobs(), job_options(options.job), mirror).map_err(job_refused)?;
        job.set_map(map);
        yield_once().await;
        Ok(())
    }

    /// Why the target of a mirror of `device` cannot take the place of `name`.
    fn cannot_replace(&self, device: &str, name: &str) -> QmpError {
        if let Some(above) = self.overlay_on(name) {
            return QmpError::generic(format!(
                "Node '{name}' is busy: node is used as backing hd of '{above}'"
            ));
        }
        let layers = self.blockdevs().chain_with_filters(device);
        let is_filter = |layer: &&String| self.blockdevs().facts(layer).is_ok_and(|facts| facts.is_filter());
        let filters = layers.iter().take_while(is_filter).count();
        QmpError::generic(
            match layers.get(1..=filters).is_some_and(|shown| shown.iter().any(|layer| layer == name)) {
                // It shows the same; but a filter holds the node that it lies on fast.
                true => format!(
                    "'{name}' lies under a filter, which keeps it: mirror '{device}' without 'replaces'"
                ),
                false => format!(
                    "Cannot replace '{name}' by a node mirrored from '{device}', because it cannot be guaranteed that doing so \
                 would not lead to an abrupt change of visible data"
                ),
            },
        )
    }

    /// The bitmap that a mirror of `device` starts from, which nobody else may change meanwhile.
    fn bitmap_of_mirror(
        &self,
        device: &str,
        name: &str,
        mode: BitmapSyncMode,
    ) -> Result<BackupBitmap, QmpError> {
        let missing = |_| QmpError::generic(format!("Bitmap '{name}' could not be found"));
        let source = self.blockdevs().get(device).map_err(|error| refused(&error))?;
        let bitmap = source.bitmap(name).map_err(missing)?;
        let (bitmap, mode) = match mode {
            BitmapSyncMode::Never => (bitmap.use_readable(), BitmapMode::Never),
            BitmapSyncMode::OnSuccess => (bitmap.use_changeable(), BitmapMode::OnSuccess),
            BitmapSyncMode::Always => (bitmap.use_changeable(), BitmapMode::Always),
        };
        let bitmap = bitmap.map_err(|error| QmpError::generic(error.to_string()))?;
        Ok(BackupBitmap { bitmap, mode })
    }

    /// `block-commit`. Answered once the job runs.
    pub(super) async fn block_commit(self: &Rc<Self>, options: BlockCommit) -> Result<(), QmpError> {
        let device = &options.device;
        if self.blockdevs().get(device).is_err() {
            let why = format!("Device '{device}' not found");
            return Err(QmpError::new(ErrorClass::DeviceNotFound, why));
        }
        let chain = self.blockdevs().chain(device);
        if self.overlay_on(device).is_some() {
            return Err(QmpError::generic("Need a root block node"));
        }
        let top = match &options.top {
            None => 0,
            Some(layer) => self.layer(&chain, layer, |name| format!("Top image file {name} not found"))?,
        };
        let base = match &options.base {
            None => chain.len() - 1,
            Some(layer) => {
                let base =
                    self.layer(&chain, layer, |name| format!("Can't find '{name}' in the backing chain"))?;
                if base < top {
                    return Err(QmpError::generic(format!(
                        "'{}' is not in this backing file chain",
                        chain[base]
                    )));
                }
                base
            }
        };
        if base == top {
            return Err(QmpError::generic("cannot commit an image into itself"));
        }
        if options.backing_file.is_some() && top == 0 {
            return Err(QmpError::generic("'backing-file' specified, but 'top' is the active layer"));
        }
        for layer in &chain[top..=base] {
            self.not_busy(layer)?;
        }
        self.only_in_chain(&chain, top, base)?;
        self.start_commit(options, &chain, top, base).await?;
        yield_once().await;
        Ok(())
    }

    /// Gives the users of `from` the node `to`, at the end of the job `id`, which holds the changes of `from`.
    async fn exchange(&self, id: &str, from: &str, to: &str) -> IoResult<()> {
        // Noted before it happens: a daemon that dies in between comes back with the new disk.
        let noted = self.note_exchange(Some(id), from, to).await;
        noted.map_err(|error| IoError::new(ErrorKind::Io, error.desc))?;
        let staying = [format!("job '{id}'")];
        let exchanged = self.blockdevs().exchange(from, to, &staying).await;
        if exchanged.is_err() {
            self.note_no_exchange(Some(id), from, to).await;
        }
        exchanged.map_err(|error| as_io(&error))
    }

    /// As [`Control::exchange`], where `to` holds only what was written since it was made: it lies on `from` from then on.
    async fn exchange_over(&self, id: &str, from: &str, to: &str) -> IoResult<()> {
        let noted = self.note_exchange(Some(id), from, to).await;
        noted.map_err(|error| IoError::new(ErrorKind::Io, error.desc))?;
        let staying = [format!("job '{id}'")];
        let exchanged = self.blockdevs().exchange_over(from, to, &staying).await;
        if exchanged.is_err() {
            self.note_no_exchange(Some(id), from, to).await;
        }
        exchanged.map_err(|error| as_io(&error))
    }

    /// The top of a commit lies on its base directly: the graph and what is kept of it follow, before the top is empty.
    async fn rebased(&self, top: &str) -> IoResult<()> {
        self.blockdevs().committed(top).await.map_err(|error| as_io(&error))?;
        self.note_backing(top);
        self.settle().await.map_err(|error| IoError::new(ErrorKind::Io, error.desc))
    }

    fn layer(
        &self,
        chain: &[String],
        layer: &Layer,
        unknown: impl Fn(&str) -> String,
    ) -> Result<usize, QmpError> {
        match layer {
            Layer::Node(name) => {
                if self.blockdevs().get(name).is_err() {
                    return Err(QmpError::generic(format!("Cannot find device='' nor node-name='{name}'")));
                }
                chain
                    .iter()
                    .position(|layer| layer == name)
                    .ok_or_else(|| QmpError::generic(format!("'{name}' is not in this backing file chain")))
            }
            Layer::File(name) => {
                let top = self.blockdevs().get(&chain[0]).is_ok_and(|node| node.info().filename == *name);
                let found = if top { Some(0) } else { self.backing_of_file(chain, name) };
                found.ok_or_else(|| QmpError::generic(unknown(name)))
            }
        }
    }

    /// Refuses a commit through layers that somebody else uses (P5): they would see the base change under them.
    fn only_in_chain(&self, chain: &[String], top: usize, base: usize) -> Result<(), QmpError> {
        for (at, layer) in chain.iter().enumerate().take(base + 1).skip(top + 1) {
            let above = format!("node '{}'", chain[at - 1]);
            let others: Vec<_> =
                self.blockdevs().graph().users(layer).into_iter().filter(|user| *user != above).collect();
            if !others.is_empty() {
                return Err(QmpError::generic(format!(
                    "Node '{layer}' is used by {} beside its overlay, which would see it change during a commit",
                    others.join(", ")
                )));
            }
        }
        Ok(())
    }

    async fn start_commit(
        self: &Rc<Self>,
        options: BlockCommit,
        chain: &[String],
        top: usize,
        base: usize,
    ) -> Result<(), QmpError> {
        let blockdevs = self.blockdevs();
        if self.keeps_state() && blockdevs.facts(&chain[base]).is_ok_and(|facts| facts.read_only) {
            return Err(QmpError::generic(format!(
                "Block node '{}' is read-only, and would be so again after a restart: with --state, add it with read-only=off",
                chain[base]
            )));
        }
        // A layer that only a header named was opened for reading.
        blockdevs.make_writable(&chain[base]).await.map_err(|error| refused(&error))?;
        let (above, base_name) = (chain[base - 1].clone(), chain[base].clone());
        let mut claims = Claims::new(blockdevs, &options.job.job_id);
        let top_node = claims.take(&chain[top], Access::Reader)?;
        for layer in &chain[top + 1..base] {
            claims.take(layer, Access::Reader)?;
        }
        let shared = SharedBase::new(blockdevs, &above, &base_name);
        let base_node = claims.take(&base_name, Access::Writer)?;
        let info = base_node.info();
        let is_format = matches!(info.driver, "raw" | "qcow2" | "qed");
        let format = if options.backing_mask_protocol && !is_format { "raw" } else { info.driver };
        let backing = BackingRef {
            filename: options.backing_file.clone().unwrap_or(info.filename),
            format: Some(format.into()),
        };
        let copied = Copied {
            id: &options.job.job_id,
            kind: JobType::Commit,
            source: &chain[top],
            target: &base_name,
            node: &top_node,
            is_written: top == 0,
            all: false,
            copy: &base_node,
            is_whole: true,
            renews: None,
        };
        let (kept, map) = self.map_of(copied).await?.unzip();
        let mut commit = CommitOptions {
            kept,
            backing,
            on_error: on_error(options.on_error),
            ..CommitOptions::new(top_node, base_node)
        };
        if top == 0 {
            let (from, to) = (chain[0].clone(), base_name);
            let id = options.job.job_id.clone();
            let (control, rebased) = (self.clone(), from.clone());
            commit.on_rebase =
                Some(Box::new(move || Box::pin(async move { control.rebased(&rebased).await })));
            let control = self.clone();
            commit.on_exchange = Some(Box::new(move |_| {
                Box::pin(async move {
                    let (_claims, mut shared) = (claims, shared);
                    // Guests write to the base from now on: what still lies on it sees it change.
                    shared.stays = true;
                    control.exchange(&id, &from, &to).await
                })
            }));
        } else {
            let (control, overlay) = (self.clone(), chain[top - 1].clone());
            commit.overlay = Some(claims.take(&overlay, Access::Reader)?);
            commit.on_swap = Some(Box::new(move || {
                Box::pin(async move {
                    // The overlay relies on the base now, so nobody writes to it any more.
                    drop((claims, shared));
                    if let Err(error) = control.blockdevs().backing_changed(&overlay).await {
                        tracing::warn!("after a commit: {error:#}");
                    }
                    control.note_backing(&overlay);
                })
            }));
        }
        let job = commit::start(self.jobs(), job_options(options.job), commit).map_err(job_refused)?;
        job.set_map(map);
        Ok(())
    }
}
