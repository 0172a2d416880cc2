//! A domain of libvirt whose disk is ours: started while it streams, its daemon killed and started again under it, shut
//! down clean.
//!
//! libvirt's driver runs within `virsh`, with directories of its own, so no service of this machine takes part. As root
//! it would want a user that its service's package makes: it is run as `nobody` then.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};

use crate::common::{INFILL, Process, output, run, text, wait_for_socket, wait_until};
use crate::guest::{self, Console};
use crate::qmp::{Daemon, Program, Qmp};
use serde_json::{Value, json};

/// Slow enough that the stream runs when the daemon dies.
const SLOW: u64 = 256 << 10;
/// The user and group `nobody`.
const NOBODY: &str = "65534";

/// libvirt, as long as this lives.
struct Libvirt {
    root: PathBuf,
    virsh: Process,
    stdin: ChildStdin,
    asked: u32,
}

impl Libvirt {
    fn start(dir: &Path) -> Libvirt {
        let root = dir.join("libvirt");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        let settings = "security_driver = \"none\"\nstdio_handler = \"file\"\n";
        std::fs::write(root.join("etc/qemu.conf"), settings).unwrap();
        // Others may go through the test's directory, and `nobody` owns the one of libvirt.
        std::fs::set_permissions(dir, PermissionsExt::from_mode(0o755)).unwrap();
        let mut command = Command::new("env");
        if rustix::process::geteuid().is_root() {
            run("chown", &["-R", &format!("{NOBODY}:{NOBODY}"), text(&root)]);
            command.args(["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]);
        }
        command.args(["stdbuf", "-o0", "virsh", "-q", "-c", &format!("qemu:///embed?root={}", text(&root))]);
        command.env("HOME", &root).env("XDG_RUNTIME_DIR", root.join("runtime")).stdin(Stdio::piped());
        command.stdout(File::create(root.join("answers")).unwrap());
        command.stderr(File::create(root.join("errors")).unwrap());
        let mut virsh =
            Process(command.spawn().expect("virsh runs: `cargo xtask test --install` installs it"));
        let stdin = virsh.0.stdin.take().unwrap();
        Libvirt { root, virsh, stdin, asked: 0 }
    }

    /// The process of the machine, as libvirt has written it down.
    fn machine(&self) -> String {
        let pid = std::fs::read_to_string(self.root.join("run/qemu/guest.pid")).unwrap_or_default();
        pid.trim().to_owned()
    }

    /// What virsh answers to a command.
    fn ask(&mut self, command: &str) -> String {
        let read = |name: &str| std::fs::read_to_string(self.root.join(name)).unwrap_or_default();
        let before = read("answers").len();
        self.asked += 1;
        let mark = format!("answered-{}", self.asked);
        writeln!(self.stdin, "{command}\necho {mark}").unwrap();
        let virsh = &mut self.virsh;
        wait_until(command, || {
            let ended = virsh.0.try_wait().unwrap();
            assert!(ended.is_none(), "virsh has ended: {}", read("errors"));
            read("answers").contains(&format!("\n{mark}"))
        });
        // It says again what it is told, behind its prompt.
        let said = read("answers")[before..].to_owned();
        let answer = said.split_once('\n').map_or("", |(_, rest)| rest);
        answer.split("virsh # ").next().unwrap_or_default().trim().to_owned()
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        // The machine is nobody's child.
        let machine = self.machine();
        if !machine.is_empty() {
            let _ = Command::new("kill").args(["-9", &machine]).stderr(Stdio::null()).status();
        }
    }
}

fn domain(initramfs: &Path, socket: &Path, console: &Path) -> String {
    format!(
        "<domain type='qemu'>
  <name>guest</name>
  <memory unit='MiB'>256</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initramfs}</initrd>
    <cmdline>{arguments}</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw' cache='none' rerror_policy='stop' error_policy='stop' discard='unmap'/>
      <source protocol='nbd' name='5a0f7c1e-disk'>
        <host transport='unix' socket='{socket}'/>
        <reconnect delay='600'/>
      </source>
      <target dev='vda' bus='virtio'/>
    </disk>
    <serial type='file'><source path='{console}'/></serial>
    <memballoon model='none'/>
    <video><model type='none'/></video>
  </devices>
</domain>
",
        kernel = text(&guest::kernel()),
        arguments = guest::KERNEL_ARGUMENTS,
        initramfs = text(initramfs),
        socket = text(socket),
        console = text(console),
    )
}

struct Scene {
    dir: tempfile::TempDir,
    socket: PathBuf,
}

impl Scene {
    /// A daemon that keeps its state; whoever runs the machine may use its socket.
    fn daemon(&self) -> (Daemon, Qmp) {
        let state = self.dir.path().join("state");
        let daemon = Daemon::start(Program::Infill, self.dir.path(), &["--state", text(&state)]);
        let qmp = daemon.connect();
        (daemon, qmp)
    }

