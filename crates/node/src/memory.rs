//! The reference overlay: units in memory that are data, zero or absent. What every format is compared with.

use bytes::{Bytes, BytesMut};
use infill_base::{
    Ctx, ErrorKind, Extent, ExtentKind, Extents, Gather, IoError, IoResult, Limits, WriteFlags, ZeroFlags,
    align_down, align_up, push_extent, range_end,
};
use infill_storage::RangeLock;
use infill_storage::sync::{Mutex, lock};

use crate::{BackingSlot, Below, Node, NodeHandle, NodeInfo, Populated, generic};

#[derive(Clone, Debug)]
enum Unit {
    Absent,
    Zero,
    Data(Box<[u8]>),
}

/// An overlay in memory.
pub struct MemoryOverlay {
    unit: u64,
    len: u64,
    units: Mutex<Vec<Unit>>,
    ranges: RangeLock,
    backing: BackingSlot,
}

impl MemoryOverlay {
    /// An empty overlay of `len` bytes in units of `unit` bytes (a power of two).
    pub fn new(len: u64, unit: u64, backing: Option<NodeHandle>) -> MemoryOverlay {
        assert!(unit.is_power_of_two(), "the unit must be a power of two");
        MemoryOverlay {
            unit,
            len,
            units: Mutex::new(vec![Unit::Absent; len.div_ceil(unit) as usize]),
            ranges: RangeLock::new(),
            backing: BackingSlot::new(backing),
        }
    }

    fn check(&self, at: u64, len: u64) -> IoResult<()> {
        range_end(at, len, self.len)
            .map(|_| ())
            .ok_or_else(|| IoError::new(ErrorKind::InvalidInput, "behind the end of the disk").at(at, len))
    }

    fn kind(&self, index: u64) -> ExtentKind {
        match lock(&self.units)[index as usize] {
            Unit::Absent => ExtentKind::Absent,
            Unit::Zero => ExtentKind::Zero,
            Unit::Data(_) => ExtentKind::Data,
        }
    }

    /// Fills `into` from byte `inside` of a unit; false if it is absent.
    fn copy_present(&self, index: u64, inside: usize, into: &mut [u8]) -> bool {
        match &lock(&self.units)[index as usize] {
            Unit::Absent => return false,
            Unit::Zero => into.fill(0),
            Unit::Data(bytes) => into.copy_from_slice(&bytes[inside..inside + into.len()]),
        }
        true
    }

    /// Gives (unit, offset in it, offset in the range, length) for every piece of the range.
    fn pieces(&self, at: u64, len: u64) -> impl Iterator<Item = (u64, usize, usize, usize)> + use<> {
        let unit = self.unit;
        let mut next = at;
        std::iter::from_fn(move || {
            (next < at + len).then(|| {
                let end = (align_down(next, unit) + unit).min(at + len);
                let piece =
                    (next / unit, (next % unit) as usize, (next - at) as usize, (end - next) as usize);
                next = end;
                piece
            })
        })
    }

    /// Writes `data` into present units, and into absent ones over `below`, which starts at their first byte.
    fn store(&self, at: u64, data: &[u8], below: &[Option<Bytes>]) {
        let mut units = lock(&self.units);
        for (nth, (index, inside, from, len)) in self.pieces(at, data.len() as u64).enumerate() {
            let unit = &mut units[index as usize];
            if !matches!(unit, Unit::Data(_)) {
                let mut fresh = vec![0; self.unit as usize].into_boxed_slice();
                if let (Unit::Absent, Some(Some(below))) = (&unit, below.get(nth)) {
                    fresh[..below.len()].copy_from_slice(below);
                }
                *unit = Unit::Data(fresh);
            }
            if let Unit::Data(bytes) = unit {
                bytes[inside..inside + len].copy_from_slice(&data[from..from + len]);
            }
        }
    }
}

impl generic::LocalWrite for MemoryOverlay {
    fn ranges(&self) -> &RangeLock {
        &self.ranges
    }

    async fn write_absent(&self, _cx: &Ctx, at: u64, data: Bytes) -> IoResult<()> {
        self.store(at, &data, &[]);
        Ok(())
    }
}

