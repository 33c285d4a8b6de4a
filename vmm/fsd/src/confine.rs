//! What the process gives up: before the first request namespaces, before the guest's first one files, network
//! and privileges. The pid namespace is the spawner's doing; the system call filters come last
//! ([`crate::seccomp`]).

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
};

use ampoule_fsd_api::mount;
use rustix::{
    fs::{CWD, Mode, OFlags, open, openat},
    io::{Errno, read, write},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
        OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
        mount_change, move_mount, open_tree, unmount,
    },
    pipe::{PipeFlags, pipe_with},
    process::{
        DumpableBehavior, Pid, Resource, Rlimit, WaitOptions, chdir, fchdir, getrlimit, pivot_root,
        set_dumpable_behavior, setrlimit, waitpid,
    },
    thread::{
        CapabilitySets, UnshareFlags, clear_ambient_capability_set, set_capabilities,
        set_no_new_privs, unshare_unsafe,
    },
};

use crate::{caller::KEPT, handles::MAX_HANDLES, locks::MAX_OWNERS, nodes::MAX_NODES};

/// Descriptors that are neither nodes nor handles: locks, shares, streams, those of a request under way.
const OTHER_DESCRIPTORS: usize = MAX_OWNERS + 1024;

/// A step that must work and did not.
#[derive(Debug, thiserror::Error)]
#[error("confining the process: {step}")]
pub struct ConfineError {
    step: &'static str,
    source: io::Error,
}

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
        step("capabilities", drop_capabilities())?;
        step("no new privileges", set_no_new_privs(true))?;
        step("limits", set_limits())?;
        // No core file of what users have in their files, and no attaching by processes of the same user.
        step("dumpability", set_dumpable_behavior(DumpableBehavior::NotDumpable))?;
        step("file size signal", ignore_file_size_signal())?;
        Ok(links)
    }
}

fn step<T>(step: &'static str, result: Result<T, impl Into<io::Error>>) -> Result<T, ConfineError> {
    result.map_err(|e| ConfineError { step, source: e.into() })
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

fn open_links() -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let links = open_tree(CWD, "/proc/self/fd", flags)?;
    let nothing = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    mount::set_attributes(links.as_fd(), nothing)?;
    Ok(links)
}

/// An empty, read-only tmpfs becomes the root; the old one is gone from this mount namespace.
fn enter_empty_root() -> Result<(), Errno> {
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

/// All but what acting as the guest's users takes.
fn drop_capabilities() -> Result<(), Errno> {
    for capability in 0..64 {
        if KEPT.bits() & (1 << capability) != 0 {
            continue;
        }
        // SAFETY: takes a number; EINVAL says that the kernel knows no capability of that number.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        if dropped < 0 {
            break;
        }
    }
    clear_ambient_capability_set()?;
    let permitted = rustix::thread::capabilities(None)?.permitted & KEPT;
    let inheritable = rustix::thread::CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: permitted, permitted, inheritable })?;
    // The groups of whoever started this are not the guest's. Where they cannot be left they are the user's own.
    let _ = rustix::thread::set_thread_groups(&[]);
    Ok(())
}

fn set_limits() -> Result<(), Errno> {
    for resource in [Resource::Core, Resource::Memlock] {
        setrlimit(resource, Rlimit { current: Some(0), maximum: Some(0) })?;
    }
    Ok(())
}

/// A file that hits a file size limit is an error of the guest's, not a signal.
fn ignore_file_size_signal() -> Result<(), Errno> {
    // SAFETY: no handler is installed, the signal is only ignored.
    match unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(Errno::INVAL),
        _ => Ok(()),
    }
}
