//! Options of block nodes (`blockdev-add`, `--blockdev`), typed.
//!
//! Everything that QEMU accepts for these drivers is read with its type and refused with its words. A driver or member
//! that QEMU knows and we have not built is refused by name, never ignored where ignoring it would change what is
//! stored or promised. Nesting is bounded by [`DEPTH_MAX`](crate::json::DEPTH_MAX), so reading cannot overflow the stack.

use std::path::PathBuf;

use infill_base::{DetectZeroes, DiscardMode};

use crate::address::SocketAddress;
use crate::bitmap::BitmapRef;
use crate::error::QmpError;
use crate::filters::{self, BlkdebugOptions};
use crate::members::{Alternate, Members, Object, Words};
use crate::names::check_node_name;

impl Words for DetectZeroes {
    const WORDS: &'static [(&'static str, DetectZeroes)] =
        &[("off", DetectZeroes::Off), ("on", DetectZeroes::On), ("unmap", DetectZeroes::Unmap)];
}

impl Words for DiscardMode {
    const WORDS: &'static [(&'static str, DiscardMode)] =
        &[("ignore", DiscardMode::Ignore), ("unmap", DiscardMode::Unmap)];
}

/// Whether a file is locked against other programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Locking {
    /// Where the system can.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

impl Words for Locking {
    const WORDS: &'static [(&'static str, Locking)] =
        &[("auto", Locking::Auto), ("on", Locking::On), ("off", Locking::Off)];
}

/// A child: a node that exists, or one that is made with its parent.
#[derive(Clone, Debug, PartialEq)]
pub enum BlockdevRef {
    /// A node by name.
    Name(String),
    /// A node to be made.
    Definition(Box<BlockdevOptions>),
}

/// What an overlay lies on.
#[derive(Clone, Debug, PartialEq, Default)]
pub enum BackingOption {
    /// What its header says.
    #[default]
    Header,
    /// Nothing, whatever its header says (`null`).
    None,
    /// This.
    Node(BlockdevRef),
}

/// Options of qcow2 nodes beside their children. `None`: the driver's default.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Qcow2Options {
    /// Refcounts may be written late, under the dirty bit.
    pub lazy_refcounts: Option<bool>,
    /// Most bytes of L2 tables and refcount blocks in memory.
    pub cache_bytes: Option<u64>,
    /// Most bytes of L2 tables in memory.
    pub l2_cache_bytes: Option<u64>,
    /// Most bytes of refcount blocks in memory.
    pub refcount_cache_bytes: Option<u64>,
}

/// Which driver, and what it alone takes.
#[derive(Clone, Debug, PartialEq)]
pub enum Driver {
    /// `file` or `host_device`.
    File {
        /// Path.
        filename: String,
        /// Whether it must be a device (`host_device`).
        device: bool,
        /// Whether it is locked.
        locking: Locking,
    },
    /// `null-co`: no data, of that many bytes.
    Null {
        /// Size in bytes.
        size: u64,
        /// Delay of each request, in nanoseconds.
        latency_ns: u64,
        /// Whether reads give zeroes, or leave the buffer as it is.
        read_zeroes: bool,
    },
    /// `nbd`.
    Nbd {
        /// The server.
        server: SocketAddress,
        /// The export's name; empty is the server's default.
        export: String,
        /// Seconds for which requests wait for a server that went away; `None` and 0: QEMU would fail them at once.
        reconnect_delay: Option<u32>,
        /// Seconds for which opening tries again; `None` and 0: one attempt.
        open_timeout: Option<u32>,
        /// TLS, if it is asked for.
        tls: Option<NbdTls>,
    },
    /// `raw`.
    Raw {
        /// Below.
        file: BlockdevRef,
        /// Where it begins in there, in bytes.
        offset: u64,
        /// How long it is, in bytes; `None`: to the end.
        size: Option<u64>,
    },
    /// `qcow2`.
    Qcow2 {
        /// The image file.
        file: BlockdevRef,
        /// What it lies on.
        backing: BackingOption,
        /// The rest.
        options: Qcow2Options,
    },
    /// `qed`.
    Qed {
        /// The image file.
        file: BlockdevRef,
        /// What it lies on.
        backing: BackingOption,
    },
    /// `copy-on-read`.
    CopyOnRead {
        /// The overlay that keeps what is read.
        file: BlockdevRef,
        /// The last layer that is copied from.
        bottom: Option<String>,
    },
    /// `copy-before-write`.
    CopyBeforeWrite {
        /// The disk.
        file: BlockdevRef,
        /// Where its old bytes are kept.
        target: BlockdevRef,
        /// What of it is kept; all where there is none.
        bitmap: Option<BitmapRef>,
        /// What happens where old bytes cannot be kept.
        on_error: OnCbwError,
        /// How long a guest waits for that at most, in seconds; `None` is without a limit.
        timeout: Option<u32>,
        /// The moment has passed (the daemon was started again since): nothing is kept. Never on the wire.
        passed: bool,
    },
    /// `throttle`.
    Throttle {
        /// The disk.
        file: BlockdevRef,
        /// The object that has the limits.
        group: String,
    },
    /// `blkdebug`.
    Blkdebug(Box<BlkdebugOptions>),
    /// `compress`.
    Compress {
        /// The image whose new data is compressed.
        file: BlockdevRef,
    },
    /// `preallocate`.
    Preallocate {
        /// The file that grows.
        file: BlockdevRef,
        /// What its length is a multiple of, in bytes.
        align: u64,
        /// How far it grows ahead, in bytes.
        size: u64,
    },
    /// `snapshot-access`.
    SnapshotAccess {
        /// The `copy-before-write` node.
        file: BlockdevRef,
    },
}

