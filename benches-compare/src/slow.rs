//! A file system on a device whose flush takes [`SYNC_TIME`], and which is as fast as memory else.
//!
//! Both programs work on ordinary files there: ext4, on a loop device, on the one file of an `nbdfuse` mount, which a
//! server of this module's own feeds from a file in memory. ext4 has no journal, so a sync of a file is one flush of the
//! device. Whether that is so is measured before anything else is. All of it is gone with its guard, and with the
//! program's namespaces if the program is killed.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::peers::{Process, patiently, run};

/// How long a flush of the device takes.
pub const SYNC_TIME: Duration = Duration::from_millis(5);
/// Size of the device in bytes: two images of the largest row, and what ext4 needs.
const DEVICE_BYTES: u64 = 6 << 30;
/// Where files lie in memory.
const MEMORY: &str = "/dev/shm";
/// Tells the program that it has its namespaces.
const MARK: &str = "INFILL_BENCH_NAMESPACES";
/// Syncs by which the storage is proven: the fastest of them counts, others may have waited for a processor.
const PROBES: u32 = 20;

/// Begins the program again in mount and process namespaces of its own: whatever ends it ends what it has started, and
/// what it has mounted. Returns where it is in some, or may not make any.
pub fn enter_namespaces() {
    let unshare = ["--mount", "--propagation", "private", "--pid", "--mount-proc", "--fork", "--kill-child"];
    let allowed =
        std::env::var_os(MARK).is_none() && run("unshare", &[&unshare[..], &["true"]].concat()).is_ok();
    let (true, Ok(program)) = (allowed, std::env::current_exe()) else { return };
    let mut command = Command::new("unshare");
    // The first process of a namespace is deaf to interrupts: that is a shell, which waits for us.
    command.args(unshare).args(["sh", "-c", "\"$0\" \"$@\"; exit $?"]).arg(program);
    let error = command.args(std::env::args_os().skip(1)).env(MARK, "1").exec();
    eprintln!("no namespaces: {error}");
}

/// Whether what is mounted here goes with the program.
pub fn has_namespaces() -> bool {
    std::env::var_os(MARK).is_some()
}

/// The file system; gone with this.
pub struct Slow {
    dir: PathBuf,
    /// Where the device's file is.
    device: PathBuf,
    fuse: Option<Process>,
}

impl Slow {
    /// Makes one, with its mount points in `dir`.
    pub fn new(dir: &Path) -> Result<Slow> {
        let (socket, device) = (dir.join("slow.nbd"), dir.join("slow.device"));
        let mut slow = Slow { dir: dir.join("slow"), device, fuse: None };
        slow.make(&socket).context("a storage with slow syncs needs root, nbdfuse, loop devices and ext4")?;
        Ok(slow)
    }

    /// Where files lie on it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn make(&mut self, socket: &Path) -> Result<()> {
        fs::create_dir_all(&self.dir)?;
        fs::create_dir_all(&self.device)?;
        let _ = fs::remove_file(socket);
        let file = tempfile::tempfile_in(MEMORY)?;
        // Its memory is there before: else whoever writes to a block first pays for it.
        let zeroes = vec![0; 1 << 20];
        for at in (0..DEVICE_BYTES).step_by(zeroes.len()) {
            file.write_all_at(&zeroes, at)?;
        }
        serve(UnixListener::bind(socket)?, file);
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        self.fuse = Some(Process::start(Command::new("nbdfuse").arg(&self.device).arg(&uri))?);
        let file = self.device.join("nbd");
        patiently(|| Ok(fs::metadata(&file)?))?;
        let file = file.display().to_string();
        let format =
            ["-q", "-F", "-O", "^has_journal", "-T", "largefile4", "-E", "nodiscard,lazy_itable_init=0"];
        run("mkfs.ext4", &[&format[..], &[&file]].concat())?;
        let device = run("losetup", &["--find", "--show", "--direct-io=on", &file])?;
        let mounted = run("mount", &[device.trim(), &self.dir.display().to_string()]);
        // From now on it goes with the mount.
        run("losetup", &["-d", device.trim()])?;
        mounted?;
        self.prove()
    }

    /// A sync takes as long as it should.
    fn prove(&self) -> Result<()> {
        let path = self.dir.join("probe");
        let mut file = File::create(&path)?;
        let mut took = Duration::MAX;
        for _ in 0..PROBES {
            file.write_all(&[1; 4096])?;
            let start = Instant::now();
            file.sync_data()?;
            took = took.min(start.elapsed());
        }
        drop(file);
        fs::remove_file(path)?;
        eprintln!("a sync takes {:.2} ms here at least", took.as_secs_f64() * 1e3);
        ensure!(took >= SYNC_TIME, "a sync takes {took:?}: the flushes do not arrive below");
        ensure!(took < SYNC_TIME * 2, "a sync takes {took:?}: it is more than one flush");
        Ok(())
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        for mount in [&self.dir, &self.device] {
            let path = mount.display().to_string();
            if run("umount", &[&path]).is_err() {
                let _ = run("umount", &["-l", &path]);
            }
            let _ = fs::remove_dir(mount);
        }
        self.fuse = None;
    }
}

