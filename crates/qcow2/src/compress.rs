//! Compressed clusters, decoded.
//!
//! A compressed cluster's descriptor tells where its bytes begin and in which sector they end, not how many they are:
//! decoding stops once a cluster is whole, and what follows belongs to somebody else. Whatever the bytes are, no more
//! than one cluster is ever made of them, and less than one is an error.
//!
//! Costs: one read of at most a cluster and a sector, one buffer of a cluster. Large clusters are decoded off the
//! reactor. Never writes.

use bytes::{Bytes, BytesMut};
use flate2::{Decompress, FlushDecompress};
use infill_base::{Ctx, ErrorKind, IoError, IoResult};
use infill_storage::{StorageHandle, rt};

use crate::entry::CompressedCluster;
use crate::features::Compression;
use crate::geometry::Geometry;
use crate::metaio;

/// Clusters of at least this size are coded and decoded off the reactor: a hop to another thread costs some 15 µs.
pub(crate) const OFFLOAD_BYTES_MIN: usize = 16 << 10;

/// Reads and decodes a whole cluster.
pub(crate) async fn read_cluster(
    cx: &Ctx,
    storage: &StorageHandle,
    geometry: &Geometry,
    compression: Compression,
    cluster: CompressedCluster,
) -> IoResult<Bytes> {
    let damaged = |what: &str| {
        IoError::new(
            ErrorKind::Corrupt,
            format!(
                "damaged qcow2 image: the compressed cluster ({}) {what}; check the image before it is used on",
                compression.name()
            ),
        )
        .at(cluster.at.0, u64::from(cluster.len))
        .in_node(storage.name())
    };
    if cluster.at.0 >= storage.len() {
        return Err(damaged("lies behind the end of the file"));
    }
    // The file may end in the cluster's last sector, which then reads as zeroes.
    let source = metaio::read(cx, storage, cluster.at.0, cluster.len as usize).await?.freeze();
    let size = geometry.cluster_bytes() as usize;
    let decoded = if size < OFFLOAD_BYTES_MIN {
        decode(compression, &source, size)
    } else {
        let decoded = rt::offload(move || decode(compression, &source, size)).await;
        decoded.map_err(|panicked| IoError::from(panicked).in_node(storage.name()))?
    };
    decoded.map_err(damaged)
}

/// `size` bytes from `source`, which may go on behind them.
fn decode(compression: Compression, source: &[u8], size: usize) -> Result<Bytes, &'static str> {
    let mut out = BytesMut::zeroed(size);
    match compression {
        Compression::Deflate => inflate(source, &mut out)?,
        Compression::Zstd => unzstd(source, &mut out)?,
    }
    Ok(out.freeze())
}

const SHORT: &str = "decodes to less than a cluster";

fn inflate(source: &[u8], out: &mut [u8]) -> Result<(), &'static str> {
    let mut stream = Decompress::new(false);
    // Everything in one call: there is no more input, and no more room, than this.
    stream.decompress(source, out, FlushDecompress::Finish).map_err(|_| "cannot be decoded")?;
    if stream.total_out() == out.len() as u64 { Ok(()) } else { Err(SHORT) }
}

/// Frame by frame, straight into the cluster: so no frame's window takes memory of its own, whatever it claims.
fn unzstd(mut source: &[u8], out: &mut [u8]) -> Result<(), &'static str> {
    let mut decoder = zstd::bulk::Decompressor::new().map_err(|_| "finds no memory to be decoded")?;
    let mut done = 0;
    while done < out.len() {
        if source.is_empty() {
            return Err(SHORT);
        }
        let frame = zstd::zstd_safe::find_frame_compressed_size(source).map_err(|_| "cannot be decoded")?;
        let (frame, rest) =
            source.split_at_checked(frame).filter(|(frame, _)| !frame.is_empty()).ok_or(SHORT)?;
        done += decoder.decompress_to_buffer(frame, &mut out[done..]).map_err(|_| "cannot be decoded")?;
        source = rest;
    }
    Ok(())
}

#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod common;

#[cfg(test)]
mod tests {
    use infill_sim::block_on;
    use proptest::prelude::*;

    use super::common::{arg, file, memory, run_ok};
    use super::*;
    use crate::entry::{L1Entry, L2Entry, L2View};
    use crate::geometry::{L1Index, L2Index};
    use crate::header::{Header, Purpose};

    const CX: Ctx = Ctx::GUEST;

