//! The names in a QED image: header, L1 table, L2 tables, data clusters.

use infill_sim::Media;

use super::{Layout, Name, words};

const NEED_CHECK: u64 = 1 << 1;
/// An L2 entry that reads as zeroes.
const ZERO_CLUSTER: u64 = 1;

fn le32(media: &Media, at: u64) -> u32 {
    let mut bytes = [0; 4];
    media.read(at, &mut bytes);
    u32::from_le_bytes(bytes)
}

fn le64(media: &Media, at: u64) -> u64 {
    let mut bytes = [0; 8];
    media.read(at, &mut bytes);
    u64::from_le_bytes(bytes)
}

pub(super) fn parse(media: &Media) -> Result<Layout, String> {
    let mut magic = [0; 4];
    media.read(0, &mut magic);
    if magic != *b"QED\0" {
        return Err("no QED magic".into());
    }
    let cluster_bytes = u64::from(le32(media, 4));
    let (table_clusters, header_clusters) = (u64::from(le32(media, 8)), u64::from(le32(media, 12)));
    if !cluster_bytes.is_power_of_two() || cluster_bytes < 4096 || table_clusters > 16 {
        return Err(format!("clusters of {cluster_bytes} bytes, tables of {table_clusters}"));
    }
    let mut layout = Layout {
        cluster_bytes,
        dirty: le64(media, 16) & NEED_CHECK != 0,
        // The last cluster must be whole: another program rounds the length down.
        inside: Some(media.len() / cluster_bytes * cluster_bytes),
        ..Layout::default()
    };
    layout.name_run(0, header_clusters * cluster_bytes, Name::Header);
    let table_bytes = table_clusters * cluster_bytes;
    let entries = table_bytes / 8;
    let l1 = le64(media, 40);
    let check = |at: u64, what: &str| {
        if at.is_multiple_of(cluster_bytes) && at < 1 << 40 {
            Ok(())
        } else {
            Err(format!("{what} at {at:#x}"))
        }
    };
    check(l1, "the L1 table")?;
    layout.name_run(l1, table_bytes, Name::L1Table);
    for (l1_index, table) in words(media, l1, table_bytes, u64::from_le_bytes) {
        check(table, "an L2 table")?;
        layout.name_run(table, table_bytes, Name::L2Table);
        for (index, host) in words(media, table, table_bytes, u64::from_le_bytes) {
            if host == ZERO_CLUSTER {
                continue;
            }
            check(host, "a data cluster")?;
            layout.name(host, Name::Data((l1_index * entries + index) * cluster_bytes));
        }
    }
    Ok(layout)
}
