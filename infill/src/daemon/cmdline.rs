//! The command line of qemu-storage-daemon: options in the order in which they are to be carried out.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use infill_qmp::ObjectOptions;

use super::config::{self, Config};
use super::migration;
use super::qemu_nbd::OneDisk;
use super::sandbox::Sandbox;

/// Most options of one command line.
const OPTIONS_MAX: usize = 16 << 10;

/// What an option makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A node.
    Blockdev,
    /// A character device.
    Chardev,
    /// A monitor on a character device.
    Monitor,
    /// The NBD server.
    NbdServer,
    /// An export.
    Export,
    /// An object.
    Object,
}

impl Kind {
    const ALL: [Kind; 6] =
        [Kind::Blockdev, Kind::Chardev, Kind::Monitor, Kind::NbdServer, Kind::Export, Kind::Object];

    /// The option as it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Blockdev => "--blockdev",
            Kind::Chardev => "--chardev",
            Kind::Monitor => "--monitor",
            Kind::NbdServer => "--nbd-server",
            Kind::Export => "--export",
            Kind::Object => "--object",
        }
    }
}

/// One option.
#[derive(Clone, PartialEq, Eq)]
pub struct Opt {
    /// What it makes.
    pub kind: Kind,
    /// How.
    pub text: String,
}

impl std::fmt::Debug for Opt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Opt({})", self.told())
    }
}

impl Opt {
    /// The option as an error tells of it: an object may hold a secret.
    pub fn told(&self) -> String {
        let text = match self.kind {
            Kind::Object => &ObjectOptions::told(&self.text),
            _ => &self.text,
        };
        format!("{} {text}", self.kind.as_str())
    }
}

/// A command line to be carried out.
#[derive(Clone, Debug, Default)]
pub struct CommandLine {
    /// In order.
    pub options: Vec<Opt>,
    /// Where the process id is written.
    pub pidfile: Option<PathBuf>,
    /// Where metrics are served.
    pub metrics: Option<String>,
    /// Whether logs are one JSON object a line.
    pub log_json: bool,
    /// Where what is made is kept.
    pub state: Option<PathBuf>,
    /// Whether what was kept there is forgotten first.
    pub forget: bool,
    /// Whether the sandbox is entered.
    pub sandbox: Sandbox,
    /// What it can reach; empty is all but the system.
    pub sandbox_paths: Vec<PathBuf>,
    /// Where changes of images are recorded that only memory has.
    pub journal: Option<PathBuf>,
    /// Where disks come from other hosts and go to them.
    pub migration: Option<migration::Options>,
    /// Whether it goes into the background.
    pub daemonize: bool,
    /// Whether standard error stays where it is then.
    pub keep_stderr: bool,
    /// The disk of a daemon that serves one, and ends with its clients.
    pub one: Option<OneDisk>,
}

/// What a command line asks for.
#[derive(Clone, Debug)]
pub enum Parsed {
    /// To run.
    Run(Box<CommandLine>),
    /// To print this, and nothing else.
    Print(String),
}

/// The file that stands for a command line.
const CONFIG: &str = "--config";

/// Options without a value.
const SWITCHES: [&str; 2] = ["--daemonize", "--forget"];

/// Options with a value that make nothing.
const OTHERS: [&str; 8] = [
    "--migration",
    "--pidfile",
    "--state",
    "--journal",
    "--sandbox",
    "--sandbox-path",
    "--metrics",
    "--log-format",
];

const OBJECTS: &str = "List of user creatable objects:\n  authz-list\n  authz-simple\n  iothread\n  secret\n  throttle-group\n  tls-creds-x509\n";