    /// Bytes that compress, but not to nothing, with some clusters that do not.
    fn content(len: usize) -> Vec<u8> {
        let mut state = 1u64;
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let word = (state >> 33) as u32;
            match word % 5 {
                0 => bytes.extend_from_slice(format!("line {} of a text\n", word % 1000).as_bytes()),
                1 => bytes.extend(std::iter::repeat_n(word as u8, (word >> 8) as usize % 3000)),
                2 => bytes.extend((0..word % 700).map(|nth| (state >> (nth % 57)) as u8 ^ nth as u8)),
                _ => bytes.extend_from_slice(b"some words that come again and again, "),
            }
        }
        bytes.truncate(len);
        bytes
    }

    fn converted(dir: &tempfile::TempDir, raw: &[u8], options: &str) -> Vec<u8> {
        let source = file(dir, "source.raw", raw);
        let image = dir.path().join("image.qcow2");
        let args = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, arg(&source), arg(&image)];
        run_ok("qemu-img", &args);
        std::fs::read(image).unwrap()
    }

    /// Every compressed cluster of an image: its guest byte, and where it lies.
    fn compressed(image: &[u8]) -> (Header, Vec<(u64, CompressedCluster)>) {
        let header =
            Header::parse(&image[..image.len().min(65536)], image.len() as u64, Purpose::Use).unwrap();
        let geometry = header.geometry();
        let word = |at: usize| crate::entry::be64(&image[at..]);
        let mut found = Vec::new();
        for l1 in 0..header.l1().count {
            let entry = L1Entry(word(header.l1().at.0 as usize + l1 as usize * 8));
            let Some(table) = entry.view(&geometry).unwrap() else { continue };
            for l2 in 0..geometry.l2_entries() {
                let at = table.at.0 as usize + l2 as usize * geometry.l2_entry_bytes() as usize;
                if let L2View::Compressed(cluster) =
                    L2Entry::from_bytes(&image[at..], &geometry).view(&geometry).unwrap()
                {
                    let guest = geometry.guest_offset(geometry.cluster_at(L1Index(l1), L2Index(l2)));
                    found.push((guest.0, cluster));
                }
            }
        }
        (header, found)
    }

    #[test]
    fn what_qemu_compresses_is_read_in_every_cluster_size_and_type() {
        let dir = tempfile::tempdir().unwrap();
        let raw = content(6 << 20);
        for bits in [9, 12, 14, 16, 21] {
            for kind in ["zlib", "zstd"] {
                for extended in [false, true] {
                    if extended && bits < 14 {
                        continue;
                    }
                    let switch = if extended { "on" } else { "off" };
                    let options =
                        format!("cluster_size={},compression_type={kind},extended_l2={switch}", 1 << bits);
                    let image = converted(&dir, &raw, &options);
                    let (header, clusters) = compressed(&image);
                    let (_, storage) = memory(image);
                    assert!(!clusters.is_empty(), "{options}: nothing is compressed");
                    let (geometry, kind) = (header.geometry(), header.compression());
                    for (guest, cluster) in clusters {
                        let read = read_cluster(&CX, &storage, &geometry, kind, cluster);
                        let data = block_on(read).unwrap_or_else(|error| panic!("{options}: {error}"));
                        let mut expected =
                            raw[guest as usize..raw.len().min(guest as usize + (1 << bits))].to_vec();
                        expected.resize(1 << bits, 0);
                        assert!(data == expected, "{options}: guest byte {guest}");
                    }
                }
            }
        }
    }

    #[test]
    fn damaged_compressed_bytes_are_an_error_or_a_cluster_never_more() {
        let dir = tempfile::tempdir().unwrap();
        let raw = content(256 << 10);
        for kind in ["zlib", "zstd"] {
            let image = converted(&dir, &raw, &format!("cluster_size=4096,compression_type={kind}"));
            let (header, clusters) = compressed(&image);
            let geometry = header.geometry();
            let mut errors = 0;
            for (nth, (_, cluster)) in clusters.into_iter().enumerate() {
                for seed in 0..20 {
                    let mut bad = image.clone();
                    let place = cluster.at.0 as usize + (seed * 37 + nth) % cluster.len as usize;
                    let place = place.min(bad.len() - 1);
                    bad[place] ^= 1 << (seed % 8);
                    if seed == 19 {
                        bad.truncate(place);
                    }
                    let (_, storage) = memory(bad);
                    match block_on(read_cluster(&CX, &storage, &geometry, header.compression(), cluster)) {
                        Ok(data) => assert_eq!(data.len(), 4096),
                        Err(error) => {
                            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                            errors += 1;
                        }
                    }
                }
            }
            assert!(errors > 50, "{kind}: {errors}");
        }
    }

    #[test]
    fn a_cluster_behind_the_end_of_the_file_is_told_from_a_damaged_one() {
        let (_, storage) = memory(vec![0; 65536]);
        let geometry = Geometry::new(3, 16, 4, false).unwrap();
        let cluster = CompressedCluster { at: crate::HostOffset(1 << 40), len: 512 };
        let error = block_on(read_cluster(&CX, &storage, &geometry, Compression::Zstd, cluster)).unwrap_err();
        assert!(error.to_string().contains("behind the end of the file"), "{error}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoders_panic(source in proptest::collection::vec(any::<u8>(), 0..2000), magic: bool) {
            let mut source = source;
            if magic && source.len() >= 4 {
                source[..4].copy_from_slice(&0xfd2f_b528_u32.to_le_bytes());
            }
            for kind in [Compression::Deflate, Compression::Zstd] {
                if let Ok(data) = decode(kind, &source, 4096) {
                    prop_assert_eq!(data.len(), 4096);
                }
            }
        }
    }
}
