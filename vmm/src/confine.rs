//! What the process gives up before it reads its first request: files, network, every other process,
//! privileges. The user and pid namespaces are the spawner's doing
//! ([`ampoule_vmm_api::spawn`]); the system call filters come last ([`crate::seccomp`]).

use std::{io, os::fd::AsFd};

use rustix::{
    fs::CWD,
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
        UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change,
        move_mount, unmount,
    },
    process::{
        DumpableBehavior, Resource, Rlimit, chdir, fchdir, getrlimit, pivot_root,
        set_dumpable_behavior, setrlimit,
    },
    thread::{
        CapabilitySet, CapabilitySets, UnshareFlags, clear_ambient_capability_set,
        set_capabilities, set_no_new_privs, unshare_unsafe,
    },
};

/// Descriptors: 1,023 vsock streams, 16 disks or taps, some eventfds for each device and vCPU.
const MAX_DESCRIPTORS: u64 = 2048;

/// A step that must work and did not.
#[derive(Debug, thiserror::Error)]
#[error("confining the process: {step}")]
pub struct ConfineError {
    step: &'static str,
    source: io::Error,
}

/// Gives up everything. Single-threaded: threads started later inherit it.
///
/// Returns what the host did not permit. That is only ever namespaces and the empty root, when the caller
/// has no privileges and may not make user namespaces; the filters forbid their use all the same.
///
/// # Errors
/// What needs no permission and fails nevertheless.
pub fn enter() -> Result<Vec<&'static str>, ConfineError> {
    let mut missing = Vec::new();
    let apart = UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP
        | UnshareFlags::NEWNS;
    // SAFETY: CLONE_FILES, the flag that is not safe, is not among these.
    match unsafe { unshare_unsafe(apart) } {
        Ok(()) => {
            if enter_empty_root().is_err() {
                missing.push("an empty root directory");
            }
        }
        Err(_) => missing.push("mount, network, IPC, UTS and cgroup namespaces"),
    }
    step("capabilities", drop_capabilities())?;
    step("no new privileges", set_no_new_privs(true))?;
    step("limits", set_limits())?;
    // No core file of guest memory, and no attaching by processes of the same user.
    step("dumpability", set_dumpable_behavior(DumpableBehavior::NotDumpable))?;
    step("file size signal", ignore_file_size_signal())?;
    Ok(missing)
}

fn step(step: &'static str, result: Result<(), Errno>) -> Result<(), ConfineError> {
    result.map_err(|e| ConfineError { step, source: e.into() })
}

/// An empty, read-only tmpfs becomes the root; the old one is gone from this mount namespace.
fn enter_empty_root() -> Result<(), Errno> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "size", "4k")?;
    fsconfig_set_string(context.as_fd(), "nr_inodes", "1")?;
    fsconfig_create(context.as_fd())?;
    let nothing = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, nothing)?;
    fchdir(&root)?;
    move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    // pivot_root(2), "pivot_root(".", ".")": the old root ends up on top of the new one, and goes.
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")
}

/// Bounding set, ambient set, then all the others. Without CAP_SETPCAP there is nothing to drop them from.
fn drop_capabilities() -> Result<(), Errno> {
    for capability in 0..64 {
        // SAFETY: takes a number; EINVAL says that the kernel knows no capability of that number.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        if dropped < 0 {
            break;
        }
    }
    clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
}

fn set_limits() -> Result<(), Errno> {
    for (resource, most) in
        [(Resource::Core, 0), (Resource::Memlock, 0), (Resource::Nofile, MAX_DESCRIPTORS)]
    {
        let limit = getrlimit(resource).maximum.unwrap_or(u64::MAX).min(most);
        setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) })?;
    }
    Ok(())
}

/// A disk that hits a file size limit is an I/O error of the guest's, not a signal.
fn ignore_file_size_signal() -> Result<(), Errno> {
    // SAFETY: no handler is installed, the signal is only ignored.
    match unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(Errno::INVAL),
        _ => Ok(()),
    }
}
