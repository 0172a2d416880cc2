//! `infill qemu-nbd`, and the program where it is called `qemu-nbd`: one disk, with that program's options.
//!
//! The daemon does it: an option becomes what would be said of the disk there, and the end comes when the last client has
//! gone. What is not built is refused by name.

use std::ffi::OsString;
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Result, anyhow, bail};
use clap::Parser;
use infill_base::DiscardMode;
use infill_qmp::{BlockdevOptions, Members, ObjectOptions};
use serde_json::{Map, Value, json};

use snapshots::{SnapshotName, temporary_over};

use super::cmdline::{CommandLine, Kind, Opt, Parsed};
use super::control::Control;
use crate::blockdev::{Blockdevs, FormatKind, Image, Located, OpenPolicy, locate};
use crate::size::parse_size;

mod list;
mod snapshots;

/// Where a server listens if nobody says where.
const EVERYWHERE: &str = "0.0.0.0";
/// The export's id; its name is what clients ask for.
const EXPORT_ID: &str = "disk";

/// Serve one disk over NBD, with the options of qemu-nbd.
#[derive(Debug, Parser)]
#[command(name = "qemu-nbd", version, disable_help_subcommand = true)]
struct Options {
    /// The image: a file name or a URI; with --image-opts, options of a node.
    #[arg(required_unless_present_any = ["connect", "disconnect", "list"])]
    filename: Option<String>,
    /// TCP port to listen at.
    #[arg(short, long, default_value_t = 10809)]
    port: u16,
    /// Address to listen at.
    #[arg(short, long, default_value = EVERYWHERE)]
    bind: String,
    /// Listen at this Unix socket instead.
    #[arg(short = 'k', long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Clients at a time; 0 is without a limit.
    #[arg(short = 'e', long, value_name = "NUM", default_value_t = 1)]
    shared: u32,
    /// Go on when the last client has gone.
    #[arg(short = 't', long)]
    persistent: bool,
    /// Tell more.
    #[arg(short, long)]
    verbose: bool,
    /// Name of the export.
    #[arg(short = 'x', long, value_name = "NAME", default_value = "")]
    export_name: String,
    /// Description of the export.
    #[arg(short = 'D', long, value_name = "TEXT")]
    description: Option<String>,
    /// Seconds that a client may take for its handshake.
    #[arg(long, value_name = "N", default_value_t = 10)]
    handshake_limit: u32,
    /// Where in the image the disk begins.
    #[arg(short, long, value_name = "OFFSET", value_parser = parse_size)]
    offset: Option<u64>,
    /// Tell clients how deep in the chain data lies.
    #[arg(short = 'A', long)]
    allocation_depth: bool,
    /// Offer this dirty bitmap (may be given several times).
    #[arg(short = 'B', long, value_name = "NAME")]
    bitmap: Vec<String>,
    /// An object, as the daemon takes it: tls-creds-x509,id=ID,dir=DIR,endpoint=server.
    #[arg(long, value_name = "OBJECT")]
    object: Vec<String>,
    /// Take clients over TLS only, with the object of this id.
    #[arg(long, value_name = "ID")]
    tls_creds: Option<String>,
    /// End this process when another one, in the background, serves.
    #[arg(long)]
    fork: bool,
    /// Write the process id to this file.
    #[arg(long, value_name = "PATH")]
    pid_file: Option<PathBuf>,
    /// Format of the image.
    #[arg(short, long, value_name = "FMT")]
    format: Option<FormatKind>,
    /// Refuse writes.
    #[arg(short, long)]
    read_only: bool,
    /// As --cache=none.
    #[arg(short, long, conflicts_with = "cache")]
    nocache: bool,
    /// How the host's page cache is used: none, writeback, writethrough, directsync or unsafe.
    #[arg(long, value_name = "MODE")]
    cache: Option<String>,
    /// Accepted: how the kernel is asked is the program's own choice.
    #[arg(long, value_name = "MODE", value_parser = ["threads", "native", "io_uring"])]
    aio: Option<String>,
    /// What a client's discard does: ignore (off) or unmap (on).
    #[arg(long, value_name = "MODE", default_value = "ignore", value_parser = ["ignore", "off", "unmap", "on"])]
    discard: String,
    /// What writes of zeroes become: off, on or unmap.
    #[arg(long, value_name = "MODE", default_value = "off")]
    detect_zeroes: String,
    /// Have writes go to a temporary image, which is gone at the end.
    #[arg(short, long)]
    snapshot: bool,
    /// Serve the disk as it was at an internal snapshot: its id or name, or snapshot.id=ID,snapshot.name=NAME.
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    load_snapshot: Option<String>,
    /// FILENAME is a set of options of a node, as driver=qcow2,file.filename=a.qcow2.
    #[arg(long, conflicts_with = "format")]
    image_opts: bool,
    #[arg(short, long, hide = true)]
    connect: Option<String>,
    #[arg(short, long, hide = true)]
    disconnect: bool,
    /// Tell what another server exports, at the address of -k, or -b and -p.
    #[arg(short = 'L', long)]
    list: bool,
    /// The object that says which of the clients with certificates may come in.
    #[arg(long, value_name = "ID")]
    tls_authz: Option<String>,
    /// With --list: the name that the server's certificate is for.
    #[arg(long, value_name = "NAME")]
    tls_hostname: Option<String>,
    #[arg(long, hide = true)]
    selinux_label: Option<String>,
    #[arg(short = 'T', long, hide = true)]
    trace: Option<String>,
}

