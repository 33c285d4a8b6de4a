//! The one conversion of an OCI spec, as a caller has it, to the guest's. Pure.
//!
//! What only means something on the host is dropped, what the guest cannot do (yet) is refused by the field's
//! name, everything else passes through. [`FIELDS`] is the table; mounts, namespaces and devices, which need a
//! look inside, follow below it.

use std::collections::HashMap;

use oci_spec::runtime::{Process, Spec};
use serde_json::Value;

/// Why a spec cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error("{field}: {why}")]
    Unsupported { field: String, why: &'static str },
    #[error("{field}: {why}")]
    Invalid { field: String, why: &'static str },
    #[error("cannot be rewritten")]
    Json(#[from] serde_json::Error),
}

type Result<T> = std::result::Result<T, SpecError>;

/// What happens to a field.
#[derive(Clone, Copy)]
enum Rule {
    /// It means something on the host only, or the guest has its own.
    Drop,
    /// Set to anything but nothing, it is refused for this reason.
    Refuse(&'static str),
}
use Rule::{Drop, Refuse};

const NO_HOST: &str = "the host's cannot be reached from a sandbox";
const NOT_YET: &str = "not supported yet";
const OTHER_SYSTEM: &str = "for another operating system";

/// Fields that do not pass as they are.
const FIELDS: &[(&str, Rule)] = &[
    ("annotations", Drop),
    ("hooks/prestart", Refuse(NOT_YET)),
    ("hooks/createRuntime", Refuse(NOT_YET)),
    ("hooks/createContainer", Refuse(NOT_YET)),
    ("hooks/startContainer", Refuse(NOT_YET)),
    ("hooks/poststart", Refuse(NOT_YET)),
    ("hooks/poststop", Refuse(NOT_YET)),
    ("hooks", Drop),
    ("solaris", Refuse(OTHER_SYSTEM)),
    ("windows", Refuse(OTHER_SYSTEM)),
    ("zos", Refuse(OTHER_SYSTEM)),
    ("vm", Refuse("the VM is ampoule's to choose")),
    ("uidMappings", Drop),
    ("gidMappings", Drop),
    ("linux/netDevices", Refuse(NO_HOST)),
    ("linux/intelRdt", Refuse(NO_HOST)),
    ("linux/memoryPolicy", Refuse(NOT_YET)),
    ("linux/personality", Refuse(NOT_YET)),
    ("linux/timeOffsets", Refuse(NOT_YET)),
    // The agent names cgroups by the container's id; the host's path is the sandbox's own business.
    ("linux/cgroupsPath", Drop),
    ("linux/mountLabel", Drop),
    ("linux/seccomp/listenerPath", Refuse(NO_HOST)),
    ("linux/seccomp/listenerMetadata", Drop),
    ("linux/resources/blockIO/weight", Refuse(NOT_YET)),
    ("linux/resources/blockIO/leafWeight", Refuse(NOT_YET)),
    ("linux/resources/blockIO/weightDevice", Refuse(NO_HOST)),
    ("linux/resources/blockIO/throttleReadBpsDevice", Refuse(NO_HOST)),
    ("linux/resources/blockIO/throttleWriteBpsDevice", Refuse(NO_HOST)),
    ("linux/resources/blockIO/throttleReadIOPSDevice", Refuse(NO_HOST)),
    ("linux/resources/blockIO/throttleWriteIOPSDevice", Refuse(NO_HOST)),
    ("linux/resources/blockIO", Drop),
    ("linux/resources/network/classID", Refuse(NO_HOST)),
    ("linux/resources/network/priorities", Refuse(NO_HOST)),
    ("linux/resources/network", Drop),
    ("linux/resources/rdma", Refuse(NO_HOST)),
    ("linux/resources/cpu/cpus", Refuse("CPUs of the host cannot be chosen yet")),
    ("linux/resources/cpu/mems", Refuse("memory nodes of the host cannot be chosen yet")),
    ("linux/resources/cpu/realtimeRuntime", Refuse("not in cgroup v2")),
    ("linux/resources/cpu/realtimePeriod", Refuse("not in cgroup v2")),
    // Obsolete since Linux 5.4, or never in cgroup v2; docker sends some of them always.
    ("linux/resources/memory/kernel", Drop),
    ("linux/resources/memory/kernelTCP", Drop),
    ("linux/resources/memory/swappiness", Drop),
    ("linux/resources/memory/useHierarchy", Drop),
    ("linux/resources/memory/checkBeforeUpdate", Drop),
    ("linux/resources/memory/disableOOMKiller", Refuse("not in cgroup v2")),
];

/// Likewise of a process.
const PROCESS_FIELDS: &[(&str, Rule)] = &[
    ("commandLine", Refuse(OTHER_SYSTEM)),
    // The guest kernel has no other security module than the VM around it.
    ("apparmorProfile", Drop),
    ("selinuxLabel", Drop),
    ("ioPriority", Refuse(NOT_YET)),
    ("scheduler", Refuse(NOT_YET)),
    ("execCPUAffinity", Refuse(NOT_YET)),
];

/// File systems a guest can mount for a container.
const FILE_SYSTEMS: &[&str] =
    &["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "ramfs"];
/// Device nodes every container gets anyway (OCI runtime-spec, config-linux.md, default devices).
const DEFAULT_DEVICES: &[&str] = &[
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/console",
    "/dev/ptmx",
];

/// What a caller names of the host and the guest has an own one of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counterparts {
    /// By the source of a bind mount: what is bound in its place.
    pub binds: HashMap<String, String>,
    /// The process of the guest whose namespaces are joined where the caller names one by its path.
    pub namespaces_of: Option<u32>,
}

/// Turns a caller's spec into the guest's.
pub fn guest_spec(spec: &Spec, counterparts: &Counterparts) -> Result<Spec> {
    let mut json = serde_json::to_value(spec)?;
    apply(FIELDS, "", &mut json)?;
    json["root"] = root(&json["root"]);
    match json.get_mut("process") {
        Some(process) => check_process(process)?,
        None => return Err(invalid("process", "missing")),
    }
    for (i, mount) in entries(&mut json, "/mounts").iter_mut().enumerate() {
        check_mount(i, mount, counterparts)?;
    }
    for (i, namespace) in entries(&mut json, "/linux/namespaces").iter_mut().enumerate() {
        check_namespace(i, namespace, counterparts)?;
    }
    check_devices(entries(&mut json, "/linux/devices"))?;
    if let Some(Value::Object(linux)) = json.get_mut("linux") {
        check_propagation(linux.remove("rootfsPropagation"))?;
        linux.remove("devices");
    }
    Ok(serde_json::from_value(json)?)
}

/// Turns a caller's process, for an exec, into the guest's.
pub fn guest_process(process: &Process) -> Result<Process> {
    let mut json = serde_json::to_value(process)?;
    check_process(&mut json)?;
    Ok(serde_json::from_value(json)?)
}

/// Turns the JSON of resources that a running container is to have into the guest's. The devices it may use were
/// decided when it was created.
pub fn guest_resources(resources: &[u8]) -> Result<Vec<u8>> {
    let resources: Value = serde_json::from_slice(resources)?;
    let mut json = serde_json::json!({ "linux": { "resources": resources } });
    apply(FIELDS, "", &mut json)?;
    let mut resources = json["linux"]["resources"].take();
    if let Value::Object(fields) = &mut resources {
        fields.remove("devices");
    }
    Ok(serde_json::to_vec(&resources)?)
}

fn apply(rules: &[(&str, Rule)], prefix: &str, json: &mut Value) -> Result<()> {
    for (path, rule) in rules {
        let (parent, name) = path.rsplit_once('/').map_or(("", *path), |(p, n)| (p, n));
        let pointer = if parent.is_empty() { String::new() } else { format!("/{parent}") };
        let Some(Value::Object(fields)) = json.pointer_mut(&pointer) else { continue };
        match (fields.remove(name), rule) {
            (Some(value), Refuse(why)) if !is_nothing(&value) => {
                return Err(unsupported(format!("{prefix}{}", path.replace('/', ".")), why));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Null, zero, false or empty: a caller that spells out its defaults asks for nothing.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.values().all(is_nothing),
        Value::Bool(true) => false,
    }
}

/// The path is the caller's; the guest's root file system comes from a disk.
fn root(root: &Value) -> Value {
    serde_json::json!({ "path": "rootfs", "readonly": root["readonly"] == true })
}

fn check_process(process: &mut Value) -> Result<()> {
    apply(PROCESS_FIELDS, "process.", process)?;
    if entries(process, "/args").is_empty() {
        return Err(invalid("process.args", "empty"));
    }
    if !process["cwd"].as_str().is_some_and(|cwd| cwd.starts_with('/')) {
        return Err(invalid("process.cwd", "not an absolute path"));
    }
    Ok(())
}

fn check_mount(i: usize, mount: &mut Value, counterparts: &Counterparts) -> Result<()> {
    let destination = mount["destination"].as_str().unwrap_or_default().to_string();
    let field = |name: &str| format!("mounts[{i}] ({}).{name}", destination.escape_default());
    if !destination.starts_with('/') || destination.split('/').any(|part| part == "..") {
        return Err(invalid(field("destination"), "not an absolute path without '..'"));
    }
    let options = mount["options"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let kind = mount["type"].as_str().unwrap_or_default();
    if kind == "bind" || options.into_iter().any(|o| o == "bind" || o == "rbind") {
        let source = mount["source"].as_str().unwrap_or_default();
        let Some(counterpart) = counterparts.binds.get(source) else {
            return Err(unsupported(field("type"), "files of the host cannot be mounted yet"));
        };
        mount["source"] = counterpart.as_str().into();
        mount["type"] = "bind".into();
        return Ok(());
    }
    if !FILE_SYSTEMS.contains(&kind) {
        return Err(unsupported(field("type"), "not a file system a guest can mount"));
    }
    for mapping in ["uidMappings", "gidMappings"] {
        if !is_nothing(&mount[mapping]) {
            return Err(unsupported(field(mapping), NOT_YET));
        }
    }
    if kind == "cgroup" {
        // A guest has cgroup v2 alone.
        mount["type"] = "cgroup2".into();
    }
    Ok(())
}

fn check_namespace(i: usize, namespace: &mut Value, counterparts: &Counterparts) -> Result<()> {
    let kind = namespace["type"].as_str().unwrap_or_default().to_string();
    let field = |name: &str| format!("linux.namespaces[{i}] ({kind}).{name}");
    match kind.as_str() {
        "time" => return Err(unsupported(field("type"), NOT_YET)),
        _ if is_nothing(&namespace["path"]) => {
            if let Value::Object(fields) = namespace {
                fields.remove("path");
            }
            return Ok(());
        }
        _ => {}
    }
    let Some(pid) = counterparts.namespaces_of else {
        return Err(unsupported(field("path"), "namespaces of the host cannot be joined"));
    };
    let name = if kind == "network" { "net" } else { &kind };
    namespace["path"] = format!("/proc/{pid}/ns/{name}").into();
    Ok(())
}

/// The usual nodes are there anyway; others would be devices of the host.
fn check_devices(devices: &[Value]) -> Result<()> {
    for (i, device) in devices.iter().enumerate() {
        let path = device["path"].as_str().unwrap_or_default();
        if !DEFAULT_DEVICES.contains(&path) {
            let field = format!("linux.devices[{i}] ({})", path.escape_default());
            return Err(unsupported(field, "devices of the host cannot be passed in"));
        }
    }
    Ok(())
}

fn check_propagation(propagation: Option<Value>) -> Result<()> {
    match propagation.as_ref().and_then(Value::as_str).unwrap_or_default() {
        "" | "private" | "rprivate" | "slave" | "rslave" => Ok(()),
        _ => Err(unsupported("linux.rootfsPropagation", NO_HOST)),
    }
}

/// The entries of the list at `pointer`; none if there is no such list.
fn entries<'a>(json: &'a mut Value, pointer: &str) -> &'a mut [Value] {
    match json.pointer_mut(pointer) {
        Some(Value::Array(entries)) => entries,
        _ => &mut [],
    }
}

fn unsupported(field: impl Into<String>, why: &'static str) -> SpecError {
    SpecError::Unsupported { field: field.into(), why }
}

fn invalid(field: impl Into<String>, why: &'static str) -> SpecError {
    SpecError::Invalid { field: field.into(), why }
}

#[cfg(test)]
mod tests;
