//! What `ampoule run` runs: an image's configuration and the user's options as one OCI runtime spec, with
//! docker's defaults. Pure.

use std::collections::HashSet;

use oci_spec::runtime::{Capability, LinuxSeccomp, Process, Spec};
use serde_json::{Value, json};

use crate::{
    capabilities,
    cli::{CapabilityName, Sysctl, Tmpfs, Ulimit, Volume},
    control::ExecRequest,
    image::ImageConfig,
    seccomp,
    spec::SCRATCH,
};

/// Search path of a workload whose image names none.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Period of a CPU quota in microseconds.
const CPU_PERIOD: u64 = 100_000;
const MASKED_PATHS: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY_PATHS: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
/// Longest host name Linux takes, in bytes (HOST_NAME_MAX).
pub const MAX_HOSTNAME: usize = 64;
/// Docker's size of /dev/shm, in bytes.
pub const SHM_SIZE: u64 = 64 << 20;

/// What the user asked for.
#[derive(Clone, Debug, Default)]
pub struct RunOptions {
    /// Replaces the image's command, not its entrypoint; empty keeps it.
    pub command: Vec<String>,
    /// Replaces the image's entrypoint and command; empty stands for none.
    pub entrypoint: Option<String>,
    /// `NAME=value` each; the last one of a name wins.
    pub env: Vec<String>,
    pub workdir: Option<String>,
    pub user: Option<String>,
    /// With its size in characters, width and height, if there is a terminal.
    pub terminal: Option<(u16, u16)>,
    pub hostname: String,
    /// Limit in bytes.
    pub memory: u64,
    /// Quota in thousandths of a CPU; none if all CPUs of the VM are the container's.
    pub milli_cpus: Option<u32>,
    /// 0 is no limit.
    pub pids_limit: u32,
    pub read_only: bool,
    pub cap_add: Vec<CapabilityName>,
    pub cap_drop: Vec<CapabilityName>,
    /// All that the guest's kernel has: capabilities, devices, system calls.
    pub privileged: bool,
    /// The kernel's random numbers are not the container's: those of its seed take their place.
    pub seeded: bool,
    pub seccomp: SeccompChoice,
    pub no_new_privileges: bool,
    /// Masked and read-only paths are left as they are.
    pub open_system_paths: bool,
    pub ulimits: Vec<Ulimit>,
    pub sysctls: Vec<Sysctl>,
    pub tmpfs: Vec<Tmpfs>,
    pub volumes: Vec<Volume>,
    pub devices: Vec<BlockDevice>,
    /// Size of /dev/shm in bytes; [`SHM_SIZE`] if none is given.
    pub shm_size: Option<u64>,
}

/// A block device of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    pub number: (i64, i64),
    /// In the container.
    pub path: String,
    /// Of "rwm".
    pub access: String,
    /// Permission bits, owner and group of its node.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// Which system call filter.
#[derive(Clone, Debug, Default)]
pub enum SeccompChoice {
    /// Ours, opened for the capabilities that were added.
    #[default]
    Default,
    Unconfined,
    /// The user's, as the JSON of OCI or docker.
    Profile(Value),
}

