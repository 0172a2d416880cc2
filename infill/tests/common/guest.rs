//! A small guest: Linux with a busybox that writes numbered records to a file system until it is asked to power off.
//!
//! It boots in some seconds without acceleration, because nothing but its kernel, one program and three modules is in
//! it. What it says goes to a file; what it has written can be told from its number, so that the guest itself reads some of
//! it again from the disk, and the host can judge all of it.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::common::{run, text};

/// How long the guest may take from one thing that it says to the next. A limit against hangs, not a promise.
const GUEST_LIMIT: Duration = Duration::from_secs(180);

/// The kernel's command line.
pub const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet rdinit=/init";

/// Bytes that the base holds before the guest writes.
const BASE_BYTES: usize = 12 << 20;

/// What runs in the guest. Records have sizes of their own; beside them a file is overwritten, deleted and made again.
const INIT: &str = r#"#!/bin/busybox sh
bb() { /bin/busybox "$@"; }
bb mount -t proc proc /proc
bb mount -t devtmpfs dev /dev
bb mount -t sysfs sys /sys
for module in virtio_blk button evdev; do bb insmod /$module.ko; done
bb acpid -c /etc/acpi -l /dev/null
while [ ! -b /dev/vda ]; do bb usleep 50000; done
bb mount -t ext4 -o discard /dev/vda /mnt || echo GUEST-CANNOT-MOUNT
echo GUEST-IS-UP
bb mkdir -p /mnt/records
record() { bb yes "infill record $1" | bb head -c $(($1 * 7919 % 60000 + 1)); }
n=0
while [ ! -e /stop ]; do
  n=$((n+1))
  record $n | bb dd of=/mnt/records/$n bs=64k conv=fsync 2>/dev/null
  echo "GUEST-WROTE $n"
  if [ $((n % 4)) = 0 ]; then
    old=$(((n * 7919 + 13) % 60000 % n + 1))
    echo 1 >/proc/sys/vm/drop_caches
    record $old | bb cmp -s - /mnt/records/$old || echo "GUEST-READ-WRONG $old"
  fi
  case $((n % 8)) in
    3) bb dd if=/dev/urandom of=/mnt/scratch bs=64k count=8 conv=notrunc 2>/dev/null ;;
    7) bb rm -f /mnt/scratch ;;
  esac
done
echo GUEST-READ $(bb sha256sum </mnt/base)
bb umount /mnt
echo GUEST-ENDS $n
bb poweroff -f
"#;

/// What the power button does.
const BUTTON: &str = "#!/bin/busybox sh\n/bin/busybox touch /stop\n";

/// The newest kernel of the package that the tests install.
pub fn kernel() -> PathBuf {
    let mut kernels: Vec<_> = std::fs::read_dir("/boot")
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| text(path).contains("/vmlinuz-") && text(path).contains("-cloud-"))
        .collect();
    kernels.sort();
    kernels.pop().unwrap_or_else(|| panic!("no kernel in /boot: `cargo xtask test --install` installs it"))
}

/// A module of that kernel, unpacked.
fn module(name: &str) -> Vec<u8> {
    let kernel = kernel();
    let version = text(&kernel).split_once("/vmlinuz-").expect("a kernel's name").1;
    let path = Path::new("/lib/modules").join(version).join("kernel/drivers").join(name);
    match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(_) => {
            let packed = format!("{}.xz", path.display());
            let unpacked = Command::new("xz").args(["-dc", &packed]).output().expect("xz runs");
            assert!(unpacked.status.success(), "{packed}: {}", String::from_utf8_lossy(&unpacked.stderr));
            unpacked.stdout
        }
    }
}

/// An archive in the form that the kernel unpacks at its start.
struct Archive(Vec<u8>);

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        let number = self.0.len();
        write!(self.0, "070701{number:08X}{mode:08X}{:08X}{:08X}{:08X}{:08X}", 0, 0, 1, 0).unwrap();
        write!(self.0, "{:08X}{:08X}{:08X}{:08X}{:08X}", content.len(), 0, 0, 0, 0).unwrap();
        write!(self.0, "{:08X}{:08X}{name}\0", name.len() + 1, 0).unwrap();
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

