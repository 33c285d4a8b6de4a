//! A container's bundle as containerd makes it: `config.json`, and what it says about the sandbox around it.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::anchor::HostNetwork;
use crate::{
    bootstrap::group::GROUP,
    rootfs::Scratch,
    spec::{SpecError, Terms, decide, needs_scratch},
};

/// Annotations of containerd's CRI plugin and of CRI-O that say what kind of container it is.
const SANDBOX: [&str; 2] =
    ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];
/// More than this is no spec.
const MAX_SIZE: u64 = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("{}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// With the field, if one alone is at fault.
    #[error("{}{field}", path.display())]
    Parse { path: PathBuf, field: String, source: serde_json::Error },
}

/// What is read from a bundle.
#[derive(Debug)]
pub struct Bundle {
    pub path: PathBuf,
    pub spec: Spec,
    /// As it was written: the type does not know every field.
    json: Value,
}

impl Bundle {
    pub fn read(path: &Path) -> Result<Self, BundleError> {
        let config = path.join("config.json");
        let mut bytes = Vec::new();
        File::open(&config)
            .and_then(|file| file.take(MAX_SIZE).read_to_end(&mut bytes))
            .map_err(|source| BundleError::Read { path: config.clone(), source })?;
        let broken = |field, source| BundleError::Parse { path: config.clone(), field, source };
        let json = serde_json::from_slice(&bytes).map_err(|e| broken(String::new(), e))?;
        let spec = Spec::deserialize(&json).map_err(|e| broken(at_fault(&json), e))?;
        Ok(Self { path: path.into(), spec, json })
    }

    /// One that nobody has written a specification for.
    pub fn without_config(path: &Path) -> Self {
        let mut spec = Spec::default();
        spec.set_process(None).set_linux(None).set_hostname(None);
        Self { path: path.into(), spec, json: Value::Null }
    }

    /// Refuses a spec for what nobody sees to; unless strict, goes without what protects nobody and returns its names.
    pub fn decide(&mut self, terms: Terms) -> Result<Vec<String>, SpecError> {
        let ignored = decide(&mut self.json, "", terms)?;
        self.spec = Spec::deserialize(&self.json)?;
        Ok(ignored)
    }

    pub fn terminal(&self) -> bool {
        self.spec.process().as_ref().and_then(oci_spec::runtime::Process::terminal) == Some(true)
    }

    /// The root file system where containerd mounted, or would mount it.
    pub fn root(&self) -> PathBuf {
        let root = self.spec.root().as_ref().map(|root| root.path().as_path());
        self.path.join(root.unwrap_or(Path::new("rootfs")))
    }

    /// Whether other containers may come to share this one's sandbox.
    pub fn is_grouped(&self) -> bool {
        let annotations = self.spec.annotations().iter().flatten();
        annotations.into_iter().any(|(key, _)| GROUP.contains(&key.as_str()))
    }

    /// The disk for what it writes, of so many bytes, if it takes one. The containers of Kubernetes are never started again.
    pub fn scratch(&self, size: u64) -> Option<Scratch> {
        needs_scratch(&self.spec).then(|| Scratch { size, lasts: !self.is_grouped() })
    }

    /// Whether it is the container that CRI makes for a pod before any of its own.
    pub fn stands_for_pod(&self) -> bool {
        let annotations = self.spec.annotations().iter().flatten();
        annotations.into_iter().any(|(key, value)| SANDBOX.contains(&&**key) && value == "sandbox")
    }

    pub fn oom_score_adj(&self) -> i32 {
        self.spec.process().as_ref().and_then(|process| process.oom_score_adj()).unwrap_or(0)
    }

    /// Where this container's network is on the host.
    pub fn network(&self) -> HostNetwork {
        let namespaces = self.spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
        let network = namespaces
            .into_iter()
            .flatten()
            .find(|namespace| namespace.typ() == LinuxNamespaceType::Network);
        match network.map(|namespace| namespace.path()) {
            None => HostNetwork::Host,
            // Docker says so before it has one.
            Some(Some(path)) if path != Path::new("/proc/0/ns/net") => {
                HostNetwork::Path(path.clone())
            }
            Some(_) => HostNetwork::New,
        }
    }

    /// A sandbox's first container has the sandbox's network for its own in the guest: the path leads to the
    /// host's. So does that of a pod's users, whom containerd makes together with the network.
    pub fn forget_paths(&mut self) {
        let stands_for_pod = self.stands_for_pod();
        let Some(linux) = self.spec.linux_mut() else { return };
        let mapped = linux.uid_mappings().is_some() && linux.gid_mappings().is_some();
        let namespaces = linux.namespaces_mut().iter_mut().flatten();
        for namespace in namespaces.filter(|namespace| match namespace.typ() {
            LinuxNamespaceType::Network => true,
            LinuxNamespaceType::User => stands_for_pod && mapped,
            _ => false,
        }) {
            namespace.set_path(None);
        }
    }
}

