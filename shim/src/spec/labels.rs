//! Labels of the host's security modules. A guest has none of these modules; what container engines' default profiles
//! and types protect, the host and other containers, is outside of the VM. Any other is somebody's own rule about
//! what this program may do, and refused: nobody would enforce it.

use serde_json::Value;

use super::{Result, unsupported};

/// Docker's, containerd's, CRI-O's, LXC's; and none.
const PROFILES: [&str; 6] = [
    "",
    "unconfined",
    "docker-default",
    "cri-containerd.apparmor.d",
    "crio-default",
    "lxc-container-default",
];
/// Podman's, with a version after it.
const PODMAN: &str = "containers-default-";
/// Of container-selinux, for processes.
const PROCESS_TYPES: [&str; 5] =
    ["container_t", "container_init_t", "container_kvm_t", "spc_t", "svirt_lxc_net_t"];
/// The same for files.
const FILE_TYPES: [&str; 3] = ["container_file_t", "container_ro_file_t", "svirt_sandbox_file_t"];

const NO_APPARMOR: &str =
    "the guest has no AppArmor; use the engine's default profile, or `unconfined`";
const NO_SELINUX: &str = "the guest has no SELinux; use the type container_t, or no label";
const NO_FILE_LABELS: &str = "the guest has no SELinux; use the type container_file_t, or no label";

/// Of a process.
pub(super) fn check_process(process: &Value) -> Result<()> {
    let profile = process["apparmorProfile"].as_str().unwrap_or_default();
    if !PROFILES.contains(&profile) && !profile.starts_with(PODMAN) {
        return Err(unsupported("process.apparmorProfile", NO_APPARMOR));
    }
    match is_of(&process["selinuxLabel"], &PROCESS_TYPES) {
        true => Ok(()),
        false => Err(unsupported("process.selinuxLabel", NO_SELINUX)),
    }
}

/// Of a container's files.
pub(super) fn check_files(linux: &Value) -> Result<()> {
    match is_of(&linux["mountLabel"], &FILE_TYPES) {
        true => Ok(()),
        false => Err(unsupported("linux.mountLabel", NO_FILE_LABELS)),
    }
}

/// A label is `USER:ROLE:TYPE` and perhaps `:LEVEL`.
fn is_of(label: &Value, types: &[&str]) -> bool {
    match label.as_str().unwrap_or_default() {
        "" => true,
        label => label.split(':').nth(2).is_some_and(|kind| types.contains(&kind)),
    }
}
