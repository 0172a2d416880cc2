//! A Debian guest boots from an overlay whose base lies behind a slow link, while the stream runs.
//!
//! Everything real: debootstrap's root file system on ext4, nbdkit with 20 ms a read as the source, QEMU as the machine.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{INFILL, Process, run, sha256, text, wait_for_socket};

/// How long the guest may take from power-on to power-off. A limit against hangs, not a promise.
const GUEST_LIMIT: Duration = Duration::from_secs(420);
/// Slow enough that the stream still runs while the guest boots.
const STREAM_BYTES_PER_SECOND: &str = "2M";
const DISK_MIB: u64 = 1024;
const MARKER: &str = "INFILL-GUEST-IS-UP";
const WRITTEN: &str = "INFILL-GUEST-WROTE";

/// What the guest does once it is up: says so, writes files, says their checksum, powers off.
const GUEST_SCRIPT: &str = "#!/bin/sh
echo INFILL-GUEST-IS-UP >/dev/ttyS0
mkdir -p /root/written
for n in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of=/root/written/$n bs=4096 count=$((n * 100 + 1)) 2>/dev/null; done
rm -f /usr/share/doc/*/changelog* 2>/dev/null
sync
echo INFILL-GUEST-WROTE $(cat /root/written/* | sha256sum) >/dev/ttyS0
systemctl poweroff
";

const GUEST_UNIT: &str = "[Unit]
Description=writes, and powers off
After=local-fs.target
[Service]
Type=oneshot
ExecStart=/usr/local/sbin/infill-guest
[Install]
WantedBy=multi-user.target
";

/// The release that the guest runs.
const SUITE: &str = "bookworm";

/// Where that release's packages come from on this machine.
fn mirror() -> String {
    let listed = std::fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten();
    let files = listed.map(|entry| entry.path()).chain(["/etc/apt/sources.list".into()]);
    let texts = files.filter_map(|file| std::fs::read_to_string(file).ok());
    let found = texts.flat_map(|text| [stanza_mirror(&text), line_mirror(&text)]).flatten().next();
    found.unwrap_or_else(|| panic!("no mirror of {SUITE} in /etc/apt: add a source entry"))
}

/// From a source entry of several lines.
fn stanza_mirror(text: &str) -> Option<String> {
    text.split("\n\n").find_map(|stanza| {
        let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name));
        field("Suites:")?.split_whitespace().any(|suite| suite == SUITE).then_some(())?;
        Some(field("URIs:")?.split_whitespace().next()?.to_owned())
    })
}

/// From a source entry of one line.
fn line_mirror(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let mut words = line.strip_prefix("deb ")?.split_whitespace().peekable();
        if words.peek()?.starts_with('[') {
            words.find(|word| word.ends_with(']'))?;
        }
        let uri = words.next()?;
        (words.next()? == SUITE).then(|| uri.to_owned())
    })
}

/// The guest's root file system on ext4 in a raw file; made once, and kept between runs.
fn base_image() -> PathBuf {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("debian-guest-1");
    let image = cache.join("base.raw");
    if image.exists() {
        return image;
    }
    std::fs::create_dir_all(&cache).unwrap();
    let (root, partial) = (cache.join("root"), cache.join("base.raw.partial"));
    let _ = std::fs::remove_dir_all(&root);
    let packages = "--include=systemd-sysv,udev";
    run("debootstrap", &["--variant=minbase", packages, SUITE, text(&root), &mirror()]);
    std::fs::write(root.join("usr/local/sbin/infill-guest"), GUEST_SCRIPT).unwrap();
    run("chmod", &["755", text(&root.join("usr/local/sbin/infill-guest"))]);
    std::fs::write(root.join("etc/systemd/system/infill-guest.service"), GUEST_UNIT).unwrap();
    std::fs::write(root.join("etc/fstab"), "/dev/vda / ext4 defaults 0 1\n").unwrap();
    let wants = root.join("etc/systemd/system/multi-user.target.wants");
    std::fs::create_dir_all(&wants).unwrap();
    let _ = std::os::unix::fs::symlink("../infill-guest.service", wants.join("infill-guest.service"));
    let _ = std::fs::remove_file(&partial);
    run("truncate", &["-s", &format!("{DISK_MIB}M"), text(&partial)]);
    run("mkfs.ext4", &["-q", "-F", "-d", text(&root), text(&partial)]);
    std::fs::remove_dir_all(&root).unwrap();
    std::fs::rename(&partial, &image).unwrap();
    image
}

/// The newest kernel of that package, and its initial file system.
fn kernel() -> (PathBuf, PathBuf) {
    let mut kernels: Vec<_> = std::fs::read_dir("/boot")
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| text(path).contains("/vmlinuz-") && text(path).contains("-cloud-"))
        .collect();
    kernels.sort();
    let kernel = kernels
        .pop()
        .unwrap_or_else(|| panic!("no kernel in /boot: `cargo xtask test --install` installs it"));
    let initrd = PathBuf::from(text(&kernel).replace("/vmlinuz-", "/initrd.img-"));
    assert!(initrd.exists(), "no {}: install initramfs-tools", initrd.display());
    (kernel, initrd)
}

/// The lines of the guest's serial console, until it has powered off.
struct Guest {
    machine: Process,
    console: BufReader<ChildStdout>,
    ended: Arc<AtomicBool>,
    seen: String,
}

impl Guest {
    fn power_on(disk: &Path) -> Guest {
        let (kernel, initrd) = kernel();
        let drive = format!("driver=nbd,node-name=d,server.type=unix,server.path={},export=", disk.display());
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-accel",
            "tcg",
            "-m",
            "512",
            "-smp",
            "2",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
        ]);
        command.args(["-serial", "stdio", "-kernel", text(&kernel), "-initrd", text(&initrd)]);
        command.args(["-append", "root=/dev/vda rw console=ttyS0 quiet"]);
        command.args(["-blockdev", &drive, "-device", "virtio-blk-pci,drive=d"]);
        let mut machine = Process::start(command.stdout(Stdio::piped()));
        let console = BufReader::new(machine.0.stdout.take().unwrap());
        let ended = Arc::new(AtomicBool::new(false));
        std::thread::spawn({
            let (ended, id) = (ended.clone(), machine.0.id().to_string());
            move || {
                let end = Instant::now() + GUEST_LIMIT;
                while !ended.load(Ordering::Relaxed) {
                    if Instant::now() > end {
                        // The console then closes, and the test says what it has seen so far.
                        let _ = Command::new("kill").args(["-9", &id]).status();
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(200));
                }
            }
        });
        Guest { machine, console, ended, seen: String::new() }
    }

    /// The next console line that holds `word`.
    fn line_with(&mut self, word: &str) -> String {
        loop {
            let mut line = Vec::new();
            let read = self.console.read_until(b'\n', &mut line).unwrap();
            let line = String::from_utf8_lossy(&line).into_owned();
            assert!(read > 0, "the guest ended without {word}:\n{}", self.seen);
            self.seen.push_str(&line);
            if line.contains(word) {
                return line;
            }
        }
    }

    fn wait_for_power_off(mut self) {
        let mut rest = Vec::new();
        self.console.read_to_end(&mut rest).unwrap();
        let status = self.machine.0.wait().unwrap();
        self.ended.store(true, Ordering::Relaxed);
        assert!(status.success(), "the machine ended with {status}:\n{}", self.seen);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

/// The base, read-only, 20 ms away.
fn start_source(socket: &Path, base: &Path) -> Process {
    let _ = std::fs::remove_file(socket);
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.args(["-f", "-r", "-U", text(socket), "--filter=delay", "file", text(base), "rdelay=20ms"]);
    let process = Process::start(&mut nbdkit);
    wait_for_socket(socket);
    process
}

#[test]
fn a_debian_guest_boots_from_a_distant_base_while_the_stream_runs() {
    let base = base_image();
    let before = sha256(&base);
    let dir = tempfile::tempdir().unwrap();
    let (source, disk, overlay) =
        (dir.path().join("source.sock"), dir.path().join("disk.sock"), dir.path().join("overlay.qcow2"));
    let source_process = start_source(&source, &base);
    let uri = format!("nbd+unix:///?socket={}", source.display());
    run(INFILL, &["create", "-q", "-f", "qcow2", "-b", &uri, "-F", "raw", text(&overlay)]);
    let mut serve = Command::new(INFILL);
    serve.args([
        "serve",
        text(&overlay),
        "--socket",
        text(&disk),
        "--persistent",
        "--copy-on-read",
        "--stream",
    ]);
    let mut serve = Process::start(serve.args(["--speed", STREAM_BYTES_PER_SECOND]));
    wait_for_socket(&disk);

    let mut guest = Guest::power_on(&disk);
    guest.line_with(MARKER);
    // It is up, and most of its disk is still elsewhere.
    let info = run("qemu-img", &["info", "-U", "--output=json", text(&overlay)]);
    assert!(info.contains("\"backing-filename\""), "the stream was over before the guest was up:\n{info}");
    let line = guest.line_with(WRITTEN);
    // Another program may have begun the line.
    let written = line.split(WRITTEN).nth(1).and_then(|rest| rest.split_whitespace().next());
    let written = written.unwrap_or_else(|| panic!("no checksum: {line}")).to_owned();
    guest.wait_for_power_off();

    // Clean shutdown: what is in flight is finished, synced and closed.
    serve.signal("TERM");
    serve.wait_for_success();
    // A server that was left in the middle of requests is not relied on for what follows.
    drop(source_process);
    let source_process = start_source(&source, &base);
    assert_eq!(sha256(&base), before, "the base has changed");
    run("qemu-img", &["check", "-f", "qcow2", text(&overlay)]);
    let flat = dir.path().join("flat.raw");
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&overlay), text(&flat)]);
    run("e2fsck", &["-fn", text(&flat)]);
    let files = dir.path().join("written");
    run("debugfs", &["-R", &format!("rdump /root/written {}", text(dir.path())), text(&flat)]);
    let sum = run("sh", &["-c", &format!("cat {}/* | sha256sum", text(&files))]);
    assert_eq!(sum.split_whitespace().next().unwrap(), written, "the guest's files differ");

    // The rest is streamed at rest; then the overlay stands alone and reads the same.
    run(INFILL, &["stream", "-q", text(&overlay)]);
    drop(source_process);
    let info = run("qemu-img", &["info", "--output=json", text(&overlay)]);
    assert!(!info.contains("\"backing-filename\""), "the stream left the backing file:\n{info}");
    run("qemu-img", &["check", "-f", "qcow2", text(&overlay)]);
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&overlay), text(&flat)]);
}
