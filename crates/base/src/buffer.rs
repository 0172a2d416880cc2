//! Buffers that an operation owns: [`BytesMut`] to read into, [`Gather`] to write from.

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;

/// Payload of one write: byte runs that lie behind each other on the disk.
///
/// Cloning shares the bytes. The runs are never changed after they were given to an operation, so whoever takes
/// bytes from a guest's memory copies them first.
#[derive(Clone, Debug, Default)]
pub struct Gather {
    runs: SmallVec<[Bytes; 3]>,
    len: usize,
}

impl Gather {
    /// An empty payload.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a run; empty ones are dropped.
    pub fn push(&mut self, run: Bytes) {
        if !run.is_empty() {
            self.len += run.len();
            self.runs.push(run);
        }
    }

    /// Appends all runs of `other`.
    pub fn append(&mut self, other: Gather) {
        for run in other.runs {
            self.push(run);
        }
    }

    /// Length in bytes of all runs together.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The runs in order.
    pub fn runs(&self) -> &[Bytes] {
        &self.runs
    }

    /// The runs in order, by value.
    pub fn into_runs(self) -> SmallVec<[Bytes; 3]> {
        self.runs
    }

    /// Shares `len` bytes from byte `start`.
    ///
    /// # Panics
    /// If the range does not lie inside.
    pub fn slice(&self, start: usize, len: usize) -> Gather {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len), "slice outside the payload");
        let mut out = Gather::new();
        let (mut skip, mut left) = (start, len);
        for run in &self.runs {
            if left == 0 {
                break;
            }
            if skip >= run.len() {
                skip -= run.len();
                continue;
            }
            let take = left.min(run.len() - skip);
            out.push(run.slice(skip..skip + take));
            left -= take;
            skip = 0;
        }
        out
    }

    /// The whole payload as one run; copies only where there is more than one.
    pub fn to_bytes(&self) -> Bytes {
        if let [one] = self.runs.as_slice() {
            return one.clone();
        }
        let mut out = BytesMut::with_capacity(self.len);
        for run in &self.runs {
            out.extend_from_slice(run);
        }
        out.freeze()
    }

    /// Whether every byte is zero.
    pub fn is_zero(&self) -> bool {
        self.runs.iter().all(|run| is_zero(run))
    }
}

impl From<Bytes> for Gather {
    fn from(run: Bytes) -> Self {
        let mut out = Gather::new();
        out.push(run);
        out
    }
}

impl From<Vec<u8>> for Gather {
    fn from(run: Vec<u8>) -> Self {
        Bytes::from(run).into()
    }
}

/// Whether every byte of `data` is zero.
pub fn is_zero(data: &[u8]) -> bool {
    let words = data.chunks_exact(16);
    words.remainder().iter().all(|byte| *byte == 0)
        && words.into_iter().all(|word| word.iter().fold(0, |seen, byte| seen | byte) == 0)
}

/// `len` zero bytes to write; short ones share one static page.
pub fn zero_bytes(len: usize) -> Bytes {
    static PAGE: [u8; 64 << 10] = [0; 64 << 10];
    if len <= PAGE.len() { Bytes::from_static(&PAGE[..len]) } else { BytesMut::zeroed(len).freeze() }
}

/// A zeroed buffer of `len` bytes whose first byte lies at a multiple of `align` in memory (a power of two).
pub fn aligned_buffer(len: usize, align: usize) -> BytesMut {
    debug_assert!(align.is_power_of_two());
    if align <= 16 {
        return BytesMut::zeroed(len);
    }
    let mut buffer = BytesMut::zeroed(len + align);
    let skip = buffer.as_ptr().align_offset(align);
    let mut buffer = buffer.split_off(skip);
    buffer.truncate(len);
    buffer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_crosses_runs() {
        let mut gather = Gather::new();
        gather.push(Bytes::from_static(b"abc"));
        gather.push(Bytes::from_static(b"defg"));
        assert_eq!(&gather.slice(2, 3).to_bytes()[..], b"cde");
        assert_eq!(gather.slice(3, 4).runs().len(), 1);
        assert!(gather.slice(7, 0).is_empty());
    }

    #[test]
    fn zero_test_sees_every_byte() {
        for len in 0..70 {
            assert!(is_zero(&vec![0; len]));
            for at in 0..len {
                let mut data = vec![0; len];
                data[at] = 1;
                assert!(!is_zero(&data), "{len} {at}");
            }
        }
    }

    #[test]
    fn aligned_buffers_are_aligned() {
        for align in [1, 16, 512, 4096] {
            let buffer = aligned_buffer(1000, align);
            assert_eq!(buffer.len(), 1000);
            assert_eq!(buffer.as_ptr().align_offset(align), 0);
        }
    }
}
