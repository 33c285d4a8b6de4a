//! A guest of a few instructions, all in kernel mode, to see how fast and how completely a KVM runs it.
//!
//! The guest counts down a loop, which is timed, and then executes instructions that a guest kernel cannot do
//! without and that an emulating KVM tends to lack. After each step it writes to a port, which gives control
//! back.

use std::{
    fs::File,
    io,
    os::fd::{FromRawFd, IntoRawFd},
    time::{Duration, Instant},
};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Turns of the loop per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Speed(pub u64);

/// Why the guest did not get through.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    #[error("{0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    #[error("memory for a guest")]
    Memory(#[source] io::Error),
    #[error("a guest kernel could not execute {0} ({1})")]
    Stuck(&'static str, String),
}

const SIZE: usize = 0x10000;
const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const DIRECTORY: usize = 0x3000;
const CODE: usize = 0x8000;
const DATA: u64 = 0x9000;

/// Turns to begin with: 0.05 s where kernel mode is emulated.
const FEW: u32 = 50_000;
/// Turns for a good measurement where it is not.
const MANY: u32 = 5_000_000;

/// `out 0x80, al`: the end of a step.
const DONE: [u8; 2] = [0xe6, 0x80];
/// The steps: a name and 64-bit code. ECX holds the turns at first, RSI the address of data.
const STEPS: [(&str, &[u8]); 5] = [
    // 1: dec ecx; jnz 1b
    ("a loop", &[0xff, 0xc9, 0x75, 0xfc]),
    // xor eax, eax; xor edx, edx; xor ebx, ebx; lock cmpxchg16b [rsi]
    ("cmpxchg16b", &[0x31, 0xc0, 0x31, 0xd2, 0x31, 0xdb, 0xf0, 0x48, 0x0f, 0xc7, 0x0e]),
    // mov rax, cr3; mov cr3, rax
    ("a write to CR3", &[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]),
    // mov ecx, 0xc0000080; rdmsr; wrmsr
    ("a write to EFER", &[0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32, 0x0f, 0x30]),
    ("clac", &[0x0f, 0x01, 0xca]),
];

/// Takes an open `/dev/kvm` over.
pub(super) fn kvm(file: File) -> Kvm {
    // SAFETY: the descriptor was just given up by its owner, and `kvm::open` recognised it.
    unsafe { kvm_ioctls::Kvm::from_raw_fd(file.into_raw_fd()) }
}

/// Runs the guest.
pub(super) fn run(kvm: &Kvm) -> Result<Speed, ProbeError> {
    let mut guest = Guest::new(kvm)?;
    // The first entries fault in memory and, nested, translate code.
    guest.count(1)?;
    let mut speed = guest.best_of_three(FEW)?;
    if speed > Speed(super::LEAST_SPEED / 4) {
        speed = guest.best_of_three(MANY)?;
    }
    guest.finish()?;
    Ok(speed)
}

/// Runs every step once, with one turn of the loop.
pub(super) fn steps(kvm: &Kvm) -> Result<(), ProbeError> {
    let mut guest = Guest::new(kvm)?;
    guest.count(1)?;
    guest.finish()
}

struct Guest {
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: Memory,
    smap: bool,
}

impl Guest {
    fn new(kvm: &Kvm) -> Result<Self, ProbeError> {
        let vm = kvm.create_vm().map_err(|e| ProbeError::Kvm("make a VM", e))?;
        let memory = Memory::new()?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: SIZE as u64,
            userspace_addr: memory.0 as u64,
        };
        // SAFETY: the memory is mapped, of this size, and unmapped after the VM is closed (field order).
        let added = unsafe { vm.set_user_memory_region(region) };
        added.map_err(|e| ProbeError::Kvm("give the VM memory", e))?;
        let vcpu = vm.create_vcpu(0).map_err(|e| ProbeError::Kvm("make a vCPU", e))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| ProbeError::Kvm("ask for CPUID", e))?;
        vcpu.set_cpuid2(&cpuid).map_err(|e| ProbeError::Kvm("set CPUID", e))?;
        // Leaf 7, EBX bit 20: the CPU knows clac.
        let smap = cpuid.as_slice().iter().any(|e| e.function == 7 && e.ebx & 1 << 20 != 0);
        let guest = Self { vcpu, _vm: vm, _memory: memory, smap };
        let sregs = guest.vcpu.get_sregs().map_err(|e| ProbeError::Kvm("read registers", e))?;
        guest
            .vcpu
            .set_sregs(&long_mode(sregs))
            .map_err(|e| ProbeError::Kvm("enter 64-bit mode", e))?;
        Ok(guest)
    }

    /// The best, because this process may lose the CPU while it measures.
    fn best_of_three(&mut self, turns: u32) -> Result<Speed, ProbeError> {
        let mut best = Duration::MAX;
        for _ in 0..3 {
            best = best.min(self.count(turns)?);
        }
        let nanoseconds = u64::try_from(best.as_nanos()).unwrap_or(u64::MAX).max(1);
        Ok(Speed(u64::from(turns) * 1_000_000_000 / nanoseconds))
    }

    /// Starts over and times the loop.
    fn count(&mut self, turns: u32) -> Result<Duration, ProbeError> {
        let regs = kvm_regs {
            rip: CODE as u64,
            rcx: turns.into(),
            rsi: DATA,
            rsp: DATA,
            rflags: 2,
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).map_err(|e| ProbeError::Kvm("set registers", e))?;
        let began = Instant::now();
        self.step(STEPS[0].0)?;
        Ok(began.elapsed())
    }

    /// The other steps.
    fn finish(&mut self) -> Result<(), ProbeError> {
        let last = if self.smap { STEPS.len() } else { STEPS.len() - 1 };
        STEPS[1..last].iter().try_for_each(|(name, _)| self.step(name))
    }

    fn step(&mut self, name: &'static str) -> Result<(), ProbeError> {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(0x80, _)) => return Ok(()),
                Ok(other) => return Err(ProbeError::Stuck(name, format!("{other:?}"))),
                Err(e) if e.errno() == libc::EINTR => {}
                Err(e) => return Err(ProbeError::Stuck(name, e.to_string())),
            }
        }
    }
}

