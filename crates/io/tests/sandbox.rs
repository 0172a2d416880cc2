//! What a sandboxed process can do, and what it cannot any more. Each test runs itself again, in a process of its own that
//! enters the sandbox.

use std::io;
use std::path::Path;
use std::process::Command;

use infill_base::{Ctx, WriteFlags};
use infill_io::sandbox::{self, Reach};
use infill_io::{FileOptions, FileStorage, Reactors};
use infill_storage::Storage;

const INSIDE: &str = "INFILL_TEST_INSIDE";

/// Runs `inside` in a process of its own.
fn alone(name: &str, inside: impl FnOnce(&Path)) {
    if let Some(dir) = std::env::var_os(INSIDE) {
        return inside(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(INSIDE, dir.path());
    let output = command.output().unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("1 passed"), "nothing was tested: {said}");
}

fn entered(reach: &Reach) {
    let entered = sandbox::enter(reach).unwrap();
    assert_eq!(entered.missing(), None, "a kernel with Landlock and seccomp is needed (5.13 or newer)");
}

fn errno(call: impl FnOnce() -> libc::c_long) -> i32 {
    assert_eq!(call(), -1, "it was allowed");
    io::Error::last_os_error().raw_os_error().unwrap()
}

fn no_program_runs() {
    for program in ["/bin/true", "true"] {
        let error = Command::new(program).spawn().expect_err("a program was run");
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}");
    }
}

/// Whether a ring can be made: sandboxes around this process may deny it, ours must not.
fn ring_is_there() -> bool {
    let mut params = [0_u64; 15];
    // SAFETY: the kernel fills in 120 bytes, which is what there is; the descriptor is closed with this process.
    unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) >= 0 }
}

#[test]
fn no_program_is_run_no_privilege_is_gained_and_threads_made_later_are_bound_too() {
    alone("no_program_is_run_no_privilege_is_gained_and_threads_made_later_are_bound_too", |_| {
        entered(&Reach::AllButSystem);
        no_program_runs();
        std::thread::spawn(no_program_runs).join().unwrap();
        // SAFETY: none of these takes a pointer that is followed: they are refused before.
        unsafe {
            let null = std::ptr::null::<libc::c_char>();
            assert_eq!(errno(|| libc::syscall(libc::SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0)), libc::EPERM);
            assert_eq!(errno(|| libc::syscall(libc::SYS_mount, null, null, null, 0, null)), libc::EPERM);
            assert_eq!(errno(|| libc::syscall(libc::SYS_unshare, libc::CLONE_NEWUSER)), libc::EPERM);
            assert_eq!(errno(|| libc::syscall(libc::SYS_setuid, 0)), libc::EPERM);
            assert_eq!(errno(|| libc::syscall(libc::SYS_bpf, 0, null, 0)), libc::EPERM);
            let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
            assert_eq!(errno(|| libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0)), libc::EPERM);
            assert_eq!(errno(|| libc::syscall(libc::SYS_clone3, null, 0)), libc::ENOSYS);
            #[cfg(target_arch = "x86_64")]
            assert_eq!(errno(|| libc::syscall(1 << 30 | 520, null, null, null)), libc::EPERM);
            // Its parent, which is outside.
            assert_eq!(errno(|| libc::kill(libc::getppid(), 0).into()), libc::EPERM);
        }
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        assert!(status.contains("Seccomp:\t2") && status.contains("NoNewPrivs:\t1"), "{status}");
    });
}

fn storage_works(path: &Path) -> io::Result<()> {
    let path = path.to_owned();
    let reactors = Reactors::start(1)?;
    let result = reactors.block_on(move || async move {
        let file =
            FileStorage::open(&path, FileOptions::create_new(1 << 20)).map_err(|error| error.to_string())?;
        let data = vec![7; 4096].into();
        file.write(&Ctx::GUEST, 0, data, WriteFlags::empty()).await.map_err(|error| error.to_string())?;
        file.sync(&Ctx::GUEST).await.map_err(|error| error.to_string())?;
        drop(file);
        let open = FileStorage::open(&path, FileOptions::read_only()).map_err(|error| error.to_string())?;
        let read = open.read(&Ctx::GUEST, 0, bytes::BytesMut::zeroed(4096)).await;
        assert!(read.map_err(|error| error.to_string())?.iter().all(|byte| *byte == 7));
        Ok::<(), String>(())
    });
    result.map_err(io::Error::other)
}

#[test]
fn disks_are_read_and_written_as_before_and_the_systems_files_are_read_only() {
    alone("disks_are_read_and_written_as_before_and_the_systems_files_are_read_only", |dir| {
        let ring = ring_is_there();
        entered(&Reach::AllButSystem);
        assert_eq!(ring_is_there(), ring, "io_uring inside");
        storage_works(&dir.join("disk")).unwrap();
        std::fs::create_dir(dir.join("sub")).unwrap();
        std::fs::rename(dir.join("disk"), dir.join("sub/disk")).unwrap();
        assert!(std::fs::read_to_string("/etc/passwd").is_ok());
        for file in ["/etc/infill-test", "/usr/infill-test", "/proc/self/comm", "/infill-test"] {
            let error = std::fs::write(file, "x").expect_err(file);
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{file}: {error}");
        }
    });
}

#[test]
fn only_what_was_named_is_reached() {
    alone("only_what_was_named_is_reached", |dir| {
        let (inside, outside) = (dir.join("inside"), dir.join("outside"));
        std::fs::create_dir(&inside).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("secret"), "s").unwrap();
        entered(&Reach::Only(vec![inside.clone()]));
        storage_works(&inside.join("disk")).unwrap();
        assert!(storage_works(&outside.join("disk")).is_err());
        let error = std::fs::read(outside.join("secret")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        // Names are still looked up.
        use std::net::ToSocketAddrs;
        ("localhost", 1).to_socket_addrs().unwrap();
        no_program_runs();
    });
}

#[test]
fn a_path_that_is_not_there_is_refused_before_anything_is_given_up() {
    let error = sandbox::enter(&Reach::Only(vec!["/nonexistent/dir".into()])).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/dir"), "{error}");
    assert!(Command::new("true").status().unwrap().success());
}
