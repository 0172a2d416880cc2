//! Options of the NBD server and of exports.

use crate::address::SocketAddress;
use crate::bitmap::{BitmapRef, bitmap_refs};
use crate::error::QmpError;
use crate::members::{Members, Words};
use crate::names;

/// Most connections of an NBD server where the caller does not say (QEMU's default).
pub const NBD_CONNECTIONS_DEFAULT: u32 = 100;

/// Longest export name and description, in bytes (the NBD protocol's limit).
pub const NBD_STRING_BYTES_MAX: usize = 4096;

/// `nbd-server-start`, `--nbd-server`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdServerOptions {
    /// Where it listens.
    pub addr: SocketAddress,
    /// Most connections at a time; `None` is without a limit of the caller's own (`0` on the wire).
    pub max_connections: Option<u32>,
    /// The credentials object with which TLS is asked for; `None` is in the clear.
    pub tls_creds: Option<String>,
    /// The object that says who may come in; `None`: whoever shows a certificate that the credentials accept.
    pub tls_authz: Option<String>,
    /// How long a client may take for its handshake, in seconds; `None` is the server's own limit.
    pub handshake_max_seconds: Option<u32>,
}

impl NbdServerOptions {
    /// Reads the options of the command line (a flat address).
    pub fn read(members: Members) -> Result<NbdServerOptions, QmpError> {
        Self::read_with(members, SocketAddress::read)
    }

    /// Reads the arguments of `nbd-server-start` (an address with `data`).
    pub fn read_legacy(members: Members) -> Result<NbdServerOptions, QmpError> {
        Self::read_with(members, SocketAddress::read_legacy)
    }

    fn read_with(
        mut members: Members,
        address: fn(Members) -> Result<SocketAddress, QmpError>,
    ) -> Result<NbdServerOptions, QmpError> {
        let handshake_max_seconds = members.opt_u32("handshake-max-seconds")?;
        let tls_creds = members.opt_str("tls-creds")?;
        let tls_authz = members.opt_str("tls-authz")?;
        let max_connections = members.opt_u32("max-connections")?.unwrap_or(NBD_CONNECTIONS_DEFAULT);
        let addr = address(members.object("addr")?)?;
        members.finish()?;
        let max_connections = (max_connections > 0).then_some(max_connections);
        if tls_authz.is_some() && tls_creds.is_none() {
            let why =
                "'tls-authz' is not permitted without 'tls-creds': in the clear nobody says who they are";
            return Err(QmpError::generic(why));
        }
        Ok(NbdServerOptions { addr, max_connections, tls_creds, tls_authz, handshake_max_seconds })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ExportType {
    Nbd,
    Unbuilt,
}

impl Words for ExportType {
    const WORDS: &'static [(&'static str, ExportType)] = &[("nbd", ExportType::Nbd)];

    fn of(word: &str) -> Option<&'static ExportType> {
        match word {
            "nbd" => Some(&ExportType::Nbd),
            "vhost-user-blk" | "fuse" | "vduse-blk" => Some(&ExportType::Unbuilt),
            _ => None,
        }
    }
}

/// `block-export-add`, `--export`, of the type `nbd`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockExportOptions {
    /// The export.
    pub id: String,
    /// The node that is exported.
    pub node_name: String,
    /// The name that clients ask for; `None` is the node's.
    pub name: Option<String>,
    /// Free text for clients.
    pub description: Option<String>,
    /// Whether clients may write.
    pub writable: bool,
    /// Whether every write is stable before it is answered.
    pub writethrough: bool,
    /// The I/O thread that was asked for: it must exist.
    pub iothread: Option<String>,
    /// Whether its node may be inactive: else it is made active, and stays so.
    pub allow_inactive: bool,
    /// Bitmaps that clients may ask for.
    pub bitmaps: Vec<BitmapRef>,
    /// Whether clients may ask how deep in the chain data lies.
    pub allocation_depth: bool,
}

fn check_texts(name: &Option<String>, description: &Option<String>) -> Result<(), QmpError> {
    for (what, text) in [("name", name), ("description", description)] {
        if text.as_ref().is_some_and(|text| text.len() > NBD_STRING_BYTES_MAX) {
            let why = format!("export {what} is longer than {NBD_STRING_BYTES_MAX} bytes");
            return Err(QmpError::generic(why));
        }
    }
    Ok(())
}

impl BlockExportOptions {
    /// Reads all of `members`.
    pub fn read(mut members: Members) -> Result<BlockExportOptions, QmpError> {
        let kind: ExportType = members.word("type")?;
        let id = members.str("id")?;
        members.opt_bool("fixed-iothread")?;
        let iothread = members.opt_str("iothread")?;
        let node_name = members.str("node-name")?;
        let writable = members.opt_bool("writable")?.unwrap_or(false);
        let writethrough = members.opt_bool("writethrough")?.unwrap_or(false);
        let allow_inactive = members.opt_bool("allow-inactive")?.unwrap_or(false);
        if kind != ExportType::Nbd {
            return Err(QmpError::generic(
                "exports over vhost-user-blk, FUSE and VDUSE are not supported yet: use type nbd",
            ));
        }
        let name = members.opt_str("name")?;
        let description = members.opt_str("description")?;
        let bitmaps = bitmap_refs(&mut members, "bitmaps")?.unwrap_or_default();
        let allocation_depth = members.opt_bool("allocation-depth")?.unwrap_or(false);
        members.finish()?;
        if !names::is_id(&id) {
            return Err(QmpError::generic("Invalid block export id"));
        }
        check_texts(&name, &description)?;
        Ok(BlockExportOptions {
            id,
            node_name,
            name,
            description,
            writable,
            writethrough,
            iothread,
            allow_inactive,
            bitmaps,
            allocation_depth,
        })
    }

    /// Reads the arguments of `nbd-server-add`: the export's name is its id too.
    pub fn read_server_add(mut members: Members) -> Result<BlockExportOptions, QmpError> {
        let name = members.opt_str("name")?;
        let description = members.opt_str("description")?;
        let node_name = members.str("device")?;
        let writable = members.opt_bool("writable")?.unwrap_or(false);
        let bitmap = members.opt_str("bitmap")?;
        members.finish()?;
        let id = name.clone().unwrap_or_else(|| node_name.clone());
        check_texts(&name, &description)?;
        if !names::is_id(&id) {
            return Err(QmpError::generic("Invalid block export id"));
        }
        Ok(BlockExportOptions {
            id,
            node_name,
            name,
            description,
            writable,
            writethrough: false,
            iothread: None,
            allow_inactive: false,
            bitmaps: bitmap.into_iter().map(|name| BitmapRef { node: None, name }).collect(),
            allocation_depth: false,
        })
    }

    /// The name that clients ask for.
    pub fn export_name(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.node_name)
    }
}

/// How an export is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum RemoveMode {
    /// Only if nobody is connected.
    #[default]
    Safe,
    /// Connections are cut.
    Hard,
}

impl Words for RemoveMode {
    const WORDS: &'static [(&'static str, RemoveMode)] =
        &[("safe", RemoveMode::Safe), ("hard", RemoveMode::Hard)];
}
