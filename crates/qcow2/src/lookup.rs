//! From guest bytes to where they lie: the L1 table, a slice of an L2 table, an entry, a run of (sub)clusters.
//!
//! A look-up whose slice is cached waits for nothing. What a damaged table says is an error at the place, never an
//! access: every entry passes its view, and a table behind the end of the file is refused.

use infill_base::{Ctx, ErrorKind, IoError, IoResult};
use infill_node::mapping::{Slice, SliceKey};
use infill_storage::sync::Arc;

use crate::entry::{CompressedCluster, L2Entry, L2TableRef, L2View, StandardCluster, SubclusterState};
use crate::geometry::{GuestCluster, GuestOffset, HostOffset, L2Index};
use crate::image::Image;
use crate::metaio;
use crate::refcount::HostRun;

/// What a run of guest bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Data, contiguous in the file from this byte. Where `copied` is clear it is never written in place.
    Data { host: u64, copied: bool },
    /// Zeroes.
    Zero,
    /// Nothing: look below.
    Absent,
    /// Part of a compressed cluster.
    Compressed(CompressedCluster),
}

/// A run of guest bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) len: u64,
    pub(crate) place: Place,
    /// Every slice that told it has been checked: no entry names metadata.
    pub(crate) checked: bool,
}

impl Run {
    /// Whether `next`, which follows in the guest, is of one piece with this.
    fn joins(&self, next: &Run) -> bool {
        match (self.place, next.place) {
            (Place::Data { host, copied }, Place::Data { host: other, copied: also }) => {
                host + self.len == other && copied == also
            }
            (Place::Zero, Place::Zero) | (Place::Absent, Place::Absent) => true,
            _ => false,
        }
    }
}

impl Image {
    /// The slice that holds an entry of the L2 table at `table`, and the entry's number in it.
    pub(crate) fn slice_key(&self, table: HostOffset, entry: L2Index) -> (SliceKey, usize) {
        let per_slice = self.slices.layout().entries() as u32;
        (SliceKey { table: table.0, index: entry.0 / per_slice }, (entry.0 % per_slice) as usize)
    }

    /// The slice, loaded if need be.
    pub(crate) async fn slice(&self, cx: &Ctx, key: SliceKey) -> IoResult<Arc<Slice>> {
        if let Some(slice) = self.slices.cached(key) {
            return Ok(slice);
        }
        let bytes = self.slices.layout().slice_bytes;
        let at = key.table + u64::from(key.index) * bytes as u64;
        self.slices
            .get(key, || async {
                if key.table >= self.storage.len() {
                    let why = format!(
                        "an L1 entry names an L2 table at byte {}, behind the end of the file",
                        key.table
                    );
                    return Err(self.corrupt(why));
                }
                if self.writer.is_some() {
                    self.check_table(cx, key.table).await?;
                }
                metaio::read(cx, &self.storage, at, bytes).await
            })
            .await
    }

    /// An entry of a slice.
    pub(crate) fn entry(&self, slice: &Slice, index: usize) -> L2Entry {
        let [word, bitmap] = slice.load(index);
        L2Entry { word, bitmap }
    }

    /// The L2 table of a guest cluster.
    pub(crate) fn table(&self, cluster: GuestCluster) -> IoResult<Option<L2TableRef>> {
        let (index, _) = self.geometry.indices(cluster);
        self.l1.get(index).view(&self.geometry).map_err(|error| self.at(cluster, error))
    }

    /// What an entry of `table` says of `cluster`.
    pub(crate) fn view(
        &self,
        table: &L2TableRef,
        slice: &Slice,
        index: usize,
        cluster: GuestCluster,
    ) -> IoResult<L2View> {
        let mut view =
            self.entry(slice, index).view(&self.geometry).map_err(|error| self.at(cluster, error))?;
        if let L2View::Standard(standard) = &mut view {
            // What a shared table names is shared, too.
            standard.copied &= table.copied;
        }
        Ok(view)
    }

    fn at(&self, cluster: GuestCluster, error: impl Into<IoError>) -> IoError {
        let at = self.geometry.guest_offset(cluster).0;
        error.into().at(at, self.geometry.cluster_bytes()).in_node(self.storage.name())
    }

    /// The first run from guest byte `at`, at most `len` bytes. It may end before its kind does where the next slice
    /// is not cached; it has at least one byte where `len` is not 0.
    pub(crate) async fn run_at(&self, cx: &Ctx, at: u64, len: u64) -> IoResult<Run> {
        let (end, mut next) = (at + len, at);
        let mut run = Run { len: 0, place: Place::Absent, checked: true };
        let mut held: Option<Arc<Slice>> = None;
        while next < end {
            let cluster = self.geometry.guest_cluster(GuestOffset(next));
            let (l1_index, l2_index) = self.geometry.indices(cluster);
            let piece = match self.table(cluster)? {
                None => {
                    let table_end =
                        (u64::from(l1_index.0) + 1).saturating_mul(self.geometry.l2_table_guest_bytes());
                    Run { len: table_end.min(end) - next, place: Place::Absent, checked: true }
                }
                Some(table) => {
                    let (key, index) = self.slice_key(table.at, l2_index);
                    if held.as_ref().is_none_or(|slice| slice.key() != key) {
                        held = match self.slices.cached(key) {
                            None if run.len > 0 => break,
                            None => Some(self.slice(cx, key).await?),
                            cached => cached,
                        };
                    }
                    let Some(slice) = &held else { break };
                    let view = self.view(&table, slice, index, cluster)?;
                    Run { checked: slice.is_checked(), ..self.piece(&view, next, end) }
                }
            };
            if run.len == 0 {
                run = piece;
            } else if run.joins(&piece) {
                run.len += piece.len;
                run.checked &= piece.checked;
            } else {
                break;
            }
            next += piece.len;
        }
        Ok(run)
    }

