//! KVM itself: the descriptor the shim passed, checked for what a VM needs, and the VM made from it.

use std::os::fd::{IntoRawFd, OwnedFd};

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Cap, Kvm, VmFd};
use vmm_sys_util::errno;

use crate::memory::KVM_TSS;

const REQUIRED: [(Cap, &str); 10] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    #[error("the descriptor passed for /dev/kvm is not KVM's")]
    NotKvm,
    #[error("KVM speaks API version {0}, not {KVM_API_VERSION}")]
    Version(i32),
    #[error("this host's KVM has no {0}")]
    Missing(&'static str),
    #[error("KVM cannot make a VM")]
    CreateVm(#[source] errno::Error),
    #[error("KVM refused the VM's {what}")]
    Setup { what: &'static str, source: errno::Error },
}

/// Takes over the descriptor.
pub fn open(fd: OwnedFd) -> Result<Kvm, KvmError> {
    // SAFETY: the descriptor is open and ours alone; whether it is KVM's is checked next.
    let kvm = unsafe { <Kvm as std::os::fd::FromRawFd>::from_raw_fd(fd.into_raw_fd()) };
    match kvm.get_api_version() {
        version if version == KVM_API_VERSION as i32 => {}
        version if version < 0 => return Err(KvmError::NotKvm),
        version => return Err(KvmError::Version(version)),
    }
    match REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(KvmError::Missing(name)),
        None => Ok(kvm),
    }
}

/// An empty VM.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    loop {
        match kvm.create_vm() {
            // A signal while KVM waits for its own locks.
            Err(e) if e.errno() == libc::EINTR => continue,
            made => return made.map_err(KvmError::CreateVm),
        }
    }
}

/// PIC, IOAPIC and local APICs, in the kernel. After the memory slots, before the vCPUs.
pub fn create_irqchip(vm: &VmFd) -> Result<(), KvmError> {
    let refused = |what| move |source| KvmError::Setup { what, source };
    vm.set_tss_address(KVM_TSS).map_err(refused("task state segment"))?;
    vm.create_irq_chip().map_err(refused("interrupt controllers"))
}
