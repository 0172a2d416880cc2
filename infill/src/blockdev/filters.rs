//! Opening filters: nodes that pass requests on to one other node.

use anyhow::{Result, anyhow, bail};
use infill_node::{BlkdebugNode, CompressNode, CopyOnReadNode, NodeHandle, PreallocateNode, ThrottleNode};
use infill_qmp::{BlkdebugOptions, BlockdevOptions, ChildRole, Driver};

use super::hold::Access;
use super::open::{Opened, Opening, settings_of};

impl Opening<'_> {
    /// `copy-on-read`.
    pub(super) async fn open_copy_on_read(
        &mut self,
        options: BlockdevOptions,
        implicit: bool,
    ) -> Result<String> {
        let settings = settings_of(&options);
        let Driver::CopyOnRead { file, bottom } = options.driver else { bail!("not a filter") };
        if settings.is_read_only() {
            bail!("copy-on-read writes what is read: it cannot be read-only");
        }
        let name = self.reserve_name(settings.node_name.as_ref())?;
        let (file, below) = self.child(file, ChildRole::Filtered, &settings, &name, Access::Writer).await?;
        let bottom = bottom.map(|bottom| self.bottom(&below, &bottom)).transpose()?;
        let filter = CopyOnReadNode::new(below, bottom.as_ref());
        self.push_filter(&settings, implicit, &name, Opened::over(file, filter));
        Ok(name)
    }

    /// `throttle`.
    pub(super) async fn open_throttle(&mut self, options: BlockdevOptions, implicit: bool) -> Result<String> {
        let settings = settings_of(&options);
        let Driver::Throttle { file, group } = options.driver else { bail!("not a filter") };
        let group = self.blockdevs.objects().throttle_group(&group)?;
        let access = if settings.is_read_only() { Access::Reader } else { Access::Writer };
        let name = self.reserve_name(settings.node_name.as_ref())?;
        let (file, below) = self.child(file, ChildRole::Filtered, &settings, &name, access).await?;
        self.push_filter(&settings, implicit, &name, Opened::over(file, ThrottleNode::new(below, group)));
        Ok(name)
    }

    /// `blkdebug`.
    pub(super) async fn open_blkdebug(&mut self, options: BlockdevOptions, implicit: bool) -> Result<String> {
        let settings = settings_of(&options);
        let Driver::Blkdebug(blkdebug) = options.driver else { bail!("not a filter") };
        let BlkdebugOptions { image, align, max_transfer, inject_error, set_state } = *blkdebug;
        let access = if settings.is_read_only() { Access::Reader } else { Access::Writer };
        let name = self.reserve_name(settings.node_name.as_ref())?;
        let (file, below) = self.child(image, ChildRole::Filtered, &settings, &name, access).await?;
        let filter =
            BlkdebugNode::new(below, inject_error, set_state).wanting(align.unwrap_or(1), max_transfer);
        self.push_filter(&settings, implicit, &name, Opened { edge: None, ..Opened::over(file, filter) });
        Ok(name)
    }

    /// `compress`.
    pub(super) async fn open_compress(&mut self, options: BlockdevOptions, implicit: bool) -> Result<String> {
        let settings = settings_of(&options);
        let Driver::Compress { file } = options.driver else { bail!("not a filter") };
        let access = if settings.is_read_only() { Access::Reader } else { Access::Writer };
        let name = self.reserve_name(settings.node_name.as_ref())?;
        let (file, below) = self.child(file, ChildRole::Filtered, &settings, &name, access).await?;
        if !CompressNode::is_possible(&below) {
            bail!("Compression is not supported under this filter: '{file}' is no qcow2 image");
        }
        let filter = CompressNode::new(below);
        self.push_filter(&settings, implicit, &name, Opened { edge: None, ..Opened::over(file, filter) });
        Ok(name)
    }

    /// `preallocate`.
    pub(super) async fn open_preallocate(
        &mut self,
        options: BlockdevOptions,
        implicit: bool,
    ) -> Result<String> {
        let settings = settings_of(&options);
        let Driver::Preallocate { file, align, size } = options.driver else { bail!("not a filter") };
        let access = if settings.is_read_only() { Access::Stable } else { Access::Owner };
        let name = self.reserve_name(settings.node_name.as_ref())?;
        let (file, below) = self.child(file, ChildRole::Filtered, &settings, &name, access).await?;
        let Some(storage) = self.storage_of(&file) else {
            bail!("'{file}' cannot reserve space: preallocate lies on a file")
        };
        let storage = below.on_storage(storage);
        let filter = PreallocateNode::new(below, storage, align, size);
        self.push_filter(&settings, implicit, &name, Opened { edge: None, ..Opened::over(file, filter) });
        Ok(name)
    }

    /// The layer `name` of the chain from `top` down.
    fn bottom(&self, top: &NodeHandle, name: &str) -> Result<NodeHandle> {
        let node = self.node(name).ok_or_else(|| anyhow!("Bottom node '{name}' not found"))?;
        if node.filtered().is_some() {
            bail!("Bottom node '{name}' is a filter");
        }
        let mut layers = std::iter::successors(Some(top.unfiltered()), NodeHandle::layer_below);
        if !layers.any(|layer| layer.is_same(&node)) {
            bail!("'{name}' is not below the node that is filtered");
        }
        Ok(node)
    }
}
