//! Character devices of the command line, and the monitors on them.
//!
//! A socket listens from its option on, so that whoever started the daemon may connect, and is answered once every option
//! was carried out. With `wait=on` (the default of servers) the option itself waits for its first client.
//!
//! Who may connect to a socket file is who may write to it: its mode is 0660 less the umask, never for everybody.

use std::collections::BTreeMap;

use infill_base::IoError;
use infill_io::{Accepted, Address, Listener, connector, stdio};
use infill_qmp::chardev::ChardevBackend;
use infill_qmp::{Members, QmpError, SocketAddress, Words, names};
use infill_storage::rt;
use infill_storage::stream::Connection;

use crate::size::parse_size;

use super::chardevs::{Devices, Held, RINGBUF_BYTES_DEFAULT, Ring, Running, make_file};

/// Something a monitor can talk over.
pub enum Chardev {
    /// Standard input and output.
    Stdio,
    /// A socket that clients connect to, and the first client where it was waited for.
    Server(Listener, Option<Accepted>),
    /// A connection that was made from here.
    Client(Connection),
}

/// The character devices, and those that monitors are on.
#[derive(Default)]
pub struct Chardevs {
    devices: Devices,
    monitors: Vec<Chardev>,
}

impl Chardevs {
    /// `--chardev`.
    pub async fn add(&mut self, text: &str) -> Result<(), QmpError> {
        let (id, device) = Device::read(text)?;
        if self.devices.contains_key(&id) {
            let why = format!("attempt to add duplicate property '{id}' to object (type 'container')");
            return Err(QmpError::generic(why));
        }
        let opened = Running::open(device).await?;
        self.devices.insert(id, opened);
        Ok(())
    }

    /// `--monitor`.
    pub fn monitor(&mut self, mut members: Members) -> Result<(), QmpError> {
        members.opt_str("id")?;
        let mode = members.opt_word::<Mode>("mode")?.unwrap_or(Mode::Control);
        // Answers are always on one line each: readers of JSON do not mind.
        members.opt_bool("pretty")?;
        let name = members.str("chardev")?;
        members.finish()?;
        if mode != Mode::Control {
            return Err(QmpError::generic("Only QMP is supported"));
        }
        let Some(device) = self.devices.get_mut(&name) else {
            return Err(QmpError::generic(format!("chardev \"{name}\" not found")));
        };
        match std::mem::replace(&mut device.held, Held::Monitor) {
            Held::Free(chardev) => self.monitors.push(chardev),
            Held::Monitor => {
                return Err(QmpError::generic(format!("chardev '{name}' is already in use")));
            }
            other => {
                device.held = other;
                let why = format!("nobody can talk over chardev '{name}': a monitor needs socket or stdio");
                return Err(QmpError::generic(why));
            }
        }
        Ok(())
    }

    /// The devices, and what those are that monitors are on.
    pub fn into_parts(self) -> (Devices, Vec<Chardev>) {
        (self.devices, self.monitors)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Readline,
    Control,
}

impl Words for Mode {
    const WORDS: &'static [(&'static str, Mode)] =
        &[("readline", Mode::Readline), ("control", Mode::Control)];
}

/// What `--chardev` or `chardev-add` describes.
#[derive(Debug, PartialEq, Eq)]
pub enum Device {
    /// Standard input and output.
    Stdio,
    /// A socket.
    Socket {
        /// Where.
        place: Place,
        /// Whether it is listened at.
        server: bool,
        /// Whether the first client is waited for.
        wait: bool,
    },
    /// Memory, by its name or by its old one.
    Ring {
        /// Bytes that are kept.
        size: i64,
        /// The old name.
        memory: bool,
    },
    /// Nothing.
    Null,
    /// A file.
    File {
        /// Where.
        path: String,
        /// Behind what is there.
        append: bool,
    },
}

/// Where a socket is.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    /// There.
    Address(Address),
    /// Passed by whoever started the daemon.
    Passed(i32),
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (place, server) = match self {
            Device::Socket { place, server, .. } => (place, server),
            Device::Stdio => return f.write_str("stdio"),
            Device::Ring { memory: false, .. } => return f.write_str("ringbuf"),
            Device::Ring { memory: true, .. } => return f.write_str("memory"),
            Device::Null => return f.write_str("null"),
            Device::File { .. } => return f.write_str("file"),
        };
        match place {
            Place::Address(Address::Unix(path)) => write!(f, "unix:{}", path.display())?,
            Place::Address(Address::Tcp { host, port }) => write!(f, "tcp:{host}:{port}")?,
            Place::Passed(number) => write!(f, "fd:{number}")?,
        }
        f.write_str(if *server { ",server=on" } else { "" })
    }
}