const NBD_OPTS_MAGIC: u64 = 0x4948_4156_454F_5054;
const NBD_OPT_REPLY_MAGIC: u64 = 0x0003_E889_0455_65A9;
const NBD_REPLY_MAGIC: u32 = 0x6744_6698;
const NBD_OPT_EXPORT_NAME: u32 = 1;
const NBD_REP_ERR_UNSUP: u32 = 1 << 31 | 1;
/// Fixed newstyle, no zeroes behind the export's size.
const NBD_HANDSHAKE_FLAGS: u16 = 3;
/// Has flags, takes flushes, and a flush of one connection covers all.
const NBD_EXPORT_FLAGS: u16 = 1 | 4 | 256;
const NBD_CMD_READ: u16 = 0;
const NBD_CMD_WRITE: u16 = 1;
const NBD_CMD_FLUSH: u16 = 3;
/// Longest request that is taken, in bytes.
const REQUEST_BYTES_MAX: usize = 32 << 20;

/// Serves `file` to whoever connects, for as long as this program runs.
fn serve(listener: UnixListener, file: File) {
    let file = Arc::new(file);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let file = file.clone();
            std::thread::spawn(move || {
                if let Err(error) = client(stream, &file) {
                    eprintln!("the storage with slow syncs: {error:#}");
                }
            });
        }
    });
}

fn take<const N: usize>(stream: &mut UnixStream) -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// One client, to its end.
fn client(mut stream: UnixStream, file: &File) -> Result<()> {
    stream.write_all(b"NBDMAGIC")?;
    stream.write_all(&NBD_OPTS_MAGIC.to_be_bytes())?;
    stream.write_all(&NBD_HANDSHAKE_FLAGS.to_be_bytes())?;
    take::<4>(&mut stream)?;
    loop {
        ensure!(u64::from_be_bytes(take(&mut stream)?) == NBD_OPTS_MAGIC, "not an NBD option");
        let option = u32::from_be_bytes(take(&mut stream)?);
        let mut data = vec![0; u32::from_be_bytes(take(&mut stream)?).min(1 << 16) as usize];
        stream.read_exact(&mut data)?;
        if option == NBD_OPT_EXPORT_NAME {
            stream.write_all(&[&DEVICE_BYTES.to_be_bytes()[..], &NBD_EXPORT_FLAGS.to_be_bytes()].concat())?;
            break;
        }
        let words = [option, NBD_REP_ERR_UNSUP, 0].map(u32::to_be_bytes).concat();
        stream.write_all(&[&NBD_OPT_REPLY_MAGIC.to_be_bytes()[..], &words].concat())?;
    }
    let replies = Arc::new(Mutex::new(stream.try_clone()?));
    let mut data = Vec::new();
    loop {
        let Ok(header) = take::<28>(&mut stream) else { return Ok(()) };
        let kind = u16::from_be_bytes([header[6], header[7]]);
        let cookie: [u8; 8] = header[8..16].try_into()?;
        let at = u64::from_be_bytes(header[16..24].try_into()?);
        let len = u32::from_be_bytes(header[24..28].try_into()?) as usize;
        ensure!(len <= REQUEST_BYTES_MAX, "a request of {len} bytes");
        match kind {
            NBD_CMD_READ => {
                data.resize(16 + len, 0);
                file.read_exact_at(&mut data[16..], at)?;
                reply(&replies, cookie, &mut data)?;
            }
            NBD_CMD_WRITE => {
                data.resize(len, 0);
                stream.read_exact(&mut data)?;
                file.write_all_at(&data, at)?;
                reply(&replies, cookie, &mut [0; 16])?;
            }
            NBD_CMD_FLUSH => {
                // Others go on meanwhile, as on a disk.
                let replies = replies.clone();
                std::thread::spawn(move || {
                    std::thread::sleep(SYNC_TIME);
                    // Who has gone does not wait for it.
                    let _ = reply(&replies, cookie, &mut [0; 16]);
                });
            }
            _ => return Ok(()),
        }
    }
}

/// Sends a reply: `message` has room for its header at the front.
fn reply(stream: &Mutex<UnixStream>, cookie: [u8; 8], message: &mut [u8]) -> std::io::Result<()> {
    message[..4].copy_from_slice(&NBD_REPLY_MAGIC.to_be_bytes());
    message[4..8].fill(0);
    message[8..16].copy_from_slice(&cookie);
    stream.lock().unwrap_or_else(PoisonError::into_inner).write_all(message)
}
