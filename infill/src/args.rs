//! The command line: what is taken, and what its help says. Option letters are those of qemu-img and qemu-nbd.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::blockdev::FormatKind;
use crate::size::{parse_size, parse_time};

/// Virtual disks that are usable before their data has arrived.
#[derive(Debug, Parser)]
#[command(name = "infill", version, about, max_term_width = 100, propagate_version = true)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed or wrong usage. `check` says its own in its help.\n\nLogs go to standard error; \
                  INFILL_LOG=info or =debug in the environment asks for more than warnings."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create an image, or an overlay over a base that may be remote.
    Create(CreateArgs),
    /// Tell what an image is.
    Info(InfoArgs),
    /// Look for inconsistencies in an image, and repair them.
    Check(CheckArgs),
    /// List, make, delete or go back to the snapshots that an image keeps in itself.
    Snapshot(SnapshotArgs),
    /// Tell where the data of a disk lies, layer by layer.
    Map(MapArgs),
    /// Serve one disk over NBD, in the foreground.
    Serve(ServeArgs),
    /// Fill an overlay until it needs no backing file: an image at rest, or a disk of a running daemon.
    Stream(StreamArgs),
    /// Write what a layer holds down into one below it, in a running daemon.
    Commit(CommitArgs),
    /// Copy a disk of a running daemon to another node, and keep the copy up until it takes the disk's place.
    Mirror(MirrorArgs),
    /// Copy a disk of a running daemon as it is now.
    Backup(BackupArgs),
    /// List the jobs of a running daemon.
    Jobs(JobsArgs),
    /// Pause a job of a running daemon.
    Pause(JobArgs),
    /// Let a paused job go on.
    Resume(JobArgs),
    /// Cancel a job, and wait until it has ended.
    Cancel(CancelArgs),
    /// Complete a job that is ready, and wait until it has ended.
    Complete(JobEndArgs),
    /// Show what the disks and jobs of a running daemon are doing.
    Top(TopArgs),
    /// Move disks of a running daemon to another host: they change hands at once, their data follows.
    Migrate(MigrateArgs),
    /// List the migrations that a running daemon knows.
    Migrations(MigrationsArgs),
    /// Tell who owns a disk that changes hosts.
    Whois(WhoisArgs),
    /// Have the disks of a migration change hands now.
    Switch(MigrationArgs),
    /// End a migration: the disks stay where they are, or come back if they still can.
    Abort(MigrationArgs),
    /// Own disks whose source is dead, at the target.
    Takeover(TakeoverArgs),
    /// Take disks back whose target is dead, at the source.
    Reclaim(ReclaimArgs),
    /// Serve many disks, controlled over QMP: the command line and protocol of qemu-storage-daemon.
    #[command(alias = "qemu-storage-daemon", disable_help_flag = true, disable_version_flag = true)]
    Daemon {
        /// Its options; `infill daemon --help` lists them.
        #[arg(value_name = "OPTIONS", allow_hyphen_values = true, trailing_var_arg = true)]
        arguments: Vec<std::ffi::OsString>,
    },
    /// Serve one disk with the options of qemu-nbd.
    #[command(disable_help_flag = true, disable_version_flag = true)]
    QemuNbd {
        /// Its options; `infill qemu-nbd --help` lists them.
        #[arg(value_name = "OPTIONS", allow_hyphen_values = true, trailing_var_arg = true)]
        arguments: Vec<std::ffi::OsString>,
    },
    /// Show the whole story on this machine, in a minute: a disk that is used while its data arrives.
    Demo,
    /// Print a script that completes this command line in a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or that of a command.
    Man {
        /// The command.
        command: Option<String>,
    },
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Human,
    /// For programs: JSON with qemu-img's keys.
    Json,
}

/// How an image is opened.
#[derive(Clone, Debug, Default, Args)]
pub struct ImageArgs {
    /// Format of the image (default: found out from its first bytes).
    #[arg(short = 'f', long = "format", value_name = "FMT")]
    pub format: Option<FormatKind>,
    /// Format of a backing file, where the header above does not say it.
    #[arg(long, value_name = "FMT")]
    pub backing_format: Option<FormatKind>,
    /// Find no format out from bytes that a guest may have written: formats must be named, by -f and by headers.
    #[arg(long)]
    pub untrusted: bool,
}

