//! A storage on which a format lies directly, and that stands in the graph as a node of its own: the format's reads go past
//! the node, its changes are the node's.
//!
//! So a write threshold, a dirty bitmap or a backup of the file below an image sees every byte that the format writes, and whoever
//! holds the file's changes holds the format's. Costs a format's write what counting in costs, and its read nothing.

use futures_util::future::LocalBoxFuture;
use infill_base::{Ctx, Gather, IoResult, WriteFlags, ZeroFlags};
use infill_storage::{Gate, StorageHandle};

use crate::NodeHandle;
use crate::changes::{Change, ChangeKind};

/// The node of a storage.
pub(crate) struct NodeGate(pub(crate) NodeHandle);

impl Gate for NodeGate {
    fn write<'a>(
        &'a self,
        storage: &'a StorageHandle,
        cx: &'a Ctx,
        at: u64,
        data: Gather,
        flags: WriteFlags,
    ) -> LocalBoxFuture<'a, IoResult<()>> {
        Box::pin(async move {
            let entered = self.0.enter().await;
            let len = data.len() as u64;
            if let Some(zero) = self.0.as_zeroes(&data, flags) {
                let what = ChangeKind::Zero { may_unmap: zero.contains(ZeroFlags::MAY_UNMAP) };
                let perform = storage.write_zeroes(cx, at, len, zero);
                return entered.beyond(cx, storage.len(), Change { at, len, what }, perform).await;
            }
            let what = ChangeKind::Write(data.clone());
            entered
                .beyond(cx, storage.len(), Change { at, len, what }, storage.write(cx, at, data, flags))
                .await
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        storage: &'a StorageHandle,
        cx: &'a Ctx,
        at: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> LocalBoxFuture<'a, IoResult<()>> {
        Box::pin(async move {
            let entered = self.0.enter().await;
            let flags = if self.0.gives_space_back() { flags } else { flags - ZeroFlags::MAY_UNMAP };
            let what = ChangeKind::Zero { may_unmap: flags.contains(ZeroFlags::MAY_UNMAP) };
            let perform = storage.write_zeroes(cx, at, len, flags);
            entered.beyond(cx, storage.len(), Change { at, len, what }, perform).await
        })
    }

    fn discard<'a>(
        &'a self,
        storage: &'a StorageHandle,
        cx: &'a Ctx,
        at: u64,
        len: u64,
    ) -> LocalBoxFuture<'a, IoResult<()>> {
        Box::pin(async move {
            let entered = self.0.enter().await;
            if !self.0.gives_space_back() {
                return Ok(());
            }
            let change = Change { at, len, what: ChangeKind::Discard };
            entered.beyond(cx, u64::MAX, change, storage.discard(cx, at, len)).await
        })
    }

    fn allocate<'a>(
        &'a self,
        storage: &'a StorageHandle,
        cx: &'a Ctx,
        at: u64,
        len: u64,
    ) -> LocalBoxFuture<'a, IoResult<()>> {
        Box::pin(async move {
            let entered = self.0.enter().await;
            let before = storage.len();
            storage.allocate(cx, at, len).await?;
            if storage.len() > before {
                entered.tell_len(storage.len());
            }
            Ok(())
        })
    }

    fn set_len<'a>(
        &'a self,
        storage: &'a StorageHandle,
        cx: &'a Ctx,
        len: u64,
    ) -> LocalBoxFuture<'a, IoResult<()>> {
        Box::pin(async move {
            let entered = self.0.enter().await;
            storage.set_len(cx, len).await?;
            entered.tell_len(len);
            Ok(())
        })
    }
}