/// What happens where old bytes cannot be kept before a guest overwrites them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnCbwError {
    /// The guest's write fails.
    #[default]
    BreakGuestWrite,
    /// The write goes on, and the disk as it was is lost.
    BreakSnapshot,
}

impl Words for OnCbwError {
    const WORDS: &'static [(&'static str, OnCbwError)] =
        &[("break-guest-write", OnCbwError::BreakGuestWrite), ("break-snapshot", OnCbwError::BreakSnapshot)];
}

impl Driver {
    /// Its name on the wire.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Driver::File { device: false, .. } => "file",
            Driver::File { device: true, .. } => "host_device",
            Driver::Null { .. } => "null-co",
            Driver::Nbd { .. } => "nbd",
            Driver::Raw { .. } => "raw",
            Driver::Qcow2 { .. } => "qcow2",
            Driver::Qed { .. } => "qed",
            Driver::CopyOnRead { .. } => "copy-on-read",
            Driver::CopyBeforeWrite { .. } => "copy-before-write",
            Driver::Throttle { .. } => "throttle",
            Driver::Blkdebug(_) => "blkdebug",
            Driver::Compress { .. } => "compress",
            Driver::Preallocate { .. } => "preallocate",
            Driver::SnapshotAccess { .. } => "snapshot-access",
        }
    }
}

/// How a client speaks TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdTls {
    /// With which credentials.
    pub credentials: NbdCredentials,
    /// What the server's certificate must be for, where that is not its host (`tls-hostname`).
    pub hostname: Option<String>,
}

/// Where a client's credentials are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdCredentials {
    /// In the object of that id (`tls-creds`).
    Object(String),
    /// In a directory, as URIs name it.
    Directory {
        /// `None`: where this user's are usually.
        dir: Option<PathBuf>,
        /// Whether the server's certificate is verified.
        verify_peer: bool,
    },
}

/// A block node. Members that are `None` were not given: see the accessors for what then holds, and
/// [`BlockdevOptions::inherit`] for children.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockdevOptions {
    /// Its name.
    pub node_name: Option<String>,
    /// What a guest's discard does.
    pub discard: Option<DiscardMode>,
    /// Around the page cache.
    pub cache_direct: Option<bool>,
    /// Flushes are dropped.
    pub cache_no_flush: Option<bool>,
    /// No writes.
    pub read_only: Option<bool>,
    /// Read-only where it cannot be opened for writing.
    pub auto_read_only: Option<bool>,
    /// Other programs may write.
    pub force_share: Option<bool>,
    /// What writes of zeroes become.
    pub detect_zeroes: Option<DetectZeroes>,
    /// Takes changes, and its image locks.
    pub active: Option<bool>,
    /// Which driver.
    pub driver: Driver,
}

/// Which child of its parent a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildRole {
    /// Holds a format's image file.
    ImageFile,
    /// Holds the data of a filter or of `raw`, as they are.
    Filtered,
    /// Lies below an overlay.
    Backing,
}

impl BlockdevOptions {
    /// A node of that driver with every default.
    pub fn new(driver: Driver) -> BlockdevOptions {
        BlockdevOptions {
            node_name: None,
            discard: None,
            cache_direct: None,
            cache_no_flush: None,
            read_only: None,
            auto_read_only: None,
            force_share: None,
            detect_zeroes: None,
            active: None,
            driver,
        }
    }

