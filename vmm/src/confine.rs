//! What the process gives up before it reads its first request: files, network, every other process,
//! privileges. The user and pid namespaces are the spawner's doing
//! ([`ampoule_vmm_api::spawn`]); the system call filters come last ([`crate::seccomp`]).

use ampoule_vmm_api::confine::{ConfineError, drop_privileges, enter_empty_root, limit};
use rustix::{
    io::Errno,
    mount::{MountPropagationFlags, mount_change},
    process::Resource,
    thread::{CapabilitySet, UnshareFlags, unshare_unsafe},
};

/// Descriptors: 1,023 vsock streams, 16 disks or network devices of a few taps, some eventfds for each device and vCPU.
const MAX_DESCRIPTORS: u64 = 2048;

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
            if empty_root().is_err() {
                missing.push("an empty root directory");
            }
        }
        Err(_) => missing.push("mount, network, IPC, UTS and cgroup namespaces"),
    }
    drop_privileges(CapabilitySet::empty())?;
    limit(&[(Resource::Core, 0), (Resource::Memlock, 0), (Resource::Nofile, MAX_DESCRIPTORS)])?;
    Ok(missing)
}

fn empty_root() -> Result<(), Errno> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    enter_empty_root()
}
