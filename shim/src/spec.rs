//! The one conversion of an OCI spec, as a caller has it, to the guest's. Pure.
//!
//! [`fields`] is the table: what only means something on the host is taken out, what nobody sees to is refused by the
//! field's name ([`decide`]), everything else passes through. Mounts, namespaces, devices and labels, which need a look
//! inside, follow here.

mod decide;
mod devices;
pub mod fields;
mod labels;
mod page;

use std::collections::{BTreeMap, HashMap};

use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Process, Root, Spec};
use serde_json::{Map, Value};

use crate::share;

pub use decide::{Terms, decide, decide_resources};
use decide::{is_nothing, keep_guests};
pub use devices::{Wanted, block_devices, left_out};
pub use page::page;

/// Why a spec cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error("{field}: {why}")]
    Unsupported { field: String, why: &'static str },
    #[error("{field}: {why}; or say `strict = false` in config.toml to go without")]
    Strict { field: String, why: &'static str },
    #[error(
        "{}: no field that is known; leave it out, or say `strict = false` in config.toml to have it ignored",
        field.escape_default()
    )]
    Unknown { field: String },
    #[error("{field}: {why}")]
    Invalid { field: String, why: &'static str },
    #[error("cannot be rewritten")]
    Json(#[from] serde_json::Error),
}

type Result<T> = std::result::Result<T, SpecError>;

const NO_HOST: &str = "namespaces of the host cannot be joined; leave out the path";

/// File systems a guest can mount for a container.
const FILE_SYSTEMS: &[&str] =
    &["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", SCRATCH];
/// The type of a mount that is a directory of the container's scratch disk, which no other runtime has.
pub const SCRATCH: &str = "scratch";
/// The type of a mount that binds a share of the host, by its number.
const SHARE: &str = "share";
/// Kinds of namespaces.
pub const NAMESPACES: [&str; 8] =
    ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"];

/// Hooks that are programs of the host; see [`crate::hooks`].
pub const HOST_HOOKS: [&str; 4] = ["prestart", "createRuntime", "poststart", "poststop"];

/// What a caller names of the host and the guest has an own one of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counterparts {
    /// By the source of a bind mount: what is bound in its place.
    pub binds: HashMap<String, String>,
    /// By the number of a mount in the spec: the number of the share that is bound.
    pub shares: HashMap<usize, u32>,
    /// By the number of a device in the spec: the slot of the disk that takes its place.
    pub disks: BTreeMap<usize, u8>,
    /// The process of the guest whose namespaces are joined where the caller names one by its path.
    pub namespaces_of: Option<u32>,
    /// The guest has the network of the sandbox: it is in the guest's own namespace.
    pub network: bool,
}

/// Turns a caller's spec into the guest's.
pub fn guest_spec(spec: &Spec, counterparts: &Counterparts) -> Result<Spec> {
    let mut json = serde_json::to_value(spec)?;
    if !json["ociVersion"].as_str().is_some_and(|version| version.starts_with("1.")) {
        return Err(invalid("ociVersion", "not 1.x"));
    }
    if is_nothing(&json["process"]) {
        return Err(invalid("process", "missing"));
    }
    check_process(&json["process"])?;
    labels::check_files(&json["linux"])?;
    if let Some(Value::Object(hooks)) = json.get_mut("hooks") {
        check_hooks(hooks)?;
    }
    let maps = guest_maps(spec, counterparts)?;
    keep_guests(&mut json, "")?;
    json["root"] = root(&json["root"]);
    for (i, mount) in entries(&mut json, "/mounts").iter_mut().enumerate() {
        check_mount(i, mount, counterparts)?;
        map_owners(mount, maps.get(&i))?;
    }
    for (i, namespace) in entries(&mut json, "/linux/namespaces").iter_mut().enumerate() {
        check_namespace(i, namespace, counterparts)?;
    }
    if counterparts.network
        && let Some(Value::Array(namespaces)) = json.pointer_mut("/linux/namespaces")
    {
        share_network(namespaces)?;
    }
    if let Some(linux) = json.get_mut("linux") {
        devices::replace(linux, &counterparts.disks)?;
    }
    Ok(serde_json::from_value(json)?)
}

/// Turns a caller's process, for an exec, into the guest's.
pub fn guest_process(process: &Process) -> Result<Process> {
    let mut json = serde_json::to_value(process)?;
    check_process(&json)?;
    keep_guests(&mut json, "process")?;
    Ok(serde_json::from_value(json)?)
}

/// Turns the JSON of resources that a running container is to have into the guest's. The devices it may use were
/// decided when it was created.
pub fn guest_resources(resources: &[u8]) -> Result<Vec<u8>> {
    let resources: Value = serde_json::from_slice(resources)?;
    let mut json = serde_json::json!({ "linux": { "resources": resources } });
    keep_guests(&mut json, "")?;
    let mut resources = match json["linux"]["resources"].take() {
        Value::Object(fields) => fields,
        // Nothing that the guest sees to.
        _ => serde_json::Map::new(),
    };
    resources.remove("devices");
    Ok(serde_json::to_vec(&resources)?)
}