/// The guest's first file system, made in `dir`.
pub fn initramfs(dir: &Path) -> PathBuf {
    let mut archive = Archive(Vec::new());
    for folder in ["bin", "dev", "proc", "sys", "mnt", "etc", "etc/acpi", "etc/acpi/PWRF"] {
        archive.add(folder, 0o040_755, b"");
    }
    let busybox = std::fs::read("/bin/busybox")
        .expect("/bin/busybox: `cargo xtask test --install` installs busybox-static");
    archive.add("bin/busybox", 0o100_755, &busybox);
    for (name, path) in [
        ("virtio_blk.ko", "block/virtio_blk.ko"),
        ("button.ko", "acpi/button.ko"),
        ("evdev.ko", "input/evdev.ko"),
    ] {
        archive.add(name, 0o100_644, &module(path));
    }
    archive.add("init", 0o100_755, INIT.as_bytes());
    archive.add("etc/acpi/PWRF/00000080", 0o100_755, BUTTON.as_bytes());
    archive.add("TRAILER!!!", 0, b"");
    let path = dir.join("initramfs.cpio");
    std::fs::write(&path, archive.0).unwrap();
    path
}

/// A disk of so many MiB with a file system that holds `base`; gives what the guest says of that file.
pub fn disk(dir: &Path, path: &Path, mib: u64) -> String {
    let root = dir.join("root");
    std::fs::create_dir(&root).unwrap();
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let bytes: Vec<u8> = (0..BASE_BYTES / 8)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect();
    std::fs::write(root.join("base"), bytes).unwrap();
    let sum = super::common::sha256(&root.join("base"));
    run("truncate", &["-s", &format!("{mib}M"), text(path)]);
    run("mkfs.ext4", &["-q", "-F", "-d", text(&root), text(path)]);
    std::fs::remove_dir_all(&root).unwrap();
    sum
}

/// A machine that runs the guest on a disk, a block node in QEMU's words, with a control socket of its own.
pub fn machine(mut command: Command, dir: &Path, drive: &str, console: &Console, control: &Path) -> Command {
    command.args(["-accel", "tcg", "-m", "256", "-nodefaults", "-display", "none", "-no-reboot"]);
    command.args(["-kernel", text(&kernel()), "-initrd", text(&initramfs(dir)), "-append", KERNEL_ARGUMENTS]);
    command.args(["-serial", &format!("file:{}", text(&console.0))]);
    command.args(["-qmp", &format!("unix:{},server=on,wait=off", text(control))]);
    command.args(["-blockdev", &format!("{drive},node-name=d")]);
    command.args(["-device", "virtio-blk-pci,drive=d,rerror=stop,werror=stop"]);
    command
}

/// What the guest says.
pub struct Console(pub PathBuf);

impl Console {
    /// All of it.
    pub fn said(&self) -> String {
        let said = String::from_utf8_lossy(&std::fs::read(&self.0).unwrap_or_default()).into_owned();
        assert!(!said.contains("GUEST-READ-WRONG"), "a record was not what the guest had written:\n{said}");
        said
    }

    /// What stands behind `word` where it was said last, in a whole line.
    pub fn last(&self, word: &str) -> Option<String> {
        let said = self.said();
        let whole = &said[..said.rfind('\n').unwrap_or(0)];
        let line = whole.lines().rev().find(|line| line.contains(word))?;
        line.split(word).nth(1)?.split_whitespace().next().map(str::to_owned).or(Some(String::new()))
    }

    fn wait(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let end = Instant::now() + GUEST_LIMIT;
        while !condition() {
            assert!(Instant::now() < end, "not in time: {what}; the guest has said:\n{}", self.said());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the guest has said `word`, and gives what stands behind it.
    pub fn wait_for(&self, word: &str) -> String {
        self.wait(word, || self.last(word).is_some());
        self.last(word).unwrap()
    }

    /// The number of the last record that is on the guest's disk.
    pub fn wrote(&self) -> u64 {
        self.last("GUEST-WROTE").and_then(|number| number.parse().ok()).unwrap_or(0)
    }

    /// Waits until the guest has written so many records more.
    pub fn wait_for_records(&self, more: u64) {
        let begin = self.wrote();
        self.wait(&format!("{more} records more"), || self.wrote() >= begin + more);
    }
}

/// Asserts that the file system in a raw file is clean and holds every record up to `last`, byte by byte.
pub fn judge(dir: &Path, raw: &Path, last: u64) {
    run("e2fsck", &["-fn", text(raw)]);
    let out = dir.join("out");
    std::fs::create_dir(&out).unwrap();
    run("debugfs", &["-R", &format!("rdump /records {}", text(&out)), text(raw)]);
    for number in 1..=last {
        let found = std::fs::read(out.join("records").join(number.to_string()))
            .unwrap_or_else(|error| panic!("record {number} of {last}: {error}"));
        let length = (number * 7919 % 60000 + 1) as usize;
        let expected: Vec<u8> = format!("infill record {number}\n").bytes().cycle().take(length).collect();
        assert!(found == expected, "record {number} of {last} is not what the guest wrote");
    }
}