/// `infill create`.
#[derive(Debug, Args)]
#[command(
    after_help = "Overlays and images in qcow2 have 64 KiB clusters and subclusters of 2 KiB; QEMU reads them from \
    version 5.2 on. For older readers: -o extended_l2=off.\n\nExit codes: 0 created, 1 failed."
)]
pub struct CreateArgs {
    /// The file to create (an existing file is overwritten, unless somebody has it open).
    pub filename: Option<String>,
    /// Size of the disk, as 10G. Default: that of the backing file.
    #[arg(value_parser = parse_size)]
    pub size: Option<u64>,
    /// Format of the new image (default: qcow2 with a backing file, else raw).
    #[arg(short = 'f', long = "format", value_name = "FMT")]
    pub format: Option<FormatKind>,
    /// Options of the format, as key=value[,key=value…]; `-o help` lists them.
    #[arg(short = 'o', long = "options", value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// The image that the new one lies over: a file name or a URI. Relative names are relative to FILENAME's directory.
    #[arg(short = 'b', long = "backing", value_name = "FILE")]
    pub backing: Option<String>,
    /// Format of the backing file.
    #[arg(short = 'F', long = "backing-format", value_name = "FMT")]
    pub backing_format: Option<FormatKind>,
    /// Do not open the backing file to see whether it is there (a size must be given then).
    #[arg(short = 'u', long)]
    pub unchecked: bool,
    /// Print nothing but errors.
    #[arg(short, long)]
    pub quiet: bool,
}

/// `infill info`.
#[derive(Debug, Args)]
#[command(after_help = "Exit codes: 0 told, 1 failed.")]
pub struct InfoArgs {
    /// The image: a file name or a URI.
    pub filename: String,
    /// How it is opened.
    #[command(flatten)]
    pub image: ImageArgs,
    /// How the result is printed.
    #[arg(long, value_name = "OFMT", default_value = "human")]
    pub output: Output,
    /// Tell of the whole chain, from the top to the base.
    #[arg(long)]
    pub backing_chain: bool,
    /// Open it although another process writes to it. What is told may be out of date or contradict itself.
    #[arg(short = 'U', long)]
    pub force_share: bool,
}

/// `infill snapshot`.
#[derive(Debug, Args)]
#[command(after_help = "Dates are in UTC. Exit codes: 0 done, 1 failed.")]
pub struct SnapshotArgs {
    /// The image: a file name or a URI.
    pub filename: String,
    /// How it is opened.
    #[command(flatten)]
    pub image: ImageArgs,
    /// List all snapshots (what is done where nothing else is asked for).
    #[arg(short, long, group = "act")]
    pub list: bool,
    /// Make a snapshot of this name.
    #[arg(short, long, value_name = "NAME", group = "act")]
    pub create: Option<String>,
    /// Make the disk what it was at this snapshot: an id, or a name. What came after is lost, where no other snapshot has it.
    #[arg(short, long, value_name = "SNAPSHOT", group = "act")]
    pub apply: Option<String>,
    /// Delete the first snapshot of this name.
    #[arg(short, long, value_name = "NAME", group = "act")]
    pub delete: Option<String>,
    /// Say nothing but errors.
    #[arg(short, long)]
    pub quiet: bool,
    /// List although another process writes to it.
    #[arg(short = 'U', long)]
    pub force_share: bool,
}

/// What `check` may repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RepairArg {
    /// Give leaked clusters back.
    Leaks,
    /// Everything. May choose the wrong cure for what is already damaged: keep a copy.
    All,
}

/// `infill check`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes, after repairs if any were asked for:\n   0  the image is consistent\n   1  the check \
    could not be done\n   2  the image is corrupt\n   3  the image has leaked clusters, and is not corrupt\n  63  the \
    format has nothing to check"
)]
pub struct CheckArgs {
    /// The image: a file name or a URI.
    pub filename: String,
    /// Format of the image (default: found out from its first bytes).
    #[arg(short = 'f', long = "format", value_name = "FMT")]
    pub format: Option<FormatKind>,
    /// Repair.
    #[arg(short = 'r', long = "repair", value_name = "WHAT")]
    pub repair: Option<RepairArg>,
    /// How the result is printed.
    #[arg(long, value_name = "OFMT", default_value = "human")]
    pub output: Output,
    /// Print nothing but errors.
    #[arg(short, long)]
    pub quiet: bool,
    /// Open it although another process writes to it (not with -r).
    #[arg(short = 'U', long, conflicts_with = "repair")]
    pub force_share: bool,
}