impl Options {
    fn refuse_what_is_not_built(&self) -> Result<()> {
        let device = "no kernel device is used: connect one with nbd-client, or mount the disk with a guest";
        for (given, option, advice) in [
            (self.connect.is_some(), "-c/--connect", device),
            (self.disconnect, "-d/--disconnect", device),
            (self.selinux_label.is_some(), "--selinux-label", "label the socket's directory"),
            (self.trace.is_some(), "-T/--trace", "RUST_LOG=debug in the environment tells more"),
        ] {
            if given {
                bail!("{option} is not supported: {advice}");
            }
        }
        Ok(())
    }

    /// Options of every node that is made here.
    fn settings(&self) -> Result<Map<String, Value>> {
        let cache = match self.cache.as_deref() {
            _ if self.nocache => "none",
            None => "writeback",
            Some(mode) => mode,
        };
        let (direct, no_flush) = match cache {
            "writeback" => (false, false),
            "none" | "directsync" => (true, false),
            "unsafe" => (false, true),
            // Every write of a client is made stable besides.
            "writethrough" => (false, false),
            other => bail!("--cache={other}: it is none, writeback, writethrough, directsync or unsafe"),
        };
        let discard = if matches!(self.discard.as_str(), "unmap" | "on") { "unmap" } else { "ignore" };
        let mut settings = Map::new();
        for (key, value) in [
            ("read-only", json!(self.opens_read_only())),
            ("discard", json!(discard)),
            ("detect-zeroes", json!(self.detect_zeroes)),
            ("cache", json!({ "direct": direct, "no-flush": no_flush })),
        ] {
            settings.insert(key.into(), value);
        }
        Ok(settings)
    }

    /// What another server exports.
    fn list(self) -> Result<String> {
        if self.filename.is_some() {
            bail!("List mode is incompatible with a file name");
        }
        let of_a_disk = self.offset.is_some()
            || self.format.is_some()
            || self.read_only
            || self.snapshot
            || self.load_snapshot.is_some()
            || self.allocation_depth
            || !self.bitmap.is_empty()
            || self.description.is_some()
            || !self.export_name.is_empty();
        if of_a_disk {
            bail!("List mode is incompatible with per-device settings");
        }
        // Where a server listens at all addresses, it is found at this one.
        let host = if self.bind == EVERYWHERE { "localhost".to_owned() } else { self.bind };
        let asked = list::Asked {
            socket: self.socket,
            host,
            port: self.port,
            objects: self.object,
            tls_creds: self.tls_creds,
            tls_hostname: self.tls_hostname,
        };
        asked.exports()
    }

    /// Whether every write is made stable before it is answered.
    fn writes_through(&self) -> bool {
        matches!(self.cache.as_deref(), Some("writethrough" | "directsync"))
    }

    /// Whether the image itself is written to by nobody.
    fn opens_read_only(&self) -> bool {
        self.read_only || self.snapshot || self.load_snapshot.is_some()
    }

