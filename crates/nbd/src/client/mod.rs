//! An NBD export as a storage.
//!
//! [`NbdStorage`] is shared between reactors. Its connections live, with their tasks, on the reactor that called
//! [`NbdStorage::connect`]; requests from anywhere travel there by a queue, and answers come back by one-shots.
//!
//! # Order and priority
//! * What is queued goes by class, strictly: guest > prefetch > around a miss > fill; in a class, by age. What is in
//!   flight is bounded, with a reserve for guests.
//! * Where a read-only export says CAN_MULTI_CONN, guests have a connection of their own beside the main one.
//! * Overlapping changes are never in flight together: each waits until the one before it is answered.
//!
//! # When the server is lost
//! * Requests are held ([`OnLost::Hold`], the default; a deadline in the request's context is kept) or fail
//!   ([`OnLost::Fail`]). What was sent and not answered is sent again. Meanwhile the client connects again, and
//!   compares size, request sizes, flags and names with those at open: another source is never used. Nor is one of use
//!   that breaks the protocol (answers short, for instance). Reads are held until the right one is back and keeps to the
//!   protocol; requests to a *writable* storage fail meanwhile with [`ErrorKind::SourceLost`].
//! * A server counts as lost when the connection ends, or breaks the protocol, or when requests are out and it says
//!   nothing for [`ClientOptions::stall`]. (A network that swallows everything is told sooner by TCP's own probes.)
//! * On a writable storage every acknowledged change is kept until a sync covers it, and sent again after a reconnect
//!   before anything else; then what was in flight; then the rest. A sync in flight is sent again behind them, so that
//!   it answers for everything that was acknowledged before it was called. What is kept is bounded
//!   ([`ClientOptions::unsynced_bytes_max`]): at the bound the client syncs by itself, and writes wait for it.
//! * A FLUSH that the *server* fails poisons the storage: what is stable is unknown, nothing is written any more. If the
//!   server refuses what is sent again, acknowledged writes are lost, and nothing at all is answered any more. A sync that
//!   fails because the source is away has lost nothing; it may be asked for again.
//!
//! # TLS
//! With credentials ([`ClientOptions::tls`]) STARTTLS is the first thing that is asked, on every connection; a server that
//! refuses it, or whose certificate is not accepted, is not spoken with. An encrypted connection that ends without the
//! server's close_notify was lost, as any other.
//!
//! # What the protocol cannot give
//! A connection that is lost says nothing about what the server still does with requests that it has read. A server
//! that is alive, and slow enough to carry out an old write after a newer one from the next connection, breaks the order;
//! NBD has no fence against that. What the client can do, it does: a TCP connection that it leaves is aborted, so that
//! nothing of it is delivered later than what replaces it.
//!
//! # Futures
//! A dropped future leaves nothing behind: what is queued is taken out; a change that was sent goes on, as with every
//! storage; any other answer is thrown away when it comes.

mod list;
mod negotiate;
mod reply;
mod session;
mod shared;
mod supervise;
mod unsynced;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;

pub use list::{ListedExport, list_exports};

use std::future::Future;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::{join_all, try_join_all};
use infill_base::{
    Ctx, ErrorKind, Extent, ExtentKind, Extents, Gather, IoError, IoResult, Limits, MAX_TRANSFER_BYTES,
    OpenError, WriteFlags, ZeroFlags, range_end, zero_bytes,
};
use infill_storage::stream::Connector;
use infill_storage::sync::Arc;
use infill_storage::{RangeLock, Storage, rt};

use crate::proto::TransmissionFlags;
use crate::tls::ClientTls;
use negotiate::{Agreed, Failed};
use shared::{Answer, Op, Room, Shared};
use unsynced::Unsynced;

/// Unsynced bytes that are kept where nothing else is said.
const UNSYNCED_BYTES: u64 = 32 << 20;
/// Longest write that is one request, in bytes. (What is kept is accounted for by request.)
const WRITE_BYTES_MAX: u64 = 4 << 20;
/// Longest range of one request for zeroes or a discard, in bytes: fits 32 bits, whatever was negotiated.
const ZERO_BYTES_MAX: u64 = 1 << 30;
/// Longest range of one question for extents, in bytes.
const STATUS_BYTES_MAX: u64 = 1 << 40;