/// Options of sockets that QEMU knows and that would change what is sent.
const REFUSED: &[&str] = &["websocket", "tls-creds", "tls-authz", "abstract", "to", "logfile", "mux"];
/// Options that change nothing here: hosts are numbers or names in any family, and nothing is delayed.
const HARMLESS: &[&str] =
    &["delay", "nodelay", "tight", "ipv4", "ipv6", "logappend", "reconnect", "reconnect-ms", "signal"];

impl Device {
    /// Reads `stdio,id=m`, `socket,id=m,path=p,server=on,wait=off`, also with the old `server,nowait`.
    fn read(text: &str) -> Result<(String, Device), QmpError> {
        let mut options = Options::read(text)?;
        let backend = options.take("backend").unwrap_or_default();
        let id = options.take("id");
        let device = match backend.as_str() {
            "stdio" => {
                options.ignore(&["signal"]);
                Device::Stdio
            }
            "socket" => Device::read_socket(&mut options)?,
            "ringbuf" | "memory" => {
                let size = options.take("size").map(|text| {
                    let size = parse_size(&text).ok().and_then(|size| i64::try_from(size).ok());
                    size.ok_or_else(|| QmpError::generic("Parameter 'size' expects a size"))
                });
                let size = size.transpose()?.unwrap_or(RINGBUF_BYTES_DEFAULT);
                Device::Ring { size, memory: backend == "memory" }
            }
            "null" => Device::Null,
            "file" => {
                let append = options.switch("append")?.unwrap_or(false);
                let path = options.take("path");
                let path = path.ok_or_else(|| QmpError::generic("chardev: file: no filename given"))?;
                Device::File { path, append }
            }
            "pipe" | "pty" | "udp" | "parallel" | "serial" | "mux" | "hub" => {
                let why = format!("chardev '{backend}' is not supported: use socket or stdio");
                return Err(QmpError::generic(why));
            }
            _ => return Err(QmpError::generic(format!("'{backend}' is not a valid char driver name"))),
        };
        options.finish()?;
        let id = id.ok_or_else(|| QmpError::generic("chardev: no id specified"))?;
        if !names::is_id(&id) {
            return Err(QmpError::generic("Parameter 'id' expects an identifier"));
        }
        Ok((id, device))
    }

    fn read_socket(options: &mut Options) -> Result<Device, QmpError> {
        if options.switch("telnet")?.unwrap_or(false) {
            return Err(QmpError::generic("'telnet' of chardev sockets is not supported: leave it out"));
        }
        if let Some(name) = REFUSED.iter().find(|name| options.take(name).is_some()) {
            let why = format!("'{name}' of chardev sockets is not supported: give path, or host and port");
            return Err(QmpError::generic(why));
        }
        options.ignore(HARMLESS);
        let (path, host, port) = (options.take("path"), options.take("host"), options.take("port"));
        let fd = options.take("fd");
        let server = options.switch("server")?.unwrap_or(false);
        let wait = options.switch("wait")?;
        if wait.is_some() && !server {
            return Err(QmpError::generic(
                "'wait' option is incompatible with socket in client connect mode",
            ));
        }
        let place = match (path, host, port, fd) {
            (None, None, None, Some(fd)) => {
                let number =
                    fd.parse().map_err(|_| QmpError::generic(format!("Unable to parse FD number {fd}")))?;
                if !server {
                    return Err(QmpError::generic(
                        "'fd' of chardev sockets is not supported in client mode: give server=on",
                    ));
                }
                Place::Passed(number)
            }
            (Some(path), None, None, None) => Place::Address(Address::Unix(path.into())),
            (None, host, Some(port), None) => {
                let host = host.unwrap_or_default();
                let number = port.parse().map_err(|_| {
                    QmpError::generic(format!(
                        "address resolution failed for {host}:{port}: a port is a number from 0 to 65535"
                    ))
                })?;
                Place::Address(Address::Tcp { host, port: number })
            }
            (None, Some(_), None, None) => return Err(QmpError::generic("chardev: socket: no port given")),
            (None, None, None, None) => {
                return Err(QmpError::generic("chardev: socket: give path, or host and port, or fd"));
            }
            _ => {
                return Err(QmpError::generic("None or one of 'path', 'fd' or 'host' option required."));
            }
        };
        Ok(Device::Socket { place, server, wait: wait.unwrap_or(true) })
    }