/// Reads the arguments behind the subcommand.
pub fn parse(arguments: Vec<OsString>) -> Result<Parsed> {
    let mut command_line = CommandLine::default();
    let mut config: Option<Config> = None;
    let mut given = Vec::new();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let argument = argument.into_string().map_err(|raw| anyhow!("{}: it is not UTF-8", raw.display()))?;
        let (name, attached) = match argument.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value.to_owned())),
            _ => (argument.as_str(), None),
        };
        match name {
            "-h" | "--help" => return Ok(Parsed::Print(help())),
            "-V" | "--version" => return Ok(Parsed::Print(version())),
            "--daemonize" if attached.is_none() => {
                command_line.daemonize = true;
                continue;
            }
            "--forget" if attached.is_none() => {
                command_line.forget = true;
                continue;
            }
            "-T" | "--trace" => {
                bail!("--trace is not supported: set RUST_LOG=debug for logs on standard error")
            }
            _ => {}
        }
        let kind = Kind::ALL.into_iter().find(|kind| kind.as_str() == name);
        if kind.is_none() && name != CONFIG && !OTHERS.contains(&name) {
            if name.starts_with('-') {
                let name = ObjectOptions::told_stray(name);
                bail!("unrecognized option '{name}'; `infill daemon --help` lists those that are known");
            }
            bail!("{}: Unexpected argument", ObjectOptions::told_stray(&argument));
        }
        let value = match attached {
            Some(value) => Some(value),
            None => arguments
                .next()
                .map(OsString::into_string)
                .transpose()
                .map_err(|raw| anyhow!("{name} {}: it is not UTF-8", raw.display()))?,
        };
        let Some(text) = value else { bail!("option '{name}' requires an argument") };
        match kind {
            Some(Kind::Object) if text == "help" => return Ok(Parsed::Print(OBJECTS.into())),
            Some(kind) => command_line.options.push(Opt { kind, text }),
            None if name == CONFIG => {
                let read = config::read(Path::new(&text), &OTHERS, &SWITCHES)?;
                command_line.options.extend(read.options.iter().cloned());
                if config.replace(read).is_some() {
                    bail!("{CONFIG} is given twice: one file has all");
                }
            }
            None => {
                command_line.set(name, text)?;
                given.push(name.to_owned());
            }
        }
        if command_line.options.len() > OPTIONS_MAX {
            bail!("more than {OPTIONS_MAX} options are given: add the rest over a monitor");
        }
    }
    let config = config.unwrap_or_default();
    command_line.daemonize |= config.switches.contains(&"--daemonize");
    command_line.forget |= config.switches.contains(&"--forget");
    // What the command line says itself is what counts.
    for (name, text) in config.others.into_iter().filter(|(name, _)| !given.iter().any(|given| given == name))
    {
        command_line.set(name, text)?;
    }
    let terminal = |option: &Opt| option.kind == Kind::Chardev && option.text.contains("stdio");
    if command_line.daemonize && command_line.options.iter().any(terminal) {
        bail!("a process in the background has no standard input: --daemonize is not for --chardev stdio");
    }
    if command_line.forget && command_line.state.is_none() {
        bail!("--forget is only of use with --state DIR: without it nothing is kept");
    }
    Ok(Parsed::Run(Box::new(command_line)))
}

impl CommandLine {
    /// Sets one of [`OTHERS`].
    fn set(&mut self, name: &str, text: String) -> Result<()> {
        match name {
            "--metrics" => self.metrics = Some(text),
            "--log-format" => {
                self.log_json = match text.as_str() {
                    "json" => true,
                    "text" => false,
                    _ => bail!("--log-format {text}: it is text or json"),
                };
            }
            "--state" => self.state = Some(text.into()),
            "--migration" => {
                let options = migration::Options::read(&text);
                self.migration = Some(options.map_err(|error| anyhow!("--migration {text}: {error:#}"))?);
            }
            "--sandbox" => self.sandbox = Sandbox::read(&text)?,
            "--sandbox-path" => self.sandbox_paths.push(text.into()),
            "--journal" => self.journal = Some(text.into()),
            _ => self.pidfile = Some(text.into()),
        }
        Ok(())
    }
}

