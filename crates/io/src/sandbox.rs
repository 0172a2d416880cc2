//! Gives up what a storage daemon never needs, for the whole process and for good.
//!
//! # What it protects
//! A peer or an image that took the process over by a mistake in it would still be able to do whatever the process does
//! with disks and connections; what it could not do any more:
//!
//! * run a program ([`Reach`] whatever it is: twice, by Landlock and by seccomp), become another user, gain a privilege by a
//!   program that has one (*no new privileges*);
//! * reach into other processes (trace, read, write, signal), mount, load code into the kernel, make namespaces, open what
//!   kernels are attacked through most (bpf, perf, userfaultfd, keys), set clocks, reboot: [`DENIED`];
//! * write below the system's directories ([`SYSTEM_DIRS`], with [`Reach::AllButSystem`]), or see anything but what was named
//!   ([`Reach::Only`]).
//!
//! # What it does not
//! Disks may lie anywhere, and a manager may name another one at any time: with [`Reach::AllButSystem`] all of them can be
//! read and written, as can the files of users (`/root`, `/home`, `/var`). Network connections are not restricted. The list
//! of system calls is one of what is denied, so a new one of a new kernel is allowed; and what is asked over io_uring is
//! seen by Landlock alone (there is no operation of it that would do what is denied).
//!
//! # How
//! Landlock is there from Linux 5.13 on; what older kernels know less of (renames between directories, truncation, signals)
//! they restrict more or not at all, and that counts as entered. It must be entered before the process has threads: Landlock holds for the calling thread and those that it makes
//! (seccomp is put on all). There is no way back.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use infill_base::{ErrorKind, IoError, IoResult};
use landlock::{
    ABI, Access, AccessFs, BitFlags, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus,
    Scope, path_beneath_rules,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter_all_threads,
};

/// Rights on files that are known: older kernels know fewer of them. (Those of devices' own commands come later; disks
/// need them.)
const RIGHTS: ABI = ABI::V3;

/// Directories at the root in which nothing is written.
pub const SYSTEM_DIRS: [&str; 11] =
    ["bin", "boot", "etc", "lib", "lib32", "lib64", "libx32", "proc", "sbin", "sys", "usr"];

/// What is read beside what was named: libraries and settings of name look-ups, the kernel's facts about disks.
const READ_ALSO: [&str; 9] =
    ["/bin", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/sys", "/usr", "/run/systemd/resolve"];
/// What is written beside what was named.
const WRITE_ALSO: [&str; 1] = ["/dev/null"];

/// Which files it may use from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// All, but it writes nothing below [`SYSTEM_DIRS`], nor makes anything in the root directory itself. What is at the
    /// root now is what there is: a directory that is made there later can be read only.
    AllButSystem,
    /// These and what is below them, and what every process reads.
    Only(Vec<PathBuf>),
}

/// How far the kernel went along.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entered {
    /// Whether files are restricted, or why not.
    pub files: Result<(), String>,
    /// Whether system calls are restricted, or why not.
    pub calls: Result<(), String>,
}

/// Enters the sandbox. What the kernel cannot do is told, not an error; a path that is not there is one.
pub fn enter(reach: &Reach) -> IoResult<Entered> {
    if let Reach::Only(paths) = reach {
        for path in paths {
            std::fs::metadata(path).map_err(|error| IoError::from(error).in_node(path.display()))?;
        }
    }
    Ok(Entered { files: restrict_files(reach).map_err(|error| error.to_string()), calls: restrict_calls() })
}

impl Entered {
    /// What is not restricted, and why; `None` if all is.
    pub fn missing(&self) -> Option<String> {
        let part = |what: &str, result: &Result<(), String>| {
            result.as_ref().err().map(|why| format!("{what} are not restricted ({why})"))
        };
        let parts: Vec<String> =
            [part("files", &self.files), part("system calls", &self.calls)].into_iter().flatten().collect();
        (!parts.is_empty()).then(|| parts.join(", and "))
    }
}