    /// Reads a command-line argument: JSON or dotted keys.
    pub fn of_argument(text: &str) -> Result<BlockdevOptions, QmpError> {
        Self::read(Members::of_argument(text, Some("driver"))?)
    }

    /// Reads all of `members`.
    pub fn read(mut members: Members) -> Result<BlockdevOptions, QmpError> {
        let driver_name: DriverName = members.word("driver")?;
        let node_name = members.opt_str("node-name")?;
        let discard = members.opt_word("discard")?;
        let (mut cache_direct, mut cache_no_flush) = (None, None);
        if let Some(mut cache) = members.opt_object("cache")? {
            cache_direct = cache.opt_bool("direct")?;
            cache_no_flush = cache.opt_bool("no-flush")?;
            cache.finish()?;
        }
        let active = members.opt_bool("active")?;
        let read_only = members.opt_bool("read-only")?;
        let auto_read_only = members.opt_bool("auto-read-only")?;
        let force_share = members.opt_bool("force-share")?;
        let detect_zeroes = members.opt_word("detect-zeroes")?;
        let driver = driver_name.read(&mut members)?;
        members.finish()?;
        if let Some(name) = &node_name {
            check_node_name(name)?;
        }
        Ok(BlockdevOptions {
            node_name,
            discard,
            cache_direct,
            cache_no_flush,
            read_only,
            auto_read_only,
            force_share,
            detect_zeroes,
            active,
            driver,
        })
    }

    /// Whether it refuses writes.
    pub fn is_read_only(&self) -> bool {
        self.read_only.unwrap_or(false)
    }

    /// What a guest's discard does.
    pub fn discard_mode(&self) -> DiscardMode {
        self.discard.unwrap_or_default()
    }

    /// Whether it goes around the page cache.
    pub fn is_direct(&self) -> bool {
        self.cache_direct.unwrap_or(false)
    }

    /// Takes from `parent` what was not given for this child, as QEMU does for children that are defined in place.
    pub fn inherit(&mut self, parent: &BlockdevOptions, role: ChildRole) {
        fn take<T: Copy>(mine: &mut Option<T>, theirs: Option<T>) {
            *mine = mine.or(theirs);
        }
        take(&mut self.cache_direct, parent.cache_direct);
        take(&mut self.cache_no_flush, parent.cache_no_flush);
        take(&mut self.force_share, parent.force_share);
        match role {
            ChildRole::Backing => {
                take(&mut self.read_only, Some(true));
                take(&mut self.auto_read_only, Some(false));
                take(&mut self.active, parent.active);
            }
            ChildRole::ImageFile | ChildRole::Filtered => {
                take(&mut self.read_only, parent.read_only);
                take(&mut self.auto_read_only, parent.auto_read_only);
                // What a parent discards below has passed its own policy already.
                take(&mut self.discard, Some(DiscardMode::Unmap));
            }
        }
    }
}

impl Object for BlockdevOptions {
    fn read(members: Members) -> Result<BlockdevOptions, QmpError> {
        BlockdevOptions::read(members)
    }
}

fn unbuilt(what: &str, advice: &str) -> QmpError {
    QmpError::generic(format!("{what} is not supported yet: {advice}"))
}

/// A driver that QEMU knows.
#[derive(Clone, Copy, Debug)]
pub(crate) enum DriverName {
    File { device: bool },
    Null,
    Nbd,
    Raw,
    Qcow2,
    Qed,
    CopyOnRead,
    CopyBeforeWrite,
    Throttle,
    Blkdebug,
    Compress,
    Preallocate,
    SnapshotAccess,
    Unbuilt(&'static str),
}

macro_rules! unbuilt_drivers {
    ($($name:literal),* $(,)?) => { [$(($name, DriverName::Unbuilt($name))),*] };
}

/// Drivers of QEMU that are not built here.
const UNBUILT: [(&str, DriverName); 27] = unbuilt_drivers![
    "blklogwrites",
    "blkreplay",
    "blkverify",
    "bochs",
    "cloop",
    "dmg",
    "ftp",
    "ftps",
    "gluster",
    "host_cdrom",
    "http",
    "https",
    "iscsi",
    "luks",
    "nfs",
    "nvme",
    "parallels",
    "qcow",
    "quorum",
    "rbd",
    "replication",
    "ssh",
    "vdi",
    "vhdx",
    "vmdk",
    "vpc",
    "vvfat",
];

impl Words for DriverName {
    const WORDS: &'static [(&'static str, DriverName)] = &[
        ("file", DriverName::File { device: false }),
        ("host_device", DriverName::File { device: true }),
        ("null-co", DriverName::Null),
        ("null-aio", DriverName::Null),
        ("nbd", DriverName::Nbd),
        ("raw", DriverName::Raw),
        ("qcow2", DriverName::Qcow2),
        ("qed", DriverName::Qed),
        ("copy-on-read", DriverName::CopyOnRead),
        ("copy-before-write", DriverName::CopyBeforeWrite),
        ("throttle", DriverName::Throttle),
        ("blkdebug", DriverName::Blkdebug),
        ("compress", DriverName::Compress),
        ("preallocate", DriverName::Preallocate),
        ("snapshot-access", DriverName::SnapshotAccess),
    ];

    fn of(word: &str) -> Option<&'static DriverName> {
        Self::WORDS.iter().chain(&UNBUILT).find(|(name, _)| *name == word).map(|(_, driver)| driver)
    }
}