/// `infill map`.
#[derive(Debug, Args)]
#[command(after_help = "Exit codes: 0 told, 1 failed.")]
pub struct MapArgs {
    /// The image: a file name or a URI.
    pub filename: String,
    /// How it is opened.
    #[command(flatten)]
    pub image: ImageArgs,
    /// First byte to tell of.
    #[arg(short = 's', long, value_name = "OFFSET", default_value = "0", value_parser = parse_size)]
    pub start_offset: u64,
    /// How many bytes to tell of (default: all).
    #[arg(short = 'l', long, value_name = "LEN", value_parser = parse_size)]
    pub max_length: Option<u64>,
    /// How the result is printed.
    #[arg(long, value_name = "OFMT", default_value = "human")]
    pub output: Output,
    /// Open it although another process writes to it.
    #[arg(short = 'U', long)]
    pub force_share: bool,
}

/// What happens to requests that need an NBD source which is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum OnLostArg {
    /// They wait until it is back.
    #[default]
    Hold,
    /// They fail.
    Fail,
}

/// `infill serve`.
#[derive(Debug, Args)]
#[command(
    after_help = "It ends when its last client has gone, unless --persistent or --stream keeps it (with --stream it \
    ends when both the stream is done and the last client has gone), and when SIGTERM, SIGINT or SIGHUP asks it to: \
    requests in flight are answered, everything is synced, images are closed.\n\nExit codes: 0 ended as asked, 1 failed."
)]
pub struct ServeArgs {
    /// The disk: an image's file name or a URI.
    pub image: String,
    /// How it is opened.
    #[command(flatten)]
    pub open: ImageArgs,
    /// Listen at this Unix socket instead of a TCP port.
    #[arg(short = 'k', long, value_name = "PATH", conflicts_with_all = ["bind", "port"])]
    pub socket: Option<PathBuf>,
    /// Address to listen at.
    #[arg(short = 'b', long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub bind: String,
    /// TCP port to listen at; 0 lets the system choose one, which is printed.
    #[arg(short = 'p', long, default_value_t = 10809)]
    pub port: u16,
    /// Name of the export.
    #[arg(short = 'x', long, value_name = "NAME", default_value = "")]
    pub export_name: String,
    /// Description of the export.
    #[arg(short = 'D', long, value_name = "TEXT", default_value = "")]
    pub description: String,
    /// Refuse writes.
    #[arg(short = 'r', long)]
    pub read_only: bool,
    /// Keep what is read from a backing file in the image.
    #[arg(short = 'C', long, conflicts_with = "read_only")]
    pub copy_on_read: bool,
    /// Fill the image from its backing file in the background, until it needs none.
    #[arg(long, conflicts_with = "read_only")]
    pub stream: bool,
    /// Most bytes per second of the stream, as 50M (default: what guests leave over).
    #[arg(long, value_name = "RATE", value_parser = parse_size, requires = "stream")]
    pub speed: Option<u64>,
    /// Bytes per second that the stream gets even while guests are busy, as 1M.
    #[arg(long, value_name = "RATE", value_parser = parse_size, requires = "stream")]
    pub min_rate: Option<u64>,
    /// When the stream wants to be done, from now on, as 90s, 30m or 2h: it is as impolite as that takes.
    #[arg(long, value_name = "TIME", value_parser = parse_time, requires = "stream")]
    pub finish_in: Option<Duration>,
    /// Clients at a time; 0 for no limit of one's own.
    #[arg(short = 'e', long, value_name = "NUM", default_value_t = 0)]
    pub shared: u32,
    /// Go on when the last client has gone.
    #[arg(short = 't', long)]
    pub persistent: bool,
    /// Give space back where the guest discards it: `unmap` or `ignore`.
    #[arg(long, value_name = "DISCARD", default_value = "unmap")]
    pub discard: DiscardArg,
    /// What happens to requests that need an NBD source which has gone away.
    #[arg(long, value_name = "WHAT", default_value = "hold")]
    pub on_lost: OnLostArg,
    /// Take clients over TLS only, with the credentials in this directory: ca-cert.pem, ca-crl.pem (optional),
    /// server-cert.pem, server-key.pem.
    #[arg(long, value_name = "DIR")]
    pub tls_creds: Option<PathBuf>,
    /// Whether clients need a certificate from one of the authorities in ca-cert.pem.
    #[arg(long, value_name = "WHETHER", default_value = "on", requires = "tls_creds")]
    pub tls_verify_peer: Switch,
    /// Write the process id to this file once connections are taken.
    #[arg(long, value_name = "PATH")]
    pub pid_file: Option<PathBuf>,
    /// Threads that serve (default: one for each processor, at most 8).
    #[arg(long, value_name = "NUM", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub threads: Option<u16>,
}

