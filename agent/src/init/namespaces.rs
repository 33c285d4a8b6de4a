//! Namespaces: those that were not made or joined with the process itself, and what is set in them.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::fd::{AsRawFd, OwnedFd},
};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags, openat2},
    io::Errno,
    system::{setdomainname, sethostname},
};

use crate::{
    network,
    oci::{Linux, NamespaceKind, Spec},
    plan::{StepError, at, refuse},
};

/// Clocks that a time namespace can offset (time_namespaces(7)).
const CLOCKS: [&str; 2] = ["monotonic", "boottime"];

/// Joins the namespaces that the spec names by path, unless that was done before, and makes the cgroup namespace: its
/// root is the cgroup of its maker.
pub fn join(linux: &Linux) -> Result<(), StepError> {
    if !linux.has_own(NamespaceKind::User) {
        join_named(linux)?;
    }
    if linux.has_own(NamespaceKind::Cgroup) {
        // SAFETY: unshare(2) takes flags; this one concerns no memory or descriptor.
        check(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) })
            .map_err(at("make namespace", "cgroup"))?;
    }
    match linux.has_own(NamespaceKind::Time) {
        true => enter_new_time(linux),
        false => Ok(()),
    }
}

/// Joins the namespaces that the spec names by path.
pub fn join_named(linux: &Linux) -> Result<(), StepError> {
    for namespace in &linux.namespaces {
        let flag = match namespace.kind {
            NamespaceKind::Network => libc::CLONE_NEWNET,
            NamespaceKind::Ipc => libc::CLONE_NEWIPC,
            NamespaceKind::Uts => libc::CLONE_NEWUTS,
            NamespaceKind::Cgroup => libc::CLONE_NEWCGROUP,
            NamespaceKind::Time => libc::CLONE_NEWTIME,
            // The agent has seen to these.
            NamespaceKind::Pid | NamespaceKind::Mount | NamespaceKind::User => continue,
        };
        if let Some(path) = &namespace.path {
            let file = File::open(path).map_err(at("join namespace", path.display()))?;
            setns(file.as_raw_fd(), flag).map_err(at("join namespace", path.display()))?;
        }
    }
    Ok(())
}

/// A time namespace takes its offsets before anybody is in it; its maker is not until it joins it.
fn enter_new_time(linux: &Linux) -> Result<(), StepError> {
    // SAFETY: unshare(2) takes flags; this one concerns what becomes of us later.
    check(unsafe { libc::unshare(libc::CLONE_NEWTIME) }).map_err(at("make namespace", "time"))?;
    for (clock, offset) in &linux.time_offsets {
        if !CLOCKS.contains(&clock.as_str()) {
            return Err(refuse("spec", "linux.timeOffsets", format_args!("{clock:?} is no clock")));
        }
        let line = format!("{clock} {} {}", offset.secs, offset.nanosecs);
        fs::write("/proc/self/timens_offsets", &line).map_err(at("time offset", &line))?;
    }
    let new =
        File::open("/proc/self/ns/time_for_children").map_err(at("join namespace", "time"))?;
    setns(new.as_raw_fd(), libc::CLONE_NEWTIME).map_err(at("join namespace", "time"))
}

/// Joins all namespaces of a container's init, but for the PID namespace, where we were born.
pub fn join_all(
    target: &OwnedFd,
    user_namespace: bool,
    time_namespace: bool,
) -> Result<(), StepError> {
    let mut flags = libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    if user_namespace {
        flags |= libc::CLONE_NEWUSER;
    }
    if time_namespace {
        flags |= libc::CLONE_NEWTIME;
    }
    setns(target.as_raw_fd(), flags).map_err(at("join namespaces", "container"))?;
    if user_namespace {
        super::identity::become_root().map_err(at("join namespaces", "root of the container"))?;
    }
    Ok(())
}

/// Loopback, names and sysctls. /proc is still the guest's, where no image can redirect a path.
pub fn prepare(spec: &Spec) -> Result<(), StepError> {
    let own = |kind| spec.linux.has_own(kind);
    if own(NamespaceKind::Network) {
        network::loopback_up().map_err(at("network", "lo"))?;
    }
    for (name, set) in [
        (&spec.hostname, sethostname as fn(&[u8]) -> rustix::io::Result<()>),
        (&spec.domainname, setdomainname),
    ] {
        if !name.is_empty() && !own(NamespaceKind::Uts) {
            return Err(refuse("hostname", name, "the container has no UTS namespace of its own"));
        }
        if !name.is_empty() {
            set(name.as_bytes()).map_err(at("hostname", name))?;
        }
    }
    spec.linux.sysctl.iter().try_for_each(|(key, value)| sysctl(key, value))
}

/// Any sysctl: the kernel is the sandbox's own.
fn sysctl(key: &str, value: &str) -> Result<(), StepError> {
    // As sysctl(8): dots separate, unless slashes do.
    let path = if key.contains('/') { key.to_owned() } else { key.replace('.', "/") };
    let base = File::open("/proc/sys").map_err(at("sysctl", key))?;
    let file = openat2(
        &base,
        path.as_str(),
        OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    )
    .map_err(|error| match error {
        Errno::NOENT => refuse("sysctl", key, "the guest's kernel has no such setting"),
        error => at("sysctl", key)(error),
    })?;
    File::from(file)
        .write_all(value.as_bytes())
        .map_err(at("sysctl", format_args!("{key} = {value}")))
}

fn setns(fd: i32, flags: i32) -> io::Result<()> {
    // SAFETY: setns(2) takes a descriptor and flags.
    check(unsafe { libc::setns(fd, flags) })
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
