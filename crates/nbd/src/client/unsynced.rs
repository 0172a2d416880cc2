//! What was written and acknowledged since the last sync, kept to be sent again when the server has died.
//!
//! A map of disjoint runs with the newest content of each. Overlapping writes are never in flight together (a range
//! lock sees to that), so the order of acknowledgements is the order in which the server did them, and what is in the
//! map may be sent again in any order, all at once.
//!
//! Content is *copied* into pieces of at most [`PIECE_BYTES`]: a caller's bytes may be a small part of a large buffer,
//! which would stay alive with them. So [`Unsynced::bytes`] is what the map costs.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use infill_base::Gather;

/// Longest piece of content that is kept as one, in bytes; pieces begin at multiples of it.
const PIECE_BYTES: u64 = 64 << 10;
/// What one run costs beside its content, in bytes (rounded up).
const RUN_COST: u64 = 128;

/// What a run holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// These bytes.
    Data(Bytes),
    /// Zeroes, whose space may be given back or not.
    Zero {
        /// Whether it may.
        may_unmap: bool,
    },
}

#[derive(Debug)]
struct Run {
    len: u64,
    content: Content,
    /// When it was acknowledged, counted in acknowledgements.
    acked: u64,
}

/// Content that is not known to be stable.
#[derive(Debug, Default)]
pub(super) struct Unsynced {
    runs: BTreeMap<u64, Run>,
    bytes: u64,
    acked: u64,
}

impl Unsynced {
    /// What keeping `len` written bytes costs at most, in bytes.
    pub(super) fn cost_of_data(len: u64) -> u64 {
        len + RUN_COST * (len / PIECE_BYTES + 3)
    }

    /// What keeping a run of zeroes costs at most, in bytes: its own, and that of a run that it cuts in two.
    pub(super) fn cost_of_zeroes() -> u64 {
        RUN_COST * 2
    }

    /// What it costs now, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A write was acknowledged.
    pub(super) fn write(&mut self, at: u64, data: &Gather) {
        self.acked += 1;
        self.carve(at, data.len() as u64);
        let (mut done, len) = (0, data.len() as u64);
        while done < len {
            let start = at + done;
            let take = (PIECE_BYTES - start % PIECE_BYTES).min(len - done);
            let mut copy = BytesMut::with_capacity(take as usize);
            for run in data.slice(done as usize, take as usize).runs() {
                copy.extend_from_slice(run);
            }
            self.insert(start, take, Content::Data(copy.freeze()), self.acked);
            done += take;
        }
    }

    /// Zeroes were acknowledged.
    pub(super) fn zero(&mut self, at: u64, len: u64, may_unmap: bool) {
        self.acked += 1;
        self.carve(at, len);
        self.insert(at, len, Content::Zero { may_unmap }, self.acked);
    }

    /// Content that needs no sync was acknowledged: nothing older may overwrite it.
    pub(super) fn stable(&mut self, at: u64, len: u64) {
        self.carve(at, len);
    }

    /// What a flush that is sent now will cover.
    pub(super) fn mark(&self) -> u64 {
        self.acked
    }

    /// The flush that was sent at `mark` succeeded.
    pub(super) fn synced(&mut self, mark: u64) {
        self.runs.retain(|_, run| {
            let keep = run.acked > mark;
            if !keep {
                self.bytes -= cost(run);
            }
            keep
        });
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.runs.clear();
        self.bytes = 0;
    }

    /// Everything that is kept: first byte, length, content. The runs do not overlap.
    pub(super) fn runs(&self) -> impl Iterator<Item = (u64, u64, &Content)> {
        self.runs.iter().map(|(start, run)| (*start, run.len, &run.content))
    }

    fn insert(&mut self, start: u64, len: u64, content: Content, acked: u64) {
        let run = Run { len, content, acked };
        self.bytes += cost(&run);
        let before = self.runs.insert(start, run);
        debug_assert!(before.is_none(), "runs overlap");
    }