/// On or off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// It does.
    #[default]
    On,
    /// It does not.
    Off,
}

/// What a guest's discard does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DiscardArg {
    /// Nothing.
    Ignore,
    /// Gives the space back.
    #[default]
    Unmap,
}

/// `infill stream`.
#[derive(Debug, Args)]
#[command(
    after_help = "An interrupted stream has done no harm: started again, it goes on where it was.\n\nExit codes: 0 \
    the overlay is filled and everything is on stable storage, 1 failed or interrupted."
)]
pub struct StreamArgs {
    /// The overlay, an image that nobody has open.
    #[arg(required_unless_present = "node", conflicts_with = "node")]
    pub image: Option<String>,
    /// How it is opened.
    #[command(flatten)]
    pub open: ImageArgs,
    /// Keep this layer of the chain, and what lies under it, as backing (its name as the headers give it).
    #[arg(short = 'b', long, value_name = "FILE")]
    pub base: Option<String>,
    /// Most bytes per second, as 50M.
    #[arg(long, value_name = "RATE", value_parser = parse_size)]
    pub speed: Option<u64>,
    /// Bytes per second below which it does not fall for politeness.
    #[arg(long, value_name = "RATE", value_parser = parse_size)]
    pub min_rate: Option<u64>,
    /// When it wants to be done, from now on, as 90s, 30m or 2h: it is as impolite as that takes.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub finish_in: Option<Duration>,
    /// What happens while an NBD source is away.
    #[arg(long, value_name = "WHAT", default_value = "hold", conflicts_with = "node")]
    pub on_lost: OnLostArg,
    /// The node that is to be filled, of a running daemon.
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// The Unix socket of the daemon's QMP monitor (default: what INFILL_SOCKET in the environment says).
    #[arg(long, value_name = "PATH", visible_alias = "monitor", requires = "node")]
    pub socket: Option<PathBuf>,
    /// Id of the job in the daemon (default: the node's name with `stream-` before it).
    #[arg(long, value_name = "ID", requires = "node")]
    pub job_id: Option<String>,
    /// Do not wait for the end of the daemon's job.
    #[arg(long, requires = "node")]
    pub detach: bool,
    /// No progress bar, and nothing but errors.
    #[arg(short, long)]
    pub quiet: bool,
}

/// Which daemon.
#[derive(Clone, Debug, Args)]
pub struct SocketArgs {
    /// The Unix socket of the daemon's QMP monitor (default: what INFILL_SOCKET in the environment says).
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

/// Whether an end is waited for.
#[derive(Clone, Debug, Args)]
pub struct WaitArgs {
    /// Do not wait for the job's end.
    #[arg(long)]
    pub detach: bool,
    /// No progress bar, and nothing but errors.
    #[arg(short, long)]
    pub quiet: bool,
}

/// What every job that is begun takes.
#[derive(Debug, Args)]
pub struct StartArgs {
    /// Which daemon.
    #[command(flatten)]
    pub daemon: SocketArgs,
    /// Id of the job (default: the node's name with the command's before it).
    #[arg(long, value_name = "ID")]
    pub job_id: Option<String>,
    /// Most bytes per second, as 50M.
    #[arg(long, value_name = "RATE", value_parser = parse_size)]
    pub speed: Option<u64>,
    /// Whether its end is waited for.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// `infill commit`.
#[derive(Debug, Args)]
#[command(
    after_help = "A commit of the uppermost layer stops when it is ready, and keeps up with guests' writes; \
    `infill complete` ends it.\n\nExit codes: 0 done, or ready, 1 failed or interrupted (the job goes on then)."
)]
pub struct CommitArgs {
    /// The daemon's node that is the disk.
    pub node: String,
    /// The node that the data go to (default: the lowest layer).
    #[arg(long, value_name = "NODE")]
    pub base: Option<String>,
    /// The uppermost node whose data go there (default: the disk itself).
    #[arg(long, value_name = "NODE")]
    pub top: Option<String>,
    /// Complete it as soon as it is ready.
    #[arg(long, conflicts_with = "detach")]
    pub complete: bool,
    /// How it is begun.
    #[command(flatten)]
    pub start: StartArgs,
}

