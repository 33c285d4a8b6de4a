//! A vCPU's registers at the kernel's 64-bit entry (Documentation/arch/x86/boot.rst): long mode, the first
//! GiB mapped one to one, RSI at the zero page.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::errno;

use crate::memory::{
    BOOT_GDT, BOOT_IDT, BOOT_PD, BOOT_PDPT, BOOT_PML4, BOOT_STACK, GuestMemory, ZERO_PAGE,
};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 2;
const PAGE_PRESENT_WRITABLE: u64 = 3;
const PAGE_LARGE: u64 = 1 << 7;
const LARGE_PAGE: u64 = 2 << 20;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// Descriptors in GDT order: none, code, data, task. Access byte and flags as in the Intel SDM, 3.4.5.
const GDT: [u64; 4] = [0, descriptor(0xa09b), descriptor(0xc093), descriptor(0x808b)];
const CODE: u16 = 1;
const DATA: u16 = 2;
const TASK: u16 = 3;

/// Which of KVM's calls to set up a vCPU failed.
#[derive(Debug, thiserror::Error)]
pub enum RegistersError {
    #[error("KVM refused the vCPU's {what}")]
    Kvm { what: &'static str, source: errno::Error },
    #[error("KVM refused model-specific register {0:#x}")]
    Msr(u32),
    #[error("the model-specific registers do not fit into a list")]
    MsrList(#[source] vmm_sys_util::fam::Error),
}

/// The descriptor of a flat 4 GiB segment; the low 12 bits are access byte and flags.
const fn descriptor(flags: u64) -> u64 {
    (flags & 0xf0ff) << 40 | 0xf << 48 | 0xffff
}

/// Writes GDT, an empty IDT and the page tables. Once, before the first vCPU starts.
pub fn write_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    for (entry, at) in GDT.into_iter().zip((BOOT_GDT.0..).step_by(8)) {
        memory.write_obj(entry, GuestAddress(at))?;
    }
    memory.write_obj(0u64, BOOT_IDT)?;
    memory.write_obj(BOOT_PDPT.0 | PAGE_PRESENT_WRITABLE, BOOT_PML4)?;
    memory.write_obj(BOOT_PD.0 | PAGE_PRESENT_WRITABLE, BOOT_PDPT)?;
    let mut directory = [0u8; 4096];
    for (entry, page) in directory.chunks_exact_mut(8).zip(0u64..) {
        let value = (page * LARGE_PAGE) | PAGE_PRESENT_WRITABLE | PAGE_LARGE;
        entry.copy_from_slice(&value.to_le_bytes());
    }
    memory.write_slice(&directory, BOOT_PD)
}

/// What every vCPU needs. (The local APIC needs nothing: KVM resets it to virtual wire mode, and Linux sets
/// up its two inputs itself.)
pub fn set_msrs(vcpu: &VcpuFd) -> Result<(), RegistersError> {
    let entries = [
        (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        // Without it all of guest memory is uncached to the guest.
        (MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).map_err(RegistersError::MsrList)?;
    let set = vcpu
        .set_msrs(&msrs)
        .map_err(|source| RegistersError::Kvm { what: "model-specific registers", source })?;
    entries.get(set).map_or(Ok(()), |refused| Err(RegistersError::Msr(refused.index)))
}

/// Puts the boot vCPU at the kernel's `entry`. The others wait for the guest's start-up IPI as they are.
pub fn set_entry(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), RegistersError> {
    let refused = |what| move |source| RegistersError::Kvm { what, source };
    let mut sregs = vcpu.get_sregs().map_err(refused("special registers"))?;
    sregs.gdt.base = BOOT_GDT.0;
    sregs.gdt.limit = size_of_val(&GDT) as u16 - 1;
    sregs.idt.base = BOOT_IDT.0;
    sregs.idt.limit = 7;
    sregs.cs = segment(CODE);
    let data = segment(DATA);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TASK);
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = BOOT_PML4.0;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).map_err(refused("special registers"))?;
    let regs = kvm_regs {
        rflags: RFLAGS_RESERVED,
        rip: entry.0,
        rsp: BOOT_STACK.0,
        rbp: BOOT_STACK.0,
        rsi: ZERO_PAGE.0,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(refused("registers"))
}

/// The hidden part of a segment register, from its descriptor.
fn segment(index: u16) -> kvm_segment {
    let bits = GDT[usize::from(index)] >> 40;
    let bit = |n: u64| (bits >> n & 1) as u8;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index * 8,
        type_: (bits & 0xf) as u8,
        s: bit(4),
        dpl: 0,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: 0,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn segments_are_flat_and_of_their_kind() {
        let code = segment(CODE);
        assert_eq!(
            (code.type_, code.s, code.present, code.l, code.db, code.g),
            (11, 1, 1, 1, 0, 1)
        );
        assert_eq!(code.selector, 8);
        let data = segment(DATA);
        assert_eq!((data.type_, data.s, data.present, data.l, data.db, data.g), (3, 1, 1, 0, 1, 1));
        let task = segment(TASK);
        assert_eq!((task.type_, task.s, task.present), (11, 0, 1));
        assert_eq!(GDT[1], 0x00af_9b00_0000_ffff);
        assert_eq!(GDT[2], 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn the_first_gib_is_mapped_one_to_one() {
        let memory = memory::map(2).unwrap();
        write_tables(&memory).unwrap();
        let entry =
            |table: u64, i: u64| memory.read_obj::<u64>(GuestAddress(table + i * 8)).unwrap();
        for address in [0, 0x10_0000, 0x20_0000, 0x3fff_ffff_u64] {
            let pdpt = entry(BOOT_PML4.0, address >> 39) & !0xfff;
            let directory = entry(pdpt, address >> 30) & !0xfff;
            let page = entry(directory, (address >> 21) & 0x1ff);
            assert_eq!(page & 0xfff, PAGE_PRESENT_WRITABLE | PAGE_LARGE);
            assert_eq!(page & !0xfff, address & !(LARGE_PAGE - 1));
        }
    }
}
