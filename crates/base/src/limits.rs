//! Alignment and size limits, and checked arithmetic on them.

/// The largest single request that a layer must take, in bytes. Callers split above it.
pub const MAX_TRANSFER_BYTES: u64 = 32 << 20;

/// What a storage or node wants of its callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths must be multiples of this (power of two; 1 where any byte will do).
    pub request_align: u32,
    /// Buffers lie best at multiples of this in memory (they are copied where they do not).
    pub memory_align: u32,
    /// The size, in bytes, at which requests are best made (a cluster, a device's optimal I/O).
    pub preferred_bytes: u32,
    /// The largest request, in bytes, at most [`MAX_TRANSFER_BYTES`].
    pub max_transfer: u64,
    /// Whether it takes writes at all.
    pub writable: bool,
    /// Whether zeroes can be written without sending them.
    pub fast_zero: bool,
    /// Whether discard gives space back.
    pub discard: bool,
    /// Whether several connections or reactors may use it with one flush covering all.
    pub multi_conn: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            request_align: 1,
            memory_align: 1,
            preferred_bytes: 4096,
            max_transfer: MAX_TRANSFER_BYTES,
            writable: true,
            fast_zero: true,
            discard: true,
            multi_conn: true,
        }
    }
}

/// `value` rounded down to a multiple of `align` (a power of two).
pub const fn align_down(value: u64, align: u64) -> u64 {
    value & !(align - 1)
}

/// `value` rounded up to a multiple of `align` (a power of two); saturates below `u64::MAX`.
pub const fn align_up(value: u64, align: u64) -> u64 {
    match value.checked_add(align - 1) {
        Some(sum) => align_down(sum, align),
        None => align_down(u64::MAX, align),
    }
}

/// `value / by`, rounded up.
pub const fn div_ceil(value: u64, by: u64) -> u64 {
    value.div_ceil(by)
}

/// The end of a range if it lies inside a disk of `size` bytes.
pub fn range_end(start: u64, len: u64, size: u64) -> Option<u64> {
    start.checked_add(len).filter(|end| *end <= size)
}

/// The whole units of `unit` bytes (a power of two) in `[at, end)` of a disk of `size` bytes, as their first byte and
/// the one behind them; the disk's last unit need not be whole. Where there are none, both are the same.
pub fn whole_units(at: u64, end: u64, size: u64, unit: u64) -> (u64, u64) {
    let first = align_up(at, unit).min(end);
    let last = if end == size { end } else { align_down(end, unit) };
    (first, last.max(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_unit_of_a_disk_may_be_less_than_one() {
        let whole = |at, end| whole_units(at, end, 27, 8);
        assert_eq!(whole(0, 24), (0, 24));
        assert_eq!(whole(1, 23), (8, 16));
        assert_eq!(whole(1, 27), (8, 27));
        assert_eq!(whole(24, 27), (24, 27));
        assert_eq!(whole(25, 27), (27, 27));
        assert_eq!(whole(9, 15), (15, 15));
        assert_eq!(whole(24, 26), (24, 24));
    }
}
