//! The programs that the tests run against, and how to get those that are missing.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// (what must be there, Debian package that brings it). A path with a slash is a file, otherwise a program.
const TOOLS: &[(&str, &str)] = &[
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("qemu-nbd", "qemu-utils"),
    ("qemu-storage-daemon", "qemu-utils"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("nbdkit", "nbdkit"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdsh", "python3-libnbd"),
    ("fio", "fio"),
    ("debootstrap", "debootstrap"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("c++", "g++"),
    ("openssl", "openssl"),
    ("strace", "strace"),
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("/usr/share/doc/linux-image-cloud-amd64", "linux-image-cloud-amd64"),
    ("/usr/share/doc/busybox-static", "busybox-static"),
    ("virsh", "libvirt-clients"),
    ("/usr/share/doc/libvirt-daemon-driver-qemu", "libvirt-daemon-driver-qemu"),
    ("setpriv", "util-linux"),
    ("xz", "xz-utils"),
    ("python3", "python3"),
    ("pip3", "python3-pip"),
];

/// Every test compares with this QEMU or a newer one; Debian 12's own is older (its backports have it).
const QEMU_MAJOR_MIN: u32 = 10;

/// Older ones of libvirt do not have a disk wait for its server.
const LIBVIRT_MAJOR_MIN: u32 = 10;

const SOURCES: &str = "/etc/apt/sources.list.d";

/// Whether a program is on the path.
pub fn is_there(tool: &str) -> bool {
    if tool.contains('/') {
        return Path::new(tool).exists();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let admin = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(admin).any(|dir| dir.join(tool).is_file())
}

/// Makes sure that all tools are there: says the one line that installs what is missing, and runs it if told to.
pub fn require(install: bool) -> Result<()> {
    let packages = missing();
    if packages.is_empty() {
        return Ok(());
    }
    let suite = if codename() == "bookworm" { "-t bookworm-backports " } else { "" };
    let command = format!("apt-get install -y --no-install-recommends {suite}{}", packages.join(" "));
    println!("== tools: {command}");
    if !install {
        bail!("tools are missing; run the line above as root, or `cargo xtask test --install`");
    }
    if !suite.is_empty() {
        add_backports()?;
    }
    shell("apt-get update -q")?;
    shell(&format!("DEBIAN_FRONTEND=noninteractive {command}"))?;
    let still = missing();
    if !still.is_empty() {
        bail!("still missing after the installation: {}", still.join(" "));
    }
    Ok(())
}

fn missing() -> Vec<&'static str> {
    let mut packages: Vec<_> =
        TOOLS.iter().filter(|(tool, _)| !is_there(tool)).map(|(_, package)| *package).collect();
    if major("qemu-img").is_none_or(|major| major < QEMU_MAJOR_MIN) {
        packages.extend(["qemu-utils", "qemu-system-x86", "qemu-block-extra"]);
    }
    if major("virsh").is_none_or(|major| major < LIBVIRT_MAJOR_MIN) {
        packages.extend(["libvirt-clients", "libvirt-daemon-driver-qemu"]);
    }
    packages.sort_unstable();
    packages.dedup();
    packages
}

/// The first number that a program says of its version.
fn major(program: &str) -> Option<u32> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace().find_map(|word| word.split('.').next()?.parse().ok())
}

fn codename() -> String {
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let line = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    line.unwrap_or_default().trim_matches('"').to_owned()
}

/// Adds the backports suite by copying the machine's own entry with the suite's name changed.
fn add_backports() -> Result<()> {
    let mut own = None;
    for file in std::fs::read_dir(SOURCES).context("no apt sources folder")? {
        let path = file?.path();
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        if text.contains("bookworm-backports") {
            return Ok(());
        }
        let stanzas = text.split("\n\n").map(str::to_owned);
        own = own.or_else(|| stanzas.into_iter().find(|stanza| has_suite(stanza)));
    }
    let own =
        own.with_context(|| format!("no entry for bookworm in {SOURCES}: add bookworm-backports by hand"))?;
    let copy: Vec<_> = own
        .lines()
        .map(|line| if line.starts_with("Suites:") { "Suites: bookworm-backports" } else { line })
        .collect();
    std::fs::write(format!("{SOURCES}/bookworm-backports.sources"), copy.join("\n") + "\n")?;
    Ok(())
}

fn has_suite(stanza: &str) -> bool {
    let suites = stanza.lines().find_map(|line| line.strip_prefix("Suites:"));
    suites.is_some_and(|suites| suites.split_whitespace().any(|suite| suite == "bookworm"))
}

fn shell(command: &str) -> Result<()> {
    let status = Command::new("sh").args(["-c", command]).status().with_context(|| command.to_owned())?;
    if !status.success() {
        bail!("failed ({status}): {command}");
    }
    Ok(())
}