fn version() -> String {
    format!(
        "infill daemon version {} (the interface is that of qemu-storage-daemon 10.0)\n",
        env!("CARGO_PKG_VERSION")
    )
}

fn help() -> String {
    "\
Usage: infill daemon [options]
Serves many disks, controlled over QMP. Options, commands and events are those of qemu-storage-daemon.

  -h, --help             display this help and exit
  -V, --version          output version information and exit

  --blockdev [driver=]<driver>[,node-name=<N>][,discard=ignore|unmap]
             [,cache.direct=on|off][,cache.no-flush=on|off]
             [,read-only=on|off][,auto-read-only=on|off]
             [,force-share=on|off][,driver specific parameters...]
                         add a block node: file, host_device, null-co, nbd, raw,
                         qcow2, qed, copy-on-read; also as JSON: --blockdev '{...}'

  --chardev stdio,id=<id>
  --chardev socket,id=<id>,path=<path>[,server=on|off][,wait=on|off]
  --chardev socket,id=<id>,host=<host>,port=<port>[,server=on|off][,wait=on|off]
  --chardev socket,id=<id>,fd=<fd>,server=on[,wait=on|off]
  --chardev ringbuf,id=<id>[,size=<size>]
  --chardev file,id=<id>,path=<path>[,append=on|off]
  --chardev null,id=<id>
                         add a character device

  --export [type=]nbd,id=<id>,node-name=<node-name>[,name=<export-name>]
           [,description=<text>][,writable=on|off][,allocation-depth=on|off]
                         export a block node over NBD (requires --nbd-server)

  --monitor [chardev=]name[,mode=control]
                         put a QMP monitor on a character device

  --nbd-server addr.type=inet,addr.host=<host>,addr.port=<port>
               [,tls-creds=<id>][,tls-authz=<id>][,max-connections=<n>]
  --nbd-server addr.type=unix,addr.path=<path>
               [,tls-creds=<id>][,tls-authz=<id>][,max-connections=<n>]
  --nbd-server addr.type=fd,addr.str=<fd>
               [,tls-creds=<id>][,tls-authz=<id>][,max-connections=<n>]
                         start the NBD server

  --object help          list the types of objects
  --object iothread,id=<id>
  --object tls-creds-x509,id=<id>,dir=<dir>[,endpoint=server|client]
           [,verify-peer=on|off][,sanity-check=on|off][,passwordid=<id>]
  --object authz-simple,id=<id>,identity=<name>
  --object authz-list,id=<id>[,policy=deny|allow][,rules.<n>.match=<name>,
           rules.<n>.policy=deny|allow[,rules.<n>.format=exact|glob]]...
  --object secret,id=<id>,data=<text>|file=<file>[,format=raw|base64]
                         add an object: a name for exports, who may come in by
                         the names in certificates (tls-authz), or the credentials in
                         <dir> (ca-cert.pem, ca-crl.pem, server-cert.pem,
                         server-key.pem, client-cert.pem, client-key.pem)

  --config <file>        options from a TOML file: keys are options without dashes,
                         what makes something is a table ([[blockdev]], [[export]],
                         ...) with the members of the QMP command; other options of
                         this command line win over the file's

  --pidfile <path>       write the process id to a file after startup
  --daemonize            end this process when another one, in the background,
                         serves; with an exit code of 1 when it could not

  --metrics <host>:<port>
  --metrics <socket>     serve figures for Prometheus: GET /metrics
  --log-format text|json how logs on standard error are written; RUST_LOG asks for
                         more or less of them

  --state <dir>          keep nodes, objects, the NBD server, exports and jobs in
                         <dir>, and begin with those that are kept there
  --forget               begin with nothing: what is kept in <dir> is dropped
  --journal <dir>        keep volatile journals in <dir>, on a tmpfs: what the daemon
                         has acknowledged and not flushed is not lost with it
                         (default with --state: /run/infill/journal); where none
                         can be kept, every allocation is written through

  --migration listen=<host>:<port>,data=<host>:<port>[,reach=<host>:<port>]
              [,directory=<dir>][,on-hold=hold|stop|eio][,hold-time=<secs>]
              [,tls-creds=<dir>[,tls-hostname=<name>]][,reconnect-time=<secs>]
                         disks change hosts: other daemons bring theirs at the first
                         address and read those that have left at the second (either
                         may be the path of a socket), which they find at <reach> if
                         not there; images of disks that come are made in <dir>;
                         while a disk's source is away, reads of what is only there
                         wait (on-hold=hold) or fail after <secs> (20), and then a
                         hypervisor with rerror=stop stops the machine (stop) or the
                         machine is told (eio);
                         with tls-creds, a directory of credentials of both ends,
                         only over TLS and with those who show a certificate; one
                         that has restarted asks its peer for <reconnect-time> (60)
                         before it serves what the peer may have a say in; needs
                         --state

  --sandbox on|off|auto  give up what a storage daemon never needs: running
                         programs, other users and processes, writing below /etc,
                         /usr, /boot, /proc, /sys and in /; auto (the default) as
                         far as the kernel can, on wholly or not at all
  --sandbox-path <path>  reach only this file or directory, and what is below it
                         (may be given several times): disks, credentials, the
                         state, and the directories of sockets and pid file

Options are carried out in their order. SIGTERM, SIGINT, SIGHUP and the command
`quit` end the daemon in order: requests are answered, everything is synced. With
--state, all that was there is there again at the next start, and jobs go on.
An option that makes what is kept already, in the same way, changes nothing.
"
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(arguments: &[&str]) -> Result<Parsed, String> {
        parse(arguments.iter().map(OsString::from).collect()).map_err(|error| error.to_string())
    }

    #[test]
    fn options_keep_their_order_in_either_spelling() {
        let line = [
            "--export=nbd,id=e",
            "--blockdev",
            "null-co,node-name=n",
            "--pidfile",
            "p",
            "--object=iothread,id=t",
        ];
        let Ok(Parsed::Run(command_line)) = read(&line) else { panic!() };
        let kinds: Vec<_> = command_line.options.iter().map(|option| option.kind).collect();
        assert_eq!(kinds, [Kind::Export, Kind::Blockdev, Kind::Object]);
        assert_eq!(command_line.options[0].text, "nbd,id=e");
        assert_eq!(command_line.pidfile, Some("p".into()));
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        for (line, why) in [
            (&["--foo"][..], "unrecognized option '--foo'"),
            (&["foo"], "foo: Unexpected argument"),
            (&["a=b"], "a=b: Unexpected argument"),
            (&["secret,id=s,data=hush"], "secret,id=…: Unexpected argument"),
            (&[r#"{"qom-type": "secret", "data": "hush"}"#], "{…: Unexpected argument"),
            (&["-object=secret,id=s,data=hush"], "unrecognized option '-object=…'"),
            (&["--blockdev"], "option '--blockdev' requires an argument"),
            (&["--sandbox", "maybe"], "--sandbox maybe: it is on, off or auto"),
            (&["--daemonize=1"], "unrecognized option '--daemonize'"),
            (&["--trace", "x"], "--trace is not supported"),
            (&["--forget"], "--forget is only of use with --state"),
            (&["--forget=1"], "unrecognized option '--forget'"),
            (&["--log-format", "xml"], "--log-format xml: it is text or json"),
            (&["--state"], "option '--state' requires an argument"),
        ] {
            let told = read(line).unwrap_err();
            assert!(told.starts_with(why), "{told}");
        }
    }

    #[test]
    fn help_and_version_win_over_what_follows() {
        for option in ["-h", "--help", "-V", "--version"] {
            assert!(matches!(read(&[option, "--foo"]), Ok(Parsed::Print(_))));
        }
    }
}