    /// Its type, as `qom-list` tells it.
    pub const fn kind(&self) -> &'static str {
        match self {
            Device::Stdio => "chardev-stdio",
            Device::Socket { .. } => "chardev-socket",
            Device::Ring { memory: false, .. } => "chardev-ringbuf",
            Device::Ring { memory: true, .. } => "chardev-memory",
            Device::Null => "chardev-null",
            Device::File { .. } => "chardev-file",
        }
    }

    /// What `chardev-add` describes.
    pub fn of(backend: ChardevBackend) -> Result<Device, QmpError> {
        Ok(match backend {
            ChardevBackend::Refused(why) => return Err(QmpError::generic(why)),
            ChardevBackend::Null => Device::Null,
            ChardevBackend::File { out, append } => Device::File { path: out, append },
            ChardevBackend::Ringbuf { size, memory } => {
                Device::Ring { size: size.unwrap_or(RINGBUF_BYTES_DEFAULT), memory }
            }
            ChardevBackend::Socket { address, server } => {
                let place = match address {
                    SocketAddress::Inet { host, port } => Place::Address(Address::Tcp { host, port }),
                    SocketAddress::Unix { path } => Place::Address(Address::Unix(path.into())),
                    SocketAddress::Fd { number } if server => Place::Passed(number),
                    SocketAddress::Fd { .. } => {
                        return Err(QmpError::generic("a passed socket is only listened at: give server"));
                    }
                };
                Device::Socket { place, server, wait: false }
            }
        })
    }

    /// Opens it. A socket whose port the kernel chooses knows it afterwards.
    pub async fn open(&mut self) -> Result<Held, QmpError> {
        match self {
            Device::Stdio => Ok(Held::Free(Chardev::Stdio)),
            Device::Ring { size, .. } => Ring::new(*size).map(Held::Ring),
            Device::Null => Ok(Held::Idle),
            Device::File { path, append } => make_file(path, *append).map(|()| Held::Idle),
            Device::Socket { place, server, wait } => {
                open_socket(place, *server, *wait).await.map(Held::Free)
            }
        }
    }
}

/// What went wrong, in the system's words alone.
fn in_short(error: &IoError) -> String {
    let text = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    text.split(" (os error ").next().unwrap_or_default().to_owned()
}

async fn open_socket(place: &mut Place, server: bool, wait: bool) -> Result<Chardev, QmpError> {
    let listener = match place {
        Place::Passed(number) => inherit(*number)?,
        Place::Address(address) if server => {
            let listener = bind_with(address, Listener::bind_guarded).await?;
            if matches!(address, Address::Tcp { .. }) {
                address.clone_from(listener.address());
            }
            listener
        }
        Place::Address(address) => {
            let connection = connector(address).connect().await;
            return connection.map(Chardev::Client).map_err(|error| {
                QmpError::generic(format!("Failed to connect to '{address}': {}", in_short(&error)))
            });
        }
    };
    let first = match wait {
        true => Some(listener.accept().await.map_err(|error| QmpError::generic(error.to_string()))?),
        false => None,
    };
    Ok(Chardev::Server(listener, first))
}

/// Listens at `address`.
pub async fn bind(address: &Address) -> Result<Listener, QmpError> {
    bind_with(address, Listener::bind).await
}

async fn bind_with(
    address: &Address,
    bind: fn(&Address) -> infill_base::IoResult<Listener>,
) -> Result<Listener, QmpError> {
    let there = address.clone();
    // A port that is taken is waited for.
    let bound = rt::offload(move || bind(&there)).await.map_err(IoError::from).flatten();
    bound.map_err(|error| {
        let what = match address {
            Address::Unix(_) => "bind socket to",
            Address::Tcp { .. } => "listen at",
        };
        QmpError::generic(format!("Failed to {what} {address}: {}", error.message()))
    })
}

/// Listens at a socket that the process was started with.
pub fn inherit(number: i32) -> Result<Listener, QmpError> {
    Listener::inherited(number).map_err(|error| QmpError::generic(error.message()))
}

/// Standard input and output as a connection.
pub fn standard() -> Option<Connection> {
    match stdio() {
        Ok(connection) => Some(connection),
        Err(error) => {
            tracing::error!(%error, "no monitor on standard input and output");
            None
        }
    }
}

/// Options as chardevs spell them: `key=value`, and keys alone as switches, with `no` before them for off.
struct Options(BTreeMap<String, String>);