/// Whether QEMU knows such a driver.
pub fn is_driver(word: &str) -> bool {
    DriverName::of(word).is_some()
}

impl DriverName {
    /// Its name on the wire.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            DriverName::File { device: false } => "file",
            DriverName::File { device: true } => "host_device",
            DriverName::Null => "null-co",
            DriverName::Nbd => "nbd",
            DriverName::Raw => "raw",
            DriverName::Qcow2 => "qcow2",
            DriverName::Qed => "qed",
            DriverName::CopyOnRead => "copy-on-read",
            DriverName::CopyBeforeWrite => "copy-before-write",
            DriverName::Throttle => "throttle",
            DriverName::Blkdebug => "blkdebug",
            DriverName::Compress => "compress",
            DriverName::Preallocate => "preallocate",
            DriverName::SnapshotAccess => "snapshot-access",
            DriverName::Unbuilt(name) => name,
        }
    }

    /// Reads what this driver alone takes.
    fn read(self, members: &mut Members) -> Result<Driver, QmpError> {
        match self {
            DriverName::File { device } => read_file(members, device),
            DriverName::Null => {
                let size = members.opt_unsigned("size")?.unwrap_or(1 << 30);
                let latency_ns = members.opt_unsigned("latency-ns")?.unwrap_or(0);
                let read_zeroes = members.opt_bool("read-zeroes")?.unwrap_or(false);
                Ok(Driver::Null { size, latency_ns, read_zeroes })
            }
            DriverName::Nbd => read_nbd(members),
            DriverName::Raw => {
                let file = read_ref(members, "file")?;
                let offset = members.opt_unsigned("offset")?.unwrap_or(0);
                let size = members.opt_unsigned("size")?;
                Ok(Driver::Raw { file, offset, size })
            }
            DriverName::Qcow2 => read_qcow2(members),
            DriverName::Qed => {
                let file = read_ref(members, "file")?;
                let backing = read_backing(members)?;
                Ok(Driver::Qed { file, backing })
            }
            DriverName::CopyOnRead => {
                let file = read_ref(members, "file")?;
                let bottom = members.opt_str("bottom")?;
                Ok(Driver::CopyOnRead { file, bottom })
            }
            DriverName::CopyBeforeWrite => {
                let file = read_ref(members, "file")?;
                let target = read_ref(members, "target")?;
                let bitmap = members.opt_object("bitmap")?.map(BitmapRef::read).transpose()?;
                let on_error = members.opt_word("on-cbw-error")?.unwrap_or_default();
                let timeout = members.opt_u32("cbw-timeout")?.filter(|seconds| *seconds > 0);
                Ok(Driver::CopyBeforeWrite { file, target, bitmap, on_error, timeout, passed: false })
            }
            DriverName::Throttle => {
                let group = members.str("throttle-group")?;
                Ok(Driver::Throttle { file: read_ref(members, "file")?, group })
            }
            DriverName::Blkdebug => filters::read_blkdebug(members),
            DriverName::Compress => Ok(Driver::Compress { file: read_ref(members, "file")? }),
            DriverName::Preallocate => filters::read_preallocate(members),
            DriverName::SnapshotAccess => Ok(Driver::SnapshotAccess { file: read_ref(members, "file")? }),
            DriverName::Unbuilt(name) => Err(unbuilt(
                &format!("driver '{name}'"),
                "use one of file, host_device, nbd, null-co, raw, qcow2, qed, copy-on-read, throttle, blkdebug, compress, \
                 preallocate, copy-before-write, snapshot-access",
            )),
        }
    }
}

