//! The capabilities a container has by default: docker's fourteen.

use oci_spec::runtime::{Capability, LinuxCapabilities};

const DEFAULT: [Capability; 14] = [
    // Own, chmod and read files of other users of the container.
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    // Make device nodes; which of them open is the device filter's business.
    Capability::Mknod,
    // ping, and ports below 1024.
    Capability::NetRaw,
    Capability::NetBindService,
    // Become another user, as init scripts and sshd do.
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

/// Bounding, effective and permitted alike; nothing is inheritable or ambient (docker, since CVE-2022-24769).
pub fn default_capabilities() -> LinuxCapabilities {
    let mut capabilities = LinuxCapabilities::default();
    capabilities
        .set_bounding(Some(DEFAULT.into_iter().collect()))
        .set_effective(Some(DEFAULT.into_iter().collect()))
        .set_permitted(Some(DEFAULT.into_iter().collect()))
        .set_inheritable(None)
        .set_ambient(None);
    capabilities
}