impl Node for MemoryOverlay {
    fn limits(&self) -> Limits {
        Limits { preferred_bytes: self.unit as u32, ..Limits::default() }
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn info(&self) -> NodeInfo {
        NodeInfo {
            driver: "memory",
            filename: "memory".into(),
            backing: None,
            cluster_bytes: Some(self.unit),
            read_only: false,
            dirty: false,
            format_specific: Vec::new(),
        }
    }

    async fn read(&self, cx: &Ctx, at: u64, mut buf: BytesMut) -> IoResult<BytesMut> {
        self.check(at, buf.len() as u64)?;
        for (index, inside, from, len) in self.pieces(at, buf.len() as u64) {
            loop {
                let generation = self.backing.generation();
                if self.copy_present(index, inside, &mut buf[from..from + len]) {
                    break;
                }
                let below =
                    self.backing.read(cx, at + from as u64, BytesMut::zeroed(len), generation).await?;
                if let Below::Filled(piece) = below {
                    buf[from..from + len].copy_from_slice(&piece);
                    break;
                }
            }
        }
        Ok(buf)
    }

    async fn write(&self, cx: &Ctx, at: u64, data: Gather, _flags: WriteFlags) -> IoResult<()> {
        let len = data.len() as u64;
        self.check(at, len)?;
        if len == 0 {
            return Ok(());
        }
        let data = data.to_bytes();
        loop {
            // What a copy-up needs is fetched before the range is taken (I4).
            let mut generation = self.backing.generation();
            let mut below = Vec::new();
            for (index, _, _, piece) in self.pieces(at, len) {
                let start = index * self.unit;
                let whole = self.unit.min(self.len - start);
                if self.kind(index) == ExtentKind::Absent && (piece as u64) < whole {
                    let fetched = self.backing.fetch(cx, start, whole).await?;
                    generation = generation.min(fetched.generation);
                    below.push(Some(fetched.data));
                } else {
                    below.push(None);
                }
            }
            let _range =
                self.ranges.exclusive(align_down(at, self.unit), align_up(at + len, self.unit)).await;
            if let Some(_link) = self.backing.begin_link(generation) {
                self.store(at, &data, &below);
                return Ok(());
            }
        }
    }

    async fn write_zeroes(&self, cx: &Ctx, at: u64, len: u64, flags: ZeroFlags) -> IoResult<()> {
        self.check(at, len)?;
        for (index, _, from, piece) in self.pieces(at, len) {
            let start = index * self.unit;
            if piece as u64 == self.unit.min(self.len - start) {
                let _range = self.ranges.exclusive(start, start + self.unit).await;
                lock(&self.units)[index as usize] = Unit::Zero;
            } else {
                let data = infill_base::zero_bytes(piece).into();
                let fua = if flags.contains(ZeroFlags::FUA) { WriteFlags::FUA } else { WriteFlags::empty() };
                Node::write(self, cx, at + from as u64, data, fua).await?;
            }
        }
        Ok(())
    }

    async fn discard(&self, _cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.check(at, len)?;
        for (index, _, _, piece) in self.pieces(at, len) {
            let start = index * self.unit;
            if piece as u64 == self.unit.min(self.len - start) {
                let _range = self.ranges.exclusive(start, start + self.unit).await;
                let now = if self.backing.is_some() { Unit::Zero } else { Unit::Absent };
                lock(&self.units)[index as usize] = now;
            }
        }
        Ok(())
    }

    async fn sync(&self, _cx: &Ctx) -> IoResult<()> {
        Ok(())
    }

    async fn extents(&self, _cx: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        self.check(at, len)?;
        let mut extents = Extents::new();
        for (index, _, from, piece) in self.pieces(at, len) {
            push_extent(&mut extents, Extent::new(at + from as u64, piece as u64, self.kind(index)));
        }
        Ok(extents)
    }

    async fn make_empty(&self, cx: &Ctx) -> IoResult<()> {
        Node::forget(self, cx, 0, self.len).await
    }

    async fn forget(&self, _cx: &Ctx, at: u64, len: u64) -> IoResult<()> {
        self.check(at, len)?;
        for (index, ..) in self.pieces(at, len) {
            let start = index * self.unit;
            let _range = self.ranges.exclusive(start, start + self.unit).await;
            lock(&self.units)[index as usize] = Unit::Absent;
        }
        Ok(())
    }

    fn backing(&self) -> Option<&BackingSlot> {
        Some(&self.backing)
    }

    fn populate_unit(&self) -> u64 {
        self.unit
    }

    async fn populate(&self, cx: &Ctx, at: u64, data: Bytes, generation: u64) -> IoResult<Populated> {
        self.check(at, data.len() as u64)?;
        generic::populate(self, cx, at, data, generation).await
    }

    async fn set_backing_ref(&self, _cx: &Ctx, _backing: Option<crate::BackingRef>) -> IoResult<()> {
        Ok(())
    }
}
