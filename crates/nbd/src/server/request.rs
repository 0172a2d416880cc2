//! One request: whether it may be done, and doing it.

use bytes::Bytes;
use futures_util::future::try_join_all;
use infill_base::{
    Class, Ctx, ErrorKind, ExtentKind, Gather, IoError, IoResult, WriteFlags, ZeroFlags, align_down,
    aligned_buffer, range_end,
};
use infill_node::{Port, Through};

use super::handshake::Contexts;
use super::outbox::{Answer, Body, Charge, Failure, Piece};
use super::status::{STATUS_BYTES, block_status};
use crate::proto::{Command, CommandFlags, Mode, PAYLOAD_BYTES_MAX, RequestHeader};

/// What a request holds beside its payload (its future, its answer's header), in bytes, rounded up.
const OVERHEAD_BYTES: u64 = 1024;
/// A prefetch reads this much at a time.
const CACHE_PIECE_BYTES: u64 = 1 << 20;
/// Reads from this size on are looked at for holes, where the node knows them without asking anybody.
const SPARSE_READ_BYTES_MIN: u64 = 64 << 10;
/// Shorter holes are sent as data: another chunk costs more. Also bounds the number of pieces of a read.
const HOLE_BYTES_MIN: u64 = 32 << 10;

/// What a client uses, as it was agreed on.
pub(super) struct Target {
    pub node: Port,
    pub size: u64,
    pub writable: bool,
    /// Whether every change is made stable.
    pub writethrough: bool,
    pub mode: Mode,
    pub contexts: Contexts,
    /// What the client was told that requests are multiples of, in bytes.
    pub request_align: u64,
}

/// A request that may be done.
pub(super) struct Request {
    pub header: RequestHeader,
    /// Of a write.
    pub payload: Bytes,
    pub charge: Charge,
}

/// Whether a command changes the disk or promises that it was changed: it is run to its end whatever happens.
pub(super) fn changes(command: Command) -> bool {
    matches!(command, Command::Write | Command::WriteZeroes | Command::Trim | Command::Flush)
}

/// Bytes that a request holds until its answer is sent.
pub(super) fn cost(header: &RequestHeader) -> u64 {
    OVERHEAD_BYTES
        + match header.command {
            Command::Read | Command::Write => header.len.min(PAYLOAD_BYTES_MAX.into()),
            Command::BlockStatus => STATUS_BYTES,
            Command::Cache => header.len.min(CACHE_PIECE_BYTES),
            _ => 0,
        }
}

impl Target {
    /// Whether the protocol and the export allow the request.
    pub(super) fn check(&self, header: &RequestHeader) -> Result<(), Failure> {
        let invalid = |why: &str| Err(Failure::new(ErrorKind::InvalidInput, why));
        let command = header.command;
        let known = match command {
            Command::Read if self.mode >= Mode::Structured => CommandFlags::DF,
            Command::WriteZeroes => CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
            Command::BlockStatus => CommandFlags::REQ_ONE,
            Command::Write if self.mode == Mode::Extended => CommandFlags::PAYLOAD_LEN,
            Command::Unknown(_) => return invalid("this command is not known"),
            _ => CommandFlags::empty(),
        };
        // FUA is taken with every command.
        let known = if self.may_wait(header) { known | CommandFlags::BACKGROUND } else { known };
        if !(known | CommandFlags::FUA).contains(header.flags) {
            return invalid("this command does not take these flags");
        }
        if command == Command::Flush {
            return match (header.offset, header.len) {
                (0, 0) => Ok(()),
                _ => invalid("a flush has neither offset nor length"),
            };
        }
        if changes(command) && !self.writable {
            return Err(Failure::new(ErrorKind::NotPermitted, "this export is read-only"));
        }
        if range_end(header.offset, header.len, self.size).is_none() {
            let kind = match command {
                Command::Write | Command::WriteZeroes => ErrorKind::NoSpace,
                _ => ErrorKind::InvalidInput,
            };
            let why = format!("the range ends behind the end of the export ({} bytes)", self.size);
            return Err(Failure::new(kind, why));
        }
        let align = self.request_align;
        if !header.offset.is_multiple_of(align) || !header.len.is_multiple_of(align) {
            return invalid(&format!("offset and length must be multiples of {align}"));
        }
        match command {
            Command::Read | Command::Write if header.len > PAYLOAD_BYTES_MAX.into() => {
                let large = command == Command::Read && self.mode >= Mode::Structured;
                let kind = if large { ErrorKind::TooLarge } else { ErrorKind::InvalidInput };
                Err(Failure::new(kind, format!("the payload may have at most {PAYLOAD_BYTES_MAX} bytes")))
            }
            Command::BlockStatus if self.contexts.is_empty() => {
                invalid("no metadata context was chosen for this export")
            }
            Command::BlockStatus if header.len == 0 => invalid("a block status of nothing"),
            _ => Ok(()),
        }
    }