/// What happens to requests while the server is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLost {
    /// They wait, at most for as long as the server is away for `limit` (`None`: for ever); then they fail until it is
    /// back.
    Hold {
        /// How long.
        limit: Option<Duration>,
    },
    /// They fail with [`ErrorKind::SourceLost`] until it is back.
    Fail,
}

/// How an export is used.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Its name; the empty one is the server's default.
    pub export: String,
    /// What the storage calls itself, for instance its URI; `None` makes a name of the server and the export.
    pub name: Option<String>,
    /// Nothing is written. (Default: true.)
    pub read_only: bool,
    /// Most connections; two are used at most.
    pub connections_max: usize,
    /// How long the server may take to agree on a connection, from the first byte to the last.
    pub handshake_timeout: Duration,
    /// The same for the second connection, which is done without where it takes longer.
    pub open_timeout: Duration,
    /// What happens to requests while the server is away.
    pub on_lost: OnLost,
    /// How long the server may say nothing while requests are out, before it counts as lost. (`None`: for ever.)
    pub stall: Option<Duration>,
    /// Credentials: with them, every connection is encrypted or is none. (Default: `None`, in the clear.)
    pub tls: Option<ClientTls>,
    /// Acknowledged bytes that may be unsynced; at this bound the client syncs by itself.
    pub unsynced_bytes_max: u64,
}

impl Default for ClientOptions {
    fn default() -> Self {
        ClientOptions {
            export: String::new(),
            name: None,
            read_only: true,
            connections_max: 2,
            handshake_timeout: Duration::from_secs(10),
            open_timeout: Duration::from_secs(2),
            on_lost: OnLost::Hold { limit: None },
            stall: Some(Duration::from_secs(30)),
            tls: None,
            unsynced_bytes_max: UNSYNCED_BYTES,
        }
    }
}

/// Whether a server is there.
#[derive(Clone, Debug)]
pub enum SourceState {
    /// It is.
    Connected,
    /// It is not, for this reason; the client is connecting again.
    Lost(IoError),
}

/// An export of an NBD server. Cloning shares it; its connections end when the last clone goes.
#[derive(Clone, Debug)]
pub struct NbdStorage(Arc<Handle>);

/// The last one to go ends the connections.
struct Handle {
    shared: Arc<Shared>,
    /// Keeps overlapping changes apart.
    changes: RangeLock,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Handle").field(&self.shared.name).finish()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.shared.changed.notify(usize::MAX);
        self.shared.wake();
    }
}

/// Tells when the source is lost and when it is back. Does not keep the connection up.
pub struct SourceWatch {
    shared: Arc<Shared>,
    seen: u64,
}

impl SourceWatch {
    /// The state after the next change (the newest, if there were several), or `None` when the storage is closed.
    pub async fn next(&mut self) -> Option<SourceState> {
        loop {
            let changed = self.shared.changed.listen();
            {
                let state = self.shared.state();
                if state.changes != self.seen {
                    self.seen = state.changes;
                    return Some(state.source.clone());
                }
                if state.closed {
                    return None;
                }
            }
            changed.await;
        }
    }
}

impl NbdStorage {
    /// Opens an export. Nobody there, or a server that does not want to, is an error at once; only a server that was
    /// there once is waited for.
    pub async fn connect(
        connector: Arc<dyn Connector>,
        options: ClientOptions,
    ) -> Result<NbdStorage, OpenError> {
        let name = name_of(&options, connector.as_ref());
        let open = supervise::connect(connector.as_ref(), &options, options.handshake_timeout).await;
        let open = open.map_err(|failed| match failed {
            Failed::Broke(error) => OpenError::Malformed { format: "NBD", what: format!("{name}: {error}") },
            Failed::Lost(error) | Failed::Refused(error) => OpenError::Io(error.in_node(&name)),
        })?;
        if !options.read_only {
            check_writable(&open.agreed, &name)?;
        }
        let shared = Arc::new(Shared::new(connector, options, name, open.agreed.clone()));
        shared.same_source(&open.agreed).map_err(|failed| OpenError::Io(failed.into()))?;
        rt::spawn(supervise::supervise(shared.clone(), Some(open)));
        Ok(NbdStorage(Arc::new(Handle { shared, changes: RangeLock::new() })))
    }