    fn disk(&self) -> Result<Disk> {
        let name = self.filename.clone().ok_or_else(|| anyhow!("which image is to be served? Name one"))?;
        let settings = self.settings()?;
        if self.image_opts {
            let (mut object, strings) = Members::of_argument(&name, Some("file"))?.into_parts();
            if strings {
                plain_sizes(&mut object);
            }
            return Ok(Disk::Node { given: Members::of_parts(object, strings), settings });
        }
        let path = match locate(&name)? {
            Located::Protocol(BlockdevOptions {
                driver: infill_qmp::Driver::File { filename, device, .. },
                ..
            }) => Some((filename, device)),
            _ => None,
        };
        let plain = !self.nocache
            && self.cache.as_deref().is_none_or(|mode| matches!(mode, "writeback" | "writethrough"))
            && self.detect_zeroes == "off";
        match path {
            Some((filename, device)) if self.format.is_some() || !plain => {
                return Ok(Disk::File { filename, device, format: self.format, settings });
            }
            None if !plain => {
                bail!("--cache and --detect-zeroes are for images in files; for others use --image-opts")
            }
            _ => {}
        }
        let discard = match settings["discard"] == "unmap" {
            true => DiscardMode::Unmap,
            false => DiscardMode::Ignore,
        };
        let image = Image {
            format: self.format,
            read_only: self.opens_read_only(),
            discard,
            ..Image::read_only(&name)
        };
        Ok(Disk::Image(image))
    }
}

/// Options of nodes that are sizes. Here they may have units, which the daemon's own options have not.
const SIZES: [&str; 5] = ["offset", "size", "cache-size", "l2-cache-size", "refcount-cache-size"];

/// Writes sizes with units as numbers.
fn plain_sizes(object: &mut Map<String, Value>) {
    for (key, value) in object {
        match value {
            Value::Object(inner) => plain_sizes(inner),
            Value::String(text) if SIZES.contains(&key.as_str()) => {
                // What is no size is refused by whoever reads it.
                if let Ok(size) = parse_size(text) {
                    *text = size.to_string();
                }
            }
            _ => {}
        }
    }
}

/// What is served.
#[derive(Clone, Debug)]
enum Disk {
    /// By the name of an image.
    Image(Image),
    /// A file, or a device, whose format is found out where it was not said.
    File { filename: String, device: bool, format: Option<FormatKind>, settings: Map<String, Value> },
    /// By its options; settings are for what those do not say.
    Node { given: Members, settings: Map<String, Value> },
}

/// The one disk of a daemon that is called `qemu-nbd`.
#[derive(Clone, Debug)]
pub struct OneDisk {
    disk: Disk,
    offset: Option<u64>,
    export: Map<String, Value>,
    /// Whether it goes on when the last client has gone.
    pub persistent: bool,
    load: Option<SnapshotName>,
    /// Whether what is written goes to a temporary image.
    temporary: bool,
}

/// Reads the arguments behind the subcommand.
pub fn parse(arguments: Vec<OsString>) -> Result<Parsed> {
    let words: Vec<String> =
        arguments.iter().filter_map(|argument| argument.to_str().map(str::to_owned)).collect();
    let arguments = std::iter::once("qemu-nbd".into()).chain(arguments);
    let options = match Options::try_parse_from(arguments) {
        Ok(options) => options,
        Err(error) if !error.use_stderr() => return Ok(Parsed::Print(error.to_string())),
        Err(error) => {
            // What it quotes may be a secret that stands in a wrong place.
            let told = words
                .iter()
                .fold(error.to_string(), |told, word| told.replace(word, &ObjectOptions::told_stray(word)));
            bail!("{}", told.trim_start_matches("error: ").trim_end())
        }
    };
    options.refuse_what_is_not_built()?;
    if options.list {
        return options.list().map(Parsed::Print);
    }
    if options.tls_hostname.is_some() {
        bail!("TLS hostname is only supported in list mode");
    }
    let object = |text: &String| Opt { kind: Kind::Object, text: text.clone() };
    let mut line =
        CommandLine { options: options.object.iter().map(object).collect(), ..CommandLine::default() };
    let address = match (&options.socket, passed_socket()?) {
        (Some(_), true) => bail!("-k is not for a socket that the process was started with"),
        (None, true) => json!({ "type": "fd", "str": FIRST_PASSED.to_string() }),
        (Some(path), false) => json!({ "type": "unix", "path": path }),
        (None, false) => json!({ "type": "inet", "host": options.bind, "port": options.port.to_string() }),
    };
    let mut server = json!({
        "addr": address, "max-connections": options.shared, "handshake-max-seconds": options.handshake_limit,
    });
    if let Some(id) = &options.tls_creds {
        server["tls-creds"] = json!(id);
    }
    if let Some(id) = &options.tls_authz {
        if options.tls_creds.is_none() {
            bail!("--tls-authz is not permitted without --tls-creds");
        }
        server["tls-authz"] = json!(id);
    }
    line.options.push(Opt { kind: Kind::NbdServer, text: server.to_string() });
    let mut export = Map::new();
    for (key, value) in [
        ("type", json!("nbd")),
        ("id", json!(EXPORT_ID)),
        ("name", json!(options.export_name)),
        ("writable", json!(!options.read_only && options.load_snapshot.is_none())),
        ("writethrough", json!(options.writes_through())),
        ("allocation-depth", json!(options.allocation_depth)),
        ("bitmaps", json!(options.bitmap)),
    ] {
        export.insert(key.into(), value);
    }
    if let Some(text) = &options.description {
        export.insert("description".into(), json!(text));
    }
    line.one = Some(OneDisk {
        disk: options.disk()?,
        offset: options.offset,
        export,
        persistent: options.persistent,
        load: options.load_snapshot.as_deref().map(SnapshotName::parse).transpose()?,
        temporary: options.snapshot,
    });
    (line.pidfile, line.daemonize, line.keep_stderr) = (options.pid_file, options.fork, options.verbose);
    Ok(Parsed::Run(Box::new(line)))
}

