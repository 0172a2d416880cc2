//! How often each host cluster is referenced, in bounded memory.

use std::ops::Range;

use infill_base::{ErrorKind, IoError, IoResult};
use rustc_hash::FxHashMap;

/// Memory that counters may take, in bytes: enough for 16 TiB of data in clusters of 64 KiB.
pub(super) const COUNTER_BYTES_MAX: usize = 512 << 20;

/// Clusters of one chunk of counters. Chunks exist where something is referenced.
const CHUNK_CLUSTERS: u64 = 4096;
/// What one chunk takes, with its place in the map.
const CHUNK_BYTES: usize = CHUNK_CLUSTERS as usize * 9 / 8 + 64;
/// What a count takes that is too large for a chunk.
const LARGE_BYTES: usize = 48;
/// Says that the count is among the large ones.
const LARGE: u8 = u8::MAX;

struct Chunk {
    counts: [u8; CHUNK_CLUSTERS as usize],
    /// Clusters whose refcount on the disk is exactly one.
    ones: [u64; CHUNK_CLUSTERS as usize / 64],
}

/// Counters of host clusters.
#[derive(Default)]
pub(super) struct Counts {
    chunks: FxHashMap<u64, Box<Chunk>>,
    large: FxHashMap<u64, u64>,
    end: u64,
}

impl Counts {
    fn chunk(&mut self, cluster: u64) -> IoResult<&mut Chunk> {
        let key = cluster / CHUNK_CLUSTERS;
        let taken = self.chunks.len() * CHUNK_BYTES + self.large.len() * LARGE_BYTES;
        if taken > COUNTER_BYTES_MAX && !self.chunks.contains_key(&key) {
            return Err(too_large());
        }
        Ok(self.chunks.entry(key).or_insert_with(|| {
            Box::new(Chunk { counts: [0; CHUNK_CLUSTERS as usize], ones: [0; CHUNK_CLUSTERS as usize / 64] })
        }))
    }

    /// Counts `by` more references of each of the clusters.
    pub(super) fn add(&mut self, clusters: Range<u64>, by: u64) -> IoResult<()> {
        self.end = self.end.max(clusters.end);
        for cluster in clusters {
            let count = &mut self.chunk(cluster)?.counts[(cluster % CHUNK_CLUSTERS) as usize];
            let small = u64::from(*count).saturating_add(by);
            if *count != LARGE && small < u64::from(LARGE) {
                *count = small as u8;
                continue;
            }
            let before = if *count == LARGE { 0 } else { u64::from(*count) };
            *count = LARGE;
            if self.large.len() * LARGE_BYTES > COUNTER_BYTES_MAX {
                return Err(too_large());
            }
            let large = self.large.entry(cluster).or_insert(before);
            *large = large.saturating_add(by);
        }
        Ok(())
    }

    /// How often a cluster is referenced.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let Some(chunk) = self.chunks.get(&(cluster / CHUNK_CLUSTERS)) else { return 0 };
        match chunk.counts[(cluster % CHUNK_CLUSTERS) as usize] {
            LARGE => self.large.get(&cluster).copied().unwrap_or(0),
            count => u64::from(count),
        }
    }

    /// Notes that the disk says 1 for a cluster.
    pub(super) fn note_one(&mut self, cluster: u64) {
        if let Some(chunk) = self.chunks.get_mut(&(cluster / CHUNK_CLUSTERS)) {
            let nth = (cluster % CHUNK_CLUSTERS) as usize;
            chunk.ones[nth / 64] |= 1 << (nth % 64);
        }
    }

    /// Whether the disk says 1 for a cluster that is referenced.
    pub(super) fn is_one(&self, cluster: u64) -> bool {
        let nth = (cluster % CHUNK_CLUSTERS) as usize;
        let chunk = self.chunks.get(&(cluster / CHUNK_CLUSTERS));
        chunk.is_some_and(|chunk| chunk.ones[nth / 64] >> (nth % 64) & 1 != 0)
    }

    /// First cluster behind every one that was referenced.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// The ranges that have counters, in ascending order.
    pub(super) fn chunks(&self) -> Vec<Range<u64>> {
        let mut keys: Vec<u64> = self.chunks.keys().copied().collect();
        keys.sort_unstable();
        keys.into_iter().map(|key| key * CHUNK_CLUSTERS..(key + 1) * CHUNK_CLUSTERS).collect()
    }

    /// The referenced clusters of a range, with their counts, in ascending order.
    pub(super) fn in_range(&self, range: Range<u64>) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut keys: Vec<u64> = if (range.end - range.start) / CHUNK_CLUSTERS < self.chunks.len() as u64 {
            (range.start / CHUNK_CLUSTERS..=range.end / CHUNK_CLUSTERS)
                .filter(|key| self.chunks.contains_key(key))
                .collect()
        } else {
            self.chunks.keys().copied().collect()
        };
        keys.sort_unstable();
        keys.into_iter()
            .flat_map(|key| key * CHUNK_CLUSTERS..(key + 1) * CHUNK_CLUSTERS)
            .filter(move |cluster| range.contains(cluster))
            .map(|cluster| (cluster, self.get(cluster)))
            .filter(|(_, count)| *count > 0)
    }
}

fn too_large() -> IoError {
    IoError::new(
        ErrorKind::TooLarge,
        format!(
            "the check needs more than {} MiB for its counters; convert the image to one with larger clusters",
            COUNTER_BYTES_MAX >> 20
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_counts_are_exact() {
        let mut counts = Counts::default();
        for nth in 0..1000 {
            counts.add(5..7, 1 + nth % 3).unwrap();
        }
        counts.add(6..7, u64::MAX).unwrap();
        assert_eq!(counts.get(5), 1999);
        assert_eq!(counts.get(6), u64::MAX);
        assert_eq!(counts.get(7), 0);
        assert_eq!(counts.in_range(0..u64::MAX).collect::<Vec<_>>(), [(5, 1999), (6, u64::MAX)]);
        assert_eq!(counts.in_range(6..7).count(), 1);
        assert_eq!(counts.end(), 7);
    }

    #[test]
    fn scattered_references_end_in_an_error_not_in_all_memory() {
        let mut counts = Counts::default();
        let mut clusters = (0..).map(|nth| nth * CHUNK_CLUSTERS);
        let error = clusters.find_map(|cluster| counts.add(cluster..cluster + 1, 1).err()).unwrap();
        assert_eq!(error.kind(), ErrorKind::TooLarge);
        assert!(counts.chunks.len() * CHUNK_BYTES < COUNTER_BYTES_MAX + (1 << 20));
    }
}
