//! Namespaces: those that were not made or joined with the process itself, and what is set in them.

use std::{
    fs::{self, File},
    io::{self, Write},
    mem,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use ampoule_vmm_api::Channel;
use rustix::{
    fs::{Mode, OFlags, ResolveFlags, openat2},
    io::Errno,
    process::{PidfdFlags, getpid, pidfd_open},
    system::{setdomainname, sethostname},
};

use crate::{
    network,
    oci::{IdMapping, Linux, NamespaceKind, Spec},
    plan::{Report, StepError, at, refuse},
};

/// Clocks that a time namespace can offset (time_namespaces(7)).
const CLOCKS: [&str; 2] = ["monotonic", "boottime"];

/// Joins the namespaces that the spec names by path, unless that was done before, and makes the cgroup namespace: its
/// root is the cgroup of its maker.
pub fn join(linux: &Linux) -> Result<(), StepError> {
    if !linux.has_users() {
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

/// The kinds that are made together with a process, by the flags of clone(2).
pub fn made_with_a_process(linux: &Linux) -> libc::c_int {
    [
        (NamespaceKind::Pid, libc::CLONE_NEWPID),
        (NamespaceKind::Network, libc::CLONE_NEWNET),
        (NamespaceKind::Mount, libc::CLONE_NEWNS),
        (NamespaceKind::Ipc, libc::CLONE_NEWIPC),
        (NamespaceKind::Uts, libc::CLONE_NEWUTS),
        (NamespaceKind::User, libc::CLONE_NEWUSER),
    ]
    .into_iter()
    .filter(|(kind, _)| linux.has_own(*kind))
    .fold(0, |flags, (_, flag)| flags | flag)
}

/// Joins the user namespace that the spec names by path, and goes on as a child of the agent's that is in the other
/// namespaces which the container is to have for itself: so they belong to that user namespace, not to the guest's.
pub fn join_users(linux: &Linux, channel: &Channel) -> Result<(), StepError> {
    const STEP: &str = "join user namespace";
    let Some(path) = linux.joined_users() else { return Ok(()) };
    let file = File::open(path).map_err(at(STEP, path.display()))?;
    setns(file.as_raw_fd(), libc::CLONE_NEWUSER).map_err(at(STEP, path.display()))?;
    super::identity::become_root().map_err(at(STEP, "root of the container"))?;
    // SAFETY: clone_args is plain numbers, for all of which 0 is valid.
    let mut args: libc::clone_args = unsafe { mem::zeroed() };
    args.flags = (made_with_a_process(linux) | libc::CLONE_PARENT) as u64;
    // SAFETY: as fork(2), of a process with one thread.
    let child = unsafe {
        libc::syscall(libc::SYS_clone3, &raw mut args, mem::size_of::<libc::clone_args>())
    };
    match child {
        0 => {}
        ..0 => return Err(at(STEP, "child")(io::Error::last_os_error())),
        // SAFETY: ends this process at once.
        _ => unsafe { libc::_exit(0) },
    }
    let pidfd = pidfd_open(getpid(), PidfdFlags::empty()).map_err(at(STEP, "child"))?;
    let told = channel.send(&Report::Joined, &[pidfd.as_fd()]);
    told.map_err(|e| at(STEP, "report")(io::Error::other(e)))
}

/// Refuses mappings of a spec that are not those of the user namespace that it names, `/proc/PID/ns/user`.
pub fn check_joined_maps(linux: &Linux) -> Result<(), StepError> {
    let Some(process) = linux.joined_users().and_then(|path| path.ancestors().nth(2)) else {
        return Ok(());
    };
    for (name, field, wanted) in [
        ("uid_map", "linux.uidMappings", &linux.uid_mappings),
        ("gid_map", "linux.gidMappings", &linux.gid_mappings),
    ] {
        let path = process.join(name);
        let map = fs::read_to_string(&path).map_err(at("user namespace", path.display()))?;
        if !wanted.is_empty() && !is_map(&map, wanted) {
            let lines: Vec<_> = map.lines().map(words).collect();
            let cause = format_args!("the user namespace that it joins has {}", lines.join(", "));
            return Err(refuse("spec", field, cause));
        }
    }
    Ok(())
}

/// Whether a uid_map or gid_map (user_namespaces(7)) says the same as mappings, in any order.
fn is_map(map: &str, mappings: &[IdMapping]) -> bool {
    let line = |m: &IdMapping| format!("{} {} {}", m.container_id, m.host_id, m.size);
    let mut wanted: Vec<_> = mappings.iter().map(line).collect();
    let mut found: Vec<_> = map.lines().map(words).collect();
    wanted.sort_unstable();
    found.sort_unstable();
    wanted == found
}

fn words(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
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
            // These are seen to before or after.
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
            // sethostname(2): __NEW_UTS_LEN
            set(name.as_bytes()).map_err(|e| match e {
                Errno::INVAL => refuse("hostname", name, "longer than 64 bytes"),
                e => at("hostname", name)(e),
            })?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_the_same_in_any_order_and_with_any_blanks() {
        let mapping = |container_id, host_id, size| IdMapping { container_id, host_id, size };
        let map = "         0     100000      65536\n     70000          1          2\n";
        let (first, second) = (mapping(0, 100_000, 65_536), mapping(70_000, 1, 2));
        assert!(is_map(map, &[first, second]) && is_map(map, &[second, first]));
        for other in [vec![], vec![first], vec![mapping(0, 100_000, 65_535), second]] {
            assert!(!is_map(map, &other), "{other:?}");
        }
    }
}