/// The first descriptor that a service manager passes.
const FIRST_PASSED: i32 = 3;

/// Whether this process was started with a socket.
fn passed_socket() -> Result<bool> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(false);
    }
    match number("LISTEN_FDS") {
        Some(1) => Ok(true),
        other => bail!("this process was started with {} sockets: it takes one", other.unwrap_or(0)),
    }
}

/// The format of an image in a file, by its magic. Raw is no finding where it is going to be written to.
async fn found_out(filename: &str, writable: bool) -> Result<&'static str> {
    let looked = Blockdevs::new(OpenPolicy::default());
    let image = Image { alone: true, force_share: true, ..Image::read_only(filename) };
    let node = looked.add_image(&image).await?;
    let driver = looked.get(&node)?.info().driver;
    looked.close_all().await?;
    if driver == FormatKind::Raw.as_str() && writable {
        bail!(
            "Could not open '{filename}': its first bytes are of no known format, so it may be raw; a guest that writes \
             to a raw disk can make it look like another format, so say -f raw if it is"
        );
    }
    Ok(driver)
}

/// Opens the disk and exports it.
pub async fn serve(control: &Rc<Control>, one: &OneDisk) -> Result<()> {
    let blockdevs = control.blockdevs();
    let disk = match &one.disk {
        Disk::File { filename, device, format, settings } => {
            let format = match format {
                Some(format) => (*format).as_str(),
                None => found_out(filename, one.export["writable"] == true && !one.temporary).await?,
            };
            let protocol = if *device { "host_device" } else { "file" };
            let file = json!({ "driver": protocol, "filename": filename });
            let node = json!({ "driver": format, "file": file });
            let Value::Object(node) = node else { bail!("{filename}: it cannot be described") };
            &Disk::Node { given: Members::of_json(node), settings: settings.clone() }
        }
        disk => disk,
    };
    let mut node = match disk {
        Disk::Image(image) => blockdevs.add_image(image).await?,
        Disk::File { .. } => bail!("a file without its format"),
        Disk::Node { given, settings } => {
            let (mut object, strings) = given.clone().into_parts();
            // Dotted keys are strings, and so are settings beside them.
            let plain = |value: &Value| match (strings, value) {
                (true, Value::Bool(on)) => json!(if *on { "on" } else { "off" }),
                (_, value) => value.clone(),
            };
            for (key, value) in settings {
                match value {
                    Value::Object(members) => {
                        let group = object.entry(key.clone()).or_insert_with(|| json!({}));
                        for (key, value) in members {
                            if let Some(group) = group.as_object_mut() {
                                group.entry(key.clone()).or_insert_with(|| plain(value));
                            }
                        }
                    }
                    value => drop(object.entry(key.clone()).or_insert_with(|| plain(value))),
                }
            }
            blockdevs.add(BlockdevOptions::read(Members::of_parts(object, strings))?).await?
        }
    };
    if one.temporary {
        node = temporary_over(blockdevs, &node).await?;
    }
    // With a temporary image over it, it is that one's snapshots that are meant; it has none.
    if let Some(wanted) = &one.load {
        wanted.load(&blockdevs.get(&node)?).await?;
    }
    if let Some(offset) = one.offset {
        let part = json!({
            "driver": "raw", "file": node, "offset": offset, "read-only": one.export["writable"] == false,
            "discard": "unmap",
        });
        let Value::Object(part) = part else { bail!("the part of the disk cannot be described") };
        node = blockdevs.add(BlockdevOptions::read(Members::of_json(part))?).await?;
    }
    let mut export = one.export.clone();
    export.insert("node-name".into(), json!(node));
    control.block_export_add(infill_qmp::BlockExportOptions::read(Members::of_json(export))?)?;
    Ok(())
}
