//! What the kernel is told at entry: the zero page with its memory map, and the command line
//! (Documentation/arch/x86/boot.rst, 64-bit boot protocol).

use linux_loader::{
    bootparam::{LOADED_HIGH, boot_e820_entry, boot_params},
    cmdline::{self, Cmdline},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use crate::memory::{
    CMDLINE, CMDLINE_SIZE, GuestMemory, HIGH_RAM, MP_TABLE, VIRTIO_FIRST_IRQ, VIRTIO_MMIO_SIZE,
    VIRTIO_MMIO_START, ZERO_PAGE,
};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// The words every guest gets, with why.
const BASE_CMDLINE: [&str; 16] = [
    // The console ring; only emergencies: each character is a VM exit.
    "console=ttyS0",
    "quiet",
    "loglevel=1",
    "8250.nr_uarts=1",
    // A panic resets at once, through port 0x64: that ends the VM.
    "panic=-1",
    "reboot=k",
    // The guest image and its PID 1.
    "root=/dev/vda",
    "rootfstype=erofs",
    "ro",
    "init=/sbin/ampoule-agent",
    // Nothing to calibrate or to wait for: kvm-clock and the TSC-deadline timer do it.
    "tsc=reliable",
    "no_timer_check",
    // Shorter grace periods while booting.
    "rcupdate.rcu_expedited=1",
    // The processor's random numbers count: nothing waits for entropy.
    "random.trust_cpu=on",
    // On one vCPU: leave 8,000 lock prefixes as they are rather than patch them away.
    "noreplace-smp",
    // No network interface that nobody asked for.
    "dummy.numdummies=0",
];

/// Why the kernel's parameters cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum BootParamsError {
    #[error("the kernel command line is longer than {} bytes or not printable ASCII", CMDLINE_SIZE - 1)]
    Cmdline(#[from] cmdline::Error),
    #[error("the boot parameters do not fit into guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// The command line: the base, one `virtio_mmio.device` for each device, then the caller's `extra` words, which
/// may override what came before and end in `--` with arguments for PID 1.
pub fn cmdline(extra: &str, devices: usize) -> Result<Cmdline, BootParamsError> {
    let mut cmdline = Cmdline::new(CMDLINE_SIZE)?;
    for word in BASE_CMDLINE {
        cmdline.insert_str(word)?;
    }
    for (base, irq) in (0..devices).map(device_slot) {
        cmdline.add_virtio_mmio_device(VIRTIO_MMIO_SIZE, base, irq, None)?;
    }
    if !extra.trim().is_empty() {
        cmdline.insert_str(extra)?;
    }
    Ok(cmdline)
}

/// The MMIO window and the interrupt of the virtio device of this number.
pub fn device_slot(number: usize) -> (GuestAddress, u32) {
    let base = VIRTIO_MMIO_START + number as u64 * VIRTIO_MMIO_SIZE;
    (GuestAddress(base), VIRTIO_FIRST_IRQ + number as u32)
}

/// Writes command line and zero page into guest memory.
pub fn write(memory: &GuestMemory, cmdline: &Cmdline) -> Result<(), BootParamsError> {
    let text = cmdline.as_cstring()?;
    memory.write_slice(text.as_bytes_with_nul(), CMDLINE)?;
    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags = LOADED_HIGH;
    params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    params.hdr.cmd_line_ptr = CMDLINE.0 as u32;
    params.hdr.cmdline_size = text.as_bytes().len() as u32;
    for (entry, slot) in e820(memory).into_iter().zip(&mut params.e820_table) {
        *slot = entry;
        params.e820_entries += 1;
    }
    Ok(memory.write_obj(params, ZERO_PAGE)?)
}

/// The memory map: base memory, the MP table's corner, then each region from 1 MiB on.
fn e820(memory: &GuestMemory) -> Vec<boot_e820_entry> {
    let entry =
        |start: u64, end: u64, r#type| boot_e820_entry { addr: start, size: end - start, r#type };
    let mut map =
        vec![entry(0, MP_TABLE.0, E820_RAM), entry(MP_TABLE.0, HIGH_RAM.0, E820_RESERVED)];
    for region in memory.iter() {
        let start = region.start_addr().0.max(HIGH_RAM.0);
        map.push(entry(start, region.start_addr().0 + region.len(), E820_RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn the_command_line_names_each_device() {
        let text = cmdline("quiet panic=1", 2).unwrap().as_cstring().unwrap();
        let text = text.to_str().unwrap();
        assert!(text.starts_with("console=ttyS0 "));
        assert!(text.ends_with(
            " virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 quiet panic=1"
        ));
    }

    /// Row P6: a command line that is too long is refused, one that just fits is not.
    #[test]
    fn p6_the_command_line_has_a_limit() {
        let base = cmdline("", 18).unwrap().as_cstring().unwrap().as_bytes().len();
        let room = CMDLINE_SIZE - 1 - base - 1;
        let full = cmdline(&"x".repeat(room), 18).unwrap();
        assert_eq!(full.as_cstring().unwrap().as_bytes_with_nul().len(), CMDLINE_SIZE);
        let error = cmdline(&"x".repeat(room + 1), 18).unwrap_err();
        assert!(error.to_string().contains("2047"), "{error}");
    }

    #[test]
    fn the_command_line_takes_no_control_characters() {
        for bad in ["a\0b", "a\nb", "caf\u{e9}"] {
            assert!(matches!(cmdline(bad, 0), Err(BootParamsError::Cmdline(_))), "{bad:?}");
        }
    }

    #[test]
    fn the_zero_page_describes_the_memory() {
        let memory = memory::map(4096).unwrap();
        write(&memory, &cmdline("", 0).unwrap()).unwrap();
        let params: boot_params = memory.read_obj(ZERO_PAGE).unwrap();
        let map: Vec<(u64, u64, u32)> = params.e820_table[..usize::from(params.e820_entries)]
            .iter()
            .map(|e| (e.addr, e.addr + e.size, e.r#type))
            .collect();
        assert_eq!(
            map,
            [
                (0, 0x9fc00, E820_RAM),
                (0x9fc00, 0x10_0000, E820_RESERVED),
                (0x10_0000, 0xd000_0000, E820_RAM),
                (1 << 32, (1 << 32) + (768 << 20), E820_RAM)
            ]
        );
        let (pointer, size) = (params.hdr.cmd_line_ptr, params.hdr.cmdline_size);
        let mut text = vec![0; size as usize];
        memory.read_slice(&mut text, GuestAddress(pointer.into())).unwrap();
        assert_eq!(text, cmdline("", 0).unwrap().as_cstring().unwrap().to_bytes());
    }

    #[test]
    fn memory_of_one_mib_is_too_small() {
        // The smallest VM is far larger; but the zero page must not make up RAM.
        let memory = memory::map(2).unwrap();
        write(&memory, &cmdline("", 0).unwrap()).unwrap();
        let params: boot_params = memory.read_obj(ZERO_PAGE).unwrap();
        let last = params.e820_table[usize::from(params.e820_entries) - 1];
        assert_eq!({ last.addr } + { last.size }, 2 << 20);
    }
}
