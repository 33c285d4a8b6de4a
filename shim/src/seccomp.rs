//! Seccomp profiles: the default one, and a user's own.
//!
//! The default, `seccomp.json`, is what docker's allows with docker's default capabilities; a capability that was
//! added opens what it is for ([`OPENED`]).
//!
//! Everything not named fails with EPERM. Beside the plain list:
//! - `socket`, but not AF_VSOCK (40): those are the agent's.
//! - `personality` with the five values that change nothing dangerous: Linux, Linux with 32-bit addresses
//!   shown (8), the same two under `uname26` (0x20000), and "tell me" (0xffffffff).
//! - `clone` without any flag that makes a namespace (0x7e020000), of which `CLONE_NEWUSER` is the one that
//!   would open the rest of the kernel; `clone3`, whose flags a filter cannot see, fails with ENOSYS, on which
//!   every C library falls back to `clone`.
//! - `ptrace`, `process_vm_*`: as docker on kernels since 4.8, where seccomp is checked after ptrace.
//! - `chroot`, `mknod` and such: they need a capability that the container has or has not.
//! - One architecture: the guest kernel has neither the 32-bit nor the x32 entry.

use std::collections::{BTreeSet, HashSet};

use oci_spec::runtime::{Capability, LinuxSeccomp};
use serde_json::{Value, json};

const PROFILE: &str = include_str!("seccomp.json");

/// What a capability opens, as in docker's profile.
const OPENED: [(Capability, &[&str]); 14] = [
    (Capability::Bpf, &["bpf"]),
    (Capability::DacReadSearch, &["open_by_handle_at"]),
    (Capability::Perfmon, &["perf_event_open"]),
    (
        Capability::SysAdmin,
        &[
            "bpf",
            "clone",
            "clone3",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "perf_event_open",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "syslog",
            "umount",
            "umount2",
            "unshare",
        ],
    ),
    (Capability::SysBoot, &["reboot"]),
    (Capability::SysModule, &["delete_module", "finit_module", "init_module"]),
    (Capability::SysNice, &["get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"]),
    (Capability::SysPacct, &["acct"]),
    (Capability::SysPtrace, &["kcmp", "pidfd_getfd", "process_madvise"]),
    (Capability::SysRawio, &["ioperm", "iopl"]),
    (Capability::SysTime, &["clock_settime", "settimeofday", "stime"]),
    (Capability::SysTtyConfig, &["vhangup"]),
    (Capability::Syslog, &["syslog"]),
    (Capability::SysChroot, &["chroot"]),
];

/// The default profile of a container with these capabilities.
pub fn default_profile(
    capabilities: &HashSet<Capability>,
) -> Result<LinuxSeccomp, serde_json::Error> {
    let mut profile: Value = serde_json::from_str(PROFILE)?;
    let opened = OPENED.iter().filter(|(capability, _)| capabilities.contains(capability));
    let opened: BTreeSet<&str> = opened.flat_map(|(_, calls)| calls.iter().copied()).collect();
    if let Some(Value::Array(rules)) = profile.get_mut("syscalls") {
        // Conditions on a call that is now open are void.
        rules.retain(|rule| !names(rule).all(|name| opened.contains(name)));
        if !opened.is_empty() {
            rules.push(json!({ "names": opened, "action": "SCMP_ACT_ALLOW" }));
        }
    }
    serde_json::from_value(profile)
}

fn names(rule: &Value) -> impl Iterator<Item = &str> {
    rule["names"].as_array().into_iter().flatten().filter_map(Value::as_str)
}

/// A profile in OCI's form, or in docker's, whose rules may depend on the capabilities and on the architecture.
pub fn parse(
    mut profile: Value,
    capabilities: &HashSet<Capability>,
) -> Result<LinuxSeccomp, serde_json::Error> {
    if let Some(fields) = profile.as_object_mut() {
        // Docker's: the agent filters the one architecture that the guest's kernel runs.
        if fields.remove("archMap").is_some() {
            fields.insert("architectures".into(), json!(["SCMP_ARCH_X86_64"]));
        }
    }
    if let Some(Value::Array(rules)) = profile.get_mut("syscalls") {
        rules.retain(|rule| applies(rule, capabilities));
        for rule in rules.iter_mut().filter_map(Value::as_object_mut) {
            for key in ["includes", "excludes", "comment"] {
                rule.remove(key);
            }
            // Docker's older form.
            if let Some(name) = rule.remove("name") {
                rule.insert("names".into(), json!([name]));
            }
        }
    }
    serde_json::from_value(profile)
}