    /// Opens an export that has `bytes`, read-only, whether its server is there or not: requests to it wait as they do for
    /// one that was lost, and a server where the export has another size is not used.
    pub fn await_export(connector: Arc<dyn Connector>, options: ClientOptions, bytes: u64) -> NbdStorage {
        let options = ClientOptions { read_only: true, ..options };
        let name = name_of(&options, connector.as_ref());
        let shared = Arc::new(Shared::new(connector, options, name, Agreed::expected(bytes)));
        shared.await_first();
        rt::spawn(supervise::supervise(shared.clone(), None));
        NbdStorage(Arc::new(Handle { shared, changes: RangeLock::new() }))
    }

    /// Whether the server is there now, as far as is known.
    pub fn is_connected(&self) -> bool {
        matches!(self.source(), SourceState::Connected)
    }

    /// Whether the server is there now, and why not.
    pub fn source(&self) -> SourceState {
        self.0.shared.state().source.clone()
    }

    /// Times that the source was lost or came back.
    pub fn source_changes(&self) -> u64 {
        self.0.shared.state().changes
    }

    /// Waits for the source to be lost and to come back, from now on.
    pub fn watch(&self) -> SourceWatch {
        SourceWatch { shared: self.0.shared.clone(), seen: self.source_changes() }
    }

    fn agreed(&self) -> &Agreed {
        self.0.shared.agreed()
    }

    fn has(&self, flag: TransmissionFlags) -> bool {
        self.agreed().flags.contains(flag)
    }

    fn error(&self, kind: ErrorKind, message: impl Into<String>) -> IoError {
        self.0.shared.error(kind, message)
    }

    fn check_range(&self, at: u64, len: u64) -> IoResult<()> {
        let agreed = self.agreed();
        let align = u64::from(agreed.min_block);
        if range_end(at, len, agreed.size).is_none() {
            let why = format!("the range ends behind the export, which has {} bytes", agreed.size);
            return Err(self.error(ErrorKind::InvalidInput, why).at(at, len));
        }
        if !at.is_multiple_of(align) || !len.is_multiple_of(align) {
            let why = format!("the server takes multiples of {align} bytes only");
            return Err(self.error(ErrorKind::InvalidInput, why).at(at, len));
        }
        Ok(())
    }

    fn check_change(&self, at: u64, len: u64) -> IoResult<()> {
        if self.0.shared.options.read_only {
            return Err(self.error(ErrorKind::NotPermitted, "the export was opened read-only").at(at, len));
        }
        if range_end(at, len, self.agreed().size).is_none() {
            let why = format!("an export cannot grow; this one has {} bytes", self.agreed().size);
            return Err(self.error(ErrorKind::NoSpace, why).at(at, len));
        }
        self.check_range(at, len)
    }

    /// Keeps the deadline of a request.
    async fn within<T>(&self, cx: &Ctx, request: impl Future<Output = IoResult<T>>) -> IoResult<T> {
        let Some(deadline) = cx.deadline else { return request.await };
        let left = deadline.saturating_sub(rt::now());
        let late = || Err(self.error(ErrorKind::TimedOut, "the deadline passed before the server answered"));
        if left.is_zero() { late() } else { rt::timeout(left, request).await.unwrap_or_else(late) }
    }

    /// One change, in its turn.
    async fn change(&self, cx: &Ctx, at: u64, op: Op, cost: u64) -> IoResult<()> {
        let shared = &self.0.shared;
        let order = self.0.changes.exclusive(at, at + op.len()).await;
        let room = shared.room(cost).await?;
        shared.submit(cx.class, at, op, Some(order), room)?.await.map(|_| ())
    }

