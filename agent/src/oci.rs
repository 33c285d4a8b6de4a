//! The part of the OCI runtime specification (1.2) that the agent enforces.
//!
//! What is not in these types is not enforced, and so is refused by name: every type denies unknown
//! members, once those that ask for nothing (`null`, `""`, `[]`, `{}`) have been dropped. The few
//! members that are read and then refused for some of their values are checked in
//! [`refuse_unenforced`].

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::plan::{StepError, refuse};

/// A container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Spec {
    /// Any: what a version added and we do not know is refused on its own.
    pub oci_version: String,
    /// For others; means nothing here.
    pub annotations: BTreeMap<String, String>,
    pub hostname: String,
    pub domainname: String,
    pub root: Root,
    pub process: Process,
    pub mounts: Vec<Mount>,
    pub linux: Linux,
    pub hooks: Hooks,
}

/// Those that run in the guest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Hooks {
    pub start_container: Vec<Hook>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hook {
    pub path: String,
    pub args: Vec<String>,
    pub env: Vec<String>,
    /// In seconds.
    pub timeout: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Root {
    /// Ignored: the root file system is named in the request.
    pub path: PathBuf,
    pub readonly: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Process {
    pub terminal: bool,
    pub console_size: Option<ConsoleSize>,
    pub user: User,
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: String,
    pub capabilities: Capabilities,
    pub rlimits: Vec<Rlimit>,
    pub no_new_privileges: bool,
    pub oom_score_adj: Option<i32>,
    pub io_priority: Option<IoPriority>,
    pub scheduler: Option<Scheduler>,
    /// Of execs.
    #[serde(rename = "execCPUAffinity")]
    pub exec_cpu_affinity: Option<CpuAffinity>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoPriority {
    /// `IOPRIO_CLASS_*`
    pub class: String,
    #[serde(default)]
    pub priority: i64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scheduler {
    /// `SCHED_*`
    pub policy: String,
    pub nice: i32,
    pub priority: i32,
    /// `SCHED_FLAG_*`
    pub flags: Vec<String>,
    /// Nanoseconds, of SCHED_DEADLINE; likewise the others.
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

/// Lists of CPUs, as "0-3,7".
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CpuAffinity {
    pub initial: String,
    #[serde(rename = "final")]
    pub last: String,
}

/// In characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConsoleSize {
    pub height: u16,
    pub width: u16,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub umask: Option<u32>,
    pub additional_gids: Vec<u32>,
    /// Wins over uid and gid; see `init/user.rs`.
    pub username: String,
}

/// `CAP_*` names.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Capabilities {
    pub bounding: Vec<String>,
    pub effective: Vec<String>,
    pub inheritable: Vec<String>,
    pub permitted: Vec<String>,
    pub ambient: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimit {
    /// `RLIMIT_*`
    #[serde(rename = "type")]
    pub kind: String,
    pub hard: u64,
    pub soft: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Mount {
    pub destination: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub source: String,
    pub options: Vec<String>,
    /// Whose its files are, if not those whom they are on it.
    pub uid_mappings: Vec<IdMapping>,
    pub gid_mappings: Vec<IdMapping>,
}

impl Mount {
    pub fn is_mapped(&self) -> bool {
        !self.uid_mappings.is_empty() || !self.gid_mappings.is_empty()
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Linux {
    pub namespaces: Vec<Namespace>,
    pub uid_mappings: Vec<IdMapping>,
    pub gid_mappings: Vec<IdMapping>,
    pub devices: Vec<Device>,
    /// Ignored: the agent has its own tree.
    pub cgroups_path: String,
    pub resources: Resources,
    pub sysctl: BTreeMap<String, String>,
    pub rootfs_propagation: String,
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
    pub seccomp: Option<Seccomp>,
    pub personality: Option<Personality>,
    /// By clock: "monotonic", "boottime".
    pub time_offsets: BTreeMap<String, TimeOffset>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Personality {
    /// "LINUX", "LINUX32"
    pub domain: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TimeOffset {
    pub secs: i64,
    pub nanosecs: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Namespace {
    #[serde(rename = "type")]
    pub kind: NamespaceKind,
    /// Join this one of the guest's instead of making one.
    #[serde(default)]
    pub path: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NamespaceKind {
    Pid,
    Network,
    Mount,
    Ipc,
    Uts,
    User,
    Cgroup,
    Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IdMapping {
    #[serde(rename = "containerID")]
    pub container_id: u32,
    #[serde(rename = "hostID")]
    pub host_id: u32,
    pub size: u32,
}

/// As the kernel has it in uid_map and gid_map (user_namespaces(7)).
pub fn id_map(mappings: &[IdMapping]) -> String {
    mappings.iter().map(|m| format!("{} {} {}\n", m.container_id, m.host_id, m.size)).collect()
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    pub path: String,
    /// "c", "b", "u" (as "c") or "p".
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default)]
    pub major: u32,
    #[serde(default)]
    pub minor: u32,
    pub file_mode: Option<u32>,
    #[serde(default)]
    pub uid: u32,
    #[serde(default)]
    pub gid: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Resources {
    pub devices: Vec<DeviceRule>,
    pub memory: Memory,
    pub cpu: Cpu,
    pub pids: Pids,
    pub hugepage_limits: Vec<HugepageLimit>,
    /// cgroup v2 file name to content.
    pub unified: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeviceRule {
    pub allow: bool,
    /// "a" (also when empty), "b" or "c".
    #[serde(rename = "type")]
    pub kind: String,
    /// Any if absent or negative.
    pub major: Option<i64>,
    pub minor: Option<i64>,
    /// Of "rwm"; all when empty.
    pub access: String,
}

/// Bytes; -1 is no limit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Memory {
    pub limit: Option<i64>,
    pub reservation: Option<i64>,
    /// Memory and swap together.
    pub swap: Option<i64>,
    pub kernel: Option<i64>,
    #[serde(rename = "kernelTCP")]
    pub kernel_tcp: Option<i64>,
    pub swappiness: Option<u64>,
    #[serde(rename = "disableOOMKiller")]
    pub disable_oom_killer: bool,
    /// Always so in cgroup v2.
    pub use_hierarchy: bool,
    /// Of updates only.
    pub check_before_update: bool,
}

/// Times in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Cpu {
    pub shares: Option<u64>,
    pub quota: Option<i64>,
    pub period: Option<u64>,
    pub burst: Option<u64>,
    pub idle: Option<i64>,
    pub cpus: String,
    pub mems: String,
    pub realtime_runtime: Option<i64>,
    pub realtime_period: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pids {
    /// 0 and less: no limit.
    pub limit: Option<i64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HugepageLimit {
    /// "2MB", "1GB"
    pub page_size: String,
    pub limit: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Seccomp {
    pub default_action: String,
    #[serde(default)]
    pub default_errno_ret: Option<u32>,
    #[serde(default)]
    pub architectures: Vec<String>,
    #[serde(default)]
    pub flags: Vec<String>,
    #[serde(default)]
    pub syscalls: Vec<SyscallRule>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SyscallRule {
    pub names: Vec<String>,
    pub action: String,
    #[serde(default)]
    pub errno_ret: Option<u32>,
    #[serde(default)]
    pub args: Vec<SyscallArg>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SyscallArg {
    pub index: u32,
    pub value: u64,
    #[serde(default)]
    pub value_two: u64,
    pub op: String,
}

/// Reads a container's spec.
///
/// # Errors
/// On anything the agent would not enforce, with its name.
pub fn container(json: &[u8]) -> Result<Spec, StepError> {
    let spec: Spec = parse(json)?;
    refuse_unenforced(&spec)?;
    Ok(spec)
}

/// Reads the process object of an exec.
///
/// # Errors
/// As [`container`].
pub fn process(json: &[u8]) -> Result<Process, StepError> {
    let process: Process = parse(json)?;
    refuse_bad_process(&process)?;
    Ok(process)
}

/// Reads the resources of an update.
///
/// # Errors
/// As [`container`].
pub fn resources(json: &[u8]) -> Result<Resources, StepError> {
    let resources: Resources = parse(json)?;
    refuse_unlimitable(&resources)?;
    Ok(resources)
}

fn parse<T: DeserializeOwned>(json: &[u8]) -> Result<T, StepError> {
    let read = || {
        let mut value: Value = serde_json::from_slice(json)?;
        prune(&mut value);
        serde_json::from_value(value)
    };
    read().map_err(|e: serde_json::Error| refuse("spec", "JSON", e))
}

/// Drops the members of objects that ask for nothing; the elements of arrays stay.
fn prune(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.values_mut().for_each(prune);
            members.retain(|_, v| !is_empty(v));
        }
        Value::Array(elements) => elements.iter_mut().for_each(prune),
        _ => {}
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        _ => false,
    }
}

fn refuse_unenforced(spec: &Spec) -> Result<(), StepError> {
    refuse_bad_process(&spec.process)?;
    refuse_bad_namespaces(&spec.linux)?;
    refuse_unlimitable(&spec.linux.resources)
}

fn refuse_unlimitable(resources: &Resources) -> Result<(), StepError> {
    let Resources { memory, cpu, .. } = resources;
    let limits = [
        ("linux.resources.memory.kernel", memory.kernel),
        ("linux.resources.memory.kernelTCP", memory.kernel_tcp),
        ("linux.resources.cpu.realtimeRuntime", cpu.realtime_runtime),
    ];
    for (field, value) in limits {
        refuse_if(value.is_some_and(|v| v > 0), field, value.unwrap_or_default())?;
    }
    refuse_if(
        memory.swappiness.is_some(),
        "linux.resources.memory.swappiness",
        memory.swappiness.unwrap_or_default(),
    )?;
    refuse_if(memory.disable_oom_killer, "linux.resources.memory.disableOOMKiller", true)
}

fn refuse_bad_process(process: &Process) -> Result<(), StepError> {
    refuse_if(process.args.is_empty(), "process.args", "an empty list")?;
    refuse_if(!process.cwd.starts_with('/'), "process.cwd", format!("{:?}", process.cwd))?;
    let mut limits = BTreeSet::new();
    for limit in &process.rlimits {
        let twice = !limits.insert(&limit.kind);
        refuse_if(twice, "process.rlimits", format!("{} twice", limit.kind))?;
    }
    let user = &process.user;
    for id in user.additional_gids.iter().chain([&user.uid, &user.gid]) {
        refuse_if(*id == u32::MAX, "process.user", id)?;
    }
    let strings = process.args.iter().chain(&process.env).chain([&process.cwd]);
    refuse_if(strings.into_iter().any(|s| s.contains('\0')), "process", "a NUL in args, env or cwd")
}

fn refuse_bad_namespaces(linux: &Linux) -> Result<(), StepError> {
    let mut seen = BTreeSet::new();
    for namespace in &linux.namespaces {
        let twice = !seen.insert(namespace.kind as u8);
        refuse_if(twice, "linux.namespaces", format!("{:?} twice", namespace.kind))?;
    }
    let own_mounts = linux.namespace(NamespaceKind::Mount).is_some_and(|n| n.path.is_none());
    refuse_if(!own_mounts, "linux.namespaces", "a container without a mount namespace of its own")?;
    let user = linux.namespace(NamespaceKind::User);
    let own_time = linux.has_own(NamespaceKind::Time);
    let offset = !linux.time_offsets.is_empty();
    refuse_if(
        offset && !own_time,
        "linux.timeOffsets",
        "an offset without a time namespace of the container's own",
    )?;
    let mapped = !linux.uid_mappings.is_empty() && !linux.gid_mappings.is_empty();
    let own_users = linux.has_own(NamespaceKind::User);
    refuse_if(own_users && !mapped, "linux.uidMappings", "a user namespace without mappings")?;
    refuse_if(
        user.is_none() && (!linux.uid_mappings.is_empty() || !linux.gid_mappings.is_empty()),
        "linux.uidMappings",
        "mappings without a user namespace",
    )
}

fn refuse_if(
    refused: bool,
    field: &'static str,
    value: impl std::fmt::Display,
) -> Result<(), StepError> {
    match refused {
        true => Err(refuse("spec", field, format_args!("{value} is not supported"))),
        false => Ok(()),
    }
}

impl Linux {
    pub fn namespace(&self, kind: NamespaceKind) -> Option<&Namespace> {
        self.namespaces.iter().find(|n| n.kind == kind)
    }

    /// The user namespace to be joined instead of making one.
    pub fn joined_users(&self) -> Option<&Path> {
        self.namespace(NamespaceKind::User)?.path.as_deref()
    }

    /// Whether its users are others than the guest's.
    pub fn has_users(&self) -> bool {
        self.namespace(NamespaceKind::User).is_some()
    }

    /// Whether the container is to have such a namespace for itself.
    pub fn has_own(&self, kind: NamespaceKind) -> bool {
        self.namespace(kind).is_some_and(|n| n.path.is_none())
    }
}

#[cfg(test)]
mod tests;
