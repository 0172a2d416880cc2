//! A guest that knows what it wrote: generated operations on a node, each one told to the model.
//!
//! Operations may run at once, as many as the caller likes. Two that touch a part of the same 512-byte sector wait for
//! each other (no medium promises anything less than a sector); those that cover it whole do not.

use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use infill_base::{Ctx, IoError, WriteFlags, ZeroFlags, align_down, align_up};
use infill_node::NodeHandle;
use infill_sim::Rng;
use infill_storage::sync::{Mutex, lock};
use infill_storage::{RangeLock, rt};

use crate::model::{Change, ChangeTicket, Mismatch, Model, Outcome, SECTOR_BYTES};
use crate::payload::payload;

/// What the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestOp {
    /// Read and compare.
    Read {
        /// First byte.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Write a payload of its own.
    Write {
        /// First byte.
        at: u64,
        /// Length in bytes.
        len: u64,
        /// Stable when acknowledged.
        fua: bool,
        /// Compressed, where the node can do that.
        packed: bool,
    },
    /// Write zeroes.
    Zero {
        /// First byte.
        at: u64,
        /// Length in bytes.
        len: u64,
        /// The space may be given back.
        may_unmap: bool,
        /// Stable when acknowledged.
        fua: bool,
    },
    /// Discard.
    Discard {
        /// First byte.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Flush.
    Sync,
}

impl GuestOp {
    /// Whether it touches no sector in part.
    pub fn is_of_whole_sectors(&self) -> bool {
        match self {
            GuestOp::Read { at, len }
            | GuestOp::Write { at, len, .. }
            | GuestOp::Zero { at, len, .. }
            | GuestOp::Discard { at, len } => (at | len).is_multiple_of(SECTOR_BYTES),
            GuestOp::Sync => true,
        }
    }
}

/// The node broke a promise.
#[derive(Clone, Debug)]
pub enum Violation {
    /// It shows what it must not.
    Content {
        /// When: which operation or crash.
        when: String,
        /// What.
        mismatch: Mismatch,
    },
    /// An operation failed that had no reason to.
    Failed {
        /// Which.
        when: String,
        /// The error.
        error: String,
    },
    /// Anything else, in words.
    Broken(String),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::Content { when, mismatch } => write!(f, "{when}: {mismatch}"),
            Violation::Failed { when, error } => write!(f, "{when} failed: {error}"),
            Violation::Broken(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Violation {}

/// How often each kind of operation is drawn; they need not sum up to anything.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// Reads.
    pub read: u64,
    /// Writes.
    pub write: u64,
    /// Zero writes.
    pub zero: u64,
    /// Discards.
    pub discard: u64,
    /// Flushes.
    pub sync: u64,
    /// Of writes and zero writes, how many of 1000 are FUA.
    pub fua_per_mille: u64,
    /// Of writes, how many of 1000 are compressed.
    pub packed_per_mille: u64,
}

impl Mix {
    /// A bit of everything.
    pub const GUEST: Mix =
        Mix { read: 25, write: 50, zero: 9, discard: 6, sync: 10, fua_per_mille: 60, packed_per_mille: 0 };
}

/// Draws operations: of any size and alignment, crowded in a few places so that they meet.
#[derive(Clone, Debug)]
pub struct Generator {
    rng: Rng,
    mix: Mix,
    size: u64,
    unit: u64,
    align: u64,
    places: Vec<u64>,
}

/// Places at which a generator's operations crowd.
const PLACES: usize = 6;

impl Generator {
    /// Operations on a disk of `size` bytes whose (sub)clusters have `unit` bytes, aligned to `align`.
    pub fn new(mut rng: Rng, mix: Mix, size: u64, unit: u64, align: u64) -> Generator {
        let places =
            (0..PLACES).map(|_| align_down(rng.below(size), unit)).chain([0, align_down(size - 1, unit)]);
        Generator { places: places.collect(), rng, mix, size, unit, align }
    }

    /// The same places, but other operations.
    pub fn with_rng(self, rng: Rng) -> Generator {
        Generator { rng, ..self }
    }

    fn range(&mut self) -> (u64, u64) {
        let (rng, unit) = (&mut self.rng, self.unit);
        let near = if rng.per_mille(750) {
            let place = self.places[rng.index(self.places.len())];
            (place + rng.below(4 * unit)).saturating_sub(unit)
        } else {
            rng.below(self.size)
        };
        let (at, len) = match rng.below(10) {
            // Whole units.
            0..=3 => (align_down(near, unit), unit * rng.range(1, 5)),
            // Whole sectors.
            4..=6 => (align_down(near, SECTOR_BYTES), SECTOR_BYTES * rng.range(1, 12)),
            // Anything small.
            7 => (near, rng.range(1, 1500)),
            // Anything, up to a few units.
            8 => (near, rng.range(1, unit * 3 + 2)),
            // From or up to a boundary.
            _ => (align_down(near, unit), rng.range(1, unit + 1)),
        };
        let at = align_down(at.min(self.size - 1), self.align);
        let len = align_up(len, self.align).min(self.size - at);
        (at, len.max(self.align.min(self.size - at)))
    }

    /// The next operation.
    pub fn next_op(&mut self) -> GuestOp {
        let (at, len) = self.range();
        let Mix { read, write, zero, discard, sync, fua_per_mille, packed_per_mille } = self.mix;
        let packed = packed_per_mille > 0 && self.rng.per_mille(packed_per_mille);
        let fua = self.rng.per_mille(fua_per_mille);
        let mut drawn = self.rng.below(read + write + zero + discard + sync);
        for (weight, op) in [
            (read, GuestOp::Read { at, len }),
            (write, GuestOp::Write { at, len, fua, packed }),
            (zero, GuestOp::Zero { at, len, may_unmap: self.rng.per_mille(500), fua }),
            (discard, GuestOp::Discard { at, len }),
        ] {
            if drawn < weight {
                return op;
            }
            drawn -= weight;
        }
        GuestOp::Sync
    }

    /// A number below `end`, for whoever drives the guest.
    pub fn below(&mut self, end: u64) -> u64 {
        self.rng.below(end)
    }
}

/// Something told at an answered flush.
type OnStable = Rc<dyn Fn()>;

/// A guest on one node. Cloning shares it.
#[derive(Clone)]
pub struct Guest {
    node: NodeHandle,
    model: Arc<Mutex<Model>>,
    sectors: RangeLock,
    next_op: Arc<AtomicU32>,
    on_stable: Option<OnStable>,
}

impl Guest {
    /// A guest on `node`, which shows what `model` says.
    pub fn new(node: NodeHandle, model: Arc<Mutex<Model>>) -> Guest {
        let next_op = Arc::new(AtomicU32::new(1));
        Guest { node, model, sectors: RangeLock::new(), next_op, on_stable: None }
    }

    /// Calls `on_stable` whenever a flush or FUA write was answered and the model knows it.
    pub fn on_stable(mut self, on_stable: impl Fn() + 'static) -> Guest {
        self.on_stable = Some(Rc::new(on_stable));
        self
    }

    /// The same guest, on another node with the same content (the image was opened again).
    pub fn on_node(&self, node: NodeHandle) -> Guest {
        Guest { node, ..self.clone() }
    }

    /// The node.
    pub fn node(&self) -> &NodeHandle {
        &self.node
    }

    /// The model.
    pub fn model(&self) -> &Arc<Mutex<Model>> {
        &self.model
    }

    fn stable(&self) {
        if let Some(told) = &self.on_stable {
            told();
        }
    }

    /// Does one operation, and compares what it shows.
    pub async fn apply(&self, op: GuestOp) -> Result<(), Violation> {
        match op {
            GuestOp::Read { at, len } => self.read(at, len).await,
            GuestOp::Sync => self.sync().await,
            GuestOp::Write { at, len, fua, packed } => {
                let number = self.next_op.fetch_add(1, Ordering::Relaxed);
                let data = payload(number, at, len as usize);
                let mut flags = WriteFlags::empty();
                flags.set(WriteFlags::FUA, fua);
                flags.set(WriteFlags::COMPRESSED, packed);
                let write = || self.node.write(&Ctx::GUEST, at, data.clone(), flags);
                let when = format!("operation {number}, {op:?}");
                self.change(at, Change::Write(data.clone()), fua, when, write).await
            }
            GuestOp::Zero { at, len, may_unmap, fua } => {
                let mut flags = ZeroFlags::empty();
                flags.set(ZeroFlags::MAY_UNMAP, may_unmap);
                flags.set(ZeroFlags::FUA, fua);
                let zero = || self.node.write_zeroes(&Ctx::GUEST, at, len, flags);
                self.change(at, Change::Zero(len), fua, format!("{op:?}"), zero).await
            }
            GuestOp::Discard { at, len } => {
                let discard = || self.node.discard(&Ctx::GUEST, at, len);
                self.change(at, Change::Discard(len), false, format!("{op:?}"), discard).await
            }
        }
    }

    /// Begins a change and drops its future when `patience` is over: it may happen until [`Guest::settled`].
    /// Reads and flushes are done to their end. The range must consist of whole sectors.
    pub async fn apply_or_drop(
        &self,
        op: GuestOp,
        patience: Duration,
    ) -> Result<Option<ChangeTicket>, Violation> {
        let (at, change) = match op {
            GuestOp::Write { at, len, .. } => {
                let number = self.next_op.fetch_add(1, Ordering::Relaxed);
                (at, Change::Write(payload(number, at, len as usize)))
            }
            GuestOp::Zero { at, len, .. } => (at, Change::Zero(len)),
            GuestOp::Discard { at, len } => (at, Change::Discard(len)),
            GuestOp::Read { .. } | GuestOp::Sync => return self.apply(op).await.map(|()| None),
        };
        let (first, last) = (at / SECTOR_BYTES, (at + change.len()) / SECTOR_BYTES);
        let _sectors = self.sectors.shared(first, last).await;
        let ticket = lock(&self.model).begin(at, &change);
        let node = &self.node;
        let run = async {
            match change {
                Change::Write(data) => node.write(&Ctx::GUEST, at, data, WriteFlags::empty()).await,
                Change::Zero(len) => node.write_zeroes(&Ctx::GUEST, at, len, ZeroFlags::empty()).await,
                Change::Discard(len) => node.discard(&Ctx::GUEST, at, len).await,
            }
        };
        match rt::timeout(patience, run).await {
            None => Ok(Some(ticket)),
            Some(Ok(())) => {
                lock(&self.model).end(ticket, Outcome::Done);
                Ok(None)
            }
            Some(Err(error)) => {
                lock(&self.model).end(ticket, Outcome::Unknown);
                Err(Violation::Failed { when: format!("{op:?}"), error: error.to_string() })
            }
        }
    }

    /// Nothing that was dropped is under way any more.
    pub fn settled(&self, ticket: ChangeTicket) {
        lock(&self.model).end(ticket, Outcome::Unknown);
    }

    async fn change<F: Future<Output = Result<(), IoError>>>(
        &self,
        at: u64,
        change: Change,
        fua: bool,
        when: String,
        run: impl FnOnce() -> F,
    ) -> Result<(), Violation> {
        let len = change.len();
        let whole = at.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES);
        let (first, last) = (at / SECTOR_BYTES, (at + len).div_ceil(SECTOR_BYTES));
        let _sectors = if whole {
            self.sectors.shared(first, last).await
        } else {
            self.sectors.exclusive(first, last).await
        };
        let ticket = lock(&self.model).begin(at, &change);
        let result = run().await;
        let outcome = match (&result, fua) {
            (Err(_), _) => Outcome::Unknown,
            (Ok(()), true) => Outcome::Stable,
            (Ok(()), false) => Outcome::Done,
        };
        lock(&self.model).end(ticket, outcome);
        if outcome == Outcome::Stable {
            self.stable();
        }
        result.map_err(|error| Violation::Failed { when, error: error.to_string() })
    }

    async fn read(&self, at: u64, len: u64) -> Result<(), Violation> {
        let ticket = lock(&self.model).begin_read(at, len);
        match self.node.read_vec(&Ctx::GUEST, at, len as usize).await {
            Ok(found) => lock(&self.model).end_read(ticket, &found).map_err(|mismatch| Violation::Content {
                when: format!("a read of {len} bytes at {at:#x}"),
                mismatch,
            }),
            Err(error) => {
                lock(&self.model).drop_read(ticket);
                let when = format!("a read of {len} bytes at {at:#x}");
                Err(Violation::Failed { when, error: error.to_string() })
            }
        }
    }

    async fn sync(&self) -> Result<(), Violation> {
        let ticket = lock(&self.model).begin_sync();
        let result = self.node.sync(&Ctx::GUEST).await;
        result.map_err(|error| Violation::Failed { when: "a flush".into(), error: error.to_string() })?;
        lock(&self.model).end_sync(ticket);
        self.stable();
        Ok(())
    }

    /// Reads the whole disk, piece by piece, as somebody who compares (not as a guest: nothing is kept in an overlay).
    pub async fn compare_all(&self) -> Result<(), Violation> {
        let content = read_all(&self.node).await?;
        lock(&self.model)
            .check_live(&content)
            .map_err(|mismatch| Violation::Content { when: "the whole disk".into(), mismatch })
    }
}

/// Pieces in which a whole disk is read: small enough that the allocator keeps them at hand.
const PIECE_BYTES: u64 = 64 << 10;

/// Reads a whole node in the class of a job, piece by piece; `see` is told each one with its first byte.
pub(crate) async fn read_pieces(
    node: &NodeHandle,
    mut see: impl FnMut(u64, &[u8]) -> Result<(), Violation>,
) -> Result<(), Violation> {
    let (len, mut at) = (node.len(), 0);
    while at < len {
        let piece = node.read_vec(&Ctx::FILL, at, (len - at).min(PIECE_BYTES) as usize).await;
        let piece = piece.map_err(|error| Violation::Failed {
            when: format!("a read of the whole disk at byte {at:#x}"),
            error: error.to_string(),
        })?;
        see(at, &piece)?;
        at += piece.len() as u64;
    }
    Ok(())
}

/// All bytes of a node, read in the class of a job.
pub async fn read_all(node: &NodeHandle) -> Result<Vec<u8>, Violation> {
    let mut out = Vec::with_capacity(node.len() as usize);
    read_pieces(node, |_, piece| {
        out.extend_from_slice(piece);
        Ok(())
    })
    .await?;
    Ok(out)
}