    /// The first run from guest byte `next` in its cluster, at most to `end`.
    fn piece(&self, view: &L2View, next: u64, end: u64) -> Run {
        let geometry = &self.geometry;
        let inside = geometry.in_cluster(next);
        let cluster_end = next - inside + geometry.cluster_bytes();
        match view {
            L2View::Compressed(compressed) => Run {
                len: cluster_end.min(end) - next,
                place: Place::Compressed(*compressed),
                checked: false,
            },
            L2View::Standard(cluster) => {
                let first = geometry.subcluster(GuestOffset(next));
                let run =
                    u64::from(first + cluster.run(first, geometry)) * geometry.subcluster_bytes() - inside;
                Run { len: run.min(end - next), place: place(cluster, first, inside), checked: false }
            }
        }
    }

    /// Refuses to write to host bytes where metadata lies, which only a damaged entry names.
    pub(crate) async fn check_host(&self, cx: &Ctx, host: u64, len: u64) -> IoResult<()> {
        match self.used_otherwise(cx, host, len).await? {
            None => Ok(()),
            Some(what) => Err(self.corrupt(format!("an L2 entry names byte {host}, where the {what} lies"))),
        }
    }

    /// Refuses an L2 table where other metadata lies, which only a damaged L1 entry names.
    pub(crate) async fn check_table(&self, cx: &Ctx, table: u64) -> IoResult<()> {
        match self.metadata_at(cx, table, 1).await? {
            None => Ok(()),
            Some(what) => Err(self.corrupt(format!("an L1 entry names byte {table}, where the {what} lies"))),
        }
    }

    /// What lies at host bytes that an L2 entry must not name.
    async fn used_otherwise(&self, cx: &Ctx, host: u64, len: u64) -> IoResult<Option<&'static str>> {
        let table = self.writer()?.refcounts.has_l2_table(self.host_run(host, len)).then_some("L2 table");
        Ok(self.metadata_at(cx, host, len).await?.or(table))
    }

    fn host_run(&self, host: u64, len: u64) -> HostRun {
        let first = self.geometry.host_cluster(HostOffset(host));
        let last = host.saturating_add(len.saturating_sub(1)) >> self.geometry.cluster_bits();
        HostRun { first, count: last - first.0 + 1, zeroed: false }
    }

    /// What of the metadata that is named above the L1 table's entries lies at host bytes.
    async fn metadata_at(&self, cx: &Ctx, host: u64, len: u64) -> IoResult<Option<&'static str>> {
        self.writer()?.refcounts.metadata_at(cx, self.host_run(host, len)).await
    }

    /// As [`Image::check_host`] for a run that starts at guest byte `at`. Where nothing else is wrong with its slice,
    /// the next write through that need not ask.
    pub(crate) async fn check_run(&self, cx: &Ctx, at: u64, len: u64, host: u64) -> IoResult<()> {
        self.check_host(cx, host, len).await?;
        let cluster = self.geometry.guest_cluster(GuestOffset(at));
        let Some(table) = self.table(cluster)? else { return Ok(()) };
        let (key, _) = self.slice_key(table.at, self.geometry.indices(cluster).1);
        let slice = self.slice(cx, key).await?;
        for index in 0..self.slices.layout().entries() {
            let view = self.entry(&slice, index).view(&self.geometry);
            if let Ok(L2View::Standard(StandardCluster { host: Some(host), .. })) = view
                && self.used_otherwise(cx, host.0, 1).await?.is_some()
            {
                return Ok(());
            }
        }
        slice.set_checked();
        Ok(())
    }

    /// A table or the file contradicts itself.
    pub(crate) fn corrupt(&self, what: impl std::fmt::Display) -> IoError {
        IoError::new(
            ErrorKind::Corrupt,
            format!("damaged qcow2 image: {what}; check it before it is used on"),
        )
        .in_node(self.storage.name())
    }
}

/// What subcluster `index` is; `inside` is the first byte wanted, from the cluster's start.
fn place(cluster: &StandardCluster, index: u32, inside: u64) -> Place {
    match (cluster.state(index), cluster.host) {
        (SubclusterState::Data, Some(host)) => Place::Data { host: host.0 + inside, copied: cluster.copied },
        (SubclusterState::Zero, _) => Place::Zero,
        // A view has a host wherever it has data.
        (SubclusterState::Data | SubclusterState::Absent, _) => Place::Absent,
    }
}