/// `infill mirror`.
#[derive(Debug, Args)]
#[command(
    after_help = "A mirror stops when it is ready, and keeps up with guests' writes; `infill complete` ends it.\
    \n\nExit codes: 0 done, or ready, 1 failed or interrupted (the job goes on then)."
)]
pub struct MirrorArgs {
    /// The daemon's node that is the disk.
    pub node: String,
    /// The daemon's node that it is copied to.
    pub target: String,
    /// What is copied at first: `full`, `top` or `none`.
    #[arg(long, value_name = "WHAT", default_value = "full")]
    pub sync: String,
    /// When guests' writes are on the target: `background` or `write-blocking`.
    #[arg(long, value_name = "WHEN", default_value = "background")]
    pub copy_mode: String,
    /// Complete it as soon as it is ready.
    #[arg(long, conflicts_with = "detach")]
    pub complete: bool,
    /// How it is begun.
    #[command(flatten)]
    pub start: StartArgs,
}

/// `infill backup`.
#[derive(Debug, Args)]
#[command(after_help = "Exit codes: 0 done, 1 failed or interrupted (the job goes on then).")]
pub struct BackupArgs {
    /// The daemon's node that is the disk.
    pub node: String,
    /// The daemon's node that it is copied to.
    pub target: String,
    /// What is copied: `full`, `top`, `none`, `incremental` or `bitmap`.
    #[arg(long, value_name = "WHAT", default_value = "full")]
    pub sync: String,
    /// The bitmap that says what is copied.
    #[arg(long, value_name = "NAME")]
    pub bitmap: Option<String>,
    /// How it is begun.
    #[command(flatten)]
    pub start: StartArgs,
}

/// `infill jobs`.
#[derive(Debug, Args)]
pub struct JobsArgs {
    /// Which daemon.
    #[command(flatten)]
    pub daemon: SocketArgs,
    /// How the result is printed.
    #[arg(long, value_name = "OFMT", default_value = "human")]
    pub output: Output,
}

/// `infill top`.
#[derive(Debug, Args)]
#[command(
    after_help = "Disks that are exported, or busy: bytes a second (FILLED: put into the disk from below), requests a \
    second, and how long they took, on the average and for all but one in a hundred.\n\nExit codes: 0 shown, 1 failed, \
    or the daemon has ended."
)]
pub struct TopArgs {
    /// Which daemon.
    #[command(flatten)]
    pub daemon: SocketArgs,
    /// Seconds between two looks.
    #[arg(short = 'i', long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=3600))]
    pub interval: u16,
    /// Look once: what happens in one interval.
    #[arg(long)]
    pub once: bool,
    /// How the result is printed.
    #[arg(long, value_name = "OFMT", default_value = "human")]
    pub output: Output,
}

