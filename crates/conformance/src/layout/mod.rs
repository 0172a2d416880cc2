//! What an image on a medium names, read by parsers of this crate's own: they share no code with the drivers, so that a
//! driver's mistake about its format is not repeated in its judgement.

mod qcow2;
mod qed;

use std::collections::BTreeMap;

use infill_sim::Media;

use crate::Format;

/// What a host cluster is named as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    /// The header's cluster.
    Header,
    /// Part of the refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// Part of the L1 table.
    L1Table,
    /// An L2 table, or part of one.
    L2Table,
    /// Guest data: the first guest byte of the cluster.
    Data(u64),
    /// Part of a compressed guest cluster, with others beside it: the first guest byte.
    Packed(u64),
}

/// Who names which host cluster.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// Cluster size in bytes.
    pub cluster_bytes: u64,
    /// By the number of the host cluster, everything that names it.
    pub named: BTreeMap<u64, Vec<Name>>,
    /// Refcounts by the number of the host cluster, where the format has them and they are to be believed.
    pub refcounts: Option<BTreeMap<u64, u64>>,
    /// Whether the image says of itself that it wants a repair: nothing else here is then promised.
    pub dirty: bool,
    /// Whether clusters must lie inside the file, whole.
    pub inside: Option<u64>,
}

impl Layout {
    /// What the image on `media` names; `None` for a format without structure. The error says what is malformed.
    pub fn parse(format: Format, media: &Media) -> Option<Result<Layout, String>> {
        match format {
            Format::Raw => None,
            Format::Qcow2(_) => Some(qcow2::parse(media)),
            Format::Qed(_) => Some(qed::parse(media)),
        }
    }

    fn name(&mut self, at: u64, name: Name) {
        self.named.entry(at / self.cluster_bytes).or_default().push(name);
    }

    fn name_run(&mut self, at: u64, len: u64, name: Name) {
        for index in 0..len.div_ceil(self.cluster_bytes) {
            self.name(at + index * self.cluster_bytes, name);
        }
    }

    /// What the host cluster is named as first.
    pub fn name_of(&self, cluster: u64) -> Option<Name> {
        self.named.get(&cluster).and_then(|names| names.first()).copied()
    }

    /// The first thing that contradicts itself: a cluster that is named twice, counts too little, or lies outside.
    pub fn contradiction(&self) -> Option<String> {
        if self.dirty {
            return None;
        }
        for (cluster, names) in &self.named {
            let packed = names.iter().all(|name| matches!(name, Name::Packed(_)));
            if names.len() > 1 && !packed {
                return Some(format!("host cluster {cluster:#x} is named as {names:?}"));
            }
            if let Some(refcounts) = &self.refcounts
                && refcounts.get(cluster).copied().unwrap_or(0) < names.len() as u64
            {
                return Some(format!("host cluster {cluster:#x}, named as {names:?}, counts too little"));
            }
            if self.inside.is_some_and(|len| (cluster + 1) * self.cluster_bytes > len) {
                return Some(format!(
                    "host cluster {cluster:#x}, named as {names:?}, lies behind the file's end"
                ));
            }
        }
        None
    }
}

fn be64(media: &Media, at: u64) -> u64 {
    let mut bytes = [0; 8];
    media.read(at, &mut bytes);
    u64::from_be_bytes(bytes)
}

fn be32(media: &Media, at: u64) -> u32 {
    let mut bytes = [0; 4];
    media.read(at, &mut bytes);
    u32::from_be_bytes(bytes)
}

/// A table of 8-byte words, read at once; words that lie in zeroes are left out.
fn words(media: &Media, at: u64, len: u64, word: fn([u8; 8]) -> u64) -> Vec<(u64, u64)> {
    if media.is_zero(at, len) {
        return Vec::new();
    }
    let mut bytes = vec![0; len as usize];
    media.read(at, &mut bytes);
    let (words, _) = bytes.as_chunks::<8>();
    let words = words.iter().enumerate().map(|(nth, bytes)| (nth as u64, word(*bytes)));
    words.filter(|(_, word)| *word != 0).collect()
}
