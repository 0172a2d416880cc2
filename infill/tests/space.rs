//! An overlay whose file system is full: reads are answered, writes fail with ENOSPC, the stream waits and goes on when
//! there is space again.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex};

use common::{INFILL, Process, output, run, text, wait_until};

/// Size of the disk in bytes, more than the small file system holds.
const DISK: u64 = 16 << 20;

/// A mount namespace with a small file system of its own, as long as this lives.
struct SmallDisk {
    holder: Process,
}

impl SmallDisk {
    fn new(mount: &Path, ready: &Path) -> SmallDisk {
        let script = format!(
            "mount -t tmpfs -o size=4m tmpfs '{}' && touch '{}' && exec sleep 600",
            text(mount),
            text(ready)
        );
        let holder = Process::start(Command::new("unshare").args(["-rm", "sh", "-c", &script]));
        wait_until("the small file system is there", || ready.exists());
        SmallDisk { holder }
    }

    /// A command that runs in there.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--preserve-credentials", "-U", "-m", "-t", &self.holder.id().to_string()]).args(args);
        command
    }

    fn run(&self, args: &[&str]) {
        Process::start(&mut self.command(args)).wait_for_success();
    }
}

/// Gathers what a process says, so that a test can wait for it.
fn gather(mut said: ChildStderr) -> Arc<Mutex<String>> {
    let text = Arc::new(Mutex::new(String::new()));
    let gathered = text.clone();
    std::thread::spawn(move || {
        let mut buf = [0; 4096];
        while let Ok(n @ 1..) = said.read(&mut buf) {
            gathered.lock().unwrap().push_str(&String::from_utf8_lossy(&buf[..n]));
        }
    });
    text
}

#[test]
fn a_full_file_system_costs_no_read_and_no_byte_and_the_stream_goes_on_when_there_is_space() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (mount, base, socket) = (path("mount"), path("base.raw"), path("socket"));
    std::fs::create_dir(&mount).unwrap();
    let pattern = (0..DISK / 8).flat_map(|nth| (nth * 8).to_be_bytes()).collect::<Vec<u8>>();
    std::fs::write(&base, pattern).unwrap();
    let small = SmallDisk::new(&mount, &path("ready"));
    let overlay = mount.join("overlay.qcow2");
    small.run(&[INFILL, "create", "-q", "-b", text(&base), "-F", "raw", text(&overlay)]);

    let serve = [INFILL, "serve", "-t", "-k", text(&socket), "--stream", "--copy-on-read", text(&overlay)];
    let mut server = small.command(&serve);
    let mut server = Process::start(server.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let mut uri = String::new();
    BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut uri).unwrap();
    let said = gather(server.0.stderr.take().unwrap());
    wait_until("the stream waits for space", || said.lock().unwrap().contains("waits: "));

    // Every byte can be read, although none can be kept.
    let uri = uri.trim();
    run("nbdcopy", &[uri, text(&path("copy"))]);
    run("cmp", &[text(&base), text(&path("copy"))]);
    // A write of what has no place fails, and only that.
    let args = ["-f", "raw", "-c", "write -P 9 15M 1M", "-c", "flush", "-c", "read 15M 1M", uri];
    let told = output("qemu-io", &args);
    let told = String::from_utf8_lossy(&told.stdout) + String::from_utf8_lossy(&told.stderr);
    assert!(told.contains("No space left on device") && told.contains("read 1048576/1048576"), "{told}");

    small.run(&["mount", "-o", "remount,size=64m", text(&mount)]);
    wait_until("the stream is done", || said.lock().unwrap().contains("is done"));
    server.signal("TERM");
    server.wait_for_success();
    small.run(&["qemu-img", "check", "-q", text(&overlay)]);
    small.run(&["qemu-img", "convert", "-O", "raw", text(&overlay), text(&path("filled.raw"))]);
    // Whether the write that failed had any effect is open; outside of it every byte is the base's.
    let (filled, mut base) = (std::fs::read(path("filled.raw")).unwrap(), std::fs::read(&base).unwrap());
    for (sector, old) in filled.chunks(512).zip(base.chunks_mut(512)).skip((15 << 20) / 512) {
        if sector.iter().all(|byte| *byte == 9) {
            old.fill(9);
        }
    }
    assert!(filled == base, "the filled overlay differs from its base");
}