    async fn write_parts(&self, cx: &Ctx, at: u64, data: &Gather, fua: bool) -> IoResult<()> {
        let max = part_max(self.agreed(), WRITE_BYTES_MAX);
        let parts = parts(at, data.len() as u64, max).map(|(start, len)| {
            let part = data.slice((start - at) as usize, len as usize);
            self.change(cx, start, Op::Write { data: part, fua }, Unsynced::cost_of_data(len))
        });
        all(parts).await
    }

    /// Zeroes or discards, in parts of at most `max`; where the server says that a part is too large, in smaller ones.
    async fn range_parts(&self, cx: &Ctx, at: u64, len: u64, op: impl Fn(u64) -> Op) -> IoResult<()> {
        let mut max = align_to(ZERO_BYTES_MAX, self.agreed().min_block);
        loop {
            let cost = Unsynced::cost_of_zeroes();
            let parts = parts(at, len, max).map(|(start, len)| self.change(cx, start, op(len), cost));
            let smaller = part_max(self.agreed(), MAX_TRANSFER_BYTES);
            match all(parts).await {
                Err(error) if error.kind() == ErrorKind::TooLarge && max > smaller => max = smaller,
                other => return other,
            }
        }
    }

    async fn flush(&self, cx: &Ctx) -> IoResult<()> {
        let shared = &self.0.shared;
        let room = Room::none(shared);
        shared.submit(cx.class, 0, Op::Flush { mark: 0 }, None, room)?.await.map(|_| ())
    }
}

fn name_of(options: &ClientOptions, connector: &dyn Connector) -> String {
    let name = options.name.clone();
    name.unwrap_or_else(|| format!("nbd export {:?} at {}", options.export, connector.target()))
}

/// A writable storage needs a server that can say when something is stable.
fn check_writable(agreed: &Agreed, name: &str) -> Result<(), OpenError> {
    if agreed.flags.contains(TransmissionFlags::READ_ONLY) {
        let why =
            format!("{name}: the server exports it read-only; open it read-only, or let it serve writable");
        return Err(OpenError::Refused { why });
    }
    if !agreed.flags.contains(TransmissionFlags::SEND_FLUSH) {
        let why = format!(
            "{name}: the server has no FLUSH, so nothing that is written could ever be called stable; \
             open it read-only, or use a server that has"
        );
        return Err(OpenError::Refused { why });
    }
    Ok(())
}

/// The largest request of at most `limit` bytes that the server takes.
fn part_max(agreed: &Agreed, limit: u64) -> u64 {
    align_to(limit.min(agreed.max_block.into()), agreed.min_block)
}

fn align_to(value: u64, block: u32) -> u64 {
    infill_base::align_down(value, block.into()).max(block.into())
}

/// `len` bytes from `at` in parts of at most `max`.
fn parts(at: u64, len: u64, max: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..len.div_ceil(max)).map(move |index| (at + index * max, max.min(len - index * max)))
}

/// All of them, and the first error.
async fn all(parts: impl Iterator<Item = impl Future<Output = IoResult<()>>>) -> IoResult<()> {
    join_all(parts).await.into_iter().collect()
}

impl Storage for NbdStorage {
    fn limits(&self) -> Limits {
        let agreed = self.agreed();
        let writable = !self.0.shared.options.read_only;
        Limits {
            request_align: agreed.min_block,
            memory_align: 1,
            preferred_bytes: agreed.preferred_block,
            max_transfer: MAX_TRANSFER_BYTES,
            writable,
            fast_zero: writable && agreed.write_zeroes(),
            discard: writable && self.has(TransmissionFlags::SEND_TRIM),
            // Everything that changes the disk goes by one connection.
            multi_conn: true,
        }
    }

    fn len(&self) -> u64 {
        self.agreed().size
    }

    fn name(&self) -> String {
        self.0.shared.name.clone()
    }