/// Whether docker's conditions on a rule hold: all of `includes` and none of `excludes`. A `minKernel` always does: the
/// guest's is newer than any in use.
fn applies(rule: &Value, capabilities: &HashSet<Capability>) -> bool {
    let has =
        |name: &str| capabilities.iter().any(|c| name.strip_prefix("CAP_") == Some(&c.to_string()));
    let list = |condition: &str, key: &str| -> Vec<String> {
        let entries = rule[condition][key].as_array().into_iter().flatten();
        entries.filter_map(Value::as_str).map(String::from).collect()
    };
    let native = |arches: &[String]| arches.iter().any(|arch| arch == "amd64");
    let arches = list("includes", "arches");
    list("includes", "caps").iter().all(|cap| has(cap))
        && (arches.is_empty() || native(&arches))
        && !list("excludes", "caps").iter().any(|cap| has(cap))
        && !native(&list("excludes", "arches"))
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxSeccompAction;

    use super::*;
    use crate::capabilities::{ALL, DEFAULT};

    /// Names that a profile allows without a condition.
    fn free(profile: &LinuxSeccomp) -> HashSet<String> {
        let rules = profile.syscalls().iter().flatten();
        let free = rules.filter(|r| r.args().is_none() && r.errno_ret().is_none());
        free.flat_map(|rule| rule.names().clone()).collect()
    }

    #[test]
    fn an_added_capability_opens_what_it_is_for() {
        let with = |more| default_profile(&DEFAULT.into_iter().chain(more).collect()).unwrap();
        let plain = free(&with(None));
        let admin = free(&with(Some(Capability::SysAdmin)));
        for name in ["mount", "clone", "clone3", "unshare"] {
            assert!(!plain.contains(name) && admin.contains(name), "{name}");
        }
        assert!(!admin.contains("reboot"));
        let all = default_profile(&ALL.into()).unwrap();
        assert!(free(&all).contains("reboot"));
    }

    #[test]
    fn dockers_conditions_are_decided_here() {
        let rule = |name: &str, conditions: Value| {
            let mut rule = json!({ "names": [name], "action": "SCMP_ACT_ALLOW", "comment": "" });
            rule.as_object_mut().unwrap().extend(conditions.as_object().unwrap().clone());
            rule
        };
        let profile = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "archMap": [{ "architecture": "SCMP_ARCH_X86_64", "subArchitectures": [] }],
            "syscalls": [
                rule("a", json!({})),
                rule("b", json!({ "includes": { "caps": ["CAP_CHOWN"], "minKernel": "4.8" } })),
                rule("c", json!({ "includes": { "caps": ["CAP_SYS_ADMIN"] } })),
                rule("d", json!({ "excludes": { "caps": ["CAP_SYS_ADMIN"] } })),
                rule("e", json!({ "excludes": { "caps": ["CAP_CHOWN"] } })),
                rule("f", json!({ "includes": { "arches": ["s390x"] } })),
                rule("g", json!({ "includes": { "arches": ["amd64", "x32"] } })),
                { "name": "h", "action": "SCMP_ACT_ALLOW", "args": null },
            ],
        });
        let profile = parse(profile, &DEFAULT.into()).unwrap();
        let expected = ["a", "b", "d", "g", "h"].map(String::from);
        assert_eq!(free(&profile), expected.into());
        assert_eq!(profile.architectures().as_ref().unwrap().len(), 1);
        assert!(parse(json!({ "syscalls": [] }), &HashSet::new()).is_err());
    }

    #[test]
    fn the_profile_parses_and_names_nothing_dangerous() {
        let profile = default_profile(&DEFAULT.into()).unwrap();
        assert_eq!(profile.default_action(), LinuxSeccompAction::ScmpActErrno);
        let rules = profile.syscalls().as_ref().unwrap();
        let free = rules.iter().filter(|r| r.args().is_none() && r.errno_ret().is_none());
        let allowed: Vec<&str> = free.flat_map(|r| r.names()).map(String::as_str).collect();
        for name in ["execve", "openat", "read", "write", "mmap", "exit_group", "futex", "wait4"] {
            assert!(allowed.contains(&name), "{name}");
        }
        for name in [
            "mount",
            "umount2",
            "pivot_root",
            "setns",
            "unshare",
            "bpf",
            "perf_event_open",
            "kexec_load",
            "init_module",
            "finit_module",
            "reboot",
            "swapon",
            "keyctl",
            "add_key",
            "request_key",
            "userfaultfd",
            "io_uring_setup",
            "open_by_handle_at",
            "clone3",
            "clone",
            "socket",
            "acct",
            "settimeofday",
            "clock_settime",
            "syslog",
            "quotactl",
            "iopl",
            "ioperm",
            "fsopen",
            "move_mount",
        ] {
            assert!(!allowed.contains(&name), "{name}");
        }
    }
}