    /// Takes a range out; what reaches over its ends is cut.
    fn carve(&mut self, at: u64, len: u64) {
        let end = at + len;
        let first = self.runs.range(..at).next_back().map(|(start, _)| *start);
        let hit = |(start, run): (&u64, &Run)| (start + run.len > at).then_some(*start);
        let starts: Vec<u64> = first
            .and_then(|start| hit((&start, self.runs.get(&start)?)))
            .into_iter()
            .chain(self.runs.range(at..end).filter_map(hit))
            .collect();
        for start in starts {
            let Some(run) = self.runs.remove(&start) else { continue };
            self.bytes -= cost(&run);
            let run_end = start + run.len;
            if start < at {
                self.insert(start, at - start, part(&run.content, 0, at - start), run.acked);
            }
            if run_end > end {
                let left = run_end - end;
                self.insert(end, left, part(&run.content, end - start, left), run.acked);
            }
        }
    }
}

fn cost(run: &Run) -> u64 {
    RUN_COST
        + match &run.content {
            Content::Data(data) => data.len() as u64,
            Content::Zero { .. } => 0,
        }
}

/// A copy of a part, so that a small rest does not keep the whole alive.
fn part(content: &Content, skip: u64, len: u64) -> Content {
    match content {
        Content::Data(data) => {
            Content::Data(Bytes::copy_from_slice(&data[skip as usize..(skip + len) as usize]))
        }
        zero => zero.clone(),
    }
}

#[cfg(test)]
mod tests {
    use infill_sim::Rng;

    use super::*;

    fn content(unsynced: &Unsynced, size: usize) -> Vec<Option<u8>> {
        let mut out = vec![None; size];
        let mut last_end = 0;
        for (start, len, content) in unsynced.runs() {
            assert!(start >= last_end, "runs overlap");
            last_end = start + len;
            for index in 0..len as usize {
                out[start as usize + index] = Some(match content {
                    Content::Data(data) => data[index],
                    Content::Zero { .. } => 0,
                });
            }
        }
        out
    }

    #[test]
    fn the_newest_content_of_every_byte_is_kept_until_a_flush_covers_it() {
        const SIZE: u64 = 300 << 10;
        for seed in 0..3 {
            let mut rng = Rng::new(seed);
            let mut unsynced = Unsynced::default();
            // Per byte: content and when it was acknowledged.
            let mut model: Vec<Option<(u8, u64)>> = vec![None; SIZE as usize];
            let (mut reserved, mut marks) = (0, Vec::new());
            for step in 1..80_u64 {
                let at = rng.below(SIZE);
                let len = rng.range(1, (SIZE - at).min(150 << 10) + 1);
                let range = at as usize..(at + len) as usize;
                match rng.below(10) {
                    0..5 => {
                        let mut data = Gather::new();
                        let cut = rng.below(len) as usize;
                        data.push(vec![step as u8; cut].into());
                        data.push(vec![step as u8; len as usize - cut].into());
                        unsynced.write(at, &data);
                        reserved += Unsynced::cost_of_data(len);
                        model[range].fill(Some((step as u8, step)));
                    }
                    5..7 => {
                        unsynced.zero(at, len, true);
                        reserved += Unsynced::cost_of_zeroes();
                        model[range].fill(Some((0, step)));
                    }
                    7 => {
                        unsynced.stable(at, len);
                        reserved += Unsynced::cost_of_zeroes();
                        model[range].fill(None);
                    }
                    8 => marks.push((unsynced.mark(), step)),
                    _ => {
                        if let Some((mark, when)) = marks.pop() {
                            unsynced.synced(mark);
                            for byte in &mut model {
                                byte.take_if(|(_, acked)| *acked < when);
                            }
                        }
                    }
                }
                let expected: Vec<_> = model.iter().map(|byte| byte.map(|(value, _)| value)).collect();
                assert!(content(&unsynced, SIZE as usize) == expected, "seed {seed} step {step}");
                let held: u64 = unsynced.runs.values().map(cost).sum();
                assert_eq!(unsynced.bytes(), held);
                assert!(held <= reserved, "it costs more than was reserved");
            }
            unsynced.clear();
            assert_eq!((unsynced.bytes(), unsynced.runs().count()), (0, 0));
        }
    }
}
