//! The Intel MultiProcessor table: how the kernel learns of its processors, the IOAPIC and the interrupt
//! wiring without ACPI (MultiProcessor Specification 1.4, chapter 4).

use vm_memory::{Bytes, GuestMemoryError};

use crate::memory::{GuestMemory, MP_TABLE};

const SPECIFICATION: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
const LAPIC_ADDRESS: u32 = 0xfee0_0000;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const PROCESSOR_ENABLED: u8 = 1;
const PROCESSOR_BOOT: u8 = 2;
const IOAPIC_ENABLED: u8 = 1;
const INTERRUPT_INT: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;
const ALL_LAPICS: u8 = 0xff;

/// Writes the table for `vcpus` processors, whose APIC ids are 0, 1, 2, …, and for `irqs`, the interrupts in
/// use: the kernel sets up each one that is named, so only those are.
pub fn write(memory: &GuestMemory, vcpus: u8, irqs: &[u8]) -> Result<(), GuestMemoryError> {
    let mut bytes = floating_pointer();
    bytes.extend(configuration(vcpus, irqs));
    memory.write_slice(&bytes, MP_TABLE)
}

/// The 16 bytes the kernel searches for; the configuration follows them.
fn floating_pointer() -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend((MP_TABLE.0 as u32 + 16).to_le_bytes());
    bytes.extend([1, SPECIFICATION, 0, 0, 0, 0, 0, 0]);
    with_checksum(bytes, 10)
}

fn configuration(vcpus: u8, irqs: &[u8]) -> Vec<u8> {
    let ioapic = vcpus;
    let mut entries: Vec<Vec<u8>> = (0..vcpus).map(processor).collect();
    entries.push([&[ENTRY_BUS, 0][..], b"ISA   "].concat());
    entries.push(
        [&[ENTRY_IOAPIC, ioapic, APIC_VERSION, IOAPIC_ENABLED][..], &IOAPIC_ADDRESS.to_le_bytes()]
            .concat(),
    );
    entries.extend(
        irqs.iter().map(|&irq| vec![ENTRY_INTERRUPT, INTERRUPT_INT, 0, 0, 0, irq, ioapic, irq]),
    );
    entries.push(vec![ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTINT, 0, 0, 0, 0, 0, 0]);
    entries.push(vec![ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, 0, 0, ALL_LAPICS, 1]);
    let count = entries.len() as u16;
    let body = entries.concat();

    let mut bytes = b"PCMP".to_vec();
    bytes.extend((44 + body.len() as u16).to_le_bytes());
    bytes.extend([SPECIFICATION, 0]);
    bytes.extend(b"AMPOULE MICROVM     ");
    bytes.extend([0; 6]);
    bytes.extend(count.to_le_bytes());
    bytes.extend(LAPIC_ADDRESS.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(body);
    with_checksum(bytes, 7)
}

fn processor(id: u8) -> Vec<u8> {
    let flags = PROCESSOR_ENABLED | if id == 0 { PROCESSOR_BOOT } else { 0 };
    // Family 6, and that there is an FPU and an APIC; the kernel believes CPUID over this.
    let (signature, features) = (0x600u32.to_le_bytes(), 0x201u32.to_le_bytes());
    [&[ENTRY_PROCESSOR, id, APIC_VERSION, flags][..], &signature, &features, &[0; 8]].concat()
}

/// Sets the byte at `place` so that all bytes add up to zero.
fn with_checksum(mut bytes: Vec<u8>, place: usize) -> Vec<u8> {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[place] = sum.wrapping_neg();
    bytes
}

#[cfg(test)]
mod tests {
    use ampoule_vmm_api::config::MAX_VCPUS;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::memory::{self, HIGH_RAM};

    /// All pins of KVM's IOAPIC.
    const IRQS: [u8; 24] =
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

    fn table(vcpus: u8) -> Vec<u8> {
        let memory = memory::map(2).unwrap();
        write(&memory, vcpus, &IRQS).unwrap();
        let mut bytes = vec![0; (HIGH_RAM.0 - MP_TABLE.0) as usize];
        memory.read_slice(&mut bytes, GuestAddress(MP_TABLE.0)).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn the_table_is_consistent_for_every_number_of_processors() {
        for vcpus in 1..=MAX_VCPUS {
            let bytes = table(vcpus);
            assert_eq!((&bytes[..4], sum(&bytes[..16])), (&b"_MP_"[..], 0));
            assert_eq!(u32::from_le_bytes(bytes[4..8].try_into().unwrap()), MP_TABLE.0 as u32 + 16);
            let table = &bytes[16..];
            let length = usize::from(u16::from_le_bytes([table[4], table[5]]));
            assert_eq!((&table[..4], sum(&table[..length])), (&b"PCMP"[..], 0));
            assert!(16 + length <= 0x400, "base memory's last KiB");
            let (mut at, mut count, mut processors, mut irqs) = (44, 0, vec![], vec![]);
            while at < length {
                let size = if table[at] == ENTRY_PROCESSOR { 20 } else { 8 };
                if table[at] == ENTRY_PROCESSOR {
                    processors.push((table[at + 1], table[at + 3]));
                }
                if table[at] == ENTRY_INTERRUPT {
                    assert_eq!(table[at + 5], table[at + 7], "interrupt n is wired to pin n");
                    irqs.push(table[at + 5]);
                }
                (at, count) = (at + size, count + 1);
            }
            assert_eq!(at, length);
            assert_eq!(count, u16::from_le_bytes([table[34], table[35]]));
            let expected: Vec<_> = (0..vcpus).map(|id| (id, if id == 0 { 3 } else { 1 })).collect();
            assert_eq!(processors, expected);
            assert_eq!(irqs, IRQS);
        }
    }
}