impl Options {
    fn read(text: &str) -> Result<Options, QmpError> {
        let mut options = BTreeMap::new();
        let mut rest = text;
        while !rest.is_empty() {
            let mut word = String::new();
            // One item; `,,` stands for a comma in it.
            loop {
                let comma = rest.find(',').unwrap_or(rest.len());
                word.push_str(&rest[..comma]);
                rest = rest.get(comma + 1..).unwrap_or_default();
                match rest.strip_prefix(',') {
                    Some(after) => {
                        word.push(',');
                        rest = after;
                    }
                    None => break,
                }
            }
            let first = options.is_empty();
            let (key, value) = match word.split_once('=') {
                Some((key, value)) => (key.to_owned(), value.to_owned()),
                None if first => ("backend".into(), word),
                None if matches!(word.as_str(), "delay" | "nodelay") => (word, "on".into()),
                None => match word.strip_prefix("no") {
                    Some(key) => (key.to_owned(), "off".into()),
                    None => (word, "on".into()),
                },
            };
            options.insert(key, value);
        }
        Ok(Options(options))
    }

    fn take(&mut self, name: &str) -> Option<String> {
        self.0.remove(name)
    }

    fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.0.remove(*name);
        }
    }

    fn switch(&mut self, name: &str) -> Result<Option<bool>, QmpError> {
        match self.take(name).as_deref() {
            None => Ok(None),
            Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
            Some("off" | "no" | "false" | "n") => Ok(Some(false)),
            Some(_) => Err(QmpError::generic(format!("Parameter '{name}' expects 'on' or 'off'"))),
        }
    }

    fn finish(self) -> Result<(), QmpError> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => Err(QmpError::generic(format!("Invalid parameter '{name}'"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<(String, Device), String> {
        Device::read(text).map_err(|error| error.desc)
    }

    #[test]
    fn a_socket_is_described_in_the_new_and_the_old_way() {
        let unix = |server, wait| {
            let place = Place::Address(Address::Unix("/s,1".into()));
            Ok(("a".to_owned(), Device::Socket { place, server, wait }))
        };
        assert_eq!(read("socket,id=a,path=/s,,1,server=on,wait=off"), unix(true, false));
        assert_eq!(read("backend=socket,path=/s,,1,id=a,server,nowait"), unix(true, false));
        assert_eq!(read("socket,id=a,path=/s,,1,server=on"), unix(true, true));
        assert_eq!(read("socket,id=a,path=/s,,1"), unix(false, true));
        let place = Place::Address(Address::Tcp { host: "127.0.0.1".into(), port: 7 });
        let tcp = Device::Socket { place, server: true, wait: false };
        assert_eq!(
            read("socket,id=a,host=127.0.0.1,port=7,server=on,wait=off,nodelay"),
            Ok(("a".into(), tcp))
        );
        let passed = Device::Socket { place: Place::Passed(7), server: true, wait: false };
        assert_eq!(read("socket,fd=7,server=on,wait=off,id=a"), Ok(("a".into(), passed)));
        assert_eq!(read("stdio,id=m,signal=off"), Ok(("m".into(), Device::Stdio)));
    }

    /// Each row as qemu-storage-daemon 10.0.2 answers it.
    #[test]
    fn what_is_wrong_is_refused_with_the_words_that_managers_know() {
        for (text, why) in [
            ("stdio", "chardev: no id specified"),
            ("stdio,id=a,foo=1", "Invalid parameter 'foo'"),
            ("foo,id=a", "'foo' is not a valid char driver name"),
            (
                "socket,id=a,path=/s,server=on,host=x",
                "None or one of 'path', 'fd' or 'host' option required.",
            ),
            ("socket,id=a,path=/s,server=maybe", "Parameter 'server' expects 'on' or 'off'"),
            ("socket,id=a,host=localhost", "chardev: socket: no port given"),
            ("socket,id=1a,path=/s", "Parameter 'id' expects an identifier"),
            (
                "socket,id=a,wait=off,path=/s",
                "'wait' option is incompatible with socket in client connect mode",
            ),
        ] {
            assert_eq!(read(text), Err(why.into()), "{text}");
        }
        for text in [
            "socket,id=a,path=/s,tls-creds=t",
            "pty,id=a",
            "socket,id=a,fd=3",
            "socket,id=a,path=/s,telnet=on",
        ] {
            assert!(read(text).unwrap_err().contains("not supported"), "{text}");
        }
    }
}