    async fn read(&self, cx: &Ctx, at: u64, buf: BytesMut) -> IoResult<BytesMut> {
        self.check_range(at, buf.len() as u64)?;
        let shared = &self.0.shared;
        let max = part_max(self.agreed(), MAX_TRANSFER_BYTES);
        let (mut rest, mut tickets) = (buf, Vec::new());
        for (start, len) in parts(at, rest.len() as u64, max) {
            let part = rest.split_to(len as usize);
            tickets.push(shared.submit(cx.class, start, Op::Read(part), None, Room::none(shared))?);
        }
        let answers = self.within(cx, try_join_all(tickets)).await?;
        let mut whole = BytesMut::new();
        for answer in answers {
            if let Answer::Data(part) = answer {
                // The parts lie behind each other in memory still: nothing is copied.
                whole.unsplit(part);
            }
        }
        Ok(whole)
    }

    async fn write(&self, cx: &Ctx, at: u64, data: Gather, flags: WriteFlags) -> IoResult<()> {
        self.check_change(at, data.len() as u64)?;
        let wanted = flags.contains(WriteFlags::FUA);
        let fua = wanted && self.has(TransmissionFlags::SEND_FUA) && !data.is_empty();
        self.within(cx, async {
            self.write_parts(cx, at, &data, fua).await?;
            if wanted && !fua { self.flush(cx).await } else { Ok(()) }
        })
        .await
    }

    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.check_change(at, len)?;
        let wanted = flags.contains(ZeroFlags::FUA);
        let fua = wanted && self.has(TransmissionFlags::SEND_FUA) && len > 0;
        let mut how = flags;
        how.set(ZeroFlags::FUA, fua);
        let fast = flags.contains(ZeroFlags::NO_FALLBACK);
        let can = self.agreed().write_zeroes() && (!fast || self.has(TransmissionFlags::SEND_FAST_ZERO));
        if fast && !can {
            return Err(self
                .error(ErrorKind::Unsupported, "the server cannot write zeroes fast")
                .at(at, len));
        }
        self.within(cx, async {
            if can {
                self.range_parts(cx, at, len, |len| Op::Zeroes { len, flags: how }).await?;
            } else {
                // A part after the other: zeroes of any length cost the memory of one.
                for (start, len) in parts(at, len, part_max(self.agreed(), WRITE_BYTES_MAX)) {
                    let zeroes: Bytes = zero_bytes(len as usize);
                    self.write_parts(cx, start, &zeroes.into(), fua).await?;
                }
            }
            if wanted && !fua { self.flush(cx).await } else { Ok(()) }
        })
        .await
    }

    async fn discard(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.check_change(at, len)?;
        if !self.has(TransmissionFlags::SEND_TRIM) {
            // It may read as it did.
            return Ok(());
        }
        self.within(cx, self.range_parts(cx, at, len, |len| Op::Discard { len })).await
    }

    async fn sync(&self, cx: &Ctx) -> IoResult<()> {
        if self.0.shared.options.read_only {
            return Ok(());
        }
        self.within(cx, self.flush(cx)).await
    }

    async fn set_len(&self, _cx: &Ctx, len: u64) -> IoResult<()> {
        if len == self.agreed().size {
            return Ok(());
        }
        let why = format!("the length of an export is its server's: it has {} bytes", self.agreed().size);
        Err(self.error(ErrorKind::Unsupported, why))
    }

    async fn extents(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        self.check_range(at, len)?;
        let data = Extent { host: Some(at), ..Extent::new(at, len, ExtentKind::Data) };
        if len == 0 {
            return Ok(Extents::new());
        }
        if self.agreed().allocation.is_none() && !self.0.shared.is_awaited() {
            return Ok(vec![data]);
        }
        let shared = &self.0.shared;
        let op = Op::Status { len: len.min(STATUS_BYTES_MAX) };
        let ticket = shared.submit(cx.class, at, op, None, Room::none(shared))?;
        match self.within(cx, ticket).await {
            Ok(Answer::Extents(extents)) => Ok(extents),
            // Nothing is known of it: then it is data, and a read tells what is wrong with it.
            Ok(_) => Ok(vec![data]),
            Err(error) if matches!(error.kind(), ErrorKind::SourceLost | ErrorKind::TimedOut) => Err(error),
            Err(error) => {
                tracing::debug!(storage = %shared.name, %error, "no block status");
                Ok(vec![data])
            }
        }
    }
}
