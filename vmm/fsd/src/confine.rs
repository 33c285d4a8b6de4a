//! What the process gives up: before the first request namespaces, before the guest's first one files, network
//! and privileges. The pid namespace is the spawner's doing; the system call filters come last
//! ([`crate::seccomp`]).

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
};

use ampoule_fsd_api::mount;
use ampoule_vmm_api::confine::{ConfineError, drop_privileges, enter_empty_root, limit, step};
use rustix::{
    fs::{CWD, Mode, OFlags, open, openat},
    io::{Errno, read, write},
    mount::{MountPropagationFlags, OpenTreeFlags, mount_change, open_tree},
    pipe::{PipeFlags, pipe_with},
    process::{Pid, Resource, Rlimit, WaitOptions, getrlimit, setrlimit, waitpid},
    thread::{UnshareFlags, set_thread_groups, unshare_unsafe},
};

use crate::{caller::KEPT, handles::MAX_HANDLES, locks::MAX_OWNERS, nodes::MAX_NODES};

/// Descriptors that are neither nodes nor handles: locks, shares, streams, those of a request under way.
const OTHER_DESCRIPTORS: usize = MAX_OWNERS + 1024;

/// How much the guest may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub nodes: usize,
    pub handles: usize,
}

/// In namespaces of its own, which still look like the host's.
#[derive(Debug)]
pub struct Apart {
    pub limits: Limits,
}

/// Leaves the host's namespaces. Single-threaded.
///
/// The user namespace has the users and groups of the one before, so that the process may act as any of them, and
/// has no power over anything that is not theirs.
///
/// # Errors
/// Without a mount namespace of its own nothing could be shared alone.
pub fn apart() -> Result<Apart, ConfineError> {
    let limits = step("descriptors", raise_descriptors())?;
    if let Err(e) = enter_user_namespace() {
        eprintln!("ampoule-fsd: no user namespace of its own: {e}");
    }
    let apart = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // SAFETY: CLONE_FILES, the flag that is not safe, is not among these.
    step("namespaces", unsafe { unshare_unsafe(apart) })?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    step("mount propagation", mount_change("/", private))?;
    Ok(Apart { limits })
}

impl Apart {
    /// Gives up the rest. Single-threaded: threads started later inherit it. Returns `/proc/self/fd` as a detached
    /// mount, out of which no path leads but those of its links.
    pub fn enter(self) -> Result<OwnedFd, ConfineError> {
        let links = step("the links to open files", open_links())?;
        step("an empty root directory", enter_empty_root())?;
        drop_privileges(KEPT)?;
        // The groups of whoever started this are not the guest's. Where they cannot be left they are the user's own.
        let _ = set_thread_groups(&[]);
        limit(&[(Resource::Core, 0), (Resource::Memlock, 0)])?;
        Ok(links)
    }
}

/// As many descriptors as the host grants: each file that the guest knows needs one.
fn raise_descriptors() -> Result<Limits, Errno> {
    let wanted = (MAX_NODES + MAX_HANDLES + OTHER_DESCRIPTORS) as u64;
    let granted = getrlimit(Resource::Nofile).maximum.unwrap_or(wanted);
    let limit = |most| Rlimit { current: Some(most), maximum: Some(most) };
    // More than the hard limit takes a privilege that only root has on the host.
    let most = match setrlimit(Resource::Nofile, limit(wanted)) {
        Ok(()) => wanted,
        Err(_) => granted.min(wanted),
    };
    setrlimit(Resource::Nofile, limit(most))?;
    let most = (most as usize).saturating_sub(OTHER_DESCRIPTORS);
    let handles = MAX_HANDLES.min(most / 4);
    Ok(Limits { handles, nodes: MAX_NODES.min(most - handles) })
}

/// The maps can only be written from outside of the new namespace, which a child does that stays there.
fn enter_user_namespace() -> io::Result<()> {
    let [uid_map, gid_map] =
        ["uid_map", "gid_map"].map(|map| identity(&format!("/proc/self/{map}")));
    let (uid_map, gid_map) = (uid_map?, gid_map?);
    let this = open("/proc/self", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let (go, go_write) = pipe_with(PipeFlags::CLOEXEC)?;
    // SAFETY: this process has one thread; the child ends without leaving this function.
    let child = unsafe { libc::fork() };
    if child == 0 {
        drop(go_write);
        let entered = matches!(read(&go, &mut [0; 1]), Ok(1));
        let mapped = entered
            && write_map(&this, "uid_map", &uid_map).is_ok()
            && write_map(&this, "gid_map", &gid_map).is_ok();
        // SAFETY: ends this process at once.
        unsafe { libc::_exit(i32::from(!mapped)) }
    }
    let child = Pid::from_raw(child).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: CLONE_FILES, the flag that is not safe, is not asked for.
    let entered = unsafe { unshare_unsafe(UnshareFlags::NEWUSER) };
    if entered.is_ok() {
        write(&go_write, &[1])?;
    }
    drop(go_write);
    let ended = waitpid(Some(child), WaitOptions::empty())?;
    entered?;
    match ended {
        Some((_, status)) if status.exit_status() == Some(0) => Ok(()),
        _ => Err(io::Error::other("its users could not be mapped")),
    }
}

/// A map of everybody in this namespace to themselves.
fn identity(map: &str) -> io::Result<String> {
    let mut identity = String::new();
    for line in fs::read_to_string(map)?.lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [first, _, count] = fields[..] else {
            return Err(io::Error::other("a map of users that cannot be understood"));
        };
        identity.push_str(&format!("{first} {first} {count}\n"));
    }
    Ok(identity)
}

fn write_map(process: &OwnedFd, name: &str, map: &str) -> Result<(), Errno> {
    let file = openat(process, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    write(&file, map.as_bytes()).map(|_| ())
}

/// `/proc/self/fd` as a detached mount.
pub(crate) fn open_links() -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let links = open_tree(CWD, "/proc/self/fd", flags)?;
    let nothing = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    mount::set_attributes(links.as_fd(), nothing)?;
    Ok(links)
}