/// Whether a container writes to a scratch disk: its root, or volumes that lie there.
pub fn needs_scratch(spec: &Spec) -> bool {
    let is_read_only = spec.root().as_ref().and_then(Root::readonly) == Some(true);
    let mut mounts = spec.mounts().iter().flatten();
    !is_read_only || mounts.any(|mount| mount.typ().as_deref() == Some(SCRATCH))
}

/// Whether a container has a user namespace of its own.
pub fn has_own_users(spec: &Spec) -> bool {
    let namespaces = spec.linux().iter().filter_map(|linux| linux.namespaces().as_ref());
    namespaces.flatten().any(|n| n.typ() == LinuxNamespaceType::User && n.path().is_none())
}

/// The path is the caller's; the guest's root file system comes from a disk.
fn root(root: &Value) -> Value {
    serde_json::json!({ "path": "rootfs", "readonly": root["readonly"] == true })
}

fn check_process(process: &Value) -> Result<()> {
    labels::check_process(process)?;
    if process["args"].as_array().is_none_or(Vec::is_empty) {
        return Err(invalid("process.args", "empty"));
    }
    if !process["cwd"].as_str().is_some_and(|cwd| cwd.starts_with('/')) {
        return Err(invalid("process.cwd", "not an absolute path"));
    }
    Ok(())
}

/// Whoever runs the host's has taken them out.
fn check_hooks(hooks: &mut Map<String, Value>) -> Result<()> {
    for name in HOST_HOOKS {
        if hooks.remove(name).is_some_and(|list| !is_nothing(&list)) {
            let why = "nobody runs the host's hooks for this container; leave it out";
            return Err(unsupported(format!("hooks.{name}"), why));
        }
    }
    Ok(())
}

/// Of users and of groups.
type Maps = (Vec<LinuxIdMapping>, Vec<LinuxIdMapping>);

/// Those of mounts that the guest maps, by their numbers: the host does that of shares.
fn guest_maps(spec: &Spec, counterparts: &Counterparts) -> Result<HashMap<usize, Maps>> {
    let mounts = spec.mounts().iter().flatten().enumerate();
    let mapped =
        mounts.filter(|(i, mount)| share::is_mapped(mount) && !counterparts.shares.contains_key(i));
    let maps = mapped.map(|(i, mount)| {
        let at = mount.destination().to_string_lossy().escape_default().to_string();
        let refused = |why| unsupported(format!("mounts[{i}] ({at}).uidMappings"), why);
        if mount.typ().as_deref() != Some("tmpfs") || share::is_bind(mount) {
            return Err(refused(
                "only a tmpfs, and what is shared with the host, can be mapped; leave it out",
            ));
        }
        Ok((i, share::mappings(spec, mount).map_err(refused)?))
    });
    maps.collect()
}

/// What the guest maps has mappings of its own there, and nothing else any.
fn map_owners(mount: &mut Value, maps: Option<&Maps>) -> Result<()> {
    if let Some(Value::Array(options)) = mount.get_mut("options") {
        options.retain(|option| !option.as_str().is_some_and(|o| share::MAPPED.contains(&o)));
    }
    let Value::Object(fields) = mount else { return Ok(()) };
    for name in ["uidMappings", "gidMappings"] {
        fields.remove(name);
    }
    if let Some((users, groups)) = maps {
        fields.insert("uidMappings".into(), serde_json::to_value(users)?);
        fields.insert("gidMappings".into(), serde_json::to_value(groups)?);
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
        if let Some(number) = counterparts.shares.get(&i) {
            mount["source"] = number.to_string().into();
            mount["type"] = SHARE.into();
            return Ok(());
        }
        let source = mount["source"].as_str().unwrap_or_default();
        let Some(counterpart) = counterparts.binds.get(source) else {
            return Err(unsupported(field("type"), "nothing of the host is shared with it"));
        };
        mount["source"] = counterpart.as_str().into();
        mount["type"] = "bind".into();
        return Ok(());
    }
    if !FILE_SYSTEMS.contains(&kind) {
        return Err(unsupported(field("type"), "not a file system a guest can mount"));
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
    if is_nothing(&namespace["path"]) {
        if let Value::Object(fields) = namespace {
            fields.remove("path");
        }
        return Ok(());
    }
    let Some(pid) = counterparts.namespaces_of else {
        return Err(unsupported(field("path"), NO_HOST));
    };
    let name = if kind == "network" { "net" } else { &kind };
    namespace["path"] = format!("/proc/{pid}/ns/{name}").into();
    Ok(())
}

/// A network namespace that the container would have for itself is the guest's.
fn share_network(namespaces: &mut Vec<Value>) -> Result<()> {
    let own = |kind: &str| {
        let kind = Value::from(kind);
        move |namespace: &Value| namespace["type"] == kind && is_nothing(&namespace["path"])
    };
    if namespaces.iter().any(own("network")) && namespaces.iter().any(own("user")) {
        let why = "users of its own, beside a pod's network that is not theirs: give them to the pod, or leave them out";
        return Err(unsupported("linux.namespaces (user)", why));
    }
    namespaces.retain(|namespace| !own("network")(namespace));
    Ok(())
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
mod schema;
#[cfg(test)]
mod tests;
