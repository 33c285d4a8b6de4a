//! What a process gives up for good, a step each: for `ampoule-vmm` and `ampoule-fsd`, which the guest speaks to.

use std::{io, os::fd::AsFd};

use rustix::{
    fs::CWD,
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
        fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
    },
    process::{
        DumpableBehavior, Resource, Rlimit, chdir, fchdir, getrlimit, pivot_root,
        set_dumpable_behavior, setrlimit,
    },
    thread::{
        CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
        set_capabilities, set_no_new_privs,
    },
};

/// A step that must work and did not.
#[derive(Debug, thiserror::Error)]
#[error("confining the process: {step}")]
pub struct ConfineError {
    step: &'static str,
    source: io::Error,
}

/// Names what failed.
pub fn step<T>(
    step: &'static str,
    result: Result<T, impl Into<io::Error>>,
) -> Result<T, ConfineError> {
    result.map_err(|e| ConfineError { step, source: e.into() })
}

/// An empty, read-only tmpfs becomes the root; the old one is gone from this mount namespace, out of which no mount
/// must get (`MS_PRIVATE`).
pub fn enter_empty_root() -> Result<(), Errno> {
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

/// Privileges other than these, of the calling thread, and whatever would give it new ones.
///
/// # Errors
/// What needs no permission and fails nevertheless.
pub fn drop_privileges(kept: CapabilitySet) -> Result<(), ConfineError> {
    step("capabilities", drop_capabilities(kept))?;
    step("no new privileges", set_no_new_privs(true))?;
    // No core file of what the guest has in memory and files, and no attaching by processes of the same user.
    step("dumpability", set_dumpable_behavior(DumpableBehavior::NotDumpable))?;
    step("file size signal", ignore_file_size_signal())
}

/// Bounding set, ambient set, then all the others. Without CAP_SETPCAP there is nothing to drop them from.
fn drop_capabilities(kept: CapabilitySet) -> Result<(), Errno> {
    for capability in (0..64).filter(|capability| kept.bits() & (1 << capability) == 0) {
        // SAFETY: takes a number; EINVAL says that the kernel knows no capability of that number.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        if dropped < 0 {
            break;
        }
    }
    clear_ambient_capability_set()?;
    let permitted = capabilities(None)?.permitted & kept;
    let inheritable = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: permitted, permitted, inheritable })
}

/// A file that hits a file size limit is an I/O error of the guest's, not a signal.
fn ignore_file_size_signal() -> Result<(), Errno> {
    // SAFETY: no handler is installed, the signal is only ignored.
    match unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(Errno::INVAL),
        _ => Ok(()),
    }
}

/// At most this much of each of these, for good.
pub fn limit(resources: &[(Resource, u64)]) -> Result<(), ConfineError> {
    for (resource, most) in resources {
        let limit = getrlimit(*resource).maximum.unwrap_or(u64::MAX).min(*most);
        let set = setrlimit(*resource, Rlimit { current: Some(limit), maximum: Some(limit) });
        step("limits", set)?;
    }
    Ok(())
}