fn read_file(members: &mut Members, device: bool) -> Result<Driver, QmpError> {
    let filename = members.str("filename")?;
    members.refuse("pr-manager", "leave it out")?;
    let locking = members.opt_word("locking")?.unwrap_or_default();
    // How the kernel is asked is the reactor's own choice, and what it caches its own: accepted, and nothing changes.
    members.opt_word::<Aio>("aio")?;
    members.opt_int("aio-max-batch")?;
    members.opt_bool("drop-cache")?;
    members.opt_bool("x-check-cache-dropped")?;
    Ok(Driver::File { filename, device, locking })
}

#[derive(Clone, Copy, Debug)]
struct Aio;

impl Words for Aio {
    const WORDS: &'static [(&'static str, Aio)] = &[("threads", Aio), ("native", Aio), ("io_uring", Aio)];
}

fn read_nbd(members: &mut Members) -> Result<Driver, QmpError> {
    let server = SocketAddress::read(members.object("server")?)?;
    let export = members.opt_str("export")?.unwrap_or_default();
    let credentials = members.opt_str("tls-creds")?;
    let hostname = members.opt_str("tls-hostname")?;
    let tls = match credentials {
        Some(id) => Some(NbdTls { credentials: NbdCredentials::Object(id), hostname }),
        None if hostname.is_some() => {
            return Err(QmpError::generic("'tls-hostname' is for TLS: give 'tls-creds' with it"));
        }
        None => None,
    };
    members.refuse("x-dirty-bitmap", "leave it out")?;
    let reconnect_delay = members.opt_u32("reconnect-delay")?;
    let open_timeout = members.opt_u32("open-timeout")?;
    Ok(Driver::Nbd { server, export, reconnect_delay, open_timeout, tls })
}

fn read_qcow2(members: &mut Members) -> Result<Driver, QmpError> {
    let file = read_ref(members, "file")?;
    let backing = read_backing(members)?;
    let lazy_refcounts = members.opt_bool("lazy-refcounts")?;
    // What goes below on a discard is decided by `discard`; these only tune it further.
    for name in ["pass-discard-request", "pass-discard-snapshot", "pass-discard-other", "discard-no-unref"] {
        members.opt_bool(name)?;
    }
    // Overlaps are always checked.
    members.ignore("overlap-check");
    let cache_bytes = members.opt_unsigned("cache-size")?;
    let l2_cache_bytes = members.opt_unsigned("l2-cache-size")?;
    members.opt_unsigned("l2-cache-entry-size")?;
    let refcount_cache_bytes = members.opt_unsigned("refcount-cache-size")?;
    members.opt_unsigned("cache-clean-interval")?;
    for name in ["encrypt", "data-file"] {
        members.refuse(name, "such images cannot be opened")?;
    }
    if let (Some(whole), part) = (cache_bytes, l2_cache_bytes.max(refcount_cache_bytes))
        && part.is_some_and(|part| part > whole)
    {
        return Err(QmpError::generic("l2-cache-size and refcount-cache-size may not exceed cache-size"));
    }
    let options = Qcow2Options { lazy_refcounts, cache_bytes, l2_cache_bytes, refcount_cache_bytes };
    Ok(Driver::Qcow2 { file, backing, options })
}

pub(crate) fn read_ref(members: &mut Members, name: &str) -> Result<BlockdevRef, QmpError> {
    match members.opt_alternate::<BlockdevOptions>(name, "BlockdevRef")? {
        Some(Alternate::Name(node)) => Ok(BlockdevRef::Name(node)),
        Some(Alternate::Object(definition)) => Ok(BlockdevRef::Definition(Box::new(definition))),
        Some(Alternate::Null) | None => Err(members.missing(name)),
    }
}

fn read_backing(members: &mut Members) -> Result<BackingOption, QmpError> {
    Ok(match members.opt_alternate::<BlockdevOptions>("backing", "BlockdevRefOrNull")? {
        None => BackingOption::Header,
        Some(Alternate::Null) => BackingOption::None,
        // Dotted keys have no null: an empty name stands for it.
        Some(Alternate::Name(node)) if node.is_empty() => BackingOption::None,
        Some(Alternate::Name(node)) => BackingOption::Node(BlockdevRef::Name(node)),
        Some(Alternate::Object(definition)) => {
            BackingOption::Node(BlockdevRef::Definition(Box::new(definition)))
        }
    })
}

#[cfg(test)]
mod tests;