/// `: FIELD` of what is no specification: its type's errors tell the value alone.
fn at_fault(json: &Value) -> String {
    let fails = |name: &str, value: Value| {
        Spec::deserialize(json!({ "ociVersion": "1.2.0", name: value })).is_err()
    };
    let fields = |value: &Value| value.as_object().cloned().unwrap_or_default();
    let Some((name, value)) =
        fields(json).into_iter().find(|(name, value)| fails(name, value.clone()))
    else {
        return String::new();
    };
    // In the other ones fields are missing without their neighbours.
    let below = if name == "linux" { fields(&value) } else { Map::new() };
    let below = below.into_iter().find(|(below, value)| fails(&name, json!({ below: value })));
    below.map_or(format!(": {name}"), |(below, _)| format!(": {name}.{below}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::has_own_users;

    fn bundle(namespaces: serde_json::Value) -> Bundle {
        let folder = tempfile::tempdir().unwrap();
        let spec = json!({
            "ociVersion": "1.1.0",
            "process": { "args": ["sh"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
            "root": { "path": "rootfs" },
            "linux": { "namespaces": namespaces },
        });
        std::fs::write(folder.path().join("config.json"), spec.to_string()).unwrap();
        Bundle::read(folder.path()).unwrap()
    }

    #[test]
    fn the_network_is_a_path_a_new_one_or_the_hosts() {
        for (namespaces, network) in [
            (json!([{ "type": "pid" }]), HostNetwork::Host),
            (json!([{ "type": "network" }]), HostNetwork::New),
            (json!([{ "type": "network", "path": "/proc/0/ns/net" }]), HostNetwork::New),
            (json!([{ "type": "network", "path": "/n" }]), HostNetwork::Path("/n".into())),
        ] {
            let mut bundle = bundle(namespaces);
            assert_eq!(bundle.network(), network);
            bundle.forget_paths();
            assert!(!matches!(bundle.network(), HostNetwork::Path(_)));
        }
    }

    #[test]
    fn a_pods_users_are_its_own_in_the_guest_where_their_maps_are_said() {
        let users = |bundle: &mut Bundle, pod: bool, mapped: bool| {
            let kind = if pod { "sandbox" } else { "container" };
            let annotations = [(SANDBOX[0].to_string(), kind.to_string())].into();
            bundle.spec.set_annotations(Some(annotations));
            let mapping = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
            let mapping: Option<Vec<_>> = mapped.then(|| serde_json::from_value(mapping).unwrap());
            let linux = bundle.spec.linux_mut().as_mut().unwrap();
            linux.set_uid_mappings(mapping.clone()).set_gid_mappings(mapping);
            bundle.forget_paths();
            has_own_users(&bundle.spec)
        };
        let bundle = || bundle(json!([{ "type": "user", "path": "/run/pinned" }]));
        assert!(users(&mut bundle(), true, true));
        assert!(!users(&mut bundle(), true, false) && !users(&mut bundle(), false, true));
    }

    #[test]
    fn fields_that_are_not_known_are_seen() {
        let newer = || bundle(json!([{ "type": "pid", "new": 1 }]));
        let field = "linux.namespaces[0].new";
        let strict = |strict| Terms { strict, cgroup: false };
        assert!(newer().decide(strict(true)).unwrap_err().to_string().starts_with(field));
        let mut lenient = newer();
        assert_eq!(lenient.decide(strict(false)).unwrap(), [field]);
        assert_eq!(lenient.decide(strict(true)).unwrap(), [""; 0]);
    }

    #[test]
    fn what_is_missing_or_no_spec_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let missing = Bundle::read(folder.path()).unwrap_err();
        assert!(missing.to_string().ends_with("/config.json"), "{missing}");
        std::fs::write(folder.path().join("config.json"), "{").unwrap();
        assert!(matches!(Bundle::read(folder.path()), Err(BundleError::Parse { .. })));
        for (field, value, place) in [
            ("linux", json!({ "seccomp": { "defaultAction": "SCMP_ACT_NO" } }), ": linux.seccomp"),
            ("process", json!({ "cwd": 1 }), ": process"),
            ("hostname", json!("x"), ""),
        ] {
            assert_eq!(at_fault(&json!({ "ociVersion": "1.2.0", field: value })), place);
        }
    }
}
