//! What is enforced of the OCI runtime specification, for programs that choose a runtime by it: the specification's
//! features.md, in the shape of `runc features`.

use ampoule_agent_api::MOUNT_OPTIONS;
use serde_json::{Value, json};

use crate::{
    capabilities::ALL,
    config::ANNOTATION_PREFIX,
    share::MAPPED,
    spec::{
        NAMESPACES,
        fields::{By, FIELDS},
    },
};

/// As the guest's libseccomp and kernel have them; nobody listens for SCMP_ACT_NOTIFY.
const ACTIONS: [&str; 8] = [
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_TRAP",
];
const OPERATORS: [&str; 7] = [
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_LE",
    "SCMP_CMP_LT",
    "SCMP_CMP_MASKED_EQ",
    "SCMP_CMP_NE",
];
const FLAGS: [&str; 4] = [
    "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_TSYNC",
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
];

/// The features, as JSON.
pub fn features() -> Value {
    let mut capabilities: Vec<String> = ALL.iter().map(|c| format!("CAP_{c}")).collect();
    capabilities.sort_unstable();
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "hooks": hooks(),
        "mountOptions": mount_options(),
        "linux": {
            "namespaces": NAMESPACES,
            "capabilities": capabilities,
            "cgroup": {
                "v1": false,
                "v2": true,
                "systemd": true,
                "systemdUser": false,
                "rdma": is_enforced("linux.resources.rdma"),
            },
            "seccomp": {
                "enabled": true,
                "actions": ACTIONS,
                "operators": OPERATORS,
                "archs": ["SCMP_ARCH_X86_64"],
                "knownFlags": FLAGS,
                "supportedFlags": FLAGS,
            },
            // Profiles and labels of one's own are refused.
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": is_enforced("linux.intelRdt") },
            "mountExtensions": { "idmap": { "enabled": is_enforced("mounts[].uidMappings") } },
            "netDevices": { "enabled": is_enforced("linux.netDevices") },
        },
        "annotations": { "io.ampoule.version": env!("CARGO_PKG_VERSION") },
        "potentiallyUnsafeConfigAnnotations": [ANNOTATION_PREFIX],
    })
}

fn is_enforced(path: &str) -> bool {
    let row = FIELDS.iter().find(|field| field.path == path);
    row.is_some_and(|row| !matches!(row.by, By::Refused | By::Strict))
}

/// The guest's, and those of the host.
fn mount_options() -> Vec<&'static str> {
    let mut all = [MOUNT_OPTIONS, &MAPPED].concat();
    all.sort_unstable();
    all
}

/// Those that are run.
fn hooks() -> Vec<&'static str> {
    let paths = FIELDS.iter().map(|field| field.path).filter(|path| is_enforced(path));
    paths.filter_map(|path| path.strip_prefix("hooks.")?.strip_suffix("[].path")).collect()
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::Features;

    use super::*;

    #[test]
    fn the_json_is_the_specifications() {
        let features = features();
        let known: Features = serde_json::from_value(features.clone()).unwrap();
        let linux = known.linux().as_ref().unwrap();
        assert_eq!(linux.namespaces().as_ref().unwrap().len(), NAMESPACES.len());
        assert_eq!(linux.seccomp().as_ref().unwrap().actions().as_ref().unwrap().len(), 8);
        assert!(linux.capabilities().as_ref().unwrap().contains(&"CAP_SYS_ADMIN".to_string()));
        let hooks = ["prestart", "createRuntime", "startContainer", "poststart", "poststop"];
        assert_eq!(features["hooks"], json!(hooks));
        assert_eq!(linux.cgroup().as_ref().unwrap().rdma(), &Some(false));
        let back = serde_json::to_value(&known).unwrap();
        for key in features.as_object().unwrap().keys() {
            assert!(back.get(key).is_some(), "{key} is no feature");
        }
        for key in features["linux"].as_object().unwrap().keys() {
            assert!(back["linux"].get(key).is_some(), "linux.{key} is no feature");
        }
    }
}
