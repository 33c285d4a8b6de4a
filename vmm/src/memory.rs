//! Guest physical memory: its layout, and the mappings behind it. Nothing here changes after boot.
//!
//! ```text
//! 0x0000_0500  GDT, IDT           0x0009_fc00  MP table (base memory's last KiB)
//! 0x0000_7000  zero page          0x0010_0000  kernel and everything else
//! 0x0000_8ff0  boot stack         0xd000_0000  virtio-mmio windows, one page each
//! 0x0000_9000  page tables        0xfec0_0000  IOAPIC, LAPIC, KVM's TSS: in the kernel
//! 0x0002_0000  command line       1 << 32      RAM that did not fit below the hole
//! ```

use std::io;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollectionError,
    GuestRegionMmap,
    mmap::{MmapRegionBuilder, MmapRegionError},
};

/// The guest's RAM as every device and loader sees it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Start of the hole below 4 GiB that holds no RAM.
pub const MMIO_HOLE_START: u64 = 0xd000_0000;
/// End of the hole: RAM goes on here.
pub const MMIO_HOLE_END: u64 = 1 << 32;
/// The first virtio-mmio window.
pub const VIRTIO_MMIO_START: u64 = MMIO_HOLE_START;
/// Bytes from one virtio-mmio window to the next.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// The interrupt of the first virtio-mmio device; the others follow (0-4 are the PC's, 4 being COM1).
pub const VIRTIO_FIRST_IRQ: u32 = 5;
/// Three pages that KVM needs in guest address space on Intel for real mode.
pub const KVM_TSS: usize = 0xfffb_d000;

pub const BOOT_GDT: GuestAddress = GuestAddress(0x500);
pub const BOOT_IDT: GuestAddress = GuestAddress(0x520);
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
pub const BOOT_STACK: GuestAddress = GuestAddress(0x8ff0);
pub const BOOT_PML4: GuestAddress = GuestAddress(0x9000);
pub const BOOT_PDPT: GuestAddress = GuestAddress(0xa000);
pub const BOOT_PD: GuestAddress = GuestAddress(0xb000);
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// Longest kernel command line with its final NUL, in bytes (x86 `COMMAND_LINE_SIZE`).
pub const CMDLINE_SIZE: usize = 2048;
/// End of base memory: what lies from here to [`HIGH_RAM`] is not the guest's to use.
pub const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);
/// Where RAM begins that the kernel may be loaded to.
pub const HIGH_RAM: GuestAddress = GuestAddress(0x10_0000);

const HUGE_PAGE: usize = 2 << 20;
const PROT: i32 = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// What can go wrong while guest RAM is made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("guest memory of {mib} MiB cannot be mapped")]
    Map { mib: u64, source: MmapRegionError },
    #[error("the guest memory regions do not fit together")]
    Regions(#[from] GuestRegionCollectionError),
    #[error("KVM refused guest memory slot {slot}")]
    Slot { slot: u32, source: io::Error },
}

/// The ranges of RAM, in bytes, that `size` bytes of memory make: at most one below and one above the hole.
pub fn ranges(size: u64) -> Vec<(GuestAddress, u64)> {
    let low = size.min(MMIO_HOLE_START);
    let high = size - low;
    [(GuestAddress(0), low), (GuestAddress(MMIO_HOLE_END), high)]
        .into_iter()
        .filter(|&(_, size)| size > 0)
        .collect()
}

/// Maps `mib` MiB of guest RAM: private, anonymous, and paid for only when touched.
pub fn map(mib: u32) -> Result<GuestMemory, MemoryError> {
    let regions = ranges(u64::from(mib) << 20)
        .into_iter()
        .map(|(start, size)| map_region(start, size))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(GuestMemory::from_regions(regions)?)
}

/// Aligned to [`HUGE_PAGE`], as guest addresses are, so that KVM can map 2 MiB at a time: without it a boot
/// takes thousands of nested page faults. The mapping lives as long as the process.
fn map_region(start: GuestAddress, size: u64) -> Result<GuestRegionMmap<()>, MemoryError> {
    let mib = size >> 20;
    let refused = |source| MemoryError::Map { mib, source };
    let address = map_aligned(size as usize).map_err(|e| refused(MmapRegionError::Mmap(e)))?;
    // SAFETY: `map_aligned` made a mapping of this size at this address, for this region alone.
    let builder = unsafe { MmapRegionBuilder::new(size as usize).with_raw_mmap_pointer(address) };
    let mapping = builder.with_mmap_prot(PROT).with_mmap_flags(FLAGS).build().map_err(refused)?;
    GuestRegionMmap::new(mapping, start)
        .ok_or(MemoryError::Regions(GuestRegionCollectionError::MemoryRegionOverlap))
}

/// An anonymous mapping whose address is a multiple of [`HUGE_PAGE`], backed by huge pages if there are any.
fn map_aligned(size: usize) -> io::Result<*mut u8> {
    let slack = size.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: a new mapping at an address of the kernel's choice; what is unmapped is the unused part of it.
    unsafe {
        let mapped = libc::mmap(std::ptr::null_mut(), slack, PROT, FLAGS, -1, 0);
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let before = mapped.align_offset(HUGE_PAGE);
        let aligned = mapped.add(before);
        libc::munmap(mapped, before);
        libc::munmap(aligned.add(size), HUGE_PAGE - before);
        // A kernel without transparent huge pages refuses: then it is small pages.
        libc::madvise(aligned, size, libc::MADV_HUGEPAGE);
        Ok(aligned.cast())
    }
}

/// Gives every region to KVM. To be done before the irqchip exists: a slot costs 0.1 ms then and 7 ms after.
pub fn register_slots(vm: &VmFd, memory: &GuestMemory) -> Result<(), MemoryError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the mapping is private to guest RAM, and `GuestMemory` outlives the VM: the process ends
        // with it.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(|e| MemoryError::Slot { slot, source: e.into() })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_round_the_hole() {
        let mib = |n: u64| n << 20;
        assert_eq!(ranges(mib(64)), [(GuestAddress(0), mib(64))]);
        assert_eq!(ranges(MMIO_HOLE_START), [(GuestAddress(0), MMIO_HOLE_START)]);
        assert_eq!(
            ranges(mib(4096)),
            [(GuestAddress(0), MMIO_HOLE_START), (GuestAddress(1 << 32), mib(4096 - 3328))]
        );
    }

    #[test]
    fn mapped_memory_has_the_size_asked_for() {
        let memory = map(4096).unwrap();
        assert_eq!(memory.iter().map(|r| r.len()).sum::<u64>(), 4 << 30);
        assert!(!memory.address_in_range(GuestAddress(MMIO_HOLE_START)));
        assert!(memory.address_in_range(GuestAddress(MMIO_HOLE_END)));
        assert!(memory.iter().all(|r| (r.as_ptr() as usize).is_multiple_of(HUGE_PAGE)));
    }

    #[test]
    fn boot_structures_do_not_overlap() {
        let mut starts = [
            (BOOT_GDT.0, 0x20),
            (BOOT_IDT.0, 0x10),
            (ZERO_PAGE.0, 0x1000),
            (BOOT_PML4.0, 0x1000),
            (BOOT_PDPT.0, 0x1000),
            (BOOT_PD.0, 0x1000),
            (CMDLINE.0, CMDLINE_SIZE as u64),
            (MP_TABLE.0, 0x400),
            (HIGH_RAM.0, 0),
        ];
        starts.sort();
        assert!(starts.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
    }
}
