//! The names in a qcow2 image: header, refcount table and blocks, active L1 table, L2 tables, data clusters.
//! Snapshots and bitmaps are not made by the operations under test.

use std::collections::BTreeMap;

use infill_sim::Media;

use super::{Layout, Name, be32, be64, words};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const COPIED: u64 = 1 << 63;
const DIRTY: u64 = 1;
const EXTENDED_L2: u64 = 1 << 4;
/// Clusters of a file, for the sake of memory.
const CLUSTERS_MAX: u64 = 1 << 22;

pub(super) fn parse(media: &Media) -> Result<Layout, String> {
    if be32(media, 0) != 0x5146_49fb {
        return Err("no qcow2 magic".into());
    }
    let version = be32(media, 4);
    let cluster_bits = be32(media, 20);
    if !(9..=21).contains(&cluster_bits) {
        return Err(format!("cluster_bits is {cluster_bits}"));
    }
    let cluster_bytes = 1 << cluster_bits;
    let incompatible = if version >= 3 { be64(media, 72) } else { 0 };
    let order = if version >= 3 { be32(media, 96) } else { 4 };
    let dirty = incompatible & DIRTY != 0;
    let mut layout = Layout { cluster_bytes, dirty, ..Layout::default() };
    layout.name(0, Name::Header);
    layout.refcounts = Some(refcounts(media, &mut layout, order)?);
    let extended = incompatible & EXTENDED_L2 != 0;
    mappings(media, &mut layout, extended)?;
    Ok(layout)
}

fn check_offset(layout: &Layout, at: u64, what: &str) -> Result<(), String> {
    if !at.is_multiple_of(layout.cluster_bytes) || at / layout.cluster_bytes > CLUSTERS_MAX {
        return Err(format!("{what} at {at:#x}"));
    }
    Ok(())
}

fn refcounts(media: &Media, layout: &mut Layout, order: u32) -> Result<BTreeMap<u64, u64>, String> {
    let (table, clusters) = (be64(media, 48), u64::from(be32(media, 56)));
    check_offset(layout, table, "the refcount table")?;
    let table_bytes = clusters * layout.cluster_bytes;
    layout.name_run(table, table_bytes, Name::RefcountTable);
    let mut counts = BTreeMap::new();
    let entries = (layout.cluster_bytes * 8) >> order;
    for (nth, entry) in words(media, table, table_bytes, u64::from_be_bytes) {
        check_offset(layout, entry, "a refcount block")?;
        layout.name(entry, Name::RefcountBlock);
        let mut block = vec![0; layout.cluster_bytes as usize];
        media.read(entry, &mut block);
        for index in 0..entries {
            let count = refcount(&block, index, order);
            if count > 0 {
                counts.insert(nth * entries + index, count);
            }
        }
    }
    Ok(counts)
}

fn refcount(block: &[u8], index: u64, order: u32) -> u64 {
    if order < 3 {
        let bit = index << order;
        let byte = block[(bit / 8) as usize];
        return u64::from(byte >> (bit % 8)) & ((1 << (1 << order)) - 1);
    }
    let width = 1_usize << (order - 3);
    let start = index as usize * width;
    block[start..start + width].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn mappings(media: &Media, layout: &mut Layout, extended: bool) -> Result<(), String> {
    let (l1, l1_entries) = (be64(media, 40), u64::from(be32(media, 36)));
    check_offset(layout, l1, "the L1 table")?;
    layout.name_run(l1, l1_entries * 8, Name::L1Table);
    let cluster_bytes = layout.cluster_bytes;
    let l2_entries = cluster_bytes / if extended { 16 } else { 8 };
    for (l1_index, entry) in words(media, l1, l1_entries * 8, u64::from_be_bytes) {
        let table = entry & OFFSET;
        check_offset(layout, table, "an L2 table")?;
        layout.name(table, Name::L2Table);
        for (nth, word) in words(media, table, cluster_bytes, u64::from_be_bytes) {
            if extended && nth % 2 == 1 {
                continue;
            }
            if word & COMPRESSED != 0 {
                let bits = cluster_bytes.trailing_zeros();
                let shift = 62 - (bits - 8);
                let at = word & ((1 << shift) - 1);
                let sectors = (word & !(COPIED | COMPRESSED)) >> shift;
                let end = at - at % 512 + (sectors + 1) * 512;
                let index = if extended { nth / 2 } else { nth };
                let guest = (l1_index * l2_entries + index) * cluster_bytes;
                for cluster in at >> bits..=(end - 1) >> bits {
                    layout.name(cluster << bits, Name::Packed(guest));
                }
                continue;
            }
            let host = word & OFFSET;
            if host == 0 {
                continue;
            }
            check_offset(layout, host, "a data cluster")?;
            let index = if extended { nth / 2 } else { nth };
            layout.name(host, Name::Data((l1_index * l2_entries + index) * cluster_bytes));
        }
    }
    Ok(())
}