#[derive(Debug, thiserror::Error)]
pub enum RunSpecError {
    #[error("the image names no command")]
    NoCommand,
    #[error("--workdir {0:?}: not an absolute path")]
    Workdir(String),
    #[error("seccomp profile")]
    Seccomp(#[source] serde_json::Error),
    #[error("default spec")]
    Json(#[from] serde_json::Error),
}

/// Makes the spec.
pub fn run_spec(image: &ImageConfig, options: &RunOptions) -> Result<Spec, RunSpecError> {
    let namespaces = ["pid", "network", "ipc", "uts", "mount", "cgroup"];
    let namespaces = namespaces.map(|kind| json!({ "type": kind }));
    let capabilities = granted(options);
    let mut linux = json!({
        "namespaces": namespaces,
        "resources": resources(options),
    });
    if let Some(filter) = filter(options, &capabilities)? {
        linux["seccomp"] = serde_json::to_value(filter)?;
    }
    for Sysctl { name, value } in &options.sysctls {
        linux["sysctl"][name] = json!(value);
    }
    if !options.privileged && !options.open_system_paths {
        linux["maskedPaths"] = MASKED_PATHS.into();
        linux["readonlyPaths"] = READ_ONLY_PATHS.into();
    }
    if !options.devices.is_empty() {
        // As docker has it: beside all devices of a host, those asked for are listed once more.
        let times = if options.privileged { 2 } else { 1 };
        linux["devices"] = options.devices.iter().flat_map(|d| vec![node(d); times]).collect();
    }
    Ok(serde_json::from_value(json!({
        "ociVersion": "1.1.0",
        "hostname": hostname(&options.hostname),
        "root": { "path": "rootfs", "readonly": options.read_only },
        "process": process(image, options, &capabilities)?,
        "mounts": mounts(image, options),
        "linux": linux,
    }))?)
}

/// As docker: what is dropped is dropped from the default, unless ALL was added; what is added is added last.
fn granted(options: &RunOptions) -> HashSet<Capability> {
    let names = |list: &[CapabilityName]| -> (bool, HashSet<Capability>) {
        let one = |name: &CapabilityName| match name {
            CapabilityName::All => None,
            CapabilityName::One(capability) => Some(*capability),
        };
        (list.contains(&CapabilityName::All), list.iter().filter_map(one).collect())
    };
    let ((add_all, add), (drop_all, drop)) = (names(&options.cap_add), names(&options.cap_drop));
    if options.privileged {
        return capabilities::ALL.into();
    }
    match (add_all, drop_all) {
        (true, _) => &HashSet::from(capabilities::ALL) - &drop,
        (false, true) => add,
        (false, false) => &(&HashSet::from(capabilities::DEFAULT) - &drop) | &add,
    }
}

fn filter(
    options: &RunOptions,
    capabilities: &HashSet<Capability>,
) -> Result<Option<LinuxSeccomp>, RunSpecError> {
    match &options.seccomp {
        SeccompChoice::Profile(profile) => {
            seccomp::parse(profile.clone(), capabilities).map(Some).map_err(RunSpecError::Seccomp)
        }
        SeccompChoice::Unconfined => Ok(None),
        SeccompChoice::Default if options.privileged => Ok(None),
        SeccompChoice::Default => Ok(Some(seccomp::default_profile(capabilities)?)),
    }
}

/// A sandbox's name as a host name.
pub fn hostname(name: &str) -> &str {
    &name[..name.len().min(MAX_HOSTNAME)]
}

fn process(
    image: &ImageConfig,
    options: &RunOptions,
    capabilities: &HashSet<Capability>,
) -> Result<Value, RunSpecError> {
    let cwd = options.workdir.as_deref().unwrap_or(&image.working_dir);
    let cwd = if cwd.is_empty() { "/" } else { absolute(cwd)? };
    let mut process = json!({
        "terminal": options.terminal.is_some(),
        // The agent looks names and numbers up in the container's own files.
        "user": { "uid": 0, "gid": 0, "username": options.user.as_deref().unwrap_or(&image.user) },
        "args": args(image, options)?,
        "env": env(image, options),
        "cwd": cwd,
        // Nothing is inheritable or ambient (docker, since CVE-2022-24769).
        "capabilities": {
            "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
        },
        "noNewPrivileges": options.no_new_privileges,
        "rlimits": options.ulimits.iter().map(|limit| {
            json!({ "type": limit.kind, "soft": limit.soft, "hard": limit.hard })
        }).collect::<Value>(),
    });
    if let Some((width, height)) = options.terminal {
        process["consoleSize"] = json!({ "width": width, "height": height });
    }
    Ok(process)
}

/// A further process: the first one's settings, and what the user says of this one.
pub fn exec_process(first: &Process, exec: ExecRequest) -> Result<Process, RunSpecError> {
    let mut json = serde_json::to_value(first)?;
    let mut env = first.env().clone().unwrap_or_default();
    if exec.terminal.is_some() && !env.iter().any(|e| e.starts_with("TERM=")) {
        env.push("TERM=xterm".into());
    }
    exec.env.iter().for_each(|entry| set(&mut env, entry));
    json["args"] = exec.args.into();
    json["env"] = env.into();
    json["terminal"] = exec.terminal.is_some().into();
    json["consoleSize"] = match exec.terminal {
        Some((width, height)) => json!({ "width": width, "height": height }),
        None => Value::Null,
    };
    if let Some(cwd) = exec.workdir {
        json["cwd"] = absolute(&cwd)?.into();
    }
    if let Some(user) = exec.user {
        json["user"] = json!({ "uid": 0, "gid": 0, "username": user });
    }
    Ok(serde_json::from_value(json)?)
}

fn absolute(cwd: &str) -> Result<&str, RunSpecError> {
    if cwd.starts_with('/') { Ok(cwd) } else { Err(RunSpecError::Workdir(cwd.into())) }
}

fn args(image: &ImageConfig, options: &RunOptions) -> Result<Vec<String>, RunSpecError> {
    let (entrypoint, default) = match &options.entrypoint {
        None => (&image.entrypoint[..], &image.cmd[..]),
        Some(none) if none.is_empty() => (&[][..], &[][..]),
        Some(program) => (std::slice::from_ref(program), &[][..]),
    };
    let command = if options.command.is_empty() { default } else { &options.command };
    let args: Vec<String> = entrypoint.iter().chain(command).cloned().collect();
    if args.is_empty() { Err(RunSpecError::NoCommand) } else { Ok(args) }
}

/// Defaults, then the image's, then the user's: of one name the last wins. HOME is the agent's: it knows the
/// user.
fn env(image: &ImageConfig, options: &RunOptions) -> Vec<String> {
    let hostname = format!("HOSTNAME={}", hostname(&options.hostname));
    let mut defaults = vec![PATH.to_string(), hostname];
    if options.terminal.is_some() {
        defaults.push("TERM=xterm".into());
    }
    let mut env = Vec::new();
    defaults.iter().chain(&image.env).chain(&options.env).for_each(|entry| set(&mut env, entry));
    env
}

/// Sets a variable, in its place if it is there already.
fn set(env: &mut Vec<String>, entry: &str) {
    let name = entry.split('=').next();
    match env.iter_mut().find(|e| e.split('=').next() == name) {
        Some(earlier) => *earlier = entry.to_string(),
        None => env.push(entry.to_string()),
    }
}

fn mounts(image: &ImageConfig, options: &RunOptions) -> Value {
    let mount = |destination: &str, kind: &str, options: &[&str]| {
        let source = if kind == "cgroup2" { "cgroup" } else { kind };
        json!({ "destination": destination, "type": kind, "source": source, "options": options })
    };
    let access = if options.privileged { "rw" } else { "ro" };
    let shm = format!("size={}", options.shm_size.unwrap_or(SHM_SIZE));
    let mut mounts = vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", access]),
        mount("/sys/fs/cgroup", "cgroup2", &["nosuid", "noexec", "nodev", "relatime", access]),
        mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", &shm]),
    ];
    let mut given = Vec::new();
    for tmpfs in &options.tmpfs {
        // Docker's defaults; what is given comes later and wins.
        let mut all = vec!["noexec", "nosuid", "nodev"];
        all.extend(tmpfs.options.iter().map(String::as_str));
        given.push(mount(&tmpfs.destination, "tmpfs", &all));
    }
    for Volume { source, destination, read_only } in &options.volumes {
        let Some(source) = source else {
            given.push(mount(destination, SCRATCH, &[]));
            continue;
        };
        let access = if *read_only { "ro" } else { "rw" };
        given.push(json!({
            "destination": destination, "type": "bind", "source": source,
            "options": ["rbind", "rprivate", access],
        }));
    }
    for volume in image.volumes.iter().filter(|volume| !is_kernels(volume)) {
        let same = |path: &str| names(path).eq(names(volume));
        let there = |mount: &Value| mount["destination"].as_str().is_some_and(same);
        if !given.iter().any(there) {
            let names: Vec<_> = names(volume).collect();
            given.push(mount(&format!("/{}", names.join("/")), SCRATCH, &[]));
        }
    }
    // What lies in another one comes after it, whoever asked for it.
    given.sort_by_key(|mount| names(mount["destination"].as_str().unwrap_or_default()).count());
    mounts.extend(given);
    mounts.into()
}

/// A path whose mount is the kernel's, whatever an image would have there.
fn is_kernels(path: &str) -> bool {
    names(path).next().is_none_or(|name| ["proc", "sys", "dev"].contains(&name))
}

fn names(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|name| !["", "."].contains(name))
}