/// `infill migrate`.
#[derive(Debug, Args)]
#[command(
    after_help = "The disks change hands together. The same command again finds the migration that it began.\n\nExit codes: \
    0 the disks are owned there (with --wait: all data is there; with --hold: they are ready to change hands), 1 they stay here, \
    or, with --pre-copy, the guest writes faster than they are copied: the migration is there until `infill abort`."
)]
pub struct MigrateArgs {
    /// The disks of one machine: the UUIDs under which they are exported.
    #[arg(required = true, value_name = "UUID")]
    pub disks: Vec<String>,
    /// Where the other daemon takes disks (its --migration listen=): HOST:PORT, or a socket's path.
    #[arg(long, value_name = "ADDRESS")]
    pub to: String,
    /// Copy nothing before the disks change hands.
    #[arg(long, conflicts_with = "pre_copy")]
    pub post_copy: bool,
    /// Copy everything before the disks change hands: nothing is left at the source.
    #[arg(long)]
    pub pre_copy: bool,
    /// Let the disks change hands after so long, however much was copied.
    #[arg(long, value_name = "SECONDS", conflicts_with_all = ["post_copy", "pre_copy"])]
    pub warm_seconds: Option<u32>,
    /// Let the disks change hands once so much was copied, if not sooner.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with_all = ["post_copy", "pre_copy"])]
    pub warm_bytes: Option<u64>,
    /// What the other daemon's certificate is for, if not the host in --to. (Credentials are those of the daemon's own
    /// --migration tls-creds=DIR.)
    #[arg(long, value_name = "NAME")]
    pub tls_hostname: Option<String>,
    /// Stop before the disks change hands, until `infill switch`.
    #[arg(long)]
    pub hold: bool,
    /// How long the disks can come back once all data is there, unless a guest has written to them there (default: 300 with
    /// --hold, otherwise 0).
    #[arg(long, value_name = "SECONDS")]
    pub way_back: Option<u32>,
    /// The UUID of the migration (default: a new one).
    #[arg(long, value_name = "UUID")]
    pub migration: Option<String>,
    /// Wait until all data is there.
    #[arg(long, conflicts_with = "detach")]
    pub wait: bool,
    /// Print the migration's UUID and do not wait for anything.
    #[arg(long)]
    pub detach: bool,
    /// No progress.
    #[arg(short, long)]
    pub quiet: bool,
    /// Which daemon.
    #[command(flatten)]
    pub daemon: SocketArgs,
}

/// `infill migrations`.
#[derive(Debug, Args)]
pub struct MigrationsArgs {
    /// Which daemon.
    #[command(flatten)]
    pub daemon: SocketArgs,
    /// How the result is printed.
    #[arg(long, value_name = "OFMT", default_value = "human")]
    pub output: Output,
}

/// `infill whois`.
#[derive(Debug, Args)]
pub struct WhoisArgs {
    /// The disk.
    #[arg(value_name = "UUID")]
    pub disk: String,
    /// Which daemon.
    #[command(flatten)]
    pub daemon: SocketArgs,
    /// The monitor's socket of another daemon that is asked too; may be given several times.
    #[arg(long, value_name = "PATH")]
    pub peer: Vec<PathBuf>,
    /// How the result is printed.
    #[arg(long, value_name = "OFMT", default_value = "human")]
    pub output: Output,
}

/// `infill switch`, `infill abort`.
#[derive(Debug, Args)]
pub struct MigrationArgs {
    /// The migration; `infill migrations` lists them.
    #[arg(value_name = "MIGRATION")]
    pub migration: String,
    /// Which daemon.
    #[command(flatten)]
    pub daemon: SocketArgs,
}

/// `infill takeover`.
#[derive(Debug, Args)]
pub struct TakeoverArgs {
    /// What and where.
    #[command(flatten)]
    pub of: MigrationArgs,
    /// The source is dead, and its machine does not run: nobody else writes to the disks.
    #[arg(long)]
    pub peer_dead: bool,
}

/// `infill reclaim`.
#[derive(Debug, Args)]
pub struct ReclaimArgs {
    /// What and where.
    #[command(flatten)]
    pub of: MigrationArgs,
    /// The target is dead, and what its machine has written is given up.
    #[arg(long)]
    pub accept_loss: bool,
}

/// `infill pause`, `infill resume`.
#[derive(Debug, Args)]
pub struct JobArgs {
    /// The job; `infill jobs` lists them.
    pub id: String,
    /// Which daemon.
    #[command(flatten)]
    pub daemon: SocketArgs,
}

/// `infill cancel`.
#[derive(Debug, Args)]
#[command(after_help = "Exit codes: 0 the job has ended as asked, 1 it has not, or had ended before.")]
pub struct CancelArgs {
    /// What and how.
    #[command(flatten)]
    pub end: JobEndArgs,
    /// End a mirror that is ready, and leave its target as it is: a copy of the disk at that instant. Guests stay on the
    /// disk.
    #[arg(long)]
    pub keep_copy: bool,
}

/// `infill complete`.
#[derive(Debug, Args)]
pub struct JobEndArgs {
    /// The job.
    #[command(flatten)]
    pub job: JobArgs,
    /// Whether its end is waited for.
    #[command(flatten)]
    pub wait: WaitArgs,
}