    /// Whether the client says that nobody waits for it. What changes the disk is never put back.
    fn may_wait(&self, header: &RequestHeader) -> bool {
        let may = matches!(header.command, Command::Read | Command::BlockStatus);
        may && self.contexts.background && header.flags.contains(CommandFlags::BACKGROUND)
    }

    /// Does it.
    pub(super) async fn run(&self, request: Request) -> Answer {
        let Request { header, payload, charge } = request;
        let result = self.execute(&header, payload).await;
        Answer { cookie: header.cookie, offset: header.offset, result, charge }
    }

    async fn execute(&self, header: &RequestHeader, payload: Bytes) -> Result<Body, Failure> {
        let (at, len) = (header.offset, header.len);
        let fua = self.writethrough || header.flags.contains(CommandFlags::FUA);
        // As a prefetch, so that a copy-on-read node keeps it as it does what a guest reads.
        let cx = if self.may_wait(header) { Ctx::of(Class::Prefetch) } else { Ctx::GUEST };
        match header.command {
            Command::Read if self.is_plain_read(header) => {
                return Ok(Body::Data(self.read_data(&cx, at, len).await?));
            }
            Command::Write => self.write(&cx, at, payload.into(), fua).await?,
            // All others are boxed: the future of a request is moved to the heap as a whole, and should be small for
            // the two that count.
            _ => return Box::pin(self.execute_rare(&cx, header, fua)).await,
        }
        Ok(Body::Done)
    }

    async fn execute_rare(&self, cx: &Ctx, header: &RequestHeader, fua: bool) -> Result<Body, Failure> {
        let (at, len) = (header.offset, header.len);
        match header.command {
            Command::Read => return self.read_sparse(cx, at, len).await,
            Command::Flush => self.node.sync(cx).await?,
            Command::Trim => self.trim(cx, at, len, fua).await?,
            Command::Cache => self.cache(at, len).await?,
            Command::WriteZeroes => self.write_zeroes(cx, at, len, header.flags, fua).await?,
            Command::BlockStatus => {
                let one = header.flags.contains(CommandFlags::REQ_ONE);
                let status = block_status(&self.node.node(), cx, &self.contexts, at, len, one).await?;
                return Ok(Body::Status(status));
            }
            // Done already, not let through by `check`, or an end of the session.
            Command::Write | Command::Disconnect | Command::Unknown(_) => {}
        }
        Ok(Body::Done)
    }

    /// Pieces that the node takes at once, as (first byte, length).
    fn pieces(&self, at: u64, len: u64) -> impl Iterator<Item = (u64, u64)> + use<> {
        let most = align_down(self.node.limits().max_transfer, self.request_align);
        split(at, len, most)
    }

    /// Whether a read is answered by data alone.
    fn is_plain_read(&self, header: &RequestHeader) -> bool {
        let whole = self.mode == Mode::Simple || header.flags.contains(CommandFlags::DF);
        // Only where the node has a map of its own in memory are holes told without I/O.
        whole || header.len < SPARSE_READ_BYTES_MIN || self.node.node().backing().is_none()
    }