fn node(device: &BlockDevice) -> Value {
    let BlockDevice { number: (major, minor), path, mode, uid, gid, .. } = device;
    json!({
        "path": path, "type": "b", "major": major, "minor": minor, "fileMode": mode, "uid": uid, "gid": gid,
    })
}

fn resources(options: &RunOptions) -> Value {
    let mut resources = json!({
        "devices": if options.privileged { json!([{ "allow": true, "access": "rwm" }]) } else { devices(options) },
        "memory": { "limit": options.memory },
        "pids": { "limit": options.pids_limit },
    });
    if let Some(milli) = options.milli_cpus {
        let quota = u64::from(milli) * CPU_PERIOD / 1000;
        resources["cpu"] = json!({ "quota": quota, "period": CPU_PERIOD });
    }
    resources
}

/// Nodes of any device may be made; opened may be only the harmless ones.
fn devices(options: &RunOptions) -> Value {
    let seeded = options.seeded;
    let allow = |kind: &str, major: Option<u32>, minor: Option<u32>, access: &str| {
        // The kernel's own random numbers are denied by their names: the agent would grant them to anybody.
        let own = seeded && matches!((kind, major, minor), ("c", Some(1), Some(8 | 9)));
        let mut rule = json!({ "allow": !own, "type": kind, "access": access });
        for (name, number) in [("major", major), ("minor", minor)] {
            if let Some(number) = number {
                rule[name] = number.into();
            }
        }
        rule
    };
    let random = if seeded { "rw" } else { "rwm" };
    let given = options.devices.iter().map(|BlockDevice { number: (major, minor), access, .. }| {
        json!({ "allow": true, "type": "b", "major": major, "minor": minor, "access": access })
    });
    let usual = [
        json!({ "allow": false, "access": "rwm" }),
        allow("c", None, None, "m"),
        allow("b", None, None, "m"),
        // null, zero, full, random, urandom
        allow("c", Some(1), Some(3), "rwm"),
        allow("c", Some(1), Some(5), "rwm"),
        allow("c", Some(1), Some(7), "rwm"),
        allow("c", Some(1), Some(8), random),
        allow("c", Some(1), Some(9), random),
        // tty, console, ptmx, pts
        allow("c", Some(5), Some(0), "rwm"),
        allow("c", Some(5), Some(1), "rwm"),
        allow("c", Some(5), Some(2), "rwm"),
        allow("c", Some(136), None, "rwm"),
    ];
    usual.into_iter().chain(given).collect()
}

#[cfg(test)]
mod tests;