fn restrict_files(reach: &Reach) -> IoResult<()> {
    let refused = |error: landlock::RulesetError| {
        IoError::new(ErrorKind::Unsupported, "the rules of Landlock were refused").caused_by(error)
    };
    let (write, all) = (AccessFs::from_write(RIGHTS), AccessFs::from_all(RIGHTS));
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let handled = match reach {
        Reach::AllButSystem => write | AccessFs::Execute,
        Reach::Only(_) => all,
    };
    let rules = Ruleset::default().handle_access(handled).and_then(|rules| rules.scope(Scope::Signal));
    let mut rules = rules.and_then(Ruleset::create).map_err(refused)?;
    rules = match reach {
        Reach::AllButSystem => allow(rules, not_system()?, write),
        Reach::Only(paths) => allow(rules, paths, all ^ AccessFs::Execute)
            .and_then(|rules| allow(rules, READ_ALSO, read))
            .and_then(|rules| allow(rules, WRITE_ALSO, read | AccessFs::WriteFile)),
    }
    .map_err(refused)?;
    match rules.restrict_self().map_err(refused)?.ruleset {
        RulesetStatus::NotEnforced => {
            Err(IoError::new(ErrorKind::Unsupported, "the kernel is without Landlock"))
        }
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(()),
    }
}

/// Allows `access` at the paths that there are.
fn allow<P: AsRef<Path>>(
    rules: RulesetCreated,
    paths: impl IntoIterator<Item = P>,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, landlock::RulesetError> {
    rules.add_rules(path_beneath_rules(paths, access))
}

/// What is at the root and not the system's. Links lead to something that is listed itself.
fn not_system() -> IoResult<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir("/")? {
        let entry = entry?;
        let system = SYSTEM_DIRS.iter().any(|name| entry.file_name() == OsStr::new(name));
        if !system && !entry.file_type()?.is_symlink() {
            paths.push(entry.path());
        }
    }
    Ok(paths)
}

/// System calls that fail with EPERM.
pub const DENIED: &[i64] = &[
    // Other programs.
    libc::SYS_execve,
    libc::SYS_execveat,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // Other users.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    // Other views of the system.
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_open_by_handle_at,
    // Code in the kernel, and the ways in that attacks take.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_kexec_file_load,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_personality,
    // The machine.
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

/// The same machine's other table of system calls, which some kernels have: this bit on a number, and for some calls
/// numbers of their own (execve, ptrace, process_vm_readv, process_vm_writev, kexec_load, execveat).
#[cfg(target_arch = "x86_64")]
const X32: (i64, [i64; 6]) = (1 << 30, [520, 521, 539, 540, 528, 545]);

/// Namespaces that a new process may not have.
const NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

fn restrict_calls() -> Result<(), String> {
    let programs = programs().map_err(|error| error.to_string())?;
    programs
        .iter()
        .try_for_each(|program| apply_filter_all_threads(program))
        .map_err(|error| error.to_string())
}

/// The filters: what is not permitted, and what is said not to exist.
fn programs() -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let mut denied: BTreeMap<i64, Vec<SeccompRule>> = DENIED.iter().map(|call| (*call, Vec::new())).collect();
    let mut namespaces = Vec::new();
    for flag in NAMESPACES {
        let (flag, whole) = (flag as u64, SeccompCmpArgLen::Dword);
        let has = SeccompCondition::new(0, whole, SeccompCmpOp::MaskedEq(flag), flag)?;
        namespaces.push(SeccompRule::new(vec![has])?);
    }
    denied.insert(libc::SYS_clone, namespaces);
    // Its flags are in memory, where a filter cannot look; whoever is told that it does not exist uses the other one.
    let mut absent = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    #[cfg(target_arch = "x86_64")]
    {
        let (bit, own) = X32;
        let twice = |rules: &mut BTreeMap<i64, Vec<SeccompRule>>| {
            let there: Vec<_> = rules.iter().map(|(call, rules)| (call | bit, rules.clone())).collect();
            rules.extend(there);
        };
        twice(&mut denied);
        twice(&mut absent);
        denied.extend(own.map(|call| (call | bit, Vec::new())));
    }
    let filter = |rules, errno: i32| {
        SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno as u32), arch)?.try_into()
    };
    Ok([filter(denied, libc::EPERM)?, filter(absent, libc::ENOSYS)?])
}
