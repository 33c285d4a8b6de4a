//! The default seccomp profile, `seccomp.json`: what docker's allows with docker's default capabilities.
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

use oci_spec::runtime::LinuxSeccomp;

const PROFILE: &str = include_str!("seccomp.json");

/// Parses the profile.
pub fn default_profile() -> Result<LinuxSeccomp, serde_json::Error> {
    serde_json::from_str(PROFILE)
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxSeccompAction;

    use super::*;

    #[test]
    fn the_profile_parses_and_names_nothing_dangerous() {
        let profile = default_profile().unwrap();
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