    /// A read that tells holes as holes.
    async fn read_sparse(&self, cx: &Ctx, at: u64, len: u64) -> Result<Body, Failure> {
        let runs = self.runs(cx, at, len).await?;
        let pieces = try_join_all(runs.into_iter().map(|(start, len, zero)| async move {
            Ok::<_, Failure>(if zero {
                Piece::Zeroes(start, len as u32)
            } else {
                Piece::Data(start, self.read_data(cx, start, len).await?)
            })
        }));
        Ok(Body::Pieces(pieces.await?))
    }

    async fn read_data(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Gather> {
        let mut data = Gather::new();
        for (at, len) in self.pieces(at, len) {
            let buf = aligned_buffer(len as usize, self.node.limits().memory_align as usize);
            data.push(self.node.read(cx, at, buf).await?.freeze());
        }
        Ok(data)
    }

    /// Runs of the range as (first byte, length, whether it is zero for sure), from the node's own map alone: what it calls
    /// absent is read.
    async fn runs(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Vec<(u64, u64, bool)>> {
        let (mut runs, mut next): (Vec<(u64, u64, bool)>, u64) = (Vec::new(), at);
        while next < at + len {
            let extents = self.node.extents(cx, next, at + len - next).await?;
            if extents.is_empty() {
                return Err(IoError::new(ErrorKind::Io, "the node gave no extents").at(next, at + len - next));
            }
            for extent in extents {
                next = extent.end();
                let zero = extent.kind == ExtentKind::Zero && extent.len >= HOLE_BYTES_MIN;
                match runs.last_mut() {
                    Some(last) if last.2 == zero => last.1 += extent.len,
                    _ => runs.push((extent.start, extent.len, zero)),
                }
            }
        }
        Ok(runs)
    }

    async fn write(&self, cx: &Ctx, at: u64, data: Gather, fua: bool) -> IoResult<()> {
        let flags = if fua { WriteFlags::FUA } else { WriteFlags::empty() };
        for (piece, len) in self.pieces(at, data.len() as u64) {
            let data = data.slice((piece - at) as usize, len as usize);
            self.node.write(cx, piece, data, flags).await?;
        }
        Ok(())
    }

    async fn trim(&self, cx: &Ctx, at: u64, len: u64, fua: bool) -> IoResult<()> {
        for (at, len) in self.pieces(at, len) {
            self.node.discard(cx, at, len).await?;
        }
        if fua { self.node.sync(cx).await } else { Ok(()) }
    }

    async fn write_zeroes(
        &self,
        cx: &Ctx,
        at: u64,
        len: u64,
        how: CommandFlags,
        fua: bool,
    ) -> Result<(), Failure> {
        let mut flags = ZeroFlags::empty();
        flags.set(ZeroFlags::FUA, fua);
        flags.set(ZeroFlags::MAY_UNMAP, !how.contains(CommandFlags::NO_HOLE));
        flags.set(ZeroFlags::NO_FALLBACK, how.contains(CommandFlags::FAST_ZERO));
        for (at, len) in self.pieces(at, len) {
            let result = self.node.write_zeroes(cx, at, len, flags).await;
            result.map_err(|error| match error.kind() {
                ErrorKind::Unsupported if flags.contains(ZeroFlags::NO_FALLBACK) => {
                    Failure::new(ErrorKind::Unsupported, error.to_string())
                }
                _ => error.into(),
            })?;
        }
        Ok(())
    }

    /// Reads the range for the sake of what keeps it: copy-on-read, a page cache.
    async fn cache(&self, at: u64, len: u64) -> IoResult<()> {
        let cx = Ctx::of(Class::Prefetch);
        for (at, len) in split(at, len, CACHE_PIECE_BYTES) {
            self.read_data(&cx, at, len).await?;
        }
        Ok(())
    }
}

/// Cuts a range into pieces of at most `most` bytes.
fn split(at: u64, len: u64, most: u64) -> impl Iterator<Item = (u64, u64)> {
    let (mut next, end, most) = (at, at + len, most.max(1));
    std::iter::from_fn(move || {
        let piece = (end - next).min(most);
        next += piece;
        (piece > 0).then_some((next - piece, piece))
    })
}
