//! Whether this host can run sandboxes: one line for each thing needed, and what to do about what is missing.

mod probe;

use std::{fmt, path::Path};

use kvm_ioctls::{Cap, Kvm};
use serde::Serialize;

use crate::{kvm, paths::Paths};
pub use probe::{ProbeError, Speed};

/// Loop turns per second in guest kernel mode that a usable KVM does at least. Hardware does 1000 M and more;
/// KVM inside QEMU's TCG was measured at 53 to 79 M on a busy machine, one that emulates guest kernels at 1 M.
pub const LEAST_SPEED: u64 = 5_000_000;

/// What ampoule-vmm needs of KVM beyond the least there is.
const CAPABILITIES: [(Cap, &str); 6] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// What was found of one thing.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub what: String,
    /// The way out, if it is not good.
    pub problem: Option<String>,
}

impl Finding {
    fn good(what: impl Into<String>) -> Self {
        Self { what: what.into(), problem: None }
    }

    fn bad(what: impl Into<String>, way_out: impl Into<String>) -> Self {
        Self { what: what.into(), problem: Some(way_out.into()) }
    }

    pub fn is_good(&self) -> bool {
        self.problem.is_none()
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.problem {
            None => write!(f, "ok       {}", self.what),
            Some(way_out) => write!(f, "PROBLEM  {}\n         {way_out}", self.what),
        }
    }
}

/// Everything.
pub fn all(paths: &Paths) -> Vec<Finding> {
    let mut findings = kvm();
    findings.push(file(
        "ampoule-vmm",
        &paths.vmm,
        "it belongs beside `ampoule`; AMPOULE_VMM names another",
    ));
    findings.push(file(
        "guest kernel",
        &paths.kernel,
        "build it with `make kernel`, or see --kernel",
    ));
    findings.push(file(
        "guest image",
        &paths.guest,
        "build it with `make guest`, or see --guest-image",
    ));
    findings.push(mkfs());
    findings
}

/// `/dev/kvm` alone; ends at the first problem.
pub fn kvm() -> Vec<Finding> {
    let mut findings = Vec::new();
    let kvm = match kvm::open() {
        Ok(kvm) => kvm,
        Err(error) => {
            findings.push(Finding::bad(chain(&error), error.hint()));
            return findings;
        }
    };
    findings.push(Finding::good("/dev/kvm: readable and writable, API version 12"));
    let kvm = probe::kvm(kvm);
    findings.push(capabilities(&kvm));
    if findings.iter().all(Finding::is_good) {
        findings.push(speed(probe::run(&kvm)));
    }
    findings
}

/// Why this KVM cannot run guest kernels at all, if so. Takes milliseconds where it can.
pub fn emulation() -> Option<String> {
    let kvm = probe::kvm(kvm::open().ok()?);
    match probe::steps(&kvm) {
        Err(error @ ProbeError::Stuck(..)) => Some(error.to_string()),
        _ => None,
    }
}

fn capabilities(kvm: &Kvm) -> Finding {
    let missing: Vec<&str> = CAPABILITIES
        .iter()
        .filter(|(cap, _)| !kvm.check_extension(*cap))
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        Finding::good("/dev/kvm: has the capabilities needed")
    } else {
        let what = format!("/dev/kvm: lacks {}", missing.join(", "));
        Finding::bad(what, "use a newer kernel on this host")
    }
}

const EMULATED: &str = "this KVM emulates guest kernels: use a host with VT-x or AMD-V, or nested virtualization switched on \
     (in this project's tree, `make demo` and `make test` use tests/bed by themselves)";

fn speed(result: Result<Speed, ProbeError>) -> Finding {
    match result {
        Ok(Speed(turns)) if turns >= LEAST_SPEED => Finding::good(format!(
            "/dev/kvm: guest kernel mode runs at {} M loop turns/s",
            turns / 1_000_000
        )),
        Ok(Speed(turns)) => Finding::bad(
            format!(
                "/dev/kvm: guest kernel mode is slow: {:.1} M loop turns/s",
                turns as f64 / 1e6
            ),
            EMULATED,
        ),
        Err(error) => Finding::bad(format!("/dev/kvm: {}", chain(&error)), EMULATED),
    }
}

fn file(what: &str, path: &Path, way_out: &str) -> Finding {
    match path.metadata() {
        Ok(meta) if meta.is_file() => {
            Finding::good(format!("{what}: {} ({:.1} MB)", path.display(), meta.len() as f64 / 1e6))
        }
        Ok(_) => Finding::bad(format!("{what}: {}: not a file", path.display()), way_out),
        Err(error) => Finding::bad(format!("{what}: {}: {error}", path.display()), way_out),
    }
}

/// Debian keeps it out of an ordinary user's PATH.
fn mkfs() -> Finding {
    let places = ["/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4", "/usr/bin/mkfs.ext4"];
    match places.iter().find(|place| Path::new(place).exists()) {
        Some(place) => Finding::good(format!("mkfs.ext4: {place}")),
        None => Finding::bad("mkfs.ext4: not found", "apt-get install e2fsprogs"),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speed_is_judged_with_a_way_out() {
        assert!(speed(Ok(Speed(LEAST_SPEED))).is_good());
        let slow = speed(Ok(Speed(1_500_000)));
        assert!(!slow.is_good());
        assert!(slow.to_string().contains("1.5 M loop turns/s"), "{slow}");
    }

    #[test]
    fn a_missing_file_is_named_with_a_way_out() {
        let finding = file("guest kernel", Path::new("/no/vmlinux"), "make it");
        let text = finding.to_string();
        assert!(text.contains("/no/vmlinux: No such file") && text.contains("make it"), "{text}");
    }
}