/// Flat 64-bit mode, kernel privilege, no interrupts (Intel SDM 3A, 9.8.5).
fn long_mode(mut sregs: kvm_sregs) -> kvm_sregs {
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 8,
        type_: 11,
        present: 1,
        dpl: 0,
        db: 0,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 16, type_: 3, db: 1, l: 0, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr3 = PML4 as u64;
    sregs.cr4 = 1 << 5; // PAE
    sregs.cr0 = 1 << 31 | 1 << 4 | 1; // PG, ET, PE
    sregs.efer = 1 << 10 | 1 << 8; // LMA, LME
    sregs
}

/// The guest's memory: identity page tables and the code.
struct Memory(*mut u8);

impl Memory {
    fn new() -> Result<Self, ProbeError> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let map = unsafe { mmap_anonymous(std::ptr::null_mut(), SIZE, access, flags) };
        let memory = Self(map.map_err(|e| ProbeError::Memory(e.into()))?.cast());
        const PRESENT_WRITABLE: u64 = 3;
        const LARGE: u64 = 1 << 7;
        memory.write(PML4, &(PDPT as u64 | PRESENT_WRITABLE).to_le_bytes());
        memory.write(PDPT, &(DIRECTORY as u64 | PRESENT_WRITABLE).to_le_bytes());
        memory.write(DIRECTORY, &(LARGE | PRESENT_WRITABLE).to_le_bytes());
        let code: Vec<u8> = STEPS.iter().flat_map(|(_, code)| [code, &DONE[..]].concat()).collect();
        memory.write(CODE, &code);
        Ok(memory)
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= SIZE);
        // SAFETY: in bounds of the mapping, which nothing else uses before the guest runs.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.add(at), bytes.len()) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this size; the VM that used it is closed.
        let _ = unsafe { munmap(self.0.cast(), SIZE) };
    }
}