    fn open_socket(&self) {
        wait_for_socket(&self.socket);
        std::fs::set_permissions(&self.socket, PermissionsExt::from_mode(0o666)).unwrap();
    }
}

fn job(qmp: &mut Qmp) -> Option<Value> {
    qmp.run("query-jobs", json!({})).as_array().unwrap().first().cloned()
}

#[test]
fn a_libvirt_domain_lives_through_its_stream_and_the_death_of_its_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbd.sock");
    let scene = Scene { dir, socket };
    let dir = scene.dir.path();
    let base_sum = guest::disk(dir, &dir.join("base"), 96);
    let source = dir.join("source.sock");
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.args(["-f", "-r", "-U", text(&source), "--filter=delay", "file"]);
    let source_process = Process::start(nbdkit.args([text(&dir.join("base")), "rdelay=2ms"]));
    wait_for_socket(&source);
    let overlay = dir.join("overlay");
    let uri = format!("nbd+unix:///?socket={}", source.display());
    run(INFILL, &["create", "-q", "-f", "qcow2", "-b", &uri, "-F", "raw", text(&overlay)]);

    let (daemon, mut qmp) = scene.daemon();
    let file = json!({"driver": "file", "filename": overlay});
    qmp.run(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "disk", "file": file, "discard": "unmap"}),
    );
    qmp.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": scene.socket}}}));
    let export =
        json!({"type": "nbd", "id": "e", "node-name": "disk", "writable": true, "name": "5a0f7c1e-disk"});
    qmp.run("block-export-add", export);
    scene.open_socket();
    qmp.run("block-stream", json!({"job-id": "s", "device": "disk", "speed": SLOW}));

    let mut libvirt = Libvirt::start(dir);
    let console = Console(libvirt.root.join("console"));
    let initramfs = guest::initramfs(dir);
    let described = dir.join("guest.xml");
    std::fs::write(&described, domain(&initramfs, &scene.socket, &console.0)).unwrap();
    libvirt.ask(&format!("create {}", text(&described)));
    let errors = std::fs::read_to_string(libvirt.root.join("errors")).unwrap();
    assert_eq!(libvirt.ask("domstate guest"), "running", "{errors}");
    // Older versions of libvirt read `reconnect` and do nothing about it.
    let arguments = std::fs::read_to_string(format!("/proc/{}/cmdline", libvirt.machine())).unwrap();
    assert!(arguments.contains("\"reconnect-delay\":600"), "libvirt 9.1 or newer is needed: {arguments}");
    console.wait_for("GUEST-IS-UP");
    console.wait_for_records(4);
    assert_eq!(job(&mut qmp).expect("the stream runs")["status"], "running");

    drop(qmp);
    daemon.process.kill();
    let (daemon, mut qmp) = scene.daemon();
    scene.open_socket();
    console.wait_for_records(8);
    assert_eq!(job(&mut qmp).expect("the stream goes on")["status"], "running");
    // Nothing has reached the machine: it was never stopped for an error, and knows of none.
    assert_eq!(libvirt.ask("domstate guest"), "running");
    assert_eq!(libvirt.ask("domblkerror guest"), "No errors found");
    qmp.run("block-job-set-speed", json!({"device": "s", "speed": 0}));
    wait_until("the stream is done", || job(&mut qmp).is_none());
    drop(source_process);
    console.wait_for_records(4);

    libvirt.ask("shutdown guest");
    let last = console.wait_for("GUEST-ENDS").parse().unwrap();
    assert_eq!(console.last("GUEST-READ"), Some(base_sum));
    wait_until("the domain is gone", || libvirt.ask("list --all --name").is_empty());
    daemon.quit(&mut qmp);
    let info = run("qemu-img", &["info", "--output=json", text(&overlay)]);
    assert!(!info.contains("\"backing-filename\""), "{info}");
    // What was reserved when the daemon died may be left over; nothing else.
    let check = output("qemu-img", &["check", "-q", text(&overlay)]).status.code();
    assert!(matches!(check, Some(0 | 3)), "qemu-img check says {check:?}");
    let raw = dir.join("judged");
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&overlay), text(&raw)]);
    guest::judge(dir, &raw, last);
}
